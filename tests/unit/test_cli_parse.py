# SPDX-License-Identifier: MIT
"""What the command line takes and refuses before any device is opened; this machine has none of those named here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import pytest

from tests.unit.click_runner import runner
from vfio_mig import __version__
from vfio_mig.cli.main import COMMANDS, _outcome, cli
from vfio_mig.cli.options import Options
from vfio_mig.device import Device
from vfio_mig.errors import DeviceNotFoundError, UsageError, VfioMigError
from vfio_mig.host.devices import HostDevice
from vfio_mig.image.writer import ArchiveWriter
from vfio_mig.jobs.engine import job as job_engine
from vfio_mig.jobs.engine.session import Session
from vfio_mig.protocols.base import MigrationProtocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from click.testing import Result

PROGRAM: Final = Path(sys.executable).parent / "vfio-mig"
MISSING: Final = "deadbeef-0000-4000-8000-00000000dead"
# Each command with what it needs after DEVICE
ON_DEVICES: Final[dict[str, list[str]]] = {
    "conform": [],
    "dirty": [],
    "hold": [],
    "info": [],
    "reset": [],
    "restore": ["guest", "--raw"],
    "save": ["image"],
    "start": [],
    "state": [],
    "status": [],
    "stop": [],
    "sync": ["copy", "--memory", "guest@0"],
}
ON_FILES: Final = {"diff", "extract", "inspect", "pack"}  # tests/unit/test_inspect_cli.py


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=30, env=env)


def invoke(*arguments: str) -> Result:
    """Run a command in this process; an error of ours is the result's exception."""
    return runner().invoke(cli, arguments, prog_name="vfio-mig")


@pytest.fixture(autouse=True)
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where there is nothing but a page of guest memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VFIO_MIG_UAPI_HEADER", raising=False)
    (tmp_path / "guest").write_bytes(bytes(4096))


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_every_command_has_an_example_of_it(command: str, option: str) -> None:
    result = invoke(command, option)
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: vfio-mig {command} ")
    example = result.output.partition("Example")[2].partition("Options:")[0]
    assert re.search(rf"vfio-mig (--json )?{command}\b", example)


@pytest.mark.parametrize("command", ["create", "remove", "types"])
def test_the_commands_below_mdev_have_help(command: str) -> None:
    result = invoke("mdev", command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: vfio-mig mdev {command} ")


def test_the_programs_help_lists_every_command_and_exit_code() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    listed = result.output.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == sorted(COMMANDS)
    assert "Example" in result.output
    codes = result.output.partition("Exit codes:")[2].partition("Options:")[0]
    assert {int(number) for number in re.findall(r"\b\d+\b", codes)} == {0, 1, 2, 3, 4, 5, 6, 7, 130}


def test_the_installed_program_knows_its_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vfio-mig {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["frobnicate"], "frobnicate"),
        (["--frobnicate", "list"], "--frobnicate"),
        (["list", "--frobnicate"], "--frobnicate"),
        (["list", "extra"], "extra"),
        (["--abi", "other", "list"], "other"),
        (["stop"], "DEVICE"),
        (["save", MISSING], "FILE"),
        (["stop", MISSING, "--pid", "0"], "--pid"),
        (["stop", MISSING, "--pid", "me"], "--pid"),
        (["sync", MISSING, "file", "--rounds", "-1"], "--rounds"),
        (["mdev", "frobnicate"], "frobnicate"),
        (["mdev", "create"], "TYPE"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_wrong_usage(arguments: list[str], culprit: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert culprit in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("group", [[], ["mdev"]])
def test_a_group_alone_is_wrong_usage_and_prints_its_help(group: list[str]) -> None:
    done = run(*group)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(" ".join(["Usage: vfio-mig", *group, "[OPTIONS] COMMAND [ARGS]...\n"]))
    assert "Commands:" in done.stderr


@pytest.mark.parametrize("arguments", [["frobnicate"], ["--frobnicate"], ["stop"], ["stop", MISSING, "--pid", "0"]])
def test_the_installed_program_refuses_it_without_a_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vfio-mig: ")
    assert len(done.stderr.splitlines()) == 1


def test_every_command_on_a_device_is_tried_here() -> None:
    assert set(ON_DEVICES) | {"doctor", "list", "mdev", "migrate", "pages", "verify", "check", "vm", *ON_FILES} == set(
        COMMANDS
    )


def refused(*arguments: str) -> VfioMigError:
    """Return the error that a command ends with; nothing was printed and no file made."""
    before = set(Path().iterdir())
    result = invoke(*arguments)
    assert isinstance(result.exception, VfioMigError)
    assert result.output == ""
    assert set(Path().iterdir()) == before
    return result.exception


@pytest.mark.parametrize("command", ON_DEVICES)
@pytest.mark.parametrize("name", ["nonsense", "", "12", "\0"])
def test_a_nonsense_name_is_wrong_usage_everywhere(command: str, name: str) -> None:
    error = refused(command, name, *ON_DEVICES[command])
    assert isinstance(error, UsageError)
    assert "is not a device name" in str(error)


@pytest.mark.parametrize("command", ON_DEVICES)
@pytest.mark.parametrize(
    "name", [MISSING, "fffe:ff:1f.7", "/dev/vfio/999999999", "/dev/vfio/devices/vfio999999999", "/sys/nowhere"]
)
def test_a_missing_device_is_not_found_anywhere(command: str, name: str) -> None:
    error = refused(command, name, *ON_DEVICES[command])
    assert isinstance(error, DeviceNotFoundError)
    assert error.exit_code == 3
    assert str(error).startswith(f"{name}: ")


@pytest.mark.parametrize("command", ["dirty", "hold", "restore", "save", "sync"])
@pytest.mark.parametrize("text", ["", "guest", "guest@", "@0", "guest@x", "guest@0:", "guest@0:0", "guest@1"])
def test_bad_memory_is_wrong_usage_before_the_device_is_looked_for(command: str, text: str) -> None:
    assert isinstance(refused(command, MISSING, *ON_DEVICES[command], "--memory", text), UsageError)


@pytest.mark.parametrize("command", ["dirty", "save", "sync"])
@pytest.mark.parametrize("text", ["", "x", "0-", "0+0", "1+4096", "0x1000-0", "0-1G-2G"])
def test_a_bad_range_is_wrong_usage_before_the_device_is_looked_for(command: str, text: str) -> None:
    assert isinstance(refused(command, MISSING, *ON_DEVICES[command], "--range", text), UsageError)


class Untouched(MigrationProtocol):
    """A protocol that nothing may be asked of."""

    name = "untouched"
    state_size_max = 1 << 20

    def stop(self) -> None:
        raise AssertionError

    def start(self) -> None:
        raise AssertionError

    def read_state(self) -> memoryview:
        raise AssertionError

    def write_state(self, state: memoryview) -> None:
        raise AssertionError(len(state))

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        raise AssertionError(start_page, nr_pages)


@pytest.mark.parametrize("options", [[], ["--raw"], ["--leave-running"]])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_save_does_not_replace_a_file_and_leaves_the_device_alone(
    monkeypatch: pytest.MonkeyPatch, options: list[str], kind: str
) -> None:
    target = Path("image")
    if kind == "file":
        target.write_bytes(b"precious")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("guest")
    device = Device(MISSING, -1)
    found = HostDevice(MISSING, "/sys/x", "mdev", "i915-GVTg_V4_8", "gpu", "vfio_mdev", 7)
    monkeypatch.setattr(job_engine, "open_session", lambda *_, **__: Session(found, device, Untouched(device)))
    error = refused("save", MISSING, "image", *options)
    assert isinstance(error, UsageError)
    assert str(error).startswith("image ")
    assert error.undo_errors == []
    assert kind != "file" or target.read_bytes() == b"precious"


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that an error is."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert done.stderr.startswith("vfio-mig: ")
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["info", "nonsense"], 2, "'nonsense' is not a device name"),
        (["stop", MISSING], 3, f"{MISSING}: there is no such mdev; 'vfio-mig list'"),
        (["save", MISSING, "image", "--memory", "guest"], 2, "memory 'guest' is not FILE@GPA"),
        (["dirty", MISSING, "--range", "5"], 2, "'5'"),
        (["sync", MISSING, "copy"], 2, "nothing to copy from"),
        (["save", MISSING, "image", "--raw", "--memory", "guest@0"], 2, "--raw"),
        (["dirty", MISSING, "--memory", "nowhere@0"], 7, "nowhere: cannot open guest memory: ENOENT"),
        (["restore", MISSING, "nowhere"], 7, "nowhere: cannot open: ENOENT"),
        (["mdev", "create", "no-such-type", "x"], 2, "'x' is not a UUID"),
        (["mdev", "create", "no-such-type"], 3, "no parent offers mdev type 'no-such-type'"),
        (["--uapi-header", "nowhere", "info", MISSING], 7, "nowhere: cannot open the header: ENOENT"),
        (["--uapi-header", "guest", "info", MISSING], 2, "guest does not define VFIO_DEVICE_FLAGS_MIGRATABLE"),
    ],
)
def test_an_error_is_one_line_that_says_what_failed(arguments: list[str], code: int, words: str) -> None:
    done = run(*arguments)
    assert words in one_line(done)
    assert done.returncode == code


def test_the_header_may_be_named_by_the_environment() -> None:
    done = run("info", MISSING, env={"VFIO_MIG_UAPI_HEADER": "guest"})
    assert "guest does not define VFIO_DEVICE_FLAGS_MIGRATABLE" in one_line(done)
    assert done.returncode == 2


WAITING: Final = """
import sys, time
from vfio_mig.jobs.queries import devices as inform

def list_devices():
    print("ready", flush=True)
    time.sleep(30)

inform.list_devices = list_devices
sys.argv = ["vfio-mig", "list"]
from vfio_mig.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_is_130_and_one_line(number: signal.Signals) -> None:
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        _, stderr = child.communicate(timeout=30)
    assert child.returncode == 130
    # click puts an empty line before it
    assert stderr == "vfio-mig: interrupted; what was begun has been undone\n"


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "\ud800"])
def test_verify_prints_one_clean_line_whatever_stands_in_the_image(tmp_path: Path, hostile: str) -> None:
    with (tmp_path / "hostile.vfm").open("wb") as file:
        writer = ArchiveWriter(file, {"protocol": hostile, "device": {"type": hostile}})
        writer.add_state(b"state")
        writer.finish()
    done = runner().invoke(cli, ["verify", "hostile.vfm"], prog_name="vfio-mig", color=True)
    escaped = repr(hostile)[1:-1]
    assert done.exception is None
    assert done.output == (
        f"hostile.vfm: good: {escaped} image of a {escaped}, 2 members, 5 bytes of state, 0 pages of memory\n"
    )


def test_verify_names_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    with Path(os.fsdecode(os.fsencode(tmp_path / "image") + b"\xff")).open("wb") as file:
        ArchiveWriter(file, {}).finish()
    done = run("verify", os.fsdecode(b"image\xff"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("image\\udcff: good:")


def leaves() -> list[tuple[list[str], click.Command]]:
    """Return every command with its words."""
    context = click.Context(cli)
    found = []
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [([name, below], one) for below, one in command.commands.items()]
        else:
            found.append(([name], command))
    return found


LEAVES: Final = leaves()
GLOBAL: Final[list[tuple[list[str], str, object]]] = [
    (["--json"], "as_json", True),
    (["-v"], "verbose", True),
    (["--quiet"], "quiet", True),
    (["--abi", "gvt-rfc"], "abi", "gvt-rfc"),
    (["--via", "group"], "via", "group"),
    (["--uapi-header", "h"], "uapi_header", "h"),
    (["--events", "e"], "events_file", "e"),
    (["--status-fd", "2"], "status_fd", 2),
    (["--hook", "pre-stop=true"], "hook_texts", ("pre-stop=true",)),
]


@pytest.mark.parametrize(("words", "command"), LEAVES, ids=[" ".join(words) for words, _ in LEAVES])
def test_every_command_takes_every_global_option_behind_it_too(words: list[str], command: click.Command) -> None:
    root = click.Context(cli, info_name="vfio-mig", obj=Options())
    arguments = ["x"] * sum(isinstance(one, click.Argument) and one.required for one in command.params)
    given = [word for option, _, _ in GLOBAL for word in option]
    with command.make_context(words[-1], [*arguments, *given], parent=root):
        assert [getattr(root.obj, name) for _, name, _ in GLOBAL] == [value for _, _, value in GLOBAL]
    own = [name for one in command.params if isinstance(one, click.Option) for name in one.opts]
    assert len(own) == len(set(own)), "an option of its own has the name of a global one"


def test_no_global_option_is_left_out_of_that_test() -> None:
    own = {name for one in cli.params if isinstance(one, click.Option) for name in one.opts}
    short = {"--verbose", "-q"}
    assert own - short - {"--version"} == {option[0] for option, _, _ in GLOBAL}


def test_a_global_option_behind_the_command_counts_and_hooks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Options, "listen", lambda self, *_: seen.append(self))
    monkeypatch.setenv("VFIO_MIG_UAPI_HEADER", "environment")
    first = ["--abi", "auto", "--hook", "pre-stop=a", "--uapi-header", "line"]
    assert invoke(*first, "list", "--abi", "gvt-rfc", "--hook", "post-stop=b").exit_code == 0
    assert (seen[0].abi, seen[0].hook_texts) == ("gvt-rfc", ("pre-stop=a", "post-stop=b"))
    assert seen[0].uapi_header == "line"
    assert invoke("--json", "list").stdout == invoke("list", "--json").stdout == "[]\n"


def test_help_says_that_global_options_may_stand_there() -> None:
    assert "may stand here, too" in invoke("save", "--help").output
    assert "may stand here, too" in invoke("mdev", "create", "--help").output


@pytest.mark.parametrize("number", ["0", "1", "2"])
def test_a_device_is_not_taken_from_where_our_words_go(number: str) -> None:
    assert invoke("stop", MISSING, "--fd", number).exit_code == 2


def test_help_is_a_command_and_one_that_there_is_not_is_told_from_one_that_is_like_it() -> None:
    assert invoke("help", "save").output == invoke("save", "--help").output
    assert invoke("help", "mdev", "create").output == invoke("mdev", "create", "--help").output
    assert invoke("help").output == invoke("--help").output
    assert invoke("help", "watch").output == invoke("list", "--help").output
    assert "did you mean 'watch'?" in invoke("watc").output
    short = "save"[:3]
    assert f"No such command '{short}' (did you mean 'save'?)" in invoke(short).output
    unlike = invoke("qqq")
    assert unlike.exit_code == 2
    assert "No such command 'qqq'" in unlike.output
    assert "did you mean" not in unlike.output


@pytest.mark.parametrize("command", ["info", "stop", "save"])
def test_one_who_names_no_device_is_told_which_there_are(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def __init__(self, name: str) -> None:
            self.name = name

    def error() -> str:
        monkeypatch.setattr("sys.argv", ["vfio-mig", command])
        code, caught = _outcome(Options())
        assert code == 2
        return str(caught)

    devices: list[Found] = []
    monkeypatch.setattr("vfio_mig.host.discover.Host.devices", lambda _: devices)
    assert f"; there is no VFIO device here; see 'vfio-mig {command} --help'" in error()
    devices += [Found(f"one{number}") for number in range(3)]
    assert "; there are one0, one1, one2; see" in error()
    devices += [Found("many")] * 9
    assert "many, …; see" in error()
