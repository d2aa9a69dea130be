# SPDX-License-Identifier: MIT
"""``extract`` and ``pack``: a saved device as files, and an image made of them again. No device is needed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import ImageError, UsageError
from vfio_mig.jobs.saved import open_saved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.image.decode.qemu import QemuStream
    from vfio_mig.image.directory import NewDirectory
    from vfio_mig.image.window import Window

_STEP: Final = 1 << 20
STDOUT: Final = "-"


class ExtractReport(NamedTuple):
    """What was written.

    :param kind: of *file*: ``image`` or ``qemu-stream``.
    :param files: their names in *directory*.
    """

    file: str
    directory: str
    kind: str
    files: list[str]


class PackReport(NamedTuple):
    """An image that was made; *size* in bytes, without the manifest *members* members."""

    directory: str
    file: str
    members: int
    size: int


def extract_image(file: str, directory: str) -> ExtractReport:
    """Write what is in an image, or the VFIO devices in a QEMU stream, to files in a new directory, 0600.

    :param file: ``-`` for standard input.
    :param directory: must not exist, or be empty. After a failure nothing is left in it.
    :raises UsageError: there is something in it, or the file is a bare state.
    :raises ImageError: the image is not whole.
    :raises HostError: the disk is full, permission is missing.
    """
    from vfio_mig.image import parts
    from vfio_mig.image.directory import NewDirectory

    with open_saved(file) as saved:
        if saved.archive is None and saved.stream is None:
            raise UsageError(f"{file} is a bare state: there is nothing to extract from it", hint="see 'inspect --hex'")
        with NewDirectory(directory) as into:
            if saved.archive is not None:
                names = parts.extract(saved.archive, into)
            else:
                assert saved.stream is not None  # noqa: S101 -- for the type checker
                names = _extract_stream(saved.window, saved.stream, into)
    return ExtractReport(file, directory, saved.kind, names)


def _extract_stream(window: Window, stream: QemuStream, into: NewDirectory) -> list[str]:
    """Write each VFIO device's state and QEMU's record of it: ``vfioN.state``, ``vfioN.config``, ``stream.json``."""
    from vfio_mig.image.window import FramesWindow, PartWindow

    if not stream.devices:
        raise ImageError("no VFIO device in this QEMU stream", hint=stream.problems[0] if stream.problems else None)
    names: list[str] = []
    devices = []
    for number, device in enumerate(stream.devices):
        kept: list[tuple[str, Window]] = [(f"vfio{number}.state", FramesWindow(window, device.frames))]
        if device.config is not None:
            kept.append((f"vfio{number}.config", PartWindow(window, *device.config)))
        for name, part in kept:
            into.write(name, _pieces(part))
            names.append(name)
        devices.append({"name": device.name, "instance": device.instance, "state_bytes": device.state_size})
    values = {"machine": stream.machine, "complete": stream.complete, "devices": devices, "problems": stream.problems}
    into.write("stream.json", [(json.dumps(values, indent=1) + "\n").encode()])
    return [*names, "stream.json"]


def _pieces(window: Window) -> Iterator[bytes]:
    for at in range(0, window.size, _STEP):
        yield window.read(at, _STEP)


def pack_image(directory: str, file: str, *, force: bool = False) -> PackReport:
    """Make an image of what :func:`extract_image` has written; byte by byte the same, if nothing was changed.

    It is read back and verified as a whole before it gets its name.

    :param force: replace an existing file.
    :raises ImageError: something is missing, or what was changed makes no whole image; there is no file.
    :raises UsageError: *file* exists.
    """
    from vfio_mig.image import parts
    from vfio_mig.image.archive import read_archive
    from vfio_mig.image.directory import Directory
    from vfio_mig.image.files import committed

    if file == STDOUT:
        raise UsageError("pack writes a file, which it reads back; it has no standard output", hint="name a file")
    with Directory(directory) as source, committed(file, force=force) as output:
        members = parts.pack(source, output)
        output.flush()
        with os.fdopen(os.dup(output.fileno()), "rb") as again:
            size = again.seek(0, os.SEEK_END)
            again.seek(0)
            read_archive(again).close()
    return PackReport(directory, file, members, size)
