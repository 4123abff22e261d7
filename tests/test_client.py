"""The client: what a verb takes, and what comes of it."""

from __future__ import annotations

import copy
import datetime as dt
import itertools
import pickle
import threading
import uuid
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import pytest
import trio

import pgtrack
from harness import (
    ProductGraph,
    Server,
    hang,
    load_vectors,
    run_script,
    start_together,
    status,
)
from pgtrack import Client, _api, _diagnostics
from pgtrack._client import transport_of
from pgtrack._clock import SYSTEM_CLOCK
from pgtrack._context import is_session_id
from pgtrack.testing import FakeClock, RecordingTransport, capture
from pgtrack.typing import Answer, Verdict

OPTIONS: dict[str, Any] = {"project_id": "p", "endpoint": "console:"}


@pytest.fixture(name="transport")
def _transport() -> RecordingTransport:
    return RecordingTransport()


@pytest.fixture(name="make")
def _make(transport: RecordingTransport):
    """Return a factory of clients that deliver to *transport*."""
    made: list[pgtrack.Client] = []

    def make(*, clock: Any = None, **options: Any) -> pgtrack.Client:
        config = pgtrack.Config(**{**OPTIONS, **options})
        made.append(pgtrack.Client(config, transport=lambda: transport, clock=clock))
        return made[-1]

    yield make
    for client in made:
        client.close(10)


Make = Callable[..., pgtrack.Client]


class TestEmit:
    """One event."""

    def test_it_is_delivered(self, make: Make, transport: RecordingTransport) -> None:
        """What was taken is delivered, and counted."""
        client = make()
        taken = client.emit("custom", name="n")
        assert client.flush(10)
        stats = client.stats()

        assert taken
        assert [event.name for event in transport.taken] == ["n"]
        assert (stats.emitted, stats.delivered, stats.pending) == (1, 1, 0)
        assert stats.is_balanced

    @pytest.mark.parametrize("kind", ["", None, 5, [], b""])
    def test_there_must_be_a_type(self, make: Make, kind: Any) -> None:
        """An event without a type is dropped, counted."""
        client = make()

        assert not client.emit(kind)
        assert client.stats().dropped == {"invalid_event_type": 1}

    def test_the_order_is_kept(self, make: Make, transport: RecordingTransport) -> None:
        """Events arrive in the order of emission."""
        client = make(batch_size=7)
        for i in range(100):
            client.emit("custom", sequence=i)
        assert client.flush(10)

        assert [event.sequence for event in transport.taken] == list(range(100))

    def test_an_interruption_is_the_host_s(self, make: Make) -> None:
        """Ctrl-C within emit gets through, and the ledger balances."""

        class Slow:
            def __repr__(self) -> str:
                raise KeyboardInterrupt

        client = make()
        with pytest.raises(KeyboardInterrupt):
            client.emit("custom", name=Slow())  # type: ignore[typeddict-item]

        assert client.stats().dropped == {"internal_error": 1}
        assert client.stats().is_balanced

    def test_our_own_errors_do_not_reach_the_host(
        self,
        make: Make,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """An error of pgtrack's is a dropped event and a line in the log."""

        class Broken(FakeClock):
            def time_ns(self) -> int:
                raise RuntimeError("s3cret")

        monkeypatch.setattr(_diagnostics, "reraise", False)
        client = make(clock=Broken())
        taken = client.emit("custom")
        stats = client.stats()
        _diagnostics.tell()

        assert not taken
        assert stats.dropped == {"internal_error": 1}
        assert "RuntimeError at _client.py" in caplog.text
        assert "s3cret" not in caplog.text

    def test_blocks_count_what_they_cannot_emit(self, make: Make) -> None:
        """An event that a block drops is an emitted one, a value it changes is none."""
        client = make()
        client.drop("no_journey")
        client.adjust("journey_id")
        stats = client.stats()

        assert stats.dropped == {"no_journey": 1}
        assert stats.adjusted == {"journey_id": 1}
        assert stats.emitted == 1
        assert stats.is_balanced

    def test_a_disabled_client_does_nothing(self) -> None:
        """Without a sink nothing is counted, and nothing is looked at."""

        class Untouchable:
            def __getattribute__(self, name: str) -> Any:
                raise AssertionError

        client = pgtrack.Client(pgtrack.Config())
        results = [
            client.emit("custom", name=Untouchable()),  # type: ignore[typeddict-item]
            client.track_error(ValueError("x")),
            client.track_api_call("GET", "/", duration=0.1),
            client.track_journey_step("j", "s"),
        ]
        client.drop("no_journey")
        client.retire()

        assert results == [False] * 4
        assert not client.is_enabled
        assert client.stats() == pgtrack.Stats()
        assert client.flush(0)
        assert client.close(0)


class TestCorrelation:
    """What the running context adds."""

    def test_the_frame_fills_in(self) -> None:
        """Session, request, user, journey and metadata come from the blocks around."""
        headers = {"X-Session-ID": "s", "X-Request-ID": "r"}
        with capture() as events, pgtrack.continued_from(headers):
            pgtrack.identify("u")
            with pgtrack.journey("j"):
                pgtrack.emit("custom")

        event = events[0]
        assert (event.session_id, event.user_id, event.journey_id) == ("s", "u", "j")
        assert event.metadata == {"request_id": "r", "source": "backend"}

    def test_arguments_win(self) -> None:
        """What is given wins over what is around."""
        session = pgtrack.session("s", user_id="u")
        with capture() as events, session, pgtrack.journey("j"):
            pgtrack.emit("custom", user_id="u2", journey_id="j2", request_id="r2")

        event = events[0]
        assert (event.user_id, event.journey_id) == ("u2", "j2")
        assert event.metadata == {"request_id": "r2", "source": "backend"}

    def test_another_session_has_no_user(self) -> None:
        """User and journey do not go with an event of another session."""
        session = pgtrack.session("s", user_id="u")
        with capture() as events, session, pgtrack.journey("j"):
            pgtrack.emit("custom", session_id="other")
            pgtrack.emit("custom", session_id="s")

        assert [(e.session_id, e.user_id, e.journey_id) for e in events] == [
            ("other", None, None),
            ("s", "u", "j"),
        ]

    @pytest.mark.parametrize("bad", ["", "a b", "-x", "x" * 129, 5.5, b"s"])
    def test_bad_ids_fall_back(self, bad: Any) -> None:
        """Ids that do not fit are counted, and those around are taken."""
        headers = {"X-Session-ID": "s", "X-Request-ID": "r"}
        with capture() as events, pgtrack.continued_from(headers):
            pgtrack.identify("u")
            pgtrack.emit(
                "custom", session_id=bad, request_id=bad if bad != "-x" else "a b"
            )
            counted = pgtrack.stats().adjusted

        assert events[0].session_id == "s"
        assert events[0].metadata == {"request_id": "r", "source": "backend"}
        assert counted["session_id"] == 1

    def test_a_user_that_does_not_fit_is_nobody(self) -> None:
        """An event of a user whose id does not fit is not put down to another."""
        with capture() as events, pgtrack.session("s", user_id="u"):
            pgtrack.emit("custom", user_id="not an id")
            counted = pgtrack.stats().adjusted

        assert events[0].user_id is None
        assert counted == {"user_id": 1}

    def test_no_user_given_is_the_one_around(self) -> None:
        """None is as good as not given: the session's user it is."""
        with capture() as events, pgtrack.session("s", user_id="u"):
            pgtrack.emit("custom", user_id=None)

        assert events[0].user_id == "u"

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
    def test_a_copy_is_the_client(self, duplicate: Callable[[Client], Client]) -> None:
        """There is one queue: a copy that goes away does not close it."""
        with capture():
            client = _api.default_client()
            same = duplicate(client) is client

        assert same

    def test_it_does_not_pickle(self) -> None:
        """A queue and a thread cannot go to another process, and it says so."""
        with capture():
            client = _api.default_client()
            with pytest.raises(TypeError, match="Pickle its config"):
                pickle.dumps(client)

    def test_the_strict_format(self) -> None:
        """With `session_id_format="uuid"` other session ids do not fit."""
        session_id = str(uuid.uuid4())
        with capture(session_id_format="uuid") as events:
            with pgtrack.session(session_id):
                pgtrack.emit("custom", session_id="sess_1")
            counted = pgtrack.stats().adjusted

        assert events[0].session_id == session_id
        assert counted == {"session_id": 1}

    def test_outside_there_is_the_process_s(self) -> None:
        """Outside of any session events share one of the process."""
        with capture() as events:
            pgtrack.emit("custom")
            pgtrack.emit("custom")

        one, two = (str(event.session_id) for event in events)
        assert one == two
        assert one.startswith("proc-")
        assert is_session_id(one)

    def test_or_none(self) -> None:
        """With `default_session=False` they are dropped, counted."""
        with capture(default_session=False) as events:
            outside = pgtrack.emit("custom")
            pgtrack.track_error(ValueError("x"))
            inside = pgtrack.emit("custom", session_id="s")
            dropped = pgtrack.stats().dropped

        assert (outside, inside) == (False, True)
        assert len(events) == 1
        assert dropped == {"no_session": 2}

    def test_an_error_has_the_step(self) -> None:
        """An error within a step says which; other events have the journey alone."""

        @pgtrack.journey_step("pay", "Pay", journey="j")
        def step() -> None:
            pgtrack.emit("custom")
            pgtrack.track_error("kind")

        with capture() as events:
            step()
        custom, error, _ = events

        assert (custom.journey_id, custom.journey_step_id) == ("j", None)
        assert (error.journey_id, error.journey_step_id) == ("j", "pay")
        assert error.journey_step_name == "Pay"


class TestLimits:
    """Sampling and rates."""

    def test_sampling_keeps_whole_sessions(self) -> None:
        """Of a sampled session all events stay, of another only the errors."""
        with capture(sample_rate=0.5) as events:
            for i in range(400):
                with pgtrack.session(f"sess_{i}"):
                    pgtrack.emit("a")
                    pgtrack.emit("b")
                    pgtrack.track_error("kind")
            stats = pgtrack.stats()
        sessions = {event.session_id for event in events.of_type("a")}

        assert 140 < len(sessions) < 260
        assert sessions == {event.session_id for event in events.of_type("b")}
        assert len(events.of_type("error")) == 400
        assert stats.dropped == {"sampled": 2 * (400 - len(sessions))}
        assert stats.is_balanced

    def test_two_clients_keep_the_same(self) -> None:
        """Another process with the same rate keeps the same sessions."""
        kept = []
        for _ in range(2):
            with capture(sample_rate=0.3) as events:
                for i in range(100):
                    pgtrack.emit("a", session_id=f"sess_{i}")
            kept.append([event.session_id for event in events])

        assert kept[0] == kept[1] != []

    def test_the_rate_is_for_remote_sessions(self) -> None:
        """Only sessions that came in by header are limited, each by itself."""
        remote = [{"X-Session-ID": "one"}, {"X-Session-ID": "two"}]
        clock = FakeClock()
        with capture(session_rate_limit=2, clock=clock) as events:
            for headers in remote:
                with pgtrack.continued_from(headers):
                    for _ in range(5):
                        pgtrack.emit("remote")
                    for _ in range(5):
                        pgtrack.emit("other", session_id="other")
                    with pgtrack.session():
                        for _ in range(5):
                            pgtrack.emit("inner")
            with pgtrack.session("one"):
                for _ in range(5):
                    pgtrack.emit("here")
            clock.advance(1.0)
            with pgtrack.continued_from(remote[0]):
                later = pgtrack.emit("later")
            dropped = pgtrack.stats().dropped

        assert len(events.of_type("remote")) == 4
        assert len(events.of_type("other")) == 10
        assert len(events.of_type("inner")) == 10
        assert len(events.of_type("here")) == 5
        assert later
        assert dropped == {"rate_limited": 6}


class TestVerbs:
    """The siblings of emit."""

    @pytest.mark.parametrize(
        ("duration", "expected"),
        [
            (0.150, 150),
            (1, 1_000),
            (0.0004, 0),
            ("1.5", 1_500),
            (dt.timedelta(seconds=2), 2_000),
            (None, None),
        ],
    )
    def test_durations_are_seconds(self, duration: Any, expected: int | None) -> None:
        """In Python seconds, on the wire integer milliseconds."""
        with capture() as events:
            pgtrack.track_api_call("GET", "/", duration=duration)

        assert events[0].api_duration_ms == expected

    @pytest.mark.parametrize("duration", ["x" * 5_000_000, [1], 10**400, float("nan")])
    def test_no_duration_is_none(self, duration: Any) -> None:
        """What is no number of seconds is left out, counted."""
        with capture() as events:
            pgtrack.track_api_call("GET", "/", duration=duration)
            counted = pgtrack.stats().adjusted

        assert events[0].api_duration_ms is None
        assert counted == {"field": 1}

    def test_calls_have_their_fields(self) -> None:
        """Method, path and status; fields may be added."""
        with capture() as events:
            pgtrack.track_api_call("POST", "/a", 201, name="n")
            pgtrack.track_api_call("GET", "/b")

        assert [
            (e.type, e.api_method, e.api_path, e.api_status_code, e.name)
            for e in events
        ] == [
            ("api.response", "POST", "/a", 201, "n"),
            ("api.response", "GET", "/b", 200, None),
        ]

    def test_errors_are_exceptions_or_names(self) -> None:
        """An exception says its type and message, else both are given."""
        with capture() as events:
            pgtrack.track_error(ValueError("bad"))
            pgtrack.track_error(ValueError("bad"), "better")
            pgtrack.track_error("Kind", "message", error_component="c")
            pgtrack.track_error("Kind")

        assert [(e.error_type, e.error_message) for e in events] == [
            ("ValueError", "bad"),
            ("ValueError", "better"),
            ("Kind", "message"),
            ("Kind", None),
        ]
        assert events[2].error_component == "c"
        assert {e.error_stack for e in events} == {None}

    def test_an_exception_is_told_once_a_session(self) -> None:
        """Told again it is no event, in another session it is."""
        error = ValueError("bad")
        with capture():
            results = [
                pgtrack.track_error(error),
                pgtrack.track_error(error),
                pgtrack.track_error(error, session_id="other"),
                pgtrack.track_error(error, session_id="not an id"),
            ]
            stats = pgtrack.stats()

        assert results == [True, False, True, False]
        assert stats.emitted == 2

    def test_a_bad_session_is_counted_once(self) -> None:
        """The session of an error is checked once."""
        with capture():
            pgtrack.track_error(ValueError("bad"), session_id="not an id")
            counted = pgtrack.stats().adjusted

        assert counted == {"session_id": 1}

    def test_the_stack_is_taken_on_demand(self) -> None:
        """`capture_stack` adds where it was raised."""
        with capture(capture_stack=True) as events:
            try:
                raise ValueError("bad")
            except ValueError as error:
                pgtrack.track_error(error)

        stack = str(events[0].error_stack)
        assert stack.startswith("Traceback (most recent call last):")
        assert "test_the_stack_is_taken_on_demand" in stack

    def test_an_error_that_cannot_be_described(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If describing fails, the event has the type at least."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr("pgtrack._errors.describe", lambda *_, **__: 1 / 0)
        with capture() as events:
            pgtrack.track_error(ValueError("bad"))

        assert (events[0].error_type, events[0].error_message) == ("ValueError", None)

    def test_steps_have_their_fields(self) -> None:
        """Journey, step and name; fields may be added."""
        with capture() as events:
            pgtrack.track_journey_step("j", "s", "S", duration_ms=5)
            pgtrack.track_journey_step("j", "t")

        assert [
            (e.type, e.journey_id, e.journey_step_id, e.journey_step_name)
            for e in events
        ] == [("journey.step", "j", "s", "S"), ("journey.step", "j", "t", None)]
        assert events[0].duration_ms == 5


class TestWire:
    """Against a server."""

    @pytest.mark.parametrize("version", ["v0.1.0", "v0.2.0", "v0.3.0"])
    def test_every_valid_event_can_be_emitted(self, version: str) -> None:
        """What the vectors have, emitted by keywords, arrives the same."""
        events = [
            pgtrack.Event.from_wire(case["event"])
            for case in load_vectors("events_valid")["cases"]
        ]
        with Server(ProductGraph(version)) as server:
            config = pgtrack.Config(project_id="p", endpoint=server.url)
            with pgtrack.Client(config) as client:
                for event in events:
                    fields = attrs.asdict(event, recurse=False)
                    for name in ("type", "project_id", "product_id"):
                        del fields[name]
                    client.emit(event.type, **fields)
                assert client.flush(10)
                rejected = client.stats().rejected
            arrived = server.events

        assert rejected == {}
        assert len(arrived) == len(events)

    def test_threads_lose_nothing(
        self, make: Make, transport: RecordingTransport
    ) -> None:
        """Many threads emit at once: each event arrives once, the ledger balances."""
        client = make(batch_size=50)
        start_together(
            8,
            lambda i: [client.emit("c", sequence=1_000 * i + j) for j in range(200)],
        )
        assert client.flush(30)

        expected = {1_000 * i + j for i, j in itertools.product(range(8), range(200))}
        assert expected == {event.sequence for event in transport.taken}
        assert client.stats().delivered == len(transport.taken) == 1_600
        assert client.stats().is_balanced


class TestEnd:
    """Flushing and closing."""

    def test_with_closes(self, transport: RecordingTransport) -> None:
        """Leaving the block delivers, and ends the client."""
        config = pgtrack.Config(**OPTIONS)
        with pgtrack.Client(config, transport=lambda: transport) as client:
            client.emit("a")
        late = client.emit("b")

        assert client.is_closed
        assert not late
        assert [event.type for event in transport.taken] == ["a"]
        assert client.stats().dropped == {"closed": 1}
        assert client.close()

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_async_with_closes(
        self, transport: RecordingTransport, backend: str
    ) -> None:
        """The same in an event loop, of asyncio or trio."""

        async def main() -> bool:
            config = pgtrack.Config(**OPTIONS)
            client = pgtrack.Client(config, transport=lambda: transport)
            async with client:
                client.emit("a")
                is_flushed = await client.aflush(10)
            return is_flushed and client.is_closed

        assert anyio.run(main, backend=backend)
        assert [event.type for event in transport.taken] == ["a"]

    def test_a_cancelled_flush_lets_trio_go_on(self) -> None:
        """A flush that waits is left behind when its task is cancelled."""
        gate = threading.Event()
        with Server(ProductGraph()) as server:
            server.default = hang(gate)
            config = pgtrack.Config(project_id="p", endpoint=server.url)
            with pgtrack.Client(config) as client:
                client.emit("a")

                async def main() -> bool:
                    with trio.move_on_after(0.2) as scope:
                        await client.aflush(30)
                    return scope.cancelled_caught

                before = SYSTEM_CLOCK.monotonic()
                is_cancelled = trio.run(main)
                took = SYSTEM_CLOCK.monotonic() - before
                gate.set()
                assert client.flush(10)

        assert is_cancelled
        assert took < 10

    def test_the_repr_has_no_key(self) -> None:
        """A client shows its project and endpoint."""
        config = pgtrack.Config(**OPTIONS, api_key="s3cret")
        with pgtrack.Client(config) as client:
            shown = repr(client)

        assert shown == "<Client p console:>"
        assert repr(pgtrack.Client(pgtrack.Config())) == "<Client None disabled>"

    @pytest.mark.parametrize(
        ("endpoint", "name"),
        [
            ("console:", "ConsoleTransport"),
            ("console:stderr", "ConsoleTransport"),
            ("file:{}/events.jsonl", "FileTransport"),
            ("https://pg.invalid/v1/events", "HttpTransport"),
        ],
    )
    def test_the_endpoint_chooses_the_transport(
        self, tmp_path: Any, endpoint: str, name: str
    ) -> None:
        """Each kind of endpoint has its transport."""
        config = pgtrack.Config(project_id="p", endpoint=endpoint.format(tmp_path))

        assert type(transport_of(config)).__name__ == name

    def test_httpx_waits_for_the_first_batch(self) -> None:
        """A client loads no HTTP library before it has something to send."""
        done = run_script(
            """
            import sys, pgtrack
            client = pgtrack.configure(project_id="p", endpoint="https://pg.invalid")
            assert "httpx" not in sys.modules
            """
        )

        assert (done.returncode, done.stderr) == (0, "")


class TestSpool:
    """What rests on disk for the next process."""

    def test_a_client_without_an_event_replays(self, tmp_path) -> None:
        """What others left is sent although nothing is emitted."""
        down = RecordingTransport([Answer(verdict=Verdict.RETRY)] * 100)
        config = pgtrack.Config(
            project_id="p", endpoint="console:", spool_dir=tmp_path, replay_rate=None
        )
        dead = Client(config, transport=lambda: down)
        dead.emit("custom", name="left")
        is_closed = dead.close(5)
        came = threading.Event()

        def take(_: object) -> Answer:
            came.set()
            return Answer(verdict=Verdict.TAKEN)

        recording = RecordingTransport([take])
        with Client(config, transport=lambda: recording) as client:
            has_come = came.wait(10)

        assert is_closed
        assert has_come
        assert ["left"] == [event.name for event in recording.taken]
        assert (1, 1, 0) == (
            client.stats().recovered,
            client.stats().delivered,
            client.stats().spooled,
        )


class TestSecondThoughts:
    """What is not expected of users, and must not cost events or their time."""

    def test_an_endpoint_that_quotes_the_key(self) -> None:
        """A key that comes back in an answer gets into no reason and no log."""
        with Server() as server:
            server.default = status(401, body=b'{"error":"nope pg-live-1234"}')
            config = pgtrack.Config(
                project_id="p", endpoint=server.url, api_key="pg-live-1234"
            )
            with pgtrack.Client(config) as client:
                client.emit("custom")
                client.close(1)

        assert "nope ***" in str(client.stats().last_error)
        assert "pg-live" not in str(client.stats())

    def test_a_factory_of_ids_that_fails(self) -> None:
        """It is replaced by our own: the events are not to blame."""

        def fail() -> str:
            raise LookupError

        transport = RecordingTransport()
        config = pgtrack.Config(project_id="p", endpoint="console:")
        with pgtrack.Client(config, transport=lambda: transport, ids=fail) as client:
            client.emit("custom")

        assert is_session_id(transport.taken[0].event_id, "uuid")

    def test_waiting_leaves_the_executor_alone(self) -> None:
        """`aflush` waits in a thread of its own, that the loop does not join."""
        import asyncio

        go = threading.Event()

        class Stuck(RecordingTransport):
            def send(self, events: Any, timeout: float) -> Any:
                go.wait(20)
                return super().send(events, timeout)

        config = pgtrack.Config(project_id="p", endpoint="console:", batch_size=1)
        with pgtrack.Client(config, transport=Stuck) as client:
            client.emit("custom")

            async def give_up() -> None:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(client.aflush(20), 0.05)

            asyncio.run(give_up())
            is_stuck = client.stats().pending == 1
            go.set()

        assert is_stuck

    def test_what_sessions_add_is_encoded_by_the_batch(self) -> None:
        """Of a backlog with much metadata no more is encoded than a request takes."""
        transport = RecordingTransport()
        config = pgtrack.Config(
            project_id="p",
            endpoint="console:",
            max_batch_bytes=100_000,
            batch_interval=60,
            batch_size=500,
        )
        with pgtrack.Client(config, transport=lambda: transport) as client:
            with pgtrack.session(metadata={"long": "x" * 10_000}):
                for _ in range(300):
                    client.emit("custom")
            client.flush()

        assert sum(map(len, transport.batches)) == 300
        assert max(map(len, transport.batches)) < 10
