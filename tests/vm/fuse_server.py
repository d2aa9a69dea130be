# SPDX-License-Identifier: MIT
"""A file system that answers until its file has been opened, and then never again.

Anybody can mount one in a user and mount namespace of his own, at /dev/vfio too: ``python fuse_server.py hold DIRECTORY
NAME [overlay]`` mounts it on DIRECTORY, opens DIRECTORY/NAME, says the fd, and stays. With ``overlay`` it is mounted
elsewhere, and an overlay of it on DIRECTORY.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
import threading
from pathlib import Path
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
MS_NOSUID_NODEV: Final = 2 | 4
LOOKUP, FORGET, GETATTR, OPEN, STATFS, FLUSH, INIT, OPENDIR = 1, 2, 3, 14, 17, 25, 26, 27
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
    return 38, b""  # ENOSYS


def serve(fuse: int, is_silent: threading.Event) -> None:
    while True:
        request = os.read(fuse, 1 << 17)
        _, opcode, unique, node, *_ = IN.unpack_from(request)
        if opcode == FORGET:
            continue
        if is_silent.is_set():
            threading.Event().wait()  # whoever asks now waits for ever
        code, body = answer(opcode, node)
        os.write(fuse, OUT.pack(OUT.size + len(body), -code, unique) + body)


def mount(source: str, target: str, kind: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), MS_NOSUID_NODEV, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind}")


def main() -> None:
    _, directory, name, *more = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{file}").write_text(text, encoding="ascii")
    fuse = os.open("/dev/fuse", os.O_RDWR)
    is_silent = threading.Event()
    threading.Thread(target=serve, args=(fuse, is_silent), daemon=True).start()
    mount("none", "/mnt" if more else directory, "fuse", f"fd={fuse},rootmode=40000,user_id=0,group_id=0")
    if more:
        mount("none", directory, "overlay", "lowerdir=/mnt:/run")
    fd = os.open(f"{directory}/{name}", os.O_RDONLY)
    is_silent.set()
    print(fd, flush=True)  # noqa: T201 -- to whoever has started it
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
