# SPDX-License-Identifier: MIT
"""Do once with a made-up image what is to be done with a real one while its device stands still.

Most of what a first time takes is Python's: modules are read, buffers and threads are made, code runs cold. A job that
has rehearsed has that behind it before the stop.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from vfio_mig.errors import VfioMigError

if TYPE_CHECKING:
    from vfio_mig.jobs.engine.session import Session

_STATE: Final = bytes(64)
"""No device's state."""


def rehearse(session: Session) -> None:
    """Send an image of a device of this kind through a pipe, verify it, and judge it.

    The image has some KiB, so the pipe takes it whole. The device is read only, and what is found is forgotten.
    """
    import vfio_mig.image.memoryplan  # noqa: F401 -- for what comes later
    from vfio_mig.dirty.bitmap import count
    from vfio_mig.image.digests import Digests
    from vfio_mig.image.writer import ArchiveWriter
    from vfio_mig.jobs.check import fit_checks
    from vfio_mig.jobs.engine.export import describe_device
    from vfio_mig.jobs.files.input import read_image

    count(_STATE, 8 * len(_STATE))
    ends = os.pipe()
    with os.fdopen(ends[0], "rb") as received:
        with os.fdopen(ends[1], "wb", buffering=0) as sent, Digests(None) as digests:
            writer = ArchiveWriter(sent, describe_device(session), digests)
            writer.add_state(iter([_STATE]))
            writer.finish()
        limit = None if session.protocol.streams else len(_STATE)
        with read_image(received, limit, alone=False) as image:
            for _ in image.chunks():
                pass
            with suppress(VfioMigError):  # that it does not fit is known
                fit_checks(session, _STATE, image.archive)
                session.protocol.parse_state(memoryview(_STATE))
