# SPDX-License-Identifier: MIT
"""Dirty pages of devices that keep no log: iommufd's mock IOMMU (CONFIG_IOMMUFD_TEST), and a real container."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tools.lab import cli, mtty
from tools.lab.sample import host
from tools.lab.sample.guest import Guest
from tools.lab.vfio.raw import Device
from tools.lab.vfio.raw import Memory as GuestRam
from vfio_mig import uapi
from vfio_mig.errors import DeviceError, UnsupportedError
from vfio_mig.host.discover import Host
from vfio_mig.host.dma import ContainerDma, IommufdDma
from vfio_mig.host.iommufd import Iommufd
from vfio_mig.host.opening import open_device
from vfio_mig.host.tracking import ContainerTracker, IommuTracker, find_tracker
from vfio_mig.uapi import IoctlError

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = 4096
# drivers/iommu/iommufd/iommufd_test.h
TEST_CMD: Final = 0x3BA0
OP_MOCK_DOMAIN_REPLACE, OP_MOCK_DOMAIN_FLAGS, OP_DIRTY = 10, 12, 13
NO_DIRTY: Final = 1
HEAD: Final = struct.Struct("=IIII")  # iommu_test_cmd: size, op, id; then a union of 48 bytes, and the last field
UNION_AND_LAST: Final = 48 + 8
MOCK_DOMAIN: Final = struct.Struct("=IIII")  # mock_domain_flags: out_stdev_id, out_hwpt_id, out_idev_id, dev_flags
DIRTY: Final = struct.Struct("=IIQQQQQ")  # dirty: flags, iova, length, page_size, uptr, out_nr_dirty
START: Final = 1 << 24  # MOCK_APERTURE_START
IO_PAGE: Final = 2048  # of the mock IOMMU: half a page
PIECES: Final = ((START, 64 * PAGE), (START + 128 * PAGE, 100 * PAGE))


class Ram(NamedTuple):
    """Anonymous guest memory."""

    mapping: mmap.mmap
    gpa: int
    size: int

    def map(self) -> mmap.mmap:
        return self.mapping


class Mock:
    """An iommufd with a mock device behind a mock IOMMU, and memory mapped in two pieces with a hole between them."""

    def __init__(self, flags: int = 0) -> None:
        self.iommufd: Final = Iommufd()
        self.ioas: Final = self.iommufd.alloc_ioas()
        self.ram: Final = [Ram(mmap.mmap(-1, size), iova, size) for iova, size in PIECES]
        reply = self._command(OP_MOCK_DOMAIN_FLAGS, self.ioas, MOCK_DOMAIN.pack(0, 0, 0, flags))
        self._mock_device, _, self.device, _ = MOCK_DOMAIN.unpack_from(reply)
        for piece in self.ram:
            self.iommufd.map(self.ioas, piece)

    def _command(self, op: int, number: int, arguments: bytes) -> bytes:
        """Do one test operation; returns the arguments as the kernel has changed them."""
        head = HEAD.pack(HEAD.size + UNION_AND_LAST, op, number, 0)
        request = bytearray(head + arguments.ljust(UNION_AND_LAST, b"\0"))
        fcntl.ioctl(self.iommufd.fileno(), TEST_CMD, request, True)
        return bytes(request[HEAD.size :])

    def attach(self, hwpt: int) -> None:
        self._command(OP_MOCK_DOMAIN_REPLACE, self._mock_device, struct.pack("=I", hwpt))

    def write(self, hwpt: int, *pages: int) -> None:
        """Have the mock device write to pages, counted from IOVA 0."""
        for page in pages:
            bitmap = bytearray(b"\1" + bytes(7))
            where = uapi.address_of(bitmap)
            reply = self._command(OP_DIRTY, hwpt, DIRTY.pack(0, 0, page * PAGE, IO_PAGE, IO_PAGE, where, 0))
            assert DIRTY.unpack_from(reply)[-1] == 1  # out_nr_dirty: it was mapped

    def close(self) -> None:
        self.iommufd.close()


@pytest.fixture
def mock() -> Iterator[Mock]:
    made = Mock()
    yield made
    made.close()


class Tracked(NamedTuple):
    mock: Mock
    hwpt: int
    tracker: IommuTracker

    def write(self, *pages: int) -> None:
        self.mock.write(self.hwpt, *pages)

    def dirty(self, start: int, number: int) -> set[int]:
        return bits(self.tracker.fetch(start, number), start)


@pytest.fixture
def tracked(mock: Mock) -> Tracked:
    assert mock.iommufd.can_track(mock.device)
    hwpt = mock.iommufd.alloc_tracking(mock.device, mock.ioas)
    mock.attach(hwpt)
    return Tracked(mock, hwpt, IommuTracker("mock", IommufdDma(mock.iommufd, hwpt, "", PIECES), hwpt))


def bits(bitmap: memoryview, start: int) -> set[int]:
    return {start + at for at in range(8 * len(bitmap)) if bitmap[at // 8] >> at % 8 & 1}


FIRST: Final = START // PAGE
SECOND: Final = FIRST + 128


@pytest.mark.custom
def test_the_iommu_tells_written_pages_once(tracked: Tracked) -> None:
    tracked.tracker.start([(START, 1 << 20)])
    assert tracked.dirty(FIRST, 64) == set()
    written = {FIRST, FIRST + 3, FIRST + 63, SECOND, SECOND + 99}
    tracked.write(*written)
    assert tracked.dirty(FIRST, 256) == written
    assert tracked.dirty(FIRST, 256) == set()
    tracked.write(FIRST + 9)
    assert tracked.dirty(FIRST, 8) == set()
    assert tracked.dirty(FIRST + 5, 7) == {FIRST + 9}  # neither starts nor ends at a whole byte
    tracked.tracker.stop()


@pytest.mark.custom
def test_pages_that_are_not_mapped_are_clean_and_cost_nothing_of_the_others(tracked: Tracked) -> None:
    tracked.tracker.start()
    tracked.write(FIRST + 60, SECOND + 2)
    assert tracked.dirty(0, FIRST) == set()
    assert tracked.dirty(FIRST + 64, 64) == set()
    assert len(tracked.tracker.fetch(SECOND + 100, 33)) == 5
    assert tracked.dirty(FIRST + 50, 200) == {FIRST + 60, SECOND + 2}


@pytest.mark.custom
def test_a_second_start_drops_nothing(tracked: Tracked) -> None:
    tracked.tracker.start()
    tracked.write(FIRST + 1)
    tracked.tracker.start()
    assert tracked.dirty(FIRST, 64) == {FIRST + 1}
    # what the kernel would have done
    tracked.write(FIRST + 2)
    tracked.mock.iommufd.set_tracking(tracked.hwpt, enabled=True)
    assert tracked.dirty(FIRST, 64) == set()


@pytest.mark.custom
def test_what_is_not_tracked_is_not_taken_for_clean(tracked: Tracked) -> None:
    with pytest.raises(ValueError, match="not started"):
        tracked.tracker.fetch(FIRST, 1)
    tracked.tracker.start()
    tracked.tracker.stop()
    tracked.tracker.stop()
    with pytest.raises(ValueError, match="not started"):
        tracked.tracker.fetch(FIRST, 1)


@pytest.mark.custom
def test_a_device_whose_iommu_cannot_track_says_so(mock: Mock) -> None:
    other = Mock(NO_DIRTY)
    try:
        assert not other.iommufd.can_track(other.device)
        with pytest.raises(IoctlError, match="IOMMU_HWPT_ALLOC failed"):
            other.iommufd.alloc_tracking(other.device, other.ioas)
    finally:
        other.close()
    plain = IommuTracker("mock", IommufdDma(mock.iommufd, None, "", PIECES), mock.ioas)
    with pytest.raises(DeviceError, match="mock: tracking its writes: IOMMU_HWPT_SET_DIRTY_TRACKING failed: ENOENT"):
        plain.start()
    with pytest.raises(IoctlError, match="IOMMU_GET_HW_INFO failed: ENOENT"):
        mock.iommufd.can_track(0xBAD)


def ram_of(memory: GuestRam) -> Ram:
    return Ram(memory.bytes, memory.iova, memory.size)


@pytest.mark.custom
def test_an_mdev_on_an_iommufd_has_no_iommu_to_ask() -> None:
    with host.instance() as vgpu:
        memory = GuestRam(0, 16)
        with open_device(Host().find(vgpu.uuid), memory=[ram_of(memory)]) as device:
            assert device.how == "cdev"
            with pytest.raises(UnsupportedError, match="no log of its writes, and there is no IOMMU in front of it"):
                find_tracker(device)


def test_a_container_tells_the_pages_that_a_driver_has_pinned() -> None:
    low, high = GuestRam(0, 64), GuestRam(100 * PAGE, 28)
    with host.instance() as vgpu:
        found = Host().find(vgpu.uuid)
        with open_device(found, memory=[ram_of(low), ram_of(high)], via="group") as device:
            tracker = find_tracker(device)
            assert isinstance(tracker, ContainerTracker)
            assert "every mapped page" in tracker.caution
            tracker.start()
            guest = Guest(vgpu, None, low, Device(os.dup(device.fileno()), vgpu.uuid))
            bound = {guest.bind()[1] // PAGE for _ in range(3)}
            pinned = {iova // PAGE for iova in vgpu.pinned()}
            assert bound <= pinned
            # not whole mappings, which is all that the kernel answers for
            half = max(bound) + 1
            dirty = bits(tracker.fetch(0, half), 0) | bits(tracker.fetch(half, 128 - half), half)
            assert dirty == pinned
            assert bits(tracker.fetch(64, 64), 64) == set()
            tracker.stop()
            guest.device.close()
        with open_device(found, via="group") as device, pytest.raises(UnsupportedError, match="no memory was mapped"):
            find_tracker(device)


@pytest.mark.mtty
def test_a_device_whose_log_the_kernel_cannot_read_is_tracked_by_its_container(tmp_path: Path) -> None:
    """Debian's kernel cannot report what mtty logs; mtty pins nothing. Nobody has it open but the command."""
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(16 * PAGE))
    name = str(uuid.uuid4())
    (mtty.TYPES / "mtty-2" / "create").write_text(name)
    try:
        arguments = ["--json", "--via", "group", "dirty", name, "--memory", f"{memory}@0", "--for", "0"]
        done = cli.run(*arguments, warm=True)
        assert json.loads(done.stdout)["pages_dirty"] == 0
        cannot_report = not Path("/dev/iommu").exists()
        assert (b"every mapped page counts as dirty" in done.stderr) == cannot_report
        saved = json.loads(
            cli.run(
                *arguments[:3], "save", name, tmp_path / "image", *arguments[5:7], "--open", "--all-memory", warm=True
            ).stdout
        )
        assert (saved["state_bytes"], saved["pages_zero"], saved["state"]) == (96, 16, "closed")
    finally:
        (Path("/sys/bus/mdev/devices") / name / "remove").write_text("1")


def test_a_container_that_does_not_track_refuses() -> None:
    with host.instance() as vgpu:
        memory = GuestRam(0, 16)
        with open_device(Host().find(vgpu.uuid), memory=[ram_of(memory)], via="group") as device:
            assert isinstance(device.dma, ContainerDma)
            tracker = ContainerTracker(vgpu.uuid, device.dma._replace(fd=device.fileno()))
            with pytest.raises(DeviceError, match=f"{vgpu.uuid}: tracking its writes: VFIO_IOMMU_DIRTY_PAGES failed"):
                tracker.start()
