# SPDX-License-Identifier: MIT
"""The same jobs for Python programs: a host, its devices, and images, as objects.

Each method is one function of the package with the device or file filled in. The functions stay, for people who prefer
them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from vfio_mig.closing import Closing
from vfio_mig.errors import UsageError
from vfio_mig.jobs.engine.session import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Unpack

    from vfio_mig.conform.runner import ConformReport
    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.dirty.sync import Round
    from vfio_mig.host.mdev import MdevType
    from vfio_mig.jobs.check import CheckReport, VerifyReport
    from vfio_mig.jobs.control import ActionReport, StateReport, StatusReport
    from vfio_mig.jobs.dirty import DirtyReport
    from vfio_mig.jobs.engine.live import Live
    from vfio_mig.jobs.engine.session import Session
    from vfio_mig.jobs.files.diff import DiffReport
    from vfio_mig.jobs.files.extract import ExtractReport
    from vfio_mig.jobs.files.inspect import InspectReport
    from vfio_mig.jobs.files.pages import PagesReport
    from vfio_mig.jobs.files.qemu import DeviceExtractReport, StreamPackReport
    from vfio_mig.jobs.migrate import MigrateReport
    from vfio_mig.jobs.queries.devices import DeviceInfo, DeviceRow
    from vfio_mig.jobs.queries.doctor import DoctorReport
    from vfio_mig.jobs.restore import RestoreReport
    from vfio_mig.jobs.save import SaveReport
    from vfio_mig.jobs.sync import SyncReport

    OnEvent = Callable[["Event"], object]
    """Called at each step of a job; an exception ends the job, and what it has done is undone."""


class Event(NamedTuple):
    """A step of a job; docs/scripting.md has the table of jobs and steps."""

    job: str
    step: str
    device: str


class _Copied(TypedDict, total=False):
    """What every job that copies guest memory takes; see :func:`vfio_mig.save`."""

    memory: Sequence[MemoryMap]
    ranges: Sequence[PageRange]
    all_memory: bool
    guest_paused: bool
    strict: bool


class SaveOptions(_Copied, total=False):
    """What :meth:`Device.save` takes; see :func:`vfio_mig.save`."""

    leave_running: bool
    raw: bool
    force: bool
    live: Live | None
    pinned: bool


class SyncOptions(_Copied, total=False):
    """What :meth:`Device.sync` takes; see :func:`vfio_mig.sync_dirty`."""

    rounds: int | None
    max_downtime: float | None
    leave_running: bool
    progress: Callable[[Round], object]
    copied: Callable[[int], object]


class MigrateOptions(_Copied, total=False):
    """What :meth:`Device.migrate` takes; see :func:`vfio_mig.migrate`."""

    target_memory: Sequence[str]
    start: bool
    live: Live | None
    rsh: Sequence[str]
    force: bool
    no_memory: bool


class RestoreOptions(TypedDict, total=False):
    """What :meth:`Device.restore` takes; see :func:`vfio_mig.restore`."""

    memory: Sequence[MemoryMap]
    start: bool
    raw: bool
    force: bool
    verify_state: bool
    no_memory: bool
    progress: Callable[[int], object]


class Device(Closing):
    """An open device of a host, from :meth:`Host.open`; it stays open, and keeps its state, until the block ends.

    Every method raises a :class:`vfio_mig.VfioMigError` where the function that it stands for does, and returns that
    function's report. *on_event* is called with an :class:`Event` at each step.
    """

    def __init__(self, session: Session, settings: Settings) -> None:
        self._session = session
        self._settings = settings
        self.name = session.device.name
        """As ``vfio-mig list`` has it: an mdev's UUID, a PCI address."""

    def close(self) -> None:
        """Give the device back; if nobody else has it open it is reset, or restarts. A second call does nothing."""
        self._session.close()

    @property
    def protocol(self) -> str:
        """Name of the protocol that drives it: ``mainline-v2``, ``gvt-rfc``."""
        return self._session.protocol.name

    def describe(self) -> str:
        """Say in one sentence how the device was reached and what drives it."""
        return self._session.describe()

    def _with(self, on_event: OnEvent | None) -> Settings:
        if on_event is None:
            return self._settings
        return self._settings._replace(on_step=lambda *step: on_event(Event(*step)))

    def info(self) -> DeviceInfo:
        """Tell regions, and what speaks for and against its protocols."""
        from vfio_mig.jobs.queries.devices import device_info

        return device_info(self.name, self._settings)

    def status(self) -> StatusReport:
        """Tell who has it open, its state, and what an earlier job has left behind."""
        from vfio_mig.jobs.control import device_status

        return device_status(self.name, self._settings)

    def state(self, new: str | None = None) -> StateReport:
        """Return the migration state of a v2 device, after going to *new*."""
        from vfio_mig.jobs.control import device_state

        return device_state(self.name, self._settings, new=new)

    def stop(self, *, on_event: OnEvent | None = None) -> ActionReport:
        """Let the running work finish, and stop the device."""
        from vfio_mig.jobs.control import stop_device

        return stop_device(self.name, self._with(on_event))

    def start(self, *, force: bool = False, on_event: OnEvent | None = None) -> ActionReport:
        """Let the device go on."""
        from vfio_mig.jobs.control import start_device

        return start_device(self.name, self._with(on_event), force=force)

    def reset(self, *, force: bool = False, on_event: OnEvent | None = None) -> ActionReport:
        """Reset the device: its state is lost."""
        from vfio_mig.jobs.control import reset_device

        return reset_device(self.name, self._with(on_event), force=force)

    def dirty(
        self,
        *,
        memory: Sequence[MemoryMap] = (),
        ranges: Sequence[PageRange] = (),
        list_ranges: bool = False,
        log_time: float | None = None,
        on_event: OnEvent | None = None,
    ) -> DirtyReport:
        """Fetch the dirty bitmap."""
        from vfio_mig.jobs.dirty import fetch_dirty

        return fetch_dirty(
            self.name,
            self._with(on_event),
            memory=memory,
            ranges=ranges,
            list_ranges=list_ranges,
            log_time=log_time,
        )

    def sync(
        self, file: str | os.PathLike[str], *, on_event: OnEvent | None = None, **options: Unpack[SyncOptions]
    ) -> SyncReport:
        """Copy the guest's dirty pages to a file, in rounds while the device runs, the last one while it is stopped."""
        from vfio_mig.jobs.sync import sync_dirty

        if not options.get("memory"):
            raise UsageError("there is no guest memory to copy", hint="name it with memory=[MemoryMap(…)]")
        return sync_dirty(self.name, os.fspath(file), self._with(on_event), **options)

    def save(
        self, file: str | os.PathLike[str], *, on_event: OnEvent | None = None, **options: Unpack[SaveOptions]
    ) -> SaveReport:
        """Stop the device and save its state, and the guest pages that it may have written."""
        from vfio_mig.jobs.save import save

        return save(self.name, os.fspath(file), self._with(on_event), **options)

    def restore(
        self, file: str | os.PathLike[str], *, on_event: OnEvent | None = None, **options: Unpack[RestoreOptions]
    ) -> RestoreReport:
        """Load an image that was verified first; the device stays stopped unless *start* is set."""
        from vfio_mig.jobs.restore import restore

        return restore(self.name, os.fspath(file), self._with(on_event), **options)

    def migrate(
        self, target: str, *, on_event: OnEvent | None = None, **options: Unpack[MigrateOptions]
    ) -> MigrateReport:
        """Move the state to another device: a name on this host, or ``ssh://HOST/NAME``."""
        from vfio_mig.jobs.migrate import migrate

        return migrate(self.name, target, self._with(on_event), **options)

    def check(self, file: str | os.PathLike[str], *, raw: bool = False) -> CheckReport:
        """Tell whether an image fits this device, without touching its state."""
        from vfio_mig.jobs.check import check_image

        return check_image(self.name, os.fspath(file), self._settings, raw=raw)

    def conform(self, *, checks: Sequence[str] = (), dangerous: bool = False) -> ConformReport:
        """Check its driver against the rules of the kernel's header; its state is lost."""
        from vfio_mig.conform.runner import conform_device

        return conform_device(self.name, self._settings, checks=checks, dangerous=dangerous)


class Host:
    """A host, and how its devices are reached.

    :param settings: the protocol to accept, the process to borrow from, who takes warnings; see
        :class:`vfio_mig.Settings`.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()

    def devices(self) -> list[DeviceRow]:
        """Return all VFIO devices with who has them open; opens none."""
        from vfio_mig.jobs.queries.devices import list_devices

        return list_devices()

    def open(self, name: str, *, memory: Sequence[MemoryMap] = ()) -> Device:
        """Open a device for a ``with`` block, or borrow it from the process that has it open.

        :param name: any of its names.
        :param memory: guest memory, mapped for DMA where we open the device ourselves.
        :raises OpenError: there is no such device, or it cannot be opened.
        :raises UnsupportedError: it speaks no protocol of ours.
        """
        from vfio_mig.jobs.engine.session import open_session

        return Device(open_session(name, self._settings, memory=memory), self._settings)

    def doctor(self) -> DoctorReport:
        """Look for what this host lacks."""
        from vfio_mig.jobs.queries.doctor import examine_host

        return examine_host(self._settings)

    def mdev_types(self) -> list[MdevType]:
        """Return every type of mdev that can be made here."""
        from vfio_mig.host.mdev import types

        return types()

    def create_mdev(self, type_name: str, *, parent: str | None = None, uuid: str | None = None) -> str:
        """Make an mdev, and return its UUID."""
        from vfio_mig.host.mdev import create

        return create(type_name, parent=parent, uuid=uuid)

    def remove_mdev(self, uuid: str) -> None:
        """Remove an mdev that nobody has open."""
        from vfio_mig.host.mdev import remove

        remove(uuid)


class Image:
    """A saved device in a file; every method reads it anew.

    :param file: an image, or with *raw* a bare state.
    """

    def __init__(self, file: str | os.PathLike[str], *, raw: bool = False) -> None:
        self.file = os.fspath(file)
        self._raw = raw

    def verify(self) -> VerifyReport:
        """Verify every digest, and the state where its layout is known.

        :raises ImageError: anything is wrong; the message names member or offset.
        """
        from vfio_mig.jobs.check import verify_image

        return verify_image(self.file, raw=self._raw)

    def inspect(self) -> InspectReport:
        """Say what is in it; a QEMU stream will do, too."""
        from vfio_mig.jobs.files.inspect import inspect_image

        return inspect_image(self.file)

    def diff(self, other: Image | str | os.PathLike[str]) -> DiffReport:
        """Compare it with another one."""
        from vfio_mig.jobs.files.diff import diff_images

        return diff_images(self.file, other.file if isinstance(other, Image) else os.fspath(other))

    def extract(self, directory: str | os.PathLike[str]) -> ExtractReport:
        """Take it apart into an empty directory."""
        from vfio_mig.jobs.files.extract import extract_image

        return extract_image(self.file, os.fspath(directory))

    def extract_device(
        self, image: str | os.PathLike[str], *, device: str | None = None, force: bool = False
    ) -> DeviceExtractReport:
        """Make an image of a VFIO device in it; it is a QEMU stream."""
        from vfio_mig.jobs.files.qemu import extract_device

        return extract_device(self.file, os.fspath(image), device=device, force=force)

    def pack_into(
        self,
        stream: str | os.PathLike[str],
        file: str | os.PathLike[str],
        *,
        device: str | None = None,
        force: bool = False,
    ) -> StreamPackReport:
        """Make the QEMU stream *file* of another one, *stream*, in which a device has this image's state."""
        from vfio_mig.jobs.files.qemu import pack_stream

        return pack_stream(self.file, os.fspath(file), stream=os.fspath(stream), device=device, force=force)

    def pages(self, memory: Sequence[MemoryMap]) -> PagesReport:
        """Write its guest pages, and nothing else, into guest memory."""
        from vfio_mig.jobs.files.pages import load_pages

        return load_pages(self.file, memory=memory)
