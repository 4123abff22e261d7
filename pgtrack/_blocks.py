"""
The blocks: sessions, journeys, calls, and the other side of a hand-off.

A block is a recipe that can be entered any number of times, also at once in several
threads and tasks.  Each time it makes an `Activation`, which has a frame of its own,
holds what this one run knows, and says what is to be told when it is left.  The
decorators use the same.
"""

from __future__ import annotations

import abc
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pgtrack import _diagnostics, _errors, _propagation, _tracing
from pgtrack._api import default_client
from pgtrack._clock import new_id
from pgtrack._context import (
    Cell,
    Frame,
    current_frame,
    new_session_id,
    pop,
    push,
    switch,
)
from pgtrack._observe import F, observe
from pgtrack._snapshot import KEEP_ALL, snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Unpack

    from pgtrack._client import Client
    from pgtrack._event import EventFields, StepFields
    from pgtrack._propagation import Headers

__all__ = [
    "Activation",
    "ApiCall",
    "Block",
    "Journey",
    "api_call",
    "continued_from",
    "journey",
    "session",
]


class Activation:
    """
    One run of a block.

    Attributes:
        frame: What the run pushed.
    """

    __slots__ = ("frame",)

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        push(frame)

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """End the run, by *error* or with the *result* of a decorated function."""
        try:
            self.tell_inside(error, result)
        finally:
            pop(self.frame)

    def tell_inside(
        self, error: BaseException | None = None, result: object = None
    ) -> None:
        """
        Tell what there is to tell, inside of the run.

        It belongs to the run's own frame, also where a block that straddles a `yield`
        is left in another context.  Nothing of our own leaves here: the host goes on
        with its own result or error.
        """
        outside = switch(self.frame)
        try:
            self.tell(error, result)
        except Exception as problem:  # noqa: BLE001  the host must not see our errors
            _diagnostics.internal_error(problem)
        finally:
            switch(outside)

    def tell(self, error: BaseException | None, result: object) -> None:
        """Emit what is to be told at the end."""


A = TypeVar("A", bound=Activation)


class Block(abc.ABC, Generic[A]):
    """
    A recipe for runs: a context manager, sync and async, and a decorator.

    As a decorator of a generator it is entered around each step, not around the body,
    so that the consumer never runs inside of it.
    """

    def __init__(self, client: Client | None, first: object = None) -> None:
        if callable(first):
            verb = type(self).__name__
            msg = (
                f"{verb} must be called to decorate (got a function). Use @{verb}(...)."
            )
            raise TypeError(msg)
        self._client = client
        self._entered: dict[int, A] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the runs behind: a copy, or what is pickled, is the recipe alone."""
        return {**self.__dict__, "_entered": {}}

    @property
    def client(self) -> Client:
        """The client of the block, else the default one."""
        return default_client() if self._client is None else self._client

    @abc.abstractmethod
    def activate(self) -> A:
        """Begin a run."""

    def __enter__(self) -> A:
        activation = self.activate()
        self._entered[activation.frame.key] = activation
        return activation

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A generator that is closed has completed, and so have the blocks in it.
        is_closed = isinstance(error, GeneratorExit)
        run = self._innermost()
        if run is None:
            _diagnostics.note(
                "left elsewhere",
                f"a block of {type(self).__name__} was left in another context while "
                "several had entered it: which run has ended is unknown, and not told.",
            )
            self.client.drop("left_elsewhere")
        else:
            run.leave(None if is_closed else error)

    async def __aenter__(self) -> A:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)

    def __call__(self, function: F) -> F:
        """Decorate *function*: each call is a run of the block."""
        return observe(function, self.activate, self)

    def _innermost(self) -> A | None:
        """
        Take out the run that is left: this context's innermost, else the only one.

        None if several are under way, and none of them in this context.
        """
        frame = current_frame()
        while frame is not None:
            activation = self._entered.pop(frame.key, None)
            if activation is not None:
                return activation
            frame = frame.parent
        last = self._entered.popitem()[1]
        return last if not self._entered else None


# --- sessions ---


class SessionRun(Activation):
    """A session under way."""

    __slots__ = ()

    @property
    def session_id(self) -> str:
        """The id of the session."""
        return str(self.frame.session_id)


class session(Block[SessionRun]):  # noqa: N801  a verb, used as `with session(...)`
    """
    Put what happens inside into one session.

    A context manager, sync and async, and a decorator.  Another session starts with no
    user and no journey; the request id and metadata carry over.  The session that is
    already active may be entered again, and is then gone on with.

    Args:
        session_id: 1 to 128 ASCII letters, digits and `_.:-`, a letter or digit first
            (a UUID with `session_id_format="uuid"`).  None makes a new one for each
            entry, as does an id that does not fit, which is counted.

        user_id: The user, as for `identify`.

        metadata: Added to the metadata of each event inside.

        client: Instead of the default client, for the counts and the format of ids.
    """

    def __init__(
        self,
        session_id: str | None = None,
        *,
        user_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        client: Client | None = None,
    ) -> None:
        super().__init__(client, session_id)
        self._session_id = session_id
        self._user_id = user_id
        self._metadata = metadata

    def activate(self) -> SessionRun:
        """Begin the session."""
        client = self.client
        session_id = self._session_id
        if session_id is not None:
            session_id = client.checked_session_id(session_id)
        if session_id is None:
            session_id = new_session_id(format=client.config.session_id_format)
        user_id = self._user_id
        has_user = user_id is not None
        if has_user:
            user_id = client.checked_user_id(user_id)
        metadata = _as_dict(self._metadata)
        frame = session_frame(session_id, user_id=user_id, metadata=metadata)
        if has_user and user_id is None:
            frame.cell = Cell()  # nobody is better than the user of before
        return SessionRun(frame)


def _as_dict(metadata: object) -> dict[str, Any]:
    """Return a snapshot of *metadata*, whatever was given, not yet redacted."""
    if metadata is None:
        return {}
    taken = snapshot(metadata, KEEP_ALL).value
    return taken if isinstance(taken, dict) else {"value": taken}


def session_frame(
    session_id: str,
    *,
    around: Frame | None = None,
    user_id: str | None = None,
    request_id: str | None = None,
    journey_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    is_remote: bool = False,
) -> Frame:
    """Return a frame for a session, which inherits from *around*, else the present."""
    parent = current_frame()
    if around is None:
        around = _OUTSIDE if parent is None else parent
    is_same = around.session_id == session_id
    return Frame(
        parent,
        session_id=session_id,
        request_id=request_id or around.request_id,
        journey_id=journey_id or (around.journey_id if is_same else None),
        step=around.step if is_same and journey_id is None else None,
        metadata={**around.metadata, **metadata} if metadata else around.metadata,
        cell=around.cell if is_same and user_id is None else Cell(user_id),
        is_remote=is_remote or (is_same and around.is_remote),
        is_suppressed=around.is_suppressed,
        request=around.request,
    )


_OUTSIDE = Frame(None)
"""What there is to inherit from where there is no frame: nothing."""


class continued_from(Block[SessionRun]):  # noqa: N801  a verb, used as `with ...`
    """
    Go on with the correlation that another service, queue or job handed over.

    Without a valid session in the headers the block has a fresh one of its own
    (`srv-<uuid>`), and without a valid request id a new UUID.

    Args:
        headers: Any mapping, or pairs, of header names and values, as text or bytes.
            Values that do not fit their grammar are as good as absent, and counted.

        trusted: Whether outsiders cannot write these headers: `X-User-ID` and
            `X-Journey-ID` are then read as well.  With the setting `trust_user_header`
            `X-User-ID` always is.

        client: Instead of the default client, for the counts and the format of ids.
    """

    def __init__(
        self,
        headers: Headers,
        trusted: bool = False,  # noqa: FBT001, FBT002  the design's signature
        *,
        client: Client | None = None,
    ) -> None:
        super().__init__(client)
        self._headers = headers
        self._is_trusted = trusted

    def activate(self) -> SessionRun:
        """Read the headers and begin the session."""
        return SessionRun(
            continued_frame(self._headers, self.client, is_trusted=self._is_trusted)
        )


def continued_frame(
    headers: Headers,
    client: Client,
    *,
    is_trusted: bool = False,
    is_apart: bool = False,
) -> Frame:
    """
    Return a frame that goes on with the correlation in *headers*.

    Args:
        headers: As for `continued_from`.

        client: Has the settings, and counts what is refused.

        is_trusted: Whether outsiders cannot write the headers.

        is_apart: Whether nothing, metadata neither, comes from the present frame: it
            is that of whoever started the server, or of the request before.  Who
            leaves the frame has to put the present one back.
    """
    format = client.config.session_id_format  # noqa: A001
    try:
        incoming = _propagation.extract(
            headers,
            session_id_format=format,
            is_trusted=is_trusted,
            is_user_trusted=client.config.trust_user_header,
        )
    except Exception as error:  # noqa: BLE001  what is no headers may raise anything
        kind = type(headers).__name__
        _diagnostics.note(
            "headers",
            "continued_from() needs a mapping or pairs of header names and values "
            f"(got {kind}: {type(error).__name__}). The session is a new one.",
        )
        incoming = _propagation.Incoming()
    for field in incoming.refused:
        client.adjust(field)
    frame = session_frame(
        incoming.session_id or new_session_id("srv-", format),
        around=_OUTSIDE if is_apart else None,
        user_id=incoming.user_id,
        request_id=incoming.request_id or new_id(),
        journey_id=incoming.journey_id,
        is_remote=incoming.session_id is not None,
    )
    if frame.parent is None or frame.session_id != frame.parent.session_id:
        frame.request = None  # it is another piece of work
    if is_apart:
        # Else each would keep the one before, where a server begins to serve the next
        # in the context of the last, as uvicorn does.
        frame.parent = None
        _tracing.begun(frame)
    return frame


# --- journeys ---


class Journey(Activation):
    """
    A journey under way: tell its steps, and how it ended.

    Attributes:
        journey_id: The journey.
    """

    __slots__ = ("_client", "_has_ended", "journey_id")

    def __init__(self, journey_id: str, client: Client) -> None:
        frame = part_frame(journey_id)
        self._client = client
        self._has_ended = False
        self.journey_id = str(frame.journey_id)
        super().__init__(frame)

    def step(
        self, step_id: str, step_name: str | None = None, **fields: Unpack[StepFields]
    ) -> bool:
        """
        Emit a `journey.step` event.

        Args:
            step_id: The step, such as `payment`.

            step_name: The step as people call it.

            fields: As for `emit`.
        """
        return self._client.track_journey_step(
            self.journey_id, step_id, step_name, **fields
        )

    def convert(self, **fields: Unpack[EventFields]) -> bool:
        """Emit that the journey reached its goal."""
        return self._end("converted", fields)

    def abandon(self, reason: str | None = None, **fields: Unpack[EventFields]) -> bool:
        """Emit that the journey was given up; *reason* goes into the metadata."""
        if reason is not None:
            metadata = _as_dict(fields.get("metadata"))
            fields["metadata"] = {**metadata, "reason": reason}
        return self._end("abandoned", fields)

    def _end(self, status: str, fields: EventFields) -> bool:
        # The names the real frontend uses: ProductGraph's type list has no conversion.
        self._has_ended = True
        fields.setdefault("name", "journey_conversion")
        fields.setdefault("journey_id", self.journey_id)
        fields.setdefault("journey_conversion_status", status)
        return self._client.emit("custom", **fields)

    def tell(self, error: BaseException | None, result: object) -> None:
        """Abandon the journey if an exception ends it before it did."""
        del result
        if error is not None and not self._has_ended:
            self.abandon(type(error).__name__)


class journey(Block[Journey]):  # noqa: N801  a verb, used as `with journey(...)`
    """
    Put what happens inside into a journey, a funnel that product managers look at.

    A context manager, sync and async, and a decorator.  Each event inside carries the
    journey's id.  A journey that an exception leaves is abandoned, unless it was
    converted or abandoned before.

    Args:
        journey_id: The journey, such as `checkout_flow`.

        client: Instead of the default client.
    """

    def __init__(self, journey_id: str, *, client: Client | None = None) -> None:
        super().__init__(client, journey_id)
        self._journey_id = journey_id

    def activate(self) -> Journey:
        """Begin the journey."""
        return Journey(self._journey_id, self.client)


def part_frame(
    journey_id: Any = None, step: tuple[str, str | None] | None = None
) -> Frame:
    """Return a frame for a part of the present unit of work, if any."""
    if journey_id is not None and not isinstance(journey_id, str):
        journey_id = str(snapshot(journey_id, KEEP_ALL).value)  # such as a UUID
    parent = current_frame()
    if parent is None:
        return Frame(None, journey_id=journey_id, step=step)
    return parent.child(journey_id=journey_id, step=step)


# --- calls ---


class ApiCall(Activation):
    """
    A call under way; the `api.response` event is emitted when it is left.

    Attributes:
        method: The HTTP method, or None.

        path: The route or path.

        status_code: The HTTP status to tell; set it where 200 is not the answer.
    """

    __slots__ = ("_component", "_started", "client", "method", "path", "status_code")

    def __init__(
        self,
        client: Client,
        method: str | None,
        path: str | None,
        component: str | None = None,
        frame: Frame | None = None,
    ) -> None:
        self._component = component
        self.client = client
        self.method = method
        self.path = path
        self.status_code: int = 200
        self._started = time.perf_counter()
        super().__init__(part_frame() if frame is None else frame)

    def tell(self, error: BaseException | None, result: object) -> None:
        """Emit the response, and before it the error that a 500 stands for."""
        duration = time.perf_counter() - self._started
        status = self.answer(result) if error is None else _errors.status_of(error)
        checked = _errors.as_status(status)
        if checked is None:
            self.client.adjust("status_code")
            checked = 200
        self.tell_response(checked, duration, error)

    def tell_response(
        self,
        status: int,
        duration: float,
        error: BaseException | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Emit a response with this *status*, and before it the error of a 500."""
        if status >= 500:  # noqa: PLR2004
            self.tell_error(error, status)
        fields: dict[str, Any] = {
            "api_path": self.path,
            "api_status_code": status,
            "api_duration_ms": duration * 1000,
        }
        if self.method is not None:
            fields["api_method"] = self.method
        if metadata:
            fields["metadata"] = metadata
        self.client.emit("api.response", **fields)

    def answer(self, result: object) -> int:
        """Return the status of a call that came to its end."""
        del result
        return self.status_code

    def tell_error(self, error: BaseException | None, status: int) -> None:
        """Emit the *error*, or that there is none but this *status*."""
        if error is None:
            self.client.emit(
                "error",
                error_type=str(status),
                error_message=_errors.phrase(status),
                error_component=self._component,
            )
        elif _errors.is_failure(error):
            self.client.track_error(error, error_component=self._component)


class api_call(Block[ApiCall]):  # noqa: N801  a verb, used as `with api_call(...)`
    """
    Emit an `api.response` event for what happens inside, with its duration.

    A context manager, sync and async, and a decorator.

    Args:
        method: The HTTP method.

        path: The route or path; templates (`/users/{id}`) make better statistics.

        client: Instead of the default client.
    """

    def __init__(
        self,
        method: str | None = None,
        path: str | None = None,
        *,
        client: Client | None = None,
    ) -> None:
        super().__init__(client, method)
        self._method = method
        self._path = path

    def activate(self) -> ApiCall:
        """Begin the call."""
        return ApiCall(self.client, self._method, self._path)
