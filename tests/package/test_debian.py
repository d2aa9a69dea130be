# SPDX-License-Identifier: MIT
"""The Debian packages, made of the sdist, installed in a new Debian, tried there and purged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from tests.package.conftest import run
from vfio_mig import __version__
from vfio_mig.cli.main import COMMANDS

if TYPE_CHECKING:
    from pathlib import Path

# Each is run in the new Debian by bash, in /.
TRIALS: Final = {
    "version": "vfio-mig --version",
    "list": "vfio-mig list",
    "doctor": "vfio-mig doctor",
    "verify": "vfio-mig verify /root/gpu.vfm",
    "cut off": "vfio-mig verify /root/cut.vfm",
    "inspect": "vfio-mig inspect /root/gpu.vfm",
    "library": "python3 -W error -c 'import vfio_mig; print(vfio_mig.verify_image(\"/root/gpu.vfm\").protocol)'",
    "man": "man vfio-mig-save | col -b",
    "pages": "cd /usr/share/man/man1 && ls vfio-mig* qemu-*",
    "qemu": "qemu-save --version && qemu-restore --version",
    "bash": (
        ". /usr/share/bash-completion/bash_completion; _completion_loader vfio-mig; COMP_WORDS=(vfio-mig sta) "
        "COMP_CWORD=1; _vfio_mig_completion vfio-mig; echo ${COMPREPLY[@]}; complete -p vfio-mig"
    ),
    "zsh": "zsh -fc 'autoload -U compinit; compinit -u -D; echo $_comps[vfio-mig]'",
    "fish": "fish -c \"complete -C 'vfio-mig sta'\"",
    "unit": "systemd-analyze verify vfio-mig-hold@83b8f4f2-509f-382f-3c1e-e6bfe0fa1001.service",
    "documents": "ls /usr/share/doc/vfio-mig /usr/share/doc/vfio-mig/docs",
}
FOR_TRIALS: Final = "man-db bsdextrautils bash-completion zsh fish systemd"
LIBRARIES: Final = "python3-cffi-backend python3-click python3-numpy python3-tqdm"
# What belongs to us afterwards: all but the notes of apt, dpkg and of the other packages' caches.
NOT_OURS: Final = "/proc /sys /dev /root /out /tmp /run /debs /var/lib/apt /var/lib/dpkg /var/log /var/cache"
FILES: Final = f"find / -xdev \\( -path {' -o -path '.join(NOT_OURS.split())} \\) -prune -o -print | sort"
LACKING: Final = 7


def script() -> str:
    """Write what is done in the new Debian: each trial leaves what it said and its exit status in /out."""
    lines = [
        "set -eu",
        "export DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 MANWIDTH=100",
        "mkdir /out",
        f"{FILES} >/out/before",
        # Everything they depend on is there already: nothing else may come with them.
        "apt-get install -y --no-install-recommends /debs/*.deb >/out/install 2>&1",
    ]
    lines += [
        f"cat >/root/trial <<'TRIAL'\n{command}\nTRIAL\n"
        f"(cd /; bash /root/trial) >'/out/{name}' 2>&1 && echo 0 >'/out/{name}.status' || echo $? >'/out/{name}.status'"
        for name, command in TRIALS.items()
    ]
    lines += ["apt-get purge -y vfio-mig python3-ioctl-opt >/out/purge 2>&1", f"{FILES} >/out/after"]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def packages(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build them from the unpacked sdist; returns their directory."""
    room = tmp_path_factory.mktemp("debs")
    before = sorted(unpacked.rglob("*"))
    done = subprocess.run([unpacked / "scripts/package", room], capture_output=True, text=True, check=False)
    if done.returncode == LACKING:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(map(str, room.iterdir()))
    assert sorted(unpacked.rglob("*")) == before  # nothing was written there
    return room


def version() -> str:
    return re.sub(r"\.?(dev|a|b|rc)(\d+)", r"~\1\2", __version__).replace(".post", "+post")


def field(package: Path, name: str) -> str:
    return subprocess.run(["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True).stdout.strip()


def test_the_package_is_for_every_machine_and_needs_what_debian_has(packages: Path) -> None:
    ours = packages / f"vfio-mig_{version()}_all.deb"
    names = {re.split(r"[ :]", one)[0] for one in field(ours, "Depends").split(", ")}
    ours_need = {"cffi-backend", "click", "numpy", "ioctl-opt", "tqdm"}
    assert names == {"python3", *(f"python3-{one}" for one in ours_need)}
    assert field(ours, "Version") == version()
    (other,) = packages.glob("python3-ioctl-opt_*_all.deb")
    # Debian's own would be newer
    command = [
        "dpkg",
        "--compare-versions",
        field(other, "Version"),
        "lt",
        field(other, "Version").split("-")[0] + "-1",
    ]
    assert subprocess.run(command, check=False).returncode == 0


def test_lintian_finds_nothing(packages: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    command = ["lintian", "--fail-on", "error,warning", *map(str, packages.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_same_source_makes_the_same_bytes(unpacked: Path, packages: Path, tmp_path: Path) -> None:
    subprocess.run([unpacked / "scripts/package", tmp_path], capture_output=True, check=True)
    for one in packages.iterdir():
        assert (tmp_path / one.name).read_bytes() == one.read_bytes()


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def debian(
    request: pytest.FixtureRequest, packages: Path, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Try them in a new Debian of that release; returns the directory with what was found."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    room = tmp_path_factory.mktemp(request.param)
    (room / "script").write_text(script(), "utf-8")
    (room / "cut.vfm").write_bytes(image.read_bytes()[:-2048])
    run(
        [
            "mmdebstrap",
            "--variant=minbase",
            # docs, man pages and all: no path is left out, as it is in containers
            f"--include={','.join((LIBRARIES + ' ' + FOR_TRIALS).split())}",
            '--customize-hook=mkdir "$1/debs"',
            f"--customize-hook=copy-in {' '.join(map(str, packages.iterdir()))} /debs",
            f"--customize-hook=copy-in {image} {room}/cut.vfm {room}/script /root",
            '--customize-hook=chroot "$1" bash /root/script',
            f"--customize-hook=copy-out /out {room}",
            request.param,
            "/dev/null",
        ],
        room,
        PATH="/usr/sbin:/usr/bin:/sbin:/bin",
        TMPDIR=os.environ.get("TMPDIR", "/tmp"),
    )
    return room / "out"


def found(debian: Path, name: str, status: int = 0) -> str:
    """Read what a trial said."""
    said = (debian / name).read_text("utf-8")
    assert (debian / f"{name}.status").read_text() == f"{status}\n", said
    return said


def test_a_new_debian_installs_them_runs_them_and_is_as_before_when_they_are_purged(debian: Path) -> None:
    assert "2 newly installed, 0 to remove" in (debian / "install").read_text("utf-8")
    assert found(debian, "version") == f"vfio-mig {__version__}\n"
    found(debian, "list")
    assert "note     matplotlib:" in found(debian, "doctor", 7)
    assert found(debian, "verify").startswith("/root/gpu.vfm: good: gvt-rfc image")
    assert "the file is incomplete" in found(debian, "cut off", 6)
    assert "workload" in found(debian, "inspect")
    assert found(debian, "library") == "gvt-rfc\n"
    assert found(debian, "man").startswith("VFIO-MIG-SAVE(1)")
    pages = {"vfio-mig.1.gz", "qemu-save.1.gz", "qemu-restore.1.gz", *(f"vfio-mig-{name}.1.gz" for name in COMMANDS)}
    assert set(found(debian, "pages").split()) == pages
    assert found(debian, "qemu") == f"qemu-save {__version__}\nqemu-restore {__version__}\n"
    assert found(debian, "bash").splitlines()[0] == "start state status"
    assert "_vfio_mig_completion" in found(debian, "bash")
    assert found(debian, "zsh") == "_vfio-mig\n"
    assert {line.split()[0] for line in found(debian, "fish").splitlines()} == {"start", "state", "status"}
    assert found(debian, "unit") == ""
    assert {"README.md.gz", "copyright", "install.md", "CHANGELOG.md.gz"} <= set(found(debian, "documents").split())
    before, after = (set((debian / name).read_text("utf-8").splitlines()) for name in ("before", "after"))
    assert len(before) > 1000
    assert (before - after, after - before) == (set(), set())
