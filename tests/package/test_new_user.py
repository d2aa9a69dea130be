# SPDX-License-Identifier: MIT
"""A new user's walk: a clone in an empty Debian that has Python and git, and what README.md and docs/install.md say.

What starts a VM is left out, but all that a VM is made of is fetched and built, as nothing but an empty machine shows
which program was forgotten in the list of those that are needed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from tests.doc_examples import ROOT, reason
from tests.package.conftest import run
from vfio_mig import __version__

PACKAGES: Final = "ca-certificates git python3 python3-pip python3-venv man-db"
PREPARED: Final = "scripts/vm --gvt --l2 --kvmgt ours --memory 2G --build-all"
"""Makes all that ``scripts/demo --gvt`` and ``scripts/demo --gvt --vm`` are made of, and starts nothing."""
STEPS: Final = {
    "setup": "scripts/setup",
    "prepared": PREPARED,
    "again": PREPARED,
    "unit": "scripts/test --unit",
    "docs": "scripts/docs",
    "package": "scripts/package",
}


def typed(page: str) -> list[str]:
    """Return the lines of a page's examples that are run here and nowhere else."""
    lines = re.findall(r"(?m)^ {4}(\S.*)$", (ROOT / page).read_text("utf-8"))
    return [line for line in lines if "test_new_user.py" in (reason(line) or "")]


def script() -> str:
    """Write what is typed in the new Debian: each step leaves what it said and its exit status in /out."""
    installed = "\n".join(["set -e", *typed("README.md"), "PATH=$PATH:/opt/vfio-mig/bin", "vfio-mig list"])
    manual = "\n".join(["set -e", *typed("docs/install.md"), "vfio-mig --version", "complete -p vfio-mig"])
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # root's
    lines = [
        f"export LANG=C.UTF-8 HOME=/root PATH={path}",
        "mkdir /out",
        "cd /root/vfio_mig",
        "mount -t tmpfs tmpfs /dev/shm",
    ]
    for name, command in {**STEPS, "readme": installed, "install": manual}.items():
        lines += [
            f"cat >/root/step <<'STEP'\n{command}\nSTEP",
            f"code=0; bash /root/step >/out/{name} 2>&1 </dev/null || code=$?; echo $code >/out/{name}.status",
        ]
    return "\n".join([*lines, "ls dist >/out/dist", "umount /dev/shm"]) + "\n"


def internet() -> list[str]:
    """Return the hooks that give a root what leads to the package index from here, if it is a place of its own."""
    files = {os.environ.get(name, "") for name in ("PIP_CERT", "SSL_CERT_FILE", "PIP_CONFIG_FILE")}
    return [f"--customize-hook=upload {path} {path}" for path in sorted(files) if Path(path).is_file()]


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def debian(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Walk in a new Debian of that release; returns the directory with what was said."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    room = tmp_path_factory.mktemp(request.param)
    (room / "script").write_text(script(), "utf-8")
    hooks = [f"copy-in {source} {room}/script /root", 'chroot "$1" bash /root/script', f"copy-out /out {room}"]
    run(
        [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(PACKAGES.split())}",
            *internet(),
            *(f"--customize-hook={hook}" for hook in hooks),
            request.param,
            "/dev/null",
        ],
        room,
        PATH="/usr/sbin:/usr/bin:/sbin:/bin",
        TMPDIR=os.environ.get("TMPDIR", "/tmp"),
    )
    return room / "out"


def said(debian: Path, name: str, status: int = 0) -> str:
    """Read what a step said."""
    text = (debian / name).read_text("utf-8")
    assert (debian / f"{name}.status").read_text() == f"{status}\n", text[-5000:]
    return text


def test_one_command_installs_what_is_missing_and_says_it_in_a_few_lines(debian: Path) -> None:
    text = said(debian, "setup")
    assert "setup: apt-get install qemu-system-x86 gcc" in text
    assert "Unpacking" not in text


def test_all_that_the_demonstration_is_made_of_is_fetched_and_built_once(debian: Path) -> None:
    text = said(debian, "prepared")
    assert all(f"vm: {what}" in text for what in ("fetching kernel", "gate: ", "building kvmgt.ko"))
    assert "fetching" not in said(debian, "again")


def test_the_unit_tests_pass_there_and_the_site_is_built(debian: Path) -> None:
    assert "passed  unit tests" in said(debian, "unit")
    assert said(debian, "docs").splitlines()[-1].endswith("/dist/site/index.html")


def test_what_a_package_needs_is_said_with_the_command_that_installs_it(debian: Path) -> None:
    assert "as root: apt-get install dpkg-dev debhelper" in said(debian, "package", 7)


def test_the_program_is_installed_as_the_pages_say(debian: Path) -> None:
    assert "error" not in said(debian, "readme").lower()
    text = said(debian, "install")
    assert f"vfio-mig {__version__}\n" in text
    assert "VFIO-MIG(1)" in text
    assert "complete -o nosort -F _vfio_mig_completion vfio-mig" in text
    assert {f"vfio_mig-{__version__}-py3-none-any.whl", f"vfio_mig-{__version__}.tar.gz"} <= set(
        (debian / "dist").read_text().split()
    )


def test_what_is_typed_there_is_taken_from_the_pages() -> None:
    assert typed("README.md") == [
        "python3 -m venv /opt/vfio-mig              # as root; Python 3.11 or newer",
        "/opt/vfio-mig/bin/pip install .",
    ]
    assert len(typed("docs/install.md")) == 7
