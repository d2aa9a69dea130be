# SPDX-License-Identifier: MIT
"""Finding devices in sysfs, opening and borrowing them, creating and removing mdevs.

``discover`` finds ``devices`` by any of their names, ``offline`` and ``drivers`` say what is known of one without
opening it, ``mdev`` makes and removes mdevs. ``opening`` opens a device by its group or borrows it, ``cdev`` by its own
node; ``holders`` finds the process that has it, ``migrating`` whether that is migrating it. ``guest`` is guest memory
to be mapped, ``dma`` what was mapped, ``iommufd`` an open ``/dev/iommu``, ``kvm`` a VM for drivers that demand one,
``tracking`` what these know of a device's writes, ``frozen`` has their owner stand still for it. ``lock`` lets one job
at a time work on a device, and tells what a killed one has left; ``lease`` keeps writers away from a file, and ``pipe``
widens a pipe.
"""
