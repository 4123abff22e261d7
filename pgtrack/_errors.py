"""
What becomes of an exception: its status, its error event, and told only once.

Nothing here keeps an exception, or the frames its traceback holds, alive.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from typing import TypedDict

from pgtrack._snapshot import MARGIN, MAX_TEXT

__all__ = ["ErrorFields", "describe", "is_failure", "is_first_time", "status_of"]

CANCELLED = 499
"""The status of a call that was cancelled (nginx's "client closed request")."""


class ErrorFields(TypedDict, total=False):
    """The fields of an error event."""

    error_type: str
    error_message: str
    error_stack: str


def is_failure(error: BaseException) -> bool:
    """
    Return whether *error* says that something went wrong.

    `GeneratorExit`, `KeyboardInterrupt`, `SystemExit` and every library's cancellation
    are how a program ends or changes its mind.  None of them is an `Exception`, except
    for the cancellation of `concurrent.futures`, what Starlette raises where the client
    has gone, and what tells Celery to retry, ignore or reject a task.  A group of them
    may hold failures.
    """
    if isinstance(error, Exception):
        return not any(_is_a(error, *where) for where in _CANCELLATIONS)
    parts = getattr_safely(error, "exceptions")
    return isinstance(parts, tuple) and any(map(is_failure, parts))


_CANCELLATIONS = (
    ("celery.exceptions", "TaskPredicate"),
    ("concurrent.futures", "CancelledError"),
    ("starlette.requests", "ClientDisconnect"),
    ("starlette.websockets", "WebSocketDisconnect"),
)
"""By module and name: exceptions that are no failures."""


def status_of(error: BaseException) -> int:
    """
    Return the HTTP status that *error* amounts to.

    Its own `status_code`, or the code of a Werkzeug `HTTPException`, when it is an int
    in 100 to 599; what Django answers it with; 499 for a cancellation; 500 for whatever
    is left.
    """
    status = as_status(getattr_safely(error, "status_code"))
    if status is None:
        status = _werkzeug_status(error)
    if status is None:
        status = next((code for *kind, code in _DJANGO if _is_a(error, *kind)), None)
    if status is not None:
        return status
    if is_failure(error) or isinstance(error, (KeyboardInterrupt, SystemExit)):
        return 500
    return CANCELLED


_DJANGO = (
    ("django.http", "Http404", 404),
    ("django.core.exceptions", "PermissionDenied", 403),
    ("django.core.exceptions", "BadRequest", 400),
    ("django.core.exceptions", "SuspiciousOperation", 400),
    ("django.http.multipartparser", "MultiPartParserError", 400),
)
"""By module, name and status: exceptions that Django has an answer for."""


def as_status(value: object) -> int | None:
    """Return *value* as a plain int if it is an HTTP status, else None."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    number = int.__index__(value)  # an enum's, say, whatever its class makes of it
    return number if 100 <= number <= 599 else None  # noqa: PLR2004


def phrase(status: int) -> str:
    """Return what RFC 9110 calls *status*."""
    from http import HTTPStatus  # noqa: PLC0415  needed for failures alone

    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown status"


def getattr_safely(value: object, name: str) -> object:
    """Return an attribute of a foreign object, None where there is none to be had."""
    try:
        return getattr(value, name, None)
    except (Exception, SystemExit, GeneratorExit):  # noqa: BLE001  a property may
        return None


def _werkzeug_status(error: BaseException) -> int | None:
    if not _is_a(error, "werkzeug.exceptions", "HTTPException"):
        return None
    status = as_status(getattr_safely(error, "code"))
    if status is None:  # abort(response)
        response = getattr_safely(error, "response")
        status = as_status(getattr_safely(response, "status_code"))
    return status


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Ask for a class that cannot be met before somebody else imported its module."""
    return isinstance(error, getattr(sys.modules.get(module), name, ()))


def describe(error: BaseException, *, with_stack: bool) -> ErrorFields:
    """
    Return the error fields of *error*; a `__str__` that raises is told as such.

    Args:
        error: Any exception.

        with_stack: Whether the traceback is rendered; values of variables never are.
    """
    kind = type(error)
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  the error's own code may raise anything
        message = f"<unprintable {kind.__name__}>"
    fields = ErrorFields(
        error_type=kind.__name__, error_message=message[: MAX_TEXT + MARGIN]
    )
    if with_stack:
        fields["error_stack"] = _stack(error)
    return fields


def _stack(error: BaseException) -> str:
    """
    Render the traceback; of a long one the end, where the error was raised.

    It is cut between its parts, and a long part behind its start: the front of a secret
    is what it is known by.
    """
    try:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
    except Exception:  # noqa: BLE001  rendering calls the error's own code
        lines = traceback.format_tb(error.__traceback__)
    parts: list[str] = []
    left = MAX_TEXT
    for line in reversed(lines):
        part = line if len(line) <= _MAX_PART else f"{_redacted(line)[:_MAX_PART]}...\n"
        left -= len(part)
        if left < 0:
            break
        parts.append(part)
    return "".join(reversed(parts))


def _redacted(text: str) -> str:
    from pgtrack._redaction import redact_text  # noqa: PLC0415  for long ones alone

    return redact_text(text[: MAX_TEXT + MARGIN])


_MAX_PART = 2_000
"""Most characters of a line of the traceback, or of the message below it."""

_told: dict[int, tuple[weakref.ref[BaseException], dict[str, object]]] = {}
_MARK = "__pgtrack_sessions__"
_MAX_SESSIONS = 64


def is_first_time(error: BaseException, session_id: str) -> bool:
    """
    Return whether *error* is new to the session, and remember that it was told.

    An exception passes through many blocks on its way up; it is one error.  Classes of
    exceptions can be referred to weakly, except for the built-in ones; those carry a
    mark in their `__dict__`, which they have no other use for.  Of several threads with
    the same exception one is the first: `setdefault` is a single call into C.
    """
    key = id(error)
    try:
        reference = weakref.ref(error, lambda _: _told.pop(key, None))
        sessions = _told.setdefault(key, (reference, {}))[1]
    except TypeError:
        sessions = error.__dict__.setdefault(_MARK, {})
    if len(sessions) > _MAX_SESSIONS:  # one exception that is raised again and again
        sessions.clear()
    mine = object()
    return sessions.setdefault(session_id, mine) is mine
