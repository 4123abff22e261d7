"""
A pytest plugin that puts pgtrack around every application that a suite builds.

Loaded by `run.py` into the test suites of others, by `-p wrapping`.  What it does comes
from variables: `WRAPPING` names how (see `_WRAPS`), `WRAPPING_EVENTS` the file that
events go to; without it pgtrack stays unconfigured.  `WRAPPING_REPORT` is a file for
what it saw.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pgtrack
from pgtrack.integrations import _http, asgi, wsgi

if TYPE_CHECKING:
    from collections.abc import Callable

_requests = itertools.count()
"""Moves with each request that is served."""


def pytest_configure() -> None:
    """Configure pgtrack, and patch whatever builds or tests applications."""
    events = os.environ.get("WRAPPING_EVENTS")
    if events is not None:
        pgtrack.configure(project_id="hosts", endpoint=f"file:{events}")
    begin = _http.Serving.begin

    def begin_and_count(*args: Any, **named: Any) -> Any:
        next(_requests)
        return begin(*args, **named)

    _http.Serving.begin = begin_and_count  # type: ignore[method-assign]
    for wrap in _WRAPS[os.environ["WRAPPING"]]:
        wrap()


def pytest_unconfigure() -> None:
    """Report how much there was to see; `run.py` takes nothing for a failure."""
    pgtrack.shutdown(20)
    stats = pgtrack.stats()
    report = {
        "requests": next(_requests),
        "events": stats.delivered,
        "dropped": dict(stats.dropped),
    }
    Path(os.environ["WRAPPING_REPORT"]).write_text(json.dumps(report), "utf-8")


def _after(kind: type, verb: str, function: Callable[[Any], None]) -> None:
    """Call *function* with each object after *verb* of its class."""
    original = getattr(kind, verb)

    @functools.wraps(original)
    def both(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        function(self)

    setattr(kind, verb, both)


# --- Starlette ---


def _in_test_client() -> None:
    """Put the middleware around any application that a test client is given."""
    from starlette.testclient import TestClient

    def wrap(client: Any) -> None:
        client._transport.app = asgi.Middleware(client._transport.app)

    _after(TestClient, "__init__", wrap)
    lifespan = TestClient.lifespan

    async def wrapped_lifespan(self: Any) -> None:
        inner, self.app = self.app, asgi.Middleware(self.app)
        try:
            await lifespan(self)
        finally:
            self.app = inner

    TestClient.lifespan = wrapped_lifespan  # type: ignore[method-assign]


def _in_starlette() -> None:
    """Install it in each application of Starlette's."""
    from starlette.applications import Starlette

    from pgtrack.integrations import starlette

    _after(Starlette, "__init__", starlette.install)


# --- Flask ---


def _around_flask() -> None:
    """Put the middleware around each application of Flask's."""
    from flask import Flask

    def wrap(app: Any) -> None:
        app.wsgi_app = wsgi.Middleware(app.wsgi_app)

    _after(Flask, "__init__", wrap)


def _in_flask() -> None:
    """Install it in each application of Flask's."""
    from flask import Flask

    from pgtrack.integrations import flask

    _after(Flask, "__init__", flask.install)


# --- Werkzeug ---


def _in_werkzeug_client() -> None:
    """Put the middleware around any application that a test client is given."""
    from werkzeug.test import Client

    def wrap(client: Any) -> None:
        client.application = wsgi.Middleware(client.application)

    _after(Client, "__init__", wrap)


_WRAPS: dict[str, tuple[Callable[[], None], ...]] = {
    "starlette-middleware": (_in_test_client,),
    "starlette-installed": (_in_starlette,),
    "starlette-twice": (_in_starlette, _in_test_client, _in_test_client),
    "flask-middleware": (_around_flask,),
    "flask-installed": (_in_flask,),
    "flask-twice": (_in_flask, _around_flask, _around_flask),
    "werkzeug-middleware": (_in_werkzeug_client,),
    "werkzeug-twice": (_in_werkzeug_client, _in_werkzeug_client),
}
