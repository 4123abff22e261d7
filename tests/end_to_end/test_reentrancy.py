"""Emitting from where code may run at any moment: handlers, finalisers, hooks."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import pgtrack
from harness import run_script, start_together, status

if TYPE_CHECKING:
    from collections.abc import Iterator


def names_of(server) -> Counter[str]:
    """Return how often each name has arrived."""
    return Counter(event["event.name"] for event in server.events)


@pytest.fixture(name="client")
def _client(server) -> pgtrack.Client:
    """Return the default client, which sends small batches all the time."""
    return pgtrack.configure(
        project_id="p",
        endpoint=server.url,
        batch_size=10,
        max_queue_size=100_000,
        max_queue_bytes="500MB",
    )


@contextmanager
def storm(seconds: float, handler) -> Iterator[None]:
    """Call *handler* by a signal every so many seconds of wall time."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
class TestSignals:
    """A signal handler emits."""

    @pytest.mark.parametrize("every", [0.0005, 0.003])
    def test_storm(self, client, server, every):
        """Handlers interrupt emit again and again; nothing hangs, all is counted."""
        handled = []  # a number would lose what is added while it is added to
        emitted = 0

        def handler() -> None:
            taken = client.emit("custom", name="handler", metadata={"a": [1, {}]})
            handled.append(taken)

        until = time.monotonic() + 1.5
        with storm(every, handler):
            while time.monotonic() < until:
                emitted += client.emit("custom", name="main", metadata={"a": [1, {}]})

        assert client.flush(30)
        assert sum(handled) > 50
        assert Counter(main=emitted, handler=sum(handled)) == names_of(server)
        assert client.stats().is_balanced
        assert emitted + sum(handled) == client.stats().delivered

    def test_flush_in_handler(self, client, server):
        """A handler may wait for delivery while the main thread does."""
        outcomes = []

        def handler() -> None:
            client.emit("custom", name="handler")
            outcomes.append(client.flush(5))

        with storm(0.01, handler):
            for _ in range(100):
                client.emit("custom", name="main")
                outcomes.append(client.flush(5))

        assert {True} == set(outcomes)
        assert client.stats().is_balanced
        assert 100 == names_of(server)["main"]

    def test_first_event(self, server):
        """The first events may come from a handler and the main program at once."""
        script = """
        import signal, sys
        import pgtrack
        for round in range(40):
            client = pgtrack.Client(pgtrack.Config(project_id="p", endpoint="console:"))
            signal.signal(signal.SIGALRM, lambda *_: client.emit("custom", name="h"))
            signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
            for _ in range(50):
                client.emit("custom", name="m")
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert client.close(10)
            assert client.stats().is_balanced, client.stats()
            assert client.stats().delivered == client.stats().emitted, client.stats()
        """

        ended = run_script(script)

        assert (0, "") == (ended.returncode, ended.stderr)


class TestFinalisers:
    """Garbage is collected, at whatever moment."""

    def test_del(self, client, server):
        """
        Finalisers emit in the middle of emit, and in the middle of delivery.

        The collector may run in pgtrack's own thread, where emitting is off.
        """
        deleted = []

        class Node:
            def __init__(self) -> None:
                self.ring = self

            def __del__(self) -> None:
                client.emit("custom", name="del")
                deleted.append(True)

        threshold = gc.get_threshold()
        gc.set_threshold(5, 2, 2)
        try:
            for _ in range(300):
                Node()
                client.emit("custom", name="main", metadata={"a": [{}, {"b": []}]})
        finally:
            gc.set_threshold(*threshold)
        deadline = time.monotonic() + 30
        while len(deleted) < 300 and time.monotonic() < deadline:
            gc.collect()  # does nothing while it runs in another thread

        assert client.flush(30)
        stats = client.stats()
        suppressed = stats.dropped.get("suppressed", 0)
        assert suppressed < 100
        assert Counter({"main": 300, "del": 300 - suppressed}) == names_of(server)
        assert stats.is_balanced

    def test_weakref_callback(self, client, server):
        """A weak reference's callback emits."""

        class Node:
            pass

        references = []
        for _ in range(100):
            node = Node()
            references.append(
                weakref.ref(node, lambda _: client.emit("custom", name="weak"))
            )
            del node

        assert client.flush(10)
        assert Counter(weak=100) == names_of(server)

    def test_repr(self, client, server):
        """A value whose text is asked for emits, and raises."""

        class Odd:
            def __repr__(self) -> str:
                client.emit("custom", name="inner")
                raise ValueError

            __str__ = __repr__

        assert client.emit("custom", name="outer", metadata={"odd": Odd()})

        assert client.flush(10)
        names = names_of(server)
        assert 1 == names["outer"]
        assert names["inner"] >= 1
        assert client.stats().is_balanced


class Emitting(logging.Handler):
    """A log handler that makes an event of each record."""

    def __init__(self, client: pgtrack.Client) -> None:
        super().__init__()
        self.client = client
        self.loggers: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Emit the record's text."""
        self.loggers.append(record.name)
        self.client.emit("custom", name=record.getMessage()[:100])


class TestLogging:
    """Log records become events."""

    @pytest.fixture(name="root")
    def _root(self) -> Iterator[logging.Logger]:
        """Return the root logger, at the lowest level, as it was in the end."""
        root = logging.getLogger()
        level, handlers = root.level, list(root.handlers)
        root.setLevel(1)
        yield root
        root.setLevel(level)
        root.handlers[:] = handlers

    def test_of_the_host(self, client, server, root):
        """The host's own lines arrive, each once."""
        root.addHandler(Emitting(client))
        start_together(4, lambda i: logging.getLogger("host").info("line %s", i))

        assert client.flush(10)
        assert Counter(f"line {i}" for i in range(4)) == names_of(server)

    def test_of_pgtrack(self, client, server, root):
        """Lines of delivery itself make no events, and so no endless loop."""
        handler = Emitting(client)
        root.addHandler(handler)
        server.script = [status(503), status(500), None]

        client.emit("custom", name="one")
        assert client.close(30)
        stats = client.stats()

        assert "pgtrack" in handler.loggers
        assert Counter(["one"]) == names_of(server)
        assert len(handler.loggers) == stats.dropped["suppressed"]
        assert stats.is_balanced


class TestHooks:
    """The interpreter's own hooks emit."""

    def test_thread_excepthook(self, client, server, monkeypatch):
        """`threading.excepthook` tracks what ended a thread."""
        monkeypatch.setattr(
            threading, "excepthook", lambda args: client.track_error(args.exc_value)
        )

        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join(5)

        assert client.flush(10)
        assert ["ZeroDivisionError"] == [e["error.type"] for e in server.events]

    def test_excepthook(self, server):
        """`sys.excepthook` tracks what ends the process, and it arrives."""
        script = """
        import sys
        import pgtrack
        pgtrack.configure(project_id="p", endpoint=sys.argv[1])
        sys.excepthook = lambda kind, error, trace: pgtrack.track_error(error)
        1 / 0
        """

        ended = run_script(script, server.url)

        assert (1, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert ["ZeroDivisionError"] == [e["error.type"] for e in server.events]

    def test_module_teardown(self, server):
        """Finalisers that run as the interpreter is torn down do no harm."""
        script = """
        import sys
        import pgtrack
        client = pgtrack.configure(project_id="p", endpoint=sys.argv[1])
        class Late:
            def __del__(self):
                client.emit("custom", name="late")
        sys.late = Late()
        client.emit("custom", name="early")
        """

        ended = run_script(script, server.url)

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert Counter(["early"]) == names_of(server)

    def test_trace_function(self, client, server):
        """A trace function, which runs between any two lines, emits."""
        inside = False

        def trace(frame, event, arg):
            nonlocal inside
            if not inside and "pgtrack" in frame.f_code.co_filename:
                inside = True
                client.emit("custom", name="trace")
                inside = False
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(20):
                client.emit("custom", name="main", metadata={"a": 1})
        finally:
            sys.settrace(before)

        assert client.flush(30)
        names = names_of(server)
        assert 20 == names["main"]
        assert names["trace"] > 200
        assert client.stats().is_balanced
