# SPDX-License-Identifier: MIT
"""The GVT-g state image in words: shows what the strict parser, :mod:`vfio_mig.decode.gvt_image`, has accepted."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from vfio_mig.decode import commands, gvt_ext, pci, registers
from vfio_mig.decode import gvt_image as gvt
from vfio_mig.decode.gtt import Table
from vfio_mig.decode.section import LISTED_MAX, Decoded, Section, listed
from vfio_mig.errors import ImageError
from vfio_mig.uapi.profile import IMAGE_LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vfio_mig.decode.commands import PageReader
    from vfio_mig.decode.gvt_image import GvtImage, Record

LAYOUT: Final = "gvt-rfc"
NAMES: Final = {
    "HEAD": "header",
    "CFG_SPACE": "cfg",
    "SREG": "sreg",
    "VREG": "vreg",
    "GTT": "gtt",
    "PPGTT": "ppgtt",
    "WORKLOAD": "workload",
    "EXT": "ext",
}
"""Names of records: ours of a section."""
_GMCH_AT: Final = 0x50
_SWSCI_AT: Final = 0xE8
_OPREGION_AT: Final = 0xFC
_LEVELS: Final = {3: 4, 4: 1}
"""Root pointers of a page table, by its level."""


def is_image(first: bytes) -> bool:
    """Tell whether bytes begin like an image: its HEAD record."""
    return first[: gvt.RECORD.size] == gvt.RECORD.pack(gvt.HEAD, gvt.HEAD_SIZE - gvt.RECORD.size)


def no_page(_: int) -> None:
    """Have no guest memory."""


def decode(content: bytes, read_page: PageReader = no_page) -> Decoded:
    """Decode an image; one that the strict parser refuses is shown as far as its records go.

    :param content: the image; what lies behind data_size is ignored.
    :param read_page: gives pages of guest memory, for what is queued.
    """
    try:
        image = gvt.parse(memoryview(content), image_max=IMAGE_LARGEST)
    except ImageError as error:
        return Decoded(LAYOUT, list(_records(content)), [str(error)])
    return Decoded(LAYOUT, list(_sections(image, read_page)), list(image.warnings))


def _records(content: bytes) -> Iterator[Section]:
    """Yield what look like records, up to the first that does not."""
    at = 0
    kinds = {1: "HEAD", 2: "CFG_SPACE", 3: "VREG", 4: "SREG", 5: "GTT", gvt.EXT: "EXT"}
    names = {kind: NAMES[name] for kind, name in kinds.items()}
    seen: set[int] = set()
    while at + gvt.RECORD.size <= len(content):
        kind, size = gvt.RECORD.unpack_from(content, at)
        known = gvt.HEAD <= kind <= gvt.WORKLOAD or kind == gvt.EXT
        if kind in seen or not known or size > len(content) - at - gvt.RECORD.size:
            return
        seen.add(kind)
        payload_at = at + gvt.RECORD.size
        yield Section(names.get(kind, f"record{kind}"), payload_at, size, {"type": kind, "record_at": at})
        at = payload_at + size


def _head(image: GvtImage) -> dict[str, Any]:
    version, data_size, crc = struct.unpack_from("<iiQ", image.records["HEAD"].payload)
    order = [
        {"record": NAMES[one.name], "type": one.kind, "offset": one.offset, "size": len(one.payload)}
        for one in image.records.values()
    ]
    values = {"version": version, "data_size": data_size, "crc": crc, "dialect": image.dialect}
    return {**values, "vgpu_type": image.type_number, "records": order}


def config(payload: bytes) -> dict[str, Any]:
    """Decode a GVT-g vGPU's configuration space, with what only a GPU has there."""
    gmch, swsci, opregion = (struct.unpack_from("<I", payload, at)[0] for at in (_GMCH_AT, _SWSCI_AT, _OPREGION_AT))
    return {**pci.decode(payload), "gmch_control": gmch & 0xFFFF, "swsci": swsci, "opregion": opregion}


def _vreg(payload: bytes) -> dict[str, Any]:
    """List the registers that are not zero; fences and PVINFO have sections of their own."""
    import numpy as np

    words = np.frombuffer(payload, "<u4")
    places = np.flatnonzero(words) * 4
    for start, size in ((registers.PVINFO_AT, registers.PVINFO_SIZE), (registers.FENCES_AT, 8 * registers.FENCES_MAX)):
        places = places[(places < start) | (places >= start + size)]
    found = [
        {"register": registers.register_name(offset), "offset": offset, "value": int(words[offset // 4])}
        for offset in map(int, places[:LISTED_MAX])
    ]
    return {"nonzero_words": int(np.count_nonzero(words)), "registers": listed(found, len(places))}


def _sreg(payload: bytes) -> dict[str, Any]:
    import numpy as np

    return {"nonzero_words": int(np.count_nonzero(np.frombuffer(payload, "<u4")))}


def _ext(image: GvtImage) -> dict[str, Any]:
    return {} if image.ext is None else gvt_ext.words(image.ext)


def _ppgtt(image: GvtImage) -> dict[str, Any]:
    roots = [
        {"level": root.level, "pdp": list(root.pdp[: _LEVELS.get(root.level, 4)])} for root in image.ppgtt[:LISTED_MAX]
    ]
    return {"roots": listed(roots, len(image.ppgtt))}


def _workloads(image: GvtImage, table: Table, read_page: PageReader) -> dict[str, Any]:
    memory = commands.Memory(table, read_page)
    found = []
    for one in image.workloads[:LISTED_MAX]:
        queued = [{**element, **commands.ring(memory, element["lrca"])} for element in commands.elements(one.elsp)]
        found.append(
            {
                "engine": registers.ENGINES[one.ring_id],
                "ring_id": one.ring_id,
                "elsp": list(one.elsp),
                "elsp_index": one.elsp_index,
                "elements": queued,
            }
        )
    return {"workloads": listed(found, len(image.workloads))}


def _sections(image: GvtImage, read_page: PageReader) -> Iterator[Section]:
    table = Table(image)
    decoders: dict[str, Callable[[bytes], dict[str, Any]]] = {
        "HEAD": lambda _: _head(image),
        "CFG_SPACE": config,
        "SREG": _sreg,
        "EXT": lambda _: _ext(image),
        "VREG": _vreg,
        "GTT": lambda _: {"parts": table.summary()},
        "PPGTT": lambda _: _ppgtt(image),
        "WORKLOAD": lambda _: _workloads(image, table, read_page),
    }
    for record in image.records.values():
        payload = bytes(record.payload)
        yield Section(NAMES[record.name], _payload_at(record), len(payload), decoders[record.name](payload))
        if record.name == "VREG":
            yield from _inside_vreg(_payload_at(record), payload)
        if record.name == "SREG" and image.ext is not None:
            yield Section("ext", image.ext.offset, len(image.ext.content), _ext(image))


def _payload_at(record: Record) -> int:
    return record.offset + gvt.RECORD.size


def _inside_vreg(at: int, payload: bytes) -> Iterator[Section]:
    """Yield the parts of the registers that have sections of their own."""
    page = payload[registers.PVINFO_AT : registers.PVINFO_AT + registers.PVINFO_SIZE]
    info = registers.pvinfo(page)
    yield Section("pvinfo", at + registers.PVINFO_AT, len(page), info)
    fences = registers.fences(payload, info["fence_num"])
    yield Section("fences", at + registers.FENCES_AT, 8 * len(fences), {"fences": fences})
    yield Section("engines", at, 0, {"engines": registers.engines(payload)})
