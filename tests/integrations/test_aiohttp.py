"""aiohttp: what is its alone; test_outbound.py has what all clients share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import Reply, Server

aiohttp = pytest.importorskip("aiohttp")
web = pytest.importorskip("aiohttp.web")

from pgtrack.integrations import aiohttp as integration  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


@pytest.fixture(name="server")
def _server() -> Iterator[Server]:
    with Server() as server:
        server.default = lambda _: Reply(204)
        yield server


@pytest.fixture(name="url")
def _url(server: Server) -> str:
    return f"http://127.0.0.1:{server.address[1]}/"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    integration.install()
    pgtrack.configure(propagate_to=["127.0.0.1", "a.example"])
    yield
    integration.uninstall()


def run(use: Callable[[Any], Awaitable[None]], **options: Any) -> None:
    """Run *use* with a session of aiohttp, in a session of ours."""

    async def main() -> None:
        async with aiohttp.ClientSession(**options) as client:
            with pgtrack.session("sess_ann"):
                await use(client)

    asyncio.run(asyncio.wait_for(main(), 20))


def sessions(server: Server) -> list[str | None]:
    """Return the session that each request carried."""
    return [request.headers.get("x-session-id") for request in server.requests]


def test_handshakes_of_websockets() -> None:
    """The handshake of a WebSocket has the headers, over a real connection."""
    seen: list[str | None] = []

    async def serve(request: Any) -> Any:
        seen.append(request.headers.get("X-Session-ID"))
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("hello")
        await socket.close()
        return socket

    async def main() -> str:
        app = web.Application()
        app.router.add_get("/ws", serve)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as client:
            with pgtrack.session("sess_ann"):
                async with client.ws_connect(f"http://127.0.0.1:{port}/ws") as socket:
                    text = str(await socket.receive_str(timeout=10))
        await runner.cleanup()
        return text

    assert "hello" == asyncio.run(main())
    assert ["sess_ann"] == seen


def test_headers_of_the_session(server: Server, url: str) -> None:
    """Headers that a session gives to all of its requests win, and do not change."""
    headers = {"x-session-ID": "mine"}

    async def use(client: Any) -> None:
        await client.get(url)
        assert headers == dict(client.headers)

    run(use, headers=headers)

    assert ["mine"] == sessions(server)


def test_streams(server: Server, url: str) -> None:
    """A streamed body stays one."""

    async def body() -> Any:
        yield b"a"
        yield b"b"

    async def use(client: Any) -> None:
        await client.post(url, data=body())

    run(use)

    assert b"ab" == server.requests[0].body
    assert ["sess_ann"] == sessions(server)


def test_middlewares(server: Server, url: str) -> None:
    """What a middleware sends again has the headers once; it sees none of them."""
    if not hasattr(aiohttp, "ClientHandlerType"):
        pytest.skip("this aiohttp has no middlewares")
    seen = []

    async def twice(request: Any, handler: Any) -> Any:
        seen.append("X-Session-ID" in request.headers)
        (await handler(request)).close()
        seen.append("X-Session-ID" in request.headers)
        return await handler(request)

    async def use(client: Any) -> None:
        await client.get(url)

    run(use, middlewares=(twice,))

    assert ["sess_ann"] * 2 == sessions(server)
    assert [False, False] == seen


def test_retries_of_aiohttp(server: Server, url: str) -> None:
    """A kept connection that broke is tried again, with the headers, once."""
    server.script.extend([lambda _: Reply(204), lambda _: None])

    async def use(client: Any) -> None:
        await client.get(url)
        await client.get(url)

    run(use)

    assert ["sess_ann"] * 3 == sessions(server)


def test_proxies(server: Server, url: str) -> None:
    """A proxy gets the headers with the request, not with CONNECT."""

    async def use(client: Any) -> None:
        await client.get("http://a.example/x", proxy=url)
        await client.get("http://b.example/x", proxy=url)
        with pytest.raises(aiohttp.ClientError):
            await client.get("https://a.example/x", proxy=url)

    run(use)

    assert [
        ("GET", "http://a.example/x", "sess_ann"),
        ("GET", "http://b.example/x", None),
        ("CONNECT", "a.example:443", None),
    ] == [(r.method, r.path, r.headers.get("x-session-id")) for r in server.requests]


def test_cancelled(server: Server, url: str) -> None:
    """A request that is cancelled leaves nothing, and the next has its own session."""
    came = asyncio.Event()

    async def use(client: Any) -> None:
        loop = asyncio.get_running_loop()

        def hang(exchange: Any) -> None:
            loop.call_soon_threadsafe(came.set)
            exchange.wait(10)

        server.script.append(hang)
        task = asyncio.create_task(client.get(url))
        await came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pgtrack.session("sess_ben"):
            await client.get(url)

    run(use)

    assert ["sess_ann", "sess_ben"] == sessions(server)


def test_timeouts(server: Server, url: str) -> None:
    """A request that takes too long raises what it does without us."""
    server.script.append(lambda exchange: exchange.wait(10))

    async def use(client: Any) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await client.get(url, timeout=aiohttp.ClientTimeout(total=0.2))

    run(use)

    assert None is pgtrack.current().session_id
