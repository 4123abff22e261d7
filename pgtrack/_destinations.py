"""
Which hosts get the correlation: what `propagate_to` lists.

Hosts are compared as text, in the form in which they travel; nothing is resolved.
What is not plainly a listed host is none: the correlation rather stays here than goes
to a stranger.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pattern", "destinations", "parse"]

_PATTERN = re.compile(
    r"(\*(?=\.))?(\.?[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?"
)
_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*").fullmatch
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_MAX_PORT = 65_535


class Pattern(NamedTuple):
    """
    One entry of `propagate_to`.

    Attributes:
        host: A host as `_normal` returns it, or `.suffix`.

        port: The one port, or None for any.
    """

    host: str
    port: int | None


def parse(text: str) -> Pattern | None:
    """Return what `host`, `*.suffix`, `host:port` or `[::1]:port` means, else None."""
    match = _PATTERN.fullmatch(text.lower())
    if match is None:
        return None
    star, host, digits = match.groups()
    port = None if digits is None else int(digits)
    if (host[0] == ".") != (star is not None) or (port or 1) > _MAX_PORT or port == 0:
        return None
    name = _normal(host.removeprefix("."))
    return None if name is None else Pattern("." + name if star else name, port)


def _normal(host: str) -> str | None:
    """
    Return *host* in the one form that is compared, or None where it is no plain host.

    Lower case, without the dot of the root; an IPv6 address in its short form.  Letters
    beyond ASCII are to come as `xn--`, since each library maps them in its own way.
    """
    if not host.isascii():
        return None
    host = host.lower()
    if ":" not in host:
        name = host.removesuffix(".")
        return name if _NAME(name) else None
    import ipaddress  # noqa: PLC0415  slow to load, and hardly ever needed

    try:
        return str(ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return None


@functools.lru_cache(maxsize=64)
def destinations(texts: tuple[str, ...]) -> Callable[[str, str, int | None], bool]:
    """
    Return what tells whether a destination is among those that *texts* list.

    It takes the scheme, which has a default port; the host, without user and port, and
    with names of other scripts as `xn--`; and the port, None for the default one.
    """
    patterns = [pattern for pattern in map(parse, texts) if pattern is not None]
    exact = {pattern for pattern in patterns if pattern.host[0] != "."}
    suffixes = [pattern for pattern in patterns if pattern.host[0] == "."]

    def includes(scheme: str, host: str, port: int | None) -> bool:
        name = _normal(host)
        if name is None:
            return False
        if port is None:
            port = _DEFAULT_PORTS.get(scheme)
        return (
            (name, None) in exact
            or (name, port) in exact
            or any(
                name.endswith(suffix) and expected in {None, port}
                for suffix, expected in suffixes
            )
        )

    return includes
