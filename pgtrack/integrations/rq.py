"""
RQ: jobs run in the session, for the user and in the journey of whoever enqueued them.

`install()` where jobs are enqueued and in the worker, or let the worker do it itself:
`rq worker --worker-class pgtrack.integrations.rq.Worker`.  The correlation rides in
`job.meta["pgtrack"]`; retries, repeats, dependents and callbacks keep it.  A job that
fails makes an `error` event; one that succeeds makes none.  Work-horses deliver before
they end.  Arguments, results and the rest of `meta` are left alone.  Opt out by not
calling `install`, or per job by a `meta["pgtrack"]` of your own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pgtrack import _api, _process
from pgtrack._diagnostics import internal_error
from pgtrack.integrations._patches import Patches
from pgtrack.integrations._requirement import requirement
from pgtrack.integrations._tasks import TaskRun, prepare_forks, to_carry

with requirement("rq", extra="rq"):
    import rq.worker
    from rq.job import Job, Retry

if TYPE_CHECKING:
    from collections.abc import Callable

    from pgtrack._client import Client

__all__ = ["SimpleWorker", "SpawnWorker", "Worker", "install", "uninstall"]

_FORK = "fork_work_horse"

_KEY = "pgtrack"
"""Where in the meta of a job the headers are."""

_client: Client | None = None
"""The client that `install` was given."""

_patches = Patches()

_running: dict[int, TaskRun] = {}
"""The jobs that are being run in this process, by identity."""


def install(*, client: Client | None = None) -> None:
    """
    Let jobs carry the correlation, and fail visibly.

    Call it in each process that enqueues jobs, and in the worker's main process.
    Called again it changes nothing but the client.

    Args:
        client: Instead of the default client, which is looked up at each job.
    """
    global _client  # noqa: PLW0603  RQ's classes are the process's, too
    _client = client
    # What performs jobs is defined in one class or another, depending on version.
    places = {
        (_owner(kind, name), name, wrapper)
        for kind in _WORKERS
        for name, wrapper in _OF_WORKERS.items()
    }
    _patches.install(
        (Job, "create", _create),
        (Job, "perform", _perform),
        (_owner(rq.worker.Worker, _FORK), _FORK, _fork_work_horse),
        *places,
    )


def uninstall() -> None:
    """Undo `install`; not while jobs are running."""
    global _client  # noqa: PLW0603  see above
    _client = None
    _patches.uninstall()


def _owner(kind: type, name: str) -> type:
    return next(base for base in kind.__mro__ if name in vars(base))


# --- enqueueing ---


def _create(wrapped: Callable[..., Job], _: object, args: Any, kwargs: Any) -> Job:
    """Add the correlation to a job that is about to be enqueued."""
    job = wrapped(*args, **kwargs)
    try:
        _put(job, to_carry(_headers_of(job)))
    except Exception as error:  # noqa: BLE001  the job is enqueued all the same
        internal_error(error)
    return job


def _headers_of(job: Job) -> Mapping[str, Any]:
    meta: object = job.meta
    headers = meta.get(_KEY) if isinstance(meta, dict) else None
    return headers if isinstance(headers, Mapping) else {}


def _put(job: Job, headers: Mapping[str, str]) -> None:
    """Add to the headers in the meta: a new dict, since jobs may share the old one."""
    if headers and isinstance(job.meta, dict):
        job.meta = {**job.meta, _KEY: {**_headers_of(job), **headers}}


# --- performing ---


def _begin(job: Job, *, is_nested: bool = False) -> TaskRun | None:
    """Begin a job; None, by an error of ours, if that cannot be."""
    try:
        run = _run_of(job, is_nested=is_nested)
        _running[id(job)] = run
    except Exception as error:  # noqa: BLE001  the job runs all the same
        internal_error(error)
        return None
    return run


def _present_client() -> Client:
    return _api.default_client() if _client is None else _client


def _run_of(job: Job, *, is_nested: bool = False) -> TaskRun:
    headers = _headers_of(job)
    return TaskRun(_present_client, headers, lambda: _name_of(job), is_nested=is_nested)


def _name_of(job: Job) -> str | None:
    try:
        return job.func_name
    except Exception:  # noqa: BLE001  what cannot be deserialized has no name
        return None


def _end(job: Job, run: TaskRun | None) -> None:
    if run is not None:
        _running.pop(id(job), None)
        run.leave()


def _fork_work_horse(
    wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any
) -> Any:
    """Get ready for work-horses, each of which delivers for itself."""
    prepare_forks(_present_client)
    return wrapped(*args, **kwargs)


def _perform_job(
    wrapped: Callable[..., bool], worker: Any, args: Any, kwargs: Any
) -> bool:
    """Perform a job with its callbacks, and see to its events if the process ends."""
    job = kwargs["job"] if "job" in kwargs else args[0]
    run = _begin(job)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _end(job, run)
        if worker.is_horse:
            _process.deliver()


def _perform(wrapped: Callable[..., Any], job: Job, args: Any, kwargs: Any) -> Any:
    """Perform a job's function; in a worker, or within who enqueued it."""
    run = _running.get(id(job))
    own = _begin(job, is_nested=True) if run is None else None
    try:
        result = wrapped(*args, **kwargs)
    except BaseException as error:
        _fail(job, error)
        raise
    else:
        if isinstance(result, Retry):
            _fail(job)
        return result
    finally:
        _end(job, own)


def _fail(job: Job, error: BaseException | None = None) -> None:
    """Tell the *error*; and let a retry go on with the session, even a fresh one."""
    run = _running.get(id(job))
    if run is None:
        return
    run.tell_inside(error)
    try:
        _put(job, run.headers())
    except Exception as problem:  # noqa: BLE001  the job's own error goes on
        internal_error(problem)


def _handle_exception(
    wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any
) -> Any:
    """Tell what failed around the job's function, such as a callback."""
    job, error = args[0], args[2]
    if isinstance(error, BaseException):
        _fail(job, error)
    return wrapped(*args, **kwargs)


def _handle_killed(
    wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any
) -> Any:
    """Tell, in the worker's main process, of a job whose work-horse was killed."""
    job, _pid, status = args[:3]
    try:
        run = _run_of(job)
        run.leave(WorkHorseKilledError(_ending(status)))
    except Exception as error:  # noqa: BLE001  the worker goes on all the same
        internal_error(error)
    return wrapped(*args, **kwargs)


def _ending(status: int | None) -> str:
    """Return what a status of `os.wait` says."""
    if status is not None and os.WIFSIGNALED(status):
        return f"the work-horse was ended by signal {os.WTERMSIG(status)}"
    return f"the work-horse ended unexpectedly (status {status})"


class WorkHorseKilledError(Exception):
    """What the error event of a job says whose process ended before the job did."""


_OF_WORKERS = {
    "perform_job": _perform_job,
    "handle_exception": _handle_exception,
    "handle_work_horse_killed": _handle_killed,
}
"""What is wrapped of workers, by name."""

_WORKERS: tuple[type, ...] = (rq.worker.Worker, rq.worker.SimpleWorker)
"""All other workers are made of these."""


# --- workers ---


class _Installed:
    """Sees to it that the integration is installed where a worker is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not _patches.is_on:
            install()
        super().__init__(*args, **kwargs)


class Worker(_Installed, rq.worker.Worker):
    """RQ's worker, with the integration installed."""


class SimpleWorker(_Installed, rq.worker.SimpleWorker):
    """RQ's worker that performs jobs in its own process."""


class SpawnWorker(_Installed, getattr(rq.worker, "SpawnWorker", rq.worker.Worker)):  # type: ignore[misc]  # since RQ 2.2
    """
    RQ's worker whose work-horses are fresh interpreters.

    They import nothing of the application's before they have taken the job, hence
    `install` in one of its modules comes too late for them, and this class does not.
    """
