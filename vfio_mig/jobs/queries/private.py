# SPDX-License-Identifier: MIT
"""Take out of a text what others need not know of a host and its people; part of ``doctor --report``.

Two fences, one behind the other: ``host_report`` collects what it names and nothing else, and all of that goes through
here, as a value may hold what nobody has thought of.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

UUID: Final = "UUID"
PCI: Final = "PCI address"
NETWORK: Final = "network address"
HOME: Final = "path in a home directory"
NUMBER: Final = "long number"
HOST: Final = "host name"
USER: Final = "user name"
_SHORTEST: Final = 2
"""A name of one letter is in every word; there is nothing to be known from it either."""
_EVERYBODY_S: Final = frozenset({"root", "localhost"})
_PATTERNS: Final = (
    (UUID, r"(?i)\b[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}\b"),
    (PCI, r"(?i)\b(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b"),
    # what the kernel calls such a device in a path: pci0000:00
    (PCI, r"(?i)\bpci[0-9a-f]{4,8}:[0-9a-f]{2}\b"),
    (NETWORK, r"(?i)\b[0-9a-f]{2}(?:[:-][0-9a-f]{2}){5}\b"),
    (NETWORK, r"(?<![\w.+~-])(?:\d{1,3}\.){3}\d{1,3}(?![\w.+~-]|\.\d)"),
    (NETWORK, r"(?i)(?<![\w:.])(?=[0-9a-f]*:[0-9a-f]*:)[0-9a-f:]{3,45}(?![\w:])"),
    (NETWORK, r"\b[\w.+-]{1,64}@[\w.-]{1,253}\b"),
    (HOME, r"(?<![\w.])(?:/home|/root|/var/home|/Users|/run/user)(?:/[^\s'\":;,)]*|(?![\w-]))"),
    (NUMBER, r"(?i)\b(?:0x)?[0-9a-f]{17,}\b"),
)


class Scrubber:
    """Replaces what is private by its kind in angle brackets, and counts how often.

    :param hosts: this host's names.
    :param users: its people's names.

    >>> scrub = Scrubber(hosts=["anna-pc.example.org"], users=["anna"])
    >>> scrub("anna-pc: /home/anna/vfio.h for 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001 on 0000:00:02.0")
    '<host name>: <path in a home directory> for <UUID> on <PCI address>'
    >>> scrub("Linux 6.12.117+deb12-amd64, i915-GVTg_V5_4, 0x1912, srcversion 94D1D6C6C0E6AD0A4C5A0B1")
    'Linux 6.12.117+deb12-amd64, i915-GVTg_V5_4, 0x1912, srcversion <long number>'
    >>> scrub.counts["UUID"], scrub.counts["host name"]
    (1, 1)
    """

    def __init__(self, *, hosts: list[str], users: list[str]) -> None:
        names = {HOST: [*hosts, *(one.partition(".")[0] for one in hosts)], USER: users}
        self._rules: Final = [
            *((kind, re.compile(pattern)) for kind, pattern in _PATTERNS),
            *((kind, _any_of(found)) for kind, found in names.items() if any(map(_can_be_told, found))),
        ]
        self.counts: Final[dict[str, int]] = dict.fromkeys([*(kind for kind, _ in _PATTERNS), HOST, USER], 0)

    def __call__(self, text: str) -> str:
        """Return the text without them."""
        for kind, rule in self._rules:
            text, found = rule.subn(f"<{kind}>", text)
            self.counts[kind] += found
        return text


def _can_be_told(name: str) -> bool:
    return len(name) >= _SHORTEST and name not in _EVERYBODY_S


def _any_of(names: list[str]) -> re.Pattern[str]:
    """Match any of these names, but not in the middle of a word; the longest first."""
    words = sorted({re.escape(one) for one in names if _can_be_told(one)}, key=len, reverse=True)
    return re.compile(rf"(?i)(?<![a-z0-9])(?:{'|'.join(words)})(?![a-z0-9])")


def of_this_host() -> Scrubber:
    """Return a scrubber that knows this host and whoever uses it."""
    return Scrubber(hosts=[os.uname().nodename], users=sorted({*_users()}))


def _users() -> Iterator[str]:
    """Yield the names of the user, of who became root by sudo or doas, and of all who have a home here."""
    import pwd

    for variable in ("USER", "LOGNAME", "SUDO_USER", "DOAS_USER"):
        yield os.environ.get(variable, "")
    for one in pwd.getpwall():
        if one.pw_dir.startswith(("/home/", "/var/home/")):
            yield one.pw_name
            yield one.pw_dir.rpartition("/")[2]
            yield one.pw_gecos.partition(",")[0]
