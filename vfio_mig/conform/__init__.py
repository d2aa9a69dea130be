# SPDX-License-Identifier: MIT
"""Does a device's migration driver keep the rules of the kernel's header? Check by check, each with its source.

``registry`` lists all checks, ``runner`` runs them and leaves the device running, ``report`` prints what came of it.
``check`` is what a check is made of, ``bench`` the device under test with what checks share; ``raw`` and ``rfc_raw``
send single requests and give every errno as it came, as the rooms below would hide what is checked here.

The checks of the protocol v2 are in ``feature`` (the envelope, flags, sizes), ``arcs`` (each pair of states), ``fds``
(the data fd), ``streams`` (what is in it), ``precopy``, ``dirty`` (DMA logging) and ``ends`` (reset, close, two
devices); those of the RFC in ``rfc``. docs/conform.md explains each.
"""
