"""
What the integrations of web frameworks share: a request that is being served.

The order is the same in each: `Served` reads the headers and begins, `answer` hears
that the answer begins, `complete` that it is out to its end, and `leave` that the
framework is done.  Nothing here knows ASGI, WSGI or any framework.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, TypeAlias

from pgtrack import _api, _errors, _process
from pgtrack._blocks import ApiCall, continued_frame
from pgtrack._client import in_thread
from pgtrack._context import Request, current_frame, switch
from pgtrack._diagnostics import internal_error
from pgtrack._propagation import REQUEST_HEADER
from pgtrack.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pgtrack._client import Client
    from pgtrack._propagation import Headers

__all__ = ["REQUEST_HEADER", "SERVED", "Paths", "Served", "Serving", "paths"]

SERVED = "pgtrack.served"
"""
The key under which whoever is further inside finds the request that is being served.

In the scope of ASGI, the environment of WSGI, or Django's `META`, which is either that
environment or its own; headers of clients have other names in all of them.
"""

Paths: TypeAlias = "Callable[[str], bool]"
"""Tells whether a path is one of those that were named."""

_METHOD = re.compile(r"[A-Z][A-Z-]{0,9}", re.ASCII).fullmatch


def paths(patterns: str | Iterable[str]) -> Paths:
    """
    Return what tells the paths that *patterns* name.

    Args:
        patterns: Whole paths as clients see them; `*` stands for any text, slashes
            included: `/health`, `/static/*`.

    Raises:
        TypeError: If a pattern is no text.

        ConfigError: If one begins by neither `/` nor `*`, so that no path could fit.
    """
    one = isinstance(patterns, str)
    given: list[object] = [patterns] if one and patterns else [*patterns]
    for pattern in given:
        rule = "exclude must be paths such as '/health' or '/static/*'"
        if not isinstance(pattern, str):
            msg = f"{rule} (got {type(pattern).__name__})."
            raise TypeError(msg)
        if not pattern.startswith(("/", "*")):
            msg = f"{rule} (got {pattern!r}). Begin it by '/', or by '*'."
            raise ConfigError(msg)
    if not given:
        return lambda _: False
    whole = {str(pattern) for pattern in given if "*" not in str(pattern)}
    split = [str(pattern).split("*") for pattern in given if "*" in str(pattern)]
    return lambda path: path in whole or any(_has(path, parts) for parts in split)


def _has(path: str, parts: Sequence[str]) -> bool:
    """
    Return whether *path* has all *parts* in this order, from its start to its end.

    Not by a regular expression: clients choose the path, and one that nearly fits two
    stars or more would take it minutes.
    """
    first, *middle, last = parts
    end = len(path) - len(last)
    at = len(first)
    if at > end or not (path.startswith(first) and path.endswith(last)):
        return False
    for part in middle:
        at = path.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


class Serving:
    """
    How a middleware serves requests: the options that all of them have.

    Args:
        client: Instead of the default client, which is looked up at each request.

        track: Whether each request makes an `api.response` event; False leaves the
            correlation alone.

        exclude: The paths of requests that make none; see `paths`.
    """

    __slots__ = ("_client", "_is_excluded", "_track")

    def __init__(
        self,
        client: Client | None = None,
        track: bool = True,  # noqa: FBT001, FBT002  a name of the design's
        exclude: str | Iterable[str] = (),
    ) -> None:
        self._client = client
        self._track = track
        self._is_excluded = paths(exclude)

    @property
    def client(self) -> Client:
        """The client of the middleware, else the default one."""
        return _api.default_client() if self._client is None else self._client

    @staticmethod
    async def aflush() -> None:
        """Deliver what all clients took, within `exit_timeout`; raises nothing."""
        try:
            if not _process.begin_delivery():  # else there is no need of a thread
                await in_thread(lambda _: _process.deliver(), 0.0)
        except Exception as error:  # noqa: BLE001  the host must go on
            internal_error(error)

    def begin(self, headers: Headers, method: str | None, path: str) -> Served | None:
        """
        Begin to serve a request; None, by an error of ours, if that cannot be.

        Without a *method*, as a WebSocket, it has no status, and tells errors alone.
        """
        client = self.client
        try:
            return Served(client, headers, method, path, is_told=self._tells(path))
        except Exception as error:  # noqa: BLE001  the host must go on
            internal_error(error)
            return None

    def join(self, served: Served) -> None:
        """
        Join in a request that another middleware around this one serves already.

        It is told once, by the outer one, unless that one tells nothing at all.
        """
        request = served.request
        if request.client is None and self._tells(request.path):
            request.client = served.client = self.client

    def _tells(self, path: str) -> bool:
        return self._track and self.client.is_enabled and not self._is_excluded(path)


class Served(ApiCall):
    """
    One request that is being served: its correlation, and its one event.

    Attributes:
        request: What frameworks and `track_api` add to.

        is_gone: Whether the client hung up before the answer was complete.

        has_begun: Whether the answer has begun, so that its status is known.
    """

    __slots__ = (
        "_duration",
        "_is_told",
        "_outside",
        "has_begun",
        "is_gone",
        "request",
    )

    def __init__(
        self,
        client: Client,
        headers: Headers,
        method: str | None,
        path: str,
        *,
        is_told: bool,
        is_trusted: bool = False,
    ) -> None:
        if method is not None and _METHOD(method) is None:
            method = "_OTHER"  # as in OpenTelemetry's conventions for HTTP
        self._outside = current_frame()
        frame = continued_frame(headers, client, is_trusted=is_trusted, is_apart=True)
        self.request = Request(client if is_told else None, method, path)
        if method is not None:
            frame.request = self.request
        self.is_gone = False
        self.has_begun = False
        self._is_told = method is None
        self._duration: float | None = None
        super().__init__(client, method, path, frame=frame)

    @property
    def request_id(self) -> str:
        """The id that every answer echoes."""
        return str(self.frame.request_id)

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """End the request, and whatever is left open inside, where it is under way."""
        self.tell_inside(error, result)
        self.request.client = None  # what runs on has nobody to tell it to
        frame, outside = current_frame(), self._outside
        self._outside = None
        while frame is not None and frame.key != self.frame.key:
            frame = frame.parent
        if frame is not None:
            switch(outside)

    def answer_with(self, status: object) -> None:
        """Hear that the answer begins; what runs from now on is background work."""
        checked = _errors.as_status(status)
        if self.is_gone:
            checked = _errors.CANCELLED  # nobody sees what is answered
        elif checked is None:
            self.client.adjust("status_code")
            checked = 500  # which servers make of it
        self.status_code = checked
        self.has_begun = True
        self.request.close()

    def complete(self) -> None:
        """
        Hear that the answer is out to its end.

        This tells the request, unless it failed: what failed may still come out.
        """
        if self._duration is None:
            self._duration = time.perf_counter() - self._started
            if self.status_code < 500:  # noqa: PLR2004
                self.tell_inside()

    def tell(self, error: BaseException | None, result: object) -> None:
        """Emit the response, once, and the error that escaped or that a 500 is of."""
        del result
        request = self.request
        request.close()
        own, request.error = request.error, None
        if request.client is None:
            return
        if not request.is_here():
            self._is_told = True  # by the process that answers it
        self.method = request.given_method or request.method
        self.path = request.best_path()
        self._component = (
            request.component or f"{self.method or ''} {self.path}".strip()
        )
        status = self._status(error)
        is_no_answer = self._is_told or status < 500  # noqa: PLR2004
        if error is not None and is_no_answer and _errors.is_failure(error):
            self.tell_error(error, status)
        if self._is_told:
            return
        self._is_told = True
        is_cut = self._duration is None or self.is_gone
        duration = time.perf_counter() - self._started
        self.tell_response(
            status,
            duration if self._duration is None else self._duration,
            own if error is None else error,
            {"incomplete": True} if is_cut and self._is_seen() else None,
        )

    def _is_seen(self) -> bool:
        """Return whether the client saw the answer begin."""
        return self.has_begun and self.status_code != _errors.CANCELLED

    def _status(self, error: BaseException | None) -> int:
        """Return the status that the client saw, or would have seen."""
        if self.has_begun:
            return self.status_code
        if self.is_gone or (error is not None and not _errors.is_failure(error)):
            return _errors.CANCELLED
        return 500  # which servers answer with where an application did not
