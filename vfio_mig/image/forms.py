# SPDX-License-Identifier: MIT
"""What a file is that should have been an image, by its first bytes: for messages that say how to go on."""

from __future__ import annotations

from typing import Final

from vfio_mig.errors import ImageError
from vfio_mig.image.wrapped import LIBVIRT, LIBVIRT_PARTIAL, compression, how_to_unpack

FIRST: Final = 512
"""Bytes that are enough to tell: those of a tar header."""
NO_IMAGE: Final = "not a vfio-mig image"
EMPTY: Final = "empty: cut off at byte 0, so no device is in it"
_QEMU: Final = b"QEVM"
_HEADER: Final = b"header.json\0"


def _other_form(first: bytes) -> tuple[str, str] | None:
    """Tell what something is that is not an image, and how to go on; None for what is not known."""
    hint = "'vfio-mig inspect' looks into it, 'vfio-mig extract' takes its devices' states out"
    if first.startswith(_QEMU):
        return "it is a QEMU migration stream", hint
    if first.startswith((LIBVIRT, LIBVIRT_PARTIAL)):
        return "it is a VM saved by libvirt", hint
    form = compression(first)
    return None if form is None else (f"it is compressed with {form}", how_to_unpack(form))


def require_image(first: bytes, *, raw: bool = False) -> None:
    """Refuse what cannot be an image, before anything else is done for it.

    :param first: its first bytes, FIRST of them if there are so many.
    :param raw: whether a bare state is wanted, which may begin with anything, but not be empty.
    :raises ImageError: it is none; the message says what it is.
    """
    if not first:
        raise ImageError(EMPTY)
    if raw or first.startswith(_HEADER):
        return
    form = _other_form(first)
    if form is not None:
        raise ImageError(f"{NO_IMAGE}: {form[0]}", hint=form[1])
    if len(first) < FIRST:
        raise ImageError(f"{NO_IMAGE}: cut off at byte {len(first)}", hint="a bare state needs --raw")
    problem = "its member header at 0x0 is damaged or of another program"
    raise ImageError(f"{NO_IMAGE}: {problem}", hint="a bare state needs --raw")
