# SPDX-License-Identifier: MIT
"""What every tier's tests need of this process."""

from __future__ import annotations

import signal

import hypothesis


def pytest_configure() -> None:
    """Hear SIGINT: a shell starts what it puts in the background with the signal ignored, and tests send it.

    And let examples take their time: on a busy machine a deadline would fail tests that have found nothing.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
