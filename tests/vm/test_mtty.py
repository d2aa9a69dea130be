# SPDX-License-Identifier: MIT
"""The kernel's own sample of the migration protocol v2, samples/vfio-mdev/mtty.c, unchanged: `scripts/vm --mtty`."""

from __future__ import annotations

import errno
import os
import struct
import uuid
from pathlib import Path

import pytest

from tools.lab import mtty
from tools.lab.sample import host
from tools.lab.vfio import v2

pytestmark = pytest.mark.mtty

ONE_PORT = "mtty-1"
SCRATCH = 7  # the UART's register that does nothing
HEADER = struct.Struct("<QIIII")  # magic, major, minor, ports, flags
MAGIC = 0x7E9D09898C3E2C4E
PORT_SIZE = 36  # its registers come first


def test_a_stopped_mtty_gives_its_state_to_the_end_and_runs_again() -> None:
    name = str(uuid.uuid4())
    (mtty.TYPES / ONE_PORT / "create").write_text(name)  # whatever is left of it goes with the test
    with v2.Device.opened(host.Instance(name, ONE_PORT)) as device:
        expected = v2.FLAG_STOP_COPY | v2.FLAG_P2P | v2.FLAG_PRE_COPY
        assert device.flags() == expected
        assert device.state() == v2.RUNNING
        device.write(0, SCRATCH, b"\x5a")

        assert device.go(v2.STOP) == -1
        assert device.state() == v2.STOP
        states = []
        for _ in range(2):  # a second session reads the same
            data_fd = device.go(v2.STOP_COPY)
            try:
                assert device.state() == v2.STOP_COPY
                assert str(Path(f"/proc/self/fd/{data_fd}").readlink()) == "anon_inode:mtty_mig"
                states.append(v2.read_all(data_fd, 7))
                assert os.read(data_fd, 1) == b""  # the end stays the end
                assert device.go(v2.STOP) == -1
                with pytest.raises(OSError) as caught:
                    os.read(data_fd, 1)
                assert caught.value.errno == errno.ENODEV
            finally:
                os.close(data_fd)

        assert states[0] == states[1]
        assert HEADER.unpack_from(states[0]) == (MAGIC, 1, 0, 1, 0)
        assert len(states[0]) == HEADER.size + PORT_SIZE
        assert states[0][HEADER.size + SCRATCH] == 0x5A

        assert device.go(v2.RUNNING) == -1
        assert device.state() == v2.RUNNING
        assert device.read(0, SCRATCH, 1) == b"\x5a"
