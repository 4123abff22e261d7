"""OpenTelemetry: spans that know their session, events that know their span."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("opentelemetry.sdk")

import httpx
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

import pgtrack
from harness import Server, run_script, start_together, status
from harness.asgi import Call, http_scope
from pgtrack import _api, _diagnostics, _tracing
from pgtrack.integrations import asgi, opentelemetry
from pgtrack.testing import capture
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

TIMEOUT = 10


class Traces:
    """A tracer of the SDK's, and the spans that ended."""

    def __init__(self) -> None:
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")
        self.span = self.tracer.start_as_current_span

    @property
    def ended(self) -> dict[str, ReadableSpan]:
        """The spans by their names."""
        return {span.name: span for span in self.exporter.get_finished_spans()}

    @property
    def marks(self) -> dict[str, dict[str, Any]]:
        """The attributes of the spans by their names."""
        return {name: dict(span.attributes or {}) for name, span in self.ended.items()}


@pytest.fixture(name="traces")
def _traces() -> Iterator[Traces]:
    """Install the integration on a tracer provider that is not the global one."""
    traces = Traces()
    opentelemetry.install(tracer_provider=traces.provider)
    yield traces
    opentelemetry.uninstall()


class TestSpansKeepTheSession:
    """Spans say as they start in whose unit of work they are."""

    def test_the_session(self, traces) -> None:
        """A span that starts in a session has its id, and nothing that is not set."""
        with pgtrack.session("sess_1"), traces.span("work"):
            pass

        assert {"work": {"session.id": "sess_1"}} == traces.marks

    def test_user_journey_and_request(self, traces) -> None:
        """User, journey and request are on it where they are set."""
        headers = {"X-Session-ID": "s", "X-Request-ID": "r", "X-User-ID": "u"}
        with pgtrack.continued_from(headers, trusted=True):
            with pgtrack.journey("checkout"), traces.span("in"):
                pass
            with traces.span("after"):
                pass

        common = {"session.id": "s", "user.id": "u", "productgraph.request.id": "r"}
        assert {
            "in": {**common, "productgraph.journey.id": "checkout"},
            "after": common,
        } == traces.marks

    def test_a_child_has_them_of_its_own_start(self, traces) -> None:
        """Each span is marked by itself, whatever its parent has."""
        with traces.span("outer"), pgtrack.session("sess_1"), traces.span("inner"):
            pass

        assert {"outer": {}, "inner": {"session.id": "sess_1"}} == traces.marks

    def test_the_process_has_none(self, traces) -> None:
        """Outside of a session there is none on a span, though events have one."""
        with capture() as events, traces.span("work"):
            pgtrack.emit("custom")

        assert events[0].session_id.startswith("proc-")
        assert {"work": {}} == traces.marks

    def test_what_the_program_set_stays(self, traces) -> None:
        """An attribute that a span starts with is not replaced."""
        own = {"session.id": "own", "user.id": "own"}
        with pgtrack.session("sess_1"), traces.span("work", attributes=own):
            pass

        assert {"work": own} == traces.marks

    def test_a_task_and_its_thread(self, traces) -> None:
        """Tasks of asyncio and `to_thread` keep the session."""

        def in_thread() -> None:
            with traces.span("thread"):
                pass

        async def task() -> None:
            with traces.span("task"):
                await asyncio.to_thread(in_thread)

        async def main() -> None:
            with pgtrack.session("sess_1"):
                await asyncio.wait_for(asyncio.create_task(task()), TIMEOUT)

        asyncio.run(main())

        mark = {"session.id": "sess_1"}
        assert {"thread": mark, "task": mark} == traces.marks

    def test_a_bound_function_in_a_pool(self, traces) -> None:
        """A function that was bound keeps session, user and journey in its thread."""

        def work() -> None:
            with traces.span("work"):
                pass

        session = pgtrack.session("sess_1", user_id="u")
        with ThreadPoolExecutor(1) as pool, session, pgtrack.journey("buy"):
            pool.submit(pgtrack.bind(work)).result(TIMEOUT)

        mark = {
            "session.id": "sess_1",
            "user.id": "u",
            "productgraph.journey.id": "buy",
        }
        assert {"work": mark} == traces.marks

    def test_a_generator_keeps_its_session_to_itself(self, traces) -> None:
        """Its spans have the session, those of its consumer have not."""

        @pgtrack.session("sess_1")
        def numbers() -> Iterator[int]:
            with traces.tracer.start_span("producer"):
                yield 1

        for _ in numbers():
            with traces.span("consumer"):
                pass

        assert {"producer": {"session.id": "sess_1"}, "consumer": {}} == traces.marks


class TestSpansNeverMix:
    """Many units of work at once, and each span in its own."""

    def test_threads(self, traces) -> None:
        """Threads that start their spans side by side keep to their own session."""
        barrier = threading.Barrier(8)

        def work(i: int) -> None:
            for j in range(250):
                with pgtrack.session(f"s{i}-{j}", user_id=f"u{i}-{j}"):
                    if j % 50 == 0:
                        barrier.wait(TIMEOUT)
                    with traces.span(f"s{i}-{j}"):
                        pass

        start_together(8, work)

        assert 2_000 == len(traces.marks)
        for name, marks in traces.marks.items():
            assert {"session.id": name, "user.id": "u" + name[1:]} == marks

    def test_tasks(self, traces) -> None:
        """Tasks that take turns between session and span keep to their own."""

        async def work(i: int) -> None:
            with pgtrack.session(f"s{i}"):
                await asyncio.sleep(0)
                with traces.span(f"s{i}"):
                    await asyncio.sleep(0)
                    pgtrack.emit("custom", name=f"s{i}")

        async def main() -> None:
            await asyncio.wait_for(
                asyncio.gather(*(work(i) for i in range(2_000))), TIMEOUT
            )

        with capture() as events:
            asyncio.run(main())

        spans = traces.ended
        assert 2_000 == len(events) == len(spans)
        for event in events:
            span = spans[event.name]
            assert {"session.id": event.session_id} == dict(span.attributes or {})
            assert event.session_id == event.name
            assert event.metadata["span_id"] == f"{span.context.span_id:016x}"


class TestSpansWhenWorkFails:
    """Exceptions and cancellation change nothing, and nothing is left behind."""

    def test_an_exception(self, traces) -> None:
        """A span that an exception leaves has its session, and its error event it."""

        @pgtrack.session("sess_1")
        def pay() -> None:
            with traces.span("work"), pgtrack.api_call("POST", "/pay"):
                raise ValueError("no card")

        with capture() as events, pytest.raises(ValueError, match="no card"):
            pay()
        with traces.span("next"):
            pass

        assert {"work": {"session.id": "sess_1"}, "next": {}} == traces.marks
        span_id = f"{traces.ended['work'].context.span_id:016x}"
        assert [span_id, span_id] == [e.metadata["span_id"] for e in events]

    def test_a_cancelled_task(self, traces) -> None:
        """The span of a cancelled task has its session, the next one none."""

        async def task(started: asyncio.Event) -> None:
            with pgtrack.session("sess_1"), traces.span("work"):
                started.set()
                await asyncio.Event().wait()

        async def main() -> None:
            started = asyncio.Event()
            running = asyncio.create_task(task(started))
            await asyncio.wait_for(started.wait(), TIMEOUT)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            with traces.span("next"):
                pass

        asyncio.run(main())

        assert {"work": {"session.id": "sess_1"}, "next": {}} == traces.marks

    def test_an_error_of_ours(self, traces, monkeypatch) -> None:
        """The host's span starts all the same, and the log says what happened."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(opentelemetry, "_attributes_of", lambda _: 1 / 0)

        with pgtrack.session("sess_1"), traces.span("work"):
            pass

        assert {"work": {}} == traces.marks
        assert "ZeroDivisionError" in next(iter(_diagnostics._notes))


class TestTheSpanOfTheRequest:
    """Instrumentation of the server may begin a request before pgtrack does."""

    @staticmethod
    def serve(
        traces: Traces, app: Any, headers: dict[str, str], kind: SpanKind
    ) -> None:
        """Serve one request under the middleware, within a span of *kind*."""
        served = asgi.Middleware(app)

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            with traces.span("request", kind=kind):
                await served(scope, receive, send)

        call = Call(http_scope("GET", "/", [*headers.items()]))
        asyncio.run(asyncio.wait_for(call.run(outer), TIMEOUT))

    @staticmethod
    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Learn late who the user is, then answer."""
        pgtrack.identify("u_late")
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    def test_it_is_marked_when_the_request_begins(self, traces) -> None:
        """A server's span around the middleware gets session, request and user."""
        headers = {"X-Session-ID": "sess_1", "X-Request-ID": "req_1"}

        self.serve(traces, self.app, headers, SpanKind.SERVER)

        mark = {
            "session.id": "sess_1",
            "productgraph.request.id": "req_1",
            "user.id": "u_late",
        }
        assert {"request": mark} == traces.marks

    def test_other_spans_around_are_not(self, traces) -> None:
        """A span around the server, or of the call that came here, is not marked."""
        headers = {"X-Session-ID": "sess_1"}

        self.serve(traces, self.app, headers, SpanKind.CLIENT)
        self.serve(traces, self.app, headers, SpanKind.INTERNAL)

        assert {"request": {}} == traces.marks

    def test_a_request_within_a_request_leaves_its_span_alone(self, traces) -> None:
        """Applications that call each other in process do not mark the outer span."""
        inner = asgi.Middleware(self.app)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            headers = [("X-Session-ID", "sess_2"), ("X-User-ID", "u_2")]
            await Call(http_scope("GET", "/", headers)).run(inner)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

        with capture(trust_user_header=True):
            self.serve(traces, app, {"X-Session-ID": "sess_1"}, SpanKind.SERVER)

        assert "sess_1" == traces.marks["request"]["session.id"]
        assert "user.id" not in traces.marks["request"]

    def test_two_requests_on_one_thread(self, traces) -> None:
        """The next request, without headers, has a session of its own on its span."""
        self.serve(traces, self.app, {"X-Session-ID": "sess_1"}, SpanKind.SERVER)
        traces.exporter.clear()
        self.serve(traces, self.app, {}, SpanKind.SERVER)

        assert traces.marks["request"]["session.id"].startswith("srv-")

    def test_the_real_instrumentation(self, traces) -> None:
        """With OpenTelemetry's own ASGI middleware around, its span is marked."""
        otel_asgi = pytest.importorskip("opentelemetry.instrumentation.asgi")
        app = otel_asgi.OpenTelemetryMiddleware(
            asgi.Middleware(self.app),
            tracer_provider=traces.provider,
            meter_provider=MeterProvider(shutdown_on_exit=False),
        )
        call = Call(http_scope("GET", "/pay", [("X-Session-ID", "sess_1")]))

        with capture() as events:
            asyncio.run(asyncio.wait_for(call.run(app), TIMEOUT))

        (name,) = [n for n, s in traces.ended.items() if s.kind is SpanKind.SERVER]
        assert "sess_1" == traces.marks[name]["session.id"]
        assert "u_late" == traces.marks[name]["user.id"]
        (event,) = events
        context = traces.ended[name].context
        assert f"{context.trace_id:032x}" == event.metadata["trace_id"]

    def test_an_error_of_ours(self, traces, monkeypatch) -> None:
        """The request is served all the same."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(opentelemetry, "_attributes_of", lambda _: 1 / 0)

        self.serve(traces, self.app, {}, SpanKind.SERVER)

        assert {"request": {}} == traces.marks
        assert 2 == len(_diagnostics._notes)  # as it began, and in identify


class TestIdentify:
    """The user may become known late."""

    def test_the_active_span_learns_of_it(self, traces) -> None:
        """The span in which identify is called gets the user, and those that follow."""
        with pgtrack.session("sess_1"):
            with traces.span("before"):
                pass
            with traces.span("outer"), traces.span("during"):
                pgtrack.identify("u_1")
            with traces.span("after"):
                pass

        users = {name: marks.get("user.id") for name, marks in traces.marks.items()}
        assert {"before": None, "outer": None, "during": "u_1", "after": "u_1"} == users

    def test_the_span_of_the_request_learns_of_it(self, traces) -> None:
        """So does the span of the request as a whole, from another thread, too."""

        def authenticate() -> None:
            pgtrack.identify("u_1")

        request = traces.span("request", kind=SpanKind.SERVER)
        pool = ThreadPoolExecutor(1)
        with pool, pgtrack.session("sess_1"), request, traces.span("inner"):
            pool.submit(pgtrack.bind(authenticate)).result(TIMEOUT)

        users = {name: marks.get("user.id") for name, marks in traces.marks.items()}
        assert {"request": "u_1", "inner": None} == users

    def test_a_span_around_the_session_does_not(self, traces) -> None:
        """A span of a job that goes through many sessions is no user's."""
        with traces.span("job"):
            for i in range(2):
                with pgtrack.session():
                    pgtrack.identify(f"u_{i}")

        assert {"job": {}} == traces.marks

    def test_each_message_of_a_long_session_has_its_own_span(self, traces) -> None:
        """Where one session serves many messages, the one under way learns of it."""
        with pgtrack.session("sess_1"):
            with traces.span("first", kind=SpanKind.CONSUMER):
                pass
            with traces.span("second", kind=SpanKind.CONSUMER), traces.span("part"):
                pgtrack.identify("u_1")

        users = {name: marks.get("user.id") for name, marks in traces.marks.items()}
        assert {"first": None, "second": "u_1", "part": "u_1"} == users

    def test_outside_of_a_session_no_span_is_touched(self, traces) -> None:
        """A journey without a session has no user on spans that are not in it."""
        with traces.span("work"), pgtrack.journey("buy"):
            pgtrack.identify("u_1")

        assert {"work": {}} == traces.marks

    def test_forgetting_is_for_what_follows(self, traces) -> None:
        """After identify(None) spans that start have no user."""
        with pgtrack.session("sess_1", user_id="u_1"):
            with traces.span("before"):
                pgtrack.identify(None)
            with traces.span("after"):
                pass

        users = {name: marks.get("user.id") for name, marks in traces.marks.items()}
        assert {"before": "u_1", "after": None} == users


class TestEventsKnowTheirSpan:
    """The metadata of an event have the ids of the span it was emitted in."""

    def test_the_ids(self, traces) -> None:
        """Trace and span id are lower-case hex, and so are the flags."""
        with capture() as events, traces.span("work"):
            pgtrack.emit("custom", metadata={"pages": 3})

        context = traces.ended["work"].context
        assert {
            "pages": 3,
            "source": "backend",
            "trace_id": f"{context.trace_id:032x}",
            "span_id": f"{context.span_id:016x}",
            "trace_flags": f"{context.trace_flags:02x}",
        } == events[0].metadata

    def test_without_a_span_there_are_none(self, traces) -> None:
        """Outside of any span, and in one without valid ids, there is no such key."""
        invalid = trace.NonRecordingSpan(trace.INVALID_SPAN_CONTEXT)
        with capture() as events:
            pgtrack.emit("custom")
            with trace.use_span(invalid):
                pgtrack.emit("custom")

        assert [{"source": "backend"}] * 2 == [event.metadata for event in events]

    def test_a_span_that_is_not_recorded_counts(self, traces) -> None:
        """Ids that came in from a caller are as good as others."""
        remote = trace.SpanContext(0xAB, 0xCD, is_remote=True)
        with capture() as events, trace.use_span(trace.NonRecordingSpan(remote)):
            pgtrack.emit("custom")

        assert {
            "source": "backend",
            "trace_id": f"{0xAB:032x}",
            "span_id": f"{0xCD:016x}",
            "trace_flags": "00",
        } == events[0].metadata

    def test_they_win_over_the_programs_own(self, traces) -> None:
        """The keys are reserved, and what they replace is counted."""
        with capture() as events, traces.span("work"):
            pgtrack.emit("custom", metadata={"trace_id": "mine"})
            adjusted = dict(pgtrack.stats().adjusted)

        trace_id = f"{traces.ended['work'].context.trace_id:032x}"
        assert trace_id == events[0].metadata["trace_id"]
        assert {"reserved_key": 1} == adjusted

    def test_they_are_not_taken_for_a_card(self, traces) -> None:
        """A span id of digits that could be a card's number stays readable."""
        digits = 0x4242424242424242
        card = trace.SpanContext(0xAB, digits, is_remote=False)
        with capture() as events, trace.use_span(trace.NonRecordingSpan(card)):
            pgtrack.emit("custom", metadata={"card": f"{digits:x}"})

        metadata = events[0].metadata
        assert (f"{digits:x}", "[redacted]") == (metadata["span_id"], metadata["card"])

    def test_before_send_may_take_them_away(self, traces) -> None:
        """The hook sees them, and what it makes of them is what leaves."""
        seen = []

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            seen.append(set(event.metadata))
            return event.replace(metadata={"span_id": "4242424242424242"})

        with capture(before_send=hook) as events, traces.span("work"):
            pgtrack.emit("custom")

        assert [{"source", "trace_id", "span_id", "trace_flags"}] == seen
        assert {"span_id": "[redacted]"} == events[0].metadata

    def test_each_thread_has_its_own(self, traces) -> None:
        """Events of threads side by side have the ids of their own thread's span."""
        barrier = threading.Barrier(4)

        def work(i: int) -> None:
            for j in range(100):
                with traces.span(f"{i}-{j}"):
                    barrier.wait(TIMEOUT)
                    pgtrack.emit("custom", name=f"{i}-{j}")

        with capture() as events:
            start_together(4, work)

        spans = traces.ended
        assert 400 == len(events)
        for event in events:
            assert (
                event.metadata["span_id"] == f"{spans[event.name].context.span_id:016x}"
            )

    def test_they_are_those_of_the_moment(self, traces) -> None:
        """What is delivered later, and on another thread, has the span of the emit."""
        with Server() as server:
            pgtrack.configure(project_id="shop", endpoint=server.url)
            with traces.span("work"):
                pgtrack.emit("custom")
            assert pgtrack.flush(TIMEOUT)
            (event,) = server.events

        span_id = f"{traces.ended['work'].context.span_id:016x}"
        assert span_id == event["metadata"]["span_id"]

    def test_an_error_of_ours(self, traces, monkeypatch) -> None:
        """The event goes out without ids."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(opentelemetry, "format_trace_id", lambda _: 1 / 0)

        with capture() as events, traces.span("work"):
            pgtrack.emit("custom")

        assert {"source": "backend"} == events[0].metadata
        assert "ZeroDivisionError" in next(iter(_diagnostics._notes))

    def test_their_bytes_count(self, traces) -> None:
        """The bound of the queue knows that such events are larger."""
        records: list[Any] = []
        with capture():
            client = _api.default_client()
            client._sink = types.SimpleNamespace(put=records.append, retire=list)
            client.emit("custom")
            with traces.span("work"):
                client.emit("custom")

        without, within = (record[-1] for record in records)
        assert without + 300 < within

    def test_on_the_console_the_flags_are_not_shown(self, traces, capsys) -> None:
        """A line for people has the ids, at its end."""
        pgtrack.configure(project_id="shop", endpoint="console:")
        with traces.span("work"):
            pgtrack.emit("custom", name="paid")
        pgtrack.flush(TIMEOUT)

        line = capsys.readouterr().out
        assert f"trace_id={traces.ended['work'].context.trace_id:032x}" in line
        assert "trace_flags" not in line


class TestMetrics:
    """The ledger is among the metrics of a provider."""

    @pytest.fixture(name="reader")
    def _reader(self) -> Iterator[InMemoryMetricReader]:
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader], shutdown_on_exit=False)
        opentelemetry.install(Traces().provider, provider)
        opentelemetry.install(Traces().provider, provider)  # as good as once
        yield reader
        opentelemetry.uninstall()
        provider.shutdown()

    @staticmethod
    def read(reader: InMemoryMetricReader) -> dict[str, Any]:
        """Return what the reader finds: by name, a number or numbers by label."""
        data = reader.get_metrics_data()
        found: dict[str, Any] = {}
        for metric in (
            metric
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ):
            for point in metric.data.data_points:
                labels = dict(point.attributes)
                if labels:
                    (label,) = labels.values()
                    assert label not in found.setdefault(metric.name, {})
                    found[metric.name][label] = point.value
                else:
                    assert metric.name not in found
                    found[metric.name] = point.value
        return found

    def test_the_ledger(self, reader) -> None:
        """Each counter of the ledger is a metric, reasons are an attribute."""
        bad = b'{"accepted":1,"rejected":1,"errors":[{"index":1,"error":"bad"}]}'
        with Server() as server:
            server.script = [status(202, body=bad)]
            pgtrack.configure(project_id="shop", endpoint=server.url)
            pgtrack.emit("custom")
            pgtrack.emit("custom", user_id="not an id")
            pgtrack.emit("")
            pgtrack.flush(TIMEOUT)

        stats = pgtrack.stats()
        assert {
            "pgtrack.events.emitted": 3,
            "pgtrack.events.recovered": 0,
            "pgtrack.events.delivered": 1,
            "pgtrack.events.rejected": {"bad": 1},
            "pgtrack.events.dropped": {"invalid_event_type": 1},
            "pgtrack.events.spooled": 0,
            "pgtrack.events.pending": 0,
            "pgtrack.values.adjusted": {"user_id": 1},
            "pgtrack.batches": stats.batches,
            "pgtrack.retries": 0,
            "pgtrack.sent": stats.sent_bytes,
            "pgtrack.spool_errors": 0,
            "pgtrack.last_success": stats.last_success.timestamp(),
        } == self.read(reader)

    def test_kinds_and_units(self, reader) -> None:
        """Counters rise, levels do not; units are those of UCUM."""
        with capture():
            pgtrack.emit("")
            data = reader.get_metrics_data()

        metrics = data.resource_metrics[0].scope_metrics[0].metrics
        kinds = {
            m.name: (getattr(m.data, "is_monotonic", None), m.unit) for m in metrics
        }
        assert (True, "{event}") == kinds["pgtrack.events.emitted"]
        assert (False, "{event}") == kinds["pgtrack.events.pending"]
        assert (True, "By") == kinds["pgtrack.sent"]

    def test_after_uninstall_there_is_nothing(self, reader) -> None:
        """The instruments stay, and show nothing."""
        opentelemetry.uninstall()

        assert {} == self.read(reader)

    def test_a_disabled_client_has_zeros(self, reader) -> None:
        """Without a configuration the metrics are there, and none is counted up."""
        found = self.read(reader)

        assert 0 == found["pgtrack.events.emitted"]
        assert "pgtrack.last_success" not in found


class TestInstall:
    """On and off, once or often, before or after the provider is set."""

    def test_again_it_changes_nothing(self, traces) -> None:
        """A second install on the same provider adds no second processor."""
        opentelemetry.install(tracer_provider=traces.provider)

        processors = traces.provider._active_span_processor._span_processors
        assert 1 == sum(type(p).__name__ == "_Processor" for p in processors)

    def test_uninstall_undoes_it(self, traces) -> None:
        """Spans get nothing, events get no ids, and it may be installed again."""
        opentelemetry.uninstall()
        with capture() as events, pgtrack.session("s"), traces.span("off"):
            pgtrack.emit("custom")
        opentelemetry.install(tracer_provider=traces.provider)
        with pgtrack.session("s"), traces.span("on"):
            pass

        assert {"off": {}, "on": {"session.id": "s"}} == traces.marks
        assert {"source": "backend"} == events[0].metadata

    def test_not_installed_nobody_is_asked(self) -> None:
        """Without install there is no tracer for the core to ask."""
        assert _tracing.tracer is None

    def test_a_provider_that_takes_no_processor(self) -> None:
        """A provider that is not like the SDK's is refused, and nothing is on."""
        with pytest.raises(TypeError, match=r"add_span_processor.*NoOpTracerProvider"):
            opentelemetry.install(tracer_provider=trace.NoOpTracerProvider())

        assert _tracing.tracer is None

    def test_without_a_client_spans_are_marked(self, traces) -> None:
        """Correlation goes on where pgtrack is not configured."""
        assert not _api.default_client().is_enabled
        with pgtrack.session("s"), traces.span("work"):
            pass

        assert {"work": {"session.id": "s"}} == traces.marks

    def test_the_global_providers_may_come_later(self) -> None:
        """Providers that are set after install are followed, once."""
        done = run_script(
            """
            import pgtrack
            from opentelemetry import metrics, trace
            from opentelemetry.trace import set_tracer_provider
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import InMemoryMetricReader
            from opentelemetry.sdk.trace import TracerProvider
            from pgtrack.integrations import opentelemetry
            from pgtrack.testing import capture

            opentelemetry.install()
            opentelemetry.install()
            provider = TracerProvider()
            set_tracer_provider(provider)
            reader = InMemoryMetricReader()
            metrics.set_meter_provider(MeterProvider([reader]))
            opentelemetry.install()

            with pgtrack.session("sess_1"):
                with trace.get_tracer("t").start_as_current_span("work") as span:
                    print(dict(span.attributes))
            with capture():
                pgtrack.emit("custom")
                data = reader.get_metrics_data()
            (scope,) = data.resource_metrics[0].scope_metrics
            points = {m.name: m.data.data_points for m in scope.metrics}
            print(points["pgtrack.events.emitted"][0].value)
            opentelemetry.uninstall()
            print(hasattr(trace._set_tracer_provider, "__wrapped__"))
            """
        )

        assert "" == done.stderr
        assert "{'session.id': 'sess_1'}\n1\nFalse\n" == done.stdout

    def test_a_later_provider_that_takes_no_processor(self) -> None:
        """The host sets what it likes; the log says that spans are not followed."""
        done = run_script(
            """
            import logging
            import pgtrack
            from opentelemetry import trace
            from pgtrack.integrations import opentelemetry

            logging.basicConfig(format="%(message)s")
            opentelemetry.install(trace.get_tracer_provider())
            trace.set_tracer_provider(trace.NoOpTracerProvider())
            pgtrack.flush()
            """
        )

        assert 0 == done.returncode
        assert "cannot follow the spans" in done.stderr
        assert "NoOpTracerProvider" in done.stderr

    def test_an_error_of_ours_as_it_comes(self, monkeypatch) -> None:
        """The host's provider is set all the same."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(opentelemetry, "_watch", lambda _: 1 / 0)

        result = opentelemetry._on_set(lambda value: value, None, ("set",), {})

        assert "set" == result
        assert "ZeroDivisionError" in next(iter(_diagnostics._notes))

    @pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.sdk"])
    def test_a_missing_package_is_named(self, missing) -> None:
        """One error names the package and the extra."""
        done = run_script(
            f"""
            import sys
            sys.modules[{missing!r}] = None
            try:
                import pgtrack.integrations.opentelemetry
            except ImportError as error:
                print(type(error).__name__, error)
            """
        )

        assert done.stdout.startswith("MissingDependencyError")
        assert "pip install 'pgtrack[opentelemetry]'" in done.stdout


class TestItsOwnTrafficIsInvisible:
    """pgtrack's requests appear in nobody's traces, installed or not."""

    @pytest.fixture(name="traced")
    def _traced(self) -> Iterator[Traces]:
        """Trace httpx as OpenTelemetry does; our integration is not installed."""
        module = pytest.importorskip("opentelemetry.instrumentation.httpx")
        traces = Traces()
        instrumentor = module.HTTPXClientInstrumentor()
        instrumentor.instrument(
            tracer_provider=traces.provider,
            meter_provider=MeterProvider(shutdown_on_exit=False),
        )
        yield traces
        instrumentor.uninstrument()

    def test_deliveries_make_no_span(self, traced) -> None:
        """A traced httpx makes a span of the host's request, none of ours."""
        with Server() as server:
            pgtrack.configure(project_id="shop", endpoint=server.url)
            with pgtrack.session("sess_1"), traced.span("host"):
                pgtrack.emit("custom")
                assert pgtrack.flush(TIMEOUT)
            ours = len(traced.ended)
            httpx.post(server.url, json={"events": []}, trust_env=False)
            delivered, hosts = server.requests

        assert 1 == ours
        assert ["host", "POST"] == list(traced.ended)
        names = {name.lower() for name in delivered.headers}
        assert names.isdisjoint({"traceparent", "x-session-id", "x-request-id"})
        assert "traceparent" in {name.lower() for name in hosts.headers}

    def test_nor_where_the_caller_delivers(self, traced, monkeypatch) -> None:
        """A flush that delivers on the host's thread leaves its context as it was."""
        start = threading.Thread.start

        def no_thread(self: threading.Thread) -> None:
            if self.name == "pgtrack":
                raise RuntimeError("can't start new thread")
            start(self)

        with Server() as server:
            pgtrack.configure(project_id="shop", endpoint=server.url)
            with traced.span("host"):
                before = otel_context.get_current()
                with monkeypatch.context() as patch:
                    patch.setattr(threading.Thread, "start", no_thread)
                    pgtrack.emit("custom")
                    assert pgtrack.flush(TIMEOUT)
                assert before == otel_context.get_current()
            assert 1 == len(server.events)

        assert ["host"] == list(traced.ended)

    def test_retries_make_none(self, traced) -> None:
        """Attempts that fail are as invisible."""
        with Server() as server:
            server.script = [status(503)]
            pgtrack.configure(project_id="shop", endpoint=server.url)
            pgtrack.emit("custom")
            assert pgtrack.flush(TIMEOUT)

        assert {} == traced.ended

    def test_a_transport_of_the_users_is_covered(self, traced) -> None:
        """Whatever a transport uses, it runs under the same suppression."""
        seen: list[bool] = []

        class Own:
            def send(self, events: Sequence[bytes], timeout: float) -> Answer:
                from opentelemetry.instrumentation import utils

                seen.append(utils.is_instrumentation_enabled())
                seen.append(utils.is_http_instrumentation_enabled())
                return Answer(verdict=Verdict.TAKEN)

            def abort(self) -> None:
                pass

            def close(self) -> None:
                pass

        config = pgtrack.Config(project_id="shop", endpoint="https://example.com")
        with pgtrack.Client(config, transport=Own) as client:
            client.emit("custom")

        assert [False, False] == seen

    def test_httpx_logs_nothing(self, traced, caplog) -> None:
        """There is no line of httpx's on our requests."""
        caplog.set_level(logging.INFO)
        with Server() as server:
            pgtrack.configure(project_id="shop", endpoint=server.url)
            pgtrack.emit("custom")
            assert pgtrack.flush(TIMEOUT)

        assert [] == [r for r in caplog.records if r.name.startswith("http")]

    @pytest.mark.parametrize(
        "half", [types.ModuleType("opentelemetry.context"), types.SimpleNamespace()]
    )
    def test_half_an_opentelemetry_costs_nothing(self, monkeypatch, half) -> None:
        """While it is being imported, or where it is another, events go out."""
        with Server() as server:
            pgtrack.configure(project_id="shop", endpoint=server.url)
            monkeypatch.setitem(sys.modules, "opentelemetry.context", half)
            pgtrack.emit("custom")
            assert pgtrack.flush(TIMEOUT)
            assert 1 == len(server.events)

    def test_it_is_not_loaded_for_that(self) -> None:
        """A process without OpenTelemetry delivers without loading it."""
        with Server() as server:
            done = run_script(
                """
                import sys
                import pgtrack

                pgtrack.configure(project_id="shop", endpoint=sys.argv[1])
                pgtrack.emit("custom")
                print(pgtrack.flush(), "opentelemetry" in sys.modules)
                """,
                server.url,
            )

        assert "True False\n" == done.stdout
