# SPDX-License-Identifier: MIT
"""The sample driver's v2 migration by raw ioctls: states, data fds, PRE_COPY, streams that lie, DMA logging.

Never ask a driver for PRE_COPY in STOP_COPY but this one, which refuses: there are kernels that never return.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import resource
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab.sample import gpu, host
from tools.lab.sample.guest import Guest
from tools.lab.sample.v2 import V2
from tools.lab.vfio.raw import DEVICE_RESET, FLAG_MIGRATABLE, PAGE, fails
from tools.lab.vfio.v2 import (
    DATA_SIZE,
    DEVICE_FEATURE,
    DEVICE_STATE,
    ERROR,
    GET,
    HAS_PRE_COPY,
    KERNEL,
    LOG_START,
    LOG_STOP,
    MIGRATION,
    NAMES,
    PRE_COPY,
    PRE_COPY_P2P,
    PRECOPY_INFO,
    PROBE,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SAVING,
    SET,
    STATES,
    STOP,
    STOP_COPY,
    precopy_info,
    read_all,
    read_now,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.vm.conftest import MakeGuest, MakeInstance

HEADER: Final = struct.Struct("<QII16sQQQQ")  # magic, version, flags, type, total, filler, seed, check
RECORD: Final = struct.Struct("<IIQ")  # type, bytes, number
DIRTY: Final = 1
IMAGE: Final = 2
pre_copy = pytest.mark.skipif(not HAS_PRE_COPY, reason="PRE_COPY is of Linux 6.2")
MAGIC: Final = int.from_bytes(b"gvt_v2", "little")


@pytest.fixture(scope="module", autouse=True)
def v2_driver() -> Iterator[None]:
    if not host.module_loaded():  # not in the VM: every test says so
        yield
        return
    with host.loaded(v2=7):
        yield


def filler(seed: int, words: int) -> bytes:
    """Compute the first words of the sequence that a seed stands for."""
    mask = (1 << 64) - 1
    values = []
    for index in range(words):
        word = (seed + index * 0x9E3779B97F4A7C15) & mask
        word = (word ^ word >> 32) * 0xD6E8FEB86659FD93 & mask
        values.append(word ^ word >> 32)
    return struct.pack(f"<{words}Q", *values)


@pytest.fixture
def vgpu(guest: Guest) -> V2:
    return V2(guest)


@pytest.fixture
def target(vgpu: V2, make_guest: MakeGuest) -> V2:  # noqa: ARG001  # made after it
    """Give a second vGPU, hence one with other host bases."""
    return V2(make_guest())


def occupy(guest: Guest) -> int:
    """Put something into every record of the image, with queued work; where that writes 7."""
    guest.device.stop()
    engine = gpu.Engine(guest)
    gma, iova = guest.bind(2)
    guest.bind(high=True)
    guest.device.set_fence(2, 0x1001, 0x5000)
    guest.device.set_reg(0x5000, 0x12345678)
    guest.device.make_ppgtt(3, [0x1000, 0x2000, 0x3000, 0x4000])
    engine.submit(engine.context(gpu.store_dword(gma, 7)))
    return iova


def runs(guest: Guest) -> bool:
    return guest.instance.run_state() == "running"


# --- what is offered


def test_v2_is_there_as_the_parameter_says_with_or_without_the_rfc(make_guest: MakeGuest) -> None:
    expected = 7 if HAS_PRE_COPY else 3
    with host.parameter_set("migratable", 0):
        both = V2(make_guest())
        assert not both.guest.device.info()[0] & FLAG_MIGRATABLE
    assert both.guest.device.info()[0] & FLAG_MIGRATABLE
    assert both.flags() == expected
    assert both.state() == RUNNING
    both.feature(PROBE | GET | MIGRATION)
    both.feature(PROBE | GET | SET | DEVICE_STATE)
    fails(errno.EINVAL, both.feature, GET | DEVICE_STATE, bytes(8), 12)
    for asked, given in ((1, 1), (2, 3), (3, 3), (4, 5 if HAS_PRE_COPY else 1), (8, 1), (0xF, expected)):
        with host.parameter_set("v2", asked), host.instance() as instance, Guest.opened(instance) as guest:
            assert V2(guest).flags() == given
    with host.parameter_set("v2", 0), host.instance() as instance, Guest.opened(instance) as guest:
        none = V2(guest)
        for flags in (GET | MIGRATION, GET | DEVICE_STATE, SET | DEVICE_STATE, GET | DATA_SIZE, PROBE | LOG_START):
            with pytest.raises(OSError) as caught:
                none.feature(flags, bytes(8))
            assert caught.value.errno in {errno.ENOTTY, errno.EINVAL}
        assert not list(instance.debugfs.glob("v2_*"))
        guest.device.stop()
        guest.device.start()


def test_a_device_without_p2p_and_pre_copy_has_the_short_arcs_only(make_guest: MakeGuest) -> None:
    with host.parameter_set("v2", 1):
        vgpu = V2(make_guest())
    for state in (RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, ERROR, 8, 0xFFFFFFFF):
        fails(errno.EINVAL, vgpu.go, state)
        assert vgpu.state() == RUNNING
    for state in (STOP, RUNNING):
        assert vgpu.go(state) == -1
        assert runs(vgpu.guest) == (state == RUNNING)
    stream = vgpu.save()
    vgpu.load(stream)
    assert vgpu.save() == stream


@pre_copy
def test_pre_copy_without_p2p_stops_the_device_on_the_way_to_stop_copy(make_guest: MakeGuest) -> None:
    with host.parameter_set("v2", 5):
        vgpu, target = V2(make_guest()), V2(make_guest())
    with vgpu.session(PRE_COPY) as fd:
        assert runs(vgpu.guest)
        stream = read_now(fd)
        assert vgpu.go(STOP_COPY) == -1
        assert not runs(vgpu.guest)
        stream += read_all(fd)
    target.load(stream)
    assert target.guest.device.save() == vgpu.guest.device.save()


# --- states


def bring_to(vgpu: V2, state: int, stream: bytes) -> int:
    """Bring a vGPU that was reset to *state*; in RESUMING it has got a whole state."""
    fd = vgpu.go(state)
    if state == RESUMING:
        write_all(fd, stream)
    return fd


@pytest.mark.parametrize("source", STATES, ids=lambda state: NAMES[state])
def test_every_arc_ends_in_its_state_with_a_data_fd_where_one_begins(vgpu: V2, source: int) -> None:
    vgpu.set_knob("v2_extra_bytes", 5000)
    stream = vgpu.save()
    for target in STATES:
        vgpu.guest.device.reset()
        before = bring_to(vgpu, source, stream)
        assert vgpu.state() == source
        assert runs(vgpu.guest) == (source in (RUNNING, PRE_COPY))
        if source == STOP_COPY and target in (PRE_COPY, PRE_COPY_P2P):
            fails(errno.EINVAL, vgpu.go, target)
            assert vgpu.state() == source
            after = -1
        else:
            after = vgpu.go(target)
            assert vgpu.state() == target
            assert runs(vgpu.guest) == (target in (RUNNING, PRE_COPY))
        goes_on = source == target or (source in SAVING and target in SAVING)
        assert (after >= 0) == (target in (*SAVING, RESUMING) and not goes_on)
        if before >= 0:
            if not goes_on:
                fails(
                    errno.ENODEV, os.write if source == RESUMING else os.read, before, b"" if source == RESUMING else 1
                )
            elif source != RESUMING:
                assert os.read(before, 8) == stream[:8]
        for fd in (before, after):
            if fd >= 0:
                os.close(fd)


def test_a_state_that_is_none_is_refused_and_changes_nothing(vgpu: V2) -> None:
    with vgpu.session(STOP_COPY) as fd:
        for state in (ERROR, 8, 1 << 31, 0xFFFFFFFF):
            fails(errno.EINVAL, vgpu.go, state)
            assert vgpu.state() == STOP_COPY
        assert len(read_all(fd)) > 4 << 20


def test_in_a_p2p_state_the_vgpu_begins_nothing(vgpu: V2) -> None:
    engine = gpu.Engine(vgpu.guest)
    gma, iova = vgpu.guest.bind()
    before = vgpu.guest.instance.counters()
    vgpu.go(RUNNING_P2P)
    engine.submit(engine.context(gpu.store_dword(gma, 5)))
    assert len(vgpu.guest.instance.queue()) == 1
    vgpu.go(STOP)
    vgpu.go(RUNNING_P2P)
    assert vgpu.guest.memory.u32(iova) == 0
    vgpu.go(RUNNING)
    gpu.wait_ended(vgpu.guest, before, 1)
    assert vgpu.guest.memory.u32(iova) == 5


def test_the_rfc_and_v2_move_one_run_state(vgpu: V2) -> None:
    device = vgpu.guest.device
    for _ in range(2):
        device.stop()
        assert vgpu.state() == STOP
    for _ in range(2):
        device.start()
        assert vgpu.state() == RUNNING
    vgpu.go(STOP)
    device.start()
    vgpu.go(RUNNING_P2P)
    device.start()
    assert vgpu.state() == RUNNING
    vgpu.go(RUNNING_P2P)
    device.stop()
    assert vgpu.state() == STOP
    for state in (STOP_COPY, RESUMING, *((PRE_COPY,) if HAS_PRE_COPY else ())):
        with vgpu.session(state):
            for change in (device.start, device.stop):
                fails(errno.EBUSY, change)
            assert vgpu.state() == state
            assert NAMES[state] in vgpu.guest.instance.last_error()
        device.reset()
    assert runs(vgpu.guest)


def test_a_reset_brings_every_state_to_running_and_ends_the_session(vgpu: V2) -> None:
    for state in STATES:
        fd = vgpu.go(state)
        vgpu.guest.device.reset()
        assert vgpu.state() == RUNNING
        assert runs(vgpu.guest)
        if state == RESUMING:
            fails(errno.ENODEV, os.write, fd, b"x")
        elif fd >= 0:
            fails(errno.ENODEV, os.read, fd, 1)
        if fd >= 0:
            os.close(fd)


def test_closing_in_any_state_ends_the_session_and_the_next_user_finds_it_running(make_instance: MakeInstance) -> None:
    one = make_instance()
    for state in (*STATES, ERROR):
        with Guest.opened(one) as guest:
            vgpu = V2(guest)
            assert vgpu.state() == RUNNING
            fd = vgpu.go(RESUMING if state == ERROR else state)
            if state == ERROR:
                fails(errno.EINVAL, vgpu.go, STOP)
            assert vgpu.state() == state
        if fd >= 0:
            with pytest.raises(OSError) as caught:
                os.write(fd, b"x") if state in (RESUMING, ERROR) else os.read(fd, 1)
            assert caught.value.errno == errno.ENODEV
            if state in SAVING:
                with pytest.raises(OSError) as caught:
                    precopy_info(fd)
                assert caught.value.errno == errno.ENODEV
            os.close(fd)


def test_a_data_fd_may_outlive_its_vgpu_which_gives_its_room_back() -> None:
    one = host.create()
    free = host.available(host.SMALL)
    with Guest.opened(one) as guest:
        fd = V2(guest).go(STOP_COPY)
    one.remove()
    assert host.available(host.SMALL) == free + 1
    fails(errno.ENODEV, os.read, fd, 1)
    os.close(fd)


def test_without_a_free_fd_the_state_changes_and_the_session_has_none(vgpu: V2) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    for state in (STOP_COPY, RESUMING):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            fails(errno.EMFILE, vgpu.go, state)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert vgpu.state() == state
        vgpu.guest.device.reset()
    assert len(vgpu.save()) > 4 << 20


# --- a state, there and back


def test_a_stream_is_a_header_filler_and_the_rfc_s_image(vgpu: V2) -> None:
    vgpu.set_knob("v2_extra_bytes", 1003)
    expected = HEADER.size + 1003 + RECORD.size
    occupy(vgpu.guest)
    stream = vgpu.save()
    image = vgpu.guest.device.save()
    magic, version, flags, kind, total, extra, seed, check = HEADER.unpack_from(stream)
    assert (magic, version, flags, kind, check) == (MAGIC, 1, 0, b"GVTg_V4_8".ljust(16, b"\0"), 0)
    assert (total, extra) == (len(stream), 1003)
    assert stream[HEADER.size :][:1003] == filler(seed, 126)[:1003]
    assert RECORD.unpack_from(stream, HEADER.size + 1003) == (IMAGE, len(image), 0)
    assert stream[expected:] == image


@pytest.mark.parametrize(("extra", "chunk"), [(0, 1 << 20), (70001, 4099), (1 << 20, 1 << 16)])
def test_a_state_goes_to_a_vgpu_with_other_bases(vgpu: V2, target: V2, extra: int, chunk: int) -> None:
    vgpu.set_knob("v2_extra_bytes", extra)
    source, other = vgpu.guest, target.guest
    iova = occupy(source)
    size = vgpu.data_size() if HAS_PRE_COPY else None  # also of Linux 6.2
    stream = vgpu.save(chunk)
    assert size in {None, len(stream)}
    image = source.device.save()
    before = other.device.save()
    with target.session(RESUMING) as fd:
        write_all(fd, stream, chunk)
        assert other.device.save() == before  # nothing of it is there before RESUMING is left
        assert target.go(STOP) == -1
    assert other.device.save() == image
    assert target.save() == stream  # filler and all
    assert target.knob("v2_extra_bytes") == extra
    assert other.instance.hw_ggtt() == source.instance.hw_ggtt()
    assert other.instance.hw_fence() != source.instance.hw_fence()
    assert other.instance.layout().host_low != source.instance.layout().host_low
    assert len(other.instance.queue()) == 1
    other.memory.bytes[:] = source.memory.bytes[:]
    counters = other.instance.counters()
    target.go(RUNNING)
    gpu.wait_ended(other, counters, 1)
    assert other.memory.u32(iova) == 7
    assert source.memory.u32(iova) == 0


def test_a_stream_in_single_bytes_is_as_good(vgpu: V2, target: V2) -> None:
    vgpu.set_knob("v2_extra_bytes", 100)
    with vgpu.session(STOP_COPY) as fd:
        head = b"".join(os.read(fd, 1) for _ in range(200))
        stream = head + read_all(fd)
    with target.session(RESUMING) as fd:
        for at in range(200):
            assert os.write(fd, stream[at : at + 1]) == 1
        write_all(fd, stream[200:-1])
        assert os.write(fd, stream[-1:]) == 1
        target.go(STOP)
    assert target.save() == stream


def test_an_image_too_large_for_the_rfc_s_region_is_none_for_v2(make_guest: MakeGuest) -> None:
    guest = make_guest("GVTg_V4_1")
    vgpu = V2(guest)
    fails(errno.EFAULT, guest.device.save)
    guest.device.set_reg(0x5000, 0x1234)
    stream = vgpu.save()
    assert len(stream) > 9 << 20
    guest.device.reset()
    vgpu.load(stream)
    assert guest.device.reg(0x5000) == 0x1234


def test_a_large_state_takes_no_memory(vgpu: V2, target: V2) -> None:
    def available() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) >> 10

    extra = 96 << 20
    vgpu.set_knob("v2_extra_bytes", extra)
    total, least, before = 0, 1 << 30, available()
    with vgpu.session(STOP_COPY) as source, target.session(RESUMING) as sink:
        while part := os.read(source, 1 << 20):
            write_all(sink, part)
            total += len(part)
            if total % (8 << 20) == 0:
                least = min(least, available())
        target.go(STOP)
    assert total > extra
    assert before - least < 48
    assert target.guest.device.save() == vgpu.guest.device.save()


def test_the_filler_may_have_4_gib_and_no_more(vgpu: V2) -> None:
    small = vgpu.data_size() if HAS_PRE_COPY else 0
    fails(errno.EINVAL, vgpu.set_knob, "v2_extra_bytes", (1 << 32) + 1)
    vgpu.set_knob("v2_extra_bytes", 1 << 32)
    if HAS_PRE_COPY:
        assert vgpu.data_size() == small + (1 << 32)
    with vgpu.session(STOP_COPY) as fd:
        header = HEADER.unpack(os.read(fd, HEADER.size))
        assert header[5] == 1 << 32
        assert os.read(fd, 800) == filler(header[6], 100)
    with host.parameter_set("v2_extra_bytes", 4096), host.instance() as one:
        assert (one.debugfs / "v2_extra_bytes").read_text() == "4096\n"
    fails(errno.EINVAL, vgpu.set_knob, "v2_dirty_rate", (1 << 40) + 1)


# --- PRE_COPY


@pre_copy
def test_pre_copy_gives_header_and_filler_and_converges_at_once_when_nothing_is_dirtied(vgpu: V2, target: V2) -> None:
    vgpu.set_knob("v2_extra_bytes", 100_000)
    with vgpu.session(PRE_COPY) as fd:
        assert precopy_info(fd) == (HEADER.size + 100_000, 0)
        assert vgpu.data_size() > 4 << 20
        stream = os.read(fd, 1000)
        assert precopy_info(fd) == (HEADER.size + 100_000 - 1000, 0)
        stream += read_now(fd)
        assert precopy_info(fd) == (0, 0)
        assert len(stream) == HEADER.size + 100_000
        fails(errno.ENOMSG, os.read, fd, 1)
        vgpu.guest.device.set_reg(0x5000, 0xBEEF)  # it runs until it is stopped
        assert vgpu.go(PRE_COPY_P2P) == -1
        assert precopy_info(fd) == (0, 0)
        size = vgpu.data_size()
        assert vgpu.go(STOP_COPY) == -1
        fails(errno.EINVAL, precopy_info, fd)
        final = read_all(fd)
        assert len(final) == size
        assert os.read(fd, 1) == b""
        assert vgpu.data_size() == 0
    assert HEADER.unpack_from(stream)[2:5:2] == (1, 0)
    target.load(stream + final)
    assert target.guest.device.reg(0x5000) == 0xBEEF
    assert target.guest.device.save() == vgpu.guest.device.save()


@pre_copy
def test_dirty_bytes_grow_at_their_rate_and_reading_takes_them_away(vgpu: V2) -> None:
    rate = 400_000
    vgpu.set_knob("v2_extra_bytes", 4 << 20)
    with vgpu.session(PRE_COPY) as fd:
        assert len(read_now(fd)) == HEADER.size + (4 << 20)
        began = time.monotonic()
        vgpu.set_knob("v2_dirty_rate", rate)
        time.sleep(0.5)
        _, dirty = precopy_info(fd)
        elapsed = time.monotonic() - began
        assert 0.4 * rate < dirty <= elapsed * rate
        assert dirty % PAGE == 0
        vgpu.set_knob("v2_dirty_rate", 0)
        assert precopy_info(fd)[1] >= dirty
        dirty = precopy_info(fd)[1]
        assert RECORD.unpack(os.read(fd, RECORD.size)) == (DIRTY, PAGE - RECORD.size, 0)
        assert precopy_info(fd) == (0, dirty - RECORD.size)
        os.read(fd, 1000)
        assert precopy_info(fd) == (0, dirty - RECORD.size - 1000)
        assert len(read_now(fd)) == dirty - RECORD.size - 1000
        assert precopy_info(fd) == (0, 0)


@pre_copy
def test_a_live_save_converges_or_not_as_the_rate_asks(vgpu: V2, target: V2) -> None:
    extra = 1 << 20
    vgpu.set_knob("v2_extra_bytes", extra)
    vgpu.set_knob("v2_dirty_rate", 1 << 40)
    with vgpu.session(PRE_COPY) as fd:
        assert precopy_info(fd)[1] <= 1 << 16  # of what was not sent nothing is dirty
        stream = os.read(fd, HEADER.size + extra)
        for _ in range(3):
            assert precopy_info(fd) == (0, extra)  # all of it, again and again
            stream += os.read(fd, extra)
        vgpu.set_knob("v2_dirty_rate", 2_000_000)
        rounds = 0
        while (left := precopy_info(fd)[1]) > 256 << 10:
            stream += os.read(fd, left)
            rounds += 1
            assert rounds < 50
        assert vgpu.go(PRE_COPY_P2P) == -1
        left = precopy_info(fd)[1]
        time.sleep(0.1)
        assert precopy_info(fd)[1] == left  # it stands still
        vgpu.go(PRE_COPY)
        time.sleep(0.1)
        vgpu.go(PRE_COPY_P2P)
        assert precopy_info(fd)[1] > left
        left = precopy_info(fd)[1]
        vgpu.go(STOP_COPY)
        size = vgpu.data_size()
        final = read_all(fd)
        assert len(final) == size == left + RECORD.size + len(vgpu.guest.device.save())
        stream += final
    at, kind, numbers = HEADER.size + extra, 0, []
    while at < len(stream):
        kind, length, number = RECORD.unpack_from(stream, at)
        numbers.append(number)
        at += RECORD.size + length
    assert numbers == list(range(len(numbers)))
    assert kind == IMAGE
    target.load(stream, 12345)
    assert target.guest.device.save() == vgpu.guest.device.save()


@pre_copy
def test_a_live_save_that_is_called_off_leaves_the_device_running(vgpu: V2) -> None:
    with vgpu.session(PRE_COPY) as fd:
        os.read(fd, 10)
        vgpu.go(RUNNING)
        assert runs(vgpu.guest)
        fails(errno.ENODEV, os.read, fd, 1)
        fails(errno.ENODEV, precopy_info, fd)
    with vgpu.session(RUNNING_P2P + 2) as fd:
        assert vgpu.state() == PRE_COPY_P2P
        os.read(fd, 10)
        vgpu.go(RUNNING_P2P)
        assert not runs(vgpu.guest)
        fails(errno.ENODEV, os.read, fd, 1)


# --- streams that lie


def observed(guest: Guest) -> tuple[object, ...]:
    """Everything that a stream may change."""
    one = guest.instance
    knob = (one.debugfs / "v2_extra_bytes").read_text()
    return guest.device.save(), one.hw_ggtt().tobytes(), one.hw_fence(), one.queue(), one.run_state(), knob


def changed(stream: bytes, **fields: int | bytes) -> bytes:
    names = ("magic", "version", "flags", "kind", "total", "extra", "seed", "check")
    values = [fields.get(name, value) for name, value in zip(names, HEADER.unpack_from(stream), strict=True)]
    return HEADER.pack(*values) + stream[HEADER.size :]


def patched(stream: bytes, at: int, data: bytes) -> bytes:
    return stream[:at] + data + stream[at + len(data) :]


EXTRA: Final = 3000
RECORD_AT: Final = HEADER.size + EXTRA
IMAGE_AT: Final = RECORD_AT + RECORD.size
LIES: Final[dict[str, tuple[Callable[[bytes], bytes], int]]] = {
    "magic": (lambda s: changed(s, magic=MAGIC + 1), errno.EINVAL),
    "version": (lambda s: changed(s, version=2), errno.EINVAL),
    "unknown flag": (lambda s: changed(s, flags=2), errno.EINVAL),
    "type": (lambda s: changed(s, kind=b"GVTg_V4_4"), errno.EINVAL),
    "check": (lambda s: changed(s, check=1), errno.EINVAL),
    "total too small": (lambda s: changed(s, total=100), errno.EINVAL),
    "total too large": (lambda s: changed(s, total=1 << 62), errno.EINVAL),
    "total is one off": (lambda s: changed(s, total=len(s) + 1), errno.EINVAL),
    "total of a live save": (lambda s: changed(s, flags=1), errno.EINVAL),
    "no total": (lambda s: changed(s, total=0), errno.EINVAL),
    "too much filler": (lambda s: changed(s, flags=1, total=0, extra=(1 << 32) + 1), errno.EINVAL),
    "filler near 2^64": (lambda s: changed(s, extra=(1 << 64) - 80), errno.EINVAL),
    "other seed": (lambda s: changed(s, seed=1), errno.EINVAL),
    "filler": (lambda s: patched(s, RECORD_AT - 1, bytes([s[RECORD_AT - 1] ^ 1])), errno.EINVAL),
    "record type 0": (lambda s: patched(s, RECORD_AT, b"\0"), errno.EINVAL),
    "record type 3": (lambda s: patched(s, RECORD_AT, b"\3"), errno.EINVAL),
    "record number": (lambda s: patched(s, RECORD_AT + 8, b"\1"), errno.EINVAL),
    "dirty page in a stream without": (lambda s: patched(s, RECORD_AT, RECORD.pack(1, 4080, 0)), errno.EINVAL),
    "dirty page of another size": (
        lambda s: patched(changed(s, flags=1, total=0), RECORD_AT, RECORD.pack(1, 4081, 0)),
        errno.EINVAL,
    ),
    "empty image": (lambda s: patched(changed(s, flags=1, total=0), RECORD_AT + 4, bytes(4)), errno.EINVAL),
    "huge image": (lambda s: patched(changed(s, flags=1, total=0), RECORD_AT + 4, b"\xff" * 4), errno.EINVAL),
    "image version": (lambda s: patched(s, IMAGE_AT + 8, b"\xff"), errno.EINVAL),
    "image data_size": (lambda s: patched(s, IMAGE_AT + 12, b"\xff"), errno.EINVAL),
    "image record": (lambda s: patched(s, IMAGE_AT + 0x218, b"\xff"), errno.EINVAL),
    "image of another device": (lambda s: patched(s, IMAGE_AT + 0x220, b"\0\0"), errno.EINVAL),
    "a byte more": (lambda s: s + b"x", errno.ENOMEM),
}


def write_until_refused(fd: int, stream: bytes) -> int | None:
    """Write; the errno of the refusal, 0 if there is none."""
    try:
        write_all(fd, stream)
    except OSError as error:
        return error.errno
    return 0


def test_a_stream_that_lies_is_refused_and_changes_nothing(vgpu: V2, target: V2) -> None:
    vgpu.set_knob("v2_extra_bytes", EXTRA)
    occupy(vgpu.guest)
    stream = vgpu.save()
    occupy(target.guest)
    for name, (lie, code) in LIES.items():
        before = observed(target.guest)
        with target.session(RESUMING) as fd:
            assert write_until_refused(fd, lie(stream)) == code, name
            assert target.guest.instance.last_error(), name
            fails(code, os.write, fd, b"x")  # refused once, refused for good
            fails(errno.EINVAL, target.go, STOP)
            assert target.state() == ERROR, name
            fails(errno.ENODEV, os.write, fd, b"x")
        for state in (*STATES, 9):
            fails(errno.EINVAL, target.go, state)
        fails(errno.EBUSY, target.guest.device.start)
        assert target.state() == ERROR
        assert observed(target.guest) == before, name
        target.guest.device.reset()
        assert target.state() == RUNNING
        target.go(STOP)
        target.guest.bind()
    target.load(stream)
    assert target.save() == stream


def test_a_stream_cut_short_is_refused_when_resuming_is_left(vgpu: V2, target: V2) -> None:
    vgpu.set_knob("v2_extra_bytes", EXTRA)
    stream = vgpu.save()
    target.guest.device.set_reg(0x5000, 0x77)
    for length in (0, 1, HEADER.size - 1, HEADER.size, RECORD_AT, IMAGE_AT - 1, IMAGE_AT, len(stream) - 1):
        with target.session(RESUMING) as fd:
            write_all(fd, stream[:length])
            fails(errno.EINVAL, target.go, RUNNING)
        assert target.state() == ERROR
        assert target.guest.device.reg(0x5000) == 0x77
        assert target.guest.instance.last_error() == "v2: not a whole state"
        target.guest.device.reset()
        target.guest.device.set_reg(0x5000, 0x77)


def test_a_state_of_another_type_is_refused(vgpu: V2, make_guest: MakeGuest) -> None:
    other = V2(make_guest("GVTg_V4_4"))
    with vgpu.session(RESUMING) as fd:
        assert write_until_refused(fd, other.save()) == errno.EINVAL
    assert "type" in vgpu.guest.instance.last_error()


# --- a data fd, misused


def test_a_data_fd_is_a_stream_of_one_direction(vgpu: V2) -> None:
    with vgpu.session(STOP_COPY) as fd:
        assert str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:gvt_sample_mig"
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        fails(errno.EBADF, os.write, fd, b"x")
        fails(errno.ESPIPE, os.lseek, fd, 0, os.SEEK_SET)
        fails(errno.ESPIPE, os.pread, fd, 1, 0)
        assert os.read(fd, 0) == b""
        fails(errno.EINVAL, precopy_info, fd)
        for request in (DEVICE_FEATURE, DEVICE_RESET, 0):
            fails(errno.ENOTTY, fcntl.ioctl, fd, request, bytes(64))
        copy = os.dup(fd)
        header = os.read(fd, 32) + os.read(copy, 32)  # one position
        os.close(copy)
    vgpu.go(STOP)
    assert header == vgpu.save()[:64]
    with vgpu.session(RESUMING) as fd:
        fails(errno.EBADF, os.read, fd, 1)
        fails(errno.ESPIPE, os.pwrite, fd, b"x", 0)
        fails(errno.ENOTTY, precopy_info, fd)
        assert os.write(fd, b"") == 0


def test_memory_that_is_none_loses_nothing(vgpu: V2, target: V2) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    nowhere = ctypes.c_void_p(8)

    def bad(call: str, fd: int) -> int:
        assert libc[call](fd, nowhere, ctypes.c_size_t(4096)) == -1
        return ctypes.get_errno()

    vgpu.set_knob("v2_extra_bytes", 10_000)
    whole = vgpu.save()
    stream = b""
    with vgpu.session(STOP_COPY) as fd, target.session(RESUMING) as sink:
        for size in (10, 54, 5000, 5000, 16, 1000, 1 << 30):
            assert bad("read", fd) == errno.EFAULT
            part = os.read(fd, min(size, 6 << 20))
            assert bad("write", sink) == (errno.EFAULT)
            write_all(sink, part)
            stream += part
        assert stream == whole
        assert os.read(fd, 1) == b""
        target.go(STOP)
    assert target.save() == whole


@pre_copy
def test_precopy_info_needs_its_size_and_memory(vgpu: V2) -> None:
    with vgpu.session(PRE_COPY) as fd:
        for argsz in (0, 23):
            fails(errno.EINVAL, precopy_info, fd, argsz)
        assert precopy_info(fd, 1000)[0] == HEADER.size
        fails(errno.EFAULT, fcntl.ioctl, fd, PRECOPY_INFO, 8)
        fails(errno.ENOTTY, fcntl.ioctl, vgpu.fd, PRECOPY_INFO, struct.pack("<IIQQ", 24, 0, 0, 0))


# --- faults on demand


def test_faults_befall_states_and_data(vgpu: V2, target: V2) -> None:
    vgpu.set_knob("fault", "set_state 2 errno 5")
    vgpu.go(STOP)
    fails(errno.EIO, vgpu.go, STOP_COPY)
    assert vgpu.state() == STOP
    vgpu.set_knob("fault", "set_state 1 after 5")
    fails(errno.EIO, vgpu.go, STOP_COPY)
    assert vgpu.state() == STOP_COPY
    vgpu.go(STOP)
    whole = vgpu.save()
    vgpu.set_knob("fault", "set_state 1 delay 200")
    began = time.monotonic()
    with vgpu.session(STOP_COPY) as fd, target.session(RESUMING) as sink:
        assert time.monotonic() - began > 0.19
        vgpu.set_knob("fault", "data_read 1 errno 11")
        fails(errno.EAGAIN, os.read, fd, 100)
        vgpu.set_knob("fault", "data_read 1 short 7")
        stream = os.read(fd, 100)
        assert len(stream) == 7
        stream += read_all(fd)
        assert stream == whole
        target.set_knob("fault", "data_write 1 errno 28")
        fails(errno.ENOSPC, os.write, sink, stream)
        target.set_knob("fault", "data_write 1 short 9")
        assert os.write(sink, stream) == 9
        target.set_knob("fault", "data_write 1 delay 1")
        write_all(sink, stream[9:])
        target.go(STOP)
    assert target.save() == whole
    fails(errno.EINVAL, vgpu.set_knob, "fault", "set_state 1 short 5")
    vgpu.go(STOP)
    with vgpu.session(STOP_COPY) as fd:
        vgpu.set_knob("fault", "data_read 1 after 5")
        fails(errno.EIO, os.read, fd, 100)
        assert os.read(fd, 1 << 20) == whole[100 : 100 + (1 << 20)]  # what was reported as failed is gone
    counters = target.guest.instance.counters()
    assert counters["v2_set_state"] >= 4
    assert counters["v2_write"] >= 3


def test_states_reads_and_resets_at_once_do_no_harm(vgpu: V2) -> None:
    vgpu.set_knob("v2_extra_bytes", 1 << 20)
    end = time.monotonic() + 1.5
    crashed: list[BaseException] = []

    def again(action: Callable[[], object]) -> None:
        try:
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    action()
        except BaseException as error:  # noqa: BLE001  # a thread's failure is the test's
            crashed.append(error)

    allowed = itertools.cycle(state for state in STATES if state not in (PRE_COPY, PRE_COPY_P2P))

    def session() -> None:
        fd = vgpu.go(next(allowed))
        if fd >= 0:
            try:
                while os.read(fd, 1 << 20):
                    pass
            finally:
                os.close(fd)

    actions = (session, session, vgpu.guest.device.reset, vgpu.guest.device.stop, vgpu.guest.device.start)
    threads = [threading.Thread(target=again, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not crashed
    vgpu.guest.device.reset()
    assert vgpu.state() == RUNNING
    assert runs(vgpu.guest)


def test_a_reset_while_a_state_is_loaded_leaves_nothing_of_it(vgpu: V2) -> None:
    device = vgpu.guest.device
    device.set_reg(0x5000, 0x77)
    stream = vgpu.save()
    began = time.monotonic()
    device.reset()
    span = time.monotonic() - began
    turns = 20
    for turn in range(turns):
        with vgpu.session(RESUMING) as fd:
            write_all(fd, stream)
            thread = threading.Thread(target=device.reset)
            thread.start()
            time.sleep(span * turn / turns)
            vgpu.go(STOP)  # loads and is undone, or stops a device that was reset
            thread.join()
        assert vgpu.state() in {RUNNING, STOP}
        assert device.reg(0x5000) == 0
        device.reset()


def test_a_reset_does_not_wait_for_a_long_read_to_end(vgpu: V2) -> None:
    vgpu.set_knob("v2_extra_bytes", 1 << 30)
    got: list[int] = []
    with vgpu.session(STOP_COPY) as fd, mmap.mmap(-1, 128 << 20) as room:
        began = time.monotonic()
        os.readv(fd, [memoryview(room)[: 16 << 20]])
        span = (time.monotonic() - began) * 8  # what all of the room would take
        thread = threading.Thread(target=lambda: got.append(os.readv(fd, [room])))
        thread.start()
        time.sleep(span / 16)
        began = time.monotonic()
        vgpu.guest.device.reset()
        took = time.monotonic() - began
        thread.join()
        assert 0 < got[0] < 128 << 20
        assert took < span / 4
        fails(errno.ENODEV, os.read, fd, 1)
    assert vgpu.state() == RUNNING


# --- DMA logging


def test_dma_logging_tells_what_was_written_since_the_last_report(vgpu: V2) -> None:
    guest = vgpu.guest
    memory, whole = guest.memory, (guest.memory.iova, guest.memory.size)
    # Since Linux 6.7 the bitmap to report in comes from iommufd, which Debian's kernels do not have.
    if KERNEL >= (6, 7) and not Path("/dev/iommu").exists():
        fails(errno.ENOTTY, vgpu.log_start, *whole)
        return
    engine = gpu.Engine(guest)
    gma, iova = guest.bind(3)
    fails(errno.EINVAL, vgpu.log_report, *whole)
    assert vgpu.log_start(*whole) == PAGE
    fails(errno.EINVAL, vgpu.log_start, *whole)
    assert vgpu.log_report(*whole) == set()
    context, done = engine.run(gpu.store_dword(gma + PAGE, 9))
    assert done
    assert memory.u32(iova + PAGE) == 9
    written = {iova + PAGE, context.image + PAGE, engine.status_iova}
    assert vgpu.log_report(iova + PAGE, PAGE) == {iova + PAGE}
    assert vgpu.log_report(*whole) == written - {iova + PAGE}
    assert vgpu.log_report(*whole) == set()
    guest.device.write(2, gma + 2 * PAGE - 2, b"abcd")
    assert vgpu.log_report(*whole) == {iova + PAGE, iova + 2 * PAGE}
    vgpu.feature(SET | LOG_STOP)
    vgpu.feature(SET | LOG_STOP)
    engine.run(gpu.store_dword(gma, 9))
    assert vgpu.log_start(*whole) == PAGE
    assert vgpu.log_report(*whole) == set()


def test_a_log_in_larger_pages_reports_each_4_kib_of_them_and_forgets_them_as_a_whole(vgpu: V2) -> None:
    if KERNEL >= (6, 7) and not Path("/dev/iommu").exists():
        return  # it has no log: the test above
    guest = vgpu.guest
    whole = (guest.memory.iova, guest.memory.size)
    gma, iova = guest.bind(32)
    vgpu.set_knob("v2_log_page", 1 << 16)
    assert vgpu.log_start(*whole) == 1 << 16
    first = -(-iova // (1 << 16)) << 16  # one of the log's, all of it ours
    guest.device.write(2, gma + first - iova + 5 * PAGE, b"a")
    of_it = {first + number * PAGE for number in range(16)}
    assert vgpu.log_report(*whole) == of_it
    assert vgpu.log_report(*whole) == set()
    guest.device.write(2, gma + first - iova + 5 * PAGE, b"b")
    assert vgpu.log_report(first + 3 * PAGE, 2 * PAGE) == {first + 3 * PAGE, first + 4 * PAGE}
    assert vgpu.log_report(*whole) == set()
    vgpu.set_knob("v2_log_page", PAGE)  # of the next log
    guest.device.write(2, gma + first - iova, b"c")
    assert vgpu.log_report(*whole) == of_it
    vgpu.feature(SET | LOG_STOP)
    for wrong in (0, 2048, 12288, 1 << 31):
        with pytest.raises(OSError, match="Invalid argument"):
            vgpu.set_knob("v2_log_page", wrong)
    assert vgpu.log_start(*whole) == PAGE
