# SPDX-License-Identifier: MIT
"""Benchmarks: ours against a reference, alternately in the same run, medians and ratios.

``native`` needs no kernel, and so ``window``, what a save and a migration do while the device is stopped; ``played`` is
``vfio-mig`` with a file for a device. ``kernel`` and ``imports`` run in the VM, and so ``scale``, how cost grows,
``phases``, the main job on two drivers, ``downtime``, how long a device stands still while we move it, or QEMU, and
``stopped``, how long a vGPU of the real driver does, beside the same in C; ``bars`` draws that. ``startup`` times the
command line. ``table`` is what their figures go through, and ``c/reference.c`` the reference.
"""
