"""
`track_api` and `journey_step`, and `bind`, which only carries the correlation along.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, overload

import attrs

from pgtrack import _errors
from pgtrack._api import default_client
from pgtrack._blocks import Activation, ApiCall, part_frame
from pgtrack._context import current_frame
from pgtrack._observe import F, Run, Under, name_of, observe

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgtrack._client import Client
    from pgtrack._context import Request

__all__ = ["bind", "journey_step", "track_api"]


class _TrackedCall(ApiCall):
    """A run of a decorated function, whose result may say its status."""

    __slots__ = ("_status",)

    def __init__(
        self,
        client: Client,
        method: str | None,
        path: str,
        component: str,
        status: Callable[[Any], int] | int | None,
    ) -> None:
        self._status = status
        super().__init__(client, method, path, component)

    def answer(self, result: object) -> Any:
        """Return the given status, else what the result says, else 200."""
        status = self._status
        if callable(status):
            try:
                return status(result)
            except Exception:  # noqa: BLE001  the user's function may raise anything
                return None  # no status, so it is counted
        if status is not None:
            return status
        own = _errors.as_status(_errors.getattr_safely(result, "status_code"))
        return self.status_code if own is None else own


class _OwnFunction:
    """A run of a served request's own function, which its middleware tells."""

    __slots__ = ("_request",)

    def __init__(
        self, request: Request, method: str | None, path: str | None, component: str
    ) -> None:
        self._request = request
        request.given_method = method
        request.given_path = path
        request.component = component

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """Leave the *error* to the middleware, which knows what it was answered by."""
        del result
        if self._request.client is not None:  # else the request is over, and kept here
            self._request.error = error


@overload
def track_api(path: F, /) -> F: ...


@overload
def track_api(
    path: str | None = None,
    *,
    method: str | None = None,
    status: Callable[[Any], int] | int | None = None,
    client: Client | None = None,
) -> Callable[[F], F]: ...


def track_api(
    path: Any = None,
    *,
    method: str | None = None,
    status: Callable[[Any], int] | int | None = None,
    client: Client | None = None,
) -> Any:
    """
    Emit an `api.response` event for each call of the decorated function.

    Works bare and with arguments; on functions, coroutine functions, generators, async
    generators, methods, class and static methods in either order, and callables.
    Results, exceptions and signatures stay what they are, and arguments are never
    recorded.

    The status is the result's `status_code`, if that is an int in 100 to 599, else 200.
    An exception that carries a status gives that, a cancellation 499, any other 500.
    From 500 on there is an `error` event, too.

    In a request that a middleware of pgtrack's tells, the first such function is the
    request's own, and makes no event: its path and method, where given, go into the
    request's, whose status is that of the answer.  Functions that it calls, and those
    that run once the answer has begun, make events of their own.

    Args:
        path: The route or path.  By default that of the request whose own function it
            is, else the function's module and name.

        method: The HTTP method; by default that of such a request.

        status: The status, or a function of the result that returns it.

        client: Instead of the default client.

    Raises:
        TypeError: If what is decorated cannot be called, or is a class.
    """
    if path is not None and not isinstance(path, str):
        return _TrackApi(None, None, None, None)(path)
    return _TrackApi(path, method, status, client)


@attrs.frozen
class _TrackApi:
    """What `track_api` was given; decorates, and can be pickled."""

    path: str | None
    method: str | None
    status: Callable[[Any], int] | int | None
    client: Client | None

    def __call__(self, function: F) -> F:
        component = name_of(function)

        def start() -> Run | None:
            client = default_client() if self.client is None else self.client
            if not client.is_enabled:
                return None
            method, path = self.method, self.path
            frame = current_frame()
            request = None if frame is None else frame.request
            if request is not None and request.claim():
                if request.client is client:
                    return _OwnFunction(request, method, path, component)
                method = method or request.method
                path = path or request.best_path()
            return _TrackedCall(
                client, method, path or component, component, self.status
            )

        return observe(function, start, self)


class _Step(Activation):
    """A run of a decorated function that is a step of a journey."""

    __slots__ = ("_client", "_component", "_journey_id", "_started", "_step")

    def __init__(
        self,
        client: Client,
        journey_id: str | None,
        step: tuple[str, str | None],
        component: str,
    ) -> None:
        self._client = client
        self._component = component
        self._step = step
        frame = part_frame(journey_id, step)
        self._journey_id = frame.journey_id
        self._started = time.perf_counter()
        super().__init__(frame)

    def tell(self, error: BaseException | None, result: object) -> None:
        """Emit the step, or the error that kept it from being completed."""
        del result
        duration = time.perf_counter() - self._started
        if error is not None:
            if _errors.is_failure(error):
                self._client.track_error(error, error_component=self._component)
        elif self._journey_id is None:
            self._client.drop("no_journey")
        else:
            self._client.track_journey_step(
                self._journey_id, *self._step, duration_ms=duration * 1000
            )


def journey_step(
    step_id: str,
    step_name: str | None = None,
    *,
    journey: str | None = None,
    client: Client | None = None,
) -> Callable[[F], F]:
    """
    Emit a `journey.step` event each time the decorated function completes.

    With its duration; a generator completes when it is exhausted or closed.  A call
    that raises makes an `error` event with the journey's fields, and no step.  Without
    a journey, given or active, the step is dropped and counted as `no_journey`.

    Args:
        step_id: The step, such as `payment_confirmed`.

        step_name: The step as people call it.

        journey: The journey; by default that of the enclosing `with journey(...)`.

        client: Instead of the default client.

    Raises:
        TypeError: If *step_id* is no text, what is decorated cannot be called, or is a
            class.
    """
    given: object = step_id
    if not isinstance(given, str):
        msg = (
            f"journey_step needs the id of the step (got {type(given).__name__}). "
            'Use @journey_step("payment_confirmed").'
        )
        raise TypeError(msg)

    return _JourneyStep(step_id, step_name, journey, client)


@attrs.frozen
class _JourneyStep:
    """What `journey_step` was given; decorates, and can be pickled."""

    step_id: str
    step_name: str | None
    journey: str | None
    client: Client | None

    def __call__(self, function: F) -> F:
        component = name_of(function)
        step = (self.step_id, self.step_name)

        def start() -> _Step | None:
            client = default_client() if self.client is None else self.client
            if not client.is_enabled:
                return None
            return _Step(client, self.journey, step, component)

        return observe(function, start, self)


def bind(function: F) -> F:
    """
    Return *function* so that it runs under the present correlation.

    For threads, executors and callbacks; `identify` inside is seen by the request or
    session that the function was bound in.  The correlation around the call is left as
    it was.

    Args:
        function: Anything that can be called, but for a class.

    Raises:
        TypeError: If it cannot be called, or is a class.
    """
    frame = current_frame()
    return observe(function, lambda: Under(frame), bind)
