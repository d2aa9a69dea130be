# SPDX-License-Identifier: MIT
"""What a report of a fault, or of a success, on real hardware has to say of the host; part of ``doctor``.

It names what it takes, and takes nothing else: no log, no process, no list of what is installed. All of it goes through
``private`` besides. No device is opened.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vfio_mig.errors import UsageError, errno_text
from vfio_mig.jobs.queries.doctor import HostCheck, examine_host
from vfio_mig.jobs.queries.gvt_host import platform_of
from vfio_mig.jobs.queries.private import of_this_host
from vfio_mig.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.host.discover import Host
    from vfio_mig.jobs.engine.session import Settings
    from vfio_mig.jobs.queries.private import Scrubber

UNKNOWN: Final = "unknown"
_VALUE_MAX: Final = 200
_CONFORM_MAX: Final = 1 << 20
_CHECKS_MAX: Final = 1000
_SRCVERSION_SHOWN: Final = 12
"""Digits of a module's srcversion: enough to tell two apart."""
_DISPLAY: Final = "0x03"
_BARS: Final = 6
_MEMORY_BAR: Final = 0x200
_OUTCOMES: Final = frozenset({"pass", "fail", "warn", "skip"})
_WORD: Final = re.compile(r"[\w.,:+-]{1,64}")
_OPTION: Final = re.compile(
    r"((?:i915|kvmgt|kvm|kvm_intel|vfio\w*|mdev|intel_iommu|iommu|intremap|module_blacklist|modprobe\.blacklist)"
    r"(?:\.\w{1,40})?)=([\w.,:+-]{1,64})"
)
_FIRMWARE: Final = (
    ("firmware", "bios_vendor"), ("firmware version", "bios_version"), ("firmware date", "bios_date"),
    ("maker", "sys_vendor"), ("model", "product_name"), ("board", "board_name"),
)  # fmt: skip
"""Of /sys/class/dmi/id; what has numbers of one machine is not among them."""
_I915: Final = ("enable_gvt", "enable_guc", "enable_psr", "enable_fbc", "enable_dc", "enable_ppgtt")
_MODULES: Final = (
    ("i915", ()),
    ("kvmgt", ("migration",)),
    ("mdev", ()),
    ("kvm", ()),
    ("kvm_intel", ("nested", "ept")),
    ("vfio", ()),
    ("vfio_iommu_type1", ("allow_unsafe_interrupts", "dma_entry_limit")),
    ("vfio_pci", ()),
)


class Fact(NamedTuple):
    """One thing that is known of the host.

    :param section: what it is about.
    :param name: what it is.
    :param value: as it was found; ``unknown`` if it could not be told.
    """

    section: str
    name: str
    value: str


@dataclass(frozen=True, kw_only=True)
class HostReport(Report):
    """What somebody who cannot see the host has to know of it.

    :param problems: how many checks found one.
    :param facts: of the tool, the kernel, the GPU, its driver, IOMMU and KVM.
    :param checks: what ``doctor`` finds.
    :param conform: the outcome of each check of ``conform``, of the report that was given; empty without one.
    :param left_out: how often something private of each kind was taken out of a text.
    """

    problems: int
    facts: list[Fact]
    checks: list[HostCheck]
    conform: list[Fact]
    left_out: dict[str, int]


def report_host(settings: Settings | None = None, *, conform: str | None = None, root: str = "/") -> HostReport:
    """Collect what belongs into a report on this host.

    :param conform: a file with what ``vfio-mig --json conform`` has printed.
    :param root: what stands for ``/``, for tests.
    :raises UsageError: the file cannot be read, or is none of conform's.
    """
    from vfio_mig.host.discover import Host

    of_conform = [] if conform is None else list(_conform(conform))
    host, scrub = Host(root), of_this_host()
    found = examine_host(settings, root=root)
    facts = [*_tool(), *_kernel(host), *_machine(host), *_gpus(host), *_modules(host), *_gvt(host), *_kvm(host)]
    return HostReport(
        problems=found.problems,
        facts=[_clean(one, scrub) for one in facts],
        checks=[HostCheck(one.name, one.result, scrub(one.text)) for one in found.checks],
        conform=[_clean(one, scrub) for one in of_conform],
        left_out=scrub.counts,
    )


def _clean(fact: Fact, scrub: Scrubber) -> Fact:
    value = " ".join(fact.value.split())
    return Fact(fact.section, scrub(fact.name), scrub(value[:_VALUE_MAX]) or UNKNOWN)


def _tool() -> Iterator[Fact]:
    from vfio_mig.version import __version__

    yield Fact("tool", "vfio-mig", __version__)
    yield Fact("tool", "python", platform.python_version())


def _kernel(host: Host) -> Iterator[Fact]:
    names = os.uname()
    release = re.search(r'^PRETTY_NAME="?([^"\n]*)', host.read("etc/os-release"), re.MULTILINE)
    yield Fact("kernel", "distribution", release[1] if release else UNKNOWN)
    yield Fact("kernel", "release", names.release)
    yield Fact("kernel", "build", names.version)
    yield Fact("kernel", "machine", names.machine)
    yield Fact("kernel", "tainted", host.read("proc/sys/kernel/tainted"))
    for option in host.read("proc/cmdline").split():
        if known := _OPTION.fullmatch(option):
            yield Fact("kernel", f"option {known[1]}", known[2])


def _machine(host: Host) -> Iterator[Fact]:
    for name, file in _FIRMWARE:
        yield Fact("machine", name, host.read("sys/class/dmi/id", file))
    cpu = host.read("proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", cpu, re.MULTILINE)
    yield Fact("machine", "CPU", model[1] if model else UNKNOWN)
    flags = re.search(r"^flags\s*:\s*(.*)$", cpu, re.MULTILINE)
    yield Fact("machine", "virtual", UNKNOWN if flags is None else "yes" if "hypervisor" in flags[1].split() else "no")
    units = host.names("sys/class/iommu")
    yield Fact("machine", "IOMMU", f"{len(units)} units" if units else "none, or off")


def _gpus(host: Host) -> Iterator[Fact]:
    displays = [
        name
        for name in host.names("sys/bus/pci/devices")
        if host.read("sys/bus/pci/devices", name, "class").startswith(_DISPLAY)
    ]
    for number, name in enumerate(displays, 1):
        section, directory = f"GPU {number}", f"sys/bus/pci/devices/{name}"
        vendor, device = host.read(directory, "vendor"), host.read(directory, "device")
        yield Fact(section, "PCI IDs", f"{vendor or UNKNOWN} {device or UNKNOWN}")
        yield Fact(section, "generation of GVT-g", platform_of(vendor, device) or "none that is known")
        yield Fact(section, "revision", host.read(directory, "revision"))
        yield Fact(section, "driver", host.link(directory, "driver") or "none")
        yield Fact(section, "BARs", ", ".join(_bars(host.read(directory, "resource"))) or UNKNOWN)


def _bars(resource: str) -> Iterator[str]:
    """Yield the sizes of the memory BARs, and not where they are."""
    for number, line in enumerate(resource.splitlines()[:_BARS]):
        words = re.fullmatch(r"0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16})", line)
        if words is None:
            return
        first, last, flags = (int(word, 16) for word in words.groups())
        if flags & _MEMORY_BAR and last > first:
            yield f"{number}: {(last - first + 1) >> 10} KiB"


def _modules(host: Host) -> Iterator[Fact]:
    for name, parameters in _MODULES:
        directory = f"sys/module/{name}"
        if not host.names(directory):
            yield Fact("modules", name, "not there")
            continue
        parts = ["loaded" if host.read(directory, "initstate") else "built in"]
        if version := host.read(directory, "version"):
            parts.append(f"version {version}")
        if source := host.read(directory, "srcversion"):
            parts.append(f"srcversion {source[:_SRCVERSION_SHOWN]}…")
        if taint := host.read(directory, "taint"):
            parts.append(f"taints with {taint}")
        values = ((one, host.read(directory, "parameters", one)) for one in parameters)
        parts += [f"{one}={value}" for one, value in values if value]
        yield Fact("modules", name, ", ".join(parts))
    for one in _I915:
        if value := host.read("sys/module/i915/parameters", one):
            yield Fact("modules", f"i915's {one}", value)


def _gvt(host: Host) -> Iterator[Fact]:
    from vfio_mig.host.mdev import types

    interface = host.read("sys/module/kvmgt/parameters/migration")
    whose = "vfio_mig's" if interface else "not vfio_mig's: it has no parameter of that name"
    if host.names("sys/module/kvmgt"):
        yield Fact("vGPUs", "whose kvmgt", whose)
        yield Fact("vGPUs", "interface", interface or "none of vfio_mig's; another one is not known by this")
    devices = host.devices()
    for one in types(host):
        has = sum(made.type == one.type for made in devices)
        yield Fact("vGPUs", one.type, f"{has} made, room for {one.available}; {_described(one.description)}")
    for driver in sorted({one.driver for one in devices}):
        yield Fact("vGPUs", f"devices of {driver or 'no driver'}", str(sum(one.driver == driver for one in devices)))


def _described(text: str) -> str:
    """Join the lines of a type's description: memory, fences, resolution, weight."""
    return ", ".join(line.strip() for line in text.splitlines() if line.strip()) or "not described"


def _kvm(host: Host) -> Iterator[Fact]:
    yield Fact("KVM", "/dev/kvm", "there" if os.path.lexists(host.path("dev/kvm")) else "not there")
    yield Fact("KVM", "VFIO", ", ".join(one for one in ("vfio/vfio", "iommu") if _is_there(host, one)) or "no node")


def _is_there(host: Host, node: str) -> bool:
    return os.path.lexists(host.path("dev", node))


def _conform(file: str) -> Iterator[Fact]:
    """Take of conform's report the outcomes by name, and what it ran on; nothing that a driver has said in words."""
    report = _json_object(file)
    for name in ("type", "driver", "protocol", "kernel"):
        value = report.get(name)
        fits = isinstance(value, str) and _WORD.fullmatch(value)
        yield Fact("conform", name, str(value) if fits else UNKNOWN)
    checks = report.get("checks")
    if not isinstance(checks, list) or len(checks) > _CHECKS_MAX:
        raise UsageError(f"{file}: it is no report of conform's", hint="make one with 'vfio-mig --json conform DEVICE'")
    for one in checks:
        found = one if isinstance(one, dict) else {}
        identity, outcome = found.get("id"), found.get("outcome")
        if not (isinstance(identity, str) and _WORD.fullmatch(identity) and outcome in _OUTCOMES):
            text = f"{file}: one of its checks has no name or no outcome of conform's"
            raise UsageError(text, hint="make one with 'vfio-mig --json conform DEVICE'")
        yield Fact("conform", identity, str(outcome))


def _json_object(file: str) -> dict[str, Any]:
    import json

    try:
        with open(file, "rb") as opened:
            data = opened.read(_CONFORM_MAX + 1)
    except OSError as error:
        raise UsageError(f"{file}: cannot read: {errno_text(error.errno or 0)}") from error
    hint = "make one with 'vfio-mig --json conform DEVICE'"
    if len(data) > _CONFORM_MAX:
        raise UsageError(f"{file}: it is larger than a report of conform's is", hint=hint)
    try:
        report = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: it is not JSON", hint=hint) from error
    if not isinstance(report, dict):
        raise UsageError(f"{file}: it is no report of conform's", hint=hint)
    return report
