"""
Emit events in a process that the world is unkind to, and tell how that went.

    python program.py PLAN
    python program.py --serve SOCKET    the same for each who sends a plan; see `serve`

The plan is a JSON object; what may be in it, and its defaults, says `PLAN`. Each
process leaves two files in the plan's folder: `<name>.marks`, a byte for each call of
emit, which outlives a SIGKILL, and, if it comes to an orderly end, `<name>.report`.

Events are recognised by their names, `<process>-<number>`, and what is in them follows
from that: `rows.py` knows it, too.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import gc
import io
import json
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any

PLAN: dict[str, Any] = {
    "folder": ".",
    "name": "a",
    "options": {},  # of `configure`
    "count": 200,
    "threads": 1,
    "rate": None,  # events a second, of all threads; None: as fast as it goes
    "emits": "events",  # a function below
    "before": [],  # functions below, called before pgtrack is imported, ...
    "then": [],  # ... and when it is configured
    "awaits_failure": False,  # when all are emitted
    "does_wait": False,  # for a line on standard input, after that
    "at_last": [],  # functions below, called after that
    "flush": None,  # for how long, after that
    "ending": "fall",  # a function below
}

NOT_CALLED, CALLED, TAKEN, REFUSED, RAISED = range(5)


class Part:
    """What one process does: its marks, its waits, its report."""

    def __init__(self, plan: dict[str, Any], name: str, count: int) -> None:
        self.folder = Path(plan["folder"])
        self.name = name
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.own_seconds: list[float] = []
        self.lines: list[str] = []
        self.notes: dict[str, Any] = {}
        self.ending_at: float | None = None
        descriptor = os.open(
            self.folder / f"{name}.marks", os.O_RDWR | os.O_CREAT, 0o600
        )
        os.ftruncate(descriptor, max(count, 1))
        self.marks = mmap.mmap(descriptor, max(count, 1))
        os.close(descriptor)

    def emit(self, number: int, verb: Any = None, **changes: Any) -> None:
        """Emit the event of a number, and keep what became of the call."""
        fields: dict[str, Any] = {
            "name": f"{self.name}-{number}",
            "metadata": {
                "number": number,
                "text": f"canary-text-{number}",
                "password": "canary-password",
            },
            **changes,
        }
        if number % 2:
            fields["event_id"] = f"evt-{self.name}-{number}"
        verb = verb or pgtrack.emit
        self.marks[number] = CALLED
        mark = RAISED
        paused = pauses.seconds
        start, cpu_start = time.perf_counter(), time.thread_time()
        try:
            mark = TAKEN if verb("custom", **fields) else REFUSED
        except Exception as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            line = place and f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
            self.notes.setdefault("raised", {})[type(error).__name__] = line
        cpu_seconds, seconds = time.thread_time() - cpu_start, time.perf_counter()
        self.marks[number] = mark
        self.seconds.append(seconds - start)
        self.cpu_seconds.append(cpu_seconds)
        self.own_seconds.append(cpu_seconds - (pauses.seconds - paused))

    def report(self) -> None:
        """Write down what became of everything."""
        if self.notes.get("is_reported"):
            return
        self.notes["is_reported"] = True
        ended = time.monotonic()
        for _ in range(50):
            stats = pgtrack.stats()
            if stats.is_balanced and not stats.pending:
                break
            time.sleep(0.01)  # a thread that hung may be about to count its own
        names = ("emitted", "recovered", "delivered", "spooled", "pending", "retries")
        report = {
            "stats": {
                **{name: getattr(stats, name) for name in names},
                "rejected": dict(stats.rejected),
                "dropped": dict(stats.dropped),
                "spool_errors": getattr(stats, "spool_errors", 0),
                "last_error": stats.last_error,
                "is_balanced": stats.is_balanced,
            },
            "calls": sum(mark != NOT_CALLED for mark in self.marks[:]),
            "refused": self.marks[:].count(REFUSED),
            "worst_seconds": max(self.seconds, default=0.0),
            "worst_cpu_seconds": max(self.cpu_seconds, default=0.0),
            "worst_own_seconds": max(self.own_seconds, default=0.0),
            "ending_seconds": 0.0 if self.ending_at is None else ended - self.ending_at,
            "lines": self.lines,
            "notes": self.notes,
        }
        path = self.folder / f"{self.name}.report"
        path.write_text(json.dumps(report, default=repr))

    def say(self, word: str) -> None:
        """Tell whoever started this process."""
        sys.stdout.write(f"{word}\n")
        sys.stdout.flush()


class Pauses(threading.local):
    """What the garbage collector took on a thread, in seconds of the processor."""

    seconds = 0.0
    _began = 0.0

    def note(self, phase: str, _: object) -> None:
        """Be called when it begins and ends."""
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.seconds += time.thread_time() - self._began


pauses = Pauses()


class Lines(logging.Handler):
    """Keep each line of pgtrack's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        part.lines.append(f"{record.levelname} {record.getMessage()}")


# --- what is emitted ---


def events(plan: dict[str, Any]) -> None:
    """Emit all events, in some threads, at some rate."""
    count, threads = plan["count"], plan["threads"]
    start = time.monotonic()

    def work(first: int) -> None:
        for number in range(first, count, threads):
            if plan["rate"] is not None:
                due = start + number / plan["rate"]
                time.sleep(max(due - time.monotonic(), 0.0))
            part.emit(number)

    if threads == 1:
        work(0)
        return
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def odd_values(plan: dict[str, Any]) -> None:
    """Emit values that JSON cannot carry, one kind in each event."""
    import datetime as dt

    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    myself: dict[str, Any] = {}
    myself["myself"] = myself
    values = [
        object(),
        dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc),
        b"\xff\x00",
        float("nan"),
        "\ud800",
        "x" * 5_000_000,
        myself,
        Mute(),
        10**400,
        "\0",
    ]
    for number in range(plan["count"]):
        value = values[number % len(values)]
        metadata = {"number": number, "text": f"canary-text-{number}", "odd": value}
        part.emit(number, metadata=metadata)


def huge_values(plan: dict[str, Any]) -> None:
    """Emit values so large that memory ends, then have more of it again."""
    import resource

    hoard: list[Any] = []
    for number in range(plan["count"]):
        changes = {}
        if number % 2 == 0:
            try:
                # Many small texts: none is cut before it was copied.
                value = [f"{number}.{i}" * 20 for i in range(4_000)]
                hoard.append(value)
            except MemoryError:
                value = hoard.pop()  # leaves next to nothing
            changes = {
                "metadata": {
                    "number": number,
                    "text": f"canary-text-{number}",
                    "huge": value,
                }
            }
        try:
            part.emit(number, **changes)
        except MemoryError:
            part.notes["own_memory_errors"] = part.notes.get("own_memory_errors", 0) + 1
    hoard.clear()
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, unlimited)


def with_late_ones(plan: dict[str, Any]) -> None:
    """Emit all but ten, shut down, and emit those."""
    count = plan["count"]
    for number in range(count - 10):
        part.emit(number)
    pgtrack.shutdown(5.0)
    for number in range(count - 10, count):
        part.emit(number)


def with_a_finalizer(plan: dict[str, Any]) -> None:
    """Emit one event from a `__del__` that is called as the interpreter ends."""

    class Last:
        # It holds all it needs: the names of this module are gone by then.
        def __init__(self, number: int) -> None:
            self.name, self.number, self.marks = part.name, number, part.marks
            self.emit, self.verdicts = pgtrack.emit, {True: TAKEN, False: REFUSED}

        def __del__(self) -> None:
            metadata = {
                "number": self.number,
                "text": f"canary-text-{self.number}",
            }
            event_id = f"evt-{self.name}-{self.number}"
            is_taken = self.emit(
                "custom",
                name=f"{self.name}-{self.number}",
                event_id=event_id,
                metadata=metadata,
            )
            self.marks[self.number] = self.verdicts[is_taken]

    for number in range(plan["count"] - 1):
        part.emit(number)
    # A module of its own: ours is kept by what it registered, beyond the builtins.
    sys.modules["last"] = module = types.ModuleType("last")
    module.last = Last(plan["count"] - 1)  # type: ignore[attr-defined]


def with_exit_handler(plan: dict[str, Any]) -> None:
    """Emit half now, the other half from a handler that is registered last."""
    count, mine = plan["count"], part
    for number in range(count // 2):
        part.emit(number)
    atexit.register(lambda: [mine.emit(n) for n in range(count // 2, count)])


def with_early_exit_handler(plan: dict[str, Any]) -> None:
    """Emit half now; the other half follows from `an_early_exit_handler`."""
    for number in range(plan["count"] // 2):
        part.emit(number)


def in_signal_handlers(plan: dict[str, Any]) -> None:
    """Emit from a handler that interrupts emit, again and again."""
    left = iter(range(plan["count"] // 2, plan["count"]))

    def handle(*_: object) -> None:
        number = next(left, None)
        if number is not None:
            part.emit(number)

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    numbers = iter(range(plan["count"] // 2))
    for number in numbers:
        part.emit(number)
        while number > plan["count"] // 4 and part.marks[-1] == NOT_CALLED:
            signal.pause()
    signal.setitimer(signal.ITIMER_REAL, 0.0)


def in_a_pool(plan: dict[str, Any]) -> None:
    """Emit from the threads of a pool, in the session of whoever submits."""
    from concurrent.futures import ThreadPoolExecutor

    from pgtrack.integrations import concurrent

    concurrent.install()
    with ThreadPoolExecutor(4) as pool, pgtrack.session("sess-pool"):
        for number in range(plan["count"]):
            pool.submit(part.emit, number)
    concurrent.uninstall()


def in_greenlets(plan: dict[str, Any]) -> None:
    """Emit from ten greenlets."""
    import gevent

    def work(first: int) -> None:
        for number in range(first, plan["count"], 10):
            part.emit(number)
            gevent.sleep(0)

    gevent.joinall([gevent.spawn(work, i) for i in range(10)])


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 and later warn of forking with threads: the point of this.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def half_in_a_child(plan: dict[str, Any]) -> None:
    """Emit half, and have a forked child emit the other half and end as a script."""
    _half_in_a_child(plan, lambda: sys.exit(0))


def half_in_a_child_cut_short(plan: dict[str, Any]) -> None:
    """Emit half, and have a forked child emit the other half and leave at once."""
    _half_in_a_child(plan, lambda: os._exit(0))


def _half_in_a_child(plan: dict[str, Any], end: Any) -> None:
    global part  # noqa: PLW0603  the child's is another
    half = plan["count"] // 2
    for number in range(half):
        part.emit(number)
    pid = _fork()
    if pid == 0:
        part = Part(plan, f"{part.name}.1", half)
        for number in range(half):
            part.emit(number)
        part.ending_at = time.monotonic()
        end()
    part.notes["child"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def half_in_a_process(plan: dict[str, Any]) -> None:
    """Emit half, and have a child of multiprocessing emit the other half."""
    import multiprocessing

    half = plan["count"] // 2
    for number in range(half):
        part.emit(number)
    child = multiprocessing.get_context("fork").Process(
        target=_emit_in_process, args=(plan, half)
    )
    child.start()
    child.join()
    part.notes["child"] = child.exitcode


def _emit_in_process(plan: dict[str, Any], count: int) -> None:
    global part  # noqa: PLW0603  the child's is another
    from multiprocessing.util import Finalize

    part = Part(plan, f"{part.name}.1", count)
    for number in range(count):
        part.emit(number)
    part.ending_at = time.monotonic()
    Finalize(None, part.report, exitpriority=-1_000)


def in_a_crowd(plan: dict[str, Any]) -> None:
    """Have each three events emitted by a short-lived process, a few at a time."""
    import encodings.idna

    import httpcore
    import httpx

    del encodings, httpcore, httpx  # loaded once, for all of them
    # The end of a child need not look at, and so copy, what it shares with us.
    gc.collect()
    gc.freeze()
    pgtrack.Client(pgtrack.Config(**{**plan["options"], "spool_dir": None}))
    global part  # noqa: PLW0603  a child's is another
    running: set[int] = set()
    failed = 0
    for child in range(plan["count"] // 3):
        while len(running) >= 4:
            pid, status = os.wait()
            running.remove(pid)
            failed += status != 0
        pid = _fork()
        if pid == 0:
            part = Part(plan, f"{plan['name']}.{child}", 3)
            pgtrack.configure(**plan["options"])
            for number in range(3):
                part.emit(number)
            part.ending_at = time.monotonic()
            sys.exit(0)
        running.add(pid)
    for pid in running:
        failed += os.waitpid(pid, 0)[1] != 0
    part.notes["child"] = failed


# --- what is done to it ---


def an_early_exit_handler(plan: dict[str, Any]) -> None:
    """Register a handler that emits, before pgtrack registers its own."""
    count, mine = plan["count"], part
    atexit.register(lambda: [mine.emit(n) for n in range(count // 2, count)])


def greenlets(plan: dict[str, Any]) -> None:
    """Let gevent take the place of threads and sockets."""
    from gevent import monkey

    monkey.patch_all()


def little_memory(plan: dict[str, Any]) -> None:
    """Leave the process next to no memory."""
    import resource

    import httpx

    httpx.create_ssl_context()
    "localhost".encode("idna")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 40_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    threading.stack_size(256 * 1024)


def small_files(plan: dict[str, Any]) -> None:
    """Let no file grow beyond 4 KB, as a quota may."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def files_of_any_size(plan: dict[str, Any]) -> None:
    """Lift the limit."""
    import resource

    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def _break_disk(plan: dict[str, Any], names: list[str], number: int) -> None:
    """
    Let calls that concern the spool fail, those of `os` by their names.

    A file that is written through an object writes half of it first.
    """
    spool = plan["options"].get("spool_dir", "\0")

    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    def broken(real: Any) -> Any:
        is_open = real is os.open

        def call(target: Any, *args: Any, **options: Any) -> Any:
            is_write = not is_open or args[0] & (os.O_WRONLY | os.O_RDWR)
            return (fail if is_write and _is_in(spool, target) else real)(
                target, *args, **options
            )

        return call

    class Broken(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[: len(data) // 2])
            return fail()

    real_open = io.open

    def call_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if isinstance(file, int) and "w" in mode and _is_in(spool, file):
            return Broken(file, mode.replace("b", ""))
        return real_open(file, mode, *args, **options)

    for name in names:
        setattr(os, name, broken(getattr(os, name)))
    builtins.open = io.open = call_open  # type: ignore[assignment]


def _is_in(folder: str, target: Any) -> bool:
    """Return whether a path, or the file of a descriptor, is in a folder."""
    try:
        if isinstance(target, int):
            target = Path(f"/proc/self/fd/{target}").readlink()
    except OSError:
        return False
    return os.fsdecode(target).startswith(folder)


def full_disk(plan: dict[str, Any]) -> None:
    """Let no byte more be written."""
    _break_disk(plan, ["write"], errno.ENOSPC)


def read_only_disk(plan: dict[str, Any]) -> None:
    """Let nothing be written, made, renamed or taken away."""
    names = ["write", "open", "rename", "unlink", "rmdir", "mkdir"]
    _break_disk(plan, names, errno.EROFS)


def failing_disk(plan: dict[str, Any]) -> None:
    """Let writing, and flushing to the disk, fail."""
    _break_disk(plan, ["write", "fsync"], errno.EIO)


def disappearing_disk(plan: dict[str, Any]) -> None:
    """Take the folder of the spool away after the first half of the events."""
    import shutil

    def take_away() -> None:
        while part.marks[plan["count"] // 2] == NOT_CALLED:
            time.sleep(0.001)
        shutil.rmtree(plan["options"]["spool_dir"], ignore_errors=True)

    threading.Thread(target=take_away, daemon=True).start()


def outlast_retries(plan: dict[str, Any]) -> None:
    """Wait for longer than `retry_for`, until nothing is in memory any more."""
    time.sleep(2 * plan["options"]["retry_for"])
    deadline = time.monotonic() + 10.0
    while pgtrack.stats().pending and time.monotonic() < deadline:
        time.sleep(0.01)


def a_jumping_clock(plan: dict[str, Any]) -> None:
    """Let the wall clock go on a year, back two, and so on, with every tenth look."""
    year, looks = 365 * 86_400, iter(range(10**9))
    real_ns, real = time.time_ns, time.time

    def jump() -> int:
        return (0, year, -year)[next(looks) // 10 % 3]

    time.time_ns = lambda: real_ns() + jump() * 10**9  # type: ignore[assignment]
    time.time = lambda: real() + jump()  # type: ignore[assignment]


def a_year_ahead(plan: dict[str, Any]) -> None:
    """Let the wall clock be a year ahead."""
    _shift_clock(365 * 86_400)


def a_year_behind(plan: dict[str, Any]) -> None:
    """Let the wall clock be a year behind."""
    _shift_clock(-365 * 86_400)


def _shift_clock(seconds: int) -> None:
    real_ns, real = time.time_ns, time.time
    time.time_ns = lambda: real_ns() + seconds * 10**9  # type: ignore[assignment]
    time.time = lambda: real() + seconds  # type: ignore[assignment]


def a_resolver(plan: dict[str, Any]) -> None:
    """Let a name that did not resolve lead to this machine."""
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        is_known = host not in ("collector.invalid", b"collector.invalid")
        return real(host if is_known else "127.0.0.1", *args, **options)

    socket.getaddrinfo = resolve  # type: ignore[assignment]


def a_sigterm_handler(plan: dict[str, Any]) -> None:
    """Have a handler of the host's own, which ends with a status of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))


# --- how it ends ---


def fall(plan: dict[str, Any]) -> None:
    """Come to the end of the script."""


def exit_with_status(plan: dict[str, Any]) -> None:
    """Ask the interpreter to end."""
    sys.exit(3)


def fail(plan: dict[str, Any]) -> None:
    """End by an exception that nobody catches."""
    msg = "the host's own"
    raise LookupError(msg)


def flush_and_close(plan: dict[str, Any]) -> None:
    """Flush and shut down, as a careful host does, for two seconds in all."""
    start = time.monotonic()
    part.notes["flush"] = pgtrack.flush(1.0)
    pgtrack.shutdown(1.0)
    part.notes["closing_seconds"] = time.monotonic() - start


def terminate(plan: dict[str, Any]) -> None:
    """End by SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


def interrupt(plan: dict[str, Any]) -> None:
    """End by SIGINT."""
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()


def kill(plan: dict[str, Any]) -> None:
    """End by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def leave(plan: dict[str, Any]) -> None:
    """End by `os._exit`."""
    os._exit(4)


def hook(event: Any) -> Any:
    """Raise for every tenth event."""
    if event.metadata["number"] % 10 == 0:
        msg = "canary: the hook fails"
        raise ValueError(msg)
    return event


def main(plan: dict[str, Any]) -> None:
    """Do what the plan says."""
    atexit.register(lambda: part.report())  # noqa: PLW0108  a child has another part
    for name in plan["before"]:
        globals()[name](plan)
    global pgtrack  # noqa: PLW0603  imported only now
    import pgtrack

    gc.callbacks.append(pauses.note)
    logger = logging.getLogger("pgtrack")
    logger.addHandler(Lines())
    logger.propagate = False
    options = dict(plan["options"])
    if options.get("before_send") == "hook":
        options["before_send"] = hook
    plan["options"] = options
    if plan["emits"] != "in_a_crowd":
        pgtrack.configure(**options)
    for name in plan["then"]:
        globals()[name](plan)
    globals()[plan["emits"]](plan)
    deadline = time.monotonic() + 5.0
    while plan["awaits_failure"] and time.monotonic() < deadline:
        time.sleep(0.01)  # nobody tells of a failure but the ledger
        if pgtrack.stats().last_error is not None:
            break
    if plan["does_wait"]:
        part.say("emitted")
        sys.stdin.readline()
    for name in plan["at_last"]:
        globals()[name](plan)
    if plan["flush"] is not None:
        part.notes["flush"] = pgtrack.flush(plan["flush"])
    part.ending_at = time.monotonic()
    globals()[plan["ending"]](plan)


def serve(path: str) -> dict[str, Any] | None:
    """
    Return the plan of a process, in a process forked for it; None when that was all.

    Libraries are loaded once for all of them, but pgtrack is not. Whoever connects
    sends a plan with the three standard files, and gets the process id, and in the end
    the status. Nothing is left on the stack that the end of a process could notice.
    """
    import encodings.idna
    import multiprocessing.util

    import httpcore
    import httpx

    del encodings, httpcore, httpx, multiprocessing
    gc.collect()
    gc.freeze()
    callers: dict[int, socket.socket] = {}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    listener.settimeout(0.01)
    while os.getppid() == parent:
        try:
            caller, _ = listener.accept()
            data, files, _, _ = socket.recv_fds(caller, 1_000_000, 3)
            pid = _fork()
            if pid == 0:
                for target, file in enumerate(files):
                    os.dup2(file, target)
                    os.close(file)
                for other in (listener, caller, *callers.values()):
                    other.close()
                return json.loads(data)
            for file in files:
                os.close(file)
            callers[pid] = caller
            caller.sendall(b"%d\n" % pid)
        except TimeoutError:
            pass
        while callers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            with callers.pop(pid) as caller:
                caller.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    return None


if __name__ == "__main__":
    parent = os.getppid()
    is_served = sys.argv[1] == "--serve"
    chosen = serve(sys.argv[2]) if is_served else json.loads(sys.argv[1])
    if chosen is not None:
        given = {**PLAN, **chosen}
        os.chdir(given["folder"])
        part = Part(given, given["name"], given["count"])
        main(given)
