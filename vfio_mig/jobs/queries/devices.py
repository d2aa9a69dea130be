# SPDX-License-Identifier: MIT
"""Tell what devices there are and what one of them is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vfio_mig.errors import UnsupportedError
from vfio_mig.jobs.engine.session import Settings, load_numbers, survey
from vfio_mig.report import Report
from vfio_mig.words import CLOSED

if TYPE_CHECKING:
    from vfio_mig.device import Region
    from vfio_mig.host.discover import Snapshot
    from vfio_mig.protocols.family import Condition
    from vfio_mig.uapi.profile import RfcProfile


@dataclass(frozen=True, kw_only=True)
class DeviceRow(Report):
    """A device of this host; nothing was opened to find it.

    :param node: of its group; its own where it has no group.
    :param holder: command of the process that has it open; ``?`` where not every process can be seen.
    :param migratable: whether it has the migration protocol v2, None when only an open device tells.
    :param state: its migration state by QEMU's name where the kernel shows it (debugfs, root's), ``?`` when its driver
        does not answer, None when it is not known.
    :param cdev: its own node, None on kernels without them.
    :param job: that is at work on it, empty if it does not say which, None for none; *job_step*: its last step.
    """

    device: str
    kind: str
    type: str
    parent: str
    driver: str
    node: str | None
    holder_pid: int | None
    holder: str | None
    migratable: bool | None
    state: str | None
    cdev: str | None
    job: str | None = None
    job_pid: int | None = None
    job_step: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceInfo(Report):
    """What is known of a device; what only an open device says is empty or None when it was not opened.

    :param how: how it was reached: ``borrowed``, ``inherited``, ``cdev``, ``group``, or ``closed``: it was not.
    :param flags: of VFIO_DEVICE_GET_INFO.
    :param protocol: the protocol that it is driven by, None when a check fails.
    :param described: that, with its parts and where its numbers are from.
    :param speaks: every protocol that it speaks, the one that is preferred first; ``--abi`` chooses another.
    :param migratable: whether it can be migrated, None when that is not known before it is opened.
    :param source: where that is from: ``device``, or of a closed one ``debugfs`` or its ``driver``'s name.
    :param state: its migration state by QEMU's name, ``?`` when its driver does not answer, None when it is not known.
    :param better_driver: a VFIO driver of this kernel's that fits it better than the one it has.
    :param unseen: why a process that has it open may have been missed, None when none can have been.
    """

    device: str
    kind: str
    type: str
    how: str
    flags: int | None
    regions: list[Region]
    checks: list[Condition]
    protocol: str | None
    described: str | None
    speaks: list[str]
    driver: str
    node: str | None
    cdev: str | None
    holder_pid: int | None
    holder: str | None
    migratable: bool | None
    source: str | None
    state: str | None
    better_driver: str | None
    unseen: str | None = None


def list_devices() -> list[DeviceRow]:
    """Return all VFIO devices of this host with who has them open."""
    from vfio_mig.host.lock import at_work
    from vfio_mig.host.offline import look

    seen = survey()
    unseen = None if seen.unseen is None else "?"
    listed = []
    for found, known in zip(seen.devices, look(seen.devices, seen.host), strict=True):
        holder, work = seen.holder_of(found), at_work(found)
        listed.append(
            DeviceRow(
                device=found.name,
                kind=found.kind,
                type=found.type,
                parent=found.parent,
                driver=found.driver,
                node=found.node or found.cdev,
                holder_pid=None if holder is None else holder.pid,
                holder=unseen if holder is None else holder.command,
                migratable=known.migratable,
                state=known.state,
                cdev=found.cdev,
                job=None if work is None else work.job,
                job_pid=None if work is None else work.pid,
                job_step=None if work is None else work.step,
            )
        )
    return listed


def device_info(name: str, settings: Settings | None = None, *, open_closed: bool = False) -> DeviceInfo:
    """Tell what a device is; one that some process has open is borrowed and asked, without any request of the RFC.

    :param open_closed: also open one that nobody has: that resets a PCI function, and restarts a vGPU.
    """
    from vfio_mig.host.drivers import better_driver
    from vfio_mig.host.offline import NO_ANSWER, look

    settings = settings or Settings()
    profile = load_numbers(settings)
    seen = survey(name)
    (found,) = seen.devices
    holder = None if settings.fd is not None else seen.holder_of(found)
    unseen = None if holder is not None else seen.unseen
    (known,) = look([found], seen.host)
    closed = DeviceInfo(
        device=found.name,
        kind=found.kind,
        type=found.type,
        how=CLOSED,
        flags=None,
        regions=[],
        checks=[],
        protocol=None,
        described=None,
        speaks=[],
        driver=found.driver,
        node=found.node,
        cdev=found.cdev,
        holder_pid=None if holder is None else holder.pid,
        holder=(None if unseen is None else "?") if holder is None else holder.command,
        migratable=known.migratable,
        source=known.source,
        state=known.state,
        better_driver=better_driver(found),
        unseen=None if unseen is None else unseen.reason,
    )
    is_asked = open_closed or holder is not None or settings.fd is not None or settings.pid is not None
    # A driver that keeps one waiting for its state would do so for ever, whatever it is asked
    return _ask(closed, seen, settings, profile) if is_asked and known.state != NO_ANSWER else closed


def _ask(closed: DeviceInfo, seen: Snapshot, settings: Settings, profile: RfcProfile) -> DeviceInfo:
    """Add what only the open device says."""
    from vfio_mig.host.opening import open_device
    from vfio_mig.protocols.registry import detect, explain, spoken

    (found,) = seen.devices
    with open_device(
        found, pid=settings.pid, fd=settings.fd, via=settings.via, kvm=settings.kvm, view=seen.view
    ) as device:
        protocol = state = described = None
        try:
            speaks = detect(device, profile, settings.abi)
            protocol, state, described = speaks.name, speaks.state(), speaks.describe()
        except UnsupportedError:
            pass
        return replace(
            closed,
            how=device.how,
            flags=device.info().flags,
            regions=device.regions(),
            checks=explain(device, profile),
            protocol=protocol,
            described=described,
            speaks=spoken(device, profile),
            migratable=protocol is not None,
            source="device",
            state=state,
        )
