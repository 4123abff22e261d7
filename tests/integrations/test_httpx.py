"""httpx and httpx2: what is theirs; test_outbound.py has what all clients share."""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import Server
from pgtrack import _diagnostics
from pgtrack.integrations import httpx as integration

if TYPE_CHECKING:
    from collections.abc import Iterator

URL = "https://a.example/x"


@pytest.fixture(name="httpx", params=["httpx", "httpx2"])
def _httpx(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip(request.param)
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    integration.install()
    pgtrack.configure(propagate_to=["a.example"])
    yield
    integration.uninstall()


class Transport:
    """A mock transport that keeps the session of each request."""

    def __init__(self, httpx: Any, *answers: Any) -> None:
        self.sessions: list[str | None] = []
        self.requests: list[Any] = []
        self.answers = list(answers)

        def answer(request: Any) -> Any:
            self.requests.append(request)
            self.sessions.append(request.headers.get("x-session-id"))
            return self.answers.pop(0) if self.answers else httpx.Response(200)

        self.mock = httpx.MockTransport(answer)


def test_custom_transports(httpx: Any) -> None:
    """A transport of the caller's own gets the headers, and so does a mounted one."""
    transport = Transport(httpx)
    mounts = {"all://": transport.mock}
    with pgtrack.session("sess_ann"):
        with httpx.Client(transport=transport.mock) as client:
            client.get(URL)
        with httpx.Client(mounts=mounts) as client:
            client.get(URL)

    assert ["sess_ann"] * 2 == transport.sessions


def test_applications_in_process(httpx: Any) -> None:
    """An ASGI application that is called without a socket gets the headers."""
    seen: list[bytes | None] = []

    async def app(scope: Any, _: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]).get(b"x-session-id"))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def main() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport) as client:
            with pgtrack.session("sess_ann"):
                await client.get(URL)
            await client.get(URL)

    asyncio.run(main())

    assert [b"sess_ann", None] == seen


def test_requests_are_not_changed(httpx: Any) -> None:
    """A request that is sent again carries no earlier session, and is not replaced."""
    transport = Transport(httpx)
    with httpx.Client(transport=transport.mock) as client:
        request = client.build_request("GET", URL)
        before = list(request.headers.raw)
        with pgtrack.session("ann"):
            response = client.send(request)
        with pgtrack.session("ben"):
            client.send(request)
        client.send(request)

    assert ["ann", "ben", None] == transport.sessions
    assert response.request is request
    assert before == list(request.headers.raw)


def test_headers_of_the_client(httpx: Any) -> None:
    """Headers that the client gives to all of its requests win."""
    transport = Transport(httpx)
    headers = {"x-SESSION-id": "mine"}
    with (
        httpx.Client(transport=transport.mock, headers=headers) as client,
        pgtrack.session("sess_ann"),
    ):
        client.get(URL)

    assert ["mine"] == transport.sessions
    assert 1 == len(transport.requests[0].headers.get_list("x-session-id"))


def test_hooks_see_the_callers_request(httpx: Any) -> None:
    """Hooks before and behind get the request as it was made."""
    seen: list[Any] = []
    hooks = {"request": [seen.append], "response": [lambda r: seen.append(r.request)]}
    transport = Transport(httpx)
    with (
        httpx.Client(transport=transport.mock, event_hooks=hooks) as client,
        pgtrack.session("sess_ann"),
    ):
        client.get(URL)

    assert seen[0] is seen[1]
    assert "x-session-id" not in seen[0].headers
    assert ["sess_ann"] == transport.sessions


def test_each_attempt_of_an_authentication(httpx: Any) -> None:
    """The second request of a digest authentication has the headers as well."""
    challenge = {"WWW-Authenticate": 'Digest realm="r", nonce="n", algorithm=MD5'}
    transport = Transport(httpx, httpx.Response(401, headers=challenge))
    with httpx.Client(transport=transport.mock) as client, pgtrack.session("sess_ann"):
        client.get(URL, auth=httpx.DigestAuth("ann", "secret"))

    assert ["sess_ann"] * 2 == transport.sessions


def test_body_that_the_transport_reads(httpx: Any) -> None:
    """What a transport makes of the request is the caller's to see."""
    transport = Transport(httpx)
    with httpx.Client(transport=transport.mock) as client:
        request = client.build_request("POST", URL, content=iter([b"a", b"b"]))
        with pgtrack.session("sess_ann"):
            client.send(request)

    assert b"ab" == request.content
    assert "x-session-id" not in request.headers


def test_headers_that_the_transport_adds(httpx: Any) -> None:
    """A header that a transport adds is on the caller's request; ours are not."""
    seen: list[str | None] = []

    def sign(request: Any) -> Any:
        seen.append(request.headers.get("x-session-id"))
        request.headers["X-Signature"] = "s"
        return httpx.Response(200)

    with (
        httpx.Client(transport=httpx.MockTransport(sign)) as client,
        pgtrack.session("sess_ann"),
    ):
        response = client.get(URL)

    assert ["sess_ann"] == seen
    assert "s" == response.request.headers["x-signature"]
    assert "x-session-id" not in response.request.headers


def test_errors_have_the_callers_request(httpx: Any) -> None:
    """An error of the transport is raised as it is, with the caller's request."""

    def fail(request: Any) -> Any:
        msg = "no route"
        raise httpx.ConnectError(msg)

    with httpx.Client(transport=httpx.MockTransport(fail)) as client:
        request = client.build_request("GET", URL)
        with pgtrack.session("sess_ann"), pytest.raises(httpx.ConnectError) as caught:
            client.send(request)

    assert request is caught.value.request
    assert None is pgtrack.current().session_id


def test_cancelled(httpx: Any) -> None:
    """A request that is cancelled leaves nothing, and the next has its own session."""
    sessions: list[str | None] = []
    started = asyncio.Event()

    async def answer(request: Any) -> Any:
        sessions.append(request.headers.get("x-session-id"))
        started.set()
        if len(sessions) == 1:
            await asyncio.sleep(60)
        return httpx.Response(200)

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            with pgtrack.session("ann"):
                task = asyncio.create_task(client.get(URL))
            await asyncio.wait_for(started.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pgtrack.session("ben"):
                await client.get(URL)

    asyncio.run(main())

    assert ["ann", "ben"] == sessions


def test_subclasses_and_streams(httpx: Any) -> None:
    """Subclasses are covered; a streamed answer stays one."""

    class Client(httpx.Client):  # type: ignore[misc, name-defined]
        pass

    transport = Transport(httpx, httpx.Response(200, content=iter([b"a", b"b"])))
    with (
        Client(transport=transport.mock) as client,
        pgtrack.session("sess_ann"),
        client.stream("GET", URL) as response,
    ):
        is_read = response.is_stream_consumed
        parts = list(response.iter_raw())

    assert not is_read
    assert [b"a", b"b"] == parts
    assert ["sess_ann"] == transport.sessions


def test_names_in_other_scripts(httpx: Any) -> None:
    """A host in another script is compared as it travels."""
    pgtrack.configure(propagate_to=["xn--mnchen-3ya.example"])
    transport = Transport(httpx)
    with httpx.Client(transport=transport.mock) as client, pgtrack.session("sess_ann"):
        client.get("https://münchen.example/")
        client.get("https://munchen.example/")

    assert ["sess_ann", None] == transport.sessions


def test_proxies(httpx: Any) -> None:
    """A proxy gets the headers with the request, not with CONNECT."""
    pgtrack.configure(propagate_to=["a.example"])
    with Server() as proxy:
        url = f"http://127.0.0.1:{proxy.address[1]}"
        with (
            httpx.Client(proxy=url, trust_env=False) as client,
            pgtrack.session("sess_ann"),
        ):
            client.get("http://a.example/x")
            client.get("http://b.example/x")
            with pytest.raises(httpx.ProxyError):
                client.get("https://a.example/x")

    assert [
        ("GET", "http://a.example/x", "sess_ann"),
        ("GET", "http://b.example/x", None),
        ("CONNECT", "a.example:443", None),
    ] == [(r.method, r.path, r.headers.get("x-session-id")) for r in proxy.requests]


def test_odd_requests(httpx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that cannot be copied goes out as it is."""
    monkeypatch.setattr(_diagnostics, "reraise", False)
    monkeypatch.setattr(integration, "absent", None)
    transport = Transport(httpx)
    with httpx.Client(transport=transport.mock) as client, pgtrack.session("sess_ann"):
        client.get(URL)

    assert [None] == transport.sessions
    assert 1 == len(_diagnostics._notes)


def test_without_httpx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without httpx2 httpx is enough, and httpx2 under its name is patched once."""
    import httpx

    integration.uninstall()
    monkeypatch.setitem(sys.modules, "httpx2", None)
    integration.install()
    alone = len(integration._patches._on)
    integration.uninstall()
    monkeypatch.setitem(sys.modules, "httpx2", httpx)
    integration.install()

    assert [2, 2] == [alone, len(integration._patches._on)]
