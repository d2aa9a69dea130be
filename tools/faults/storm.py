# SPDX-License-Identifier: MIT
"""Send storms of signals at jobs, and count those in which a step was left undone: ``python -m tools.faults.storm N``.

Another process sends the first signal at a random moment of each job and up to three more 0 to 300 microseconds apart,
as an impatient user, a terminal that closes and a supervisor do together. Exit status 1 if any undo was skipped.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, Self

from vfio_mig import interrupts
from vfio_mig.errors import HostError
from vfio_mig.jobs.engine.job import Job
from vfio_mig.jobs.engine.session import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS: Final = 8
JOBS: Final = 10_000
LONGEST: Final = 3e-3
"""Seconds from a job's begin until its first signal, at most; a job takes about as long."""
GAP: Final = 300e-6


class Held:
    """Something that a job opens and has to close."""

    def __init__(self, done: list[str], name: str) -> None:
        self._done = done
        self._name = name

    def __enter__(self) -> Self:
        self._done.append(f"+{self._name}")
        return self

    def __exit__(self, *_: object) -> None:
        self._done.append(f"-{self._name}")


def _undo(done: list[str], number: int) -> Callable[[], None]:
    def undo() -> None:
        done.append(f"-{number}")
        sum(range(200))  # takes a moment, as an ioctl does

    return undo


def play(chance: random.Random, done: list[str]) -> None:
    """Do one job: open things, do steps that each have an undo, fail now and then, commit."""
    fails_at = chance.randrange(STEPS) if chance.random() < 0.3 else -1  # noqa: PLR2004 -- now and then
    with Job("save", Settings(on_commit=lambda: done.append("committed"))) as job:
        for number in range(STEPS):
            if number % 3 == 0:
                job.enter(Held(done, f"file{number}"))
            done.append(f"+{number}")
            job.undo_with(_undo(done, number))
            for _ in range(15):
                sum(range(2000))
                interrupts.check()
            if number == fails_at:
                raise HostError("full")
            job.step("opened")
        job.commit()


def is_whole(done: list[str]) -> bool:
    """Tell whether a job has undone and closed all that it did, or committed and closed all that it opened."""
    begun = [one[1:] for one in done if one[0] == "+"]
    ended = [one[1:] for one in done if one[0] == "-"]
    if "committed" in done:
        begun = [one for one in begun if one.startswith("file")]
    return ended == begun[::-1]


def _storm(go: int, over: int, seed: int) -> None:
    """Be the process that sends signals: a storm for each byte that comes."""
    chance = random.Random(seed)  # noqa: S311 -- no secret
    parent = os.getppid()
    while os.read(go, 1):
        time.sleep(chance.random() * LONGEST)
        for _ in range(chance.randint(1, 4)):
            os.kill(parent, chance.choice(interrupts.ENDING))
            until = time.perf_counter() + chance.random() * GAP
            while time.perf_counter() < until:
                pass
        os.write(over, b".")


@interrupts.protected
def _wait(over: int) -> None:
    os.read(over, 1)


def run(jobs: int, seed: int) -> Counter[str]:
    """Play so many jobs; returns how many ended how: ``committed``, ``failed``, ``interrupted`` or ``skipped``."""
    go, start = os.pipe()
    ended, over = os.pipe()
    child = os.fork()
    if not child:
        for number in interrupts.ENDING:
            signal.signal(number, signal.SIG_DFL)
        os.close(start)
        _storm(go, over, seed)
        os._exit(0)
    chance = random.Random(seed)  # noqa: S311 -- no secret
    ways: Counter[str] = Counter()
    for _ in range(jobs):
        ways[_one(chance, start, ended)] += 1
    os.close(start)
    os.waitpid(child, 0)
    return ways


def _one(chance: random.Random, start: int, ended: int) -> str:
    done: list[str] = []
    interrupts.install()
    way = "committed"
    try:
        os.write(start, b".")
        play(chance, done)
    except HostError:
        way = "failed"
    except KeyboardInterrupt:
        way = "interrupted"
    try:
        _wait(ended)
    except KeyboardInterrupt:  # between the job and the wait; the program would be at its end
        _wait(ended)
    return way if is_whole(done) else "skipped"


def main() -> int:
    """Print how the jobs ended."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else JOBS
    seed = random.randrange(1 << 32)  # noqa: S311 -- no secret
    ways = run(jobs, seed)
    text = ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))
    print(f"{jobs} jobs under signals (seed {seed}): {text}; {ways['skipped']} skipped an undo")
    return 1 if ways["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
