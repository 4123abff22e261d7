"""Starlette and FastAPI, the real ones, called in process and under uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import pytest

import pgtrack
from harness import Call, http_scope, run_script, uvicorn_server
from pgtrack import _context
from pgtrack.testing import capture

pytest.importorskip("fastapi")  # and with it Starlette

import fastapi
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware as Use
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute

from pgtrack.integrations import asgi
from pgtrack.integrations.starlette import install

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request
    from starlette.websockets import WebSocket

    from pgtrack.testing import Events

ANN = [("X-Session-ID", "sess_ann"), ("X-Request-ID", "req-1")]


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


@pytest.fixture(name="backend", params=["asyncio", "trio"])
def _backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def call(app, /, *args, messages=None, backend="asyncio", **changes) -> Call:
    """Serve one request, and return the exchange; what escapes is left out."""
    client = Staying if messages is None else Call
    exchange = client(http_scope(*args, **changes), messages)

    async def serve():
        with contextlib.suppress(RuntimeError):
            await exchange.run(app)

    anyio.run(serve, backend=backend)
    return exchange


class Staying(Call):
    """A client that waits for the end of the answer."""

    async def receive(self):
        """Return the next message, and wait after the last."""
        if not self._messages:
            await anyio.sleep_forever()
        return await super().receive()


def installed(app: Any, **options: Any) -> Any:
    """Return *app* with pgtrack installed."""
    assert install(app, **options) is None
    return app


def told(events) -> list[tuple[Any, ...]]:
    """Return what the events say, in order."""
    return [
        (e.api_method, e.api_path, e.api_status_code)
        if e.type == "api.response"
        else (e.type, e.error_type or e.name)
        for e in events
    ]


def kept(events) -> set[tuple[Any, ...]]:
    """Return the correlation of all events."""
    return {(e.session_id, e.metadata["request_id"], e.user_id) for e in events}


def ok(request: Request) -> Response:
    """Answer in a thread."""
    return PlainTextResponse("ok")


async def fail(request: Request) -> Response:
    """Do not answer."""
    msg = "boom"
    raise RuntimeError(msg)


class Custom(BaseHTTPMiddleware):
    """A middleware that runs the application in a task of its own."""

    async def dispatch(self, request, call_next):
        """Mark the answer."""
        response = await call_next(request)
        response.headers["x-custom"] = str(pgtrack.current().session_id)
        return response


class Copying:
    """A middleware that hands a copy of the scope on."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        """Serve."""
        await self.app(dict(scope), receive, send)


# --- installation ----------------------------------------------------------------


class TestInstall:
    """Around everything, once."""

    @pytest.mark.parametrize("is_started", [False, True])
    def test_outermost(self, events, is_started):
        """A 500 carries the ids as well, also where the application served before."""
        app = Starlette(routes=[Route("/x", fail)], middleware=[Use(Custom)])
        if is_started:
            call(app, "GET", "/x")
        install(app)
        exchange = call(app, "GET", "/x", ANN)

        assert 500 == exchange.status
        assert ["req-1"] == exchange.headers("x-request-id")
        assert [("error", "RuntimeError"), ("GET", "/x", 500)] == told(events)
        assert {("sess_ann", "req-1", None)} == kept(events)

    def test_error_page(self, events):
        """The application's own page for a 500 is the answer, ids and all."""

        async def page(request, error):
            return PlainTextResponse(str(pgtrack.current().request_id), 500)

        app = Starlette(routes=[Route("/x", fail)], exception_handlers={500: page})
        exchange = call(installed(app), "GET", "/x", ANN)

        assert b"req-1" == exchange.body
        assert ["req-1"] == exchange.headers("x-request-id")

    def test_middleware_that_is_added_later(self, events):
        """What is added later runs inside."""
        app = installed(Starlette(routes=[Route("/x", ok)]))
        app.add_middleware(Custom)
        exchange = call(app, "GET", "/x", ANN)

        assert ["sess_ann"] == exchange.headers("x-custom")

    @pytest.mark.parametrize("is_started", [False, True])
    def test_idempotent(self, events, is_started):
        """Installed again it is there once, with the options of the first time."""
        app = installed(Starlette(routes=[Route("/x", ok)]))
        if is_started:
            call(app, "GET", "/x")
            events.clear()
        install(app, track=False)
        stack = app.build_middleware_stack()
        call(app, "GET", "/x", ANN)

        assert [("GET", "/x", 200)] == told(events)
        assert not isinstance(stack.app, asgi.Middleware)

    def test_applications_are_apart(self, events):
        """Another application is none of its business."""
        installed(Starlette())
        exchange = call(Starlette(routes=[Route("/x", ok)]), "GET", "/x", ANN)

        assert [] == exchange.headers("x-request-id")
        assert [] == events

    def test_options(self, events):
        """`track` and `exclude` do what they do for the middleware."""
        routes = [Route("/x", ok), Route("/health", ok)]
        quiet = installed(Starlette(routes=routes), track=False)
        most = installed(Starlette(routes=routes), exclude=["/health"])
        for app in (quiet, most):
            for path in ("/x", "/health"):
                exchange = call(app, "GET", path, ANN)
                assert ["req-1"] == exchange.headers("x-request-id")

        assert [("GET", "/x", 200)] == told(events)

    def test_wrong_application(self):
        """Whatever is no Starlette is refused, with the way to go."""
        given: Any = asgi.Middleware(Starlette())
        with pytest.raises(TypeError, match=r"\(got Middleware\).*integrations\.asgi"):
            install(given)

    def test_wrong_exclude(self):
        """A pattern that is no text is refused, and nothing is installed."""
        app = Starlette()
        wrong: Any = [1]
        with pytest.raises(TypeError, match="exclude must be paths"):
            install(app, exclude=wrong)

        assert not isinstance(app.build_middleware_stack(), asgi.Middleware)

    def test_collected(self):
        """An application that is not used any more is collected."""
        import gc
        import weakref

        reference = weakref.ref(installed(Starlette()))
        gc.collect()

        assert reference() is None

    def test_missing_package(self):
        """Where Starlette is missing one error names it and the extra."""
        ended = run_script(
            """
            import sys
            sys.modules["starlette"] = None
            try:
                import pgtrack.integrations.starlette
            except ImportError as error:
                print(type(error).__name__, error)
            """
        )

        assert "" == ended.stderr
        assert ended.stdout.startswith("MissingDependencyError ")
        assert "'starlette'" in ended.stdout
        assert "pip install 'pgtrack[starlette]'" in ended.stdout

    def test_asgi_needs_nothing(self):
        """The plain middleware and its look at routes import no framework."""
        ended = run_script(
            """
            import sys
            import pgtrack.integrations.asgi
            print({"starlette", "fastapi", "anyio", "httpx"} & set(sys.modules))
            """
        )

        assert ("set()\n", "") == (ended.stdout, ended.stderr)

    def test_not_configured(self):
        """Without a client the correlation goes on."""
        app = installed(Starlette(routes=[Route("/x", ok)]))
        exchange = call(app, "GET", "/x", ANN)

        assert ["req-1"] == exchange.headers("x-request-id")
        assert 0 == pgtrack.stats().emitted


# --- route templates -------------------------------------------------------------


class Foreign:
    """An ASGI application that knows nothing of routes."""

    async def __call__(self, scope, receive, send):
        """Answer."""
        await PlainTextResponse("foreign")(scope, receive, send)


def starlette_app(**options: Any) -> Starlette:
    """Return an application with every kind of route that Starlette has."""
    users = [
        Route("/", ok, methods=["GET"]),
        Route("/{id:int}", ok, methods=["GET", "DELETE"]),
        Route("/{id:int}", ok, methods=["PUT"]),
        Mount("/{id:int}/files", routes=[Route("/{name:path}", ok)]),
    ]
    sub = Starlette(routes=[Route("/items/{item}", ok), Mount("/deep", Router(users))])
    routes = [
        Route("/plain", ok),
        Route("/api/users/{id}", ok, methods=["GET"]),
        Route("/slash/", ok),
        Route("/raises/{status:int}", raises),
        Mount("/v1", routes=users, name="v1"),
        Mount("/sub", app=sub),
        Mount("/tenants/{tenant}", app=sub),
        Mount("/wrapped", app=Copying(Starlette(routes=users))),
        Mount("/used", routes=users, middleware=[Use(Custom)]),
        Mount("/static", app=Foreign()),
        Host("{tenant}.example.org", app=Router([Route("/hosted/{id}", ok)])),
        Host("foreign.example.com", app=Foreign()),
    ]
    return Starlette(routes=routes, **options)


def raises(request: Request) -> Response:
    """Raise the status."""
    raise HTTPException(request.path_params["status"])


STARLETTE = [
    ("GET", "/plain", "/plain", 200),
    ("HEAD", "/plain", "/plain", 200),
    ("GET", "/api/users/42", "/api/users/{id}", 200),
    ("POST", "/api/users/42", "/api/users/{id}", 405),
    ("GET", "/raises/404", "/raises/{status}", 404),
    ("GET", "/slash", "/slash", 307),
    ("GET", "/plain/", "/plain/", 307),
    ("GET", "/v1/", "/v1/", 200),
    ("GET", "/v1/7", "/v1/{id}", 200),
    ("PUT", "/v1/7", "/v1/{id}", 200),
    ("PATCH", "/v1/7", "/v1/{id}", 405),
    ("GET", "/v1/seven", "/v1/seven", 404),
    ("GET", "/v1/7/files/a/b", "/v1/{id}/files/{name}", 200),
    ("GET", "/sub/items/1", "/sub/items/{item}", 200),
    ("GET", "/sub/nothing", "/sub/nothing", 404),
    ("GET", "/sub/deep/7", "/sub/deep/{id}", 200),
    ("GET", "/tenants/acme/items/1", "/tenants/{tenant}/items/{item}", 200),
    ("GET", "/tenants/acme/deep/7/files/x", None, 200),
    ("GET", "/wrapped/7", "/wrapped/{id}", 200),
    ("GET", "/used/7", "/used/{id}", 200),
    ("GET", "/static/a/b.css", "/static/{path}", 200),
    ("GET", "/nothing/at/all", "/nothing/at/all", 404),
]


class TestRoutes:
    """What the path of a request becomes."""

    @pytest.mark.parametrize("how", ["install", "asgi", "copied", "inside"])
    @pytest.mark.parametrize("case", STARLETTE)
    def test_starlette(self, events, how, case):
        """The template is the whole one; a path without a route stays as it came."""
        method, path, template, status = case
        if how == "inside":
            app: Any = starlette_app(middleware=[Use(asgi.Middleware)])
        elif how == "copied":
            app = asgi.Middleware(starlette_app(middleware=[Use(Copying)]))
        elif how == "asgi":
            app = asgi.Middleware(CORSMiddleware(starlette_app()))
        else:
            app = installed(starlette_app())
        template = template or "/tenants/{tenant}/deep/{id}/files/{name}"
        call(app, method, path)

        assert [(method, template, status)] == told(events)

    @pytest.mark.parametrize(
        ("host", "path", "template", "status"),
        [
            ("a.example.org", "/hosted/1", "/hosted/{id}", 200),
            ("a.example.org", "/nothing", "/nothing", 404),
            ("foreign.example.com", "/any/thing", "/any/thing", 200),
        ],
    )
    def test_hosts(self, events, host, path, template, status):
        """A host of its own changes nothing about the path."""
        call(installed(starlette_app()), "GET", path, [("Host", host)])

        assert [("GET", template, status)] == told(events)

    @pytest.mark.parametrize(
        ("path", "template"),
        [
            ("/proxy/api/users/42", "/proxy/api/users/{id}"),
            ("/proxy/v1/7", "/proxy/v1/{id}"),
            ("/proxy/nothing", "/proxy/nothing"),
            ("/api/users/42", "/proxy/api/users/{id}"),  # by a proxy that strips it
            ("/proxying", "/proxying"),
        ],
    )
    def test_root_path(self, events, path, template):
        """What the server says the application is below is part of the path."""
        call(installed(starlette_app()), "GET", path, root_path="/proxy")

        assert [template] == [event.api_path for event in events]

    @pytest.mark.parametrize(
        ("path", "template"), [("/x/1", "/x/{id}"), ("/x/1/2", "/x/1/2")]
    )
    def test_mount_of_nothing(self, events, path, template):
        """A mount without a prefix of its own is looked into."""
        app = Starlette(routes=[Mount("", routes=[Route("/x/{id}", ok)])])
        call(installed(app), "GET", path)

        assert [template] == [event.api_path for event in events]

    @pytest.mark.parametrize("path", ["/tenants/acme/items/1", "/sub/items/1"])
    def test_middleware_of_a_mount(self, events, path):
        """A middleware around the mounted application finds the whole template."""
        sub = installed(Starlette(routes=[Route("/items/{item}", ok)]))
        app = Starlette(routes=[Mount("/tenants/{tenant}", sub), Mount("/sub", sub)])
        call(app, "GET", path)

        assert [path.replace("acme", "{tenant}").replace("1", "{item}")] == [
            event.api_path for event in events
        ]

    def test_installed_twice_over(self, events):
        """Application and mounted application both installed tell a request once."""
        sub = installed(Starlette(routes=[Route("/items/{item}", ok)]))
        app = installed(Starlette(routes=[Mount("/sub", sub)]))
        exchange = call(app, "GET", "/sub/items/1", ANN)

        assert [("GET", "/sub/items/{item}", 200)] == told(events)
        assert ["req-1"] == exchange.headers("x-request-id")

    def test_refused_before_routing(self, events):
        """An answer of a middleware's has the template that the path would fit."""

        class Refusing(BaseHTTPMiddleware):
            async def dispatch(self, request, call_next):
                return Response(status_code=401)

        app = starlette_app(middleware=[Use(Refusing)])
        call(installed(app), "GET", "/tenants/acme/items/1")
        call(installed(app), "GET", "/nothing")

        assert [
            ("GET", "/tenants/{tenant}/items/{item}", 401),
            ("GET", "/nothing", 401),
        ] == told(events)

    def test_given_path(self, events):
        """The path that `track_api` was given wins."""

        @pgtrack.track_api("/given")
        async def endpoint(request):
            return PlainTextResponse("ok")

        call(installed(Starlette(routes=[Route("/u/{id}", endpoint)])), "GET", "/u/1")

        assert [("GET", "/given", 200)] == told(events)

    def test_bare_track_api(self, events):
        """`track_api` without a path has the template in a nested call, too."""

        @pgtrack.track_api
        async def endpoint(request):
            return PlainTextResponse("ok")

        app = installed(Starlette(routes=[Route("/u/{id}", endpoint)]), track=False)
        call(app, "GET", "/u/1")

        assert [("GET", "/u/{id}", 200)] == told(events)

    def test_routes_that_fail(self, events):
        """Routes that fail to be asked again leave the path as it came."""

        class Odd(Route):
            def matches(self, scope):
                if "endpoint" not in scope and "router" in scope:
                    raise ZeroDivisionError
                return super().matches(scope)

        app = Starlette(routes=[Mount("/m", routes=[Route("/x/{id}", ok)])])
        app.router.routes.insert(0, Odd("/y", ok))
        asked = []

        async def answer(scope, receive, send):
            asked.append(scope)
            scope["router"], scope["endpoint"] = app.router, ok
            await PlainTextResponse("ok")(scope, receive, send)

        call(asgi.Middleware(answer), "GET", "/m/x/1")

        assert [("GET", "/m/x/1", 200)] == told(events)


def fastapi_app(**options: Any) -> Any:
    """Return an application with included routers, nested and mounted."""
    inner = fastapi.APIRouter(prefix="/inner")

    @inner.get("/{id}")
    def get_inner(id: str):  # noqa: A002
        return id

    outer = fastapi.APIRouter()
    outer.include_router(inner, prefix="/between")
    outer.add_route("/starlette/{id}", ok)
    outer.mount("/mounted/{tenant}", Starlette(routes=[Route("/{id}", ok)]))

    @outer.get("/users/{id:int}")
    async def get_user(id: int):  # noqa: A002
        return id

    @outer.post("/users", status_code=201)
    async def post_user():
        return {}

    sub = fastapi.FastAPI()
    sub.include_router(outer, prefix="/below")

    @sub.get("/direct/{id}")
    async def direct(id: str):  # noqa: A002
        return id

    app = fastapi.FastAPI(**options)
    app.include_router(outer, prefix="/api")
    app.include_router(outer, prefix="/again")
    app.mount("/sub/{tenant}", sub)

    @app.get("/plain/{id}")
    async def plain(id: str, response: fastapi.Response):  # noqa: A002
        response.status_code = 203
        return id

    return app


FASTAPI = [
    ("GET", "/plain/1", "/plain/{id}", 203),
    ("DELETE", "/plain/1", "/plain/{id}", 405),
    ("GET", "/api/users/1", "/api/users/{id}", 200),
    ("GET", "/again/users/1", "/again/users/{id}", 200),
    ("POST", "/api/users", "/api/users", 201),
    ("PUT", "/api/users", "/api/users", 405),
    ("GET", "/api/between/inner/1", "/api/between/inner/{id}", 200),
    ("GET", "/api/starlette/1", "/api/starlette/{id}", 200),
    ("GET", "/api/mounted/acme/1", "/api/mounted/{tenant}/{id}", 200),
    ("GET", "/sub/acme/direct/1", "/sub/{tenant}/direct/{id}", 200),
    ("GET", "/sub/acme/below/users/1", "/sub/{tenant}/below/users/{id}", 200),
    ("GET", "/sub/acme/below/between/inner/1", None, 200),
    ("GET", "/sub/acme/below/nothing", "/sub/acme/below/nothing", 404),
    ("GET", "/api/users/none", "/api/users/none", 404),
    ("GET", "/api/users/", "/api/users/", 307),
    ("GET", "/openapi.json", "/openapi.json", 200),
]


class TestFastAPIRoutes:
    """The same for FastAPI's routers."""

    @pytest.mark.parametrize("how", ["install", "asgi", "copied"])
    @pytest.mark.parametrize("case", FASTAPI)
    def test_fastapi(self, events, how, case):
        """Prefixes of routers, mounts and parameters are all in the template."""
        method, path, template, status = case
        if how == "install":
            app = installed(fastapi_app())
        elif how == "copied":
            app = asgi.Middleware(fastapi_app(middleware=[Use(Copying)]))
        else:
            app = asgi.Middleware(fastapi_app())
        template = template or "/sub/{tenant}/below/between/inner/{id}"
        call(app, method, path)

        assert [(method, template, status)] == told(events)

    @pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
    @pytest.mark.parametrize("is_installed", [False, True])
    @pytest.mark.parametrize(
        ("path", "template"),
        [
            ("/proxy/api/users/1", "/proxy/api/users/{id}"),
            ("/api/users/1", "/proxy/api/users/{id}"),
            ("/proxy/sub/acme/direct/1", "/proxy/sub/{tenant}/direct/{id}"),
        ],
    )
    def test_root_path(self, events, path, template, is_installed):
        """An application's own `root_path` is as good as the server's."""
        app = fastapi_app(root_path="/proxy")
        call(installed(app) if is_installed else asgi.Middleware(app), "GET", path)

        assert [("GET", template, 200)] == told(events)

    def test_validation(self, events):
        """What FastAPI refuses is no error."""
        app = fastapi.FastAPI()

        @app.get("/n/{n}")
        def number(n: int):
            return n

        call(installed(app), "GET", "/n/x")

        assert [("GET", "/n/{n}", 422)] == told(events)


# --- the rows of the matrix ------------------------------------------------------


class TestHandlers:
    """Endpoints and dependencies, async and sync."""

    @pytest.mark.parametrize(
        "path",
        [
            *("/async", "/sync", "/dependency/sync", "/dependency/async"),
            *("/dependency/yield/sync", "/dependency/yield/async", "/thread", "/late"),
        ],
    )
    def test_user(self, events, path):
        """Wherever a user is identified, the request's own event has it."""
        app = installed(identifying_app())
        exchange = call(app, "GET", path, ANN)

        assert (200, b'"sess_ann"') == (exchange.status, exchange.body)
        assert [("GET", path, 200)] == told(events)
        assert {("sess_ann", "req-1", "u_1")} == kept(events)

    @pytest.mark.parametrize("path", ["/async", "/sync", "/dependency/yield/sync"])
    def test_nothing_left_behind(self, events, path):
        """The next request, without headers, sees none of it."""
        app = installed(identifying_app())

        async def main():
            await Call(http_scope("GET", path, ANN)).run(app)
            left = _context.current_frame()
            await Call(http_scope("GET", "/async/nobody")).run(app)
            # The threads of the pool are used again.
            seen = await anyio.to_thread.run_sync(_context.current_frame)
            return left, seen

        assert anyio.run(main) == (None, None)
        assert events[1].user_id is None
        assert events[1].session_id.startswith("srv-")

    def test_journey(self, events):
        """A journey and its steps are the request's, in threads, too."""
        app = fastapi.FastAPI()

        @pgtrack.journey_step("pay")
        def pay():
            pass

        @app.post("/pay")
        def checkout():
            pgtrack.identify("u_1")
            with pgtrack.journey("checkout") as journey:
                pay()
                journey.convert()

        call(installed(app), "POST", "/pay", ANN)

        events.assert_journey("checkout", steps=["pay"], status="converted")
        assert {("sess_ann", "req-1", "u_1")} == kept(events)

    def test_tracked(self, events):
        """A tracked endpoint keeps its signature, and is the request's one event."""
        app = fastapi.FastAPI()

        @app.get("/items/{item}", status_code=202)
        @pgtrack.track_api
        async def get_item(item: int, q: str = "none"):
            return [item, q]

        exchange = call(installed(app), "GET", "/items/3", query_string=b"q=x")

        assert b'[3,"x"]' == exchange.body
        assert [("GET", "/items/{item}", 202)] == told(events)

    def test_two_at_once(self, events):
        """Threads of the pool and tasks, all at once, keep to themselves."""
        app = fastapi.FastAPI()
        count = 20
        barrier = threading.Barrier(count)

        @app.get("/sync/{n}")
        def sync(n: int):
            pgtrack.identify(f"u{n}")
            barrier.wait(10)
            pgtrack.emit("custom", name=str(n))

        @app.get("/async/{n}")
        async def async_(n: int):
            pgtrack.identify(f"u{n}")
            await asyncio.sleep(0)
            pgtrack.emit("custom", name=str(n))

        install(app)

        async def one(kind, n):
            headers = [("X-Session-ID", f"s{n}"), ("X-Request-ID", f"r{n}")]
            exchange = Call(http_scope("GET", f"/{kind}/{n}", headers))
            await exchange.run(app)
            assert [f"r{n}"] == exchange.headers("x-request-id")

        async def main():
            for start in range(0, 600, count):
                async with anyio.create_task_group() as tasks:
                    for n in range(start, start + count):
                        tasks.start_soon(one, "sync", n)
                        tasks.start_soon(one, "async", n + 1000)

        anyio.run(main)

        numbers = [*range(600), *range(1000, 1600)]
        assert 2 * 1200 == len(events)
        assert {(f"s{n}", f"r{n}", f"u{n}") for n in numbers} == kept(events)
        assert all(e.name in {None, e.session_id[1:]} for e in events)

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    @pytest.mark.parametrize("is_sync", [False, True])
    def test_exception(self, events, is_sync, backend):
        """What escapes an endpoint is one error, with the request's ids."""

        def sync_fail(request):
            pgtrack.identify("u_1")
            msg = "boom"
            raise RuntimeError(msg)

        async def async_fail(request):
            sync_fail(request)

        endpoint = sync_fail if is_sync else async_fail
        app = installed(Starlette(routes=[Route("/x/{id}", endpoint)]))
        exchange = call(app, "GET", "/x/1", ANN, backend=backend)

        assert 500 == exchange.status
        assert [("error", "RuntimeError"), ("GET", "/x/{id}", 500)] == told(events)
        assert {("sess_ann", "req-1", "u_1")} == kept(events)

    @pytest.mark.parametrize("status", [400, 404, 418])
    def test_http_exception(self, events, status):
        """An HTTPException is its status, and below 500 no error."""
        app = installed(Starlette(routes=[Route("/raises/{status:int}", raises)]))
        call(app, "GET", f"/raises/{status}")

        assert [("GET", "/raises/{status}", status)] == told(events)

    def test_http_exception_from_500_on(self, events):
        """From 500 on the status is an error; with `track_api`, the exception is."""
        routes = [
            Route("/raises/{status:int}", raises),
            Route("/tracked/{status:int}", pgtrack.track_api(raises)),
        ]
        app = installed(Starlette(routes=routes))
        call(app, "GET", "/raises/503")
        call(app, "GET", "/tracked/503")

        assert [
            ("error", "503"),
            ("GET", "/raises/{status}", 503),
            ("error", "HTTPException"),
            ("GET", "/tracked/{status}", 503),
        ] == told(events)

    def test_handlers_of_exceptions(self, events):
        """What a handler makes a 4xx of is no error; of a 5xx the real exception is."""

        @pgtrack.track_api
        async def endpoint(request):
            raise {"400": ValueError, "503": LookupError}[request.path_params["status"]]

        async def handle(request, error):
            return Response(status_code=int(request.path_params["status"]))

        app = Starlette(
            routes=[Route("/{status}", endpoint)],
            exception_handlers={ValueError: handle, LookupError: handle},
        )
        install(app)
        call(app, "GET", "/400")
        call(app, "GET", "/503")

        assert [
            ("GET", "/{status}", 400),
            ("error", "LookupError"),
            ("GET", "/{status}", 503),
        ] == told(events)

    @pytest.mark.parametrize("place", ["around", "inside"])
    def test_base_http_middleware(self, events, place):
        """A middleware that runs the rest in another task hides nothing of it."""

        def endpoint(request):
            pgtrack.identify("u_1")
            pgtrack.emit("custom")
            return PlainTextResponse("ok")

        app = Starlette(routes=[Route("/x/{id}", endpoint), Route("/fail", fail)])
        if place == "around":
            app.add_middleware(asgi.Middleware)
            app.add_middleware(Custom)
        else:
            app.add_middleware(Custom)
            install(app)
        exchange = call(app, "GET", "/x/1", ANN)
        failed = call(app, "GET", "/fail", ANN)

        assert ["req-1"] == exchange.headers("x-request-id")
        assert [["req-1"], []][place == "around"] == failed.headers("x-request-id")
        assert [
            ("custom", None),
            ("GET", "/x/{id}", 200),
            ("error", "RuntimeError"),
            ("GET", "/fail", 500),
        ] == told(events)
        assert [("u_1")] * 2 == [event.user_id for event in events[:2]]

    def test_cors(self, events):
        """A preflight is answered by the application, and is no event."""
        app = starlette_app(middleware=[Use(CORSMiddleware, allow_origins=["*"])])
        headers = [("Origin", "https://a"), ("Access-Control-Request-Method", "GET")]
        exchange = call(installed(app), "OPTIONS", "/plain", headers)

        assert 200 == exchange.status
        assert [] == exchange.headers("x-request-id")
        assert [] == events


def identifying_app() -> Any:
    """Return an application that identifies the user everywhere one can."""
    app = fastapi.FastAPI()

    def identify():
        pgtrack.identify("u_1")
        return str(pgtrack.current().session_id)

    async def identify_async():
        return identify()

    def identify_and_yield():
        yield identify()

    async def identify_and_yield_async():
        yield identify()

    app.get("/async")(identify_async)
    app.get("/sync")(identify)
    for path, dependency in {
        "/dependency/sync": identify,
        "/dependency/async": identify_async,
        "/dependency/yield/sync": identify_and_yield,
        "/dependency/yield/async": identify_and_yield_async,
    }.items():

        async def depending(seen):
            return seen

        # The module's annotations are text, in which a local name means nothing.
        depending.__annotations__["seen"] = Annotated[str, fastapi.Depends(dependency)]
        app.get(path)(depending)

    @app.get("/thread")
    async def in_thread():
        return await asyncio.to_thread(identify)

    @app.get("/late")
    async def late():
        await asyncio.create_task(identify_async())
        return pgtrack.current().session_id

    @app.get("/async/nobody")
    async def nobody():
        assert pgtrack.current().user_id is None

    return app


class TestBackground:
    """Work after the answer."""

    def test_background_tasks(self, events):
        """Each task has the session and user of the request, and its own event."""

        @pgtrack.track_api
        async def mail():
            pgtrack.emit("custom", name="async")

        @pgtrack.track_api
        def log():
            pgtrack.emit("custom", name="sync")

        @pgtrack.track_api
        async def endpoint(request):
            pgtrack.identify("u_1")
            tasks = BackgroundTasks([BackgroundTask(mail), BackgroundTask(log)])
            return PlainTextResponse("ok", background=tasks)

        app = installed(Starlette(routes=[Route("/x", endpoint)]))
        call(app, "GET", "/x", ANN)

        name = f"{__name__}.TestBackground.test_background_tasks.<locals>"
        assert [
            ("GET", "/x", 200),
            ("custom", "async"),
            (None, f"{name}.mail", 200),
            ("custom", "sync"),
            (None, f"{name}.log", 200),
        ] == told(events)
        assert {("sess_ann", "req-1", "u_1")} == kept(events)

    def test_of_fastapi(self, events):
        """The same for the tasks of FastAPI, from a dependency and an endpoint."""
        app = fastapi.FastAPI()

        def dependency(tasks: fastapi.BackgroundTasks):
            tasks.add_task(pgtrack.emit, "custom", name="dependency")

        @app.get("/x", dependencies=[fastapi.Depends(dependency)])
        def endpoint(tasks: fastapi.BackgroundTasks):
            pgtrack.identify("u_1")
            tasks.add_task(pgtrack.emit, "custom", name="endpoint")

        call(installed(app), "GET", "/x", ANN)

        assert [
            ("GET", "/x", 200),
            ("custom", "dependency"),
            ("custom", "endpoint"),
        ] == told(events)
        assert {("sess_ann", "req-1", "u_1")} == kept(events)

    def test_failing(self, events):
        """A background task that fails is an error; the answer stays what it was."""
        tasks = BackgroundTask(fail, None)
        routes = [Route("/x", lambda _: PlainTextResponse("ok", background=tasks))]
        call(installed(Starlette(routes=routes)), "GET", "/x", ANN)

        assert [("GET", "/x", 200), ("error", "RuntimeError")] == told(events)

    def test_tasks_that_outlive_the_request(self, events):
        """A task of asyncio keeps its session while others are served."""

        @pgtrack.track_api("/later")
        async def later(n):
            await release.wait()
            pgtrack.emit("custom", name=str(n))

        async def endpoint(request):
            n = request.path_params["n"]
            pgtrack.identify(f"u{n}")
            tasks.append(asyncio.create_task(later(n)))
            return PlainTextResponse("ok")

        async def main():
            nonlocal release
            release = asyncio.Event()
            for n in range(100):
                headers = [("X-Session-ID", f"s{n}")]
                await Call(http_scope("GET", f"/{n}", headers)).run(app)
            events.clear()
            release.set()
            await asyncio.gather(*tasks)

        release: Any = None
        tasks: list[Any] = []
        app = installed(Starlette(routes=[Route("/{n:int}", endpoint)]))
        asyncio.run(main())

        assert {(f"s{n}", f"u{n}") for n in range(100)} == {
            (event.session_id, event.user_id) for event in events
        }
        assert {str(n) for n in range(100)} == {e.name for e in events if e.name}
        assert 200 == len(events)


class TestStreams:
    """Bodies that take their time."""

    @pytest.mark.parametrize("is_sync", [False, True])
    def test_stream(self, events, backend, is_sync):
        """The stream runs in the session; the event comes at its end."""

        def chunks():
            for i in range(3):
                pgtrack.emit("custom", name=f"{pgtrack.current().session_id} {i}")
                yield str(i)

        async def async_chunks():
            for chunk in chunks():
                yield chunk

        async def endpoint(request):
            return StreamingResponse(chunks() if is_sync else async_chunks())

        app = installed(Starlette(routes=[Route("/x", endpoint)]))
        exchange = call(app, "GET", "/x", ANN, backend=backend)

        assert b"012" == exchange.body
        assert [
            *(("custom", f"sess_ann {i}") for i in range(3)),
            ("GET", "/x", 200),
        ] == (told(events))

    def test_failing_stream(self, events):
        """A stream that fails is an incomplete answer, and an error."""

        async def chunks():
            yield "a"
            msg = "boom"
            raise RuntimeError(msg)

        async def endpoint(request):
            return StreamingResponse(chunks())

        call(installed(Starlette(routes=[Route("/x", endpoint)])), "GET", "/x", ANN)

        assert [("error", "RuntimeError"), ("GET", "/x", 200)] == told(events)
        assert events[1].metadata["incomplete"] is True

    def test_tracked_stream(self, events):
        """A tracked generator of the body is an event of its own."""

        @pgtrack.track_api("/export")
        async def chunks():
            yield "a"

        async def endpoint(request):
            return StreamingResponse(chunks())

        call(installed(Starlette(routes=[Route("/x", endpoint)])), "GET", "/x", ANN)

        assert {("GET", "/x", 200), (None, "/export", 200)} == set(told(events))
        assert {"sess_ann"} == {event.session_id for event in events}

    def test_disconnect(self, events):
        """A client that leaves in the middle leaves the answer incomplete."""

        class Leaving(Call):
            async def receive(self):
                if not self._messages:
                    await begun.wait()
                return await super().receive()

            async def send(self, message):
                await super().send(message)
                if message["type"] == "http.response.body":
                    begun.set()

        async def chunks():
            yield "a"
            await anyio.sleep_forever()

        async def endpoint(request):
            return StreamingResponse(chunks())

        async def main():
            nonlocal begun
            begun = anyio.Event()
            with anyio.fail_after(10):
                await Leaving(http_scope("GET", "/x", ANN)).run(app)

        begun: Any = None
        app = installed(Starlette(routes=[Route("/x", endpoint)]))
        anyio.run(main)

        assert [("GET", "/x", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    def test_disconnect_told_by_send(self, events):
        """The same where the server says so by an error (ASGI 2.4)."""

        class Leaving(Call):
            async def send(self, message):
                if message["type"] == "http.response.body":
                    raise BrokenPipeError
                await super().send(message)

        async def endpoint(request):
            return StreamingResponse(iter(["a"]))

        app = installed(Starlette(routes=[Route("/x", endpoint)]))
        asgi_version = {"version": "3.0", "spec_version": "2.4"}
        exchange = Leaving(http_scope("GET", "/x", ANN, asgi=asgi_version))
        with pytest.raises(Exception, match=r"^$") as caught:
            anyio.run(exchange.run, app)

        assert "ClientDisconnect" == type(caught.value).__name__
        assert [("GET", "/x", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    def test_disconnect_before_the_answer(self, events):
        """A client that leaves while its body is read saw no answer: no error."""

        async def endpoint(request):
            return PlainTextResponse(await request.body())

        app = installed(Starlette(routes=[Route("/x", endpoint, methods=["POST"])]))
        exchange = Call(http_scope("POST", "/x", ANN), [])
        with pytest.raises(Exception, match=r"^$") as caught:
            anyio.run(exchange.run, app)

        assert "ClientDisconnect" == type(caught.value).__name__
        assert [("POST", "/x", 499)] == told(events)

    def test_cancelled(self, events, backend):
        """A task that is cancelled in the middle leaves nothing behind."""

        async def chunks():
            yield "a"
            scope.cancel()
            await anyio.sleep_forever()

        async def endpoint(request):
            return StreamingResponse(chunks())

        async def main():
            nonlocal scope
            with anyio.CancelScope() as scope:
                messages = [{"type": "http.request"}]
                exchange = Staying(http_scope("GET", "/x", ANN), messages)
                await exchange.run(app)
            return _context.current_frame()

        scope: Any = None
        app = installed(Starlette(routes=[Route("/x", endpoint)]))

        assert anyio.run(main, backend=backend) is None
        assert [("GET", "/x", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True


class TestWebSockets:
    """Connections that stay."""

    @staticmethod
    def connect(app, messages, path="/ws/1") -> Call:
        """Serve a connection with these messages of the client's."""
        scope = http_scope("GET", path, ANN, type="websocket", subprotocols=[])
        connect = {"type": "websocket.connect"}
        texts = [{"type": "websocket.receive", "text": m} for m in messages]
        gone = {"type": "websocket.disconnect", "code": 1001}
        exchange = Call(scope, [connect, *texts, gone])
        with contextlib.suppress(RuntimeError):
            anyio.run(exchange.run, app)
        return exchange

    def test_correlation(self, events):
        """A connection keeps its session; its messages make no events by themselves."""

        async def endpoint(websocket: WebSocket):
            await websocket.accept()
            pgtrack.identify("u_1")
            async for text in websocket.iter_text():
                pgtrack.emit("custom", name=text)

        app = installed(Starlette(routes=[WebSocketRoute("/ws/{id}", endpoint)]))
        exchange = self.connect(app, ["a", "b"])

        assert [("custom", "a"), ("custom", "b")] == told(events)
        assert {("sess_ann", "req-1", "u_1")} == kept(events)
        assert ["req-1"] == exchange.headers("x-request-id")

    def test_error(self, events):
        """What escapes is an error."""
        app = fastapi.FastAPI()

        @app.websocket("/ws/{id}")
        async def endpoint(websocket: fastapi.WebSocket, id: str):  # noqa: A002
            await websocket.accept()
            msg = "boom"
            raise RuntimeError(msg)

        self.connect(installed(app), [])

        assert [("error", "RuntimeError")] == told(events)
        assert {("sess_ann", "req-1", None)} == kept(events)

    def test_disconnect(self, events):
        """A client that leaves is no error, whether that is caught or not."""

        async def endpoint(websocket: WebSocket):
            await websocket.accept()
            while True:
                await websocket.receive_text()

        app = installed(Starlette(routes=[WebSocketRoute("/ws/{id}", endpoint)]))
        with pytest.raises(Exception, match="1001") as caught:
            self.connect(app, ["a"])

        assert "WebSocketDisconnect" == type(caught.value).__name__
        assert [] == events

    def test_no_route(self, events):
        """A connection to nowhere is closed, and makes no event."""
        app = installed(Starlette())
        exchange = self.connect(app, [])

        assert [] == events
        assert "websocket.close" == exchange.sent[0]["type"]


class Meeting:
    """Lets all of them arrive before any goes on."""

    def __init__(self, count):
        self.left = count
        self.everybody = anyio.Event()

    async def meet(self, user):
        """Identify the user, wait for all the others, and tell."""
        pgtrack.identify(user)
        self.left -= 1
        if not self.left:
            self.everybody.set()
        with anyio.fail_after(20):
            await self.everybody.wait()
        pgtrack.emit("custom", name=user)


def meeting_app(meeting: Any) -> Any:
    """Return an application whose every row meets."""
    app = fastapi.FastAPI()

    async def depend(user: str):
        await meeting.meet(user)
        yield user

    @app.get("/async/{user}")
    async def in_endpoint(user: str):
        await meeting.meet(user)

    @app.get("/dependency/{user}")
    def in_dependency(seen: str = fastapi.Depends(depend)):  # noqa: FAST002  a local name
        return seen

    @app.get("/background/{user}")
    def in_background(user: str, tasks: fastapi.BackgroundTasks):
        tasks.add_task(meeting.meet, user)

    @app.get("/task/{user}")
    async def in_task(user: str):
        await asyncio.create_task(meeting.meet(user))

    @app.get("/stream/{user}")
    def in_stream(user: str):
        async def events_of_a_stream():
            yield "data: first\n\n"
            await meeting.meet(user)
            yield "data: last\n\n"

        kind = "text/event-stream"
        return StreamingResponse(events_of_a_stream(), media_type=kind)

    @app.websocket("/ws/{user}")
    async def in_websocket(websocket: fastapi.WebSocket, user: str):
        await websocket.accept()
        await meeting.meet(user)
        await websocket.close()

    app.add_middleware(Custom)
    outer = Starlette(routes=[Mount("/mount/{tenant}", app), Mount("", app)])
    return installed(outer)


ROWS = [
    *("/async", "/dependency", "/background", "/task", "/stream", "/ws"),
    *("/mount/acme/async", "/mount/acme/stream", "/mount/acme/ws"),
]


class Acting:
    """Does what the name of the user says, in a journey."""

    def __init__(self):
        self.cancel = anyio.CancelScope()

    async def meet(self, user):
        """Identify the user, tell, and fail or be cancelled."""
        if user == "nobody":
            return
        pgtrack.identify(user)
        with pgtrack.journey("checkout"):
            pgtrack.emit("custom", name=user)
        if user == "fail":
            msg = "boom"
            raise RuntimeError(msg)
        if user == "hang":
            self.cancel.cancel()
            await anyio.sleep_forever()


class TestEnds:
    """How each row ends, and what it leaves for the next request."""

    @staticmethod
    def serve(row, user):
        """Serve one request, and a header-less one in the same task; return frames."""
        kind = "websocket" if row.endswith("/ws") else "http"
        connect = [{"type": "websocket.connect"}] if kind == "websocket" else None

        async def main():
            acting = Acting()
            app = meeting_app(acting)
            with acting.cancel, contextlib.suppress(RuntimeError):
                scope = http_scope("GET", f"{row}/{user}", ANN, type=kind)
                await Staying(scope, connect).run(app)
            left = _context.current_frame()
            await Staying(http_scope("GET", "/async/nobody")).run(app)
            return left, acting.cancel.cancelled_caught

        return anyio.run(main)

    @pytest.mark.parametrize("user", ["good", "fail", "hang"])
    @pytest.mark.parametrize("row", ROWS)
    def test_ends(self, events, row, user):
        """Well, by an exception or cancelled: told once, and nothing left behind."""
        left, is_cancelled = self.serve(row, user)
        *mine, last = events

        assert left is None
        assert (user == "hang") == is_cancelled
        assert ["checkout"] == [e.journey_id for e in mine if e.type == "custom"]
        assert {("sess_ann", "req-1")} == {
            (e.session_id, e.metadata["request_id"]) for e in mine
        }
        errors = [(e.error_type, e.user_id) for e in mine if e.type == "error"]
        assert ([("RuntimeError", "fail")] if user == "fail" else []) == errors
        responses = [e for e in mine if e.type == "api.response"]
        assert (0 if row.endswith("/ws") else 1) == len(responses)
        assert last.session_id.startswith("srv-")
        assert (None, None, "/async/{user}") == (
            last.user_id,
            last.journey_id,
            last.api_path,
        )


class TestMixing:
    """A hundred at once, each of which waits for all the others."""

    @pytest.mark.parametrize("row", ROWS)
    def test_never_mix(self, events, row):
        """Each of them keeps its session, request and user."""
        count = 100
        kind = "websocket" if row.endswith("/ws") else "http"
        connect = [{"type": "websocket.connect"}] if kind == "websocket" else None

        async def one(app, n):
            headers = [("X-Session-ID", f"s{n}"), ("X-Request-ID", f"r{n}")]
            scope = http_scope("GET", f"{row}/u{n}", headers, type=kind)
            exchange = await Staying(scope, connect).run(app)
            assert [f"r{n}"] == exchange.headers("x-request-id")

        async def main():
            app = meeting_app(Meeting(count))
            async with anyio.create_task_group() as tasks:
                for n in range(count):
                    tasks.start_soon(one, app, n)
            return _context.current_frame()

        left = anyio.run(main)

        assert left is None
        assert {(f"s{n}", f"r{n}", f"u{n}") for n in range(count)} == kept(
            events.of_type("custom")
        )
        assert all(e.name == e.user_id for e in events.of_type("custom"))
        requests = events.of_type("api.response")
        assert (0 if connect else count) == len(requests)
        assert {f"s{n}" for n in range(count)} >= {e.session_id for e in requests}


# --- a real server ---------------------------------------------------------------


class TestUvicorn:
    """The same over real sockets."""

    def test_answers(self, events):
        """Each answer that uvicorn sends carries the id of its own request."""
        import httpx

        async def events_of_a_stream():
            for i in range(3):
                yield f"data: {pgtrack.current().session_id} {i}\n\n"

        async def sse(request):
            return StreamingResponse(
                events_of_a_stream(), media_type="text/event-stream"
            )

        async def nothing(request):
            return Response(status_code=int(request.path_params["status"]))

        routes = [
            Route("/ok", ok),
            Route("/fail", fail),
            Route("/sse", sse),
            Route("/{status:int}", nothing),
        ]
        app = installed(Starlette(routes=routes))
        seen = []
        with uvicorn_server(app) as (host, port):
            url = f"http://{host}:{port}"
            for n, (method, path) in enumerate(
                [
                    *(("GET", "/ok"), ("HEAD", "/ok"), ("GET", "/fail")),
                    *(("GET", "/204"), ("GET", "/304"), ("GET", "/sse")),
                    *(("GET", "/nothing"), ("OPTIONS", "/ok")),
                ]
            ):
                headers = {"X-Session-ID": f"s{n}", "X-Request-ID": f"r{n}"}
                # A connection each: after a 500 uvicorn closes it at any moment.
                answer = httpx.request(
                    method, url + path, headers=headers, trust_env=False, timeout=30
                )
                assert [f"r{n}"] == answer.headers.get_list("x-request-id")
                seen.append(answer.status_code)
                if path == "/sse":
                    assert "data: s5 2" in answer.text

        assert [200, 200, 500, 204, 304, 200, 404, 405] == seen
        assert [
            ("s0", "/ok", 200),
            ("s1", "/ok", 200),
            ("s2", "/fail", 500),
            ("s3", "/{status}", 204),
            ("s4", "/{status}", 304),
            ("s5", "/sse", 200),
            ("s6", "/nothing", 404),
            ("s7", "/ok", 405),
        ] == [
            (e.session_id, e.api_path, e.api_status_code)
            for e in events.of_type("api.response")
        ]

    def test_plain_500(self, events):
        """The 500 of a plain application comes from us, once, and uvicorn agrees."""
        import httpx

        async def app(scope, receive, send):
            assert "http" == scope["type"]
            msg = "boom"
            raise RuntimeError(msg)

        with uvicorn_server(asgi.Middleware(app), lifespan="off") as (host, port):
            headers = {"X-Request-ID": "r1"}
            url = f"http://{host}:{port}/x"
            answer = httpx.get(url, headers=headers, trust_env=False)
            posted = httpx.post(url, headers=headers, trust_env=False, content=b"x")

        assert (500, "Internal Server Error") == (answer.status_code, answer.text)
        assert "r1" == answer.headers["x-request-id"] == posted.headers["x-request-id"]
        assert "close" == answer.headers["connection"]

    def test_client_that_leaves(self, events):
        """A client that hangs up within a stream makes one incomplete answer."""
        import socket

        told_it = threading.Event()

        async def chunks():
            try:
                while True:
                    yield b"x" * 1000
                    await asyncio.sleep(0)
            finally:
                told_it.set()

        async def endpoint(request):
            return StreamingResponse(chunks())

        app = installed(Starlette(routes=[Route("/x/{id}", endpoint)]))
        with uvicorn_server(app) as address:
            with socket.create_connection(address, timeout=10) as client:
                client.sendall(b"GET /x/1 HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.recv(100)
            assert told_it.wait(10)

        assert [("GET", "/x/{id}", 200)] == told(events)
        assert events[0].metadata["incomplete"] is True

    def test_expect(self, events):
        """A client that waits for `100 Continue` gets it once the body is wanted."""
        import socket

        async def endpoint(request):
            return PlainTextResponse(await request.body())

        app = installed(Starlette(routes=[Route("/x", endpoint, methods=["POST"])]))
        head = (
            b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n"
            b"Expect: 100-continue\r\nConnection: close\r\n\r\n"
        )
        with (
            uvicorn_server(app) as address,
            socket.create_connection(address, timeout=10) as client,
            client.makefile("rb") as reader,
        ):
            client.sendall(head)
            first = reader.readline()
            client.sendall(b"body")
            rest = reader.read()

        assert b"HTTP/1.1 100 Continue\r\n" == first
        assert rest.endswith(b"body")
        assert [("POST", "/x", 200)] == told(events)

    def test_websocket(self, events):
        """A handshake over a real connection carries the request id."""
        client = pytest.importorskip("websockets.sync.client")

        async def endpoint(websocket: WebSocket):
            await websocket.accept()
            await websocket.send_text(str(pgtrack.current().session_id))
            pgtrack.emit("custom")
            await websocket.close()

        app = installed(Starlette(routes=[WebSocketRoute("/ws", endpoint)]))
        with (
            uvicorn_server(app, ws="websockets-sansio") as (host, port),
            client.connect(
                f"ws://{host}:{port}/ws", additional_headers=ANN, proxy=None
            ) as connection,
        ):
            text = connection.recv(10)
            echoed = connection.response.headers["x-request-id"]

        assert ("sess_ann", "req-1") == (text, echoed)
        assert [("custom", None)] == told(events)

    def test_shutdown_delivers(self, tmp_path):
        """Events are out before uvicorn says that it has shut down."""
        from harness import Server

        with Server() as server:
            pgtrack.configure(project_id="p", endpoint=server.url, batch_interval=3600)
            import httpx

            app = installed(Starlette(routes=[Route("/x", ok)]))
            with uvicorn_server(app, lifespan="on") as (host, port):
                httpx.get(f"http://{host}:{port}/x", headers=ANN, trust_env=False)
            sent = server.events
            pgtrack.shutdown()

        assert ["sess_ann"] == [event["session.id"] for event in sent]


def test_test_client(events):
    """The test client of Starlette works as before, lifespan and errors included."""
    from starlette.testclient import TestClient

    ran = []

    @contextlib.asynccontextmanager
    async def lifespan(app):
        ran.append("start")
        yield {"state": 1}
        ran.append("stop")

    def state(request):
        return PlainTextResponse(json.dumps(request.state.state))

    routes = [Route("/fail", fail), Route("/state", state)]
    with TestClient(installed(Starlette(routes=routes, lifespan=lifespan))) as client:
        assert "1" == client.get("/state").text
        with pytest.raises(RuntimeError, match="boom"):
            client.get("/fail")

    assert ["start", "stop"] == ran
    assert ("GET", "/fail", 500) == told(events)[-1]
    assert sys.exc_info() == (None, None, None)
