"""Forks: a child sends what is its own, a parent what is its own, and neither hangs."""

from __future__ import annotations

import os
import random
import textwrap
import threading
from collections import Counter

import pytest

import pgtrack
from harness import Server, hang, in_fork, run_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Python 3.12 and later warn of forking with threads: the point of this.
_QUIET = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}

# What a script of forks starts with.  A child that hangs is killed by its alarm.
_FORKS = """
import os, random, signal, sys, threading, time
import pgtrack

url, seed = sys.argv[1:3]
random.seed(int(seed))
children = []

def fork(work):
    pid = os.fork()
    if pid:
        children.append(pid)
        return
    code = 1
    try:
        signal.alarm(30)
        code = work() or 0
    finally:
        os._exit(code)

def join():
    while children:
        status = os.waitpid(children.pop(), 0)[1]
        assert status == 0, f"a child ended with {status}"
"""


def run_forks(server: Server, body: str, seed: int = 0) -> Counter[str]:
    """Run a script that forks; return how often each name has arrived."""
    script = _FORKS + textwrap.dedent(body)
    ended = run_script(script, server.url, str(seed), env=_QUIET, timeout=90)

    assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    return arrived(server)


def arrived(server: Server) -> Counter[str]:
    """Return how often each name has arrived; identities must not repeat."""
    ids = [event["event_id"] for event in server.events]
    assert len(set(ids)) == len(ids)
    return Counter(event["event.name"] for event in server.events)


class TestAnyMoment:
    """A fork may happen at any time."""

    @pytest.mark.timeout(120)
    def test_three_hundred(self, server):
        """Of 300 forks at random moments no child hangs, and nothing is sent twice."""
        body = """
        pgtrack.configure(project_id="p", endpoint=url, batch_size=3)
        def work():
            assert pgtrack.stats() == pgtrack.Stats(), pgtrack.stats()
            for name in "ab":
                pgtrack.emit("custom", name=f"child {i} {name}")
            assert pgtrack.shutdown(20)
            assert pgtrack.stats().delivered == 2, pgtrack.stats()
        for i in range(300):
            pgtrack.emit("custom", name=f"parent {i}")
            time.sleep(random.choice([0, 0, 0.0005, 0.002, 0.01]) * random.random())
            fork(work)
            if len(children) == 8:
                join()
        join()
        assert pgtrack.shutdown(20)
        assert pgtrack.stats().delivered == 300, pgtrack.stats()
        """

        names = run_forks(server, body, seed=1)

        expected = Counter(f"parent {i}" for i in range(300))
        expected.update(f"child {i} {name}" for i in range(300) for name in "ab")
        assert expected == names

    @pytest.mark.parametrize("milliseconds", [0, 1, 5, 20, 50, 100])
    def test_first_batch(self, server, milliseconds):
        """A fork while httpx is being imported hangs neither process."""
        body = f"""
        client = pgtrack.Client(
            pgtrack.Config(project_id="p", endpoint=url, batch_size=1)
        )
        def work():
            client.emit("custom", name="child")
            assert client.close(20)
        client.emit("custom", name="parent")
        time.sleep({milliseconds} / 1000)
        fork(work)
        client.emit("custom", name="parent")
        assert client.close(20)
        join()
        """

        assert Counter(child=1, parent=2) == run_forks(server, body)

    def test_in_a_request(self, server):
        """A fork in the middle of a request leaves the request to the parent."""
        released = threading.Event()
        server.script = [hang(released)]
        client = pgtrack.configure(project_id="p", endpoint=server.url)
        client.emit("custom", name="parent")
        client.flush(0)
        assert server.wait_for_requests(1)

        def child() -> tuple[bool, int]:
            client.emit("custom", name="child")
            return client.flush(10), client.stats().delivered

        assert (True, 1) == in_fork(child)
        released.set()
        assert client.flush(10)
        assert Counter(["parent", "child"]) == arrived(server)

    def test_kept_connection(self, server):
        """A child opens a connection of its own; the parent's stays in use."""
        client = pgtrack.configure(project_id="p", endpoint=server.url)
        client.emit("custom", name="parent")
        assert client.flush(10)

        def child() -> bool:
            client.emit("custom", name="child")
            return client.close(10)

        assert in_fork(child)
        client.emit("custom", name="parent")
        assert client.flush(10)
        assert Counter(child=1, parent=2) == arrived(server)
        assert 2 == server.connections

    def test_queued(self, server):
        """What the parent has queued or is retrying is not sent by the child."""
        client = pgtrack.configure(project_id="p", endpoint=server.url)
        for _ in range(20):
            client.emit("custom", name="parent")

        def child() -> tuple[int, bool, int]:
            before = client.stats()
            client.emit("custom", name="child")
            return before.emitted, client.flush(10), client.stats().delivered

        assert (0, True, 1) == in_fork(child)
        assert Counter(child=1) == arrived(server)
        assert client.flush(10)
        assert Counter(child=1, parent=20) == arrived(server)

    def test_in_thread(self, server):
        """A thread may fork as well as the main one."""
        body = """
        pgtrack.configure(project_id="p", endpoint=url, batch_size=2)
        def work():
            pgtrack.emit("custom", name="child")
            assert pgtrack.shutdown(20)
        def forks():
            for _ in range(5):
                pgtrack.emit("custom", name="parent")
                fork(work)
        threads = [threading.Thread(target=forks) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        join()
        """

        assert Counter(child=20, parent=20) == run_forks(server, body)

    def test_generations(self, server):
        """A child of a child starts over as well, each with a session of its own."""
        body = """
        pgtrack.configure(project_id="p", endpoint=url)
        def work(depth=1):
            pgtrack.emit("custom", name=f"depth {depth}")
            if depth < 4:
                fork(lambda: work(depth + 1))
                join()
            assert pgtrack.flush(20)
            assert pgtrack.stats().delivered == 1, pgtrack.stats()
        children.clear()
        work()
        """

        names = run_forks(server, body)

        assert Counter(f"depth {n}" for n in range(1, 5)) == names
        assert 4 == len({event["session.id"] for event in server.events})

    def test_closed_in_parent(self, server):
        """A client that the parent has closed stays closed in the child."""
        client = pgtrack.Client(pgtrack.Config(project_id="p", endpoint=server.url))
        client.close()

        def child() -> tuple[bool, dict[str, int]]:
            return client.emit("custom"), dict(client.stats().dropped)

        assert (False, {"closed": 1}) == in_fork(child)

    def test_warnings_are_errors(self, server):
        """A child prints nothing, with every warning an error."""
        body = """
        import gc, warnings
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "This process.*fork", DeprecationWarning)
        pgtrack.configure(project_id="p", endpoint=url)
        pgtrack.emit("custom", name="parent")
        pgtrack.flush(20)
        def work():
            gc.collect()
            pgtrack.emit("custom", name="child")
            assert pgtrack.shutdown(20)
            gc.collect()
        fork(work)
        join()
        """

        assert Counter(child=1, parent=1) == run_forks(server, body)

    def test_exit_in_child(self, server):
        """A child that ends by `sys.exit` delivers, as any process."""
        body = """
        pgtrack.configure(project_id="p", endpoint=url)
        pgtrack.emit("custom", name="parent")
        if not os.fork():
            pgtrack.emit("custom", name="child")
            sys.exit()
        assert os.wait()[1] == 0
        """

        assert Counter(child=1, parent=1) == run_forks(server, body)

    def test_sigterm_in_child(self, server):
        """A child that is told to end delivers; its status is that of the signal."""
        body = """
        pgtrack.configure(project_id="p", endpoint=url)
        pid = os.fork()
        if not pid:
            pgtrack.emit("custom", name="child")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        """

        assert Counter(child=1) == run_forks(server, body)

    def test_sigterm_at_once(self, server):
        """A child that is told to end before it has begun does not miss it."""
        body = """
        pgtrack.configure(project_id="p", endpoint=url)
        statuses = set()
        for _ in range(100):
            pid = os.fork()
            if not pid:
                signal.alarm(10)
                while True:
                    time.sleep(0.1)
            os.kill(pid, signal.SIGTERM)
            statuses.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert statuses == {-signal.SIGTERM}, statuses
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
        """

        assert Counter() == run_forks(server, body)

    def test_local_endpoints(self, tmp_path):
        """Children write whole lines of their own to the same file and stream."""
        path = tmp_path / "events.jsonl"
        body = """
        clients = [
            pgtrack.Client(pgtrack.Config(project_id="p", endpoint=endpoint))
            for endpoint in ("console:", url)
        ]
        def emit(name):
            for _ in range(20):
                for client in clients:
                    client.emit("custom", name=name)
        def work():
            emit("child")
            for client in clients:
                assert client.flush(20)
        emit("parent")
        for _ in range(10):
            fork(work)
        join()
        """
        script = _FORKS + textwrap.dedent(body)

        ended = run_script(script, f"file:{path}", "0", env=_QUIET)

        assert (0, "") == (ended.returncode, ended.stderr)
        printed = [line.split()[3] for line in ended.stdout.splitlines()]
        assert Counter(parent=20, child=200) == Counter(printed)
        lines = path.read_text().splitlines()
        assert Counter({True: 20, False: 200}) == Counter("parent" in x for x in lines)


class TestMultiprocessing:
    """Children of `multiprocessing` leave by `os._exit`, and deliver before they do."""

    METHODS = ("fork", "spawn", "forkserver")

    @staticmethod
    def run(server: Server, folder, method: str, body: str, setup: str = "") -> Counter:
        """Run a module that starts children by *method*; return what has arrived."""
        head = f"""
        import concurrent.futures, logging, multiprocessing, os, sys, threading, time
        import pgtrack
        context = multiprocessing.get_context({method!r})
        pgtrack.configure(project_id="p", endpoint=sys.argv[1])
        {setup}
        def work(i):
            with pgtrack.session(f"session-{{i}}"):
                return pgtrack.emit("custom", name=f"child {{i}}")
        """
        main = "\nif __name__ == '__main__':\n"
        path = folder / "parent.py"
        body = textwrap.indent(textwrap.dedent(body), "    ")
        path.write_text(textwrap.dedent(head) + main + body)

        ended = run_script(path, server.url, timeout=60)

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        return arrived(server)

    @pytest.mark.parametrize("method", METHODS)
    def test_process(self, server, tmp_path, method):
        """What a `Process` emitted arrives, whichever way it was started."""
        body = """
        pgtrack.emit("custom", name="parent")
        children = [context.Process(target=work, args=(i,)) for i in range(3)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0, child.exitcode
        """

        names = self.run(server, tmp_path, method, body)

        assert Counter(["parent", "child 0", "child 1", "child 2"]) == names

    @pytest.mark.parametrize("method", METHODS)
    def test_pool(self, server, tmp_path, method):
        """What the processes of a `Pool` emitted arrives, also as it is terminated."""
        body = """
        with context.Pool(2) as pool:
            assert all(pool.map(work, range(20)))
        """

        names = self.run(server, tmp_path, method, body)

        assert Counter(f"child {i}" for i in range(20)) == names

    @pytest.mark.parametrize("method", METHODS)
    def test_executor(self, server, tmp_path, method):
        """What the processes of a `ProcessPoolExecutor` emitted arrives."""
        body = """
        with concurrent.futures.ProcessPoolExecutor(2, context) as executor:
            assert all(executor.map(work, range(20)))
        """

        names = self.run(server, tmp_path, method, body)

        assert Counter(f"child {i}" for i in range(20)) == names

    def test_imported_late(self, server, tmp_path):
        """It does not matter whether multiprocessing was imported before or after."""
        path = tmp_path / "late.py"
        path.write_text(
            textwrap.dedent("""
            import sys, pgtrack
            pgtrack.configure(project_id="p", endpoint=sys.argv[1])
            pgtrack.emit("custom", name="parent")
            assert "multiprocessing" not in sys.modules
            import multiprocessing
            context = multiprocessing.get_context("fork")
            child = context.Process(target=pgtrack.emit, args=("custom",),
                                    kwargs={"name": "child"})
            child.start()
            child.join()
            """)
        )

        ended = run_script(path, server.url)

        assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
        assert Counter(["parent", "child"]) == arrived(server)

    def test_configured_in_child(self, server, tmp_path):
        """A client that is first made in the child delivers as well."""
        body = """
        child = context.Process(target=late)
        child.start()
        child.join()
        """
        setup = """
        def late():
            config = pgtrack.Config(project_id="q", endpoint=sys.argv[1])
            pgtrack.Client(config).emit("custom", name="late")
        """

        assert Counter(["late"]) == self.run(server, tmp_path, "fork", body, setup)

    def test_emitted_in_fork_hook(self, server, tmp_path):
        """What is emitted before multiprocessing has set up the child arrives, too."""
        body = """
        os.register_at_fork(after_in_child=lambda: work("in hook"))
        child = context.Process(target=work, args=(0,))
        child.start()
        child.join()
        """

        names = self.run(server, tmp_path, "fork", body)

        assert Counter(["child in hook", "child 0"]) == names

    def test_finalizers(self, server, tmp_path):
        """What the finalizers of a child emit arrives: ours is the last."""
        body = """
        def finalize():
            work("finalizer")
        def target():
            util.Finalize(None, finalize, exitpriority=-10)
            work(0)
        child = context.Process(target=target)
        child.start()
        child.join()
        """
        setup = "from multiprocessing import util"

        names = self.run(server, tmp_path, "fork", body, setup)

        assert Counter(["child finalizer", "child 0"]) == names

    def test_terminated(self, server, tmp_path):
        """A child that is terminated delivers what it had emitted."""
        body = """
        def target():
            work(0)
            ready.set()
            time.sleep(20)
        ready = context.Event()
        child = context.Process(target=target)
        child.start()
        assert ready.wait(20)
        child.terminate()
        child.join()
        assert child.exitcode == -15, child.exitcode
        """

        assert Counter(["child 0"]) == self.run(server, tmp_path, "fork", body)

    def test_child_of_child(self, server, tmp_path):
        """A child of a child delivers, too."""
        body = """
        def target(depth):
            work(depth)
            if depth:
                child = context.Process(target=target, args=(depth - 1,))
                child.start()
                child.join()
        target(3)
        """

        names = self.run(server, tmp_path, "fork", body)

        assert Counter(f"child {i}" for i in range(4)) == names


@pytest.mark.parametrize("seed", range(3))
def test_stats_of_children_add_up(server, seed):
    """The ledgers of a parent and its children add up to what the server has."""
    rng = random.Random(seed)
    client = pgtrack.configure(project_id="p", endpoint=server.url, batch_size=4)
    total = pgtrack.Stats()

    def child(count: int) -> pgtrack.Stats:
        for _ in range(count):
            client.emit("custom", name="child")
        client.flush(10)
        return client.stats()

    for _ in range(5):
        for _ in range(rng.randrange(10)):
            client.emit("custom", name="parent")
        count = rng.randrange(10)
        total += in_fork(lambda count=count: child(count))
    assert client.flush(10)
    total += client.stats()

    assert total.is_balanced
    assert total.emitted == total.delivered == sum(arrived(server).values())
