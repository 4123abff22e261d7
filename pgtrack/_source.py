"""
What is replayed: the files of one folder of the spool, the oldest first.

Only names are in memory, and of a large folder only the oldest.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import heapq
from typing import TYPE_CHECKING

from pgtrack._folder import BATCH, JOURNAL, NEW, batch_name, count_of, time_of

if TYPE_CHECKING:
    from pathlib import Path

    from pgtrack._folder import Folder
    from pgtrack._spool import Spool

__all__ = ["Source", "SpooledFile"]

_PAGE = 1_000
"""Names of a folder that are in memory."""


class SpooledFile:
    """
    A file some of whose events are being sent.

    Args:
        spool: Where it belongs.

        source: The folder that it is in.

        name: Its name.

        is_at_hand: Whether its events are in memory, and need not be read.

    Attributes:
        left: Events that have not ended.

        next: Where to go on reading; None if all was read.

        failures: How often it could not be read.
    """

    def __init__(
        self, spool: Spool, source: Source, name: str, *, is_at_hand: bool
    ) -> None:
        self._spool = spool
        self.source = source
        self.name = name
        self.left = count_of(name)
        self.failures = 0
        self.next: int | None = None if is_at_hand else 0
        self._missing = 0 if is_at_hand else self.left

    @property
    def time(self) -> int:
        """When the oldest of its events was taken, in nanoseconds."""
        return time_of(self.name)

    @property
    def is_expired(self) -> bool:
        """Whether its events have become too old."""
        return self._spool.is_expired(self.time)

    def read(self, most: int) -> list[bytes]:
        """
        Return the next events, about *most* bytes.

        What is damaged is counted when the end of the file is reached.

        Raises:
            OSError: If the file cannot be read.
        """
        page = self.source.folder.read(self.name, self.next or 0, most)
        self.next = page.next
        self._missing -= len(page.events)
        if self._missing < 0:  # more than its name says
            self._spool.ledger.recovered.add(-self._missing)
            self._spool.ledger.spooled.add(-self._missing)
            self.left -= self._missing
            self._missing = 0
        if self.next is None:
            self._end_reading()
        return page.events

    def give_up(self) -> None:
        """Count what was not read as damaged."""
        self.next = None
        self._end_reading()

    def _end_reading(self) -> None:
        if self._missing:
            self._spool.count_damaged(self._missing)
            self.source.set_aside.add(self.name)
        self.release(self._missing)  # of none, too: all else may have ended before

    def release(self, count: int = 1) -> None:
        """Count events as ended; with the last of them the file has served."""
        self.left -= count
        self._spool.ledger.spooled.add(-count)
        if self.left <= 0 and self.next is None:
            self._spool.remove(self.source, self.name)


class Source:
    """
    A folder with files to replay, the oldest first.

    Attributes:
        resting: Events in the files that nobody is sending.

        bytes: What all of its files take.

        busy: The files that are being sent.

        set_aside: Those of them that are damaged.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._names: collections.deque[str] = collections.deque()
        self._has_more = False
        self._ignored: set[str] = set()
        self.busy: dict[str, SpooledFile] = {}
        self.set_aside: set[str] = set()
        self.resting = 0
        self.bytes = 0

    def add(self, name: str, size: int) -> None:
        """Take in a file that was written."""
        self.resting += count_of(name)
        self.bytes += size
        if not self._has_more or (self._names and name < self._names[-1]):
            bisect.insort(self._names, name)
        while len(self._names) > _PAGE:
            self._names.pop()
            self._has_more = True

    def adopt(self) -> int:
        """
        Take in all that is in the folder, and return how many events that are.

        Raises:
            OSError: If the folder or a file cannot be read or renamed.
        """
        for name in [n for n in self.folder.names() if not BATCH.fullmatch(n)]:
            path = self.folder.path / name
            if JOURNAL.fullmatch(name) or (
                path.suffix == NEW and BATCH.fullmatch(path.stem)
            ):
                self._adopt_unsealed(path)
        for name, size in self.folder.files():
            if BATCH.fullmatch(name):
                self.resting += count_of(name)
                self.bytes += size
        self._has_more = self.resting > 0
        return self.resting

    def recount(self) -> None:
        """Look how many bytes the files take: somebody may have deleted some."""
        with contextlib.suppress(OSError):
            files = self.folder.files()
            self.bytes = sum(size for name, size in files if BATCH.fullmatch(name))

    def _adopt_unsealed(self, path: Path) -> None:
        """Seal a journal, or a file that was being written, with what it has."""
        count = self.folder.count_lines(path.name)
        if count:
            path.rename(path.with_name(batch_name(time_of(path.name), count)))
        else:
            path.unlink()

    def _list(self) -> None:
        known = self._ignored | self.busy.keys()
        try:
            names = (name for name in self.folder.names() if BATCH.fullmatch(name))
            oldest = heapq.nsmallest(_PAGE + 1, (n for n in names if n not in known))
        except FileNotFoundError:
            oldest = []
        except OSError:  # they are looked for again
            return
        self._names = collections.deque(oldest[:_PAGE])
        self._has_more = len(oldest) > _PAGE

    def oldest(self) -> str | None:
        """Return the name of the oldest file that nobody is sending."""
        if not self._names and self._has_more:
            self._list()
        return self._names[0] if self._names else None

    @property
    def is_gone(self) -> bool:
        """Whether files that should be there are not."""
        return self.oldest() is None and not self._has_more and self.resting > 0

    def take(self, name: str) -> None:
        """Let a file rest no longer."""
        with contextlib.suppress(ValueError):  # not among the oldest
            self._names.remove(name)
        self.resting -= count_of(name)

    def ignore(self, name: str) -> None:
        """Remember a file that cannot be deleted: it is not to be sent again."""
        self._ignored.add(name)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to send; any thread may ask."""
        return self.resting == 0 and not self.busy
