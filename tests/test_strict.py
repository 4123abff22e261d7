"""Whatever emit is given, a strict server of every version takes what comes of it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import json
import pathlib
import threading
import types
import uuid
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pgtrack
from harness import VERSIONS, ProductGraph
from pgtrack._event import FIELDS, KEYWORDS
from pgtrack.typing import Answer, Verdict

# --- the other side --------------------------------------------------------------


class InProcess:
    """A transport that hands batches to strict servers of all versions, no socket."""

    is_immediate = False

    def __init__(self) -> None:
        self.servers = [ProductGraph(version) for version in VERSIONS]
        self.answers: list[Any] = []

    def __call__(self) -> InProcess:
        """Be the factory, too."""
        return self

    def send(self, events: list[bytes], timeout: float) -> Answer:
        """Hand the batch to each server."""
        body = b'{"events":[' + b",".join(events) + b"]}"
        for server in self.servers:
            reply = server.respond("POST", "/v1/events", {}, body)
            answer = None if reply is None else (reply.status, reply.body)
            self.answers.append(answer)
            expected = {"accepted": len(events), "rejected": 0}
            if answer is None or answer[0] != 202 or json.loads(answer[1]) != expected:
                return Answer(verdict=Verdict.LOST, reason=f"{answer}")
        return Answer(verdict=Verdict.TAKEN)

    def abort(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def strict_client(**options: Any):
    """Yield a client of the strict servers, and the servers."""
    servers = InProcess()
    options = {"project_id": "p", "endpoint": "console:", "handle_sigterm": False} | (
        options
    )
    with pgtrack.Client(pgtrack.Config(**options), transport=servers) as client:
        yield client, servers


def assert_all_taken(client: pgtrack.Client, servers: InProcess) -> list[dict]:
    """Assert that nothing was refused or lost, and return what the servers have."""
    assert client.flush(30)
    stats = client.stats()

    assert [] == [a for a in servers.answers if a is None or a[0] != 202]
    assert {} == dict(stats.rejected)
    assert not {"internal_error", "endpoint_lost", "too_large"} & stats.dropped.keys()
    assert stats.is_balanced
    assert 0 == stats.pending
    counts = {len(server.events) for server in servers.servers}
    assert {stats.delivered} == counts
    return servers.servers[-1].events


# --- hostile values --------------------------------------------------------------


class HostileError(Exception):
    """What hostile objects raise."""


def _raise(*_: Any, **__: Any) -> Any:
    raise HostileError


def hostile(*methods: str, bases: tuple[type, ...] = (), **more: Any) -> Any:
    """Return an object of a class whose *methods* raise."""
    kind = type("Odd", bases, {**dict.fromkeys(methods, _raise), **more})
    return kind()


class LyingLength(list):
    """A list that says it has any other number of items."""

    def __init__(self, items: list, length: int) -> None:
        super().__init__(items)
        self.length = length

    def __len__(self) -> int:
        return self.length


class LyingClass:
    """Says that it is of another class."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    @property
    def __class__(self) -> type:
        """Lie."""
        return self.kind


class LazyFailing(Mapping):
    """A mapping that fails as it is read, after a few keys."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __getitem__(self, key: object) -> object:
        return 1

    def __iter__(self):
        yield from range(self.after)
        raise HostileError

    def __len__(self) -> int:
        return self.after + 1


class Text(str):
    """A text that lies about everything that can be overridden."""

    __slots__ = ()
    __str__ = __repr__ = __len__ = __iter__ = __eq__ = __getitem__ = __format__ = _raise
    __hash__ = None
    encode = isascii = replace = _raise


class Empty(str):
    """A text that says it is empty."""

    __slots__ = ()

    def __str__(self) -> str:
        return ""


class Number(int):
    """An integer that raises when it is used."""

    __str__ = __repr__ = __int__ = __index__ = __float__ = __round__ = _raise
    __lt__ = __gt__ = __le__ = __ge__ = __eq__ = bit_length = _raise
    __hash__ = None


class Real(float):
    """A number that raises when it is used."""

    __str__ = __repr__ = __int__ = __float__ = __round__ = __lt__ = __gt__ = _raise


class Items(dict):
    """A dict whose overridden methods raise."""

    items = keys = __iter__ = __len__ = _raise


class Endless(dict):
    """A dict whose items never end."""

    def items(self):
        """Lie."""
        while True:
            yield "k", 1

    def __len__(self) -> int:
        return 10**9


class Wrong(dict):
    """A dict whose items are no pairs."""

    def items(self):
        """Lie."""
        return [1, 2, 3]

    def __len__(self) -> int:
        return 3


class Recursive(enum.Enum):
    """An enum whose value is itself."""

    ONE = 1

    @property
    def value(self) -> Recursive:
        """Return the member."""
        return self


class Meta(type):
    """A metaclass that hides everything about its classes."""

    __getattribute__ = _raise


class Nameless(metaclass=Meta):
    """An object of a class without a name."""

    __repr__ = _raise


@dataclasses.dataclass
class Unset:
    """A dataclass whose fields were not set."""

    a: int = dataclasses.field(init=False)
    b: object = None


@attrs.define
class Attrs:
    """An attrs class."""

    a: object
    password: str = "hunter2"


class Pydantic:
    """Dumps itself as Pydantic's models do."""

    def __init__(self, dumped: object) -> None:
        self.dumped = dumped

    def model_dump(self) -> object:
        """Return what there is."""
        return self.dumped


class Zone(dt.tzinfo):
    """A time zone that is of no use."""

    def __init__(self, offset: object) -> None:
        self.offset = offset

    def utcoffset(self, moment: object) -> Any:
        """Return the offset, or fail."""
        return _raise() if self.offset is None else self.offset

    dst = tzname = _raise


class ArrayLike:
    """Looks like an array of NumPy's."""

    dtype = "int64"

    def __init__(self, values: object, size: int) -> None:
        self.values, self.size = values, size

    def tolist(self) -> object:
        """Return the values."""
        return self.values

    __index__ = __float__ = _raise


class Color(enum.IntEnum):
    """An enum of integers."""

    RED = 1


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024  as others have it


def cyclic() -> list:
    """Return a list that holds itself."""
    value: list = []
    value.append({"again": value})
    return value


def deep(levels: int = 5_000) -> Any:
    """Return lists in lists."""
    value: Any = "bottom"
    for _ in range(levels):
        value = [value]
    return value


def unconsumed():
    """Yield, which nobody is to ask for."""
    yield _raise()


OFFSET = dt.timezone(dt.timedelta(hours=23, minutes=59, seconds=59))
ODD = {
    "repr raises": lambda: hostile("__repr__", "__str__"),
    "class raises": lambda: hostile(__class__=property(_raise)),
    "getattribute raises": lambda: hostile("__getattribute__"),
    "getattr raises": lambda: hostile("__getattr__"),
    "len raises": lambda: hostile("__len__", bases=(list,)),
    "iter raises": lambda: hostile("__iter__", bases=(list,)),
    "hash and eq raise": lambda: hostile("__hash__", "__eq__"),
    "bool raises": lambda: hostile("__bool__"),
    "format raises": lambda: hostile("__format__", bases=(Exception,)),
    "str of an error raises": lambda: hostile("__str__", bases=(ValueError,)),
    "index raises": lambda: hostile("__index__"),
    "float raises": lambda: hostile("__float__", "__round__"),
    "repr is a text subclass": lambda: hostile(__repr__=lambda _: Text("x")),
    "repr is no text": lambda: hostile(__repr__=lambda _: 5),
    "nameless": Nameless,
    "nameless class": lambda: Nameless,
    "lying class str": lambda: LyingClass(str),
    "lying class dict": lambda: LyingClass(dict),
    "lying class int": lambda: LyingClass(int),
    "lying class datetime": lambda: LyingClass(dt.datetime),
    "lying class enum": lambda: LyingClass(enum.Enum),
    "lying class error": lambda: LyingClass(ValueError),
    "longer than it says": lambda: LyingLength([1, 2, 3], 1),
    "shorter than it says": lambda: LyingLength([1, 2, 3], 10**9),
    "of negative length": lambda: LyingLength([1], -1),
    "fails lazily": lambda: LazyFailing(3),
    "text that raises": lambda: Text("text"),
    "text that is empty": lambda: Empty("full"),
    "integer that raises": lambda: Number(5),
    "float that raises": lambda: Real(0.5),
    "dict that raises": lambda: Items(a=1),
    "endless": Endless,
    "no pairs": Wrong,
    "recursive enum": lambda: Recursive.ONE,
    "cycle": cyclic,
    "deep": deep,
    "wide": lambda: list(range(100_000)),
    "many keys": lambda: {str(i): i for i in range(100_000)},
    "large keys": lambda: {"k" * 1_000_000: 1},
    "NaN": lambda: float("nan"),
    "infinity": lambda: -float("inf"),
    "10**5000": lambda: 10**5_000,
    "-10**5000": lambda: -(10**5_000),
    "2**63": lambda: 2**63,
    "Decimal NaN": lambda: decimal.Decimal("NaN"),
    "Decimal sNaN": lambda: decimal.Decimal("sNaN"),
    "large Decimal": lambda: decimal.Decimal("1E+999999"),
    "small Decimal": lambda: decimal.Decimal("1E-999999"),
    "digits of a large number": lambda: "1e999999999",
    "fraction": lambda: fractions.Fraction(1, 3),
    "complex": lambda: complex(1, float("nan")),
    "lone surrogates": lambda: "a\ud800b\udfffc",
    "surrogates in a key": lambda: {"\udc00": "\ud83d\ude00", "x\ud83d": 1},
    "NUL": lambda: "a\0b",
    "NUL in a key": lambda: {"a\0": 1, "a\ufffd": 2},
    "all controls": lambda: "".join(map(chr, range(0x20))) + "\x7f\u2028\ufeff\uffff",
    "bytes": lambda: b"\xff\0\xfe",
    "long bytes": ("é" * 20_000).encode,
    "memoryview": lambda: memoryview(bytearray(b"abc")),
    "mixed set": lambda: {1, "a", None, (1, 2), 2.5, frozenset({3})},
    "mixed keys": lambda: {1: 1, "1": 2, None: 3, (1, "a"): 4, 2.5: 5},
    "attrs": lambda: Attrs({1, 2}),
    "attrs class": lambda: Attrs,
    "dataclass": Unset,
    "namedtuple": lambda: Point(1, float("nan")),
    "pydantic": lambda: Pydantic({"a": {1, 2}}),
    "pydantic that fails": lambda: Pydantic(hostile("__len__", bases=(dict,))),
    "pydantic of nothing": lambda: Pydantic(None),
    "enum": lambda: Color.RED,
    "array": lambda: ArrayLike([[1, 2], [3]], 3),
    "large array": lambda: ArrayLike(None, 10**9),
    "array that raises": lambda: ArrayLike(1, hostile("__le__")),
    "datetime.min": lambda: dt.datetime.min.replace(tzinfo=OFFSET),
    "datetime.max": lambda: dt.datetime.max.replace(
        tzinfo=dt.timezone(-dt.timedelta(hours=23, minutes=59))
    ),
    "naive datetime.min": lambda: dt.datetime.min,  # noqa: DTZ901  that is what is odd
    "naive datetime.max": lambda: dt.datetime.max,  # noqa: DTZ901  same
    "zone that raises": lambda: dt.datetime(2026, 1, 1, tzinfo=Zone(None)),
    "zone of nonsense": lambda: dt.datetime(2026, 1, 1, tzinfo=Zone("x")),
    "date": lambda: dt.date(2026, 1, 1),
    "time": lambda: dt.time(1, 2, 3),
    "timedelta.max": lambda: dt.timedelta.max,
    "UUID": lambda: uuid.UUID(int=1),
    "path": lambda: pathlib.PurePosixPath("/a\udcff"),
    "generator": unconsumed,
    "iterator": lambda: iter(_raise, None),
    "range": lambda: range(10**12),
    "5 MB": lambda: "x" * 5_000_000,
    "5 MB of words": lambda: "word " * 1_000_000,
    "5 MB of NUL": lambda: "\0" * 5_000_000,
    "5 MB of emoji": lambda: "\N{PILE OF POO}" * 1_250_000,
    "much text": lambda: ["y" * 16_000] * 2_000,
    "UserString": lambda: collections.UserString("abc"),
    "UserDict": lambda: collections.UserDict(a=1),
    "Counter": lambda: collections.Counter("abca"),
    "deque": lambda: collections.deque([1], maxlen=1),
    "views": lambda: [{"a": 1}.keys(), {"a": 1}.values(), {1: 2}.items()],
    "ChainMap": lambda: collections.ChainMap({"a": 1}, {"b": 2}),
    "proxy": lambda: types.MappingProxyType({"a": 1}),
    "module": lambda: types,
    "function": lambda: _raise,
    "class": lambda: type,
    "object": object,
    "exception group": lambda: ValueError("a", KeyError("b")),
    "None": lambda: None,
    "True": lambda: True,
    "empty text": lambda: "",
    "ellipsis": lambda: ...,
    "thread": threading.Lock,
}
"""How to make each odd value, afresh for each use."""

PLACES = sorted(KEYWORDS)


@pytest.mark.parametrize("name", ODD)
def test_odd_values_may_stand_anywhere(name: str) -> None:
    """An odd value as any field, in metadata or as the type harms nothing."""
    make = ODD[name]
    with strict_client(max_queue_bytes=2**40) as (client, servers):
        taken = [client.emit("custom", **{place: make()}) for place in PLACES]
        taken += [
            client.emit("custom", metadata={"key": make()}),
            client.emit("custom", metadata={"list": [make(), {"deeper": make()}]}),
        ]
        typed = client.emit(make())
        with pgtrack.session(client=client, metadata={"key": make()}):
            taken.append(client.emit("error"))
        events = assert_all_taken(client, servers)

        assert set(taken) == {True}
        assert len(events) == len(taken) + typed


@pytest.mark.parametrize("name", ODD)
def test_odd_values_may_be_given_to_every_verb(name: str) -> None:
    """An odd value as an argument of the other verbs harms nothing."""
    make = ODD[name]
    with strict_client(max_queue_bytes=2**40) as (client, servers):
        taken = [
            client.track_api_call(make(), make(), make(), duration=make()),
            client.track_error(make(), make()),
            client.track_journey_step(make(), make(), make()),
        ]
        session_id = None if callable(make()) else make()  # that is a wrong decorator
        with pgtrack.session(
            session_id, user_id=make(), metadata=make(), client=client
        ):
            taken.append(client.emit("custom"))
        events = assert_all_taken(client, servers)

        assert taken == [True] * 4
        assert len(events) == 4


# --- arbitrary values ------------------------------------------------------------


@attrs.frozen
class Recipe:
    """A value to be made in the test: Hypothesis itself would stumble over some."""

    make: Any
    parts: tuple[Any, ...] | list[Any] = ()

    def __call__(self) -> Any:
        """Make the value."""
        return self.make([made(part) for part in self.parts])


def made(value: Any) -> Any:
    """Return what *value* is, or is the recipe of."""
    return value() if type(value) is Recipe else value


def pairs(parts: list[Any]) -> dict[Any, Any]:
    """Return a dict of what comes in turns: key, value, key ..."""
    return dict(zip(parts[::2], parts[1::2], strict=False))


odd = st.sampled_from(sorted(ODD.keys() - {"much text", "many keys"})).map(
    lambda name: Recipe(lambda _: ODD[name]())
)
texts = st.text(st.characters(codec=None), max_size=40) | st.text(
    st.sampled_from("\ud800\udfff\0\\\"'{}:@.ab1 "), max_size=40
)
keys = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.binary(max_size=40)
    | st.fractions()
    | st.complex_numbers()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
)
scalars = keys | st.decimals()  # of which some have no hash
values = st.recursive(
    scalars | odd,
    lambda inner: (
        st.builds(
            Recipe,
            st.sampled_from(
                [list, tuple, Attrs, Pydantic, lambda parts: Point(parts, 1)]
            ),
            st.lists(inner, max_size=5),
        )
        | st.builds(Recipe, st.just(pairs), st.lists(keys, max_size=6))
        | st.builds(Recipe, st.just(frozenset), st.lists(keys, max_size=6))
    ),
    max_leaves=12,
)
calls = st.tuples(
    st.sampled_from(["custom", "error", "api.response"]) | values,
    st.dictionaries(st.sampled_from(PLACES), values, max_size=6),
)


@settings(
    max_examples=3 * settings.default.max_examples,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(calls, min_size=1, max_size=4))
def test_arbitrary_values_are_taken(events: list[tuple[Any, dict[str, Any]]]) -> None:
    """For any Python values emit returns a bool, and no server refuses what comes."""
    with strict_client(max_queue_bytes=2**40) as (client, servers):
        results = [
            client.emit(made(kind), **{name: made(fields[name]) for name in fields})
            for kind, fields in events
        ]
        sent = assert_all_taken(client, servers)

        assert {bool} == {type(result) for result in results}
        assert sum(results) == len(sent)


@settings(deadline=None)
@given(values, st.sampled_from(PLACES))
def test_arbitrary_values_may_come_from_before_send(value: Any, place: str) -> None:
    """What a hook puts into an event is converted as emit's arguments are."""
    if place == "request_id":
        place = "type"

    def hook(event: pgtrack.Event) -> pgtrack.Event:
        return event.replace(**{place: made(value)})

    with strict_client(before_send=hook) as (client, servers):
        assert client.emit("custom", name="n")
        (event,) = assert_all_taken(client, servers)

        assert event["event.type"]
        assert event["session.id"]


# --- the fields ------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_arrives_at_every_version(version: str) -> None:
    """Each keyword goes out under its key, with the type its column has."""
    values = {
        name: "a" if field.width else 7
        for name, field in FIELDS.items()
        if name in KEYWORDS
    }
    server = ProductGraph(version)
    servers = InProcess()
    servers.servers = [server]
    config = pgtrack.Config(project_id="p", endpoint="console:")
    with pgtrack.Client(config, transport=servers) as client:
        assert client.emit("custom", **values)
        (event,) = assert_all_taken(client, servers)

    expected = {FIELDS[name].key: value for name, value in values.items()}
    assert expected == {key: event[key] for key in expected}


def test_a_dict_may_change_while_it_is_taken() -> None:
    """Another thread that changes the caller's dict costs no event."""
    shared: dict[str, Any] = {str(i): i for i in range(500)}
    is_over = threading.Event()

    def change() -> None:
        i = 0
        while not is_over.is_set():
            i += 1
            shared[f"new {i}"] = {}
            shared.pop(f"new {i - 50}", None)

    thread = threading.Thread(target=change)
    with strict_client(max_queue_bytes=2**40) as (client, servers):
        thread.start()
        try:
            taken = [client.emit("custom", metadata=shared) for _ in range(100)]
        finally:
            is_over.set()
            thread.join(10)
        events = assert_all_taken(client, servers)

        assert set(taken) == {True}
        assert [] == [e for e in events if "499" not in e["metadata"]]
