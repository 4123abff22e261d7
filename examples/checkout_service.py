"""
A checkout service: Starlette under uvicorn, and four visitors with real requests.

`install` keeps each visitor's session, and tells each request; `track_api` adds which
error a failed one is of.

Run it with `python examples/checkout_service.py` after `pip install starlette uvicorn`.
Events are printed unless `PRODUCTGRAPH_ENDPOINT` says where to send them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route

import pgtrack
from pgtrack.integrations.starlette import install

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request


# --- the service -----------------------------------------------------------------


class CardDeclinedError(HTTPException):
    """The bank says no.  Starlette answers with the status, and pgtrack tells it."""


class ProviderDownError(Exception):
    """The bank says nothing.  pgtrack reads the status off whatever has one."""

    status_code = 503


@pgtrack.journey_step("stock_reserved", "Stock Reserved")
async def reserve(items: list[str]) -> None:
    """Put the items aside."""
    await asyncio.sleep(0.005 * len(items))


@pgtrack.journey_step("payment_confirmed", "Payment Confirmed")
async def charge(card: str) -> None:
    """Take the money."""
    await asyncio.sleep(0.02)
    if card == DECLINED:
        raise CardDeclinedError(402, f"card {card} was declined")
    if card == UNLUCKY:
        msg = "no answer from https://shop:s3cr3t@pay.example.com/charge?key=k-77"
        raise ProviderDownError(msg)


@pgtrack.track_api
async def checkout(request: Request) -> JSONResponse:
    """Sell what is in the cart."""
    order = await request.json()
    pgtrack.identify(order["user"])
    with pgtrack.journey("checkout_flow") as flow:
        await reserve(order["items"])
        await charge(order["card"])
        flow.convert()
    return JSONResponse({"status": "confirmed"}, status_code=201)


async def tell_unavailable(_: Request, __: Exception) -> JSONResponse:
    """Answer for a provider that does not."""
    return JSONResponse({"status": "try again later"}, status_code=503)


app = Starlette(
    routes=[Route("/api/checkout", checkout, methods=["POST"])],
    exception_handlers={ProviderDownError: tell_unavailable},
)
install(app)


# --- the visitors ----------------------------------------------------------------

GOOD = "4242 4242 4242 4242"
DECLINED = "4000 0000 0000 0002"
UNLUCKY = "4000 0000 0000 0119"
VISITS = [
    (
        "Ann buys two things.",
        {"X-Session-ID": "sess_frontend_ann", "X-Request-ID": "req-1"},
        [{"user": "u_ann", "items": ["book", "lamp"], "card": GOOD}],
    ),
    (
        "Ben's card is declined; he takes another.",
        {"X-Session-ID": "sess_frontend_ben", "X-Request-ID": "req-2"},
        [
            {"user": "u_ben", "items": ["book"], "card": DECLINED},
            {"user": "u_ben", "items": ["book"], "card": GOOD},
        ],
    ),
    (
        "Cho meets a payment provider that is down.",
        {"X-Session-ID": "sess_frontend_cho", "X-Request-ID": "req-3"},
        [{"user": "u_cho", "items": ["lamp"], "card": UNLUCKY}],
    ),
    (
        "A program calls without any headers, and gets a session of its own.",
        {},
        [{"user": "u_bot", "items": ["book"], "card": GOOD}],
    ),
]


@contextmanager
def serving() -> Iterator[str]:
    """Serve on a free port of this machine; at the end, all that was emitted is out."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def main() -> None:
    """Send each visitor's requests, and show what the service made of them."""
    pgtrack.configure(
        project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
        endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
    )
    for headline, headers, orders in VISITS:
        print(
            f"\n{headline}  ({headers.get('X-Session-ID', 'no session')})", flush=True
        )
        with serving() as url, httpx.Client(base_url=url, trust_env=False) as client:
            answers = [
                client.post("/api/checkout", json=order, headers=headers)
                for order in orders
            ]
        for answer in answers:
            request_id = answer.headers["X-Request-ID"]
            print(f"   answered {answer.status_code} to request {request_id}")
    stats = pgtrack.stats()
    print(f"\n{stats.emitted} events emitted, {stats.delivered} delivered.")


if __name__ == "__main__":
    main()
