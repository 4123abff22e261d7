"""What the middlewares of all web frameworks share, without any of them."""

from __future__ import annotations

import contextvars
import importlib
import re
import time
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgtrack
from harness import in_fork
from pgtrack import _api, _context, _diagnostics
from pgtrack.integrations._http import Serving, paths
from pgtrack.integrations._requirement import requirement
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgtrack.testing import Events


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


def told(events):
    """Return what the events say, in order."""
    return [
        (e.api_method, e.api_path, e.api_status_code)
        if e.type == "api.response"
        else (e.type, e.error_type)
        for e in events
    ]


class TestPaths:
    """Which paths are excluded."""

    @pytest.mark.parametrize(
        ("patterns", "path", "is_named"),
        [
            ((), "/x", False),
            ((), "", False),
            ("/x", "/x", True),
            ("/x", "/x/", False),
            ("/x", "/X", False),
            (["/x", "/y"], "/y", True),
            ("/a*", "/abc/d", True),
            ("*/a", "/b/c/a", True),
            ("/a*c*e", "/abcde", True),
            ("/a.c", "/abc", False),
            ("/a?", "/a", False),
            ("/a|/b", "/b", False),
            ("*", "", True),
            ("/a*", "/a\nb", True),
            ("/a*a", "/a", False),
            ("/a*b*b", "/ab", False),
            ("/a*b*c", "/abbc", True),
            ("/a**c", "/ac", True),
            (["/x", "/a*"], "/ab", True),
        ],
    )
    def test_patterns(self, patterns, path, is_named):
        """A pattern is a whole path; `*` stands for any text."""
        assert is_named is paths(patterns)(path)

    @given(st.text())
    def test_any_text_names_itself(self, text):
        """Whatever is in a path, it names itself."""
        assert paths([f"/{text}"])(f"/{text}")
        assert not paths([f"/{text}x"])("/" + text.replace("*", "."))

    @pytest.mark.parametrize("pattern", ["health", "^/health$", "https://h/health"])
    def test_what_no_path_could_be(self, pattern):
        """A pattern that could name no path is refused where it is given."""
        with pytest.raises(pgtrack.ConfigError, match="Begin it by '/', or by"):
            paths(["/", pattern])

    def test_paths_that_nearly_fit(self):
        """A client cannot choose a path that takes long to compare."""
        named = paths("/*a*a*a*b")
        began = time.perf_counter()

        assert not named("/" + "a" * 100_000)
        assert 1 > time.perf_counter() - began

    def test_iterators(self):
        """Patterns may be given once."""
        named = paths(iter(["/a", "/b"]))

        assert [True, True, False] == [named(path) for path in ("/a", "/b", "/c")]


class TestServed:
    """One request, by hand."""

    def test_answer(self, events):
        """A request is told when it is complete, and not again when it is left."""
        served = Serving().begin({"X-Session-ID": "s"}, "GET", "/x")
        assert served is not None
        served.answer_with(200)
        served.complete()
        served.complete()
        assert 1 == len(events)
        served.leave()

        assert [("GET", "/x", 200)] == told(events)
        assert _context.current_frame() is None

    def test_left_in_another_context(self, events):
        """A request that is left in another context is told in its own session."""
        served = Serving().begin({"X-Session-ID": "s"}, "GET", "/x")
        assert served is not None
        _context.switch(None)
        served.answer_with(200)
        served.leave()

        assert ["s"] == [event.session_id for event in events]
        assert events[0].metadata["incomplete"] is True

    def test_nested(self, events):
        """A request inside of another is apart, and gives it back."""
        outer = Serving().begin({"X-Session-ID": "outer"}, "GET", "/outer")
        inner = Serving().begin({}, "GET", "/inner")
        assert outer is not None
        assert inner is not None
        assert pgtrack.current().session_id.startswith("srv-")
        inner.leave()
        assert "outer" == pgtrack.current().session_id
        outer.leave()

        assert [("GET", "/inner", 500), ("GET", "/outer", 500)] == told(
            events.of_type("api.response")
        )

    def test_the_next_in_the_context_of_the_last(self, events):
        """A request that begins in the context of another does not hold on to it."""
        first = Serving().begin({}, "GET", "/first")
        assert first is not None
        context = contextvars.copy_context()
        first.leave()
        second = context.run(Serving().begin, {}, "GET", "/second")
        assert second is not None

        assert second.frame.parent is None

    def test_left_below_another(self, events):
        """What is left open inside of a request ends with it."""
        served = Serving().begin({}, "GET", "/x")
        assert served is not None
        pgtrack.session("other").__enter__()
        served.leave()

        assert _context.current_frame() is None

    def test_forked_child(self, events):
        """A child that was forked on the way does not tell the request, but errors."""
        served = Serving().begin({}, "GET", "/x")
        assert served is not None

        def child():
            served.leave(ValueError("in the child"))
            return told(events)

        assert [("error", "ValueError")] == in_fork(child)
        served.answer_with(200)
        served.leave()
        assert [("GET", "/x", 200)] == told(events)

    def test_own_function_that_ends_later(self, events):
        """A request that is over keeps no error alive, whoever keeps the request."""

        @pgtrack.track_api
        def own():
            yield
            raise ValueError("late")

        served = Serving().begin({}, "GET", "/x")
        assert served is not None
        run = own()
        next(run)
        served.answer_with(200)
        served.leave()
        with pytest.raises(ValueError, match="late"):
            next(run)

        assert [("GET", "/x", 200)] == told(events)
        assert served.request.error is None

    def test_trusted(self, events):
        """Carriers that can be trusted bring user and journey."""
        from pgtrack.integrations._http import Served

        served = Served(
            _api.default_client(),
            {"X-User-ID": "u", "X-Journey-ID": "j"},
            "GET",
            "/x",
            is_told=True,
            is_trusted=True,
        )
        served.leave()

        assert {("u", "j")} == {(e.user_id, e.journey_id) for e in events}

    def test_failing_route(self, events):
        """A framework that fails to name the route leaves the path."""
        served = Serving().begin({}, "GET", "/x")
        assert served is not None
        served.request.find_route = lambda: 1 / 0
        served.answer_with(200)
        served.leave()

        assert ["/x"] == [event.api_path for event in events]

    def test_our_own_error(self, events, monkeypatch):
        """An error of our own is None, noted, and leaves nothing."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr("pgtrack.integrations._http.Request", None)

        assert Serving().begin({}, "GET", "/x") is None
        assert _context.current_frame() is None
        assert 1 == len(_diagnostics._notes)

    def test_flush_of_nothing(self):
        """Flushing without a client does nothing."""
        anyio.run(Serving().aflush)

        assert 0 == pgtrack.stats().emitted


class TestRequirement:
    """What is said where a package is missing."""

    def test_missing(self):
        """The one error names the package and the extra."""
        with (
            pytest.raises(pgtrack.exceptions.MissingDependencyError) as caught,
            requirement("no_such_package.part", extra="starlette"),
        ):
            importlib.import_module("no_such_package.part")

        assert "no_such_package" == caught.value.name
        assert re.search(r"pip install 'pgtrack\[starlette\]'", str(caught.value))

    def test_broken(self):
        """A package that is there and lacks something else says so itself."""
        with (
            pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught,
            requirement("starlette", extra="starlette"),
        ):
            importlib.import_module("no_such_dependency")

        assert ModuleNotFoundError is type(caught.value)

    def test_nameless(self):
        """An error without a name goes on as it is."""
        error = ModuleNotFoundError("odd")
        with (
            pytest.raises(ModuleNotFoundError, match="odd"),
            requirement("starlette", extra="starlette"),
        ):
            raise error
