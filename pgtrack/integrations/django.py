"""
Django: the correlation of each request, and one `api.response` event.

`Middleware` stands in `settings.MIDDLEWARE`, first of all, under WSGI and ASGI alike.
What Django answers before its middleware is asked, and what the server does, is out of
its sight; the preflights of CORS pass untouched.  Opt out by `"track": False` in
`settings.PGTRACK` for the events, and by `"exclude"` for those of some paths.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from pgtrack._context import current_frame, switch
from pgtrack._diagnostics import internal_error
from pgtrack._propagation import REQUEST_HEADER, SESSION_HEADER, USER_HEADER
from pgtrack.exceptions import ConfigError
from pgtrack.integrations._http import SERVED, Served, Serving
from pgtrack.integrations._requirement import requirement

with requirement("django", extra="django"):
    from django.conf import settings  # type: ignore[import-untyped]
    from django.core.signals import got_request_exception  # type: ignore[import-untyped]
    from django.http.response import HttpResponseBase  # type: ignore[import-untyped]
    from django.urls.resolvers import RegexPattern  # type: ignore[import-untyped]

with requirement("asgiref", extra="django"):  # which Django comes with
    from asgiref.sync import iscoroutinefunction, markcoroutinefunction

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgtrack._context import Frame, Request
    from pgtrack._propagation import Headers

    HttpRequest: TypeAlias = Any  # Django has no types of its own

__all__ = ["Middleware"]


class Middleware:
    """
    Serve each request under its correlation: an entry of `settings.MIDDLEWARE`.

    Works at any place, and does most as the first: there every answer of the others
    carries `X-Request-ID`, also a 500.  Inside of `pgtrack.integrations.asgi` or `wsgi`
    it adds the route to what those tell.  Sync and async, as the chain is.

    The options are those of `settings.PGTRACK`, a dict, when Django loads its
    middleware: `track` (True), and `exclude` (none), the paths of requests that make no
    event.

    Args:
        get_response: What is served: the next middleware, or the view.

    Raises:
        ConfigError: If `settings.PGTRACK` is wrong.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._serving = _serving()
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        got_request_exception.connect(_keep_error)

    def __call__(self, request: HttpRequest) -> Any:
        """Serve one request; a coroutine in a chain that is async."""
        if self._is_async:
            return self._serve_async(request)
        outside = current_frame()
        served = self._begin(request)
        if served is None:
            return self.get_response(request)
        try:
            response = self.get_response(request)
            return _answer(served, request, response)
        except BaseException as error:
            _leave(served, request, error)
            raise
        finally:
            switch(outside)  # whatever was left open inside

    async def _serve_async(self, request: HttpRequest) -> Any:
        outside = current_frame()
        served = self._begin(request)
        if served is None:
            return await self.get_response(request)
        try:
            response = await self.get_response(request)
            return _answer(served, request, response)
        except BaseException as error:
            _leave(served, request, error)
            raise
        finally:
            switch(outside)

    def _begin(self, request: HttpRequest) -> Served | None:
        """Begin to serve, unless somebody does already, or it is a preflight."""
        if _is_preflight(request):
            return None
        around = _served_of(request)
        if around is not None:
            self._serving.join(around)
        if (record := _record_of(request)) is not None:
            record.find_route = functools.partial(_route_of, request)
            return None
        served = self._serving.begin(_headers_of(request), request.method, request.path)
        if served is not None:
            served.request.find_route = functools.partial(_route_of, request)
            request.META[SERVED] = served
        return served


# --- options ---


def _serving() -> Serving:
    """Read the options of `settings.PGTRACK`."""
    options: Any = getattr(settings, "PGTRACK", {})
    if not isinstance(options, dict):
        msg = (
            "settings.PGTRACK must be a dict of options "
            f'(got {type(options).__name__}), such as {{"exclude": ["/health/"]}}.'
        )
        raise ConfigError(msg)
    if unknown := sorted(map(str, options.keys() - {"exclude", "track"})):
        msg = (
            "settings.PGTRACK has the options 'exclude' and 'track' "
            f"(got {', '.join(map(repr, unknown))} as well). Give what is the "
            "client's to pgtrack.configure()."
        )
        raise ConfigError(msg)
    track = options.get("track", True)
    if not isinstance(track, bool):
        kind = type(track).__name__
        msg = f"settings.PGTRACK['track'] must be True or False (got {kind})."
        raise ConfigError(msg)
    try:
        return Serving(None, track, options.get("exclude", ()))
    except TypeError as error:
        msg = (
            "settings.PGTRACK['exclude'] must be a list of paths such as '/health/' "
            "or '/static/*'."
        )
        raise ConfigError(msg) from error


# --- the request ---


def _served_of(request: HttpRequest) -> Served | None:
    """Return the request as it is served, by whomever of pgtrack's began to."""
    served = request.META.get(SERVED)
    if served is None:
        served = getattr(request, "scope", {}).get(SERVED)
    return served if isinstance(served, Served) else None


def _record_of(request: HttpRequest) -> Request | None:
    """
    Return the record of *request*, also if middleware of ASGI is around this of WSGI.

    What bridges the two makes an environment of its own, without our key; but it runs
    Django under the frame of the request.
    """
    served = _served_of(request)
    if served is not None:
        return served.request
    frame = current_frame()
    record = None if frame is None or hasattr(request, "scope") else frame.request
    if record is None or (record.method, record.path) != (request.method, request.path):
        return None
    return record


def _headers_of(request: HttpRequest) -> Headers:
    """
    Return the headers: under ASGI as they came, since `META` joins two of a name.

    In `META`, as CGI has it, nobody can tell `X_User_ID`, which proxies let pass, from
    `X-User-ID`; servers that are safe there drop the former.
    """
    scope = getattr(request, "scope", None)
    if scope is not None:
        return scope.get("headers")  # type: ignore[no-any-return]
    return [
        (name, request.META[variable])
        for variable, name in _VARIABLES.items()
        if variable in request.META
    ]


_VARIABLES = {
    f"HTTP_{name.upper().replace('-', '_')}": name
    for name in (SESSION_HEADER, REQUEST_HEADER, USER_HEADER)
}
"""The headers by their names in `META`."""


def _is_preflight(request: HttpRequest) -> bool:
    """Return whether this is CORS asking what may be asked (Fetch standard, 4.8)."""
    return (
        request.method == "OPTIONS"
        and "HTTP_ORIGIN" in request.META
        and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in request.META
    )


def _keep_error(request: HttpRequest = None, **_: object) -> None:
    """
    Keep the exception that Django is about to answer with a 500.

    The receiver of a signal, which tells no exception: it is the one being handled.
    """
    record = None if request is None else _record_of(request)
    if record is not None:
        record.error = sys.exc_info()[1]


# --- the answer ---


def _answer(served: Served, request: HttpRequest, response: Any) -> Any:
    """Tell the request, at once or when its stream has ended, and return *response*."""
    steps: _Steps | None = None
    try:
        if isinstance(response, HttpResponseBase):  # else Django is about to complain
            response.setdefault(REQUEST_HEADER, served.request_id)
            served.answer_with(response.status_code)
            if response.streaming and hasattr(response, "_iterator"):
                steps = _follow(served, request, response)
            else:
                served.complete()
    except Exception as error:  # noqa: BLE001  the host must go on
        internal_error(error)
    if steps is None:
        _leave(served, request)
    return response


def _leave(
    served: Served, request: HttpRequest, error: BaseException | None = None
) -> None:
    served.leave(error)
    # Each holds the other, and would wait for the garbage collector.
    request.META.pop(SERVED, None)


def _follow(served: Served, request: HttpRequest, response: Any) -> _Steps:
    """Have the body of *response* read by steps of ours, and return these."""
    # What is streamed may outlive the request, and the language it was routed in.
    path = served.request.best_path()
    served.request.find_route = lambda: path
    is_file = getattr(response, "file_to_stream", None) is not None
    is_sent_by_server = is_file and not hasattr(request, "scope")
    kind = _AsyncSteps if response.is_async else _SyncSteps
    # By the attributes below: `streaming_content` takes a file's new body for another
    # one, and would have it read by Python rather than sent by the server.
    steps = kind(served, response._iterator, is_whole_unread=is_sent_by_server)  # noqa: SLF001
    response._iterator = steps  # noqa: SLF001
    response._resource_closers.insert(0, steps.enter)  # noqa: SLF001
    response._resource_closers.append(steps.close)  # noqa: SLF001
    return steps


class _Steps:
    """
    The body of a streamed answer, each step of which runs under its request.

    What the body leaves open across its `yield` is put aside after each step, and put
    back before the next.

    Args:
        served: The request.

        body: The iterator that the view made.

        is_whole_unread: Whether the answer is complete though nobody reads the body.
    """

    def __init__(self, served: Served, body: Any, *, is_whole_unread: bool) -> None:
        self._served: Served | None = served
        self._frame: Frame | None = served.frame
        self._body = body
        self._is_bodiless = served.method == "HEAD"
        self._is_whole = self._is_bodiless or is_whole_unread
        self._outside: list[Frame | None] = []

    def enter(self) -> None:
        """Let what the answer closes, such as its generator, run under the request."""
        if self._served is not None:
            self._outside.append(switch(self._frame))

    def close(self) -> None:
        """End with the answer: Django closes it when it is out, or nobody is left."""
        self._end(is_complete=self._is_whole)
        while self._outside:
            switch(self._outside.pop())

    def __del__(self) -> None:
        self._end()  # with an answer that was thrown away for another

    def _end(
        self, error: BaseException | None = None, *, is_complete: bool = False
    ) -> None:
        served, self._served = self._served, None
        if served is not None:
            if is_complete:
                served.complete()
            served.leave(error)


class _SyncSteps(_Steps):
    """A body that is read by `for`."""

    def __iter__(self) -> _SyncSteps:
        return self

    def __next__(self) -> Any:
        self._is_whole = self._is_bodiless
        outside = switch(self._frame)
        try:
            return next(self._body)
        except StopIteration:
            self._end(is_complete=True)
            raise
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._frame = switch(outside)


class _AsyncSteps(_Steps):
    """A body that is read by `async for`."""

    def __aiter__(self) -> _AsyncSteps:
        return self

    async def __anext__(self) -> Any:
        self._is_whole = self._is_bodiless
        outside = switch(self._frame)
        try:
            return await self._body.__anext__()
        except StopAsyncIteration:
            self._end(is_complete=True)
            raise
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._frame = switch(outside)


# --- the route ---


def _route_of(request: HttpRequest) -> str | None:
    """Return the template of the route that was found, with what it is mounted at."""
    match = request.resolver_match
    if match is None or match.route is None:
        return None
    route = str(match.route)
    # The patterns that it was put together from are the last that were tried.
    patterns = [tried.pattern for tried in match.tried[-1]] if match.tried else []
    if any(isinstance(pattern, RegexPattern) for pattern in patterns):
        route = "".join(
            _readable(str(pattern))
            if isinstance(pattern, RegexPattern)
            else str(pattern)
            for pattern in patterns
        )
    return f"{request.path.removesuffix(request.path_info)}/{route}"


_TOKENS = re.compile(
    r"\\(?P<escaped>\W)"  # a character that would mean something else
    r"|(?P<anchor>[\^$]|\\[AbBZz])"
    r"|(?P<several>\[\^?\]?(?:\\.|[^\]\\])*\]|\\[a-zA-Z]|\.(?=[*+?{]))"
    r"|\(\?P<(?P<named>\w+)>"
    r"|(?P<plain>\(\?(?:[aiLmsux-]+)?:)"
    r"|(?P<silent>\(\?)"  # asks what is around, or refers to another group
    r"|(?P<group>\()"
    r"|(?P<end>\))"
    r"|(?P<often>(?:[*+?]|\{\d*,?\d*\})[?+]?)"
    r"|(?P<literal>.)",
    re.DOTALL,
)


@functools.lru_cache(maxsize=1024)
def _readable(regex: str) -> str:
    """
    Return a regular expression as `path()` would have it: `^a/(?P<b>.+)$` as `a/<b>`.

    A group without a name, and what else stands for several texts, is `<var>`.
    """
    shown: list[str] = []
    hides: list[bool] = []  # of each group that is open, whether its content is hidden
    for token in _TOKENS.finditer(regex):
        kind, text = str(token.lastgroup), token[str(token.lastgroup)]
        if kind == "end":
            hides.pop()
        elif kind == "plain":
            hides.append(False)
        else:
            if not any(hides):
                shown.append(_SHOWN[kind].format(text))
            if kind in {"named", "silent", "group"}:
                hides.append(True)
    return "".join(shown)


_SHOWN = {
    "escaped": "{0}",
    "anchor": "",
    "several": "<var>",
    "named": "<{0}>",
    "silent": "",
    "group": "<var>",
    "often": "",
    "literal": "{0}",
}
"""What becomes of each kind of token."""
