# SPDX-License-Identifier: MIT
"""Mainline's migration protocol v2: a state machine, and a stream from a data fd (<linux/vfio.h>, since Linux 5.18).

Known to hang or crash kernels, and never asked for: STOP_COPY to PRE_COPY or PRE_COPY_P2P (6.2 to 7.1 spin for ever
with the driver's lock held); anything but a reset after a failed write in RESUMING (mtty loads the garbage); leaving
RESUMING on a device that was closed in it (mtty: NULL pointer).
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, ClassVar, Final

from vfio_mig import uapi
from vfio_mig.errors import DeviceError, UnsupportedError, UsageError, errno_text
from vfio_mig.protocols.base import MigrationProtocol
from vfio_mig.uapi import ffi

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vfio_mig.device import Device

ERROR: Final = ffi.integer_const("VFIO_DEVICE_STATE_ERROR")
STOP: Final = ffi.integer_const("VFIO_DEVICE_STATE_STOP")
RUNNING: Final = ffi.integer_const("VFIO_DEVICE_STATE_RUNNING")
STOP_COPY: Final = ffi.integer_const("VFIO_DEVICE_STATE_STOP_COPY")
RESUMING: Final = ffi.integer_const("VFIO_DEVICE_STATE_RESUMING")
RUNNING_P2P: Final = ffi.integer_const("VFIO_DEVICE_STATE_RUNNING_P2P")
PRE_COPY: Final = ffi.integer_const("VFIO_DEVICE_STATE_PRE_COPY")
PRE_COPY_P2P: Final = ffi.integer_const("VFIO_DEVICE_STATE_PRE_COPY_P2P")
NAMES: Final = {
    ERROR: "error",
    STOP: "stop",
    RUNNING: "running",
    STOP_COPY: "stop-copy",
    RESUMING: "resuming",
    RUNNING_P2P: "running-p2p",
    PRE_COPY: "pre-copy",
    PRE_COPY_P2P: "pre-copy-p2p",
}
"""States as QEMU spells them."""
BY_HAND: Final = ("running", "running-p2p", "stop")
"""States without a data fd, which may be left behind."""
CHUNK: Final = 1 << 20
"""Bytes of one read of the data fd."""
_AT_REST: Final = (STOP, RUNNING, RUNNING_P2P)
_P2P: Final = ffi.integer_const("VFIO_MIGRATION_P2P")
_STATE: Final = struct.Struct("=IIIi")  # vfio_device_feature + vfio_device_feature_mig_state
_FEATURE: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE")
_GET: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_GET") | _FEATURE
_SET: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_SET") | _FEATURE


class MainlineV2(MigrationProtocol):
    """One device that speaks v2.

    :param flags: of VFIO_DEVICE_FEATURE_MIGRATION.
    :raises DeviceError: the device is in the middle of somebody's migration, or in the error state.
    """

    name: ClassVar[str] = "mainline-v2"
    streams: ClassVar[bool] = True
    has_dirty: ClassVar[bool] = False

    def __init__(self, device: Device, flags: int) -> None:
        super().__init__(device)
        self.flags: Final = flags
        self._found = self._get()

    @property
    def state_size_max(self) -> int:
        """Bytes: the protocol knows no limit; the device says what is too much."""
        return (1 << 63) - 1

    def require_rest(self) -> None:
        """Refuse a device that is in the middle of a migration, ours or its owner's.

        :raises DeviceError: only a reset, or its owner, can get it out of there.
        """
        if self._found not in _AT_REST:
            raise DeviceError(
                f"it is in state {self.state()}: its owner is migrating it, or a migration has broken off",
                device=self.device.name,
                hint=f"wait for its owner, or make it defined with 'vfio-mig reset {self.device.name}'",
            )

    def _get(self) -> int:
        request = bytearray(_STATE.pack(_STATE.size, _GET, 0, -1))
        self.device.call(uapi.DEVICE_FEATURE, request)
        state: int = _STATE.unpack(request)[2]
        return state

    def state(self) -> str:
        """Return the name of the state that the device is in now."""
        now = self._get()
        return NAMES.get(now, f"state {now}")

    def _set(self, state: int) -> int:
        """Go to a state; returns the data fd that comes with it, which is the caller's, or -1.

        :raises DeviceError: says where the device is now: a walk over several arcs may stop on its way.
        """
        now = self._get()
        if now == STOP_COPY and state in (PRE_COPY, PRE_COPY_P2P):
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
        """Go to a state that has no data fd."""
        if self._get() != state:
            fd = self._set(state)
            if fd >= 0:
                os.close(fd)

    def stop(self) -> None:
        """Go to STOP, by way of RUNNING_P2P where the device has it."""
        self._rest(STOP)

    def start(self) -> None:
        """Go to RUNNING."""
        self._rest(RUNNING)

    def undo_stop(self) -> None:
        """Go back to where the device was found: its owner may have stopped it before us."""
        self._rest(self._found if self._found in _AT_REST else RUNNING)

    def go_to(self, name: str) -> None:
        """Go to a state by hand.

        :raises UsageError: it is none of BY_HAND: the others have a stream that would be lost.
        :raises UnsupportedError: the device does not have it.
        """
        if name not in BY_HAND:
            raise UsageError(f"{name!r} is no state to be left in", hint=f"choose one of {', '.join(BY_HAND)}")
        if name == NAMES[RUNNING_P2P] and not self.flags & _P2P:
            raise UnsupportedError("it has no P2P states", device=self.device.name)
        self._rest(next(state for state, its in NAMES.items() if its == name))

    def read_state(self) -> memoryview:
        """Read the whole stream into memory; :meth:`read_chunks` does not."""
        return memoryview(b"".join(self.read_chunks()))

    def read_chunks(self) -> Iterator[bytes]:
        """Go to STOP_COPY, yield the stream to its end, and go back to STOP."""
        fd = self._set(STOP_COPY)
        if fd < 0:
            raise DeviceError("stop-copy came without a data fd", device=self.device.name)
        try:
            while chunk := self._read(fd):
                yield chunk
        finally:
            os.close(fd)
        self._rest(STOP)

    def _read(self, fd: int) -> bytes:
        try:
            return os.read(fd, CHUNK)
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
        fd = self._set(RESUMING)
        if fd < 0:
            raise DeviceError("resuming came without a data fd", device=self.device.name)
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

    def dirty(self, start_page: int, nr_pages: int) -> memoryview:  # noqa: ARG002 -- as the others'
        """Refuse: v2 devices log their writes in another way, which is not spoken here yet."""
        raise UnsupportedError("its dirty pages cannot be asked for", device=self.device.name)

    def describe(self) -> str:
        """Name the optional parts that the device has."""
        parts = [name for bit, name in ((1, "stop-copy"), (2, "p2p"), (4, "pre-copy")) if self.flags & bit]
        return f"{self.name} ({', '.join(parts)})"
