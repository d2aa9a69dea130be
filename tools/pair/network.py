# SPDX-License-Identifier: MIT
"""What runs in two VMs that reach each other by ssh: ``python -m tools.pair.network source|target``.

The source moves a vGPU of the sample driver, by ``vfio-mig migrate`` as a user has it. Before that it meets all that
can be wrong with a connection; each time its own device has to go on, and the target's to be as it was.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.demo.report import Report
from tools.lab.sample import gpu
from tools.lab.sample.held import Side, guest_view, queue_one, run_some_work, side
from tools.pair import post, sides, sshd
from tools.pair.hosts import HOST_FAILED, Target, Way, vfio_mig

if TYPE_CHECKING:
    from collections.abc import Mapping

GREETING: Final = "Welcome to the target"


class Cases:
    """Connections that fail, and what is to come of them."""

    def __init__(self, source: Side, way: Way, report: Report) -> None:
        self._source = source
        self._way = way
        self._report = report
        self._before = post.ask("state")

    def fails(self, what: str, *words: str, options: tuple[str, ...] = ()) -> None:
        """Migrate, which fails as the host's fault and says so in one line with these words; nothing else happens."""
        began = time.monotonic()
        done = vfio_mig("migrate", self._source.name, self._way.device, *options)
        text = done.stderr.strip()
        print(f"  {text} ({time.monotonic() - began:.0f} s)")
        said = len(text.splitlines()) == 1 and all(word in text for word in words)
        self._report.check(f"{what}: exit code {done.returncode}", said and done.returncode == HOST_FAILED)
        state = self._source.instance.run_state()
        self._report.check("the source's device runs", state == "running")

    def breaks(self, what: str, *words: str, options: tuple[str, ...] = ()) -> None:
        """Migrate, and have the other side do that to the connection while the device stands still."""
        hook = f"after-stop={post.asking_script(what, sshd.OWN)}"
        self.fails(f"{what} by sshd", *words, options=("--hook", hook, *options))
        post.ask("thaw")
        now = post.ask("state")
        self._report.check(f"the target's device is untouched, and {now['run_state']}", now == self._before)


def meet_failures(cases: Cases, way: Way, told: Mapping[str, str], report: Report) -> None:
    """Meet all that can be wrong with a connection, and leave a good one."""
    report.step("Keys")
    cases.fails("an unknown host key", "Host key verification failed", "once by hand", "compare the key")
    way.know(told["other_key"])
    cases.fails("another host key", "Host key verification failed", "another key than the one that is known")
    way.know(told["host_key"])
    cases.fails("no key of this user's", "Permission denied (publickey)", "nobody is asked for a password")
    way.have(told["user_key"])

    report.step("The shell on the other host")
    cases.fails("no vfio-mig there", "vfio-mig: command not found", f"'ssh {way.host} vfio-mig --version' finds it")
    post.ask("install")
    post.ask("greeting", GREETING)
    cases.fails("a login shell that prints", f"'{GREETING}' came where the report", "login shell")
    post.ask("greeting", "")

    report.step("A connection that breaks while the device stands still")
    cases.breaks("cut", "ssh failed at 'restore'")
    soon = "ssh -oServerAliveInterval=1 -oServerAliveCountMax=2"
    cases.breaks("freeze", "ssh failed at 'restore'", "not responding", options=("--rsh", soon))


def move(source: Side, way: Way, told: Mapping[str, str], report: Report) -> None:
    """Use the device, stop it with work in its queue, and move it, with a banner on the way."""
    report.step("A migration by ssh")
    engine = gpu.Engine(source.guest)
    source.guest.device.set_fence(0, 0x00100001, 0x001FF003)
    source.guest.device.make_ppgtt(4, [0x5000])
    work = run_some_work(source.guest, engine)
    subprocess.run(["vfio-mig", "-q", "stop", source.name], check=True)
    queued = queue_one(source.guest, engine)
    memory = ["--memory", source.memory_option, "--target-memory", told["memory"]]
    done = vfio_mig("--json", "migrate", "--no-start", source.name, way.device, *memory)
    report.check(f"it is moved: exit code {done.returncode} {done.stderr}".rstrip(), done.returncode == 0)
    if done.returncode == 0:
        said: dict[str, Any] = json.loads(done.stdout)
        pages = said["pages_written"]
        report.check(f"{pages} pages were written there", pages == len(source.instance.pinned()))
        print(f"  {said['state_bytes']} bytes of state, down for {said['downtime']:.1f} s")
        report.failures += post.ask("judge", sides.facts_of(source, work, queued))
        again = vfio_mig("start", source.name)
        report.check("the source is not started again", again.returncode != 0 and "was moved" in again.stderr)


def be_source(source: Side) -> int:
    """Play the host that a device leaves; 1 if a check fails."""
    sshd.install()
    report = Report()
    told = post.take("target")
    way = Way(told["name"])
    meet_failures(Cases(source, way, report), way, told, report)
    move(source, way, told, report)
    post.ask("end")
    return int(report.failures > 0)


class SampleTarget(Target):
    """With a vGPU of the sample driver."""

    def __init__(self, played: Side) -> None:
        super().__init__()
        self._side: Final = played

    def device_state(self) -> dict[str, Any]:
        """Say how the vGPU is, and whether it was written to."""
        return {
            "run_state": self._side.instance.run_state(),
            "view": sides.digest(guest_view(self._side.guest.device)),
            "state_write": self._side.instance.counters()["state_write"],
        }

    def judge(self, facts: dict[str, Any]) -> int:
        """Compare what has come, and start it."""
        report = Report()
        sides.compare(self._side, facts, report)
        sides.start(self._side, facts, report)
        return report.failures


def be_target(played: Side) -> int:
    """Play the host that a device comes to."""
    with contextlib.closing(SampleTarget(played)) as target:
        post.put("target", {**target.told, "name": played.name, "memory": played.memory_option})
        post.serve(target.answers())
    return 0


def main(which: str) -> int:
    """Play one side; the other is in another VM."""
    # guest memory must be shared with the holder
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, side(Path(name) / "guest.mem") as played:
        return be_source(played) if which == "source" else be_target(played)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
