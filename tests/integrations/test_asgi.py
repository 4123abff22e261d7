"""Any ASGI application, called by hand: each message, and each way to end."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import http
import logging
import re
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pgtrack
from harness import (
    Call,
    Server,
    assert_harmless,
    hostile_values,
    http_scope,
    start_together,
)
from pgtrack import _context, _diagnostics
from pgtrack.integrations.asgi import Middleware
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgtrack.testing import Events

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


@pytest.fixture(name="backend", params=["asyncio", "trio"])
def _backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def hello(scope, receive, send):
    """Answer 200."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def answering(status, *, body=b"", headers=()):
    """Return an application that answers so."""

    async def app(scope, receive, send):
        start = {"type": "http.response.start", "status": status}
        await send({**start, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


def raising(error):
    """Return an application that raises."""

    async def app(scope, receive, send):
        raise error

    return app


def call(app, /, *args, messages=None, backend="asyncio", **changes) -> Call:
    """Serve one request, and return the exchange."""
    exchange = Call(http_scope(*args, **changes), messages)
    anyio.run(exchange.run, app, backend=backend)
    return exchange


def raised_by(app, /, *args, messages=None, kind=BaseException, **changes):
    """Serve one request that raises; return the exchange and what was raised."""
    exchange = Call(http_scope(*args, **changes), messages)
    with pytest.raises(kind) as caught:
        anyio.run(exchange.run, app)
    return exchange, caught.value


def told(events) -> list[tuple[Any, ...]]:
    """Return what the events say, in order."""
    return [
        (e.api_method, e.api_path, e.api_status_code)
        if e.type == "api.response"
        else (e.type, e.error_type or e.name)
        for e in events
    ]


ANN = [("X-Session-ID", "sess_ann"), ("X-Request-ID", "req-1")]


class TestCorrelation:
    """What comes in, and what goes out."""

    def test_keeps_the_session(self, events, backend):
        """The application runs in the session and request that the headers name."""
        seen = []

        async def app(scope, receive, send):
            seen.append(pgtrack.current())
            pgtrack.emit("custom", name="inside")
            await hello(scope, receive, send)

        exchange = call(Middleware(app), "GET", "/x", ANN, backend=backend)

        assert [("sess_ann", "req-1")] == [(c.session_id, c.request_id) for c in seen]
        assert {("sess_ann", "req-1")} == {
            (e.session_id, e.metadata["request_id"]) for e in events
        }
        assert [("custom", "inside"), ("GET", "/x", 200)] == told(events)
        assert ["req-1"] == exchange.headers("x-request-id")

    def test_keeps_user_and_journey(self, events, backend):
        """A user identified late, in a task or a thread, is the request's."""

        async def app(scope, receive, send):
            with pgtrack.journey("checkout"):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, pgtrack.identify, "u_1")
                pgtrack.emit("custom")
            await hello(scope, receive, send)

        call(Middleware(app), "GET", "/x", ANN, backend=backend)

        assert [("u_1", "checkout"), ("u_1", None)] == [
            (e.user_id, e.journey_id) for e in events
        ]

    def test_fresh(self, events):
        """Without headers each request has a session and a request id of its own."""
        app = Middleware(hello)
        ids = [call(app).headers("x-request-id") for _ in range(3)]

        assert 3 == len({event.session_id for event in events})
        assert ids == [[event.metadata["request_id"]] for event in events]
        assert all(UUID.fullmatch(request_id) for (request_id,) in ids)
        assert all(e.session_id.startswith("srv-") for e in events)

    def test_first_of_two(self, events):
        """Of two headers of a name the first counts."""
        headers = [*ANN, ("x-session-id", "sess_ben"), ("X-REQUEST-ID", "req-2")]
        exchange = call(Middleware(hello), "GET", "/", headers)

        assert ["sess_ann"] == [event.session_id for event in events]
        assert ["req-1"] == exchange.headers("x-request-id")

    def test_untrusted(self, events):
        """A user and a journey that strangers name are nobody's."""
        headers = [*ANN, ("X-User-ID", "u_admin"), ("X-Journey-ID", "checkout")]
        call(Middleware(hello), "GET", "/", headers)

        assert [(None, None)] == [(e.user_id, e.journey_id) for e in events]

    def test_trusted_user(self):
        """With `trust_user_header` the user is the header's."""
        with capture(trust_user_header=True) as events:
            call(Middleware(hello), "GET", "/", [*ANN, ("X-User-ID", "u_ann")])

        assert ["u_ann"] == [event.user_id for event in events]

    def test_nothing_from_outside(self, events):
        """A request inherits nothing of the session that the server was started in."""
        with pgtrack.session("sess_main", user_id="u_main", metadata={"a": 1}):
            call(Middleware(hello))

        (event,) = events
        assert event.session_id.startswith("srv-")
        assert event.user_id is None
        assert "a" not in event.metadata

    @pytest.mark.parametrize("is_failing", [False, True])
    def test_nothing_left_behind(self, events, backend, is_failing):
        """After a request its context has no frame, and its scope nothing of ours."""
        scope = http_scope("GET", "/", ANN)
        before = dict(scope)

        async def main():
            app = raising(KeyError("x")) if is_failing else hello
            exchange = Call(scope)
            with contextlib.suppress(KeyError):
                await exchange.run(Middleware(app))
            left = _context.current_frame()
            await Call(http_scope()).run(Middleware(hello))
            return left

        left = anyio.run(main, backend=backend)

        assert left is None
        assert before == scope
        assert events[-1].session_id.startswith("srv-")

    def test_nothing_left_open(self, events, backend):
        """What the application itself leaves open ends with the request."""

        async def careless(scope, receive, send):
            pgtrack.session("sess_open").__enter__()
            await hello(scope, receive, send)

        async def main():
            await Call(http_scope("GET", "/", ANN)).run(Middleware(careless))
            return _context.current_frame()

        assert anyio.run(main, backend=backend) is None
        assert ["sess_ann"] == [event.session_id for event in events]

    def test_own_header(self, events):
        """An application that echoes a request id of its own is left alone."""
        app = answering(200, headers=[(b"X-Request-Id", b"mine")])
        exchange = call(Middleware(app), "GET", "/", ANN)

        assert ["mine"] == exchange.headers("x-request-id")

    def test_message_is_not_changed(self, events):
        """The application's own message stays as it was."""
        start = {"type": "http.response.start", "status": 204, "headers": []}
        end = {"type": "http.response.body"}

        async def app(scope, receive, send):
            await send(start)
            await send(end)

        exchange = call(Middleware(app), "GET", "/", ANN)

        assert [] == start["headers"]
        assert exchange.sent[1] is end

    def test_start_without_headers(self, events):
        """An answer without headers gets one."""

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

        exchange = call(Middleware(app), "GET", "/", ANN)

        assert [(b"x-request-id", b"req-1")] == exchange.start["headers"]


class TestMixing:
    """Requests at once keep to themselves."""

    def test_never_mix(self, events, backend):
        """Two thousand requests that all wait for each other keep to themselves."""
        count, rounds = 200, 3
        arrived = 0

        async def app(scope, receive, send):
            nonlocal arrived
            number = scope["path"]
            for _ in range(rounds):
                await anyio.lowlevel.checkpoint()
                pgtrack.identify(f"u{number}")
                pgtrack.emit("custom", name=number)
            arrived += 1
            if arrived == count:
                everybody.set()
            await everybody.wait()
            await hello(scope, receive, send)

        async def one(number):
            headers = [("X-Session-ID", f"s{number}"), ("X-Request-ID", f"r{number}")]
            exchange = Call(http_scope("GET", f"/{number}", headers))
            await exchange.run(Middleware(app))
            assert [f"r{number}"] == exchange.headers("x-request-id")

        async def main():
            nonlocal everybody, arrived
            for start in range(0, 2000, count):
                everybody, arrived = anyio.Event(), 0
                with anyio.fail_after(30):
                    async with anyio.create_task_group() as tasks:
                        for number in range(start, start + count):
                            tasks.start_soon(one, number)

        everybody: Any = None
        anyio.run(main, backend=backend)

        assert 2000 * (rounds + 1) == len(events)
        assert {(f"s{n}", f"r{n}", f"u/{n}", f"/{n}") for n in range(2000)} == {
            (e.session_id, e.metadata["request_id"], e.user_id, e.name or e.api_path)
            for e in events
        }

    def test_threads(self, events):
        """Event loops in several threads share one middleware."""
        app = Middleware(hello)

        def serve(i):
            for n in range(50):
                call(app, "GET", f"/{i}/{n}", [("X-Session-ID", f"s-{i}-{n}")])

        start_together(4, serve)

        expected = {(f"s-{i}-{n}", f"/{i}/{n}") for i in range(4) for n in range(50)}
        assert expected == {(e.session_id, e.api_path) for e in events}
        assert 200 == len(events)


class TestResponse:
    """Exactly one event, with what the client saw."""

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "M-SEARCH"])
    def test_method(self, events, method):
        """The method is the request's."""
        call(Middleware(hello), method, "/x")

        assert [(method, "/x", 200)] == told(events)

    @pytest.mark.parametrize("method", ["get", "", "A B", "ABCDEFGHIJK", "GÉT", None])
    def test_odd_method(self, events, method):
        """A method that is none is told as such, and not as it came."""
        call(Middleware(hello), "GET", "/x", method=method)

        assert [("_OTHER", "/x", 200)] == told(events)

    @pytest.mark.parametrize("status", [200, 204, 301, 304, 404, 499])
    def test_status(self, events, status):
        """The status is the answer's; below 500 it makes no error."""
        call(Middleware(answering(status)), "GET", "/x")

        assert [("GET", "/x", status)] == told(events)
        assert "incomplete" not in events[0].metadata

    def test_status_of_an_enum(self, events):
        """A status may be an `HTTPStatus`, which is passed on as it is."""
        exchange = call(Middleware(answering(http.HTTPStatus.CREATED)), "GET", "/x")

        assert [("GET", "/x", 201)] == told(events)
        assert exchange.start["status"] is http.HTTPStatus.CREATED

    @pytest.mark.parametrize("status", [None, "200", 99, 600, True])
    def test_bad_status(self, events, status):
        """What is no status goes to the server as it is, and is counted."""
        exchange = call(Middleware(answering(status)), "GET", "/x")

        assert [("error", "500"), ("GET", "/x", 500)] == told(events)
        assert exchange.start["status"] is status
        assert 1 == pgtrack.stats().adjusted["status_code"]

    def test_failed(self, events):
        """A 503 that the application answers makes an error as well."""
        call(Middleware(answering(503)), "GET", "/x", ANN)

        assert [("error", "503"), ("GET", "/x", 503)] == told(events)
        assert "Service Unavailable" == events[0].error_message

    def test_duration_to_the_end_of_the_body(self, events, monkeypatch):
        """The duration ends with the last part of the body."""
        now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: now)

        async def app(scope, receive, send):
            nonlocal now
            now += 1
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for more in (True, True, False):
                now += 1
                await send({"type": "http.response.body", "more_body": more})
            now += 100

        call(Middleware(app))

        assert [4000] == [event.api_duration_ms for event in events]

    def test_told_before_background_work(self, events):
        """The event is there once the answer is out; what follows is not waited for."""
        seen = []

        async def app(scope, receive, send):
            await hello(scope, receive, send)
            seen.append(told(events))
            pgtrack.emit("custom", name="afterwards")

        call(Middleware(app), "GET", "/x", ANN)

        assert [[("GET", "/x", 200)]] == seen
        assert [("GET", "/x", 200), ("custom", "afterwards")] == told(events)
        assert {"sess_ann"} == {event.session_id for event in events}

    @pytest.mark.parametrize("kind", ["pathsend", "zerocopysend"])
    def test_other_bodies(self, events, kind):
        """A file that the server sends by itself ends the answer, too."""

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": f"http.response.{kind}", "path": "/f"})
            pgtrack.emit("custom", name="afterwards")

        call(Middleware(app), "GET", "/x")

        assert [("GET", "/x", 200), ("custom", "afterwards")] == told(events)

    def test_expect(self, events):
        """Nothing is received but by the application: `Expect` is the server's."""
        received = []

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 417, "headers": []})
            await send({"type": "http.response.body"})

        class Listening(Call):
            async def receive(self):
                received.append(True)
                return await super().receive()

        exchange = Listening(http_scope("POST", "/x", [("Expect", "100-continue")]))
        anyio.run(exchange.run, Middleware(app))

        assert [] == received
        assert [("POST", "/x", 417)] == told(events)

    def test_body_arrives(self, events):
        """The application receives each message as it is."""
        messages = [
            {"type": "http.request", "body": b"a", "more_body": True},
            {"type": "http.request", "body": b"b", "more_body": False},
        ]
        seen = []

        async def app(scope, receive, send):
            seen.extend([await receive(), await receive()])
            await hello(scope, receive, send)

        call(Middleware(app), "POST", "/x", messages=messages)

        assert all(a is b for a, b in zip(messages, seen, strict=True))

    def test_never_answers(self, events):
        """An application that returns without an answer is told as the server's 500."""

        async def app(scope, receive, send):
            pass

        exchange = call(Middleware(app), "GET", "/x")

        assert [("error", "500"), ("GET", "/x", 500)] == told(events)
        assert [] == exchange.sent

    def test_never_ends(self, events):
        """An answer that is not completed is told as incomplete."""

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "more_body": True})

        call(Middleware(app), "GET", "/x")

        assert [("GET", "/x", 200)] == told(events)
        assert [True] == [event.metadata.get("incomplete") for event in events]

    def test_track_api_merges(self, events):
        """The request's own function makes no event; its path and method win."""

        @pgtrack.track_api
        async def nested():
            pass

        @pgtrack.track_api("/users/{id}", method="PUT")
        async def endpoint():
            await nested()

        async def app(scope, receive, send):
            await endpoint()
            await answering(201)(scope, receive, send)
            await endpoint()

        call(Middleware(app), "POST", "/users/1")

        name = f"{__name__}.TestResponse.test_track_api_merges.<locals>.nested"
        assert [
            (None, name, 200),
            ("PUT", "/users/{id}", 201),
            (None, name, 200),
            ("PUT", "/users/{id}", 200),
        ] == told(events)

    def test_mapped_exception(self, events):
        """What the own function raised is the error of a 500, not of a 400."""
        error = ValueError("no card")

        @pgtrack.track_api
        async def endpoint():
            raise error

        async def app(scope, receive, send):
            with pytest.raises(ValueError, match="no card"):
                await endpoint()
            await answering(int(scope["path"][1:]))(scope, receive, send)

        call(Middleware(app), "GET", "/400")
        call(Middleware(app), "GET", "/503")

        assert [
            ("GET", "/400", 400),
            ("error", "ValueError"),
            ("GET", "/503", 503),
        ] == told(events)
        name = f"{__name__}.TestResponse.test_mapped_exception.<locals>.endpoint"
        assert name == events[1].error_component


class TestErrors:
    """What escapes from the application."""

    def test_answers_as_the_outermost(self, events):
        """Where nobody else answers, the 500 has the request id; the error goes on."""
        error = ValueError("boom")
        exchange, caught = raised_by(Middleware(raising(error)), "GET", "/x", ANN)

        assert caught is error
        assert (500, b"Internal Server Error") == (exchange.status, exchange.body)
        assert ["req-1"] == exchange.headers("x-request-id")
        assert ["close"] == exchange.headers("connection")
        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)

    def test_http2(self, events):
        """HTTP/2 knows no `Connection` header."""
        app = Middleware(raising(ValueError("boom")))
        exchange, _ = raised_by(app, "GET", "/x", ANN, http_version="2")

        assert [] == exchange.headers("connection")

    def test_inside_a_framework(self, events):
        """Inside of a framework, which has an answer of its own, none is given."""
        app = Middleware(raising(ValueError("boom")))
        exchange, _ = raised_by(app, "GET", "/x", ANN, app=object())

        assert [] == exchange.sent
        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)

    def test_after_the_answer_began(self, events):
        """What escapes in the middle of an answer cuts it, and is told."""

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ValueError

        exchange, _ = raised_by(Middleware(app), "GET", "/x")

        assert 1 == len(exchange.sent)
        assert [("error", "ValueError"), ("GET", "/x", 200)] == told(events)
        assert events[1].metadata["incomplete"] is True

    def test_after_the_answer(self, events):
        """What background work raises is an error of its own."""

        async def app(scope, receive, send):
            await hello(scope, receive, send)
            raise ValueError

        raised_by(Middleware(app), "GET", "/x")

        assert [("GET", "/x", 200), ("error", "ValueError")] == told(events)
        assert "incomplete" not in events[0].metadata

    def test_framework_answers_and_raises(self, events):
        """A 500 that a framework answers, and raises what it is of, is one error."""

        async def app(scope, receive, send):
            await answering(500)(scope, receive, send)
            raise ValueError

        raised_by(Middleware(app), "GET", "/x")

        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)

    def test_once(self, events):
        """An exception is told once, whatever it passes on its way."""

        @pgtrack.track_api
        async def inner():
            raise ValueError

        @pgtrack.journey_step("pay", journey="checkout")
        async def step():
            await inner()

        async def app(scope, receive, send):
            with pgtrack.api_call("GET", "/inside"):
                await step()

        raised_by(Middleware(Middleware(app)), "GET", "/x")

        assert 1 == len(events.of_type("error"))
        assert ("GET", "/x", 500) == told(events)[-1]

    def test_server_refuses_our_answer(self, events):
        """If the 500 cannot be sent either, the application's error goes on alone."""

        class Broken(Call):
            async def send(self, message):
                raise RuntimeError

        exchange = Broken(http_scope("GET", "/x"))
        with pytest.raises(ValueError, match="boom") as caught:
            anyio.run(exchange.run, Middleware(raising(ValueError("boom"))))

        assert caught.value.__context__ is None
        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)

    def test_cancelled_during_our_answer(self, events):
        """Who is cancelled while the 500 is sent raises what the 500 is of."""

        class Stuck(Call):
            async def send(self, message):
                task.cancel()
                await asyncio.sleep(60)

        async def main():
            nonlocal task
            exchange = Stuck(http_scope("GET", "/x"))
            task = asyncio.current_task()
            with pytest.raises(ValueError, match="boom"):
                await exchange.run(Middleware(raising(ValueError("boom"))))
            return _context.current_frame()

        task: Any = None

        assert asyncio.run(main()) is None
        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)

    def test_failure_of_one_that_was_cancelled(self, events, backend):
        """What is raised in the face of a cancellation comes out in its stead."""

        class Slow(Call):
            async def send(self, message):
                await anyio.lowlevel.checkpoint()

        async def app(scope, receive, send):
            scope_of_task.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                raise ValueError("boom")

        async def main():
            nonlocal scope_of_task
            with (
                pytest.raises(ValueError, match="boom"),
                anyio.CancelScope() as scope_of_task,
            ):
                await Slow(http_scope("GET", "/x")).run(Middleware(app))

        scope_of_task: Any = None
        anyio.run(main, backend=backend)

        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_end_of_the_program_during_our_answer(self, events, error):
        """The end of the program goes before what the 500 is of."""

        class Ending(Call):
            async def send(self, message):
                raise error

        exchange = Ending(http_scope("GET", "/x"))
        step = exchange.run(Middleware(raising(ValueError("boom"))))
        with pytest.raises(error):
            step.send(None)

        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_no_failures(self, events, error):
        """How a program ends makes no error, and no answer."""

        async def main():
            coroutine = exchange.run(Middleware(raising(error())))
            with pytest.raises(error):
                coroutine.send(None)

        exchange = Call(http_scope("GET", "/x"))
        anyio.run(main)

        assert [("GET", "/x", 499)] == told(events)
        assert [] == exchange.sent


class TestDisconnect:
    """Clients and tasks that leave early."""

    def test_cancelled_before_the_answer(self, events, backend):
        """A task that is cancelled is told as 499, without an error."""

        async def app(scope, receive, send):
            scope_of_task.cancel()
            await anyio.sleep_forever()

        async def main():
            nonlocal scope_of_task
            with anyio.CancelScope() as scope_of_task:
                await Call(http_scope("GET", "/x", ANN)).run(Middleware(app))
            return _context.current_frame()

        scope_of_task: Any = None

        assert anyio.run(main, backend=backend) is None
        assert scope_of_task.cancelled_caught
        assert [("GET", "/x", 499)] == told(events)
        assert ["sess_ann"] == [event.session_id for event in events]

    def test_cancelled_within_the_answer(self, events, backend):
        """A task that is cancelled within the answer leaves it incomplete."""

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            scope_of_task.cancel()
            await anyio.sleep_forever()

        async def main():
            nonlocal scope_of_task
            with anyio.CancelScope() as scope_of_task:
                await Call(http_scope("GET", "/x")).run(Middleware(app))

        scope_of_task: Any = None
        anyio.run(main, backend=backend)

        assert [("GET", "/x", 200)] == told(events)
        assert [True] == [event.metadata.get("incomplete") for event in events]

    def test_gone_before_the_answer(self, events):
        """A client that hung up before the answer saw none: 499, whatever it is."""

        async def app(scope, receive, send):
            assert "http.disconnect" == (await receive())["type"]
            if scope["path"] != "/silent":
                await hello(scope, receive, send)

        for path in ("/answered", "/silent"):
            call(Middleware(app), "GET", path, messages=[])

        assert [("GET", "/answered", 499), ("GET", "/silent", 499)] == told(events)
        assert all("incomplete" not in event.metadata for event in events)

    def test_error_of_one_that_is_gone(self, events):
        """What fails for a client that has gone is an error nevertheless; no answer."""

        async def app(scope, receive, send):
            await receive()
            raise ValueError

        exchange, _ = raised_by(Middleware(app), "GET", "/x", messages=[])

        assert [("error", "ValueError"), ("GET", "/x", 499)] == told(events)
        assert [] == exchange.sent

    def test_gone_within_the_answer(self, events):
        """A client that hangs up within the answer leaves it incomplete."""

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await receive()
            await send({"type": "http.response.body"})

        call(Middleware(app), "GET", "/x", messages=[])

        assert [("GET", "/x", 200)] == told(events)
        assert [True] == [event.metadata.get("incomplete") for event in events]

    def test_gone_after_the_answer(self, events):
        """Servers say that the client has gone once the answer is out: that is none."""

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 503, "headers": []})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send, {"type": "http.response.body"})
                await sending.wait()
                await receive()
                received.set()

        class Slow(Call):
            async def send(self, message):
                await super().send(message)
                if message["type"] == "http.response.body":
                    sending.set()
                    await received.wait()

        async def main():
            nonlocal sending, received
            sending, received = anyio.Event(), anyio.Event()
            with anyio.fail_after(10):
                await Slow(http_scope("GET", "/x"), []).run(Middleware(app))

        sending: Any = None
        received: Any = None
        anyio.run(main)

        assert [("error", "503"), ("GET", "/x", 503)] == told(events)
        assert "incomplete" not in events[1].metadata

    def test_send_says_so(self, events):
        """A server that refuses to send, as nobody is there, makes no error."""

        class HungUpError(OSError):
            pass

        class Refusing(Call):
            async def send(self, message):
                if message["type"] == "http.response.body":
                    raise HungUpError
                await super().send(message)

        exchange = Refusing(http_scope("GET", "/x"))
        with pytest.raises(HungUpError):
            anyio.run(exchange.run, Middleware(hello))

        assert [("GET", "/x", 200)] == told(events)
        assert [True] == [event.metadata.get("incomplete") for event in events]


class TestWebSocket:
    """Connections that stay."""

    def exchange(self, messages) -> Call:
        """Return a connection that receives these messages."""
        scope = http_scope("GET", "/ws", ANN, type="websocket", subprotocols=[])
        del scope["method"]
        return Call(scope, messages)

    def test_correlation(self, events, backend):
        """Each message is in the session; none makes an event, nor does the end."""
        seen = []

        async def app(scope, receive, send):
            await send({"type": "websocket.accept"})
            while (await receive())["type"] == "websocket.receive":
                seen.append(pgtrack.current().session_id)
                await send({"type": "websocket.send", "text": "x"})

        messages = [{"type": "websocket.receive", "text": str(i)} for i in range(5)]
        exchange = self.exchange(messages)
        anyio.run(exchange.run, Middleware(app), backend=backend)

        assert ["sess_ann"] * 5 == seen
        assert ["req-1"] == exchange.headers("x-request-id")
        assert [] == events

    def test_error(self, events):
        """What escapes is an error, and there is no answer of ours."""

        async def app(scope, receive, send):
            await send({"type": "websocket.accept", "headers": []})
            msg = "boom"
            raise ValueError(msg)

        exchange = self.exchange([])
        with pytest.raises(ValueError, match="boom"):
            anyio.run(exchange.run, Middleware(app))

        assert [("error", "ValueError")] == told(events)
        assert ["sess_ann"] == [event.session_id for event in events]
        assert 1 == len(exchange.sent)

    def test_cancelled(self, events):
        """A connection that is cancelled leaves nothing, and is no error."""

        async def main():
            with anyio.CancelScope() as task:

                async def app(scope, receive, send):
                    task.cancel()
                    await anyio.sleep_forever()

                await self.exchange([]).run(Middleware(app))
            return _context.current_frame()

        assert anyio.run(main) is None
        assert [] == events

    def test_calls_within(self, events):
        """Functions that are tracked tell each message, if one wants that."""

        @pgtrack.track_api("/ws/message", method="WS")
        async def handle():
            pass

        async def app(scope, receive, send):
            await send({"type": "websocket.accept"})
            await handle()
            await handle()

        anyio.run(self.exchange([]).run, Middleware(app))

        assert [("WS", "/ws/message", 200)] * 2 == told(events)

    def test_denial(self, events):
        """A connection that is refused with an answer of HTTP's makes no event."""

        async def app(scope, receive, send):
            start = {"type": "websocket.http.response.start", "status": 403}
            await send({**start, "headers": []})
            await send({"type": "websocket.http.response.body"})

        exchange = self.exchange([])
        anyio.run(exchange.run, Middleware(app))

        assert [] == events
        assert [(b"x-request-id", b"req-1")] == exchange.sent[0]["headers"]


class TestUntouched:
    """What is none of ours passes as it is."""

    @pytest.mark.parametrize("kind", ["http2.push", "custom", None])
    def test_other_scopes(self, events, kind):
        """Other scopes pass with the very same callables."""
        seen: list[Any] = []

        async def app(*args):
            seen.extend(args)

        exchange = Call({"type": kind, "x": 1})
        given = exchange.scope, exchange.receive, exchange.send
        anyio.run(Middleware(app), *given)

        assert list(given) == seen
        assert seen[0] is exchange.scope
        assert {"type": kind, "x": 1} == exchange.scope

    def test_scope_without_a_type(self, events):
        """A scope that is none is the application's to refuse."""

        async def app(scope, receive, send):
            raise KeyError(scope["type"])

        with pytest.raises(KeyError, match="type"):
            anyio.run(Call({}).run, Middleware(app))

    def test_preflight(self, events):
        """A preflight of CORS passes untouched, and makes no event."""
        seen: list[Any] = []

        async def app(*args):
            seen.extend(args)

        headers = [("Origin", "https://a"), ("Access-Control-Request-Method", "GET")]
        exchange = Call(http_scope("OPTIONS", "/x", headers))
        given = exchange.scope, exchange.receive, exchange.send
        anyio.run(Middleware(app), *given)

        assert list(given) == seen
        assert [] == events

    @pytest.mark.parametrize("headers", [[], [("Origin", "https://a")]])
    def test_other_options(self, events, headers):
        """Any other OPTIONS is a request."""
        call(Middleware(hello), "OPTIONS", "/x", headers)

        assert [("OPTIONS", "/x", 200)] == told(events)

    @pytest.mark.parametrize("method", ["GET", "OPTIONS"])
    @pytest.mark.parametrize(
        "headers", [None, 3, [()], [(b"x",)], [("x-session-id", 3)], [3], [b"", None]]
    )
    def test_malformed_headers(self, events, method, headers):
        """Whatever a server puts in the place of the headers, the application runs."""
        exchange = call(Middleware(hello), method, "/x", headers=headers)

        assert 200 == exchange.status
        assert [(method, "/x", 200)] == told(events)

    def test_headers_that_are_read_once(self, events):
        """Headers that can be iterated once are left for the application."""
        seen = []

        async def app(scope, receive, send):
            seen.extend(scope["headers"])
            await hello(scope, receive, send)

        pairs = [(b"x-session-id", b"sess_ann")]
        call(Middleware(app), "OPTIONS", "/x", headers=iter(pairs))

        assert pairs == seen
        assert ["sess_ann"] == [event.session_id for event in events]

    @pytest.mark.parametrize("headers", [[()], [("a", "b")], [3], [(3, b"")]])
    def test_malformed_answer(self, events, headers):
        """Headers of an answer that are none go on to the server."""
        exchange = call(Middleware(answering(200, headers=headers)), "GET", "/x", ANN)

        assert [*headers, (b"x-request-id", b"req-1")] == exchange.start["headers"]

    @pytest.mark.parametrize("path", [None, b"/x", 3])
    def test_malformed_path(self, events, path):
        """A path that is none is told as empty."""
        call(Middleware(Middleware(hello), track=False), path=path)
        call(Middleware(hello, exclude="/y"), path=path)

        assert [200, 200] == [event.api_status_code for event in events]

    def test_no_keys_at_all(self, events):
        """A scope with nothing but its type is served."""
        anyio.run(Call({"type": "http"}).run, Middleware(hello))

        assert [200] == [event.api_status_code for event in events]

    def test_our_own_error(self, events, monkeypatch):
        """An error of our own lets the request pass, and is noted."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr("pgtrack.integrations._http.Served", None)
        exchange = call(Middleware(hello), "GET", "/x")

        assert 200 == exchange.status
        assert ["internal error"] == [note[:14] for note in _diagnostics._notes]

    def test_returns_what_the_application_returns(self):
        """The middleware returns None, as applications do."""
        with capture():
            assert anyio.run(Middleware(hello), *_parts(Call(http_scope()))) is None


def _parts(exchange: Call) -> tuple[Any, Any, Any]:
    return exchange.scope, exchange.receive, exchange.send


class TestLifespan:
    """The beginning and the end of the application."""

    @staticmethod
    def lifespan() -> Call:
        """Return a server's start and shutdown."""
        kinds = ("lifespan.startup", "lifespan.shutdown")
        return Call({"type": "lifespan", "state": {}}, [{"type": k} for k in kinds])

    @staticmethod
    async def app(scope, receive, send):
        """Start and stop, with an event."""
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        pgtrack.emit("custom", name="bye")
        await send({"type": "lifespan.shutdown.complete"})

    @pytest.mark.parametrize("is_own", [False, True])
    def test_flushes(self, backend, is_own):
        """What was emitted is out before the shutdown is said to be complete."""
        seen = []

        class Watching(Call):
            async def send(self, message):
                seen.append((message["type"], len(server.events)))

        options = {"project_id": "p", "batch_interval": 3600.0}
        with Server() as server:
            first = pgtrack.configure(endpoint=server.url, **options)
            with pgtrack.Client(pgtrack.Config(endpoint=server.url, **options)) as own:
                own.emit("custom")
                first.emit("custom")
                lifespan = self.lifespan()
                exchange = Watching(lifespan.scope, lifespan._messages)
                app = Middleware(self.app, client=own if is_own else None)
                anyio.run(exchange.run, app, backend=backend)
                pgtrack.shutdown()

        assert [
            ("lifespan.startup.complete", 0),
            ("lifespan.shutdown.complete", 3),
        ] == seen

    @pytest.mark.parametrize("is_enabled", [True, False])
    def test_flushes_retired_clients(self, is_enabled):
        """Clients that another took over from, or none, deliver as well."""
        options: dict[str, Any] = {"project_id": "p", "batch_interval": 3600.0}
        held = threading.Event()
        with Server() as server:
            server.script = [
                lambda exchange: (exchange.wait(held), exchange.answer())[1]
            ]
            first = pgtrack.configure(endpoint=server.url, **options)
            first.emit("custom")
            pgtrack.configure(
                endpoint=server.url, enabled=is_enabled, batch_size=7, **options
            )
            assert server.wait_for_requests(1)  # it is being sent
            releaser = threading.Timer(0.05, held.set)
            releaser.start()
            exchange = self.lifespan()
            anyio.run(exchange.run, Middleware(hello_lifespan))
            delivered = len(server.events)
            releaser.join(10)
            pgtrack.shutdown()

        assert 1 == delivered

    def test_not_on_the_event_loop(self):
        """The event loop goes on while the events are delivered."""
        ticks = []

        async def main():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.lifespan().run, Middleware(self.app))
                assert await anyio.to_thread.run_sync(server.wait_for_requests, 1)
                ticks.append(len(server.events))
                released.set()

        released = threading.Event()
        with Server() as server:
            server.default = lambda exchange: (
                exchange.wait(released),
                exchange.answer(),
            )[1]
            pgtrack.configure(
                project_id="p", endpoint=server.url, batch_interval=3600.0
            )
            anyio.run(main)

            assert [0] == ticks
            assert 1 == len(server.events)
            pgtrack.shutdown()

    def test_deadline(self):
        """A server that hangs holds up the shutdown for `exit_timeout` at most."""
        released = threading.Event()
        with Server() as server:
            server.default = lambda exchange: exchange.wait(released)
            pgtrack.configure(project_id="p", endpoint=server.url, exit_timeout=0.1)
            exchange = self.lifespan()
            anyio.run(exchange.run, Middleware(self.app))
            released.set()
            pgtrack.shutdown(0)

        kinds = [message["type"] for message in exchange.sent]
        assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == kinds

    def test_nothing_to_flush(self, events, monkeypatch):
        """Without anything to deliver nobody waits, and no thread is started."""
        monkeypatch.setattr("pgtrack._process.deliver", None)
        exchange = self.lifespan()
        anyio.run(exchange.run, Middleware(hello_lifespan))

        kinds = [message["type"] for message in exchange.sent]
        assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == kinds

    def test_our_own_error(self, events, monkeypatch):
        """An error of our own does not keep the server from shutting down."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr("pgtrack._process.begin_delivery", None)
        exchange = self.lifespan()
        anyio.run(exchange.run, Middleware(self.app))

        assert "lifespan.shutdown.complete" == exchange.sent[-1]["type"]

    def test_application_without_lifespan(self, events):
        """An application that refuses it may go on to do so."""
        app = Middleware(raising(ValueError("no lifespan")))
        with pytest.raises(ValueError, match="no lifespan"):
            anyio.run(self.lifespan().run, app)

        assert [] == events


async def hello_lifespan(scope, receive, send):
    """Start and stop."""
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})


class TestOptions:
    """What can be chosen, and where it is mounted."""

    def test_no_track(self, events):
        """`track=False` leaves the correlation, and no event of the request's."""
        seen = []

        async def app(scope, receive, send):
            seen.append(pgtrack.current().session_id)
            raise ValueError

        exchange, _ = raised_by(Middleware(app, track=False), "GET", "/x", ANN)

        assert ["sess_ann"] == seen
        assert ["req-1"] == exchange.headers("x-request-id")
        assert [] == events

    def test_no_track_but_track_api(self, events):
        """A function that is tracked then makes the event, with the request's path."""

        @pgtrack.track_api
        async def endpoint():
            pass

        async def app(scope, receive, send):
            await endpoint()
            await hello(scope, receive, send)

        call(Middleware(app, track=False), "GET", "/x", ANN)

        assert [("GET", "/x", 200)] == told(events)

    @pytest.mark.parametrize(
        ("exclude", "paths"),
        [
            ("/health", ["/health/", "/healthy", "/static", "/static/a/b\n", "/x"]),
            (["/health", "/static/*"], ["/health/", "/healthy", "/static", "/x"]),
            (("*",), []),
            (["/he.lth", "/[a-z]*"], None),
            ((), None),
            ("", None),
        ],
    )
    def test_exclude(self, events, exclude, paths):
        """Excluded paths keep their correlation and echo, and make no event."""
        every = ["/health", "/health/", "/healthy", "/static", "/static/a/b\n", "/x"]
        app = Middleware(hello, exclude=exclude)
        echoes = [call(app, "GET", path, ANN).headers("x-request-id") for path in every]

        assert [["req-1"]] * 6 == echoes
        assert (every if paths is None else paths) == [e.api_path for e in events]

    @pytest.mark.parametrize("exclude", [[1], [b"/x"], [re.compile("x")]])
    def test_wrong_exclude(self, exclude):
        """A pattern that is no text is refused at once."""
        with pytest.raises(TypeError, match=r"exclude must be paths .* \(got \w+\)"):
            Middleware(hello, exclude=exclude)

    @pytest.mark.parametrize(
        ("tracks", "count"),
        [
            ([True, True], 1),
            ([False, True], 1),
            ([True, False], 1),
            ([False, False], 0),
            ([False, False, True, True], 1),
        ],
    )
    def test_mounted_twice(self, events, tracks, count):
        """Of several middlewares one tells the request, and one echoes its id."""
        app: Any = hello
        for track in reversed(tracks):
            app = Middleware(app, track=track)
        exchange = call(app, "GET", "/x", ANN)

        assert [("GET", "/x", 200)] * count == told(events)
        assert ["req-1"] == exchange.headers("x-request-id")

    def test_mounted_twice_and_excluded(self, events):
        """An inner middleware heeds its own excluded paths, where it would tell."""
        app = Middleware(Middleware(hello, exclude="/x"), track=False)
        call(app, "GET", "/x")
        call(app, "GET", "/y")

        assert [("GET", "/y", 200)] == told(events)

    def test_mounted_twice_and_failing(self, events):
        """What escapes through both is answered, and told, once."""
        error = ValueError("boom")
        app = Middleware(Middleware(raising(error)), track=False)
        exchange, caught = raised_by(app, "GET", "/x")

        assert caught is error
        assert [("error", "ValueError"), ("GET", "/x", 500)] == told(events)
        assert 2 == len(exchange.sent)

    def test_copied_scope(self, events):
        """A middleware in between that copies the scope hides nothing."""

        async def copying(scope, receive, send):
            await Middleware(hello)(dict(scope), receive, send)

        call(Middleware(copying), "GET", "/x", ANN)

        assert [("GET", "/x", 200)] == told(events)

    def test_own_client(self, events):
        """`client=` tells the requests, and the default client does not."""
        with Server() as server:
            config = pgtrack.Config(project_id="own", endpoint=server.url)
            with pgtrack.Client(config) as own:
                call(Middleware(hello, client=own), "GET", "/x", ANN)
            sent = server.events

        assert [] == events
        assert [("sess_ann", "/x")] == [(e["session.id"], e["api.path"]) for e in sent]

    def test_own_client_inside(self, events):
        """The client of the middleware that tells is the one that tells all."""
        with Server() as server:
            config = pgtrack.Config(project_id="own", endpoint=server.url)
            with pgtrack.Client(config) as own:
                inner = Middleware(raising(ValueError("boom")), client=own)
                raised_by(Middleware(inner, track=False), "GET", "/x", ANN)
            sent = server.events

        assert [] == events
        assert ["error", "api.response"] == [event["event.type"] for event in sent]

    def test_own_client_inside_of_one_that_tells(self, events):
        """A request that the outer middleware tells is none of the inner's client."""
        with Server() as server:
            config = pgtrack.Config(project_id="own", endpoint=server.url)
            with pgtrack.Client(config) as own:
                call(Middleware(Middleware(hello, client=own)), "GET", "/x")
            sent = server.events

        assert [("GET", "/x", 200)] == told(events)
        assert [] == sent

    def test_configured_later(self):
        """The default client is looked up at each request."""
        app = Middleware(hello)
        call(app, "GET", "/early")
        with capture() as events:
            call(app, "GET", "/late")

        assert [("GET", "/late", 200)] == told(events)

    def test_not_configured(self):
        """Without a client the correlation goes on: no events, no thread, no line."""
        before = threading.active_count()
        seen = []

        async def app(scope, receive, send):
            seen.append((pgtrack.current().session_id, threading.active_count()))
            await hello(scope, receive, send)

        exchange = call(Middleware(app), "GET", "/x", ANN)

        assert [("sess_ann", before)] == seen
        assert ["req-1"] == exchange.headers("x-request-id")
        assert 0 == pgtrack.stats().emitted
        assert {} == _diagnostics._notes

    def test_uuids_only(self):
        """With `session_id_format="uuid"` only UUIDs are sessions, fresh ones too."""
        with capture(session_id_format="uuid") as events:
            call(Middleware(hello), "GET", "/x", ANN)

        assert UUID.fullmatch(events[0].session_id)


class TestBackground:
    """Work that outlives the request, or runs beside it."""

    def test_tasks_keep_the_session(self, events):
        """A task that outlives the request keeps its session, and is told apart."""

        @pgtrack.track_api
        async def later():
            await release.wait()
            pgtrack.emit("custom", name="later")

        async def app(scope, receive, send):
            nonlocal task
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
            await hello(scope, receive, send)

        async def main():
            nonlocal release
            release = asyncio.Event()
            await Call(http_scope("GET", "/x", ANN)).run(Middleware(app))
            await Call(http_scope("GET", "/y")).run(Middleware(hello))
            release.set()
            await task

        release: Any = None
        task: Any = None
        asyncio.run(main())

        assert ["sess_ann", "srv-", "sess_ann"] == [
            e.session_id[:4] if e.session_id.startswith("srv-") else e.session_id
            for e in events
        ]

    def test_context_of_others(self, events):
        """A request that is served in a context of another leaves that as it was."""

        async def main():
            with pgtrack.session("sess_main"):
                context = contextvars.copy_context()
                exchange = Call(http_scope("GET", "/x", ANN))
                task = asyncio.get_running_loop().create_task(
                    exchange.run(Middleware(hello)), context=context
                )
                await task
                return context.run(lambda: pgtrack.current().session_id)

        if not hasattr(asyncio, "TaskGroup"):
            pytest.skip("tasks take a context since Python 3.11")

        assert "sess_main" == asyncio.run(main())


class TestHostileHeaders:
    """Nothing but ids gets anywhere."""

    @staticmethod
    def sender():
        """Return what sends one request in process."""
        app = Middleware(hello)

        def send(headers: dict[str, str]) -> str | None:
            exchange = Call(http_scope("GET", "/x", headers.items()))
            coroutine = exchange.run(app)
            with pytest.raises(StopIteration):
                coroutine.send(None)
            (echoed,) = exchange.headers("x-request-id")
            assert 1 == len(exchange.start["headers"])
            return echoed

        return send

    def test_thousands(self, events, caplog):
        """None of thousands is echoed, logged or stored unless it is an id."""
        caplog.set_level(logging.DEBUG)

        def take():
            taken = [event.to_wire() for event in events]
            events.clear()
            return taken

        values = hostile_values(6000)
        ids = assert_harmless(values, self.sender(), take, lambda: caplog.text)
        _diagnostics.tell()

        assert 500 < ids < len(values) - 500
        assert pgtrack.stats().adjusted["session_id"] == len(values) - ids
        assert not any(value in caplog.text for value in values if len(value) > 8)

    @settings(
        max_examples=1000,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(value=st.text(st.characters(max_codepoint=255), max_size=200))
    def test_any(self, events, value):
        """Nor is any other value that a header can carry."""

        def take():
            taken = [event.to_wire() for event in events]
            events.clear()
            return taken

        assert_harmless([value], self.sender(), take)
