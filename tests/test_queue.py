"""The bounded queue: exact bounds without a lock, and nobody left asleep."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from harness import interrupts, start_together
from pgtrack import _diagnostics, _queue
from pgtrack._ledger import Ledger
from pgtrack._queue import NEVER, BoundedQueue, Marker

if TYPE_CHECKING:
    from pgtrack._record import Record


def record(name: Any = "", size: int = 100) -> Record:
    """Return a record that can be told from others by *name*."""
    return (0, "custom", "s", None, {}, {"name": name}, None, None, size)


class Bench:
    """A queue, its ledger, and how often it woke somebody."""

    def __init__(
        self,
        max_events: int = 10,
        max_bytes: int = 1_000_000,
        *,
        drop_oldest: bool = False,
    ) -> None:
        self.ledger = Ledger()
        self.wakes = 0
        self.queue = BoundedQueue(
            max_events=max_events,
            max_bytes=max_bytes,
            drop_oldest=drop_oldest,
            ledger=self.ledger,
            wake=self._wake,
        )

    def _wake(self) -> None:
        self.wakes += 1

    def put(self, name: Any = "", size: int = 100) -> bool:
        """Put a record as a client does."""
        self.ledger.emitted.add(1)
        return self.queue.put(record(name, size))

    def take_all(self) -> list[Any]:
        """Empty the queue; return names and markers."""
        items = iter(self.queue.take, None)
        return [i if isinstance(i, Marker) else i[5]["name"] for i in items]


@pytest.fixture(name="busy")
def _busy():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestOrder:
    """First in, first out."""

    def test_records_come_out_in_the_order_they_went_in(self) -> None:
        """What was put first is taken first, and an empty queue gives None."""
        bench = Bench()
        for name in range(5):
            bench.put(name)

        assert [0, 1, 2, 3, 4] == bench.take_all()
        assert bench.queue.take() is None

    def test_the_order_of_each_thread_is_kept(self, busy) -> None:
        """Records of many threads mix, but those of one stay in order."""
        bench = Bench(max_events=10_000)
        start_together(8, lambda i: [bench.put((i, n)) for n in range(500)])

        taken = bench.take_all()
        for i in range(8):
            assert list(range(500)) == [n for thread, n in taken if thread == i]

    def test_its_length_is_what_is_in_it(self) -> None:
        """The length counts what was put and not yet taken."""
        bench = Bench()
        bench.put()
        bench.put()
        bench.queue.take()

        assert 1 == len(bench.queue)


class TestBounds:
    """By events and by bytes; every drop counted."""

    def test_the_newest_is_dropped_when_there_is_no_place(self) -> None:
        """With as many events as allowed the next is refused, and counted."""
        bench = Bench(max_events=3)
        taken = [bench.put(name) for name in range(5)]

        assert [True, True, True, False, False] == taken
        assert [0, 1, 2] == bench.take_all()
        assert {"queue_full": 2} == bench.ledger.stats().dropped

    def test_the_newest_is_dropped_when_there_are_too_many_bytes(self) -> None:
        """The bytes are bounded as well, to the byte."""
        bench = Bench(max_bytes=1000)
        taken = [bench.put("a", 600), bench.put("b", 401), bench.put("c", 400)]

        assert [True, False, True] == taken
        assert ["a", "c"] == bench.take_all()

    def test_what_was_refused_takes_no_place(self) -> None:
        """A refused event leaves the counters as they were."""
        bench = Bench(max_events=2, max_bytes=1000)
        bench.put("a", 1000)
        for _ in range(5):
            bench.put("b", 1)
        bench.queue.take()
        bench.queue.release(1000)

        assert bench.put("c", 1000)
        assert {"queue_full": 5} == bench.ledger.stats().dropped

    def test_taken_records_hold_their_place_until_released(self) -> None:
        """What is with the worker counts, until it came to its end."""
        bench = Bench(max_events=1)
        bench.put("a")
        bench.queue.take()
        is_taken_before = bench.put("b")
        bench.queue.release(100)
        bench.ledger.delivered.add(1)

        assert (False, True) == (is_taken_before, bench.put("c"))
        assert bench.ledger.stats().is_balanced

    def test_the_oldest_are_dropped_for_the_newest(self) -> None:
        """By the other policy the oldest make room."""
        bench = Bench(max_events=3, drop_oldest=True)
        taken = [bench.put(name) for name in range(5)]

        assert [True] * 5 == taken
        assert {"queue_full": 2} == bench.ledger.stats().dropped
        assert [2, 3, 4] == bench.take_all()

    def test_as_many_of_the_oldest_are_dropped_as_the_bytes_take(self) -> None:
        """A large event takes the place of several small ones, and of no more."""
        bench = Bench(max_bytes=1000, drop_oldest=True)
        for name in "abcd":
            bench.put(name, 250)
        bench.put("large", 600)

        assert {"queue_full": 3} == bench.ledger.stats().dropped
        assert ["d", "large"] == bench.take_all()

    @pytest.mark.parametrize("drop_oldest", [False, True])
    def test_what_cannot_ever_fit_drops_only_itself(self, drop_oldest) -> None:
        """An event larger than the bound costs none of those that wait."""
        bench = Bench(max_bytes=1000, drop_oldest=drop_oldest)
        bench.put("a", 500)

        assert not bench.put("giant", 1001)
        assert ["a"] == bench.take_all()
        assert {"queue_full": 1} == bench.ledger.stats().dropped

    def test_what_the_worker_holds_is_not_dropped(self) -> None:
        """When all places are the worker's, the newest is dropped by either policy."""
        bench = Bench(max_events=2, drop_oldest=True)
        bench.put("a")
        bench.put("b")
        bench.take_all()

        assert not bench.put("c")
        assert {"queue_full": 1} == bench.ledger.stats().dropped

    def test_the_worker_may_take_what_was_to_make_room(self, monkeypatch) -> None:
        """Where the queue is emptied meanwhile in vain, the newest is dropped."""
        bench = Bench(max_bytes=1000, drop_oldest=True)
        for name in "abcd":
            bench.put(name, 250)
        with_the_worker: list[Any] = []
        drop = bench.ledger.drop

        def take_all_and_drop(reason: Any) -> None:
            with_the_worker.extend(bench.take_all())
            drop(reason)

        monkeypatch.setattr(bench.ledger, "drop", take_all_and_drop)

        assert not bench.put("large", 600)
        assert ["b", "c", "d"] == with_the_worker
        assert {"queue_full": 2} == bench.ledger.stats().dropped
        assert bench.ledger.stats().is_balanced

    @pytest.mark.parametrize("drop_oldest", [False, True])
    def test_bounds_hold_exactly_for_many_threads(self, busy, drop_oldest) -> None:
        """However many put at once, neither bound is passed, and all are counted."""
        bench = Bench(max_events=50, max_bytes=4000, drop_oldest=drop_oldest)
        held = threading.Semaphore(0)
        most_events, most_bytes = [0], [0]

        def look(item: Record | Marker | None) -> None:
            if item is not None and not isinstance(item, Marker):
                bench.ledger.delivered.add(1)
                bench.queue.release(item[-1])

        def act(i: int) -> int:
            if i == 0:
                while not held.acquire(blocking=False):
                    # Deque and counters are read while others are at work on them.
                    most_events[0] = max(most_events[0], len(bench.queue))
                    items = list(bench.queue._items.copy())
                    size = sum(item[-1] for item in items)  # type: ignore[index]
                    most_bytes[0] = max(most_bytes[0], size)
                    look(bench.queue.take())
                return 0
            taken = sum(bench.put((i, n), size=50 + 10 * (n % 9)) for n in range(400))
            if i == 1:
                held.release()
            return taken

        taken = start_together(8, act)

        assert most_events[0] <= 50
        assert most_bytes[0] <= 4000
        stats = bench.ledger.stats()
        assert stats.is_balanced
        assert len(bench.queue) == stats.pending
        if not drop_oldest:
            assert sum(taken) == stats.delivered + stats.pending

    def test_full_is_told_without_a_payload(self) -> None:
        """That events are dropped is noted, with the bounds and the counter's name."""
        bench = Bench(max_events=1, max_bytes=12_345)
        bench.put("secret")
        bench.put("secret")

        _, text = _diagnostics._notes["queue_full"]
        assert "1 events or 12,345 bytes" in text
        assert "stats().dropped['queue_full']" in text
        assert "secret" not in text

    def test_a_closed_queue_takes_nothing(self) -> None:
        """After the end events are counted as `closed`."""
        bench = Bench()
        bench.queue.is_closed = True

        assert not bench.put()
        assert {"closed": 1} == bench.ledger.stats().dropped
        assert bench.ledger.stats().is_balanced


class TestMarkers:
    """A place in the queue that somebody waits for."""

    def test_a_marker_keeps_its_place(self) -> None:
        """A marker comes out after what was put before it."""
        bench = Bench()
        marker = Marker()
        bench.put("a")
        bench.queue.mark(marker)
        bench.put("b")

        assert ["a", marker, "b"] == bench.take_all()

    def test_the_queue_knows_whether_it_is_marked(self) -> None:
        """It is marked until the last marker was taken."""
        bench = Bench()
        states = [bench.queue.is_marked]
        for _ in range(2):
            bench.queue.mark(Marker())
        for _ in range(2):
            states.append(bench.queue.is_marked)
            bench.queue.take()
        states.append(bench.queue.is_marked)

        assert [False, True, True, False] == states

    def test_a_marker_is_not_dropped_for_an_event(self) -> None:
        """The oldest make room, markers among them stay, in front and in order."""
        bench = Bench(max_events=2, drop_oldest=True)
        first, second = Marker(), Marker()
        bench.queue.mark(first)
        bench.put("a")
        bench.queue.mark(second)
        bench.put("b")
        for name in "cd":
            bench.put(name)

        assert bench.queue.is_marked
        assert [first, second, "c", "d"] == bench.take_all()
        assert {"queue_full": 2} == bench.ledger.stats().dropped

    def test_markers_alone_make_no_room(self) -> None:
        """With nothing but markers to drop, the new event is dropped."""
        bench = Bench(max_events=1, drop_oldest=True)
        bench.put("with the worker")
        bench.take_all()
        markers = [Marker(), Marker()]
        for marker in markers:
            bench.queue.mark(marker)

        assert not bench.put("b")
        assert markers == bench.take_all()

    def test_whoever_takes_is_woken_for_a_marker_that_was_moved(self) -> None:
        """While it was out of the queue, the worker may have found it empty."""
        bench = Bench(max_events=1, drop_oldest=True)
        bench.queue.wake_at = NEVER
        bench.queue.mark(Marker())
        bench.put("a")
        before = bench.wakes
        bench.put("b")

        assert bench.wakes > before

    def test_no_marker_is_lost_among_many_threads(self, busy) -> None:
        """Markers set while others drop the oldest all come out, each once."""
        bench = Bench(max_events=20, drop_oldest=True)
        done = threading.Event()
        out: list[Marker] = []

        def act(i: int) -> list[Marker]:
            if i == 0:
                while not done.is_set() or len(bench.queue):
                    item = bench.queue.take()
                    if isinstance(item, Marker):
                        out.append(item)
                    elif item is not None:
                        bench.ledger.delivered.add(1)
                        bench.queue.release(item[-1])
                return []
            if i == 1:
                markers = [Marker() for _ in range(200)]
                for marker in markers:
                    bench.queue.mark(marker)
                done.set()
                return markers
            for n in range(1000):
                bench.put((i, n))
            return []

        results = start_together(6, act)
        out += [item for item in bench.take_all() if isinstance(item, Marker)]

        assert len(results[1]) == len(out)
        assert set(results[1]) == set(out)
        assert not bench.queue.is_marked

    def test_a_reached_marker_wakes_whoever_waits(self) -> None:
        """Waiting ends when the marker is reached, at once where it was before."""
        marker = Marker()

        def act(i: int) -> bool:
            if i == 0:
                return marker.wait(10)
            marker.reach()
            return True

        assert [True, True] == start_together(2, act)
        assert marker.wait(10)

    def test_a_wait_for_a_marker_ends(self) -> None:
        """A marker that is not reached is waited for no longer than asked."""
        assert not Marker().wait(0.01)


class TestWaking:
    """Who sleeps until there is enough to do is woken when there is."""

    def test_the_first_event_wakes(self) -> None:
        """A new queue wakes with its first item."""
        bench = Bench()
        bench.put()

        assert 1 == bench.wakes

    def test_it_wakes_at_the_length_that_was_asked_for(self) -> None:
        """Below the length nobody is woken; from it on, with every item."""
        bench = Bench()
        bench.queue.wake_at = 3
        wakes = []
        for _ in range(4):
            bench.put()
            wakes.append(bench.wakes)

        assert [0, 0, 1, 2] == wakes

    def test_nobody_is_woken_who_does_not_ask(self) -> None:
        """While the worker is at work, putting does not wake it."""
        bench = Bench()
        bench.queue.wake_at = NEVER
        bench.put()
        bench.queue.mark(Marker())

        assert 0 == bench.wakes

    def test_it_wakes_when_the_item_can_be_taken(self) -> None:
        """Whoever is woken finds what it was woken for."""
        bench = Bench()
        found = []
        bench.queue._wake = lambda: found.append(bench.queue.take())
        bench.put("a")

        assert [record("a")] == found

    def test_no_wakeup_is_lost(self, busy) -> None:
        """A worker that asks, looks once more and sleeps takes all that threads put."""
        count = 4 * 2000
        woken = threading.Semaphore(0)
        bench = Bench(max_events=count)
        bench.queue._wake = woken.release

        def work() -> int:
            taken = 0
            while taken < count:
                bench.queue.wake_at = 1
                if not len(bench.queue):
                    assert woken.acquire(timeout=20)
                bench.queue.wake_at = NEVER
                while bench.queue.take() is not None:
                    taken += 1
            return taken

        def act(i: int) -> int:
            return work() if i == 0 else sum(bench.put() for _ in range(2000))

        assert [count, 2000, 2000, 2000, 2000] == start_together(5, act)

    def test_a_child_starts_with_an_empty_queue(self) -> None:
        """After a reset nothing of before is there, and the first item wakes."""
        bench = Bench(max_bytes=1000)
        bench.put("a", 1000)
        bench.queue.mark(Marker())
        bench.queue.wake_at = NEVER
        bench.queue.reset()
        bench.ledger.reset()
        before = bench.wakes

        assert [] == bench.take_all()
        assert not bench.queue.is_marked
        assert bench.put("b", 1000)
        assert before + 1 == bench.wakes


class TestReentrancy:
    """A signal handler or finaliser may emit or flush in the middle of a put."""

    @pytest.mark.parametrize("drop_oldest", [False, True])
    @pytest.mark.parametrize("nested", ["put", "mark", "take"])
    def test_at_any_bytecode(self, nested, drop_oldest) -> None:
        """Put, mark or take at each bytecode of a put: the counts stay exact."""
        count = 0
        for interrupt in interrupts(_queue):
            bench = Bench(max_events=3, max_bytes=350, drop_oldest=drop_oldest)

            def act(bench: Bench = bench) -> None:
                if nested == "put":
                    bench.put("nested")
                elif nested == "mark":
                    bench.queue.mark(Marker())
                else:
                    item = bench.queue.take()
                    if item is not None and not isinstance(item, Marker):
                        bench.ledger.delivered.add(1)
                        bench.queue.release(item[-1])

            for name in "abc":
                bench.put(name)
            bench.queue.mark(Marker())
            interrupt(lambda bench=bench: bench.put("new"), act)
            left = bench.take_all()
            markers = sum(isinstance(item, Marker) for item in left)
            stats = bench.ledger.stats()

            assert stats.is_balanced, interrupt.place
            assert len(left) - markers == stats.pending <= 3, interrupt.place
            assert 100 * stats.pending == bench.queue._bytes.value, interrupt.place
            assert 1 + (nested == "mark" and interrupt.place is not None) == markers
            count += 1

        assert count > 20
