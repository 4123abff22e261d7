"""
The two halves of an event's making.

On the caller's thread, `take` turns the arguments of `emit` into a record: a tuple of
values that nobody else holds.  On the worker, `Encoder` turns records into the
bytes that leave: it merges the metadata, asks `before_send`, redacts by pattern,
cuts to the widths of the wire, and encodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from pgtrack import _diagnostics
from pgtrack._clock import format_time, new_ids
from pgtrack._event import FIELDS, IDS, Event, Wire, encode_json, time_to_ns
from pgtrack._ledger import DropReason, Ledger
from pgtrack._redaction import KeyRule, is_card_number, redact_text
from pgtrack._snapshot import MARGIN, MAX_KEY, MAX_TEXT, snapshot

if TYPE_CHECKING:
    from pgtrack._config import Config
    from pgtrack.typing import BeforeSend, IdFactory, JSONValue

__all__ = ["Encoder", "Record", "take_field", "take_time"]

Record: TypeAlias = (
    "tuple[int, str, str, str | None, Mapping[str, Any], dict[str, Any], "
    "dict[str, Any] | None, int]"
)
"""
Time (ns), type, session, request, the frame's metadata, fields, metadata, size.

A plain tuple, since one is made for each event on the caller's thread; only `Encoder`
takes it apart.
"""

RECORD_SIZE = 400
"""What a record takes in memory beside the values counted by its snapshots, bytes."""

_SIZE_OF_TEXT = 56


def take_field(
    name: str, value: object, rule: KeyRule, ledger: Ledger
) -> tuple[JSONValue, int]:
    """Return a field's value as the wire can carry it, or None, and its size in memory."""
    field = FIELDS[name]
    if type(value) is not str:
        if field.is_json or field.width:
            value = _as_text(value, rule, is_json=field.is_json)
        converted = field.convert(value)
        if converted is None:
            ledger.adjust("field")
            return None, 0
        value = converted
    elif not field.width:  # a number, as text
        value = field.convert(value)
        if value is None:
            ledger.adjust("field")
    if not isinstance(value, str):
        return value, 32  # type: ignore[return-value]
    if len(value) > field.width + MARGIN:
        value = value[: field.width + MARGIN]
    return value, _SIZE_OF_TEXT + len(value) * (1 if value.isascii() else 4)


def _as_text(value: object, rule: KeyRule, *, is_json: bool) -> str:
    taken = snapshot(value, rule).value
    if is_json or not isinstance(taken, str):
        return encode_json(taken)
    return taken


def take_time(value: object, now: int, ledger: Ledger) -> int:
    """
    Return the nanoseconds of a `timestamp`; *now* for what is none.

    A naive datetime is local time, as everywhere in Python, and counted as adjusted.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            ledger.adjust("timestamp")
        try:
            return time_to_ns(value)
        except (OverflowError, OSError, ValueError):
            return now
    ledger.adjust("timestamp")
    return now


class Encoder:
    """Turns records into the bytes of events; used by the delivering thread alone."""

    def __init__(
        self, config: Config, rule: KeyRule, ledger: Ledger, ids: IdFactory | None
    ) -> None:
        self._ledger = ledger
        self._before_send: BeforeSend | None = config.before_send
        self._max_bytes = int(config.max_event_bytes)
        self._ids = ids
        self._rule = rule
        self._project = {
            "project_id": config.project_id,
            "product_id": config.product_id,
        }
        static = snapshot(config.metadata or {}, rule).value
        self._static: Wire = static
        named = {
            "service": config.service,
            "release": config.release,
            "environment": config.environment,
        }
        self._reserved = {"source": "backend"}
        self._reserved.update({k: v for k, v in named.items() if v is not None})

    def encode(self, records: Iterable[Record]) -> list[tuple[bytes | None, Record]]:
        """
        Encode *records* in order; None stands for one that was dropped and counted.
        """
        records = list(records)
        ids = [self._ids() for _ in records] if self._ids else new_ids(len(records))
        encoded: list[tuple[bytes | None, Record]] = []
        for record, event_id in zip(records, ids):
            try:
                wire = self.wire(record, event_id)
                data = None if wire is None else self._bytes(wire)
            except Exception as error:  # noqa: BLE001  one event must not cost the batch
                self._ledger.drop("internal_error")
                _diagnostics.internal_error(error)
                data = None
            encoded.append((data, record))
        return encoded

    def wire(self, record: Record, event_id: str) -> Wire | None:
        """Return the wire form of *record*, ready to leave; None if it was dropped."""
        wire = self._assemble(record, event_id)
        if self._before_send is not None:
            replaced = self._ask(wire)
            if replaced is None:
                return None
            wire = replaced
        return self._finish(wire)

    def _assemble(self, record: Record, event_id: str) -> Wire:
        time_ns, kind, session_id, request_id, inherited, fields, metadata, _ = record
        wire: Wire = {
            "event_id": event_id,
            **self._project,
            "session.id": session_id,
            "event.type": kind,
            "event.timestamp": format_time(time_ns),
        }
        for name, value in fields.items():
            if value is not None:
                wire[FIELDS[name].key] = value
        reserved = self._reserved
        if request_id is not None:
            reserved = {**reserved, "request_id": request_id}
        if metadata and not reserved.keys().isdisjoint(metadata):
            self._ledger.adjust("reserved_key")
        wire["metadata"] = {
            **self._static,
            **inherited,
            **(metadata or {}),
            **reserved,
        }
        return wire

    def _ask(self, wire: Wire) -> Wire | None:
        """Return what the user's hook makes of the event; None drops it, counted."""
        reason: DropReason = "before_send"
        try:
            event = self._before_send(Event.from_wire(wire))  # type: ignore[misc]
            if event is None:
                self._ledger.drop(reason)
                return None
            return self._checked(event, wire)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  a hook may raise anything
            reason = "before_send_error"
            self._ledger.drop(reason)
            _diagnostics.note(
                reason,
                f"before_send raised {type(error).__name__}: the event is dropped, since "
                "what the hook was to take out of it must not leave.",
            )
            return None

    def _checked(self, event: Event, before: Wire) -> Wire:
        """Return the wire form of what the hook gave, converted as emit's arguments are."""
        if not isinstance(event, Event):
            msg = f"before_send must return an Event or None (got {type(event).__name__})"
            raise TypeError(msg)
        rule = KeyRule()
        wire: Wire = {}
        for name, field in FIELDS.items():
            value = getattr(event, name)
            if value is not None:
                value, _ = take_field(name, value, rule, self._ledger)
            if value is not None:
                wire[field.key] = value
        for key in ("event_id", "project_id", "product_id", "session.id", "event.type"):
            wire.setdefault(key, before[key])
        moment = event.timestamp
        if moment is None or moment.tzinfo is None:
            wire["event.timestamp"] = before["event.timestamp"]
        else:
            wire["event.timestamp"] = format_time(time_to_ns(moment))
        wire["metadata"] = snapshot(event.metadata or {}, rule).value
        return wire

    def _finish(self, wire: Wire) -> Wire:
        """Redact by pattern, then cut: a secret across the cut must still be seen."""
        finished: Wire = {}
        for key, value in wire.items():
            if type(value) is str:
                value = _clean(value)
                if key not in IDS and key != "event.timestamp":
                    width = _WIDTHS[key]
                    value = self._cut(redact_text(value, self._rule), width)
            elif key == "metadata":
                value = self._finish_json(value)
            finished[key] = value
        return finished

    def _finish_json(self, value: Any) -> Any:
        kind = type(value)
        if kind is str:
            return self._cut(redact_text(_clean(value), self._rule), MAX_TEXT)
        if kind is dict:
            return {
                self._cut(redact_text(_clean(key), self._rule), MAX_KEY): self._finish_json(item)
                for key, item in value.items()
            }
        if kind is list:
            return [self._finish_json(item) for item in value]
        if (kind is int or kind is float) and is_card_number(value):
            return redact_text(str(int(value)))
        return value

    def _cut(self, text: str, width: int) -> str:
        if len(text) <= width:
            return text
        self._ledger.adjust("event_cut")
        mark = f"...[{len(text) - width} cut]" if width > _MARK_FROM else "..."
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


_MARK_FROM = 100
"""Widths below get the short mark: the long one would be most of the text."""

_WIDTHS = {field.key: field.width for field in FIELDS.values()}


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
    sizes = {key: len(encode_json(value).encode()) for key, value in metadata.items()}
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if excess <= 0 or sizes[key] <= _MARK_FROM:
            break
        metadata[key] = f"[{sizes[key]} bytes cut]"
        excess -= sizes[key] - len(metadata[key]) - 2
    if excess > 0:  # too many small ones
        metadata = {
            key: metadata[key]
            for key in ("source", "service", "release", "environment", "request_id")
            if key in metadata
        }
        metadata["..."] = f"[{len(sizes)} more cut]"
    return {**wire, "metadata": metadata}


def _without_long_texts(wire: Wire, excess: int) -> Wire:
    del excess
    return {
        key: value[:_MARK_FROM] + "...[cut]"
        if isinstance(value, str) and len(value) > 2 * _MARK_FROM and key not in IDS
        else value
        for key, value in wire.items()
    }
