"""
ASGI: the correlation of each request, and one `api.response` event.

For any ASGI application and server.  Lifespan passes through, but that what was emitted
is delivered before the shutdown is said to be complete; other scopes than HTTP and
WebSocket, and the preflights of CORS, pass untouched.  Opt out by `track=False` for the
events, and by `exclude` for those of some paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from pgtrack import _errors
from pgtrack.integrations._http import REQUEST_HEADER, Served, Serving

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, MutableMapping

    from pgtrack._client import Client

    Message: TypeAlias = "MutableMapping[str, Any]"
    Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
    Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
    App: TypeAlias = "Callable[[Any, Receive, Send], Awaitable[None]]"

__all__ = ["Middleware"]

_SERVED = "pgtrack.served"
"""The key in the scope under which an inner middleware finds the request."""

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
        kind = scope["type"]
        if kind == "lifespan":
            await self.app(scope, receive, self._flushing(send))
        elif kind not in {"http", "websocket"} or _is_preflight(scope):
            await self.app(scope, receive, send)
        elif (served := scope.get(_SERVED)) is not None:
            self._serving.join(served)
            await self.app(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _flushing(self, send: Send) -> Send:
        """Return *send*, before whose last message all that was emitted goes out."""

        async def flush_and_send(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await self._serving.aflush()
            await send(message)

        return flush_and_send

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        is_outermost = scope.keys() <= _KEYS
        served = self._serving.begin(
            scope.get("headers"), scope.get("method"), scope.get("path")
        )
        if served is None:
            await self.app(scope, receive, send)
            return
        # In the scope itself: whoever is around us may read there what routers add.
        scope[_SERVED] = served
        exchange = _Exchange(served, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except BaseException as error:
            if is_outermost and served.method is not None:
                await exchange.fail(error)
            served.leave(error)
            raise
        finally:
            scope.pop(_SERVED, None)
        served.leave()


class _Exchange:
    """The messages of one request, overheard."""

    __slots__ = ("_receive", "_send", "_served")

    def __init__(self, served: Served, receive: Receive, send: Send) -> None:
        self._served = served
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._served.is_gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        served = self._served
        if kind in _STARTS:
            headers = list(message.get("headers") or ())
            if not any(pair[0].lower() == _HEADER for pair in headers):
                headers.append((_HEADER, served.request_id.encode()))
            message = {**message, "headers": headers}
            if kind == "http.response.start":
                served.answer_with(message["status"])
        await self._send(message)
        if kind in _BODIES and not message.get("more_body", False):
            served.complete()

    async def fail(self, error: BaseException) -> None:
        """Answer as servers do, so that this answer, too, carries the request id."""
        served = self._served
        if served.has_begun or served.is_gone or not _errors.is_failure(error):
            return
        body = b"Internal Server Error"
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        start = {"type": "http.response.start", "status": 500, "headers": headers}
        try:
            await self.send(start)
            await self.send({"type": "http.response.body", "body": body})
        except Exception:  # noqa: BLE001, S110  nobody is left to answer
            pass


_STARTS = {"http.response.start", "websocket.accept"}
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


def _is_preflight(scope: Any) -> bool:
    """Return whether this is CORS asking what may be asked (Fetch standard, 4.8)."""
    if scope.get("method") != "OPTIONS":
        return False
    names = {pair[0].lower() for pair in scope.get("headers") or ()}
    return {b"origin", b"access-control-request-method"} <= names
