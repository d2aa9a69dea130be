# SPDX-License-Identifier: MIT
"""Mainline's protocol v2 against a played device: the arcs of 6.12's mtty, as measured."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from vfio_mig import uapi
from vfio_mig.device import Device
from vfio_mig.errors import DeviceError, UnsupportedError, UsageError
from vfio_mig.protocols.mainline_v2 import BY_HAND, CHUNK, MainlineV2
from vfio_mig.uapi import v2
from vfio_mig.uapi.v2 import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_mig.uapi import Request
    from vfio_mig.uapi._generated import CData

GET, SET, PROBE, STATE = 1 << 16, 1 << 17, 1 << 18, 2
ALL_FLAGS: Final = 7


class V2Device(Device):
    """A device with a state machine; its stream is a temporary file.

    :param fail: state that cannot be reached, and where the device stays instead.
    """

    def __init__(self, content: bytes = b"", *, state: int = v2.RUNNING, fail: tuple[int, int] | None = None) -> None:
        super().__init__("fake", -1)
        self.now = state
        self.content = content
        self.fail = fail
        self.walked: list[int] = []
        self.asked: list[int] = []
        self.features: set[int] = set()
        self.loaded: bytes | None = None
        self.resets = 0
        self._incoming = -1

    def call(self, request: Request, arg: CData | bytearray | int = 0) -> int:
        assert request == uapi.DEVICE_FEATURE
        buffer: Any = arg
        self.asked.append(struct.unpack_from("=II", buffer)[1])
        if self.asked[-1] in self.features:
            return 0
        if len(buffer) != 16 or self.asked[-1] & 0xFFFF != STATE:
            raise DeviceError("FEATURE failed: ENOTTY", device="fake", errno=errno.ENOTTY)
        argsz, flags, state, _ = struct.unpack("=IIIi", buffer)
        assert argsz == len(buffer) == 16
        if flags == GET | STATE:
            struct.pack_into("=Ii", buffer, 8, self.now, -1)
            return 0
        assert flags == SET | STATE
        self.walked.append(state)
        if self.fail is not None and state == self.fail[0]:
            self.now = self.fail[1]
            raise DeviceError("SET failed: EIO", device="fake", errno=errno.EIO)
        struct.pack_into("=Ii", buffer, 8, state, self._enter(state))
        return 0

    def _enter(self, state: int) -> int:
        if self.now == v2.RESUMING and state != v2.RESUMING:
            os.lseek(self._incoming, 0, os.SEEK_SET)
            self.loaded = os.read(self._incoming, 1 << 24)
            os.close(self._incoming)
        self.now = state
        fd = -1
        if state == v2.STOP_COPY:
            fd = os.memfd_create("out")
            os.write(fd, self.content)
            os.lseek(fd, 0, os.SEEK_SET)
        elif state == v2.RESUMING:
            self._incoming = os.memfd_create("in")
            fd = os.dup(self._incoming)
        return fd

    def reset(self) -> None:
        self.now = v2.RUNNING
        self.resets += 1


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_stop_and_start_walk_to_stop_and_running_once() -> None:
    device = V2Device()
    protocol = MainlineV2(device, ALL_FLAGS)
    assert protocol.state() == "running"
    for _ in range(2):
        protocol.stop()
        assert protocol.state() == "stop"
    for _ in range(2):
        protocol.start()
    assert device.walked == [v2.STOP, v2.RUNNING]


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 5])
def test_a_stream_is_read_in_chunks_and_the_device_is_at_rest_afterwards(size: int) -> None:
    content = os.urandom(size)
    device = V2Device(content, state=v2.STOP)
    before = open_fds()
    chunks = [bytes(chunk) for chunk in MainlineV2(device, ALL_FLAGS).read_chunks()]
    assert b"".join(chunks) == content
    assert max(map(len, chunks), default=0) <= CHUNK
    assert device.now == v2.STOP
    assert open_fds() == before


def test_a_stream_is_written_in_chunks_and_loaded_by_going_to_stop() -> None:
    device = V2Device(state=v2.STOP)
    before = open_fds()
    MainlineV2(device, ALL_FLAGS).write_chunks([b"one", memoryview(b"two")])
    assert device.loaded == b"onetwo"
    assert device.walked == [v2.RESUMING, v2.STOP]
    assert open_fds() == before


@pytest.mark.parametrize("number", [errno.EFAULT, errno.ENOMEM])
def test_after_a_failed_write_the_device_is_not_asked_for_anything(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """STOP would load the garbage; the reset is the job's."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    device = V2Device(state=v2.STOP)
    protocol = MainlineV2(device, ALL_FLAGS)
    before = open_fds()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(DeviceError, match=f"writing the state failed: {errno.errorcode[number]}"):
            protocol.write_chunks([b"x"])
    assert device.walked == [v2.RESUMING]
    os.close(device._incoming)
    assert open_fds() == before


def test_a_failed_transition_says_where_the_device_is_now() -> None:
    device = V2Device(fail=(v2.STOP_COPY, v2.STOP))
    with pytest.raises(DeviceError, match="stop-copy: SET failed: EIO; it is now in state stop"):
        next(MainlineV2(device, ALL_FLAGS).read_chunks())


@pytest.mark.parametrize("to", [v2.PRE_COPY, v2.PRE_COPY_P2P])
def test_the_arc_that_hangs_kernels_is_never_asked_for(to: int) -> None:
    device = V2Device(state=v2.STOP_COPY)
    with pytest.raises(UsageError, match="no kernel before"):
        MainlineV2(device, ALL_FLAGS)._set(to)
    assert device.walked == []


@pytest.mark.parametrize("found", sorted(NAMES))
def test_a_stop_is_undone_to_where_the_device_was_found(found: int) -> None:
    device = V2Device(state=found)
    protocol = MainlineV2(device, ALL_FLAGS)
    at_rest = found in {v2.STOP, v2.RUNNING, v2.RUNNING_P2P}
    if at_rest:
        protocol.require_idle()
    else:
        with pytest.raises(DeviceError, match=f"in state {NAMES[found]}: .*vfio-mig reset fake"):
            protocol.require_idle()
    device.now = v2.STOP
    protocol.restore_run_state()
    assert device.now == (found if at_rest else v2.RUNNING)


@pytest.mark.parametrize("name", [*NAMES.values(), "nonsense"])
def test_by_hand_only_states_without_a_stream_are_reached(name: str) -> None:
    device = V2Device(state=v2.RUNNING)
    protocol = MainlineV2(device, ALL_FLAGS)
    if name in BY_HAND:
        protocol.go_to(name)
        assert protocol.state() == name
    else:
        with pytest.raises(UsageError, match="not a state to be left in"):
            protocol.go_to(name)
        assert device.walked == []


def test_without_p2p_there_is_no_such_state() -> None:
    with pytest.raises(UnsupportedError, match="no P2P"):
        MainlineV2(V2Device(), 1).go_to("running-p2p")


def test_a_device_logs_its_writes_if_it_has_both_features() -> None:
    device = V2Device()
    for features, expected in ((set(), False), ({PROBE | SET | 6}, False), ({PROBE | SET | 6, PROBE | GET | 8}, True)):
        device.features = features
        protocol = MainlineV2(device, ALL_FLAGS)
        assert protocol.has_dirty is expected
        assert ("dma-logging" in protocol.describe()) is expected


@pytest.mark.parametrize(
    ("flags", "text"), [(1, "(stop-copy)"), (3, "(stop-copy, p2p)"), (7, "(stop-copy, p2p, pre-copy)")]
)
def test_it_says_what_the_device_has(flags: int, text: str) -> None:
    assert MainlineV2(V2Device(), flags).describe() == f"mainline-v2 {text}"


@pytest.mark.parametrize("use", [lambda p: next(p.read_chunks()), lambda p: p.write_chunks([b""])])
def test_a_transition_without_its_data_fd_is_an_error(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[MainlineV2], object]
) -> None:
    device = V2Device(state=v2.STOP)
    protocol = MainlineV2(device, ALL_FLAGS)
    monkeypatch.setattr(device, "_enter", lambda _: -1)
    with pytest.raises(DeviceError, match="without a data fd"):
        use(protocol)


@pytest.mark.parametrize("found", [v2.STOP, v2.RUNNING_P2P])
def test_a_device_that_does_not_run_is_not_saved_live(found: int) -> None:
    device = V2Device(state=found)
    assert not MainlineV2(device, ALL_FLAGS).begin_live()
    assert device.walked == []


def test_p2p_states_are_passed_through_in_both_directions_and_a_stopped_device_is_not_woken_to_be_stopped() -> None:
    device = V2Device(state=v2.RUNNING)
    protocol = MainlineV2(device, ALL_FLAGS)
    for step in (protocol.quiet, protocol.stop, protocol.quiet, protocol.wake, protocol.start, protocol.wake):
        step()
    assert device.walked == [v2.RUNNING_P2P, v2.STOP, v2.RUNNING_P2P, v2.RUNNING]
    bare = MainlineV2(V2Device(state=v2.RUNNING), 1)
    assert bare.p2p is None
    assert bare.state() == "running"


@pytest.mark.parametrize(
    ("left", "now", "resets"),
    [
        (v2.STOP, v2.STOP, 0),
        (v2.STOP_COPY, v2.STOP, 0),
        (v2.PRE_COPY, v2.RUNNING, 0),
        (v2.PRE_COPY_P2P, v2.RUNNING, 0),
        (v2.RESUMING, v2.RUNNING, 1),
        (v2.ERROR, v2.RUNNING, 1),
    ],
)
def test_what_a_killed_job_left_is_gone_on_from_and_reset_only_where_that_is_allowed(
    left: int, now: int, resets: int
) -> None:
    device = V2Device(state=left)
    protocol = MainlineV2(device, ALL_FLAGS)
    if resets:
        with pytest.raises(DeviceError, match="vfio-mig reset"):
            protocol.recover(may_reset=False)
        assert device.resets == 0
    protocol.recover(may_reset=True)
    assert (device.now, device.resets) == (now, resets)


def test_a_state_at_rest_that_comes_with_a_data_fd_is_an_error_and_the_fd_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = V2Device()
    before = open_fds()
    monkeypatch.setattr(device, "_enter", lambda _: os.dup(0))
    with pytest.raises(DeviceError, match="data fd of its own"):
        MainlineV2(device, ALL_FLAGS).stop()
    assert open_fds() == before
