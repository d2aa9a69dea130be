# SPDX-License-Identifier: MIT
"""``vfio-mig`` with a device that a file plays: ``python -m tools.bench.played PROTOCOL FILE COMMAND…``.

All of the command is real, its processes, pipes, threads and notes too; the kernel answers at once. So what a
migration takes is our own time, on this CPU.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from vfio_mig import uapi
from vfio_mig.decode.gvt_image import parse
from vfio_mig.device import Device, Holder, Region
from vfio_mig.errors import DeviceError, ImageError
from vfio_mig.host.devices import HostDevice
from vfio_mig.host.lock import DeviceLock
from vfio_mig.jobs.engine import job as jobs
from vfio_mig.jobs.engine import session as sessions
from vfio_mig.jobs.engine.session import Session
from vfio_mig.protocols.gvt_rfc import GvtRfc
from vfio_mig.protocols.mainline_v2 import MainlineV2
from vfio_mig.uapi import v2
from vfio_mig.uapi.profile import DEFAULT_PROFILE

if TYPE_CHECKING:
    from vfio_mig.protocols.base import MigrationProtocol
    from vfio_mig.uapi import Request

TYPE: Final = "played"
_STATE: Final = struct.Struct("=IIIi")
_DATA: Final = {v2.STOP_COPY: os.O_RDONLY, v2.RESUMING: os.O_WRONLY}


class Played(Device):
    """Answers every request at once, with a clean bitmap.

    :param file: the state region; a data fd is one of it, too, but what is written goes nowhere.
    """

    def __init__(self, name: str, file: Path) -> None:
        holder = Holder(os.getpid(), "played", True, -1)
        super().__init__(name, os.open(file, os.O_RDWR | os.O_CLOEXEC), how="borrowed", holder=holder)
        self._file = file
        self._state = v2.RUNNING
        content = file.read_bytes()
        try:
            records = parse(memoryview(content), image_max=len(content)).records
        except ImageError:  # a stream of no layout that anybody knows
            records = {}
        self._seen = {name: bytes(records[name].payload) for name in ("CFG_SPACE", "VREG") if name in records}

    def call(self, request: Request, arg: Any = 0) -> int:
        """Keep the state that is set, and give the data fd that belongs to it."""
        if request is not uapi.DEVICE_FEATURE:
            return 0
        if len(arg) != _STATE.size:
            raise DeviceError("it has no more than states", device=self.name, errno=errno.ENOTTY)
        size, flags, state, fd = _STATE.unpack(arg)
        if flags == v2.SET | v2.DEVICE_STATE:
            self._state = state
            if state in _DATA:
                writes = _DATA[state] == os.O_WRONLY
                fd = os.open(os.devnull if writes else self._file, _DATA[state] | os.O_CLOEXEC)
        _STATE.pack_into(arg, 0, size, flags, self._state, fd)
        return 0

    def region(self, index: int) -> Region:
        """Return a region that is the file."""
        return Region(index, 3, self._file.stat().st_size, 0, None, None, (), ())

    def config(self, offset: int, size: int) -> bytes:
        """Return what the state has of the configuration space."""
        return self._seen["CFG_SPACE"][offset : offset + size]

    def pread(self, region: Region, offset: int, size: int) -> bytes:
        """Return what the state has of the registers."""
        del region
        return self._seen["VREG"][offset : offset + size]

    def pwrite(self, region: Region, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Take what is written, and leave the file as it is."""
        del region, offset
        with open(os.devnull, "wb", buffering=0) as sink:  # noqa: PTH123 -- no file
            sink.write(data)


def _protocol(name: str, device: Played) -> MigrationProtocol:
    if name == MainlineV2.name:
        return MainlineV2(device, v2.STOP_COPY_FLAG)
    return GvtRfc(device, DEFAULT_PROFILE, device.region(DEFAULT_PROFILE.state_index))


def play(protocol: str, file: Path) -> None:
    """Have every device that is opened from now on in this process be one that *file* plays."""

    def opened(name: str, settings: Any = None, *, job: Any = None, **_: object) -> Session:
        found = HostDevice(name, "/", "mdev", TYPE, "", TYPE, None)
        lock = DeviceLock(found, job)
        device = Played(name, file)
        session = Session(found, device, _protocol(protocol, device), lock, settings)
        lock.take_over(None)
        return session

    def survey(*_: object) -> SimpleNamespace:
        return SimpleNamespace(find=lambda name: name)

    for module, name, by in (
        (jobs, "open_session", opened),
        (sessions, "survey", survey),
        (sessions, "require_holder", survey),
    ):
        setattr(module, name, by)


def status(protocol: str) -> str:
    """Return what ``status`` prints of such a device."""
    return json.dumps({"state": "running", "type": TYPE, "protocol": protocol, "migratable": True})


def rsh(directory: Path, protocol: str, file: Path) -> Path:
    """Write what a migration calls in place of ssh: its target is such a device, in a process of its own."""
    program = directory / "rsh"
    words = f"{sys.executable} -m {__spec__.name} {protocol} {file}"
    program.write_text(f'#!/bin/sh\nshift\neval "exec {words} ${{1#vfio-mig }}"\n')
    program.chmod(0o700)
    return program


if __name__ == "__main__":
    if "status" in sys.argv[3:]:
        print(status(sys.argv[1]))
        sys.exit(0)
    play(sys.argv[1], Path(sys.argv[2]))
    del sys.argv[1:3]
    from vfio_mig.cli import main

    main()
