"""
Run the fault table, and write it into docs/delivery.md.

    python tests/end_to_end/faults/table.py                          the whole table
    python tests/end_to_end/faults/table.py --only NAME --spool yes  one row, one way

Rows that were run both ways, at full size, and ended as expected are written into the
page; the others stay there as they were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

TESTS = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(TESTS)  # instead of this folder

from end_to_end.faults.rows import GROUPS, ROWS  # noqa: E402
from end_to_end.faults.world import Nursery, Outcome, Row, run  # noqa: E402
from harness import heed_signals  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAGE = TESTS.parent / "docs" / "delivery.md"
_NONE = "\N{EN DASH}"
HEAD = ["fault", "without a spool", "with a spool", "caller's worst wait, ms"]
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def run_all(
    names: Sequence[str], modes: Sequence[bool], jobs: int, *, is_whole: bool
) -> Iterator[Outcome]:
    """Run rows side by side; yield what became of them, as they end."""
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        ThreadPoolExecutor(jobs) as pool,
        nullcontext() if is_whole else Nursery(Path(folder)) as nursery,
    ):
        futures = []
        for name in names:
            for has_spool in modes:
                row = ROWS[name]
                if (row.spooled if has_spool else row.plain) is None:
                    continue
                place = Path(folder) / f"{name}-{has_spool}"
                place.mkdir()
                futures.append(
                    pool.submit(run, row, place, nursery, has_spool=has_spool)
                )
        for future in as_completed(futures):
            yield future.result()


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), metavar="NAME")
    parser.add_argument("--spool", choices=["yes", "no"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="rows as in the tests")
    parser.add_argument("--json", action="store_true", help="a line for each outcome")
    arguments = parser.parse_args()
    heed_signals()
    modes = {"yes": [True], "no": [False], None: [False, True]}[arguments.spool]
    names = arguments.only or list(ROWS)
    outcomes = []
    for outcome in run_all(names, modes, arguments.jobs, is_whole=not arguments.small):
        outcomes.append(outcome)
        if arguments.json:
            _say(json.dumps(dataclasses.asdict(outcome)))
        else:
            _show(outcome)
    if not (arguments.spool or arguments.small):
        write(outcomes)
    return int(any(outcome.problems for outcome in outcomes))


def _show(outcome: Outcome) -> None:
    spool = "spool" if outcome.has_spool else "plain"
    waits = f"{_waits([outcome]):>14} ms"
    _say(f"{outcome.row:22} {spool} {outcome.took:5.1f} s {waits}  {outcome.words}")
    for problem in outcome.problems:
        _say(f"    {problem}")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  for people


# --- the page ---


def cells(row: Row) -> list[str]:
    """Return what the suite expects of a row, as the page says it."""
    return [
        row.fault,
        _NONE if row.plain is None else row.plain.words,
        _NONE if row.spooled is None else row.spooled.words,
    ]


def _waits(outcomes: Sequence[Outcome]) -> str:
    """Return the worst processor and elapsed time of a call, in milliseconds."""
    cpu = max((outcome.worst_cpu_seconds for outcome in outcomes), default=0.0)
    elapsed = max((outcome.worst_seconds for outcome in outcomes), default=0.0)
    return f"{cpu * 1e3:.1f} / {elapsed * 1e3:.0f}" if elapsed else _NONE


def write(outcomes: Sequence[Outcome]) -> None:
    """Write what went well into the table on the page."""
    bad = {outcome.row for outcome in outcomes if outcome.problems}
    before = {row[0]: row for row in _rows_on_page()}
    lines = [BEGIN]
    for group, rows in GROUPS.items():
        lines += ["", f"### {group}", ""]
        lines += [f"| {' | '.join(HEAD)} |", "| --- | --- | --- | ---: |"]
        for row in rows:
            mine = [outcome for outcome in outcomes if outcome.row == row.name]
            shown = before.get(row.fault)
            if mine and row.name not in bad:
                shown = [*cells(row), _waits(mine)]
            if shown is not None:
                lines.append(f"| {' | '.join(shown)} |")
    text = PAGE.read_text("utf-8")
    table = "\n".join([*lines, "", END])
    page = f"{text.partition(BEGIN)[0]}{table}{text.partition(END)[2]}"
    PAGE.write_text(page, "utf-8")


def read() -> list[list[str]]:
    """Return the cells of the rows on the page, but for the waits."""
    return [row[:3] for row in _rows_on_page()]


def _rows_on_page() -> list[list[str]]:
    table = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if row[0] not in (HEAD[0], "---")]


if __name__ == "__main__":
    sys.exit(main())
