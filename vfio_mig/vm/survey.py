# SPDX-License-Identifier: MIT
"""``vm list``: which VMs there are, their devices and RAM, and why one cannot be saved."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig import proc
from vfio_mig.errors import HostError, VfioMigError, printable
from vfio_mig.jobs.control import device_status
from vfio_mig.jobs.engine.session import survey
from vfio_mig.report import Report
from vfio_mig.vm.domainxml import PRIVATE, SHARE, SHARED, parse
from vfio_mig.vm.memory import read_maps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vfio_mig.host.discover import Snapshot
    from vfio_mig.vm.connection import Connection

UNKNOWN: Final = "unknown"
MAINLINE: Final = "mainline-v2"
_NO_PROTOCOL: Final = "no migration protocol"
_LISTENS: Final = 0x10000
"""__SO_ACCEPTCON in <linux/net.h>, in the flags of /proc/net/unix."""
_UNIX_LINE: Final = re.compile(r"^\S+ \S+ \S+ ([0-9A-F]{8}) \S+ \S+ +(\d+) (/.*)$")
_UNIX_MAX: Final = 32 << 20
_READ_WRITE: Final = re.compile(r"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) rw-([sp]) \S+ \S+ \S+ *(.*)$")
_NO_RAM: Final = ("[", "anon_inode:", "/dev/vfio/")
_STATES: Final = (
    "no state", "running", "running", "paused", "in shutdown", "shut off", "crashed", "pmsuspended",
)  # fmt: skip
"""virDomainState, in virsh's words; a blocked domain runs."""


class VmDevice(NamedTuple):
    """A VFIO device of a VM.

    :param protocol: by which it migrates, None when it has none, or when nobody has it open or it could not be asked.
    """

    device: str
    protocol: str | None


@dataclass(frozen=True, kw_only=True)
class VmRow(Report):
    """A VM.

    :param vm: how the other commands name it: the domain, or the path of a QMP socket; None for a process of which no
        monitor is known.
    :param pid: of the process that has its devices open, None when there is none that is seen.
    :param command: the kernel's name of that.
    :param state: of a domain in virsh's words, at a QMP socket in QEMU's; ``unknown`` when nobody was asked.
    :param memory: whether other processes can have its RAM: ``shared``, ``private``, or ``unknown``.
    :param sockets: UNIX sockets that the process listens on; its QMP socket is one of them if it has any.
    :param notes: why it cannot be saved, or only in part; a sentence each.
    """

    vm: str | None
    pid: int | None
    command: str | None
    state: str
    memory: str
    devices: list[VmDevice]
    sockets: list[str]
    notes: list[str]


def list_vms(names: Sequence[str] = (), *, connect: str | None = None) -> list[VmRow]:
    """Return the VMs of this host: processes with VFIO devices, or with *connect* the domains of a libvirt.

    :param names: only these: paths of QMP sockets, or domains.
    :param connect: a URI of libvirt's; one of another host tells less.
    :raises OpenError: nobody answers there.
    """
    if connect is not None:
        return _domains(connect, names)
    if names:
        return [_at_socket(name) for name in names]
    return _processes(survey())


def _processes(seen: Snapshot) -> list[VmRow]:
    """Return who has VFIO devices open, ``vfio-mig`` itself left out."""
    by_pid: dict[int, list[str]] = {}
    commands: dict[int, str] = {}
    for found in seen.devices:
        holder = seen.holder_of(found)
        if holder is not None and not holder.is_hold:
            by_pid.setdefault(holder.pid, []).append(found.name)
            commands[holder.pid] = holder.command
    return [_row(None, pid, commands[pid], UNKNOWN, devices) for pid, devices in by_pid.items()]


def _row(vm: str | None, pid: int | None, command: str | None, state: str, devices: Iterable[str]) -> VmRow:
    """Return a VM whose process is known, or that has none."""
    row = VmRow(
        vm=vm, pid=pid, command=command, state=state,
        memory=UNKNOWN if pid is None else memory_kind(pid), devices=[], sockets=[] if pid is None else listens(pid),
        notes=[],
    )  # fmt: skip
    for name in devices:
        row = _with_device(row, name)
    if row.memory == PRIVATE:
        row.notes.append("its RAM is private: only the state of a device can be saved, with --memory none")
    return row


def _with_device(row: VmRow, name: str) -> VmRow:
    """Add a device, and what stands in its way."""
    protocol = None
    notes = list(row.notes)
    try:
        status = device_status(name)
    except VfioMigError as error:
        notes.append(str(error))
    else:
        protocol = status.protocol
        if status.holder_pid is not None and status.migratable is False:
            notes.append(f"{name}: {_NO_PROTOCOL}: nothing can save it; 'vfio-mig info {name}' says why")
        elif protocol not in {None, MAINLINE}:
            notes.append(
                f"{name}: it speaks {protocol}, so QEMU and libvirt can neither migrate nor save the VM; "
                "'vfio-mig vm save' can"
            )
    return replace(row, devices=[*row.devices, VmDevice(name, protocol)], notes=notes)


def _at_socket(path: str) -> VmRow:
    """Ask the QEMU behind a QMP socket."""
    from vfio_mig.vm.machine import run_state, vfio_devices
    from vfio_mig.vm.qmp import Qmp

    with Qmp(path) as qmp:
        state, names, pid = run_state(qmp), [one.name for one in vfio_devices(qmp)], qmp.pid
    command = printable(proc.command(pid)) if pid else None
    row = _row(path, pid or None, command, state, filter(None, names))
    if not all(names):
        row.notes.append("QEMU was given a device by its fd, and cannot tell which one: see 'vfio-mig list'")
    return row


def _domains(uri: str, names: Sequence[str]) -> list[VmRow]:
    from vfio_mig.vm.connection import Connection

    with Connection(uri) as connection:
        found = [connection.find(name) for name in names] if names else connection.domains()
        seen = None if connection.is_remote else survey()
        return sorted((_domain(connection, one, seen) for one in found), key=lambda row: row.vm or "")


def _domain(connection: Connection, domain: Any, seen: Snapshot | None) -> VmRow:
    """Return a domain as its XML has it, compared with what the kernel says where it is this host's.

    :param seen: who has devices open here, None when the domain may be on another host.
    """
    xml = parse(connection.call(domain.XMLDesc, 0))
    number = connection.call(domain.state)[0]
    state = _STATES[number] if 0 <= number < len(_STATES) else UNKNOWN
    name = printable(connection.call(domain.name))
    if seen is None or not connection.call(domain.isActive):
        devices = [VmDevice(one, None) for one in xml.devices]
        row = VmRow(
            vm=name, pid=None, command=None, state=state, memory=xml.memory, devices=devices, sockets=[], notes=[]
        )
        if xml.memory == PRIVATE and devices:
            row.notes.append(_private())
        return row
    return _running(name, state, xml.devices, xml.memory, seen)


def _running(name: str, state: str, devices: list[str], memory: str, seen: Snapshot) -> VmRow:
    """Return a domain that runs here."""
    holders = {one.name: seen.holder_of(one) for one in seen.devices}
    open_in = {one: holders.get(one) for one in devices}
    pids = {holder.pid for holder in open_in.values() if holder is not None}
    if len(pids) != 1:
        row = _row(name, None, None, state, devices)
        row.notes.extend(f"{one}: nobody that is seen from here has it open" for one, by in open_in.items() if not by)
        if len(pids) > 1:
            row.notes.append(f"its devices are open in several processes: {', '.join(map(str, sorted(pids)))}")
        return replace(row, memory=memory)
    pid = pids.pop()
    command = next(holder.command for holder in open_in.values() if holder is not None)
    row = _row(name, pid, command, state, devices)
    notes = [_private() if note.startswith("its RAM is private") else note for note in row.notes]
    if row.memory not in {memory, UNKNOWN}:
        notes.append(f"its RAM is {memory} by its XML, and {row.memory} by the kernel")
    return replace(row, notes=notes, sockets=[])  # its monitor is libvirt's


def _private() -> str:
    return f"its RAM is private: only the state of a device can be saved, with --memory none; to save pages, {SHARE}"


def memory_kind(pid: int) -> str:
    """Tell whether a VMM's guest RAM is shared, by the largest of what it has mapped to read and write.

    :returns: ``shared``, ``private``, or ``unknown`` when we may not look.
    """
    try:
        return kind_of_largest(read_maps(pid))
    except (OSError, HostError):
        return UNKNOWN


def kind_of_largest(maps: str) -> str:
    r"""Take that from ``/proc/PID/maps``; what can be executed is an emulator's own code, and a device is no RAM.

    >>> kind_of_largest("1000-9000 rwxp 0 00:00 0\n1000-2000 rw-s 0 00:01 7 /memfd:ram")
    'shared'
    """
    largest, kind = 0, UNKNOWN
    for line in maps.splitlines():
        match = _READ_WRITE.match(line)
        if match is None or match[4].startswith(_NO_RAM):
            continue
        size = int(match[2], 16) - int(match[1], 16)
        if size > largest:
            largest, kind = size, SHARED if match[3] == "s" else PRIVATE
    return kind


def listens(pid: int) -> list[str]:
    """Return the paths of the UNIX sockets that a process listens on, as many as can be seen."""
    try:
        links = {link for _, link in proc.links(proc.fd_directory(pid))}
        with open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(_UNIX_MAX)
    except OSError:
        return []
    return listening(text, links)


def listening(text: str, links: set[str]) -> list[str]:
    """Take from /proc/net/unix the paths at which sockets listen that are among these links of fds."""
    found = []
    for line in text.splitlines():
        match = _UNIX_LINE.match(line)
        if match is not None and int(match[1], 16) & _LISTENS and f"socket:[{match[2]}]" in links:
            found.append(printable(match[3]))
    return sorted(found)
