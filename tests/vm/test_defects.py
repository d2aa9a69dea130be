# SPDX-License-Identifier: MIT
"""The sample driver's defects, each by raw ioctls: off it keeps the rule, switched on it breaks it.

A probe tells whether a vGPU breaks one rule. What `vfio-mig conform` says of each is in test_conform_defects.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import re
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab.sample import defects, host
from tools.lab.sample.guest import Guest
from tools.lab.sample.v2 import V2
from tools.lab.vfio.raw import DEVICE_RESET, GET_DIRTY, PAGE, START, STATE, STATE_SIZE
from tools.lab.vfio.raw import STOP as STATUS_STOP
from tools.lab.vfio.v2 import (
    ERROR,
    LOG_STOP,
    PRE_COPY,
    PRE_COPY_P2P,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SET,
    STATES,
    STOP,
    STOP_COPY,
    precopy_info,
    read_all,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Probe = Callable[[V2], bool]

README: Final = Path(__file__).parents[2] / "tools/kmod/README.md"
FAR: Final = 1 << 40  # no guest has memory there
MEMORY: Final = (0x100000, 256 * PAGE)  # what Guest.opened() maps

PROBES: Final[dict[str, Probe]] = {}


def probe(name: str) -> Callable[[Probe], Probe]:
    """Make the decorated function the probe of a defect."""

    def keep(function: Probe) -> Probe:
        PROBES[name] = function
        return function

    return keep


def accepted(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except OSError:
        return False
    return True


def alive(fd: int) -> bool:
    """Tell whether a saving session can still be read; that there is nothing now is an answer, too."""
    try:
        os.read(fd, 1)
    except OSError as error:
        return error.errno == errno.ENOMSG
    return True


def whole(vgpu: V2) -> bytes:
    stream = vgpu.save()
    vgpu.go(RUNNING)
    return stream


# --- v2: states


@probe("state-unknown")
def state_unknown(vgpu: V2) -> bool:
    return accepted(vgpu.go, 9)


@probe("state-error")
def state_error(vgpu: V2) -> bool:
    return accepted(vgpu.go, ERROR) and vgpu.state() == ERROR


@probe("state-stuck")
def state_stuck(vgpu: V2) -> bool:
    vgpu.go(STOP)
    vgpu.go(RUNNING_P2P)
    return vgpu.state() == STOP


@probe("state-new-fd")
def state_new_fd(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY):
        fd = vgpu.go(STOP_COPY)
        if fd >= 0:
            os.close(fd)
        return fd >= 0


@probe("state-no-fd")
def state_no_fd(vgpu: V2) -> bool:
    stream = whole(vgpu)
    with vgpu.session(RESUMING) as fd:
        write_all(fd, stream)
        saving = vgpu.go(STOP_COPY)
        if saving >= 0:
            os.close(saving)
        return saving < 0


@probe("error-left")
def error_left(vgpu: V2) -> bool:
    with vgpu.session(RESUMING):
        assert not accepted(vgpu.go, STOP)
        assert vgpu.state() == ERROR
        return accepted(vgpu.go, RUNNING)


# --- v2: ends of sessions


@probe("stop-keeps-fd")
def stop_keeps_fd(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        vgpu.go(STOP)
        return alive(fd)


@probe("stop-unread")
def stop_unread(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        os.read(fd, 100)
        return not accepted(vgpu.go, STOP)


@probe("reset-stays")
def reset_stays(vgpu: V2) -> bool:
    vgpu.go(STOP)
    vgpu.guest.device.reset()
    return vgpu.state() == STOP


@probe("reset-keeps-saving")
def reset_keeps_saving(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        vgpu.guest.device.reset()
        return alive(fd)


@probe("reset-keeps-resuming")
def reset_keeps_resuming(vgpu: V2) -> bool:
    with vgpu.session(RESUMING) as fd:
        vgpu.guest.device.reset()
        return accepted(os.write, fd, b"g")


@probe("close-keeps-fd")
def close_keeps_fd(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        reopen(vgpu.guest)
        return alive(fd)


def reopen(guest: Guest) -> None:
    """Close a device as its last user, and open it again under the same number."""
    group = guest.container.group_fd
    os.close(guest.device.fd)
    again = type(guest.device)(guest.container, guest.instance.uuid)
    assert group == guest.container.group_fd
    if again.fd != guest.device.fd:
        os.dup2(again.fd, guest.device.fd, inheritable=False)
        os.close(again.fd)


# --- v2: data fds


@probe("fd-both-ways")
def fd_both_ways(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


@probe("fd-seekable")
def fd_seekable(vgpu: V2) -> bool:
    with vgpu.session(RESUMING) as fd:
        return accepted(os.lseek, fd, 0, os.SEEK_SET)


@probe("fd-any-ioctl")
def fd_any_ioctl(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        return accepted(fcntl.ioctl, fd, DEVICE_RESET)


@probe("read-restarts")
def read_restarts(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        return os.read(fd, 8) == (read_all(fd), os.read(fd, 8))[1]


@probe("read-loses")
def read_loses(vgpu: V2) -> bool:
    stream = whole(vgpu)
    with vgpu.session(STOP_COPY) as fd:
        return os.read(fd, 1) + os.read(fd, 1) != stream[:2]


@probe("read-fault")
def read_fault(vgpu: V2) -> bool:
    stream = whole(vgpu)
    libc = ctypes.CDLL(None)
    with vgpu.session(STOP_COPY) as fd:
        assert libc.read(fd, ctypes.c_void_p(8), ctypes.c_size_t(8)) == -1
        return os.read(fd, 8) != stream[:8]


@probe("size-refused")
def size_refused(vgpu: V2) -> bool:
    return not accepted(vgpu.data_size)


# --- v2: loading


@probe("load-truncated")
def load_truncated(vgpu: V2) -> bool:
    stream = whole(vgpu)
    with vgpu.session(RESUMING) as fd:
        write_all(fd, stream[:-1])
        return accepted(vgpu.go, STOP)


@probe("load-surplus")
def load_surplus(vgpu: V2) -> bool:
    stream = whole(vgpu)
    with vgpu.session(RESUMING) as fd:
        return accepted(write_all, fd, stream + b"x")


@probe("load-foreign")
def load_foreign(vgpu: V2) -> bool:
    stream = whole(vgpu)
    with vgpu.session(RESUMING) as fd:
        return accepted(write_all, fd, b"mtty" + stream[4:])


@probe("load-refused")
def load_refused(vgpu: V2) -> bool:
    with vgpu.session(RESUMING) as fd:
        assert not accepted(os.write, fd, bytes(64))
        return accepted(vgpu.go, STOP)


@probe("load-pieces")
def load_pieces(vgpu: V2) -> bool:
    stream = whole(vgpu)
    with vgpu.session(RESUMING) as fd:
        return not accepted(os.write, fd, stream[:1])


@probe("load-nothing")
def load_nothing(vgpu: V2) -> bool:
    device = vgpu.guest.device
    device.set_reg(0x5000, 7)
    stream = whole(vgpu)
    device.reset()
    vgpu.load(stream)
    return device.reg(0x5000) != 7


@probe("load-loses-seed")
def load_loses_seed(vgpu: V2) -> bool:
    stream = bytearray(whole(vgpu))  # it has no filler that the seed would have to fit
    stream[48] ^= 1
    vgpu.load(bytes(stream))
    return whole(vgpu)[48] != stream[48]


@probe("load-loses-register")
def load_loses_register(vgpu: V2) -> bool:
    stream = whole(vgpu)
    vgpu.load(stream)
    return vgpu.save() != stream


@probe("save-counts")
def save_counts(vgpu: V2) -> bool:
    return vgpu.save() != vgpu.save()


# --- v2: PRE_COPY


@probe("precopy-info-late")
def precopy_info_late(vgpu: V2) -> bool:
    with vgpu.session(STOP_COPY) as fd:
        return accepted(precopy_info, fd)


@probe("precopy-info-argsz")
def precopy_info_argsz(vgpu: V2) -> bool:
    with vgpu.session(PRE_COPY) as fd:
        return accepted(precopy_info, fd, 23)


@probe("precopy-initial-stuck")
def precopy_initial_stuck(vgpu: V2) -> bool:
    with vgpu.session(PRE_COPY) as fd:
        os.read(fd, 64)
        return precopy_info(fd)[0] != 0


@probe("precopy-new-fd")
def precopy_new_fd(vgpu: V2) -> bool:
    with vgpu.session(PRE_COPY):
        fd = vgpu.go(STOP_COPY)
        if fd >= 0:
            os.close(fd)
        return fd >= 0


@probe("precopy-enomsg")
def precopy_enomsg(vgpu: V2) -> bool:
    with vgpu.session(PRE_COPY) as fd:
        vgpu.go(STOP_COPY)
        return not accepted(read_all, fd)


@probe("precopy-restarts")
def precopy_restarts(vgpu: V2) -> bool:
    with vgpu.session(PRE_COPY) as fd:
        os.read(fd, 64)
        vgpu.go(PRE_COPY_P2P)
        vgpu.go(PRE_COPY)
        return precopy_info(fd)[0] != 0


@probe("precopy-keeps-fd")
def precopy_keeps_fd(vgpu: V2) -> bool:
    with vgpu.session(PRE_COPY) as fd:
        vgpu.go(RUNNING)
        return alive(fd)


# --- v2: DMA logging


@probe("log-all")
def log_all(vgpu: V2) -> bool:
    vgpu.log_start(*MEMORY)
    return bool(vgpu.log_report(*MEMORY))


@probe("log-start-twice")
def log_start_twice(vgpu: V2) -> bool:
    vgpu.log_start(*MEMORY)
    return accepted(vgpu.log_start, *MEMORY)


@probe("log-unstarted")
def log_unstarted(vgpu: V2) -> bool:
    return accepted(vgpu.log_report, *MEMORY)


@probe("log-ends-at-stop")
def log_ends_at_stop(vgpu: V2) -> bool:
    vgpu.log_start(*MEMORY)
    vgpu.go(STOP)
    return not accepted(vgpu.log_report, *MEMORY)


@probe("log-survives")
def log_survives(vgpu: V2) -> bool:
    vgpu.log_start(*MEMORY)
    reopen(vgpu.guest)
    refused = not accepted(vgpu.log_start, *MEMORY)
    vgpu.feature(SET | LOG_STOP)
    return refused


# --- the RFC


@probe("status-no-flag")
def status_no_flag(vgpu: V2) -> bool:
    return accepted(vgpu.guest.device.status, 0)


@probe("status-both-flags")
def status_both_flags(vgpu: V2) -> bool:
    return accepted(vgpu.guest.device.status, STATUS_STOP | START)


@probe("status-unknown-flag")
def status_unknown_flag(vgpu: V2) -> bool:
    return accepted(vgpu.guest.device.status, 4 | STATUS_STOP)


@probe("status-argsz")
def status_argsz(vgpu: V2) -> bool:
    return accepted(vgpu.guest.device.status, STATUS_STOP, 7)


@probe("status-stop-twice")
def status_stop_twice(vgpu: V2) -> bool:
    vgpu.guest.device.stop()
    return not accepted(vgpu.guest.device.stop)


@probe("dirty-tail")
def dirty_tail(vgpu: V2) -> bool:
    return vgpu.guest.device.dirty_bytes(FAR, 7)[0] >> 7 == 1


@probe("dirty-overrun")
def dirty_overrun(vgpu: V2) -> bool:
    buffer = bytearray(struct.pack("<QQ", FAR, 64)) + bytearray(b"\xff" * 24)  # a word, one more, and no further
    fcntl.ioctl(vgpu.fd, GET_DIRTY, buffer, True)
    return buffer[32:] != b"\xff" * 8


@probe("dirty-keeps-buffer")
def dirty_keeps_buffer(vgpu: V2) -> bool:
    return any(vgpu.guest.device.dirty_bytes(FAR, 64, fill=0xFF))


@probe("dirty-invented")
def dirty_invented(vgpu: V2) -> bool:
    return any(vgpu.guest.device.dirty_bytes(FAR, 64))


@probe("dirty-fault")
def dirty_fault(vgpu: V2) -> bool:
    return accepted(fcntl.ioctl, vgpu.fd, GET_DIRTY, 8)


@probe("dirty-copy-fault")
def dirty_copy_fault(vgpu: V2) -> bool:
    libc = ctypes.CDLL(None)
    memory = mmap.mmap(-1, PAGE)
    memory[:16] = struct.pack("<QQ", FAR, 64)
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    assert libc.mprotect(address, ctypes.c_size_t(PAGE), mmap.PROT_READ) == 0
    return int(libc.ioctl(vgpu.fd, ctypes.c_ulong(GET_DIRTY), address)) == 0


@probe("state-read-offset")
def state_read_offset(vgpu: V2) -> bool:
    return accepted(vgpu.guest.device.read, STATE, PAGE, 8)


@probe("state-write-offset")
def state_write_offset(vgpu: V2) -> bool:
    vgpu.guest.device.stop()
    image = vgpu.guest.device.read(STATE, 0, STATE_SIZE - PAGE)
    return accepted(vgpu.guest.device.write, STATE, PAGE, image)


@probe("state-type")
def state_type(vgpu: V2) -> bool:
    vgpu.guest.device.stop()
    return accepted(vgpu.guest.device.restore, b"\x07" + vgpu.guest.device.save()[1:])


@probe("state-size")
def state_size(vgpu: V2) -> bool:
    vgpu.guest.device.stop()
    return not accepted(vgpu.guest.device.restore, vgpu.guest.device.save())


# --- the tests


@pytest.fixture
def one() -> Iterator[host.Instance]:
    with host.parameter_set("v2", 7), host.instance() as instance:
        yield instance


def breaks(name: str, instance: host.Instance) -> bool:
    with Guest.opened(instance) as guest:
        return PROBES[name](V2(guest))


@pytest.mark.parametrize("name", PROBES)
def test_a_defect_breaks_its_rule_when_it_is_switched_on_and_only_then(one: host.Instance, name: str) -> None:
    if not defects.possible(name, one):
        pytest.skip("not on this kernel")
    assert not breaks(name, one)
    defects.switch(one, name)
    assert breaks(name, one)
    defects.switch(one)
    assert not breaks(name, one)


def test_the_driver_s_list_of_defects_is_the_readme_s_and_each_has_a_probe() -> None:
    section = README.read_text().partition("## Defects")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", section, re.MULTILINE) == defects.known()
    assert sorted(PROBES) == sorted(defects.known())


def test_the_file_takes_a_list_and_names_what_is_on_in_its_own_vgpu(one: host.Instance) -> None:
    file = defects.file(one)
    assert file.read_text() == ""
    file.write_text("fd-seekable,load-surplus  dirty-tail\n")
    assert file.read_text().split() == ["fd-seekable", "load-surplus", "dirty-tail"]
    for wrong in ("fd-seekable unknown", "fd-seek", "x" * 5000, "fd-seekable\0"):
        with pytest.raises(OSError) as caught:
            file.write_text(wrong)
        assert caught.value.errno == errno.EINVAL
        assert file.read_text().split() == ["fd-seekable", "load-surplus", "dirty-tail"]
    file.write_text("save-counts")
    assert file.read_text() == "save-counts\n"
    with host.instance() as other:
        assert defects.file(other).read_text() == ""
    file.write_text(" ,\n")
    assert file.read_text() == ""


def misuse(vgpu: V2, states: Iterator[int], fds: list[int]) -> None:
    """Do much of everything that defects are about; what comes of it is theirs."""
    for state in itertools.islice(states, 25):
        with contextlib.suppress(OSError):
            fd = vgpu.go(state)
            fds += [fd] if fd >= 0 else []
        for fd in fds[-2:]:
            with contextlib.suppress(OSError):
                os.read(fd, 70000)
            with contextlib.suppress(OSError):
                os.write(fd, bytes(100))
            with contextlib.suppress(OSError):
                precopy_info(fd)
        with contextlib.suppress(OSError):
            vgpu.guest.device.save()
        with contextlib.suppress(OSError):
            vgpu.log_start(*MEMORY)
            vgpu.log_report(*MEMORY)
        if state == RESUMING:
            vgpu.guest.device.reset()


def test_all_defects_at_once_do_the_kernel_no_harm() -> None:
    """None is left behind: the kernel's log, the room for vGPUs and the module's use are looked at."""
    free = host.available(host.SMALL)
    fds: list[int] = []
    with host.parameter_set("v2", 7), host.instance() as one:
        defects.switch(one, *defects.known())
        states = itertools.cycle((*STATES, ERROR, RESUMING, 9))
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with Guest.opened(one) as guest:
                misuse(V2(guest), states, fds)
            while len(fds) > 20:
                os.close(fds.pop(0))
    assert fds
    for fd in fds:
        assert not alive(fd)
        os.close(fd)
    assert host.available(host.SMALL) == free
    host.unload_module()
    host.load_module()
