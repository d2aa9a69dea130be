# SPDX-License-Identifier: MIT
"""A guest for a vGPU: the distribution's kernel with its own i915, and a program that gives the GPU work and checks it.

``image`` makes the guest's files on the host, by ``cpio``; ``machine`` runs them in a QEMU, inside of
``scripts/vm --gvt --l2``, ``moves`` has QEMU migrate the guest, and ``pair`` is two vGPUs between which it does.
tools/l2/README.md has more.
"""
