# SPDX-License-Identifier: MIT
"""VFIO clients by raw ioctls, which share nothing with the library under test.

=======  ============================================================
``raw``  containers, guest memory, devices, the RFC's two ioctls
``v2``   the migration protocol v2
=======  ============================================================
"""
