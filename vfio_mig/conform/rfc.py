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

from vfio_mig.conform.bench import first_difference
from vfio_mig.conform.check import RFC, Checks, Deviation, NotApplicable, require
from vfio_mig.conform.feature import refusal
from vfio_mig.conform.rfc_raw import PAGE, STATUS
from vfio_mig.device import MMAP, READ, WRITE
from vfio_mig.errors import ImageError
from vfio_mig.image import gvt

if TYPE_CHECKING:
    from vfio_mig.conform.bench import Bench
    from vfio_mig.conform.rfc_raw import Rfc

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
def _flags(bench: Bench) -> str:
    flags, needed = bench.device.info().flags, bench.rfc.profile.migratable_flag | _PCI
    require(flags & needed == needed, f"flags {flags:#x}")
    return f"flags {flags:#x}"


@INFO.add("region", "the state region can be read and written, not mapped, and has no type", "9 MiB, rw-, no type")
def _region(bench: Bench) -> str:
    region, profile = bench.rfc.region, bench.rfc.profile
    kind = "no type" if region.type is None else f"type {region.type:#x}"
    seen = f"{region.size} bytes, {region.access}, {kind}"
    require(region.size == profile.image_max, seen)
    require(region.flags & (READ | WRITE | MMAP) == READ | WRITE, seen)
    require(region.type is None, seen)
    return seen


# --- STOP and START


@STATUS_CHECKS.add("stop", "STOP stops the device", "0")
def _stop(bench: Bench) -> str:
    bench.rfc.stop()
    return "0"


@STATUS_CHECKS.add("start", "START lets it go on", "0")
def _start(bench: Bench) -> str:
    bench.rfc.stop()
    bench.rfc.start()
    return "0"


@STATUS_CHECKS.add("stop-twice", "a second STOP changes nothing", "0, 0")
def _stop_twice(bench: Bench) -> str:
    bench.rfc.stop()
    bench.rfc.stop()
    return "0, 0"


@STATUS_CHECKS.add("start-twice", "a second START changes nothing", "0, 0")
def _start_twice(bench: Bench) -> str:
    bench.rfc.start()
    bench.rfc.start()
    return "0, 0"


@STATUS_CHECKS.add("no-flag", "without a flag it is refused", "EINVAL or EFAULT")
def _no_flag(bench: Bench) -> str:
    return refusal(lambda: bench.rfc.status(0), *BAD_FLAGS)


@STATUS_CHECKS.add("both-flags", "STOP and START exclude each other", "EINVAL or EFAULT")
def _both(bench: Bench) -> str:
    profile = bench.rfc.profile
    return refusal(lambda: bench.rfc.status(profile.stop | profile.start), *BAD_FLAGS)


@STATUS_CHECKS.add("unknown-flag", "an unknown flag is refused", "EINVAL or EFAULT")
def _unknown(bench: Bench) -> str:
    refusal(lambda: bench.rfc.status(1 << 31), *BAD_FLAGS)
    return refusal(lambda: bench.rfc.status(1 << 31 | bench.rfc.profile.stop), *BAD_FLAGS)


@STATUS_CHECKS.add("short-argsz", "argsz smaller than the struct is refused", "EINVAL or EFAULT")
def _short(bench: Bench) -> str:
    rfc = bench.rfc
    refusal(lambda: rfc.status(rfc.profile.stop, argsz=0), *BAD_FLAGS)
    return refusal(lambda: rfc.status(rfc.profile.stop, argsz=STATUS.size - 1), *BAD_FLAGS)


@STATUS_CHECKS.add("long-argsz", "a larger argsz than needed is accepted", "0")
def _long(bench: Bench) -> str:
    bench.rfc.status(bench.rfc.profile.stop, argsz=64)
    return "0"


@STATUS_CHECKS.add("bad-pointer", "a struct that cannot be read is refused", "EFAULT")
def _status_pointer(bench: Bench) -> str:
    rfc = bench.rfc
    return refusal(lambda: rfc.kernel.ioctl(rfc.fd, rfc.profile.status_set, 8), errno.EFAULT)


# --- dirty pages


@DIRTY.add("one-page", "the bitmap of one page can be asked for", "0")
def _one(bench: Bench) -> str:
    bench.rfc.dirty(0, 1)
    return "0"


@DIRTY.add("no-page", "no page is a bitmap of one empty word", "0, no bits")
def _no_page(bench: Bench) -> str:
    require(not any(bench.rfc.dirty(0, 0)), "bits")
    return "0, no bits"


@DIRTY.add("most-pages", "2^20 pages can be asked for at once", "0")
def _most(bench: Bench) -> str:
    bits = int.from_bytes(bench.rfc.dirty(0, PAGES_MAX), "little").bit_count()
    return f"0, {bits} bits"


@DIRTY.add("no-memory", "where the guest has no memory nothing is dirty", "0, no bits")
def _no_memory(bench: Bench) -> str:
    bits = int.from_bytes(bench.rfc.dirty(FAR, 4096), "little").bit_count()
    require(not bits, f"{bits} bits")
    return "0, no bits"


def _stopped(bench: Bench) -> Rfc:
    bench.rfc.stop()
    return bench.rfc


@DIRTY.add("unaligned", "the low 12 bits of the address are not heard", "the same bits")
def _unaligned(bench: Bench) -> str:
    rfc = _stopped(bench)
    require(rfc.dirty(PAGE, 4096) == rfc.dirty(PAGE | 0x123, 4096), "other bits")
    return "the same bits"


@DIRTY.add("repeat", "asking clears nothing", "the same bits twice")
def _repeat(bench: Bench) -> str:
    rfc = _stopped(bench)
    require(rfc.dirty(0, PAGES_MAX) == rfc.dirty(0, PAGES_MAX), "other bits")
    return "the same bits twice"


@DIRTY.add("stopped", "a stopped device answers as well as one that runs", "0, 0")
def _dirty_stopped(bench: Bench) -> str:
    bench.rfc.dirty(0, 4096)
    bench.rfc.stop()
    bench.rfc.dirty(0, 4096)
    return "0, 0"


@DIRTY.add("overwrites", "what was in the buffer does not stay", "the same bits")
def _overwrites(bench: Bench) -> str:
    rfc = _stopped(bench)
    size = 4096 // 8
    require(rfc.dirty(0, 4096)[:size] == rfc.dirty(0, 4096, fill=0xFF)[:size], "bits of before")
    return "the same bits"


@DIRTY.add("overrun", "no more is written than the bitmap and one word", "the rest as it was")
def _overrun(bench: Bench) -> str:
    for pages in (0, 1, 63, 64, 65, 4096):
        written = bench.rfc.dirty(0, pages, fill=_FILL, room=GUARD)
        require(written[-GUARD:] == bytes([_FILL]) * GUARD, f"more, for {pages} pages")
    return "the rest as it was"


@DIRTY.add("tail", "bits behind the last page are 0", "0")
def _tail(bench: Bench) -> str:
    for pages in (1, 7, 63, 65, 4095):
        bits = int.from_bytes(bench.rfc.dirty(0, pages)[: -(-pages // 64) * 8], "little")
        require(not bits >> pages, f"bits, for {pages} pages")
    return "0"


@DIRTY.add("bad-pointer", "a struct that cannot be read is refused", "EFAULT")
def _dirty_pointer(bench: Bench) -> str:
    rfc = bench.rfc
    return refusal(lambda: rfc.kernel.ioctl(rfc.fd, rfc.profile.get_dirty, 8), errno.EFAULT)


@DIRTY.add("read-only", "a bitmap that cannot be written is refused", "EFAULT")
def _dirty_read_only(bench: Bench) -> str:
    return refusal(lambda: bench.rfc.dirty_into_read_only(64), errno.EFAULT)


# --- the state


def _without_noise(region: bytes) -> bytes:
    """Cut the image out, without what a kernel leaves uninitialised: HEAD's global data and PPGTT's padding."""
    size = _HEAD.unpack_from(region)[3]
    image = bytearray(region[:size])
    image[24 : gvt.HEAD_SIZE] = bytes(gvt.HEAD_SIZE - 24)
    return bytes(image)


@STATE.add("read", "one read of the whole region gives a whole image", "an image")
def _read(bench: Bench) -> str:
    region = _stopped(bench).read()
    require(len(region) == bench.rfc.region.size, f"{len(region)} bytes")
    try:
        view = memoryview(region)
        image = gvt.parse(view[: gvt.data_size_of(view, image_max=bench.rfc.profile.image_max)])
    except ImageError as error:
        raise Deviation(str(error)) from error
    return f"{image.data_size} bytes, {', '.join(image.records)}"


@STATE.add("read-offset", "a read at another place in the region is refused", "an error")
def _read_offset(bench: Bench) -> str:
    rfc = _stopped(bench)
    refusal(lambda: rfc.read(PAGE, 4))
    return refusal(lambda: rfc.read(PAGE, PAGE))


@STATE.add("repeat", "a stopped device's state read twice is the same", "the same bytes")
def _state_repeat(bench: Bench) -> str:
    rfc = _stopped(bench)
    one, other = _without_noise(rfc.read()), _without_noise(rfc.read())
    require(one == other, f"other at {first_difference(one, other)}")
    return f"the same {len(one)} bytes"


@STATE.add(
    "running",
    "the state of a running device can be read, and it can be stopped and started afterwards",
    "an image, 0, 0",
)
def _running(bench: Bench) -> str:
    rfc = bench.rfc
    kind, size, _, data_size = _HEAD.unpack_from(rfc.read())
    require(kind == gvt.HEAD and size == gvt.HEAD_SIZE - gvt.RECORD.size, f"record type {kind} of {size} bytes")
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
def _round_trip(bench: Bench) -> str:
    return _round(bench.rfc)


@STATE.add("write-offset", "a write at another place in the region is refused", "an error")
def _write_offset(bench: Bench) -> str:
    own, rfc = bench.rfc.own(), bench.rfc
    image = own[: _HEAD.unpack_from(own)[3]] + bytes(gvt.RECORD.size)  # whole, so that nothing but its place is wrong
    if PAGE + len(image) > rfc.region.size:
        raise NotApplicable("the image leaves no room for another place")
    rfc.stop()
    return refusal(lambda: rfc.write_at(image, PAGE))


def _bad(bench: Bench, region: bytes) -> str:
    bench.rfc.own()
    bench.rfc.stop()
    return refusal(lambda: bench.rfc.write(region))


def _patched(region: bytes, at: int, value: int) -> bytes:
    return region[:at] + struct.pack("<I", value) + region[at + 4 :]


@STATE.add("bad-type", "an image that does not begin with HEAD is refused", "an error")
def _bad_type(bench: Bench) -> str:
    return _bad(bench, _patched(bench.rfc.own(), 0, gvt.VREG))


@STATE.add("bad-data-size", "an image that says that it is none, or too long, is refused", "an error")
def _bad_size(bench: Bench) -> str:
    own = bench.rfc.own()
    _bad(bench, _patched(own, _DATA_SIZE_AT, 0xFFFFFFFF))
    return _bad(bench, _patched(own, _DATA_SIZE_AT, bench.rfc.region.size))


@STATE.add("bad-record", "an image with a record of a wrong size is refused", "an error")
def _bad_record(bench: Bench) -> str:
    return _bad(bench, _patched(bench.rfc.own(), gvt.HEAD_SIZE + 4, 1))


@STATE.add("zeros", "zeros are refused", "an error")
def _zeros(bench: Bench) -> str:
    return _bad(bench, b"")


@STATE.add("random", "random bytes are refused", "an error")
def _random(bench: Bench) -> str:
    return _bad(bench, random.Random(2017).randbytes(PAGE))  # noqa: S311 -- no secret


@STATE.add("refused-recovers", "after an image was refused a reset recovers", "a whole one loads")
def _refused_recovers(bench: Bench) -> str:
    _bad(bench, b"")
    bench.rfc.reset()
    return _round(bench.rfc)


@STATE.add(
    "too-long",
    "more than the region cannot be read or written",
    "an error, or no more than the region",
    danger="trees of 2018 check where an access begins, and run over their buffer",
)
def _too_long(bench: Bench) -> str:
    rfc, own = bench.rfc, bench.rfc.own()
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
def _reset_running(bench: Bench) -> str:
    bench.rfc.reset()
    bench.rfc.stop()
    bench.rfc.start()
    return "0, 0, 0"


@ENDS.add("reset.stopped", "a stopped device can be reset", "0, and an image can be read")
def _reset_stopped(bench: Bench) -> str:
    rfc = _stopped(bench)
    rfc.reset()
    rfc.stop()
    require(_HEAD.unpack_from(rfc.read())[0] == gvt.HEAD, "no image")
    rfc.start()
    return "0, and an image"


@ENDS.add("close.stopped", "who opens a device that was closed while it was stopped can use it", "an image, 0, 0")
def _close_stopped(bench: Bench) -> str:
    bench.require_own()
    _stopped(bench)
    bench.reopen()
    rfc = bench.rfc
    require(_HEAD.unpack_from(rfc.read())[0] == gvt.HEAD, "no image")
    rfc.stop()
    rfc.start()
    return "an image, 0, 0"


@ENDS.add("second.round-trip", "a device of the same type takes the image, and gives the same", "the same bytes")
def _second(bench: Bench) -> str:
    if bench.second is None:
        raise NotApplicable("no --second device")
    if not bench.same_type:
        raise NotApplicable("--second is of another type")
    own, other = bench.rfc.own(), bench.second.rfc
    other.own()
    other.stop()
    _load(other, own)
    one, two = _without_noise(own), _without_noise(other.read())
    require(one == two, f"other at {first_difference(one, two)}")
    return f"the same {len(one)} bytes"


CHECKS: Final = [*INFO, *STATUS_CHECKS, *DIRTY, *STATE, *ENDS]
