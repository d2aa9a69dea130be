# SPDX-License-Identifier: MIT
"""What every command finds in its context: the global options, and what became of the job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vfio_mig.jobs.engine.events import Events, Hooks
    from vfio_mig.words import Via


class Shown(Protocol):
    """What is drawn on a terminal while a job goes on."""

    def clear(self) -> None:
        """Make room for a line of words."""


class Options:
    """The global options, as every command finds them in its context, and what became of the job."""

    def __init__(self) -> None:
        self.as_json = False
        self.verbose = False
        self.quiet = False
        self.abi = "auto"
        self.uapi_header: str | None = None
        self.via: Via = "auto"
        self.events_file: str | None = None
        self.status_fd: int | None = None
        self.hook_texts: tuple[str, ...] = ()
        self.events: Events | None = None
        self.hooks: Hooks | None = None
        self.pid: int | None = None  # set by the options of a command, as is fd
        self.fd: int | None = None
        self.meter: Shown | None = None
        """What shows how far the job has come, while it does."""
        self.is_done = False
        self.has_report = False
        """Whether something stands on standard output already."""

    def done(self) -> None:
        """Record that the job is done: from here on no lost report changes the exit code."""
        self.is_done = True

    def listen(self, command: str, asked: dict[str, Any]) -> None:
        """Open what the steps of the job go to.

        :param command: that is about to run; *asked*: its options, by their names.
        :raises UsageError, HostError: that is not possible.
        """
        target = self.events_file if self.status_fd is None else self.status_fd
        if target is None and not self.hook_texts:
            return
        from vfio_mig.jobs.engine.events import Events, Hooks

        if target is not None:
            self.events = Events(target)
        self.hooks = Hooks(self.hook_texts, command, **asked)
