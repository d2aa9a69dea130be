# SPDX-License-Identifier: MIT
"""What every tier's tests need of this process.

- ``unit/``: no root, no kernel, seconds. ``conform_device.py`` plays a v2 device, ``saved_images.py`` makes images,
  ``gpu_rig.py`` lays out work for the emulated GPU and is its vfio-user client.
- ``vm/``: on real ioctls, inside the VM (``scripts/vm``, ``scripts/test --vm``). What these tests share with the
  demonstrations, the benches and the fault table is in ``tools/lab``: clients by raw ioctls, the drivers and their
  truth, guests, QEMU, the installed command.
- ``runner/``: ``scripts/vm`` itself, from outside.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis

from tools import progress

if TYPE_CHECKING:
    import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hear SIGINT and SIGHUP: shells and nohup start what is in the background without, and tests send them.

    Have the tests counted where ``scripts/test`` looks: by this pytest, and by none that a test or xdist starts.

    And let examples take their time: on a busy machine a deadline would fail tests that have found nothing.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if file := os.environ.pop(progress.VARIABLE, None):
        config.pluginmanager.register(progress.Counter(Path(file)))
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
