"""What happens to workers when a process forks, ends, or is told to."""

from __future__ import annotations

import contextvars
import gc
import importlib
import os
import signal
import sys
import threading
import time
import types
import weakref
from multiprocessing import process, util
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

import pgtrack
from harness import in_fork, start_together
from pgtrack import _diagnostics, _process, _transport, testing
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


RETRY = Answer(verdict=Verdict.RETRY, reason="503")


def config_of(**options: object) -> pgtrack.Config:
    """Return settings that change nothing in this process."""
    options = {"handle_sigterm": False, "exit_timeout": 0.3, **options}
    return pgtrack.Config.isolated(project_id="p", endpoint="console:", **options)


class FakeWorker:
    """Notes what is asked of it; `flush` and `close` take as long as they may."""

    def __init__(
        self, *, is_slow: bool = False, error: Exception | None = None
    ) -> None:
        self.is_slow = is_slow
        self.error = error
        self.calls: list[tuple[str, float]] = []
        self.starts = 0
        self.is_hurried = False
        self.delivered = 0
        self.is_back = False
        self.is_closed = False
        self.rests = 0
        self.late: list[object] = []
        self.is_busy = False
        self.deferred: list[Callable[[], object]] = []

    def _call(self, verb: str, timeout: float) -> bool:
        self.calls.append((verb, timeout))
        if self.is_back and timeout:
            self.delivered += 1
            return True
        if self.is_slow:
            time.sleep(timeout)
        if self.error is not None:
            raise self.error
        return not self.is_slow

    def flush(self, timeout: float, *, may_rest: bool = False) -> bool:
        """Note it."""
        del may_rest
        return self._call("flush", timeout)

    def rest(self) -> None:
        """Count it."""
        self.rests += 1

    def close(self, timeout: float) -> bool:
        """Note it."""
        self.is_closed = True
        return self._call("close", timeout)

    def linger(self, late: object) -> None:
        """Note it."""
        self.is_closed = False
        self.late.append(late)

    def hurry(self) -> None:
        """Note it."""
        self.is_hurried = True

    def defer(self, act: Callable[[], object]) -> bool:
        """Keep it, if this thread is at something; else it is not deferred."""
        if self.is_busy:
            self.deferred.append(act)
        return self.is_busy

    def start_over(self) -> None:
        """Count it."""
        self.starts += 1
        if self.error is not None:
            raise self.error


@pytest.fixture(name="adopt")
def _adopt(monkeypatch) -> Callable[..., FakeWorker]:
    """Return a function that makes and adopts a fake worker, among no others."""
    monkeypatch.setattr(_process, "_adopted", {})

    def adopt(
        *, exit_timeout: float = 0.3, spool_dir: object = None, **options: object
    ) -> FakeWorker:
        worker = FakeWorker(**options)
        config = config_of(exit_timeout=exit_timeout, spool_dir=spool_dir)
        _process.adopt(worker, config)
        return worker

    return adopt


class TestAdoption:
    """Workers are known as long as they are there."""

    def test_is_not_held(self, adopt):
        """A worker that nobody needs is not kept."""
        worker = adopt()
        gone = weakref.ref(worker)
        assert [worker] == [known for known, _ in _process._workers()]

        del worker
        gc.collect()

        assert gone() is None
        assert {} == _process._adopted

    def test_from_threads(self, adopt):
        """Workers come and go in any thread while others look at them."""

        def come_and_go(_: int) -> None:
            for _ in range(300):
                adopt()
                _process._workers()

        start_together(8, come_and_go)
        gc.collect()

        assert [] == _process._workers()


class TestEnd:
    """All workers deliver, within their time."""

    def test_order(self, adopt):
        """All are set to work before any is waited for; then each has its own time."""
        workers = [adopt(exit_timeout=5), adopt(exit_timeout=7)]

        _process._finish()

        (first, close), (_, second) = workers[0].calls, workers[1].calls
        assert ("flush", 0.0) == first
        assert ["close", "close"] == [close[0], second[0]]
        assert 4.5 < close[1] <= 5
        assert 6.5 < second[1] <= 7

    def test_all_within_the_longest(self, adopt):
        """What one takes is gone for the others: the end does not take the sum."""
        workers = [adopt(is_slow=True, exit_timeout=0.2) for _ in range(3)]

        started = time.monotonic()
        _process.deliver()
        took = time.monotonic() - started

        assert 0.2 <= took < 0.3
        assert [0.0, 0.0] == [worker.calls[1][1] for worker in workers[1:]]

    def test_error(self, adopt, monkeypatch):
        """An error of one costs the others nothing."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        workers = [adopt(error=ValueError()), adopt(), adopt(error=OSError())]

        _process._finish()

        verbs = [[verb for verb, _ in worker.calls] for worker in workers]
        assert [["flush", "close"]] * 3 == verbs

    def test_what_was_waited_in_vain(self, adopt):
        """A process that ends in several ways waits for a dead endpoint only once."""
        worker = adopt(is_slow=True, exit_timeout=0.5)

        started = time.monotonic()
        ends = [_process.deliver(), _process.deliver()]
        _process._finish()
        took = time.monotonic() - started

        assert [False, False] == ends
        assert ("close", 0.0) == worker.calls[-1]
        assert 0.5 <= took < 0.5 + 2 * _process._LEAST + 0.1

    def test_what_was_waited_for_is_back(self, adopt):
        """Once the endpoint takes events again, there is all the time as before."""
        worker = adopt(is_slow=True, exit_timeout=0.5)
        assert not _process.deliver()
        worker.is_back = True
        worker.calls.clear()

        assert _process.deliver()
        waits = [round(timeout, 1) for _, timeout in worker.calls]
        assert [0.0, _process._LEAST, 0.5] == waits
        assert _process.deliver()

    @pytest.mark.parametrize("is_slow", [False, True])
    def test_what_is_left_rests(self, adopt, is_slow):
        """What was not delivered is brought to disk: who is next may end at once."""
        worker = adopt(is_slow=is_slow)

        _process.deliver()

        assert is_slow == worker.rests

    @pytest.mark.parametrize(
        ("exit_timeout", "spent", "left"),
        [(3, 0, 3), (3, 1, 2), (3, 2.9, 0.2), (3, 9, 0.2), (0.1, 1, 0.1), (0, 0, 0)],
    )
    def test_what_is_left_of_the_time(self, exit_timeout, spent, left):
        """What follows on an end gets the rest of its time, and a little at least."""
        config = config_of(exit_timeout=exit_timeout)

        assert pytest.approx(left) == _process._left(config, spent)

    def test_nobody(self, adopt):
        """Without workers the end takes no time."""
        _process._finish()
        _process.deliver()


class TestExit:
    """The exit handler, and the moment at which `atexit` lets go of it."""

    @pytest.fixture(name="exit_")
    def _exit(self, adopt) -> Iterator[_process._Exit]:
        """Return an exit handler of which only the test knows."""
        handler = _process._Exit()
        yield handler
        handler._spent = None

    def test_handler(self, adopt, exit_):
        """It finishes; what is emitted then is kept, and finished in its turn."""
        worker = adopt()
        worker.delivered = 1

        exit_()
        during = worker.calls.copy()
        exit_.__del__()

        assert ["flush", "close"] == [verb for verb, _ in during]
        assert ["flush", "close"] * 2 == [verb for verb, _ in worker.calls]
        keep, late = worker.late
        assert _process._keep is keep
        assert isinstance(late, _process._Late)

    def test_without_a_call(self, adopt, exit_):
        """Let go of before the end, as in a child, it does nothing."""
        worker = adopt()

        exit_.__del__()

        assert [] == worker.calls

    def test_closed_before(self, adopt, exit_):
        """Who was closed before takes no more."""
        worker = adopt()
        worker.is_closed = True

        exit_()

        assert [] == worker.late

    @pytest.mark.parametrize("has_spool", [False, True])
    def test_in_vain(self, adopt, exit_, tmp_path, has_spool):
        """Whose endpoint is down takes no more, unless there is a spool."""
        spool_dir = tmp_path if has_spool else None
        worker = adopt(is_slow=True, exit_timeout=0.1, spool_dir=spool_dir)

        exit_()

        assert has_spool == len(worker.late)

    @pytest.mark.parametrize("has_spool", [False, True])
    def test_never_used(self, adopt, exit_, tmp_path, has_spool):
        """Who never delivered takes no more when nothing can be imported any more."""
        worker = adopt(spool_dir=tmp_path if has_spool else None)

        exit_()
        exit_.__del__()

        assert 1 + has_spool == len(worker.late)

    @pytest.mark.parametrize("patched", ["threading", "socket"])
    def test_gevent(self, adopt, exit_, monkeypatch, patched):
        """Where threads are greenlets nobody takes more: their loop may be gone."""
        worker = adopt()
        worker.delivered = 1
        monkey = types.SimpleNamespace(is_module_patched=patched.__eq__)
        monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)

        exit_()
        exit_.__del__()

        assert (1 if patched == "threading" else 2) == len(worker.late)

    def test_time(self, adopt, exit_):
        """Both moments share one `exit_timeout`, but for a little."""
        worker = adopt(exit_timeout=5)

        exit_()
        exit_._spent = 4.0
        exit_.__del__()

        (_, first), (_, second) = (call for call in worker.calls if call[0] == "close")
        assert 4.5 < first <= 5
        assert 0.5 < second <= 1

    def test_child(self, adopt):
        """A child of multiprocessing finishes, and delivers what comes late at once."""
        worker = adopt()

        _process._end_child()

        assert "close" == worker.calls[-1][0]
        (late,) = worker.late
        assert isinstance(late, _process._Late)


class TestLate:
    """Events that come when nobody comes after them."""

    @pytest.fixture(name="transport")
    def _transport(self) -> testing.RecordingTransport:
        """Return a transport that takes everything, until told otherwise."""
        return testing.RecordingTransport()

    @pytest.fixture(name="make")
    def _make(self, transport) -> Iterator[Callable[..., pgtrack.Client]]:
        """Return a function that makes a client which has come to its end."""
        clients: list[pgtrack.Client] = []

        def make(*, spent: float = 0.0, **options: object) -> pgtrack.Client:
            modules = options.pop("modules", None)
            config = config_of(exit_timeout=0.4, **options)
            client = pgtrack.Client(config, transport=lambda: transport)
            clients.append(client)
            worker = client._sink
            client.close(5)
            worker.linger(_process._Late(worker, config, spent, modules))
            return client

        yield make
        for client in clients:
            client.close(0)

    def test_on_this_thread(self, make, transport):
        """Each is delivered before `emit` returns, and no thread is started."""
        client = make()
        threads = threading.enumerate()

        taken = [client.emit("custom", name=name) for name in "ab"]

        assert [True, True] == taken
        assert ["a", "b"] == [event.name for event in transport.taken]
        assert threads == threading.enumerate()
        assert client.stats().is_balanced

    def test_kept(self, transport):
        """What is kept is sent in one request, without a thread."""
        client = pgtrack.Client(config_of(), transport=lambda: transport)
        client.close(5)
        client._sink.linger(_process._keep)
        threads = threading.enumerate()

        for name in "abc":
            assert client.emit("custom", name=name)

        assert threads == threading.enumerate()
        assert 3 == client.stats().pending
        assert client.close(5)
        assert [3] == [len(batch) for batch in transport.batches]

    def test_endpoint_is_down(self, make, transport):
        """An endpoint that is down costs what is left of the time, once."""
        transport._answers.extend([RETRY] * 50)
        client = make()

        started = time.monotonic()
        taken = [client.emit("custom") for _ in range(5)]
        took = time.monotonic() - started

        assert [True, False, False, False, False] == taken
        assert {"shutdown": 1, "closed": 4} == client.stats().dropped
        assert took < 0.4 + 0.2

    def test_time_is_up(self, make, transport):
        """An endpoint that is slow is waited for no longer than is left in all."""
        client = make(modules={})
        late = client._sink._late

        def take_all_the_time(_: object) -> Answer:
            late._left = 0.0
            return Answer(verdict=Verdict.TAKEN)

        transport._answers.append(take_all_the_time)
        taken = [client.emit("custom") for _ in range(3)]

        assert [True, False, False] == taken
        assert 1 == len(transport.taken)

    def test_time_of_threads(self, make):
        """Where threads of the host go on, only time that was in vain counts."""
        client = make()
        late = client._sink._late
        before = late._left

        assert client.emit("custom")

        assert before == late._left

    @pytest.mark.skipif(os.name != "posix", reason="a spool needs POSIX locks")
    def test_spool(self, make, transport, tmp_path):
        """With a spool, what the endpoint does not take is on disk, event by event."""
        transport._answers.extend([RETRY] * 50)
        client = make(spool_dir=tmp_path)
        client._sink._late._left = 0.0

        taken = [client.emit("custom") for _ in range(5)]

        assert [True] * 5 == taken
        assert (5, {}) == (client.stats().spooled, client.stats().dropped)

    def test_daemon(self, make, transport):
        """A daemon does not begin what the end of the interpreter would cut short."""
        client = make(modules={})

        start_together(1, lambda _: client.emit("custom", name="daemon"))
        before = len(transport.taken)
        client.emit("custom", name="main")

        assert 0 == before
        assert ["daemon", "main"] == [event.name for event in transport.taken]

    def test_many_threads(self, make, transport):
        """Threads that emit at once lose nothing, and nothing comes twice."""
        client = make()

        start_together(
            4, lambda i: [client.emit("custom", name=f"{i} {k}") for k in range(50)]
        )

        names = {event.name for event in transport.taken}
        assert {f"{i} {k}" for i in range(4) for k in range(50)} == names
        assert (200, 0) == (len(transport.taken), client.stats().pending)

    def test_within_itself(self, make, transport):
        """An event that is emitted while another is delivered follows it."""
        inner = ["inner"]

        def emit_once(event: pgtrack.Event) -> pgtrack.Event:
            if inner:  # as a finaliser does, which is not suppressed
                contextvars.Context().run(client.emit, "custom", name=inner.pop())
            return event

        client = make(before_send=emit_once)
        client.emit("custom", name="outer")

        assert ["outer", "inner"] == [event.name for event in transport.taken]

    def test_too_late(self, make, monkeypatch):
        """When names are missing, as at the very end, nothing is raised."""
        client = make()
        monkeypatch.setattr(_process, "SYSTEM_CLOCK", None)

        assert client.emit("custom")

    def test_importable(self, monkeypatch):
        """Modules that the interpreter took away can be imported meanwhile."""
        mine = {name: ModuleType(name) for name in ("gone", "emptied", "there")}
        monkeypatch.delitem(sys.modules, "gone", raising=False)
        monkeypatch.setitem(sys.modules, "emptied", None)
        monkeypatch.setitem(sys.modules, "there", mine["there"])

        with _process._importable(mine):
            found = [importlib.import_module(name) for name in mine]

        assert list(mine.values()) == found
        assert "gone" not in sys.modules
        assert sys.modules["emptied"] is None
        assert sys.modules["there"] is mine["there"]

    def test_needed_modules(self):
        """The host's modules are left to the interpreter."""
        needed = _process._needed_modules()

        assert {"pgtrack", "pgtrack._worker", "threading"} <= needed.keys()
        assert not {"pytest", "__main__"} & needed.keys()


class TestStatus:
    """The exit status is what it would have been."""

    @pytest.fixture(name="raised")
    def _raised(self, monkeypatch) -> list[str]:
        """Return a list of the texts that were executed."""
        texts: list[str] = []
        monkeypatch.setattr(_process, "exec", texts.append, raising=False)
        return texts

    def test_interrupted(self, raised, monkeypatch):
        """An uncaught KeyboardInterrupt is raised once more, where nobody sees it."""
        monkeypatch.setattr(sys, "last_type", KeyboardInterrupt, raising=False)
        _process._keep_status()
        monkeypatch.undo()

        assert ["raise KeyboardInterrupt"] == raised

    def test_nobody_sees_it(self, monkeypatch):
        """It does not leave the function."""
        monkeypatch.setattr(sys, "last_type", KeyboardInterrupt, raising=False)
        _process._keep_status()

    @pytest.mark.parametrize("last", [None, ValueError])
    def test_other_ends(self, raised, monkeypatch, last):
        """Nothing is raised at any other end."""
        monkeypatch.setattr(sys, "last_type", last, raising=False)
        _process._keep_status()

        assert [] == raised

    def test_interactive(self, raised, monkeypatch):
        """At a prompt an interrupt ended a line, not the process."""
        monkeypatch.setattr(sys, "last_type", KeyboardInterrupt, raising=False)
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        _process._keep_status()

        assert [] == raised


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestFork:
    """The hooks of a fork."""

    def test_child_starts_over(self, adopt):
        """In the child every worker starts over, in the parent none."""
        workers = [adopt(), adopt()]

        assert [1, 1] == in_fork(lambda: [worker.starts for worker in workers])
        assert [0, 0] == [worker.starts for worker in workers]

    def test_error_in_child(self, adopt, monkeypatch):
        """A worker that fails to start over costs the others nothing."""
        monkeypatch.setattr(_diagnostics, "reraise", False)
        adopt(error=ValueError())
        worker = adopt()

        assert 1 == in_fork(lambda: worker.starts)

    def test_waits_for_imports(self):
        """A fork waits until no import is under way; afterwards all may import."""
        is_importing, go_on = threading.Event(), threading.Event()

        def imports() -> None:
            with _transport.importing():
                is_importing.set()
                go_on.wait(5)

        thread = threading.Thread(target=imports)
        thread.start()
        assert is_importing.wait(5)
        threading.Timer(0.2, go_on.set).start()

        started = time.monotonic()
        assert in_fork(lambda: _transport.hold_imports(0))
        assert time.monotonic() - started > 0.15
        thread.join(5)
        assert _transport.hold_imports(0)
        _transport.allow_imports()

    def test_does_not_wait_for_ever(self, monkeypatch):
        """A fork goes ahead when an import takes too long, and does not end it."""
        monkeypatch.setattr(_process, "_IMPORT_WAIT", 0.05)
        is_importing, go_on = threading.Event(), threading.Event()

        def imports() -> None:
            with _transport.importing():
                is_importing.set()
                go_on.wait(5)

        thread = threading.Thread(target=imports)
        thread.start()
        assert is_importing.wait(5)

        assert in_fork(lambda: _transport.hold_imports(0))
        assert not _transport.hold_imports(0)
        go_on.set()
        thread.join(5)

    def test_fork_while_importing(self):
        """An import may itself fork; then nobody is waited for."""
        with _transport.importing():
            assert in_fork(lambda: _transport.hold_imports(0))

    @pytest.mark.parametrize(
        ("previous", "is_held"), [(None, False), (signal.SIG_DFL, True), (print, False)]
    )
    def test_holds_the_signal(self, monkeypatch, previous, is_held):
        """SIGTERM waits for the child to begin, where its default action is ours."""
        monkeypatch.setattr(_process, "_previous", previous)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            _process._before_fork()
            during = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            _process._after_fork_in_parent()
            after = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

        assert is_held == (signal.SIGTERM in during)
        assert {*before, signal.SIGUSR2} == after

    def test_without_multiprocessing(self, monkeypatch):
        """Nothing is done for children of a module that is not there, or not yet."""
        monkeypatch.setattr(_process, "_is_minding_children", False)
        monkeypatch.delitem(sys.modules, "multiprocessing.util")
        _process._mind_children()

        assert not _process._is_minding_children

    def test_child_of_multiprocessing(self, monkeypatch):
        """Made first in a child of multiprocessing, we deliver before it leaves."""
        monkeypatch.setattr(_process, "_is_minding_children", False)
        monkeypatch.setattr(process, "_parent_process", object())
        monkeypatch.setattr(util, "_finalizer_registry", {})
        monkeypatch.setattr(util, "_afterfork_registry", weakref.WeakValueDictionary())
        _process._mind_children()

        assert 1 == len(util._finalizer_registry)
        assert 1 == len(util._afterfork_registry)


class TestSigterm:
    """Our handler among others."""

    @pytest.fixture(autouse=True)
    def _as_it_was(self, monkeypatch) -> Iterator[None]:
        monkeypatch.setattr(_process, "_previous", None)
        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGTERM, before)

    @pytest.fixture(name="worker")
    def _worker(self, adopt) -> FakeWorker:
        return adopt()

    @staticmethod
    def install(thread: threading.Thread | None = None) -> bool:
        """Have our handler installed; return whether it is."""
        _process._handle_sigterm()
        return signal.getsignal(signal.SIGTERM) is _process._on_sigterm

    def test_over_default(self):
        """It takes the place of the default action."""
        assert self.install()

    def test_not_over_ignored(self):
        """It leaves an ignored signal ignored."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

        assert not self.install()

    def test_not_in_another_thread(self):
        """It is not installed from another thread, where Python refuses it."""
        assert [False] == start_together(1, lambda _: self.install())

    def test_not_in_a_subinterpreter(self, monkeypatch):
        """It is not installed where Python refuses it for another reason."""

        def refuse(number: int, handler: object) -> None:
            raise ValueError

        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", refuse)
            installed = self.install()

        assert not installed
        assert _process._previous is None

    def test_again_over_default(self):
        """It is installed again where the host restored the default action."""
        assert self.install()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

        assert self.install()

    def test_not_again_over_handler(self):
        """It is not installed again over a handler, which may call it already."""
        assert self.install()
        signal.signal(signal.SIGTERM, lambda *_: None)

        assert not self.install()

    def test_default_action(self, worker, monkeypatch):
        """It delivers, and has the signal sent again for the default action."""
        sent = []
        self.install()
        monkeypatch.setattr(
            os, "kill", lambda *call: sent.append((call, signal.getsignal(call[1])))
        )

        signal.raise_signal(signal.SIGTERM)

        assert [((os.getpid(), signal.SIGTERM), signal.SIG_DFL)] == sent
        assert ["flush", "close"] == [verb for verb, _ in worker.calls]

    def test_in_the_middle_of_writing(self, worker, monkeypatch):
        """A thread that it interrupts while it has our lock first finishes that."""
        sent = []
        self.install()
        monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
        worker.is_busy = True

        signal.raise_signal(signal.SIGTERM)
        before = list(worker.calls), list(sent)
        worker.is_busy = False
        (act,) = worker.deferred
        act()

        assert ([], []) == before
        assert ["flush", "close"] == [verb for verb, _ in worker.calls]
        assert [(os.getpid(), signal.SIGTERM)] == sent

    def test_handler_before(self, worker):
        """It delivers, and calls the handler that was there, as Python would."""
        seen = []
        signal.signal(signal.SIGTERM, lambda *call: seen.append((call, worker.calls)))
        assert self.install()

        signal.raise_signal(signal.SIGTERM)

        ((number, frame), calls), *others = seen
        assert [] == others
        assert signal.SIGTERM == number
        assert frame is not None
        assert 2 == len(calls)

    def test_what_comes_after(self, worker):
        """What is emitted while the process comes to its end waits for no batch."""
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.install()

        signal.raise_signal(signal.SIGTERM)

        assert worker.is_hurried

    def test_handler_after(self, worker):
        """Called by a handler that was installed over it, it delivers, no more."""
        seen = []

        def handler(number: int, frame: object) -> None:
            ours(number, frame)
            seen.append(number)

        self.install()
        ours = signal.signal(signal.SIGTERM, handler)

        signal.raise_signal(signal.SIGTERM)

        assert 2 == len(worker.calls)
        assert [signal.SIGTERM] == seen
