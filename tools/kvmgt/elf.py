# SPDX-License-Identifier: MIT
"""Are two builds of a module the same code? Every section that is loaded is compared, and every relocation.

A build from another version of the source links and loads, for modpost takes i915's checksums from the header
packages and not from the source; it then works with wrong offsets into i915's structures. So the unmodified driver is
built first, and must be the distribution's own, byte by byte.
"""

import io
import lzma
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from elftools.common.exceptions import ELFError
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

from tools.vm.errors import RunnerError

_BUILD_ID: Final = ".note.gnu.build-id"  # a checksum of the whole file, debugging information included
_MODINFO: Final = ".modinfo"
_OUT_OF_TREE: Final = b"intree="  # kbuild says it of modules that are built with the kernel
_TYPES: Final = ".BTF_ids"  # numbers of types in the kernel's BTF; a build out of tree has no BTF and leaves zeros
# Where functions begin. Nothing reads it on x86, and the linker's order of it is another one in the kernel's own build.
_UNORDERED: Final = "__patchable_function_entries"
_MAX_BYTES: Final = 256 << 20

Relocation = tuple[int, int, str, int, int]


@dataclass(frozen=True, slots=True)
class Module:
    """What of a module the kernel loads.

    :param sections: contents by name; of a section without contents its size.
    :param relocations: by the section they apply to: offset, type, symbol, the symbol's value, addend.
    """

    sections: dict[str, bytes | int]
    relocations: dict[str, list[Relocation]]


def _symbols(elf: Any) -> list[tuple[str, int]]:
    table = elf.get_section_by_name(".symtab")
    if table is None:
        return []
    names = [section.name for section in elf.iter_sections()]
    found = []
    for symbol in table.iter_symbols():
        index = symbol["st_shndx"]
        # A section's symbol has no name of its own, an undefined one no value that means anything.
        name = symbol.name or (names[index] if isinstance(index, int) and index < len(names) else "")
        found.append((name, 0 if index == "SHN_UNDEF" else int(symbol["st_value"])))
    return found


def _relocations(section: Any, symbols: list[tuple[str, int]]) -> list[Relocation]:
    return [
        (one["r_offset"], one["r_info_type"], *symbols[one["r_info_sym"]], one["r_addend"])
        for one in section.iter_relocations()
    ]


def parse(content: bytes, name: str) -> Module:
    """Read a module; *name* is for messages.

    :raises RunnerError: it is none.
    """
    try:
        elf = ELFFile(io.BytesIO(content))
        symbols = _symbols(elf)
        sections: dict[str, bytes | int] = {}
        relocations: dict[str, list[Relocation]] = {}
        for section in elf.iter_sections():
            if section["sh_flags"] & SH_FLAGS.SHF_ALLOC:
                nothing = section["sh_type"] == "SHT_NOBITS"
                sections[section.name] = int(section["sh_size"]) if nothing else section.data()
            if isinstance(section, RelocationSection):
                target = elf.get_section(section["sh_info"])
                if target["sh_flags"] & SH_FLAGS.SHF_ALLOC:
                    relocations[target.name] = _relocations(section, symbols)
    except (ELFError, IndexError, KeyError, ValueError) as error:
        raise RunnerError(f"{name} is not a kernel module: {str(error) or type(error).__name__}") from None
    if not sections:
        raise RunnerError(f"{name} is not a kernel module: nothing in it is loaded")
    return Module(sections, relocations)


def read(path: Path) -> Module:
    """Read a module file, compressed with xz or not at all."""
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                content = file.read(_MAX_BYTES)
        else:
            content = path.read_bytes()
    except (lzma.LZMAError, EOFError) as error:
        raise RunnerError(f"{path} cannot be unpacked: {error}") from None
    return parse(content, str(path))


def built_below(module: Module, name: str) -> str | None:
    """Return the directory below which the file *name* was compiled, if the module says it: with a slash at its end."""
    pattern = re.compile(rb"\0(/[^\0]*/)" + re.escape(name.encode()) + rb"\0")
    found = pattern.search(content) if isinstance(content := module.sections.get(".rodata"), bytes) else None
    return None if found is None else os.fsdecode(found[1])


def _modinfo(content: bytes | int) -> list[bytes]:
    fields = content.split(b"\0") if isinstance(content, bytes) else []
    return [field for field in fields if field and not field.startswith(_OUT_OF_TREE)]


def _section_difference(name: str, stock: bytes | int | None, ours: bytes | int | None) -> str | None:
    if name == _BUILD_ID:
        return None
    if name == _MODINFO and stock is not None and ours is not None:
        stock, ours = b"\0".join(_modinfo(stock)), b"\0".join(_modinfo(ours))
    if stock == ours:
        return None
    if name == _TYPES and isinstance(stock, bytes) and ours == bytes(len(stock)):
        return None
    if stock is None or ours is None:
        return f"{name}: only in the {'stock module' if ours is None else 'module that was built'}"
    if not isinstance(stock, bytes) or not isinstance(ours, bytes) or len(stock) != len(ours):
        sizes = [one if isinstance(one, int) else len(one) for one in (stock, ours)]
        return f"{name}: {sizes[0]} bytes in the stock module, {sizes[1]} in the one that was built"
    first = next(at for at, (left, right) in enumerate(zip(stock, ours, strict=True)) if left != right)
    return f"{name}: {len(stock)} bytes in both, not the same from {first:#x} on"


def _named(one: Relocation) -> str:
    offset, kind, symbol, value, addend = one
    return f"{offset:#x}: type {kind}, {symbol}({value:#x}){addend:+#x}"


def _in_order(found: list[Relocation]) -> list[Relocation]:
    """Return the same pointers at the same places, in the order of what they point to."""
    return [(place[0], *what) for place, what in zip(found, sorted(one[1:] for one in found), strict=True)]


def _relocation_difference(name: str, stock: list[Relocation], ours: list[Relocation]) -> str | None:
    if name == _UNORDERED:
        stock, ours = _in_order(stock), _in_order(ours)
    if stock == ours:
        return None
    if len(stock) != len(ours):
        return f"{name}: {len(stock)} relocations in the stock module, {len(ours)} in the one that was built"
    left, right = next((left, right) for left, right in zip(stock, ours, strict=True) if left != right)
    return f"{name}: a relocation is {_named(left)} in the stock module, {_named(right)} in the one that was built"


def differences(stock: Module, ours: Module) -> list[str]:
    """Return what differs between two modules, a line each; nothing where they are the same code.

    What must differ is left out: the build ID, ``intree``, which only the kernel's own modules have, and numbers of
    types in debugging information that is not there.
    """
    found = [
        _section_difference(name, stock.sections.get(name), ours.sections.get(name))
        for name in dict.fromkeys([*stock.sections, *ours.sections])
    ]
    found += [
        _relocation_difference(name, stock.relocations.get(name, []), ours.relocations.get(name, []))
        for name in dict.fromkeys([*stock.relocations, *ours.relocations])
    ]
    return [line for line in found if line is not None]
