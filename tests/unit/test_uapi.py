# SPDX-License-Identifier: MIT
"""The bindings say what a C compiler says of the same headers, and mainline's what the system's <linux/vfio.h> says."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any, Final

import pytest

from tools.gen_uapi import HEADERS, declarations, write_libraries, write_module, write_stub
from vfio_mig import uapi
from vfio_mig.uapi import IoctlError, Request, call, ffi, iommufd, kvm, vfio_request
from vfio_mig.uapi.profile import DEFAULT_PROFILE, GET_DIRTY, STATUS_SET

ROOT: Final = Path(__file__).parents[2]
CDEFS: Final = ROOT / "cdefs"
UAPI: Final = ROOT / "vfio_mig" / "uapi"
MAINLINE: Final = "vfio_mainline.h"
# Mainline's structs grow at their end; the kernel looks at argsz
GROWN: Final = {"vfio_device_info": 24}
COMPILED_NAME: Final = re.compile(r"^#define (\w+) (?!\()\S", re.MULTILINE)
STRUCT_NAME: Final = re.compile(r"^struct (\w+) \{", re.MULTILINE)

RAW: Final[Any] = ffi
LIBRARY: Final[Any] = RAW.dlopen(None)

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")

Layout = dict[str, tuple[int, ...]]
"""``struct`` -> (size,), ``struct.field`` -> (offset, size, signed)."""


def run_c(directory: Path, lines: list[str]) -> dict[str, tuple[int, ...]]:
    """Compile, run, and read lines of a name and numbers."""
    source, program = directory / "print.c", directory / "print"
    body = ["#include <stddef.h>", "#include <stdio.h>", *lines]
    source.write_text("\n".join([*body, "return 0; }"]) + "\n")
    subprocess.run(
        ["gcc", "-std=gnu11", "-O0", f"-I{CDEFS}", "-o", str(program), str(source)], check=True, capture_output=True
    )
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {name: tuple(map(int, numbers)) for name, *numbers in map(str.split, output.splitlines())}


def print_constant(name: str, expression: str | None = None) -> str:
    return f'printf("{name} %llu\\n", (unsigned long long)({expression or name}));'


def print_layout(name: str) -> list[str]:
    lines = [f'printf("{name} %zu\\n", sizeof(struct {name}));']
    for field, (_, size, signed) in fields_of(name).items():
        member = f"((struct {name} *)0)->{field}"
        length = "0" if size == 0 else f"sizeof({member})"
        sign = "0" if signed < 0 else f"((__typeof__({member}))-1 < 0)"
        place = f"offsetof(struct {name}, {field})"
        lines.append(f'printf("{name}.{field} %zu %zu %d\\n", {place}, (size_t){length}, {sign});')
    return lines


def fields_of(name: str) -> dict[str, tuple[int, int, int]]:
    """Return offset, size (0: flexible array) and signedness (-1: no integer) of each field, as ffi has them."""
    found = {}
    for field, about in RAW.typeof(f"struct {name}").fields:
        size = 0 if about.type.kind == "array" and about.type.length is None else RAW.sizeof(about.type)
        signed = int(int(RAW.cast(about.type, -1)) < 0) if about.type.kind == "primitive" else -1
        found[field] = (about.offset, size, signed)
    return found


def ffi_layout(names: list[str]) -> Layout:
    found: Layout = {}
    for name in names:
        found[name] = (RAW.sizeof(f"struct {name}"),)
        for field, (offset, size, signed) in fields_of(name).items():
            found[f"{name}.{field}"] = (offset, size, max(signed, 0))
    return found


def structs_in(*headers: str) -> list[str]:
    return [name for header in headers for name in STRUCT_NAME.findall((CDEFS / header).read_text("ascii"))]


def constants_in(*headers: str) -> list[str]:
    return [name for header in headers for name in COMPILED_NAME.findall((CDEFS / header).read_text("ascii"))]


@pytest.mark.parametrize("name", ["uapi/_generated.py", "uapi/_generated.pyi", "dirty/_gmp.py", "dirty/_libcrypto.py"])
def test_the_committed_bindings_are_those_of_a_fresh_run(tmp_path: Path, name: str) -> None:
    text = declarations()
    for room in ("uapi", "dirty"):
        (tmp_path / room).mkdir()
    write_module(text, tmp_path / "uapi")
    write_stub(text, tmp_path / "uapi")
    write_libraries(tmp_path / "dirty")
    assert (UAPI.parent / name).read_bytes() == (tmp_path / name).read_bytes(), "run python -m tools.gen_uapi"


def test_every_header_is_in_the_bindings() -> None:
    assert {path.name for path in CDEFS.glob("*.h")} == set(HEADERS)
    assert set(structs_in(*HEADERS)) == set(RAW.list_types()[1])
    assert set(constants_in(*HEADERS)) == {name for name in dir(LIBRARY) if not name.startswith("_")}


@needs_compiler
def test_the_compiler_lays_out_every_struct_as_ffi_does(tmp_path: Path) -> None:
    names = structs_in(*HEADERS)
    includes = [f'#include "{header}"' for header in HEADERS]
    lines = [line for name in names for line in print_layout(name)]
    said = run_c(tmp_path, [*includes, "int main(void) {", *lines])
    assert said == ffi_layout(names)


@needs_compiler
def test_the_compiler_gives_every_constant_the_value_that_ffi_has(tmp_path: Path) -> None:
    names = constants_in(*HEADERS)
    includes = [f'#include "{header}"' for header in HEADERS]
    said = run_c(tmp_path, [*includes, "int main(void) {", *map(print_constant, names)])
    assert said == {name: (RAW.integer_const(name),) for name in names}


@pytest.fixture(scope="module")
def system_header() -> str:
    """The system's own header with its macros, as the compiler reads it."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    command = ["gcc", "-E", "-dD", "-include", "linux/vfio.h", "-xc", "/dev/null"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_mainlines_structs_are_those_of_the_systems_header(tmp_path: Path, system_header: str) -> None:
    names = [name for name in structs_in(MAINLINE) if re.search(rf"\bstruct {name} \{{", system_header)]
    assert {"vfio_device_info", "vfio_region_info", "vfio_group_status", "vfio_iommu_type1_dma_map"} <= set(names)
    lines = [line for name in names for line in print_layout(name)]
    said = run_c(tmp_path, ["#include <linux/vfio.h>", "int main(void) {", *lines])
    for name, size in GROWN.items():
        if said[name] == (size,):
            del said[name]
    assert said == {name: value for name, value in ffi_layout(names).items() if name in said}


def test_mainlines_constants_are_those_of_the_systems_header(tmp_path: Path, system_header: str) -> None:
    names = [name for name in constants_in(MAINLINE) if re.search(rf"\b{name}\b", system_header)]
    assert {"VFIO_DEVICE_FLAGS_PCI", "VFIO_PCI_CONFIG_REGION_INDEX", "VFIO_TYPE1v2_IOMMU"} <= set(names)
    said = run_c(tmp_path, ["#include <linux/vfio.h>", "int main(void) {", *map(print_constant, names)])
    assert said == {name: (RAW.integer_const(name),) for name in names}


REQUESTS: Final = [value for value in vars(uapi).values() if isinstance(value, Request)]
RFC_REQUESTS: Final = [DEFAULT_PROFILE.status_set, DEFAULT_PROFILE.get_dirty]


# Newer than Linux 6.1's header: the numbers stand in the comments of later ones
NEWER: Final = {
    "VFIO_DEVICE_BIND_IOMMUFD": 18,
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": 19,
    "VFIO_MIG_GET_PRECOPY_INFO": 21,
}


@needs_compiler
def test_every_request_has_the_number_of_its_macro(tmp_path: Path) -> None:
    rfc = [print_constant(one.name, f"_IO(VFIO_TYPE, VFIO_BASE + {one.name}_NR)") for one in RFC_REQUESTS]
    lines = [*(print_constant(one.name) for one in REQUESTS), *rfc]
    newer = [
        f"#ifndef {name}\n#define {name} _IO(VFIO_TYPE, VFIO_BASE + {number})\n#endif" for name, number in NEWER.items()
    ]
    head = ["#include <linux/vfio.h>", *newer, '#include "gvt_rfc.h"', "int main(void) {"]
    said = run_c(tmp_path, [*head, *lines])
    assert said == {one.name: (one.number,) for one in REQUESTS + RFC_REQUESTS}
    assert len(said) == 15


def test_every_public_request_is_called_as_its_variable() -> None:
    assert {f"VFIO_{name}" for name, value in vars(uapi).items() if isinstance(value, Request)} == {
        one.name for one in REQUESTS
    }
    assert [one.name for one in RFC_REQUESTS] == [STATUS_SET, GET_DIRTY]


# Sizes and last fields of Linux 6.12's <linux/iommufd.h>, which a system's header may be too old to have
IOMMUFD_LAYOUTS: Final = {
    "iommu_ioas_alloc": (12, "out_ioas_id", 8),
    "iommu_ioas_map": (40, "iova", 32),
    "iommu_hwpt_alloc": (40, "data_uptr", 32),
    "iommu_hw_info": (40, "out_capabilities", 32),
    "iommu_hwpt_set_dirty_tracking": (16, "hwpt_id", 8),
    "iommu_hwpt_get_dirty_bitmap": (48, "data", 40),
}
IOMMUFD_CONSTANTS: Final = {
    "IOMMU_IOAS_MAP_FIXED_IOVA": 1,
    "IOMMU_IOAS_MAP_WRITEABLE": 2,
    "IOMMU_IOAS_MAP_READABLE": 4,
    "IOMMU_HWPT_ALLOC_DIRTY_TRACKING": 2,
    "IOMMU_HW_CAP_DIRTY_TRACKING": 1,
    "IOMMU_HWPT_DIRTY_TRACKING_ENABLE": 1,
}
IOMMUFD_REQUESTS: Final = {
    "IOMMU_IOAS_ALLOC": 0x3B81,
    "IOMMU_IOAS_MAP": 0x3B85,
    "IOMMU_HWPT_ALLOC": 0x3B89,
    "IOMMU_GET_HW_INFO": 0x3B8A,
    "IOMMU_HWPT_SET_DIRTY_TRACKING": 0x3B8B,
    "IOMMU_HWPT_GET_DIRTY_BITMAP": 0x3B8C,
}


def test_iommufds_structs_constants_and_requests_are_those_of_linux_6_12() -> None:
    layouts = {
        name: (RAW.sizeof(f"struct {name}"), field, RAW.offsetof(f"struct {name}", field))
        for name, (_, field, _) in IOMMUFD_LAYOUTS.items()
    }
    assert layouts == IOMMUFD_LAYOUTS
    assert set(layouts) == set(structs_in("iommufd.h"))
    assert {name: RAW.integer_const(name) for name in constants_in("iommufd.h")} == IOMMUFD_CONSTANTS
    requests = [value for value in vars(iommufd).values() if isinstance(value, Request)]
    assert {one.name: one.number for one in requests} == IOMMUFD_REQUESTS


@needs_compiler
def test_iommufds_words_are_those_of_the_systems_header(tmp_path: Path) -> None:
    command = ["gcc", "-E", "-include", "linux/iommufd.h", "-xc", "/dev/null"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the system's headers are older than iommufd")
    lines = [print_constant(name) for name in (*IOMMUFD_CONSTANTS, *IOMMUFD_REQUESTS)]
    for name, (_, field, _) in IOMMUFD_LAYOUTS.items():
        lines.append(print_constant(f"{name}.{field}", f"offsetof(struct {name}, {field})"))
    said = run_c(tmp_path, ["#include <linux/iommufd.h>", "int main(void) {", *lines])
    known = {**IOMMUFD_CONSTANTS, **IOMMUFD_REQUESTS}
    known |= {f"{name}.{field}": offset for name, (_, field, offset) in IOMMUFD_LAYOUTS.items()}
    assert said == {name: (number,) for name, number in known.items()}


KVM_REQUESTS: Final = {
    "KVM_CREATE_VM": 0xAE01,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_CREATE_DEVICE": 0xC00CAEE0,
    "KVM_SET_DEVICE_ATTR": 0x4018AEE1,
}


def test_kvms_requests_are_those_of_linux_6_12() -> None:
    requests = [value for value in vars(kvm).values() if isinstance(value, Request)]
    assert {one.name: one.number for one in requests} == KVM_REQUESTS


@needs_compiler
def test_kvms_words_are_those_of_the_systems_header(tmp_path: Path) -> None:
    constants = constants_in("kvm.h")
    lines = [print_constant(name) for name in (*constants, *KVM_REQUESTS)]
    for name in structs_in("kvm.h"):
        lines += print_layout(name)
    said = run_c(tmp_path, ["#include <linux/kvm.h>", "int main(void) {", *lines])
    assert {name: said[name] for name in constants} == {name: (RAW.integer_const(name),) for name in constants}
    assert {name: said[name] for name in KVM_REQUESTS} == {name: (number,) for name, number in KVM_REQUESTS.items()}
    for name in structs_in("kvm.h"):
        assert said[name] == (RAW.sizeof(f"struct {name}"),)


def test_a_requests_number_counts_from_vfios_base() -> None:
    assert vfio_request("X", 14) == Request("X", 0x3B72)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_refused_ioctl_names_the_request_and_the_errno(tmp_path: Path, kind: str) -> None:
    fd, other = os.pipe() if kind == "pipe" else (os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT), -1)
    try:
        with pytest.raises(IoctlError) as caught:
            call(fd, uapi.DEVICE_GET_INFO, ffi.new("struct vfio_device_info *"))
    finally:
        os.close(fd)
        if other >= 0:
            os.close(other)
    assert caught.value.errno == errno.ENOTTY
    assert caught.value.request is uapi.DEVICE_GET_INFO
    assert str(caught.value) == "VFIO_DEVICE_GET_INFO failed: ENOTTY (Inappropriate ioctl for device)"


def test_a_closed_fd_is_an_ioctl_error_too() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(IoctlError) as caught:
        call(reader, uapi.DEVICE_RESET)
    assert caught.value.errno == errno.EBADF


FIONREAD: Final = Request("FIONREAD", termios.FIONREAD)


def test_the_kernel_writes_into_the_callers_struct_or_bytes() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"12345")
        number, raw = ffi.new("int *", 99), bytearray(4)
        assert call(reader, FIONREAD, number) == 0
        assert call(reader, FIONREAD, raw) == 0
        assert number[0] == 5
        assert struct.unpack("=i", raw) == (5,)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("interruptions", [0, 1, 7])
def test_an_interrupted_ioctl_is_repeated(monkeypatch: pytest.MonkeyPatch, interruptions: int) -> None:
    calls: list[tuple[int, int, object]] = []

    def ioctl(fd: int, number: int, arg: object) -> int:
        calls.append((fd, number, arg))
        if len(calls) <= interruptions:
            raise InterruptedError(errno.EINTR, "interrupted")
        return 42

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert call(3, uapi.SET_IOMMU, 7) == 42
    assert calls == [(3, 0x3B66, 7)] * (interruptions + 1)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINVAL, errno.ENOTTY])
def test_no_other_errno_is_tried_again(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    calls: list[int] = []

    def ioctl(fd: int, _number: int, _arg: object) -> int:
        calls.append(fd)
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(IoctlError) as caught:
        call(3, uapi.SET_IOMMU, 7)
    assert caught.value.errno == number
    assert errno.errorcode[number] in str(caught.value)
    assert calls == [3]
