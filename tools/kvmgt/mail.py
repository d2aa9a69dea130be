# SPDX-License-Identifier: MIT
"""The series as the kernel's lists take it: a cover letter and numbered patches, each with the files that it adds.

The patches in ``series/`` change the driver's own files, and our files lie beside them from the first one on. Here
each of our files comes with the first patch that has it built or included, so each patch is whole. Nobody signs them
off: that is the sender's.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tools.kvmgt import series
from tools.kvmgt.source import GVT
from tools.vm.errors import RunnerError

COVER: Final = Path(__file__).with_name("cover.txt")
_CDEFS: Final = Path(__file__).resolve().parents[2] / "cdefs"
_INCLUDED: Final = re.compile(r'^#include "(\w+\.h)"$', re.MULTILINE)
_OBJECT: Final = re.compile(r"\bgvt/(\w+)\.o\b")
_END_OF_TEXT: Final = "\n---\n"
_NOBODY: Final = {"user.name": "vfio_mig", "user.email": "vfio-mig@vfio-mig.invalid"}
_PREFIX: Final = "RFC PATCH"


def _git(tree: Path, *arguments: str | Path, text: str = "") -> str:
    done = subprocess.run(
        ["git", "-C", tree, *arguments],
        input=text, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RunnerError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _config(tree: Path, key: str) -> str:
    command: list[str | Path] = ["git", "-C", tree, "config", "--get", key]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout.strip()


def _make_repository(tree: Path) -> None:
    _git(tree, "init", "-q")
    for key, value in _NOBODY.items():
        if not _config(tree, key):
            _git(tree, "config", key, value)
    _commit(tree, "base")
    _git(tree, "tag", "base")


def _ours(name: str) -> dict[str, Path]:
    """Return our files by their names in the driver's directory."""
    found = [*series.OURS.glob("*.[ch]"), *(series.SERIES / name).glob("*.h"), *_CDEFS.glob("gvt_*.h")]
    return {path.name: path for path in found}


def _wanted(directory: Path, ours: dict[str, Path]) -> Iterator[str]:
    """Yield those of our files that others in *directory* name and that are not there."""
    named = {f"{stem}.c" for stem in _OBJECT.findall((directory / "Makefile").read_text("utf-8"))}
    for path in directory.glob("*.[ch]"):
        named.update(_INCLUDED.findall(path.read_text("utf-8", "replace")))
    yield from sorted(name for name in named & ours.keys() if not (directory / name).exists())


def _add_files(directory: Path, ours: dict[str, Path]) -> None:
    while wanted := list(_wanted(directory, ours)):
        for name in wanted:
            shutil.copyfile(ours[name], directory / name)


def _message(patch: series.Patch) -> str:
    """Return title and text of a patch of ``series/``."""
    head, found, _ = patch.path.read_text("utf-8").partition(_END_OF_TEXT)
    if not found:
        raise RunnerError(f"{patch.path}: no line '---' ends its text")
    return head.removeprefix("Subject: ")


def _commit(tree: Path, message: str) -> None:
    _git(tree, "add", "-A")
    _git(tree, "commit", "-q", "--no-verify", "-F", "-", text=message)


def _fill_cover(cover: Path, kernel: str) -> None:
    subject, _, text = COVER.read_text("utf-8").replace("@KERNEL@", kernel).partition("\n\n")
    filled = cover.read_text("utf-8").replace("*** SUBJECT HERE ***", subject.removeprefix("Subject: "))
    cover.write_text(filled.replace("*** BLURB HERE ***", text.rstrip()), "utf-8")


def write(source: Path, name: str, directory: Path, kernel: str) -> list[Path]:
    """Write the series *name* in mailing-list form; return its files, the cover letter first.

    :param source: the unmodified source.
    :param directory: made if it is not there; it must have no patches.
    :param kernel: what the cover letter says that the series is for.
    :raises RunnerError: git is missing, a patch does not fit, or one of our files comes with none.
    """
    if shutil.which("git") is None:
        raise RunnerError("git is missing, which writes the mails")
    if any(directory.glob("*.patch")):
        raise RunnerError(f"{directory} has patches already")
    directory.mkdir(parents=True, exist_ok=True)
    ours = _ours(name)
    with tempfile.TemporaryDirectory(prefix="kvmgt-series-") as work:
        tree = Path(work)
        shutil.copytree(source / GVT, tree / GVT)
        _make_repository(tree)
        for patch in series.load(name):
            patch.apply(tree)
            _add_files(tree / GVT, ours)
            _commit(tree, _message(patch))
        if left := sorted(one for one in ours if one.endswith(".c") and not (tree / GVT / one).exists()):
            raise RunnerError(f"no patch of series {name} has {', '.join(left)} built")
        options = ["-q", "-n", "--cover-letter", f"--subject-prefix={_PREFIX}", "--no-signature"]
        _git(tree, "format-patch", *options, "-o", directory.absolute(), "base")
    written = sorted(directory.glob("*.patch"))
    _fill_cover(written[0], kernel)
    return written
