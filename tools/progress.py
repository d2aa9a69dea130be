# SPDX-License-Identifier: MIT
"""How far ``scripts/test`` is: which step each lane is at, how many of its tests are done, and about how long still.

``python -m tools.progress DIRECTORY PARENT`` tells it until the process PARENT has ended: on a terminal as one line
that changes, else as a line every half a minute. ``scripts/test`` writes the directory, and each pytest in it, also one
in a VM, counts its tests there (:class:`Counter`):

==============  ============================================================
``plan``        a line per step: key, lane, expected seconds, name, by tabs
``KEY.begun``   is there once the step has begun
``KEY.count``   tests done, tests in all, failures, by spaces
``KEY.ended``   the line that says how it ended, once it has
==============  ============================================================
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TextIO

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLE: Final = "VFIO_MIG_PROGRESS"
"""The file in which a pytest counts its tests."""
_SECONDS_IN_A_LOG: Final = 30.0
_SECONDS_ON_A_TERMINAL: Final = 1.0
_LOOK: Final = 0.5
_WRITES: Final = 0.5
_MINUTE: Final = 60
_WIDTH: Final = 79


class Counter:
    """A plugin of pytest that writes how many tests are done, with pytest-xdist too."""

    def __init__(self, file: Path) -> None:
        self._file: Final = file
        self._total = self._done = self._failed = 0
        self._written = 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Know how many tests there are."""
        if session.items:
            self._total = len(session.items)
        self._write()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Know it from a worker; each has found all of them."""
        self._total = len(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what failed, and each test once."""
        self._failed += report.failed
        self._done += report.when == "teardown"
        if time.monotonic() - self._written >= _WRITES:
            self._write()

    def pytest_sessionfinish(self) -> None:
        """Write the last numbers."""
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        whole = self._file.with_suffix(".part")
        try:
            whole.write_text(f"{self._done} {self._total} {self._failed}\n")
            whole.replace(self._file)
        except OSError:  # tests do not fail because nobody can look on
            return


class Step(NamedTuple):
    """A step of the plan, and what is known of it now; *begun* and *ended* are times of the clock, or None."""

    lane: str
    expected: float
    name: str
    begun: float | None = None
    ended: float | None = None
    outcome: str = ""
    done: int = 0
    total: int = 0
    failed: int = 0

    def left(self, now: float) -> float:
        """About how many seconds it still takes.

        At its begin that is what was expected; the more of its tests are done, the more it is what they say.

        >>> Step("a", 60, "x").left(0), Step("a", 60, "x", begun=0, done=5, total=10).left(30)
        (60, 30.0)
        >>> Step("a", 60, "x", begun=0).left(90), Step("a", 60, "x", begun=0, ended=3).left(5)
        (0.0, 0.0)
        """
        if self.ended is not None:
            return 0.0
        if self.begun is None:
            return self.expected
        passed = now - self.begun
        share = self.done / self.total if self.total else 0.0
        by_plan = max(self.expected - passed, 0.0)
        by_count = passed / share * (1 - share) if share else 0.0
        return share * by_count + (1 - share) * by_plan

    def text(self, now: float) -> str:
        """Say where it is.

        >>> Step("a", 60, "unit tests", begun=0, done=3, total=9, failed=1).text(5)
        'unit tests 3/9, 1 FAILED'
        >>> Step("a", 60, "unit tests", begun=0).text(5)
        'unit tests 0:05'
        """
        passed = 0.0 if self.begun is None else now - self.begun
        count = f"{self.done}/{self.total}" if self.total else clock(passed)
        return f"{self.name} {count}" + (f", {self.failed} FAILED" if self.failed else "")


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(65.4)
    '1:05'
    """
    return f"{int(seconds) // _MINUTE}:{int(seconds) % _MINUTE:02}"


def about(seconds: float) -> str:
    """Say a time that is only estimated.

    >>> about(12), about(89), about(400)
    ('10 s', '1 min', '7 min')
    """
    return f"{max(round(seconds, -1), 10):.0f} s" if seconds < _MINUTE else f"{round(seconds / _MINUTE)} min"


def line(steps: list[Step], passed: float, now: float) -> str:
    """Say in one line where each lane is, and how long it takes still."""
    at_work = [one.text(now) for one in steps if one.begun is not None and one.ended is None]
    ended = sum(one.ended is not None for one in steps)
    lanes: dict[str, float] = {}
    for one in steps:
        lanes[one.lane] = lanes.get(one.lane, 0.0) + one.left(now)
    left = f"about {about(max(lanes.values(), default=0.0))} left"
    return " | ".join([f"{clock(passed)}, {ended} of {len(steps)} steps", *at_work, left])


def read(directory: Path) -> list[Step]:
    """Read what is known now."""
    return [
        _known(directory / key, Step(lane, float(expected), name))
        for key, lane, expected, name in (row.split("\t") for row in _text(directory / "plan").splitlines())
    ]


def _known(file: Path, planned: Step) -> Step:
    begun, ended = _time(file.with_suffix(".begun")), _time(file.with_suffix(".ended"))
    numbers = [int(word) for word in _text(file.with_suffix(".count")).split()] or [0, 0, 0]
    done, total, failed = numbers
    return planned._replace(
        begun=begun, ended=ended, outcome=_text(file.with_suffix(".ended")).strip(),
        done=done, total=total, failed=failed,
    )  # fmt: skip


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _time(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


class Display:
    """Tells it where somebody looks; *to* may be a terminal."""

    def __init__(self, to: TextIO) -> None:
        self._to: Final = to
        self._changes: Final = to.isatty()
        self._told: set[str] = set()
        self._last = time.monotonic()

    def show(self, steps: list[Step], passed: float, now: float) -> None:
        """Tell what has ended since the last time, and where the rest is, if it is time."""
        for outcome in self._new(steps):
            self._put(f"{outcome}\n")
            self._last -= _SECONDS_ON_A_TERMINAL if self._changes else 0
        every = _SECONDS_ON_A_TERMINAL if self._changes else _SECONDS_IN_A_LOG
        if time.monotonic() - self._last >= every and any(one.ended is None for one in steps):
            self._last = time.monotonic()
            text = line(steps, passed, now)
            self._put(text[:_WIDTH] if self._changes else f"test: {text}\n")

    def _new(self, steps: list[Step]) -> Iterator[str]:
        for one in steps:
            if one.outcome and one.name not in self._told:
                self._told.add(one.name)
                yield one.outcome

    def _put(self, text: str) -> None:
        self._to.write(f"\r\033[K{text}" if self._changes else text)
        self._to.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._changes:
            self._put("")


def main(arguments: list[str]) -> int:
    """Tell until the process that is named has ended, or whoever started this ends it."""
    directory, parent = Path(arguments[0]), int(arguments[1])
    began, display = time.time(), Display(sys.stderr)
    while os.getppid() == parent and directory.is_dir() and not (directory / "over").exists():
        display.show(read(directory), time.time() - began, time.time())
        time.sleep(_LOOK)
    display.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
