"""The Django middleware, under WSGI and ASGI, by handlers and by servers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import logging
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from collections import Counter
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.simple_server import make_server as make_wsgi_server
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest

pytest.importorskip("django")

import django
from asgiref.sync import (
    ThreadSensitiveContext,
    iscoroutinefunction,
)
from django.conf import settings
from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import (
    FileResponse,
    Http404,
    HttpResponse,
    JsonResponse,
    StreamingHttpResponse,
)
from django.http.multipartparser import MultiPartParserError
from django.http.response import HttpResponseBase
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import ResolverMatch, include, path, re_path
from django.utils.decorators import (
    async_only_middleware,
    method_decorator,
    sync_only_middleware,
)
from django.utils.translation import gettext_lazy
from django.views import View

import pgtrack
from harness import (
    Call,
    Server,
    assert_harmless,
    hostile_values,
    http_scope,
    run_script,
    start_together,
    uvicorn_server,
)
from pgtrack import _diagnostics, _errors
from pgtrack._context import current_frame
from pgtrack.integrations import _http, asgi, wsgi
from pgtrack.integrations.django import Middleware, _readable
from pgtrack.testing import Events, capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

settings.configure(
    ALLOWED_HOSTS=["*"],
    LANGUAGES=[("en", "English"), ("de", "Deutsch")],
    LOGGING_CONFIG=None,
    SECRET_KEY="of the tests",
    USE_TZ=True,
)
django.setup()

OURS = "pgtrack.integrations.django.Middleware"
TIMEOUT = 50

# --- the site ---------------------------------------------------------------------

views: dict[str, Any] = {}
"""What the views of the site do; each test has its own."""


def sync_view(request, **arguments):
    """Do what the test says."""
    return views["sync"](request, **arguments)


async def async_view(request, **arguments):
    """Do what the test says."""
    return await views["async"](request, **arguments)


@pgtrack.track_api
def tracked_view(request, **arguments):
    """Do it as the request's own function."""
    return views["sync"](request, **arguments)


@pgtrack.track_api("/given/{id}", method="PUT")
async def tracked_async_view(request, **arguments):
    """Do it as the request's own function, with path and method."""
    return await views["async"](request, **arguments)


class ClassView(View):
    """A view with a decorated method."""

    @method_decorator(pgtrack.track_api("/of/the/class"))
    def get(self, request):
        """Do what the test says."""
        return views["sync"](request)


class AsyncClassView(View):
    """An async view with a decorated method."""

    @pgtrack.track_api("/of/the/async/class")
    async def get(self, request):
        """Do what the test says."""
        return await views["async"](request)


class Urls:
    """What `settings.ROOT_URLCONF` names."""

    urlpatterns = (
        path("", sync_view),
        path("sync/", sync_view),
        path("async/", async_view),
        path("tracked/", tracked_view),
        path("tracked/async/", tracked_async_view),
        path("class/", ClassView.as_view()),
        path("class/async/", AsyncClassView.as_view()),
        path("users/<int:id>/", sync_view),
        path("c++/<slug:name>/", sync_view),
        path("c++/", include([re_path(r"^(?P<year>[0-9]+)$", sync_view)])),
        path(gettext_lazy("about/"), sync_view),
        re_path(r"^articles/(?P<year>[0-9]{4})/(?P<slug>[\w-]+)/$", sync_view),
        path(
            "api/<int:version>/",
            include(
                (
                    [
                        re_path(r"^orders/(?P<pk>[^/.]+)/$", sync_view),
                        path("items/<uuid:id>", sync_view),
                    ],
                    "shop",
                ),
                namespace="v",
            ),
        ),
        re_path(r"^old/", include([path("<str:page>/", sync_view)])),
    )


settings.ROOT_URLCONF = Urls


@sync_only_middleware
def sync_only(get_response):
    """Be a middleware that is sync."""

    def middleware(request):
        return get_response(request)

    return middleware


@async_only_middleware
def async_only(get_response):
    """Be a middleware that is async."""

    async def middleware(request):
        await asyncio.sleep(0)
        return await get_response(request)

    return middleware


class Calling:
    """A middleware that does what a test says, before and after what is inside."""

    sync_capable = async_capable = True

    def __init__(self, get_response):
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            from asgiref.sync import markcoroutinefunction

            markcoroutinefunction(self)

    def __call__(self, request):
        """Serve a request, in a chain of either kind."""
        if self.is_async:
            return self.serve(request)
        views.get("before", id)(request)
        return views.get("after", lambda _, response: response)(
            request, self.get_response(request)
        )

    async def serve(self, request):
        """Serve a request of an async chain."""
        views.get("before", id)(request)
        return views.get("after", lambda _, response: response)(
            request, await self.get_response(request)
        )


class Handling:
    """A middleware that has an answer for an exception of the view."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        """Pass on a request."""
        return self.get_response(request)

    def process_exception(self, request, exception):
        """Answer for the view."""
        return HttpResponse("sorry", status=503)


SYNC, ASYNC, CALLING, HANDLING = (
    f"{__name__}.{name}" for name in ("sync_only", "async_only", "Calling", "Handling")
)

ORDERS = {
    "alone": [OURS],
    "first": [OURS, SYNC, ASYNC, CALLING],
    "last": [SYNC, ASYNC, CALLING, OURS],
    "after sync": [SYNC, OURS, ASYNC],
    "after async": [ASYNC, OURS, SYNC],
    "in sync": [SYNC, OURS, SYNC],
    "in async": [ASYNC, OURS, ASYNC],
    "twice": [OURS, CALLING, OURS],
}
"""Where the middleware stands among others that are sync, async or both."""

order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
gateway = pytest.mark.parametrize("gateway", ["wsgi", "asgi"])
view = pytest.mark.parametrize("view", ["sync", "async"])

UNCLOSED = pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")
"""Django leaves the body of a request open where an exception escapes from it."""


# --- asking it --------------------------------------------------------------------


class Answer(NamedTuple):
    """What a client gets."""

    status: int
    headers: dict[str, str]
    body: bytes


def make_handler(gateway="wsgi", order=(OURS,), **options):
    """Return a handler of Django's with its own middleware and settings."""
    with override_settings(MIDDLEWARE=list(order), **options):
        return WSGIHandler() if gateway == "wsgi" else ASGIHandler()


def environ_of(path="/", method="GET", headers=(), **changes):
    """Return an environment as servers make it."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path.encode().decode("latin-1"),
        "QUERY_STRING": "",
        "SCRIPT_NAME": "",
        "SERVER_PROTOCOL": "HTTP/1.1",
        **{f"HTTP_{k.upper().replace('-', '_')}": v for k, v in dict(headers).items()},
        **changes,
    }
    setup_testing_defaults(environ)
    return environ


class Visit:
    """A call of a WSGI application, step by step."""

    def __init__(self, app, path="/", **request):
        self.environ = environ_of(path, **request)
        self.started: list[Any] = []
        self.body = app(self.environ, lambda *start: self.started.append(start))

    def answer(self) -> Answer:
        """Return the answer, read and closed as servers do."""
        try:
            body = b"".join(self.body)
        finally:
            if hasattr(self.body, "close"):
                self.body.close()
        status, headers, *_ = self.started[-1]
        return Answer(int(status[:3]), {k.lower(): v for k, v in headers}, body)


class AsyncVisit(Call):
    """A connection that stays open until `gone` is set."""

    def __init__(self, path="/", method="GET", headers=(), **changes):
        pairs = headers.items() if isinstance(headers, dict) else headers
        scope = http_scope(method, path, pairs, **changes)
        super().__init__(scope)
        self.gone = asyncio.Event()
        self.on_send: Callable[[Any], Any] | None = None

    async def receive(self):
        """Return the next message; after the request, that the client has gone."""
        if self._messages:
            return self._messages.popleft()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        """Keep a message, and tell whoever wants to know."""
        await super().send(message)
        if self.on_send is not None:
            await self.on_send(message)

    def answer(self) -> Answer:
        """Return the answer."""
        headers = {k.decode().lower(): v.decode() for k, v in self.start["headers"]}
        return Answer(self.status, headers, self.body)


async def ask_async(app, path="/", **request) -> Answer:
    """Ask an application of ASGI."""
    visit = await AsyncVisit(path, **request).run(app)
    return visit.answer()


def ask(app, path="/", **request) -> Answer:
    """Ask an application, that of WSGI under the validator."""
    if isinstance(app, (ASGIHandler, asgi.Middleware)):
        return run(ask_async(app, path, **request))
    return Visit(validator(app), path, **request).answer()


def _ask_bare(app, path, **request) -> Answer:
    return Visit(app, path, **request).answer()


def run(coroutine):
    """Run it in an event loop, not for ever."""
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


def answering(function: Callable[[Any], Any]) -> None:
    """Have both views answer with what *function* makes of the request."""

    async def wait_and_call(request, **arguments):
        await asyncio.sleep(0)
        return function(request, **arguments)

    views["sync"] = function
    views["async"] = wait_and_call


def see(request, **arguments):
    """Show the correlation, and emit an event."""
    now = pgtrack.current()
    pgtrack.emit("custom", name="seen")
    return JsonResponse({"session": now.session_id, "request": now.request_id})


def summary(events: Events) -> list[tuple[Any, ...]]:
    """Return what the events say, in short."""
    return [
        (e.api_method, e.api_path, e.api_status_code)
        if e.type == "api.response"
        else (e.type, e.error_type or e.name or e.journey_step_id)
        for e in events
    ]


def responses(events: Events) -> list[tuple[Any, ...]]:
    """Return what the events of requests say."""
    return summary(events.of_type("api.response"))


@pytest.fixture(autouse=True)
def _fresh_views(request: pytest.FixtureRequest) -> Iterator[None]:
    views.clear()
    answering(see)
    yield
    views.clear()
    is_untidy = request.node.get_closest_marker("filterwarnings") is not None
    if is_untidy or threading.active_count() > 1:
        gc.collect()  # asgiref's futures hold errors, which hold its threads


@pytest.fixture(autouse=True)
def _quiet_django(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps the tracebacks that Django logs, and the threads they know."""
    monkeypatch.setattr(logging.getLogger("django"), "disabled", True)
    for name in ("request", "security.SuspiciousOperation"):
        monkeypatch.setattr(logging.getLogger(f"django.{name}"), "disabled", True)


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


def is_fresh(session_id: str | None) -> bool:
    """Return whether a session was made for one request."""
    return session_id is not None and session_id.startswith("srv-")


SESSION = {"X-Session-ID": "sess_ann", "X-Request-ID": "req-1"}


# --- the matrix: sync and async views, WSGI and ASGI, every order -----------------


@order
@gateway
@view
class TestView:
    """A view, wherever the middleware stands."""

    def test_keeps_the_session(self, gateway, view, order, events) -> None:
        """The view and its events are in the session of the headers, told once."""
        app = make_handler(gateway, order)

        answer = ask(app, f"/{view}/", headers=SESSION)

        assert (200, "req-1") == (answer.status, answer.headers["x-request-id"])
        assert b'{"session": "sess_ann", "request": "req-1"}' == answer.body
        assert [("custom", "seen"), ("GET", f"/{view}/", 200)] == summary(events)
        assert [("sess_ann", "req-1")] * 2 == [
            (event.session_id, event.metadata["request_id"]) for event in events
        ]

    def test_keeps_user_and_journey(self, gateway, view, order, events) -> None:
        """Who is identified in the view is the request's user, and a journey holds."""

        @pgtrack.journey_step("paid")
        def pay():
            return pgtrack.current().journey_id

        def checkout(request):
            with pgtrack.journey("checkout"):
                pgtrack.identify("u_ann")
                return HttpResponse(pay())

        answering(checkout)
        app = make_handler(gateway, order)

        answer = ask(app, f"/{view}/", headers=SESSION)

        assert b"checkout" == answer.body
        assert [("journey.step", "paid"), ("GET", f"/{view}/", 200)] == summary(events)
        assert ["u_ann", "u_ann"] == [event.user_id for event in events]
        assert ["checkout", None] == [event.journey_id for event in events]

    def test_tells_an_exception(self, gateway, view, order, events) -> None:
        """What the view raises is the error of the 500, which has the request id."""

        def fail(request):
            msg = "no such card"
            raise LookupError(msg)

        answering(fail)
        app = make_handler(gateway, order)

        answer = ask(app, f"/{view}/", headers=SESSION)

        assert (500, "req-1") == (answer.status, answer.headers["x-request-id"])
        assert [("error", "LookupError"), ("GET", f"/{view}/", 500)] == summary(events)
        assert "no such card" == events[0].error_message
        assert {"sess_ann"} == {event.session_id for event in events}

    def test_leaves_nothing_behind(self, gateway, view, order, events) -> None:
        """The next request, without headers, sees none of the one before it."""

        def leave_open(request):
            pgtrack.identify("u_ann")
            pgtrack.session("sess_left_open").__enter__()
            return HttpResponse()

        app = make_handler(gateway, order)

        answering(leave_open)
        ask(app, f"/{view}/", headers=SESSION)
        events.clear()
        answering(see)
        answer = ask(app, f"/{view}/")

        ((custom, response), session_id) = events, events[0].session_id
        assert is_fresh(session_id)
        assert response.session_id == session_id
        assert (None, None) == (custom.user_id, response.user_id)
        assert session_id in answer.body.decode()
        assert "sess_left_open" not in str(current_frame() and pgtrack.current())


def test_takes_part_in_either_kind_of_chain() -> None:
    """Django is told that it can be both, and each instance is what its chain is."""

    async def get_response(request):
        return HttpResponse()

    assert (True, True) == (Middleware.sync_capable, Middleware.async_capable)
    assert iscoroutinefunction(Middleware(get_response))
    assert not iscoroutinefunction(Middleware(lambda request: HttpResponse()))


@gateway
@view
class TestAtOnce:
    """Requests that are served at the same time."""

    def test_never_mix(self, gateway, view, events) -> None:
        """Of many at once, all inside of their views, each has its own ids and user."""
        rounds, width = (8, 25) if view == "sync" or gateway == "wsgi" else (2, 400)
        inside = threading.Barrier(width)
        arrived: dict[int, asyncio.Event] = {}

        async def meet(number):
            """Wait until all of a round are here."""
            start = int(number) // width
            everybody = arrived.setdefault(start, asyncio.Event())
            met[start] += 1
            if met[start] == width:
                everybody.set()
            await everybody.wait()

        met: Counter[int] = Counter()

        def cross(request):
            number = request.headers["X-Number"]
            pgtrack.identify(f"u_{number}")
            inside.wait(TIMEOUT)
            assert pgtrack.current().session_id == f"sess_{number}"
            pgtrack.emit("custom", name=number)
            return HttpResponse(pgtrack.current().session_id)

        async def cross_async(request):
            number = request.headers["X-Number"]
            pgtrack.identify(f"u_{number}")
            if gateway == "wsgi":  # each in an event loop of its own
                await asyncio.to_thread(inside.wait, TIMEOUT)
            else:
                await meet(number)
            pgtrack.emit("custom", name=number)
            return HttpResponse(pgtrack.current().session_id)

        views.update({"sync": cross, "async": cross_async})
        app = make_handler(gateway, [OURS, CALLING])

        def headers(number):
            return {"X-Session-ID": f"sess_{number}", "X-Number": str(number)}

        async def ask_all(numbers):
            ask = [ask_async(app, f"/{view}/", headers=headers(n)) for n in numbers]
            return [answer.body.decode() for answer in await asyncio.gather(*ask)]

        bodies: list[str] = []
        for first in range(0, rounds * width, width):
            numbers = range(first, first + width)
            if gateway == "asgi":
                bodies += run(ask_all(numbers))
            else:
                bodies += start_together(
                    width,
                    lambda i, first=first: (
                        Visit(app, f"/{view}/", headers=headers(first + i))
                        .answer()
                        .body.decode()
                    ),
                )

        numbers = range(rounds * width)
        assert [f"sess_{number}" for number in numbers] == bodies
        told = Counter((event.session_id, event.user_id) for event in events)
        assert {(f"sess_{n}", f"u_{n}"): 2 for n in numbers} == told
        assert all(
            event.session_id == f"sess_{event.name}" for event in events if event.name
        )


class TestDisconnect:
    """Clients that hang up, which Django notices under ASGI since its version 5.0."""

    pytestmark = pytest.mark.skipif(django.VERSION < (5,), reason="not noticed before")

    async def hang_up(self, app, path, is_inside, release=lambda: None):
        """Ask, and hang up once the view is at work."""
        visit = AsyncVisit(path, headers=SESSION)
        task = asyncio.create_task(visit.run(app))
        await asyncio.to_thread(is_inside.wait, TIMEOUT)
        visit.gone.set()
        if release is not None:
            for _ in range(20):  # time for the cancellation to arrive
                await asyncio.sleep(0)
            release()
        await task
        return visit

    @pytest.mark.parametrize("order", [[OURS], [OURS, CALLING], [OURS, ASYNC]])
    def test_of_an_async_view_is_499(self, order, events) -> None:
        """A view that is cancelled since the client has gone is a 499, and no error."""
        inside = threading.Event()

        async def wait(request):
            inside.set()
            await asyncio.Event().wait()

        views["async"] = wait
        visit = run(self.hang_up(make_handler("asgi", order), "/async/", inside))

        assert [] == visit.sent
        assert [("GET", "/async/", 499)] == summary(events)
        assert "sess_ann" == events[0].session_id

    def test_of_a_sync_view_is_499(self, events) -> None:
        """A sync view runs on in its thread, in the session, and is told as a 499."""
        inside, is_released = threading.Event(), threading.Event()

        def wait(request):
            inside.set()
            assert is_released.wait(TIMEOUT)
            return see(request)

        views["sync"] = wait
        app = make_handler("asgi")
        run(self.hang_up(app, "/sync/", inside, is_released.set))

        assert {("custom", "seen"), ("GET", "/sync/", 499)} == set(summary(events))
        assert {"sess_ann"} == {event.session_id for event in events}

    def test_leaves_nothing_behind(self, events) -> None:
        """The request after one that was cancelled has a session of its own."""
        inside = threading.Event()

        async def wait(request):
            pgtrack.identify("u_ann")
            inside.set()
            await asyncio.Event().wait()

        async def both():
            views["async"] = wait
            await self.hang_up(app, "/async/", inside)
            answering(see)
            await ask_async(app, "/async/")

        app = make_handler("asgi")
        run(both())

        assert [499, None, 200] == [event.api_status_code for event in events]
        assert is_fresh(events[2].session_id)
        assert [None, None] == [event.user_id for event in events[1:]]


# --- the answer -------------------------------------------------------------------


@gateway
class TestRequest:
    """The one event of a request, and the id that its answer carries."""

    @pytest.mark.parametrize(
        ("raised", "status"),
        [
            (Http404, 404),
            (PermissionDenied, 403),
            (BadRequest, 400),
            (SuspiciousOperation, 400),
            (MultiPartParserError, 400),
        ],
    )
    def test_has_the_status_of_the_exception(
        self, gateway, raised, status, events
    ) -> None:
        """Exceptions that Django has an answer for have its status, and no error."""

        def refuse(request):
            raise raised

        answering(refuse)
        answer = ask(make_handler(gateway), "/sync/", headers=SESSION)

        assert (status, "req-1") == (answer.status, answer.headers["x-request-id"])
        assert [("GET", "/sync/", status)] == summary(events)

    def test_without_a_route_has_the_path_as_it_came(self, gateway, events) -> None:
        """A request that no route fits is told by its path, and carries the id."""
        answer = ask(make_handler(gateway), "/nowhere/7", headers=SESSION)

        assert (404, "req-1") == (answer.status, answer.headers["x-request-id"])
        assert [("GET", "/nowhere/7", 404)] == summary(events)

    def test_has_a_fresh_session_without_headers(self, gateway, events) -> None:
        """Without headers each request has a session and a request id of its own."""
        app = make_handler(gateway)

        ids = [ask(app, "/sync/").headers["x-request-id"] for _ in range(2)]

        sessions = [event.session_id for event in events]
        assert sessions[0] == sessions[1] != sessions[2] == sessions[3]
        assert all(map(is_fresh, sessions))
        assert ids == [e.metadata["request_id"] for e in events.of_type("api.response")]

    def test_keeps_the_request_id_of_the_view(self, gateway, events) -> None:
        """A view that sets `X-Request-ID` itself has its way."""
        answering(lambda request: HttpResponse(headers={"x-request-id": "mine"}))

        answer = ask(make_handler(gateway), "/sync/", headers=SESSION)

        assert "mine" == answer.headers["x-request-id"]

    def test_is_failed_by_a_status_alone(self, gateway, events) -> None:
        """A view that answers with a 500 of its own makes an error without a type."""
        answering(lambda request: HttpResponse(status=503))
        ask(make_handler(gateway), "/sync/")

        assert [("error", "503"), ("GET", "/sync/", 503)] == summary(events)

    def test_has_no_error_but_that_of_a_500(self, gateway, events) -> None:
        """An exception that another middleware answered is nobody's 500."""

        def fail(request):
            raise LookupError

        answering(fail)
        ask(make_handler(gateway, [OURS, HANDLING]), "/sync/")
        ask(make_handler(gateway, [OURS, HANDLING]), "/tracked/")

        assert [
            ("error", "503"),
            ("GET", "/sync/", 503),
            ("error", "LookupError"),  # which `track_api` saw
            ("GET", "/tracked/", 503),
        ] == summary(events)

    def test_tells_what_other_middleware_raises(self, gateway, events) -> None:
        """An exception of middleware further inside is the error of its 500."""

        def fail(request):
            msg = "in the middleware"
            raise LookupError(msg)

        views["before"] = fail
        app = make_handler(gateway, [OURS, CALLING])

        answer = ask(app, "/sync/", headers=SESSION)

        assert (500, "req-1") == (answer.status, answer.headers["x-request-id"])
        assert [("error", "LookupError"), ("GET", "/sync/", 500)] == summary(events)

    def test_sees_a_user_that_middleware_identifies(self, gateway, events) -> None:
        """`identify` before and after the view, in whatever thread, names the user."""
        app = make_handler(gateway, [OURS, CALLING])

        views["before"] = lambda request: pgtrack.identify("u_ann")
        ask(app, "/sync/")
        views["before"] = lambda request: None

        def late(request, response):
            threads = [
                threading.Thread(target=pgtrack.bind(lambda: pgtrack.identify("u_b")))
            ]
            for thread in threads:
                thread.start()
                thread.join(TIMEOUT)
            return response

        ask(make_handler(gateway, [OURS, HANDLING]), "/sync/")
        views["sync"] = lambda request: late(request, HttpResponse())
        ask(app, "/sync/")

        told = events.of_type("api.response")
        assert ["u_ann", None, "u_b"] == [event.user_id for event in told]

    @UNCLOSED
    @pytest.mark.parametrize("debug", [False, True])
    def test_survives_what_escapes_from_django(self, gateway, debug, events) -> None:
        """With DEBUG_PROPAGATE_EXCEPTIONS the exception comes out, and is told."""

        def fail(request):
            raise LookupError

        answering(fail)
        app = make_handler(gateway)

        with (
            override_settings(DEBUG_PROPAGATE_EXCEPTIONS=True, DEBUG=debug),
            pytest.raises(LookupError),
        ):
            ask(app, "/sync/", headers=SESSION)

        assert [("error", "LookupError"), ("GET", "/sync/", 500)] == summary(events)
        assert current_frame() is None

    @UNCLOSED
    def test_leaves_complaints_to_django(self, gateway, events) -> None:
        """Middleware that returns no response is Django's business, told as a 500."""
        views["after"] = lambda request, response: None
        app = make_handler(gateway, [OURS, CALLING])

        with pytest.raises(AttributeError, match="NoneType"):
            ask(app, "/sync/")

        assert ("GET", "/sync/", 500) == summary(events)[-1]

    def test_is_not_told_where_excluded(self, gateway, events) -> None:
        """Excluded paths make no event of their own, but keep the correlation."""
        app = make_handler(gateway, PGTRACK={"exclude": ["/sync/", "/users/*"]})

        answers = [ask(app, path, headers=SESSION) for path in ("/sync/", "/users/7/")]
        ask(app, "/")

        assert ["req-1"] * 2 == [answer.headers["x-request-id"] for answer in answers]
        assert [("GET", "/", 200)] == responses(events)
        assert 3 == len(events.of_type("custom"))

    def test_is_not_told_with_track_off(self, gateway, events) -> None:
        """`"track": False` leaves the correlation alone."""
        app = make_handler(gateway, PGTRACK={"track": False})

        answer = ask(app, "/sync/", headers=SESSION)

        assert "req-1" == answer.headers["x-request-id"]
        assert [("custom", "seen")] == summary(events)
        assert "sess_ann" == events[0].session_id

    def test_of_cors_asking_passes_untouched(self, gateway, events) -> None:
        """A preflight is answered without our header, and makes no event."""
        headers = {
            "Origin": "https://x.example",
            "Access-Control-Request-Method": "PUT",
        }
        answering(lambda request: HttpResponse(str(pgtrack.current().session_id)))

        answer = ask(make_handler(gateway), "/sync/", method="OPTIONS", headers=headers)
        ask(make_handler(gateway), "/sync/", method="OPTIONS")

        assert b"None" == answer.body
        assert "x-request-id" not in answer.headers
        assert [("OPTIONS", "/sync/", 200)] == summary(events)

    def test_leaves_the_protection_from_forgery_alone(self, gateway, events) -> None:
        """A POST without a token is refused as ever, and told as a 403."""
        csrf = "django.middleware.csrf.CsrfViewMiddleware"
        app = make_handler(gateway, [OURS, csrf])

        answer = ask(app, "/sync/", method="POST", headers=SESSION)

        assert 403 == answer.status
        assert [("POST", "/sync/", 403)] == summary(events)

    def test_works_without_a_client(self, gateway) -> None:
        """Not configured, requests have ids all the same, and events make nothing."""
        answer = ask(make_handler(gateway), "/sync/", headers=SESSION)

        assert b'{"session": "sess_ann", "request": "req-1"}' == answer.body
        assert "req-1" == answer.headers["x-request-id"]
        assert 0 == pgtrack.stats().emitted

    def test_is_served_though_we_fail(self, gateway, monkeypatch) -> None:
        """An error of our own costs the event, and the host nothing."""
        monkeypatch.setattr(_diagnostics, "reraise", False)

        def fail(*_, **__):
            raise ZeroDivisionError

        app = make_handler(gateway)
        monkeypatch.setattr(_http, "Served", fail)
        statuses = [ask(app, "/sync/").status]
        monkeypatch.undo()
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(_http.Served, "answer_with", fail)
        statuses.append(ask(app, "/sync/").status)

        assert [200, 200] == statuses
        assert current_frame() is None

    def test_is_told_of_a_trusted_user(self, gateway) -> None:
        """`X-User-ID` is read where the client's settings trust it, and only there."""
        headers = {**SESSION, "X-User-ID": "u_ann"}
        with capture() as untrusted:
            ask(make_handler(gateway), "/sync/", headers=headers)
        with capture(trust_user_header=True) as trusted:
            ask(make_handler(gateway), "/sync/", headers=headers)

        assert [None] * 2 == [event.user_id for event in untrusted]
        assert ["u_ann"] * 2 == [event.user_id for event in trusted]


@pytest.mark.skipif(django.VERSION < (5,), reason="Django keeps it itself")
@pytest.mark.parametrize("order", [[], [OURS]], ids=["without", "with"])
def test_a_request_is_not_kept_by_what_it_told(order, events) -> None:
    """Request and response are freed at once, not by the garbage collector."""
    gone: list[weakref.ref[Any]] = []

    def remember(request):
        response = HttpResponse()
        gone.extend([weakref.ref(request), weakref.ref(response)])
        return response

    answering(remember)
    app = make_handler(order=order)
    gc.collect()
    gc.disable()
    try:
        Visit(app, "/sync/").answer()
        left = [reference() for reference in gone]
    finally:
        gc.enable()

    assert [None, None] == left


class TestHostileHeaders:
    """Header values that nobody honest sends."""

    @gateway
    def test_lead_to_nothing(self, gateway, events, caplog) -> None:
        """What does not fit the grammar is neither echoed nor told nor logged."""
        app = make_handler(gateway)
        caplog.set_level("DEBUG", logger="pgtrack")

        def take():
            taken = [event.to_wire() for event in events]
            events.clear()
            return taken

        def send_all(values, send):
            return assert_harmless(
                values,
                send,
                take,
                lambda: "".join(r.getMessage() for r in caplog.records),
            )

        if gateway == "wsgi":
            values = hostile_values(1000, seed=5)
            visit = lambda headers: Visit(app, "/sync/", headers=headers).answer()  # noqa: E731
            count = send_all(values, lambda h: visit(h).headers["x-request-id"])
        else:
            values = hostile_values(200, seed=6)
            with asyncio.Runner() if sys.version_info >= (3, 11) else _runner() as loop:
                visit = lambda h: loop.run(ask_async(app, "/async/", headers=h))  # noqa: E731
                count = send_all(values, lambda h: visit(h).headers["x-request-id"])

        assert count > len(values) / 20

    def test_of_two_with_a_name(self, events) -> None:
        """Two ids are none under WSGI, that joins them; under ASGI the first counts."""

        async def go():
            await AsyncVisit(
                "/async/",
                headers=[
                    ("X-Session-ID", "sess_one"),
                    ("X-Session-ID", "sess_two"),
                    ("X_Request_ID", "underscored"),
                ],
            ).run(make_handler("asgi"))

        run(go())
        ask(make_handler(), "/sync/", headers={"X-Session-ID": "sess_one,sess_two"})

        assert ["sess_one"] * 2 == [event.session_id for event in events[:2]]
        assert events[0].metadata["request_id"] != "underscored"
        assert is_fresh(events[2].session_id)


@contextlib.contextmanager
def _runner():
    """Do what `asyncio.Runner` does from Python 3.11 on."""
    loop = asyncio.new_event_loop()
    try:
        yield types.SimpleNamespace(run=loop.run_until_complete)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


# --- routes -----------------------------------------------------------------------


class TestRoute:
    """The template that a request is told by."""

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ("/", "/"),
            ("/users/7/", "/users/<int:id>/"),
            ("/c++/gcc/", "/c++/<slug:name>/"),
            ("/c++/2026", "/c++/<year>"),
            ("/about/", "/about/"),
            ("/articles/2026/a-b/", "/articles/<year>/<slug>/"),
            ("/api/2/orders/x-1/", "/api/<int:version>/orders/<pk>/"),
            (
                "/api/2/items/6ba7b810-9dad-11d1-80b4-00c04fd430c8",
                "/api/<int:version>/items/<uuid:id>",
            ),
            ("/old/page/", "/old/<str:page>/"),
        ],
    )
    @gateway
    def test_is_that_of_the_patterns(self, gateway, asked, told, events) -> None:
        """What `path`, `re_path` and `include` were given, readable and from `/` on."""
        ask(make_handler(gateway), asked)

        assert [("GET", told, 200)] == responses(events)

    @pytest.mark.parametrize(
        ("regex", "shown"),
        [
            (r"^users/$", "users/"),
            (r"^users/(?P<pk>[^/.]+)/$", "users/<pk>/"),
            (r"^users\.(?P<format>[a-z0-9]+)/?$", "users.<format>/"),
            (r"^(\d+)/([a-z()]+)\Z", "<var>/<var>"),
            (r"^a(?:/page-(?P<page>\d+(?:-\d+)?))?/$", "a/page-<page>/"),
            (r"^(?P<both>(a|b(c))d)/e{2,3}/$", "<both>/e/"),
            (r"^\d{4}/[\]a-z]*?/.+/favicon.ico$", "<var>/<var>/<var>/favicon.ico"),
            (r"^(?i:x)(?=y)(?!z)y(?P<n>.)(?P=n)$", "xy<n>"),
            (r"^[]a]/\w+\-\s$", "<var>/<var>-<var>"),
            ("", ""),
        ],
    )
    def test_of_a_regular_expression_is_readable(self, regex, shown) -> None:
        """Groups are shown by name, what is matched by rules as `<var>`."""
        assert shown == _readable(regex)

    @gateway
    def test_has_the_prefix_that_django_is_mounted_at(self, gateway, events) -> None:
        """`SCRIPT_NAME` and `root_path` are part of the template and of the path."""
        app = make_handler(gateway)
        if gateway == "wsgi":
            ask(app, "/users/7/", SCRIPT_NAME="/shop")
            ask(app, "/nowhere", SCRIPT_NAME="/shop")
        else:
            ask(app, "/shop/users/7/", root_path="/shop")
            ask(app, "/shop/nowhere", root_path="/shop")

        assert [
            ("GET", "/shop/users/<int:id>/", 200),
            ("GET", "/shop/nowhere", 404),
        ] == responses(events)

    @gateway
    def test_has_the_language_that_it_was_routed_in(self, gateway, events) -> None:
        """`i18n_patterns` are told as Django words them: by the language asked for."""
        from django.conf.urls.i18n import i18n_patterns

        class Translated:
            urlpatterns = i18n_patterns(
                path("users/<int:id>/", sync_view), re_path(r"^(?P<id>\d+)$", sync_view)
            )

        locale = "django.middleware.locale.LocaleMiddleware"
        app = make_handler(gateway, [OURS, locale], ROOT_URLCONF=Translated)
        with override_settings(ROOT_URLCONF=Translated):
            ask(app, "/de/users/7/")
            ask(app, "/en/7")

        assert [
            ("GET", "/de/users/<int:id>/", 200),
            ("GET", "/en/<id>", 200),
        ] == responses(events)

    def test_of_a_stream_outlives_the_language(self, events) -> None:
        """A stream that is read later is told by the route as it was found."""
        from django.conf.urls.i18n import i18n_patterns
        from django.utils import translation

        class Translated:
            urlpatterns = i18n_patterns(re_path(r"^(?P<id>\d+)$", sync_view))

        views["sync"] = lambda request, **_: StreamingHttpResponse(stream(1))
        locale = "django.middleware.locale.LocaleMiddleware"
        app = make_handler("wsgi", [OURS, locale], ROOT_URLCONF=Translated)
        with override_settings(ROOT_URLCONF=Translated):
            visit = Visit(app, "/de/7")
        with translation.override("en"):
            visit.answer()

        assert [("GET", "/de/<id>", 200)] == responses(events)

    @gateway
    def test_of_patterns_that_middleware_chose(self, gateway, events) -> None:
        """`request.urlconf` has its own routes."""

        class Others:
            urlpatterns = (path("others/<slug:name>", sync_view),)

        views["before"] = lambda request: setattr(request, "urlconf", Others)
        ask(make_handler(gateway, [OURS, CALLING]), "/others/x")

        assert [("GET", "/others/<slug:name>", 200)] == responses(events)

    def test_of_a_match_that_was_made_by_hand(self, events) -> None:
        """A match without the patterns that were tried is taken at its word."""

        def rematch(request, **arguments):
            request.resolver_match = ResolverMatch(see, (), {}, route=views["route"])
            return HttpResponse()

        answering(rematch)
        for views["route"] in ("pages/<path:url>", None):
            ask(make_handler(), "/sync/")

        assert ["/pages/<path:url>", "/sync/"] == [e.api_path for e in events]


# --- track_api --------------------------------------------------------------------


class TestTrackApi:
    """`track_api` on a view is the request's own event."""

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ("/tracked/", ("GET", "/tracked/", 200)),
            ("/tracked/async/", ("PUT", "/given/{id}", 200)),
            ("/class/", ("GET", "/of/the/class", 200)),
            ("/class/async/", ("GET", "/of/the/async/class", 200)),
        ],
    )
    @gateway
    def test_merges(self, gateway, asked, told, events) -> None:
        """One event, with the path and method that the decorator was given."""
        ask(make_handler(gateway), asked, headers=SESSION)

        assert [told] == responses(events)

    @gateway
    def test_names_what_failed(self, gateway, events) -> None:
        """The error of a decorated view has its name, and is told once."""

        def fail(request):
            raise LookupError

        answering(fail)
        ask(make_handler(gateway), "/tracked/async/")

        assert [
            ("error", "LookupError"),
            ("PUT", "/given/{id}", 500),
        ] == summary(events)
        assert f"{__name__}.tracked_async_view" == events[0].error_component

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (Http404(), 404),
            (PermissionDenied(), 403),
            (BadRequest(), 400),
            (SuspiciousOperation(), 400),
            (MultiPartParserError(), 400),
            (ValueError(), 500),
        ],
    )
    def test_knows_the_exceptions_of_django(self, error, status, events) -> None:
        """Outside of a request, too, they are the statuses that Django gives them."""

        @pgtrack.track_api("/helper")
        def helper():
            raise error

        with pytest.raises(type(error)):
            helper()

        assert [(None, "/helper", status)] == responses(events)
        assert (status == 500) == bool(events.of_type("error"))
        assert status == _errors.status_of(error)


# --- streams ----------------------------------------------------------------------


def stream(*steps: Any, end: Callable[[], object] = lambda: None):
    """Yield under which session each step runs; call what can be called."""
    try:
        for step in steps:
            if callable(step):
                step()
            pgtrack.emit("custom", name="step")
            yield f"{pgtrack.current().session_id} "
    finally:
        end()


async def stream_async(*steps: Any, end: Callable[[], object] = lambda: None):
    """Do as `stream` does, and await what can be awaited."""
    try:
        for step in steps:
            result = step() if callable(step) else None
            if hasattr(result, "__await__"):
                await result
            pgtrack.emit("custom", name="step")
            yield f"{pgtrack.current().session_id} "
    finally:
        end()


def streaming(*steps, kind="sync", **options):
    """Have the views answer with a stream."""
    make = stream if kind == "sync" else stream_async
    answering(lambda request: StreamingHttpResponse(make(*steps, **options)))


CROSSED = pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")


@CROSSED
@gateway
@view
@pytest.mark.parametrize("order", [[OURS], [OURS, SYNC, ASYNC], [ASYNC, SYNC, OURS]])
class TestStream:
    """Streams, sync and async, under either gateway."""

    def test_keeps_session_and_user(self, gateway, view, order, events) -> None:
        """Each step is in the session, and who it identifies is the request's user."""
        streaming(1, lambda: pgtrack.identify("u_ann"), 3, kind=view)

        answer = ask(make_handler(gateway, order), f"/{view}/", headers=SESSION)

        assert b"sess_ann sess_ann sess_ann " == answer.body
        assert "req-1" == answer.headers["x-request-id"]
        assert [("custom", "step")] * 3 + [("GET", f"/{view}/", 200)] == summary(events)
        assert [None, "u_ann", "u_ann", "u_ann"] == [event.user_id for event in events]
        assert "incomplete" not in events[-1].metadata

    def test_keeps_the_journey(self, gateway, view, order, events) -> None:
        """A journey that one step opens goes on in the next, and ends with the body."""
        journey = pgtrack.journey("checkout")
        streaming(journey.__enter__, 2, kind=view)

        ask(make_handler(gateway, order), f"/{view}/", headers=SESSION)

        assert ["checkout", "checkout", None] == [e.journey_id for e in events]
        assert current_frame() is None

    @UNCLOSED
    def test_tells_an_exception(self, gateway, view, order, events) -> None:
        """What a step raises is told, and the answer, which had begun, is cut short."""

        def fail():
            raise LookupError

        streaming(1, fail, kind=view)

        app = make_handler(gateway, order)
        # The validator stumbles over it.
        ask_for = _ask_bare if gateway == "wsgi" else ask
        with pytest.raises(LookupError):
            ask_for(app, f"/{view}/", headers=SESSION)

        _, error, response = summary(events)
        assert ("error", "LookupError") == error
        assert ("GET", f"/{view}/", 200) == response
        assert events[-1].metadata["incomplete"] is True
        assert {"sess_ann"} == {event.session_id for event in events}
        assert current_frame() is None


class TestStreamSteps:
    """A stream under WSGI, step by step."""

    def test_two_at_once_never_mix(self, events) -> None:
        """Streams that take turns in one thread each keep their session."""
        app = make_handler()
        streaming(*range(20))
        visits = [
            Visit(app, "/sync/", headers={"X-Session-ID": f"sess_{number}"})
            for number in range(100)
        ]
        bodies = zip(*(iter(visit.body) for visit in visits), strict=True)
        between = [(turn, current_frame()) for turn in bodies]
        for visit in visits:
            visit.body.close()

        expected = tuple(b"sess_%d " % number for number in range(100))
        assert [(expected, None)] * 20 == between
        told = Counter(event.session_id for event in events)
        assert {f"sess_{number}": 21 for number in range(100)} == told

    def test_of_a_client_that_hangs_up(self, events) -> None:
        """Closed before its end, it is incomplete; its clean-up is in the session."""
        streaming(1, 2, end=lambda: pgtrack.emit("custom", name="cleaned up"))
        visit = Visit(make_handler(), "/sync/", headers=SESSION)

        next(iter(visit.body))
        visit.body.close()
        visit.body.close()

        assert [
            ("custom", "step"),
            ("custom", "cleaned up"),
            ("GET", "/sync/", 200),
        ] == summary(events)
        assert {"sess_ann"} == {event.session_id for event in events}
        assert events[-1].metadata["incomplete"] is True
        assert current_frame() is None

    def test_leaves_nothing_behind(self, events) -> None:
        """What a stream leaves open is its own, and the next request has none of it."""
        opened = pgtrack.session("sess_of_the_stream")
        streaming(opened.__enter__, 2)
        app = make_handler()
        visit = Visit(app, "/sync/", headers=SESSION)
        parts = iter(visit.body)

        seen = [next(parts), current_frame(), next(parts), current_frame()]
        visit.body.close()
        answering(see)
        ask(app, "/sync/")

        assert [b"sess_of_the_stream ", None] * 2 == seen
        assert is_fresh(events[-1].session_id)
        assert events[-1].session_id == events[-2].session_id

    def test_lasts_to_its_end(self, events, monkeypatch) -> None:
        """The duration is that of the whole stream."""
        now = [10.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])

        def take_time():
            now[0] += 1.5

        streaming(1, take_time, take_time)
        ask(make_handler(), "/sync/")

        assert 3000 == events[-1].api_duration_ms

    def test_of_head_is_complete_unread(self, events) -> None:
        """Of an answer to HEAD nobody gets the body, and nothing is missing."""
        streaming(1, 2)
        for method in ("HEAD", "GET"):
            for is_begun in (False, True):
                visit = Visit(make_handler(), "/sync/", method=method)
                if is_begun:
                    next(iter(visit.body))
                visit.body.close()

        told = events.of_type("api.response")
        assert [None, None, True, True] == [e.metadata.get("incomplete") for e in told]
        assert ["HEAD", "HEAD", "GET", "GET"] == [e.api_method for e in told]

    def test_that_is_thrown_away_is_told(self, events) -> None:
        """Middleware around ours may answer with something else; one event is told."""
        streaming(1)
        views["after"] = lambda request, response: HttpResponse("instead")
        ask(make_handler("wsgi", [CALLING, OURS]), "/sync/")
        gc.collect()

        assert [("GET", "/sync/", 200)] == summary(events)
        assert events[0].metadata["incomplete"] is True

    def test_that_failed_is_told_as_that(self, events) -> None:
        """A stream with the status 503 makes the error of that, too."""
        answering(lambda request: StreamingHttpResponse(stream(1), status=503))
        ask(make_handler(), "/sync/")

        assert [
            ("custom", "step"),
            ("error", "503"),
            ("GET", "/sync/", 503),
        ] == summary(events)

    def test_is_lazy(self, events) -> None:
        """Nothing of the stream runs before the server asks for it."""
        ran: list[int] = []
        streaming(lambda: ran.append(1))
        visit = Visit(make_handler(), "/sync/")

        assert [] == ran
        assert [] == list(events)
        visit.answer()
        assert [1] == ran

    @pytest.mark.parametrize("order", [[OURS, "gzip"], ["gzip", OURS]])
    @gateway
    def test_may_be_compressed(self, gateway, order, events) -> None:
        """Compression inside or around ours sees the same stream."""
        compressing = "django.middleware.gzip.GZipMiddleware"
        order = [compressing if name == "gzip" else name for name in order]
        kind = "sync" if gateway == "wsgi" else "async"
        streaming(1, 2, kind=kind)
        headers = {**SESSION, "Accept-Encoding": "gzip"}

        answer = ask(make_handler(gateway, order), f"/{kind}/", headers=headers)

        assert b"sess_ann sess_ann " == gzip.decompress(answer.body)
        assert [("custom", "step")] * 2 + [("GET", f"/{kind}/", 200)] == summary(events)
        assert "incomplete" not in events[-1].metadata

    def test_of_a_class_of_its_own_is_left_alone(self, events) -> None:
        """A streaming response that is none of Django's is told as it begins."""

        class Own(HttpResponseBase):
            streaming = True

            def __iter__(self):
                return iter([b"own"])

        answering(lambda request: Own())
        answer = ask(make_handler(), "/sync/", headers=SESSION)

        assert b"own" == answer.body
        assert [("GET", "/sync/", 200)] == summary(events)


class TestAsyncStream:
    """A stream under ASGI, of a client that hangs up."""

    pytestmark = pytest.mark.skipif(django.VERSION < (5,), reason="not noticed before")

    @pytest.mark.parametrize("where", ["in a step", "while it is sent"])
    def test_is_incomplete(self, where, events) -> None:
        """The stream is cancelled, wherever it is, and told as incomplete."""
        cleaned: list[Any] = []

        async def hang_up():
            forever = asyncio.Event()
            visit = AsyncVisit("/async/", headers=SESSION)

            async def leave():
                visit.gone.set()
                await forever.wait()

            async def on_send(message):
                if where == "while it is sent" and message.get("body"):
                    await leave()

            visit.on_send = on_send
            steps = [1, leave] if where == "in a step" else [1, 2]
            end = lambda: cleaned.append(pgtrack.current().session_id)  # noqa: E731
            streaming(*steps, kind="async", end=end)
            await visit.run(make_handler("asgi"))
            return visit

        visit = run(hang_up())

        assert 200 == visit.status
        assert [("custom", "step"), ("GET", "/async/", 200)] == summary(events)
        assert events[-1].metadata["incomplete"] is True
        assert {"sess_ann"} == {event.session_id for event in events}
        assert ["sess_ann"] * (where == "in a step") == cleaned[:1] * (
            where == "in a step"
        )
        assert 1 == len(cleaned)

    def test_leaves_nothing_behind(self, events) -> None:
        """What a stream leaves open is its own, and the next request has none of it."""
        opened = pgtrack.session("sess_of_the_stream")
        streaming(opened.__enter__, 2, kind="async")

        async def ask_twice():
            app = make_handler("asgi")
            first = await ask_async(app, "/async/", headers=SESSION)
            left = current_frame()
            answering(see)
            await ask_async(app, "/async/")
            return first.body, left

        body, left = run(ask_twice())

        assert b"sess_of_the_stream " * 2 == body
        assert left is None
        assert is_fresh(events[-1].session_id)
        assert events[-1].session_id == events[-2].session_id

    def test_many_at_once_never_mix(self, events) -> None:
        """Streams that take turns in one event loop each keep their session."""

        async def ask_all():
            turns = [asyncio.Event() for _ in range(3)]
            waiting: Counter[int] = Counter()

            def turn(number):
                async def wait():
                    waiting[number] += 1
                    if waiting[number] == 200:
                        turns[number].set()
                    await turns[number].wait()

                return wait

            streaming(*map(turn, range(3)), kind="async")
            app = make_handler("asgi")
            return await asyncio.gather(
                *(
                    ask_async(app, "/async/", headers={"X-Session-ID": f"sess_{n}"})
                    for n in range(200)
                )
            )

        answers = run(ask_all())

        assert [b"sess_%d " % n * 3 for n in range(200)] == [a.body for a in answers]
        told = Counter(event.session_id for event in events)
        assert {f"sess_{number}": 4 for number in range(200)} == told


@gateway
class TestFile:
    """`FileResponse`, which a server may send without asking Python for each block."""

    def test_is_sent_as_ever(self, gateway, events, tmp_path) -> None:
        """The file is sent whole, by the server's own wrapper where it has one."""
        file = tmp_path / "a.txt"
        file.write_bytes(b"x" * 100_000)
        opened: list[Any] = []

        def send(request):
            opened.append(file.open("rb"))
            return FileResponse(opened[-1])

        answering(send)
        wrapped: list[Any] = []

        class Wrapper(FileWrapper):
            def __init__(self, filelike, blksize):
                wrapped.append(filelike)
                super().__init__(filelike, blksize)

        app = make_handler(gateway)
        if gateway == "wsgi":
            ways = [{"wsgi.file_wrapper": Wrapper}, {}]
            answers = [Visit(app, "/sync/", **way).answer() for way in ways]
        else:
            with pytest.warns(Warning, match="must consume synchronous iterators"):
                answers = [ask(app, "/sync/")]

        assert [100_000] * len(answers) == [len(answer.body) for answer in answers]
        assert opened[:1] * (gateway == "wsgi") == wrapped
        assert all(file.closed for file in opened)
        assert [("GET", "/sync/", 200)] * len(answers) == summary(events)
        assert all("incomplete" not in event.metadata for event in events)

    def test_not_modified_is_told_as_304(self, gateway, events) -> None:
        """`ConditionalGetMiddleware` inside of ours decides the status."""
        conditional = "django.middleware.http.ConditionalGetMiddleware"
        app = make_handler(gateway, [OURS, conditional])
        answering(lambda request: HttpResponse("same"))

        etag = ask(app, "/sync/").headers["etag"]
        answer = ask(app, "/sync/", headers={"If-None-Match": etag, **SESSION})

        assert (304, "req-1") == (answer.status, answer.headers["x-request-id"])
        assert [200, 304] == [event.api_status_code for event in events]


# --- inside of the other middleware ----------------------------------------------


class TestInside:
    """With `pgtrack.integrations.asgi` or `wsgi` around Django."""

    def wrap(self, gateway, handler, **options):
        """Put the middleware of the gateway around Django."""
        kind = wsgi.Middleware if gateway == "wsgi" else asgi.Middleware
        return kind(handler, **options)

    @CROSSED
    @gateway
    @view
    @pytest.mark.parametrize("order", [[OURS], [SYNC, OURS, ASYNC], [OURS, OURS]])
    def test_is_told_once_with_the_route(self, gateway, view, order, events) -> None:
        """One event, of the outer, with the route and the error of Django."""

        def fail(request, **arguments):
            raise LookupError

        views["sync"] = see
        app = self.wrap(gateway, make_handler(gateway, order))
        ask(app, "/users/7/", headers=SESSION)
        answering(fail)
        answer = ask(app, f"/{view}/", headers=SESSION)
        streaming(1, kind=view)
        ask(app, f"/{view}/", headers=SESSION)

        assert (500, "req-1") == (answer.status, answer.headers["x-request-id"])
        assert [
            ("custom", "seen"),
            ("GET", "/users/<int:id>/", 200),
            ("error", "LookupError"),
            ("GET", f"/{view}/", 500),
            ("custom", "step"),
            ("GET", f"/{view}/", 200),
        ] == summary(events)
        assert {"sess_ann"} == {event.session_id for event in events}

    @gateway
    def test_is_told_by_whoever_tells(self, gateway, events) -> None:
        """An outer one without `track` leaves the event to the one in Django."""
        app = self.wrap(gateway, make_handler(gateway), track=False)

        ask(app, "/users/7/", headers=SESSION)

        assert [("GET", "/users/<int:id>/", 200)] == responses(events)

    def test_of_a_bridge_is_told_once(self, events) -> None:
        """Django of WSGI in an application of ASGI adds the route to its event."""
        app = make_handler()

        async def bridge(scope, receive, send):
            environ = scope["path"], {"headers": {}}
            visit = await asyncio.to_thread(Visit, app, environ[0], **environ[1])
            status, body = visit.answer().status, b""
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": body})

        def fail(request):
            raise LookupError

        ask(asgi.Middleware(bridge), "/users/7/", headers=SESSION)
        answering(fail)
        ask(asgi.Middleware(bridge), "/sync/", headers=SESSION)

        assert [
            ("custom", "seen"),
            ("GET", "/users/<int:id>/", 200),
            ("error", "LookupError"),
            ("GET", "/sync/", 500),
        ] == summary(events)
        assert {"sess_ann"} == {event.session_id for event in events}

    def test_is_not_taken_for_another_request(self, events) -> None:
        """A request that a view makes of Django by itself is one of its own."""
        app = make_handler()

        def ask_again(request):
            return HttpResponse(Visit(app, "/users/7/").answer().body)

        views["sync"] = lambda request, **arguments: (
            see(request) if arguments else ask_again(request)
        )
        ask(app, "/sync/", headers=SESSION)

        assert [
            ("GET", "/users/<int:id>/", 200),
            ("GET", "/sync/", 200),
        ] == responses(events)
        assert is_fresh(events[0].session_id)
        assert "sess_ann" == events[-1].session_id


# --- the test clients of Django ---------------------------------------------------


class TestClients:
    """Django's own test clients."""

    def test_client(self, events) -> None:
        """`Client` sees the header, streams, and gets the view's exceptions raised."""
        with override_settings(MIDDLEWARE=[OURS]):
            client = Client()
            answer = client.get("/sync/", headers=SESSION)
            streaming(1, 2)
            body = client.get("/sync/", headers=SESSION).getvalue()

            def fail(request):
                raise LookupError

            answering(fail)
            with pytest.raises(LookupError):
                client.get("/sync/")

        assert "req-1" == answer["X-Request-ID"]
        assert b"sess_ann sess_ann " == body
        assert [200, 200, 500] == [e[2] for e in responses(events)]
        assert 1 == len(events.of_type("error"))

    def test_async_client(self, events) -> None:
        """`AsyncClient` does the same."""

        async def go():
            async with ThreadSensitiveContext():
                client = AsyncClient()
                first = await client.get("/async/", headers=SESSION)
                streaming(1, 2, kind="async")
                second = await client.get("/async/", headers=SESSION)
                return first, [part async for part in second.streaming_content]

        with override_settings(MIDDLEWARE=[OURS]):
            answer, body = run(go())

        assert "req-1" == answer["X-Request-ID"]
        assert [b"sess_ann ", b"sess_ann "] == body
        assert [200, 200] == [e[2] for e in responses(events)]

    def test_request_factory(self, events) -> None:
        """The middleware may be called with a request that was made for a test."""
        request = RequestFactory().get("/users/7/", headers=SESSION)

        response = Middleware(lambda _: HttpResponse())(request)

        assert "req-1" == response["X-Request-ID"]
        assert [("GET", "/users/7/", 200)] == summary(events)


# --- options ----------------------------------------------------------------------


class TestOptions:
    """`settings.PGTRACK`."""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["track"], r"settings\.PGTRACK must be a dict of options \(got list\)"),
            (
                {"endpoint": "x", "trak": 1},
                r"'exclude' and 'track' \(got 'endpoint', 'trak' as well\)",
            ),
            ({"track": "no"}, r"\['track'\] must be True or False \(got str\)"),
            ({"exclude": [7]}, r"\['exclude'\] must be a list of paths"),
            ({"exclude": None}, r"\['exclude'\] must be a list of paths"),
        ],
    )
    @gateway
    def test_that_are_wrong_are_refused(self, gateway, options, said) -> None:
        """A wrong option keeps Django from starting, and says what is right."""
        with pytest.raises(pgtrack.ConfigError, match=said):
            make_handler(gateway, PGTRACK=options)

    def test_are_as_by_default_without_any(self, events) -> None:
        """Without `settings.PGTRACK` every request is told."""
        ask(make_handler("wsgi", PGTRACK={}), "/sync/")

        assert [("GET", "/sync/", 200)] == responses(events)

    def test_the_package_is_missing(self) -> None:
        """One error names Django and the extra."""
        done = run_script(
            """
            import sys
            sys.modules["django"] = None
            sys.modules["asgiref"] = None
            import pgtrack
            try:
                import pgtrack.integrations.django
            except pgtrack.exceptions.MissingDependencyError as error:
                print(error)
            """
        )

        assert "pip install 'pgtrack[django]'" in done.stdout
        assert "'django'" in done.stdout


# --- real servers -----------------------------------------------------------------


class ThreadingServer(socketserver.ThreadingMixIn, WSGIServer):
    """wsgiref's server, with a thread for each request."""

    daemon_threads = False


class QuietHandler(WSGIRequestHandler):
    """It logs nothing."""

    def log_message(self, *_):
        """Write nothing."""


@contextlib.contextmanager
def wsgi_server(app):
    """Serve *app* in a thread."""
    server = make_wsgi_server(
        "127.0.0.1", 0, app, server_class=ThreadingServer, handler_class=QuietHandler
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[:2]
    finally:
        server.shutdown()
        thread.join(TIMEOUT)
        server.server_close()


@contextlib.contextmanager
def serving(gateway, order=(OURS, CALLING)):
    """Serve the site by a real server."""
    app = make_handler(gateway, order)
    serve = wsgi_server if gateway == "wsgi" else uvicorn_server
    options = {} if gateway == "wsgi" else {"lifespan": "off"}
    with serve(app, **options) as address:
        yield address


def fetch(address, path, method="GET", **headers):
    """Ask a server; return status, request id and body."""
    connection = HTTPConnection(*address, timeout=TIMEOUT)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["X-Request-ID"], answer.read().decode()
    finally:
        connection.close()


@gateway
class TestServer:
    """Real sockets: wsgiref's server and uvicorn."""

    def test_keeps_the_session(self, gateway, events) -> None:
        """Views, streams and errors of both kinds, over real connections."""
        kind = "sync" if gateway == "wsgi" else "async"
        ids = {"X-Session-ID": "sess_ann", "X-Request-ID": "req-1"}
        with serving(gateway) as address:
            seen = [fetch(address, p, **ids)[:2] for p in ("/sync/", "/async/", "/no")]
            streaming(1, 2, kind=kind)
            streamed = fetch(address, f"/{kind}/", **ids)
            head = fetch(address, f"/{kind}/", "HEAD", **ids)

        assert [(200, "req-1"), (200, "req-1"), (404, "req-1")] == seen
        assert (200, "req-1", "sess_ann sess_ann ") == streamed
        assert (200, "req-1") == head[:2]
        assert [
            ("GET", "/sync/", 200),
            ("GET", "/async/", 200),
            ("GET", "/no", 404),
            ("GET", f"/{kind}/", 200),
            ("HEAD", f"/{kind}/", 200),
        ] == responses(events)
        assert {"sess_ann"} == {event.session_id for event in events}
        assert all("incomplete" not in event.metadata for event in events)

    def test_never_mixes(self, gateway, events) -> None:
        """Twelve clients at once, each with its own sessions."""

        def ask_some(client):
            found = []
            for number in range(15):
                name = f"{client}.{number}"
                path = "/sync/" if number % 2 else "/async/"
                body = fetch(address, path, **{"X-Session-ID": f"sess_{name}"})[2]
                found.append(f"sess_{name}" in body)
            return found

        with serving(gateway) as address:
            found = start_together(12, ask_some)

        assert [[True] * 15] * 12 == found
        told = Counter(event.session_id for event in events)
        assert {f"sess_{c}.{n}": 2 for c in range(12) for n in range(15)} == told

    def test_of_a_client_that_hangs_up(self, gateway, events) -> None:
        """A connection that is reset in the middle of a stream is incomplete."""
        if gateway == "asgi" and django.VERSION < (5,):
            pytest.skip("Django does not notice it before 5.0")
        has_gone, has_ended = threading.Event(), threading.Event()

        def wait():
            assert has_gone.wait(TIMEOUT)

        async def wait_async():
            await asyncio.to_thread(wait)

        def end():
            has_ended.set()

        if gateway == "wsgi":
            kind = "sync"
            streaming(1, wait, *[lambda: None] * 5000, end=end)
        else:
            kind = "async"
            streaming(1, wait_async, *[asyncio.Event().wait], kind=kind, end=end)
        with serving(gateway, [OURS]) as address:
            with socket.create_connection(address, TIMEOUT) as client:
                request = (
                    f"GET /{kind}/ HTTP/1.1\r\nHost: x\r\nX-Session-ID: s_1\r\n\r\n"
                )
                client.sendall(request.encode())
                received = b""
                while b"s_1 " not in received:
                    received += client.recv(4096)
                option = struct.pack("ii", 1, 0)  # reset it, rather than say goodbye
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            has_gone.set()
            assert has_ended.wait(TIMEOUT)
            fetch(address, "/nothing/more")

        (response,) = [e for e in events if e.api_path == f"/{kind}/"]
        assert response.metadata["incomplete"] is True
        assert ("s_1", 200) == (response.session_id, response.api_status_code)


SITE = """
    import asyncio, os, sys
    from django.conf import settings
    import pgtrack

    pgtrack.configure(
        project_id="p", endpoint=sys.argv[1], batch_size=1000, batch_interval=600
    )
    settings.configure(
        ALLOWED_HOSTS=["*"],
        MIDDLEWARE=["pgtrack.integrations.django.Middleware"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="x",
    )
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    async def steps(name):
        for _ in range(3):
            await asyncio.sleep(0)
            yield f"{pgtrack.current().session_id} "

    async def stream(request, name):
        return StreamingHttpResponse(steps(name))

    def view(request, name):
        pgtrack.identify(f"u_{name}")
        return HttpResponse(pgtrack.current().session_id)

    urlpatterns = [path("view/<str:name>", view), path("stream/<str:name>", stream)]
    app = get_asgi_application()

    import uvicorn
    import socket
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="error")
    uvicorn.Server(config).run([listener])
"""


def test_a_server_process_delivers_at_its_end() -> None:
    """Uvicorn in a process of its own, ended by SIGTERM: all is told, nothing mixed."""
    with Server() as server:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SITE), server.url],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        try:
            assert process.stdout is not None
            address = ("127.0.0.1", int(process.stdout.readline()))

            def ask_some(client):
                bodies = []
                for number in range(25):
                    kind = "stream" if number % 2 else "view"
                    name = f"{client}.{number}"
                    path = f"/{kind}/{name}"
                    body = fetch(address, path, **{"X-Session-ID": f"sess_{name}"})[2]
                    bodies.append(set(body.split()) == {f"sess_{name}"})
                return bodies

            found = start_together(8, ask_some)
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT)
        finally:
            process.kill()
            process.communicate(timeout=TIMEOUT)
        events = server.events

    assert [[True] * 25] * 8 == found
    assert {
        (
            f"sess_{client}.{number}",
            f"/{'stream' if number % 2 else 'view'}/<str:name>",
            None if number % 2 else f"u_{client}.{number}",
        ): 1
        for client in range(8)
        for number in range(25)
    } == Counter((e["session.id"], e["api.path"], e.get("user.id")) for e in events)
