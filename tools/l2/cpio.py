# SPDX-License-Identifier: MIT
"""Write an initramfs: the "newc" form of cpio.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

_DIRECTORY: Final = 0o040755
_FILE: Final = 0o100000
_LINK: Final = 0o120777
_CONSOLE: Final = 0o020600  # a character device
_MAGIC: Final = b"070701"
_END: Final = "TRAILER!!!"
_FIELDS: Final = 13


class Entry(NamedTuple):
    """A file of an initramfs.

    :param mode: type and permissions, as stat(2) has them.
    :param device: major and minor number of a node.
    """

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    """Make an empty directory."""
    return Entry(name, _DIRECTORY)


def file(name: str, content: bytes, *, executable: bool = False) -> Entry:
    """Make a file."""
    return Entry(name, _FILE | (0o755 if executable else 0o644), content)


def link(name: str, target: str) -> Entry:
    """Make a symbolic link."""
    return Entry(name, _LINK, target.encode())


def console() -> Entry:
    """Make /dev/console, which the kernel opens for init before anything is mounted."""
    return Entry("dev/console", _CONSOLE, device=(5, 1))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _one(number: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    fields = (
        number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0,
    )  # fmt: skip
    head = _MAGIC + b"".join(b"%08x" % field for field in fields)
    return _padded(head + name) + _padded(entry.content)


def archive(entries: Sequence[Entry]) -> Iterator[bytes]:
    """Yield the bytes of an archive with these files; a directory comes before what is in it."""
    for number, entry in enumerate([*entries, Entry(_END, 0)], 1):
        yield _one(number, entry)
