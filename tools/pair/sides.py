# SPDX-License-Identifier: MIT
"""What runs in the two VMs: ``python -m tools.pair.sides source | python -m tools.pair.sides target``.

What cannot be seen in the stream, the source writes to a JSON file in the results directory, which both share. It is
there before the stream ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tools.demo.report import Report
from tools.lab.sample import gpu, image
from tools.lab.sample.held import Side, Work, guest_view, queue_one, run_some_work, side
from tools.lab.vfio.raw import PAGE

if TYPE_CHECKING:
    from tools.lab.vfio.raw import Memory

CUT: Final = "VFIO_MIG_PAIR_CUT"
"""Set where the target's part of the stream is not whole."""
INVALID_IMAGE: Final = 6


def _facts_file() -> Path:
    return Path(os.environ["VFIO_MIG_VM_OUT"]) / "source.json"


def digest(data: bytes) -> str:
    """Return what stands for so many bytes."""
    return hashlib.sha256(data).hexdigest()


def _pages(memory: Memory, addresses: list[int]) -> dict[str, str]:
    return {f"{address:#x}": digest(memory.read(address, PAGE)) for address in addresses}


def facts_of(source: Side, work: Work, queued: Work) -> dict[str, Any]:
    """Return all that the target compares, of a source that is stopped and saved."""
    layout = source.instance.layout()
    return {
        "kernel": os.uname().release,
        "run_state": source.instance.run_state(),
        "view": digest(guest_view(source.guest.device)),
        "roots": image.roots(source.guest.device.save()),
        "host_low": layout.host_low,
        "host_high": layout.host_high,
        "host_fences": source.instance.hw_fence(),
        "pages": _pages(source.memory, source.instance.pinned()),
        "work": work,
        "work_done": work.done_in(source.memory),
        "queued": queued,
        "queued_done": queued.done_in(source.memory),
    }


def save(source: Side) -> int:
    """Use the device, stop it with work in its queue, and save it to standard output; the command's exit code."""
    engine = gpu.Engine(source.guest)
    source.guest.device.set_fence(0, 0x00100001, 0x001FF003)
    source.guest.device.make_ppgtt(4, [0x5000])
    work = run_some_work(source.guest, engine)
    subprocess.run(["vfio-mig", "-q", "stop", source.name], check=True)
    queued = queue_one(source.guest, engine)
    done = subprocess.run(["vfio-mig", "save", source.name, "-", "--memory", source.memory_option], check=False)
    _facts_file().write_text(json.dumps(facts_of(source, work, queued)))
    return done.returncode


def _restore(target: Side) -> tuple[int, dict[str, Any]]:
    """Restore standard input; the command's exit code and report."""
    command = ["vfio-mig", "--json", "restore", target.name, "-", "--memory", target.memory_option]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return done.returncode, json.loads(done.stdout) if not done.returncode else {}


def compare(target: Side, facts: dict[str, Any], report: Report) -> None:
    """Compare the restored, stopped device with the source."""
    report.check("the guest's view is identical", digest(guest_view(target.guest.device)) == facts["view"])
    roots = [list(root) for root in image.roots(target.guest.device.save())]
    report.check("so are the page table's roots", len(roots) == 1 and roots == facts["roots"])
    layout = target.instance.layout()
    report.check(
        f"host addresses moved: low {facts['host_low']:#x} -> {layout.host_low:#x}, "
        f"high {facts['host_high']:#x} -> {layout.host_high:#x}",
        layout.host_low != facts["host_low"] and layout.host_high != facts["host_high"],
    )
    fences = target.instance.hw_fence()
    report.check("host fences moved with them", any(fences) and fences != facts["host_fences"])
    pinned = target.instance.pinned()
    report.check("the same pages are pinned", [f"{address:#x}" for address in pinned] == list(facts["pages"]))
    pages = _pages(target.memory, pinned)
    equal = sum(pages[address] == digest for address, digest in facts["pages"].items() if address in pages)
    report.check(f"{len(facts['pages'])} dirty pages, {equal} equal here", 0 < len(facts["pages"]) == equal)
    work = Work(map(tuple, facts["work"]))
    report.check(f"the source's {len(work)} workloads' results are here", work.done_in(target.memory) == len(work))


def start(target: Side, facts: dict[str, Any], report: Report) -> None:
    """Start it and wait for the work that was queued on the source."""
    queued = Work(map(tuple, facts["queued"]))
    report.check(
        "the queued workload waits, and has not run on the source",
        len(target.instance.queue()) == 1 and queued.done_in(target.memory) == 0 == facts["queued_done"],
    )
    before = target.instance.counters()
    started = subprocess.run(["vfio-mig", "-q", "start", target.name], check=False).returncode == 0
    report.check("it starts", started and target.instance.run_state() == "running")
    gpu.wait_ended(target.guest, before, 1)
    report.check("the queued workload has run here", queued.done_in(target.memory) == 1)


def restore(target: Side) -> int:
    """Restore from standard input, check all that can be compared, print it; 1 if a check fails."""
    report = Report()
    code, restored = _restore(target)
    facts = json.loads(_facts_file().read_text())
    report.check(f"restored on {os.uname().release} what was saved on {facts['kernel']}", code == 0)
    report.check("the source has done its work and is stopped", facts["work_done"] > 0 and "stop" in facts["run_state"])
    if code == 0:
        written = restored["pages_written"]
        report.check(f"{written} pages came with the stream", written == len(facts["pages"]))
        compare(target, facts, report)
        start(target, facts, report)
    return int(report.failures > 0)


def _counters(target: Side) -> dict[str, int]:
    """Return what the driver has counted, without the ioctls that only ask."""
    return {key: value for key, value in target.instance.counters().items() if key != "other_ioctl"}


def refuse(target: Side) -> int:
    """Check that a part of a stream is refused and leaves no trace; 1 if a check fails."""
    report = Report()
    device, counters = target.guest.device, _counters(target)
    view = digest(guest_view(device))
    code, _ = _restore(target)
    report.check(f"a stream that is cut is refused with exit code {code}", code == INVALID_IMAGE)
    untouched = digest(guest_view(device)) == view and _counters(target) == counters
    report.check("the device is untouched", untouched)
    report.check("and runs", target.instance.run_state() == "running")
    memory = target.memory
    report.check("no page of memory was written", not any(memory.read(memory.iova, memory.size)))
    return int(report.failures > 0)


def main(which: str) -> int:
    """Play one side; the other is in another VM."""
    # guest memory must be shared with the holder
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, side(Path(name) / "guest.mem") as played:
        if which == "source":
            return save(played)
        return refuse(played) if os.environ.get(CUT) else restore(played)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
