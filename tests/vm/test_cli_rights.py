# SPDX-License-Identifier: MIT
"""What a user who is not root needs: the group's node to open a device, two capabilities or an fd to borrow one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tools.lab import cli
from tools.lab.cli import NOBODY
from tools.lab.sample import host
from tools.lab.sample.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.vm.conftest import MakeGuest, MakeInstance

pytestmark = pytest.mark.slow  # what is refused and why is the program's, not the kernel's

PTRACE_SCOPE: Final = Path("/proc/sys/kernel/yama/ptrace_scope")
BOTH: Final = ("sys_ptrace", "dac_read_search")


class User:
    """A user with nothing but a directory, as setpriv makes him."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "VFIO_MIG_LOCK_DIR": str(directory / "locks")}

    def words(self, *args: str | Path, caps: tuple[str, ...] = (), memlock: int | None = None) -> list[str]:
        """Return the command that runs vfio-mig with these capabilities and no other."""
        some = ",".join(["-all", *(f"+{cap}" for cap in caps)])
        limit = [] if memlock is None else ["prlimit", f"--memlock={memlock}"]
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
        rights = [f"--bounding-set={some}", f"--inh-caps={some}", f"--ambient-caps={some}"]
        return [*limit, *user, *rights, cli._program(), *map(str, args)]

    def run(
        self,
        *args: str | Path,
        rc: int = 0,
        caps: tuple[str, ...] = (),
        memlock: int | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> str:
        """Run it and demand the exit code; returns what it says on stderr."""
        done = subprocess.run(
            self.words(*args, caps=caps, memlock=memlock),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=cli.SECONDS,
            pass_fds=pass_fds,
        )
        assert done.returncode == rc, f"{args}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stderr

    def refused(
        self, *args: str | Path, words: str, caps: tuple[str, ...] = (), memlock: int | None = None, rc: int = 3
    ) -> None:
        (line,) = self.run(*args, rc=rc, caps=caps, memlock=memlock).splitlines()
        assert line.startswith("vfio-mig: ")
        assert words in line


@pytest.fixture(scope="module", autouse=True)
def reachable() -> Iterator[None]:
    with cli._interpreter_for_everybody():
        yield


@pytest.fixture
def user() -> Iterator[User]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        os.chown(name, NOBODY, NOBODY)
        yield User(Path(name))


def give(instance: host.Instance) -> None:
    os.chown(f"/dev/vfio/{instance.group}", NOBODY, NOBODY)


def owner_and_mode(path: Path) -> tuple[int, int]:
    return path.stat().st_uid, path.stat().st_mode & 0o7777


def test_the_node_is_enough_for_a_device_that_nobody_holds(make_instance: MakeInstance, user: User) -> None:
    instance, image = make_instance(), user.directory / "gpu.vfm"
    give(instance)
    said = user.run("save", instance.uuid, image, "--open")
    assert said.endswith("; closed, as nobody else has it open\n")
    assert owner_and_mode(image) == (NOBODY, 0o600)
    assert owner_and_mode(user.directory / "locks") == (NOBODY, 0o700)
    assert sorted(path.name for path in user.directory.iterdir()) == ["gpu.vfm", "locks"]
    user.run("restore", instance.uuid, image, "--start", "--open")
    counters = instance.counters()
    assert (counters["state_read"], counters["state_write"]) == (1, 1)


@contextlib.contextmanager
def held_by(user: User, *args: str, memlock: int | None = None) -> Iterator[None]:
    words = user.words("hold", *args, memlock=memlock)
    with subprocess.Popen(words, env=user.environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(f"{args[0]}: held open by PID ")
            yield
        finally:
            process.terminate()


@pytest.mark.parametrize("missing", [0, 1])
def test_pages_that_the_device_uses_are_locked_memory_of_who_opened_it(
    make_guest: MakeGuest, user: User, missing: int
) -> None:
    """A page too many is not an error of the kernel's: the vGPU just does not have it, as GVT-g does."""
    guest = make_guest(pages=64)
    guest.bind(8)
    image, memory = user.directory / "gpu.vfm", user.directory / "memory"
    cli.run("-q", "save", guest.instance.uuid, image, warm=True)
    pinned = guest.instance.pinned()
    with memory.open("xb") as file:
        file.truncate(0x100000 + 64 * host.PAGE)
    os.chown(memory, NOBODY, NOBODY)
    with host.instance() as target:
        give(target)
        limit = (len(pinned) - missing) * host.PAGE
        with held_by(user, target.uuid, "--memory", f"{memory}@0", memlock=limit):
            cli.run("-q", "restore", target.uuid, image, warm=True)
            restored = target.pinned()
    assert len(restored) == len(pinned) - missing > 0
    assert set(restored) <= set(pinned)


def test_another_user_s_device_is_borrowed_with_two_capabilities(make_instance: MakeInstance, user: User) -> None:
    instance, image = make_instance(), user.directory / "gpu.vfm"
    give(instance)
    rights = "CAP_SYS_PTRACE and, for another user's process, CAP_DAC_READ_SEARCH"
    with cli.hold_started(instance.uuid) as holder:
        save = ("save", instance.uuid, image)
        user.refused(*save, words="no process that can be seen has it open, and a save ends with the last close")
        user.refused(*save, words=f"run as root or with {rights}")
        for one in BOTH:
            locked = f"PID {holder.pid} cannot be looked into: EACCES (Permission denied); run as root or with {rights}"
            user.refused(*save, "--pid", str(holder.pid), caps=(one,), words=locked)
        assert instance.counters()["status_set"] == 0
        user.run(*save, caps=BOTH)
        assert instance.run_state() == "stopped"
        user.run("-q", "restore", instance.uuid, image, "--start", caps=BOTH)
        assert instance.run_state() == "running"
    assert owner_and_mode(image) == (NOBODY, 0o600)


def test_the_user_s_own_holder_lends_without_any(make_instance: MakeInstance, user: User) -> None:
    instance = make_instance()
    give(instance)
    scope = PTRACE_SCOPE.read_text() if PTRACE_SCOPE.exists() else None
    with held_by(user, instance.uuid):
        try:
            if scope is not None:
                PTRACE_SCOPE.write_text("1")  # as Ubuntu has it
                user.refused("stop", instance.uuid, words="cannot be borrowed: EPERM")
                assert instance.run_state() == "running"
                user.run("-q", "stop", instance.uuid, caps=("sys_ptrace",))
                assert instance.run_state() == "stopped"
                PTRACE_SCOPE.write_text("0")
            user.run("-q", "start", instance.uuid)
            assert instance.run_state() == "running"
        finally:
            if scope is not None:
                PTRACE_SCOPE.write_text(scope)


def test_an_inherited_fd_of_the_group_is_enough(make_instance: MakeInstance, user: User) -> None:
    with Guest.opened(make_instance()) as guest:
        instance, image = guest.instance, user.directory / "gpu.vfm"
        fd = os.dup(guest.container.group_fd)
        try:
            user.run("-q", "save", instance.uuid, image, "--fd", str(fd), pass_fds=(fd,))
        finally:
            os.close(fd)
        assert instance.run_state() == "stopped"
        assert owner_and_mode(image) == (NOBODY, 0o600)
