"""What becomes of a parcel: pure policy, so no thread, no network and no clock."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtrack import _diagnostics
from pgtrack._ledger import Ledger
from pgtrack._line import Line, Parcel, pack
from pgtrack._retry import RetryPolicy
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Endpoint = Callable[[Sequence[bytes]], Answer]

TAKEN = Answer(verdict=Verdict.TAKEN)
REFUSED = Answer(verdict=Verdict.REFUSED, reason="400 bad")
RETRY = Answer(verdict=Verdict.RETRY, reason="503")
HOLD = Answer(verdict=Verdict.HOLD, reason="401")
TOO_LARGE = Answer(verdict=Verdict.TOO_LARGE, reason="413")
LOST = Answer(verdict=Verdict.LOST, reason="closed")
REJECTED = Answer(verdict=Verdict.REJECTED, reason="500 no")


def numbered(count: int, start: int = 0) -> list[bytes]:
    """Return events that are their own numbers."""
    return [b"%d" % i for i in range(start, start + count)]


def poisoned(*poison: int) -> Endpoint:
    """Refuse every batch that has one of these events in it."""
    bad = {b"%d" % i for i in poison}
    return lambda events: REFUSED if bad & set(events) else TAKEN


class File:
    """A file of the spool, as far as the line knows it."""

    def __init__(self, ledger: Ledger, count: int) -> None:
        self._ledger = ledger
        self.left = count
        self.is_expired = False

    def release(self) -> None:
        """Count an event as ended; never more than there are."""
        assert self.left > 0
        self.left -= 1
        self._ledger.spooled.add(-1)


class Bench:
    """A line, an endpoint, and a clock that moves by waiting."""

    def __init__(
        self, retry_for: float = 300.0, jitter: float = 1.0, probe_size: int = 50
    ) -> None:
        self.now = 1000.0
        self.ledger = Ledger()
        self.released: list[int] = []
        self.line = Line(
            ledger=self.ledger,
            release=self._release,
            policy=RetryPolicy(jitter=lambda: jitter),
            retry_for=retry_for,
            probe_size=probe_size,
        )
        self.attempts: list[tuple[float, list[bytes]]] = []
        self.taken: list[bytes] = []

    def _release(self, hold: Any) -> None:
        if isinstance(hold, File):
            hold.release()
        else:
            self.released.append(hold)
            self.ledger.pending.add(-1)

    def add(self, *batches: Iterable[bytes]) -> None:
        """Append a parcel for each batch."""
        for batch in batches:
            events = list(batch)
            self.ledger.emitted.add(len(events))
            self.ledger.pending.add(len(events))
            self.line.extend([Parcel(events, [100] * len(events))])

    def add_file(self, events: Sequence[bytes], max_bytes: int = 10_000) -> File:
        """Append what was read of a file of the spool."""
        file = File(self.ledger, len(events))
        self.ledger.recovered.add(len(events))
        self.ledger.spooled.add(len(events))
        pairs: list[Any] = [(event, file) for event in events]
        self.line.extend(pack(pairs, max_bytes))
        return file

    def rest(self) -> File:
        """Have what is in memory on disk, as the outbox does."""
        events = self.line.in_memory
        file = File(self.ledger, len(events))
        self.line.rest_in(file)  # type: ignore[arg-type]
        self.ledger.spooled.add(len(events))
        return file

    def attempt(self, endpoint: Endpoint) -> float:
        """Send what is next, at once, and return how long the line waits then."""
        parcel = self.line.next(self.now)
        self.attempts.append((self.now - 1000.0, list(parcel.events)))
        answer = endpoint(parcel.events)
        if answer.verdict is Verdict.TAKEN:
            enumerated = enumerate(parcel.events)
            self.taken += [e for i, e in enumerated if i not in answer.rejected]
        self.line.settle(answer, self.now)
        return self.line.wait(self.now)

    def run(self, endpoint: Endpoint, seconds: float = 10_000.0) -> None:
        """Work on the line until nothing is left, or the time is over."""
        end = self.now + seconds
        while self.line:
            wait = self.line.wait(self.now)
            if self.now + wait > end:
                self.now = end
                return
            self.now += max(wait, 0.0)
            self.attempt(endpoint)

    @property
    def times(self) -> list[float]:
        """When each attempt was made, in seconds from the start."""
        return [time for time, _ in self.attempts]

    @property
    def batches(self) -> list[list[bytes]]:
        """The events of each attempt."""
        return [events for _, events in self.attempts]


class TestPack:
    """Events are grouped into requests under the bound of bytes."""

    def test_all_go_into_one_parcel_that_fits(self) -> None:
        """Few events are one parcel, in order, with their sizes."""
        (parcel,) = pack([(b"1", 10), (b"22", 20)], 1000)

        assert ([b"1", b"22"], [10, 20]) == (parcel.events, parcel.holds)

    @pytest.mark.parametrize(("max_bytes", "parcels"), [(53, 1), (52, 2), (33, 2)])
    def test_the_bound_is_of_the_request(self, max_bytes, parcels) -> None:
        """Commas and the envelope count: a body is never larger than the bound."""
        events = [(b"x" * 20, 1), (b"y" * 19, 1)]
        packed = list(pack(events, max_bytes))

        assert parcels == len(packed)
        for parcel in packed:
            body = b'{"events":[' + b",".join(parcel.events) + b"]}"
            assert len(body) <= max_bytes

    def test_an_event_that_is_too_large_goes_alone(self) -> None:
        """What does not fit into any request is not held back."""
        packed = pack([(b"1", 1), (b"x" * 100, 1), (b"2", 1)], 50)

        assert [1, 1, 1] == [len(parcel) for parcel in packed]

    def test_a_request_has_a_thousand_events_at_most(self) -> None:
        """However small they are, the endpoint takes no more."""
        packed = pack(((event, 1) for event in numbered(2500)), 1_000_000)

        assert [1000, 1000, 500] == [len(parcel) for parcel in packed]

    def test_nothing_makes_no_parcel(self) -> None:
        """Without events there is no parcel."""
        assert [] == list(pack([], 1000))

    @given(st.lists(st.integers(1, 60)), st.integers(20, 200))
    def test_order_and_bound_hold_for_all(self, lengths, max_bytes) -> None:
        """No event is lost, moved or doubled, and no parcel is too large."""
        events = [(b"x" * n, i) for i, n in enumerate(lengths)]
        packed = list(pack(events, max_bytes))

        assert list(range(len(events))) == [s for p in packed for s in p.holds]
        for parcel in packed:
            body = b'{"events":[' + b",".join(parcel.events) + b"]}"
            assert len(parcel) == 1 or len(body) <= max_bytes


class TestTaken:
    """The endpoint took the batch."""

    def test_a_parcel_that_is_taken_is_delivered(self) -> None:
        """Its events are counted, and their places given back."""
        bench = Bench()
        bench.add(numbered(3))
        bench.run(lambda _: TAKEN)

        stats = bench.ledger.stats()
        assert (3, 0, True) == (stats.delivered, stats.pending, stats.is_balanced)
        assert [100, 100, 100] == bench.released
        assert not bench.line

    def test_parcels_go_in_order(self) -> None:
        """Each parcel is sent once, one after the other, without a wait."""
        bench = Bench()
        bench.add(numbered(2), numbered(2, 2), numbered(1, 4))
        bench.run(lambda _: TAKEN)

        assert numbered(5) == bench.taken
        assert [0.0, 0.0, 0.0] == bench.times

    def test_rejected_positions_are_counted_by_reason(self) -> None:
        """What a 202 rejects is not delivered, and not sent again."""
        bench = Bench()
        bench.add(numbered(5))
        answer = Answer(verdict=Verdict.TAKEN, rejected={1: "a", 3: "b", 4: "a"})
        bench.run(lambda _: answer)

        stats = bench.ledger.stats()
        assert (2, {"a": 2, "b": 1}) == (stats.delivered, stats.rejected)
        assert stats.is_balanced
        assert 1 == len(bench.attempts)

    def test_positions_outside_of_the_batch_are_ignored(self) -> None:
        """A transport that rejects what was not sent harms no count."""
        bench = Bench()
        bench.add(numbered(2))
        answer = Answer(verdict=Verdict.TAKEN, rejected={-1: "a", 2: "b", 1: "c"})
        bench.run(lambda _: answer)

        stats = bench.ledger.stats()
        assert (1, {"c": 1}) == (stats.delivered, stats.rejected)
        assert stats.is_balanced

    def test_a_rejection_is_told(self) -> None:
        """That events were rejected for good is noted, with the endpoint's reason."""
        bench = Bench()
        bench.add(numbered(1))
        answer = Answer(verdict=Verdict.TAKEN, rejected={0: "session.id: required"})
        bench.run(lambda _: answer)

        assert "session.id: required" in _diagnostics._notes["rejected"][1]


class TestRetry:
    """The same batch may be taken later."""

    def test_it_is_sent_again_with_growing_waits(self) -> None:
        """Waits double from half a second, up to half a minute."""
        bench = Bench()
        bench.add(numbered(1))
        bench.run(lambda _: RETRY, 100.0)

        expected = [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 61.5, 91.5]
        assert expected == bench.times
        assert 9 == bench.ledger.stats().retries

    def test_order_is_kept(self) -> None:
        """What comes after a parcel that waits, waits too."""
        bench = Bench()
        bench.add(numbered(2), numbered(2, 2))
        answers = iter([RETRY, RETRY, TAKEN, RETRY, TAKEN])
        bench.run(lambda _: next(answers))

        assert numbered(4) == bench.taken
        assert 5 == len(bench.attempts)

    def test_waits_are_short_again_once_something_was_taken(self) -> None:
        """A success ends the backoff."""
        bench = Bench()
        bench.add(numbered(1), numbered(1, 1))
        answers = iter([RETRY, RETRY, RETRY, TAKEN, RETRY, TAKEN])
        bench.run(lambda _: next(answers))

        assert [0.0, 0.5, 1.5, 3.5, 3.5, 4.0] == bench.times

    def test_the_endpoints_wish_is_a_minimum(self) -> None:
        """`Retry-After` is waited, and then some of the backoff."""
        bench = Bench()
        bench.add(numbered(1))
        wish = Answer(verdict=Verdict.RETRY, reason="429", retry_after=60.0)
        answers = iter([wish, RETRY, TAKEN])
        told = []

        def endpoint(events: Sequence[bytes]) -> Answer:
            told.append(bench.line.is_told_when)
            return next(answers)

        bench.run(endpoint)

        assert [0.0, 72.0, 73.0] == bench.times
        assert [False, True, False] == told

    def test_a_parcel_is_given_up_in_time(self) -> None:
        """`retry_for` after its first try it is tried once more, then dropped."""
        bench = Bench(retry_for=20.0)
        bench.add(numbered(3))
        bench.run(lambda _: RETRY)

        assert [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 20.0] == bench.times
        stats = bench.ledger.stats()
        assert {"retry_expired": 3} == stats.dropped
        assert stats.is_balanced
        level, text = _diagnostics._notes["retry_expired"]
        assert (40, True) == (level, "after 20 s" in text)

    def test_the_endpoints_wish_is_waited_beyond_the_end(self) -> None:
        """A `Retry-After` longer than `retry_for` is followed by one attempt."""
        bench = Bench(retry_for=20.0)
        bench.add(numbered(1))
        bench.run(lambda _: Answer(verdict=Verdict.RETRY, retry_after=60.0))

        assert [0.0, 72.0] == bench.times

    def test_each_parcel_has_its_own_time(self) -> None:
        """A parcel's time begins with its own first try."""
        bench = Bench(retry_for=20.0)
        bench.add(numbered(1), numbered(1, 1))
        bench.run(lambda _: RETRY, 30.0)

        assert {"retry_expired": 1} == bench.ledger.stats().dropped
        bench.run(lambda _: TAKEN)
        assert [b"1"] == bench.taken

    def test_a_dead_endpoint_is_not_stormed(self) -> None:
        """With no time for retries each is tried once, and the waits still grow."""
        bench = Bench(retry_for=0.0)
        bench.add(*([event] for event in numbered(10)))
        bench.run(lambda _: RETRY)

        assert [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5] == bench.times[:7]
        assert {"retry_expired": 10} == bench.ledger.stats().dropped

    def test_the_wait_lasts_beyond_an_empty_line(self) -> None:
        """What is added after all was given up waits for its turn like the others."""
        bench = Bench(retry_for=0.0)
        bench.add(numbered(1))
        bench.run(lambda _: RETRY)
        bench.add(numbered(1, 1))

        assert 0.5 == bench.line.wait(bench.now)

    def test_an_answer_ends_the_wait(self) -> None:
        """Tried before its time and answered, the rest does not wait any more."""
        bench = Bench()
        bench.add(numbered(4))
        waits = [bench.attempt(lambda _: RETRY), bench.attempt(lambda _: REFUSED)]

        assert [0.5, 0.0] == waits

    def test_a_failure_is_told_without_a_payload(self) -> None:
        """The line has the reason and how many wait, nothing of the events."""
        bench = Bench()
        bench.add([b"secret"] * 1234)
        bench.attempt(lambda _: RETRY)

        _, text = _diagnostics._notes["not delivered: retry"]
        assert "(503)" in text
        assert "1,234 wait" in text
        assert "secret" not in text


class TestHold:
    """A wrong key or address costs a warning, not the events."""

    def test_it_is_probed_slowly(self) -> None:
        """The same batch is tried with waits from 5 s up to a minute."""
        bench = Bench()
        bench.add(numbered(3))
        bench.run(lambda _: HOLD, 200.0)

        assert [0.0, 5.0, 15.0, 35.0, 75.0, 135.0, 195.0] == bench.times
        assert bench.ledger.stats().is_balanced
        assert 3 == bench.ledger.stats().pending

    def test_it_recovers(self) -> None:
        """Once the key is right, all are delivered in order."""
        bench = Bench()
        bench.add(numbered(3), numbered(3, 3))
        answers = iter([HOLD, HOLD, TAKEN, TAKEN])
        bench.run(lambda _: next(answers))

        assert numbered(6) == bench.taken

    def test_it_expires(self) -> None:
        """What stays refused for `retry_for` is given up."""
        bench = Bench(retry_for=60.0)
        bench.add(numbered(3))
        bench.run(lambda _: HOLD)

        assert {"retry_expired": 3} == bench.ledger.stats().dropped
        assert [0.0, 5.0, 15.0, 35.0, 60.0] == bench.times


class TestTooLarge:
    """A smaller batch may be taken."""

    def test_it_is_halved_until_it_fits(self) -> None:
        """Halves are sent in order, and nothing is lost."""
        bench = Bench()
        bench.add(numbered(10))
        bench.run(lambda events: TOO_LARGE if len(events) > 3 else TAKEN)

        assert numbered(10) == bench.taken
        assert [10, 5, 3, 2, 5, 3, 2] == [len(events) for events in bench.batches]

    def test_an_event_that_is_too_large_alone_is_dropped(self) -> None:
        """The single event is counted as `too_large`; the rest is taken."""
        bench = Bench()
        bench.add(numbered(8))
        bench.run(lambda events: TOO_LARGE if b"5" in events else TAKEN)

        assert [e for e in numbered(8) if e != b"5"] == bench.taken
        assert {"too_large": 1} == bench.ledger.stats().dropped
        assert bench.ledger.stats().is_balanced
        assert "stats().dropped['too_large']" in _diagnostics._notes["too_large"][1]

    def test_halving_has_no_budget(self) -> None:
        """A thousand events are delivered one by one, if the endpoint wants it so."""
        bench = Bench()
        bench.add(numbered(1000))
        bench.run(lambda events: TOO_LARGE if len(events) > 1 else TAKEN)

        assert numbered(1000) == bench.taken

    def test_the_time_to_retry_is_inherited(self) -> None:
        """Halving does not start the time of `retry_for` anew."""
        bench = Bench(retry_for=10.0)
        bench.add(numbered(2))
        answers = iter([RETRY, TOO_LARGE])
        bench.run(lambda _: next(answers, RETRY))

        assert {"retry_expired": 2} == bench.ledger.stats().dropped
        assert 10.0 == bench.now - 1000.0


class TestRejected:
    """What is refused for good is not sent again, whole or in parts."""

    def test_a_batch_is_rejected_whole(self) -> None:
        """All its events are counted by the reason, and the next batch follows."""
        bench = Bench()
        bench.add(numbered(3), numbered(2, 3))
        answers = iter([REJECTED, TAKEN])

        bench.run(lambda _: next(answers))

        stats = bench.ledger.stats()
        assert ({"500 no": 3}, 2) == (stats.rejected, stats.delivered)
        assert [numbered(3), numbered(2, 3)] == bench.batches
        assert (0, True) == (stats.pending, stats.is_balanced)


class TestLost:
    """The endpoint is gone for good."""

    def test_what_cannot_succeed_is_dropped(self) -> None:
        """A closed stream costs its events, counted, and no further attempt."""
        bench = Bench()
        bench.add(numbered(3))
        bench.run(lambda _: LOST)

        assert {"endpoint_lost": 3} == bench.ledger.stats().dropped
        assert 1 == len(bench.attempts)
        assert "closed" in _diagnostics._notes["endpoint_lost"][1]


class TestPoison:
    """A refusal does not say which event is at fault: halving does."""

    @pytest.mark.parametrize("size", [1, 2, 3, 50])
    def test_a_lone_event_that_is_refused_is_rejected(self, size) -> None:
        """One bad event, among good ones or alone, is rejected at once."""
        bench = Bench()
        bench.add(numbered(size))
        bench.run(poisoned(size // 2))

        stats = bench.ledger.stats()
        assert {"400 bad": 1} == stats.rejected
        assert [e for e in numbered(size) if e != b"%d" % (size // 2)] == bench.taken
        assert 0.0 == bench.times[-1]
        assert stats.is_balanced

    @pytest.mark.parametrize(
        "poison",
        [
            {0},
            {49},
            {0, 49},
            {3, 4},
            set(range(0, 50, 7)),
            set(range(0, 50, 2)),
            set(range(10, 30)),
            set(range(30)),
            set(range(20, 50)),
            set(range(49)),
        ],
        ids=lambda poison: f"{len(poison)} from {min(poison)}",
    )
    def test_each_bad_event_is_found(self, poison) -> None:
        """However many are bad and wherever they are, they alone are rejected."""
        bench = Bench()
        bench.add(numbered(50))
        bench.run(poisoned(*poison), 30.0)

        stats = bench.ledger.stats()
        assert {"400 bad": len(poison)} == stats.rejected
        assert {b"%d" % i for i in range(50) if i not in poison} == set(bench.taken)
        assert 1 == max(Counter(bench.taken).values())
        assert stats.is_balanced
        assert len(bench.attempts) <= 2 * 50 + 10

    def test_the_search_has_a_budget(self) -> None:
        """With more bad events than splits, the rest of a parcel is rejected whole."""
        bench = Bench()
        bench.add(numbered(1000))
        bench.run(poisoned(*range(1, 1000, 2)))

        stats = bench.ledger.stats()
        assert len(bench.attempts) <= 2 * 256 + 1
        assert {"400 bad", "400 bad (not isolated)"} == set(stats.rejected)
        assert stats.is_balanced
        assert not bench.line

    def test_the_budget_is_new_for_each_line(self) -> None:
        """A search that used up its budget leaves the next one its own."""
        bench = Bench()
        bench.add(numbered(1000))
        bench.run(poisoned(*range(1, 1000, 2)))
        before = bench.ledger.stats().rejected["400 bad (not isolated)"]
        bench.add(numbered(50, 2000))
        bench.run(poisoned(2025))

        assert before == bench.ledger.stats().rejected["400 bad (not isolated)"]
        assert set(numbered(50, 2000)) - {b"2025"} <= set(bench.taken)

    def test_a_search_waits_where_the_endpoint_fails(self) -> None:
        """A failure in the middle of a search is waited out, and the search goes on."""
        bench = Bench()
        bench.add(numbered(8))
        count = iter(range(1000))

        def endpoint(events: Sequence[bytes]) -> Answer:
            return RETRY if next(count) % 3 == 1 else poisoned(5)(events)

        bench.run(endpoint)

        assert {"400 bad": 1} == bench.ledger.stats().rejected
        assert [e for e in numbered(8) if e != b"5"] == bench.taken

    def test_suspects_do_not_stay_behind(self) -> None:
        """With the last parcel dropped, those refused before it come to an end."""
        bench = Bench()
        bench.add(numbered(1), numbered(1, 1))
        answers = iter([REFUSED, LOST])
        bench.run(lambda _: next(answers))

        stats = bench.ledger.stats()
        assert ({"400 bad": 1}, {"endpoint_lost": 1}) == (stats.rejected, stats.dropped)
        assert not bench.line

    @given(
        st.integers(1, 60).flatmap(
            lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))
        )
    )
    def test_none_is_lost_or_doubled(self, case) -> None:
        """Whatever is bad: the others are taken once, with a good one to ask with."""
        size, poison = case
        bench = Bench()
        bench.add(numbered(size))
        bench.run(poisoned(*poison), 0.0)
        bench.add(numbered(1, size))
        bench.run(poisoned(*poison), 10.0)

        good = {b"%d" % i for i in range(size + 1) if i not in poison}
        assert sorted(good) == sorted(bench.taken)
        stats = bench.ledger.stats()
        assert stats.is_balanced
        assert len(poison) == sum(stats.rejected.values())


class TestRefusedAll:
    """An endpoint that refuses everything is at fault itself."""

    def test_the_events_are_kept(self) -> None:
        """A few refusals in a row end the search; nothing is rejected."""
        bench = Bench()
        bench.add(numbered(1000))
        bench.run(lambda _: REFUSED, 100.0)

        stats = bench.ledger.stats()
        assert ({}, 1000) == (stats.rejected, stats.pending)
        assert bench.line.is_refused

    def test_it_is_not_stormed(self) -> None:
        """After the search it is asked as slowly as with a wrong key."""
        bench = Bench()
        bench.add(numbered(1000))
        bench.run(lambda _: REFUSED, 200.0)

        at_once = [time for time in bench.times if time == 0.0]
        assert len(at_once) <= 25
        assert [5.0, 15.0, 35.0, 75.0, 135.0, 195.0] == bench.times[len(at_once) :]

    def test_it_heals(self) -> None:
        """When it takes one again, all that were kept are delivered."""
        bench = Bench()
        bench.add(numbered(1000))
        bench.run(lambda _: REFUSED, 60.0)
        bench.run(lambda _: TAKEN, 20.0)

        stats = bench.ledger.stats()
        assert (1000, {}) == (stats.delivered, stats.rejected)
        assert sorted(numbered(1000)) == sorted(bench.taken)
        assert not bench.line.is_refused

    def test_only_what_was_asked_with_overtakes(self) -> None:
        """Once healed, the order is as emitted, but for the events asked with."""
        bench = Bench()
        bench.add(numbered(100))
        bench.run(lambda _: REFUSED, 60.0)
        bench.now += 60.0
        bench.attempt(lambda _: TAKEN)
        asked = {events[0] for events in bench.batches if len(events) == 1}
        bench.run(lambda _: TAKEN)

        rest = [event for event in bench.taken if event not in asked]
        assert numbered(5) == bench.taken[1:6]
        assert [event for event in numbered(100) if event not in asked] == rest
        assert len(asked) <= 12

    def test_the_events_expire(self) -> None:
        """What is refused for all of `retry_for` is given up, not rejected."""
        bench = Bench(retry_for=60.0)
        bench.add(numbered(20))
        bench.run(lambda _: REFUSED)

        stats = bench.ledger.stats()
        assert ({}, {"retry_expired": 20}) == (stats.rejected, stats.dropped)
        assert stats.is_balanced
        assert not bench.line

    def test_what_was_taken_before_is_no_excuse(self) -> None:
        """An endpoint that took the last line, and refuses this one, is at fault."""
        bench = Bench()
        bench.add(numbered(5))
        bench.run(lambda _: TAKEN)
        bench.add(numbered(50, 5))
        bench.run(lambda _: REFUSED, 100.0)

        stats = bench.ledger.stats()
        assert ({}, 50) == (stats.rejected, stats.pending)

    def test_what_was_taken_before_a_wait_is_no_excuse(self) -> None:
        """Nor is one that took a part of the line, failed, and refuses what is left."""
        bench = Bench()
        bench.add(numbered(5), numbered(50, 5))
        answers = iter([TAKEN, RETRY])
        bench.run(lambda _: next(answers, REFUSED), 100.0)

        stats = bench.ledger.stats()
        assert ({}, 50) == (stats.rejected, stats.pending)

    def test_refusals_count_over_several_lines(self) -> None:
        """With few events at a time the first four are rejected, then all is kept."""
        bench = Bench()
        for event in numbered(10):
            bench.add([event])
            bench.run(lambda _: REFUSED, 0.0)

        stats = bench.ledger.stats()
        assert (4, 6) == (sum(stats.rejected.values()), stats.pending)

    def test_one_taken_in_between_starts_the_count_anew(self) -> None:
        """Bad events among good ones do not make an endpoint one that refuses all."""
        bench = Bench()
        for i in range(0, 40, 2):
            bench.add(numbered(1, i), numbered(1, i + 1))
            bench.run(poisoned(*range(0, 40, 2)), 0.0)

        stats = bench.ledger.stats()
        assert (20, {"400 bad": 20}) == (stats.delivered, stats.rejected)
        assert 40 == len(bench.attempts)

    def test_a_new_event_is_asked_with(self) -> None:
        """What was added last is tried; if it is taken, the refused ones are bad."""
        bench = Bench()
        bench.add(numbered(8))
        bench.run(poisoned(*range(8)), 3.0)
        bench.add(numbered(1, 8))
        bench.run(poisoned(*range(8)), 10.0)

        stats = bench.ledger.stats()
        assert ([b"8"], {"400 bad": 8}) == (bench.taken, stats.rejected)
        assert not bench.line

    def test_the_same_event_is_asked_with_while_nobody_answers(self) -> None:
        """A failure on the way is no refusal: the line stays in one piece."""
        bench = Bench()
        bench.add(numbered(50))
        bench.run(lambda _: REFUSED, 0.0)
        before = len(bench.attempts)
        bench.run(lambda _: RETRY, 60.0)

        assert 1 == len({tuple(events) for events in bench.batches[before:]})

    def test_the_suspects_are_asked_with_where_there_is_nothing_else(self) -> None:
        """With no other event left the refused ones are tried in turn."""
        bench = Bench()
        bench.add(numbered(5))
        bench.run(lambda _: REFUSED, 30.0)

        singles = [events[0] for events in bench.batches if len(events) == 1]
        assert [*numbered(5), b"0", b"1", b"2"] == singles[:8]

    def test_taken_but_rejected_proves_nothing(self) -> None:
        """A 202 that rejects the event asked with does not end the waiting."""
        bench = Bench()
        bench.add(numbered(20))
        bench.run(lambda _: REFUSED, 0.0)
        bench.now += 10.0
        bench.attempt(lambda _: Answer(verdict=Verdict.TAKEN, rejected={0: "bad"}))

        assert bench.line.is_refused
        assert bench.ledger.stats().is_balanced

    def test_refused_again_after_it_healed(self) -> None:
        """What is refused twice, with another event taken in between, is rejected."""
        bench = Bench()
        bench.add(numbered(20))
        bench.run(lambda _: REFUSED, 12.0)
        bench.run(poisoned(3), 20.0)

        stats = bench.ledger.stats()
        assert ({"400 bad": 1}, 19) == (stats.rejected, stats.delivered)


class TestGivingUp:
    """The end of the process."""

    def test_all_is_dropped_by_the_reason_given(self) -> None:
        """Parcels and suspects are dropped and counted, and their places given back."""
        bench = Bench()
        bench.add(numbered(3), numbered(1, 3))
        bench.run(lambda _: REFUSED, 0.0)
        bench.add(numbered(2, 4))
        bench.line.give_up("shutdown")

        stats = bench.ledger.stats()
        assert stats.emitted == stats.dropped["shutdown"] + stats.rejected.get(
            "400 bad", 0
        )
        assert stats.is_balanced
        assert not bench.line


class TestOnDisk:
    """Parcels that rest on disk as well: memory is free, and the file waits."""

    def test_with_the_last_event_the_file_has_served(self) -> None:
        """What is taken moves from `spooled` to `delivered`, event by event."""
        bench = Bench()
        file = bench.add_file(numbered(3))
        bench.run(lambda _: Answer(verdict=Verdict.TAKEN, rejected={1: "bad"}))

        stats = bench.ledger.stats()
        assert (2, {"bad": 1}, 0) == (stats.delivered, stats.rejected, stats.spooled)
        assert stats.is_balanced
        assert 0 == file.left
        assert [] == bench.released

    @pytest.mark.parametrize(
        "endpoint",
        [
            lambda events: TOO_LARGE if len(events) > 3 else TAKEN,
            lambda events: TOO_LARGE if b"5" in events else TAKEN,
            poisoned(5),
            poisoned(*range(1, 100, 2)),
            poisoned(*range(100)),
            lambda _: REJECTED,
            lambda _: LOST,
        ],
        ids=["halved", "one large", "one bad", "half", "all", "rejected", "lost"],
    )
    def test_each_event_leaves_its_file_once(self, endpoint) -> None:
        """However parcels are split and whatever their end: the file is told once."""
        bench = Bench()
        file = bench.add_file(numbered(100), 150)
        bench.run(endpoint, 0.0)
        bench.run(poisoned(*range(10)), 60.0)

        stats = bench.ledger.stats()
        assert (0, 0, True) == (file.left, stats.spooled, stats.is_balanced)
        assert 1 == max([1, *Counter(bench.taken).values()])

    def test_the_search_may_run_out_of_its_budget(self) -> None:
        """What is rejected whole leaves the file as well."""
        bench = Bench()
        file = bench.add_file(numbered(1000))
        bench.run(poisoned(*range(1, 1000, 2)))

        stats = bench.ledger.stats()
        assert stats.rejected["400 bad (not isolated)"] > 0
        assert (0, 0, True) == (file.left, stats.spooled, stats.is_balanced)

    def test_retries_go_on(self) -> None:
        """`retry_for` is for what is in memory alone; a file has its own age."""
        bench = Bench(retry_for=20.0)
        file = bench.add_file(numbered(3))
        bench.add(numbered(2, 3))
        bench.run(lambda _: RETRY, 10.0)
        bench.run(lambda _: RETRY, 10_000.0)
        before = bench.ledger.stats()
        bench.run(lambda _: TAKEN, 60.0)

        assert ({}, 3, 2) == (before.dropped, before.spooled, before.pending)
        assert (numbered(5), 0) == (bench.taken, file.left)

    def test_a_file_does_not_shorten_the_wait(self) -> None:
        """One last attempt before `retry_for` ends is for what is in memory."""
        bench = Bench(retry_for=2.0)
        bench.add_file(numbered(3))
        bench.run(lambda _: RETRY, 100.0)

        expected = [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 61.5, 91.5]
        assert expected == bench.times

    def test_what_was_tried_and_rests_now_is_not_given_up(self) -> None:
        """A parcel that came to rest lives by the age of its file."""
        bench = Bench(retry_for=20.0)
        bench.add(numbered(3))
        bench.attempt(lambda _: RETRY)
        file = bench.rest()
        bench.run(lambda _: RETRY, 100.0)

        assert ({}, 3) == (bench.ledger.stats().dropped, file.left)

    def test_a_file_expires(self) -> None:
        """A failure finds what has become too old: `spool_expired`, and no other."""
        bench = Bench()
        old, young = bench.add_file(numbered(3)), bench.add_file(numbered(2, 3))
        old.is_expired = True
        bench.attempt(lambda _: RETRY)

        stats = bench.ledger.stats()
        assert ({"spool_expired": 3}, 2) == (stats.dropped, stats.spooled)
        assert (0, 2, True) == (old.left, young.left, stats.is_balanced)
        bench.run(lambda _: TAKEN)
        assert numbered(2, 3) == bench.taken

    def test_a_parcel_of_several_files_is_as_old_as_the_youngest(self) -> None:
        """Events of small files go together; each is released by its own."""
        bench = Bench()
        files = [File(bench.ledger, 2), File(bench.ledger, 3)]
        bench.ledger.recovered.add(5)
        bench.ledger.spooled.add(5)
        pairs: list[Any] = [(b"0", files[0]), (b"1", files[0])]
        pairs += [(event, files[1]) for event in numbered(3, 2)]
        bench.line.extend(pack(pairs, 1000))
        files[0].is_expired = True
        bench.attempt(lambda _: RETRY)
        bench.attempt(lambda events: TOO_LARGE if len(events) > 3 else TAKEN)
        bench.attempt(lambda _: TAKEN)

        assert ([0, 2], numbered(3)) == ([file.left for file in files], bench.taken)
        left: dict[Any, list[bytes]] = {files[1]: numbered(2, 3)}
        assert left == bench.line.on_disk()

    def test_suspects_expire_with_their_file(self) -> None:
        """An event put aside as too old for its file is dropped once."""
        bench = Bench()
        file = bench.add_file(numbered(20))
        bench.run(lambda _: REFUSED, 0.0)
        file.is_expired = True
        bench.now += 10.0
        bench.attempt(lambda _: REFUSED)

        stats = bench.ledger.stats()
        assert ({"spool_expired": 20}, 0) == (stats.dropped, file.left)
        assert stats.is_balanced

    def test_resting_gives_the_memory_back_once(self) -> None:
        """Holds are released as the file is there, and not again at the end."""
        bench = Bench()
        bench.add(numbered(3), numbered(2, 3))
        file = bench.rest()
        released, pending = list(bench.released), bench.ledger.pending.value
        bench.run(lambda _: TAKEN)

        assert ([100] * 5, 0) == (released, pending)
        assert ([100] * 5, 0) == (bench.released, file.left)
        assert bench.ledger.stats().is_balanced

    def test_only_what_is_in_memory_comes_to_rest(self) -> None:
        """What has a file keeps it; the others are those that are to be written."""
        bench = Bench()
        first = bench.add_file(numbered(3))
        bench.add(numbered(2, 3))
        in_memory = bench.line.in_memory
        second = bench.rest()

        assert numbered(2, 3) == in_memory
        assert {first: numbered(3), second: numbered(2, 3)} == bench.line.on_disk()
        assert [] == bench.line.in_memory

    def test_suspects_come_to_rest_first(self) -> None:
        """What was put aside is older than what is left, and is not forgotten."""
        bench = Bench()
        bench.add(numbered(1), numbered(1, 1), numbered(3, 2))
        bench.attempt(lambda _: REFUSED)
        bench.attempt(lambda _: REFUSED)
        in_memory = bench.line.in_memory
        file = bench.rest()
        bench.run(poisoned(0))

        assert numbered(5) == in_memory
        stats = bench.ledger.stats()
        assert ({"400 bad": 2}, 3, 0) == (stats.rejected, stats.delivered, file.left)

    def test_what_has_ended_is_not_listed(self) -> None:
        """`on_disk` has what is left of each file, in order."""
        bench = Bench()
        first, second = bench.add_file(numbered(8)), bench.add_file(numbered(2, 8))
        answers = iter([TOO_LARGE, TAKEN])
        bench.attempt(lambda _: next(answers))
        bench.attempt(lambda _: next(answers))

        left = {first: numbered(4, 4), second: numbered(2, 8)}
        assert left == bench.line.on_disk()

    def test_giving_up_leaves_files_alone(self) -> None:
        """At the end of the process, what rests on disk is still `spooled`."""
        bench = Bench()
        file = bench.add_file(numbered(3))
        bench.add(numbered(2, 3))
        bench.line.give_up("shutdown")

        stats = bench.ledger.stats()
        assert ({"shutdown": 2}, 3, 3) == (stats.dropped, stats.spooled, file.left)
        assert (0, True) == (stats.pending, stats.is_balanced)
        assert not bench.line

    def test_the_line_tells_how_many_wait(self) -> None:
        """The log has those in memory and those on disk together."""
        bench = Bench()
        bench.add_file(numbered(1000))
        bench.add(numbered(234))
        bench.attempt(lambda _: RETRY)

        assert "1,234 wait" in _diagnostics._notes["not delivered: retry"][1]

    @given(
        st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=5),
        st.lists(
            st.sampled_from(["rest", RETRY, HOLD, TOO_LARGE, REFUSED, LOST, REJECTED])
        ),
        st.sets(st.integers(0, 60)),
    )
    def test_none_is_lost_or_doubled(self, batches, acts, poison) -> None:
        """Whenever parcels come to rest, and whatever is answered, the sum is right."""
        bench = Bench(retry_for=15.0)
        files: list[File] = []
        count = 0
        for size, is_file in batches:
            if is_file:
                files.append(bench.add_file(numbered(size, count)))
            else:
                bench.add(numbered(size, count))
            count += size
        for act in acts:
            if isinstance(act, Answer) and bench.line:
                bench.now += max(bench.line.wait(bench.now), 0.0)
                bench.attempt(lambda _, answer=act: answer)  # type: ignore[misc]
            elif bench.line.in_memory:
                files.append(bench.rest())
            assert bench.ledger.stats().is_balanced
        bench.run(poisoned(*poison), 100.0)
        bench.add(numbered(1, 1000))
        bench.run(poisoned(*poison), 1000.0)

        stats = bench.ledger.stats()
        assert (0, 0, True) == (stats.pending, stats.spooled, stats.is_balanced)
        assert {0} == {0, *(file.left for file in files)}
        assert 1 == max(Counter(bench.taken).values())


class TestBreaker:
    """An endpoint that is down is asked with little, and not often."""

    def test_the_probe_is_small(self) -> None:
        """After three failures in a row a large batch is not sent in vain again."""
        bench = Bench(probe_size=50)
        bench.add(numbered(200))
        bench.run(lambda _: RETRY, 20.0)

        assert [200, 200, 200, 50, 50, 50] == [len(events) for events in bench.batches]
        assert numbered(50) == bench.batches[-1]

    def test_a_small_batch_stays_whole(self) -> None:
        """What is no larger than the probe goes as it is."""
        bench = Bench(probe_size=50)
        bench.add(numbered(50))
        bench.run(lambda _: RETRY, 20.0)

        assert {50} == {len(events) for events in bench.batches}

    def test_once_it_answers_all_goes_on(self) -> None:
        """After the probe was taken, the rest goes in one piece, in order."""
        bench = Bench(probe_size=50)
        bench.add(numbered(200), numbered(200, 200))
        bench.run(lambda _: RETRY, 20.0)
        before = len(bench.attempts)
        bench.run(lambda _: TAKEN)

        sizes = [len(events) for events in bench.batches[before:]]
        assert [50, 150, 200] == sizes
        assert numbered(400) == bench.taken

    def test_a_probe_keeps_the_time_of_its_parcel(self) -> None:
        """What was split off the probe is given up with it."""
        bench = Bench(retry_for=20.0, probe_size=50)
        bench.add(numbered(200))
        bench.run(lambda _: RETRY)

        assert {"retry_expired": 200} == bench.ledger.stats().dropped
        assert 20.0 == bench.times[-1]

    def test_a_probe_of_a_file_stays_in_it(self) -> None:
        """A file is not done before the rest of it is."""
        bench = Bench(probe_size=50)
        file = bench.add_file(numbered(200))
        bench.run(lambda _: RETRY, 20.0)
        bench.attempt(lambda _: TAKEN)
        left = file.left
        bench.run(lambda _: TAKEN)

        assert (150, 0) == (left, file.left)

    def test_one_that_refuses_everything_is_asked_with_one(self) -> None:
        """Single events are the best to ask with where all are refused."""
        bench = Bench(probe_size=2)
        bench.add(numbered(100))
        bench.run(lambda _: REFUSED, 100.0)

        late = [events for time, events in bench.attempts if time > 0.0]
        assert {1} == {len(events) for events in late}

    @pytest.mark.parametrize("answer", [RETRY, HOLD], ids=["retry", "hold"])
    def test_whoever_is_in_a_hurry_is_served_at_first(self, answer) -> None:
        """One or two failures do not make an endpoint one that is down."""
        bench = Bench()
        bench.add(numbered(1))
        hurried = []
        for _ in range(2):
            bench.attempt(lambda _: answer)
            hurried.append(bench.line.wait(bench.now, is_hurried=True))

        assert [0.0, 0.0] == hurried
        assert bench.line.wait(bench.now) > 0.5

    @pytest.mark.parametrize("answer", [RETRY, HOLD], ids=["retry", "hold"])
    def test_then_once_a_second(self, answer) -> None:
        """From the third failure on, hurry is honoured a second after the last try."""
        bench = Bench()
        bench.add(numbered(1))
        for _ in range(3):
            bench.attempt(lambda _: answer)
        at_once = bench.line.wait(bench.now, is_hurried=True)
        bench.now += 0.75
        later = bench.line.wait(bench.now, is_hurried=True)
        bench.now += 0.25
        at_last = bench.line.wait(bench.now, is_hurried=True)
        bench.attempt(lambda _: answer)
        again = bench.line.wait(bench.now, is_hurried=True)

        assert [1.0, 0.25, 0.0, 1.0] == [at_once, later, at_last, again]

    def test_a_hurry_makes_no_wait_longer(self) -> None:
        """What is due earlier than that is due."""
        bench = Bench(jitter=0.125)
        bench.add(numbered(1))
        for _ in range(3):
            bench.attempt(lambda _: RETRY)

        assert 0.25 == bench.line.wait(bench.now, is_hurried=True)

    def test_an_answer_ends_the_caution(self) -> None:
        """Once something was taken, a hurry is honoured at once again."""
        bench = Bench()
        bench.add(numbered(1), numbered(1, 1))
        for _ in range(5):
            bench.attempt(lambda _: RETRY)
        bench.attempt(lambda _: TAKEN)
        bench.attempt(lambda _: RETRY)

        assert 0.0 == bench.line.wait(bench.now, is_hurried=True)

    @pytest.mark.parametrize("failures", [1, 5])
    def test_the_endpoints_wish_wins(self, failures) -> None:
        """A time that the endpoint named is kept, whoever is in a hurry."""
        bench = Bench()
        bench.add(numbered(1))
        wish = Answer(verdict=Verdict.RETRY, reason="429", retry_after=60.0)
        for _ in range(failures):
            bench.attempt(lambda _: wish)
        bench.now += 30.0

        assert bench.line.wait(bench.now, is_hurried=True) > 30.0
