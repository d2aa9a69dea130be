# SPDX-License-Identifier: MIT
"""What is done with files alone, without a device.

``input`` opens an image to load, ``open_file`` any saved device to look into: an image, a bare state, a QEMU stream,
each also compressed, ``header`` a kernel's header, which the RFC's numbers are taken from. ``inspect``, ``diff``,
``extract`` (and pack) and ``pages`` are commands, ``qemu`` those two between an image and a QEMU stream.
"""
