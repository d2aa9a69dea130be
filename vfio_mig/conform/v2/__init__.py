# SPDX-License-Identifier: MIT
"""The checks of the migration protocol v2.

``feature``: the envelope, flags, sizes. ``arcs``: each pair of states. ``fds``: the data fd. ``streams``: what is in
it. ``precopy``: PRE_COPY. ``dirty``: DMA logging. ``ends``: reset, close, two devices.
"""
