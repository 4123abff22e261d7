"""
urllib3: the correlation goes with each request, to hosts in `propagate_to`.

Covers every pool and manager, also those that exist already, and whatever is built on
them, such as requests.  Each attempt and each hop of a redirect is decided on its own.
The caller's headers are never changed, and never overruled.  No events are made.  Opt
out by `uninstall()`, or by leaving the host out of `propagate_to`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgtrack._diagnostics import internal_error
from pgtrack.integrations._outbound import Outbound, absent
from pgtrack.integrations._patches import Patches
from pgtrack.integrations._requirement import requirement

with requirement("urllib3", extra="urllib3"):
    import urllib3
    from urllib3.util import parse_url

if TYPE_CHECKING:
    from pgtrack._client import Client

__all__ = ["correlate", "install", "uninstall"]

_outbound = Outbound()
_patches = Patches()


def install(*, client: Client | None = None) -> None:
    """
    Send the correlation along with requests of urllib3.

    Again, with another client, it replaces that.

    Args:
        client: Whose `propagate_to` counts, instead of that of the default client.
    """
    _outbound.client = client
    _patches.install((urllib3.HTTPConnectionPool, "_make_request", _make_request))


def uninstall() -> None:
    """Undo `install`."""
    _patches.uninstall()


def _make_request(
    wrapped: Any, pool: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return wrapped(*args, **correlate(_outbound, pool, args, kwargs))


def correlate(
    outbound: Outbound, pool: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """
    Return *kwargs* of `HTTPConnectionPool._make_request`, with more headers.

    That is where one attempt is made to one host, below redirects and retries, which go
    on with the headers of the caller.
    """
    try:
        found = _headers(outbound, pool, kwargs["url"] if "url" in kwargs else args[2])
        given = kwargs.get("headers")
        if found and len(args) < _WITH_HEADERS:
            headers = {} if given is None else given.copy()
            headers.update(absent(found, headers))
            return {**kwargs, "headers": headers}
    except Exception as error:  # noqa: BLE001  the host's request must go out
        internal_error(error)
    return kwargs


_WITH_HEADERS = 5
"""So many positional arguments include the headers; urllib3 itself gives three."""


def _headers(outbound: Outbound, pool: Any, target: str) -> dict[str, str]:
    """
    Return the headers for a request to *pool*, whose first line has *target*.

    A whole URL is for proxies.  Where the pool is one by its own words, the host in the
    URL counts; else both have to be listed.
    """
    url = parse_url(target)
    is_whole = url.scheme is not None and url.host is not None
    found: dict[str, str] = {}
    if pool.proxy is None or not is_whole:
        found = outbound.headers(pool.scheme, pool.host, pool.port)
    if is_whole and (found or pool.proxy is not None):
        found = outbound.headers(str(url.scheme), str(url.host), url.port)
    return found
