"""urllib3: what is its alone; test_outbound.py has what all clients share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import Reply, Server

urllib3 = pytest.importorskip("urllib3")

from pgtrack.integrations import urllib3 as integration  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(name="server")
def _server() -> Iterator[Server]:
    with Server() as server:
        server.default = lambda _: Reply(204)
        yield server


@pytest.fixture(name="port")
def _port(server: Server) -> int:
    return server.address[1]


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    integration.install()
    pgtrack.configure(propagate_to=["127.0.0.1", "a.example"])
    yield
    integration.uninstall()


def sessions(server: Server) -> list[str | None]:
    """Return the session that each request carried."""
    return [request.headers.get("x-session-id") for request in server.requests]


def test_pools(server: Server, port: int) -> None:
    """A pool by itself is covered, with headers of its own and without."""
    with (
        pgtrack.session("sess_ann"),
        urllib3.HTTPConnectionPool("127.0.0.1", port) as pool,
    ):
        pool.request("GET", "/")
        pool.urlopen("GET", "/", headers=urllib3.HTTPHeaderDict(a="1"))
        pool.urlopen("GET", "/", headers={"X-Session-Id": "mine"})

    assert ["sess_ann", "sess_ann", "mine"] == sessions(server)


def test_headers_of_the_manager(server: Server, port: int) -> None:
    """Headers that a manager gives to all of its requests win, and do not change."""
    headers = {"x-session-ID": "mine"}
    with pgtrack.session("sess_ann"), urllib3.PoolManager(headers=headers) as manager:
        manager.request("GET", f"http://127.0.0.1:{port}/")

    assert ["mine"] == sessions(server)
    assert {"x-session-ID": "mine"} == headers


def test_retries(server: Server, port: int) -> None:
    """Each retry has the headers, once; also where the connection broke."""
    server.script.extend([lambda _: None, lambda _: Reply(503)])
    retries = urllib3.Retry(3, status_forcelist=[503], backoff_factor=0)
    with pgtrack.session("sess_ann"), urllib3.PoolManager(retries=retries) as manager:
        manager.request("GET", f"http://127.0.0.1:{port}/")

    assert ["sess_ann"] * 3 == sessions(server)


def test_proxies(server: Server, port: int) -> None:
    """A proxy gets the headers for hosts behind it, not with CONNECT nor for itself."""
    with (
        pgtrack.session("sess_ann"),
        urllib3.ProxyManager(f"http://127.0.0.1:{port}", retries=False) as proxy,
    ):
        proxy.request("GET", "http://a.example/x")
        proxy.request("GET", "http://b.example/x")
        with pytest.raises(urllib3.exceptions.HTTPError):
            proxy.request("GET", "https://a.example/x")

    assert [
        ("GET", "http://a.example/x", "sess_ann"),
        ("GET", "http://b.example/x", None),
        ("CONNECT", "a.example:443", None),
    ] == [(r.method, r.path, r.headers.get("x-session-id")) for r in server.requests]


@pytest.mark.parametrize(
    ("listed", "target", "expected"),
    [
        (["127.0.0.1"], "http://b.example/", None),
        (["b.example"], "http://b.example/", None),
        (["127.0.0.1", "b.example"], "http://b.example/", "sess_ann"),
        (["127.0.0.1"], "/http://b.example/", "sess_ann"),
        (["127.0.0.1"], "//b.example/", "sess_ann"),
    ],
)
def test_whole_urls(server, port, listed, target, expected) -> None:
    """A pool that is asked for another host needs both to be listed."""
    pgtrack.configure(propagate_to=listed)
    with (
        pgtrack.session("sess_ann"),
        urllib3.HTTPConnectionPool("127.0.0.1", port) as pool,
    ):
        pool.urlopen("GET", target, assert_same_host=False)

    assert [expected] == sessions(server)


def test_redirect_within_a_pool(server: Server, port: int) -> None:
    """A redirect that a pool takes as another host's gets nothing there."""
    server.script.append(lambda _: Reply(302, {"Location": "http://b.example/"}))
    with (
        pgtrack.session("sess_ann"),
        urllib3.HTTPConnectionPool("127.0.0.1", port) as pool,
    ):
        pool.urlopen("GET", "/", assert_same_host=False)

    assert ["sess_ann", None] == sessions(server)


def test_subclasses(server: Server, port: int) -> None:
    """A pool that passes the headers on by position is left as it is."""

    class Mine(urllib3.HTTPConnectionPool):  # type: ignore[misc, name-defined]
        def _make_request(self, conn: Any, method: str, url: str, **more: Any) -> Any:
            body, headers = more.pop("body"), more.pop("headers")
            return super()._make_request(conn, method, url, body, headers, **more)

    with pgtrack.session("sess_ann"), Mine("127.0.0.1", port) as pool:
        status = pool.request("GET", "/").status

    assert 204 == status
    assert [None] == sessions(server)
