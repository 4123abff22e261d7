"""
Celery: tasks run in the session, for the user and in the journey of their sender.

`install()` wherever tasks are sent or run, best in the module of the application.  The
correlation rides in the headers of each message; retries, chains, groups, chords and
callbacks keep it.  A task that fails makes an `error` event; one that succeeds makes
none.  The children of a prefork pool deliver before they end.  Arguments, results and
the messages of others are left alone.  Opt out by not calling `install`, or per message
by a header `X-Session-ID` of your own.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from pgtrack import _api, _process
from pgtrack._diagnostics import internal_error
from pgtrack.integrations._requirement import requirement
from pgtrack.integrations._tasks import TaskRun, prepare_forks, to_carry

with requirement("celery", extra="celery"):
    from celery import signals, states  # type: ignore[import-untyped]

with requirement("billiard", extra="celery"):  # which Celery comes with
    from billiard.exceptions import (  # type: ignore[import-untyped]
        TimeLimitExceeded,
        WorkerLostError,
    )

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgtrack._client import Client

__all__ = ["install", "uninstall"]

_client: Client | None = None
"""The client that `install` was given."""

_running: weakref.WeakKeyDictionary[Any, TaskRun] = weakref.WeakKeyDictionary()
"""The tasks that are being run in this process, by their requests."""


def install(*, client: Client | None = None) -> None:
    """
    Let tasks carry the correlation, and fail visibly.

    Call it in each process that sends or runs tasks, before other receivers of
    Celery's signals are connected: those that come after it run under the correlation.
    Called again it changes nothing but the client.

    Args:
        client: Instead of the default client, which is looked up at each task.
    """
    global _client  # noqa: PLW0603  Celery's signals are the process's, too
    _client = client
    for signal, receiver in _RECEIVERS:
        signal.connect(receiver, weak=False)


def uninstall() -> None:
    """Undo `install`; not while tasks are running."""
    global _client  # noqa: PLW0603  see above
    _client = None
    for signal, receiver in _RECEIVERS:
        signal.disconnect(receiver)


def _on_publish(headers: Any = None, **_: Any) -> None:
    """Add the correlation to a message that is about to be sent."""
    try:
        headers.update(to_carry(_all_of(headers)))
    except Exception as error:  # noqa: BLE001  the message goes out all the same
        internal_error(error)


def _on_prerun(task: Any, **_: Any) -> None:
    """Begin a task, in a worker or eagerly."""
    try:
        request = task.request
        run = _run_of(task, is_nested=bool(request.is_eager))
        _running[request] = run
        if request.is_eager:  # as in a worker; a retry is made of them
            request.headers = {**(request.headers or {}), **run.headers()}
    except Exception as error:  # noqa: BLE001  the task runs all the same
        internal_error(error)


def _on_postrun(task: Any, retval: Any, state: str | None, **_: Any) -> None:
    """End a task, however it ended."""
    try:
        run = _running.pop(task.request, None)
        if run is None:  # it began before `install`
            return
        error: BaseException | None = None
        if state == states.FAILURE:
            error = retval  # itself; what task_failure has may be a picklable stand-in
        elif state is None:  # it goes on to whoever called the task
            error = sys.exc_info()[1]
        run.leave(error)
    except Exception as problem:  # noqa: BLE001  the task has ended all the same
        internal_error(problem)


def _on_failure(sender: Any, task_id: str, exception: BaseException, **_: Any) -> None:
    """
    Tell, in the worker's main process, of a task whose process was killed.

    Any other failure has been told where it happened.
    """
    if not isinstance(exception, (TimeLimitExceeded, WorkerLostError)):
        return
    try:
        if sender.request.id == task_id:
            _run_of(sender).leave(exception)
    except Exception as error:  # noqa: BLE001  the worker goes on all the same
        internal_error(error)


def _on_worker_init(**_: Any) -> None:
    """Get ready for the children of a pool, which are about to be forked."""
    prepare_forks(_present_client)


def _on_process_shutdown(**_: Any) -> None:
    """Deliver what a pool's child holds: it ends by `os._exit`."""
    _process.deliver()


def _present_client() -> Client:
    return _api.default_client() if _client is None else _client


def _run_of(task: Any, *, is_nested: bool = False) -> TaskRun:
    headers = _all_of(vars(task.request))
    return TaskRun(
        _present_client, headers, lambda: str(task.name), is_nested=is_nested
    )


def _all_of(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Return the headers of a message, with those in its header `headers`.

    A worker has the headers of a message as attributes of the request.  What stands in
    `headers` there depends on Celery's version, on whether the task runs eagerly, and
    on other instrumentation, which sends a header of this name.
    """
    inner = headers.get("headers")
    return {**inner, **headers} if isinstance(inner, dict) else headers


_RECEIVERS = (
    (signals.before_task_publish, _on_publish),
    (signals.task_prerun, _on_prerun),
    (signals.task_postrun, _on_postrun),
    (signals.task_failure, _on_failure),
    (signals.worker_init, _on_worker_init),
    (signals.worker_process_shutdown, _on_process_shutdown),
)
