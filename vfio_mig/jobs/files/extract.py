# SPDX-License-Identifier: MIT
"""``extract`` and ``pack``: a saved device as files, and an image made of them again. No device is needed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vfio_mig.errors import ImageError, UsageError
from vfio_mig.jobs.files.inspect import problems_of
from vfio_mig.jobs.files.open_file import open_saved
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.decode.qemu_parts import QemuStream
    from vfio_mig.image.bytesource import ByteSource
    from vfio_mig.image.directory import NewDirectory
    from vfio_mig.jobs.files.open_file import Saved

_STEP: Final = 1 << 20
STDOUT: Final = "-"
INCOMPLETE: Final = ".incomplete"
"""What the name of a state that is not whole ends with."""


@dataclass(frozen=True, kw_only=True)
class ExtractReport(Report):
    """What was written.

    :param kind: of *file*: ``image`` or ``qemu-stream``.
    :param files: their names in *directory*; that of a state which is not whole ends in ``.incomplete``.
    :param complete: whether all of the file was understood, and every state is whole.
    :param problems: why not, or what is unusual.
    """

    file: str
    directory: str
    kind: str
    files: list[str]
    complete: bool
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class PackReport(Report):
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
    :raises ImageError: the image is not whole. A QEMU stream that is not whole is written as far as it goes, and the
        report says so.
    :raises HostError: the disk is full, permission is missing.
    """
    from vfio_mig.image import extract
    from vfio_mig.image.directory import NewDirectory

    problems: list[str] = []
    with open_saved(file) as saved:
        if saved.archive is None and saved.stream is None:
            raise UsageError(f"{file} is a bare state: there is nothing to extract from it", hint="see 'inspect --hex'")
        with NewDirectory(directory) as into:
            if saved.archive is not None:
                names = extract.extract(saved.archive, into)
            else:
                assert saved.stream is not None  # noqa: S101 -- for the type checker
                problems = problems_of(saved)
                names = _extract_stream(saved, saved.stream, problems, into)
    whole = saved.stream is None or (saved.stream.complete and not any(one.problem for one in saved.stream.devices))
    return ExtractReport(
        file=file, directory=directory, kind=saved.kind, files=names, complete=whole, problems=problems
    )


def _extract_stream(saved: Saved, stream: QemuStream, problems: list[str], into: NewDirectory) -> list[str]:
    """Write each VFIO device's state and QEMU's record of it: ``vfioN.state``, ``vfioN.config``, ``stream.json``.

    A state that is not whole is named so: nobody should take it for one that can be restored.
    """
    from vfio_mig.image.bytesource import PartSource, PiecesSource

    if not stream.devices:
        raise ImageError("no VFIO device in this QEMU stream", hint=stream.problems[0] if stream.problems else None)
    source = saved.source
    names: list[str] = []
    devices = []
    for number, device in enumerate(stream.devices):
        state = f"vfio{number}.state{'' if device.problem is None else INCOMPLETE}"
        kept: list[tuple[str, ByteSource]] = [(state, PiecesSource(source, device.frames))]
        if device.config is not None:
            kept.append((f"vfio{number}.config", PartSource(source, *device.config)))
        for name, part in kept:
            into.write(name, _pieces(part))
            names.append(name)
        devices.append(
            {
                "name": device.name,
                "instance": device.instance,
                "state": state,
                "state_bytes": device.state_size,
                "complete": device.problem is None,
            }
        )
    values = {
        "machine": stream.machine,
        "complete": stream.complete,
        "proved": stream.proved,
        "devices": devices,
        "problems": problems,
        "wrapping": saved.wrapping,
        "libvirt": None if saved.libvirt is None else saved.libvirt.values(),
    }
    into.write("stream.json", [(json.dumps(values, indent=1) + "\n").encode()])
    return [*names, "stream.json"]


def _pieces(source: ByteSource) -> Iterator[bytes]:
    for at in range(0, source.size, _STEP):
        yield source.read(at, _STEP)


def pack_image(directory: str, file: str, *, force: bool = False) -> PackReport:
    """Make an image of what :func:`extract_image` has written; byte by byte the same, if nothing was changed.

    It is read back and verified as a whole before it gets its name.

    :param force: replace an existing file.
    :raises ImageError: something is missing, or what was changed makes no whole image; there is no file.
    :raises UsageError: *file* exists.
    """
    from vfio_mig.image import extract
    from vfio_mig.image.archive import read_archive
    from vfio_mig.image.directory import Directory
    from vfio_mig.image.files import committed

    if file == STDOUT:
        raise UsageError("pack writes a file, which it reads back; it has no standard output", hint="name a file")
    with Directory(directory) as source, committed(file, force=force) as output:
        members = extract.pack(source, output)
        output.flush()
        with os.fdopen(os.dup(output.fileno()), "rb") as again:
            size = again.seek(0, os.SEEK_END)
            again.seek(0)
            read_archive(again).close()
    return PackReport(directory=directory, file=file, members=members, size=size)
