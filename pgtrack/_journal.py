"""
The journal: each event is with the operating system before `emit` returns.

For `spool_each_event`.  Whoever emits appends one line, in one write, and takes no
lock: a signal handler that emits in the middle of `emit` writes a line of its own.
There are two files at a time, of the kinds

- `QUEUED`: events that are in memory as well, and are needed only if that is lost.  The
  file is deleted once all of them have come to their end.
- `KEPT`: events for which the queue had no room.  The file becomes one of the spool's.

The worker begins new files now and then, which retires those before.  A writer first
counts itself in, then looks whether the file is still the present one; the worker
first replaces the file, then looks whether anybody is counted in.  Whichever comes
second sees what the first one did: so no file is closed under a writer.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
from typing import TYPE_CHECKING, Literal, TypeAlias

from pgtrack._folder import batch_name, journal_name, lines_of, time_of
from pgtrack._ledger import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgtrack._folder import Folder

__all__ = ["Journal", "Kind", "Sealed", "Segment"]

Kind: TypeAlias = Literal["queued", "kept"]

Sealed: TypeAlias = "tuple[Folder, str, int]"
"""A file that became one of the spool's: its folder, its name, its bytes."""

_APPEND = os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_WRONLY
_APPEND |= getattr(os, "O_CLOEXEC", 0)

_TRIES = 100
"""Most times that a writer runs after files that are replaced; one is plenty."""


class Segment:
    """
    One file of the journal.

    Attributes:
        users: Writers that are at it, and for `QUEUED` events that have not ended.

        count: Events that were written.

        bytes: What they take.
    """

    __slots__ = (
        *("_is_torn", "_opened", "bytes", "count", "fd", "folder", "name", "users"),
    )

    def __init__(self, folder: Folder, name: str, fd: int) -> None:
        self.folder = folder
        self.name = name
        self.fd = fd
        self._opened = os.fstat(fd)
        self._is_torn = False
        self.users = Tally()
        self.count = Tally()
        self.bytes = Tally()

    @property
    def time(self) -> int:
        """When it was begun, in nanoseconds."""
        return time_of(self.name)

    @property
    def is_in_place(self) -> bool:
        """
        Whether the descriptor is still of the file, and the file still in its folder.

        The host may close descriptors that are not its own, as a daemon does, and the
        number then means another file; and somebody may have removed the spool.
        """
        try:
            found = os.fstat(self.fd)
        except OSError:
            return False
        return found.st_nlink > 0 and os.path.samestat(found, self._opened)

    def write(self, line: bytes) -> None:
        """
        Append *line* in one piece.

        Raises:
            OSError: If it could not be written whole.
        """
        if self._is_torn:  # what comes next is not to be spoilt as well
            line = b"\n" + line
        self._is_torn = os.write(self.fd, line) < len(line)
        if self._is_torn:
            raise OSError(errno.ENOSPC, "not written whole")
        self.bytes.add(len(line))
        self.count.add(1)

    def close(self) -> None:
        """Close the descriptor, if it is still of the file."""
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), self._opened):
                os.close(fd)

    def delete(self) -> None:
        """Close the file and remove it."""
        self.close()
        with contextlib.suppress(OSError):
            (self.folder.path / self.name).unlink()

    def seal(self) -> str | None:
        """Make a file of the spool of it, and return its name; None if it is empty."""
        if self.count.value == 0:
            self.delete()
            return None
        self.close()
        name = batch_name(time_of(self.name), self.count.value)
        with contextlib.suppress(OSError):  # the spool will not find it, and say so
            (self.folder.path / self.name).rename(self.folder.path / name)
        return name


class Journal:
    """
    The present files of a process, and those that were retired.

    Args:
        home: Returns the folder of the process; may raise OSError.

        new_time: Returns nanoseconds for a name that no other file has.

        is_synced: Whether a write returns only when the disk has it.
    """

    def __init__(
        self,
        home: Callable[[], Folder],
        new_time: Callable[[], int],
        *,
        is_synced: bool,
    ) -> None:
        self._home = home
        self._new_time = new_time
        self._flags = _APPEND | (getattr(os, "O_DSYNC", 0) if is_synced else 0)
        self._present: dict[Kind, Segment] = {}
        self._retired: collections.deque[tuple[Kind, Segment]] = collections.deque()

    # --- by any thread ---

    def append(self, kind: Kind, event: bytes) -> Segment:
        """
        Write *event*, and return where it is.

        The caller gives the segment's `users` back: for `QUEUED` when the event has
        ended, for `KEPT` when it has been counted.

        Raises:
            OSError: If it could not be written.
        """
        line = lines_of((event,))
        segment = self._enter(kind)
        try:
            segment.write(line)
        except BaseException:
            segment.users.add(-1)
            raise
        return segment

    def _enter(self, kind: Kind) -> Segment:
        """Count the caller in at the present file, which then is not closed."""
        for _ in range(_TRIES):
            home = self._home()
            segment = self._present.get(kind) or self._begin(kind)
            segment.users.add(1)
            if self._present.get(kind) is segment:
                if segment.folder is home and segment.is_in_place:
                    return segment
                self._replace(kind, segment)
            segment.users.add(-1)
        raise OSError(errno.EAGAIN, "the file was replaced each time")

    def _open(self) -> Segment:
        folder = self._home()
        path = folder.path / journal_name(self._new_time())
        fd = os.open(path, self._flags, 0o600)
        try:
            return Segment(folder, path.name, fd)
        except OSError:
            os.close(fd)
            path.unlink()
            raise

    def _begin(self, kind: Kind) -> Segment:
        try:
            made = self._open()
        except FileNotFoundError:  # its folder was left meanwhile; there is another now
            made = self._open()
        present = self._present.setdefault(kind, made)
        if present is not made:  # another thread was faster
            made.delete()
        return present

    def _replace(self, kind: Kind, gone: Segment) -> None:
        """Give up a file that is no longer there."""
        if self._present.get(kind) is gone:
            self._retire(kind)

    def _retire(self, kind: Kind) -> None:
        segment = self._present.pop(kind, None)
        if segment is not None:
            self._retired.append((kind, segment))

    # --- by whoever delivers ---

    @property
    def bytes(self) -> int:
        """What all files take."""
        return sum(segment.bytes.value for segment in self._segments())

    def _segments(self) -> list[Segment]:
        retired = self._retired.copy()  # an emit may add to it
        return [*self._present.copy().values(), *(segment for _, segment in retired)]

    @property
    def has_kept(self) -> bool:
        """Whether there are events that the spool has yet to take in."""
        kept = [s for kind, s in self._retired.copy() if kind == "kept"]
        present = self._present.get("kept")
        kept += [] if present is None else [present]
        return any(segment.count.value for segment in kept)

    def rotate(self) -> None:
        """Begin a new file of each kind that has something in it."""
        for kind, segment in self._present.copy().items():
            if segment.count.value > 0:
                self._retire(kind)
                with contextlib.suppress(OSError):  # whoever emits next will meet it
                    self._begin(kind)

    def sweep(self) -> list[Sealed]:
        """
        Delete the retired files whose events have ended; return those to be kept.

        What is kept need not wait for a retirement: it is for nobody but the spool.
        """
        kept = self._present.get("kept")
        if kept is not None and kept.count.value > 0:
            self._retire("kept")
        sealed: list[Sealed] = []
        for _ in range(len(self._retired)):
            kind, segment = self._retired.popleft()
            if segment.users.value > 0:
                self._retired.append((kind, segment))
            elif kind == "queued":
                segment.delete()
            elif (name := segment.seal()) is not None:
                sealed.append((segment.folder, name, segment.bytes.value))
        return sealed

    def finish(self) -> list[Sealed]:
        """Retire everything; what has not ended stays on disk."""
        for kind in list(self._present):
            self._retire(kind)
        return self.sweep()

    def disown(self) -> None:
        """Close the parent's files in a forked child."""
        for segment in self._segments():
            segment.close()
