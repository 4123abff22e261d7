"""Each row of the fault table, and that the page tells of each what is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from end_to_end.faults import table
from end_to_end.faults.rows import ROWS
from end_to_end.faults.world import ALL, Ends, Nursery, World, run, spooled_events

if TYPE_CHECKING:
    from harness import Exchange, Reply

CASES = [
    (row.name, has_spool)
    for row in ROWS.values()
    for has_spool, ends in ((False, row.plain), (True, row.spooled))
    if ends is not None
    # Without a spool by `nox -s faults` and `soak` alone, but where there is none.
    and (has_spool or row.spooled is None or "PGTRACK_SOAK" in os.environ)
]


Tamper = Callable[[list[dict[str, Any]]], object]


def changed(event: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return an event with some of its metadata changed."""
    return {**event, "metadata": {**event["metadata"], **changes}}


@pytest.fixture(name="outcomes", scope="module")
def _outcomes(request) -> dict[tuple[str, bool], Any]:
    """Run the rows that are asked for, side by side, in a process of their own."""
    items = [i for i in request.session.items if i.path == request.path]
    cases = [i.callspec.params for i in items if i.originalname == "test_row"]
    names = sorted({case["name"] for case in cases})
    spools = {case["has_spool"] for case in cases}
    command = [sys.executable, str(Path(table.__file__)), "--json", "--small"]
    command += ["--jobs", "6", "--only", *names]
    if len(spools) == 1:
        command += ["--spool", "yes" if spools == {True} else "no"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=400, check=False
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(outcome["row"], outcome["has_spool"]): outcome for outcome in outcomes}
    assert found, done.stderr
    return found


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("name", "has_spool"),
    CASES,
    ids=[f"{name}-{'spool' if has_spool else 'plain'}" for name, has_spool in CASES],
)
def test_row(outcomes, name, has_spool):
    """Each event ends where the row says, and nobody but the ledger hears of it."""
    problems = outcomes[name, has_spool]["problems"]

    assert [] == problems


@pytest.fixture(name="nursery", scope="module")
def _nursery(tmp_path_factory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(name="problems_of")
def _problems_of(nursery, tmp_path) -> Callable[..., str]:
    def problems_of(tamper: Tamper, **changes: Any) -> str:
        """Return what is said of a row whose server tampers with what it stores."""

        def step(exchange: Exchange) -> Reply | None:
            reply = exchange.answer()
            tamper(exchange.server.core.events)
            return reply

        def world(world: World) -> None:
            world.server.default = step

        row = replace(ROWS["healthy-few"], world=world, **changes)
        return "\n".join(run(row, tmp_path, nursery, has_spool=False).problems)

    return problems_of


class TestJudge:
    """What is wrong is seen to be."""

    def test_nothing(self, problems_of):
        """Where nothing is wrong, nothing is said."""
        assert "" == problems_of(len)

    @pytest.mark.parametrize(
        ("tamper", "problem"),
        [
            (list.pop, "lost: 1 of 30"),
            (lambda events: events.append(events[0]), "duplicates: 1 of 30"),
            (
                lambda events: events.append({**events[0], "event_id": "other"}),
                "a-0 has two ids",
            ),
            (
                lambda events: events.insert(1, {**events.pop(1), "event_id": "other"}),
                "a-1 has the id other",
            ),
            (
                lambda events: events.append({**events[0], "event.name": "a-31"}),
                "a-31 was never taken",
            ),
            (
                lambda events: events.append(changed(events.pop(), text="other")),
                "a-29 has another content",
            ),
            (
                lambda events: events.append(
                    changed(events.pop(), more="canary-password")
                ),
                "a-29 was not redacted",
            ),
        ],
    )
    def test_events(self, problems_of, tamper, problem):
        """Events that are missing, doubled, changed or invented are noticed."""
        assert problem in problems_of(tamper)

    def test_process(self, problems_of):
        """So are another status, what is printed, and an attempt that did not fail."""
        found = problems_of(len, program={"ending": "fail"}, has_failed=True)

        assert "status 1 instead of 0" in found
        assert "on standard error" in found
        assert "no attempt has failed" in found

    def test_waits(self, problems_of):
        """So is a call that takes longer than it may."""
        assert "emit took" in problems_of(len, may_call=1e-9)

    def test_ends(self, problems_of):
        """So are events that do not end where they should."""
        ends = Ends(delivered=0, dropped={"shutdown": ALL}, rejected={"no": 1})

        found = problems_of(len, plain=ends)

        assert "delivered: 30 of 30 instead of 0" in found
        assert "dropped shutdown: 0 of 30 instead of all" in found
        assert "rejected no: 0 of 30 instead of 1" in found


class TestSpooledEvents:
    """Files are read by hand."""

    def test_lines(self, tmp_path):
        """Good lines of files and journals count; others, and damaged files, do not."""
        good, bad = b'{"a":1}', b'{"a":2}'
        line = b"%08x %s\n" % (zlib.crc32(good), good)
        for name in ("x/1.batch", "x/1.journal", "x/damaged/1.batch", "x/notes"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(line + b"%08x %s\n" % (zlib.crc32(good), bad) + line[:9])

        assert [{"a": 1}] * 2 == list(spooled_events(tmp_path))


def test_page():
    """The page has each row, in order, and says what is expected of it."""
    assert [table.cells(row) for row in ROWS.values()] == table.read()
