"""
The ledger: where every event went.

    emitted + recovered
        == delivered + sum(rejected.values()) + sum(dropped.values())
           + spooled + pending

Each term is counted by itself; none is what remains of the others.  The
equation is exact whenever no event is on its way between two counters, and
never off by more than those that are.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import attrs

__all__ = ["AdjustedReason", "DropReason", "Ledger", "Stats", "Tally"]

DropReason: TypeAlias = Literal[
    "before_send",
    "before_send_error",
    "closed",
    "endpoint_lost",
    "internal_error",
    "invalid_event_type",
    "left_elsewhere",
    "no_journey",
    "no_session",
    "queue_full",
    "rate_limited",
    "retry_expired",
    "sampled",
    "shutdown",
    "spool_damaged",
    "spool_expired",
    "spool_full",
    "suppressed",
    "too_large",
]
"""Why an event was dropped by pgtrack; docs/delivery.md explains each."""

AdjustedReason: TypeAlias = Literal[
    "event_cut",
    "event_id",
    "field",
    "journey_id",
    "metadata",
    "request_id",
    "reserved_key",
    "session_id",
    "status_code",
    "timestamp",
    "user_id",
]
"""What was converted, cut or replaced in events that went on; docs/events.md."""

_MAX_REJECT_REASONS = 50
_OTHER = "other"


class Tally:
    """
    A counter that threads, signal handlers and finalisers may share.

    `+=` on an attribute is three bytecodes, and whatever runs between them is
    lost.  A lock would deadlock with the signal handler that interrupts its
    holder.  Moving the position of an in-memory file is one call into C that
    nothing can interrupt, adds any amount, and returns the new value; no byte
    is ever written.  The value does not go below zero.
    """

    __slots__ = ("_seek", "_tell")

    def __init__(self) -> None:
        file = io.BytesIO()
        self._seek = file.seek
        self._tell = file.tell

    def add(self, amount: int) -> int:
        """Add *amount*, which may be negative, and return the new value."""
        return self._seek(amount, 1)

    @property
    def value(self) -> int:
        """The present value."""
        return self._tell()

    def reset(self) -> None:
        """Set the value to zero."""
        self._seek(0)

    def __repr__(self) -> str:
        return f"<Tally {self.value}>"


def _frozen(counts: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType(dict(counts))


def _as_dict(counts: Mapping[str, int]) -> str:
    return repr(dict(counts))


def _counted() -> Any:
    return attrs.field(factory=dict, converter=_frozen, repr=_as_dict)


@attrs.frozen(kw_only=True)
class Stats:
    """
    The ledger at one moment: how many events went where.

    Attributes:
        emitted: Events that verbs, decorators and blocks handed to an enabled client.

        recovered: Events adopted from the spool of an earlier or dead process.

        delivered: Events that the endpoint took.

        rejected: Events that the endpoint refused for good, by its own reason (at most
            50 reasons are told apart, the rest are `other`).

        dropped: Events that pgtrack gave up, by reason; docs/delivery.md lists them.

        spooled: Events at rest on disk.

        pending: Events in memory: queued, or on their way.

        adjusted: What was converted, cut or replaced, by kind.  These events went on;
            the counts are not part of the equation.

        batches: Requests that the endpoint answered with having taken the batch.

        retries: Attempts that have to be repeated.

        sent_bytes: Bytes of request bodies, compressed, of all attempts that were
            answered.

        spool_errors: Reads and writes of the spool that failed; the events stayed in
            memory.

        last_error: What the last attempt that failed ran into; None if none did.

        last_success: When a batch was last taken; None if none was.
    """

    emitted: int = 0
    recovered: int = 0
    delivered: int = 0
    rejected: Mapping[str, int] = _counted()
    dropped: Mapping[str, int] = _counted()
    spooled: int = 0
    pending: int = 0
    adjusted: Mapping[str, int] = _counted()
    batches: int = 0
    retries: int = 0
    sent_bytes: int = 0
    spool_errors: int = 0
    last_error: str | None = None
    last_success: datetime | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A child may report its ledger to its parent; a mapping proxy does not pickle.
        values = attrs.asdict(self, recurse=False)
        counts = {k: dict(v) for k, v in values.items() if isinstance(v, Mapping)}
        return _restored, ({**values, **counts},)

    @property
    def is_balanced(self) -> bool:
        """Whether the equation of the ledger holds exactly."""
        ended = self.delivered + sum(self.rejected.values())
        ended += sum(self.dropped.values())
        return self.emitted + self.recovered == ended + self.spooled + self.pending

    def __add__(self, other: Stats) -> Stats:
        """Return the ledger of two clients together."""
        if not isinstance(other, Stats):
            return NotImplemented
        successes = [s for s in (self.last_success, other.last_success) if s]
        return Stats(
            emitted=self.emitted + other.emitted,
            recovered=self.recovered + other.recovered,
            delivered=self.delivered + other.delivered,
            rejected=_sum(self.rejected, other.rejected),
            dropped=_sum(self.dropped, other.dropped),
            spooled=self.spooled + other.spooled,
            pending=self.pending + other.pending,
            adjusted=_sum(self.adjusted, other.adjusted),
            batches=self.batches + other.batches,
            retries=self.retries + other.retries,
            sent_bytes=self.sent_bytes + other.sent_bytes,
            spool_errors=self.spool_errors + other.spool_errors,
            last_error=other.last_error or self.last_error,
            last_success=max(successes, default=None),
        )


def _restored(values: dict[str, Any]) -> Stats:
    return Stats(**values)


def _sum(one: Mapping[str, int], two: Mapping[str, int]) -> Mapping[str, int]:
    return {key: one.get(key, 0) + two.get(key, 0) for key in {**one, **two}}


class Ledger:
    """
    The counters of one client.

    `drop` and `adjust` may be called from anywhere; the outcome of deliveries
    is counted by whichever thread delivers.
    """

    def __init__(self) -> None:
        self.emitted = Tally()
        self.recovered = Tally()
        self.delivered = Tally()
        self.spooled = Tally()
        self.pending = Tally()
        self.batches = Tally()
        self.retries = Tally()
        self.sent_bytes = Tally()
        self.spool_errors = Tally()
        self._dropped = {reason: Tally() for reason in get_args(DropReason)}
        self._adjusted = {reason: Tally() for reason in get_args(AdjustedReason)}
        self._rejected: dict[str, Tally] = {}
        self.last_error: str | None = None
        self.last_success_ns: int | None = None

    def drop(self, reason: DropReason, count: int = 1) -> None:
        """Count *count* events as dropped for *reason*."""
        self._dropped[reason].add(count)

    def dropped(self, reason: DropReason) -> int:
        """Return how many events were dropped for *reason* so far."""
        return self._dropped[reason].value

    def adjust(self, reason: AdjustedReason) -> None:
        """Count one value that went on, but not as it was given."""
        self._adjusted[reason].add(1)

    def reject(self, reason: str) -> None:
        """Count one event as rejected for the endpoint's *reason*."""
        if reason not in self._rejected and len(self._rejected) >= _MAX_REJECT_REASONS:
            reason = _OTHER
        self._rejected.setdefault(reason, Tally()).add(1)

    def reset(self) -> None:
        """Start again from zero, as a forked child does."""
        counters = [self.emitted, self.recovered, self.delivered, self.spooled]
        counters += [self.pending, self.batches, self.retries, self.sent_bytes]
        counters += [self.spool_errors]
        for tally in (*counters, *self._dropped.values(), *self._adjusted.values()):
            tally.reset()
        self._rejected.clear()
        self.last_error = None
        self.last_success_ns = None

    def stats(self) -> Stats:
        """Return the ledger at this moment."""
        # The ends are read first, the beginning last: what moves on meanwhile is then
        # missing on the right rather than on the left.
        delivered = self.delivered.value
        rejected = _counts(self._rejected)
        dropped = _counts(self._dropped)
        spooled = self.spooled.value
        pending = self.pending.value
        return Stats(
            emitted=self.emitted.value,
            recovered=self.recovered.value,
            delivered=delivered,
            rejected=rejected,
            dropped=dropped,
            spooled=spooled,
            pending=pending,
            adjusted=_counts(self._adjusted),
            batches=self.batches.value,
            retries=self.retries.value,
            sent_bytes=self.sent_bytes.value,
            spool_errors=self.spool_errors.value,
            last_error=self.last_error,
            last_success=_utc(self.last_success_ns),
        )


def _counts(tallies: Mapping[str, Tally]) -> Mapping[str, int]:
    counts = {key: tally.value for key, tally in list(tallies.items())}
    return {key: count for key, count in counts.items() if count}


def _utc(time_ns: int | None) -> datetime | None:
    if time_ns is None:
        return None
    return datetime.fromtimestamp(time_ns / 1e9, tz=timezone.utc)
