"""
The bounded queue between the callers' threads and the worker.

Callers take no lock.  A place and the bytes are reserved by atomic counters before
the record is appended, and given back if there is no room, so that the bounds hold
exactly however many threads, signal handlers and finalisers emit at once.

Nor is a wake-up lost.  Callers append, then look at `wake_at`; the worker, who alone
sets it, sets it, then looks at the length once more.  Whichever of the two comes
second sees what the first one did.
"""

from __future__ import annotations

import collections
import sys
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pgtrack import _diagnostics
from pgtrack._clock import Signal
from pgtrack._ledger import Ledger, Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgtrack._journal import Segment
    from pgtrack._record import Record

__all__ = ["NEVER", "BoundedQueue", "Marker", "Written"]

NEVER = sys.maxsize
"""A length at which nobody is woken."""


_NEAR = 0.75
"""Share of a bound from which on the queue is to be relieved."""


class Marker:
    """
    A place in the queue; reached when everything before it has come to an end.

    Args:
        may_rest: Whether it is enough that everything is on disk, if the endpoint is
            down; otherwise what is on disk is to be replayed.
    """

    __slots__ = ("_signal", "is_reached", "may_rest")

    def __init__(self, *, may_rest: bool = False) -> None:
        self._signal = Signal()
        self.is_reached = False
        self.may_rest = may_rest

    def reach(self) -> None:
        """Wake whoever waits for the marker."""
        self.is_reached = True
        self._signal.give()

    def wait(self, timeout: float) -> bool:
        """Wait until the marker is reached, at most *timeout* seconds."""
        if not self.is_reached:
            self._signal.wait(timeout)
        return self.is_reached


class Written(NamedTuple):
    """An event that was encoded, and written to the journal, where it was emitted."""

    data: bytes
    segment: Segment | None
    size: int


Item: TypeAlias = "Record | Written | Marker"
"""What is in the queue; the last value of a tuple is the memory it takes."""


class BoundedQueue:
    """
    Records on their way to the worker, in the order of emission.

    Args:
        max_events: The most events in memory: queued, and with the worker.

        max_bytes: The most memory for them, by the estimate in each record.

        drop_oldest: What to drop when full: the oldest in the queue, or the new one.

        ledger: Counts `pending` and what is dropped.

        wake: Called when an item was appended and the length is `wake_at` or more.

        relieve: Called when an item was appended and a bound is near.
    """

    def __init__(
        self,
        *,
        max_events: int,
        max_bytes: int,
        drop_oldest: bool,
        ledger: Ledger,
        wake: Callable[[], None],
        relieve: Callable[[], None] | None = None,
    ) -> None:
        self._items: collections.deque[Item] = collections.deque()
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._drop_oldest = drop_oldest
        self._ledger = ledger
        self._wake = wake
        self._relieve = relieve
        self._bytes = Tally()
        self._marks = Tally()
        self.is_closed = False
        self.wake_at = 1

    def __len__(self) -> int:
        return len(self._items)

    def put(self, record: Record | Written) -> bool:
        """Append *record* if there is room; what is dropped is counted."""
        if self.is_closed:
            self._ledger.drop("closed")
            return False
        size = record[-1]
        if not self.reserve(size) and not self._make_room(size):
            self._count_drop()
            return False
        self.append(record)
        return True

    def append(self, record: Record | Written) -> None:
        """Append *record*, for which there was room."""
        self._append(record)
        if self._relieve is not None and self.is_filled(_NEAR):
            self._relieve()

    def is_filled(self, share: float) -> bool:
        """Whether what is in memory takes more than a *share* of either bound."""
        return (
            self._ledger.pending.value > share * self._max_events
            or self._bytes.value > share * self._max_bytes
        )

    def mark(self, marker: Marker) -> None:
        """Append *marker*."""
        self._marks.add(1)
        self._append(marker)

    @property
    def is_marked(self) -> bool:
        """Whether somebody waits for what is in the queue."""
        return self._marks.value > 0

    def _append(self, item: Item) -> None:
        self._items.append(item)
        if len(self._items) >= self.wake_at:
            self._wake()

    def reserve(self, size: int) -> bool:
        """Take a place for one event of *size*; False if there is none."""
        if self._ledger.pending.add(1) <= self._max_events:
            if self._bytes.add(size) <= self._max_bytes:
                return True
            self._bytes.add(-size)
        self._ledger.pending.add(-1)
        return False

    def release(self, size: int) -> None:
        """Give back the place and the bytes of one event that came to an end."""
        self._bytes.add(-size)
        self._ledger.pending.add(-1)

    def _make_room(self, size: int) -> bool:
        """Drop the oldest records until *size* fits, if that is the policy."""
        if not self._drop_oldest or size > self._max_bytes:
            return False
        markers: list[Item] = []
        has_room = False
        for _ in range(len(self._items)):
            item = self._pop()
            if isinstance(item, Marker):
                markers.append(item)
                continue
            if item is None:
                break
            self.release(item[-1])
            if isinstance(item, Written) and item.segment is not None:
                item.segment.users.add(-1)
            self._count_drop()
            has_room = self.reserve(size)
            if has_room:
                break
        if markers:
            # They stay in front: what they wait for is gone, or with the worker.
            self._items.extendleft(reversed(markers))
            self._wake()
        return has_room

    def _count_drop(self) -> None:
        self._ledger.drop("queue_full")
        _diagnostics.note(
            "queue_full",
            f"pgtrack's queue is full ({self._max_events:,} events or "
            f"{self._max_bytes:,} bytes): events are dropped, and counted in "
            "pgtrack.stats().dropped['queue_full'].",
        )

    def take(self) -> Item | None:
        """Return the oldest item, or None."""
        item = self._pop()
        if isinstance(item, Marker):
            self._marks.add(-1)
        return item

    def peek(self) -> Item | None:
        """Return the oldest item, or None, and leave it where it is."""
        try:
            return self._items[0]
        except IndexError:
            return None

    def _pop(self) -> Item | None:
        try:
            return self._items.popleft()
        except IndexError:
            return None

    def reset(self) -> None:
        """Forget everything, as a forked child does: it is the parent's."""
        self._items.clear()
        self._bytes.reset()
        self._marks.reset()
        self.wake_at = 1
