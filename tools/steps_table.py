# SPDX-License-Identifier: MIT
"""Write the table of jobs and steps into docs/scripting.md: ``python -m tools.steps_table``; a unit test compares."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

from vfio_mig.jobs.engine.steps import OTHER_NAMES, STARTS, STEPS, option_of

DOCS: Final = Path(__file__).parents[1] / "docs/scripting.md"
BEGIN: Final = "<!-- steps: python -m tools.steps_table -->"
END: Final = "<!-- end of steps -->"
MEANS: Final = {
    "after-dirty": "the dirty bitmap is there",
    "after-live": "what could be copied while it ran is copied",
    "after-pages": "guest memory is copied, or written",
    "after-round": "a round of copying guest memory has ended",
    "after-start": "it runs",
    "after-state": "its state is read, or loaded",
    "after-stop": "it is stopped",
    "before-start": "it is about to be started",
    "before-stop": "it is about to be stopped",
    "checking": "the next check begins",
    "copied": "the last round has ended",
    "fetched": "the dirty bitmap is there",
    "loaded": "the target holds the state, and waits for the source's word",
    "opened": "the device is open and locked, nothing is changed",
    "restored": "the target holds the state",
    "sent": "all of the image is sent",
    "verified": "all of the image is verified, nothing is changed",
    "waiting": "the image is about to be read",
    "writing-pages": "guest memory is about to be written",
    "written": "all of the image is written; it has no name yet",
}
"""What is the case at a step."""


def order() -> list[str]:
    """Return every step once, each behind those that come before it in a job."""
    before: dict[str, set[str]] = {}
    for steps in STEPS.values():
        for at, step in enumerate(steps):
            before.setdefault(step, set()).update(steps[max(0, at - 1) : at])
    return list(TopologicalSorter(before).static_order())


def _cell(job: str, step: str) -> str:
    if step not in STEPS[job]:
        return ""
    if job == "migrate" and step in STARTS:
        return "without `--no-start`"
    option = option_of(job, step)
    return "yes" if option is None else f"with `{option}`"


def table() -> str:
    """Return the table."""
    others = {step: word for word, step in OTHER_NAMES.items()}
    lines = [f"| step | means | {' | '.join(STEPS)} |", "| --- " * (len(STEPS) + 2) + "|"]
    for step in order():
        name = f"`{step}`" + (f", `{others[step]}`" if step in others else "")
        lines.append(f"| {name} | {MEANS[step]} | {' | '.join(_cell(job, step) for job in STEPS)} |")
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the two marks."""
    head, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    DOCS.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    main()
