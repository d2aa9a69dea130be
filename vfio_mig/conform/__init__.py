# SPDX-License-Identifier: MIT
"""Does a device's migration driver keep the rules of the kernel's header? Check by check, each with its source.

``registry`` lists all checks, ``runner`` runs them and leaves the device running, ``report`` prints
what came of it. ``kit`` has what checks are made of,
``v2`` those of the protocol v2, ``rfc`` those of the RFC, ``rfc_work`` those with work for the GPU. docs/conform.md
explains each.
"""
