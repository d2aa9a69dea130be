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
    from vfio_mig.conform.runner import (
        ConformReport,
        conform_device,
    )
    from vfio_mig.dirty.memory import MemoryMap
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.errors import (
        DeviceBusyError,
        DeviceError,
        DeviceNotFoundError,
        HostError,
        ImageError,
        InterruptedJobError,
        MismatchError,
        OpenError,
        UnsupportedError,
        UsageError,
        VfioMigError,
        VfioMigWarning,
    )
    from vfio_mig.host.mdev import create as create_mdev
    from vfio_mig.host.mdev import remove as remove_mdev
    from vfio_mig.host.mdev import types as mdev_types
    from vfio_mig.jobs.check import (
        CheckReport,
        VerifyReport,
        check_image,
        verify_image,
    )
    from vfio_mig.jobs.control import (
        ActionReport,
        StateReport,
        StatusReport,
        device_state,
        device_status,
        reset_device,
        start_device,
        start_devices,
        stop_device,
        stop_devices,
    )
    from vfio_mig.jobs.dirty import (
        DirtyReport,
        SyncReport,
        fetch_dirty,
        sync_dirty,
    )
    from vfio_mig.jobs.engine.live import Live
    from vfio_mig.jobs.engine.session import Session, Settings
    from vfio_mig.jobs.engine.session import open_session as open_device
    from vfio_mig.jobs.files.diff import (
        DiffReport,
        diff_images,
    )
    from vfio_mig.jobs.files.extract import (
        ExtractReport,
        PackReport,
        extract_image,
        pack_image,
    )
    from vfio_mig.jobs.files.inspect import (
        InspectReport,
        inspect_image,
    )
    from vfio_mig.jobs.files.pages import (
        PagesReport,
        load_pages,
    )
    from vfio_mig.jobs.hold import hold_device
    from vfio_mig.jobs.migrate import (
        MigrateReport,
        migrate,
    )
    from vfio_mig.jobs.queries.devices import (
        DeviceInfo,
        DeviceRow,
        device_info,
        list_devices,
    )
    from vfio_mig.jobs.queries.doctor import (
        DoctorReport,
        examine_host,
    )
    from vfio_mig.jobs.restore import (
        RestoreReport,
        restore,
        restore_all,
    )
    from vfio_mig.jobs.save import (
        SaveReport,
        save,
        save_all,
    )
    from vfio_mig.library import (
        Device,
        Event,
        Host,
        Image,
    )

_MODULES = {
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
    "jobs.files.diff": ("DiffReport", "diff_images"),
    "jobs.dirty": ("DirtyReport", "SyncReport", "fetch_dirty", "sync_dirty"),
    "jobs.queries.doctor": ("DoctorReport", "examine_host"),
    "jobs.hold": ("hold_device",),
    "jobs.queries.devices": ("DeviceInfo", "DeviceRow", "device_info", "list_devices"),
    "jobs.files.inspect": ("InspectReport", "inspect_image"),
    "jobs.engine.live": ("Live",),
    "jobs.migrate": ("MigrateReport", "migrate"),
    "jobs.files.pages": ("PagesReport", "load_pages"),
    "jobs.files.extract": ("ExtractReport", "PackReport", "extract_image", "pack_image"),
    "jobs.restore": ("RestoreReport", "restore", "restore_all"),
    "jobs.save": ("SaveReport", "save", "save_all"),
    "jobs.engine.session": ("Session", "Settings", "open_device"),
    "library": ("Device", "Event", "Host", "Image"),
}
_RENAMED = {
    "create_mdev": "create",
    "mdev_types": "types",
    "open_device": "open_session",
    "remove_mdev": "remove",
}

__all__ = [
    "ActionReport",
    "CheckReport",
    "ConformReport",
    "Device",
    "DeviceBusyError",
    "DeviceError",
    "DeviceInfo",
    "DeviceNotFoundError",
    "DeviceRow",
    "DiffReport",
    "DirtyReport",
    "DoctorReport",
    "Event",
    "ExtractReport",
    "Host",
    "HostError",
    "Image",
    "ImageError",
    "InspectReport",
    "InterruptedJobError",
    "Live",
    "MemoryMap",
    "MigrateReport",
    "MismatchError",
    "OpenError",
    "PackReport",
    "PageRange",
    "PagesReport",
    "RestoreReport",
    "SaveReport",
    "Session",
    "Settings",
    "StateReport",
    "StatusReport",
    "SyncReport",
    "UnsupportedError",
    "UsageError",
    "VerifyReport",
    "VfioMigError",
    "VfioMigWarning",
    "check_image",
    "conform_device",
    "create_mdev",
    "device_info",
    "device_state",
    "device_status",
    "diff_images",
    "examine_host",
    "extract_image",
    "fetch_dirty",
    "hold_device",
    "inspect_image",
    "list_devices",
    "load_pages",
    "mdev_types",
    "migrate",
    "open_device",
    "pack_image",
    "remove_mdev",
    "reset_device",
    "restore",
    "restore_all",
    "save",
    "save_all",
    "start_device",
    "start_devices",
    "stop_device",
    "stop_devices",
    "sync_dirty",
    "verify_image",
]


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"vfio_mig.{module}"), _RENAMED.get(name, name))
    raise AttributeError(f"module 'vfio_mig' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
