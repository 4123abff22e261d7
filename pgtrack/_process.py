"""
Fork, exit and SIGTERM: what happens to events when a process does.

Everything here is bounded by `exit_timeout`, and chains to what was there before.

- Fork: the child starts with an empty queue and ledger, and connections of its
  own; what is in memory is the parent's, who sends it.
- End of the interpreter: `atexit`.  Children of `multiprocessing` leave by `os._exit`
  and run no `atexit`; they run the finalizers of `multiprocessing.util`.
- After that: exit handlers that are called after ours, daemon threads, finalisers.
  What they emit waits for the moment at which `atexit` has called everybody, and
  what is emitted later still is delivered by whoever emits it.
- SIGTERM: deliver, then do what would have been done without us: the default action,
  with its exit status, or the handler that was there.  A handler that is installed
  after ours decides by itself whether to call us.  An ignored signal stays ignored.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from pgtrack import _diagnostics, _transport
from pgtrack._clock import SYSTEM_CLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import FrameType, ModuleType

    from pgtrack._config import Config
    from pgtrack._worker import Worker

__all__ = ["adopt", "begin_delivery", "deliver"]

_IMPORT_WAIT = 5.0
"""Most seconds that a fork waits for an import that is under way."""

_LAST = -100
"""Priority of our finalizer: after those that join feeder threads and children."""

_adopted: dict[weakref.ref[Worker], Config] = {}
"""
The workers of this process, with their settings.

Workers rather than clients, for what a client emitted is delivered also when the client
itself is gone; as long as there is something to do, a worker is held by its thread.
"""


def adopt(worker: Worker, config: Config) -> None:
    """Look after *worker* as long as there is one."""
    _adopted[weakref.ref(worker, _disown)] = config
    _mind_children()
    if config.handle_sigterm:
        _handle_sigterm()


def _disown(reference: weakref.ref[Worker]) -> None:
    _adopted.pop(reference, None)


def _workers() -> list[tuple[Worker, Config]]:
    # The copy is one call into C: workers come and go in other threads.
    found = ((reference(), config) for reference, config in _adopted.copy().items())
    return [(worker, config) for worker, config in found if worker is not None]


# --- the end ---


_LEAST = 0.2
"""Seconds to see whether an endpoint that was waited for in vain is back."""

_vain: weakref.WeakKeyDictionary[Worker, float] = weakref.WeakKeyDictionary()
"""
Seconds that each was waited for in vain at an end of this process.

There may be several: a server may end by its lifespan, a signal and `atexit`.
"""


def begin_delivery() -> bool:
    """Have all workers deliver at once; True if none has anything to."""
    return all([_guarded(worker.flush, 0.0) for worker, _ in _workers()])  # noqa: C419  same


def deliver() -> bool:
    """
    Deliver what all clients took so far, each within its `exit_timeout`.

    True if nothing is left.  Time that was waited in vain, as for an endpoint that is
    down, counts for all ends of the process together.
    """
    return _end(_flush)


def _flush(worker: Worker, left: float) -> bool:
    is_done = worker.flush(left, may_rest=True)
    if not is_done:
        worker.rest()  # whoever is called next may end the process at once
    return is_done


def _finish(spent: float = 0.0) -> None:
    """Deliver what was emitted, and take no more; what is left is counted and told."""
    _end(lambda worker, left: worker.close(left), spent)


def _end(verb: Callable[[Worker, float], object], spent: float = 0.0) -> bool:
    """Do *verb* to all workers, each within its time, counted from now."""
    start = SYSTEM_CLOCK.monotonic()
    begin_delivery()  # all deliver at once, and none waits for another
    ends = [(w, start + _left(config, spent)) for w, config in _workers()]
    return all([_end_one(verb, worker, end) for worker, end in ends])  # noqa: C419  none is left out


def _left(config: Config, spent: float) -> float:
    """Return the seconds that are left when some were *spent* on the same end."""
    timeout = float(config.exit_timeout)
    return min(timeout, max(timeout - spent, _LEAST))


def _end_one(
    verb: Callable[[Worker, float], object], worker: Worker, end: float
) -> bool:
    began, delivered = SYSTEM_CLOCK.monotonic(), worker.delivered
    waited = _vain.get(worker, 0.0)
    if waited:
        _guarded(worker.flush, max(end - waited - began, _LEAST))
        if worker.delivered == delivered:
            end = 0.0
    is_done = _guarded(verb, worker, max(end - SYSTEM_CLOCK.monotonic(), 0.0))
    is_vain = not is_done and worker.delivered == delivered
    _vain[worker] = waited + SYSTEM_CLOCK.monotonic() - began if is_vain else 0.0
    return is_done


def _guarded(function: Callable[..., object], *args: object) -> bool:
    """Return whether *function* returns something true; its errors are our own."""
    try:
        return bool(function(*args))
    except Exception as error:  # noqa: BLE001  one worker must not cost the others
        _diagnostics.internal_error(error)
        return False


def _keep_status() -> None:
    """
    Let a process that ends by an uncaught KeyboardInterrupt exit as such.

    CPython remembers it in a flag that the next `eval` of a text clears, and importing
    httpx does that.  The status would be 1 instead of that of SIGINT, and a shell would
    go on with its loop.  Raised within a text, the error sets the flag again.
    """
    is_interactive = hasattr(sys, "ps1")  # there it did not end anything
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not is_interactive:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102  a constant


# --- what comes late ---


class _Exit:
    """
    The end of the interpreter: our exit handler, held by `atexit` alone.

    Handlers that were registered before ours are called after it.  When all have been
    called, `atexit` lets go of them: that is the last moment at which threads run and
    modules can be imported.
    """

    def __init__(self) -> None:
        self._spent: float | None = None

    def __call__(self) -> None:
        """Finish, and keep what is emitted from now on."""
        self._spent = 0.0
        for worker, _ in self._finish():
            worker.linger(_keep)

    def __del__(self) -> None:
        if self._spent is None:  # let go of without a call, as in a forked child
            return
        lingering = self._finish()
        if _are_threads_greenlets():  # their loop is not to be relied upon any more
            return
        modules = _needed_modules()
        for worker, config in lingering:
            # What was never used is perhaps not loaded, and can be no more.
            if worker.delivered or config.spool_dir is not None:
                worker.linger(_Late(worker, config, self._spent, modules))

    def _finish(self) -> list[tuple[Worker, Config]]:
        """Do so, within what is left; return who could take more."""
        began, spent = SYSTEM_CLOCK.monotonic(), self._spent or 0.0
        try:
            return _finish_for_now(spent)
        finally:
            self._spent = spent + SYSTEM_CLOCK.monotonic() - began
            _keep_status()


def _are_threads_greenlets() -> bool:
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def _finish_for_now(spent: float = 0.0) -> list[tuple[Worker, Config]]:
    """Finish, and return the workers that may take more, unless that is in vain."""
    present = [(w, config) for w, config in _workers() if not w.is_closed]
    _finish(spent)
    return [
        (worker, config)
        for worker, config in present
        if not _vain.get(worker) or config.spool_dir is not None
    ]


def _keep() -> None:
    """Leave an event in the queue: somebody will come for it."""


class _Late:
    """
    Delivers each event on the thread that emits it, as nobody comes later to do it.

    When its time is up, events are written to disk, or if there is no spool, refused.

    Args:
        worker: Whose events.

        config: Its settings.

        spent: Seconds of the time for the end that are gone.  They are counted where
            the process would end but for us; where threads of the host go on, only
            those waited in vain are.

        modules: What is to be importable, where the interpreter is taken apart.
    """

    def __init__(
        self,
        worker: Worker,
        config: Config,
        spent: float = 0.0,
        modules: Mapping[str, ModuleType] | None = None,
    ) -> None:
        self._worker = worker
        self._has_spool = config.spool_dir is not None
        self._left = 0.0 if _vain.get(worker) else _left(config, spent)
        self._modules = modules
        self._thread = threading.get_ident()
        self._turn = threading.Lock()

    def __call__(self) -> None:
        """Deliver what is in the queue; called with each event, and by ourselves."""
        if self._modules is not None and self._thread != threading.get_ident():
            return  # a daemon, which may end at any bytecode from now on
        try:
            while len(self._worker.queue) and self._turn.acquire(blocking=False):
                try:
                    self._deliver()
                finally:
                    self._turn.release()
        except Exception:  # noqa: BLE001, S110  names are missing: it is too late
            pass

    def _deliver(self) -> None:
        began = SYSTEM_CLOCK.monotonic()
        with _importable(self._modules or {}):
            is_done = self._left > 0 and self._worker.flush(self._left, may_rest=True)
            if self._modules is not None or not is_done:
                self._left -= SYSTEM_CLOCK.monotonic() - began
            if not is_done or self._left <= 0:
                self._left = 0.0
                self._worker.close(0.0)
                if self._has_spool:
                    self._worker.linger(self)


_PACKAGES = frozenset(
    {"pgtrack", "httpx", "httpcore", "h11", "certifi", "idna", "anyio", "sniffio"}
)
"""Beside the standard library, what delivering may import, or import again."""


def _needed_modules() -> Mapping[str, ModuleType]:
    """Return what is loaded of the modules that delivering may import again."""
    loaded = sys.modules.copy().items()
    needed = _PACKAGES | sys.stdlib_module_names
    return {name: module for name, module in loaded if name.split(".")[0] in needed}


@contextlib.contextmanager
def _importable(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """
    Let *modules* be found by the imports within functions.

    At its end the interpreter replaces them by None in `sys.modules`, and then clears
    that, before the last finalisers are called.
    """
    present: dict[str, Any] = sys.modules
    hidden = {
        name: present.get(name, modules)
        for name, module in modules.items()
        if present.get(name) is not module
    }
    for name in hidden:
        present[name] = modules[name]
    try:
        yield
    finally:
        for name, before in hidden.items():
            if before is modules:
                present.pop(name, None)
            else:
                present[name] = before


# --- fork ---


class _Fork(threading.local):
    """What a thread that forks has to undo."""

    has_held_imports = False
    mask: Iterable[int] | None = None


_fork = _Fork()


def _before_fork() -> None:
    _mind_children()
    _fork.has_held_imports = _transport.hold_imports(_IMPORT_WAIT)
    if _previous is signal.SIG_DFL:
        # Python forgets signals that come before a child has begun.  The default action
        # would have ended it, and whoever sent SIGTERM waits for that.
        _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork_in_parent() -> None:
    if _fork.has_held_imports:
        _transport.allow_imports()
    _restore_mask()


def _after_fork_in_child() -> None:
    _vain.clear()
    _transport.forget_imports()
    for worker, _ in _workers():
        _guarded(worker.start_over)
    _restore_mask()


def _restore_mask() -> None:
    mask, _fork.mask = _fork.mask, None
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_is_minding_children = False


def _mind_children() -> None:
    """
    See to it that children of `multiprocessing` deliver before they leave.

    A child forgets all finalizers as it begins, then calls what was registered to run
    after the fork: that is the moment.  One that is spawned or comes from a fork server
    may first import us when that has passed.
    """
    global _is_minding_children  # noqa: PLW0603  once in a process and its children
    util = sys.modules.get("multiprocessing.util")
    # It lacks the function while another thread is importing it.
    register = getattr(util, "register_after_fork", None)
    if register is None or _is_minding_children:
        return
    _is_minding_children = True
    register(deliver, _deliver_at_end)
    if sys.modules["multiprocessing.process"].parent_process() is not None:
        _deliver_at_end()


def _deliver_at_end(_: object = None) -> None:
    sys.modules["multiprocessing.util"].Finalize(None, _end_child, exitpriority=_LAST)


def _end_child() -> None:
    """Finish, though threads of the host may go on before the child leaves."""
    for worker, config in _finish_for_now():
        worker.linger(_Late(worker, config))


# --- SIGTERM ---

_previous: Any = None
"""What SIGTERM did before us; None as long as we are not installed."""


def _handle_sigterm() -> None:
    """Install our handler, once, or again where the default action was restored."""
    global _previous  # noqa: PLW0603  a process has one handler
    if threading.current_thread() is not threading.main_thread():
        return
    present = signal.getsignal(signal.SIGTERM)
    if present is signal.SIG_DFL or (_previous is None and callable(present)):
        try:
            signal.signal(signal.SIGTERM, _on_sigterm)
        except ValueError:  # a subinterpreter
            return
        _previous = present


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    gevent: Any = sys.modules.get("gevent")
    hub = getattr(gevent, "hub", None)
    if hub is not None and isinstance(gevent.getcurrent(), hub.Hub):
        # While nothing else runs, signals come to the hub, which cannot wait.
        gevent.spawn(_end_by_sigterm, number, frame)
    else:
        _end_by_sigterm(number, frame)


def _end_by_sigterm(number: int, frame: FrameType | None) -> None:
    for worker, _ in _workers():
        _guarded(worker.hurry)  # a server yet ends what is under way, then kills itself
        if _guarded(worker.defer, lambda: _end_by_sigterm(number, frame)):
            return  # this thread was interrupted while it wrote events to disk
    if callable(_previous):
        deliver()
        _previous(number, frame)
    elif signal.getsignal(number) is _on_sigterm:
        _finish()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    else:  # a handler that was installed after ours called us, and decides what is next
        deliver()


atexit.register(_Exit())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
