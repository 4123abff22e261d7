"""
The client: from the arguments of a verb to the worker's queue.

`emit` never waits and never raises for a value.  It takes no lock, so that a signal
handler, a finaliser or a log handler may call it in the middle of itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from pgtrack import _diagnostics, _errors, _process
from pgtrack._clock import SYSTEM_CLOCK
from pgtrack._context import (
    Frame,
    current_frame,
    is_request_id,
    is_session_id,
    is_user_id,
    process_session_id,
)
from pgtrack._event import KEYWORDS, EventFields
from pgtrack._ledger import AdjustedReason, DropReason, Ledger, Stats
from pgtrack._limits import RateLimit, is_sampled
from pgtrack._local import ConsoleTransport, FileTransport
from pgtrack._record import RECORD_SIZE, Encoder, Record, take_field, take_time
from pgtrack._redaction import KeyRule
from pgtrack._retry import RetryPolicy
from pgtrack._snapshot import snapshot
from pgtrack._transport import HttpTransport
from pgtrack._worker import Worker
from pgtrack._config import Config

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from pgtrack.typing import Clock, EventType, IdFactory, Transport

__all__ = ["Client", "Sink"]


class Sink(Protocol):
    """Where a client's records go: a worker, or a test's list."""

    def put(self, record: Record) -> bool:
        """Take *record*; False if it was dropped, which is then counted."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until all that was put before came to an end."""
        ...

    def close(self, timeout: float) -> bool:
        """Flush, then take no more."""
        ...

    def retire(self) -> None:
        """Take no more, and see to what is left in the background."""
        ...

    def start_over(self) -> None:
        """Forget what is the parent's, in a forked child."""
        ...


def transport_of(config: Config) -> Transport:
    """Return the transport for the endpoint of *config*."""
    endpoint = str(config.endpoint)
    if endpoint.startswith("console:"):
        name = endpoint.removeprefix("console:") or "stdout"
        return ConsoleTransport(name)  # type: ignore[arg-type]
    if endpoint.startswith("file:"):
        return FileTransport(endpoint.removeprefix("file:"))
    return HttpTransport(config)


class Client:
    """
    Sends events to one endpoint.

    Safe to use from any thread, task, signal handler or finaliser, and across forks:
    a child starts with an empty queue and ledger.  Leaving `with Client(...)` closes it.

    Args:
        config: The settings; a disabled config makes a client that does nothing.

        transport: Makes what carries the events, instead of the endpoint's own; called
            once in each process.

        clock: Tells the time, instead of the machine's.

        ids: Makes event ids, instead of random UUIDs.
    """

    def __init__(
        self,
        config: Config,
        *,
        transport: Callable[[], Transport] | None = None,
        clock: Clock | None = None,
        ids: IdFactory | None = None,
    ) -> None:
        self.config = config
        self._clock = SYSTEM_CLOCK if clock is None else clock
        self._ledger = Ledger()
        self._rule = KeyRule(config.redact_keys)
        self._session_id_format = config.session_id_format
        self._sample_rate = config.sample_rate
        self._rate_limit = (
            None
            if config.session_rate_limit is None
            else RateLimit(config.session_rate_limit)
        )
        self.is_closed = False
        self._sink: Sink | None = None
        if config.enabled:
            encoder = Encoder(config, self._rule, self._ledger, ids)
            self._sink = self._make_sink(encoder, transport)

    def _make_sink(
        self, encoder: Encoder, transport: Callable[[], Transport] | None
    ) -> Sink:
        worker = Worker(
            config=self.config,
            encoder=encoder,
            transport=transport or functools.partial(transport_of, self.config),
            ledger=self._ledger,
            policy=RetryPolicy(),
            clock=self._clock,
            on_start=_process.adopt_child,
        )
        _process.adopt(self)
        return worker

    @property
    def is_enabled(self) -> bool:
        """Whether the client sends anything."""
        return self._sink is not None

    def __repr__(self) -> str:
        state = self.config.endpoint if self.is_enabled else "disabled"
        return f"<Client {self.config.project_id} {state}>"

    # --- the verbs ---

    def emit(
        self, event_type: EventType | str, /, **fields: Unpack[EventFields]
    ) -> bool:
        """
        Emit one event; never waits, and never raises for a bad value.

        Args:
            event_type: One of the documented types, or any other non-empty text.

            fields: The fields of `pgtrack.Event` without `type`, `project_id` and
                `product_id`, and `request_id`.  Values are converted to what the wire
                can carry, cut to its widths, or left out; `stats().adjusted` counts
                them.

        Returns:
            Whether the event was taken.  False if the client is disabled, and if the
            event was dropped, which `stats().dropped` counts by reason.

        Raises:
            TypeError: If a keyword is not a field.
        """
        if not fields.keys() <= KEYWORDS:
            _refuse_keywords(fields.keys() - KEYWORDS)
        sink = self._sink
        if sink is None:
            return False
        self._ledger.emitted.add(1)
        try:
            record = self._record(event_type, fields)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001  the host must not see our errors
            self._ledger.drop("internal_error")
            _diagnostics.internal_error(error)
            return False
        if isinstance(record, str):
            self._ledger.drop(record)
            return False
        return sink.put(record)

    def _record(
        self, event_type: object, fields: dict[str, Any]
    ) -> Record | DropReason:
        """Take what the event is made of, or say why there is none."""
        frame = current_frame()
        if frame is not None and frame.is_suppressed:
            return "suppressed"
        kind = event_type
        if type(kind) is not str:
            kind = snapshot(kind, self._rule).value
        if not isinstance(kind, str) or not kind:
            return "invalid_event_type"
        now = self._clock.time_ns()
        session_id = self._session_id(fields.pop("session_id", None), frame)
        if session_id is None:
            return "no_session"
        is_error = kind == "error"
        if self._sample_rate < 1.0 and not is_error:
            if not is_sampled(session_id, self._sample_rate):
                return "sampled"
        if self._rate_limit is not None and frame is not None and frame.is_remote:
            if not self._rate_limit.allows(session_id, self._clock.monotonic()):
                return "rate_limited"
        request_id, inherited = self._correlate(fields, frame, session_id, is_error)
        moment = fields.pop("timestamp", None)
        if moment is not None:
            now = take_time(moment, now, self._ledger)
        size = RECORD_SIZE
        metadata = fields.pop("metadata", None)
        if metadata is not None:
            metadata, taken = self._metadata(metadata)
            size += taken
        for name, value in fields.items():
            if value is not None:
                fields[name], taken = take_field(name, value, self._rule, self._ledger)
                size += taken
        return now, kind, session_id, request_id, inherited, fields, metadata, size

    def _session_id(self, given: object, frame: Frame | None) -> str | None:
        if given is not None:
            if is_session_id(given):
                return str(given)
            self._ledger.adjust("session_id")
        if frame is not None and frame.session_id is not None:
            return frame.session_id
        return process_session_id() if self.config.default_session else None

    def _correlate(
        self,
        fields: dict[str, Any],
        frame: Frame | None,
        session_id: str,
        is_error: bool,  # noqa: FBT001
    ) -> tuple[str | None, Any]:
        """Fill in what the frame knows; return the request and inherited metadata."""
        user_id = fields.pop("user_id", None)
        if user_id is not None:
            user_id = self.checked_user_id(user_id)
        request_id = fields.pop("request_id", None)
        if request_id is not None and not is_request_id(request_id):
            self._ledger.adjust("request_id")
            request_id = None
        inherited: Any = {}
        if frame is not None:
            request_id = request_id or frame.request_id
            inherited = self._inherited(frame)
            # User and journey belong to the session, and do not go with another.
            if session_id == frame.session_id or frame.session_id is None:
                user_id = user_id or frame.cell.user_id
                if fields.get("journey_id") is None and frame.journey_id is not None:
                    fields["journey_id"] = frame.journey_id
                    if is_error and frame.step is not None:
                        fields.setdefault("journey_step_id", frame.step[0])
                        fields.setdefault("journey_step_name", frame.step[1])
        if user_id is not None:
            fields["user_id"] = user_id
        return request_id, inherited

    def _inherited(self, frame: Frame) -> Any:
        """Return the frame's metadata, redacted by this client's rule, once a frame."""
        if not frame.metadata:
            return frame.metadata
        redacted = frame.redacted.get(self._rule)
        if redacted is None:
            redacted = snapshot(frame.metadata, self._rule).value
            frame.redacted[self._rule] = redacted
        return redacted

    def _metadata(self, given: object) -> tuple[dict[str, Any], int]:
        taken = snapshot(given, self._rule)
        if taken.is_lossy:
            self._ledger.adjust("metadata")
        value = taken.value
        if not isinstance(value, dict):
            self._ledger.adjust("metadata")
            value = {"value": value}
        return value, taken.size

    def checked_user_id(self, given: object) -> str | None:
        """Return *given* as a user id; None, counted, if it cannot be one."""
        value = str(given) if isinstance(given, int) else given
        if is_user_id(value):
            return str(value)
        self._ledger.adjust("user_id")
        return None

    def track_api_call(
        self,
        method: str,
        path: str,
        status_code: int = 200,
        *,
        duration: float | None = None,
        **fields: Unpack[EventFields],
    ) -> bool:
        """
        Emit an `api.response` event.

        Args:
            method: The HTTP method.

            path: The route or path.

            status_code: The HTTP status of the answer.

            duration: Seconds that the call took; goes out as integer milliseconds.

            fields: As for `emit`.
        """
        fields.setdefault("api_method", method)
        fields.setdefault("api_path", path)
        fields.setdefault("api_status_code", status_code)
        if duration is not None:
            fields.setdefault("api_duration_ms", _milliseconds(duration))
        return self.emit("api.response", **fields)

    def track_error(
        self,
        error: BaseException | str,
        message: str | None = None,
        /,
        **fields: Unpack[EventFields],
    ) -> bool:
        """
        Emit an `error` event: of an exception, or of a type and a message.

        An exception makes one event in a session, however often it is tracked there; a
        repetition returns False and is not counted as emitted.

        Args:
            error: The exception, or the name of the kind of error.

            message: What went wrong, where *error* is a name.

            fields: As for `emit`.
        """
        if self._sink is None:
            return self.emit("error", **fields)
        if isinstance(error, BaseException):
            try:
                session_id = self._session_id(fields.get("session_id"), current_frame())
                if not _errors.is_first_time(error, session_id or ""):
                    return False
                described = _errors.describe(
                    error, with_stack=self.config.capture_stack
                )
            except Exception as problem:  # noqa: BLE001  the host must not see our errors
                _diagnostics.internal_error(problem)
                described = {"error_type": type(error).__name__}
            for name, value in described.items():
                fields.setdefault(name, value)  # type: ignore[misc]
            if message is not None:
                fields["error_message"] = message
        else:
            fields.setdefault("error_type", error)
            if message is not None:
                fields.setdefault("error_message", message)
        return self.emit("error", **fields)

    def track_journey_step(
        self,
        journey_id: str,
        step_id: str,
        step_name: str | None = None,
        **fields: Unpack[EventFields],
    ) -> bool:
        """
        Emit a `journey.step` event: a step that was completed.

        Args:
            journey_id: The journey, such as `checkout_flow`.

            step_id: The step, such as `payment_confirmed`.

            step_name: The step as people call it.

            fields: As for `emit`.
        """
        fields.setdefault("journey_id", journey_id)
        fields.setdefault("journey_step_id", step_id)
        if step_name is not None:
            fields.setdefault("journey_step_name", step_name)
        return self.emit("journey.step", **fields)

    # --- the ledger and the end ---

    def adjust(self, reason: AdjustedReason) -> None:
        """Count a value of a block's that went on, but not as it was given."""
        self._ledger.adjust(reason)

    def drop(self, reason: DropReason) -> None:
        """Count an event that a block could not emit."""
        if self._sink is not None:
            self._ledger.emitted.add(1)
            self._ledger.drop(reason)

    def stats(self) -> Stats:
        """Return the ledger of this client, in this process."""
        return self._ledger.stats()

    def flush(self, timeout: float = 5.0) -> bool:
        """
        Wait until all that was emitted before the call came to an end.

        Args:
            timeout: Most seconds to wait, honoured to a tenth of a second.

        Returns:
            True if each of those events was delivered, rejected or dropped; False if
            some are still pending.  In `before_send` False at once.
        """
        return self._sink is None or self._sink.flush(timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """
        Flush, then stop for good; may be called again.

        Events that are left after *timeout* seconds are dropped as `shutdown`, events
        emitted afterwards as `closed`.

        Returns:
            Whether nothing was left.
        """
        self.is_closed = True
        return self._sink is None or self._sink.close(timeout)

    def retire(self) -> None:
        """Take no more events, and deliver what is left in the background."""
        if self._sink is not None:
            self._sink.retire()

    async def aflush(self, timeout: float = 5.0) -> bool:  # noqa: ASYNC109
        """Do what `flush` does without holding up the event loop (asyncio or trio)."""
        return await in_thread(self.flush, timeout)

    async def aclose(self, timeout: float = 5.0) -> bool:  # noqa: ASYNC109
        """Do what `close` does without holding up the event loop (asyncio or trio)."""
        return await in_thread(self.close, timeout)

    def _start_over(self) -> None:
        if self._sink is not None:
            self._sink.start_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def _refuse_keywords(unknown: Any) -> None:
    msg = f"emit() got an unexpected keyword argument {min(unknown)!r}"
    raise TypeError(msg)


def _milliseconds(seconds: object) -> object:
    try:
        return seconds * 1000  # type: ignore[operator]
    except Exception:  # noqa: BLE001  a bad value is counted where it is taken
        return seconds


async def in_thread(wait: Callable[[float], bool], timeout: float) -> bool:  # noqa: ASYNC109
    """Run *wait* in a thread of the running event loop's."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        done = await trio.to_thread.run_sync(wait, timeout, abandon_on_cancel=True)
        return bool(done)
    import asyncio  # noqa: PLC0415  slow to import, and here already

    return await asyncio.to_thread(wait, timeout)
