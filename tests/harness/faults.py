"""
Misbehave: one step for each way in which a server can fail a client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .productgraph import INVALID_BODY, Reply
from .server import Exchange, Step, Wire, render

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

    def flood() -> Iterator[bytes]:
        yield b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\n\r\n"
        for sent in range(0, limit, len(_BLOCK)):
            yield _BLOCK[: limit - sent]

    return lambda _: Wire(flood())


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


def _real_answer(exchange: Exchange) -> bytes:
    reply = exchange.answer()
    return b"" if reply is None else render(reply)
