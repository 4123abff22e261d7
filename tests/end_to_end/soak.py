"""
Everything at random for minutes: load, faults, and how processes end.

    python tests/end_to_end/soak.py --minutes 5

Three herds of processes emit at one server, each herd over a spool of its own, in
rounds of some seconds with other settings each. Meanwhile the server fails in all kinds
of ways that must cost nothing. In the end it recovers, and so does what was left on
disk. Then what the processes told, what their ledgers say and what the server holds is
compared:

- `killed`: each event is on disk before `emit` returns; processes end in any way.
- `ordered`: they end by signals and of themselves.
- `counted`: they do so too, and all write down their ledgers, which add up exactly.

It prints a table, and exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # instead of this folder

from end_to_end.herd import drive, owners_in, recover, told_in  # noqa: E402
from harness import (  # noqa: E402
    Counting,
    Server,
    cut,
    drip,
    drop,
    garbage,
    hang,
    hang_up,
    leave,
    redirect,
    reset,
    sip,
    status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

ROUND = 15.0
"""Seconds in which a herd has the same settings."""

KINDS: dict[str, dict[str, Any]] = {
    "killed": {
        "options": {"spool_each_event": True},
        "ends": {"kill": 4, "term": 1, "handled": 1, "exit": 1},
    },
    "ordered": {"ends": {"term": 2, "handled": 1, "exit": 1}},
    "counted": {"ends": {"handled": 1, "exit": 1}, "has_ledgers": True},
}


class Arrivals(Counting):
    """Counts what comes by the herd that it comes from, too."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: collections.Counter[str] = collections.Counter()

    def _count(self, event: dict[str, Any]) -> None:
        self.arrived[event["event.name"].partition(".")[0]] += 1
        super()._count(event)


class Weather:
    """Makes the server fail, now in this way, now in that."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.seen: collections.Counter[str] = collections.Counter()
        self._is_over = threading.Event()
        self._release = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)
        self._heal()

    def _run(self) -> None:
        faults = self._faults()
        while not self._is_over.wait(self.random.uniform(0.05, 2.0)):
            name = self.random.choice([*faults])
            self.seen[name] += 1
            faults[name]()
            self._is_over.wait(self.random.uniform(0.05, 2.0))
            self._heal()

    def _heal(self) -> None:
        server = self.server
        server.default = server.welcome = None
        self._release.set()
        server.open()

    def _faults(self) -> dict[str, Callable[[], object]]:
        server = self.server
        later = {"Retry-After": "1"}
        steps = {
            "503": status(503),
            "429 with Retry-After": status(429, later),
            "500 once stored": status(500, then_store=True),
            "401": status(401),
            "404": status(404),
            "redirect": redirect("http://127.0.0.1:9/"),
            "drop": drop(),
            "reset": reset(),
            "leave": leave(),
            "cut in the status": cut(5),
            "cut in the header": cut(30),
            "drip": drip(0.002),
            "garbage": garbage(b"\x00\xff no HTTP\r\n\r\n"),
        }

        def step(name: str) -> Callable[[], object]:
            return lambda: setattr(server, "default", steps[name])

        def silence() -> None:
            self._release = threading.Event()
            server.default = hang(self._release)

        def jam() -> None:
            server.shut()
            server.jam()

        return {
            **{name: step(name) for name in steps},
            "silence": silence,
            "refused": server.shut,
            "jammed": jam,
            "hangs up": lambda: setattr(server, "welcome", hang_up()),
            "sips": lambda: setattr(server, "welcome", sip(0.001, 1000)),
        }


class Flock:
    """One herd after the other, over one spool."""

    def __init__(self, kind: str, folder: Path, url: str, seed: int) -> None:
        self.kind = kind
        self.folder = folder
        self.folder.mkdir()
        self.spool = folder / "spool"
        self.random = random.Random(f"{seed} {kind}")
        self.statuses: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        options = {
            "project_id": kind,
            "endpoint": url,
            "spool_dir": str(self.spool),
            "timeout": 1.0,
            **KINDS[kind].get("options", {}),
        }
        self.plan = {**KINDS[kind], "folder": str(folder), "options": options}

    def run(self, until: float) -> None:
        """Run a herd after the other, until it is late."""
        number = 0
        while (left := until - time.monotonic()) > 0:
            seconds = min(left, ROUND)
            name = f"{self.kind}.{number}."
            result = drive(
                {**self._settings(), "name": name, "seconds": seconds},
                timeout=seconds + 120,
            )
            self.statuses.update(result["statuses"])
            if not result["are_all_gone"]:
                self.problems.append("some processes did not end")
            number += 1

    def _settings(self) -> dict[str, Any]:
        """Return the plan of a round."""
        rng = self.random
        options = {
            **self.plan["options"],
            "batch_interval": rng.choice([0.05, 0.5, 5.0]),
            "max_queue_size": rng.choice([200, 10_000]),
            "compression": rng.choice(["none", "auto"]),
            "replay_rate": rng.choice([200.0, 2000.0, None]),
        }
        return {
            **self.plan,
            "options": options,
            "seed": rng.random(),
            "at_once": rng.randint(1, 6),
            "life": rng.choice([(0.005, 0.2), (0.05, 1.5), (1.0, 8.0)]),
            "threads": rng.randint(1, 4),
            "burst": rng.choice([5, 20, 200]),
            "pause": rng.choice([0.1, 0.5]),
            "forks": rng.choice([0.0, 0.1]),
            "does_stop": self.kind != "killed" or rng.random() < 0.5,
        }

    def recover(self) -> None:
        """Have everything sent that is left on disk."""
        recover({**self.plan, "name": f"{self.kind}.last"}, self.spool)

    def judge(self, core: Arrivals) -> dict[str, Any]:
        """Compare, and return a row of the table."""
        told = told_in(self.folder)
        mine = {n for n in core.ids if n.startswith(f"{self.kind}.")}
        ledgers = [json.loads(p.read_text()) for p in self.folder.glob("*.ledger")]
        sums = _sum(ledgers)
        row = {
            "processes": sum(self.statuses.values()),
            "emit took": len(told.taken),
            "emit refused": len(told.refused),
            "at the server": len(mine),
            "came twice or more": sum(n in mine for n in core.duplicates),
            "missing": len(told.taken - mine),
            "under another id": sum(n in mine for n in core.strangers),
            "never emitted": len(told.bogus(mine)),
            "folders left": len(owners_in(self.spool)),
            "files set aside": sum(1 for _ in self.spool.glob("*/damaged/*")),
            "ledgers": len(ledgers),
            "unbalanced": sum(not ledger["is_balanced"] for ledger in ledgers),
            **{f"sum of {name}": count for name, count in sorted(sums.items())},
        }
        self.problems += self._problems(row, sums, core)
        return row

    def _problems(
        self, row: dict[str, Any], sums: dict[str, int], core: Arrivals
    ) -> Iterator[str]:
        nothing = ("missing", "under another id", "never emitted", "folders left")
        for name in (*nothing, "files set aside", "unbalanced"):
            if row[name]:
                yield f"{row[name]} {name}"
        if row["missing"]:
            some = sorted(told_in(self.folder).taken - core.ids.keys())[:10]
            yield f"such as {', '.join(some)}"
        wrong = {s for s in self.statuses if s not in _STATUSES}
        if wrong:
            yield f"ends: {sorted(wrong)}"
        if KINDS[self.kind].get("has_ledgers"):
            yield from self._problems_of_sums(row, sums, core)

    def _problems_of_sums(
        self, row: dict[str, Any], sums: dict[str, int], core: Arrivals
    ) -> Iterator[str]:
        if bad := sorted(set(sums) & _BAD):
            yield f"dropped: {bad}"
        dropped = sum(n for name, n in sums.items() if name.startswith("dropped"))
        went_on = sums["emitted"] - dropped
        if went_on != row["at the server"]:
            yield "what was emitted and not dropped is not what the server holds"
        if sums["recovered"] != sums["spooled"]:
            yield "what was left on disk is not what was recovered"
        if went_on != sums["delivered"]:
            yield "what was delivered is not what was emitted and not dropped"
        if sums["delivered"] > core.arrived[self.kind]:
            yield "more was delivered than has arrived"


_STATUSES = {"kill -9", "term -15", "handled 0", "exit 0", "handled -15", "exit -10"}
"""How a process may end; the last two before it had begun."""

_BAD = {f"dropped: {reason}" for reason in ("internal_error", "spool_damaged")}


def _sum(ledgers: list[dict[str, Any]]) -> dict[str, int]:
    sums: collections.Counter[str] = collections.Counter()
    for ledger in ledgers:
        for name in ("emitted", "recovered", "delivered", "spooled", "pending"):
            sums[name] += ledger[name]
        sums["retries"] += ledger["retries"]
        sums["spool_errors"] += ledger["spool_errors"]
        for kind in ("dropped", "rejected"):
            for reason, count in ledger[kind].items():
                sums[f"{kind}: {reason}"] += count
    return dict(sums)


def _say(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _print(rows: dict[str, dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, names))
    _say(" " * width + "".join(f"{kind:>12}" for kind in rows))
    for name in names:
        cells = (f"{row.get(name, 0):>12,}" for row in rows.values())
        _say(f"{name:<{width}}{''.join(cells)}")


def run(minutes: float, seed: int, folder: Path) -> list[str]:
    """Run everything, print the table, and return what is wrong."""
    core = Arrivals()
    began = time.monotonic()
    with Server(core) as server:
        flocks = [Flock(kind, folder / kind, server.url, seed) for kind in KINDS]
        with Weather(server, seed) as weather, ThreadPoolExecutor() as executor:
            until = began + minutes * 60
            for done in [executor.submit(f.run, until) for f in flocks]:
                done.result()
        for flock in flocks:
            flock.recover()
    rows = {flock.kind: flock.judge(core) for flock in flocks}
    _print(rows)
    _say()
    _say("faults: " + ", ".join(f"{n} x {name}" for name, n in weather.seen.items()))
    problems = [f"{flock.kind}: {p}" for flock in flocks for p in flock.problems]
    took = time.monotonic() - began
    _say(f"{took:.0f} s, seed {seed}: {'; '.join(problems) or 'all is well'}")
    return problems


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    _say(f"{arguments.minutes:g} minutes, seed {arguments.seed}")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return bool(run(arguments.minutes, arguments.seed, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
