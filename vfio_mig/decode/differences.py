# SPDX-License-Identifier: MIT
"""What differs between two saved devices, by name: configuration, registers, GGTT entries, queue, bitmaps, pages."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.decode import gvt_ext, pci, registers, streams
from vfio_mig.decode import gvt_image as gvt
from vfio_mig.decode.gtt import ADDRESS, PRESENT, Table, changed_runs
from vfio_mig.decode.section import LISTED_MAX, plain
from vfio_mig.errors import ImageError
from vfio_mig.image.bytesource import PartSource
from vfio_mig.ranges import PAGE
from vfio_mig.uapi.profile import IMAGE_LARGEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from vfio_mig.decode.gvt_image import GvtImage
    from vfio_mig.decode.section import Section
    from vfio_mig.image.archive import Archive
    from vfio_mig.image.bytesource import ByteSource

_HEADER_KEYS: Final = ("protocol", "kernel", "machine")
_DEVICE_KEYS: Final = ("kind", "type", "driver")
"""Which device it was (``name``), when and by what it was saved says nothing of its state, so it is not compared."""
_VALUE_SIZE: Final = 32
"""Bytes of a changed run that are shown."""
_STEP: Final = 1 << 20
_STREAM_PARTS: Final = ("stream", "filler", "records")


class Difference(NamedTuple):
    """One thing that is not the same.

    :param section: where: a section of ``inspect``, ``image`` (the header), ``dirty`` or ``pages``.
    :param name: what: a field, a register, ``gma 0x…``, ``gpa 0x…``.
    :param offset: of a register in BAR0 or of bytes in their section; a graphics or guest-physical address. Bytes.
    :param size: bytes that it covers; 0 where that has no meaning.
    :param old: its value in the first image, None where it has none; bytes as hexadecimal digits.
    :param new: its value in the second.
    """

    section: str
    name: str
    offset: int
    size: int
    old: Any
    new: Any


class Found(NamedTuple):
    """The differences in one section: at most LISTED_MAX are listed.

    :param total: how many there are in all; of ``pages``, how many pages.
    """

    section: str
    total: int
    listed: list[Difference]


def _collect(section: str, found: Iterable[Difference]) -> Iterator[Found]:
    kept: list[Difference] = []
    count = 0
    for one in found:
        count += 1
        if len(kept) < LISTED_MAX:
            kept.append(one)
    if count:
        yield Found(section, count, kept)


def header_differences(first: Archive | None, second: Archive | None) -> Iterator[Found]:
    """Compare what the headers say of the device."""
    if first is None or second is None:
        return
    yield from _collect("image", _header(first.header, second.header))


def _header(first: dict[str, Any], second: dict[str, Any]) -> Iterator[Difference]:
    devices = [one if isinstance(one := header.get("device"), dict) else {} for header in (first, second)]
    for key in _HEADER_KEYS:
        if first.get(key) != second.get(key):
            yield Difference("image", key, 0, 0, plain(first.get(key)), plain(second.get(key)))
    for key in _DEVICE_KEYS:
        old, new = (device.get(key) for device in devices)
        if old != new:
            yield Difference("image", f"device.{key}", 0, 0, plain(old), plain(new))


def state_differences(first: ByteSource, second: ByteSource, driver: str = "") -> Iterator[Found]:
    """Compare two states: by name where both are of a layout that is known, else by byte."""
    if first.size <= IMAGE_LARGEST and second.size <= IMAGE_LARGEST:
        contents = [source.read(0, source.size) for source in (first, second)]
        if contents[0] == contents[1]:
            return
        try:
            images = [gvt.parse(memoryview(content), image_max=IMAGE_LARGEST) for content in contents]
        except ImageError:
            pass
        else:
            yield from gvt_differences(images[0], images[1])
            return
    decoded = [streams.decode(source, driver=driver) for source in (first, second)]
    if decoded[0].layout == decoded[1].layout == "gvt_sample":
        inner = [_inner_image(source, one.sections) for source, one in zip((first, second), decoded, strict=True)]
        if inner[0] is not None and inner[1] is not None:
            yield from gvt_differences(inner[0], inner[1])
            yield from _collect("stream", _sample_stream(first, second, decoded[0].sections, decoded[1].sections))
            return
    if decoded[0].layout == decoded[1].layout == "mtty" and not decoded[0].problems + decoded[1].problems:
        ports = [{section.name: section.values for section in one.sections} for one in decoded]
        yield from _collect("state", _values("state", ports[0], ports[1]))
        return
    yield from _collect("state", _bytes("state", first, second))


def _inner_image(source: ByteSource, sections: list[Section]) -> GvtImage | None:
    """Parse the RFC's image at the end of our sample's stream; None for one that is not as it should be."""
    for section in sections:
        if section.name == "records":
            at, size = section.values["image_at"], section.values["image"]
            if size > IMAGE_LARGEST or at + size != source.size:
                return None
            try:
                return gvt.parse(memoryview(source.read(at, size)), image_max=IMAGE_LARGEST)
            except ImageError:
                return None
    return None


def _sample_stream(
    first: ByteSource, second: ByteSource, old: list[Section], new: list[Section]
) -> Iterator[Difference]:
    """Compare what is before the image: another seed makes another filler, so it is compared if the rest is equal."""
    parts = [{one.name: one.values for one in sections if one.name in _STREAM_PARTS} for sections in (old, new)]
    if parts[0] != parts[1]:
        yield from _values("stream", parts[0], parts[1])
        return
    before = parts[0]["records"]["image_at"]
    yield from _bytes("stream", *(PartSource(source, 0, before) for source in (first, second)))


def _values(section: str, first: Any, second: Any, name: str = "") -> Iterator[Difference]:
    """Compare decoded values, object by object."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            yield from _values(section, first.get(key), second.get(key), f"{name}.{key}" if name else str(key))
    elif first != second:
        yield Difference(section, name, 0, 0, first, second)


def _bytes(section: str, first: ByteSource, second: ByteSource) -> Iterator[Difference]:
    """Compare byte by byte: runs of bytes that differ, and what one has more than the other."""
    common = min(first.size, second.size)
    for at in range(0, common, _STEP):
        old, new = (source.read(at, min(_STEP, common - at)) for source in (first, second))
        if old != new:
            for start, end in _runs(_unequal(old, new, "u1")):
                yield _bytes_changed(section, at + start, old[start:end], new[start:end])
    if first.size != second.size:
        yield Difference(section, "size", common, 0, first.size, second.size)


def _bytes_changed(section: str, at: int, old: bytes, new: bytes) -> Difference:
    return Difference(section, f"{at:#x}", at, len(old), old[:_VALUE_SIZE].hex(), new[:_VALUE_SIZE].hex())


def _unequal(old: bytes, new: bytes, kind: str) -> NDArray[np.int64]:
    """Return the numbers of the words that differ; *kind* is numpy's name of a word."""
    import numpy as np

    # No !=: a fuzzer that traces comparisons (atheris 3.0) keeps the result of each for ever, as large as it is here
    return np.flatnonzero(np.not_equal(np.frombuffer(old, kind), np.frombuffer(new, kind)))


def _runs(places: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of rising numbers that follow each other."""
    import numpy as np

    if not len(places):
        return
    breaks = np.flatnonzero(np.diff(places) != 1)
    starts = np.concatenate(([0], breaks + 1))
    ends = np.append(breaks, len(places) - 1)
    for start, end in zip(starts, ends, strict=True):
        yield int(places[start]), int(places[end]) + 1


def gvt_differences(first: GvtImage, second: GvtImage) -> Iterator[Found]:
    """Compare two GVT-g images by what their parts mean; what no kernel sets on purpose is left out.

    That is HEAD's global data, the padding in PPGTT entries, and bytes behind data_size.
    """
    yield from _collect("header", _values("header", _head(first), _head(second)))
    yield from _collect("cfg", _config(first, second))
    for name, section in (("SREG", "sreg"), ("VREG", "vreg")):
        if all(name in image.records and _is_plain(image, name) for image in (first, second)):
            old, new = (bytes(image.records[name].payload) for image in (first, second))
            yield from _collect(section, _registers(section, old, new))
    yield from _collect("ext", _values("ext", _ext(first), _ext(second)))
    yield from _collect("gtt", _table(first, second))
    yield from _collect("ppgtt", _sequence("ppgtt", "root", first.ppgtt, second.ppgtt))
    yield from _collect("workload", _sequence("workload", "workload", first.workloads, second.workloads))


def _is_plain(image: GvtImage, record: str) -> bool:
    """Tell whether a record is registers alone; our kvmgt has its own in SREG."""
    return record != "SREG" or image.ext is None


def _ext(image: GvtImage) -> dict[str, Any]:
    """Return what our kvmgt adds, but for what follows from the rest."""
    found = {} if image.ext is None else gvt_ext.words(image.ext)
    return {name: value for name, value in found.items() if name not in {"crc", "size"}}


def _head(image: GvtImage) -> dict[str, Any]:
    version, _, crc = struct.unpack_from("<iiQ", image.records["HEAD"].payload)
    return {"version": version, "crc": crc, "dialect": image.dialect, "records": list(image.records)}


def _config(first: GvtImage, second: GvtImage) -> Iterator[Difference]:
    old, new = (bytes(image.records["CFG_SPACE"].payload) for image in (first, second))
    seen = -1
    for at in range(min(len(old), len(new))):
        if old[at] == new[at] or at <= seen:
            continue
        name, start, size = pci.field_at(at)
        seen = start + size - 1
        values = [int.from_bytes(config[start : start + size], "little") for config in (old, new)]
        yield Difference("cfg", name, start, size, *values)
    if len(old) != len(new):
        yield Difference("cfg", "size", min(len(old), len(new)), 0, len(old), len(new))


def _registers(section: str, old: bytes, new: bytes) -> Iterator[Difference]:
    """Compare registers: those with a name one by one, fences whole, others in runs."""
    changed = [int(word) * 4 for word in _unequal(old, new, "<u4")]
    named = section == "vreg"
    pending: list[int] = []
    done_fence = -1
    for at in changed:
        is_named = named and registers.is_named(at)
        if pending and (is_named or at != pending[-1] + 4):
            yield _words(section, pending, old, new)
            pending = []
        if not is_named:
            pending.append(at)
            continue
        fence = (at - registers.FENCES_AT) // 8
        if 0 <= fence < registers.FENCES_MAX:
            if fence != done_fence:
                yield _fence(fence, old, new)
            done_fence = fence
        else:
            values = [int.from_bytes(words[at : at + 4], "little") for words in (old, new)]
            yield Difference(section, registers.register_name(at), at, 4, *values)
    if pending:
        yield _words(section, pending, old, new)


def _words(section: str, places: list[int], old: bytes, new: bytes) -> Difference:
    start, end = places[0], places[-1] + 4
    if len(places) == 1:
        values = [int.from_bytes(words[start:end], "little") for words in (old, new)]
        return Difference(section, f"{start:#x}", start, 4, *values)
    return _bytes_changed(section, start, old[start:end], new[start:end])


def _fence(number: int, old: bytes, new: bytes) -> Difference:
    at = registers.FENCES_AT + 8 * number
    values = [int.from_bytes(words[at : at + 8], "little") for words in (old, new)]
    return Difference("vreg", f"fence{number}", at, 8, *(registers.fence(value) for value in values))


def _table(first: GvtImage, second: GvtImage) -> Iterator[Difference]:
    """Compare the GGTTs: runs of graphics addresses, with the guest-physical address that each began at."""
    old, new = Table(first), Table(second)
    for mine, its in zip(old.parts, new.parts, strict=True):
        if (mine.base, mine.size) != (its.base, its.size):
            yield Difference("gtt", f"{mine.name} memory", mine.base, 0, [mine.base, mine.size], [its.base, its.size])
        entries = [table.of(part) for table, part in ((old, mine), (new, its))]
        common = min(len(one) for one in entries)
        starts, lengths = changed_runs(entries[0][:common], entries[1][:common])
        for start, length in zip(starts, lengths, strict=True):
            at = mine.base + int(start) * PAGE
            values = (_entry(int(one[start])) for one in entries)
            yield Difference("gtt", f"gma {at:#x}", at, int(length) * PAGE, *values)


def _entry(value: int) -> dict[str, Any] | None:
    """Say what an entry is: nothing for one that is not present."""
    return {"gpa": value & ADDRESS, "entry": value} if value & PRESENT else None


def _sequence(section: str, what: str, first: list[Any], second: list[Any]) -> Iterator[Difference]:
    for number in range(max(len(first), len(second))):
        old, new = (one[number]._asdict() if number < len(one) else None for one in (first, second))
        if old != new:
            yield Difference(section, f"{what} {number}", number, 0, old, new)
