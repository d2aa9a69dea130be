# SPDX-License-Identifier: MIT
"""The examples of README.md and docs/*.md, and what stands in for what the VM of the tests does not have.

Whatever is not listed in ELSEWHERE is run, so a new example is run without being named anywhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM: Final = "vfio-mig"
MEMORY: Final = "/dev/shm/guest"

ELSEWHERE: Final = {
    "python3 -m venv /opt/vfio-mig": "needs the network afterwards; tests/package/test_new_user.py",
    "/opt/vfio-mig/bin/": "needs the network; tests/package/test_new_user.py",
    "ln -s /opt/vfio-mig/bin/": "links what needs the network; tests/package/test_new_user.py",
    "man -M /opt/vfio-mig/": "shows what needs the network; tests/package/test_new_user.py",
    ". /opt/vfio-mig/": "reads what needs the network; tests/package/test_new_user.py",
    "pipx install": "needs the network; tests/package/test_python.py",
    "sudo pipx install": "needs the network",
    "qemu-system-x86_64 ": "shortened by …; tests/vm/test_qemu.py starts one",
    "scripts/qemu-": "needs that QEMU; tests/vm/test_qemu.py",
    "vfio-mig vm save /run/": "needs that QEMU; tests/vm/test_qemu.py",
    "vfio-mig vm restore /run/": "needs that QEMU; tests/vm/test_qemu.py",
    "vfio-mig vm list --connect": "needs libvirt; tests/vm/test_gvt_libvirt.py",
    "vfio-mig vm save --connect": "needs libvirt; tests/vm/test_gvt_libvirt.py",
    "vfio-mig vm restore --connect": "needs libvirt; tests/vm/test_gvt_libvirt.py",
    "virsh ": "needs libvirt; tests/vm/test_gvt_libvirt.py",
    "qemu-save ": "needs that QEMU; tests/vm/test_qemu.py",
    "qemu-restore ": "needs that QEMU; tests/vm/test_qemu.py",
    "scripts/vm": "is what the test runs in",
    "scripts/test": "is what runs these examples",
    "scripts/demo": "starts a VM of its own; scripts/test runs it",
    "systemctl ": "no systemd in the VM; tests/vm/test_cli.py plays its side of Type=notify",
    "scripts/package": "builds packages; tests/package does and installs them",
    "apt install ./": "installs these packages; tests/package does, in a Debian of its own",
    "sudo apt ": "installs these packages; tests/package does, in a Debian of its own",
    "T=$(ls ": "needs the source of a driver of the reader's own",
    "make -C ": "needs the same",
    "vfio-mig inspect state.vfm --section stream --hex": "shows a layout that the reader has added",
    "cp scripts/": "installs the unit for that systemd",
    "vfio-mig inspect vm.mig --section": "needs what a QEMU has written; tests/vm/test_qemu_stream.py",
    "vfio-mig extract vm.mig gpu.vfm": "needs the same",
    "vfio-mig pack gpu.vfm new.mig --into": "needs the same",
    "vfio-mig save $UUID gpu.vfm --fd 9": "fd 9 is of whoever owns the group; tests/vm/test_cli_rights.py",
}
"""Beginnings of lines that are not run, with the reason."""

_FENCE: Final = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
_COMMAND: Final = re.compile(rf"(?m)(^|[|;&(] *|\s){PROGRAM} [a-z-]")
_SAID: Final = re.compile(r"\s#\s+(\d+) if ")
_PCI: Final = {"ssh://other/0000:3b:00.1": "ssh://other/$OTHER", "0000:3b:00.1": "$UUID", "0000:3b:00.2": "$OTHER"}
# Debian's 6.12 cannot read a device's log of its writes, and 6.1, which can, has no PRE_COPY
_WITHOUT_LOG: Final = {f" --memory {MEMORY}@0": ""}
_CLOSED: Final = re.compile(r"\bconform \$|\bhold \$|/dev/vfio/\$N")
_V2: Final = re.compile(r"--live|\bv2\.|vfio-mig state |0000:3b:")
_IMAGE: Final = re.compile(r"(?<![\w$/])[\w/-]+\.(?:vfm|bin|mem|xml)\b|/[\w/-]+\.vfm\b")
_WRITES: Final = re.compile(r"\b(save|sync|pack|extract|conform)\b")


class Block(NamedTuple):
    """An example: a few lines of shell, or a Python program."""

    page: str
    number: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Where it is, for a reader."""
        return f"{self.page}:{self.number}"

    def lines(self) -> list[str]:
        """Return its lines, those that end in a backslash joined with the next."""
        return [
            line
            for line in self.text.replace("\\\n", " ").splitlines()
            if line.strip() and not line.lstrip().startswith("#")
        ]

    def to_run(self) -> list[str]:
        """Return the lines that are not listed in ELSEWHERE."""
        return [line for line in self.lines() if reason(line) is None]

    @property
    def speaks_v2(self) -> bool:
        """Whether it is about devices of the mainline protocol."""
        return _V2.search(self.text) is not None

    @property
    def wants_closed(self) -> bool:
        """Whether it opens its device by itself, so that nobody else may have it open."""
        return _CLOSED.search(self.text) is not None


def reason(line: str) -> str | None:
    """Return why a line is not run, None for one that is."""
    return next((why for start, why in ELSEWHERE.items() if line.startswith(start)), None)


def blocks(page: str, text: str) -> Iterator[Block]:
    """Yield the fenced and the indented blocks that have a command line of ours, or Python."""
    for match in _FENCE.finditer(text):
        if match[1] == "python" or (match[1] in {"", "sh", "console"} and _COMMAND.search(match[2])):
            body = re.sub(r"(?m)^\$ ", "", match[2])
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1] or "sh", body)
    number, lines = 0, [*_FENCE.sub(lambda match: "x" + "\n" * match[0].count("\n"), text).splitlines(), "x"]
    found: list[str] = []
    for at, line in enumerate(lines, 1):
        if line.startswith("    ") and (found or not lines[at - 2].strip()):
            number = number if found else at
            found.append(line[4:])
        elif found and not line.strip():
            found.append("")
        elif found:
            body = "\n".join(found) + "\n"
            if _COMMAND.search(body):
                yield Block(page, number, "sh", body)
            found = []


def examples() -> list[Block]:
    """Return every example of every page, in order."""
    return [
        block
        for page in PAGES
        for block in sorted(blocks(page.name, page.read_text("utf-8")), key=lambda one: one.number)
    ]


def inputs_and_outputs(block: Block) -> tuple[list[str], list[str]]:
    """Return the files that must be there before it runs, and those that it makes, as their first line has them."""
    inputs: list[str] = []
    outputs: list[str] = []
    for line in block.to_run():
        command = line.partition(" # ")[0]
        for part in re.split(r"[;|]", command):
            names = [name for name in _IMAGE.findall(part) if name not in {*inputs, *outputs}]
            writes = _WRITES.search(part)
            last = writes is not None and writes[1] in {"pack", "extract"}
            for at, name in enumerate(names):
                made = writes is not None and (at == len(names) - 1 if last and writes[1] == "pack" else not last)
                (outputs if made else inputs).append(name)
    return inputs, outputs


def whole(page: str) -> Block:
    """Return a page's examples as one: what a reader types who follows it from its begin to its end."""
    return Block(page, 1, "sh", "\n".join(one.text for one in examples() if one.page == page))


def script(block: Block) -> str:
    """Return what bash is to run: each line must end with 0, or with what its comment says (`# 1 if …`)."""
    # What holds devices in the background is no job of the shell's; it removes its file at its end
    ends = "kill $(jobs -p) $(cat held.*.pid 2>/dev/null) 2>/dev/null || :; wait; "
    ends += 'while compgen -G "h[eo]ld*.pid" >/dev/null; do sleep 0.1; done'
    steps = ["set -e -o pipefail", f"trap 'code=$?; {ends}; exit $code' EXIT"]
    for line in block.to_run():
        command, said = line.partition("  #")[0].rstrip(), _SAID.search(line)
        for old, new in {**_PCI, **(_WITHOUT_LOG if block.speaks_v2 else {})}.items():
            command = command.replace(old, new)
        # It is to be open before the next line, for which some examples see themselves
        if "--daemon" in command and "--pidfile" not in command:
            steps.append(f"{command} --pidfile held.{len(steps)}.pid")
        elif re.search(rf"\b{PROGRAM} hold ", command) and "--daemon" not in command:
            steps += [f"{command.removesuffix('&')} >held &", "until grep -q 'held open' held; do"]
            steps += ["  kill -0 $!; sleep 0.1", "done"]
        elif said is not None:
            steps.append(
                f"if {command}; then echo 'ended with 0, not {said[1]}' >&2; exit 99; else test $? = {said[1]}; fi"
            )
        else:
            steps.append(f"{{ {command.rstrip(';')}; }}" if not command.endswith("&") else command)
    return "\n".join(steps) + "\n"
