"""
The client: from the arguments of a verb to the worker's queue.

`emit` never waits and never raises for a value.  It takes no lock, so that a signal
handler, a finaliser or a log handler may call it in the middle of itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pgtrack import _diagnostics, _errors, _process, _tracing
from pgtrack._clock import SYSTEM_CLOCK, seconds
from pgtrack._context import (
    Frame,
    current_frame,
    is_session_id,
    process_session_id,
)
from pgtrack._event import KEYWORDS, EventFields, StepFields
from pgtrack._keys import KeyRule
from pgtrack._ledger import AdjustedReason, DropReason, Ledger, Stats
from pgtrack._limits import RateLimit, is_sampled
from pgtrack._record import (
    RECORD_SIZE,
    SPAN_SIZE,
    Encoder,
    Record,
    take_field,
    take_id,
    take_metadata,
    take_time,
    take_type,
)
from pgtrack._retry import RetryPolicy
from pgtrack._transport import HttpTransport
from pgtrack._worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import TypeGuard

    from typing_extensions import Self, Unpack

    from pgtrack._config import Config
    from pgtrack._spool import Spool
    from pgtrack.typing import Clock, EventType, IdFactory, Transport

__all__ = ["Client", "Sink", "in_thread", "spells_out"]


F = TypeVar("F", bound="Callable[..., bool]")

_FIELDS = [
    inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=getattr(annotation, "__forward_arg__", annotation),
    )
    for name, annotation in EventFields.__annotations__.items()
]


def spells_out(verb: F) -> F:
    """Let `help` and `inspect.signature` show the fields that `**fields` stands for."""
    signature = inspect.signature(verb)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = [p for p in _FIELDS if p.name not in signature.parameters]
    shown = signature.replace(parameters=[*own, *fields])
    verb.__signature__ = shown  # type: ignore[attr-defined]
    return verb


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


def transport_of(config: Config) -> Transport:
    """Return the transport for the endpoint of *config*."""
    endpoint = str(config.endpoint)
    if endpoint.startswith("console:"):
        from pgtrack._console import ConsoleTransport  # noqa: PLC0415  one of three

        name = endpoint.removeprefix("console:") or "stdout"
        return ConsoleTransport(name)  # type: ignore[arg-type]
    if endpoint.startswith("file:"):
        from pgtrack._file import FileTransport  # noqa: PLC0415  one of three

        return FileTransport(endpoint.removeprefix("file:"))
    return HttpTransport(config)


class Client:
    """
    Sends events to one endpoint.

    Safe to use from any thread, task, signal handler or finaliser, and across forks: a
    child starts with an empty queue and ledger.  Leaving `with Client(...)` closes it.

    Args:
        config: The settings; a disabled config makes a client that does nothing.

        transport: Makes what carries the events, instead of the endpoint's own; called
            once in each process.

        clock: Tells the time, instead of the machine's.

        ids: Makes event ids, instead of random UUIDs.
    """

    is_pinned = False
    """Whether `configure` leaves the client in its place."""

    def __init__(
        self,
        config: Config,
        *,
        transport: Callable[[], Transport] | None = None,
        clock: Clock | None = None,
        ids: IdFactory | None = None,
    ) -> None:
        self.config = config
        self._make_transport = transport
        self._clock = SYSTEM_CLOCK if clock is None else clock
        self._ledger = Ledger()
        self._rule = KeyRule(config.redact_keys)
        self._sample_rate = config.sample_rate
        self._rate_limit = (
            None
            if config.session_rate_limit is None
            else RateLimit(config.session_rate_limit)
        )
        self.is_closed = False
        self._sink: Sink | None = None
        if config.enabled:
            if config.debug:
                _diagnostics.show_details()
            encoder = Encoder(config, self._rule, self._ledger, ids)
            self._sink = self._make_sink(encoder, transport)

    def _make_sink(
        self, encoder: Encoder, transport: Callable[[], Transport] | None
    ) -> Sink:
        spool = self._make_spool()
        worker = Worker(
            config=self.config,
            encoder=encoder,
            transport=transport or functools.partial(transport_of, self.config),
            ledger=self._ledger,
            policy=RetryPolicy(),
            clock=self._clock,
            spool=spool,
        )
        _process.adopt(worker, self.config)
        if spool is not None and spool.has_others:
            worker.start()  # some may be dead, and their events wait
        return worker

    def _make_spool(self) -> Spool | None:
        if self.config.spool_dir is None:
            return None
        from pgtrack._spool import Spool  # noqa: PLC0415  for whoever wants one

        return Spool(self.config, self._ledger, self._clock)

    @property
    def is_enabled(self) -> bool:
        """Whether the client sends anything."""
        return self._sink is not None

    def is_like(
        self, config: Config, transport: Callable[[], Transport] | None
    ) -> bool:
        """Whether the client is open, and would be made the same of these."""
        is_same = self.config == config and self._make_transport == transport
        return is_same and not self.is_closed

    def __repr__(self) -> str:
        state = self.config.endpoint if self.is_enabled else "disabled"
        return f"<Client {self.config.project_id} {state}>"

    # --- the verbs ---

    @spells_out
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
            _refuse_unknown("emit", fields)
        sink = self._sink
        if sink is None:
            return False
        self._ledger.emitted.add(1)
        try:
            record = self._record(event_type, fields)  # type: ignore[arg-type]
        except BaseException as error:
            self._ledger.drop("internal_error")
            if not isinstance(error, Exception):  # the host's, such as Ctrl-C
                raise
            _diagnostics.internal_error(error)
            return False
        if isinstance(record, str):
            self._drop(record)
            return False
        return sink.put(record)

    def _record(
        self, event_type: object, fields: dict[str, Any]
    ) -> Record | DropReason:
        """Take what the event is made of, or say why there is none."""
        frame = current_frame()
        if frame is not None and frame.is_suppressed:
            return "suppressed"
        kind = take_type(event_type, self._rule)
        if kind is None:
            return "invalid_event_type"
        session_id = self._session_id(fields.pop("session_id", None), frame)
        if session_id is None:
            return "no_session"
        is_error = kind == "error"
        reason = self._limited(session_id, frame, is_error=is_error)
        if reason is not None:
            return reason
        now = self._clock.time_ns()
        moment = fields.pop("timestamp", None)
        if moment is not None:
            now = take_time(moment, now, self._ledger)
        request_id = fields.pop("request_id", None)
        if request_id is not None:
            request_id = take_id("request_id", request_id, self._ledger)
        given = fields.pop("metadata", None)
        span = None if _tracing.tracer is None else _tracing.present_span()
        size = RECORD_SIZE if span is None else RECORD_SIZE + SPAN_SIZE
        if given is not None:
            given, taken = take_metadata(given, self._rule, self._ledger)
            size += taken
        if fields.get("user_id", _NOT_GIVEN) is None:
            del fields["user_id"]
        size += self._take_fields(fields)
        inherited: Any = {}
        if frame is not None:
            request_id = request_id or frame.request_id
            inherited = self._inherited(frame)
            _correlate(fields, frame, session_id, is_error=is_error)
        return now, kind, session_id, request_id, inherited, fields, given, span, size

    def _take_fields(self, fields: dict[str, Any]) -> int:
        """Put what the wire can carry in the place of each value; return the size."""
        size = 0
        for name, value in fields.items():
            if value is not None:
                fields[name], taken = take_field(name, value, self._rule, self._ledger)
                size += taken
        return size

    def _limited(
        self, session_id: str, frame: Frame | None, *, is_error: bool
    ) -> DropReason | None:
        """Return why the event is one too many, if it is."""
        rate = self._sample_rate
        if rate < 1.0 and not is_error and not is_sampled(session_id, rate):
            return "sampled"
        limit = self._rate_limit
        if limit is None or frame is None or not frame.is_remote:
            return None
        if session_id != frame.session_id:
            return None
        now = self._clock.monotonic()
        return None if limit.allows(session_id, now) else "rate_limited"

    def _session_id(self, given: object, frame: Frame | None) -> str | None:
        """Return the session of an event; a wrong one that was *given* is counted."""
        if given is not None:
            session_id = self.checked_session_id(given)
            if session_id is not None:
                return session_id
        return self._present_session(frame)

    def _present_session(self, frame: Frame | None) -> str | None:
        if frame is not None and frame.session_id is not None:
            return frame.session_id
        return process_session_id() if self.config.default_session else None

    def _inherited(self, frame: Frame) -> Any:
        """Return the frame's metadata, redacted by this client's rule, once a frame."""
        if not frame.metadata:
            return frame.metadata
        redacted = frame.redacted.get(self._rule)
        if redacted is None:
            redacted, _ = take_metadata(frame.metadata, self._rule, self._ledger)
            frame.redacted[self._rule] = redacted
        return redacted

    def checked_session_id(self, given: object) -> str | None:
        """Return *given* as a session id; None, counted, if it cannot be one."""
        session_id = take_id("session_id", given, self._ledger)
        format = self.config.session_id_format  # noqa: A001
        if session_id is None or is_session_id(session_id, format):
            return session_id
        self._ledger.adjust("session_id")
        return None

    def checked_user_id(self, given: object) -> str | None:
        """Return *given* as a user id; None, counted, if it cannot be one."""
        return take_id("user_id", given, self._ledger)

    @spells_out
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
        _refuse_unknown("track_api_call", fields)
        fields.setdefault("api_method", method)
        fields.setdefault("api_path", path)
        fields.setdefault("api_status_code", status_code)
        if duration is not None:
            fields.setdefault("api_duration_ms", _milliseconds(duration))
        return self.emit("api.response", **fields)

    @spells_out
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
        _refuse_unknown("track_error", fields)
        if self._sink is None:
            return False
        if _is_exception(error):
            if not self._describe(error, fields):
                return False
            if message is not None:
                fields["error_message"] = message
        else:
            fields.setdefault("error_type", error)  # type: ignore[typeddict-item]
            if message is not None:
                fields.setdefault("error_message", message)
        return self.emit("error", **fields)

    def _describe(self, error: BaseException, fields: EventFields) -> bool:
        """Fill in what *error* was; False if the session was told of it before."""
        try:
            given = fields.get("session_id")
            if type(given) is not str or not is_session_id(given):
                given = self._present_session(current_frame())
            if not _errors.is_first_time(error, given or ""):
                return False
            with_stack = self.config.capture_stack
            for name, value in _errors.describe(error, with_stack=with_stack).items():
                fields.setdefault(name, value)  # type: ignore[misc]
        except Exception as problem:  # noqa: BLE001  the host must not see our errors
            _diagnostics.internal_error(problem)
            fields.setdefault("error_type", type(error).__name__)
        return True

    @spells_out
    def track_journey_step(
        self,
        journey_id: str,
        step_id: str,
        step_name: str | None = None,
        **fields: Unpack[StepFields],
    ) -> bool:
        """
        Emit a `journey.step` event: a step that was completed.

        Args:
            journey_id: The journey, such as `checkout_flow`.

            step_id: The step, such as `payment_confirmed`.

            step_name: The step as people call it.

            fields: As for `emit`.
        """
        _refuse_unknown("track_journey_step", fields)
        fields.setdefault("journey_step_id", step_id)
        if step_name is not None:
            fields.setdefault("journey_step_name", step_name)
        return self.emit("journey.step", journey_id=journey_id, **fields)

    # --- the ledger and the end ---

    def adjust(self, reason: AdjustedReason) -> None:
        """Count a value of a block's that went on, but not as it was given."""
        self._ledger.adjust(reason)

    def drop(self, reason: DropReason) -> None:
        """Count an event that a block could not emit."""
        if self._sink is not None:
            self._ledger.emitted.add(1)
            self._drop(reason)

    def _drop(self, reason: DropReason) -> None:
        self._ledger.drop(reason)
        if reason not in _EXPECTED:
            _diagnostics.note(
                f"dropped {reason}",
                f"pgtrack dropped an event: {reason}. docs/delivery.md says why; "
                f"pgtrack.stats().dropped[{reason!r}] counts them.",
            )

    def stats(self) -> Stats:
        """Return the ledger of this client, in this process."""
        return self._ledger.stats()

    def flush(self, timeout: float = 5.0) -> bool:
        """
        Wait until all that was emitted before the call came to an end.

        Args:
            timeout: Most seconds to wait, honoured to a tenth of a second; `math.inf`
                waits for as long as it takes.

        Returns:
            True if each of those events was delivered, rejected or dropped; False if
            some are still pending.  In `before_send` False at once.

        Raises:
            TypeError: If *timeout* is no number.
        """
        timeout = seconds(timeout)
        if self._sink is None:
            _diagnostics.tell()  # as the sinks do
            return True
        return self._sink.flush(timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """
        Flush, then stop for good; may be called again.

        Events that are left after *timeout* seconds are dropped as `shutdown`, or rest
        in the spool; events emitted afterwards are dropped as `closed`.

        Returns:
            Whether nothing was left, or all of it is in the spool.

        Raises:
            TypeError: If *timeout* is no number.
        """
        timeout = seconds(timeout)
        self.is_closed = True
        return self._sink is None or self._sink.close(timeout)

    @property
    def has_ended(self) -> bool:
        """Whether every event that was taken came to an end."""
        return self._ledger.pending.value == 0 and self._ledger.spooled.value == 0

    def retire(self) -> None:
        """Take no more events, and deliver what is left in the background."""
        if self._sink is not None:
            self._sink.retire()

    async def aflush(self, timeout: float = 5.0) -> bool:
        """Do what `flush` does without holding up the event loop (asyncio or trio)."""
        return await in_thread(self.flush, timeout)

    async def aclose(self, timeout: float = 5.0) -> bool:
        """Do what `close` does without holding up the event loop (asyncio or trio)."""
        return await in_thread(self.close, timeout)

    def __copy__(self) -> Self:
        """Return the client itself: there is one queue, and one thread."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the client itself."""
        return self

    def __reduce__(self) -> str:
        """Refuse: a queue and a thread cannot go to another process."""
        msg = "a Client cannot be pickled. Pickle its config, and make a Client of it."
        raise TypeError(msg)

    def __del__(self) -> None:
        """Deliver what is left in the background, and let the thread go."""
        if getattr(self, "_sink", None) is not None:  # not if __init__ raised
            self.retire()

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


def _refuse_unknown(verb: str, fields: StepFields) -> None:
    """Raise what Python does for a keyword that a function lacks."""
    unknown = fields.keys() - KEYWORDS
    if unknown:
        msg = f"{verb}() got an unexpected keyword argument {min(unknown)!r}"
        raise TypeError(msg)


_NOT_GIVEN: Any = object()

_EXPECTED: frozenset[DropReason] = frozenset({"rate_limited", "sampled", "suppressed"})
"""What is dropped because a setting, or pgtrack itself, says so: no line for it."""


def _is_exception(value: object) -> TypeGuard[BaseException]:
    """Return whether *value* is an exception; `isinstance` can be lied to, or fail."""
    return issubclass(type(value), BaseException)


def _correlate(
    fields: dict[str, Any], frame: Frame, session_id: str, *, is_error: bool
) -> None:
    """Fill in the user and the journey of *frame* where the event has none."""
    if session_id != frame.session_id and frame.session_id is not None:
        return  # they belong to their session, and do not go with another
    # Not for a user that was given and cannot be one: nobody is better than another.
    fields.setdefault("user_id", frame.cell.user_id)
    if fields.get("journey_id") is None and frame.journey_id is not None:
        fields["journey_id"] = frame.journey_id
        if is_error and frame.step is not None:
            fields.setdefault("journey_step_id", frame.step[0])
            fields.setdefault("journey_step_name", frame.step[1])


def _milliseconds(seconds: Any) -> Any:
    """Return milliseconds; what is no number is counted where the field is taken."""
    try:
        return seconds if isinstance(seconds, timedelta) else float(seconds) * 1000
    except Exception:  # noqa: BLE001  the value's own code may raise anything
        return seconds


async def in_thread(wait: Callable[[float], bool], timeout: float) -> bool:
    """Run *wait* in a thread of the running event loop's."""
    timeout = seconds(timeout)  # an error here, rather than in the thread
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        is_done = await trio.to_thread.run_sync(wait, timeout, abandon_on_cancel=True)
        return bool(is_done)
    import asyncio  # noqa: PLC0415  slow to import, and here already

    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()

    def settle(result: bool) -> None:  # noqa: FBT001  passed on as it came
        if not done.done():
            done.set_result(result)

    def work() -> None:
        result = wait(timeout)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, result)

    # Not the loop's executor: that may be busy, and its end waits for its threads.
    threading.Thread(target=work, name="pgtrack-wait", daemon=True).start()
    return await done
