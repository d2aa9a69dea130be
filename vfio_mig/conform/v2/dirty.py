# SPDX-License-Identifier: MIT
"""DMA logging: START, REPORT, STOP and their edges.

No check can make an unknown device write memory. So content is checked where it is known without: a range that nothing
maps has no bits, and a buffer keeps what was in it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import LOG_CORE, LOGGING, REPORT, REPORT_CORE, Checks
from vfio_mig.conform.kit.v2_device import errno_name
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, Weakness, require
from vfio_mig.conform.v2.feature import refusal
from vfio_mig.ranges import PAGE
from vfio_mig.uapi.v2 import GET, LOG_REPORT, LOG_START, LOG_STOP, PROBE, RUNNING, SET, state_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_mig.conform.kit.rig import Rig
    from vfio_mig.conform.kit.v2_device import V2Device

CHECKS: Final = Checks("v2.dirty", LOGGING)
BASE: Final = 1 << 32
"""IOVA of the range that is logged."""
SIZE: Final = 16 << 20
"""Bytes of it."""
CONTROL: Final = struct.Struct("=QIIQ")  # struct vfio_device_feature_dma_logging_control
RANGE: Final = struct.Struct("=QQ")  # struct vfio_device_feature_dma_logging_range
REQUEST: Final = struct.Struct("=QQQQ")  # struct vfio_device_feature_dma_logging_report
RANGES_MAX: Final = mmap.PAGESIZE // RANGE.size
"""Ranges that the core takes: as many as fit into a page."""
PATTERN: Final = 0xA5A5A5A5A5A5A5A5
GUARD: Final = 4
"""Words behind a bitmap that must stay as they are."""
NO_BITMAPS: Final = "REPORT is EOPNOTSUPP: this kernel is built without CONFIG_IOMMUFD_DRIVER, which has the bitmaps"
Span = tuple[int, int]


def start(
    v2: V2Device, spans: Sequence[Span] = ((BASE, SIZE),), *, page_size: int = PAGE, count: int | None = None
) -> int:
    """Start logging (iova, bytes) ranges; returns the page size that the driver chose."""
    table = ctypes.create_string_buffer(b"".join(RANGE.pack(*span) for span in spans) or bytes(RANGE.size))
    number = len(spans) if count is None else count
    reply = v2.feature(SET | LOG_START, CONTROL.pack(page_size, number, 0, ctypes.addressof(table)))
    chosen: int = CONTROL.unpack(reply)[0]
    return chosen


def stop(v2: V2Device) -> None:
    """Stop logging."""
    v2.feature(SET | LOG_STOP)


class Bitmap:
    """A bitmap of a range, with guard words behind it."""

    def __init__(self, size: int, page_size: int, *, fill: int = 0) -> None:
        self._pages = -(-size // page_size)
        self._words = -(-self._pages // 64)
        self.words = (ctypes.c_uint64 * (self._words + GUARD))(*[fill] * self._words, *[PATTERN] * GUARD)

    def bits(self) -> int:
        """Count the bits of the range."""
        whole = int.from_bytes(bytes(self.words)[: self._words * 8], "little")
        return (whole & ((1 << self._pages) - 1)).bit_count()

    def is_clean_behind(self) -> bool:
        """Tell whether nothing was written behind the range's last bit; it must have been filled with 0."""
        whole = int.from_bytes(bytes(self.words)[: self._words * 8], "little")
        return not whole >> self._pages and all(word == PATTERN for word in self.words[self._words :])

    def is_full(self) -> bool:
        """Tell whether every word of it is all ones."""
        return all(word == (1 << 64) - 1 for word in self.words[: self._words])


def report(
    v2: V2Device, iova: int = BASE, size: int = SIZE, *, page_size: int = PAGE, into: Bitmap | None = None
) -> Bitmap:
    """Ask for the dirty pages of a range."""
    bitmap = Bitmap(size, page_size) if into is None else into
    v2.feature(GET | LOG_REPORT, REQUEST.pack(iova, size, page_size, ctypes.addressof(bitmap.words)))
    return bitmap


def _device(rig: Rig) -> V2Device:
    """Skip a device that logs nothing; what another check has left is stopped."""
    v2 = rig.v2
    if not v2.offers(LOG_START, SET):
        raise NotApplicable("it has no DMA logging")
    with suppress(OSError):
        stop(v2)
    return v2


@contextmanager
def _logging(v2: V2Device, spans: Sequence[Span] = ((BASE, SIZE),)) -> Iterator[None]:
    try:
        start(v2, spans)
    except OSError as error:
        raise Deviation(f"START: {errno_name(error)}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            stop(v2)


@contextmanager
def _reporting(rig: Rig) -> Iterator[V2Device]:
    """Start logging; skip where the kernel cannot report."""
    v2 = _device(rig)
    with _logging(v2):
        try:
            report(v2)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise NotApplicable(NO_BITMAPS) from error
            raise Deviation(f"REPORT: {errno_name(error)}") from error
        yield v2


@CHECKS.add("probe", "START, STOP and REPORT are offered together", "0, 0, 0")
def _probe(rig: Rig) -> str:
    v2 = _device(rig)
    for feature, operation, name in ((LOG_STOP, SET, "STOP"), (LOG_REPORT, GET, "REPORT")):
        try:
            v2.feature(PROBE | operation | feature)
        except OSError as error:
            raise Deviation(f"{name}: {errno_name(error)}") from error
    return "0, 0, 0"


@CHECKS.add("start", "logging of a range can be started; the page size that is used comes back", "0, a power of two")
def _start(rig: Rig) -> str:
    v2 = _device(rig)
    chosen = [start(v2)]
    stop(v2)
    chosen.append(start(v2, page_size=SIZE))
    stop(v2)
    for size in chosen:
        require(size > 0 and not size & (size - 1), f"page size {size}")
    return f"page size {chosen[0]} for {PAGE}, {chosen[1]} for {SIZE}"


def _refused(rig: Rig, number: int, spans: Sequence[Span], count: int | None = None) -> str:
    v2 = _device(rig)
    try:
        return refusal(lambda: start(v2, spans, count=count), number)
    finally:
        with suppress(OSError):
            stop(v2)


@CHECKS.add("no-range", "START without a range is refused", "EINVAL", source=LOG_CORE)
def _no_range(rig: Rig) -> str:
    return _refused(rig, errno.EINVAL, [])


@CHECKS.add("most-ranges", "as many ranges as fit into a page are taken", "0")
def _most(rig: Rig) -> str:
    v2 = _device(rig)
    spans = [(BASE + 2 * PAGE * at, PAGE) for at in range(RANGES_MAX)]
    try:
        start(v2, spans)
    except OSError as error:
        raise Weakness(
            f"{RANGES_MAX} ranges: {errno_name(error)}", "the core takes them; a driver may have less"
        ) from error
    stop(v2)
    return f"{RANGES_MAX} ranges"


@CHECKS.add("too-many", "more ranges than fit into a page are refused", "E2BIG", source=LOG_CORE)
def _too_many(rig: Rig) -> str:
    spans = [(BASE + 2 * PAGE * at, PAGE) for at in range(RANGES_MAX + 1)]
    return _refused(rig, errno.E2BIG, spans)


@CHECKS.add("unaligned", "a range that is not made of whole pages is refused", "EINVAL", source=LOG_CORE)
def _unaligned(rig: Rig) -> str:
    _refused(rig, errno.EINVAL, [(BASE + 512, PAGE)])
    return _refused(rig, errno.EINVAL, [(BASE, PAGE + 512)])


@CHECKS.add("overlap", "ranges that overlap are refused", "EINVAL", source=LOG_CORE)
def _overlap(rig: Rig) -> str:
    return _refused(rig, errno.EINVAL, [(BASE, 2 * PAGE), (BASE + PAGE, 2 * PAGE)])


@CHECKS.add("wrap", "a range beyond 2^64 is refused", "EOVERFLOW", source=LOG_CORE)
def _wrap(rig: Rig) -> str:
    return _refused(rig, errno.EOVERFLOW, [((1 << 64) - PAGE, 2 * PAGE)])


@CHECKS.add("bad-pointer", "ranges that cannot be read are refused", "EFAULT", source=LOG_CORE)
def _bad_pointer(rig: Rig) -> str:
    v2 = _device(rig)
    return refusal(lambda: v2.feature(SET | LOG_START, CONTROL.pack(PAGE, 1, 0, 8)), errno.EFAULT)


@CHECKS.add("short-argsz", "argsz without room for the payload is refused", "EINVAL", source=LOG_CORE)
def _short(rig: Rig) -> str:
    v2 = _device(rig)
    for feature, payload in ((SET | LOG_START, CONTROL), (GET | LOG_REPORT, REQUEST)):
        refusal(partial(v2.feature, feature, bytes(payload.size), 8 + payload.size - 1), errno.EINVAL)
    return "EINVAL"


@CHECKS.add("refused-stays-off", "after a START that was refused logging is off, and can be started", "0")
def _refused_stays_off(rig: Rig) -> str:
    v2 = _device(rig)
    refusal(lambda: start(v2, [(BASE, 2 * PAGE), (BASE + PAGE, 2 * PAGE)]))
    with _logging(v2):
        return "0"


@CHECKS.add("start-twice", "a second START is refused", "an error")
def _start_twice(rig: Rig) -> str:
    v2 = _device(rig)
    with _logging(v2):
        return refusal(lambda: start(v2))


@CHECKS.add("stop", "logging can be stopped", "0")
def _stop(rig: Rig) -> str:
    v2 = _device(rig)
    start(v2)
    stop(v2)
    return "0"


@CHECKS.add("stop-twice", "a STOP too many does no harm", "START works afterwards")
def _stop_twice(rig: Rig) -> str:
    v2 = _device(rig)
    start(v2)
    stop(v2)
    try:
        stop(v2)
        seen = "0"
    except OSError as error:
        seen = errno_name(error)
    with _logging(v2):
        return f"{seen}, and START works"


@CHECKS.add("report", "the log of a range that is logged can be read", "0", source=REPORT)
def _report(rig: Rig) -> str:
    v2 = _device(rig)
    with _logging(v2):
        try:
            bits = report(v2).bits()
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise Weakness("EOPNOTSUPP", f"START succeeds, but {NO_BITMAPS}") from error
            raise
    return f"0, {bits} bits"


@CHECKS.add("report-not-started", "the log cannot be read when nothing is logged", "an error", source=REPORT)
def _report_not_started(rig: Rig) -> str:
    with _reporting(rig) as v2:
        stop(v2)
        return refusal(lambda: report(v2))


@CHECKS.add("report-page-size", "a page size below 4096 or no power of two is refused", "EINVAL", source=REPORT_CORE)
def _report_page_size(rig: Rig) -> str:
    v2 = _device(rig)
    with _logging(v2):
        for size in (0, 2048, 12288):
            refusal(partial(v2.feature, GET | LOG_REPORT, REQUEST.pack(BASE, SIZE, size, 8)), errno.EINVAL)
    return "EINVAL"


@CHECKS.add("report-page-sizes", "the log can be read in other page sizes than it is kept in", "0", source=REPORT)
def _report_page_sizes(rig: Rig) -> str:
    sizes = (PAGE, 2 * PAGE, 16 * PAGE, 512 * PAGE)
    with _reporting(rig) as v2:
        for size in sizes:
            try:
                report(v2, page_size=size)
            except OSError as error:
                raise Deviation(f"{size}: {errno_name(error)}") from error
    return f"0 for {', '.join(map(str, sizes))}"


@CHECKS.add("report-wrap", "a range beyond 2^64 cannot be read", "EOVERFLOW", source=REPORT_CORE)
def _report_wrap(rig: Rig) -> str:
    v2 = _device(rig)
    with _logging(v2):
        return refusal(lambda: report(v2, (1 << 64) - PAGE, 2 * PAGE), errno.EOVERFLOW)


@CHECKS.add("report-idle", "where the device has no memory nothing is dirty", "0 bits", source=REPORT)
def _report_idle(rig: Rig) -> str:
    rig.require_own()
    with _reporting(rig) as v2:
        bits = report(v2).bits()
    require(not bits, f"{bits} bits")
    return "0 bits"


@CHECKS.add("report-twice", "reading the log clears it", "0 bits in the second of two", source=REPORT)
def _report_twice(rig: Rig) -> str:
    rig.require_own()
    with _reporting(rig) as v2:
        report(v2)
        bits = report(v2).bits()
    require(not bits, f"{bits} bits")
    return "0 bits"


@CHECKS.add("report-keeps-bits", "bits that are set in the buffer stay", "all ones", source=REPORT)
def _report_keeps(rig: Rig) -> str:
    with _reporting(rig) as v2:
        bitmap = report(v2, into=Bitmap(SIZE, PAGE, fill=(1 << 64) - 1))
    require(bitmap.is_full(), "bits were cleared")
    return "all ones"


@CHECKS.add("report-tail", "nothing is written behind the bits of the range", "as it was", source=REPORT)
def _report_tail(rig: Rig) -> str:
    with _reporting(rig) as v2:
        for pages in (1, 63, 64, 65, 4096):
            require(report(v2, size=pages * PAGE).is_clean_behind(), f"something, for {pages} pages")
    return "as it was"


@CHECKS.add("report-outside", "outside of what is logged nothing is dirty", "0 bits, or an error", source=REPORT)
def _report_outside(rig: Rig) -> str:
    with _reporting(rig) as v2:
        try:
            bits = report(v2, BASE + 4 * SIZE).bits()
        except OSError as error:
            return errno_name(error)
    require(not bits, f"{bits} bits")
    return "0 bits"


@CHECKS.add("restart", "after a STOP logging can be started again, with an empty log", "0, 0 bits")
def _restart(rig: Rig) -> str:
    rig.require_own()
    with _reporting(rig) as v2:
        stop(v2)
        start(v2)
        bits = report(v2).bits()
    require(not bits, f"{bits} bits")
    return "0, 0 bits"


@CHECKS.add("every-state", "logging has nothing to do with the device's state", "0 in every state")
def _every_state(rig: Rig) -> str:
    with _reporting(rig) as v2:
        states = v2.states()
        for state in states:
            v2.go(RUNNING)
            rig.bring_to(state)
            try:
                report(v2)
            except OSError as error:
                raise Deviation(f"REPORT in {state_name(state)}: {errno_name(error)}") from error
    return f"0 in {len(states)} states"
