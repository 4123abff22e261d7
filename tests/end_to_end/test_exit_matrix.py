"""
The exit matrix: each way in which a process can end, against each kind of endpoint.

A row is a program, run afresh for each column: without pgtrack, with an endpoint that
takes events, with one that hangs, with one at which nobody listens, and with one that
hangs while there is a spool, which the next process delivers.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import attrs
import pytest

import pgtrack
from harness import Server, hang, run_script, start_together

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals"),
    pytest.mark.timeout(120),
]

_EXIT_TIMEOUT = 0.5
"""Seconds in which a process delivers at its end, where nobody takes anything."""

_SLACK = 3.0
"""Seconds that such an end may take more than one at which everything is taken."""

_TIMEOUT = 50.0
"""Seconds that an end takes which waits for the hanging server."""

# What every program starts with.  `taken` is told what was emitted and taken, by one
# write that not even SIGKILL can undo.
_HEAD = """
import atexit, concurrent.futures, logging, multiprocessing, os, signal, sys, threading
import gc, json, time, weakref

url, options, folder = sys.argv[1:]
options = json.loads(options)
taken = os.open(folder + "/taken", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

def emit(name):
    if pgtrack.emit("custom", name=name):
        os.write(taken, name.encode() + b"\\n")

def ending():
    with open(folder + "/ending", "a") as file:
        file.write(f"{time.monotonic()}\\n")

def terminate(number=signal.SIGTERM):
    ending()
    os.kill(os.getpid(), number)
    time.sleep(20)

main_thread = threading.main_thread()
"""

_CONFIGURE = """
import pgtrack
if options is not None:
    import httpx  # so that no column measures how long that takes
    pgtrack.configure(project_id="p", endpoint=url, **options)
"""

_MAIN = """
if __name__ == "__main__":
    main()
    ending()
"""

# What takes the place of pgtrack to find out how a process ends without it.
_STUB = """
def configure(**options): pass
def emit(event_type, **fields): return False
def flush(timeout=5.0): return True
"""


@attrs.frozen(kw_only=True)
class Row:
    """
    A way to end.

    Attributes:
        name: What it is called.

        main: The body of the program's function `main`.

        early: What it does before it imports pgtrack.

        setup: What it, and a child that is spawned, does after configuring.

        status: Its exit status.

        events: What arrives; None if that depends on the moment.

        lost: What does not, for nothing is run at such an end; a spool keeps it.

        untold: How many are lost without a word, too, if the endpoint is down.

        ends: How many processes end one after the other.
    """

    name: str
    main: str
    early: str = ""
    setup: str = ""
    status: int = 0
    events: tuple[str, ...] | None = ("a",)
    lost: tuple[str, ...] = ()
    untold: int = 0
    ends: int = 1

    @property
    def program(self) -> str:
        """The source of the program."""
        dedent = textwrap.dedent
        body = textwrap.indent(dedent(self.main).strip(), "    ")
        parts = (_HEAD, dedent(self.early), _CONFIGURE, dedent(self.setup))
        return "\n".join((*parts, "def main():", body, _MAIN))


_IN_CHILD = """
def work(i):
    emit(f"child {i}")
"""


def _children(method: str, count: int) -> dict[str, object]:
    """Return what rows with children of `multiprocessing` have in common."""
    return {
        "setup": f"context = multiprocessing.get_context({method!r}){_IN_CHILD}",
        "events": ("a", *(f"child {i}" for i in range(count))),
        "ends": 2,
    }


ROWS = [
    # --- in order
    Row(name="end of script", main="emit('a')"),
    Row(name="sys.exit", main="emit('a'); ending(); sys.exit(3)", status=3),
    Row(name="exception", main="emit('a'); ending(); 1 / 0", status=1),
    Row(
        name="threads go on",
        main="""
        def work(i):
            main_thread.join()
            emit(f"thread {i}")
        for i in range(3):
            threading.Thread(target=work, args=(i,)).start()
        """,
        events=("thread 0", "thread 1", "thread 2"),
    ),
    Row(
        name="threads go on, the worker does, too",
        main="""
        emit("a")
        def work():
            main_thread.join()
            emit("b")
        threading.Thread(target=work).start()
        """,
        events=("a", "b"),
    ),
    Row(
        name="daemon threads go on",
        early="atexit.register(time.sleep, 0.1)",
        main="""
        has_begun = threading.Event()
        def work():
            for i in range(100_000):
                emit(f"daemon {i}")
                has_begun.set()
                time.sleep(0.0005)
        threading.Thread(target=work, daemon=True).start()
        has_begun.wait(20)
        """,
        events=None,
    ),
    Row(
        name="a thread pool goes on",
        main="""
        executor = concurrent.futures.ThreadPoolExecutor(2)
        def work(i):
            time.sleep(0.1)  # the main thread is at its end, and waits for the pool
            emit(f"task {i}")
        for i in range(4):
            future = executor.submit(work, i)
        future.add_done_callback(lambda _: emit("callback"))
        """,
        events=("task 0", "task 1", "task 2", "task 3", "callback"),
    ),
    Row(
        name="a process pool goes on",
        main="""
        emit("a")
        executor = concurrent.futures.ProcessPoolExecutor(2, context)
        for i in range(4):
            executor.submit(work, i)
        """,
        **_children("fork", 4),
    ),
    # --- late
    Row(
        name="exit handlers",
        early="atexit.register(lambda: [emit(name) for name in 'bc'])",
        main="emit('a'); atexit.register(emit, 'd')",
        events=("a", "b", "c", "d"),
    ),
    Row(
        name="nothing but late",
        early="atexit.register(emit, 'a')",
        main="pass",
        events=("a",),
    ),
    Row(
        name="a log handler that is closed",
        early="""
        class Handler(logging.Handler):
            def close(self):
                emit("closed")
                super().close()
        handler = Handler()
        """,
        main="emit('a')",
        events=("a", "closed"),
    ),
    Row(
        name="weakref.finalize",
        early="""
        class Thing: pass
        thing = Thing()
        weakref.finalize(thing, emit, "finalized")
        """,
        main="emit('a')",
        events=("a", "finalized"),
    ),
    Row(
        name="__del__",
        setup="""
        class Thing:
            def __init__(self, name):
                self.name = name
            def __del__(self):
                emit(self.name)
        thing, ring = Thing("global"), [Thing("in a ring")]
        ring.append(ring)
        """,
        main="emit('a')",
        events=("a", "global", "in a ring"),
    ),
    # --- by a signal
    Row(name="SIGTERM", main="emit('a'); terminate()", status=-15),
    Row(
        name="SIGTERM, a handler before ours",
        early="signal.signal(signal.SIGTERM, lambda *_: os._exit(7))",
        main="emit('a'); terminate()",
        status=7,
        untold=1,
    ),
    Row(
        name="SIGTERM, a handler after ours",
        main="""
        def handler(number, frame):
            emit("b")
            sys.exit(5)
        signal.signal(signal.SIGTERM, handler)
        emit("a")
        terminate()
        """,
        status=5,
        events=("a", "b"),
    ),
    Row(
        name="SIGTERM, handlers before and after ours",
        early="signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))",
        main="""
        def handler(number, frame):
            before(number, frame)
        before = signal.signal(signal.SIGTERM, handler)
        emit("a")
        terminate()
        """,
        status=6,
    ),
    Row(
        name="SIGTERM, ignored",
        early="signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        main="emit('a'); os.kill(os.getpid(), signal.SIGTERM)",
    ),
    Row(name="SIGINT", main="emit('a'); terminate(signal.SIGINT)", status=-2),
    Row(
        name="SIGHUP",
        main="emit('a'); terminate(signal.SIGHUP)",
        status=-1,
        events=(),
        lost=("a",),
    ),
    Row(
        name="SIGKILL",
        main="emit('a'); terminate(signal.SIGKILL)",
        status=-9,
        events=(),
        lost=("a",),
    ),
    # --- at once
    Row(
        name="os._exit",
        main="emit('a'); ending(); os._exit(4)",
        status=4,
        events=(),
        lost=("a",),
    ),
    Row(
        name="a crash",
        main="emit('a'); ending(); os.abort()",
        status=-6,
        events=(),
        lost=("a",),
    ),
    Row(
        name="os.exec",
        main="""
        emit("a")
        ending()
        os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(8)"])
        """,
        status=8,
        events=(),
        lost=("a",),
    ),
    # --- with children
    Row(
        name="os.fork, os._exit",
        main="""
        emit("a")
        ending()
        if not os.fork():
            emit("child")
            os._exit(0)
        assert os.wait()[1] == 0
        """,
        lost=("child",),
    ),
    Row(
        name="os.fork, sys.exit",
        main="""
        emit("a")
        ending()
        if not os.fork():
            emit("child")
            sys.exit(9)
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
        """,
        status=9,
        events=("a", "child"),
        ends=2,
    ),
    Row(
        name="Process",
        main="""
        emit("a")
        ending()
        children = [context.Process(target=work, args=(i,)) for i in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0, child.exitcode
        """,
        **_children("fork", 2),
    ),
    Row(
        name="Process, its threads go on",
        main="""
        def work():
            emit("child 0")
            def go_on():
                main_thread.join()
                emit("child 1")
                emit("child 2")
            threading.Thread(target=go_on).start()
        emit("a")
        ending()
        child = context.Process(target=work)
        child.start()
        child.join()
        assert child.exitcode == 0, child.exitcode
        """,
        **_children("fork", 3),
    ),
    Row(
        name="Process, a daemon",
        main="""
        def work():
            emit("child 0")
            ready.set()
            time.sleep(20)
        emit("a")
        ready = context.Event()
        context.Process(target=work, daemon=True).start()
        assert ready.wait(20)
        """,
        **_children("fork", 1),
    ),
    Row(
        name="Pool, terminated",
        main="""
        emit("a")
        ending()
        with context.Pool(2) as pool:
            pool.map(work, range(6), chunksize=1)
        """,
        **_children("fork", 6),
    ),
    Row(
        name="Pool, closed",
        main="""
        emit("a")
        ending()
        pool = context.Pool(2)
        pool.map(work, range(6), chunksize=1)
        pool.close()
        pool.join()
        """,
        **_children("fork", 6),
    ),
    *(
        Row(
            name=f"Process, Pool and ProcessPoolExecutor, {method}",
            main="""
            emit("a")
            ending()
            child = context.Process(target=work, args=(0,))
            child.start()
            executor = concurrent.futures.ProcessPoolExecutor(1, context)
            with executor, context.Pool(1) as pool:
                executor.submit(work, 1)
                pool.apply(work, (2,))
            child.join()
            assert child.exitcode == 0, child.exitcode
            """,
            **_children(method, 3),
        )
        for method in ("spawn", "forkserver")
    ),
]

_TOLD = re.compile(r"pgtrack dropped ([\d,]+) events that could not be sent before")


@attrs.frozen(kw_only=True)
class Outcome:
    """
    What became of a row in a column.

    Attributes:
        status: The exit status.

        output: What it printed, but for pgtrack's log.

        told: How many events the log says were dropped.

        taken: What was emitted and taken.

        arrived: What the endpoint has.

        seconds: How long its end took.
    """

    status: int
    output: str
    told: int
    taken: Counter[str]
    arrived: Counter[str]
    seconds: float


def run(
    program: Path, column: str, server: Server, options: dict[str, object] | None
) -> Outcome:
    """Run *program* with *options*, or without pgtrack, and see what becomes of it."""
    folder = program.parent / column
    folder.mkdir()
    env = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}  # of forks with threads
    if options is None:
        (folder / "pgtrack.py").write_text(_STUB)
        env["PYTHONPATH"] = str(folder)
    arguments = (server.url, json.dumps(options), str(folder))
    ended = run_script(program, *arguments, env=env, timeout=60)
    ended_at = time.monotonic()
    if options is not None and "spool_dir" in options:
        server.default = None
        deliver_next(server, str(options["spool_dir"]))
    lines = ended.stderr.splitlines(keepends=True)
    ours = [line for line in lines if line.startswith("pgtrack ")]
    told = (int(n.replace(",", "")) for n in _TOLD.findall("".join(ours)))
    return Outcome(
        status=ended.returncode,
        output=ended.stdout + "".join(line for line in lines if line not in ours),
        told=sum(told),
        taken=Counter((folder / "taken").read_text().splitlines()),
        arrived=names_in(server),
        seconds=ended_at - float((folder / "ending").read_text().split()[0]),
    )


def deliver_next(server: Server, spool_dir: str) -> None:
    """Deliver what is in a spool, as the next process does."""
    config = pgtrack.Config.isolated(
        project_id="p", endpoint=server.url, spool_dir=spool_dir, handle_sigterm=False
    )
    with pgtrack.Client(config) as client:
        client.emit("custom", name="next")
        client.close(20)


def names_in(server: Server) -> Counter[str]:
    """Return how often each event has arrived; what came again counts once."""
    names = {event["event_id"]: event["event.name"] for event in server.events}
    return Counter(names.values())


_IS_LONG = "PGTRACK_SOAK" in os.environ
"""Whether all columns are wanted, rather than those that find most."""


@pytest.fixture(name="outcomes")
def _outcomes(row: Row, tmp_path: Path) -> dict[str, Outcome]:
    """Return what becomes of a row in each column; all run side by side."""
    program = tmp_path / "program.py"
    program.write_text(row.program)
    dead = {"exit_timeout": _EXIT_TIMEOUT, "timeout": _TIMEOUT}
    columns: dict[str, dict[str, object] | None] = {
        "absent": None,
        "alive": {"exit_timeout": 20},
        "hanging": dead,
        "nobody": dead,
        "spool": {
            **dead,
            "spool_dir": str(tmp_path / "events"),
            "spool_each_event": bool(row.lost),
        },
    }

    if not _IS_LONG:  # `test_exit.py` has the like; the spool's server hangs, too
        del columns["hanging"], columns["nobody"]

    def work(i: int) -> tuple[str, Outcome]:
        column = list(columns)[i]
        with Server(is_open=column != "nobody") as server:
            if column != "alive":
                server.default = hang(threading.Event())
            return column, run(program, column, server, columns[column])

    return dict(start_together(len(columns), work, timeout=90))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_end(row, outcomes):
    """A process ends in time and as without pgtrack; its events arrive, or are told."""
    absent, alive = outcomes["absent"], outcomes["alive"]

    assert row.status == absent.status
    for outcome in outcomes.values():
        assert absent.status == outcome.status
        assert absent.output == outcome.output
        assert outcome.seconds < _TIMEOUT

    lost = Counter(row.lost)
    assert 0 == alive.told
    if row.events is None:
        assert alive.taken <= alive.arrived
    else:
        assert Counter(row.events) + lost == alive.taken
        assert Counter(row.events) == alive.arrived

    without = [outcomes[c] for c in ("hanging", "nobody") if c in outcomes]
    for outcome in (*without, outcomes["spool"]):
        took = outcome.seconds - alive.seconds
        assert took < row.ends * _EXIT_TIMEOUT + _SLACK
    for outcome in without:
        assert Counter() == outcome.arrived
        if row.events is not None:
            assert outcome.taken <= alive.taken
            told = outcome.taken.total() - lost.total() - row.untold
            assert told == outcome.told

    spool = outcomes["spool"]
    assert 0 == spool.told
    assert spool.taken + Counter(["next"]) == spool.arrived
