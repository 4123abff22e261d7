# ruff: noqa: D102, D103  what is decorated needs no documentation

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import sys
import threading
import time
import types
import typing
import weakref
from collections.abc import AsyncGenerator, Generator  # noqa: TC003  hints are resolved
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio
import pytest

import pgtrack
from harness import run_script, start_together
from pgtrack._context import current_frame
from pgtrack.integrations._http import Served, Serving
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pgtrack.testing import Events

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

api = pgtrack.track_api("/api", method="POST")
step = pgtrack.journey_step("pay", "Payment", journey="checkout")


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


@pytest.fixture(name="backend", params=["asyncio", "trio"])
def _backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def told(events: Events) -> list[Any]:
    """
    Return what tells events apart here: a status, an error's type, or a step's id.
    """
    return [e.api_status_code or e.error_type or e.journey_step_id for e in events]


def sessions(events: Events) -> list[str | None]:
    """
    Return the sessions of the events, in order.
    """
    return [event.session_id for event in events]


def here() -> str | None:
    """
    Return the present session.
    """
    return pgtrack.current().session_id


# --- every kind of callable, at module level, so that they pickle ---


@api
def function(a: int, b: str = "x", *, c: float = 1.0) -> str:
    """Document the function."""
    return f"{a}{b}{c}"


@api
async def coroutine(a: int, b: str = "x", *, c: float = 1.0) -> str:
    """Document the coroutine."""
    return f"{a}{b}{c}"


@api
def generator(a: int, b: str = "x", *, c: float = 1.0) -> Generator[str, str, str]:
    """Document the generator."""
    got = yield f"{a}{b}{c}"
    yield f"got {got}"
    return "returned"


@api
async def async_generator(
    a: int, b: str = "x", *, c: float = 1.0
) -> AsyncGenerator[str, str]:
    """Document the async generator."""
    got = yield f"{a}{b}{c}"
    yield f"got {got}"


FUNCTIONS = [function, coroutine, generator, async_generator]


class Shop:
    """
    Has a method of each kind, decorated.
    """

    def __init__(self, name: str = "shop") -> None:
        self.name = name

    @api
    def method(self, a: int) -> tuple[str, int]:
        return self.name, a

    @api
    @classmethod
    def class_outside(cls, a: int) -> tuple[str, int]:
        return cls.__name__, a

    @classmethod
    @api
    def class_inside(cls, a: int) -> tuple[str, int]:
        return cls.__name__, a

    @api
    @staticmethod
    def static_outside(a: int) -> int:
        return a

    @staticmethod
    @api
    def static_inside(a: int) -> int:
        return a

    @api
    def generate(self, a: int) -> Generator[tuple[str, int], None, None]:
        yield self.name, a

    @api
    @classmethod
    def class_generate(cls, a: int) -> Generator[tuple[str, int], None, None]:
        yield cls.__name__, a

    @staticmethod
    @api
    def static_generate(a: int) -> Generator[int, None, None]:
        yield a

    @api
    async def wait(self, a: int) -> tuple[str, int]:
        return self.name, a

    @property
    @api
    def below_property(self) -> str:
        return self.name

    @functools.cached_property
    @api
    def below_cached_property(self) -> str:
        return self.name


class Slotted:
    """
    Has slots and no `__dict__`.
    """

    __slots__ = ("name",)

    def __init__(self, name: str = "slotted") -> None:
        self.name = name

    @api
    def method(self) -> str:
        return self.name

    @api
    def generate(self) -> Generator[str, None, None]:
        yield self.name


class Callee:
    """
    Can be called, and is compared by value.
    """

    def __init__(self, name: str = "callee") -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Callee) and self.name == other.name

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, a: int) -> tuple[str, int]:
        return self.name, a


class AsyncCallee(Callee):
    """
    Is a coroutine function in all but name.
    """

    async def __call__(self, a: int) -> tuple[str, int]:  # type: ignore[override]
        return self.name, a


class GeneratingCallee(Callee):
    """
    Is a generator function in all but name.
    """

    def __call__(self, a: int) -> Generator[int, None, None]:  # type: ignore[override]
        yield a


callee = api(Callee())
length = api(len)
join = api(",".join)
partial = api(functools.partial(Callee(), 1))
bound_method = api(Shop("bound").method)


@api
@functools.lru_cache
def cached(a: int) -> list[int]:
    return [a]


class TestCalls:
    """
    Every kind of callable.
    """

    def test_function(self, events: Events) -> None:
        """A function returns what it returns, and makes one event."""
        result = function(1, "y", c=2.0)

        assert result == "1y2.0"
        assert [("/api", "POST", 200)] == [
            (e.api_path, e.api_method, e.api_status_code) for e in events
        ]

    def test_same_object(self, events: Events) -> None:
        """The very object is returned."""
        given = object()

        result = api(lambda: given)()

        assert result is given

    def test_coroutine(self, events: Events) -> None:
        """A coroutine makes its event when it was awaited, not when it is made."""
        coroutine(1).close()
        before = list(events)
        result = asyncio.run(coroutine(1, "y", c=2.0))

        assert result == "1y2.0"
        assert before == []
        assert told(events) == [200]

    def test_bare_path(self, events: Events) -> None:
        """Used bare, the path is the function's module and qualified name."""

        @pgtrack.track_api
        def bare() -> None: ...

        bare()
        pgtrack.track_api(functools.partial(functools.partial(len), []))()
        pgtrack.track_api(Callee())(1)
        pgtrack.track_api([].append)(1)

        paths = [event.api_path for event in events]
        here = "TestCalls.test_bare_path.<locals>.bare"
        assert paths == [
            f"{__name__}.{here}",
            "builtins.len",
            f"{__name__}.Callee",
            "list.append",
        ]
        assert events[0].api_method is None

    @pytest.mark.parametrize("name", ["method", "class_outside", "class_inside"])
    def test_methods(self, events: Events, name: str) -> None:
        """Methods are bound to the instance, or to the class of it."""

        class Branch(Shop):
            pass

        owner = "branch" if name == "method" else "Branch"
        result = getattr(Branch("branch"), name)(1)

        assert result == (owner, 1)
        assert told(events) == [200]

    def test_unbound(self, events: Events) -> None:
        """A method of the class takes the instance as its first argument."""
        results = [Shop.method(Shop("a"), 1), list(Shop.generate(Shop("b"), 2))]

        assert results == [("a", 1), [("b", 2)]]
        assert told(events) == [200, 200]

    def test_class_and_static_methods(self, events: Events) -> None:
        """Class and static methods work in either order, on class and instance."""
        results = [
            Shop.class_outside(1),
            Shop.class_inside(1),
            Shop().static_outside(1),
            Shop.static_inside(1),
            list(Shop.class_generate(1)),
            list(Shop().static_generate(1)),
        ]

        assert results == [("Shop", 1), ("Shop", 1), 1, 1, [("Shop", 1)], [1]]
        assert told(events) == [200] * 6
        assert isinstance(vars(Shop)["class_outside"], classmethod)
        assert isinstance(vars(Shop)["static_outside"], staticmethod)

    def test_async_method(self, events: Events) -> None:
        """A coroutine method is awaited."""
        assert asyncio.run(Shop("a").wait(1)) == ("a", 1)
        assert told(events) == [200]

    def test_slots(self, events: Events) -> None:
        """Methods of a class with slots work, and nothing is stored on the instance."""
        results = [Slotted().method(), *Slotted().generate()]

        assert results == ["slotted", "slotted"]
        assert told(events) == [200, 200]

    def test_properties(self, events: Events) -> None:
        """Below `@property` and `@cached_property` a decorator sees the calls."""
        shop = Shop("a")

        values = [shop.below_property, shop.below_property]
        values += [shop.below_cached_property, shop.below_cached_property]

        assert values == ["a"] * 4
        assert told(events) == [200] * 3

    def test_callables(self, events: Events) -> None:
        """Callable objects, partials, builtins and bound methods work."""
        results: list[Any] = [callee(1), partial(), length([1]), join("ab")]
        results += [bound_method(1), asyncio.run(api(AsyncCallee())(1))]
        results += [list(api(GeneratingCallee())(1))]

        assert results == [
            ("callee", 1),
            ("callee", 1),
            1,
            "a,b",
            ("bound", 1),
            ("callee", 1),
            [1],
        ]
        assert len(told(events)) == 8  # two of the bound method, once itself decorated

    @pytest.mark.parametrize("kind", [AsyncCallee, GeneratingCallee])
    def test_callable_completes_late(self, events: Events, kind: type[Callee]) -> None:
        """An async or generating `__call__` has not completed when it returns."""
        for call in (kind(), functools.partial(kind())):
            made = api(call)(1)

            assert told(events) == []
            made.close()  # type: ignore[attr-defined]

    def test_partials(self, events: Events) -> None:
        """Partials of coroutine functions and generators are what these are."""

        async def wait(a: int) -> int:
            await asyncio.sleep(0)
            return a

        def generate(a: int) -> Iterator[int]:
            yield a

        results = [
            asyncio.run(api(functools.partial(wait, 1))()),
            list(api(functools.partial(generate, 2))()),
        ]

        assert results == [1, [2]]
        assert told(events) == [200, 200]

    def test_callable_as_class_attribute(self, events: Events) -> None:
        """A decorated callable object that is a class attribute is not bound."""

        class Owner:
            call = api(Callee("attribute"))

        assert Owner().call(1) == ("attribute", 1)
        assert Owner.call.name == "attribute"

    def test_attributes(self, events: Events) -> None:
        """Attributes of a decorated callable can be read, set, and compared."""
        tracked = api(Callee("a"))
        tracked.name = "b"

        assert tracked(1) == ("b", 1)
        assert tracked == Callee("b")
        assert isinstance(tracked, Callee)

    def test_mocks(self, events: Events) -> None:
        """Mocks of functions and of coroutine functions can be decorated."""
        results = [
            api(mock.Mock(return_value=1))(),
            asyncio.run(api(mock.AsyncMock(return_value=2))()),
        ]

        assert results == [1, 2]
        assert told(events) == [200, 200]

    def test_types_coroutine(self, events: Events) -> None:
        """A generator made awaitable by `types.coroutine` is awaited."""

        @api
        @types.coroutine
        def legacy() -> Generator[None, None, int]:
            yield
            return 1

        async def main() -> int:
            return await legacy()

        assert asyncio.run(main()) == 1
        assert told(events) == [200]

    def test_inheritance(self, events: Events) -> None:
        """`super()` and overriding work, each decorated method making its event."""

        class Branch(Shop):
            @api
            def method(self, a: int) -> tuple[str, int]:
                return super().method(a + 1)

        assert Branch("a").method(1) == ("a", 2)
        assert told(events) == [200, 200]

    def test_abstract(self) -> None:
        """An abstract method stays abstract, in either order."""

        class Base(abc.ABC):
            @api
            @abc.abstractmethod
            def outside(self) -> None: ...

            @abc.abstractmethod
            @api
            def inside(self) -> None: ...

            @api
            @classmethod
            @abc.abstractmethod
            def of_class(cls) -> Iterator[None]:
                yield

        assert Base.__abstractmethods__ == {"outside", "inside", "of_class"}
        with pytest.raises(TypeError, match="abstract"):
            Base()  # type: ignore[abstract]

    def test_dataclass(self, events: Events) -> None:
        """Methods of a dataclass with slots can be decorated."""

        @dataclasses.dataclass(frozen=True)
        class Order:
            total: int

            @api
            def doubled(self) -> int:
                return self.total * 2

        assert Order(2).doubled() == 4
        assert Order(2) == Order(2)
        assert [field.name for field in dataclasses.fields(Order)] == ["total"]

    def test_decorator_without_configure(self) -> None:
        """Without any configuration the call is as it was, and nothing is emitted."""
        results = [function(1), list(generator(1)), asyncio.run(coroutine(1))]

        assert results == ["1x1.0", ["1x1.0", "got None"], "1x1.0"]
        assert pgtrack.stats().emitted == 0

    def test_reconfigured(self) -> None:
        """What was decorated before `configure` goes to the present default client."""
        with capture() as first:
            function(1)
        with capture() as second:
            function(1)
        function(1)

        assert (told(first), told(second)) == ([200], [200])

    def test_reconfigured_in_the_middle(self) -> None:
        """A generator that was started before `configure` goes on in silence."""
        running = pgtrack.session("a")(generator)(1)
        next(running)

        with capture() as events:
            rest = list(running)

        assert rest == ["got None"]
        assert told(events) == []

    @pytest.mark.parametrize("decorator", [api, step])
    def test_disabled(self, monkeypatch: pytest.MonkeyPatch, decorator: Any) -> None:
        """Disabled by the environment, a call has no event and not even a frame."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")
        client = pgtrack.configure(project_id="p", endpoint="console:")

        assert decorator(current_frame)() is None
        assert list(decorator(generator)(1)) == ["1x1.0", "got None"]
        assert client.stats() == pgtrack.Stats()

    def test_explicit_client(self, events: Events) -> None:
        """`client=` wins over the default client."""
        with capture() as others:
            client = pgtrack._api.default_client()

        pgtrack.track_api("/x", client=client)(lambda: None)()
        pgtrack.journey_step("s", journey="j", client=client)(lambda: None)()

        assert told(events) == []
        assert told(others) == [200, "s"]

    @pytest.mark.parametrize("decorator", [api, step, pgtrack.session(), pgtrack.bind])
    @pytest.mark.parametrize(
        ("wrong", "kind"),
        [(Shop, "a class"), (property(len), "property"), (1, "int"), ("x", "str")],
    )
    def test_wrong(self, decorator: Any, wrong: object, kind: str) -> None:
        """Classes, and what cannot be called, are refused by the decorator."""
        with pytest.raises(TypeError, match=rf"callable, and no class .got {kind}"):
            decorator(wrong)

    def test_wrong_in_static_method(self) -> None:
        """A class inside of `staticmethod` is refused, too."""
        with pytest.raises(TypeError, match="got a class"):
            api(staticmethod(Shop))

    def test_bare_journey_step(self) -> None:
        """`journey_step` without the id of the step is refused with an example."""
        with pytest.raises(TypeError, match=r"needs the id of the step .got function"):
            pgtrack.journey_step(lambda: None)  # type: ignore[arg-type]


class TestIntrospection:
    """
    What others see of a decorated function.
    """

    @pytest.mark.parametrize("decorated", FUNCTIONS)
    def test_looks(self, decorated: Any) -> None:
        """Names, documentation, source, signature and hints are the original's."""
        original = inspect.unwrap(decorated)

        assert original is not decorated
        assert isinstance(decorated, types.FunctionType)
        assert callable(decorated)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(decorated, name) == getattr(original, name)
        for look in (
            inspect.signature,
            inspect.getfullargspec,
            inspect.getsource,
            inspect.getdoc,
            inspect.getmodule,
            inspect.iscoroutinefunction,
            inspect.isgeneratorfunction,
            inspect.isasyncgenfunction,
            inspect.isfunction,
            inspect.isroutine,
            typing.get_type_hints,
        ):
            assert look(decorated) == look(original), look

    @pytest.mark.parametrize("decorated", FUNCTIONS)
    def test_globals(self, decorated: Any) -> None:
        """Frameworks that resolve hints in the function's own globals can."""
        hints = dict(decorated.__annotations__)

        resolved = eval(hints["return"], decorated.__globals__)

        assert resolved == typing.get_type_hints(inspect.unwrap(decorated))["return"]

    def test_method_looks(self) -> None:
        """Bound methods are methods, and lack `self` in their signature."""
        for method in (Shop().method, Shop().generate, Shop.class_generate):
            assert inspect.ismethod(method)
            assert list(inspect.signature(method).parameters) == ["a"]
        for plain in (Shop.method, Shop.generate):
            assert list(inspect.signature(plain).parameters) == ["self", "a"]
        assert Shop().generate.__self__.name == "shop"

    def test_defaults(self) -> None:
        """Callers who look at the parameters themselves find the original's."""
        assert inspect.getfullargspec(function).args == ["a", "b"]
        assert inspect.getfullargspec(generator).kwonlydefaults == {"c": 1.0}

    def test_kinds_of_results(self) -> None:
        """Generators are generators, and so on, under their own names."""
        made: Any = generator(1)
        made_async: Any = async_generator(1)
        waiting: Any = coroutine(1)

        assert inspect.isgenerator(made)
        assert inspect.isasyncgen(made_async)
        assert inspect.iscoroutine(waiting)
        names = [(m.__name__, m.__qualname__) for m in (made, made_async, waiting)]
        assert names == [
            (name, name) for name in ("generator", "async_generator", "coroutine")
        ]
        waiting.close()

    def test_no_signature(self) -> None:
        """A function whose signature cannot be told can be decorated all the same."""

        def odd() -> int:
            return 1

        odd.__signature__ = "nonsense"  # type: ignore[attr-defined]

        assert api(odd)() == 1

    def test_function_attributes(self) -> None:
        """What other decorators left on the function stays on it."""

        def marked() -> Iterator[None]:
            yield

        marked.mark = [1]  # type: ignore[attr-defined]
        plain = functools.partial(marked)

        assert api(marked).mark is marked.mark  # type: ignore[attr-defined]
        assert api(plain).func is marked


class TestCopies:
    """
    Pickles and copies.
    """

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize(
        "decorated", [*FUNCTIONS, cached, Shop.class_inside, Shop.static_generate]
    )
    def test_pickle_by_name(self, decorated: Any, protocol: int) -> None:
        """Functions pickle by their names, so the very object comes back."""
        again = pickle.loads(pickle.dumps(decorated, protocol))

        assert again == decorated
        assert again is decorated or inspect.ismethod(decorated)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize("name", ["method", "generate", "class_generate"])
    def test_pickle_methods(self, events: Events, name: str, protocol: int) -> None:
        """Bound methods pickle with their instance and stay decorated."""
        method = getattr(Shop("pickled"), name)

        again = pickle.loads(pickle.dumps(method, protocol))
        result = again(1)

        first = [result] if name == "method" else list(result)
        owner = "Shop" if name.startswith("class") else "pickled"
        assert first == [(owner, 1)]
        assert told(events) == [200]

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize("name", ["method", "generate"])
    def test_pickle_unbound(self, name: str, protocol: int) -> None:
        """Methods of the class pickle by name, as functions do."""
        method = getattr(Shop, name)

        assert pickle.loads(pickle.dumps(method, protocol)) == method

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize(
        ("decorated", "arguments", "expected", "count"),
        [
            (callee, [1], ("callee", 1), 1),
            (partial, [], ("callee", 1), 1),
            (length, ["abc"], 3, 1),
            (join, ["ab"], "a,b", 1),
            (bound_method, [1], ("bound", 1), 2),
        ],
    )
    def test_pickle_by_value(  # noqa: PLR0917
        self,
        events: Events,
        decorated: Callable[..., Any],
        arguments: list[Any],
        expected: Any,
        count: int,
        protocol: int,
    ) -> None:
        """Other callables pickle as they would undecorated, and are decorated again."""
        again = pickle.loads(pickle.dumps(decorated, protocol))

        assert again(*arguments) == expected
        assert told(events) == [200] * count

    def test_pickle_blocks(self, events: Events) -> None:
        """A callable decorated by a block pickles together with the block."""
        tracked = pgtrack.session("a")(Callee())
        again = pickle.loads(pickle.dumps(pgtrack.journey("j")(tracked)))
        again.name = "again"

        assert again(1) == ("again", 1)

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_pickle_local(self, protocol: int) -> None:
        """Local functions do not pickle, decorated or not."""

        def local() -> Iterator[None]:
            yield

        class Local:
            method = api(local)

        for value in (local, api(local), Local.method, api(lambda: None)):
            with pytest.raises((AttributeError, pickle.PicklingError)):
                pickle.dumps(value, protocol)

    def test_pickle_hidden(self) -> None:
        """A generator that its name does not lead to does not pickle as another one."""
        hidden = pgtrack.bind(inspect.unwrap(generator))

        with pytest.raises(pickle.PicklingError):
            pickle.dumps(hidden)

    def test_reduce(self) -> None:
        """`__reduce__`, asked by old libraries, says the same as `__reduce_ex__`."""
        method = Shop("a").generate

        assert generator.__reduce__() == "generator"
        assert method.__reduce__() == (getattr, (method.__self__, "generate"))

    @pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
    @pytest.mark.parametrize(
        "decorated", [*FUNCTIONS, cached, length, Shop.generate], ids=repr
    )
    def test_copy_function(self, decorated: Any, copier: Any) -> None:
        """Functions are copied as themselves."""
        again = copier(decorated)

        assert again is decorated or again == decorated

    def test_copy_callable(self, events: Events) -> None:
        """A copied callable is another one, decorated as well."""
        tracked = api(Callee("old"))
        for again in (copy.copy(tracked), copy.deepcopy(tracked)):
            again.name = "new"

            assert again(1) == ("new", 1)
            assert tracked.name == "old"
        assert told(events) == [200, 200]

    def test_copy_methods(self) -> None:
        """A method's copy has the same instance, its deep copy another."""
        shop = Shop("old")
        for method in (shop.generate, api(shop.wait)):
            shallow, deep = copy.copy(method), copy.deepcopy(method)

            assert shallow.__self__ is shop
            assert deep.__self__ is not shop
            assert deep.__self__.name == "old"

    def test_copy_owner(self, events: Events) -> None:
        """Whatever holds decorated callables can be deep-copied."""
        holder = {"call": callee, "function": generator, "method": Shop("a").generate}

        again = copy.deepcopy(holder)

        assert again["function"] is generator
        assert again["call"] is not callee
        assert list(again["method"](1)) == [("a", 1)]

    def test_spawn_pool(self, tmp_path: Path) -> None:
        """Decorated functions of the main script cross over into a spawned pool."""
        script = tmp_path / "pool.py"
        script.write_text(
            """
import multiprocessing
import pgtrack

class Call:
    def __call__(self, x):
        return x + 3

    @pgtrack.track_api
    def method(self, x):
        return x + 4

@pgtrack.track_api("/double")
def double(x):
    return 2 * x

@pgtrack.journey_step("count", journey="j")
def count(n):
    yield from range(n)

call = pgtrack.track_api(Call())

@pgtrack.session()
def apply(function, x):
    return function(x)

def total(function, x):
    return sum(function(x))

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        work = [(double, 2), (call, 2), (Call().method, 2), (list, [1])]
        print(pool.starmap(apply, work))
        print(pool.starmap(total, [(count, 4)]))
""",
            encoding="utf-8",
        )

        done = run_script(script, timeout=50)

        assert done.stderr == ""
        assert done.stdout.splitlines() == ["[4, 5, 6, [1]]", "[6]"]


class TestStacks:
    """
    Decorators above and below one another.
    """

    def test_each_other(self, events: Events) -> None:
        """Stacked decorators each tell, the inner one first, in one session."""

        @pgtrack.session("s")
        @api
        @step
        def work() -> None: ...

        work()

        assert told(events) == ["pay", 200]
        assert sessions(events) == ["s", "s"]

    def test_generators(self, events: Events) -> None:
        """Stacked decorators of a generator each tell at its end."""

        @step
        @api
        @pgtrack.session("s")
        def work() -> Iterator[str | None]:
            yield here()

        assert list(work()) == ["s"]
        assert told(events) == [200, "pay"]

    def test_wraps(self, events: Events) -> None:
        """Decorators of the `functools.wraps` style may be on either side."""

        def doubling(function: Callable[[], int]) -> Callable[[], int]:
            @functools.wraps(function)
            def wrapper() -> int:
                return 2 * function()

            return wrapper

        results = [api(doubling(lambda: 1))(), doubling(api(lambda: 1))()]

        assert results == [2, 2]
        assert told(events) == [200, 200]

    def test_lru_cache(self, events: Events) -> None:
        """Above `lru_cache` each call tells, below it each that is not cached."""
        outside = api(functools.lru_cache(lambda: 1))
        inside = functools.lru_cache(api(lambda: 1))
        for _ in range(3):
            outside()
            inside()

        assert outside.cache_info().hits == 2
        assert inside.cache_info().hits == 2
        assert told(events) == [200] * 4

    def test_contextmanager_outside(self, events: Events) -> None:
        """Below `contextmanager`, the event tells how the block was left."""

        @contextlib.contextmanager
        @api
        def manage() -> Iterator[int]:
            yield 1

        with manage() as value:
            before = told(events)
        with pytest.raises(KeyError), manage():
            raise KeyError

        assert (value, before) == (1, [])
        assert told(events) == [200, "KeyError", 500]

    @pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, RuntimeError])
    def test_contextmanager_stop_iteration(
        self, events: Events, error: type[Exception]
    ) -> None:
        """An error of the iterator protocol that leaves the block stays what it is."""

        @contextlib.contextmanager
        @api
        def manage() -> Iterator[None]:
            yield

        @contextlib.asynccontextmanager
        @api
        async def manage_async() -> AsyncGenerator[None, None]:
            yield

        async def main() -> None:
            async with manage_async():
                raise error

        with pytest.raises(error), manage():
            raise error
        # Coroutines turn StopIteration into this by themselves.
        raised = RuntimeError if error is StopIteration else error
        with pytest.raises(raised):
            asyncio.run(main())

    def test_contextmanager_inside(self, events: Events) -> None:
        """Above `contextmanager`, the event tells of the making of the block."""

        @api
        @contextlib.contextmanager
        def manage() -> Iterator[int]:
            yield 1

        with manage() as value:
            assert told(events) == [200]

        assert value == 1

    def test_asynccontextmanager(self, events: Events) -> None:
        """The same for `asynccontextmanager`."""

        @contextlib.asynccontextmanager
        @api
        async def manage() -> AsyncGenerator[int, None]:
            await asyncio.sleep(0)
            yield 1

        async def main() -> int:
            async with manage() as value:
                assert told(events) == []
                return value

        assert asyncio.run(main()) == 1
        assert told(events) == [200]

    def test_twice(self, events: Events) -> None:
        """Decorated twice, a function makes two events."""
        api(function)(1)

        assert told(events) == [200, 200]

    def test_singledispatch(self, events: Events) -> None:
        """`singledispatch` works on a decorated function, and below a decorator."""

        @api
        @functools.singledispatch
        def kind(value: object) -> str:
            return "object"

        @kind.register  # type: ignore[attr-defined]
        def _(value: int) -> str:
            return "int"

        assert [kind(1), kind("x")] == ["int", "object"]


class TestGenerators:
    """
    Generators, whose consumers never run inside of them.
    """

    def test_protocol(self, events: Events) -> None:
        """`send`, and the value that is returned, go through."""
        running = generator(1)

        first, second = next(running), running.send("it")
        with pytest.raises(StopIteration) as stopped:
            next(running)

        assert (first, second, stopped.value.value) == (
            "1x1.0",
            "got it",
            "returned",
        )
        assert told(events) == [200]

    def test_yield_from(self, events: Events) -> None:
        """`yield from` a decorated generator gives what it returns."""

        def outer() -> Generator[str, str, str]:
            return (yield from generator(1))

        running = outer()
        list(running)

        assert told(events) == [200]

    def test_lazy(self, events: Events) -> None:
        """The body starts with the first step, and one never started tells nothing."""
        started = []

        @api
        def work() -> Iterator[None]:
            started.append(1)
            yield

        work()
        work().close()  # type: ignore[attr-defined]
        with pytest.raises(KeyError):
            work().throw(KeyError)  # type: ignore[attr-defined]

        assert (started, told(events)) == ([], [])

    def test_wrong_arguments(self) -> None:
        """Wrong arguments are refused by the call, not by the first step."""
        with pytest.raises(TypeError, match="missing 1 required"):
            generator()  # type: ignore[call-arg]

    def test_throw(self, events: Events) -> None:
        """What is thrown in can be caught inside, and the generator goes on."""

        @api
        def work() -> Iterator[str]:
            try:
                yield "first"
            except KeyError as error:
                yield repr(error)

        running: Any = work()
        next(running)
        caught = running.throw(KeyError("x"))
        rest = list(running)

        assert (caught, rest) == ("KeyError('x')", [])
        assert told(events) == [200]

    def test_throw_through(self, events: Events) -> None:
        """What is thrown in and not caught comes out as the same object."""
        running = generator(1)
        next(running)
        error = KeyError("x")

        with pytest.raises(KeyError) as caught:
            running.throw(error)

        assert caught.value is error
        assert error.__context__ is None
        assert told(events) == ["KeyError", 500]

    @pytest.mark.parametrize("end", ["close", "break", "collect"])
    def test_completes_when_closed(self, events: Events, end: str) -> None:
        """A generator that is closed, left or collected half-consumed has completed."""

        @pgtrack.track_api("/x", status=201)
        @step
        def work() -> Iterator[int]:
            yield 1
            yield 2

        running: Any = work()
        if end == "break":
            for _ in running:
                break
        else:
            next(running)
        if end == "close":
            running.close()
        before = told(events)
        del running
        gc.collect()

        assert before == (["pay", 201] if end == "close" else [])
        assert told(events) == ["pay", 201]

    def test_close_runs_finally(self, events: Events) -> None:
        """Closing runs the body's `finally`, under the generator's session."""

        @pgtrack.session("inner")
        def work() -> Iterator[None]:
            try:
                yield
            finally:
                pgtrack.emit("custom")

        with pgtrack.session("outer"):
            running: Any = work()
            next(running)
            running.close()
            after = here()

        assert sessions(events) == ["inner"]
        assert after == "outer"

    def test_close_ignored(self) -> None:
        """A generator that goes on after `close` is reported by Python as ever."""

        @api
        def stubborn() -> Iterator[None]:
            while True:
                with contextlib.suppress(GeneratorExit):
                    yield

        running: Any = stubborn()
        next(running)
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            running.close()
        with pytest.raises(KeyError):
            running.throw(KeyError)

    def test_close_with_result(self, events: Events) -> None:
        """A generator that returns when it is closed has completed with that."""

        @pgtrack.track_api("/x", status=lambda result: result)
        def work() -> Generator[None, None, int]:
            try:
                yield
            except GeneratorExit:
                return 202
            return 200

        running = work()
        next(running)
        running.close()

        assert told(events) == [202]

    def test_nothing_held(self) -> None:
        """While it is suspended it holds neither what it yielded nor what was sent."""

        class Chunk:
            pass

        @api
        def work() -> Generator[Chunk, Any, None]:
            while True:
                with contextlib.suppress(KeyError):
                    yield Chunk()

        running = work()
        references = [weakref.ref(next(running))]
        sent = Chunk()
        references += [weakref.ref(sent), weakref.ref(running.send(sent))]
        error = type("Special", (KeyError,), {})()
        references.append(weakref.ref(error))
        references.append(weakref.ref(running.throw(error)))
        del sent, error
        gc.collect()

        assert [reference() for reference in references] == [None] * 5
        running.close()

    def test_no_leak_into_consumer(self, events: Events) -> None:
        """The session of a generator is never that of its consumer."""

        @pgtrack.session("inner", user_id="u_inner")
        def work() -> Iterator[Any]:
            yield pgtrack.current()
            with pgtrack.journey("j"):
                yield pgtrack.current()
            yield pgtrack.current()

        seen = []
        with pgtrack.session("outer"):
            for context in work():
                inner = (context.session_id, context.user_id, context.journey_id)
                seen.append((*inner, here()))

        assert seen == [
            ("inner", "u_inner", None, "outer"),
            ("inner", "u_inner", "j", "outer"),
            ("inner", "u_inner", None, "outer"),
        ]

    def test_open_blocks_do_not_leak(self) -> None:
        """A block of the user's own around a `yield` stays inside, if decorated."""

        @api
        def work() -> Iterator[str | None]:
            with pgtrack.session("own"):
                yield here()
                yield here()

        seen = [(inner, here()) for inner in work()]

        assert seen == [("own", None), ("own", None)]

    def test_interleaved(self, events: Events) -> None:
        """Generators that are stepped in turns each go on in their own session."""

        def work(name: str) -> Iterator[tuple[str, str | None]]:
            for _ in range(3):
                pgtrack.identify(f"u_{name}")
                yield name, pgtrack.current().user_id

        running = [pgtrack.session(name)(work)(name) for name in "abc"]
        seen = [pair for group in zip(*running, strict=True) for pair in group]

        assert seen == [(name, f"u_{name}") for name in "abc" * 3]
        assert here() is None

    def test_runs_under_the_call(self, events: Events) -> None:
        """A generator runs in the session it was called in, wherever it is consumed."""

        @api
        def work() -> Iterator[str | None]:
            yield here()
            yield here()

        with pgtrack.session("call"):
            outside, inside, threaded = work(), work(), work()
        with pgtrack.session("other"):
            seen = list(inside)
        seen += list(outside)
        with ThreadPoolExecutor(1) as pool:
            seen += pool.submit(list, threaded).result(10)

        assert seen == ["call"] * 6
        assert sessions(events) == ["call"] * 3

    def test_called_outside(self) -> None:
        """Called outside of any session it goes on in that of its first step."""

        @api
        def work() -> Iterator[str | None]:
            yield here()
            yield here()

        running = work()
        with pgtrack.session("first"):
            seen = [next(running)]
        with pgtrack.session("second"):
            seen += [next(running)]

        assert seen == ["first", "first"]

    def test_moves_between_threads(self, events: Events) -> None:
        """Each step may be another thread's, whose own session is put back."""

        @pgtrack.session("inner")
        def work() -> Iterator[str | None]:
            while True:
                yield here()

        running = work()
        lock = threading.Lock()

        def consume(i: int) -> list[tuple[str | None, str | None]]:
            with pgtrack.session(f"t{i}"):
                seen = []
                for _ in range(20):
                    with lock:
                        seen.append((next(running), here()))
                return seen

        seen = start_together(4, consume)

        assert seen == [[("inner", f"t{i}")] * 20 for i in range(4)]

    def test_collected_elsewhere(self, events: Events) -> None:
        """Collected in another session, its last event is its own session's."""

        @pgtrack.session("mine")
        @api
        def work() -> Iterator[None]:
            yield

        running = work()
        next(running)
        with pgtrack.session("other"):
            del running
            gc.collect()
            after = here()

        assert sessions(events) == ["mine"]
        assert after == "other"

    def test_recursion(self, events: Events) -> None:
        """A decorated generator may recurse."""

        @api
        def count(n: int) -> Iterator[int]:
            if n:
                yield n
                yield from count(n - 1)

        assert list(count(5)) == [5, 4, 3, 2, 1]
        assert len(events) == 6


def steps_of(iterator: Any, n: int) -> Any:
    """
    Return a coroutine that takes *n* steps of an async generator.
    """

    async def take() -> list[Any]:
        return [await iterator.__anext__() for _ in range(n)]

    return take()


class TestAsyncGenerators:
    """
    The same for async generators, and how event loops close them.
    """

    def test_protocol(self, events: Events, backend: str) -> None:
        """`asend` goes through, and exhaustion completes it."""

        async def main() -> list[Any]:
            running = async_generator(1)
            seen = [await running.__anext__(), await running.asend("it")]
            with pytest.raises(StopAsyncIteration):
                await running.__anext__()
            return seen

        assert anyio.run(main, backend=backend) == ["1x1.0", "got it"]
        assert told(events) == [200]

    def test_lazy(self, events: Events, backend: str) -> None:
        """One that is closed or thrown at before its first step tells nothing."""

        async def main() -> None:
            await async_generator(1).aclose()
            with pytest.raises(KeyError):
                await async_generator(1).athrow(KeyError())
            async_generator(1)

        anyio.run(main, backend=backend)

        assert told(events) == []

    def test_athrow(self, events: Events, backend: str) -> None:
        """What is thrown in can be caught inside, or comes out as the same object."""

        @api
        async def work() -> AsyncGenerator[str, None]:
            try:
                yield "first"
            except KeyError as error:
                yield repr(error)

        async def main() -> str:
            running = work()
            await running.__anext__()
            seen = await running.athrow(KeyError("x"))
            error = OSError("y")
            with pytest.raises(OSError, match="y") as caught:
                await running.athrow(error)
            assert caught.value is error
            return seen

        assert anyio.run(main, backend=backend) == "KeyError('x')"
        assert told(events) == ["OSError", 500]

    def test_aclose(self, events: Events, backend: str) -> None:
        """Closed by hand or by `aclosing` it completes, its `finally` awaited."""

        @step
        @pgtrack.session("inner")
        async def work() -> AsyncGenerator[str | None, None]:
            try:
                yield here()
            finally:
                await anyio.lowlevel.checkpoint()
                pgtrack.emit("custom")

        async def main() -> list[Any]:
            seen = []
            async with contextlib.aclosing(work()) as running:
                async for session_id in running:
                    seen += [session_id, here()]
                    break
            return seen

        assert anyio.run(main, backend=backend) == ["inner", None]
        assert [event.type for event in events] == ["custom", "journey.step"]
        assert events[0].session_id == "inner"

    def test_aclose_ignored(self) -> None:
        """One that goes on after `aclose` is reported by Python as ever."""

        @api
        async def stubborn() -> AsyncGenerator[int, None]:
            try:
                yield 1
            except GeneratorExit:
                yield 2

        async def main() -> None:
            running = stubborn()
            await running.__anext__()
            with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
                await running.aclose()

        asyncio.run(main())
        gc.collect()

    def test_break_in_loop(self, events: Events) -> None:
        """Half-consumed and dropped, it is closed by the event loop and completes."""
        closed = []
        done = asyncio.Event()

        @api
        async def work() -> AsyncGenerator[int, None]:
            try:
                yield 1
                yield 2
            finally:
                await asyncio.sleep(0)
                closed.append(here())
                done.set()

        async def main() -> None:
            with pgtrack.session("s"):
                async for _ in work():
                    break
            gc.collect()
            await asyncio.wait_for(done.wait(), 10)

        asyncio.run(main())

        assert closed == ["s"]
        assert (told(events), sessions(events)) == ([200], ["s"])

    def test_left_to_the_loop(
        self, events: Events, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What is open at the loop's end is closed by it, once, without complaint."""
        closed = []
        alive = []

        @api
        async def work(i: int) -> AsyncGenerator[int, None]:
            try:
                yield 1
            finally:
                await asyncio.sleep(0)
                closed.append(i)

        async def main() -> None:
            for i in range(20):
                running = work(i)
                await running.__anext__()
                alive.append(running)

        asyncio.run(main())

        assert sorted(closed) == list(range(20))
        assert told(events) == [200] * 20
        assert caplog.records == []

    def test_collected_without_loop(self, events: Events) -> None:
        """Half-consumed without any loop, it completes when it is collected."""
        closed = []

        @api
        async def work() -> AsyncGenerator[int, None]:
            try:
                yield 1
                yield 2
            finally:
                closed.append(here())

        with pgtrack.session("s"):
            running = work()
            taking = steps_of(running, 1)
            with pytest.raises(StopIteration):
                taking.send(None)
        del running, taking
        gc.collect()

        assert closed == ["s"]
        assert (told(events), sessions(events)) == ([200], ["s"])

    def test_collected_after_loop(self) -> None:
        """One that outlives a loop that did not close it is dropped in silence."""

        @api
        async def work() -> AsyncGenerator[int, None]:
            try:
                yield 1
            finally:
                await asyncio.sleep(0)

        loop = asyncio.new_event_loop()
        running = work()
        loop.run_until_complete(steps_of(running, 1))
        loop.close()
        del running
        gc.collect()  # what is unraisable fails the test

    def test_hooks_are_put_back(self) -> None:
        """The loop hears of the decorated generator, and of no other, only once."""
        heard: list[Any] = []
        before = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(heard.append, None)
        try:
            running = async_generator(1)
            for _ in range(2):
                with pytest.raises(StopIteration):
                    running.__anext__().send(None)  # type: ignore[attr-defined]
            hooks = sys.get_asyncgen_hooks()
        finally:
            sys.set_asyncgen_hooks(*before)

        assert heard == [running]
        assert hooks.firstiter == heard.append

    def test_cancelled_in_the_middle(self, events: Events, backend: str) -> None:
        """Cancelled while it waits, it tells 499 and no error, and the scope works."""

        @step
        @pgtrack.session("inner")
        @api
        async def work() -> AsyncGenerator[int, None]:
            yield 1
            await anyio.sleep_forever()

        async def main() -> list[Any]:
            seen: list[Any] = []
            with anyio.CancelScope() as scope:
                async with contextlib.aclosing(work()) as running:
                    async for value in running:
                        seen.append(value)
                        scope.cancel()
            return [*seen, here(), scope.cancelled_caught]

        assert anyio.run(main, backend=backend) == [1, None, True]
        assert told(events) == [499]

    def test_scope_inside(self, events: Events, backend: str) -> None:
        """A cancel scope within one step of the body works."""

        @api
        async def work() -> AsyncGenerator[bool, None]:
            for _ in range(2):
                with anyio.move_on_after(0) as scope:
                    await anyio.sleep_forever()
                yield scope.cancelled_caught

        async def main() -> list[bool]:
            return [caught async for caught in work()]

        assert anyio.run(main, backend=backend) == [True, True]
        assert told(events) == [200]

    def test_interleaved(self, events: Events, backend: str) -> None:
        """Async generators that wait in turns each go on in their own session."""

        async def work(name: str) -> AsyncGenerator[str | None, None]:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
                yield here()

        async def main() -> list[Any]:
            a, b = (pgtrack.session(name)(work)(name) for name in "ab")
            seen = []
            for _ in range(3):
                seen += [await a.__anext__(), here(), await b.__anext__(), here()]
            await a.aclose()
            await b.aclose()
            return seen

        assert anyio.run(main, backend=backend) == ["a", None, "b", None] * 3

    def test_consumer_moves_on(self, events: Events) -> None:
        """Each step may be of another session, which is put back after it."""

        @pgtrack.session("inner")
        async def work() -> AsyncGenerator[str | None, None]:
            while True:
                yield here()

        async def main() -> list[Any]:
            running = work()
            seen = []
            for name in "abc":
                with pgtrack.session(name):
                    seen.append((await running.__anext__(), here()))
            await running.aclose()
            return [*seen, here()]

        seen = asyncio.run(main())

        assert seen == [("inner", "a"), ("inner", "b"), ("inner", "c"), None]

    def test_consumed_by_another_task(self, events: Events) -> None:
        """It runs in the session it was called in, also in another's task."""

        @api
        async def work() -> AsyncGenerator[str | None, None]:
            yield here()

        async def consume(running: Any) -> list[Any]:
            with pgtrack.session("consumer"):
                return [(inner, here()) async for inner in running]

        async def main() -> list[Any]:
            with pgtrack.session("call"):
                running = work()
            return await asyncio.create_task(consume(running))

        assert asyncio.run(main()) == [("call", "consumer")]
        assert sessions(events) == ["call"]

    def test_nothing_held(self) -> None:
        """While it is suspended it holds nothing of what it yielded."""

        class Chunk:
            pass

        @api
        async def work() -> AsyncGenerator[Chunk, None]:
            while True:
                yield Chunk()

        async def main() -> Any:
            running = work()
            reference = weakref.ref(await running.__anext__())
            gc.collect()
            seen = reference()
            await running.aclose()
            return seen

        assert asyncio.run(main()) is None


class TestCoroutines:
    """
    Coroutines, cancelled and many at once.
    """

    def test_cancelled(self, events: Events, backend: str) -> None:
        """A cancelled coroutine tells 499, no error and no step; the scope works."""

        @step
        @api
        async def work() -> None:
            await anyio.sleep_forever()

        async def main() -> bool:
            with anyio.move_on_after(0) as scope:
                await work()
            return scope.cancelled_caught

        assert anyio.run(main, backend=backend)
        assert told(events) == [499]

    def test_timeout(self, events: Events) -> None:
        """`asyncio.wait_for` gives up a decorated coroutine as it does any other."""

        @api
        async def work() -> None:
            await asyncio.Event().wait()

        async def main() -> None:
            await asyncio.wait_for(work(), 0.01)

        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(main())

        assert told(events) == [499]

    def test_closed(self, events: Events) -> None:
        """One that is closed in the middle was cancelled: 499, and no step."""

        @step
        @api
        async def work() -> None:
            await asyncio.sleep(10)

        async def main() -> None:
            running = work()
            running.send(None)
            running.close()

        asyncio.run(main())

        assert told(events) == [499]

    def test_task_goes_on(self, events: Events) -> None:
        """A task that was started in a session keeps it when the session was left."""

        async def work(left: asyncio.Event) -> list[str | None]:
            await left.wait()
            with pgtrack.journey("j"):
                seen = [here()]
            return [*seen, here()]

        async def main() -> list[str | None]:
            left = asyncio.Event()
            with pgtrack.session("s"):
                task = asyncio.create_task(work(left))
                await asyncio.sleep(0)
            left.set()
            return await task

        assert asyncio.run(main()) == ["s", "s"]

    def test_many_tasks(self, events: Events) -> None:
        """2,000 tasks that interleave at each step never mix."""

        @api
        async def inner(i: int) -> str | None:
            await asyncio.sleep(0)
            assert pgtrack.current().user_id == f"u_{i}"
            return here()

        async def work(i: int) -> bool:
            pgtrack.identify(f"u_{i}")
            await asyncio.sleep(0)
            return await inner(i) == f"s{i}"

        async def main() -> list[bool]:
            tasks = (pgtrack.session(f"s{i}")(work)(i) for i in range(2000))
            return await asyncio.gather(*tasks)

        assert asyncio.run(main()) == [True] * 2000
        assert {(e.session_id, e.user_id) for e in events} == {
            (f"s{i}", f"u_{i}") for i in range(2000)
        }

    def test_many_threads(self, events: Events) -> None:
        """Threads never mix."""

        @api
        def inner() -> tuple[str | None, str | None]:
            return here(), pgtrack.current().user_id

        def work(i: int) -> set[Any]:
            seen = set()
            for n in range(100):
                with pgtrack.session(f"s{i}.{n}", user_id=f"u_{i}.{n}"):
                    seen.add((n, *inner()))
            return seen

        seen = start_together(16, work)

        assert seen == [
            {(n, f"s{i}.{n}", f"u_{i}.{n}") for n in range(100)} for i in range(16)
        ]
        assert len({event.session_id for event in events}) == 1600


class Answer:
    """
    Has a status, as responses do.
    """

    def __init__(self, status_code: object) -> None:
        self.status_code = status_code


class Hostile:
    """
    Raises when it is asked for anything.
    """

    @property
    def status_code(self) -> int:
        raise ZeroDivisionError


class StatusError(Exception):
    """
    Carries a status, as many frameworks' exceptions do.
    """

    def __init__(self, status_code: object) -> None:
        self.status_code = status_code


class TestStatus:
    """
    Which status is told.
    """

    @pytest.mark.parametrize(
        ("result", "expected"),
        [
            (None, 200),
            (Answer(201), 201),
            (Answer(599), 599),
            (Answer(100), 100),
            (Answer(99), 200),
            (Answer(600), 200),
            (Answer(True), 200),
            (Answer("404"), 200),
            (Answer(None), 200),
            (Hostile(), 200),
            ((404, "x"), 200),
        ],
    )
    def test_of_result(self, events: Events, result: object, expected: int) -> None:
        """The result's `status_code` counts if it is an int in 100 to 599, else 200."""
        assert api(lambda: result)() is result
        assert events[-1].api_status_code == expected

    @pytest.mark.parametrize(
        ("status", "expected", "adjusted"),
        [
            (204, 204, 0),
            (lambda result: result["status"], 409, 0),
            (lambda result: result["missing"], 200, 1),
            (lambda result: "nonsense", 200, 1),
            (1000, 200, 1),
        ],
    )
    def test_given(
        self, events: Events, status: Any, expected: int, adjusted: int
    ) -> None:
        """`status=` is the status or a function of the result; a bad one is counted."""
        decorated = pgtrack.track_api("/x", status=status)(lambda: {"status": 409})

        assert decorated() == {"status": 409}
        assert told(events) == [expected]
        assert pgtrack.stats().adjusted.get("status_code", 0) == adjusted

    @pytest.mark.parametrize("status", [500, 503, 599])
    def test_server_error(self, events: Events, status: int) -> None:
        """From 500 on there is an error event, too, before that of the call."""
        api(lambda: Answer(status))()

        assert told(events) == [str(status), status]
        assert events[0].error_component is not None

    @pytest.mark.parametrize(
        ("status", "expected"), [(404, [404]), ("x", ["StatusError", 500])]
    )
    def test_of_error(self, events: Events, status: object, expected: Any) -> None:
        """An error's own status counts; below 500 it makes no error event."""

        @api
        def work() -> None:
            raise StatusError(status)

        with pytest.raises(StatusError):
            work()

        assert told(events) == expected

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (KeyboardInterrupt, [500]),
            (SystemExit, [500]),
            (GeneratorExit, [499]),
            (asyncio.CancelledError, [499]),
            (ValueError, ["ValueError", 500]),
        ],
    )
    def test_ends_of_programs(
        self, events: Events, error: type[BaseException], expected: Any
    ) -> None:
        """What ends a program or a task makes no error event and no step."""

        @api
        @step
        def work() -> None:
            raise error

        with pytest.raises(error):
            work()

        assert told(events) == expected

    def test_duration(self, events: Events) -> None:
        """Durations are integers of milliseconds."""
        api(step(lambda: time.sleep(0.02)))()

        inner, outer = events
        assert inner.duration_ms is not None
        assert outer.api_duration_ms is not None
        assert 20 <= inner.duration_ms <= outer.api_duration_ms < 2000


class TestErrors:
    """
    What becomes of exceptions.
    """

    def test_one_event(self, events: Events) -> None:
        """An error makes one event, however many layers it passes."""

        @api
        @step
        def inner() -> None:
            raise ValueError("x")

        @api
        @step
        def outer() -> None:
            with pgtrack.api_call("GET", "/inner"):
                inner()

        with pytest.raises(ValueError, match="x"):
            outer()

        assert told(events) == ["ValueError", 500, 500, 500]

    def test_step_fields(self, events: Events) -> None:
        """The error of a step carries the journey and the step, whoever told it."""

        @step
        @api
        def work() -> None:
            raise KeyError

        with pytest.raises(KeyError):
            work()

        error, response = events
        fields = error.journey_id, error.journey_step_id, error.journey_step_name
        assert fields == ("checkout", "pay", "Payment")
        assert (response.journey_id, response.journey_step_id) == ("checkout", None)

    def test_component(self, events: Events) -> None:
        """The error names the function it came out of."""
        with pytest.raises(ZeroDivisionError):
            api(divide)()

        assert events[0].error_component == f"{__name__}.divide"

    @pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "async"])
    def test_identity(self, events: Events, kind: str) -> None:
        """The error is the same object, with its cause, context and traceback."""
        error, cause = KeyError("x"), OSError("y")

        def fail() -> None:
            try:
                raise ValueError
            except ValueError:
                raise error from cause

        call = failing(kind, fail)
        with pytest.raises(KeyError) as caught:
            call()

        assert caught.value is error
        assert error.__cause__ is cause
        assert type(error.__context__) is ValueError
        assert caught.traceback[-1].name == "fail"
        assert told(events) == ["KeyError", 500]

    @pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "async"])
    @pytest.mark.parametrize("error", [ValueError, StatusError])
    def test_nothing_kept_alive(
        self, events: Events, kind: str, error: type[Exception]
    ) -> None:
        """What a failed call held dies with the error, without the collector's help."""

        class Local:
            pass

        references = []

        def fail() -> None:
            local = Local()
            references.append(weakref.ref(local))
            raise error(500)

        call = failing(kind, fail)
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(error):
                call()
            alive = [reference() for reference in references]
        finally:
            gc.enable()

        assert alive == [None]
        assert gc.collect() == 0

    @pytest.mark.parametrize("kind", ["generator", "async"])
    def test_thrown_leaves_no_cycle(self, events: Events, kind: str) -> None:
        """Nor does an error that was thrown into a generator stay."""

        class Special(Exception):  # noqa: N818
            pass

        @api
        def generate() -> Iterator[None]:
            yield

        @api
        async def generate_async() -> AsyncGenerator[None, None]:
            yield

        async def throw_async() -> None:
            running = generate_async()
            await running.__anext__()
            await running.athrow(errors.pop())

        errors = [Special()]
        reference = weakref.ref(errors[0])
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(Special):
                if kind == "generator":
                    running: Any = generate()
                    next(running)
                    running.throw(errors.pop())
                else:
                    throw_async().send(None)
            alive = reference()
        finally:
            gc.enable()

        assert alive is None
        assert told(events) == ["Special", 500]

    def test_raised_in_a_loop(self, events: Events) -> None:
        """Each new error makes its event, also where it has a dead one's address."""

        @api
        def work(error: type[Exception]) -> None:
            raise error("x")

        for kind in (ValueError, StatusError):
            for _ in range(100):
                with contextlib.suppress(kind):
                    work(kind)

        assert told(events) == [
            *["ValueError", 500] * 100,
            *["StatusError", 500] * 100,
        ]

    def test_no_journey(self, events: Events) -> None:
        """A step without any journey is dropped and counted; its error is told."""

        @pgtrack.journey_step("s")
        def work(error: Exception | None = None) -> None:
            if error is not None:
                raise error

        work()
        with pytest.raises(KeyError):
            work(KeyError("x"))

        assert told(events) == ["KeyError"]
        assert pgtrack.stats().dropped == {"no_journey": 1}

    def test_enclosing_journey(self, events: Events) -> None:
        """A step belongs to the enclosing journey, or to that it names."""
        with pgtrack.journey("around"):
            pgtrack.journey_step("s")(lambda: None)()
            step(lambda: None)()

        assert [event.journey_id for event in events] == ["around", "checkout"]


class TestInARequest:
    """Under a middleware of pgtrack's, which tells each request once."""

    def served(self, **options: Any) -> Served:
        served = Serving(**options).begin({}, "GET", "/users/7")
        assert served is not None
        return served

    def answer(self, served: Served, status: int = 200) -> None:
        served.answer_with(status)
        served.complete()
        served.leave()

    def test_the_outermost_is_the_requests_own(self, events: Events) -> None:
        """The first decorated function makes no event; its path and method win."""
        served = self.served()
        api(lambda: None)()
        self.answer(served, 201)

        assert [("POST", "/api", 201)] == calls(events)

    def test_a_bare_one_leaves_path_and_method(self, events: Events) -> None:
        """Without path and method those of the request stay, the route first of all."""
        served = self.served()
        served.request.find_route = lambda: "/users/{id}"
        pgtrack.track_api(divide_by_one)()
        self.answer(served)

        assert [("GET", "/users/{id}", 200)] == calls(events)

    def test_nested_ones_are_their_own(self, events: Events) -> None:
        """What a request's own function calls makes events of its own."""
        served = self.served()
        bare = pgtrack.track_api(divide_by_one)
        nested = pgtrack.track_api("/nested")(bare)
        api(nested)()
        with pgtrack.api_call("PUT", "/block"):
            pgtrack.track_api_call("PATCH", "/call")
        self.answer(served)

        name = f"{__name__}.divide_by_one"
        assert [
            (None, name, 200),
            (None, "/nested", 200),
            ("PATCH", "/call", 200),
            ("PUT", "/block", 200),
            ("POST", "/api", 200),
        ] == calls(events)

    def test_background_work_is_its_own(self, events: Events) -> None:
        """What runs once the answer has begun makes events of its own."""
        served = self.served()
        served.answer_with(200)
        api(lambda: None)()
        served.complete()
        served.leave()

        assert [("POST", "/api", 200), ("GET", "/users/7", 200)] == calls(events)

    def test_untold(self, events: Events) -> None:
        """Where the middleware tells nothing, a bare one has the request's path."""
        served = self.served(track=False)
        served.request.find_route = lambda: "/users/{id}"
        pgtrack.track_api(pgtrack.track_api(divide_by_one))()
        self.answer(served)

        name = f"{__name__}.divide_by_one"
        assert [(None, name, 200), ("GET", "/users/{id}", 200)] == calls(events)

    def test_a_route_that_raises(self, events: Events) -> None:
        """Where routing itself fails the path is as it came."""
        served = self.served()
        served.request.find_route = divide  # type: ignore[assignment, return-value]
        self.answer(served)

        assert [("GET", "/users/7", 200)] == calls(events)

    def test_another_client(self, events: Events) -> None:
        """A function with a client of its own tells that one, too."""
        served = self.served()
        with pgtrack.Client(
            pgtrack.Config.isolated(project_id="p", endpoint="https://h.invalid")
        ) as other:
            pgtrack.track_api("/mine", client=other)(divide_by_one)()
            emitted = other.stats().emitted
            other.close(0)
        self.answer(served)

        assert 1 == emitted
        assert [("GET", "/users/7", 200)] == calls(events)

    def test_its_error_is_told_with_a_500(self, events: Events) -> None:
        """The error of the own function is that of a failed answer, told once."""
        served = self.served()
        with pytest.raises(ZeroDivisionError):
            api(divide)()
        self.answer(served, 500)

        assert ["ZeroDivisionError", 500] == told(events)
        assert f"{__name__}.divide" == events[0].error_component

    def test_its_error_was_answered_otherwise(self, events: Events) -> None:
        """An error that the framework answers with a 4xx makes no error event."""
        served = self.served()
        with pytest.raises(ZeroDivisionError):
            api(divide)()
        self.answer(served, 422)

        assert [422] == told(events)

    def test_its_error_is_not_kept(self, events: Events) -> None:
        """Once the request is told, nothing holds on to the error."""
        served = self.served()
        with pytest.raises(ZeroDivisionError):
            api(divide)()
        assert served.request.error is not None
        self.answer(served, 500)

        assert served.request.error is None

    def test_two_at_once(self, events: Events) -> None:
        """Of many threads in one request only one is its own function."""
        served = self.served()
        work = pgtrack.bind(api(lambda: None))
        start_together(8, lambda _: work())
        self.answer(served)

        assert [("POST", "/api", 200)] * 8 == calls(events)

    def test_another_session_inside(self, events: Events) -> None:
        """A session that the handler opens is still inside of the request."""
        served = self.served()
        with pgtrack.session("other"):
            api(lambda: None)()
        self.answer(served)

        assert [("POST", "/api", 200)] == calls(events)
        assert events[0].session_id != "other"

    def test_other_work_inside(self, events: Events) -> None:
        """What is continued from elsewhere, as a message is, is no part of it."""
        served = self.served()
        with pgtrack.continued_from({"X-Session-ID": "message"}):
            api(lambda: None)()
        self.answer(served)

        assert ["message", events[1].session_id] == sessions(events)
        assert [("POST", "/api", 200), ("GET", "/users/7", 200)] == calls(events)

    def test_generators(self, events: Events) -> None:
        """A decorated generator that makes the answer is the request's own."""
        served = self.served()
        chunks = pgtrack.track_api("/stream")(count_to)(2)
        next(chunks)
        served.answer_with(200)
        list(chunks)
        served.complete()
        served.leave()

        assert [("GET", "/stream", 200)] == calls(events)


def calls(events: Events) -> list[tuple[str | None, str | None, int | None]]:
    """Return method, path and status of the calls among *events*."""
    return [(e.api_method, e.api_path, e.api_status_code) for e in events]


def divide_by_one() -> float:
    return 1 / 1


def count_to(n: int) -> Iterator[int]:
    yield from range(n)


def divide() -> float:
    """
    Fail.
    """
    return 1 / 0


def run(function: Callable[..., Any], *args: Any) -> Any:
    """
    Call it, and await what it returns without a loop, if that can be awaited.
    """
    made = function(*args)
    if not hasattr(made, "__await__"):
        return made
    try:
        made.__await__().send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError


def failing(kind: str, fail: Callable[[], None]) -> Callable[[], Any]:
    """
    Return a function that runs *fail* in a decorated callable of the kind.
    """

    @api
    def plain() -> None:
        fail()

    @api
    async def wait() -> None:
        fail()

    @api
    def generate() -> Iterator[None]:
        yield
        fail()

    @api
    async def generate_async() -> AsyncGenerator[None, None]:
        yield
        fail()

    async def exhaust() -> None:
        async for _ in generate_async():
            pass

    return {
        "function": plain,
        "coroutine": lambda: run(wait),
        "generator": lambda: list(generate()),
        "async": lambda: run(exhaust),
    }[kind]


class TestBind:
    """
    Functions that take their correlation along.
    """

    def test_thread(self, events: Events) -> None:
        """A bound function runs in the correlation it was bound in, in any thread."""
        with pgtrack.session("s", user_id="u", metadata={"k": 1}):
            bound = pgtrack.bind(pgtrack.current)
            expected = pgtrack.current()

        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(bound).result(10)
            after = pool.submit(here).result(10)

        assert (seen, after) == (expected, None)

    def test_over_the_present(self) -> None:
        """The present correlation gives way, and is back afterwards, also on errors."""
        with pgtrack.session("s"):
            bound = pgtrack.bind(here)
            failing = pgtrack.bind(divide)
        outside = pgtrack.bind(here)

        with pgtrack.session("other"):
            seen = [bound(), outside(), here()]
            with pytest.raises(ZeroDivisionError):
                failing()
            seen.append(here())

        assert seen == ["s", None, "other", "other"]

    def test_identify(self, events: Events) -> None:
        """What a bound function identifies, the session sees."""
        with pgtrack.session("s"):
            bound = pgtrack.bind(pgtrack.identify)
            threading.Thread(target=bound, args=("u",)).run()
            seen = pgtrack.current().user_id

        assert seen == "u"

    def test_coroutine(self) -> None:
        """A bound coroutine function runs bound to its end, whatever the task has."""

        async def work() -> list[str | None]:
            seen = [here()]
            await asyncio.sleep(0)
            return [*seen, here()]

        with pgtrack.session("s"):
            bound = pgtrack.bind(work)

        async def main() -> list[Any]:
            with pgtrack.session("other"):
                return [await bound(), here()]

        assert asyncio.run(main()) == [["s", "s"], "other"]

    def test_generators(self) -> None:
        """Bound generators run bound, and their consumers do not."""

        def generate() -> Iterator[str | None]:
            yield here()
            yield here()

        async def generate_async() -> AsyncGenerator[str | None, None]:
            yield here()

        with pgtrack.session("s"):
            bound = pgtrack.bind(generate)
            bound_async = pgtrack.bind(generate_async)

        async def main() -> list[Any]:
            return [(inner, here()) async for inner in bound_async()]

        with pgtrack.session("other"):
            seen = [(inner, here()) for inner in bound()]
            seen += asyncio.run(main())

        assert seen == [("s", "other")] * 3

    def test_callback(self) -> None:
        """Methods, partials and builtins can be bound, too."""
        seen: list[Any] = []
        with pgtrack.session("s"):
            bound = [
                pgtrack.bind(functools.partial(seen.append, 1)),
                pgtrack.bind(seen.append),
            ]

        bound[0]()
        bound[1](2)

        assert seen == [1, 2]

    def test_other_context(self) -> None:
        """In a context that was copied before, the bound correlation counts."""
        context = contextvars.copy_context()
        with pgtrack.session("s"):
            bound = pgtrack.bind(here)

        assert context.run(bound) == "s"
        assert context.run(current_frame) is None
