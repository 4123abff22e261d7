"""
The worker: takes records off the queue, and sees each to its end.

One thread a client, started with the first event.  It takes what the queue holds,
encodes it, and works on that *line* of parcels until each event was delivered,
rejected or given up; then it takes more.  So the order of emission is kept, and
what waits stays in the bounded queue.  Any thread can do the work in its place:
at the end of a process no thread can be started, and the caller delivers itself.

What becomes of a parcel:

- taken: counted, with the rejected positions by the endpoint's reasons;
- to be retried: waits, with exponential backoff, full jitter and `Retry-After`;
- too large, or refused: halved, down to the one event that is at fault;
- held (a wrong key or address): probed slowly, until `retry_for`.

An endpoint that refuses several events in a row, each on its own, without taking any,
refuses everything.  Then the events are not at fault: they are kept, and one
parcel at a time is sent as a probe until one is taken.
"""

from __future__ import annotations

import collections
import contextvars
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

from pgtrack import _diagnostics
from pgtrack._clock import Signal
from pgtrack._context import SUPPRESSED, push
from pgtrack._ledger import DropReason, Ledger
from pgtrack._queue import NEVER, BoundedQueue, Marker
from pgtrack._record import Encoder, Record
from pgtrack._retry import RetryPolicy
from pgtrack.typing import Answer, Clock, Transport, Verdict

if TYPE_CHECKING:
    from pgtrack._config import Config

__all__ = ["Worker"]

_MAX_BATCH = 1_000
"""Most events of a request, by ProductGraph's documentation and source."""

_MAX_BISECTIONS = 256
"""Most splits of one line before refused parcels are rejected whole."""

_SUSPECTS = 5
"""Refusals of single events in a row, none taken, that mean the endpoint refuses all."""

_JOIN = 0.05
"""Seconds that a thread gets to count what it was cut off from."""


@attrs.define(eq=False)
class _Parcel:
    """Events that are sent together: their bytes, and what each holds in memory."""

    events: list[bytes]
    sizes: list[int]
    first_try: float | None = None

    def halves(self) -> tuple[_Parcel, _Parcel]:
        middle = (len(self.events) + 1) // 2
        return (
            _Parcel(self.events[:middle], self.sizes[:middle], self.first_try),
            _Parcel(self.events[middle:], self.sizes[middle:], self.first_try),
        )


class Worker:
    """
    Delivers the records of one client.

    Args:
        config: The settings of the client.

        encoder: Makes bytes of records.

        transport: Makes the transport; called again in a forked child.

        ledger: Counts where each event went.

        policy: How long to wait between attempts.

        clock: Tells the time and waits.

        on_start: Called when a process starts its thread.
    """

    def __init__(
        self,
        *,
        config: Config,
        encoder: Encoder,
        transport: Callable[[], Transport],
        ledger: Ledger,
        policy: RetryPolicy,
        clock: Clock,
        on_start: Callable[[], None],
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._make_transport = transport
        self._ledger = ledger
        self._policy = policy
        self._clock = clock
        self._on_start = on_start
        self._batch_size = config.batch_size
        self._batch_interval = float(config.batch_interval)
        self._max_batch_bytes = int(config.max_batch_bytes)
        self._retry_for = float(config.retry_for)
        self._timeout = float(config.timeout)
        self.queue = BoundedQueue(
            max_events=config.max_queue_size,
            max_bytes=int(config.max_queue_bytes),
            drop_oldest=config.overflow == "drop_oldest",
            ledger=ledger,
            wake=self._wake,
        )
        self.put = self.queue.put
        self._begin()

    def _begin(self) -> None:
        """Set what a process has of its own."""
        self._transport = self._make_transport()
        self._is_immediate = getattr(self._transport, "is_immediate", False)
        self._signal = Signal()
        # Held by whoever delivers; never waited for.
        self._delivering = threading.Lock()
        # Held while a thread is started; never waited for.
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._deliverer: int | None = None
        self._markers: list[Marker] = []
        self._line: collections.deque[_Parcel] = collections.deque()
        self._suspects: list[tuple[bytes, int, str]] = []
        self._refused_in_a_row = 0
        self._refuses_all = False
        self._bisections = 0
        self._attempts = 0
        self._retry_at = 0.0
        self._is_wait_mandated = False
        self._since: float | None = None
        self._is_urgent = False
        self._is_hurried = False
        self._deadline: float | None = None
        self._is_abandoned = False
        self._is_retired = False

    def start_over(self) -> None:
        """Forget what is the parent's; called in a forked child."""
        self.queue.reset()
        self._ledger.reset()
        self._begin()

    # --- called by any thread ---

    def _wake(self) -> None:
        self._signal.give()
        if not self._has_thread:
            self._start()

    @property
    def _has_thread(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start(self) -> None:
        """Start the thread; where none can be had, leave the work to a flush."""
        if not self._starting.acquire(blocking=False):
            return
        try:
            if not self._has_thread:
                thread = threading.Thread(
                    target=contextvars.Context().run,
                    args=(self._run,),
                    name="pgtrack",
                    daemon=True,
                )
                thread.start()
                self._thread = thread
                self._on_start()
        except RuntimeError:
            self.queue.wake_at = len(self.queue) + self._batch_size
        finally:
            self._starting.release()

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is delivering, and so cannot wait for itself."""
        return self._deliverer == threading.get_ident()

    def flush(self, timeout: float) -> bool:
        """Wait until all that was emitted before came to an end; True if it did."""
        if self.is_own_thread:
            return False
        if self._ledger.pending.value == 0:
            return True
        deadline = self._clock.monotonic() + timeout
        marker = Marker()
        self.queue.mark(marker)
        self._is_urgent = self._is_hurried = True
        self._wake()
        if not self._has_thread:
            self._deliver_until(marker, deadline)
            return marker.is_reached
        return marker.wait(timeout) or self._ledger.pending.value == 0

    def close(self, timeout: float) -> bool:
        """
        Flush, then stop; what is left after *timeout* seconds is dropped, counted.
        """
        if self.is_own_thread:
            return False
        was_closed = self.queue.is_closed
        self.queue.is_closed = True
        self._deadline = self._clock.monotonic() + timeout
        is_flushed = self.flush(timeout)
        if was_closed and is_flushed:
            return True
        self._is_abandoned = True
        if not is_flushed:
            self._transport.abort()
            self._drop_queued()
        self._signal.give()
        if self._thread is not None and self._has_thread:
            self._thread.join(_JOIN)
        else:
            contextvars.Context().run(self._run)
        return is_flushed

    def retire(self) -> None:
        """Take no more events, and stop in the background when all have ended."""
        self.queue.is_closed = True
        self._is_retired = self._is_urgent = True
        if self._ledger.pending.value:
            self._wake()
        self._signal.give()

    def _drop_queued(self) -> None:
        while (item := self.queue.take()) is not None:
            if not isinstance(item, Marker):
                self._end([item[-1]], "shutdown")

    # --- called by whoever delivers ---

    def _run(self) -> None:
        """Deliver until the worker is closed."""
        if not self._delivering.acquire(blocking=False):
            return
        self._deliverer = threading.get_ident()
        push(SUPPRESSED)
        try:
            while not self._is_abandoned:
                delay = self._step_safely()
                if delay is None and self._is_retired:
                    break
                self._wait(delay)
            self._abandon()
            self._transport.close()
            _diagnostics.tell()
        finally:
            self._deliverer = None
            self._delivering.release()

    def _deliver_until(self, marker: Marker, deadline: float) -> None:
        """Deliver on the calling thread, in place of a worker that cannot be had."""
        if not self._delivering.acquire(blocking=False):
            return
        self._deliverer = threading.get_ident()
        before, self._deadline = self._deadline, deadline
        try:
            contextvars.Context().run(self._deliver_here, marker, deadline)
        finally:
            self._deadline = before
            self._deliverer = None
            self._delivering.release()

    def _deliver_here(self, marker: Marker, deadline: float) -> None:
        push(SUPPRESSED)
        while not marker.is_reached and self._clock.monotonic() < deadline:
            delay = self._step_safely()
            left = deadline - self._clock.monotonic()
            if delay is None or delay > left:
                break
            self._wait(delay)

    def _wait(self, delay: float | None) -> None:
        _diagnostics.tell()
        if delay is None or delay > 0:
            self._clock.wait(self._signal, delay)

    def _step_safely(self) -> float | None:
        try:
            return self._step()
        except Exception as error:  # noqa: BLE001  the thread must outlive our own errors
            _diagnostics.internal_error(error)
            return self._policy.most

    def _step(self) -> float | None:
        """
        Do one thing, at most one attempt; return how long to wait before the next.

        None stands for: until woken.
        """
        now = self._clock.monotonic()
        if self._line:
            wait = self._retry_at - now
            if wait > 0 and not self._may_hurry():
                return wait
            self._attempt()
            return 0.0
        wait_or_none = self._until_due(now)
        if wait_or_none is not None and wait_or_none <= 0:
            self._load(_MAX_BATCH)
            return 0.0
        return wait_or_none

    def _may_hurry(self) -> bool:
        """Whether a flush asks for an attempt before its time, once."""
        if self._is_hurried and not self._is_wait_mandated:
            self._is_hurried = False
            return True
        return False

    def _until_due(self, now: float) -> float | None:
        """Return how long the queue may still collect, and ask to be woken before."""
        queue = self.queue
        length = len(queue)
        if length == 0:
            self._is_urgent = False
            self._since = None
            return self._arm(1)
        if self._since is None:
            self._since = now
        is_due = self._is_urgent or self._is_immediate
        if is_due or length >= self._batch_size:
            return 0.0
        wait = self._since + self._batch_interval - now
        if wait <= 0:
            return 0.0
        return 0.0 if self._arm(self._batch_size) == 0 else wait

    def _arm(self, length: int) -> float | None:
        """Ask to be woken at a *length*; 0 if it was reached meanwhile."""
        self.queue.wake_at = length
        if len(self.queue) >= length:
            self.queue.wake_at = NEVER
            return 0.0
        return None

    def _load(self, most: int) -> None:
        """Take up to *most* records off the queue, up to a marker, into the line."""
        self._since = None
        self.queue.wake_at = NEVER
        records: list[Record] = []
        while len(records) < most:
            item = self.queue.take()
            if item is None:
                break
            if isinstance(item, Marker):
                self._markers.append(item)
                break
            records.append(item)
        self._line.extend(self._pack(self._encoder.encode(records)))
        self._after_line()

    def _pack(
        self, encoded: Iterable[tuple[bytes | None, Record]]
    ) -> Iterable[_Parcel]:
        """Group events into parcels under the bound of bytes."""
        parcel = _Parcel([], [])
        size = 0
        for data, record in encoded:
            if data is None:  # dropped and counted by the encoder
                self.queue.release(record[-1])
                continue
            if parcel.events and size + len(data) + 1 > self._max_batch_bytes:
                yield parcel
                parcel, size = _Parcel([], []), 0
            parcel.events.append(data)
            parcel.sizes.append(record[-1])
            size += len(data) + 1
        if parcel.events:
            yield parcel

    def _attempt(self) -> None:
        """Send the first parcel of the line once, and act on the answer."""
        if self._refuses_all:
            self._put_probe_first()
        parcel = self._line[0]
        now = self._clock.monotonic()
        if parcel.first_try is None:
            parcel.first_try = now
        timeout = self._timeout
        if self._deadline is not None:
            timeout = min(timeout, max(self._deadline - now, 0.001))
        answer = self._send(parcel.events, timeout)
        self._ledger.sent_bytes.add(answer.sent_bytes)
        if answer.verdict is not Verdict.TAKEN:
            self._ledger.last_error = answer.reason
        self._act(parcel, answer)
        self._after_line()

    def _send(self, events: Sequence[bytes], timeout: float) -> Answer:
        try:
            return self._transport.send(events, timeout)
        except Exception as error:  # noqa: BLE001  a user's transport may raise anything
            _diagnostics.internal_error(error)
            return Answer(verdict=Verdict.RETRY, reason=type(error).__name__)

    def _act(self, parcel: _Parcel, answer: Answer) -> None:
        verdict = answer.verdict
        if verdict is Verdict.TAKEN:
            self._taken(parcel, answer)
        elif verdict is Verdict.RETRY:
            wait = self._policy.wait(self._attempts, answer.retry_after)
            is_mandated = answer.retry_after is not None
            self._postpone(answer, wait, is_mandated=is_mandated)
        elif verdict is Verdict.HOLD:
            self._hold(answer)
        elif verdict is Verdict.LOST:
            self._line.popleft()
            self._end(parcel.sizes, "endpoint_lost")
            self._tell_loss(answer)
        elif verdict is Verdict.TOO_LARGE and len(parcel.events) == 1:
            self._line.popleft()
            self._end(parcel.sizes, "too_large")
            self._tell_loss(answer)
        elif verdict is Verdict.REFUSED and self._refuses_all:
            self._hold(answer)
        elif len(parcel.events) > 1:
            self._split(parcel, answer)
        else:
            self._suspect(parcel, answer)

    # --- what becomes of a parcel ---

    def _taken(self, parcel: _Parcel, answer: Answer) -> None:
        self._line.popleft()
        self._attempts = 0
        self._retry_at = 0.0
        self._is_hurried = False
        self._ledger.batches.add(1)
        self._ledger.last_success_ns = self._clock.time_ns()
        rejected = answer.rejected
        for reason in rejected.values():
            self._reject(reason)
        accepted = len(parcel.events) - len(rejected)
        self._ledger.delivered.add(accepted)
        self._release(parcel.sizes)
        if accepted:
            self._is_taking()

    def _is_taking(self) -> None:
        """The endpoint takes events: those it refused alone are at fault themselves."""
        self._refused_in_a_row = 0
        if self._refuses_all:
            self._refuses_all = False
        else:
            self._reject_suspects()

    def _suspect(self, parcel: _Parcel, answer: Answer) -> None:
        """Put a refused event aside until it is clear whether all are refused."""
        self._line.popleft()
        self._suspects.append((parcel.events[0], parcel.sizes[0], answer.reason))
        self._refused_in_a_row += 1
        if self._refused_in_a_row >= _SUSPECTS:
            self._refuses_all = True
            events, sizes, _ = zip(*self._suspects)
            self._suspects.clear()
            held = _Parcel(list(events), list(sizes), parcel.first_try)
            self._line.appendleft(held)
            self._attempts = 0
            self._hold(answer)
        elif not self._line:
            self._reject_suspects()

    def _reject_suspects(self) -> None:
        for _, size, reason in self._suspects:
            self._reject(reason)
            self._release([size])
        self._suspects.clear()

    def _put_probe_first(self) -> None:
        """While all is refused, probe with a new event, or else with the next parcel."""
        self._line.rotate(-1)
        waiting = len(self._line)
        self._load(1)
        if len(self._line) > waiting:
            self._line.rotate(1)

    def _split(self, parcel: _Parcel, answer: Answer) -> None:
        self._line.popleft()
        self._bisections += 1
        if self._bisections > _MAX_BISECTIONS:
            for _ in parcel.events:
                self._reject(f"{answer.reason} (not isolated)")
            self._release(parcel.sizes)
            return
        self._line.extendleft(reversed(parcel.halves()))

    def _hold(self, answer: Answer) -> None:
        """Keep everything and probe slowly: the endpoint is at fault, not the events."""
        self._postpone(answer, self._policy.probe(self._attempts), is_mandated=False)

    def _postpone(self, answer: Answer, wait: float, *, is_mandated: bool) -> None:
        now = self._clock.monotonic()
        self._give_up_old(now)
        self._ledger.retries.add(1)
        self._attempts += 1
        if self._line:
            first_try = self._line[0].first_try
            if not is_mandated and first_try is not None:
                wait = min(wait, max(first_try + self._retry_for - now, 0.001))
        self._retry_at = now + wait
        self._is_wait_mandated = is_mandated
        _diagnostics.note(
            f"not delivered {answer.verdict.value}",
            f"pgtrack could not deliver events ({answer.reason}). They are kept and "
            f"sent again; {self._ledger.pending.value:,} wait.",
        )

    def _give_up_old(self, now: float) -> None:
        """Drop the parcels whose first try is longer ago than `retry_for`."""
        kept = []
        for parcel in self._line:
            first_try = parcel.first_try
            if first_try is not None and now - first_try >= self._retry_for:
                self._end(parcel.sizes, "retry_expired")
                _diagnostics.note(
                    "retry_expired",
                    f"pgtrack gave up events after {self._retry_for:g} s of retries; "
                    "they are counted in pgtrack.stats().dropped['retry_expired'].",
                    40,
                )
            else:
                kept.append(parcel)
        self._line = collections.deque(kept)

    def _after_line(self) -> None:
        """Once nothing is left of what was taken, those who wait for it may go on."""
        if self._line or self._suspects:
            return
        self._bisections = 0
        for marker in self._markers:
            marker.reach()
        self._markers.clear()

    def _abandon(self) -> None:
        """Drop what is left after the last deadline."""
        for parcel in self._line:
            self._end(parcel.sizes, "shutdown")
        self._line.clear()
        self._reject_suspects()
        self._drop_queued()
        self._after_line()

    # --- counting ---

    def _reject(self, reason: str) -> None:
        self._ledger.reject(reason)
        _diagnostics.note(
            "rejected",
            f"the endpoint rejected events for good ({reason}); they are counted in "
            "pgtrack.stats().rejected.",
        )

    def _end(self, sizes: Sequence[int], reason: DropReason) -> None:
        self._ledger.drop(reason, len(sizes))
        self._release(sizes)

    def _release(self, sizes: Sequence[int]) -> None:
        for size in sizes:
            self.queue.release(size)

    def _tell_loss(self, answer: Answer) -> None:
        _diagnostics.note(
            f"lost {answer.verdict.value}",
            f"pgtrack dropped events: {answer.verdict.value} ({answer.reason}).",
        )
