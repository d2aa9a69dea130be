# SPDX-License-Identifier: MIT
"""Stop, save and restore VFIO devices without a VMM in the way.

What the command line does, for Python programs, as objects::

    import vfio_mig

    with vfio_mig.Host().open("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001") as device:
        report = device.save("gpu.vfm", leave_running=True, on_event=print)
    vfio_mig.Image("gpu.vfm").verify()

or as functions, one for each command: ``vfio_mig.save(name, "gpu.vfm")``. Each returns a report or raises a subclass of
:class:`VfioMigError`. What the user must read is a :class:`VfioMigWarning`, unless ``Settings.warn`` takes it.
docs/python.md is the guide. Names are imported when they are first used, so ``import vfio_mig`` costs nothing.

Rooms, from the top down; each imports from those below it only, and its own docstring says what is in it:
``cli`` (parses and prints), ``library`` (the jobs as objects), ``vm`` (a QEMU around the device), ``conform`` (checks
of a driver), ``jobs`` (whole jobs with rollback), ``protocols`` (how a family of devices is stopped, read and loaded),
``host`` (finding and opening devices), ``device`` (an open one), ``pictures``, ``decode`` (what is in a saved state),
``image`` and ``dirty`` (bytes and files alone, no device), ``uapi`` (the kernel's words). Everywhere: ``errors``,
``interrupts`` (signals), ``closing``, ``ranges``, ``report``, ``threads``, ``version``, ``words``,
``proc`` (what /proc says of other processes). docs/concepts.md says what the words mean.
"""

from typing import TYPE_CHECKING, Any

from vfio_mig.version import __version__ as __version__

if TYPE_CHECKING:
    from vfio_mig.conform.runner import ConformReport as ConformReport
    from vfio_mig.conform.runner import conform_device as conform_device
    from vfio_mig.dirty.memory import MemoryMap as MemoryMap
    from vfio_mig.dirty.ranges import PageRange as PageRange
    from vfio_mig.errors import DeviceBusyError as DeviceBusyError
    from vfio_mig.errors import DeviceError as DeviceError
    from vfio_mig.errors import DeviceNotFoundError as DeviceNotFoundError
    from vfio_mig.errors import HostError as HostError
    from vfio_mig.errors import ImageError as ImageError
    from vfio_mig.errors import InterruptedJobError as InterruptedJobError
    from vfio_mig.errors import MismatchError as MismatchError
    from vfio_mig.errors import OpenError as OpenError
    from vfio_mig.errors import UnsupportedError as UnsupportedError
    from vfio_mig.errors import UsageError as UsageError
    from vfio_mig.errors import VfioMigError as VfioMigError
    from vfio_mig.errors import VfioMigWarning as VfioMigWarning
    from vfio_mig.host import mdev
    from vfio_mig.jobs.check import CheckReport as CheckReport
    from vfio_mig.jobs.check import VerifyReport as VerifyReport
    from vfio_mig.jobs.check import check_image as check_image
    from vfio_mig.jobs.check import verify_image as verify_image
    from vfio_mig.jobs.control import ActionReport as ActionReport
    from vfio_mig.jobs.control import StateReport as StateReport
    from vfio_mig.jobs.control import StatusReport as StatusReport
    from vfio_mig.jobs.control import device_state as device_state
    from vfio_mig.jobs.control import device_status as device_status
    from vfio_mig.jobs.control import reset_device as reset_device
    from vfio_mig.jobs.control import start_device as start_device
    from vfio_mig.jobs.control import start_devices as start_devices
    from vfio_mig.jobs.control import stop_device as stop_device
    from vfio_mig.jobs.control import stop_devices as stop_devices
    from vfio_mig.jobs.dirty import DirtyReport as DirtyReport
    from vfio_mig.jobs.dirty import fetch_dirty as fetch_dirty
    from vfio_mig.jobs.engine import session
    from vfio_mig.jobs.engine.live import Live as Live
    from vfio_mig.jobs.engine.session import Session as Session
    from vfio_mig.jobs.engine.session import Settings as Settings
    from vfio_mig.jobs.files.diff import DiffReport as DiffReport
    from vfio_mig.jobs.files.diff import diff_images as diff_images
    from vfio_mig.jobs.files.extract import ExtractReport as ExtractReport
    from vfio_mig.jobs.files.extract import PackReport as PackReport
    from vfio_mig.jobs.files.extract import extract_image as extract_image
    from vfio_mig.jobs.files.extract import pack_image as pack_image
    from vfio_mig.jobs.files.inspect import InspectReport as InspectReport
    from vfio_mig.jobs.files.inspect import inspect_image as inspect_image
    from vfio_mig.jobs.files.pages import PagesReport as PagesReport
    from vfio_mig.jobs.files.pages import load_pages as load_pages
    from vfio_mig.jobs.files.qemu import DeviceExtractReport as DeviceExtractReport
    from vfio_mig.jobs.files.qemu import StreamPackReport as StreamPackReport
    from vfio_mig.jobs.files.qemu import extract_device as extract_device
    from vfio_mig.jobs.files.qemu import pack_stream as pack_stream
    from vfio_mig.jobs.hold import HoldReport as HoldReport
    from vfio_mig.jobs.hold import hold_device as hold_device
    from vfio_mig.jobs.hold import hold_devices as hold_devices
    from vfio_mig.jobs.migrate import MigrateReport as MigrateReport
    from vfio_mig.jobs.migrate import migrate as migrate
    from vfio_mig.jobs.queries.devices import DeviceInfo as DeviceInfo
    from vfio_mig.jobs.queries.devices import DeviceRow as DeviceRow
    from vfio_mig.jobs.queries.devices import device_info as device_info
    from vfio_mig.jobs.queries.devices import list_devices as list_devices
    from vfio_mig.jobs.queries.doctor import DoctorReport as DoctorReport
    from vfio_mig.jobs.queries.doctor import examine_host as examine_host
    from vfio_mig.jobs.queries.host_report import HostReport as HostReport
    from vfio_mig.jobs.queries.host_report import report_host as report_host
    from vfio_mig.jobs.restore import RestoreReport as RestoreReport
    from vfio_mig.jobs.restore import restore as restore
    from vfio_mig.jobs.restore import restore_all as restore_all
    from vfio_mig.jobs.save import SaveReport as SaveReport
    from vfio_mig.jobs.save import save as save
    from vfio_mig.jobs.save import save_all as save_all
    from vfio_mig.jobs.sync import SyncReport as SyncReport
    from vfio_mig.jobs.sync import sync_dirty as sync_dirty
    from vfio_mig.library import Device as Device
    from vfio_mig.library import Event as Event
    from vfio_mig.library import Host as Host
    from vfio_mig.library import Image as Image
    from vfio_mig.vm.named import VmRestoreReport as VmRestoreReport
    from vfio_mig.vm.named import VmSaveReport as VmSaveReport
    from vfio_mig.vm.named import restore_vm as restore_vm
    from vfio_mig.vm.named import save_vm as save_vm
    from vfio_mig.vm.survey import VmRow as VmRow
    from vfio_mig.vm.survey import list_vms as list_vms

    create_mdev = mdev.create
    mdev_types = mdev.types
    open_device = session.open_session
    remove_mdev = mdev.remove

_HOMES = {
    "conform.runner": ("ConformReport", "conform_device"),
    "dirty.memory": ("MemoryMap",),
    "dirty.ranges": ("PageRange",),
    "errors": (
        "DeviceBusyError",
        "DeviceError",
        "DeviceNotFoundError",
        "HostError",
        "ImageError",
        "InterruptedJobError",
        "MismatchError",
        "OpenError",
        "UnsupportedError",
        "UsageError",
        "VfioMigError",
        "VfioMigWarning",
    ),
    "host.mdev": ("create_mdev", "mdev_types", "remove_mdev"),
    "jobs.check": ("CheckReport", "VerifyReport", "check_image", "verify_image"),
    "jobs.control": (
        "ActionReport",
        "StateReport",
        "StatusReport",
        "device_state",
        "device_status",
        "reset_device",
        "start_device",
        "start_devices",
        "stop_device",
        "stop_devices",
    ),
    "jobs.dirty": ("DirtyReport", "fetch_dirty"),
    "jobs.engine.live": ("Live",),
    "jobs.engine.session": ("Session", "Settings", "open_device"),
    "jobs.files.diff": ("DiffReport", "diff_images"),
    "jobs.files.extract": ("ExtractReport", "PackReport", "extract_image", "pack_image"),
    "jobs.files.inspect": ("InspectReport", "inspect_image"),
    "jobs.files.pages": ("PagesReport", "load_pages"),
    "jobs.files.qemu": ("DeviceExtractReport", "StreamPackReport", "extract_device", "pack_stream"),
    "jobs.hold": ("HoldReport", "hold_device", "hold_devices"),
    "jobs.migrate": ("MigrateReport", "migrate"),
    "jobs.queries.devices": ("DeviceInfo", "DeviceRow", "device_info", "list_devices"),
    "jobs.queries.doctor": ("DoctorReport", "examine_host"),
    "jobs.queries.host_report": ("HostReport", "report_host"),
    "jobs.restore": ("RestoreReport", "restore", "restore_all"),
    "jobs.save": ("SaveReport", "save", "save_all"),
    "jobs.sync": ("SyncReport", "sync_dirty"),
    "library": ("Device", "Event", "Host", "Image"),
    "vm.named": ("VmRestoreReport", "VmSaveReport", "restore_vm", "save_vm"),
    "vm.survey": ("VmRow", "list_vms"),
}
"""Where each public name is defined; a test compares it with what type checkers are told above."""
_THERE = {"create_mdev": "create", "mdev_types": "types", "open_device": "open_session", "remove_mdev": "remove"}
"""Names that are others where they are defined."""

__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"vfio_mig.{module}"), _THERE.get(name, name))
    raise AttributeError(f"module 'vfio_mig' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
