# SPDX-License-Identifier: MIT
"""``inspect``, ``extract``, ``pack`` and ``diff``: saved devices without a device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from vfio_mig.cli import complete
from vfio_mig.cli.output import print_json, put, say, warn
from vfio_mig.errors import ImageError, UsageError, printable

if TYPE_CHECKING:
    from vfio_mig.cli.options import Options
    from vfio_mig.decode.differences import Difference
    from vfio_mig.jobs.files.inspect import InspectReport

DIFFERENT: Final = 1
_ROWS: Final = 8
"""Rows of a list that the overview shows; ``--section`` shows all that are in the report."""
_ALL: Final = 1 << 30
_JSON_HEX_MAX: Final = 16 << 20


@click.command("inspect", short_help="Look inside an image, a bare state, or a QEMU stream.")
@click.argument("file", shell_complete=complete.file)
@click.option(
    "--section",
    metavar="NAME",
    shell_complete=complete.section,
    help="Show this part of the state only, and all of it.",
)
@click.option("--hex", "as_hex", is_flag=True, help="Show the bytes of --section, as 'hexdump -C' does.")
@click.option(
    "--plot", metavar="PICTURE", help="Draw a vGPU's graphics memory to PICTURE (.png or .svg; needs matplotlib)."
)
@click.pass_obj
def inspect_command(options: Options, file: str, section: str | None, *, as_hex: bool, plot: str | None) -> None:
    """Say what is in FILE (- is stdin): header, members, statistics, and the state as far as its layout is known.

    FILE is an image, a bare state, or a QEMU migration stream, whose VFIO devices are shown; gzip, bzip2, xz and the
    header of `virsh save` around it are taken away. A GVT-g state has the
    sections header, cfg, sreg, vreg, pvinfo, fences, engines, gtt, ppgtt and workload; other layouts have theirs. Every
    image has image.header, image.members and image.statistics.

    \b
    Example: what is queued, and where the page table begins
      vfio-mig inspect gpu.vfm --section workload
      vfio-mig inspect gpu.vfm --section gtt --hex | head
    """
    from vfio_mig.cli.pictures import plot_layout, prepare
    from vfio_mig.jobs.files.inspect import choose_section, inspect_image

    prepare(plot)
    if as_hex:
        if section is None:
            raise click.UsageError("--hex needs --section")
        _print_hex(options, file, section)
        return
    report = inspect_image(file)
    if plot is not None:
        plot_layout(plot, file, choose_section(report, "gtt").values["parts"])
    if section is not None:
        chosen = choose_section(report, section)
        if options.as_json:
            print_json(chosen.as_dict())
        else:
            _print_section(chosen.name, chosen.values, _ALL)
    elif options.as_json:
        print_json(report.as_dict())
    elif plot is not None:
        say(options, f"{file}: its graphics memory is drawn in {plot}")
    else:
        print_report(report)
    for problem in report.problems:
        warn(f"{file}: {problem}")


def _print_section(name: str, values: dict[str, Any], rows: int) -> None:
    from vfio_mig.cli.columns import terminal_width
    from vfio_mig.cli.render import lines, moment

    width = terminal_width()
    _put_folded(name, width)
    if name == "image.header" and type(values.get("time")) is int:
        values = {**values, "time": moment(values["time"])}
    for line in lines(values, rows):
        _put_folded(line, width)


def _put_folded(line: str, width: int | None) -> None:
    """Print a line so that it fits a terminal, if there is one; what is escaped counts as it is shown."""
    from vfio_mig.cli.columns import folded

    for piece in folded(printable(line), width):
        put(piece)


def print_report(report: InspectReport, rows: int = _ROWS) -> None:
    """Print a report in words, at most *rows* of each list in it."""
    from vfio_mig.cli.columns import terminal_width
    from vfio_mig.jobs.files.inspect import image_sections

    inside = "".join(f" in {name}" for name in reversed(report.wrapping))
    pages = "" if report.pages is None else f", {report.pages} pages of memory"
    what = f"{report.kind}{inside}, {report.size} bytes, {report.state_bytes} bytes of state{pages}: {report.layout}"
    _put_folded(f"{report.file}: {what}", terminal_width())
    for section in image_sections(report):
        _print_section(section.name, section.values, rows)
    for section in report.sections:
        _print_section(f"{section.name}  at {section.offset:#x}, {section.size} bytes", section.values, rows)


def _print_hex(options: Options, file: str, section: str) -> None:
    from vfio_mig.cli.render import hex_lines
    from vfio_mig.jobs.files.inspect import section_bytes

    problems: list[str] = []
    if options.as_json:
        (piece, *more) = section_bytes(file, section, _JSON_HEX_MAX, problems)
        if more:
            raise UsageError(f"section {section!r} has more than {_JSON_HEX_MAX} bytes", hint="leave out --json")
        print_json({**piece._asdict(), "content": piece.content.hex()})
    else:
        last: list[bytes] = []
        for piece in section_bytes(file, section, problems=problems):
            for line in hex_lines(piece.content, piece.offset, last):
                put(line)
    for problem in problems:
        warn(f"{file}: {problem}")


@click.command("extract", short_help="Take an image or a QEMU stream apart.")
@click.argument("file", shell_complete=complete.file)
@click.argument("target", metavar="DIRECTORY|IMAGE", shell_complete=complete.file)
@click.option(
    "--device",
    metavar="NAME",
    shell_complete=complete.stream_device,
    help="Write IMAGE: this VFIO device of a QEMU stream, by its section's name, or vfio0, vfio1, …",
)
@click.option("--force", is_flag=True, help="With --device: replace an existing IMAGE.")
@click.pass_obj
def extract_command(options: Options, file: str, target: str, *, device: str | None, force: bool) -> None:
    """Write the members of FILE (- is stdin) to files in DIRECTORY, which is new or empty. Only you can read them.

    Of an image: header.json, state.bin, dirty/0000, pages/0000, …, statistics.json and layout.json; `pack` makes the
    same image of them again, or another one if they were changed. Guest memory as a plain file comes from `pages`. Of
    a QEMU migration stream: vfioN.state and vfioN.config of each VFIO device, and stream.json. Of a stream that is cut
    off or not understood, what there is: a state that is not whole is called vfioN.state.incomplete, and the exit code
    is 6.

    With --device, FILE is a QEMU migration stream, and IMAGE becomes an image of one of its VFIO devices, which
    `restore` and `check` take; `inspect` lists the devices. The stream must be whole.

    \b
    Examples:
      vfio-mig extract gpu.vfm parts
      vfio-mig pack parts again.vfm && cmp gpu.vfm again.vfm
      vfio-mig extract vm.mig gpu.vfm --device 0000:00:03.0/vfio
    """
    if device is not None:
        _extract_device(options, file, target, device, force=force)
        return
    if force:
        raise UsageError("--force needs --device: a directory is never replaced")
    from vfio_mig.jobs.files.extract import INCOMPLETE, extract_image

    report = extract_image(file, target)
    if report.complete:
        options.done()
    if options.as_json:
        print_json(report.as_dict())
    else:
        say(options, f"{target}: {len(report.files)} files, {report.kind}")
    for problem in report.problems:
        warn(f"{file}: {problem}")
    if not report.complete:
        states = ", ".join(name for name in report.files if name.endswith(INCOMPLETE))
        more = f": {states} is not whole" if states else ""
        error = ImageError(f"not all of the stream could be taken apart{more}")
        error.file = file
        raise error


def _extract_device(options: Options, file: str, image: str, device: str, *, force: bool) -> None:
    from vfio_mig.jobs.files.qemu import extract_device

    report = extract_device(file, image, device=device, force=force)
    options.done()
    if options.as_json:
        print_json(report.as_dict())
    else:
        say(options, f"{image}: {report.device}, {report.state_bytes} bytes of state: {report.layout}")
    for problem in report.problems:
        warn(f"{file}: {problem}")


@click.command("pack", short_help="Make an image of its parts, or put one into a QEMU stream.")
@click.argument("source", metavar="DIRECTORY|IMAGE", shell_complete=complete.file)
@click.argument("file", shell_complete=complete.file)
@click.option(
    "--into",
    metavar="STREAM",
    shell_complete=complete.file,
    help="Write FILE as this QEMU stream is, with IMAGE's state in the place of a VFIO device's own.",
)
@click.option(
    "--device",
    metavar="NAME",
    shell_complete=complete.stream_device,
    help="With --into: which device of STREAM, by its section's name, or vfio0, vfio1, …; may be left out if there is "
    "one only.",
)
@click.option("--force", is_flag=True, help="Replace an existing FILE.")
@click.pass_obj
def pack_command(
    options: Options, source: str, file: str, *, into: str | None, device: str | None, force: bool
) -> None:
    """Make the image FILE of what `extract` has written to DIRECTORY. It is verified before it gets its name.

    Checksums are computed anew, so what was changed in the files is in the image.

    With --into, FILE becomes a QEMU migration stream: STREAM, which QEMU has written of the same VM, with the state of
    IMAGE for one VFIO device. Guest memory, the other devices and what QEMU itself knows of this one stay as they are
    in STREAM, so both should be of the same moment of a paused VM. QEMU loads FILE with -incoming file:FILE.

    \b
    Examples:
      vfio-mig pack parts gpu.vfm
      vfio-mig pack gpu.vfm new.mig --into vm.mig --device 0000:00:03.0/vfio
    """
    if into is not None:
        _pack_stream(options, source, file, into, device, force=force)
        return
    if device is not None:
        raise UsageError("--device needs --into: it names a device of a QEMU stream")
    from vfio_mig.jobs.files.extract import pack_image

    report = pack_image(source, file, force=force)
    options.done()
    if options.as_json:
        print_json(report.as_dict())
    else:
        say(options, f"{file}: {report.members} members, {report.size} bytes")


def _pack_stream(options: Options, image: str, file: str, into: str, device: str | None, *, force: bool) -> None:
    from vfio_mig.jobs.files.qemu import pack_stream

    report = pack_stream(image, file, stream=into, device=device, force=force)
    options.done()
    if options.as_json:
        print_json(report.as_dict())
    else:
        sizes = f"{report.state_bytes} bytes of state instead of {report.old_state_bytes}"
        say(options, f"{file}: {report.size} bytes; {report.device} has {sizes}")
    for warning in report.warnings:
        warn(warning)


@click.command("diff", short_help="Say what differs between two saved devices.")
@click.argument("first", shell_complete=complete.file)
@click.argument("second", shell_complete=complete.file)
@click.option(
    "--exit-code", is_flag=True, help=f"Exit with {DIFFERENT} if they differ, as `git diff --exit-code` does."
)
@click.pass_obj
def diff_command(options: Options, first: str, second: str, *, exit_code: bool) -> None:
    """Say how the states of FIRST and SECOND (images or bare states, - is stdin) differ, and their memory.

    One line for each configuration field, register, run of page table entries, queued workload or run of pages:
    SECTION NAME [SIZE]: OLD -> NEW. No line means that nothing differs. Times, statistics and the device's name are
    not compared. The exit code is 0 either way, but for --exit-code.

    \b
    Example: what has a workload changed?
      vfio-mig diff before.vfm after.vfm
    """
    from vfio_mig.jobs.files.diff import diff_images

    report = diff_images(first, second)
    if options.as_json:
        print_json(report.as_dict())
    else:
        shown = dict.fromkeys(report.counts, 0)
        for one in report.differences:
            shown[one.section] += one.size // 4096 if one.section == "pages" else 1
            put(_difference_line(one))
        for section, count in report.counts.items():
            if count > shown[section]:
                put(f"{section} … {count - shown[section]} more")
    if exit_code and not report.equal:
        sys.exit(DIFFERENT)


def _difference_line(one: Difference) -> str:
    old, new = (_side(value, is_bitmap=one.section == "dirty") for value in (one.old, one.new))
    size = f" {one.size} bytes" if one.size > 8 else ""  # noqa: PLR2004 -- a register is not a run
    return f"{one.section} {one.name}{size}: {old} -> {new}"


def _side(value: object, *, is_bitmap: bool) -> str:
    from vfio_mig.cli.render import row, scalar

    if isinstance(value, dict):
        # Only a bitmap's are pairs of numbers: a header may have anything under any key
        ranges = [f"{start:#x}+{size}" for start, size in value["ranges"][:_ROWS]] if is_bitmap else []
        return "  ".join([part for part in (row(value), *ranges) if part]) or "-"
    return scalar("old", value)
