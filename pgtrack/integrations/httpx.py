"""
httpx and httpx2: the correlation goes with each request, to hosts in `propagate_to`.

Covers every client, sync and async, also those that exist already, with whatever
transport.  Each hop of a redirect, and each attempt of an authentication, is decided on
its own.  The caller's request and headers are never changed, and never overruled: what
goes out is a copy.  No events are made.  Opt out by `uninstall()`, or by leaving the
host out of `propagate_to`.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from pgtrack._diagnostics import internal_error
from pgtrack.integrations._outbound import Outbound, absent
from pgtrack.integrations._patches import Patches
from pgtrack.integrations._requirement import requirement

with requirement("httpx", extra="httpx"):
    import httpx

if TYPE_CHECKING:
    from pgtrack._client import Client

__all__ = ["install", "uninstall"]

_outbound = Outbound()
_patches = Patches()


def install(*, client: Client | None = None) -> None:
    """
    Send the correlation along with requests of httpx, and of httpx2 where it is there.

    Again, with another client, it replaces that.

    Args:
        client: Whose `propagate_to` counts, instead of that of the default client.
    """
    _outbound.client = client
    modules: list[Any] = [httpx]
    with contextlib.suppress(ImportError):
        modules.append(importlib.import_module("httpx2"))
    # httpx2 may stand in for httpx, under its name.
    classes = {
        kind for module in modules for kind in (module.Client, module.AsyncClient)
    }
    _patches.install(
        *((kind, "_transport_for_url", _transport_for_url) for kind in classes)
    )


def uninstall() -> None:
    """Undo `install`."""
    _patches.uninstall()


def _transport_for_url(
    wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """
    Return the transport for one hop, such that it sends the correlation along.

    Clients ask for it once for each hop.  Around the transport rather than around the
    client's own steps: those go on to see the caller's request.
    """
    transport = wrapped(*args, **kwargs)
    try:
        url = kwargs["url"] if "url" in kwargs else args[0]
        host = url.raw_host.decode("ascii")
        headers = _outbound.headers(url.scheme, host, url.port)
        return _Transport(transport, headers) if headers else transport
    except Exception as error:  # noqa: BLE001  the host's request must go out
        internal_error(error)
        return transport


class _Transport(wrapt.ObjectProxy):  # type: ignore[misc, type-arg, unused-ignore]
    """A transport, for one request that gets more headers."""

    def __init__(self, transport: Any, headers: dict[str, str]) -> None:
        super().__init__(transport)
        self._self_headers = headers

    def handle_request(self, request: Any) -> Any:
        sent = _Sent(request, self._self_headers)
        try:
            return self.__wrapped__.handle_request(sent.copy)
        finally:
            sent.give_back()

    async def handle_async_request(self, request: Any) -> Any:
        sent = _Sent(request, self._self_headers)
        try:
            return await self.__wrapped__.handle_async_request(sent.copy)
        finally:
            sent.give_back()


class _Sent:
    """
    What goes out in place of a request: a copy with more headers.

    Attributes:
        copy: The copy; the request itself where there can be none.
    """

    __slots__ = ("_added", "_headers", "_request", "copy")

    def __init__(self, request: Any, headers: dict[str, str]) -> None:
        self.copy = self._request = request
        try:
            self._added = absent(headers, request.headers)
            copy = object.__new__(type(request))
            vars(copy).update(vars(request))
            copy.headers = request.headers.copy()
            copy.headers.update(self._added)
            self._headers = copy.headers.copy()
            self.copy = copy
        except Exception as error:  # noqa: BLE001  the host's request must go out
            internal_error(error)

    def give_back(self) -> None:
        """Let the request have what the transport made of it, such as a body read."""
        if self.copy is self._request:
            return
        learned = dict(vars(self.copy))
        headers = learned.pop("headers")
        vars(self._request).update(learned)
        if headers != self._headers:
            headers = headers.copy()
            for name in self._added:
                headers.pop(name, None)
            self._request.headers = headers
