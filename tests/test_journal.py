"""The journal: each event is in a file before whoever emits goes on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import shutil
import stat
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from harness import (
    BrokenDisk,
    in_fork,
    interrupts,
    open_descriptors,
    start_together,
)
from pgtrack import _journal
from pgtrack._folder import Folder, count_of, files_in, lines_of
from pgtrack._journal import Journal, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pgtrack._journal import Kind, Sealed

KINDS: list[Kind] = ["queued", "kept"]


class Bench:
    """A journal in a folder of this process."""

    def __init__(self, root: Path, *, is_synced: bool = False) -> None:
        self.root = root
        self.folder = Folder.create(root)
        self.times = itertools.count(1_000)
        self.journal = Journal(self.home, self.times.__next__, is_synced=is_synced)
        self.sealed: list[Sealed] = []

    def home(self) -> Folder:
        """Return the folder."""
        return self.folder

    def renew(self) -> None:
        """Have another folder."""
        self.folder.let_go()
        self.folder = Folder.create(self.root)

    def keep(self, event: bytes) -> None:
        """Append an event that is counted at once."""
        self.journal.append("kept", event).users.add(-1)

    def sweep(self) -> list[str]:
        """Sweep, and return the names of what was sealed."""
        sealed = self.journal.sweep()
        self.sealed += sealed
        return [name for _, name, _ in sealed]

    @property
    def files(self) -> list[str]:
        """The names of the files, from the oldest on."""
        return sorted(name for name, _ in files_in(self.folder.path) if name != "lock")

    @property
    def events(self) -> list[bytes]:
        """The good events of all files."""
        pages = [self.folder.read(name, 0, 2**40) for name in self.files]
        return [event for page in pages for event in page.events]

    @property
    def lines(self) -> int:
        """How many lines all files have, good or not."""
        return sum(self.folder.count_lines(name) for name in self.files)

    def close(self) -> None:
        """Close every descriptor."""
        self.journal.disown()
        self.folder.let_go()


@pytest.fixture(name="bench")
def _bench(tmp_path) -> Iterator[Bench]:
    """Return a journal; when the test is over, no descriptor may be left."""
    before = open_descriptors()
    bench = Bench(tmp_path)
    yield bench
    bench.close()
    assert not open_descriptors() - before


@pytest.fixture(name="busy")
def _busy() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestAppend:
    """Writing one event."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_folder_that_is_left_meanwhile(self, tmp_path, kind: Kind) -> None:
        """A folder that goes between its name and the file is replaced by the next."""
        gone, present = Folder.create(tmp_path), Folder.create(tmp_path)
        assert gone.leave()
        homes = itertools.chain([gone, gone], itertools.repeat(present))
        journal = Journal(homes.__next__, itertools.count(1).__next__, is_synced=False)
        segment = journal.append(kind, b"1")
        journal.disown()
        present.let_go()

        assert segment.folder is present
        assert [b"1"] == present.read(segment.name, 0, 100).events

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_there_at_once(self, bench: Bench, kind: Kind) -> None:
        """When it returns, the event is a line of a file that only we may read."""
        segment = bench.journal.append(kind, b'{"n":1}')

        (name,) = bench.files
        path = bench.folder.path / name
        assert lines_of([b'{"n":1}']) == path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (1, 1, 17) == (
            segment.count.value,
            segment.users.value,
            segment.bytes.value,
        )
        assert bench.journal.bytes == 17

    def test_it_is_one_write(self, bench: Bench) -> None:
        """An event costs one write, whatever its size."""
        with BrokenDisk(bench.root).breaking() as disk:
            bench.journal.append("queued", b"x")
            begun = len(disk.calls)
            bench.journal.append("queued", b"x" * 1_000_000)

        assert ["write"] == disk.calls[begun:]

    def test_events_of_one_kind_share_a_file(self, bench: Bench) -> None:
        """What is in memory as well and what is not are apart, each in order."""
        for i in range(5):
            bench.journal.append("queued", b"queued %d" % i)
            bench.keep(b"kept %d" % i)

        assert 2 == len(bench.files)
        assert [
            *(b"queued %d" % i for i in range(5)),
            *(b"kept %d" % i for i in range(5)),
        ] == bench.events

    @pytest.mark.parametrize("is_synced", [False, True])
    def test_the_disk_has_it_when_that_is_asked_for(
        self, tmp_path, *, is_synced: bool
    ) -> None:
        """A write waits for the disk itself only if it is to."""
        bench = Bench(tmp_path, is_synced=is_synced)
        segment = bench.journal.append("queued", b"x")
        flags = fcntl.fcntl(segment.fd, fcntl.F_GETFL)
        bench.close()

        assert is_synced == (flags & os.O_DSYNC == os.O_DSYNC)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOENT]
    )
    def test_failures(self, tmp_path, kind: Kind, error: int) -> None:
        """An error is raised, what was written before stays, and all is swept."""
        bench = Bench(tmp_path)
        with BrokenDisk(tmp_path).breaking() as disk:
            bench.journal.append(kind, b"first").users.add(-1)
            bench.journal.append(kind, b"second").users.add(-1)
        bench.close()
        before = open_descriptors()
        fewest = 2
        for k in range(len(disk.calls)):
            bench = Bench(tmp_path)
            broken = BrokenDisk(tmp_path, error=error, fails=k.__eq__)
            taken = []
            with broken.breaking():
                for event in (b"first", b"second"):
                    with contextlib.suppress(OSError):
                        bench.journal.append(kind, event).users.add(-1)
                        taken.append(event)
            in_files = bench.events
            bench.journal.finish()
            left = sum(count_of(name) for name in bench.files)
            bench.close()

            assert taken == in_files
            assert left == (len(taken) if kind == "kept" else 0)
            fewest = min(fewest, len(taken))
        assert {"open", "write"} <= {*disk.calls}
        assert 1 == fewest
        assert not open_descriptors() - before

    def test_a_torn_line_spoils_no_other(self, bench: Bench, monkeypatch) -> None:
        """What was not written whole is an error, and the next line is a good one."""
        write = os.write

        def tear(fd: int, data: bytes) -> int:
            return write(fd, data[: len(data) // 2] if b"torn" in data else data)

        monkeypatch.setattr(os, "write", tear)
        bench.keep(b"one")
        for _ in range(3):
            with pytest.raises(OSError, match="not written whole") as caught:
                bench.journal.append("kept", b"torn")
            bench.keep(b"whole")
        (name,) = bench.sweep()

        assert errno.ENOSPC == caught.value.errno
        assert [b"one", b"whole", b"whole", b"whole"] == bench.events
        assert 4 == count_of(name)

    def test_an_interrupt_leaves_nobody_inside(self, bench, monkeypatch) -> None:
        """Ctrl-C in the middle of a write is the host's, and holds no file open."""

        def write(fd: int, data: bytes) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(KeyboardInterrupt):
            bench.journal.append("queued", b"x")
        monkeypatch.undo()
        bench.journal.finish()

        assert [] == bench.files


class TestRotation:
    """The end of a file."""

    def test_a_queued_file_goes_with_its_last_event(self, bench: Bench) -> None:
        """It is deleted when all of its events have ended, and not before."""
        segments = [bench.journal.append("queued", b"%d" % i) for i in range(3)]
        (name,) = bench.files
        seen = []
        bench.journal.rotate()
        for segment in segments:
            seen.append(name in bench.files)
            segment.users.add(-1)
            bench.sweep()

        assert [True, True, True] == seen
        assert name not in bench.files
        assert [] == bench.sealed

    def test_the_present_file_stays(self, bench: Bench) -> None:
        """A file is not deleted as long as more may come."""
        bench.journal.append("queued", b"x").users.add(-1)
        bench.sweep()

        assert [b"x"] == bench.events

    def test_without_events_nothing_is_begun(self, bench: Bench) -> None:
        """An empty file goes on being the present one."""
        bench.journal.rotate()
        assert [] == bench.files
        bench.journal.append("queued", b"x").users.add(-1)
        bench.journal.rotate()
        bench.sweep()
        before = bench.files
        bench.journal.rotate()

        assert before == bench.files
        assert [] == bench.events

    def test_a_kept_file_is_sealed(self, bench: Bench) -> None:
        """Its name says how many events are in it, and keeps its time."""
        for i in range(7):
            bench.keep(b"%d" % i)
        before = bench.journal.has_kept
        bench.sweep()

        ((folder, name, size),) = bench.sealed
        assert (True, False) == (before, bench.journal.has_kept)
        assert name == f"{1_000:020d}-7.batch"
        assert folder is bench.folder
        assert size == (folder.path / name).stat().st_size
        assert [b"%d" % i for i in range(7)] == bench.events

    def test_a_kept_file_waits_for_its_writers(self, bench: Bench) -> None:
        """An event that its writer has yet to count is waited for."""
        segment = bench.journal.append("kept", b"x")
        first = bench.sweep()
        has_kept = bench.journal.has_kept
        segment.users.add(-1)
        second = bench.sweep()

        assert ([], True) == (first, has_kept)
        assert 1 == len(second)

    def test_a_file_of_failures_is_not_sealed(self, bench, monkeypatch) -> None:
        """A file to which no event was written whole is deleted."""
        monkeypatch.setattr(os, "write", lambda fd, data: 0)
        with pytest.raises(OSError, match="not written whole"):
            bench.journal.append("kept", b"x")
        monkeypatch.undo()
        found = bench.journal.finish()

        assert [] == found
        assert [] == bench.files

    def test_a_file_that_cannot_be_begun(self, bench: Bench, monkeypatch) -> None:
        """A rotation that fails retires the file; the next event begins another."""
        bench.journal.append("queued", b"a").users.add(-1)

        def fail() -> Folder:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(bench.journal, "_home", fail)
        bench.journal.rotate()
        with pytest.raises(OSError, match="full"):
            bench.journal.append("queued", b"b")
        monkeypatch.undo()
        bench.journal.append("queued", b"c")
        bench.sweep()

        assert [b"c"] == bench.events

    def test_at_the_end_what_has_not_ended_stays(self, bench: Bench) -> None:
        """What the process leaves behind are the events that have not ended."""
        bench.journal.append("queued", b"waits")
        bench.keep(b"kept")
        bench.journal.rotate()
        bench.journal.append("queued", b"ended").users.add(-1)
        sealed = bench.journal.finish()

        assert [b"kept"] == [
            event
            for folder, name, _ in sealed
            for event in folder.read(name, 0, 1000).events
        ]
        assert [b"kept", b"waits"] == sorted(bench.events)

    def test_a_file_that_was_removed_is_sealed_all_the_same(self, bench) -> None:
        """The name is given, so that its events are counted as gone."""
        bench.keep(b"x")
        (name,) = bench.files
        (bench.folder.path / name).unlink()

        assert [f"{1_000:020d}-1.batch"] == bench.sweep()
        assert [] == bench.files


class TestTogether:
    """Many who write, and one who rotates."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_line_is_whole(self, bench: Bench, busy, kind: Kind) -> None:
        """Each event is in the files, once, however the files come and go."""
        files: set[str] = set()
        is_over = threading.Event()

        def act(i: int) -> list[bytes]:
            if i == 0:
                while not is_over.is_set():
                    bench.journal.rotate()
                    bench.sweep()
            written: list[bytes] = []
            while i and (
                len(written) < 100 or (len(files) < 9 and len(written) < 9999)
            ):
                event = b"%d %d " % (i, len(written)) + b"x" * len(written)
                segment = bench.journal.append(kind, event)
                if kind == "kept":
                    segment.users.add(-1)
                files.add(segment.name)
                written.append(event)
            if i == 1:
                is_over.set()
            return written

        results = start_together(8, act)
        bench.sealed += bench.journal.finish()

        expected = [event for written in results for event in written]
        assert sorted(expected) == sorted(bench.events)
        assert len(expected) == bench.lines
        assert len(files) >= 9
        if kind == "kept":
            counts = [count_of(name) for _, name, _ in bench.sealed]
            lines = [bench.folder.count_lines(name) for _, name, _ in bench.sealed]
            assert lines == counts
            assert len(expected) == sum(counts)

    def test_files_go_when_their_events_have_ended(self, bench: Bench) -> None:
        """What has not ended is in the files at any time; in the end all are gone."""
        waiting: list[tuple[Segment, bytes]] = []
        for i in range(400):
            event = b"%d" % i
            waiting.append((bench.journal.append("queued", event), event))
            if i % 10 == 9:
                bench.journal.rotate()
        random.Random(4).shuffle(waiting)
        while waiting:
            for segment, _ in waiting[:20]:
                segment.users.add(-1)
            del waiting[:20]
            bench.sweep()

            assert {event for _, event in waiting} <= {*bench.events}
        bench.journal.finish()

        assert [] == bench.files

    def test_threads_begin_one_file(self, bench: Bench) -> None:
        """Of those who begin a file at once, one is followed, and no other is left."""
        for _ in range(30):
            segments = start_together(4, lambda _: bench.journal.append("queued", b"x"))
            assert 1 == len({id(segment) for segment in segments})
            assert 1 == len(bench.files)
            for segment in segments:
                segment.users.add(-1)
            bench.journal.finish()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("nested", ["append", "rotate", "both", "gone"])
    def test_at_any_bytecode(self, tmp_path, kind: Kind, nested: str) -> None:
        """A signal handler that emits, or another thread, at any bytecode of append."""
        count = 0
        for interrupt in interrupts(_journal):
            bench = Bench(tmp_path)
            written: list[Segment] = []

            def act(bench: Bench = bench, written: list[Segment] = written) -> None:
                if nested == "gone":
                    for name in bench.files:
                        (bench.folder.path / name).unlink()
                if nested in ("append", "both"):
                    written.append(bench.journal.append(kind, b"nested"))
                if nested in ("rotate", "both"):
                    bench.journal.rotate()
                    bench.sealed += bench.journal.sweep()

            expected = [b"before"]
            written.append(bench.journal.append(kind, b"before"))
            written.append(interrupt(lambda b=bench: b.journal.append(kind, b"x"), act))
            expected += [b"nested"] if len(written) == 3 else []
            events = bench.events
            lines = bench.lines
            counted = sum(segment.count.value for segment in {*written})
            for segment in written:
                segment.users.add(-1)
            bench.sealed += bench.journal.finish()
            left = bench.files
            bench.close()

            if nested == "gone":
                assert {*events} <= {b"before", b"x"}, interrupt.place
            else:
                assert sorted([*expected, b"x"]) == sorted(events), interrupt.place
                assert len(events) == lines == counted, interrupt.place
                names = sorted(name for _, name, _ in bench.sealed)
                assert names == left, interrupt.place
                assert sum(map(count_of, left)) == (kind == "kept") * counted
            count += 1

        assert count > 40


class TestForeign:
    """What others do to descriptors and files."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_host_closes_descriptors(self, bench: Bench, kind: Kind) -> None:
        """A file that the host opened on our number is not written, nor closed."""
        first = bench.journal.append(kind, b"first")
        number = first.fd
        os.close(number)
        with (bench.root / "foreign").open("wb", buffering=0) as file:
            assert number == file.fileno()
            second = bench.journal.append(kind, b"second")
            for segment in (first, second):
                segment.users.add(-1)
            bench.journal.rotate()
            events = bench.events
            bench.journal.finish()
            file.write(b"still open")

        assert [b"first", b"second"] == events
        assert (bench.root / "foreign").read_bytes() == b"still open"

    def test_a_closed_descriptor(self, bench: Bench) -> None:
        """A descriptor that is closed is no error: another file is begun."""
        os.close(bench.journal.append("queued", b"first").fd)
        bench.journal.append("queued", b"second")

        assert [b"first", b"second"] == bench.events

    def test_the_file_is_removed(self, bench: Bench) -> None:
        """A file that nobody would find is not written to."""
        bench.journal.append("queued", b"first")
        (bench.folder.path / bench.files[0]).unlink()
        bench.journal.append("queued", b"second")

        assert [b"second"] == bench.events

    def test_the_folder_is_removed(self, bench: Bench) -> None:
        """With the folder gone, events are an error, until there is another."""
        segment = bench.journal.append("queued", b"first")
        shutil.rmtree(bench.folder.path)
        with pytest.raises(FileNotFoundError):
            bench.journal.append("queued", b"lost")
        bench.renew()
        bench.journal.append("queued", b"second")
        segment.users.add(-1)
        bench.sweep()

        assert [b"second"] == bench.events

    def test_there_is_another_folder(self, bench: Bench) -> None:
        """A file in a folder that is no more the process's is not written to."""
        segment = bench.journal.append("kept", b"first")
        bench.renew()
        bench.journal.append("kept", b"second").users.add(-1)
        segment.users.add(-1)
        folders = [folder for folder, _, _ in bench.journal.finish()]

        assert [b"second"] == bench.events
        assert [segment.folder, bench.folder] == folders

    def test_there_is_no_folder_any_more(self, bench: Bench, monkeypatch) -> None:
        """Who finds no folder holds no file open."""
        segment = bench.journal.append("queued", b"first")

        def fail() -> Folder:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(bench.journal, "_home", fail)
        with pytest.raises(OSError, match="full"):
            bench.journal.append("queued", b"second")

        assert 1 == segment.users.value

    def test_it_cannot_be_told_which_file_it_is(self, bench, monkeypatch) -> None:
        """A file that is no good from the start is not left behind."""

        def fail(number: int) -> os.stat_result:
            raise OSError(errno.EIO, "no")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", fail)
            with pytest.raises(OSError, match="no"):
                bench.journal.append("queued", b"x")

        assert [] == bench.files

    def test_another_replaces_it_first(self, bench: Bench) -> None:
        """Who finds his file replaced by another thread follows that one."""
        gone = bench.journal.append("queued", b"first")
        bench.journal._retire("queued")
        bench.journal._retire("queued")  # two find out at once
        present = bench.journal.append("queued", b"second")
        bench.journal._replace("queued", gone)

        assert present is bench.journal.append("queued", b"third")
        assert (1_000, 1_001) == (gone.time, present.time)

    def test_it_is_replaced_as_soon_as_it_is_there(self, bench, monkeypatch) -> None:
        """Who comes too late to be counted in takes the next file."""
        begin = bench.journal._begin
        begun: list[Segment] = []

        def late(kind: Kind) -> Segment:
            begun.append(begin(kind))
            if len(begun) == 1:
                bench.journal._retire(kind)
            return begun[-1]

        monkeypatch.setattr(bench.journal, "_begin", late)
        segment = bench.journal.append("queued", b"x")
        bench.sweep()

        assert [begun[0], segment] == begun
        assert [segment.name] == bench.files

    def test_a_file_that_is_always_gone(self, bench: Bench, monkeypatch) -> None:
        """Whoever never finds its file in place gives up."""
        monkeypatch.setattr(Segment, "is_in_place", False)
        with pytest.raises(OSError, match="replaced each time") as caught:
            bench.journal.append("queued", b"x")
        bench.journal.finish()

        assert errno.EAGAIN == caught.value.errno
        assert [] == bench.files

    def test_it_is_closed_once(self, bench: Bench) -> None:
        """A file that was closed does not close its own successor on the number."""
        segment = bench.journal.append("queued", b"x")
        path, number = bench.folder.path / segment.name, segment.fd
        segment.close()
        with path.open("rb") as file:
            assert number == file.fileno()
            segment.close()
            assert file.read() == lines_of([b"x"])


class TestFork:
    """A child has its parent's files, and must not touch them."""

    def test_the_child_closes_them(self, bench: Bench) -> None:
        """After `disown` the child has none open, and the parent goes on."""
        bench.journal.append("queued", b"a")
        bench.journal.rotate()
        bench.journal.append("queued", b"b")
        bench.keep(b"c")

        def child() -> int:
            before = len(open_descriptors())
            bench.journal.disown()
            return before - len(open_descriptors())

        closed = in_fork(child)
        bench.journal.append("queued", b"d")

        assert 3 == closed
        assert [b"a", b"b", b"d", b"c"] == bench.events

    def test_a_child_that_goes_on_writes_nothing(self, bench: Bench) -> None:
        """Who was forked within `append` meets an error, not a foreign file."""
        segment = bench.journal.append("queued", b"a")
        foreign = bench.root / "foreign"

        def child() -> int | None:
            bench.journal.disown()
            with foreign.open("wb"):
                try:
                    segment.write(b"x")
                except OSError as error:
                    return error.errno
            return None

        assert errno.EBADF == in_fork(child)
        assert (b"", [b"a"]) == (foreign.read_bytes(), bench.events)

    def test_forks_while_threads_write(self, bench: Bench) -> None:
        """Children that come and go cost the parent no line, and add none."""
        is_over = threading.Event()

        def child() -> None:
            bench.journal.disown()

        def act(i: int) -> int:
            if i == 0:
                for _ in range(5):
                    in_fork(child)
                is_over.set()
                return 0
            count = 0
            while not is_over.is_set() and count < 20_000:
                bench.journal.append("queued", b"%d %d" % (i, count))
                count += 1
            return count

        counts = start_together(3, act)

        expected = [b"%d %d" % (i, j) for i in (1, 2) for j in range(counts[i])]
        assert sorted(expected) == sorted(bench.events)
