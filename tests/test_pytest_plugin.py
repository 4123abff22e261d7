"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSIDE = """
    import threading

    import pgtrack

    def checkout():
        with pgtrack.journey("checkout") as journey:
            journey.step("cart")
            journey.step("pay")

    def test_it_captures(pgtrack_events):
        threads = threading.active_count()
        checkout()

        pgtrack_events.assert_journey("checkout", steps=["cart", "pay"])
        assert threads == threading.active_count()

    def test_each_test_has_its_own(pgtrack_events):
        assert pgtrack_events == []
        assert pgtrack.flush(0)

    def test_configure_does_not_reach_the_network(pgtrack_events):
        pgtrack.configure(project_id="p", endpoint="https://pg.invalid/v1/events")
        checkout()

        assert len(pgtrack_events) == 2

    def test_without_the_fixture_nothing_is_captured():
        assert not pgtrack.emit("custom")
"""


def run_pytest(
    path: Path, source: str, *args: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest on a test file of *source*, and return what it printed."""
    import textwrap

    (path / "test_inside.py").write_text(textwrap.dedent(source), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCTGRAPH_")}
    import_path = os.pathsep.join([str(ROOT), env.pop("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, "."],
        cwd=path,
        env={**env, "PYTHONPATH": import_path, **variables},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"PRODUCTGRAPH_ENABLED": "false"},
        {"PRODUCTGRAPH_BATCH_SIZE": "garbage"},
    ],
    ids=str,
)
def test_the_fixture_captures(tmp_path: Path, variables: dict[str, str]) -> None:
    """Events of a test are in `pgtrack_events`, whatever the environment says."""
    done = run_pytest(tmp_path, INSIDE, "-W", "error", **variables)

    assert "4 passed" in done.stdout
    assert done.returncode == 0


def test_a_failure_says_what_happened(tmp_path: Path) -> None:
    """The message of a failed assertion is in the report."""
    source = """
        import pgtrack

        def test_journey(pgtrack_events):
            pgtrack.track_journey_step("checkout", "cart")
            pgtrack_events.assert_journey("checkout", steps=["pay"])
    """
    done = run_pytest(tmp_path, source)

    assert "must have the steps ['pay'] (got ['cart']; captured: " in done.stdout
    assert done.returncode == 1


def test_unused_it_does_nothing(tmp_path: Path) -> None:
    """Without the fixture there is no client, no thread and no more to import."""
    source = """
        import sys
        import threading

        def test_nothing():
            assert "pgtrack._pytest_plugin" in sys.modules
            assert "pgtrack.testing" not in sys.modules
            assert sys.modules["pgtrack._api"]._client is None
            assert threading.active_count() == 1
    """
    done = run_pytest(tmp_path, source, PRODUCTGRAPH_ENABLED="garbage")

    assert "1 passed" in done.stdout


def test_it_can_be_left_out(tmp_path: Path) -> None:
    """`-p no:pgtrack` leaves the plugin out."""
    source = "def test_journey(pgtrack_events): pass"
    done = run_pytest(tmp_path, source, "-p", "no:pgtrack")

    assert "fixture 'pgtrack_events' not found" in done.stdout


def test_in_this_process(pgtrack_events) -> None:
    """The fixture works where pgtrack's own tests run, too."""
    import pgtrack

    pgtrack.emit("custom")

    assert [event.type for event in pgtrack_events] == ["custom"]
