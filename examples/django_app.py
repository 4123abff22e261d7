"""
A shop on Django: one file with settings, views and a server, and four visitors.

Run it with `python examples/django_app.py` after `pip install 'pgtrack[django]'`.
Events are printed unless `PRODUCTGRAPH_ENDPOINT` says where to send them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

import httpx
from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.core.wsgi import get_wsgi_application
from django.http import Http404, JsonResponse, StreamingHttpResponse
from django.urls import include, path

import pgtrack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.http import HttpRequest, HttpResponse

# --- the shop --------------------------------------------------------------------

STOCK = {1: "book", 2: "lamp", 3: "a lamp that is out of stock"}


class Customers:
    """Middleware such as an application has, that knows who asks."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Identify the customer, so that all events of the request have it."""
        if "Customer" in request.headers:
            pgtrack.identify(request.headers["Customer"])
        return self.get_response(request)


def show(request: HttpRequest, id: int) -> JsonResponse:  # noqa: A002, ARG001
    """Show an item; Django answers an `Http404` with that status."""
    if id not in STOCK:
        raise Http404
    return JsonResponse({"item": STOCK[id]})


@pgtrack.journey_step("stock_reserved", "Stock Reserved")
def reserve(item: int) -> None:
    """Put an item aside."""
    if item == max(STOCK):
        msg = f"{STOCK[item]}: write to stock@shop.example"
        raise LookupError(msg)


@pgtrack.journey_step("payment_confirmed", "Payment Confirmed")
def pay() -> None:
    """Take the money."""
    time.sleep(0.01)


def buy(request: HttpRequest) -> JsonResponse:
    """Sell what is in the cart."""
    with pgtrack.journey("checkout_flow") as flow:
        reserve(json.loads(request.body)["item"])
        pay()
        flow.convert()
    return JsonResponse({"status": "confirmed"}, status=201)


def export(request: HttpRequest) -> StreamingHttpResponse:
    """Send all orders to whoever may have them, part by part."""
    if request.headers.get("Customer") != "u_boss":
        raise PermissionDenied

    def parts() -> Iterator[str]:
        for item in STOCK.values():
            time.sleep(0.01)  # the duration that is told is that of the whole
            yield f"{item}\n"
        pgtrack.emit("custom", name="exported", metadata={"items": len(STOCK)})

    return StreamingHttpResponse(parts())


class Urls:
    """What is where; elsewhere a module of its own."""

    urlpatterns = (
        path("items/<int:id>/", show),
        path("orders/", include([path("", buy), path("export/", export)])),
    )


SETTINGS = {
    "ALLOWED_HOSTS": ["127.0.0.1"],
    "MIDDLEWARE": [
        "pgtrack.integrations.django.Middleware",  # first of all
        f"{__name__}.Customers",
    ],
    "PGTRACK": {"exclude": ["/health/"]},
    "ROOT_URLCONF": Urls,
    "SECRET_KEY": "of an example",
}

# --- the visitors ----------------------------------------------------------------

VISITS = [
    (
        "Ann looks at a book, and buys it.",
        {"X-Session-ID": "sess_frontend_ann", "Customer": "u_ann"},
        [("GET", "/items/1/", None), ("POST", "/orders/", {"item": 1})],
    ),
    (
        "Ben wants what is not there, and then what is not left.",
        {"X-Session-ID": "sess_frontend_ben", "Customer": "u_ben"},
        [("GET", "/items/7/", None), ("POST", "/orders/", {"item": 3})],
    ),
    (
        "Cho may not see the orders, and her boss may.",
        {"X-Session-ID": "sess_frontend_cho"},
        [("GET", "/orders/export/", None)],
    ),
    (
        "The boss's script calls without a session, and gets one of its own.",
        {"Customer": "u_boss"},
        [("GET", "/orders/export/", None)],
    ),
]


def visit(url: str) -> None:
    """Send each visitor's requests, and show what the shop made of them."""
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        for headline, headers, requests in VISITS:
            print(f"\n{headline}  ({headers.get('X-Session-ID', 'no session')})")
            for method, target, body in requests:
                answer = client.request(method, target, json=body, headers=headers)
                pgtrack.flush()
                request_id = answer.headers["X-Request-ID"]
                print(f"   answered {answer.status_code} to request {request_id}")


class Quiet(WSGIRequestHandler):
    """Log no requests: pgtrack tells them."""

    def log_message(self, *_: object) -> None:
        """Write nothing."""


def main() -> None:
    """Serve on a free port of this machine until all visitors have left."""
    pgtrack.configure(
        project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
        endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
    )
    settings.configure(**SETTINGS)
    server = make_server("127.0.0.1", 0, get_wsgi_application(), handler_class=Quiet)
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
