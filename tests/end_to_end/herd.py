"""
Fork processes that emit over one spool, and end each of them at a random moment.

    python herd.py PLAN

The plan is a JSON object; what may be in it, and its defaults, says `PLAN`. The program
itself emits nothing: it has imported what its processes need, so that they begin at
once. It prints a JSON object: how many processes ended, by how and with which status.

A process emits events with the names `<process>-<thread>-<number>`, and appends each
to the file `told` of the folder once `emit` has returned: after a plus if it returned
True, after a minus if not. What was told before a SIGKILL, the system keeps.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import faulthandler
import gc
import heapq
import itertools
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

PLAN: dict[str, Any] = {
    "folder": ".",
    "options": {},  # of `configure`
    "name": "a",  # what the names of its processes begin with
    "seed": 0,
    "lives": None,  # how many processes there are in all, ...
    "seconds": None,  # ... or for how long there are new ones
    "at_once": 4,
    "life": (0.001, 0.04),  # seconds, the shortest and the longest
    "ends": {"kill": 1},  # how often each of `ENDS` is the end, in proportion
    "threads": 3,
    "forks": 0.0,  # share of the processes that fork one more when they have emitted
    "burst": None,  # events of a thread without a pause; None: it makes none
    "pause": 0.0,  # seconds, the longest
    "does_stop": True,  # whether threads emit no more when the process ends in order
    "has_ledgers": False,  # whether processes that end in order write their ledger down
}

ENDS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,  # the default action
    "handled": signal.SIGTERM,  # a handler of the process's own, which exits
    "exit": signal.SIGUSR1,  # which stands for having nothing left to do
}

SCALE = int(os.environ.get("PGTRACK_SOAK", "1"))
"""How many times longer the long tests run than in the default run."""

# Seconds for what should take a moment.
_PATIENCE = 60.0

# Seconds between two looks at a process that is to end.
_TICK = 0.002


# --- the program ---


class Life:
    """One process: what it emits until its end."""

    def __init__(self, plan: dict[str, Any], name: str, end: str, told: int) -> None:
        self.plan = plan
        self.name = name
        self.end = end
        self.told = told
        self.random = random.Random(f"{plan['seed']} {name}")
        self.is_over = False
        self.threads: list[threading.Thread] = []
        self._hear()

    def _hear(self) -> None:
        """Have signals end a read, also those that come just before it begins."""
        self.waiting, bell = os.pipe()
        os.set_blocking(bell, False)
        signal.set_wakeup_fd(bell, warn_on_full_buffer=False)

    def run(self) -> NoReturn:
        """Live."""
        faulthandler.register(signal.SIGUSR2)
        for number in {signal.SIGUSR1, ENDS["handled"]} if self.end != "term" else ():
            signal.signal(number, self._stop)
        if self.plan["has_ledgers"]:
            global living  # noqa: PLW0603  for what is called at exit
            living = self
        import pgtrack

        pgtrack.configure(**self.plan["options"])
        if self.random.random() < self.plan["forks"]:
            for number in range(self.random.randrange(100)):
                self.emit("first", number)
            self._fork()
        self.threads = [
            threading.Thread(target=self._work, args=(str(i),), daemon=True)
            for i in range(self.plan["threads"])
        ]
        for thread in self.threads:
            thread.start()
        while not self.is_over:
            os.read(self.waiting, 1)  # until a signal comes
        if self.plan["does_stop"]:
            for thread in self.threads:
                thread.join(_PATIENCE)
        sys.exit()

    def _fork(self) -> None:
        """Go on in two processes, of which each gets the signal that is the end."""
        signals = set(ENDS.values()) - {signal.SIGKILL}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        pid = None if self.is_over else os.fork()
        if pid:
            # Sent to both while there was only one, perhaps.
            for number in signals & signal.sigpending():
                os.kill(pid, number)
        elif pid == 0:
            self.name += "f"
            self.random = random.Random(f"{self.plan['seed']} {self.name}")
            self._hear()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _stop(self, *_: object) -> None:
        self.is_over = True

    def _work(self, thread: str) -> None:
        burst, pause = self.plan["burst"], self.plan["pause"]
        for number in itertools.count():
            if self.is_over and self.plan["does_stop"]:
                break
            self.emit(thread, number)
            if burst is not None and number % burst == 0:
                time.sleep(self.random.random() * pause)

    def emit(self, thread: str, number: int) -> None:
        """Emit one event, then tell what became of it."""
        import pgtrack

        name = f"{self.name}-{thread}-{number}"
        taken = pgtrack.emit("custom", name=name, metadata={"number": number})
        os.write(self.told, f"{'+' if taken else '-'}{name}\n".encode())

    def report(self) -> None:
        """Write the ledger down."""
        import pgtrack

        stats = pgtrack.stats()
        names = ("emitted", "recovered", "delivered", "spooled", "pending", "retries")
        report = {
            **{name: getattr(stats, name) for name in names},
            "spool_errors": stats.spool_errors,
            "dropped": dict(stats.dropped),
            "rejected": dict(stats.rejected),
            "is_balanced": stats.is_balanced,
            "last_error": stats.last_error,
        }
        path = Path(self.plan["folder"]) / f"{self.name}.ledger"
        path.write_text(json.dumps(report))


living: Life | None = None


def _report() -> None:
    if living is not None:
        living.report()


class Herd:
    """All processes: who lives until when."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.random = random.Random(plan["seed"])
        path = Path(plan["folder"]) / "told"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.told = os.open(path, flags, 0o600)
        # Closed by the last process that has it.
        self.receiver, self.alive = os.pipe()
        self.until: list[tuple[float, int, str]] = []
        self.leaving: collections.deque[tuple[int, str]] = collections.deque()
        self.statuses: collections.Counter[str] = collections.Counter()

    def run(self) -> dict[str, Any]:
        """Keep so many processes alive, and return how many ended in which way."""
        began = time.monotonic()
        lives, seconds = self.plan["lives"], self.plan["seconds"]
        for number in itertools.count():
            is_time_up = seconds is not None and time.monotonic() - began > seconds
            if is_time_up or number == lives:
                break
            if len(self.until) == self.plan["at_once"]:
                self._end_first()
            self._begin(number)
        while self.until:
            self._end_first()
        self._reap(0)
        os.close(self.alive)
        is_over = select.select([self.receiver], [], [], _PATIENCE)[0]
        return {
            "statuses": self.statuses,
            "are_all_gone": bool(is_over),
        }

    def _begin(self, number: int) -> None:
        ends = self.plan["ends"]
        (end,) = self.random.choices([*ends], [*ends.values()])
        until = time.monotonic() + self.random.uniform(*self.plan["life"])
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.close(self.receiver)
            name = f"{self.plan['name']}{number}{end}"
            Life(self.plan, name, end, self.told).run()
        with contextlib.suppress(OSError):  # it may have done so, or have ended
            os.setpgid(pid, pid)
        heapq.heappush(self.until, (until, pid, end))

    def _end_first(self) -> None:
        """Wait for the time of the next one, and end it and its children."""
        until, pid, end = heapq.heappop(self.until)
        time.sleep(max(until - time.monotonic(), 0.0))
        if end == "kill" and self.random.random() < 0.5:
            os.kill(pid, signal.SIGKILL)  # and a moment later its children
            time.sleep(self.random.random() * 0.005)
        os.killpg(pid, ENDS[end])
        self.leaving.append((pid, end))
        self._reap(self.plan["at_once"])

    def _reap(self, most: int) -> None:
        """Wait until no more than *most* are still about to end."""
        while len(self.leaving) > most:
            pid, end = self.leaving.popleft()
            status = _wait(pid, _PATIENCE)
            if status is None:
                os.kill(pid, signal.SIGUSR2)  # it shows where its threads are
                _wait(pid, 1.0)
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.statuses[f"{end} stuck"] += 1
            else:
                self.statuses[f"{end} {status}"] += 1


def _wait(pid: int, timeout: float) -> int | None:
    """Return the status of a child; None if it has not ended in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_TICK)
    return None


# --- its user ---


@dataclass
class Told:
    """What processes have told."""

    taken: set[str]
    refused: set[str]

    def bogus(self, names: Iterable[str]) -> list[str]:
        """Return those of *names* that cannot have been emitted yet."""
        next_ones: collections.Counter[str] = collections.Counter()
        for name in (*self.taken, *self.refused):
            thread, _, number = name.rpartition("-")
            next_ones[thread] = max(next_ones[thread], int(number) + 1)
        split = ((name, *name.rpartition("-")[::2]) for name in names)
        # One may have been on its way when the process ended.
        return [name for name, thread, n in split if int(n) > next_ones[thread]]


def told_in(folder: Path) -> Told:
    """Return what the processes of a folder have told."""
    path = folder / "told"
    lines = path.read_text().splitlines() if path.exists() else []
    taken = {line[1:] for line in lines if line[0] == "+"}
    return Told(taken, {line[1:] for line in lines if line[0] == "-"})


def drive(plan: Mapping[str, Any], *, timeout: float = _PATIENCE) -> dict[str, Any]:
    """Run the program to its end, and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if "PRODUCTGRAPH" not in k}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps({**PLAN, **plan})],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )
    if done.returncode or done.stderr:
        msg = f"{done.returncode}: {done.stderr[-2000:]}"
        raise RuntimeError(msg)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@contextlib.contextmanager
def now_and_then(
    begin: Callable[[], object], end: Callable[[], object], *, most: float = 0.3
) -> Iterator[None]:
    """
    Call *begin* and *end* in turn at random moments, until the block is left.

    Args:
        begin: Called first.

        end: Called last.

        most: Seconds between two calls, the most.
    """
    rng = random.Random(0)
    is_over = threading.Event()

    def flap() -> None:
        while not is_over.wait(rng.uniform(0.02, most)):
            begin()
            is_over.wait(rng.uniform(0.02, most))
            end()

    thread = threading.Thread(target=flap, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_PATIENCE)


def owners_in(spool: Path) -> list[Path]:
    """Return the folders that processes have left behind, the unfinished included."""
    return [path for path in spool.glob("*/*") if path.name != "damaged"]


def recover(plan: Mapping[str, Any], spool: Path, *, rounds: int = 50) -> int:
    """
    Run processes one after the other until the spool is empty; return how many.

    Folders that were left unfinished are made to look old, since only then they go.
    """
    for number in range(rounds):
        for path in spool.glob("*/*.new"):
            os.utime(path, (0, 0))
        if not owners_in(spool):
            return number
        options = {**plan["options"], "replay_rate": None, "exit_timeout": 30.0}
        drive(
            {
                "folder": plan["folder"],
                "options": {**options, "batch_size": 1},
                "name": f"{plan.get('name', 'last')}.{number}.",
                "has_ledgers": plan.get("has_ledgers", False),
                "lives": 1,
                "life": (0.2, 0.2),
                "ends": {"exit": 1},
                "threads": 1,
                "burst": 1,
                "pause": 0.1,
            }
        )
    return rounds


def _load(options: dict[str, Any]) -> None:
    """Import what a client and its first batch import."""
    import httpx

    import pgtrack

    options = {**options, "project_id": "nobody"}  # who recovers nothing
    pgtrack.Client(pgtrack.Config(**options)).close()
    httpx.HTTPTransport().close()
    gc.collect()
    gc.freeze()  # no page is copied for the sake of the collector


def _speak_up(error: BaseException) -> None:
    traceback.print_exception(error)


def _main() -> None:
    plan = {**PLAN, **json.loads(sys.argv[1])}
    _load(plan["options"])
    # Lines about the endpoint are expected; errors of pgtrack's own are not.
    logging.getLogger("pgtrack").setLevel(logging.CRITICAL)
    sys.modules["pgtrack._diagnostics"].internal_error = _speak_up
    result = Herd(plan).run()
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    atexit.register(_report)  # before pgtrack's own handler, so that it comes after
    _main()
