"""
The two halves of an event's making.

On the caller's thread, `take` turns the arguments of `emit` into a record: a tuple of
values that nobody else holds.  On the worker, `Encoder` turns records into the
bytes that leave: it merges the metadata, asks `before_send`, redacts by pattern,
cuts to the widths of the wire, and encodes.
"""

from __future__ import annotations

import enum
import re
import sys
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from pgtrack import _diagnostics
from pgtrack._clock import format_time, new_id, new_ids
from pgtrack._context import is_request_id, is_session_id, is_user_id, suppress
from pgtrack._event import FIELDS, Event, Wire, encode_json, time_to_ns
from pgtrack._keys import REDACTED, KeyRule
from pgtrack._snapshot import (
    MARGIN,
    MAX_KEY,
    MAX_TEXT,
    SIZE_OF_NUMBER,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pgtrack._config import Config
    from pgtrack._ledger import AdjustedReason, Ledger
    from pgtrack.typing import BeforeSend, IdFactory, JSONValue

__all__ = [
    "RECORD_SIZE",
    "SPAN_SIZE",
    "Encoder",
    "Record",
    "take_field",
    "take_id",
    "take_metadata",
    "take_time",
    "take_type",
]

Record: TypeAlias = (
    "tuple[int, str, str, str | None, Mapping[str, Any], dict[str, Any], "
    "dict[str, Any] | None, Mapping[str, str] | None, int]"
)
"""
Time (ns), type, session, request, the frame's metadata, fields, metadata, span, size.

A plain tuple, since one is made for each event on the caller's thread; only `Encoder`
takes it apart.
"""

RECORD_SIZE = 400
"""What a record takes in memory beside the values counted by its snapshots, bytes."""

SPAN_SIZE = 450
"""What the ids of a span add to that."""

_REFUSED_ID: dict[str, AdjustedReason] = {
    "event_id": "event_id",
    "request_id": "request_id",
    "session_id": "session_id",
    "user_id": "user_id",
}
"""What counts an id that does not fit; the others are fields as any."""

_GRAMMARS: dict[str, Callable[[str], bool]] = {
    "request_id": is_request_id,
    "session_id": is_session_id,
}
"""The ids that may hold less than 1 to 255 visible ASCII characters."""

_MAX_BITS = 1_000


# --- on the caller's thread ------------------------------------------------------


def take_type(value: object, rule: KeyRule) -> str | None:
    """Return an event type as text; None for what is none, and for an empty one."""
    kind = value if type(value) is str else snapshot(value, rule).value
    return kind[: _WIDTHS["event.type"] + MARGIN] or None if type(kind) is str else None


def take_id(name: str, value: object, ledger: Ledger) -> str | None:
    """
    Return an id as text, or None, counted, if it does not fit its grammar.

    UUIDs and integers are as good as their text, enums as their values.
    """
    try:
        text = value if type(value) is str else _id_text(value)
    except Exception:  # noqa: BLE001  the value's own code may raise anything
        text = None
    if text is not None and _GRAMMARS.get(name, is_user_id)(text):
        return text
    ledger.adjust(_REFUSED_ID.get(name, "field"))
    return None


def _id_text(value: object) -> str | None:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value) if int.bit_length(value) <= _MAX_BITS else None
    uuid = sys.modules.get("uuid")  # whoever has a UUID has loaded it
    return str(value) if uuid is not None and type(value) is uuid.UUID else None


def take_field(
    name: str, value: object, rule: KeyRule, ledger: Ledger
) -> tuple[JSONValue, int]:
    """
    Return a field's value as the wire can carry it, or None, and its size in memory.
    """
    field = FIELDS[name]
    if field.is_id:
        text = take_id(name, value, ledger)
        return text, 0 if text is None else sys.getsizeof(text)
    if type(value) is not str or not field.width:
        try:
            if field.width:
                value = _as_text(value, rule, ledger, is_json=field.is_json)
            value = field.convert(value)
        except Exception:  # noqa: BLE001  the value's own code may raise anything
            value = None
        if value is None:
            ledger.adjust("field")
            return None, 0
    if not isinstance(value, str):
        return value, SIZE_OF_NUMBER
    text = value[: field.width + MARGIN]
    return text, sys.getsizeof(text)


def _as_text(value: object, rule: KeyRule, ledger: Ledger, *, is_json: bool) -> str:
    taken = snapshot(value, rule)
    if taken.is_lossy:
        ledger.adjust("field")
    if is_json or not isinstance(taken.value, str):
        return encode_json(taken.value)
    return taken.value


def take_metadata(
    value: object, rule: KeyRule, ledger: Ledger
) -> tuple[dict[str, Any], int]:
    """Return metadata as a JSON object, and its size in memory."""
    taken = snapshot(value, rule)
    metadata = taken.value
    if taken.is_lossy or not isinstance(metadata, dict):
        ledger.adjust("metadata")
    if not isinstance(metadata, dict):
        metadata = {"value": metadata}
    return metadata, taken.size


def take_time(value: object, now: int, ledger: Ledger) -> int:
    """
    Return the nanoseconds of a `timestamp`; *now* for what is none.

    A naive datetime is local time, as everywhere in Python, and counted as adjusted.
    """
    try:
        if isinstance(value, datetime):
            moment = time_to_ns(value)
            if value.tzinfo is None:
                ledger.adjust("timestamp")
            return moment
    except Exception:  # noqa: BLE001, S110  the value's own code may raise anything
        pass
    ledger.adjust("timestamp")
    return now


# --- on the worker ---------------------------------------------------------------


class Encoder:
    """
    Turns records into the bytes of events, on the worker or on any other thread.

    Args:
        config: The settings of the client.

        rule: Which keys are sensitive.

        ledger: Counts what is dropped and adjusted.

        ids: Makes event ids; None for random UUIDs.
    """

    def __init__(
        self, config: Config, rule: KeyRule, ledger: Ledger, ids: IdFactory | None
    ) -> None:
        # Slow to import, for their patterns; needed by enabled clients alone.
        from pgtrack._cards import is_card_number  # noqa: PLC0415
        from pgtrack._redaction import redact_text  # noqa: PLC0415

        self._is_card_number = is_card_number
        self._redact_text = redact_text
        self._ledger = ledger
        self._before_send: BeforeSend | None = config.before_send
        self._max_bytes = config.max_event_bytes
        self._ids = ids
        self._rule = rule
        self._project = {
            "project_id": config.project_id,
            "product_id": config.product_id,
        }
        self._static: Wire = snapshot(config.metadata or {}, rule).value
        named = {
            "service": config.service,
            "release": config.release,
            "environment": config.environment,
        }
        self._reserved = {"source": "backend"}
        self._reserved.update({k: v for k, v in named.items() if v is not None})

    def encode(
        self, records: Sequence[Record]
    ) -> Iterator[tuple[bytes | None, Record]]:
        """
        Encode *records* in order; None stands for one that was dropped and counted.
        """
        pairs = zip(records, self._new_ids(len(records)), strict=True)
        return ((self._encode(*pair), pair[0]) for pair in pairs)

    def encode_here(self, record: Record) -> bytes | None:
        """Encode one record on the thread that emits it."""
        event_id = new_id() if self._ids is None else self._new_ids(1)[0]
        with suppress():  # an event of before_send would make another, and so on
            return self._encode(record, event_id)

    def _new_ids(self, count: int) -> list[str]:
        """Return *count* ids; a factory that fails is replaced by our own."""
        if self._ids is None:
            return new_ids(count)
        try:
            return [str(self._ids()) for _ in range(count)]
        except Exception as error:  # noqa: BLE001  a user's factory may raise anything
            _diagnostics.note(
                "ids", f"the factory of event ids raised {type(error).__name__}."
            )
            return new_ids(count)

    def _encode(self, record: Record, event_id: str) -> bytes | None:
        try:
            assembled = self._assemble(record, event_id)
            wire = self._ask(assembled, record[0])
            return None if wire is None else self._bytes(self._finish(wire, record[7]))
        except Exception as error:  # noqa: BLE001  one event must not cost the batch
            _diagnostics.internal_error(error)
            self._ledger.drop("internal_error")
            return None

    def _assemble(self, record: Record, event_id: str) -> Wire:
        now, kind, session_id, request_id, inherited, fields, given, span, _ = record
        wire: Wire = {
            "event_id": event_id,
            **self._project,
            "session.id": session_id,
            "event.type": kind,
            "event.timestamp": format_time(now),
        }
        for name, value in fields.items():
            if value is not None:
                wire[FIELDS[name].key] = value
        reserved = self._reserved
        if request_id is not None:
            reserved = {**reserved, "request_id": request_id}
        if span is not None:
            reserved = {**reserved, **span}
        merged = {**self._static, **inherited, **(given or {})}
        if not reserved.keys().isdisjoint(merged):
            self._ledger.adjust("reserved_key")
        wire["metadata"] = {**merged, **reserved}
        return wire

    def _ask(self, wire: Wire, time_ns: int) -> Wire | None:
        """Return what the user's hook makes of the event; None drops it, counted."""
        if self._before_send is None:
            return wire
        # The events of a session share its metadata; the hook gets a copy.
        before = Event.from_wire({**wire, "metadata": _copy(wire["metadata"])})
        try:
            event: object = self._before_send(before)
            if event is None:
                self._ledger.drop("before_send")
                return None
            if isinstance(event, Event):
                return self._checked(event, wire, time_ns)
            problem = f"returned {type(event).__name__} rather than an Event or None"
        except BaseException as error:
            is_ours = threading.current_thread() is not threading.main_thread()
            if isinstance(error, KeyboardInterrupt) and not is_ours:
                raise  # Ctrl-C, in a flush that the main thread does itself
            problem = f"raised {type(error).__name__}"
        self._ledger.drop("before_send_error")
        _diagnostics.note(
            "before_send_error",
            f"before_send {problem}: the event is dropped, since what the hook was to "
            "take out of it must not leave.",
        )
        return None

    def _checked(self, event: Event, before: Wire, time_ns: int) -> Wire:
        """Return the wire form of what the hook gave, converted as emit's arguments."""
        wire: Wire = {}
        for name, field in FIELDS.items():
            value = getattr(event, name)
            if value is not None and value is not before.get(field.key):
                value, _ = take_field(name, value, self._rule, self._ledger)
            if value is not None:
                wire[field.key] = value
        for key in _REQUIRED:
            wire[key] = wire.get(key) or before[key]
        if event.timestamp is not None:
            time_ns = take_time(event.timestamp, time_ns, self._ledger)
        wire["event.timestamp"] = format_time(time_ns)
        metadata: object = {} if event.metadata is None else event.metadata
        wire["metadata"], _ = take_metadata(metadata, self._rule, self._ledger)
        return wire

    def _finish(self, wire: Wire, span: Mapping[str, str] | None) -> Wire:
        """Redact by pattern, then cut: a secret across the cut must still be seen."""
        finished: Wire = {}
        for key, value in wire.items():
            if type(value) is str and key in _WIDTHS:
                finished[key] = self._text(value, _WIDTHS[key])
            else:
                finished[key] = self._json(value) if key == "metadata" else value
        for key, text in () if span is None else span.items():
            if wire["metadata"].get(key) == text:  # not what before_send made of it
                finished["metadata"][key] = text  # also if its digits look like a card
        return finished

    def _json(self, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            return self._text(value, MAX_TEXT)
        if kind is dict:
            finished: Wire = {}
            for key, item in value.items():
                name = self._text(key, MAX_KEY)
                if name in finished:  # two that differed in what was taken out
                    name = f"{name} ({len(finished)})"
                finished[name] = self._json(item)
            return finished
        if kind is list:
            return [self._json(item) for item in value]
        if (kind is int or kind is float) and self._is_card_number(value):
            return REDACTED
        return value

    def _text(self, text: str, width: int) -> str:
        """
        Return *text* without secrets, and no longer than *width*.

        The snapshot left a margin beyond the width.  If it cut there, the end of what
        it left may be half a secret, which nothing but its place gives away.
        """
        is_part = len(text) >= width + MARGIN
        text = _clean(text)
        if is_part:
            text = _OPEN_TOKEN.sub(REDACTED, text)
        text = self._redact_text(text, self._rule)
        if is_part and not text.endswith(REDACTED):
            text = text[:-MARGIN]
        elif len(text) <= width:
            return text
        self._ledger.adjust("event_cut")
        mark = _CUT if width > _MARK_FROM else "..."
        return text[: width - len(mark)] + mark

    def _bytes(self, wire: Wire) -> bytes | None:
        """Encode *wire*; what is too large loses metadata first, then long texts."""
        data = encode_json(wire).encode()
        if len(data) <= self._max_bytes:
            return data
        self._ledger.adjust("event_cut")
        for shrink in (_without_large_metadata, _without_long_texts):
            wire = shrink(wire, len(data) - self._max_bytes)
            data = encode_json(wire).encode()
            if len(data) <= self._max_bytes:
                return data
        self._ledger.drop("too_large")
        return None


_WIDTHS = {f.key: f.width for f in FIELDS.values() if f.width and not f.is_id}
"""Of the texts, in characters."""

_REQUIRED = ("event_id", "project_id", "product_id", "session.id", "event.type")
_RESERVED = (
    *("source", "service", "release", "environment"),
    *("request_id", "trace_id", "span_id", "trace_flags"),
)

_CUT = "...[cut]"
_MARK_FROM = 100
"""Texts no wider than this get a shorter mark: it would be most of the text."""

_OPEN_TOKEN = re.compile(r"(?<![\w-])eyJ[A-Za-z0-9_.-]*\Z", re.ASCII)
"""A JSON Web Token whose end was cut off, perhaps before the first of its dots."""


def _copy(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if type(value) is list else value


def _clean(text: str) -> str:
    """
    Replace what strict JSON parsers and PostgreSQL refuse by U+FFFD.

    These are lone surrogates and NUL.
    """
    if "\0" in text:
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _without_large_metadata(wire: Wire, excess: int) -> Wire:
    """Replace the largest values of the metadata by a mark until *excess* is gone."""
    metadata = dict(wire["metadata"])
    sizes = {
        key: len(encode_json(value).encode())
        for key, value in metadata.items()
        if key not in _RESERVED
    }
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if excess <= 0 or sizes[key] <= _MARK_FROM:
            break
        metadata[key] = f"[{sizes[key]} bytes cut]"
        excess -= sizes[key] - len(metadata[key]) - 2
    if excess > 0:  # too many small ones
        metadata = {key: metadata[key] for key in _RESERVED if key in metadata}
        metadata["..."] = f"[{len(sizes)} more cut]"
    return {**wire, "metadata": metadata}


def _without_long_texts(wire: Wire, excess: int) -> Wire:
    del excess
    return {
        key: value[:_MARK_FROM] + _CUT
        if key in _WIDTHS and isinstance(value, str) and len(value) > 2 * _MARK_FROM
        else value
        for key, value in wire.items()
    }
