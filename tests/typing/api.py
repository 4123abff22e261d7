"""
What type checkers make of the public API; read by mypy and pyright, never run.

A line with `type: ignore` is a mistake on purpose: if a checker does not see it, it
reports the comment as unnecessary.
"""

from __future__ import annotations

import functools
from collections.abc import (
    AsyncGenerator,
    Generator,
)
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timezone
from typing import overload

from typing_extensions import assert_type

import pgtrack
from pgtrack._blocks import ApiCall, Journey, SessionRun

client = pgtrack.Client(pgtrack.Config())


# --- functions of each kind keep their signatures ---


@pgtrack.track_api
def bare(a: int, *, b: str = "") -> float:
    return float(a) + len(b)


@pgtrack.track_api()
def called(a: int, *, b: str = "") -> float:
    return float(a) + len(b)


@pgtrack.track_api("/x", method="POST", status=lambda result: 201, client=client)
async def coroutine(a: int, *, b: str = "") -> float:
    return float(a) + len(b)


@pgtrack.journey_step("s", "Step", journey="j", client=client)
def generator(a: int) -> Generator[int, str, bool]:
    yield a
    return True


@pgtrack.journey_step("s")
async def async_generator(a: int) -> AsyncGenerator[int, str]:
    yield a


@pgtrack.session("s", user_id="u", metadata={"k": 1}, client=client)
@pgtrack.journey("j", client=client)
@pgtrack.api_call("GET", "/x", client=client)
@pgtrack.continued_from({"X-Session-ID": "s"}, client=client)
def in_blocks(a: int, *, b: str = "") -> float:
    return float(a) + len(b)


@pgtrack.session()
async def in_session(a: int) -> str:
    return str(a)


@pgtrack.bind
def bound(a: int) -> str:
    return str(a)


assert_type(bare(1, b="x"), float)
assert_type(called(1, b="x"), float)
assert_type(in_blocks(1, b="x"), float)
assert_type(generator(1), Generator[int, str, bool])
assert_type(async_generator(1), AsyncGenerator[int, str])
assert_type(bound(1), str)
assert_type(pgtrack.bind(bare)(1), float)
assert_type(pgtrack.track_api(functools.partial(bare, 1))(), float)

bare("x")  # type: ignore[arg-type]
bare(1, "x")  # type: ignore[call-arg]
called(1, c="x")  # type: ignore[call-arg]
coroutine()  # type: ignore[call-arg, unused-coroutine]
generator("x")  # type: ignore[arg-type]
async_generator(1, 2)  # type: ignore[call-arg]
in_blocks("x")  # type: ignore[arg-type]
bound("x")  # type: ignore[arg-type]


# --- methods ---


class Shop:
    @pgtrack.track_api
    def method(self, a: int) -> str:
        return str(a)

    @pgtrack.track_api
    async def wait(self, a: int) -> str:
        return str(a)

    @pgtrack.track_api("/x")
    @classmethod
    def class_outside(cls, a: int) -> str:
        return cls.__name__ * a

    @classmethod
    @pgtrack.track_api("/x")
    def class_inside(cls, a: int) -> str:
        return cls.__name__ * a

    @pgtrack.session()
    @staticmethod
    def static_outside(a: int) -> str:
        return str(a)

    @staticmethod
    @pgtrack.session()
    def static_inside(a: int) -> str:
        return str(a)

    @property
    @pgtrack.track_api
    def below_property(self) -> int:
        return 1

    @overload
    def overloaded(self, a: int) -> int: ...

    @overload
    def overloaded(self, a: str) -> str: ...

    @pgtrack.track_api
    def overloaded(self, a: int | str) -> int | str:
        return a


shop = Shop()
assert_type(shop.method(1), str)
assert_type(Shop.method(shop, 1), str)
assert_type(Shop.class_outside(1), str)
assert_type(shop.class_outside(1), str)
assert_type(Shop.class_inside(1), str)
assert_type(Shop.static_outside(1), str)
assert_type(shop.static_inside(1), str)
assert_type(shop.below_property, int)
assert_type(shop.overloaded(1), int)
assert_type(shop.overloaded("x"), str)

shop.method("x")  # type: ignore[arg-type]
Shop.class_outside("x")  # type: ignore[arg-type]
Shop.class_inside("x")  # type: ignore[arg-type]
Shop.static_outside("x")  # type: ignore[arg-type]
Shop.static_inside("x")  # type: ignore[arg-type]


# --- other callables ---


@overload
def double(a: int) -> int: ...


@overload
def double(a: str) -> str: ...


def double(a: int | str) -> int | str:
    return a * 2


class Callee:
    def __call__(self, a: int) -> str:
        return str(a)


assert_type(pgtrack.track_api(double)("x"), str)
assert_type(pgtrack.track_api("/x")(double)(1), int)
assert_type(pgtrack.session()(Callee())(1), str)
assert_type(pgtrack.track_api(len)("abc"), int)

pgtrack.track_api(double)(1.5)  # type: ignore[call-overload]
pgtrack.session()(Callee())("x")  # type: ignore[arg-type]
pgtrack.track_api(1)  # type: ignore[call-overload]
pgtrack.journey_step(double)  # type: ignore[arg-type]
pgtrack.bind(1)  # type: ignore[type-var]


@contextmanager
@pgtrack.track_api
def manage(a: int) -> Generator[str]:
    yield str(a)


@pgtrack.track_api
@asynccontextmanager
async def manage_async(a: int) -> AsyncGenerator[str]:
    yield str(a)


with manage(1) as managed:
    assert_type(managed, str)


# --- the blocks ---


def blocks() -> None:
    with pgtrack.session() as run:
        assert_type(run, SessionRun)
        assert_type(run.session_id, str)
    with pgtrack.journey("j") as journey:
        assert_type(journey, Journey)
        assert_type(journey.step("s", "Step", duration_ms=1.5, metadata={}), bool)
        assert_type(journey.convert(name="x"), bool)
        assert_type(journey.abandon("reason", user_id="u"), bool)
        journey.step("s", naem="x")  # type: ignore[call-arg]
        journey.convert(naem="x")  # type: ignore[call-arg]
        journey.abandon(naem="x")  # type: ignore[call-arg]
    with pgtrack.api_call() as call:
        assert_type(call, ApiCall)
        call.status_code = 201
        call.status_code = "201"  # type: ignore[assignment]


async def awaited() -> None:
    assert_type(await coroutine(1, b="x"), float)
    assert_type(await in_session(1), str)
    assert_type(await shop.wait(1), str)
    assert_type(await pgtrack.aflush(), bool)
    assert_type(await pgtrack.ashutdown(timeout=1), bool)
    async with manage_async(1) as value:
        assert_type(value, str)


async def async_blocks() -> None:
    async with pgtrack.session("s") as run, pgtrack.journey("j") as journey:
        assert_type(run, SessionRun)
        assert_type(journey, Journey)
    async with pgtrack.continued_from([(b"x-session-id", b"s")], trusted=True) as other:
        assert_type(other, SessionRun)


pgtrack.continued_from({"X-Session-ID": "s"}, True)
pgtrack.continued_from({b"x-session-id": b"s"})
pgtrack.continued_from([("X-Session-ID", "s")])
pgtrack.continued_from(None)
pgtrack.session(1)  # type: ignore[arg-type]
pgtrack.journey()  # type: ignore[call-arg]
pgtrack.continued_from(1)  # type: ignore[arg-type]


# --- the verbs ---

now = datetime.now(timezone.utc)
assert_type(pgtrack.emit("custom", name="x", metadata={"k": object()}), bool)
assert_type(pgtrack.emit("whatever.else", timestamp=now, event_id="e"), bool)
assert_type(client.emit("error", error_type="E", session_id=None), bool)
assert_type(pgtrack.track_api_call("GET", "/", 200, duration=0.1, user_id="u"), bool)
assert_type(pgtrack.track_error(ValueError(), error_component="c"), bool)
assert_type(pgtrack.track_error("ValueError", "message"), bool)
assert_type(pgtrack.track_journey_step("j", "s", "Step", duration_ms=1), bool)
assert_type(pgtrack.propagation_headers(trusted=True), dict[str, str])
assert_type(pgtrack.propagation_headers(True), dict[str, str])
assert_type(pgtrack.current(), pgtrack.Context)
assert_type(pgtrack.current().session_id, "str | None")
assert_type(pgtrack.stats(), pgtrack.Stats)
assert_type(pgtrack.flush(1), bool)
assert_type(pgtrack.shutdown(timeout=1.5), bool)
assert_type(pgtrack.configure(endpoint="console:", project_id="p"), pgtrack.Client)
pgtrack.identify("u")
pgtrack.identify(None)

pgtrack.emit()  # type: ignore[call-arg]
pgtrack.emit("custom", naem="x")  # type: ignore[call-arg]
pgtrack.emit("custom", name=1)  # type: ignore[arg-type]
pgtrack.emit("custom", timestamp="now")  # type: ignore[arg-type]
pgtrack.emit("custom", metadata=[1])  # type: ignore[arg-type]
client.emit("custom", naem="x")  # type: ignore[call-arg]
pgtrack.track_api_call("GET", "/", naem="x")  # type: ignore[call-arg]
pgtrack.track_error(1)  # type: ignore[arg-type]
pgtrack.track_journey_step("j")  # type: ignore[call-arg]
pgtrack.configure(endpiont="console:")  # type: ignore[call-arg]
pgtrack.Event(type="custom").type = "x"  # type: ignore[misc]
pgtrack.current().user_id = "u"  # type: ignore[misc]


def closing() -> None:
    with pgtrack.Client(pgtrack.Config()) as opened:
        assert_type(opened, pgtrack.Client)
