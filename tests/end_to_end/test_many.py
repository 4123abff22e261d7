"""Several clients in a process, several versions of the server."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path

import pytest

import pgtrack
from harness import VERSIONS, ProductGraph, Server, start_together


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  only counted


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [20, 20_000])
def test_every_version(version, size):
    """Servers of every version, all of which refuse gzip, get all, in order."""
    with Server(ProductGraph(version, limit_event=None)) as server:
        client = pgtrack.configure(project_id="p", endpoint=server.url)
        for i in range(100):
            client.emit("custom", event_id=f"e{i}", metadata={"text": "x" * size})
        assert client.close(20)

        assert [f"e{i}" for i in range(100)] == [e["event_id"] for e in server.events]
        encodings = ["content-encoding" in r.headers for r in server.requests]
        assert size < 1000 or encodings[0]
        assert 1 >= sum(encodings), "what was refused once is not tried again"


def test_gzip_is_used():
    """A server that takes gzip gets it."""
    with Server(ProductGraph(gzip=True)) as server:
        client = pgtrack.configure(project_id="p", endpoint=server.url)
        for _ in range(100):
            client.emit("custom", metadata={"text": "x" * 1000})
        assert client.close(20)

        assert 100 == len(server.events)
        assert all("content-encoding" in r.headers for r in server.requests)
        assert client.stats().sent_bytes < 20_000


def test_two_servers(server):
    """Two clients in use at once do not mix."""
    with Server() as other:
        clients = [
            pgtrack.Client(pgtrack.Config(project_id=name, endpoint=where.url))
            for name, where in [("a", server), ("b", other)]
        ]

        def emit(number: int) -> None:
            client = clients[number % 2]
            for _ in range(200):
                client.emit("custom", name=client.config.project_id)

        start_together(6, emit)
        assert all(client.close(20) for client in clients)

        for where, name in [(server, "a"), (other, "b")]:
            seen = {(e["event.name"], e["project_id"]) for e in where.events}
            assert {(name, name)} == seen
            assert 600 == len({e["event_id"] for e in where.events})


def test_a_thousand_clients(server):
    """A thousand clients made, used and closed leave no thread and no descriptor."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc/self/fd to count descriptors")

    def use(number: int) -> None:
        config = pgtrack.Config(project_id="p", endpoint=server.url)
        with pgtrack.Client(config) as client:
            if number % 10 == 0:
                client.emit("custom")

    use(0)
    before = threading.active_count(), descriptors()
    for number in range(1000):
        use(number)
    # The server's ends are closed by its own threads, each in its own time.
    server.close()
    gc.collect()

    assert 101 == len(server.events)
    assert threading.active_count() <= before[0]
    assert descriptors() <= before[1]


def test_dropped_clients(server):
    """A client that is let go delivers in the background, then leaves no thread."""
    config = pgtrack.Config(project_id="p", endpoint=server.url)
    client = pgtrack.Client(config)
    client.emit("custom")
    thread = next(t for t in threading.enumerate() if t.name == "pgtrack")
    gone = weakref.ref(client)

    del client

    assert gone() is None
    assert server.wait_for(1)
    thread.join(5)
    assert not thread.is_alive()
