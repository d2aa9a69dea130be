# SPDX-License-Identifier: MIT
"""The words of cdefs/ against the header of the kernel that runs, the newest one among them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import pytest

from vfio_mig.uapi.profile import parse_header

OURS: Final = Path(__file__).parents[2] / "cdefs" / "vfio_mainline.h"
# The protocol v2's words, and those beginning like them that are none of its
V2: Final = re.compile(r"VFIO_(?:MIGRATION_|MIG_|PRECOPY_|DEVICE_STATE_|DEVICE_FEATURE_(?:MIG|DMA_LOGGING))")
NOT_V2: Final = re.compile(
    r"VFIO_DEVICE_STATE_(?:V1_|NR$)"  # the protocol before, and a number of states
    r"|VFIO_MIG_GET_PRECOPY_INFO$"  # an ioctl's: vfio_mig/uapi/__init__.py
)


@pytest.fixture(scope="module")
def header() -> dict[str, int]:
    path = Path(os.environ["VFIO_MIG_KERNEL_UAPI"]) / "linux" / "vfio.h"
    return parse_header(path.read_text(encoding="utf-8"))


def test_what_both_have_is_the_same(header: dict[str, int]) -> None:
    ours = parse_header(OURS.read_text(encoding="ascii"))
    both = ours.keys() & header.keys()
    assert len(both) >= 40
    assert {name: ours[name] for name in both} == {name: header[name] for name in both}


def test_no_word_of_the_protocol_v2_is_new_to_us(header: dict[str, int]) -> None:
    ours = parse_header(OURS.read_text(encoding="ascii"))
    assert {name for name in header if V2.match(name) and not NOT_V2.match(name)} <= ours.keys()
