# SPDX-License-Identifier: MIT
from __future__ import annotations

import argparse
import subprocess
from typing import TYPE_CHECKING

import pytest

from tools.vm import guest
from tools.vm.errors import RunnerError
from tools.vm.link import Link, parse, plugged
from tools.vm_cli import parse as parse_options

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "text", ["", "a", "a/0", "a/3", "/1", "../x/1", "a b/1", "a,b/1", "-a/1", "a/1/2", "x" * 40 + "/1"]
)
def test_an_end_has_a_plain_name_and_a_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="NAME/1"):
        parse(text)
    assert parse_options(["--link", "a-1_b/2", "true"]).link == ("a-1_b", 2)


def test_each_end_sends_to_the_other_one(tmp_path: Path) -> None:
    one, two = (Link(tmp_path / "a,b", end) for end in (1, 2))
    assert (one.address, one.peer) == (two.peer, two.address)
    directory = f"{tmp_path}/a,,b"
    for words in (f"local.path={directory}/1", f"remote.path={directory}/2"):
        assert words in one.qemu_arguments()[1]
    assert f"local.path={directory}/2" in two.qemu_arguments()[1]
    assert one.qemu_arguments()[3] != two.qemu_arguments()[3]


def test_an_end_is_one_vm_s_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    directory = tmp_path / "links" / "pair"
    one, two = (Link(directory, end) for end in (1, 2))
    with plugged(one), plugged(two):
        (directory / "1").touch()  # QEMU's socket
        with pytest.raises(RunnerError, match="another VM has end 1 of pair"), plugged(one):
            pytest.fail("two VMs have the same end")
        assert directory.stat().st_mode & 0o077 == 0
    assert list((tmp_path / "links").iterdir()) == []
    with plugged(one), plugged(None) as nothing:
        assert nothing == []


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="VFIO_MIG_CACHE"), plugged(Link(tmp_path / ("x" * 120), 1)):
        pytest.fail("QEMU could not bind it")


def test_the_guest_gets_its_address_and_is_told_the_other_one(tmp_path: Path) -> None:
    link = Link(tmp_path, 2)
    seen = guest.environment({}, venv=tmp_path, modules=None, out=tmp_path, release="6.12", link=link)
    assert (seen["VFIO_MIG_LINK"], seen["VFIO_MIG_LINK_PEER"]) == ("10.9.0.2", "10.9.0.1")
    what = guest.Guest(
        tree=tmp_path,
        module=None,
        module_args=[],
        out=tmp_path,
        cwd=tmp_path,
        environment=seen,
        command=["true"],
        link=link,
    )
    script = guest.entry_script(what)
    assert b"link=10.9.0.2\n" in script
    subprocess.run(["bash", "-n"], input=script, check=True)
