# SPDX-License-Identifier: MIT
"""Guest memory as whatever maps it for a device takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import mmap


class GuestMemory(Protocol):
    """A piece of guest memory: *size* bytes at guest-physical address *gpa*, mapped into this process by map()."""

    @property
    def gpa(self) -> int:
        """Address of its first byte."""

    @property
    def size(self) -> int:
        """Bytes."""

    def map(self) -> mmap.mmap | memoryview:
        """Return the memory, mapped shared and writable; stays the owner's."""


def address_of(mapping: mmap.mmap | memoryview) -> int:
    """Return where a mapping, or a part of one, is.

    It must stay mapped as long as a kernel that is told the address uses it.
    """
    import ctypes

    # A view would keep the mapping from being closed: it lives only as long as its address is asked for
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
