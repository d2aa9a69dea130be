# SPDX-License-Identifier: MIT
"""QEMU's own description of a migration stream, JSON at the stream's end: names and sizes of the sections before it.

QEMU writes it since 2.3, unless the machine has ``suppress-vmdesc``, for a migration that ends before postcopy. It
lists what QEMU calls non-iterable: every section of type 4 in the order of the stream, so not `ram`, and of a VFIO
device the last section, its configuration. Layout: QEMU's ``migration/vmstate.c``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.errors import excerpt

if TYPE_CHECKING:
    from vfio_mig.image.bytesource import ByteSource

DESCRIPTION_MAX: Final = 8 << 20
"""Bytes of a description that is read, at most: parsed JSON is up to 40 times as large. A guest of 100 processors has
some 2 MiB."""
PADDING_MAX: Final = 1 << 16
"""Zero bytes that may follow a stream: some writers fill their last block."""
_TYPE: Final = 6
_TRIES: Final = 6
"""The byte of the section's type cannot be in JSON, and the length behind it has four others."""
_DEPTH_MAX: Final = 16
_SUBSECTION_HEAD: Final = 6
"""Bytes of a subsection's head without its name: type, length of the name, version."""


class Described(NamedTuple):
    """A section as QEMU describes it; *size* is of its content in bytes, None where the description does not say it."""

    name: str
    instance: int
    size: int | None


class Description(NamedTuple):
    """A stream's description.

    :param at: offset of the section that holds it.
    :param page_size: of the guest's pages in `ram`, bytes; None where it is not said.
    :param sections: those that are listed, in the stream's order; None for a description without a list.
    :param subsections: of the configuration, by name: bytes of content.
    """

    at: int
    page_size: int | None
    sections: list[Described] | None
    subsections: dict[str, int]


def _number(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _listed(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _content_size(node: dict[str, Any], depth: int = 0) -> int | None:
    """Add up what the fields and subsections of a section take.

    An array of which QEMU describes the first element alone counts as if all were as large, which they may not be.
    """
    if not isinstance(node.get("fields"), list) or depth > _DEPTH_MAX:
        return None
    total = 0
    for one in _listed(node["fields"]):
        size, count = _number(one.get("size")), _number(one.get("array_len", 1))
        if size is None or count is None:
            return None
        total += size * count
    for one in _listed(node.get("subsections")):
        name, size = one.get("vmsd_name"), _content_size(one, depth + 1)
        if not isinstance(name, str) or size is None:
            return None
        total += _SUBSECTION_HEAD + len(name) + size
    return total


def _described(node: dict[str, Any]) -> Described:
    name, instance = node.get("name"), node.get("instance_id")
    size = _number(node.get("size")) if "size" in node else _content_size(node)
    # A number that belongs to no instance is -1 in JSON and 2^32 - 1 in the stream
    number = instance & 0xFFFFFFFF if type(instance) is int and -1 <= instance < 1 << 32 else -1
    return Described(name if isinstance(name, str) else "", number, size)


def _parse(at: int, content: bytes) -> Description | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    devices = value.get("devices")
    configuration = value.get("configuration")
    subsections = _listed(configuration.get("subsections")) if isinstance(configuration, dict) else []
    sizes = {str(one.get("vmsd_name")): _content_size(one) for one in subsections}
    return Description(
        at,
        _number(value.get("page_size")),
        [_described(one) for one in _listed(devices)] if isinstance(devices, list) else None,
        {name: size for name, size in sizes.items() if size is not None},
    )


class Comparison:
    """Compares a stream's sections with its description, one after the other.

    :ivar problem: the first thing that differs; None as long as they agree.
    """

    def __init__(self, description: Description | None) -> None:
        self._sections = None if description is None else description.sections
        self._count = 0
        self.problem: str | None = None

    @property
    def proves(self) -> bool:
        """Whether there is a list of sections, and it agrees with what was found."""
        return self._sections is not None and self.problem is None

    def next(self, name: str, instance: int) -> int | None:
        """Compare a section with the next one of the list; returns the bytes of its content, None if that is unknown.

        Behind the first one that differs, nothing that the list says could be trusted to be of this section.
        """
        if self._sections is None or self.problem is not None:
            return None
        if self._count == len(self._sections):
            self.problem = f"the section {excerpt(name)} is not in QEMU's own description of the stream"
            return None
        one = self._sections[self._count]
        self._count += 1
        if (one.name, one.instance) != (name, instance):
            its = f"{excerpt(one.name)} {one.instance}"
            self.problem = f"QEMU's own description has a section {its} where {excerpt(name)} {instance} is found"
            return None
        return one.size

    def end(self) -> None:
        """Compare the stream's end with the list's."""
        if self.problem is None and self._sections is not None and self._count < len(self._sections):
            name = excerpt(self._sections[self._count].name)
            self.problem = f"QEMU's own description of the stream has a section {name}, which was not found"


def find_description(source: ByteSource) -> Description | None:
    """Find the description that a stream ends with; None where there is none.

    It is known by its length, which must end where the stream does, and by being JSON as a whole: neither can be made
    up by what a guest has in its memory or a device in its state, as sections that are not text follow that.
    """
    base = max(0, source.size - DESCRIPTION_MAX - PADDING_MAX)
    tail = source.read(base, source.size - base)
    end = len(tail.rstrip(b"\0"))
    if len(tail) - end > PADDING_MAX or tail[end - 1 : end] != b"}":
        return None
    place = end
    for _ in range(_TRIES):
        place = tail.rfind(_TYPE, 0, place)
        if place < 0:
            return None
        if place + 5 + int.from_bytes(tail[place + 1 : place + 5], "big") == end:
            return _parse(base + place, tail[place + 5 : end])
    return None
