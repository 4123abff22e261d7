"""WSGI: under the validator on both sides, and by servers with real sockets."""

from __future__ import annotations

import contextlib
import gc
import http.client
import importlib.util
import io
import itertools
import random
import socket
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from wsgiref import simple_server, util
from wsgiref.handlers import SimpleHandler
from wsgiref.validate import validator

import pytest

import pgtrack
from harness import run_script, start_together
from pgtrack import _context
from pgtrack.integrations.wsgi import Middleware
from pgtrack.testing import Events, capture

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN = [("Content-Type", "text/plain")]
SESSION = {"HTTP_X_SESSION_ID": "sess_ann"}


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


def environ_of(path: str = "/", **keys: Any) -> dict[str, Any]:
    """Return an environ as servers make it."""
    environ: dict[str, Any] = {"QUERY_STRING": "", "SCRIPT_NAME": "", **keys}
    environ["PATH_INFO"] = path
    util.setup_testing_defaults(environ)
    return environ


class Answer:
    """What a server heard: status, headers, body; closed unless told otherwise."""

    def __init__(self, app: Any, environ: dict[str, Any]) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.written = io.BytesIO()
        self.exc_infos: list[Any] = []
        self.environ = environ
        self.result = app(environ, self.start_response)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        """Keep what is told."""
        self.status, self.headers = status, headers
        self.exc_infos.append(exc_info)
        return self.written.write

    def finish(self) -> Answer:
        """Take the body to its end, and close it, as servers must."""
        try:
            self.body = b"".join(self.result)
        finally:
            if hasattr(self.result, "close"):
                self.result.close()
        return self

    def header(self, name: str) -> list[str]:
        """Return the values of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


def ask(app: Any, path: str = "/", **keys: Any) -> Answer:
    """Serve a request by *app*, with the standard validator on both of our sides."""
    served = validator(Middleware(validator(app)))
    return Answer(served, environ_of(path, **keys)).finish()


def told(events: Events) -> list[tuple[Any, ...]]:
    """Return what the events of requests say, and the types of errors."""
    return [
        (e.type, e.error_type)
        if e.type == "error"
        else (e.api_method, e.api_path, e.api_status_code)
        for e in events
    ]


def hello(environ: Any, start_response: Any) -> list[bytes]:
    """Answer with the session."""
    start_response("200 OK", list(PLAIN))
    return [str(pgtrack.current().session_id).encode()]


def stream(environ: Any, start_response: Any) -> Iterator[bytes]:
    """Answer with the session, three times, and start only with the first step."""
    start_response("200 OK", list(PLAIN))
    for _ in range(3):
        yield str(pgtrack.current().session_id).encode() + b" "


class Chunked:
    """An iterable that is no iterator, and notices where it is closed."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.closed_in: list[str | None] = []

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def close(self) -> None:
        """Keep the session that it is closed in."""
        self.closed_in.append(pgtrack.current().session_id)


class Sized(Chunked):
    """One that knows how many there are."""

    def __len__(self) -> int:
        return len(self.chunks)


def answering(body: Any, status: str = "200 OK", *headers: tuple[str, str]) -> Any:
    """Return an application that answers with *body*."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response(status, [*PLAIN, *headers])
        return body

    return app


# --- keeps the session ---


class TestKeepsTheSession:
    """The correlation comes from the headers and is there wherever the app runs."""

    @pytest.mark.parametrize("app", [hello, stream])
    def test_session_is_that_of_the_header(self, app: Any, events: Events) -> None:
        """The application and its event are in the session of the header."""
        answer = ask(app, "/hello", **SESSION)

        assert {"sess_ann"} == set(answer.body.decode().split())
        assert ["sess_ann"] == [event.session_id for event in events]
        assert [("GET", "/hello", 200)] == told(events)

    def test_request_id_of_the_header_is_echoed(self, events: Events) -> None:
        """A valid request id is used, echoed and put into the metadata."""
        answer = ask(hello, HTTP_X_REQUEST_ID="req-1")

        assert ["req-1"] == answer.header("X-Request-ID")
        assert "req-1" == events[0].metadata["request_id"]

    def test_without_headers_all_is_new(self, events: Events) -> None:
        """Each request without headers has a session and request id of its own."""
        first, second = ask(hello), ask(hello)

        assert first.body.startswith(b"srv-")
        assert 2 == len({first.body, second.body})
        assert 2 == len({*first.header("X-Request-ID"), *second.header("X-Request-ID")})

    @pytest.mark.parametrize("body_type", [Chunked, Sized])
    def test_closing_is_in_the_session(self, body_type: Any, events: Events) -> None:
        """The body's `close` is called once, in the session of the request."""
        body = body_type(b"a", b"b")
        ask(answering(body), **SESSION)

        assert ["sess_ann"] == body.closed_in

    def test_iter_is_in_the_session(self, events: Events) -> None:
        """A body whose `__iter__` is where the work is done does it in the session."""

        class Lazy:
            def __iter__(self) -> Iterator[bytes]:
                return iter([str(pgtrack.current().session_id).encode()])

        assert b"sess_ann" == ask(answering(Lazy()), **SESSION).body

    def test_works_unconfigured(self) -> None:
        """Without any configuration the correlation is there, and no thread."""
        answer = ask(hello, **SESSION)

        assert b"sess_ann" == answer.body
        assert 1 == len(answer.header("X-Request-ID"))
        assert 0 == pgtrack.stats().emitted

    def test_environ_with_names_in_unicode(self, events: Events) -> None:
        """The path is told as clients see it: mounts included, UTF-8 decoded."""
        path = "/caf\xe9/\u2713".encode().decode("latin-1")
        ask(hello, path, SCRIPT_NAME="/shop")
        Answer(Middleware(hello), environ_of("/\u2713")).finish()  # not PEP 3333
        Answer(Middleware(hello), environ_of("/\xff")).finish()  # not UTF-8

        assert ["/shop/caf\xe9/\u2713", "/\u2713", "/\ufffd"] == [
            event.api_path for event in events
        ]

    def test_whatever_started_the_server_is_not_inherited(self, events: Events) -> None:
        """Whatever is active around the server is none of the request's business."""
        seen = []

        def app(environ: Any, start_response: Any) -> Any:
            seen.append(pgtrack.current())
            return hello(environ, start_response)

        with pgtrack.session("sess_boot", user_id="u_boot", metadata={"boot": 1}):
            with pgtrack.journey("boot"):
                ask(app)
            after = pgtrack.current()

        assert seen[0].session_id.startswith("srv-")
        assert (None, None, {}) == (
            seen[0].user_id,
            seen[0].journey_id,
            seen[0].metadata,
        )
        assert ("sess_boot", "u_boot") == (after.session_id, after.user_id)


# --- keeps user and journey ---


class TestKeepsUserAndJourney:
    """What is found out in a request belongs to all of it, and to its event."""

    def test_user_that_is_identified_late(self, events: Events) -> None:
        """`identify` in the last step of a streamed body is seen by the event."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            yield b"a"
            pgtrack.identify("u_ann")
            yield b"b"

        ask(app)

        assert ["u_ann"] == [event.user_id for event in events]

    def test_user_of_a_thread(self, events: Events) -> None:
        """`identify` in a thread that is bound to the request is seen by the event."""

        def app(environ: Any, start_response: Any) -> Any:
            work = pgtrack.bind(lambda: pgtrack.identify("u_ann"))
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(10)
            return hello(environ, start_response)

        ask(app)

        assert ["u_ann"] == [event.user_id for event in events]

    def test_user_header(self) -> None:
        """The user of a header counts if the settings trust it, else it does not."""
        keys = {"HTTP_X_USER_ID": "u_ann", "HTTP_X_JOURNEY_ID": "checkout"}
        users = []
        for is_trusted in (False, True):
            with capture(trust_user_header=is_trusted) as events:
                ask(hello, **keys)
            users += [(event.user_id, event.journey_id) for event in events]

        assert [(None, None), ("u_ann", None)] == users

    def test_journey_across_the_steps_of_a_body(self, events: Events) -> None:
        """A journey that is open across steps is there in each, and nowhere else."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            with pgtrack.journey("checkout") as journey:
                yield b"a"
                journey.step("cart")
                yield str(pgtrack.current().journey_id).encode()

        answer = ask(app, **SESSION)

        assert b"acheckout" == answer.body
        events.assert_journey("checkout", steps=["cart"])
        assert ("sess_ann", None) == (events[-1].session_id, events[-1].journey_id)


# --- two at once never mix ---


class TestTwoAtOnceNeverMix:
    """Thousands of requests, interleaved by force."""

    def test_streams_interleaved_in_one_thread(self, events: Events) -> None:
        """2,000 bodies, stepped in any order in one thread, each see their own."""
        app = Middleware(stream)
        bodies = {
            f"sess_{i}": app(environ_of(HTTP_X_SESSION_ID=f"sess_{i}"), print_nothing)
            for i in range(2000)
        }
        steps = [session for session in bodies for _ in range(4)]
        random.Random(1).shuffle(steps)
        seen: dict[str, set[str]] = {session: set() for session in bodies}
        iterators = {session: iter(body) for session, body in bodies.items()}
        outside = set()
        for session in steps:
            seen[session] |= {
                chunk.decode().strip() for chunk in head(iterators, session)
            }
            outside.add(_context.current_frame())
        for body in bodies.values():
            body.close()

        assert {session: {session} for session in bodies} == seen
        assert {None} == outside
        assert sorted(bodies) == sorted(str(event.session_id) for event in events)

    def test_threads_in_lockstep(self, events: Events) -> None:
        """8 threads, 250 requests each, are all inside at once, and keep apart."""
        n, rounds = 8, 250
        barrier = threading.Barrier(n)

        def app(environ: Any, start_response: Any) -> Any:
            user = environ["QUERY_STRING"]
            barrier.wait(20)
            pgtrack.identify(user)
            start_response("200 OK", list(PLAIN))
            barrier.wait(20)
            yield f"{pgtrack.current().session_id} {pgtrack.current().user_id}".encode()

        served = Middleware(app)

        def run(i: int) -> list[bool]:
            found = []
            for j in range(rounds):
                session = f"sess_{i}_{j}"
                answer = Answer(
                    served,
                    environ_of(HTTP_X_SESSION_ID=session, QUERY_STRING=f"u_{i}_{j}"),
                ).finish()
                found.append(f"{session} u_{i}_{j}".encode() == answer.body)
            return found

        results = start_together(n, run)

        assert [[True] * rounds] * n == results
        assert {
            (f"sess_{i}_{j}", f"u_{i}_{j}") for i in range(n) for j in range(rounds)
        } == {(event.session_id, event.user_id) for event in events}


def print_nothing(*args: Any) -> Any:
    """Take the place of `start_response`."""


def head(iterators: dict[str, Any], session: str) -> list[bytes]:
    """Return the next chunk of a body, or none."""
    return [*itertools.islice(iterators[session], 1)]


# --- exception path ---


class TestExceptions:
    """What escapes is told and raised again; the status is what the client saw."""

    def test_in_the_call(self, events: Events) -> None:
        """An exception in the application is an error and a 500, and comes out."""

        def app(environ: Any, start_response: Any) -> Any:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no") as caught:
            ask(app, "/boom", **SESSION)

        assert [("error", "ValueError"), ("GET", "/boom", 500)] == told(events)
        assert {"sess_ann"} == {event.session_id for event in events}
        assert "no" == str(caught.value)

    def test_before_the_first_byte(self, events: Events) -> None:
        """Where nothing was sent, the server makes a 500 of whatever was started."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            yield b""
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            ask(app)

        assert [("error", "ValueError"), ("GET", "/", 500)] == told(events)
        assert "incomplete" not in events[-1].metadata

    def test_in_the_middle(self, events: Events) -> None:
        """Once a byte is out the status stands, and the answer is incomplete."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            yield b"a"
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            ask(app)

        assert [("error", "ValueError"), ("GET", "/", 200)] == told(events)
        assert events[-1].metadata["incomplete"] is True

    def test_after_a_write(self, events: Events) -> None:
        """A byte that was written by `write` is out, too."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))(b"a")
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            ask(app)

        assert [("error", "ValueError"), ("GET", "/", 200)] == told(events)

    def test_in_iter(self, events: Events) -> None:
        """A body that cannot be iterated fails as it did, and is told."""
        answer = Answer(Middleware(answering(None)), environ_of())

        with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
            list(answer.result)
        assert [("error", "TypeError"), ("GET", "/", 500)] == told(events)

    @pytest.mark.parametrize("status", [200, 500])
    def test_in_close(self, status: int, events: Events) -> None:
        """An exception in `close` comes out and is told, behind the request."""

        class Failing(Chunked):
            def close(self) -> None:
                raise ValueError("no")

        app = answering(Failing(b"a"), f"{status} So")
        with pytest.raises(ValueError, match="no"):
            ask(app)

        errors = [("error", "500")] if status == 500 else []
        assert [*errors, ("GET", "/", status), ("error", "ValueError")] == told(events)

    def test_handled_by_the_application(self, events: Events) -> None:
        """A 500 that is started with `exc_info` has the real exception."""

        def app(environ: Any, start_response: Any) -> Any:
            try:
                start_response("200 OK", list(PLAIN))
                raise KeyError("cart")
            except KeyError:
                start_response("503 Sorry", list(PLAIN), sys.exc_info())
            return [b"sorry"]

        answer = ask(app)

        assert [("error", "KeyError"), ("GET", "/", 503)] == told(events)
        assert "503 Sorry" == answer.status
        assert 1 == len(answer.header("X-Request-ID"))
        assert [None, KeyError] == [info and info[0] for info in answer.exc_infos]

    @pytest.mark.parametrize("named", [False, True])
    def test_exc_info_without_an_error(self, named: bool, events: Events) -> None:
        """`exc_info` may be None, and may be given by its name."""

        def app(environ: Any, start_response: Any) -> Any:
            if named:
                start_response("500 Oh", list(PLAIN), exc_info=None)
            else:
                start_response("500 Oh", list(PLAIN), (None, None, None))
            return [b""]

        Answer(Middleware(app), environ_of()).finish()

        assert [("error", "500"), ("GET", "/", 500)] == told(events)

    def test_server_that_refuses_to_start_again(self, events: Events) -> None:
        """With bytes out the server raises, and the status stays what it was."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            yield b"a"
            try:
                raise KeyError("cart")
            except KeyError:
                start_response("500 Oh", list(PLAIN), sys.exc_info())

        def refuse(status: Any, headers: Any, exc_info: Any = None) -> Any:
            if exc_info is not None:
                raise exc_info[1]

        body = Middleware(app)(environ_of(), refuse)
        with pytest.raises(KeyError):
            list(body)

        assert [("error", "KeyError"), ("GET", "/", 200)] == told(events)

    @pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
    def test_end_of_the_process(self, kind: Any, events: Events) -> None:
        """What ends the worker comes out, and is no error: 499."""

        def app(environ: Any, start_response: Any) -> Any:
            raise kind

        with pytest.raises(kind):
            ask(app)

        assert [("GET", "/", 499)] == told(events)

    def test_errors_of_the_generated_traceback_lead_home(self, events: Events) -> None:
        """The traceback ends where the exception was raised."""

        def app(environ: Any, start_response: Any) -> Any:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no") as caught:
            Middleware(app)(environ_of(), print_nothing)

        assert __file__ == str(caught.traceback[-1].path)

    def test_our_own_failure_is_not_the_hosts(
        self, events: Events, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where we cannot begin, the application serves as if we were not there."""
        from pgtrack import _diagnostics
        from pgtrack.integrations import _http

        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(_http, "Request", None)
        answer = ask(hello)

        assert b"None" == answer.body
        assert [] == events


# --- cancellation or disconnect ---


class TestDisconnect:
    """A body that is closed before its end was cut off by the client."""

    def test_closed_early(self, events: Events) -> None:
        """The event says that the answer is incomplete; the status is what was sent."""
        answer = Answer(Middleware(stream), environ_of(**SESSION))
        next(iter(answer.result))
        answer.result.close()
        answer.result.close()

        assert [("GET", "/", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    def test_closed_before_it_began(self, events: Events) -> None:
        """A generator that was never run has no status: 499."""
        answer = Answer(Middleware(stream), environ_of())
        answer.result.close()

        assert [("GET", "/", 499)] == told(events)

    def test_generator_sees_that_it_is_closed(self, events: Events) -> None:
        """The generator's own clean-up runs in the session, with GeneratorExit."""
        seen = []

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            try:
                yield b"a"
                yield b"b"
            except GeneratorExit:
                seen.append(pgtrack.current().session_id)
                raise

        answer = Answer(Middleware(app), environ_of(**SESSION))
        next(iter(answer.result))
        answer.result.close()

        assert ["sess_ann"] == seen

    def test_list_that_is_cut(self, events: Events) -> None:
        """A list that is closed before its last chunk is incomplete as well."""
        answer = Answer(Middleware(answering([b"a", b"b"])), environ_of())
        next(iter(answer.result))
        answer.result.close()

        assert events[0].metadata["incomplete"] is True

    def test_error_of_the_connection_in_write(self, events: Events) -> None:
        """What `write` raises as the client has gone is no error of the application."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))(b"a")
            return []

        def broken(data: bytes) -> None:
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            Middleware(app)(environ_of(), lambda *_: broken)

        assert [("GET", "/", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    def test_error_of_the_connection_that_is_caught(self, events: Events) -> None:
        """An application that goes on in spite of it has not answered in full."""

        def app(environ: Any, start_response: Any) -> Any:
            write = start_response("200 OK", list(PLAIN))
            with contextlib.suppress(OSError):
                write(b"a")
            return []

        def broken(data: bytes) -> None:
            raise BrokenPipeError

        list(Middleware(app)(environ_of(), lambda *_: broken))

        assert [("GET", "/", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    @pytest.mark.parametrize(
        ("method", "status"),
        [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Not Modified")],
    )
    def test_answers_without_a_body(
        self, method: str, status: str, events: Events
    ) -> None:
        """HEAD, 204 and 304 are complete without anybody asking for the body."""
        app = Middleware(answering(iter([b"a"]), status))
        answer = Answer(app, environ_of(REQUEST_METHOD=method))
        answer.result.close()

        assert [(method, "/", int(status[:3]))] == told(events)
        assert "incomplete" not in events[0].metadata

    def test_declared_length_is_the_end(self, events: Events) -> None:
        """With the last declared byte the request is told; nobody need ask further."""
        app = Middleware(
            answering(iter([b"abc", b"de", b"f"]), "200 OK", ("Content-Length", "6"))
        )
        answer = Answer(app, environ_of())
        told_after = [
            (len(events), chunk) for chunk in itertools.islice(answer.result, 3)
        ]
        answer.result.close()

        assert [(0, b"abc"), (0, b"de"), (1, b"f")] == told_after
        assert [{}] == [
            {k: v for k, v in e.metadata.items() if k == "incomplete"} for e in events
        ]

    @pytest.mark.parametrize("length", ["many", "", "9" * 5000, "-1", None])
    def test_length_that_is_none(self, length: Any, events: Events) -> None:
        """A length that is no number is the server's to refuse."""
        app = Middleware(
            answering(iter([b"abc"]), "200 OK", ("Content-Length", length))
        )
        Answer(app, environ_of()).finish()

        assert [("GET", "/", 200)] == told(events)


# --- nothing left behind ---


class TestNothingLeftBehind:
    """Whoever runs next, in the same thread, finds what was there before."""

    @pytest.mark.parametrize("app", [hello, stream])
    def test_after_each_step(self, app: Any, events: Events) -> None:
        """Between the call, the steps and the close there is no frame of ours."""
        frames = []
        answer = Answer(Middleware(app), environ_of(**SESSION))
        frames.append(_context.current_frame())
        frames.extend(_context.current_frame() for _ in answer.result)
        frames.append(_context.current_frame())
        answer.result.close()
        frames.append(_context.current_frame())

        assert {None} == set(frames)

    def test_of_a_session_that_the_application_leaves_open(
        self, events: Events
    ) -> None:
        """A block that the application never leaves goes with the request."""

        def app(environ: Any, start_response: Any) -> Any:
            pgtrack.session("sess_other").__enter__()
            start_response("200 OK", list(PLAIN))
            yield str(pgtrack.current().session_id).encode()
            yield str(pgtrack.current().session_id).encode()

        answer = ask(app, **SESSION)

        assert b"sess_other" * 2 == answer.body
        assert _context.current_frame() is None
        assert ["sess_ann"] == [event.session_id for event in events]

    def test_of_a_session_that_is_open_between_call_and_body(
        self, events: Events
    ) -> None:
        """One that the call opens is there in the body, and not in between."""

        def app(environ: Any, start_response: Any) -> Any:
            pgtrack.session("sess_other").__enter__()
            start_response("200 OK", list(PLAIN))
            return (str(pgtrack.current().session_id).encode() for _ in "ab")

        result = Middleware(app)(environ_of(**SESSION), print_nothing)
        between = _context.current_frame()

        assert (None, [b"sess_other"] * 2) == (between, list(result))
        result.close()

    @pytest.mark.parametrize("in_the_call", [False, True])
    def test_of_a_session_that_is_open_in_a_failure(
        self, in_the_call: bool, events: Events
    ) -> None:
        """One that was open when an exception escaped goes, too."""

        def steps() -> Iterator[bytes]:
            pgtrack.session("sess_other").__enter__()
            yield b"a"
            raise ValueError("no")

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            return list(steps()) if in_the_call else steps()

        with pytest.raises(ValueError, match="no"):
            list(Middleware(app)(environ_of(**SESSION), print_nothing))

        assert _context.current_frame() is None

    @pytest.mark.parametrize("kind", [ValueError, SystemExit])
    def test_after_an_exception(self, kind: Any, events: Events) -> None:
        """What escapes leaves no frame, and the next request has its own session."""

        def app(environ: Any, start_response: Any) -> Any:
            if environ["QUERY_STRING"]:
                return hello(environ, start_response)
            pgtrack.identify("u_ann")
            raise kind

        with pytest.raises(kind):
            ask(app, **SESSION)
        frame = _context.current_frame()
        answer = ask(app, QUERY_STRING="next")

        assert frame is None
        assert answer.body.startswith(b"srv-")
        assert ("u_ann", None) == (events[0].user_id, events[-1].user_id)

    def test_after_a_disconnect(self, events: Events) -> None:
        """A body that is closed, or only forgotten, leaves no frame."""
        for is_closed in (True, False):
            answer = Answer(Middleware(stream), environ_of(**SESSION))
            next(iter(answer.result))
            if is_closed:
                answer.result.close()
            del answer

            assert _context.current_frame() is None

    def test_environ_can_be_used_again(self, events: Events) -> None:
        """The same environ, as tests reuse it, makes a request of its own each time."""
        environ = environ_of()
        bodies = {Answer(Middleware(hello), environ).finish().body for _ in range(3)}

        assert 3 == len(bodies) == len(events)
        assert [] == [key for key in environ if "pgtrack" in key]

    def test_environ_of_a_body_that_is_not_closed(self, events: Events) -> None:
        """It can be used again even if nobody closed the body."""
        environ = environ_of()
        for _ in range(2):
            list(Middleware(stream)(environ, print_nothing))

        assert 2 == len({event.session_id for event in events})

    def test_environ_of_what_failed(self, events: Events) -> None:
        """It can be used again where the application failed before it answered."""
        environ = environ_of()
        for _ in range(2):
            with pytest.raises(TypeError):
                Middleware(list)(environ, print_nothing)  # type: ignore[arg-type, misc]

        assert 2 == len({event.session_id for event in events})

    def test_nothing_keeps_the_exception(self, events: Events) -> None:
        """The exception and what its traceback holds are free once it is handled."""
        import gc
        import weakref

        class HeldError(ValueError):
            pass

        references = []

        def app(environ: Any, start_response: Any) -> Any:
            try:
                error = HeldError("no")
                references.append(weakref.ref(error))
                raise error
            except HeldError:
                start_response("500 Oh", list(PLAIN), sys.exc_info())
            finally:
                del error
            return [b"oh"]

        answer = Answer(Middleware(app), environ_of()).finish()
        answer.exc_infos.clear()
        gc.collect()

        assert [None] == [reference() for reference in references]
        assert ("error", "HeldError") == told(events)[0]


# --- the host notices nothing ---


class TestTheHostNoticesNothing:
    """What servers and applications look at is there to be looked at."""

    def test_headers_are_a_new_list(self, events: Events) -> None:
        """The application's list of headers is not changed."""
        headers = list(PLAIN)

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", headers)
            return [b""]

        answer = ask(app)

        assert PLAIN == headers
        assert PLAIN == answer.headers[:1]
        assert 1 == len(answer.header("X-Request-ID"))

    @pytest.mark.parametrize("name", ["X-Request-ID", "x-request-id"])
    def test_own_request_id_stays(self, name: str, events: Events) -> None:
        """An application that sets the header itself has the last word."""
        answer = ask(answering([b""], "200 OK", (name, "mine")))

        assert ["mine"] == answer.header("X-Request-ID")

    @pytest.mark.parametrize(
        "headers", [(("A", "b"),), None, [None], [()], [(1, "b")], ["ab"]]
    )
    def test_headers_that_are_none(self, headers: Any, events: Events) -> None:
        """Malformed headers reach the server, whose business they are."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", headers)
            return []

        answer = Answer(Middleware(app), environ_of()).finish()

        given = headers if isinstance(headers, list) else [headers]
        assert given[0] == (answer.headers[0] if type(headers) is list else headers)

    @pytest.mark.parametrize("status", ["", "OK", "200", "999 What", 204, None])
    def test_statuses_that_are_none(self, status: Any, events: Events) -> None:
        """A malformed status reaches the server as it is."""
        answer = Answer(Middleware(answering([b"a"], status)), environ_of()).finish()

        assert status == answer.status
        expected = {"200": 200, 204: 204}.get(status, 500)
        assert expected == events[-1].api_status_code

    @pytest.mark.parametrize(
        ("body", "length"),
        [
            ([b"a"], 1),
            ((b"a", b"b"), 2),
            ([], 0),
            (Sized(b"a", b"b"), 2),
            (Chunked(b"a"), None),
            (iter([b"a"]), None),
        ],
    )
    def test_len_is_there_where_it_was(
        self, body: Any, length: int | None, events: Events
    ) -> None:
        """A body has `len()` if, and only if, the application's has it."""
        result = Middleware(answering(body))(environ_of(), print_nothing)

        assert hasattr(result, "__len__") is (length is not None)
        if length is not None:
            assert length == len(result)
        result.close()

    @pytest.mark.parametrize("body_type", [list, Sized])
    def test_length_may_be_added_up_in_between(
        self, body_type: Any, events: Events
    ) -> None:
        """A server may go through a sized body while it sends it, as gevent does."""
        chunks = [b"a", b"bc", b"d"]
        body = chunks if body_type is list else Sized(*chunks)
        result = Middleware(answering(body))(environ_of(), print_nothing)
        sent, told_by_then = [], []
        for chunk in result:
            assert 4 == sum(len(each) for each in result)
            sent.append(chunk)
            told_by_then.append(len(events))
        result.close()

        assert chunks == sent
        assert [0, 0, 1 if body_type is list else 0] == told_by_then
        assert [("GET", "/", 200)] == told(events)

    def test_body_is_asked_for_as_slowly_as_the_server_wants(
        self, events: Events
    ) -> None:
        """A generator runs no further than to the chunk that is sent."""
        reached = []

        def app(environ: Any, start_response: Any) -> Any:
            reached.append("called")
            start_response("200 OK", list(PLAIN))
            for i in range(3):
                reached.append(str(i))
                yield b"a"

        result = Middleware(app)(environ_of(), print_nothing)
        before = list(reached)
        next(result)

        assert ([], ["called", "0"]) == (before, reached)
        result.close()

    def test_endless_iteration_of_a_generator(self, events: Events) -> None:
        """Asked again at its end, a generator's body has ended, as it would have."""
        result = Middleware(stream)(environ_of(), print_nothing)

        assert 3 == len(list(result))
        assert [] == list(iter(result))
        result.close()
        assert 1 == len(events)

    def test_write_is_the_servers(self, events: Events) -> None:
        """What `write` gets reaches the server, in order, before the body."""

        def app(environ: Any, start_response: Any) -> Any:
            write = start_response("200 OK", list(PLAIN))
            write(b"a")
            write(b"b")
            return [b"c"]

        answer = ask(app)

        assert (b"ab", b"c") == (answer.written.getvalue(), answer.body)

    def test_wrong_arguments_of_start_response(self, events: Events) -> None:
        """A call that the server refuses is refused."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN), None, 4)

        with pytest.raises(TypeError, match=r"takes from 3 to 4 .* but 5 were given"):
            Answer(Middleware(app), environ_of())

    def test_chunks_that_are_no_bytes(self, events: Events) -> None:
        """What is no bytes reaches the server, whose business it is."""
        app = answering(iter(["text", None]), "200 OK", ("Content-Length", "4"))
        result = Middleware(app)(environ_of(), print_nothing)

        assert ["text", None] == list(result)
        result.close()

    def test_without_start_response(self, events: Events) -> None:
        """An answer that never starts is the server's to refuse: told as 500."""
        answer = Answer(Middleware(lambda *_: [b"a"]), environ_of()).finish()

        assert "" == answer.status
        assert [("error", "500"), ("GET", "/", 500)] == told(events)

    def test_odd_environ(self, events: Events) -> None:
        """Keys that are missing or of a wrong type cost the event its details alone."""
        environ = {"REQUEST_METHOD": None, "PATH_INFO": 3, "HTTP_X_SESSION_ID": 4}
        Answer(Middleware(hello), environ).finish()

        assert [("_OTHER", "", 200)] == [
            (e.api_method, e.api_path or "", e.api_status_code) for e in events
        ]


class FileWrapper:
    """A server's class for files that it sends by itself."""

    def __init__(self, filelike: Any, block_size: int = 8192) -> None:
        self.filelike = filelike
        self.block_size = block_size

    def __getitem__(self, key: int) -> bytes:
        data: bytes = self.filelike.read(self.block_size)
        if data:
            return data
        raise IndexError


def sending(file: Any) -> Any:
    """Return an application that sends *file* by the server's wrapper."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(PLAIN))
        return environ["wsgi.file_wrapper"](file)

    return app


class TestFiles:
    """`wsgi.file_wrapper` (PEP 3333) goes on to work."""

    @pytest.mark.parametrize("wrapper", [FileWrapper, util.FileWrapper])
    def test_server_finds_its_own_class_and_the_file(
        self, wrapper: Any, events: Events
    ) -> None:
        """The result is an instance of the server's class, with the file in it."""
        file = io.BytesIO(b"abc")
        environ = environ_of(**{"wsgi.file_wrapper": wrapper})
        result: Any = Middleware(sending(file))(environ, print_nothing)

        assert isinstance(result, wrapper)
        assert file is result.filelike
        result.close()
        assert [("GET", "/", 200)] == told(events)
        assert "incomplete" not in events[0].metadata

    @pytest.mark.parametrize("wrapper", [FileWrapper, util.FileWrapper])
    def test_server_that_cannot_send_it_itself(
        self, wrapper: Any, events: Events
    ) -> None:
        """The file can be iterated; it is closed, and complete at its end."""
        environ = environ_of(**{"wsgi.file_wrapper": wrapper})
        file = io.BytesIO(b"abc")
        answer = Answer(Middleware(sending(file)), environ)
        answer.finish()

        assert b"abc" == answer.body
        assert (wrapper is util.FileWrapper) is file.closed
        assert [("GET", "/", 200)] == told(events)

    def test_client_that_goes_while_it_is_iterated(self, events: Events) -> None:
        """A file that was not read to its end is incomplete."""
        environ = environ_of(**{"wsgi.file_wrapper": util.FileWrapper})
        answer = Answer(Middleware(sending(io.BytesIO(b"abc" * 9000))), environ)
        next(iter(answer.result))
        answer.result.close()

        assert events[0].metadata["incomplete"] is True

    def test_wrapper_that_is_a_function(self, events: Events) -> None:
        """What a function wrapped, as in uWSGI, is returned as it is, told at once."""
        file = io.BytesIO(b"abc")
        environ = environ_of(**{"wsgi.file_wrapper": lambda given: given})
        result = Middleware(sending(file))(environ, print_nothing)

        assert file is result
        assert [("GET", "/", 200)] == told(events)
        assert _context.current_frame() is None

    def test_other_bodies_beside_a_function(self, events: Events) -> None:
        """Bodies that the function did not make are served as ever."""
        environ = environ_of(**{"wsgi.file_wrapper": lambda given: given})
        answer = Answer(Middleware(stream), environ).finish()

        assert 3 == len(answer.body.split())
        assert [("GET", "/", 200)] == told(events)

    def test_environ_of_a_function_is_freed(self, events: Events) -> None:
        """Behind a server whose wrapper is a function, too, nothing awaits the gc."""

        def wrapper(given: Any) -> Any:
            return given

        class Environ(dict[str, Any]):
            """One that can be referred to weakly."""

        environ = Environ(environ_of(**{"wsgi.file_wrapper": wrapper}))
        result: Any = Middleware(stream)(environ, print_nothing)
        assert 3 == len([*result])
        result.close()
        assert wrapper is environ["wsgi.file_wrapper"]
        reference = weakref.ref(environ)
        gc.disable()
        try:
            del environ, result

            assert reference() is None
        finally:
            gc.enable()

    def test_simple_handler_sends_it(self, events: Events) -> None:
        """The standard library's handler sees the file as it would without us."""
        handler_files = []

        class Handler(SimpleHandler):
            def sendfile(self) -> bool:
                handler_files.append(self.result.filelike)  # type: ignore[union-attr]
                return False

        out, file = io.BytesIO(), io.BytesIO(b"abc")
        handler = Handler(io.BytesIO(), out, io.StringIO(), environ_of())
        handler.run(Middleware(sending(file)))

        assert [file] == handler_files
        assert out.getvalue().endswith(b"\r\n\r\nabc")
        assert [("GET", "/", 200)] == told(events)


# --- options ---


class TestOptions:
    """`track`, `exclude`, `client`, and middleware in middleware."""

    def test_track_false(self, events: Events) -> None:
        """Without tracking there is correlation, and no event."""
        answer = Answer(Middleware(hello, track=False), environ_of(**SESSION)).finish()

        assert b"sess_ann" == answer.body
        assert 1 == len(answer.header("X-Request-ID"))
        assert [] == events

    def test_excluded_paths(self, events: Events) -> None:
        """Excluded paths make no event; mounts are part of the path."""
        app = Middleware(hello, exclude=("/health", "/shop/static/*"))
        for script_name, path in (
            ("", "/health"),
            ("/shop", "/static/a.js"),
            ("", "/static/a.js"),
        ):
            Answer(app, environ_of(path, SCRIPT_NAME=script_name)).finish()

        assert [("GET", "/static/a.js", 200)] == told(events)

    def test_exclude_must_be_text(self) -> None:
        """A pattern that is no text is an error where it is given."""
        with pytest.raises(TypeError, match=r"exclude must be paths .* \(got int\)"):
            Middleware(hello, exclude=[3])  # type: ignore[list-item]

    def test_client(self, events: Events) -> None:
        """The events go to the client that is given."""
        client = pgtrack.Client(pgtrack.Config(project_id="p", enabled=False))
        Answer(Middleware(hello, client=client), environ_of()).finish()

        assert [] == events

    def test_mounted_twice(self, events: Events) -> None:
        """Of two middlewares the outer one tells the request, once."""
        app = Middleware(Middleware(hello))
        answer = Answer(app, environ_of(**SESSION)).finish()

        assert 1 == len(answer.header("X-Request-ID"))
        assert [("GET", "/", 200)] == told(events)

    def test_inner_one_tells_where_the_outer_one_does_not(self, events: Events) -> None:
        """An outer one without tracking leaves it to the inner one."""
        Answer(Middleware(Middleware(hello), track=False), environ_of()).finish()
        Answer(
            Middleware(Middleware(hello, exclude="/"), track=False), environ_of()
        ).finish()

        assert [("GET", "/", 200)] == told(events)

    def test_preflight(self, events: Events) -> None:
        """A preflight of CORS passes untouched; any other OPTIONS is a request."""
        keys = {"REQUEST_METHOD": "OPTIONS", "HTTP_ORIGIN": "https://a.example"}
        asks = {**keys, "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "POST"}
        preflight, options = ask(hello, **asks), ask(hello, **keys)

        assert (b"None", []) == (preflight.body, preflight.header("X-Request-ID"))
        assert 1 == len(options.header("X-Request-ID"))
        assert [("OPTIONS", "/", 200)] == told(events)

    def test_own_function_of_the_request(self, events: Events) -> None:
        """`track_api` on the application merges: one event, with its path."""

        @pgtrack.track_api("/named", method="PUT")
        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            return [b"a"]

        ask(app)

        assert [("PUT", "/named", 200)] == told(events)

    def test_own_function_behind_start_response(self, events: Events) -> None:
        """Bare applications start first and work then: still the request's own."""

        @pgtrack.track_api("/named")
        def work() -> bytes:
            return b"a"

        def app(environ: Any, start_response: Any) -> Any:
            start_response("201 Created", list(PLAIN))
            return [work()]

        def late(environ: Any, start_response: Any) -> Any:
            start_response("201 Created", list(PLAIN))
            yield work()
            yield work()

        ask(app)
        ask(late)

        assert [
            ("GET", "/named", 201),
            (None, "/named", 200),
            ("GET", "/named", 201),
        ] == told(events)

    def test_method_that_is_none(self, events: Events) -> None:
        """A made-up method is told as `_OTHER`."""
        Answer(Middleware(hello), environ_of(REQUEST_METHOD="get\n")).finish()

        assert ["_OTHER"] == [event.api_method for event in events]


# --- hostile headers ---


def hostile_values() -> list[str]:
    """Return header values that fit no grammar, each with a mark to look for."""
    mark = "EVIL"
    controls = [chr(code) for code in (*range(0x20), 0x7F)]
    latin = [chr(code) for code in range(0x80, 0x100)]
    punctuation = ",;\"'<>(){}[]\\|^`~!#$%&*?"
    fits = {"+", "/", "=", "@"}  # in request ids
    values = [f"{mark}{c}{mark}" for c in (*controls, *latin, *punctuation, " ")]
    values += [f"{c}{mark}" for c in (*controls, *punctuation, *"-_.:", *fits, "\xa0")]
    values += [f"{mark}{c}" for c in (*controls, *punctuation)]
    values += [
        f"{mark},{mark}",
        f"{mark}, {mark}",
        f"sess_ann,{mark}",
        f"{mark}\r\nSet-Cookie: a={mark}",
        f"{mark}%0d%0aSet-Cookie: a",
        f"{mark}\x00",
        f"{mark}" + "a" * 125,
        f"{mark}" * 33,
        f"{mark}" * 50_000,
        f"<script>{mark}</script>",
        f"${{jndi:ldap://{mark}}}",
        f"\u0665{mark}",  # a digit, but none of ASCII
        f"{mark}\ud800",
    ]
    randoms = random.Random(7)
    alphabet = [*controls, *latin, *punctuation, *"abcXYZ019_.:-"]
    for length in (1, 5, 20, 140):
        for _ in range(400):
            middle = "".join(randoms.choices(alphabet, k=length))
            bad = randoms.choice(punctuation)
            values.append(f"{mark}{middle}{bad}{mark}")
    values = [v for v in values if not fits_somewhere(v)]
    return [*dict.fromkeys(values)]


def fits_somewhere(value: str) -> bool:
    """Return whether a value is a good id, once trimmed as HTTP trims."""
    value = value.strip(" \t")
    return _context.is_request_id(value) or _context.is_session_id(value)


class TestHostileHeaders:
    """What does not fit its grammar is as good as absent."""

    def test_nothing_of_them_is_seen(
        self, events: Events, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Of thousands of bad values none is echoed, stored or logged; all count."""
        from pgtrack import _diagnostics

        values = hostile_values()
        app = Middleware(hello)
        seen = []
        for value in values:
            keys = {"HTTP_X_SESSION_ID": value, "HTTP_X_REQUEST_ID": value}
            answer = Answer(app, environ_of(**keys)).finish()
            seen.append(f"{answer.body!r}{answer.headers}")
        _diagnostics.tell()

        assert 1800 < len(values)
        assert [] == [text for text in seen if "EVIL" in text or "sess_ann" in text]
        assert "EVIL" not in f"{[event.to_wire() for event in events]}{caplog.text}"
        assert len(values) == len({event.session_id for event in events})
        adjusted = pgtrack.stats().adjusted
        assert {"session_id": len(values), "request_id": len(values)} == adjusted

    def test_good_values_are_taken(self, events: Events) -> None:
        """The same table's good neighbours are ids, trimmed of spaces and tabs."""
        values = ["a", "A-1", "sess-mm8wlgo0-4f1c9a2e", " padded\t", "a" * 128, "0:_."]
        for value in values:
            ask(hello, HTTP_X_SESSION_ID=value)

        assert [value.strip() for value in values] == [e.session_id for e in events]


# --- WSGI inside of WSGI ---


def test_application_that_calls_itself(events: Events) -> None:
    """A request that an application makes to its own path is one of its own."""

    def app(environ: Any, start_response: Any) -> Any:
        bodies = [str(pgtrack.current().session_id).encode()]
        if environ["QUERY_STRING"]:
            bodies += [
                Answer(served, environ_of("/x")).finish().body,
                Answer(served, environ_of("/x", HTTP_X_SESSION_ID="a b")).finish().body,
            ]
        start_response("200 OK", list(PLAIN))
        return [b" ".join(bodies)]

    served = Middleware(app)
    outer = environ_of("/x", QUERY_STRING="again", HTTP_X_SESSION_ID="sess_outer")
    sessions = Answer(served, outer).finish().body.decode().split()

    assert ["sess_outer", "srv", "srv"] == [text.partition("-")[0] for text in sessions]
    assert {*sessions} == {event.session_id for event in events}
    assert 3 == len(events)


# --- WSGI inside of ASGI ---


def bridges() -> list[Any]:
    """Return what runs WSGI applications in ASGI."""
    import importlib
    import warnings

    found = []
    for module in ("a2wsgi", "starlette.middleware.wsgi"):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(importlib.import_module(module).WSGIMiddleware)
    return found


@pytest.mark.parametrize("bridge", bridges())
class TestInsideOfASGI:
    """With both sides instrumented the outer one serves and tells the request."""

    def get(self, bridge: Any, wsgi: Any, path: str, **headers: str) -> Any:
        """Ask a Starlette application that has *wsgi* mounted at `/old`."""
        pytest.importorskip("starlette")
        import anyio
        import httpx
        from starlette.applications import Starlette
        from starlette.routing import Mount

        from pgtrack.integrations import asgi

        inner = bridge(wsgi)
        app = asgi.Middleware(Starlette(routes=[Mount("/old", app=inner)]))

        async def ask() -> Any:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://test"
            ) as client:
                return await client.get(path, headers=headers)

        try:
            return anyio.run(ask)
        finally:
            if hasattr(inner, "executor"):
                inner.executor.shutdown()

    @pytest.mark.parametrize("headers", [{}, {"X-Session-ID": "sess_ann"}])
    def test_is_told_once(self, bridge: Any, headers: Any, events: Events) -> None:
        """One event, one session, one request id."""
        answer = self.get(bridge, Middleware(hello), "/old/a", **headers)

        assert [200] == [event.api_status_code for event in events]
        assert [answer.text] == [event.session_id for event in events]
        assert 1 == len(answer.headers.get_list("X-Request-ID"))

    def test_another_request_is_another(self, bridge: Any, events: Events) -> None:
        """What an application serves in process is a request of its own."""
        inner = Middleware(hello)

        def app(environ: Any, start_response: Any) -> Any:
            path, ids = "/old/a", {"HTTP_X_SESSION_ID": "sess_other"}
            bodies = [
                Answer(inner, environ_of("/other")).finish().body,
                Answer(inner, environ_of(path, REQUEST_METHOD="POST")).finish().body,
                Answer(inner, environ_of(path, **ids)).finish().body,
                Answer(inner, environ_of(path, HTTP_X_REQUEST_ID="r")).finish().body,
            ]
            start_response("200 OK", list(PLAIN))
            return [b" ".join(bodies)]

        answer = self.get(bridge, app, "/old/a")

        assert 4 == len(set(answer.text.split()))
        assert 5 == len({event.session_id for event in events})


# --- servers ---


class PooledServer(simple_server.WSGIServer):
    """The standard library's server, with threads that serve again and again."""

    request_queue_size = 256

    def __init__(self, *args: Any) -> None:
        self.pool = ThreadPoolExecutor(4)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a thread of the pool."""
        self.pool.submit(self.serve, request, client_address)

    def serve(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        with contextlib.suppress(ConnectionError):
            self.finish_request(request, client_address)
        self.shutdown_request(request)

    def server_close(self) -> None:
        """Wait for the threads."""
        super().server_close()
        self.pool.shutdown()


class Handler(simple_server.WSGIRequestHandler):
    """Quiet; HTTP/1.1, so that `Expect` means something."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serve *app* by a pool of four threads, and yield the port."""
    server = simple_server.make_server("127.0.0.1", 0, app, PooledServer, Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}
    )
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def fetch(port: int, method: str = "GET", path: str = "/", **headers: str) -> Any:
    """Send one request, and return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


class TestServers:
    """Over real sockets."""

    def test_pooled_threads(self, events: Events) -> None:
        """Threads that serve again and again keep nothing of the request before."""

        def app(environ: Any, start_response: Any) -> Any:
            if environ.get("HTTP_X_USER"):
                pgtrack.identify(environ["HTTP_X_USER"])
            start_response("200 OK", list(PLAIN))
            yield f"{pgtrack.current().session_id} ".encode()
            yield str(pgtrack.current().user_id).encode()

        with serving(validator(Middleware(validator(app)))) as port:

            def run(i: int) -> list[bytes]:
                bodies = []
                for j in range(25):
                    ids = {"X_Session_ID": f"sess_{i}_{j}", "X_User": f"u_{i}_{j}"}
                    bodies.append(fetch(port, **(ids if j % 2 else {}))[2])
                return bodies

            bodies = start_together(8, run)

        named = [(i, j) for i in range(8) for j in range(25) if j % 2]
        bare = [bodies[i][j].split() for i in range(8) for j in range(25) if not j % 2]
        assert [f"sess_{i}_{j} u_{i}_{j}".encode() for i, j in named] == [
            bodies[i][j] for i, j in named
        ]
        assert len(bare) == len({session for session, _ in bare})
        assert {b"None"} == {user for _, user in bare}
        assert 200 == len(events) == len({event.session_id for event in events})

    def test_single_chunk_has_its_length(self, events: Events) -> None:
        """A list of one chunk gets its Content-Length, as without us."""
        with serving(Middleware(hello)) as port:
            _, headers, body = fetch(port)

        assert str(len(body)) == headers["Content-Length"]
        assert 1 == len(headers.get_all("X-Request-ID"))

    def test_head(self, events: Events) -> None:
        """HEAD is complete, and told as HEAD."""

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [*PLAIN, ("Content-Length", "3")])
            return []

        with serving(Middleware(app)) as port:
            status, headers, body = fetch(port, "HEAD", "/file")

        assert (200, "3", b"") == (status, headers["Content-Length"], body)
        assert [("HEAD", "/file", 200)] == told(events)
        assert "incomplete" not in events[0].metadata

    def test_expect_continue(self, events: Events) -> None:
        """The client is asked for its body only when the server asks for it."""

        def app(environ: Any, start_response: Any) -> Any:
            body = environ["wsgi.input"].read(3)
            start_response("200 OK", [*PLAIN, ("Content-Length", "3")])
            return [body]

        head = b"POST /up HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
        with (
            serving(Middleware(app)) as port,
            socket.create_connection(("127.0.0.1", port), 10) as connection,
        ):
            connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
            first = connection.recv(4096)
            connection.sendall(b"abc")
            with connection.makefile("rb") as file:
                rest = file.readline() + file.read()

        assert first.startswith(b"HTTP/1.1 100")
        assert rest.endswith(b"abc")
        assert [("POST", "/up", 200)] == told(events)

    def test_exception_before_the_answer(
        self, events: Events, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The server answers by its own 500, which PEP 3333 gives us no hand in."""

        def app(environ: Any, start_response: Any) -> Any:
            raise ValueError("no")

        with serving(Middleware(app)) as port:
            status, headers, _ = fetch(port)

        assert (500, None) == (status, headers["X-Request-ID"])
        assert [("error", "ValueError"), ("GET", "/", 500)] == told(events)
        assert "ValueError: no" in capsys.readouterr().err

    def test_client_that_hangs_up(
        self, events: Events, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A stream whose client goes is closed by the server: incomplete."""
        closed = threading.Event()
        gone = threading.Event()

        class Endless(Chunked):
            def __iter__(self) -> Iterator[bytes]:
                yield b"a" * 65_536
                assert gone.wait(10)
                for _ in range(10_000):
                    yield b"a" * 65_536

            def close(self) -> None:
                closed.set()

        with serving(Middleware(answering(Endless()))) as port:
            connection = socket.create_connection(("127.0.0.1", port), 10)
            connection.sendall(b"GET /sse HTTP/1.1\r\nHost: a\r\n\r\n")
            connection.recv(1024)
            connection.close()
            gone.set()
            assert closed.wait(10)

        assert [("GET", "/sse", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    def test_duration_goes_to_the_end_of_the_stream(self, events: Events) -> None:
        """The time that a stream takes is in its event."""
        clock = {"now": 100.0}

        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", list(PLAIN))
            yield b"a"
            clock["now"] += 2.0
            yield b"b"

        with pytest.MonkeyPatch.context() as patch:
            from pgtrack import _blocks
            from pgtrack.integrations import _http

            for module in (_blocks, _http):
                patch.setattr(module.time, "perf_counter", lambda: clock["now"])
            ask(app)

        assert [2000] == [event.api_duration_ms for event in events]

    @pytest.mark.parametrize(
        ("body", "headers"),
        [(iter([b"abc"]), [("Content-Length", "3")]), ([b"abc"], [])],
    )
    def test_werkzeugs_client(self, body: Any, headers: Any, events: Events) -> None:
        """An answer of known length is told also where nobody reads or closes it."""
        test = pytest.importorskip("werkzeug.test")
        app = answering(body, "200 OK", *headers)
        answer = test.Client(Middleware(app)).get("/a")

        assert [("GET", "/a", 200)] == told(events)
        assert b"abc" == answer.data

    def test_httpx_transport(self, events: Events) -> None:
        """The transport of httpx for WSGI is served as by any server."""
        import httpx

        transport = httpx.WSGITransport(Middleware(stream))
        with httpx.Client(transport=transport, base_url="http://a") as client:
            answer = client.get("/a", headers=[("X-Session-ID", "sess_ann")])

        assert "sess_ann sess_ann sess_ann " == answer.text
        assert [("GET", "/a", 200)] == told(events)

    def test_gevent(self) -> None:
        """Greenlets of one thread keep apart, and lists get their length."""
        if not importlib.util.find_spec("gevent"):  # it changes what imports it
            pytest.skip("gevent is not installed")
        done = run_script(GEVENT)

        assert ("ok\n", "") == (done.stdout, done.stderr)


GEVENT = """
from gevent import monkey; monkey.patch_all()
import warnings
import gevent, http.client
from gevent.pywsgi import WSGIServer
import pgtrack
from pgtrack.integrations.wsgi import Middleware
from pgtrack.testing import capture

everybody = gevent.event.Event()
waiting = []

def app(environ, start_response):
    before = pgtrack.current().session_id
    waiting.append(1)
    if len(waiting) == 50:
        everybody.set()
    assert everybody.wait(20)
    pgtrack.identify("u_" + before)
    start_response("200 OK", [("Content-Type", "text/plain")])
    gevent.sleep(0)
    after = pgtrack.current()
    body = [before.encode(), b" ", after.session_id.encode(), b" ",
            after.user_id.encode()]
    if environ["PATH_INFO"] == "/list":
        return body
    return stream(body)

def stream(body):
    for part in body:
        gevent.sleep(0)
        yield part if pgtrack.current().session_id else b"lost"

def ask(port, i):
    path = "/list" if i % 2 else "/stream"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"X-Session-ID": f"sess_{i}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    assert body == f"sess_{i} sess_{i} u_sess_{i}", body
    assert bool(answer.headers["Content-Length"]) is (path == "/list")
    return True

with capture() as events:
    server = WSGIServer(("127.0.0.1", 0), Middleware(app), log=None)
    server.start()
    jobs = [gevent.spawn(ask, server.server_port, i) for i in range(50)]
    gevent.joinall(jobs, timeout=30)
    server.stop()
    assert all(job.value for job in jobs)
    assert {(f"sess_{i}", f"u_sess_{i}") for i in range(50)} == {
        (e.session_id, e.user_id) for e in events
    }
print("ok")
"""
