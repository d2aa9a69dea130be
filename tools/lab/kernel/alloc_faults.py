# SPDX-License-Identifier: MIT
"""Allocations that fail on demand: the kernel's fault injection, limited to what the sample driver asks for.

An allocation counts if one of the driver's functions is on its stack and if it is of a cache that drivers use: the
kernel's own memory management is not used to failures of its own and warns (of a vmap_area, Linux 6.12).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.lab.sample import host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAIL_NTH: Final = Path("/proc/thread-self/fail-nth")
MAKE_IT_FAIL: Final = Path("/proc/thread-self/make-it-fail")
FAILSLAB: Final = Path("/sys/kernel/debug/failslab")
FAIL_PAGES: Final = Path("/sys/kernel/debug/fail_page_alloc")
KMEMLEAK: Final = Path("/sys/kernel/debug/kmemleak")

_CACHES: Final = ("kmalloc-*", "radix_tree_node", "filp")
_MAX_ALLOCATIONS: Final = 1000  # of one operation; more is a loop that does not end
_MAX_BYTES: Final = 256 << 20  # as many
_MANY: Final = 1 << 20
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


def function(name: str) -> range:
    """Addresses of one function of the kernel or of a module."""
    rows = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()]
    start = next(int(row[0], 16) for row in rows if row[2] == name)
    return range(start, min(address for row in rows if (address := int(row[0], 16)) > start))


def leaks() -> list[str]:
    """Have kmemleak look twice, as it only tells of what did not change in between, and give what it reports."""
    KMEMLEAK.write_text("scan")
    time.sleep(_LEAK_AGE_SECONDS)
    KMEMLEAK.write_text("scan")
    return KMEMLEAK.read_text().splitlines()


def _settings(text: range, spared: range, *, pages: bool) -> dict[Path, str]:
    settings = {
        FAILSLAB / "ignore-gfp-wait": "N",
        FAILSLAB / "cache-filter": "Y",
        # A page that is not to be had is worth sixty lines to the kernel, and the serial console is slow.
        Path("/proc/sys/kernel/printk"): "1",
    }
    for pattern in _CACHES:
        settings |= dict.fromkeys(Path("/sys/kernel/slab").glob(f"{pattern}/failslab"), "1")
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
            attribute / "reject-start": hex(spared.start),
            attribute / "reject-end": hex(spared.stop),
            attribute / "probability": "0",
            attribute / "interval": "1",
            attribute / "times": "1",
            attribute / "space": "0",
            attribute / "task-filter": "N",
            attribute / "verbose": "0",
        }
    return settings


class Faults:
    """Makes allocations fail while it is open."""

    def __init__(self, fail_nth: int) -> None:
        self._fail_nth: Final = fail_nth

    @classmethod
    @contextlib.contextmanager
    def opened(cls, *, pages: bool = False, text: range | None = None, spared: range = range(0)) -> Iterator[Faults]:
        """Get ready; nothing fails yet.

        :param pages: whole pages fail, too, and not only slab objects; a large vmalloc has very many of these.
        :param text: the driver's addresses, where it is not loaded yet.
        :param spared: a function; what it allocates does not fail.
        """
        settings = _settings(text or module_text(), spared, pages=pages)
        before = {path: path.read_text() for path in settings}
        with contextlib.ExitStack() as stack:
            for path, value in settings.items():
                stack.callback(path.write_text, before[path])
                path.write_text(value)
            fd = os.open(FAIL_NTH, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            yield cls(fd)

    def nth(self, number: int, operation: Callable[[], object]) -> int | None:
        """Do it once while one allocation fails, this thread's *number*-th: its errno, 0 for none, None if fewer."""
        os.pwrite(self._fail_nth, str(number).encode(), 0)
        try:
            code = errno_of(operation)
        finally:
            left = int(os.pread(self._fail_nth, 16, 0))
            os.pwrite(self._fail_nth, b"0", 0)
        if left:
            assert code == 0, f"nothing failed, and yet: {os.strerror(code)}"
            return None
        return code

    def behind(self, skip_bytes: int, operation: Callable[[], object]) -> int | None:
        """Do it once while all of this thread's fail behind the first *skip_bytes*: as `nth`; None if no more."""
        with _armed(skip_bytes, times=_MANY, task="Y") as failed:
            MAKE_IT_FAIL.write_text("1")
            try:
                code = errno_of(operation)
            finally:
                MAKE_IT_FAIL.write_text("0")
            return code if failed() else None

    def each(self, operation: Callable[[], object], undo: Callable[[int], object]) -> list[int]:
        """Do it with its first allocation failing, its second, … until all have: the errno of each, 0 if it got by.

        The last time nothing fails, so it shows that the driver can still do it.

        :param undo: takes back what the operation did; called after each with its errno.
        """
        codes: list[int] = []
        while len(codes) < _MAX_ALLOCATIONS:
            code = self.nth(len(codes) + 1, operation)
            undo(code or 0)
            if code is None:
                return codes
            codes.append(code)
        raise AssertionError(f"more than {_MAX_ALLOCATIONS} allocations")

    def from_each(self, operation: Callable[[], object], undo: Callable[[int], object]) -> list[int]:
        """Do it with no memory left at all, then behind ever more bytes, until there is enough; as `each`.

        Where one failure only leads to another way to get the same, this leads to none.
        """
        codes: list[int] = []
        skip = 0
        while skip < _MAX_BYTES:
            code = self.behind(skip, operation)
            undo(code or 0)
            if code is None:
                return codes
            codes.append(code)
            skip = max(32, skip * 3 // 2)
        raise AssertionError(f"more than {_MAX_BYTES} bytes")

    @contextlib.contextmanager
    def one_of_any_thread(self, skip_bytes: int) -> Iterator[Callable[[], bool]]:
        """Make one allocation fail in whatever thread, behind *skip_bytes* of others; gives whether it has."""
        with _armed(skip_bytes, times=1, task="N") as failed:
            yield failed


@contextlib.contextmanager
def _armed(skip_bytes: int, *, times: int, task: str) -> Iterator[Callable[[], bool]]:
    attributes = (FAILSLAB, FAIL_PAGES)
    for attribute in attributes:
        (attribute / "space").write_text(str(skip_bytes))
        (attribute / "times").write_text(str(times))
        (attribute / "task-filter").write_text(task)
        (attribute / "probability").write_text("100")
    try:
        yield lambda: any(int((attribute / "times").read_text()) != times for attribute in attributes)
    finally:
        for attribute in attributes:
            (attribute / "probability").write_text("0")


def errno_of(operation: Callable[[], object]) -> int:
    """Do it; 0 if it succeeded."""
    try:
        operation()
    except OSError as error:
        return error.errno or 0
    return 0
