"""The spool: what rests on disk comes back, whatever happened to it meanwhile."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest

from harness import (
    BrokenDisk,
    in_fork,
    open_descriptors,
    run_script,
    start_together,
)
from pgtrack import Config, ConfigError, _diagnostics, _folder, _source, _spool
from pgtrack._folder import (
    batch_name,
    files_in,
    journal_name,
    lines_of,
    owners,
)
from pgtrack._ledger import Ledger
from pgtrack._spool import Spool
from pgtrack.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from pgtrack._ledger import Stats
    from pgtrack._source import SpooledFile

DAY = 86_400.0
NS = 1_000_000_000
ERRORS = [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOENT]
START = datetime(2026, 3, 2, 8, 15, tzinfo=timezone.utc)
START_NS = 1_772_439_300 * NS
TIGHT = dict.fromkeys(("max_batch_bytes", "max_event_bytes"), 10_000)
TIGHT["max_spool_bytes"] = 100_000


class Bench:
    """The spool of one process, and what it counts."""

    def __init__(
        self, folder: Path, *, clock: FakeClock | None = None, **options: Any
    ) -> None:
        options = {"project_id": "p", "endpoint": "console:", **options}
        self.clock = clock or FakeClock(START)
        self.ledger = Ledger()
        self.spool = Spool(Config(spool_dir=folder, **options), self.ledger, self.clock)

    @property
    def root(self) -> Path:
        """The folder of this endpoint and project."""
        return self.spool._root

    @property
    def stats(self) -> Stats:
        """What was counted."""
        return self.ledger.stats()

    def emit(self, events: Sequence[bytes]) -> bool:
        """Count events as emitted, and have them written; False if they are not."""
        self.ledger.emitted.add(len(events))
        time = self.spool.new_time()
        if self.spool.write(events, time, is_at_hand=False) is None:
            self.ledger.pending.add(len(events))
            return False
        self.ledger.spooled.add(len(events))
        return True

    def hold(self, events: Sequence[bytes]) -> SpooledFile:
        """Have events written that are in memory as well."""
        self.ledger.emitted.add(len(events))
        file = self.spool.write(events, self.spool.new_time(), is_at_hand=True)
        assert file is not None
        self.ledger.spooled.add(len(events))
        return file

    def deliver(self, file: SpooledFile, count: int = 1) -> None:
        """End *count* events of *file*."""
        for _ in range(count):
            self.ledger.delivered.add(1)
            file.release()

    def replay(self, most: int = 1_000, pages: int = 100_000) -> list[bytes]:
        """Deliver what rests, and return it."""
        delivered: list[bytes] = []
        for _ in range(pages):
            found = self.spool.read(most)
            if found is None:
                break
            delivered += found[1]
            self.deliver(found[0], len(found[1]))
        self.spool.sweep()
        return delivered

    def adopt(self) -> Stats:
        """Look for what the dead have left."""
        self.clock.advance(60.0)
        self.spool.look()
        return self.stats

    def close(self, busy: dict[SpooledFile, list[bytes]] | None = None) -> None:
        """End, as a process does."""
        self.spool.close(busy or {})

    @property
    def home(self) -> Path:
        """The folder of this process."""
        return self.spool.home().path


def names(count: int, start: int = 0) -> list[bytes]:
    """Return events that count up."""
    return [b'{"n":%d}' % i for i in range(start, start + count)]


def on_disk(path: Path) -> list[str]:
    """Return the names of all files below *path*, but for locks."""
    return sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.name != "lock" and not file.is_dir()
    )


def bytes_below(path: Path) -> int:
    """Return the bytes of all files below *path*."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def bury(folder: Path, files: dict[str, bytes], **options: Any) -> Path:
    """Leave behind the folder of a dead process with *files*, and return its path."""
    bench = Bench(folder, **options)
    home = bench.home
    for name, data in files.items():
        (home / name).write_bytes(data)
    bench.close()
    return home


def name(count: int, age: float = 1.0) -> str:
    """Return the name of a file of some seconds before the start."""
    return batch_name(START_NS - round(age * NS), count)


@pytest.fixture(autouse=True)
def _no_leaked_descriptor(monkeypatch, _benches) -> Iterator[None]:
    """Every descriptor that a test opened is closed with its benches."""
    before = open_descriptors()
    yield
    for bench in _benches:
        bench.close()
    assert not open_descriptors() - before


@pytest.fixture(name="_benches")
def _benches_(monkeypatch) -> list[Bench]:
    """Keep each bench, so that all are closed."""
    benches: list[Bench] = []
    make = Bench.__init__

    def init(self: Bench, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        benches.append(self)

    monkeypatch.setattr(Bench, "__init__", init)
    return benches


@pytest.fixture(name="bench")
def _bench(tmp_path) -> Bench:
    """Return the spool of this process."""
    return Bench(tmp_path)


class TestPlace:
    """The folder."""

    def test_it_is_made(self, tmp_path) -> None:
        """Missing folders are made, and nobody else may look into them."""
        before = os.umask(0)
        try:
            bench = Bench(tmp_path / "a" / "spool")
            bench.emit(names(1))
        finally:
            os.umask(before)

        modes = {
            path: stat.S_IMODE(path.stat().st_mode)
            for path in (tmp_path / "a" / "spool").rglob("*")
        }
        assert stat.S_IMODE((tmp_path / "a" / "spool").stat().st_mode) == 0o700
        assert {0o700} == {mode for path, mode in modes.items() if path.is_dir()}
        assert {0o600} == {mode for path, mode in modes.items() if path.is_file()}
        assert 4 == len(modes)

    def test_trying_it_leaves_nothing(self, bench: Bench) -> None:
        """A process that has nothing to write has no folder."""
        assert [] == [*bench.root.iterdir()]

    @pytest.mark.parametrize(
        "options", [{"endpoint": "console:stderr"}, {"project_id": "q"}]
    )
    def test_each_destination_has_its_own(self, tmp_path, options) -> None:
        """Events are sent to no other endpoint and for no other project."""
        Bench(tmp_path).emit(names(3))
        other = Bench(tmp_path, **options)

        assert {} == {**other.adopt().dropped}
        assert other.spool.read(1_000) is None
        assert other.root.parent == tmp_path

    def test_a_file_is_in_the_way(self, tmp_path) -> None:
        """What cannot be a folder is told by name and kind of error."""
        root = Bench(tmp_path).root
        root.rmdir()
        root.touch()
        with pytest.raises(ConfigError) as caught:
            Bench(tmp_path)

        expected = (
            "setting `spool_dir` must be a folder that can be written (got "
            f"'{tmp_path}': FileExistsError EEXIST). "
        )
        assert str(caught.value).startswith(expected)

    @pytest.mark.parametrize("error", [errno.EACCES, *ERRORS])
    def test_it_cannot_be_used(self, tmp_path, error: int) -> None:
        """Whichever call fails when the folder is tried, it is a ConfigError."""
        with BrokenDisk(tmp_path).breaking() as disk:
            Bench(tmp_path / "spool")
        last = disk.calls.index("rename")
        for k in range(last + 1):
            broken = BrokenDisk(tmp_path, error=error, fails=k.__le__)
            folder = tmp_path / str(k)
            with broken.breaking(), pytest.raises(ConfigError, match="`spool_dir`"):
                Bench(folder)

        assert {"mkdir", "open", "flock", "rename"} <= {*disk.calls}

    def test_another_users_folder(self, tmp_path, monkeypatch) -> None:
        """Events are not put where another user could read them."""
        Bench(tmp_path)
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(ConfigError, match="PermissionError EPERM"):
            Bench(tmp_path)

    def test_without_locks(self, tmp_path, monkeypatch) -> None:
        """A system without POSIX locks has no spool."""
        monkeypatch.setattr(_spool, "HAS_LOCKS", False)
        with pytest.raises(ConfigError, match=r"needs a system with POSIX locks"):
            Bench(tmp_path)


class TestTime:
    """Names say when."""

    def test_times_rise(self, bench: Bench) -> None:
        """Each time is later than the one before, though the clock stands still."""
        times = [bench.spool.new_time() for _ in range(1_000)]

        assert sorted({*times}) == times
        assert abs(times[0] - START_NS) < 10
        assert times[-1] - times[0] < 1_100

    def test_threads_have_times_of_their_own(self, bench: Bench) -> None:
        """Those who ask at once get different times, none of them far off."""
        results = start_together(
            8, lambda _: [bench.spool.new_time() for _ in range(500)]
        )
        times = [time for result in results for time in result]

        assert len({*times}) == 4_000
        assert max(times) - START_NS < 1_000_000
        assert all(sorted(result) == result for result in results)

    def test_the_first_who_ask_together(self, bench: Bench, monkeypatch) -> None:
        """Nobody is sent into the next century by whoever asks at the same time."""
        nested: list[int] = []
        tally = bench.spool._latest

        class Slow:
            add = tally.add

            @property
            def value(self) -> int:
                value = tally.value
                if not nested:
                    nested.append(0)
                    nested[0] = bench.spool.new_time()
                return value

        monkeypatch.setattr(bench.spool, "_latest", Slow())
        time = bench.spool.new_time()

        assert START_NS - NS < nested[0] < time < START_NS + NS

    def test_the_wall_clock_is_read_once(self, bench: Bench) -> None:
        """Whoever sets the wall clock changes no order."""
        first = bench.spool.new_time()
        bench.clock._time_ns -= 1_000 * NS
        bench.clock.advance(1.0)

        assert abs(bench.spool.new_time() - first - NS) < 10


class TestReplay:
    """What was written is read, the oldest first."""

    def test_in_order(self, bench: Bench) -> None:
        """Files come in the order of their times, events in that of their file."""
        for i in range(5):
            bench.emit(names(10, 10 * i))
        resting = bench.stats.spooled

        assert names(50) == bench.replay()
        stats = bench.stats
        assert (50, 0, 50) == (resting, stats.spooled, stats.delivered)
        assert [] == on_disk(bench.root)
        assert stats.is_balanced

    def test_by_time_not_by_turn(self, bench: Bench) -> None:
        """What was taken off the queue before is before, though written later."""
        early = bench.spool.new_time()
        bench.emit([b"late"])
        bench.spool.write([b"early"], early, is_at_hand=False)

        assert [b"early", b"late"] == bench.replay()

    def test_a_file_stays_until_its_last_event_has_ended(self, bench: Bench) -> None:
        """In flight, events are on disk as well, and counted as spooled."""
        bench.emit(names(3))
        found = bench.spool.read(1_000)
        assert found is not None
        seen = []
        for _ in range(3):
            seen.append((len(on_disk(bench.root)), bench.stats.spooled))
            bench.deliver(found[0])

        assert [(1, 3), (1, 2), (1, 1)] == seen
        assert ([], 0) == (on_disk(bench.root), bench.stats.spooled)

    def test_what_is_at_hand_is_not_read(self, bench: Bench) -> None:
        """What the caller goes on to send comes from the caller alone."""
        file = bench.hold(names(2))
        found = bench.spool.read(1_000)
        seen = (bench.spool.has_own, bench.spool.is_own_empty, file.is_expired)
        bench.deliver(file, 2)

        assert found is None
        assert (False, False, False) == seen
        assert bench.spool.is_own_empty
        assert [] == on_disk(bench.root)

    def test_large_files_come_in_pages(self, bench: Bench) -> None:
        """A page is about as large as asked, and the next one goes on there."""
        bench.emit(names(100))
        bench.emit(names(2, 100))
        first = bench.spool.read(200)
        assert first is not None
        has_own = bench.spool.has_own
        bench.deliver(first[0], len(first[1]))

        assert len(first[1]) < 20
        assert has_own
        assert names(102) == first[1] + bench.replay(200)

    def test_what_has_not_ended_before(self, bench: Bench) -> None:
        """Whether something of before a time is left can be asked at any moment."""
        before = bench.spool.new_time()
        file = bench.hold(names(1))
        bench.emit(names(1))
        after = bench.spool.new_time()
        seen = [bench.spool.has_before(time) for time in (before, after)]
        bench.deliver(file)
        seen.append(bench.spool.has_before(after))
        bench.replay()
        seen.append(bench.spool.has_before(after))

        assert [False, True, True, False] == seen
        assert not Bench(bench.root).spool.has_before(after)

    def test_many_files(self, bench: Bench) -> None:
        """Of thousands of files a page of names is in memory, and all come in order."""
        most = 0
        for i in range(1_500):
            bench.emit(names(1, i))
            most = max(most, len(bench.spool._own._names))  # type: ignore[union-attr]
        delivered: list[bytes] = []
        while len(delivered) < 1_500:
            delivered += bench.replay(pages=50)
            most = max(most, len(bench.spool._own._names))  # type: ignore[union-attr]
            if len(delivered) == 1_000:
                bench.emit([b"last"])

        assert [*names(1_500), b"last"] == delivered + bench.replay()
        assert most <= _source._PAGE

    def test_many_files_of_the_dead(self, tmp_path) -> None:
        """Thousands of files are adopted and replayed in order, page by page."""
        files = {name(1, 20_000 - i): lines_of(names(1, i)) for i in range(4_000)}
        bury(tmp_path, files)
        bench = Bench(tmp_path)
        bench.adopt()
        most, delivered = 0, []
        while found := bench.replay(pages=99):
            delivered += found
            sizes = [len(source._names) for source in bench.spool._adopted]
            most = max(most, *sizes, 0)

        assert names(4_000) == delivered
        assert 0 < most <= _source._PAGE
        assert [] == [*bench.root.iterdir()]


class TestNextProcess:
    """What one process leaves, another one adopts."""

    def test_after_an_end(self, tmp_path) -> None:
        """What rested at the end is recovered, and delivered."""
        first = Bench(tmp_path)
        first.emit(names(3))
        first.emit(names(3, 3))
        first.close()
        bench = Bench(tmp_path)
        stats = bench.adopt()
        seen = (bench.spool.has_adopted, bench.spool.is_own_empty, bench.spool.is_empty)

        assert (6, 6, True) == (stats.recovered, stats.spooled, stats.is_balanced)
        assert (True, True, False) == seen
        assert names(6) == bench.replay()
        assert bench.stats.is_balanced
        assert [] == [*bench.root.iterdir()]
        assert first.stats.is_balanced
        assert 6 == first.stats.spooled

    def test_ours_go_first(self, tmp_path) -> None:
        """Events of this process are not held up by those of the dead."""
        bury(tmp_path, {name(2): lines_of(names(2))})
        bench = Bench(tmp_path)
        bench.adopt()
        bench.emit([b"own"])

        assert [b"own", *names(2)] == bench.replay()

    def test_after_a_kill(self, tmp_path) -> None:
        """After SIGKILL, files and journals are recovered, the torn tail is not."""
        done = run_script(
            f"""
            import os, signal
            from pgtrack import Config
            from pgtrack._ledger import Ledger
            from pgtrack._clock import SYSTEM_CLOCK
            from pgtrack._spool import Spool
            config = Config(
                project_id="p", endpoint="console:",
                spool_dir={str(tmp_path)!r}, spool_each_event=True,
            )
            spool = Spool(config, Ledger(), SYSTEM_CLOCK)
            for i in range(3):
                spool.journal.append("queued", b"journal %d" % i)
                spool.journal.append("kept", b"kept %d" % i)
            spool.write([b"batch"], spool.new_time(), is_at_hand=True)
            os.write(spool.journal.append("queued", b"last").fd, b"torn")
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        bench = Bench(tmp_path, clock=FakeClock(datetime.now(timezone.utc)))
        stats = bench.adopt()
        delivered = bench.replay()

        assert done.returncode == -signal.SIGKILL
        assert (8, 8) == (stats.recovered, len(delivered))
        expected = [b"journal %d" % i for i in range(3)] + [b"last"]
        assert expected == [e for e in delivered if e[:1] in b"jl"]
        assert [] == [*bench.root.iterdir()]
        assert {} == {**bench.stats.dropped}

    @pytest.mark.parametrize("length", [0, 8, 17, 20, 34])
    def test_a_file_that_was_being_written(self, tmp_path, length: int) -> None:
        """Of a file that was never finished, whole lines are recovered."""
        data = lines_of(names(2))[:length]
        bury(tmp_path, {name(2, 5.0) + ".new": data, name(1): lines_of([b"x"])})
        bench = Bench(tmp_path)
        recovered = bench.adopt().recovered
        whole = length // 17

        assert 1 + whole == recovered
        assert [*names(whole), b"x"] == bench.replay()
        assert {} == {**bench.stats.dropped}
        assert [] == [*bench.root.iterdir()]

    def test_empty_journals_are_removed(self, tmp_path) -> None:
        """Journals without a whole line are nothing to replay."""
        bury(tmp_path, {journal_name(5): b"", journal_name(6): b"torn"})
        bench = Bench(tmp_path)

        assert 0 == bench.adopt().recovered
        assert [] == [*bench.root.iterdir()]

    def test_the_living_keep_theirs(self, tmp_path) -> None:
        """What another process, or another client of this one, has is not touched."""
        one, two = Bench(tmp_path), Bench(tmp_path)
        one.emit(names(3))
        two.emit(names(3, 3))
        found = [one.adopt().recovered, two.adopt().recovered]
        found.append(in_fork(lambda: Bench(tmp_path).adopt().recovered))

        assert [0, 0, 0] == found
        assert (names(3), names(3, 3)) == (one.replay(), two.replay())

    def test_several_adopt_at_once(self, tmp_path) -> None:
        """However many look, each event of the dead comes from exactly one."""
        for i in range(20):
            bury(tmp_path, {name(5): lines_of(names(5, 5 * i))})
        benches = [Bench(tmp_path) for _ in range(4)]

        def act(i: int) -> list[bytes]:
            delivered: list[bytes] = []
            for _ in range(3):
                benches[i].adopt()
                delivered += benches[i].replay()
            return delivered

        found = start_together(4, act)

        assert sorted(names(100)) == sorted(event for each in found for event in each)
        assert 100 == sum(bench.stats.recovered for bench in benches)
        assert [] == [*benches[0].root.iterdir()]

    def test_some_at_a_time(self, tmp_path) -> None:
        """Of many dead processes some are replayed at a time, the oldest first."""
        for i in range(40):
            bury(tmp_path, {name(1, 100 - i): lines_of(names(1, i))})
        bench = Bench(tmp_path)
        first = bench.adopt().recovered
        delivered = bench.replay()
        rounds = 0
        while bench.spool.looks_in == 0:  # as soon as there is room again
            bench.spool.look()
            delivered += bench.replay()
            rounds += 1

        assert _spool._MOST_ADOPTED == first
        assert names(40) == delivered
        assert rounds < 30

    def test_it_looks_now_and_then(self, tmp_path) -> None:
        """Every half minute or so, and not at the same moment as its siblings."""
        bench = Bench(tmp_path)
        waits = []
        for _ in range(30):
            bench.spool.look()
            waits.append(bench.spool.looks_in)
            bury(tmp_path, {name(1): lines_of([b"x"])})
            bench.spool.look()
            assert [] == bench.replay()
            bench.clock.advance(waits[-1])
            bench.spool.look()
            assert [b"x"] == bench.replay()

        assert 15.0 <= min(waits) < max(waits) <= 45.0
        assert len({*waits}) > 20

    def test_what_is_foreign_stays(self, tmp_path) -> None:
        """What is not ours is neither read nor removed, wherever it is."""
        bench = Bench(tmp_path)
        home = bury(tmp_path, {name(2): lines_of(names(2)), "foreign.txt": b"f"})
        (home / "foreign.new").touch()
        (home / name(3)).mkdir()
        (home / name(4)).symlink_to(tmp_path / "elsewhere")
        os.mkfifo(home / name(5))
        (tmp_path / "elsewhere").write_bytes(lines_of(names(4)))
        (bench.root / f"{5:020d}-0123abcd").symlink_to(home)
        (bench.root / f"{6:020d}-0123abcd").touch()
        (bench.root / "notes").mkdir()
        before = {path for path in tmp_path.rglob("*") if path.name != name(2)}
        for _ in range(3):
            bench.adopt()

        assert names(2) == bench.replay()
        assert before - {home / "lock"} == {*tmp_path.rglob("*")} - {home / "lock"}
        assert 2 == bench.stats.recovered
        assert {} == {**bench.stats.dropped}

    def test_a_forked_child(self, tmp_path) -> None:
        """A child has nothing of its parent's, and holds nothing of it either."""
        bench = Bench(tmp_path)
        bury(tmp_path, {name(1): lines_of([b"dead"])})
        bench.emit(names(3))
        bench.adopt()

        locks = [(folder._lock, folder._opened) for folder in _folder._held.values()]

        def is_open(number: int, opened: os.stat_result) -> bool:
            try:
                return os.path.samestat(os.fstat(number), opened)
            except OSError:
                return False

        def child() -> tuple[list[bytes], list[bool]]:
            bench.spool.start_over()
            bench.ledger.reset()
            left = [is_open(*lock) for lock in locks]
            bench.emit([b"child"])
            bench.adopt()
            return bench.replay(), left

        assert ([b"child"], [False] * len(locks)) == in_fork(child)
        assert len(locks) >= 2
        assert [*names(3), b"dead"] == bench.replay()
        assert bench.stats.is_balanced

    def test_what_is_only_for_a_journal(self, bench: Bench, monkeypatch) -> None:
        """Without a journal there is nothing to rotate, nor to disown in a child."""
        bench.emit(names(2))
        held = _folder._held.items()
        own = {key: folder for key, folder in held if bench.root in folder.path.parents}
        monkeypatch.setattr(_folder, "_held", own)  # there is no child here
        bench.spool.rotate()
        before = on_disk(bench.root)
        bench.spool.start_over()

        assert [*before] == on_disk(bench.root)
        assert bench.spool.journal is None
        assert 2 == bench.adopt().recovered

    def test_the_child_of_a_dead_owner(self, tmp_path) -> None:
        """A child that lives on does not keep its dead parent's files from others."""
        (over, end), (told, tell) = os.pipe(), os.pipe()
        owner = os.fork()
        if owner == 0:
            bench = Bench(tmp_path)
            bench.emit(names(3))
            if os.fork() == 0:
                os.close(end)
                bench.spool.start_over()
                os.write(tell, b"1")
            os.read(over, 1)
            os._exit(0)
        os.read(told, 1)
        bench = Bench(tmp_path)
        before = bench.adopt().recovered
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        after = bench.adopt().recovered
        for number in (over, end, told, tell):
            os.close(number)

        assert (0, 3) == (before, after)


class TestDamage:
    """A damaged file costs only itself."""

    def replay(
        self, folder: Path, files: dict[str, bytes], most: int = 1_000
    ) -> tuple[list[bytes], Stats, list[str]]:
        """Replay files of a dead process between two good ones."""
        good = {name(1, 90.0): lines_of([b"a"]), name(1, 1.0): lines_of([b"z"])}
        bury(folder, {**good, **files})
        bench = Bench(folder)
        recovered = bench.adopt().recovered
        delivered: list[bytes] = []
        for _ in range(6):  # a call goes over so much junk, and no more
            delivered += bench.replay(most)
        stats = bench.stats

        assert stats.is_balanced
        assert 0 == stats.spooled
        assert delivered[:1] + delivered[-1:] == [b"a", b"z"]
        assert recovered == stats.recovered - max(0, len(delivered) - recovered)
        assert bench.spool.is_empty
        left = on_disk(bench.root)
        shutil.rmtree(bench.root)
        return delivered[1:-1], stats, left

    def test_flipped_bits(self, tmp_path) -> None:
        """Whatever bit flips, good events come, the others are counted exactly."""
        events = [b"one", b"two", b"six"]
        data = lines_of(events)
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            found, stats, left = self.replay(tmp_path, {name(3, 5.0): damaged})
            lost = 3 - len(found)

            assert found == [event for event in events if event in found]
            assert lost == stats.dropped.get("spool_damaged", 0)
            assert lost <= 2
            assert ([f"damaged/{name(3, 5.0)}"] if lost else []) == left

    def test_truncations(self, tmp_path) -> None:
        """Wherever a file ends, its whole lines come, the others are counted."""
        data = lines_of(names(3))
        for length in range(len(data)):
            found, stats, _ = self.replay(tmp_path, {name(3, 5.0): data[:length]})
            whole = data[:length].count(b"\n")

            assert names(whole) == found
            assert 3 - whole == stats.dropped["spool_damaged"]

    @pytest.mark.parametrize(
        ("data", "good", "lost"),
        [
            (b"", 0, 3),
            (b"\0" * 5_000, 0, 3),
            (b"\n" * 5_000, 0, 3),
            (lines_of(names(3)) + b"torn", 3, 0),
            (lines_of(names(3)) + b"x" * 3_000 + b"\n", 3, 0),
            (b"x" * 3_000 + b"\n" + lines_of(names(3)), 3, 0),
            (lines_of(names(2)) + b"x" * 20_000_000, 2, 1),
            (lines_of(names(5)), 5, 0),
            (lines_of(names(500)), 500, 0),
        ],
    )
    @pytest.mark.parametrize("most", [1, 50, 1_000])
    def test_oddities(self, tmp_path, data, good: int, lost: int, most: int) -> None:
        """Junk is passed over, and an event more than the name says is recovered."""
        found, stats, left = self.replay(tmp_path, {name(3, 5.0): data}, most)

        assert names(good) == found
        assert lost == stats.dropped.get("spool_damaged", 0)
        assert bool(lost) == (left != [])
        assert 2 + max(3, good) == stats.recovered

    def test_it_is_told(self, tmp_path) -> None:
        """There is a line in the log, without a name or a payload."""
        self.replay(tmp_path, {name(3, 5.0): b"s3cret"})

        _, line = _diagnostics._notes["spool_damaged"]
        assert "stats().dropped['spool_damaged']" in line
        assert "s3cret" not in line

    def test_damaged_files_are_set_aside_for_a_while(self, tmp_path) -> None:
        """What is left of them is private, and deleted when it is old."""
        bury(tmp_path, {name(3, 5.0): b"?"})
        bench = Bench(tmp_path, clock=FakeClock(datetime.now(timezone.utc)))
        bench.spool._max_age = 3_000_000_000.0
        bench.adopt()
        bench.replay()
        (path,) = (bench.root / "damaged").iterdir()
        bench.spool._max_age = 7 * DAY
        bench.clock.advance(6 * DAY)
        bench.spool.look()
        is_there = path.exists()
        bench.clock.advance(2 * DAY)
        bench.spool.look()

        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert (True, False) == (is_there, path.exists())

    def test_a_file_that_is_gone(self, bench: Bench) -> None:
        """What somebody deleted is counted; the rest comes."""
        for i in range(5):
            bench.emit(names(2, 2 * i))
        for file in sorted(bench.home.glob("*.batch"))[1:4]:
            file.unlink()
        before = bench.spool._total

        assert names(2) + names(2, 8) == bench.replay()
        assert {"spool_damaged": 6} == {**bench.stats.dropped}
        assert bench.stats.is_balanced
        bench.spool._scan(0)
        assert before > 0 == bench.spool._total

    @pytest.mark.parametrize("is_own", [True, False])
    def test_files_beyond_the_page_that_are_gone(
        self, tmp_path, monkeypatch, *, is_own: bool
    ) -> None:
        """What nobody has even listed is missed, and counted, too."""
        monkeypatch.setattr(_source, "_PAGE", 4)
        first, second = Bench(tmp_path), Bench(tmp_path)
        for i in range(20):
            first.emit(names(1, i))
        home = first.home
        if not is_own:
            first.close()
            second.adopt()
        bench = first if is_own else second
        delivered = bench.replay(pages=2)
        for file in sorted(home.glob("*.batch"))[5:]:
            file.unlink()
        delivered += bench.replay()

        assert bench.stats.is_balanced
        assert (0, 20 - len(delivered)) == (
            bench.stats.spooled,
            bench.stats.dropped["spool_damaged"],
        )
        assert bench.spool.is_empty
        assert len(delivered) >= 4

    @pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
    def test_what_a_file_turns_into(self, bench: Bench, tmp_path, kind: str) -> None:
        """What took the place of a file is not read, and blocks nobody."""
        bench.emit(names(2))
        bench.emit(names(2, 2))
        path = min(bench.home.glob("*.batch"))
        path.unlink()
        if kind == "link":
            (tmp_path / "target").write_bytes(lines_of([b"foreign"] * 2))
            path.symlink_to(tmp_path / "target")
        if kind == "folder":
            path.mkdir()
        if kind == "pipe":
            os.mkfifo(path)

        assert names(2, 2) == bench.replay()
        assert {"spool_damaged": 2} == {**bench.stats.dropped}
        assert bench.stats.is_balanced


class TestBounds:
    """The bytes and the age of what rests."""

    def test_the_oldest_goes(self, tmp_path) -> None:
        """At no time are there more bytes than allowed; the newest events stay."""
        bench = Bench(tmp_path, **TIGHT)
        events = [b"%05d" % i * 200 for i in range(300)]
        for event in events:
            assert bench.emit([event])
            assert sum(size for _, size in files_in(bench.home)) <= 100_000
        kept = bench.replay()

        assert events[-len(kept) :] == kept
        assert 90 < len(kept) < 100
        assert {"spool_full": 300 - len(kept)} == {**bench.stats.dropped}
        assert bench.stats.is_balanced
        assert "spool_full" in _diagnostics._notes

    def test_the_dead_go_before_the_living(self, tmp_path) -> None:
        """What the dead left counts, adopted or not, and is older."""
        for i in range(3):
            bury(tmp_path, {name(1, 10.0 - i): lines_of([b"%d" % i * 30_000])})
        bench = Bench(tmp_path, **TIGHT)
        bench.emit([b"x" * 30_000])

        assert bytes_below(tmp_path) <= 100_000
        assert [b"x", b"1", b"2"] == [event[:1] for event in bench.replay()]
        assert (3, {"spool_full": 1}) == (
            bench.stats.recovered,
            {**bench.stats.dropped},
        )
        assert bench.stats.is_balanced

    def test_what_was_adopted_is_counted_once(self, tmp_path) -> None:
        """Adopting costs no event that there is room for."""
        bury(tmp_path, {name(1): lines_of([b"d" * 50_000])})
        bench = Bench(tmp_path, **TIGHT)
        bench.emit([b"x"])
        bench.adopt()
        for _ in range(4):
            bench.emit([b"y" * 10_000])

        assert {} == {**bench.stats.dropped}
        assert 6 == len(bench.replay())

    def test_the_living_keep_theirs(self, tmp_path) -> None:
        """Where living siblings have filled the spool, events stay in memory."""
        sibling = Bench(tmp_path, **TIGHT)
        sibling.emit([b"s" * 70_000])
        bench = Bench(tmp_path, **TIGHT)
        bench.emit([b"x" * 20_000])
        is_written = bench.emit([b"y" * 40_000])

        assert not is_written
        assert {} == {**bench.stats.dropped}
        assert bench.spool.writable_in > 0
        assert 0 == bench.spool.usable_in
        bench.spool.try_again()
        assert [b"x" * 20_000] == bench.replay()
        assert [b"s" * 70_000] == sibling.replay()
        assert "spool_full" in _diagnostics._notes

    def test_siblings_share_the_bound(self, tmp_path) -> None:
        """Together they exceed it by no more than what each writes between looks."""
        benches = [
            Bench(tmp_path, **{**TIGHT, "max_spool_bytes": 200_000}) for _ in range(4)
        ]
        for i in range(120):
            benches[i % 4].emit([b"%03d" % i * 1_000])
            for bench in benches:
                bench.clock.advance(5.0)
            most = 200_000 + 4 * (200_000 // 16 + 3_100)
            assert bytes_below(tmp_path) <= most

        assert all(bench.stats.is_balanced for bench in benches)

    def test_a_file_that_could_never_fit(self, tmp_path) -> None:
        """Nothing is dropped for what is larger than the whole spool."""
        bench = Bench(tmp_path, **TIGHT)
        bench.emit(names(5))
        is_written = bench.emit([b"x" * 100_001])
        bench.spool.try_again()

        assert not is_written
        assert names(5) == bench.replay()
        assert {} == {**bench.stats.dropped}

    def test_what_is_being_sent_is_not_dropped(self, tmp_path) -> None:
        """A file in flight stays, and the write that would need its room fails."""
        bench = Bench(tmp_path, **TIGHT)
        file = bench.hold([b"x" * 60_000])
        is_written = bench.emit([b"y" * 60_000])
        bench.deliver(file)
        bench.spool.try_again()

        assert (False, True) == (is_written, bench.emit([b"y" * 60_000]))
        assert {} == {**bench.stats.dropped}

    def test_damaged_files_make_room(self, tmp_path) -> None:
        """What is left of damaged files goes before any event does."""
        bury(tmp_path, {name(1): b"?" * 70_000})
        bench = Bench(tmp_path, **TIGHT)
        bench.adopt()
        bench.replay()
        aside = bytes_below(bench.root / "damaged")
        for path in (bench.root / "damaged").iterdir():
            os.utime(path, (0, 0))
        bench.emit([b"x" * 20_000])
        bench.emit([b"y" * 40_000])

        assert 70_000 == aside
        assert 0 == bytes_below(bench.root / "damaged")
        assert {"spool_damaged": 1} == {**bench.stats.dropped}
        assert bytes_below(tmp_path) <= 100_000

    def test_journals_count(self, tmp_path) -> None:
        """Where journals have filled the spool, no more is kept in them."""
        bench = Bench(tmp_path, **TIGHT, spool_each_event=True)
        journal = bench.spool.journal
        assert journal is not None
        segment = journal.append("queued", b"x" * 101_000)
        bench.spool.rotate()
        is_full = bench.spool.is_full
        segment.users.add(-1)
        bench.spool.sweep()
        bench.spool.rotate()

        assert (True, False) == (is_full, bench.spool.is_full)

    def test_own_files_grow_old_by_the_monotonic_clock(self, tmp_path) -> None:
        """Setting the wall clock makes nothing old, waiting does."""
        bench = Bench(tmp_path, max_spool_age="1h")
        bench.emit([b"old"])
        file = bench.hold([b"old as well"])
        bench.clock._time_ns += 7_200 * NS
        bench.clock.advance(3_500.0)
        seen = [bench.spool.has_own, file.is_expired]
        bench.emit([b"new"])
        bench.clock._time_ns -= 20_000 * NS
        bench.clock.advance(200.0)
        seen.append(file.is_expired)

        assert [True, False, True] == seen
        assert [b"new"] == bench.replay()
        assert {"spool_expired": 1} == {**bench.stats.dropped}
        assert bench.stats.is_balanced
        assert "spool_expired" in _diagnostics._notes

    def test_files_of_the_dead_grow_old_by_their_names(self, tmp_path) -> None:
        """Of an earlier process only the wall time is known."""
        bury(
            tmp_path,
            {
                name(2, 7 * DAY + 1): lines_of(names(2)),
                name(2, 7 * DAY - 300): lines_of(names(2, 2)),
            },
        )
        bench = Bench(tmp_path)
        bench.adopt()

        assert names(2, 2) == bench.replay()
        assert (4, {"spool_expired": 2}) == (
            bench.stats.recovered,
            {**bench.stats.dropped},
        )
        assert [] == [*bench.root.iterdir()]

    def test_so_many_at_a_time_are_too_old(self, tmp_path, monkeypatch) -> None:
        """A call drops so many files, and the next one goes on."""
        monkeypatch.setattr(_spool, "_AT_ONCE", 3)
        bench = Bench(tmp_path, max_spool_age=10.0)
        for i in range(8):
            bench.emit(names(1, i))
        bench.clock.advance(20.0)
        bench.spool.read(1_000)
        dropped = bench.stats.dropped["spool_expired"]

        assert dropped < 8
        bench.replay()
        assert bench.stats.is_balanced

    def test_all_of_several_folders_is_too_old(self, tmp_path) -> None:
        """Folders that are emptied by age are removed, whichever come together."""
        for i in range(6):
            age = (8 - i % 2 * 2) * DAY - i
            bury(tmp_path, {name(1, age): lines_of(names(1, i))})
        bench = Bench(tmp_path)
        bench.adopt()

        assert names(6)[1::2] == bench.replay()
        assert {"spool_expired": 3} == {**bench.stats.dropped}
        assert [] == [*bench.root.iterdir()]


class TestClose:
    """The end of a process."""

    def next_replays(self, folder: Path) -> tuple[list[bytes], Stats]:
        """Return what the next process delivers, and its stats."""
        bench = Bench(folder)
        bench.adopt()
        return bench.replay(), bench.stats

    def test_what_has_ended_does_not_come_again(self, tmp_path) -> None:
        """Of a file that is half sent, only the rest is left."""
        bench = Bench(tmp_path)
        file = bench.hold(names(5))
        bench.deliver(file, 2)
        bench.close({file: names(3, 2)})

        assert 3 == bench.stats.spooled
        assert names(3, 2) == self.next_replays(tmp_path)[0]

    def test_what_was_not_begun_stays_as_it_is(self, tmp_path) -> None:
        """A file of which nothing has ended is not written again."""
        bench = Bench(tmp_path)
        file = bench.hold(names(5))
        before = on_disk(bench.root)
        bench.close({file: names(5)})

        assert before == on_disk(bench.root)

    @pytest.mark.parametrize("is_own", [True, False])
    @pytest.mark.parametrize("sent", [0, 3, 7])
    def test_a_page_was_being_sent(self, tmp_path, sent: int, *, is_own: bool) -> None:
        """What was read, and what was not yet, both come from the next process."""
        bench = Bench(tmp_path)
        bench.emit(names(20))
        if not is_own:
            bench.close()
            bench = Bench(tmp_path)
            bench.adopt()
        found = bench.spool.read(150)
        assert found is not None
        assert 7 < len(found[1]) < 20
        bench.deliver(found[0], sent)
        bench.close({found[0]: found[1][sent:]})
        delivered, stats = self.next_replays(tmp_path)

        assert names(20 - sent, sent) == delivered
        assert 20 - sent == stats.recovered
        assert bench.stats.is_balanced

    def test_between_two_pages(self, tmp_path) -> None:
        """A page that has ended does not come again."""
        bench = Bench(tmp_path)
        bench.emit(names(20))
        delivered = bench.replay(150, pages=1)
        bench.close()

        assert names(20) == delivered + self.next_replays(tmp_path)[0]

    def test_a_page_of_a_damaged_file(self, tmp_path) -> None:
        """What is damaged is counted once, by whoever reads to the end."""
        data = lines_of(names(20))
        bury(tmp_path, {name(20): data[:-30] + b"?" * 30})
        bench = Bench(tmp_path)
        bench.adopt()
        delivered = bench.replay(150, pages=1)
        bench.close()
        more, stats = self.next_replays(tmp_path)
        lost = 20 - len(delivered) - len(more)

        assert names(20 - lost) == delivered + more
        assert {"spool_damaged": lost} == {**stats.dropped}
        assert {} == {**bench.stats.dropped}

    def test_nothing_but_junk_is_left(self, tmp_path) -> None:
        """A file whose events have all ended is deleted, whatever comes after them."""
        bury(tmp_path, {name(2): lines_of(names(2)) + b"?" * 100})
        bench = Bench(tmp_path)
        bench.adopt()
        delivered = bench.replay(30, pages=1)
        bench.close()

        assert names(2) == delivered
        assert [] == [*bench.root.iterdir()]

    def test_a_large_file_is_left_as_it_is(self, tmp_path, monkeypatch) -> None:
        """What would take long to copy comes once more instead."""
        monkeypatch.setattr(_spool, "_MOST_COPIED", 100)
        bench = Bench(tmp_path)
        bench.emit(names(20))
        bench.replay(150, pages=1)
        bench.close()

        assert names(20) == self.next_replays(tmp_path)[0]

    def test_a_disk_that_fails_then(self, tmp_path) -> None:
        """What cannot be written again comes once more."""
        bench = Bench(tmp_path)
        file = bench.hold(names(5))
        bench.deliver(file, 2)
        broken = BrokenDisk(tmp_path, error=errno.ENOSPC, fails=lambda _: True)
        with broken.breaking():
            bench.close({file: names(3, 2)})

        assert 1 == bench.stats.spool_errors
        assert names(5) == self.next_replays(tmp_path)[0]

    def test_an_empty_folder_is_removed(self, bench: Bench) -> None:
        """Who leaves nothing leaves no folder."""
        bench.emit(names(3))
        bench.replay()
        bench.close()
        bench.close()

        assert [] == [*bench.root.iterdir()]

    def test_it_may_go_on(self, bench: Bench) -> None:
        """What is written after the end rests in another folder."""
        bench.emit([b"a"])
        first = bench.home
        bench.close()
        bench.emit([b"b"])

        assert first != bench.home
        assert [b"b"] == bench.replay()


class TestJournal:
    """With `spool_each_event`."""

    @pytest.fixture(name="bench")
    def _bench(self, tmp_path) -> Bench:
        return Bench(tmp_path, spool_each_event=True)

    def keep(self, bench: Bench, events: Iterable[bytes]) -> None:
        """Have events journalled for which the queue has no room."""
        assert bench.spool.journal is not None
        for event in events:
            segment = bench.spool.journal.append("kept", event)
            bench.ledger.emitted.add(1)
            bench.ledger.spooled.add(1)
            segment.users.add(-1)

    def test_what_is_kept_is_replayed(self, bench: Bench) -> None:
        """Without a word more, it is one of the spool's files."""
        self.keep(bench, names(3))
        time = bench.spool.new_time()
        bench.spool.rotate()
        self.keep(bench, names(2, 5))
        bench.ledger.emitted.add(2)
        bench.ledger.spooled.add(2)
        bench.spool.write(names(2, 3), time, is_at_hand=False)
        bench.spool.sweep()

        assert names(7) == bench.replay()
        assert bench.stats.is_balanced
        assert [] == [file for file in on_disk(bench.home) if "batch" in file]

    def test_at_the_end_it_stays(self, bench: Bench, tmp_path) -> None:
        """What is in a journal at the end is the next process's."""
        assert bench.spool.journal is not None
        self.keep(bench, names(3))
        bench.spool.journal.append("queued", b"queued")
        bench.close()
        after = Bench(tmp_path)

        assert 4 == after.adopt().recovered
        assert [b"queued", *names(3)] == sorted(after.replay())[::-1][-1:] + names(3)
        bench.spool.journal.disown()

    def test_a_child_has_a_journal_of_its_own(self, bench: Bench) -> None:
        """Files of the parent are closed, and not written to."""
        self.keep(bench, names(2))

        def child() -> list[bytes]:
            bench.spool.start_over()
            bench.ledger.reset()
            self.keep(bench, [b"child"])
            bench.spool.sweep()
            return bench.replay()

        assert [b"child"] == in_fork(child)
        bench.spool.sweep()
        assert names(2) == bench.replay()

    def test_starting_over(self, bench: Bench, tmp_path) -> None:
        """Nothing is held any more: what rests is for others."""
        self.keep(bench, names(2))
        bury(tmp_path, {name(1): lines_of([b"dead"])})
        bench.adopt()
        is_own_empty = bench.spool.is_own_empty
        bench.spool.start_over()
        other = Bench(tmp_path)

        assert not is_own_empty
        assert bench.spool.is_own_empty
        assert 3 == other.adopt().recovered
        assert sorted([b"dead", *names(2)]) == sorted(other.replay())

    def test_the_folder_is_removed(self, bench: Bench, tmp_path) -> None:
        """From the next rotation on, events are in a folder that is there."""
        self.keep(bench, names(2))
        bench.emit(names(2, 2))
        shutil.rmtree(bench.root)
        with suppress(OSError):
            self.keep(bench, [b"lost"])
        bench.spool.rotate()
        self.keep(bench, names(2, 5))
        bench.spool.rotate()
        bench.emit(names(1, 7))
        bench.spool.sweep()

        assert names(3, 5) == bench.replay()
        assert {"spool_damaged": 4} == {**bench.stats.dropped}
        assert bench.stats.is_balanced
        assert bench.spool.is_own_empty

    def test_the_folder_goes_while_an_event_is_counted(self, bench: Bench) -> None:
        """What is sealed in a folder that is gone is counted, and the new one used."""
        assert bench.spool.journal is not None
        segment = bench.spool.journal.append("kept", b"x")
        bench.ledger.emitted.add(1)
        bench.ledger.spooled.add(1)
        shutil.rmtree(bench.root)
        bench.spool.rotate()
        self.keep(bench, [b"y"])
        bench.spool.sweep()
        segment.users.add(-1)
        bench.spool.sweep()
        is_written = bench.emit([b"z"])

        assert is_written
        assert [b"y", b"z"] == bench.replay()
        assert {"spool_damaged": 1} == {**bench.stats.dropped}
        assert bench.stats.is_balanced


class TestForeign:
    """What others do to descriptors and folders."""

    def test_a_lock_that_nothing_rests_behind(self, bench: Bench, tmp_path) -> None:
        """The lock is taken again, or another folder made, though it has no file."""
        first = bench.spool.home()
        os.close(first._lock)
        with (tmp_path / "foreign").open("wb"):  # it has the number
            bench.emit(names(1))
        second = bench.spool.home()
        bench.replay()
        bench.spool._own = None
        shutil.rmtree(bench.root)
        bench.emit(names(1, 1))

        assert first.path == second.path != bench.home
        assert names(1, 1) == bench.replay()

    def test_the_host_closes_the_lock(self, bench: Bench, tmp_path) -> None:
        """The lock is taken again, and a file on its number is left alone."""
        bench.emit(names(2))
        folder = bench.spool.home()
        number = folder._lock
        os.close(number)
        with (tmp_path / "foreign").open("wb", buffering=0) as file:
            assert number == file.fileno()
            bench.emit(names(2, 2))
            is_held = bench.spool.home().is_held
            delivered = bench.replay()
            bench.close()
            file.write(b"still open")

        assert is_held
        assert names(4) == delivered
        assert (tmp_path / "foreign").read_bytes() == b"still open"

    def test_the_number_is_our_own_again(self, bench: Bench) -> None:
        """A lock that is taken again on the same number is not closed."""
        bench.emit(names(2))
        os.close(bench.spool.home()._lock)
        bench.emit(names(2, 2))
        is_held = bench.spool.home().is_held

        assert is_held
        assert 0 == in_fork(lambda: Bench(bench.root.parent).adopt().recovered)
        assert names(4) == bench.replay()

    def test_another_was_faster(self, bench: Bench, tmp_path) -> None:
        """What another process took meanwhile is counted here as gone, and comes."""
        bench.emit(names(2))
        os.close(bench.spool.home()._lock)
        other = Bench(bench.root.parent)
        with (tmp_path / "foreign").open("wb"):  # it has the number
            other.adopt()
            bench.emit(names(2, 2))
            replayed = bench.replay()

        assert (names(2, 2), names(2)) == (replayed, other.replay())
        assert {"spool_damaged": 2} == {**bench.stats.dropped}
        assert bench.stats.is_balanced
        assert other.stats.is_balanced

    @pytest.mark.parametrize("what", ["home", "root", "all"])
    def test_the_folder_is_removed(self, tmp_path, what: str) -> None:
        """What was in it is counted; what comes next is written anew."""
        bench = Bench(tmp_path / "spool")
        bury(tmp_path / "spool", {name(1): lines_of([b"dead"])})
        bench.adopt()
        bench.emit(names(2))
        file = bench.hold(names(2, 2))
        place = {"home": bench.home, "root": bench.root, "all": tmp_path / "spool"}
        shutil.rmtree(place[what])
        is_written = bench.emit(names(2, 4))
        bench.deliver(file, 2)
        delivered = bench.replay()

        assert is_written
        assert [*names(2, 4), *([b"dead"] if what == "home" else [])] == delivered
        lost = 2 + (what != "home")
        assert {"spool_damaged": lost} == {**bench.stats.dropped}
        assert bench.stats.is_balanced
        assert bench.spool.is_empty

    def test_several_threads_ask_for_the_folder(self, bench: Bench) -> None:
        """They get the same one, and no other is left."""
        homes = start_together(8, lambda _: bench.spool.home())

        assert 1 == len({*homes})
        assert 1 == len(owners(bench.root))


def scenario(bench: Bench, taken: list[bytes], delivered: list[bytes]) -> None:
    """Write, replay, adopt and end; *taken* is what the spool has taken."""
    for i in range(3):
        events = names(4, 4 * i)
        if bench.emit(events):
            taken += events
        bench.clock.advance(10.0)
    delivered += bench.replay(30, pages=2)
    bench.adopt()
    bench.clock.advance(10.0)
    delivered += bench.replay(30, pages=3)
    if bench.emit(events := names(4, 12)):
        taken += events
    found = bench.spool.read(30)
    busy = {}
    if found is not None:
        bench.deliver(found[0])
        delivered += found[1][:1]
        busy = {found[0]: found[1][1:]}
    bench.spool.sweep()
    bench.close(busy)


class TestFailures:
    """A disk that fails at any call, once or from then on."""

    @pytest.mark.parametrize(
        ("error", "is_lasting"),
        [
            *((error, False) for error in ERRORS),
            (errno.ENOSPC, True),
            (errno.EMFILE, True),
        ],
    )
    def test_at_each_call(self, tmp_path, error: int, *, is_lasting: bool) -> None:
        """No exception, a balanced ledger, and each event delivered or counted."""
        dead = names(4, 100)
        count, k = 1, 0
        while k < count:
            folder = tmp_path / str(k)
            _diagnostics._notes.clear()
            random.seed(4)
            bury(folder, {name(4): lines_of(dead)})
            bench = Bench(folder)
            taken: list[bytes] = []
            delivered: list[bytes] = []
            disk = BrokenDisk(
                folder, error=error, fails=k.__le__ if is_lasting else k.__eq__
            )
            with disk.breaking():
                scenario(bench, taken, delivered)
            count = max(count, len(disk.calls))
            after = Bench(folder)
            for _ in range(3):
                after.adopt()
                delivered += after.replay()
            stats = bench.stats + after.stats
            where = f"{k} {disk.calls[k] if k < len(disk.calls) else None}"

            assert bench.stats.is_balanced, where
            assert after.stats.is_balanced, where
            assert 0 == after.stats.spooled, where
            lost = {*taken, *dead} - {*delivered}
            dropped = sum(stats.dropped.values())
            assert len(lost) <= dropped, where
            assert {"spool_damaged"} >= {*stats.dropped}, where
            left = {*on_disk(after.root)} - {*on_disk(after.root / "damaged")}
            assert [] == [file for file in left if "damaged" not in file], where
            shutil.rmtree(folder)
            k += 1

        assert count > 40

    def test_a_disk_is_tried_again(self, bench: Bench) -> None:
        """After a failure nothing is written for some seconds, then it is."""
        broken = BrokenDisk(bench.root, error=errno.ENOSPC, fails=lambda _: True)
        with broken.breaking():
            results = [bench.emit(names(1))]
        calls = len(broken.calls)
        with broken.breaking():
            results.append(bench.emit(names(1)))
        waits = bench.spool.usable_in
        bench.clock.advance(waits)
        results.append(bench.emit(names(1)))

        assert [False, False, True] == results
        assert calls == len(broken.calls)
        assert 5.0 == waits
        assert 1 == bench.stats.spool_errors
        assert "ENOSPC" in _diagnostics._notes["spool"][1]

    @pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
    def test_a_shortage_of_the_process_costs_nothing(
        self, bench: Bench, error: int
    ) -> None:
        """What cannot be read for want of descriptors is read later."""
        bench.emit(names(2))
        bench.emit(names(2, 2))
        broken = BrokenDisk(bench.root, error=error, fails=lambda _: True)
        with broken.breaking():
            found = bench.replay()
        errors = bench.stats.spool_errors
        bench.clock.advance(5.0)

        assert ([], 1) == (found, errors)
        assert names(4) == bench.replay()
        assert {} == {**bench.stats.dropped}

    @pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO])
    def test_a_folder_that_cannot_be_listed(
        self, tmp_path, monkeypatch, error: int
    ) -> None:
        """That files cannot be listed is not taken for their absence."""
        monkeypatch.setattr(_source, "_PAGE", 3)
        bench = Bench(tmp_path)
        for i in range(10):
            bench.emit(names(1, i))
        delivered = bench.replay(pages=3)
        scandir = os.scandir

        def fail(path: Any) -> Any:
            raise OSError(error, "no")

        monkeypatch.setattr(os, "scandir", fail)
        delivered += bench.replay()
        monkeypatch.setattr(os, "scandir", scandir)

        assert names(10)[: len(delivered)] == delivered
        assert 3 <= len(delivered) < 10
        assert names(10) == delivered + bench.replay()
        assert {} == {**bench.stats.dropped}

    def test_a_folder_that_cannot_be_adopted_now(self, tmp_path, monkeypatch) -> None:
        """A shortage puts an adoption off; what is broken is left alone."""
        bury(tmp_path, {journal_name(START_NS): lines_of(names(2))})
        bench = Bench(tmp_path)
        errors: list[OSError] = [OSError(errno.EMFILE, "no"), OSError(errno.EIO, "no")]
        adopt = _source.Source.adopt

        def fail(source: _source.Source) -> int:
            if errors:
                raise errors.pop(0)
            return adopt(source)

        monkeypatch.setattr(_source.Source, "adopt", fail)
        recovered = [bench.adopt().recovered for _ in range(4)]
        after = Bench(tmp_path)

        assert [0, 0, 0, 0] == recovered
        assert 2 == bench.stats.spool_errors
        assert 2 == after.adopt().recovered

    def test_a_file_that_cannot_be_deleted(self, bench: Bench) -> None:
        """It is not sent again, nor counted again, by this process."""
        bench.emit(names(2))
        found = bench.spool.read(1_000)
        assert found is not None
        broken = BrokenDisk(bench.root, error=errno.EROFS, fails=lambda _: True)
        with broken.breaking():
            bench.deliver(found[0], 2)
        bench.emit(names(2, 2))

        assert names(2, 2) == bench.replay()
        assert (1, 4, 0) == (
            bench.stats.spool_errors,
            bench.stats.delivered,
            bench.stats.spooled,
        )
        assert bench.spool.is_empty

    def test_a_file_that_cannot_be_set_aside(self, tmp_path) -> None:
        """Where `damaged` cannot be made, a damaged file is passed over."""
        bury(tmp_path, {name(2): b"?"})
        bench = Bench(tmp_path)
        (bench.root / "damaged").touch()
        bench.adopt()

        assert [] == bench.replay()
        assert ({"spool_damaged": 2}, 1) == (
            {**bench.stats.dropped},
            bench.stats.spool_errors,
        )
        assert bench.stats.is_balanced
        assert bench.spool.is_empty
