"""
ASGI: the correlation of each request, and one `api.response` event.

For any ASGI application and server.  Lifespan passes through, but that what was emitted
is delivered before the shutdown is said to be complete; other scopes than HTTP and
WebSocket, and the preflights of CORS, pass untouched.  Opt out by `track=False` for the
events, and by `exclude` for those of some paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from pgtrack import _errors
from pgtrack._context import current_frame, switch
from pgtrack.integrations._http import REQUEST_HEADER, SERVED, Serving
from pgtrack.integrations._routes import template_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, MutableMapping

    from pgtrack._client import Client
    from pgtrack.integrations._http import Served

    Message: TypeAlias = "MutableMapping[str, Any]"
    Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
    Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
    App: TypeAlias = "Callable[[Any, Receive, Send], Awaitable[None]]"

__all__ = ["Middleware"]

_HEADER = REQUEST_HEADER.lower().encode()


class Middleware:
    """
    Serve *app* under the correlation of each request.

    Works at any place, and does most as the outermost: there every answer carries
    `X-Request-ID`, also a 500.  Of several around the same request the outermost tells
    it.  An exception that escapes from the application is tracked and raised again.

    Args:
        app: The ASGI application (version 3).

        client: Instead of the default client.

        track: Whether each HTTP request makes an `api.response` event.

        exclude: The paths of requests that make none; `*` stands for any text.
    """

    def __init__(
        self,
        app: App,
        *,
        client: Client | None = None,
        track: bool = True,
        exclude: str | Iterable[str] = (),
    ) -> None:
        self.app = app
        self._serving = Serving(client, track, exclude)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        kind = scope.get("type")
        if kind == "lifespan":
            await self.app(scope, receive, self._flushing(send))
        elif kind not in {"http", "websocket"} or _is_preflight(scope):
            await self.app(scope, receive, send)
        elif (served := scope.get(SERVED)) is not None:
            self._serving.join(served)
            served.request.find_route = partial(template_of, scope)
            await self.app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _flushing(self, send: Send) -> Send:
        """Return *send*, before whose last message all that was emitted goes out."""

        async def flush_and_send(message: Message) -> None:
            if message.get("type") in _ENDS:
                await self._serving.aflush()
            await send(message)

        return flush_and_send

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        outside = current_frame()
        is_outermost = scope.keys() <= _KEYS
        served = self._serving.begin(
            _headers(scope), _method(scope), _text(scope.get("path"))
        )
        if served is None:
            await self.app(scope, receive, send)
            return
        # In the scope itself: whoever is around us may read there what routers add.
        scope[SERVED] = served
        served.request.find_route = partial(template_of, scope)
        exchange = _Exchange(served, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except BaseException as error:
            try:
                if is_outermost:
                    await exchange.fail(error, scope.get("http_version"))
            finally:
                served.leave(exchange.failure(error))
            raise
        else:
            served.leave()
        finally:
            served.request.find_route = None  # background tasks keep the request
            scope.pop(SERVED, None)
            switch(outside)  # whatever was left open inside


class _Exchange:
    """The messages of one request, overheard."""

    __slots__ = ("_hangup", "_has_ended", "_receive", "_send", "_served")

    def __init__(self, served: Served, receive: Receive, send: Send) -> None:
        self._served = served
        self._receive = receive
        self._send = send
        self._has_ended = False
        self._hangup: OSError | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        # After the answer, too, servers say that the client has gone.
        if not self._has_ended and message.get("type") == "http.disconnect":
            self._served.is_gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message.get("type")
        if kind in _STARTS:
            message = self._echoing(message)
            if kind == "http.response.start":
                self._served.answer_with(message.get("status"))
        is_last = kind in _BODIES and not message.get("more_body", False)
        self._has_ended = self._has_ended or is_last
        try:
            await self._send(message)
        except OSError as error:  # what servers raise where the client has gone
            self._hangup = error
            self._served.is_gone = True
            raise
        if is_last:
            self._served.complete()

    def _echoing(self, message: Message) -> Message:
        """Return the start of an answer with the request id, unless it has one."""
        headers = list(message.get("headers") or ())
        if _HEADER not in map(_name, headers):
            headers.append((_HEADER, self._served.request_id.encode()))
        return {**message, "headers": headers}

    def failure(self, error: BaseException) -> BaseException | None:
        """Return *error*, unless it only says that the client has gone."""
        return None if error is self._hangup else error

    async def fail(self, error: BaseException, http_version: object) -> None:
        """Answer as servers do, so that this answer, too, carries the request id."""
        served = self._served
        if served.method is None or served.has_begun or served.is_gone:
            return
        if not _errors.is_failure(error):
            return
        body = b"Internal Server Error"
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
        ]
        if str(http_version).startswith("1"):  # what was sent may not have been read
            headers.append((b"connection", b"close"))
        start = {"type": "http.response.start", "status": 500, "headers": headers}
        try:
            await self.send(start)
            await self.send({"type": "http.response.body", "body": body})
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001, S110  nobody is left to answer
            pass  # where we are cancelled, too: what goes on is the application's error


_ENDS = {"lifespan.shutdown.complete", "lifespan.shutdown.failed"}
"""The messages after which the server may end the process."""

_STARTS = {
    "http.response.start",
    "websocket.accept",
    "websocket.http.response.start",
}
"""The messages with the headers of an answer."""

_BODIES = {
    "http.response.body",
    "http.response.pathsend",
    "http.response.zerocopysend",
}
"""The messages of which the last ends the answer."""


_KEYS = {
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers", "client", "server", "state"),
    *("extensions", "subprotocols"),
}
"""
What servers put into a scope (ASGI, HTTP and WebSocket message formats).

A framework around us adds to it, and has an answer of its own for what escapes.
"""


def _headers(scope: Any) -> Any:
    """Return the headers of a request, which the application can read as well."""
    headers = scope.get("headers")
    if isinstance(headers, Iterator):
        headers = scope["headers"] = list(headers)
    return headers


def _method(scope: Any) -> str | None:
    """Return the HTTP method, None for a WebSocket."""
    return _text(scope.get("method")) if scope["type"] == "http" else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _name(header: Any) -> bytes:
    """Return the name of a header, in lower case; of what is none, nothing."""
    try:
        return header[0].lower() if isinstance(header[0], bytes) else b""
    except (LookupError, TypeError):  # it is the server's to refuse
        return b""


def _is_preflight(scope: Any) -> bool:
    """Return whether this is CORS asking what may be asked (Fetch standard, 4.8)."""
    if scope.get("method") != "OPTIONS":
        return False
    try:
        names = {_name(header) for header in _headers(scope) or ()}
    except TypeError:  # no headers at all
        return False
    return {b"origin", b"access-control-request-method"} <= names
