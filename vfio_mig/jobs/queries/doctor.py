# SPDX-License-Identifier: MIT
"""Is this host fit for the work? What is missing, and what to do about it; no device is opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from vfio_mig.errors import UsageError, VfioMigError
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.host.discover import Host
    from vfio_mig.jobs.engine.session import Settings

OK: Final = "ok"
NOTE: Final = "note"
PROBLEM: Final = "problem"
Verdict = Literal["ok", "note", "problem"]
_CAP_SYS_PTRACE: Final = 19
_CAP_IPC_LOCK: Final = 14
_FILES_MIN: Final = 64
_HANGS: Final = ((6, 2), (7, 1))
"""First and last release in which STOP_COPY to PRE_COPY spins for ever, unless a stable update has the fix."""


class HostCheck(NamedTuple):
    """One check of the host.

    :param name: stable; scripts may rely on it.
    :param result: ``ok``, ``note`` (something does without it), or ``problem``.
    :param text: what was found, and what to do.
    """

    name: str
    result: Verdict
    text: str


@dataclass(frozen=True, kw_only=True)
class DoctorReport(Report):
    """What was found.

    :param problems: how many checks found one.
    """

    problems: int
    checks: list[HostCheck]


def examine_host(settings: Settings | None = None, *, root: str = "/") -> DoctorReport:
    """Examine this host.

    :param settings: its header is read, if it names one.
    :param root: what stands for ``/``, for tests.
    """
    from vfio_mig.host.discover import Host

    host = Host(root)
    checks = [
        *_kernel(),
        *_vfio(host),
        *_devices(host),
        *_gvt(host),
        *_borrowing(host),
        *_seeing(),
        *_limits(host),
        *_locks(),
        *_numbers(settings),
        *_modules(),
    ]
    return DoctorReport(problems=sum(one.result == PROBLEM for one in checks), checks=checks)


def _kernel() -> Iterator[HostCheck]:
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if _HANGS[0] <= version <= _HANGS[1]:
        text = f"{release}: may hang if a device goes from stop-copy to pre-copy; vfio-mig never asks for it"
        yield HostCheck("kernel", NOTE, f"{text}, other programs must not either")
    else:
        yield HostCheck("kernel", OK, release)


def _vfio(host: Host) -> Iterator[HostCheck]:
    has_container, has_iommufd = (os.path.exists(host.path("dev", name)) for name in ("vfio/vfio", "iommu"))
    if has_container or has_iommufd:
        yield HostCheck("vfio", OK, "/dev/vfio/vfio" if has_container else "/dev/iommu")
    else:
        yield HostCheck("vfio", PROBLEM, "neither /dev/vfio/vfio nor /dev/iommu; load a driver: modprobe vfio-pci")
    if has_container and not host.names("sys/module/vfio_iommu_type1"):
        yield HostCheck("type1", NOTE, "vfio_iommu_type1 is not a loaded module; if groups cannot be opened, load it")
    elif has_container:
        yield HostCheck("type1", OK, "vfio_iommu_type1")
    cdevs = host.names("dev/vfio/devices")
    if has_iommufd:
        yield HostCheck("iommufd", OK, f"/dev/iommu, and {len(cdevs)} devices with nodes of their own")
    else:
        yield HostCheck("iommufd", NOTE, "this kernel has none; devices are opened through their groups")
    if host.names("sys/kernel/debug/vfio"):
        yield HostCheck("debugfs", OK, "states are shown without opening a device")
    else:
        yield HostCheck("debugfs", NOTE, "none for VFIO (or not for this user): only an open device tells its state")


def _devices(host: Host) -> Iterator[HostCheck]:
    devices = host.devices()
    parents = host.names("sys/class/mdev_bus")
    if devices:
        yield HostCheck("devices", OK, f"{len(devices)}: see 'vfio-mig list'")
    elif parents:
        yield HostCheck("devices", NOTE, "no mdev yet: see 'vfio-mig mdev types' and 'vfio-mig mdev create'")
    else:
        yield HostCheck("devices", NOTE, "no device is bound to a VFIO driver, and there is no mdev parent")
    for one in devices:
        nodes = [node for node in (one.node, one.cdev) if node is not None]
        paths = [host.path(node.lstrip("/")) for node in nodes]
        if any(os.access(path, os.R_OK | os.W_OK) for path in paths):
            continue
        if any(os.path.lexists(path) for path in paths):
            what = (
                f"this user may not open {' or '.join(nodes)}; {'run as root' if os.geteuid() else 'what forbids it?'}"
            )
        elif nodes:
            what = f"{' and '.join(nodes)} {'is' if len(nodes) == 1 else 'are'} not there; is udev running?"
        else:
            what = "it has neither a group nor a node of its own; is its VFIO driver loaded?"
        yield HostCheck("node", PROBLEM, f"{one.name}: {what}")


def _gvt(host: Host) -> Iterator[HostCheck]:
    from vfio_mig.jobs.queries.gvt_host import examine

    yield from (HostCheck(*one) for one in examine(host))


def _capabilities(host: Host) -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]{1,16})$", host.read("proc/self/status"), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _borrowing(host: Host) -> Iterator[HostCheck]:
    scope = host.read("proc/sys/kernel/yama/ptrace_scope")
    if scope == "3":
        text = "Yama's ptrace_scope is 3: nothing can be borrowed from another process, until a reboot without it"
        yield HostCheck("borrowing", PROBLEM, text)
    elif _capabilities(host) >> _CAP_SYS_PTRACE & 1:
        yield HostCheck("borrowing", OK, "CAP_SYS_PTRACE is there")
    else:
        text = "without CAP_SYS_PTRACE only this user's own processes can be borrowed from"
        yield HostCheck("borrowing", NOTE, f"{text}; ptrace_scope is {scope or 'not there'} (docs/privileges.md)")


def _seeing() -> Iterator[HostCheck]:
    from vfio_mig import proc
    from vfio_mig.host.holders import blind_spot

    unseen = blind_spot(proc.standing())
    if unseen is None:
        yield HostCheck("holders", OK, "every process can be seen")
    else:
        yield HostCheck("holders", NOTE, f"who has a device open is not always known: {unseen.reason}; {unseen.hint}")


def _limits(host: Host) -> Iterator[HostCheck]:
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= _FILES_MIN
    text = f"{files} open files" if enough else f"only {files} open files: a data fd may be lost; ulimit -n 64"
    yield HostCheck("files", OK if enough else PROBLEM, text)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY or _capabilities(host) >> _CAP_IPC_LOCK & 1:
        yield HostCheck("memlock", OK, "guest memory of any size can be mapped for a device")
    else:
        yield HostCheck("memlock", NOTE, f"'hold --memory' can map {locked} bytes; 'ulimit -l' raises that")


def _locks() -> Iterator[HostCheck]:
    from vfio_mig.host.lock import HINT, directory_problem, lock_directory

    directory = lock_directory()
    if problem := directory_problem():
        yield HostCheck("locks", PROBLEM, problem)
        return
    nearest = directory if os.path.isdir(directory) else os.path.dirname(directory)
    if os.access(nearest, os.W_OK | os.X_OK):
        yield HostCheck("locks", OK, directory)
    else:
        yield HostCheck("locks", PROBLEM, f"{directory} cannot be written; {HINT}")


def _numbers(settings: Settings | None) -> Iterator[HostCheck]:
    from vfio_mig.jobs.engine.session import Settings, load_numbers

    settings = settings or Settings()
    try:
        profile = load_numbers(settings)
    except (UsageError, VfioMigError) as error:
        yield HostCheck("numbers", PROBLEM, str(error))
        return
    text = f"of the 2017 RFC: {profile.source}"
    if settings.uapi_header is None:
        yield HostCheck("numbers", NOTE, f"{text}; --uapi-header takes those of a patched kernel")
    else:
        yield HostCheck("numbers", OK, text)


def _modules() -> Iterator[HostCheck]:
    from importlib.util import find_spec

    missing: tuple[tuple[str, Verdict, str], ...] = (
        ("numpy", PROBLEM, "dirty pages cannot be copied"),
        ("matplotlib", NOTE, "--plot draws nothing; pip install 'vfio_mig[plot]', or Debian's python3-matplotlib"),
    )
    for name, result, use in missing:
        there = find_spec(name) is not None
        yield HostCheck(name, OK if there else result, "installed" if there else f"not installed: {use}")
