"""
Serve a `ProductGraph` over HTTP/1.1 on loopback, and misbehave by a script.

Threads: one accepts, and each connection has its own. One condition, `_changed`, guards
the core, the script and the first error of a step. Steps run outside of it, so a step
that hangs holds up its own connection only.
"""

from __future__ import annotations

import io
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from typing import TYPE_CHECKING, Any, NamedTuple, final

from .productgraph import ProductGraph, Reply, Request

if TYPE_CHECKING:
    from types import TracebackType

# In seconds: how long a connection may be idle or a step may wait, ...
_PATIENCE = 60.0

# ... how long close() waits for all threads together, ...
_CLOSE_TIMEOUT = 10.0

# ... how soon a waiting step notices that the server closes, ...
_TICK = 0.02

# ... and how long a connection is given to prove that there is room for it.
_ROOM = 0.2

_BACKLOG = 1024

_REASONS = {status.value: status.phrase for status in HTTPStatus}

_MAX_LINE = 64 * 1024
_MAX_BODY = 64 * 1024 * 1024


@dataclass(frozen=True)
class Wire:
    """
    Hold bytes to send as they are, chunk by chunk; then the connection is closed.

    With *is_reset* it ends by RST rather than in order.
    """

    chunks: Iterable[bytes] = ()
    is_reset: bool = False


@dataclass(frozen=True)
class Exchange(Request):
    """
    Be a request that waits for its answer on a connection: what a step is called with.
    """

    server: Server = field(repr=False, compare=False)

    def answer(self) -> Reply | None:
        """
        Return the core's real answer; events it accepts are stored by that.
        """
        return self.server.answer(self)

    def wait(self, until: threading.Event | float) -> None:
        """
        Wait for an event or some seconds, a minute at most; closing ends it early.
        """
        self.server.wait(until)


@dataclass(frozen=True)
class Arrival:
    """
    Be a connection of which nothing was read yet: what a welcome is called with.
    """

    connection: socket.socket = field(repr=False)
    server: Server = field(repr=False)

    def wait(self, until: threading.Event | float) -> None:
        """
        Wait for an event or some seconds, a minute at most; closing ends it early.
        """
        self.server.wait(until)


# Decides an answer: a reply, bytes as they are, or None to close the connection.
Step = Callable[[Exchange], Reply | Wire | None]

# Meets a connection: returns what its requests are read from, None to read them as they
# come, or bytes as they are instead of reading any.
Welcome = Callable[[Arrival], io.BufferedReader | Wire | None]


@final
class Server:
    """
    Be a ProductGraph server on a port of 127.0.0.1, from construction to `close`.

    The socket listens before the constructor returns, so nobody has to poll. Clients
    that go away, and requests that are no HTTP, are nobody's error.

    Args:
        core: Answers the requests; by default a strict ProductGraph v0.3.0.

        tls: Speaks TLS by this context.

        is_open: Whether it listens at once; otherwise its port refuses until `open`.

    Attributes:
        script:
            One step for each coming request, of whatever path. None as a step is the
            core's real answer. A step that raises closes its connection, and the
            error comes out of `close`.

        default: The step for each request after the script has run out.

        welcome: Meets each coming connection, after its handshake; None reads on.

        tls: For the coming connections.

        address: Host and port.
    """

    def __init__(
        self,
        core: ProductGraph | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        is_open: bool = True,
    ) -> None:
        self.core = ProductGraph() if core is None else core
        self.script: list[Step | None] = []
        self.default: Step | None = None
        self.welcome: Welcome | None = None
        self.tls = tls

        self._changed = threading.Condition()
        self._closing = threading.Event()
        # Closed ones stay, so that close() can join each thread that ever was.
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._error: BaseException | None = None

        self._crowd: list[socket.socket] = []
        self._acceptor: threading.Thread | None = None
        self._listener = _reserve(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        if is_open:
            self.open()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """
        Where events are posted to.
        """
        host, port = self.address
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{host}:{port}/v1/events"

    @property
    def connections(self) -> int:
        """
        How many TCP connections were accepted so far.
        """
        return len(self._connections)

    @property
    def events(self) -> list[dict[str, Any]]:
        """
        A copy of the list of stored events, in order.
        """
        with self._changed:
            return list(self.core.events)

    @property
    def requests(self) -> list[Request]:
        """
        A copy of the list of requests received, answered or not, in order.
        """
        with self._changed:
            return list(self.core.requests)

    def wait_for(self, n: int, timeout: float = 10) -> bool:
        """
        Wait until at least *n* events are stored, and return whether they are.
        """
        with self._changed:
            return self._changed.wait_for(lambda: len(self.core.events) >= n, timeout)

    def wait_for_requests(self, n: int, timeout: float = 10) -> bool:
        """
        Wait until at least *n* requests have come in whole; return whether they have.
        """
        with self._changed:
            return self._changed.wait_for(lambda: len(self.core.requests) >= n, timeout)

    def answer(self, request: Request) -> Reply | None:
        """
        Return the core's answer to a request that came in.
        """
        with self._changed:
            reply = self.core.answer(request)
            self._changed.notify_all()

        return reply

    def wait(self, until: threading.Event | float) -> None:
        """
        Wait for an event or some seconds, a minute at most; closing ends it early.
        """
        if not isinstance(until, threading.Event):
            self._closing.wait(min(until, _PATIENCE))
            return

        # Nothing waits for two events at once, hence a look at the other every tick.
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not self._closing.is_set():
            if until.wait(_TICK):
                return

    def open(self) -> None:
        """
        Listen, on the same port as ever, and serve whoever has been queueing.
        """
        if self._acceptor is not None:
            return

        self._listener.listen(_BACKLOG)
        while self._crowd:
            self._crowd.pop().close()
        self._acceptor = threading.Thread(
            target=self._accept,
            args=(self._listener,),
            name="harness-accept",
            daemon=True,
        )
        self._acceptor.start()

    def shut(self) -> None:
        """
        End every connection and refuse further ones, on the same port, until `open`.
        """
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            # Closing a socket does not wake who waits in accept() everywhere alike.
            with suppress(OSError):
                socket.create_connection(self.address, timeout=1).close()
            acceptor.join(_CLOSE_TIMEOUT)
        self._listener.close()
        for connection in [*self._crowd, *self._connections.values()]:
            _hang_up(connection)
        if not self._closing.is_set():
            self._listener = _reserve(self.address)

    def jam(self) -> None:
        """
        Listen, but accept nobody, with the backlog so full that nobody is answered.

        Until `open`, and only before it or after `shut`.
        """
        self._listener.listen(0)
        has_room = True
        while has_room:
            filler = socket.socket()
            filler.setblocking(False)
            with suppress(BlockingIOError):
                filler.connect(self.address)
            self._crowd.append(filler)
            has_room = bool(select.select([], [filler], [], _ROOM)[1])

    def close(self) -> None:
        """
        Close every connection and end all threads. Closing again does nothing.

        Raises:
            RuntimeError: A thread did not end in time.

            BaseException: What a step raised; if several did, the first.
        """
        if self._closing.is_set():
            return

        self._closing.set()
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        threads = [] if self._acceptor is None else [self._acceptor]
        self.shut()
        while self._crowd:
            self._crowd.pop().close()

        threads += self._connections
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

        if stuck := sum(thread.is_alive() for thread in threads):
            msg = f"{stuck} threads of the server did not end in {_CLOSE_TIMEOUT} s."
            raise RuntimeError(msg)

        if self._error is not None:
            raise self._error

    def _accept(self, listener: socket.socket) -> None:
        acceptor = threading.current_thread()
        while self._acceptor is acceptor:
            try:
                connection, _ = listener.accept()
            except OSError:
                # The client is gone already, or this process has no descriptor left.
                self._closing.wait(_TICK)
                continue

            if self._acceptor is not acceptor:
                connection.close()
                return

            thread = threading.Thread(
                target=self._serve,
                args=(connection,),
                name="harness-connection",
                daemon=True,
            )
            self._connections[thread] = connection
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_PATIENCE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._secure(connection) as secured:
                try:
                    self._serve_all(secured)
                finally:
                    _hang_up(secured)
        except OSError:
            pass  # The client went away, or close() hung up.
        except BaseException as error:  # close() raises it
            with self._changed:
                self._error = self._error or error

    def _secure(self, connection: socket.socket) -> socket.socket:
        if self.tls is not None:
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
            self._connections[threading.current_thread()] = connection
        return connection

    def _serve_all(self, connection: socket.socket) -> None:
        """
        Answer the requests of a connection until it ends.
        """
        if isinstance(connection, ssl.SSLSocket):
            connection.do_handshake()
        welcome = self.welcome
        source = None if welcome is None else welcome(Arrival(connection, self))
        if isinstance(source, Wire):
            _send(connection, source)
            return

        with connection.makefile("rb") if source is None else source as reader:
            while self._serve_one(connection, reader):
                pass

    def _serve_one(self, connection: socket.socket, reader: io.BufferedReader) -> bool:
        """
        Answer the next request, and return whether another may follow.
        """
        try:
            message = _read_message(reader)
        except (ValueError, HTTPException):
            connection.sendall(render(Reply(400, {"Connection": "close"})))
            return False

        if message is None:
            return False

        batch = self.core.decode(message.headers, message.body)
        exchange = Exchange(*message, batch, self)
        with self._changed:
            self.core.requests.append(exchange)
            step = self.script.pop(0) if self.script else self.default
            self._changed.notify_all()

        try:
            outcome = exchange.answer() if step is None else step(exchange)
        except OSError as error:
            msg = "A step raised what could pass for a client's leaving."
            raise RuntimeError(msg) from error

        if outcome is None:
            return False

        if isinstance(outcome, Reply):
            connection.sendall(render(outcome, head=exchange.method == "HEAD"))
            headers = {name.lower(): text for name, text in outcome.headers.items()}
            return "close" not in (
                exchange.headers.get("connection", "").lower(),
                headers.get("connection", "").lower(),
            )

        _send(connection, outcome)
        return False


def render(reply: Reply, *, head: bool = False) -> bytes:
    """
    Return an answer as it goes over the wire; without its body for a HEAD request.
    """
    reason = _REASONS.get(reply.status, "")
    headers = dict(reply.headers)
    if reply.status not in (204, 304):
        headers.setdefault("Content-Length", str(len(reply.body)))
    lines = [
        f"HTTP/1.1 {reply.status} {reason}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    body = b"" if head else reply.body
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1") + body


class _Message(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def _read_message(reader: io.BufferedReader) -> _Message | None:
    """
    Read a request; None when there are no more.

    Raises:
        ValueError, HTTPException: It is not HTTP.

        OSError: The connection ends or stalls within the body.
    """
    line = reader.readline(_MAX_LINE)
    if not line:
        return None

    method, path, version = line.decode("latin-1").split()
    headers: dict[str, str] = {}
    for name, value in parse_headers(reader).items():
        key = name.lower()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")

    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b"".join(_read_chunks(reader))
    else:
        body = _read_exactly(reader, int(headers.get("content-length", "0")))

    return _Message(method, path, headers, body)


def _read_chunks(reader: io.BufferedReader) -> Iterator[bytes]:
    left = _MAX_BODY
    while size := int(reader.readline(_MAX_LINE).partition(b";")[0], 16):
        left -= size
        if left < 0:
            raise ValueError

        yield _read_exactly(reader, size)
        _read_exactly(reader, len(b"\r\n"))

    while reader.readline(_MAX_LINE).strip():
        pass  # Trailers.


def _read_exactly(reader: io.BufferedReader, size: int) -> bytes:
    if not 0 <= size <= _MAX_BODY:
        raise ValueError

    data = reader.read(size)
    if len(data) < size:
        raise ConnectionError

    return data


def _send(connection: socket.socket, wire: Wire) -> None:
    """
    Send the bytes, and with *is_reset* close the connection by RST.
    """
    for chunk in wire.chunks:
        connection.sendall(chunk)
    if wire.is_reset:
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # Whoever still reads from it keeps a socket open that is merely closed.
        socket.close(connection.detach())


def _hang_up(connection: socket.socket) -> None:
    """
    End a connection for all holders of the socket, forked children included.
    """
    with suppress(OSError):
        # Not the method of an SSLSocket: another thread may be reading through it.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _reserve(address: tuple[str, int]) -> socket.socket:
    """
    Return a socket that has a port of its own and refuses connections to it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(address)
    return reserved
