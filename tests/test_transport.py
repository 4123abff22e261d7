"""One attempt over HTTP: what goes out, what may come back, and how long it takes."""

from __future__ import annotations

import gzip
import json
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

import freezegun
import httpx
import pytest
import trustme

import pgtrack
from harness import (
    ProductGraph,
    Server,
    Wire,
    cut,
    drip,
    drop,
    endless,
    garbage,
    hang,
    in_fork,
    load_vectors,
    poison,
    redirect,
    run_script,
    start_together,
    status,
)
from pgtrack import Config, _transport
from pgtrack._transport import HttpTransport
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLACK = 0.15
"""How exactly a deadline is kept on a busy machine, in seconds."""

SECOND_HOST = "events.example.test"
"""A name that no resolver knows, and that is not this machine's."""


def event(i: int = 0, **fields: Any) -> bytes:
    """Return an event that the strict server takes."""
    wire = {
        "event_id": f"event-{i}",
        "project_id": "shop",
        "product_id": "shop",
        "session.id": "sess_1",
        "event.type": "custom",
        "event.timestamp": "2026-03-02T08:15:00.612345Z",
        **fields,
    }
    return json.dumps(wire).encode()


SMALL = [event()]
LARGE = [event(i, metadata={"text": "x" * 1000}) for i in range(20)]


@pytest.fixture(name="server")
def _server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(name="connect")
def _connect() -> Iterator[Callable[..., HttpTransport]]:
    """Make transports that are closed in the end."""
    made: list[HttpTransport] = []

    def connect(
        endpoint: str, http: httpx.BaseTransport | None = None, **options: Any
    ) -> HttpTransport:
        config = Config(project_id="shop", endpoint=endpoint, **options)
        made.append(HttpTransport(config, http))
        return made[-1]

    yield connect
    for transport in made:
        transport.close()


def timed(function: Callable[[], Answer]) -> tuple[Answer, float]:
    """Return what *function* returns, and how long it took."""
    start = time.monotonic()
    answer = function()
    return answer, time.monotonic() - start


def wait_until(is_so: Callable[[], Any], timeout: float = 10.0) -> bool:
    """Return whether something comes to be so within the *timeout*."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not is_so():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.001)
    return True


class TestRequest:
    """What goes over the wire."""

    def test_events_are_posted_as_they_are(self, server, connect) -> None:
        """The body is the list of events, byte for byte, and nothing else."""
        answer = connect(server.url).send([event(1), event(2)], 5)

        (request,) = server.requests
        body = b'{"events":[' + event(1) + b"," + event(2) + b"]}"
        assert ("POST", "/v1/events", body) == (
            request.method,
            request.path,
            request.body,
        )
        assert (Verdict.TAKEN, len(body)) == (answer.verdict, answer.sent_bytes)

    def test_the_headers_are_few(self, server, connect) -> None:
        """There is no header but those that the wire needs, and no cookie."""
        connect(server.url).send(SMALL, 5)

        (request,) = server.requests
        host, port = server.address
        agent = request.headers["user-agent"]
        assert {
            "host": f"{host}:{port}",
            "content-type": "application/json",
            "content-length": str(len(request.body)),
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": agent,
        } == dict(request.headers)
        assert agent.startswith(f"pgtrack/{pgtrack.__version__} Python/3.")

    def test_the_key_has_its_header(self, server, connect) -> None:
        """An API key goes into the header that the server documents."""
        connect(server.url, api_key="k-secret").send(SMALL, 5)

        assert "k-secret" == server.requests[0].headers["x-pg-api-key"]

    def test_the_whole_endpoint_is_used(self, server, connect) -> None:
        """Path and query of the endpoint are kept."""
        host, port = server.address
        connect(f"http://{host}:{port}/in/v2?tenant=a%20b").send(SMALL, 5)

        assert "/in/v2?tenant=a%20b" == server.requests[0].path

    def test_cookies_are_not_kept(self, server, connect) -> None:
        """What an answer wants to be sent back is not."""
        server.script = [status(202, {"Set-Cookie": "a=b"})]
        transport = connect(server.url)
        transport.send(SMALL, 5)
        transport.send(SMALL, 5)

        assert "cookie" not in server.requests[1].headers

    def test_it_is_quiet(self, server, connect, caplog) -> None:
        """Neither httpx nor httpcore writes a line at INFO or above."""
        caplog.set_level("INFO")
        connect(server.url).send(SMALL, 5)

        assert [] == caplog.records

    def test_another_transport_of_httpx_can_be_given(self, connect) -> None:
        """Tests may answer without a socket."""

        def respond(request: httpx.Request) -> httpx.Response:
            return httpx.Response(202, json={"accepted": 1, "rejected": 0})

        mock = httpx.MockTransport(respond)

        assert Verdict.TAKEN is connect("http://localhost", mock).send(SMALL, 5).verdict


class TestAnswers:
    """The answer is read."""

    def test_the_documented_exchange(self, connect) -> None:
        """A partial success says which events were rejected, and why."""
        vector = load_vectors("exchange_partial")
        sent: list[Any] = []

        def respond(request: httpx.Request) -> httpx.Response:
            sent.append(json.loads(request.content))
            return httpx.Response(202, json=vector["response"]["json"])

        events = [json.dumps(e).encode() for e in vector["request"]["json"]["events"]]
        transport = connect("http://localhost", httpx.MockTransport(respond))
        answer = transport.send(events, 5)

        assert [vector["request"]["json"]] == sent
        assert vector["client_must"]["dropped_indexes"] == list(answer.rejected)
        assert "session.id: required" == answer.rejected[1]

    def test_the_real_server_rejects_single_events(self, server, connect) -> None:
        """What the server stores and what the answer rejects are all events."""
        bad = event(1, **{"session.id": ""})
        answer = connect(server.url).send([event(0), bad, event(2)], 5)

        assert {1: "session.id: required"} == answer.rejected
        assert 2 == len(server.events)

    @pytest.mark.parametrize(
        ("code", "verdict"),
        [
            (400, Verdict.REFUSED),
            (401, Verdict.HOLD),
            (404, Verdict.HOLD),
            (413, Verdict.TOO_LARGE),
            (429, Verdict.RETRY),
            (500, Verdict.RETRY),
            (503, Verdict.RETRY),
        ],
    )
    def test_statuses_become_verdicts(self, server, connect, code, verdict) -> None:
        """Each status arrives as its verdict, with its text as the reason."""
        server.script = [status(code, body=b"because\n")]
        answer = connect(server.url).send(SMALL, 5)

        assert (verdict, f"{code} because") == (answer.verdict, answer.reason)
        assert answer.sent_bytes > 0

    @pytest.mark.parametrize("name", ["Retry-After", "retry-after", "RETRY-AFTER"])
    def test_retry_after_is_read(self, server, connect, name) -> None:
        """The header counts however it is written."""
        server.script = [status(429, {name: "17"})]

        assert 17.0 == connect(server.url).send(SMALL, 5).retry_after

    def test_a_date_is_read_by_the_wall_clock(self, server, connect) -> None:
        """A `Retry-After` that is a date is a time from now."""
        server.script = [status(503, {"Retry-After": "Mon, 02 Mar 2026 08:15:40 GMT"})]
        transport = connect(server.url)
        with freezegun.freeze_time("2026-03-02T08:15:00Z"):
            answer = transport.send(SMALL, 5)

        assert 40.0 == answer.retry_after

    def test_redirects_are_not_followed(self, server, connect) -> None:
        """An answer that sends elsewhere is held; nothing goes there."""
        with Server() as elsewhere:
            server.script = [redirect(elsewhere.url, code) for code in (302, 307, 308)]
            transport = connect(server.url, api_key="k-secret")
            verdicts = [transport.send(SMALL, 5).verdict for _ in range(3)]

            assert [Verdict.HOLD] * 3 == verdicts
            assert [] == elsewhere.requests
            assert 0 == elsewhere.connections


class TestCompression:
    """gzip where it pays, and not where it is refused."""

    @pytest.mark.parametrize(
        ("compression", "events", "encodings"),
        [
            ("auto", SMALL, [None]),
            ("auto", LARGE, ["gzip"]),
            ("gzip", SMALL, ["gzip"]),
            ("gzip", LARGE, ["gzip"]),
            ("none", SMALL, [None]),
            ("none", LARGE, [None]),
        ],
    )
    def test_the_setting_decides(self, connect, compression, events, encodings) -> None:
        """`auto` packs bodies over 8 KiB, `gzip` all, `none` none."""
        with Server(ProductGraph(gzip=True)) as server:
            transport = connect(server.url, compression=compression)
            answer = transport.send(events, 5)

            sent = [r.headers.get("content-encoding") for r in server.requests]
            assert encodings == sent
            assert len(events) == len(server.events)
            assert len(server.requests[0].body) == answer.sent_bytes

    def test_a_packed_body_is_the_body(self, connect) -> None:
        """Unpacked, it is what would have been sent, and it is smaller."""
        with Server(ProductGraph(gzip=True)) as server:
            connect(server.url).send(LARGE, 5)
            (request,) = server.requests

        body = b'{"events":[' + b",".join(LARGE) + b"]}"
        assert body == gzip.decompress(request.body)
        assert len(request.body) < len(body) / 5

    @pytest.mark.parametrize("code", [400, 415])
    def test_refused_it_is_sent_plain_and_remembered(
        self, server, connect, code
    ) -> None:
        """Today's server refuses gzip: sent again plain at once, from then on plain."""
        server.script = [status(code)]
        transport = connect(server.url)
        answers = [transport.send(LARGE, 5) for _ in range(2)]

        sent = [r.headers.get("content-encoding") for r in server.requests]
        assert ["gzip", None, None] == sent
        assert [Verdict.TAKEN] * 2 == [answer.verdict for answer in answers]
        both = len(server.requests[0].body) + len(server.requests[1].body)
        assert both == answers[0].sent_bytes
        assert 40 == len(server.events)

    def test_todays_server_gets_it_plain(self, server, connect) -> None:
        """The real refusal of gzip is understood."""
        answer = connect(server.url, compression="gzip").send(SMALL, 5)

        assert (Verdict.TAKEN, 2) == (answer.verdict, len(server.requests))

    def test_a_bad_event_is_not_blamed_on_compression(self, connect) -> None:
        """Refused packed and plain, the events are at fault: gzip goes on."""
        with Server(ProductGraph(gzip=True)) as server:
            server.default = poison(lambda e: e["event_id"] == "event-3")
            transport = connect(server.url)
            answers = [transport.send(LARGE, 5), transport.send(LARGE[4:], 5)]

            sent = [r.headers.get("content-encoding") for r in server.requests]
            assert ["gzip", None, "gzip"] == sent
            verdicts = [answer.verdict for answer in answers]
            assert [Verdict.REFUSED, Verdict.TAKEN] == verdicts

    def test_a_failure_of_the_plain_one_proves_nothing(self, connect) -> None:
        """Only what was taken plain is remembered, not what broke on the way."""
        with Server(ProductGraph(gzip=True)) as server:
            server.script = [status(400), drop(), None]
            transport = connect(server.url)
            answers = [transport.send(LARGE, 5), transport.send(LARGE, 5)]

            sent = [r.headers.get("content-encoding") for r in server.requests]
            assert ["gzip", None, "gzip"] == sent
            verdicts = [answer.verdict for answer in answers]
            assert [Verdict.RETRY, Verdict.TAKEN] == verdicts

    @pytest.mark.parametrize("code", [401, 413, 500])
    def test_other_answers_are_not_about_compression(
        self, server, connect, code
    ) -> None:
        """Any other failure of a packed body is what it is, and not sent again here."""
        server.script = [status(code)]
        answer = connect(server.url).send(LARGE, 5)

        assert (1, str(code)) == (len(server.requests), answer.reason)

    def test_both_attempts_share_the_time(self, server, connect) -> None:
        """A refusal and its repetition together keep the deadline."""
        go = threading.Event()
        server.script = [status(400), hang(go)]
        answer, seconds = timed(lambda: connect(server.url).send(LARGE, 0.3))
        go.set()

        assert Verdict.RETRY is answer.verdict
        assert 0.3 <= seconds < 0.3 + SLACK


class TestConnection:
    """One connection, kept as long as the server keeps it."""

    def test_many_batches_go_over_one(self, server, connect) -> None:
        """Batches share a TCP connection, also after failures."""
        server.script = [None, status(400), status(503, body=b"x" * 5000), None]
        transport = connect(server.url)
        for _ in range(10):
            transport.send(SMALL, 5)

        assert (10, 1) == (len(server.requests), server.connections)

    def test_it_is_made_again_when_the_server_says_so(self, server, connect) -> None:
        """After `Connection: close` the next batch has another connection."""
        server.script = [status(202, {"Connection": "close"})]
        transport = connect(server.url)
        verdicts = [transport.send(SMALL, 5).verdict for _ in range(3)]

        assert [Verdict.TAKEN] * 3 == verdicts
        assert 2 == server.connections

    def test_it_is_made_again_when_the_server_went(self, server, connect) -> None:
        """A connection that was closed in silence is noticed before it is used."""
        accepted = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
        server.script = [lambda _: Wire([accepted])]
        transport = connect(server.url)
        first = transport.send(SMALL, 5)
        sock = transport._exchange.socket
        # Else the end came together with the answer, and was noticed already.
        assert sock is None or select.select([sock], [], [], 10)[0]
        second = transport.send(SMALL, 5)

        assert [Verdict.TAKEN] * 2 == [first.verdict, second.verdict]
        assert 2 == server.connections

    def test_it_can_be_closed_and_used_again(self, server, connect) -> None:
        """After `close` the next batch opens another."""
        transport = connect(server.url)
        transport.send(SMALL, 5)
        transport.close()
        transport.close()

        assert Verdict.TAKEN is transport.send(SMALL, 5).verdict
        assert 2 == server.connections

    def test_closing_what_was_never_open(self, connect) -> None:
        """A transport that sent nothing can be closed, aborted and disowned."""
        transport = connect("http://localhost")
        transport.abort()
        transport.disown()
        transport.close()

        assert transport._exchange.socket is None

    def test_a_child_that_disowns_it_leaves_it_to_the_parent(
        self, server, connect
    ) -> None:
        """In a fork the child gives up its copy; the parent goes on over it."""
        transport = connect(server.url)
        transport.send(SMALL, 5)

        def child() -> tuple[int, str]:
            transport.disown()
            transport.disown()
            sock = transport._exchange.socket
            own = HttpTransport(transport._config)
            answer = own.send(SMALL, 5)
            own.close()
            return -1 if sock is None else sock.fileno(), answer.verdict.value

        assert (-1, "taken") == in_fork(child)
        assert Verdict.TAKEN is transport.send(SMALL, 5).verdict
        assert 2 == server.connections

    def test_without_time_nothing_is_begun(self, server, connect) -> None:
        """With no time left, no connection is made."""
        answer = connect(server.url).send(SMALL, 0.0)

        assert Verdict.RETRY is answer.verdict
        assert "the exchange took too long" in answer.reason
        assert 0 == server.connections

    def test_nobody_listens(self, connect) -> None:
        """A refused connection is a failure to retry."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        answer = connect(f"http://127.0.0.1:{port}/").send(SMALL, 5)

        assert Verdict.RETRY is answer.verdict
        assert "ConnectError" in answer.reason
        assert 0 == answer.sent_bytes

    def test_nobody_has_the_name(self, connect) -> None:
        """A name without an address is a failure to retry."""
        answer = connect("http://no-such.invalid/", allow_insecure=True).send(SMALL, 5)

        assert Verdict.RETRY is answer.verdict


def body_after(headers: bytes, drops: Callable[[], Iterator[bytes]]) -> Any:
    """Answer the headers at once, and a body by and by."""

    def step(exchange: Any) -> Wire:
        def chunks() -> Iterator[bytes]:
            yield headers
            for drop_ in drops():
                exchange.wait(0.02)
                yield drop_

        return Wire(chunks())

    return step


CHUNKED = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n"


def forever(data: bytes) -> Callable[[], Iterator[bytes]]:
    """Return what gives the same bytes, again and again."""

    def drops() -> Iterator[bytes]:
        for _ in range(3000):
            yield data

    return drops


class TestMisbehaviour:
    """A server may do anything: the attempt ends in time, and the events are kept."""

    @pytest.mark.parametrize(
        "fault",
        [
            drop(),
            cut(0),
            cut(7),
            cut(60),
            cut(90),
            garbage(b""),
            garbage(b"\0" * 1000),
            garbage(b"SSH-2.0-OpenSSH\r\n"),
            garbage(b"HTTP/1.1 abc\r\n\r\n"),
            garbage(b"HTTP/1.1 202 OK\r\nContent-Length: nine\r\n\r\n"),
            garbage(b"HTTP/1.1 202 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
            garbage(b"HTTP/1.1 202 OK\r\n" + b"X-A: " + b"a" * 300_000 + b"\r\n\r\n"),
            garbage(b"HTTP/1.1 202 OK\r\n" + b"X-A: a\r\n" * 100_000 + b"\r\n"),
        ],
    )
    def test_what_is_no_answer_is_a_failure_to_retry(
        self, server, connect, fault
    ) -> None:
        """Closed, cut or garbled answers are no receipt, and the next one is read."""
        server.script = [fault]
        transport = connect(server.url)
        broken, seconds = timed(lambda: transport.send(SMALL, 5))
        whole = transport.send(SMALL, 5)

        assert (Verdict.RETRY, Verdict.TAKEN) == (broken.verdict, whole.verdict)
        assert broken.reason
        assert len(broken.reason) < 200
        assert seconds < 4

    def test_an_endless_answer_is_read_up_to_a_bound(self, server, connect) -> None:
        """A body without an end is cut off, and costs its connection alone."""
        server.script = [endless(2**40)]
        transport = connect(server.url)
        answer, seconds = timed(lambda: transport.send(SMALL, 10))
        after = transport.send(SMALL, 5)

        assert [Verdict.TAKEN] * 2 == [answer.verdict, after.verdict]
        assert seconds < 5

    @pytest.mark.parametrize(
        "fault",
        [
            hang(threading.Event()),
            drip(0.02),
            body_after(b"", forever(b"X")),
            body_after(b"HTTP/1.1 202 OK\r\n", forever(b"X-Drop: 1\r\n")),
            body_after(b"HTTP/1.1 100 Continue\r\n\r\n", forever(b"HTTP/1.1 1")),
            body_after(CHUNKED, forever(b"1\r\n \r\n")),
            body_after(
                b"HTTP/1.1 202 OK\r\nContent-Length: 5000\r\n\r\n", forever(b" ")
            ),
            body_after(b"HTTP/1.1 202 OK\r\n\r\n", forever(b" ")),
        ],
        ids=[
            "hang",
            "drip",
            "status line",
            "headers",
            "informational",
            "chunks",
            "body",
            "body without length",
        ],
    )
    def test_the_deadline_is_of_the_whole_exchange(
        self, server, connect, fault
    ) -> None:
        """An answer that comes by the byte, in any part of it, ends at the timeout."""
        server.script = [fault]
        answer, seconds = timed(lambda: connect(server.url).send(SMALL, 0.3))

        assert Verdict.RETRY is answer.verdict
        assert seconds < 0.3 + SLACK

    @pytest.mark.parametrize("bite", [0, 4096])
    def test_a_server_that_does_not_read_is_left_in_time(self, connect, bite) -> None:
        """A body that is not read, or by the bite, is written until the timeout."""
        done = threading.Event()
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listener.bind(("127.0.0.1", 0))
            listener.listen()

            def serve() -> None:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    while not done.wait(0.02):
                        if bite:
                            connection.recv(bite)

            thread = threading.Thread(target=serve)
            thread.start()
            port = listener.getsockname()[1]
            transport = connect(f"http://127.0.0.1:{port}/", compression="none")
            huge = [b'"' + b"x" * 9_000_000 + b'"']
            answer, seconds = timed(lambda: transport.send(huge, 0.5))
            done.set()
            thread.join(5)

        assert Verdict.RETRY is answer.verdict
        assert seconds < 0.5 + 2 * SLACK

    def test_a_web_page_is_no_receipt(self, server, connect) -> None:
        """A page for people, as of a captive portal, is no answer to a batch."""
        server.script = [status(200, {"Content-Type": "text/html"}, b"<html>")]

        assert Verdict.HOLD is connect(server.url).send(SMALL, 5).verdict


class TestAbort:
    """Another thread may cut an exchange."""

    def test_a_hanging_one_ends_at_once(self, server, connect) -> None:
        """An answer that is waited for is not waited for any longer."""
        server.script = [hang(threading.Event())]
        transport = connect(server.url)

        def abort() -> None:
            assert server.wait_for_requests(1)
            transport.abort()

        aborter = threading.Thread(target=abort)
        aborter.start()
        answer, seconds = timed(lambda: transport.send(SMALL, 10))
        aborter.join(5)

        assert Verdict.RETRY is answer.verdict
        assert seconds < 5

    def test_it_does_not_last(self, server, connect) -> None:
        """The next exchange is not affected."""
        transport = connect(server.url)
        transport.send(SMALL, 5)
        transport.abort()

        assert Verdict.TAKEN is transport.send(SMALL, 5).verdict

    def test_a_handshake_can_be_cut(self, connect) -> None:
        """Also a server that accepts, and then is silent in the TLS handshake."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            transport = connect(f"https://127.0.0.1:{port}/")
            accepted: list[socket.socket] = []

            def abort() -> None:
                accepted.append(listener.accept()[0])
                accepted[0].recv(1)  # the greeting: the handshake is under way
                transport.abort()

            aborter = threading.Thread(target=abort)
            aborter.start()
            answer, seconds = timed(lambda: transport.send(SMALL, 10))
            aborter.join(5)
            accepted[0].close()

        assert Verdict.RETRY is answer.verdict
        assert seconds < 5


@final
class Relay:
    """
    Forwards connections to another address: a TLS front, or a proxy.

    Args:
        target: Where everything goes, whatever name was asked for.

        tls: What to speak with the client; None for plain.

        proxy: Whether clients first send CONNECT, or name the whole URL.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        tls: ssl.SSLContext | None = None,
        proxy: bool = False,
    ) -> None:
        self._target = target
        self._tls = tls
        self._is_proxy = proxy
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _start(self, function: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                self._sockets.append(client)
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
                self._sockets.append(client)
            server = socket.create_connection(self._target)
            self._sockets.append(server)
            if self._is_proxy:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(1)
                self.heads.append(head)
                if head.startswith(b"CONNECT "):
                    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                else:
                    server.sendall(head.replace(b"http://" + SECOND_HOST.encode(), b""))
            self._start(self._pump, server, client)
            self._pump(client, server)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            socket.socket.shutdown(sink, socket.SHUT_RDWR)


@pytest.fixture(name="authority", scope="module")
def _authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(name="bundle", scope="module")
def _bundle(authority, tmp_path_factory) -> str:
    """Return the file of the certificates to trust."""
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture(name="tls", scope="module")
def _tls(authority) -> ssl.SSLContext:
    """Make what a server for 127.0.0.1 and the second host speaks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", SECOND_HOST).configure_cert(context)
    return context


class TestTls:
    """Verified, always."""

    def test_a_bundle_is_trusted(self, server, connect, tls, bundle) -> None:
        """A server whose authority is in `ca_bundle` is spoken to."""
        with Relay(server.address, tls=tls) as relay:
            transport = connect(
                f"https://127.0.0.1:{relay.port}/v1/events", ca_bundle=bundle
            )
            verdicts = [transport.send(LARGE, 5).verdict for _ in range(3)]
            transport.close()

        assert [Verdict.TAKEN] * 3 == verdicts
        assert 1 == server.connections

    def test_without_it_nothing_is_sent(self, server, connect, tls) -> None:
        """A server that nobody vouches for is a failure to retry; it sees no event."""
        with Relay(server.address, tls=tls) as relay:
            answer = connect(f"https://127.0.0.1:{relay.port}/").send(SMALL, 5)

        assert Verdict.RETRY is answer.verdict
        assert "CERTIFICATE_VERIFY_FAILED" in answer.reason
        assert [] == server.requests

    def test_the_name_is_verified(self, server, connect, authority, bundle) -> None:
        """A certificate of another host is none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("other.example").configure_cert(context)
        with Relay(server.address, tls=context) as relay:
            transport = connect(
                f"https://127.0.0.1:{relay.port}/v1/events", ca_bundle=bundle
            )
            answer = transport.send(SMALL, 5)

        assert Verdict.RETRY is answer.verdict
        assert [] == server.requests

    @pytest.mark.parametrize("parts", [0, 1, 2])
    def test_a_client_certificate_is_shown(  # noqa: PLR0917  fixtures
        self, server, connect, authority, bundle, tmp_path, parts
    ) -> None:
        """A server that asks for one gets `client_cert`, in one file or two."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        issued = authority.issue_cert("client@example.com")
        both, cert, key = (tmp_path / name for name in ("both", "cert", "key"))
        issued.private_key_and_cert_chain_pem.write_to_path(both)
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        client_cert: Any = {0: None, 1: both, 2: (cert, key)}[parts]
        with Relay(server.address, tls=context) as relay:
            transport = connect(
                f"https://127.0.0.1:{relay.port}/v1/events",
                ca_bundle=bundle,
                client_cert=client_cert,
            )
            answer = transport.send(SMALL, 5)
            transport.close()

        assert (Verdict.TAKEN if parts else Verdict.RETRY) is answer.verdict
        assert bool(parts) == bool(server.requests)

    def test_a_hanging_one_ends_at_once(self, server, connect, tls, bundle) -> None:
        """An exchange over TLS can be cut as well, and another one made."""
        server.script = [hang(threading.Event())]
        with Relay(server.address, tls=tls) as relay:
            transport = connect(
                f"https://127.0.0.1:{relay.port}/v1/events", ca_bundle=bundle
            )

            def abort() -> None:
                assert server.wait_for_requests(1)
                transport.abort()

            aborter = threading.Thread(target=abort)
            aborter.start()
            answer, seconds = timed(lambda: transport.send(SMALL, 10))
            aborter.join(5)
            after = transport.send(SMALL, 5)
            transport.close()

        assert (Verdict.RETRY, Verdict.TAKEN) == (answer.verdict, after.verdict)
        assert seconds < 5


class TestProxy:
    """By setting, else by environment; never to this machine itself."""

    @pytest.fixture(autouse=True)
    def _no_proxies(self, monkeypatch) -> None:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)

    @pytest.fixture(name="proxy")
    def _proxy(self, server) -> Iterator[Relay]:
        with Relay(server.address, proxy=True) as relay:
            yield relay

    def test_the_setting_is_used(self, server, connect, proxy) -> None:
        """`proxy` carries the request, whatever the host."""
        transport = connect(
            f"http://{SECOND_HOST}/v1/events",
            allow_insecure=True,
            proxy=f"http://127.0.0.1:{proxy.port}",
        )
        answer = transport.send(SMALL, 5)
        transport.close()

        assert Verdict.TAKEN is answer.verdict
        assert proxy.heads[0].startswith(b"POST http://events.example.test/v1/events ")
        assert 1 == len(server.events)

    def test_the_proxy_may_want_a_password(self, connect, proxy) -> None:
        """User and password in the URL go to the proxy, as its header."""
        transport = connect(
            f"http://{SECOND_HOST}/",
            allow_insecure=True,
            proxy=f"http://user:pass@127.0.0.1:{proxy.port}",
        )
        transport.send(SMALL, 5)
        transport.close()

        assert b"Basic dXNlcjpwYXNz" in proxy.heads[0]

    @pytest.mark.parametrize("scheme", ["", "http://"])
    @pytest.mark.parametrize("name", ["http_proxy", "all_proxy", "ALL_PROXY"])
    def test_the_environment_is_used(
        self, connect, proxy, monkeypatch, name, scheme
    ) -> None:
        """The usual variables name a proxy, with or without a scheme."""
        monkeypatch.setenv(name, f"{scheme}127.0.0.1:{proxy.port}")
        transport = connect(f"http://{SECOND_HOST}/", allow_insecure=True)
        answer = transport.send(SMALL, 5)
        transport.close()

        assert Verdict.HOLD is answer.verdict  # the server knows no such path
        assert 1 == len(proxy.heads)

    def test_tls_goes_through_a_tunnel(
        self, server, connect, tls, bundle, monkeypatch
    ) -> None:
        """For https the proxy sees the host, and nothing else; one tunnel for all."""
        with (
            Relay(server.address, tls=tls) as front,
            Relay(("127.0.0.1", front.port), proxy=True) as proxy,
        ):
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
            transport = connect(
                f"https://{SECOND_HOST}/v1/events", ca_bundle=bundle, api_key="k-secret"
            )
            verdicts = [transport.send(SMALL, 5).verdict for _ in range(3)]
            transport.close()

        assert [Verdict.TAKEN] * 3 == verdicts
        (head,) = proxy.heads
        assert head.startswith(b"CONNECT events.example.test:443 ")
        assert b"k-secret" not in head

    def test_a_proxy_may_speak_tls(self, server, connect, tls, monkeypatch) -> None:
        """A proxy whose certificate nobody vouches for carries nothing."""
        with Relay(server.address, tls=tls, proxy=True) as proxy:
            transport = connect(
                f"http://{SECOND_HOST}/v1/events",
                allow_insecure=True,
                proxy=f"https://127.0.0.1:{proxy.port}",
            )
            answer = transport.send(SMALL, 5)

        assert Verdict.RETRY is answer.verdict
        assert [] == server.requests

    def test_tls_within_tls_keeps_the_deadline(
        self, server, connect, tls, bundle, monkeypatch
    ) -> None:
        """A tunnel through a proxy that speaks TLS itself works, and ends in time."""
        monkeypatch.setenv("SSL_CERT_FILE", bundle)
        context = ssl.create_default_context(cafile=bundle)
        monkeypatch.setattr("httpcore._ssl.default_ssl_context", lambda: context)
        monkeypatch.setattr(
            "httpcore._sync.http_proxy.default_ssl_context", lambda: context
        )
        with (
            Relay(server.address, tls=tls) as front,
            Relay(("127.0.0.1", front.port), tls=tls, proxy=True) as proxy,
        ):
            transport = connect(
                f"https://{SECOND_HOST}/v1/events",
                ca_bundle=bundle,
                proxy=f"https://127.0.0.1:{proxy.port}",
            )
            taken = transport.send(SMALL, 5)
            server.script = [hang(threading.Event())]
            hung, seconds = timed(lambda: transport.send(SMALL, 0.3))
            transport.close()

        assert (Verdict.TAKEN, Verdict.RETRY) == (taken.verdict, hung.verdict)
        assert seconds < 0.3 + SLACK

    @pytest.mark.parametrize(
        "no_proxy", ["*", SECOND_HOST, ".example.test", f"{SECOND_HOST}:8080"]
    )
    def test_hosts_can_be_excepted(self, connect, proxy, monkeypatch, no_proxy) -> None:
        """`NO_PROXY` lists hosts, suffixes and ports that are spoken to directly."""
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", no_proxy)
        transport = connect(f"http://{SECOND_HOST}:8080/", allow_insecure=True)
        answer = transport.send(SMALL, 5)

        assert Verdict.RETRY is answer.verdict  # nobody knows the host
        assert [] == proxy.heads

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_this_machine_is_spoken_to_directly(
        self, server, connect, proxy, monkeypatch, host
    ) -> None:
        """A proxy of the environment's is not asked for a loopback address."""
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("all_proxy", f"http://127.0.0.1:{proxy.port}")
        transport = connect(f"http://{host}:{server.address[1]}/v1/events")

        assert Verdict.TAKEN is transport.send(SMALL, 5).verdict
        assert [] == proxy.heads


class TestImports:
    """A fork must not come in the middle of an import."""

    @staticmethod
    def hold() -> bool:
        """Hold off imports from another thread, for a moment."""

        def hold(_: int) -> bool:
            is_held = _transport.hold_imports(0.01)
            if is_held:
                _transport.allow_imports()
            return is_held

        return start_together(1, hold)[0]

    def test_a_fork_waits_for_an_import(self) -> None:
        """While one thread imports, another cannot fork."""
        before = self.hold()
        with _transport.importing():
            during = self.hold()

        assert (True, False, True) == (before, during, self.hold())

    def test_an_import_waits_for_a_fork(self) -> None:
        """Between the hooks of a fork no import begins."""
        assert _transport.hold_imports(0.01)
        during = self.hold()
        _transport.allow_imports()

        assert (False, True) == (during, self.hold())

    def test_an_import_may_fork(self) -> None:
        """A module may start a program as it is imported: its thread does not wait."""
        with _transport.importing():
            is_held = _transport.hold_imports(0.01)
            _transport.allow_imports()

        assert is_held

    def test_a_child_forgets_who_was_importing(self) -> None:
        """In a child nobody is importing, whoever was in the parent."""

        def child() -> bool:
            _transport.forget_imports()
            return self.hold()

        with _transport.importing():
            is_free = in_fork(child)

        assert is_free

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_a_request_imports_nothing_on_its_way(self, scheme, tls, bundle) -> None:
        """All that a first request needs is imported while forks are held off."""
        script = """
            import contextlib, sys
            import pgtrack
            from pgtrack import Config, _transport

            known = set()
            importing = _transport.importing

            @contextlib.contextmanager
            def noting():
                with importing():
                    yield
                    known.update(sys.modules)

            _transport.importing = noting
            url, bundle = sys.argv[1:]
            config = Config(project_id="p", endpoint=url, ca_bundle=bundle)
            transport = _transport.HttpTransport(config)
            print(transport.send([b'{}' * 10_000], 5).reason)
            print(sorted(set(sys.modules) - known))
            transport.close()
        """
        with Server(tls=tls if scheme == "https" else None) as server:
            host, port = server.address
            done = run_script(script, f"{scheme}://{host}:{port}/v1/events", bundle)

        assert "" == done.stderr
        reason, modules = done.stdout.splitlines()
        assert reason
        assert "[]" == modules
        assert server.requests

    def test_httpx_is_loaded_with_the_first_batch(self) -> None:
        """Importing pgtrack and making a transport loads no HTTP library."""
        script = """
            import sys
            from pgtrack import Config
            from pgtrack._transport import HttpTransport

            HttpTransport(Config(project_id="p", endpoint="http://localhost"))
            print([name for name in ("httpx", "httpcore") if name in sys.modules])
        """

        assert "[]\n" == run_script(script).stdout


def test_a_reply_of_the_mock_is_closed(connect) -> None:
    """Also an answer that cannot be read to its end is closed."""
    closed: list[bool] = []

    class Body(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"{"
            raise httpx.ReadError("broken")

        def close(self) -> None:
            closed.append(True)

    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(202, stream=Body())

    transport = connect("http://localhost", httpx.MockTransport(respond))
    answer = transport.send(SMALL, 5)

    assert (Verdict.RETRY, "ReadError broken") == (answer.verdict, answer.reason)
    assert [True] == closed
