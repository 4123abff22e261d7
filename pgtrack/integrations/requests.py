"""
requests: the correlation goes with each request, to hosts in `propagate_to`.

Covers every session, also those that exist already, and every adapter that builds on
`HTTPAdapter`.  Each attempt and each hop of a redirect is decided on its own.  The
caller's requests and headers are never changed, and never overruled.  No events are
made.  Opt out by `uninstall()`, or by leaving the host out of `propagate_to`.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from pgtrack.integrations._outbound import Outbound
from pgtrack.integrations._patches import Patches
from pgtrack.integrations._requirement import requirement

with requirement("requests", extra="requests"):
    import requests.adapters
    import urllib3

if TYPE_CHECKING:
    from pgtrack._client import Client

from pgtrack.integrations.urllib3 import correlate

__all__ = ["install", "uninstall"]

_outbound = Outbound()
_patches = Patches()
_is_sending: ContextVar[bool] = ContextVar("pgtrack_requests", default=False)


def install(*, client: Client | None = None) -> None:
    """
    Send the correlation along with requests of requests.

    Again, with another client, it replaces that.

    Args:
        client: Whose `propagate_to` counts, instead of that of the default client.
    """
    _outbound.client = client
    _patches.install(
        (requests.adapters.HTTPAdapter, "send", _send),
        (urllib3.HTTPConnectionPool, "_make_request", _make_request),
    )


def uninstall() -> None:
    """Undo `install`."""
    _patches.uninstall()


def _send(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Send one hop, by attempts of urllib3: there the host is known for certain."""
    token = _is_sending.set(True)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _is_sending.reset(token)


def _make_request(
    wrapped: Any, pool: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if _is_sending.get():
        kwargs = correlate(_outbound, pool, args, kwargs)
    return wrapped(*args, **kwargs)
