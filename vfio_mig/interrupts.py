# SPDX-License-Identifier: MIT
"""SIGINT, SIGTERM and SIGHUP end a job with a KeyboardInterrupt, but never where that would leave something undone.

A handler may run between any two steps of the interpreter, also on the way from an error to the code that undoes.
So inside a job a signal only takes a note. The job asks for notes with :func:`check`, at each of its steps and between
the pieces of everything that takes long. Only a function marked :func:`waiting`, which waits for somebody else and
changes nothing, is ended at once. From the first KeyboardInterrupt on, signals only take notes until the job has
undone everything.

Outside of jobs there is nothing to undo, and a signal raises KeyboardInterrupt at once, unless a function marked
:func:`protected` is at work.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Self

P = ParamSpec("P")
R = TypeVar("R")

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_protected: Final[set[object]] = set()
_waiting: Final[set[object]] = set()


class _State:
    """What the handler must know.

    :ivar jobs: how many jobs are open, one inside the other.
    :ivar raised: a KeyboardInterrupt is on its way: no second one until it has arrived.
    :ivar noted: signals that came since the last :func:`check`.
    """

    __slots__ = ("jobs", "noted", "raised")

    def __init__(self) -> None:
        self.jobs = 0
        self.raised = False
        self.noted: list[int] = []


_state: Final = _State()


def protected(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that a signal must not interrupt half-way, in a job or not; it must be short."""

    def run_protected(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    _protected.add(run_protected.__code__)  # one code object, whatever it wraps
    return functools.wraps(function)(run_protected)


def waiting(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that waits for somebody else, and in which a signal may end a job at once.

    It changes nothing that would have to be undone, and what it calls does not either.
    """

    def run_waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    _waiting.add(run_waiting.__code__)  # one code object, whatever it wraps
    return functools.wraps(function)(run_waiting)


def _may_raise(frame: FrameType | None) -> bool:
    """Tell whether the code that a signal has interrupted may be left there."""
    if _state.raised:
        return False
    while frame is not None:
        if frame.f_code in _protected:
            return False
        if frame.f_code in _waiting:
            return True
        frame = frame.f_back
    return not _state.jobs


def _handle(number: int, frame: FrameType | None) -> None:
    if _may_raise(frame):
        _raise()
    _state.noted.append(number)


def _raise() -> NoReturn:
    _state.noted.clear()
    _state.raised = True
    raise KeyboardInterrupt


class Deferred:
    """Keeps the signals of a program that has handlers of its own away from a block, until its end.

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


class Guard:
    """What a job does with signals, from its begin until it has undone everything or is done.

    In a program that has called :func:`install` the handlers are ours. Elsewhere Python's own handler of SIGINT is
    replaced for as long as the job lasts, as it would raise anywhere; other handlers are their owner's business.
    """

    def __init__(self) -> None:
        self._borrowed: Any = None

    def enter(self) -> None:
        """Begin to take notes; those of before belong to the job: its first step raises."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._borrowed = signal.signal(signal.SIGINT, _handle)
        _state.jobs += 1

    def leave(self, *, committed: bool) -> None:
        """End that.

        :param committed: a signal that nobody has asked for came too late: a program that ends anyway forgets it. A
            library's caller still gets its Ctrl-C.
        """
        _state.jobs -= 1
        if _state.jobs:
            return
        late = [number for number in _state.noted if not committed or self._borrowed is not None]
        if self._borrowed is None:
            _state.noted[:] = late
            return
        _state.noted.clear()
        _state.raised = False
        handler, self._borrowed = self._borrowed, None
        signal.signal(signal.SIGINT, handler)
        if late and committed:
            signal.raise_signal(signal.SIGINT)


def install() -> None:
    """Handle the three signals in this process; what it was started to ignore (nohup) stays ignored.

    The program gets one KeyboardInterrupt, with which it is expected to end.
    """
    _state.raised = False
    _state.noted.clear()
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def check() -> None:
    """Raise the KeyboardInterrupt of a signal that has come, unless one is on its way already."""
    if _state.noted and not _state.raised:
        _raise()


def check_cut() -> None:
    """Raise it after a request that a signal has cut short, and that would be repeated for ever otherwise.

    Not inside of what is protected: that has to come to its end.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 -- what the handler gets as its argument
    while frame is not None:
        if frame.f_code in _protected:
            return
        frame = frame.f_back
    check()
