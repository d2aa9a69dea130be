# SPDX-License-Identifier: MIT
"""What is installed: an sdist made of the files that are under version control, a wheel made of the sdist alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.unit import saved_images

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]


def clean_environment(home: Path) -> dict[str, str]:
    """Make an environment that knows nothing of this checkout; what says where packages come from stays."""
    kept = {
        key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_")) or "proxy" in key.lower()
    }
    return {**kept, "PATH": os.defpath, "HOME": str(home), "LANG": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(command: Sequence[str | Path], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command far from the checkout; a failure shows what it said."""
    done = subprocess.run(
        command, cwd=cwd, env={**clean_environment(cwd), **more}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def environment(directory: Path, *requirements: str | Path) -> Path:
    """Make a virtual environment with these in it; returns its bin directory."""
    # pip's own Python, not that of the environment in which the tests run
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    run([python, "-m", "venv", directory], directory.parent)
    if requirements:
        run([directory / "bin/pip", "install", "-q", *requirements], directory.parent)
    return directory / "bin"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what git knows of, changed or not; of an unpacked sdist, all."""
    copy = tmp_path_factory.mktemp("source") / "vfio_mig"
    if not (ROOT / ".git").exists():
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info"))
        return copy
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and nothing else."""
    room = tmp_path_factory.mktemp("sdist")
    made = environment(room / "venv", "build")
    shutil.copytree(source, room / "vfio_mig")  # where the build leaves things behind
    run([made / "python", "-m", "build", "--sdist", "--outdir", room, room / "vfio_mig"], room)
    (archive,) = room.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the sdist."""
    room = tmp_path_factory.mktemp("unpacked")
    run(["tar", "-xzf", sdist], room)
    return room / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, from the sdist's file alone."""
    room = tmp_path_factory.mktemp("wheel")
    made = environment(room / "venv")
    run([made / "pip", "wheel", "-q", "--no-deps", "--wheel-dir", room, sdist], room)
    (archive,) = room.glob("*.whl")
    return archive


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an image of a vGPU's state."""
    return saved_images.write(tmp_path_factory.mktemp("image") / "gpu.vfm", saved_images.gvt_state())
