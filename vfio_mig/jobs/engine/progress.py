# SPDX-License-Identifier: MIT
"""How far a copy has come, for whoever shows it: any callable that takes the bytes of each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_Chunk = TypeVar("_Chunk", bytes, memoryview, "bytes | memoryview")


@runtime_checkable
class Expecting(Protocol):
    """One that also wants to know how many bytes there are to come."""

    def expect(self, size: int) -> object:
        """Take note that so many bytes are still to come, whatever was said before."""

    def __call__(self, size: int) -> object:
        """Count one step."""


def expect(progress: object, size: Callable[[], int]) -> None:
    """Tell how many bytes are still to come.

    :param progress: a callable as above, which may be one that :class:`Expecting` describes.
    :param size: counts them; not called where nobody wants to know.
    """
    if isinstance(progress, Expecting):
        progress.expect(size())


def counted(chunks: Iterable[_Chunk], progress: object) -> Iterable[_Chunk]:
    """Pass a state's chunks on, and tell one that knows what is to come of each once it has been taken.

    A callable that does not is told of guest memory alone.
    """
    return _tell(chunks, progress) if isinstance(progress, Expecting) else chunks


def _tell(chunks: Iterable[_Chunk], progress: Expecting) -> Iterator[_Chunk]:
    for chunk in chunks:
        yield chunk
        progress(len(chunk))
