# SPDX-License-Identifier: MIT
"""What `status` says of a job that is at work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from vfio_mig.cli.control import _job
from vfio_mig.jobs.control import StatusReport

IDLE = StatusReport(
    device="name",
    kind="mdev",
    type="x",
    holder_pid=1,
    holder="vfio-mig",
    protocol=None,
    state="unknown",
    left=None,
    repair=None,
    migratable=None,
    driver_state=None,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"job": "save", "job_pid": 42}, r"'vfio-mig save', PID 42"),
        ({"job": "", "job_pid": 0}, r"another vfio-mig"),
        (
            {"job": "migrate", "job_pid": 7, "job_since": 1764400000.5, "job_step": "after-live"},
            r"'vfio-mig migrate', PID 7, since 2025-11-\d\d \d\d:\d6:40[+-]\d\d:\d\d, at step after-live",
        ),
    ],
)
def test_a_job_is_named_with_its_start_and_step(changes: dict[str, Any], expected: str) -> None:
    assert re.fullmatch(expected, _job(replace(IDLE, **changes)))
