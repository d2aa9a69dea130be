# SPDX-License-Identifier: MIT
"""What `vfio-mig` refuses: the exit code, one line that says why, and a device in a state that debugfs confirms."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.vm.test_migration import guest_view
from tools.lab.cli import NOBODY, held, refused, run
from tools.lab.sample import gpu, host
from tools.lab.sample.guest import Guest
from vfio_mig.image.archive import read_archive
from vfio_mig.image.writer import ArchiveWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.vm.conftest import MakeGuest, MakeInstance

pytestmark = pytest.mark.slow  # what is refused and why is the program's, not the kernel's

PAGE: Final = 4096
MIB: Final = 1 << 20
ME: Final = str(os.getpid())
BORROW: Final = ("--pid", ME)
OTHER_KIND: Final = "GVTg_V4_4"
RFC_COUNTERS: Final = ("status_set", "get_dirty", "state_read", "state_write")
SYSTEM_HEADER: Final = "/usr/include/linux/vfio.h"
TREE_HEADER: Final = """
#define VFIO_TYPE (';')
#define VFIO_BASE 100
#define VFIO_DEVICE_FLAGS_MIGRATABLE (1 << {flag})
enum {{ VFIO_PCI_DEVICE_STATE_REGION_INDEX = 9, VFIO_PCI_NUM_REGIONS }};
#define VFIO_DEVICE_PCI_STATUS_SET _IO(VFIO_TYPE, VFIO_BASE + 14)
#define VFIO_DEVICE_PCI_STOP (1 << 0)
#define VFIO_DEVICE_PCI_START (1 << 1)
#define VFIO_DEVICE_PCI_GET_DIRTY_BITMAP _IO(VFIO_TYPE, VFIO_BASE + 15)
"""


def rfc_requests(instance: host.Instance) -> dict[str, int]:
    """How often the device has been asked for anything of the RFC."""
    counters = instance.counters()
    return {name: counters[name] for name in RFC_COUNTERS}


@contextlib.contextmanager
def untouched(guest: Guest) -> Iterator[None]:
    """Demand that nothing in the block stops, asks or changes the device, as far as the host can tell."""

    def truth() -> tuple[object, ...]:
        instance = guest.instance
        return rfc_requests(instance), instance.run_state(), instance.queue(), instance.pinned()

    before = truth()
    yield
    assert truth() == before


@contextlib.contextmanager
def unchanged(guest: Guest) -> Iterator[None]:
    """Demand that the device is untouched, and that all that its guest can read is what it was."""
    view = guest_view(guest)
    with untouched(guest):
        yield
    assert guest_view(guest) == view


@contextlib.contextmanager
def never_asked(instance: host.Instance) -> Iterator[None]:
    before = rfc_requests(instance)
    yield
    assert rfc_requests(instance) == before


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A saved vGPU with some page table entries, as `vfio-mig save` writes it."""
    path = tmp_path_factory.mktemp("image") / "gpu.vfm"
    with host.instance() as instance, Guest.opened(instance) as guest:
        guest.bind(4)
        run("-q", "save", instance.uuid, path, *BORROW, warm=True)
    return path.read_bytes()


# --- the device cannot be reached
# tests/unit/test_cli_parse.py tries every kind of name with every command: what is not there needs no kernel


@pytest.mark.parametrize(
    ("command", "device"),
    [
        (("info",), str(uuid.UUID(int=0xA11))),
        pytest.param(("stop",), "0000:ff:1f.7", marks=pytest.mark.variant),
        pytest.param(("save", "FILE"), "/dev/vfio/999", marks=pytest.mark.variant),
        pytest.param(("restore", "FILE"), "/dev/vfio/devices/vfio999", marks=pytest.mark.variant),
        (("mdev", "remove"), str(uuid.UUID(int=0xA12))),
        pytest.param(("status",), "/sys/bus/mdev/devices/nothing", marks=pytest.mark.variant),
    ],
    ids=["a UUID", "a PCI address", "a group's node", "a device's node", "an mdev to remove", "a path"],
)
def test_a_device_that_is_not_there_is_named(command: tuple[str, ...], device: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    if "restore" in command:
        file.touch()
    head = [word for word in command if word != "FILE"]
    tail = [str(file)] if "FILE" in command else []
    missing = "is not a directory of a VFIO device" if device.startswith("/sys/") else "no "
    refused(*head, device, *tail, code=3, words=(device, missing), warm=command[0] != "info")
    assert file.exists() == ("restore" in command)


@pytest.mark.parametrize("command", ["save", "info", "stop", "hold", "dirty"])
def test_a_group_that_another_process_has_open_but_not_set_up_is_left_to_it(command: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    me = Path("/proc/self/comm").read_text().strip()
    with host.instance() as vgpu, Path(f"/dev/vfio/{vgpu.group}").open("r+b", buffering=0):
        refused(
            command,
            vgpu.uuid,
            *([file] if command == "save" else []),
            code=3,
            words=(vgpu.uuid, f"PID {ME} ({me})", "open"),
            warm=command != "save",
        )
        assert vgpu.run_state() == "stopped"  # as a vGPU is that nobody has opened
        assert vgpu.counters()["status_set"] == 0
    assert not file.exists()


@pytest.mark.parametrize("command", ["hold", "restore", "reset"])
def test_what_would_harm_the_owner_of_a_device_is_refused(
    guest: Guest, image: bytes, command: str, tmp_path: Path
) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_bytes(image)
    me = Path("/proc/self/comm").read_text().strip()
    code, word = (3, "every command borrows it") if command == "hold" else (2, "--force")
    with untouched(guest):
        arguments = [file] if command == "restore" else []
        refused(command, guest.instance.uuid, *arguments, code=code, words=(f"PID {ME} ({me})", word), warm=True)
    assert guest.instance.run_state() == "running"


def test_a_process_that_does_not_have_the_device_open_lends_nothing(guest: Guest) -> None:
    with untouched(guest):
        refused("stop", guest.instance.uuid, "--pid", "1", code=3, words=("PID 1 does not have",), warm=True)


@pytest.fixture
def nobody_s() -> Iterator[dict[str, str]]:
    """Give an unprivileged user what such a user needs: a place for locks."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        yield {"VFIO_MIG_LOCK_DIR": name}


@pytest.mark.parametrize("command", ["save", "info"])
def test_who_may_not_open_the_device_is_told_what_to_do(nobody_s: dict[str, str], command: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    with host.instance() as instance, never_asked(instance):
        words = (instance.uuid, f"/dev/vfio/{instance.group}", "EACCES", "run as root")
        rest = [file, "--open"] if command == "save" else ["--open"]
        warm = command != "save"
        refused(command, instance.uuid, *rest, code=3, words=words, user=NOBODY, env=nobody_s, warm=warm)
    assert not file.exists()


def test_who_has_no_place_for_locks_is_told_what_to_do(tmp_path: Path) -> None:
    with host.instance() as instance, never_asked(instance):
        words = (f"/run/user/{NOBODY}", "VFIO_MIG_LOCK_DIR", "run as root")
        env = {"XDG_RUNTIME_DIR": ""}  # root's, who runs the tests
        image = tmp_path / "gpu.vfm"
        refused("save", instance.uuid, image, "--open", code=7, words=words, user=NOBODY, env=env, warm=True)


def test_who_may_not_see_the_holder_is_not_told_that_there_is_none(guest: Guest, nobody_s: dict[str, str]) -> None:
    with untouched(guest):
        words = (guest.instance.uuid, "run as root")
        # Not in a fork, which would have the device open itself
        text = refused("stop", guest.instance.uuid, code=3, words=words, user=NOBODY, env=nobody_s)
    assert "nobody has it open" not in text


def test_who_may_not_create_an_mdev_is_told_so() -> None:
    before = host.available(host.SMALL)
    refused("mdev", "create", host.SMALL, code=3, words=("EACCES", "run as root"), user=NOBODY, warm=True)
    assert host.available(host.SMALL) == before


# --- the device does not support it


@pytest.mark.parametrize("command", ["save", "restore", "dirty", "stop", "sync"])
def test_a_device_without_the_flag_is_never_sent_a_request_of_the_rfc(
    guest: Guest, command: str, image: bytes, tmp_path: Path
) -> None:
    file, memory = tmp_path / "gpu.vfm", tmp_path / "memory"
    if command == "restore":
        file.write_bytes(image)
    memory.write_bytes(bytes(PAGE))
    rest = [str(file)] if command in {"save", "restore", "sync"} else []
    if command == "sync":
        rest += ["--memory", f"{memory}@0"]
    name = guest.instance.uuid
    with host.parameter_set("migratable", 0), untouched(guest):
        words = (name, "migratable: flag 0x20 in 0x3", "vfio-mig info")
        refused(command, name, *rest, *BORROW, code=4, words=words, warm=command != "restore")
    assert guest.instance.run_state() == "running"
    assert file.exists() == (command == "restore")


def test_a_closed_device_without_the_flag_is_opened_and_closed_again(
    make_instance: MakeInstance, tmp_path: Path
) -> None:
    instance, file = make_instance(), tmp_path / "gpu.vfm"
    with host.parameter_set("migratable", 0), never_asked(instance):
        refused("save", instance.uuid, file, "--open", code=4, warm=True)
    assert not file.exists()
    with Guest.opened(instance):  # which fails while somebody else has it open
        assert instance.run_state() == "running"


def test_a_device_without_the_flag_is_held_reset_and_never_sent_a_request_of_the_rfc(
    make_instance: MakeInstance,
) -> None:
    instance = make_instance()
    with host.parameter_set("migratable", 0), never_asked(instance), held(instance.uuid):
        refused("stop", instance.uuid, code=4, words=("migratable: flag 0x20 in 0x3",), warm=True)
        run("reset", instance.uuid, warm=True)
        assert b"protocol: none" in run("status", instance.uuid, warm=True).stdout


def test_info_shows_the_check_that_fails(guest: Guest) -> None:
    with host.parameter_set("migratable", 0), untouched(guest):
        lines = run("info", guest.instance.uuid, *BORROW, warm=True).stdout.decode().splitlines()
    assert [line for line in lines if line.startswith("NO ")] == ["NO  migratable: flag 0x20 in 0x3"]
    assert lines[-1] == "protocol  none"


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"state_cap_type": 0x80008086}, ("no-region-type", "type 0x80008086 subtype 1", "OpRegion")),
        ({"state_cap_type": 2}, ("no-region-type", "type 0x2 subtype 1", "February 2019")),
        ({"state_cap_type": 3}, ("no-region-type", "type 0x3 subtype 1", "mainline's migration protocol v1")),
        ({"state_cap_type": 0x4711}, ("no-region-type", "type 0x4711 subtype 1")),
        ({"report_pci": 0, "extra_flags": 0x30}, ("pci: device flags 0x31",)),
        ({"report_pci": 0}, ("pci: device flags 0x21",)),
    ],
    ids=["OpRegion", "2019 form", "protocol v1", "unknown type", "flag bits of another bus", "no PCI"],
)
def test_a_device_that_only_looks_like_one_of_the_rfc_is_never_sent_its_requests(
    guest: Guest, knobs: dict[str, int], words: tuple[str, ...], tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        for name, value in knobs.items():
            stack.enter_context(host.parameter_set(name, value))
        stack.enter_context(untouched(guest))
        name = guest.instance.uuid
        refused("save", name, tmp_path / "gpu.vfm", *BORROW, code=4, words=(name, *words), warm=True)
        refused("stop", name, *BORROW, code=4, words=(name, *words), warm=True)
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_of_a_header_decide(guest: Guest, tmp_path: Path) -> None:
    name, header = guest.instance.uuid, tmp_path / "vfio.h"

    def with_header(*args: str, path: str | Path = header) -> tuple[str | Path, ...]:
        return "--uapi-header", path, *args, name, *BORROW

    with untouched(guest):
        refused(*with_header("stop", path=SYSTEM_HEADER), code=2, words=(SYSTEM_HEADER, "does not define"))
        refused(*with_header("stop", path=tmp_path / "none.h"), code=7, words=("none.h", "ENOENT"), warm=True)
        refused(*with_header("stop", path=tmp_path), code=2, words=(str(tmp_path),), warm=True)
        header.write_text("int main(void) { return 0; }\n")
        refused(*with_header("stop"), code=2, words=("VFIO_DEVICE_FLAGS_MIGRATABLE",), warm=True)
        header.write_text(TREE_HEADER.format(flag="1 + 5"))
        refused(*with_header("stop"), code=2, words=("VFIO_DEVICE_FLAGS_MIGRATABLE",), warm=True)
        header.write_text(TREE_HEADER.format(flag=5).replace("+ 14", "+ 11"))
        refused(*with_header("stop"), code=2, words=("VFIO_DEVICE_RESET",), warm=True)
        header.write_text(TREE_HEADER.format(flag=9))
        refused(*with_header("stop"), code=4, words=(name, "flag 0x200 in 0x23"), warm=True)
        environment = {"VFIO_MIG_UAPI_HEADER": str(header)}
        refused("stop", name, *BORROW, code=4, words=("flag 0x200 in 0x23",), env=environment, warm=True)
        header.write_text(TREE_HEADER.format(flag=5))
        run(*with_header("info"), warm=True)
    run(*with_header("stop"), warm=True)  # the header with the right numbers is a good one
    assert guest.instance.run_state() == "stopped"


# --- the image is invalid or does not fit


def _cut(image: bytes, name: str) -> bytes:
    return image[: _content(image, name).start + 1]


def _content(image: bytes, name: str) -> range:
    """Where the content of an archive's member is."""
    with tarfile.open(fileobj=io.BytesIO(image)) as archive:
        member = archive.getmember(name)
        return range(member.offset_data, member.offset_data + member.size)


def _flipped(image: bytes, at: int) -> bytes:
    changed = bytearray(image)
    changed[at] ^= 1
    return bytes(changed)


def _flipped_in(name: str, text: bytes | int) -> Callable[[bytes], bytes]:
    """Flip a bit of a member, after *text* or at an offset."""

    def change(image: bytes) -> bytes:
        content = _content(image, name)
        if isinstance(text, int):
            return _flipped(image, content[text])
        return _flipped(image, image.index(text, content.start, content.stop) + len(text))

    return change


def _bare_state(image: bytes) -> bytes:
    with read_archive(io.BytesIO(image)) as archive:
        return bytes(archive.state())


def _other_tar(_: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("header.json")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"{}"))
    return buffer.getvalue()


def _rewritten(image: bytes, change: Callable[[dict[str, object]], None] = lambda _: None, pages: int = 0) -> bytes:
    """Write a well-formed image anew, with another header or with guest memory from 1 MiB on."""
    buffer = io.BytesIO()
    with read_archive(io.BytesIO(image)) as archive:
        header = {key: value for key, value in archive.header.items() if key not in {"format", "version"}}
        change(header)
        writer = ArchiveWriter(buffer, header)
        writer.add_state(archive.state())
    if pages:
        writer.add_pages([(MIB, b"\x5a" * PAGE * pages)])
    writer.finish()
    return buffer.getvalue()


def _of_protocol(image: bytes) -> bytes:
    return _rewritten(image, lambda header: header.update(protocol="mainline-v2"))


def _with_broken_state(image: bytes) -> bytes:
    """Make a whole archive around a state that is none."""
    buffer = io.BytesIO()
    with read_archive(io.BytesIO(image)) as archive:
        header = {key: value for key, value in archive.header.items() if key not in {"format", "version"}}
        writer = ArchiveWriter(buffer, header)
        writer.add_state(archive.state()[:-8])
    writer.finish()
    return buffer.getvalue()


BAD_IMAGES: Final[dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]]] = {
    "empty": (lambda _: b"", ("cut off at byte 0",)),
    "cut in the first header": (lambda image: image[:100], ("cut off at byte 100",)),
    "cut in header.json": (lambda image: _cut(image, "header.json"), ("header.json", "cut off")),
    "cut in the state": (lambda image: _cut(image, "state/0000"), ("state/0000", "cut off")),
    "cut before the manifest": (
        lambda image: image[: _content(image, "manifest.json").start - 512],
        ("cut off", "save it again"),
    ),
    "cut by a byte": (lambda image: image[:-1], ("cut off",)),
    "a byte too long": (lambda image: image + b"\0", ("behind the end",)),
    "a bit of the state flipped": (_flipped_in("state/0000", 0x2345), ("state/0000", "damaged")),
    "a bit of header.json flipped": (_flipped_in("header.json", b'"kernel":"'), ("header.json", "damaged")),
    "a bit of the bitmap flipped": (_flipped_in("dirty/0000", 5), ("dirty/0000", "damaged")),
    "a bit of the manifest flipped": (_flipped_in("manifest.json", b'"state_bytes":'), ("manifest.json", "damaged")),
    "a bit of a tar header flipped": (
        lambda image: _flipped(image, _content(image, "state/0000").start - 512 + 110),
        ("member header", "damaged"),
    ),
    "a text": (lambda _: b"This is not an image.\n" * 100, ("member header at 0x0",)),
    "a bare state": (_bare_state, ("member header at 0x0",)),
    "another program's tar": (_other_tar, ("of another program",)),
    "of another protocol": (_of_protocol, ("'mainline-v2'", "'gvt-rfc'")),
    "a broken state in a whole archive": (_with_broken_state, ("0x",)),
}


# Found by the one pass over an archive that finds their neighbours, before the device is looked at;
# tests/unit/test_image_archive.py and test_hostile_images.py have all of them, and every block and byte besides
ALIKE: Final = (
    *("cut in the first header", "cut in header.json", "cut before the manifest", "cut by a byte", "a text"),
    *("a bit of header.json flipped", "a bit of the bitmap flipped", "a bit of the manifest flipped"),
    *("a bit of a tar header flipped", "another program's tar"),
)


@pytest.mark.parametrize(
    "what", [pytest.param(one, marks=[pytest.mark.variant] if one in ALIKE else []) for one in BAD_IMAGES]
)
def test_a_bad_image_never_reaches_the_device(guest: Guest, image: bytes, tmp_path: Path, what: str) -> None:
    change, words = BAD_IMAGES[what]
    file = tmp_path / "gpu.vfm"
    file.write_bytes(change(image))
    cold = what == "a bit of the state flipped"
    with unchanged(guest):
        refused("restore", guest.instance.uuid, file, *BORROW, "--start", code=6, words=words, warm=not cold)
    assert guest.instance.run_state() == "running"


def test_a_bad_image_from_a_pipe_never_reaches_the_device(guest: Guest, image: bytes) -> None:
    with unchanged(guest):
        half = image[: len(image) // 2]
        refused("restore", guest.instance.uuid, "-", *BORROW, code=6, words=("cut off",), stdin=half)


@pytest.mark.parametrize("raw", [False, True], ids=["archive", "bare state"])
def test_another_vgpu_type_s_image_never_reaches_the_device(
    make_guest: MakeGuest, image: bytes, tmp_path: Path, *, raw: bool
) -> None:
    guest = make_guest(OTHER_KIND)
    file = tmp_path / "gpu.vfm"
    file.write_bytes(_bare_state(image) if raw else image)
    # a bare state has no name of a type in it, but its graphics memory
    words = ("64 + 384 MiB", "128 + 512 MiB") if raw else (f"gvt_sample-{OTHER_KIND}", f"gvt_sample-{host.SMALL}")
    with unchanged(guest):
        flag = ["--raw"] if raw else []
        refused(
            "restore", guest.instance.uuid, file, *flag, *BORROW, code=6, words=(guest.instance.uuid, *words), warm=True
        )


def test_an_archive_is_no_bare_state(guest: Guest, image: bytes, tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    with unchanged(guest):
        for content in (image, b"", _bare_state(image)[:-1], bytes(0x900000)):
            file.write_bytes(content)
            refused("restore", guest.instance.uuid, file, "--raw", *BORROW, code=6, warm=True)


def test_pages_that_memory_has_no_room_for_are_refused_before_the_device_is_stopped(
    guest: Guest, image: bytes, tmp_path: Path
) -> None:
    file, memory = tmp_path / "gpu.vfm", tmp_path / "memory"
    file.write_bytes(_rewritten(image, pages=2))
    memory.write_bytes(bytes(MIB + PAGE))
    with unchanged(guest):
        refused(
            "restore", guest.instance.uuid, file, "--memory", f"{memory}@0", *BORROW,
            code=6, words=("0x100000", "--memory"), warm=True,
        )  # fmt: skip
    assert memory.read_bytes() == bytes(MIB + PAGE)
    memory.write_bytes(bytes(MIB + 2 * PAGE))
    run("restore", "--force", guest.instance.uuid, file, "--memory", f"{memory}@0", *BORROW, warm=True)
    assert memory.read_bytes() == bytes(MIB) + b"\x5a" * PAGE * 2  # enough memory was all that it lacked


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("none.vfm", 7, ("ENOENT",)), ("", 2, ("not a regular file",)), ("/dev/zero", 2, ("not a regular file",))],
    ids=["missing", "a directory", "a device node"],
)
def test_an_image_that_is_no_file_is_refused(
    guest: Guest, tmp_path: Path, name: str, code: int, words: tuple[str, ...]
) -> None:
    with unchanged(guest):
        file = tmp_path / name
        refused("restore", guest.instance.uuid, file, *BORROW, code=code, words=(str(file), *words), warm=True)


# --- nobody keeps the device open


@pytest.mark.parametrize("command", ["stop", "start"])
def test_what_would_end_with_the_command_is_refused(make_instance: MakeInstance, command: str) -> None:
    instance = make_instance()
    with never_asked(instance):
        refused(
            command,
            instance.uuid,
            code=3,
            words=("nobody has it open", f"vfio-mig hold {instance.uuid}"),
            warm=command != "stop",
        )


# --- the host fails


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"none", bytes(path), b"tmpfs", 0, b"size=1m") == 0, os.strerror(ctypes.get_errno())
    try:
        yield path
    finally:
        assert libc.umount2(bytes(path), 0) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize(
    ("options", "cold"),
    [((), True), (("--leave-running",), False), (("--raw",), False)],
    ids=["left stopped", "left running", "bare state"],
)
def test_a_full_disk_leaves_a_running_device_and_no_file(
    guest: Guest, small_disk: Path, tmp_path: Path, options: tuple[str, ...], *, cold: bool
) -> None:
    name, file = guest.instance.uuid, small_disk / "gpu.vfm"
    before, view = rfc_requests(guest.instance), guest_view(guest)
    refused(
        "save", name, file, *options, *BORROW,
        code=7, words=(str(file), "ENOSPC", "make room"), warm=not cold,
    )  # fmt: skip
    assert list(small_disk.iterdir()) == []
    assert guest.instance.run_state() == "running"
    assert rfc_requests(guest.instance)["status_set"] >= before["status_set"] + 2  # it was stopped and started again
    assert guest_view(guest) == view

    elsewhere = tmp_path / "gpu.vfm"
    run("save", name, elsewhere, *options, *BORROW, warm=True)
    assert elsewhere.stat().st_size > 4 * MIB
    assert guest.instance.run_state() == ("running" if "--leave-running" in options else "stopped")


@pytest.mark.parametrize("options", [(), ("--raw",)], ids=["archive", "bare state"])
def test_a_standard_output_that_takes_nothing_leaves_a_running_device(guest: Guest, options: tuple[str, ...]) -> None:
    refused(
        "save", guest.instance.uuid, "-", *options, *BORROW,
        code=7, words=("standard output", "ENOSPC"), stdout="/dev/full", warm="--raw" in options,
    )  # fmt: skip
    assert guest.instance.run_state() == "running"
    assert rfc_requests(guest.instance)["status_set"] >= 2


def test_a_report_that_cannot_be_written_is_an_error_in_one_line() -> None:
    refused("mdev", "types", code=7, words=("ENOSPC",), stdout="/dev/full")


def test_a_reader_that_has_gone_leaves_a_running_device(guest: Guest) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb"):
        refused(
            "save",
            guest.instance.uuid,
            "-",
            *BORROW,
            code=7,
            words=("standard output", "EPIPE"),
            stdout=f"/proc/self/fd/{write_end}",
        )
    assert guest.instance.run_state() == "running"


# --- the file's name


def test_an_existing_file_is_kept(guest: Guest, tmp_path: Path) -> None:
    file = tmp_path / "gpu.vfm"
    file.write_text("mine")
    with untouched(guest):
        words = (str(file), "exists", "--force")
        refused("save", guest.instance.uuid, file, *BORROW, code=2, words=words, warm=True)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "--force"])
@pytest.mark.parametrize("target", ["something", "nothing"])
def test_a_symbolic_link_is_not_followed(guest: Guest, tmp_path: Path, target: str, force: tuple[str, ...]) -> None:
    link, something = tmp_path / "gpu.vfm", tmp_path / "something"
    something.write_text("mine")
    link.symlink_to(target)
    with untouched(guest):
        words = (str(link), "symbolic link")
        refused("save", guest.instance.uuid, link, *force, *BORROW, code=2, words=words, warm=True)
    assert link.readlink() == Path(target)
    assert something.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [link, something]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("", 2, ("is a directory",)),
        ("none/gpu.vfm", 7, ("ENOENT",)),
        ("file/gpu.vfm", 7, ("ENOTDIR",)),
        ("file/", 2, ()),
        ("g" * 300, 7, ("ENAMETOOLONG",)),
    ],
    ids=["a directory", "no such directory", "below a file", "a slash at the end", "too long"],
)
def test_a_file_that_cannot_be_made_is_refused_before_the_device_is_stopped(
    guest: Guest, tmp_path: Path, name: str, code: int, words: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("mine")
    target = f"{tmp_path}/{name}" if name else str(tmp_path)
    with untouched(guest):
        refused("save", guest.instance.uuid, target, *BORROW, code=code, words=(target, *words), warm=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- the guest's memory


WRONG_MEMORY: Final[dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]]] = {
    "missing": (("{}/none@0",), 7, ("none", "ENOENT")),
    "too small": (("{}/memory@0:2M",), 2, ("has 1048576 bytes",)),
    "too small behind an offset": (("{}/memory@0:4K+1M",), 2, ("has 1048576 bytes",)),
    "no whole pages": (("{}/odd@0",), 2, ("whole pages",)),
    "empty": (("{}/empty@0",), 2, ("has 0 bytes",)),
    "a directory": (("{}@0",), 2, ("not a regular file",)),
    "no address": (("{}/memory",), 2, ("FILE@GPA",)),
    "a broken address": (("{}/memory@0x",), 2, ("'0x'",)),
    "no size": (("{}/memory@0:",), 2, ("FILE@GPA",)),
    "an odd address": (("{}/memory@1",), 2, ("whole pages",)),
    "overlap": (("{}/memory@0", "{}/memory@0xff000"), 2, ("overlap",)),
}


# Refused while the words are read or the file is opened, as their neighbours are: tests/unit/test_cli_parse.py and
# test_dirty_sync.py have all of them
ALIKE_MEMORY: Final = (
    *("no address", "a broken address", "no size", "an odd address"),
    *("too small behind an offset", "no whole pages", "empty", "a directory"),
)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        *(
            pytest.param("save", one, marks=[pytest.mark.variant] if one in ALIKE_MEMORY else [])
            for one in WRONG_MEMORY
        ),
        ("restore", "missing"),
        ("restore", "too small"),
    ],
)
def test_wrong_memory_is_refused_before_the_device_is_stopped(
    guest: Guest, image: bytes, tmp_path: Path, command: str, what: str
) -> None:
    memory, code, words = WRONG_MEMORY[what]
    file = tmp_path / "gpu.vfm"
    if command == "restore":
        file.write_bytes(image)
    for name, size in (("memory", MIB), ("odd", PAGE + 1), ("empty", 0)):
        (tmp_path / name).write_bytes(bytes(size))
    options = [word for text in memory for word in ("--memory", text.format(tmp_path))]
    with untouched(guest):
        refused(command, guest.instance.uuid, file, *options, *BORROW, code=code, words=words, warm=True)
    assert guest.instance.run_state() == "running"
    assert file.exists() == (command == "restore")


# --- mdevs, reset


def test_an_mdev_in_use_is_not_removed(guest: Guest) -> None:
    with untouched(guest):
        refused("mdev", "remove", guest.instance.uuid, code=3, words=(guest.instance.uuid, f"PID {ME}"))
    assert guest.instance.sysfs.exists()


@pytest.mark.parametrize(
    ("kind", "name", "code", "words"),
    [
        ("GVTg_V4_3", None, 3, ("'GVTg_V4_3'", "vfio-mig mdev types")),
        (host.SMALL, "EXISTING", 5, ("EEXIST", "exists")),
        (host.SMALL, "gpu-1", 2, ("'gpu-1' is not a UUID",)),
    ],
    ids=["an unknown type", "a UUID in use", "no UUID"],
)
def test_an_mdev_that_cannot_be_is_not_created(
    make_instance: MakeInstance, kind: str, name: str | None, code: int, words: tuple[str, ...]
) -> None:
    instance = make_instance()
    before = host.available(host.SMALL)
    chosen = [] if name is None else [instance.uuid if name == "EXISTING" else name]
    refused("mdev", "create", kind, *chosen, code=code, words=words, warm=True)
    assert host.available(host.SMALL) == before
    assert [path.name for path in Path("/sys/bus/mdev/devices").iterdir()] == [instance.uuid]


def test_a_parent_without_room_creates_nothing(make_instance: MakeInstance) -> None:
    largest = "GVTg_V4_1"
    while host.available(largest):
        make_instance(largest)
    before = sorted(Path("/sys/bus/mdev/devices").iterdir())
    refused("mdev", "create", largest, code=5, words=("no room",), warm=True)
    assert sorted(Path("/sys/bus/mdev/devices").iterdir()) == before


def test_another_process_s_device_is_reset_by_force_only(guest: Guest) -> None:
    register, name = gpu.RING_BASE[gpu.RCS] + gpu.RING_GPR, guest.instance.uuid
    guest.device.set_reg(register, 0x5EED)
    with unchanged(guest):
        refused("reset", name, code=2, words=(name, f"PID {ME}", "--force"))
        refused("reset", name, *BORROW, code=2, words=(name, f"PID {ME}", "--force"), warm=True)
    assert guest.device.reg(register) == 0x5EED
    run("reset", name, "--force", warm=True)  # as the refusal says
    assert guest.device.reg(register) == 0
