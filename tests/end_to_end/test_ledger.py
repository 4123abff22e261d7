"""The ledger's equation holds whatever happens, in whatever order."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import pgtrack
from harness import (
    Server,
    Step,
    cut,
    drop,
    garbage,
    in_fork,
    poison,
    redirect,
    status,
)
from pgtrack import _client
from pgtrack._retry import RetryPolicy


def is_bad(event: dict[str, Any]) -> bool:
    """Return whether a poisoned server cannot read *event*."""
    return event.get("event.name") == "bad"


FAULTS: dict[str, Step] = {
    "503": status(503),
    "429": status(429, {"Retry-After": "0"}),
    "401": status(401),
    "413": status(413),
    "500, stored": status(500, then_store=True),
    "400": status(400),
    "redirect": redirect("/elsewhere"),
    "drop": drop(),
    "cut": cut(20),
    "garbage": garbage(b"\x00\xff not http"),
    "poison": poison(is_bad),
}

# Tests have little time.
HURRIED = RetryPolicy(first=0.01, most=0.02, first_probe=0.01, most_probe=0.02)


class Ledger(RuleBasedStateMachine):
    """One server, one default client after another, and children of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(_client, "RetryPolicy", lambda: HURRIED)
        self.server = Server()
        self.stats = pgtrack.Stats()  # of the clients that came before, and children
        self.number = 0

    @initialize(
        size=st.sampled_from([3, 20, 1000]),
        batch_size=st.sampled_from([1, 4, 50]),
        overflow=st.sampled_from(["drop_newest", "drop_oldest"]),
    )
    def begin(self, size: int, batch_size: int, overflow: str) -> None:
        """Make the first client."""
        self.configure(size, batch_size, overflow)

    def configure(self, size: int, batch_size: int, overflow: str) -> None:
        """Make another client."""
        config = pgtrack.Config.isolated(
            project_id="p",
            endpoint=self.server.url,
            max_queue_size=size,
            batch_size=batch_size,
            overflow=overflow,
            before_send=lambda event: None if event.name == "unwanted" else event,
        )
        self.client = pgtrack.Client(config)

    @rule(
        name=st.sampled_from(["good", "bad", "unwanted"]),
        count=st.sampled_from([1, 2, 10]),
    )
    def emit(self, name: str, count: int) -> None:
        """Emit some events."""
        for _ in range(count):
            self.client.emit("custom", name=name)

    @rule()
    def emit_huge(self) -> None:
        """Emit an event that has to be cut."""
        big = {f"key {i}": "x" * 9_000 for i in range(60)}
        self.client.emit("custom", name="good", metadata=big)

    @rule()
    def emit_odd(self) -> None:
        """Emit what is no event."""
        self.client.emit("", name="good")
        with pgtrack.session():
            self.client.emit(object(), metadata={"x": object()})  # type: ignore[arg-type]

    @rule(faults=st.lists(st.sampled_from(sorted(FAULTS)), max_size=5))
    def misbehave(self, faults: list[str]) -> None:
        """Have the server fail the next requests."""
        self.server.script = [FAULTS[fault] for fault in faults]

    @rule(timeout=st.sampled_from([0, 0.02]))
    def flush(self, timeout: float) -> None:
        """Wait for a moment."""
        self.client.flush(timeout)

    @rule()
    def settle(self) -> None:
        """Wait until all has come to its end."""
        self.server.script = []
        assert self.client.flush(20)
        stats = self.client.stats()
        assert stats.is_balanced, stats
        assert 0 == stats.pending

    @rule(
        timeout=st.sampled_from([0, 0.02, 20]),
        size=st.sampled_from([3, 20, 1000]),
        batch_size=st.sampled_from([1, 4, 50]),
        overflow=st.sampled_from(["drop_newest", "drop_oldest"]),
    )
    def replace(
        self, timeout: float, size: int, batch_size: int, overflow: str
    ) -> None:
        """Close the client, with or without time enough, and go on with another."""
        self.client.close(timeout)
        self.client.emit("custom", name="good")
        self.keep(self.client)
        self.configure(size, batch_size, overflow)

    @rule(size=st.sampled_from([3, 20]))
    def retire(self, size: int) -> None:
        """Let another client take over while the old one drains."""
        before = self.client
        before.retire()
        before.emit("custom", name="good")
        self.server.script = []
        assert before.flush(20)
        before.close(20)
        self.keep(before)
        self.configure(size, 4, "drop_newest")

    @rule(count=st.sampled_from([0, 1, 5]))
    def fork(self, count: int) -> None:
        """Let a child emit, and report its ledger."""
        if not hasattr(os, "fork"):
            return
        self.server.script = []

        def child() -> pgtrack.Stats:
            before = self.client.stats()
            assert before == pgtrack.Stats(), before
            for _ in range(count):
                self.client.emit("custom", name="good")
            self.client.close(20)
            return self.client.stats()

        self.add(in_fork(child))

    def keep(self, client: pgtrack.Client) -> None:
        """Add the ledger of a client that is closed."""
        assert client.flush(20), "its thread counts what it was cut off from"
        stats = client.stats()
        assert stats.is_balanced, stats
        assert 0 == stats.pending
        self.add(stats)

    def add(self, stats: pgtrack.Stats) -> None:
        """Add the ledger of a client or child that has ended."""
        assert stats.is_balanced, stats
        self.stats += stats

    @invariant()
    def holds(self) -> None:
        """Hold the equation to being off by no more than what is on its way."""
        if not hasattr(self, "client"):
            return
        stats = self.client.stats()
        ended = stats.delivered + sum(stats.rejected.values())
        ended += sum(stats.dropped.values())
        off = stats.emitted - ended - stats.pending
        assert abs(off) <= self.client.config.max_queue_size, stats

    def teardown(self) -> None:
        """Settle, and compare with what the server has."""
        if hasattr(self, "client"):
            self.settle()
            self.client.close(20)
            self.keep(self.client)
            assert self.stats.is_balanced
            self.compare()
        self.server.close()
        self.patch.undo()

    def compare(self) -> None:
        """Each delivered event is at the server, once."""
        ids = [event["event_id"] for event in self.server.events]
        # What was stored by a request that failed may have been given up afterwards.
        given_up = sum(self.stats.rejected.values())
        given_up += sum(self.stats.dropped.get(r, 0) for r in ("shutdown", "too_large"))
        assert self.stats.delivered <= len(set(ids)) <= self.stats.delivered + given_up


Ledger.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestLedger(Ledger.TestCase):
    """Random sequences of what may happen to a client."""
