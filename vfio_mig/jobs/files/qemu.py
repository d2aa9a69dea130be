# SPDX-License-Identifier: MIT
"""Between an image and a QEMU migration stream, both ways: a device of a stream as an image, and back into one.

A stream says nothing of a device but its address in the VM, and, where it is a PCI device, the IDs that the guest sees.
So the image's header has null for what it cannot know: type, driver, kernel and machine. What the state is good for
is then for the device's driver to judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from vfio_mig.errors import ImageError, MismatchError, UsageError, excerpt
from vfio_mig.jobs.files.open_file import IMAGE, open_saved
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfio_mig.decode.qemu_parts import QemuStream, VfioDevice
    from vfio_mig.image.bytesource import ByteSource
    from vfio_mig.jobs.files.open_file import Saved

STDOUT: Final = "-"
PROTOCOL: Final = "mainline-v2"
_STEP: Final = 1 << 16
"""Bytes that are copied in one go, and become a hole if they are zeros."""
_ZEROS: Final = bytes(_STEP)
_NAMES_MAX: Final = 40
"""Names of devices that a message lists."""
_NO_LAYOUT: Final = frozenset({"unknown", "mlx5-or-virtio"})
"""What does not tell whose state it is."""


@dataclass(frozen=True, kw_only=True)
class DeviceExtractReport(Report):
    """A device of a QEMU stream that was made an image.

    :param file: the stream.
    :param image: what was made.
    :param device: name of the device's section in the stream.
    :param layout: of the state; ``unknown`` if it is not known.
    :param problems: what is unusual about the stream.
    """

    file: str
    image: str
    device: str
    layout: str
    state_bytes: int
    size: int
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class StreamPackReport(Report):
    """A QEMU stream that was made of another one and an image.

    :param image: whose state it has.
    :param stream: what it was made of.
    :param file: what was made; *size* in bytes.
    :param device: name of the device's section in the stream.
    :param state_bytes: of the device's state in the new stream; *old_state_bytes*: in the one that it was made of.
    :param warnings: what of the image or the stream the user must know.
    """

    image: str
    stream: str
    file: str
    device: str
    state_bytes: int
    old_state_bytes: int
    size: int
    warnings: list[str]


def _require_stream(saved: Saved, file: str) -> QemuStream:
    if saved.stream is None:
        raise UsageError(f"{file} is no QEMU migration stream", hint="'vfio-mig inspect' says what it is")
    return saved.stream


def choose_device(stream: QemuStream, name: str | None) -> VfioDevice:
    """Return a VFIO device of a stream.

    :param name: of its section, as ``0000:00:03.0/vfio``, or ``vfioN``, as ``inspect`` counts them; None: the only one.
    :raises ImageError: the stream has none.
    :raises UsageError: it has no such device, or several and none is named.
    """
    devices = stream.devices
    if not devices:
        raise ImageError("no VFIO device in this QEMU stream", hint=stream.problems[0] if stream.problems else None)
    listed = [f"vfio{number} ({excerpt(device.name)})" for number, device in enumerate(devices[:_NAMES_MAX])]
    hint = f"it has {', '.join(listed)}{', …' if len(devices) > _NAMES_MAX else ''}"
    if name is None:
        if len(devices) > 1:
            raise UsageError(f"{len(devices)} VFIO devices in this QEMU stream: choose one with --device", hint=hint)
        return devices[0]
    numbered = [device for number, device in enumerate(devices) if name == f"vfio{number}"]
    found = numbered or [device for device in devices if device.name == name]
    if len(found) > 1:
        raise UsageError(f"{len(found)} devices of the stream are called {name!r}: choose by number", hint=hint)
    if not found:
        raise UsageError(f"no VFIO device {name!r} in this QEMU stream", hint=hint)
    return found[0]


def device_names(file: str) -> list[str]:
    """Return the names of a stream's VFIO devices that :func:`choose_device` takes.

    :raises VfioMigError: it is no stream, or cannot be read.
    """
    with open_saved(file) as saved:
        devices = _require_stream(saved, file).devices
    return [*(device.name for device in devices), *(f"vfio{number}" for number in range(len(devices)))]


def _header(stream: QemuStream, device: VfioDevice, source: ByteSource) -> dict[str, Any]:
    """Return what the image's header can say of a device."""
    from vfio_mig.decode.qemu_parts import device_config
    from vfio_mig.image.bytesource import PartSource
    from vfio_mig.version import __version__

    known: dict[str, Any] = {}
    if device.config is not None:
        part = PartSource(source, *device.config)
        config = device_config(part.read(0, part.size))
        if "vendor" in config and "device" in config:
            known["pci"] = f"{config['vendor']:04x}:{config['device']:04x}"
    return {
        "protocol": PROTOCOL,
        "device": {"name": device.name, "kind": None, "type": None, "driver": None, **known},
        "kernel": None,
        "machine": None,
        "memory": {"content": "none", "guest_paused": False},
        "qemu": {"machine": stream.machine, "section": device.name, "instance": device.instance},
        "program": f"vfio-mig {__version__}",
    }


def _blocks(source: ByteSource) -> Iterator[bytes]:
    for at in range(0, source.size, _STEP):
        wanted = min(_STEP, source.size - at)
        block = source.read(at, wanted)
        if len(block) != wanted:
            raise ImageError("it became shorter while it was read")
        yield block


def extract_device(file: str, image: str, *, device: str | None = None, force: bool = False) -> DeviceExtractReport:
    """Make an image of a VFIO device in a QEMU migration stream.

    :param file: the stream, ``-`` for standard input.
    :param device: name of its section, or ``vfioN``; None: the only one.
    :param force: replace an existing file.
    :raises UsageError: no such device, or *image* exists.
    :raises ImageError: the stream or the device's state in it is not whole; there is no image.
    """
    from vfio_mig.decode import streams
    from vfio_mig.image.bytesource import PiecesSource
    from vfio_mig.image.files import committed
    from vfio_mig.jobs.files.inspect import problems_of

    if image == STDOUT:
        raise UsageError("extract writes a file; it has no standard output", hint="name a file")
    with open_saved(file) as saved:
        stream = _require_stream(saved, file)
        chosen = choose_device(stream, device)
        with committed(image, force=force) as output:
            size = write_image(saved, chosen, output)
        state = PiecesSource(saved.source, chosen.frames)
        return DeviceExtractReport(
            file=file,
            image=image,
            device=chosen.name,
            layout=streams.decode(state).layout,
            state_bytes=state.size,
            size=size,
            problems=problems_of(saved),
        )


def write_image(saved: Saved, device: VfioDevice, output: BinaryIO) -> int:
    """Write an image of a device in an open stream; returns its bytes.

    :raises ImageError: stream or state are not whole; nothing is written.
    """
    from vfio_mig.image.bytesource import PiecesSource
    from vfio_mig.image.writer import ArchiveWriter

    assert saved.stream is not None  # noqa: S101 -- for the type checker
    _require_whole(saved.stream, device)
    writer = ArchiveWriter(output, _header(saved.stream, device, saved.source))
    writer.add_state(_blocks(PiecesSource(saved.source, device.frames)))
    writer.finish({})
    output.flush()
    return output.tell()


def _require_whole(stream: QemuStream, device: VfioDevice) -> None:
    hint = "'vfio-mig extract' without --device writes what there is"
    if device.problem is not None:
        raise ImageError(f"{excerpt(device.name)}: {device.problem}", hint=hint)
    if not stream.complete:
        raise ImageError(f"the stream is not understood to its end: {stream.problems[0]}", hint=hint)


def pack_stream(
    image: str, file: str, *, stream: str, device: str | None = None, force: bool = False
) -> StreamPackReport:
    """Make a QEMU migration stream of another one, in which a VFIO device has an image's state.

    It is read back, and the state in it compared with the image's, before it gets its name. Everything else is the
    stream's own: guest memory, the other devices, QEMU's record of this device's configuration space.

    :param stream: what QEMU has written of the same VM; may have libvirt's header in front.
    :param device: name of the device's section in it, or ``vfioN``; None: the only one.
    :param force: replace an existing file.
    :raises MismatchError: the image is of a device of another kind.
    :raises ImageError: the image or the stream is not whole, or no state can be replaced in it; there is no new file.
    :raises UsageError: no such device, or *file* exists.
    """
    from vfio_mig.image.bytesource import PiecesSource
    from vfio_mig.image.files import committed

    if file == STDOUT:
        raise UsageError("pack writes a file, which it reads back; it has no standard output", hint="name a file")
    with open_saved(image) as saved, open_saved(stream) as old:
        if saved.kind != IMAGE:
            raise UsageError(
                f"{image} is no image ({saved.kind})", hint="with --into, pack takes one that 'save' wrote"
            )
        parsed = _require_stream(old, stream)
        chosen = choose_device(parsed, device)
        if old.before is None:
            raise UsageError(
                f"{stream} is compressed ({', '.join(old.wrapping)})", hint="unpack it first: QEMU reads it so as well"
            )
        _require_same_kind(saved, old.source, chosen)
        with committed(file, force=force) as output:
            size = write_stream(old, chosen, saved.source, output)
        return StreamPackReport(
            image=image,
            stream=stream,
            file=file,
            device=chosen.name,
            state_bytes=saved.source.size,
            old_state_bytes=PiecesSource(old.source, chosen.frames).size,
            size=size,
            warnings=list(_warnings(saved, parsed)),
        )


def write_stream(old: Saved, device: VfioDevice, state: ByteSource, output: BinaryIO) -> int:
    """Write what an open stream's file holds, with another state of a device, and read it back; returns its bytes.

    :param old: a stream that is not compressed.
    :param output: an empty file.
    :raises ImageError: the state cannot be replaced in this stream, or what was written is not what it should be.
    """
    from vfio_mig.decode.qemu_replace import require_replaceable, with_state

    assert old.stream is not None  # noqa: S101 -- for the type checker
    assert old.before is not None  # noqa: S101 -- for the type checker
    require_replaceable(old.stream, device)
    _write_parts([old.before], output)
    _write_parts(with_state(old.source, device, state), output)
    output.truncate()
    output.flush()
    _read_back(output, old, old.stream.devices.index(device), state)
    return output.tell()


def _warnings(saved: Saved, stream: QemuStream) -> Iterator[str]:
    if saved.archive is not None and saved.archive.has_memory:
        pages = saved.archive.count_pages()
        yield f"the image's {pages} pages of guest memory are left out: the stream keeps the memory that it has"
    if not stream.proved:
        yield "the stream has no description of QEMU's that would prove where its sections are"


def _require_same_kind(saved: Saved, source: ByteSource, device: VfioDevice) -> None:
    """Refuse the state of a device that is not of the kind that the stream has, as far as the two tell it."""
    from vfio_mig.decode import streams
    from vfio_mig.image.bytesource import PiecesSource

    header: dict[str, Any] = {} if saved.archive is None else saved.archive.header
    if header.get("protocol") != PROTOCOL:
        raise MismatchError(
            f"the image's protocol is {excerpt(header.get('protocol'))}, and QEMU's streams have states of {PROTOCOL}",
            hint="save the device with a driver that speaks protocol v2",
        )
    if not saved.source.size:
        raise MismatchError("the image has no state")
    layouts = [
        streams.decode(saved.source, driver=saved.driver).layout,
        streams.decode(PiecesSource(source, device.frames)).layout,
    ]
    if layouts[0] != layouts[1] and _NO_LAYOUT.isdisjoint(layouts):
        raise MismatchError(f"the image's state is of layout {layouts[0]}, that of {device.name} of {layouts[1]}")


def _write_parts(parts: Iterable[ByteSource], output: BinaryIO) -> None:
    """Write parts one behind the other; whole blocks of zeros become holes, as mapped memory has them."""
    from vfio_mig import interrupts

    for part in parts:
        for block in _blocks(part):
            interrupts.check()
            if block == _ZEROS:
                output.seek(len(block), 1)
            else:
                output.write(block)


def _read_back(output: BinaryIO, old: Saved, number: int, state: ByteSource) -> None:
    """See to it that what was written is the stream it should be.

    :raises ImageError: it is not.
    """
    from vfio_mig.decode import qemu
    from vfio_mig.image.bytesource import FileSource, PartSource, PiecesSource

    assert old.before is not None  # noqa: S101 -- for the type checker
    assert old.stream is not None  # noqa: S101 -- for the type checker
    whole = FileSource(output)
    part = PartSource(whole, old.before.size, whole.size - old.before.size)
    again = qemu.read_stream(part)
    names = [[(one.name, one.instance) for one in stream.devices] for stream in (old.stream, again)]
    is_whole = again.complete and again.proved == old.stream.proved and names[0] == names[1]
    if not is_whole or again.devices[number].problem is not None:
        raise ImageError("what was written is not understood as the stream was", hint="see 'vfio-mig inspect'")
    for index, (before, after) in enumerate(zip(old.stream.devices, again.devices, strict=True)):
        expected = state if index == number else PiecesSource(old.source, before.frames)
        written = PiecesSource(part, after.frames)
        if written.size != expected.size or any(
            one != other for one, other in zip(_blocks(written), _blocks(expected), strict=True)
        ):
            raise ImageError(f"the state of {after.name} that was written is another one")
