"""`OTLPTransport`: events as log records, to a real receiver on loopback."""

from __future__ import annotations

import calendar
import gzip
import inspect
import json
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("opentelemetry.proto")

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsPartialSuccess,
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)

import pgtrack
from harness import Server, load_vectors, run_script
from harness.productgraph import Reply
from pgtrack import _diagnostics
from pgtrack.integrations.opentelemetry import OTLPTransport
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness import Exchange

TIMEOUT = 10
TYPE = "application/x-protobuf"

NAMES = {
    "event_id": ["productgraph.event_id"],
    "project_id": ["productgraph.project_id"],
    "product_id": ["productgraph.product_id"],
    "session.id": ["session.id"],
    "event.name": ["productgraph.event.name"],
    "event.sequence": ["productgraph.event.sequence"],
    "user.id": ["user.id"],
    "user.anonymous_id": ["productgraph.user.anonymous_id"],
    "org.id": ["productgraph.org.id"],
    "org.name": ["productgraph.org.name"],
    "page.path": ["productgraph.page.path"],
    "page.title": ["productgraph.page.title"],
    "page.url": ["url.full"],
    "page.referrer": ["productgraph.page.referrer"],
    "ui.component.name": ["productgraph.ui.component.name"],
    "ui.component.path": ["productgraph.ui.component.path"],
    "ui.component.type": ["productgraph.ui.component.type"],
    "ui.action": ["productgraph.ui.action"],
    "ui.element": ["productgraph.ui.element"],
    "ui.element.text": ["productgraph.ui.element.text"],
    "ui.viewport": ["productgraph.ui.viewport"],
    "ui.scroll.position": ["productgraph.ui.scroll.position"],
    "ui.state.key": ["productgraph.ui.state.key"],
    "ui.state.before": ["productgraph.ui.state.before"],
    "ui.state.after": ["productgraph.ui.state.after"],
    "ui.state.change_type": ["productgraph.ui.state.change_type"],
    "gen_ai.journey.id": ["productgraph.journey.id"],
    "gen_ai.journey.step.id": ["productgraph.journey.step.id"],
    "gen_ai.journey.step.name": ["productgraph.journey.step.name"],
    "gen_ai.journey.conversion.status": ["productgraph.journey.conversion.status"],
    "api.method": ["http.request.method"],
    "api.path": ["url.path"],
    "api.status_code": ["http.response.status_code"],
    "api.duration_ms": ["productgraph.api.duration_ms"],
    "duration_ms": ["productgraph.duration_ms"],
    "error.type": ["error.type", "exception.type"],
    "error.message": ["exception.message"],
    "error.stack": ["exception.stacktrace"],
    "error.component": ["productgraph.error.component"],
    "performance.lcp_ms": ["productgraph.performance.lcp_ms"],
    "performance.fid_ms": ["productgraph.performance.fid_ms"],
    "performance.cls": ["productgraph.performance.cls"],
    "performance.ttfb_ms": ["productgraph.performance.ttfb_ms"],
    "snapshot.url": ["productgraph.snapshot.url"],
    "snapshot.viewport": ["productgraph.snapshot.viewport"],
}
"""What each field is called as an attribute; written down, not derived."""

EVENT = {
    "event_id": "e1",
    "project_id": "shop",
    "session.id": "sess_1",
    "event.type": "custom",
    "event.timestamp": "2026-03-02T08:15:00.612345Z",
}


class Receiver:
    """An OTLP receiver: decodes by the official protobuf, and answers as told."""

    def __init__(self) -> None:
        self.server = Server()
        self.server.default = self._receive
        self.exchanges: list[Exchange] = []
        self.requests: list[ExportLogsServiceRequest] = []
        self.replies: list[Reply] = []
        host, port = self.server.address
        self.url = f"http://{host}:{port}"

    def reply(
        self, status: int, message: Any = None, kind: str = TYPE, **headers: str
    ) -> None:
        """Answer a coming request by *status*, and by *message* as the body."""
        if not isinstance(message, bytes):
            message = b"" if message is None else message.SerializeToString()
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        self.replies.append(Reply(status, {"Content-Type": kind, **headers}, message))

    def _receive(self, exchange: Exchange) -> Reply:
        body = exchange.body
        if exchange.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.exchanges.append(exchange)
        self.requests.append(ExportLogsServiceRequest.FromString(body))
        if self.replies:
            return self.replies.pop(0)
        answer = ExportLogsServiceResponse().SerializeToString()
        return Reply(200, {"Content-Type": TYPE}, answer)

    @property
    def records(self) -> list[Any]:
        """The log records of all requests."""
        return [
            record
            for request in self.requests
            for resource in request.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]


@pytest.fixture(name="receiver")
def _receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with receiver.server:
        yield receiver


@pytest.fixture(name="transport")
def _transport(receiver: Receiver) -> Iterator[OTLPTransport]:
    transport = OTLPTransport(receiver.url)
    yield transport
    transport.close()


def name_of(record: Any) -> str:
    """Return the event name, which older packages have no name for."""
    if hasattr(record, "event_name"):
        return str(record.event_name)
    data = record.SerializeToString()
    match = re.search(rb"\x62(.)(.)productgraph\.", data, re.DOTALL)
    assert match is not None
    length = ord(match[1]) - 0x80 + ord(match[2]) * 0x80
    return str(data[match.end(2) : match.end(2) + length].decode())


def plain(value: Any) -> Any:
    """Return an AnyValue as a Python value."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return plain_pairs(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


def plain_pairs(pairs: Any) -> dict[str, Any]:
    """Return key and values as a dictionary; none may come twice."""
    found = {pair.key: plain(pair.value) for pair in pairs}
    assert len(found) == len(pairs)
    return found


def expected_attributes(event: dict[str, Any]) -> dict[str, Any]:
    """Return what the attributes of an event's record are to be."""
    expected = {
        name: value
        for key, value in event.items()
        if key not in ("event.type", "event.timestamp", "metadata")
        if value is not None
        for name in NAMES.get(key, [f"productgraph.{key}"])
    }
    for key, value in (event.get("metadata") or {}).items():
        name = f"productgraph.metadata.{key}"
        expected["productgraph.request.id" if key == "request_id" else name] = value
    return expected


def nanoseconds(timestamp: str | None) -> int:
    """Return a timestamp as digits, without any floating point; 0 for none."""
    if not timestamp:
        return 0
    match = re.fullmatch(r"(.{19})(?:[.,](\d+))?(?:Z|([+-])(\d\d):(\d\d))", timestamp)
    assert match is not None
    text, fraction, sign, hours, minutes = match.groups()
    seconds = calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    if sign is not None:
        offset = int(hours) * 3600 + int(minutes) * 60
        seconds -= offset if sign == "+" else -offset
    return seconds * 10**9 + int((fraction or "").ljust(9, "0")[:9])


def encoded(*events: dict[str, Any]) -> list[bytes]:
    """Return events as a transport gets them."""
    return [json.dumps(event).encode() for event in events]


VECTORS = load_vectors("events_valid")["cases"]


class TestRecords:
    """An event is a log record, field by field."""

    @pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
    def test_every_documented_event(self, receiver, transport, case) -> None:
        """Each of the 15 types, minimal and full, and each edge case arrives whole."""
        event = case["event"]
        before = time.time_ns()

        answer = transport.send(encoded(event), TIMEOUT)

        (record,) = receiver.records
        is_error = event["event.type"] == "error"
        assert Verdict.TAKEN is answer.verdict
        assert f"productgraph.{event['event.type']}" == name_of(record)
        assert nanoseconds(event.get("event.timestamp")) == record.time_unix_nano
        assert before <= record.observed_time_unix_nano <= time.time_ns()
        assert ((17, "ERROR") if is_error else (9, "INFO")) == (
            record.severity_number,
            record.severity_text,
        )
        assert expected_attributes(event) == plain_pairs(record.attributes)
        assert not record.HasField("body")
        assert (b"", b"", 0) == (record.trace_id, record.span_id, record.flags)

    def test_every_field_has_its_name(self) -> None:
        """The table of this test has all fields of an event."""
        fields = {field.key for field in pgtrack._event.FIELDS.values()}

        assert {*fields, "event.type"} == {*NAMES, "event.type"}

    def test_the_span(self, receiver, transport) -> None:
        """The ids of the span are the record's own, and no attributes."""
        metadata = {
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
            "span_id": "b7ad6b7169203331",
            "trace_flags": "01",
            "request_id": "req_1",
        }

        transport.send(encoded({**EVENT, "metadata": metadata}), TIMEOUT)

        (record,) = receiver.records
        attributes = plain_pairs(record.attributes)
        assert metadata["trace_id"] == record.trace_id.hex()
        assert metadata["span_id"] == record.span_id.hex()
        assert 1 == record.flags
        assert "req_1" == attributes["productgraph.request.id"]
        assert not [name for name in attributes if "metadata" in name]

    @pytest.mark.parametrize(
        "metadata",
        [
            {"trace_id": "0" * 32, "span_id": "b7ad6b7169203331"},
            {"trace_id": "0AF7651916CD43DD8448EB211C80319C", "span_id": "1" * 16},
            {"trace_id": "1" * 32, "span_id": "0" * 16},
            {"trace_id": "1" * 32},
            {"trace_id": 17, "span_id": ["x"], "trace_flags": "01"},
        ],
    )
    def test_what_are_no_ids_of_a_span_is_kept(
        self, receiver, transport, metadata
    ) -> None:
        """Metadata that happen to have such names are attributes as any."""
        transport.send(encoded({**EVENT, "metadata": metadata}), TIMEOUT)

        (record,) = receiver.records
        attributes = plain_pairs(record.attributes)
        assert (b"", b"", 0) == (record.trace_id, record.span_id, record.flags)
        assert metadata == {
            key.removeprefix("productgraph.metadata."): value
            for key, value in attributes.items()
            if "metadata" in key
        }

    def test_flags_that_are_none(self, receiver, transport) -> None:
        """Without flags in two digits of hex they are 0."""
        span = {"trace_id": "1" * 32, "span_id": "2" * 16}

        transport.send(
            encoded(
                {**EVENT, "metadata": span},
                {**EVENT, "metadata": {**span, "trace_flags": "sampled"}},
            ),
            TIMEOUT,
        )

        assert [0, 0] == [record.flags for record in receiver.records]

    @pytest.mark.parametrize(
        ("method", "known", "original"),
        [
            ("POST", "POST", None),
            ("QUERY", "QUERY", None),
            ("_OTHER", "_OTHER", None),
            ("BREW", "_OTHER", "BREW"),
            ("get", "_OTHER", "get"),
        ],
    )
    def test_methods(self, receiver, transport, method, known, original) -> None:
        """A method that the conventions do not know is `_OTHER`, and said beside."""
        transport.send(encoded({**EVENT, "api.method": method}), TIMEOUT)

        attributes = plain_pairs(receiver.records[0].attributes)
        assert known == attributes["http.request.method"]
        assert original == attributes.get("http.request.method_original")

    def test_every_kind_of_value(self, receiver, transport) -> None:
        """Metadata of any shape arrive as they were; what is too large as text."""
        metadata = {
            "null": None,
            "yes": True,
            "integer": -(2**63),
            "huge": 2**63,
            "float": 0.5,
            "list": [1, [], {"deep": [None]}],
            "object": {"a": {"b": False}},
            "text": "ünïcode \U0001f600",
        }

        transport.send(encoded({**EVENT, "metadata": metadata}), TIMEOUT)

        attributes = plain_pairs(receiver.records[0].attributes)
        assert {**metadata, "huge": str(2**63)} == {
            key: attributes[f"productgraph.metadata.{key}"] for key in metadata
        }
        assert isinstance(attributes["productgraph.metadata.yes"], bool)

    @pytest.mark.parametrize(
        ("text", "digits"),
        [
            ("2026-03-02T08:15:00.123456789Z", 123_456_789),
            ("2026-03-02T08:15:00.1234567Z", 123_456_700),
            ("2026-03-02T08:15:00,000001Z", 1_000),
            ("2026-03-02T08:15:00Z", 0),
        ],
    )
    def test_the_time_is_exact(self, receiver, transport, text, digits) -> None:
        """All digits of the timestamp count, down to a nanosecond."""
        transport.send(encoded({**EVENT, "event.timestamp": text}), TIMEOUT)

        assert digits == receiver.records[0].time_unix_nano % 10**9

    @pytest.mark.parametrize(
        "odd",
        [
            {"event.timestamp": "yesterday"},
            {"event.timestamp": None},
            {"event.timestamp": "1969-12-31T23:59:59Z"},
        ],
    )
    def test_a_time_that_cannot_be_told(self, receiver, transport, odd) -> None:
        """It is 0, which stands for unknown."""
        transport.send(encoded({**EVENT, **odd}), TIMEOUT)

        assert 0 == receiver.records[0].time_unix_nano

    def test_odd_events_arrive_all_the_same(self, receiver, transport) -> None:
        """Whatever JSON a hook made of an event, it costs neither it nor the batch."""
        odd = {
            **EVENT,
            "event.type": "x" * 300,
            "metadata": "text",
            "new.key": "\ud800",
            "user.id": None,
        }

        answer = transport.send(encoded(odd, EVENT), TIMEOUT)

        record, _ = receiver.records
        attributes = plain_pairs(record.attributes)
        assert Verdict.TAKEN is answer.verdict
        assert 256 == len(name_of(record))
        assert "?" == attributes["productgraph.new.key"]
        assert "user.id" not in attributes

    def test_order_is_kept(self, receiver, transport) -> None:
        """Records of a batch are in the order of its events."""
        events = [{**EVENT, "event_id": f"e{i}"} for i in range(100)]

        transport.send(encoded(*events), TIMEOUT)

        ids = [
            plain_pairs(record.attributes)["productgraph.event_id"]
            for record in receiver.records
        ]
        assert [event["event_id"] for event in events] == ids


class TestTheOfficialExporter:
    """What OpenTelemetry's own exporter sends for the same is the same."""

    def test_an_equal_record(self, receiver, transport) -> None:
        """Field by field, apart from the time of observation."""
        exporters = pytest.importorskip(
            "opentelemetry.exporter.otlp.proto.http._log_exporter"
        )
        logs = pytest.importorskip("opentelemetry._logs")
        if "event_name" not in inspect.signature(logs.LogRecord).parameters:
            pytest.skip("this version has no event names")
        sdk = pytest.importorskip("opentelemetry.sdk._logs")
        export = pytest.importorskip("opentelemetry.sdk._logs.export")
        trace = pytest.importorskip("opentelemetry.trace")
        span = trace.SpanContext(0xABC, 0xDEF, False, trace.TraceFlags(1))
        metadata = {
            "trace_id": f"{0xABC:032x}",
            "span_id": f"{0xDEF:016x}",
            "trace_flags": "01",
            "nested": {"list": [1, 2.5, "x", True]},
        }
        event = {
            **EVENT,
            "api.method": "GET",
            "api.status_code": 200,
            "metadata": metadata,
        }
        provider = sdk.LoggerProvider(shutdown_on_exit=False)
        exporter = exporters.OTLPLogExporter(endpoint=f"{receiver.url}/v1/logs")
        provider.add_log_record_processor(export.SimpleLogRecordProcessor(exporter))
        provider.get_logger("pgtrack", pgtrack.__version__).emit(
            logs.LogRecord(
                timestamp=nanoseconds(event["event.timestamp"]),
                context=trace.set_span_in_context(trace.NonRecordingSpan(span)),
                severity_number=logs.SeverityNumber.INFO,
                severity_text="INFO",
                attributes={
                    "productgraph.event_id": "e1",
                    "productgraph.project_id": "shop",
                    "session.id": "sess_1",
                    "http.request.method": "GET",
                    "http.response.status_code": 200,
                    "productgraph.metadata.nested": metadata["nested"],
                },
                event_name="productgraph.custom",
            )
        )
        provider.shutdown()

        transport.send(encoded(event), TIMEOUT)

        theirs, ours = receiver.requests
        for request in (theirs, ours):
            (resource,) = request.resource_logs
            resource.ClearField("resource")  # the SDK's is about the SDK
            (scope,) = resource.scope_logs
            (record,) = scope.log_records
            record.ClearField("observed_time_unix_nano")
            record.ClearField("body")  # an empty one is none
            pairs = sorted(record.attributes, key=lambda pair: pair.key)
            del record.attributes[:]
            record.attributes.extend(pairs)
        assert theirs == ours
        theirs_exchange, ours_exchange = receiver.exchanges
        assert theirs_exchange.path == ours_exchange.path
        assert (
            theirs_exchange.headers["content-type"]
            == ours_exchange.headers["content-type"]
        )


class TestResource:
    """What emits is described once a batch."""

    def test_it_comes_from_the_settings(self, receiver) -> None:
        """Service, release and environment of the client are the resource's."""
        config = pgtrack.Config(
            project_id="shop",
            endpoint=receiver.url,
            service="billing",
            release="1.2",
            environment="test",
        )
        with pgtrack.Client(config, transport=lambda: OTLPTransport(receiver.url)) as c:
            c.emit("custom")
            c.emit("custom")

        (request,) = receiver.requests
        (resource,) = request.resource_logs
        (scope,) = resource.scope_logs
        assert {
            "service.name": "billing",
            "service.version": "1.2",
            "deployment.environment.name": "test",
        } == plain_pairs(resource.resource.attributes)
        assert ("pgtrack", pgtrack.__version__) == (
            scope.scope.name,
            scope.scope.version,
        )
        assert 2 == len(scope.log_records)

    def test_what_is_given_wins(self, receiver) -> None:
        """Attributes of the resource may be of any JSON type, and replace others."""
        resource = {"service.name": "mine", "process.pid": 7, "tags": ("a", "b")}
        transport = OTLPTransport(receiver.url, resource=resource)
        event = {**EVENT, "metadata": {"service": "theirs", "release": 5}}

        transport.send(encoded(event), TIMEOUT)
        transport.close()

        (got,) = receiver.requests[0].resource_logs
        assert {**resource, "tags": ["a", "b"]} == plain_pairs(got.resource.attributes)

    def test_events_of_several_services_have_their_own(
        self, receiver, transport
    ) -> None:
        """What before_send made another service's is under that."""
        events = [{**EVENT, "metadata": {"service": s}} for s in ("a", "b", "a")]

        transport.send(encoded(*events), TIMEOUT)

        counts = {
            plain_pairs(r.resource.attributes)["service.name"]: len(
                r.scope_logs[0].log_records
            )
            for r in receiver.requests[0].resource_logs
        }
        assert {"a": 2, "b": 1} == counts


class TestRequest:
    """What goes over the wire around the records."""

    def test_path_and_headers(self, receiver) -> None:
        """It is a POST of protobuf to /v1/logs, with the headers that were given."""
        transport = OTLPTransport(f"{receiver.url}/otlp/", headers={"api-key": "k 1"})
        transport.send(encoded(EVENT), TIMEOUT)
        transport.close()

        (exchange,) = receiver.exchanges
        assert ("POST", "/otlp/v1/logs") == (exchange.method, exchange.path)
        assert (TYPE, "k 1") == (
            exchange.headers["content-type"],
            exchange.headers["api-key"],
        )
        assert exchange.headers["user-agent"].startswith("pgtrack/")
        assert "content-encoding" not in exchange.headers

    @pytest.mark.parametrize(
        ("endpoint", "url"),
        [
            ("http://localhost:4318", "http://localhost:4318/v1/logs"),
            ("https://a.example/", "https://a.example/v1/logs"),
            ("https://a.example/x/v1/logs", "https://a.example/x/v1/logs"),
            ("HTTPS://a.example?k=v", "https://a.example/v1/logs?k=v"),
        ],
    )
    def test_the_path_is_added_once(self, endpoint, url) -> None:
        """The endpoint is the base URL, but a whole one is understood."""
        assert url == OTLPTransport(endpoint)._config.endpoint

    def test_the_default_is_a_collector_on_this_machine(self) -> None:
        """Without an endpoint it is OTLP's own port on this machine."""
        assert "http://localhost:4318/v1/logs" == OTLPTransport()._config.endpoint

    def test_large_bodies_are_packed(self, receiver, transport) -> None:
        """From 8 KiB on the body is gzip; what counts as sent is what went out."""
        events = [{**EVENT, "metadata": {"text": "x" * 1000}}] * 20

        answer = transport.send(encoded(*events), TIMEOUT)

        (exchange,) = receiver.exchanges
        assert "gzip" == exchange.headers["content-encoding"]
        assert len(exchange.body) == answer.sent_bytes < 2_000
        assert 20 == len(receiver.records)

    def test_packing_may_be_chosen(self, receiver) -> None:
        """`compression` is that of a client."""
        for compression in ("gzip", "none"):
            transport = OTLPTransport(receiver.url, compression=compression)
            transport.send(encoded({**EVENT, "event.name": "x" * 9_000}), TIMEOUT)
            transport.close()

        packed = [e.headers.get("content-encoding") for e in receiver.exchanges]
        assert ["gzip", None] == packed

    def test_the_connection_is_kept(self, receiver, transport) -> None:
        """Batches go over one connection."""
        for _ in range(3):
            transport.send(encoded(EVENT), TIMEOUT)

        assert 1 == receiver.server.connections

    def test_the_deadline_is_of_the_whole(self, receiver, transport) -> None:
        """A receiver that hangs is given up in time."""
        release = threading.Event()

        def hang(exchange: Exchange) -> Reply:
            exchange.wait(release)
            return Reply(200, {}, b"")

        receiver.server.script = [hang]
        start = time.monotonic()

        answer = transport.send(encoded(EVENT), 0.2)

        took = time.monotonic() - start
        release.set()
        assert Verdict.RETRY is answer.verdict
        assert took < 2

    @pytest.mark.parametrize(
        ("options", "rule"),
        [
            ({"endpoint": "file:/tmp/x"}, "https:// or http:// URL"),
            ({"endpoint": 4318}, "got int"),
            ({"endpoint": "http://otel.example.com:4318"}, "https:// URL"),
            ({"endpoint": "https://u:p@a.example"}, "user and password"),
            ({"headers": {"a b": "x"}}, "visible ASCII"),
            ({"headers": {"a": "x\r\ny: z"}}, "visible ASCII"),
            ({"headers": {"a": 1}}, "str and int"),
            ({"compression": "zstd"}, "compression"),
        ],
    )
    def test_a_wrong_setting_is_told_at_once(self, options, rule) -> None:
        """A ConfigError says what is wrong, and does not quote it."""
        with pytest.raises(pgtrack.ConfigError) as caught:
            OTLPTransport(**options)

        assert rule in str(caught.value)
        assert "x\r\ny" not in str(caught.value)

    def test_a_collector_next_door_may_be_allowed(self) -> None:
        """Plain HTTP to another host needs a word."""
        transport = OTLPTransport("http://otel:4318", allow_insecure=True)

        assert "http://otel:4318/v1/logs" == transport._config.endpoint

    def test_a_missing_package_is_named(self) -> None:
        """One error names the package and the extra; the rest works without it."""
        done = run_script(
            """
            import sys
            sys.modules["opentelemetry.proto"] = None
            from pgtrack.integrations import opentelemetry
            opentelemetry.install()
            try:
                opentelemetry.OTLPTransport()
            except ImportError as error:
                print(type(error).__name__, error)
            """,
            env={"OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider"},
        )

        assert done.stdout.startswith("MissingDependencyError"), done.stderr
        assert "pip install 'pgtrack[opentelemetry]'" in done.stdout


def partial(rejected: int, message: str) -> ExportLogsServiceResponse:
    """Return the answer that some records are rejected."""
    return ExportLogsServiceResponse(
        partial_success=ExportLogsPartialSuccess(
            rejected_log_records=rejected, error_message=message
        )
    )


class TestAnswers:
    """What each answer makes of a batch."""

    def send(self, transport: OTLPTransport, count: int = 3) -> Answer:
        """Send *count* events."""
        return transport.send(encoded(*[EVENT] * count), TIMEOUT)

    @pytest.mark.parametrize(
        ("rejected", "message", "expected"),
        [
            (2, "too old", {0: "too old", 1: "too old"}),
            (2, "", {0: "unspecified", 1: "unspecified"}),
            (7, "all", {0: "all", 1: "all", 2: "all"}),
            (-1, "odd", {}),
            (0, "", {}),
        ],
    )
    def test_a_partial_success(
        self, receiver, transport, rejected, message, expected
    ) -> None:
        """As many are rejected as it says, with its words; none is sent again."""
        receiver.reply(200, partial(rejected, message))

        answer = self.send(transport)

        assert (Verdict.TAKEN, expected) == (answer.verdict, answer.rejected)

    def test_a_warning_is_told(self, receiver, transport) -> None:
        """A message without rejections goes to the log."""
        receiver.reply(200, partial(0, "please use a newer schema"))

        answer = self.send(transport)

        assert (Verdict.TAKEN, {}) == (answer.verdict, answer.rejected)
        assert "please use a newer schema" in _diagnostics._notes["otlp"][1]

    @pytest.mark.parametrize(
        ("status", "kind", "body"),
        [
            (200, TYPE, b"\xff\xff"),
            (200, "application/json", b'{"partialSuccess":{}}'),
            (204, "", b""),
        ],
    )
    def test_a_success_that_cannot_be_read(
        self, receiver, transport, status, kind, body
    ) -> None:
        """It is a success, and nothing is told."""
        receiver.reply(status, body, kind)

        answer = self.send(transport)

        assert (Verdict.TAKEN, {}) == (answer.verdict, answer.rejected)
        assert {} == _diagnostics._notes

    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_what_is_to_be_sent_again(self, receiver, transport, status) -> None:
        """These are, after as long as the receiver wishes."""
        receiver.reply(status, Retry_After="7")

        answer = self.send(transport)

        assert (Verdict.RETRY, 7.0) == (answer.verdict, answer.retry_after)

    @pytest.mark.parametrize(
        ("status", "verdict"),
        [
            (400, Verdict.REFUSED),
            (401, Verdict.HOLD),
            (403, Verdict.HOLD),
            (404, Verdict.HOLD),
            (301, Verdict.HOLD),
            (408, Verdict.REJECTED),
            (413, Verdict.TOO_LARGE),
            (500, Verdict.REJECTED),
            (501, Verdict.REJECTED),
        ],
    )
    def test_what_is_not(self, receiver, transport, status, verdict) -> None:
        """What must not be sent again is not; a wrong key or address is probed."""
        receiver.reply(status)

        assert verdict is self.send(transport).verdict

    def test_a_page_for_people_is_no_receiver(self, receiver, transport) -> None:
        """A success with a web page is that of another server."""
        receiver.reply(200, b"<html>", "text/html")

        assert Verdict.HOLD is self.send(transport).verdict

    def test_the_words_of_a_failure_are_kept(self, receiver, transport) -> None:
        """The message of a google.rpc.Status is the reason, without keys in it."""
        status_message = b"\x08\x03\x12\x14no such tenant: k-77"  # code 3, message
        receiver.reply(401, status_message)
        receiver.reply(401, b"plain words", "text/plain")
        keyed = OTLPTransport(receiver.url, headers={"api-key": "k-77"})

        answers = [self.send(keyed), self.send(keyed)]
        keyed.close()

        assert ["401 no such tenant: ***", "401 plain words"] == [
            answer.reason for answer in answers
        ]

    def test_nobody_there(self) -> None:
        """Without a receiver the batch is to be sent again."""
        with Server() as server:
            host, port = server.address
        transport = OTLPTransport(f"http://{host}:{port}")

        assert Verdict.RETRY is self.send(transport).verdict


class TestClient:
    """A client with this transport is a client as any."""

    @pytest.fixture(name="client")
    def _client(self, receiver: Receiver) -> Iterator[pgtrack.Client]:
        config = pgtrack.Config(project_id="shop", endpoint=receiver.url)
        client = pgtrack.Client(config, transport=lambda: OTLPTransport(receiver.url))
        with client:
            yield client

    def test_events_arrive(self, receiver, client) -> None:
        """What decorators and blocks tell arrives as records."""
        call = pgtrack.api_call("POST", "/pay", client=client)
        with pgtrack.session("sess_1", user_id="u_1"), call as run:
            run.status_code = 402
        assert client.flush(TIMEOUT)

        (record,) = receiver.records
        attributes = plain_pairs(record.attributes)
        assert "productgraph.api.response" == name_of(record)
        assert ("sess_1", "u_1", 402) == (
            attributes["session.id"],
            attributes["user.id"],
            attributes["http.response.status_code"],
        )

    def test_the_ledger_stays_true(self, receiver, client) -> None:
        """Rejections, failures for good, and retries are all counted."""
        receiver.reply(200, partial(1, "too old"))
        client.emit("custom")
        client.emit("custom")
        assert client.flush(TIMEOUT)
        receiver.reply(500, b"", "text/plain")
        client.emit("custom")
        assert client.flush(TIMEOUT)
        receiver.reply(503)
        client.emit("custom")
        assert client.flush(TIMEOUT)

        stats = client.stats()
        assert stats.is_balanced
        assert ({"too old": 1, "500": 1}, 2, 1) == (
            stats.rejected,
            stats.delivered,
            stats.retries,
        )
        assert (0, {}) == (stats.pending, stats.dropped)

    def test_its_requests_make_no_spans(self, receiver, client) -> None:
        """They are as invisible as those to ProductGraph."""
        module = pytest.importorskip("opentelemetry.instrumentation.httpx")
        sdk = pytest.importorskip("opentelemetry.sdk.trace")
        memory = pytest.importorskip(
            "opentelemetry.sdk.trace.export.in_memory_span_exporter"
        )
        export = pytest.importorskip("opentelemetry.sdk.trace.export")
        exporter = memory.InMemorySpanExporter()
        provider = sdk.TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(export.SimpleSpanProcessor(exporter))
        instrumentor = module.HTTPXClientInstrumentor()
        instrumentor.instrument(tracer_provider=provider)
        try:
            client.emit("custom")
            assert client.flush(TIMEOUT)
        finally:
            instrumentor.uninstrument()

        assert 1 == len(receiver.records)
        assert () == exporter.get_finished_spans()

    def test_a_forked_child_has_a_connection_of_its_own(self, receiver, client) -> None:
        """Parent and child deliver their own events, over two connections."""
        from harness import in_fork

        client.emit("custom", name="parent")
        assert client.flush(TIMEOUT)

        def child() -> bool:
            client.emit("custom", name="child")
            return client.flush(TIMEOUT)

        assert in_fork(child)
        client.emit("custom", name="again")
        assert client.flush(TIMEOUT)

        names = [
            plain_pairs(record.attributes)["productgraph.event.name"]
            for record in receiver.records
        ]
        assert ["parent", "child", "again"] == names
