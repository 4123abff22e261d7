"""What pgtrack and a tracer tell each other, with a tracer of our own."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from pgtrack import _diagnostics, _tracing
from pgtrack._blocks import Activation, continued_frame
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgtrack._context import Frame

SPAN = {"trace_id": "a" * 32, "span_id": "b" * 16, "trace_flags": "01"}


class Heard:
    """A tracer that writes down what it hears."""

    def __init__(self, span: Mapping[str, str] | None = None) -> None:
        self.span = span
        self.begun_sessions: list[str | None] = []
        self.users: list[str | None] = []

    def present_span(self) -> Mapping[str, str] | None:
        """Return what was given."""
        return self.span

    def begun(self, frame: Frame) -> None:
        """Write down the session."""
        self.begun_sessions.append(frame.session_id)

    def identified(self, frame: Frame) -> None:
        """Write down the user."""
        self.users.append(frame.cell.user_id)


class Broken:
    """A tracer that fails at everything."""

    def present_span(self) -> Mapping[str, str] | None:
        """Fail."""
        raise ValueError("no span")

    def begun(self, frame: Frame) -> None:
        """Fail."""
        raise ValueError("no begin")

    def identified(self, frame: Frame) -> None:
        """Fail."""
        raise ValueError("no user")


def serve(session_id: str) -> None:
    """Begin and end a unit of work, as middleware does."""
    headers = {"X-Session-ID": session_id}
    client = pgtrack._api.default_client()
    frame = continued_frame(headers, client, is_apart=True)
    activation = Activation(frame)
    pgtrack.identify("u_1")
    activation.leave()


def test_without_a_tracer_nobody_is_told() -> None:
    """There is none at first, and everything goes on."""
    with capture() as events:
        serve("sess_1")
        pgtrack.emit("custom")

    assert _tracing.tracer is None
    assert _tracing.present_span() is None
    assert {"source": "backend"} == events[0].metadata


def test_a_tracer_hears_of_work_and_users(monkeypatch) -> None:
    """It hears of requests and tasks that begin, not of blocks, and of each user."""
    heard = Heard()
    monkeypatch.setattr(_tracing, "tracer", heard)

    serve("sess_1")
    with pgtrack.session("sess_2"), pgtrack.continued_from({"X-Session-ID": "sess_3"}):
        pgtrack.identify(None)

    assert ["sess_1"] == heard.begun_sessions
    assert ["u_1", None] == heard.users


def test_a_tracer_is_asked_for_the_span_of_each_event(monkeypatch) -> None:
    """What it says is in the metadata, under reserved keys; None adds nothing."""
    heard = Heard(SPAN)
    monkeypatch.setattr(_tracing, "tracer", heard)

    with capture() as events:
        pgtrack.emit("custom", metadata={"span_id": "mine", "pages": 3})
        heard.span = None
        pgtrack.emit("custom", metadata={"span_id": "mine"})

    assert [
        {"source": "backend", "pages": 3, **SPAN},
        {"source": "backend", "span_id": "mine"},
    ] == [event.metadata for event in events]


def test_a_dropped_event_asks_nobody(monkeypatch) -> None:
    """An event that goes nowhere costs no question."""
    monkeypatch.setattr(_tracing, "tracer", Broken())

    with capture(sample_rate=0.0) as events:
        assert not pgtrack.emit("custom")

    assert [] == events


def test_a_tracer_that_fails_costs_nothing(monkeypatch) -> None:
    """Work begins, users are known and events go out; the log says what failed."""
    monkeypatch.setattr(_diagnostics, "reraise", False)
    monkeypatch.setattr(_tracing, "tracer", Broken())

    with capture() as events:
        serve("sess_1")
        pgtrack.emit("custom")

    assert 1 == len(events)
    assert {"source": "backend"} == events[0].metadata
    assert 3 == len([cause for cause in _diagnostics._notes if "ValueError" in cause])


def test_a_large_event_keeps_the_ids(monkeypatch) -> None:
    """Metadata that are cut to size lose other values first."""
    monkeypatch.setattr(_tracing, "tracer", Heard(SPAN))

    with capture(max_event_bytes=1_000) as events:
        pgtrack.emit("custom", metadata={f"k{i}": "x" * 50 for i in range(100)})

    assert SPAN.items() <= events[0].metadata.items()


class Context:
    """What `opentelemetry.context` offers, and how it was used."""

    _SUPPRESS_INSTRUMENTATION_KEY = "one"
    _SUPPRESS_HTTP_INSTRUMENTATION_KEY = "two"

    def __init__(self) -> None:
        self.current: dict[str, Any] = {}

    def get_current(self) -> dict[str, Any]:
        """Return the present values."""
        return self.current

    def set_value(self, key: str, value: object, context: Any) -> dict[str, Any]:
        """Return *context* with one more value."""
        return {**context, key: value}

    def attach(self, context: Any) -> Any:
        """Make *context* the present one."""
        before, self.current = self.current, context
        return before

    def detach(self, token: Any) -> None:
        """Go back to what was."""
        self.current = token


class TestUntraced:
    """Our own work is kept out of the host's traces."""

    def test_the_keys_are_set_inside_alone(self, monkeypatch) -> None:
        """All keys that instrumentations look for are true inside, and gone after."""
        context = Context()
        monkeypatch.setitem(sys.modules, "opentelemetry.context", context)

        with _tracing.untraced():
            inside = context.current
        with pytest.raises(ValueError, match="ours"), _tracing.untraced():
            raise ValueError("ours")

        assert {"suppress_instrumentation", "one", "two"} == inside.keys()
        assert all(inside.values())
        assert {} == context.current

    def test_without_it_there_is_nothing_to_do(self, monkeypatch) -> None:
        """Where OpenTelemetry is not loaded it is not asked, nor loaded."""
        monkeypatch.setitem(sys.modules, "opentelemetry.context", None)

        with _tracing.untraced():
            pass

        assert {} == _diagnostics._notes

    def test_another_version_costs_a_line(self, monkeypatch) -> None:
        """What lacks the names is left alone, and the log says so."""
        other = types.SimpleNamespace(get_current=dict, set_value=lambda k, v, c: c)
        monkeypatch.setitem(sys.modules, "opentelemetry.context", other)

        with _tracing.untraced():
            pass

        assert ["untraced"] == list(_diagnostics._notes)
