"""
Run a row of the fault table: make its world, start its processes, judge what became.

What is judged is what was seen from outside: the marks that each call of emit left,
what the server holds, the lines in the files of the spool, which are counted here
without pgtrack's help. The ledgers of the processes are then held against that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from harness import ProductGraph, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from typing_extensions import Self

HERE = Path(__file__).parent
API_KEY = "canary-key"

# How many events are meant: a number, or ...
ALL, SOME, ANY = "all", "some", "any"

# What `program.py` marks a call of emit with.
_CALLED, _TAKEN, _REFUSED, _RAISED = 1, 2, 3, 4

_MOST_PROBLEMS = 10

_SPOOL_SETTINGS = {
    "max_spool_age",
    "max_spool_bytes",
    "replay_rate",
    "spool_each_event",
    "spool_fsync",
}

# Seconds of the processor that a call of emit may take; a slow machine included.
_WORST_CPU = 0.005

# Seconds beyond the bound that an end may take: to write what is left, and to be busy.
_SLACK = 4.0


@dataclass(frozen=True, kw_only=True)
class Ends:
    """
    Where the events of a row end.

    Args:
        delivered: How many arrive, in the end.

        by_next: How many of them the first process leaves on disk for the next one.

        dropped: How many are dropped, by reason.

        rejected: How many the endpoint refuses, by its reason.

        lost: How many are nowhere.

        duplicates: How many arrive once more, under the same id.
    """

    delivered: int | str = ALL
    by_next: int | str = 0
    dropped: Mapping[str, int | str] = field(default_factory=dict)
    rejected: Mapping[str, int | str] = field(default_factory=dict)
    lost: int | str = 0
    duplicates: int | str = 0

    @property
    def words(self) -> str:
        """What the table says."""
        odd = [_words_of(count, "lost") for count in [self.lost] if count]
        for kind, counts in (("dropped", self.dropped), ("rejected", self.rejected)):
            for reason, count in counts.items():
                word = "the others" if odd and count == ALL else count
                odd.append(_words_of(word, f"{kind}: `{reason}`"))
        is_spooled = self.by_next == ALL
        some = "perhaps some" if self.by_next == ANY else "some"
        where = f", {some} by the next process" if self.by_next else ""
        where = " by the next process" if is_spooled else where
        parts = ["all spooled"] if is_spooled else []
        if ALL in (self.lost, *self.dropped.values()):
            parts += odd
        elif is_spooled and self.delivered == ALL:
            parts += [f"delivered{where}", *odd]
        else:
            parts += [*odd, f"{'the others' if odd else 'all'} delivered{where}"]
        if self.duplicates:
            may_be = "perhaps " if self.duplicates == ANY else ""
            parts.append(f"{may_be}duplicates (same ids)")
        return ", ".join(parts)


def _words_of(count: int | str, what: str) -> str:
    if isinstance(count, int):
        return f"{count:,} {what}"
    return f"perhaps some {what}" if count == ANY else f"{count} {what}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    Be a fault.

    Args:
        name: Of the row, as a test's id.

        fault: What the table says of it.

        plain: Where the events end without a spool; None if the fault needs one.

        spooled: Where they end with one; None if there is no difference to see.

        program: Its plan, but for what the world knows.

        small: What of the plan is smaller where the row is only checked.

        world: Makes the world; by default a healthy server.

        heal: Called when all are emitted, before the process goes on.

        damage: Called between the first process and the next one.

        next_program: What the plan of the next process has besides.

        status: Of the first process, at its end.

        stderr: A pattern of what the first process prints there, whole.

        is_alone: Whether it needs interpreters that have loaded nothing.

        has_failed: Whether the first process must have met a failed attempt.

        has_spool_errors: Whether it must have counted that the disk failed.

        reports_early: Whether some may be on their way when the first one reports.

        may_call: Seconds of the processor that a call of emit may take, without those
            of the garbage collector, which may run in the middle of it.

        may_raise: What may come out of emit.

        seconds: How long the row may take; a slow machine included.
    """

    name: str
    fault: str
    plain: Ends | None
    spooled: Ends | None
    program: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    world: Callable[[World], None] | None = None
    heal: Callable[[World], None] | None = None
    damage: Callable[[World], None] | None = None
    next_program: Mapping[str, Any] = field(default_factory=dict)
    status: int = 0
    stderr: str = ""
    is_alone: bool = False
    has_failed: bool = False
    reports_early: bool = False
    has_spool_errors: bool = False
    may_call: float = _WORST_CPU
    may_raise: tuple[str, ...] = ()
    seconds: float = 90.0


@dataclass
class Outcome:
    """What became of a row: problems, if any, and how long a caller waited."""

    row: str
    has_spool: bool
    problems: list[str]
    words: str
    duplicates: int = 0
    worst_seconds: float = 0.0
    worst_cpu_seconds: float = 0.0
    worst_own_seconds: float = 0.0
    is_slow: bool = False
    took: float = 0.0


class World:
    """Be what a process meets: a folder, servers, the settings that lead there."""

    def __init__(
        self, row: Row, folder: Path, nursery: Nursery | None, *, has_spool: bool
    ) -> None:
        self.row = row
        self.nursery = nursery
        self.folder = folder
        self.spool = folder / "spool" if has_spool else None
        self.server = Server(ProductGraph(gzip=True), is_open=False)
        self.elsewhere: list[Server] = []
        self.is_shut = False
        self.release = threading.Event()
        self.options: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if self.row.world is not None:
            self.row.world(self)
        if not self.is_shut:
            self.server.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        for server in [self.server, *self.elsewhere]:
            server.close()

    def keep_shut(self) -> None:
        """Leave the server's port closed for now."""
        self.is_shut = True

    def be_well(self) -> None:
        """Undo whatever the server does wrong."""
        self.server.script = []
        self.server.default = None
        self.server.welcome = None
        self.server.core.max_body = None
        self.server.open()
        self.release.set()

    def plan(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the plan of a process."""
        options: dict[str, Any] = {
            "project_id": "p",
            "endpoint": self.server.url,
            "api_key": API_KEY,
            "batch_interval": 0.05,
            "timeout": 30.0,
            "exit_timeout": 30.0,
            **self.options,
            **given.get("options", {}),
        }
        if self.spool is None:
            options = {k: v for k, v in options.items() if k not in _SPOOL_SETTINGS}
        else:
            options.setdefault("spool_dir", str(self.spool))
        return {**given, "folder": str(self.folder), "name": name, "options": options}


class Nursery:
    """
    Have processes forked from one that has loaded the libraries; see `program.serve`.

    Args:
        folder: Where it has its socket.
    """

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "nursery")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "program.py"), "--serve", self._path],
            env=_environment(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)

    def start(self, plan: str, files: list[int]) -> tuple[int, BinaryIO]:
        """Return the id of a new process, and where its status will be read."""
        with socket.socket(socket.AF_UNIX) as connection:
            deadline = time.monotonic() + 30
            while connection.connect_ex(self._path) and time.monotonic() < deadline:
                time.sleep(0.01)  # it is still loading
            socket.send_fds(connection, [plan.encode()], files)
            reader = connection.makefile("rb")
        return int(reader.readline()), reader


def _environment() -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PRODUCTGRAPH_", "COVERAGE_"))
        and "proxy" not in key.lower()
    }


class Process:
    """Be a process of the program, and what it has left behind."""

    def __init__(self, world: World, name: str, given: Mapping[str, Any]) -> None:
        self.plan = world.plan(name, given)
        self.folder = world.folder
        self.name = name
        plan = json.dumps(self.plan)
        self._log = (self.folder / f"{name}.stderr").open("w+b")
        nursery = None if world.row.is_alone else world.nursery
        if nursery is None:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "program.py"), plan],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self.pid = self._process.pid
            self._stdin, self._stdout = self._process.stdin, self._process.stdout
            self._wait = self._process.wait
        else:
            stdin, theirs_in = socket.socketpair()
            with stdin, theirs_in:
                files = [theirs_in.fileno(), theirs_in.fileno(), self._log.fileno()]
                self.pid, status = nursery.start(plan, files)
                self._stdin = stdin.makefile("wb", buffering=0)
                self._stdout = stdin.makefile("rb", buffering=0)

            def wait() -> int:
                with status:
                    return int(status.readline())

            self._wait = wait
        self.was_killed = False
        self._timer = threading.Timer(world.row.seconds, self._kill)
        self._timer.daemon = True
        self._timer.start()

    def _kill(self) -> None:
        self.was_killed = True
        os.kill(self.pid, signal.SIGKILL)

    def wait_until_emitted(self) -> None:
        """Wait for its word, or its end."""
        self._stdout.readline()

    def go_on(self) -> None:
        """Let it go on."""
        with contextlib.suppress(OSError):
            self._stdin.write(b"\n")
            self._stdin.flush()

    def end(self) -> int:
        """Wait for its end, and return its status."""
        status = self._wait()
        self._timer.cancel()
        for file in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                file.close()
        self._log.seek(0)
        self.stderr = self._log.read().decode()
        self._log.close()
        return status

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        """What it and its children told, by their names."""
        found = sorted(self.folder.glob(f"{self.name}*.report"))
        return {path.stem: json.loads(path.read_text()) for path in found}

    @property
    def marks(self) -> dict[str, bytes]:
        """How the calls of emit ended, in it and its children."""
        found = sorted(self.folder.glob(f"{self.name}*.marks"))
        return {path.stem: path.read_bytes() for path in found}


# --- the files of the spool, read by hand ---


def spooled_events(spool: Path | None) -> Iterator[dict[str, Any]]:
    """Yield each good line of each file that is not set aside."""
    for path in [] if spool is None else sorted(spool.rglob("*")):
        is_file = path.suffix in (".batch", ".journal") and path.is_file()
        if not is_file or path.is_symlink() or "damaged" in path.parts:
            continue
        for line in path.read_bytes().split(b"\n"):
            checksum, _, text = line.partition(b" ")
            if checksum == b"%08x" % zlib.crc32(text) and text:
                yield json.loads(text)


def _problems_of_modes(spool: Path) -> Iterator[str]:
    for path in sorted(spool.rglob("*")):
        mode = path.lstat().st_mode & 0o777
        if path.is_dir() and mode != 0o700:
            yield f"a folder of mode {mode:o}"
        if path.is_file() and not path.is_symlink() and mode != 0o600:
            yield f"a file {path.name} of mode {mode:o}"


# --- the verdict ---


def run(row: Row, folder: Path, nursery: Nursery | None, *, has_spool: bool) -> Outcome:
    """Run a row, and judge it; with a nursery, small and by forked processes."""
    if nursery is not None:
        row = replace(row, program={**row.program, **row.small})
    outcome = _run(row, folder, nursery, has_spool=has_spool)
    if outcome.is_slow:  # a pause of the machine does not come twice, a slow way does
        again = folder / "again"
        again.mkdir()
        outcome = _run(row, again, nursery, has_spool=has_spool)
        if outcome.is_slow:
            worst = outcome.worst_own_seconds * 1e3
            outcome.problems.append(f"emit took {worst:.1f} ms of the processor")
    return outcome


def _run(
    row: Row, folder: Path, nursery: Nursery | None, *, has_spool: bool
) -> Outcome:
    began = time.monotonic()
    ends = row.spooled if has_spool else row.plain
    assert ends is not None
    with World(row, folder, nursery, has_spool=has_spool) as world:
        case = Case(world, ends)
        try:
            case.run()
            words = ends.words
        except Exception as error:
            words = ""
            case.problems.append(f"{type(error).__name__}: {error}")
    outcome = case.outcome(words)
    outcome.took = time.monotonic() - began
    return outcome


class Case:
    """Be a row in a world of its own."""

    def __init__(self, world: World, ends: Ends) -> None:
        self.world = world
        self.row = world.row
        self.ends = ends
        self.problems: list[str] = []
        self.processes: list[Process] = []
        self.left: list[dict[str, Any]] = []
        self.names_left: set[str] = set()
        self.duplicates = 0

    def say(self, problem: str) -> None:
        """Note a problem, unless there are many already."""
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)

    def run(self) -> None:
        """Run the processes, one after the other, then judge."""
        row, world = self.row, self.world
        given = {
            "awaits_failure": row.has_failed,
            "does_wait": row.heal is not None,
            **row.program,
        }
        first = Process(world, "a", given)
        self.processes.append(first)
        if row.heal is not None:
            first.wait_until_emitted()
            row.heal(world)
            first.go_on()
        status = first.end()
        if first.was_killed:
            self.say(f"the process did not end; stderr: {first.stderr[-300:]!r}")
        if status != row.status:
            self.say(f"status {status} instead of {row.status}: {first.stderr[-500:]}")
        if not re.fullmatch(row.stderr, first.stderr, re.DOTALL):
            self.say(f"on standard error: {first.stderr[-1000:]!r}")
        self.left = list(spooled_events(world.spool))
        self.names_left = {event["event.name"] for event in self.left}
        if world.spool is not None and world.spool.exists():
            self.problems += _problems_of_modes(world.spool)
        if self.ends.by_next:
            self._run_next()
        self._judge()

    def _run_next(self) -> None:
        """Let the next process deliver what was left."""
        if self.row.damage is not None:
            self.row.damage(self.world)
        self.world.be_well()
        wanted = {f"b-{number}" for number in range(5)}
        if self.ends.delivered:
            wanted |= {e["event.name"] for e in spooled_events(self.world.spool)}
        given = {"count": 5, "does_wait": True, **self.row.next_program}
        following = Process(self.world, "b", given)
        self.processes.append(following)
        following.wait_until_emitted()
        deadline = time.monotonic() + self.row.seconds / 2
        while wanted - self._arrived() and time.monotonic() < deadline:
            self.world.server.wait_for(len(self.world.server.events) + 1, 0.1)
        following.go_on()
        status = following.end()
        if status or following.stderr:
            self.say(f"the next process: {status}, {following.stderr[-500:]!r}")

    def _arrived(self) -> set[str]:
        return {event["event.name"] for event in self.world.server.events}

    def _judge(self) -> None:
        marks = {k: v for p in self.processes for k, v in p.marks.items()}
        reports = {k: v for p in self.processes for k, v in p.reports.items()}
        taken = {
            f"{name}-{number}"
            for name, calls in marks.items()
            for number, mark in enumerate(calls)
            if mark == _TAKEN
        }
        called = {
            f"{name}-{number}"
            for name, calls in marks.items()
            for number, mark in enumerate(calls)
            if mark == _CALLED
        }
        for report in reports.values():
            for kind, place in report["notes"].get("raised", {}).items():
                if kind not in self.row.may_raise:
                    self.say(f"emit raised {kind} at {place}")
        self._judge_content(taken | called)
        self._judge_words(reports)
        for name, report in reports.items():
            self._judge_ledger(name, report, marks[name])
        self._judge_ends(taken, called, marks, reports)

    def _judge_content(self, known: set[str]) -> None:
        """Hold what arrived, and what is in files, against what was emitted."""
        ids: dict[str, str] = {}
        for event in [*self.world.server.events, *self.left]:
            name, event_id = event["event.name"], event["event_id"]
            if name not in known:
                self.say(f"{name} was never taken")
            if ids.setdefault(name, event_id) != event_id:
                self.say(f"{name} has two ids")
            self._judge_event(event, name, event_id)
        if len(set(ids.values())) != len(ids):
            self.say("events share an id")
        for request in self.world.server.requests:
            if request.headers.get("x-pg-api-key") != API_KEY:
                self.say("a request without its key")
        if any(server.requests for server in self.world.elsewhere):
            self.say("a request went elsewhere")

    def _judge_event(self, event: dict[str, Any], name: str, event_id: str) -> None:
        number = name.rpartition("-")[2]
        if int(number) % 2 and event_id != f"evt-{name}":
            self.say(f"{name} has the id {event_id}")
        metadata = event["metadata"]
        told = metadata.get("number"), metadata.get("text")
        # Of what is too large for one event, the large values are cut, and so told.
        is_cut = "..." in metadata
        if told != (int(number), f"canary-text-{number}") and not is_cut:
            self.say(f"{name} has another content: {told}")
        if "canary-password" in json.dumps(event):
            self.say(f"{name} was not redacted")

    def _judge_words(self, reports: Mapping[str, dict[str, Any]]) -> None:
        """Look for payload, keys and repetitions in what was said."""
        said = [process.stderr for process in self.processes]
        for name, report in reports.items():
            lines = report["lines"]
            said += lines
            kinds = Counter(
                line if "internal error" in line else " ".join(line.split()[:5])
                for line in lines
            )
            for kind, count in kinds.items():
                # Two causes begin alike: to be sent again, and held.
                if count > (2 if "could not deliver" in kind else 1):
                    self.say(f"{name} said {kind!r} {count} times: {lines}")
        said += [str(report["stats"]["last_error"]) for report in reports.values()]
        if "canary" in "".join(said).replace("canary: the hook fails", ""):
            self.say(f"a payload or key was said: {said}")
        for path in self.world.folder.rglob("spool/**/*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                if b"canary-password" in data or API_KEY.encode() in data:
                    self.say(f"a secret in {path.name}")

    def _judge_ledger(self, name: str, report: dict[str, Any], calls: bytes) -> None:
        stats = report["stats"]
        emitted = report["calls"]  # there may be more, in an interpreter that ends
        if stats["emitted"] not in (emitted, emitted - calls.count(_RAISED)):
            self.say(f"{name}: {emitted} calls, {stats['emitted']} counted")
        if not stats["is_balanced"]:
            self.say(f"{name} is not balanced: {stats}")
        is_early = self.row.reports_early or "shutdown" in self.ends.dropped
        if stats["pending"] and not is_early:
            self.say(f"{name} has left some pending: {stats}")
        if "internal_error" in stats["dropped"] and "internal_error" not in (
            self.ends.dropped
        ):
            self.say(f"{name} has internal errors: {report['lines']}")
        process = next(p for p in self.processes if p.name[0] == name[0])
        bound = process.plan["options"]["exit_timeout"]
        if report["ending_seconds"] > bound + _SLACK:
            self.say(f"{name} took {report['ending_seconds']:.1f} s to end")
        if report["notes"].get("child"):
            self.say(f"{name} had a child that failed")

    def _judge_ends(
        self,
        taken: set[str],
        called: set[str],
        marks: Mapping[str, bytes],
        reports: Mapping[str, dict[str, Any]],
    ) -> None:
        arrivals = Counter(event["event.name"] for event in self.world.server.events)
        self.duplicates = arrivals.total() - len(arrivals)
        first = {name for name in taken if name.startswith("a")}
        at_rest = {e["event.name"] for e in spooled_events(self.world.spool)}
        still = at_rest - set(arrivals)
        ends = self.ends
        stats = [report["stats"] for report in reports.values()]
        dropped = sum((Counter(each["dropped"]) for each in stats), Counter())
        # A finalizer may emit when all is reported.
        dropped["closed"] += sum(
            calls.count(_REFUSED) - reports[name]["refused"]
            for name, calls in marks.items()
            if name in reports
        )
        if "shutdown" in ends.dropped:
            # A thread that hangs in what cannot be cut keeps its own until the end.
            dropped["shutdown"] += sum(each["pending"] for each in stats)
        rejected = sum((Counter(each["rejected"]) for each in stats), Counter())
        total = len(first | {n for n in called if n.startswith("a")}) or 1
        refused = sum(
            calls.count(_REFUSED) + calls.count(_RAISED) for calls in marks.values()
        )

        missing = taken - set(arrivals) - still
        after = dropped.total() - refused + rejected.total()
        self._compare("lost", ends.lost, max(len(missing) - after, 0), total)
        if after > len(missing) and not ends.duplicates:
            self.say(f"{after} were given up, but only {len(missing)} are missing")
        self._compare("delivered", ends.delivered, len(first & set(arrivals)), total)
        self._compare("duplicates", ends.duplicates, self.duplicates, total)
        for kind, expected, counts in (
            ("dropped", ends.dropped, dropped),
            ("rejected", ends.rejected, rejected),
        ):
            for reason in expected.keys() | counts.keys():
                count = expected.get(reason, 0)
                self._compare(f"{kind} {reason}", count, counts[reason], total)
        self._judge_spool(first, at_rest, reports, total)
        if self.row.has_spool_errors and not any(
            each["spool_errors"] for each in stats
        ):
            self.say("the disk has not failed")
        if self.row.has_failed and not any(
            each["retries"] or each["last_error"] for each in stats
        ):
            self.say("no attempt has failed")

    def _judge_spool(
        self,
        first: set[str],
        at_rest: set[str],
        reports: Mapping[str, dict[str, Any]],
        total: int,
    ) -> None:
        if self.world.spool is None:
            return
        is_complete = set(reports) >= set(self.processes[0].marks)
        mine = [r["stats"] for name, r in reports.items() if name[0] == "a"]
        # What one has recovered, another one has spooled before.
        spooled = sum(each["spooled"] - each["recovered"] for each in mine)
        if is_complete and not self.ends.lost and spooled != len(self.left):
            self.say(f"{spooled} counted as spooled, {len(self.left)} are in files")
        by_next = len(first & self.names_left)
        self._compare("left to the next process", self.ends.by_next, by_next, total)
        if at_rest and self.ends.by_next == ALL and self.ends.delivered == ALL:
            self.say(f"{len(at_rest)} are still in files at the end")
        if is_complete and "b" in reports and self.row.damage is None:
            recovered = reports["b"]["stats"]["recovered"]
            if recovered != len(self.left):
                self.say(f"{recovered} recovered of {len(self.left)}")

    def _compare(self, what: str, expected: int | str, count: int, total: int) -> None:
        is_right = {
            ALL: count == total,
            SOME: count > 0,
            ANY: True,
        }.get(expected, count == expected)
        if not is_right:
            self.say(f"{what}: {count} of {total} instead of {expected}")

    def outcome(self, words: str) -> Outcome:
        """Return what is to be told of the row."""
        reports = [r for p in self.processes for r in p.reports.values()]
        worst_own = max((r["worst_own_seconds"] for r in reports), default=0.0)
        return Outcome(
            row=self.row.name,
            has_spool=self.world.spool is not None,
            problems=self.problems,
            words=words,
            duplicates=self.duplicates,
            worst_seconds=max((r["worst_seconds"] for r in reports), default=0.0),
            worst_cpu_seconds=max(
                (r["worst_cpu_seconds"] for r in reports), default=0.0
            ),
            worst_own_seconds=worst_own,
            is_slow=worst_own > self.row.may_call,
        )
