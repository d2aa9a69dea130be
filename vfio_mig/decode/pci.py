# SPDX-License-Identifier: MIT
"""A PCI configuration space in words. Offsets and bits: PCI Local Bus 3.0, PCI Express Base; ``linux/pci_regs.h``."""

from __future__ import annotations

import struct
from typing import Any, Final

SIZE: Final = 256
EXTENDED_SIZE: Final = 4096
_HEADER: Final = struct.Struct("<HHHHBBBBBBBB")
_COMMAND: Final = ("io", "memory", "master", "special", "mwi", "palette-snoop", "parity", "", "serr", "fast-b2b")
_INTX_OFF: Final = 1 << 10
_STATUS: Final = {
    3: "interrupt",
    4: "capabilities",
    5: "66mhz",
    7: "fast-b2b",
    8: "master-parity-error",
    11: "signaled-target-abort",
    12: "received-target-abort",
    13: "received-master-abort",
    14: "signaled-system-error",
    15: "parity-error",
}
_CAPABILITIES: Final = {
    0x01: "power-management",
    0x02: "agp",
    0x03: "vpd",
    0x05: "msi",
    0x07: "pci-x",
    0x09: "vendor-specific",
    0x0D: "subsystem-ids",
    0x10: "pci-express",
    0x11: "msi-x",
    0x12: "sata",
    0x13: "advanced-features",
}
_EXTENDED: Final = {
    0x01: "aer",
    0x02: "virtual-channel",
    0x03: "serial-number",
    0x0B: "vendor-specific",
    0x0D: "acs",
    0x0E: "ari",
    0x0F: "ats",
    0x10: "sr-iov",
    0x13: "page-request",
    0x15: "resizable-bar",
    0x17: "tph",
    0x18: "ltr",
    0x1B: "pasid",
    0x23: "dvsec",
}
_FIELDS: Final = {
    0x00: ("vendor", 2),
    0x02: ("device", 2),
    0x04: ("command", 2),
    0x06: ("status", 2),
    0x08: ("revision", 1),
    0x09: ("class", 3),
    0x0C: ("cache-line", 1),
    0x0D: ("latency-timer", 1),
    0x0E: ("header-type", 1),
    0x0F: ("bist", 1),
    **{0x10 + 4 * number: (f"bar{number}", 4) for number in range(6)},
    0x28: ("cardbus-cis", 4),
    0x2C: ("subsystem-vendor", 2),
    0x2E: ("subsystem-device", 2),
    0x30: ("rom", 4),
    0x34: ("capabilities", 1),
    0x3C: ("interrupt-line", 1),
    0x3D: ("interrupt-pin", 1),
    0x3E: ("min-grant", 1),
    0x3F: ("max-latency", 1),
}
_BARS_AT: Final = 0x10
_BARS: Final = 6
_CAPABILITY_LIST: Final = 1 << 4
_FIRST_CAPABILITY: Final = 0x40
_FIRST_EXTENDED: Final = 0x100
_EXTENDED_MAX: Final = (EXTENDED_SIZE - _FIRST_EXTENDED) // 4
_TYPE0: Final = 0
_BAR_64: Final = 2
_MSI: Final = 0x05
_MSI_X: Final = 0x11


def field_at(offset: int) -> tuple[str, int, int]:
    """Name the field of a byte of configuration space: name, where it begins, bytes. Unknown ones are bytes."""
    for start, (name, size) in _FIELDS.items():
        if start <= offset < start + size:
            return name, start, size
    return f"{offset:#x}", offset, 1


def _bars(config: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    number = 0
    while number < _BARS:
        (low,) = struct.unpack_from("<I", config, _BARS_AT + 4 * number)
        at = number
        number += 1
        if low & 1:
            found.append({"number": at, "kind": "io", "address": low & ~3, "prefetchable": False})
            continue
        kind, address = "memory32", low & ~0xF
        if low >> 1 & 3 == _BAR_64 and number < _BARS:
            (high,) = struct.unpack_from("<I", config, _BARS_AT + 4 * number)
            kind, address = "memory64", address | high << 32
            number += 1
        if low or address:
            found.append({"number": at, "kind": kind, "address": address, "prefetchable": bool(low & 8)})
    return found


def _msi(config: bytes, at: int) -> dict[str, Any]:
    (control,) = struct.unpack_from("<H", config, at + 2)
    wide = bool(control & 0x80)
    if at + (14 if wide else 10) > SIZE:
        return {}
    low, high, data = struct.unpack_from("<IIH" if wide else "<I0sH", config, at + 4)
    address = low | (high << 32 if wide else 0)
    return {"enabled": bool(control & 1), "vectors": 1 << (control >> 4 & 7), "address": address, "data": data}


def _msi_x(config: bytes, at: int) -> dict[str, Any]:
    if at + 12 > SIZE:
        return {}
    control, table, pending = struct.unpack_from("<HII", config, at + 2)
    return {
        "enabled": bool(control & 0x8000),
        "masked": bool(control & 0x4000),
        "vectors": (control & 0x7FF) + 1,
        "table_bar": table & 7,
        "table_offset": table & ~7,
        "pending_bar": pending & 7,
        "pending_offset": pending & ~7,
    }


def _capabilities(config: bytes) -> list[dict[str, Any]]:
    """Walk the list; one that runs in a circle or into the header ends there."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    at = config[0x34] & ~3
    while at >= _FIRST_CAPABILITY and at not in seen:
        seen.add(at)
        kind = config[at]
        decoder = {_MSI: _msi, _MSI_X: _msi_x}.get(kind)
        more = decoder(config, at) if decoder else {}
        found.append({"id": kind, "name": _CAPABILITIES.get(kind, "unknown"), "offset": at, **more})
        at = config[at + 1] & ~3
    return found


def _extended(config: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    at = _FIRST_EXTENDED
    while _FIRST_EXTENDED <= at <= len(config) - 4 and at not in seen and len(found) < _EXTENDED_MAX:
        seen.add(at)
        (head,) = struct.unpack_from("<I", config, at)
        if head in {0, 0xFFFFFFFF}:
            break
        kind = head & 0xFFFF
        found.append({"id": kind, "name": _EXTENDED.get(kind, "unknown"), "version": head >> 16 & 0xF, "offset": at})
        at = head >> 20 & ~3
    return found


def decode(config: bytes) -> dict[str, Any]:
    """Decode a configuration space of 256 or 4096 bytes; of a bridge, what all types of header have.

    :raises ValueError: it is shorter.
    """
    if len(config) < SIZE:
        raise ValueError(f"{len(config)} bytes are not a configuration space")
    vendor, device, command, status, revision, interface, subclass, base, _, _, header, _ = _HEADER.unpack_from(config)
    values: dict[str, Any] = {
        "vendor": vendor,
        "device": device,
        "revision": revision,
        "class": base << 16 | subclass << 8 | interface,
        "header_type": header & 0x7F,
        "command": command,
        "command_bits": [name for bit, name in enumerate(_COMMAND) if name and command >> bit & 1]
        + (["intx-off"] if command & _INTX_OFF else []),
        "status": status,
        "status_bits": [name for bit, name in _STATUS.items() if status >> bit & 1],
        "interrupt_line": config[0x3C],
        "interrupt_pin": config[0x3D],
    }
    if header & 0x7F == _TYPE0:
        subsystem_vendor, subsystem_device = struct.unpack_from("<HH", config, 0x2C)
        (rom,) = struct.unpack_from("<I", config, 0x30)
        values |= {
            "subsystem_vendor": subsystem_vendor,
            "subsystem_device": subsystem_device,
            "bars": _bars(config),
            "rom": rom,
        }
    values["capabilities"] = _capabilities(config) if status & _CAPABILITY_LIST else []
    values["extended_capabilities"] = _extended(config)
    return values
