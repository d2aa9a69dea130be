# SPDX-License-Identifier: MIT
"""The 2017 RFC: status, dirty bitmap and state region.

Its text is three structs and a cover letter; the rules are what its trees do, and where they differ, or fail, what its
own structs can mean.
"""

from __future__ import annotations

import errno
import random
import struct
from typing import TYPE_CHECKING, Final

from vfio_mig.conform.kit.check import RFC, Checks
from vfio_mig.conform.kit.rfc_device import STATUS
from vfio_mig.conform.kit.rig import first_difference
from vfio_mig.conform.kit.verdict import Deviation, NotApplicable, require
from vfio_mig.conform.v2.feature import refusal
from vfio_mig.decode import gvt_image as gvt
from vfio_mig.device import MMAP, READ, WRITE
from vfio_mig.errors import ImageError
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from vfio_mig.conform.kit.rfc_device import Rfc
    from vfio_mig.conform.kit.rig import Rig

_STRUCTS: Final = "cdefs/gvt_rfc.h"
INFO: Final = Checks("rfc.info", f"{_STRUCTS}, VFIO_DEVICE_FLAGS_MIGRATABLE", RFC)
STATUS_CHECKS: Final = Checks("rfc.status", f"{_STRUCTS}, struct vfio_pci_status_set", RFC)
DIRTY: Final = Checks("rfc.dirty", f"{_STRUCTS}, struct vfio_pci_get_dirty_bitmap", RFC)
STATE: Final = Checks("rfc.state", f"{_STRUCTS}, VFIO_PCI_DEVICE_STATE_REGION_INDEX; cdefs/gvt_image.h", RFC)
ENDS: Final = Checks("rfc", "VFIO_DEVICE_RESET; the RFC's trees: a vGPU runs once it is open", RFC)

BAD_FLAGS: Final = (errno.EINVAL, errno.EFAULT)
FAR: Final = 1 << 40
"""An address at which no guest has memory."""
PAGES_MAX: Final = 1 << 20
"""Pages of one request that every tree answers; they count in a signed 32-bit number and allocate unchecked."""
GUARD: Final = 64
_FILL: Final = 0xA5
_HEAD: Final = struct.Struct("<IIii")  # gvt_region, then version and data_size of gvt_image_header
_DATA_SIZE_AT: Final = 12
_PCI: Final = 2


# --- what is there


@INFO.add("flags", "the device is a PCI one, and MIGRATABLE", "both flags")
def _flags(rig: Rig) -> str:
    flags, needed = rig.device.info().flags, rig.rfc.profile.migratable_flag | _PCI
    require(flags & needed == needed, f"flags {flags:#x}")
    return f"flags {flags:#x}"


@INFO.add("region", "the state region can be read and written, not mapped, and has no type", "9 MiB, rw-, no type")
def _region(rig: Rig) -> str:
    region, profile = rig.rfc.region, rig.rfc.profile
    kind = "no type" if region.type is None else f"type {region.type:#x}"
    seen = f"{region.size} bytes, {region.access}, {kind}"
    require(region.size == profile.image_max, seen)
    require(region.flags & (READ | WRITE | MMAP) == READ | WRITE, seen)
    require(region.type is None, seen)
    return seen


# --- STOP and START


@STATUS_CHECKS.add("stop", "STOP stops the device", "0")
def _stop(rig: Rig) -> str:
    rig.rfc.stop()
    return "0"


@STATUS_CHECKS.add("start", "START lets it go on", "0")
def _start(rig: Rig) -> str:
    rig.rfc.stop()
    rig.rfc.start()
    return "0"


@STATUS_CHECKS.add("stop-twice", "a second STOP changes nothing", "0, 0")
def _stop_twice(rig: Rig) -> str:
    rig.rfc.stop()
    rig.rfc.stop()
    return "0, 0"


@STATUS_CHECKS.add("start-twice", "a second START changes nothing", "0, 0")
def _start_twice(rig: Rig) -> str:
    rig.rfc.start()
    rig.rfc.start()
    return "0, 0"


@STATUS_CHECKS.add("no-flag", "without a flag it is refused", "EINVAL or EFAULT")
def _no_flag(rig: Rig) -> str:
    return refusal(lambda: rig.rfc.status(0), *BAD_FLAGS)


@STATUS_CHECKS.add("both-flags", "STOP and START exclude each other", "EINVAL or EFAULT")
def _both(rig: Rig) -> str:
    profile = rig.rfc.profile
    return refusal(lambda: rig.rfc.status(profile.stop | profile.start), *BAD_FLAGS)


@STATUS_CHECKS.add("unknown-flag", "an unknown flag is refused", "EINVAL or EFAULT")
def _unknown(rig: Rig) -> str:
    refusal(lambda: rig.rfc.status(1 << 31), *BAD_FLAGS)
    return refusal(lambda: rig.rfc.status(1 << 31 | rig.rfc.profile.stop), *BAD_FLAGS)


@STATUS_CHECKS.add("short-argsz", "argsz smaller than the struct is refused", "EINVAL or EFAULT")
def _short(rig: Rig) -> str:
    rfc = rig.rfc
    refusal(lambda: rfc.status(rfc.profile.stop, argsz=0), *BAD_FLAGS)
    return refusal(lambda: rfc.status(rfc.profile.stop, argsz=STATUS.size - 1), *BAD_FLAGS)


@STATUS_CHECKS.add("long-argsz", "a larger argsz than needed is accepted", "0")
def _long(rig: Rig) -> str:
    rig.rfc.status(rig.rfc.profile.stop, argsz=64)
    return "0"


@STATUS_CHECKS.add("bad-pointer", "a struct that cannot be read is refused", "EFAULT")
def _status_pointer(rig: Rig) -> str:
    rfc = rig.rfc
    return refusal(lambda: rfc.kernel.ioctl(rfc.fd, rfc.profile.status_set, 8), errno.EFAULT)


# --- dirty pages


@DIRTY.add("one-page", "the bitmap of one page can be asked for", "0")
def _one(rig: Rig) -> str:
    rig.rfc.dirty(0, 1)
    return "0"


@DIRTY.add("no-page", "no page is a bitmap of one empty word", "0, no bits")
def _no_page(rig: Rig) -> str:
    require(not any(rig.rfc.dirty(0, 0)), "bits")
    return "0, no bits"


@DIRTY.add("most-pages", "2^20 pages can be asked for at once", "0")
def _most(rig: Rig) -> str:
    bits = int.from_bytes(rig.rfc.dirty(0, PAGES_MAX), "little").bit_count()
    return f"0, {bits} bits"


@DIRTY.add("no-memory", "where the guest has no memory nothing is dirty", "0, no bits")
def _no_memory(rig: Rig) -> str:
    bits = int.from_bytes(rig.rfc.dirty(FAR, 4096), "little").bit_count()
    require(not bits, f"{bits} bits")
    return "0, no bits"


def _stopped(rig: Rig) -> Rfc:
    rig.rfc.stop()
    return rig.rfc


@DIRTY.add("unaligned", "the low 12 bits of the address are ignored", "the same bits")
def _unaligned(rig: Rig) -> str:
    rfc = _stopped(rig)
    require(rfc.dirty(PAGE, 4096) == rfc.dirty(PAGE | 0x123, 4096), "other bits")
    return "the same bits"


@DIRTY.add("repeat", "asking clears nothing", "the same bits twice")
def _repeat(rig: Rig) -> str:
    rfc = _stopped(rig)
    require(rfc.dirty(0, PAGES_MAX) == rfc.dirty(0, PAGES_MAX), "other bits")
    return "the same bits twice"


@DIRTY.add("stopped", "a stopped device answers as well as one that runs", "0, 0")
def _dirty_stopped(rig: Rig) -> str:
    rig.rfc.dirty(0, 4096)
    rig.rfc.stop()
    rig.rfc.dirty(0, 4096)
    return "0, 0"


@DIRTY.add("overwrites", "what was in the buffer does not stay", "the same bits")
def _overwrites(rig: Rig) -> str:
    rfc = _stopped(rig)
    size = 4096 // 8
    require(rfc.dirty(0, 4096)[:size] == rfc.dirty(0, 4096, fill=0xFF)[:size], "bits of before")
    return "the same bits"


@DIRTY.add("overrun", "no more is written than the bitmap and one word", "the rest as it was")
def _overrun(rig: Rig) -> str:
    for pages in (0, 1, 63, 64, 65, 4096):
        written = rig.rfc.dirty(0, pages, fill=_FILL, room=GUARD)
        require(written[-GUARD:] == bytes([_FILL]) * GUARD, f"more, for {pages} pages")
    return "the rest as it was"


@DIRTY.add("tail", "bits behind the last page are 0", "0")
def _tail(rig: Rig) -> str:
    for pages in (1, 7, 63, 65, 4095):
        bits = int.from_bytes(rig.rfc.dirty(0, pages)[: -(-pages // 64) * 8], "little")
        require(not bits >> pages, f"bits, for {pages} pages")
    return "0"


@DIRTY.add("bad-pointer", "a struct that cannot be read is refused", "EFAULT")
def _dirty_pointer(rig: Rig) -> str:
    rfc = rig.rfc
    return refusal(lambda: rfc.kernel.ioctl(rfc.fd, rfc.profile.get_dirty, 8), errno.EFAULT)


@DIRTY.add("read-only", "a bitmap that cannot be written is refused", "EFAULT")
def _dirty_read_only(rig: Rig) -> str:
    return refusal(lambda: rig.rfc.dirty_into_read_only(64), errno.EFAULT)


# --- the state


def _without_noise(region: bytes) -> bytes:
    """Cut the image out, without what a kernel leaves uninitialised: HEAD's global data and PPGTT's padding."""
    size = _HEAD.unpack_from(region)[3]
    image = bytearray(region[:size])
    image[24 : gvt.HEAD_SIZE] = bytes(gvt.HEAD_SIZE - 24)
    return bytes(image)


@STATE.add("read", "one read of the whole region gives a whole image", "an image")
def _read(rig: Rig) -> str:
    region = _stopped(rig).read()
    require(len(region) == rig.rfc.region.size, f"{len(region)} bytes")
    try:
        view = memoryview(region)
        image = gvt.parse(view[: gvt.data_size_of(view, image_max=rig.rfc.profile.image_max)])
    except ImageError as error:
        raise Deviation(str(error)) from error
    return f"{image.data_size} bytes, {', '.join(image.records)}"


@STATE.add("read-offset", "a read at another place in the region is refused", "an error")
def _read_offset(rig: Rig) -> str:
    rfc = _stopped(rig)
    refusal(lambda: rfc.read(PAGE, 4))
    return refusal(lambda: rfc.read(PAGE, PAGE))


@STATE.add("repeat", "a stopped device's state read twice is the same", "the same bytes")
def _state_repeat(rig: Rig) -> str:
    rfc = _stopped(rig)
    one, other = _without_noise(rfc.read()), _without_noise(rfc.read())
    require(one == other, f"other at {first_difference(one, other)}")
    return f"the same {len(one)} bytes"


@STATE.add(
    "running",
    "the state of a running device can be read, and it can be stopped and started afterwards",
    "an image, 0, 0",
)
def _running(rig: Rig) -> str:
    rfc = rig.rfc
    kind, size, _, data_size = _HEAD.unpack_from(rfc.read())
    require(
        kind == gvt.HEAD and size == gvt.HEAD_SIZE - gvt.RECORD.size,
        f"record type {kind} of {size} bytes",
    )
    rfc.stop()
    rfc.start()
    return f"{data_size} bytes, 0, 0"


def _load(rfc: Rfc, region: bytes) -> None:
    try:
        done = rfc.write(region)
    except OSError as error:
        raise Deviation(f"writing its own image failed: {errno.errorcode.get(error.errno or 0)}") from error
    require(done == rfc.region.size, f"{done} bytes taken")


def _round(rfc: Rfc) -> str:
    own = rfc.own()
    rfc.stop()
    _load(rfc, own)
    one, other = _without_noise(own), _without_noise(rfc.read())
    require(one == other, f"other at {first_difference(one, other)}")
    return f"the same {len(one)} bytes"


@STATE.add("round-trip", "what was read is read again after it was written", "the same bytes")
def _round_trip(rig: Rig) -> str:
    return _round(rig.rfc)


@STATE.add("write-offset", "a write at another place in the region is refused", "an error")
def _write_offset(rig: Rig) -> str:
    own, rfc = rig.rfc.own(), rig.rfc
    image = own[: _HEAD.unpack_from(own)[3]] + bytes(gvt.RECORD.size)  # whole, so that nothing but its place is wrong
    if PAGE + len(image) > rfc.region.size:
        raise NotApplicable("the image leaves no room for another place")
    rfc.stop()
    return refusal(lambda: rfc.write_at(image, PAGE))


def _bad(rig: Rig, region: bytes) -> str:
    rig.rfc.own()
    rig.rfc.stop()
    return refusal(lambda: rig.rfc.write(region))


def _patched(region: bytes, at: int, value: int) -> bytes:
    return region[:at] + struct.pack("<I", value) + region[at + 4 :]


@STATE.add("bad-type", "an image that does not begin with HEAD is refused", "an error")
def _bad_type(rig: Rig) -> str:
    return _bad(rig, _patched(rig.rfc.own(), 0, gvt.VREG))


@STATE.add("bad-data-size", "an image that says that it is none, or too long, is refused", "an error")
def _bad_size(rig: Rig) -> str:
    own = rig.rfc.own()
    _bad(rig, _patched(own, _DATA_SIZE_AT, 0xFFFFFFFF))
    return _bad(rig, _patched(own, _DATA_SIZE_AT, rig.rfc.region.size))


@STATE.add("bad-record", "an image with a record of a wrong size is refused", "an error")
def _bad_record(rig: Rig) -> str:
    return _bad(rig, _patched(rig.rfc.own(), gvt.HEAD_SIZE + 4, 1))


@STATE.add("zeros", "zeros are refused", "an error")
def _zeros(rig: Rig) -> str:
    return _bad(rig, b"")


@STATE.add("random", "random bytes are refused", "an error")
def _random(rig: Rig) -> str:
    return _bad(rig, random.Random(2017).randbytes(PAGE))  # noqa: S311 -- no secret


@STATE.add("refused-recovers", "after an image was refused a reset recovers", "a whole one loads")
def _refused_recovers(rig: Rig) -> str:
    _bad(rig, b"")
    rig.rfc.reset()
    return _round(rig.rfc)


@STATE.add(
    "too-long",
    "more than the region cannot be read or written",
    "an error, or no more than the region",
    danger="trees of 2018 check where an access begins, and run over their buffer",
)
def _too_long(rig: Rig) -> str:
    rfc, own = rig.rfc, rig.rfc.own()
    rfc.stop()
    seen = []

    def read() -> int:
        return len(rfc.read(rfc.region.size + PAGE))

    def write() -> int:
        return rfc.write(own + bytes(PAGE))

    for name, call in (("read", read), ("write", write)):
        try:
            done = call()
        except OSError as error:
            seen.append(f"{name} {errno.errorcode.get(error.errno or 0)}")
            continue
        require(done <= rfc.region.size, f"{name} of {done} bytes")
        seen.append(f"{name} of {done} bytes")
    return ", ".join(seen)


# --- reset, close, two devices


@ENDS.add("reset.running", "a device that runs can be reset", "0, and STOP and START work")
def _reset_running(rig: Rig) -> str:
    rig.rfc.reset()
    rig.rfc.stop()
    rig.rfc.start()
    return "0, 0, 0"


@ENDS.add("reset.stopped", "a stopped device can be reset", "0, and an image can be read")
def _reset_stopped(rig: Rig) -> str:
    rfc = _stopped(rig)
    rfc.reset()
    rfc.stop()
    require(_HEAD.unpack_from(rfc.read())[0] == gvt.HEAD, "no image")
    rfc.start()
    return "0, and an image"


@ENDS.add("close.stopped", "a device that was closed while it was stopped can be opened and used", "an image, 0, 0")
def _close_stopped(rig: Rig) -> str:
    rig.require_own()
    _stopped(rig)
    rig.reopen()
    rfc = rig.rfc
    require(_HEAD.unpack_from(rfc.read())[0] == gvt.HEAD, "no image")
    rfc.stop()
    rfc.start()
    return "an image, 0, 0"


@ENDS.add("second.round-trip", "a device of the same type takes the image, and gives the same", "the same bytes")
def _second(rig: Rig) -> str:
    if rig.second is None:
        raise NotApplicable("no --second device")
    if not rig.same_type:
        raise NotApplicable("--second is of another type")
    own, other = rig.rfc.own(), rig.second.rfc
    other.own()
    other.stop()
    _load(other, own)
    one, two = _without_noise(own), _without_noise(other.read())
    require(one == two, f"other at {first_difference(one, two)}")
    return f"the same {len(one)} bytes"


CHECKS: Final = [*INFO, *STATUS_CHECKS, *DIRTY, *STATE, *ENDS]
