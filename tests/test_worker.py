"""The worker: batches, deadlines, threads, and the ends of all three."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import Interrupt, in_fork, interrupts, start_together
from pgtrack import Client, Config, _diagnostics, _journal, _outbox, _queue, _worker
from pgtrack._context import current_frame
from pgtrack._folder import Folder
from pgtrack._ledger import Ledger
from pgtrack._retry import RetryPolicy
from pgtrack._spool import Spool
from pgtrack._worker import Worker
from pgtrack.testing import FakeClock, RecordingTransport
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pgtrack._record import Record
    from pgtrack.typing import Clock, Transport

TAKEN = Answer(verdict=Verdict.TAKEN)
RETRY = Answer(verdict=Verdict.RETRY, reason="503")
REFUSED = Answer(verdict=Verdict.REFUSED, reason="400 bad")

SLACK = 0.1
"""How exactly deadlines are honoured, in seconds."""


class NamingEncoder:
    """Makes events that are known by their names; drops those of the name `drop`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def encode(self, records: Iterable[Record]) -> list[tuple[bytes | None, Record]]:
        """Encode as the real one does, but less of it."""
        return [(self._encode(record[5]["name"]), record) for record in records]

    def encode_here(self, record: Record) -> bytes | None:
        """Encode one record on the thread that puts it."""
        return self._encode(record[5]["name"])

    def _encode(self, name: str) -> bytes | None:
        if name == "drop":
            self._ledger.drop("before_send")
            return None
        wire = {"event_id": "e", "session.id": "s", "event.type": "custom"}
        return json.dumps({**wire, "event.name": name}).encode()


class Bench:
    """A worker with a recording transport."""

    def __init__(
        self,
        *answers: Any,
        clock: Clock | None = None,
        transport: Transport | None = None,
        **options: Any,
    ) -> None:
        options = {"project_id": "p", "endpoint": "console:", **options}
        config = Config(**options)
        clock = pgtrack._clock.SYSTEM_CLOCK if clock is None else clock
        self.ledger = Ledger()
        self.recording = RecordingTransport(answers)
        self.transport = self.recording if transport is None else transport
        has_spool = config.spool_dir is not None
        self.encoder = NamingEncoder(self.ledger)
        self.worker = Worker(
            config=config,
            encoder=self.encoder,  # type: ignore[arg-type]
            transport=lambda: self.transport,
            ledger=self.ledger,
            policy=RetryPolicy(jitter=lambda: 1.0),
            clock=clock,
            spool=Spool(config, self.ledger, clock) if has_spool else None,
        )

    def put(self, name: object = "event", size: int = 100) -> bool:
        """Put a record as a client does."""
        self.ledger.emitted.add(1)
        fields = {"name": str(name)}
        return self.worker.put((0, "custom", "s", None, {}, fields, None, None, size))

    @property
    def sent(self) -> list[list[str | None]]:
        """The names of the events of each attempt."""
        return [[event.name for event in batch] for batch in self.recording.batches]

    @property
    def taken(self) -> list[str | None]:
        """The names of the events that were taken."""
        return [event.name for event in self.recording.taken]


class Steps(Bench):
    """A worker whose steps are taken by the test, on a clock that moves by waiting."""

    def __init__(self, *answers: Any, **options: Any) -> None:
        self.clock = FakeClock()
        super().__init__(*answers, clock=self.clock, **options)

    def run(self, seconds: float = 0.0) -> float | None:
        """Step until the time is over; return how long the worker waits then."""
        end = self.clock.monotonic() + seconds
        while True:
            delay = self.worker._step()
            left = end - self.clock.monotonic()
            if delay is None or delay > left:
                self.clock.advance(left)
                return None if delay is None else delay - left
            self.clock.advance(delay)


class Stuck:
    """A transport that hangs until it is let go, or aborted if it can be."""

    is_immediate = False

    def __init__(self, *, can_abort: bool = True) -> None:
        self._can_abort = can_abort
        self.is_sending = threading.Event()
        self.go = threading.Event()
        self.calls: list[str] = []

    def send(self, events: Sequence[bytes], timeout: float) -> Answer:
        """Wait, at most a minute."""
        self.is_sending.set()
        self.go.wait(50)
        return TAKEN if self._can_abort else RETRY

    def abort(self) -> None:
        """Let go."""
        self.calls.append("abort")
        if self._can_abort:
            self.go.set()

    def close(self) -> None:
        """Tell that it was closed."""
        self.calls.append("close")


@pytest.fixture(name="threadless")
def _threadless(monkeypatch) -> None:
    """No thread can be started, as at the end of a process."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def elapsed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what *function* returns, and how long it took."""
    start = time.monotonic()
    result = function()
    return result, time.monotonic() - start


def wait_until(is_so: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Return whether something comes to be so within the *timeout*."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not is_so():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.001)
    return True


@pytest.mark.usefixtures("threadless")
class TestBatches:
    """What makes a batch: count, age, bytes, or somebody who waits."""

    def test_it_sleeps_while_there_is_nothing(self) -> None:
        """Without events it waits until woken, and the first event wakes it."""
        bench = Steps()

        assert bench.run() is None
        assert 1 == bench.worker.queue.wake_at

    def test_a_full_batch_goes_at_once(self) -> None:
        """`batch_size` events are sent without waiting for more."""
        bench = Steps(batch_size=3)
        bench.put("a")
        bench.put("b")
        waits_for = bench.run()
        bench.put("c")
        bench.run()

        assert 5.0 == waits_for
        assert [["a", "b", "c"]] == bench.sent

    def test_it_asks_to_be_woken_for_a_full_batch(self) -> None:
        """While it waits for more, the event that fills the batch wakes it."""
        bench = Steps(batch_size=3)
        bench.put("a")
        bench.run()

        assert 3 == bench.worker.queue.wake_at

    def test_an_old_batch_goes_as_it_is(self) -> None:
        """`batch_interval` after the first event, what there is is sent."""
        bench = Steps(batch_interval=2.0)
        bench.put("a")
        bench.run(1.5)
        bench.put("b")
        before = len(bench.sent)
        bench.run(0.5)

        assert (0, [["a", "b"]]) == (before, bench.sent)

    def test_each_batch_has_its_own_age(self) -> None:
        """The interval begins anew with the first event after a batch."""
        bench = Steps(batch_interval=2.0)
        bench.put("a")
        bench.run(10.0)
        bench.put("b")

        assert 2.0 == bench.run()

    def test_in_a_hurry_nothing_waits(self) -> None:
        """Once the end is near each event goes as it comes; a child takes its time."""
        bench = Steps(batch_interval=60)
        bench.worker.hurry()
        bench.put("a")
        bench.run()
        bench.put("b")
        bench.run()
        bench.worker.start_over()
        bench.put("c")

        assert ([["a"], ["b"]], 60.0) == (bench.sent, bench.run())

    def test_a_backlog_goes_in_larger_batches(self) -> None:
        """What has piled up travels by the thousand, in order."""
        bench = Steps(batch_size=50)
        for i in range(2500):
            bench.put(i)
        bench.run(10.0)

        assert [1000, 1000, 500] == [len(batch) for batch in bench.sent]
        assert [str(i) for i in range(2500)] == bench.taken

    def test_batches_are_bounded_by_bytes(self) -> None:
        """Events that do not fit into one body go in several, in order."""
        bench = Steps(max_batch_bytes=1000, max_event_bytes=1000)
        for i in range(30):
            bench.put(i)
        bench.run(10.0)

        encode = NamingEncoder(bench.ledger)._encode
        for batch in bench.sent:
            body = b",".join(encode(str(name)) or b"" for name in batch)
            assert len(b'{"events":[' + body + b"]}") <= 1000
        assert len(bench.sent) > 1
        assert [str(i) for i in range(30)] == bench.taken

    def test_what_the_encoder_drops_leaves_its_place(self) -> None:
        """An event dropped on the way is accounted for, and the others go."""
        bench = Steps()
        for name in ("drop", "a", "drop"):
            bench.put(name)
        bench.run(10.0)

        assert ["a"] == bench.taken
        stats = bench.ledger.stats()
        assert (2, 1, 0) == (
            stats.dropped["before_send"],
            stats.delivered,
            stats.pending,
        )

    def test_a_batch_of_nothing_is_not_sent(self) -> None:
        """Where all are dropped on the way, there is no request."""
        bench = Steps()
        bench.put("drop")
        bench.run(10.0)

        assert [] == bench.sent

    def test_a_local_endpoint_does_not_wait_for_more(self) -> None:
        """Console and file show each event as it comes."""
        transport = RecordingTransport()
        transport.is_immediate = True
        bench = Steps(transport=transport)
        bench.put("a")
        bench.run()

        assert 1 == len(transport.batches)

    def test_the_ledger_tells_of_attempts(self) -> None:
        """Batches, bytes, the last error and the last success are kept."""
        taken = Answer(verdict=Verdict.TAKEN, sent_bytes=70)
        failed = Answer(verdict=Verdict.RETRY, reason="503 busy", sent_bytes=7)
        bench = Steps(failed, taken)
        bench.put("a")
        bench.run(10.0)

        stats = bench.ledger.stats()
        assert (1, 1, 77, "503 busy") == (
            stats.batches,
            stats.retries,
            stats.sent_bytes,
            stats.last_error,
        )
        assert stats.last_success is not None
        assert 2026 == stats.last_success.year

    def test_order_is_kept_over_failures(self) -> None:
        """What is emitted while a batch waits goes after it."""
        bench = Steps(RETRY, RETRY, batch_size=1)
        bench.put("a")
        bench.run(1.0)
        bench.put("b")
        bench.run(10.0)

        assert ["a", "b"] == bench.taken

    def test_a_dead_endpoint_is_not_stormed(self) -> None:
        """Without time for retries, batch after batch goes slower and slower."""
        bench = Steps(*[RETRY] * 100, retry_for=0, batch_size=1)
        for i in range(100):
            bench.put(i)
            bench.run(1.0)

        assert 9 == len(bench.sent)
        stats = bench.ledger.stats()
        assert stats.is_balanced
        assert stats.dropped["retry_expired"] == sum(map(len, bench.sent))

    def test_new_events_are_what_a_refusing_endpoint_is_asked_with(self) -> None:
        """While all is refused, one event at a time leaves the queue."""
        bench = Steps(*[REFUSED] * 30)
        for i in range(50):
            bench.put(i)
        bench.run(12.0)
        for name in ("x", "y"):
            bench.put(name)
        before = len(bench.sent)
        bench.run(5.0)

        assert [["x"]] == bench.sent[before:]
        assert 1 == len(bench.worker.queue)
        assert {} == bench.ledger.stats().rejected

    @pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
    def test_the_queue_follows_the_settings(self, policy) -> None:
        """Bounds and policy are those of the config."""
        bench = Steps(max_queue_size=3, max_queue_bytes=10_000, overflow=policy)
        for i in range(5):
            bench.put(i)
        bench.put("large", size=10_001)
        bench.run(10.0)

        kept = ["0", "1", "2"] if policy == "drop_newest" else ["2", "3", "4"]
        assert kept == bench.taken
        assert {"queue_full": 3} == bench.ledger.stats().dropped


@pytest.mark.usefixtures("threadless")
class TestTransports:
    """A user's transport may do anything."""

    @pytest.mark.parametrize("error", [ValueError("secret"), SystemExit(3), OSError()])
    def test_what_it_raises_is_a_failure_to_retry(self, error) -> None:
        """Any error, also one that ends a process, is waited out; its text stays."""
        bench = Steps()
        answers: Iterator[BaseException | None] = iter([error])

        def send(events: Sequence[bytes], timeout: float) -> Answer:
            if (raised := next(answers, None)) is not None:
                raise raised
            return TAKEN

        bench.recording.send = send  # type: ignore[method-assign]
        bench.put("a")
        bench.run(10.0)

        stats = bench.ledger.stats()
        assert (1, 1) == (stats.delivered, stats.retries)
        assert f"{type(error).__name__} from RecordingTransport" == stats.last_error

    def test_what_is_no_answer_is_a_failure_to_retry(self) -> None:
        """A transport that returns something else than an Answer loses nothing."""
        bench = Steps(lambda _: TAKEN)
        answers = iter([None, "202", TAKEN])
        bench.recording.send = lambda *_: next(answers)  # type: ignore[method-assign,assignment,return-value]
        bench.put("a")
        bench.run(10.0)

        stats = bench.ledger.stats()
        assert (1, 2) == (stats.delivered, stats.retries)
        assert "an answer of type str from RecordingTransport" == stats.last_error

    def test_a_verdict_is_checked_where_it_is_made(self) -> None:
        """An Answer cannot be made of a verdict that is none."""
        with pytest.raises(TypeError):
            Answer(verdict="taken")  # type: ignore[arg-type]

    def test_it_is_told_how_long_it_has(self) -> None:
        """An attempt has the `timeout` of the settings, or what a close leaves."""
        bench = Steps(timeout=7.0)
        told: list[float] = []

        def send(events: Sequence[bytes], timeout: float) -> Answer:
            told.append(timeout)
            return RETRY if len(told) < 3 else TAKEN

        bench.recording.send = send  # type: ignore[method-assign]
        bench.put("a")
        bench.run(5.0)
        bench.worker._deadline = bench.clock.monotonic() + 2.0
        bench.run(1.0)
        bench.worker._deadline = 0.0
        bench.worker._outbox.line._next_try = 0.0
        bench.run(1.0)

        assert told[0] == 7.0
        assert all(0.001 <= timeout <= 7.0 for timeout in told)

    def test_one_that_cannot_be_closed_harms_nobody(self) -> None:
        """Errors of `close` are noted by their type."""
        bench = Steps()

        def close() -> None:
            raise ValueError("secret")

        bench.recording.close = close  # type: ignore[method-assign]
        bench.worker.close(0.1)

        assert [] == list(_diagnostics._notes)  # told already

    def test_it_is_closed_once(self) -> None:
        """However often the worker is closed, the transport is closed once."""
        calls: list[str] = []
        bench = Bench()
        bench.recording.close = lambda: calls.append("close")  # type: ignore[method-assign]
        bench.put("a")
        for _ in range(3):
            bench.worker.close(1.0)

        assert ["close"] == calls


class TestFlush:
    """Wait until all that was emitted came to an end, and no longer than asked."""

    def test_there_is_nothing_to_wait_for(self) -> None:
        """Without events a flush is done, and starts no thread."""
        bench = Bench()

        assert bench.worker.flush(5)
        assert bench.worker._thread is None

    def test_it_does_not_wait_for_the_interval(self) -> None:
        """A flush sends what there is at once."""
        bench = Bench(batch_interval=60)
        bench.put("a")
        is_flushed, seconds = elapsed(lambda: bench.worker.flush(5))
        bench.worker.close(1)

        assert (True, ["a"]) == (is_flushed, bench.taken)
        assert seconds < 1

    @pytest.mark.parametrize("name", ["a", "drop"])
    def test_any_end_will_do(self, name) -> None:
        """Delivered, rejected or dropped: the events before a flush came to an end."""
        answer = Answer(verdict=Verdict.TAKEN, rejected={0: "bad"})
        bench = Bench(answer, REFUSED, batch_interval=60)
        flushed = []
        for _ in range(3):
            bench.put(name)
            flushed.append(bench.worker.flush(5))
        bench.worker.close(1)

        assert [True, True, True] == flushed
        assert bench.ledger.stats().is_balanced

    @pytest.mark.parametrize("timeout", [0.0, 0.05, 0.3])
    def test_it_keeps_its_deadline(self, timeout) -> None:
        """With an endpoint that hangs it returns in time, and says that some wait."""
        stuck = Stuck()
        bench = Bench(transport=stuck)
        bench.put("a")
        is_flushed, seconds = elapsed(lambda: bench.worker.flush(timeout))
        stuck.go.set()
        bench.worker.close(5)

        assert not is_flushed
        assert timeout <= seconds < timeout + SLACK

    def test_many_may_flush_at_once(self) -> None:
        """Each flush ends with what was put before it, whoever else flushes."""
        bench = Bench(batch_interval=60)

        def act(i: int) -> list[bool]:
            flushed = []
            for n in range(50):
                bench.put((i, n))
                flushed.append(bench.worker.flush(10))
            return flushed

        results, seconds = elapsed(lambda: start_together(8, act))
        bench.worker.close(1)

        assert [[True] * 50] * 8 == results
        assert 400 == len(set(bench.taken)) == len(bench.taken)
        assert seconds < 30

    @pytest.mark.usefixtures("threadless")
    def test_it_waits_only_for_what_was_before(self) -> None:
        """What is emitted after a flush began does not hold it up."""
        bench = Steps(batch_interval=60)
        marker = _queue.Marker()
        bench.put("before")
        bench.worker.queue.mark(marker)
        bench.put("after")
        bench.worker._step()
        bench.worker._step()

        assert marker.is_reached
        assert [["before"]] == bench.sent

    @pytest.mark.usefixtures("threadless")
    def test_a_flush_behind_another_is_due_as_well(self) -> None:
        """The second of two flushes does not wait for the interval."""
        bench = Steps(batch_interval=60)
        markers = [_queue.Marker(), _queue.Marker()]
        for i, marker in enumerate(markers):
            bench.put(i)
            bench.worker.queue.mark(marker)
        bench.run()

        assert [["0"], ["1"]] == bench.sent
        assert all(marker.is_reached for marker in markers)

    @pytest.mark.usefixtures("threadless")
    def test_it_hurries_a_batch_that_waits_once(self) -> None:
        """A flush makes one attempt before its time, and no more."""
        bench = Steps(*[RETRY] * 20, batch_size=1)
        bench.put("a")
        bench.run(5.0)
        before = len(bench.sent)
        bench.worker._is_hurried = True
        bench.run()
        bench.run()

        assert 1 == len(bench.sent) - before

    @pytest.mark.usefixtures("threadless")
    def test_it_does_not_hurry_what_the_endpoint_put_off(self) -> None:
        """`Retry-After` is kept also when somebody waits."""
        wish = Answer(verdict=Verdict.RETRY, reason="429", retry_after=60.0)
        bench = Steps(wish, batch_size=1)
        bench.put("a")
        bench.run(1.0)
        bench.worker._is_hurried = True
        bench.run(50.0)

        assert 1 == len(bench.sent)

    def test_in_the_delivering_thread_it_is_refused_at_once(self) -> None:
        """A hook or transport that flushes or closes would wait for itself."""
        bench = Bench()
        answers: list[Any] = []

        def send(events: Sequence[bytes], timeout: float) -> Answer:
            answers.append(bench.worker.is_own_thread)
            answers.append(elapsed(lambda: bench.worker.flush(5)))
            answers.append(elapsed(lambda: bench.worker.close(5)))
            return TAKEN

        bench.recording.send = send  # type: ignore[method-assign]
        bench.put("a")
        bench.worker.flush(5)
        is_taken_afterwards = bench.put("b")
        bench.worker.close(1)

        is_own, (is_flushed, seconds), (is_closed, seconds_too) = answers[:3]
        assert (True, False, False) == (is_own, is_flushed, is_closed)
        assert seconds + seconds_too < SLACK
        assert is_taken_afterwards

    def test_it_ends_while_the_oldest_are_dropped(self) -> None:
        """Events that push others out of a full queue do not push out the flush."""
        stuck = Stuck()
        bench = Bench(
            transport=stuck, batch_size=1, max_queue_size=10, overflow="drop_oldest"
        )
        bench.put("first")
        assert stuck.is_sending.wait(10)
        for i in range(9):
            bench.put(i)

        def act(i: int) -> bool:
            if i == 0:
                return bench.worker.flush(20)
            assert wait_until(lambda: bench.worker.queue.is_marked)
            for n in range(100):
                bench.put(n)
            stuck.go.set()
            return True

        results = start_together(2, act)
        bench.worker.close(5)

        assert [True, True] == results
        stats = bench.ledger.stats()
        assert stats.is_balanced
        assert 0 == stats.pending


class TestClose:
    """The end of a client."""

    def test_what_is_queued_is_delivered_first(self) -> None:
        """Closing flushes, and the thread ends."""
        bench = Bench(batch_interval=60)
        bench.put("a")
        thread = bench.worker._thread
        is_closed = bench.worker.close(5)

        assert is_closed
        assert ["a"] == bench.taken
        assert thread is not None
        assert wait_until(lambda: not thread.is_alive())

    def test_afterwards_events_are_refused(self) -> None:
        """What is put after the end is counted as `closed`, and starts nothing."""
        bench = Bench()
        bench.worker.close(1)
        is_taken = bench.put("late")

        assert not is_taken
        assert {"closed": 1} == bench.ledger.stats().dropped
        assert bench.worker._thread is None

    def test_it_may_be_repeated(self) -> None:
        """Closing and flushing again is done at once."""
        bench = Bench()
        bench.put("a")
        results = [bench.worker.close(5), bench.worker.close(5), bench.worker.flush(5)]

        assert [True, True, True] == results

    @pytest.mark.parametrize("timeout", [0.0, 0.2])
    def test_it_keeps_its_deadline(self, timeout) -> None:
        """An attempt that hangs is cut, and what is left is dropped as `shutdown`."""
        stuck = Stuck()
        bench = Bench(transport=stuck, batch_size=1)
        bench.put("sent")
        assert stuck.is_sending.wait(10)
        for name in "abc":
            bench.put(name)
        is_closed, seconds = elapsed(lambda: bench.worker.close(timeout))

        assert not is_closed
        assert timeout <= seconds < timeout + SLACK
        assert wait_until(lambda: stuck.calls == ["abort", "close"])
        stats = bench.ledger.stats()
        assert ({"shutdown": 3}, 1, 0) == (
            stats.dropped,
            stats.delivered,
            stats.pending,
        )

    def test_a_transport_that_cannot_be_cut_is_left_behind(self) -> None:
        """Closing ends in time; what hangs stays pending until it comes back."""
        stuck = Stuck(can_abort=False)
        bench = Bench(transport=stuck, batch_size=1)
        bench.put("sent")
        assert stuck.is_sending.wait(10)
        bench.put("queued")
        is_closed, seconds = elapsed(lambda: bench.worker.close(0.1))
        stats = bench.ledger.stats()
        stuck.go.set()

        assert not is_closed
        assert seconds < 0.1 + SLACK
        assert (1, {"shutdown": 1}) == (stats.pending, stats.dropped)
        assert stats.is_balanced
        assert wait_until(lambda: bench.ledger.stats().pending == 0)
        assert {"shutdown": 2} == bench.ledger.stats().dropped

    def test_a_batch_that_waits_is_dropped(self) -> None:
        """What would be sent again later than the deadline is dropped, and in time."""
        wish = Answer(verdict=Verdict.RETRY, reason="429", retry_after=60.0)
        bench = Bench(wish, batch_size=1)
        bench.put("a")
        assert wait_until(lambda: len(bench.sent) == 1)
        is_closed, seconds = elapsed(lambda: bench.worker.close(0.2))

        assert not is_closed
        assert seconds < 0.2 + SLACK
        assert {"shutdown": 1} == bench.ledger.stats().dropped

    def test_one_who_flushes_meanwhile_is_let_go(self) -> None:
        """A flush of another thread ends with the close."""
        stuck = Stuck()
        bench = Bench(transport=stuck, batch_size=1)
        bench.put("a")
        assert stuck.is_sending.wait(10)
        bench.put("b")

        def act(i: int) -> float:
            if i == 0:
                return elapsed(lambda: bench.worker.flush(20))[1]
            assert wait_until(lambda: bench.worker.queue.is_marked)
            bench.worker.close(0.1)
            return 0.0

        seconds, _ = start_together(2, act)

        assert seconds < 5

    def test_an_abort_that_fails_harms_nobody(self) -> None:
        """A user's transport may raise there as well."""
        stuck = Stuck(can_abort=False)

        def abort() -> None:
            raise ValueError

        stuck.abort = abort  # type: ignore[method-assign]
        bench = Bench(transport=stuck, batch_size=1)
        bench.put("a")
        assert stuck.is_sending.wait(10)
        is_closed = bench.worker.close(0.05)
        stuck.go.set()

        assert not is_closed
        assert wait_until(lambda: bench.ledger.stats().pending == 0)

    def test_no_event_slips_through(self) -> None:
        """Closed at whatever point of a put: the event is accounted for."""
        count = 0
        for interrupt in interrupts(_queue, _worker):
            bench = Bench(batch_interval=60)
            bench.worker.queue.wake_at = 5  # not yet due
            interrupt(
                lambda bench=bench: bench.put("a"),
                lambda bench=bench: bench.worker.close(0.02),
            )
            if interrupt.place is None:
                bench.worker.close(1)

            stats = bench.ledger.stats()
            assert stats.is_balanced, interrupt.place
            assert 0 == stats.pending, interrupt.place
            count += 1

        assert count > 20

    def test_a_late_event_is_dropped_by_whoever_put_it(self) -> None:
        """An event that was let in at the very last moment does not stay behind."""
        bench = Bench()
        bench.put("a")
        bench.worker.close(5)
        bench.worker.queue.is_closed = False  # it had passed the check
        bench.put("late")

        assert {"shutdown": 1} == bench.ledger.stats().dropped
        assert 0 == bench.ledger.stats().pending

    def test_a_flush_after_it_tells_the_truth(self) -> None:
        """While an attempt still hangs, a flush does not say that all has ended."""
        stuck = Stuck(can_abort=False)
        bench = Bench(transport=stuck, batch_size=1)
        bench.put("sent")
        assert stuck.is_sending.wait(10)
        bench.worker.close(0)
        early = bench.worker.flush(0.1), bench.ledger.stats().pending
        stuck.go.set()

        assert (False, 1) == early
        assert wait_until(lambda: bench.worker.flush(1))
        assert {"shutdown": 1} == bench.ledger.stats().dropped

    def test_closing_from_many_threads(self) -> None:
        """All that close at once come back, and nothing is left."""
        bench = Bench(batch_interval=60)
        for i in range(100):
            bench.put(i)
        results = start_together(8, lambda _: bench.worker.close(5))

        assert [True] * 8 == results
        assert 100 == bench.ledger.stats().delivered


class TestLinger:
    """After the end, what still comes is taken, and no thread is started for it."""

    def test_what_comes_late_waits_for_a_flush(self) -> None:
        """Whoever lingers is told of each event, and delivers it by a flush."""
        told: list[int] = []
        bench = Bench(batch_interval=60)
        bench.put("a")
        bench.worker.close(5)
        bench.worker.linger(lambda: told.append(len(bench.worker.queue)))
        taken = [bench.put("b"), bench.put("c")]
        has_thread = bench.worker._has_thread
        is_flushed = bench.worker.flush(5)

        assert ([True, True], False, True) == (taken, has_thread, is_flushed)
        assert [1, 2] == told[:2]
        assert ["a", "b", "c"] == bench.taken
        assert bench.worker.close(1)

    def test_where_a_thread_hangs_it_is_over(self, monkeypatch) -> None:
        """Nothing can be delivered beside an attempt that does not end."""
        monkeypatch.setattr(_worker, "_TAKE_OVER", 0.05)
        stuck = Stuck(can_abort=False)
        bench = Bench(transport=stuck, batch_size=1)
        bench.put("a")
        assert stuck.is_sending.wait(10)
        bench.worker.close(0)
        _, seconds = elapsed(lambda: bench.worker.linger(lambda: None))
        is_taken = bench.put("late")
        stuck.go.set()

        assert not is_taken
        assert seconds < 0.05 + SLACK
        assert wait_until(lambda: bench.ledger.stats().pending == 0)


class TestRetire:
    """A client that was replaced delivers in the background, and ends."""

    def test_it_delivers_and_ends(self) -> None:
        """What is queued goes at once, then thread and transport end."""
        calls: list[str] = []
        bench = Bench(batch_interval=60)
        bench.recording.close = lambda: calls.append("close")  # type: ignore[method-assign]
        bench.put("a")
        thread = bench.worker._thread
        bench.worker.retire()

        assert thread is not None
        assert wait_until(lambda: not thread.is_alive())
        assert (["a"], ["close"]) == (bench.taken, calls)
        assert not bench.put("late")

    def test_an_idle_thread_ends(self) -> None:
        """With nothing to deliver the thread just ends."""
        bench = Bench()
        bench.put("a")
        bench.worker.flush(5)
        thread = bench.worker._thread
        bench.worker.retire()

        assert thread is not None
        assert wait_until(lambda: not thread.is_alive())

    def test_without_events_nothing_is_started(self) -> None:
        """A client that was never used needs no thread to end."""
        bench = Bench()
        bench.worker.retire()

        assert bench.worker._thread is None

    def test_it_waits_for_what_is_sent_again(self) -> None:
        """A failure does not end it before its events came to an end."""
        bench = Bench(RETRY, batch_interval=60)
        bench.put("a")
        bench.worker.retire()

        assert wait_until(lambda: bench.ledger.stats().delivered == 1)

    def test_what_comes_while_it_ends_is_delivered(self) -> None:
        """An event that was let in at the very last moment starts another thread."""
        bench = Bench(batch_interval=60)
        late = iter(["late"])

        def close() -> None:
            for name in late:
                bench.worker.queue.is_closed = False  # it had passed the check
                bench.put(name)
                bench.worker.queue.is_closed = True

        bench.recording.close = close  # type: ignore[method-assign]
        bench.put("a")
        bench.worker.retire()

        assert wait_until(lambda: bench.taken == ["a", "late"])
        assert wait_until(lambda: not bench.worker._has_thread)
        assert bench.ledger.stats().is_balanced

    def test_it_can_be_closed(self) -> None:
        """Closing a retired client cuts short what it still does."""
        bench = Bench(*[RETRY] * 1000)
        bench.put("a")
        bench.worker.retire()
        is_closed, seconds = elapsed(lambda: bench.worker.close(0.1))

        assert not is_closed
        assert seconds < 0.1 + SLACK
        assert {"shutdown": 1} == bench.ledger.stats().dropped

    def test_no_event_slips_through(self) -> None:
        """Retired at whatever point of a put: the event comes to its end."""
        for interrupt in interrupts(_queue, _worker):
            bench = Bench(batch_interval=60)
            bench.put("first")
            bench.worker.flush(5)

            def act(bench: Bench = bench) -> None:
                thread = bench.worker._thread
                bench.worker.retire()
                if thread is not None:
                    thread.join(5)

            interrupt(lambda bench=bench: bench.put("a"), act)
            bench.worker.retire()

            ended = wait_until(lambda bench=bench: bench.ledger.stats().pending == 0)
            assert ended, interrupt.place
            assert bench.ledger.stats().is_balanced, interrupt.place


class TestThread:
    """One thread, as long as it is needed, in a context of its own."""

    def test_it_starts_with_the_first_event(self) -> None:
        """Before the first event there is no thread; then one, a daemon."""
        bench = Bench()
        before = bench.worker._thread
        bench.put("a")
        thread = bench.worker._thread
        bench.put("b")
        same = bench.worker._thread
        bench.worker.close(1)

        assert before is None
        assert thread is not None
        assert (True, "pgtrack") == (thread.daemon, thread.name)
        assert same is thread

    def test_threads_that_emit_first_at_once_start_one(self) -> None:
        """The first events of many threads start one thread together."""
        started = set()
        for _ in range(20):
            bench = Bench()
            names = {t.ident for t in threading.enumerate() if t.name == "pgtrack"}
            start_together(8, bench.put)
            alive = [t for t in threading.enumerate() if t.name == "pgtrack"]
            started.add(len([t for t in alive if t.ident not in names]))
            bench.worker.close(1)

        assert {1} == started

    def test_one_that_runs_is_not_doubled(self) -> None:
        """Starting a thread again, since it was not seen yet, changes nothing."""
        bench = Bench()
        bench.put("a")
        thread = bench.worker._thread
        bench.worker.start()
        same = bench.worker._thread
        bench.worker.close(1)

        assert thread is same

    def test_it_is_under_suppression(self) -> None:
        """What a transport or hook would emit is pgtrack's own, and not tracked."""
        seen: list[Any] = []
        bench = Bench()

        def send(events: Sequence[bytes], timeout: float) -> Answer:
            seen.append(current_frame())
            return TAKEN

        bench.recording.send = send  # type: ignore[method-assign]
        with pgtrack.session("sess_1"):
            bench.put("a")
            bench.worker.flush(5)
        bench.worker.close(1)

        assert seen[0].is_suppressed
        assert seen[0].session_id is None

    @pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
    def test_it_is_replaced_if_it_dies(self, error, monkeypatch) -> None:
        """A transport that kills the thread loses nothing: another is started."""
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        bench = Bench(batch_size=1)
        send = bench.recording.send

        def fail(events: Sequence[bytes], timeout: float) -> Answer:
            bench.recording.send = send  # type: ignore[method-assign]
            raise error

        bench.recording.send = fail  # type: ignore[method-assign]
        bench.put("a")
        assert wait_until(lambda: bench.worker._thread is None)
        bench.put("b")

        assert wait_until(lambda: ["a", "b"] == bench.taken)
        bench.worker.close(1)
        assert bench.ledger.stats().is_balanced

    @pytest.mark.usefixtures("threadless")
    def test_it_outlives_our_own_errors(self, monkeypatch) -> None:
        """An error of pgtrack's own is noted, and the work goes on after a while."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        bench = Steps(batch_size=1)
        send = bench.worker._send

        def fail(events: Sequence[bytes], timeout: float) -> Answer:
            bench.worker._send = send  # type: ignore[method-assign]
            raise ZeroDivisionError

        bench.worker._send = fail  # type: ignore[method-assign]
        bench.put("a")
        delays = [bench.worker._step_safely() for _ in range(3)]

        assert [0.0, 30.0, 0.0] == delays
        assert ["a"] == bench.taken

    def test_a_hook_may_raise_anything(self) -> None:
        """A `before_send` that ends its thread costs its event alone."""

        def hook(event: pgtrack.Event) -> pgtrack.Event | None:
            if event.name == "exit":
                raise SystemExit(3)
            return event

        transport = RecordingTransport()
        config = Config(project_id="p", endpoint="console:", before_send=hook)
        with Client(config, transport=lambda: transport) as client:
            for name in ("a", "exit", "b"):
                client.emit("custom", name=name)
            is_flushed = client.flush(5)

        assert is_flushed
        assert ["a", "b"] == [event.name for event in transport.taken]
        assert {"before_send_error": 1} == client.stats().dropped

    def test_a_hook_that_flushes_does_not_wait_for_itself(self) -> None:
        """In `before_send`, flush and close return False at once."""
        answers: list[tuple[bool, float]] = []

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            answers.extend((elapsed(lambda: client.flush(5)),))
            return event

        config = Config(project_id="p", endpoint="console:", before_send=hook)
        with Client(config, transport=RecordingTransport) as client:
            client.emit("custom")

        ((is_flushed, seconds),) = answers
        assert not is_flushed
        assert seconds < SLACK

    def test_a_child_starts_anew(self) -> None:
        """After a fork nothing of the parent's is left, and all works as at first."""
        bench = Bench(batch_interval=60)
        bench.put("parent")

        def child() -> tuple[int, bool, list[str | None]]:
            bench.worker.start_over()
            pending = bench.ledger.stats().pending
            bench.put("child")
            return pending, bench.worker.flush(5), bench.taken

        assert (0, True, ["child"]) == in_fork(child)
        assert bench.worker.close(5)
        assert ["parent"] == bench.taken

    def test_a_child_gives_up_the_parents_connection(self) -> None:
        """A transport that can disown what it holds is asked to."""
        calls: list[str] = []
        bench = Bench()
        bench.recording.disown = lambda: calls.append("disown")  # type: ignore[attr-defined]
        bench.worker.start_over()

        assert ["disown"] == calls


class TestWithoutThread:
    """Where no thread can be had, whoever flushes delivers."""

    @pytest.mark.usefixtures("threadless")
    def test_a_flush_delivers_itself(self) -> None:
        """Events are taken, and delivered by the thread that flushes."""
        bench = Bench(batch_size=1)
        threads: list[str] = []
        send = bench.recording.send

        def tell(events: Sequence[bytes], timeout: float) -> Answer:
            threads.append(threading.current_thread().name)
            frame = current_frame()
            assert frame is not None
            assert frame.is_suppressed
            return send(events, timeout)

        bench.recording.send = tell  # type: ignore[method-assign]
        are_taken = [bench.put("a"), bench.put("b")]
        is_flushed = bench.worker.flush(5)
        is_closed = bench.worker.close(5)

        assert ([True, True], True, True) == (are_taken, is_flushed, is_closed)
        assert ["a", "b"] == bench.taken
        assert {threading.current_thread().name} == set(threads)
        assert current_frame() is None

    @pytest.mark.usefixtures("threadless")
    def test_it_is_sent_again_in_time(self) -> None:
        """A failure is waited out on the calling thread, if the time suffices."""
        bench = Bench(RETRY, batch_size=1)
        bench.put("a")

        assert bench.worker.flush(5)
        assert [["a"], ["a"]] == bench.sent
        bench.worker.close(0)

    @pytest.mark.usefixtures("threadless")
    def test_it_does_not_wait_in_vain(self) -> None:
        """Where the next attempt is later than the deadline, it returns at once."""
        wish = Answer(verdict=Verdict.RETRY, reason="429", retry_after=60.0)
        bench = Bench(wish, batch_size=1)
        bench.put("a")
        is_flushed, seconds = elapsed(lambda: bench.worker.flush(5))
        bench.worker.close(0)

        assert not is_flushed
        assert seconds < SLACK
        assert {"shutdown": 1} == bench.ledger.stats().dropped

    @pytest.mark.usefixtures("threadless")
    def test_an_attempt_has_what_is_left_of_the_time(self) -> None:
        """On the calling thread a request may not take longer than the flush."""
        bench = Bench(timeout=10)
        told: list[float] = []

        def send(events: Sequence[bytes], timeout: float) -> Answer:
            told.append(timeout)
            return TAKEN

        bench.recording.send = send  # type: ignore[method-assign]
        bench.put("a")
        bench.worker.flush(0.5)
        bench.worker.close(0)

        assert 0 < told[0] <= 0.5

    @pytest.mark.usefixtures("threadless")
    def test_an_interrupt_goes_to_the_caller(self) -> None:
        """Ctrl-C during a flush is the host's; nothing is lost by it."""
        bench = Bench(batch_size=1)
        send = bench.recording.send

        def interrupted(events: Sequence[bytes], timeout: float) -> Answer:
            bench.recording.send = send  # type: ignore[method-assign]
            raise KeyboardInterrupt

        bench.recording.send = interrupted  # type: ignore[method-assign]
        bench.put("a")
        with pytest.raises(KeyboardInterrupt):
            bench.worker.flush(5)

        assert bench.worker.flush(5)
        assert ["a"] == bench.taken
        bench.worker.close(0)

    def test_a_thread_is_tried_again(self, monkeypatch) -> None:
        """When threads can be had again, a later event starts one."""
        start = threading.Thread.start
        refused: list[threading.Thread] = []

        def refuse(thread: threading.Thread) -> None:
            if len(refused) < 2 and thread.name == "pgtrack":
                refused.append(thread)
                raise RuntimeError
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        bench = Bench(batch_size=2)
        for i in range(5):
            bench.put(i)

        assert wait_until(lambda: len(bench.taken) >= 4)
        bench.worker.close(5)
        assert [str(i) for i in range(5)] == bench.taken

    @pytest.mark.usefixtures("threadless")
    def test_after_a_flush_a_thread_is_tried_again(self, monkeypatch) -> None:
        """Who delivered in place of a thread leaves the next event to start one."""
        bench = Bench(batch_size=5)
        for i in range(3):
            bench.put(i)
        bench.worker.flush(5)
        monkeypatch.undo()
        bench.put("next")
        is_started = bench.worker._thread is not None
        bench.worker.close(5)

        assert is_started
        assert ["0", "1", "2", "next"] == bench.taken

    @pytest.mark.parametrize("starter_first", [True, False])
    def test_a_flush_while_a_thread_is_starting(
        self, starter_first, monkeypatch
    ) -> None:
        """Whether the new thread runs already or not yet, a flush is not held up."""
        start = threading.Thread.start
        is_starting, go = threading.Event(), threading.Event()

        def slowly(thread: threading.Thread) -> None:
            if thread.name != "pgtrack" or is_starting.is_set():
                start(thread)
                return
            if starter_first:
                start(thread)
            is_starting.set()
            assert go.wait(10)
            if not starter_first:
                start(thread)

        bench = Bench(batch_interval=60)
        monkeypatch.setattr(threading.Thread, "start", slowly)

        def act(i: int) -> Any:
            if i == 0:
                return bench.put("a")
            assert is_starting.wait(10)
            try:
                return elapsed(lambda: bench.worker.flush(10))
            finally:
                go.set()

        is_taken, (is_flushed, seconds) = start_together(2, act)
        bench.put("b")
        bench.worker.close(5)

        assert (True, True) == (is_taken, is_flushed)
        assert seconds < 5
        assert ["a", "b"] == bench.taken

    @pytest.mark.usefixtures("threadless")
    def test_two_who_flush_take_turns(self, monkeypatch) -> None:
        """While one delivers, the other waits, and takes over where it must."""
        monkeypatch.undo()
        bench = Bench(batch_interval=60)
        is_sending, go = threading.Event(), threading.Event()
        send = bench.recording.send

        def slowly(events: Sequence[bytes], timeout: float) -> Answer:
            if not is_sending.is_set():
                is_sending.set()
                go.wait(10)
            return send(events, timeout)

        bench.recording.send = slowly  # type: ignore[method-assign]
        monkeypatch.setattr(bench.worker, "start", lambda: None)

        def act(i: int) -> bool:
            if i == 0:
                bench.put("a")
                return bench.worker.flush(10)
            assert is_sending.wait(10)
            bench.put("b")
            threading.Timer(0.05, go.set).start()
            return bench.worker.flush(10)

        results = start_together(2, act)
        bench.worker.close(1)

        assert [True, True] == results
        assert ["a", "b"] == bench.taken


class TestReentrancy:
    """A signal handler, finaliser or log handler may emit at any bytecode."""

    @staticmethod
    def check(client: Client, transport: RecordingTransport, interrupt: Any) -> None:
        """Hold that all that was emitted was delivered, once."""
        stats = client.stats()
        assert stats.is_balanced, interrupt.place
        assert stats.emitted == stats.delivered == len(transport.taken), interrupt.place
        ids = {event.event_id for event in transport.taken}
        assert len(ids) == len(transport.taken), interrupt.place

    @pytest.mark.timeout(180)
    def test_emit_within_emit(self) -> None:
        """At every bytecode of an emit another is emitted: both are delivered, once."""
        transport = RecordingTransport()
        config = Config(project_id="p", endpoint="console:", batch_interval=60)
        emitted = 0
        with Client(config, transport=lambda: transport) as client:
            for interrupt in interrupts(pgtrack):
                results: list[bool] = []
                fields: Any = {"name": "n", "duration_ms": 1.5, "metadata": {"a": [1]}}
                outer = interrupt(
                    lambda fields=fields: client.emit("custom", user_id="u", **fields),
                    lambda results=results: results.append(client.emit("custom")),
                )
                emitted += 1 + len(results)
                assert outer, interrupt.place
                assert all(results), interrupt.place
                if emitted % 100 < 2:
                    assert client.flush(5), interrupt.place
                    self.check(client, transport, interrupt)
            client.flush(5)
            self.check(client, transport, interrupt)

        assert emitted == len(transport.taken)
        assert emitted > 200

    @pytest.mark.timeout(180)
    @pytest.mark.parametrize("verb", ["put", "flush"])
    def test_while_the_thread_is_started(self, verb) -> None:
        """At every bytecode of a first put, and of `threading`, nothing deadlocks."""

        def act(bench: Bench, interrupt: Interrupt) -> None:
            if verb == "put":
                bench.put("nested")
            else:
                is_flushed, seconds = elapsed(lambda: bench.worker.flush(5))
                assert is_flushed, interrupt.place
                assert seconds < 2, interrupt.place

        count = 0
        for interrupt in interrupts(_queue, _worker, threading):
            bench = Bench(batch_interval=60)
            interrupt(
                lambda bench=bench: bench.put("outer"),
                lambda bench=bench, interrupt=interrupt: act(bench, interrupt),
            )
            assert bench.worker.flush(5), interrupt.place
            assert bench.worker.close(5), interrupt.place
            stats = bench.ledger.stats()
            assert stats.is_balanced, interrupt.place
            assert stats.emitted == stats.delivered, interrupt.place
            count += 1

        assert count > 50

    @pytest.mark.timeout(180)
    @pytest.mark.parametrize("is_threadless", [False, True])
    def test_emit_and_flush_within_flush(self, is_threadless, monkeypatch) -> None:
        """At every bytecode of a flush another, and an event: none waits or is lost."""
        for interrupt in interrupts(_queue, _worker):
            bench = Bench(batch_interval=60)
            if is_threadless:
                monkeypatch.setattr(bench.worker, "start", lambda: None)
            bench.put("outer")

            def act(bench: Bench = bench, interrupt: Interrupt = interrupt) -> None:
                bench.put("nested")
                seconds = elapsed(lambda: bench.worker.flush(0.2))[1]
                assert seconds < 0.2 + SLACK, interrupt.place

            is_flushed = interrupt(lambda bench=bench: bench.worker.flush(5), act)
            assert is_flushed, interrupt.place
            assert bench.worker.close(5), interrupt.place
            stats = bench.ledger.stats()
            assert stats.is_balanced, interrupt.place
            assert stats.emitted == stats.delivered, interrupt.place


class TestManyThreads:
    """The sum of it."""

    @pytest.mark.parametrize("overflow", ["drop_newest", "drop_oldest"])
    def test_all_are_accounted_for(self, overflow) -> None:
        """Many emit while the endpoint fails: the ledger is exact at the end."""

        def endpoint(batch: Sequence[pgtrack.Event]) -> Answer:
            return RETRY if len(bench.recording.batches) % 3 == 0 else TAKEN

        bench = Bench(
            *[endpoint] * 100_000,
            max_queue_size=2_000,
            overflow=overflow,
            batch_interval=0.01,
        )
        bench.worker._outbox._policy = bench.worker._outbox.line._policy = RetryPolicy(
            first=0.001
        )
        taken = start_together(8, lambda i: [bench.put((i, n)) for n in range(2000)])
        is_closed = bench.worker.close(20)

        stats = bench.ledger.stats()
        assert is_closed
        assert stats.is_balanced
        assert 0 == stats.pending
        assert stats.delivered == len(bench.taken) == len(set(bench.taken))
        if overflow == "drop_newest":
            assert stats.delivered == sum(map(sum, taken))
        for i in range(8):
            mine = [n for n in bench.taken if n is not None and n.startswith(f"({i},")]
            assert sorted(mine, key=lambda n: int(n[4:-1])) == mine


class TestLines:
    """What it says in the log."""

    def test_one_line_a_cause_without_a_payload(self, caplog) -> None:
        """A dead endpoint has one line, however often it fails; nothing is quoted."""
        bench = Bench(*[RETRY] * 1000, batch_size=1)
        bench.worker._outbox.line._policy = RetryPolicy(first=0.001, most=0.001)
        for _ in range(5):
            bench.put("secret")
        assert wait_until(lambda: len(bench.sent) > 20)
        bench.worker.close(0.05)

        lines = [r for r in caplog.records if r.name == "pgtrack"]
        assert ["WARNING"] * 2 == [line.levelname for line in lines]
        assert "could not deliver events (503)" in lines[0].getMessage()
        assert "pgtrack dropped 5 events" in lines[1].getMessage()
        assert "secret" not in caplog.text


def on_disk(folder: Path) -> list[str]:
    """Return the names of the events that rest on disk, the oldest first."""
    files = sorted(folder.glob("*/*/*.batch"), key=lambda path: path.name)
    lines = [line for path in files for line in path.read_bytes().splitlines()]
    return [json.loads(line[9:])["event.name"] for line in lines]


def threads_named(name: str) -> list[threading.Thread]:
    """Return the threads of that name that run."""
    return [thread for thread in threading.enumerate() if thread.name == name]


class Gate(RecordingTransport):
    """Hangs with the first batch until it is let go, then goes on."""

    def __init__(self, *answers: Any, can_abort: bool = True) -> None:
        super().__init__(answers)
        self._can_abort = can_abort
        self.is_sending = threading.Event()
        self.go = threading.Event()

    def send(self, events: Sequence[bytes], timeout: float) -> Answer:
        """Wait, at most a minute, then record the batch."""
        self.is_sending.set()
        self.go.wait(50)
        return super().send(events, timeout)

    def abort(self) -> None:
        """Let go."""
        if self._can_abort:
            self.go.set()


class TestRelief:
    """While a send hangs, a queue that is nearly full goes to disk."""

    def test_nothing_is_dropped(self, tmp_path) -> None:
        """Many times the queue's bound is emitted meanwhile, without a wait."""
        gate = Gate()
        bench = Bench(
            transport=gate, spool_dir=tmp_path, max_queue_size=500, batch_size=1
        )
        bench.put(0)
        assert gate.is_sending.wait(10)
        longest = 0.0
        for start in range(1, 5000, 200):
            for i in range(start, start + 200):
                taken, seconds = elapsed(lambda i=i: bench.put(i))
                longest = max(longest, seconds)
                assert taken
            assert wait_until(lambda: bench.ledger.pending.value <= 250)
        stats = bench.ledger.stats()
        gate.go.set()
        is_closed = bench.worker.close(30)

        names = [event.name for event in gate.taken]
        assert [str(i) for i in range(5001)] == names
        assert (is_closed, {}, []) == (True, stats.dropped, on_disk(tmp_path))
        assert stats.spooled >= 4700
        assert longest < 1.0
        assert bench.ledger.stats().is_balanced

    def test_hooks_there_cannot_wait_for_themselves(self, tmp_path) -> None:
        """The thread is our own: nothing is tracked there, and a flush is refused."""
        gate = Gate()
        bench = Bench(transport=gate, spool_dir=tmp_path, max_queue_size=100)
        encode = bench.encoder.encode
        seen: list[Any] = []

        def spying(records: Iterable[Record]) -> list[tuple[bytes | None, Record]]:
            frame = current_frame()
            if threading.current_thread().name == "pgtrack-spool":
                seen.append(frame is not None and frame.is_suppressed)
                seen.append(bench.worker.is_own_thread)
                seen.append(elapsed(lambda: bench.worker.flush(5)))
                seen.append(elapsed(lambda: bench.worker.close(5)))
            return encode(records)

        bench.encoder.encode = spying  # type: ignore[method-assign]
        bench.put("a")
        bench.worker.hurry()
        bench.worker._signal.give()
        assert gate.is_sending.wait(10)
        for i in range(80):
            bench.put(i)
        assert wait_until(lambda: len(seen) >= 4)
        assert wait_until(lambda: bench.ledger.pending.value <= 50)
        is_own_here = bench.worker.is_own_thread
        gate.go.set()
        bench.worker.close(5)

        (is_flushed, seconds), (is_closed, seconds_too) = seen[2:4]
        assert [True, True] == seen[:2]
        assert (False, False, False) == (is_own_here, is_flushed, is_closed)
        assert seconds + seconds_too < SLACK

    def test_it_outlives_our_own_errors(self, tmp_path, monkeypatch) -> None:
        """An error of pgtrack's own is noted, and the next relief is served."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        gate = Gate()
        bench = Bench(transport=gate, spool_dir=tmp_path, max_queue_size=100)
        relieve = bench.worker._outbox.relieve
        failed = threading.Event()

        def fail() -> None:
            bench.worker._outbox.relieve = relieve  # type: ignore[method-assign]
            failed.set()
            raise ZeroDivisionError

        bench.worker._outbox.relieve = fail  # type: ignore[method-assign]
        bench.put("a")
        bench.worker.hurry()
        bench.worker._signal.give()
        assert gate.is_sending.wait(10)
        for i in range(75):
            bench.put(i)
        assert failed.wait(10)
        bench.put("b")
        is_served = wait_until(lambda: bench.ledger.pending.value <= 50)
        gate.go.set()
        bench.worker.close(5)

        assert is_served

    def test_all_threads_end(self, tmp_path) -> None:
        """With the client both of its threads are gone."""
        bench = Bench(spool_dir=tmp_path)
        bench.put("a")
        assert bench.worker.flush(5)
        during = len(threads_named("pgtrack")), len(threads_named("pgtrack-spool"))
        bench.worker.close(5)

        assert (1, 1) == during
        assert wait_until(lambda: not threads_named("pgtrack"))
        assert wait_until(lambda: not threads_named("pgtrack-spool"))

    def test_without_a_spool_there_is_one_thread(self) -> None:
        """Nobody pays for what he has not."""
        bench = Bench()
        bench.put("a")
        bench.worker.flush(5)
        names = threads_named("pgtrack-spool")
        bench.worker.close(5)

        assert [] == names

    def test_another_thread_may_get_its_number(self, tmp_path) -> None:
        """Numbers of threads are used again: who has that of ours may well flush."""
        bench = Bench(spool_dir=tmp_path)
        bench.put("a")
        bench.worker.flush(5)
        (reliever,) = threads_named("pgtrack-spool")
        bench.worker.retire()
        assert wait_until(lambda: not threads_named("pgtrack"))
        found: list[tuple[bool, bool]] = []

        def look() -> None:
            is_same = threading.get_ident() == reliever.ident
            found.append((is_same, bench.worker.is_own_thread))

        for _ in range(20):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(5)

        assert {False} == {is_own for _, is_own in found}

    def test_it_works_for_the_next_thread_as_well(self, tmp_path, monkeypatch) -> None:
        """A thread that died is replaced, and so is the one that relieves."""
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        gate = Gate()
        send = gate.send

        def die(events: Sequence[bytes], timeout: float) -> Answer:
            gate.send = send  # type: ignore[method-assign]
            raise GeneratorExit

        gate.send = die  # type: ignore[method-assign]
        bench = Bench(
            transport=gate, spool_dir=tmp_path, max_queue_size=100, batch_size=1
        )
        bench.put("a")
        assert wait_until(lambda: not threads_named("pgtrack-spool"))
        bench.put("b")
        assert gate.is_sending.wait(10)
        for i in range(80):
            bench.put(i)
        is_served = wait_until(lambda: bench.ledger.pending.value <= 50)
        gate.go.set()
        bench.worker.close(10)

        assert is_served
        assert ["a", "b", *map(str, range(80))] == [event.name for event in gate.taken]

    def test_where_it_cannot_be_had(self, tmp_path, monkeypatch) -> None:
        """Without a second thread the first one does what it can."""
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "pgtrack-spool":
                raise RuntimeError
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        bench = Bench(*[RETRY] * 1000, spool_dir=tmp_path, batch_size=1)
        for i in range(5):
            bench.put(i)
        assert wait_until(lambda: bench.ledger.spooled.value > 0)
        is_closed = bench.worker.close(5)

        assert is_closed
        assert [str(i) for i in range(5)] == on_disk(tmp_path)


class TestCloseWithSpool:
    """At the end, what could not be sent is on disk."""

    def recover(self, tmp_path: Path) -> tuple[list[str | None], pgtrack.Stats]:
        """Return what the next process delivers, and its ledger."""
        bench = Bench(spool_dir=tmp_path, batch_size=1)
        bench.put("next")
        assert wait_until(lambda: "next" in bench.taken)
        assert wait_until(lambda: bench.ledger.stats().spooled == 0)
        bench.worker.close(5)
        return bench.taken[1:], bench.ledger.stats()

    def test_with_a_dead_endpoint_it_is_quick(self, tmp_path) -> None:
        """All rests on disk, nothing is dropped, and nobody waits for the endpoint."""
        bench = Bench(*[RETRY] * 1000, spool_dir=tmp_path)
        for i in range(2500):
            bench.put(i)
        is_closed, seconds = elapsed(lambda: bench.worker.close(20))
        stats = bench.ledger.stats()

        assert is_closed
        assert seconds < 5
        assert (2500, {}, 0) == (stats.spooled, stats.dropped, stats.pending)
        taken, next_stats = self.recover(tmp_path)
        assert [str(i) for i in range(2500)] == taken
        assert (2500, True) == (next_stats.recovered, next_stats.is_balanced)

    @pytest.mark.parametrize("answer", [TAKEN, RETRY], ids=["taken", "failed"])
    def test_an_attempt_that_hangs_beyond_its_end(self, tmp_path, answer) -> None:
        """What is being sent is on disk as well, in time; its answer still counts."""
        gate = Gate(answer, can_abort=False)
        bench = Bench(transport=gate, spool_dir=tmp_path, batch_size=1)
        bench.put("sent")
        assert gate.is_sending.wait(10)
        for name in "abcde":
            bench.put(name)
        thread = bench.worker._thread
        is_closed, seconds = elapsed(lambda: bench.worker.close(0.1))
        stats, during = bench.ledger.stats(), on_disk(tmp_path)
        gate.go.set()
        assert thread is not None
        thread.join(10)

        assert is_closed
        assert seconds < 0.1 + 3 * SLACK
        assert (6, 0, {}) == (stats.spooled, stats.pending, stats.dropped)
        assert ["sent", *"abcde"] == during
        left = [*"abcde"] if answer is TAKEN else ["sent", *"abcde"]
        assert len(left) == bench.ledger.stats().spooled
        assert left == self.recover(tmp_path)[0]

    def test_an_event_that_comes_meanwhile(self, tmp_path, monkeypatch) -> None:
        """What is put by somebody who had not seen the end costs none of the others."""
        gate = Gate(TAKEN, can_abort=False)
        bench = Bench(transport=gate, spool_dir=tmp_path, batch_size=1)
        bench.put("sent")
        assert gate.is_sending.wait(10)
        for name in "abc":
            bench.put(name)
        queue, outbox = bench.worker.queue, bench.worker._outbox
        rest_all = outbox.rest_all

        def rest_all_late(deadline: float) -> None:
            queue.is_closed = False
            queue.wake_at = 1
            bench.put("late")
            queue.is_closed = True
            rest_all(deadline)

        monkeypatch.setattr(outbox, "rest_all", rest_all_late)
        bench.worker.close(0.1)
        stats = bench.ledger.stats()
        monkeypatch.undo()
        gate.go.set()
        assert wait_until(lambda: not threads_named("pgtrack"))

        assert ({}, 5) == (stats.dropped, stats.spooled)
        assert [*"abc", "late"] == self.recover(tmp_path)[0]

    def test_a_thread_that_is_being_started(self, tmp_path) -> None:
        """Closing does not wait for a thread that another one has yet to start."""
        bench = Bench(spool_dir=tmp_path)
        bench.worker._thread = threading.Thread(target=bench.worker._run)
        bench.put("event")
        bench.worker.close(0.1)
        stats = bench.ledger.stats()

        assert ({}, 0) == (stats.dropped, stats.pending)
        assert stats.is_balanced
        assert 1 == stats.delivered + stats.spooled

    def test_one_that_is_cut(self, tmp_path) -> None:
        """A transport that can be aborted ends the thread, and all is on disk."""
        gate = Gate(*[RETRY] * 100)
        bench = Bench(transport=gate, spool_dir=tmp_path, batch_size=1)
        bench.put("sent")
        assert gate.is_sending.wait(10)
        for name in "abc":
            bench.put(name)
        bench.worker.close(0.1)

        assert wait_until(lambda: not threads_named("pgtrack"))
        assert wait_until(lambda: not threads_named("pgtrack-spool"))
        assert ["sent", *"abc"] == on_disk(tmp_path)
        assert ["sent", *"abc"] == self.recover(tmp_path)[0]

    def test_a_disk_that_fails(self, tmp_path, monkeypatch) -> None:
        """What can be neither sent nor written is dropped as `shutdown`, in time."""

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(Folder, "write", fail)
        bench = Bench(*[RETRY] * 1000, spool_dir=tmp_path)
        for i in range(100):
            bench.put(i)
        is_closed, seconds = elapsed(lambda: bench.worker.close(0.5))

        stats = bench.ledger.stats()
        assert not is_closed
        assert seconds < 0.5 + SLACK
        assert ({"shutdown": 100}, 0) == (stats.dropped, stats.pending)
        assert stats.is_balanced
        assert stats.spool_errors > 0

    def test_a_disk_that_hangs(self, tmp_path, monkeypatch) -> None:
        """Closing waits for the disk a while, and no longer."""
        monkeypatch.setattr(_worker, "_MOST_REST", 0.2)
        write, is_writing, go = Folder.write, threading.Event(), threading.Event()

        def hang(*args: Any, **options: Any) -> None:
            is_writing.set()
            assert go.wait(50)
            write(*args, **options)

        monkeypatch.setattr(Folder, "write", hang)
        bench = Bench(*[RETRY] * 1000, spool_dir=tmp_path, batch_size=1)
        bench.put("a")
        assert is_writing.wait(10)
        bench.put("b")
        is_closed, seconds = elapsed(lambda: bench.worker.close(0.1))
        balanced = bench.ledger.stats().is_balanced
        go.set()

        assert not is_closed
        assert balanced
        assert seconds < 0.1 + 0.2 + 3 * SLACK
        assert wait_until(lambda: not threads_named("pgtrack"))
        assert wait_until(lambda: bench.ledger.stats().pending == 0)
        assert bench.ledger.stats().is_balanced

    def test_retired_it_ends_when_its_files_are_sent(self, tmp_path) -> None:
        """A client that was replaced leaves neither a thread nor a folder."""
        bench = Bench(*[RETRY] * 3, spool_dir=tmp_path, batch_size=1)
        bench.worker._outbox.line._policy = RetryPolicy(first=0.05)
        for i in range(5):
            bench.put(i)
        assert wait_until(lambda: bench.ledger.spooled.value > 0)
        bench.worker.retire()

        assert wait_until(lambda: not threads_named("pgtrack"))
        assert [str(i) for i in range(5)] == bench.taken
        assert wait_until(lambda: not list(tmp_path.glob("*/*-*")))

    @pytest.mark.usefixtures("threadless")
    def test_without_threads(self, tmp_path) -> None:
        """At the end of the interpreter, whoever closes brings all to disk."""
        bench = Bench(*[RETRY] * 1000, spool_dir=tmp_path, batch_size=1)
        for i in range(5):
            bench.put(i)
        is_closed, seconds = elapsed(lambda: bench.worker.close(10))

        assert is_closed
        assert seconds < 2
        assert [str(i) for i in range(5)] == on_disk(tmp_path)
        assert 5 == bench.ledger.stats().spooled


class TestForkWithSpool:
    """A child has a folder of its own, and leaves that of its parent alone."""

    def test_the_parents_files_are_the_parents(self, tmp_path) -> None:
        """The child writes elsewhere, holds nothing open, and takes no lock away."""
        bench = Bench(*[RETRY] * 1000, spool_dir=tmp_path, spool_each_event=True)
        for name in "abc":
            bench.put(name)
        wait_until(lambda: len(list(tmp_path.glob("*/*/*.journal"))) > 0)
        (home,) = tmp_path.glob("*/*-*")
        before = {path: path.read_bytes() for path in home.iterdir()}

        def child() -> tuple[int, list[str], list[str]]:
            bench.worker.start_over()
            fds = Path("/proc/self/fd")
            links = [fd.readlink() for fd in fds.iterdir() if fd.is_symlink()]
            held = [str(link) for link in links if str(home) in str(link)]
            pending = bench.ledger.stats().pending
            bench.put("child")
            bench.worker.close(5)
            return pending, held, on_disk(tmp_path)

        pending, held, written = in_fork(child)
        after = {path: path.read_bytes() for path in before}
        is_locked = Folder.adopt(home) is None
        bench.worker.close(5)

        assert (0, ["child"]) == (pending, written)
        assert [] == held or not Path("/proc/self/fd").exists()
        assert (before, True) == (after, is_locked)
        assert {"a", "b", "c", "child"} == set(on_disk(tmp_path))

    def test_a_child_that_just_leaves_loses_nothing(self, tmp_path) -> None:
        """With `spool_each_event` the parent adopts what its child left."""
        bench = Bench(spool_dir=tmp_path, spool_each_event=True, batch_interval=60)

        def child() -> bool:
            bench.worker.start_over()
            return bench.put("child")

        is_taken = in_fork(child)
        bench.put("parent")
        bench.worker.flush(5)
        bench.put("again")
        is_flushed = bench.worker.flush(5)
        assert wait_until(lambda: "child" in bench.taken)
        bench.worker.close(5)

        assert (True, True) == (is_taken, is_flushed)
        assert {"parent", "child", "again"} == set(bench.taken)
        assert 1 == bench.ledger.stats().recovered

    def test_it_may_come_in_the_middle_of_a_write(self, tmp_path, monkeypatch) -> None:
        """What another thread of the parent held is free in the child."""
        write, is_writing, go = Folder.write, threading.Event(), threading.Event()

        def hang(*args: Any, **options: Any) -> None:
            is_writing.set()
            assert go.wait(50)
            write(*args, **options)

        monkeypatch.setattr(Folder, "write", hang)
        bench = Bench(*[RETRY] * 10, spool_dir=tmp_path, batch_size=1)
        bench.put("parent")
        assert is_writing.wait(10)

        def child() -> tuple[bool, list[str | None]]:
            bench.worker.start_over()
            bench.transport = bench.recording = RecordingTransport()
            bench.worker.start_over()
            bench.put("child")
            return bench.worker.close(5), bench.taken

        results = in_fork(child)
        go.set()
        bench.worker.close(5)

        assert (True, ["child"]) == results
        assert ["parent"] == on_disk(tmp_path)


class TestWrittenFirst:
    """With `spool_each_event`, `emit` encodes and writes on the caller's thread."""

    def client(
        self, tmp_path: Path, transport: RecordingTransport, **options: Any
    ) -> Client:
        """Return a client whose events are written first."""
        options = {"batch_interval": 60, **options}
        config = Config(
            project_id="p",
            endpoint="console:",
            spool_dir=tmp_path,
            spool_each_event=True,
            **options,
        )
        return Client(config, transport=lambda: transport)

    def test_order_is_kept(self, tmp_path) -> None:
        """What one thread emits arrives in that order, each once."""
        transport = RecordingTransport()
        with self.client(tmp_path, transport, batch_size=10) as client:
            taken = [client.emit("custom", name=str(i)) for i in range(500)]

        assert [True] * 500 == taken
        assert [str(i) for i in range(500)] == [e.name for e in transport.taken]
        assert [] == list(tmp_path.glob("*/*-*"))

    def test_the_hook_runs_on_the_callers_thread(self, tmp_path) -> None:
        """`before_send` is called within `emit`; what it emits is suppressed."""
        names: list[str] = []

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            names.append(threading.current_thread().name)
            client.emit("custom", name="nested")
            return event.replace(name="seen")

        transport = RecordingTransport()
        with self.client(tmp_path, transport, before_send=hook) as client:
            client.emit("custom", name="a")
            frame = current_frame()

        assert [threading.current_thread().name] == names
        assert ["seen"] == [event.name for event in transport.taken]
        assert {"suppressed": 1} == client.stats().dropped
        assert (None, True) == (frame, client.stats().is_balanced)

    def test_the_hook_may_flush(self, tmp_path) -> None:
        """It does not wait for its own event, which is not taken yet."""
        flushed: list[tuple[bool, float]] = []

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            flushed.append(elapsed(lambda: client.flush(5)))
            return event

        transport = RecordingTransport()
        with self.client(tmp_path, transport, before_send=hook) as client:
            for i in range(3):
                client.emit("custom", name=str(i))

        assert all(seconds < 2 for _, seconds in flushed)
        assert ["0", "1", "2"] == [event.name for event in transport.taken]

    @pytest.mark.parametrize("error", [ValueError("secret"), SystemExit(3)])
    def test_the_hook_may_raise(self, tmp_path, error) -> None:
        """Its event is dropped, and the caller notices nothing."""

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            if event.name == "bad":
                raise error
            return event

        transport = RecordingTransport()
        with self.client(tmp_path, transport, before_send=hook) as client:
            taken = [client.emit("custom", name=name) for name in ("a", "bad", "b")]

        assert [True, False, True] == taken
        assert ["a", "b"] == [event.name for event in transport.taken]
        assert {"before_send_error": 1} == client.stats().dropped

    def test_an_interrupt_in_the_hook_is_the_hosts(self, tmp_path) -> None:
        """Ctrl-C within `emit` is raised there, and its event counted."""

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            if event.name == "bad":
                raise KeyboardInterrupt
            return event

        transport = RecordingTransport()
        with self.client(tmp_path, transport, before_send=hook) as client:
            client.emit("custom", name="a")
            with pytest.raises(KeyboardInterrupt):
                client.emit("custom", name="bad")
            client.emit("custom", name="b")

        assert ["a", "b"] == [event.name for event in transport.taken]
        stats = client.stats()
        assert (0, True, 1) == (
            stats.pending,
            stats.is_balanced,
            sum(stats.dropped.values()),
        )
        assert [] == list(tmp_path.glob("*/*-*"))

    @pytest.mark.timeout(180)
    @pytest.mark.parametrize("size", [100_000, 1])
    def test_emit_within_emit(self, tmp_path, size) -> None:
        """At every bytecode an emit may interrupt one: both arrive, each once."""
        transport = RecordingTransport()
        emitted = 0
        with self.client(tmp_path, transport, max_queue_size=size) as client:
            for interrupt in interrupts(_outbox, _journal, _queue):
                results: list[bool] = []
                outer = interrupt(
                    lambda: client.emit("custom"),
                    lambda results=results: results.append(client.emit("custom")),
                )
                emitted += 1 + len(results)
                assert outer, interrupt.place
                assert all(results), interrupt.place
                if size == 1:
                    assert client.flush(5), interrupt.place
                    assert client.stats().is_balanced, interrupt.place
            assert client.flush(10)

        ids = {event.event_id for event in transport.taken}
        assert emitted == len(ids) == len(transport.taken)
        assert client.stats().is_balanced
        assert emitted > 200

    def test_many_threads_and_one_who_looks(self, tmp_path) -> None:
        """The right side of the ledger is never ahead by more than a batch."""
        transport = RecordingTransport(
            [lambda _: RETRY if len(transport.batches) % 5 == 0 else TAKEN] * 100_000
        )
        worst = 0
        options = {"max_queue_size": 300, "batch_size": 20, "batch_interval": 0.01}
        client = self.client(tmp_path, transport, replay_rate=None, **options)
        policy = RetryPolicy(first=0.001)
        worker: Any = client._sink
        worker._outbox._policy = worker._outbox.line._policy = policy
        ended: list[int] = []

        def act(i: int) -> int:
            if i < 6:
                for n in range(300):
                    client.emit("custom", name=f"{i}-{n}")
                ended.append(i)
                return 0
            ahead = 0
            while len(ended) < 6:
                stats = client.stats()
                right = stats.delivered + sum(stats.dropped.values())
                right += stats.spooled + stats.pending
                ahead = max(ahead, right - stats.emitted - stats.recovered)
            return ahead

        worst = max(start_together(7, act))
        is_closed = client.flush(20) and client.close(20)

        stats = client.stats()
        largest = max(len(batch) for batch in transport.batches)
        assert is_closed
        assert worst <= largest
        assert (1800, 1800, {}) == (stats.emitted, stats.delivered, stats.dropped)
        assert stats.is_balanced
        assert 1800 == len({event.event_id for event in transport.taken})
