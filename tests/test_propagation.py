from __future__ import annotations

import asyncio
import email.message
import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pgtrack
from harness import load_vectors
from pgtrack._context import Frame, is_journey_id, is_request_id, is_session_id
from pgtrack._propagation import Incoming, extract, inject
from pgtrack.testing import capture

# The first text on a machine takes seconds: hypothesis makes its tables.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CASES = load_vectors("session_ids")["cases"]
UUID = "2b1f6c1e-7d52-4c55-9a53-0c9f1d6b8e21"
ALL = {
    "X-Session-ID": "s1",
    "X-Request-ID": "r1",
    "X-User-ID": "u1",
    "X-Journey-ID": "j1",
}


def message(headers: dict[str, str]) -> email.message.Message:
    """
    Return the headers as `http.server` and `http.client` have them.
    """
    made = email.message.Message()
    for name, value in headers.items():
        made[name] = value
    return made


class TestExtract:
    """
    Headers come in.
    """

    @pytest.mark.parametrize(
        "headers",
        [
            ALL,
            {name.lower(): value for name, value in ALL.items()},
            {name.upper(): value.encode() for name, value in ALL.items()},
            {name.encode(): value.encode() for name, value in ALL.items()},
            list(ALL.items()),
            tuple(
                (name.lower().encode(), value.encode()) for name, value in ALL.items()
            ),
            iter(ALL.items()),
            message(ALL),
            {name: f" \t{value} \t" for name, value in ALL.items()},
        ],
        ids=lambda headers: type(headers).__name__,
    )
    def test_forms(self, headers: Any) -> None:
        """Mappings and pairs are read, as text or bytes, names in any case."""
        incoming = extract(headers, is_trusted=True)

        assert incoming == Incoming(
            session_id="s1", request_id="r1", user_id="u1", journey_id="j1"
        )

    @pytest.mark.parametrize("headers", [None, {}, [], {"X-Other": "x"}, {1: 2}])
    def test_nothing(self, headers: Any) -> None:
        """Without any of the headers there is nothing, and nothing is refused."""
        assert extract(headers, is_trusted=True) == Incoming()

    def test_untrusted(self) -> None:
        """Untrusted, user and journey are neither read nor refused."""
        headers = {**ALL, "X-User-ID": "a b", "X-Journey-ID": "\n"}

        assert extract(headers) == Incoming(session_id="s1", request_id="r1")

    @pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["value"])[:40])
    @pytest.mark.parametrize("form", ["token", "uuid"])
    def test_vectors(self, case: dict[str, Any], form: Any) -> None:
        """A session id that does not fit is as good as none, and said to be refused."""
        is_valid = case["lenient" if form == "token" else "strict_uuid"]

        incoming = extract({"X-Session-ID": case["value"]}, session_id_format=form)

        expected = (case["value"], ()) if is_valid else (None, ("session_id",))
        assert (incoming.session_id, incoming.refused) == expected

    @pytest.mark.parametrize(
        ("pairs", "expected"),
        [
            ([("X-Session-ID", "a"), ("x-session-id", "b")], "a"),
            ([("X-Session-ID", "a b"), ("X-Session-ID", "b")], None),
            ([("X-Session-ID", None), ("X-Session-ID", "b")], "b"),
            ([("X-Session-ID", ["b"])], None),
            ([(None, "b")], None),
        ],
    )
    def test_duplicates(self, pairs: Any, expected: str | None) -> None:
        """Of two headers with a name the first counts, be it valid or not."""
        assert extract(pairs).session_id == expected

    def test_refused(self) -> None:
        """What came and did not fit is named, once each."""
        headers = dict.fromkeys(ALL, "a\nb")

        assert extract(headers, is_trusted=True) == Incoming(
            refused=("session_id", "request_id", "user_id", "journey_id")
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("%F0%9F%9B%92" * 255, "\N{SHOPPING TROLLEY}" * 255),
            ("%41" * 256, None),
            ("%41" * 100_000, None),
        ],
        ids=["longest", "longer", "endless"],
    )
    def test_long_journeys(self, text: str, expected: str | None) -> None:
        """A journey arrives up to 255 characters, however they are spelt."""
        assert extract({"X-Journey-ID": text}, is_trusted=True).journey_id == expected

    @unhurried
    @given(st.dictionaries(st.sampled_from([*ALL]), st.text() | st.binary()))
    def test_anything(self, headers: dict[str, Any]) -> None:
        """Whatever the values are, what is let in fits its grammar."""
        incoming = extract(headers, is_trusted=True)

        assert incoming.session_id is None or is_session_id(incoming.session_id)
        assert incoming.request_id is None or is_request_id(incoming.request_id)
        assert incoming.journey_id is None or is_journey_id(incoming.journey_id)


class TestInject:
    """
    Headers go out.
    """

    def test_outside(self) -> None:
        """Outside of a session there are none."""
        assert pgtrack.propagation_headers() == {}
        assert pgtrack.propagation_headers(trusted=True) == {}
        assert inject(Frame(None), is_trusted=True) == {}

    def test_public(self) -> None:
        """Session and request are public; user and journey only go where trusted."""
        with pgtrack.continued_from(ALL, trusted=True):
            public = pgtrack.propagation_headers()
            trusted = pgtrack.propagation_headers(True)

        assert public == {"X-Session-ID": "s1", "X-Request-ID": "r1"}
        assert trusted == ALL

    @unhurried
    @example("\ud800")
    @given(st.text(max_size=300))
    def test_round_trip(self, journey_id: str) -> None:
        """A journey of any text arrives as it was, in plain ASCII, or not at all."""
        frame = Frame(None, session_id="s", journey_id=journey_id)

        headers = inject(frame, is_trusted=True)

        assert all(value.isascii() for value in headers.values())
        assert not any(set("\r\n\0 ") & set(value) for value in headers.values())
        arrived = extract(headers, is_trusted=True).journey_id
        fits = is_journey_id(journey_id)
        assert arrived == (journey_id if fits else None)
        assert ("X-Journey-ID" in headers) == fits


class TestContinuedFrom:
    """
    The block on the other side.
    """

    def test_goes_on(self) -> None:
        """Session and request of the headers are those of the block."""
        with pgtrack.continued_from(ALL) as run:
            context = pgtrack.current()

        assert run.session_id == "s1"
        assert context == pgtrack.Context(session_id="s1", request_id="r1")
        assert pgtrack.current() == pgtrack.Context()

    @pytest.mark.parametrize("trusted", [True, False])
    def test_round_trip(self, *, trusted: bool) -> None:
        """What one side propagates the other has, its metadata excepted."""
        with (
            pgtrack.session("s", user_id="u", metadata={"k": 1}),
            pgtrack.continued_from({"X-Session-ID": "s", "X-Request-ID": "r"}),
            pgtrack.journey("Kasse/ü ✓"),
        ):
            headers = pgtrack.propagation_headers(trusted)

        with pgtrack.continued_from(headers, trusted):
            context = pgtrack.current()

        assert context == pgtrack.Context(
            session_id="s",
            request_id="r",
            user_id="u" if trusted else None,
            journey_id="Kasse/ü ✓" if trusted else None,
        )

    @pytest.mark.parametrize("headers", [{}, None, {"X-Session-ID": "a b"}])
    def test_fresh(self, headers: Any) -> None:
        """Without a valid session each entry has a fresh one, and a new request id."""
        block = pgtrack.continued_from(headers)
        contexts = []
        for _ in range(2):
            with block:
                contexts.append(pgtrack.current())

        first, second = contexts
        assert str(first.session_id).startswith("srv-")
        assert first.session_id != second.session_id
        assert first.request_id is not None
        assert first.request_id != second.request_id

    def test_strict(self) -> None:
        """With UUIDs asked for, others are replaced by a UUID, and counted."""
        with capture(session_id_format="uuid"):
            with pgtrack.continued_from({"X-Session-ID": UUID}) as taken:
                pass
            with pgtrack.continued_from({"X-Session-ID": "s1"}) as replaced:
                pass
            adjusted = dict(pgtrack.stats().adjusted)

        assert taken.session_id == UUID
        assert is_session_id(replaced.session_id, "uuid")
        assert adjusted == {"session_id": 1}

    def test_within_a_session(self) -> None:
        """Inside of another session neither user nor journey is carried over."""
        with (
            pgtrack.session("outer", user_id="u", metadata={"k": 1}),
            pgtrack.journey("j"),
            pgtrack.continued_from(ALL),
        ):
            inner = pgtrack.current()

        assert inner == pgtrack.Context(
            session_id="s1", request_id="r1", metadata={"k": 1}
        )

    def test_within_the_same(self) -> None:
        """Inside of the same session it goes on with user and journey."""
        with (
            pgtrack.session("s1", user_id="u"),
            pgtrack.journey("j"),
            pgtrack.continued_from(ALL),
        ):
            inner = pgtrack.current()

        assert (inner.user_id, inner.journey_id) == ("u", "j")

    def test_decorator(self) -> None:
        """It is a decorator, too, of coroutine functions as well."""

        @pgtrack.continued_from(ALL)
        async def work() -> str | None:
            await asyncio.sleep(0)
            return pgtrack.current().session_id

        assert asyncio.run(work()) == "s1"

    def test_rate_limit(self) -> None:
        """Sessions that came in by header are limited, those opened here are not."""
        with capture(session_rate_limit=1) as events:
            with (
                pgtrack.continued_from({"X-Session-ID": "remote"}),
                pgtrack.session("remote"),
            ):
                for _ in range(100):
                    pgtrack.emit("custom")
            limited = len(events)
            with pgtrack.continued_from({}), pgtrack.journey("j"):
                for _ in range(100):
                    pgtrack.emit("custom")

        assert limited < 50
        assert len(events) == limited + 100

    @pytest.mark.parametrize(
        "hostile",
        [c["value"] for c in CASES if not c["lenient"] and c["value"]],
        ids=ascii,
    )
    def test_hostile(self, hostile: str, caplog: pytest.LogCaptureFixture) -> None:
        """A hostile value shows up in no event, no header, no context and no log."""
        headers = dict.fromkeys(ALL, hostile + "\n" + hostile)
        caplog.set_level(logging.DEBUG)
        with capture() as events, pgtrack.continued_from(headers, trusted=True):
            pgtrack.emit("custom")
            shown = [
                repr(pgtrack.current()),
                repr(pgtrack.propagation_headers(trusted=True)),
            ]
            pgtrack.flush()
            counted = dict(pgtrack.stats().adjusted)

        shown += [repr(list(events)), caplog.text]
        assert [hostile in text for text in shown] == [False] * 4
        assert counted == dict.fromkeys(
            ["session_id", "request_id", "user_id", "journey_id"], 1
        )


class TestTrustUserHeader:
    """
    Whom to believe about the user.
    """

    def test_setting(self) -> None:
        """With `trust_user_header` the user is read, and still no journey."""
        with capture(trust_user_header=True), pgtrack.continued_from(ALL):
            context = pgtrack.current()

        assert (context.user_id, context.journey_id) == ("u1", None)

    def test_default(self) -> None:
        """Without it anybody could write the header, so nobody is believed."""
        with capture(), pgtrack.continued_from(ALL):
            context = pgtrack.current()

        assert context.user_id is None


@pytest.mark.parametrize("headers", [7, [1, 2], [("one",)], object()])
def test_what_is_no_headers(headers: Any) -> None:
    """What is no mapping and no pairs raises nothing: the session is new."""
    with capture() as events, pgtrack.continued_from(headers):
        pgtrack.emit("custom")

    (event,) = events

    assert str(event.session_id).startswith("srv-")
