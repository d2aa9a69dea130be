# SPDX-License-Identifier: MIT
"""A device's dirty pages, whether it always knows them or has to be told to log them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio_mig.errors import DeviceBusyError, DeviceError, UnsupportedError, UsageError
from vfio_mig.ranges import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vfio_mig.dirty.bitmap import Dirty
    from vfio_mig.dirty.memory import Memory
    from vfio_mig.dirty.ranges import PageRange
    from vfio_mig.host.tracking import DmaTracker
    from vfio_mig.jobs.engine.session import Session


class DirtyLog:
    """The dirty pages of one device for one job; nothing is asked before :meth:`begin`.

    Where the device logs, what it wrote before the log began is not in there, and each bitmap has the pages since the
    one before it. Where a log is lost, every page counts as dirty once.

    :param ranges: guest pages to ask for.
    :param pinned: ask the container of whoever has the device for the pages that are pinned, at any time.
    """

    def __init__(self, session: Session, ranges: Sequence[PageRange], *, pinned: bool = False) -> None:
        # Imported here, and what counts is loaded, before the device is stopped
        from vfio_mig.dirty.bitmap import count
        from vfio_mig.dirty.fetch import fetch

        count(bytes(8), 64)
        self._session = session
        self._ranges = list(ranges)
        self._fetch = fetch
        self._tracker: DmaTracker | None = None
        self._pinned = pinned
        self._is_told = False
        self._is_begun = False
        self.was_lost = False
        """Whether a log was lost, and every page was taken as dirty."""

    @property
    def is_log(self) -> bool:
        """Whether it tells what was written since it began, and each page once."""
        return not self._pinned and (self._session.protocol.dirty_log is not None or self._tracker is not None)

    @property
    def is_holders(self) -> bool:
        """Whether it is what a `vfio-mig hold` has mapped: one job at a time can read that."""
        from vfio_mig.host.tracking import HeldTracker

        return isinstance(self._tracker, HeldTracker)

    @property
    def is_snapshot(self) -> bool:
        """Whether it tells, at any time, the pages that the device may write then: the RFC's, or pinned ones."""
        # In this order: to ask whether there is a log takes a request, and a device may stand still by now
        return not self.is_log and (self._pinned or self._session.protocol.has_dirty)

    def require(self) -> None:
        """Refuse a device that cannot be asked: it has no log, and neither its IOMMU nor its container can tell.

        :raises UnsupportedError: says what was looked at.
        """
        if self._pinned:
            self._require_pinned()
        elif not self._session.protocol.has_dirty:
            from vfio_mig.host.tracking import find_tracker

            refusal = self._session.refusal
            try:
                # A question for a device that is only looked at; a copy that others rely on takes a log of its own
                self._tracker = find_tracker(self._session.device, of_holder=refusal is not None)
            except UnsupportedError as error:
                if refusal is None:
                    raise
                refusal.problem = f"{refusal.problem}; it {error.problem}"
                raise refusal from error

    def _require_pinned(self) -> None:
        from vfio_mig.host.tracking import find_owners_tracker

        protocol = self._session.protocol
        if protocol.has_dirty and protocol.dirty_log is None:
            raise UsageError(
                f"{self._session.device.name}: a {protocol.name} device tells its dirty pages by itself",
                hint="leave out --pinned",
            )
        self._tracker = find_owners_tracker(self._session.device)
        self._tracker.start([(one.start * PAGE, one.nr_pages * PAGE) for one in self._ranges])

    def _collect(self, tracker: DmaTracker) -> None:
        tracker.collect()
        if self._pinned and not self._is_told:
            self._is_told = True
            self._session.warn(tracker.caution)

    def begin(self) -> None:
        """Have the device log its writes from now on, if it has to be told.

        :raises UnsupportedError: it, or the kernel, cannot.
        :raises DeviceBusyError: its owner is migrating it, and what we read would be missing there.
        :raises DeviceError: refused.
        """
        if not self.is_log:
            return
        holder = self._session.device.holder
        if holder is not None and not holder.is_hold:
            from vfio_mig.host.migrating import is_migrating

            if is_migrating(holder.pid):
                raise DeviceBusyError(
                    f"{holder} is migrating it, and a page that is read from the log here would be missing there",
                    device=self._session.device.name,
                    hint="wait until that has ended",
                )
        self._start([(one.start * PAGE, one.nr_pages * PAGE) for one in self._ranges])
        self._is_begun = True

    def _start(self, ranges: list[tuple[int, int]]) -> None:
        """Start the device's own log; where it, or the kernel, has none, have the IOMMU or the container track."""
        log = self._session.protocol.dirty_log
        if self._tracker is None and log is not None:
            try:
                log.start_log(ranges)
            except UnsupportedError as error:
                from vfio_mig.host.tracking import find_tracker

                try:
                    self._tracker = find_tracker(self._session.device)
                except UnsupportedError:
                    raise error from None
            else:
                return
        assert self._tracker is not None  # noqa: S101 -- is_log
        self._tracker.start(ranges)
        if self._tracker.caution:
            self._session.warn(self._tracker.caution)

    def outside(self, guest: Memory) -> tuple[int, int]:
        """Look for pages that the device may write and that are in no memory that we know, up to its end or 4 GiB.

        Only of a device that always knows them; another one tells what it logs, and logs what it is asked for.

        :returns: how many there are, and the first one's number.
        """
        if not self.is_snapshot:
            return 0, 0
        from vfio_mig.dirty.ranges import complement
        from vfio_mig.dirty.runs import find

        source = self._session.protocol.dirty
        if self._tracker is not None:
            self._collect(self._tracker)
            source = self._tracker.take

        gaps = complement(guest.ranges, max(guest.end // PAGE, 1 << 20))
        batches = list(find(self._fetch(source, gaps)))
        return sum(runs.total() for runs in batches), int(batches[0].starts[0]) if batches else 0

    def fetch(self) -> list[Dirty]:
        """Return the dirty bits of now, all ranges.

        :raises DeviceError: refused, by a device that does not log; where a log is lost every page counts as dirty.
        """
        try:
            tracker = self._tracker
            if tracker is not None:
                self._collect(tracker)
            source = self._session.protocol.dirty if tracker is None else tracker.take
            return list(self._fetch(source, self._ranges))
        except DeviceError as error:
            if not self._is_begun:
                raise
            self.was_lost = True
            self._session.warn(f"{error}; every page is taken as dirty")
            return list(self.every_page())

    def every_page(self) -> Iterator[Dirty]:
        """Yield bitmaps in which every page that is asked for is dirty."""

        def ones(_: int, nr_pages: int) -> bytes:
            return b"\xff" * ((nr_pages + 7) // 8)

        return self._fetch(ones, self._ranges)

    def end(self) -> None:
        """End the log, if there is one; that it cannot be ended is not a reason to undo anything."""
        if not self._is_begun:
            return
        self._is_begun = False
        try:
            if self._tracker is not None:
                self._tracker.stop()
            elif self._session.protocol.dirty_log is not None:
                self._session.protocol.dirty_log.stop_log()
        except DeviceError as error:
            self._session.warn(f"{error}; the device goes on logging its writes until it is closed")
