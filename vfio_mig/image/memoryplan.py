# SPDX-License-Identifier: MIT
"""What guest memory becomes when one or several images are loaded: each page is written once, with its newest content.

In an image the later member counts, and of several images the one that was saved later. So the plan is made backwards:
what a later piece has covered, an earlier one need not write. The work is bounded by the memory's size, whatever an
image says, and is planned before any device is stopped.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig import interrupts
from vfio_mig.errors import ImageError, MismatchError, excerpt
from vfio_mig.ranges import PAGE, Covered, intersect, length, of_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_mig.image.archive import Archive
    from vfio_mig.image.layout import Member
    from vfio_mig.ranges import Range

PIECE: Final = 16 << 20
"""Bytes that are written at most before a signal is looked at."""
_LOOK: Final = 1024


class MemoryImage(NamedTuple):
    """An image with guest memory, and its name for messages."""

    name: str
    archive: Archive

    @property
    def time(self) -> int | None:
        """When it was saved, seconds since 1970; None where it does not say."""
        time = self.archive.header.get("time")
        return time if type(time) is int else None


class MemoryPlan:
    """Which pieces of which image's guest memory are written, each page once.

    :param images: those of one restore.
    :raises MismatchError: two have the same page with different content, and none is known to be the newer one.
    """

    def __init__(self, images: Sequence[MemoryImage]) -> None:
        self._covered: Final = Covered()
        self._pieces: list[tuple[Archive, Member, list[Range] | None]] = []
        self._seen = 0
        newest_first = sorted(images, key=lambda image: image.time or 0, reverse=True)
        spans = [self._add(image.archive) for image in newest_first]
        self._pieces.reverse()
        _refuse_doubt(newest_first, spans)

    def _add(self, archive: Archive) -> list[Range]:
        """Plan one image's pieces, the last one first; returns all addresses that it has."""
        own = Covered()
        for member in reversed(archive.members):
            if member.kind not in ("pages", "zero"):
                continue
            ranges = archive.index(member)
            free: list[Range] = []
            for gpa, size in ranges:
                self._seen += 1
                if not self._seen % _LOOK:
                    interrupts.check()
                free += self._covered.take(gpa, gpa + size)
                own.take(gpa, gpa + size)
            if free:
                is_whole = length(free) == sum(size for _, size in ranges)
                self._pieces.append((archive, member, None if is_whole else sorted(free)))
        return own.ranges()

    @property
    def ranges(self) -> list[Range]:
        """All addresses that are written, in order."""
        return self._covered.ranges()

    @property
    def pages(self) -> int:
        """Pages of 4096 bytes that are written."""
        return length(self.ranges) // PAGE

    def content_ranges(self) -> Iterator[Range]:
        """Yield the addresses that get content, and not zeros."""
        for archive, member, allowed in self._pieces:
            if member.kind == "pages":
                yield from allowed or of_sizes(archive.index(member))

    def pieces(self) -> Iterator[tuple[int, int, memoryview | None]]:
        """Yield what is to be written: (guest-physical address, bytes, content, or None for zeros).

        :raises ImageError: an image has changed since it was verified.
        """
        for archive, member, allowed in self._pieces:
            for gpa, size, content in archive.memory_of(member):
                for start, end in _parts(gpa, gpa + size, allowed):
                    part = None if content is None else content[start - gpa : end - gpa]
                    yield start, end - start, part


def _parts(start: int, end: int, allowed: list[Range] | None) -> Iterator[Range]:
    """Yield what is allowed of a range, at most PIECE bytes at a time."""
    for low, high in [(start, end)] if allowed is None else _within(start, end, allowed):
        for at in range(low, high, PIECE):
            yield at, min(at + PIECE, high)


def _within(start: int, end: int, allowed: list[Range]) -> Iterator[Range]:
    number = bisect_right(allowed, (start, start))
    if number and allowed[number - 1][1] > start:
        number -= 1
    while number < len(allowed) and allowed[number][0] < end:
        low, high = allowed[number]
        yield max(low, start), min(high, end)
        number += 1


def _refuse_doubt(images: Sequence[MemoryImage], spans: Sequence[list[Range]]) -> None:
    """Refuse images that share pages and were saved in the same second, or do not say when."""
    for number, (one, mine) in enumerate(zip(images, spans, strict=True)):
        for other, its in zip(images[number + 1 :], spans[number + 1 :], strict=True):
            if one.time is not None and other.time is not None and one.time != other.time:
                continue
            shared = next(intersect(mine, its), None)
            if shared is not None:
                raise MismatchError(
                    f"{one.name} and {other.name} both have memory at {shared[0]:#x}, and nothing tells which is newer",
                    hint="write the pages with 'vfio-mig pages', the older image first, then restore with --no-memory",
                )


class MemoryNote(NamedTuple):
    """What an image's header says of guest memory; images of earlier versions say nothing.

    :param content: ``none``, ``dirty`` or ``all``; None where it says nothing.
    :param guest_paused: whether no CPU of the guest ran while it was copied.
    :param job: number of the job that made it; the images of one job have the same.
    :param is_in: name of the image of that job that has the pages; None: this one.
    """

    content: str | None
    guest_paused: bool
    job: str | None
    is_in: str | None


def memory_note(archive: Archive) -> MemoryNote:
    """Read what an image's header says of guest memory.

    :raises ImageError: it makes no sense.
    """
    value = archive.header.get("memory")
    if value is None:
        return MemoryNote(None, guest_paused=False, job=None, is_in=None)
    if not isinstance(value, dict):
        raise ImageError(f"header.json: memory is {excerpt(value)}, no object")
    content, job, is_in = (value.get(key) for key in ("content", "job", "in"))
    for key, text in (("content", content), ("job", job), ("in", is_in)):
        if text is not None and not isinstance(text, str):
            raise ImageError(f"header.json: memory.{key} is {excerpt(text)}, no text")
    return MemoryNote(content, value.get("guest_paused") is True, job, is_in)
