"""A folder of the spool: whose it is, and what is in its files."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import stat
import sys
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import (
    BrokenDisk,
    in_fork,
    open_descriptors,
    run_script,
    start_together,
)
from pgtrack import _folder
from pgtrack._folder import (
    Folder,
    batch_name,
    clear_unfinished,
    count_of,
    files_in,
    journal_name,
    lines_of,
    owners,
    time_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typing_extensions import Self

EVENTS = [b'{"n":1}', b'{"n":22}', b'{"n":333}']
NAME = batch_name(7, 3)
ERRORS = [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOENT]


@pytest.fixture(autouse=True)
def _no_leaked_descriptor() -> Iterator[None]:
    """Every descriptor that a test opened is closed with it."""
    before = open_descriptors()
    yield
    assert not open_descriptors() - before


@pytest.fixture(name="folder")
def _folder_(tmp_path) -> Iterator[Folder]:
    """Return a folder of this process."""
    folder = Folder.create(tmp_path)
    yield folder
    folder.let_go()


def mode_of(path: Path) -> int:
    """Return the permissions of *path*."""
    return stat.S_IMODE(path.lstat().st_mode)


def fill(folder: Folder, data: bytes, name: str = NAME) -> str:
    """Put a file into *folder*, whatever is in it, and return its name."""
    (folder.path / name).write_bytes(data)
    return name


def read_all(folder: Folder, name: str = NAME, most: int = 1000) -> list[bytes]:
    """Return the good events of a file, page by page."""
    events: list[bytes] = []
    start: int | None = 0
    while start is not None:
        page = folder.read(name, start, most)
        events += page.events
        start = page.next
    return events


def is_free(path: Path) -> bool:
    """Return whether the folder at *path* can be adopted, and let go of it."""
    folder = Folder.adopt(path)
    if folder is not None:
        folder.let_go()
    return folder is not None


def at_once(n: int, function: Callable[[], bool]) -> int:
    """Return in how many of *n* processes *function*, called at once, is true."""
    (start, go), (told, tell), (over, end) = os.pipe(), os.pipe(), os.pipe()
    children = []
    for _ in range(n):
        child = os.fork()
        if child == 0:
            try:
                os.close(go)
                os.close(end)
                os.read(start, 1)
                os.write(tell, b"1" if function() else b"0")
                os.read(over, 1)  # what it has got it keeps until all have tried
            finally:
                os._exit(0)
        children.append(child)
    os.close(go)
    results = b"".join(os.read(told, 1) for _ in range(n))
    os.close(end)
    for child in children:
        os.waitpid(child, 0)
    for number in (start, told, tell, over):
        os.close(number)
    return results.count(b"1")


class TestNames:
    """What names of files say."""

    def test_names_say_what_they_were_made_of(self) -> None:
        """Time and count can be read off a name."""
        name = batch_name(1_772_439_300_500_000_001, 250)

        assert name == "01772439300500000001-250.batch"
        assert (1_772_439_300_500_000_001, 250) == (time_of(name), count_of(name))
        assert time_of(journal_name(5)) == 5
        assert _folder.JOURNAL.fullmatch(journal_name(5))
        assert _folder.BATCH.fullmatch(name)

    @given(st.lists(st.integers(0, 2**63 - 1)))
    def test_names_sort_by_time(self, times: list[int]) -> None:
        """The name of the older file comes first."""
        names = sorted(batch_name(time, 5) for time in times)

        assert sorted(times) == [time_of(name) for name in names]

    @pytest.mark.parametrize(
        "name",
        [
            "1-2.batch",
            f"{7:020d}-.batch",
            f"{7:020d}-3.batch.new",
            f"{7:020d}-3.batch\n",
            f"{7:020d}-1234567890.batch",
            "\u0660" * 20 + "-3.batch",
            f"x{7:020d}-3.batch",
        ],
    )
    def test_other_names_are_not_ours(self, name: str) -> None:
        """What only looks like a file of ours is none."""
        assert _folder.BATCH.fullmatch(name) is None


def test_without_locks(monkeypatch) -> None:
    """A system without POSIX locks can import the module, which says so."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("copy_of_folder", _folder.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    assert (False, True) == (module.HAS_LOCKS, _folder.HAS_LOCKS)


class TestOwner:
    """Whose a folder is."""

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
    def test_it_is_private(self, tmp_path, umask: int) -> None:
        """Nobody else can look into a folder, under any umask."""
        before = os.umask(umask)
        try:
            folder = Folder.create(tmp_path)
            folder.write(NAME, b"x", is_synced=False)
        finally:
            os.umask(before)
        folder.let_go()

        assert mode_of(folder.path) == 0o700
        assert {0o600} == {mode_of(path) for path in folder.path.iterdir()}

    def test_it_has_a_name_of_its_own(self, tmp_path) -> None:
        """Several folders are made in one place, and nothing else is left there."""
        folders = [Folder.create(tmp_path) for _ in range(5)]
        for folder in folders:
            folder.let_go()

        assert sorted(folder.path.name for folder in folders) == owners(tmp_path)
        assert len(list(tmp_path.iterdir())) == 5

    def test_it_is_not_adopted_while_its_owner_lives(self, folder: Folder) -> None:
        """Neither by this process, nor by another."""
        assert not is_free(folder.path)
        assert not in_fork(lambda: is_free(folder.path))
        assert folder.is_held

    def test_it_is_adopted_when_its_owner_was_killed(self, tmp_path) -> None:
        """After SIGKILL the lock is free, and the files are there."""
        done = run_script(
            f"""
            import os, pathlib, signal
            from pgtrack._folder import Folder, lines_of
            folder = Folder.create(pathlib.Path({str(tmp_path)!r}))
            folder.write({NAME!r}, lines_of({EVENTS!r}), is_synced=False)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        (name,) = owners(tmp_path)
        folder = Folder.adopt(tmp_path / name)

        assert done.returncode == -signal.SIGKILL
        assert folder is not None
        assert folder.is_held
        assert EVENTS == read_all(folder)
        folder.let_go()

    def test_it_is_adopted_when_it_was_let_go(self, folder: Folder) -> None:
        """Whoever gives up the lock gives up the folder."""
        folder.let_go()

        assert not folder.is_held
        assert is_free(folder.path)

    def test_a_child_does_not_keep_it(self, tmp_path) -> None:
        """A forked child that let go holds nothing when its parent is dead."""
        (over, end), (told, tell) = os.pipe(), os.pipe()
        owner = os.fork()
        if owner == 0:
            folder = Folder.create(tmp_path)
            if os.fork() == 0:
                os.close(end)
                folder.let_go()
                os.write(tell, b"%d" % folder.is_held)
                os.read(over, 1)
            else:
                os.read(over, 1)
            os._exit(0)
        is_held_by_child = os.read(told, 1)
        (name,) = owners(tmp_path)
        is_free_before = is_free(tmp_path / name)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        is_free_after = is_free(tmp_path / name)
        for number in (over, end, told, tell):
            os.close(number)

        assert (b"0", False, True) == (is_held_by_child, is_free_before, is_free_after)

    def test_a_child_that_lets_go_takes_nothing(self, folder: Folder) -> None:
        """The parent holds its folder on when a child lets go of it."""
        in_fork(folder.let_go)

        assert folder.is_held
        assert not is_free(folder.path)

    def test_one_of_many_threads_adopts_it(self, folder: Folder) -> None:
        """However many try at once, exactly one has it."""
        folder.let_go()
        for _ in range(20):
            found = start_together(8, lambda _: Folder.adopt(folder.path))
            adopted = [one for one in found if one is not None]

            assert len(adopted) == 1
            adopted[0].let_go()

    def test_one_of_many_processes_adopts_it(self, folder: Folder) -> None:
        """However many processes try at once, exactly one has it."""
        folder.let_go()
        counts = {
            at_once(6, lambda: Folder.adopt(folder.path) is not None) for _ in range(5)
        }

        assert {1} == counts

    def test_many_leave_and_adopt(self, tmp_path) -> None:
        """Who adopts what another removes at the same time has it, or it is gone."""
        for _ in range(100):
            folder = Folder.create(tmp_path)

            def act(i: int, folder: Folder = folder) -> Folder | None:
                if i:
                    return Folder.adopt(folder.path)
                folder.leave()
                return None

            for adopted in start_together(3, act):
                if adopted is not None:
                    assert adopted.is_held
                    assert adopted.leave()
        assert [] == list(tmp_path.iterdir())

    def test_it_is_removed_before_it_is_locked(self, folder, monkeypatch) -> None:
        """Whoever opens the lock of a folder that is removed then does not have it."""
        folder.let_go()
        flock = _folder.fcntl.flock

        def late(*args: int) -> None:
            (folder.path / "lock").unlink()
            folder.path.rmdir()
            flock(*args)

        monkeypatch.setattr(_folder.fcntl, "flock", late)

        assert Folder.adopt(folder.path) is None

    def test_it_needs_no_lock_to_be_adopted(self, folder: Folder) -> None:
        """A folder whose removal was interrupted has no lock, and is adopted."""
        folder.let_go()
        (folder.path / "lock").unlink()

        assert is_free(folder.path)
        assert mode_of(folder.path / "lock") == 0o600

    @pytest.mark.parametrize("kind", ["link", "folder", "gone"])
    def test_what_is_no_lock(self, tmp_path, kind: str) -> None:
        """A link or a folder in place of the lock is not followed."""
        path = tmp_path / "folder"
        if kind != "gone":
            path.mkdir()
        if kind == "link":
            (path / "lock").symlink_to(tmp_path / "target")
        if kind == "folder":
            (path / "lock").mkdir()

        assert Folder.adopt(path) is None
        assert not (tmp_path / "target").exists()

    def test_a_named_pipe_blocks_nobody(self, tmp_path) -> None:
        """A named pipe in place of the lock is not waited for."""
        os.mkfifo(tmp_path / "lock")

        assert is_free(tmp_path)

    @pytest.mark.parametrize("error", ERRORS)
    def test_it_cannot_be_made(self, tmp_path, error: int) -> None:
        """Whatever fails, nothing is left behind; the error is raised."""
        with BrokenDisk(tmp_path).breaking() as disk:
            Folder.create(tmp_path).leave()
        for k in range(disk.calls.index("scandir")):
            broken = BrokenDisk(tmp_path, error=error, fails=k.__eq__)
            with broken.breaking(), pytest.raises(OSError) as caught:
                Folder.create(tmp_path)

            assert error == caught.value.errno
            assert [] == list(tmp_path.iterdir())
        assert {"mkdir", "open", "flock", "rename"} <= {*disk.calls}


class TestHold:
    """Whether the lock is still held."""

    def test_the_host_closes_it(self, folder: Folder) -> None:
        """A descriptor that the host has closed holds nothing."""
        os.close(folder._lock)

        assert not folder.is_held
        assert is_free(folder.path)

    def test_the_number_is_another_files(self, folder: Folder, tmp_path) -> None:
        """A file that the host opened on our number is neither ours nor closed."""
        number = folder._lock
        os.close(number)
        with (tmp_path / "foreign").open("wb", buffering=0) as file:
            assert number == file.fileno()
            is_held = folder.is_held
            folder.let_go()
            folder.let_go()
            file.write(b"still open")

        assert not is_held
        assert (tmp_path / "foreign").read_bytes() == b"still open"

    def test_it_is_let_go_only_once(self, folder: Folder) -> None:
        """Who has let go does not close what was adopted on the same number."""
        number = folder._lock
        folder.let_go()
        again = Folder.adopt(folder.path)
        assert again is not None
        assert number == again._lock
        folder.let_go()

        assert again.is_held
        again.let_go()

    @pytest.mark.parametrize("what", ["lock", "folder", "replaced"])
    def test_somebody_removes_it(self, folder: Folder, what: str) -> None:
        """Without its file the lock is worth nothing."""
        (folder.path / "lock").unlink()
        if what == "folder":
            folder.path.rmdir()
        if what == "replaced":
            (folder.path / "lock").touch()

        assert not folder.is_held


class TestLeave:
    """The end of a folder."""

    def test_empty(self, folder: Folder) -> None:
        """An empty folder is removed."""
        assert folder.leave()
        assert not folder.path.exists()

    @pytest.mark.parametrize("name", [NAME, "foreign", journal_name(3)])
    def test_not_empty(self, folder: Folder, name: str) -> None:
        """A folder with a file in it, whatever that is, is left to others."""
        fill(folder, b"", name)

        assert not folder.leave()
        assert is_free(folder.path)
        assert (folder.path / name).exists()

    def test_gone(self, folder: Folder) -> None:
        """A folder that somebody removed needs no more removing."""
        (folder.path / "lock").unlink()
        folder.path.rmdir()

        assert folder.leave()

    def test_another_has_it(self, folder: Folder, tmp_path) -> None:
        """Whoever lost the lock does not remove what is now another's."""
        os.close(folder._lock)
        with (tmp_path / "foreign").open("wb"):  # it has the number
            another = Folder.adopt(folder.path)
            assert another is not None
            folder.leave()

            assert another.is_held
            another.leave()

    @pytest.mark.parametrize("error", ERRORS[:-1])
    def test_it_cannot_be_looked_into(self, folder: Folder, error: int) -> None:
        """What may have files is not removed."""
        broken = BrokenDisk(folder.path, error=error, fails=lambda _: True)
        with broken.breaking():
            is_empty = folder.leave()

        assert not is_empty
        assert (folder.path / "lock").exists()

    def test_it_cannot_be_removed(self, folder: Folder) -> None:
        """A folder that cannot be removed is let go all the same."""
        with BrokenDisk(folder.path).breaking() as disk:
            is_held = folder.is_held
        fails = len(disk.calls) + 1
        broken = BrokenDisk(folder.path, error=errno.EROFS, fails=fails.__le__)
        with broken.breaking():
            folder.leave()

        assert is_held
        assert is_free(folder.path)


class TestWrite:
    """A file is there as a whole, or not at all."""

    def test_what_it_has(self, folder: Folder) -> None:
        """A line is the checksum, a space, the event and a line feed."""
        folder.write(NAME, lines_of(EVENTS[:2]), is_synced=False)

        expected = (
            f"{zlib.crc32(EVENTS[0]):08x} {EVENTS[0].decode()}\n"
            f"{zlib.crc32(EVENTS[1]):08x} {EVENTS[1].decode()}\n"
        )
        assert expected == (folder.path / NAME).read_text()
        assert lines_of([b"123456789"]) == b"cbf43926 123456789\n"  # CRC-32's check
        assert sorted(["lock", NAME]) == sorted(p.name for p in folder.path.iterdir())

    def test_little_by_little(self, folder: Folder) -> None:
        """A disk that takes less than it was given gets the rest."""
        data = lines_of(EVENTS * 50)
        with BrokenDisk(folder.path).breaking() as disk:
            folder.write(NAME, data, is_synced=False)

        assert disk.calls.count("write") > 2
        assert data == (folder.path / NAME).read_bytes()

    @pytest.mark.parametrize("is_synced", [False, True])
    @pytest.mark.parametrize("error", ERRORS)
    def test_failures(self, folder: Folder, error: int, *, is_synced: bool) -> None:
        """Whichever call fails, the error is raised, and nothing is left behind."""
        with BrokenDisk(folder.path).breaking() as disk:
            folder.write(NAME, b"x" * 100, is_synced=is_synced)
        (folder.path / NAME).unlink()
        left = {path.name for path in folder.path.iterdir()}
        for k in range(len(disk.calls)):
            broken = BrokenDisk(folder.path, error=error, fails=k.__eq__)
            with broken.breaking(), pytest.raises(OSError) as caught:
                folder.write(NAME, b"x" * 100, is_synced=is_synced)

            assert error == caught.value.errno
            assert left == {path.name for path in folder.path.iterdir()}
        assert {"open", "write", "rename"} <= {*disk.calls}
        assert is_synced == ("fsync" in disk.calls)

    def test_it_is_on_the_disk_when_that_is_asked_for(self, folder: Folder) -> None:
        """The file is synced before it has its name, the folder afterwards."""
        with BrokenDisk(folder.path).breaking() as disk:
            folder.write(NAME, b"x", is_synced=True)

        expected = ["open", "write", "fsync", "rename", "open", "fsync"]
        assert expected == disk.calls


class TestRead:
    """Good lines come back, whatever became of the others."""

    @given(
        events=st.lists(st.binary(max_size=40).filter(lambda e: b"\n" not in e)),
        most=st.integers(1, 100),
    )
    @settings(max_examples=30, deadline=None)
    def test_pages(self, tmp_path_factory, events: list[bytes], most: int) -> None:
        """Page by page, everything comes once and in order."""
        folder = Folder.create(tmp_path_factory.mktemp("spool"))
        folder.write(NAME, lines_of(events), is_synced=False)
        found = read_all(folder, most=most)
        folder.let_go()

        assert events == found

    def test_a_page_is_about_as_large_as_asked(self, folder: Folder) -> None:
        """A page ends with the line with which it has enough."""
        folder.write(NAME, lines_of([b"x" * 91] * 10), is_synced=False)
        page = folder.read(NAME, 0, 250)

        assert (3, 303) == (len(page.events), page.next)
        assert folder.read(NAME, 1010 - 101, 101).next is None
        assert ([], None) == folder.read(NAME, 1010, 250)
        assert ([], None) == folder.read(NAME, 5000, 250)

    def test_every_flipped_bit(self, folder: Folder) -> None:
        """One bit costs its line, and if it is the line feed, also the next one."""
        events = [b"a", b"bc", b"def"]
        data = lines_of(events)
        for position in range(len(data)):
            before = data[:position]
            column = position - (before.rfind(b"\n") + 1)
            is_line_feed = data[position] == ord(b"\n")
            lost = (column != 8) + (is_line_feed and position + 1 < len(data))
            for bit in range(8):
                damaged = bytearray(data)
                damaged[position] ^= 1 << bit
                found = read_all(folder, fill(folder, damaged))

                assert found == [event for event in events if event in found]
                assert 3 - lost == len(found), (position, bit)

    def test_every_truncation(self, folder: Folder) -> None:
        """What was written as a whole line is there, and no more."""
        data = lines_of(EVENTS)
        for length in range(len(data) + 1):
            found = read_all(folder, fill(folder, data[:length]))
            whole = data[:length].count(b"\n")

            assert EVENTS[:whole] == found
            assert whole == folder.count_lines(NAME)

    @given(
        junk=st.binary(max_size=60),
        position=st.integers(0, 90),
        removed=st.integers(0, 30),
    )
    @settings(max_examples=100, deadline=None)
    def test_any_damage(
        self, tmp_path_factory, junk: bytes, position: int, removed: int
    ) -> None:
        """Nothing is made up; the lines outside of the damage come."""
        folder = Folder.create(tmp_path_factory.mktemp("spool"))
        data = lines_of(EVENTS)
        damaged = data[:position] + junk + data[position + removed :]
        found = read_all(folder, fill(folder, damaged))
        folder.let_go()
        before = data[:position].count(b"\n")

        assert found == [event for event in EVENTS if event in found]
        assert EVENTS[:before] == found[:before]

    def test_no_line_feed_for_long(self, folder: Folder) -> None:
        """A line of 20 MB is read in pieces, and the next ones are good."""
        data = lines_of(EVENTS[:1]) + b"x" * 20_000_000 + b"\n" + lines_of(EVENTS[1:])
        fill(folder, data)

        assert EVENTS == read_all(folder, most=1_000_000)

    def test_the_largest_event(self, folder: Folder) -> None:
        """The largest event that settings allow is no such line."""
        event = b"x" * 9_000_000
        folder.write(NAME, lines_of([event]), is_synced=False)

        assert [event] == read_all(folder)

    def test_the_rest(self, folder: Folder) -> None:
        """What was not read can be had as it is."""
        data = lines_of(EVENTS) + b"damaged"
        fill(folder, data)
        page = folder.read(NAME, 0, 1)
        assert page.next is not None

        assert data[page.next :] == folder.rest(NAME, page.next, len(data))

    def test_lines_are_counted_in_large_files(self, folder: Folder) -> None:
        """Lines count wherever a block of the disk ends."""
        fill(folder, lines_of([b"x" * 100]) * 5_000 + b"torn")

        assert 5_000 == folder.count_lines(NAME)

    @pytest.mark.parametrize("kind", ["gone", "link", "folder", "pipe"])
    def test_what_is_no_file(self, folder: Folder, tmp_path, kind: str) -> None:
        """What bears the name of a file and is none is an error, and blocks nobody."""
        path = folder.path / NAME
        if kind == "link":
            (tmp_path / "target").write_bytes(lines_of(EVENTS))
            path.symlink_to(tmp_path / "target")
        if kind == "folder":
            path.mkdir()
        if kind == "pipe":
            os.mkfifo(path)

        with pytest.raises(OSError):
            folder.read(NAME, 0, 1000)

    @pytest.mark.parametrize("error", ERRORS)
    def test_failures(self, folder: Folder, error: int) -> None:
        """An error of the disk is raised."""
        fill(folder, lines_of(EVENTS))
        with BrokenDisk(folder.path).breaking() as disk:
            read_all(folder)
        for k in range(len(disk.calls)):
            broken = BrokenDisk(folder.path, error=error, fails=k.__eq__)
            with broken.breaking(), pytest.raises(OSError) as caught:
                read_all(folder)

            assert error == caught.value.errno
        assert {"open", "read"} == {*disk.calls}


class TestFound:
    """What is found beside."""

    def test_files_are_regular(self, folder: Folder, tmp_path) -> None:
        """Links, folders and pipes are no files; others are, with their bytes."""
        fill(folder, b"12345")
        fill(folder, b"123", "foreign")
        (folder.path / "folder").mkdir()
        (folder.path / "link").symlink_to(tmp_path)
        (folder.path / "dead").symlink_to(tmp_path / "gone")
        os.mkfifo(folder.path / "pipe")

        expected = [("lock", 0), (NAME, 5), ("foreign", 3)]
        assert sorted(expected) == sorted(folder.files())

    def test_a_file_that_goes(self, folder: Folder, monkeypatch) -> None:
        """A file that is deleted while others are looked at is left out."""
        fill(folder, b"12345")

        class Gone:
            name = "gone"

            def is_file(self, *, follow_symlinks: bool) -> bool:
                return True

            def stat(self, *, follow_symlinks: bool) -> os.stat_result:
                raise FileNotFoundError

        class Entries(list):
            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        with os.scandir(folder.path) as entries:
            found = Entries([Gone(), *entries])
        monkeypatch.setattr(os, "scandir", lambda _: found)

        assert [("lock", 0), (NAME, 5)] == sorted(files_in(folder.path), reverse=True)

    def test_a_folder_that_cannot_be_read(self, tmp_path) -> None:
        """That there is nothing and that nobody knows are different things."""
        with pytest.raises(FileNotFoundError):
            list(files_in(tmp_path / "gone"))

    def test_owners_are_our_folders(self, tmp_path) -> None:
        """Only real folders with a name of ours are owners', the oldest first."""
        names = [f"{i:020d}-0123abcd" for i in (30, 7, 200)]
        for name in (*names, "damaged", f"{8:020d}-0123abcd.new", f"{8:020d}-xyz"):
            (tmp_path / name).mkdir()
        (tmp_path / f"{9:020d}-0123abcd").touch()
        (tmp_path / f"{10:020d}-0123abcd").symlink_to(tmp_path / names[0])

        assert sorted(names) == owners(tmp_path)
        assert [] == owners(tmp_path / "gone")


class TestUnfinished:
    """Folders of processes that died while they made them."""

    def make(self, path: Path, age: float) -> None:
        """Make a folder with a lock that is *age* seconds old."""
        path.mkdir()
        (path / "lock").touch()
        time = _folder.SYSTEM_CLOCK.time_ns() / 1e9 - age
        os.utime(path, (time, time))

    def test_old_ones_are_taken_away(self, tmp_path) -> None:
        """After a minute nobody comes back for them."""
        self.make(tmp_path / f"{1:020d}-0123abcd.new", 61.0)
        self.make(tmp_path / f"{2:020d}-0123abcd.new", 50.0)
        clear_unfinished(tmp_path)

        assert [f"{2:020d}-0123abcd.new"] == [p.name for p in tmp_path.iterdir()]

    def test_others_stay(self, tmp_path) -> None:
        """What is foreign, or has something in it, is left alone."""
        used = tmp_path / f"{1:020d}-0123abcd.new"
        self.make(used, 100.0)
        (used / "foreign").touch()
        os.utime(used, (0, 0))
        self.make(tmp_path / "foreign.new", 100.0)
        (tmp_path / f"{3:020d}-0123abcd.new").touch()
        os.utime(tmp_path / f"{3:020d}-0123abcd.new", (0, 0))
        self.make(tmp_path / f"{4:020d}-0123abcd.new", 100.0)
        clear_unfinished(tmp_path)
        clear_unfinished(tmp_path / "gone")

        left = {path.name for path in tmp_path.iterdir()}
        expected = {f"{1:020d}-0123abcd.new", "foreign.new", f"{3:020d}-0123abcd.new"}
        assert expected == left
        assert (tmp_path / "foreign.new" / "lock").exists()
