"""What all clients of HTTP have in common: which requests get which headers."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import Exchange, Reply, Server, run_script, start_together
from pgtrack import _context, _diagnostics
from pgtrack.exceptions import MissingDependencyError
from pgtrack.integrations._outbound import Outbound, absent
from pgtrack.integrations._patches import Patches

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sender:
    """A client of one library, made before the integration is installed."""

    library = ""

    def __init__(self) -> None:
        self.package: Any = pytest.importorskip(self.library)
        name = f"pgtrack.integrations.{self.integration}"
        self.module: Any = importlib.import_module(name)

    @property
    def integration(self) -> str:
        """What installs the headers."""
        return self.library

    def get(self, url: str, headers: Any = None) -> int:
        """Send a request, follow redirects, and return the status."""
        raise NotImplementedError

    def get_many(self, calls: list[tuple[str, str]]) -> None:
        """Send requests, each in its session, many at once."""
        batches = [calls[i::8] for i in range(8)]

        def run(i: int) -> None:
            for session_id, url in batches[i]:
                with pgtrack.session(session_id):
                    self.get(url)

        start_together(8, run)

    def close(self) -> None:
        """Close the client."""


class _Httpx(Sender):
    library = "httpx"

    def __init__(self) -> None:
        super().__init__()
        self.client = self.package.Client(
            follow_redirects=True, trust_env=False, verify=False
        )

    @property
    def integration(self) -> str:
        return "httpx"

    def get(self, url: str, headers: Any = None) -> int:
        return int(self.client.get(url, headers=headers).status_code)

    def close(self) -> None:
        self.client.close()


class _Httpx2(_Httpx):
    library = "httpx2"


class _Async(Sender):
    """A client that lives in an event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        resolver = ThreadPoolExecutor(1)
        resolver.submit(int).result()  # its thread is there before the tests
        self.loop.set_default_executor(resolver)
        self.client = self.run(self.make())

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine in the client's loop."""
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 30))

    def end(self, coroutine: Any) -> None:
        """End the client by *coroutine*, and its loop."""
        self.run(coroutine)
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()

    async def make(self) -> Any:
        """Return the client."""
        raise NotImplementedError

    async def aget(self, url: str, headers: Any = None) -> int:
        """Send one request."""
        raise NotImplementedError

    def get(self, url: str, headers: Any = None) -> int:
        return int(self.run(self.aget(url, headers)))

    def get_many(self, calls: list[tuple[str, str]]) -> None:
        async def one(session_id: str, url: str) -> None:
            with pgtrack.session(session_id):
                await asyncio.sleep(0)
                await self.aget(url)

        async def all_of_them() -> None:
            for i in range(0, len(calls), 20):
                await asyncio.gather(*itertools.starmap(one, calls[i : i + 20]))

        self.run(all_of_them())


class _HttpxAsync(_Async):
    library = "httpx"

    @property
    def integration(self) -> str:
        return "httpx"

    async def make(self) -> Any:
        return self.package.AsyncClient(
            follow_redirects=True, trust_env=False, verify=False
        )

    async def aget(self, url: str, headers: Any = None) -> int:
        return int((await self.client.get(url, headers=headers)).status_code)

    def close(self) -> None:
        self.end(self.client.aclose())


class _Httpx2Async(_HttpxAsync):
    library = "httpx2"


class _Aiohttp(_Async):
    library = "aiohttp"

    async def make(self) -> Any:
        return self.package.ClientSession()

    async def aget(self, url: str, headers: Any = None) -> int:
        async with self.client.get(url, headers=headers) as response:
            await response.read()
            return int(response.status)

    def close(self) -> None:
        self.end(self.client.close())


class _Requests(Sender):
    library = "requests"

    def __init__(self) -> None:
        super().__init__()
        self.client = self.package.Session()
        self.client.trust_env = False

    def get(self, url: str, headers: Any = None) -> int:
        return int(self.client.get(url, headers=headers, timeout=10).status_code)

    def close(self) -> None:
        self.client.close()


class _Urllib3(Sender):
    library = "urllib3"

    def __init__(self) -> None:
        super().__init__()
        self.client = self.package.PoolManager(maxsize=10, timeout=10)

    def get(self, url: str, headers: Any = None) -> int:
        return int(self.client.request("GET", url, headers=headers).status)

    def close(self) -> None:
        self.client.clear()


SENDERS = {
    kind.__name__[1:].lower(): kind
    for kind in (
        _Httpx,
        _HttpxAsync,
        _Httpx2,
        _Httpx2Async,
        _Requests,
        _Urllib3,
        _Aiohttp,
    )
}


@pytest.fixture(name="made", params=SENDERS, scope="module")
def _made(request: pytest.FixtureRequest) -> Iterator[Sender]:
    """Make a client once: it costs more than the tests do."""
    sender = SENDERS[request.param]()
    yield sender
    sender.close()


@pytest.fixture(name="sender")
def _sender(made: Sender) -> Iterator[Sender]:
    yield made
    made.module.uninstall()


class Hosts:
    """
    Two servers, the first of which is listed; `/to/URL` redirects there.

    Attributes:
        listed: The URL of the one, without a path.

        other: The URL of the other.
    """

    def __init__(self, listed: Server, other: Server) -> None:
        self.servers = (listed, other)
        self.listed, self.other = (
            f"http://127.0.0.1:{server.address[1]}" for server in self.servers
        )
        for server in self.servers:
            server.default = self.answer

    @staticmethod
    def answer(exchange: Exchange) -> Reply:
        """Redirect to what the path says, else 204."""
        _, is_redirect, target = exchange.path.partition("/to/")
        return Reply(307, {"Location": target}) if is_redirect else Reply(204)

    def seen(self, host: int = 0) -> list[tuple[str, str | None, str | None]]:
        """Return path, session and request of what one of them got."""
        return [
            (
                request.path,
                request.headers.get("x-session-id"),
                request.headers.get("x-request-id"),
            )
            for request in self.servers[host].requests
        ]

    def names(self, host: int = 0) -> set[str]:
        """Return the names of all headers that one of them got."""
        return {name for r in self.servers[host].requests for name in r.headers}


@pytest.fixture(name="hosts")
def _hosts() -> Iterator[Hosts]:
    with Server() as listed, Server() as other:
        yield Hosts(listed, other)


@pytest.fixture(name="installed")
def _installed(sender: Sender, hosts: Hosts) -> Sender:
    """Install the integration; the first host is listed by name and port."""
    sender.module.install()
    pgtrack.configure(propagate_to=[hosts.listed.removeprefix("http://")])
    return sender


ANN = {"X-Session-ID": "sess_ann", "X-Request-ID": "req-1"}


class TestWhatGoesOut:
    """Keeps the session, tells no user, and leaves nothing behind."""

    def test_session_and_request(self, installed: Sender, hosts: Hosts) -> None:
        """A request to a listed host has the running session and request id."""
        with pgtrack.continued_from(ANN):
            installed.get(f"{hosts.listed}/a")

        assert [("/a", "sess_ann", "req-1")] == hosts.seen()

    def test_never_user_or_journey(self, installed: Sender, hosts: Hosts) -> None:
        """The user and the journey stay here."""
        trusted = {**ANN, "X-User-ID": "u_ann", "X-Journey-ID": "checkout"}
        with pgtrack.continued_from(trusted, trusted=True):
            installed.get(f"{hosts.listed}/a")

        assert {"x-user-id", "x-journey-id"}.isdisjoint(hosts.names())

    def test_nothing_outside_of_a_session(self, installed, hosts) -> None:
        """Before and behind a session nothing goes out, the process's neither."""
        installed.get(f"{hosts.listed}/before")
        with pgtrack.session("sess_ann"):
            installed.get(f"{hosts.listed}/in")
        with pgtrack.journey("checkout"):
            installed.get(f"{hosts.listed}/behind")

        assert [
            ("/before", None, None),
            ("/in", "sess_ann", None),
            ("/behind", None, None),
        ] == hosts.seen()

    def test_nothing_to_other_hosts(self, installed: Sender, hosts: Hosts) -> None:
        """A host that is not listed gets nothing."""
        with pgtrack.continued_from(ANN):
            installed.get(f"{hosts.other}/a")

        assert [("/a", None, None)] == hosts.seen(1)

    def test_nothing_of_our_own(self, installed: Sender, hosts: Hosts) -> None:
        """What pgtrack itself sends carries nothing."""
        with pgtrack.continued_from(ANN), _context.suppress():
            installed.get(f"{hosts.listed}/a")
            with pgtrack.session("sess_inside"):
                installed.get(f"{hosts.listed}/b")

        assert [("/a", None, None), ("/b", None, None)] == hosts.seen()

    def test_sessions_one_after_the_other(self, installed, hosts) -> None:
        """A kept connection carries no session of the request before."""
        for name in ("ann", "ben"):
            with pgtrack.session(name):
                installed.get(f"{hosts.listed}/{name}")
        installed.get(f"{hosts.listed}/nobody")

        assert [
            ("/ann", "ann", None),
            ("/ben", "ben", None),
            ("/nobody", None, None),
        ] == hosts.seen()

    def test_many_at_once_never_mix(self, installed: Sender, hosts: Hosts) -> None:
        """Of hundreds of requests by one client each has the session it was made in."""
        calls = [(f"sess_{i}", f"{hosts.listed}/sess_{i}") for i in range(120)]
        random.Random(3).shuffle(calls)

        installed.get_many(calls)

        assert sorted((f"/{name}", name, None) for name, _ in calls) == sorted(
            hosts.seen()
        )

    def test_exceptions_pass(self, sender: Sender, hosts: Hosts) -> None:
        """A failure is the library's own, with us as without, and leaves nothing."""
        with Server() as server:
            url = f"http://127.0.0.1:{server.address[1]}/"
        kinds = []
        for _ in range(2):
            with pgtrack.session("sess_ann"), pytest.raises(Exception) as caught:
                sender.get(url)
            kinds.append(caught.type)
            sender.module.install()
            pgtrack.configure(propagate_to=["127.0.0.1"])
        sender.get(f"{hosts.listed}/after")

        assert kinds[0] is kinds[1]
        assert [("/after", None, None)] == hosts.seen()


class TestCallersHeaders:
    """The caller's own headers stay, and stay the caller's."""

    @pytest.mark.parametrize("name", ["X-Session-ID", "x-session-id", "X-SESSION-Id"])
    def test_win(self, installed: Sender, hosts: Hosts, name: str) -> None:
        """What the caller gives, in any case, is neither changed nor doubled."""
        with pgtrack.continued_from(ANN):
            installed.get(f"{hosts.listed}/a", {name: "mine"})

        assert [("/a", "mine", "req-1")] == hosts.seen()

    def test_are_not_changed(self, installed: Sender, hosts: Hosts) -> None:
        """A mapping of headers that is used again carries no earlier session."""
        headers = {"X-Shared": "1"}
        for session_id in ("ann", "ben"):
            with pgtrack.session(session_id):
                installed.get(f"{hosts.listed}/", headers)

        assert {"X-Shared": "1"} == headers
        assert ["ann", "ben"] == [session_id for _, session_id, _ in hosts.seen()]


class TestRedirects:
    """Each hop is decided on its own."""

    def test_from_listed_to_other(self, installed: Sender, hosts: Hosts) -> None:
        """A redirect to a host that is not listed takes nothing along."""
        with pgtrack.continued_from(ANN):
            installed.get(f"{hosts.listed}/to/{hosts.other}/b")

        assert ["sess_ann"] == [seen[1] for seen in hosts.seen()]
        assert [("/b", None, None)] == hosts.seen(1)

    def test_from_other_to_listed(self, installed: Sender, hosts: Hosts) -> None:
        """A redirect to a listed host gives that the headers."""
        with pgtrack.continued_from(ANN):
            installed.get(f"{hosts.other}/to/{hosts.listed}/a")

        assert [("/a", "sess_ann", "req-1")] == hosts.seen()
        assert [None] == [seen[1] for seen in hosts.seen(1)]

    def test_there_and_back(self, installed: Sender, hosts: Hosts) -> None:
        """A chain over both hosts has the headers at each listed hop, once."""
        chain = f"{hosts.listed}/to/{hosts.listed}/to/{hosts.other}/to/{hosts.listed}/a"
        with pgtrack.continued_from(ANN):
            installed.get(chain)

        assert ["sess_ann"] * 3 == [seen[1] for seen in hosts.seen()]
        assert [None] == [seen[1] for seen in hosts.seen(1)]

    def test_to_another_name_of_the_same_machine(self, sender, hosts) -> None:
        """Names count, and not what they resolve to."""
        sender.module.install()
        pgtrack.configure(propagate_to=["127.0.0.1"])
        by_name = hosts.other.replace("127.0.0.1", "localhost")
        with pgtrack.session("sess_ann"):
            sender.get(f"{hosts.listed}/to/{by_name}/b")

        assert ["sess_ann"] == [seen[1] for seen in hosts.seen()]
        assert [("/b", None, None)] == hosts.seen(1)

    @pytest.mark.parametrize(
        "location",
        [
            "http://{listed}@{other}/",
            "http://{listed}:80@{other}/",
            "http://user:{listed}@{other}/",
            "http://{other}\\@{listed}/",
            "http://{other}/\\@{listed}/",
            "http://{other}#@{listed}/",
            "http://{other}?@{listed}/",
            "http://{other}/{listed}",
            "//{other}/",
            "//{listed}@{other}/",
            "/\\{other}/",
            "\\\\{other}/",
            "http:/\\{other}/",
            "http:{other}/",
            "HTTP://{other}/",
            "http://{listed}%00@{other}/",
            "http://{listed}%2f@{other}/",
            "http://{listed} @{other}/",
            "http://{other}\t@{listed}/",
            "http://[::ffff:127.0.0.1]:{port}/",
            "http://127.1:{port}/",
            "http://2130706433:{port}/",
            "http://0x7f.1:{port}/",
            "http://127.0.0.1.:{port}/",
            "http://localhost:{port}/",
            "http://{other}\r\nX-Session-ID: sess_ann",
        ],
    )
    def test_tricks(self, installed: Sender, hosts: Hosts, location: str) -> None:
        """However a redirect spells a host that is not listed, it gets nothing."""
        listed, other = (
            url.removeprefix("http://") for url in (hosts.listed, hosts.other)
        )
        target = location.format(
            listed=listed, other=other, port=other.partition(":")[2]
        )
        hosts.servers[0].script.append(lambda _: Reply(302, {"Location": target}))

        with pgtrack.continued_from(ANN):
            try:
                installed.get(f"{hosts.listed}/start")
            except Exception:  # a library may refuse what is no URL
                assert [("/start", "sess_ann", "req-1")] == hosts.seen()[:1]

        assert [] == [seen for seen in hosts.seen(1) if seen[1:] != (None, None)]


class TestInstallation:
    """On, off, and whose settings count."""

    def test_installed_twice(self, installed: Sender, hosts: Hosts) -> None:
        """Installing again adds nothing, and uninstalling once undoes it."""
        installed.module.install()
        with pgtrack.session("sess_ann"):
            installed.get(f"{hosts.listed}/on")
            installed.module.uninstall()
            installed.get(f"{hosts.listed}/off")
            installed.module.uninstall()
            installed.module.install()
            installed.get(f"{hosts.listed}/on-again")

        assert [
            ("/on", "sess_ann", None),
            ("/off", None, None),
            ("/on-again", "sess_ann", None),
        ] == hosts.seen()

    def test_default_client_is_looked_up_at_each_call(self, sender, hosts) -> None:
        """What `configure` lists after `install` counts from then on."""
        sender.module.install()
        with pgtrack.session("sess_ann"):
            sender.get(f"{hosts.listed}/not-yet")
            pgtrack.configure(propagate_to=["127.0.0.1"])
            sender.get(f"{hosts.listed}/now")
            pgtrack.configure(propagate_to=[])
            sender.get(f"{hosts.listed}/no-more")

        assert [None, "sess_ann", None] == [seen[1] for seen in hosts.seen()]

    def test_client_of_its_own(self, sender: Sender, hosts: Hosts) -> None:
        """`install(client=...)` goes by that client's list; the last one counts."""
        mine, none = (
            pgtrack.Client(pgtrack.Config(enabled=False, propagate_to=listed))
            for listed in (["127.0.0.1"], [])
        )
        with pgtrack.session("sess_ann"):
            sender.module.install(client=mine)
            sender.get(f"{hosts.listed}/mine")
            sender.module.install(client=none)
            sender.get(f"{hosts.listed}/none")

        assert ["sess_ann", None] == [seen[1] for seen in hosts.seen()]

    def test_switched_off(self, sender: Sender, hosts: Hosts, monkeypatch) -> None:
        """With pgtrack switched off the correlation goes out all the same."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")
        sender.module.install()
        pgtrack.configure(propagate_to=["127.0.0.1"])
        with pgtrack.session("sess_ann"):
            sender.get(f"{hosts.listed}/a")

        assert [("/a", "sess_ann", None)] == hosts.seen()

    def test_patches_of_others_stay(self, installed: Sender, hosts: Hosts) -> None:
        """Where somebody wrapped the function after us, ours sleeps below theirs."""
        patch = installed.module._patches._on[0]
        ours = vars(patch._owner)[patch._name]
        calls = []

        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return ours.__get__(args[0])(*args[1:], **kwargs)

        for each in installed.module._patches._on:  # httpx has several classes
            if each._name == patch._name and each is not patch:
                each.undo()
        setattr(patch._owner, patch._name, theirs)
        try:
            installed.module.uninstall()
            with pgtrack.session("sess_ann"):
                installed.get(f"{hosts.listed}/a")

            assert theirs is vars(patch._owner)[patch._name]
            assert [("/a", None, None)] == hosts.seen()
        finally:
            setattr(patch._owner, patch._name, ours.__wrapped__)

    def test_taken_off_in_any_order(self) -> None:
        """Of two that share a function nothing is left, whichever goes first."""
        urllib3 = pytest.importorskip("urllib3")
        pytest.importorskip("requests")
        first, second = (
            importlib.import_module(f"pgtrack.integrations.{name}")
            for name in ("urllib3", "requests")
        )
        before = vars(urllib3.HTTPConnectionPool)["_make_request"]
        first.install()
        second.install()
        first.uninstall()
        assert before is not vars(urllib3.HTTPConnectionPool)["_make_request"]
        second.uninstall()

        assert before is vars(urllib3.HTTPConnectionPool)["_make_request"]

    def test_all_or_none(self) -> None:
        """Where a version lacks one of the functions, none is wrapped."""

        class Owner:
            def there(self) -> None:
                """Be wrapped, or not."""

        before, patches = Owner.there, Patches()
        with pytest.raises(KeyError):
            patches.install((Owner, "there", print), (Owner, "lacking", print))

        assert before is Owner.there
        assert not patches.is_on

    def test_our_errors_do_not_reach_the_host(
        self, installed: Sender, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of our own costs the headers, and not the request."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(installed.module, "_outbound", None)
        with pgtrack.session("sess_ann"):
            status = installed.get(f"{hosts.listed}/a")

        assert 204 == status
        assert [("/a", None, None)] == hosts.seen()
        assert any("AttributeError" in note for note in _diagnostics._notes)


class TestOutbound:
    """The headers for a destination, by themselves."""

    def test_errors_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An error of our own makes no headers, and is noted."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        outbound: Any = Outbound(client=object())  # type: ignore[arg-type]
        with pgtrack.session("sess_ann"):
            headers = outbound.headers("http", "a.example", None)

        assert {} == headers
        assert 1 == len(_diagnostics._notes)

    def test_unconfigured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`PRODUCTGRAPH_PROPAGATE_TO` is enough, also without an endpoint."""
        monkeypatch.setenv("PRODUCTGRAPH_PROPAGATE_TO", "a.example,*.b.example")
        with pgtrack.session("sess_ann"):
            headers = Outbound().headers("https", "x.b.example", None)

        assert {"X-Session-ID": "sess_ann"} == headers
        assert not pgtrack._api.default_client().is_enabled

    def test_absent(self) -> None:
        """Names are compared in any case, and as text or bytes."""
        headers = {"X-Session-ID": "s", "X-Request-ID": "r"}

        assert {"X-Request-ID": "r"} == absent(headers, [b"x-SESSION-id", "Accept"])
        assert headers == absent(headers, [])


MISSING = """
import sys

sys.modules[{blocked!r}] = None
import pgtrack

try:
    import pgtrack.integrations.{module}
except ImportError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("module", ["httpx", "requests", "urllib3", "aiohttp", "grpc"])
def test_missing_package(module: str) -> None:
    """Where the package is missing, one error names it and the extra."""
    done = run_script(MISSING.format(module=module, blocked=module))

    assert (
        f"{MissingDependencyError.__name__} pgtrack.integrations.{module} needs the "
        f"package '{module}', which is not installed. "
        f"Install it by: pip install 'pgtrack[{module}]'\n"
    ) == done.stdout
