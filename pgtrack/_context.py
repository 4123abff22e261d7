"""
The correlation: one context variable that holds the innermost frame.

A frame is a unit of work, or a part of one: a session, a request, a journey, a step
or a call.  Frames are never changed once pushed, so that whoever copied the context
(a task, a thread) goes on to see its own.  What must be seen across copies, the user,
sits in a `Cell` that the frames of one session or request share.

Leaving a block out of order neither raises nor clobbers: its frame is taken out from
under the others.  In a context that it was never pushed in there is nothing to do.
"""

from __future__ import annotations

import contextvars
import copy
import itertools
import os
import re
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import attrs

from pgtrack._clock import new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = [
    "SUPPRESSED",
    "Cell",
    "Context",
    "Frame",
    "Request",
    "context_of",
    "current_frame",
    "is_journey_id",
    "is_request_id",
    "is_session_id",
    "is_user_id",
    "new_session_id",
    "pop",
    "process_session_id",
    "push",
    "suppress",
    "switch",
]

SessionIdFormat = Literal["token", "uuid"]

_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}", re.ASCII).fullmatch
_UUID = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    re.ASCII | re.IGNORECASE,
).fullmatch
_REQUEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+/=@-]{0,127}", re.ASCII).fullmatch
_USER = re.compile(r"[\x21-\x7e]{1,255}").fullmatch


def is_session_id(value: object, format: SessionIdFormat = "token") -> bool:  # noqa: A002
    """
    Return whether *value* is a session id.

    `token`: 1 to 128 ASCII letters, digits and `_ . : -`, a letter or digit first.
    `uuid`: a UUID of RFC 9562, version 1 to 8, in its hyphenated form.
    """
    match = _SESSION if format == "token" else _UUID
    return isinstance(value, str) and match(value) is not None


def is_request_id(value: object) -> bool:
    """Return whether *value* is 1 to 128 of ASCII letters, digits and `_.:+/=@-`."""
    return isinstance(value, str) and _REQUEST(value) is not None


def is_user_id(value: object) -> bool:
    """Return whether *value* is 1 to 255 visible ASCII characters."""
    return isinstance(value, str) and _USER(value) is not None


def is_journey_id(value: object) -> bool:
    """Return whether *value* is 1 to 255 printable characters, the server's column."""
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()  # noqa: PLR2004


def new_session_id(prefix: str = "", format: SessionIdFormat = "token") -> str:  # noqa: A002
    """Return a new session id: a UUID, behind *prefix* where the format allows one."""
    return new_id() if format == "uuid" else prefix + new_id()


class Cell:
    """
    What a request or session learns on its way.

    Attributes:
        user_id: Its user.

        span: The tracer's own: what stands there for the request as a whole.
    """

    __slots__ = ("span", "user_id")

    def __init__(self, user_id: str | None = None) -> None:
        self.user_id = user_id
        self.span: Any = None


class Request:
    """
    What becomes known of the request that is being served, until it is told.

    A middleware makes it; frameworks and `track_api` add to it, in whatever thread or
    task they run.

    Attributes:
        client: Whose event the request becomes; None where it becomes none, or has.

        method: The HTTP method.

        path: The path as it came, without the query.

        find_route: Returns the template that the path fits, such as `/users/{id}`, once
            the framework has found it, else None.

        given_method: The method that `track_api` was given.

        given_path: The path that `track_api` was given.

        is_wsgi: Whether WSGI's middleware serves it; no bridge leads from it to WSGI.

        error: What ended the request's own function; kept until the request is told.

        component: The function that it ended.
    """

    __slots__ = (
        "_claims",
        "_pid",
        "client",
        "component",
        "error",
        "find_route",
        "given_method",
        "given_path",
        "is_wsgi",
        "method",
        "path",
    )

    def __init__(self, client: object, method: str | None, path: str) -> None:
        self.client = client
        self.method = method
        self.path = path
        self.find_route: Callable[[], str | None] | None = None
        self.given_method: str | None = None
        self.given_path: str | None = None
        self.is_wsgi = False
        self.error: BaseException | None = None
        self.component: str | None = None
        self._claims = [None]
        self._pid = os.getpid()

    def claim(self) -> bool:
        """
        Return whether the caller is the request's own function, the first that asks.

        Nobody is once the answer has begun: what runs then is background work.  Nor is
        what runs in a forked child, of which the middleware would not learn.
        """
        if not self.is_here():
            return False
        try:
            self._claims.pop()  # one call into C, so that of two threads one has it
        except IndexError:
            return False
        return True

    def is_here(self) -> bool:
        """Return whether this process serves it, rather than one that it forked."""
        return os.getpid() == self._pid

    def close(self) -> None:
        """Let no function be the request's own any more."""
        self._claims.clear()

    def best_path(self) -> str:
        """Return the path that was given, else the route, else the path as it came."""
        if self.given_path is not None:
            return self.given_path
        try:
            route = None if self.find_route is None else self.find_route()
        except Exception:  # noqa: BLE001  routing is the framework's own code
            route = None
        return self.path if route is None else route


_NOTHING: Mapping[str, Any] = MappingProxyType({})
_keys = itertools.count()


class Frame:
    """
    One unit of work, or a part of one, inside of its parent.

    Attributes:
        session_id: None for a unit of work outside of any session.

        request_id: The request that is being served.

        journey_id: The journey that is under way.

        step: Id and name of the journey's step that is under way.

        metadata: What goes into each event's metadata; a snapshot, not yet redacted.

        cell: Shared by all frames of the same session or request.

        is_remote: Whether the session id came in from outside.

        is_suppressed: Whether emitting is off, as in pgtrack's own thread.

        parent: The frame around this one.

        key: What tells frames apart; one that moved to another parent keeps it.

        redacted: The metadata as each client redacted it; shared where it is the same.

        request: The request that is being served by this process, where one is.
    """

    __slots__ = (
        "cell",
        "is_remote",
        "is_suppressed",
        "journey_id",
        "key",
        "metadata",
        "parent",
        "redacted",
        "request",
        "request_id",
        "session_id",
        "step",
    )

    def __init__(
        self,
        parent: Frame | None,
        *,
        session_id: str | None = None,
        request_id: str | None = None,
        journey_id: str | None = None,
        step: tuple[str, str | None] | None = None,
        metadata: Mapping[str, Any] = _NOTHING,
        cell: Cell | None = None,
        is_remote: bool = False,
        is_suppressed: bool = False,
        request: Request | None = None,
    ) -> None:
        self.parent = parent
        self.session_id = session_id
        self.request_id = request_id
        self.journey_id = journey_id
        self.step = step
        self.metadata = metadata
        self.cell = Cell() if cell is None else cell
        self.is_remote = is_remote
        self.is_suppressed = is_suppressed
        self.request = request
        self.key = next(_keys)
        self.redacted: dict[object, Mapping[str, Any]] = (
            parent.redacted
            if parent is not None and parent.metadata is metadata
            else {}
        )

    def child(
        self,
        *,
        journey_id: str | None = None,
        step: tuple[str, str | None] | None = None,
    ) -> Frame:
        """Return a frame for a part of this unit of work; it shares the cell."""
        return Frame(
            self,
            session_id=self.session_id,
            request_id=self.request_id,
            journey_id=self.journey_id if journey_id is None else journey_id,
            step=step if journey_id is not None or step is not None else self.step,
            metadata=self.metadata,
            cell=self.cell,
            is_remote=self.is_remote,
            is_suppressed=self.is_suppressed,
            request=self.request,
        )

    def inside(self, parent: Frame | None) -> Frame:
        """Return this frame inside of another parent."""
        moved = copy.copy(self)
        moved.parent = parent
        return moved


_frame: contextvars.ContextVar[Frame | None] = contextvars.ContextVar(
    "pgtrack_frame", default=None
)

current_frame = _frame.get
"""Return the innermost frame of the running context, or None."""


def push(frame: Frame) -> None:
    """Make *frame*, whose parent is the innermost, the innermost."""
    _frame.set(frame)


def pop(frame: Frame) -> None:
    """Take *frame* out of the running context, wherever in it it is, if it is."""
    inner: list[Frame] = []
    innermost = _frame.get()
    while innermost is not None and innermost.key != frame.key:
        inner.append(innermost)
        innermost = innermost.parent
    if innermost is not None:
        innermost = innermost.parent
        while inner:
            innermost = inner.pop().inside(innermost)
        _frame.set(innermost)


def switch(frame: Frame | None) -> Frame | None:
    """Make *frame* the innermost, whatever it was, and return what it was."""
    before = _frame.get()
    _frame.set(frame)
    return before


SUPPRESSED = Frame(None, is_suppressed=True)
"""The frame under which pgtrack does its own work."""


@contextmanager
def suppress() -> Iterator[None]:
    """Turn emitting off in the running context, for what is pgtrack's own."""
    before = switch(SUPPRESSED)
    try:
        yield
    finally:
        switch(before)


_process_sessions: dict[int, str] = {}


def process_session_id() -> str:
    """
    Return the session of events outside of any unit of work.

    One per process, also across forks; it is never propagated.
    """
    pid = os.getpid()
    session_id = _process_sessions.get(pid)
    if session_id is None:  # of several threads one makes it
        session_id = _process_sessions.setdefault(pid, "proc-" + new_id())
    return session_id


@attrs.frozen(kw_only=True)
class Context:
    """
    The correlation at one moment; None where unset.

    Attributes:
        session_id: The session; None outside of any session, request or task.

        request_id: The request that is being served.

        user_id: The user that `identify`, `session` or a trusted header named.

        journey_id: The journey that is under way.

        metadata: What `session(metadata=...)` adds to each event's metadata.
    """

    session_id: str | None = None
    request_id: str | None = None
    user_id: str | None = None
    journey_id: str | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


def context_of(frame: Frame | None) -> Context:
    """Return what *frame* is to the public."""
    if frame is None:
        return Context()
    return Context(
        session_id=frame.session_id,
        request_id=frame.request_id,
        user_id=frame.cell.user_id,
        journey_id=frame.journey_id,
        metadata=dict(frame.metadata),
    )
