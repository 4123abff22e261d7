"""
`track_api` and `journey_step`, and what all decorators share: `observe`.

A plain function or coroutine function is wrapped in a function of the same kind: it
binds, pickles, copies and introspects as functions do, and costs least.  Whatever else
can be called, and generators, whose correlation is that of the call rather than of the
first step, are wrapped by wrapt, whose proxies show the wrapped object in every respect.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
import time
import types
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any, overload

import attrs
import wrapt

from pgtrack import _errors
from pgtrack._api import default_client
from pgtrack._blocks import Activation, ApiCall, F, part_frame
from pgtrack._context import Frame, current_frame, switch

if TYPE_CHECKING:
    from pgtrack._client import Client

__all__ = ["bind", "journey_step", "observe", "track_api"]

Start = Callable[[], "Activation | None"]
"""Begins a run, pushing its frame; None where nothing is to be observed."""


# --- the decorators ---


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

    def tell(self, error: BaseException | None, result: object) -> None:
        """Read the status off the result before telling."""
        if error is None:
            self.status_code = self._status_of(result)
        super().tell(error, result)

    def _status_of(self, result: object) -> Any:
        status = self._status
        if callable(status):
            try:
                return status(result)
            except Exception:  # noqa: BLE001  the user's function may raise anything
                self._client.adjust("status_code")
                return 200
        if status is not None:
            return status
        own = _errors.as_status(_errors.getattr_safely(result, "status_code"))
        return 200 if own is None else own


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
    generators, methods, class and static methods in either order, and callables.  Results,
    exceptions and signatures stay what they are, and arguments are never recorded.

    The status is the result's `status_code`, if that is an int in 100 to 599, else 200.
    An exception that carries a status gives that, a cancellation 499, any other 500.
    From 500 on there is an `error` event, too.

    Args:
        path: The route or path.  By default the function's module and name.

        method: The HTTP method.

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
        component = _name_of(function)
        path = self.path or component

        def start() -> _TrackedCall | None:
            client = default_client() if self.client is None else self.client
            if not client.is_enabled:
                return None
            return _TrackedCall(client, self.method, path, component, self.status)

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
        if error is not None and not isinstance(error, GeneratorExit):
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
    name: str | None = None,
    *,
    journey: str | None = None,
    client: Client | None = None,
) -> Callable[[F], F]:
    """
    Emit a `journey.step` event each time the decorated function completes.

    With its duration; a generator completes when it is exhausted or closed.  A call that
    raises makes an `error` event with the journey's fields, and no step.  Without a journey,
    given or active, the step is dropped and counted as `no_journey`.

    Args:
        step_id: The step, such as `payment_confirmed`.

        name: The step as people call it.

        journey: The journey; by default that of the enclosing `with journey(...)`.

        client: Instead of the default client.

    Raises:
        TypeError: If *step_id* is no text, what is decorated cannot be called, or is a
            class.
    """
    if not isinstance(step_id, str):
        msg = (
            f"journey_step needs the id of the step (got {type(step_id).__name__}). "
            'Use @journey_step("payment_confirmed").'
        )
        raise TypeError(msg)

    return _JourneyStep(step_id, name, journey, client)


@attrs.frozen
class _JourneyStep:
    """What `journey_step` was given; decorates, and can be pickled."""

    step_id: str
    name: str | None
    journey: str | None
    client: Client | None

    def __call__(self, function: F) -> F:
        component = _name_of(function)
        step = (self.step_id, self.name)

        def start() -> _Step | None:
            client = default_client() if self.client is None else self.client
            if not client.is_enabled:
                return None
            return _Step(client, self.journey, step, component)

        return observe(function, start, self)


class _Bound(Activation):
    """A run under a frame of the past, whatever the present one is."""

    __slots__ = ("_before",)

    def __init__(self, frame: Frame | None) -> None:
        super().__init__(None)
        self._before = switch(frame)

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """Go back to the frame of before."""
        del error, result
        switch(self._before)


def bind(function: F) -> F:
    """
    Return *function* so that it runs under the present correlation, wherever it is called.

    For threads, executors and callbacks; `identify` inside is seen by the request or session
    that the function was bound in.  The correlation around the call is left as it was.

    Args:
        function: Anything that can be called.
    """
    frame = current_frame()
    return observe(function, lambda: _Bound(frame), bind)


def _name_of(function: Any) -> str:
    """Return the module and qualified name of whatever is decorated."""
    if isinstance(function, (classmethod, staticmethod)):
        function = function.__func__
    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else type(function).__name__
        msg = (
            f"only functions, methods and other callables can be decorated (got {kind}). "
            "Decorate the methods of a class; under @property put the decorator below it."
        )
        raise TypeError(msg)
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


# --- what they share ---


def observe(function: F, start: Start, recipe: Callable[[Any], Any]) -> F:
    """
    Return *function*, each call of which is a run that *start* begins.

    Args:
        function: Anything that can be called, or a class or static method.

        start: Called for each call; for generators with the first step, under the frame
            of the call.

        recipe: Decorates another function in the same way; what is pickled in place of
            *start*.
    """
    kind: Any = type(function)
    if kind in (classmethod, staticmethod):
        inner: Any = function
        return kind(observe(inner.__func__, start, recipe))  # type: ignore[no-any-return]
    _name_of(function)
    if _is_a(function, inspect.isasyncgenfunction):
        return _Proxy(function, _stepping_async, start, recipe)  # type: ignore[return-value]
    if _is_a(function, inspect.isgeneratorfunction):
        return _Proxy(function, _stepping, start, recipe)  # type: ignore[return-value]
    is_coroutine = _is_a(function, inspect.iscoroutinefunction)
    make = _awaiting if is_coroutine else _calling
    if kind is not types.FunctionType:
        return _Proxy(function, make, start, recipe)  # type: ignore[return-value]
    wrapper: Any = functools.update_wrapper(make(function, start), function)
    try:
        # For those who do not follow `__wrapped__`.
        wrapper.__signature__ = inspect.signature(function)
    except (TypeError, ValueError, NameError):
        pass
    return wrapper  # type: ignore[no-any-return]


def _is_a(function: Any, predicate: Callable[[Any], bool]) -> bool:
    """Ask *predicate* of a function, or of the `__call__` of another callable."""
    while isinstance(function, functools.partial):
        function = function.func
    if predicate(function):
        return True
    return not inspect.isroutine(function) and predicate(type(function).__call__)


Make = Callable[[Callable[..., Any], Start], Callable[..., Any]]


def _calling(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start()
        if run is None:
            return function(*args, **kwargs)
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            run.leave(error)
            raise
        run.leave(None, result)
        return result

    return wrapper


def _awaiting(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = start()
        if run is None:
            return await function(*args, **kwargs)
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            run.leave(error)
            raise
        run.leave(None, result)
        return result

    return wrapper


def _stepping(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        inner = function(*args, **kwargs)
        return _named(_steps(inner, start, current_frame()), inner)

    return wrapper


def _stepping_async(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        inner = function(*args, **kwargs)
        return _named(_steps_async(inner, start, current_frame()), inner)

    return wrapper


def _named(outer: Any, inner: Any) -> Any:
    outer.__name__, outer.__qualname__ = inner.__name__, inner.__qualname__
    return outer


def _steps(
    inner: Generator[Any, Any, Any], start: Start, frame: Frame | None
) -> Generator[Any, Any, Any]:
    """
    Run a generator under frames of its own, in steps.

    At each suspension its innermost frame is put aside and the consumer's put back;
    set around the whole body, the generator's session would leak into its consumer, and
    whatever the body itself leaves open across a `yield` would, too.
    """
    outside = current_frame()
    switch(outside if frame is None else frame)
    run = start() or Activation(None)
    advance: Callable[[Any], Any] = inner.send
    value: Any = None
    while True:
        try:
            item = advance(value)
        except StopIteration as stop:
            run.leave(None, stop.value)
            switch(outside)
            return stop.value
        except BaseException as error:
            value = None  # it may be the error itself, and this frame in its traceback
            run.leave(error)
            switch(outside)
            raise
        frame = switch(outside)
        try:
            value = yield item
            advance = inner.send
        except BaseException as error:  # noqa: BLE001  thrown in by the consumer
            value, advance = error, inner.throw
        outside = switch(frame)


async def _steps_async(
    inner: AsyncGenerator[Any, Any], start: Start, frame: Frame | None
) -> AsyncGenerator[Any, Any]:
    """Run an async generator as `_steps` runs a generator."""
    outside = current_frame()
    switch(outside if frame is None else frame)
    run = start() or Activation(None)
    advance: Callable[[Any], Any] = inner.asend
    value: Any = None
    while True:
        try:
            item = await advance(value)
        except StopAsyncIteration:
            run.leave()
            switch(outside)
            return
        except BaseException as error:
            value = None
            run.leave(error)
            switch(outside)
            raise
        frame = switch(outside)
        try:
            value = yield item
            advance = inner.asend
        except BaseException as error:  # noqa: BLE001  thrown in by the consumer
            value, advance = error, inner.athrow
        outside = switch(frame)


class _Picklable:
    """What wrapt's proxies refuse to do by themselves: pickle and copy."""

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(pickle.DEFAULT_PROTOCOL)

    def __copy__(self) -> Any:
        return self._rebuilt(copy.copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._rebuilt(lambda part: copy.deepcopy(part, memo))

    def _rebuilt(self, copied: Callable[[Any], Any]) -> Any:
        raise NotImplementedError


class _BoundProxy(_Picklable, wrapt.BoundFunctionWrapper):  # type: ignore[misc, unused-ignore]
    """A method of a decorated function, bound by access on an instance or a class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        owner = self._self_instance
        if owner is None:
            return _by_name(self)
        return getattr, (owner, self.__name__)

    def _rebuilt(self, copied: Callable[[Any], Any]) -> Any:
        owner = self._self_instance
        return self if owner is None else getattr(copied(owner), self.__name__)


class _Proxy(_Picklable, wrapt.FunctionWrapper):  # type: ignore[misc, unused-ignore]
    """A decorated callable that is shown as what it wraps."""

    __bound_function_wrapper__ = _BoundProxy

    def __init__(
        self, wrapped: Any, make: Make, start: Start, recipe: Callable[[Any], Any]
    ) -> None:
        def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            del instance
            return make(wrapped, start)(*args, **kwargs)

        super().__init__(wrapped, call)
        self._self_recipe = recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        if inspect.isroutine(self.__wrapped__):
            return _by_name(self)
        return self._self_recipe, (self.__wrapped__,)

    def _rebuilt(self, copied: Callable[[Any], Any]) -> Any:
        if inspect.isroutine(self.__wrapped__):
            return self  # as functions are
        return self._self_recipe(copied(self.__wrapped__))


def _by_name(function: Any) -> Any:
    """Reduce a function to its module and qualified name."""
    module, name = function.__module__, function.__qualname__
    if "<locals>" in name or "<lambda>" in name:
        msg = f"cannot pickle the local function {module}.{name}"
        raise pickle.PicklingError(msg)
    return _find, (module, name)


def _find(module: str, name: str) -> Any:
    """Return what `_by_name` reduced."""
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
