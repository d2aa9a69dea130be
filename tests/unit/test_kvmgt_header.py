# SPDX-License-Identifier: MIT
"""The header that is installed with our kvmgt, as a C program sees it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools.kvmgt import pack
from vfio_mig.uapi.profile import DEFAULT_PROFILE, KVMGT_PROFILE, parse_header

if TYPE_CHECKING:
    from vfio_mig.uapi.profile import RfcProfile

ROOT = Path(__file__).parents[2]
PROGRAM = """\
#include <stdio.h>
#include <vfio-mig/gvt_migration.h>
#define SHOW(name) printf("%s %lu\\n", #name, (unsigned long)(name))
int main(void)
{
	SHOW(VFIO_DEVICE_PCI_STATUS_SET);
	SHOW(VFIO_DEVICE_PCI_GET_DIRTY_BITMAP);
	SHOW(VFIO_DEVICE_FLAGS_MIGRATABLE);
	SHOW(VFIO_PCI_DEVICE_STATE_REGION_INDEX);
	SHOW(VFIO_DEVICE_PCI_STOP);
	SHOW(VFIO_DEVICE_PCI_START);
	SHOW(MIGRATION_IMG_MAX_SIZE);
	SHOW(MIGRATION_IMG_LARGE_SIZE);
	SHOW(sizeof(struct vfio_pci_status_set));
	SHOW(sizeof(struct vfio_pci_get_dirty_bitmap));
	return 0;
}
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    room = tmp_path_factory.mktemp("header")
    pack.pack_headers(room / "include/vfio-mig")
    (room / "x.c").write_text(PROGRAM)
    command: list[str | Path] = ["gcc", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-I", room / "include"]
    subprocess.run([*command, room / "x.c", "-o", room / "x"], check=True)
    said = subprocess.run([room / "x"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"^(.*) (\d+)$", said, re.MULTILINE)}


def test_it_has_the_numbers_that_are_built_in(seen: dict[str, int]) -> None:
    def numbers(profile: RfcProfile) -> tuple[int, ...]:
        return (profile.status_set.number, profile.get_dirty.number, profile.migratable_flag, profile.state_index)

    names = ("STATUS_SET", "GET_DIRTY_BITMAP")
    mine = (
        *(seen[f"VFIO_DEVICE_PCI_{name}"] for name in names),
        seen["VFIO_DEVICE_FLAGS_MIGRATABLE"],
        seen["VFIO_PCI_DEVICE_STATE_REGION_INDEX"],
    )
    assert mine == numbers(DEFAULT_PROFILE) == numbers(KVMGT_PROFILE)
    assert seen["MIGRATION_IMG_MAX_SIZE"] == DEFAULT_PROFILE.image_max
    assert seen["MIGRATION_IMG_LARGE_SIZE"] == KVMGT_PROFILE.image_max
    assert (seen["VFIO_DEVICE_PCI_STOP"], seen["VFIO_DEVICE_PCI_START"]) == (1, 2)
    assert (seen["sizeof(struct vfio_pci_status_set)"], seen["sizeof(struct vfio_pci_get_dirty_bitmap)"]) == (8, 16)


def test_this_project_reads_the_same_requests_from_it(seen: dict[str, int]) -> None:
    text = "".join(path.read_text() for path in pack.HEADERS)
    for name in ("STATUS_SET", "GET_DIRTY_BITMAP"):
        number = parse_header(text)[f"VFIO_DEVICE_PCI_{name}_NR"]
        assert 0x3B64 + number == seen[f"VFIO_DEVICE_PCI_{name}"]
