# SPDX-License-Identifier: MIT
"""The tests of RFC patches 1 to 5 are worth something: each fails on a driver without its mechanism."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.vm import test_seed_patches as seed
from tools.lab.sample import host
from tools.lab.sample.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MATCHING: dict[str, Callable[[Guest, Guest], None]] = {
    "g2h_gtt": seed.test_patch_1_a_ggtt_write_reaches_the_host_entries_of_this_vgpu_alone,
    "g2h_fence": seed.test_patch_2_a_fence_holds_host_addresses_and_reads_back_the_guests,
    "g2h_cmd": seed.test_patch_3_a_gpu_command_writes_through_the_host_address,
    "pvinfo_base": seed.test_patch_4_guest_addresses_count_from_pvinfo_after_a_migration,
    "aperture_zero": seed.test_patch_5_the_aperture_starts_at_zero_and_a_reset_moves_nothing,
}


@contextlib.contextmanager
def two_guests() -> Iterator[tuple[Guest, Guest]]:
    with (
        host.instance() as first,
        host.instance() as second,
        Guest.opened(first) as guest,
        Guest.opened(second) as other,
    ):
        yield guest, other


@pytest.mark.parametrize("mutant", MATCHING)
def test_a_patch_s_test_fails_without_its_mechanism_and_passes_with_it(mutant: str) -> None:
    with host.loaded(mutant), two_guests() as guests, pytest.raises(AssertionError) as caught:
        MATCHING[mutant](*guests)
    # It is the test's own assertion that failed, not a helper's
    assert str(caught.traceback[-1].path).endswith("/test_seed_patches.py")
    with two_guests() as guests:
        MATCHING[mutant](*guests)
