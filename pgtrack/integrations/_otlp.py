"""
Events as OTLP log records, over HTTP.

Names are those of OpenTelemetry's semantic conventions 1.44.0 where they have one; all
else stands under `productgraph.`, so that nothing is claimed to be theirs that is not.
Answers are read as the OTLP specification 1.9.0 says, section OTLP/HTTP response.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from typing import TYPE_CHECKING, Any, Literal

from pgtrack._clock import SYSTEM_CLOCK
from pgtrack._config import Config
from pgtrack._diagnostics import note
from pgtrack._event import parse_time, time_to_ns
from pgtrack._retry import classify, short_reason
from pgtrack._transport import HttpTransport
from pgtrack.exceptions import ConfigError, InvalidEventError
from pgtrack.integrations._requirement import requirement
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

__all__ = ["OTLPTransport"]

_PATH = "/v1/logs"
_CONTENT_TYPE = "application/x-protobuf"

_RETRYABLE = frozenset({429, 502, 503, 504})
"""The statuses after which the same request may be made again."""

_HTTP = re.compile(r"https?://", re.IGNORECASE).match
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?").fullmatch


class OTLPTransport(HttpTransport):
    """
    Sends events as log records to an OTLP endpoint, such as a Collector.

    Each event is one record with the event name `productgraph.<event.type>`.  A client
    takes it as `Client(config, transport=lambda: OTLPTransport(...))`; that client's
    queue, retries, ledger and end are those of any other.

    Args:
        endpoint: The base URL; `/v1/logs` is added unless it is there.  `http://` only
            to this machine unless `allow_insecure=True`.

        headers: Sent with each request, such as an API key.

        resource: Attributes of what emits.  `service.name`, `service.version` and
            `deployment.environment.name` come from the settings `service`, `release`
            and `environment` where they are not given.

        compression: As in `pgtrack.Config`; so are those that follow.

        proxy: Instead of the environment's.

        ca_bundle: Instead of the usual certificates.

        client_cert: For mutual TLS.

        allow_insecure: Whether `http://` may leave this machine.

    Raises:
        ConfigError: If one of them is wrong.

        MissingDependencyError: If the package `opentelemetry-proto` is missing.
    """

    def __init__(
        self,
        endpoint: str = "http://localhost:4318",
        *,
        headers: Mapping[str, str] | None = None,
        resource: Mapping[str, Any] | None = None,
        compression: Literal["auto", "gzip", "none"] = "auto",
        proxy: str | None = None,
        ca_bundle: str | os.PathLike[str] | None = None,
        client_cert: str | tuple[str, ...] | None = None,
        allow_insecure: bool = False,
    ) -> None:
        # Not with the first batch, on the worker: a fork may come at that moment.
        with requirement("opentelemetry.proto", extra="opentelemetry"):
            import opentelemetry.proto.collector.logs.v1.logs_service_pb2  # noqa: F401, PLC0415
        config = Config.isolated(
            project_id="otlp",
            endpoint=_with_path(endpoint),
            compression=compression,
            proxy=proxy,
            ca_bundle=ca_bundle,
            client_cert=client_cert,
            allow_insecure=allow_insecure,
        )
        super().__init__(config)
        self._own_headers = _checked(headers or {})
        self._resource = dict(resource or {})

    def _headers(self) -> dict[str, str]:
        return {
            "Content-Type": _CONTENT_TYPE,
            "Accept": _CONTENT_TYPE,
            **self._own_headers,
        }

    def _secrets(self) -> Iterable[str]:
        return self._own_headers.values()

    def _body(self, events: Sequence[bytes]) -> bytes:
        from opentelemetry.proto.collector.logs.v1 import (  # noqa: PLC0415  see above
            logs_service_pb2,
        )
        from opentelemetry.proto.common.v1 import common_pb2  # noqa: PLC0415
        from opentelemetry.proto.logs.v1 import logs_pb2  # noqa: PLC0415
        from opentelemetry.proto.resource.v1 import resource_pb2  # noqa: PLC0415

        from pgtrack import __version__  # noqa: PLC0415  the package imports us

        now = SYSTEM_CLOCK.time_ns()
        records: dict[tuple[tuple[str, Any], ...], list[LogRecord]] = {}
        for data in events:
            wire = json.loads(data)
            resource = tuple(_resource_of(wire).items())
            records.setdefault(resource, []).append(_record_of(wire, now))
        scope = common_pb2.InstrumentationScope(name="pgtrack", version=__version__)
        request = logs_service_pb2.ExportLogsServiceRequest(
            resource_logs=[
                logs_pb2.ResourceLogs(
                    resource=resource_pb2.Resource(
                        attributes=_pairs({**dict(resource), **self._resource})
                    ),
                    scope_logs=[logs_pb2.ScopeLogs(scope=scope, log_records=group)],
                )
                for resource, group in records.items()
            ]
        )
        body: bytes = request.SerializeToString()
        return body

    def _answer(
        self, status: int, headers: Mapping[str, str], text: bytes, count: int
    ) -> Answer:
        number, message = _problem(status, headers, text)
        text = self._hide_secrets(message)
        answer = classify(status, headers, text, count, SYSTEM_CLOCK.time_ns() / 1e9)
        if answer.verdict is Verdict.TAKEN:
            # Which ones, it does not say; nothing of the batch may be sent again.
            reason = short_reason(text) or "unspecified"
            if text and not number:
                note("otlp", f"the OTLP endpoint took events, but says: {reason}.")
            rejected = dict.fromkeys(range(min(number, count)), reason)
            return Answer(verdict=Verdict.TAKEN, rejected=rejected)
        if answer.verdict is Verdict.RETRY and status not in _RETRYABLE:
            return Answer(verdict=Verdict.REJECTED, reason=answer.reason)
        return answer


def _with_path(endpoint: object) -> str:
    """Return where logs go: the base URL with its path, unless it is there already."""
    if not isinstance(endpoint, str) or not _HTTP(endpoint):
        kind = type(endpoint).__name__
        msg = (
            "the endpoint of OTLPTransport must be an https:// or http:// URL (got "
            f"{kind}). Use the base URL of the receiver: 'https://otlp.example.com'."
        )
        raise ConfigError(msg)
    url = urllib.parse.urlsplit(endpoint)
    path = url.path.rstrip("/")
    if not path.endswith(_PATH):
        path += _PATH
    return url._replace(path=path).geturl()


def _checked(headers: Mapping[Any, Any]) -> dict[str, str]:
    checked = {}
    for name, value in headers.items():
        fits = isinstance(name, str) and _HEADER_NAME(name) is not None
        if not fits or not isinstance(value, str) or _HEADER_VALUE(value) is None:
            msg = (
                "the headers of OTLPTransport must be names and values of visible "
                f"ASCII characters (got {type(name).__name__} and "
                f"{type(value).__name__} that are not)."
            )
            raise ConfigError(msg)
        checked[name] = value
    return checked


# --- an event as a record --------------------------------------------------------

_MAX_NAME = 256

_ALIKE = {
    "session.id": ("session.id",),
    "user.id": ("user.id",),
    "api.path": ("url.path",),
    "api.status_code": ("http.response.status_code",),
    "error.type": ("error.type", "exception.type"),
    "error.message": ("exception.message",),
    "error.stack": ("exception.stacktrace",),
    "page.url": ("url.full",),
}
"""What the conventions have a name for."""

_METHODS = (
    *("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS"),
    *("PATCH", "POST", "PUT", "QUERY", "TRACE"),
)
"""Those that the conventions know; any other is `_OTHER`."""

_OF_RECORD = ("event.type", "event.timestamp", "metadata", "api.method")

_OF_RESOURCE = {
    "service": "service.name",
    "release": "service.version",
    "environment": "deployment.environment.name",
}
"""Metadata that speak of the program."""


def _metadata_of(wire: dict[str, Any]) -> dict[str, Any]:
    metadata = wire.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _resource_of(wire: dict[str, Any]) -> dict[str, str]:
    metadata = _metadata_of(wire)
    return {
        name: metadata[key]
        for key, name in _OF_RESOURCE.items()
        if isinstance(metadata.get(key), str)
    }


def _record_of(wire: dict[str, Any], now: int) -> LogRecord:
    """Return the log record of an event that is observed *now*."""
    from opentelemetry.proto.logs.v1 import logs_pb2  # noqa: PLC0415  see above

    kind = wire.get("event.type")
    is_error = kind == "error"
    metadata = dict(_metadata_of(wire))
    trace_id, span_id, flags = _take_span(metadata)
    record = logs_pb2.LogRecord(
        time_unix_nano=_nanoseconds(wire.get("event.timestamp")),
        observed_time_unix_nano=now,
        severity_number=(
            logs_pb2.SEVERITY_NUMBER_ERROR
            if is_error
            else logs_pb2.SEVERITY_NUMBER_INFO
        ),
        severity_text="ERROR" if is_error else "INFO",
        trace_id=trace_id,
        span_id=span_id,
        flags=flags,
        attributes=_pairs(_attributes_of(wire, metadata)),
    )
    record.MergeFromString(_event_name(_clean(f"productgraph.{kind}")[:_MAX_NAME]))
    return record


def _event_name(name: str) -> bytes:
    """
    Return the field `event_name` as it is encoded: its number 12, length, UTF-8.

    The package knows it by name from 1.35 on; what it does not know it passes on.
    """
    text = name.encode()
    return bytes((12 << 3 | 2, len(text) & 0x7F | 0x80, len(text) >> 7)) + text


def _attributes_of(wire: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    method = wire.get("api.method")
    if method is not None:
        attributes["http.request.method"] = method if method in _METHODS else "_OTHER"
        if method not in (*_METHODS, "_OTHER"):
            attributes["http.request.method_original"] = method
    for key, value in wire.items():
        if value is not None and key not in _OF_RECORD:
            own = f"productgraph.{key.removeprefix('gen_ai.')}"
            attributes.update(dict.fromkeys(_ALIKE.get(key, (own,)), value))
    if "request_id" in metadata:
        attributes["productgraph.request.id"] = metadata.pop("request_id")
    for key, value in metadata.items():
        attributes[f"productgraph.metadata.{key}"] = value
    return attributes


_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}").fullmatch
_SPAN_ID = re.compile(r"(?!0{16})[0-9a-f]{16}").fullmatch
_FLAGS = re.compile(r"[0-9a-f]{2}").fullmatch


def _take_span(metadata: dict[str, Any]) -> tuple[bytes, bytes, int]:
    """Take the ids of the active span out of the metadata, where they are valid."""
    trace_id, span_id = str(metadata.get("trace_id")), str(metadata.get("span_id"))
    if _TRACE_ID(trace_id) is None or _SPAN_ID(span_id) is None:
        return b"", b"", 0
    del metadata["trace_id"], metadata["span_id"]
    flags = 0
    if _FLAGS(str(metadata.get("trace_flags"))) is not None:
        flags = int(metadata.pop("trace_flags"), 16)
    return bytes.fromhex(trace_id), bytes.fromhex(span_id), flags


_FRACTION = re.compile(r"[.,]\d{6}(\d{1,3})")


def _nanoseconds(timestamp: object) -> int:
    """Return the nanoseconds of a timestamp; 0, for unknown, if it is none."""
    try:
        moment = time_to_ns(parse_time(timestamp))
    except InvalidEventError:
        return 0
    beyond = _FRACTION.search(str(timestamp))  # of what a datetime can hold
    return max(moment + (int(beyond[1].ljust(3, "0")) if beyond else 0), 0)


def _pairs(values: Mapping[str, Any]) -> list[KeyValue]:
    from opentelemetry.proto.common.v1 import common_pb2  # noqa: PLC0415  see above

    return [
        common_pb2.KeyValue(key=_clean(key), value=_any(value))
        for key, value in values.items()
    ]


def _any(value: Any) -> AnyValue:
    """Return a JSON value as OTLP has it; null is the value that is empty."""
    from opentelemetry.proto.common.v1 import common_pb2 as pb  # noqa: PLC0415

    kind, carried = "string_value", value
    match value:
        case None:
            return pb.AnyValue()
        case bool():
            kind = "bool_value"
        case int() if -(2**63) <= value < 2**63:
            kind = "int_value"
        case float():
            kind = "double_value"
        case list() | tuple():
            kind, carried = "array_value", pb.ArrayValue(values=map(_any, value))
        case dict():
            kind, carried = "kvlist_value", pb.KeyValueList(values=_pairs(value))
        case _:
            carried = _clean(str(value))
    return pb.AnyValue(**{kind: carried})


def _clean(text: str) -> str:
    """Return *text* without lone surrogates, which UTF-8 cannot carry."""
    return text.encode("utf-8", "replace").decode()


# --- an answer -------------------------------------------------------------------


def _problem(status: int, headers: Mapping[str, str], text: bytes) -> tuple[int, bytes]:
    """
    Return how many records an answer rejects, and its message.

    A failure's body is a `google.rpc.Status`, whose code and message have the types and
    numbers of a partial success's count and message.
    """
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (  # noqa: PLC0415
        ExportLogsPartialSuccess,
        ExportLogsServiceResponse,
    )

    is_taken = 200 <= status < 300  # noqa: PLR2004
    if not headers.get("content-type", "").startswith(_CONTENT_TYPE):
        return 0, b"" if is_taken else text
    try:
        if not is_taken:
            message = ExportLogsPartialSuccess.FromString(text).error_message
            return 0, message.encode()
        problem = ExportLogsServiceResponse.FromString(text).partial_success
        return max(problem.rejected_log_records, 0), problem.error_message.encode()
    except Exception:  # noqa: BLE001  DecodeError, whose package has no types
        return 0, b""
