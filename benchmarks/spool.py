"""
What a spool costs: emit on the calling thread, bytes on disk, replay.

    python benchmarks/spool.py

Each way to emit runs in fresh processes, in alternating rounds; a cell is the median
of its rounds. An emit of an event with 12 fields of metadata is timed alone, 4,000
times in a round (1,000 where each waits for the disk) after 500 that are not, with a
pause after each 200 in which the worker catches up, as it does in a host that does
something else, too. The endpoint is an HTTP server in a process of its own, which takes
everything.

The time on the wall has in it whatever else the machine does; `CPU` is that of the
calling thread alone, in which a wait for the disk does not show.

`naive` is what one would write without a library: a deque of dicts, `uuid4`, the time,
and one thread that sends 500 at a time by `http.client` and `json`, without retry,
bound, redaction or correlation.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import http.client
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from pathlib import Path

METADATA = {
    "tenant": "acme",
    "plan": "enterprise",
    "region": "eu-central-1",
    "invoice": "inv_000123",
    "currency": "EUR",
    "amount": 129.95,
    "items": 3,
    "is_renewal": True,
    "coupon": None,
    "channel": "web",
    "experiment": "checkout-b",
    "attempt": 1,
}

WAYS = {
    "naive": None,
    "no spool": {},
    "spool_dir": {"spool_dir": "spool"},
    "spool_each_event": {"spool_dir": "spool", "spool_each_event": True},
    "spool_each_event, spool_fsync": {
        "spool_dir": "spool",
        "spool_each_event": True,
        "spool_fsync": True,
    },
}

EVENTS = 4_000
SYNCED_EVENTS = 1_000  # each of which waits for the disk
WARM = 500
BURST = 200
PAUSE = 0.05

REPLAYED = 100_000


# --- the other side ---


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer leave together

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"accepted":1,"rejected":0}'
        self.send_response(202)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextlib.contextmanager
def endpoint():
    command = [sys.executable, __file__, "--part", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1/events"
        process.kill()


# --- emit ---


class Naive:
    def __init__(self, url: str) -> None:
        self.queue: collections.deque[dict] = collections.deque()
        self.address = url.split("/")[2]
        self.is_over = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def emit(self, kind: str, name: str, metadata: dict) -> None:
        self.queue.append(
            {
                "event_id": str(uuid.uuid4()),
                "event.type": kind,
                "event.name": name,
                "session.id": "s",
                "project_id": "p",
                "event.timestamp": time.time(),
                "metadata": metadata,
            }
        )

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.address)
        while not self.is_over or self.queue:
            batch = [self.queue.popleft() for _ in range(min(len(self.queue), 500))]
            if not batch:
                time.sleep(0.01)
                continue
            body = json.dumps({"events": batch}).encode()
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/events", body, headers)
            connection.getresponse().read()

    def close(self) -> None:
        self.is_over = True
        self.thread.join()


def emitter(url: str, way: str, folder: str):
    if WAYS[way] is None:
        naive = Naive(url)
        return naive.emit, naive.close
    import pgtrack  # noqa: PLC0415  the naive one does without

    options = {"project_id": "p", "endpoint": url, **WAYS[way]}
    if "spool_dir" in options:
        options["spool_dir"] = str(Path(folder) / "spool")
    client = pgtrack.Client(pgtrack.Config(**options))
    return client.emit, lambda: client.close(60)


def measure_emit(url: str, way: str, folder: str) -> None:
    emit, close = emitter(url, way, folder)
    for _ in range(WARM):
        emit("custom", name="invoice.sent", metadata=METADATA)
    time.sleep(0.5)
    gc.collect()
    clock, cpu_clock = time.perf_counter_ns, time.thread_time_ns
    times, cpu_times = [], []
    for number in range(SYNCED_EVENTS if "fsync" in way else EVENTS):
        cpu_start, start = cpu_clock(), clock()
        emit("custom", name="invoice.sent", metadata=METADATA)
        end, cpu_end = clock(), cpu_clock()
        times.append(end - start)
        cpu_times.append(cpu_end - cpu_start)
        if number % BURST == BURST - 1:
            time.sleep(PAUSE)
    close()
    result = {}
    for name, found in (("", times), ("CPU ", cpu_times)):
        quantiles = statistics.quantiles(found, n=100)
        result[f"{name}p50"] = quantiles[49] / 1e3
        result[f"{name}p99"] = quantiles[98] / 1e3
    print(json.dumps(result))


# --- disk and replay ---


def measure_disk(folder: str) -> None:
    """Emit at an endpoint that refuses, and weigh what is left."""
    import pgtrack  # noqa: PLC0415  only needed in this part

    spool = Path(folder) / "spool"
    options = {"project_id": "p", "endpoint": "http://127.0.0.1:9/v1/events"}
    client = pgtrack.Client(pgtrack.Config(**options, spool_dir=str(spool)))
    for _ in range(2_000):
        client.emit("custom", name="invoice.sent", metadata=METADATA)
    client.close(5)
    files = [p for p in spool.rglob("*.batch") if p.is_file()]
    events = [line[9:] for p in files for line in p.read_bytes().splitlines()]
    size = sum(p.stat().st_size for p in files)
    wire = sum(map(len, events))
    print(json.dumps({"disk": size / len(events), "json": wire / len(events)}))


def fill(spool: Path, url: str) -> int:
    """Leave a spool as a process leaves it that died in an outage; return its bytes."""
    import pgtrack  # noqa: PLC0415  only needed in this part

    config = pgtrack.Config(project_id="p", endpoint=url, spool_dir=str(spool))
    pgtrack.Client(config).close()
    (destination,) = spool.iterdir()
    owner = destination / f"{time.time_ns():020d}-0123abcd"
    owner.mkdir(mode=0o700)
    total = 0
    for start in range(0, REPLAYED, 1_000):
        lines = []
        for number in range(start, start + 1_000):
            event = {
                "event_id": str(uuid.UUID(int=number)),
                "project_id": "p",
                "product_id": "p",
                "session.id": "proc-0123456789abcdef0123456789abcdef",
                "event.type": "custom",
                "event.timestamp": "2026-01-01T00:00:00.000000Z",
                "event.name": "invoice.sent",
                "metadata": {**METADATA, "source": "backend"},
            }
            data = json.dumps(event, separators=(",", ":")).encode()
            lines.append(b"%08x %b\n" % (zlib.crc32(data), data))
        content = b"".join(lines)
        total += len(content)
        (owner / f"{time.time_ns():020d}-1000.batch").write_bytes(content)
    return total


def measure_replay(url: str, folder: str, compression: str) -> None:
    import pgtrack  # noqa: PLC0415  only needed in this part

    spool = Path(folder) / "spool"
    size = fill(spool, url)
    client = pgtrack.Client(
        pgtrack.Config(
            project_id="p",
            endpoint=url,
            spool_dir=str(spool),
            replay_rate=None,
            compression=compression,
        )
    )
    wall, cpu = time.perf_counter(), time.process_time()
    client.emit("custom", name="first")
    client.close(300)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert client.stats().delivered == REPLAYED + 1, client.stats()
    print(
        json.dumps(
            {
                "events a second": REPLAYED / wall,
                "events a CPU second": REPLAYED / cpu,
                "MB a second": size / wall / 1e6,
            }
        )
    )


# --- all of it ---


def part(*arguments: str) -> dict[str, float]:
    """Run a part in a fresh process, with a folder of its own."""
    folder = tempfile.mkdtemp(prefix="benchmark-", dir=options.folder)
    try:
        output = subprocess.run(
            [sys.executable, __file__, "--part", *arguments, folder],
            check=True,
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if "PRODUCTGRAPH" not in k},
        ).stdout
    finally:
        shutil.rmtree(folder)
    return json.loads(output)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def main() -> None:
    with endpoint() as url:
        cells: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        replays: dict[str, list[dict[str, float]]] = {"none": [], "gzip": []}
        for number in range(options.rounds):
            ways = list(WAYS)
            for way in ways if number % 2 else reversed(ways):
                cells[way].append(part("emit", url, way))
            for compression, rounds in replays.items():
                if number < 3:
                    rounds.append(part("replay", url, compression))
        disk = part("disk")
    naive = medians(cells["naive"])
    print(f"Python {sys.version.split()[0]}, medians of {options.rounds} rounds\n")
    head = [*naive, *(f"{key} / naive" for key in naive)]
    print(f"| emit, µs | {' | '.join(head)} |")
    print(f"| --- |{' ---: |' * len(head)}")
    for way in WAYS:
        cell = medians(cells[way])
        texts = [f"{cell[key]:,.0f}" for key in naive]
        texts += [f"{cell[key] / naive[key]:.1f}" for key in naive]
        name = ", ".join(f"`{n}`" if "_" in n else n for n in way.split(", "))
        print(f"| {name} | {' | '.join(texts)} |")
    print("\n| on disk | |\n| --- | ---: |")
    print(f"| bytes per event | {disk['disk']:.0f} |")
    print(f"| of which its JSON | {disk['json']:.0f} |")
    print("\n| replay, `replay_rate=None` | plain | gzip |\n| --- | ---: | ---: |")
    plain, packed = medians(replays["none"]), medians(replays["gzip"])
    for key in plain:
        print(f"| {key} | {plain[key]:,.0f} | {packed[key]:,.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--folder", help="where the spools are made")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = {
        "serve": serve,
        "emit": measure_emit,
        "disk": measure_disk,
        "replay": lambda url, compression, folder: measure_replay(
            url, folder, compression
        ),
    }
    if options.part is None:
        main()
    else:
        parts[options.part[0]](*options.part[1:])
