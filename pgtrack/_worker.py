"""
The worker: the threads and the waiting of one client.

One thread, started with the first event, does what the outbox says is next, and sends
what it says is to be sent.  Any thread can do the work in its place: at the end of a
process no thread can be started, and the caller delivers itself.  With a spool there
is a second one, which brings events to disk when the queue is nearly full and the
first one is waiting for the endpoint.

What callers tell the worker are flags, set before they wake it.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from typing import TYPE_CHECKING, Literal

from pgtrack import _diagnostics
from pgtrack._clock import Signal
from pgtrack._context import SUPPRESSED, current_frame, push
from pgtrack._outbox import Outbox
from pgtrack._queue import Marker
from pgtrack._tracing import untraced
from pgtrack.typing import Answer, Clock, Transport, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pgtrack._config import Config
    from pgtrack._ledger import Ledger
    from pgtrack._record import Encoder
    from pgtrack._retry import RetryPolicy
    from pgtrack._spool import Spool

__all__ = ["Worker"]

_JOIN = 0.05
"""Seconds that a thread gets to count what it was cut off from."""

_TAKE_OVER = 0.2
"""Seconds that it then gets to come to its end, if more events are to be taken."""

_LOOK_AGAIN = 0.02
"""Seconds after which a flush looks again who delivers, while a thread is starting."""

_AFTER_ERROR = 30.0
"""Seconds to wait after an error of our own, so that it does not come in a storm."""

_MOST_REST = 5.0
"""Most seconds at the end of a process to bring to disk what could not be sent."""


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

        spool: Where events rest on disk, if they do.
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
        spool: Spool | None = None,
    ) -> None:
        self._make_transport = transport
        self._ledger = ledger
        self._clock = clock
        self._timeout = float(config.timeout)
        self._has_spool = spool is not None
        self._outbox = Outbox(
            config=config,
            encoder=encoder,
            ledger=ledger,
            policy=policy,
            clock=clock,
            spool=spool,
            wake=self._wake,
            relieve=self._relieve,
        )
        self.queue = self._outbox.queue
        self.put = self._outbox.put if config.spool_each_event else self.queue.put
        self._begin()

    def _begin(self) -> None:
        """Set what a process has of its own."""
        self._transport = self._make_transport()
        is_immediate = getattr(self._transport, "is_immediate", False)
        self._outbox.is_immediate = is_immediate
        self._signal = Signal()
        # Held by whoever delivers.  Only our own thread waits for it, when it starts.
        self._delivering = threading.Lock()
        # Empty while a thread is started.
        self._starting = [None]
        self._thread: threading.Thread | None = None
        self._deliverer: int | None = None
        self._relief = Signal()
        self._reliever: threading.Thread | None = None
        # Told by callers.
        self._is_hurried = False
        self._is_abandoned = False
        self._late: Callable[[], None] | None = None
        self._deadline: float | None = None
        # Known to whoever delivers.
        self._is_open = True
        self._is_stopping = False

    def start_over(self) -> None:
        """Forget what is the parent's; called in a forked child."""
        disown = getattr(self._transport, "disown", None)
        if disown is not None:
            disown()
        self._outbox.start_over()
        self._ledger.reset()
        self._begin()

    # --- called by any thread ---

    def _wake(self) -> None:
        if self._is_abandoned:  # whoever put it had not seen that all is closed
            if self._outbox.is_finished:
                self._outbox.drop_queued()
            return
        if self._late is not None:
            self._late()
            return
        self._signal.give()
        if self._thread is None:
            self.start()

    @property
    def _has_thread(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Start the thread; where none can be had, leave the work to a flush."""
        # Taking the only element is one call into C.  A lock would do for threads, but
        # gevent's lets others run when it is held, and `emit` would wait for them.
        try:
            self._starting.pop()
        except IndexError:
            return
        try:
            if self._thread is None:
                self._thread = thread = _thread("pgtrack", self._run)
                thread.start()
        except RuntimeError:
            self._thread = None
            self.queue.wake_at = len(self.queue) + self._outbox.batch_size
        finally:
            self._starting.append(None)

    @property
    def delivered(self) -> int:
        """How many events the endpoint has taken."""
        return self._ledger.delivered.value

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is delivering, and so cannot wait for itself."""
        me, reliever = threading.get_ident(), self._reliever
        return self._deliverer == me or (reliever is not None and reliever.ident == me)

    def flush(self, timeout: float, *, may_rest: bool = False) -> bool:
        """
        Wait until all that was emitted before came to an end; True if it did.

        Args:
            timeout: Most seconds to wait.

            may_rest: Whether, with the endpoint down, it is enough that all is on disk.
        """
        frame = current_frame()
        is_ours = frame is not None and frame.is_suppressed  # as in `before_send`
        if is_ours or self.is_own_thread or self._outbox.lock.is_mine:
            return False
        if self._outbox.has_ended(with_adopted=may_rest):
            return True
        thread = self._thread
        if self._is_abandoned and thread is not None:
            _join(thread, timeout)  # it has yet to count what it was cut off from
            return self._outbox.has_ended()
        deadline = self._clock.monotonic() + timeout
        marker = Marker(may_rest=may_rest)
        self.queue.mark(marker)
        # Where all may rest, an endpoint that is down is not worth a last attempt.
        if not (may_rest and self._has_spool and self._outbox.line.is_down):
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
        return is_reached or self._outbox.has_ended()

    def close(self, timeout: float) -> bool:
        """
        Flush, then stop; what is left after *timeout* seconds is dropped, counted.

        With a spool it is written to disk instead, which may take `_MOST_REST` more.
        """
        if self.is_own_thread or self._outbox.lock.is_mine:
            self.rest()
            return False
        self.queue.is_closed = True
        self._deadline = self._clock.monotonic() + timeout
        dropped = self._ledger.dropped("shutdown")
        is_flushed = self.flush(timeout, may_rest=True)
        self._is_abandoned = True
        if not is_flushed:
            self._tell_transport("abort")
        self._signal.give()
        thread = self._thread
        if thread is not None:
            _join(thread, _JOIN)
        if self._delivering.acquire(blocking=False):
            try:
                self._finish()
            finally:
                self._delivering.release()
        else:
            self._leave_to_other()
        if is_flushed or not self._has_spool:
            return is_flushed
        is_kept = dropped == self._ledger.dropped("shutdown")
        return is_kept and self._ledger.pending.value == 0

    def rest(self) -> None:
        """Bring to disk what could not be sent, if there is a spool."""
        lock = self._outbox.lock
        if self._has_spool and not lock.is_mine and lock.acquire(_MOST_REST):
            try:
                self._outbox.rest_all(self._clock.monotonic() + _MOST_REST)
            finally:
                lock.release()

    def defer(self, act: Callable[[], object]) -> bool:
        """
        Have *act* called once the calling thread is done with what it is just doing.

        For a signal handler.  False, and nothing is deferred, if it does nothing here.
        """
        return self._outbox.lock.defer(act)

    def _leave_to_other(self) -> None:
        """Save what can be saved from a thread that hangs in an attempt."""
        self.rest()
        self._outbox.note_left()
        self._outbox.is_finished = True
        self._outbox.drop_queued()
        _diagnostics.tell()

    def linger(self, late: Callable[[], None]) -> None:
        """
        Take events once more after `close`, but start no thread for them.

        Where a thread hangs, that is all over.

        Args:
            late: Called with each event; to be delivered, it needs a `flush`.
        """
        if self._delivering.acquire(timeout=_TAKE_OVER):
            self._late = late
            self._is_abandoned = False
            self._outbox.is_finished = False
            self._deadline = None
            self.queue.wake_at = 1
            self.queue.is_closed = False
            self._delivering.release()

    @property
    def is_closed(self) -> bool:
        """Whether no more events are taken."""
        return self.queue.is_closed

    def hurry(self) -> None:
        """Let events wait for others no more: the process is about to end."""
        self._outbox.interval = 0.0

    def retire(self) -> None:
        """Take no more events, and stop in the background when all have ended."""
        self.queue.is_closed = True
        self._outbox.is_retired = True
        if self._ledger.pending.value:
            self._wake()
        else:
            self._signal.give()

    def _relieve(self) -> None:
        """Have the queue brought to disk; called by whoever finds it nearly full."""
        self._relief.give()

    # --- called by whoever delivers ---

    def _run(self) -> None:
        """Deliver until there is no more to come."""
        with self._delivering:
            self._deliverer = threading.get_ident()
            push(SUPPRESSED)
            reliever = self._start_reliever()
            try:
                while not self._is_abandoned:
                    delay = self._step_safely()
                    if self._outbox.is_retired and self._outbox.is_over:
                        break
                    self._wait(delay)
                self._finish()
            finally:
                self._deliverer = None
                self._thread = None
                self.queue.wake_at = 1
                if reliever is not None:
                    self._is_stopping = True
                    self._relief.give()
                    reliever.join()
                    self._reliever = None  # its number may be another thread's now
        if len(self.queue):  # put while this thread was no longer looking
            self._wake()

    def _start_reliever(self) -> threading.Thread | None:
        if not self._has_spool:
            return None
        self._is_stopping = False
        try:
            self._reliever = _thread("pgtrack-spool", self._run_reliever)
            self._reliever.start()
        except RuntimeError:  # at the end of the interpreter
            self._reliever = None
        return self._reliever

    def _run_reliever(self) -> None:
        """Bring events to disk whenever the queue is nearly full."""
        push(SUPPRESSED)
        while self._relief.wait() and not self._is_stopping:
            self._relieve_safely()

    def _relieve_safely(self) -> None:
        try:
            self._outbox.relieve()
        except Exception as error:  # noqa: BLE001  the thread must outlive our errors
            _diagnostics.internal_error(error)

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
        with self._outbox.lock:
            now = self._clock.monotonic()
            is_to_send, delay = self._outbox.next_step(now, is_hurried=self._is_hurried)
        if is_to_send:
            self._attempt()
        return delay

    def _attempt(self) -> None:
        """Send what is next in the line once, and have the answer settled."""
        outbox = self._outbox
        self._is_hurried = False
        self._is_open = True
        with outbox.lock:
            if outbox.line.is_refused:
                outbox.load(1)  # a new event is the best to ask with
            now = self._clock.monotonic()
            events = outbox.line.next(now).events
        timeout = self._timeout
        if self._deadline is not None:
            timeout = min(timeout, max(self._deadline - now, 0.001))
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
        with outbox.lock:
            outbox.settle(answer)

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

    def _finish(self) -> None:
        """Close the connection, and the spool; what is left is written or dropped."""
        with self._outbox.lock:
            if self._is_abandoned:
                self._outbox.finish(self._clock.monotonic() + _MOST_REST)
            else:
                self._outbox.close_spool()
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


def _thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Return a daemon thread that does *work*, outside of any context."""
    run = contextvars.Context().run
    return threading.Thread(target=run, args=(work,), name=name, daemon=True)


def _join(thread: threading.Thread, timeout: float) -> None:
    with contextlib.suppress(RuntimeError):  # another one is just starting it
        thread.join(timeout)
