"""The technical document that pgtrack implements: its events and both of its tests."""

from __future__ import annotations

import re

import pytest
from freezegun import freeze_time

import pgtrack
from harness import ProductGraph, Server

BASE = {
    "project_id": "proj_backend",
    "session.id": "sess_frontend_123",
    "event.timestamp": "2026-04-27T10:30:00Z",
}

SAMPLES = {
    "api response": {
        **BASE,
        "event.type": "api.response",
        "api.method": "POST",
        "api.path": "/api/v1/checkout",
        "api.status_code": 200,
        "api.duration_ms": 150,
    },
    "error": {
        **BASE,
        "event.type": "error",
        "error.type": "ValidationError",
        "error.message": "invalid card number",
    },
    "journey step": {
        **BASE,
        "event.type": "journey.step",
        "gen_ai.journey.id": "checkout_flow",
        "gen_ai.journey.step.id": "payment_confirmed",
        "gen_ai.journey.step.name": "Payment Confirmed",
    },
}
"""The sample events, but for their ids."""

VERBS = {
    "api response": lambda client: client.track_api_call(
        "POST", "/api/v1/checkout", 200, duration=0.150
    ),
    "error": lambda client: client.track_error(
        "ValidationError", "invalid card number"
    ),
    "journey step": lambda client: client.track_journey_step(
        "checkout_flow", "payment_confirmed", "Payment Confirmed"
    ),
}


@pytest.fixture(name="server")
def _server():
    with Server(ProductGraph("v0.1.0")) as server:
        yield server


@pytest.mark.parametrize("name", SAMPLES)
def test_the_verbs_send_the_sample_events(server: Server, name: str) -> None:
    """Each verb sends the document's sample, with six digits of a second."""
    config = pgtrack.Config(project_id="proj_backend", endpoint=server.url)
    with pgtrack.Client(config) as client:
        session = pgtrack.session("sess_frontend_123")
        with freeze_time("2026-04-27T10:30:00Z"), session:
            VERBS[name](client)
        assert client.flush(10)
    (event,) = server.events
    stamp = event["event.timestamp"].replace(".000000Z", "Z")
    more = {key: event[key] for key in event.keys() - SAMPLES[name].keys()}

    assert event == {
        **SAMPLES[name],
        **more,
        "event.timestamp": stamp[:-1] + ".000000Z",
    }
    assert stamp == SAMPLES[name]["event.timestamp"]
    assert more == {
        "event_id": event["event_id"],
        "product_id": "proj_backend",
        "metadata": {"source": "backend"},
    }
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", event["event_id"])


def test_the_correlation_is_read_off_the_header() -> None:
    """The document's first test: the session of the header is the handler's."""
    with pgtrack.continued_from({"X-Session-ID": "sess_123"}):
        session_id = pgtrack.current().session_id

    assert session_id == "sess_123"


def test_a_batch_of_one_is_posted_at_once(server: Server) -> None:
    """The document's second test: one event, posted as JSON, without a flush."""
    config = pgtrack.Config(project_id="test", endpoint=server.url, batch_size=1)
    with pgtrack.Client(config) as client:
        with pgtrack.session("sess_test"):
            client.emit("test")
        assert server.wait_for(1)
    (request,) = server.requests

    assert request.method == "POST"
    assert request.headers["content-type"] == "application/json"
    assert request.events is not None
    assert len(request.events) == 1
    assert request.events[0]["session.id"] == "sess_test"
