"""Which answers are worth another attempt, and when."""

from __future__ import annotations

import json
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import load_vectors
from pgtrack._retry import (
    MAX_RETRY_AFTER,
    RetryPolicy,
    classify,
    parse_retry_after,
    short_reason,
)
from pgtrack.typing import Answer, Verdict

NOW = 1_772_439_300.0


@pytest.fixture(name="far_away")
def _far_away(monkeypatch):
    """Local time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


def answer(status: int, body: bytes = b"", count: int = 3, **headers: str) -> Answer:
    """Return what an HTTP answer to *count* events means."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return classify(status, names, body, count, NOW)


class TestClassify:
    """What an answer means."""

    @pytest.mark.parametrize(
        ("verdict", "statuses"),
        [
            (Verdict.TAKEN, (200, 201, 202, 204)),
            (Verdict.REFUSED, (400, 422)),
            (Verdict.TOO_LARGE, (413,)),
            (Verdict.RETRY, (408, 425, 429, 500, 502, 503, 504, 599)),
            (Verdict.HOLD, (101, 301, 302, 303, 307, 308)),
            (Verdict.HOLD, (401, 402, 403, 404, 405, 407, 410, 415, 451)),
        ],
    )
    def test_the_status_decides(self, verdict, statuses) -> None:
        """Each status has its verdict; what speaks of the key or address is held."""
        found = {status: answer(status).verdict for status in statuses}

        assert dict.fromkeys(statuses, verdict) == found

    def test_the_reason_is_the_status_and_the_first_words(self) -> None:
        """The reason of a failure is fit for a log line and a key."""
        assert (
            "400 invalid request body" == answer(400, b"invalid request body\n").reason
        )
        assert "500" == answer(500).reason

    def test_retry_after_is_read_where_the_batch_is_sent_again(self) -> None:
        """`Retry-After` is taken from a 429 or 503, in any form."""
        date = formatdate(NOW + 30, usegmt=True)

        assert 7.0 == answer(429, retry_after="7").retry_after
        assert 30.0 == answer(503, retry_after=date).retry_after
        assert answer(503).retry_after is None

    def test_a_web_page_is_no_receipt(self) -> None:
        """A 200 with a page for people comes from a wrong address: all is kept."""
        page = answer(200, b"<html>", content_type="text/html; charset=utf-8")

        assert Verdict.HOLD is page.verdict


class TestRejections:
    """A 202 is read."""

    def test_the_documented_exchange(self) -> None:
        """Positions and reasons of a partial success are as in the vectors."""
        exchange = load_vectors("exchange_partial")
        body = json.dumps(exchange["response"]["json"]).encode()
        count = len(exchange["request"]["json"]["events"])

        found = answer(202, body, count)
        expected = {1: "session.id: required", 3: "event_id: required"}
        assert (Verdict.TAKEN, expected) == (found.verdict, found.rejected)
        assert exchange["client_must"]["dropped_indexes"] == list(found.rejected)

    def test_unnamed(self) -> None:
        """Rejections that the answer only counts are counted, whichever they are."""
        body = b'{"accepted":1,"rejected":2,"errors":[{"index":2,"error":"bad"}]}'

        assert {0: "unspecified", 2: "bad"} == answer(202, body).rejected

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"ok",
            b"{",
            b"null",
            b"[]",
            b"3",
            b'"text"',
            b'{"accepted":3,"rejected":0}',
            b'{"accepted":3,"rejected":0,"errors":[]}',
            b'{"errors":null}',
            b'{"errors":"index"}',
            b'{"errors":[null,1,"x",[]]}',
            b'{"errors":[{"error":"no index"}]}',
            b'{"errors":[{"index":3,"error":"beyond"}]}',
            b'{"errors":[{"index":-1,"error":"before"}]}',
            b'{"errors":[{"index":1.0,"error":"a float"}]}',
            b'{"errors":[{"index":true,"error":"a bool"}]}',
            b'{"errors":[{"index":"1","error":"text"}]}',
            b'{"rejected":4}',
            b'{"rejected":true}',
            b"[" * 100_000,
            b"\xff\xfe{}",
        ],
    )
    def test_what_is_odd_rejects_nothing(self, body) -> None:
        """A body that does not say which events were rejected rejects none."""
        assert Answer(verdict=Verdict.TAKEN) == answer(202, body)

    @pytest.mark.parametrize("error", [{}, {"error": None}, {"error": " \n"}])
    def test_a_rejection_without_a_reason_is_one(self, error) -> None:
        """The position counts, also where the reason is missing."""
        body = json.dumps({"errors": [{"index": 2, **error}]}).encode()

        assert {2: "unspecified"} == answer(202, body).rejected

    def test_a_position_counts_once(self) -> None:
        """An event rejected twice is rejected for the first reason."""
        errors = [{"index": 0, "error": "first"}, {"index": 0, "error": "second"}]
        body = json.dumps({"errors": errors}).encode()

        assert {0: "first"} == answer(202, body).rejected

    def test_all_may_be_rejected_without_a_list(self) -> None:
        """A count of rejections that is the batch's size rejects each event."""
        found = answer(202, b'{"accepted":0,"rejected":3}')

        assert dict.fromkeys(range(3), "unspecified") == found.rejected

    @given(st.binary(max_size=200), st.integers(100, 599))
    def test_no_answer_is_too_odd(self, body, status) -> None:
        """Whatever bytes come, there is a verdict, and rejections are of the batch."""
        found = answer(status, body)

        assert isinstance(found.verdict, Verdict)
        assert found.rejected.keys() <= {0, 1, 2}


class TestShortReason:
    """Text of an endpoint, fit for a log line and a key."""

    @pytest.mark.parametrize(
        ("text", "short"),
        [
            (b"", ""),
            ("invalid request body\n", "invalid request body"),
            (b"two\r\nlines\tand \x1b[31mcolour", "two lines and [31mcolour"),
            (b"\xff\xfe", ""),
            ("caf\u00e9 \u2028 bar", "caf bar"),
            ("x" * 1000, "x" * 80),
            (b"y" * 1_000_000, "y" * 80),
        ],
    )
    def test_it_is_one_short_line_of_ascii(self, text, short) -> None:
        """Control characters, line ends and all beyond ASCII become one space."""
        assert short == " ".join(short_reason(text).split())


class TestRetryAfter:
    """`Retry-After` as RFC 9110 has it."""

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("0", 0.0),
            ("7", 7.0),
            (" 7 ", 7.0),
            ("120", 120.0),
            ("121", MAX_RETRY_AFTER),
            ("9" * 400, MAX_RETRY_AFTER),
            ("Mon, 02 Mar 2026 08:15:30 GMT", 30.0),
            ("Monday, 02-Mar-26 08:15:30 GMT", 30.0),
            ("Mon Mar  2 08:15:30 2026", 30.0),
            ("Mon, 02 Mar 2026 08:14:00 GMT", 0.0),
            ("Mon, 02 Mar 2099 08:15:00 GMT", MAX_RETRY_AFTER),
        ],
    )
    def test_seconds_and_dates_are_read_and_capped(
        self, text, seconds, far_away
    ) -> None:
        """Seconds or any of the three forms of a date; past is now, far is the cap."""
        assert seconds == parse_retry_after(text, NOW)

    @pytest.mark.parametrize(
        "text",
        ["", "soon", "-5", "1.5", "\u0663", "1e3", "7, 8", "Mon, 99 Foo 2026", "\0"],
    )
    def test_garbage_is_none(self, text) -> None:
        """What is neither is ignored."""
        assert parse_retry_after(text, NOW) is None

    @given(st.text(max_size=60))
    def test_any_text_is_survived(self, text) -> None:
        """No header raises, and no wait is outside of its bounds."""
        seconds = parse_retry_after(text, NOW)

        assert seconds is None or 0.0 <= seconds <= MAX_RETRY_AFTER


class TestRetryPolicy:
    """How long to wait."""

    def test_the_bound_doubles_up_to_the_most(self) -> None:
        """The longest wait doubles with each failure, and stops at the bound."""
        policy = RetryPolicy(jitter=lambda: 1.0)

        waits = [policy.wait(attempt, None) for attempt in range(9)]
        assert [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0] == waits
        assert 30.0 == policy.wait(100_000, None)

    def test_jitter_is_full(self) -> None:
        """A wait is anything from nothing to the bound."""
        policy = RetryPolicy()
        waits = [policy.wait(5, None) for _ in range(1000)]

        assert 0.0 <= min(waits) < 2.0
        assert 14.0 < max(waits) <= 16.0

    def test_retry_after_is_a_minimum(self) -> None:
        """The endpoint's wish is the least, and does not shorten the backoff."""
        eager, lazy = RetryPolicy(jitter=lambda: 0.0), RetryPolicy(jitter=lambda: 1.0)

        assert 7.0 == eager.wait(0, 7.0)
        assert 23.0 == lazy.wait(5, 7.0)
        assert 16.0 == lazy.wait(5, 0.0)

    def test_a_fleet_that_was_told_the_same_time_is_spread(self) -> None:
        """After a long `Retry-After` the jitter is a fifth of it, not half a second."""
        eager, lazy = RetryPolicy(jitter=lambda: 0.0), RetryPolicy(jitter=lambda: 1.0)

        assert 60.0 == eager.wait(0, 60.0)
        assert 72.0 == lazy.wait(0, 60.0)

    def test_probes_are_slow(self) -> None:
        """Probes double from 5 to 60 s, and at least half of that is waited."""
        least, most = RetryPolicy(jitter=lambda: 0.0), RetryPolicy(jitter=lambda: 1.0)

        assert [2.5, 5.0, 10.0, 20.0, 30.0] == [least.probe(i) for i in range(5)]
        assert [5.0, 10.0, 20.0, 40.0, 60.0] == [most.probe(i) for i in range(5)]
