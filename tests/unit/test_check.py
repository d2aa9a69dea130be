# SPDX-License-Identifier: MIT
"""Does an image fit a device, and is a file an image at all: every finding, whatever the file says."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vfio_mig
from vfio_mig.device import Device, Region
from vfio_mig.errors import DeviceError, HostError, ImageError, MismatchError, UsageError
from vfio_mig.host.devices import HostDevice
from vfio_mig.image.archive import Archive, read_archive
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.check import (
    MISMATCH,
    NOTE,
    OK,
    FitCheck,
    check_image,
    fit_checks,
    header_checks,
    require_fit,
    state_checks,
    verify_image,
)
from vfio_mig.jobs.engine import session as session_module
from vfio_mig.jobs.engine.session import Session
from vfio_mig.protocols.base import MigrationProtocol
from vfio_mig.protocols.gvt_rfc import GvtRfc
from vfio_mig.protocols.registry import parse_state

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT: Final = Path(__file__).parents[2]
NAME: Final = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
FOUND: Final = HostDevice(NAME, "", "mdev", "i915-GVTg_V4_8", "0000:00:02.0", "vfio_mdev", 7)
MIB: Final = 1 << 20
LOW, HIGH = 64 * MIB, 384 * MIB
PVINFO_AT: Final = 0x78000
BAR0, CONFIG = 0, 7
IMAGE_MAX: Final = 0x900000


# --- a state, and a device that fits it


def record(kind: int, payload: bytes) -> bytes:
    return struct.pack("<II", kind, len(payload)) + payload


def gvt_state(
    *,
    low: int = LOW,
    high: int = HIGH,
    ids: tuple[int, int] = (0x8086, 0x1912),
    levels: tuple[int, ...] = (),
    crc: int = 0,
    workloads: int = 0,
) -> bytes:
    vreg = bytearray(0x200000)
    struct.pack_into("<QHHII", vreg, PVINFO_AT, 0x4776544776544776, 1, 0, 2, 0x1C)
    struct.pack_into("<5I", vreg, PVINFO_AT + 0x40, 0, low, (1 << 32) - high, high, 4)
    body = record(2, struct.pack("<HH", *ids).ljust(4096, b"\0")) + record(4, bytes(0x200000)) + record(3, bytes(vreg))
    body += record(5, bytes((low + high) // 4096 * 8))
    body += record(6, b"".join(struct.pack("<i4x4Q", level, 0x1000, 0, 0, 0) for level in levels))
    body += record(7, struct.pack("<i4II", 0, 0, 0, 0, 0, 0) * workloads)
    return record(1, struct.pack("<iiQ512x", 0, 536 + len(body), crc)) + body


GOOD_STATE: Final = gvt_state()


class FakeDevice(Device):
    """A vGPU's configuration space and PVINFO; all else is not to be asked for.

    :param windows: sizes of low and high graphics memory; None when they cannot be read.
    """

    def __init__(self, windows: tuple[int, int] | None = (LOW, HIGH), ids: tuple[int, int] = (0x8086, 0x1912)) -> None:
        super().__init__(NAME, -1)
        self.windows = windows
        self.ids = ids

    def region(self, index: int) -> Region:
        if index == BAR0 and self.windows is None:
            raise DeviceError("no BAR 0", device=self.name)
        assert index in {BAR0, CONFIG}
        return Region(index, 3, 16 * MIB, index << 40, None, None, (), ())

    def pread(self, region: Region, offset: int, size: int) -> bytes:
        content = {
            (CONFIG, 0): struct.pack("<HH", *self.ids),
            (BAR0, PVINFO_AT + 0x40): struct.pack(
                "<IIII", 0, (self.windows or (0, 0))[0], 1 << 31, (self.windows or (0, 0))[1]
            ),
        }[region.number, offset]
        assert len(content) == size
        return content


class OtherProtocol(MigrationProtocol):
    """Knows no layout, reads nothing and changes nothing: a check that does either fails."""

    name: ClassVar[str] = "other"

    @property
    def state_size_max(self) -> int:
        return IMAGE_MAX - 1

    def _never(self, *_: object) -> memoryview:
        raise AssertionError

    stop = start = reset = read_state = write_state = dirty = _never  # type: ignore[assignment]


class FakeProtocol(OtherProtocol):
    name: ClassVar[str] = GvtRfc.name
    knows_states: ClassVar[bool] = GvtRfc.knows_states
    parse_state = GvtRfc.parse_state


def session_with(device: Device | None = None, protocol: type[OtherProtocol] = FakeProtocol, **found: Any) -> Session:
    device = device or FakeDevice()
    return Session(FOUND._replace(**found), device, protocol(device))


def header(**changes: object) -> dict[str, Any]:
    good = {
        "protocol": "gvt-rfc",
        "device": {"name": NAME, "kind": "mdev", "type": FOUND.type, "driver": FOUND.driver},
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "time": 1511600000,
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not ...}


def image_of(head: Mapping[str, Any] | None = None, state: bytes = b"state", pages: int = 0) -> bytes:
    file = io.BytesIO()
    writer = ArchiveWriter(file, header() if head is None else dict(head))
    if pages:
        writer.add_pages([(0x10000, b"\x11" * 4096 * pages)])
    writer.add_state(state)
    writer.finish()
    return file.getvalue()


def archive_of(head: Mapping[str, Any] | None = None, state: bytes = b"state") -> Archive:
    return read_archive(io.BytesIO(image_of(head, state)))


def results(found: list[FitCheck]) -> dict[str, str]:
    names = [one.name for one in found]
    assert len(set(names)) == len(names) or set(names) == {*names, "state-content"}
    return {one.name: one.result for one in found}


HEADER_NAMES: Final = ["format", "protocol", "device-type", "machine", "driver", "kernel", "state-size"]
STATE_NAMES: Final = ["state", "pci-ids", "graphics-memory"]


# --- the header's findings


def test_an_image_of_this_device_fits_in_every_respect() -> None:
    found = fit_checks(session_with(), GOOD_STATE, archive_of(state=GOOD_STATE))
    assert [one.name for one in found] == [*HEADER_NAMES, *STATE_NAMES]
    assert {one.result for one in found} == {OK}
    texts = {one.name: one.text for one in found}
    assert texts["device-type"] == "i915-GVTg_V4_8"
    assert texts["state-size"] == f"{len(GOOD_STATE)} bytes, the device takes {IMAGE_MAX - 1}"
    assert texts["state"] == "7 records, numbered as in rfc"
    assert texts["pci-ids"] == "8086:1912"
    assert texts["graphics-memory"] == "64 + 384 MiB"
    assert require_fit(NAME, found) == []


DIFFERENCES: Final[dict[str, tuple[dict[str, Any], str, str, str]]] = {
    "protocol": ({"protocol": "other"}, "protocol", MISMATCH, "'other' in the image, 'gvt-rfc' here"),
    "no protocol": ({"protocol": ...}, "protocol", MISMATCH, "None in the image, 'gvt-rfc' here"),
    "type": ({"device": {"type": "x", "driver": "vfio_mdev"}}, "device-type", MISMATCH, "'x' in the image, "),
    "machine": ({"machine": "s390x"}, "machine", MISMATCH, "'s390x' in the image, "),
    "kernel": ({"kernel": "2.6.32"}, "kernel", NOTE, "'2.6.32' in the image, "),
    "no kernel": ({"kernel": ...}, "kernel", NOTE, "None in the image, "),
    "driver": (
        {"device": {"type": FOUND.type, "driver": "i915"}},
        "driver",
        NOTE,
        "'i915' in the image, 'vfio_mdev' here",
    ),
}


@pytest.mark.parametrize(("changes", "name", "result", "text"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_one_difference_is_one_finding(changes: dict[str, Any], name: str, result: str, text: str) -> None:
    found = list(header_checks(session_with(), archive_of(header(**changes))))
    assert [one.name for one in found] == HEADER_NAMES
    (differs,) = [one for one in found if one.result != OK]
    assert (differs.name, differs.result) == (name, result)
    assert differs.text.startswith(text)


def test_only_a_type_whose_state_tells_it_apart_may_be_forced() -> None:
    changes = {"device": {"type": "x"}, "machine": "s390x", "protocol": "third"}
    for protocol, forcible in ((FakeProtocol, ["device-type"]), (OtherProtocol, [])):
        found = list(header_checks(session_with(protocol=protocol), archive_of(header(**changes))))
        assert [one.name for one in found if one.forcible and one.result == MISMATCH] == forcible


@pytest.mark.parametrize(("more", "result"), [(0, OK), (1, MISMATCH)])
def test_a_state_that_the_device_could_not_take_does_not_fit(more: int, result: str) -> None:
    archive = archive_of(state=bytes(IMAGE_MAX - 1 + more))
    assert results(list(header_checks(session_with(), archive)))["state-size"] == result


HOSTILE: Final[dict[str, dict[str, Any]]] = {
    "empty": dict.fromkeys(header(), ...),
    "a device that is a list": {"device": ["type"]},
    "a device that is a text": {"device": "type"},
    "a device that is null": {"device": None},
    "no device": {"device": ...},
    "a device of lists": {"device": {"type": ["x"], "driver": {}}},
    "numbers": {"protocol": 1, "machine": 2.5, "kernel": True, "device": {"type": 0, "driver": -1}},
    "nulls": {"protocol": None, "machine": None, "kernel": None, "device": {"type": None, "driver": None}},
    "a protocol that is a table": {"protocol": {"name": "gvt-rfc"}},
    "a protocol that is a list": {"protocol": ["gvt-rfc"]},
    "long": {"machine": "x" * 100_000, "device": {"type": "y" * 100_000}},
    "line ends": {"machine": "x\ny\x1b[31m", "device": {"type": "a\nb"}},
    "deep": {"machine": [[[[[[[[[[]]]]]]]]]], "device": {"type": [[[[[[[[]]]]]]]]}},
    "half a letter": {"machine": "\ud800", "device": {"type": "\udfff"}},
    "a time that is a text": {"time": "now"},
    "a time that is true": {"time": True},
    "a large time": {"time": 10**300},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_header_says_is_compared_or_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    head = header(**changes)
    found = list(header_checks(session_with(), archive_of(head)))
    assert [one.name for one in found] == HEADER_NAMES
    fits = results(found)
    same = {key: head.get(key) == header()[key] for key in ("protocol", "machine")}
    assert all((fits[key] == OK) == good for key, good in same.items())
    assert max(len(one.text) for one in found) < 1000
    if MISMATCH in fits.values():
        with pytest.raises(MismatchError) as caught:
            require_fit(NAME, found, force=False)
        assert str(caught.value).isprintable()
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image_of(head))
    report = verify_image(str(file), verify_state=False)
    json.dumps(report.as_dict())
    assert type(report.time) in {int, type(None)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("protocol", "device", "kernel", "machine", "time", "program"), JSON)
    )
)
def test_no_header_at_all_breaks_a_check(head: dict[str, Any]) -> None:
    found = fit_checks(session_with(), b"no state", archive_of(head))
    with pytest.raises(MismatchError) as caught:
        require_fit(NAME, found)
    assert str(caught.value).isprintable()


# --- the state's findings


@pytest.mark.parametrize(
    ("state", "device", "expected", "text"),
    [
        (gvt_state(ids=(0x8086, 0x591D)), FakeDevice(), ["pci-ids"], "'8086:591d' in the image, '8086:1912' here"),
        (GOOD_STATE, FakeDevice(ids=(0x10DE, 0x1912)), ["pci-ids"], "'8086:1912' in the image, '10de:1912' here"),
        (
            gvt_state(low=128 * MIB, high=512 * MIB),
            FakeDevice(),
            ["graphics-memory"],
            "'128 + 512 MiB' in the image, '64 + 384 MiB' here",
        ),
        (GOOD_STATE, FakeDevice((LOW, 2 * HIGH)), ["graphics-memory"], "'64 + 384 MiB' in the image, "),
        (GOOD_STATE[:-8], FakeDevice(), ["state"], "cut off at "),
        (b"", FakeDevice(), ["state"], "HEAD record at 0x0: "),
    ],
    ids=["image's ids", "device's ids", "image's type", "device's memory", "cut", "empty"],
)
def test_a_state_of_another_device_does_not_fit(state: bytes, device: Device, expected: list[str], text: str) -> None:
    found = list(state_checks(session_with(device), state))
    wrong = [one for one in found if one.result == MISMATCH]
    assert [one.name for one in wrong] == expected
    assert wrong[0].text.startswith(text)
    assert not wrong[0].forcible
    with pytest.raises(MismatchError, match=f"the image does not fit: {expected[0]}: "):
        require_fit(NAME, found, force=True)


def test_memory_sizes_that_cannot_be_read_are_noted() -> None:
    found = list(state_checks(session_with(FakeDevice(None)), GOOD_STATE))
    assert results(found) == {"state": OK, "pci-ids": OK, "graphics-memory": NOTE}
    assert found[-1].text == "the device's own sizes cannot be read"


def test_what_is_unusual_about_a_state_is_noted_and_told() -> None:
    unusual = gvt_state(low=LOW, high=HIGH + 4096, levels=(3, 7), crc=5)
    found = list(state_checks(session_with(FakeDevice((LOW, HIGH + 4096))), unusual))
    notes = [one for one in found if one.result != OK and one.name != "guest-memory"]
    assert {(one.name, one.result) for one in notes} == {("state-content", NOTE)}
    told = require_fit(NAME, found)
    assert told[:-1] == [one.text for one in notes]
    assert len(told) == 4
    assert "levels 7 are of another kernel" in told[1]


RELIES: Final = gvt_state(levels=(4, 4), workloads=1)
LACKS: Final = "it has the state's 2 page tables and 1 queued workload, and {}: the target must have the rest"


@pytest.mark.parametrize(
    ("content", "pages", "text"),
    [
        ("dirty", 1, LACKS.format("only the pages that the device may have written come along")),
        ("dirty", 0, LACKS.format("only the pages that the device may have written come along")),
        ("none", 0, LACKS.format("no page comes along")),
        (..., 0, LACKS.format("no page comes along")),
        (..., 1, LACKS.format("not all pages may come along")),
    ],
)
def test_an_image_without_all_of_guest_memory_is_noted_where_the_state_relies_on_it(
    content: object, pages: int, text: str
) -> None:
    """An image of earlier versions does not say what it has."""
    memory = ... if content is ... else {"content": content}
    archive = read_archive(io.BytesIO(image_of(header(memory=memory), RELIES, pages)))
    found = fit_checks(session_with(), RELIES, archive)
    assert FitCheck("guest-memory", NOTE, text) in found
    assert require_fit(NAME, found) == [f"guest memory: {text}"]


def test_an_image_with_all_of_it_and_a_state_that_needs_none_are_not() -> None:
    whole = archive_of(header(memory={"content": "all"}), RELIES)
    found = fit_checks(session_with(), RELIES, whole)
    assert FitCheck(
        "guest-memory", OK, "all pages come along, with the state's 2 page tables and 1 queued workload"
    ) in (found)
    assert require_fit(NAME, found) == []
    none = fit_checks(session_with(), GOOD_STATE, archive_of(header(memory={"content": "none"}), GOOD_STATE))
    assert "guest-memory" not in results(none)


def test_a_bare_state_brings_no_memory() -> None:
    found = fit_checks(session_with(), RELIES, None)
    assert FitCheck("guest-memory", NOTE, LACKS.format("no page comes along")) in found


def test_a_state_of_unknown_layout_is_noted() -> None:
    found = list(state_checks(session_with(protocol=OtherProtocol), b"anything"))
    assert found == [FitCheck("state", NOTE, "the layout of a other state is not known")]
    assert parse_state("other", b"anything") is None
    parsed = parse_state("gvt-rfc", GOOD_STATE)
    assert parsed is not None
    assert "records, numbered as in" in parsed.summary


def test_a_raw_state_has_no_header_to_compare_and_an_unverified_one_nothing_else() -> None:
    device = session_with()
    assert [one.name for one in fit_checks(device, GOOD_STATE, None)] == STATE_NAMES
    assert [one.name for one in fit_checks(device, b"", archive_of(), verify_state=False)] == HEADER_NAMES
    assert fit_checks(device, b"", None, verify_state=False) == []


# --- check


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "find", lambda _: FOUND)
    monkeypatch.setattr(session_module, "_open_found", lambda *_, **__: session_with())


@pytest.mark.usefixtures("played")
def test_a_check_is_a_report_that_json_can_carry(tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image_of(state=GOOD_STATE))
    report = check_image(NAME, str(file))
    assert (report.device, report.file, report.fits) == (NAME, str(file), True)
    file.write_bytes(image_of(header(machine="s390x"), GOOD_STATE))
    wrong = check_image(NAME, str(file))
    assert not wrong.fits
    form = json.loads(json.dumps(wrong.as_dict()))
    assert list(form) == ["device", "file", "fits", "checks"]
    assert [one["name"] for one in form["checks"]] == [*HEADER_NAMES, *STATE_NAMES]
    assert form["checks"][3] == {
        "name": "machine",
        "result": "mismatch",
        "text": f"'s390x' in the image, {os.uname().machine!r} here",
        "forcible": False,
    }


@pytest.mark.usefixtures("played")
def test_a_check_of_a_raw_state_compares_the_state_alone(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(GOOD_STATE)
    assert [one.name for one in check_image(NAME, str(file), raw=True).checks] == STATE_NAMES
    file.write_bytes(bytes(IMAGE_MAX))
    with pytest.raises(ImageError, match="too long"):
        check_image(NAME, str(file), raw=True)


@pytest.mark.usefixtures("played")
def test_a_state_too_large_for_the_device_is_not_even_read(tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image_of(state=bytes(IMAGE_MAX)))
    found = results(check_image(NAME, str(file)).checks)
    assert (found["state-size"], found["state"]) == (MISMATCH, MISMATCH)


@pytest.mark.usefixtures("played")
def test_a_check_of_no_image_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image_of()[:-1])
    with pytest.raises(ImageError, match="cut off"):
        check_image(NAME, str(file))
    with pytest.raises(HostError, match="ENOENT"):
        check_image(NAME, str(tmp_path / "none"))


# --- verify


def test_a_whole_image_is_described(tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image_of(state=GOOD_STATE, pages=3))
    report = verify_image(str(file))
    assert report.as_dict() == {
        "file": str(file),
        "protocol": "gvt-rfc",
        "type": "i915-GVTg_V4_8",
        "time": 1511600000,
        "members": 3,
        "state_bytes": len(GOOD_STATE),
        "pages": 3,
        "warnings": [],
    }


def test_a_raw_state_is_described(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(gvt_state(levels=(7,)))
    report = verify_image(str(file), raw=True)
    assert astuple(report)[:7] == (str(file), None, None, None, 0, file.stat().st_size, 0)
    assert len(report.warnings) == 1


BROKEN: Final[dict[str, tuple[bytes, bool, str]]] = {
    "empty": (b"", False, "cut off at byte 0"),
    "cut": (image_of(state=GOOD_STATE)[:-1], False, "cut off"),
    "longer": (image_of(state=GOOD_STATE) + b"\0", False, "behind the end"),
    "wrong state": (image_of(), False, "HEAD record at 0x0"),
    "state cut": (image_of(state=GOOD_STATE[:-8]), False, "cut off at 0x"),
    "raw as an image": (GOOD_STATE, False, "member header at 0x0"),
    "image as raw": (image_of(state=GOOD_STATE), True, "record at 0x0"),
    "raw empty": (b"", True, "HEAD record at 0x0"),
    "raw cut": (GOOD_STATE[:-1], True, "cut off at 0x"),
    "raw too long": (bytes(IMAGE_MAX + 1), True, f"more than {IMAGE_MAX} bytes"),
}


@pytest.mark.parametrize(("content", "raw", "words"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_broken_is_refused(tmp_path: Path, content: bytes, words: str, *, raw: bool) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(content)
    with pytest.raises(ImageError, match=words) as caught:
        verify_image(str(file), raw=raw)
    assert caught.value.exit_code == 6


def test_a_state_of_unknown_layout_is_verified_as_far_as_it_goes(tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    for head, verify_state in ((header(protocol="other"), True), (header(), False)):
        file.write_bytes(image_of(head))
        assert verify_image(str(file), verify_state=verify_state).state_bytes == 5


@pytest.mark.parametrize("name", ["", "fifo"])
def test_what_is_no_file_is_no_image(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a regular file"):
        verify_image(str(tmp_path / name))


# --- the command


def verify(*words: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    code = "from vfio_mig.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, input=stdin or b"", capture_output=True, check=False)


def test_the_command_says_in_one_line_that_an_image_is_good(tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image_of(state=GOOD_STATE, pages=2))
    done = verify("verify", file)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == (
        f"{file}: good: gvt-rfc image of a i915-GVTg_V4_8, 3 members, {len(GOOD_STATE)} bytes of state, "
        "2 pages of memory\n"
    )
    done = verify("--json", "verify", "-", stdin=file.read_bytes())
    assert json.loads(done.stdout) == {**verify_image(str(file)).as_dict(), "file": "-"}


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image_of(state=GOOD_STATE)[:-1])
    done = verify("verify", file)
    assert (done.returncode, done.stdout) == (6, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"vfio-mig: {file}: end of the archive: cut off at byte ")


def test_of_two_files_the_one_that_is_broken_is_named(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.write_bytes(image_of(state=GOOD_STATE))
    cut.write_bytes(whole.read_bytes()[:-1])
    for pair in ((whole, cut), (cut, whole)):
        with pytest.raises(ImageError) as caught:
            vfio_mig.diff_images(*map(str, pair))
        assert str(caught.value).startswith(f"{cut}: end of the archive")


def test_the_command_warns_of_what_is_unusual(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(gvt_state(crc=5))
    done = verify("-q", "verify", "--raw", file)
    assert (done.returncode, done.stdout) == (0, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"vfio-mig: warning: {file}: the image carries a checksum (0x5)")
