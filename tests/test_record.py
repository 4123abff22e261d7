"""From the arguments of emit to the bytes that leave."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import fractions
import json
import uuid
from http import HTTPStatus
from typing import Any

import attrs
import pytest

import pgtrack
from pgtrack import _diagnostics
from pgtrack._event import FIELDS
from pgtrack._keys import DEFAULT_RULE, REDACTED, KeyRule
from pgtrack._ledger import Ledger
from pgtrack._record import (
    Encoder,
    take_field,
    take_id,
    take_metadata,
    take_time,
    take_type,
)
from pgtrack._snapshot import MARGIN, MAX_KEY, MAX_TEXT
from pgtrack.testing import SequentialIds, capture

UTC = dt.timezone.utc
CUT = "...[cut]"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm4ifQ.c2lnbmF0dXJlLW9mLWFubg"
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "MIIEow" * 1_000
    + "\n-----END RSA PRIVATE KEY-----"
)


@pytest.fixture(name="ledger")
def _ledger() -> Ledger:
    return Ledger()


def adjusted(ledger: Ledger) -> dict[str, int]:
    """Return what was adjusted."""
    return dict(ledger.stats().adjusted)


class Kind(str, enum.Enum):
    """An enum of texts."""

    CUSTOM = "custom"


class TestFields:
    """One field."""

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("name", "text", "text"),
            ("name", "", ""),
            ("name", 5, "5"),
            ("name", None, "null"),
            ("name", Kind.CUSTOM, "custom"),
            ("name", {"a": [1]}, '{"a":[1]}'),
            ("name", b"bytes", "bytes"),
            ("ui_state_before", {"a": (1, 2)}, '{"a":[1,2]}'),
            ("ui_state_before", '{"a": 1}', '{"a": 1}'),
            ("ui_state_after", [None], "[null]"),
            ("ui_state_after", 5, "5"),
            ("ui_state_after", {"password": 1}, f'{{"password":"{REDACTED}"}}'),
            ("duration_ms", 12, 12),
            ("duration_ms", 12.5, 12),
            ("duration_ms", 12.51, 13),
            ("duration_ms", "12.51", 13),
            ("duration_ms", " 9007199254740993 ", 9007199254740993),
            ("duration_ms", dt.timedelta(seconds=1.5), 1_500),
            ("duration_ms", decimal.Decimal("1E+3"), 1_000),
            ("duration_ms", fractions.Fraction(7, 2), 4),
            ("duration_ms", True, 1),
            ("duration_ms", 2**63 - 1, 2**63 - 1),
            ("api_status_code", HTTPStatus.NOT_FOUND, 404),
            ("sequence", -(2**63), -(2**63)),
            ("performance_cls", 0.25, 0.25),
            ("performance_cls", 3, 3),
            ("performance_cls", 2**70, 2.0**70),
            ("performance_cls", "0.25", 0.25),
            ("performance_cls", decimal.Decimal("0.25"), 0.25),
            ("org_id", "org-1", "org-1"),
            ("org_id", 77, "77"),
            ("user_anonymous_id", uuid.UUID(int=1), str(uuid.UUID(int=1))),
        ],
    )
    def test_values_become_what_the_column_wants(
        self, ledger: Ledger, name: str, value: Any, expected: Any
    ) -> None:
        """A value that says what the column holds is converted, and not counted."""
        value, _ = take_field(name, value, DEFAULT_RULE, ledger)

        assert (type(expected), expected) == (type(value), value)
        assert adjusted(ledger) == {}

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("duration_ms", "soon"),
            ("duration_ms", "1" * 5_000_000),
            ("duration_ms", "1e999999999"),
            ("duration_ms", decimal.Decimal("1E+999999999")),
            ("duration_ms", decimal.Decimal("NaN")),
            ("duration_ms", float("nan")),
            ("duration_ms", float("inf")),
            ("duration_ms", 2**63),
            ("duration_ms", 2.0**63),
            ("duration_ms", [1]),
            ("duration_ms", 1j),
            ("duration_ms", object()),
            ("performance_cls", "nan"),
            ("performance_cls", 10**400),
            ("performance_cls", "x"),
            ("performance_cls", float("inf")),
            ("org_id", "with blank"),
            ("org_id", "x" * 256),
            ("org_id", ""),
            ("org_id", True),
            ("user_anonymous_id", object()),
        ],
    )
    def test_what_cannot_be_is_left_out(
        self, ledger: Ledger, name: str, value: object
    ) -> None:
        """A value that the column cannot hold is left out, and counted."""
        assert take_field(name, value, DEFAULT_RULE, ledger) == (None, 0)
        assert adjusted(ledger) == {"field": 1}

    def test_what_is_lost_of_a_text_is_counted(self, ledger: Ledger) -> None:
        """A text that only says what could not be shown is counted."""
        value, _ = take_field("name", float("nan"), DEFAULT_RULE, ledger)

        assert value == "NaN"
        assert adjusted(ledger) == {"field": 1}

    @pytest.mark.parametrize("name", [f.name for f in FIELDS.values() if f.width])
    def test_long_texts_keep_a_margin(self, ledger: Ledger, name: str) -> None:
        """5 MB do not go into the queue."""
        if FIELDS[name].is_id:
            return
        width = FIELDS[name].width
        value, size = take_field(name, "x" * 5_000_000, DEFAULT_RULE, ledger)

        assert value == "x" * (width + MARGIN)
        assert width + MARGIN < size < width + MARGIN + 100


class TestIds:
    """What identifies."""

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("user_id", "u_1", "u_1"),
            ("user_id", "ann@example.com", "ann@example.com"),
            ("user_id", 42, "42"),
            ("user_id", uuid.UUID(int=1), str(uuid.UUID(int=1))),
            ("user_id", Kind.CUSTOM, "custom"),
            ("user_id", "x" * 255, "x" * 255),
            ("session_id", "sess_1", "sess_1"),
            ("session_id", "x" * 128, "x" * 128),
            ("request_id", "a/b=c@d", "a/b=c@d"),
            ("event_id", "!", "!"),
        ],
    )
    def test_ids_that_fit_stay(
        self, ledger: Ledger, name: str, value: object, expected: str
    ) -> None:
        """Ids are visible ASCII; integers, UUIDs and enums will do."""
        assert expected == take_id(name, value, ledger)
        assert adjusted(ledger) == {}

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(
                (name, "")
                for name in ("user_id", "session_id", "request_id", "event_id")
            ),
            ("user_id", "x" * 256),
            ("user_id", "a b"),
            ("user_id", "é"),
            ("user_id", "a\n"),
            ("user_id", True),
            pytest.param("user_id", 10**5_000, id="many digits"),
            ("user_id", 1.5),
            ("user_id", object()),
            ("session_id", "x" * 129),
            ("session_id", "-a"),
            ("session_id", "a/b"),
            ("request_id", "a b"),
            ("event_id", "a b"),
            ("event_id", b"bytes"),
        ],
    )
    def test_others_are_counted(self, ledger: Ledger, name: str, value: object) -> None:
        """An id that does not fit is none, and counted by its name."""
        assert take_id(name, value, ledger) is None
        assert adjusted(ledger) == {name: 1}

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("custom", "custom"),
            (Kind.CUSTOM, "custom"),
            (b"custom", "custom"),
            ("", None),
            (5, None),
            (None, None),
            ("x" * 5_000_000, "x" * (255 + MARGIN)),
        ],
    )
    def test_types_are_any_text(self, value: object, expected: str | None) -> None:
        """An event type is any text but the empty one."""
        assert expected == take_type(value, DEFAULT_RULE)


class TestTime:
    """When it happened."""

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (dt.datetime(1970, 1, 1, 0, 0, 1, 5, UTC), 1_000_005_000),
            (
                dt.datetime(1970, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-1))),
                3_600_000_000_000,
            ),
            (dt.datetime.min.replace(tzinfo=UTC), -62_135_596_800_000_000_000),
        ],
    )
    def test_aware_times_are_exact(
        self, ledger: Ledger, value: dt.datetime, expected: int
    ) -> None:
        """An aware datetime is taken as it is."""
        assert expected == take_time(value, 5, ledger)
        assert adjusted(ledger) == {}

    def test_naive_times_are_local_and_counted(self, ledger: Ledger) -> None:
        """A naive datetime is local time."""
        moment = dt.datetime(2026, 1, 1)  # noqa: DTZ001  that is the case

        assert take_time(moment, 5, ledger) == moment.timestamp() * 1e9
        assert adjusted(ledger) == {"timestamp": 1}

    @pytest.mark.parametrize(
        "value", [0, 1.5, "2026-01-01T00:00:00Z", dt.date(2026, 1, 1), object()]
    )
    def test_what_is_no_time_is_now(self, ledger: Ledger, value: object) -> None:
        """Anything else is replaced by now, and counted."""
        assert take_time(value, 5, ledger) == 5
        assert adjusted(ledger) == {"timestamp": 1}

    @pytest.mark.parametrize(
        ("offset", "expected"),
        [
            (dt.timedelta(hours=14), "0001-01-01T00:00:00.000000Z"),
            (-dt.timedelta(hours=14), "0001-01-01T14:00:00.000000Z"),
        ],
    )
    def test_times_before_the_year_one(
        self, offset: dt.timedelta, expected: str
    ) -> None:
        """What the format cannot write goes out as the nearest that it can."""
        moment = dt.datetime.min.replace(tzinfo=dt.timezone(offset))
        with capture() as events:
            pgtrack.emit("custom", timestamp=moment)

        assert expected == events[0].to_wire()["event.timestamp"]


class TestMetadata:
    """The rest."""

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ([1], {"value": [1]}),
            ("text", {"value": "text"}),
            (5, {"value": 5}),
        ],
    )
    def test_what_is_no_mapping_is_wrapped(
        self, ledger: Ledger, value: object, expected: dict[str, Any]
    ) -> None:
        """The server wants an object: anything else stands under `value`."""
        metadata, _ = take_metadata(value, DEFAULT_RULE, ledger)

        assert expected == metadata
        assert adjusted(ledger) == {"metadata": 1}

    def test_losses_are_counted_once(self, ledger: Ledger) -> None:
        """Metadata that lost something counts once, however much it was."""
        take_metadata({"a": float("nan"), "b": float("nan")}, DEFAULT_RULE, ledger)
        take_metadata({"a": {1, 2}}, DEFAULT_RULE, ledger)

        assert adjusted(ledger) == {"metadata": 1}


def one(**fields: Any) -> pgtrack.Event:
    """Return the event that comes of these fields."""
    with capture() as events:
        assert pgtrack.emit(fields.pop("type", "custom"), **fields)
    (event,) = events
    return event


class TestCutting:
    """Widths and marks."""

    @pytest.mark.parametrize(
        "name", [f.name for f in FIELDS.values() if f.width and not f.is_id]
    )
    def test_texts_are_cut_to_their_width(self, name: str) -> None:
        """A text of the width stays, a longer one is cut and marked."""
        width = FIELDS[name].width
        mark = CUT if width > 100 else "..."

        whole = one(**{name: "x" * width})
        assert getattr(whole, name) == "x" * width
        for length in (width + 1, width + MARGIN, 5_000_000):
            cut = getattr(one(**{name: "x" * length}), name)
            assert cut == ("x" * width)[: -len(mark)] + mark

    def test_texts_in_metadata_are_cut(self) -> None:
        """Texts and keys in the metadata have widths, too."""
        event = one(metadata={"a": ["x" * 5_000_000], "k" * 5_000: 1})
        key = "k" * (MAX_KEY - len(CUT)) + CUT

        assert event.metadata == {
            "a": ["x" * (MAX_TEXT - len(CUT)) + CUT],
            key: 1,
            "source": "backend",
        }

    def test_cuts_are_counted(self) -> None:
        """Each text that was cut counts."""
        with capture():
            pgtrack.emit("custom", name="x" * 300, page_title="x" * 300)
            counted = pgtrack.stats().adjusted

        assert counted == {"event_cut": 2}

    @pytest.mark.parametrize("secret", ["ann@example.com", JWT, "4111 1111 1111 1111"])
    @pytest.mark.parametrize("name", ["name", "error_message", "metadata"])
    @pytest.mark.parametrize("more", ["", " and so on" * 10, " and so on" * 1_000])
    def test_a_secret_across_the_cut_is_seen(
        self, secret: str, name: str, more: str
    ) -> None:
        """Wherever the cut goes through a secret, none of it leaves."""
        width = MAX_TEXT if name == "metadata" else FIELDS[name].width
        for at in range(len(secret) + len(CUT) + 1):
            text = "ab " * width
            text = text[: width - at] + f" {secret}" + more
            event = one(**{name: {"k": text} if name == "metadata" else text})
            left = json.dumps(event.to_wire())

            assert secret[:6] not in left

    def test_what_others_lost_does_not_pull_the_end_in(self) -> None:
        """Where redaction makes a text shorter, half a secret at its end stays out."""
        text = f"{JWT} " * 1_000
        start = MAX_TEXT + MARGIN - 8
        text = text[: start - 1].rsplit(" ", 1)[0].ljust(start) + "4111 1111 1111 1111"
        message = str(one(error_message=text).error_message)

        assert "4111" not in message
        assert "eyJ" not in message
        assert message.endswith(CUT)

    @pytest.mark.parametrize(
        "secret",
        [
            PEM,
            "eyJ" + "a" * 5_000 + "." + "b" * 5_000,
            "eyJ" + "a" * 500 + "." + "b" * 5_000,
            f"eyJhbGciOiJIUzI1NiJ9.{'a' * 5_000}.{'b' * 50}",
            f"Bearer {'a1' * 5_000}",
            f"password={'hunter2' * 1_000}",
            f"'token': '{'a1' * 5_000}'",
        ],
        ids=lambda secret: secret[:12],
    )
    @pytest.mark.parametrize("before", [0, 10, 14_000, MAX_TEXT - 20, MAX_TEXT + 900])
    def test_secrets_longer_than_the_margin(self, secret: str, before: int) -> None:
        """A secret whose end is out of sight is known by its beginning."""
        text = ("word " * 10_000)[:before] + " " + secret + " the end"
        left = str(one(error_message=text).error_message)

        assert "eyJ" not in left
        assert "a" * 20 not in left
        assert "a1" * 10 not in left
        assert "hunter2" not in left
        assert "MIIE" not in left

    def test_keys_that_are_secrets_stay_apart(self) -> None:
        """Two keys that are redacted to the same keep both values."""
        event = one(metadata={"n": {"ann@example.com": 1, "bob@example.com": 2}})

        assert event.metadata is not None
        assert event.metadata["n"] == {REDACTED: 1, f"{REDACTED} (1)": 2}

    def test_numbers_of_cards_go(self) -> None:
        """A card's number is one as a number, too."""
        event = one(metadata={"n": [4111111111111111, 4111111111111112, 5.5, True]})

        assert event.metadata is not None
        assert event.metadata["n"] == [REDACTED, 4111111111111112, 5.5, True]

    def test_characters_that_parsers_refuse_are_replaced(self) -> None:
        """NUL and lone surrogates become U+FFFD, pairs of them what they stand for."""
        event = one(name="a\0b\ud800c\ud83d\ude00", metadata={"\udfff": "\0"})

        assert event.name == "a\ufffdb\ufffdc\N{GRINNING FACE}"
        assert event.metadata == {"\ufffd": "\ufffd", "source": "backend"}


class TestBytes:
    """The size of an event."""

    def emit(self, limit: int, **fields: Any) -> tuple[list[pgtrack.Event], Any]:
        """Return the events under *limit*, and the ledger."""
        with capture(max_event_bytes=limit) as events:
            pgtrack.emit("custom", **fields)
            stats = pgtrack.stats()
        return events, stats

    def test_the_largest_metadata_goes_first(self) -> None:
        """As much of the metadata is replaced by a mark as has to be."""
        metadata = {"a": ["x" * 900], "b": "y" * 400, "c": 1}
        events, stats = self.emit(1_000, metadata=metadata, name="n" * 200)

        assert events[0].metadata == {
            "a": "[904 bytes cut]",
            "b": "y" * 400,
            "c": 1,
            "source": "backend",
        }
        assert events[0].name == "n" * 200
        assert stats.adjusted == {"event_cut": 1}

    def test_many_small_values_go_together(self) -> None:
        """Where no value is large, all but the reserved keys go."""
        metadata = {f"k{i}": i for i in range(500)}
        events, _ = self.emit(1_000, metadata=metadata, request_id="r1")

        assert events[0].metadata == {
            "source": "backend",
            "request_id": "r1",
            "...": "[500 more cut]",
        }

    def test_then_long_texts(self) -> None:
        """If the metadata is not enough, texts are cut to their beginning."""
        events, _ = self.emit(2_000, error_message="m" * 9_000, error_type="t" * 150)

        assert events[0].error_message == "m" * 100 + CUT
        assert events[0].error_type == "t" * 150

    def test_then_the_event(self) -> None:
        """What is still too large is dropped, counted."""
        texts = dict.fromkeys(("name", "page_title", "error_type"), "x" * 200)
        events, stats = self.emit(
            1_000, **texts, api_path="y" * 200, page_path="y" * 200
        )

        assert events == []
        assert stats.dropped == {"too_large": 1}
        assert stats.is_balanced

    def test_bytes_count_rather_than_characters(self) -> None:
        """Text of four bytes a character reaches the limit four times as soon."""
        events, _ = self.emit(10_000, metadata={"a": "\N{GRINNING FACE}" * 3_000})

        assert events[0].metadata == {"a": "[12002 bytes cut]", "source": "backend"}

    @pytest.mark.parametrize("limit", [1_000, 5_000, 100_000])
    def test_no_event_is_larger(self, limit: int) -> None:
        """Whatever it holds, an event has at most so many bytes."""
        texts = {
            f.name: "é" * 20_000 for f in FIELDS.values() if f.width and not f.is_id
        }
        metadata = {f"k{i}": ["z" * 5_000] * 3 for i in range(50)}
        ledger = Ledger()
        config = pgtrack.Config.isolated(
            project_id="p", endpoint="console:", max_event_bytes=limit
        )
        encoder = Encoder(config, DEFAULT_RULE, ledger, None)
        for fields in ({}, {"error_message": "m" * 20_000}, texts):
            taken = {
                n: take_field(n, v, DEFAULT_RULE, ledger)[0] for n, v in fields.items()
            }
            record = (0, "custom", "s", None, {}, taken, metadata, None, 0)
            ((data, _),) = encoder.encode([record])  # type: ignore[list-item]

            assert data is None or len(data) <= limit


class TestReserved:
    """What pgtrack itself puts into the metadata."""

    def test_reserved_keys_win(self) -> None:
        """The caller's values under reserved keys are replaced, and counted."""
        mine = dict.fromkeys(
            ["source", "service", "release", "environment", "request_id"], "mine"
        )
        with capture(service="s", release="r", environment="e") as events:
            pgtrack.emit("custom", metadata={**mine, "a": 1}, request_id="req")
            counted = pgtrack.stats().adjusted

        assert events[0].metadata == {
            "source": "backend",
            "service": "s",
            "release": "r",
            "environment": "e",
            "request_id": "req",
            "a": 1,
        }
        assert counted == {"reserved_key": 1}

    def test_keys_of_what_is_not_set_are_free(self) -> None:
        """Without a `service` of ours, the caller may name one."""
        event = one(metadata={"service": "theirs"})

        assert event.metadata == {"service": "theirs", "source": "backend"}

    def test_static_metadata_is_in_each_event(self) -> None:
        """The nearer wins: of settings, session and event, the event."""
        with capture(metadata={"a": 1, "b": 1, "c": 1, "password": 1}) as events:
            with pgtrack.session(metadata={"b": 2, "c": 2}):
                pgtrack.emit("custom", metadata={"c": 3})
            counted = pgtrack.stats().adjusted

        assert events[0].metadata == {
            "a": 1,
            "b": 2,
            "c": 3,
            "password": REDACTED,
            "source": "backend",
        }
        assert counted == {}


class TestRedaction:
    """By key before the queue, by pattern before the wire."""

    def test_patterns_go_from_texts_and_keys(self) -> None:
        """Messages, paths, keys and values lose their secrets."""
        event = one(
            type="for ann@example.com",
            error_message="bad card 4111 1111 1111 1111",
            page_url="https://u:p@a.example/?token=t&q=1",
            metadata={"to": ["ann@example.com"], "bob@example.com": 1},
        )
        left = json.dumps(event.to_wire())

        assert "ann@" not in left
        assert "bob@" not in left
        assert "4111" not in left
        assert "token=t" not in left
        assert "u:p" not in left

    def test_identifiers_stay(self) -> None:
        """Ids are what they are."""
        event = one(user_id="ann@example.com", org_id="4111111111111111")

        assert (event.user_id, event.org_id) == ("ann@example.com", "4111111111111111")

    def test_own_keys_are_each_client_s(self) -> None:
        """A session's metadata is redacted by the rule of the client that sends it."""
        with pgtrack.session(metadata={"pet": "rex"}):
            with capture(redact_keys=["pet"]) as strict:
                pgtrack.emit("custom", metadata={"pet": "tom"}, name="pet=rex")
                pgtrack.emit("custom")
            with capture() as lenient:
                pgtrack.emit("custom", name="pet=rex")

        assert [e.metadata["pet"] for e in strict if e.metadata] == [REDACTED] * 2
        assert strict[0].name == f"pet={REDACTED}"
        assert lenient[0].metadata == {"pet": "rex", "source": "backend"}
        assert lenient[0].name == "pet=rex"


class TestEventIds:
    """The id of an event."""

    def test_it_is_new(self) -> None:
        """Each event has an id of its own."""
        with capture(ids=SequentialIds()) as events:
            pgtrack.emit("custom")
            pgtrack.emit("custom")

        assert [e.event_id[-2:] for e in events if e.event_id] == ["01", "02"]

    def test_the_caller_s_is_honoured(self) -> None:
        """An id of visible ASCII is kept."""
        given = ["order-7!", str(uuid.UUID(int=7)), "x" * 255]

        assert given == [one(event_id=event_id).event_id for event_id in given]

    @pytest.mark.parametrize("given", ["", "a b", "é", "x" * 256, "a\0", 1.5])
    def test_others_are_replaced(self, given: Any) -> None:
        """An id that does not fit is replaced by a new one, and counted."""
        with capture(ids=SequentialIds()) as events:
            pgtrack.emit("custom", event_id=given)
            counted = pgtrack.stats().adjusted

        assert events[0].event_id == "00000000-0000-4000-8000-000000000001"
        assert counted == {"event_id": 1}


class TestBeforeSend:
    """The user's hook."""

    def emit(self, hook: Any, **fields: Any) -> tuple[list[pgtrack.Event], Any]:
        """Return what leaves under *hook*, and the ledger."""
        with capture(before_send=hook, ids=SequentialIds()) as events:
            with pgtrack.session("sess_1", user_id="u_1"):
                pgtrack.emit("custom", **fields)
            stats = pgtrack.stats()
        return events, stats

    def test_it_sees_the_event(self) -> None:
        """The hook gets a frozen Event as it would leave, patterns still in it."""
        seen: list[pgtrack.Event] = []
        self.emit(seen.append, name="to ann@example.com", metadata={"password": "p"})

        assert isinstance(seen[0], pgtrack.Event)
        assert seen[0].name == "to ann@example.com"
        assert seen[0].metadata == {"password": REDACTED, "source": "backend"}
        assert seen[0].session_id == "sess_1"
        assert seen[0].timestamp is not None
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            seen[0].name = "x"  # type: ignore[misc]

    def test_it_may_change(self) -> None:
        """What it returns is what leaves, redacted by pattern."""
        moment = dt.datetime(2026, 1, 1, tzinfo=UTC)

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            return event.replace(
                name="to ann@example.com",
                user_id=None,
                timestamp=moment,
                event_id="mine",
                metadata={"a": {1}, "password": "p"},
            )

        events, stats = self.emit(hook, page_path="/a")

        assert events == [
            pgtrack.Event(
                type="custom",
                event_id="mine",
                project_id="test",
                product_id="test",
                session_id="sess_1",
                timestamp=moment,
                name=f"to {REDACTED}",
                page_path="/a",
                metadata={"a": [1], "password": REDACTED},
            )
        ]
        assert stats.adjusted == {}

    def test_it_may_drop(self) -> None:
        """None drops the event, counted."""
        events, stats = self.emit(lambda _: None)

        assert events == []
        assert stats.dropped == {"before_send": 1}
        assert stats.is_balanced

    @pytest.mark.parametrize(
        "error", [ValueError("s3cret"), SystemExit(1), GeneratorExit()]
    )
    def test_it_fails_closed(
        self, error: BaseException, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A hook that raises drops the event; the log names the error's type."""

        def hook(event: pgtrack.Event) -> None:
            raise error

        events, stats = self.emit(hook)
        _diagnostics.tell()

        assert events == []
        assert stats.dropped == {"before_send_error": 1}
        assert f"before_send raised {type(error).__name__}" in caplog.text
        assert "s3cret" not in caplog.text

    @pytest.mark.parametrize("garbage", [{"event.type": "x"}, "event", 5, True])
    def test_garbage_is_an_error(
        self, garbage: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What is neither an Event nor None drops the event."""
        events, stats = self.emit(lambda _: garbage)
        _diagnostics.tell()

        assert events == []
        assert stats.dropped == {"before_send_error": 1}
        assert f"before_send returned {type(garbage).__name__} rather" in caplog.text

    @pytest.mark.parametrize(
        "name", ["event_id", "project_id", "product_id", "session_id", "type"]
    )
    @pytest.mark.parametrize("value", [None, "", 1.5])
    def test_it_cannot_break_what_is_required(self, name: str, value: Any) -> None:
        """A required field that is taken away, or spoilt, is put back."""
        (before,), _ = self.emit(None)
        (event,), _ = self.emit(lambda e: e.replace(**{name: value}))
        expected = "1.5" if (name, value) == ("type", 1.5) else getattr(before, name)

        assert expected == getattr(event, name)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"duration_ms": 1.7}, {"duration_ms": 2}),
            ({"duration_ms": "soon"}, {"duration_ms": None}),
            ({"name": b"bytes"}, {"name": "bytes"}),
            ({"name": "x" * 300}, {"name": "x" * 247 + CUT}),
            ({"user_id": "a b"}, {"user_id": None}),
            ({"user_id": 7}, {"user_id": "7"}),
            ({"metadata": "text"}, {"metadata": {"value": "text"}}),
            ({"metadata": None}, {"metadata": {}}),
            ({"metadata": {1: float("nan")}}, {"metadata": {"1": "NaN"}}),
        ],
    )
    def test_bad_values_are_converted(
        self, changes: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        """What the hook sets is converted as emit's arguments are."""
        (event,), stats = self.emit(lambda e: e.replace(**changes))

        assert expected == {name: getattr(event, name) for name in expected}
        assert stats.dropped == {}

    @pytest.mark.parametrize("moment", [None, "yesterday", 5])
    def test_the_time_is_put_back(self, moment: Any) -> None:
        """A timestamp that is none leaves the event's own."""
        own = dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
        (event,), _ = self.emit(lambda e: e.replace(timestamp=moment), timestamp=own)

        assert event.timestamp == own

    def test_what_it_changes_in_place_is_this_event_s(self) -> None:
        """The hook's metadata is its own, not that of the session."""

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            assert event.metadata is not None
            event.metadata["list"].append(1)  # type: ignore[union-attr]
            return event

        listed = pgtrack.session(metadata={"list": []})
        with capture(before_send=hook) as events, listed:
            pgtrack.emit("custom")
            pgtrack.emit("custom")

        assert [e.metadata["list"] for e in events if e.metadata] == [[1], [1]]

    def test_it_may_emit_without_end_or_effect(self) -> None:
        """What the hook itself emits is dropped as pgtrack's own."""

        def hook(event: pgtrack.Event) -> pgtrack.Event:
            pgtrack.emit("custom", name="from the hook")
            return event

        events, stats = self.emit(hook, name="n")

        assert [event.name for event in events] == ["n"]
        assert stats.dropped == {"suppressed": 1}

    def test_ctrl_c_is_the_host_s(self) -> None:
        """Where the hook runs on the caller's thread, Ctrl-C gets through."""

        def hook(event: pgtrack.Event) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.emit(hook)


class TestEncoder:
    """Many records."""

    def test_one_that_fails_costs_no_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of our own drops its event alone, counted."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        ledger = Ledger()
        config = pgtrack.Config.isolated(project_id="p", endpoint="console:")
        encoder = Encoder(config, KeyRule(), ledger, SequentialIds())
        good = (0, "custom", "s", None, {}, {}, None, None, 0)
        bad = (0, "custom", "s", None, {}, {"name": object()}, None, None, 0)

        encoded = list(encoder.encode([good, bad, good]))  # type: ignore[list-item]

        assert [data is None for data, _ in encoded] == [False, True, False]
        assert [record for _, record in encoded] == [good, bad, good]
        assert ledger.stats().dropped == {"internal_error": 1}
