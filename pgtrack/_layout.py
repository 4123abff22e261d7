"""
The layout of one event as a line for a person to read.

Time, session, type, what happened, user, the rest; aligned, cut to the margin of a
terminal, and with everything in it made harmless: a hostile event can neither move the
cursor nor forge a line.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
import unicodedata
import zlib
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ARROW", "MARK", "Look", "line_of"]

ARROW, MARK = "›", "…"  # noqa: RUF001  stands between a journey and its step


class Look(NamedTuple):
    """What a stream can show."""

    encoding: str
    has_colour: bool
    columns: int | None  # None: lines of any length
    arrow: str
    mark: str  # stands for what was cut off; one column wide


_Piece = tuple[str, str]
"""Text that is safe to show, and its style: the parameters of an SGR escape code."""

_PLAIN, _BOLD, _DIM = "", "1", "2"
_RED, _GREEN, _YELLOW, _BOLD_RED = "31", "32", "33", "1;31"

_SESSION_COLOURS = (30, 33, 63, 64, 68, 97, 130, 133, 136, 162, 166, 29)
"""
Of the 256 colours, some with a contrast of 3:1 or more to black and to white.

The ratio is that of WCAG 2.1, success criterion 1.4.3, for large text.  The red, green
and yellow of statuses are not among them.
"""

_TAG_WIDTH = 8
_TYPE_WIDTH = 12
_METHOD_WIDTH = 6
_STATUS_WIDTH = 3
_DURATION_WIDTH = 8
_ESSENCE_WIDTH = 44  # leaves a path of 25; user and request still fit into 120

_MAX_TYPE = 24
_MAX_VALUE = 48
_MAX_PATH = 80
_MAX_MESSAGE = 200

_HIDDEN = (
    "event_id",
    "project_id",
    "product_id",
    "error.stack",  # not for a single line
)
_LAST = ("request_id", "trace_id", "span_id", "service", "environment", "release")
"""Metadata that follows the rest, since the margin may hide it."""


def line_of(event: bytes, look: Look) -> str:
    """Return the line for one event; what is no JSON object is shown as it is."""
    try:
        wire = json.loads(event)
    except (ValueError, RecursionError):
        wire = None
    if isinstance(wire, dict):
        pieces = _pieces(_Fields(wire, look), look)
    else:
        text = event[: 4 * _MAX_MESSAGE].decode("utf-8", "replace")
        pieces = [(_short(text, _MAX_MESSAGE, look), _RED)]
    if look.columns is not None:
        pieces = _clip_pieces(pieces, look.columns, look.mark)
    if look.has_colour:
        return "".join(_paint(piece) for piece in pieces) + "\n"
    return "".join(text for text, _ in pieces) + "\n"


def _pieces(fields: _Fields, look: Look) -> list[_Piece]:
    kind = fields.word("event.type", _MAX_TYPE)
    session_id = fields.raw("session.id")
    for key in _HIDDEN:
        fields.raw(key)
    pieces = [
        (_local_time(fields.raw("event.timestamp")), _DIM),
        ("  ", _PLAIN),
        *_padded([(_tag(session_id, look), _colour_of(session_id))], _TAG_WIDTH),
        ("  ", _PLAIN),
        *_padded([(kind, _BOLD_RED if kind == "error" else _PLAIN)], _TYPE_WIDTH),
        ("  ", _PLAIN),
        *_padded(_essence(kind, fields), _ESSENCE_WIDTH),
        (" ", _PLAIN),
    ]
    if user := fields.word("user.id"):
        pieces.append((f" user={user}", _PLAIN))
    pieces += [(f" {' '.join(_rest(fields))}", _DIM)]
    while not pieces[-1][0].strip():
        pieces.pop()
    return pieces


def _essence(kind: str, fields: _Fields) -> list[_Piece]:
    """Return what happened and, where the event says so, its status and duration."""
    what = _WHAT.get(kind, _what_is_named)(fields)
    status = fields.word("api.status_code")
    key = "api.duration_ms" if "api.duration_ms" in fields.left else "duration_ms"
    duration = _duration(fields.raw(key))
    if not status and not duration:
        return what
    result = []
    if status:
        style = _STATUS_STYLES.get(status[:1], _PLAIN)
        result = [(f"{status:>{_STATUS_WIDTH}}", style)]
        duration = f"{duration:>{_DURATION_WIDTH}}"
    result.append((duration, _PLAIN))
    width = _ESSENCE_WIDTH - _width_of_pieces(result)
    return [*_padded(what, width - 1), (" ", _PLAIN), *result]


_STATUS_STYLES = {"2": _GREEN, "4": _YELLOW, "5": _RED}


def _what_is_called(fields: _Fields) -> list[_Piece]:
    method = fields.word("api.method")
    return [(f"{method:<{_METHOD_WIDTH}} ", _BOLD), _plain(fields, "api.path")]


def _what_failed(fields: _Fields) -> list[_Piece]:
    kind = fields.text("error.type", _MAX_PATH)
    message = fields.text("error.message", _MAX_MESSAGE)
    if not message:
        return [(kind, _BOLD_RED)]
    return [(f"{kind}: " if kind else "", _BOLD_RED), (message, _RED)]


def _what_is_reached(fields: _Fields) -> list[_Piece]:
    step = fields.word("gen_ai.journey.step.id")
    name = fields.text("gen_ai.journey.step.name")
    journey = fields.word("gen_ai.journey.id")
    aside = f" ({name})" if name not in ("", step) else ""
    return [(f"{journey} {fields.look.arrow} {step}", _BOLD), (aside, _PLAIN)]


def _what_is_seen(fields: _Fields) -> list[_Piece]:
    return [_plain(fields, "page.path")]


def _what_is_used(fields: _Fields) -> list[_Piece]:
    component = fields.word("ui.component.name") or fields.word("ui.element")
    text = fields.text("ui.element.text")
    return [(component, _PLAIN), (f' "{text}"' if text else "", _PLAIN)]


def _what_is_changed(fields: _Fields) -> list[_Piece]:
    return [_plain(fields, "ui.state.key")]


def _what_is_measured(fields: _Fields) -> list[_Piece]:
    times = (
        (name, f"performance.{name.lower()}_ms") for name in ("LCP", "FID", "TTFB")
    )
    figures = [(name, _duration(fields.raw(key))) for name, key in times]
    figures.append(("CLS", fields.word("performance.cls")))
    return [("  ".join(f"{name} {figure}" for name, figure in figures if figure), "")]


def _what_is_named(fields: _Fields) -> list[_Piece]:
    name = fields.text("event.name")
    status = fields.word("gen_ai.journey.conversion.status")
    if not status:
        return [(name, _PLAIN)]
    journey = fields.word("gen_ai.journey.id")
    name = f"{name}  " if name else ""
    return [(name, _PLAIN), (f"{journey} {fields.look.arrow} {status}", _BOLD)]


_WHAT: Mapping[str, Callable[[_Fields], list[_Piece]]] = {
    "api.request": _what_is_called,
    "api.response": _what_is_called,
    "error": _what_failed,
    "journey.step": _what_is_reached,
    "page.leave": _what_is_seen,
    "page.view": _what_is_seen,
    "performance": _what_is_measured,
    "state.change": _what_is_changed,
    "ui.blur": _what_is_used,
    "ui.click": _what_is_used,
    "ui.focus": _what_is_used,
    "ui.input": _what_is_used,
    "ui.scroll": _what_is_used,
    "ui.submit": _what_is_used,
}


def _plain(fields: _Fields, key: str) -> _Piece:
    return fields.word(key, _MAX_PATH), _PLAIN


def _rest(fields: _Fields) -> list[str]:
    """Return the metadata and whatever else is left, as `key=value`."""
    metadata = fields.raw("metadata")
    if not isinstance(metadata, dict):
        metadata = {"metadata": metadata} if metadata else {}
    if metadata.get("source") == "backend":
        del metadata["source"]
    metadata.pop("trace_flags", None)  # says nothing to people
    if isinstance(request_id := metadata.get("request_id"), str):
        metadata["request_id"] = _tail(request_id)
    last = {key: metadata.pop(key) for key in _LAST if key in metadata}
    look = fields.look
    return [
        f"{_word(key.removeprefix('gen_ai.'), _MAX_VALUE, look)}={_value(value, look)}"
        for key, value in {**metadata, **fields.left, **last}.items()
    ]


class _Fields:
    """The fields of an event, each to be taken once; `left` are the others."""

    def __init__(self, wire: dict[str, Any], look: Look) -> None:
        self.left = wire
        self.look = look

    def raw(self, key: str) -> Any:
        """Take a field as it is; None where there is none."""
        return self.left.pop(key, None)

    def text(self, key: str, width: int = _MAX_VALUE) -> str:
        """Take a field as text, which may have blanks; empty where there is none."""
        value = self.raw(key)
        return "" if value is None else _short(_as_text(value), width, self.look)

    def word(self, key: str, width: int = _MAX_VALUE) -> str:
        """Take a field as text that is quoted where it has blanks."""
        value = self.raw(key)
        if value is None or value == "":
            return ""
        return _word(_as_text(value), width, self.look)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else _compact(value)


def _value(value: object, look: Look) -> str:
    """Return a value of the metadata: bare or quoted text, else short JSON."""
    if isinstance(value, str):
        return _word(value, _MAX_VALUE, look)
    return _short(_compact(value), _MAX_VALUE, look)


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _word(text: str, width: int, look: Look) -> str:
    """Return short text, in quotes unless it is plain that it is one word."""
    short = _short(text, width, look)
    if short and _QUOTED.search(short) is None:
        return short
    quoted = short.replace('"', '\\"')
    return f'"{quoted}"'


_QUOTED = re.compile(r'[\s"]')


def _local_time(timestamp: object) -> str:
    """Return the time of day here, with milliseconds."""
    try:
        moment = datetime.fromisoformat(str(timestamp).replace("Z", "+00:00"))
        return moment.astimezone().time().isoformat("milliseconds")
    except (ValueError, OverflowError, OSError):  # beyond what the time zone can tell
        return "--:--:--.---"


def _duration(milliseconds: object) -> str:
    """Return a duration in the unit that reads best; empty for what is none."""
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        return ""
    if not -_MAX_DURATION < milliseconds < _MAX_DURATION:  # nor NaN
        return ""
    if milliseconds < 1_000:  # noqa: PLR2004  a second
        return f"{milliseconds:.0f} ms"
    if milliseconds < 60_000:  # noqa: PLR2004  a minute
        return f"{milliseconds / 1_000:.2f} s"
    return f"{milliseconds / 60_000:.1f} min"


_MAX_DURATION = 1e15


def _tag(session_id: object, look: Look) -> str:
    """Return what tells a session from others at a glance; a dash for none."""
    text = _tail(_as_text(session_id)) if session_id else "-"
    return _short(text, _TAG_WIDTH, look)


def _tail(identifier: str) -> str:
    """
    Return the last eight characters of an identifier, less a prefix such as `sess_`.

    The last, because the first ones of a ULID or of a UUID of version 7 are the time.
    """
    if len(identifier) <= _TAG_WIDTH:
        return identifier
    return _PREFIX.sub("", identifier)[-_TAG_WIDTH:].lstrip("-_.:")


_PREFIX = re.compile(r"^[A-Za-z]{1,8}[-_.:](?=.)")


def _colour_of(session_id: object) -> str:
    """Return the colour of a session, the same in every process."""
    if not session_id:
        return _DIM
    digest = zlib.crc32(_as_text(session_id).encode("utf-8", "replace"))
    return f"38;5;{_SESSION_COLOURS[digest % len(_SESSION_COLOURS)]}"


def _paint(piece: _Piece) -> str:
    text, style = piece
    return f"\x1b[{style}m{text}\x1b[0m" if style and text else text


# --- text as it is seen ----------------------------------------------------------


def _short(text: str, width: int, look: Look) -> str:
    """Return *text* fit to be shown, in at most *width* columns."""
    shown = _clean(text[: width + 1], look.encoding)
    if len(text) <= width and _width_of(shown) <= width:
        return shown
    return _clip(shown, width - 1) + look.mark


def _clean(text: str, encoding: str) -> str:
    """
    Write what could act on a terminal, and what the stream cannot encode, as escapes.

    That is all that Python calls not printable: controls (C0, C1), line and paragraph
    separators, format characters (bidirectional overrides and isolates), surrogates
    and code points without a character.  Blanks of other widths do no harm.
    """
    if not text.isprintable():
        text = "".join(map(_clean_character, text))
    if text.isascii():
        return text
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _clean_character(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    # Not by the codec unicode_escape, which would be imported here, on the worker.
    code = ord(character)
    if code <= 0xFF:  # noqa: PLR2004
        return _SHORT_ESCAPES.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"  # noqa: PLR2004


_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _width_of(text: str) -> int:
    """Return how many columns clean text takes."""
    return len(text) if text.isascii() else sum(map(_columns_of_character, text))


def _width_of_pieces(pieces: list[_Piece]) -> int:
    return sum(_width_of(text) for text, _ in pieces)


def _columns_of_character(character: str) -> int:
    """Return 0 to 2, by Unicode Standard Annex #11; marks take no column."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _clip(text: str, width: int) -> str:
    """Return as much of *text* as fits into *width* columns."""
    if text.isascii():
        return text[:width]
    for end, character in enumerate(text):
        width -= _columns_of_character(character)
        if width < 0:
            return text[:end]
    return text


def _clip_pieces(pieces: list[_Piece], columns: int, mark: str) -> list[_Piece]:
    """Cut a line at the margin."""
    ends = list(itertools.accumulate(_width_of(text) for text, _ in pieces))
    if ends[-1] <= columns:
        return pieces
    room = columns - 1  # the mark takes one
    place = bisect.bisect_right(ends, room)  # of the piece that crosses the margin
    text, style = pieces[place]
    fitting = _clip(text, room - (ends[place] - _width_of(text)))
    return [*pieces[:place], (fitting + mark, style)]


def _padded(pieces: list[_Piece], width: int) -> list[_Piece]:
    missing = width - _width_of_pieces(pieces)
    return [*pieces, (" " * missing, _PLAIN)]
