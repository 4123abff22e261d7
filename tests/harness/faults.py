"""
Misbehave: one step for each way in which a server can fail a client.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .productgraph import INVALID_BODY, Reply
from .server import Arrival, Exchange, Step, Welcome, Wire, render

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping

_BLOCK = b" " * (64 * 1024)


def status(
    code: int,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    then_store: bool = False,
) -> Step:
    """
    Answer by any status.

    Args:
        code: The status.

        headers: None for no more than Content-Length.

        body: As it is sent.

        then_store:
            Store the events all the same, as a server does whose storage works and
            whose forwarder fails.
    """

    def step(exchange: Exchange) -> Reply:
        if then_store:
            exchange.answer()
        return Reply(code, headers or {}, body)

    return step


def hang(until: threading.Event) -> Step:
    """
    Be silent until an event is set, a minute at most; then give the real answer.
    """

    def step(exchange: Exchange) -> Reply | None:
        exchange.wait(until)
        return exchange.answer()

    return step


def drop() -> Step:
    """
    Close the connection without an answer. Nothing is stored.
    """
    return lambda _: None


def reset() -> Step:
    """
    End the connection by RST, without an answer. Nothing is stored.
    """
    return lambda _: Wire(is_reset=True)


def leave() -> Step:
    """
    Give the real answer, then close the connection, which was to be kept.
    """
    return lambda exchange: Wire([_real_answer(exchange)])


def cut(after: int) -> Step:
    """
    Store the events, send the first *after* bytes of the answer, close the connection.
    """

    def step(exchange: Exchange) -> Wire:
        return Wire([_real_answer(exchange)[:after]])

    return step


def drip(gap: threading.Event | float) -> Step:
    """
    Store the events and send the answer byte by byte.

    Args:
        gap:
            Seconds between two bytes. Or an event: all bytes but the first wait for it.
    """

    def step(exchange: Exchange) -> Wire:
        def drops() -> Iterator[bytes]:
            for i, value in enumerate(_real_answer(exchange)):
                if i:
                    exchange.wait(gap)
                yield bytes([value])

        return Wire(drops())

    return step


def garbage(data: bytes) -> Step:
    """
    Send bytes that need not be HTTP, and close the connection. Nothing is stored.
    """
    return lambda _: Wire([data])


def endless(limit: int = 64 * 1024 * 1024) -> Step:
    """
    Start a 202 whose body does not end before *limit* bytes. Nothing is stored.
    """
    head = b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\n\r\n"
    return _flood(head, _BLOCK, limit)


def endless_header(limit: int = 64 * 1024 * 1024) -> Step:
    """
    Start a 202 with a header that does not end before *limit* bytes. Nothing is stored.
    """
    return _flood(b"HTTP/1.1 202 Accepted\r\nX-Endless: ", b"x" * len(_BLOCK), limit)


def interim(limit: int = 64 * 1024 * 1024) -> Step:
    """
    Send answers that are not final, *limit* bytes of them. Nothing is stored.
    """
    return _flood(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 1_000, limit)


def redirect(location: str, code: int = 307) -> Step:
    """
    Send the client elsewhere. Nothing is stored.
    """
    return status(code, {"Location": location})


def poison(predicate: Callable[[dict[str, Any]], bool]) -> Step:
    """
    Refuse every batch that has such an event in it, as for a value of a wrong type.
    """

    def step(exchange: Exchange) -> Reply | None:
        if any(map(predicate, exchange.events or ())):
            return INVALID_BODY
        return exchange.answer()

    return step


def reject(predicate: Callable[[dict[str, Any]], bool], reason: str = "no") -> Step:
    """
    Take a batch but for such events, which the 202 lists with a *reason*.
    """

    def step(exchange: Exchange) -> Reply | None:
        batch = exchange.batch
        if isinstance(batch, Reply):
            return batch

        bad = [i for i, element in enumerate(batch) if predicate(element.value)]
        good = [element for i, element in enumerate(batch) if i not in bad]
        exchange.server.answer(replace(exchange, batch=good))
        verdict = {
            "accepted": len(good),
            "rejected": len(bad),
            "errors": [{"index": i, "error": reason} for i in bad],
        }
        headers = {"Content-Type": "application/json"}
        return Reply(202, headers, json.dumps(verdict).encode())

    return step


def ignore(until: threading.Event) -> Welcome:
    """
    Read nothing until an event is set, a minute at most.
    """
    return lambda arrival: arrival.wait(until)


def sip(gap: float, size: int = 1) -> Welcome:
    """
    Read what comes *size* bytes at a time, with so many seconds before each.
    """

    def welcome(arrival: Arrival) -> io.BufferedReader:
        return io.BufferedReader(_Sips(arrival, gap, size), 1)

    return welcome


def hang_up(*, is_reset: bool = False) -> Welcome:
    """
    End a connection as soon as it is there, in order or by RST.
    """
    return lambda _: Wire(is_reset=is_reset)


class _Sips(io.RawIOBase):
    def __init__(self, arrival: Arrival, gap: float, size: int) -> None:
        self._arrival = arrival
        self._gap = gap
        self._size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._arrival.wait(self._gap)
        view = memoryview(buffer)[: self._size]
        return self._arrival.connection.recv_into(view)


def _flood(start: bytes, block: bytes, limit: int) -> Step:
    def flood() -> Iterator[bytes]:
        yield start
        for sent in range(0, limit, len(block)):
            yield block[: limit - sent]

    return lambda _: Wire(flood())


def _real_answer(exchange: Exchange) -> bytes:
    reply = exchange.answer()
    return b"" if reply is None else render(reply)
