# SPDX-License-Identifier: MIT
"""vGPUs of the real kvmgt, on the emulated GPU.

=========  ============================================================
``kvmgt``  a vGPU, its guest's work, the KVM it wants
``rfc``    our kvmgt: its modules, images, and views to compare
``held``   a vGPU that ``vfio-mig hold`` keeps open
``qemu``   a vGPU that a QEMU has, whose guest is played
=========  ============================================================
"""
