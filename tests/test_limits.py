"""Sampling and rates by session."""

from __future__ import annotations

import random
import uuid

import pytest

from harness import start_together
from pgtrack._limits import RateLimit, is_sampled

SHAPES = {
    "UUIDs": lambda i: str(uuid.UUID(int=random.Random(i).getrandbits(128), version=4)),
    "the frontend's": lambda i: (
        f"sess-mm8wlgo{i % 36:x}-{i * 2_654_435_761 % 2**32:08x}"
    ),
    "counted": lambda i: f"job-{i:06d}",
}


class TestSampling:
    """Whole sessions, by hash."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
    def test_the_rate_is_respected(self, shape: str, rate: float) -> None:
        """Of many sessions, about the share that the rate says is kept."""
        sessions = [SHAPES[shape](i) for i in range(20_000)]

        kept = sum(is_sampled(session, rate) for session in sessions)

        deviation = (20_000 * rate * (1 - rate)) ** 0.5
        assert abs(kept - 20_000 * rate) < 5 * deviation

    def test_the_answer_is_the_session_s(self) -> None:
        """The same id has the same answer, in every process and version."""
        kept = [i for i in range(40) if is_sampled(f"sess_{i}", 0.2)]

        assert kept == [1, 5, 9, 11, 15, 19, 21, 25, 29, 31, 35, 39]

    def test_a_higher_rate_keeps_what_a_lower_one_does(self) -> None:
        """Services of different rates keep the same sessions, as far as they go."""
        low = {i for i in range(1_000) if is_sampled(f"s{i}", 0.1)}
        high = {i for i in range(1_000) if is_sampled(f"s{i}", 0.3)}

        assert low < high

    def test_the_ends_are_exact(self) -> None:
        """0 keeps none, 1 keeps all."""
        sessions = [f"s{i}" for i in range(1_000)]

        assert not any(is_sampled(session, 0.0) for session in sessions)
        assert all(is_sampled(session, 1.0) for session in sessions)


class TestRates:
    """Events a second."""

    def test_a_second_has_so_many_and_no_more(self) -> None:
        """The events beyond the rate wait for the next second in vain."""
        limit = RateLimit(3.0)

        first = [limit.allows("s", now) for now in (10.0, 10.1, 10.5, 10.8, 10.9)]
        second = [limit.allows("s", now) for now in (11.0, 11.9, 11.9, 11.9)]

        assert first == [True, True, True, False, False]
        assert second == [True, True, True, False]

    def test_a_fraction_counts_down(self) -> None:
        """1.5 a second is one in each."""
        limit = RateLimit(1.5)

        assert [limit.allows("s", 1.0), limit.allows("s", 1.0)] == [True, False]

    def test_sessions_do_not_share(self) -> None:
        """A noisy session costs others nothing."""
        limit = RateLimit(1.0)
        noisy = [limit.allows("noisy", 1.0) for _ in range(100)]

        assert noisy == [True] + [False] * 99
        assert limit.allows("quiet", 1.0)

    def test_invented_sessions_fill_no_memory(self) -> None:
        """However many ids are invented, the counters are bounded."""
        limit = RateLimit(1.0)
        for i in range(20_000):
            limit.allows(f"invented-{i}", i / 10_000)

        assert len(limit._seconds) == 1
        assert len(limit._seconds[1]) <= RateLimit._COUNTERS

    def test_threads_share_the_rate(self) -> None:
        """Exactly the rate passes, however many threads ask at once."""
        limit = RateLimit(100.0)

        allowed = start_together(
            8, lambda _: sum(limit.allows("s", 1.0) for _ in range(50))
        )

        assert sum(allowed) == 100
