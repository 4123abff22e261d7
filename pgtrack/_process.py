"""
Fork, exit and SIGTERM: what happens to clients when a process does.

Everything here is bounded by `exit_timeout`, and chains to what was there before.

- Fork: the child starts with an empty queue and ledger, and connections of its
  own; what is in memory is the parent's, who sends it.
- End of the interpreter: `atexit`.  Children of `multiprocessing` leave by `os._exit`
  and run no `atexit`; they run the finalizers of `multiprocessing.util`.
- SIGTERM with the default action: flush, then the default action, so that the exit
  status is what it would have been.  A handler of the user's is left alone: it decides
  whether the process ends, and an orderly end comes by `atexit`.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import weakref
from types import FrameType
from typing import TYPE_CHECKING

from pgtrack import _transport
from pgtrack._clock import SYSTEM_CLOCK

if TYPE_CHECKING:
    from pgtrack._client import Client

__all__ = ["adopt"]

_IMPORT_WAIT = 5.0
"""Most seconds that a fork waits for an import that is under way."""

_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_has_held_imports = False
_finalizer_pid: int | None = None


def adopt(client: Client) -> None:
    """Look after *client* until it is closed or gone."""
    _clients.add(client)
    if client.config.handle_sigterm:
        _handle_sigterm()


def adopt_child() -> None:
    """See to it that a child of `multiprocessing` delivers before it leaves."""
    global _finalizer_pid  # noqa: PLW0603  once a process
    util = sys.modules.get("multiprocessing.util")
    if util is None or _finalizer_pid == os.getpid():
        return
    _finalizer_pid = os.getpid()
    if sys.modules["multiprocessing.process"].parent_process() is not None:
        util.Finalize(None, _at_exit, exitpriority=0)


def _at_exit(*, close: bool = True) -> None:
    """Close or flush every client, all within the longest `exit_timeout` of them."""
    clients = list(_clients)
    timeouts = [float(client.config.exit_timeout) for client in clients]
    deadline = SYSTEM_CLOCK.monotonic() + max(timeouts, default=0.0)
    for client, timeout in zip(clients, timeouts):
        left = max(min(timeout, deadline - SYSTEM_CLOCK.monotonic()), 0.0)
        if close:
            client.close(left)
        else:
            client.flush(left)


# --- fork ---


def _before_fork() -> None:
    global _has_held_imports  # noqa: PLW0603  between the hooks of one fork
    _has_held_imports = _transport.hold_imports(_IMPORT_WAIT)


def _after_fork_in_parent() -> None:
    if _has_held_imports:
        _transport.allow_imports()


def _after_fork_in_child() -> None:
    _transport.forget_imports()
    for client in list(_clients):
        client._start_over()  # noqa: SLF001  the two are one mechanism


# --- SIGTERM ---


def _handle_sigterm() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _on_sigterm)
    except ValueError:  # a subinterpreter
        pass


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    del frame
    if signal.getsignal(number) is not _on_sigterm:
        # A handler installed after ours called us on, and decides what comes next.
        _at_exit(close=False)
        return
    _at_exit()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
