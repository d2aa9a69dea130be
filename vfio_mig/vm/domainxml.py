# SPDX-License-Identifier: MIT
"""What a libvirt domain's XML says of its VFIO devices and of its RAM."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from vfio_mig.errors import HostError, excerpt
from vfio_mig.host.discover import UUID

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

SIZE_MAX: Final = 4 << 20
"""Characters; libvirt itself takes no longer ones over the wire."""
DEVICES_MAX: Final = 4096
SHARED: Final = "shared"
PRIVATE: Final = "private"
SHARE: Final = (
    "put <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking> into its XML ('virsh edit'), "
    "shut it down and start it again"
)
"""How a domain gets RAM that other processes can have, too."""
_DOCUMENT_TYPE: Final = re.compile(r"<!\s*(?:DOCTYPE|ENTITY)", re.IGNORECASE)
_NUMBER: Final = re.compile(r"0x[0-9a-fA-F]{1,8}|[0-9]{1,8}")
_PCI_MAX: Final = (("domain", 0xFFFF_FFFF), ("bus", 0xFF), ("slot", 0x1F), ("function", 7))


class DomainXml(NamedTuple):
    """A domain as its XML describes it.

    :param devices: its VFIO devices, as this program names them.
    :param memory: ``shared`` if other processes can have its RAM, else ``private``.
    """

    name: str
    uuid: str
    devices: list[str]
    memory: str


def parse(text: str) -> DomainXml:
    """Take from a domain's XML what matters here.

    :raises HostError: it is not one, or names a device as libvirt does not.
    """
    # Of the standard library's parser: what its documentation warns of takes a document type, which libvirt never sends
    from xml.etree import ElementTree as ET

    if len(text) > SIZE_MAX or _DOCUMENT_TYPE.search(text):
        raise HostError("the domain's XML is not libvirt's: it is endless, or has a document type")
    try:
        root = ET.fromstring(text)  # noqa: S314
    except ET.ParseError as error:
        raise HostError(f"the domain's XML cannot be read: {error}") from error
    if root.tag != "domain":
        raise HostError(f"the domain's XML begins with {excerpt(root.tag)}")
    return DomainXml(
        (root.findtext("name") or "").strip(),
        (root.findtext("uuid") or "").strip().lower(),
        list(dict.fromkeys(_devices(root))),
        SHARED if _is_shared(root) else PRIVATE,
    )


def _devices(root: Element) -> list[str]:
    addresses = [
        *root.iterfind("./devices/hostdev[@mode='subsystem'][@type='mdev']/source/address"),
        *root.iterfind("./devices/hostdev[@mode='subsystem'][@type='pci']/source/address"),
        *root.iterfind("./devices/interface[@type='hostdev']/source/address[@type='pci']"),
    ]
    if len(addresses) > DEVICES_MAX:
        raise HostError(f"the domain's XML has {len(addresses)} host devices")
    return [_mdev(one) if "uuid" in one.attrib else _pci(one) for one in addresses]


def _mdev(address: Element) -> str:
    uuid = address.get("uuid", "").lower()
    if UUID.fullmatch(uuid) is None:
        raise HostError(f"the domain's XML has an mdev called {excerpt(uuid)}")
    return uuid


def _pci(address: Element) -> str:
    numbers = []
    for name, most in _PCI_MAX:
        text = address.get(name, "0")
        number = int(text, 0) if _NUMBER.fullmatch(text) and not re.fullmatch(r"0[0-9]+", text) else -1
        if not 0 <= number <= most:
            raise HostError(f"the domain's XML has a PCI device whose {name} is {excerpt(text)}")
        numbers.append(number)
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)


def _is_shared(root: Element) -> bool:
    """Tell whether all RAM is shared: of each NUMA cell, or memory module, that says so itself, and of the rest."""
    access = root.find("./memoryBacking/access")
    default = access is not None and access.get("mode") == SHARED
    cells = root.findall("./cpu/numa/cell")
    own = [one.get("memAccess") for one in cells]
    own += [one.get("access") for one in root.iterfind("./devices/memory")]
    said = [default if one is None else one == SHARED for one in own]
    return all(said) and (default or bool(cells))
