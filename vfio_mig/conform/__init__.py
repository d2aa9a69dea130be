# SPDX-License-Identifier: MIT
"""Does a device's migration driver keep the rules of the kernel's header? Check by check, each with its source.

``registry`` lists all checks. ``kit`` is what they are made of: ``verdict`` (how a check says that a rule is broken),
``check`` (a rule with its source), ``rig`` (the device under test, with what checks share), ``v2_device`` and
``rfc_device`` (single requests, every errno as it came: the rooms below would hide what is checked here), ``runner``
(runs them and leaves the device running) and ``report`` (prints what came of it).

The checks of the protocol v2 are in ``v2``: ``feature`` (the envelope, flags, sizes), ``arcs`` (each pair of states),
``fds`` (the data fd), ``streams`` (what is in it), ``precopy``, ``dirty`` (DMA logging) and ``ends`` (reset, close, two
devices); those of the RFC are in ``rfc``. docs/conform.md explains each.
"""
