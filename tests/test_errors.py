from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import functools
import gc
import pickle
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import start_together
from pgtrack import _errors
from pgtrack._errors import describe, is_failure, is_first_time, phrase, status_of
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgtrack.testing import Events


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


class Carrying(Exception):  # noqa: N818
    """
    Carries what it is given as its status.
    """

    def __init__(self, status_code: object = None) -> None:
        super().__init__()
        self.status_code = status_code


class Slotted(Exception):  # noqa: N818
    """
    Has slots, so that it cannot be referred to weakly.
    """

    __slots__ = ()


class Equal(Exception):  # noqa: N818
    """
    Is equal to all others, and has no hash.
    """

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Hostile(Exception):  # noqa: N818
    """
    Raises whatever it is asked.
    """

    @property
    def status_code(self) -> int:
        """
        Raise.
        """
        raise ZeroDivisionError

    def __str__(self) -> str:
        raise ZeroDivisionError

    def __repr__(self) -> str:
        raise ZeroDivisionError


KINDS = [ValueError, Carrying, Slotted, Equal, Hostile, KeyError, OSError]


class Group(BaseException):
    """
    Holds others, as `BaseExceptionGroup` does.
    """

    def __init__(self, *exceptions: BaseException) -> None:
        self.exceptions = exceptions


class TestFailure:
    """
    What went wrong, and what merely ended.
    """

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ValueError(), True),
            (StopIteration(), True),
            (asyncio.TimeoutError(), True),
            (concurrent.futures.CancelledError(), False),
            (asyncio.CancelledError(), False),
            (GeneratorExit(), False),
            (KeyboardInterrupt(), False),
            (SystemExit(1), False),
            (Group(), False),
            (Group(SystemExit(), asyncio.CancelledError()), False),
            (Group(SystemExit(), Group(ValueError())), True),
        ],
        ids=repr,
    )
    def test_is_failure(self, error: BaseException, *, expected: bool) -> None:
        """Ends of programs and cancellations are none; a group may hold one."""
        assert is_failure(error) == expected

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="has no groups")
    def test_group(self) -> None:
        """The builtin group is one."""
        group = BaseExceptionGroup("", [KeyboardInterrupt(), ValueError()])  # noqa: F821

        assert is_failure(group)
        assert status_of(group) == 500

    def test_without_futures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where `concurrent.futures` is not imported, or half, all are failures."""
        half = types.ModuleType("concurrent.futures")
        for module in (None, half):
            monkeypatch.setitem(sys.modules, "concurrent.futures", module)

            assert is_failure(ValueError())


class TestStatus:
    """
    The HTTP status that an exception amounts to.
    """

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ValueError(), 500),
            (Carrying(404), 404),
            (Carrying(100), 100),
            (Carrying(599), 599),
            (Carrying(600), 500),
            (Carrying(99), 500),
            (Carrying(True), 500),
            (Carrying("404"), 500),
            (Carrying(404.0), 500),
            (Hostile(), 500),
            (KeyboardInterrupt(), 500),
            (SystemExit(), 500),
            (GeneratorExit(), 499),
            (asyncio.CancelledError(), 499),
            (concurrent.futures.CancelledError(), 499),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_status_of(self, error: BaseException, expected: int) -> None:
        """Its own if that is one, 499 for cancellations, else 500."""
        assert status_of(error) == expected

    def test_enum(self) -> None:
        """A status that is an enum comes out as a plain int."""
        import http

        status = status_of(Carrying(http.HTTPStatus.CONFLICT))

        assert (status, type(status)) == (409, int)

    def test_werkzeug(self) -> None:
        """The code of Werkzeug's exceptions counts, also that of `abort(response)`."""
        exceptions = pytest.importorskip("werkzeug.exceptions")
        wrappers = pytest.importorskip("werkzeug.wrappers")
        statuses = []
        for argument in (404, wrappers.Response(status=409)):
            with pytest.raises(exceptions.HTTPException) as caught:
                exceptions.abort(argument)
            statuses.append(status_of(caught.value))

        assert statuses == [404, 409]
        assert status_of(exceptions.HTTPException()) == 500

    def test_like_werkzeug(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Werkzeug's class is asked for without importing it."""

        class HTTPException(Exception):  # noqa: N818
            code: int | None = None
            response = types.SimpleNamespace(status_code=410)

        module = types.ModuleType("werkzeug.exceptions")
        monkeypatch.setitem(sys.modules, "werkzeug.exceptions", module)
        before = status_of(HTTPException())
        module.HTTPException = HTTPException  # type: ignore[attr-defined]
        error = HTTPException()
        seen = [status_of(error)]
        error.code = 404
        seen.append(status_of(error))

        assert before == 500
        assert seen == [410, 404]

    @pytest.mark.parametrize(
        ("status", "expected"),
        [(503, "Service Unavailable"), (599, "Unknown status")],
    )
    def test_phrase(self, status: int, expected: str) -> None:
        """A status has the phrase of the RFC, if any."""
        assert phrase(status) == expected


class TestDescribe:
    """
    The fields of an error event.
    """

    def test_plain(self) -> None:
        """Type and message are told; the stack only where it is asked for."""
        assert describe(KeyError("x"), with_stack=False) == {
            "error_type": "KeyError",
            "error_message": "'x'",
        }

    def test_stack(self) -> None:
        """The stack ends with the error, and holds no values of variables."""
        secret = "hunter" + "2"
        try:
            raise ValueError(len(secret))
        except ValueError as error:
            stack = describe(error, with_stack=True)["error_stack"]

        assert stack.splitlines()[-1] == "ValueError: 7"
        assert "test_stack" in stack
        assert secret not in stack

    def test_long(self) -> None:
        """Of long messages the beginning is kept, of long stacks the end."""
        try:
            raise ValueError("a" * 100_000)
        except ValueError as error:
            fields = describe(error, with_stack=True)

        assert len(fields["error_message"]) < 20_000
        assert fields["error_stack"].endswith("aaa...\n")
        assert len(fields["error_stack"]) < 20_000

    def test_many_frames(self) -> None:
        """Of a long traceback the end is left, in whole lines."""

        def dive(depth: int) -> None:
            if depth:
                return (dive if depth % 2 else lambda d: dive(d))(depth - 1)  # noqa: PLW0108
            raise ValueError(depth)

        try:
            dive(600)
        except ValueError as error:
            stack = describe(error, with_stack=True)["error_stack"]

        assert len(stack) <= 16_384
        assert stack.startswith(("  File ", "  [Previous"))
        assert stack.endswith("ValueError: 0\n")

    def test_secret_across_the_cut(self) -> None:
        """A secret too long for the stack leaves no part of itself there."""
        key = "-----BEGIN PRIVATE KEY-----\n" + "c2VjcmV0\n" * 3_000
        try:
            raise ValueError(key)
        except ValueError as error:
            fields = describe(error, with_stack=True)

        assert "c2VjcmV0" not in fields["error_stack"]

    def test_hostile(self) -> None:
        """An error that cannot be printed is told as such."""
        try:
            raise Hostile
        except Hostile as error:
            fields = describe(error, with_stack=True)

        assert fields["error_message"] == "<unprintable Hostile>"
        assert "test_hostile" in fields["error_stack"]

    def test_unrenderable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the error breaks the rendering, the frames are told."""

        def fail(*args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(_errors.traceback, "format_exception", fail)
        try:
            raise KeyError
        except KeyError as error:
            stack = describe(error, with_stack=True)["error_stack"]

        assert "test_unrenderable" in stack

    def test_capture_stack(self) -> None:
        """With `capture_stack` error events have it."""
        with capture(capture_stack=True) as events:
            try:
                raise KeyError("x")
            except KeyError as error:
                pgtrack.track_error(error)

        assert str(events[0].error_stack).endswith("KeyError: 'x'\n")


class TestFirstTime:
    """
    An error is told once in each session.
    """

    @pytest.mark.parametrize("kind", KINDS)
    def test_once(self, kind: type[Exception]) -> None:
        """Once in each session, whatever its class forbids."""
        error = kind()

        seen = [is_first_time(error, session) for session in "aabab"]

        assert seen == [True, False, True, False, False]

    @pytest.mark.parametrize("kind", KINDS)
    def test_another(self, kind: type[Exception]) -> None:
        """Another error is another one, also at the address of a dead one."""
        seen = [is_first_time(kind(), "s") for _ in range(1000)]

        assert seen == [True] * 1000
        assert _errors._told == {}

    @pytest.mark.parametrize("kind", [Carrying, Equal, Hostile])
    def test_untouched(self, kind: type[Exception]) -> None:
        """An error of the user's own class is left as it is."""
        error = kind()
        before = dict(vars(error))

        is_first_time(error, "s")

        assert vars(error) == before

    @pytest.mark.parametrize("kind", [Carrying, Equal])
    def test_dies(self, kind: type[Exception]) -> None:
        """It dies as soon as nobody else holds it, and nothing is left of it."""
        error = kind()
        reference = weakref.ref(error)
        is_first_time(error, "a")
        is_first_time(error, "b")

        del error

        assert reference() is None
        assert _errors._told == {}

    def test_dies_in_a_cycle(self) -> None:
        """Also where it is part of a cycle."""
        error = Carrying()
        error.itself = error  # type: ignore[attr-defined]
        is_first_time(error, "a")
        del error
        gc.collect()

        assert _errors._told == {}

    @pytest.mark.parametrize("kind", [ValueError, Carrying])
    def test_pickles(self, kind: type[Exception]) -> None:
        """An error that was told still pickles and copies."""
        error = kind()
        is_first_time(error, "s")

        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert type(pickle.loads(pickle.dumps(error, protocol))) is kind
        assert type(copy.deepcopy(error)) is kind

    @pytest.mark.parametrize("kind", [ValueError, Carrying])
    def test_threads(
        self, kind: type[Exception], request: pytest.FixtureRequest
    ) -> None:
        """Of many threads with the same error exactly one tells it."""
        request.addfinalizer(
            functools.partial(sys.setswitchinterval, sys.getswitchinterval())
        )
        sys.setswitchinterval(1e-6)
        for _ in range(50):
            error = kind()

            seen = start_together(8, lambda _, error=error: is_first_time(error, "s"))

            assert sorted(seen) == [False] * 7 + [True]


class TestTrackError:
    """
    The verb, by hand.
    """

    def test_after_the_decorator(self, events: Events) -> None:
        """What a decorator told is not told again in the session, but is in another."""

        @pgtrack.track_api
        def work() -> None:
            raise KeyError("x")

        with pgtrack.session("a"), pytest.raises(KeyError) as caught:
            work()
        with pgtrack.session("a"):
            again = pgtrack.track_error(caught.value)
        with pgtrack.session("b"):
            elsewhere = pgtrack.track_error(caught.value)

        assert (again, elsewhere) == (False, True)
        errors: list[Any] = [e.session_id for e in events.of_type("error")]
        assert errors == ["a", "b"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_through_layers(self, events: Events, kind: type[Exception]) -> None:
        """Any kind of error makes one event on its way through ten layers."""

        def work() -> None:
            raise kind

        for _ in range(5):
            work = pgtrack.journey_step("s", journey="j")(pgtrack.track_api(work))

        with pytest.raises(kind):
            work()

        assert [e.error_type for e in events.of_type("error")] == [kind.__name__]

    def test_disabled(self) -> None:
        """Without a client an error is neither told nor remembered."""
        error = ValueError()

        assert pgtrack.track_error(error) is False
        assert vars(error) == {}
