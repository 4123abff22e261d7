"""
Correlation headers: between a frame and any header mapping.

Public headers (`X-Session-ID`, `X-Request-ID`) may go to any host that the user
allows.  Trusted ones (`X-User-ID`, `X-Journey-ID`) only travel over carriers that
outsiders cannot write to: a queue, a pool, a service behind the same proxy.

A value that does not fit its grammar is the same as none: it is never
answered with an error, and neither echoed nor logged.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import attrs

from pgtrack._context import (
    Frame,
    SessionIdFormat,
    is_request_id,
    is_session_id,
    is_user_id,
)

__all__ = ["Headers", "Incoming", "extract", "inject"]

SESSION_HEADER = "X-Session-ID"
REQUEST_HEADER = "X-Request-ID"
USER_HEADER = "X-User-ID"
JOURNEY_HEADER = "X-Journey-ID"

MAX_JOURNEY_ID = 255

HeaderText: TypeAlias = "str | bytes"
Headers: TypeAlias = (
    "Mapping[str, str] | Mapping[str, HeaderText] | Mapping[bytes, bytes] "
    "| Iterable[tuple[HeaderText, HeaderText]]"
)
"""A mapping or pairs; names in any case, as text or Latin-1 bytes."""

_NAMES = {
    name.lower(): name
    for name in (SESSION_HEADER, REQUEST_HEADER, USER_HEADER, JOURNEY_HEADER)
}


@attrs.frozen(kw_only=True)
class Incoming:
    """
    What headers say, checked; None where absent or refused.

    Attributes:
        refused: The fields that came, but did not fit their grammar.
    """

    session_id: str | None = None
    request_id: str | None = None
    user_id: str | None = None
    journey_id: str | None = None
    refused: tuple[str, ...] = ()


def extract(
    headers: Headers,
    *,
    session_id_format: SessionIdFormat = "token",
    is_trusted: bool = False,
) -> Incoming:
    """
    Read the correlation off *headers*; of two with the same name the first counts.

    Args:
        headers: A mapping, or pairs as ASGI has them.

        session_id_format: The grammar of session ids.

        is_trusted: Whether the user and the journey are read as well.
    """
    found = _find(headers)
    values: dict[str, str] = {}
    refused: list[str] = []

    def accept(field: str, header: str, *, is_valid: bool, value: str) -> None:
        if is_valid:
            values[field] = value
        elif header in found:
            refused.append(field)

    session = found.get(SESSION_HEADER, "")
    is_session = is_session_id(session, session_id_format)
    accept("session_id", SESSION_HEADER, is_valid=is_session, value=session)
    request = found.get(REQUEST_HEADER, "")
    is_request = is_request_id(request)
    accept("request_id", REQUEST_HEADER, is_valid=is_request, value=request)
    if is_trusted:
        user = found.get(USER_HEADER, "")
        accept("user_id", USER_HEADER, is_valid=is_user_id(user), value=user)
        journey = urllib.parse.unquote(found.get(JOURNEY_HEADER, ""))
        is_journey = 0 < len(journey) <= MAX_JOURNEY_ID and journey.isprintable()
        accept("journey_id", JOURNEY_HEADER, is_valid=is_journey, value=journey)
    return Incoming(**values, refused=tuple(refused))  # type: ignore[arg-type]


def _find(headers: Headers) -> dict[str, str]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    found: dict[str, str] = {}
    for pair in pairs:
        name, value = (_text(part) for part in pair)
        if name is None or value is None:
            continue
        header = _NAMES.get(name.lower())
        if header is not None:
            found.setdefault(header, value.strip(" \t"))
    return found


def _text(part: object) -> str | None:
    if isinstance(part, bytes):
        return part.decode("latin-1")
    return part if isinstance(part, str) else None


def inject(frame: Frame | None, *, is_trusted: bool = False) -> dict[str, str]:
    """
    Return the headers that carry *frame* to another service.

    Outside of a session there are none: the session of the process stays in it.
    """
    headers: dict[str, str] = {}
    if frame is None:
        return headers
    if frame.session_id is not None:
        headers[SESSION_HEADER] = frame.session_id
    if frame.request_id is not None:
        headers[REQUEST_HEADER] = frame.request_id
    if is_trusted:
        if frame.cell.user_id is not None:
            headers[USER_HEADER] = frame.cell.user_id
        if frame.journey_id is not None:
            headers[JOURNEY_HEADER] = urllib.parse.quote(frame.journey_id, safe="")
    return headers
