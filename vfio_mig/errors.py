# SPDX-License-Identifier: MIT
"""What can go wrong, as one exception tree.

::

    VfioMigError
    ├── UsageError             2  the request makes no sense as it is worded
    ├── OpenError              3  the device cannot be reached
    │   ├── DeviceNotFoundError
    │   └── DeviceBusyError
    ├── UnsupportedError       4  the device does not do this
    ├── DeviceError            5  the device or the kernel failed
    ├── ImageError             6  the bytes are not a whole, well-formed image
    │   └── MismatchError         ... or do not fit this device
    ├── HostError              7  disk, memory or permissions of this host
    └── InterruptedJobError  130  a signal ended the job, which has rolled back

``str()`` of each is the one line for the user, without the program's name: ``device: problem; hint``.
"""

import errno as errno_names
import os
import reprlib
import sys
from typing import Any, ClassVar, Final

_PACKAGE: Final = os.path.dirname(__file__) + os.sep
_CAUSES_MAX: Final = 8
"""How far back an errno is looked for."""


def errno_text(number: int) -> str:
    """Say an errno by name and in words: ``EBUSY (Device or resource busy)``."""
    return f"{errno_names.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"


def right_hint(otherwise: str = "") -> str:
    """Say how to get a right that is missing; root is not told to become root.

    :param otherwise: what helps as well: ``give this user /dev/kvm``.
    """
    if os.geteuid():
        return f"run as root, or {otherwise}" if otherwise else "run as root"
    return "root lacks the right here: a container's device cgroup, a user namespace or an LSM withholds it"


def printable(text: str) -> str:
    """Return text with everything escaped that would break a line, speak to a terminal, or not be encoded at all."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def json_text(value: object, indent: int | None = 2) -> str:
    """Return JSON that is safe to print: ASCII alone, and no control character, also not DEL, which JSON lets pass."""
    import json

    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")


def excerpt(value: object) -> str:
    """Return the repr of something from a file, shortened: it may be of any length and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


class VfioMigError(Exception):
    """Base of everything that this package raises on purpose; never raised itself.

    :param problem: what failed, without a full stop.
    :param device: the name of the device it failed on.
    :param hint: what to do next.
    """

    exit_code: ClassVar[int]

    def __init__(self, problem: str, *, device: str | None = None, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.device = device
        self.hint = hint
        self.undo_errors: list[BaseException] = []
        """What failed in addition while the job rolled back; the first error is the one reported."""
        self.consequences: list[str] = []
        """What the failure has left behind that could not be undone, a clause each."""

    def __str__(self) -> str:
        text = self.problem if self.device is None else f"{self.device}: {self.problem}"
        for consequence in self.consequences:
            text += f"; {consequence}"
        for error in self.undo_errors:
            text += f"; while rolling back: {error}"
        if self.hint is not None:
            text = f"{text}; {self.hint}"
        return printable(text)  # one line, whatever a file is called

    def as_dict(self) -> dict[str, Any]:
        """Return it for programs: what ``--json`` prints of a failure.

        :returns: ``class``, ``code`` (the exit code), ``message`` (the one line), ``problem``, ``hint``, ``device``,
            ``errno`` (the name of the kernel's error number), ``consequences`` (what could not be undone) and
            ``while_rolling_back``, the errors of the undoing.
        """
        return {
            "class": type(self).__name__,
            "code": self.exit_code,
            "message": str(self),
            "problem": printable(self.problem),
            "hint": None if self.hint is None else printable(self.hint),
            "device": None if self.device is None else printable(self.device),
            "errno": _errno_in(self),
            "consequences": [printable(text) for text in self.consequences],
            "while_rolling_back": [printable(str(error)) for error in self.undo_errors],
        }


def _errno_in(error: VfioMigError) -> str | None:
    """Return the name of the errno that is behind an error, None if there is none."""
    cause: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        number = getattr(cause, "errno", None)
        if isinstance(number, int) and number > 0:
            return errno_names.errorcode.get(number)
        cause = None if cause is None else cause.__cause__
    import re

    said = re.search(r"\b(E[A-Z0-9]+) \(", error.problem)  # as errno_text() does, of what another process met
    return said[1] if said is not None and said[1] in errno_names.errorcode.values() else None


class VfioMigWarning(UserWarning):
    """What the user of the library must read, and what is not a failure. A ``Settings.warn`` gets it in its place."""


def warn(text: str) -> None:
    """Warn whoever called this package, at their line: ``warnings`` decides what becomes of it."""
    import warnings

    level, frame = 2, sys._getframe(1)  # noqa: SLF001 -- as warnings does with its skip_file_prefixes, from 3.12 on
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(text), VfioMigWarning, stacklevel=level)


class UsageError(VfioMigError):
    """The request makes no sense as it is worded: bad syntax, contradicting options, a useless header."""

    exit_code = 2


class OpenError(VfioMigError):
    """The device cannot be opened."""

    exit_code = 3


class DeviceNotFoundError(OpenError):
    """There is no such device."""


class DeviceBusyError(OpenError):
    """Somebody else has the device open, or nobody has where a holder is needed."""


class UnsupportedError(VfioMigError):
    """The device, its driver or the kernel does not support what was asked; nothing was changed."""

    exit_code = 4


class DeviceError(VfioMigError):
    """The device or the kernel failed a request that it supports.

    :param errno: the kernel's error number, 0 when there is none.
    """

    exit_code = 5

    def __init__(self, problem: str, *, device: str | None = None, hint: str | None = None, errno: int = 0) -> None:
        super().__init__(problem, device=device, hint=hint)
        self.errno = errno


class ImageError(VfioMigError):
    """The bytes are not a whole, well-formed image. Nothing was written to a device.

    :ivar file: whose bytes, for messages; the code that opens a file sets it.
    """

    exit_code = 6
    file: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.file is None or self.device is not None else f"{printable(self.file)}: {text}"


class MismatchError(ImageError):
    """A whole image, but not one for this device. Nothing was written to the device."""


class HostError(VfioMigError):
    """The host failed: disk full, no permission on a file, out of memory."""

    exit_code = 7


class InterruptedJobError(VfioMigError):
    """A signal or Ctrl-C ended the job; it has rolled back."""

    exit_code = 130
