# SPDX-License-Identifier: MIT
"""What runs in two VMs for the Ansible collection: ``python -m tools.pair.fleet source|target``.

The source is a host with vGPUs at work and the host that Ansible runs on, too; the target has none before. The playbook
makes, holds and moves them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.demo.report import Report
from tools.lab.sample import gpu, host
from tools.lab.sample.held import PAGES, Side, Work, queue_one, run_some_work, side
from tools.lab.vfio.raw import PAGE, Memory
from tools.pair import post, sshd
from tools.pair.hosts import PEER, Target, Way, vfio_mig

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAYBOOK: Final = "vfio_mig.fleet.empty_host"
VGPUS: Final = 2
COLLECTION: Final = Path(__file__).resolve().parents[2] / "contrib/ansible"
SECONDS: Final = 400
WORK_SECONDS: Final = 20.0


class Control:
    """The host that Ansible runs on."""

    def __init__(self, directory: Path, memory: Mapping[str, str]) -> None:
        self._directory: Final = directory
        home = directory / "collections/ansible_collections/vfio_mig"
        home.mkdir(parents=True)
        (home / "fleet").symlink_to(COLLECTION)
        python = Path(os.environ["VIRTUAL_ENV"]) / "bin/python"
        hosts = {
            "one": {"ansible_connection": "local"},
            "other": {
                "ansible_host": os.environ[PEER],
                "ansible_user": "root",
                "vfio_mig_address": f"root@{os.environ[PEER]}",
            },
        }
        inventory = {
            "all": {
                "hosts": hosts,
                "vars": {"ansible_python_interpreter": str(python), "ansible_pipelining": True},
                "children": {"vfio_mig_targets": {"hosts": {"other": {}}}},
            }
        }
        (directory / "inventory.json").write_text(json.dumps(inventory))
        self._report: Final = directory / "report.json"
        variables = {
            "vfio_mig_from": "one",
            "vfio_mig_memory": {name: [option] for name, option in memory.items()},
            "vfio_mig_report": str(self._report),
        }
        (directory / "variables.json").write_text(json.dumps(variables))

    def outcomes(self, outcome: str) -> list[dict[str, Any]]:
        """Return those devices of the last report that met it."""
        return [one for one in json.loads(self._report.read_text()) if one["outcome"] == outcome]

    def play(self, playbook: str | Path, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a playbook to its end."""
        began = time.monotonic()
        where = self._directory
        own = {
            "ANSIBLE_COLLECTIONS_PATH": where / "collections",
            "ANSIBLE_HOME": where / "home",
            "ANSIBLE_STDOUT_CALLBACK": "default",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml",
        }
        done = subprocess.run(
            ["ansible-playbook", "-i", where / "inventory.json", "-e", f"@{where}/variables.json", *words, playbook],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SECONDS,
            env={**os.environ, **{name: str(value) for name, value in own.items()}},
        )  # fmt: skip
        print(f"  $ ansible-playbook {' '.join(words)} {playbook}  ({time.monotonic() - began:.0f} s)", flush=True)
        return done


def recap(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a run: how many tasks did what."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("one ")]
    return " ".join(lines[-1].split()) if lines else f"no recap: {done.stdout[-3000:]}{done.stderr[-3000:]}"


SAVE: Final = """\
- hosts: one
  gather_facts: false
  tasks:
    - vfio_mig.fleet.vfio_mig_save: &save
        device: "{{ device }}"
        path: "{{ path }}"
        leave_running: true
      register: first
    - vfio_mig.fleet.vfio_mig_save: *save
      register: second
    - ansible.builtin.assert:
        that: [first.changed, first.report.state_bytes > 0, not second.changed, second.verified is defined]
"""


def be_source() -> int:
    """Play the host that is emptied; 1 if a check fails."""
    sshd.install()
    report = Report()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        played = [stack.enter_context(side(directory / f"guest{number}.mem")) for number in range(VGPUS)]
        told = post.ask("memory", [str(one.file) for one in played])
        way = Way("")
        way.know(told["host_key"])
        way.have(told["user_key"])
        control = Control(directory, {one.name: one.memory_option for one in played})
        save(control, played[0], directory, report)
        empty(control, played, report)
        post.ask("end")
    return int(report.failures > 0)


def save(control: Control, one: Side, directory: Path, report: Report) -> None:
    """Save by the module, twice: the second time there is nothing to do."""
    report.step("The module vfio_mig_save")
    (directory / "save.yml").write_text(SAVE)
    done = control.play(directory / "save.yml", "-e", f"device={one.name}", "-e", f"path={directory}/one.vfm")
    report.check(f"the file is made once: {recap(done)}", done.returncode == 0 and "changed=1 " in recap(done))


def empty(control: Control, played: list[Side], report: Report) -> None:
    """Empty this host, after looking what would come of it; the second time there is nothing to do."""
    report.step("The playbook empty_host")
    works: list[tuple[Work, Work]] = []
    for one in played:
        engine = gpu.Engine(one.guest)
        work = run_some_work(one.guest, engine, 4)
        one.guest.device.stop()
        works.append((work, queue_one(one.guest, engine)))
    done = control.play(PLAYBOOK, "--check")
    if done.returncode:
        print(done.stdout, done.stderr)
    there = post.ask("devices")
    report.check(f"--check changes nothing: {recap(done)}", done.returncode == 0 and there == [])
    done = control.play(PLAYBOOK, "-e", json.dumps({"vfio_mig_options": {"rsh": "false"}}))
    as_they_were = all(one.instance.run_state() == "stopped" for one in played)
    told = {one["device"]: one["message"] or "" for one in control.outcomes("failed")}
    report.check(f"where no way leads to the other host it fails: {recap(done)}", done.returncode != 0)
    report.check("the devices are as they were", as_they_were)
    for name, message in told.items():
        print(f"  {name}: {message}")
    report.check("and says why of each", told.keys() == {one.name for one in played} and all(told.values()))
    there = post.ask("devices")
    report.check("what was made there for them stays", sorted(there) == sorted(one.name for one in played))
    done = control.play(PLAYBOOK)
    report.check(f"it ends well: {recap(done)}", done.returncode == 0)
    if done.returncode:
        print(done.stdout, done.stderr)
        return
    moved = [one["device"] for one in control.outcomes("moved")]
    report.check(f"its report: {len(moved)} moved", sorted(moved) == sorted(one.name for one in played))
    for one, (work, queued) in zip(played, works, strict=True):
        facts = {"name": one.name, "kind": one.instance.kind, "file": str(one.file), "work": work, "queued": queued}
        report.failures += post.ask("judge", facts)
        stays = one.instance.run_state() == "stopped" and queued.done_in(one.memory) == 0
        report.check("here it stays stopped, and has not run what was queued", stays)
        report.check("and is not started by mistake", "was moved" in vfio_mig("start", one.name).stderr)
    once_more(control, report)


def once_more(control: Control, report: Report) -> None:
    """Play it on a host that is empty."""
    done = control.play(PLAYBOOK)
    nothing = done.returncode == 0 and "changed=0 " in recap(done)
    report.check(f"once more: nothing is left to do: {recap(done)}", nothing)


class FleetTarget(Target):
    """A host without a vGPU, but with memory for those that come."""

    pages = PAGES

    def memory(self, files: list[str]) -> dict[str, str]:
        """Have the files of the guests' memory; the source is told how to reach this host."""
        for name in files:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            with Path(name).open("xb") as file:
                file.truncate(self.pages * PAGE)
        return self.told

    def serve(self) -> None:
        """Do what the source asks for, to the end."""
        self.install()
        post.serve({**self.answers(), "memory": self.memory, "devices": self.devices}, 3 * SECONDS)

    def devices(self, _: object = None) -> list[str]:
        """Return which vGPUs there are."""
        return [path.name for path in Path("/sys/bus/mdev/devices").glob("*-*-*-*-*")]

    def judge(self, facts: dict[str, Any]) -> int:
        """See whether one has come and works."""
        report = Report()
        instance, memory = host.Instance(facts["name"], facts["kind"]), Memory(0, PAGES, Path(facts["file"]), kept=True)
        work, queued = (Work(map(tuple, facts[name])) for name in ("work", "queued"))
        report.check(f"{facts['name']} runs here", instance.run_state() == "running")
        end = time.monotonic() + WORK_SECONDS
        while not queued.done_in(memory) and time.monotonic() < end:
            time.sleep(0.1)
        report.check("its queued workload has run here", queued.done_in(memory) == 1)
        report.check(f"the results of its {len(work)} others are here", work.done_in(memory) == len(work))
        return report.failures


def be_target() -> int:
    """Play the host that the vGPUs come to."""
    with contextlib.closing(FleetTarget()) as target:
        target.serve()
    return 0


if __name__ == "__main__":
    sys.exit(be_source() if sys.argv[1] == "source" else be_target())
