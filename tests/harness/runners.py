"""
Run code in threads that start together, in a forked child, and in a fresh interpreter.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.connection import Connection

T = TypeVar("T")

# How many seconds a child may take to leave once it has reported.
_GRACE = 5.0

_TESTS = Path(__file__).resolve().parent.parent


def heed_signals() -> None:
    """Have signals end the processes that tests start, however these were started."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start_together(
    n: int, function: Callable[[int], T], *, timeout: float = 30
) -> list[T]:
    """
    Run ``function(i)`` in *n* threads that start at once; return the results by *i*.

    Args:
        n: How many threads.

        function: Takes the number of its thread, from 0.

        timeout: Seconds for all threads together.

    Raises:
        BaseException: The first error of a thread, once all have ended.

        TimeoutError: A thread did not end. It is left behind as a daemon.
    """
    barrier = threading.Barrier(n)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            barrier.wait(timeout)
            results[i] = function(i)
        except BaseException as error:  # raised below, in the caller
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(i,), name=f"together-{i}", daemon=True)
        for i in range(n)
    ]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))

    if errors:
        raise errors[0]

    if stuck := sum(thread.is_alive() for thread in threads):
        msg = f"{stuck} of {n} threads did not end in {timeout} s."
        raise TimeoutError(msg)

    return [results[i] for i in range(n)]


class ChildError(Exception):
    """
    Be the cause of an error that came out of a child; its text is the traceback there.
    """

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def in_fork(function: Callable[[], T], timeout: float = 30) -> T:
    """
    Run a function in a forked child and return its result, which must pickle.

    The child leaves by `os._exit`: no exit handler runs and no buffer is flushed.

    Raises:
        Exception:
            What the function raised, caused by a `ChildError`. An error that does
            not pickle, or is no Exception, becomes a RuntimeError.

        TimeoutError: There was no result in time. The child has been killed.
    """
    receiver, sender = Pipe(duplex=False)
    with receiver, sender:
        with warnings.catch_warnings():
            # Python 3.12 and later warn of forking with threads: the point of this.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()

        if pid == 0:
            _report(function, sender)

        sender.close()
        try:
            report = _receive(receiver, timeout)
            # When it has left, the pipe has no other end. It may still have to write
            # down what a coverage tool saw.
            receiver.poll(_GRACE)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    result: T
    result, error, text = pickle.loads(report)
    if error is not None:
        raise error from ChildError(text)

    return result


def _report(function: Callable[[], Any], sender: Connection) -> NoReturn:
    """
    Send what becomes of the function, and end this process.
    """
    try:
        try:
            report = pickle.dumps((function(), None, ""))
        except BaseException as error:  # raised by the parent
            report = _pickle_error(error, traceback.format_exc())

        sender.send_bytes(report)
    finally:
        os._exit(0)


def _receive(receiver: Connection, timeout: float) -> bytes:
    if not receiver.poll(timeout):
        msg = f"The child did not report within {timeout} s."
        raise TimeoutError(msg)

    try:
        return receiver.recv_bytes()
    except EOFError:
        msg = "The child ended without a report."
        raise RuntimeError(msg) from None


def _pickle_error(error: BaseException, text: str) -> bytes:
    try:
        report = pickle.dumps((None, error, text))
        # An error may pickle and still not come back.
        pickle.loads(report)
    except Exception:  # whatever a foreign class raises
        report = b""

    if report and isinstance(error, Exception):
        return report

    return pickle.dumps((None, RuntimeError(f"{error!r} in the child"), text))


def run_script(
    source_or_path: str | os.PathLike[str],
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 30,
) -> subprocess.CompletedProcess[str]:
    """
    Run a script in a fresh interpreter and return its exit status and what it printed.

    It can import what this process can, save the tests, whose directories may be named
    like modules. Variables of this process that begin with `PRODUCTGRAPH_` do not
    reach it.

    Args:
        source_or_path: A path, as a path object; a string is source code, dedented.

        args: What follows the name of the script in `sys.argv`.

        env: Variables to add.

        timeout: In seconds. After them it is killed.

    Raises:
        subprocess.TimeoutExpired: It did not end in time.
    """
    if isinstance(source_or_path, str):
        command = ["-c", textwrap.dedent(source_or_path)]
    else:
        command = [os.fspath(source_or_path)]

    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PRODUCTGRAPH_")
    }
    directories = [Path(entry).resolve() for entry in sys.path]
    import_path = os.pathsep.join(
        str(directory)
        for directory in directories
        if _TESTS not in (directory, *directory.parents)
    )
    return subprocess.run(
        [sys.executable, *command, *args],
        env={**inherited, "PYTHONPATH": import_path, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )
