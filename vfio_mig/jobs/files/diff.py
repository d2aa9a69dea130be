# SPDX-License-Identifier: MIT
"""``diff``: what differs between two saved devices. No device is needed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio_mig.errors import UsageError
from vfio_mig.jobs.files.input import STDIN
from vfio_mig.jobs.files.open_file import QEMU, open_saved
from vfio_mig.report import Report

if TYPE_CHECKING:
    from vfio_mig.decode.differences import Difference


@dataclass(frozen=True, kw_only=True)
class DiffReport(Report):
    """How two saved devices differ. Sizes in bytes, addresses as integers.

    :param equal: nothing differs: state, dirty bitmaps, guest memory, and what the headers say of the device. When
        and by what it was saved, the device's name and statistics are not compared.
    :param counts: section: how many differences it has; of ``pages``, how many pages.
    :param differences: the first 1000 of each section; ``section name offset size old new``.
    """

    first: str
    second: str
    equal: bool
    counts: dict[str, int]
    differences: list[Difference]


def diff_images(first: str, second: str) -> DiffReport:
    """Compare two images, or two bare states, or one with the other; one of them may be ``-``, standard input.

    :raises ImageError: one of them is not whole.
    :raises UsageError: one is a QEMU stream: extract its devices first.
    """
    from vfio_mig.decode.differences import header_differences, state_differences
    from vfio_mig.decode.memorydiff import dirty_differences, page_differences

    if first == second == STDIN:
        raise UsageError("only one of them can be standard input")
    with ExitStack() as stack:
        old, new = (stack.enter_context(open_saved(file)) for file in (first, second))
        for file, one in ((first, old), (second, new)):
            if one.kind == QEMU:
                raise UsageError(f"{file} is a QEMU stream", hint="'vfio-mig extract' writes its devices' states")
        found = [*header_differences(old.archive, new.archive)]
        found += state_differences(old.source, new.source, old.driver if old.driver == new.driver else "")
        if old.archive is not None and new.archive is not None:
            found += [*dirty_differences(old.archive, new.archive), *page_differences(old.archive, new.archive)]
    return DiffReport(
        first=first,
        second=second,
        equal=not found,
        counts={one.section: one.total for one in found},
        differences=[difference for one in found for difference in one.listed],
    )
