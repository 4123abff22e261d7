"""SIGKILL at random moments: what `emit` took is on disk, and others send it."""

from __future__ import annotations

import pytest

from end_to_end.herd import SCALE, drive, now_and_then, owners_in, recover, told_in
from harness import Counting, Server

KILLS = 300 * SCALE


@pytest.mark.timeout(60 + 60 * SCALE)
def test_kills(tmp_path):
    """Whatever emit took in hundreds of processes that were killed arrives."""
    core, spool = Counting(), tmp_path / "spool"
    with Server(core) as server:
        plan = {
            "folder": str(tmp_path),
            "lives": KILLS,
            "forks": 0.1,
            "options": {
                "project_id": "p",
                "endpoint": server.url,
                "spool_dir": str(spool),
                "spool_each_event": True,
                "compression": "none",
            },
        }
        with now_and_then(server.shut, server.open):
            result = drive(plan, timeout=30 + 60 * SCALE)
        recover(plan, spool)
        told = told_in(tmp_path)
        counts = (len(told.taken), result, core.total)

        assert {"kill -9": KILLS} == result["statuses"]
        assert result["are_all_gone"]
        assert len(told.taken) > KILLS, "they were killed too soon for anything"
        assert [] == sorted(told.taken - core.ids.keys()), counts
        assert [] == core.strangers
        assert [] == told.bogus(core.ids)
        assert [] == owners_in(spool)
