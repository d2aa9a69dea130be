# SPDX-License-Identifier: MIT
"""Calls ``vfio-mig --json`` and passes on what it says: all that these modules know is how its options are called."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ansible.module_utils.basic import AnsibleModule

COMMON: dict[str, dict[str, Any]] = {"executable": {"type": "path", "default": "vfio-mig"}}
COPYING: dict[str, dict[str, Any]] = {
    "memory": {"type": "list", "elements": "str", "default": []},
    "all_memory": {"type": "bool", "default": False},
    "live": {"type": "bool", "default": False},
    "rounds": {"type": "int"},
    "max_downtime": {"type": "float"},
    "strict": {"type": "bool", "default": False},
    "force": {"type": "bool", "default": False},
}


def words(values: Mapping[str, Any], options: Mapping[str, str]) -> list[str]:
    """Return the options of a command line: of a list one for each value, of what is false or not given none.

    >>> words({"a": ["x", "y"], "b": True, "c": 0, "d": None, "e": False}, {n: f"--{n}" for n in "abcde"})
    ['--a=x', '--a=y', '--b', '--c=0']
    """
    result: list[str] = []
    for name, option in options.items():
        value = values[name]
        if value is None or value is False:
            continue
        if value is True:
            result.append(option)
        else:
            result += [f"{option}={one}" for one in (value if isinstance(value, list) else [value])]
    return result


class Command:
    """The program of a managed host."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        self._program = module.get_bin_path(module.params["executable"], required=True)

    def _call(self, *arguments: str) -> tuple[int, Any, str]:
        code, out, err = self._module.run_command([self._program, "--json", *arguments])
        try:
            document = json.loads(out)
        except ValueError:
            document = None
        return code, document, err.strip()

    def run(self, *arguments: str, **known: Any) -> Any:
        """Return the document of a command; the module fails with its error if it fails.

        :param known: what the module has found out before, for its result.
        """
        code, document, err = self._call(*arguments)
        for line in err.splitlines() if code == 0 else ():
            self._module.warn(line)
        if code or document is None:
            self._fail(code, document, err, arguments, known)
        return document

    def _fail(
        self, code: int, document: Any, err: str, arguments: tuple[str, ...], known: Mapping[str, Any]
    ) -> NoReturn:
        error = document if isinstance(document, dict) else {}
        message = error.get("message") or err or f"it ended with {code} and said nothing"
        self._module.fail_json(msg=message, error=error, rc=code, cmd=[self._program, *arguments], **known)
        raise AssertionError("fail_json came back")
