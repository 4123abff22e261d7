"""
The line: what was taken off the queue, and what becomes of it.

Pure policy: no thread, no network, no clock.  Events travel in parcels, in the order of
emission; the worker sends the `next` one and lets the line `settle` the answer.  A
parcel is

- taken: counted, with the rejected positions by the endpoint's reasons;
- to be sent again: after a wait by exponential backoff, full jitter and `Retry-After`;
- rejected: counted by the endpoint's reason;
- held (a wrong key or address): probed slowly, until `retry_for`;
- too large: halved, down to the one event that is;
- refused: halved under a budget, down to the events that are at fault.

Whose fault a refusal is, the endpoint does not say.  An event that was refused alone is
rejected if the endpoint took another one since the last wait, or if nothing is
left to ask with.  Until then it is a *suspect*.  Several suspects in a row mean that
the endpoint refuses everything.  Then all are kept, and it is asked slowly, by
one event at a time, until it takes one; that one overtakes the others.

A parcel may rest on disk as well, in a file of the spool; the spool then says when it
has become too old.  In memory it is given up `retry_for` after its first try.

The waits are a circuit breaker: one attempt at a time, ever more rarely.  After
`_OPEN_AFTER` failures in a row it is a small one, and is not brought forward often.
"""

from __future__ import annotations

import collections
import logging
from typing import TYPE_CHECKING, TypeAlias

import attrs

from pgtrack import _diagnostics
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pgtrack._journal import Segment
    from pgtrack._ledger import DropReason, Ledger
    from pgtrack._retry import RetryPolicy
    from pgtrack._source import SpooledFile

__all__ = ["MAX_EVENTS", "Hold", "Line", "Parcel", "pack"]

MAX_EVENTS = 1_000
"""Most events of a request, by ProductGraph's documentation and source."""

_MAX_SPLITS = 256
"""Most splits of one line before refused parcels are rejected whole."""

_SUSPECTS = 5
"""Refusals of single events in a row, none taken, that mean: all are refused."""

_SHORTEST_WAIT = 0.001

_OPEN_AFTER = 3
"""Failures in a row from which on an endpoint is taken to be down."""

_HURRIES = 1.0
"""Seconds between attempts that are brought forward at an endpoint that is down."""

_ENVELOPE = len(b'{"events":[]}') - 1
"""Bytes of a request around its events, each with a comma but for the last."""


Hold: TypeAlias = "int | tuple[int, Segment | None] | SpooledFile"
"""
What an event occupies until its end.

In memory, its size in the bound of the queue, and if it was written to the journal,
where; or else the file that it is in.
"""


@attrs.define(eq=False)
class Parcel:
    """
    Events that are sent together.

    Attributes:
        events: Their bytes.

        holds: What each occupies.

        first_try: When they were first sent, alone or with others.

        refusal: For a suspect, why it was refused.
    """

    events: list[bytes]
    holds: list[Hold]
    first_try: float | None = None
    refusal: str = ""

    def __len__(self) -> int:
        return len(self.events)

    @property
    def file(self) -> SpooledFile | None:
        """The youngest file that its events are in; None if they are in memory."""
        hold = self.holds[-1] if self.holds else 0
        return None if isinstance(hold, (int, tuple)) else hold

    def split(self, at: int) -> tuple[Parcel, Parcel]:
        """Return the events before and from the position *at*."""
        return (
            Parcel(self.events[:at], self.holds[:at], self.first_try),
            Parcel(self.events[at:], self.holds[at:], self.first_try),
        )


def pack(encoded: Iterable[tuple[bytes, Hold]], max_bytes: int) -> Iterator[Parcel]:
    """
    Group events, each with its hold, into parcels of requests of *max_bytes*.

    They are either all in memory, or all in files.
    """
    parcel, length = Parcel([], []), _ENVELOPE
    for data, hold in encoded:
        length += len(data) + 1
        if parcel and (length > max_bytes or len(parcel) == MAX_EVENTS):
            yield parcel
            parcel, length = Parcel([], []), _ENVELOPE + len(data) + 1
        parcel.events.append(data)
        parcel.holds.append(hold)
    if parcel:
        yield parcel


class Line:
    """
    The parcels that are under way; used by the delivering thread alone.

    Args:
        ledger: Counts where each event went.

        release: Called with the hold of each event that came to its end.

        policy: How long to wait between attempts.

        retry_for: Seconds after its first try that a parcel in memory is given up.

        probe_size: Most events that an endpoint that is down is asked with.

    Attributes:
        is_refused: Whether the endpoint refuses everything.

        is_told_when: Whether the present wait is the endpoint's wish.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        release: Callable[[Hold], None],
        policy: RetryPolicy,
        retry_for: float,
        probe_size: int = 50,
    ) -> None:
        self._ledger = ledger
        self._release = release
        self._policy = policy
        self._retry_for = retry_for
        self._probe_size = probe_size
        self._parcels: collections.deque[Parcel] = collections.deque()
        self._suspects: collections.deque[Parcel] = collections.deque()
        self._probe: Parcel | None = None
        self.is_refused = False
        self.is_told_when = False
        self._has_taken = False
        self._refusals = 0
        self._splits = 0
        self._failures = 0
        self._next_try = 0.0
        self._last_try = 0.0

    def __bool__(self) -> bool:
        return bool(self._parcels or self._suspects)

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt has to be repeated."""
        return self._failures > 0

    @property
    def is_down(self) -> bool:
        """Whether the last attempts failed, so that the endpoint seems to be down."""
        return self._failures >= _OPEN_AFTER

    def extend(self, parcels: Iterable[Parcel]) -> None:
        """Append *parcels*."""
        self._parcels.extend(parcels)

    def wait(self, now: float, *, is_hurried: bool = False) -> float:
        """
        Return the seconds until the next attempt; none are left if not above 0.

        Whoever is in a hurry need not wait, unless the endpoint named the time.
        """
        wait = self._next_try - now
        if not is_hurried or self.is_told_when:
            return wait
        if not self.is_down:
            return 0.0
        return min(wait, self._last_try + _HURRIES - now)

    def next(self, now: float) -> Parcel:
        """Return the parcel to send now; it stays in the line until it is settled."""
        self._last_try = now
        if self.is_down and not self.is_refused:
            self._make_small()
        if self.is_refused and not (self._parcels and self._parcels[0] is self._probe):
            self._put_newest_first()
            self._probe = self._parcels[0]
        parcel = self._parcels[0]
        if parcel.first_try is None:
            parcel.first_try = now
        return parcel

    def _make_small(self) -> None:
        parcel = self._parcels[0]
        if len(parcel) > self._probe_size:
            self._parcels.popleft()
            self._parcels.extendleft(reversed(parcel.split(self._probe_size)))

    def _put_newest_first(self) -> None:
        """
        Choose what to ask with: the newest event, or else the oldest suspect.

        Events that are at fault come in a row, so the far end is the best to ask with.
        """
        if not self._parcels:
            self._parcels.append(self._suspects.popleft())
            return
        newest = self._parcels.pop()
        if len(newest) > 1:
            others, newest = newest.split(len(newest) - 1)
            self._parcels.append(others)
        self._parcels.appendleft(newest)

    def settle(self, answer: Answer, now: float) -> None:
        """Do what *answer* to the parcel sent means."""
        parcel = self._parcels.popleft()
        self._next_try = now
        self.is_told_when = False
        match answer.verdict:
            case Verdict.TAKEN:
                self._take(parcel, answer)
            case Verdict.RETRY:
                self._parcels.appendleft(parcel)
                wait = self._policy.wait(self._failures, answer.retry_after)
                self.is_told_when = answer.retry_after is not None
                self._postpone(answer, wait, now)
            case Verdict.HOLD:
                self._parcels.appendleft(parcel)
                self._hold(answer, now)
            case Verdict.REJECTED:
                self._reject(parcel, answer.reason)
            case Verdict.LOST:
                self._lose(parcel, "endpoint_lost", answer)
            case Verdict.TOO_LARGE if len(parcel) == 1:
                self._lose(parcel, "too_large", answer)
            case Verdict.TOO_LARGE:
                self._halve(parcel)
            case Verdict.REFUSED if len(parcel) > 1:
                self._search(parcel, answer)
            case _:  # refused alone
                self._suspect(parcel, answer, now)
        if not self._parcels and not self.is_refused:
            self._reject_suspects()
            self._has_taken = False
            self._splits = 0

    def give_up(self, reason: DropReason) -> None:
        """Be done with everything; what is on disk stays there, the rest is dropped."""
        for parcel in self._in_memory():
            self._drop(parcel, reason)
        self._suspects.clear()
        self._parcels.clear()

    # --- on disk ---

    def leave(self, is_left: Callable[[Hold], bool]) -> None:
        """Be done with the events in memory for whose hold *is_left* returns True."""
        for parcel in self._in_memory():
            pairs = zip(parcel.events, parcel.holds, strict=True)
            others = [(event, hold) for event, hold in pairs if not is_left(hold)]
            parcel.events = [event for event, _ in others]
            parcel.holds = [hold for _, hold in others]

    def _in_memory(self) -> list[Parcel]:
        """Return the parcels that are not on disk, in the order of emission."""
        return [p for p in (*self._suspects, *self._parcels) if p.file is None]

    @property
    def in_memory(self) -> list[bytes]:
        """The events that are not on disk, in the order of emission."""
        return [event for parcel in self._in_memory() for event in parcel.events]

    def rest_in(self, file: SpooledFile) -> None:
        """Note that what was in memory alone is now in *file*."""
        for parcel in self._in_memory():
            self._free(parcel)
            parcel.holds = [file] * len(parcel)

    def on_disk(self) -> dict[SpooledFile, list[bytes]]:
        """Return the events that have not ended of each file."""
        events: dict[SpooledFile, list[bytes]] = {}
        for parcel in (*self._suspects, *self._parcels):
            for event, hold in zip(parcel.events, parcel.holds, strict=True):
                if not isinstance(hold, (int, tuple)):
                    events.setdefault(hold, []).append(event)
        return events

    # --- taken, in part or whole ---

    def _take(self, parcel: Parcel, answer: Answer) -> None:
        self._failures = 0
        count = len(parcel)
        rejected = [str(r) for i, r in answer.rejected.items() if i in range(count)]
        for reason in rejected:
            self._count_rejected(reason)
        self._ledger.delivered.add(count - len(rejected))
        self._free(parcel)
        if len(rejected) < count:
            self._trust()

    def _trust(self) -> None:
        """Blame those that were refused alone: the endpoint does take events."""
        self._has_taken = True
        self._refusals = 0
        if self.is_refused:
            # Time has passed since they were refused: each gets another chance.
            self.is_refused = False
            self._parcels.extendleft(reversed(self._suspects))
            self._suspects.clear()
        else:
            self._reject_suspects()

    # --- refused ---

    def _halve(self, parcel: Parcel) -> None:
        self._parcels.extendleft(reversed(parcel.split((len(parcel) + 1) // 2)))

    def _search(self, parcel: Parcel, answer: Answer) -> None:
        """Halve in search of the event that is refused, as long as the budget lasts."""
        if self._splits < _MAX_SPLITS:
            self._splits += 1
            self._halve(parcel)
        else:
            self._reject(parcel, f"{answer.reason} (not isolated)")

    def _suspect(self, parcel: Parcel, answer: Answer, now: float) -> None:
        """Put aside an event that was refused alone, until it is clear whose fault."""
        if self._has_taken:
            self._reject(parcel, answer.reason)
            return
        parcel.refusal = answer.reason
        self._suspects.append(parcel)
        self._refusals += 1
        if self.is_refused:
            self._hold(answer, now)
        elif self._refusals >= _SUSPECTS:
            self.is_refused = True  # the newest event may still disprove it, at once

    def _reject_suspects(self) -> None:
        for parcel in self._suspects:
            self._reject(parcel, parcel.refusal)
        self._suspects.clear()

    # --- kept ---

    def _hold(self, answer: Answer, now: float) -> None:
        """Keep everything and ask slowly: the endpoint is at fault, not the events."""
        self._postpone(answer, self._policy.probe(self._failures), now)

    def _postpone(self, answer: Answer, wait: float, now: float) -> None:
        self._failures += 1
        self._has_taken = False
        self._ledger.retries.add(1)
        self._parcels = self._without_expired(self._parcels, now)
        self._suspects = self._without_expired(self._suspects, now)
        first_tries = [
            p.first_try for p in self._in_memory() if p.first_try is not None
        ]
        if first_tries and not self.is_told_when:
            # One last attempt when the oldest is to be given up, not long after it.
            left = min(first_tries) + self._retry_for - now
            wait = min(wait, max(left, _SHORTEST_WAIT))
        self._next_try = now + wait
        is_held = answer.verdict is Verdict.HOLD
        waiting = self._ledger.pending.value + self._ledger.spooled.value
        cause = "; is the address wrong, or the key?" if is_held else ""
        _diagnostics.note(
            f"not delivered: {answer.verdict.value}",
            f"pgtrack could not deliver events ({answer.reason}{cause}). They are kept "
            f"and sent again; {waiting:,} wait.",
        )

    def _without_expired(
        self, parcels: Iterable[Parcel], now: float
    ) -> collections.deque[Parcel]:
        """Drop what is too old, and return the others."""
        kept: collections.deque[Parcel] = collections.deque()
        for parcel in parcels:
            if parcel.file is not None:
                if parcel.file.is_expired:
                    self._drop(parcel, "spool_expired")
                else:
                    kept.append(parcel)
                continue
            first_try = parcel.first_try
            if first_try is None or now - first_try < self._retry_for:
                kept.append(parcel)
                continue
            self._drop(parcel, "retry_expired")
            _diagnostics.note(
                "retry_expired",
                f"pgtrack gave up events after {self._retry_for:g} s of retries; they "
                "are counted in pgtrack.stats().dropped['retry_expired'].",
                logging.ERROR,
            )
        return kept

    # --- ended ---

    def _reject(self, parcel: Parcel, reason: str) -> None:
        for _ in parcel.events:
            self._count_rejected(reason)
        self._free(parcel)

    def _count_rejected(self, reason: str) -> None:
        self._ledger.reject(reason)
        _diagnostics.note(
            "rejected",
            f"the endpoint rejected events for good ({reason}); they are counted in "
            "pgtrack.stats().rejected.",
        )

    def _lose(self, parcel: Parcel, reason: DropReason, answer: Answer) -> None:
        self._drop(parcel, reason)
        _diagnostics.note(
            reason,
            f"pgtrack dropped events: {answer.verdict.value} ({answer.reason}); they "
            f"are counted in pgtrack.stats().dropped[{reason!r}].",
        )

    def _drop(self, parcel: Parcel, reason: DropReason) -> None:
        self._ledger.drop(reason, len(parcel))
        self._free(parcel)

    def _free(self, parcel: Parcel) -> None:
        for hold in parcel.holds:
            self._release(hold)
