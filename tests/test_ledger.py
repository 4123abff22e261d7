"""The ledger: each event in exactly one counter, however many count at once."""

from __future__ import annotations

import copy
import pickle
import sys
from datetime import datetime, timezone
from typing import get_args

import pytest

from harness import start_together
from pgtrack._ledger import AdjustedReason, DropReason, Ledger, Stats, Tally


@pytest.fixture(name="busy")
def _busy():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestTally:
    """A counter without a lock."""

    def test_it_counts_from_zero_and_returns_the_new_value(self) -> None:
        """Any amount may be added, and adding tells the new value."""
        tally = Tally()

        assert [1, 43, 40] == [tally.add(1), tally.add(42), tally.add(-3)]
        assert 40 == tally.value

    def test_it_does_not_go_below_zero(self) -> None:
        """More taken away than there is leaves nothing, to count on from."""
        tally = Tally()
        tally.add(-5)

        assert 1 == tally.add(1)

    def test_it_counts_bytes_by_the_terabyte(self) -> None:
        """A large value costs no memory and is exact."""
        tally = Tally()
        tally.add(2**50)

        assert 2**50 + 1 == tally.add(1)

    def test_it_can_be_reset(self) -> None:
        """After a reset it is as new."""
        tally = Tally()
        tally.add(7)
        tally.reset()

        assert 0 == tally.value
        assert "<Tally 0>" == repr(tally)

    def test_no_count_of_any_thread_is_lost(self, busy) -> None:
        """Threads that count at once get different values, up to their total."""
        tally = Tally()
        values = start_together(8, lambda _: [tally.add(1) for _ in range(5000)])

        assert 40_000 == tally.value
        assert set(range(1, 40_001)) == {value for each in values for value in each}

    def test_threads_that_count_up_and_down_come_out_even(self, busy) -> None:
        """What is added and taken away by many threads comes to zero."""
        tally = Tally()
        tally.add(1_000_000)  # never below zero on the way

        def act(i: int) -> None:
            for _ in range(5000):
                tally.add(i + 1)
                tally.add(-i - 1)

        start_together(8, act)

        assert 1_000_000 == tally.value


class TestLedger:
    """The counters of one client."""

    def test_a_new_ledger_is_empty(self) -> None:
        """Nothing has happened yet, and reasons without events are left out."""
        assert Stats() == Ledger().stats()
        assert Ledger().stats().is_balanced

    @pytest.mark.parametrize("reason", get_args(DropReason))
    def test_drops_are_counted_by_reason(self, reason) -> None:
        """Each reason has its count, one event or many at once."""
        ledger = Ledger()
        ledger.drop(reason)
        ledger.drop(reason, 4)

        assert {reason: 5} == ledger.stats().dropped

    @pytest.mark.parametrize("reason", get_args(AdjustedReason))
    def test_adjustments_are_counted_by_reason(self, reason) -> None:
        """What went on but not as given is counted, outside of the equation."""
        ledger = Ledger()
        ledger.adjust(reason)

        assert {reason: 1} == ledger.stats().adjusted
        assert ledger.stats().is_balanced

    def test_rejections_are_counted_by_the_endpoints_reason(self) -> None:
        """Rejections of the same reason are one entry."""
        ledger = Ledger()
        for reason in ("session.id: required", "bad", "session.id: required"):
            ledger.reject(reason)

        assert {"session.id: required": 2, "bad": 1} == ledger.stats().rejected

    def test_reasons_of_the_endpoint_are_bounded(self) -> None:
        """Fifty reasons are told apart; all further ones are `other`, none is lost."""
        ledger = Ledger()
        for i in range(60):
            ledger.reject(f"reason {i}")
        ledger.reject("reason 0")

        rejected = ledger.stats().rejected
        assert (51, 10, 2) == (len(rejected), rejected["other"], rejected["reason 0"])
        assert 61 == sum(rejected.values())

    def test_stats_have_every_counter(self) -> None:
        """What was counted is what stats say, under the names of the promise."""
        ledger = Ledger()
        ledger.emitted.add(9)
        ledger.recovered.add(6)
        ledger.delivered.add(4)
        ledger.spooled.add(6)
        ledger.pending.add(2)
        ledger.reject("bad")
        ledger.drop("queue_full", 2)
        ledger.batches.add(1)
        ledger.retries.add(3)
        ledger.sent_bytes.add(100)
        ledger.spool_errors.add(5)
        ledger.last_error = "503"
        ledger.last_success_ns = 1_772_439_300_500_000_000

        stats = ledger.stats()
        expected = Stats(
            emitted=9,
            recovered=6,
            delivered=4,
            spooled=6,
            pending=2,
            rejected={"bad": 1},
            dropped={"queue_full": 2},
            batches=1,
            retries=3,
            sent_bytes=100,
            spool_errors=5,
            last_error="503",
            last_success=datetime(2026, 3, 2, 8, 15, 0, 500_000, tzinfo=timezone.utc),
        )
        assert expected == stats
        assert stats.is_balanced

    def test_stats_are_of_their_moment(self) -> None:
        """Stats do not change with the ledger, and cannot be changed."""
        ledger = Ledger()
        ledger.drop("closed")
        stats = ledger.stats()
        ledger.drop("closed")

        assert {"closed": 1} == stats.dropped
        with pytest.raises(TypeError):
            stats.dropped["closed"] = 0  # type: ignore[index]
        with pytest.raises(AttributeError):
            stats.emitted = 1  # type: ignore[misc]

    def test_a_child_starts_from_zero(self) -> None:
        """After a reset the ledger is as new."""
        ledger = Ledger()
        for counter in vars(ledger).values():
            if isinstance(counter, Tally):
                counter.add(1)
        ledger.drop("closed")
        ledger.adjust("field")
        ledger.reject("bad")
        ledger.last_error = "503"
        ledger.last_success_ns = 1
        ledger.reset()

        assert Stats() == ledger.stats()

    def test_counting_from_many_threads_is_exact(self, busy) -> None:
        """Nothing is lost when all reasons are counted by all threads at once."""
        ledger = Ledger()
        reasons: tuple[DropReason, ...] = get_args(DropReason)

        def act(i: int) -> None:
            for reason in reasons:
                for _ in range(200):
                    ledger.emitted.add(1)
                    ledger.drop(reason)

        start_together(8, act)

        assert dict.fromkeys(reasons, 1600) == ledger.stats().dropped
        assert ledger.stats().is_balanced

    def test_stats_are_never_off_by_more_than_what_is_moving(self, busy) -> None:
        """Read in the middle, the two sides differ by those on their way at most."""
        ledger = Ledger()
        ledger.emitted.add(20_000)
        ledger.pending.add(20_000)
        differences: list[int] = []

        def act(i: int) -> None:
            if i == 0:
                while ledger.pending.value:
                    moved = ledger.delivered.value
                    stats = ledger.stats()
                    moved = ledger.delivered.value - moved
                    held = stats.delivered + stats.pending
                    differences.append(abs(stats.emitted - held) - moved)
            else:
                for _ in range(20_000):
                    ledger.delivered.add(1)
                    ledger.pending.add(-1)

        start_together(2, act)

        assert max(differences, default=0) <= 1
        assert ledger.stats().is_balanced


class TestStats:
    """The ledger at one moment."""

    @pytest.mark.parametrize(
        ("counts", "is_balanced"),
        [
            ({}, True),
            ({"emitted": 1}, False),
            ({"emitted": 1, "pending": 1}, True),
            ({"recovered": 2, "spooled": 2}, True),
            ({"recovered": 2, "spooled": 1}, False),
            ({"emitted": 1, "spooled": 1, "spool_errors": 3}, True),
            ({"emitted": 1, "recovered": 1, "delivered": 1, "spooled": 1}, True),
            ({"emitted": 3, "rejected": {"a": 1, "b": 2}}, True),
            ({"emitted": 3, "dropped": {"closed": 2}, "delivered": 1}, True),
            ({"emitted": 3, "dropped": {"closed": 2}, "delivered": 2}, False),
        ],
    )
    def test_the_equation(self, counts, is_balanced) -> None:
        """What began equals what ended, rests or waits."""
        assert is_balanced == Stats(**counts).is_balanced

    def test_two_ledgers_can_be_added(self) -> None:
        """The sum of two clients has each count summed, and the later success."""
        early = datetime(2026, 1, 1, tzinfo=timezone.utc)
        late = datetime(2026, 1, 2, tzinfo=timezone.utc)
        one = Stats(
            emitted=1,
            recovered=2,
            delivered=3,
            rejected={"a": 1},
            dropped={"closed": 1},
            spooled=4,
            pending=5,
            adjusted={"field": 1},
            batches=6,
            retries=7,
            sent_bytes=8,
            spool_errors=9,
            last_error="one",
            last_success=late,
        )
        two = Stats(
            emitted=1,
            recovered=10,
            rejected={"a": 1, "b": 1},
            spooled=20,
            spool_errors=30,
            last_success=early,
        )

        expected = Stats(
            emitted=2,
            recovered=12,
            delivered=3,
            rejected={"a": 2, "b": 1},
            dropped={"closed": 1},
            spooled=24,
            pending=5,
            adjusted={"field": 1},
            batches=6,
            retries=7,
            sent_bytes=8,
            spool_errors=39,
            last_error="one",
            last_success=late,
        )
        assert expected == one + two

    def test_only_ledgers_can_be_added(self) -> None:
        """Anything else is Python's own TypeError."""
        with pytest.raises(TypeError):
            Stats() + 1  # type: ignore[operator]

    def test_a_child_can_report_it(self) -> None:
        """Stats pickle and copy, and stay what they are."""
        ledger = Ledger()
        ledger.emitted.add(1)
        ledger.recovered.add(2)
        ledger.spooled.add(2)
        ledger.spool_errors.add(3)
        ledger.drop("closed")
        stats = ledger.stats()

        assert stats == pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats)

    def test_it_reads_well(self) -> None:
        """The representation shows the counts as plain dictionaries."""
        ledger = Ledger()
        ledger.drop("closed")

        assert "dropped={'closed': 1}" in repr(ledger.stats())
