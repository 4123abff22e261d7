"""Flask: views, streams, blueprints, teardown; by its test client and real servers."""

from __future__ import annotations

import contextlib
import http.client
import logging
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("flask")

import flask
from flask import Blueprint, Flask, abort, stream_with_context
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.serving import make_server

import pgtrack
from harness import run_script, start_together
from pgtrack import _context
from pgtrack.integrations import wsgi
from pgtrack.integrations.flask import install
from pgtrack.testing import Events, capture

if TYPE_CHECKING:
    from collections.abc import Iterator

ANN = {"X-Session-ID": "sess_ann"}


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flask and Werkzeug log what is expected here."""
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    for name in ("werkzeug", "app"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


@pytest.fixture(name="app")
def _app() -> Flask:
    """Return an application with pgtrack, and one view of each kind."""
    app = Flask("app")
    install(app)
    app.add_url_rule("/", "index", session_and_user)
    app.add_url_rule("/users/<int:number>", "user", session_and_user)
    app.add_url_rule("/boom", "boom", boom)
    app.add_url_rule("/stream", "stream", stream)
    app.register_blueprint(shop, url_prefix="/shop/<tenant>")
    return app


def session_and_user(**_: Any) -> str:
    """Answer with the correlation."""
    current = pgtrack.current()
    return f"{current.session_id} {current.user_id}"


def boom(**_: Any) -> str:
    """Fail."""
    raise ValueError("no")


def stream() -> Any:
    """Answer with the session, by steps that need the request's context."""

    def rows() -> Iterator[str]:
        for _ in range(3):
            yield f"{pgtrack.current().session_id} {flask.request.path}\n"
        pgtrack.identify("u_late")

    return stream_with_context(rows()), {"Content-Type": "text/plain"}


shop = Blueprint("shop", __name__)
shop.add_url_rule("/items/<path:item>", "item", session_and_user)
shop.add_url_rule("/boom", "boom", boom)


def told(events: Events) -> list[tuple[Any, ...]]:
    """Return what the events of requests say, and the types of errors."""
    return [
        (e.type, e.error_type)
        if e.type == "error"
        else (e.api_method, e.api_path, e.api_status_code)
        for e in events
    ]


# --- keeps the session ---


class TestKeepsTheSession:
    """In views, streams, blueprints and teardown functions."""

    def test_view(self, app: Flask, events: Events) -> None:
        """A view and its event are in the session of the header."""
        answer = app.test_client().get("/users/7", headers=ANN)

        assert "sess_ann None" == answer.text
        assert ["sess_ann"] == [event.session_id for event in events]
        assert 1 == len(answer.headers.getlist("X-Request-ID"))

    def test_stream(self, app: Flask, events: Events) -> None:
        """Each step of a streamed answer is in the session."""
        answer = app.test_client().get("/stream", headers=ANN)

        assert "sess_ann /stream\n" * 3 == answer.text
        assert [("GET", "/stream", 200)] == told(events)

    def test_blueprint(self, app: Flask, events: Events) -> None:
        """A blueprint's view is, too; the route has the blueprint's prefix."""
        answer = app.test_client().get("/shop/acme/items/a/b", headers=ANN)

        assert "sess_ann None" == answer.text
        assert [("GET", "/shop/<tenant>/items/<path:item>", 200)] == told(events)

    @pytest.mark.parametrize("path", ["/", "/boom", "/stream"])
    def test_teardown(self, path: str, app: Flask, events: Events) -> None:
        """Hooks, teardown functions and `call_on_close` are in the session, too."""
        seen = []

        def look(*_: Any) -> None:
            seen.append(pgtrack.current().session_id)

        @app.before_request
        def begin() -> None:
            look()

        @app.after_request
        def end(response: Any) -> Any:
            look()
            response.call_on_close(look)
            return response

        app.teardown_request(look)
        app.teardown_appcontext(look)
        app.test_client().get(path, headers=ANN).close()

        assert {"sess_ann"} == set(seen)
        assert 5 <= len(seen)  # Flask tears a stream's contexts down twice

    def test_async_view(self, app: Flask, events: Events) -> None:
        """An async view is in the session, and its user is the request's."""
        pytest.importorskip("asgiref")

        @app.get("/async")
        async def view() -> str:
            pgtrack.identify("u_ann")
            return session_and_user()

        answer = app.test_client().get("/async", headers=ANN)

        assert "sess_ann u_ann" == answer.text
        assert [("sess_ann", "u_ann")] == [(e.session_id, e.user_id) for e in events]

    def test_without_headers(self, app: Flask, events: Events) -> None:
        """Each request has a session of its own."""
        client = app.test_client()
        answers = {client.get("/").text for _ in range(3)}

        assert 3 == len(answers)
        assert {"srv-"} == {text[:4] for text in answers}

    def test_unconfigured(self, app: Flask) -> None:
        """Without any configuration the correlation is there."""
        answer = app.test_client().get("/", headers=ANN)

        assert "sess_ann None" == answer.text
        assert "X-Request-ID" in answer.headers


# --- keeps user and journey ---


class TestKeepsUserAndJourney:
    """Whatever part of the request finds it out."""

    def test_user_of_before_request(self, app: Flask, events: Events) -> None:
        """A user that is identified before the view is there in the view."""
        app.before_request(lambda: pgtrack.identify("u_ann"))
        answer = app.test_client().get("/", headers=ANN)

        assert "sess_ann u_ann" == answer.text
        assert ["u_ann"] == [event.user_id for event in events]

    def test_user_that_is_identified_late(self, app: Flask, events: Events) -> None:
        """One that the last step of a stream identifies is the event's."""
        app.test_client().get("/stream", headers=ANN).close()
        read = app.test_client().get("/stream", headers=ANN)

        assert read.data
        assert [None, "u_late"] == [event.user_id for event in events]

    def test_user_of_teardown(self, app: Flask, events: Events) -> None:
        """Teardown runs before the event is told, and may identify as well."""
        app.teardown_request(lambda _: pgtrack.identify("u_ann"))
        app.test_client().get("/shop/acme/items/a")

        assert ["u_ann"] == [event.user_id for event in events]

    def test_journey(self, app: Flask, events: Events) -> None:
        """A journey's steps carry session and user, and it ends with the view."""

        @app.post("/pay")
        @pgtrack.journey("checkout")
        def pay() -> str:
            pgtrack.identify("u_ann")
            step()
            return ""

        @pgtrack.journey_step("payment")
        def step() -> None:
            pass

        app.test_client().post("/pay", headers=ANN)

        events.assert_journey("checkout", steps=["payment"])
        assert {("sess_ann", "u_ann")} == {(e.session_id, e.user_id) for e in events}
        assert ["checkout", None] == [event.journey_id for event in events]

    def test_journey_of_a_blueprint_to_its_teardown(
        self, app: Flask, events: Events
    ) -> None:
        """A blueprint's view, its stream and its teardown step through one journey."""

        @pgtrack.journey_step("item", journey="shopping")
        def step(_: object = None) -> str:
            pgtrack.identify("u_ann")
            return "x"

        def view() -> Any:
            step()
            return (step() for _ in range(2))

        pages = Blueprint("pages", __name__)
        pages.teardown_request(step)
        pages.add_url_rule("/page", "page", view)
        app.register_blueprint(pages)
        answer = app.test_client().get("/page", headers=ANN)

        assert "xx" == answer.text
        events.assert_journey("shopping", steps=["item"] * 4)
        assert {("sess_ann", "u_ann")} == {(e.session_id, e.user_id) for e in events}


# --- two at once never mix ---


@contextlib.contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serve *app* by Werkzeug's threaded server, and yield the port."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def fetch(port: int, path: str, headers: dict[str, str]) -> str:
    """Send one request, and return the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


class TestTwoAtOnceNeverMix:
    """All inside at the same time, by barriers."""

    @pytest.mark.parametrize("path", ["/wait", "/wait-stream", "/shop/acme/wait"])
    def test_threads_in_lockstep(self, path: str, app: Flask, events: Events) -> None:
        """8 threads, 100 requests each, see their own session and user."""
        n, rounds = 8, 100
        barrier = threading.Barrier(n)
        torn_down = []

        def wait(**_: Any) -> str:
            barrier.wait(20)
            pgtrack.identify(flask.request.args["user"])
            barrier.wait(20)
            return session_and_user()

        def wait_stream() -> Any:
            def rows() -> Iterator[str]:
                yield wait()

            return stream_with_context(rows())

        app.add_url_rule("/wait", "wait", wait)
        app.add_url_rule("/wait-stream", "wait-stream", wait_stream)
        own = Blueprint("own", __name__)
        own.add_url_rule("/wait", "wait", wait)
        app.register_blueprint(own, url_prefix="/shop/<tenant>")
        app.teardown_request(lambda _: torn_down.append(session_and_user()))

        def run(i: int) -> list[str]:
            client = app.test_client()
            return [
                client.get(
                    f"{path}?user=u_{i}_{j}", headers={"X-Session-ID": f"sess_{i}_{j}"}
                ).text
                for j in range(rounds)
            ]

        bodies = start_together(n, run)

        expected = [
            [f"sess_{i}_{j} u_{i}_{j}" for j in range(rounds)] for i in range(n)
        ]
        everything = sorted(text for texts in expected for text in texts)
        assert expected == bodies
        # A stream's contexts are torn down before it begins, too.
        assert everything == sorted(t for t in torn_down if not t.endswith("None"))
        assert everything == sorted(f"{e.session_id} {e.user_id}" for e in events)

    def test_over_sockets(self, app: Flask, events: Events) -> None:
        """Werkzeug's threaded server: 8 clients, 20 requests each, half header-less."""
        with serving(app) as port:

            def run(i: int) -> list[str]:
                headers = [{"X-Session-ID": f"sess_{i}_{j}"} for j in range(10)]
                random.Random(i).shuffle(headers)
                return [
                    fetch(port, path, given)
                    for given in headers
                    for path, given in (("/stream", given), ("/", {}))
                ]

            bodies = start_together(8, run)

        streams = [text.split()[::2] for texts in bodies for text in texts[::2]]
        bare = [text.split() for texts in bodies for text in texts[1::2]]
        assert {f"sess_{i}_{j}" for i in range(8) for j in range(10)} == {
            session for (session, _, _) in streams
        }
        assert [] == [sessions for sessions in streams if 1 != len(set(sessions))]
        assert 80 == len({session for session, _ in bare})
        assert {"None"} == {user for _, user in bare}
        assert 160 == len(events)


# --- exception path ---


class TestExceptions:
    """The real error where there is one, and the status that the client saw."""

    @pytest.mark.parametrize("path", ["/boom", "/shop/acme/boom"])
    def test_500(self, path: str, app: Flask, events: Events) -> None:
        """What Flask answers by 500 is told as what it was; the 500 has the id."""
        answer = app.test_client().get(path, headers={"X-Request-ID": "req-1"})

        route = path.replace("acme", "<tenant>")
        assert (500, "req-1") == (answer.status_code, answer.headers["X-Request-ID"])
        assert [("error", "ValueError"), ("GET", route, 500)] == told(events)
        assert "no" == events[0].error_message

    @pytest.mark.parametrize("setting", ["PROPAGATE_EXCEPTIONS", "TESTING", "DEBUG"])
    def test_exceptions_that_escape(
        self, setting: str, app: Flask, events: Events
    ) -> None:
        """Where Flask lets it through it comes out as before, and is told once."""
        app.config[setting] = True
        with pytest.raises(ValueError, match="no") as caught:
            app.test_client().get("/boom")

        assert "boom" == caught.traceback[-1].name
        assert [("error", "ValueError"), ("GET", "/boom", 500)] == told(events)

    def test_debugger(self, app: Flask, events: Events) -> None:
        """Werkzeug's debugger, around the application, shows its page."""
        from werkzeug.debug import DebuggedApplication

        app.debug = True
        with serving(DebuggedApplication(app)) as port:
            page = fetch(port, "/boom", ANN)

        assert "ValueError: no" in page
        assert [("error", "ValueError"), ("GET", "/boom", 500)] == told(events)

    def test_error_handler(self, app: Flask, events: Events) -> None:
        """A handler that makes a 4xx of it leaves no error; one for 500 leaves it."""
        app.register_error_handler(ValueError, lambda _: ("teapot", 418))
        app.add_url_rule("/key", "key", lambda: {}["a"])
        app.register_error_handler(500, lambda _: ("sorry", 503))
        client = app.test_client()
        texts = [client.get(path).text for path in ("/boom", "/key")]

        assert ["teapot", "sorry"] == texts
        assert [
            ("GET", "/boom", 418),
            ("error", "KeyError"),
            ("GET", "/key", 503),
        ] == told(events)

    @pytest.mark.parametrize("status", [404, 403, 500])
    def test_abort(self, status: int, app: Flask, events: Events) -> None:
        """`abort` is a status; from 500 on there is an error of that name."""

        def view(number: int) -> str:
            abort(number)

        app.add_url_rule("/abort/<int:number>", "abort", view)
        app.test_client().get(f"/abort/{status}")

        errors = [("error", "500")] if status == 500 else []
        assert [*errors, ("GET", "/abort/<int:number>", status)] == told(events)

    def test_abort_with_a_response(self, app: Flask, events: Events) -> None:
        """A response that is aborted with is the answer, and its status."""

        @app.get("/abort")
        def view() -> str:
            abort(flask.make_response("no", 409))

        app.test_client().get("/abort")

        assert [("GET", "/abort", 409)] == told(events)

    def test_status_of_a_tuple(self, app: Flask, events: Events) -> None:
        """`return body, 418` is 418, decorated or not."""
        app.add_url_rule("/tea", "tea", pgtrack.track_api(lambda: ("tea", 418)))
        app.add_url_rule("/pot", "pot", lambda: ("pot", 418))
        client = app.test_client()
        client.get("/tea")
        client.get("/pot")

        assert [("GET", "/tea", 418), ("GET", "/pot", 418)] == told(events)

    def test_in_a_stream(self, app: Flask, events: Events) -> None:
        """An exception in the middle of a stream comes out, told with its session."""

        @app.get("/cut")
        def cut() -> Any:
            def rows() -> Iterator[str]:
                yield "a"
                raise ValueError("no")

            return stream_with_context(rows())

        with pytest.raises(ValueError, match="no"):
            _ = app.test_client().get("/cut", headers=ANN).data

        assert [("error", "ValueError"), ("GET", "/cut", 200)] == told(events)
        assert {"sess_ann"} == {event.session_id for event in events}
        assert events[-1].metadata["incomplete"] is True

    def test_in_teardown(self, app: Flask, events: Events) -> None:
        """An exception in a teardown function comes out, and is told."""

        def fail(_: Any) -> None:
            raise KeyError("teardown")

        app.teardown_request(fail)
        with pytest.raises(KeyError):
            app.test_client().get("/")

        assert ("error", "KeyError") == told(events)[0]

    def test_tracked_view_that_fails(self, app: Flask, events: Events) -> None:
        """A decorated view's error is told once, with the function's name."""
        app.add_url_rule("/fails", "fails", pgtrack.track_api(boom))
        app.test_client().get("/fails")

        assert [("error", "ValueError"), ("GET", "/fails", 500)] == told(events)
        assert str(events[0].error_component).endswith("test_flask.boom")


# --- cancellation or disconnect ---


class TestDisconnect:
    """Streams that are not read to their end."""

    @pytest.mark.parametrize("is_begun", [False, True])
    def test_stream_that_is_closed(
        self, is_begun: bool, app: Flask, events: Events
    ) -> None:
        """A stream that is closed early is incomplete, and torn down in its session."""
        seen = []
        app.teardown_request(lambda _: seen.append(pgtrack.current().session_id))
        answer = app.test_client().get("/stream", headers=ANN)
        if is_begun:
            next(answer.iter_encoded())
        answer.close()

        assert [("GET", "/stream", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True
        assert "sess_ann" in seen

    def test_client_that_hangs_up(self, app: Flask, events: Events) -> None:
        """Over a socket the server closes the stream when the client has gone."""
        closed, gone = threading.Event(), threading.Event()

        @app.get("/endless")
        def endless() -> Any:
            def rows() -> Iterator[bytes]:
                try:
                    yield b"a" * 65_536
                    assert gone.wait(10)
                    for _ in range(10_000):
                        yield b"a" * 65_536
                finally:
                    closed.set()

            return rows()

        with serving(app) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/endless")
            answer = connection.getresponse()
            answer.read(10)
            answer.close()
            connection.close()
            gone.set()
            assert closed.wait(10)

        assert [("GET", "/endless", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    def test_head(self, app: Flask, events: Events) -> None:
        """HEAD, which Flask answers by the view for GET, is complete."""
        app.test_client().head("/users/7")

        assert [("HEAD", "/users/<int:number>", 200)] == told(events)
        assert "incomplete" not in events[0].metadata


# --- nothing left behind ---


class TestNothingLeftBehind:
    """The next request in the same thread sees none of the one before."""

    @pytest.mark.parametrize("path", ["/", "/stream", "/shop/acme/boom", "/nowhere"])
    def test_next_request(self, path: str, app: Flask, events: Events) -> None:
        """After any request there is no frame, and the next has its own session."""
        app.before_request(
            lambda: pgtrack.identify("u_ann") if "a" in flask.request.args else None
        )
        client = app.test_client()
        with client.get(f"{path}?a", headers=ANN) as answer:
            assert answer.data
        frame = _context.current_frame()
        text = client.get("/").text

        assert frame is None
        assert text.startswith("srv-")
        assert text.endswith(" None")

    def test_after_what_teardown_leaves_open(self, app: Flask, events: Events) -> None:
        """A session that a teardown function never leaves ends with the request."""
        app.teardown_request(lambda _: pgtrack.session("sess_open").__enter__())
        with app.test_client().get("/stream", headers=ANN) as answer:
            assert answer.data
        frame = _context.current_frame()
        text = app.test_client().get("/").text

        assert frame is None
        assert text.startswith("srv-")
        assert ["sess_ann", events[1].session_id] == [e.session_id for e in events]

    def test_after_what_escapes(self, app: Flask, events: Events) -> None:
        """An exception that escapes leaves no frame either."""
        app.testing = True
        with pytest.raises(ValueError, match="no"):
            app.test_client().get("/boom", headers=ANN)

        assert _context.current_frame() is None

    def test_after_an_async_view(self, app: Flask, events: Events) -> None:
        """What an async view leaves open stays in its own context."""
        pytest.importorskip("asgiref")

        @app.get("/async")
        async def view() -> str:
            pgtrack.session("sess_other").__enter__()
            return ""

        app.test_client().get("/async", headers=ANN)

        assert _context.current_frame() is None
        assert ["sess_ann"] == [event.session_id for event in events]

    def test_nested_test_client(self, app: Flask, events: Events) -> None:
        """A view that calls another in process gets its own request back."""

        @app.get("/outer")
        def outer() -> str:
            inner = app.test_client().get("/", headers={"X-Session-ID": "sess_in"})
            return f"{inner.text} | {session_and_user()}"

        answer = app.test_client().get("/outer", headers=ANN)

        assert "sess_in None | sess_ann None" == answer.text
        assert [("GET", "/", 200), ("GET", "/outer", 200)] == told(events)

    def test_contexts_that_a_test_keeps(self, app: Flask, events: Events) -> None:
        """`with app.test_client()` keeps Flask's contexts, and none of ours."""
        with app.test_client() as client:
            client.get("/users/7", headers=ANN)

            assert "/users/7" == flask.request.path
            assert _context.current_frame() is None
        assert [("GET", "/users/<int:number>", 200)] == told(events)


# --- routes ---


class TestRoutes:
    """The event has the template, from the very start of the path."""

    def test_no_route(self, app: Flask, events: Events) -> None:
        """What fits no rule, or not by its method, has its path."""
        client = app.test_client()
        client.get("/nowhere/7")
        client.post("/users/7")

        assert [("GET", "/nowhere/7", 404), ("POST", "/users/7", 405)] == told(events)

    def test_options(self, app: Flask, events: Events) -> None:
        """Flask's automatic OPTIONS has its route; a preflight passes untouched."""
        client = app.test_client()
        preflight = {
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
        }
        answers = [
            client.options("/users/7", headers=headers) for headers in ({}, preflight)
        ]

        assert [True, False] == ["X-Request-ID" in a.headers for a in answers]
        assert [("OPTIONS", "/users/<int:number>", 200)] == told(events)

    def test_mounted_below_a_path(self, app: Flask, events: Events) -> None:
        """What is mounted outside, as by a server's SCRIPT_NAME, is in the route."""
        client = app.test_client()
        client.get("/users/7", base_url="http://a.example/mount")
        client.get("/nowhere", base_url="http://a.example/mount")

        assert [
            ("GET", "/mount/users/<int:number>", 200),
            ("GET", "/mount/nowhere", 404),
        ] == told(events)

    @pytest.mark.parametrize("both", [False, True])
    def test_application_in_an_application(
        self, both: bool, app: Flask, events: Events
    ) -> None:
        """A mounted application is told by the outer one, once, with its own errors."""
        inner = Flask("app")
        inner.add_url_rule("/items/<item>", "item", session_and_user)
        inner.add_url_rule("/boom", "boom", boom)
        if both:
            install(inner)
        outer = Flask("app")
        outer.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/in": inner})  # type: ignore[method-assign]
        install(outer)
        client = outer.test_client()
        texts = [client.get(path, headers=ANN).text for path in ("/", "/in/items/a")]
        client.get("/in/boom")

        assert ["sess_ann None"] * 2 == texts
        assert [
            ("GET", "/", 200),
            ("GET", "/in/items/<item>", 200),
            ("error", "ValueError"),
            ("GET", "/in/boom", 500),
        ] == told(events)

    def test_proxy_around(self, app: Flask, events: Events) -> None:
        """What is put around later runs outside: the prefix of a proxy is seen."""
        app.wsgi_app = ProxyFix(app.wsgi_app, x_prefix=1)  # type: ignore[method-assign]
        install(app)
        app.test_client().get("/users/7", headers={"X-Forwarded-Prefix": "/api"})

        assert [("GET", "/api/users/<int:number>", 200)] == told(events)

    def test_static_files(
        self, events: Events, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file is served as ever, by the route of all files, and told complete."""
        (tmp_path / "a.txt").write_bytes(b"abc" * 9000)
        app = Flask("app", static_folder=tmp_path, static_url_path="/static")
        install(app)
        with serving(app) as port:
            body = fetch(port, "/static/a.txt", {})

        assert "abc" * 9000 == body
        assert [("GET", "/static/<path:filename>", 200)] == told(events)
        assert "incomplete" not in events[0].metadata

    def test_under_the_plain_middleware(self, events: Events) -> None:
        """The plain middleware around an installed application tells the route, too."""
        app = Flask("app")
        app.add_url_rule("/users/<name>", "user", session_and_user)
        install(app)
        app.wsgi_app = wsgi.Middleware(app.wsgi_app)  # type: ignore[method-assign]
        app.test_client().get("/users/ann")

        assert [("GET", "/users/<name>", 200)] == told(events)

    def test_inside_of_asgi(self, events: Events) -> None:
        """Mounted in an ASGI application, the event has the whole route."""
        a2wsgi = pytest.importorskip("a2wsgi")
        pytest.importorskip("starlette")
        import anyio
        import httpx
        from starlette.applications import Starlette
        from starlette.routing import Mount

        from pgtrack.integrations import asgi

        app = Flask("app")
        install(app)
        app.add_url_rule("/users/<name>", "user", session_and_user)
        inner = a2wsgi.WSGIMiddleware(app)
        outer = asgi.Middleware(Starlette(routes=[Mount("/old", app=inner)]))

        async def ask() -> str:
            transport = httpx.ASGITransport(outer)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://a"
            ) as client:
                return (await client.get("/old/users/ann", headers=ANN)).text

        try:
            text = anyio.run(ask)
        finally:
            inner.executor.shutdown()

        assert "sess_ann None" == text
        assert [("GET", "/old/users/<name>", 200)] == told(events)


# --- install ---


class TestInstall:
    """Once, on an application, with the options of the middleware."""

    def test_twice(self, events: Events) -> None:
        """Again on the same application it does nothing."""
        app = Flask("app")
        install(app)
        before = app.wsgi_app
        install(app, track=False)
        app.test_client().get("/nowhere")

        assert before is app.wsgi_app
        assert 1 == len(events)

    def test_options(self, events: Events) -> None:
        """`track`, `exclude` and `client` are those of the middleware."""
        disabled = pgtrack.Client(pgtrack.Config(project_id="p", enabled=False))
        for options in ({"track": False}, {"exclude": "/a*"}, {"client": disabled}):
            app = Flask("app")
            install(app, **options)  # type: ignore[arg-type]
            app.test_client().get("/a/b")

        assert [] == events

    @pytest.mark.parametrize("wrong", [Blueprint("a", "a"), None, "app"])
    def test_what_is_no_application(self, wrong: Any) -> None:
        """Anything but a Flask application is an error that says so."""
        with pytest.raises(TypeError, match="needs a Flask application") as caught:
            install(wrong)

        assert type(wrong).__name__ in str(caught.value)

    @pytest.mark.parametrize("is_above", [False, True])
    def test_track_api_in_either_order(
        self, is_above: bool, app: Flask, events: Events
    ) -> None:
        """Above or below `@app.route`, `track_api` makes one event of the request."""

        def view() -> str:
            return ""

        if is_above:
            pgtrack.track_api(app.route("/x/<a>")(lambda a: view()))
        else:
            app.route("/x/<a>")(pgtrack.track_api(lambda a: view()))
        app.test_client().get("/x/1")

        assert [("GET", "/x/<a>", 200)] == told(events)

    def test_track_api_with_a_path(self, app: Flask, events: Events) -> None:
        """The path that it is given wins over the route."""
        view = pgtrack.track_api("/named", method="PUT")(lambda: "")
        app.add_url_rule("/x", "x", view)
        app.test_client().get("/x")

        assert [("PUT", "/named", 200)] == told(events)

    def test_commands(self, app: Flask, events: Events) -> None:
        """Commands run as ever, outside of any session."""
        seen = []
        app.cli.command("look")(lambda: seen.append(pgtrack.current().session_id))
        result = app.test_cli_runner().invoke(args=["look"])

        assert (0, [None], []) == (result.exit_code, seen, events)

    def test_contexts_by_hand(self, app: Flask, events: Events) -> None:
        """A context that a test pushes, and what is dispatched in it, is no request."""
        app.testing = True
        with app.test_request_context("/"):
            text = app.full_dispatch_request().get_data(as_text=True)
        with (
            app.test_request_context("/boom"),
            pytest.raises(ValueError, match="no") as caught,
        ):
            app.handle_exception(ValueError("no"))

        assert ("None None", "no") == (text, str(caught.value))
        assert [] == events

    def test_our_own_failure_is_not_the_hosts(
        self, events: Events, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Signals that we cannot handle are nobody's trouble."""
        from pgtrack import _diagnostics

        monkeypatch.setattr(_diagnostics, "reraise", False)
        app = Flask("app")
        app.add_url_rule("/", "index", session_and_user)
        app.add_url_rule("/boom", "boom", boom)
        client = app.test_client()
        environ = {"pgtrack.served": object()}
        statuses = [
            client.get(path, environ_overrides=environ).status_code
            for path in ("/", "/boom")
        ]

        assert [200, 500] == statuses

    def test_flask_missing(self) -> None:
        """Without Flask one error names it and the extra."""
        done = run_script(
            """
            import sys
            from pgtrack.exceptions import MissingDependencyError
            sys.modules["flask"] = None
            try:
                import pgtrack.integrations.flask
            except MissingDependencyError as error:
                print(isinstance(error, ImportError), error)
            """
        )

        assert "" == done.stderr
        assert done.stdout.startswith("True ")
        assert "'flask'" in done.stdout
        assert "pip install 'pgtrack[flask]'" in done.stdout
