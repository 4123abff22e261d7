"""
What the integrations that show the ledger as metrics share: which ones there are.

No metric has an id on it.  The reasons of rejections are the endpoint's words; there
are at most some fifty of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pgtrack._ledger import Stats

__all__ = ["METRICS", "Metric", "Value"]

Value: TypeAlias = "tuple[float, Mapping[str, str]]"
"""A number, and what tells it from others of the same metric."""


class Metric(NamedTuple):
    """
    One metric.

    Attributes:
        name: In words that stand between dots.

        kind: A counter only rises; a level rises and falls, and those of several
            processes add up; a gauge's do not.

        unit: In UCUM's spelling.

        text: What it counts.

        label: What tells its values apart, if it has several.

        values: Reads them off the ledger.
    """

    name: str
    kind: Literal["counter", "level", "gauge"]
    unit: str
    text: str
    label: str | None
    values: Callable[[Stats], Iterator[Value]]


def _number(
    name: str,
    kind: Literal["counter", "level"],
    unit: str,
    text: str,
    attribute: str | None = None,
) -> Metric:
    attribute = attribute or name.rpartition(".")[2]

    def values(stats: Stats) -> Iterator[Value]:
        yield getattr(stats, attribute), {}

    return Metric(name, kind, unit, text, None, values)


def _counts(name: str, label: str, unit: str, text: str) -> Metric:
    attribute = name.rpartition(".")[2]

    def values(stats: Stats) -> Iterator[Value]:
        for reason, count in getattr(stats, attribute).items():
            yield count, {label: reason}

    return Metric(name, "counter", unit, text, label, values)


def _last_success(stats: Stats) -> Iterator[Value]:
    if stats.last_success is not None:
        yield stats.last_success.timestamp(), {}


METRICS = (
    _number("events.emitted", "counter", "{event}", "Events that were emitted."),
    _number("events.recovered", "counter", "{event}", "Events adopted from a spool."),
    _number("events.delivered", "counter", "{event}", "Events the endpoint took."),
    _counts("events.rejected", "reason", "{event}", "Events the endpoint refused."),
    _counts("events.dropped", "reason", "{event}", "Events that were given up."),
    _number("events.spooled", "level", "{event}", "Events at rest on disk."),
    _number("events.pending", "level", "{event}", "Events in memory."),
    _counts("values.adjusted", "kind", "{value}", "Values that were cut or replaced."),
    _number("batches", "counter", "{batch}", "Requests that the endpoint took."),
    _number("retries", "counter", "{attempt}", "Attempts that had to be repeated."),
    _number("sent", "counter", "By", "Bytes of request bodies.", "sent_bytes"),
    _number("spool_errors", "counter", "{error}", "Failures of the spool's disk."),
    Metric(
        "last_success",
        "gauge",
        "s",
        "When a batch was last taken, in seconds since 1970.",
        None,
        _last_success,
    ),
)
"""All of them, under their names in the ledger."""
