# SPDX-License-Identifier: MIT
"""Mainline's migration protocol v2: a state machine, and a stream from a data fd (<linux/vfio.h>, since Linux 5.18).

Known to hang or crash kernels, and never asked for: STOP_COPY to PRE_COPY or PRE_COPY_P2P (6.2 to 7.1 spin for ever
with the driver's lock held); anything but a reset after a failed write in RESUMING (mtty loads the garbage); leaving
RESUMING on a device that was closed in it (mtty: NULL pointer).
"""

from __future__ import annotations

import errno
import os
import struct
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

from vfio_mig import uapi
from vfio_mig.errors import DeviceError, UnsupportedError, UsageError, errno_text
from vfio_mig.protocols.abilities import Pending
from vfio_mig.protocols.base import MigrationProtocol
from vfio_mig.protocols.dma_logging import DmaLog
from vfio_mig.protocols.family import Condition, Family
from vfio_mig.protocols.flags import mainline_flags
from vfio_mig.uapi import IoctlError, ffi
from vfio_mig.uapi.v2 import (
    DATA_SIZE,
    DEVICE_STATE,
    GET,
    NAMES,
    P2P_FLAG,
    PRE_COPY,
    PRE_COPY_FLAG,
    PRE_COPY_P2P,
    PRECOPY_INFO_V2,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SAVING,
    SET,
    STOP,
    STOP_COPY,
    STOP_COPY_FLAG,
    state_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vfio_mig.device import Device
    from vfio_mig.uapi.profile import RfcProfile
    from vfio_mig.words import State

BY_HAND: Final[tuple[State, ...]] = ("running", "running-p2p", "stop")
"""States without a data fd, which may be left behind."""
CHUNK: Final = 1 << 20
"""Bytes of one read of the data fd."""
_AT_REST: Final = (STOP, RUNNING, RUNNING_P2P)
_LIVE: Final = (PRE_COPY, PRE_COPY_P2P)
_QUIET: Final = {RUNNING: RUNNING_P2P, PRE_COPY: PRE_COPY_P2P}
_PARTS: Final = {STOP_COPY_FLAG: "stop-copy", P2P_FLAG: "p2p", PRE_COPY_FLAG: "pre-copy"}
_STATE: Final = struct.Struct("=IIIi")  # vfio_device_feature + vfio_device_feature_mig_state
_GET: Final = GET | DEVICE_STATE
_SET: Final = SET | DEVICE_STATE
_HEAD: Final = struct.Struct("=II")  # vfio_device_feature
_SIZE: Final = struct.Struct("=IIQ")  # and vfio_device_feature_mig_data_size
_GET_SIZE: Final = GET | DATA_SIZE
_SET_INFO2: Final = SET | PRECOPY_INFO_V2
_PRECOPY_INFO: Final = struct.Struct("=IIQQ")  # vfio_precopy_info
_REINIT: Final = ffi.integer_const("VFIO_PRECOPY_INFO_REINIT")


class MainlineV2(MigrationProtocol):
    """One device that speaks v2.

    :param flags: of VFIO_DEVICE_FEATURE_MIGRATION.
    :raises DeviceError: the device is in the middle of somebody's migration, or in the error state.
    """

    name: ClassVar[str] = "mainline-v2"
    streams: ClassVar[bool] = True
    reaches_others: ClassVar[bool] = True

    def __init__(self, device: Device, flags: int) -> None:
        super().__init__(device)
        self.flags: Final = flags
        self._found = self._get()
        self._log: Final = DmaLog(device)
        self._live_fd = -1
        self._tells_anew = False
        self._buffer = memoryview(b"")

    @cached_property
    def has_dirty(self) -> bool:
        """Whether the device logs its writes."""
        return self._log.exists

    @property
    def live(self) -> MainlineV2 | None:
        """Itself, if it has the PRE_COPY states."""
        return self if self.flags & PRE_COPY_FLAG else None

    @property
    def dirty_log(self) -> MainlineV2:
        """Itself; a device that has no log says so when it is started."""
        return self

    @property
    def p2p(self) -> MainlineV2 | None:
        """Itself, if it has the P2P states."""
        return self if self.flags & P2P_FLAG else None

    @property
    def states(self) -> MainlineV2:
        """Itself."""
        return self

    @property
    def state_size_max(self) -> int:
        """Bytes: the protocol knows no limit; the device says what is too much."""
        return (1 << 63) - 1

    def require_idle(self) -> None:
        """Refuse a device that is in the middle of a migration, ours or its owner's.

        :raises DeviceError: only a reset, or its owner, can get it out of there.
        """
        if self._found not in _AT_REST:
            raise DeviceError(
                f"it is in state {self.state()}: its owner is migrating it, or a migration has broken off",
                device=self.device.name,
                hint=f"wait for its owner, or make it defined with 'vfio-mig reset {self.device.name}'",
            )

    def recover(self, *, may_reset: bool) -> None:
        """Go to a state at rest; out of RESUMING, which has no stream any more, and out of ERROR only a reset leads."""
        now = self._get()
        if now == STOP_COPY:
            self._rest(STOP)
        elif now in SAVING:
            self._rest(RUNNING)
        elif now not in _AT_REST and may_reset:
            self.reset()
        self._found = self._get()
        self.require_idle()

    def _get(self) -> int:
        request = bytearray(_STATE.pack(_STATE.size, _GET, 0, -1))
        self.device.call(uapi.DEVICE_FEATURE, request)
        state: int = _STATE.unpack(request)[2]
        return state

    def state(self) -> str:
        """Return the name of the state that the device is in now."""
        now = self._get()
        return state_name(now)

    def _set(self, state: int) -> int:
        """Go to a state; returns the data fd that comes with it, which is the caller's, or -1.

        :raises DeviceError: says where the device is now: a walk over several arcs may stop on its way.
        """
        # Only a live save's states need a question before: a request more is made while the device stands still
        if state in _LIVE and self._get() == STOP_COPY:
            raise UsageError(
                "no kernel before 7.2 survives the way from stop-copy to pre-copy", device=self.device.name
            )
        request = bytearray(_STATE.pack(_STATE.size, _SET, state, -1))
        try:
            self.device.call(uapi.DEVICE_FEATURE, request)
        except DeviceError as error:
            error.problem = f"{NAMES[state]}: {error.problem}; it is now in state {self.state()}"
            raise
        fd: int = _STATE.unpack(request)[3]
        return fd

    def _rest(self, state: int) -> None:
        """Go to a state that has no data fd, or that goes on with the one there is.

        :raises DeviceError: also when a data fd comes nevertheless.
        """
        if self._get() != state:
            fd = self._set(state)
            if fd >= 0:
                os.close(fd)
                raise DeviceError(f"{NAMES[state]} came with a data fd of its own", device=self.device.name)

    def quiet(self) -> None:
        """Go from RUNNING to RUNNING_P2P, or with a live save from PRE_COPY to PRE_COPY_P2P."""
        if (now := self._get()) in _QUIET:
            self._rest(_QUIET[now])

    def wake(self) -> None:
        """Go from STOP to RUNNING_P2P."""
        if self._get() == STOP:
            self._rest(RUNNING_P2P)

    def undo_wake(self) -> None:
        """Go from RUNNING_P2P back to where the device was found."""
        if self._found == STOP and self._get() == RUNNING_P2P:
            self._rest(STOP)

    def stop(self) -> None:
        """Go to STOP, by way of RUNNING_P2P where the device has it; from a live save to STOP_COPY, which goes on."""
        self._rest(STOP if self._live_fd < 0 else STOP_COPY)

    def start(self) -> None:
        """Go to RUNNING."""
        self._rest(RUNNING)

    def restore_run_state(self) -> None:
        """Go back to where the device was found: its owner may have stopped it before us."""
        self._end_live()
        self._rest(self._found if self._found in _AT_REST else RUNNING)

    def go_to(self, name: str) -> None:
        """Go to a state by hand.

        :raises UsageError: it is none of BY_HAND: the others have a stream that would be lost.
        :raises UnsupportedError: the device does not have it.
        """
        if name not in BY_HAND:
            raise UsageError(f"{name!r} is not a state to be left in", hint=f"choose one of {', '.join(BY_HAND)}")
        if name == NAMES[RUNNING_P2P] and not self.flags & P2P_FLAG:
            raise UnsupportedError("it has no P2P states", device=self.device.name)
        self._rest(next(state for state, its in NAMES.items() if its == name))

    def read_state(self) -> memoryview:
        """Read the whole stream into memory; :meth:`read_chunks` does not."""
        return memoryview(b"".join(map(bytes, self.read_chunks())))

    def prepare(self) -> None:
        """Have a buffer, every page of it touched."""
        if not self._buffer:
            self._buffer = memoryview(bytearray(CHUNK))

    def begin_live(self) -> bool:
        """Go to PRE_COPY; a device that was found stopped would begin to run there."""
        if self._found != RUNNING:
            return False
        try:
            self.device.call(uapi.DEVICE_FEATURE, bytearray(_HEAD.pack(_HEAD.size, _SET_INFO2)))
            self._tells_anew = True
        except DeviceError:  # kernels before 7.1 do not have it
            self._tells_anew = False
        self._live_fd = self._require_fd(PRE_COPY)
        return True

    def _require_fd(self, state: int) -> int:
        fd = self._set(state)
        if fd < 0:
            raise DeviceError(f"{NAMES[state]} came without a data fd", device=self.device.name)
        return fd

    def _end_live(self) -> None:
        fd, self._live_fd = self._live_fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close the data fd of a live save."""
        self._end_live()

    def read_live(self, limit: int) -> Iterator[memoryview]:
        """Read to the end that there is for now, ENOMSG or for many drivers 0 bytes, and no more than *limit*."""
        try:
            while limit > 0 and (chunk := self._read(self._live_fd, limit)):
                limit -= len(chunk)
                yield chunk
        except DeviceError as error:
            if error.errno != errno.ENOMSG:
                raise

    def pending(self) -> Pending:
        """Ask the data fd; some drivers look for changes only then."""
        request = bytearray(_PRECOPY_INFO.pack(_PRECOPY_INFO.size, 0, 0, 0))
        try:
            uapi.call(self._live_fd, uapi.MIG_GET_PRECOPY_INFO, request)
        except IoctlError as error:
            raise DeviceError(str(error), device=self.device.name, errno=error.errno or 0) from error
        _, flags, initial, dirty = _PRECOPY_INFO.unpack(request)
        anew = self._tells_anew and bool(flags & _REINIT)
        return Pending(initial, dirty, max(initial + dirty, self._data_size()), anew)

    def _data_size(self) -> int:
        """Return the device's estimate of what STOP_COPY will take, bytes; 0 where it has none."""
        request = bytearray(_SIZE.pack(_SIZE.size, _GET_SIZE, 0))
        try:
            self.device.call(uapi.DEVICE_FEATURE, request)
        except DeviceError:
            return 0
        size: int = _SIZE.unpack(request)[2]
        return size

    def read_chunks(self) -> Iterator[memoryview]:
        """Go to STOP_COPY, if it is not there from a live save, yield the stream to its end, and go back to STOP."""
        if self._live_fd < 0:
            self._live_fd = self._require_fd(STOP_COPY)
        try:
            while chunk := self._read(self._live_fd):
                yield chunk
        finally:
            self._end_live()
        self._rest(STOP)

    def _read(self, fd: int, limit: int = CHUNK) -> memoryview:
        """Read once; what is returned is overwritten by the next call."""
        if not self._buffer:
            self.prepare()
        try:
            return self._buffer[: os.readv(fd, [self._buffer[:limit]])]
        except OSError as error:
            number = error.errno or 0
            raise DeviceError(
                f"reading the state failed: {errno_text(number)}", device=self.device.name, errno=number
            ) from error

    def write_state(self, state: memoryview) -> None:
        """Load a state that is in memory."""
        self.write_chunks([state])

    def write_chunks(self, chunks: Iterable[bytes | memoryview]) -> None:
        """Go to RESUMING, write the stream, and have the device load it by going to STOP.

        :raises DeviceError: it may hold a part of it, and only a reset makes it defined.
        """
        fd = self._require_fd(RESUMING)
        try:
            for chunk in chunks:
                self._write(fd, memoryview(chunk))
        finally:
            os.close(fd)
        self._rest(STOP)

    def _write(self, fd: int, view: memoryview) -> None:
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError as error:
            number = error.errno or 0
            raise DeviceError(
                f"writing the state failed: {errno_text(number)}", device=self.device.name, errno=number
            ) from error

    def start_log(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Start the device's log of its writes."""
        self._log.start(ranges)

    def stop_log(self) -> None:
        """End it."""
        self._log.stop()

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:
        """Take pages out of the device's log; it must have been started."""
        return self._log.report(start_page, nr_pages)

    def describe(self) -> str:
        """Name the optional parts that the device has."""
        return _describe(self.flags, has_log=self.has_dirty)


def _describe(flags: int, *, has_log: bool) -> str:
    parts = [name for bit, name in _PARTS.items() if flags & bit]
    return f"{MainlineV2.name} ({', '.join([*parts, *(['dma-logging'] if has_log else [])])})"


class _MainlineV2Family(Family):
    """Every device whose driver has registered with vfio's own migration."""

    protocol: ClassVar[type[MigrationProtocol]] = MainlineV2

    def conditions(self, device: Device, profile: RfcProfile) -> list[Condition]:
        """Look for the one part that all of them have: STOP_COPY."""
        del profile
        flags = mainline_flags(device)
        if not flags & STOP_COPY_FLAG:
            return [Condition("mainline-migration", False, f"mainline migration flags {flags:#x}")]
        return [Condition("mainline-migration", True, _describe(flags, has_log=DmaLog(device).exists))]

    def open(self, device: Device, profile: RfcProfile) -> MainlineV2:
        """Return what drives the device.

        :raises DeviceError: it is in the middle of somebody's migration, or in the error state.
        """
        del profile
        return MainlineV2(device, mainline_flags(device))


FAMILY: Final = _MainlineV2Family()
