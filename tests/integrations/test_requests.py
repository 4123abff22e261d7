"""requests: what is its alone; test_outbound.py has what all clients share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import Reply, Server

requests = pytest.importorskip("requests")
urllib3 = pytest.importorskip("urllib3")

from pgtrack.integrations import requests as integration  # noqa: E402
from pgtrack.integrations import urllib3 as below  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(name="server")
def _server() -> Iterator[Server]:
    with Server() as server:
        server.default = lambda _: Reply(204)
        yield server


@pytest.fixture(name="url")
def _url(server: Server) -> str:
    return f"http://127.0.0.1:{server.address[1]}/"


@pytest.fixture(name="session")
def _session() -> Iterator[Any]:
    integration.install()
    pgtrack.configure(propagate_to=["127.0.0.1", "a.example"])
    with requests.Session() as session:
        session.trust_env = False
        yield session
    integration.uninstall()
    below.uninstall()


def sessions(server: Server) -> list[str | None]:
    """Return the session that each request carried."""
    return [request.headers.get("x-session-id") for request in server.requests]


def test_prepared_requests_are_not_changed(session, server, url) -> None:
    """A request that is sent again carries no earlier session, and is not replaced."""
    prepared = session.prepare_request(requests.Request("GET", url))
    before = dict(prepared.headers)
    with pgtrack.session("ann"):
        response = session.send(prepared)
    with pgtrack.session("ben"):
        session.send(prepared)
    session.send(prepared)

    assert ["ann", "ben", None] == sessions(server)
    assert response.request is prepared
    assert before == dict(prepared.headers)


def test_headers_of_the_session(session, server, url) -> None:
    """Headers that the session gives to all of its requests win, bytes as well."""
    session.headers[b"x-SESSION-id"] = b"mine"
    with pgtrack.session("sess_ann"):
        session.get(url)

    assert ["mine"] == sessions(server)


def test_together_with_urllib3(session, server, url) -> None:
    """Installed on both layers the headers are added once."""
    below.install()
    with pgtrack.session("sess_ann"):
        session.get(url)
        below.uninstall()
        session.get(url)

    assert ["sess_ann"] * 2 == sessions(server)


def test_urllib3_itself_is_left_alone(session, server, url) -> None:
    """Requests that urllib3 makes for others carry nothing."""
    with pgtrack.session("sess_ann"), urllib3.PoolManager() as pool:
        pool.request("GET", url)

    assert [None] == sessions(server)


def test_each_attempt_of_an_authentication(session, server, url) -> None:
    """The second request of a digest authentication has the headers as well."""
    challenge = {"WWW-Authenticate": 'Digest realm="r", nonce="n", algorithm=MD5'}
    server.script.append(lambda _: Reply(401, challenge))
    with pgtrack.session("sess_ann"):
        session.get(url, auth=requests.auth.HTTPDigestAuth("ann", "secret"))

    assert ["sess_ann"] * 2 == sessions(server)


def test_retries(session, server, url) -> None:
    """Each retry has the headers, once."""
    server.script.extend([lambda _: Reply(503)] * 2)
    retry = urllib3.Retry(3, status_forcelist=[503], backoff_factor=0)
    session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retry))
    with pgtrack.session("sess_ann"):
        session.get(url)

    assert ["sess_ann"] * 3 == sessions(server)


def test_adapters_of_others(session, server, url) -> None:
    """An adapter that builds on HTTPAdapter is covered; one of another kind is not."""

    class Mine(requests.adapters.HTTPAdapter):  # type: ignore[misc, name-defined]
        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            request.headers["X-Mine"] = "1"
            return super().send(request, *args, **kwargs)

    session.mount("http://", Mine())
    with pgtrack.session("sess_ann"):
        response = session.get(url)

    assert ["sess_ann"] == sessions(server)
    assert "1" == response.request.headers["X-Mine"]


def test_streams(session, server, url) -> None:
    """A streamed body and a streamed answer stay such."""
    server.default = lambda _: Reply(200, body=b"abc")
    with pgtrack.session("sess_ann"):
        response = session.post(url, data=iter([b"a", b"b"]), stream=True)

    assert b"abc" == b"".join(response.iter_content(1))
    assert b"ab" == server.requests[0].body
    assert ["sess_ann"] == sessions(server)


def test_proxies(session, server) -> None:
    """A proxy gets the headers with the request, not with CONNECT."""
    proxy = f"http://127.0.0.1:{server.address[1]}"
    session.proxies = {"http": proxy, "https": proxy}
    pgtrack.configure(propagate_to=["a.example"])
    with pgtrack.session("sess_ann"):
        session.get("http://a.example/x")
        session.get("http://b.example/x")
        with pytest.raises(requests.exceptions.RequestException):
            session.get("https://a.example/x")

    assert [
        ("GET", "http://a.example/x", "sess_ann"),
        ("GET", "http://b.example/x", None),
        ("CONNECT", "a.example:443", None),
    ] == [(r.method, r.path, r.headers.get("x-session-id")) for r in server.requests]
