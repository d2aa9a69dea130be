# SPDX-License-Identifier: MIT
"""``python -m tools.schemas``: write docs/schemas, a JSON Schema for what each command prints with ``--json``.

They are made of the reports' own annotations and docstrings, so a key cannot be added to one alone.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from vfio_mig import words as vocabulary
from vfio_mig.conform.kit.check import Check as ConformCheck
from vfio_mig.conform.kit.check import Result
from vfio_mig.conform.runner import ConformReport
from vfio_mig.decode.differences import Difference
from vfio_mig.decode.section import Section
from vfio_mig.device import Region
from vfio_mig.dirty.sync import Round
from vfio_mig.errors import VfioMigError
from vfio_mig.host.mdev import MdevType
from vfio_mig.jobs.check import CheckReport, FitCheck, VerifyReport
from vfio_mig.jobs.control import ActionReport, StateReport, StatusReport
from vfio_mig.jobs.dirty import DirtyReport
from vfio_mig.jobs.engine.live import StateRound
from vfio_mig.jobs.engine.steps import STEPS
from vfio_mig.jobs.files.diff import DiffReport
from vfio_mig.jobs.files.extract import ExtractReport, PackReport
from vfio_mig.jobs.files.inspect import InspectReport, SectionBytes
from vfio_mig.jobs.files.pages import PagesReport
from vfio_mig.jobs.files.qemu import DeviceExtractReport, StreamPackReport
from vfio_mig.jobs.hold import HoldReport
from vfio_mig.jobs.migrate import MigrateReport
from vfio_mig.jobs.queries.devices import DeviceInfo, DeviceRow
from vfio_mig.jobs.queries.doctor import DoctorReport, HostCheck
from vfio_mig.jobs.queries.host_report import Fact, HostReport
from vfio_mig.jobs.restore import RestoreReport
from vfio_mig.jobs.save import SaveReport
from vfio_mig.jobs.sync import SyncReport
from vfio_mig.protocols.family import Condition
from vfio_mig.vm.named import VmRestoreReport, VmSaveReport
from vfio_mig.vm.survey import VmDevice, VmRow

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).parents[1]
DIRECTORY: Final = ROOT / "docs" / "schemas"
Schema = dict[str, Any]
_KNOWN: Final[dict[str, Any]] = {
    one.__name__: one
    for one in (
        *(Condition, HostCheck, Difference, Fact, FitCheck, Region, RestoreReport, Result, Round, SaveReport),
        *(Section, StateRound, VmDevice),
    )
}
_SIMPLE: Final[dict[Any, str]] = {str: "string", int: "integer", bool: "boolean", float: "number", NoneType: "null"}
_ADDED: Final[dict[type, dict[str, tuple[Any, str]]]] = {
    Round: {
        "rate": (float, "bytes of guest memory dealt with per second"),
        "estimated_downtime": (float, "seconds that the same round would take with the device stopped"),
    },
    StateRound: {"estimated_downtime": (float, "seconds that the rest is expected to take with the device stopped")},
    ConformReport: {"counts": (dict[str, int], "checks of each outcome")},
}
"""What ``as_dict`` adds to the fields."""
_UNITS: Final = (("_time", "seconds"), ("seconds", "seconds"), ("downtime", "seconds"), ("_bytes", "bytes"))
_STATES: Final = {"state": "of the device afterwards: stop, running, or closed when nobody else has it open"}


class Shown(NamedTuple):
    """What a command prints.

    :param shapes: one of these.
    """

    shapes: tuple[Any, ...]


DOCUMENTS: Final[dict[str, Shown]] = {
    "check": Shown((CheckReport,)),
    "conform": Shown((ConformReport, list[ConformCheck])),
    "diff": Shown((DiffReport,)),
    "dirty": Shown((DirtyReport,)),
    "doctor": Shown((DoctorReport, HostReport)),
    "extract": Shown((ExtractReport, DeviceExtractReport)),
    "hold": Shown((HoldReport, list[HoldReport])),
    "info": Shown((DeviceInfo,)),
    "inspect": Shown((InspectReport, Section, SectionBytes)),
    "list": Shown((list[DeviceRow],)),
    "mdev-create": Shown(({"device": str},)),
    "mdev-types": Shown((list[MdevType],)),
    "migrate": Shown((MigrateReport,)),
    "pack": Shown((PackReport, StreamPackReport)),
    "pages": Shown((PagesReport,)),
    "reset": Shown((ActionReport,)),
    "restore": Shown((RestoreReport, list[RestoreReport])),
    "save": Shown((SaveReport, list[SaveReport])),
    "start": Shown((ActionReport, list[ActionReport])),
    "state": Shown((StateReport,)),
    "status": Shown((StatusReport,)),
    "stop": Shown((ActionReport, list[ActionReport])),
    "sync": Shown((SyncReport,)),
    "verify": Shown((VerifyReport,)),
    "vm-list": Shown((list[VmRow],)),
    "vm-restore": Shown((VmRestoreReport,)),
    "vm-save": Shown((VmSaveReport,)),
}
"""By command; more than one: of several devices a list, and what options make of it: ``--section``, ``--hex``,
``--list``, ``extract --device``, ``pack --into``."""


def _words(report: type) -> dict[str, str]:
    """Return what a docstring's ``:param`` lines say, by name."""
    text = re.sub(r"\s*\n\s+", " ", report.__doc__ or "")
    found = {}
    for names, words in re.findall(r":param ([\w, *]+?): (.*?)(?= :param| :returns|$)", text):
        for name in re.findall(r"\w+", names):
            found[name] = words.strip()
    return found


def _described(report: type, name: str) -> str:
    words = _words(report).get(name) or _STATES.get(name, "") * ("state" in name and report is not StatusReport)
    unit = next((unit for end, unit in _UNITS if name.endswith(end)), "")
    return "; ".join(part for part in (unit, words.rstrip(".")) if part)


def _object(report: Any) -> Schema:
    """Return the schema of a report, every key of which is there, or of named values."""
    if report is SectionBytes:  # bytes are printed as hexadecimal digits
        fields: dict[str, Any] = get_type_hints(report) | {"content": str}
    elif report is ConformCheck:  # of which `conform --list` shows a part
        fields = dict.fromkeys(("id", "rule", "source", "expected", "family"), str) | {"danger": str}
    else:
        fields = report if isinstance(report, dict) else get_type_hints(report, localns=_KNOWN | {"words": vocabulary})
    properties: dict[str, Schema] = {}
    for name, hint in fields.items():
        properties[name] = shape(hint)
        if words := "" if isinstance(report, dict) else _described(report, name):
            properties[name]["description"] = words
    for name, (hint, words) in _ADDED.get(report if isinstance(report, type) else object, {}).items():
        properties[name] = {**shape(hint), "description": words}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _tuple(parts: tuple[Any, ...]) -> Schema:
    if parts[-1] is Ellipsis:
        return {"type": "array", "items": shape(parts[0])}
    return {"type": "array", "prefixItems": [shape(one) for one in parts], "items": False, "minItems": len(parts)}


def shape(hint: Any) -> Schema:
    """Return the schema of an annotation."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"type": "string", "enum": list(parts)}
    if hint is Any:
        return {}
    if isinstance(hint, type) and hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    made: dict[Any, Callable[[], Schema]] = {
        list: lambda: {"type": "array", "items": shape(parts[0])},
        dict: lambda: {"type": "object", "additionalProperties": shape(parts[1])},
        tuple: lambda: _tuple(parts),
        Union: lambda: _either(parts),
        UnionType: lambda: _either(parts),
    }
    return made.get(origin, lambda: _object(hint))()


def _either(parts: tuple[Any, ...]) -> Schema:
    first, *rest = (part for part in parts if part is not NoneType)
    found = shape(first)
    if rest:
        raise TypeError(f"{parts}: no rule for this")
    return {**found, "type": [found["type"], "null"]}


def document(command: str) -> Schema:
    """Return the schema of what a command prints."""
    shapes = [shape(one) for one in DOCUMENTS[command].shapes]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"vfio-mig --json {command.replace('-', ' ')}",
    }
    return {**head, **(shapes[0] if len(shapes) == 1 else {"oneOf": shapes})}


def error() -> Schema:
    """Return the schema of what any command prints when it fails and has printed nothing yet."""
    known = VfioMigError.__subclasses__()
    for one in known:  # grows on the way
        known.extend(one.__subclasses__())
    known = [one for one in known if one.__module__ == VfioMigError.__module__]
    properties: Schema = {
        "class": {"enum": sorted(one.__name__ for one in known), "description": "of the library; docs/errors.md"},
        "code": {"enum": sorted({one.exit_code for one in known}), "description": "the exit code"},
        "message": {"type": "string", "description": "the line that is on stderr, without the program's name"},
        "problem": {"type": "string", "description": "what failed"},
        "hint": {"type": ["string", "null"], "description": "what to do next"},
        "device": {"type": ["string", "null"], "description": "on which device it failed"},
        "errno": {"type": ["string", "null"], "description": "name of the kernel's error number"},
        "consequences": {
            "type": "array",
            "items": {"type": "string"},
            "description": "what is left behind that could not be undone",
        },
        "while_rolling_back": {
            "type": "array",
            "items": {"type": "string"},
            "description": "what failed in addition while the job was undone",
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vfio-mig --json, when it fails",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def events() -> Schema:
    """Return the schema of a line of ``--events``: one for each step, and one for its end."""
    time = {"time": {"type": "number", "description": "seconds since 1970"}}
    step = {
        **time,
        "step": {"enum": sorted({step for steps in STEPS.values() for step in steps}), "description": "of the job"},
        "job": {"enum": sorted(STEPS)},
        "device": {"type": "string"},
    }
    code = {"type": "integer", "description": "the exit code"}
    error = {"type": "string", "description": "what stderr says"}
    shapes = (
        step,
        {**time, "step": {"const": "done"}, "code": code},
        {**time, "step": {"const": "failed"}, "code": code, "error": error},
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "a line of vfio-mig --events",
        "oneOf": [
            {"type": "object", "properties": one, "required": list(one), "additionalProperties": False}
            for one in shapes
        ],
    }


def files() -> dict[str, str]:
    """Return the name and content of each file."""
    found = {f"{command}.json": document(command) for command in DOCUMENTS}
    found |= {"error.json": error(), "events.json": events()}
    return {name: json.dumps(schema, indent=2) + "\n" for name, schema in found.items()}


def main() -> int:
    """Write them all, and remove what is none of them."""
    DIRECTORY.mkdir(exist_ok=True)
    wanted = files()
    for path in DIRECTORY.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (DIRECTORY / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
