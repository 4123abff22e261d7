"""Threads, executors and pools with the patches in place; rows of the matrix, too."""

# ruff: noqa: D102  methods of small classes need no documentation

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import importlib.util
import inspect
import multiprocessing
import multiprocessing.pool
import operator
import pickle
import sys
import threading
import traceback
import types
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest
import trio

import pgtrack
from harness import run_script, start_together
from pgtrack import _context
from pgtrack._context import Frame, current_frame
from pgtrack.integrations import concurrent as integration
from pgtrack.integrations._http import Serving
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pgtrack.testing import Events

TIMEOUT = 20

PATCHED = [(owner, name) for owner, name, _ in integration._PLACES]
ORIGINALS = {(owner, name): vars(owner)[name] for owner, name in PATCHED}


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    integration.install()
    yield
    integration.uninstall()
    assert {key: vars(key[0])[key[1]] for key in PATCHED} == ORIGINALS


@pytest.fixture(name="pool")
def _pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


def here() -> str | None:
    """
    Return the present session.
    """
    return pgtrack.current().session_id


def is_outside() -> bool:
    """
    Return whether there is no frame at all.
    """
    return current_frame() is None


def run_thread(thread: threading.Thread) -> None:
    """
    Start a thread, and wait for its end.
    """
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def frames_of(session_id: str) -> list[Frame]:
    """
    Return the frames of a session that are alive, without collecting cycles.
    """
    found = (thing for thing in gc.get_objects() if type(thing) is Frame)
    return [frame for frame in found if frame.session_id == session_id]


class Seen:
    """
    Keeps the session in which it was called.
    """

    session_id: str | None = "never called"

    def __call__(self, *_: Any) -> None:
        self.session_id = here()


class TestThreadPool:
    """
    `ThreadPoolExecutor`, and what submits to it.
    """

    def test_keeps_the_correlation(self, pool: ThreadPoolExecutor) -> None:
        """A task has session, request, user, journey and metadata of its submitter."""
        session = pgtrack.session("sess_a", user_id="u", metadata={"k": 1})
        with session, pgtrack.journey("checkout"):
            expected = pgtrack.current()
            seen = pool.submit(pgtrack.current).result(TIMEOUT)

        assert expected == seen
        assert ("sess_a", "u", "checkout") == (
            seen.session_id,
            seen.user_id,
            seen.journey_id,
        )

    def test_shares_the_user(self, pool: ThreadPoolExecutor) -> None:
        """A user that a task names is the submitter's from then on."""
        with pgtrack.session("sess_a"):
            pool.submit(pgtrack.identify, "u_late").result(TIMEOUT)
            user_id = pgtrack.current().user_id

        assert "u_late" == user_id

    def test_map(self, pool: ThreadPoolExecutor) -> None:
        """Each call of `map` has the correlation of whoever called `map`."""
        with pgtrack.session("sess_a"):
            seen = pool.map(lambda _: here(), range(5), timeout=TIMEOUT)

        assert ["sess_a"] * 5 == list(seen)

    def test_none_where_submitted_outside(self) -> None:
        """A task from outside of any session has none, whatever its thread has left."""

        def leave_behind() -> None:
            pgtrack.session("sess_left").__enter__()

        with ThreadPoolExecutor(1, initializer=leave_behind) as pool:
            assert pool.submit(here).result(TIMEOUT) is None
            with pgtrack.session("sess_a"):
                assert "sess_a" == pool.submit(here).result(TIMEOUT)
            integration.uninstall()
            assert "sess_left" == pool.submit(here).result(TIMEOUT)

    def test_threads_of_the_pool_are_nobodys(self) -> None:
        """A thread that a task made necessary has no session of that task."""
        with ThreadPoolExecutor(1) as pool:
            with pgtrack.session("sess_a"):
                pool.submit(here).result(TIMEOUT)
            integration.uninstall()

            assert pool.submit(current_frame).result(TIMEOUT) is None

    def test_two_at_once_never_mix(self, pool: ThreadPoolExecutor) -> None:
        """Tasks that are in the middle of their work at once each have their own."""
        barrier = threading.Barrier(8)

        def work() -> tuple[str | None, str | None, str | None]:
            barrier.wait(TIMEOUT)
            pgtrack.identify(f"u_{here()}")
            before = here()
            barrier.wait(TIMEOUT)
            return before, here(), pgtrack.current().user_id

        futures = []
        for i in range(800):
            with pgtrack.session(f"sess_{i}"):
                futures.append(pool.submit(work))

        assert [(f"sess_{i}", f"sess_{i}", f"u_sess_{i}") for i in range(800)] == [
            future.result(TIMEOUT) for future in futures
        ]

    def test_many_submitters(self, pool: ThreadPoolExecutor, events: Events) -> None:
        """Of thousands of tasks that several threads submit none is mixed up."""

        def submit(i: int) -> None:
            for j in range(500):
                with pgtrack.session(f"sess_{i}.{j}"):
                    name = f"sess_{i}.{j}"
                    future = pool.submit(pgtrack.emit, "custom", name=name)
            future.result(TIMEOUT)

        start_together(6, submit)
        pool.shutdown()

        assert 3_000 == len(events)
        assert [] == [e for e in events if e.name != e.session_id]

    def test_exception(self, pool: ThreadPoolExecutor, events: Events) -> None:
        """An exception comes out as it was raised, and is told in its session."""
        error = ValueError("no")

        @pgtrack.track_api
        def fail() -> None:
            raise error

        with pgtrack.session("sess_a"):
            future = pool.submit(fail)

        assert error is future.exception(TIMEOUT)
        assert "fail" in [f.name for f in traceback.extract_tb(error.__traceback__)]
        assert [("error", "sess_a"), ("api.response", "sess_a")] == [
            (event.type, event.session_id) for event in events
        ]
        assert pool.submit(here).result(TIMEOUT) is None

    def test_cancellation(self) -> None:
        """A future that is cancelled before it runs never does, and leaves nothing."""
        go, seen = threading.Event(), Seen()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(go.wait, TIMEOUT)
            with pgtrack.session("sess_a"):
                future = pool.submit(seen)
            is_cancelled = future.cancel()
            go.set()
            assert first.result(TIMEOUT)
            after = pool.submit(here).result(TIMEOUT)

        assert (True, "never called", None) == (is_cancelled, seen.session_id, after)
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(TIMEOUT)

    @pytest.mark.parametrize("fails", [False, True])
    def test_nothing_is_kept(self, fails: bool) -> None:
        """Neither a result nor an exception that is kept keeps the frame alive."""
        gc.collect()
        with ThreadPoolExecutor(1) as pool:
            with pgtrack.session("sess_kept"):
                future = pool.submit(operator.truediv, 1, 0 if fails else 1)
            concurrent.futures.wait([future], TIMEOUT)
            pool.submit(here).result(TIMEOUT)

            assert fails is (future.exception() is not None)
            assert [] == frames_of("sess_kept")

    def test_arguments_are_not_kept(self, pool: ThreadPoolExecutor) -> None:
        """An exception that is kept keeps no argument alive, as without the patches."""
        argument = Seen()
        reference = weakref.ref(argument)
        future = pool.submit(operator.truediv, argument, 0)
        error = future.exception(TIMEOUT)
        pool.submit(here).result(TIMEOUT)
        del argument

        assert isinstance(error, TypeError)
        assert reference() is None

    def test_arguments(self, pool: ThreadPoolExecutor) -> None:
        """Arguments arrive, whatever their names."""
        names = ["fn", "self", "function", "args", "frame", "executor", "wrapped"]
        given = dict.fromkeys(names, 1)

        assert given == pool.submit(dict, **given).result(TIMEOUT)
        assert [1] == pool.submit(list, (1,)).result(TIMEOUT)

    def test_wrong_calls(self, pool: ThreadPoolExecutor) -> None:
        """What raises without us raises the same with us."""
        submit: Any = pool.submit
        with pytest.raises(TypeError, match=r"missing 1 required positional.*'fn'"):
            submit()
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            submit(None).result(TIMEOUT)
        pool.shutdown()
        with pgtrack.session("sess_a"):
            with pytest.raises(RuntimeError, match="after shutdown"):
                pool.submit(here)

            assert "sess_a" == here()

    def test_run_in_executor(self) -> None:
        """`loop.run_in_executor` takes the session of the task that calls it."""

        async def main() -> list[str | None]:
            loop = asyncio.get_running_loop()

            async def request(i: int) -> str | None:
                with pgtrack.session(f"sess_{i}"):
                    return await loop.run_in_executor(None, here)

            found = await asyncio.gather(*map(request, range(100)))
            return [*found, await loop.run_in_executor(None, here)]

        assert [*(f"sess_{i}" for i in range(100)), None] == asyncio.run(main())

    def test_to_thread(self) -> None:
        """`asyncio.to_thread` goes on to hand over the whole context."""
        mark = contextvars.ContextVar("mark", default="unset")

        async def main() -> tuple[str | None, str]:
            mark.set("set")
            with pgtrack.session("sess_a"):
                return await asyncio.to_thread(lambda: (here(), mark.get()))

        assert ("sess_a", "set") == asyncio.run(main())

    def test_context_of_the_thread_stays(self) -> None:
        """Other context variables of the pool's thread are left to it."""
        mark = contextvars.ContextVar("mark", default="unset")
        pool = ThreadPoolExecutor(1, initializer=mark.set, initargs=("set",))
        with pool, pgtrack.session("sess_a"):
            seen = pool.submit(mark.get).result(TIMEOUT)

        assert "set" == seen

    def test_subclass(self) -> None:
        """A subclass may change what is submitted; it sees the function as given."""
        given = []

        class Pool(ThreadPoolExecutor):
            def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
                given.append(fn)
                return super().submit(fn, *args, **kwargs)

        with Pool(1) as pool, pgtrack.session("sess_a"):
            assert "sess_a" == pool.submit(here).result(TIMEOUT)
        assert [here] == given

    def test_interpreters(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What goes to another interpreter is left as it is, to be pickled."""

        class InterpreterPoolExecutor(ThreadPoolExecutor):
            pass

        fake: Any = types.ModuleType("concurrent.futures.interpreter")
        fake.InterpreterPoolExecutor = InterpreterPoolExecutor
        monkeypatch.setitem(sys.modules, fake.__name__, fake)

        with InterpreterPoolExecutor(1) as pool, pgtrack.session("sess_a"):
            assert pool.submit(here).result(TIMEOUT) is None
            assert "sess_a" == here()


class Inheriting(threading.Thread):
    """
    Calls `run` in a copy of the context, as threads of Python 3.14 can.
    """

    _context: contextvars.Context | None = None
    seen: str | None = "never called"

    def _bootstrap(self) -> None:
        self._context = contextvars.copy_context()
        self._context.run(_context.switch, Frame(None, session_id="sess_inherited"))
        super()._bootstrap()  # type: ignore[misc]

    def run(self) -> None:
        assert self._context is not None
        self._context.run(self.work)

    def work(self) -> None:
        self.seen = here()


class TestThread:
    """
    `threading.Thread`.
    """

    def test_target(self) -> None:
        """A thread has session, user and journey of whoever started it."""
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(pgtrack.current()))
        with pgtrack.session("sess_a", user_id="u"), pgtrack.journey("checkout"):
            expected = pgtrack.current()
            run_thread(thread)

        assert [expected] == seen

    def test_shares_the_user(self) -> None:
        """A user that a thread names is the request's from then on."""
        with pgtrack.session("sess_a"):
            run_thread(threading.Thread(target=pgtrack.identify, args=("u_late",)))

            assert "u_late" == pgtrack.current().user_id

    def test_subclass(self) -> None:
        """So has a thread whose class has its own `run`, and does not call the base."""

        class Worker(threading.Thread):
            seen: str | None = None

            def run(self) -> None:
                self.seen = here()

        thread = Worker()
        with pgtrack.session("sess_a"):
            run_thread(thread)

        assert "sess_a" == thread.seen
        assert "run" not in vars(thread)

    def test_timer(self) -> None:
        """A timer runs under the correlation in which it was started."""
        seen = Seen()
        with pgtrack.session("sess_a"):
            run_thread(threading.Timer(0, seen))

        assert "sess_a" == seen.session_id

    def test_cancelled_timer(self) -> None:
        """A timer that is cancelled never runs, and leaves nothing behind."""
        gc.collect()
        seen = Seen()
        timer = threading.Timer(600, seen)
        with pgtrack.session("sess_cancelled"):
            timer.start()
        timer.cancel()
        timer.join(TIMEOUT)

        assert "never called" == seen.session_id
        assert [] == frames_of("sess_cancelled")

    def test_nobodys_thread(self) -> None:
        """A thread that was started outside of any session has none."""
        seen = Seen()

        run_thread(threading.Thread(target=seen))

        assert seen.session_id is None

    def test_two_at_once_never_mix(self) -> None:
        """Threads that are under way at once each have their own session."""
        barrier, seen = threading.Barrier(50), {}

        def work(i: int) -> None:
            barrier.wait(TIMEOUT)
            seen[i] = here()
            barrier.wait(TIMEOUT)
            assert seen[i] == here()

        def start(i: int) -> None:
            for j in range(i, 50, 5):
                with pgtrack.session(f"sess_{j}"):
                    thread = threading.Thread(target=work, args=(j,))
                    thread.start()
                    threads.append(thread)

        for _ in range(10):
            threads: list[threading.Thread] = []
            start_together(5, start)
            for thread in threads:
                thread.join(TIMEOUT)

        assert {i: f"sess_{i}" for i in range(50)} == seen

    def test_exception(self, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
        """What kills a thread reaches the hook as before, in the thread's session."""
        names: list[str] = []

        def hook(args: Any) -> None:
            tb = traceback.extract_tb(args.exc_traceback)
            names.extend(frame.name for frame in tb)
            pgtrack.track_error(args.exc_value)

        def fail() -> None:
            raise ValueError("no")

        monkeypatch.setattr(threading, "excepthook", hook)
        with pgtrack.session("sess_a"):
            run_thread(threading.Thread(target=fail))

        assert ["_bootstrap_inner", "run", "fail"] == names
        assert [("ValueError", "sess_a")] == [
            (event.error_type, event.session_id) for event in events
        ]

    def test_nothing_is_kept(self) -> None:
        """A thread that has ended keeps no frame, nor does it need a collection."""
        gc.collect()
        with pgtrack.session("sess_kept"):
            thread = threading.Thread(target=here)
            run_thread(thread)

        assert [] == frames_of("sess_kept")
        assert {} == integration._starting

    def test_wrong_calls(self) -> None:
        """What raises without us raises the same with us, and leaves nothing."""

        class Hasty(threading.Thread):
            def __init__(self) -> None:
                pass

        thread = threading.Thread(target=here)
        run_thread(thread)
        with pytest.raises(RuntimeError, match="only be started once"):
            thread.start()
        with pytest.raises(RuntimeError, match="not called"):
            Hasty().start()

        assert {} == integration._starting

    def test_own_threads(self) -> None:
        """Threads of pgtrack's are nobody's."""
        seen = Seen()
        with pgtrack.session("sess_a"):
            run_thread(threading.Thread(target=seen, name="pgtrack-x"))

        assert seen.session_id is None

    def test_own_worker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The thread that delivers has no frame of the request that needed it."""
        with pgtrack.session("sess_a"):
            pgtrack.configure(project_id="p", endpoint="console:")
            pgtrack.emit("custom")
            worker = [t for t in threading.enumerate() if t.name == "pgtrack"]
            assert {} == integration._starting
            pgtrack.shutdown()

        assert 1 == len(worker)

    @pytest.mark.parametrize("session_id", ["sess_a", None])
    def test_thread_with_a_context(self, session_id: str | None) -> None:
        """Where threads run in a context (3.14), that has the starter's correlation."""
        thread = Inheriting()
        frame = session_id and Frame(None, session_id=session_id)
        _context.switch(frame or None)

        run_thread(thread)

        assert session_id == thread.seen
        assert thread._context is not None
        assert thread._context.run(current_frame) is None

    def test_given_context(self) -> None:
        """A context that a thread was given (3.14) is left as it is."""
        thread = Inheriting()
        thread._context = contextvars.Context()
        with pgtrack.session("sess_a"):
            run_thread(thread)

        assert "sess_inherited" == thread.seen

    @pytest.mark.parametrize("has_context", [False, True])
    def test_begin_and_end(self, has_context: bool) -> None:
        """What a thread begins under ends with it, however it ends."""
        # By hand, for tracers of coverage do not see a thread before it has begun.
        context = contextvars.Context()
        thread = types.SimpleNamespace(_context=context if has_context else None)
        seen = []

        def work() -> None:
            seen.append((here(), context.run(here)))
            raise KeyError

        with pgtrack.session("sess_a"):
            frame = current_frame()
        integration._starting[id(thread)] = frame
        with pytest.raises(KeyError):
            integration._run_thread(work, thread, (), {})

        assert [("sess_a", "sess_a" if has_context else None)] == seen
        assert (None, None) == (here(), context.run(here))

    def test_thread_that_is_not_ours(self) -> None:
        """A thread that was started before `install` is left as it is."""
        with pgtrack.session("sess_a"):
            seen = integration._run_thread(here, object(), (), {})

            assert ("sess_a", "sess_a") == (seen, here())

    @pytest.mark.parametrize("library", ["anyio", "trio"])
    def test_workers_of_other_libraries(self, library: str) -> None:
        """The worker threads of anyio and trio, which live on, keep no request."""
        gc.collect()

        async def with_anyio() -> str | None:
            with pgtrack.session("sess_worker"):
                return await anyio.to_thread.run_sync(here)

        async def with_trio() -> str | None:
            with pgtrack.session("sess_worker"):
                return await trio.to_thread.run_sync(here)

        async def main() -> tuple[str | None, list[Frame]]:
            seen = await (with_anyio if library == "anyio" else with_trio)()
            gc.collect()
            return seen, frames_of("sess_worker")

        run: Any = trio.run if library == "trio" else anyio.run

        assert ("sess_worker", []) == run(main)


METHODS = ["fork", "spawn"]

carried = functools.partial(pgtrack.propagation_headers, True)
"""Returns what is known of session, request, user and journey; any child has it."""


@pytest.fixture(name="processes", params=METHODS, scope="module")
def _processes(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    integration.install()
    # Begun in a session, of which the children must know nothing.
    with ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context(request.param)
    ) as pool:
        with pgtrack.session("sess_first"):
            pool.submit(pgtrack.current).result(TIMEOUT)
        yield pool


class TestProcessPool:
    """
    `ProcessPoolExecutor`, by fork and by spawn.
    """

    def test_keeps_the_correlation(self, processes: ProcessPoolExecutor) -> None:
        """A task has session, request, user and journey; also when `map` is used."""
        serving = Serving()
        headers = {"X-Session-ID": "sess_a", "X-Request-ID": "req_1"}
        served = serving.begin(headers, "GET", "/")
        assert served is not None
        pgtrack.identify("u_1")
        with pgtrack.journey("checkout/ä"):
            seen = processes.submit(pgtrack.current).result(TIMEOUT)
            mapped = list(
                processes.map(pgtrack.propagation_headers, [True] * 4, chunksize=2)
            )
        served.leave()

        assert ("sess_a", "req_1", "u_1", "checkout/ä") == (
            seen.session_id,
            seen.request_id,
            seen.user_id,
            seen.journey_id,
        )
        assert [
            {**headers, "X-User-ID": "u_1", "X-Journey-ID": "checkout%2F%C3%A4"}
        ] == [dict(t) for t in {tuple(one.items()) for one in mapped}]

    def test_none_where_submitted_outside(self, processes: ProcessPoolExecutor) -> None:
        """A task from outside has no session, though one was on when the pool began."""
        seen = [processes.submit(carried).result(TIMEOUT) for _ in range(10)]

        assert [{}] * 10 == seen

    def test_journey_without_session(self, processes: ProcessPoolExecutor) -> None:
        """A journey outside of any session arrives as such: no session is invented."""
        with pgtrack.journey("import"):
            seen = processes.submit(carried).result(TIMEOUT)

        assert {"X-Journey-ID": "import"} == seen

    def test_two_at_once_never_mix(self, processes: ProcessPoolExecutor) -> None:
        """Of a thousand tasks that several threads submit none is mixed up."""

        def submit(i: int) -> list[tuple[str, Any]]:
            futures = []
            for j in range(250):
                with pgtrack.session(f"sess_{i}.{j}"):
                    futures.append((f"sess_{i}.{j}", processes.submit(carried)))
            return [(name, future.result(TIMEOUT)) for name, future in futures]

        seen = [pair for pairs in start_together(4, submit) for pair in pairs]

        assert 1_000 == len(seen)
        assert [] == [
            (name, got) for name, got in seen if got != {"X-Session-ID": name}
        ]

    def test_exception(self, processes: ProcessPoolExecutor) -> None:
        """An exception comes back as before; the next task has nothing of it."""
        with pgtrack.session("sess_a"):
            future = processes.submit(operator.truediv, 1, 0)
        error = future.exception(TIMEOUT)

        assert isinstance(error, ZeroDivisionError)
        assert "division by zero" == str(error)
        assert {} == processes.submit(carried).result(TIMEOUT)

    def test_unpicklable(self) -> None:
        """What cannot be pickled fails by the same error as without the patches."""

        def attempt() -> tuple[type, str]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                error = pool.submit(function).exception(TIMEOUT)
            return type(error), str(error)

        function = lambda: None  # noqa: E731  a function without a name
        with_patches = attempt()
        integration.uninstall()

        assert attempt() == with_patches

    def test_cancellation(self, processes: ProcessPoolExecutor) -> None:
        """Futures that are cancelled never run; those that follow are not disturbed."""
        with pgtrack.session("sess_a"):
            futures = [processes.submit(pgtrack.current) for _ in range(200)]
        cancelled = [future for future in reversed(futures) if future.cancel()]

        assert cancelled
        assert all(future.cancelled() for future in cancelled)
        assert {} == processes.submit(carried).result(TIMEOUT)

    def test_nothing_is_kept(self, processes: ProcessPoolExecutor) -> None:
        """A result that is kept keeps no frame alive in the parent."""
        gc.collect()
        with pgtrack.session("sess_kept"):
            future = processes.submit(carried)
        assert {"X-Session-ID": "sess_kept"} == future.result(TIMEOUT)
        # When the next has come back, the first is off the pool's lists.
        processes.submit(carried).result(TIMEOUT)

        assert [] == frames_of("sess_kept")

    def test_pickle_of_a_task(self) -> None:
        """What travels is the function by name and the headers, nothing else."""
        with pgtrack.session("sess_a", user_id="u", metadata={"secret": "hidden"}):
            task = integration._Task(operator.add, current_frame())
        text = pickle.dumps(task)

        assert b"hidden" not in text
        assert 3 == pickle.loads(text)(1, 2)

    def test_pickle_of_nobodys_task(self) -> None:
        """What was submitted outside of everything runs outside of everything."""
        text = pickle.dumps(integration._Task(is_outside, None))
        with pgtrack.session("sess_left"):
            assert pickle.loads(text)()

    def test_identify_in_a_child(self, processes: ProcessPoolExecutor) -> None:
        """A user that a task names is known in that task alone."""
        with pgtrack.session("sess_a"):
            processes.submit(pgtrack.identify, "u_child").result(TIMEOUT)
            seen = [processes.submit(carried).result(TIMEOUT) for _ in range(4)]

        assert [{"X-Session-ID": "sess_a"}] * 4 == seen


class TestProcess:
    """
    `multiprocessing.Process`.
    """

    def test_every_start_method(self, tmp_path: Path) -> None:
        """Targets and subclasses, however started, have session, user and journey."""
        script = tmp_path / "main.py"
        script.write_text(CHILDREN, "utf-8")

        done = run_script(script, timeout=2 * TIMEOUT)

        assert (0, "") == (done.returncode, done.stderr)
        assert sorted(
            f"{kind} {what} sess_{kind}_{what} u_1 checkout"
            for kind in ("fork", "forkserver", "spawn")
            for what in ("task", "target", "subclass")
        ) == sorted(done.stdout.splitlines())

    def test_nobodys_process(self) -> None:
        """A process that is started outside of any session is left as it is."""
        seen = []

        class Process(multiprocessing.get_context("fork").Process):  # type: ignore[misc,name-defined]
            def _Popen(self, process: Any) -> Any:  # noqa: N802  a name of the library's
                seen.append(vars(process).get("run"))
                return super()._Popen(process)

        process = Process(target=here)
        process.start()
        process.join(TIMEOUT)

        assert ([None], 0) == (seen, process.exitcode)

    def test_own_run(self) -> None:
        """A process that was given a `run` of its own goes on to run that."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process()
        process.run = lambda: sender.send(here())
        with pgtrack.session("sess_a"):
            process.start()
        process.join(TIMEOUT)

        assert receiver.poll(TIMEOUT)
        assert "sess_a" == receiver.recv()
        assert "run" in vars(process)

    def test_failing_start(self) -> None:
        """A process that cannot be started has nothing of ours left."""
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=lambda: None)
        with (
            pgtrack.session("sess_a"),
            pytest.raises((AttributeError, pickle.PickleError)),
        ):
            process.start()

        assert "run" not in vars(process)

    def test_exception(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A target that raises ends its process as before, with the same lines."""
        context = multiprocessing.get_context("fork")
        with pgtrack.session("sess_a"):
            process = context.Process(target=operator.truediv, args=(1, 0))
            process.start()
        process.join(TIMEOUT)

        assert 1 == process.exitcode
        assert "ZeroDivisionError: division by zero" in capfd.readouterr().err

    def test_request_of_the_parent(self) -> None:
        """What a child tracks while a request is served is an event of the child's."""
        receiver, sender = multiprocessing.Pipe(duplex=False)

        def child(events: Events) -> None:
            pgtrack.track_api("/in/child")(here)()
            sender.send([(event.api_path, event.session_id) for event in events])

        with capture() as events:
            served = Serving().begin({"X-Session-ID": "sess_a"}, "GET", "/")
            assert served is not None
            context = multiprocessing.get_context("fork")
            process = context.Process(target=child, args=(events,))
            process.start()
            process.join(TIMEOUT)
            served.answer_with(200)
            served.complete()
            served.leave()

        assert receiver.poll(TIMEOUT)
        assert [("/in/child", "sess_a")] == receiver.recv()
        assert ["/"] == [event.api_path for event in events]


CHILDREN = """
import contextlib
import multiprocessing.context as m
import os
from concurrent.futures import ProcessPoolExecutor

import pgtrack
from pgtrack.integrations import concurrent


def tell(kind, what):
    now = pgtrack.current()
    line = f"{kind} {what} {now.session_id} {now.user_id} {now.journey_id}\\n"
    os.write(1, line.encode())


class Fork(m.ForkProcess):
    def run(self):
        tell("fork", "subclass")


class Spawn(m.SpawnProcess):
    def run(self):
        tell("spawn", "subclass")


class ForkServer(m.ForkServerProcess):
    def run(self):
        tell("forkserver", "subclass")


@contextlib.contextmanager
def working(kind, what):
    with pgtrack.session(f"sess_{kind}_{what}", user_id="u_1"):
        with pgtrack.journey("checkout"):
            yield


def finish(process):
    process.start()
    assert "run" not in vars(process)
    process.join(20)
    assert process.exitcode == 0


def main():
    concurrent.install()
    for worker in (Fork, Spawn, ForkServer):
        kind = worker._start_method
        context = m.DefaultContext.get_context(m._default_context, kind)
        with ProcessPoolExecutor(1, context) as pool, working(kind, "task"):
            pool.submit(tell, kind, "task").result(20)
        with working(kind, "target"):
            finish(context.Process(target=tell, args=(kind, "target")))
        with working(kind, "subclass"):
            finish(worker())


if __name__ == "__main__":
    main()
"""


def call(*_: Any) -> str | None:
    """
    Return the present session, whatever is given.
    """
    return here()


USES: dict[str, Callable[[Any], Any]] = {
    "apply": lambda pool: [pool.apply(call)],
    "apply_async": lambda pool: [pool.apply_async(call).get(TIMEOUT)],
    "apply_async by name": lambda pool: [pool.apply_async(func=call).get(TIMEOUT)],
    "map": lambda pool: pool.map(call, range(3)),
    "map_async": lambda pool: pool.map_async(call, range(3)).get(TIMEOUT),
    "starmap": lambda pool: pool.starmap(call, [(1, 2)] * 3),
    "starmap_async": lambda pool: pool.starmap_async(call, [(1, 2)]).get(TIMEOUT),
    "imap": lambda pool: [*pool.imap(call, range(3))],
    "imap chunks": lambda pool: [*pool.imap(call, range(5), chunksize=2)],
    "imap_unordered": lambda pool: [*pool.imap_unordered(call, range(3))],
}


@pytest.fixture(name="both", params=["processes", "threads"], scope="module")
def _both(request: pytest.FixtureRequest) -> Iterator[Any]:
    integration.install()
    make: Any = multiprocessing.get_context("fork").Pool
    if request.param == "threads":
        make = multiprocessing.pool.ThreadPool
    with pgtrack.session("sess_first"):
        pool = make(2)
    yield pool
    pool.close()
    pool.join()


class TestPool:
    """
    `multiprocessing.Pool` and its `ThreadPool`.
    """

    @pytest.mark.parametrize("use", USES)
    def test_keeps_the_session(self, both: Any, use: str) -> None:
        """Each way to call has the session of the caller, none where there is none."""
        with pgtrack.session("sess_a"):
            inside = USES[use](both)
        outside = USES[use](both)

        assert ({"sess_a"}, {None}) == (set(inside), set(outside))

    def test_user_and_journey(self, both: Any) -> None:
        """User and journey come along."""
        with pgtrack.session("sess_a", user_id="u_1"), pgtrack.journey("checkout"):
            seen = both.apply(carried)

        assert {
            "X-Session-ID": "sess_a",
            "X-User-ID": "u_1",
            "X-Journey-ID": "checkout",
        } == seen

    def test_two_at_once_never_mix(self, both: Any) -> None:
        """Of thousands of calls that several threads make none is mixed up."""

        def submit(i: int) -> list[tuple[str, Any]]:
            results = []
            for j in range(500):
                with pgtrack.session(f"sess_{i}.{j}"):
                    results.append((f"sess_{i}.{j}", both.apply_async(call)))
            return [(name, result.get(TIMEOUT)) for name, result in results]

        seen = [pair for pairs in start_together(4, submit) for pair in pairs]

        assert 2_000 == len(seen)
        assert [] == [pair for pair in seen if pair[0] != pair[1]]

    def test_exception(self, both: Any) -> None:
        """An exception comes back as before; the next call has nothing of it."""
        with pgtrack.session("sess_a"), pytest.raises(ZeroDivisionError):
            both.apply(operator.truediv, (1, 0))

        assert both.apply(call) is None

    def test_wrong_calls(self, both: Any) -> None:
        """What raises without us raises the same with us."""
        with pytest.raises(TypeError, match=r"missing 1 required positional.*'func'"):
            both.apply_async()

    def test_threads_of_the_pool_are_nobodys(self) -> None:
        """What the pool itself runs is in nobody's session."""
        seen = Seen()
        with pgtrack.session("sess_a"):
            with multiprocessing.pool.ThreadPool(1, initializer=seen) as pool:
                pool.apply(here)
            pool.join()

        assert seen.session_id is None

    def test_terminated(self) -> None:
        """A pool that is terminated leaves nobody waiting, and nothing behind."""
        gc.collect()
        with pgtrack.session("sess_kept"):
            with multiprocessing.pool.ThreadPool(1) as pool:
                pool.apply(here)
            pool.join()

        assert [] == frames_of("sess_kept")


GEVENT = """
from gevent import monkey
monkey.patch_all()

import threading
from concurrent.futures import ThreadPoolExecutor

import pgtrack
from pgtrack.integrations.concurrent import install, uninstall

def look():
    seen = []
    with ThreadPoolExecutor(2) as pool:
        with pgtrack.session("sess_a"):
            thread = threading.Thread(target=lambda: seen.append(here()))
            thread.start()
            future = pool.submit(here)
        thread.join(20)
        print(*seen, future.result(20), pool.submit(here).result(20), here())

def here():
    return pgtrack.current().session_id

install()
look()
uninstall()
look()
"""


class TestGevent:
    """
    Threads that are greenlets.
    """

    def test_patched_threads(self) -> None:
        """Where gevent has patched the standard library, all is the same."""
        if not importlib.util.find_spec("gevent"):  # it changes what imports it
            pytest.skip("gevent is not installed")

        done = run_script(GEVENT, timeout=TIMEOUT)

        assert (0, "") == (done.returncode, done.stderr)
        assert "sess_a sess_a None None\nNone None None None\n" == done.stdout


class TestInstall:
    """
    Installing and uninstalling.
    """

    def test_twice(self, pool: ThreadPoolExecutor) -> None:
        """Installed twice it is installed once, and uninstalled by one call."""
        before = {key: vars(key[0])[key[1]] for key in PATCHED}

        integration.install()

        assert before == {key: vars(key[0])[key[1]] for key in PATCHED}
        integration.uninstall()
        integration.uninstall()
        assert all(vars(o)[name] is ORIGINALS[o, name] for o, name in PATCHED)
        with pgtrack.session("sess_a"):
            assert pool.submit(here).result(TIMEOUT) is None

    def test_looks_the_same(self) -> None:
        """What is patched has name, signature and text of what it was."""
        for (owner, name), original in ORIGINALS.items():
            patched = getattr(owner, name)

            assert inspect.signature(original) == inspect.signature(patched)
            assert original.__doc__ == patched.__doc__
            assert original.__qualname__ == patched.__qualname__
            assert inspect.isfunction(patched)

    def test_patched_on_top(
        self, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where another patch is above ours, it stays; ours does nothing till again."""
        original = ORIGINALS[ThreadPoolExecutor, "submit"]
        ours = vars(ThreadPoolExecutor)["submit"]
        calls = []

        @functools.wraps(ours)
        def submit(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return ours.__get__(self)(*args, **kwargs)

        def look() -> str | None:
            with pgtrack.session("sess_a"):
                return pool.submit(here).result(TIMEOUT)

        seen = []
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
        for change in (integration.uninstall, integration.install):
            change()
            seen.append(look())
        integration.uninstall()
        assert vars(ThreadPoolExecutor)["submit"] is submit
        seen.append(look())
        monkeypatch.setattr(ThreadPoolExecutor, "submit", original)

        assert [None, "sess_a", None] == seen
        assert 3 == len(calls)

    def test_every_patch_rests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Patches that had to stay, since others are above them, do nothing."""
        for patch in integration._patches._on:
            monkeypatch.setattr(patch._patched, "_self_is_on", False)
        seen = Seen()
        with pgtrack.session("sess_a"):
            run_thread(threading.Thread(target=seen))
            with multiprocessing.pool.ThreadPool(1) as pool:
                assert pool.apply(here) is None
                assert pool.apply_async(func=here).get(TIMEOUT) is None
            pool.join()
            process = multiprocessing.get_context("fork").Process(target=here)
            process.start()
            process.join(TIMEOUT)

        assert (None, 0) == (seen.session_id, process.exitcode)

    def test_disabled(
        self, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Switched off, the correlation is carried on, without events or a thread."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")
        with pgtrack.session("sess_a"):
            seen = pool.submit(here).result(TIMEOUT)

        assert "sess_a" == seen
        assert 0 == pgtrack.stats().emitted
        assert [] == [t for t in threading.enumerate() if t.name == "pgtrack"]
