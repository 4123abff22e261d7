"""
A bookshop in Flask: blueprints, a stream, errors, and three visitors over HTTP.

Run it with `python examples/flask_app.py` after `pip install flask`.
Events are printed unless `PRODUCTGRAPH_ENDPOINT` says where to send them.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

import httpx
from flask import Blueprint, Flask, abort, request, stream_with_context
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

import pgtrack
from pgtrack.integrations.flask import install

if TYPE_CHECKING:
    from collections.abc import Iterator


class CardDeclinedError(HTTPException):
    """The bank says no."""

    code = 402


BOOKS = {1: "Middlemarch", 2: "Emma", 3: "Persuasion"}

shop = Blueprint("shop", __name__, url_prefix="/shop")


@shop.before_request
def recognise() -> None:
    """Name the user, from here on and in the request's own event."""
    if user := request.headers.get("Authorization"):
        pgtrack.identify(user.removeprefix("Bearer "))


@shop.get("/books/<int:number>")
def book(number: int) -> dict[str, Any]:
    """Show a book."""
    return {"title": BOOKS.get(number) or abort(404)}


@shop.get("/books.csv")
def books() -> Any:
    """Stream all books; each row is written in the session of the request."""

    def rows() -> Iterator[str]:
        for number, title in BOOKS.items():
            pgtrack.emit("custom", name="row.written", metadata={"book": number})
            yield f"{number},{title}\n"

    return stream_with_context(rows()), {"Content-Type": "text/csv"}


@shop.post("/orders")
@pgtrack.journey("buy_a_book")
def order() -> tuple[dict[str, str], int]:
    """Take an order, which is a journey."""
    number = request.get_json()["book"]
    reserve(number)
    pay(request.get_json()["card"])
    return {"status": "ordered"}, 201


@pgtrack.journey_step("book_reserved", "Book Reserved")
def reserve(number: int) -> None:
    """Put the book aside."""
    if number not in BOOKS:
        msg = f"there is no book {number}"
        raise LookupError(msg)


@pgtrack.journey_step("payment_confirmed", "Payment Confirmed")
def pay(card: str) -> None:
    """Take the money."""
    if card.endswith("0002"):
        msg = f"card {card} was declined"
        raise CardDeclinedError(msg)


def create_app() -> Flask:
    """Make the application."""
    app = Flask("bookshop")
    app.register_blueprint(shop)
    app.add_url_rule("/health", "health", lambda: "fine")
    install(app, exclude="/health")  # that is all
    return app


# --- the visitors ----------------------------------------------------------------

GOOD = "4242 4242 4242 4242"
DECLINED = "4000 0000 0000 0002"
ANN = {"X-Session-ID": "sess_frontend_ann", "Authorization": "Bearer u_ann"}
BEN = {"X-Session-ID": "sess_frontend_ben", "Authorization": "Bearer u_ben"}
VISITS: list[tuple[str, dict[str, str], list[tuple[str, str, Any]]]] = [
    (
        "Ann looks at a book and buys it.",
        ANN,
        [
            ("GET", "/shop/books/2", None),
            ("POST", "/shop/orders", {"book": 2, "card": GOOD}),
        ],
    ),
    (
        "Ben asks for a book that there is not, and his card is declined.",
        BEN,
        [
            ("GET", "/shop/books/9", None),
            ("POST", "/shop/orders", {"book": 9, "card": GOOD}),
            ("POST", "/shop/orders", {"book": 3, "card": DECLINED}),
        ],
    ),
    (
        "A program reads the list, in a session of its own.",
        {},
        [("GET", "/health", None), ("GET", "/shop/books.csv", None)],
    ),
]


def visit(url: str) -> None:
    """Send each visitor's requests, and show how they were answered."""
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        for headline, headers, requests in VISITS:
            print(f"\n{headline}")
            for method, path, body in requests:
                answer = client.request(method, path, headers=headers, json=body)
                pgtrack.flush()
                request_id = answer.headers["X-Request-ID"]
                print(f"   answered {answer.status_code} to request {request_id}")


def main() -> None:
    """Serve on a free port of this machine until all visitors have left."""
    pgtrack.configure(
        project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
        endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
    )
    for name in ("bookshop", "werkzeug"):  # not what this is about
        logging.getLogger(name).setLevel(logging.CRITICAL)
    server = make_server("127.0.0.1", 0, create_app(), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        visit(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    pgtrack.shutdown()
    stats = pgtrack.stats()
    print(f"\n{stats.emitted} events emitted, {stats.delivered} delivered.")


if __name__ == "__main__":
    main()
