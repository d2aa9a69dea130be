# SPDX-License-Identifier: MIT
"""What each unit test has to leave as it was."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """Fail a test that leaves a signal's handler behind: the next one that sends the signal would fail in its place."""
    before = [signal.getsignal(number) for number in ENDING]
    yield
    after = [signal.getsignal(number) for number in ENDING]
    for number, handler in zip(ENDING, before, strict=True):
        signal.signal(number, handler)
    assert after == before, "the test has left the handler of a signal behind"
