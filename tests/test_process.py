"""What happens to workers when a process forks, ends, or is told to."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import weakref
from multiprocessing import process, util
from typing import TYPE_CHECKING

import pytest

import pgtrack
from harness import in_fork, start_together
from pgtrack import _diagnostics, _process, _transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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

    def flush(self, timeout: float) -> bool:
        """Note it."""
        return self._call("flush", timeout)

    def close(self, timeout: float) -> bool:
        """Note it."""
        return self._call("close", timeout)

    def hurry(self) -> None:
        """Note it."""
        self.is_hurried = True

    def start_over(self) -> None:
        """Count it."""
        self.starts += 1
        if self.error is not None:
            raise self.error


@pytest.fixture(name="adopt")
def _adopt(monkeypatch) -> Callable[..., FakeWorker]:
    """Return a function that makes and adopts a fake worker, among no others."""
    monkeypatch.setattr(_process, "_adopted", {})

    def adopt(*, exit_timeout: float = 0.3, **options: object) -> FakeWorker:
        worker = FakeWorker(**options)
        _process.adopt(worker, config_of(exit_timeout=exit_timeout))
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

        _process._close()

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

        _process._close()

        verbs = [[verb for verb, _ in worker.calls] for worker in workers]
        assert [["flush", "close"]] * 3 == verbs

    def test_what_was_waited_in_vain(self, adopt):
        """A process that ends in several ways waits for a dead endpoint only once."""
        worker = adopt(is_slow=True, exit_timeout=0.5)

        started = time.monotonic()
        ends = [_process.deliver(), _process.deliver()]
        _process._close()
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

    def test_nobody(self, adopt):
        """Without workers the end takes no time."""
        _process._close()
        _process.deliver()


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
