"""The outbox with a spool: what is in memory, what on disk, and what is sent when."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import start_together
from pgtrack import Config, _diagnostics
from pgtrack._folder import Folder
from pgtrack._journal import Segment
from pgtrack._ledger import Ledger
from pgtrack._outbox import Outbox, OwnedLock
from pgtrack._queue import Marker, Written
from pgtrack._retry import RetryPolicy
from pgtrack._spool import Spool
from pgtrack.testing import FakeClock
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pgtrack._record import Record

    Endpoint = Callable[[list[str]], Answer]

TAKEN = Answer(verdict=Verdict.TAKEN)
RETRY = Answer(verdict=Verdict.RETRY, reason="503")
HOLD = Answer(verdict=Verdict.HOLD, reason="401")
REFUSED = Answer(verdict=Verdict.REFUSED, reason="400 bad")
LATER = Answer(verdict=Verdict.RETRY, reason="429", retry_after=60.0)


def up(_: list[str]) -> Answer:
    """Take everything."""
    return TAKEN


def down(_: list[str]) -> Answer:
    """Take nothing."""
    return RETRY


def names(count: int, start: int = 0) -> list[str]:
    """Return names that count up."""
    return [str(i) for i in range(start, start + count)]


class NamingEncoder:
    """Makes events that are known by their names, each with an id of its own."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._count = 0
        self.error: BaseException | None = None

    def encode(self, records: Iterable[Record]) -> list[tuple[bytes | None, Record]]:
        """Encode as the real one does, but less of it."""
        return [(self.encode_here(record), record) for record in records]

    def encode_here(self, record: Record) -> bytes | None:
        """Encode one record; drop it if its name is `drop`."""
        if self.error is not None:
            raise self.error
        name = record[5]["name"]
        if name == "drop":
            self._ledger.drop("before_send")
            return None
        self._count += 1
        event_id = f"{os.getpid()}-{id(self)}-{self._count}"
        return json.dumps({"event_id": event_id, "event.name": name}).encode()


def name_of(event: bytes) -> str:
    """Return the name of an event."""
    return str(json.loads(event)["event.name"])


class Disk:
    """What the spool does to the disk, and whether that fails."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.writing: OSError | None = None
        self.reading: OSError | None = None
        self.logging: OSError | None = None
        self._wrap(patch, Folder, "write", lambda: self.writing)
        self._wrap(patch, Folder, "open", lambda: self.reading)
        self._wrap(patch, Segment, "write", lambda: self.logging)

    @staticmethod
    def _wrap(
        patch: pytest.MonkeyPatch,
        owner: type,
        name: str,
        error: Callable[[], OSError | None],
    ) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            if (raised := error()) is not None:
                raise raised
            return original(*args, **options)

        patch.setattr(owner, name, wrapped)

    def fail(self) -> None:
        """Be full."""
        self.writing = self.logging = OSError(errno.ENOSPC, "full")

    def heal(self) -> None:
        """Have room again."""
        self.writing = self.reading = self.logging = None


@pytest.fixture(name="disk")
def _disk(monkeypatch) -> Disk:
    """Return a disk that can fail."""
    return Disk(monkeypatch)


class Bench:
    """The outbox of a process, an endpoint, and a clock that moves by waiting."""

    def __init__(
        self, folder: Path, *, clock: FakeClock | None = None, **options: Any
    ) -> None:
        options = {"project_id": "p", "endpoint": "console:", **options}
        options.setdefault("spool_dir", folder)
        config = Config(**options)
        self.folder = folder
        self.clock = FakeClock() if clock is None else clock
        self.ledger = Ledger()
        self.encoder = NamingEncoder(self.ledger)
        self.spool = Spool(config, self.ledger, self.clock)
        self.calls: list[str] = []
        self.outbox = Outbox(
            config=config,
            encoder=self.encoder,  # type: ignore[arg-type]
            ledger=self.ledger,
            policy=RetryPolicy(jitter=lambda: 1.0),
            clock=self.clock,
            spool=self.spool,
            wake=lambda: self.calls.append("wake"),
            relieve=lambda: self.calls.append("relieve"),
        )
        self.endpoint: Endpoint = up
        self.is_hurried = False
        self.emitted: list[str] = []
        self.attempts: list[tuple[float, list[str]]] = []
        self.sent_ids: dict[str, set[str]] = {}
        self.taken: list[str] = []

    # --- what a worker does ---

    def emit(self, *emitted: str, size: int = 100) -> list[bool]:
        """Put a record for each name; return which were taken."""
        put = self.outbox.put if self.spool.journal else self.outbox.queue.put
        results = []
        for name in emitted:
            self.ledger.emitted.add(1)
            self.emitted.append(name)
            fields = {"name": name}
            results.append(put((0, "custom", "s", None, {}, fields, None, None, size)))
        return results

    def step(self) -> float | None:
        """Do one thing, at most one attempt; return how long the worker waits then."""
        now = self.clock.monotonic()
        is_to_send, delay = self.outbox.next_step(now, is_hurried=self.is_hurried)
        if is_to_send:
            self.attempt()
        self.check()
        return delay

    def attempt(self) -> None:
        """Send what is next."""
        self.is_hurried = False
        if self.outbox.line.is_refused:
            self.outbox.load(1)
        now = self.clock.monotonic()
        events = list(self.outbox.line.next(now).events)
        self.attempts.append((now, [name_of(event) for event in events]))
        for event in events:
            event_id = json.loads(event)["event_id"]
            self.sent_ids.setdefault(name_of(event), set()).add(event_id)
        answer = self.endpoint(self.attempts[-1][1])
        self.check()
        if answer.verdict is Verdict.TAKEN:
            self.ledger.last_success_ns = self.clock.time_ns()
            self.taken += self.attempts[-1][1]
        self.outbox.settle(answer)

    def run(self, seconds: float = 0.0) -> float | None:
        """Step until the time is over; return how long the worker waits then."""
        end = self.clock.monotonic() + seconds
        for _ in range(100_000):
            delay = self.step()
            left = end - self.clock.monotonic()
            if delay is None or delay > left:
                self.clock.advance(left)
                return None if delay is None else delay - left
            self.clock.advance(delay)
        raise AssertionError("the worker never waits")

    def flush(self, *, may_rest: bool = False) -> Marker:
        """Mark the place of a flush."""
        marker = Marker(may_rest=may_rest)
        self.outbox.queue.mark(marker)
        self.is_hurried = True
        return marker

    def finish(self) -> None:
        """End the process, as a worker does."""
        self.outbox.finish(self.clock.monotonic() + 2.0)
        self.check()

    # --- what is where ---

    def check(self) -> None:
        """Hold that the ledger is exact, and that each event is in one place."""
        stats = self.stats
        assert stats.is_balanced, stats
        queued = [i for i in self.outbox.queue._items if not isinstance(i, Marker)]
        in_memory = len(queued) + len(self.outbox.line.in_memory)
        assert in_memory == stats.pending
        living = [*self.queued, *map(name_of, self.outbox.line.in_memory)]
        living += [name_of(e) for es in self.outbox.line.on_disk().values() for e in es]
        living = [name for name in living if name != "drop"]
        assert len(living) == len(set(living))

    @property
    def stats(self) -> Any:
        """The ledger."""
        return self.ledger.stats()

    @property
    def queued(self) -> list[str]:
        """The names of the events in the queue."""
        found = []
        for item in self.outbox.queue._items:
            if isinstance(item, Written):
                found.append(name_of(item.data))
            elif not isinstance(item, Marker):
                found.append(str(item[5]["name"]))
        return found

    @property
    def files(self) -> list[Path]:
        """The sealed files of all processes on this spool, the oldest first."""
        return sorted(self.folder.glob("*/*/*.batch"), key=lambda path: path.name)

    @property
    def journals(self) -> list[Path]:
        """The journals of all processes on this spool, the oldest first."""
        return sorted(self.folder.glob("*/*/*.journal"), key=lambda path: path.name)

    @property
    def journaled(self) -> int:
        """How many bytes are in the journals."""
        return sum(path.stat().st_size for path in self.journals)

    @property
    def on_disk(self) -> list[list[str]]:
        """The names of the events of each file."""
        lines = [path.read_bytes().splitlines() for path in self.files]
        return [[name_of(line[9:]) for line in found] for found in lines]

    @property
    def times(self) -> list[float]:
        """When each attempt was made."""
        return [time for time, _ in self.attempts]


class TestFailure:
    """What was sent in vain is on disk, and tried again from memory."""

    def test_memory_is_free_once_an_attempt_failed(self, tmp_path) -> None:
        """The batch moves from `pending` to `spooled`, into one private file."""
        bench = Bench(tmp_path, batch_size=3)
        bench.endpoint = down
        bench.emit("a", "b", "c")
        bench.run()

        stats = bench.stats
        assert (0, 3, [["a", "b", "c"]]) == (
            stats.pending,
            stats.spooled,
            bench.on_disk,
        )
        assert 0o600 == stat.S_IMODE(bench.files[0].stat().st_mode)
        assert not bench.outbox.queue._bytes.value

    def test_a_success_touches_no_disk(self, tmp_path) -> None:
        """As long as the endpoint takes events, no file and no folder is made."""
        bench = Bench(tmp_path, batch_size=3)
        before = sorted(tmp_path.rglob("*"))
        bench.emit(*names(10))
        bench.run(10.0)

        assert names(10) == bench.taken
        assert before == sorted(tmp_path.rglob("*"))

    def test_it_is_sent_again_with_the_same_ids(self, tmp_path) -> None:
        """Once the endpoint is back, the same events are taken, and the file goes."""
        bench = Bench(tmp_path, batch_size=3)
        bench.endpoint = down
        bench.emit("a", "b", "c")
        bench.run(10.0)
        bench.endpoint = up
        bench.run(60.0)

        assert ["a", "b", "c"] == bench.taken
        assert {1} == {len(ids) for ids in bench.sent_ids.values()}
        assert ([], 0) == (bench.files, bench.stats.spooled)

    def test_it_is_written_once(self, tmp_path) -> None:
        """Further failures find the file there already."""
        bench = Bench(tmp_path, batch_size=3)
        bench.endpoint = down
        bench.emit("a", "b", "c")
        bench.run()
        (before,) = bench.files
        inode = before.stat().st_ino
        bench.run(100.0)

        assert [before] == bench.files
        assert inode == before.stat().st_ino
        assert len(bench.attempts) > 5

    @pytest.mark.parametrize("answer", [RETRY, HOLD, LATER, REFUSED])
    def test_the_whole_line_comes_to_rest(self, tmp_path, answer) -> None:
        """Whatever keeps them: all that was taken off the queue is in one file."""
        options = {"max_batch_bytes": 1000, "max_event_bytes": 1000}
        bench = Bench(tmp_path, batch_size=30, **options)
        bench.endpoint = lambda _: answer
        bench.emit(*names(30))
        bench.run()

        assert [names(30)] == [sorted(found, key=int) for found in bench.on_disk]
        assert (0, 30) == (bench.stats.pending, bench.stats.spooled)

    def test_a_part_that_was_taken_is_not_written(self, tmp_path) -> None:
        """Only what is left of the line is."""
        options = {"max_batch_bytes": 1000, "max_event_bytes": 1000}
        bench = Bench(tmp_path, batch_size=30, **options)
        answers = iter([TAKEN])
        bench.endpoint = lambda _: next(answers, RETRY)
        bench.emit(*names(30))
        bench.run()

        (rest,) = bench.on_disk
        assert names(30) == [*bench.taken, *rest]
        assert (len(rest), len(bench.taken)) == (
            bench.stats.spooled,
            bench.stats.delivered,
        )

    def test_retries_go_on_beyond_their_time(self, tmp_path) -> None:
        """`retry_for` is for what is in memory alone."""
        bench = Bench(tmp_path, batch_size=3, retry_for=5.0)
        bench.endpoint = down
        bench.emit("a", "b", "c")
        bench.run(1000.0)
        bench.endpoint = up
        bench.run(60.0)

        assert ({}, 3) == (bench.stats.dropped, bench.stats.delivered)

    @pytest.mark.parametrize("answer", [RETRY, HOLD])
    def test_without_time_for_retries_it_rests_as_well(self, tmp_path, answer) -> None:
        """With `retry_for=0` the first failure finds it on disk already."""
        bench = Bench(tmp_path, batch_size=3, retry_for=0)
        bench.endpoint = lambda _: answer
        bench.emit("a", "b", "c")
        bench.run(10.0)

        assert ({}, [["a", "b", "c"]]) == (bench.stats.dropped, bench.on_disk)

    def test_it_ends_by_its_age(self, tmp_path) -> None:
        """What is older than `max_spool_age` is dropped with the next failure."""
        bench = Bench(tmp_path, batch_size=3, max_spool_age=100.0)
        bench.endpoint = down
        bench.emit("a", "b", "c")
        bench.run(200.0)

        assert ({"spool_expired": 3}, []) == (bench.stats.dropped, bench.files)
        assert not bench.outbox.line

    def test_what_is_refused_alone_leaves_its_file(self, tmp_path) -> None:
        """A search in what rests on disk rejects the bad event alone."""
        bench = Bench(tmp_path, batch_size=8)
        bench.endpoint = down
        bench.emit(*names(8))
        bench.run()
        bench.endpoint = lambda events: REFUSED if "5" in events else TAKEN
        bench.run(10.0)

        assert [n for n in names(8) if n != "5"] == bench.taken
        assert ({"400 bad": 1}, []) == (bench.stats.rejected, bench.files)


class TestOutage:
    """While the endpoint is down, the queue goes to disk as well."""

    @pytest.fixture(name="bench")
    def _bench(self, tmp_path) -> Bench:
        """Return a bench at which the first batch has failed."""
        bench = Bench(tmp_path, batch_size=5, batch_interval=2.0, max_queue_size=5000)
        bench.endpoint = lambda _: LATER
        bench.emit(*names(5))
        bench.run()
        return bench

    def test_it_waits_for_the_interval(self, bench) -> None:
        """Events collect for `batch_interval`, more than `batch_size` of them."""
        bench.emit(*names(20, 5))
        bench.run(1.9)
        before = bench.stats.pending
        bench.run(0.1)

        assert (20, 0, 25) == (before, bench.stats.pending, bench.stats.spooled)
        assert [names(5), names(20, 5)] == bench.on_disk

    def test_a_thousand_do_not_wait(self, bench) -> None:
        """Enough for a file, they go at once; until then nobody is woken."""
        bench.emit(*names(20, 5))
        bench.run()
        wake_at = bench.outbox.queue.wake_at
        bench.emit(*names(2400, 25))
        bench.run()

        assert 1000 == wake_at
        assert [5, 1000, 1000] == [len(found) for found in bench.on_disk]
        assert names(2005) == [name for found in bench.on_disk for name in found]
        assert 420 == bench.stats.pending

    def test_the_first_event_wakes_it(self, bench) -> None:
        """With an empty queue it asks to be told of the next event."""
        assert 1 == bench.outbox.queue.wake_at

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
    def test_an_interrupt_while_it_is_encoded(self, bench, error) -> None:
        """Ctrl-C costs what was just taken off the queue, and nothing else."""
        bench.emit("a", "b")
        bench.encoder.error = error
        with pytest.raises(type(error)):
            bench.run(10.0)
        bench.encoder.error = None
        bench.check()
        bench.emit("c")
        bench.run(10.0)

        assert {"internal_error": 2} == bench.stats.dropped
        assert [names(5), ["c"]] == bench.on_disk

    def test_files_are_bounded_by_bytes(self, tmp_path) -> None:
        """A file is about a request's worth, so that memory stays small later."""
        bench = Bench(tmp_path, batch_size=1, batch_interval=0.5, **SMALL)
        bench.endpoint = lambda _: LATER
        bench.emit("x")
        bench.run()
        bench.emit(*names(500))
        bench.run(10.0)

        assert names(500) == [name for found in bench.on_disk[1:] for name in found]
        assert max(path.stat().st_size for path in bench.files) < 5000

    def test_what_the_encoder_drops_is_not_written(self, bench) -> None:
        """A hook's drop is counted, and a queue of nothing else makes no file."""
        bench.emit("drop", "a", "drop")
        bench.run(10.0)
        before = bench.on_disk
        bench.emit("drop")
        bench.run(10.0)

        assert [names(5), ["a"]] == before == bench.on_disk
        assert {"before_send": 3} == bench.stats.dropped

    def test_order_is_kept_over_it(self, bench) -> None:
        """Line, files and queue are sent in the order of emission."""
        for start in range(5, 3000, 100):
            bench.emit(*names(100, start))
            bench.run(0.7)
        bench.endpoint = up
        bench.run(100.0)

        assert bench.emitted == bench.taken
        assert ([], 0, 0) == (bench.files, bench.stats.spooled, bench.stats.pending)

    def test_one_attempt_at_a_time(self, bench) -> None:
        """However much is emitted, only the wait decides when the next attempt is."""
        bench.endpoint = down
        for start in range(5, 1000, 10):
            bench.emit(*names(10, start))
            bench.run(1.0)

        assert [0.0, 72.0, 73.0, 75.0, 79.0, 87.0] == bench.times

    def test_a_refusing_endpoint_is_asked_with_new_events(self, tmp_path) -> None:
        """Where all is refused, the newest event is taken off the queue to ask with."""
        bench = Bench(tmp_path, batch_size=20)
        bench.endpoint = lambda _: REFUSED
        bench.emit(*names(20))
        bench.run(1.0)
        bench.emit("x", "y")
        before = len(bench.attempts)
        bench.run(4.0)
        bench.endpoint = up
        bench.run(60.0)

        assert ["x"] == bench.attempts[before][1]
        assert sorted([*names(20), "x", "y"]) == sorted(bench.taken)
        assert ([], {}) == (bench.files, bench.stats.rejected)


class TestRecovery:
    """Once the endpoint is back, what rests goes before what is new."""

    def test_the_order_of_emission_is_kept(self, tmp_path) -> None:
        """Line, files and queue go one after the other."""
        bench = Bench(tmp_path, batch_size=5, batch_interval=2.0)
        bench.endpoint = down
        for start in range(0, 50, 5):
            bench.emit(*names(5, start))
            bench.run(3.0)
        bench.emit(*names(5, 50))
        places = len(bench.files), len(bench.outbox.line.in_memory), bench.queued
        bench.endpoint = up
        bench.run(60.0)

        assert (10, 0, names(5, 50)) == places
        assert bench.emitted == bench.taken
        assert {1} == {len(ids) for ids in bench.sent_ids.values()}

    def test_small_files_travel_together(self, tmp_path) -> None:
        """A long outage with few events each time does not make a storm of requests."""
        bench = Bench(tmp_path, batch_size=5, batch_interval=1.0)
        bench.endpoint = lambda _: LATER
        for i in range(60):
            bench.emit(str(i))
            bench.run(1.0)
        file_count = len(bench.files)
        bench.endpoint = up
        bench.run(60.0)

        assert file_count > 50
        assert [1, 1, 59] == [len(events) for _, events in bench.attempts]
        assert (bench.emitted, []) == (bench.taken, bench.files)

    def test_events_of_one_request_end_in_their_own_files(self, tmp_path) -> None:
        """Where several files travel together, each goes when its last event ended."""
        bench = Bench(tmp_path, batch_size=5, batch_interval=1.0)
        bench.endpoint = lambda _: LATER
        for i in range(10):
            bench.emit(str(i))
            bench.run(5.0)
        too_large = Answer(verdict=Verdict.TOO_LARGE)
        answers = iter([TAKEN, too_large, TAKEN])
        bench.endpoint = lambda _: next(answers, LATER)
        bench.run(60.0)

        assert names(6) == bench.taken
        assert [[name] for name in names(4, 6)] == bench.on_disk

    def test_it_fails_again_in_the_middle(self, tmp_path) -> None:
        """What was read stays in its files, and none is written anew."""
        bench = Bench(tmp_path, batch_size=5, batch_interval=1.0, replay_rate=None)
        bench.endpoint = lambda _: LATER
        for i in range(100):
            bench.emit(str(i))
            bench.run(0.5)
        before = bench.files
        answers = iter([TAKEN])
        bench.endpoint = lambda _: next(answers, RETRY)
        bench.run(30.0)

        assert before[1:] == bench.files
        assert bench.emitted == [*bench.taken, *(n for ns in bench.on_disk for n in ns)]


def leave_behind(
    folder: Path, events: Iterable[str], *, day: int = 1, **options: Any
) -> Bench:
    """Have a process end while the endpoint is down, and leave *events* on disk."""
    clock = FakeClock(datetime(2025, 12, 30 + day, tzinfo=timezone.utc))
    bench = Bench(folder, batch_size=1, clock=clock, **options)
    bench.endpoint = down
    for event in events:
        bench.emit(event)
        bench.run(5.0)
    bench.finish()
    return bench


SMALL = {"max_batch_bytes": 1000, "max_event_bytes": 1000}
"""Options that make requests of some twenty events."""


class TestPace:
    """What comes off the disk comes at a bounded rate."""

    def outage(self, tmp_path: Path, **options: Any) -> Bench:
        """Return a bench with 200 events in files, whose endpoint is back."""
        options = {"batch_size": 50, "batch_interval": 1.0, **SMALL, **options}
        bench = Bench(tmp_path, **options)
        bench.endpoint = lambda _: LATER
        bench.emit(*names(200))
        bench.run(71.0)
        bench.endpoint = up
        assert 200 == bench.stats.spooled
        return bench

    def test_files_are_read_at_the_rate(self, tmp_path) -> None:
        """Each request waits as long as the one before is worth, more or less."""
        bench = self.outage(tmp_path, replay_rate=10.0)
        bench.run(100.0)

        read = Counter(
            time for time, events in bench.attempts if time >= 72.0 for _ in events
        )
        times = sorted(read)[1:]  # the first is what was in the line
        gaps = [(later - time) / (read[time] / 10.0) for time, later in pairwise(times)]
        assert len(gaps) >= 4
        assert all(0.74 < gap < 1.26 for gap in gaps)
        assert len(set(gaps)) > 1
        assert names(200) == bench.taken

    def test_it_sleeps_meanwhile(self, tmp_path) -> None:
        """The wait for the next file is one wait, and not a poll."""
        bench = self.outage(tmp_path, replay_rate=10.0)
        bench.run(1.0)
        while bench.outbox.line or bench.outbox._replay_at == 0.0:
            bench.step()
        delay = bench.step()

        assert delay == pytest.approx(bench.outbox._replay_at - bench.clock.monotonic())

    def test_without_a_rate_they_go_at_once(self, tmp_path) -> None:
        """`replay_rate=None` holds nothing back."""
        bench = self.outage(tmp_path, replay_rate=None)
        bench.run(1.0)

        assert names(200) == bench.taken

    def test_live_events_do_not_wait_for_the_pace(self, tmp_path) -> None:
        """When new events are due, our own files go at once, and before them."""
        bench = self.outage(tmp_path, replay_rate=1.0)
        bench.run(1.0)
        before = len(bench.taken)
        bench.emit(*names(50, 200))
        bench.run()

        assert before < 100
        assert names(200) == bench.taken[:200]
        assert len(bench.taken) > 200

    def test_what_was_adopted_goes_after_live_events(self, tmp_path) -> None:
        """A dead process' events wait while this one has its own to send."""
        leave_behind(tmp_path, ["old"])
        bench = Bench(tmp_path, batch_size=1)
        bench.emit("a")
        bench.run()
        bench.emit("b")
        bench.outbox._replay_at = 0.0
        bench.run()

        assert ["a", "old", "b"] == bench.taken
        assert (1, 0) == (bench.stats.recovered, bench.stats.spooled)

    def test_what_was_adopted_goes_while_live_events_are_due(self, tmp_path) -> None:
        """With new events each time, the old ones have their turn, by the pace."""
        leave_behind(tmp_path, names(3), **SMALL)
        bench = Bench(tmp_path, batch_size=1, batch_interval=60.0)
        more = iter(names(20, 100))

        def endpoint(_: list[str]) -> Answer:
            bench.emit(*([name] if (name := next(more, "")) else []))
            return TAKEN

        bench.endpoint = endpoint
        bench.emit("first")
        bench.run(10.0)

        live = [name for name in bench.taken if name not in names(3)]
        assert ["first", *names(20, 100)] == live
        assert names(3) == [name for name in bench.taken if name in names(3)]
        assert names(3) != bench.taken[-3:]

    def test_what_was_adopted_is_in_order(self, tmp_path) -> None:
        """Of several dead processes, the oldest files go first."""
        leave_behind(tmp_path, ["c"], day=1)
        leave_behind(tmp_path, ["a", "b"], day=0)
        bench = Bench(tmp_path, batch_size=1)
        bench.emit("new")
        bench.run(60.0)

        assert ["new", "a", "b", "c"] == bench.taken
        assert ([], 3) == (bench.files, bench.stats.recovered)

    def test_without_a_success_nothing_is_adopted(self, tmp_path) -> None:
        """While the endpoint is down, the files of others stay where they are."""
        leave_behind(tmp_path, ["a"])
        bench = Bench(tmp_path, batch_size=1)
        bench.endpoint = down
        bench.emit("b")
        bench.run(100.0)

        assert (0, 1) == (bench.stats.recovered, bench.stats.spooled)
        assert [["a"], ["b"]] == bench.on_disk


class TestMarkers:
    """Those who wait: for the end of events, or for the disk to have them."""

    @pytest.fixture(name="bench")
    def _bench(self, tmp_path) -> Bench:
        """Return a bench with events in a file, one of them in the line."""
        bench = Bench(tmp_path, batch_size=1, batch_interval=1.0)
        bench.endpoint = lambda _: LATER
        bench.emit("a")
        bench.run()
        bench.emit("b", "c")
        bench.run(1.0)
        return bench

    def test_what_is_on_disk_has_not_ended(self, bench) -> None:
        """A flush waits for the replay of all that was emitted before."""
        marker = bench.flush()
        bench.run(30.0)
        early = marker.is_reached
        bench.endpoint = lambda events: TAKEN if events == ["a"] else LATER
        bench.run(60.0)
        later = marker.is_reached
        bench.endpoint = up
        bench.run(100.0)

        assert (False, False, True) == (early, later, marker.is_reached)
        assert ["a", "b", "c"] == bench.taken

    def test_what_was_emitted_later_is_not_waited_for(self, bench) -> None:
        """Files that are younger than the flush may stay."""
        marker = bench.flush()
        bench.run(1.0)
        bench.emit("d")
        bench.run(5.0)
        bench.endpoint = lambda events: LATER if "d" in events else TAKEN
        bench.outbox._read = lambda spool, *, own_only: [  # type: ignore[method-assign]
            (event, file) for file, events in [spool.read(1)] for event in events
        ]
        bench.run(80.0)

        assert ["a", "b", "c"] == bench.taken
        assert marker.is_reached

    def test_events_before_the_flush_are_in_a_file_before_it(self, bench) -> None:
        """What is moved to disk on the way to the flush is waited for."""
        bench.emit("d")
        marker = bench.flush()
        bench.emit("e")
        bench.run(5.0)
        on_disk = bench.on_disk
        bench.endpoint = lambda events: LATER if "e" in events else TAKEN
        bench.outbox._read = lambda spool, *, own_only: [  # type: ignore[method-assign]
            (event, file) for file, events in [spool.read(1)] for event in events
        ]
        bench.run(80.0)

        assert [["a"], ["b", "c"], ["d"], ["e"]] == on_disk
        assert (["a", "b", "c", "d"], True) == (bench.taken, marker.is_reached)

    def test_at_the_end_the_disk_is_enough(self, bench) -> None:
        """With `may_rest` and an endpoint that is down, it is enough that all rests."""
        bench.endpoint = down
        bench.emit("d")
        marker = bench.flush(may_rest=True)
        bench.clock.advance(60.0)
        bench.run()

        assert marker.is_reached
        assert (0, 4) == (bench.stats.pending, bench.stats.spooled)

    def test_at_the_end_an_endpoint_that_is_up_gets_all(self, tmp_path) -> None:
        """With `may_rest` it goes on until our own events and adopted ones are sent."""
        leave_behind(tmp_path, names(60), **SMALL)
        bench = Bench(tmp_path, batch_size=1, replay_rate=10.0, **SMALL)
        bench.emit("a")
        bench.run()
        bench.emit("b")
        marker = bench.flush(may_rest=True)
        bench.run()
        early = marker.is_reached
        bench.run(10.0)

        assert (False, True) == (early, marker.is_reached)
        assert {"a", "b", *names(60)} == set(bench.taken)

    def test_what_is_in_memory_alone_is_not_at_rest(self, bench, disk) -> None:
        """With `may_rest` and a disk that fails, nobody is let go."""
        disk.fail()
        bench.endpoint = down
        bench.emit("d")
        marker = bench.flush(may_rest=True)
        bench.run(20.0)
        early = marker.is_reached
        disk.heal()
        bench.run(20.0)

        assert (False, True) == (early, marker.is_reached)

    @pytest.mark.parametrize("may_rest", [False, True])
    def test_an_end_without_an_attempt_is_one(self, bench, may_rest) -> None:
        """Whoever waits for files that turn out to be gone is let go."""
        bench.endpoint = up
        bench.emit("d")
        marker = bench.flush(may_rest=may_rest)
        bench.run(30.0)
        for path in bench.files[1:]:
            path.unlink()
        bench.run(60.0)

        assert ["a"] == bench.taken
        assert {"spool_damaged": 3} == bench.stats.dropped
        assert marker.is_reached

    def test_too_old_is_an_end(self, tmp_path) -> None:
        """Whoever waits for files that become too old is let go."""
        bench = Bench(tmp_path, batch_size=1, max_spool_age=65.0)
        bench.endpoint = lambda _: LATER
        bench.emit("a")
        bench.run()
        bench.emit("b")
        marker = bench.flush()
        bench.run(30.0)
        bench.endpoint = up
        bench.run(60.0)

        assert (["a"], {"spool_expired": 1}) == (bench.taken, bench.stats.dropped)
        assert marker.is_reached


class TestFinish:
    """The end of a process: what can rest on disk does."""

    def recover(self, tmp_path: Path, **options: Any) -> Bench:
        """Return the next process, which has sent all that it found."""
        bench = Bench(tmp_path, batch_size=1, replay_rate=None, **options)
        bench.emit("next")
        bench.run(60.0)
        assert ([], []) == (bench.files, bench.journals)
        return bench

    def test_line_and_queue_come_to_rest(self, tmp_path) -> None:
        """Nothing is dropped, and the next process sends all, with the same ids."""
        bench = Bench(tmp_path, batch_size=5)
        bench.endpoint = down
        bench.emit(*names(7))
        bench.outbox.load(5)
        bench.attempts.clear()
        bench.attempt()
        marker = bench.flush()
        bench.emit(*names(3, 7))
        bench.finish()
        next_one = self.recover(tmp_path)

        stats = bench.stats
        assert ({}, 0, 10) == (stats.dropped, stats.pending, stats.spooled)
        assert (10, ["next", *names(10)]) == (next_one.stats.recovered, next_one.taken)
        for name in names(5):
            assert bench.sent_ids[name] == next_one.sent_ids[name]
        assert marker.is_reached

    def test_what_was_never_tried_comes_to_rest(self, tmp_path) -> None:
        """Events that were still collecting are kept as well."""
        bench = Bench(tmp_path, batch_size=5, max_queue_size=5000)
        bench.emit(*names(2500))
        bench.finish()

        assert (0, 2500) == (bench.stats.pending, bench.stats.spooled)
        assert names(2500) == [name for found in bench.on_disk for name in found]

    def test_without_events_nothing_is_left(self, tmp_path) -> None:
        """A process that delivered all leaves no folder of its own."""
        bench = Bench(tmp_path, batch_size=1)
        bench.emit("a")
        bench.run()
        bench.finish()

        assert [] == list(tmp_path.glob("*/*"))

    def test_a_file_is_shortened_by_what_was_taken(self, tmp_path) -> None:
        """Of a file in the middle of its replay, only what is left is recovered."""
        options = {"max_batch_bytes": 100_000, "batch_size": 100, "batch_interval": 1}
        bench = Bench(tmp_path, **options)
        bench.endpoint = down
        bench.emit(*names(100))
        bench.run()
        too_large = Answer(verdict=Verdict.TOO_LARGE)
        answers = iter([too_large, TAKEN, too_large, TAKEN])
        bench.endpoint = lambda _: next(answers, RETRY)
        bench.run(5.0)
        bench.finish()
        next_one = self.recover(tmp_path)

        assert (75, 25) == (bench.stats.delivered, bench.stats.spooled)
        assert 25 == next_one.stats.recovered == next_one.stats.delivered - 1
        assert [*names(100)] == [*bench.taken, *next_one.taken[1:]]

    @pytest.mark.parametrize("taken", [0, 1, 2, 5])
    def test_a_file_that_was_read_in_part(self, tmp_path, taken) -> None:
        """What was not read yet stays in the file, and what was taken does not."""
        leave_behind(tmp_path, names(5, 1000))
        before = Bench(tmp_path, batch_size=300)
        before.endpoint = down
        before.emit(*names(300))
        before.run()
        before.finish()
        bench = Bench(tmp_path, batch_size=1, **SMALL)
        answers = iter([TAKEN] * (1 + taken))
        bench.endpoint = lambda _: next(answers, RETRY)
        bench.emit("a")
        bench.run(1.0)
        bench.finish()
        next_one = self.recover(tmp_path)

        ended = bench.stats.delivered - 1
        assert 305 - ended == bench.stats.spooled == next_one.stats.recovered
        assert 305 == ended + next_one.stats.delivered - 1
        found = Counter([*bench.taken[1:], *next_one.taken[1:]])
        assert (305, 1) == (len(found), max(found.values()))

    @pytest.mark.parametrize("kind", ["parts", "suspects", "several files"])
    def test_the_sum_over_processes_is_exact(self, tmp_path, kind) -> None:
        """Wherever a process ends: what one left is what the others recover."""
        total = Counter(emitted=0, delivered=0, rejected=0)
        bad = {str(i) for i in range(0, 1000, 3)} if kind == "suspects" else set()
        options: dict[str, Any] = SMALL if kind == "several files" else {}
        left = 0
        for process in range(8):
            bench = Bench(tmp_path, batch_size=20, replay_rate=None, **options)
            bench.emit(*names(100, 1000 * process + 1))
            steps = iter([TAKEN] * process)

            def endpoint(events: list[str], steps: Any = steps) -> Answer:
                if bad & set(events):
                    return REFUSED
                return next(steps, RETRY)

            bench.endpoint = endpoint if process < 7 else up
            bench.run(3.0 if process < 7 else 100.0)
            bench.finish()
            stats = bench.stats
            assert stats.recovered in {0, left}
            left += stats.spooled - stats.recovered
            total.update(
                emitted=stats.emitted,
                delivered=stats.delivered,
                rejected=sum(stats.rejected.values()),
            )
            assert {} == stats.dropped

        assert (0, []) == (left, bench.files)
        assert 800 == total["emitted"] == total["delivered"] + total["rejected"]

    def test_what_cannot_rest_is_dropped(self, tmp_path, disk) -> None:
        """With a disk that fails, what is in memory alone is dropped as `shutdown`."""
        bench = Bench(tmp_path, batch_size=3)
        bench.endpoint = lambda _: LATER
        bench.emit(*names(3))
        bench.run()
        bench.emit(*names(4, 3))
        disk.fail()
        bench.finish()

        stats = bench.stats
        assert ({"shutdown": 4}, 3, 0) == (stats.dropped, stats.spooled, stats.pending)
        assert [names(3)] == bench.on_disk
        assert "dropped 4 events" in _diagnostics._notes["shutdown"][1]

    def test_a_disk_that_failed_gets_a_last_chance(self, tmp_path, disk) -> None:
        """At the end it is tried once more, whenever it failed last."""
        bench = Bench(tmp_path, batch_size=3)
        bench.endpoint = lambda _: LATER
        disk.fail()
        bench.emit(*names(3))
        bench.run()
        disk.heal()
        bench.finish()

        assert ({}, 3) == (bench.stats.dropped, bench.stats.spooled)

    def test_a_file_that_cannot_be_shortened_is_sent_whole(
        self, tmp_path, disk
    ) -> None:
        """What was taken comes once more, with the same ids."""
        bench = Bench(tmp_path, batch_size=10)
        bench.endpoint = down
        bench.emit(*names(10))
        bench.run()
        answers = iter([Answer(verdict=Verdict.TOO_LARGE), TAKEN])
        bench.endpoint = lambda _: next(answers, RETRY)
        bench.run(2.0)
        disk.fail()
        bench.finish()
        disk.heal()
        next_one = self.recover(tmp_path)

        assert (names(5), 1) == (bench.taken, bench.stats.spool_errors)
        assert ["next", *names(10)] == next_one.taken
        assert bench.sent_ids["0"] == next_one.sent_ids["0"]

    def test_the_time_is_up(self, tmp_path) -> None:
        """After the deadline one more file is written; what is left is dropped."""
        bench = Bench(tmp_path, batch_size=3)
        bench.emit(*names(1503))
        bench.outbox.load(3)
        bench.outbox.finish(bench.clock.monotonic())
        bench.check()

        assert ({"shutdown": 500}, 1003) == (bench.stats.dropped, bench.stats.spooled)
        assert names(1003) == [name for found in bench.on_disk for name in found]

    def test_it_may_be_repeated(self, tmp_path) -> None:
        """A second end finds nothing to do, and makes no new folder."""
        bench = leave_behind(tmp_path, ["a"])
        before = sorted(tmp_path.rglob("*"))
        bench.finish()

        assert before == sorted(tmp_path.rglob("*"))
        assert (1, {}) == (bench.stats.spooled, bench.stats.dropped)

    def test_the_lock_is_given_up(self, tmp_path) -> None:
        """Another process of the same machine may adopt the files at once."""
        leave_behind(tmp_path, ["a"])
        (home,) = tmp_path.glob("*/*")

        folder = Folder.adopt(home)
        assert folder is not None
        folder.let_go()


class TestRetired:
    """A client that was replaced goes on until nothing is left."""

    def test_it_is_over_when_its_files_are_sent(self, tmp_path) -> None:
        """What is on disk is to be sent before it ends; nothing waits for others."""
        bench = Bench(tmp_path, batch_size=10, batch_interval=60.0)
        bench.endpoint = lambda _: LATER
        bench.emit("a")
        bench.outbox.is_retired = True
        bench.run()
        bench.emit("b")
        bench.run(1.0)
        during = bench.outbox.is_over, bench.on_disk
        bench.endpoint = up
        bench.run(100.0)

        assert (False, [["a"], ["b"]]) == during
        assert (["a", "b"], True) == (bench.taken, bench.outbox.is_over)

    def test_what_it_adopted_is_left_to_others(self, tmp_path) -> None:
        """It does not stay for the events of dead processes."""
        leave_behind(tmp_path, names(60), **SMALL)
        bench = Bench(tmp_path, batch_size=1, replay_rate=1.0, **SMALL)
        bench.emit("a")
        bench.outbox.is_retired = True
        bench.run()
        is_over = bench.outbox.is_over
        bench.outbox.close_spool()
        next_one = Bench(tmp_path, batch_size=1, replay_rate=None)
        next_one.emit("b")
        next_one.run(60.0)

        assert is_over
        left = 60 - (len(bench.taken) - 1)
        assert left == next_one.stats.recovered == len(next_one.taken) - 1
        assert 61 == len({*bench.taken, *next_one.taken[1:]})

    def test_it_can_be_used_again(self, tmp_path) -> None:
        """What comes in late finds a folder, though the one of before is gone."""
        bench = Bench(tmp_path, batch_size=1)
        bench.endpoint = down
        bench.emit("a")
        bench.run()
        bench.endpoint = up
        bench.run(10.0)
        bench.outbox.close_spool()
        bench.endpoint = down
        bench.emit("late")
        bench.run()

        assert [["late"]] == bench.on_disk


class TestRelief:
    """A queue that is nearly full goes to disk while an attempt hangs."""

    @pytest.mark.parametrize(
        "options",
        [{"max_queue_size": 1000}, {"max_queue_bytes": 100_000}],
        ids=["events", "bytes"],
    )
    def test_it_is_asked_for_near_the_bound(self, tmp_path, options) -> None:
        """From three quarters of either bound on, each event asks for it."""
        bench = Bench(tmp_path, **options)
        bench.emit(*names(750))
        before = bench.calls.count("relieve")
        bench.emit("a", "b")

        assert (0, 2) == (before, bench.calls.count("relieve"))

    @pytest.mark.parametrize(
        "options",
        [{"max_queue_size": 10_000}, {"max_queue_bytes": 1_000_000}],
        ids=["events", "bytes"],
    )
    def test_it_goes_down_to_half(self, tmp_path, options) -> None:
        """File by file, in order, until half of the bound is free."""
        bench = Bench(tmp_path, **{"max_queue_size": 100_000, **options})
        bench.emit(*names(8000))
        bench.outbox.relieve()
        bench.check()

        assert (5000, 3000) == (bench.stats.pending, bench.stats.spooled)
        assert names(3000) == [name for found in bench.on_disk for name in found]

    def test_there_is_nothing_to_do(self, tmp_path) -> None:
        """A queue that is half full is left alone."""
        bench = Bench(tmp_path, max_queue_size=1000)
        bench.emit(*names(500))
        bench.outbox.relieve()

        assert (500, []) == (bench.stats.pending, bench.files)

    def test_what_is_being_sent_comes_to_rest_as_well(self, tmp_path) -> None:
        """Sent events take memory, too; when the answer is there, their file goes."""
        bench = Bench(tmp_path, batch_size=1, max_queue_size=1000)

        def endpoint(_: list[str]) -> Answer:
            bench.endpoint = up
            bench.emit(*names(10, 1000))
            bench.outbox.relieve()
            assert [names(900), names(10, 1000)] == bench.on_disk
            assert 0 == bench.stats.pending
            return TAKEN

        bench.endpoint = endpoint
        bench.emit(*names(900))
        bench.run(60.0)

        assert bench.emitted == bench.taken
        assert ([], True) == (bench.files, bench.stats.is_balanced)

    def test_the_order_is_kept(self, tmp_path) -> None:
        """What was moved to disk goes before what came after it."""
        bench = Bench(tmp_path, batch_size=1, max_queue_size=100)
        count = iter(range(70, 10_000))

        def endpoint(_: list[str]) -> Answer:
            for _ in range(70):
                if len(bench.emitted) < 2000:
                    bench.emit(str(next(count)))
                if "relieve" in bench.calls:
                    bench.calls.clear()
                    bench.outbox.relieve()
                    bench.check()
            return TAKEN if len(bench.attempts) % 3 else RETRY

        bench.endpoint = endpoint
        bench.emit(*names(70))
        bench.run(1000.0)

        assert 2000 == len(bench.emitted)
        assert bench.emitted == bench.taken

    def test_it_ends_where_the_disk_fails(self, tmp_path, disk) -> None:
        """There is nothing to be done, and it does not try again and again."""
        bench = Bench(tmp_path, max_queue_size=1000)
        disk.fail()
        bench.emit(*names(1000))
        bench.outbox.relieve()
        bench.check()

        assert (1000, 1) == (bench.stats.pending, bench.stats.spool_errors)


class TestDisk:
    """A disk that fails: as if there were no spool, until it works again."""

    def test_what_failed_stays_in_memory(self, tmp_path, disk) -> None:
        """A batch that can be neither sent nor written waits, and is written later."""
        bench = Bench(tmp_path, batch_size=3)
        bench.endpoint = lambda _: LATER
        disk.fail()
        bench.emit("a", "b", "c")
        bench.run(20.0)
        during = bench.stats
        disk.heal()
        bench.emit("d")
        bench.run(20.0)

        assert (3, 0, {}) == (during.pending, during.spooled, during.dropped)
        assert during.spool_errors > 0
        assert (0, 4) == (bench.stats.pending, bench.stats.spooled)
        assert [["a", "b", "c"], ["d"]] == bench.on_disk

    def test_it_is_not_tried_all_the_time(self, tmp_path, disk) -> None:
        """After a failure some seconds pass, however much is emitted meanwhile."""
        bench = Bench(tmp_path, batch_size=1, batch_interval=0.1)
        bench.endpoint = lambda _: LATER
        disk.fail()
        for i in range(120):
            bench.emit(str(i))
            bench.run(0.5)

        assert bench.stats.spool_errors <= 12
        assert (120, {}) == (bench.stats.pending, bench.stats.dropped)

    def test_memory_is_bounded(self, tmp_path, disk) -> None:
        """The queue's bound is of all that is in memory, and drops what is beyond."""
        bench = Bench(tmp_path, batch_size=1, batch_interval=0.1, max_queue_size=100)
        bench.endpoint = lambda _: LATER
        disk.fail()
        for start in range(0, 500, 10):
            bench.emit(*names(10, start))
            bench.run(1.0)

        assert (100, 400) == (bench.stats.pending, bench.stats.dropped["queue_full"])

    def test_retries_end_in_memory(self, tmp_path, disk) -> None:
        """Without a disk, `retry_for` holds."""
        bench = Bench(tmp_path, batch_size=1, retry_for=30.0)
        bench.endpoint = down
        disk.fail()
        bench.emit("a")
        bench.run(100.0)

        assert {"retry_expired": 1} == bench.stats.dropped

    def test_it_fails_between_two_files(self, tmp_path, disk) -> None:
        """What cannot follow into the spool waits in the line, behind what is there."""
        bench = Bench(tmp_path, batch_size=3, batch_interval=1.0)
        bench.endpoint = lambda _: LATER
        bench.emit("a", "b", "c")
        bench.run()
        disk.fail()
        bench.emit("d", "e", "f")
        bench.run(3.0)
        bench.emit("g")
        bench.run(1.0)
        during = bench.stats.pending, bench.on_disk
        disk.heal()
        bench.run(20.0)
        bench.emit("h")
        bench.run(5.0)
        on_disk = bench.on_disk
        bench.endpoint = up
        bench.run(100.0)

        assert (4, [["a", "b", "c"]]) == during
        assert [*"abcdefgh"] == [name for found in on_disk for name in found]
        assert [*"abcdefgh"] == bench.taken
        assert [] == bench.files

    def test_reading_fails_for_a_while(self, tmp_path, disk) -> None:
        """Where files cannot be opened for now, they are read later."""
        bench = Bench(tmp_path, batch_size=1, batch_interval=1.0)
        bench.endpoint = lambda _: LATER
        bench.emit("a")
        bench.run()
        bench.emit("b", "c")
        bench.run(30.0)
        bench.endpoint = up
        disk.reading = OSError(errno.EMFILE, "too many")
        bench.run(60.0)
        before = bench.taken, bench.stats.spooled, bench.stats.spool_errors
        disk.heal()
        bench.run(10.0)

        assert (["a", "b", "c"], {}) == (bench.taken, bench.stats.dropped)
        assert 2 == before[1]
        assert 0 < before[2] <= 5

    def test_reading_fails_for_good(self, tmp_path, disk) -> None:
        """What cannot be read any more is counted, and the rest goes on."""
        bench = Bench(tmp_path, batch_size=1, batch_interval=1.0)
        bench.endpoint = lambda _: LATER
        bench.emit("a")
        bench.run()
        bench.emit("b", "c")
        bench.run(30.0)
        bench.endpoint = up
        disk.reading = OSError(errno.EIO, "broken")
        bench.run(60.0)
        disk.heal()
        bench.emit("d")
        bench.run(10.0)

        assert ["a", "d"] == bench.taken
        assert ({"spool_damaged": 2}, 0) == (bench.stats.dropped, bench.stats.spooled)

    def test_a_full_spool_drops_the_oldest(self, tmp_path) -> None:
        """By `max_spool_bytes`, whole files, and never what is being sent."""
        bench = Bench(
            tmp_path,
            batch_size=1,
            batch_interval=0.1,
            max_spool_bytes=100_000,
            replay_rate=None,
            **SMALL,
        )
        bench.endpoint = lambda _: LATER
        bench.emit("first")
        bench.run()
        for start in range(0, 3000, 20):
            bench.emit(*names(20, start))
            bench.run(0.1)
        stats = bench.stats
        dropped = stats.dropped["spool_full"]
        on_disk = sum(path.stat().st_size for path in bench.files)
        bench.endpoint = up
        bench.run(100.0)

        assert 90_000 < on_disk <= 100_000
        assert dropped > 100
        assert 3001 == dropped + stats.spooled + stats.pending
        assert ["first", *names(3000 - dropped, dropped)] == bench.taken


class TestJournal:
    """With `spool_each_event`, an event is on disk before `put` returns."""

    @pytest.fixture(name="bench")
    def _bench(self, tmp_path) -> Bench:
        """Return a bench with a journal and a small queue."""
        return Bench(
            tmp_path, spool_each_event=True, max_queue_size=10, batch_interval=1.0
        )

    def crash(self, bench: Bench) -> Bench:
        """Return the process after *bench*, which was killed."""
        for home in bench.spool._homes.values():
            home.let_go()
        return Bench(bench.folder, batch_size=1, replay_rate=None)

    def test_it_is_on_disk_and_in_memory(self, bench) -> None:
        """A journal has its line, and the queue its bytes."""
        results = bench.emit("a", "b")

        (journal,) = bench.journals
        lines = journal.read_bytes().splitlines()
        assert ["a", "b"] == [name_of(line[9:]) for line in lines] == bench.queued
        assert ([True, True], 2, 0) == (
            results,
            bench.stats.pending,
            bench.stats.spooled,
        )

    def test_a_crash_loses_none(self, bench) -> None:
        """The next process recovers what was put, with the same ids."""
        bench.emit(*names(25))
        bench.outbox.load(4)
        next_one = self.crash(bench)
        next_one.emit("next")
        next_one.run(60.0)

        assert {"next", *names(25)} == set(next_one.taken)
        assert 25 == next_one.stats.recovered
        assert ([], []) == (next_one.files, next_one.journals)

    def test_it_is_sent_from_memory(self, bench) -> None:
        """Once all events of a journal have ended, it is deleted."""
        bench.emit(*names(3))
        bench.run(10.0)
        bench.emit("x")
        bench.run(10.0)

        assert [*names(3), "x"] == bench.taken
        assert 0 == bench.journaled
        assert {1} == {len(ids) for ids in bench.sent_ids.values()}

    def test_what_the_queue_has_no_room_for_is_kept(self, bench) -> None:
        """It is counted `spooled`, relief is asked for, and it is sent from disk."""
        results = bench.emit(*names(25))
        stats = bench.stats
        bench.run(60.0)

        assert ([True] * 25, 10, 15) == (results, stats.pending, stats.spooled)
        assert "relieve" in bench.calls
        assert sorted(names(25)) == sorted(bench.taken)
        assert (0, []) == (bench.stats.spooled, bench.files)

    def test_what_was_kept_has_not_ended(self, bench) -> None:
        """While it is on disk alone, nobody says that all has ended."""
        bench.emit(*names(10))
        bench.outbox.load(10)
        bench.emit("kept")
        bench.attempt()
        has_ended = bench.outbox.has_ended(), bench.outbox.has_ended(with_adopted=True)
        bench.outbox.is_retired = True
        is_over = bench.outbox.is_over
        bench.run(60.0)

        assert ((False, False), False) == (has_ended, is_over)
        assert [*names(10), "kept"] == bench.taken
        assert (True, True) == (bench.outbox.has_ended(), bench.outbox.is_over)

    @pytest.mark.parametrize("may_rest", [False, True])
    @pytest.mark.parametrize("moment", ["before", "meanwhile"])
    def test_a_flush_waits_for_what_was_kept(self, bench, moment, may_rest) -> None:
        """A marker is reached when what was kept before it is sent."""
        bench.emit(*names(10))
        if moment == "meanwhile":
            bench.outbox.load(10)
        bench.emit("kept")
        marker = bench.flush(may_rest=may_rest)
        seen: list[bool] = []

        def endpoint(_: list[str]) -> Answer:
            seen.append(marker.is_reached)
            return TAKEN

        bench.endpoint = endpoint
        bench.run(10.0)

        assert ([False, False], True) == (seen, marker.is_reached)
        assert [*names(10), "kept"] == bench.taken

    def test_what_was_kept_goes_without_another_event(self, bench) -> None:
        """It is sent though nothing is emitted afterwards that would call for it."""
        bench.emit(*names(10))
        bench.outbox.load(10)
        bench.emit("kept")
        bench.attempt()
        bench.run(60.0)

        assert [*names(10), "kept"] == bench.taken

    def test_what_was_kept_goes_in_its_turn(self, bench) -> None:
        """What was emitted when the queue was full goes after what was in it."""
        bench.emit(*names(15))
        bench.outbox.load(3)
        bench.emit(*names(5, 15))
        bench.run(60.0)

        assert names(20) == bench.taken

    def test_a_drop_is_not_written(self, bench) -> None:
        """What `before_send` drops touches neither disk nor queue."""
        results = bench.emit("drop")

        assert ([False], []) == (results, bench.journals)
        assert {"before_send": 1} == bench.stats.dropped
        assert bench.stats.is_balanced

    def test_after_the_end_it_is_refused(self, bench) -> None:
        """A closed client counts an event as `closed`, and runs no hook."""
        bench.outbox.queue.is_closed = True
        bench.encoder.error = ZeroDivisionError()
        results = bench.emit("late")

        assert ([False], {"closed": 1}) == (results, bench.stats.dropped)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
    @pytest.mark.parametrize("place", ["hook", "disk"])
    def test_an_interrupt_is_the_hosts(self, bench, disk, error, place) -> None:
        """Ctrl-C in the middle of it goes on, and its event is counted."""
        bench.emit("a")
        if place == "hook":
            bench.encoder.error = error
        else:
            disk.logging = error
        with pytest.raises(type(error)):
            bench.emit("b")
        bench.encoder.error = None
        disk.heal()
        bench.run(10.0)
        bench.emit("c")
        bench.run(10.0)

        assert ["a", "c"] == bench.taken
        assert {"internal_error": 1} == bench.stats.dropped
        assert (0, 0) == (bench.stats.pending, bench.outbox.queue._bytes.value)
        assert 0 == bench.journaled

    def test_an_interrupt_of_what_is_kept(self, bench, disk) -> None:
        """With a full queue it is counted as well, and takes no place."""
        bench.emit(*names(10))
        disk.logging = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            bench.emit("b")

        assert ({"internal_error": 1}, 10) == (bench.stats.dropped, bench.stats.pending)
        assert bench.stats.is_balanced

    def test_a_disk_that_fails_leaves_memory(self, bench, disk) -> None:
        """Events go to the queue as long as there is room, and are dropped then."""
        disk.fail()
        results = bench.emit(*names(12))
        bench.run(10.0)

        assert [True] * 10 + [False] * 2 == results
        assert (names(10), {"queue_full": 2}) == (bench.taken, bench.stats.dropped)
        assert 12 == bench.stats.spool_errors

    def test_the_oldest_are_dropped_if_that_is_the_policy(self, tmp_path, disk) -> None:
        """With a disk that fails; their journal is not held for ever."""
        bench = Bench(
            tmp_path,
            spool_each_event=True,
            max_queue_size=3,
            overflow="drop_oldest",
            batch_interval=1.0,
        )
        bench.emit(*names(3))
        disk.fail()
        bench.emit("x", "y")
        disk.heal()
        bench.run(10.0)
        bench.emit("z")
        bench.run(10.0)

        assert ["2", "x", "y", "z"] == bench.taken
        assert {"queue_full": 2} == bench.stats.dropped
        assert 0 == bench.journaled

    def test_a_full_spool_keeps_no_more(self, bench) -> None:
        """Beyond `max_spool_bytes`, what the queue has no room for is dropped."""
        bench.spool.is_full = True
        results = bench.emit(*names(12))

        assert [True] * 10 + [False] * 2 == results
        assert {"queue_full": 2} == bench.stats.dropped

    def test_what_failed_is_on_disk_once(self, bench) -> None:
        """A batch that comes to rest leaves its journal: there is one copy."""
        bench.endpoint = lambda _: LATER
        bench.emit(*names(5))
        bench.run(1.0)
        bench.emit(*names(5, 5))
        bench.run(1.0)

        assert [names(5), names(5, 5)] == bench.on_disk
        assert 0 == bench.journaled

    @pytest.mark.parametrize("count", [5, 25])
    def test_the_end_leaves_one_copy(self, bench, count) -> None:
        """A process that ends leaves each event once, and the next one recovers it."""
        bench.endpoint = lambda _: LATER
        bench.emit(*names(3))
        bench.run(1.0)
        bench.emit(*names(count, 3))
        bench.finish()
        stats = bench.stats
        next_one = Bench(bench.folder, batch_size=1, replay_rate=None)
        next_one.emit("next")
        next_one.run(60.0)

        assert ({}, count + 3, []) == (stats.dropped, stats.spooled, bench.journals)
        assert count + 3 == next_one.stats.recovered
        assert sorted(["next", *names(count + 3)]) == sorted(next_one.taken)

    def test_the_end_of_a_process_whose_disk_fails(self, bench, disk) -> None:
        """What is in the journal is safe there, whether it was taken up or not."""
        bench.emit(*names(8))
        bench.outbox.load(3)
        disk.writing = OSError(errno.ENOSPC, "full")
        bench.finish()
        stats = bench.stats
        disk.heal()
        next_one = Bench(bench.folder, batch_size=1, replay_rate=None)
        next_one.emit("next")
        next_one.run(60.0)

        assert ({}, 8, 0) == (stats.dropped, stats.spooled, stats.pending)
        assert 8 == next_one.stats.recovered
        assert ["next", *names(8)] == next_one.taken

    def test_a_process_that_cannot_stop_leaves_one_copy(self, bench) -> None:
        """Where a thread hangs in an attempt, what comes to rest is there once."""
        bench.emit(*names(5))
        bench.outbox.load(3)
        bench.emit("x")
        bench.outbox.rest_all(bench.clock.monotonic() + 2.0)
        bench.check()

        assert sorted([*names(5), "x"]) == sorted(n for ns in bench.on_disk for n in ns)
        assert 0 == bench.journaled

    def test_without_a_journal_it_is_queued(self, tmp_path) -> None:
        """With a spool that has none, `put` is that of the queue."""
        bench = Bench(tmp_path)
        bench.ledger.emitted.add(1)
        fields = {"name": "a"}
        is_taken = bench.outbox.put(
            (0, "custom", "s", None, {}, fields, None, None, 100)
        )

        assert (True, ["a"], []) == (is_taken, bench.queued, bench.journals)

    def test_a_child_starts_anew(self, bench) -> None:
        """What is in memory and on disk is the parent's."""
        bench.emit("a")
        bench.run(1.0)
        bench.emit("b")
        before = {path: path.read_bytes() for path in bench.journals}
        bench.outbox.start_over()  # as after a fork
        bench.ledger.reset()
        bench.emit("child")

        assert ["child"] == bench.queued
        after = {path: path.read_bytes() for path in bench.journals}
        assert before == {path: after.pop(path) for path in before}
        assert 1 == len(after)


ACTS = st.one_of(
    st.tuples(st.just("emit"), st.integers(1, 70)),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.3, 1.0, 7.0, 45.0])),
    st.tuples(st.just("answer"), st.sampled_from([TAKEN, TAKEN, RETRY, HOLD, LATER])),
    st.tuples(st.sampled_from(["break", "heal", "relieve", "flush", "end"]), st.none()),
)
"""What happens to a process: an act, and with what."""


class Story:
    """Some processes, one after the other, and what was to happen to them."""

    def __init__(self, folder: Path, disk: Disk, **options: Any) -> None:
        self._folder = folder
        self._disk = disk
        self._options = options
        self._start = datetime(2026, 1, 1, tzinfo=timezone.utc)
        self.benches: list[Bench] = []
        self.begin()

    def begin(self) -> None:
        """Start a process, later than the one before."""
        self._start += timedelta(hours=1)
        options = {"batch_size": 20, "batch_interval": 1.0, **self._options}
        bench = Bench(self._folder, clock=FakeClock(self._start), **options)
        self.benches.append(bench)
        self.bench = bench

    def act(self, verb: str, value: Any) -> None:
        """Do one act, and hold that all is in its place."""
        bench = self.bench
        if verb == "emit":
            name = f"{len(self.benches)}."
            start = len(bench.emitted)
            bench.emit(*(name + str(i) for i in range(start, start + value)))
        elif verb == "wait":
            bench.run(value)
        elif verb == "answer":
            bench.endpoint = lambda _: value
        elif verb == "break":
            self._disk.fail()
        elif verb == "heal":
            self._disk.heal()
        elif verb == "relieve":
            bench.outbox.relieve()
        elif verb == "flush":
            bench.flush()
        else:
            self._disk.heal()
            bench.clock.advance(5.0)
            bench.finish()
            self.begin()
        bench.check()

    def end(self) -> None:
        """Let the last process deliver everything."""
        self._disk.heal()
        self.bench.endpoint = up
        self.act("emit", 1)
        self.bench.run(1000.0)
        marker = self.bench.flush()
        self.bench.run(100.0)
        assert marker.is_reached
        self.bench.finish()
        assert ([], []) == (self.bench.files, self.bench.journals)

    @property
    def taken(self) -> list[str]:
        """What was taken of all processes, in order."""
        return [name for bench in self.benches for name in bench.taken]

    def check(self) -> None:
        """Hold that nothing is missing, doubled, or under another id."""
        dropped = sum(sum(b.stats.dropped.values()) for b in self.benches)
        emitted = sum(len(b.emitted) for b in self.benches)
        assert emitted == len(self.taken) + dropped
        assert len(self.taken) == len(set(self.taken))
        spooled = sum(b.stats.spooled for b in self.benches)
        assert spooled == sum(b.stats.recovered for b in self.benches)
        ids: dict[str, set[str]] = {}
        for bench in self.benches:
            for name, found in bench.sent_ids.items():
                ids.setdefault(name, set()).update(found)
        assert {1} == {len(found) for found in ids.values()}


class TestStories:
    """Whatever happens, in whatever order."""

    @staticmethod
    def tell(acts: Iterable[tuple[str, Any]], **options: Any) -> Story:
        """Let it happen, and hold that all is right at the end."""
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            story = Story(Path(folder), Disk(patch), **options)
            for act in acts:
                story.act(*act)
            story.end()
            story.check()
        return story

    @settings(max_examples=80, deadline=None)
    @given(st.lists(ACTS, max_size=40))
    def test_all_arrive_in_order(self, acts) -> None:
        """With room enough, every event arrives once, in the order of emission."""
        story = self.tell(acts, replay_rate=None)

        for i in range(1, len(story.benches) + 1):
            mine = [n for n in story.taken if n.startswith(f"{i}.")]
            assert sorted(mine, key=lambda n: int(n.partition(".")[2])) == mine
        assert {} == story.bench.stats.dropped

    @settings(max_examples=60, deadline=None)
    @given(st.lists(ACTS, max_size=40), st.sampled_from(["drop_newest", "drop_oldest"]))
    def test_all_are_accounted_for(self, acts, overflow) -> None:
        """With a small queue and a slow replay, what is missing was counted."""
        self.tell(acts, max_queue_size=60, overflow=overflow, replay_rate=100.0)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(ACTS, max_size=40))
    def test_each_event_is_written_first(self, acts) -> None:
        """With a journal and a small queue, none is missing and none comes twice."""
        self.tell(acts, spool_each_event=True, max_queue_size=60, replay_rate=None)


class TestOwnedLock:
    """A lock that a signal handler need not wait for."""

    def test_it_knows_its_holder(self) -> None:
        """It is the thread's that took it, and nobody's afterwards."""
        lock = OwnedLock()
        with lock:
            seen = lock.is_mine, start_together(1, lambda _: lock.is_mine)

        assert (True, [False]) == seen
        assert not lock.is_mine

    def test_it_is_taken_once(self) -> None:
        """Another thread waits for as long as it wants to, and no longer."""
        lock = OwnedLock()
        with lock:
            waits = start_together(1, lambda _: (lock.acquire(0), lock.acquire(0.01)))

        assert [(False, False)] == waits
        assert lock.acquire(1)

    def test_what_is_deferred_comes_after(self) -> None:
        """It is called once, when the lock has been given back."""
        lock = OwnedLock()
        called: list[bool] = []
        with lock:
            is_deferred = lock.defer(lambda: called.append(lock.acquire(0)))
            before = list(called)
        lock.release()
        with lock:
            pass

        assert (True, []) == (is_deferred, before)
        assert [True] == called

    def test_nothing_is_deferred_by_others(self) -> None:
        """Whoever does not hold the lock does at once what he has to."""
        lock = OwnedLock()

        assert not lock.defer(list)
        with lock:
            assert [False] == start_together(1, lambda _: lock.defer(list))
