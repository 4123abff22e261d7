"""
The worker: takes records off the queue, and sees each to its end.

One thread a client, started with the first event.  It takes what the queue holds,
encodes it, and works on that line of parcels until each event was delivered,
rejected or given up; then it takes more.  So the order of emission is kept, and
what waits stays in the bounded queue.  Any thread can do the work in its place:
at the end of a process no thread can be started, and the caller delivers itself.

What callers tell the worker are flags, set before they wake it; whatever else it knows
belongs to the thread that holds `_delivering`.
"""

from __future__ import annotations

import contextvars
import threading
from typing import TYPE_CHECKING, Literal

from pgtrack import _diagnostics
from pgtrack._clock import Signal
from pgtrack._context import SUPPRESSED, push
from pgtrack._line import Line, pack
from pgtrack._queue import NEVER, BoundedQueue, Marker
from pgtrack._tracing import untraced
from pgtrack.typing import Answer, Clock, Transport, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pgtrack._config import Config
    from pgtrack._ledger import Ledger
    from pgtrack._record import Encoder, Record
    from pgtrack._retry import RetryPolicy

__all__ = ["Worker"]

_MAX_BATCH = 1_000
"""Most events of a request, by ProductGraph's documentation and source."""

_CHUNK = 50
"""Records that are encoded before their bytes are looked at."""

_JOIN = 0.05
"""Seconds that a thread gets to count what it was cut off from."""

_LOOK_AGAIN = 0.02
"""Seconds after which a flush looks again who delivers, while a thread is starting."""

_AFTER_ERROR = 30.0
"""Seconds to wait after an error of our own, so that it does not come in a storm."""


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
    ) -> None:
        self._encoder = encoder
        self._make_transport = transport
        self._ledger = ledger
        self._policy = policy
        self._clock = clock
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
        # Held by whoever delivers.  Only our own thread waits for it, when it starts.
        self._delivering = threading.Lock()
        # Held while a thread is started; never waited for.
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._deliverer: int | None = None
        # Told by callers.
        self._is_hurried = False
        self._interval = self._batch_interval
        self._is_retired = False
        self._is_abandoned = False
        self._deadline: float | None = None
        # Known to whoever delivers.
        self._line = Line(
            ledger=self._ledger,
            release=self.queue.release,
            policy=self._policy,
            retry_for=self._retry_for,
        )
        self._markers: list[Marker] = []
        self._since: float | None = None
        self._is_open = True

    def start_over(self) -> None:
        """Forget what is the parent's; called in a forked child."""
        disown = getattr(self._transport, "disown", None)
        if disown is not None:
            disown()
        self.queue.reset()
        self._ledger.reset()
        self._begin()

    # --- called by any thread ---

    def _wake(self) -> None:
        if self._is_abandoned:
            self._drop_queued()  # whoever put it had not seen yet that all is closed
            return
        self._signal.give()
        if not self._has_thread:
            self._start()

    @property
    def _has_thread(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

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
        except RuntimeError:
            self.queue.wake_at = len(self.queue) + self._batch_size
        finally:
            self._starting.release()

    @property
    def delivered(self) -> int:
        """How many events the endpoint has taken."""
        return self._ledger.delivered.value

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
        thread = self._thread
        if self._is_abandoned and thread is not None:
            thread.join(timeout)  # it has yet to count what it was cut off from
            return self._ledger.pending.value == 0
        deadline = self._clock.monotonic() + timeout
        marker = Marker()
        self.queue.mark(marker)
        self._is_hurried = True
        self._wake()
        while not marker.is_reached:
            left = deadline - self._clock.monotonic()
            if left <= 0:
                break
            if self._has_thread:
                marker.wait(left)
                break
            if self._delivering.acquire(blocking=False):
                contextvars.Context().run(self._deliver_here, marker, deadline)
                break
            marker.wait(min(left, _LOOK_AGAIN))
        # Abandoned, a marker is reached, too, while what was being sent may still be.
        is_reached = marker.is_reached and not self._is_abandoned
        return is_reached or self._ledger.pending.value == 0

    def close(self, timeout: float) -> bool:
        """
        Flush, then stop; what is left after *timeout* seconds is dropped, counted.
        """
        if self.is_own_thread:
            return False
        self.queue.is_closed = True
        self._deadline = self._clock.monotonic() + timeout
        is_flushed = self.flush(timeout)
        self._is_abandoned = True
        if not is_flushed:
            self._tell_transport("abort")
        self._signal.give()
        thread = self._thread
        if thread is not None:
            thread.join(_JOIN)
        if self._delivering.acquire(blocking=False):
            try:
                self._finish()
            finally:
                self._delivering.release()
        else:
            self._drop_queued()  # the rest is with a thread that hangs
        return is_flushed

    def hurry(self) -> None:
        """Let events wait for others no more: the process is about to end."""
        self._interval = 0.0

    def retire(self) -> None:
        """Take no more events, and stop in the background when all have ended."""
        self.queue.is_closed = True
        self._is_retired = True
        if self._ledger.pending.value:
            self._wake()
        else:
            self._signal.give()

    def _drop_queued(self) -> None:
        while (item := self.queue.take()) is not None:
            if isinstance(item, Marker):
                item.reach()
            else:
                self._ledger.drop("shutdown")
                self.queue.release(item[-1])

    # --- called by whoever delivers ---

    def _run(self) -> None:
        """Deliver until there is no more to come."""
        with self._delivering:
            self._deliverer = threading.get_ident()
            push(SUPPRESSED)
            try:
                while not self._is_abandoned:
                    delay = self._step_safely()
                    if delay is None and self._is_retired:
                        break
                    self._wait(delay)
                self._finish()
            finally:
                self._deliverer = None
                self._thread = None
                self.queue.wake_at = 1
        if len(self.queue):  # put while this thread was no longer looking
            self._wake()

    def _deliver_here(self, marker: Marker, deadline: float) -> None:
        """Deliver on the calling thread, in place of one that cannot be had."""
        self._deliverer = threading.get_ident()
        push(SUPPRESSED)
        before, self._deadline = self._deadline, deadline
        try:
            while not (marker.is_reached or self._is_abandoned):
                delay = self._step_safely()
                left = deadline - self._clock.monotonic()
                if left <= 0 or delay is None or delay > left:
                    break
                self._wait(delay)
        finally:
            self._deadline = before
            self._deliverer = None
            self.queue.wake_at = 1
            self._delivering.release()

    def _wait(self, delay: float | None) -> None:
        _diagnostics.tell()
        if delay is None or delay > 0:
            self._clock.wait(self._signal, delay)

    def _step_safely(self) -> float | None:
        try:
            return self._step()
        except Exception as error:  # noqa: BLE001  the thread must outlive our errors
            _diagnostics.internal_error(error)
            return _AFTER_ERROR

    def _step(self) -> float | None:
        """
        Do one thing, at most one attempt; return how long to wait before the next.

        None stands for: until woken.
        """
        now = self._clock.monotonic()
        if self._line:
            wait = self._line.wait(now)
            if wait > 0 and not self._may_hurry():
                return wait
            self._attempt()
            return 0.0
        due_in = self._due_in(now)
        if due_in is not None and due_in <= 0:
            self._load(_MAX_BATCH)
            return 0.0
        return due_in

    def _may_hurry(self) -> bool:
        """Whether a flush asks for an attempt before its time."""
        return self._is_hurried and not self._line.is_told_when

    def _due_in(self, now: float) -> float | None:
        """Return how long the queue may still collect, and ask to be woken before."""
        queue = self.queue
        length = len(queue)
        if length == 0:
            self._since = None
            return self._unless_reached(1, None)
        if queue.is_marked or self._is_retired or self._is_immediate:
            return 0.0
        if self._since is None:
            self._since = now
        wait = self._since + self._interval - now
        return self._unless_reached(self._batch_size, wait)

    def _unless_reached(self, length: int, wait: float | None) -> float | None:
        """Return *wait*, to be woken at a *length*; 0 if that is reached already."""
        self.queue.wake_at = length
        return 0.0 if len(self.queue) >= length else wait

    def _load(self, most: int) -> None:
        """
        Take up to *most* records off the queue, up to a marker, into the line.

        No more than about a request's worth: what sessions add to each event is shared
        by records, but not by their bytes.
        """
        self._since = None
        self.queue.wake_at = NEVER
        encoded: list[tuple[bytes, int]] = []
        taken = length = 0
        while taken < most and length < self._max_batch_bytes:
            wanted = min(most - taken, _CHUNK)
            records = self._take(wanted)
            chunk = list(self._encode(records))
            encoded += chunk
            taken += len(records)
            length += sum(len(data) for data, _ in chunk)
            if len(records) < wanted:
                break
        self._line.extend(pack(encoded, self._max_batch_bytes))
        self._reach_markers()

    def _take(self, most: int) -> list[Record]:
        """Take up to *most* records off the queue, up to a marker."""
        records: list[Record] = []
        while len(records) < most:
            item = self.queue.take()
            if item is None:
                break
            if isinstance(item, Marker):
                self._markers.append(item)
                break
            records.append(item)
        return records

    def _encode(self, records: Sequence[Record]) -> Iterator[tuple[bytes, int]]:
        """Yield the bytes of each event, and its size in the bound of the queue."""
        for data, record in self._encoder.encode(records):
            if data is None:  # dropped and counted by the encoder
                self.queue.release(record[-1])
            else:
                yield data, record[-1]

    def _attempt(self) -> None:
        """Send what is next in the line once, and let it settle the answer."""
        self._is_hurried = False
        self._is_open = True
        if self._line.is_refused:
            self._load(1)  # a new event is the best to ask with
        now = self._clock.monotonic()
        timeout = self._timeout
        if self._deadline is not None:
            timeout = min(timeout, max(self._deadline - now, 0.001))
        events = self._line.next(now).events
        answer = self._send(events, timeout)
        _diagnostics.detail(
            "pgtrack sent %d events (%d bytes): %s %s",
            *(len(events), answer.sent_bytes, answer.verdict.value, answer.reason),
        )
        self._ledger.sent_bytes.add(answer.sent_bytes)
        if answer.verdict is Verdict.TAKEN:
            self._ledger.batches.add(1)
            self._ledger.last_success_ns = self._clock.time_ns()
        else:
            self._ledger.last_error = answer.reason
        self._line.settle(answer, self._clock.monotonic())
        self._reach_markers()

    def _send(self, events: Sequence[bytes], timeout: float) -> Answer:
        try:
            with untraced():
                answer: object = self._transport.send(events, timeout)
            if isinstance(answer, Answer):
                return answer
            reason = f"an answer of type {type(answer).__name__}"
        except (Exception, SystemExit) as error:  # noqa: BLE001  it may be a user's
            reason = type(error).__name__
        reason = f"{reason} from {type(self._transport).__name__}"
        return Answer(verdict=Verdict.RETRY, reason=reason)

    def _reach_markers(self) -> None:
        """Once nothing is left of what was taken, those who wait for it may go on."""
        while self._markers and not self._line:
            self._markers.pop().reach()

    def _finish(self) -> None:
        """Close the connection; what is left after the last deadline is dropped."""
        if self._is_abandoned:
            left = self._ledger.pending.value
            if left:
                _diagnostics.note(
                    "shutdown",
                    f"pgtrack dropped {left:,} events that could not be sent before "
                    "the end; pgtrack.stats().dropped['shutdown'] counts them.",
                )
            self._line.give_up("shutdown")
            self._reach_markers()
            self.queue.wake_at = 1  # who puts something yet is to see to it himself
            self._drop_queued()
        if self._is_open:
            self._is_open = False
            self._tell_transport("close")
        _diagnostics.tell()

    def _tell_transport(self, verb: Literal["abort", "close"]) -> None:
        try:
            getattr(self._transport, verb)()
        except Exception as error:  # noqa: BLE001  it may be a user's
            name = f"{type(self._transport).__name__}.{verb}"
            _diagnostics.note(name, f"{name} raised {type(error).__name__}.")
