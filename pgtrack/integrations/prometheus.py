"""
Prometheus: the ledger as a collector.

`install()` once a process: whatever exposes the registry then exposes the ledger of the
default client, and of those it took over from.  It is read as the registry is, and
nothing is done in between.  Opt out by not calling `install`, or by `uninstall`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pgtrack import _api
from pgtrack._ledger import Stats
from pgtrack.integrations._metrics import METRICS
from pgtrack.integrations._requirement import requirement

with requirement("prometheus_client", extra="prometheus"):
    from prometheus_client import REGISTRY
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector as _Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from pgtrack._client import Client

__all__ = ["Collector", "install", "uninstall"]

_UNITS = {"By": "_bytes", "s": "_timestamp_seconds"}
"""What Prometheus adds to a name; counts have no unit there."""


class Collector(_Collector):
    """
    Shows a ledger to a registry.

    Args:
        client: Whose; that of the default client, as `pgtrack.stats()` has it, unless
            it is given.
    """

    def __init__(self, client: Client | None = None) -> None:
        self._client = client

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without values; registering needs no client yet."""
        yield from _families(Stats())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they stand."""
        stats = _api.stats() if self._client is None else self._client.stats()
        yield from _families(stats)


def _families(stats: Stats) -> Iterator[Metric]:
    for metric in METRICS:
        name = "pgtrack_" + metric.name.replace(".", "_") + _UNITS.get(metric.unit, "")
        labels = [] if metric.label is None else [metric.label]
        is_total = metric.kind == "counter"
        make = CounterMetricFamily if is_total else GaugeMetricFamily
        family = make(name, metric.text, labels=labels)
        for value, texts in metric.values(stats):
            family.add_metric(list(texts.values()), value)
        yield family


_installing = threading.Lock()
"""Guards what is installed."""

_installed: dict[int, tuple[CollectorRegistry, Collector]] = {}
"""By the identity of the registry, which is kept with it."""


def install(registry: CollectorRegistry = REGISTRY) -> None:
    """
    Put the ledger into *registry*, unless it is there.

    Args:
        registry: Prometheus' own default.
    """
    with _installing:
        if id(registry) not in _installed:
            collector = Collector()
            registry.register(collector)
            _installed[id(registry)] = registry, collector


def uninstall(registry: CollectorRegistry = REGISTRY) -> None:
    """Take it out again."""
    with _installing:
        _, collector = _installed.pop(id(registry), (registry, None))
        if collector is not None:
            registry.unregister(collector)
