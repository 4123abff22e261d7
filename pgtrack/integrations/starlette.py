"""
Starlette and FastAPI: the correlation of each request, and one `api.response` event.

`install` puts the middleware of `pgtrack.integrations.asgi` around everything that the
application has, its handling of errors included, so that a 500 carries the request id,
too.  Nothing else of the application is touched.  Opt out by `track=False` for the
events, and by `exclude` for those of some paths.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from pgtrack.integrations._requirement import requirement
from pgtrack.integrations.asgi import Middleware

with requirement("starlette", extra="starlette"):
    from starlette.applications import Starlette

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp

    from pgtrack._client import Client

__all__ = ["install"]


def install(
    app: Starlette,
    *,
    client: Client | None = None,
    track: bool = True,
    exclude: str | Iterable[str] = (),
) -> None:
    """
    Serve each request of *app* under its correlation.

    Works before and after the application's first request; whatever middleware it has,
    and is given later, runs inside.  Again on the same application it does nothing.

    Args:
        app: The application of Starlette or FastAPI.

        client: Instead of the default client.

        track: Whether each HTTP request makes an `api.response` event.

        exclude: The paths of requests that make none; `*` stands for any text.

    Raises:
        TypeError: If *app* is no such application, or a path no text.
    """
    given: object = app
    if not isinstance(given, Starlette):
        msg = (
            "install() needs an application of Starlette or FastAPI (got "
            f"{type(given).__name__}). Wrap any other by pgtrack.integrations.asgi."
        )
        raise TypeError(msg)
    middleware = Middleware(app, client=client, track=track, exclude=exclude)
    if app in _installed:
        return
    _installed.add(app)
    build = app.build_middleware_stack

    def build_inside() -> ASGIApp:
        middleware.app = build()
        return middleware

    app.build_middleware_stack = build_inside  # type: ignore[method-assign]
    if app.middleware_stack is not None:  # it has been built, and is kept as it is
        middleware.app = app.middleware_stack
        app.middleware_stack = middleware


_installed: weakref.WeakSet[Starlette] = weakref.WeakSet()
