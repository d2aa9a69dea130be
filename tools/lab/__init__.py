# SPDX-License-Identifier: MIT
"""What tests, demonstrations, benches and fault tables share: devices, guests, programs and the kernel, in the VM.

===============  ============================================================
``kernel``       its complaints, what it has allocated, allocations that fail
``vfio``         VFIO clients by raw ioctls, without the library under test
``sample``       our sample driver and the guests that use it
``gvt``          vGPUs of the real kvmgt, on the emulated GPU
``faults``       what befalls jobs, and what must be true afterwards
``mtty``         the kernel's own sample of the migration protocol v2
``drivers``      the sample driver and kvmgt behind one face
``qemu``         QEMU with a vGPU, its driver played through qtest
``libvirtd``     libvirt daemons, each a host of its own to libvirt
``reaper``       what they run under, as nothing else buries their children
``cli``          the installed ``vfio-mig``, as users run it, or in a fork
``imports``      ``vfio-mig``, and what it imports between two of its steps
``borrowing``    a second fd of a device that another process holds
``waiting``      polling, and how slow the machine is now
``fuse_server``  a file system that does not answer
===============  ============================================================

Nothing here imports from the tests, or from the programs that use it.
"""
