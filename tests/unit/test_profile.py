# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfio_mig.errors import HostError, UsageError, VfioMigError
from vfio_mig.jobs.files.header import HEADER_MAX, load_profile
from vfio_mig.uapi import Request
from vfio_mig.uapi.profile import DEFAULT_PROFILE, REQUIRED, TAKEN, parse_header

SYSTEM_HEADER: Final = Path("/usr/include/linux/vfio.h")
# As the RFC's patches leave the kernel's own file
PATCHED: Final = """\
/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
#ifndef _UAPIVFIO_H
#define _UAPIVFIO_H

#include <linux/types.h>
#include <linux/ioctl.h>

#define VFIO_TYPE\t(';')
#define VFIO_BASE\t100

/* #define VFIO_DEVICE_PCI_STOP 77 is only talk */
// #define VFIO_DEVICE_PCI_START 78 is, too
struct vfio_device_info {
\t__u32\targsz;
\t__u32\tflags;
#define VFIO_DEVICE_FLAGS_RESET\t(1 << 0)\t/* Device supports reset */
#define VFIO_DEVICE_FLAGS_PCI\t(1 << 1)\t/* vfio-pci device */
#define VFIO_DEVICE_FLAGS_MIGRATABLE (1 << 5)   /* Device supports
\t\t\t\t\t\t * migrate */
\t__u32\tnum_regions;\t/* Max region index + 1 */
};
#define VFIO_DEVICE_GET_INFO\t\t_IO(VFIO_TYPE, VFIO_BASE + 7)

enum {
\tVFIO_PCI_BAR0_REGION_INDEX,
\tVFIO_PCI_BAR1_REGION_INDEX,
\tVFIO_PCI_BAR2_REGION_INDEX,
\tVFIO_PCI_BAR3_REGION_INDEX,
\tVFIO_PCI_BAR4_REGION_INDEX,
\tVFIO_PCI_BAR5_REGION_INDEX,
\tVFIO_PCI_ROM_REGION_INDEX,
\tVFIO_PCI_CONFIG_REGION_INDEX,
\t/*
\t * Expose VGA regions defined for PCI base class 03, subclass 00,
\t * with commas { and } braces.
\t */
\tVFIO_PCI_VGA_REGION_INDEX,
#define MIGRATION_IMG_MAX_SIZE\t\t(0x900000)
\tVFIO_PCI_DEVICE_STATE_REGION_INDEX,
\tVFIO_PCI_NUM_REGIONS = 10 /* Fixed user ABI, region indexes >=10 use */
};

#define VFIO_DEVICE_PCI_STATUS_SET\t\\
\t_IO(VFIO_TYPE, VFIO_BASE + 14)

struct vfio_pci_status_set {
\t__u32\targsz;
\t__u32\tflags;
#define VFIO_DEVICE_PCI_STOP  (1 << 0)
#define VFIO_DEVICE_PCI_START (1UL << 1)
};

#define VFIO_DEVICE_PCI_GET_DIRTY_BITMAP _IO(VFIO_TYPE, VFIO_BASE + 15)
#endif /* _UAPIVFIO_H */
"""
# Everything elsewhere: the numbers of a tree that carries more
OTHER: Final = """\
#define VFIO_DEVICE_FLAGS_MIGRATABLE (1 << 9)
enum { VFIO_PCI_CONFIG_REGION_INDEX = 7, VFIO_PCI_VGA_REGION_INDEX, VFIO_SPARE,
       VFIO_PCI_DEVICE_STATE_REGION_INDEX, VFIO_PCI_NUM_REGIONS };
#define VFIO_DEVICE_PCI_STATUS_SET _IO(VFIO_TYPE, VFIO_BASE + 22)
#define VFIO_DEVICE_PCI_GET_DIRTY_BITMAP _IO ( VFIO_TYPE , VFIO_BASE+23 )
#define VFIO_DEVICE_PCI_STOP 0x10u
#define VFIO_DEVICE_PCI_START 32
#define MIGRATION_IMG_MAX_SIZE 0xA00000UL
"""


@pytest.fixture
def header(tmp_path: Path) -> Path:
    path = tmp_path / "vfio.h"
    path.write_text(PATCHED)
    return path


def test_a_patched_kernels_header_gives_the_shipped_numbers(header: Path) -> None:
    assert load_profile(str(header)) == DEFAULT_PROFILE._replace(source=str(header))


def test_what_stands_in_a_comment_says_nothing(header: Path) -> None:
    name = "VFIO_DEVICE_PCI_STOP"
    header.write_text(
        f"{OTHER}/**/ /*/ #define {name} 1\n // */ /***/ // #define {name} 2\n/* // */ /*\n#define {name} 4\n*/\n"
    )
    assert load_profile(str(header)) == load_profile(str(header))._replace(stop=16, start=32)
    header.write_text(f"{OTHER.replace('0x10u', '/**/0x10u/*/ 1 /**/')}/* without an end\n#define {name} 1\n")
    assert load_profile(str(header)).stop == 16


def test_what_stands_between_if_0_and_its_end_says_nothing_and_what_follows_does(header: Path) -> None:
    stop, start = ("#define VFIO_DEVICE_PCI_" + rest for rest in ("STOP 0x10u", "START 32"))
    dead = "#if 0\n#define VFIO_DEVICE_PCI_STOP 1\n#ifdef X\n#endif\n#define VFIO_DEVICE_PCI_START 2\n"
    rest = "".join(f"{line}\n" for line in OTHER.splitlines() if line not in {stop, start})
    for text in (
        f"{rest}{dead}#endif\n{stop}\n{start}\n",
        f"{rest}{dead}#else\n{stop}\n#endif\n{start}\n",
        f"{dead}#endif\n#ifdef Y\n{stop}\n#endif\n{start}\n{rest}",
    ):
        header.write_text(text)
        profile = load_profile(str(header))
        assert (profile.stop, profile.start, profile.migratable_flag) == (16, 32, 0x200)


def test_other_numbers_win(header: Path) -> None:
    header.write_text(OTHER)
    profile = load_profile(str(header))
    assert profile.migratable_flag == 0x200
    assert (profile.state_index, profile.num_regions) == (10, 11)
    assert profile.status_set == Request("VFIO_DEVICE_PCI_STATUS_SET", 0x3B7A)
    assert profile.get_dirty == Request("VFIO_DEVICE_PCI_GET_DIRTY_BITMAP", 0x3B7B)
    assert (profile.stop, profile.start) == (16, 32)
    assert profile.image_max == 0xA00000
    assert profile.source == str(header)


def test_the_size_of_the_region_may_be_defined_elsewhere(header: Path) -> None:
    header.write_text(re.sub(r"#define MIGRATION_IMG_MAX_SIZE.*\n", "", OTHER))
    assert load_profile(str(header)).image_max == 0x900000


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_name_is_refused_by_name(header: Path, name: str) -> None:
    header.write_text(re.sub(rf"\b{name}\b", "SOMETHING_ELSE", PATCHED))
    with pytest.raises(UsageError) as caught:
        load_profile(str(header))
    # exactly this one is missing; a counted-on enumerator's successors are still known
    assert caught.value.problem == f"{header} does not define {name}"
    assert "2017 migration RFC" in str(caught.value)


def test_all_missing_names_are_told_at_once(header: Path) -> None:
    header.write_text("")
    with pytest.raises(UsageError) as caught:
        load_profile(str(header))
    assert all(name in caught.value.problem for name in REQUIRED)


@pytest.mark.parametrize(
    ("name", "value", "culprit"),
    [
        ("VFIO_DEVICE_FLAGS_MIGRATABLE", "0", "have impossible values"),
        ("VFIO_DEVICE_FLAGS_MIGRATABLE", "0x60", "have impossible values"),
        ("VFIO_DEVICE_FLAGS_MIGRATABLE", "(1 << 32)", "have impossible values"),
        ("VFIO_DEVICE_PCI_STOP", "0", "have impossible values"),
        ("VFIO_DEVICE_PCI_START", "0", "have impossible values"),
        ("VFIO_DEVICE_PCI_STOP", "(1 << 32)", "have impossible values"),
        ("VFIO_DEVICE_PCI_START", "0x100000000", "have impossible values"),
        ("VFIO_DEVICE_PCI_START", "0x10", "have impossible values"),
        ("VFIO_DEVICE_PCI_STATUS_SET", "_IO(VFIO_TYPE, VFIO_BASE + 100)", "is not a VFIO ioctl number"),
        ("VFIO_DEVICE_PCI_GET_DIRTY_BITMAP", "_IO(VFIO_TYPE, VFIO_BASE + 100)", "is not a VFIO ioctl number"),
        ("VFIO_DEVICE_PCI_STATUS_SET", "15", "is not a VFIO ioctl number"),
        ("VFIO_DEVICE_PCI_GET_DIRTY_BITMAP", "0x3b63", "is not a VFIO ioctl number"),
        ("VFIO_PCI_DEVICE_STATE_REGION_INDEX", "11", "is not below"),
        ("VFIO_PCI_NUM_REGIONS", "10", "is not below"),
        ("VFIO_PCI_NUM_REGIONS", "65537", "is not below"),
    ],
)
def test_impossible_values_are_refused(header: Path, name: str, value: str, culprit: str) -> None:
    values = {key: str(number) for key, number in parse_header(OTHER).items()}
    assert name in values
    values[name] = value
    header.write_text("".join(f"#define {key} {number}\n" for key, number in values.items()))
    with pytest.raises(UsageError, match=culprit) as caught:
        load_profile(str(header))
    assert name in str(caught.value)
    assert str(header) in str(caught.value)


@pytest.mark.parametrize("name", ["VFIO_DEVICE_PCI_STATUS_SET", "VFIO_DEVICE_PCI_GET_DIRTY_BITMAP"])
@pytest.mark.parametrize("nr", [24, 27, 60, 99])
def test_the_first_and_the_last_of_the_numbers_that_are_free_are_accepted(header: Path, name: str, nr: int) -> None:
    header.write_text(f"{OTHER}#define {name} _IO(VFIO_TYPE, VFIO_BASE + {nr})\n")
    profile = load_profile(str(header))
    assert Request(name, 0x3B64 + nr) in (profile.status_set, profile.get_dirty)


@pytest.mark.parametrize("name", ["VFIO_DEVICE_PCI_STATUS_SET", "VFIO_DEVICE_PCI_GET_DIRTY_BITMAP"])
@pytest.mark.parametrize("nr", sorted(TAKEN))
def test_the_number_of_another_request_is_refused_but_for_the_rfcs_own(header: Path, name: str, nr: int) -> None:
    header.write_text(f"{OTHER}#define {name} _IO(VFIO_TYPE, VFIO_BASE + {nr})\n")
    if (name, nr) in {("VFIO_DEVICE_PCI_STATUS_SET", 14), ("VFIO_DEVICE_PCI_GET_DIRTY_BITMAP", 15)}:
        load_profile(str(header))
        return
    with pytest.raises(UsageError) as caught:
        load_profile(str(header))
    assert f"{name} has the number of another request: {TAKEN[nr]}" in str(caught.value)


def test_reset_is_named(header: Path) -> None:
    header.write_text(f"{PATCHED}#define VFIO_DEVICE_PCI_STATUS_SET _IO(VFIO_TYPE, VFIO_BASE + 11)\n")
    with pytest.raises(UsageError, match="VFIO_DEVICE_RESET"):
        load_profile(str(header))


def test_both_requests_with_one_number_are_refused(header: Path) -> None:
    header.write_text(f"{OTHER}#define VFIO_DEVICE_PCI_STATUS_SET _IO(VFIO_TYPE, VFIO_BASE + 23)\n")
    with pytest.raises(UsageError, match="are the same number"):
        load_profile(str(header))


@pytest.mark.parametrize("bit", range(32))
def test_the_bit_of_another_flag_is_refused_but_for_the_rfcs_own(header: Path, bit: int) -> None:
    header.write_text(f"{OTHER}#define VFIO_DEVICE_FLAGS_MIGRATABLE (1 << {bit})\n")
    if bit in {4, 5} or bit > 8:
        assert load_profile(str(header)).migratable_flag == 1 << bit
        return
    with pytest.raises(UsageError, match="is the bit of VFIO_DEVICE_FLAGS_"):
        load_profile(str(header))


def test_a_tree_that_has_the_bit_for_ccw_does_not_have_it_for_the_rfc(header: Path) -> None:
    flags = "#define VFIO_DEVICE_FLAGS_CCW (1 << 4)\n#define VFIO_DEVICE_FLAGS_MIGRATABLE (1 << 4)\n"
    header.write_text(OTHER + flags)
    with pytest.raises(UsageError, match="VFIO_DEVICE_FLAGS_CCW"):
        load_profile(str(header))


@pytest.mark.parametrize("index", range(10))
def test_the_index_of_another_region_is_refused(header: Path, index: int) -> None:
    header.write_text(f"{OTHER}#define VFIO_PCI_DEVICE_STATE_REGION_INDEX {index}\n")
    values = re.sub("VFIO_PCI_DEVICE_STATE_REGION_INDEX,", "", header.read_text())
    header.write_text(values)
    if index == 9:
        assert load_profile(str(header)).state_index == 9
        return
    with pytest.raises(UsageError, match="is that of a BAR"):
        load_profile(str(header))


@pytest.mark.parametrize("size", ["0", "4096", "(4 << 20)", "0x4000001", "0x7fffffffffffffff"])
def test_a_region_that_holds_no_state_is_refused_before_a_device_is_looked_for(header: Path, size: str) -> None:
    header.write_text(re.sub(r"MIGRATION_IMG_MAX_SIZE.*", f"MIGRATION_IMG_MAX_SIZE {size}", OTHER))
    with pytest.raises(UsageError, match="no vGPU's state fits MIGRATION_IMG_MAX_SIZE"):
        load_profile(str(header))


@pytest.mark.parametrize("name", ["vfio.h", "iommufd.h"])
def test_every_request_of_the_systems_headers_is_known(name: str) -> None:
    path = SYSTEM_HEADER.with_name(name)
    if not path.exists():
        pytest.skip(f"no linux/{name}")
    values = parse_header(path.read_text())
    numbers = {value - 0x3B00 - 100 for value in values.values() if value >> 8 == 0x3B}
    if name == "iommufd.h":
        numbers = {value - 100 for key, value in values.items() if key.startswith("IOMMUFD_CMD_") and value >= 0x80}
    assert numbers
    assert numbers <= TAKEN.keys()


def test_a_header_of_the_largest_size_is_read_and_a_larger_one_refused(header: Path) -> None:
    header.write_text(PATCHED.ljust(HEADER_MAX))
    assert load_profile(str(header)).state_index == 9
    header.write_text(PATCHED.ljust(HEADER_MAX + 1))
    with pytest.raises(UsageError, match="is larger than 1048576 bytes"):
        load_profile(str(header))


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    # an open() that waits for a writer would wait for ever: the alarm's handler ends it
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(5)
    try:
        with pytest.raises(UsageError, match="is not a regular file"):
            load_profile(str(path))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_header_that_is_not_there_is_the_hosts_fault(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot open the header: ENOENT"):
        load_profile(str(tmp_path / "none"))


def test_the_systems_own_header_lacks_the_rfc() -> None:
    if not SYSTEM_HEADER.exists():
        pytest.skip("no linux/vfio.h")
    with pytest.raises(UsageError) as caught:
        load_profile(str(SYSTEM_HEADER))
    assert "does not define VFIO_DEVICE_FLAGS_MIGRATABLE" in str(caught.value)
    assert "VFIO_PCI_NUM_REGIONS" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#define A 0x10", {"A": 16}),
        ("#define A 10", {"A": 10}),
        ("  #  define\tA\t 7ULL  ", {"A": 7}),
        ("#define A ((3))", {"A": 3}),
        ("#define A (1 << 6)", {"A": 64}),
        ("#define A 1UL<<31", {"A": 1 << 31}),
        ("#define A 0x3 << 2", {"A": 12}),
        ("#define A _IO(VFIO_TYPE, VFIO_BASE + 0)", {"A": 0x3B64}),
        ("#define A 5\n#define B A\n#define C (B)", {"A": 5, "B": 5, "C": 5}),
        ("#define A \\\n  9", {"A": 9}),
        ("#define A 9 // nine\n#define B 1", {"A": 9, "B": 1}),
        ("#define A /* no */ 9 /* yes */", {"A": 9}),
        ("#define A 1\n#define A 2", {"A": 2}),
        ("enum x { A, B = 5, C, D = A, E, };", {"A": 0, "B": 5, "C": 6, "D": 0, "E": 1}),
        ("enum\n{\nA = 0x10,\n#define Q 3\nB\n}", {"A": 16, "B": 17, "Q": 3}),
        ("#define N 4\nenum { A = N, B };", {"N": 4, "A": 4, "B": 5}),
    ],
)
def test_constants_are_read(text: str, expected: dict[str, int]) -> None:
    assert parse_header(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "#define A",
        "#define A(x) 1",
        "#define A B",
        "#define A 1 + 1",
        "#define A (1 << 2) | (1 << 3)",
        "#define A -1",
        "#define A sizeof(int)",
        "#define A _IOR(VFIO_TYPE, VFIO_BASE + 14, int)",
        "#define A _IO('x', 14)",
        "#define A _IO(VFIO_TYPE, VFIO_BASE + 156)",
        "#define VFIO_BASE 0xffffffffffffffff\n#define A _IO(VFIO_TYPE, VFIO_BASE + 1)",
        "#define A 0x12345678123456780",
        "#define A 1 << 100",
        '#define A "1"',
        "#undef A 1",
        "/* #define A 1 */",
        "enum { A = B, };",
    ],
)
def test_what_is_not_understood_is_left_out(text: str) -> None:
    assert "A" not in parse_header(text)


def test_enumerators_after_an_unknown_one_are_not_guessed() -> None:
    assert parse_header("enum { A = SOMETHING, B, C = 3, D };") == {"C": 3, "D": 4}


@given(st.binary(max_size=300))
@example(b"\xff\xfe\0\0#define VFIO_DEVICE_PCI_STOP 1")
@example(b"/*" * 150)
def test_binary_garbage_is_a_usage_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.h"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="does not define"):
        load_profile(str(path))


WORDS: Final = st.sampled_from(
    [
        *REQUIRED,
        *["#define ", "enum {", "}", "{", "(", ")", "<<", "=", ",", "\n", "\\\n", "/*", "*/", "//", " ", "\t"],
        *["0x", "ffffffffffffffff", "99999999999999999999", "08", "1", "64", "-", "UL", "\u0664", "²", "\0"],
        *["_IO(VFIO_TYPE, VFIO_BASE + 14)", "_IO(VFIO_TYPE, VFIO_BASE + 999)"],
    ]
)


@given(st.lists(WORDS, max_size=40))
def test_what_looks_like_a_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "words.h"
    path.write_text("".join(words))
    try:
        profile = load_profile(str(path))
    except VfioMigError:
        return
    assert profile.stop != profile.start


@given(st.dictionaries(st.sampled_from(REQUIRED), st.integers(0, 1 << 80), min_size=len(REQUIRED)))
def test_any_numbers_make_a_possible_profile_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers.h"
    path.write_text("".join(f"#define {name} {value:#x}\n" for name, value in values.items()))
    try:
        profile = load_profile(str(path))
    except UsageError:
        return
    assert profile.migratable_flag.bit_count() == 1
    assert profile.state_index < profile.num_regions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#define A 010\n#define B 08\n", {"A": 8}),
        ("#if 0\n#define A 1\n#else\n#define A 2\n#endif\n#define B 3\n", {"A": 2, "B": 3}),
        ("#ifdef X\n#if 0\n#define A 1\n#endif\n#define B 2\n#endif\n", {"B": 2}),
        ("#define VFIO_BASE 200\n#define A _IO(VFIO_TYPE, VFIO_BASE + 1)\n", {"VFIO_BASE": 200, "A": 0x3B00 + 201}),
        ("#define A \\\r\n 5\r\n", {"A": 5}),
        ("int a; // #define A 1\n/* #define B 2 */ \n#define C /* x */ 3\n", {"C": 3}),
        ("enum a { A = 3, B }; enum b; struct c { enum a d; }; enum { C, D };", {"A": 3, "B": 4, "C": 0, "D": 1}),
    ],
)
def test_constants_are_those_of_a_c_compiler(text: str, expected: dict[str, int]) -> None:
    assert parse_header(text) == expected


@pytest.mark.parametrize("unit", ["/* ", "enum ", "enum { ", "// ", "#if 0\n", "#define A (((", "( "])
def test_hostile_headers_take_no_longer_than_their_size(unit: str) -> None:
    """With any quadratic step the megabyte would take minutes; what counts is that this ends at all."""
    signal.alarm(20)
    try:
        parse_header(unit * ((1 << 20) // len(unit)))
        parse_header("#define A " + unit * 100_000 + ")" * 100_000)
    finally:
        signal.alarm(0)
