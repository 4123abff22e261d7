"""Services in a chain, on real sockets: one session and one request through all."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from wsgiref import simple_server

import httpx
import pytest

import pgtrack
from harness import ProductGraph, Reply, Server, uvicorn_server
from pgtrack.integrations import asgi, wsgi
from pgtrack.integrations import httpx as pgtrack_httpx
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Iterator

requests = pytest.importorskip("requests")
pytest.importorskip("uvicorn")

from pgtrack.integrations import requests as pgtrack_requests  # noqa: E402

BROWSERS = 30


class _Quiet(simple_server.WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def wsgi_server(app: Any) -> Iterator[str]:
    """Serve a WSGI application from a thread, and return its URL."""
    server = simple_server.make_server("127.0.0.1", 0, app, handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@pytest.fixture(name="stranger")
def _stranger() -> Iterator[Server]:
    with Server() as server:
        server.default = lambda _: Reply(204)
        yield server


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    pgtrack_httpx.install()
    pgtrack_requests.install()
    yield
    pgtrack_httpx.uninstall()
    pgtrack_requests.uninstall()


async def answer(send: Any) -> None:
    """Answer with 204."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def test_three_services(stranger: Server) -> None:
    """A browser's session goes by ASGI, httpx, WSGI, requests and ASGI; none mixes."""
    foreign = f"http://localhost:{stranger.address[1]}/"
    urls: dict[str, str] = {}

    async def third(_scope: Any, _receive: Any, send: Any) -> None:
        pgtrack.emit("custom", name="third")
        await answer(send)

    def second(_environ: Any, start_response: Any) -> list[bytes]:
        with requests.Session() as session:
            session.trust_env = False
            session.get(urls["third"], timeout=10)
            session.get(foreign, timeout=10)
        start_response("204 No Content", [])
        return []

    async def first(_scope: Any, _receive: Any, send: Any) -> None:
        pgtrack.identify("u_ann")
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            await client.get(urls["second"])
            await client.get(foreign)
        await answer(send)

    async def browse(url: str) -> None:
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            for start in range(0, BROWSERS, 10):
                calls = (
                    client.get(
                        url,
                        headers={
                            "X-Session-ID": f"sess_{i}",
                            "X-Request-ID": f"req-{i}",
                        },
                    )
                    for i in range(start, start + 10)
                )
                await asyncio.gather(*calls)

    with (
        capture(propagate_to=["127.0.0.1"]) as events,
        uvicorn_server(asgi.Middleware(third), lifespan="off") as third_at,
        wsgi_server(wsgi.Middleware(second)) as urls["second"],
        uvicorn_server(asgi.Middleware(first), lifespan="off") as first_at,
    ):
        urls["third"] = f"http://127.0.0.1:{third_at[1]}/"
        asyncio.run(browse(f"http://127.0.0.1:{first_at[1]}/"))

    told = defaultdict(list)
    for event in events:
        told[event.session_id, event.metadata["request_id"]].append(event.type)
    assert {
        (f"sess_{i}", f"req-{i}"): ["custom", *["api.response"] * 3]
        for i in range(BROWSERS)
    } == told
    assert 2 * BROWSERS == len(stranger.requests)
    names = {name for request in stranger.requests for name in request.headers}
    assert {"x-session-id", "x-request-id", "x-user-id"}.isdisjoint(names)


SERVICE = """
import http.server, sys
from wsgiref import simple_server

import pgtrack
from pgtrack.integrations.wsgi import Middleware

def app(environ, start_response):
    pgtrack.emit("custom", name="behind")
    start_response("200 OK", [("X-User", environ.get("HTTP_X_USER_ID", "nobody"))])
    return [b"ok"]

with simple_server.make_server("127.0.0.1", 0, Middleware(app)) as server:
    print(server.server_port, flush=True)
    server.handle_request()
"""


def test_two_processes() -> None:
    """A service in another process tells its part in the session of its caller."""
    with Server(ProductGraph("v0.3.0")) as collector:
        options = {"endpoint": collector.url, "project_id": "proj"}
        environment = {
            f"PRODUCTGRAPH_{name.upper()}": value for name, value in options.items()
        }
        with subprocess.Popen(
            [sys.executable, "-c", SERVICE],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment, "PRODUCTGRAPH_ENABLED": "true"},
        ) as child:
            assert child.stdout is not None
            try:
                port = int(child.stdout.readline())
                pgtrack.configure(**options, propagate_to=[f"127.0.0.1:{port}"])
                with (
                    pgtrack.session("sess_ann", user_id="u_ann"),
                    pgtrack.api_call("GET", "/front"),
                    httpx.Client(verify=False, trust_env=False) as client,
                ):
                    response = client.get(f"http://127.0.0.1:{port}/behind")
                assert 0 == child.wait(20)
            finally:
                child.kill()
        assert pgtrack.flush(20)
        events = collector.events

    assert "nobody" == response.headers["x-user"]
    assert [("sess_ann", None)] * 2 + [("sess_ann", "u_ann")] == sorted(
        ((e["session.id"], e.get("user.id")) for e in events), key=str, reverse=True
    )
    assert ["/behind", "/front"] == sorted(
        filter(None, (e.get("api.path") for e in events))
    )
