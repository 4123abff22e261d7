"""
WSGI: the correlation of each request, and one `api.response` event.

For any WSGI application and server.  The body is handed on as it comes, and what
servers look at (the length of a list, files for `wsgi.file_wrapper`) stays there to be
looked at.  The preflights of CORS pass untouched.  Opt out by `track=False` for the
events, and by `exclude` for those of some paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import wrapt

from pgtrack._context import current_frame, switch
from pgtrack._propagation import extract
from pgtrack.integrations._http import REQUEST_HEADER, SERVED, Serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pgtrack._client import Client
    from pgtrack._context import Request
    from pgtrack.integrations._http import Served

    Environ: TypeAlias = "dict[str, Any]"
    Write: TypeAlias = "Callable[[bytes], object]"
    StartResponse: TypeAlias = "Callable[..., Any]"
    App: TypeAlias = "Callable[[Any, Any], Iterable[bytes]]"

__all__ = ["Middleware"]


class Middleware:
    """
    Serve *app* under the correlation of each request.

    Works at any place, and does most as the outermost: there every answer of the
    application carries `X-Request-ID`, and a mounted application's path is whole.  Of
    several around the same request the outermost tells it.  An exception that escapes
    from the application is tracked and raised again.

    Args:
        app: The WSGI application.

        client: Instead of the default client.

        track: Whether each request makes an `api.response` event.

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

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Serve one request."""
        if _is_preflight(environ):
            return self.app(environ, start_response)
        served = environ.get(SERVED)
        if served is None:
            served = _served_around(environ)
        if served is not None:
            self._serving.join(served)
            return self.app(environ, start_response)
        return self._serve(environ, start_response)

    def _serve(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        outside = current_frame()
        method = _text(environ.get("REQUEST_METHOD"))
        served = self._serving.begin(_headers(environ), method, _path(environ))
        if served is None:
            return self.app(environ, start_response)
        switch(outside)  # the exchange puts the request's own in for each step
        served.request.is_wsgi = True
        environ[SERVED] = served
        exchange = _Exchange(served, environ, start_response)
        return exchange.body(exchange.run(self.app, environ, exchange.start_response))


class _Exchange:
    """One request, overheard: what the application tells the server."""

    __slots__ = (
        "_environ",
        "_error",
        "_file",
        "_frame",
        "_hangup",
        "_has_ended",
        "_is_bodiless",
        "_is_complete",
        "_is_sent",
        "_left",
        "_served",
        "_start_response",
        "_status",
        "_wrapper",
    )

    def __init__(self, served: Served, environ: Environ, start_response: Any) -> None:
        self._served = served
        self._environ = environ
        self._start_response = start_response
        self._frame: Any = served.frame
        self._status: object = _NOT_YET
        self._error: BaseException | None = None
        self._hangup: OSError | None = None
        self._left: int | None = None
        self._is_bodiless = served.method == "HEAD"
        self._is_complete = False
        self._is_sent = False
        self._has_ended = False
        self._file: Any = _NOTHING
        self._wrapper: Any = environ.get("wsgi.file_wrapper")
        if self._wrapper is not None and not isinstance(self._wrapper, type):
            environ["wsgi.file_wrapper"] = self._wrap_file

    # --- what the application calls ---

    def start_response(
        self, status: Any, headers: Any, *rest: Any, **named: Any
    ) -> Write:
        """Start the answer, as the server's function of this name does."""
        echoing = self._echoing(headers)
        write = self._start_response(status, echoing, *rest, **named)
        # Had the answer been on its way, the server would have raised here.
        error = (rest[0] if rest else named.get("exc_info")) or (None, None)
        if isinstance(error, tuple) and isinstance(error[1], BaseException):
            self._error = error[1]
        code = str(status)[:3]
        self._status = int(code) if code.isdecimal() else None
        self._is_bodiless = self._served.method == "HEAD" or code in _BODILESS
        self._left = _length(headers)

        def write_and_notice(data: bytes) -> object:
            self._begin()
            self._is_sent = True
            try:
                return write(data)
            except OSError as error:  # what servers raise where the client has gone
                self._hangup = error
                self._served.is_gone = True
                raise

        return write_and_notice

    def _echoing(self, headers: Any) -> Any:
        """Return the headers with the request id, unless they have one."""
        if not isinstance(headers, list) or _HEADER in map(_name, headers):
            return headers
        return [*headers, (REQUEST_HEADER, self._served.request_id)]

    def _wrap_file(self, *args: Any, **named: Any) -> Any:
        """Wrap a file by the server's own function, and remember what it made."""
        self._file = self._wrapper(*args, **named)
        return self._file

    # --- what the server calls ---

    def run(self, function: Any, *arguments: Any) -> Any:
        """Call a function of the application's under the request's frame."""
        outside = switch(self._frame)
        try:
            result = function(*arguments)
        except BaseException as error:
            self._frame = switch(outside)
            self._fail(error)
            raise
        self._frame = switch(outside)
        self._begin()
        return result

    def step(self, iterator: Iterator[bytes]) -> bytes:
        """Return the next part of the body; StopIteration behind the last."""
        outside = switch(self._frame)
        try:
            chunk: Any = next(iterator)
        except StopIteration:
            self._frame = switch(outside)
            self.complete()
            raise
        except BaseException as error:
            self._frame = switch(outside)
            self._fail(error)
            raise
        self._frame = switch(outside)
        self._begin()
        if isinstance(chunk, bytes):
            self._is_sent = self._is_sent or chunk != b""
            if self._left is not None:
                self._left -= len(chunk)
                if self._left <= 0:
                    self.complete()
        return chunk  # type: ignore[no-any-return]

    def body(self, result: Any) -> Iterable[bytes]:
        """Return what the server gets in place of the *result* of the application."""
        if result is self._file:
            # The server asks for this very object, and sends the file by itself.
            self.complete()
            self._end()
            return result  # type: ignore[no-any-return]
        if isinstance(self._wrapper, type) and isinstance(result, self._wrapper):
            return _File(result, self)
        if type(result) in {list, tuple}:
            return _Chunks(result, self)
        return (_SizedSteps if hasattr(result, "__len__") else _Steps)(result, self)

    # --- what becomes of it ---

    def _begin(self) -> None:
        """Tell the status, once it is known."""
        status = self._status
        if status is not _NOT_YET:
            self._status = _NOT_YET
            self._served.answer_with(status)
            self._environ.pop(SERVED, None)

    def complete(self) -> None:
        """Hear that the server has all of the answer."""
        self._begin()
        self._is_complete = True
        self._explain()
        served = self._served
        served.complete()
        if served.status_code >= 500:  # noqa: PLR2004
            served.tell_inside()  # an answer is the last that is heard of a failure

    def close(self, *, is_sent: bool = False) -> None:
        """
        Hear that the server is done with the answer, whether or not it has had it all.

        Args:
            is_sent: Whether the server sent the body without asking for its parts.
        """
        if not self._has_ended and not self._is_complete:
            if is_sent or self._is_bodiless:
                self.complete()
            elif not self._served.has_begun:
                self._served.is_gone = True
        self._end()

    def _fail(self, error: BaseException) -> None:
        """Hear that *error* escaped; with nothing sent yet, the server answers 500."""
        if not self._is_sent and not self._is_complete:
            self._served.has_begun = False
        self._end(None if error is self._hangup else error)

    def _end(self, error: BaseException | None = None) -> None:
        """Leave the request."""
        if not self._has_ended:
            self._has_ended = True
            self._environ.pop(SERVED, None)
            wrapper = self._environ.get("wsgi.file_wrapper")
            if getattr(wrapper, "__self__", None) is self:
                # Else the environ is in a cycle with us, until that is collected.
                self._environ["wsgi.file_wrapper"] = self._wrapper
            self._explain()
            self._served.leave(error)
            self._hangup = None

    def _explain(self) -> None:
        """Hand over the error that an answer of the application's own was made of."""
        error, self._error = self._error, None
        if self._served.request.error is None:
            self._served.request.error = error


_NOTHING = object()
"""The file of a server's own function, before there is one."""

_NOT_YET = object()
"""The status before the application has told it, and once it was passed on."""

_BODILESS = {"100", "101", "102", "103", "204", "304"}
"""The statuses whose answers have no body (RFC 9110, 6.4.1)."""


# --- bodies ---


class _Chunks:
    """A list or tuple: nothing of the application runs while it is sent."""

    __slots__ = ("_chunks", "_exchange", "_is_asked")

    def __init__(self, chunks: Sequence[bytes], exchange: _Exchange) -> None:
        self._chunks = chunks
        self._exchange = exchange
        self._is_asked = False

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[bytes]:
        if self._is_asked:  # as by gevent, which adds up the lengths in between
            return iter(self._chunks)
        self._is_asked = True
        return self._overheard()

    def _overheard(self) -> Iterator[bytes]:
        left = len(self._chunks)
        for chunk in self._chunks:
            left -= 1
            if not left:
                self._exchange.complete()
            yield chunk
        self._exchange.complete()

    def close(self) -> None:
        self._exchange.close()


class _Steps:
    """Any other body: each of its steps runs under the request's frame."""

    __slots__ = ("_body", "_exchange", "_iterator")

    def __init__(self, body: Any, exchange: _Exchange) -> None:
        self._body = body
        self._exchange = exchange
        self._iterator: Any = None

    def __iter__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._exchange.run(iter, self._body)
        elif self._iterator is not self._body:
            return iter(self._body)  # somebody looks through it beforehand
        return self

    def __next__(self) -> bytes:
        if self._iterator is None:
            iter(self)
        return self._exchange.step(self._iterator)

    def close(self) -> None:
        try:
            if hasattr(self._body, "close"):
                self._exchange.run(self._body.close)
        finally:
            self._exchange.close()


class _SizedSteps(_Steps):
    """A body that knows how many parts it has."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)


class _File(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """A file that the server may send by itself; in all else it is the wrapped one."""

    def __init__(self, file: Any, exchange: _Exchange) -> None:
        super().__init__(file)
        self._self_exchange = exchange
        self._self_steps = _Steps(file, exchange)
        self._self_is_asked = False

    def __iter__(self) -> Any:
        self._self_is_asked = True
        iter(self._self_steps)
        return self

    def __next__(self) -> bytes:
        return next(self._self_steps)

    def close(self) -> None:
        is_sent = not self._self_is_asked
        try:
            if hasattr(self.__wrapped__, "close"):
                self._self_exchange.run(self.__wrapped__.close)
        finally:
            self._self_exchange.close(is_sent=is_sent)


# --- the environ ---

_HEADER = REQUEST_HEADER.lower()

_HEADERS = {
    "HTTP_X_SESSION_ID": "X-Session-ID",
    "HTTP_X_REQUEST_ID": "X-Request-ID",
    "HTTP_X_USER_ID": "X-User-ID",
}


def _headers(environ: Environ) -> dict[str, str]:
    """Return the headers of the correlation; of two of a name both, by a comma."""
    return {name: environ[key] for key, name in _HEADERS.items() if key in environ}


def _path(environ: Environ) -> str:
    """Return the path as clients see it, that of a mounted application whole."""
    path = _text(environ.get("SCRIPT_NAME")) + _text(environ.get("PATH_INFO"))
    try:
        return path.encode("latin-1").decode("utf-8", "replace")  # PEP 3333
    except UnicodeEncodeError:  # it is text already
        return path


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _name(header: Any) -> str:
    """Return the name of a header, in lower case; of what is none, nothing."""
    try:
        return _text(header[0]).lower()
    except (LookupError, TypeError):  # it is the server's to refuse
        return ""


def _length(headers: Any) -> int | None:
    """Return the declared length of the body, None without one."""
    if isinstance(headers, list):
        for header in headers:
            if _name(header) == "content-length":
                length = _text(header[-1]).strip()
                return int(length) if length.isdecimal() and len(length) < 20 else None  # noqa: PLR2004
    return None


def _is_preflight(environ: Environ) -> bool:
    """Return whether this is CORS asking what may be asked (Fetch standard, 4.8)."""
    return (
        environ.get("REQUEST_METHOD") == "OPTIONS"
        and "HTTP_ORIGIN" in environ
        and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
    )


# --- WSGI inside of ASGI ---


class _Around:
    """A request that is served by a middleware of ASGI around this application."""

    __slots__ = ("client", "request")

    def __init__(self, request: Request) -> None:
        self.client: object = None
        self.request = request


def _served_around(environ: Environ) -> Any:
    """
    Return the request of a middleware of ASGI around this application, if there is one.

    What bridges the two makes an environ of its own, so that nothing in it says so.
    But it runs the application under the request's frame, and changes neither method
    nor path nor headers.
    """
    frame = current_frame()
    request = None if frame is None else frame.request
    if frame is None or request is None or request.path != _path(environ):
        return None
    if request.is_wsgi:  # of an application that calls itself, or another like it
        return None
    came = extract(_headers(environ))
    if (
        request.method == environ.get("REQUEST_METHOD")
        and came.session_id in {None, frame.session_id}
        and came.request_id in {None, frame.request_id}
    ):
        served = environ[SERVED] = _Around(request)
        return served
    return None
