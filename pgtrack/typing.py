"""
Types that users of pgtrack may name or implement.

Nothing here does any work: protocols for what can be replaced (`Transport`,
`Clock`, `IdFactory`), the `Answer` a transport gives, and the names of the
event types.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import attrs

if TYPE_CHECKING:
    from pgtrack._clock import Signal
    from pgtrack._event import Event

__all__ = [
    "Answer",
    "BeforeSend",
    "Clock",
    "EventType",
    "IdFactory",
    "JSONValue",
    "Transport",
    "Verdict",
]

JSONValue: TypeAlias = (
    "bool | int | float | str | list[JSONValue] | dict[str, JSONValue] | None"
)
"""What JSON can carry."""

EventType: TypeAlias = Literal[
    "api.request",
    "api.response",
    "custom",
    "error",
    "journey.step",
    "page.leave",
    "page.view",
    "performance",
    "state.change",
    "ui.blur",
    "ui.click",
    "ui.focus",
    "ui.input",
    "ui.scroll",
    "ui.submit",
]
"""The event types that ProductGraph documents; servers take any non-empty text."""

BeforeSend: TypeAlias = "Callable[[Event], Event | None]"
"""A hook that sees each event before it leaves: returns it, another, or None."""

IdFactory: TypeAlias = Callable[[], str]
"""Makes the next event id."""


class Verdict(enum.Enum):
    """What became of one attempt to send a batch."""

    TAKEN = "taken"
    """The endpoint took the batch, except for the events listed as rejected."""

    RETRY = "retry"
    """Nothing is wrong with the batch; the same may be taken later."""

    HOLD = "hold"
    """The endpoint itself refuses (a wrong key, a wrong address): probe slowly."""

    TOO_LARGE = "too large"
    """A smaller batch may be taken."""

    REFUSED = "refused"
    """Something in the batch is refused; the endpoint does not say which event."""

    REJECTED = "rejected"
    """The endpoint refuses the batch for good, whatever would be made of it."""

    LOST = "lost"
    """The endpoint is gone for good (a closed stream): no attempt can succeed."""


@attrs.frozen(kw_only=True)
class Answer:
    """
    The outcome of one attempt to send a batch.

    Args:
        verdict: What the sender is to do.

        reason: A few words for logs and the ledger, without any payload.

        retry_after: Seconds that the endpoint asked to wait, if it did.

        rejected: For `Verdict.TAKEN`: position in the batch to the endpoint's reason,
            for each event that it refused for good.

        sent_bytes: What went over the wire, after compression.
    """

    verdict: Verdict = attrs.field(validator=attrs.validators.instance_of(Verdict))
    reason: str = ""
    retry_after: float | None = None
    rejected: Mapping[int, str] = attrs.field(factory=dict)
    sent_bytes: int = 0


class Transport(Protocol):
    """
    Carries encoded events to an endpoint; called by one thread at a time.

    A transport does not retry, wait or count: it tries once and says what
    happened.  An exception that leaves `send` is taken for `Verdict.RETRY`.
    """

    def send(self, events: Sequence[bytes], timeout: float) -> Answer:
        """
        Try once to deliver *events*, each one JSON object, within *timeout* seconds.
        """
        ...

    def abort(self) -> None:
        """Make a `send` that is under way in another thread return soon."""
        ...

    def close(self) -> None:
        """Release connections and files; `send` may be called again and reopens."""
        ...


class Clock(Protocol):
    """Tells the time and waits; replaced in tests by `pgtrack.testing.FakeClock`."""

    def time_ns(self) -> int:
        """Return nanoseconds since 1970-01-01 UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""
        ...

    def wait(self, signal: Signal, timeout: float | None) -> None:
        """Wait for *signal*, at most *timeout* seconds; may return early."""
        ...
