"""
The outbox: what was emitted and has not ended, and what is to be done with it next.

Events are in the queue, in the line (taken off the queue, and being sent), or in the
spool.  The queue takes events from any thread.  All else is done by whoever holds
`lock`: the worker, but for the time of an attempt; meanwhile the thread that relieves
a full queue, or one that ends the process.

With a spool, what was sent in vain is written to disk, and as long as the endpoint is
down the queue is, too.  The line keeps in memory what is tried next.
"""

from __future__ import annotations

import random
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING

from pgtrack import _diagnostics
from pgtrack._line import MAX_EVENTS, Line, pack
from pgtrack._queue import NEVER, BoundedQueue, Marker, Written
from pgtrack.typing import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pgtrack._config import Config
    from pgtrack._journal import Journal, Kind, Segment
    from pgtrack._ledger import Ledger
    from pgtrack._line import Hold
    from pgtrack._record import Encoder, Record
    from pgtrack._retry import RetryPolicy
    from pgtrack._source import SpooledFile
    from pgtrack._spool import Spool
    from pgtrack.typing import Answer, Clock

__all__ = ["Outbox", "OwnedLock"]

_CHUNK = 50
"""Records that are encoded before their bytes are looked at."""

_RELIEVED = 0.5
"""Share of its bounds to which a queue that is nearly full is brought."""

_KEPT = frozenset({Verdict.RETRY, Verdict.HOLD})
"""Answers after which the same is sent again, and rests on disk until then."""

_MOST_TAKEN = 4
"""
Most memory, in requests, that the records have which are encoded at once.

A record has some times the size of the event that is made of it.
"""

_WRITTEN_SIZE = 120
"""What an event that was encoded takes in memory beside its bytes."""


class OwnedLock:
    """A lock that knows its holder, so that a signal handler does not wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._deferred: Callable[[], object] | None = None

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == threading.get_ident()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock, waiting at most *timeout* seconds; 0 does not wait."""
        is_taken = self._lock.acquire(timeout != 0, timeout or -1)
        if is_taken:
            self._owner = threading.get_ident()
        return is_taken

    def release(self) -> None:
        """Give the lock back, and do what was deferred meanwhile."""
        self._owner = None
        self._lock.release()
        act, self._deferred = self._deferred, None
        if act is not None:
            act()

    def defer(self, act: Callable[[], object]) -> bool:
        """Have *act* called when the calling thread, which holds the lock, is done."""
        if not self.is_mine:
            return False
        self._deferred = act
        return True

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class Outbox:
    """
    The events of one client in this process.

    Args:
        config: The settings of the client.

        encoder: Makes bytes of records.

        ledger: Counts where each event went.

        policy: How long to wait between attempts.

        clock: Tells the time.

        spool: Where events rest on disk, if they do.

        wake: Called when there is something to do.

        relieve: Called when the queue is nearly full.

    Attributes:
        lock: Held by whoever does more than `put`.

        batch_size: Events in the queue that are worth a request.

        interval: Seconds that events may wait for others.

        is_immediate: Whether they wait for none.

        is_retired: Whether no more will come.

        is_finished: Whether nobody brings what is in the queue to its end any more.
    """

    def __init__(
        self,
        *,
        config: Config,
        encoder: Encoder,
        ledger: Ledger,
        policy: RetryPolicy,
        clock: Clock,
        spool: Spool | None,
        wake: Callable[[], None],
        relieve: Callable[[], None],
    ) -> None:
        self._encoder = encoder
        self._ledger = ledger
        self._policy = policy
        self._clock = clock
        self._spool = spool
        self.batch_size = config.batch_size
        self._batch_interval = float(config.batch_interval)
        self._max_batch_bytes = int(config.max_batch_bytes)
        self._retry_for = float(config.retry_for)
        self._replay_rate = config.replay_rate
        self._relieve = relieve
        self.queue = BoundedQueue(
            max_events=config.max_queue_size,
            max_bytes=int(config.max_queue_bytes),
            drop_oldest=config.overflow == "drop_oldest",
            ledger=ledger,
            wake=wake,
            relieve=None if spool is None else relieve,
        )
        self._begin()

    def _begin(self) -> None:
        """Set what a process has of its own."""
        self.lock = OwnedLock()
        self.interval = self._batch_interval
        self.is_immediate = False
        self.is_retired = False
        self.is_finished = False
        self.line = Line(
            ledger=self._ledger,
            release=self._release,
            policy=self._policy,
            retry_for=self._retry_for,
            probe_size=self.batch_size,
        )
        self._since: float | None = None
        self._line_time = 0
        self._replay_at = 0.0
        self._was_live = False
        self._markers: list[tuple[Marker, int]] = []

    def start_over(self) -> None:
        """Forget what is the parent's; called in a forked child."""
        self.queue.reset()
        if self._spool is not None:
            self._spool.start_over()
        self._begin()

    # --- by any thread ---

    def put(self, record: Record) -> bool:
        """Take *record*; False if it was dropped, which is counted."""
        journal = None if self._spool is None else self._spool.journal
        if journal is None:
            return self.queue.put(record)
        if self.queue.is_closed:
            self._ledger.drop("closed")
            return False
        return self._put_written(record, journal)

    def _put_written(self, record: Record, journal: Journal) -> bool:
        """Encode *record* here, and have it on disk before it counts as taken."""
        size = 0
        try:
            data = self._encoder.encode_here(record)
            if data is None:
                return False
            if self.queue.reserve(_WRITTEN_SIZE + len(data)):
                size = _WRITTEN_SIZE + len(data)
            segment = self._write(journal, "queued" if size else "kept", data)
        except BaseException as error:
            if size:
                self.queue.release(size)
            self._ledger.drop("internal_error")
            if not isinstance(error, Exception):  # the host's, such as Ctrl-C
                raise
            _diagnostics.internal_error(error)
            return False
        if size:
            self.queue.append(Written(data, segment, size))
            return True
        if segment is None:
            return self.queue.put(Written(data, None, _WRITTEN_SIZE + len(data)))
        self._ledger.spooled.add(1)
        segment.users.add(-1)
        self._relieve()
        return True

    def _write(self, journal: Journal, kind: Kind, data: bytes) -> Segment | None:
        spool = self._spool
        if spool is None or (kind == "kept" and spool.is_full):
            return None
        try:
            return journal.append(kind, data)
        except OSError as error:
            spool.note_error(error)
            return None

    def _release(self, hold: Hold) -> None:
        """Give back what an event occupied."""
        if isinstance(hold, int):
            self.queue.release(hold)
        elif isinstance(hold, tuple):
            size, segment = hold
            if segment is not None:
                segment.users.add(-1)
            self.queue.release(size)
        else:
            hold.release()

    def has_ended(self, *, with_adopted: bool = False) -> bool:
        """
        Whether all events of this process have, or those it adopted as well.

        False, too, while somebody is at it.
        """
        if self._ledger.pending.value:
            return False
        spool = self._spool
        if spool is None:
            return True
        if not self.lock.acquire(0):
            return False
        try:
            return spool.is_empty if with_adopted else spool.is_own_empty
        finally:
            self.lock.release()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do for a client that takes no more."""
        is_idle = not self.line and not len(self.queue)
        return is_idle and (self._spool is None or self._spool.is_own_empty)

    def drop_queued(self) -> None:
        """Drop what is in the queue, for which nobody will come."""
        while (item := self.queue.take()) is not None:
            if isinstance(item, Marker):
                item.reach()
            elif not self._leave_in_journal(_hold_of(item)):
                self._ledger.drop("shutdown")
                self._release(_hold_of(item))

    def _leave_in_journal(self, hold: Hold) -> bool:
        """Be done with an event in memory, if the journal has it, which then stays."""
        if not isinstance(hold, tuple) or hold[1] is None:
            return False
        self.queue.release(hold[0])
        self._ledger.spooled.add(1)
        return True

    # --- under the lock ---

    def next_step(self, now: float, *, is_hurried: bool) -> tuple[bool, float | None]:
        """
        Do what is due but for sending.

        Returns:
            Whether an attempt is due, and the seconds until the next step; None stands
            for: until woken.
        """
        if self.line:
            return self._step_with_line(now, is_hurried=is_hurried)
        due_in = self._due_in(now, self.batch_size)
        is_due = due_in is not None and due_in <= 0
        replay_in = None
        if self._spool is not None:
            replay_in = self._replay(self._spool, now, is_due=is_due)
            if self.line:
                return False, 0.0
        if is_due:
            self._was_live = True
            self.load(MAX_EVENTS)
            return False, 0.0
        return False, _sooner(due_in, replay_in)

    def _step_with_line(
        self, now: float, *, is_hurried: bool
    ) -> tuple[bool, float | None]:
        wait = self.line.wait(now, is_hurried=is_hurried)
        if wait <= 0:
            return True, 0.0
        if self._spool is None:
            return False, wait
        self._rest()
        due_in = self._due_in(now, MAX_EVENTS)
        if due_in is not None and due_in <= 0:
            if self._stow():
                return False, 0.0
            due_in, self.queue.wake_at = None, NEVER
        self._reach_markers()
        return False, _sooner(wait, due_in)

    def _due_in(self, now: float, most: int) -> float | None:
        """Return how long the queue may still collect, and ask to be woken before."""
        queue = self.queue
        length = len(queue)
        if length == 0:
            self._since = None
            return self._unless_reached(1, None)
        if queue.is_marked or self.is_retired or self.is_immediate:
            return 0.0
        if self._since is None:
            self._since = now
        wait = self._since + self.interval - now
        return self._unless_reached(most, wait)

    def _unless_reached(self, length: int, wait: float | None) -> float | None:
        """Return *wait*, to be woken at a *length*; 0 if that is reached already."""
        self.queue.wake_at = length
        return 0.0 if len(self.queue) >= length else wait

    def load(self, most: int) -> None:
        """Take up to *most* records off the queue, up to a marker, into the line."""
        if self._spool is not None:
            self._line_time = self._spool.new_time()
        self.line.extend(pack(self._take(most), self._max_batch_bytes))
        self._reach_markers()

    def _take(self, most: int) -> list[tuple[bytes, Hold]]:
        """
        Take up to *most* records off the queue, up to a marker, and encode them.

        No more than about a request's worth: what sessions add to each event is shared
        by records, but not by their bytes.
        """
        self._since = None
        self.queue.wake_at = NEVER
        if self._spool is not None:
            self._spool.rotate()
        encoded: list[tuple[bytes, Hold]] = []
        taken = length = 0
        while taken < most and length < self._max_batch_bytes:
            wanted = min(most - taken, _CHUNK)
            items = self._take_items(wanted)
            chunk = self._encode(items)
            encoded += chunk
            taken += len(items)
            length += sum(len(data) for data, _ in chunk)
            if len(items) < wanted:
                break
        if length >= self._max_batch_bytes:
            self._since = 0.0  # what is left has waited, too
        return encoded

    def _take_items(self, most: int) -> list[Record | Written]:
        """Take up to *most* items off the queue, up to a marker."""
        items: list[Record | Written] = []
        left = _MOST_TAKEN * self._max_batch_bytes
        while len(items) < most and left > 0:
            item = self.queue.take()
            if item is None:
                break
            if isinstance(item, Marker):
                time = 0 if self._spool is None else self._spool.new_time()
                self._markers.append((item, time))
                break
            items.append(item)
            left -= item[-1]
        return items

    def _encode(self, items: Sequence[Record | Written]) -> list[tuple[bytes, Hold]]:
        """Return the bytes of each event, and what it occupies."""
        encoded: list[tuple[bytes, Hold]] = []
        done = 0
        try:
            for data, item in self._each(items):
                done += 1
                if data is None:  # dropped and counted by the encoder
                    self._release(_hold_of(item))
                else:
                    encoded.append((data, _hold_of(item)))
        except BaseException:  # out of memory to note an error, or Ctrl-C
            for item in items[done:]:
                self._ledger.drop("internal_error")
                self._release(_hold_of(item))
            self.line.extend(pack(encoded, self._max_batch_bytes))
            raise
        return encoded

    def _each(
        self, items: Sequence[Record | Written]
    ) -> Iterator[tuple[bytes | None, Record | Written]]:
        written = [item for item in items if isinstance(item, Written)]
        yield from ((item.data, item) for item in written)
        records = [item for item in items if not isinstance(item, Written)]
        yield from self._encoder.encode(records)

    def settle(self, answer: Answer) -> None:
        """Do what *answer* to the parcel sent means."""
        if answer.verdict in _KEPT:
            self._rest()
        self.line.settle(answer, self._clock.monotonic())
        if self._spool is not None:
            if answer.verdict is Verdict.TAKEN:
                self._spool.look()
            if self.line.is_failing:
                self._rest()
            self._spool.sweep()
        self._reach_markers()

    def _reach_markers(self) -> None:
        """Once nothing is left of what was taken, those who wait for it may go on."""
        waiting = []
        for marker, time in self._markers:
            if self._has_ended(marker, time):
                marker.reach()
            else:
                waiting.append((marker, time))
        self._markers = waiting

    def _has_ended(self, marker: Marker, time: int) -> bool:
        spool = self._spool
        if spool is None:
            return not self.line
        if not marker.may_rest:
            return not self.line and not spool.has_before(time)
        if self.line.in_memory:
            return False
        is_empty = not (self.line or spool.has_own or spool.has_adopted)
        return is_empty or self.line.is_failing

    # --- to disk and back ---

    def _rest(self) -> bool:
        """Have what is in the line on disk as well; True if that freed some memory."""
        events = self.line.in_memory
        if self._spool is None or not events:
            return False
        file = self._spool.write(events, self._line_time, is_at_hand=True)
        if file is None:
            return False
        self.line.rest_in(file)
        self._ledger.spooled.add(len(events))
        return True

    def _stow(self) -> bool:
        """Move what is in the queue to disk, up to a file's worth; True if it moved."""
        spool = self._spool
        if spool is None or spool.writable_in > 0:
            return False
        time = spool.new_time()
        encoded = self._take(MAX_EVENTS)
        if not encoded:
            self._reach_markers()
            return False
        file = None
        try:
            data = [data for data, _ in encoded]
            file = spool.write(data, time, is_at_hand=False)
        finally:
            if file is None:
                self._line_time = time  # that of before is a file's already
                self.line.extend(pack(encoded, self._max_batch_bytes))
        if file is None:
            return False
        for _, hold in encoded:
            self._release(hold)
        self._ledger.spooled.add(len(encoded))
        spool.sweep()
        self._reach_markers()
        return True

    def relieve(self) -> None:
        """Move events to disk until the queue has room again."""
        while self.queue.is_filled(_RELIEVED):
            with self.lock:
                has_rested = self._rest()
                has_stowed = self._stow()
            if not (has_rested or has_stowed):
                break

    def _replay(self, spool: Spool, now: float, *, is_due: bool) -> float | None:
        """
        Load the oldest of the spool, if it is its turn; return when to look again.

        Our own events go before those in the queue, so that their order is kept.  The
        pace must not hold up the queue, or it would never come to its turn.
        """
        spool.sweep()
        # Not ahead of an event that tells sooner whether the endpoint takes any.
        is_time = self._ledger.last_success_ns is not None or not len(self.queue)
        if is_time:
            spool.look()
        pause = max(self._replay_at - now, spool.usable_in, 0.0)
        has_own = spool.has_own and not self._is_queue_older(spool)
        has_any = has_own or spool.has_adopted
        is_due = is_due and not (self._was_live and pause == 0)  # one, then the other
        if has_own if is_due else has_any and pause == 0:
            self._was_live = False
            pairs = self._read(spool, own_only=has_own)
            if not pairs:  # nothing of it was any good
                self._reach_markers()
            self.line.extend(pack(pairs, self._max_batch_bytes))
            if self._replay_rate is not None:
                pace = len(pairs) / self._replay_rate
                self._replay_at = now + pace * (0.75 + random.random() / 2)  # noqa: S311
        if has_any:
            return pause
        return spool.looks_in if is_time else None

    def _is_queue_older(self, spool: Spool) -> bool:
        """Whether the queue was full, and what had no room in it waits on disk."""
        head = self.queue.peek()
        segment = head.segment if isinstance(head, Written) else None
        return segment is not None and not spool.has_before(segment.time)

    def _read(self, spool: Spool, *, own_only: bool) -> list[tuple[bytes, Hold]]:
        """Read about a request's worth from the spool."""
        pairs: list[tuple[bytes, Hold]] = []
        left = self._max_batch_bytes
        while left > 0 and len(pairs) < MAX_EVENTS:
            found = spool.read(left)
            if found is None:
                break
            file, events = found
            pairs += [(event, file) for event in events]
            left -= sum(map(len, events))
            if own_only and not spool.has_own:
                break
        return pairs

    def note_left(self) -> None:
        """Tell how many events are left at the end."""
        left = self._ledger.pending.value
        if left:
            _diagnostics.note(
                "shutdown",
                f"pgtrack dropped {left:,} events that could not be sent before "
                "the end; pgtrack.stats().dropped['shutdown'] counts them.",
            )

    def rest_all(self, deadline: float) -> None:
        """Have everything on disk, as far as that is possible until *deadline*."""
        if self._spool is not None:
            self._spool.try_again()
        self._rest()
        while length := len(self.queue):
            is_stuck = not self._stow() and len(self.queue) == length
            if is_stuck or self._clock.monotonic() >= deadline:
                break

    def finish(self, deadline: float) -> None:
        """
        Be done with everything: what can rest on disk does, all else is dropped.

        Args:
            deadline: When to write no more.
        """
        self.rest_all(deadline)
        self.note_left()
        files = self.line.on_disk()
        self.line.leave(self._leave_in_journal)
        self.line.give_up("shutdown")
        for marker, _ in self._markers:
            marker.reach()
        self._markers = []
        self.queue.wake_at = 1  # who puts something yet is to see to it himself
        self.is_finished = True
        self.drop_queued()
        self.close_spool(files)

    def close_spool(
        self, busy: Mapping[SpooledFile, Sequence[bytes]] = MappingProxyType({})
    ) -> None:
        """Let go of what is on disk."""
        if self._spool is not None:
            self._spool.close(busy)


def _hold_of(item: Record | Written) -> Hold:
    if isinstance(item, Written):
        return item.size, item.segment
    return item[-1]


def _sooner(one: float | None, two: float | None) -> float | None:
    """Return the shorter of two waits, of which None is endless."""
    return min((wait for wait in (one, two) if wait is not None), default=None)
