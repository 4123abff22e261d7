"""
A folder of the spool: private, and locked by the process that keeps its events there.

    lock                    held by the owner; by whoever gets it, when that is dead
    <time>-<count>.batch    events at rest: sealed, with as many as the name says
    <time>.journal          events that are in memory as well

Times are nanoseconds in 20 digits, so that names sort from the oldest on.  A line of a
file is one event: its CRC-32 in 8 hexadecimal digits, a space, its JSON, a line feed.

Only `_folder`, `_journal` and `_spool` touch the disk of the spool.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

try:
    import fcntl
except ImportError:  # not POSIX; `Spool` says so
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

from pgtrack._clock import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = [
    "BATCH",
    "HAS_LOCKS",
    "JOURNAL",
    "NEW",
    "Folder",
    "Page",
    "batch_name",
    "clear_unfinished",
    "count_of",
    "disown_all",
    "files_in",
    "journal_name",
    "lines_of",
    "owners",
    "time_of",
]

LOCK = "lock"
NEW = ".new"
"""What a name ends with until a folder is locked, and a file is whole."""

_ABANDONED = 60.0
"""Seconds after which a folder that was never finished is taken away."""

BATCH = re.compile(r"(\d{20})-(\d{1,9})\.batch", re.ASCII)
JOURNAL = re.compile(r"(\d{20})\.journal", re.ASCII)
_OWNER = re.compile(r"\d{20}-[0-9a-f]{8}", re.ASCII)

_MAX_LINE = 10_000_000
"""Bytes of a line that is no line of ours: the largest event has 9 MB."""

_CHECKSUM = 9
"""Bytes before the JSON of a line."""

_CLOSED = getattr(os, "O_CLOEXEC", 0)
_MADE_FILE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | _CLOSED
# Neither a link nor a named pipe that somebody put there.
_FOUND_FILE = _CLOSED | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Page(NamedTuple):
    """A part of a file: its good events, and where the next part begins, if any."""

    events: list[bytes]
    next: int | None


def batch_name(time_ns: int, count: int) -> str:
    """Return the name of a sealed file of *count* events."""
    return f"{time_ns:020d}-{count}.batch"


def journal_name(time_ns: int) -> str:
    """Return the name of a journal."""
    return f"{time_ns:020d}.journal"


def time_of(name: str) -> int:
    """Return the nanoseconds in the name of a file."""
    return int(name[:20])


def count_of(name: str) -> int:
    """Return how many events a sealed file has, by its name."""
    return int(name[21:].partition(".")[0])


def lines_of(events: Iterable[bytes]) -> bytes:
    """Return *events* as the lines of a file."""
    return b"".join([b"%08x %b\n" % (zlib.crc32(event), event) for event in events])


def _event_of(line: bytes) -> bytes | None:
    """Return the event of a line; None if it is damaged."""
    event = line[_CHECKSUM:-1]
    is_whole = line[-1:] == b"\n" and line[: _CHECKSUM - 1] == b"%08x" % zlib.crc32(
        event
    )
    return event if is_whole else None


_held: dict[int, Folder] = {}
"""Those whose lock this process has open, also while they are being made or adopted."""


def disown_all() -> None:
    """Let go of the parent's folders in a forked child; the locks stay the parent's."""
    for folder in list(_held.values()):
        folder.let_go()


class Folder:
    """
    A folder whose lock this process holds.

    Made by `create` and `adopt`.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        # Which file it is: the host may close descriptors that are not its own (a
        # daemon does), and the number then means another file.
        self._opened = os.fstat(lock)
        _held[id(self)] = self

    # --- whose it is ---

    @classmethod
    def create(cls, root: Path) -> Folder:
        """
        Make a folder in *root*.

        Under a name of its own until the lock is held, lest another process adopts it
        in between.

        Raises:
            OSError: If that is not possible.
        """
        path = root / f"{SYSTEM_CLOCK.time_ns():020d}-{os.urandom(4).hex()}"
        new = root / (path.name + NEW)
        new.mkdir(mode=0o700)
        lock, folder = -1, None
        try:
            lock = os.open(new / LOCK, _MADE_FILE, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = cls(path, lock)
            new.rename(path)
        except OSError:
            if folder is not None:
                folder.let_go()
            elif lock >= 0:
                os.close(lock)
            _remove(new)
            raise
        return folder

    @classmethod
    def adopt(cls, path: Path) -> Folder | None:
        """Return the folder at *path* if its owner is dead, and nobody was faster."""
        try:  # whoever was interrupted while removing it has left it without a lock
            lock = os.open(path / LOCK, os.O_CREAT | os.O_RDWR | _FOUND_FILE, 0o600)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # its owner lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = cls(path, lock)
            if folder.is_held:
                return folder
            folder.let_go()  # it was emptied and removed meanwhile
            return None
        os.close(lock)
        return None

    @property
    def is_held(self) -> bool:
        """Whether the folder is in its place, and the lock still ours."""
        try:
            found, mine = (self.path / LOCK).lstat(), os.fstat(self._lock)
        except OSError:
            return False
        return all(os.path.samestat(one, self._opened) for one in (found, mine))

    def let_go(self) -> None:
        """Give up the lock; what rests in the folder is for others to adopt."""
        lock, self._lock = self._lock, -1
        _held.pop(id(self), None)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), self._opened):
                os.close(lock)

    def leave(self) -> bool:
        """Give up the lock, and remove the folder if it is empty; True if it was."""
        try:
            with os.scandir(self.path) as entries:
                is_empty = all(entry.name == LOCK for entry in entries)
        except OSError as error:
            is_empty = isinstance(error, FileNotFoundError)
        if is_empty and self.is_held:
            _remove(self.path)
        self.let_go()
        return is_empty

    # --- what is in it ---

    def files(self) -> Iterator[tuple[str, int]]:
        """
        Yield the name and the bytes of each regular file, in no order.

        Raises:
            OSError: If the folder cannot be read.
        """
        return files_in(self.path)

    def names(self) -> Iterator[str]:
        """
        Yield the name of each regular file, in no order; quicker than `files`.

        Raises:
            OSError: If the folder cannot be read.
        """
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    yield entry.name

    def write(self, name: str, data: bytes, *, is_synced: bool) -> None:
        """
        Write a file, whole or not at all.

        Raises:
            OSError: If that is not possible; nothing is left behind then.
        """
        path, new = self.path / name, self.path / (name + NEW)
        fd = os.open(new, _MADE_FILE, 0o600)
        try:
            with os.fdopen(fd, "wb", buffering=0) as file:  # no `open` at shutdown
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                if is_synced:
                    os.fsync(fd)
            new.rename(path)
            if is_synced:
                self.sync()
        except BaseException:  # Ctrl-C as well
            for left in (new, path):
                with contextlib.suppress(OSError):
                    left.unlink()
            raise

    def sync(self) -> None:
        """
        Have the disk know the names of the files.

        Raises:
            OSError: If that is not possible.
        """
        fd = os.open(self.path, os.O_RDONLY | _CLOSED)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def open(self, name: str) -> BinaryIO:
        """
        Open a file for reading.

        Raises:
            OSError: If that is not possible.
        """
        fd = os.open(self.path / name, os.O_RDONLY | _FOUND_FILE)
        try:
            return os.fdopen(fd, "rb")
        except OSError:  # a folder
            os.close(fd)
            raise

    def read(self, name: str, start: int, most: int) -> Page:
        """
        Read the good lines of a file from byte *start* on, about *most* bytes.

        Raises:
            OSError: If the file cannot be read.
        """
        events: list[bytes] = []
        with self.open(name) as file:
            end = position = file.seek(0, os.SEEK_END)
            position = file.seek(start)
            while position - start < most:
                line = file.readline(_MAX_LINE)
                if not line:
                    break
                position += len(line)
                event = _event_of(line)
                if event is not None:
                    events.append(event)
        return Page(events, position if position < end else None)

    def rest(self, name: str, start: int, most: int) -> bytes:
        """
        Return what a file has from byte *start* on, at most *most* bytes.

        Raises:
            OSError: If the file cannot be read.
        """
        with self.open(name) as file:
            file.seek(start)
            return file.read(most)

    def count_lines(self, name: str) -> int:
        """
        Return how many whole lines a file has.

        What follows the last line feed is a write that never came to its end.

        Raises:
            OSError: If the file cannot be read.
        """
        with self.open(name) as file:
            blocks = iter(lambda: file.read(1 << 16), b"")
            return sum(block.count(b"\n") for block in blocks)


def files_in(path: Path) -> Iterator[tuple[str, int]]:
    """
    Yield the name and the bytes of each regular file in a folder, in no order.

    Raises:
        OSError: If the folder cannot be read.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it was deleted meanwhile
                if entry.is_file(follow_symlinks=False):
                    yield entry.name, entry.stat(follow_symlinks=False).st_size


def _remove(path: Path) -> None:
    """Remove a folder that has nothing but its lock, if it has."""
    with contextlib.suppress(OSError):
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()


def owners(root: Path) -> list[str]:
    """Return the names of the folders in *root*, from the oldest on."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        folders = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        return sorted(name for name in folders if _OWNER.fullmatch(name))
    return []


def clear_unfinished(root: Path) -> None:
    """Take away the folders of processes that died while they made them."""
    bound = SYSTEM_CLOCK.time_ns() / 1e9 - _ABANDONED
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            is_ours = path.suffix == NEW and _OWNER.fullmatch(path.stem)
            if is_ours and path.lstat().st_mtime < bound:
                _remove(path)
