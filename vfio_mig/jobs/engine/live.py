# SPDX-License-Identifier: MIT
"""What is read while the device runs: guest memory in rounds, and the state itself where the device has PRE_COPY.

A round copies the pages that have become dirty and then what the device has of its state. Rounds end when the rest is
expected to fit into the downtime asked for, when they bring nothing any more, or when there were enough.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from vfio_mig import interrupts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vfio_mig.dirty.sync import Round
    from vfio_mig.protocols.abilities import Pending, SavesLive

ROUNDS_LIVE: Final = 30
"""Rounds before the stop, at most, where a downtime is asked for and they may take their time."""


class StateRound(NamedTuple):
    """What one round read of a running device's state; sizes in bytes, times in seconds.

    :param initial_bytes: what is left of the data to be read before a stop, after this round.
    :param dirty_bytes: what has changed since it was read.
    :param rest_bytes: what a stop now would leave to be read, as the device estimates it.
    :param rate: bytes per second at which the state has been read so far.
    """

    bytes_read: int
    initial_bytes: int
    dirty_bytes: int
    rest_bytes: int
    read_time: float
    rate: float

    @property
    def estimated_downtime(self) -> float:
        """Seconds that reading the rest would take if the device were stopped now."""
        return self.rest_bytes / self.rate if self.rate else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**self._asdict(), "estimated_downtime": self.estimated_downtime}


class Live:
    """How much is copied while the device runs.

    :param rounds: at most so many rounds before the stop; 0: none.
    :param max_downtime: seconds; rounds end when the last one is expected to take no longer.
    :param precopy: read the state, too, while the device runs.
    :param progress: called with the bytes of each piece of guest memory that was copied.
    :param on_round: called after each round of guest memory; *on_state_round*: after each of the state.
    """

    def __init__(
        self,
        rounds: int = 0,
        max_downtime: float | None = None,
        progress: Callable[[int], object] = lambda _: None,
        on_round: Callable[[Round], object] = lambda _: None,
        *,
        precopy: bool = False,
        on_state_round: Callable[[StateRound], object] = lambda _: None,
    ) -> None:
        self.rounds = rounds
        self.max_downtime = max_downtime
        self.precopy = precopy
        self.progress = progress
        self.on_round = on_round
        self.on_state_round = on_state_round


class InRounds(Protocol):
    """What copies guest memory in rounds."""

    def round(self) -> Round:
        """Copy once while the devices run."""


class StateCopy:
    """Reads a running device's state, round by round.

    :param write: takes the chunks, and returns how many bytes they had.
    """

    def __init__(self, device: SavesLive, write: Callable[[Iterable[bytes | memoryview]], int]) -> None:
        self._device = device
        self._write = write
        self._seconds = 0.0
        self._pending: Pending | None = None
        self.bytes_read = 0
        self.rounds: list[StateRound] = []

    def round(self) -> StateRound:
        """Read what there was when the round began, and ask what is left: more may come as fast as it is read."""
        before = self._pending or self._device.pending()
        began = time.monotonic()
        size = self._write(self._device.read_live(before.initial_bytes + before.dirty_bytes))
        seconds = time.monotonic() - began
        self._pending = pending = self._device.pending()
        self._seconds += seconds
        self.bytes_read += size
        rate = self.bytes_read / self._seconds if self._seconds else 0.0
        self.rounds.append(
            StateRound(size, pending.initial_bytes, pending.dirty_bytes, pending.rest_bytes, seconds, rate)
        )
        return self.rounds[-1]

    @property
    def must_go_on(self) -> bool:
        """Whether there is data that the device wants to be read before a stop."""
        return self._pending is not None and (self._pending.is_anew or self._pending.initial_bytes > 0)

    @property
    def brings_nothing(self) -> bool:
        """Whether nothing is left, or what is left does not become less."""
        last = self.rounds[-1]
        return not last.dirty_bytes or (len(self.rounds) > 1 and last.dirty_bytes >= self.rounds[-2].dirty_bytes)


def copy_live(live: Live, memory: InRounds | None, states: Sequence[StateCopy]) -> list[Round]:
    """Copy in rounds while the devices run; returns those of guest memory, each of *states* keeps its own.

    :param memory: None where no guest memory is copied.
    """
    done: list[Round] = []
    for _ in range(live.rounds):
        interrupts.check()
        estimated = 0.0
        if memory is not None:
            done.append(memory.round())
            live.on_round(done[-1])
            estimated += done[-1].estimated_downtime
        for state in states:
            live.on_state_round(state.round())
            estimated += state.rounds[-1].estimated_downtime
        if _is_enough(live, estimated, done if memory is not None else None, states):
            break
    return done


def _is_enough(live: Live, estimated: float, done: list[Round] | None, states: Sequence[StateCopy]) -> bool:
    if any(state.must_go_on for state in states):
        return False
    if live.max_downtime is not None and estimated <= live.max_downtime:
        return True
    from vfio_mig.dirty.sync import brings_nothing

    return (done is None or brings_nothing(done)) and all(state.brings_nothing for state in states)


def falls_short(live: Live, done: list[Round], states: Sequence[StateCopy]) -> str | None:
    """Say by how much a downtime that was asked for will be missed, None when it will not."""
    if live.max_downtime is None:
        return None
    last: list[Round | StateRound] = [*done[-1:], *(one for state in states for one in state.rounds[-1:])]
    estimated = sum(one.estimated_downtime for one in last)
    if estimated <= live.max_downtime:
        return None
    return (
        f"stopping it will take about {estimated * 1e3:.0f} ms and not {live.max_downtime * 1e3:.0f}, "
        "as further rounds bring nothing"
    )
