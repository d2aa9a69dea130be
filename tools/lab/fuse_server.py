# SPDX-License-Identifier: MIT
"""A file system that answers until its file has been opened, and then never again.

Anybody can mount one in a user and mount namespace of his own, at /dev/vfio too: ``python fuse_server.py hold DIRECTORY
NAME [overlay]`` mounts it on DIRECTORY, has a child open DIRECTORY/NAME and say its PID and the fd, and stays. With
``overlay`` it is mounted elsewhere, and an overlay of it on DIRECTORY.

Measured on such a file: readlink(2) of the fd's link, statx(2) with AT_STATX_DONT_SYNC and fdinfo end at once; stat(2)
hangs, and who has duplicated the fd cannot even be killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import stat
import struct
import sys
from pathlib import Path
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
PR_SET_PDEATHSIG: Final = 1
MS_NOSUID_NODEV: Final = 2 | 4
MS_REC_PRIVATE: Final = 1 << 14 | 1 << 18
LOOKUP, GETATTR, OPEN, STATFS, INIT, OPENDIR = 1, 3, 14, 17, 26, 27
UNANSWERED: Final = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
IN: Final = struct.Struct("=IIQQIIIHH")
OUT: Final = struct.Struct("=IiQ")
ATTR: Final = struct.Struct("=QQQQQQIIIIIIIIII")
ENTRY: Final = struct.Struct("=QQQQII")
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
FILE_NODE: Final = 2


def attributes(node: int) -> bytes:
    mode = stat.S_IFREG | 0o666 if node == FILE_NODE else stat.S_IFDIR | 0o755
    return ATTR.pack(node, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int) -> tuple[int, bytes]:
    """Return errno and body of an answer."""
    if opcode == INIT:
        return 0, INIT_OUT.pack(7, 31, 4096, 0, 4, 4, 4096, 1, 1, 0, 0)
    if opcode == LOOKUP:
        return 0, ENTRY.pack(FILE_NODE, 1, 0, 0, 0, 0) + attributes(FILE_NODE)
    if opcode == GETATTR:
        return 0, struct.pack("=QII", 0, 0, 0) + attributes(node)
    if opcode in (OPEN, OPENDIR):
        return 0, struct.pack("=QII", 1, 0, 0)
    if opcode == STATFS:
        return 0, bytes(80)
    return 38, b""  # ENOSYS


def serve(fuse: int, ready: int) -> None:
    """Answer until the file has been opened and a word comes from *ready*; then never again."""
    while True:
        readable = select.select([fuse, ready], [], [])[0]
        if ready in readable:
            signal.pause()
        request = os.read(fuse, 1 << 17)
        _, opcode, unique, node, *_ = IN.unpack_from(request)
        if opcode not in UNANSWERED:
            code, body = answer(opcode, node)
            os.write(fuse, OUT.pack(OUT.size + len(body), -code, unique) + body)


def mount(source: str, target: str, kind: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), MS_NOSUID_NODEV, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind}")


def leave(libc: ctypes.CDLL) -> None:
    """Go into a user and mount namespace of its own; in a chroot, as the VM's root may be, into a mount namespace."""
    user, group = os.geteuid(), os.getegid()
    if not libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{file}").write_text(text, encoding="ascii")
    elif ctypes.get_errno() != errno.EPERM or libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    # What is mounted here is nobody else's to see
    if libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "mount --make-rprivate /")


def main() -> None:
    _, directory, name, *more = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    leave(libc)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    mount("none", "/mnt" if more else directory, "fuse", f"fd={fuse},rootmode=40000,user_id=0,group_id=0")
    ready, opened = os.pipe()
    # Another process: who serves a file and waits for it could not even be killed
    if not os.fork():
        os.close(fuse)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if more:
            mount("none", directory, "overlay", "lowerdir=/mnt:/run")
        fd = os.open(f"{directory}/{name}", os.O_RDONLY)
        os.write(opened, b"x")
        print(os.getpid(), fd, flush=True)
        signal.pause()
    serve(fuse, ready)


if __name__ == "__main__":
    main()
