"""
Flask: the correlation of each request, and one `api.response` event.

`install` puts the middleware of `pgtrack.integrations.wsgi` around everything that the
application has, its handling of errors included, so that a 500 carries the request id,
too.  Flask's own signals tell the route and what a 500 is of.  Commands of `flask` and
contexts that are pushed by hand are left alone.  Opt out by `track=False` for the
events, and by `exclude` for those of some paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgtrack._diagnostics import internal_error
from pgtrack.integrations._http import SERVED
from pgtrack.integrations._requirement import requirement
from pgtrack.integrations.wsgi import Middleware

with requirement("flask", extra="flask"):
    from flask import Flask, got_request_exception, request, request_started

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgtrack._client import Client

__all__ = ["install"]

_KEY = "pgtrack"
"""Where in `app.extensions` an application says that it has the middleware."""


def install(
    app: Flask,
    *,
    client: Client | None = None,
    track: bool = True,
    exclude: str | Iterable[str] = (),
) -> None:
    """
    Serve each request of *app* under its correlation.

    Works before and after the application's first request.  What is put around
    `app.wsgi_app` later runs outside, as is right for `ProxyFix`.  Again on the same
    application it does nothing.

    Args:
        app: The application; its blueprints come with it.

        client: Instead of the default client.

        track: Whether each request makes an `api.response` event.

        exclude: The paths of requests that make none; `*` stands for any text.

    Raises:
        TypeError: If *app* is no Flask application, or a path no text.
    """
    given: object = app
    if not isinstance(given, Flask):
        msg = (
            f"install() needs a Flask application (got {type(given).__name__}). "
            "Blueprints come with the application that they are registered on."
        )
        raise TypeError(msg)
    middleware = Middleware(app.wsgi_app, client=client, track=track, exclude=exclude)
    if _KEY in app.extensions:
        return
    app.extensions[_KEY] = middleware
    app.wsgi_app = middleware  # type: ignore[method-assign]
    # From any application: one that is mounted in this one is served with it.
    request_started.connect(_tell_route)
    got_request_exception.connect(_tell_error)


def _tell_route(sender: Flask, **_: Any) -> None:
    """Add the template of the matched rule, behind where the application is mounted."""
    del sender
    try:
        served = request.environ.get(SERVED)
        rule = request.url_rule
        if served is not None and rule is not None:
            route = request.root_path.rstrip("/") + rule.rule
            served.request.find_route = lambda: route
    except Exception as error:  # noqa: BLE001  the host must go on
        internal_error(error)


def _tell_error(sender: Flask, exception: BaseException, **_: Any) -> None:
    """Add the exception that Flask answers by 500, or lets go on."""
    del sender
    try:
        served = request.environ.get(SERVED)
        if served is not None:
            served.request.error = exception
    except Exception as error:  # noqa: BLE001  the host must go on
        internal_error(error)
