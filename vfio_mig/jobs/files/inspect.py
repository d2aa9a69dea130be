# SPDX-License-Identifier: MIT
"""Look inside a saved device: what it is, and what its state says where the layout is known. No device is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.errors import UsageError, printable
from vfio_mig.jobs.files.open_file import open_saved
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.decode.qemu_parts import QemuStream
    from vfio_mig.decode.section import Decoded, Section
    from vfio_mig.image.archive import Archive
    from vfio_mig.image.bytesource import ByteSource
    from vfio_mig.jobs.files.open_file import Saved

_NAMES_MAX: Final = 40
"""Names of sections that a message lists."""


@dataclass(frozen=True, kw_only=True)
class InspectReport(Report):
    """What is in a file. Sizes in bytes, addresses as integers.

    :param kind: ``image``, ``state`` (bare) or ``qemu-stream``.
    :param header: what the image's header says, as its members and statistics None for another kind.
    :param members: ``name size sha256`` each; of the first 1000.
    :param pages: of guest memory, 4096 bytes each, those of zeros among them; None for another kind.
    :param layout: of the state: ``gvt-rfc``, ``gvt_sample``, ``mtty``, ``mlx5``, ``hisi_acc``, ``qat``, ``xe``,
        ``virtio``, ``mlx5-or-virtio`` (the same records), ``qemu``, or ``unknown``.
    :param sections: the state's parts, decoded.
    :param problems: what is broken or unusual; the file can be looked at all the same.
    :param wrapping: what was taken away first, from the outside: ``gzip``, ``bzip2``, ``xz``,
        ``libvirt-save`` (its header), ``offset`` (a hole before a QEMU stream).
    """

    file: str
    kind: str
    size: int
    state_bytes: int
    header: dict[str, Any] | None
    members: dict[str, Any] | None
    pages: int | None
    statistics: dict[str, Any] | None
    layout: str
    sections: list[Section]
    problems: list[str]
    wrapping: list[str]


class SectionBytes(NamedTuple):
    """A section's bytes.

    :param offset: of the first in the state.
    """

    file: str
    section: str
    offset: int
    size: int
    content: bytes


class _Content(NamedTuple):
    """A decoded state, and where the bytes of each section are."""

    decoded: Decoded
    sources: list[ByteSource]
    state_bytes: int


def _look(saved: Saved) -> _Content:
    from vfio_mig.decode import streams
    from vfio_mig.image.guestpages import GuestPages

    if saved.stream is not None:
        return _look_at_stream(saved, saved.stream)
    if saved.archive is None:
        decoded = streams.decode(saved.source)
    else:
        decoded = streams.decode(saved.source, GuestPages(saved.archive).page, driver=saved.driver)
    return _Content(decoded, [saved.source] * len(decoded.sections), saved.source.size)


def _look_at_stream(saved: Saved, stream: QemuStream) -> _Content:
    """Decode every VFIO device of a QEMU stream; its sections have ``vfioN.`` in front of their names."""
    from vfio_mig.decode import qemu_parts, streams
    from vfio_mig.decode.section import LISTED_MAX, Decoded, Section
    from vfio_mig.image.bytesource import PartSource, PiecesSource

    source = saved.source
    sections: list[Section] = list(stream.sections())
    if saved.libvirt is not None:
        sections.append(Section("libvirt", 0, 0, saved.libvirt.values()))
    sources: list[ByteSource] = [source] * len(sections)
    problems = list(stream.problems)
    for number, device in enumerate(stream.devices[:LISTED_MAX]):
        state = PiecesSource(source, device.frames)
        decoded = streams.decode(state)
        values = {
            "name": device.name,
            "instance": device.instance,
            "section": device.section,
            "state_bytes": state.size,
            "frames": len(device.frames),
            "complete": device.problem is None,
            "layout": decoded.layout,
        }
        found = [Section("device", 0, state.size, values), *decoded.sections]
        places: list[ByteSource] = [state] * len(found)
        if device.config is not None:
            part = PartSource(source, *device.config)
            found.append(Section("config", 0, part.size, qemu_parts.device_config(part.read(0, part.size))))
            places.append(part)
        sections += [section._replace(name=f"vfio{number}.{section.name}") for section in found]
        sources += places
        own = [] if device.problem is None else [device.problem]
        problems += [f"vfio{number}: {problem}" for problem in (*own, *decoded.problems)]
    return _Content(Decoded("qemu", sections, problems), sources, sum(device.state_size for device in stream.devices))


def problems_of(saved: Saved) -> list[str]:
    """Return what is broken or unusual in a saved device: every command that looks into one says the same of it."""
    return [printable(problem) for problem in _look(saved).decoded.problems]


def _members(archive: Archive) -> dict[str, Any]:
    from vfio_mig.decode.section import LISTED_MAX, listed

    return listed([member.entry() for member in archive.members[:LISTED_MAX]], len(archive.members))


def inspect_image(file: str) -> InspectReport:
    """Look into an image, a bare state, or a QEMU migration stream; ``-`` is standard input.

    A state that is broken is shown as far as it goes, with the reason in *problems*.

    :raises ImageError: an image or a QEMU stream that is not whole.
    :raises HostError: the file cannot be read.
    """
    from vfio_mig.decode.section import plain

    with open_saved(file) as saved:
        content = _look(saved)
        archive = saved.archive
        return InspectReport(
            file=file,
            kind=saved.kind,
            size=saved.size,
            state_bytes=content.state_bytes,
            header=None if archive is None else plain(archive.header),
            members=None if archive is None else _members(archive),
            pages=None if archive is None else archive.count_pages(),
            statistics=None if archive is None else plain(archive.statistics),
            layout=content.decoded.layout,
            sections=content.decoded.sections,
            problems=[printable(problem) for problem in content.decoded.problems],
            wrapping=saved.wrapping,
        )


def choose_section(report: InspectReport, name: str) -> Section:
    """Return one section of a report, or ``image.header``, ``image.members``, ``image.statistics``.

    :raises UsageError: it has no such section; the hint names those that it has.
    """
    sections = [*image_sections(report), *report.sections]
    for section in sections:
        if section.name == name:
            return section
    raise _no_section(report.file, name, sections)


def image_sections(report: InspectReport) -> list[Section]:
    """Return what an image has beside the state, as sections without bytes of their own; none of another kind."""
    from vfio_mig.decode.section import Section

    members = None if report.members is None else {"members": report.members}
    parts = {"header": report.header, "members": members, "statistics": report.statistics}
    return [Section(f"image.{name}", 0, 0, values) for name, values in parts.items() if values is not None]


def _no_section(file: str, name: str, sections: list[Section]) -> UsageError:
    names = [section.name for section in sections]
    more = "…" if len(names) > _NAMES_MAX else ""
    return UsageError(f"{file} has no section {name!r}", hint=f"it has {', '.join(names[:_NAMES_MAX])}{more}")


def section_bytes(
    file: str, name: str, step: int = 1 << 20, problems: list[str] | None = None
) -> Iterator[SectionBytes]:
    """Yield the bytes of one section, at most *step* at a time: an empty one for a section without any.

    :param problems: takes what :func:`inspect_image` would report as such.
    :raises UsageError: there is no such section.
    """
    with open_saved(file) as saved:
        content = _look(saved)
        names = [section.name for section in content.decoded.sections]
        if problems is not None:
            problems += map(printable, content.decoded.problems)
        if name not in names:
            raise _no_section(file, name, content.decoded.sections)
        section, source = content.decoded.sections[names.index(name)], content.sources[names.index(name)]
        for at in range(0, max(1, section.size), step):
            piece = source.read(section.offset + at, min(step, section.size - at))
            yield SectionBytes(file, name, section.offset + at, section.size, piece)
