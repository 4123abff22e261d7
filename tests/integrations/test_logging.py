"""Logging: session, request and user on each record."""

from __future__ import annotations

import asyncio
import io
import logging
import logging.config
import logging.handlers
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import pgtrack
from harness import run_script, start_together
from pgtrack.integrations.logging import ContextFilter

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT = 10
FORMAT = "%(session_id)s %(request_id)s %(user_id)s %(message)s"


class Log:
    """A logger of its own, and what it wrote."""

    def __init__(self, handler: logging.Handler, stream: io.StringIO) -> None:
        self.handler = handler
        self.stream = stream
        self.logger = logging.getLogger("tests.pgtrack")
        self.child = self.logger.getChild("child")

    @property
    def lines(self) -> list[str]:
        """What was written."""
        return self.stream.getvalue().splitlines()


@pytest.fixture(name="log")
def _log() -> Iterator[Log]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(ContextFilter())
    log = Log(handler, stream)
    log.logger.addHandler(handler)
    log.logger.setLevel(logging.INFO)
    log.logger.propagate = False
    yield log
    log.logger.removeHandler(handler)
    log.logger.propagate = True


class TestKeepsTheSession:
    """A record has the correlation of the work that logs."""

    def test_session_request_and_user(self, log) -> None:
        """All three are on the records of every logger below the handler."""
        headers = {"X-Session-ID": "s", "X-Request-ID": "r", "X-User-ID": "u"}
        with pgtrack.continued_from(headers, trusted=True):
            log.logger.info("one")
            log.child.info("two")

        assert ["s r u one", "s r u two"] == log.lines

    def test_what_is_not_known_is_a_dash(self, log) -> None:
        """Outside of a session, and where some are unset, the line reads on."""
        log.logger.info("outside")
        with pgtrack.session("s"):
            log.logger.info("inside")

        assert ["- - - outside", "s - - inside"] == log.lines

    def test_the_process_has_none(self, log) -> None:
        """The session that events have outside of any is not on records."""
        from pgtrack.testing import capture

        with capture() as events:
            pgtrack.emit("custom")
            log.logger.info("outside")

        assert events[0].session_id.startswith("proc-")
        assert ["- - - outside"] == log.lines

    def test_a_user_known_late(self, log) -> None:
        """Records from then on have the user."""
        with pgtrack.session("s"):
            log.logger.info("before")
            pgtrack.identify("u")
            log.logger.info("after")

        assert ["s - - before", "s - u after"] == log.lines

    def test_tasks_and_threads(self, log) -> None:
        """Tasks, `to_thread` and bound functions keep it, other threads have none."""

        async def main() -> None:
            with pgtrack.session("s", user_id="u"):
                await asyncio.create_task(asyncio.to_thread(log.logger.info, "task"))

        asyncio.run(asyncio.wait_for(main(), TIMEOUT))
        with ThreadPoolExecutor(1) as pool, pgtrack.session("s", user_id="u"):
            pool.submit(pgtrack.bind(log.logger.info), "bound").result(TIMEOUT)
            pool.submit(log.logger.info, "unbound").result(TIMEOUT)

        assert ["s - u task", "s - u bound", "- - - unbound"] == log.lines


class TestNeverMixes:
    """Work side by side logs under its own session."""

    def test_threads(self, log) -> None:
        """Thousands of records of threads that log at once are each their own."""
        barrier = threading.Barrier(8)

        def work(i: int) -> None:
            for j in range(300):
                with pgtrack.session(f"s{i}-{j}", user_id=f"s{i}-{j}"):
                    if j % 50 == 0:
                        barrier.wait(TIMEOUT)
                    log.logger.info("s%d-%d", i, j)

        start_together(8, work)

        assert 2_400 == len(log.lines)
        for line in log.lines:
            session, _, user, text = line.split()
            assert session == user == text

    def test_tasks(self, log) -> None:
        """So are those of tasks that take turns."""

        async def work(i: int) -> None:
            with pgtrack.session(f"s{i}"):
                await asyncio.sleep(0)
                log.logger.info("s%d", i)

        async def main() -> None:
            await asyncio.gather(*(work(i) for i in range(2_000)))

        asyncio.run(asyncio.wait_for(main(), TIMEOUT))

        assert 2_000 == len(log.lines)
        for line in log.lines:
            session, _, _, text = line.split()
            assert session == text


class TestWhenWorkFails:
    """Exceptions and cancellation leave nothing behind."""

    def test_an_exception(self, log) -> None:
        """The line on an exception has its session, the next one none."""
        try:
            with pgtrack.session("s"):
                try:
                    raise ValueError("no card")
                except ValueError as error:
                    log.logger.error("failed: %s", error)
                    raise
        except ValueError:
            log.logger.info("next")

        assert ["s - - failed: no card", "- - - next"] == log.lines

    def test_a_cancelled_task(self, log) -> None:
        """The line of a task that is cancelled has its session, the next one none."""

        async def task(started: asyncio.Event) -> None:
            with pgtrack.session("s"):
                started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    log.logger.info("cancelled")

        async def main() -> None:
            started = asyncio.Event()
            running = asyncio.create_task(task(started))
            await started.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            log.logger.info("next")

        asyncio.run(asyncio.wait_for(main(), TIMEOUT))

        assert ["s - - cancelled", "- - - next"] == log.lines


class TestTheHostNoticesNothing:
    """Records are added to, never held back or overruled."""

    def test_extra_stays(self, log) -> None:
        """A field that the program gives is not replaced, None neither."""
        with pgtrack.session("s", user_id="u"):
            log.logger.info("x", extra={"user_id": "mine", "request_id": None})

        assert ["s None mine x"] == log.lines

    def test_twice_is_as_good_as_once(self, log) -> None:
        """The first filter's word stands, wherever the second is."""
        log.logger.addFilter(own := ContextFilter(default="?"))
        try:
            log.logger.info("x")
        finally:
            log.logger.removeFilter(own)

        assert ["? ? ? x"] == log.lines

    @pytest.mark.parametrize("default", [None, "", "none"])
    def test_the_default_may_be_chosen(self, default: Any) -> None:
        """What stands for the unknown is the filter's argument."""
        record = logging.makeLogRecord({})

        assert ContextFilter(default).filter(record) is True
        assert [default] * 3 == [record.session_id, record.request_id, record.user_id]

    def test_it_works_for_a_queue(self) -> None:
        """On a QueueHandler the record has what was known where it was logged."""
        records: queue.Queue[logging.LogRecord] = queue.Queue()
        handler = logging.handlers.QueueHandler(records)
        handler.addFilter(ContextFilter())
        stream = io.StringIO()
        sink = logging.StreamHandler(stream)
        sink.setFormatter(logging.Formatter(FORMAT))
        listener = logging.handlers.QueueListener(records, sink)
        logger = logging.getLogger("tests.pgtrack.queue")
        logger.propagate = False
        logger.addHandler(handler)
        listener.start()
        try:
            with pgtrack.session("s", user_id="u"):
                logger.warning("x")
        finally:
            listener.stop()
            logger.removeHandler(handler)
            logger.propagate = True

        assert "s - u x\n" == stream.getvalue()

    def test_dict_config_can_name_it(self) -> None:
        """It is named in a dictionary, with its default."""
        done = run_script(
            f"""
            import logging.config
            import pgtrack

            logging.config.dictConfig({{
                "version": 1,
                "filters": {{
                    "pgtrack": {{
                        "()": "pgtrack.integrations.logging.ContextFilter",
                        "default": "none",
                    }},
                }},
                "formatters": {{"line": {{"format": "{FORMAT}"}}}},
                "handlers": {{
                    "err": {{
                        "class": "logging.StreamHandler",
                        "filters": ["pgtrack"],
                        "formatter": "line",
                    }},
                }},
                "root": {{"handlers": ["err"], "level": "INFO"}},
            }})
            with pgtrack.session("s"):
                logging.getLogger("anybody").info("x")
            """
        )

        assert "s none none x\n" == done.stderr

    def test_a_disabled_client_changes_nothing(self, log, monkeypatch) -> None:
        """The ids are there where pgtrack is switched off."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")
        with pgtrack.session("s"):
            log.logger.info("x")

        assert ["s - - x"] == log.lines
