"""The end of a process: what it emitted arrives, in time and without a word."""

from __future__ import annotations

import json
import os
import signal
import socket
import textwrap
import threading
import time
from collections import Counter
from datetime import datetime

import pytest

from harness import Server, hang, run_script

# Seconds that delivery at the end may take, a first import of httpx and a busy machine
# included; below the interval of batches, and below `exit_timeout`.
_SOON = 2.5


def configured(body: str) -> str:
    """Return a script that configures pgtrack for a given address and does *body*."""
    return (
        "import os, signal, sys, threading, time\n"
        "import pgtrack\n"
        "pgtrack.configure(project_id='p', endpoint=sys.argv[1])\n"
        f"{textwrap.dedent(body)}"
    )


def names_of(server: Server) -> Counter[str]:
    """Return how often each name has arrived; identities must not repeat."""
    ids = [event["event_id"] for event in server.events]
    assert len(set(ids)) == len(ids)
    return Counter(event["event.name"] for event in server.events)


def seconds_since_last(server: Server) -> float:
    """Return how long ago the last event was emitted."""
    stamp = server.events[-1]["event.timestamp"].replace("Z", "+00:00")
    return time.time() - datetime.fromisoformat(stamp).timestamp()


def unused_url() -> str:
    """Return an address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1/events"


class TestOrderly:
    """The interpreter comes to its end."""

    @pytest.mark.parametrize(
        ("count", "ending", "code"),
        [(1, "", 0), (200, "", 0), (1, "sys.exit(3)", 3), (200, "raise SystemExit", 0)],
    )
    def test_all_is_delivered(self, server, count, ending, code):
        """Whatever was emitted arrives, soon, with nothing printed, however it ends."""
        script = f"""
        for i in range({count}):
            pgtrack.emit("custom", name=f"n{{i}}")
        {ending}
        """

        ended = run_script(configured(script), server.url)
        took = seconds_since_last(server)

        assert (code, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert Counter(f"n{i}" for i in range(count)) == names_of(server)
        assert took < _SOON

    def test_warnings_are_errors(self, server):
        """Nothing is printed in development mode, with every warning an error."""
        script = configured("pgtrack.emit('custom', name='n')")

        env = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
        ended = run_script(script, server.url, env=env)

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert Counter("n") == names_of(server)

    def test_uncaught_exception(self, server):
        """After an uncaught exception all arrives; only its traceback is printed."""
        script = configured("pgtrack.emit('custom', name='n')\n1 / 0")

        ended = run_script(script, server.url)

        assert (1, "") == (ended.returncode, ended.stdout)
        assert ended.stderr.startswith("Traceback")
        assert ended.stderr.count("Traceback") == 1
        assert ended.stderr.endswith("ZeroDivisionError: division by zero\n")
        assert Counter("n") == names_of(server)

    def test_keyboard_interrupt(self, server, tmp_path):
        """After SIGINT all arrives, and the exit status is that of the signal."""
        script = tmp_path / "interrupted.py"
        body = """
        pgtrack.emit("custom", name="n")
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
        """
        script.write_text(configured(body))

        ended = run_script(script, server.url)

        assert -signal.SIGINT == ended.returncode
        assert Counter("n") == names_of(server)

    def test_client_that_is_gone(self, server):
        """What a client emitted arrives although nobody holds the client any more."""
        script = """
        import pgtrack, sys
        def work():
            config = pgtrack.Config(project_id="p", endpoint=sys.argv[1])
            pgtrack.Client(config).emit("custom", name="n")
        work()
        """

        ended = run_script(script, server.url)

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert Counter("n") == names_of(server)

    def test_many_clients(self, server):
        """The default client, those it took over from, and others deliver at exit."""
        script = configured("""
        others = [
            pgtrack.Client(pgtrack.Config(project_id=f"p{i}", endpoint=sys.argv[1]))
            for i in range(3)
        ]
        pgtrack.emit("custom", name="retired")
        pgtrack.configure(project_id="q", endpoint=sys.argv[1])
        pgtrack.emit("custom", name="default")
        for client in others:
            client.emit("custom", name="other")
        """)

        ended = run_script(script, server.url)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert Counter({"retired": 1, "default": 1, "other": 3}) == names_of(server)

    def test_threads(self, server):
        """Threads that outlive the main one are waited for, and what they emit too."""
        script = configured("""
        main = threading.main_thread()
        def work(i):
            main.join()
            pgtrack.emit("custom", name=f"n{i}")
        for i in range(5):
            threading.Thread(target=work, args=(i,)).start()
        """)

        ended = run_script(script, server.url)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert Counter(f"n{i}" for i in range(5)) == names_of(server)

    def test_atexit_handlers(self, server):
        """What exit handlers emit arrives, also if they are called after ours."""
        script = """
        import atexit, sys
        def late():
            for i in range(20):
                assert pgtrack.emit("custom", name=f"late {i}")
            assert pgtrack.stats().pending == 20, pgtrack.stats()
        atexit.register(late)
        import pgtrack
        pgtrack.configure(project_id="p", endpoint=sys.argv[1])
        atexit.register(lambda: pgtrack.emit("custom", name="early"))
        """

        ended = run_script(script, server.url)

        assert (0, "") == (ended.returncode, ended.stderr)
        late = {f"late {i}" for i in range(20)}
        assert Counter(["early", *late]) == names_of(server)
        assert 2 == len(server.requests)

    def test_closed_before_exit_handlers(self, server):
        """Exit handlers of a client that was closed are told that it is too late."""
        script = """
        import atexit, sys
        def late():
            assert not pgtrack.emit("custom"), "it was taken"
            assert pgtrack.stats().dropped == {"closed": 1}, pgtrack.stats()
            assert pgtrack.stats().is_balanced, pgtrack.stats()
        atexit.register(late)
        import pgtrack
        pgtrack.configure(project_id="p", endpoint=sys.argv[1])
        pgtrack.shutdown()
        """

        ended = run_script(script, server.url)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert Counter() == names_of(server)

    def test_explicit_shutdown(self, server):
        """A script that shuts down itself delivers once, and exit adds nothing."""
        script = configured("""
        pgtrack.emit("custom", name="n")
        assert pgtrack.shutdown()
        assert pgtrack.shutdown()
        """)

        ended = run_script(script, server.url)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert Counter("n") == names_of(server)

    def test_without_fork(self, server):
        """Where there is no fork, as on Windows, all is delivered as well."""
        script = """
        import os, signal, sys
        import asyncio, random  # they rely on what is taken away
        del os.register_at_fork, signal.pthread_sigmask
        import pgtrack
        pgtrack.configure(project_id="p", endpoint=sys.argv[1])
        pgtrack.emit("custom", name="n")
        """

        ended = run_script(script, server.url)

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert Counter("n") == names_of(server)

    def test_no_event(self, server):
        """A process that emits nothing starts no thread and connects to nobody."""
        script = configured("assert threading.active_count() == 1")

        ended = run_script(script, server.url)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert 0 == server.connections


class TestTrouble:
    """The end meets a server or a machine that does not do its part."""

    @staticmethod
    def ledger_script(**options: object) -> str:
        """Return a script that emits 30 events and reports how its end went."""
        return f"""
        import atexit, json, sys, time
        def report():
            stats = pgtrack.stats()
            json.dump(
                {{
                    "seconds": time.monotonic() - ended,
                    "dropped": dict(stats.dropped),
                    "is_balanced": stats.is_balanced,
                }},
                open(sys.argv[2], "w"),
            )
        atexit.register(report)  # before ours, so it is called after ours
        import pgtrack
        pgtrack.configure(project_id="p", endpoint=sys.argv[1], **{options!r})
        import httpx, logging
        logging.getLogger("pgtrack").addHandler(logging.NullHandler())
        for i in range(30):
            pgtrack.emit("custom", name=f"n{{i}}")
        ended = time.monotonic()
        """

    @pytest.mark.parametrize("exit_timeout", [0.5, 1.5])
    def test_server_hangs(self, server, tmp_path, exit_timeout):
        """A server that hangs is waited for no longer than `exit_timeout`."""
        server.default = hang(threading.Event())
        report = tmp_path / "report"
        script = self.ledger_script(exit_timeout=exit_timeout)

        ended = run_script(script, server.url, str(report))
        told = json.loads(report.read_text())

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert {"shutdown": 30} == told["dropped"]
        assert told["is_balanced"]
        assert exit_timeout - 0.1 < told["seconds"] < exit_timeout + 0.2

    def test_nobody_listens(self, tmp_path):
        """Where nothing listens the end is no later than `exit_timeout` either."""
        report = tmp_path / "report"
        script = self.ledger_script(exit_timeout=1)

        ended = run_script(script, unused_url(), str(report))
        told = json.loads(report.read_text())

        assert (0, "") == (ended.returncode, ended.stdout)
        assert {"shutdown": 30} == told["dropped"]
        assert told["is_balanced"]
        assert told["seconds"] < 1.2

    def test_one_server_hangs(self, server):
        """A server that hangs takes no time away from another's events."""
        with Server() as hanging:
            hanging.default = hang(threading.Event())
            script = """
            import pgtrack, sys
            clients = [
                pgtrack.Client(
                    pgtrack.Config(project_id="p", endpoint=url, exit_timeout=0.7)
                )
                for url in sys.argv[1:]
            ]
            import httpx
            for client in clients:
                client.emit("custom", name="n")
            """
            urls = [hanging.url, server.url, hanging.url]

            started = time.monotonic()
            ended = run_script(script, *urls)
            took = time.monotonic() - started

        assert 0 == ended.returncode
        assert Counter("n") == names_of(server)
        assert took < 10

    def test_no_thread_can_be_started(self, server):
        """Where no thread can be had, the ending thread delivers itself."""
        script = configured("""
        def refuse(self):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
        for i in range(120):
            pgtrack.emit("custom", name=f"n{i}")
        """)

        ended = run_script(script, server.url)

        assert (0, "") == (ended.returncode, ended.stderr)
        assert Counter(f"n{i}" for i in range(120)) == names_of(server)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
class TestSigterm:
    """The process is told to end."""

    @staticmethod
    def run(server: Server, body: str) -> tuple[int, str, Counter[str]]:
        """Run a script that gets SIGTERM; return its status, output and events."""
        script = (
            "import logging, os, signal, sys, time\n"
            "import pgtrack\n"
            "logging.getLogger('pgtrack').addHandler(logging.NullHandler())\n"
            "def configure(**options):\n"
            "    url = sys.argv[1]\n"
            "    return pgtrack.configure(project_id='p', endpoint=url, **options)\n"
            "def terminate():\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
        )
        ended = run_script(script + textwrap.dedent(body), server.url)
        return ended.returncode, ended.stdout + ended.stderr, names_of(server)

    def test_default_action(self, server):
        """SIGTERM with the default action delivers, and kills as it always did."""
        body = """
        configure()
        pgtrack.emit("custom", name="n")
        terminate()
        print("still here")
        """

        assert (-signal.SIGTERM, "", Counter("n")) == self.run(server, body)

    @pytest.mark.parametrize("ending", ["SIGTERM", "a child of multiprocessing"])
    def test_what_is_lost_is_told(self, ending):
        """What an endpoint that is down costs is told, however the end comes."""
        script = f"""
        import multiprocessing, os, signal
        import pgtrack
        def end():
            pgtrack.emit("custom")
            if {ending == "SIGTERM"}:
                os.kill(os.getpid(), signal.SIGTERM)
        pgtrack.configure(
            project_id="p", endpoint="http://127.0.0.1:9/", exit_timeout=0.3
        )
        if {ending == "SIGTERM"}:
            end()
        else:
            child = multiprocessing.get_context("fork").Process(target=end)
            child.start()
            child.join(20)
        """

        ended = run_script(script)

        assert (0 if "child" in ending else -signal.SIGTERM) == ended.returncode
        assert ended.stderr.count("pgtrack dropped 1 events") == 1

    def test_server_hangs(self, server):
        """A server that hangs delays the host's action by `exit_timeout` at most."""
        server.default = hang(threading.Event())
        body = """
        def handler(number, frame):
            print(time.monotonic() - started, flush=True)
            os._exit(0)
        signal.signal(signal.SIGTERM, handler)
        configure(exit_timeout=0.5)
        import httpx
        pgtrack.emit("custom", name="n")
        started = time.monotonic()
        terminate()
        """

        code, output, _ = self.run(server, body)

        assert 0 == code
        assert 0.4 < float(output) < 0.7

    def test_in_blocking_call(self, server):
        """The signal ends a process that waits in a system call."""
        body = """
        configure()
        pgtrack.emit("custom", name="n")
        import threading
        threading.Timer(0.1, terminate).start()
        threading.Event().wait(20)
        """

        assert (-signal.SIGTERM, "", Counter("n")) == self.run(server, body)

    def test_handler_before_ours(self, server):
        """A handler that was there first is called when the events are delivered."""
        body = """
        def handler(number, frame):
            print(number, pgtrack.stats().pending, type(frame).__name__, flush=True)
            os._exit(7)
        signal.signal(signal.SIGTERM, handler)
        configure()
        pgtrack.emit("custom", name="n")
        terminate()
        """

        assert (7, "15 0 frame\n", Counter("n")) == self.run(server, body)

    def test_handler_before_ours_goes_on(self, server):
        """A handler that was there first may let the process go on emitting."""
        body = """
        seen = []
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        configure()
        pgtrack.emit("custom", name="a")
        terminate()
        pgtrack.emit("custom", name="b")
        terminate()
        print(seen)
        """

        assert (0, "[15, 15]\n", Counter("ab")) == self.run(server, body)

    def test_handler_before_ours_exits(self, server):
        """A handler that was there first may end the process in order."""
        body = """
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(5))
        configure()
        pgtrack.emit("custom", name="a")
        terminate()
        """

        assert (5, "", Counter("a")) == self.run(server, body)

    def test_handler_after_ours_exits(self, server):
        """A handler that replaces ours and ends in order loses nothing."""
        body = """
        configure()
        def handler(number, frame):
            pgtrack.emit("custom", name="b")
            sys.exit(5)
        signal.signal(signal.SIGTERM, handler)
        pgtrack.emit("custom", name="a")
        terminate()
        """

        assert (5, "", Counter("ab")) == self.run(server, body)

    def test_handler_after_ours_calls_ours(self, server):
        """A handler that calls ours has the events delivered, and goes on to decide."""
        body = """
        configure()
        def handler(number, frame):
            ours(number, frame)
            print(pgtrack.stats().pending, flush=True)
            os._exit(5)
        ours = signal.signal(signal.SIGTERM, handler)
        pgtrack.emit("custom", name="a")
        terminate()
        """

        assert (5, "0\n", Counter("a")) == self.run(server, body)

    def test_handlers_around_ours(self, server):
        """Handlers before and after ours are each called once."""
        body = """
        signal.signal(signal.SIGTERM, lambda number, frame: print("first"))
        configure()
        def last(number, frame):
            print("last")
            ours(number, frame)
        ours = signal.signal(signal.SIGTERM, last)
        configure(batch_size=7)
        terminate()
        """

        assert (0, "last\nfirst\n", Counter()) == self.run(server, body)

    def test_ignored_signal(self, server):
        """A signal that the host ignores stays ignored."""
        body = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        configure()
        pgtrack.emit("custom", name="n")
        terminate()
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
        """

        assert (0, "True\n", Counter("n")) == self.run(server, body)

    def test_switched_off(self, server):
        """With `handle_sigterm=False` the signal is none of ours."""
        body = """
        configure(handle_sigterm=False)
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
        """

        assert (0, "True\n", Counter()) == self.run(server, body)

    def test_configured_in_another_thread(self, server):
        """Outside of the main thread, where no handler can be set, all else works."""
        body = """
        import threading
        thread = threading.Thread(target=configure)
        thread.start()
        thread.join()
        pgtrack.emit("custom", name="n")
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
        """

        assert (0, "True\n", Counter("n")) == self.run(server, body)

    def test_while_exiting(self, server):
        """The signal is obeyed while the end of the process is under way, too."""
        hanging = threading.Event()
        server.default = hang(hanging)
        body = """
        configure(exit_timeout=2)
        pgtrack.emit("custom", name="n")
        import atexit, httpx, threading
        is_exiting = threading.Event()
        def soon():
            is_exiting.wait(10)
            time.sleep(0.1)
            terminate()
        threading.Thread(target=soon, daemon=True).start()
        atexit.register(is_exiting.set)
        """

        assert (-signal.SIGTERM, "", Counter()) == self.run(server, body)
