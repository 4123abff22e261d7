"""
`track_api` and `journey_step`, and what all decorators share: `observe`.

A plain function or coroutine function is wrapped in a function of the same kind: it
binds, pickles, copies and introspects as functions do, and costs least.  Whatever else
can be called, and generators, whose correlation is that of the call rather than of
the first step, are wrapped by wrapt, whose proxies look like what they wrap.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import pickle
import sys
import time
import types
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any, Protocol, overload

import attrs
import wrapt

from pgtrack import _errors
from pgtrack._api import default_client
from pgtrack._blocks import Activation, ApiCall, F, part_frame
from pgtrack._context import Frame, current_frame, switch

if TYPE_CHECKING:
    from pgtrack._client import Client

__all__ = ["bind", "journey_step", "observe", "track_api"]

Start = Callable[[], "Activation | _Under | None"]
"""Begins a run, pushing its frame; None where nothing is to be observed."""


class Recipe(Protocol):
    """Decorates functions; what is pickled in place of a `Start`."""

    def __call__(self, function: F, /) -> F:
        """Return *function*, decorated."""
        ...


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
        component = _name_of(function)
        step = (self.step_id, self.step_name)

        def start() -> _Step | None:
            client = default_client() if self.client is None else self.client
            if not client.is_enabled:
                return None
            return _Step(client, self.journey, step, component)

        return observe(function, start, self)


class _Under:
    """A run under any frame, that tells nothing; the frame of before comes back."""

    __slots__ = ("_before",)

    def __init__(self, frame: Frame | None) -> None:
        self._before = switch(frame)

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """Go back to the frame of before."""
        del error, result
        switch(self._before)


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
    return observe(function, lambda: _Under(frame), bind)


def _name_of(function: Any) -> str:
    """Return the module and qualified name of whatever is decorated."""
    if isinstance(function, (classmethod, staticmethod)):
        function = function.__func__
    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else type(function).__name__
        msg = (
            f"what is decorated must be callable, and no class (got {kind}). "
            "Decorate the methods of a class, and those of a property below @property."
        )
        raise TypeError(msg)
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    # Methods of built-in types have no module.
    return ".".join(filter(None, (named.__module__, named.__qualname__)))


# --- what they share ---


def observe(function: F, start: Start, recipe: Recipe) -> F:
    """
    Return *function*, each call of which is a run that *start* begins.

    Args:
        function: Anything that can be called, or a class or static method.

        start: Called for each call; for generators with the first step, under the frame
            of the call.

        recipe: Decorates another function in the same way.
    """
    target: Any = function
    kind: Any = type(target)
    if kind in (classmethod, staticmethod):
        return kind(observe(target.__func__, start, recipe))  # type: ignore[no-any-return]
    _name_of(target)
    make = _kind_of(target)
    if kind is not types.FunctionType or make in (_stepping, _stepping_async):
        return _Proxy(target, make, start, recipe)  # type: ignore[return-value]
    made: Any = make(target, start)
    # In the module of the original, since that is where frameworks resolve hints.
    wrapper: Any = types.FunctionType(
        made.__code__, target.__globals__, closure=made.__closure__
    )
    functools.update_wrapper(wrapper, target)
    with contextlib.suppress(TypeError, ValueError, NameError):
        # For those who do not follow `__wrapped__`.
        wrapper.__signature__ = inspect.signature(target)
    return wrapper  # type: ignore[no-any-return]


Make = Callable[[Callable[..., Any], Start], Callable[..., Any]]
"""Wraps a function so that each call is a run; what it makes uses no global names."""


def _kind_of(function: Any) -> Make:
    """Choose the wrapper for what *function* returns."""
    if _is_a(function, _is_coroutine_function):
        return _awaiting
    if _is_a(function, inspect.isasyncgenfunction):
        return _stepping_async
    if _is_a(function, inspect.isgeneratorfunction):
        return _stepping
    return _calling


def _is_a(function: Any, predicate: Callable[[Any], bool]) -> bool:
    """Ask *predicate* of a function, or of the `__call__` of another callable."""
    while isinstance(function, functools.partial):
        function = function.func
    if predicate(function):
        return True
    return not inspect.isroutine(function) and predicate(type(function).__call__)


def _is_coroutine_function(function: Any) -> bool:
    """Ask for `async def` and for `types.coroutine`, whose generators are awaited."""
    if inspect.iscoroutinefunction(function):
        return True
    code = getattr(function, "__code__", None)
    return bool(getattr(code, "co_flags", 0) & inspect.CO_ITERABLE_COROUTINE)


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
    run = start() or _Under(current_frame())
    advance: Callable[[Any], Any] = inner.send
    value: Any = None
    while True:
        try:
            item = [advance(value)]
        except StopIteration as stop:
            run.leave(None, stop.value)
            switch(outside)
            return stop.value
        except GeneratorExit:  # closed, which completes it
            run.leave()
            switch(outside)
            raise
        except BaseException as error:
            value = None  # it may be the error itself, and this frame in its traceback
            run.leave(error)
            switch(outside)
            raise
        frame = switch(outside)
        value = None
        try:
            value = yield item.pop()  # nothing here holds on to what the consumer has
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
    run = start() or _Under(current_frame())
    advance: Callable[[Any], Any] = functools.partial(_unattended, inner.asend)
    value: Any = None
    while True:
        try:
            item = [await advance(value)]
        except StopAsyncIteration:
            run.leave()
            switch(outside)
            return
        except GeneratorExit:
            run.leave()
            switch(outside)
            raise
        except BaseException as error:
            value = None
            run.leave(error)
            switch(outside)
            raise
        frame = switch(outside)
        value = None
        try:
            value = yield item.pop()
            advance = inner.asend
        except BaseException as error:  # noqa: BLE001  thrown in by the consumer
            value, advance = error, inner.athrow
        outside = switch(frame)


def _unattended(asend: Callable[[Any], Any], value: Any) -> Any:
    """
    Take the first step of an async generator without the event loop's knowledge.

    The loop attends to the outer generator alone.  Of two that it closed at once, one
    would find the other already running.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, lambda _: None)
    try:
        return asend(value)
    finally:
        sys.set_asyncgen_hooks(*hooks)


class _BoundProxy(wrapt.BoundFunctionWrapper):  # type: ignore[misc, type-arg, unused-ignore]
    """A method of a decorated function, bound by access on an instance or a class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        owner = self._self_instance
        if owner is None:
            where = self.__module__, self.__qualname__
            _find(*where)  # raises now rather than when it is unpickled
            return _find, where
        return getattr, (owner, self.__name__)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(pickle.DEFAULT_PROTOCOL)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = self._self_instance
        if owner is None:
            return self
        return getattr(copy.deepcopy(owner, memo), self.__name__)


class _Proxy(wrapt.FunctionWrapper):  # type: ignore[misc, type-arg, unused-ignore]
    """
    A decorated callable that is shown as what it wraps.

    It pickles and copies as that does, too: by name if that leads to it, else anew.
    """

    __bound_function_wrapper__ = _BoundProxy

    def __init__(self, wrapped: Any, make: Make, start: Start, recipe: Recipe) -> None:
        def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            del instance
            return make(wrapped, start)(*args, **kwargs)

        super().__init__(wrapped, call)
        self._self_recipe = recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        try:
            if _find(self.__module__, self.__qualname__) is self:
                return self.__qualname__
        except (AttributeError, ImportError):
            pass
        return self._self_recipe, (self.__wrapped__,)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(pickle.DEFAULT_PROTOCOL)

    def __copy__(self) -> Any:
        return self._around(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._around(copy.deepcopy(self.__wrapped__, memo))

    def _around(self, wrapped: Any) -> Any:
        # Functions are not copied.
        return self if wrapped is self.__wrapped__ else self._self_recipe(wrapped)


def _find(module: str, name: str) -> Any:
    """Return what is known by this module and qualified name."""
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
