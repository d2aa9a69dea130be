# SPDX-License-Identifier: MIT
"""Devices and files as a user names them: which is which, and none of them twice."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import click

from vfio_mig.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DEVICE_PATHS: Final = ("/sys/", "/dev/vfio/")
STREAM: Final = "-"


def is_device(word: str) -> bool:
    """Tell whether a word is the name of a device by its form alone: a UUID, a PCI address, a path in /sys, a node."""
    from vfio_mig.host.discover import PCI_ADDRESS, UUID

    lower = word.lower()
    return bool(UUID.fullmatch(lower) or PCI_ADDRESS.fullmatch(lower)) or word.startswith(_DEVICE_PATHS)


def device_first(one: str, other: str, usage: str) -> tuple[str, str]:
    """Tell a device from a file: (device, file).

    Either order is taken where only one of the two has a device's form. Otherwise the first one is the device, as a few
    devices have names of another form.

    :param usage: of the command, for the message.
    :raises UsageError: the two are swapped: where the device should be is a file, and no file is where that should be.
    """
    if is_device(other) and not is_device(one):
        return other, one
    if not is_device(one) and (one == STREAM or os.path.isfile(one)) and other != STREAM and not os.path.exists(other):
        raise UsageError(f"{one} is a file, and {other} is none: these two are swapped", hint=f"it takes {usage}")
    return one, other


def parse_pairs(words: Sequence[str], *, writes: bool = False) -> list[tuple[str, str]]:
    """Take DEVICE FILE, or DEVICE=FILE as often as there are devices, apart.

    :param writes: whether the files are written, each for one device.
    :raises click.UsageError: it is neither.
    :raises UsageError: device and file are swapped, or something is named twice.
    """
    if len(words) == 2 and "=" not in words[0]:  # noqa: PLR2004 -- DEVICE and FILE
        return [device_first(words[0], words[1], "DEVICE FILE")]
    split = [word.partition("=") for word in words]
    if not split or not all(device and file for device, _, file in split):
        raise click.UsageError("takes DEVICE FILE, or DEVICE=FILE for each of several devices")
    pairs = [device_first(device, file, "DEVICE=FILE") for device, _, file in split]
    require_once(device for device, _ in pairs)
    if writes:
        _require_other_files([file for _, file in pairs])
    return pairs


def require_once(devices: Iterable[str]) -> None:
    """Refuse a device that is named twice, also if by two of its names.

    :raises UsageError: it is.
    """
    names = list(devices)
    if len(names) < 2:  # noqa: PLR2004 -- alone it is once
        return
    from vfio_mig.errors import VfioMigError
    from vfio_mig.host.discover import Host

    seen: dict[str, str] = {}
    host = Host()
    for name in names:
        try:
            place = host.find(name).sysfs
        except VfioMigError:  # the job will say it better
            place = name.lower()
        if place in seen:
            also = f", first as {seen[place]}" if seen[place] != name else ""
            raise UsageError(f"{name} is named twice{also}", hint="name each device once")
        seen[place] = name


def _require_other_files(files: list[str]) -> None:
    seen: set[str] = set()
    for file in files:
        place = file if file == STREAM else os.path.abspath(file)
        if place in seen:
            raise UsageError(f"{file} is named twice", hint="each device needs a file of its own")
        seen.add(place)
