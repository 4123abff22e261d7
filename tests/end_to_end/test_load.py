"""Much at once: many threads, a server that misbehaves, a full queue."""

from __future__ import annotations

import functools
import gc
import json
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from collections import Counter
from typing import Any

import pytest

import pgtrack
from harness import hang, start_together
from pgtrack import _client
from pgtrack._retry import RetryPolicy

THREADS = 32
EVENTS = 200_000
BOUND = 5_000_000
"""Nanoseconds of a thread's own time that one call of emit may take."""

# The server has a process of its own: what is measured here must not wait for it.  It
# reads events as ProductGraph does, if less strictly than the harness, which takes
# longer for them than pgtrack does.
_SERVER = """
import http.server, itertools, json, random, sys, time

seed, = sys.argv[1:]
rng = random.Random(int(seed))
faults_in_turn = itertools.cycle(FAULTS)
counts, requests, faults = {}, 0, 0

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        report = {"counts": counts, "requests": requests, "faults": faults}
        self.answer(200, json.dumps(report).encode())

    def do_POST(self):
        global requests, faults
        body = self.rfile.read(int(self.headers["Content-Length"]))
        requests += 1
        fault = next(faults_in_turn) if rng.random() < 0.4 else None
        faults += fault is not None
        if fault == "drop":
            self.close_connection = True
        elif fault in ("429", "500", "503"):
            self.answer(int(fault), b"")
        elif self.headers.get("Content-Encoding"):
            self.answer(400, b"invalid request body")
        else:
            if fault == "slow":
                time.sleep(0.05)
            for event in json.loads(body)["events"]:
                key = event["event_id"] + " " + event["event.name"]
                counts[key] = counts.get(key, 0) + 1
            if fault == "cut":
                self.wfile.write(b"HTTP/1.1 202 Acc")
                self.close_connection = True
            else:
                self.answer(202, b'{"accepted":1,"rejected":0}')

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Process:
    """A server in a process of its own, which fails two of five requests."""

    def __init__(self, faults: list[str], seed: int) -> None:
        source = f"FAULTS = {faults!r}\n{_SERVER}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", source, str(seed)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1/events"

    def report(self) -> dict[str, Any]:
        """Return what the server has counted."""
        with urllib.request.urlopen(self.url, timeout=30) as answer:
            return json.load(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Watch(threading.local):
    """
    Tells how long a thread has worked, less what the garbage collector took of it.

    32 threads share a core, so that most of the time on the wall is that of the others;
    and the collector, which looks through all that the process holds, runs in whichever
    thread happens to allocate.
    """

    collected = 0

    def time(self) -> int:
        """Return the nanoseconds so far, of the calling thread."""
        return time.thread_time_ns() - self.collected

    def _collecting(self, phase: str, _: object) -> None:
        sign = -1 if phase == "start" else 1
        self.collected += sign * time.thread_time_ns()

    def __enter__(self):
        gc.callbacks.append(self._collecting)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._collecting)


@pytest.fixture(name="impatient")
def _impatient(monkeypatch) -> None:
    """Retries come soon: two of five requests fail."""
    hurried = functools.partial(RetryPolicy, first=0.01, most=0.05)
    monkeypatch.setattr(_client, "RetryPolicy", hurried)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("faults", "is_doubled"),
    [
        (["503", "429", "500", "drop", "slow"], False),
        (["503", "429", "500", "drop", "slow", "cut"], True),
    ],
    ids=["nothing stored", "stored and failed"],
)
def test_many_threads(faults, is_doubled):
    """
    32 threads emit at once while the server misbehaves: none lost, emit stays quick.

    None is doubled either where requests fail that store nothing; where some store all
    and fail, the same `event_id` comes again.
    """
    total = EVENTS if not is_doubled else EVENTS // 10
    worst = emit_all(total, faults, is_doubled=is_doubled)
    if worst >= BOUND:  # a pause of the machine does not come twice, a slow way does
        worst = emit_all(total, faults, is_doubled=is_doubled)

    assert worst < BOUND, "nanoseconds"


def emit_all(total: int, faults: list[str], *, is_doubled: bool) -> int:
    """Emit, deliver and count *total* events, and return the longest that one took."""
    each = total // THREADS
    with Process(faults, seed=7) as process:
        client = pgtrack.configure(
            project_id="p",
            endpoint=process.url,
            max_queue_size=EVENTS,
            max_queue_bytes="1GB",
        )

        def emit(number: int) -> int:
            worst = 0
            for i in range(each):
                started = watch.time()
                taken = client.emit("custom", name=f"{number} {i}")
                worst = max(worst, watch.time() - started)
                assert taken
            return worst

        with Watch() as watch:
            worst = max(start_together(THREADS, emit, timeout=60))
        assert client.flush(60)
        stats = client.stats()
        report = process.report()

    names = Counter(key.split()[1] + " " + key.split()[2] for key in report["counts"])
    assert Counter(f"{n} {i}" for n in range(THREADS) for i in range(each)) == names
    assert is_doubled == (max(report["counts"].values()) > 1)
    assert report["faults"] > report["requests"] / 5
    assert (total, total) == (stats.emitted, stats.delivered)
    assert stats.is_balanced
    assert {} == stats.dropped
    return worst


def test_memory(server):
    """
    However many events are queued, they hold less than the 10 MB of the bound.

    Those beyond, or beyond 10,000, are dropped, and counted.
    """
    released = threading.Event()
    server.default = hang(released)
    client = pgtrack.configure(project_id="p", endpoint=server.url)
    client.emit("custom")
    client.flush(0)
    assert server.wait_for_requests(1)

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    taken = 0
    for number in range(10_500):
        text = f"value {number}"
        metadata = {"a": f"{text} a", "b": f"{text} b", "c": text, "d": 1000 + number}
        metadata |= {"e": f"{text} e", "f": f"{text} f", "g": f"{text} g", "h": None}
        metadata |= {"i": True, "j": [number], "k": {"l": text}, "m": f"{text} m"}
        taken += client.emit("custom", metadata=metadata)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()

    stats = client.stats()
    assert 5_000_000 < held < 10_000_000
    assert taken < 10_000
    assert {"queue_full": 10_500 - taken} == stats.dropped
    assert stats.is_balanced
    client.close(0)
    assert {
        "queue_full": 10_500 - taken,
        "shutdown": taken + 1,
    } == client.stats().dropped


@pytest.mark.parametrize("overflow", ["drop_newest", "drop_oldest"])
def test_overflow(server, overflow):
    """What does not fit is dropped by the policy, whoever emits, and counted."""
    released = threading.Event()
    server.default = hang(released)
    client = pgtrack.configure(
        project_id="p", endpoint=server.url, max_queue_size=100, overflow=overflow
    )
    client.emit("custom", name="first")
    client.flush(0)
    assert server.wait_for_requests(1)

    def emit(number: int) -> None:
        for i in range(200):
            client.emit("custom", name=f"{number} {i}")
            assert client.stats().pending <= 100 + 8

    start_together(8, emit)
    client.emit("custom", name="last")
    released.set()
    assert client.flush(30)

    stats = client.stats()
    names = [event["event.name"] for event in server.events]
    assert 1 + 8 * 200 + 1 == stats.emitted
    assert stats.delivered == len(names) == len(set(names))
    assert {"queue_full": stats.emitted - len(names)} == stats.dropped
    assert (overflow == "drop_oldest") == ("last" in names)
