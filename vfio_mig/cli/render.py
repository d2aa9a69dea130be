# SPDX-License-Identifier: MIT
"""Decoded values as lines of text, for ``output.put``, which escapes what others wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEX_KEYS: Final = """
    address at base class command context_id crc ctl data device elsp end entry fcr flags gma gmch_control gpa head
    header_type id image_at lrca magic mappable_base mappable_size new nonmappable_base nonmappable_size offset old
    opregion pdp pending_offset record_at revision rom seed start status subsystem_device subsystem_vendor swsci
    table_offset tail value vendor vgt_caps words
"""
_HEX: Final = frozenset(_HEX_KEYS.split())
"""Keys whose numbers are addresses, ids or bits."""
_LONG: Final = 1e6
"""Seconds: nothing that was measured took longer."""
_LISTS: Final = {"count", "listed"}


def moment(seconds: float) -> str:
    """Return a time, seconds since 1970, as a date of this host's; what is none, as it is.

    >>> moment(1 << 70)
    '1180591620717411303424'
    """
    from datetime import datetime

    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def duration(seconds: float) -> str:
    """Return a time for people.

    >>> duration(0.0005947880000007899), duration(0.00001), duration(2.5), duration(0.0)
    ('0.6 ms', '0.01 ms', '2.50 s', '0.0 ms')
    """
    milliseconds = seconds * 1e3
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{milliseconds:.1f} ms" if milliseconds >= 0.1 or not milliseconds else f"{milliseconds:.1g} ms"  # noqa: PLR2004


def scalar(key: str, value: Any) -> str:
    """Return one value as a word."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:#x}" if key in _HEX or key.endswith(("_lo", "_hi")) else str(value)
    if isinstance(value, float):
        return duration(value) if key.endswith("time") and 0 <= value < _LONG else f"{value:.6g}"
    if isinstance(value, list):
        return ",".join(scalar(key, one) for one in value) or "-"
    return str(value)


def _is_flat(value: Any) -> bool:
    if isinstance(value, dict):
        return False
    return not isinstance(value, list) or not any(isinstance(one, dict | list) for one in value)


def _is_cut_list(value: Any) -> bool:
    """Tell a list of ours that says how long it is from what a file has under the same keys."""
    return (
        isinstance(value, dict)
        and value.keys() == _LISTS
        and isinstance(value["listed"], list)
        and type(value["count"]) is int
        and value["count"] >= len(value["listed"])
    )


def row(values: dict[str, Any], *, inside: str = "") -> str:
    """Return the flat values of an object in one line."""
    return "  ".join(f"{key} {scalar(inside or key, value)}" for key, value in values.items() if _is_flat(value))


def lines(values: dict[str, Any], rows: int, indent: str = "  ") -> Iterator[str]:
    """Yield an object as lines: flat values in one each, lists of objects in a line per object, at most *rows*."""
    for key, value in values.items():
        if _is_flat(value):
            yield f"{indent}{key} {scalar(key, value)}"
        elif _is_cut_list(value):
            yield from _list_lines(key, value["listed"], value["count"], rows, indent)
        elif isinstance(value, dict):
            if all(map(_is_flat, value.values())):
                yield f"{indent}{key}: {row(value, inside='value' if key == 'registers' else '')}"
            else:
                yield f"{indent}{key}"
                yield from lines(value, rows, indent + "  ")
        else:
            yield from _list_lines(key, value, len(value), rows, indent)


def _list_lines(key: str, values: list[Any], count: int, rows: int, indent: str) -> Iterator[str]:
    yield f"{indent}{key} ({count})"
    for one in values[:rows]:
        if not isinstance(one, dict):
            yield f"{indent}  {scalar(key, one)}"
            continue
        yield f"{indent}  {row(one)}"
        nested = {name: value for name, value in one.items() if not _is_flat(value)}
        yield from lines(nested, rows, indent + "    ")
    if count > min(rows, len(values)):
        yield f"{indent}  … {count - min(rows, len(values))} more"


def hex_lines(content: bytes, offset: int, last: list[bytes]) -> Iterator[str]:
    """Yield a hex dump as ``hexdump -C`` has it; *last* carries the row before, as equal rows are one ``*``."""
    for at in range(0, len(content), 16):
        piece = content[at : at + 16]
        if last and piece == last[0]:
            if len(last) == 1:
                last.append(b"")
                yield "*"
            continue
        last[:] = [piece]
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)  # noqa: PLR2004 -- ASCII
        yield f"{offset + at:08x}  {piece[:8].hex(' '):<23}  {piece[8:].hex(' '):<23}  |{text}|"
