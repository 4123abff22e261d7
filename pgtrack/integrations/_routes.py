"""
The template of a route, read off what Starlette and FastAPI leave in the scope.

Nothing of them is imported: what has `matches` and `path_format` is a route, whoever
made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["template_of"]

_REST = "/{path}"
"""How the format of a mount ends: whatever the application below it makes of it."""


def template_of(scope: Mapping[str, Any]) -> str | None:
    """
    Return the template of the path in *scope*, from its very start; None without one.

    A mount changes `root_path`, and leaves what it was in `app_root_path`.  The route
    in the scope, where there is one, is the innermost, and knows nothing of the mounts
    around it; with these the routers are asked again.  What the application is below
    comes first, also where a proxy has stripped it off the path.
    """
    if "router" in scope and "endpoint" not in scope:
        return None  # it was asked, and found nothing
    is_mounted = "app_root_path" in scope
    root = scope.get("app_root_path" if is_mounted else "root_path") or ""
    template = None if is_mounted else _innermost(scope)
    if template is None:
        routes = getattr(scope.get("router", scope.get("app")), "routes", None)
        fresh = {key: scope[key] for key in scope if key not in _LEFT_BY_ROUTERS}
        template = _find(routes or (), {**fresh, "root_path": root})
    return None if template is None else root + template


_LEFT_BY_ROUTERS = {"app_root_path", "endpoint", "fastapi", "path_params", "route"}


def _innermost(scope: Mapping[str, Any]) -> str | None:
    """Return the format of the route in the scope, where there is one."""
    route: Any = scope.get("route")
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is not None and context.original_route is route:
        route = context  # with the prefix that the router was included under
    return _format(route)


def _find(routes: Iterable[Any], scope: dict[str, Any]) -> str | None:
    """Return the template of the route that fits, else of one that nearly does."""
    nearly: tuple[Any, dict[str, Any]] | None = None
    for route in _flat(routes):
        match, changes = route.matches(scope)
        if match.name == "FULL":
            return _below(route, {**scope, **changes})
        if match.name == "PARTIAL" and nearly is None:  # but for the method
            nearly = route, {**scope, **changes}
    return None if nearly is None else _below(*nearly)


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Yield the routes, those of FastAPI's included routers with their prefixes."""
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield route
        else:
            for context in contexts():
                yield context.starlette_route or context


def _below(route: Any, scope: dict[str, Any]) -> str | None:
    """Return the template of a route, or of what a mount or host has below it."""
    template = _format(route)
    if not hasattr(route, "routes"):
        return template
    app, routes = route, route.routes
    while not routes and hasattr(app, "app"):  # middleware around the application
        app = app.app
        routes = getattr(app, "routes", None)
    if not routes:
        return template  # of an application that is none of Starlette's
    below = _find(routes, scope)
    return below and (template or "").removesuffix(_REST) + below


def _format(route: Any) -> str | None:
    """Return the path of a route with the names of its parameters alone."""
    return getattr(route, "path_format", None) or None
