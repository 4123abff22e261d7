"""
The kit's own rows of the matrix: how work changes hands in Python without a framework.

Rows are the hand-offs in `HOPS`, and the generators in classes of their own; columns
are the functions, and `TestCancellation`.  What one hand-off alone does is in
`test_blocks.py`, `test_decorators.py` and `integrations/test_concurrent.py`.
"""

# ruff: noqa: D103  what is handed over needs no documentation

from __future__ import annotations

import asyncio
import functools
import gc
import multiprocessing
import operator
import threading
import time
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import pytest
import trio

import pgtrack
from harness import start_together
from pgtrack._context import current_frame
from pgtrack.integrations import concurrent
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    from pgtrack.testing import Events

TIMEOUT = 20

carried = functools.partial(pgtrack.propagation_headers, True)
"""Returns what is known of session, request, user and journey; any child has it."""

divide = functools.partial(operator.truediv, 1, 0)
"""Fails; any child has it."""


def here() -> str | None:
    return pgtrack.current().session_id


# --- the rows: in a loop ---


async def called(function: Callable[[], Any]) -> Any:
    await anyio.lowlevel.checkpoint()
    return function()


async def by_task(function: Callable[[], Any]) -> Any:
    return await asyncio.create_task(called(function))


async def by_gather(function: Callable[[], Any]) -> Any:
    return (await asyncio.gather(called(function), called(function)))[1]


def settle(future: Any, function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


async def settle_later(future: Any, function: Callable[[], Any]) -> None:
    await anyio.lowlevel.checkpoint()
    settle(future, function)


async def by_call_soon(function: Callable[[], Any]) -> Any:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    loop.call_soon(settle, future, function)
    return await future


async def by_call_later(function: Callable[[], Any]) -> Any:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    loop.call_later(0.001, settle, future, function)
    return await future


async def by_to_thread(function: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(function)


async def by_run_in_executor(function: Callable[[], Any]) -> Any:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, function)


async def by_anyio_task(function: Callable[[], Any]) -> Any:
    future: Future[Any] = Future()
    async with anyio.create_task_group() as group:
        group.start_soon(settle_later, future, function)
    return future.result(0)


async def by_anyio_thread(function: Callable[[], Any]) -> Any:
    return await anyio.to_thread.run_sync(function)


async def by_trio_task(function: Callable[[], Any]) -> Any:
    future: Future[Any] = Future()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(settle_later, future, function)
    return future.result(0)


async def by_trio_thread(function: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(function)


async def by_coroutine(function: Callable[[], Any]) -> Any:
    return await called(function)


# --- the rows: without one ---


def by_call(_: Executor | None, function: Callable[[], Any]) -> Any:
    return function()


def by_thread(_: Executor | None, function: Callable[[], Any]) -> Any:
    future: Future[Any] = Future()
    thread = threading.Thread(target=settle, args=(future, function))
    thread.start()
    thread.join(TIMEOUT)
    return future.result(0)


def by_bound_thread(_: Executor | None, function: Callable[[], Any]) -> Any:
    return by_thread(None, pgtrack.bind(function))


def by_pool(pool: Executor | None, function: Callable[[], Any]) -> Any:
    assert pool is not None
    return pool.submit(function).result(TIMEOUT)


def by_bound_pool(pool: Executor | None, function: Callable[[], Any]) -> Any:
    return by_pool(pool, pgtrack.bind(function))


def by_headers(pool: Executor | None, function: Callable[[], Any]) -> Any:
    headers = pgtrack.propagation_headers(trusted=True)
    return by_pool(pool, pgtrack.continued_from(headers, trusted=True)(function))


def threads() -> Executor:
    return ThreadPoolExecutor(8)


def forked() -> Executor:
    return ProcessPoolExecutor(2, multiprocessing.get_context("fork"))


def spawned() -> Executor:
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


class Hop(NamedTuple):
    """
    A way for work to change hands.

    *needs_install* is whether `concurrent.install()` makes it one that keeps the
    session; *is_apart* whether it leads into another process.
    """

    hop: Callable[..., Any]
    backend: str | None = None
    make_pool: Callable[[], Executor] | None = None
    needs_install: bool = False
    is_apart: bool = False


HOPS = {
    "function": Hop(by_call),
    "coroutine": Hop(by_coroutine, "asyncio"),
    "asyncio task": Hop(by_task, "asyncio"),
    "asyncio.gather": Hop(by_gather, "asyncio"),
    "loop.call_soon": Hop(by_call_soon, "asyncio"),
    "loop.call_later": Hop(by_call_later, "asyncio"),
    "asyncio.to_thread": Hop(by_to_thread, "asyncio"),
    "loop.run_in_executor, install": Hop(
        by_run_in_executor, "asyncio", needs_install=True
    ),
    "anyio task, asyncio": Hop(by_anyio_task, "asyncio"),
    "anyio task, trio": Hop(by_anyio_task, "trio"),
    "anyio thread, asyncio": Hop(by_anyio_thread, "asyncio"),
    "anyio thread, trio": Hop(by_anyio_thread, "trio"),
    "trio task": Hop(by_trio_task, "trio"),
    "trio thread": Hop(by_trio_thread, "trio"),
    "Thread, bind": Hop(by_bound_thread),
    "Thread, install": Hop(by_thread, needs_install=True),
    "ThreadPoolExecutor, bind": Hop(by_bound_pool, make_pool=threads),
    "ThreadPoolExecutor, install": Hop(by_pool, None, threads, needs_install=True),
    "ProcessPool fork, headers": Hop(by_headers, None, forked, is_apart=True),
    "ProcessPool spawn, headers": Hop(by_headers, None, spawned, is_apart=True),
    "ProcessPool fork, install": Hop(by_pool, None, forked, True, is_apart=True),
    "ProcessPool spawn, install": Hop(by_pool, None, spawned, True, is_apart=True),
}


class Row:
    """
    A hand-off that is set up.
    """

    def __init__(self, hop: Hop, pool: Executor | None) -> None:
        self.is_apart = hop.is_apart
        self.has_own = hop.hop is by_headers
        self.times = 2 if hop.hop is by_gather else 1
        self._hop = hop
        self._pool = pool

    def carry(self, function: Callable[[], Any]) -> Any:
        """
        Hand *function* over; return its result, or raise what it raises.
        """
        if self._hop.backend is None:
            return self._hop.hop(self._pool, function)
        return anyio.run(self._hop.hop, function, backend=self._hop.backend)

    def carry_many(self, n: int) -> dict[str, tuple[Any, ...]]:
        """
        Hand over in *n* sessions that are open at once; return what each one saw.
        """
        if self._hop.backend is None:
            return self._in_threads(n)
        return anyio.run(self._in_tasks, n, backend=self._hop.backend)

    async def _in_tasks(self, n: int) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        gates = [anyio.Event(), anyio.Event()]
        inside = [0, 0]

        async def pass_together(i: int) -> None:
            inside[i] += 1
            if inside[i] == n:
                gates[i].set()
            await gates[i].wait()

        async def serve(name: str) -> None:
            with pgtrack.session(name, user_id=f"u_{name}"):
                await pass_together(0)
                seen = await self._hop.hop(carried)
                await pass_together(1)
                found[name] = (seen, await self._hop.hop(here), here())

        with anyio.fail_after(TIMEOUT):
            async with anyio.create_task_group() as group:
                for i in range(n):
                    group.start_soon(serve, f"sess_{i}")
        return found

    def _in_threads(self, n: int) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        width = 4 if self.is_apart else 8
        barrier = threading.Barrier(width)

        def serve(i: int) -> None:
            for j in range(i, n, width):
                name = f"sess_{j}"
                with pgtrack.session(name, user_id=f"u_{name}"):
                    barrier.wait(TIMEOUT)
                    seen = self.carry(carried)
                    barrier.wait(TIMEOUT)
                    found[name] = (seen, here(), here())

        start_together(width, serve)
        return found


@pytest.fixture(name="row", params=HOPS, scope="module")
def _row(request: pytest.FixtureRequest) -> Iterator[Row]:
    hop = HOPS[request.param]
    if hop.needs_install:
        concurrent.install()
    if hop.make_pool is None:
        yield Row(hop, None)
    else:
        with hop.make_pool() as pool:
            # Its threads and processes begin in a session, of which they know nothing.
            with pgtrack.session("sess_first"):
                begun = [pool.submit(time.sleep, 0.05) for _ in range(8)]
            wait(begun, TIMEOUT)
            yield Row(hop, pool)
    concurrent.uninstall()


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


# --- the columns ---


def test_session(row: Row) -> None:
    """What is handed over runs in the session of whoever hands it over."""
    with pgtrack.session("sess_a"):
        seen = row.carry(carried)

    assert "sess_a" == seen["X-Session-ID"]


def test_user_and_journey(row: Row) -> None:
    """User, journey and request come along."""
    headers = {
        "X-Session-ID": "sess_a",
        "X-Request-ID": "req_1",
        "X-User-ID": "u_1",
        "X-Journey-ID": "checkout",
    }
    with pgtrack.continued_from(headers, trusted=True):
        seen = row.carry(carried)

    assert headers == seen


def test_identify(row: Row) -> None:
    """A user named on the other side is known on this one, within a process."""
    with pgtrack.session("sess_a"):
        row.carry(functools.partial(pgtrack.identify, "u_late"))
        user_id = pgtrack.current().user_id

    assert (None if row.is_apart else "u_late") == user_id


def test_two_at_once_never_mix(row: Row) -> None:
    """Of many sessions, 8 to 1,000 of them open at once, each sees itself alone."""
    n = 200 if row.is_apart else 1_000

    found = row.carry_many(n)

    assert n == len(found)
    wanted = {
        name: (name, f"u_{name}", name, name)
        for name in (f"sess_{i}" for i in range(n))
    }
    assert wanted == {
        name: (seen["X-Session-ID"], seen["X-User-ID"], *others)
        for name, (seen, *others) in found.items()
    }


def test_exception(row: Row, events: Events) -> None:
    """An exception comes back, and is one error, however many sides track it."""
    work = pgtrack.track_api("/inner")(divide)
    outer = pgtrack.api_call("GET", "/outer")
    with pytest.raises(ZeroDivisionError), pgtrack.session("sess_a"), outer:
        row.carry(work)

    inner = [] if row.is_apart else ["/inner"] * row.times  # a child's are the child's
    assert row.times == len(events.of_type("error"))
    assert [*inner, "/outer"] == [e.api_path for e in events.of_type("api.response")]
    assert {"sess_a"} == {event.session_id for event in events}
    assert "sess_a" != row.carry(carried).get("X-Session-ID")


def test_nothing_left_behind(row: Row) -> None:
    """The next that is handed over, from outside, sees nothing of it."""
    with pgtrack.session("sess_a", user_id="u_1"), pgtrack.journey("checkout"):
        row.carry(carried)
    seen = [row.carry(carried) for _ in range(8)]

    assert current_frame() is None
    if row.has_own:  # `continued_from` gives each piece of work a session of its own
        ids = {one["X-Session-ID"] for one in seen}
        assert 8 == len(ids)
        assert all(session_id.startswith("srv-") for session_id in ids)
        assert [] == [
            one for one in seen if "X-User-ID" in one or "X-Journey-ID" in one
        ]
    else:
        assert [{}] * 8 == seen


class TestCancellation:
    """
    The column of cancellation; of processes see `integrations/test_concurrent.py`.
    """

    def check(self, events: Events) -> None:
        """
        One call was cancelled, in its session: no error, and nothing left.
        """
        assert [("api.response", "sess_a", 499)] == [
            (event.type, event.session_id, event.api_status_code) for event in events
        ]
        assert current_frame() is None

    def test_function(self, events: Events) -> None:
        """A function that Ctrl-C ends is no error."""

        @pgtrack.session("sess_a")
        @pgtrack.track_api("/wait")
        def work() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work()

        assert ["api.response"] == [event.type for event in events]
        assert current_frame() is None

    @pytest.mark.parametrize("kind", ["task", "gather", "anyio"])
    def test_asyncio(self, events: Events, kind: str) -> None:
        """A task that is cancelled in the middle tells so in its session."""

        @pgtrack.track_api("/wait")
        async def work(started: asyncio.Event) -> None:
            started.set()
            await asyncio.Event().wait()

        async def main() -> None:
            started = asyncio.Event()
            with pgtrack.session("sess_a"):
                if kind == "anyio":
                    async with anyio.create_task_group() as group:
                        group.start_soon(work, started)
                        await started.wait()
                        group.cancel_scope.cancel()
                    return
                job: Any = work(started)
                if kind == "gather":
                    job = asyncio.gather(job)
                task = asyncio.ensure_future(job)
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert current_frame() is None

        asyncio.run(asyncio.wait_for(main(), TIMEOUT))

        self.check(events)

    def test_trio(self, events: Events) -> None:
        """So does one of trio's."""

        @pgtrack.track_api("/wait")
        async def work(started: trio.Event) -> None:
            started.set()
            await trio.sleep_forever()

        async def main() -> None:
            started = trio.Event()
            with pgtrack.session("sess_a"), trio.fail_after(TIMEOUT):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(work, started)
                    await started.wait()
                    nursery.cancel_scope.cancel()

        trio.run(main)

        self.check(events)

    @pytest.mark.parametrize("kind", ["call_soon", "call_later"])
    def test_callbacks(self, kind: str) -> None:
        """A callback that is cancelled never runs, and the loop has nothing of it."""
        seen: list[str | None] = []

        async def main() -> None:
            loop = asyncio.get_running_loop()
            with pgtrack.session("sess_a"):
                if kind == "call_soon":
                    handle: asyncio.Handle = loop.call_soon(lambda: seen.append(here()))
                else:
                    handle = loop.call_later(0, lambda: seen.append(here()))
            handle.cancel()
            assert await by_call_later(here) is None

        asyncio.run(main())

        assert [] == seen

    def test_to_thread(self, events: Events) -> None:
        """A thread that its task no longer waits for ends in its session."""
        started, go, ended = threading.Event(), threading.Event(), threading.Event()

        @pgtrack.track_api("/thread")
        def work() -> None:
            started.set()
            go.wait(TIMEOUT)

        def work_and_end() -> None:
            work()
            ended.set()

        async def main() -> None:
            with pgtrack.session("sess_a"):
                task = asyncio.create_task(asyncio.to_thread(work_and_end))
            await asyncio.to_thread(started.wait, TIMEOUT)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go.set()
            assert await asyncio.to_thread(ended.wait, TIMEOUT)

        asyncio.run(main())

        assert [("/thread", "sess_a")] == [(e.api_path, e.session_id) for e in events]

    @pytest.mark.parametrize("by", ["bind", "install"])
    def test_thread_pool(self, by: str) -> None:
        """A task that is cancelled before it runs never does, and leaves nothing."""
        go = threading.Event()
        seen: list[str | None] = []
        if by == "install":
            concurrent.install()
        try:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(go.wait, TIMEOUT)
                with pgtrack.session("sess_a"):
                    future = pool.submit(pgtrack.bind(lambda: seen.append(here())))
                is_cancelled = future.cancel()
                go.set()
                assert pool.submit(here).result(TIMEOUT) is None
        finally:
            concurrent.uninstall()

        assert (True, []) == (is_cancelled, seen)


class TestTasksThatOutlive:
    """
    The row of asyncio's tasks: work that goes on after the request.
    """

    def test_session_goes_on(self, events: Events) -> None:
        """A task goes on in the session that has been left, and in no other."""

        async def work(go: asyncio.Event) -> None:
            await go.wait()
            pgtrack.emit("custom", name="late")

        async def main() -> None:
            go = asyncio.Event()
            with pgtrack.session("sess_a", user_id="u_1"):
                task = asyncio.create_task(work(go))
            with pgtrack.session("sess_b"):
                go.set()
                await task
            assert current_frame() is None

        asyncio.run(main())

        assert [("sess_a", "u_1")] == [(e.session_id, e.user_id) for e in events]

    def test_sessions_inside(self) -> None:
        """A session that a task opens is nobody else's."""

        async def work() -> str | None:
            pgtrack.session("sess_inner").__enter__()
            await asyncio.sleep(0)
            return here()

        async def main() -> list[str | None]:
            with pgtrack.session("sess_a"):
                inner = await asyncio.gather(work(), work())
                return [*inner, here()]

        assert ["sess_inner", "sess_inner", "sess_a"] == asyncio.run(main())


@pgtrack.track_api("/rows")
def rows(n: int) -> Iterator[tuple[str | None, str | None, str | None]]:
    for _ in range(n):
        now = pgtrack.current()
        yield now.session_id, now.user_id, now.journey_id


@pgtrack.track_api("/rows")
async def rows_async(
    n: int,
) -> AsyncGenerator[tuple[str | None, str | None, str | None], None]:
    for _ in range(n):
        now = pgtrack.current()
        yield now.session_id, now.user_id, now.journey_id
        await anyio.lowlevel.checkpoint()


@pgtrack.track_api("/rows")
def failing_rows() -> Iterator[int]:
    yield 1
    raise ZeroDivisionError


@pgtrack.track_api("/rows")
async def failing_rows_async() -> AsyncGenerator[int, None]:
    yield 1
    raise ZeroDivisionError


def statuses(events: Events) -> list[tuple[str | None, int | None]]:
    return [
        (event.session_id, event.api_status_code)
        for event in events.of_type("api.response")
    ]


class TestGenerator:
    """
    The row of generators, all columns.
    """

    def test_session(self) -> None:
        """Each step runs in the session of the call, wherever it is consumed."""
        with pgtrack.session("sess_a"):
            made = rows(3)
        with pgtrack.session("sess_b"):
            first = next(made)
            assert "sess_b" == here()
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(next, made).result(TIMEOUT)
            assert pool.submit(current_frame).result(TIMEOUT) is None

        assert ["sess_a"] * 3 == [one[0] for one in (first, second, *made)]

    def test_user_and_journey(self) -> None:
        """So has it user and journey."""
        with pgtrack.session("sess_a", user_id="u_1"), pgtrack.journey("checkout"):
            made = rows(2)

        assert [("sess_a", "u_1", "checkout")] * 2 == list(made)

    def test_two_at_once_never_mix(self, events: Events) -> None:
        """Thousands that are stepped in turn each stay in their own."""
        made = []
        for i in range(2_000):
            with pgtrack.session(f"sess_{i}"):
                made.append(rows(3))

        seen = [[one[0] for one in turn] for turn in zip(*made, strict=True)]

        assert [[f"sess_{i}" for i in range(2_000)]] * 3 == seen
        assert current_frame() is None

    def test_exception(self, events: Events) -> None:
        """What it raises reaches the consumer, and is told in its session."""
        with pgtrack.session("sess_a"):
            made = failing_rows()
        with pgtrack.session("sess_b"):
            next(made)
            with pytest.raises(ZeroDivisionError):
                next(made)
            assert "sess_b" == here()

        assert [("sess_a", 500)] == statuses(events)

    @pytest.mark.parametrize("how", ["close", "collect", "break"])
    def test_cancellation(self, events: Events, how: str) -> None:
        """A generator that nobody consumes to its end completes where it is closed."""
        with pgtrack.session("sess_a"):
            made = rows(3)
        with pgtrack.session("sess_b"):
            next(made)
            if how == "close":
                made.close()  # type: ignore[attr-defined]
            else:
                del made
                gc.collect()
            assert "sess_b" == here()

        assert [("sess_a", 200)] == statuses(events)

    def test_nothing_left_behind(self) -> None:
        """Neither in between nor afterwards is there anything in the consumer."""
        with pgtrack.session("sess_a"):
            made = rows(3)
        frames = [current_frame() for _ in made]

        assert [None] * 4 == [*frames, current_frame()]
        assert [(None, None, None)] == list(rows(1))


class TestAsyncGenerator:
    """
    The row of asynchronous generators, all columns; under asyncio and trio.
    """

    @pytest.fixture(name="run", params=["asyncio", "trio"])
    def _run(self, request: pytest.FixtureRequest) -> Callable[..., Any]:
        def run(main: Callable[[], Awaitable[Any]]) -> Any:
            return anyio.run(main, backend=request.param)

        return run

    def test_session(self, run: Callable[..., Any]) -> None:
        """Each step runs in the session of the call, whoever consumes it."""

        async def main() -> list[str | None]:
            seen = []
            with pgtrack.session("sess_a"):
                made = rows_async(3)

            async def take() -> None:
                with pgtrack.session("sess_consumer"):
                    seen.append((await made.__anext__())[0])
                    assert "sess_consumer" == here()

            await take()
            async with anyio.create_task_group() as group:
                group.start_soon(take)
            with pgtrack.session("sess_b"):
                seen.extend([one[0] async for one in made])
            return seen

        assert ["sess_a"] * 3 == run(main)

    def test_user_and_journey(self, run: Callable[..., Any]) -> None:
        """So has it user and journey."""

        async def main() -> list[Any]:
            with pgtrack.session("sess_a", user_id="u_1"), pgtrack.journey("checkout"):
                made = rows_async(2)
            return [one async for one in made]

        assert [("sess_a", "u_1", "checkout")] * 2 == run(main)

    def test_two_at_once_never_mix(self, run: Callable[..., Any]) -> None:
        """A thousand that are stepped in turn each stay in their own."""

        async def main() -> list[list[str | None]]:
            made = []
            for i in range(1_000):
                with pgtrack.session(f"sess_{i}"):
                    made.append(rows_async(3))
            seen: list[list[str | None]] = [[], [], []]
            for turn in seen:
                for one in made:
                    turn.append((await one.__anext__())[0])
            for one in made:
                await one.aclose()
            return seen

        assert [[f"sess_{i}" for i in range(1_000)]] * 3 == run(main)

    def test_exception(self, events: Events, run: Callable[..., Any]) -> None:
        """What it raises reaches the consumer, and is told in its session."""

        async def main() -> None:
            with pgtrack.session("sess_a"):
                made = failing_rows_async()
            with pgtrack.session("sess_b"):
                await made.__anext__()
                with pytest.raises(ZeroDivisionError):
                    await made.__anext__()
                assert "sess_b" == here()

        run(main)

        assert [("sess_a", 500)] == statuses(events)

    def test_cancellation(self, events: Events, run: Callable[..., Any]) -> None:
        """A consumer that is cancelled within a step ends it, in its session."""

        @pgtrack.track_api("/rows")
        async def endless(is_waiting: anyio.Event) -> AsyncGenerator[int, None]:
            yield 1
            is_waiting.set()
            await anyio.sleep_forever()

        async def main() -> None:
            is_waiting = anyio.Event()
            with pgtrack.session("sess_a"):
                made = endless(is_waiting)

            async def consume() -> None:
                with pgtrack.session("sess_consumer"):
                    async for _ in made:
                        pass

            with anyio.fail_after(TIMEOUT):
                async with anyio.create_task_group() as group:
                    group.start_soon(consume)
                    await is_waiting.wait()
                    group.cancel_scope.cancel()

        run(main)

        assert [("sess_a", 499)] == statuses(events)
        assert [] == events.of_type("error")

    def test_cancelled_while_suspended(
        self, events: Events, run: Callable[..., Any]
    ) -> None:
        """One whose consumer is cancelled between steps completes when it is closed."""

        async def main() -> None:
            with pgtrack.session("sess_a"):
                made = rows_async(3)

            async def consume() -> None:
                async for _ in made:
                    with anyio.CancelScope() as scope:
                        scope.cancel()
                        await anyio.sleep_forever()
                    break

            await consume()
            await made.aclose()

        run(main)

        assert [("sess_a", 200)] == statuses(events)

    def test_collected(self, events: Events) -> None:
        """One that nobody closes is, by the loop, and completes in its session."""

        async def main() -> None:
            with pgtrack.session("sess_a"):
                made = rows_async(3)
            with pgtrack.session("sess_b"):
                await made.__anext__()
                del made
                gc.collect()
                for _ in range(5):
                    await asyncio.sleep(0)
                assert "sess_b" == here()

        asyncio.run(main())

        assert [("sess_a", 200)] == statuses(events)

    def test_nothing_left_behind(self, run: Callable[..., Any]) -> None:
        """Neither in between nor afterwards is there anything in the consumer."""

        async def main() -> list[Any]:
            with pgtrack.session("sess_a"):
                made = rows_async(3)
            frames = [current_frame() async for _ in made]
            return [*frames, current_frame(), [one async for one in rows_async(1)]]

        assert [None, None, None, None, [(None, None, None)]] == run(main)


def test_every_row_is_here() -> None:
    """Hand-offs come in all the kinds that the matrix has."""
    kinds = {name.partition(",")[0] for name in HOPS}

    assert {
        "function",
        "coroutine",
        "asyncio task",
        "asyncio.gather",
        "loop.call_soon",
        "loop.call_later",
        "asyncio.to_thread",
        "loop.run_in_executor",
        "anyio task",
        "anyio thread",
        "trio task",
        "trio thread",
        "Thread",
        "ThreadPoolExecutor",
        "ProcessPool fork",
        "ProcessPool spawn",
    } == kinds
