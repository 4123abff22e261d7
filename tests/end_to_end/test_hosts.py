"""Hosts that change what the rest of the process stands on: gevent, clocks."""

from __future__ import annotations

import importlib.util
import signal
import time
from collections import Counter
from datetime import datetime, timedelta, timezone

import freezegun
import pytest

import pgtrack
from harness import run_script, status


@pytest.mark.skipif(
    importlib.util.find_spec("gevent") is None, reason="gevent is not installed"
)
@pytest.mark.parametrize("ending", ["assert pgtrack.flush(20)", ""])
@pytest.mark.parametrize("is_first", [True, False])
def test_gevent(server, ending, is_first):
    """Under gevent, patched before or after our import, all events arrive."""
    patch = "from gevent import monkey; monkey.patch_all()"
    script = f"""
    {patch if is_first else ""}
    import sys
    import pgtrack
    {"" if is_first else patch}
    import gevent
    pgtrack.configure(project_id="p", endpoint=sys.argv[1])
    def work(i):
        with pgtrack.session(f"session-{{i}}"):
            for j in range(100):
                assert pgtrack.emit("custom", name=f"{{i}} {{j}}")
                if j % 10 == 0:
                    gevent.sleep(0)
    gevent.joinall([gevent.spawn(work, i) for i in range(10)], raise_error=True)
    {ending}
    """

    ended = run_script(script, server.url)

    assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    expected = {(f"session-{i}", f"{i} {j}") for i in range(10) for j in range(100)}
    seen = [(e["session.id"], e["event.name"]) for e in server.events]
    assert Counter(expected) == Counter(seen)


@pytest.mark.skipif(
    importlib.util.find_spec("gevent") is None, reason="gevent is not installed"
)
def test_gevent_sigterm(server):
    """SIGTERM that finds nothing running but gevent's hub costs no event."""
    script = """
    from gevent import monkey; monkey.patch_all()
    import os, signal, sys
    import gevent, pgtrack
    pgtrack.configure(project_id="p", endpoint=sys.argv[1], batch_interval=600)
    pgtrack.emit("custom", name="n")
    gevent.get_hub().threadpool.spawn(os.kill, os.getpid(), signal.SIGTERM)
    gevent.sleep(20)
    """

    ended = run_script(script, server.url)

    assert (-signal.SIGTERM, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    assert ["n"] == [event["event.name"] for event in server.events]


class TestClocks:
    """The wall clock is not what it was."""

    def test_frozen(self, server):
        """While freezegun stops time events bear its stamps, and are delivered."""
        with freezegun.freeze_time("2001-02-03 04:05:06.789"):
            client = pgtrack.configure(
                project_id="p", endpoint=server.url, batch_interval=0.05
            )
            client.emit("custom")

            assert server.wait_for(1)
            assert client.flush(10)
            client.emit("custom")
            assert client.close(10)

        stamps = [event["event.timestamp"] for event in server.events]
        assert ["2001-02-03T04:05:06.789000Z"] * 2 == stamps

    def test_frozen_retries(self, server):
        """Waits go on while freezegun stops time."""
        server.script = [status(503), status(429, {"Retry-After": "1"}), None]
        with freezegun.freeze_time("2001-02-03"):
            client = pgtrack.configure(project_id="p", endpoint=server.url)
            client.emit("custom")

            assert client.close(10)
        assert 2 == client.stats().retries

    @pytest.mark.parametrize("hours", [-24, 24])
    def test_jump(self, server, hours):
        """A jump of the wall clock shows in the stamps, and delays nothing."""
        client = pgtrack.configure(
            project_id="p", endpoint=server.url, batch_interval=0.3
        )
        started = time.perf_counter()
        now = datetime.now(tz=timezone.utc)
        with freezegun.freeze_time(now, tick=True) as clock:
            client.emit("custom")
            clock.move_to(now + timedelta(hours=hours))
            client.emit("custom")
            assert server.wait_for(2)
        took = time.perf_counter() - started

        stamps = [
            datetime.fromisoformat(e["event.timestamp"].replace("Z", "+00:00"))
            for e in server.events
        ]
        gap = stamps[1] - stamps[0] - timedelta(hours=hours)
        assert abs(gap) < timedelta(seconds=5)
        assert 0.25 < took < 5
