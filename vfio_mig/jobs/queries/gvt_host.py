# SPDX-License-Identifier: MIT
"""Is this a host for GVT-g's vGPUs, and what does it lack? Part of ``doctor``; on every other host it says nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Final, Literal

from vfio_mig.jobs.engine.session import GVT_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vfio_mig.host.discover import Host

Found = tuple[str, Literal["ok", "note", "problem"], str]
"""A check's name, result and text: what ``HostCheck`` is made of."""

_INTEL: Final = 0x8086
# i915_pciids.h, as is_supported_device() of i915's intel_gvt.c has the platforms; first and last number of each range.
_PLATFORMS: Final = {
    "Broadwell": ((0x1602, 0x163E),),
    "Skylake": ((0x1902, 0x193D),),
    "Broxton": ((0x0A84, 0x0A84), (0x1A84, 0x1A85), (0x5A84, 0x5A85)),
    "Kaby Lake": ((0x5902, 0x593B), (0x87C0, 0x87C0)),
    "Coffee Lake": ((0x3E90, 0x3EA9), (0x87CA, 0x87CA)),
    "Comet Lake": ((0x9B21, 0x9B41), (0x9BA2, 0x9BAC), (0x9BC2, 0x9BCC), (0x9BE6, 0x9BF6)),
}
_I915: Final = "sys/module/i915/parameters"
_KVMGT: Final = "sys/module/kvmgt"
_PACKAGE: Final = "vfio-mig-kvmgt-dkms"
_RELOAD: Final = "without vGPUs, as root: modprobe -r kvmgt; modprobe kvmgt"
_REASONS: Final = "var/lib/vfio-mig-kvmgt"  # tools/debian/kvmgt/rebuild
_MOK: Final = "var/lib/dkms/mok.pub"
# The UEFI specification's EFI_GLOBAL_VARIABLE; four bytes of attributes come before the value.
_SECURE_BOOT: Final = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_INTERFACES: Final = {
    "rfc": "the interface of the 2017 RFC",
    "v2": "migration protocol v2",
}
_APT_SECONDS: Final = 10


def platform_of(vendor: str, device: str) -> str | None:
    """Return the platform of a GPU that GVT-g supports, by what sysfs says of its PCI IDs; None for any other one.

    >>> platform_of("0x8086", "0x1912"), platform_of("0x8086", "0x8a50"), platform_of("0x10de", "0x1912")
    ('Skylake', None, None)
    """
    try:
        numbers = int(vendor, 16), int(device, 16)
    except ValueError:
        return None
    if numbers[0] != _INTEL:
        return None
    ranges = ((name, *one) for name, several in _PLATFORMS.items() for one in several)
    return next((name for name, first, last in ranges if first <= numbers[1] <= last), None)


def examine(host: Host) -> Iterator[Found]:
    """Yield what is found; nothing where no GPU has GVT-g and no kvmgt is loaded."""
    gpus = dict(_gpus(host))
    is_loaded = bool(host.names(_KVMGT))
    if not gpus and not is_loaded:
        return
    yield from _gpu(host, gpus)
    if not is_loaded and _is_off(host):
        return  # nobody wants vGPUs here, or the first step is still to be made
    yield from _guc(host)
    yield from _iommu(host)
    yield from _kvmgt(host, is_loaded=is_loaded)
    yield from _types(host)
    yield from _kvm(host)
    yield from _secure_boot(host)


def _gpus(host: Host) -> Iterator[tuple[str, str]]:
    for name in host.names("sys/bus/pci/devices"):
        directory = f"sys/bus/pci/devices/{name}"
        if host.read(directory, "class").startswith("0x03"):
            platform = platform_of(host.read(directory, "vendor"), host.read(directory, "device"))
            if platform is not None:
                yield name, platform


def _is_off(host: Host) -> bool:
    return host.read(_I915, "enable_gvt") not in {"Y", "1"} and not _offers(host)


def _offers(host: Host) -> list[str]:
    return [
        name
        for name in host.names("sys/class/mdev_bus")
        if any(one.startswith(GVT_TYPES) for one in host.names(f"sys/class/mdev_bus/{name}/mdev_supported_types"))
    ]


def _gpu(host: Host, gpus: dict[str, str]) -> Iterator[Found]:
    named = ", ".join(f"{name} ({platform})" for name, platform in gpus.items())
    if offers := _offers(host):
        yield "gvt", "ok", f"vGPUs on {named or ', '.join(offers)}"
    elif not gpus:
        yield "gvt", "note", "kvmgt is loaded, and no GPU here has GVT-g: it takes one of Broadwell to Comet Lake"
    elif _is_off(host):
        option = "options i915 enable_gvt=1"
        text = f"{named} can have vGPUs, and i915 was not told to: '{option}' in /etc/modprobe.d/i915.conf"
        yield "gvt", "note", f"{text}, update-initramfs -u, reboot"
    else:
        yield "gvt", "note", f"{named} offers no type of vGPU: load kvmgt, and see 'GVT' in dmesg"


def _guc(host: Host) -> Iterator[Found]:
    """Look for submission by firmware, with which i915 turns GVT-g off; -1, automatic, is none on these GPUs."""
    value = host.read(_I915, "enable_guc")
    if re.fullmatch(r"[0-9]{1,3}", value) and int(value) & 1:
        text = f"i915 has enable_guc={value}; GVT-g does not work with submission by the GuC: take the option away"
        yield "guc", "problem", text
    else:
        yield "guc", "ok", "i915 submits work by itself"


def _iommu(host: Host) -> Iterator[Found]:
    if host.names("sys/class/iommu"):
        yield "iommu", "ok", "the GPU reaches guest memory through it"
    else:
        yield "iommu", "note", "off; vGPUs do without, passing on whole devices takes intel_iommu=on"


def _kvmgt(host: Host, *, is_loaded: bool) -> Iterator[Found]:
    release = os.uname().release
    if not is_loaded:
        yield "kvmgt", "note", "not loaded; as root: modprobe kvmgt"
        return
    interface = host.read(_KVMGT, "parameters/migration")
    version = host.read(_KVMGT, "version") or "of an unknown version"
    if interface in _INTERFACES:
        yield "kvmgt", "ok", f"vfio_mig's, {version}: {_INTERFACES[interface]}"
    elif interface:
        text = f"vfio_mig's, {version}, with migration={interface}: 'options kvmgt migration=v2' in /etc/modprobe.d"
        yield "kvmgt", "note", f"{text}/kvmgt.conf, then, {_RELOAD}"
    elif _is_built(host, release):
        yield "kvmgt", "note", f"the distribution's, which cannot migrate; one that can is installed: {_RELOAD}"
    else:
        yield "kvmgt", "note", f"the distribution's: no vGPU can be migrated; {_how_to_build(host, release)}"
        yield from _source()


def _is_built(host: Host, release: str) -> bool:
    updates = f"lib/modules/{release}/updates"
    return any(
        name.startswith("kvmgt.ko") for place in ("dkms", "vfio-mig") for name in host.names(f"{updates}/{place}")
    )


def _how_to_build(host: Host, release: str) -> str:
    if reason := host.read(_REASONS, release):
        return f"{_PACKAGE} could not build one: {reason.splitlines()[0]} (/{_REASONS}/{release} has all of it)"
    return f"install {_PACKAGE}, or as root: scripts/kvmgt install"


def _source() -> Iterator[Found]:
    """Ask apt's lists for the source that the running kernel was built from; silent where there is no apt."""
    built_from = re.search(r"Debian (\S+)", os.uname().version)
    series = re.match(r"\d+\.\d+(?!\d)", os.uname().release)
    if built_from is None or series is None or shutil.which("apt-cache") is None:
        return
    package, version = f"linux-source-{series[0]}", built_from[1]
    try:
        done = subprocess.run(
            ["apt-cache", "madison", package],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_APT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return
    if version in re.findall(r"\|\s*(\S+)\s*\|", done.stdout):
        yield "source", "ok", f"{package}={version}"
    else:
        text = f"no package source has {package}={version}, which a kvmgt for this kernel is built from"
        yield "source", "note", f"{text}: apt-get update; if it stays so, install the newest kernel and reboot"


def _types(host: Host) -> Iterator[Found]:
    """Look for room: each type takes a part of the GPU's aperture and of its graphics memory."""
    from vfio_mig.host.mdev import types

    ours = [one for one in types(host) if one.type.startswith(GVT_TYPES)]
    if not ours:
        return
    left = ", ".join(f"{one.type} {one.available}" for one in ours)
    if any(one.available for one in ours):
        yield "types", "ok", f"how many more of each: {left}"
    else:
        text = "no vGPU more can be created"
        yield "types", "note", f"{text} ({left}): remove one, or give the GPU a larger aperture in the firmware's setup"


def _kvm(host: Host) -> Iterator[Found]:
    if not _offers(host):
        return
    if os.access(host.path("dev/kvm"), os.R_OK | os.W_OK):
        yield "kvm", "ok", "/dev/kvm"
        return
    is_there = os.path.lexists(host.path("dev/kvm"))
    what = "may not be opened by this user" if is_there else "is not there; load kvm_intel or kvm_amd"
    yield "kvm", "problem", f"kvmgt opens a vGPU only for a process with a KVM VM, and /dev/kvm {what}"


def _secure_boot(host: Host) -> Iterator[Found]:
    try:
        with open(host.path(_SECURE_BOOT), "rb") as file:
            is_on = file.read(5)[4:] == b"\1"
    except OSError:
        is_on = False
    if not is_on:
        yield "secure-boot", "ok", "off: modules need no signature"
    elif host.read(_KVMGT, "parameters/migration"):
        yield "secure-boot", "ok", "on, and the kvmgt that is loaded is signed with a key that is enrolled"
    elif os.path.exists(host.path(_MOK)):
        text = f"on; a kvmgt by dkms is loaded only once its key is enrolled: mokutil --test-key /{_MOK} tells"
        yield "secure-boot", "note", f"{text}, mokutil --import /{_MOK} and a reboot do it"
    else:
        yield "secure-boot", "note", f"on; {_PACKAGE} signs its kvmgt with dkms's key, which is then to be enrolled"
