"""Each example, as a process of its own, against a strict server."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness import ProductGraph, Server, run_script

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLES = Path(__file__).parent.parent / "examples"

NEEDS = {
    "batch_job": (),
    "celery_worker": ("celery",),
    "checkout_service": ("starlette", "uvicorn"),
    "django_app": ("django",),
    "flask_app": ("flask",),
    "httpbin_instrumented": ("httpbin",),
    "script": (),
    "two_services": ("starlette", "uvicorn"),
}
"""What each example needs beside pgtrack."""

Event = dict[str, Any]


def run(name: str, **variables: str) -> str:
    """Run an example to its end, and return what it printed."""
    env = {f"PRODUCTGRAPH_{key.upper()}": value for key, value in variables.items()}
    done = run_script(EXAMPLES / f"{name}.py", env=env)

    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def run_switched_off(name: str) -> tuple[str, int]:
    """Run an example with pgtrack off; return what it printed, and what it sent."""
    with Server(ProductGraph("v0.3.0")) as server:
        printed = run(name, enabled="false", endpoint=server.url)
        return printed, len(server.requests)


def run_against_a_server(name: str) -> list[Event]:
    """Run an example that sends to a server, and return what the server took."""
    with Server(ProductGraph("v0.3.0")) as server:
        run(name, endpoint=server.url, project_id="proj_of_the_test")
        sent = [event for request in server.requests for event in request.events or ()]

        assert sent == server.events
    assert {"proj_of_the_test"} == {event["product_id"] for event in sent}
    return sent


@functools.cache
def runs_of(name: str) -> list[futures.Future[Any]]:
    """Run an example once in each way, side by side, for all tests that look at it."""
    ways = (run, run_switched_off, run_against_a_server)
    with futures.ThreadPoolExecutor(len(ways)) as pool:
        return [pool.submit(way, name) for way in ways]


def run_of(name: str, way: int) -> Any:
    """Return what a run has led to, or raise what it failed with."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return runs_of(name)[way].result()


def printed_by(name: str) -> str:
    """Return what an example prints without any variable."""
    return run_of(name, 0)


def printed_and_sent_switched_off(name: str) -> tuple[str, int]:
    """Return what an example prints and how many requests it sends, pgtrack off."""
    return run_of(name, 1)


def sent_by(name: str) -> list[Event]:
    """Return the events of an example, as the server took them."""
    return run_of(name, 2)


def summary(event: Event) -> tuple[Any, ...]:
    """Return what an event says, without what differs in each run."""
    return {
        "api.response": lambda: (
            event.get("api.method"),
            event["api.path"],
            event["api.status_code"],
        ),
        "custom": lambda: (
            event["event.name"],
            event.get("gen_ai.journey.conversion.status"),
        ),
        "error": lambda: ("error", event["error.type"], event["error.message"]),
        "journey.step": lambda: (
            event["gen_ai.journey.id"],
            event["gen_ai.journey.step.id"],
        ),
    }[event["event.type"]]()


def by_session(events: list[Event]) -> Mapping[str, list[tuple[Any, ...]]]:
    """Return the summaries of each session, in order."""
    sessions = collections.defaultdict(list)
    for event in events:
        sessions[event["session.id"]].append(summary(event))
    return dict(sessions)


def test_every_example_is_listed() -> None:
    """No example is left out of these tests."""
    assert sorted(NEEDS) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", NEEDS)
def test_examples_print_their_events_unasked(name: str) -> None:
    """Without any variable an example prints one line for each event."""
    printed = printed_by(name)
    lines = re.findall(
        r"^\d\d:\d\d:\d\d\.\d{3}  \S+ +[a-z]+\S*  ", printed, re.MULTILINE
    )

    emitted = re.search(r"(\d+) (?:events )?emitted", printed)
    assert emitted is not None
    assert int(emitted[1]) == len(lines)


@pytest.mark.parametrize("name", NEEDS)
def test_examples_work_with_pgtrack_switched_off(name: str) -> None:
    """`PRODUCTGRAPH_ENABLED=false` leaves the example itself as it is."""
    printed, requests = printed_and_sent_switched_off(name)

    assert re.search(r"\b0 (?:events )?emitted", printed)
    assert 0 == requests


def test_script() -> None:
    """The script tells a session, a journey, and an error without its secrets."""
    events = sent_by("script")

    message = "card [redacted] declined, receipt goes to [redacted]"
    assert {
        "sess_frontend_ann": [
            ("invoice.sent", None),
            ("checkout_flow", "cart_checked"),
            ("checkout_flow", "payment_confirmed"),
            ("journey_conversion", "converted"),
            ("POST", "/api/v1/checkout", 200),
        ],
        "sess_frontend_ben": [
            ("checkout_flow", "cart_checked"),
            ("error", "ValueError", message),
            ("journey_conversion", "abandoned"),
            ("POST", "/api/v1/checkout", 500),
        ],
    } == by_session(events)
    assert {"u_ann", "u_ben"} == {event["user.id"] for event in events}


def test_script_explains_itself() -> None:
    """The script shows the secret where it was raised, and a ledger that adds up."""
    printed = printed_by("script")

    assert "the caller caught:  card 4000 0000 0000 0002 declined" in printed
    assert 1 == printed.count("4000 0000 0000 0002")
    assert "9 emitted = 9 delivered + 0 rejected + 0 dropped + 0 pending" in printed


BOUGHT = [
    ("checkout_flow", "stock_reserved"),
    ("checkout_flow", "payment_confirmed"),
    ("journey_conversion", "converted"),
    ("POST", "/api/checkout", 201),
]


def test_checkout_service() -> None:
    """Each request's steps, errors and status stand in its browser's session."""
    events = sent_by("checkout_service")

    sessions = by_session(events)
    (fresh,) = set(sessions) - {f"sess_frontend_{v}" for v in ("ann", "ben", "cho")}
    no_answer = (
        "no answer from https://[redacted]@pay.example.com/charge?key=[redacted]"
    )
    assert {
        "sess_frontend_ann": BOUGHT,
        "sess_frontend_ben": [
            ("checkout_flow", "stock_reserved"),
            ("error", "CardDeclinedError", "402: card [redacted] was declined"),
            ("journey_conversion", "abandoned"),
            ("POST", "/api/checkout", 402),
            *BOUGHT,
        ],
        "sess_frontend_cho": [
            ("checkout_flow", "stock_reserved"),
            ("error", "ProviderDownError", no_answer),
            ("journey_conversion", "abandoned"),
            ("POST", "/api/checkout", 503),
        ],
        fresh: BOUGHT,
    } == sessions
    assert fresh.startswith("srv-")


def test_checkout_service_keeps_requests_and_users_apart() -> None:
    """Each event has the request id and the user of its own session."""
    events = sent_by("checkout_service")

    found = {
        (e["session.id"], e["user.id"], e["metadata"]["request_id"])
        for e in events
        if e["session.id"].startswith("sess_")
    }
    assert {
        (f"sess_frontend_{name}", f"u_{name}", f"req-{number}")
        for number, name in enumerate(("ann", "ben", "cho"), 1)
    } == found
    assert events == sorted(events, key=lambda event: event["event.timestamp"])


def test_checkout_service_fails_in_the_journey() -> None:
    """An error in a step names the journey and the step it kept from completing."""
    events = sent_by("checkout_service")

    assert [("checkout_flow", "payment_confirmed", "Payment Confirmed")] * 2 == [
        tuple(e[f"gen_ai.journey.{key}"] for key in ("id", "step.id", "step.name"))
        for e in events
        if e["event.type"] == "error"
    ]


def test_checkout_service_prints_session_by_session() -> None:
    """What is printed between two headlines belongs to one session."""
    printed = printed_by("checkout_service")
    blocks = [block.splitlines() for block in printed.strip().split("\n\n")]
    sessions = [
        {line.split()[1] for line in lines if re.match(r"\d\d:", line)}
        for lines in blocks
    ]

    assert [1, 1, 1, 1, 0] == [len(found) for found in sessions]
    assert 4 == len(set.union(*sessions))


def test_checkout_service_echoes_request_ids() -> None:
    """The answer carries the request's own id, or the one that was made for it."""
    printed = printed_by("checkout_service")
    echoed = re.findall(r"answered (\d+) to request (\S+)", printed)

    *given, (_, made) = echoed
    assert [
        ("201", "req-1"),
        ("402", "req-2"),
        ("201", "req-2"),
        ("503", "req-3"),
    ] == given
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made)


INVOICED = [
    ("invoicing", "order_checked"),
    ("POST", "/mail/messages", 202),
    ("invoicing", "invoice_sent"),
    ("journey_conversion", "converted"),
]


def test_batch_job() -> None:
    """Each row is a session of its own, and a bad one costs none but itself."""
    events = sent_by("batch_job")

    abandoned = ("journey_conversion", "abandoned")
    negative = "the amount must be positive (got -15.00)"
    failures = {
        "A-1005": [
            ("invoicing", "order_checked"),
            ("error", "LookupError", "no address to send an invoice of $64.20 to"),
            abandoned,
        ],
        "A-1006": [("error", "ValueError", negative), abandoned],
        "A-1009": [("error", "KeyError", "'XBT'"), abandoned],
    }
    *of_orders, finished = by_session(events).items()
    orders = [f"A-{number}" for number in range(1001, 1011)]
    assert [failures.get(order, INVOICED) for order in orders] == [
        summaries for _, summaries in of_orders
    ]
    assert finished[0].startswith("proc-")
    assert [("batch.finished", None)] == finished[1]
    assert {"rows": 10, "failed": 3, "source": "backend"} == events[-1]["metadata"]


def test_batch_job_goes_on_with_the_sessions_of_its_file() -> None:
    """Sessions come from the file; those that are missing or no ids are made anew."""
    events = sent_by("batch_job")

    sessions = {e["metadata"].get("order"): e["session.id"] for e in events}
    assert "sess-mm8wlgo0-4f1c9a2e" == sessions["A-1001"]
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, sessions["A-1004"])
    assert re.fullmatch(uuid, sessions["A-1008"])


def test_batch_job_ends_with_its_numbers() -> None:
    """The last lines have the rows, the events, and what was adjusted."""
    printed = printed_by("batch_job")

    assert [
        "10 orders, 3 of them failed.",
        "36 events emitted, 36 delivered.",
        "Adjusted on the way: {'session_id': 1}",
    ] == printed.splitlines()[-3:]


def test_celery_worker() -> None:
    """What the worker does, retries and a failure too, is in the customer's session."""
    events = sent_by("celery_worker")

    sessions = by_session(events)
    (fresh,) = set(sessions) - {"sess_frontend_ann", "sess_frontend_ben"}
    assert {
        "sess_frontend_ann": [
            ("checkout_flow", "cart_checked"),
            ("checkout_flow", "payment_confirmed"),
            ("receipt.sent", None),
        ],
        "sess_frontend_ben": [
            ("checkout_flow", "cart_checked"),
            ("error", "ValueError", "card [redacted] was declined"),
        ],
        fresh: [("carts.swept", None)],
    } == sessions
    assert fresh.startswith("srv-")
    assert {"u_ann", "u_ben", None} == {event.get("user.id") for event in events}


def test_httpbin_instrumented() -> None:
    """Routes, statuses and sessions of an application that knows nothing of pgtrack."""
    events = sent_by("httpbin_instrumented")

    assert {
        "sess_frontend_ann": [("GET", "/get", 200), ("POST", "/post", 200)],
        "sess_frontend_ben": [
            ("GET", "/status/<codes>", 404),
            ("GET", "/basic-auth/<user>/<passwd>", 401),
            ("GET", "(no route)", 404),
        ],
        "sess_frontend_cho": [
            ("GET", "/delay/<delay>", 200),
            ("error", "503", "Service Unavailable"),
            ("GET", "/status/<codes>", 503),
        ],
    } == by_session(events)
    delay = next(e for e in events if e["api.path"] == "/delay/<delay>")
    assert 50 <= delay["api.duration_ms"]


def test_flask_app() -> None:
    """Routes, steps, errors and a stream, each in the session of its visitor."""
    events = sent_by("flask_app")

    sessions = by_session(events)
    (fresh,) = set(sessions) - {"sess_frontend_ann", "sess_frontend_ben"}
    declined = "402 Payment Required: card [redacted] was declined"
    assert {
        "sess_frontend_ann": [
            ("GET", "/shop/books/<int:number>", 200),
            ("buy_a_book", "book_reserved"),
            ("buy_a_book", "payment_confirmed"),
            ("POST", "/shop/orders", 201),
        ],
        "sess_frontend_ben": [
            ("GET", "/shop/books/<int:number>", 404),
            ("error", "LookupError", "there is no book 9"),
            ("journey_conversion", "abandoned"),
            ("POST", "/shop/orders", 500),
            ("buy_a_book", "book_reserved"),
            ("error", "CardDeclinedError", declined),
            ("journey_conversion", "abandoned"),
            ("POST", "/shop/orders", 402),
        ],
        fresh: [
            *[("row.written", None)] * 3,
            ("GET", "/shop/books.csv", 200),
        ],
    } == sessions
    assert fresh.startswith("srv-")
    assert {"u_ann", "u_ben", None} == {event.get("user.id") for event in events}


def test_flask_app_echoes_request_ids() -> None:
    """Each answer has the id of its request, the 500 that Flask makes included."""
    printed = printed_by("flask_app")
    echoed = re.findall(r"answered (\d+) to request (\S+)", printed)

    assert ["200", "201", "404", "500", "402", "200", "200"] == [s for s, _ in echoed]
    assert len(echoed) == len({request_id for _, request_id in echoed})
    told = re.findall(r"api\.response .* request_id=(\w+)", printed)
    assert told == [
        request_id[-8:]
        for _, request_id in echoed[:5] + echoed[6:]  # not /health
    ]


def test_django_app() -> None:
    """Routes, steps, errors and a stream of Django, in the sessions of its visitors."""
    events = sent_by("django_app")

    sessions = by_session(events)
    (fresh,) = set(sessions) - {f"sess_frontend_{v}" for v in ("ann", "ben", "cho")}
    gone = "a lamp that is out of stock: write to [redacted]"
    assert {
        "sess_frontend_ann": [
            ("GET", "/items/<int:id>/", 200),
            ("checkout_flow", "stock_reserved"),
            ("checkout_flow", "payment_confirmed"),
            ("journey_conversion", "converted"),
            ("POST", "/orders/", 201),
        ],
        "sess_frontend_ben": [
            ("GET", "/items/<int:id>/", 404),
            ("error", "LookupError", gone),
            ("journey_conversion", "abandoned"),
            ("POST", "/orders/", 500),
        ],
        "sess_frontend_cho": [("GET", "/orders/export/", 403)],
        fresh: [("exported", None), ("GET", "/orders/export/", 200)],
    } == sessions
    assert fresh.startswith("srv-")
    assert 30 <= events[-1]["api.duration_ms"]
    assert {
        ("sess_frontend_ann", "u_ann"),
        ("sess_frontend_ben", "u_ben"),
        ("sess_frontend_cho", None),
        (fresh, "u_boss"),
    } == {(event["session.id"], event.get("user.id")) for event in events}


def test_django_app_echoes_request_ids() -> None:
    """Each answer has the id that its event was told with, also that of a 500."""
    printed = printed_by("django_app")
    echoed = re.findall(r"answered (\d+) to request (\S+)", printed)

    assert ["200", "201", "404", "500", "403", "200"] == [s for s, _ in echoed]
    told = re.findall(r"api\.response .* request_id=(\w+)", printed)
    assert [request_id[-8:] for _, request_id in echoed] == told


def test_two_services() -> None:
    """Both services tell their part of a visit in one session and one request."""
    events = sent_by("two_services")

    assert {
        "sess_frontend_ann": [
            ("stock.asked", None),
            ("POST", "/stock/{item}", 200),
            ("POST", "/orders", 201),
        ],
        "sess_frontend_ben": [
            ("stock.asked", None),
            ("POST", "/stock/{item}", 409),
            ("POST", "/orders", 409),
        ],
    } == by_session(events)
    assert {("sess_frontend_ann", "req-1"), ("sess_frontend_ben", "req-2")} == {
        (event["session.id"], event["metadata"]["request_id"]) for event in events
    }


def test_two_services_tell_no_third_party() -> None:
    """The third party, which is not listed, hears nothing."""
    printed = printed_by("two_services")

    assert 2 == printed.count("the carrier was told nothing")
