# SPDX-License-Identifier: MIT
"""The Ansible collection: it knows nothing of vfio_mig but its options, and real tools of ansible-core take it.

That it moves devices shows ``scripts/pair --ansible``.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import click
import pytest

from vfio_mig.cli.main import cli

ROOT: Final = Path(__file__).parents[2]
COLLECTION: Final = ROOT / "contrib/ansible"
NAME: Final = "vfio_mig.fleet"
FILES: Final = sorted(COLLECTION.rglob("*.py"))
MODULES: Final = sorted((COLLECTION / "plugins/modules").glob("*.py"))
MAY_IMPORT: Final = {"__future__", "ansible", "ansible_collections", "json", "os", "typing", "collections"}
OUR_COMMAND: Final = {"vfio_mig_save": "save", "vfio_mig_migrate": "migrate"}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def text_of(path: Path, name: str) -> str:
    """Return the text in a module's variable."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return str(ast.literal_eval(node.value))
    raise LookupError(f"{path.name} has no {name}")


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_calls_the_program_and_imports_nothing_of_it(path: Path) -> None:
    """On a managed host the package may not be importable, and what is decided is the program's business."""
    for node in ast.walk(tree_of(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in MAY_IMPORT, name
            if name.startswith("ansible_collections"):
                assert name.startswith(f"ansible_collections.{NAME}.plugins.module_utils"), name
    assert "subprocess" not in path.read_text("utf-8")
    assert "shell" not in path.read_text("utf-8")


def options_of(command: click.Command) -> set[str]:
    return {word for parameter in command.params for word in parameter.opts}


@pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])
def test_a_module_s_options_are_documented_and_the_program_has_them(path: Path) -> None:
    assert text_of(path, "DOCUMENTATION").startswith(f"\nmodule: {path.stem}\n")
    assert f"  {NAME}.{path.stem}:\n" in text_of(path, "EXAMPLES")
    assert text_of(path, "RETURN")
    if path.stem not in OUR_COMMAND:
        return
    command = cli.get_command(click.Context(cli), OUR_COMMAND[path.stem])
    assert command is not None
    known = options_of(command)
    source = path.read_text("utf-8")
    block = re.search(r"for name in \((.*?)\)\n", source, re.DOTALL)
    assert block is not None
    names = re.findall(r'"(\w+)"', block[1])
    assert len(names) > 6
    for name in names:
        assert f"--{name.replace('_', '-')}" in known, name


def test_every_schema_that_is_named_is_there() -> None:
    named = {name for path in FILES for name in re.findall(r"docs/schemas/[\w-]+\.json", path.read_text("utf-8"))}
    assert len(named) > 4
    assert all((ROOT / name).is_file() for name in named)


# With ansible-core


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Have the collection built and installed, as users do; the environment that finds it."""
    pytest.importorskip("ansible", reason="no ansible-core: scripts/setup --ansible")
    directory = tmp_path_factory.mktemp("ansible")
    environment = {
        **os.environ,
        "HOME": str(directory),
        "ANSIBLE_HOME": str(directory / "home"),
        "ANSIBLE_COLLECTIONS_PATH": str(directory / "collections"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LC_ALL": "C.UTF-8",
    }
    run(environment, "ansible-galaxy", "collection", "build", COLLECTION, "--output-path", directory)
    (archive,) = directory.glob("*.tar.gz")
    run(environment, "ansible-galaxy", "collection", "install", "--offline", archive, "-p", directory / "collections")
    return environment


def run(environment: dict[str, str], *words: str | Path, code: int = 0) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_it_builds_and_ansible_doc_shows_every_option(installed: dict[str, str]) -> None:
    names = [f"{NAME}.{path.stem}" for path in MODULES]
    documents = json.loads(run(installed, "ansible-doc", "--json", *names))
    assert documents.keys() == set(names)
    shared = documents[f"{NAME}.vfio_mig_save"]["doc"]["options"]
    assert {"executable", "memory", "all_memory", "max_downtime", "path", "force"} <= shared.keys()
    assert "run" not in documents[f"{NAME}.vfio_mig_info"]["doc"]["options"]


@pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])
def test_what_is_documented_is_what_the_module_takes(installed: dict[str, str], path: Path) -> None:
    name = f"{NAME}.{path.stem}"
    options = json.loads(run(installed, "ansible-doc", "--json", name))[name]["doc"]["options"]
    code = f"""
import json, runpy, sys
from unittest import mock
sys.path.insert(0, {installed["ANSIBLE_COLLECTIONS_PATH"]!r})
class Stop(Exception): pass
def take(spec, **_):
    print(json.dumps(spec))
    raise Stop
with mock.patch("ansible.module_utils.basic.AnsibleModule", take):
    try:
        runpy.run_module("ansible_collections.{NAME}.plugins.modules.{path.stem}", run_name="__main__")
    except Stop:
        pass
"""
    spec = json.loads(run(installed, sys.executable, "-c", code))
    assert spec.keys() == options.keys()
    for option, rule in spec.items():
        for key in ("type", "default", "elements", "required"):
            assert rule.get(key, False if key == "required" else None) == options[option].get(
                key, False if key == "required" else None
            ), (option, key)


def test_the_playbook_is_one(installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "inventory").write_text("[vfio_mig_targets]\nother\n[all]\none\n")
    words = ("ansible-playbook", "-i", tmp_path / "inventory", "-e", "vfio_mig_from=one", "--syntax-check")
    assert "playbooks/empty_host.yml" in run(installed, *words, f"{NAME}.empty_host")


def play(installed: dict[str, str], directory: Path, arguments: dict[str, Any], *, check: bool = False) -> Any:
    """Run a module on this host; what ansible prints."""
    words = ["ansible", "localhost", "-i", "localhost,", "-c", "local", "-m", f"{NAME}.{arguments.pop('module')}"]
    words += ["-a", json.dumps(arguments), "-e", f"ansible_python_interpreter={sys.executable}"]
    done = subprocess.run(
        [*words, *(["--check"] * check)], env={**installed, "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1"}, cwd=directory,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.stdout


def test_an_error_of_the_program_is_the_task_s(installed: dict[str, str], tmp_path: Path) -> None:
    """By the real program: on no host there is such a device."""
    program = Path(sys.executable).with_name("vfio-mig")
    none = "00000000-0000-4000-8000-00000000dead"
    for module, more in (
        ("vfio_mig_info", {}),
        ("vfio_mig_save", {"path": str(tmp_path / "x.vfm")}),
        ("vfio_mig_migrate", {"target": "ssh://other/x"}),
    ):
        said = play(installed, tmp_path, {"module": module, "executable": str(program), "device": none, **more})
        assert "FAILED" in said
        result = json.loads(said.partition("=>")[2])
        assert none in result["msg"]
        assert result["error"]["class"] == "DeviceNotFoundError"
        assert result["rc"] == result["error"]["code"] == 3
    (tmp_path / "x.vfm").write_bytes(b"no image")
    more = {"module": "vfio_mig_save", "executable": str(program), "device": none, "path": str(tmp_path / "x.vfm")}
    result = json.loads(play(installed, tmp_path, more, check=True).partition("=>")[2])
    assert result["error"]["class"] == "ImageError"
    assert (tmp_path / "x.vfm").read_bytes() == b"no image"
