"""What pgtrack offers for tests."""

from __future__ import annotations

import threading
from datetime import datetime, timezone
from typing import Any

import pytest
from freezegun import freeze_time

import pgtrack
from harness import start_together
from pgtrack._clock import Signal
from pgtrack.testing import (
    Events,
    FakeClock,
    RecordingTransport,
    SequentialIds,
    capture,
)
from pgtrack.typing import Answer, Verdict

UTC = timezone.utc


class TestCapture:
    """Events in a list."""

    def test_events_are_whole(self) -> None:
        """What is captured is what would leave."""
        start = datetime(2026, 1, 1, tzinfo=UTC)
        session = pgtrack.session("sess_1", user_id="u_1")
        with capture(clock=FakeClock(start), ids=SequentialIds()) as events, session:
            taken = pgtrack.emit("custom", name="a" * 300, metadata={"n": {1}})

        assert taken
        assert events == [
            pgtrack.Event(
                type="custom",
                event_id="00000000-0000-4000-8000-000000000001",
                project_id="test",
                product_id="test",
                session_id="sess_1",
                timestamp=start,
                name="a" * 247 + "...[cut]",
                user_id="u_1",
                metadata={"n": [1], "source": "backend"},
            )
        ]

    def test_all_verbs_and_blocks_are_seen(self) -> None:
        """Each verb goes to the list, in the order of emission."""
        with capture() as events:
            pgtrack.emit("custom")
            pgtrack.track_api_call("GET", "/")
            pgtrack.track_error("kind", "message")
            with pgtrack.journey("j") as journey:
                journey.step("s")

        assert [event.type for event in events] == [
            "custom",
            "api.response",
            "error",
            "journey.step",
        ]

    def test_there_is_no_thread(self) -> None:
        """Nothing runs in the background."""
        before = threading.active_count()
        with capture():
            pgtrack.emit("custom")
            during = threading.active_count()

        assert during == before

    def test_flush_and_shutdown_do_nothing(self) -> None:
        """There is nothing to wait for."""
        with capture() as events:
            pgtrack.emit("custom")
            results = [pgtrack.flush(0), pgtrack.shutdown(0)]

        assert results == [True, True]
        assert len(events) == 1

    def test_the_ledger_balances(self) -> None:
        """Captured events are delivered ones."""
        with capture(before_send=lambda e: e if e.name else None):
            pgtrack.emit("custom", name="n")
            pgtrack.emit("custom")
            stats = pgtrack.stats()

        assert (stats.emitted, stats.delivered) == (2, 1)
        assert stats.dropped == {"before_send": 1}
        assert stats.is_balanced

    def test_the_innermost_captures(self) -> None:
        """Nested, each list has what was emitted in it alone."""
        with capture() as outer:
            pgtrack.emit("a")
            with capture() as inner:
                pgtrack.emit("b")
            pgtrack.emit("c")

        assert [event.type for event in outer] == ["a", "c"]
        assert [event.type for event in inner] == ["b"]

    def test_all_threads_are_seen(self) -> None:
        """What other threads emit is captured, too."""
        with capture() as events:
            start_together(8, lambda i: pgtrack.emit("custom", sequence=i))

        assert sorted(e.sequence or 0 for e in events) == list(range(8))

    def test_options_are_those_of_configure(self) -> None:
        """Settings apply to what is captured."""
        with capture(project_id="p", default_session=False) as events:
            pgtrack.emit("custom")
            with pgtrack.session("s"):
                pgtrack.emit("custom")

        assert [event.project_id for event in events] == ["p"]

    def test_wrong_options_change_nothing(self) -> None:
        """A wrong setting is told before anything is replaced."""
        with capture() as events:
            with pytest.raises(pgtrack.ConfigError), capture(batch_size=0):
                pass
            pgtrack.emit("custom")

        assert len(events) == 1

    def test_disabled_there_is_nothing(self) -> None:
        """`enabled=False` shows what the code does without pgtrack."""
        with capture(enabled=False) as events:
            taken = pgtrack.emit("custom")

        assert not taken
        assert events == []

    def test_the_environment_has_no_say(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Variables, be they wrong, neither disable nor configure it."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")
        monkeypatch.setenv("PRODUCTGRAPH_SAMPLE_RATE", "garbage")
        with capture() as events:
            pgtrack.emit("custom")

        assert len(events) == 1

    def test_what_was_before_comes_back(self) -> None:
        """The default client of before is there again, also after an error."""
        client = pgtrack.configure(project_id="p", endpoint="console:")
        with pytest.raises(ZeroDivisionError), capture():
            _ = 1 / 0

        assert pgtrack.configure(project_id="p", endpoint="console:") is client

    def test_configure_inside_changes_nothing(self) -> None:
        """Code under test may call `configure`: it is checked, and captured on."""
        with capture() as events:
            pgtrack.configure(project_id="p", endpoint="https://pg.example")
            with pytest.raises(pgtrack.ConfigError):
                pgtrack.configure(batch_size=0)
            pgtrack.emit("custom")

        assert [event.project_id for event in events] == ["test"]

    def test_frozen_time_is_stamped(self) -> None:
        """The stamps are those of freezegun."""
        with capture() as events, freeze_time("2026-04-27T10:30:00.5Z"):
            pgtrack.emit("custom")

        expected = datetime(2026, 4, 27, 10, 30, 0, 500_000, tzinfo=UTC)
        assert events[0].timestamp == expected


class TestEvents:
    """The list."""

    def events(self) -> Events:
        """Return the events of a journey, of which one step failed."""
        with capture() as events:
            with pgtrack.journey("checkout") as journey:
                journey.step("cart")
                journey.step("pay")
                pgtrack.track_error("kind", "message")
                journey.convert()
            with pgtrack.journey("other") as journey:
                journey.step("one")
        return events

    def test_it_can_be_filtered(self) -> None:
        """The events of one type are such a list again."""
        steps = self.events().of_type("journey.step")

        assert isinstance(steps, Events)
        assert [e.journey_step_id for e in steps] == ["cart", "pay", "one"]

    def test_a_journey_that_was_is_asserted(self) -> None:
        """The steps, and the end if asked for, are as they were."""
        events = self.events()

        events.assert_journey("checkout", steps=["cart", "pay"])
        events.assert_journey("checkout", steps=("cart", "pay"), status="converted")
        events.assert_journey("other", steps=["one"])
        events.assert_journey("nobody's", steps=[])

    @pytest.mark.parametrize(
        "steps", [[], ["cart"], ["pay", "cart"], ["cart", "pay", "more"]]
    )
    def test_other_steps_are_told(self, steps: list[str]) -> None:
        """The message has what was expected, what happened, and all that came."""
        with pytest.raises(AssertionError) as caught:
            self.events().assert_journey("checkout", steps=steps)

        assert str(caught.value) == (
            f"journey 'checkout' must have the steps {steps} (got ['cart', 'pay']; "
            "captured: ['journey.step checkout', 'journey.step checkout', "
            "'error checkout', 'custom checkout', 'journey.step other'])."
        )

    @pytest.mark.parametrize(
        ("journey_id", "steps", "ended"),
        [("checkout", ["cart", "pay"], "['converted']"), ("other", ["one"], "[]")],
    )
    def test_another_end_is_told(
        self, journey_id: str, steps: list[str], ended: str
    ) -> None:
        """The message has how the journey ended."""
        with pytest.raises(AssertionError) as caught:
            self.events().assert_journey(journey_id, steps=steps, status="abandoned")

        expected = f"journey '{journey_id}' must have ended 'abandoned' (got {ended})."
        assert expected == str(caught.value)


class TestTransport:
    """Batches in a list."""

    def client(self, transport: RecordingTransport) -> pgtrack.Client:
        """Return a client that sends by *transport*."""
        config = pgtrack.Config(project_id="p", endpoint="console:")
        return pgtrack.Client(config, transport=lambda: transport)

    def test_batches_are_kept(self) -> None:
        """Each attempt is a list of events."""
        transport = RecordingTransport()
        with self.client(transport) as client:
            client.emit("a")
            client.emit("b")

        assert [[e.type for e in batch] for batch in transport.batches] == [["a", "b"]]
        assert [e.type for e in transport.taken] == ["a", "b"]

    def test_answers_come_in_turn(self) -> None:
        """An answer, an exception, a function; then all is taken."""
        seen: list[Any] = []

        def answer(batch: list[pgtrack.Event]) -> Answer:
            seen.extend(e.type for e in batch)
            return Answer(verdict=Verdict.TAKEN, rejected={0: "why not"})

        transport = RecordingTransport([Answer(verdict=Verdict.RETRY), answer])
        with self.client(transport) as client:
            client.emit("a")
            client.emit("b")
            assert client.flush(30)
            client.emit("c")
            assert client.flush(30)
            stats = client.stats()

        assert [len(batch) for batch in transport.batches] == [2, 2, 1]
        assert seen == ["a", "b"]
        assert [e.type for e in transport.taken] == ["b", "c"]
        assert stats.rejected == {"why not": 1}
        assert stats.retries == 1

    def test_errors_are_raised(self) -> None:
        """An exception among the answers is raised by the attempt."""
        transport = RecordingTransport([OSError("gone")])

        with pytest.raises(OSError, match="gone"):
            transport.send([b'{"event.type":"a"}'], 1.0)
        transport.abort()
        transport.close()
        assert transport.taken == []


class TestClock:
    """Time that stands still."""

    def test_it_moves_by_advance_alone(self) -> None:
        """Both times go on together, to the microsecond."""
        clock = FakeClock(datetime(1970, 1, 1, tzinfo=UTC))
        before = (clock.time_ns(), clock.monotonic())
        clock.advance(1.000_001)

        assert before == (0, 0.0)
        assert (clock.time_ns(), clock.monotonic()) == (1_000_001_000, 1.000_001)

    def test_it_starts_in_2026(self) -> None:
        """Without a start there is one."""
        assert FakeClock().time_ns() == 1_767_225_600_000_000_000

    def test_waiters_are_woken_in_time(self) -> None:
        """Who waits goes on once as much was advanced."""
        clock = FakeClock()
        signal = Signal()
        woken = threading.Event()

        def wait() -> None:
            clock.wait(signal, 10.0)
            woken.set()

        thread = threading.Thread(target=wait)
        thread.start()
        left = clock.until_waiting()
        clock.advance(9.5)
        later = clock.until_waiting()
        early = woken.is_set()
        clock.advance(0.5)
        thread.join(10)

        assert (left, later, early) == (10.0, 0.5, False)
        assert woken.is_set()

    def test_a_signal_wakes(self) -> None:
        """Who waits without an end goes on when the signal is given."""
        clock = FakeClock()
        signal = Signal()
        thread = threading.Thread(target=clock.wait, args=(signal, None))
        thread.start()
        left = clock.until_waiting()
        clock.advance(1_000.0)
        signal.give()
        thread.join(10)

        assert left is None
        assert not thread.is_alive()

    def test_no_time_is_not_waited_for(self) -> None:
        """A wait of nothing returns at once."""
        clock = FakeClock()
        clock.wait(Signal(), 0.0)
        clock.wait(Signal(), -1.0)

        with pytest.raises(TimeoutError):
            clock.until_waiting(timeout=0.01)

    def test_a_client_waits_on_it(self) -> None:
        """A batch goes out when its interval has been advanced."""
        sent = threading.Event()

        def answer(batch: list[pgtrack.Event]) -> Answer:
            sent.set()
            return Answer(verdict=Verdict.TAKEN)

        clock = FakeClock()
        transport = RecordingTransport([answer])
        config = pgtrack.Config(project_id="p", endpoint="console:", batch_interval=5)
        with pgtrack.Client(config, transport=lambda: transport, clock=clock) as client:
            client.emit("custom")
            left = clock.until_waiting()
            too_soon = sent.is_set()
            clock.advance(5.0)
            is_sent = sent.wait(10)

        assert (left, too_soon, is_sent) == (5.0, False, True)


def test_ids_count_up() -> None:
    """Sequential ids are UUIDs that count."""
    ids = SequentialIds()

    assert [ids(), ids()] == [
        "00000000-0000-4000-8000-000000000001",
        "00000000-0000-4000-8000-000000000002",
    ]
