from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import in_fork, run_script
from pgtrack._file import FileTransport
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SGR = re.compile(r"\x1b\[[0-9;]*m")
REQUEST_ID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
BUFFERED = {"PYTHONUNBUFFERED": ""}
UUID_SESSION = "srv-0190f3a2-7b1c-4def-8a2b-3c4d5e6f7a8b"


@pytest.fixture(name="path")
def _path(tmp_path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture(name="file")
def _file(path) -> Iterator[FileTransport]:
    transport = FileTransport(path)
    yield transport
    transport.close()


class TestFile:
    """
    JSON lines in a file.
    """

    def test_lines(self, file, path):
        """
        Events are appended as they are, a line each, and the bytes are counted.
        """
        answers = [file.send([b'{"a":1}', b'{"b":2}'], 1), file.send([b"{}"], 1)]

        assert b'{"a":1}\n{"b":2}\n{}\n' == path.read_bytes()
        assert [
            Answer(verdict=Verdict.TAKEN, sent_bytes=16),
            Answer(verdict=Verdict.TAKEN, sent_bytes=3),
        ] == answers

    def test_lazy(self, file, path):
        """
        The file is made with the first event, and only its owner may read it.
        """
        assert not path.exists()

        file.send([b"{}"], 1)

        assert 0o600 == stat.S_IMODE(path.stat().st_mode)

    def test_appends(self, file, path):
        """
        What is in the file stays.
        """
        path.write_text("{}\n")
        file.send([b'{"a":1}'], 1)

        assert b'{}\n{"a":1}\n' == path.read_bytes()

    def test_one_write(self, file, monkeypatch):
        """
        A batch is one write.
        """
        sizes = []
        real = os.write

        def write(fd: int, data: memoryview) -> int:
            sizes.append(len(data))
            return real(fd, data)

        monkeypatch.setattr(os, "write", write)
        file.send([b"{}"] * 1000, 1)

        assert [3000] == sizes

    def test_short_writes(self, file, path, monkeypatch):
        """
        What the kernel did not take at once is written after it.
        """
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
        answer = file.send([b'{"a":1}', b'{"b":2}'], 1)

        assert Verdict.TAKEN is answer.verdict
        assert b'{"a":1}\n{"b":2}\n' == path.read_bytes()

    def test_relative_path(self, path, monkeypatch):
        """
        A relative path stands for the same file when the host changes its folder.
        """
        monkeypatch.chdir(path.parent)
        transport = FileTransport(path.name)
        monkeypatch.chdir("/")
        transport.send([b"{}"], 1)
        transport.close()

        assert b"{}\n" == path.read_bytes()

    @pytest.mark.parametrize("is_deleted", [True, False])
    def test_rotation(self, file, path, is_deleted):
        """
        A file that was moved or deleted is made anew.
        """
        file.send([b"1"], 1)
        moved = path.with_suffix(".1")
        path.rename(moved)
        if is_deleted:
            moved.unlink()
        file.send([b"2"], 1)

        assert b"2\n" == path.read_bytes()
        assert is_deleted or moved.read_bytes() == b"1\n"

    def test_rotation_with_create(self, file, path):
        """
        A file that was replaced by another is left for the new one.
        """
        file.send([b"1"], 1)
        path.rename(path.with_suffix(".1"))
        path.write_text("0\n")
        file.send([b"2"], 1)

        assert b"0\n2\n" == path.read_bytes()

    def test_rotation_leaves_nothing_open(self, file, path):
        """
        The descriptor of a file that was moved is closed.
        """
        file.send([b"1"], 1)
        first = file._fd
        path.rename(path.with_suffix(".1"))
        file.send([b"2"], 1)
        second = file._fd
        os.close(second)
        file.send([b"3"], 1)

        assert first == second == file._fd

    def test_close(self, file, path):
        """
        After `close`, which may be called twice, `send` opens the file again.
        """
        file.close()
        file.send([b"1"], 1)
        file.close()
        file.close()
        file.send([b"2"], 1)

        assert b"1\n2\n" == path.read_bytes()

    def test_foreign_descriptor(self, file, path):
        """
        A descriptor that the host took for a file of its own is left alone.
        """
        other = path.with_suffix(".db")
        file.send([b"1"], 1)
        os.close(file._fd)
        with other.open("wb") as theirs:
            assert file._fd == theirs.fileno()

            file.send([b"2"], 1)

            assert file._fd != theirs.fileno()

            theirs.write(b"theirs")

        assert b"theirs" == other.read_bytes()
        assert b"1\n2\n" == path.read_bytes()

    def test_closed_descriptor(self, file, path):
        """
        A descriptor that the host closed is replaced.
        """
        file.send([b"1"], 1)
        os.close(file._fd)
        file.send([b"2"], 1)

        assert b"1\n2\n" == path.read_bytes()

    def test_missing_folder(self, path):
        """
        Without its folder the file cannot be made now; the reason does not name it.
        """
        file = FileTransport(path / "deeper" / "events.jsonl")
        path.write_text("")

        assert Answer(
            verdict=Verdict.RETRY, reason="NotADirectoryError ENOTDIR"
        ) == file.send([b"{}"], 1)

    def test_folder_comes_back(self, file, path):
        """
        A folder that went away costs nothing once it is back.
        """
        file.send([b"1"], 1)
        moved = path.parent.with_name("moved")
        path.parent.rename(moved)
        answer = file.send([b"2"], 1)
        moved.rename(path.parent)
        file.send([b"2"], 1)

        assert "FileNotFoundError ENOENT" == answer.reason
        assert b"1\n2\n" == path.read_bytes()

    def test_permission(self, file, path):
        """
        A file that may not be written to can be tried again.
        """
        path.touch(0o400)

        def send() -> Answer:
            if os.geteuid() == 0:
                os.seteuid(65_534)  # root may write to any file
            return file.send([b"{}"], 1)

        assert Answer(
            verdict=Verdict.RETRY, reason="PermissionError EACCES"
        ) == in_fork(send)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    def test_full_disk(self):
        """
        A full disk can be tried again.
        """
        file = FileTransport("/dev/full")
        answers = [file.send([b"{}"], 1), file.send([b"{}"], 1)]
        file.close()

        assert [Answer(verdict=Verdict.RETRY, reason="OSError ENOSPC")] * 2 == answers

    def test_protocol(self, file):
        """
        The transport delivers at once, and can be aborted at any time.
        """
        file.abort()

        assert file.is_immediate


@pytest.fixture(name="fill_disk")
def _fill_disk(monkeypatch) -> Callable[[int], None]:
    """
    Let the disk be full after so many bytes; None frees it again.
    """
    real = os.write

    def fill(room: int | None) -> None:
        left = room

        def write(fd: int, data: memoryview) -> int:
            nonlocal left
            if left is None:
                return real(fd, data)
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real(fd, data[:left])
            left -= count
            return count

        monkeypatch.setattr(os, "write", write)

    return fill


class TestTornLines:
    """
    Half a line costs that line alone.
    """

    BATCH = (b'{"a":1}', b'{"b":2}')

    @pytest.mark.parametrize(
        ("room", "left_behind"),
        [
            (0, b""),
            (3, b'{"a\n'),
            (7, b'{"a":1}\n'),
            (8, b'{"a":1}\n'),
            (11, b'{"a":1}\n{"b\n'),
        ],
    )
    def test_full_midway(self, file, path, fill_disk, room, left_behind):
        """
        After a write that failed midway the batch is written whole, on its own lines.
        """
        fill_disk(room)
        answer = file.send(self.BATCH, 1)
        again = file.send(self.BATCH, 1)
        fill_disk(None)
        last = file.send(self.BATCH, 1)
        file.send([b"{}"], 1)

        assert [Verdict.RETRY, Verdict.RETRY, Verdict.TAKEN] == [
            a.verdict for a in (answer, again, last)
        ]
        assert left_behind + b'{"a":1}\n{"b":2}\n{}\n' == path.read_bytes()

    def test_rotated_meanwhile(self, file, path, fill_disk):
        """
        A new file does not begin with the end of a line in the old one.
        """
        fill_disk(3)
        file.send(self.BATCH, 1)
        fill_disk(None)
        path.unlink()
        file.send([b"{}"], 1)

        assert b"{}\n" == path.read_bytes()

    def test_left_by_the_dead(self, file, path):
        """
        A line that another process left torn is ended first.
        """
        path.write_bytes(b'{"a":1}\n{"b"')
        file.send([b"{}"], 1)

        assert b'{"a":1}\n{"b"\n{}\n' == path.read_bytes()

    def test_mended_by_another(self, file, path, fill_disk):
        """
        What another process has ended already is not ended again.
        """
        file.send([b"0"], 1)
        fill_disk(3)
        file.send(self.BATCH, 1)
        fill_disk(None)
        other = FileTransport(path)
        other.send([b"1"], 1)
        other.close()
        file.send([b"2"], 1)

        assert b'0\n{"a\n1\n2\n' == path.read_bytes()

    def test_unreadable(self, file, path, fill_disk, monkeypatch):
        """
        Of a file that cannot be read, the transport knows what it has done itself.
        """

        def refuse(*args: object) -> None:
            raise PermissionError(errno.EACCES, "no")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            fill_disk(3)
            file.send(self.BATCH, 1)
            fill_disk(None)
            file.send([b"{}"], 1)

        assert b'{"a\n{}\n' == path.read_bytes()

    def test_named_pipe(self, path):
        """
        A named pipe is never waited for: neither for a reader, nor for room.
        """
        os.mkfifo(path)
        file = FileTransport(path)
        nobody = file.send([b"{}"], 1)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        answer = file.send([b"x" * 1_000_000], 1)
        size = 0
        while chunk := _read_some(reader):
            size += len(chunk)
        again = file.send([b"{}"], 1)
        rest = _read_some(reader)
        os.close(reader)
        file.close()

        assert "OSError ENXIO" == nobody.reason
        assert "BlockingIOError EAGAIN" == answer.reason
        assert 0 < size < 1_000_000
        assert Verdict.TAKEN is again.verdict
        assert b"\n{}\n" == rest


def _read_some(fd: int) -> bytes:
    try:
        return os.read(fd, 65_536)
    except BlockingIOError:
        return b""


class TestManyProcesses:
    """
    One file, many writers.
    """

    def test_fork(self, path):
        """
        A child may go on with its parent's transport, and both write whole lines.
        """
        result = run_script(
            """
            import os, sys
            from pgtrack._file import FileTransport

            def write(name):
                for _ in range(200):
                    file.send([name * 100] * 10, 1)

            file = FileTransport(sys.argv[1])
            file.send([b"first"], 1)
            reader, writer = os.pipe()
            if os.fork() == 0:
                os.write(writer, b".")
                write(b"child")
                os._exit(0)
            os.read(reader, 1)  # until the child is about to write
            write(b"parent")
            os.wait()
            """,
            str(path),
        )
        lines = path.read_bytes().splitlines()

        assert "" == result.stderr
        assert {b"first": 1, b"child" * 100: 2000, b"parent" * 100: 2000} == {
            line: lines.count(line) for line in set(lines)
        }

    def test_close_in_child(self, file, path):
        """
        A child that closes the transport closes nothing of its parent's.
        """
        file.send([b"1"], 1)
        in_fork(file.close)
        in_fork(lambda: file.send([b"2"], 1))
        file.send([b"3"], 1)

        assert b"1\n2\n3\n" == path.read_bytes()
