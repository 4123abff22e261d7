"""
The snapshot: any Python value, as JSON can carry it, at the moment of the call.

Runs on the caller's thread.  What the caller changes afterwards changes no
event, and whatever it handed over cannot cost the batch: values that JSON has
no form for are converted, what is too large is cut, and a mark says so in
their place.  Values under sensitive keys are replaced here, before the queue.

Left alone: iterators and generators, which are not consumed, and the text of
strings, whose redaction by pattern is the worker's.
"""

from __future__ import annotations

import binascii
import collections
import collections.abc
import datetime as dt
import enum
import itertools
import math
import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from pgtrack._event import encode_json
from pgtrack._keys import REDACTED, KeyRule

if TYPE_CHECKING:
    from pgtrack.typing import JSONValue

__all__ = [
    "KEEP_ALL",
    "MARGIN",
    "MAX_DEPTH",
    "MAX_KEY",
    "MAX_TEXT",
    "MAX_VALUES",
    "SIZE_OF_NUMBER",
    "Snapshot",
    "snapshot",
]

MAX_TEXT = 16_384
"""Most characters of one string on the wire."""

MARGIN = 1_024
"""
Characters kept beyond a limit until the worker has redacted by pattern: cut
at the limit itself, a secret across it would no longer look like one.
"""

MAX_KEY = 256
"""Most characters of a key."""

MAX_DEPTH = 8
"""Most levels of containers within the metadata."""

MAX_VALUES = 2_000
"""Most values in one snapshot, over all levels."""

_PAIR = 2

_NAMES = ("name", "key", "field")
"""Keys beside `value` that say what it is the value of."""

MAX_SIZE = 250_000
"""Bytes of one snapshot from which on further texts are left out."""

SIZE_OF_NUMBER = 32
"""What a number takes in memory, bytes."""

_INT64 = range(-(2**63), 2**63)
_MAX_BITS = 1_000


@attrs.frozen
class Snapshot:
    """
    A value that nobody else holds.

    Attributes:
        value: What JSON can carry (strings may hold lone surrogates until encoding).

        size: An estimate of the memory it takes, in bytes.  Keys are counted by their
            length alone, since programs share them; a snapshot whose keys are all
            distinct objects takes up to twice the estimate.

        is_lossy: Whether something was cut or could not be represented.
    """

    value: Any
    size: int
    is_lossy: bool


def snapshot(value: object, rule: KeyRule) -> Snapshot:
    """
    Take a snapshot of *value*; nothing that it holds raises out of here.

    Args:
        value: Anything.  Mappings become objects, attrs and dataclass instances too;
            sequences and sets become arrays; dates, UUIDs, decimals and paths text;
            enums their values; bytes text, or base64 behind `base64:`; whatever
            is left its `repr`.

        rule: Which keys are sensitive.
    """
    taker = _Taker(rule)
    taken = taker.take(value)
    return Snapshot(taken, taker.size, taker.is_lossy)


class _KeepAll(KeyRule):
    """The rule that no key is sensitive, for a snapshot that stays in the process."""

    def is_sensitive(self, key: str) -> bool:
        del key
        return False


KEEP_ALL = _KeepAll()


class _Taker:
    """One walk over one value: its bounds, its size, and the way back out of cycles."""

    __slots__ = ("_left", "_path", "_rule", "is_lossy", "size")

    def __init__(self, rule: KeyRule) -> None:
        self._rule = rule
        self._path: list[int] = []
        self._left = MAX_VALUES
        self.size = 0
        self.is_lossy = False

    def take(self, value: object) -> JSONValue:
        """Return *value* as JSON can carry it."""
        kind = type(value)
        if kind is str:
            return self._text(value)  # type: ignore[arg-type]
        if value is None or kind is bool:
            return value  # type: ignore[return-value]
        if kind is int:
            return self._integer(value)  # type: ignore[arg-type]
        if kind is float:
            return self._float(value)  # type: ignore[arg-type]
        try:
            return self._convert(value)
        except Exception:  # noqa: BLE001  the value's own code may raise anything
            return self._mark(f"<unrepresentable {name_of(kind)}>")

    def _mark(self, text: str) -> str:
        self.is_lossy = True
        self.size += sys.getsizeof(text)
        return text

    def _text(self, text: str) -> str:
        if self.size > MAX_SIZE:
            return self._mark(f"[text of {len(text)} cut]")
        if len(text) > MAX_TEXT + MARGIN:
            self.is_lossy = True
            text = text[: MAX_TEXT + MARGIN]
        self.size += sys.getsizeof(text)
        return text

    def _integer(self, number: int) -> JSONValue:
        self.size += SIZE_OF_NUMBER
        if number in _INT64:
            return number
        if number.bit_length() > _MAX_BITS:
            return self._mark(f"<integer of {number.bit_length()} bits>")
        return str(number)

    def _float(self, number: float) -> JSONValue:
        self.size += SIZE_OF_NUMBER
        if math.isfinite(number):
            return number
        return self._mark(_NOT_FINITE[repr(number)])

    def _convert(self, value: object) -> JSONValue:
        if isinstance(value, enum.Enum):
            return self.take(value.value)
        for kinds, convert in _SCALARS:
            if isinstance(value, kinds):
                return self.take(convert(value))
        for module, name in _TEXTS:
            if isinstance(value, getattr(sys.modules.get(module), name, ())):
                return self.take(str(value))
        if len(self._path) >= MAX_DEPTH:
            return self._mark(f"<{name_of(type(value))} beyond depth {MAX_DEPTH}>")
        if id(value) in self._path:
            return self._mark("<cycle>")
        self._path.append(id(value))
        try:
            return self._container(value)
        finally:
            self._path.pop()

    def _container(self, value: object) -> JSONValue:  # noqa: PLR0911  one for each kind
        if isinstance(value, collections.abc.Mapping):
            return self._mapping(value.items(), len(value))
        if (fields := _fields(value)) is not None:
            return self._mapping(fields, len(fields))
        if isinstance(value, collections.abc.Set):
            return sorted(self._items(value, len(value)), key=repr)
        if isinstance(value, _SEQUENCES):
            return self._items(value, len(value))
        if (plain := _plain(value)) is not _NOTHING:
            return self.take(plain)
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return self._text(f"{value.__module__}.{value.__qualname__}")
        return self._text(str.__str__(repr(value)))

    def _mapping(self, items: Iterable[Any], length: int) -> dict[str, JSONValue]:
        taken: dict[str, JSONValue] = {}
        is_sensitive = self._rule.is_sensitive
        listed = self._bounded(items, length)
        for key, value in listed:
            name = key if type(key) is str else self._key(key)
            if len(name) > MAX_KEY + MARGIN:
                self.is_lossy = True
                name = name[: MAX_KEY + MARGIN]
            self.size += len(name)
            taken[name] = REDACTED if is_sensitive(name) else self.take(value)
        if "value" in taken and any(self._names_secret(taken.get(k)) for k in _NAMES):
            taken["value"] = REDACTED
        if length > len(listed):
            taken["..."] = self._mark(f"[{length - len(listed)} more cut]")
        self.size += sys.getsizeof(taken)
        return taken

    def _items(self, items: Iterable[Any], length: int) -> list[JSONValue]:
        listed = self._bounded(items, length)
        taken: list[JSONValue] = []
        is_secret = False
        for item in listed:
            taken.append(REDACTED if is_secret else self.take(item))
            # A pair, as ASGI has headers; or the arguments of a command.
            is_option = type(item) is str and item.startswith("-")
            is_name = is_option or (length == _PAIR and len(taken) == 1)
            is_secret = is_name and self._names_secret(item)
        if length > len(listed):
            taken.append(self._mark(f"[{length - len(listed)} more cut]"))
        self.size += sys.getsizeof(taken)
        return taken

    def _names_secret(self, name: object) -> bool:
        """Return whether a value beside *name* is sensitive, as one under it is."""
        if isinstance(name, bytes):
            name = name[: MAX_KEY + MARGIN].decode("latin-1")
        return type(name) is str and self._rule.is_sensitive(name[: MAX_KEY + MARGIN])

    def _bounded(self, items: Iterable[Any], length: int) -> list[Any]:
        # A list made in one call, so that another thread that changes the caller's
        # container meanwhile cannot break the walk.
        allowed = min(self._left, length)
        self._left -= allowed
        return list(itertools.islice(items, allowed))

    def _key(self, key: object) -> str:
        """Return a key as JSON has it: what is no text goes by its JSON text."""
        taken = self.take(key)
        return taken if isinstance(taken, str) else encode_json(taken)


_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _isoformat(value: Any) -> str:
    return str(value.isoformat())


def _bytes(value: Any) -> str:
    raw = bytes(value[: MAX_TEXT + MARGIN])
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        if len(raw) < len(value) and error.end == len(raw):  # cut within a character
            return raw[: error.start].decode()
        return "base64:" + binascii.b2a_base64(raw, newline=False).decode()


def _exception(value: Any) -> str:
    return f"{type(value).__name__}: {value}"


_SCALARS: tuple[tuple[Any, Callable[[Any], object]], ...] = (
    (str, str.__str__),
    (collections.UserString, str),
    (int, int.__int__),
    (float, float.__float__),
    ((dt.date, dt.time), _isoformat),
    (dt.timedelta, dt.timedelta.total_seconds),
    ((bytes, bytearray, memoryview), _bytes),
    (BaseException, _exception),
)
"""How values that hold no others become text or numbers; the first match counts."""

_TEXTS = (("uuid", "UUID"), ("decimal", "Decimal"), ("pathlib", "PurePath"))
"""Modules and classes whose values are as good as their text; not loaded for it."""

_SEQUENCES = (collections.abc.Sequence, collections.abc.ValuesView)


def _fields(value: object) -> list[tuple[str, object]] | None:
    """Return the fields of an object that declares them, or None."""
    kind = type(value)
    if isinstance(value, tuple):
        names = getattr(kind, "_fields", None)
    elif hasattr(kind, "__dataclass_fields__"):
        names = [field.name for field in sys.modules["dataclasses"].fields(kind)]
    elif attrs.has(kind):
        names = [field.name for field in attrs.fields(kind)]
    elif callable(dump := getattr(kind, "model_dump", None)):  # pydantic
        fields = dump(value)
        return list(fields.items()) if isinstance(fields, Mapping) else None
    else:
        return None
    if names is None:
        return None
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


_NOTHING = object()


def _plain(value: Any) -> object:
    """Return NumPy's values and foreign numbers as plain ones; else `_NOTHING`."""
    kind = type(value)
    if hasattr(kind, "dtype") and hasattr(kind, "tolist"):
        return value.tolist() if value.size <= MAX_VALUES else repr(value)
    if hasattr(kind, "__index__"):
        return operator.index(value)
    if hasattr(kind, "__float__"):
        return float(value)
    return _NOTHING


def name_of(kind: type) -> str:
    """Return the full name of a class, whatever its metaclass makes of names."""
    try:
        return f"{kind.__module__}.{kind.__qualname__}"[:MAX_KEY]
    except Exception:  # noqa: BLE001  the metaclass's own code may raise anything
        return "object"
