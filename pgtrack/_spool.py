"""
The spool: events at rest on disk, until the endpoint has taken them.

A process keeps its files in a folder of its own, which it holds by a lock; see
`_folder`.  The folder of a dead process is adopted by whoever gets its lock, and
replayed where it is.  A file that was read stays in its place until the last of its
events has ended, and is then deleted: so nothing is lost with the process, and what was
delivered just before comes again with the same `event_id`.

All but `home` and `new_time` is for whoever holds the lock of the outbox.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

from pgtrack import _diagnostics
from pgtrack._folder import (
    HAS_LOCKS,
    Folder,
    batch_name,
    clear_unfinished,
    count_of,
    disown_all,
    files_in,
    lines_of,
    owners,
    time_of,
)
from pgtrack._journal import Journal
from pgtrack._ledger import Tally
from pgtrack._source import Source, SpooledFile
from pgtrack.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pgtrack._config import Config
    from pgtrack._journal import Sealed
    from pgtrack._ledger import DropReason, Ledger
    from pgtrack.typing import Clock

__all__ = ["Spool"]

_DAMAGED = "damaged"
"""The folder in which damaged files are set aside."""

_AT_ONCE = 1_000
"""Most files that one call drops or finds damaged."""

_MOST_ADOPTED = 16
"""Folders of dead processes that are replayed at a time."""

_MOST_COPIED = 8_000_000
"""Bytes of a large file from which on it is left as it is at the end."""

_LOOK_EVERY = 30.0
"""Seconds, on average, between two looks for dead processes and their files."""

_DISK_AGAIN = 5.0
"""Seconds after which a disk that failed is tried again."""

_SCAN_AGAIN = 1.0
"""Seconds after which it is looked again how full a full spool is."""

_TRIES = 3
"""Times that a file is tried again which cannot be read."""

_GONE: frozenset[int | None] = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_GONE |= {errno.ELOOP, None}  # a link, or a named pipe, which cannot be sought in
"""Errors of reading by which the file is none of ours any more."""

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})
"""Errors of reading that are not the file's."""

_NS = 1_000_000_000


class Spool:
    """
    What one client keeps on disk.

    Args:
        config: The settings of the client.

        ledger: Counts what is recovered and dropped here, and what has left the spool.

        clock: Tells the time.

    Attributes:
        journal: Where each event goes first; None without `spool_each_event`.

        is_full: Whether the journal may not keep what the queue has no room for.

    Raises:
        ConfigError: If `spool_dir` cannot be used.
    """

    def __init__(self, config: Config, ledger: Ledger, clock: Clock) -> None:
        self.ledger = ledger
        self._clock = clock
        self._max_bytes = int(config.max_spool_bytes)
        self._max_age = float(config.max_spool_age)
        self._is_synced = config.spool_fsync
        self._has_journal = config.spool_each_event
        # Events go to no other endpoint and project than what they were emitted for.
        aim = f"{config.endpoint}\n{config.project_id}\n{config.product_id}"
        digest = hashlib.sha256(aim.encode()).hexdigest()
        self._root = Path(str(config.spool_dir)) / digest[:16]
        self._try_out()
        self._begin()

    def _begin(self) -> None:
        # One wall time, and from then on the monotonic clock: whoever sets the wall
        # clock makes nothing too old.
        self._epoch = self._clock.time_ns() - round(self._clock.monotonic() * _NS)
        self._latest = Tally()
        self._latest.add(self._now())
        self._homes: dict[str, Folder] = {}
        self._own: Source | None = None
        self._adopted: list[Source] = []
        self._reading: SpooledFile | None = None
        self._has_more_dead = False
        self._others = 0
        self._unscanned = self._max_bytes  # so that the first write looks
        self._disk_at = 0.0
        self._room_at = 0.0
        self._look_at = 0.0
        self._scan_at = 0.0
        self._hopeless: set[str] = set()
        self.is_full = False
        self.journal = (
            Journal(self.home, self.new_time, is_synced=self._is_synced)
            if self._has_journal
            else None
        )

    def _make_root(self) -> None:
        """Make the folder of this endpoint and project, private from its parent on."""
        self._root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root.mkdir(mode=0o700, exist_ok=True)
        if self._root.lstat().st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "the folder is another user's")

    def _try_out(self) -> None:
        if not HAS_LOCKS:
            msg = (
                "setting `spool_dir` needs a system with POSIX locks (fcntl); this one "
                "has none. Leave it out."
            )
            raise ConfigError(msg)
        try:
            self._make_root()
            Folder.create(self._root).leave()
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "")
            msg = (
                f"setting `spool_dir` must be a folder that can be written (got "
                f"'{self._root.parent}': {type(error).__name__} {name}). Check its "
                "permissions, its owner and its disk."
            )
            raise ConfigError(msg) from None

    def start_over(self) -> None:
        """Forget the parent's files in a forked child."""
        disown_all()
        if self.journal is not None:
            self.journal.disown()
        self._begin()

    # --- by any thread ---

    def new_time(self) -> int:
        """Return the present time in nanoseconds, later than each one before."""
        now = self._now()
        return self._latest.add(max(now - self._latest.value, 1))

    def _now(self) -> int:
        return self._epoch + round(self._clock.monotonic() * _NS)

    def home(self) -> Folder:
        """
        Return the folder of this process, which is made when it is needed.

        Raises:
            OSError: If it cannot be made.
        """
        home = self._homes.get("home")
        if home is None:
            self._make_root()
            made = Folder.create(self._root)
            home = self._homes.setdefault("home", made)
            if home is not made:  # another thread was faster
                made.leave()
        return home

    def note_error(self, error: OSError) -> None:
        """Count and tell that the disk failed."""
        self.ledger.spool_errors.add(1)
        name = errno.errorcode.get(error.errno or 0, "")
        _diagnostics.note(
            "spool",
            f"pgtrack's spool cannot be used ({type(error).__name__} {name}). Events "
            "stay in memory; pgtrack.stats().spool_errors counts the failures.",
        )

    @property
    def has_others(self) -> bool:
        """Whether there are folders of other processes, dead or alive."""
        return len(owners(self._root)) > len(self._homes)

    @property
    def usable_in(self) -> float:
        """Seconds until a disk that failed is tried again; 0 if it did not."""
        return max(self._disk_at - self._clock.monotonic(), 0.0)

    @property
    def writable_in(self) -> float:
        """The same, or until a spool that was full is tried again."""
        return max(self.usable_in, self._room_at - self._clock.monotonic())

    def try_again(self) -> None:
        """Try a disk that failed at once."""
        self._disk_at = 0.0
        self._room_at = 0.0

    # --- writing ---

    def write(
        self, events: Sequence[bytes], time_ns: int, *, is_at_hand: bool
    ) -> SpooledFile | None:
        """
        Write *events* to a file; None if that is not possible, which is counted, told.

        Args:
            events: What is written; counting it as spooled is the caller's.

            time_ns: From `new_time`: which place it has among the files.

            is_at_hand: Whether the caller goes on to send the events.
        """
        if self.writable_in > 0:
            return None
        data = lines_of(events)
        name = batch_name(time_ns, len(events))
        if not self._make_room(len(data)):
            return None
        try:
            self._check_home()
            own = self._own_source(self.home())
            own.folder.write(name, data, is_synced=self._is_synced)
        except OSError as error:
            self._disk_at = self._clock.monotonic() + _DISK_AGAIN
            self.note_error(error)
            return None
        own.add(name, len(data))
        file = SpooledFile(self, own, name, is_at_hand=True)
        if is_at_hand:
            own.take(name)
            own.busy[name] = file
        return file

    def _own_source(self, home: Folder) -> Source:
        if self._own is None:
            self._own = Source(home)
        return self._own

    def _check_home(self) -> None:
        """Get the lock back if the host closed it; give up a folder that is gone."""
        home = self._homes.get("home")
        if home is None or home.is_held:
            return
        home.let_go()
        again, own = Folder.adopt(home.path), self._own
        if again is not None:
            self._homes["home"] = again
            if own is not None:
                own.folder = again
        else:
            self._homes.pop("home")
            if own is not None:
                self._lose(own.resting)
                self._own = None

    def _lose(self, count: int) -> None:
        """Count resting events as gone."""
        self.ledger.spooled.add(-count)
        self.count_damaged(count)

    # --- the journal ---

    def rotate(self) -> None:
        """Begin new files of the journal, before events are taken off the queue."""
        if self.journal is not None:
            self._check_home()
            self.journal.rotate()
            self._take_in(self.journal.sweep())
            self.is_full = not self._make_room(0)

    def sweep(self) -> None:
        """Delete what has served of the journal, and take in what is to be kept."""
        if self.journal is not None:
            self._take_in(self.journal.sweep())
        for source in self._sources:
            if source.is_gone:
                self._lose(source.resting)
                source.resting = 0
                self._end_if_empty(source)

    def _take_in(self, files: Iterable[Sealed]) -> None:
        home = self._homes.get("home")
        for folder, name, size in files:  # counted when they were written
            if home is not None and folder.path == home.path:
                self._own_source(home).add(name, size)
            else:  # somebody removed the folder
                self._lose(count_of(name))

    @property
    def _sources(self) -> list[Source]:
        return [*([] if self._own is None else [self._own]), *self._adopted]

    def _make_room(self, size: int) -> bool:
        """Drop the oldest until *size* bytes fit; False if they do not."""
        self._unscanned += size
        if self._unscanned > self._max_bytes // 16:
            self._scan(size)
        now = self._clock.monotonic()
        if self._total + size > self._max_bytes and now >= self._scan_at:
            self._scan_at = now + _SCAN_AGAIN
            self._adopt()
            self._scan(size)
        if self._fixed + size > self._max_bytes and self._clear_damaged(0.0):
            self._scan(size)
        can_fit = self._fixed + size <= self._max_bytes
        while self._total + size > self._max_bytes:
            source = self._oldest_source(self._sources) if can_fit else None
            if source is None:
                self._room_at = now + _DISK_AGAIN
                _diagnostics.note(
                    "spool_full",
                    "pgtrack's spool is full with what this process may not drop: "
                    "events stay in memory.",
                )
                return False
            self._drop_oldest(source, "spool_full")
        return True

    @property
    def _fixed(self) -> int:
        """The bytes that cannot be had by dropping the oldest."""
        return self._others + (0 if self.journal is None else self.journal.bytes)

    @property
    def _total(self) -> int:
        return self._fixed + sum(source.bytes for source in self._sources)

    def _scan(self, unscanned: int) -> None:
        """Look how many bytes there are, in folders of others and damaged ones, too."""
        self._unscanned = unscanned
        mine = {home.path for home in self._homes.values()}
        for source in self._sources:
            source.recount()
            mine.add(source.folder.path)
        self._others = 0
        with contextlib.suppress(OSError):
            others = [path for path in self._root.iterdir() if path not in mine]
            self._others = sum(_bytes_in(path) for path in others)

    # --- reading ---

    @property
    def has_own(self) -> bool:
        """Whether events of this process wait to be replayed."""
        is_reading = self._reading is not None and self._reading.source is self._own
        return is_reading or (self._own is not None and self._own.oldest() is not None)

    @property
    def has_adopted(self) -> bool:
        """Whether events of dead processes wait to be replayed."""
        is_reading = self._reading is not None and self._reading.source is not self._own
        return is_reading or any(source.oldest() for source in self._adopted)

    @property
    def is_own_empty(self) -> bool:
        """Whether all events of this process have ended; any thread may ask."""
        if self.journal is not None and self.journal.has_kept:
            return False
        return self._own is None or self._own.is_empty

    @property
    def is_empty(self) -> bool:
        """Whether those that were adopted have, too; any thread may ask."""
        return self.is_own_empty and not self._adopted

    def has_before(self, time_ns: int) -> bool:
        """Whether events of this process up to *time_ns* have not ended."""
        own = self._own
        if own is None:
            return False
        oldest = own.oldest()
        times = [file.time for file in own.busy.values()]
        return any(t <= time_ns for t in times) or (
            oldest is not None and time_of(oldest) <= time_ns
        )

    def read(self, most: int) -> tuple[SpooledFile, list[bytes]] | None:
        """
        Return the next events to replay, about *most* bytes: the oldest, our own first.
        """
        for _ in range(_AT_ONCE if self.usable_in == 0 else 0):
            file = self._reading = self._reading or self._take()
            if file is None:
                break
            events = self._read(file, most)
            if file.next is None:
                self._reading = None
            if events:
                return file, events
            if self.usable_in > 0:
                break
        return None

    def _read(self, file: SpooledFile, most: int) -> list[bytes]:
        try:
            return file.read(most)
        except OSError as error:
            self.note_error(error)
            file.failures += 1
            is_gone = error.errno in _GONE
            if is_gone or (file.failures > _TRIES and error.errno not in _PASSING):
                file.give_up()
            else:
                self._disk_at = self._clock.monotonic() + _DISK_AGAIN
            return []

    def _take(self) -> SpooledFile | None:
        own = [] if self._own is None else [self._own]
        source = self._oldest_source(own) or self._oldest_source(self._adopted)
        name = None if source is None else source.oldest()
        if source is None or name is None:
            return None
        source.take(name)
        file = source.busy[name] = SpooledFile(self, source, name, is_at_hand=False)
        return file

    def _oldest_source(self, sources: Iterable[Source]) -> Source | None:
        """Return the source with the oldest file; what is too old is dropped."""
        found = [s for s in tuple(sources) if self._without_expired(s)]
        return min(found, key=lambda source: source.oldest() or "", default=None)

    def _without_expired(self, source: Source) -> bool:
        """Drop what is too old, and return whether anything is left."""
        for _ in range(_AT_ONCE):
            name = source.oldest()
            if name is None or not self.is_expired(time_of(name)):
                break
            self._drop_oldest(source, "spool_expired")
        return source.oldest() is not None

    def is_expired(self, time_ns: int) -> bool:
        """Whether what was emitted then has become too old."""
        return time_ns < self._now() - self._max_age * _NS

    # --- the end of files ---

    def _drop_oldest(self, source: Source, reason: DropReason) -> None:
        name = str(source.oldest())
        source.take(name)
        self.ledger.spooled.add(-count_of(name))
        self.ledger.drop(reason, count_of(name))
        self.remove(source, name)
        _diagnostics.note(
            reason,
            f"pgtrack dropped the oldest events of its spool ({reason}); they are "
            f"counted in pgtrack.stats().dropped[{reason!r}].",
        )

    def count_damaged(self, count: int) -> None:
        """Count events whose files are damaged or gone."""
        if count:
            self.ledger.drop("spool_damaged", count)
            _diagnostics.note(
                "spool_damaged",
                "files of pgtrack's spool were damaged or gone; the events that were "
                "in them are counted in pgtrack.stats().dropped['spool_damaged'].",
            )

    def remove(self, source: Source, name: str) -> None:
        """Delete a file that has served; set it aside if it was damaged."""
        source.busy.pop(name, None)
        path = source.folder.path / name
        try:
            source.bytes -= path.stat().st_size
            if name in source.set_aside:
                aside = self._root / _DAMAGED
                aside.mkdir(mode=0o700, exist_ok=True)
                path.rename(aside / name)
            else:
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            source.ignore(name)
            self.note_error(error)
        source.set_aside.discard(name)
        self._end_if_empty(source)

    def _end_if_empty(self, source: Source) -> None:
        """Be done with a folder that was adopted, once nothing is left of it."""
        if source in self._adopted and source.is_empty:
            self._adopted.remove(source)
            self._give_up(source.folder)
            if self._has_more_dead:
                self._look_at = 0.0

    def _shorten(self, file: SpooledFile, events: Sequence[bytes]) -> None:
        """
        Leave in a file only what has not ended, for whoever replays it next.

        Args:
            file: The file, of which *events* are in memory.

            events: Those that have not ended.
        """
        if file.left >= count_of(file.name):
            return
        source = file.source
        try:
            rest = b""
            if file.next is not None:
                rest = source.folder.rest(file.name, file.next, _MOST_COPIED)
            if len(rest) == _MOST_COPIED:
                return  # some will be sent once more, which is cheaper
            if file.left:
                name = batch_name(file.time, file.left)
                data = lines_of(events) + rest
                source.folder.write(name, data, is_synced=self._is_synced)
        except OSError as error:
            self.note_error(error)  # some will be sent once more
            return
        self.remove(source, file.name)

    def close(self, busy: Mapping[SpooledFile, Sequence[bytes]]) -> None:
        """
        Let go of all files; what rests is for others to adopt.

        Args:
            busy: Events in memory that have not ended, of the files they are in.
        """
        self._check_home()
        homes = list(self._homes.values())
        self._homes.clear()  # who is writing yet begins in a new one
        if self.journal is not None:
            self.journal.finish()
        reading = {} if self._reading is None else {self._reading: ()}
        for file, events in {**reading, **busy}.items():
            self._shorten(file, events)
        for source in self._adopted:
            source.folder.let_go()
        for home in homes:
            home.leave()
        self._own, self._adopted, self._reading = None, [], None

    # --- those of the dead ---

    def look(self) -> None:
        """Now and then adopt what dead processes left, and clear away what is old."""
        now = self._clock.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY * (0.5 + random.random())  # noqa: S311
            clear_unfinished(self._root)
            self._clear_damaged(self._max_age)
            self._adopt()

    @property
    def looks_in(self) -> float:
        """Seconds until `look` has something to do."""
        return max(self._look_at - self._clock.monotonic(), 0.0)

    def _adopt(self) -> None:
        mine = {source.folder.path.name for source in self._adopted}
        mine.update(home.path.name for home in self._homes.values())
        self._has_more_dead = False
        for name in owners(self._root):
            if name in mine or name in self._hopeless:
                continue
            if len(self._adopted) >= _MOST_ADOPTED:
                self._has_more_dead = True
                break
            folder = Folder.adopt(self._root / name)
            if folder is not None:
                self._adopt_folder(folder)

    def _adopt_folder(self, folder: Folder) -> None:
        source = Source(folder)
        try:
            count = source.adopt()
        except OSError as error:
            self.note_error(error)
            if error.errno in _PASSING:
                folder.let_go()
            else:
                self._give_up(folder)
            return
        self.ledger.recovered.add(count)
        self.ledger.spooled.add(count)
        if source.is_empty:
            self._give_up(folder)
        else:
            self._adopted.append(source)

    def _give_up(self, folder: Folder) -> None:
        """Be done with a folder; one that cannot be removed is left alone."""
        if not folder.leave():
            self._hopeless.add(folder.path.name)

    def _clear_damaged(self, age: float) -> bool:
        """Delete damaged files of more than *age* seconds; True if there were any."""
        aside = self._root / _DAMAGED
        bound = self._clock.time_ns() / _NS - age
        has_deleted = False
        with contextlib.suppress(OSError):
            for name, _ in files_in(aside):
                if (aside / name).lstat().st_mtime <= bound:
                    (aside / name).unlink()
                    has_deleted = True
        return has_deleted


def _bytes_in(path: Path) -> int:
    """Return how many bytes the files in a folder have; of what is no folder, 0."""
    with contextlib.suppress(OSError):
        return sum(size for _, size in files_in(path))
    return 0
