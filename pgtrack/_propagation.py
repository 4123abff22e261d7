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
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import attrs

from pgtrack._context import (
    Frame,
    SessionIdFormat,
    is_journey_id,
    is_request_id,
    is_session_id,
    is_user_id,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Headers", "Incoming", "extract", "inject"]

SESSION_HEADER = "X-Session-ID"
REQUEST_HEADER = "X-Request-ID"
USER_HEADER = "X-User-ID"
JOURNEY_HEADER = "X-Journey-ID"

HeaderText: TypeAlias = "str | bytes"


class HasItems(Protocol):
    """A mapping, and what is nearly one, such as `http.client.HTTPMessage`."""

    def items(self) -> Iterable[tuple[HeaderText, object]]:
        """Return the pairs."""
        ...


Headers: TypeAlias = "HasItems | Iterable[tuple[HeaderText, object]] | None"
"""A mapping or pairs; names in any case, as text or Latin-1 bytes; None is empty."""

Field: TypeAlias = Literal["session_id", "request_id", "user_id", "journey_id"]

_NAMES: dict[Field, str] = {
    "session_id": SESSION_HEADER.lower(),
    "request_id": REQUEST_HEADER.lower(),
    "user_id": USER_HEADER.lower(),
    "journey_id": JOURNEY_HEADER.lower(),
}

_FIELDS: Mapping[HeaderText, Field] = {
    spelt: field for field, name in _NAMES.items() for spelt in (name, name.encode())
}
"""By lower-case names, as text and as bytes: most headers are none of ours."""


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
    refused: tuple[Field, ...] = ()


def extract(
    headers: Headers,
    *,
    session_id_format: SessionIdFormat = "token",
    is_trusted: bool = False,
    is_user_trusted: bool = False,
) -> Incoming:
    """
    Read the correlation off *headers*; of two with the same name the first counts.

    Args:
        headers: A mapping, or pairs as ASGI has them.

        session_id_format: The grammar of session ids.

        is_trusted: Whether the user and the journey are read as well.

        is_user_trusted: Whether the user is, at least.
    """
    found = _find(headers)
    taken: dict[Field, str] = {}
    refused: list[Field] = []
    for field, value in found.items():
        if field == "session_id":
            is_taken = is_session_id(value, session_id_format)
        elif field == "request_id":
            is_taken = is_request_id(value)
        elif field == "user_id" and (is_trusted or is_user_trusted):
            is_taken = is_user_id(value)
        elif field == "journey_id" and is_trusted:
            is_taken = is_journey_id(value)
        else:
            continue
        if is_taken:
            taken[field] = value
        else:
            refused.append(field)
    return Incoming(**taken, refused=tuple(refused))


def _find(headers: Headers) -> dict[Field, str]:
    """Return the values by field, as they came."""
    items = getattr(headers, "items", None)
    pairs: Any = headers or () if items is None else items()
    found: dict[Field, str] = {}
    for name, value in pairs:
        if not isinstance(name, (str, bytes)):
            continue
        field = _FIELDS.get(name.lower())
        if field is None or field in found:
            continue
        text = _text(value)
        if text is not None:
            found[field] = text.strip(" \t")
    journey_id = found.get("journey_id")
    if journey_id is not None and len(journey_id) <= _MAX_QUOTED:
        found["journey_id"] = urllib.parse.unquote(journey_id)
    return found


_MAX_QUOTED = 255 * 12
"""Most characters of a journey that may fit: each of four bytes, each as `%XX`."""


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
        if is_journey_id(frame.journey_id):
            headers[JOURNEY_HEADER] = urllib.parse.quote(str(frame.journey_id), safe="")
    return headers
