# SPDX-License-Identifier: MIT
"""The package's public names."""

import ast
import subprocess
import sys
from pathlib import Path

import click
import pytest

import vfio_mig
from tests.unit.test_cli_parse import Untouched as ChoosesNothing
from vfio_mig.cli.main import cli
from vfio_mig.device import Device
from vfio_mig.host.devices import HostDevice


def test_every_public_name_is_there_and_no_other_is_announced() -> None:
    assert len(set(vfio_mig.__all__)) == len(vfio_mig.__all__)
    for name in vfio_mig.__all__:
        found = getattr(vfio_mig, name)
        assert found.__module__.startswith("vfio_mig.")
        assert found.__doc__, f"{name} has no docstring"
        assert name in dir(vfio_mig)


def test_type_checkers_are_told_the_same_names_in_the_same_places() -> None:
    tree = ast.parse(Path(vfio_mig.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    told |= {
        ast.unparse(node.targets[0]): ast.unparse(node.value) for node in block.body if isinstance(node, ast.Assign)
    }
    homes = {
        name: f"vfio_mig.{module}.{vfio_mig._THERE.get(name, name)}"
        for module, names in vfio_mig._HOMES.items()
        for name in names
    }
    assert told.keys() == homes.keys()
    assert [name for name, where in told.items() if not homes[name].endswith(where)] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = vfio_mig.no_such_thing


def test_importing_the_package_imports_none_of_its_rooms() -> None:
    code = "import sys, vfio_mig; print([name for name in sys.modules if name.startswith('vfio_mig.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['vfio_mig.version']"


# Every command is one function
FUNCTIONS = {
    "check": "check_image",
    "conform": "conform_device",
    "diff": "diff_images",
    "dirty": "fetch_dirty",
    "doctor": "examine_host",
    "extract": "extract_image",
    "hold": "hold_device",
    "info": "device_info",
    "inspect": "inspect_image",
    "list": "list_devices",
    "mdev create": "create_mdev",
    "mdev remove": "remove_mdev",
    "mdev types": "mdev_types",
    "migrate": "migrate",
    "pack": "pack_image",
    "pages": "load_pages",
    "reset": "reset_device",
    "restore": "restore",
    "save": "save",
    "start": "start_device",
    "state": "device_state",
    "status": "device_status",
    "stop": "stop_device",
    "sync": "sync_dirty",
    "verify": "verify_image",
    "vm list": "list_vms",
    "vm restore": "restore_vm",
    "vm save": "save_vm",
}


def test_every_command_is_one_function() -> None:
    context = click.Context(cli)
    commands: set[str] = set()
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        below = [f"{name} {one}" for one in command.commands] if isinstance(command, click.Group) else [name]
        commands.update(below)
    assert commands == FUNCTIONS.keys()
    assert all(callable(getattr(vfio_mig, name)) and name in vfio_mig.__all__ for name in FUNCTIONS.values())


def test_a_warning_reaches_who_has_given_no_callback_at_their_own_line() -> None:
    device = Device("gpu", -1)
    found = HostDevice("gpu", "/sys/x", "mdev", "t", "gpu", "vfio_mdev", 7)
    session = vfio_mig.Session(found, device, ChoosesNothing(device))
    with pytest.warns(vfio_mig.VfioMigWarning, match=r"^gpu: look\\x1b at it$") as caught:
        session.warn("look\x1b at it")
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name]
    seen: list[str] = []
    told = vfio_mig.Session(found, device, ChoosesNothing(device), settings=vfio_mig.Settings(warn=seen.append))
    told.warn("look at it")
    assert seen == ["gpu: look at it"]
