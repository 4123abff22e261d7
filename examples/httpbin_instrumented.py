"""
httpbin, a Flask application of others, tracked from outside without touching its code.

Run it with `python examples/httpbin_instrumented.py`; it needs `pip install httpbin`.
Events are printed unless `PRODUCTGRAPH_ENDPOINT` says where to send them.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

import httpx
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

import pgtrack

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flask import Flask


class Tracked:
    """
    The application as WSGI sees it, with one `api.response` event for each request.

    The event has the route, not the path: paths are endless, and this application's
    `/basic-auth/<user>/<passwd>` shows that they may hold secrets.
    """

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.inner = app.wsgi_app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Serve one request in the session that its headers name."""
        headers = {
            name.removeprefix("HTTP_").replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        method, route = environ["REQUEST_METHOD"], self.route_of(environ)
        with pgtrack.continued_from(headers), pgtrack.api_call(method, route) as call:

            def start(status: str, *rest: Any) -> Any:
                call.status_code = int(status[:3])
                return start_response(status, *rest)

            return self.inner(environ, start)

    def route_of(self, environ: dict[str, Any]) -> str:
        """Return the template that the path fits."""
        try:
            rule, _ = self.app.url_map.bind_to_environ(environ).match(return_rule=True)
        except HTTPException:
            return "(no route)"
        return str(rule.rule)


VISITS = [
    ("sess_frontend_ann", "GET", "/get?q=lamps"),
    ("sess_frontend_ann", "POST", "/post"),
    ("sess_frontend_ben", "GET", "/status/404"),
    ("sess_frontend_ben", "GET", "/basic-auth/ben/s3cr3t"),
    ("sess_frontend_ben", "GET", "/nothing/here"),
    ("sess_frontend_cho", "GET", "/delay/0.05"),
    ("sess_frontend_cho", "GET", "/status/503"),
]


def main() -> None:
    """Serve httpbin on a free port of this machine, and call it."""
    pgtrack.configure(
        project_id=os.environ.get("PRODUCTGRAPH_PROJECT_ID", "proj_demo"),
        endpoint=os.environ.get("PRODUCTGRAPH_ENDPOINT", "console:"),
    )
    for name in ("httpbin", "werkzeug"):  # not what this is about
        logging.getLogger(name).setLevel(logging.ERROR)
    from httpbin import app  # noqa: PLC0415  logs while it is imported

    app.wsgi_app = Tracked(app)  # that is all

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
            for session_id, method, path in VISITS:
                client.request(method, path, headers={"X-Session-ID": session_id})
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    pgtrack.shutdown()
    stats = pgtrack.stats()
    print(f"\n{stats.emitted} events emitted, {stats.delivered} delivered.")


if __name__ == "__main__":
    main()
