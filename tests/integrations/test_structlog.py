"""structlog: session, request and user in each event dictionary."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("structlog")

import structlog

import pgtrack
from harness import run_script, start_together
from pgtrack.integrations.structlog import add_context

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = 10


class Log:
    """A logger of structlog's with the processor, and what it wrote."""

    def __init__(self, *before: Callable[..., Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self.logger = structlog.wrap_logger(
            None, processors=[*before, add_context, self._keep]
        )

    def _keep(self, logger: Any, name: str, event_dict: dict[str, Any]) -> None:
        self.lines.append(event_dict)
        raise structlog.DropEvent


@pytest.fixture(name="log")
def _log() -> Log:
    return Log()


class TestKeepsTheSession:
    """An event dictionary has the correlation of the work that logs."""

    def test_session_request_and_user(self, log) -> None:
        """All three are in it, beside what was there."""
        headers = {"X-Session-ID": "s", "X-Request-ID": "r", "X-User-ID": "u"}
        with pgtrack.continued_from(headers, trusted=True):
            log.logger.info("paid", amount=3)

        ids = {"session_id": "s", "request_id": "r", "user_id": "u"}
        assert [{"event": "paid", "amount": 3, **ids}] == log.lines

    def test_what_is_not_known_is_left_out(self, log) -> None:
        """There is no key without a value."""
        log.logger.info("outside")
        with pgtrack.session("s"):
            log.logger.info("inside")

        assert [
            {"event": "outside"},
            {"event": "inside", "session_id": "s"},
        ] == log.lines

    def test_tasks_threads_and_async_methods(self, log) -> None:
        """Tasks, their threads and `ainfo` keep it; unbound threads have none."""

        async def main() -> None:
            with pgtrack.session("s", user_id="u"):
                await asyncio.to_thread(log.logger.info, "thread")
                await log.async_logger.ainfo("ainfo")

        log.async_logger = structlog.wrap_logger(
            None,
            processors=[add_context, log._keep],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        )
        asyncio.run(asyncio.wait_for(main(), TIMEOUT))
        with ThreadPoolExecutor(1) as pool, pgtrack.session("s", user_id="u"):
            pool.submit(pgtrack.bind(log.logger.info), "bound").result(TIMEOUT)
            pool.submit(log.logger.info, "unbound").result(TIMEOUT)

        ids = {"session_id": "s", "user_id": "u"}
        assert [
            {"event": "thread", **ids},
            {"event": "ainfo", **ids},
            {"event": "bound", **ids},
            {"event": "unbound"},
        ] == log.lines


class TestNeverMixes:
    """Work side by side logs under its own session."""

    def test_threads(self, log) -> None:
        """Thousands of lines of threads that log at once are each their own."""
        barrier = threading.Barrier(8)

        def work(i: int) -> None:
            for j in range(300):
                with pgtrack.session(f"s{i}-{j}", user_id=f"s{i}-{j}"):
                    if j % 50 == 0:
                        barrier.wait(TIMEOUT)
                    log.logger.info("x", name=f"s{i}-{j}")

        start_together(8, work)

        assert 2_400 == len(log.lines)
        for line in log.lines:
            assert line["name"] == line["session_id"] == line["user_id"]


class TestWhenWorkFails:
    """Exceptions leave nothing behind."""

    def test_an_exception(self, log) -> None:
        """The line on an exception has its session, the next one none."""
        try:
            with pgtrack.session("s"):
                try:
                    raise ValueError("no card")
                except ValueError:
                    log.logger.exception("failed")
                    raise
        except ValueError:
            log.logger.info("next")

        first, second = log.lines
        assert ("failed", "s") == (first["event"], first["session_id"])
        assert {"event": "next"} == second

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

        assert [
            {"event": "cancelled", "session_id": "s"},
            {"event": "next"},
        ] == log.lines


class TestTheHostNoticesNothing:
    """What is given stays."""

    def test_given_keys_stay(self) -> None:
        """What the call, the logger or `contextvars` of structlog bound wins."""
        log = Log(structlog.contextvars.merge_contextvars)
        bound = structlog.contextvars.bound_contextvars(session_id="bound")
        with pgtrack.session("s", user_id="u"), bound:
            log.logger.bind(request_id="mine").info("x", user_id=None)

        assert [
            {"event": "x", "session_id": "bound", "request_id": "mine", "user_id": None}
        ] == log.lines

    def test_it_serves_loggers_of_the_standard_library(self, capsys) -> None:
        """In ProcessorFormatter's chain for foreign records it adds the same."""
        handler = logging.StreamHandler()
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[add_context],
                processor=structlog.processors.JSONRenderer(sort_keys=True),
            )
        )
        logger = logging.getLogger("tests.pgtrack.structlog")
        logger.propagate = False
        logger.addHandler(handler)
        try:
            with pgtrack.session("s"):
                logger.warning("x")
        finally:
            logger.removeHandler(handler)
            logger.propagate = True

        assert '"session_id": "s"' in capsys.readouterr().err

    def test_a_missing_package_is_named(self) -> None:
        """One error names the package and the extra."""
        done = run_script(
            """
            import sys
            sys.modules["structlog"] = None
            try:
                import pgtrack.integrations.structlog
            except ImportError as error:
                print(type(error).__name__, error)
            """
        )

        assert done.stdout.startswith("MissingDependencyError")
        assert "pip install 'pgtrack[structlog]'" in done.stdout
