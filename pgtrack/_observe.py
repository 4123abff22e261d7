"""
How any callable is wrapped so that each call of it is observed: `observe`.

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
import types
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Protocol, TypeVar

import wrapt

from pgtrack._context import Frame, current_frame, switch

__all__ = [
    "F",
    "Recipe",
    "Run",
    "Start",
    "Under",
    "name_of",
    "observe",
    "steps",
    "steps_async",
]

F = TypeVar(
    "F",
    bound="Callable[..., Any] | classmethod[Any, Any, Any] | staticmethod[Any, Any]",
)
"""Whatever can be decorated; it comes back as the same type."""


class Run(Protocol):
    """One observed call."""

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """End the run, by *error* or with a *result*; raises nothing."""
        ...


Start = Callable[[], "Run | None"]
"""Begins a run, pushing its frame; None where nothing is to be observed."""


class Recipe(Protocol):
    """Decorates functions; what is pickled in place of a `Start`."""

    def __call__(self, function: F, /) -> F:
        """Return *function*, decorated."""
        ...


class Under:
    """A run under any frame, that tells nothing; the frame of before comes back."""

    __slots__ = ("_before",)

    def __init__(self, frame: Frame | None) -> None:
        self._before = switch(frame)

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """Go back to the frame of before."""
        del error, result
        switch(self._before)


def name_of(function: Any) -> str:
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
    name_of(target)
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
        return _named(steps(inner, start, current_frame()), inner)

    return wrapper


def _stepping_async(function: Callable[..., Any], start: Start) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        inner = function(*args, **kwargs)
        return _named(steps_async(inner, start, current_frame()), inner)

    return wrapper


def _named(outer: Any, inner: Any) -> Any:
    outer.__name__, outer.__qualname__ = inner.__name__, inner.__qualname__
    return outer


def steps(
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
    run = start() or Under(current_frame())
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


async def steps_async(
    inner: AsyncGenerator[Any, Any], start: Start, frame: Frame | None
) -> AsyncGenerator[Any, Any]:
    """Run an async generator as `steps` runs a generator."""
    outside = current_frame()
    switch(outside if frame is None else frame)
    run = start() or Under(current_frame())
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
