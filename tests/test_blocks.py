from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import gc
import logging
import pickle
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import pgtrack
from harness import load_vectors, start_together
from pgtrack import _diagnostics
from pgtrack._context import current_frame, is_session_id
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from pgtrack.testing import Events

CASES = load_vectors("session_ids")["cases"]
UUID = "2b1f6c1e-7d52-4c55-9a53-0c9f1d6b8e21"


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


@pytest.fixture(name="backend", params=["asyncio", "trio"])
def _backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def here() -> str | None:
    """
    Return the present session.
    """
    return pgtrack.current().session_id


def user() -> str | None:
    """
    Return the present user.
    """
    return pgtrack.current().user_id


def fail_after(function: Callable[[], object]) -> None:
    """
    Call it, and fail.
    """
    function()
    raise KeyError


class TestSession:
    """
    Sessions.
    """

    def test_block(self, events: Events) -> None:
        """Inside of the block events have session, user and metadata; outside none."""
        with pgtrack.session("sess_1", user_id="u_1", metadata={"tenant": "a"}) as run:
            pgtrack.emit("custom", metadata={"k": 1})
        pgtrack.emit("custom")

        inside, outside = events
        assert run.session_id == "sess_1"
        assert (inside.session_id, inside.user_id) == ("sess_1", "u_1")
        assert inside.metadata == {"tenant": "a", "k": 1, "source": "backend"}
        assert str(outside.session_id).startswith("proc-")
        assert (outside.user_id, outside.metadata) == (None, {"source": "backend"})

    def test_async(self, events: Events, backend: str) -> None:
        """`async with` does the same."""

        async def main() -> list[str | None]:
            async with pgtrack.session("s"):
                await anyio.lowlevel.checkpoint()
                seen = [here()]
            return [*seen, here()]

        assert anyio.run(main, backend=backend) == ["s", None]

    def test_new_ids(self) -> None:
        """Without an id each entry has a new UUID, as a decorator as well."""
        block = pgtrack.session()
        with block as first, block as second:
            pass
        third, fourth = (pgtrack.session()(here)() for _ in range(2))

        seen = {first.session_id, second.session_id, third, fourth}
        assert len(seen) == 4
        assert all(str(uuid.UUID(str(one))) == one for one in seen)

    @pytest.mark.parametrize("form", ["token", "uuid"])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["value"])[:40])
    def test_invalid_ids(self, case: dict[str, Any], form: Any) -> None:
        """An id that does not fit the grammar is replaced by a new one and counted."""
        is_valid = case["lenient" if form == "token" else "strict_uuid"]
        with capture(session_id_format=form):
            with pgtrack.session(case["value"]) as run:
                pass
            counted = pgtrack.stats().adjusted.get("session_id", 0)

        assert (run.session_id == case["value"]) == is_valid
        assert is_session_id(run.session_id, form)
        assert counted == (0 if is_valid else 1)

    @pytest.mark.parametrize("given", [7, uuid.UUID(UUID)])
    def test_converted_ids(self, events: Events, given: Any) -> None:
        """Numbers and UUIDs become the text they are written as."""
        with pgtrack.session(given) as run:
            pass

        assert run.session_id == str(given)
        assert pgtrack.stats().adjusted == {}

    @pytest.mark.parametrize("wrong", [b"a", ["a"]])
    def test_wrong_types(self, events: Events, wrong: Any) -> None:
        """What is no text either is replaced as well."""
        with pgtrack.session(wrong):
            seen = here()

        assert is_session_id(seen)
        assert pgtrack.stats().adjusted == {"session_id": 1}

    def test_strict_events(self) -> None:
        """With UUIDs asked for, events outside of sessions still go out."""
        with capture(session_id_format="uuid") as events:
            pgtrack.emit("custom")
            with pgtrack.session():
                pgtrack.emit("custom")

        assert is_session_id(events[1].session_id, "uuid")
        assert len(events) == 2

    def test_own_cell(self, events: Events) -> None:
        """A new session starts without user and journey; request and metadata stay."""
        with (
            pgtrack.continued_from({"X-Session-ID": "outer", "X-Request-ID": "r"}),
            pgtrack.session("outer", user_id="u", metadata={"a": 1, "b": 1}),
            pgtrack.journey("j"),
            pgtrack.session("inner", metadata={"b": 2}),
        ):
            before = pgtrack.current()
            pgtrack.identify("u_inner")
            after = user()

        assert before == pgtrack.Context(
            session_id="inner", request_id="r", metadata={"a": 1, "b": 2}
        )
        assert after == "u_inner"

    def test_identity_stays_outside(self) -> None:
        """Whom an inner session identifies, the outer does not know."""
        with pgtrack.session("outer", user_id="u"):
            with pgtrack.session("inner"):
                pgtrack.identify("other")
            seen = user()

        assert seen == "u"

    def test_again(self, events: Events) -> None:
        """Entering the session that is active goes on with its user and journey."""
        with pgtrack.session("s", user_id="u"), pgtrack.journey("j"):
            with pgtrack.session("s"):
                seen = pgtrack.current()
                pgtrack.identify("u2")
            after = user()

        assert (seen.user_id, seen.journey_id) == ("u", "j")
        assert after == "u2"

    def test_again_within_a_step(self, events: Events) -> None:
        """An error in the session entered again is still that of the step around it."""

        @pgtrack.journey_step("pay", journey="checkout")
        def work() -> None:
            with pgtrack.session("s"):
                pgtrack.track_error("E", "same")
            with pgtrack.continued_from(
                {"X-Session-ID": "s", "X-Journey-ID": "k"}, True
            ):
                pgtrack.track_error("E", "other")

        with pgtrack.session("s"):
            work()

        told = [(event.journey_id, event.journey_step_id) for event in events]
        assert told == [("checkout", "pay"), ("k", None), ("checkout", "pay")]

    def test_again_as_another_user(self) -> None:
        """Entered again with a user, that is the user of the inner block."""
        with pgtrack.session("s", user_id="u"):
            with pgtrack.session("s", user_id="u2"):
                inner = user()
            outer = user()

        assert (inner, outer) == ("u2", "u")

    def test_metadata_is_a_snapshot(self, events: Events) -> None:
        """Metadata is taken when the block is entered, and redacted by key."""
        metadata = {"list": [1], "password": "hunter2"}
        with pgtrack.session("s", metadata=metadata):
            metadata["list"].append(2)  # type: ignore[attr-defined]
            metadata["late"] = "x"
            pgtrack.emit("custom")
            with pgtrack.journey("j"):
                pgtrack.emit("custom")

        for event in events:
            assert event.metadata == {
                "list": [1],
                "password": "[redacted]",
                "source": "backend",
            }

    def test_odd_metadata(self, events: Events) -> None:
        """Metadata that is no mapping is kept as a value."""
        with pgtrack.session("s", metadata=[1, 2]):  # type: ignore[arg-type]
            assert pgtrack.current().metadata == {"value": [1, 2]}

    @pytest.mark.parametrize("wrong", ["a b", "", "é", "a" * 256, object()])
    def test_wrong_user(self, events: Events, wrong: Any) -> None:
        """A user id that does not fit is left out and counted, here and within."""
        with pgtrack.session("s", user_id="u"), pgtrack.session("s", user_id=wrong):
            seen = user()

        assert seen is None
        assert pgtrack.stats().adjusted == {"user_id": 1}

    def test_exception(self) -> None:
        """An exception passes, and the session is left."""
        error = KeyError("x")
        with pytest.raises(KeyError) as caught, pgtrack.session("s"):
            raise error

        assert caught.value is error
        assert error.__context__ is None
        assert here() is None

    @pytest.mark.parametrize(
        "block", [pgtrack.session, pgtrack.journey, pgtrack.api_call]
    )
    def test_bare(self, block: Any) -> None:
        """Used as a bare decorator, a block says how it is used."""
        with pytest.raises(TypeError, match=rf"Use @{block.__name__}\(...\)"):

            @block
            def work() -> None: ...

    def test_unconfigured(self) -> None:
        """Correlation works without any configuration."""
        with pgtrack.session("s", user_id="u"):
            seen = pgtrack.current()

        assert (seen.session_id, seen.user_id) == ("s", "u")


class TestIdentify:
    """
    Who the user is, and who sees it.
    """

    def test_forget(self) -> None:
        """None forgets the user."""
        with pgtrack.session("s", user_id="u"):
            pgtrack.identify(None)

            assert user() is None

    def test_wrong(self, events: Events) -> None:
        """A wrong id is counted, and is not put down to the user of before."""
        with pgtrack.session("s", user_id="u"):
            pgtrack.identify("a b")

            assert user() is None
        assert pgtrack.stats().adjusted == {"user_id": 1}

    def test_outside(self, events: Events, caplog: pytest.LogCaptureFixture) -> None:
        """Outside of any unit of work it has no effect, and the log says so."""
        pgtrack.identify("u")
        pgtrack.emit("custom")
        pgtrack.flush()
        _diagnostics.tell()

        assert events[0].user_id is None
        assert [
            "identify() was called outside" in r.message for r in caplog.records
        ] == [True]

    def test_copied_context(self, events: Events) -> None:
        """In a copied context or a thread it is seen by the session's own event."""

        @pgtrack.session("s")
        @pgtrack.track_api
        def work() -> None:
            context = contextvars.copy_context()
            thread = threading.Thread(
                target=context.run, args=(pgtrack.identify, "u_thread")
            )
            thread.start()
            thread.join(10)
            assert user() == "u_thread"

        work()

        assert events[0].user_id == "u_thread"

    def test_call_without_session(self, events: Events) -> None:
        """Outside of any session a tracked call is a unit of work of its own."""

        @pgtrack.track_api
        def work() -> None:
            pgtrack.identify("u")
            pgtrack.track_api(lambda: None)()

        work()
        pgtrack.emit("custom")

        assert [event.user_id for event in events] == ["u", "u", None]

    def test_task(self) -> None:
        """What a task identifies, the session that started it sees."""

        async def work() -> None:
            pgtrack.identify("u")

        async def main() -> str | None:
            with pgtrack.session("s"):
                await asyncio.create_task(work())
                return user()

        assert asyncio.run(main()) == "u"

    def test_within_parts(self) -> None:
        """Journeys, steps and calls have no user of their own."""
        with pgtrack.session("s"):
            with pgtrack.journey("j"), pgtrack.api_call("GET", "/"):
                pgtrack.identify("u")

            assert user() == "u"


class TestStraddling:
    """
    A user's own block around a `yield`, and other ways to leave in disorder.
    """

    def test_out_of_order(self) -> None:
        """Blocks left out of order leave those that are open, in their order."""
        a, b, c = (pgtrack.session(name) for name in "abc")
        for block in (a, b, c):
            block.__enter__()
        seen = []
        for block in (a, c, b):
            block.__exit__(None, None, None)
            seen.append(here())

        assert seen == ["c", "b", None]

    def test_interleaved_generators(self) -> None:
        """Undecorated generators that end in another order end without a trace."""

        def work(name: str) -> Iterator[None]:
            with pgtrack.session(name):
                yield

        with pgtrack.session("outer"):
            first, second = work("first"), work("second")
            next(first)
            next(second)
            seen = []
            for running in (first, second):
                list(running)
                seen.append(here())

        assert seen == ["second", "outer"]

    @pytest.mark.parametrize("end", ["exhaust", "close", "throw", "collect"])
    def test_other_context(self, events: Events, end: str) -> None:
        """Left in another context, that keeps its own correlation, without an error."""

        def work() -> Iterator[None]:
            with pgtrack.session("own"), pgtrack.api_call("GET", "/x") as call:
                call.status_code = 204
                yield

        running: Any = work()
        contextvars.copy_context().run(next, running)
        with pgtrack.session("other"):
            if end == "exhaust":
                list(running)
            elif end == "close":
                running.close()
            elif end == "throw":
                with pytest.raises(KeyError):
                    running.throw(KeyError())
            del running
            gc.collect()
            after = here()

        assert after == "other"
        assert [event.session_id for event in events][-1] == "own"
        assert events[-1].api_status_code == (500 if end == "throw" else 204)

    def test_other_thread(self, events: Events) -> None:
        """A block that is left by another thread tells under its own session."""

        @contextlib.contextmanager
        def manage() -> Iterator[None]:
            with pgtrack.session("own"), pgtrack.journey("j"):
                yield

        block = manage()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(block.__enter__).result(10)
        with pgtrack.session("other"):
            swallowed = block.__exit__(KeyError, KeyError("x"), None)

        assert swallowed is False
        assert [e.session_id for e in events] == ["own"]
        assert events[0].journey_conversion_status == "abandoned"

    def test_async_fixture(self) -> None:
        """An async generator that another task closes neither raises nor clobbers."""

        async def work() -> AsyncIterator[None]:
            async with pgtrack.session("own"):
                yield

        async def main() -> list[str | None]:
            running: Any = work()
            await asyncio.create_task(anext_of(running))
            with pgtrack.session("other"):
                await asyncio.create_task(running.aclose())
                return [here()]

        async def anext_of(running: Any) -> None:
            await running.__anext__()

        assert asyncio.run(main()) == ["other"]


class TestBlocks:
    """
    What all blocks share.
    """

    def test_shared_by_tasks(self, events: Events) -> None:
        """One block may be entered by many tasks at once, which leave in any order."""
        block = pgtrack.api_call("GET", "/x")

        async def work(i: int) -> None:
            with pgtrack.session(f"s{i}"):
                async with block as call:
                    for _ in range(i % 7):
                        await asyncio.sleep(0)
                    call.status_code = 200 + i

        async def main() -> None:
            await asyncio.gather(*(work(i) for i in range(200)))

        asyncio.run(main())

        told = {(event.session_id, event.api_status_code) for event in events}
        assert told == {(f"s{i}", 200 + i) for i in range(200)}

    def test_shared_by_threads(self, events: Events) -> None:
        """The same for threads."""
        block = pgtrack.api_call("GET", "/x")

        def work(i: int) -> None:
            for _ in range(200):
                with pgtrack.session(f"s{i}"), block as call:
                    call.status_code = 200 + i

        start_together(8, work)

        told = {(event.session_id, event.api_status_code) for event in events}
        assert told == {(f"s{i}", 200 + i) for i in range(8)}
        assert len(events) == 1600

    def test_nested_in_itself(self, events: Events) -> None:
        """A block may be entered within itself."""
        block = pgtrack.api_call("GET", "/x")
        with block as outer:
            outer.status_code = 201
            with block as inner:
                inner.status_code = 202

        assert [event.api_status_code for event in events] == [202, 201]

    def test_leaving_unentered(self) -> None:
        """Leaving a block that was never entered is a mistake."""
        with pytest.raises(KeyError):
            pgtrack.session().__exit__(None, None, None)

    @pytest.mark.parametrize(
        "block",
        [
            pgtrack.session("s", user_id="u", metadata={"k": [1]}),
            pgtrack.journey("j"),
            pgtrack.api_call("GET", "/"),
            pgtrack.continued_from({"X-Session-ID": "s"}),
        ],
        ids=lambda block: type(block).__name__,
    )
    def test_copies(self, events: Events, block: Any) -> None:
        """A block can be copied and pickled, also while it is entered."""
        with block:
            expected = pgtrack.current()
            copies = [copy.copy(block), copy.deepcopy(block)]
            copies.append(pickle.loads(pickle.dumps(block)))
        seen = []
        for copied in copies:
            with copied:
                seen.append(pgtrack.current())
            assert current_frame() is None

        # Requests without an id of their own have a new one each time.
        seen = [(one.session_id, one.user_id, one.journey_id) for one in seen]
        fields = (expected.session_id, expected.user_id, expected.journey_id)
        assert seen == [fields] * 3

    def test_keeps_nothing(self) -> None:
        """A block that was left holds nothing of its runs."""
        block = pgtrack.session("s")
        for _ in range(3):
            with block:
                pass

        assert block._entered == {}

    def test_our_error(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error of our own at the end reaches the log, and not the host."""
        monkeypatch.setattr(_diagnostics, "reraise", False)

        def fail(*args: object, **kwargs: object) -> bool:
            raise ZeroDivisionError

        with capture():
            client = pgtrack._api.default_client()
            monkeypatch.setattr(client, "emit", fail)

            result = pgtrack.track_api(lambda: 1)()
            with pgtrack.session("s"), pgtrack.api_call():
                pass
            with pytest.raises(KeyError), pgtrack.journey("j"):
                raise KeyError

        _diagnostics.tell()
        assert result == 1
        assert current_frame() is None
        assert [r.getMessage()[:49] for r in caplog.records] == [
            "pgtrack had an internal error (ZeroDivisionError "
        ] * 2  # once a place

    def test_interrupted(self, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C while the end is told reaches the host, and the block is left."""

        def interrupt(*args: object, **kwargs: object) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(pgtrack._api.default_client(), "emit", interrupt)

        with pytest.raises(KeyboardInterrupt), pgtrack.api_call():
            pass

        assert current_frame() is None

    def test_decorators(self, events: Events) -> None:
        """Each block is a decorator of functions, coroutines and generators."""

        def generate() -> Iterator[tuple[str | None, str | None]]:
            yield here(), pgtrack.current().journey_id

        async def wait() -> tuple[str | None, str | None]:
            return here(), pgtrack.current().journey_id

        inside = functools.reduce(
            lambda function, block: block(function),
            [pgtrack.journey("j"), pgtrack.session("s"), pgtrack.api_call("GET", "/")],
            generate,
        )
        results = [*inside()]
        results += [pgtrack.session("s")(pgtrack.journey("j")(here))()]
        results += [asyncio.run(pgtrack.session("t")(wait)())]

        assert results == [("s", "j"), "s", ("t", None)]
        assert [event.type for event in events] == ["api.response"]


class TestJourney:
    """
    Journeys.
    """

    def test_steps(self, events: Events) -> None:
        """Steps are told with the journey, and what happens inside belongs to it."""
        with pgtrack.session("s"), pgtrack.journey("checkout") as journey:
            journey.step("cart")
            journey.step("payment", "Payment", duration_ms=12.4, metadata={"k": 1})
            pgtrack.emit("custom")
            journey.convert()
        pgtrack.emit("custom")

        events.assert_journey("checkout", steps=["cart", "payment"], status="converted")
        payment = events[1]
        assert (payment.journey_step_name, payment.duration_ms) == ("Payment", 12)
        assert [event.journey_id for event in events] == ["checkout"] * 4 + [None]

    def test_convert(self, events: Events) -> None:
        """Conversion goes out as the real frontend sends it."""
        with pgtrack.journey("j") as journey:
            taken = journey.convert(metadata={"total": 3})

        (event,) = events
        assert taken is True
        assert (event.type, event.name) == ("custom", "journey_conversion")
        assert event.to_wire()["gen_ai.journey.conversion.status"] == "converted"
        assert event.metadata == {"total": 3, "source": "backend"}

    @pytest.mark.parametrize(
        ("metadata", "expected"),
        [(None, {}), ({"k": 1}, {"k": 1}), ([1], {"value": [1]})],
    )
    def test_abandon(self, events: Events, metadata: Any, expected: Any) -> None:
        """Giving up says why, in the metadata, whatever else is in there."""
        with pgtrack.journey("j") as journey:
            journey.abandon("too dear", metadata=metadata)
            journey.abandon()

        first, second = events
        assert first.journey_conversion_status == "abandoned"
        assert first.metadata == {**expected, "reason": "too dear", "source": "backend"}
        assert second.metadata == {"source": "backend"}

    @pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
    def test_left_by_exception(
        self, events: Events, error: type[BaseException]
    ) -> None:
        """A journey that an exception leaves is abandoned, without an error event."""
        with pytest.raises(error), pgtrack.journey("j"):
            raise error

        (event,) = events
        assert event.journey_conversion_status == "abandoned"
        assert event.metadata == {"reason": error.__name__, "source": "backend"}

    @pytest.mark.parametrize("end", ["convert", "abandon"])
    def test_left_after_its_end(self, events: Events, end: str) -> None:
        """An exception after the journey's end does not change how it ended."""
        with pytest.raises(KeyError), pgtrack.journey("j") as journey:
            fail_after(getattr(journey, end))

        assert len(events) == 1

    def test_left_without_end(self, events: Events) -> None:
        """A journey that is left in peace has neither converted nor been abandoned."""
        with pgtrack.journey("j"):
            pass

        assert list(events) == []

    def test_closed_generator(self, events: Events) -> None:
        """A journey in a generator that is closed is not abandoned by that."""

        def work() -> Iterator[None]:
            with pgtrack.journey("j"):
                yield

        for decorated in (work, pgtrack.track_api(work), pgtrack.journey("k")(work)):
            running: Any = decorated()
            next(running)
            running.close()

        assert [event.type for event in events] == ["api.response"]

    def test_misspelt(self, events: Events) -> None:
        """A misspelt keyword is Python's own TypeError."""
        with pgtrack.journey("j") as journey:
            for verb in (
                journey.convert,
                journey.abandon,
                functools.partial(journey.step, "s"),
            ):
                with pytest.raises(
                    TypeError, match="unexpected keyword argument 'naem'"
                ):
                    verb(naem="x")

    def test_odd_id(self, events: Events) -> None:
        """An id that is no text becomes one, in events and headers."""
        odd: Any = uuid.UUID(UUID)
        with pgtrack.session("s"), pgtrack.journey(odd) as journey:
            journey.step("s")
            headers = pgtrack.propagation_headers(trusted=True)

        pgtrack.journey_step("s", journey=odd)(lambda: None)()
        assert [event.journey_id for event in events] == [UUID, UUID]
        assert headers["X-Journey-ID"] == UUID
        assert journey.journey_id == UUID

    def test_nested(self, events: Events) -> None:
        """An inner journey counts inside of it, the outer one after it."""
        with pgtrack.journey("outer") as outer:
            with pgtrack.journey("inner"):
                outer.step("late")
                inside = pgtrack.current().journey_id
            after = pgtrack.current().journey_id

        assert (inside, after) == ("inner", "outer")
        assert events[0].journey_id == "outer"

    def test_explicit_client(self, events: Events) -> None:
        """`client=` wins over the default client."""
        with capture() as others:
            client = pgtrack._api.default_client()

        with pgtrack.journey("j", client=client) as journey:
            journey.convert()
        with pgtrack.api_call(client=client):
            pass

        assert list(events) == []
        assert [event.type for event in others] == ["custom", "api.response"]


class TestApiCall:
    """
    Calls.
    """

    def test_block(self, events: Events) -> None:
        """The response has method, path, status and duration."""
        with pgtrack.api_call("POST", "/charge") as call:
            call.status_code = 201

        (event,) = events
        fields = event.type, event.api_method, event.api_path, event.api_status_code
        assert fields == ("api.response", "POST", "/charge", 201)
        assert event.api_duration_ms is not None

    def test_changed(self, events: Events) -> None:
        """Method and path may be told late, and are absent if they never are."""
        with pgtrack.api_call() as call:
            call.method, call.path = "GET", "/late"
        with pgtrack.api_call():
            pass

        told = [(event.api_method, event.api_path) for event in events]
        assert told == [("GET", "/late"), (None, None)]

    @pytest.mark.parametrize("wrong", [None, "200", 99, 600, True])
    def test_wrong_status(self, events: Events, wrong: Any) -> None:
        """A status that is none is told as 200, and counted."""
        with pgtrack.api_call() as call:
            call.status_code = wrong

        assert events[0].api_status_code == 200
        assert pgtrack.stats().adjusted == {"status_code": 1}

    def test_left_elsewhere(self, events: Events) -> None:
        """A shared block that is left where nobody entered it blames no other's run."""
        call = pgtrack.api_call("POST", "/x")

        def enter(session_id: str) -> None:
            pgtrack.session(session_id).__enter__()
            call.__enter__()

        contexts = {name: contextvars.copy_context() for name in ("a", "b", "c")}
        for name, context in contexts.items():
            context.run(enter, name)
        contextvars.copy_context().run(call.__exit__, None, None, None)
        contexts["a"].run(call.__exit__, None, None, None)

        assert [event.session_id for event in events] == ["a"]
        assert pgtrack.stats().dropped == {"left_elsewhere": 1}

    def test_server_error(self, events: Events) -> None:
        """A status from 500 on makes an error event, before that of the call."""
        with pgtrack.api_call() as call:
            call.status_code = 503

        error, response = events
        assert (error.error_type, error.error_message) == ("503", "Service Unavailable")
        assert response.api_status_code == 503

    def test_exception(self, events: Events) -> None:
        """An exception wins over the status that was set."""
        with pytest.raises(KeyError), pgtrack.api_call() as call:
            fail_after(functools.partial(setattr, call, "status_code", 201))

        told = [event.error_type or event.api_status_code for event in events]
        assert told == ["KeyError", 500]

    def test_cancelled(self, events: Events, backend: str) -> None:
        """A call that is cancelled is told as 499, and no error."""

        async def main() -> None:
            with anyio.move_on_after(0):
                async with pgtrack.api_call():
                    await anyio.sleep_forever()

        anyio.run(main, backend=backend)

        assert [event.api_status_code for event in events] == [499]

    def test_in_session(self, events: Events, caplog: pytest.LogCaptureFixture) -> None:
        """Calls within calls are events of their own, and nothing is logged."""
        caplog.set_level(logging.DEBUG)
        with (
            pgtrack.session("s"),
            pgtrack.api_call("GET", "/outer"),
            pgtrack.api_call("GET", "/inner"),
        ):
            pass

        told = [(event.session_id, event.api_path) for event in events]
        assert told == [("s", "/inner"), ("s", "/outer")]
        assert caplog.records == []
