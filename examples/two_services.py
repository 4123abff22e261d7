"""
Two services in a chain, and one session through both: a shop asks a stock, by httpx.

The stock is listed in `propagate_to`, so it goes on with the session and the request id
of the shop's visitor.  The carrier, a third party, is not listed, and hears of neither.

Run it with `python examples/two_services.py` after `pip install starlette uvicorn`.
Events are printed unless `PRODUCTGRAPH_ENDPOINT` says where to send them.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import pgtrack
from pgtrack.integrations import httpx as pgtrack_httpx
from pgtrack.integrations.starlette import install

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request
    from starlette.types import ASGIApp

# --- the stock: a service behind the shop ----------------------------------------


async def reserve(request: Request) -> JSONResponse:
    """Put an item aside, if there is one."""
    item = request.path_params["item"]
    pgtrack.emit("custom", name="stock.asked", metadata={"item": item})
    return JSONResponse({"item": item}, status_code=409 if item == "lamp" else 200)


stock = Starlette(routes=[Route("/stock/{item}", reserve, methods=["POST"])])
install(stock)


# --- the carrier: somebody else's ------------------------------------------------


async def quote(request: Request) -> JSONResponse:
    """Say what a parcel costs, and what the request told about the visitor."""
    told = sorted({"x-session-id", "x-request-id"} & set(request.headers))
    return JSONResponse({"price": "4.90", "told": told})


carrier = Starlette(routes=[Route("/quote", quote)])


# --- the shop: what visitors see -------------------------------------------------


async def buy(request: Request) -> JSONResponse:
    """Ask the stock for the item, and the carrier for the price of the parcel."""
    hosts = request.app.state
    item = await request.json()
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        reserved = await client.post(f"{hosts.stock}/stock/{item}")
        parcel = (await client.get(f"{hosts.carrier}/quote")).json()
    print(f"   the carrier was told {parcel['told'] or 'nothing'}")
    return JSONResponse({}, status_code=201 if reserved.is_success else 409)


shop = Starlette(routes=[Route("/orders", buy, methods=["POST"])])
install(shop)


# --- the visitors ----------------------------------------------------------------

VISITS = [
    ("Ann buys a book.", "sess_frontend_ann", "req-1", "book"),
    ("Ben wants a lamp, which is sold out.", "sess_frontend_ben", "req-2", "lamp"),
]


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """Serve an application on a free port of this machine, and return its URL."""
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
    """Serve all three until the visitors have left."""
    with ExitStack() as stack:
        urls = [stack.enter_context(served(app)) for app in (shop, stock, carrier)]
        _, shop.state.stock, shop.state.carrier = urls
        pgtrack.configure(
            project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
            endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
            propagate_to=[shop.state.stock.removeprefix("http://")],
        )
        pgtrack_httpx.install()
        with httpx.Client(base_url=urls[0], timeout=10, trust_env=False) as browser:
            answers = [
                browser.post(
                    "/orders",
                    json=item,
                    headers={"X-Session-ID": session_id, "X-Request-ID": request_id},
                )
                for _, session_id, request_id, item in VISITS
            ]
    pgtrack.shutdown()
    print()
    for (headline, session_id, *_), answer in zip(VISITS, answers, strict=True):
        print(f"{headline}  ({session_id} was answered {answer.status_code})")
    stats = pgtrack.stats()
    print(f"\n{stats.emitted} events emitted, {stats.delivered} delivered.")


if __name__ == "__main__":
    main()
