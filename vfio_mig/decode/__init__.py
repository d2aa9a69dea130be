# SPDX-License-Identifier: MIT
"""What is in a device's state, in words: each module takes one layout apart.

All of it works on bytes that anybody may have made: sizes are compared with what is there, lists have a bound, and
what cannot be decoded is said instead of raised.

``streams`` knows a state by its first bytes, and takes streams of protocol v2 apart: begin there to add one.
``gvt_image`` is the strict parser of the RFC's image, before anything reaches a device; ``gvt`` puts it into words,
with ``gtt`` (page tables), ``registers``, ``commands`` (queued work) and ``gvt_ext`` (what our kvmgt adds) for its
parts; ``pci`` a configuration space.
``qemu`` finds VFIO devices in a QEMU migration stream: ``qemu_parts`` is what it returns, ``qemu_ram`` and
``qemu_disk`` pass over what is the guest's own, ``qemu_description`` is QEMU's own word on the stream, ``qemu_replace``
puts another state of a device into one, ``cursor`` reads it. ``section`` is what all of them return. ``differences``
compares two states, ``memorydiff`` and ``pagemap`` the guest memory of two archives.
"""
