# SPDX-License-Identifier: MIT
"""The 2017 RFC with guest memory mapped and work queued: what a vGPU is stopped, saved and restored for.

A driver may keep every rule of :mod:`vfio_mig.conform.rfc` and lose each workload that its guest has queued.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import RFC, Checks
from vfio_mig.conform.kit.gvt_guest import RESULT_GPA, GvtGuest, OwnMemory
from vfio_mig.conform.kit.verdict import require
from vfio_mig.decode import gvt_image as gvt

if TYPE_CHECKING:
    from vfio_mig.conform.kit.rig import Rig

WORK: Final = Checks("rfc.work", "cdefs/gvt_image.h, struct gvt_workload_entry", RFC)
VALUE: Final = 0x57A7_E001
A_WHILE: Final = 0.3
"""Seconds in which a device that is not stopped would have done the work."""


def _guest(rig: Rig) -> GvtGuest:
    """Open the device with guest memory, reset, and with a guest that has its engine on."""
    memory = OwnMemory()
    rig.reopen(memory=[memory])
    rig.rfc.reset()
    guest = GvtGuest(rig.rfc.kernel, rig.rfc.fd, rig.device.region(0), memory)
    guest.prepare()
    return guest


def _queued(rig: Rig, guest: GvtGuest, value: int = VALUE) -> bytes:
    """Stop the device, submit work, and read the region."""
    rig.rfc.stop()
    guest.submit(value)
    return rig.rfc.read()


def _entries(rig: Rig, region: bytes) -> int:
    view = memoryview(region)
    image = gvt.parse(view[: gvt.data_size_of(view, image_max=rig.rfc.profile.image_max)])
    return len(image.workloads)


@WORK.add("runs", "a device that runs does what its guest submits", "the guest's memory is written")
def _runs(rig: Rig) -> str:
    guest = _guest(rig)
    guest.submit(VALUE)
    require(guest.has_stored(VALUE), f"{guest.result():#x} in guest memory")
    return "written"


@WORK.add("waits", "what is submitted to a stopped device waits for START", "not written, then written")
def _waits(rig: Rig) -> str:
    guest = _guest(rig)
    rig.rfc.stop()
    guest.submit(VALUE)
    require(not guest.has_stored(VALUE, A_WHILE), "written while it was stopped")
    rig.rfc.start()
    require(guest.has_stored(VALUE), f"{guest.result():#x} in guest memory after START")
    return "not written, then written"


@WORK.add("dirty", "the page that the GPU is to write is dirty", "its bit")
def _dirty(rig: Rig) -> str:
    _guest(rig)
    rig.rfc.stop()
    bits = rig.rfc.dirty(RESULT_GPA, 1)
    require(bool(bits[0] & 1), f"no bit for {RESULT_GPA:#x}")
    return "its bit"


@WORK.add("saved", "queued work is in the image, and saving loses none of it", "1 entry, then written")
def _saved(rig: Rig) -> str:
    guest = _guest(rig)
    entries = _entries(rig, _queued(rig, guest))
    require(entries == 1, f"{entries} entries")
    rig.rfc.start()
    require(guest.has_stored(VALUE), f"{guest.result():#x} in guest memory after START")
    return "1 entry, then written"


@WORK.add("restored", "work that was queued is done after the restore", "written after START, not before")
def _restored(rig: Rig) -> str:
    guest = _guest(rig)
    region = _queued(rig, guest)
    rig.rfc.reset()
    rig.rfc.stop()
    rig.rfc.write(region)
    require(not guest.has_stored(VALUE, A_WHILE), "written while it was stopped")
    entries = _entries(rig, rig.rfc.read())
    require(entries == 1, f"{entries} entries in what it saves then")
    rig.rfc.start()
    require(guest.has_stored(VALUE), f"{guest.result():#x} in guest memory after START")
    return "written after START, not before"


@WORK.add("goes-on", "a guest whose device was restored goes on with it", "the next work is done, too")
def _goes_on(rig: Rig) -> str:
    guest = _guest(rig)
    region = _queued(rig, guest)
    rig.rfc.reset()
    rig.rfc.stop()
    rig.rfc.write(region)
    rig.rfc.start()
    require(guest.has_stored(VALUE), f"{guest.result():#x} in guest memory after START")
    guest.submit(VALUE + 1)
    require(guest.has_stored(VALUE + 1), f"{guest.result():#x} in guest memory after more work")
    return "the next work is done, too"


CHECKS: Final = [*WORK]
