# SPDX-License-Identifier: MIT
"""How one family of devices is stopped, read and loaded.

``base`` is what every protocol offers, and what holds after a failure; ``gvt_rfc`` is the RFC of 2017, ``mainline_v2``
the kernel's own, with ``dma_logging`` for its log of writes. ``detect`` chooses, without a request that could mean
something else.
"""
