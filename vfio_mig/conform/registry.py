# SPDX-License-Identifier: MIT
"""All checks, in the order in which they run."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from vfio_mig.conform import rfc, rfc_work
from vfio_mig.conform.v2 import arcs, dirty, ends, fds, feature, precopy, streams
from vfio_mig.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vfio_mig.conform.kit.check import Check


def all_checks() -> list[Check]:
    """Return every check of both families."""
    return [
        *feature.CHECKS,
        *arcs.CHECKS,
        *fds.CHECKS,
        *streams.CHECKS,
        *precopy.CHECKS,
        *dirty.CHECKS,
        *ends.CHECKS,
        *rfc.CHECKS,
        *rfc_work.CHECKS,
    ]


def select(patterns: Sequence[str] = (), family: str | None = None) -> list[Check]:
    """Return the checks of a family whose id is, matches or begins with one of the patterns; all without any.

    :raises UsageError: a pattern matches no check.
    """
    checks = all_checks()
    for pattern in patterns:
        if not any(_matches(check, pattern) for check in checks):
            raise UsageError(f"no check matches {pattern!r}", hint="'vfio-mig conform --list' shows all")
    chosen = [check for check in checks if not patterns or any(_matches(check, pattern) for pattern in patterns)]
    return [check for check in chosen if family is None or check.family == family]


def _matches(check: Check, pattern: str) -> bool:
    return fnmatchcase(check.id, pattern) or check.id.startswith(f"{pattern}.")
