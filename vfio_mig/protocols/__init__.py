# SPDX-License-Identifier: MIT
"""How one family of devices is stopped, read and loaded.

``registry`` lists the families and chooses one for an open device, without a request that could mean something else
there. ``family`` is how the devices of each are recognised; ``base`` is how an open device is driven, its states are
judged, and what holds after a failure, ``states`` what is known of such a state, ``abilities`` what only some devices
can. ``gvt_rfc`` is the RFC of
2017, ``mainline_v2`` the kernel's own, with ``dma_logging`` for its log of writes; ``flags`` are the latter's, at which
both look. ``none`` stands for a device of no family. A new family is one module and a line in the registry.
"""
