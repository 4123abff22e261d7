"""
The event: its fields, their types and widths, and its form on the wire.

The class `Event` is the one table.  Each field names its key on the wire, how a
value becomes one the wire can carry, and the width of the server's column;
`FIELDS`, the keywords of `emit` and the collector are read off it.

Source of keys, types and widths: the ProductGraph API page and event schema
v0.1 to v0.3, read 2026-08.  Keys are flat and contain dots.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from pgtrack._clock import format_time
from pgtrack.exceptions import InvalidEventError

if TYPE_CHECKING:
    from typing_extensions import Self

    from pgtrack.typing import JSONValue

__all__ = [
    "FIELDS",
    "IDS",
    "KEYWORDS",
    "Event",
    "EventFields",
    "Field",
    "StepFields",
    "Wire",
    "decode_json",
    "encode_json",
    "parse_time",
    "time_to_ns",
]

Wire = dict[str, Any]
"""An event as the JSON object that goes over the wire."""

_MIN_INT64 = -(2**63)
_MAX_INT64 = 2**63 - 1
_MAX_DIGITS = 100
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _to_text(value: object) -> str | None:
    return str.__str__(value) if isinstance(value, str) else None


def _to_integer(value: object) -> int | None:
    """Round to the nearest integer of 64 bits; None for what is out of range."""
    if isinstance(value, timedelta):
        value /= timedelta(milliseconds=1)
    elif isinstance(value, str):
        value = _parse_number(value)
    # Before rounding, since a Decimal of nine digits may stand for a billion of them.
    if not _MIN_INT64 - 1 < value < _MAX_INT64 + 1:  # type: ignore[operator]
        return None
    number = int(round(value))  # type: ignore[call-overload]  # noqa: RUF046  of any type
    return number if _MIN_INT64 <= number <= _MAX_INT64 else None


def _to_number(value: object) -> float | None:
    """Return a finite number; None for infinities and NaN."""
    if type(value) is int and _MIN_INT64 <= value <= _MAX_INT64:
        return value
    if isinstance(value, str):
        value = _parse_number(value)
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def _parse_number(text: str) -> float:
    """Return the number that *text* is, an int where it can be."""
    text = str.__str__(text)[:_MAX_DIGITS]
    try:
        return int(text)
    except ValueError:
        return float(text)


@attrs.frozen
class Field:
    """
    One field of the wire.

    Attributes:
        name: The keyword in Python.

        key: The key in the JSON object.

        convert: Returns the value as the wire carries it; None, or any exception, where
            it cannot.

        width: Most characters of a text field; longer ones are cut.

        is_id: Whether the field holds an identifier, which is never redacted or cut.

        is_json: Whether the text is itself JSON, so that objects may be given.
    """

    name: str
    key: str
    convert: Callable[[object], JSONValue]
    width: int
    is_id: bool = False
    is_json: bool = False


_TEXT_WIDTH = 16_384


def _text(key: str, width: int = _TEXT_WIDTH, *, is_json: bool = False) -> Any:
    return _field(key, _to_text, width=width, is_json=is_json)


def _id(key: str) -> Any:
    return _field(key, _to_text, width=255, is_id=True)


def _field(key: str, convert: Callable[[object], JSONValue], **options: Any) -> Any:
    options.setdefault("width", 0)
    return attrs.field(default=None, metadata={Field: (key, convert, options)})


@attrs.frozen(kw_only=True)
class Event:
    """
    One event, frozen; `replace` makes a changed one.

    Field names are the wire's keys with dots as underscores, without the prefixes
    `event.` and `gen_ai.`.  None means that the field is not sent.  Durations end in
    `_ms` and are milliseconds; scroll position and web vitals are floats, state before
    and after are JSON text.

    Attributes:
        type: One of the 15 types of `pgtrack.typing.EventType`, or any other text.

        timestamp: When it happened, an aware datetime; microseconds are kept.

        metadata: A JSON object of anything else.
    """

    type: str = _text("event.type", 255)
    event_id: str | None = _id("event_id")
    project_id: str | None = _id("project_id")
    product_id: str | None = _id("product_id")
    session_id: str | None = _id("session.id")
    timestamp: datetime | None = None
    name: str | None = _text("event.name", 255)
    sequence: int | None = _field("event.sequence", _to_integer)
    user_id: str | None = _id("user.id")
    user_anonymous_id: str | None = _id("user.anonymous_id")
    org_id: str | None = _id("org.id")
    org_name: str | None = _text("org.name", 255)
    page_path: str | None = _text("page.path", 1024)
    page_title: str | None = _text("page.title", 255)
    page_url: str | None = _text("page.url", 2048)
    page_referrer: str | None = _text("page.referrer", 2048)
    ui_component_name: str | None = _text("ui.component.name", 255)
    ui_component_path: str | None = _text("ui.component.path", 1024)
    ui_component_type: str | None = _text("ui.component.type", 100)
    ui_action: str | None = _text("ui.action", 100)
    ui_element: str | None = _text("ui.element", 255)
    ui_element_text: str | None = _text("ui.element.text", 500)
    ui_viewport: str | None = _text("ui.viewport", 50)
    ui_scroll_position: float | None = _field("ui.scroll.position", _to_number)
    ui_state_key: str | None = _text("ui.state.key", 255)
    ui_state_before: str | None = _text("ui.state.before", is_json=True)
    ui_state_after: str | None = _text("ui.state.after", is_json=True)
    ui_state_change_type: str | None = _text("ui.state.change_type", 50)
    journey_id: str | None = _text("gen_ai.journey.id", 255)
    journey_step_id: str | None = _text("gen_ai.journey.step.id", 255)
    journey_step_name: str | None = _text("gen_ai.journey.step.name", 255)
    journey_conversion_status: str | None = _text(
        "gen_ai.journey.conversion.status", 50
    )
    api_method: str | None = _text("api.method", 10)
    api_path: str | None = _text("api.path", 1024)
    api_status_code: int | None = _field("api.status_code", _to_integer)
    api_duration_ms: int | None = _field("api.duration_ms", _to_integer)
    duration_ms: int | None = _field("duration_ms", _to_integer)
    error_type: str | None = _text("error.type", 255)
    error_message: str | None = _text("error.message")
    error_stack: str | None = _text("error.stack")
    error_component: str | None = _text("error.component", 255)
    performance_lcp_ms: float | None = _field("performance.lcp_ms", _to_number)
    performance_fid_ms: float | None = _field("performance.fid_ms", _to_number)
    performance_cls: float | None = _field("performance.cls", _to_number)
    performance_ttfb_ms: float | None = _field("performance.ttfb_ms", _to_number)
    snapshot_url: str | None = _text("snapshot.url", 1024)
    snapshot_viewport: str | None = _text("snapshot.viewport", 50)
    metadata: Mapping[str, JSONValue] | None = None

    def __repr__(self) -> str:
        """Show the fields that are set: most of the forty are not."""
        values = ((field.name, getattr(self, field.name)) for field in _ATTRIBUTES)
        shown = ", ".join(f"{k}={v!r}" for k, v in values if v is not None)
        return f"Event({shown})"

    def replace(self, **changes: Any) -> Self:
        """
        Return a copy with *changes*; None takes a field away.

        Raises:
            TypeError: If a name is not a field.
        """
        return attrs.evolve(self, **changes)

    @classmethod
    def from_wire(cls, wire: object) -> Self:
        """
        Read an event off its wire form.

        Null is the same as absent, and an empty timestamp too; keys that ProductGraph
        does not know are left out.  Fractions of integers are rounded, digits of the
        timestamp beyond microseconds cut.

        Raises:
            InvalidEventError: If a value has the wrong JSON type, or the timestamp is
                not RFC 3339 with an offset.
        """
        if not isinstance(wire, Mapping):  # JSON may be anything
            msg = f"event must be a JSON object (got {type(wire).__name__})."
            raise InvalidEventError(msg)
        values: dict[str, Any] = {}
        for key, value in wire.items():
            if value is None:
                continue
            if key == "event.timestamp":
                if value != "":
                    values["timestamp"] = parse_time(value)
            elif key == "metadata":
                if not isinstance(value, Mapping):
                    raise InvalidEventError(_WRONG.format(key, "an object"))
                values["metadata"] = value
            elif (field := _BY_KEY.get(key)) is not None:
                values[field.name] = _read(field, value)
        return cls(**values)

    def to_wire(self) -> Wire:
        """Return the JSON object that goes over the wire; None fields are absent."""
        wire: Wire = {}
        for field in FIELDS.values():
            value = getattr(self, field.name)
            if value is not None:
                wire[field.key] = value
        if self.timestamp is not None:
            wire["event.timestamp"] = format_time(time_to_ns(self.timestamp))
        if self.metadata is not None:
            wire["metadata"] = dict(self.metadata)
        return wire


_ATTRIBUTES = attrs.fields(Event)

FIELDS: Mapping[str, Field] = {
    a.name: Field(a.name, key, convert, **options)
    for a in _ATTRIBUTES
    for key, convert, options in [a.metadata.get(Field, (None, None, None))]
    if key is not None
}
"""Each field by its Python name, except for `timestamp` and `metadata`."""

IDS = frozenset(field.key for field in FIELDS.values() if field.is_id)
"""The wire keys that hold identifiers."""

_BY_KEY = {field.key: field for field in FIELDS.values()}
_WRONG = "{}: must be {}"


def _read(field: Field, value: object) -> object:
    """Check a value that came over the wire; the texts are the collector's, too."""
    if field.convert is _to_text:
        if not isinstance(value, str):
            raise InvalidEventError(_WRONG.format(field.key, "a string"))
        return value
    rule = "an integer" if field.convert is _to_integer else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidEventError(_WRONG.format(field.key, rule))
    try:
        converted = field.convert(value)
    except OverflowError:
        converted = None
    if converted is None:
        raise InvalidEventError(_WRONG.format(field.key, rule))
    return converted


_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:[.,](\d+))?(Z|[+-]\d\d:\d\d)", re.ASCII
)


def parse_time(text: object) -> datetime:
    """
    Parse an RFC 3339 timestamp with an offset into an aware UTC datetime.

    A comma may stand before the fraction, of any number of digits, as ProductGraph
    takes it; microseconds are kept, the rest is cut.

    Raises:
        InvalidEventError: If it is anything else.
    """
    match = _RFC3339.fullmatch(text) if isinstance(text, str) else None
    if match is not None:
        seconds, fraction, offset = match.groups()
        offset = "+00:00" if offset == "Z" else offset
        micros = ((fraction or "") + "000000")[:6]
        try:
            parsed = datetime.fromisoformat(f"{seconds}.{micros}{offset}")
            return parsed.astimezone(timezone.utc)
        except (ValueError, OverflowError):
            pass
    raise InvalidEventError(_WRONG.format("event.timestamp", "RFC 3339 with an offset"))


def time_to_ns(moment: datetime) -> int:
    """
    Return nanoseconds since 1970-01-01 UTC; naive datetimes are local time.

    Raises:
        OverflowError, OSError, ValueError: If a naive datetime is beyond what the
            machine's time zone data can tell.
    """
    if moment.utcoffset() is None:
        moment = moment.astimezone()
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


class StepFields(TypedDict, total=False):
    """
    The keywords of `emit` but for `journey_id`, which some verbs take by position.

    `metadata` may hold any Python values: they are converted or cut to what JSON can
    carry.  `session_id`, `user_id`, `request_id` and `journey_id` default to the
    present correlation, `timestamp` (an aware datetime) to now, `event_id` to a new
    UUID.  Ids are 1 to 255 visible ASCII characters; those of sessions and requests are
    shorter and plainer.
    """

    metadata: Mapping[str, Any] | None
    session_id: str | None
    user_id: str | int | None
    request_id: str | None
    timestamp: datetime | None
    event_id: str | None
    name: str | None
    sequence: int | None
    user_anonymous_id: str | None
    org_id: str | None
    org_name: str | None
    page_path: str | None
    page_title: str | None
    page_url: str | None
    page_referrer: str | None
    ui_component_name: str | None
    ui_component_path: str | None
    ui_component_type: str | None
    ui_action: str | None
    ui_element: str | None
    ui_element_text: str | None
    ui_viewport: str | None
    ui_scroll_position: float | None
    ui_state_key: str | None
    ui_state_before: Any
    ui_state_after: Any
    ui_state_change_type: str | None
    journey_step_id: str | None
    journey_step_name: str | None
    journey_conversion_status: str | None
    api_method: str | None
    api_path: str | None
    api_status_code: int | None
    api_duration_ms: float | None
    duration_ms: float | None
    error_type: str | None
    error_message: str | None
    error_stack: str | None
    error_component: str | None
    performance_lcp_ms: float | None
    performance_fid_ms: float | None
    performance_cls: float | None
    performance_ttfb_ms: float | None
    snapshot_url: str | None
    snapshot_viewport: str | None


class EventFields(StepFields, total=False):
    """The keywords of `emit`."""

    journey_id: str | None


KEYWORDS = EventFields.__optional_keys__
"""The names of `EventFields`."""


def encode_json(value: JSONValue) -> str:
    """Return compact JSON; NaN and infinities raise ValueError."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def decode_json(data: bytes) -> Wire:
    """Return the JSON object that `encode_json` made."""
    wire: Wire = json.loads(data)
    return wire
