"""The event: its table of fields, and the way from and to the wire."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta, timezone, tzinfo

import attrs
import pytest

import pgtrack
from harness import load_vectors
from pgtrack._event import (
    FIELDS,
    IDS,
    KEYWORDS,
    Event,
    decode_json,
    encode_json,
    parse_time,
    time_to_ns,
)
from pgtrack.exceptions import InvalidEventError

VALID = load_vectors("events_valid")["cases"]
UTC = timezone.utc

TYPES = {
    "text": [
        "event_id",
        "project_id",
        "product_id",
        "session.id",
        "event.type",
        "event.name",
        "user.id",
        "user.anonymous_id",
        "org.id",
        "org.name",
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
    "integer": ["event.sequence", "api.status_code", "api.duration_ms", "duration_ms"],
    "number": [
        "ui.scroll.position",
        "performance.lcp_ms",
        "performance.fid_ms",
        "performance.cls",
        "performance.ttfb_ms",
    ],
}
"""Every key of the server's schema but `event.timestamp` and `metadata`, by type."""

KEYS = [key for keys in TYPES.values() for key in keys]
IMMUTABLE = {"project_id", "product_id"}


def python_name(key: str) -> str:
    """Return what the keyword of a key is called."""
    return re.sub(r"^(event|gen_ai)\.", "", key).replace(".", "_")


class TestFields:
    """The table."""

    def test_each_key_of_the_schema_is_a_field(self) -> None:
        """The fields are the server's, under the names that the design gives them."""
        expected = {python_name(key): key for key in KEYS}

        assert expected == {name: field.key for name, field in FIELDS.items()}

    def test_the_keywords_of_emit_are_the_fields(self) -> None:
        """Emit takes each field but the type and the project, and the request id."""
        taken = {field.name for field in attrs.fields(Event)} - IMMUTABLE - {"type"}

        assert taken | {"request_id"} == KEYWORDS

    def test_the_fields_of_an_event_are_the_table(self) -> None:
        """An event has each field of the table, the timestamp and the metadata."""
        names = {field.name for field in attrs.fields(Event)}

        assert FIELDS.keys() | {"timestamp", "metadata"} == names

    def test_identifiers_are_marked(self) -> None:
        """What identifies something is neither cut nor redacted."""
        expected = "event_id project_id product_id session.id user.id "
        expected += "user.anonymous_id org.id"

        assert set(expected.split()) == IDS


class TestRoundTrip:
    """From the wire and back."""

    @pytest.mark.parametrize("case", VALID, ids=lambda case: case["name"])
    def test_valid_events_survive(self, case) -> None:
        """What a server accepts comes back the same, with the stamp in one form."""
        wire = case["event"]
        known = {
            key: value
            for key, value in wire.items()
            if value is not None and key in {*KEYS, "metadata"}
        }

        event = Event.from_wire(wire)
        back = event.to_wire()
        stamp = back.pop("event.timestamp", None)

        assert known == back
        assert event == Event.from_wire(event.to_wire())
        assert (stamp is None) == (not wire.get("event.timestamp"))
        if stamp is not None:
            assert parse_time(wire["event.timestamp"]) == parse_time(stamp)
            assert re.fullmatch(r"[0-9T:-]{19}\.[0-9]{6}Z", stamp)

    def test_null_is_the_same_as_absent(self) -> None:
        """Null fields, and an empty timestamp, are none."""
        wire = dict.fromkeys([*KEYS, "metadata"]) | {"event.timestamp": ""}

        assert Event(type="custom") == Event.from_wire(wire | {"event.type": "custom"})

    def test_unknown_keys_are_left_out(self) -> None:
        """A key that is no field does not come back."""
        wire = {"event.type": "custom", "nobody.knows": 1}

        assert {"event.type": "custom"} == Event.from_wire(wire).to_wire()

    def test_fractions_of_integers_are_rounded(self) -> None:
        """The frontend sends fractional durations, the server wants integers."""
        event = Event.from_wire({"event.type": "x", "api.duration_ms": 12.7})

        assert event.api_duration_ms == 13

    def test_the_metadata_is_a_copy(self) -> None:
        """What goes to the wire can be changed without changing the event."""
        event = Event(type="x", metadata={"a": 1})
        event.to_wire()["metadata"]["a"] = 2

        assert event.metadata == {"a": 1}

    @pytest.mark.parametrize(
        ("key", "value", "rule"),
        [
            *((key, 1, "a string") for key in TYPES["text"]),
            *((key, "1", "an integer") for key in TYPES["integer"]),
            *((key, "1", "a number") for key in TYPES["number"]),
            ("duration_ms", True, "an integer"),
            ("duration_ms", math.nan, "an integer"),
            ("duration_ms", math.inf, "an integer"),
            ("duration_ms", 2**63, "an integer"),
            ("duration_ms", 10**400, "an integer"),
            ("performance.cls", math.nan, "a number"),
            ("performance.cls", 10**400, "a number"),
            ("performance.cls", False, "a number"),
            ("metadata", [], "an object"),
            ("metadata", "{}", "an object"),
            ("event.timestamp", 1, "RFC 3339 with an offset"),
        ],
    )
    def test_wrong_types_are_refused(self, key: str, value: object, rule: str) -> None:
        """A value of a wrong type is an error that names the key and the rule."""
        with pytest.raises(InvalidEventError) as caught:
            Event.from_wire({"event.type": "custom", key: value})

        assert f"{key}: must be {rule}" == str(caught.value)

    @pytest.mark.parametrize("wire", [None, [], "event", 1])
    def test_only_objects_are_events(self, wire: object) -> None:
        """What is no JSON object is an error that names what it is."""
        with pytest.raises(InvalidEventError) as caught:
            Event.from_wire(wire)

        expected = f"event must be a JSON object (got {type(wire).__name__})."
        assert expected == str(caught.value)


class TestEvent:
    """The value."""

    def test_it_is_frozen(self) -> None:
        """A field cannot be set."""
        event = Event(type="custom")

        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            event.name = "other"  # type: ignore[misc]

    def test_replace_makes_another(self) -> None:
        """`replace` returns a copy; None takes a field away."""
        event = Event(type="custom", name="a", user_id="u")

        assert Event(type="custom", name="b") == event.replace(name="b", user_id=None)
        assert event.name == "a"

    def test_replace_knows_its_fields(self) -> None:
        """`replace` of what is no field is a TypeError."""
        with pytest.raises(TypeError, match="nam"):
            Event(type="custom").replace(nam="b")

    def test_it_is_public(self) -> None:
        """The package exports it."""
        assert pgtrack.Event is Event


class Zoneless(tzinfo):
    """A time zone that knows no offset."""

    def utcoffset(self, moment: object) -> None:
        """Return none."""


class TestTime:
    """Stamps."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("2026-03-02T08:15:00Z", datetime(2026, 3, 2, 8, 15, tzinfo=UTC)),
            ("2026-03-02T08:15:00.1Z", datetime(2026, 3, 2, 8, 15, 0, 100_000, UTC)),
            ("2026-03-02T08:15:00,12Z", datetime(2026, 3, 2, 8, 15, 0, 120_000, UTC)),
            (
                "2026-03-02T08:15:00.1234567899Z",
                datetime(2026, 3, 2, 8, 15, 0, 123_456, UTC),
            ),
            ("2026-03-02T10:15:00+02:00", datetime(2026, 3, 2, 8, 15, tzinfo=UTC)),
            ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
        ],
    )
    def test_stamps_are_read(self, text: str, expected: datetime) -> None:
        """Any RFC 3339 stamp with an offset becomes UTC, of microseconds."""
        assert expected == parse_time(text)

    @pytest.mark.parametrize(
        "text",
        [
            "2026-03-02T08:15:00",
            "2026-03-02 08:15:00Z",
            "2026-03-02t08:15:00z",
            "2026-03-02T08:15:00+0200",
            "2026-03-02T08:15:60Z",
            "2026-13-02T08:15:00Z",
            "2026-02-30T08:15:00Z",
            "2026-03-02T08:15:00.Z",
            "2026-03-02T08:15Z",
            "2026-03-02T08:15:00Z\n",
            "٢٠٢٦-03-02T08:15:00Z",
            "0001-01-01T00:00:00+23:59",
            "",
            None,
            0,
        ],
    )
    def test_others_are_refused(self, text: object) -> None:
        """What the server refuses is refused here."""
        with pytest.raises(
            InvalidEventError, match=r"^event\.timestamp: must be RFC 3"
        ):
            parse_time(text)

    @pytest.mark.parametrize("zone", [None, Zoneless()])
    def test_naive_times_are_local(
        self, monkeypatch: pytest.MonkeyPatch, zone: tzinfo | None
    ) -> None:
        """A datetime without an offset is taken for local time, as in Python."""
        import time

        monkeypatch.setenv("TZ", "UTC-2")
        time.tzset()
        try:
            ns = time_to_ns(datetime(1970, 1, 1, 3, 0, 0, 1, tzinfo=zone))
        finally:
            monkeypatch.undo()
            time.tzset()

        assert ns == 3_600_000_001_000

    def test_microseconds_are_exact(self) -> None:
        """No digit is lost on the way through nanoseconds, however far the year."""
        moment = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)

        assert time_to_ns(moment) == (
            (moment - datetime(1970, 1, 1, tzinfo=UTC))
            // timedelta(microseconds=1)
            * 1_000
        )


class TestJSON:
    """The text of events."""

    def test_it_is_compact_and_keeps_characters(self) -> None:
        """No blanks, and no escapes where UTF-8 will do."""
        assert encode_json({"a": ["é", 1]}) == '{"a":["é",1]}'

    def test_it_comes_back(self) -> None:
        """What was encoded is decoded."""
        assert decode_json(encode_json({"a": [None, 1.5]}).encode()) == {
            "a": [None, 1.5]
        }

    def test_nan_is_no_json(self) -> None:
        """NaN raises rather than costing a batch."""
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode_json(math.nan)
