"""
Hold the harness to the vectors and to what its faults promise.

The clients here are plain sockets and `http.client`, so that a mistake of the harness
cannot be made up for by the package under test.
"""

from __future__ import annotations

import errno
import gzip
import http.client
import json
import os
import select
import socket
import ssl
import struct
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import trustme

from harness import (
    VERSIONS,
    ChildError,
    Counting,
    Exchange,
    ProductGraph,
    Reply,
    Server,
    Wire,
    body_of,
    cut,
    drip,
    drop,
    endless,
    endless_header,
    garbage,
    hang,
    hang_up,
    ignore,
    in_fork,
    interim,
    leave,
    load_vectors,
    poison,
    redirect,
    reject,
    reset,
    run_script,
    sip,
    start_together,
    status,
)
from harness import server as server_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

EVENT: dict[str, Any] = {
    "event_id": "evt-1",
    "project_id": "shop-web",
    "product_id": "shop-web",
    "session.id": "sess-1",
    "event.type": "custom",
    "event.timestamp": "2026-03-02T08:15:00Z",
}
ACCEPTED = b'{"accepted":1,"rejected":0}\n'
REFUSED = b"invalid request body\n"
CLOSED = {"status": None, "connection": "closed without a response"}

# For every wait that can only end by a mistake.
PATIENCE = 10

REQUESTS = load_vectors("requests")["cases"]
VALID = load_vectors("events_valid")["cases"]
INVALID = load_vectors("events_invalid")["cases"]


def batch(*events: Any) -> bytes:
    """
    Return a body of these events.
    """
    return json.dumps({"events": events}).encode()


def event(**changes: Any) -> dict[str, Any]:
    """
    Return a valid event with some members changed.
    """
    return {**EVENT, **changes}


def batch_with(member: str) -> bytes:
    """
    Return a batch of one event with another member, both as JSON text.
    """
    return f'{{"events": [{json.dumps(EVENT)[:-1]}, {member}}}]}}'.encode()


def respond(core: ProductGraph, body: bytes, **headers: str) -> Reply | None:
    """
    Return the core's answer to a posted body.
    """
    return core.respond("POST", "/v1/events", headers, body)


def status_of(core: ProductGraph, body: bytes, **headers: str) -> int | None:
    """
    Return the status of that answer; None for a closed connection.
    """
    reply = respond(core, body, **headers)
    return None if reply is None else reply.status


def facts_of(code: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """
    Describe an answer in the words of the vectors.
    """
    is_json = headers.get("Content-Type") == "application/json"
    return {
        "status": code,
        "content_type": headers.get("Content-Type"),
        "allow": headers.get("Allow"),
        "body": body.decode(),
        "json": json.loads(body) if is_json else None,
    }


def by_name(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """
    Run a test with each case of a vector file.
    """
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


every_version = pytest.mark.parametrize("version", VERSIONS)


class Client:
    """
    Post over one connection, reopened when the server has closed it.
    """

    def __init__(self, server: Server, timeout: float = PATIENCE) -> None:
        self._connection = http.client.HTTPConnection(*server.address, timeout=timeout)

    def close(self) -> None:
        """
        Close the connection.
        """
        self._connection.close()

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        """
        Return status, headers and body of the answer.
        """
        self._connection.request(method, path, body, headers)
        with self._connection.getresponse() as response:
            return response.status, dict(response.headers), response.read()

    def send(self, *events: Any) -> None:
        """
        Post a batch without waiting for the answer.
        """
        self._connection.request("POST", "/v1/events", batch(*events))

    def receive(self) -> tuple[int, bytes]:
        """
        Return status and body of the answer.
        """
        with self._connection.getresponse() as response:
            return response.status, response.read()

    def post(self, *events: Any) -> tuple[int, bytes]:
        """
        Post a batch, and return status and body of the answer.
        """
        self.send(*events)
        return self.receive()


class Watched(list[Any]):
    """
    Be a list that tells each time its length is asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)

    def __len__(self) -> int:
        self.asked.release()
        return super().__len__()


def converse(server: Server, sent: bytes) -> bytes:
    """
    Return everything the server sends until it closes the connection.
    """
    with socket.create_connection(server.address, timeout=PATIENCE) as connection:
        connection.sendall(sent)
        with connection.makefile("rb") as reader:
            return reader.read()


def raw_request(body: bytes, *headers: str) -> bytes:
    """
    Return a posted body as it goes over the wire, with some header lines.
    """
    lines = ["POST /v1/events HTTP/1.1", f"Content-Length: {len(body)}", *headers, ""]
    return "".join(f"{line}\r\n" for line in lines).encode() + body


def end_threads_since(before: set[threading.Thread]) -> None:
    """
    Wait for the threads that a failure has left behind on purpose.
    """
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture(name="server")
def _server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(name="client")
def _client(server: Server) -> Iterator[Client]:
    with closing(Client(server)) as client:
        yield client


@pytest.fixture(name="core")
def _core() -> ProductGraph:
    return ProductGraph()


class TestVectors:
    """
    The harness agrees with every vector.
    """

    @every_version
    @by_name(REQUESTS)
    def test_requests(self, case: dict[str, Any], version: str) -> None:
        """
        Each request of the vectors gets the answer in its `productgraph` column.
        """
        core = ProductGraph(version)
        core.storage_down = case.get("precondition") == "publisher fails"

        reply = core.respond(
            case["method"], case["path"], case["headers"], body_of(case)
        )

        facts = CLOSED
        if reply is not None:
            facts = facts_of(reply.status, reply.headers, reply.body)
        expected = case["productgraph"]
        assert expected == {name: facts[name] for name in expected}

    @by_name(REQUESTS)
    def test_requests_over_a_socket(
        self, case: dict[str, Any], server: Server, client: Client
    ) -> None:
        """
        The server sends what the core answers, or closes the connection if it must.
        """
        server.core.storage_down = case.get("precondition") == "publisher fails"

        try:
            facts = facts_of(
                *client.request(
                    case["method"], case["path"], body_of(case), **case["headers"]
                )
            )
        except http.client.RemoteDisconnected:
            facts = CLOSED

        expected = case["productgraph"]
        assert expected == {name: facts[name] for name in expected}

    @every_version
    @by_name(VALID)
    def test_valid_events(self, case: dict[str, Any], version: str) -> None:
        """
        A valid event is stored as sent by the versions that accept it, and no other.
        """
        core = ProductGraph(version)
        is_accepted = version in case["accepted_by"]

        reply = respond(core, batch(case["event"]))

        assert reply is not None
        assert (202, is_accepted) == (reply.status, reply.body == ACCEPTED)
        assert ([case["event"]] if is_accepted else []) == core.events

    @every_version
    @by_name(INVALID)
    def test_invalid_events(self, case: dict[str, Any], version: str) -> None:
        """
        An invalid event is rejected within a 202, in the words of the version.
        """
        core = ProductGraph(version)

        reply = respond(core, batch(EVENT, case["event"]))

        assert reply is not None
        assert 202 == reply.status
        assert {
            "accepted": 1,
            "rejected": 1,
            "errors": [{"index": 1, "error": case["error"][version]}],
        } == json.loads(reply.body)
        assert [EVENT] == core.events

    def test_partial_exchange(self, server: Server, client: Client) -> None:
        """
        A partly rejected batch is answered and stored as in the vector.
        """
        vector = load_vectors("exchange_partial")
        sent = vector["request"]["json"]["events"]

        answer, body = client.post(*sent)

        assert vector["response"]["status"] == answer
        assert vector["response"]["json"] == json.loads(body)
        delivered = vector["client_must"]["delivered_indexes"]
        assert [sent[i] for i in delivered] == server.events


class TestProductGraph:
    """
    The core answers as Go's decoder and the documented limits make it.
    """

    def test_unknown_version(self) -> None:
        """
        A version that was never published is refused, and the others are named.
        """
        with pytest.raises(ValueError, match=r"one of v0\.1\.0, .* \(got 'v9'\)"):
            ProductGraph("v9")

    @pytest.mark.parametrize(
        ("method", "path", "expected"),
        [
            ("GET", "/health", (200, b'{"status":"ok"}\n')),
            ("GET", "/ready?verbose=1", (200, b'{"status":"ready"}\n')),
            ("POST", "/health", (405, b"Method Not Allowed\n")),
            ("PUT", "/v1/events", (405, b"Method Not Allowed\n")),
            ("GET", "/", (404, b"404 page not found\n")),
            ("POST", "/v1/events/", (404, b"404 page not found\n")),
        ],
    )
    def test_routes(
        self, core: ProductGraph, method: str, path: str, expected: tuple[int, bytes]
    ) -> None:
        """
        Probes answer to GET, events to POST, and nothing else is there.
        """
        reply = core.respond(method, path, {}, b"")

        assert reply is not None
        assert expected == (reply.status, reply.body)

    @by_name([case for case in VALID if case["form"] == "full"])
    def test_types_of_members(self, core: ProductGraph, case: dict[str, Any]) -> None:
        """
        A list costs the batch wherever a known member has it.
        """
        sent = case["event"]

        assert {400} == {
            status_of(core, batch({**sent, key: []}))
            for key in sent.keys() - {"project_id"}
        }

    def test_a_thousand_events(self, core: ProductGraph) -> None:
        """
        A thousand events are a batch; one of a wrong type among too many counts first.
        """
        many = [event(event_id=f"evt-{i}") for i in range(1000)]

        assert 202 == status_of(core, batch(*many))
        assert many == core.events
        assert 400 == status_of(core, batch(*many, {}))
        reply = respond(core, batch(*many, event(metadata=[])))
        assert reply is not None
        assert REFUSED == reply.body

    @pytest.mark.parametrize(
        ("member", "expected"),
        [
            ('"api.duration_ms": 9223372036854775807', 202),
            ('"api.duration_ms": 9223372036854775808', 400),
            ('"event.sequence": -9223372036854775808', 202),
            ('"event.sequence": -9223372036854775809', 400),
            ('"event.sequence": -0', 202),
            ('"event.sequence": 1e3', 400),
            ('"event.sequence": true', 400),
            ('"event.sequence": null', 202),
            ('"performance.cls": 1', 202),
            ('"performance.cls": 1e3', 202),
            ('"performance.cls": 1e400', 400),
            ('"performance.cls": false', 400),
            ('"performance.cls": "0.1"', 400),
            ('"performance.cls": Infinity', 400),
            ('"performance.cls": .5', 400),
            ('"performance.cls": 01', 400),
            ('"user.id": 7', 400),
            ('"USER.ID": 7', 400),
            ('"user.id": 7, "user.id": "u"', 400),
            ('"\u017fession.id": 7', 400),
            ('"se\u00dfion.id": 7', 202),
            ('"org.name": 7', 202),
            ('"user.anonymous_id": [1e3]', 202),
            ('"metadata": {"a": [1, null, {"b": 1.5}]}', 202),
            ('"metadata": null', 202),
            ('"metadata": "{}"', 400),
            ('"metadata": {"a": NaN}', 400),
            ('"metadata": {"a": -Infinity}', 400),
            ('"metadata": {"a": 1,}', 400),
            ('"metadata": {"a" 1}', 400),
            ('"page.title": "a\nb"', 400),
            ("\"page.title\": 'a'", 400),
            ('"page.title": "\\x"', 400),
            ('"page.title": "\ufeff"', 202),
        ],
    )
    def test_members(self, core: ProductGraph, member: str, expected: int) -> None:
        """
        A member passes or costs the batch, as it would with Go's decoder.
        """
        assert expected == status_of(core, batch_with(member))

    @pytest.mark.parametrize(
        "member",
        ['"event.sequence": 1' + "0" * 5000, '"metadata": ' + '{"a":' * 50_000],
        ids=["digits", "depth"],
    )
    def test_extremes(self, core: ProductGraph, member: str) -> None:
        """
        What Python's parser cannot cope with costs the batch.
        """
        assert 400 == status_of(core, batch_with(member))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (' \t\r\n{ "events" : [ ] } ', 202),
            ('{"EVENTS": 5}', 400),
            ('{"EventS": [{}]}', 202),
            ('{"events": [5], "events": []}', 202),
            ('{"events": [5], "events": null}', 202),
            ('{"more": [null], "events": []}', 202),
            ('{"events": {}}', 400),
            ('{"events": ""}', 400),
            ('{"events": []', 400),
            ('{"events": [],}', 400),
            ('{"events": [,]}', 400),
            ('{"events": [{},]}', 400),
            ('{"events": [{} {}]}', 400),
            ('{"events" []}', 400),
            ("{5: []}", 400),
            ('{"events": []} }', 202),
            ("null null", 202),
            ("true", 400),
            ("5", 400),
            ('"events"', 400),
            ("  ", 400),
            ('{"events": [{}, null]}', None),
            ('{"events": [null, 5]}', None),
            ('{"events": [5, null]}', 400),
            ('{"events": [null}', 400),
        ],
    )
    def test_bodies(self, core: ProductGraph, text: str, expected: int | None) -> None:
        """
        A body passes, is refused or closes the connection, whichever comes first.
        """
        assert expected == status_of(core, text.encode())

    def test_keys_in_any_case(self, core: ProductGraph) -> None:
        """
        Keys match in any case, the last one wins, and null leaves what there was.
        """
        text = (
            '{"EVENT_ID": "", "event_id": "evt-1", "Event_Id": null,'
            ' "Product_ID": "p", "\u017fE\u017f\u017fION.id": "s",'
            ' "event.type": "", "EVENT.TYPE": "custom"}'
        )

        reply = respond(core, f'{{"events": [{text}]}}'.encode())

        assert reply is not None
        assert ACCEPTED == reply.body

    def test_duplicate_required_key(self, core: ProductGraph) -> None:
        """
        A required member is missing when its last duplicate is empty.
        """
        reply = respond(core, batch_with('"SESSION.ID": ""'))

        assert reply is not None
        assert b"session.id: required" in reply.body

    @pytest.mark.parametrize(
        ("version", "unknown", "known"),
        [
            ("v0.1.0", "product_id", "project_id"),
            ("v0.2.0", "product_id", "project_id"),
            ("v0.3.0", "project_id", "product_id"),
        ],
    )
    def test_the_other_id(self, version: str, unknown: str, known: str) -> None:
        """
        The id that a version does not know may be of any type.
        """
        core = ProductGraph(version)

        assert 202 == status_of(core, batch(event(**{unknown: 5})))
        assert 400 == status_of(core, batch(event(**{known: 5})))

    @pytest.mark.parametrize(
        "timestamp",
        [
            "2026-03-02T08:15:00Z",
            "2026-03-02T08:15:00.1Z",
            "2026-03-02T08:15:00.1234567890123Z",
            "2026-03-02T08:15:00,5-23:59",
            "2024-02-29T23:59:59+00:00",
            "",
            None,
        ],
    )
    def test_good_timestamps(self, core: ProductGraph, timestamp: str | None) -> None:
        """
        RFC 3339 with any fraction passes, and so does none at all.
        """
        assert 202 == status_of(core, batch(event(**{"event.timestamp": timestamp})))

    @pytest.mark.parametrize(
        "timestamp",
        [
            "2026-03-02T08:15:00",
            "2026-03-02T08:15:00.123456",
            "2026-03-02 08:15:00Z",
            "2026-03-02t08:15:00Z",
            "2026-03-02T08:15:00z",
            "2026-03-02T08:15:00+0000",
            "2026-03-02T08:15:00+00",
            "2026-03-02T08:15:00+24:00",
            "2026-03-02T08:15:00+00:60",
            "2026-03-02T08:15:60Z",
            "2026-03-02T08:60:00Z",
            "2026-03-02T24:00:00Z",
            "2026-02-29T08:15:00Z",
            "2026-13-01T08:15:00Z",
            "2026-03-02T08:15:00.Z",
            "2026-03-02T08:15Z",
            "2026-3-2T08:15:00Z",
            "2026-03-02T08:15:00Z\n",
            " 2026-03-02T08:15:00Z",
            "\u0662026-03-02T08:15:00Z",
            "now",
            1772439300000,
        ],
    )
    def test_bad_timestamps(self, core: ProductGraph, timestamp: object) -> None:
        """
        Any other form of time costs the batch.
        """
        assert 400 == status_of(core, batch(event(**{"event.timestamp": timestamp})))

    @pytest.mark.parametrize(
        ("text", "stored"),
        [
            (rb'"\ud800"', "\ufffd"),
            (rb'"a\udfffb"', "a\ufffdb"),
            (rb'"\udc00\ud800"', "\ufffd\ufffd"),
            (rb'"\u0000"', "\0"),
            (b'"\xff"', "\ufffd"),
            (b'"\xed\xa0\x80"', "\ufffd\ufffd\ufffd"),
            (rb'[["\ud800"]]', [["\ufffd"]]),
            (rb'{"\ud800": "\ud800"}', {"\ufffd": "\ufffd"}),
        ],
    )
    @pytest.mark.parametrize("key", ["metadata", "unknown"])
    def test_strict_utf8(self, key: str, text: bytes, stored: object) -> None:
        """
        Text that cannot be stored is refused anywhere, or replaced if not strict.
        """
        body = batch_with(f'"{key}": {{"deep": VALUE}}').replace(b"VALUE", text)
        strict, lax = ProductGraph(), ProductGraph(strict_utf8=False)

        assert 400 == status_of(strict, body)
        assert 202 == status_of(lax, body)
        assert [event(**{key: {"deep": stored}})] == lax.events

    @pytest.mark.parametrize(
        "body",
        [
            rb'{"events": [], "x": "\ud800"}',
            rb'{"events": [], "x": ["\u0000"]}',
            rb'{"events": [], "\udfff": 1}',
            b'{"events": []} \xff',
        ],
    )
    def test_strict_utf8_around_the_events(self, body: bytes) -> None:
        """
        Text that cannot be stored is refused outside of the events, too.
        """
        assert 400 == status_of(ProductGraph(), body)
        assert 202 == status_of(ProductGraph(strict_utf8=False), body)

    def test_surrogate_pairs(self, core: ProductGraph) -> None:
        """
        Characters beyond the basic plane pass, escaped or not.
        """
        sent = event(metadata={"emoji": "\U0001f600"})

        assert 202 == status_of(core, batch(sent))
        assert 202 == status_of(
            core, json.dumps({"events": [sent]}, ensure_ascii=False).encode()
        )
        assert [sent, sent] == core.events

    def test_gzip(self) -> None:
        """
        A server that inflates takes gzip bodies and plain ones, but nothing damaged.
        """
        core = ProductGraph(gzip=True)
        packed = gzip.compress(batch(EVENT))
        encoding = {"CONTENT-encoding": "gzip"}

        assert 202 == status_of(core, packed, **encoding)
        assert 202 == status_of(core, batch(EVENT))
        assert 400 == status_of(core, packed)
        assert 400 == status_of(core, packed[:-1], **encoding)
        assert 400 == status_of(core, batch(EVENT), **encoding)
        assert [EVENT, EVENT] == core.events

    def test_max_body(self) -> None:
        """
        A body is too large by its bytes on the wire or by what it inflates to.
        """
        body = batch(EVENT)
        bomb = gzip.compress(b" " * len(body) + body)
        encoding = {"Content-Encoding": "gzip"}

        assert 202 == status_of(ProductGraph(max_body=len(body)), body)
        assert 413 == status_of(ProductGraph(max_body=len(body) - 1), body)
        core = ProductGraph(gzip=True, max_body=len(bomb))
        assert 413 == status_of(core, bomb, **encoding)
        assert [] == core.events

    @pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f600"])
    @pytest.mark.parametrize("ensure_ascii", [True, False])
    def test_limit_event(self, letter: str, ensure_ascii: bool) -> None:
        """
        An event is measured in bytes as they are on the wire, escapes included.
        """
        text = json.dumps(event(metadata={"a": letter}), ensure_ascii=ensure_ascii)
        size = len(text.encode())
        body = f'{{"events": [ {json.dumps(EVENT)} , {text} ]}}'.encode()

        assert 202 == status_of(ProductGraph(limit_event=size), body)
        assert 400 == status_of(ProductGraph(limit_event=size - 1), body)

    def test_default_limit_event(self) -> None:
        """
        The default limit is the documented 100 KB; None switches it off.
        """
        body = batch(event(metadata={"a": "x" * 100 * 1024}))

        reply = respond(ProductGraph(), body)
        assert reply is not None
        assert (400, b"event too large\n") == (reply.status, reply.body)
        assert 202 == status_of(ProductGraph(limit_event=None), body)

    def test_storage_down(self, core: ProductGraph) -> None:
        """
        Without storage nothing is kept, but what need not be stored is answered.
        """
        core.storage_down = True

        assert 500 == status_of(core, batch(EVENT))
        assert 202 == status_of(core, batch({}))
        assert 400 == status_of(core, b"")
        assert [] == core.events

    def test_requests_are_kept(self, core: ProductGraph) -> None:
        """
        Every request is kept with its events as decoded, whatever the answer.
        """
        core.respond("POST", "/v1/events", {"X-PG-API-Key": "k"}, batch(EVENT, {}))
        core.respond("POST", "/v1/events", {}, batch(event(metadata=[])))
        core.respond("POST", "/v1/events", {}, batch(EVENT, None))
        core.respond("GET", "/health", {}, b"")

        assert [
            ("POST", "/v1/events", {"x-pg-api-key": "k"}, [EVENT, {}]),
            ("POST", "/v1/events", {}, [event(metadata=[])]),
            ("POST", "/v1/events", {}, None),
            ("GET", "/health", {}, None),
        ] == [(r.method, r.path, r.headers, r.events) for r in core.requests]
        assert batch(EVENT, {}) == core.requests[0].body


class TestServer:
    """
    The server speaks HTTP, keeps what it gets, and ends cleanly.
    """

    def test_url(self, server: Server) -> None:
        """
        The URL leads to the events on loopback.
        """
        host, port = server.address

        assert f"http://127.0.0.1:{port}/v1/events" == server.url
        assert "127.0.0.1" == host

    def test_keep_alive(self, server: Server, client: Client) -> None:
        """
        Requests share a connection, refused ones included.
        """
        answers = [client.post(EVENT), client.post(5), client.post(event(event_id="2"))]

        assert [(202, ACCEPTED), (400, REFUSED), (202, ACCEPTED)] == answers
        assert [EVENT, event(event_id="2")] == server.events
        assert 1 == server.connections
        assert 3 == len(server.requests)

    @pytest.mark.parametrize(
        "sent",
        [
            raw_request(batch(EVENT), "Connection: close"),
            raw_request(batch(EVENT)).replace(b"HTTP/1.1", b"HTTP/1.0"),
        ],
        ids=["asked", "HTTP/1.0"],
    )
    def test_connection_close(self, server: Server, sent: bytes) -> None:
        """
        The connection ends after the answer when the client says so.
        """
        answer = converse(server, sent)

        assert answer.startswith(b"HTTP/1.1 202 Accepted\r\n")
        assert answer.endswith(b"\r\n\r\n" + ACCEPTED)

    def test_connection_close_by_the_answer(self, server: Server) -> None:
        """
        The connection ends after an answer that says so.
        """
        server.script = [status(503, {"Connection": "close"}, b"later")]

        assert (
            b"HTTP/1.1 503 Service Unavailable\r\n"
            b"Connection: close\r\nContent-Length: 5\r\n\r\nlater"
        ) == converse(server, raw_request(b""))

    def test_chunked_body(self, server: Server) -> None:
        """
        A body may come in chunks, with extensions and trailers.
        """
        body = batch(EVENT)
        head = (
            b"POST /v1/events HTTP/1.1\r\nConnection: close\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunks = b"5;x=y\r\n%b\r\n%x\r\n%b\r\n0\r\nTrailer: 1\r\n\r\n"

        converse(server, head + chunks % (body[:5], len(body) - 5, body[5:]))

        assert [EVENT] == server.events

    def test_repeated_headers(self, server: Server) -> None:
        """
        Headers of one name are joined by commas, in order.
        """
        converse(server, raw_request(b"", "Connection: close", "X-A: 1", "x-a: 2"))

        assert "1, 2" == server.requests[0].headers["x-a"]

    def test_head(self, server: Server) -> None:
        """
        An answer to HEAD has the headers of the one to GET, and no body.
        """
        assert (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Content-Length: 16\r\n\r\n"
        ) == converse(server, b"HEAD /health HTTP/1.1\r\nConnection: close\r\n\r\n")

    def test_unfinished_body(self, server: Server) -> None:
        """
        A request that breaks off in its body is neither kept nor answered.
        """
        sent = raw_request(batch(EVENT))[:-1]
        with socket.create_connection(server.address, PATIENCE) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)

            assert b"" == connection.recv(1)

        assert [] == server.requests

    def test_too_many_chunks(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        A body in chunks is limited as a whole, not only chunk by chunk.
        """
        monkeypatch.setattr("harness.server._MAX_BODY", 10)
        head = b"POST /v1/events HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"

        answer = converse(server, head + b"6\r\n123456\r\n5\r\n")

        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")

    @pytest.mark.parametrize(
        "sent",
        [
            b"nonsense\r\n\r\n",
            b"\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
            b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
            b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
            b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        ],
    )
    def test_no_http(self, server: Server, sent: bytes) -> None:
        """
        What is no HTTP gets a 400 and is not kept.
        """
        answer = converse(server, sent)

        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert [] == server.requests

    def test_waiting(self, server: Server, client: Client) -> None:
        """
        One can wait for events and for requests, and learns whether they came.
        """
        assert not server.wait_for(1, timeout=0)
        assert not server.wait_for_requests(1, timeout=0)
        client.post(EVENT, {})
        client.post({})

        assert server.wait_for(1)
        assert not server.wait_for(2, timeout=0)
        assert server.wait_for_requests(2)
        assert not server.wait_for_requests(3, timeout=0)

    def test_wait_for_wakes(self, server: Server, client: Client) -> None:
        """
        Who waits for events is woken when they are stored, not by the timeout.
        """
        until = threading.Event()
        server.script = [hang(until)]
        server.core.events = events = Watched()

        def wait_or_post(i: int) -> None:
            if i == 0:
                assert server.wait_for(1, timeout=2 * PATIENCE)
            else:
                assert events.asked.acquire(timeout=PATIENCE)
                client.send(EVENT)
                # The request has come, which wakes in vain: nothing is stored yet.
                assert events.asked.acquire(timeout=PATIENCE)
                until.set()

        start_together(2, wait_or_post, timeout=PATIENCE)

    def test_wait_for_requests_wakes(self, server: Server, client: Client) -> None:
        """
        Who waits for requests is woken when they have come, before any answer.
        """
        until = threading.Event()
        server.script = [hang(until)]
        server.core.requests = requests = Watched()

        def wait_or_post(i: int) -> None:
            if i == 0:
                assert server.wait_for_requests(1, timeout=2 * PATIENCE)
                until.set()
            else:
                assert requests.asked.acquire(timeout=PATIENCE)
                client.post(EVENT)

        start_together(2, wait_or_post, timeout=PATIENCE)

    def test_snapshots(self, server: Server, client: Client) -> None:
        """
        Events and requests are copies, which do not change while one looks at them.
        """
        events, requests = server.events, server.requests

        client.post(EVENT)

        assert ([], []) == (events, requests)

    def test_script(self, server: Server, client: Client) -> None:
        """
        Steps are consumed one per request, None is the real answer, then the default.
        """
        server.script = [status(503), None, status(429)]
        server.default = status(500)

        answers = [client.post(EVENT)[0] for _ in range(5)]

        assert [503, 202, 429, 500, 500] == answers
        assert [] == server.script
        assert [EVENT] == server.events
        assert 5 == len(server.requests)

    def test_functions_as_steps(self, server: Server, client: Client) -> None:
        """
        A function decides by the request, and can ask for the real answer.
        """

        def step(request: Exchange) -> Reply:
            real = request.answer()
            assert real is not None
            return Reply(299, {"X-Real": str(real.status)}, request.body[:9])

        server.script = [step]

        answer, headers, body = client.request("POST", "/v1/events", batch(EVENT))

        assert (299, "202", b'{"events"') == (answer, headers["X-Real"], body)
        assert [EVENT] == server.events

    @pytest.mark.parametrize("error", [AssertionError("no"), OSError("no")])
    def test_failing_step(self, error: Exception) -> None:
        """
        A step that raises closes its connection, and `close` tells of it.
        """

        def step(request: Exchange) -> NoReturn:
            raise error

        server = Server()
        server.script = [step]
        with closing(Client(server)) as client:
            with pytest.raises(http.client.RemoteDisconnected):
                client.post(EVENT)
            assert (202, ACCEPTED) == client.post(EVENT)

        with pytest.raises((AssertionError, RuntimeError)) as caught:
            server.close()
        assert error in (caught.value, caught.value.__cause__)
        server.close()

    def test_stuck_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Closing gives up on a step that does not return, and says so.
        """
        monkeypatch.setattr("harness.server._CLOSE_TIMEOUT", 0.05)
        before = set(threading.enumerate())
        release = threading.Event()

        def step(request: Exchange) -> None:
            release.wait(PATIENCE)

        server = Server()
        server.script = [step]
        with socket.create_connection(server.address, timeout=PATIENCE) as connection:
            connection.sendall(raw_request(b""))
            assert server.wait_for_requests(1)

            with pytest.raises(RuntimeError, match=r"threads .* not end in 0\.05 s"):
                server.close()

        release.set()
        end_threads_since(before)

    def test_close(self, capfd: pytest.CaptureFixture[str]) -> None:
        """
        Closing ends idle connections, refuses new ones, and leaves no thread behind.
        """
        before = set(threading.enumerate())
        server = Server()
        with closing(Client(server)) as client:
            client.post(EVENT)
            server.close()
            server.close()

            with pytest.raises(ConnectionError):
                client.post(EVENT)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(server.address, timeout=PATIENCE)

        assert not set(threading.enumerate()) - before
        assert ("", "") == capfd.readouterr()

    def test_failing_accept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A connection that cannot be accepted leaves the server to the next one.
        """
        reserve = server_module._reserve
        errors = [ConnectionAbortedError(), OSError(errno.EMFILE, "no more")]

        class Listener(socket.socket):
            def accept(self) -> tuple[socket.socket, Any]:
                if errors:
                    raise errors.pop()
                return super().accept()

        monkeypatch.setattr(
            server_module,
            "_reserve",
            lambda address: Listener(fileno=reserve(address).detach()),
        )

        with Server() as server, closing(Client(server)) as client:
            assert (202, ACCEPTED) == client.post(EVENT)
            assert [] == errors

    def test_many_connections(self, capfd: pytest.CaptureFixture[str]) -> None:
        """
        Hundreds of clients at once are each answered, and each event is stored once.
        """
        before = set(threading.enumerate())
        n = 300

        def post(i: int) -> tuple[int, bytes]:
            with closing(Client(server)) as client:
                client.post(event(event_id=f"a{i}"))
                return client.post(event(event_id=f"b{i}"))

        with Server() as server:
            answers = start_together(n, post)

            assert [(202, ACCEPTED)] * n == answers
            assert n == server.connections
            assert {f"{kind}{i}" for kind in "ab" for i in range(n)} == {
                stored["event_id"] for stored in server.events
            }
            assert 2 * n == len(server.events) == len(server.requests)

        assert not set(threading.enumerate()) - before
        assert ("", "") == capfd.readouterr()

    def test_clients_that_leave(self, capfd: pytest.CaptureFixture[str]) -> None:
        """
        Clients that leave at any point are nobody's error, reset or not.
        """
        request = raw_request(batch(EVENT))
        linger = struct.pack("ii", 1, 0)  # On, for no time: close() sends a reset.

        def leave(i: int) -> None:
            with socket.create_connection(server.address, PATIENCE) as connection:
                if i % 2:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.sendall(request[: i * 3])

        with Server() as server:
            server.default = endless()
            start_together(len(request) // 3 + 2, leave)

            assert server.wait_for_requests(1)
            server.default = None
            with closing(Client(server)) as client:
                assert (202, ACCEPTED) == client.post(EVENT)

        assert ("", "") == capfd.readouterr()

    def test_no_warnings(self) -> None:
        """
        Neither a socket nor a thread is left to the garbage collector.
        """
        source = """
            import gc, socket, sys
            sys.path.insert(0, sys.argv[1])
            from harness import Server, drop, endless

            with Server() as server:
                server.script = [drop(), endless()]
                for _ in range(3):
                    with socket.create_connection(server.address, timeout=10) as client:
                        client.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
                        client.recv(5)
            del server
            gc.collect()
        """
        tests = str(Path(__file__).parent)

        done = run_script(source, tests, env={"PYTHONWARNINGS": "always"})

        assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


class TestDoor:
    """
    A server's port refuses, is jammed, or leads to it, and stays the same.
    """

    def test_not_open(self) -> None:
        """
        A server that is not open refuses, until it is.
        """
        with Server(is_open=False) as server, closing(Client(server)) as client:
            with pytest.raises(ConnectionRefusedError):
                client.post(EVENT)
            client.close()
            server.open()

            assert (202, ACCEPTED) == client.post(EVENT)
            server.open()
            assert (202, ACCEPTED) == client.post(EVENT)

        assert 2 == len(server.events)

    def test_shut(self, server: Server, client: Client) -> None:
        """
        Shutting ends connections and refuses; what was stored is still there.
        """
        for _ in range(3):
            assert (202, ACCEPTED) == client.post(EVENT)
            server.shut()
            with pytest.raises(ConnectionError):
                client.post(EVENT)
            client.close()
            with pytest.raises(ConnectionRefusedError):
                client.post(EVENT)
            client.close()
            server.open()

        assert [EVENT] * 3 == server.events

    def test_close_while_shut(self) -> None:
        """
        A server that is not open closes as any, and twice.
        """
        server = Server(is_open=False)
        server.close()
        server.close()

        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.address, timeout=PATIENCE)

    def test_jam(self) -> None:
        """
        Nobody gets through a full backlog; once it is open, whoever waits does.
        """
        with Server(is_open=False) as server, socket.socket() as waiting:
            server.jam()
            waiting.settimeout(0.1)
            with pytest.raises(TimeoutError):
                waiting.connect(server.address)
            waiting.setblocking(False)
            waiting.connect_ex(server.address)
            assert ([], [], []) == select.select([], [waiting], [], 0.1)
            server.open()
            waiting.settimeout(PATIENCE)

            with closing(Client(server)) as client:
                assert (202, ACCEPTED) == client.post(EVENT)
            waiting.connect_ex(server.address)
            waiting.sendall(raw_request(batch(EVENT), "Connection: close"))
            assert waiting.recv(100).startswith(b"HTTP/1.1 202")

    def test_close_while_jammed(self) -> None:
        """
        A server that is jammed closes as any.
        """
        with Server(is_open=False) as server:
            server.jam()


class TestTls:
    """
    A server speaks TLS if it has a context.
    """

    @staticmethod
    def post(server: Server, authority: trustme.CA) -> bytes:
        """
        Return what a client gets that trusts an authority.
        """
        context = ssl.create_default_context()
        authority.configure_trust(context)
        connection = socket.create_connection(server.address, PATIENCE)
        with context.wrap_socket(connection, server_hostname="127.0.0.1") as secured:
            secured.sendall(raw_request(batch(EVENT), "Connection: close"))
            with secured.makefile("rb") as reader:
                return reader.read()

    def test_tls(self) -> None:
        """
        Who trusts its authority is served, and who does not leaves.
        """
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        with Server(tls=context) as server:
            assert server.url.startswith("https://127.0.0.1:")
            with pytest.raises(ssl.SSLCertVerificationError):
                self.post(server, trustme.CA())

            assert self.post(server, authority).endswith(ACCEPTED)
            assert self.post(server, authority).endswith(ACCEPTED)

        assert [EVENT] * 2 == server.events

    def test_no_tls(self) -> None:
        """
        Who speaks plainly to it is nobody's error, and closing ends who hangs.
        """
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        with (
            Server(tls=context) as server,
            socket.create_connection(server.address, PATIENCE) as silent,
        ):
            converse(server, raw_request(batch(EVENT)))
            assert [] == server.requests
            server.close()

            assert b"" == silent.recv(1)


class TestFaults:
    """
    Each fault fails the client in its own way, and in no other.
    """

    def test_status(self, server: Server, client: Client) -> None:
        """
        Any status, headers and body can be sent, and nothing is stored.
        """
        server.script = [status(429, {"Retry-After": "7"}, b"slow down"), status(599)]

        answer, headers, body = client.request("POST", "/v1/events", batch(EVENT))

        assert (429, "7", b"slow down") == (answer, headers["Retry-After"], body)
        assert (599, b"") == client.post(EVENT)
        assert [] == server.events

    def test_status_without_a_body(self, server: Server, client: Client) -> None:
        """
        A 204 has no Content-Length, and the connection stays in step.
        """
        server.script = [status(204)]

        answer, headers, _ = client.request("POST", "/v1/events", b"")

        assert (204, False) == (answer, "Content-Length" in headers)
        assert (202, ACCEPTED) == client.post(EVENT)

    def test_status_then_store(self, server: Server, client: Client) -> None:
        """
        A failure may be told although the events were stored.
        """
        server.script = [status(500, then_store=True)]

        assert (500, b"") == client.post(EVENT)
        assert [EVENT] == server.events

    def test_hang(self, server: Server) -> None:
        """
        A hanging request holds up no other, and is answered once the event is set.
        """
        until = threading.Event()
        server.script = [hang(until)]
        with closing(Client(server)) as slow, closing(Client(server)) as quick:
            slow.send(EVENT)
            assert server.wait_for_requests(1)

            assert (202, ACCEPTED) == quick.post(event(event_id="quick"))
            assert [event(event_id="quick")] == server.events
            until.set()

            assert (202, ACCEPTED) == slow.receive()

    def test_hang_outlasts_the_client(self, server: Server) -> None:
        """
        Who gives up on a hanging request may have been stored all the same.
        """
        until = threading.Event()
        server.script = [hang(until)]
        with closing(Client(server, 0.05)) as client, pytest.raises(TimeoutError):
            client.post(EVENT)
        assert [] == server.events

        until.set()

        assert server.wait_for(1)

    def test_close_ends_hang(self) -> None:
        """
        Closing the server does not wait for the event.
        """
        with Server() as server:
            server.script = [hang(threading.Event())]
            with socket.create_connection(server.address, PATIENCE) as connection:
                connection.sendall(raw_request(b""))
                assert server.wait_for_requests(1)
                server.close()

                assert b"" == connection.recv(1)

    def test_drop(self, server: Server, client: Client) -> None:
        """
        The connection ends without an answer; the request was read, and not stored.
        """
        server.script = [drop()]

        with pytest.raises(http.client.RemoteDisconnected):
            client.post(EVENT)

        assert [] == server.events
        assert [EVENT] == server.requests[0].events

    def test_reset(self, server: Server, client: Client) -> None:
        """
        The connection ends by RST; the request was read, and not stored.
        """
        server.script = [reset()]

        with pytest.raises(ConnectionResetError):
            client.post(EVENT)

        assert [] == server.events
        assert [EVENT] == server.requests[0].events

    def test_leave(self, server: Server) -> None:
        """
        The answer is whole and promises to go on, but the connection ends.
        """
        server.script = [leave()]

        answer = converse(server, raw_request(batch(EVENT)))

        assert answer.endswith(ACCEPTED)
        assert b"close" not in answer.lower()
        assert [EVENT] == server.events

    @pytest.mark.parametrize("after", [0, 1, 20, 100])
    def test_cut(self, server: Server, after: int) -> None:
        """
        Only the first bytes of the answer arrive, yet the events are stored.
        """
        whole = converse(server, raw_request(batch(EVENT), "Connection: close"))
        server.script = [cut(after)]

        part = converse(server, raw_request(batch(EVENT)))

        assert whole[:after] == part
        assert len(part) < len(whole)
        assert [EVENT, EVENT] == server.events

    def test_drip_by_time(self, server: Server, client: Client) -> None:
        """
        The answer arrives byte by byte and is whole in the end.
        """
        server.script = [drip(0.0001)]

        assert (202, ACCEPTED) == client.post(EVENT)

    def test_drip_by_event(self, server: Server) -> None:
        """
        All bytes but the first wait for the event.
        """
        more = threading.Event()
        server.script = [drip(more)]
        with socket.create_connection(server.address, PATIENCE) as connection:
            connection.sendall(raw_request(batch(EVENT)))
            assert server.wait_for(1)
            assert b"H" == connection.recv(100)
            connection.settimeout(0.05)
            with pytest.raises(TimeoutError):
                connection.recv(100)

            connection.settimeout(PATIENCE)
            more.set()
            with connection.makefile("rb") as reader:
                answer = reader.read()

        assert answer.startswith(b"TTP/1.1 202 Accepted\r\n")
        assert answer.endswith(ACCEPTED)

    @pytest.mark.parametrize("step", [cut(9), drip(0.0)], ids=["cut", "drip"])
    def test_no_answer_to_maim(self, server: Server, step: Any) -> None:
        """
        Where the real server closes the connection, there is no answer to maim.
        """
        server.script = [step]

        assert b"" == converse(server, raw_request(batch(None)))

    def test_garbage(self, server: Server) -> None:
        """
        The bytes are sent as they are.
        """
        server.script = [garbage(b"\x16\x03\x01 not HTTP\0")]

        assert b"\x16\x03\x01 not HTTP\0" == converse(server, raw_request(batch(EVENT)))
        assert [] == server.events

    def test_endless(self, server: Server) -> None:
        """
        The body of a 202 goes on up to its limit.
        """
        server.script = [endless(limit=100_000)]

        head, _, body = converse(server, raw_request(b"")).partition(b"\r\n\r\n")

        assert head.startswith(b"HTTP/1.1 202 Accepted\r\n")
        assert b" " * 100_000 == body

    def test_endless_is_bounded(self, server: Server) -> None:
        """
        Without a limit of one's own it ends at 64 MB.
        """
        server.script = [endless()]

        with socket.create_connection(server.address, PATIENCE) as connection:
            connection.sendall(raw_request(b""))
            received = 0
            while chunk := connection.recv(1024 * 1024):
                received += len(chunk)

        assert 0 <= received - 64 * 1024 * 1024 < 100

    def test_endless_header(self, server: Server) -> None:
        """
        A header goes on up to its limit, and the answer has no body.
        """
        server.script = [endless_header(limit=100_000)]

        answer = converse(server, raw_request(b""))

        assert answer.startswith(b"HTTP/1.1 202 Accepted\r\nX-Endless: xxx")
        assert 100_000 == answer.count(b"x")
        assert b"\r\n\r\n" not in answer

    def test_interim(self, server: Server) -> None:
        """
        Nothing but answers that are not final come, up to the limit.
        """
        server.script = [interim(limit=28 * 2_500)]

        answer = converse(server, raw_request(b""))

        whole = b"HTTP/1.1 102 Processing\r\n\r\n"
        assert 70_000 == len(answer)
        assert whole * 3_000 == answer + (whole * 3_000)[len(answer) :]

    def test_redirect(self, server: Server, client: Client) -> None:
        """
        The client is sent elsewhere.
        """
        server.script = [redirect("http://127.0.0.1:9/x"), redirect("/y", 302)]

        answer, headers, _ = client.request("POST", "/v1/events", batch(EVENT))

        assert (307, "http://127.0.0.1:9/x") == (answer, headers["Location"])
        assert (302, b"") == client.post(EVENT)
        assert [] == server.events

    def test_poison(self, server: Server, client: Client) -> None:
        """
        A batch is refused as long as the poisonous event is in it.
        """
        bad = event(event_id="bad")
        server.default = poison(lambda sent: sent["event_id"] == "bad")

        assert (400, REFUSED) == client.post(EVENT, bad)
        assert (202, ACCEPTED) == client.post(EVENT)
        assert [EVENT] == server.events

    def test_reject(self, server: Server, client: Client) -> None:
        """
        A batch is taken but for some events, which the answer lists with their places.
        """
        bad = event(event_id="bad")
        server.default = reject(lambda sent: sent["event_id"] == "bad", "wrong")

        code, body = client.post(EVENT, bad, EVENT)

        assert (202, 2, 1) == (
            code,
            json.loads(body)["accepted"],
            json.loads(body)["rejected"],
        )
        assert [{"index": 1, "error": "wrong"}] == json.loads(body)["errors"]
        assert [EVENT, EVENT] == server.events
        assert b"bad" not in body

    def test_reject_of_no_batch(self, server: Server) -> None:
        """
        What is no batch is refused as ever.
        """
        server.script = [reject(lambda _: True)]

        answer = converse(server, raw_request(b"{", "Connection: close"))

        assert answer.endswith(REFUSED)

    def test_ignore(self, server: Server) -> None:
        """
        A connection is read only when the event is set.
        """
        until = threading.Event()
        server.welcome = ignore(until)
        with closing(Client(server)) as client:
            client.send(EVENT)
            assert not server.wait_for_requests(1, 0.05)
            until.set()

            assert (202, ACCEPTED) == client.receive()

    @pytest.mark.parametrize("size", [1, 7])
    def test_sip(self, server: Server, size: int) -> None:
        """
        What comes is read a few bytes at a time, with a wait before each time.
        """
        gaps = []
        server.welcome = sip(0.0001, size)
        waited = server.wait
        server.wait = lambda gap: (gaps.append(gap), waited(gap))
        request = raw_request(batch(EVENT), "Connection: close")

        answer = converse(server, request)

        assert answer.endswith(ACCEPTED)
        assert len(request) // size <= len(gaps)
        assert {0.0001} == set(gaps)

    @pytest.mark.parametrize("is_reset", [False, True])
    def test_hang_up(self, server: Server, client: Client, is_reset: bool) -> None:
        """
        A connection ends as soon as it is there, and nothing is read.
        """
        server.welcome = hang_up(is_reset=is_reset)
        with pytest.raises(ConnectionError):
            client.post(EVENT)

        def come() -> bytes:
            with socket.create_connection(server.address, PATIENCE) as connection:
                return connection.recv(1)

        if is_reset:
            with pytest.raises(ConnectionResetError):
                come()
        else:
            assert b"" == come()
        assert [] == server.requests

    def test_failing_welcome(self) -> None:
        """
        What a welcome raises comes out of `close`.
        """
        server = Server()
        server.welcome = lambda _: 1 / 0
        with socket.create_connection(server.address, PATIENCE) as connection:
            assert b"" == connection.recv(1)

        with pytest.raises(ZeroDivisionError):
            server.close()

    def test_wire(self, server: Server) -> None:
        """
        A step of one's own can send bytes in chunks; the connection ends with them.
        """
        server.script = [lambda request: Wire([b"HTTP/1.1 ", request.method.encode()])]

        assert b"HTTP/1.1 POST" == converse(server, raw_request(b""))


class TestCounting:
    """
    The server that remembers ids alone.
    """

    def test_ids(self) -> None:
        """
        What comes again under its id is told from what comes under another one.
        """
        core = Counting()
        for names in ({"a": "1", "b": "2"}, {"a": "1"}, {"b": "3"}):
            events = [{"event.name": n, "event_id": i} for n, i in names.items()]
            body = json.dumps({"events": events}).encode()
            reply = core.respond("POST", "/v1/events", {}, body)
            assert reply is not None
            assert 202 == reply.status

        assert {"a": "1", "b": "2"} == core.ids
        assert {"a": 1} == core.duplicates
        assert ["b"] == core.strangers
        assert 4 == core.total

    def test_garbage(self) -> None:
        """
        What is no batch is refused.
        """
        reply = Counting().respond("POST", "/v1/events", {}, b"{")
        assert reply is not None

        assert 400 == reply.status


class TestStartTogether:
    """
    Threads start at once, and what becomes of them is seen.
    """

    def test_results(self) -> None:
        """
        Results come in the order of the numbers.
        """
        assert [0, 1, 4, 9] == start_together(4, lambda i: i * i)

    def test_runs_at_once(self) -> None:
        """
        No thread begins before all have started, and all run at the same time.
        """
        barrier = threading.Barrier(20)

        def count(_: int) -> int:
            threads = [thread.name for thread in threading.enumerate()]
            barrier.wait(PATIENCE)
            return sum(name.startswith("together-") for name in threads)

        assert [20] * 20 == start_together(20, count)

    def test_first_error(self) -> None:
        """
        The first error in time is raised as it is, after all threads have ended.
        """
        threads: dict[int, threading.Thread] = {}
        all_known = threading.Barrier(4)
        ended = []

        def fail(i: int) -> None:
            threads[i] = threading.current_thread()
            all_known.wait(PATIENCE)
            if i != 2:
                threads[2].join(PATIENCE)
                ended.append(i)
            message = f"from {i}"
            raise LookupError(message)

        with pytest.raises(LookupError, match="from 2"):
            start_together(4, fail)

        assert [0, 1, 3] == sorted(ended)

    def test_timeout(self) -> None:
        """
        Threads that do not end are counted in the error.
        """
        before = set(threading.enumerate())
        release = threading.Event()

        def wait(i: int) -> None:
            if i == 1:
                release.wait(PATIENCE)

        with pytest.raises(TimeoutError, match=r"1 of 3 threads .* 0\.05 s"):
            start_together(3, wait, timeout=0.05)

        release.set()
        end_threads_since(before)


class UnpicklableError(Exception):
    """
    Be an error that pickles and does not come back.
    """

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one}{two}")


class TestInFork:
    """
    A forked child tells what became of it, and never outlives the call.
    """

    def test_result(self) -> None:
        """
        The result comes from another process, however large it is.
        """
        pid, data = in_fork(lambda: (os.getpid(), b"x" * 1_000_000))

        assert os.getpid() != pid
        assert b"x" * 1_000_000 == data

    def test_leaving_in_peace(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """
        A child that has reported may finish what it does on leaving.
        """
        leave = os._exit

        def slow_exit(code: int) -> NoReturn:
            threading.Event().wait(0.05)
            (tmp_path / "left").touch()
            leave(code)

        monkeypatch.setattr(os, "_exit", slow_exit)

        in_fork(os.getpid)

        assert (tmp_path / "left").exists()

    def test_no_zombie(self) -> None:
        """
        The child is gone when the result is there.
        """
        pid = in_fork(os.getpid)

        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)

    def test_error(self) -> None:
        """
        An error is raised again as what it was, caused by the traceback of the child.
        """

        def explode() -> None:
            raise LookupError("boom")

        with pytest.raises(LookupError, match="boom") as caught:
            in_fork(explode)

        assert isinstance(caught.value.__cause__, ChildError)
        assert "in explode" in str(caught.value.__cause__)

    def test_result_that_does_not_pickle(self) -> None:
        """
        A result that does not pickle is an error of its own.
        """
        with pytest.raises(TypeError, match="pickle"):
            in_fork(threading.Lock)

    @pytest.mark.parametrize(
        "error", [UnpicklableError(1, 2), SystemExit(3), KeyboardInterrupt()]
    )
    def test_error_that_does_not_pass(self, error: BaseException) -> None:
        """
        An error that cannot come back, or would end the run, becomes a RuntimeError.
        """

        def explode() -> None:
            raise error

        with pytest.raises(RuntimeError, match=type(error).__name__) as caught:
            in_fork(explode)

        assert "in explode" in str(caught.value.__cause__)

    def test_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A child that hangs is killed in time.
        """
        pids = []
        fork = os.fork

        def recording_fork() -> int:
            pids.append(fork())
            return pids[0]

        monkeypatch.setattr(os, "fork", recording_fork)

        with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
            in_fork(lambda: threading.Event().wait(10 * PATIENCE), timeout=0.05)

        with pytest.raises(ChildProcessError):
            os.waitpid(pids[0], os.WNOHANG)

    def test_death(self) -> None:
        """
        A child that dies without a word is an error at once.
        """
        with pytest.raises(RuntimeError, match="without a report"):
            in_fork(lambda: os._exit(7))

    def test_no_warning(self) -> None:
        """
        Forking beside other threads warns of nothing, in the parent or the child.
        """
        release = threading.Event()

        def fork(i: int) -> int:
            if i == 0:
                return int(release.wait(PATIENCE))
            try:
                return in_fork(lambda: 1)
            finally:
                release.set()

        assert [1, 1] == start_together(2, fork)

    def test_a_forked_client(self, server: Server) -> None:
        """
        A forked child reaches the server, and does not keep its connections open.
        """
        gone = threading.Event()
        server.script = [hang(gone)]
        with socket.create_connection(server.address, PATIENCE) as connection:
            connection.sendall(raw_request(b"", "Connection: close"))
            assert server.wait_for_requests(1)

            def post() -> tuple[int, bytes]:
                with closing(Client(server)) as client:
                    return client.post(EVENT)

            assert (202, ACCEPTED) == in_fork(post)
            gone.set()
            with connection.makefile("rb") as reader:
                assert reader.read().endswith(REFUSED)

        assert [EVENT] == server.events


class TestRunScript:
    """
    A fresh interpreter starts without what this one was told.
    """

    def test_source(self) -> None:
        """
        Source is dedented and run, and what it prints comes back as text.
        """
        done = run_script(
            """
            import sys
            print("\u00e9", *sys.argv[1:])
            sys.exit("bad")
            """,
            "one",
            "two",
            env={"PYTHONIOENCODING": "utf-8"},
        )

        assert (1, "\u00e9 one two\n", "bad\n") == (
            done.returncode,
            done.stdout,
            done.stderr,
        )

    def test_path(self, tmp_path: Path) -> None:
        """
        A path object is a script to run.
        """
        script = tmp_path / "script.py"
        script.write_text("import sys; print(__name__, *sys.argv[1:])")

        assert "__main__ 5\n" == run_script(script, "5").stdout

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Settings of pgtrack come from *env* alone; the rest is inherited.
        """
        monkeypatch.setenv("PRODUCTGRAPH_API_KEY", "k")
        monkeypatch.setenv("OTHER", "o")

        done = run_script(
            """
            import os
            print([(k, v) for k, v in os.environ.items() if k.startswith("PRODUCT")])
            print(os.environ["OTHER"])
            """,
            env={"PRODUCTGRAPH_PROJECT_ID": "p"},
        )

        assert "[('PRODUCTGRAPH_PROJECT_ID', 'p')]\no\n" == done.stdout

    def test_import_path(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """
        The script imports what this process can, and none of the tests.
        """
        (tmp_path / "found_here.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        source = """
            import found_here
            try:
                import harness
            except ImportError as error:
                print(error)
        """

        done = run_script(source)

        assert ("No module named 'harness'\n", "") == (done.stdout, done.stderr)

    def test_timeout(self) -> None:
        """
        A script that does not end is killed.
        """
        with pytest.raises(subprocess.TimeoutExpired):
            run_script("import threading; threading.Event().wait(60)", timeout=0.2)
