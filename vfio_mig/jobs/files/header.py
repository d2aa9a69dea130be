# SPDX-License-Identifier: MIT
"""A kernel's ``linux/vfio.h`` as a file, which the RFC's numbers are taken from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_mig.errors import UsageError
from vfio_mig.jobs.files.input import open_regular
from vfio_mig.uapi.profile import profile_of

if TYPE_CHECKING:
    from vfio_mig.uapi.profile import RfcProfile

HEADER_MAX: Final = 1 << 20
"""Bytes of a header that are read; mainline's has 60 KiB."""


def read_header(path: str) -> str:
    """Return a header's text.

    :raises UsageError: it is not a regular file, or larger than HEADER_MAX.
    :raises HostError: it cannot be read.
    """
    with open_regular(path, "give a linux/vfio.h", what="the header") as file:
        text = file.read(HEADER_MAX + 1)
    if len(text) > HEADER_MAX:
        raise UsageError(f"{path} is larger than {HEADER_MAX} bytes: no linux/vfio.h")
    return text.decode("utf-8", "replace")


def load_profile(path: str) -> RfcProfile:
    """Take the RFC's numbers from the ``linux/vfio.h`` of a patched kernel.

    :raises UsageError: it is not such a header; the message names what is missing.
    :raises HostError: it cannot be read.
    """
    return profile_of(read_header(path), path)
