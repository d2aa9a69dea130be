# SPDX-License-Identifier: MIT
"""SIGINT, SIGTERM and SIGHUP end a job with a KeyboardInterrupt, but never in the middle of undoing or committing.

A handler runs between any two steps of the interpreter, also between the start of a clean-up and its first statement.
So it looks at the frame that it interrupted: inside of a function marked :func:`protected` it only takes a note, which
:func:`check` turns into the KeyboardInterrupt at the job's next point.
"""

from __future__ import annotations

import functools
import signal
from typing import TYPE_CHECKING, Final, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Self

P = ParamSpec("P")
R = TypeVar("R")

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_codes: Final[set[object]] = set()
_noted: Final[list[int]] = []
_finished: Final[list[bool]] = []


def protected(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that a signal must not interrupt half-way; it must be short."""

    def run_protected(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    _codes.add(run_protected.__code__)  # one code object, whatever it wraps
    return functools.wraps(function)(run_protected)


def _is_protected(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _codes:
            return True
        frame = frame.f_back
    return False


def _handle(number: int, frame: FrameType | None) -> None:
    if _is_protected(frame):
        _noted.append(number)
        return
    raise KeyboardInterrupt


class Deferred:
    """Keeps the signals of a program that has not called :func:`install` away from a block, until its end.

    A mask would not do: it is a thread's, and libraries start threads of their own which then get the signal.
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._came: list[int] = []

    def __enter__(self) -> Self:
        for number in ENDING:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not _handle:
                try:
                    signal.signal(number, lambda number, _: self._came.append(number))
                except ValueError:  # signals are the main thread's
                    break
                self._before[number] = handler
        return self

    def __exit__(self, *_: object) -> None:
        for changed, handler in self._before.items():
            signal.signal(changed, handler)
        for number in dict.fromkeys(self._came):  # as pending signals do, each comes once
            signal.raise_signal(number)


def install() -> None:
    """Handle the three signals in this process; what it was started to ignore (nohup) stays ignored."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def check() -> None:
    """Raise the KeyboardInterrupt of a signal that came at a bad time."""
    if _noted:
        _raise()


def _raise() -> NoReturn:
    _noted.clear()
    raise KeyboardInterrupt


def finish() -> None:
    """Take it that the job is done: a signal that comes later ends the program, and undoes nothing."""
    _noted.clear()
    _finished.append(True)


def finished() -> bool:
    """Tell whether the job is done."""
    return bool(_finished)
