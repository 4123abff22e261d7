"""What waits, waits no longer than it was told, and holds up nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
import trio

import pgtrack
from harness import hang, status

if TYPE_CHECKING:
    from collections.abc import Iterator

# Seconds that a wait may be longer or shorter than it was asked to be.
_TOLERANCE = 0.1


@contextmanager
def takes(seconds: float) -> Iterator[None]:
    """Assert how long the block takes."""
    started = time.monotonic()
    yield
    assert abs(time.monotonic() - started - seconds) < _TOLERANCE


@pytest.fixture(name="released")
def _released() -> Iterator[threading.Event]:
    """Return what makes hanging requests go on; set in the end."""
    released = threading.Event()
    yield released
    released.set()


@pytest.fixture(name="client")
def _client(server, released) -> Iterator[pgtrack.Client]:
    """Return a client in the middle of a request that hangs, with 3 events."""
    import httpx  # noqa: F401  not while something is timed

    server.default = hang(released)
    config = pgtrack.Config(project_id="p", endpoint=server.url, batch_size=2)
    client = pgtrack.Client(config)
    for _ in range(3):
        client.emit("custom")
    assert server.wait_for_requests(1)
    yield client
    client.close(0)


class TestDeadlines:
    """The server hangs."""

    @pytest.mark.parametrize("seconds", [0, 0.25, 0.6])
    def test_flush(self, client, seconds):
        """Flushing takes as long as it may, and keeps the events that are left."""
        with takes(seconds):
            assert not client.flush(seconds)

        assert 3 == client.stats().pending

    @pytest.mark.parametrize("seconds", [0, 0.25, 0.6])
    def test_close(self, client, seconds):
        """Closing takes as long as it may; what is left is dropped, and counted."""
        with takes(seconds):
            assert not client.close(seconds)

        assert {"shutdown": 3} == client.stats().dropped
        assert client.stats().is_balanced

    def test_close_again(self, client):
        """Closing again returns at once."""
        client.close(0)

        with takes(0):
            client.close(5)
            client.close(5)

    def test_retry_after(self, server, released):
        """A wait that the endpoint asked for does not prolong a flush or the end."""
        released.set()
        server.default = status(429, {"Retry-After": "60"})
        config = pgtrack.Config(project_id="p", endpoint=server.url, batch_size=1)
        client = pgtrack.Client(config)
        client.emit("custom")
        assert server.wait_for_requests(1)

        with takes(0.3):
            assert not client.flush(0.3)
        with takes(0.3):
            assert not client.close(0.3)

        assert {"shutdown": 1} == client.stats().dropped

    def test_several_at_once(self, client, released):
        """Any number of threads may flush; each keeps its own deadline."""
        outcomes = {}

        def flush(seconds: float) -> None:
            started = time.monotonic()
            outcomes[seconds] = (client.flush(seconds), time.monotonic() - started)

        seconds = [0.1, 0.3, 0.5, 20]
        threads = [threading.Thread(target=flush, args=(s,)) for s in seconds]
        for thread in threads:
            thread.start()
        for thread in threads[:3]:
            thread.join(5)
        released.set()
        threads[3].join(5)

        assert [False, False, False, True] == [outcomes[s][0] for s in seconds]
        assert all(abs(outcomes[s][1] - s) < _TOLERANCE for s in seconds[:3])
        assert outcomes[20][1] < 5

    def test_default_client(self, server, released):
        """The module's verbs keep one deadline for all clients they speak for."""
        server.default = hang(released)
        for number in range(3):
            pgtrack.configure(project_id=f"p{number}", endpoint=server.url)
            pgtrack.emit("custom")
            pgtrack.flush(0)
        assert server.wait_for_requests(3)

        with takes(0.4):
            assert not pgtrack.flush(0.4)
        with takes(0.4):
            assert not pgtrack.shutdown(0.4)

        assert {"shutdown": 3} == pgtrack.stats().dropped


class TestAsync:
    """An event loop waits for delivery."""

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    @pytest.mark.parametrize("verb", ["aflush", "aclose"])
    def test_the_loop_goes_on(self, client, released, backend, verb):
        """Other tasks run while one waits; then it learns that all is delivered."""
        turns = 0

        async def main() -> bool:
            outcome = []

            async def wait() -> None:
                outcome.append(await getattr(client, verb)(20))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                nonlocal turns
                for _ in range(20):
                    await anyio.sleep(0.001)
                    turns += not outcome
                released.set()
            return outcome[0]

        assert anyio.run(main, backend=backend)
        assert 20 == turns
        assert 3 == client.stats().delivered

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_default_client(self, server, backend):
        """The module's verbs can be awaited."""
        pgtrack.configure(project_id="p", endpoint=server.url)
        pgtrack.emit("custom")

        async def main() -> tuple[bool, bool]:
            return await pgtrack.aflush(10), await pgtrack.ashutdown(10)

        assert (True, True) == anyio.run(main, backend=backend)
        assert 1 == len(server.events)

    def test_timeout(self, client):
        """Awaiting keeps the deadline."""

        async def main() -> None:
            with takes(0.3):
                assert not await client.aflush(0.3)

        asyncio.run(main())

    def test_cancelled_in_trio(self, client):
        """A cancelled wait ends at once in trio, and the events stay."""

        async def main() -> None:
            with takes(0.2), trio.move_on_after(0.2):
                await client.aflush(2)

        trio.run(main)

        assert 3 == client.stats().pending
        client.close(0)

    def test_cancelled_in_asyncio(self, client, released):
        """A cancelled wait ends at once in asyncio, and the events stay."""

        async def main() -> None:
            with takes(0.2), pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.aflush(20), 0.2)
            assert 3 == client.stats().pending
            released.set()  # the loop waits for its threads before it ends

        asyncio.run(main())

        assert client.flush(5)

    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_async_with(self, server, backend):
        """Leaving `async with` closes the client, also by an exception."""

        async def main() -> pgtrack.Client:
            config = pgtrack.Config(project_id="p", endpoint=server.url)
            try:
                async with pgtrack.Client(config) as client:
                    client.emit("custom")
                    raise KeyError
            except KeyError:
                return client

        client = anyio.run(main, backend=backend)

        assert 1 == len(server.events)
        assert not client.emit("custom")


def test_with(server):
    """Leaving `with` closes the client, also by an exception."""
    config = pgtrack.Config(project_id="p", endpoint=server.url)
    try:
        with pgtrack.Client(config) as client:
            client.emit("custom")
            raise KeyError
    except KeyError:
        pass

    assert 1 == len(server.events)
    assert not client.emit("custom")
    assert {"closed": 1} == client.stats().dropped
