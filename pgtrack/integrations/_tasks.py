"""
What the integrations of task queues share: a task that is being run.

Its message is a carrier that outsiders cannot write to, so user and journey travel as
well.  Nothing here knows Celery or RQ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgtrack import _errors, _transport
from pgtrack._blocks import Activation, continued_frame
from pgtrack._context import Cell, current_frame, switch
from pgtrack._diagnostics import internal_error
from pgtrack._propagation import SESSION_HEADER, extract, inject

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pgtrack._client import Client
    from pgtrack._context import Frame

__all__ = ["TaskRun", "prepare_forks", "to_carry"]


def to_carry(given: Mapping[Any, Any]) -> dict[str, str]:
    """
    Return the headers to add to a message, so that it carries the correlation.

    None of those that its sender gave; and where that is another session none at all,
    since the user of the present one is not the user of that one.
    """
    present = inject(current_frame(), is_trusted=True)
    names = {name.lower() for name in given if isinstance(name, str)}
    if SESSION_HEADER.lower() in names:
        session_id = extract(given).session_id
        if session_id != present.get(SESSION_HEADER):
            return {}
    return {name: text for name, text in present.items() if name.lower() not in names}


class TaskRun(Activation):
    """
    One task that is being run: its correlation, and the error that ends it.

    Args:
        client: Returns whose event the error becomes.  Asked again at the end: the
            module of a task may be imported, and configure, when it has begun.

        headers: What the message carries.

        name: Returns what the task is called.

        is_nested: Whether it runs within its caller rather than in a worker: in the
            caller's session, but not as a part of the request that is being served.
    """

    __slots__ = ("_before", "_client", "_name")

    def __init__(
        self,
        client: Callable[[], Client],
        headers: Mapping[str, Any],
        name: Callable[[], str | None],
        *,
        is_nested: bool = False,
    ) -> None:
        self._client = client
        self._name = name
        self._before = current_frame()
        if is_nested:
            frame = _nested_frame(headers, client(), self._before)
        else:
            frame = continued_frame(headers, client(), is_trusted=True, is_apart=True)
        super().__init__(frame)

    def headers(self) -> dict[str, str]:
        """Return what a message carries that goes on with this task."""
        return inject(self.frame, is_trusted=True)

    def tell(self, error: BaseException | None, result: object) -> None:
        """Emit the *error*, if the task failed by it."""
        del result
        if error is not None and _errors.is_failure(error):
            self._client().track_error(error, error_component=self._name())

    def leave(self, error: BaseException | None = None, result: object = None) -> None:
        """End the run, and whatever the task itself left open."""
        self.tell_inside(error, result)
        switch(self._before)


def _nested_frame(
    headers: Mapping[str, Any], client: Client, around: Frame | None
) -> Frame:
    headers = {**headers, **to_carry(headers)}
    frame = continued_frame(headers, client, is_trusted=True)
    # In a worker the task would not change its caller's user, nor be its request.
    frame.cell = Cell(frame.cell.user_id)
    frame.request = None
    if around is not None and frame.session_id == around.session_id:
        frame.is_remote = around.is_remote
    return frame


def prepare_forks(client: Callable[[], Client]) -> None:
    """
    Load once, in a worker's main process, what each of its children delivers with.

    A child that runs a single task would take longer for that than for the rest.
    """
    try:
        config = client().config
        if config.enabled and str(config.endpoint).startswith("http"):
            _transport.load()
    except Exception as error:  # noqa: BLE001  the child may do better
        internal_error(error)
