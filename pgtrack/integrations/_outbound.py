"""
What the integrations of HTTP and RPC clients share: the headers for a destination.

The public ones alone, `X-Session-ID` and `X-Request-ID`, and only for hosts that the
setting `propagate_to` lists.  Each hop is decided on its own, where its host is known
for certain: an integration never looks at a URL that its library does not itself take
apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgtrack import _api
from pgtrack._context import current_frame
from pgtrack._destinations import destinations
from pgtrack._diagnostics import internal_error
from pgtrack._propagation import inject

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgtrack._client import Client

__all__ = ["Outbound", "absent"]


class Outbound:
    """
    What goes out with requests.

    Attributes:
        client: Whose `propagate_to` counts, instead of that of the default client.
    """

    __slots__ = ("client",)

    def __init__(self, client: Client | None = None) -> None:
        self.client = client

    def headers(self, scheme: str, host: str, port: int | None) -> dict[str, str]:
        """
        Return the headers for one destination; raises nothing.

        There are none outside of any session, for a host that is not listed, and for
        what pgtrack itself sends.

        Args:
            scheme: As in the URL, in lower case; it has the default port.

            host: The host alone, with other scripts as `xn--`.

            port: The port, or None for the default one.
        """
        frame = current_frame()
        if frame is None or frame.session_id is None or frame.is_suppressed:
            return {}
        try:
            client = _api.default_client() if self.client is None else self.client
            listed = client.config.propagate_to
            if listed and destinations(listed)(scheme, host, port):
                return inject(frame)
        except Exception as error:  # noqa: BLE001  the host's call must go on
            internal_error(error)
        return {}


def absent(headers: dict[str, str], names: Iterable[object]) -> dict[str, str]:
    """Return those of *headers* that are not among *names*, in whatever case."""
    taken = {
        (name.decode("latin-1") if isinstance(name, bytes) else str(name)).lower()
        for name in names
    }
    return {name: value for name, value in headers.items() if name.lower() not in taken}
