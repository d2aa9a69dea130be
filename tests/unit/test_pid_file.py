# SPDX-License-Identifier: MIT
"""The file that tells who holds a device: no other file is touched under its name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vfio_mig.errors import UsageError
from vfio_mig.jobs.hold import pid_file

if TYPE_CHECKING:
    from pathlib import Path


def test_it_is_readable_for_everybody_and_goes_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pid_file(str(path)) as write:
        assert not path.exists()
        write()
        assert path.read_text() == f"{os.getpid()}\n"
        assert path.stat().st_mode & 0o7777 == 0o644
    assert not path.exists()


def test_its_mode_is_set_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path it could be another file's by then, which would become readable for everybody."""
    monkeypatch.setattr(os, "chmod", lambda *_, **__: pytest.fail("chmod by path"))
    with pid_file(str(tmp_path / "pid")) as write:
        write()


def test_another_file_of_its_name_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pid_file(str(path)) as write:
        write()
        path.unlink()
        path.write_text("another one's")
    assert path.read_text() == "another one's"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "pid").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="is a symbolic link"), pid_file(str(tmp_path / "pid")):
        pass
