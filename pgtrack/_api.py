"""
The default client, and the verbs that use it.

The client is made by `configure`, else from the environment at its first use, else it
is one that does nothing.  Verbs look it up at each call, so that whatever was decorated
or imported before `configure` works after it.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from pgtrack import _context, _diagnostics, _propagation, _tracing
from pgtrack._client import Client, in_thread, spells_out
from pgtrack._clock import SYSTEM_CLOCK, seconds
from pgtrack._config import Config, is_left_out
from pgtrack._ledger import Stats
from pgtrack.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from pgtrack._config import ConfigOptions
    from pgtrack._context import Context
    from pgtrack._event import EventFields, StepFields
    from pgtrack.typing import EventType, Transport

__all__ = [
    "configure",
    "current",
    "default_client",
    "emit",
    "flush",
    "identify",
    "propagation_headers",
    "shutdown",
    "stats",
    "swap_default",
    "track_api_call",
    "track_error",
    "track_journey_step",
]

_client: Client | None = None
_retired: list[Client] = []
_past = Stats()
"""What retired clients that have ended leave behind."""

_configuring = threading.RLock()
"""Held while the default client is replaced; nothing that takes time is done in it."""


def default_client() -> Client:
    """Return the default client; a disabled one where nothing was configured."""
    client = _client
    return client if client is not None else _from_environment()


def _from_environment() -> Client:
    """Make the default client of the environment; a wrong variable disables it."""
    global _client  # noqa: PLW0603  the one default client
    try:
        client = Client(Config.from_env())
    except (ConfigError, OSError, RecursionError) as error:
        _diagnostics.note("configuration", f"pgtrack is disabled: {error}", 40)
        _diagnostics.tell()
        client = Client(Config.disabled())
    with _configuring:
        if _client is None:
            _client = client
        return _client


def swap_default(client: Client | None) -> Client | None:
    """Make *client* the default and return what was; for `pgtrack.testing`."""
    global _client
    with _configuring:
        before, _client = _client, client
        return before


def configure(
    *,
    transport: Callable[[], Transport] | None = None,
    **options: Unpack[ConfigOptions],
) -> Client:
    """
    Make the default client, which all verbs, decorators and blocks use.

    With the options it already has, the present client is returned.  With others a new
    one takes over, and the old one delivers what it holds in the background.

    Args:
        transport: Makes what carries the events, instead of the endpoint's own, such as
            an `OTLPTransport`; called once in each process.  The same function, for
            `configure` to return the present client.

        options: The fields of `pgtrack.Config`.  What is not given comes from
            `PRODUCTGRAPH_<NAME>`, else from the default.  Giving `endpoint` enables.

    Raises:
        ConfigError: If a setting is wrong.  The present client is then kept.
    """
    global _client, _past  # noqa: PLW0603  the one default client
    before = _client
    if before is not None and before.is_pinned:
        Config.isolated(**options)  # a wrong setting is told all the same
        return before
    config = Config(**options)
    if not config.enabled and is_left_out(options):
        _diagnostics.note("left out", _LEFT_OUT)
        _diagnostics.tell()
    with _configuring:
        before = _client
        if before is not None and before.is_like(config, transport):
            return before
        _client = client = Client(config, transport=transport)
        for old in [old for old in _retired if old.has_ended]:
            _retired.remove(old)
            _past += old.stats()
        if before is not None and before.is_enabled:
            _retired.append(before)
    if before is not None:
        before.retire()
    return client


_LEFT_OUT = (
    "pgtrack.configure() leaves pgtrack disabled: PRODUCTGRAPH_ENDPOINT enables it "
    "only with PRODUCTGRAPH_ENABLED=true. Set that, or set it to false."
)


@spells_out
def emit(event_type: EventType | str, /, **fields: Unpack[EventFields]) -> bool:
    """Emit one event by the default client; see `Client.emit`."""
    return default_client().emit(event_type, **fields)


@spells_out
def track_api_call(
    method: str,
    path: str,
    status_code: int = 200,
    *,
    duration: float | None = None,
    **fields: Unpack[EventFields],
) -> bool:
    """Emit an `api.response` event; *duration* is seconds.  See `Client`."""
    client = default_client()
    return client.track_api_call(method, path, status_code, duration=duration, **fields)


@spells_out
def track_error(
    error: BaseException | str,
    message: str | None = None,
    /,
    **fields: Unpack[EventFields],
) -> bool:
    """Emit an `error` event of an exception, or of a type and message; see `Client`."""
    return default_client().track_error(error, message, **fields)


@spells_out
def track_journey_step(
    journey_id: str,
    step_id: str,
    step_name: str | None = None,
    **fields: Unpack[StepFields],
) -> bool:
    """Emit a `journey.step` event for a step that was completed.  See `Client`."""
    client = default_client()
    return client.track_journey_step(journey_id, step_id, step_name, **fields)


def identify(user_id: str | int | None) -> None:
    """
    Name the user of the running request or session; None forgets.

    All blocks, threads and tasks of the same request or session see it, and the
    request's own event too, whenever it is called.  Outside of any unit of work there
    is nobody it could be kept for without being seen by the next one: it has no effect,
    and the log says so.

    Args:
        user_id: 1 to 255 visible ASCII characters, or an integer or UUID; anything else
            is counted in `stats().adjusted["user_id"]`, and then there is no user.
    """
    frame = _context.current_frame()
    if frame is None:
        _diagnostics.note(
            "identify",
            "pgtrack.identify() was called outside of any session or request, and has "
            "no effect there. Call it inside `with pgtrack.session(...)` or a request.",
        )
        return
    if user_id is not None:
        user_id = default_client().checked_user_id(user_id)
    frame.cell.user_id = user_id
    _tracing.identified(frame)


def current() -> Context:
    """Return the correlation of the running context."""
    return _context.context_of(_context.current_frame())


def propagation_headers(trusted: bool = False) -> dict[str, str]:  # noqa: FBT001, FBT002
    """
    Return the headers that carry the correlation to another service.

    Args:
        trusted: Whether the carrier cannot be read by outsiders: user and journey are
            then carried as well.

    Returns:
        `X-Session-ID` and `X-Request-ID`, and `X-User-ID` and `X-Journey-ID` if
        trusted; each only where it is set.
    """
    return _propagation.inject(_context.current_frame(), is_trusted=trusted)


def stats() -> Stats:
    """Return the ledger of the default client, and of those it took over from."""
    with _configuring:
        total = _past
        for client in (*_retired, default_client()):
            total += client.stats()
        return total


def flush(timeout: float = 5.0) -> bool:
    """
    Wait until all that this process emitted before came to an end.  See `Client.flush`.
    """
    return _each("flush", timeout)


def shutdown(timeout: float = 5.0) -> bool:
    """Flush and stop for good; `configure` may start again.  See `Client.close`."""
    return _each("close", timeout)


async def aflush(timeout: float = 5.0) -> bool:
    """Do what `flush` does without holding up the event loop."""
    return await in_thread(flush, timeout)


async def ashutdown(timeout: float = 5.0) -> bool:
    """Do what `shutdown` does without holding up the event loop."""
    return await in_thread(shutdown, timeout)


def _each(verb: str, timeout: float) -> bool:
    deadline = SYSTEM_CLOCK.monotonic() + seconds(timeout)
    is_done = True
    for client in (*_retired, default_client()):
        left = max(deadline - SYSTEM_CLOCK.monotonic(), 0.0)
        is_done = getattr(client, verb)(left) and is_done
    return is_done


def _after_fork_in_child() -> None:
    """Start with a free lock, whoever held it, and an empty ledger."""
    global _configuring, _past  # noqa: PLW0603  a lock cannot be released for the dead
    _configuring = threading.RLock()
    _past = Stats()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
