"""
What pgtrack says about itself: one line per cause and minute, logger `pgtrack`.

A verb may be called from a signal handler or a finaliser, in the middle of a
write to the very stream that a log handler writes to.  So verbs only `note`
what happened; the lines are written by `tell`, by whoever delivers.

Lines name causes, types and counts; never a value, an id or a key.
"""

from __future__ import annotations

import logging
import traceback
from contextlib import suppress
from pathlib import Path

from pgtrack._clock import SYSTEM_CLOCK

__all__ = ["detail", "internal_error", "note", "show_details", "tell"]

logger = logging.getLogger("pgtrack")

_SECONDS_BETWEEN_LINES = 60.0
_PACKAGE = str(Path(__file__).parent)

reraise = False
"""Whether our own errors are raised rather than noted; set by the project's tests."""

# By cause, so that threads that note the same at once leave one line.
_notes: dict[str, tuple[int, str]] = {}
_quiet_until: dict[str, float] = {}


def note(cause: str, message: str, level: int = logging.WARNING) -> None:
    """
    Keep *message* for the next `tell`, unless *cause* had a line within the minute.

    Args:
        cause: A short constant; what is told once a minute is told once per cause.

        message: The whole line, without payload.

        level: A level of `logging`.
    """
    now = SYSTEM_CLOCK.monotonic()
    if now < _quiet_until.get(cause, 0.0):
        return
    _quiet_until[cause] = now + _SECONDS_BETWEEN_LINES
    _notes[cause] = (level, message)


def tell() -> None:
    """Write the lines that were noted; call it only where waiting is allowed."""
    for cause in list(_notes):
        level, message = _notes.pop(cause, (0, ""))
        if message:  # else another thread was faster
            with suppress(Exception):  # a filter or handler of the host's
                logger.log(level, message)


def detail(message: str, *values: object) -> None:
    """Write a line for whoever asked for details; from the delivering thread only."""
    with suppress(Exception):  # a filter or handler of the host's
        logger.debug(message, *values)


def show_details() -> None:
    """
    Show the lines of `detail`: for the setting `debug`.

    On standard error, where the host has set up no logging that would show them.
    """
    logger.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


def internal_error(error: BaseException) -> None:
    """
    Note an error of our own that the host must not see.

    The line has the type and the place in our code; the message of the error is
    left out, since it may quote a value.
    """
    if reraise:
        raise error
    place = "?"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(_PACKAGE):
            place = f"{Path(frame.filename).name}:{frame.lineno}"
    note(
        f"internal error {type(error).__name__} {place}",
        f"pgtrack had an internal error ({type(error).__name__} at {place}). "
        "An event may be missing; the host is not affected. Please report it.",
        logging.ERROR,
    )
