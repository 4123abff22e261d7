"""Celery: tasks that run here and now, messages, and workers of every pool."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

celery = pytest.importorskip("celery")

from billiard.exceptions import TimeLimitExceeded, WorkerLostError  # noqa: E402
from celery import Celery, chain, chord, group, signals  # noqa: E402
from celery.exceptions import Ignore, Reject  # noqa: E402
from celery.worker.request import Request  # noqa: E402

import pgtrack  # noqa: E402
from harness import (  # noqa: E402
    Background,
    Server,
    fits,
    hang,
    hostile_values,
    run_script,
    start_together,
)
from pgtrack import _context, _diagnostics, _transport  # noqa: E402
from pgtrack.integrations import celery as integration  # noqa: E402
from pgtrack.testing import capture  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pgtrack.testing import Events

FRESH = re.compile(r"srv-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch

pytestmark = pytest.mark.filterwarnings(
    # Celery's own, of broker transports that are no brokers.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    integration.install()
    yield
    integration.uninstall()
    assert not integration._running


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


class UnpicklableError(Exception):
    """An exception that Celery replaces by another one."""

    def __init__(self, message: str, lock: Any) -> None:
        super().__init__(message)
        self.lock = lock


def seen() -> tuple[str | None, str | None, str | None]:
    """Return the session, user and journey of the running code."""
    now = pgtrack.current()
    return now.session_id, now.user_id, now.journey_id


ANN = ("sess_ann", "u_ann", "checkout")


def as_ann() -> Any:
    """Return a decorator that runs a function as Ann, in the middle of her checkout."""

    def decorate(function: Any) -> Any:
        inside = pgtrack.journey("checkout")(function)
        return pgtrack.session("sess_ann", user_id="u_ann")(inside)

    return decorate


def make_app(  # noqa: C901  many small tasks
    folder: Path | None = None, **settings: Any
) -> Celery:
    """Return an application with tasks, whose messages stay in memory, or a folder."""
    app = Celery(
        "shop", broker="memory://", backend="cache+memory://", set_as_current=False
    )
    app.conf.update(broker_connection_retry_on_startup=True, **settings)
    if folder is not None:
        for name in ("queue", "processed", "control"):
            (folder / name).mkdir()
        app.conf.update(
            broker_url="filesystem://",
            broker_transport_options={
                "data_folder_in": str(folder / "queue"),
                "data_folder_out": str(folder / "queue"),
                "processed_folder": str(folder / "processed"),
                "control_folder": str(folder / "control"),
            },
        )
    log: list[Any] = []
    app.seen = log

    def note(name: str, *more: Any) -> None:
        log.append((name, *seen(), *more))

    @app.task(shared=False, name="who", bind=True)
    def who(self: Any, *_: Any) -> list[Any]:
        note("who")
        return list(seen())

    @app.task(shared=False, name="after")
    def after(*_: Any) -> None:
        note("after")

    @app.task(shared=False, name="outer")
    def outer() -> None:
        note("outer")
        after.delay()

    @app.task(shared=False, name="knows")
    def knows(user: str) -> None:
        pgtrack.identify(user)
        note("knows")

    @app.task(shared=False, name="fails")
    def fails(message: str = "bad") -> None:
        note("fails")
        raise ValueError(message)

    @app.task(shared=False, name="unpicklable")
    def unpicklable() -> None:
        raise UnpicklableError("odd", threading.Lock())

    @app.task(
        shared=False, name="retries", bind=True, max_retries=2, default_retry_delay=0
    )
    def retries(self: Any) -> None:
        note("retries", self.request.retries)
        error = ConnectionError(f"attempt {self.request.retries}")
        raise self.retry(exc=error)

    @app.task(shared=False, name="ignores")
    def ignores() -> None:
        raise Ignore

    @app.task(shared=False, name="rejects")
    def rejects() -> None:
        raise Reject("no", requeue=False)

    @app.task(shared=False, name="leaves")
    def leaves(kind: str) -> None:
        raise {"exit": SystemExit, "interrupt": KeyboardInterrupt}[kind]

    @app.task(shared=False, name="forgets")
    def forgets() -> None:
        pgtrack.session("sess_forgotten", user_id="u_forgotten").__enter__()
        pgtrack.journey("forgotten").__enter__()

    @app.task(
        shared=False, name="tracked", bind=True, max_retries=1, default_retry_delay=0
    )
    @pgtrack.track_api("/tracked", method="TASK")
    @pgtrack.journey_step("tracked", journey="work")
    def tracked(self: Any, how: str) -> None:
        if how == "retry":
            raise self.retry()
        if how == "fail":
            raise ValueError("bad")

    app.finalize()
    return app


@pytest.fixture(name="app")
def _app() -> Celery:
    app = make_app()
    with app.connection_for_write() as connection:
        connection.default_channel.queue_delete("celery")
    return app


def messages(app: Celery) -> Iterator[Any]:
    """Return the messages in the queue, one after the other."""
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")
        while True:
            try:
                yield queue.get(block=False)
            except queue.Empty:
                queue.close()
                return


def work(app: Celery) -> list[Any]:
    """Run all messages by a worker's own code, and return what the tasks saw."""
    for message in messages(app):
        task = app.tasks[message.headers["task"]]
        task.__trace__ = None
        message.ack()
        Request(message, app=app, task=task).execute()
    return app.seen


class TestEager:
    """Tasks that run within their caller, by `apply` and `task_always_eager`."""

    @pytest.mark.parametrize("way", ["apply", "always"])
    def test_keeps_the_session_user_and_journey(self, app, way):
        """An eager task runs in the session of its caller, with user and journey."""
        app.conf.task_always_eager = way == "always"
        task = app.tasks["who"]

        @as_ann()
        def call():
            return (task.delay if way == "always" else task.apply)().get()

        assert [*ANN] == call()

    def test_keeps_the_metadata(self, app, events):
        """What a session adds to its events is added to those of an eager task, too."""

        @app.task(shared=False)
        def tell():
            pgtrack.emit("custom")

        with pgtrack.session(metadata={"tenant": "acme"}):
            tell.apply()

        assert "acme" == events[0].metadata["tenant"]

    def test_without_a_session_it_has_a_fresh_one(self, app):
        """Each eager task outside of any session has one of its own."""
        sessions = [app.tasks["who"].apply().get() for _ in range(2)]

        assert all(FRESH(session) for session, _, _ in sessions)
        assert sessions[0] != sessions[1]
        assert [[None, None]] * 2 == [rest for _, *rest in sessions]

    @pytest.mark.parametrize("name", ["who", "fails", "retries", "ignores", "forgets"])
    def test_leaves_nothing_behind(self, app, name):
        """The caller's context is what it was before, whatever the task did."""

        @as_ann()
        def call():
            frame = _context.current_frame()
            app.tasks[name].apply()
            return frame is _context.current_frame()

        assert call()
        app.tasks[name].apply()
        assert None is _context.current_frame()

    def test_its_user_is_its_own(self, app):
        """Whom an eager task names is not the user of its caller."""
        with pgtrack.session("sess_ann"):
            app.tasks["knows"].apply(("u_ben",))

            assert ("sess_ann", None, None) == seen()
        assert [("knows", "sess_ann", "u_ben", None)] == app.seen

    def test_it_is_not_the_request_of_its_caller(self, app, events):
        """A decorated task within a request makes an event of its own."""
        from pgtrack.integrations._http import Served

        served = Served(pgtrack._api.default_client(), {}, "GET", "/", is_told=True)
        app.tasks["tracked"].apply(("",))
        served.answer_with(204)
        served.complete()
        served.leave()

        told = [e.api_path for e in events if e.type == "api.response"]
        assert ["/tracked", "/"] == told

    def test_headers_of_the_caller_win(self, app):
        """Another session in the headers comes without the present user."""

        @as_ann()
        def call():
            return app.tasks["who"].apply(headers={"X-Session-ID": "sess_ben"}).get()

        assert ["sess_ben", None, None] == call()

    def test_nested(self, app):
        """An eager task within an eager one goes on with its session."""
        app.conf.task_always_eager = True
        app.tasks["outer"].delay()

        (_, session, *_), (_, inner, *_) = app.seen
        assert FRESH(session)
        assert session == inner

    @pytest.mark.parametrize("throw", [True, False])
    @pytest.mark.parametrize("name", ["fails", "unpicklable"])
    def test_failure(self, app, events, name, throw):
        """A task that fails makes one error event of what it raised."""

        @as_ann()
        def call():
            kind = ValueError if name == "fails" else UnpicklableError
            if throw:
                with pytest.raises(kind):
                    app.tasks[name].apply(throw=True)
            else:
                assert "FAILURE" == app.tasks[name].apply().state

        call()

        (event,) = events
        kind, message = {
            "fails": ("ValueError", "bad"),
            "unpicklable": ("UnpicklableError", "odd"),
        }[name]
        assert ("error", kind, message) == (
            event.type,
            event.error_type,
            event.error_message,
        )
        assert name == event.error_component
        assert ANN == (event.session_id, event.user_id, event.journey_id)

    def test_success_within_an_except_clause(self, app, events):
        """What the caller is handling is not the task's failure."""
        try:
            raise ValueError("the caller's")
        except ValueError:
            app.tasks["who"].apply()

        assert [] == events

    @pytest.mark.parametrize("name", ["ignores", "rejects"])
    def test_changing_ones_mind_is_no_failure(self, app, events, name):
        """Ignore and Reject make no event."""
        app.tasks[name].apply()

        assert [] == events

    @pytest.mark.parametrize("kind", ["exit", "interrupt"])
    def test_leaving_is_no_failure(self, app, events, kind):
        """A task that is ended makes no error event, and leaves nothing behind."""
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            app.tasks["leaves"].apply((kind,))

        assert [] == events
        assert None is _context.current_frame()

    @pytest.mark.parametrize("with_session", [True, False])
    def test_retries_keep_the_session(self, app, events, with_session):
        """All attempts run in one session; only the last one's failure is told."""
        if with_session:
            as_ann()(app.tasks["retries"].apply)()
        else:
            app.tasks["retries"].apply()

        assert [0, 1, 2] == [number for *_, number in app.seen]
        (session,) = {session for _, session, *_ in app.seen}
        assert ("sess_ann" if with_session else FRESH(session)[0]) == session
        assert [("ConnectionError", "attempt 2", session)] == [
            (e.error_type, e.error_message, e.session_id) for e in events
        ]

    def test_decorated_tasks_fail_once(self, app, events):
        """One error event, however many decorators the exception passes."""
        app.tasks["tracked"].apply(("fail",))

        assert Counter({"error": 1, "api.response": 1}) == Counter(
            e.type for e in events
        )
        assert 500 == events[-1].api_status_code

    def test_decorated_tasks_retry(self, app, events):
        """A retry is no failure of what is decorated either: the call was cut short."""
        with pytest.raises(celery.exceptions.Retry):
            app.tasks["tracked"].apply(("retry",), throw=True)

        assert [("api.response", 499)] == [(e.type, e.api_status_code) for e in events]

    def test_decorated_tasks_succeed(self, app, events):
        """A decorated task makes the events of its decorators, in its session."""
        with pgtrack.session("sess_ann"):
            app.tasks["tracked"].apply(("",))

        assert [("journey.step", "sess_ann"), ("api.response", "sess_ann")] == [
            (e.type, e.session_id) for e in events
        ]

    def test_two_at_once_never_mix(self, app):
        """Thousands of tasks in threads, each pair at once, see their own sessions."""
        threads, rounds = 8, 300
        barrier = threading.Barrier(threads)

        @app.task(shared=False)
        def meet():
            barrier.wait(30)
            pgtrack.identify(f"u_{pgtrack.current().session_id}")
            barrier.wait(30)
            return seen()

        def run(i):
            wrong = []
            for j in range(rounds):
                mine = f"s-{i}-{j}"
                if j % 2:
                    with pgtrack.session(mine), pgtrack.journey(f"j-{i}"):
                        got = meet.apply().get()
                    expected = (mine, f"u_{mine}", f"j-{i}")
                else:
                    got = meet.apply().get()
                    expected = (got[0], f"u_{got[0]}", None)
                    wrong += [got] if not FRESH(got[0]) else []
                wrong += [(expected, got)] if expected != got else []
                wrong += [_context.current_frame()] if _context.current_frame() else []
            return wrong

        assert [[]] * threads == start_together(threads, run)


class TestMessages:
    """What goes over the wire, and what a worker's own code makes of it."""

    @pytest.fixture(name="app", params=["memory", "filesystem", "protocol 1"])
    def _app(self, request, app, tmp_path) -> Celery:
        if request.param == "filesystem":
            return make_app(tmp_path)
        if request.param == "protocol 1":
            app.conf.task_protocol = 1
        return app

    def work(self, app):
        """Run all messages, of protocol 1 too."""
        if app.conf.task_protocol == 2:
            return work(app)
        from celery.worker.strategy import proto1_to_proto2

        for message in messages(app):
            body, headers, decoded, utc = proto1_to_proto2(message, message.payload)
            task = app.tasks[headers["task"]]
            task.__trace__ = None
            message.ack()
            Request(
                message,
                app=app,
                task=task,
                body=body,
                headers=headers,
                decoded=decoded,
                utc=utc,
            ).execute()
        return app.seen

    def test_keeps_the_session_user_and_journey(self, app):
        """A task runs in the session of who sent it, with user and journey."""
        as_ann()(app.tasks["who"].delay)()

        assert [("who", *ANN)] == self.work(app)

    def test_leaves_nothing_behind(self, app):
        """The next task, whose message carries nothing, has a session of its own."""
        as_ann()(app.tasks["who"].delay)()
        app.tasks["who"].delay()
        app.tasks["who"].delay()

        (_, *first), (_, *second), (_, *third) = self.work(app)
        assert [*ANN] == first
        assert FRESH(second[0])
        assert FRESH(third[0])
        assert second[0] != third[0]
        assert [None, None] == second[1:]
        assert None is _context.current_frame()

    def test_runs_apart_from_what_the_worker_was_started_in(self, app, events):
        """A worker that was started in a session hands none of it to its tasks."""
        app.tasks["fails"].delay()
        with pgtrack.session("sess_worker", user_id="u_worker", metadata={"a": 1}):
            self.work(app)

        (event,) = events
        assert FRESH(event.session_id)
        assert (None, None) == (event.user_id, event.metadata.get("a"))

    def test_retries_keep_the_session(self, app, events):
        """Each attempt, also of a task that had a fresh session, is in the same."""
        as_ann()(app.tasks["retries"].delay)()
        app.tasks["retries"].delay()
        self.work(app)

        attempts = Counter(session for _, session, *_ in app.seen)
        assert 3 == attempts["sess_ann"]
        assert [3, 3] == [*attempts.values()]
        assert Counter(["ConnectionError"] * 2) == Counter(e.error_type for e in events)
        assert attempts.keys() == {e.session_id for e in events}

    @pytest.mark.parametrize("name", ["fails", "unpicklable"])
    def test_failure(self, app, events, name):
        """A task that fails in a worker makes one error event of what it raised."""
        as_ann()(app.tasks[name].delay)()
        self.work(app)

        (event,) = events
        kind = "ValueError" if name == "fails" else "UnpicklableError"
        assert (kind, name) == (event.error_type, event.error_component)
        assert ANN == (event.session_id, event.user_id, event.journey_id)

    def test_tasks_called_by_tasks(self, app):
        """A task that a task sends is in the same session."""
        as_ann()(app.tasks["outer"].delay)()
        app.tasks["outer"].delay()
        self.work(app)

        assert [("outer", *ANN), ("after", *ANN)] == [
            entry for entry in app.seen if entry[1] == "sess_ann"
        ]
        fresh = {entry[1] for entry in app.seen} - {"sess_ann"}
        assert 1 == len(fresh)


class TestPublishing:
    """What is added to a message, and to which."""

    def sent(self, app, **options):
        """Return the message that calling a task makes."""
        app.tasks["who"].apply_async((1,), **options)
        (message,) = messages(app)
        message.ack()
        return message

    def test_arguments_have_nothing_of_ours(self, app):
        """The correlation is in the headers alone."""
        message = as_ann()(self.sent)(app)

        args, kwargs, embedded = message.payload
        assert ([1], {}) == (args, kwargs)
        assert "sess_ann" not in json.dumps(embedded)
        assert ("sess_ann", "u_ann", "checkout") == tuple(
            message.headers[f"X-{name}-ID"] for name in ("Session", "User", "Journey")
        )

    def test_the_session_of_the_process_stays_in_it(self, app, events):
        """Outside of any session a message carries none."""
        pgtrack.emit("custom")
        message = self.sent(app)

        assert events[0].session_id.startswith("proc-")
        assert [] == [name for name in message.headers if name.startswith("X-")]

    @pytest.mark.parametrize(
        "given",
        [
            {"X-Session-ID": "sess_ben"},
            {"x-session-id": "sess_ben"},
            {"X-Session-ID": "not a session"},
            {"headers": {"X-Session-ID": "sess_ben"}},
        ],
    )
    def test_another_session_comes_without_ours(self, app, given):
        """To a message with a session of its own nothing is added."""
        message = as_ann()(self.sent)(app, headers=given)

        assert "sess_ann" not in json.dumps(message.headers)
        assert "u_ann" not in json.dumps(message.headers)
        assert given.items() <= message.headers.items()

    def test_the_same_session_is_completed(self, app):
        """To the present session the rest is added, not over what was given."""
        given = {"x-session-id": "sess_ann", "X-User-ID": "u_given"}
        message = as_ann()(self.sent)(app, headers=given)

        assert {**given, "X-Journey-ID": "checkout"} == {
            name: value
            for name, value in message.headers.items()
            if name.lower().startswith("x-")
        }

    def test_other_headers_are_left_alone(self, app):
        """What else the caller gave arrives as it was."""
        given = {"tenant": "acme", "X-Request-ID": "req-7"}
        message = as_ann()(self.sent)(app, headers=given)

        assert {**given, "X-Session-ID": "sess_ann"}.items() <= message.headers.items()


class TestForeignMessages:
    """Messages that others sent, or added to."""

    @pytest.mark.parametrize(
        "headers",
        [
            {"headers": {"sentry-trace": "1-2-3"}},
            {"headers": "text"},
            {"headers": ["a"]},
            {"X-User-ID": 7, "X-Journey-ID": None, "X-Request-ID": ["a"]},
            {"x-death": [{"count": 1}]},
        ],
    )
    def test_unknown_headers_are_tolerated(self, app, headers):
        """Whatever else is among the headers, the session is found."""
        app.tasks["who"].apply_async(headers={**headers, "X-Session-ID": "sess_ann"})

        assert [("who", "sess_ann", None, None)] == work(app)

    def test_hostile_values(self, app):
        """Only what fits the grammar becomes a session; anything else a fresh one."""
        values = hostile_values(100)
        for value in values:
            app.tasks["who"].apply_async(headers={"X-Session-ID": value})
        sessions = [session for _, session, *_ in work(app)]

        assert [
            value.strip(" \t") if fits("session", value.strip(" \t")) else "fresh"
            for value in values
        ] == ["fresh" if FRESH(session) else session for session in sessions]
        assert None is _context.current_frame()

    def test_user_and_journey_are_trusted(self, app):
        """The headers of a message are those of a trusted carrier."""
        headers = {"X-User-ID": "u_1", "X-Journey-ID": "a%20b", "X-Session-ID": "s"}
        app.tasks["who"].apply_async(headers=headers)

        assert [("who", "s", "u_1", "a b")] == work(app)


class TestInstall:
    """Installing, and doing without."""

    def test_twice_is_once(self, app, events):
        """Installed twice, a failure is told once; uninstalled once, it is not told."""
        integration.install()
        app.tasks["fails"].apply()
        told = len(events)
        integration.uninstall()
        app.tasks["fails"].apply()

        assert 1 == told == len(events)

    def test_uninstall(self, app):
        """Uninstalled, neither messages nor tasks have anything of ours."""
        integration.uninstall()
        integration.uninstall()
        as_ann()(app.tasks["who"].delay)()

        assert [("who", None, None, None)] == work(app)

    def test_client(self, app, events):
        """A client that was given has the events, and not the default one."""
        with capture() as others:
            client = pgtrack._api.default_client()
            with capture() as defaults:
                integration.install(client=client)
                app.tasks["fails"].apply()

        assert (1, 0) == (len(others), len(defaults))

    def test_disabled(self, app):
        """With pgtrack switched off the correlation goes on, and nothing is sent."""
        as_ann()(app.tasks["fails"].delay)()

        assert [("fails", *ANN)] == work(app)
        assert 0 == pgtrack.stats().emitted

    def test_later_receivers_run_under_the_correlation(self, app):
        """Receivers that are connected after ours see the task's session."""
        found = []

        def receiver(**_):
            found.append(seen())

        hooks = [signals.task_prerun, signals.task_success, signals.task_failure]
        for hook in hooks:
            hook.connect(receiver)
        try:
            as_ann()(app.tasks["who"].delay)()
            as_ann()(app.tasks["fails"].delay)()
            work(app)
        finally:
            for hook in hooks:
                hook.disconnect(receiver)

        assert [ANN] * 4 == found

    def test_installed_while_a_task_runs(self, app, events):
        """A task that began before `install` ends as it began."""
        integration.uninstall()

        @app.task(shared=False)
        def late():
            integration.install()
            raise ValueError

        assert "FAILURE" == late.apply().state
        assert [] == events

    def test_errors_of_ours_stay_with_us(self, app, monkeypatch):
        """Where our code fails, messages are sent, and tasks run and fail, as ever."""

        def broken(*_, **__):
            raise ArithmeticError

        monkeypatch.setattr(_diagnostics, "reraise", False)
        with monkeypatch.context() as patch:
            patch.setattr(integration, "to_carry", broken)
            as_ann()(app.tasks["who"].delay)()
        with monkeypatch.context() as patch:
            patch.setattr(integration, "TaskRun", broken)
            work(app)
            signals.task_failure.send(
                app.tasks["who"], task_id=None, exception=WorkerLostError()
            )
        with monkeypatch.context() as patch:
            patch.setattr(integration.TaskRun, "leave", broken)
            assert "FAILURE" == app.tasks["fails"].apply().state
            _context.switch(None)

        assert [("who", None, None, None)] == app.seen[:1]
        assert any("ArithmeticError" in cause for cause in _diagnostics._notes)

    @pytest.mark.parametrize(
        ("endpoint", "expected"), [("http://127.0.0.1:9", 1), ("console:", 0), ("", 0)]
    )
    def test_gets_ready_for_children(self, monkeypatch, endpoint, expected):
        """What children deliver with is loaded before they are forked."""
        loaded = []
        monkeypatch.setattr(_transport, "load", lambda: loaded.append(1))
        if endpoint:
            pgtrack.configure(project_id="p", endpoint=endpoint)
        signals.worker_init.send(None)

        assert expected == len(loaded)

    def test_cannot_get_ready_for_children(self, monkeypatch):
        """Where that fails, the worker starts as ever."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        monkeypatch.setattr(integration, "_present_client", lambda: None)

        ((_, answer),) = [
            pair
            for pair in signals.worker_init.send(None)
            if pair[0] is integration._on_worker_init
        ]
        assert None is answer
        assert any("AttributeError" in cause for cause in _diagnostics._notes)

    def test_missing(self):
        """Where Celery is missing, one error says what to install."""
        script = """
        import sys
        sys.modules["celery"] = None
        try:
            import pgtrack.integrations.celery
        except ImportError as error:
            print(type(error).__name__, error)
        """
        ended = run_script(script)

        assert ended.stdout.startswith("MissingDependencyError"), ended.stderr
        assert "pip install 'pgtrack[celery]'" in ended.stdout


class TestLostProcesses:
    """What the main process of a worker hears of a process that was killed."""

    def test_told_in_the_session(self, app, events):
        """The session is that of the message, whose request is at hand."""
        task = app.tasks["who"]
        task.push_request(id="t-1", headers={"X-Session-ID": "sess_ann"})
        try:
            error = WorkerLostError("killed")
            signals.task_failure.send(task, task_id="t-1", exception=error)
            signals.task_failure.send(task, task_id="t-2", exception=error)
            signals.task_failure.send(task, task_id="t-1", exception=ValueError())
        finally:
            task.pop_request()

        assert [("WorkerLostError", "who", "sess_ann")] == [
            (e.error_type, e.error_component, e.session_id) for e in events
        ]
        assert None is _context.current_frame()


# --- real workers ----------------------------------------------------------------

SHOP = """
import os, signal, threading, time

import pgtrack
from celery import Celery, chain, chord, group
from pgtrack.integrations import celery as integration

URL = os.environ["REDIS"]
app = Celery("shop", broker=URL, backend=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_default_queue=os.environ["QUEUE"],
    task_publish_retry=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_hijack_root_logger=False,
)
pgtrack.configure(
    project_id="p",
    endpoint=os.environ["ENDPOINT"],
    batch_interval=float(os.environ["INTERVAL"]),
)
integration.install()


def tell(name):
    now = pgtrack.current()
    pgtrack.emit("custom", name=name)
    return [now.session_id, now.user_id, now.journey_id]


@app.task
def who(*results):
    return tell("who")


@app.task
def after(*results):
    tell("after")


@app.task
def outer():
    after.delay()
    return tell("outer")


@app.task
def fails():
    raise ValueError("bad")


@app.task
def on_error(request, error, trace):
    tell("on_error")


@app.task
def on_error_by_message(uuid):
    tell("on_error")


@app.task(bind=True, max_retries=2, default_retry_delay=0.05)
def retries(self):
    tell(f"attempt {self.request.retries}")
    if self.request.retries < 2:
        raise self.retry(exc=ValueError())
    return tell("done")


@app.task
def builds():
    tell("builds")
    chain(who.si(), after.si()).delay()


@app.task(time_limit=1)
def hangs():
    time.sleep(60)


@app.task
def sleeps():
    tell("sleeps")
    try:
        time.sleep(60)
    finally:
        tell("ended")


@app.task
def dies():
    os.kill(os.getpid(), signal.SIGKILL)


meeting = threading.Barrier(2)


@app.task(ignore_result=True)
def meets():
    try:
        meeting.wait(0.05)  # with another one, where there is one
    except threading.BrokenBarrierError:
        meeting.reset()
    pgtrack.emit("custom", name=str(pgtrack.current().session_id))


@app.task(ignore_result=True)
def slow():
    tell("slow began")
    time.sleep(1)
    tell("slow ended")
"""


def shop(folder: Path, redis_socket: str, url: str, queue: str, **env: str) -> Any:
    """Write the module of an application, and return its environment."""
    folder.mkdir(exist_ok=True)
    (folder / "shop.py").write_text(SHOP)
    return {
        "REDIS": f"redis+socket://{redis_socket}",
        "ENDPOINT": url,
        "QUEUE": queue,
        "INTERVAL": "60",
        "PRODUCTGRAPH_EXIT_TIMEOUT": "20",  # the machine may be busy
        **env,
    }


QUIET = ("-l", "INFO", "--without-mingle", "--without-gossip", "--without-heartbeat")


def sender(env: dict[str, str]) -> Celery:
    """Return an application that sends tasks to a worker of `shop`."""
    app = Celery(
        "sender", broker=env["REDIS"], backend=env["REDIS"], set_as_current=False
    )
    app.conf.task_default_queue = env["QUEUE"]
    return app


class Worker:
    """A prefork worker with two children, and who sends to it."""

    def __init__(self, app: Celery, server: Server, process: Background) -> None:
        self.app = app
        self.server = server
        self.process = process

    def sig(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature that takes no results of others."""
        return self.app.signature(f"shop.{name}", args=args, immutable=True, **options)

    def told(self, session: str, count: int) -> list[Any]:
        """Return what the events of a session tell, once there are so many."""

        def found() -> list[Any]:
            return [e for e in self.server.events if e["session.id"] == session]

        self.process.wait_until(lambda: len(found()) >= count, f"{count} of {session}")
        return sorted(
            (
                e.get("event.name") or f"{e['error.type']} {e['error.component']}",
                e.get("user.id"),
                e.get("gen_ai.journey.id"),
            )
            for e in found()
        )


@pytest.fixture(scope="module", name="worker")
def _worker(tmp_path_factory, redis_socket) -> Iterator[Worker]:
    with Server() as server:
        folder = tmp_path_factory.mktemp("celery")
        env = shop(folder, redis_socket, server.url, "shared", INTERVAL="0.05")
        app = sender(env)
        command = ("-m", "celery", "-A", "shop", "worker", "-c", "2", *QUIET)
        with Background(*command, folder=folder, env=env) as process:
            process.wait_for(" ready.")
            yield Worker(app, server, process)
            status = process.end()
            assert 0 == status, process.log
        app.close()


class TestWorker:
    """A prefork worker on Redis."""

    @pytest.fixture(autouse=True)
    def _no_leaked_thread(self) -> None:
        """Allow for the threads of servers that outlive a test."""

    def enter(self, name: str) -> Any:
        """Return the block of a session with a user."""
        return pgtrack.session(f"sess_{name}", user_id=f"u_{name}")

    def test_keeps_the_session_user_and_journey(self, worker):
        """A task runs in the session of who sent it, with user and journey."""
        with self.enter("a"), pgtrack.journey("j"):
            got = worker.sig("who").delay().get(timeout=20)

        assert ["sess_a", "u_a", "j"] == got
        assert [("who", "u_a", "j")] == worker.told("sess_a", 1)

    def test_leaves_nothing_behind(self, worker):
        """Messages that carry nothing have each a session of its own."""
        with self.enter("left"):
            worker.sig("who").delay()
        sessions = [worker.sig("who").delay().get(timeout=20) for _ in range(4)]

        assert all(FRESH(session) for session, *_ in sessions)
        assert 4 == len({session for session, *_ in sessions})
        assert [[None, None]] * 4 == [rest for _, *rest in sessions]

    def test_chain(self, worker):
        """Each task of a chain is in the session of who started it."""
        built = chain(worker.sig("who"), worker.sig("outer"), worker.sig("who"))
        with self.enter("built"):
            built = chain(built, worker.sig("who"))
        with self.enter("chain"):
            built.delay().get(timeout=20)

        expected = ["after", "outer", "who", "who", "who"]
        assert [(n, "u_chain", None) for n in expected] == worker.told("sess_chain", 5)

    def test_group_and_chord(self, worker):
        """All tasks of a chord, its body included, are in one session."""
        with self.enter("chord"):
            parts = group(worker.sig("who") for _ in range(5))
            chord(parts, worker.sig("outer")).delay().get(timeout=20)

        expected = ["after", "outer", *["who"] * 5]
        assert [(n, "u_chord", None) for n in expected] == worker.told("sess_chord", 7)

    def test_a_canvas_that_a_task_builds(self, worker):
        """What a task starts is in its session."""
        with self.enter("builds"):
            worker.sig("builds").delay()

        expected = ["after", "builds", "who"]
        assert [(n, "u_builds", None) for n in expected] == worker.told(
            "sess_builds", 3
        )

    def test_link(self, worker):
        """A callback is in the session of its task."""
        with self.enter("link"):
            worker.sig("who").apply_async(link=worker.sig("after"))

        expected = ["after", "who"]
        assert [(n, "u_link", None) for n in expected] == worker.told("sess_link", 2)

    @pytest.mark.parametrize("kind", ["on_error", "on_error_by_message"])
    def test_link_error(self, worker, kind):
        """An error callback is in the session of its task, inline or as a message."""
        callback = worker.app.signature(f"shop.{kind}")
        with self.enter(kind):
            worker.sig("fails").apply_async(link_error=callback)

        expected = ["ValueError shop.fails", "on_error"]
        assert [(n, f"u_{kind}", None) for n in expected] == worker.told(
            f"sess_{kind}", 2
        )

    def test_retries(self, worker):
        """All attempts are in one session, and none of them is a failure."""
        with self.enter("retries"):
            worker.sig("retries").delay().get(timeout=20)

        expected = ["attempt 0", "attempt 1", "attempt 2", "done"]
        assert [(n, "u_retries", None) for n in expected] == worker.told(
            "sess_retries", 4
        )

    def test_failure(self, worker):
        """A task that fails makes one error event in its session."""
        with self.enter("fails"), pytest.raises(ValueError, match="bad"):
            worker.sig("fails").delay().get(timeout=20)

        assert [("ValueError shop.fails", "u_fails", None)] == worker.told(
            "sess_fails", 1
        )

    def test_lost_processes(self, worker):
        """A task whose process is killed makes one error event."""
        for name in ("hangs", "dies"):
            killed = (TimeLimitExceeded, WorkerLostError)
            with self.enter(name), pytest.raises(killed):
                worker.sig(name).delay().get(timeout=20)

        expected = [("TimeLimitExceeded shop.hangs", "u_hangs", None)]
        assert expected == worker.told("sess_hangs", 1)
        expected = [("WorkerLostError shop.dies", "u_dies", None)]
        assert expected == worker.told("sess_dies", 1)

    def test_terminated(self, worker):
        """A task that is terminated tells what it could, and is no failure."""
        with self.enter("sleeps"):
            result = worker.sig("sleeps").delay()
        worker.told("sess_sleeps", 1)
        result.revoke(terminate=True)

        expected = ["ended", "sleeps"]
        assert [(n, "u_sleeps", None) for n in expected] == worker.told(
            "sess_sleeps", 2
        )
        with self.enter("next"):
            worker.sig("who").delay().get(timeout=20)

    def test_revoked(self, worker):
        """A task that was revoked before it began makes no event."""
        with self.enter("revoked"):
            result = worker.sig("who").apply_async(countdown=0.5)
            result.revoke()
            with pytest.raises(celery.exceptions.TaskRevokedError):
                result.get(timeout=20)
            worker.sig("after").delay()

        assert [("after", "u_revoked", None)] == worker.told("sess_revoked", 1)


POOLS = {
    "prefork": ("-c", "2"),
    "one task a child": ("-c", "2", "--max-tasks-per-child", "1"),
    "solo": ("-P", "solo"),
    "threads": ("-P", "threads", "-c", "8"),
    "gevent": ("-P", "gevent", "-c", "8"),
}


SENT = {"threads": 1000, "gevent": 200, "one task a child": 2}
"""How many tasks each pool gets, where it is not eight."""


class Ended(NamedTuple):
    """What is left of a worker."""

    status: int
    log: str
    sent: list[str]
    events: list[Any]


@pytest.fixture(scope="module", name="ended")
def _ended(tmp_path_factory, redis_socket) -> dict[str, Ended]:
    """
    Run one worker for each pool, all at once since they take their time.

    Each gets its tasks, and, when it has begun them all, a last one that takes longer;
    in the middle of that it is told to end.
    """
    import redis

    sessions = {
        pool: [f"s-{number}" for number in range(SENT.get(pool, 8))]
        for pool in POOLS
        if pool != "gevent" or importlib.util.find_spec("gevent")
    }
    integration.install()  # this comes before the fixture of each test
    with ExitStack() as stack:
        broker = stack.enter_context(redis.Redis(unix_socket_path=redis_socket))
        running: dict[str, Worker] = {}
        for pool in sessions:
            folder = tmp_path_factory.mktemp("pool")
            server = stack.enter_context(Server())
            env = shop(folder, redis_socket, server.url, pool)
            command = ("-m", "celery", "-A", "shop", "worker", *QUIET, *POOLS[pool])
            process = Background(*command, folder=folder, env=env)
            running[pool] = Worker(sender(env), server, stack.enter_context(process))

        def settle(what: str) -> None:
            for pool, worker in running.items():
                worker.process.wait_until(
                    lambda name=pool: not broker.llen(name) + broker.hlen("unacked"),
                    what,
                )

        for pool, worker in running.items():
            worker.process.wait_for(" ready.")
            with worker.app.producer_pool.acquire() as producer:
                for session in sessions[pool]:
                    with pgtrack.session(session):
                        worker.app.send_task("shop.meets", producer=producer)
        settle("begin of all tasks")
        for worker in running.values():
            with pgtrack.session("sess_slow"):
                worker.app.send_task("shop.slow")
        settle("begin of the last task")
        for worker in running.values():
            worker.process.ask_to_end()
        found = {
            pool: Ended(
                worker.process.end(),
                worker.process.log,
                sessions[pool],
                worker.server.events,
            )
            for pool, worker in running.items()
        }
        for worker in running.values():
            worker.app.close()
    return found


class TestDelivery:
    """What a worker of each pool holds as it ends: nothing is sent before."""

    @pytest.fixture(autouse=True)
    def _no_leaked_thread(self) -> None:
        """Allow for the threads of servers that outlive a test."""

    @pytest.mark.parametrize("pool", POOLS)
    def test_ends_with_nothing_lost_and_nothing_mixed(self, ended, pool):
        """Told to end by SIGTERM, it finishes its tasks, and their events arrive."""
        if pool not in ended:
            pytest.skip("gevent is not installed")
        status, log, sessions, events = ended[pool]

        assert 0 == status, log
        slow = [("slow began", "sess_slow"), ("slow ended", "sess_slow")]
        assert Counter([*[(name, name) for name in sessions], *slow]) == Counter(
            (event["event.name"], event["session.id"]) for event in events
        )

    def test_is_bounded(self, tmp_path, redis_socket):
        """An endpoint that hangs holds a child up for no longer than `exit_timeout`."""
        with Server() as server:
            never = threading.Event()
            server.default = hang(never)
            env = shop(
                tmp_path,
                redis_socket,
                server.url,
                "bounded",
                PRODUCTGRAPH_EXIT_TIMEOUT="0.2",
            )
            app = sender(env)
            command = ("-m", "celery", "-A", "shop", "worker", "-c", "1", *QUIET)
            with Background(*command, folder=tmp_path, env=env) as process:
                process.wait_for(" ready.")
                app.send_task("shop.who").get(timeout=20)

                assert 0 == process.end(), process.log
                assert server.wait_for_requests(1)
                never.set()
            app.close()
