# SPDX-License-Identifier: MIT
"""The control protocol: a line of JSON asks, a line of JSON answers. README.md has the requests.

It needs nothing of the stream but that bytes arrive in order, so that it goes over a socket as over a serial port.
"""

from __future__ import annotations

from typing import Final

MAX_REQUEST: Final = 1 << 14
"""Bytes of a request with its newline."""
MAX_ENTRIES: Final = 128
"""Of the record, in one answer."""
MAX_ANSWER: Final = 1 << 20
"""Bytes of an answer; entries of the record are at most 2 KiB each."""
