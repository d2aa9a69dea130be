# SPDX-License-Identifier: MIT
"""The sample driver.

===========  ============================================================
``host``     its module, its instances in sysfs, its truth in debugfs
``guest``    a guest that uses a vGPU: memory and its allocator
``gpu``      what a guest's driver does: rings, commands, workloads
``image``    the RFC's state image as bytes
``v2``       the v2 side of a vGPU, with the driver's knobs
``defects``  its defects for conformance checks
``held``     a vGPU that ``vfio-mig hold`` keeps open, with its guest
===========  ============================================================
"""
