# SPDX-License-Identifier: MIT
"""GVT-g's virtual registers in words: PVINFO, fences, engines. Layout: ``cdefs/gvt_pvinfo.h``, i915's registers."""

from __future__ import annotations

import struct
from typing import Any, Final

from vfio_mig.ranges import PAGE

PVINFO_AT: Final = 0x78000
PVINFO_SIZE: Final = 0x1000
FENCES_AT: Final = 0x100000
FENCES_MAX: Final = 32
"""Fences of gen 6 and later."""

PVINFO_FIELDS: Final = {  # offset in the page: name, bytes (struct vgt_if)
    0x000: ("magic", 8),
    0x008: ("version_major", 2),
    0x00A: ("version_minor", 2),
    0x00C: ("vgt_id", 4),
    0x010: ("vgt_caps", 4),
    0x040: ("mappable_base", 4),
    0x044: ("mappable_size", 4),
    0x048: ("nonmappable_base", 4),
    0x04C: ("nonmappable_size", 4),
    0x050: ("fence_num", 4),
    0x800: ("v2g_notify", 4),
    0x804: ("display_ready", 4),
    0x818: ("g2v_notify", 4),
    0x830: ("cursor_x_hot", 4),
    0x834: ("cursor_y_hot", 4),
    **{0x838 + 4 * number: (f"pdp{number // 2}_{('lo', 'hi')[number % 2]}", 4) for number in range(8)},
    0x858: ("execlist_context_descriptor_lo", 4),
    0x85C: ("execlist_context_descriptor_hi", 4),
}
_CAPS: Final = {2: "full-ppgtt", 3: "hwsp-emulation", 4: "huge-gtt"}
_G2V: Final = {
    2: "ppgtt-l3-create",
    3: "ppgtt-l3-destroy",
    4: "ppgtt-l4-create",
    5: "ppgtt-l4-destroy",
    6: "context-create",
    7: "context-destroy",
}

ENGINES: Final = ("rcs", "bcs", "vcs", "vcs2", "vecs")
"""By the engine number of a WORKLOAD record."""
ENGINE_BASES: Final = {"rcs": 0x02000, "bcs": 0x22000, "vcs": 0x12000, "vcs2": 0x1C000, "vecs": 0x1A000}
_ENGINE_REGISTERS: Final = {
    0x30: "tail",
    0x34: "head",
    0x38: "start",
    0x3C: "ctl",
    0x5C: "acthd_hi",
    0x74: "acthd_lo",
    0x80: "hws_pga",
    0x9C: "mi_mode",
    0xA8: "imr",
    0x230: "elsp",
    0x234: "execlist_status_lo",
    0x238: "execlist_status_hi",
    0x244: "context_control",
    **{0x270 + 4 * number: f"pdp{number // 2}_{('lo', 'hi')[number % 2]}" for number in range(8)},
    0x29C: "mode",
    0x358: "timestamp_lo",
    0x35C: "timestamp_hi",
    **{0x370 + 4 * number: f"csb{number // 2}_{('lo', 'hi')[number % 2]}" for number in range(12)},
    0x3A0: "csb_ptr",
    **{0x600 + 4 * number: f"gpr{number // 2}_{('lo', 'hi')[number % 2]}" for number in range(32)},
}
_MODE_BITS: Final = {7: "48-bit", 9: "ppgtt", 15: "execlist"}
_OTHERS: Final = {
    0x941C: "reset",
    0x44200: "master_irq",
    **{
        0x44300 + 16 * bank + 4 * number: f"gt_{name}{bank}"
        for bank in range(4)
        for number, name in enumerate(("isr", "imr", "iir", "ier"))
    },
}
PIPECONF: Final = {0x70008 + 0x1000 * pipe: f"pipeconf_{'abc'[pipe]}" for pipe in range(3)}


def register_name(offset: int) -> str:
    """Name a register of BAR0 by the offset of its 32-bit word; an unknown one is its offset in hexadecimal."""
    inside = offset - PVINFO_AT
    if 0 <= inside < PVINFO_SIZE:
        for start, (name, size) in PVINFO_FIELDS.items():
            if start <= inside < start + size or inside == start & ~3:
                return f"pvinfo.{name}" if inside <= start else f"pvinfo.{name}+{inside - start}"
        return f"pvinfo+{inside:#x}"
    if FENCES_AT <= offset < FENCES_AT + 8 * FENCES_MAX:
        number, half = divmod(offset - FENCES_AT, 8)
        return f"fence{number}.{'hi' if half else 'lo'}"
    for engine, base in ENGINE_BASES.items():
        register = _ENGINE_REGISTERS.get(offset - base)
        if register is not None:
            return f"{engine}.{register}"
    return _OTHERS.get(offset) or PIPECONF.get(offset) or f"{offset:#x}"


def is_named(offset: int) -> bool:
    """Tell whether a register has a name of its own here."""
    return not register_name(offset)[0].isdigit()


def pvinfo(page: bytes) -> dict[str, Any]:
    """Decode the PVINFO page.

    :param page: PVINFO_SIZE bytes.
    """
    values: dict[str, Any] = {
        name: int.from_bytes(page[at : at + size], "little") for at, (name, size) in PVINFO_FIELDS.items()
    }
    values["vgt_caps_bits"] = [name for bit, name in _CAPS.items() if values["vgt_caps"] >> bit & 1]
    values["g2v_notify_name"] = _G2V.get(values["g2v_notify"])
    return values


def fence(value: int) -> dict[str, Any]:
    """Decode a fence of gen 6 and later: graphics addresses in bytes, *end* behind its last page, *pitch* in bytes."""
    return {
        "valid": bool(value & 1),
        "tiling": "y" if value & 2 else "x",
        "start": value & 0xFFFFF000,
        "end": (value >> 32 & 0xFFFFF000) + PAGE,
        "pitch": ((value >> 32 & 0xFFF) + 1) * 128,
    }


def fences(vreg: bytes, number: int) -> list[dict[str, Any]]:
    """Decode the first *number* fences, at most FENCES_MAX; an unused one is not valid."""
    words = struct.unpack_from(f"<{FENCES_MAX}Q", vreg, FENCES_AT)
    return [{"number": at, "value": value, **fence(value)} for at, value in enumerate(words[: min(number, FENCES_MAX)])]


def engines(vreg: bytes) -> list[dict[str, Any]]:
    """Decode what each engine's registers say, those that are not zero."""
    found = []
    for engine, base in ENGINE_BASES.items():
        values = {
            name: value
            for at, name in sorted(_ENGINE_REGISTERS.items())
            if (value := struct.unpack_from("<I", vreg, base + at)[0])
        }
        mode = [name for bit, name in _MODE_BITS.items() if values.get("mode", 0) >> bit & 1]
        found.append({"engine": engine, "base": base, "mode_bits": mode, "registers": values})
    return found
