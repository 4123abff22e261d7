"""
Answer requests as ProductGraph v0.1.0, v0.2.0 and v0.3.0 do, without any I/O.

The server is written in Go, and its decoder's habits reach the wire: one value of a
wrong type costs the entire batch, keys match in any case, a null event closes the
connection. What is here follows the published sources and vectors
(`tests/vectors/requests.json`, `events_valid.json`, `events_invalid.json`).

By default it is stricter than ProductGraph is today, since a client must also get
along with a strict JSON parser, with a `jsonb` column, and with the documented limits;
each of these can be switched off. Cross-origin preflights and the receive time of
events without a timestamp are left out.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# The name by which each version knows the product; to the others it is unknown.
_PRODUCT_KEYS = {
    "v0.1.0": "project_id",
    "v0.2.0": "project_id",
    "v0.3.0": "product_id",
}

VERSIONS = tuple(_PRODUCT_KEYS)

_MAX_EVENTS = 1000

# How far a compressed body may grow where `max_body` sets no limit.
_MAX_INFLATED = 64 * 1024 * 1024


@dataclass(frozen=True)
class Reply:
    """
    Hold an answer: status, headers, body. Content-Length is added on sending.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Element(NamedTuple):
    """
    Pair a member of the `events` list with its size on the wire in bytes.
    """

    value: Any
    size: int


@dataclass(frozen=True)
class Request:
    """
    Keep a request as it came, header names in lower case.

    *batch* is the content of the `events` list, or the reply that refuses the body.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    batch: list[Element] | Reply = field(repr=False)

    @cached_property
    def events(self) -> list[dict[str, Any]] | None:
        """
        The events sent, valid or not; None when the body is no list of JSON objects.
        """
        if isinstance(self.batch, Reply):
            return None

        values = [element.value for element in self.batch]
        if not all(isinstance(value, dict) for value in values):
            return None

        return [dict(value) for value in values]


def _plain_text(status: int, text: str, **headers: str) -> Reply:
    return Reply(
        status,
        {
            "Content-Type": "text/plain; charset=utf-8",
            "X-Content-Type-Options": "nosniff",
            **headers,
        },
        f"{text}\n".encode(),
    )


def _json(status: int, value: Any) -> Reply:
    text = json.dumps(value, separators=(",", ":"))
    return Reply(status, {"Content-Type": "application/json"}, f"{text}\n".encode())


INVALID_BODY = _plain_text(400, "invalid request body")
_BATCH_TOO_LARGE = _plain_text(400, "batch too large")
_EVENT_TOO_LARGE = _plain_text(400, "event too large")
_BODY_TOO_LARGE = _plain_text(413, "request body too large")
_STORAGE_DOWN = _plain_text(500, "failed to process events")
_NOT_FOUND = _plain_text(404, "404 page not found")

_PROBES = {
    "/health": _json(200, {"status": "ok"}),
    "/ready": _json(200, {"status": "ready"}),
}


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    # A bool is an int in Python. Literals such as 150.0 and 1e3 arrive as floats.
    return type(value) is int and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        [
            "event_id",
            "session.id",
            "event.type",
            "event.timestamp",
            "event.name",
            "user.id",
            "org.id",
            "page.path",
            "page.title",
            "page.url",
            "page.referrer",
            "ui.component.name",
            "ui.component.path",
            "ui.component.type",
            "ui.action",
            "ui.element",
            "ui.element.text",
            "ui.viewport",
            "ui.state.key",
            "ui.state.before",
            "ui.state.after",
            "ui.state.change_type",
            "gen_ai.journey.id",
            "gen_ai.journey.step.id",
            "gen_ai.journey.step.name",
            "gen_ai.journey.conversion.status",
            "api.method",
            "api.path",
            "error.type",
            "error.message",
            "error.stack",
            "error.component",
            "snapshot.url",
            "snapshot.viewport",
        ],
        _is_string,
    ),
    **dict.fromkeys(
        ["event.sequence", "api.status_code", "api.duration_ms", "duration_ms"],
        _is_integer,
    ),
    **dict.fromkeys(
        [
            "ui.scroll.position",
            "performance.lcp_ms",
            "performance.fid_ms",
            "performance.cls",
            "performance.ttfb_ms",
        ],
        _is_number,
    ),
    "metadata": _is_object,
}


class ProductGraph:
    r"""
    Be a ProductGraph server of one version, without a socket.

    It is not synchronised: `Server` calls it under a lock.

    Args:
        version: One of `VERSIONS`.

        strict_utf8:
            Refuse invalid UTF-8, escapes of lone surrogates and ``\u0000``, as strict
            parsers and PostgreSQL's `jsonb` do. Otherwise the first two become U+FFFD,
            as in Go.

        gzip: Inflate gzip bodies. No published version does.

        max_body: Answer 413 to bodies of more bytes, also once inflated.

        limit_event:
            Answer 400 when an event has more bytes on the wire. The default is the
            documented limit, which no published version enforces.

    Attributes:
        events: Accepted events in order, as sent, unknown keys included.

        requests: Every request in order.

        storage_down: While true, batches with an acceptable event are answered by 500.
    """

    def __init__(
        self,
        version: str = "v0.3.0",
        *,
        strict_utf8: bool = True,
        gzip: bool = False,
        max_body: int | None = None,
        limit_event: int | None = 100 * 1024,
    ) -> None:
        if version not in _PRODUCT_KEYS:
            msg = f"`version` must be one of {', '.join(VERSIONS)} (got {version!r})."
            raise ValueError(msg)

        self.version = version
        self.strict_utf8 = strict_utf8
        self.gzip = gzip
        self.max_body = max_body
        self.limit_event = limit_event
        self.events: list[dict[str, Any]] = []
        self.requests: list[Request] = []
        self.storage_down = False

        product_key = _PRODUCT_KEYS[version]
        self._fields = {**_FIELDS, product_key: _is_string}
        self._required = ("event_id", product_key, "session.id", "event.type")

    def respond(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Reply | None:
        """
        Keep a request and return its answer; None stands for a closed connection.
        """
        headers = {name.lower(): value for name, value in headers.items()}
        request = Request(method, path, headers, body, self.decode(headers, body))
        self.requests.append(request)
        return self.answer(request)

    def decode(self, headers: Mapping[str, str], body: bytes) -> list[Element] | Reply:
        """
        Return the content of the `events` list, or the reply that refuses the body.

        Only the JSON is judged here, not yet what it says. Nothing is kept.

        Args:
            headers: By names in lower case.

            body: As it came.
        """
        max_body = _MAX_INFLATED if self.max_body is None else self.max_body
        if self.max_body is not None and len(body) > max_body:
            return _BODY_TOO_LARGE

        try:
            if self.gzip and headers.get("content-encoding") == "gzip":
                body = _inflate(body, max_body)
                if len(body) > max_body:
                    return _BODY_TOO_LARGE

            text = body.decode("utf-8", "strict" if self.strict_utf8 else "replace")
            return _Cursor(text, strict=self.strict_utf8).batch()
        except (ValueError, zlib.error, RecursionError):
            return INVALID_BODY

    def answer(self, request: Request) -> Reply | None:
        """
        Return the answer to a request and store the events it accepts.
        """
        path = request.path.partition("?")[0]
        if path in _PROBES:
            if request.method not in ("GET", "HEAD"):
                return _plain_text(405, "Method Not Allowed", Allow="GET, HEAD")
            return _PROBES[path]

        if path != "/v1/events":
            return _NOT_FOUND

        if request.method != "POST":
            return _plain_text(405, "Method Not Allowed", Allow="POST")

        if isinstance(request.batch, Reply):
            return request.batch

        return self._ingest(request.batch)

    def _ingest(self, batch: list[Element]) -> Reply | None:
        accepted = []
        errors = []
        for index, (value, size) in enumerate(batch):
            if value is None:
                return None

            try:
                fields = self._read(value)
            except ValueError:
                return INVALID_BODY

            if self.limit_event is not None and size > self.limit_event:
                return _EVENT_TOO_LARGE

            missing = next((key for key in self._required if not fields.get(key)), None)
            if missing is None:
                accepted.append(dict(value))
            else:
                errors.append({"index": index, "error": f"{missing}: required"})

        if len(batch) > _MAX_EVENTS:
            return _BATCH_TOO_LARGE

        if accepted and self.storage_down:
            return _STORAGE_DOWN

        self.events += accepted
        verdict: dict[str, Any] = {"accepted": len(accepted), "rejected": len(errors)}
        if errors:
            verdict["errors"] = errors

        return _json(202, verdict)

    def _read(self, event: Any) -> dict[str, Any]:
        """
        Return the fields this version knows, by their own names.

        Raises:
            ValueError: A member, be it a duplicate, is of the wrong type.
        """
        if not isinstance(event, _Object):
            raise ValueError

        fields: dict[str, Any] = {}
        for key, value in event.pairs:
            name = _fold(key)
            is_valid = self._fields.get(name)
            if is_valid is None or value is None:
                continue
            if not is_valid(value):
                raise ValueError
            fields[name] = value

        if timestamp := fields.get("event.timestamp"):
            _check_timestamp(timestamp)

        return fields


class _Object(dict[str, Any]):
    """
    Be a JSON object that still knows its members in order, duplicates included.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


class _Cursor:
    """
    Walk through the JSON text of a batch.

    Members are parsed by `json`; only the outermost object and the `events` list are
    taken apart here, for the sizes of the events. Whatever is wrong is a ValueError.
    """

    _space = re.compile(r"[ \t\n\r]*")
    _surrogate = re.compile("[\ud800-\udfff]")

    def __init__(self, text: str, *, strict: bool) -> None:
        self._text = text
        self._strict = strict
        self._position = 0
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
            parse_float=_parse_float,
        )

    def batch(self) -> list[Element]:
        """
        Return the members of the last `events` list; text after the object is ignored.
        """
        elements: list[Element] = []
        if not self._take("{"):
            if self._value() is not None:
                raise ValueError
            return elements

        for _ in self._members("}"):
            key = self._value()
            if not isinstance(key, str) or not self._take(":"):
                raise ValueError
            if _fold(key) != "events":
                self._value()
            elif self._take("["):
                elements = [self._element() for _ in self._members("]")]
            elif self._value() is None:
                elements = []
            else:
                raise ValueError

        return elements

    def _members(self, end: str) -> Iterator[None]:
        """
        Yield in front of each member, up to the closing bracket.
        """
        if self._take(end):
            return

        # Bounded by the text: whoever iterates takes a member, or fails.
        while True:
            yield
            if self._take(end):
                return
            if not self._take(","):
                raise ValueError

    def _element(self) -> Element:
        self._skip_space()
        start = self._position
        value = self._value()
        return Element(value, len(self._text[start : self._position].encode()))

    def _value(self) -> Any:
        self._skip_space()
        value, self._position = self._decoder.raw_decode(self._text, self._position)
        return self._scrub(value)

    def _take(self, character: str) -> bool:
        self._skip_space()
        found = self._text.startswith(character, self._position)
        self._position += found
        return found

    def _skip_space(self) -> None:
        match = self._space.match(self._text, self._position)
        assert match is not None  # It matches nothing, too.
        self._position = match.end()

    def _object(self, pairs: list[tuple[str, Any]]) -> _Object:
        return _Object([(self._scrub(key), self._scrub(value)) for key, value in pairs])

    def _scrub(self, value: Any) -> Any:
        """
        Refuse or replace what cannot be stored; objects have been here already.
        """
        if isinstance(value, list):
            return [self._scrub(member) for member in value]

        if not isinstance(value, str):
            return value

        if self._strict and ("\0" in value or self._surrogate.search(value)):
            raise ValueError

        return self._surrogate.sub("\ufffd", value)


def _refuse_constant(name: str) -> NoReturn:
    """
    Refuse NaN and Infinity, which are not JSON.
    """
    raise ValueError(name)


def _parse_integer(literal: str) -> int | float:
    """
    Return an int, or a float when there are more digits than int64 can have.
    """
    return int(literal) if len(literal) <= len(str(-(2**63))) else _parse_float(literal)


def _parse_float(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError(literal)

    return value


def _fold(key: str) -> str:
    """
    Fold a key as Go's `encoding/json` does to compare it with the name of a field.

    The long s and the Kelvin sign count as the letters they stand for. `casefold`
    would also make two letters of one.
    """
    return key.lower().replace("\u017f", "s")


_TIMESTAMP = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})"
    r"(?:[.,][0-9]+)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)


def _check_timestamp(text: str) -> None:
    """
    Raise ValueError unless *text* is an RFC 3339 time as Go's `time.Parse` takes it.
    """
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError

    # Not `fromisoformat`: newer versions take hour 24.
    year, month, day, hour, minute, second = map(int, match.groups())
    datetime(year, month, day, hour, minute, second, tzinfo=timezone.utc)


def _inflate(body: bytes, limit: int) -> bytes:
    """
    Return the content of a gzip body, cut off one byte past *limit*.

    Raises:
        ValueError: The body ends too early.

        zlib.error: It is not gzip.
    """
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    content = inflater.decompress(body, limit + 1)
    if len(content) <= limit and not inflater.eof:
        raise ValueError

    return content
