# SPDX-License-Identifier: MIT
"""Imports point downwards only, as the package's docstring says; those inside functions and for types count, too."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = "vfio_mig"
FLOOR: Final = frozenset({"closing", "errors", "interrupts", "proc", "ranges", "report", "threads", "version", "words"})
# room: what it may import beside itself
ROOMS: Final[dict[str, frozenset[str]]] = {
    "closing": frozenset(),
    "errors": frozenset(),
    "interrupts": frozenset(),
    "proc": frozenset(),
    "ranges": frozenset(),
    "report": frozenset(),
    "threads": frozenset(),
    "version": frozenset(),
    "words": frozenset(),
    "uapi": FLOOR,
    "device": FLOOR | {"uapi"},
    "host": FLOOR | {"uapi", "device"},
    "image": FLOOR | {"uapi"},
    "decode": FLOOR | {"uapi", "image"},
    "dirty": FLOOR | {"uapi"},
    "pictures": FLOOR | {"dirty"},
    "protocols": FLOOR | {"uapi", "device", "host", "decode"},  # a family knows how its state fits a device
    "jobs": FLOOR | {"uapi", "device", "host", "decode", "image", "dirty", "protocols"},
    "conform": FLOOR | {"uapi", "device", "host", "decode", "image", "dirty", "protocols", "jobs"},
    "vm": FLOOR | {"uapi", "device", "host", "decode", "image", "dirty", "protocols", "jobs"},
    "library": FLOOR | {"uapi", "host", "decode", "image", "dirty", "protocols", "jobs", "conform"},
    "cli": FLOOR
    | {"uapi", "device", "host", "decode", "image", "dirty", "pictures", "protocols", "jobs", "conform", "vm"},
}
NO_DEVICE_CODE: Final = frozenset({"decode", "image", "dirty", "pictures"})
CALLERS: Final = frozenset({"uapi", "host"})  # ioctl; flock


def imported(module: str, node: ast.AST, *, is_package: bool) -> Iterator[str]:
    """Yield the dotted names that a statement imports: modules, or names in them."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = module.split(".")
        start = parents[: len(parents) - node.level + is_package] if node.level else []
        base = ".".join([*start, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "uapi":
        # the module was imported, and this is the name that is used of it
        yield f"{PACKAGE}.uapi.{node.attr}"


def room_of(name: str) -> str:
    """Return the room of a dotted name, empty for what is not ours or is the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in ROOMS else ""


def is_facade(name: str) -> bool:
    """Tell whether it comes from the package itself, which would fetch it from any room."""
    return name.partition(".")[0] == PACKAGE and not room_of(name)


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return what a module imports and may not, in order."""
    room = room_of(module)
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        for name in imported(module, node, is_package=is_package):
            other = room_of(name)
            climbs = other not in {"", room} and other not in ROOMS.get(room, frozenset())
            calls = room in NO_DEVICE_CODE and name in {f"{PACKAGE}.uapi.call", f"{PACKAGE}.uapi.*"}
            if climbs or calls or is_facade(name) or (name.split(".")[0] == "fcntl" and room not in CALLERS):
                found.append(name)
    return found


MODULES: Final = [path for path in sorted((ROOT / PACKAGE).rglob("*.py")) if path.name != "__main__.py"]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that one imports in any way, for types too."""
    module, found = name_of(path), set()
    known = {name_of(one) for one in MODULES}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        for name in imported(module, node, is_package=path.name == "__init__.py"):
            owner = name if name in known else name.rpartition(".")[0]
            if owner in known and owner != module:
                found.add(owner)
    return found


def test_a_device_knows_nothing_of_where_it_is_found() -> None:
    found = imports_of(ROOT / PACKAGE / "device.py")
    assert {name for name in found if name.startswith(f"{PACKAGE}.host")} == set()


def circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what is left of a graph without those that lead to nothing: circles, and what leads to them."""
    left = dict(graph)
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for leaf in leaves:
            del left[leaf]
    return left


def test_no_modules_make_a_circle() -> None:
    """Those for types count: who reads one module must not have to read the other first."""
    assert circles({name_of(path): imports_of(path) for path in MODULES}) == {}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"a": {"b"}, "b": {"c"}, "c": {"b"}}


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) != PACKAGE], ids=name_of)
def test_a_module_imports_downwards_only(path: Path) -> None:
    found = violations(name_of(path), path.read_text("utf-8"), is_package=path.name == "__init__.py")
    assert found == []


def test_every_module_stands_in_a_room() -> None:
    assert [path for path in MODULES if name_of(path) != PACKAGE and not room_of(name_of(path))] == []


def test_the_program_s_entry_takes_nothing_of_the_house_but_the_command_line() -> None:
    source = (ROOT / PACKAGE / "__main__.py").read_text("utf-8")
    names = {name for node in ast.walk(ast.parse(source)) for name in imported(PACKAGE, node, is_package=False)}
    assert {name for name in names if name.startswith(PACKAGE)} == {f"{PACKAGE}.cli.main"}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("vfio_mig.image.x", "import vfio_mig.device", ["vfio_mig.device"]),
        ("vfio_mig.image.x", "from vfio_mig import device", ["vfio_mig.device"]),
        ("vfio_mig.image.x", "from vfio_mig.device import Device", ["vfio_mig.device.Device"]),
        ("vfio_mig.image.x", "from ..device import Device", ["vfio_mig.device.Device"]),
        ("vfio_mig.image.x", "from .. import host", ["vfio_mig.host"]),
        ("vfio_mig.image.x", "from vfio_mig.protocols import base", ["vfio_mig.protocols.base"]),
        ("vfio_mig.image.x", "import fcntl", ["fcntl"]),
        ("vfio_mig.dirty.x", "from fcntl import ioctl", ["fcntl.ioctl"]),
        ("vfio_mig.dirty.x", "from vfio_mig.uapi import call", ["vfio_mig.uapi.call"]),
        ("vfio_mig.dirty.x", "from vfio_mig.uapi import call as c", ["vfio_mig.uapi.call"]),
        ("vfio_mig.dirty.x", "from vfio_mig.uapi import *", ["vfio_mig.uapi.*"]),
        ("vfio_mig.dirty.x", "from vfio_mig import uapi\nuapi.call(1, 2)", ["vfio_mig.uapi.call"]),
        ("vfio_mig.dirty.x", "import vfio_mig.image.archive", ["vfio_mig.image.archive"]),
        ("vfio_mig.protocols.x", "from vfio_mig.dirty import sync", ["vfio_mig.dirty.sync"]),
        ("vfio_mig.protocols.x", "from vfio_mig.jobs import save", ["vfio_mig.jobs.save"]),
        ("vfio_mig.device", "from vfio_mig.host.holders import Holder", ["vfio_mig.host.holders.Holder"]),
        ("vfio_mig.device", "from .host import holders", ["vfio_mig.host.holders"]),
        ("vfio_mig.host.x", "from vfio_mig.protocols import base", ["vfio_mig.protocols.base"]),
        ("vfio_mig.uapi.x", "from vfio_mig.device import Device", ["vfio_mig.device.Device"]),
        ("vfio_mig.errors", "from vfio_mig import uapi", ["vfio_mig.uapi"]),
        ("vfio_mig.interrupts", "from vfio_mig.jobs import save", ["vfio_mig.jobs.save"]),
        ("vfio_mig.jobs.x", "from vfio_mig.cli.output import say", ["vfio_mig.cli.output.say"]),
        ("vfio_mig.jobs.x", "from vfio_mig.conform.kit import check", ["vfio_mig.conform.kit.check"]),
        ("vfio_mig.jobs.x", "from vfio_mig.vm import machine", ["vfio_mig.vm.machine"]),
        ("vfio_mig.vm.x", "from vfio_mig.cli.output import put", ["vfio_mig.cli.output.put"]),
        ("vfio_mig.conform.x", "from vfio_mig.cli import output", ["vfio_mig.cli.output"]),
        ("vfio_mig.conform.x", "import fcntl", ["fcntl"]),
        ("vfio_mig.jobs.x", "import fcntl", ["fcntl"]),
        ("vfio_mig.jobs.x", "def f():\n    if True:\n        import vfio_mig.cli", ["vfio_mig.cli"]),
        ("vfio_mig.jobs.x", "class A:\n    from vfio_mig import cli", ["vfio_mig.cli"]),
        ("vfio_mig.jobs.x", "try:\n    pass\nexcept OSError:\n    import vfio_mig.cli", ["vfio_mig.cli"]),
        ("vfio_mig.jobs.x", "if TYPE_CHECKING:\n    pass\nelse:\n    import vfio_mig.cli", ["vfio_mig.cli"]),
        ("vfio_mig.jobs.x", "if not TYPE_CHECKING:\n    import vfio_mig.cli", ["vfio_mig.cli"]),
        ("vfio_mig.image.x", "from vfio_mig import Session", ["vfio_mig.Session"]),
        ("vfio_mig.image.x", "from vfio_mig import __version__", ["vfio_mig.__version__"]),
        (
            "vfio_mig.image.x",
            "if TYPE_CHECKING:\n    from vfio_mig.device import Device",
            ["vfio_mig.device.Device"],
        ),
        ("vfio_mig.image.x", "import vfio_mig", ["vfio_mig"]),
        ("vfio_mig.image.x", "from vfio_mig import *", ["vfio_mig.*"]),
        ("vfio_mig", "from vfio_mig.cli import main", ["vfio_mig.cli.main"]),
    ],
)
def test_an_import_upwards_or_sideways_is_noticed(module: str, source: str, expected: list[str]) -> None:
    assert violations(module, source) == expected


def test_a_relative_import_of_a_package_counts_from_itself() -> None:
    assert violations("vfio_mig.image", "from ..host import mdev", is_package=True) == ["vfio_mig.host.mdev"]
    assert violations("vfio_mig.image", "from . import tar", is_package=True) == []
    assert violations("vfio_mig.image.x", "from . import tar") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vfio_mig.image.x", "from vfio_mig.errors import ImageError\nfrom vfio_mig.image import tar\nimport os"),
        ("vfio_mig.image.x", "from vfio_mig.uapi import ffi\nfrom vfio_mig import uapi\nuapi.ffi"),
        ("vfio_mig.image.x", "from vfio_mig.version import __version__"),
        ("vfio_mig.host.x", "from vfio_mig.device import Device"),
        ("vfio_mig.protocols.x", "from vfio_mig.device import Device\nimport vfio_mig.host"),
        ("vfio_mig.jobs.x", "from vfio_mig import dirty, image, protocols, host, device, uapi, errors"),
        ("vfio_mig.cli.x", "from vfio_mig.jobs.save import save\nfrom vfio_mig.host import mdev"),
        ("vfio_mig.uapi", "import fcntl\nfrom vfio_mig.errors import errno_text"),
    ],
)
def test_what_the_house_allows_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


OUTSIDE: Final = [path for room in (PACKAGE, "tools") for path in sorted((ROOT / room).rglob("*.py"))]
LAB_USES: Final = {"gpu", "lab", "vm"}
"""Rooms of tools whose modules the lab may import: the emulated GPU's control, and how complaints are found."""


def names_in(module: str, source: str) -> set[str]:
    return {name for node in ast.walk(ast.parse(source)) for name in imported(module, node, is_package=False)}


def of_tests(module: str, source: str) -> set[str]:
    return {name for name in names_in(module, source) if name.split(".")[0] == "tests"}


@pytest.mark.parametrize("path", OUTSIDE, ids=name_of)
def test_nothing_outside_the_tests_imports_them(path: Path) -> None:
    assert of_tests(name_of(path), path.read_text("utf-8")) == set()


def test_an_import_of_the_tests_is_noticed() -> None:
    assert of_tests("tools.x", "from tests.vm import cli") == {"tests.vm.cli"}
    assert of_tests("tools.x", "def f():\n    import tests.conftest") == {"tests.conftest"}
    assert of_tests("tools.x", "import testsuite") == set()


def tool_rooms() -> dict[str, set[str]]:
    """Return which rooms of tools each of them imports; a module that stands alone is a room."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tools").rglob("*.py")):
        room = path.relative_to(ROOT / "tools").parts[0].removesuffix(".py")
        names = names_in(name_of(path), path.read_text("utf-8"))
        others = {name.split(".")[1] for name in names if name.startswith("tools.")}
        found.setdefault(room, set()).update(others - {room})
    return found


def test_no_rooms_of_tools_make_a_circle() -> None:
    rooms = tool_rooms()
    assert rooms["vm_cli"] == {"kvmgt", "l2", "vm"}
    assert circles(rooms) == {}


KMOD: Final = ROOT / "tools/kmod"
KMOD_FLOORS: Final = ("gvt_defects.h", "gvt_sample.h", "lab", "hw", "vfio", "main.c")
"""The sample driver's rooms from the ground up: each includes those before it."""
INCLUDE: Final = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def kmod_climbs(name: str, source: str) -> list[str]:
    """Return what a file of the sample driver includes from a floor above its own; *name* is relative to its root."""
    room = name.partition("/")[0]
    allowed = KMOD_FLOORS[: KMOD_FLOORS.index(room) + 1]
    found = []
    for included in INCLUDE.findall(source):
        path = included if (KMOD / included).exists() else f"{room}/{included}"
        if (KMOD / path).exists() and path.partition("/")[0] not in allowed:
            found.append(included)
    return found


@pytest.mark.parametrize(
    "path", [path for path in sorted(KMOD.rglob("*.[ch]")) if not path.name.endswith(".mod.c")], ids=lambda p: p.name
)
def test_the_sample_driver_includes_downwards_only(path: Path) -> None:
    assert kmod_climbs(str(path.relative_to(KMOD)), path.read_text("utf-8")) == []


def test_an_include_upwards_in_the_sample_driver_is_noticed() -> None:
    assert kmod_climbs("hw/gtt.c", '#include "vfio/vfio.h"\n#include "lab/lab.h"\n#include "hw.h"') == ["vfio/vfio.h"]
    assert kmod_climbs("lab/note.c", '#include "hw/hw.h"') == ["hw/hw.h"]
    assert kmod_climbs("gvt_sample.h", '#include <linux/bits.h>\n#include "lab/lab.h"') == ["lab/lab.h"]
    assert kmod_climbs("vfio/mig.c", '#include "mig.h"\n#include "hw/hw.h"\n#include "gvt_rfc.h"') == []


def test_the_lab_knows_nothing_of_those_who_use_it() -> None:
    found = {
        name.split(".")[1]
        for path in sorted((ROOT / "tools/lab").rglob("*.py"))
        for name in names_in(name_of(path), path.read_text("utf-8"))
        if name.split(".")[0] == "tools"
    }
    assert found == LAB_USES


def test_the_directories_of_tests_hold_only_tests_in_the_vm() -> None:
    files = {path.name for path in (ROOT / "tests/vm").glob("*.py") if not path.name.startswith("test_")}
    assert files == {"conftest.py"}
