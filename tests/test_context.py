from __future__ import annotations

import contextvars
import itertools
import pickle
import random
import uuid

import pytest

import pgtrack
from harness import in_fork, load_vectors, start_together
from pgtrack import _context
from pgtrack._context import (
    SUPPRESSED,
    Frame,
    current_frame,
    is_journey_id,
    is_request_id,
    is_session_id,
    is_user_id,
    new_session_id,
    pop,
    process_session_id,
    push,
    suppress,
    switch,
)
from pgtrack.testing import capture

CASES = load_vectors("session_ids")["cases"]
UUID = "2b1f6c1e-7d52-4c55-9a53-0c9f1d6b8e21"


def opened(name: str) -> Frame:
    """
    Push a frame with a session of this name.
    """
    frame = Frame(current_frame(), session_id=name)
    push(frame)
    return frame


def stack() -> list[str | None]:
    """
    Return the sessions of the running context's frames, the innermost first.
    """
    names = []
    frame = current_frame()
    while frame is not None:
        names.append(frame.session_id)
        frame = frame.parent
    return names


class TestGrammar:
    """
    Which ids are let in.
    """

    @pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["value"])[:40])
    def test_vectors(self, case: dict[str, object]) -> None:
        """Session ids are told apart as the vectors say, leniently and strictly."""
        value = case["value"]

        assert is_session_id(value) == case["lenient"]
        assert is_session_id(value, "uuid") == case["strict_uuid"]

    @pytest.mark.parametrize("value", [None, 1, b"abc", ["a"], object()])
    def test_other_types(self, value: object) -> None:
        """What is no text is no id."""
        checks = [is_session_id, is_request_id, is_user_id, is_journey_id]

        assert [check(value) for check in checks] == [False] * 4

    @pytest.mark.parametrize(
        ("value", "is_request", "is_user", "is_journey"),
        [
            ("a", True, True, True),
            ("a+b/c=d@e", True, True, True),
            ("=a", False, True, True),
            ("a" * 128, True, True, True),
            ("a" * 129, False, True, True),
            ("a" * 255, False, True, True),
            ("a" * 256, False, False, False),
            ("", False, False, False),
            ("a\n", False, False, False),
            ("a b", False, False, True),
            ("é", False, False, True),
            ("\u0663", False, False, True),
            ("a\u2028b", False, False, False),
            ("\ud800", False, False, False),
            ("a\0", False, False, False),
        ],
    )
    def test_others(
        self, value: str, *, is_request: bool, is_user: bool, is_journey: bool
    ) -> None:
        """Requests, users and journeys have grammars of their own."""
        assert is_request_id(value) == is_request
        assert is_user_id(value) == is_user
        assert is_journey_id(value) == is_journey

    def test_new_session_id(self) -> None:
        """New ids fit their own grammar; where only UUIDs do, they lack the prefix."""
        token, strict = new_session_id("srv-"), new_session_id("srv-", "uuid")

        assert token.startswith("srv-")
        assert is_session_id(token)
        assert is_session_id(strict, "uuid")
        assert str(uuid.UUID(token.removeprefix("srv-"))) in token
        assert new_session_id() != new_session_id()


class TestFrames:
    """
    The stack of frames, in one context and in copies of it.
    """

    def test_push_and_pop(self) -> None:
        """What is pushed is innermost until it is popped."""
        a = opened("a")
        b = opened("b")
        seen = [stack()]
        pop(b)
        seen.append(stack())
        pop(a)

        assert seen == [["b", "a"], ["a"]]
        assert current_frame() is None

    @pytest.mark.parametrize("order", list(itertools.permutations("abcd")))
    def test_any_order(self, order: tuple[str, ...]) -> None:
        """In whichever order frames are left, those still open stay, in their order."""
        frames = {name: opened(name) for name in "abcd"}
        left = list("dcba")

        for name in order:
            pop(frames[name])
            left.remove(name)

            assert stack() == left

    def test_again(self) -> None:
        """Popping a frame that is gone changes nothing."""
        a = opened("a")
        b = opened("b")
        pop(a)
        pop(a)
        seen = stack()
        pop(b)
        pop(b)

        assert seen == ["b"]
        assert current_frame() is None

    def test_elsewhere(self) -> None:
        """Popping in a context that never had the frame changes nothing there."""
        context = contextvars.copy_context()
        a = opened("a")

        other = context.run(opened, "other")
        context.run(pop, a)

        assert context.run(current_frame) is other
        assert stack() == ["a"]

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_copies_keep_theirs(self, order: tuple[int, int]) -> None:
        """Leaving a block in one context leaves it open in those that were copied."""
        a = opened("a")
        b = opened("b")
        copied = contextvars.copy_context()
        inner = copied.run(opened, "c")

        for i in order:
            pop((a, b)[i])
        before = copied.run(stack)
        copied.run(pop, inner)

        assert before == ["c", "b", "a"]
        assert copied.run(stack) == ["b", "a"]
        assert stack() == []

    def test_random(self) -> None:
        """Any sequence over any contexts leaves each as if it were the only one."""
        rng = random.Random(1)
        contexts = [(contextvars.copy_context(), list[Frame]())]
        everything: list[Frame] = []
        for _ in range(3000):
            context, model = rng.choice(contexts)
            action = rng.random()
            if action < 0.05 and len(contexts) < 10:
                contexts.append((context.copy(), model.copy()))
            elif action < 0.5 and len(model) < 8:
                frame = context.run(opened, f"f{len(everything)}")
                everything.append(frame)
                model.append(frame)
            elif everything:
                frame = rng.choice(model if model and action < 0.9 else everything)
                context.run(pop, frame)
                if frame in model:
                    model.remove(frame)

            expected = [frame.session_id for frame in reversed(model)]
            assert context.run(stack) == expected

    def test_switch(self) -> None:
        """`switch` returns what was innermost, and makes anything innermost."""
        a = opened("a")
        other = Frame(None, session_id="other")

        assert switch(other) is a
        assert switch(None) is other
        assert current_frame() is None

    def test_child(self) -> None:
        """A part shares session, request, user and metadata, and may name a journey."""
        whole = Frame(
            None,
            session_id="s",
            request_id="r",
            metadata={"k": 1},
            is_remote=True,
            is_suppressed=True,
        )
        journey = whole.child(journey_id="j")
        step = journey.child(step=("s1", None))

        whole.cell.user_id = "u"
        for part in (journey, step):
            assert (part.session_id, part.request_id) == ("s", "r")
            assert (part.is_remote, part.is_suppressed) == (True, True)
            assert part.metadata is whole.metadata
            assert part.redacted is whole.redacted
            assert part.cell.user_id == "u"
        assert (step.journey_id, step.step) == ("j", ("s1", None))
        assert step.child().step == ("s1", None)
        assert step.child(journey_id="j2").step is None

    def test_redacted_is_per_metadata(self) -> None:
        """Frames with other metadata do not share what was redacted of it."""
        whole = Frame(None, metadata={"k": 1})

        assert Frame(whole, metadata={"k": 1}).redacted is not whole.redacted

    def test_suppress(self) -> None:
        """Under `suppress` nothing is emitted; afterwards all is as before."""
        with capture() as events:
            a = opened("a")
            with suppress():
                taken = pgtrack.emit("custom")
                inside = current_frame()
            after = current_frame()
            with pytest.raises(KeyError), suppress():
                raise KeyError

        assert (taken, events) == (False, [])
        assert inside is SUPPRESSED
        assert after is current_frame() is a

    def test_suppress_inherits(self) -> None:
        """Nor within sessions that are opened under it."""
        with capture() as events, suppress(), pgtrack.session("s"):
            pgtrack.emit("custom")
            pgtrack.track_api(lambda: None)()

        assert events == []


class TestProcessSession:
    """
    The session of what happens outside of any unit of work.
    """

    def test_stays(self) -> None:
        """It is one for all threads of the process."""
        seen = start_together(8, lambda _: process_session_id())

        assert set(seen) == {process_session_id()}
        assert process_session_id().startswith("proc-")

    def test_first_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Threads that ask for it first at once get the same one."""
        for _ in range(50):
            monkeypatch.setattr(_context, "_process_sessions", {})

            seen = start_together(8, lambda _: process_session_id())

            assert len(set(seen)) == 1

    def test_fork(self) -> None:
        """A forked child has another one, and keeps it."""
        ours = process_session_id()

        first, second = in_fork(lambda: (process_session_id(), process_session_id()))

        assert first == second != ours

    def test_not_public(self) -> None:
        """It is neither shown nor propagated, but events go out under it."""
        with capture() as events:
            pgtrack.emit("custom")

        assert events[0].session_id == process_session_id()
        assert pgtrack.current().session_id is None
        assert pgtrack.propagation_headers(trusted=True) == {}

    def test_switched_off(self) -> None:
        """With `default_session=False` such events are dropped and counted."""
        with capture(default_session=False) as events:
            taken = pgtrack.emit("custom")
            dropped = dict(pgtrack.stats().dropped)

        assert (taken, list(events)) == (False, [])
        assert dropped == {"no_session": 1}


class TestContext:
    """
    What `current()` returns.
    """

    def test_outside(self) -> None:
        """Outside of everything all is None, and the metadata empty."""
        assert pgtrack.current() == pgtrack.Context()
        assert pgtrack.current().metadata == {}

    def test_is_a_copy(self) -> None:
        """It is frozen, and changing its metadata changes no event."""
        with capture() as events, pgtrack.session("s", metadata={"k": 1}):
            context = pgtrack.current()
            context.metadata["k"] = 2  # type: ignore[index]
            pgtrack.emit("custom")

        with pytest.raises(AttributeError):
            context.session_id = "x"  # type: ignore[misc]
        assert events[0].metadata is not None
        assert events[0].metadata["k"] == 1

    def test_pickles(self) -> None:
        """It can be pickled, outside of a session as well."""
        with pgtrack.session("s", user_id="u", metadata={"k": [1]}):
            contexts = [pgtrack.current(), pgtrack.Context()]

        assert pickle.loads(pickle.dumps(contexts)) == contexts
