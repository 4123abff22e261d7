"""
Real servers, each a process of its own: what they served is told once, to the end.

Nothing is sent while a server runs: batches are too large and too rare for that.  All
has to come at its end, by whichever way the server leaves open (`docs/servers.md`).
"""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import pytest

from harness import Server, start_together

# Seconds for a server to start, or to end.
_PATIENCE = 25.0

_CLIENTS = 8
_REQUESTS = 25  # of each client

_TESTS = Path(__file__).resolve().parent.parent

_COMMON = """
import os

if "TELL" in os.environ:
    import pgtrack
    from pgtrack.integrations.{kind} import Middleware

    emit = pgtrack.emit
    pgtrack.configure(
        project_id="p",
        endpoint=os.environ["TELL"],
        batch_size=1000,
        batch_interval=600,
        exit_timeout=20,  # the machine is busy with all of them
    )
else:
    def emit(*_, **__): ...
    def Middleware(app): return app
"""

# Answers POST /plain/N and /stream/N; a stream begins before the body has come.
_ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        message = {"type": ""}
        while message["type"] != "lifespan.shutdown":
            message = await receive()
            await send({"type": message["type"] + ".complete"})
        return
    _, kind, number = scope["path"].split("/")
    headers = [(b"x-worker", b"%d" % os.getpid())]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    if kind == "stream":
        begun = {"type": "http.response.body", "body": b"begun ", "more_body": True}
        await send(start)
        await send(begun)
    while (await receive()).get("more_body"):
        pass
    emit("custom", name=number)
    if kind == "plain":
        await send(start)
    await send({"type": "http.response.body", "body": b"ended"})

app = Middleware(app)
"""

_WSGI = """
def app(environ, start_response):
    _, kind, number = environ["PATH_INFO"].split("/")
    start = "200 OK", [("X-Worker", str(os.getpid()))]
    body = environ["wsgi.input"]
    length = int(environ["CONTENT_LENGTH"])
    if kind == "plain":
        body.read(length)
        emit("custom", name=number)
        start_response(*start)
        return [b"ended"]

    def stream():
        yield b"begun "
        body.read(length)
        emit("custom", name=number)
        yield b"ended"

    start_response(*start)
    return stream()

app = Middleware(app)
"""


class Way(NamedTuple):
    """
    A way to serve.

    Attributes:
        command: What follows the name of the interpreter.

        kind: Whether the application is ASGI or WSGI.

        workers: How many processes answer.

        hears: What the log says, and how often, once SIGTERM has been noticed; None
            where it does not show.

        needs: The modules that have to be installed.

        is_graceful: Whether a request that is under way is answered to its end.
    """

    command: str
    kind: str = "asgi"
    workers: int = 1
    hears: tuple[str, int] | None = None
    needs: tuple[str, ...] = ()
    is_graceful: bool = True


_UVICORN = "-m uvicorn application:app --port {port}"
_HYPERCORN = "-m hypercorn application:app --bind 127.0.0.1:{port}"
_GRANIAN = "-m granian application:app --port {port}"
_GUNICORN = "-m gunicorn application:app --bind 127.0.0.1:{port} --workers 2"
_UWSGI = (
    "-c 'import pyuwsgi; pyuwsgi.run()' --http-socket 127.0.0.1:{port} "
    "--module application:app --need-app --disable-logging"
)
_UWSGI_MASTER = (
    f"{_UWSGI} --master --processes 2 "
    "--hook-master-start 'unix_signal:15 gracefully_kill_them_all'"
)

_SHUTTING_DOWN = "Shutting down"
_MASTER_HEARS = ("Handling signal: term", 1)
_MASTER_KILLS = ("racefully", 1)

WAYS = {
    "uvicorn": Way(_UVICORN, hears=(_SHUTTING_DOWN, 1)),
    "uvicorn-2": Way(f"{_UVICORN} --workers 2", "asgi", 2, (_SHUTTING_DOWN, 2)),
    "uvicorn-without-lifespan": Way(
        f"{_UVICORN} --lifespan off", hears=(_SHUTTING_DOWN, 1)
    ),
    "uvicorn-2-without-lifespan": Way(
        f"{_UVICORN} --workers 2 --lifespan off", "asgi", 2, (_SHUTTING_DOWN, 2)
    ),
    "hypercorn": Way(_HYPERCORN),
    "hypercorn-2": Way(f"{_HYPERCORN} --workers 2", "asgi", 2),
    "hypercorn-trio": Way(f"{_HYPERCORN} --worker-class trio"),
    "hypercorn-trio-2": Way(f"{_HYPERCORN} -k trio --workers 2", "asgi", 2),
    "granian": Way(
        f"{_GRANIAN} --interface asgi --workers 2",
        workers=2,
        hears=(_SHUTTING_DOWN, 1),
        needs=("granian",),
    ),
    "granian-wsgi": Way(
        f"{_GRANIAN} --interface wsgi",
        "wsgi",
        hears=(_SHUTTING_DOWN, 1),
        needs=("granian",),
    ),
    "daphne": Way(
        "-m daphne application:app --port {port}", needs=("daphne",), is_graceful=False
    ),
    "gunicorn-uvicorn": Way(
        f"{_GUNICORN} --worker-class uvicorn_worker.UvicornWorker",
        workers=2,
        hears=(_SHUTTING_DOWN, 2),
    ),
    "gunicorn-preload": Way(f"{_GUNICORN} --preload", "wsgi", 2, _MASTER_HEARS),
    "gunicorn-gthread": Way(f"{_GUNICORN} --threads 8", "wsgi", 2, _MASTER_HEARS),
    "gunicorn-gevent": Way(
        f"{_GUNICORN} --worker-class gevent", "wsgi", 2, _MASTER_HEARS, ("gevent",)
    ),
    "waitress": Way(
        "-m waitress --listen=127.0.0.1:{port} application:app",
        "wsgi",
        needs=("waitress",),
        is_graceful=False,
    ),
    "uwsgi": Way(
        f"{_UWSGI} --die-on-term", "wsgi", needs=("pyuwsgi",), is_graceful=False
    ),
    "uwsgi-master": Way(_UWSGI_MASTER, "wsgi", 2, _MASTER_KILLS, ("pyuwsgi",)),
    "uwsgi-lazy": Way(
        f"{_UWSGI_MASTER} --lazy-apps --threads 4",
        *("wsgi", 2, _MASTER_KILLS, ("pyuwsgi",)),
    ),
}


@pytest.fixture(name="way", params=WAYS)
def _way(request: pytest.FixtureRequest) -> Way:
    """Return each way to serve whose server is installed."""
    way = WAYS[request.param]
    for module in way.needs:
        pytest.importorskip(module)
    return way


def unused_port() -> int:
    """Return a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Host:
    """A server that runs, until it is told to end."""

    def __init__(self, way: Way, folder: Path, url: str | None) -> None:
        folder.mkdir(exist_ok=True)
        source = textwrap.dedent(_COMMON.format(kind=way.kind))
        source += _ASGI if way.kind == "asgi" else _WSGI
        (folder / "application.py").write_text(source)
        self.way = way
        self.port = unused_port()
        self._log = folder / "log"
        env = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCTGRAPH_")}
        paths = [entry for entry in sys.path if _TESTS not in _parents(entry)]
        env["PYTHONPATH"] = os.pathsep.join([str(folder), *paths])
        if url is not None:
            env["TELL"] = url
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *shlex.split(way.command.format(port=self.port))],
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self):
        return self

    def wait_for_start(self) -> None:
        """Wait until it takes connections."""
        self.wait_until(self._accepts, "started")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(_PATIENCE)

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def wait_until(self, condition, what: str) -> None:
        """Look again and again, since a foreign process tells nobody."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"it has not {what}:\n{self.log}"
            time.sleep(0.01)

    def _accepts(self) -> bool:
        assert self.process.poll() is None, f"it ended:\n{self.log}"
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def hears(self) -> bool:
        """Whether each worker has noticed that it is to end, where that shows."""
        if self.way.hears is None:
            return True
        text, count = self.way.hears
        return self.log.count(text) >= count

    def wait(self) -> int:
        """Return its exit status."""
        try:
            return self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it has not ended:\n{self.log}")


def _parents(entry: str) -> tuple[Path, ...]:
    path = Path(entry).resolve()
    return (path, *path.parents)


class Asked:
    """One request, to be read in two halves."""

    def __init__(self, host: Host, path: str, body: bytes = b"12") -> None:
        number = path.rpartition("/")[2]
        self._connection = HTTPConnection("127.0.0.1", host.port, timeout=_PATIENCE)
        self._connection.putrequest("POST", path)
        self._connection.putheader("Content-Length", "2")
        self._connection.putheader("Connection", "close")
        self._connection.putheader("X-Session-ID", f"session-{number}")
        self._connection.putheader("X-Request-ID", f"request-{number}")
        self._connection.endheaders(body)
        self._socket = self._connection.sock.dup()  # http.client gives up its own
        self._number = number

    def begin(self) -> None:
        """Wait until the answer has begun."""
        self._answer = self._connection.getresponse()
        assert b"begun " == self._answer.read(6)

    def end(self) -> None:
        """Send the second half of the body, and take the rest of the answer."""
        self._socket.sendall(b"2")
        assert b"ended" == self._answer.read()
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        self._connection.close()

    def read(self) -> str:
        """Take all of the answer, and return who gave it."""
        answer = self._connection.getresponse()
        assert 200 == answer.status
        assert answer.read().endswith(b"ended")
        self.close()
        worker: str = answer.headers["X-Worker"]
        return worker


def ask_all(host: Host, clients: int = _CLIENTS, each: int = _REQUESTS) -> set[str]:
    """Ask many things at once, some twice as slowly; return the paths."""
    host.wait_for_start()
    paths = [
        [f"/{'stream' if i % 5 == 0 else 'plain'}/{client}x{i}" for i in range(each)]
        for client in range(clients)
    ]

    def ask(client: int) -> set[str]:
        return {Asked(host, path).read() for path in paths[client]}

    seen: set[str] = set().union(*start_together(clients, ask))
    # A worker may have started later than the others: ask until each has answered.
    extra = (f"/plain/extra{i}" for i in itertools.count())
    deadline = time.monotonic() + _PATIENCE
    while len(seen) < host.way.workers and time.monotonic() < deadline:
        path = next(extra)
        paths.append([path])
        seen.add(Asked(host, path).read())
    return set(itertools.chain(*paths))


def expected_of(paths: set[str]) -> Counter[tuple[str, ...]]:
    """Return what must have been told: of each request two events, each once."""
    expected: Counter[tuple[str, ...]] = Counter()
    for path in paths:
        number = path.rpartition("/")[2]
        ids = f"session-{number}", f"request-{number}"
        expected[(*ids, "custom", number)] += 1
        expected[(*ids, "api.response", f"POST {path} 200")] += 1
    return expected


def told_to(server: Server) -> Counter[tuple[str, ...]]:
    """Return what was told; no event came twice."""
    events = server.events
    assert len(events) == len({event["event_id"] for event in events})
    return Counter(
        (
            event["session.id"],
            event["metadata"]["request_id"],
            event["event.type"],
            event["event.name"]
            if event["event.type"] == "custom"
            else " ".join(
                str(event[key]) for key in ("api.method", "api.path", "api.status_code")
            ),
        )
        for event in events
    )


class TestSigterm:
    """The server is told to end, with all that it served yet to be told."""

    def test_nothing_is_lost(self, server, tmp_path, way):
        """
        Of hundreds of requests all is told once, under their own sessions.

        So is one that is under way, which is answered to its end.
        """
        with (
            Host(way, tmp_path / "bare", None) as bare,
            Host(way, tmp_path / "with", server.url) as host,
        ):
            ask_all(bare, clients=1, each=1)
            paths = ask_all(host)
            assert [] == server.events
            if way.is_graceful:
                paths.add("/stream/late")
                late = Asked(host, "/stream/late", b"1")
                late.begin()
                host.process.send_signal(signal.SIGTERM)
                host.wait_until(host.hears, "heard")
                late.end()
            else:
                host.process.send_signal(signal.SIGTERM)
            bare.process.send_signal(signal.SIGTERM)

            assert bare.wait() == host.wait(), host.log
        assert expected_of(paths) == told_to(server)
        assert "Traceback" not in host.log


class TestWorkers:
    """A server ends its workers one by one, and goes on."""

    def test_recycled(self, server, tmp_path):
        """Workers that end by `--max-requests` tell all that they served."""
        way = Way(f"{_GUNICORN} --max-requests 30", "wsgi", 2)
        with Host(way, tmp_path, server.url) as host:
            paths = ask_all(host, clients=4, each=20)
            assert server.wait_for(1)  # at least one has ended
            host.process.send_signal(signal.SIGTERM)

            assert 0 == host.wait(), host.log
        assert expected_of(paths) == told_to(server)
