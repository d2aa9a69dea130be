# SPDX-License-Identifier: MIT
"""Save and restore the vGPU of a running QEMU: what ``scripts/qemu-save`` and ``scripts/qemu-restore`` run."""
