# SPDX-License-Identifier: MIT
"""Make the man pages of ``man/``, one per command and program, of the text that ``--help`` shows.

``python -m tools.man [DIRECTORY]`` writes them; a unit test compares the committed ones with a fresh run. Nothing of
the day, the version or this machine is in them.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from vfio_mig.cli import qemu
from vfio_mig.cli.main import PROGRAM, cli

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
DIRECTORY: Final = ROOT / "man"
EXIT_STATUS: Final = (
    ("0", "Done."),
    ("1", "There are differences (diff \\-\\-exit\\-code)."),
    ("2", "Wrong usage: syntax, a target that exists, a header without the RFC."),
    ("3", "No such device, or it cannot be opened (busy, no permission, nobody holds it)."),
    ("4", "The device does not support it."),
    ("5", "The device or the kernel failed."),
    ("6", "The image is invalid or does not fit the device."),
    ("7", "The host failed: disk full, permission."),
    ("130", "Interrupted, rolled back."),
)
_DEVICE: Final = "0 2 3 4 5 7 130"
_FILE: Final = "0 2 6 7 130"
_BOTH: Final = "0 2 3 4 5 6 7 130"
_HOST: Final = "0 2 7 130"
CODES: Final = {
    **dict.fromkeys(("conform", "dirty", "hold", "info", "mdev", "reset", "start", "state"), _DEVICE),
    **dict.fromkeys(("status", "stop", "sync"), _DEVICE),
    **dict.fromkeys(("extract", "inspect", "pack", "pages", "verify"), _FILE),
    **dict.fromkeys(("check", "migrate", "restore", "save", *qemu.COMMANDS, "vm"), _BOTH),
    **dict.fromkeys(("doctor", "list"), _HOST),
    "diff": f"1 {_FILE}",
}
"""With which codes a command may end."""
_OWN: Final = {
    ("check", "6"): "The image is invalid or does not fit the device: a check is a mismatch.",
    ("conform", "5"): "The device or the kernel failed, or a check did.",
    ("diff", "1"): "There are differences, with \\-\\-exit\\-code.",
    ("doctor", "7"): "The host failed, or a check has found a problem.",
}
"""What a code of a command says besides."""
ENVIRONMENT: Final = (
    ("VFIO_MIG_UAPI_HEADER", "Path of a patched kernel's linux/vfio.h, as \\fB\\-\\-uapi\\-header\\fR."),
    ("VFIO_MIG_LOCK_DIR", "Directory of the locks and notes, one per device, instead of \\fI/run/vfio\\-mig\\fR."),
    ("NOTIFY_SOCKET", "Where \\fBhold\\fR tells systemd that it is ready."),
)
FILES: Final = (
    ("/dev/vfio/N, /dev/vfio/vfio", "A device's group, and the container."),
    ("/dev/vfio/devices/vfioN, /dev/iommu", "A device's own node, and iommufd, where the kernel has them."),
    ("/run/vfio\\-mig/DEVICE.lock", "Who is at work on a device, and what a killed job has left."),
)


def escape(text: str) -> str:
    r"""Write text so that roff prints it as it stands.

    >>> escape("--json"), escape(".x")
    ('\\-\\-json', '\\&.x')
    """
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _bold_commands(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"\\fB\1\\fR", escape(text))


def paragraphs(text: str) -> Iterator[str]:
    """Turn a command's help into roff; what stands behind click's mark of a block is printed line by line."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text).replace("\f", "")):
        lines = paragraph.splitlines()
        if lines[1:] and lines[1].startswith("Exit codes:"):  # they have a section of their own
            continue
        if lines[0].strip() != "\b":
            yield ".PP"
            yield _bold_commands(" ".join(line.strip() for line in lines))
            continue
        title, _, command = lines[1].partition(": ")
        is_short = len(lines) == 2 and bool(command)  # noqa: PLR2004 -- the mark, and one line with the example in it
        block = [command] if is_short else [line.removeprefix("  ") for line in lines[2:]]
        yield ".PP"
        heading = title if is_short else lines[1].removesuffix(":")
        yield escape(heading) + ("" if heading.endswith("?") else ":")
        yield ".PP"
        yield ".nf"
        yield ".RS 4"
        yield from map(escape, block)
        yield ".RE"
        yield ".fi"


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    if context.parent is not None:
        yield f"The options of \\fB{escape(PROGRAM)}\\fR(1) may stand behind the command, too."
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Argument):
            continue
        record = parameter.get_help_record(context)
        if record is not None:
            yield ".TP"
            yield f"\\fB{escape(record[0])}\\fR"
            yield _bold_commands(record[1])


def exit_status(name: str) -> tuple[tuple[str, str], ...]:
    """Return the codes that a command ends with, and what each says; all of them for the program itself."""
    codes = CODES[name].split() if name in CODES else [code for code, _ in EXIT_STATUS]
    return tuple((code, _OWN.get((name, code), text)) for code, text in EXIT_STATUS if code in codes)


def _table(rows: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for name, text in rows:
        yield ".TP"
        yield f"\\fB{name}\\fR"
        yield text


def page(name: str, command: click.Command, context: click.Context, others: list[str]) -> str:
    """Return one page.

    :param name: of the page: ``vfio-mig``, ``vfio-mig-COMMAND``, ``qemu-save`` or ``qemu-restore``.
    :param others: pages to see also.
    """
    usage = " ".join(command.collect_usage_pieces(context))
    short = command.get_short_help_str(200).rstrip(".")
    lines = [
        '.\\" SPDX-License-Identifier: MIT',
        ".\\\" Made by tools/man.py of the command's help; do not edit.",
        f'.TH {escape(name.upper())} 1 "" "{PROGRAM}" "User Commands"',
        ".SH NAME",
        f"{escape(name)} \\- {escape(short[:1].lower() + short[1:])}",
        ".SH SYNOPSIS",
        f"\\fB{escape(context.command_path)}\\fR {escape(usage)}",
        ".SH DESCRIPTION",
        *list(paragraphs(command.help or ""))[1:],
        ".SH OPTIONS",
        *_options(command, context),
    ]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for one in command.list_commands(context):
            sub = command.get_command(context, one)
            if sub is not None:
                lines += [".TP", f"\\fB{escape(one)}\\fR", escape(sub.get_short_help_str(200))]
    lines += [".SH EXIT STATUS", *_table(exit_status(name.removeprefix(f"{PROGRAM}-")))]
    if name == PROGRAM:
        lines += [".SH ENVIRONMENT", *_table(ENVIRONMENT), ".SH FILES", *_table(FILES)]
    lines += [".SH SEE ALSO", ",\n".join(f"\\fB{escape(one)}\\fR(1)" for one in others)]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return every page by the name of its file."""
    root = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    names = cli.list_commands(root)
    every = [f"{PROGRAM}-{name}" for name in names]
    made = {f"{PROGRAM}.1": page(PROGRAM, cli, root, every)}
    for name, title in zip(names, every, strict=True):
        command = cli.get_command(root, name)
        assert command is not None  # noqa: S101 -- it was listed
        context = click.Context(command, parent=root, info_name=name)
        made[f"{title}.1"] = page(title, command, context, [PROGRAM, *(one for one in every if one != title)])
    for name, command in qemu.COMMANDS.items():
        others = [*(one for one in qemu.COMMANDS if one != name), PROGRAM, f"{PROGRAM}-save", f"{PROGRAM}-restore"]
        made[f"{name}.1"] = page(
            name, command, click.Context(command, info_name=name, **command.context_settings), others
        )
    return made


def main() -> None:
    """Write all pages, and remove those of commands that are gone."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    directory.mkdir(exist_ok=True)
    made = pages()
    for old in directory.glob("*.1"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
