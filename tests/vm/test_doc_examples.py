# SPDX-License-Identifier: MIT
"""Every example of README.md and docs/ is run on the sample driver and ends as it says: with 0, if it says nothing.

A page's examples follow each other on the same two vGPUs and in the same directory; each begins with both running.
Besides, the first page and the tutorials are walked through as a reader does it who has nothing: in one shell, with the
vGPUs that they make.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.doc_examples import MEMORY, Block, examples, inputs_and_outputs, script, whole
from tools.lab import cli
from tools.lab.sample import gpu, host
from tools.lab.sample.held import guest_of, run_some_work
from tools.lab.vfio.raw import PAGE, Memory

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS: Final = 300
PAGES: Final = 4096  # of guest memory
OTHER_MEMORY: Final = "/dev/shm/other"
QUIESCE: Final = Path("/usr/local/bin/quiesce")
# The options that come before the host's name are migrate's; what it asks for runs here.
SSH: Final = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done\nshift\nexec bash -c "$*"\n'
WALKED: Final = ("README.md", "tutorial-scripts.md", "tutorial-drivers.md", "tutorial-ci.md")
IN_CI: Final = {"README.md", "usage.md"}
RUNNABLE: Final = [one for one in examples() if one.page not in WALKED and (one.language == "python" or one.to_run())]
GROUPS: Final = {
    (v2, page): list(group)
    for (v2, page), group in groupby(
        sorted(RUNNABLE, key=lambda one: (one.speaks_v2, one.page, one.number)),
        key=lambda one: (one.speaks_v2, one.page),
    )
}


@pytest.fixture(scope="module")
def v2(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Have devices that speak the mainline protocol, or not."""
    if not request.param or not host.module_loaded():  # not in the VM: every test says so
        yield request.param
        return
    with host.loaded(v2=7, migratable=0):
        yield True


class Desk:
    """Where a page's examples are run: a directory, two vGPUs, a guest's memory, a stand-in for ssh."""

    def __init__(self, directory: Path, one: host.Instance, two: host.Instance, *, v2: bool) -> None:
        self._directory: Final = directory
        self._sides: Final = (one, two)
        tools = directory / "bin"
        tools.mkdir()
        for path, text in ((tools / "ssh", SSH), (QUIESCE, "#!/bin/sh\n")):
            path.write_text(text)
            path.chmod(0o755)
        names = {"UUID": one.uuid, "OTHER": two.uuid, "A": one.uuid, "B": two.uuid, "N": str(one.group)}
        self._env: Final = {**os.environ, **names, "PATH": f"{tools}:{os.environ['PATH']}"}
        self._images: Final = [directory / "first.image", directory / "second.image"]
        self._without_pages: Final = directory / "plain.image"
        with self._open() as memory, guest_of(one, memory) as guest:
            for image in (*self._images, self._without_pages):
                run_some_work(guest, gpu.Engine(guest), 2)
                pages = () if v2 or image == self._without_pages else ("--memory", f"{MEMORY}@0")
                cli.run("-q", "save", one.uuid, image, "--leave-running", *pages, warm=True)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Memory]:
        """Have both open elsewhere, the first with the guest's memory."""
        memory = Memory(0, PAGES, Path(MEMORY))
        Path(MEMORY).chmod(0o666)
        with Path(OTHER_MEMORY).open("ab") as file:
            file.truncate(PAGES * PAGE)
        with cli.held(self._sides[0].uuid, MEMORY), cli.held(self._sides[1].uuid):
            yield memory

    def run(self, block: Block) -> None:
        """Run an example and demand what it says."""
        inputs, outputs = inputs_and_outputs(block)
        for name in outputs:
            (self._directory / name).unlink(missing_ok=True)
        for name in inputs:
            # A restore without --memory is of an image without pages
            plain = "restore" in block.text and "--memory" not in block.text
            image = self._without_pages if plain else self._images["after" in name]
            shutil.copy(image, self._directory / name)
        python = block.language == "python"
        words = [sys.executable, "-c", block.text] if python else ["bash", "-c", script(block)]
        with contextlib.nullcontext() if block.wants_closed else self._open():
            code, said = ended(words, self._directory, self._env)
        assert code == 0, f"{block.name}: ended with {code}\n{block.text}\n{said}"
        assert "Traceback" not in said, f"{block.name}: {said}"


def ended(words: list[str], directory: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run words to their end, and end what they left behind; the exit code, and the end of what was said."""
    log = directory / "said"
    before = mdevs()
    with log.open("wb") as out:  # a file: a pipe would stay open in a child that outlives its shell
        shell = subprocess.Popen(
            words,
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
            for mdev in mdevs() - before:
                (mdev / "remove").write_text("1")
    return code, log.read_bytes()[-3000:].decode(errors="replace")


def mdevs() -> set[Path]:
    """Return the mdevs that there are; an example may have made some."""
    return set(Path("/sys/bus/mdev/devices").iterdir())


def case(v2: bool, page: str) -> object:
    """Return the parameters of a page's test; CI takes the first pages, and all where one kernel is named."""
    marks = [] if page in IN_CI and not v2 else [pytest.mark.variant]
    return pytest.param(v2, page, marks=marks, id=f"{'v2' if v2 else 'rfc'}: {page}")


@pytest.mark.slow  # what the documentation says is of the program, not of the kernel
@pytest.mark.parametrize(("v2", "page"), [case(*key) for key in GROUPS], indirect=["v2"])
def test_the_examples_of_a_page_end_as_they_say(v2: bool, page: str, tmp_path: Path) -> None:
    with host.instance() as one, host.instance() as two, cli._interpreter_for_everybody():
        desk = Desk(tmp_path, one, two, v2=v2)
        for block in GROUPS[v2, page]:
            desk.run(block)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page in IN_CI else [pytest.mark.variant]) for page in WALKED]
)
def test_a_reader_who_has_nothing_walks_through_a_page_in_one_shell(page: str, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in {"UUID", "OTHER"}}
    code, said = ended(["bash", "-c", script(whole(page))], tmp_path, {**env, "VFIO_MIG_VM_OUT": str(tmp_path)})
    assert code == 0, said
    assert "Traceback" not in said
