"""Eight processes over one spool, ended and started again at random."""

from __future__ import annotations

import pytest

from end_to_end.herd import SCALE, drive, now_and_then, owners_in, recover, told_in
from harness import Counting, Server, status

KILLING_SECONDS = 10 * SCALE
ORDERLY_SECONDS = 6 * SCALE

# Of which the last two come of signals before they are listened to.
IN_ORDER = {"term -15", "handled 0", "exit 0", "handled -15", "exit -10"}


@pytest.fixture(name="core")
def _core():
    return Counting()


@pytest.fixture(name="server")
def _server(core):
    with Server(core) as server:
        yield server


@pytest.fixture(name="plan")
def _plan(tmp_path, server):
    return {
        "folder": str(tmp_path),
        "at_once": 8,
        "life": (0.05, 1.5),
        "threads": 2,
        "burst": 20,
        "pause": 0.2,
        "options": {
            "project_id": "p",
            "endpoint": server.url,
            "spool_dir": str(tmp_path / "spool"),
            "batch_interval": 0.2,
            "compression": "none",
        },
    }


@pytest.mark.timeout(60 + 60 * SCALE)
def test_killed(tmp_path, core, server, plan):
    """Killed, with each event on disk: all arrive, if twice with the same id."""
    options = {**plan["options"], "spool_each_event": True}
    seconds = KILLING_SECONDS
    plan = {**plan, "options": options, "seconds": seconds, "forks": 0.05}

    with now_and_then(server.shut, server.open, most=1.0):
        result = drive(plan, timeout=seconds + 120)
    recover(plan, tmp_path / "spool")
    told = told_in(tmp_path)

    assert {"kill -9"} == result["statuses"].keys()
    assert result["are_all_gone"]
    assert len(told.taken) > 100 * seconds
    assert [] == sorted(told.taken - core.ids.keys())
    assert [] == core.strangers
    assert [] == told.bogus(core.ids)
    assert [] == owners_in(tmp_path / "spool")


@pytest.mark.timeout(60 + 60 * SCALE)
def test_ended_in_order(tmp_path, core, server, plan):
    """Ended by signals and of themselves: all arrive, and none of them twice."""

    def fail() -> None:
        server.default = status(503)

    def heal() -> None:
        server.default = None

    options = {**plan["options"], "exit_timeout": 30.0}
    ends = {"term": 1, "handled": 1, "exit": 1}
    seconds = ORDERLY_SECONDS
    plan = {**plan, "options": options, "seconds": seconds, "ends": ends}

    with now_and_then(fail, heal, most=1.0):
        result = drive(plan, timeout=seconds + 120)
    recover(plan, tmp_path / "spool")
    told = told_in(tmp_path)

    assert result["statuses"].keys() <= IN_ORDER
    assert result["are_all_gone"]
    assert len(told.taken) > 100 * seconds
    assert [] == sorted(told.taken - core.ids.keys())
    assert {} == core.duplicates
    assert [] == core.strangers
    assert [] == told.bogus(core.ids)
    assert [] == owners_in(tmp_path / "spool")
