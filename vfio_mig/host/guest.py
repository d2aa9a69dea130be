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
