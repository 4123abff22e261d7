"""
For tests: look at events without a network, a thread or a sleep.

`capture()` makes the default client one that keeps its events in a list; the pytest
fixture `pgtrack_events` does it for a test.  `RecordingTransport`, `FakeClock` and
`SequentialIds` take the places of what a `Client` uses, where the way to the endpoint
is what is tested.
"""

from __future__ import annotations

import collections
import threading
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from pgtrack import _api
from pgtrack._client import Client, Sink
from pgtrack._config import Config
from pgtrack._context import suppress
from pgtrack._event import Event, decode_json, time_to_ns
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Unpack

    from pgtrack._clock import Signal
    from pgtrack._config import ConfigOptions
    from pgtrack._ledger import Ledger
    from pgtrack._record import Encoder, Record
    from pgtrack.typing import Clock, IdFactory, Transport

__all__ = [
    "Events",
    "FakeClock",
    "RecordingTransport",
    "SequentialIds",
    "capture",
]


class Events(list[Event]):
    """The captured events, in the order of emission."""

    def of_type(self, event_type: str) -> Events:
        """Return the events of one type."""
        return Events(event for event in self if event.type == event_type)

    def assert_journey(
        self,
        journey_id: str,
        *,
        steps: Sequence[str],
        status: str | None = None,
    ) -> None:
        """
        Assert which steps of a journey were completed, in this order and no others.

        Args:
            journey_id: The journey.

            steps: The ids of the steps.

            status: How it ended: `converted` or `abandoned`; None does not ask.

        Raises:
            AssertionError: If it was otherwise; the message shows what happened.
        """
        told = [event for event in self if event.journey_id == journey_id]
        happened = [e.journey_step_id for e in told if e.type == "journey.step"]
        if happened != list(steps):
            msg = (
                f"journey {journey_id!r} must have the steps {list(steps)} "
                f"(got {happened}; captured: {self._summary()})."
            )
            raise AssertionError(msg)
        statuses = [e.journey_conversion_status for e in told]
        ended = [s for s in statuses if s is not None]
        if status is not None and ended != [status]:
            msg = f"journey {journey_id!r} must have ended {status!r} (got {ended})."
            raise AssertionError(msg)

    def _summary(self) -> list[str]:
        return [f"{e.type} {e.journey_id or ''}".rstrip() for e in self]


class _List(Sink):
    """Keeps events instead of sending them."""

    def __init__(self, encoder: Encoder, ledger: Ledger, events: Events) -> None:
        self._encoder = encoder
        self._ledger = ledger
        self._events = events

    def put(self, record: Record) -> bool:
        with suppress():  # as in the worker's thread, `before_send` may emit
            ((data, _),) = self._encoder.encode([record])
        if data is None:
            return False
        self._events.append(Event.from_wire(decode_json(data)))
        self._ledger.delivered.add(1)
        return True

    def flush(self, timeout: float) -> bool:
        del timeout
        return True

    def close(self, timeout: float) -> bool:
        del timeout
        return True

    def retire(self) -> None:
        pass


class _CapturingClient(Client):
    """A client without a thread or a network."""

    is_pinned = True

    def __init__(
        self,
        config: Config,
        events: Events,
        *,
        clock: Clock | None,
        ids: IdFactory | None,
    ) -> None:
        self._events = events
        super().__init__(config, clock=clock, ids=ids)

    def _make_sink(
        self, encoder: Encoder, transport: Callable[[], Transport] | None
    ) -> Sink:
        del transport
        return _List(encoder, self._ledger, self._events)


@contextmanager
def capture(
    *,
    clock: Clock | None = None,
    ids: IdFactory | None = None,
    **options: Unpack[ConfigOptions],
) -> Iterator[Events]:
    """
    Capture the events of the default client, from all threads, in a list.

    Events are as they would leave: redacted, cut, seen by `before_send`.  The
    environment has no say, and `configure`, which the code under test may call, checks
    its options and changes nothing.  Blocks may be nested; the innermost captures.

    Args:
        clock: Stamps the events, instead of the machine's clock (or freezegun's).

        ids: Makes event ids, instead of random UUIDs.

        options: As for `configure`.
    """
    events = Events()
    options.setdefault("project_id", "test")
    options.setdefault("endpoint", "console:")
    config = Config.isolated(**options)
    client = _CapturingClient(config, events, clock=clock, ids=ids)
    before = _api.swap_default(client)
    try:
        yield events
    finally:
        _api.swap_default(before)


class RecordingTransport:
    """
    Keeps batches, and answers as told.

    Args:
        answers: What to answer, in turn: an `Answer`, an exception to raise, or a
            function of the batch's events that returns an answer.  After the last
            every batch is taken.

    Attributes:
        batches: The events of each attempt, whatever the answer was.

        taken: The events of the batches that were taken, without the rejected ones.
    """

    is_immediate = False

    def __init__(
        self,
        answers: Sequence[Answer | Exception | Callable[[list[Event]], Answer]] = (),
    ) -> None:
        self._answers = collections.deque(answers)
        self.batches: list[list[Event]] = []
        self.taken: list[Event] = []

    def send(self, events: Sequence[bytes], timeout: float) -> Answer:
        """Record the batch and give the next answer."""
        del timeout
        batch = [Event.from_wire(decode_json(event)) for event in events]
        self.batches.append(batch)
        answer = self._answers.popleft() if self._answers else _TAKEN
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer(batch)
        if answer.verdict is Verdict.TAKEN:
            taken = enumerate(batch)
            self.taken += [e for i, e in taken if i not in answer.rejected]
        return answer

    def abort(self) -> None:
        """Do nothing: no attempt takes time."""

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


_TAKEN = Answer(verdict=Verdict.TAKEN)


class SequentialIds:
    """Makes UUIDs that count up from 1, so that whole events can be compared."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self) -> str:
        """Return the next id."""
        self._count += 1
        return f"00000000-0000-4000-8000-{self._count:012x}"


class FakeClock:
    """
    A clock that moves only by `advance`.

    Args:
        start: The first wall time; aware.
    """

    def __init__(self, start: datetime | None = None) -> None:
        start = start or datetime(2026, 1, 1, tzinfo=timezone.utc)
        self._time_ns = time_to_ns(start)
        self._monotonic = 0.0
        self._condition = threading.Condition()
        self._waiting: dict[Signal, float | None] = {}

    def time_ns(self) -> int:
        """Return the wall time in nanoseconds since 1970."""
        return self._time_ns

    def monotonic(self) -> float:
        """Return the seconds advanced."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Move both times on, and wake whoever has waited long enough."""
        with self._condition:
            self._monotonic += seconds
            self._time_ns += round(seconds * 1e6) * 1000
            for signal, until in list(self._waiting.items()):
                if until is not None and until <= self._monotonic:
                    del self._waiting[signal]
                    signal.give()

    def wait(self, signal: Signal, timeout: float | None) -> None:
        """Wait until *signal* is given or *timeout* has been advanced."""
        if timeout is not None and timeout <= 0:
            return
        with self._condition:
            until = None if timeout is None else self._monotonic + timeout
            self._waiting[signal] = until
            self._condition.notify_all()
        signal.wait()
        with self._condition:
            self._waiting.pop(signal, None)

    def until_waiting(self, timeout: float = 10.0) -> float | None:
        """
        Block until a thread waits on this clock, and return how long it wants to.

        Args:
            timeout: Real seconds.

        Raises:
            TimeoutError: If none does.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._waiting, timeout):
                raise TimeoutError
            until = next(iter(self._waiting.values()))
            return None if until is None else until - self._monotonic
