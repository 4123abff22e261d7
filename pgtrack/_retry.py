"""
Which answers are worth another attempt, and when.  Pure: no clock, no network.

Statuses are those of RFC 9110; what ProductGraph does with them was read off its
source, v0.1 to v0.3: a 202 may reject single events, a 400 refuses a whole batch for
one bad value.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
from datetime import timezone
from typing import TYPE_CHECKING, Any

import attrs

from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["RetryPolicy", "classify", "parse_retry_after", "short_reason"]

MAX_RETRY_AFTER = 120.0
"""Most seconds that an endpoint may make us wait by `Retry-After`."""

_SPREAD = 0.2
"""Share of a `Retry-After` over which a fleet that heard the same is spread."""

_RETRY = frozenset({408, 425, 429})
_REFUSED = frozenset({400, 422})
_TOO_LARGE = 413
_REASON_LENGTH = 80
_UNSPECIFIED = "unspecified"


def classify(
    status: int, headers: Mapping[str, str], body: bytes, count: int, now: float
) -> Answer:
    """
    Return what an HTTP answer to a batch means.

    Args:
        status: The HTTP status.

        headers: The answer's headers, with lower-case names.

        body: As much of the body as was read.

        count: How many events the batch had.

        now: Seconds since 1970, for a `Retry-After` that is a date.
    """
    if 200 <= status < 300:  # noqa: PLR2004
        if headers.get("content-type", "").lower().startswith("text/html"):
            return Answer(verdict=Verdict.HOLD, reason=f"{status} with a web page")
        return Answer(verdict=Verdict.TAKEN, rejected=_rejections(body, count))
    reason = f"{status} {short_reason(body)}".rstrip()
    if status in _REFUSED:
        return Answer(verdict=Verdict.REFUSED, reason=reason)
    if status == _TOO_LARGE:
        return Answer(verdict=Verdict.TOO_LARGE, reason=reason)
    if status in _RETRY or status >= 500:  # noqa: PLR2004
        after = parse_retry_after(headers.get("retry-after", ""), now)
        return Answer(verdict=Verdict.RETRY, reason=reason, retry_after=after)
    # Redirects, 401, 403, 404 and the like speak of the address or the key, as does a
    # page for people where an answer should be.
    return Answer(verdict=Verdict.HOLD, reason=reason)


_ODD = re.compile(r"[^ -~]+")


def short_reason(text: bytes | str) -> str:
    """
    Return the first words of an endpoint's text, fit for a log line and a key.

    It may quote what was sent, so it is redacted as that was.
    """
    from pgtrack._redaction import redact_text  # noqa: PLC0415  slow to import

    if isinstance(text, bytes):
        text = text[: 4 * _REASON_LENGTH].decode("utf-8", "replace")
    text = _ODD.sub(" ", redact_text(text[: 4 * _REASON_LENGTH]))
    return text.strip()[:_REASON_LENGTH].rstrip()


def _rejections(body: bytes, count: int) -> dict[int, str]:
    """Read the rejected positions off the body of a 202; whatever is odd is ignored."""
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(answer, dict):
        return {}
    rejected: dict[int, str] = {}
    errors = answer.get("errors")
    for error in errors if isinstance(errors, list) else ():
        index = error.get("index") if isinstance(error, dict) else None
        if type(index) is int and 0 <= index < count:
            reason = error.get("error")
            text = short_reason(reason) if isinstance(reason, str) else ""
            rejected.setdefault(index, text or _UNSPECIFIED)
    total = answer.get("rejected")
    if type(total) is int and total <= count:
        # Which ones they are, it does not say; that they are rejected, it does.
        unnamed = [index for index in range(count) if index not in rejected]
        for index in unnamed[: max(total - len(rejected), 0)]:
            rejected[index] = _UNSPECIFIED
    return rejected


def parse_retry_after(text: str, now: float) -> float | None:
    """
    Return the seconds that a `Retry-After` asks for, at most `MAX_RETRY_AFTER`.

    Seconds or a date, as RFC 9110 section 10.2.3 has them; None for anything else.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        try:
            moment = email.utils.parsedate_to_datetime(text)
            if moment.tzinfo is None:  # the old form of asctime, which is in UTC
                moment = moment.replace(tzinfo=timezone.utc)
            seconds = moment.timestamp() - now
        except (TypeError, ValueError, OverflowError, IndexError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """
    How long to wait before the next attempt, in seconds.

    Attributes:
        first: The upper bound of the first wait; it doubles with every attempt.

        most: The bound that the doubling stops at.

        first_probe: The first wait for an endpoint that refuses everything.

        most_probe: The bound of those waits.

        jitter: Returns a random fraction of 0 to 1.
    """

    first: float = 0.5
    most: float = 30.0
    first_probe: float = 5.0
    most_probe: float = 60.0
    jitter: Callable[[], float] = random.random

    def wait(self, attempt: int, retry_after: float | None) -> float:
        """
        Return the wait after the *attempt*-th failure in a row, counted from 0.

        Full jitter: anything from nothing to the bound, so that a fleet that failed
        together does not return together.  `Retry-After` is a minimum, and does
        not make the waits shorter; those that were told the same time are spread over
        a fifth more.
        """
        least = retry_after or 0.0
        bound = self._bound(self.first, self.most, attempt)
        return least + self.jitter() * max(bound, least * _SPREAD)

    def probe(self, attempt: int) -> float:
        """Return the wait before the next probe: the bound, half of it jitter."""
        bound = self._bound(self.first_probe, self.most_probe, attempt)
        return bound / 2 + self.jitter() * bound / 2

    @staticmethod
    def _bound(first: float, most: float, attempt: int) -> float:
        return min(most, first * 2.0 ** min(attempt, 30))
