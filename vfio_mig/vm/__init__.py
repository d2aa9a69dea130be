# SPDX-License-Identifier: MIT
"""A VM around the device: QEMU is paused and asked, so that a vGPU and the guest's memory are saved as of one moment.

``named`` saves and restores a VM by its name, ``survey`` lists VMs, ``jobs`` does it with a monitor at hand,
``machine`` knows what QEMU says of itself (run states, devices, a virtual IOMMU), ``memory`` finds the guest's RAM.
``monitor`` is what they all take for a QEMU's monitor: ``qmp`` at a socket, or ``domain``, a libvirt domain, of which
``connection`` is libvirt's binding and ``domainxml`` reads the description. Nothing that QEMU or libvirt answers is
taken on trust: it may be old, new, or in the hands of its guest.
"""
