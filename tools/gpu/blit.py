# SPDX-License-Identifier: MIT
"""The operands of the 2D commands that are executed: linear surfaces, a colour or a copy, no clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from tools.gpu.command import HangError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.gpu.command import Command

MAX_BYTES: Final = 16 << 20
"""Of one command: it is executed at once, and the VM waits meanwhile."""
MAX_ROWS: Final = 1 << 14

_HALF: Final = 0xFFFF
_SIGN: Final = 0x8000
_ROP_SHIFT, _ROP_MASK = 16, 0xFF
_ROP_COLOUR, _ROP_COPY = 0xF0, 0xCC
_DEPTH_SHIFT: Final = 24
_PIXELS: Final = (1, 2, 2, 4)  # bytes, by the depth field
_FAST_PIXELS: Final = {0: 1, 1: 2, 3: 4, 4: 8, 5: 16}
_FILL_DWORDS, _COPY_DWORDS = 7, 10


class Rectangle(NamedTuple):
    """A part of a surface: its first pixel's address, its size in pixels and rows, bytes from row to row (or back)."""

    address: int
    width: int
    height: int
    pitch: int
    pixel: int  # bytes

    def rows(self) -> Iterator[int]:
        """Yield the address of each row's first pixel."""
        return (self.address + row * self.pitch for row in range(self.height))


def fill(command: Command) -> tuple[Rectangle, bytes]:
    """Return what XY_COLOR_BLT fills, and a pixel of its colour."""
    if command.length < _FILL_DWORDS:
        raise HangError(f"XY_COLOR_BLT of {command.length} dwords")
    pixel = _PIXELS[command.word(1) >> _DEPTH_SHIFT & 3]
    _demand_rop(command, _ROP_COLOUR)
    target = _target(command, pixel)
    return target, (command.word(6) & (1 << 8 * pixel) - 1).to_bytes(pixel, "little")


def source_copy(command: Command) -> tuple[Rectangle, Rectangle]:
    """Return the target and the source of XY_SRC_COPY_BLT."""
    _demand_rop(command, _ROP_COPY)
    return _both(command, _PIXELS[command.word(1) >> _DEPTH_SHIFT & 3])


def fast_copy(command: Command) -> tuple[Rectangle, Rectangle]:
    """Return the target and the source of XY_FAST_COPY_BLT."""
    pixel = _FAST_PIXELS.get(command.word(1) >> _DEPTH_SHIFT & 7)
    if pixel is None:
        raise HangError("XY_FAST_COPY_BLT of an unknown colour depth")
    return _both(command, pixel)


def _pitch(word: int) -> int:
    """Return the lower half as the signed number that it is."""
    return (word & _HALF ^ _SIGN) - _SIGN


def _demand_rop(command: Command, supported: int) -> None:
    operation = command.word(1) >> _ROP_SHIFT & _ROP_MASK
    if operation != supported:
        raise HangError(f"raster operation {operation:#04x} is not emulated")


def _both(command: Command, pixel: int) -> tuple[Rectangle, Rectangle]:
    if command.length < _COPY_DWORDS:
        raise HangError(f"a blit of {command.length} dwords")
    target = _target(command, pixel)
    left, top = command.word(6) & _HALF, command.word(6) >> 16
    pitch = _pitch(command.word(7))
    address = command.address(8) + top * pitch + left * pixel
    return target, Rectangle(address, target.width, target.height, pitch, pixel)


def _target(command: Command, pixel: int) -> Rectangle:
    pitch = _pitch(command.word(1))
    left, top = command.word(2) & _HALF, command.word(2) >> 16
    right, bottom = command.word(3) & _HALF, command.word(3) >> 16
    width, height = max(0, right - left), max(0, bottom - top)
    if height > MAX_ROWS or width * height * pixel > MAX_BYTES:
        raise HangError(f"a blit of {width} by {height} pixels is more than is emulated")
    return Rectangle(command.address(4) + top * pitch + left * pixel, width, height, pitch, pixel)
