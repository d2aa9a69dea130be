# SPDX-License-Identifier: MIT
"""cdefs/*.h are C, and lay out bytes as the RFC's documents say; the numbers below come from there, not from them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

CDEFS = Path(__file__).parents[2] / "cdefs"
HEADERS = ("gvt_rfc.h", "gvt_image.h", "gvt_pvinfo.h")

# struct: its size, and {field: (offset, size)}; a flexible array has no size
LAYOUTS: dict[str, tuple[int, dict[str, tuple[int, int | None]]]] = {
    "vfio_pci_status_set": (8, {"argsz": (0, 4), "flags": (4, 4)}),
    "vfio_pci_get_dirty_bitmap": (16, {"start_addr": (0, 8), "page_nr": (8, 8), "dirty_bitmap": (16, None)}),
    "gvt_region": (8, {"type": (0, 4), "size": (4, 4)}),
    "gvt_image_header": (
        528,
        {"version": (0, 4), "data_size": (4, 4), "crc_check": (8, 8), "global_data": (16, 512)},
    ),
    "gvt_ppgtt_entry": (40, {"page_table_level": (0, 4), "reserved": (4, 4), "pdp": (8, 32)}),
    "gvt_workload_entry": (24, {"ring_id": (0, 4), "data": (4, 16), "index": (20, 4)}),
    "vgt_if": (
        4096,
        {
            "magic": (0, 8),
            "version_major": (8, 2),
            "version_minor": (0xA, 2),
            "vgt_id": (0xC, 4),
            "vgt_caps": (0x10, 4),
            "mappable_base": (0x40, 4),
            "mappable_size": (0x44, 4),
            "nonmappable_base": (0x48, 4),
            "nonmappable_size": (0x4C, 4),
            "fence_num": (0x50, 4),
            "v2g_notify": (0x800, 4),
            "display_ready": (0x804, 4),
            "g2v_notify": (0x818, 4),
            "cursor_x_hot": (0x830, 4),
            "cursor_y_hot": (0x834, 4),
            "pdp": (0x838, 32),
            "execlist_context_descriptor_lo": (0x858, 4),
            "execlist_context_descriptor_hi": (0x85C, 4),
        },
    ),
}
SIGNED = (("gvt_image_header", "data_size"), ("gvt_image_header", "version"), ("gvt_workload_entry", "ring_id"))
CONSTANTS = {
    "VFIO_DEVICE_FLAGS_MIGRATABLE": 0x20,
    "VFIO_PCI_DEVICE_STATE_REGION_INDEX": 9,
    "VFIO_PCI_RFC_NUM_REGIONS": 10,
    "VFIO_DEVICE_PCI_STATUS_SET_NR": 14,
    "VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR": 15,
    "VFIO_DEVICE_PCI_STOP": 1,
    "VFIO_DEVICE_PCI_START": 2,
    "MIGRATION_IMG_MAX_SIZE": 9 * 1024 * 1024,
    "GVT_MIGRATION_NONE": 0,
    "GVT_MIGRATION_HEAD": 1,
    "GVT_MIGRATION_CFG_SPACE": 2,
    "GVT_MIGRATION_VREG": 3,
    "GVT_MIGRATION_SREG": 4,
    "GVT_MIGRATION_GTT": 5,
    "GVT_MIGRATION_PPGTT": 6,
    "GVT_MIGRATION_WORKLOAD": 7,
    "GVT_IMAGE_VERSION": 0,
    "GVT_IMAGE_CFG_SIZE": 4096,
    "GVT_IMAGE_REG_SIZE": 2 * 1024 * 1024,
    "GVT_RING_RCS": 0,
    "GVT_RING_BCS": 1,
    "GVT_RING_VCS": 2,
    "GVT_RING_VCS2": 3,
    "GVT_RING_VECS": 4,
    "VGT_PVINFO_PAGE": 0x78000,
    "VGT_MAGIC": 0x4776544776544776,
    "GVT_MMIO_SIZE": 0x200000,
    "GVT_GTT_OFFSET": 0x800000,
    "GVT_GTT_SIZE": 0x800000,
    "GVT_FENCE_OFFSET": 0x100000,
}
# What the numbers are in <linux/vfio.h>'s own terms
REQUESTS = {"VFIO_DEVICE_PCI_STATUS_SET_NR": 0x3B72, "VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR": 0x3B73}


def compile_c(directory: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    source = directory / "check.c"
    source.write_text("\n".join(lines) + "\n")
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command = ["gcc", "-std=gnu11", *warnings, "-fsyntax-only", f"-I{CDEFS}", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def includes(*names: str) -> list[str]:
    return [f'#include "{name}"' for name in names]


@pytest.mark.parametrize("header", HEADERS)
def test_each_header_compiles_alone_and_twice(tmp_path: Path, header: str) -> None:
    result = compile_c(tmp_path, [*includes(header, header), "extern int unused;"])
    assert not result.stderr
    assert result.returncode == 0


def test_every_header_is_known_here() -> None:
    known = {path.name for path in CDEFS.glob("gvt_*.h")}
    assert known == set(HEADERS)


def test_structures_and_constants_are_what_the_rfc_says(tmp_path: Path) -> None:
    lines = [*includes(*HEADERS), "#include <stddef.h>", "#include <linux/vfio.h>"]
    for struct, (size, fields) in LAYOUTS.items():
        lines.append(f'_Static_assert(sizeof(struct {struct}) == {size}, "{struct}");')
        for field, (offset, length) in fields.items():
            where = f"struct {struct}, {field}"
            lines.append(f'_Static_assert(offsetof({where}) == {offset}, "{where}");')
            if length is not None:
                member = f"((struct {struct} *)0)->{field}"
                lines.append(f'_Static_assert(sizeof({member}) == {length}, "size of {where}");')
    for struct, field in SIGNED:
        member = f"((struct {struct} *)0)->{field}"
        lines.append(f'_Static_assert((__typeof__({member}))-1 < 0, "{struct}.{field} is signed");')
    for name, value in CONSTANTS.items():
        lines.append(f'_Static_assert({name} == {value}, "{name}");')
    for name, value in REQUESTS.items():
        lines.append(f'_Static_assert(_IO(VFIO_TYPE, VFIO_BASE + {name}) == {value}, "{name}");')
    lines.append('_Static_assert(VFIO_PCI_DEVICE_STATE_REGION_INDEX == VFIO_PCI_NUM_REGIONS, "upstream: 9");')
    result = compile_c(tmp_path, lines)
    assert not result.stderr
    assert result.returncode == 0


def test_a_wrong_number_would_be_noticed(tmp_path: Path) -> None:
    result = compile_c(tmp_path, [*includes(*HEADERS), '_Static_assert(sizeof(struct gvt_region) == 9, "seen");'])
    assert result.returncode != 0
    assert "seen" in result.stderr
