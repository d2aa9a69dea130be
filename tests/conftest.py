# SPDX-License-Identifier: MIT
"""What every tier's tests need of this process."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Hear SIGINT: a shell starts what it puts in the background with the signal ignored, and tests send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
