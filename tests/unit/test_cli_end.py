# SPDX-License-Identifier: MIT
"""What becomes of the exit code when standard output, standard error or the events' reader is lost.

Each command is a fork of this process that ends as Python does; some are processes from their start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import click
import pytest

from tests.schemas import validate
from tests.unit.saved_images import run as run_here
from tests.unit.saved_images import write
from tests.unit.test_image_gvt import BODY, image
from vfio_mig.cli import conform, streams, transfer
from vfio_mig.cli.main import COMMANDS, _error_of, cli, main
from vfio_mig.cli.output import print_json
from vfio_mig.errors import DeviceError, HostError
from vfio_mig.host import mdev
from vfio_mig.jobs import control, migrate, restore, save, sync
from vfio_mig.jobs.engine.events import Hooks
from vfio_mig.jobs.files import pages
from vfio_mig.jobs.files.extract import extract_image
from vfio_mig.jobs.queries import devices as inform
from vfio_mig.vm import named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PROGRAM: Final = Path(sys.executable).parent / "vfio-mig"
MISSING: Final = "deadbeef-0000-4000-8000-00000000dead"
CHANGING: Final = {
    "extract": ["image", "parts"],
    "mdev create": ["TYPE"],
    "mdev remove": ["x"],
    "migrate": ["x", "y"],
    "pack": ["made", "packed"],
    "pages": ["image", "--memory", "guest@0"],
    "reset": ["x"],
    "restore": ["x", "image"],
    "save": ["x", "new"],
    "start": ["x"],
    "state": ["x", "stop"],
    "stop": ["x"],
    "sync": ["x", "new", "--memory", "guest@0"],
    "vm restore": ["socket", "image"],
    "vm save": ["socket", "new"],
}
"""Commands that change something: it is done, whatever becomes of the report."""
TELLING: Final = {
    "check": None,
    "conform": ["--list"],
    "diff": ["image", "other"],
    "dirty": None,
    "doctor": [],
    "info": None,
    "inspect": ["image"],
    "list": [],
    "mdev types": [],
    "status": None,
    "verify": ["image"],
    "vm list": [],
}
"""Commands that print something and are for nothing else; None for those that need a device."""
HOLDING: Final = {"hold"}
LOSSES: Final = {"full": "ENOSPC", "closed": "EBADF", "gone": "EPIPE"}
Fds = dict[int, int | None]
"""What is to stand at an fd in a fork; None is nothing."""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def report_of(kind: type[Any], **values: object) -> Any:
    """Make a report of a job that was never done."""
    filled: dict[str, Any] = dict.fromkeys(kind.__dataclass_fields__, 0)
    filled |= {"device": "x", "file": "f", "state": "stop"}
    filled |= {name: [] for name in ("rounds", "state_rounds", "warnings")} | values
    return kind(**{name: value for name, value in filled.items() if name in kind.__dataclass_fields__})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two images, one taken apart, and a page of guest memory; import on the way what forks will need."""
    path = tmp_path_factory.mktemp("originals")
    write(path / "image", image(BODY))
    write(path / "other", image(BODY[1:]))
    extract_image(str(path / "image"), str(path / "made"))
    (path / "guest").write_bytes(bytes(4096))
    for words in (["inspect"], ["verify"], ["diff", path / "other"]):
        assert run_here(*words, path / "image").stdout
    return path


@pytest.fixture
def here(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run where all that is."""
    shutil.copytree(originals, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put reports in the place of all jobs on devices."""

    def fake(module: Any, name: str, result: object) -> None:
        monkeypatch.setattr(module, name, lambda *_, **__: result)

    for action in ("stop", "start"):
        fake(control, f"{action}_devices", [report_of(control.ActionReport, action=action, seconds=1.0)])
    fake(control, "reset_device", report_of(control.ActionReport, action="reset"))
    fake(control, "device_state", report_of(control.StateReport))
    fake(save, "save_all", [report_of(save.SaveReport)])
    fake(restore, "restore_all", [report_of(restore.RestoreReport, warnings=["w"])])
    fake(migrate, "migrate", report_of(migrate.MigrateReport, target="y", target_state="running"))
    fake(sync, "sync_dirty", report_of(sync.SyncReport))
    fake(pages, "load_pages", report_of(pages.PagesReport))
    fake(mdev, "create", "the-uuid")
    fake(mdev, "remove", None)
    vm = {"vm": "v", "pid": 1, "run_state": "paused", "ram": []}
    fake(named, "save_vm", report_of(named.VmSaveReport, saved=report_of(save.SaveReport), **vm))
    fake(named, "restore_vm", report_of(named.VmRestoreReport, restored=report_of(restore.RestoreReport), **vm))


def run(*words: str | Path, fds: Fds | None = None) -> Done:
    """Run a command in a fork, with other fds, and end it as Python ends."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = _in_fork(
                    [str(word) for word in words], {0: None, 1: out.fileno(), 2: err.fileno(), **(fds or {})}
                )
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return Done(os.waitstatus_to_exitcode(status), *texts)


def _in_fork(words: list[str], fds: Fds) -> int:
    high = {fd: None if to is None else os.dup(to) for fd, to in fds.items()}
    for fd, to in high.items():
        if to is None:
            with contextlib.suppress(OSError):
                os.close(fd)
        else:
            os.dup2(to, fd)
            os.close(to)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream: Any = None if high.get(fd, 0) is None else open(fd, "w" if fd else "r", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    sys.argv = ["vfio-mig", *words]
    code = 98
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 97
    except BaseException:  # noqa: BLE001 -- as the interpreter does
        traceback.print_exc()
        code = 96
    for stream in (sys.stdout, sys.stderr):  # Py_FinalizeEx()
        try:
            stream.flush()
        except OSError:
            code = 120
    return code


@contextlib.contextmanager
def lost(how: str, *at: int) -> Iterator[Fds]:
    """Give fds of which none takes anything."""
    if how == "closed":
        yield dict.fromkeys(at)
        return
    if how == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, fd = os.pipe()
        os.close(reader)
    try:
        yield dict.fromkeys(at, fd)
    finally:
        os.close(fd)


def shell(line: str, *words: str | Path) -> Done:
    """Run the installed program with redirections."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {line}', "bash", PROGRAM, *words], capture_output=True, text=True, check=False, timeout=60
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_every_command_is_one_or_the_other() -> None:
    context = click.Context(cli)
    names = set(COMMANDS)
    for name in COMMANDS:
        group = cli.get_command(context, name)
        if isinstance(group, click.Group):
            names = names - {name} | {f"{name} {one}" for one in group.commands}
    assert names == CHANGING.keys() | TELLING.keys() | HOLDING


def ways(commands: Iterable[str]) -> list[tuple[str, str]]:
    """Pair each command with ways in which its output is lost.

    A reader that has gone is another errno than a full disk, which nothing that belongs to one command looks at: one
    command stands for all.
    """
    return [(name, loss) for at, name in enumerate(commands) for loss in LOSSES if loss != "gone" or at == 0]


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(("command", "loss"), ways(CHANGING))
@pytest.mark.usefixtures("here", "faked")
def test_what_is_done_stays_done_without_standard_output(command: str, loss: str, *, as_json: bool) -> None:
    with lost(loss, 1) as fds:
        done = run(*command.split(), *CHANGING[command], *(["--json"] if as_json else []), fds=fds)
    assert (done.returncode, done.stdout) == (0, "")
    warnings = [line for line in done.stderr.splitlines() if "what was asked for is done" in line]
    assert all(line.startswith("vfio-mig: warning: standard output: ") for line in warnings)
    assert all(LOSSES[loss] in line for line in warnings)
    assert len(warnings) == (as_json and command != "mdev remove") or not as_json
    if command == "mdev create":
        assert "the-uuid" in done.stderr
    if command in {"extract", "pack"}:
        assert Path(CHANGING[command][1]).exists()


@pytest.mark.parametrize(("command", "loss"), ways(CHANGING))
@pytest.mark.usefixtures("here", "faked")
def test_what_is_done_stays_done_without_standard_error(command: str, loss: str) -> None:
    with lost(loss, 2) as fds:
        assert run(*command.split(), *CHANGING[command], fds=fds).returncode == 0


@pytest.mark.parametrize("command", CHANGING)
@pytest.mark.usefixtures("here", "faked")
def test_what_is_done_stays_done_without_the_reader_of_events(command: str) -> None:
    with lost("full", 9) as fds:
        done = run("--status-fd", "9", *command.split(), *CHANGING[command], fds=fds)
    assert done.returncode == 0, done.stderr
    assert "vfio-mig: warning: what was asked for is done, but then: fd 9: cannot write events: ENOSPC" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("here", "faked")
def test_a_signal_after_the_job_comes_too_late(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr(transfer, "say", lambda *_: signal.raise_signal(number))
    done = run("save", "x", "new")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(("command", "loss"), ways(name for name, words in TELLING.items() if words is not None))
@pytest.mark.usefixtures("here")
def test_what_is_for_nothing_but_its_output_says_that_it_is_lost(command: str, loss: str, *, as_json: bool) -> None:
    if command in {"list", "mdev types", "vm list"} and not as_json:
        return  # prints nothing on a machine without devices
    with lost(loss, 1) as fds:
        done = run(*command.split(), *(TELLING[command] or []), *(["--json"] if as_json else []), fds=fds)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith(f"vfio-mig: standard output: cannot write: {LOSSES[loss]} ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("at", [(1,), (2,), (9,), (1, 2), (1, 2, 9)])
def test_the_first_error_counts(loss: str, at: tuple[int, ...]) -> None:
    if loss == "closed" and 9 in at:
        return  # which is wrong from the start
    events = ["--status-fd", "9"] if 9 in at else []
    with lost(loss, *at) as fds:
        assert run(*events, "info", MISSING, fds=fds).returncode == 3
        assert run(*events, "--json", "stop", MISSING, fds=fds).returncode == 3
        assert run(*events, "frobnicate", "--json", fds=fds).returncode == 2


def test_a_reader_that_goes_in_the_middle_does_not_replace_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise DeviceError("STOP failed: EIO", device="x", errno=5)

    monkeypatch.setattr(control, "stop_devices", fail)
    for loss in ("full", "gone"):
        with lost(loss, 9) as fds:
            done = run("--status-fd", "9", "--json", "stop", "x", fds=fds)
        assert (done.returncode, done.stderr) == (5, "vfio-mig: x: STOP failed: EIO\n")
        assert json.loads(done.stdout)["errno"] == "EIO"


def test_an_fd_for_events_that_takes_none_is_refused_before_the_job() -> None:
    with Path("/dev/null").open("rb") as null:
        done = run("list", "--status-fd", "9", fds={9: null.fileno()})
    assert done == (7, "", "vfio-mig: fd 9: cannot write events: EBADF (Bad file descriptor)\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_no_file_that_is_opened_gets_the_number_of_a_standard_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: tuple[int, ...]
) -> None:
    def open_some() -> list[Any]:
        fds = [os.open("/dev/zero", os.O_RDWR), *os.pipe()]
        (tmp_path / "low").write_text(str(min(fds) <= 2))
        return []

    monkeypatch.setattr(inform, "list_devices", open_some)
    run("list", fds=dict.fromkeys(closed))
    assert (tmp_path / "low").read_text() == "False"


@pytest.mark.usefixtures("here")
def test_closed_streams_are_no_traceback() -> None:
    """The installed program, from its start."""
    done = shell("<&-", "verify", "-")
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith("vfio-mig: ")
    assert "EBADF" in done.stderr
    assert done.stderr.count("\n") == 1
    assert shell("<&- >&- 2>&-", "verify", "image").returncode == 7
    assert shell("<&- 2>&-", "verify", "image").stdout.startswith("image: good")
    assert shell(">/dev/full", "pack", "made", "packed", "--json").returncode == 0
    assert shell("2>/dev/full", "verify", "nowhere").returncode == 7


def test_a_hook_does_not_get_our_files_for_streams_that_were_closed(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text(
        f"#!/bin/sh\nfor fd in 0 1 2; do at=$(readlink /proc/$$/fd/$fd); echo $at >>{tmp_path}/seen; done\n"
    )
    hook.chmod(0o700)
    child = os.fork()
    if child == 0:
        try:
            for fd in range(3):
                os.close(fd)
            streams.fill()
            with (tmp_path / "image").open("wb"):
                Hooks([f"pre-stop={hook}"]).run("stop", "before-stop", "x")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "seen").read_text().split() == ["/dev/null"] * 3


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (["info", MISSING], 3, "DeviceNotFoundError"),
        (["info", "nonsense"], 2, "UsageError"),
        (["stop"], 2, "UsageError"),
        (["frobnicate"], 2, "UsageError"),
        (["list", "--frobnicate"], 2, "UsageError"),
        (["verify", "nowhere"], 7, "HostError"),
        (["verify", "junk"], 6, "ImageError"),
        (["save", MISSING, "new"], 3, "DeviceNotFoundError"),
    ],
)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_failure_has_a_document_for_programs(here: Path, words: list[str], code: int, name: str, place: str) -> None:
    (here / "junk").write_bytes(b"junk" * 1000)
    done = run(*(["--json", *words] if place == "before" else [*words, "--json"]))
    assert done.returncode == code
    document = validate("error", done.stdout)
    assert (document["class"], document["code"]) == (name, code)
    assert done.stderr == f"vfio-mig: {document['message']}\n"
    assert (document["errno"] == "ENOENT") == (words[-1] == "nowhere")
    assert (document["device"] == MISSING) == (MISSING in words)


def test_a_failure_without_json_has_none() -> None:
    assert run("info", MISSING).stdout == ""
    assert run("info", "--", "--json").stdout == ""


@pytest.mark.parametrize(
    "words",
    [["save", MISSING, "-"], ["save", f"{MISSING}=-"], ["sync", MISSING, "-"], ["save", MISSING, "-", "--frob"]],
)
def test_where_the_image_goes_no_document_does(words: list[str]) -> None:
    done = run("--json", *words)
    assert done.returncode in {2, 3}
    assert done.stdout == ""


def test_a_report_that_is_there_is_not_followed_by_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        print_json({"checks": []})
        raise DeviceError("1 of 1 checks failed", device="x")

    monkeypatch.setattr(conform, "_list", fail)
    done = run("--json", "conform", "--list")
    assert (done.returncode, json.loads(done.stdout)) == (5, {"checks": []})


def test_the_last_event_has_the_exit_code_however_a_command_ends(here: Path) -> None:
    for words, step, code in (
        (["diff", "image", "other", "--exit-code"], "done", 1),
        (["diff", "image", "image", "--exit-code"], "done", 0),
        (["verify", "nowhere"], "failed", 7),
        (["mdev", "create", "TYPE", "x"], "failed", 2),
    ):
        events = here / "events"
        events.unlink(missing_ok=True)
        assert run("--events", "events", *words).returncode == code
        last: dict[str, Any] = validate("events", events.read_text().splitlines()[-1])
        assert (last["step"], last["code"]) == (step, code)


@pytest.mark.parametrize("loss", ["full", "closed"])
@pytest.mark.parametrize("words", [["--help"], ["save", "--help"], ["--version"], ["--json", "stop", "-h"]])
def test_help_that_is_lost_is_said_in_one_line(words: list[str], loss: str) -> None:
    with lost(loss, 1) as fds:
        done = run(*words, fds=fds)
    assert (done.returncode, done.stderr.count("\n")) == (7, 1)
    assert done.stderr.startswith(f"vfio-mig: standard output: {LOSSES[loss]} ")


@pytest.mark.parametrize(
    ("caught", "words"),
    [
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),  # mmap(2)'s, of no file
        (OSError(errno.ENOMEM, "Cannot allocate memory", "it"), "it: ENOMEM"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable", "a new thread"), "a new thread: EAGAIN"),
        (OSError(errno.EPIPE, "Broken pipe"), "standard output: EPIPE"),
    ],
)
def test_an_error_of_the_host_that_no_job_has_named_is_one_line(caught: BaseException, words: str) -> None:
    error = _error_of(caught)
    assert error.problem.startswith(words)
    assert error.exit_code == HostError.exit_code
