# SPDX-License-Identifier: MIT
"""Save and restore the vGPU of a running QEMU: what ``scripts/qemu-save`` and ``scripts/qemu-restore`` run.

``jobs`` does it, ``memory`` finds the guest's RAM, ``qmp`` talks to the monitor, ``__main__`` is the command line.
"""
