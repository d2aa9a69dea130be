# SPDX-License-Identifier: MIT
"""What a check is, how it comes to its result, and where the rules are from.

A check is a function that takes the :class:`~vfio_mig.conform.kit.rig.Rig` and returns what it has seen, in a few
words; it raises :class:`Deviation` where a rule is broken, :class:`Weakness` where the header only recommends, and
:class:`NotApplicable` where there is nothing to check. Its state at the start is RUNNING, and it need not clean up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.conform.kit.rig import Rig

PASS: Final = "pass"  # noqa: S105 -- a result
FAIL: Final = "fail"
WARN: Final = "warn"
SKIP: Final = "skip"
Outcome = Literal["pass", "fail", "warn", "skip"]
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)

V2: Final = "v2"
RFC: Final = "rfc"
Family = Literal["v2", "rfc"]

FSM: Final = "linux/vfio.h, enum vfio_device_mig_state"
STATE: Final = "linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"
MIGRATION: Final = "linux/vfio.h, VFIO_DEVICE_FEATURE_MIGRATION"
ENVELOPE: Final = "linux/vfio.h, VFIO_DEVICE_FEATURE; vfio_main.c, vfio_check_feature()"
NEXT: Final = "vfio_main.c, vfio_mig_get_next_state()"
SIZE: Final = "linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE"
PRECOPY: Final = "linux/vfio.h, VFIO_MIG_GET_PRECOPY_INFO"
LOGGING: Final = "linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_START"
REPORT: Final = "linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT"
LOG_CORE: Final = "vfio_main.c, vfio_ioctl_device_feature_logging_start()"
REPORT_CORE: Final = "vfio_main.c, vfio_ioctl_device_feature_logging_report()"
LEAVING: Final = "linux/vfio.h, enum vfio_device_mig_state: RESUMING -> STOP"
DATA_FD: Final = (
    "linux/vfio.h, enum vfio_device_mig_state: read() and write() on data_fd; stream_open() in every driver"
)
CLOSE: Final = "vfio_device_ops.close_device; what every driver in the kernel does"


class Check(NamedTuple):
    """One rule.

    :param id: dotted, stable.
    :param rule: what has to hold, as a sentence without a full stop.
    :param source: where that is written.
    :param expected: what a device that keeps the rule shows, in a few words.
    :param run: see the module's docstring.
    :param family: V2 or RFC.
    :param danger: why it is only run on demand: which kernel or driver does not survive it; empty for a harmless one.
    """

    id: str
    rule: str
    source: str
    expected: str
    run: Callable[[Rig], str]
    family: Family = V2
    danger: str = ""


class Result(NamedTuple):
    """What came of a check.

    :param seen: what was seen; of a skipped check why it was not run.
    :param note: of a warning, why it is not a failure, or what follows from it; else empty.
    :param seconds: time it took.
    """

    id: str
    rule: str
    source: str
    expected: str
    seen: str
    outcome: Outcome
    note: str
    seconds: float


class Checks(list[Check]):
    """The checks of one module; a decorator puts functions into it.

    :param prefix: of every id.
    """

    def __init__(self, prefix: str, source: str, family: Family = V2) -> None:
        super().__init__()
        self._prefix = prefix
        self._source = source
        self._family = family

    def add(
        self, name: str, rule: str, expected: str, *, source: str | None = None, danger: str = ""
    ) -> Callable[[Callable[[Rig], str]], Callable[[Rig], str]]:
        """Make a check of the decorated function."""

        def keep(run: Callable[[Rig], str]) -> Callable[[Rig], str]:
            self.append(
                Check(f"{self._prefix}.{name}", rule, source or self._source, expected, run, self._family, danger)
            )
            return run

        return keep
