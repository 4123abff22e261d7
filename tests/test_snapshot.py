"""The snapshot: any Python value as JSON can carry it."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import json
import pathlib
import types
import uuid
from typing import Any, NamedTuple

import attrs
import pytest

from pgtrack._keys import DEFAULT_RULE, REDACTED, KeyRule
from pgtrack._snapshot import (
    KEEP_ALL,
    MARGIN,
    MAX_DEPTH,
    MAX_KEY,
    MAX_SIZE,
    MAX_TEXT,
    MAX_VALUES,
    snapshot,
)


def taken(value: object) -> Any:
    """Return what becomes of *value*."""
    return snapshot(value, DEFAULT_RULE).value


def type_name(value: object) -> str:
    """Return what to call a value in the name of a test."""
    return type(value).__name__


def is_lossy(value: object) -> bool:
    """Return whether something of *value* was lost."""
    return snapshot(value, DEFAULT_RULE).is_lossy


class Color(enum.Enum):
    """An enum."""

    RED = "red"
    PAIR = (1, 2)


class Level(enum.IntEnum):
    """An enum of integers."""

    HIGH = 3


class Point(NamedTuple):
    """A named tuple."""

    x: int
    y: int


@dataclasses.dataclass
class Order:
    """A dataclass."""

    number: int
    password: str = "hunter2"
    late: int = dataclasses.field(init=False)


@attrs.define
class Item:
    """An attrs class."""

    name: str
    tags: set[str]


class Model:
    """Dumps itself, as Pydantic's models do."""

    def model_dump(self) -> dict[str, Any]:
        """Return the fields."""
        return {"token": "t", "n": 1}


class NoModel:
    """Dumps something else."""

    def model_dump(self) -> int:
        """Return no mapping."""
        return 5

    def __repr__(self) -> str:
        return "NoModel()"


class Scalar:
    """A number of another library's."""

    def __index__(self) -> int:
        return 7


class Real:
    """A real number of another library's."""

    def __float__(self) -> float:
        return 0.5


class Array:
    """An array, as NumPy has it."""

    dtype = "int64"

    def __init__(self, *values: int) -> None:
        self.values = values
        self.size = len(values)

    def tolist(self) -> list[int]:
        """Return the values as plain ones."""
        return list(self.values)

    def __repr__(self) -> str:
        return f"Array of {self.size}"


class Odd:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


def function() -> None:
    """Stand for any function."""


def generator():
    """Fail when it is asked for anything."""
    raise RuntimeError
    yield


UTC = dt.timezone.utc
SAME = [None, True, False, 0, -(2**63), 2**63 - 1, 0.5, "", "text", [], {}]
CONVERTED: list[tuple[Any, Any]] = [
    (2**63, "9223372036854775808"),
    (Level.HIGH, 3),
    (Color.RED, "red"),
    (Color.PAIR, [1, 2]),
    (
        dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        "2026-01-02T03:04:05.000006+00:00",
    ),
    (dt.date(2026, 1, 2), "2026-01-02"),
    (dt.time(1, 2), "01:02:00"),
    (dt.timedelta(seconds=1.5), 1.5),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (decimal.Decimal("1.10"), "1.10"),
    (decimal.Decimal("NaN"), "NaN"),
    (pathlib.PurePosixPath("/a/b"), "/a/b"),
    (b"bytes", "bytes"),
    (bytearray(b"\xff\x00"), "base64:/wA="),
    (memoryview(b"view"), "view"),
    (ValueError("wrong"), "ValueError: wrong"),
    ((1, "a"), [1, "a"]),
    ({3, 1, 2}, [1, 2, 3]),
    (frozenset({"b", 1}), ["b", 1]),
    (range(3), [0, 1, 2]),
    (collections.deque([1]), [1]),
    (collections.UserString("abc"), "abc"),
    (collections.UserDict(a=1), {"a": 1}),
    (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (types.MappingProxyType({"a": 1}), {"a": 1}),
    ({"a": 1}.keys(), ["a"]),
    ({"a": 1}.values(), [1]),
    ({"a": 1}.items(), [["a", 1]]),
    (Point(1, 2), {"x": 1, "y": 2}),
    (Order(5), {"number": 5, "password": REDACTED}),
    (Item("a", {"t"}), {"name": "a", "tags": ["t"]}),
    (Model(), {"token": REDACTED, "n": 1}),
    (NoModel(), "NoModel()"),
    (Scalar(), 7),
    (Real(), 0.5),
    (Array(1, 2), [1, 2]),
    (Array(*range(MAX_VALUES + 1)), "Array of 2001"),
    (Order, f"{__name__}.Order"),
    (function, f"{__name__}.function"),
    (len, "builtins.len"),
    (complex(1, 2), "(1+2j)"),
    (..., "Ellipsis"),
    (
        {1: "i", None: "n", False: "b", 2.5: "f"},
        {"1": "i", "null": "n", "false": "b", "2.5": "f"},
    ),
    ({Color.RED: 1}, {"red": 1}),
    ({(1, "a"): 1}, {'[1,"a"]': 1}),
    ({b"k": 1}, {"k": 1}),
    ({dt.date(2026, 1, 2): 1}, {"2026-01-02": 1}),
]
LOST: list[tuple[Any, Any]] = [
    (float("nan"), "NaN"),
    (float("inf"), "Infinity"),
    (-float("inf"), "-Infinity"),
    (10**5_000, "<integer of 16610 bits>"),
    (Odd(), f"<unrepresentable {__name__}.Odd>"),
    ({Odd(): 1}, {f"<unrepresentable {__name__}.Odd>": 1}),
    ("x" * (MAX_TEXT + MARGIN + 1), "x" * (MAX_TEXT + MARGIN)),
    ({"k" * 5_000: 1}, {"k" * (MAX_KEY + MARGIN): 1}),
]


class TestValues:
    """One value."""

    @pytest.mark.parametrize("value", SAME, ids=type_name)
    def test_what_json_has_stays(self, value: object) -> None:
        """JSON's own values are taken as they are."""
        assert value == taken(value)
        assert type(value) is type(taken(value))

    @pytest.mark.parametrize(("value", "expected"), CONVERTED, ids=type_name)
    def test_the_rest_is_converted(self, value: object, expected: object) -> None:
        """Other values become what says the most of them, and nothing is lost."""
        assert expected == taken(value)
        assert not is_lossy(value)

    @pytest.mark.parametrize(("value", "expected"), LOST, ids=type_name)
    def test_what_has_no_form_is_marked(self, value: object, expected: object) -> None:
        """What JSON cannot say leaves a mark in its place."""
        assert expected == taken(value)
        assert is_lossy(value)

    def test_iterators_are_not_consumed(self) -> None:
        """A generator or an iterator is named, not run."""
        iterator = iter([1, 2])

        assert "list_iterator" in taken(iterator)
        assert "generator" in taken(generator())
        assert list(iterator) == [1, 2]

    def test_subclasses_are_taken_for_what_they_hold(self) -> None:
        """What a subclass of a plain type overrides does not matter."""

        class Text(str):
            __slots__ = ()

            def __str__(self) -> str:
                return "lie"

        class Number(int):
            def __int__(self) -> int:
                raise RuntimeError

        class Real(float):
            def __float__(self) -> float:
                raise RuntimeError

        values = [Text("text"), Number(5), Real(0.5)]

        assert taken(values) == ["text", 5, 0.5]
        assert [str, int, float] == [type(value) for value in taken(values)]

    def test_long_bytes_are_cut_between_characters(self) -> None:
        """Text in bytes stays text when the cut goes through a character."""
        raw = b"a" + ("é" * MAX_TEXT).encode()

        assert taken(raw) == raw.decode()[: (MAX_TEXT + MARGIN) // 2]

    def test_bytes_that_are_no_text_throughout(self) -> None:
        """A wrong byte in the middle makes base64 of all."""
        assert taken(b"\xff" + b"a" * 50_000).startswith("base64:/2Fh")

    def test_host_errors_pass(self) -> None:
        """Ctrl-C during the snapshot is the host's."""

        class Slow:
            def __repr__(self) -> str:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            taken(Slow())


class TestContainers:
    """Values in values."""

    def test_the_snapshot_is_apart(self) -> None:
        """What the caller changes afterwards does not change the snapshot."""
        value = {"a": [1, {"b": {2}}]}
        before = taken(value)
        value["a"][1]["b"].add(3)  # type: ignore[index]
        value["c"] = []

        assert before == {"a": [1, {"b": [2]}]}

    def test_sensitive_keys_hide_what_is_under_them(self) -> None:
        """A value under a sensitive key is replaced, whatever it is."""
        value = {"password": {"deep": Odd()}, "a": [{"api_key": 1}]}

        assert taken(value) == {"password": REDACTED, "a": [{"api_key": REDACTED}]}

    def test_keys_of_another_kind_may_be_sensitive(self) -> None:
        """Keys are judged by their text."""
        value = {b"password": 1, Color("red"): 2}

        assert taken(value) == {"password": REDACTED, "red": 2}

    def test_the_rule_can_be_extended(self) -> None:
        """Own keys are as sensitive as the built-in ones."""
        value = {"pet": 1, "password": 2}

        assert snapshot(value, KeyRule(["pet"])).value == {
            "pet": REDACTED,
            "password": REDACTED,
        }

    def test_all_may_be_kept(self) -> None:
        """What stays in the process is not redacted yet."""
        assert snapshot({"password": 1}, KEEP_ALL).value == {"password": 1}

    def test_cycles_end(self) -> None:
        """What holds itself is marked where it comes again."""
        value: dict[str, Any] = {"a": 1}
        value["self"] = [value]

        assert taken(value) == {"a": 1, "self": ["<cycle>"]}
        assert is_lossy(value)

    def test_the_same_twice_is_no_cycle(self) -> None:
        """A value that stands in two places is taken twice."""
        value = [1]

        assert taken([value, value]) == [[1], [1]]

    def test_depth_is_bounded(self) -> None:
        """Containers below the eighth level are named."""
        value: Any = "bottom"
        for _ in range(MAX_DEPTH):
            value = [value]

        assert not is_lossy(value)
        assert "<builtins.list beyond depth 8>" in json.dumps(taken([value]))

    def test_breadth_is_bounded_over_all_levels(self) -> None:
        """The values of a snapshot are counted together; the rest is told."""
        wide = taken(range(10**9))
        nested = taken([range(1_500), range(1_500)])
        keys = taken({str(i): i for i in range(3_000)})

        assert wide[-1] == f"[{10**9 - MAX_VALUES} more cut]"
        assert len(wide) == MAX_VALUES + 1
        assert nested[0] == list(range(1_500))
        assert nested[1] == [*range(498), "[1002 more cut]"]
        assert keys["..."] == "[1000 more cut]"
        assert len(keys) == MAX_VALUES + 1

    def test_keys_that_become_equal_cost_one_another_alone(self) -> None:
        """Of `1` and `"1"` one stays, and what follows is not cut for it."""
        assert taken([{1: "a", "1": "b"}, {"c": 3}]) == [{"1": "b"}, {"c": 3}]

    def test_all_text_is_bounded(self) -> None:
        """Beyond a megabyte, texts are named by their length."""
        value = taken(["x" * 10_000] * 1_000)
        kept = [text for text in value if text.startswith("x")]

        assert 0 <= len(kept) * 10_000 - MAX_SIZE < 20_000
        assert value[-1] == "[text of 10000 cut]"

    def test_a_container_that_fails_is_one_value(self) -> None:
        """What fails while it is read costs itself alone."""

        class Failing(collections.UserDict):
            def items(self) -> Any:
                raise RuntimeError

        value = {"a": Failing(b=1), "c": 3}

        assert taken(value) == {
            "a": f"<unrepresentable {__name__}.{Failing.__qualname__}>",
            "c": 3,
        }


class TestSize:
    """The estimate of memory."""

    @pytest.mark.parametrize(
        "value",
        [
            {str(i): "x" * 100 for i in range(100)},
            [float(i) for i in range(1_000)],
            {"text": "é" * 10_000},
            [{"a": i, "b": "text"} for i in range(200)],
        ],
        ids=lambda value: repr(value)[:20],
    )
    def test_it_is_right_within_a_factor_of_two(self, value: object) -> None:
        """The estimate is between half and twice of what the snapshot takes."""
        import sys

        def memory(value: Any) -> int:
            size = sys.getsizeof(value)
            if isinstance(value, dict):
                return size + sum(map(memory, value.values()))
            return size + (sum(map(memory, value)) if isinstance(value, list) else 0)

        estimate = snapshot(value, DEFAULT_RULE).size
        real = memory(json.loads(json.dumps(value)))

        assert real / 2 <= estimate <= real * 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([(b"x-api-key", b"s3cr3t")], [["x-api-key", REDACTED]]),
        (
            [("cookie", "sid=1"), ("accept", "*/*")],
            [["cookie", REDACTED], ["accept", "*/*"]],
        ),
        (["run", "--password", "hunter2", "-v"], ["run", "--password", REDACTED, "-v"]),
        ({"name": "password", "value": "x"}, {"name": "password", "value": REDACTED}),
        ({"name": "colour", "value": "red"}, {"name": "colour", "value": "red"}),
        (["password", "strength", "low"], ["password", "strength", "low"]),
    ],
)
def test_secrets_beside_their_names(value: object, expected: object) -> None:
    """A pair, an option and a named value are as sensitive as a key says."""
    assert snapshot(value, DEFAULT_RULE).value == expected
