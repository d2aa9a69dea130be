# SPDX-License-Identifier: MIT
"""Allocations that fail on demand: the kernel's fault injection, limited to what the sample driver asks for.

An allocation counts if one of the driver's functions is on its stack, so the kernel's own on the driver's behalf do,
and nothing else in the system does.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.vm import host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAIL_NTH: Final = Path("/proc/thread-self/fail-nth")
FAILSLAB: Final = Path("/sys/kernel/debug/failslab")
FAIL_PAGES: Final = Path("/sys/kernel/debug/fail_page_alloc")
KMEMLEAK: Final = Path("/sys/kernel/debug/kmemleak")

_MAX_ALLOCATIONS: Final = 400  # of one operation; more is a loop that does not end
_LEAK_AGE_SECONDS: Final = 6.0  # kmemleak tells of what is five seconds old


def available() -> bool:
    """Say whether this kernel can make allocations fail, by the stack, and finds leaks."""
    return FAIL_NTH.exists() and (FAILSLAB / "require-start").exists() and KMEMLEAK.exists()


def module_text() -> range:
    """Addresses of the driver's functions."""
    pattern = re.compile(rf"^([0-9a-f]+) [tT] \S+\t\[{host.MODULE}\]$", re.MULTILINE)
    found = [int(address, 16) for address in pattern.findall(Path("/proc/kallsyms").read_text())]
    # The last function's length is not told; behind a module's text is nothing for at least a page.
    return range(min(found), max(found) + host.PAGE)


def leaks() -> list[str]:
    """Have kmemleak look twice, as it only tells of what did not change in between, and give what it reports."""
    KMEMLEAK.write_text("scan")
    time.sleep(_LEAK_AGE_SECONDS)
    KMEMLEAK.write_text("scan")
    return KMEMLEAK.read_text().splitlines()


def _settings(text: range, *, pages: bool) -> dict[Path, str]:
    settings = {FAILSLAB / "ignore-gfp-wait": "N", FAILSLAB / "cache-filter": "N"}
    if pages:
        settings |= {
            FAIL_PAGES / "ignore-gfp-wait": "N",
            FAIL_PAGES / "ignore-gfp-highmem": "N",
            FAIL_PAGES / "min-order": "0",
        }
    for attribute in (FAILSLAB, FAIL_PAGES):
        settings |= {
            attribute / "stacktrace-depth": "32",
            attribute / "require-start": hex(text.start),
            attribute / "require-end": hex(text.stop),
            attribute / "probability": "0",
            attribute / "interval": "1",
            attribute / "verbose": "0",
        }
    return settings


class Faults:
    """Makes allocations fail while it is open.

    :param pages: whole pages, too, and not only slab objects; a large vmalloc has very many of these.
    """

    def __init__(self, fail_nth: int) -> None:
        self._fail_nth: Final = fail_nth

    @classmethod
    @contextlib.contextmanager
    def opened(cls, *, pages: bool = False, text: range | None = None) -> Iterator[Faults]:
        settings = _settings(text or module_text(), pages=pages)
        before = {path: path.read_text() for path in settings}
        with contextlib.ExitStack() as stack:
            for path, value in settings.items():
                stack.callback(path.write_text, before[path])
                path.write_text(value)
            fd = os.open(FAIL_NTH, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            yield cls(fd)

    def attempt(self, nth: int, operation: Callable[[], object]) -> int | None:
        """Do it once while this thread's *nth* allocation fails: the errno, 0 if it got by, None: there were fewer."""
        code = 0
        os.pwrite(self._fail_nth, str(nth).encode(), 0)
        try:
            operation()
        except OSError as error:
            code = error.errno or 0
        finally:
            left = int(os.pread(self._fail_nth, 16, 0))
            os.pwrite(self._fail_nth, b"0", 0)
        if left:
            assert code == 0, f"nothing failed, and yet: {os.strerror(code)}"
            return None
        return code

    def each(self, operation: Callable[[], object], undo: Callable[[int], object]) -> list[int]:
        """Do it with its first allocation failing, its second, … until all have: the errno of each, 0 if it got by.

        The last time nothing fails, so it shows that the driver can still do it.

        :param undo: takes back what the operation did; called after each with its errno.
        """
        codes: list[int] = []
        while len(codes) < _MAX_ALLOCATIONS:
            code = self.attempt(len(codes) + 1, operation)
            undo(code or 0)
            if code is None:
                return codes
            codes.append(code)
        raise AssertionError(f"more than {_MAX_ALLOCATIONS} allocations")

    @contextlib.contextmanager
    def one_of_any_thread(self, skip_bytes: int) -> Iterator[Callable[[], bool]]:
        """Make one allocation fail in whatever thread, behind *skip_bytes* of others; gives whether it has."""
        times = FAILSLAB / "times"
        (FAILSLAB / "space").write_text(str(skip_bytes))
        times.write_text("1")
        (FAILSLAB / "probability").write_text("100")
        try:
            yield lambda: int(times.read_text()) == 0
        finally:
            (FAILSLAB / "probability").write_text("0")
            times.write_text("1")
            (FAILSLAB / "space").write_text("0")
