"""Twenty thousand requests through FastAPI under uvicorn: none lost, none mixed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from collections import Counter
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SERVICE = textwrap.dedent(
    """
    import asyncio
    import socket
    import sys

    import fastapi
    import uvicorn

    import pgtrack
    from pgtrack.integrations.starlette import install

    app = fastapi.FastAPI()
    under_way = most = 0

    def identify(user: str):
        pgtrack.identify(user)  # in a thread

    @app.get("/users/{user}")
    async def serve(user: str):
        global under_way, most
        under_way += 1
        most = max(most, under_way)
        pgtrack.identify(user)
        with pgtrack.journey("journey of " + user):
            for _ in range(3):
                await asyncio.sleep(0)
            pgtrack.emit("custom", name=user)
        under_way -= 1
        return user

    @app.get("/in/threads/{user}", dependencies=[fastapi.Depends(identify)])
    def serve_in_thread(user: str):
        pgtrack.emit("custom", name=user)
        return user

    @app.get("/fail/{user}")
    async def fail(user: str):
        pgtrack.identify(user)
        await asyncio.sleep(0)
        raise ValueError(user)

    @app.get("/nobody")
    async def nobody():
        return pgtrack.current().user_id

    @app.get("/most")
    def get_most():
        return most

    install(app, exclude="/most")
    pgtrack.configure(project_id="p", endpoint=sys.argv[1])
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
    uvicorn.Server(config).run([listener])
    """
)


@contextmanager
def service(endpoint):
    """Run the service, and give its port; it is ended by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE, endpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the tracebacks of those that fail
        text=True,
    )
    with process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


async def ask(reader, writer, path, headers):
    """Send a request on a connection that is kept; return status, echo and body."""
    lines = [f"GET {path} HTTP/1.1", "Host: a", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    status, *fields = head.strip().split("\r\n")
    found = [field.split(": ", 1) for field in fields]
    echoed = [value for name, value in found if name == "x-request-id"]
    body = await reader.readexactly(int(dict(found).get("content-length", 0)))
    return int(status.split()[1]), echoed, body


class Visitors:
    """Many connections, each with one request after the other."""

    def __init__(self, port, requests):
        self.port = port
        self.requests = iter(requests)  # shared by all connections
        self.answers = []

    async def visit(self):
        """Send what is left, one by one; open a new connection where one was closed."""
        reader = writer = None
        for path, headers in self.requests:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            status, echoed, body = await ask(reader, writer, path, headers)
            self.answers.append((path, status, echoed, body))
            if status == 500:  # after which the server closes
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    async def run(self, count):
        """Send everything over *count* connections at once."""
        tasks = [asyncio.create_task(self.visit()) for _ in range(count)]
        await asyncio.wait_for(asyncio.gather(*tasks), 100)


def path_of(number):
    """Return the path that a request has, and its template."""
    if number % 100 == 0:
        return "/fail"
    return "/in/threads" if number % 16 == 1 else "/users"


@pytest.mark.timeout(150)  # half a minute on an idle machine with two cores
def test_none_is_lost_and_none_is_mixed(server):
    """Each event and each echo is of its own session, request and user."""
    count, anonymous = 20_000, 500
    requests = [
        (
            f"{path_of(n)}/user-{n}",
            [f"X-Session-ID: session-{n}", f"X-Request-ID: request-{n}"],
        )
        for n in range(count)
    ]
    for place in range(anonymous):
        requests.insert(place * 41, ("/nobody", []))

    with service(server.url) as port:
        visitors = Visitors(port, requests)
        asyncio.run(visitors.run(100))
        most = asyncio.run(ask_once(port, "/most"))

    expected = Counter()
    for n in range(count):
        who = (f"session-{n}", f"request-{n}", f"user-{n}")
        path = path_of(n)
        status = 500 if path == "/fail" else 200
        expected[(*who, "api.response", f"{path}/{{user}}", status, None)] += 1
        if path == "/fail":
            expected[(*who, "error", f"user-{n}", None, None)] += 1
        else:
            journey = f"journey of user-{n}" if path == "/users" else None
            expected[(*who, "custom", f"user-{n}", None, journey)] += 1
    events = server.events
    known = [e for e in events if e["session.id"].startswith("session-")]
    seen = Counter(
        (
            e["session.id"],
            e["metadata"]["request_id"],
            e.get("user.id"),
            e["event.type"],
            e.get("api.path") or e.get("error.message") or e.get("event.name"),
            e.get("api.status_code"),
            e.get("gen_ai.journey.id"),
        )
        for e in known
    )

    assert expected == seen
    assert 50 < most  # were served at once

    fresh = [e for e in events if not e["session.id"].startswith("session-")]
    assert len(known) + len(fresh) == len(events)
    assert anonymous == len(fresh) == len({e["session.id"] for e in fresh})
    assert all(e["session.id"].startswith("srv-") for e in fresh)
    assert all("user.id" not in event for event in fresh)

    by_path = {path: echoed for path, _, echoed, _ in visitors.answers}
    assert {f"{path_of(n)}/user-{n}": [f"request-{n}"] for n in range(count)} == {
        path: echo for path, echo in by_path.items() if path != "/nobody"
    }
    nobodies = [a for a in visitors.answers if a[0] == "/nobody"]
    assert {b"null"} == {body for *_, body in nobodies}
    assert sorted(e["metadata"]["request_id"] for e in fresh) == sorted(
        echo for *_, (echo,), _ in nobodies
    )


async def ask_once(port, path):
    """Send one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    _, _, body = await ask(reader, writer, path, ["Connection: close"])
    writer.close()
    return json.loads(body)
