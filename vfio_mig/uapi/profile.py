# SPDX-License-Identifier: MIT
"""The 2017 RFC's numbers.

The RFC text leaves them open, so a patched kernel's own ``vfio.h`` wins over the shipped ones.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import UsageError
from vfio_mig.uapi import VFIO_BASE, VFIO_TYPE, Request, ffi, vfio_request

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPRESSION_MAX: Final = 256
"""Characters of a constant's expression; a longer one is none that is understood here."""

REQUEST_MAX: Final = 255
"""The kernel's ``_IO`` has eight bits for a number."""

FLAG: Final = "VFIO_DEVICE_FLAGS_MIGRATABLE"
STATE_INDEX: Final = "VFIO_PCI_DEVICE_STATE_REGION_INDEX"
NUM_REGIONS: Final = "VFIO_PCI_NUM_REGIONS"
STATUS_SET: Final = "VFIO_DEVICE_PCI_STATUS_SET"
GET_DIRTY: Final = "VFIO_DEVICE_PCI_GET_DIRTY_BITMAP"
STOP: Final = "VFIO_DEVICE_PCI_STOP"
START: Final = "VFIO_DEVICE_PCI_START"
IMAGE_MAX: Final = "MIGRATION_IMG_MAX_SIZE"
IMAGE_LARGEST: Final = 64 << 20
"""Bytes of the largest state region that is believed in: registers are 4 MiB, a GTT for 4 GiB is 8 MiB."""
IMAGE_SMALLEST: Final = 4 << 20
"""The registers alone."""
REQUIRED: Final = (FLAG, STATE_INDEX, NUM_REGIONS, STATUS_SET, GET_DIRTY, STOP, START)


_OF_CONTAINERS: Final = (
    (0, "VFIO_GET_API_VERSION"),
    (1, "VFIO_CHECK_EXTENSION"),
    (2, "VFIO_SET_IOMMU"),
    (12, "VFIO_IOMMU_GET_INFO"),
    (13, "VFIO_IOMMU_MAP_DMA"),
    (14, "VFIO_IOMMU_UNMAP_DMA"),
    (15, "VFIO_IOMMU_ENABLE"),
    (16, "VFIO_IOMMU_DISABLE"),
    (17, "VFIO_IOMMU_DIRTY_PAGES"),
    (18, "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY"),
    (19, "VFIO_IOMMU_SPAPR_TCE_CREATE"),
    (20, "VFIO_IOMMU_SPAPR_TCE_REMOVE"),
    (21, "VFIO_EEH_PE_OP"),
)
_OF_GROUPS: Final = (
    (3, "VFIO_GROUP_GET_STATUS"),
    (4, "VFIO_GROUP_SET_CONTAINER"),
    (5, "VFIO_GROUP_UNSET_CONTAINER"),
    (6, "VFIO_GROUP_GET_DEVICE_FD"),
)
_OF_DEVICES: Final = (
    (7, "VFIO_DEVICE_GET_INFO"),
    (8, "VFIO_DEVICE_GET_REGION_INFO"),
    (9, "VFIO_DEVICE_GET_IRQ_INFO"),
    (10, "VFIO_DEVICE_SET_IRQS"),
    (11, "VFIO_DEVICE_RESET"),
    (12, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"),
    (13, "VFIO_DEVICE_PCI_HOT_RESET"),
    (14, "VFIO_DEVICE_QUERY_GFX_PLANE"),
    (15, "VFIO_DEVICE_GET_GFX_DMABUF"),
    (16, "VFIO_DEVICE_IOEVENTFD"),
    (17, "VFIO_DEVICE_FEATURE"),
    (18, "VFIO_DEVICE_BIND_IOMMUFD"),
    (19, "VFIO_DEVICE_ATTACH_IOMMUFD_PT"),
    (20, "VFIO_DEVICE_DETACH_IOMMUFD_PT"),
    (21, "VFIO_MIG_GET_PRECOPY_INFO"),
)
_IOMMUFD: Final = range(0x80 - VFIO_BASE, 0xA0 - VFIO_BASE)
"""linux/iommufd.h: IOMMUFD_CMD_BASE is 0x80 of the same type; some are left for later kernels."""
TAKEN: Final[dict[int, str]] = {
    **dict.fromkeys(_IOMMUFD, "one of iommufd's"),
    **dict(_OF_CONTAINERS),
    **dict(_OF_GROUPS),
    **dict(_OF_DEVICES),
}
"""What ``_IO(VFIO_TYPE, VFIO_BASE + nr)`` is in mainline; a device's meaning wins, as the RFC's go to a device."""
_OWN: Final = {STATUS_SET: 14, GET_DIRTY: 15}
"""The RFC's own numbers. Mainline has given them away since, so flags and regions decide before one of them is sent."""
_FLAGS: Final[dict[int, str]] = {
    0: "VFIO_DEVICE_FLAGS_RESET",
    1: "VFIO_DEVICE_FLAGS_PCI",
    2: "VFIO_DEVICE_FLAGS_PLATFORM",
    3: "VFIO_DEVICE_FLAGS_AMBA",
    6: "VFIO_DEVICE_FLAGS_FSL_MC",
    7: "VFIO_DEVICE_FLAGS_CAPS",
    8: "VFIO_DEVICE_FLAGS_CDX",
}
"""Bits of mainline's. Not 4 and 5, CCW and AP: the RFC has one of them, by the age of its tree, and no s390 device has
the PCI flag that is asked for, too."""
_CCW: Final = "VFIO_DEVICE_FLAGS_CCW"
_LOWEST_INDEX: Final = ffi.integer_const("VFIO_PCI_VGA_REGION_INDEX") + 1
"""Below are BARs, ROM, configuration space and VGA."""


class RfcProfile(NamedTuple):
    """The numbers of one tree.

    :param migratable_flag: bit mask in ``vfio_device_info.flags``.
    :param state_index: region index of the device state.
    :param num_regions: regions that a migratable device has at least.
    :param stop: flags value of STATUS_SET; so is *start*.
    :param image_max: size of the state region, bytes.
    :param source: where the numbers come from, for messages.
    """

    migratable_flag: int
    state_index: int
    num_regions: int
    status_set: Request
    get_dirty: Request
    stop: int
    start: int
    image_max: int
    source: str


DEFAULT_PROFILE: Final = RfcProfile(
    migratable_flag=ffi.integer_const("VFIO_DEVICE_FLAGS_MIGRATABLE"),
    state_index=ffi.integer_const("VFIO_PCI_DEVICE_STATE_REGION_INDEX"),
    num_regions=ffi.integer_const("VFIO_PCI_RFC_NUM_REGIONS"),
    status_set=vfio_request(STATUS_SET, ffi.integer_const("VFIO_DEVICE_PCI_STATUS_SET_NR")),
    get_dirty=vfio_request(GET_DIRTY, ffi.integer_const("VFIO_DEVICE_PCI_GET_DIRTY_BITMAP_NR")),
    stop=ffi.integer_const("VFIO_DEVICE_PCI_STOP"),
    start=ffi.integer_const("VFIO_DEVICE_PCI_START"),
    image_max=ffi.integer_const("MIGRATION_IMG_MAX_SIZE"),
    source="built in",
)

KVMGT_PROFILE: Final = DEFAULT_PROFILE._replace(
    image_max=ffi.integer_const("MIGRATION_IMG_LARGE_SIZE"),
    source="built in, of vfio_mig's kvmgt",
)
"""What the kvmgt of tools/kvmgt adds: states that do not fit into the RFC's region have a larger one."""

BUILT_IN: Final = (DEFAULT_PROFILE, KVMGT_PROFILE)
"""Told apart by the size of the state region. Where a header is given, its numbers are the only ones."""

_DEFINE: Final = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+([^\n]+)$", re.MULTILINE)
_ENUM: Final = re.compile(r"\benum\b")
_BRACE: Final = re.compile(r"[{};]")
_CONDITION: Final = re.compile(r"^[ \t]*#[ \t]*(if|ifdef|ifndef|else|elif|endif)\b[ \t]*(\S*)")
_REQUEST: Final = re.compile(r"_IO\s*\(\s*VFIO_TYPE\s*,\s*VFIO_BASE\s*\+\s*([0-9]{1,3})\s*\)")
_LITERAL: Final = r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19})"
_NUMBER: Final = re.compile(_LITERAL + r"(?:[uU]?[lL]{0,2})")
_SHIFT: Final = re.compile(_LITERAL + r"[uUlL]{0,3}\s*<<\s*([0-9]{1,2})")


def parse_header(text: str) -> dict[str, int]:
    """Return the header's plain constants, ioctl numbers (as ``_IO`` makes them) and enumerators by name.

    Understands literals, ``1 << n``, parentheses, ``_IO(VFIO_TYPE, VFIO_BASE + n)``, ``#if 0``, and enumerators that
    count on; what it does not understand is left out, never guessed. Takes time in proportion to the text.
    """
    text = _without_comments(text.replace("\r\n", "\n")).replace("\\\n", " ")
    text = _without_dead_code(text)
    values: dict[str, int] = {}
    for name, expression in _DEFINE.findall(text):
        value = _value(expression, values)
        if value is not None:
            values[name] = value
    # an enum may have #defines between its enumerators, as vfio.h's structs do
    for body in _enum_bodies(re.sub(r"^[ \t]*#[^\n]*$", "", text, flags=re.MULTILINE)):
        _enumerate(body, values)
    return values


def _without_comments(text: str) -> str:
    parts: list[str] = []
    at = 0
    while True:
        block, line = text.find("/*", at), text.find("//", at)
        start = min((found for found in (block, line) if found >= 0), default=len(text))
        parts.append(text[at:start])
        if start == len(text):
            return " ".join(parts)
        end = text.find("*/", start + 2) if start == block else text.find("\n", start)
        if end < 0:
            return " ".join(parts)
        at = end + 2 if start == block else end


def _without_dead_code(text: str) -> str:
    """Leave out what stands between ``#if 0`` and its ``#else`` or ``#endif``; other conditions count as true."""
    kept: list[str] = []
    dead: list[bool] = []
    for line in text.split("\n"):
        match = _CONDITION.match(line)
        if match and match[1].startswith("if"):
            dead.append(match[1] == "if" and match[2] == "0")
        elif match and match[1] == "endif":
            del dead[-1:]
        elif match and dead:
            dead[-1] = False
        if not any(dead):
            kept.append(line)
    return "\n".join(kept)


def _enum_bodies(text: str) -> Iterator[str]:
    """Yield what stands between the braces of each enum."""
    at = 0
    while match := _ENUM.search(text, at):
        opening = _BRACE.search(text, match.end())
        if opening is None:
            return
        at = opening.end()
        if opening[0] == "{":
            closing = _BRACE.search(text, at)
            if closing is None:
                return
            if closing[0] == "}":
                yield text[at : closing.start()]


def _value(expression: str, values: dict[str, int]) -> int | None:
    expression = expression.strip()
    if len(expression) > EXPRESSION_MAX:
        return None
    while expression.startswith("(") and expression.endswith(")"):
        expression = expression[1:-1].strip()
    if match := _REQUEST.fullmatch(expression):
        base = values.get("VFIO_BASE", VFIO_BASE)
        nr = base - VFIO_BASE + int(match[1])
        return vfio_request("", nr).number if VFIO_BASE + nr <= REQUEST_MAX else None
    if match := _NUMBER.fullmatch(expression):
        return _literal(match[1])
    if match := _SHIFT.fullmatch(expression):
        number = _literal(match[1])
        return None if number is None else number << int(match[2])
    return values.get(expression)


def _literal(text: str) -> int | None:
    """Return a C literal's value; with a leading zero it is octal."""
    base = 16 if text[:2] in ("0x", "0X") else 8 if text.startswith("0") else 10
    try:
        return int(text, base)
    except ValueError:  # 08
        return None


def _enumerate(body: str, values: dict[str, int]) -> None:
    following: int | None = 0
    for item in body.split(","):
        name, equals, expression = (part.strip() for part in item.partition("="))
        if not name.isidentifier():
            continue
        value = _value(expression, values) if equals else following
        if value is not None:
            values[name] = value
        following = None if value is None else value + 1


_HINT: Final = "give the header of the kernel that runs here, as it was built"


def _check(path: str, values: dict[str, int]) -> None:
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise UsageError(
            f"{path} does not define {', '.join(missing)}",
            hint="give the linux/vfio.h of a kernel that carries the 2017 migration RFC",
        )
    flag, stop, start = values[FLAG], values[STOP], values[START]
    if flag.bit_count() != 1 or flag >= 1 << 32 or not (0 < stop < 1 << 32 and 0 < start < 1 << 32) or stop == start:
        raise UsageError(f"{path}: {FLAG}, {STOP} or {START} have impossible values")
    lowest = (VFIO_TYPE << 8) | VFIO_BASE
    if any(not lowest <= values[name] < lowest + 100 for name in (STATUS_SET, GET_DIRTY)):
        raise UsageError(f"{path}: {STATUS_SET} or {GET_DIRTY} is not a VFIO ioctl number")
    if not values[STATE_INDEX] < values[NUM_REGIONS] <= 1 << 16:
        raise UsageError(f"{path}: {STATE_INDEX} is not below {NUM_REGIONS}")
    _check_meaning(path, values)
    image_max = values.get(IMAGE_MAX, DEFAULT_PROFILE.image_max)
    if not IMAGE_SMALLEST < image_max <= IMAGE_LARGEST:
        raise UsageError(f"{path}: no vGPU's state fits {IMAGE_MAX}, {image_max} bytes")


def _check_meaning(path: str, values: dict[str, int]) -> None:
    """Refuse numbers with which something else would be done to a device, or looked at, than the RFC means."""
    lowest = (VFIO_TYPE << 8) | VFIO_BASE
    for name, own in _OWN.items():
        nr = values[name] - lowest
        if nr != own and nr in TAKEN:
            raise UsageError(f"{path}: {name} has the number of another request: {TAKEN[nr]}", hint=_HINT)
    if values[STATUS_SET] == values[GET_DIRTY]:
        raise UsageError(f"{path}: {STATUS_SET} and {GET_DIRTY} are the same number", hint=_HINT)
    flag = values[FLAG]
    bit = flag.bit_length() - 1
    known = _FLAGS.get(bit) or (_CCW if flag == values.get(_CCW) else None)
    if known is not None:
        raise UsageError(f"{path}: {FLAG} is the bit of {known}", hint=_HINT)
    if values[STATE_INDEX] < _LOWEST_INDEX:
        raise UsageError(f"{path}: {STATE_INDEX} is that of a BAR, the ROM, configuration space or VGA", hint=_HINT)


def profile_of(text: str, path: str) -> RfcProfile:
    """Take the numbers from the text of a patched kernel's ``linux/vfio.h``.

    :param path: where the text is from, for messages.
    :raises UsageError: it is not such a header; the message names what is missing.
    """
    values = parse_header(text)
    _check(path, values)
    return RfcProfile(
        migratable_flag=values[FLAG],
        state_index=values[STATE_INDEX],
        num_regions=values[NUM_REGIONS],
        status_set=Request(STATUS_SET, values[STATUS_SET]),
        get_dirty=Request(GET_DIRTY, values[GET_DIRTY]),
        stop=values[STOP],
        start=values[START],
        image_max=values.get(IMAGE_MAX, DEFAULT_PROFILE.image_max),
        source=path,
    )
