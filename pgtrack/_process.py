"""
Fork, exit and SIGTERM: what happens to events when a process does.

Everything here is bounded by `exit_timeout`, and chains to what was there before.

- Fork: the child starts with an empty queue and ledger, and connections of its
  own; what is in memory is the parent's, who sends it.
- End of the interpreter: `atexit`.  Children of `multiprocessing` leave by `os._exit`
  and run no `atexit`; they run the finalizers of `multiprocessing.util`.
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
    from collections.abc import Callable, Iterable
    from types import FrameType

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
    return _end(lambda worker, left: worker.flush(left))


def _finish() -> None:
    """Deliver what was emitted, and take no more; what is left is counted and told."""
    _end(lambda worker, left: worker.close(left))


def _close() -> None:
    """Finish at the end of the interpreter."""
    try:
        _finish()
    finally:
        _keep_status()


def _end(verb: Callable[[Worker, float], object]) -> bool:
    """Do *verb* to all workers, each within its time, counted from now."""
    start = SYSTEM_CLOCK.monotonic()
    begin_delivery()  # all deliver at once, and none waits for another
    return all([_end_one(verb, worker, config, start) for worker, config in _workers()])  # noqa: C419  none is left out


def _end_one(
    verb: Callable[[Worker, float], object],
    worker: Worker,
    config: Config,
    start: float,
) -> bool:
    began, delivered = SYSTEM_CLOCK.monotonic(), worker.delivered
    end = start + float(config.exit_timeout)
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
    sys.modules["multiprocessing.util"].Finalize(None, _finish, exitpriority=_LAST)


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
    if callable(_previous):
        deliver()
        _previous(number, frame)
    elif signal.getsignal(number) is _on_sigterm:
        _finish()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    else:  # a handler that was installed after ours called us, and decides what is next
        deliver()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
