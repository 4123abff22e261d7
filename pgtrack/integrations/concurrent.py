"""
Threads, executors and process pools: they inherit the correlation, without `bind`.

For `concurrent.futures`, `threading` and `multiprocessing`.  What is submitted runs
under the correlation of whoever submits it, also under none; a thread or process that
is started runs under that of whoever starts it.  Results, exceptions, futures and
cancellation stay what they are.  Left alone are pgtrack's own threads, executors that
are not the standard library's, and `_thread`.  Opt out by not calling `install`, for
a single piece of work by `contextvars.Context().run(pool.submit, function)`.
"""

from __future__ import annotations

import multiprocessing.pool
import multiprocessing.process
import sys
import threading
from concurrent.futures.process import ProcessPoolExecutor
from concurrent.futures.thread import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pgtrack._context import Cell, Frame, current_frame, switch
from pgtrack._propagation import extract, inject
from pgtrack.integrations._patches import Patches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pgtrack.integrations._patches import Wrapper

__all__ = ["install", "uninstall"]


def install() -> None:
    """
    Let executors, threads and processes inherit the correlation from now on.

    Has no effect on what is under way.  Installed twice it is installed once.
    """
    _patches.install(*_PLACES)


def uninstall() -> None:
    """
    Undo `install`; what was submitted before runs as it was submitted.

    Where somebody has patched on top of our patch, theirs stays, and ours does nothing.
    """
    _patches.uninstall()


_patches = Patches()


# --- tasks: executors and pools ---


class _Task:
    """
    A function that runs under the frame of whoever submitted it.

    It may be called any number of times, as `map` does.  What it pickles to runs under
    the same session, request, user and journey in another process.
    """

    __slots__ = ("_frame", "_function")

    def __init__(self, function: Callable[..., Any], frame: Frame | None) -> None:
        self._function = function
        self._frame = frame

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        function, before = self._function, switch(self._frame)
        del self  # an exception keeps what is here, by its traceback, as a future it
        try:
            return function(*args, **kwargs)
        finally:
            switch(before)
            del args, before, function, kwargs

    def __reduce__(self) -> Any:
        return _arrived_task, (self._function, _headers(self._frame))


def _headers(frame: Frame | None) -> dict[str, str]:
    return inject(frame, is_trusted=True)


def _arrived_task(function: Callable[..., Any], headers: Mapping[str, str]) -> _Task:
    return _Task(function, _arrived(headers))


def _arrived(headers: Mapping[str, str]) -> Frame | None:
    """
    Return a frame for what came in *headers*, apart from whatever is here.

    Not by the settings of this process, which it may not have: it is the same work.
    """
    if not headers:
        return None
    came = extract(headers, is_trusted=True)
    return Frame(
        None,
        session_id=came.session_id,
        request_id=came.request_id,
        journey_id=came.journey_id,
        cell=Cell(came.user_id),
        is_remote=came.session_id is not None,
    )


def _submit(wrapped: Any, executor: Any, args: Any, kwargs: Any) -> Any:
    """
    Submit a task that runs under the present frame.

    The threads and processes that the executor starts meanwhile are not the request's
    who happens to need them: they live on.
    """
    if not args:
        return wrapped(*args, **kwargs)
    frame = switch(None)
    try:
        # In another interpreter pgtrack may not be importable.
        if not _is_of(executor, "concurrent.futures.interpreter"):
            args = (_Task(args[0], frame), *args[1:])
        return wrapped(*args, **kwargs)
    finally:
        switch(frame)


def _is_of(executor: object, module: str) -> bool:
    """Ask for an executor that newer Pythons have, without importing it."""
    kind = getattr(sys.modules.get(module), "InterpreterPoolExecutor", ())
    return isinstance(executor, kind)


def _start_pool(wrapped: Any, pool: Any, args: Any, kwargs: Any) -> Any:
    """Start a pool, whose threads and processes belong to nobody's request."""
    del pool
    frame = switch(None)
    try:
        return wrapped(*args, **kwargs)
    finally:
        switch(frame)


def _apply(wrapped: Any, pool: Any, args: Any, kwargs: Any) -> Any:
    """Let a pool call its function under the present frame."""
    del pool
    if args:
        args = (_Task(args[0], current_frame()), *args[1:])
    elif "func" in kwargs:
        kwargs = {**kwargs, "func": _Task(kwargs["func"], current_frame())}
    return wrapped(*args, **kwargs)


# --- threads ---

_starting: dict[int, Frame | None] = {}
"""What threads that are being started begin under, by id; taken out as they begin."""


def _start_thread(wrapped: Any, thread: Any, args: Any, kwargs: Any) -> Any:
    """Start a thread that begins under the present frame."""
    if _is_apart(thread):
        return wrapped(*args, **kwargs)
    _starting[id(thread)] = None if _is_worker(thread) else current_frame()
    try:
        return wrapped(*args, **kwargs)  # which returns when the thread has begun
    finally:
        _starting.pop(id(thread), None)


def _is_apart(thread: Any) -> bool:
    """Return whether it is a thread of ours, or was given a context (Python 3.14)."""
    name = getattr(thread, "_name", None)  # `.name` fails if it was not initialized
    is_ours = isinstance(name, str) and name.startswith("pgtrack")
    return is_ours or getattr(thread, "_context", None) is not None


def _is_worker(thread: Any) -> bool:
    """Return whether its work brings its context along, and is of many requests."""
    target = getattr(thread, "_target", None)
    modules = type(thread).__module__, getattr(target, "__module__", None)
    return any(str(name).partition(".")[0] in {"anyio", "trio"} for name in modules)


def _run_thread(wrapped: Any, thread: Any, args: Any, kwargs: Any) -> Any:
    """
    Run a thread from its first step to its last, `threading.excepthook` included.

    A `run` of the instance would be simpler to replace, but that makes a cycle that
    keeps the thread alive, stands in each traceback, and misses the hook.
    """
    try:
        frame = _starting.pop(id(thread))
    except KeyError:
        return wrapped(*args, **kwargs)
    context = getattr(thread, "_context", None)  # in which Python 3.14 calls `run`
    _begin(context, frame)
    del frame
    try:
        return wrapped(*args, **kwargs)
    finally:
        _begin(context, None)


def _begin(context: Any, frame: Frame | None) -> None:
    switch(frame)
    if context is not None:
        context.run(switch, frame)


# --- processes ---


class _Run:
    """
    The `run` of a process that is being started; it takes itself out of the way.

    In a forked child the frame is there already.  What it pickles to brings its own.
    """

    __slots__ = ("_frame", "_has_arrived", "_process")

    def __init__(
        self, process: Any, frame: Frame | None, *, has_arrived: bool = False
    ) -> None:
        self._process = process
        self._frame = frame
        self._has_arrived = has_arrived

    def __call__(self) -> None:
        process = self._process
        del process.run
        if self._has_arrived:
            switch(self._frame)
        process.run()

    def __reduce__(self) -> Any:
        return _arrived_run, (self._process, _headers(self._frame))


def _arrived_run(process: Any, headers: Mapping[str, str]) -> _Run:
    return _Run(process, _arrived(headers), has_arrived=True)


def _start_process(wrapped: Any, process: Any, args: Any, kwargs: Any) -> Any:
    """Start a process that begins under the present frame, however it is started."""
    frame = current_frame()
    if frame is None or "run" in vars(process):
        return wrapped(*args, **kwargs)
    process.run = _Run(process, frame)
    try:
        return wrapped(*args, **kwargs)
    finally:
        vars(process).pop("run", None)


def _owner(kind: type, name: str) -> type:
    """Return the class that defines it: gevent puts a subclass in place of `Thread`."""
    return next(base for base in kind.__mro__ if name in vars(base))


_Pool = multiprocessing.pool.Pool

_PLACES: tuple[tuple[type, str, Wrapper], ...] = (
    (ThreadPoolExecutor, "submit", _submit),
    (ProcessPoolExecutor, "submit", _submit),
    (_owner(threading.Thread, "start"), "start", _start_thread),
    (_owner(threading.Thread, "_bootstrap_inner"), "_bootstrap_inner", _run_thread),
    (multiprocessing.process.BaseProcess, "start", _start_process),
    (_Pool, "__init__", _start_pool),
    (_Pool, "apply_async", _apply),
    (_Pool, "map", _apply),
    (_Pool, "map_async", _apply),
    (_Pool, "starmap", _apply),
    (_Pool, "starmap_async", _apply),
    (_Pool, "imap", _apply),
    (_Pool, "imap_unordered", _apply),
)
