"""
A transport to a person: the endpoints `console:`, `console:stdout`, `console:stderr`.

It does not wait for a batch: `is_immediate` tells the worker to deliver as soon as
there is something.  What people read is laid out for them by `_layout`, so it is no
format to parse and may change.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import shutil
import sys
from typing import TYPE_CHECKING, Literal, TextIO

from pgtrack._file import LineWriter, reason_of
from pgtrack._layout import ARROW, MARK, Look, line_of
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["ConsoleTransport"]


class ConsoleTransport:
    """
    Prints one line for each event: time, session, type, what happened, user, the rest.

    Text from events is shown so that it can do no harm: control characters, line
    breaks, terminal escapes and marks that change the direction of text appear as
    backslash escapes, and long values are cut.  Stack traces, the event's id and the
    ids of project and product are left out.

    On a terminal there are colours, each session has its own, and lines end at the
    right margin.  `NO_COLOR` and `TERM=dumb` turn colours off, `FORCE_COLOR` turns them
    on, also in a pipe.  Anywhere else lines are plain and have any length.

    The stream is looked up in `sys` for each batch, so it may be replaced at any time.
    A terminal that is halted, or a pipe that nobody reads, keeps `send` waiting.

    Args:
        stream: Which of the two streams of `sys`.
    """

    is_immediate = True

    def __init__(self, stream: Literal["stdout", "stderr"] = "stdout") -> None:
        self._name = stream
        self._writer = LineWriter()

    def send(self, events: Sequence[bytes], timeout: float) -> Answer:  # noqa: ARG002  a stream takes as long as it takes
        """
        Print *events*.

        A stream that is missing, closed or has lost its reader is `Verdict.LOST`, any
        other failure is `Verdict.RETRY`, after which a line may be seen twice.
        """
        stream: TextIO | None = getattr(sys, self._name)
        if stream is None or getattr(stream, "closed", False):
            state = "None" if stream is None else "closed"
            return Answer(verdict=Verdict.LOST, reason=f"sys.{self._name} is {state}")
        look = _look_of(stream)
        lines = [line_of(event, look) for event in events]
        try:
            sent_bytes = self._print(stream, lines, look.encoding)
        except OSError as error:
            verdict = Verdict.LOST if error.errno in _GONE else Verdict.RETRY
            return Answer(verdict=verdict, reason=reason_of(error))
        except ValueError:  # closed meanwhile
            return Answer(verdict=Verdict.LOST, reason=f"sys.{self._name} is closed")
        return Answer(verdict=Verdict.TAKEN, sent_bytes=sent_bytes)

    def abort(self) -> None:
        """Do nothing: a write to a stream cannot be cut short."""

    def close(self) -> None:
        """Do nothing: the stream is the host's."""

    def _print(self, stream: TextIO, lines: list[str], encoding: str) -> int:
        """
        Write *lines*; return how many bytes that were.

        What the host has printed and not flushed is left to it: it may be in the
        middle of a line.
        """
        encoded = [line.encode(encoding) for line in lines]
        if _is_plain(stream, encoding):
            for part in _parts(encoded):
                self._writer.write(stream.fileno(), part)
        else:
            stream.write("".join(lines))
            stream.flush()
        return sum(map(len, encoded))


_GONE = frozenset({errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO})
"""Errors of a stream that has lost its reader or its terminal (EIO) for good."""

_ATOMIC = getattr(select, "PIPE_BUF", 512)
"""
Most bytes that a pipe takes in one piece (POSIX, pipe capacity in `write`).

Longer writes may be mixed with those of other processes.
"""


def _is_plain(stream: TextIO, encoding: str) -> bool:
    """
    Return whether text may bypass the stream's buffers, on the way to its file.

    Bytes that a buffer could not write stay in it, and then Python itself fails at
    exit, with a status of its own; the host that never prints must not see that.
    Streams that capture, colour or copy what is printed are never bypassed.
    """
    if os.name != "posix" or type(stream) is not io.TextIOWrapper:
        return False
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return isinstance(raw, io.FileIO) and "\n".encode(encoding) == b"\n"


def _parts(lines: list[bytes]) -> Iterator[bytes]:
    """Join *lines* to as few writes as a pipe takes without tearing them."""
    part = b""
    for line in lines:
        if part and len(part) + len(line) > _ATOMIC:
            yield part
            part = b""
        part += line
    yield part


def _look_of(stream: TextIO) -> Look:
    encoding = _encoding_of(stream)
    is_terminal = _is_terminal(stream)
    try:
        (ARROW + MARK).encode(encoding)
        arrow, mark = ARROW, MARK
    except UnicodeEncodeError:
        arrow, mark = ">", "~"
    columns = _columns_of(stream) if is_terminal else None
    return Look(encoding, _has_colour(is_terminal), columns, arrow, mark)


def _encoding_of(stream: TextIO) -> str:
    """Return the encoding; UTF-8 for a stream that keeps text, such as StringIO."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        codecs.lookup(encoding)
    except LookupError:
        return "ascii"
    return str(encoding)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, OSError, ValueError):  # the write will tell
        return False


def _has_colour(is_terminal: bool) -> bool:  # noqa: FBT001  the one thing it is about
    """
    Return whether to colour: by https://no-color.org, https://force-color.org, `TERM`.

    The console of Windows shows escape codes only where one of its newer hosts says so.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    is_able = os.name != "nt" or any(map(os.environ.get, _WINDOWS_HOSTS))
    return is_terminal and is_able and os.environ.get("TERM") != "dumb"


_WINDOWS_HOSTS = ("WT_SESSION", "ANSICON", "ConEmuANSI", "TERM")


def _columns_of(stream: TextIO) -> int:
    """Return the width of the terminal; a default where it does not know."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        columns = os.get_terminal_size(stream.fileno()).columns
        if columns:
            return columns
    return shutil.get_terminal_size((120, 24)).columns
