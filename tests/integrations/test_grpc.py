"""gRPC: real servers and channels, sync and aio, without generated code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import re
import threading
from concurrent import futures
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from pgtrack import _context, _diagnostics
from pgtrack.testing import Events, capture

grpc = pytest.importorskip("grpc")

from pgtrack.integrations import grpc as integration  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:grpc")

KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
SERVERS = ["sync", "aio", "aio_sync"]
"""A sync server, an aio server, and an aio server with sync handlers."""

ANN = (("x-session-id", "sess_ann"), ("x-request-id", "req-1"))
_FRESH = re.compile(r"srv-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
PATIENCE = 10


class Served:
    """
    A server with the methods of `/shop.Cart/`.

    Attributes:
        target: Where it is.

        stop: Ends it, and waits for whatever it runs.
    """

    def __init__(self, target: str, stop: Callable[[], None]) -> None:
        self.target = target
        self.stop = stop
        self.channels: list[Any] = []

    def call(self, method: str, *, kind: str = "unary_unary", **options: Any) -> Any:
        """Call a method to its end, and return the answer or the list of answers."""
        if not self.channels:
            self.channels.append(grpc.insecure_channel(self.target))
        function = getattr(self.channels[0], kind)(f"/shop.Cart/{method}")
        options.setdefault("timeout", PATIENCE)
        argument = iter([b"1", b"2"]) if kind.startswith("stream") else b"1"
        answer = function(argument, **options)
        return list(answer) if kind.endswith("stream") else answer


class Shop:
    """What handlers do: sync or async, of each kind."""

    def __init__(self, server: str, **bodies: Callable[[Any], Any]) -> None:
        self.is_async = server == "aio"
        self.bodies = bodies

    def handlers(self, **serializers: Any) -> dict[str, Any]:
        """Return the handlers: each body with each kind."""
        return {
            f"{name}_{kind}": getattr(grpc, f"{kind}_rpc_method_handler")(
                self.function(kind, body), **serializers
            )
            for name, body in self.bodies.items()
            for kind in KINDS
        }

    def function(self, kind: str, body: Callable[[Any], Any]) -> Any:
        """Return a handler of a kind, which runs *body* for each answer."""
        if self.is_async:
            return self.async_function(kind, body)

        def unary(requests: Any, context: Any) -> bytes:
            if kind.startswith("stream"):
                list(requests)
            return body(context) or b"ok"

        def stream(requests: Any, context: Any) -> Iterator[bytes]:
            yield b"first"
            yield unary(requests, context)

        return stream if kind.endswith("stream") else unary

    def async_function(self, kind: str, body: Callable[[Any], Any]) -> Any:
        """Do what `function` does for aio."""

        async def unary(requests: Any, context: Any) -> bytes:
            if kind.startswith("stream"):
                async for _ in requests:
                    pass
            answer = body(context)
            if asyncio.iscoroutine(answer):
                answer = await answer
            return answer or b"ok"

        async def stream(requests: Any, context: Any) -> Any:
            yield b"first"
            yield await unary(requests, context)

        return stream if kind.endswith("stream") else unary


@contextlib.contextmanager
def serving(
    server: str, handlers: dict[str, Any], *interceptors: Any, **options: Any
) -> Iterator[Served]:
    """Serve handlers on loopback."""
    generic = (grpc.method_handlers_generic_handler("shop.Cart", handlers),)
    given: dict[str, Any] = {"interceptors": interceptors} if interceptors else {}
    start = _sync_server if server == "sync" else _aio_server
    served = start(generic, {**given, **options})
    try:
        yield served
    finally:
        for channel in served.channels:
            channel.close()
        served.stop()


def _sync_server(generic: Any, given: dict[str, Any]) -> Served:
    pool = futures.ThreadPoolExecutor(given.pop("workers", 8))
    server = grpc.server(pool, **given)
    server.add_generic_rpc_handlers(generic)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    def stop() -> None:
        assert server.stop(None).wait(PATIENCE)
        pool.shutdown()

    return Served(f"127.0.0.1:{port}", stop)


def _aio_server(generic: Any, given: dict[str, Any]) -> Served:
    pool = futures.ThreadPoolExecutor(given.pop("workers", 8))
    ready = threading.Event()
    ports: list[int] = []
    ends: list[Any] = []

    async def main() -> None:
        server = grpc.aio.server(pool, **given)
        server.add_generic_rpc_handlers(generic)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        end = asyncio.Event()
        ends.extend((asyncio.get_running_loop(), end.set))
        ready.set()
        await end.wait()
        await server.stop(None)
        gc.collect()  # generators that nobody asks on are closed
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 5)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(PATIENCE)

    def stop() -> None:
        with contextlib.suppress(RuntimeError):  # it has been stopped
            ends[0].call_soon_threadsafe(ends[1])
        thread.join(PATIENCE)
        assert not thread.is_alive()
        pool.shutdown()

    return Served(f"127.0.0.1:{ports[0]}", stop)


def interceptor_of(server: str, **options: Any) -> Any:
    """Return our interceptor for a server."""
    if server == "sync":
        return integration.ServerInterceptor(**options)
    return integration.AioServerInterceptor(**options)


@pytest.fixture(autouse=True, scope="module")
def _poller() -> Iterator[None]:
    """Keep the thread that grpc.aio has for all of its channels."""
    loop = asyncio.new_event_loop()

    async def make() -> Any:
        return grpc.aio.insecure_channel("127.0.0.1:1")

    channel = loop.run_until_complete(make())
    yield
    loop.run_until_complete(channel.close())
    loop.close()


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    integration.uninstall()


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


@pytest.fixture(name="server", params=SERVERS)
def _server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(name="serve")
def _serve(server: str) -> Iterator[Callable[..., Served]]:
    """Return what serves bodies, with our interceptor."""
    with contextlib.ExitStack() as stack:

        def serve(
            serializers: dict[str, Any] | None = None,
            options: dict[str, Any] | None = None,
            **bodies: Any,
        ) -> Served:
            handlers = Shop(server, **bodies).handlers(**(serializers or {}))
            interceptor = interceptor_of(server, **(options or {}))
            return stack.enter_context(serving(server, handlers, interceptor))

        yield serve


def skip_where_grpc_fails(server: str, kind: str) -> None:
    """Skip what grpcio 1.85 loses, with us as without: an abort behind an answer."""
    if server == "aio_sync" and kind.endswith("stream"):
        pytest.skip("a sync stream on an aio server may not abort behind an answer")


def responses(events: Events) -> list[tuple[Any, ...]]:
    """Return session, method, path and status of each response."""
    return [
        (e.session_id, e.api_method, e.api_path, e.api_status_code)
        for e in events
        if e.type == "api.response"
    ]


def errors(events: Events) -> list[tuple[Any, ...]]:
    """Return session, type and message of each error."""
    return [
        (e.session_id, e.error_type, e.error_message)
        for e in events
        if e.type == "error"
    ]


class TestServerKeepsTheSession:
    """Each call runs in the session of its metadata, in each of its steps."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_in_the_handler_and_in_the_one_event(self, serve, events, kind) -> None:
        """A call is told once, in the session and with the request id that came."""
        served = serve(mark=lambda _: pgtrack.emit("custom", name="mark") and b"")
        served.call(f"mark_{kind}", kind=kind, metadata=ANN)

        assert [("custom", "sess_ann"), ("api.response", "sess_ann")] == [
            (e.type, e.session_id) for e in events
        ]
        assert {"req-1"} == {e.metadata["request_id"] for e in events}
        assert [("sess_ann", "POST", f"/shop.Cart/mark_{kind}", 200)] == responses(
            events
        )

    def test_request_id_comes_back(self, serve: Any) -> None:
        """The request id is in the trailing metadata, also the one that was made."""
        served = serve(mark=lambda _: None)
        channel = grpc.insecure_channel(served.target)
        served.channels.append(channel)
        call = channel.unary_unary("/shop.Cart/mark_unary_unary").with_call
        echoed = [
            dict(call(b"", timeout=PATIENCE, metadata=given)[1].trailing_metadata())
            for given in (ANN, ())
        ]

        assert "req-1" == echoed[0]["x-request-id"]
        assert re.fullmatch(r"[0-9a-f-]{36}", echoed[1]["x-request-id"])

    def test_trailing_metadata_of_the_handler_wins(self, serve: Any) -> None:
        """What the handler says behind its answer is what is sent."""
        trailing = (("x-cart", "3"),)
        served = serve(mark=lambda context: context.set_trailing_metadata(trailing))
        channel = grpc.insecure_channel(served.target)
        served.channels.append(channel)
        call = channel.unary_unary("/shop.Cart/mark_unary_unary").with_call
        _, done = call(b"", timeout=PATIENCE)

        assert trailing == tuple(done.trailing_metadata())

    @pytest.mark.parametrize("value", ["", " ", "é", "a b", "-x", "a" * 129, "x\x7f"])
    def test_bad_ids_are_none(self, serve, events, value) -> None:
        """An id that does not fit its grammar is as good as absent."""
        served = serve(mark=lambda _: None)
        pair = ("x-session-id", value)
        with contextlib.suppress(ValueError, grpc.RpcError, UnicodeError):
            served.call("mark_unary_unary", metadata=(pair,))

        assert all(_FRESH(e.session_id) for e in events)

    def test_switched_off(self, serve: Any) -> None:
        """Without a configured client the correlation is there all the same."""
        served = serve(mark=lambda _: str(pgtrack.current().session_id).encode())

        assert b"sess_ann" == served.call("mark_unary_unary", metadata=ANN)


class TestServerKeepsUserAndJourney:
    """What becomes known in a call is in its event; outsiders tell nothing."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_identify(self, serve: Any, events: Events, kind: str) -> None:
        """The user that the handler names is on the call's event."""
        served = serve(mark=lambda _: pgtrack.identify("u_ann"))
        served.call(f"mark_{kind}", kind=kind, metadata=ANN)

        assert ["u_ann"] == [e.user_id for e in events]

    def test_metadata_is_not_trusted(self, serve: Any, events: Events) -> None:
        """A user or a journey in the metadata is anybody's claim, and not read."""
        served = serve(mark=lambda _: None)
        claims = (("x-user-id", "u_root"), ("x-journey-id", "checkout"))
        served.call("mark_unary_unary", metadata=(*ANN, *claims))

        assert [(None, None)] == [(e.user_id, e.journey_id) for e in events]

    def test_journey(self, serve: Any, events: Events) -> None:
        """A journey of the handler's is on what it emits."""

        def buy(_: Any) -> None:
            with pgtrack.journey("checkout") as journey:
                journey.step("pay")

        served = serve(buy=buy)
        served.call("buy_unary_stream", kind="unary_stream", metadata=ANN)

        events.assert_journey("checkout", steps=["pay"])
        assert {"sess_ann"} == {e.session_id for e in events}


class TestServerNeverMixes:
    """Two calls at once have each their own session."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_many_at_once(self, serve: Any, events: Events, kind: str) -> None:
        """Of hundreds of calls each event is in the session of its own call."""
        served = serve(mark=lambda _: str(pgtrack.current().session_id).encode())
        served.call(f"mark_{kind}", kind=kind)  # makes the channel
        events.clear()

        def one(i: int) -> Any:
            metadata = (("x-session-id", f"sess_{i}"), ("x-request-id", f"req-{i}"))
            answer = served.call(f"mark_{kind}", kind=kind, metadata=metadata)
            return answer[-1] if kind.endswith("stream") else answer

        with futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(one, range(80)))

        assert [f"sess_{i}".encode() for i in range(80)] == answers
        assert {(f"sess_{i}", f"req-{i}") for i in range(80)} == {
            (e.session_id, e.metadata["request_id"]) for e in events
        }

    def test_streams_step_by_step(self, server: str, events: Events) -> None:
        """Two streams that take turns stay each in their session."""

        def talk(requests: Any, _: Any) -> Iterator[bytes]:
            for _request in requests:
                yield str(pgtrack.current().session_id).encode()

        async def atalk(requests: Any, _: Any) -> Any:
            async for _request in requests:
                yield str(pgtrack.current().session_id).encode()

        function = atalk if server == "aio" else talk
        handlers = {"talk": grpc.stream_stream_rpc_method_handler(function)}
        interceptor = interceptor_of(server)
        turns: list[tuple[str, bytes]] = []
        with (
            serving(server, handlers, interceptor) as served,
            grpc.insecure_channel(served.target) as channel,
        ):
            call = channel.stream_stream("/shop.Cart/talk")
            gates = {name: threading.Semaphore(0) for name in ("ann", "ben")}

            def requests(gate: threading.Semaphore) -> Iterator[bytes]:
                for _ in range(50):
                    assert gate.acquire(timeout=PATIENCE)
                    yield b""

            streams = {
                name: call(
                    requests(gate),
                    metadata=(("x-session-id", name),),
                    timeout=PATIENCE,
                )
                for name, gate in gates.items()
            }
            for _, name in itertools.product(range(50), gates):
                gates[name].release()
                turns.append((name, next(streams[name])))
            ends = [next(stream, None) for stream in streams.values()]

        assert [None, None] == ends
        assert [(name, name.encode()) for name, _ in turns] == turns
        assert {"ann", "ben"} == {e.session_id for e in events}


class TestServerExceptions:
    """What escapes is told once, and goes on to be gRPC's."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_escapes(self, serve: Any, events: Events, kind: str) -> None:
        """An exception makes one error and one response of 500; clients see UNKNOWN."""

        def fail(_: Any) -> None:
            msg = "out of stock"
            raise LookupError(msg)

        served = serve(fail=fail)
        with pytest.raises(grpc.RpcError) as caught:
            served.call(f"fail_{kind}", kind=kind, metadata=ANN)

        assert grpc.StatusCode.UNKNOWN is caught.value.code()
        assert "out of stock" in caught.value.details()
        assert [("sess_ann", "LookupError", "out of stock")] == errors(events)
        assert [500] == [status for *_, status in responses(events)]

    def test_what_escapes_with_a_code(self, serve: Any, events: Events) -> None:
        """A code that was set before is the status, and the error is told as well."""

        def fail(context: Any) -> None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            raise LookupError

        served = serve(fail=fail)
        with pytest.raises(grpc.RpcError):
            served.call("fail_unary_unary", metadata=ANN)

        assert [404] == [status for *_, status in responses(events)]
        assert ["LookupError"] == [kind for _, kind, _ in errors(events)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_abort_is_an_answer(self, server, serve, events, kind) -> None:
        """`context.abort` below 500 makes the response alone."""
        skip_where_grpc_fails(server, kind)
        served = serve(
            gone=lambda context: context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        )
        with pytest.raises(grpc.RpcError) as caught:
            served.call(f"gone_{kind}", kind=kind, metadata=ANN)
        served.stop()  # aio answers first

        assert (grpc.StatusCode.NOT_FOUND, "gone") == (
            caught.value.code(),
            caught.value.details(),
        )
        assert [404] == [status for *_, status in responses(events)]
        assert [] == errors(events)

    @pytest.mark.parametrize("kind", KINDS)
    def test_abort_of_500(self, server, serve, events, kind) -> None:
        """`context.abort` of 500 and above is an error, by its code and details."""
        skip_where_grpc_fails(server, kind)
        served = serve(
            down=lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "bank")
        )
        with pytest.raises(grpc.RpcError):
            served.call(f"down_{kind}", kind=kind, metadata=ANN)
        served.stop()  # aio answers first

        assert [503] == [status for *_, status in responses(events)]
        assert [("sess_ann", "UNAVAILABLE", "bank")] == errors(events)

    def test_code_without_an_exception(self, serve: Any, events: Events) -> None:
        """A code that is set is the status; from 500 on it makes an error."""

        def set_code(code: Any, details: str) -> Callable[[Any], None]:
            def body(context: Any) -> None:
                context.set_code(code)
                context.set_details(details)

            return body

        served = serve(
            ok=set_code(grpc.StatusCode.OK, ""),
            gone=set_code(grpc.StatusCode.NOT_FOUND, "gone"),
            lost=set_code(grpc.StatusCode.DATA_LOSS, ""),
        )
        for name in ("ok", "gone", "lost"):
            with contextlib.suppress(grpc.RpcError):
                served.call(f"{name}_unary_unary", metadata=ANN)

        assert [200, 404, 500] == [status for *_, status in responses(events)]
        assert [("sess_ann", "DATA_LOSS", "Internal Server Error")] == errors(events)

    def test_abort_in_a_step_is_told_once(self, server, serve, events) -> None:
        """An abort that a decorated step has told already is not told again."""

        @pgtrack.journey_step("pay", journey="checkout")
        def pay(context: Any) -> None:
            context.abort(grpc.StatusCode.INTERNAL, "boom")

        @pgtrack.journey_step("pay", journey="checkout")
        async def apay(context: Any) -> None:
            await context.abort(grpc.StatusCode.INTERNAL, "boom")

        served = serve(pay=apay if server == "aio" else pay)
        with pytest.raises(grpc.RpcError):
            served.call("pay_unary_unary", metadata=ANN)
        served.stop()

        assert 1 == len(errors(events))
        assert [500] == [status for *_, status in responses(events)]

    def test_fails_to_begin(self, server: str, events: Events) -> None:
        """A function that raises before there is an iterator is told all the same."""

        def begin(_request: Any, _context: Any) -> Iterator[bytes]:
            raise LookupError

        handlers = {"begin": grpc.unary_stream_rpc_method_handler(begin)}
        with (
            serving(server, handlers, interceptor_of(server)) as served,
            pytest.raises(grpc.RpcError),
        ):
            served.call("begin", kind="unary_stream", metadata=ANN)

        assert [500] == [status for *_, status in responses(events)]
        assert ["LookupError"] == [kind for _, kind, _ in errors(events)]


class TestServerCancellation:
    """Calls that nobody waits for any more."""

    @pytest.mark.parametrize("server", ["sync", "aio"], indirect=True)
    @pytest.mark.parametrize("end", ["cancel", "deadline"])
    @pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
    def test_told_as_such(self, server, serve, events, kind, end) -> None:
        """A call that is cancelled is a 499, one that is too late a 504."""
        started, done = threading.Event(), threading.Event()

        def wait(context: Any) -> Any:
            started.set()
            if server == "aio":
                return asyncio.sleep(60)
            over = threading.Event()
            if context.add_callback(over.set):
                assert over.wait(PATIENCE)
            done.set()
            return None

        served = serve(wait=wait)
        with grpc.insecure_channel(served.target) as channel:
            function = getattr(channel, kind)(f"/shop.Cart/wait_{kind}")
            start = function.future if kind == "unary_unary" else function
            call = start(b"", metadata=ANN, timeout=0.3 if end == "deadline" else 30)
            assert started.wait(PATIENCE)
            if end == "cancel":
                call.cancel()
            with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
                call.result()
        served.stop()

        expected = 499 if end == "cancel" else 504
        assert [expected] == [status for *_, status in responses(events)]
        late = [("sess_ann", "DEADLINE_EXCEEDED", "Gateway Timeout")]
        assert (late if end == "deadline" else []) == errors(events)

    @pytest.mark.parametrize("server", ["sync", "aio"], indirect=True)
    def test_stream_that_nobody_reads(self, server: str, events: Events) -> None:
        """A stream that is cancelled between two steps ends in its own session."""
        seen: list[str | None] = []
        second = threading.Event()

        def count(_request: Any, _context: Any) -> Iterator[bytes]:
            try:
                for i in itertools.count():
                    if i > 1:
                        second.set()
                    yield b"x" * 60_000
            finally:
                seen.append(pgtrack.current().session_id)

        async def acount(_request: Any, _context: Any) -> Any:
            try:
                for i in itertools.count():
                    if i > 1:
                        second.set()
                    yield b"x" * 60_000
            finally:
                seen.append(pgtrack.current().session_id)

        function = acount if server == "aio" else count
        handlers = {"count": grpc.unary_stream_rpc_method_handler(function)}
        with serving(server, handlers, interceptor_of(server)) as served:
            with grpc.insecure_channel(served.target) as channel:
                call = channel.unary_stream("/shop.Cart/count")
                answers = call(b"", metadata=ANN, timeout=PATIENCE)
                next(answers)
                assert second.wait(PATIENCE)
                answers.cancel()
            served.stop()

        assert ["sess_ann"] == seen
        assert [499] == [status for *_, status in responses(events)]
        assert [] == errors(events)

    def test_request_stream_that_breaks_off(self, events: Events) -> None:
        """An error of gRPC itself, to a handler that reads on, is no failure of it."""
        started = threading.Event()

        def read(requests: Any, context: Any) -> bytes:
            gone = threading.Event()
            context.add_callback(gone.set)
            for _request in requests:
                started.set()
                assert gone.wait(PATIENCE)  # else the end of the stream may come first
            return b""

        handlers = {"read": grpc.stream_unary_rpc_method_handler(read)}
        go_on = threading.Event()

        def requests() -> Iterator[bytes]:
            yield b"1"
            go_on.wait(PATIENCE)

        with serving("sync", handlers, interceptor_of("sync")) as served:
            with grpc.insecure_channel(served.target) as channel:
                call = channel.stream_unary("/shop.Cart/read")
                future = call.future(requests(), metadata=ANN, timeout=PATIENCE)
                assert started.wait(PATIENCE)
                future.cancel()
            served.stop()
            go_on.set()

        assert [499] == [status for *_, status in responses(events)]
        assert [] == errors(events)

    def test_failure_after_cancellation(self, events: Events) -> None:
        """What a handler raises when nobody waits any more is an error still."""
        started = threading.Event()

        def fail(_request: Any, context: Any) -> bytes:
            over = threading.Event()
            context.add_callback(over.set)
            started.set()
            assert over.wait(PATIENCE)
            raise LookupError

        handlers = {"fail": grpc.unary_unary_rpc_method_handler(fail)}
        with serving("sync", handlers, interceptor_of("sync")) as served:
            with grpc.insecure_channel(served.target) as channel:
                call = channel.unary_unary("/shop.Cart/fail")
                future = call.future(b"", metadata=ANN, timeout=PATIENCE)
                assert started.wait(PATIENCE)
                future.cancel()
            served.stop()

        assert [499] == [status for *_, status in responses(events)]
        assert ["LookupError"] == [kind for _, kind, _ in errors(events)]


class TestServerLeavesNothingBehind:
    """The next call, and what runs between two steps, see nothing of a call."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_next_call(self, serve: Any, events: Events, kind: str) -> None:
        """A call without metadata has a fresh session of its own, on any thread."""

        def body(_: Any) -> bytes:
            seen = str(pgtrack.current().session_id).encode()
            _context.push(_context.Frame(None, session_id="left open"))
            return seen

        served = serve(mark=body)
        metadata = [ANN, None, None]
        answers = [
            served.call(f"mark_{kind}", kind=kind, metadata=given) for given in metadata
        ]

        first, *fresh = (
            str(a[-1] if isinstance(a, list) else a, "ascii") for a in answers
        )
        assert "sess_ann" == first
        assert all(map(_FRESH, fresh))
        assert 3 == len({e.session_id for e in events} & {first, *fresh})

    def test_between_the_steps(self, serve: Any) -> None:
        """What gRPC does between two answers is in no session."""
        between: list[str | None] = []

        def serialize(answer: bytes) -> bytes:
            between.append(pgtrack.current().session_id)
            return answer

        served = serve({"response_serializer": serialize}, mark=lambda _: None)
        for kind in KINDS:
            served.call(f"mark_{kind}", kind=kind, metadata=ANN)

        assert [None] * 6 == between

    @pytest.mark.parametrize("kind", KINDS)
    def test_tables_are_empty(self, serve: Any, kind: str) -> None:
        """No call is remembered behind its end."""
        served = serve(mark=lambda _: None, fail=lambda _: 1 / 0)
        for name in ("mark", "fail"):
            with contextlib.suppress(grpc.RpcError):
                served.call(f"{name}_{kind}", kind=kind)

        assert {} == integration._served


class TestServerOptions:
    """Which calls are told, and by whom."""

    def test_track_api_is_the_calls_own(self, serve: Any, events: Events) -> None:
        """A decorated handler makes no second event, and its path wins."""

        @pgtrack.track_api("/carts", method="GET")
        def body(_: Any) -> None:
            return None

        served = serve(mark=body)
        served.call("mark_unary_unary", metadata=ANN)

        assert [("sess_ann", "GET", "/carts", 200)] == responses(events)

    def test_excluded(self, serve: Any, events: Events) -> None:
        """Calls of excluded methods are in their session, and make no event."""
        served = serve(
            None,
            {"exclude": "/shop.Cart/mark_*"},
            mark=lambda _: str(pgtrack.current().session_id).encode(),
        )
        answer = served.call("mark_unary_unary", metadata=ANN)

        assert b"sess_ann" == answer
        assert [] == events

    def test_untracked(self, serve: Any, events: Events) -> None:
        """With `track=False` there is the correlation alone."""
        served = serve(None, {"track": False}, mark=lambda _: None)
        served.call("mark_unary_unary", metadata=ANN)

        assert [] == events

    def test_client_of_its_own(self, serve: Any, events: Events) -> None:
        """Another client has the events, not the default one."""
        own = pgtrack.Client(pgtrack.Config(enabled=False))
        served = serve(None, {"client": own}, mark=lambda _: None)
        served.call("mark_unary_unary", metadata=ANN)

        assert [] == events

    def test_unknown_method(self, serve: Any, events: Events) -> None:
        """A method that there is not is told as a 501."""
        served = serve()
        with pytest.raises(grpc.RpcError) as caught:
            served.call("nothing", metadata=ANN)

        assert grpc.StatusCode.UNIMPLEMENTED is caught.value.code()
        assert [("sess_ann", "POST", "/shop.Cart/nothing", 501)] == responses(events)
        assert [("sess_ann", "UNIMPLEMENTED", "Not Implemented")] == errors(events)

    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_two_interceptors(self, server, events, kind, track) -> None:
        """Of two interceptors the outer one tells a call, unless it tells nothing."""
        handlers = Shop(server, mark=lambda _: None).handlers()
        both = interceptor_of(server, track=track), interceptor_of(server)
        with serving(server, handlers, *both) as served:
            served.call(f"mark_{kind}", kind=kind, metadata=ANN)

        assert 1 == len(responses(events))

    def test_two_interceptors_and_an_unknown_method(self, server, events) -> None:
        """A method that there is not is told by the outer one of two interceptors."""
        both = interceptor_of(server), interceptor_of(server)
        with (
            serving(server, {}, *both) as served,
            pytest.raises(grpc.RpcError),
        ):
            served.call("nothing", metadata=ANN)

        assert [501] == [status for *_, status in responses(events)]
        assert set() == integration._asked

    @pytest.mark.parametrize("kind", KINDS)
    def test_two_interceptors_and_a_failure(self, server, events, kind) -> None:
        """What fails below two interceptors is told once."""
        handlers = Shop(server, fail=lambda _: {}["x"]).handlers()
        both = interceptor_of(server), interceptor_of(server)
        with (
            serving(server, handlers, *both) as served,
            pytest.raises(grpc.RpcError),
        ):
            served.call(f"fail_{kind}", kind=kind, metadata=ANN)

        assert (1, 1) == (len(responses(events)), len(errors(events)))

    def test_other_iterators(self, server: str, events: Events) -> None:
        """A handler may return any iterator; its steps are in the session, too."""

        class Answers:
            left = 2

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> bytes:
                if not self.left:
                    raise StopIteration
                self.left -= 1
                return str(pgtrack.current().session_id).encode()

        def answers(_request: Any, _context: Any) -> Answers:
            return Answers()

        handlers = {"mark": grpc.unary_stream_rpc_method_handler(answers)}
        with serving(server, handlers, interceptor_of(server)) as served:
            got = served.call("mark", kind="unary_stream", metadata=ANN)

        assert [b"sess_ann"] * 2 == got
        assert [200] == [status for *_, status in responses(events)]

    def test_coroutine_that_writes(self, events: Events) -> None:
        """In aio a stream may be written by a coroutine function."""

        async def write(_request: Any, context: Any) -> None:
            for _ in range(2):
                await context.write(str(pgtrack.current().session_id).encode())

        handlers = {"write": grpc.unary_stream_rpc_method_handler(write)}
        with serving("aio", handlers, interceptor_of("aio")) as served:
            got = served.call("write", kind="unary_stream", metadata=ANN)

        assert [b"sess_ann"] * 2 == got
        assert [200] == [status for *_, status in responses(events)]

    @pytest.mark.parametrize("place", ["observed", "begin", "echo", "end"])
    def test_our_errors_do_not_reach_the_host(
        self, serve: Any, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of our own leaves the call as it is."""

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(_diagnostics, "reraise", False)
        owner, name = {
            "observed": (integration, "_wrapper_of"),
            "begin": (integration.Serving, "_tells"),  # of unknown methods, too
            "echo": (integration._Call, "_echo"),
            "end": (integration._Call, "_end"),
        }[place]
        monkeypatch.setattr(owner, name, fail)
        served = serve(mark=lambda _: None)
        answers = [
            served.call("mark_unary_unary"),
            served.call("mark_unary_stream", kind="unary_stream"),
        ]
        with pytest.raises(grpc.RpcError):
            served.call("nothing")

        assert [b"ok", [b"first", b"ok"]] == answers
        assert any("ZeroDivisionError" in note for note in _diagnostics._notes)


def test_codes() -> None:
    """Each code of gRPC has its status of HTTP."""
    assert {
        "OK": 200,
        "CANCELLED": 499,
        "UNKNOWN": 500,
        "INVALID_ARGUMENT": 400,
        "DEADLINE_EXCEEDED": 504,
        "NOT_FOUND": 404,
        "ALREADY_EXISTS": 409,
        "PERMISSION_DENIED": 403,
        "RESOURCE_EXHAUSTED": 429,
        "FAILED_PRECONDITION": 400,
        "ABORTED": 409,
        "OUT_OF_RANGE": 400,
        "UNIMPLEMENTED": 501,
        "INTERNAL": 500,
        "UNAVAILABLE": 503,
        "DATA_LOSS": 500,
        "UNAUTHENTICATED": 401,
    } == {code.name: integration._STATUSES[code] for code in grpc.StatusCode}


@pytest.mark.parametrize("server", ["sync", "aio"], indirect=True)
def test_odd_codes(serve: Any, events: Events) -> None:
    """A code may be a number; one that there is not is UNKNOWN."""
    served = serve(
        number=lambda context: context.set_code(5),
        odd=lambda context: context.set_code(77),
    )
    for name in ("number", "odd"):
        with contextlib.suppress(grpc.RpcError):
            served.call(f"{name}_unary_unary", metadata=ANN)

    assert [404, 500] == [status for *_, status in responses(events)]


# --- channels ----------------------------------------------------------------------


class Seen:
    """A server that keeps what it is called with."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, list[str]]] = []

    def handlers(self) -> dict[str, Any]:
        """Return the handlers that keep the metadata."""

        def keep(context: Any) -> None:
            found: dict[str, list[str]] = {}
            for key, value in context.invocation_metadata():
                found.setdefault(key, []).append(value)
            self.metadata.append(found)

        return Shop("sync", keep=keep).handlers()

    @property
    def sessions(self) -> list[list[str] | None]:
        """The session ids of each call."""
        return [found.get("x-session-id") for found in self.metadata]

    @property
    def requests(self) -> list[list[str] | None]:
        """The request ids of each call."""
        return [found.get("x-request-id") for found in self.metadata]


@pytest.fixture(name="seen")
def _seen() -> Seen:
    return Seen()


@pytest.fixture(name="target")
def _target(seen: Seen) -> Iterator[str]:
    with serving("sync", seen.handlers()) as served:
        yield served.target


def call_all(channel: Any, **options: Any) -> None:
    """Call each kind of method in each way."""
    for kind in KINDS:
        method = getattr(channel, kind)(f"/shop.Cart/keep_{kind}")
        requests = (lambda: iter([b"1"])) if kind.startswith("stream") else bytes
        options["timeout"] = PATIENCE
        if kind.endswith("stream"):
            list(method(requests(), **options))
        else:
            method(requests(), **options)
            method.with_call(requests(), **options)
            method.future(requests(), **options).result(PATIENCE)


async def acall_all(channel: Any, **options: Any) -> None:
    """Call each kind of method."""
    for kind in KINDS:
        method = getattr(channel, kind)(f"/shop.Cart/keep_{kind}")
        requests = (lambda: iter([b"1"])) if kind.startswith("stream") else bytes
        call = method(requests(), timeout=PATIENCE, **options)
        if kind.endswith("stream"):
            async for _ in call:
                pass
        else:
            await call


class TestChannel:
    """Calls to listed targets carry the session, and calls to others nothing."""

    def test_all_kinds(self, target: str, seen: Seen) -> None:
        """Each way to call has the session and the request id, and no user."""
        integration.install()
        pgtrack.configure(propagate_to=[target])
        with (
            pgtrack.continued_from(dict(ANN)),
            grpc.insecure_channel(target) as channel,
        ):
            pgtrack.identify("u_ann")
            call_all(channel)

        assert [["sess_ann"]] * 8 == seen.sessions
        assert [["req-1"]] * 8 == seen.requests
        assert not any({"x-user-id", "x-journey-id"} & {*m} for m in seen.metadata)

    def test_all_kinds_in_aio(self, target: str, seen: Seen) -> None:
        """The same in aio."""

        async def main() -> None:
            async with grpc.aio.insecure_channel(target) as channel:
                with pgtrack.continued_from(dict(ANN)):
                    await acall_all(channel)
                await acall_all(channel)

        integration.install()
        pgtrack.configure(propagate_to=["127.0.0.1"])
        asyncio.run(main())

        assert [["sess_ann"]] * 4 + [None] * 4 == seen.sessions
        assert [["req-1"]] * 4 + [None] * 4 == seen.requests

    @pytest.mark.parametrize(
        "given",
        [
            (("x-a", "1"),),
            [("x-a", "1")],
            grpc.aio.Metadata(("x-a", "1")),
            (("x-a", "1"), ("x-session-id", "mine")),
            None,
        ],
        ids=["tuple", "list", "aio", "own", "none"],
    )
    def test_metadata_of_the_caller(self, target: str, seen: Seen, given: Any) -> None:
        """What the caller gives stays, also its own session, and is not changed."""
        before = None if given is None else list(given)

        async def main() -> None:
            async with grpc.aio.insecure_channel(target) as channel:
                method = channel.unary_unary("/shop.Cart/keep_unary_unary")
                await method(b"", metadata=given)

        integration.install()
        pgtrack.configure(propagate_to=[target])
        with pgtrack.session("sess_ann"):
            with grpc.insecure_channel(target) as channel:
                method = channel.unary_unary("/shop.Cart/keep_unary_unary")
                method(b"", PATIENCE, given)
                method(b"", metadata=given, timeout=PATIENCE)
            asyncio.run(main())

        expected = ["mine"] if before and len(before) > 1 else ["sess_ann"]
        assert [expected] * 3 == seen.sessions
        assert [before and ["1"]] * 3 == [m.get("x-a") for m in seen.metadata]
        assert before == (None if given is None else list(given))

    def test_interceptors_of_the_caller(self, target: str, seen: Seen) -> None:
        """What an interceptor around the channel adds counts as the caller's."""

        class Adding(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
            def intercept_unary_unary(self, go_on, details, request) -> Any:
                details = details._replace(metadata=(("x-session-id", "mine"),))
                return go_on(details, request)

        integration.install()
        pgtrack.configure(propagate_to=[target])
        with pgtrack.session("sess_ann"), grpc.insecure_channel(target) as channel:
            around = grpc.intercept_channel(channel, Adding())
            around.unary_unary("/shop.Cart/keep_unary_unary")(b"", timeout=PATIENCE)

        assert [["mine"]] == seen.sessions

    def test_nothing_elsewhere(self, target: str, seen: Seen) -> None:
        """Neither a target that is not listed, nor calls outside of a session."""
        integration.install()
        pgtrack.configure(propagate_to=["localhost", "*.example"])
        with grpc.insecure_channel(target) as channel:
            with pgtrack.session("sess_ann"):
                call_all(channel)
            pgtrack.configure(propagate_to=[target])
            call_all(channel)
            with pgtrack.session("sess_ann"), _context.suppress():
                call_all(channel)

        assert [None] * 24 == seen.sessions

    def test_never_mixes(self, target: str, seen: Seen) -> None:
        """Of hundreds of calls on one channel each has the session it was made in."""
        integration.install()
        pgtrack.configure(propagate_to=[target])
        with grpc.insecure_channel(target) as channel:
            method = channel.unary_unary("/shop.Cart/keep_unary_unary")

            def one(i: int) -> None:
                with pgtrack.session(f"sess_{i}"):
                    method(b"", metadata=(("x-own", f"sess_{i}"),), timeout=PATIENCE)

            with futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(one, range(150)))

        assert 150 == len(seen.metadata)
        assert [m["x-own"] for m in seen.metadata] == seen.sessions

    def test_cancelled(self) -> None:
        """A call that is cancelled leaves nothing, and the next has its own session."""
        come, go_on = threading.Event(), threading.Event()
        sessions = []

        def wait(context: Any) -> None:
            sessions.append(dict(context.invocation_metadata()).get("x-session-id"))
            come.set()
            assert len(sessions) > 1 or go_on.wait(PATIENCE)

        integration.install()
        pgtrack.configure(propagate_to=["127.0.0.1"])
        with (
            serving("sync", Shop("sync", wait=wait).handlers()) as served,
            grpc.insecure_channel(served.target) as channel,
        ):
            method = channel.unary_unary("/shop.Cart/wait_unary_unary")
            with pgtrack.session("ann"):
                call = method.future(b"", timeout=PATIENCE)
            assert come.wait(PATIENCE)
            call.cancel()
            with pgtrack.session("ben"):
                method(b"", timeout=PATIENCE)
            method(b"", timeout=PATIENCE)
            go_on.set()

        assert ["ann", "ben", None] == sessions

    def test_failures_are_grpcs(self) -> None:
        """A call that fails raises what it does without us."""
        with serving("sync", {}) as served:
            target = served.target
        kinds = []
        for _ in range(2):
            with (
                pgtrack.session("sess_ann"),
                grpc.insecure_channel(target) as channel,
                pytest.raises(grpc.RpcError) as caught,
            ):
                channel.unary_unary("/shop.Cart/x")(b"", timeout=PATIENCE)
            kinds.append((caught.type, caught.value.code()))
            integration.install()
            pgtrack.configure(propagate_to=[target])

        assert kinds[0] == kinds[1]

    def test_secure_channels(self, target: str) -> None:
        """Channels over TLS are covered, and are channels as before."""
        integration.install()
        credentials = grpc.ssl_channel_credentials()
        with grpc.secure_channel(target, credentials=credentials) as channel:
            is_channel = isinstance(channel, grpc.Channel)

        async def main() -> bool:
            async with grpc.aio.secure_channel(target, credentials) as channel:
                return isinstance(channel, grpc.aio.Channel)

        assert (True, True) == (is_channel, asyncio.run(main()))

    def test_target_by_keyword(self, target: str, seen: Seen) -> None:
        """The target may be given by its name."""
        integration.install()
        pgtrack.configure(propagate_to=[target])
        with pgtrack.session("a"), grpc.insecure_channel(target=target) as channel:
            channel.unary_unary("/shop.Cart/keep_unary_unary")(b"", timeout=PATIENCE)

        assert [["a"]] == seen.sessions

    def test_explicitly(self, target: str, seen: Seen) -> None:
        """`intercept_channel` does it for one channel, installed or not."""
        client = pgtrack.Client(pgtrack.Config(enabled=False, propagate_to=[target]))
        with pgtrack.session("sess_ann"), grpc.insecure_channel(target) as channel:
            own = integration.intercept_channel(channel, target, client=client)
            own.unary_unary("/shop.Cart/keep_unary_unary")(b"", timeout=PATIENCE)
            twice = integration.intercept_channel(own, target, client=client)
            twice.unary_unary("/shop.Cart/keep_unary_unary")(b"", timeout=PATIENCE)

        assert [["sess_ann"]] * 2 == seen.sessions

    def test_our_errors_do_not_reach_the_host(
        self, target: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of our own costs the metadata, and not the call."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        integration.install()
        pgtrack.configure(propagate_to=[target])
        with pgtrack.session("sess_ann"):
            with grpc.insecure_channel(target) as channel:
                monkeypatch.setattr(integration, "_with", None)
                method = channel.unary_unary("/shop.Cart/keep_unary_unary")
                method(b"", timeout=PATIENCE)
            monkeypatch.setattr(integration, "_Target", None)
            with grpc.insecure_channel(target) as channel:
                method = channel.unary_unary("/shop.Cart/keep_unary_unary")
                method(b"", timeout=PATIENCE)

        assert [None, None] == seen.sessions
        assert 2 == len(_diagnostics._notes)


@pytest.mark.parametrize(
    ("target", "addresses"),
    [
        ("a.example", [("a.example", None)]),
        ("a.example:50051", [("a.example", 50051)]),
        (b"a.example:50051", [("a.example", 50051)]),
        ("dns:a.example:1", [("a.example", 1)]),
        ("dns:///a.example:1", [("a.example", 1)]),
        ("dns://8.8.8.8/a.example:1", [("a.example", 1)]),
        ("dns://a.example/evil.example", [("evil.example", None)]),
        ("[::1]:50051", [("[::1]", 50051)]),
        ("ipv4:127.0.0.1:1,127.0.0.2", [("127.0.0.1", 1), ("127.0.0.2", None)]),
        ("ipv6:[::1]:1", [("[::1]", 1)]),
        ("unix:a.example", []),
        ("unix:///a.example", []),
        ("unix-abstract:a.example", []),
        ("vsock:1:2", []),
        ("xds:///a.example", []),
        ("http://a.example", []),
        ("a.example@evil.example", []),
        ("a.example/evil", []),
        ("a.example:1:2", []),
        ("a%2eexample", []),
        ("", []),
    ],
)
def test_addresses(target: Any, addresses: list[Any]) -> None:
    """A target is read as gRPC reads it; what is not plainly a host is none."""
    assert addresses == integration._addresses(target)


def test_all_addresses_have_to_be_listed() -> None:
    """A target with one address that is not listed gets nothing."""
    client = pgtrack.Client(pgtrack.Config(enabled=False, propagate_to=["127.0.0.1"]))
    outbound = integration.Outbound(client)
    with pgtrack.session("sess_ann"):
        found = [
            integration._Target(target, outbound, lambda: True)._headers()
            for target in (
                "ipv4:127.0.0.1:1",
                "ipv4:127.0.0.1:1,127.0.0.2:1",
                "ipv4:127.0.0.2:1,127.0.0.1:1",
            )
        ]

    assert [{"X-Session-ID": "sess_ann"}, {}, {}] == found


class TestInstall:
    """Servers and channels that are made behind `install`."""

    def test_servers(self, server: str, events: Events) -> None:
        """A server made afterwards tells its calls, until `uninstall`."""
        integration.install()
        integration.install()
        handlers = Shop(server, mark=lambda _: None).handlers()
        with serving(server, handlers) as served:
            served.call("mark_unary_unary", metadata=ANN)
            integration.uninstall()
            served.call("mark_unary_unary", metadata=ANN)

        assert [("sess_ann", "POST", "/shop.Cart/mark_unary_unary", 200)] == responses(
            events
        )

    def test_channels(self, target: str, seen: Seen) -> None:
        """A channel made afterwards carries the session, until `uninstall`."""
        originals = grpc.insecure_channel, grpc.aio.insecure_channel, grpc.server
        integration.install()
        pgtrack.configure(propagate_to=[target])
        with pgtrack.session("sess_ann"), grpc.insecure_channel(target) as channel:
            method = channel.unary_unary("/shop.Cart/keep_unary_unary")
            method(b"", timeout=PATIENCE)
            integration.uninstall()
            method(b"", timeout=PATIENCE)

        assert [["sess_ann"], None] == seen.sessions
        assert originals == (
            grpc.insecure_channel,
            grpc.aio.insecure_channel,
            grpc.server,
        )

    def test_with_interceptors_of_the_host(self, server: str, events: Events) -> None:
        """Ours is around theirs, also where theirs answers in place of a handler."""

        def refuse(_request: Any, context: Any) -> Any:
            return context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")

        handler = grpc.unary_unary_rpc_method_handler(refuse)
        base = (
            grpc.ServerInterceptor if server == "sync" else grpc.aio.ServerInterceptor
        )

        class Gate(base):  # type: ignore[misc, valid-type]
            def intercept_service(self, _: Any, __: Any) -> Any:
                return handler if server == "sync" else self.answer()

            async def answer(self) -> Any:
                return handler

        integration.install()
        with (
            serving(server, {}, Gate()) as served,
            pytest.raises(grpc.RpcError),
        ):
            served.call("mark_unary_unary", metadata=ANN)

        assert [401] == [status for *_, status in responses(events)]
        assert [] == errors(events)

    def test_together_with_the_interceptor(self, server: str, events: Events) -> None:
        """Installed and given by hand, it tells each call once."""
        integration.install()
        handlers = Shop(server, mark=lambda _: None).handlers()
        with serving(server, handlers, interceptor_of(server)) as served:
            served.call("mark_unary_unary", metadata=ANN)

        assert 1 == len(responses(events))

    def test_positional_interceptors(self, events: Events) -> None:
        """`grpc.server` may be given its interceptors by position."""
        integration.install()
        handlers = Shop("sync", mark=lambda _: None).handlers()
        generic = grpc.method_handlers_generic_handler("shop.Cart", handlers)
        pool = futures.ThreadPoolExecutor(1)
        server = grpc.server(pool, (generic,), None, ())
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            channel.unary_unary("/shop.Cart/mark_unary_unary")(b"", timeout=PATIENCE)
        assert server.stop(None).wait(PATIENCE)
        pool.shutdown()

        assert 1 == len(responses(events))

    def test_wrong_options(self) -> None:
        """A wrong option is told at once, and nothing is installed."""
        with pytest.raises(TypeError, match="exclude must be paths"):
            integration.install(exclude=[b"/x"])  # type: ignore[list-item]

        assert not integration._patches.is_on

    def test_chain(self) -> None:
        """A service that calls another hands its session on."""
        integration.install()
        handlers = Shop("sync", mark=lambda _: None).handlers()
        with (
            capture(propagate_to=["127.0.0.1"]) as events,
            serving("sync", handlers) as inner,
        ):
            inner_channel = grpc.insecure_channel(inner.target)
            method = inner_channel.unary_unary("/shop.Cart/mark_unary_unary")
            inner.channels.append(inner_channel)
            outer_handlers = Shop(
                "sync", ask=lambda _: method(b"", timeout=PATIENCE)
            ).handlers()
            with serving("sync", outer_handlers) as outer:
                outer.call("ask_unary_unary", metadata=ANN)

        assert [
            ("sess_ann", "POST", "/shop.Cart/mark_unary_unary", 200),
            ("sess_ann", "POST", "/shop.Cart/ask_unary_unary", 200),
        ] == responses(events)
