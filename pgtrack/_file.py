"""
A transport to a file: `file:PATH`, one JSON line an event, as it goes over the wire.

It does not wait for a batch: `is_immediate` tells the worker to deliver as soon as
there is something.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FileTransport", "LineWriter", "reason_of"]


class FileTransport:
    r"""
    Appends events to a file as JSON lines (UTF-8, one event to a line, `\n`).

    Any number of processes may append to the same file: a batch is one write at its
    end, which the kernel keeps apart from others.  The file is made when first needed,
    readable by its owner alone, and made anew once it was moved or deleted, as
    logrotate does.  Its folder must exist.

    Delivery is at least once.  When a disk fills up in the middle of a batch, the
    whole batch is written again later: events may occur twice, with the same
    `event_id`, and a line that was torn stays behind as a line that is no JSON.

    Args:
        path: The file; a relative path is resolved now, since the host may change its
            folder.
    """

    is_immediate = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()
        self._fd: int | None = None
        # Which file was opened: the host may close descriptors that are not its own (a
        # daemon does), and the number then means another file.
        self._opened: os.stat_result | None = None
        self._is_end_known = False
        self._writer = LineWriter()

    def send(self, events: Sequence[bytes], timeout: float) -> Answer:  # noqa: ARG002  a disk takes as long as it takes
        """Append *events*; any failure is `Verdict.RETRY`."""
        data = b"".join(event + b"\n" for event in events)
        try:
            fd = self._current()
            if not self._is_end_known:
                self._writer.is_mid_line = self._is_torn(os.fstat(fd))
            self._is_end_known = False
            self._writer.write(fd, data)
        except OSError as error:
            return Answer(verdict=Verdict.RETRY, reason=reason_of(error))
        self._is_end_known = True
        return Answer(verdict=Verdict.TAKEN, sent_bytes=len(data))

    def abort(self) -> None:
        """Do nothing: a write to a file does not wait for anybody."""

    def disown(self) -> None:
        """Give up the parent's descriptor in a forked child."""
        self.close()

    def close(self) -> None:
        """Close the file; `send` opens it again."""
        if self._fd is not None and self._is_at(self._fd):
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd = None

    def _current(self) -> int:
        """Return a descriptor of the file that the path names now."""
        if self._fd is not None and self._is_at(self._fd) and self._is_at(self._path):
            return self._fd
        self.close()
        self._is_end_known = False
        self._fd = os.open(self._path, _APPEND, 0o600)
        self._opened = os.fstat(self._fd)
        return self._fd

    def _is_at(self, place: int | Path) -> bool:
        """Return whether *place* still refers to the file that was opened."""
        try:
            found = os.fstat(place) if isinstance(place, int) else place.stat()
        except OSError:
            return False
        return self._opened is not None and os.path.samestat(self._opened, found)

    def _is_torn(self, status: os.stat_result) -> bool:
        """
        Return whether the file ends within a line.

        Whoever left it so may be another process, and long dead.  Where the file cannot
        be read, what this one remembers must do.
        """
        if not stat.S_ISREG(status.st_mode):
            return self._writer.is_mid_line
        if not status.st_size:
            return False
        try:
            with self._path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:
            return self._writer.is_mid_line


_APPEND = (
    os.O_APPEND
    | os.O_CREAT
    | os.O_WRONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a named pipe that nobody reads must not wait
    | getattr(os, "O_BINARY", 0)  # Windows: no \r
)


class LineWriter:
    """
    Writes whole lines to a descriptor, and recovers from an attempt that failed midway.

    Attributes:
        is_mid_line: Whether what was last written ended within a line; the next write
            then ends that line first.
    """

    def __init__(self) -> None:
        self.is_mid_line = False

    def write(self, fd: int, lines: bytes) -> None:
        """
        Write all of *lines*, in one piece unless the kernel takes less.

        Raises:
            OSError: If it could not; some of it may have been written.
        """
        view = memoryview(b"\n" + lines if self.is_mid_line else lines)
        while view:
            count = os.write(fd, view)
            self.is_mid_line = view[count - 1] != _NEWLINE
            view = view[count:]


_NEWLINE = ord("\n")


def reason_of(error: OSError) -> str:
    """Return the kind of an error, without the path that its text has."""
    name = errno.errorcode.get(error.errno or 0, "")
    return f"{type(error).__name__} {name}".rstrip()
