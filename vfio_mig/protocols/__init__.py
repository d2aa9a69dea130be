# SPDX-License-Identifier: MIT
"""How one family of devices is stopped, read and loaded.

``registry`` lists the families and chooses one for an open device, without a request that could mean something else
there. ``family`` is what each offers: how its devices are recognised and its states judged; ``base`` is how an open
device is driven, and what holds after a failure, ``abilities`` what only some devices can. ``gvt_rfc`` is the RFC of
2017, ``mainline_v2`` the kernel's own, with ``dma_logging`` for its log of writes; ``flags`` are the latter's, at which
both look. ``none`` stands for a device of no family. A new family is one module and a line in the registry.
"""
