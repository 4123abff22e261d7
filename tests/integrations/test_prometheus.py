"""Prometheus: the ledger as a collector."""

from __future__ import annotations

import http.client
import threading
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("prometheus_client")

import prometheus_client

import pgtrack
from harness import Server, in_fork, run_script, start_together, status
from pgtrack.integrations import prometheus
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry

TIMEOUT = 10


@pytest.fixture(name="registry")
def _registry() -> Iterator[CollectorRegistry]:
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    prometheus.install(registry)
    yield registry
    prometheus.uninstall(registry)


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Return the lines that are exposed, by name and labels."""
    text = prometheus_client.generate_latest(registry).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pairs = [line.rpartition(" ") for line in lines]
    return {name: float(value) for name, _, value in pairs}


def test_the_ledger(registry) -> None:
    """Each counter of the ledger is exposed, reasons are a label."""
    bad = b'{"accepted":1,"rejected":1,"errors":[{"index":1,"error":"bad \\"id\\""}]}'
    with Server() as server:
        server.script = [status(503), status(202, body=bad)]
        pgtrack.configure(project_id="shop", endpoint=server.url)
        pgtrack.emit("custom")
        pgtrack.emit("custom", user_id="not an id")
        pgtrack.emit("")
        assert pgtrack.flush(TIMEOUT)

    stats = pgtrack.stats()
    assert {
        "pgtrack_events_emitted_total": 3,
        "pgtrack_events_recovered_total": 0,
        "pgtrack_events_delivered_total": 1,
        'pgtrack_events_rejected_total{reason="bad \\"id\\""}': 1,
        'pgtrack_events_dropped_total{reason="invalid_event_type"}': 1,
        "pgtrack_events_spooled": 0,
        "pgtrack_events_pending": 0,
        'pgtrack_values_adjusted_total{kind="user_id"}': 1,
        "pgtrack_batches_total": 1,
        "pgtrack_retries_total": 1,
        "pgtrack_sent_bytes_total": stats.sent_bytes,
        "pgtrack_spool_errors_total": 0,
        "pgtrack_last_success_timestamp_seconds": pytest.approx(
            stats.last_success.timestamp()
        ),
    } == samples(registry)


def test_what_waits_is_pending(registry) -> None:
    """Events that were not sent yet are a gauge, which falls again."""
    with Server() as server:
        pgtrack.configure(project_id="shop", endpoint=server.url, batch_interval=60)
        pgtrack.emit("custom")
        waiting = samples(registry)["pgtrack_events_pending"]
        assert pgtrack.flush(TIMEOUT)

    assert (1, 0) == (waiting, samples(registry)["pgtrack_events_pending"])


def test_without_a_client_there_are_zeros(registry) -> None:
    """Not configured, all is 0, and no time of a success is told."""
    found = samples(registry)

    assert {0} == set(found.values())
    assert "pgtrack_last_success_timestamp_seconds" not in found


def test_another_client_has_a_collector_of_its_own() -> None:
    """A client that is not the default one can be registered by itself."""
    registry = prometheus_client.CollectorRegistry()
    config = pgtrack.Config(project_id="shop", endpoint="console:")
    with pgtrack.Client(config) as client:
        registry.register(prometheus.Collector(client))
        client.emit("")

        assert 1 == samples(registry)["pgtrack_events_emitted_total"]


def test_installing_asks_no_client() -> None:
    """The registry learns the names without a client being made."""
    done = run_script(
        """
        import pgtrack._api
        from pgtrack.integrations import prometheus

        prometheus.install()
        prometheus.install()
        print(pgtrack._api._client)
        """,
        env={"PRODUCTGRAPH_ENABLED": "garbage"},
    )

    assert ("None\n", "") == (done.stdout, done.stderr)


def test_it_is_installed_once_and_undone(registry) -> None:
    """Again it changes nothing; uninstalled nothing is exposed, twice neither."""
    prometheus.install(registry)
    once = samples(registry)
    prometheus.uninstall(registry)
    prometheus.uninstall(registry)
    none = samples(registry)
    prometheus.install(registry)

    assert (13 - 4, 0) == (len(once), len(none))
    assert once == samples(registry)


def test_the_default_registry() -> None:
    """Without an argument it is Prometheus' own, and its server exposes it."""
    prometheus.install()
    try:
        server, thread = prometheus_client.start_http_server(0, "127.0.0.1")
        try:
            with capture():
                pgtrack.emit("custom")
                connection = http.client.HTTPConnection(
                    "127.0.0.1", server.server_port, timeout=TIMEOUT
                )
                connection.request("GET", "/metrics")
                text = connection.getresponse().read().decode()
                connection.close()
        finally:
            server.shutdown()
            server.server_close()
            thread.join(TIMEOUT)
    finally:
        prometheus.uninstall()

    assert "\npgtrack_events_emitted_total 1.0\n" in text
    assert "# TYPE pgtrack_events_pending gauge" in text


def test_reading_while_emitting(registry) -> None:
    """Counters only rise while many threads emit and many read."""
    barrier = threading.Barrier(6)

    def work(i: int) -> None:
        barrier.wait(TIMEOUT)
        last = 0.0
        for _ in range(60):
            if i % 2:
                pgtrack.emit("custom")
            else:
                now = samples(registry)["pgtrack_events_emitted_total"]
                assert last <= now
                last = now

    with capture():
        start_together(6, work)

        assert 180 == samples(registry)["pgtrack_events_emitted_total"]


def test_a_forked_child_counts_its_own(registry) -> None:
    """A child begins with zeros, and the parent keeps its counts."""
    with Server() as server:
        pgtrack.configure(project_id="shop", endpoint=server.url)
        pgtrack.emit("custom")
        assert pgtrack.flush(TIMEOUT)

        def child() -> float:
            pgtrack.emit("custom", name="child")
            pgtrack.emit("custom", name="child")
            pgtrack.flush(TIMEOUT)
            return samples(registry)["pgtrack_events_emitted_total"]

        assert 2 == in_fork(child)

    assert 1 == samples(registry)["pgtrack_events_emitted_total"]


def test_a_missing_package_is_named() -> None:
    """One error names the package and the extra."""
    done = run_script(
        """
        import sys
        sys.modules["prometheus_client"] = None
        try:
            import pgtrack.integrations.prometheus
        except ImportError as error:
            print(type(error).__name__, error)
        """
    )

    assert done.stdout.startswith("MissingDependencyError")
    assert "pip install 'pgtrack[prometheus]'" in done.stdout
