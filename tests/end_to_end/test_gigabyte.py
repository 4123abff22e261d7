"""A large spool: it is replayed whole, and memory stays flat."""

from __future__ import annotations

import json
import logging
import time
import zlib
from typing import TYPE_CHECKING

import pytest

import pgtrack
from end_to_end.herd import SCALE, owners_in
from harness import Counting, Server, run_script, status

if TYPE_CHECKING:
    from pathlib import Path

# Shown by `--log-cli-level=INFO`.
LOGGER = logging.getLogger(__name__)

MEGABYTES = 100 * SCALE
SMALL_FILES = 10_000 * SCALE
JOURNAL_MEGABYTES = 50 * SCALE

# Bytes beyond what the process had when it had sent a thousand events of its own.
MOST_EXTRA = 50_000_000

EVENT_BYTES = 1_000

# The first client loads whatever is loaded late, and has its share of memory.
REPLAY = """
import json, re, sys, pgtrack
from pathlib import Path

options, empty, spool = json.loads(sys.argv[1])

def memory(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+) kB", status)[1]) * 1024

with pgtrack.Client(pgtrack.Config(**options, spool_dir=empty)) as client:
    for _ in range(1000):
        client.emit("custom", event_id="0", name="warm", metadata={"text": "x" * 700})
before = memory("VmRSS")
client = pgtrack.Client(pgtrack.Config(**options, spool_dir=spool))
client.emit("custom", event_id="0", name="first")
is_done = client.close(ENDLESS)
stats = client.stats()
print(json.dumps({
    "is_done": is_done,
    "extra": memory("VmHWM") - before,
    "recovered": stats.recovered,
    "delivered": stats.delivered,
    "is_balanced": stats.is_balanced,
}))
"""


class Adding(Counting):
    """Counts the events that came from the spool, and adds up their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.replayed = 0
        self.sum = 0

    def _count(self, event):
        number = int(event["event_id"], 16)
        self.replayed += number > 0
        self.sum += number


class OldSpool:
    """Be the folder of a process that is dead; events are numbered from 1."""

    def __init__(self, folder, options):
        pgtrack.Client(pgtrack.Config(**options, spool_dir=str(folder))).close()
        (destination,) = folder.iterdir()
        self.owner = destination / f"{time.time_ns():020d}-0123abcd"
        self.owner.mkdir(mode=0o700)
        self.count = self.bytes = 0

    def lines(self, count):
        """Return the next *count* events, as lines."""
        numbers = range(self.count + 1, self.count + count + 1)
        self.count += count
        data = b"".join(map(self._line, numbers))
        self.bytes += len(data)
        return data

    def _line(self, number: int) -> bytes:
        head = b'{"event_id":"%032x","event.name":"%d","metadata":{"text":"'
        event = head % (number, number) + b"x" * (EVENT_BYTES - 90) + b'"}}'
        return b"%08x %b\n" % (zlib.crc32(event), event)

    def write(self, count):
        """Write a sealed file of so many events."""
        name = f"{time.time_ns():020d}-{count}.batch"
        (self.owner / name).write_bytes(self.lines(count))

    def write_journal(self, megabytes):
        """Write a journal as a process leaves it that was killed."""
        with (self.owner / f"{time.time_ns():020d}.journal").open("wb") as file:
            for _ in range(megabytes):
                file.write(self.lines(1_000_000 // EVENT_BYTES))


def large_files(spool: OldSpool) -> None:
    """Fill *spool* with batches as the worker writes them."""
    for _ in range(MEGABYTES):
        spool.write(1_000_000 // EVENT_BYTES)


def small_files(spool: OldSpool) -> None:
    """Fill *spool* as thousands of short-lived processes would, but in one folder."""
    for _ in range(SMALL_FILES):
        spool.write(1)


def journal(spool: OldSpool) -> None:
    """Leave one journal that was never rotated."""
    spool.write_journal(JOURNAL_MEGABYTES)


class Replay:
    """Be a server, an old spool, and processes that replay it."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.options = {
            "project_id": "p",
            "endpoint": server.url,
            "max_spool_bytes": "4GB",
            "replay_rate": None,
            "compression": "none",
        }
        self.spool = OldSpool(folder / "spool", self.options)

    def run(self):
        """Replay it in a process that ends then, and return what that reports."""
        folders = (str(self.folder / "empty"), str(self.folder / "spool"))
        done = run_script(
            REPLAY.replace("ENDLESS", str(100.0 * SCALE)),
            json.dumps([self.options, *folders]),
            timeout=110 * SCALE,
        )
        assert 0 == done.returncode, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(name="core")
def _core():
    return Adding()


@pytest.fixture(name="server")
def _server(core):
    with Server(core) as server:
        yield server


@pytest.fixture(name="replay")
def _replay(tmp_path, server):
    return Replay(tmp_path, server)


@pytest.mark.timeout(60 + 60 * SCALE)
@pytest.mark.parametrize("fill", [large_files, small_files, journal])
def test_memory(replay, core, fill):
    """The replay takes less than 50 MB, whatever the spool holds."""
    fill(replay.spool)
    began = time.monotonic()
    report = replay.run()

    LOGGER.info(
        "%d MB in %.1f s, with %.1f MB of extra memory",
        *(replay.spool.bytes / 1e6, time.monotonic() - began, report["extra"] / 1e6),
    )
    count = replay.spool.count
    assert report["is_done"]
    assert report["is_balanced"]
    assert report["extra"] < MOST_EXTRA
    assert count == core.replayed == report["recovered"]
    assert count * (count + 1) // 2 == core.sum
    assert [] == owners_in(replay.folder / "spool")


@pytest.mark.timeout(60 + 60 * SCALE)
def test_memory_of_an_end(replay, core, server):
    """A process that ends in the middle of a large file takes no more either."""
    journal(replay.spool)
    server.script = [None] * 5
    server.default = status(503)
    first = replay.run()
    server.default = None
    second = replay.run()

    assert first["extra"] < MOST_EXTRA
    assert first["is_balanced"]
    assert 0 < first["delivered"] < first["recovered"]
    assert second["is_done"]
    assert replay.spool.count <= core.replayed
    assert [] == owners_in(replay.folder / "spool")
