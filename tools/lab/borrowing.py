# SPDX-License-Identifier: MIT
"""A second fd of a device that another process holds."""

import fcntl
import os

from tools.lab.vfio.raw import GROUP_GET_DEVICE_FD
from vfio_mig.host.discover import Host
from vfio_mig.host.holders import duplicate_fd, find_holder


def borrowed_fd(name: str) -> int:
    """Return a second fd of a held device."""
    found = Host().find(name)
    holder = find_holder(found)
    if holder is None:
        raise RuntimeError(f"nobody holds {name}")
    fd = duplicate_fd(found, holder)
    if holder.node != found.node:
        return fd
    try:
        return int(fcntl.ioctl(fd, GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0"), True))
    finally:
        os.close(fd)
