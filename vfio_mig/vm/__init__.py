# SPDX-License-Identifier: MIT
"""A VM around the device: QEMU is paused and asked, so that a vGPU and the guest's memory are saved as of one moment.

``jobs`` saves and restores, ``machine`` knows what QEMU says of itself (run states, devices, a virtual IOMMU),
``memory`` finds the guest's RAM, ``qmp`` talks to the monitor. Nothing that QEMU answers is taken on trust: it may be
old, new, or in the hands of its guest.
"""
