"""
aiohttp: the correlation goes with each request of its client, to `propagate_to`.

Covers every `ClientSession`, also those that exist already, and the handshakes of
WebSockets.  Each attempt and each hop of a redirect is decided on its own.  The headers
of the caller are never changed, and never overruled.  No events are made.  Opt out by
`uninstall()`, or by leaving the host out of `propagate_to`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgtrack._diagnostics import internal_error
from pgtrack.integrations._outbound import Outbound, absent
from pgtrack.integrations._patches import Patches
from pgtrack.integrations._requirement import requirement

with requirement("aiohttp", extra="aiohttp"):
    import aiohttp

if TYPE_CHECKING:
    from pgtrack._client import Client

__all__ = ["install", "uninstall"]

_outbound = Outbound()
_patches = Patches()


def install(*, client: Client | None = None) -> None:
    """
    Send the correlation along with requests of aiohttp's client.

    Again, with another client, it replaces that.

    Args:
        client: Whose `propagate_to` counts, instead of that of the default client.
    """
    _outbound.client = client
    _patches.install((aiohttp.ClientRequest, "send", _send))


def uninstall() -> None:
    """Undo `install`."""
    _patches.uninstall()


async def _send(
    wrapped: Any, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """
    Send one attempt of one hop, which has a request of its own.

    Tracing hooks of a session would not do: they see the headers that all hops share.
    """
    headers = request.headers
    try:
        request.headers = _correlated(request)
    except Exception as error:  # noqa: BLE001  the host's request must go out
        internal_error(error)
    try:
        return await wrapped(*args, **kwargs)
    finally:
        request.headers = headers


def _correlated(request: Any) -> Any:
    """Return the headers that go out; those of a CONNECT to a proxy are left alone."""
    url = request.url
    if request.method == "CONNECT" or url.raw_host is None:
        return request.headers
    found = _outbound.headers(url.scheme, url.raw_host, url.port)
    if not found:
        return request.headers
    headers = request.headers.copy()
    headers.update(absent(found, headers))
    return headers
