"""The default client, and the verbs that use it."""

from __future__ import annotations

import inspect
import logging
import threading
from typing import Any

import pytest

import pgtrack
from harness import ProductGraph, Server, hang, in_fork, run_script, start_together
from pgtrack import _api
from pgtrack._event import KEYWORDS
from pgtrack.testing import RecordingTransport, capture

OPTIONS: dict[str, Any] = {"project_id": "p", "batch_interval": 60}
VERBS = {
    "emit": ("custom",),
    "track_api_call": ("GET", "/"),
    "track_error": ("kind", "message"),
    "track_journey_step": ("journey", "step"),
}


@pytest.fixture(name="server")
def _server():
    with Server(ProductGraph()) as server:
        yield server


class TestConfigure:
    """Making the default client."""

    def test_verbs_use_it(self, server: Server) -> None:
        """What is emitted afterwards goes to the endpoint."""
        client = pgtrack.configure(**OPTIONS, endpoint=server.url)
        for verb, arguments in VERBS.items():
            assert getattr(pgtrack, verb)(*arguments)
        assert pgtrack.flush(10)

        assert isinstance(client, pgtrack.Client)
        assert [event["event.type"] for event in server.events] == [
            "custom",
            "api.response",
            "error",
            "journey.step",
        ]

    def test_equal_options_are_the_same_client(self, server: Server) -> None:
        """Configured again as it is, the client stays."""
        client = pgtrack.configure(**OPTIONS, endpoint=server.url)

        again = pgtrack.configure(
            endpoint=server.url, project_id="p", batch_interval="1m"
        )

        assert again is client

    def test_a_transport_of_its_own(self) -> None:
        """What is given as `transport` carries the events; the same is not replaced."""
        transport = RecordingTransport()
        options: Any = {**OPTIONS, "endpoint": "https://h.invalid"}

        def make() -> RecordingTransport:
            return transport

        client = pgtrack.configure(**options, transport=make)
        again = pgtrack.configure(**options, transport=make)
        pgtrack.emit("custom", name="mine")
        assert pgtrack.flush(10)
        other = pgtrack.configure(**options)

        assert again is client
        assert other is not client
        assert ["mine"] == [event.name for event in transport.taken]

    def test_other_options_take_over(self, server: Server) -> None:
        """The new client is the default one, and the old one delivers by itself."""
        old = pgtrack.configure(**OPTIONS, endpoint=server.url)
        pgtrack.emit("old")
        new = pgtrack.configure(**OPTIONS, endpoint=server.url, service="s")
        pgtrack.emit("new")

        assert new is not old
        assert server.wait_for(1)
        assert [event["event.type"] for event in server.events] == ["old"]
        assert not old.emit("late")
        assert old.stats().dropped == {"closed": 1}

    def test_configure_does_not_wait(self, server: Server) -> None:
        """The old client drains in the background, however slow its endpoint is."""
        gate = threading.Event()
        server.default = hang(gate)
        pgtrack.configure(**OPTIONS, endpoint=server.url)
        pgtrack.emit("old")
        assert not pgtrack.flush(0)
        assert server.wait_for_requests(1)
        pgtrack.configure(**OPTIONS, endpoint=server.url, service="s")
        pending = pgtrack.stats().pending
        gate.set()

        assert pending == 1
        assert pgtrack.flush(10)
        assert pgtrack.stats().delivered == 1

    def test_left_out(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An endpoint in the environment that enables nothing is told, unless meant."""
        monkeypatch.setenv("PRODUCTGRAPH_ENDPOINT", "https://h.invalid")
        client = pgtrack.configure(project_id="p")
        told = [record.getMessage() for record in caplog.records]
        caplog.clear()
        pgtrack.configure(project_id="p", enabled=False)
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")
        pgtrack.configure(project_id="p")

        assert not client.is_enabled
        assert 1 == len(told)
        assert "PRODUCTGRAPH_ENABLED=true" in told[0]
        assert [] == caplog.records

    def test_wrong_options_change_nothing(self, server: Server) -> None:
        """A ConfigError leaves the present client as it is."""
        client = pgtrack.configure(**OPTIONS, endpoint=server.url)
        with pytest.raises(pgtrack.ConfigError):
            pgtrack.configure(**OPTIONS, endpoint="ftp://pg.example")
        with pytest.raises(TypeError):
            pgtrack.configure(endpont=server.url)  # type: ignore[call-arg]

        assert _api.default_client() is client
        assert pgtrack.emit("custom")

    def test_after_shutdown_it_makes_a_new_one(self, server: Server) -> None:
        """A client that was shut down is not taken up again."""
        old = pgtrack.configure(**OPTIONS, endpoint=server.url)
        assert pgtrack.shutdown(10)
        dropped = pgtrack.emit("between")
        new = pgtrack.configure(**OPTIONS, endpoint=server.url)
        pgtrack.emit("new")
        assert pgtrack.flush(10)

        assert not dropped
        assert new is not old
        assert [event["event.type"] for event in server.events] == ["new"]

    def test_threads_agree_on_one(self, server: Server) -> None:
        """Configured by several threads at once, there is one client."""
        clients = start_together(
            8, lambda _: pgtrack.configure(**OPTIONS, endpoint=server.url)
        )

        assert len(set(map(id, clients))) == 1

    def test_disabled_it_may_be_enabled(self, server: Server) -> None:
        """A client made by the environment gives way to `configure`."""
        before = pgtrack.emit("before")
        pgtrack.configure(**OPTIONS, endpoint=server.url)

        assert not before
        assert pgtrack.emit("after")
        assert pgtrack.stats().emitted == 1


class TestStats:
    """The ledger of all default clients."""

    def test_old_clients_count(self, server: Server) -> None:
        """What the clients before delivered is in the sum, for ever."""
        for i in range(4):
            pgtrack.configure(**OPTIONS, endpoint=server.url, service=f"s{i}")
            pgtrack.emit("custom")
            assert pgtrack.flush(10)
        stats = pgtrack.stats()

        assert (stats.emitted, stats.delivered) == (4, 4)
        assert stats.is_balanced
        assert len(_api._retired) <= 2

    def test_they_count_after_shutdown(self, server: Server) -> None:
        """A client that was shut down stays in the sum."""
        pgtrack.configure(**OPTIONS, endpoint=server.url)
        pgtrack.emit("custom")
        pgtrack.shutdown(10)
        pgtrack.emit("late")
        pgtrack.configure(**OPTIONS, endpoint=server.url)
        pgtrack.configure(**OPTIONS, endpoint=server.url, service="s")
        stats = pgtrack.stats()

        assert (stats.emitted, stats.delivered) == (2, 1)
        assert stats.dropped == {"closed": 1}

    def test_a_child_starts_at_zero(self, server: Server) -> None:
        """In a forked child nothing has been emitted, by no client."""
        for i in range(3):
            pgtrack.configure(**OPTIONS, endpoint=server.url, service=f"s{i}")
            pgtrack.emit("custom")
            assert pgtrack.flush(10)

        assert in_fork(lambda: pgtrack.stats().emitted) == 0
        assert pgtrack.stats().emitted == 3

    def test_a_lock_held_elsewhere_does_not_stop_a_child(self, server: Server) -> None:
        """A child forked while another thread configures can emit and configure."""
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with _api._configuring:
                held.set()
                done.wait(30)

        def child() -> bool:
            pgtrack.configure(**OPTIONS, endpoint=server.url)
            return pgtrack.emit("custom") and pgtrack.shutdown(10)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(10)
        try:
            is_delivered = in_fork(child)
        finally:
            done.set()
            thread.join(10)

        assert is_delivered


class TestEnvironment:
    """Without `configure`."""

    def test_the_first_event_configures(
        self, monkeypatch: pytest.MonkeyPatch, server: Server
    ) -> None:
        """The environment is read when something is emitted."""
        monkeypatch.setenv("PRODUCTGRAPH_PROJECT_ID", "p")
        monkeypatch.setenv("PRODUCTGRAPH_ENDPOINT", server.url)
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "true")
        taken = pgtrack.emit("custom")
        assert pgtrack.flush(10)

        assert taken
        assert [event["project_id"] for event in server.events] == ["p"]

    def test_threads_share_the_first_client(
        self, monkeypatch: pytest.MonkeyPatch, server: Server
    ) -> None:
        """Threads that emit first, all at once, share one client."""
        monkeypatch.setenv("PRODUCTGRAPH_PROJECT_ID", "p")
        monkeypatch.setenv("PRODUCTGRAPH_ENDPOINT", server.url)
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "true")
        taken = start_together(8, lambda _: pgtrack.emit("custom"))
        assert pgtrack.flush(10)

        assert taken == [True] * 8
        assert pgtrack.stats().delivered == 8

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("ENABLED", "maybe", "variable PRODUCTGRAPH_ENABLED must be true or false"),
            ("BATCH_SIZE", "x", "variable PRODUCTGRAPH_BATCH_SIZE must be a whole"),
            ("PROJECT_ID", "", "setting `project_id` must be given when pgtrack is"),
            ("SPOOL_DIR", "/dev/null/x", "setting `spool_dir` must be a folder that"),
        ],
    )
    def test_a_wrong_one_disables(
        self,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        name: str,
        text: str,
        message: str,
    ) -> None:
        """A wrong variable is one line in the log, and never an error in the host."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "true")
        monkeypatch.setenv("PRODUCTGRAPH_PROJECT_ID", "p")
        monkeypatch.setenv("PRODUCTGRAPH_ENDPOINT", "console:")
        monkeypatch.setenv(f"PRODUCTGRAPH_{name}", text)
        taken = [pgtrack.emit("custom") for _ in range(3)]
        with pgtrack.session("s"):
            session_id = pgtrack.current().session_id
        (record,) = caplog.records

        assert taken == [False] * 3
        assert session_id == "s"
        assert (record.name, record.levelno) == ("pgtrack", logging.ERROR)
        assert record.getMessage().startswith(f"pgtrack is disabled: {message}")

    def test_not_configured_costs_nothing(self) -> None:
        """No event, no warning, no thread, no HTTP library, and no socket."""
        done = run_script(
            """
            import sys, threading
            import pgtrack

            @pgtrack.track_api
            def handler():
                with pgtrack.session("s"), pgtrack.journey("j") as journey:
                    journey.step("a")
                    pgtrack.track_error(ValueError("x"))
                    return pgtrack.emit("custom"), pgtrack.current().session_id

            assert handler() == (False, "s")
            assert pgtrack.flush(0) and pgtrack.shutdown(0)
            assert pgtrack.stats() == pgtrack.Stats()
            assert threading.active_count() == 1
            assert "httpx" not in sys.modules
            """
        )

        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_disabled_wins_over_configure(self) -> None:
        """`PRODUCTGRAPH_ENABLED=false` silences explicit clients, and reads no more."""
        done = run_script(
            """
            import sys, threading
            import pgtrack

            client = pgtrack.configure(project_id="p", endpoint="https://pg.invalid")
            own = pgtrack.Client(pgtrack.Config(project_id="p", endpoint="garbage"))
            assert not client.emit("custom") and not own.emit("custom")
            assert not pgtrack.emit("custom")
            assert client.stats() == own.stats() == pgtrack.Stats()
            assert threading.active_count() == 1
            assert "httpx" not in sys.modules
            """,
            env={
                "PRODUCTGRAPH_ENABLED": "false",
                "PRODUCTGRAPH_BATCH_SIZE": "garbage",
                "PRODUCTGRAPH_SAMPLE_RATE": "garbage",
            },
        )

        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestVerbs:
    """Their arguments."""

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("is_enabled", [True, False])
    def test_a_misspelt_keyword_is_a_type_error(
        self, verb: str, is_enabled: bool
    ) -> None:
        """An unknown keyword is told as Python does, also when disabled."""
        with capture(enabled=is_enabled), pytest.raises(TypeError) as caught:
            getattr(pgtrack, verb)(*VERBS[verb], zzz=1, naem="x")

        expected = f"{verb}() got an unexpected keyword argument 'naem'"
        assert expected == str(caught.value)

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("owner", [pgtrack, pgtrack.Client])
    def test_help_lists_the_keywords(self, owner: Any, verb: str) -> None:
        """The signature names every field."""
        signature = inspect.signature(getattr(owner, verb))
        shown = signature.parameters["sequence"]

        assert signature.parameters.keys() >= KEYWORDS
        assert shown.kind is inspect.Parameter.KEYWORD_ONLY
        assert (shown.default, shown.annotation) == (None, "int | None")

    def test_a_method_has_no_self(self) -> None:
        """Bound, the signature is without `self`."""
        client = pgtrack.Client(pgtrack.Config())

        assert "self" not in inspect.signature(client.emit).parameters

    def test_user_ids(self) -> None:
        """`identify` takes integers and UUIDs; what is no user id leaves nobody."""
        with capture() as events, pgtrack.session("s"):
            pgtrack.identify(42)
            pgtrack.emit("a")
            pgtrack.identify("not an id")
            pgtrack.emit("b")
            pgtrack.identify(None)
            pgtrack.emit("c")
            counted = pgtrack.stats().adjusted

        assert [event.user_id for event in events] == ["42", None, None]
        assert counted == {"user_id": 1}

    def test_identify_outside_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        """Outside of any session there is nobody to name."""
        from pgtrack import _diagnostics

        with capture() as events:
            pgtrack.identify("u")
            pgtrack.emit("custom")
            _diagnostics.tell()

        assert events[0].user_id is None
        assert "outside of any session" in caplog.text

    def test_the_rest_of_the_surface(self) -> None:
        """`current` and `propagation_headers` are those of the running context."""
        outside = (pgtrack.current(), pgtrack.propagation_headers())
        with pgtrack.session("s", user_id="u"):
            headers = pgtrack.propagation_headers(trusted=True)

        assert outside == (pgtrack.Context(), {})
        assert headers == {"X-Session-ID": "s", "X-User-ID": "u"}


class TestAsync:
    """The verbs that wait, in an event loop."""

    def test_they_do_not_hold_it_up(self, server: Server) -> None:
        """While `aflush` waits, the loop goes on; `ashutdown` ends all."""
        import asyncio

        gate = threading.Event()
        server.script = [hang(gate)]
        pgtrack.configure(**OPTIONS, endpoint=server.url)
        pgtrack.emit("custom")

        async def main() -> tuple[bool, bool]:
            flushing = asyncio.ensure_future(pgtrack.aflush(10))
            assert await asyncio.to_thread(server.wait_for_requests, 1)
            gate.set()
            return await flushing, await pgtrack.ashutdown(10)

        assert asyncio.run(main()) == (True, True)
        assert not pgtrack.emit("late")

    @pytest.mark.parametrize("verb", ["flush", "shutdown", "aflush", "ashutdown"])
    def test_a_timeout_that_is_none(self, verb: str) -> None:
        """Every verb that waits refuses what is no number of seconds, at once."""
        import asyncio

        async def main() -> None:
            done = getattr(pgtrack, verb)(None)
            if asyncio.iscoroutine(done):
                await asyncio.wait_for(done, 5)

        pgtrack.configure(**OPTIONS, endpoint="https://h.invalid")
        with pytest.raises(TypeError, match="timeout must be a number of seconds"):
            asyncio.run(main())
