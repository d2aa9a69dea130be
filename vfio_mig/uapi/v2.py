# SPDX-License-Identifier: MIT
"""The migration protocol v2 as <linux/vfio.h> has it: features, flags, states and their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vfio_mig.uapi import ffi

if TYPE_CHECKING:
    from vfio_mig.words import State

# VFIO_DEVICE_FEATURE: what is done, and with which feature
GET: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_GET")
SET: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_SET")
PROBE: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_PROBE")
MIGRATION: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_MIGRATION")
DEVICE_STATE: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE")
LOG_START: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_DMA_LOGGING_START")
LOG_STOP: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP")
LOG_REPORT: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT")
DATA_SIZE: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_MIG_DATA_SIZE")
PRECOPY_INFO_V2: Final = ffi.integer_const("VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2")

# Flags of VFIO_DEVICE_FEATURE_MIGRATION
STOP_COPY_FLAG: Final = ffi.integer_const("VFIO_MIGRATION_STOP_COPY")
P2P_FLAG: Final = ffi.integer_const("VFIO_MIGRATION_P2P")
PRE_COPY_FLAG: Final = ffi.integer_const("VFIO_MIGRATION_PRE_COPY")

ERROR: Final = ffi.integer_const("VFIO_DEVICE_STATE_ERROR")
STOP: Final = ffi.integer_const("VFIO_DEVICE_STATE_STOP")
RUNNING: Final = ffi.integer_const("VFIO_DEVICE_STATE_RUNNING")
STOP_COPY: Final = ffi.integer_const("VFIO_DEVICE_STATE_STOP_COPY")
RESUMING: Final = ffi.integer_const("VFIO_DEVICE_STATE_RESUMING")
RUNNING_P2P: Final = ffi.integer_const("VFIO_DEVICE_STATE_RUNNING_P2P")
PRE_COPY: Final = ffi.integer_const("VFIO_DEVICE_STATE_PRE_COPY")
PRE_COPY_P2P: Final = ffi.integer_const("VFIO_DEVICE_STATE_PRE_COPY_P2P")
NAMES: Final[dict[int, State]] = {
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
SAVING: Final = (PRE_COPY, PRE_COPY_P2P, STOP_COPY)
"""States that come with a data fd to read from."""


def state_name(state: int) -> str:
    """Name a state, also one that there is not."""
    return NAMES.get(state, f"state {state}")
