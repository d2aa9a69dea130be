# SPDX-License-Identifier: MIT
"""The demonstration that ``scripts/demo`` runs inside the VM.

``__main__`` on two vGPUs alone, ``qemu`` in two real QEMUs, ``mainline`` on the kernel's own mtty, ``gvt`` on the
real kvmgt, ``running`` has QEMU move a running guest of it; ``report`` checks and prints, ``picture`` draws what was
printed.
"""
