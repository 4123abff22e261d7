"""
What pgtrack and a tracer tell each other.  No tracer is known here.

An integration puts one into `tracer`.  As long as there is none, whoever asks or tells
looks at that one name and goes on.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from pgtrack import _diagnostics

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pgtrack._context import Frame

__all__ = ["Tracer", "begun", "identified", "present_span", "untraced"]


class Tracer(Protocol):
    """
    What an integration with a tracer implements.

    It is called on the threads of the host, in the middle of its work: it must not
    wait, and takes no lock.
    """

    def present_span(self) -> Mapping[str, str] | None:
        """
        Return what the metadata of an event say of the active span; None without one.

        The keys are `trace_id`, `span_id` and `trace_flags`, in lower-case hex.
        """
        ...

    def begun(self, frame: Frame) -> None:
        """Hear that a request, task or message begins to be served under *frame*."""
        ...

    def identified(self, frame: Frame) -> None:
        """Hear that the user of *frame* became known, or was forgotten."""
        ...


tracer: Tracer | None = None
"""The one that is installed."""


def present_span() -> Mapping[str, str] | None:
    """Ask the tracer for the active span."""
    asked = tracer
    if asked is None:
        return None
    try:
        return asked.present_span()
    except Exception as error:  # noqa: BLE001  the host must not see our errors
        _diagnostics.internal_error(error)
        return None


def begun(frame: Frame) -> None:
    """Tell the tracer that a request, task or message begins to be served."""
    told = tracer
    if told is not None:
        try:
            told.begun(frame)
        except Exception as error:  # noqa: BLE001  the host must not see our errors
            _diagnostics.internal_error(error)


def identified(frame: Frame) -> None:
    """Tell the tracer that the user of *frame* became known, or was forgotten."""
    told = tracer
    if told is not None:
        try:
            told.identified(frame)
        except Exception as error:  # noqa: BLE001  the host must not see our errors
            _diagnostics.internal_error(error)


_KEYS = ("_SUPPRESS_INSTRUMENTATION_KEY", "_SUPPRESS_HTTP_INSTRUMENTATION_KEY")
"""Names in `opentelemetry.context` of what its instrumentations look for."""

_PLAIN_KEY = "suppress_instrumentation"
"""The same for some that do not know the names."""


@contextmanager
def untraced() -> Iterator[None]:
    """
    Keep what runs inside out of OpenTelemetry's traces, if the host has loaded that.

    Whether our integration is installed or not: the host's instrumentation of an HTTP
    library would see our requests, too.
    """
    context: Any = sys.modules.get("opentelemetry.context")
    token = None
    if context is not None:
        try:
            values = context.get_current()
            for key in (_PLAIN_KEY, *(getattr(context, name) for name in _KEYS)):
                values = context.set_value(key, "pgtrack", values)  # any that is true
            token = context.attach(values)
        except Exception as error:  # noqa: BLE001  half imported, or of another version
            _diagnostics.note(
                "untraced",
                "pgtrack could not keep its own requests out of OpenTelemetry's traces "
                f"({type(error).__name__}).",
            )
    try:
        yield
    finally:
        if token is not None:
            context.detach(token)
