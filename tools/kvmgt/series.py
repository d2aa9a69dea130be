# SPDX-License-Identifier: MIT
"""The patches: a directory for each kernel, applied in the order of their numbers, each with a title."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.kvmgt.source import GVT
from tools.vm.errors import RunnerError

SERIES: Final = Path(__file__).with_name("series")
MUTATIONS: Final = Path(__file__).with_name("mutations")
OURS: Final = Path(__file__).with_name("gvt")
"""Files that the driver does not have; copied beside its own before the first patch."""

_NAME: Final = re.compile(r"(\d{4})-[a-z0-9-]+\.patch")
_SUBJECT: Final = re.compile(r"Subject: (drm/i915/gvt: \S.*)")
_TARGET: Final = re.compile(r"^\+\+\+ b/(\S+)", re.MULTILINE)
_HUNK: Final = re.compile(r"@@ -(\d+)(?:,\d+)? ")


def hunks(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """Yield for each hunk of a patch its file, its line there, and the lines that it expects from that one on."""
    file, line, old = "", 0, list[str]()
    for one in text.splitlines():
        if one.startswith(("diff ", "@@ ")) and old:
            yield file, line, old
            old = []
        if target := _TARGET.match(one):
            file, line = target[1], 0
        elif hunk := _HUNK.match(one):
            line = int(hunk[1])
        elif line and one.startswith((" ", "-")):
            old.append(one[1:])
    if old:
        yield file, line, old


def _places(lines: list[str], wanted: list[str]) -> list[int]:
    return [at + 1 for at in range(len(lines) - len(wanted) + 1) if lines[at : at + len(wanted)] == wanted]


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch of a series, or a mutation."""

    path: Path
    title: str
    targets: tuple[str, ...]

    def apply(self, tree: Path, *, reverse: bool = False) -> str:
        """Apply it to *tree*; return what was said of hunks that were not where the patch has them.

        :param reverse: undo it.
        :raises RunnerError: a hunk fits nowhere, or elsewhere than the patch has it and in more than one place.
            Nothing fuzzy is accepted.
        """
        if not reverse:
            self._look(tree)
        command = ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", *(["--reverse"] if reverse else [])]
        done = subprocess.run(
            [*command, "--batch", "-d", tree, "-i", self.path],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RunnerError(f"{self.path.name} cannot be applied:\n{done.stdout.rstrip()}")
        return "\n".join(line for line in done.stdout.splitlines() if "offset" in line)

    def _look(self, tree: Path) -> None:
        """See that no hunk can get to a wrong place, as they have little context."""
        for name, line, old in hunks(self.path.read_text("utf-8")):
            if (tree / name).is_file():  # or patch says it
                places = _places((tree / name).read_text("utf-8").splitlines(), old)
                if line not in places and len(places) > 1:
                    where = f"{self.path.name} is for another version of {name}: what it has at line {line} is now at"
                    raise RunnerError(f"{where} {', '.join(map(str, places))}, and which is meant must be looked at")


def read(path: Path) -> Patch:
    """Read one patch.

    :raises RunnerError: it has no title, or changes something other than kvmgt.
    """
    text = path.read_text("utf-8")
    subject = _SUBJECT.match(text)
    if subject is None:
        raise RunnerError(f"{path}: the first line must be 'Subject: drm/i915/gvt: …'")
    targets = tuple(_TARGET.findall(text))
    if not targets:
        raise RunnerError(f"{path}: it changes nothing")
    for target in targets:
        if not target.startswith(f"{GVT}/") or ".." in target:
            raise RunnerError(f"{path}: {target} is not below {GVT}")
    return Patch(path, subject[1], targets)


def load(series: str, directory: Path | None = None) -> list[Patch]:
    """Return the patches for a kernel series such as ``6.12``, in order.

    :raises RunnerError: there are none, their numbers have a gap, or one is not as it should be.
    """
    base = SERIES if directory is None else directory
    there = base / series
    if not there.is_dir():
        known = ", ".join(sorted(path.name for path in base.iterdir() if path.is_dir()))
        raise RunnerError(f"no series of patches is for kernel {series}; there are some for {known or 'none'}")
    patches = []
    for number, path in enumerate(sorted(there.glob("*.patch")), 1):
        name = _NAME.fullmatch(path.name)
        if name is None or int(name[1]) != number:
            raise RunnerError(f"{path}: patch {number} of a series is to be called {number:04}-words.patch")
        patches.append(read(path))
    if not patches:
        raise RunnerError(f"{there} has no patches")
    return patches


def mutation_names(directory: Path | None = None) -> list[str]:
    """Return the names of the mutations: patches that each undo one mechanism, for the tests to notice."""
    return sorted(path.stem for path in (MUTATIONS if directory is None else directory).glob("*.patch"))


def mutation(name: str, directory: Path | None = None) -> Patch:
    """Return the mutation called *name*."""
    if name not in mutation_names(directory):
        raise RunnerError(f"no mutation is called {name}; there are {', '.join(mutation_names(directory)) or 'none'}")
    return read((MUTATIONS if directory is None else directory) / f"{name}.patch")
