"""
structlog: session, request and user in each event dictionary.

`add_context` is a processor, to stand anywhere before the renderer.  It works without
any configuration of pgtrack, with structlog's own loggers and with those of `logging`.
Opt out by not naming it among the processors.
"""

from __future__ import annotations

from pgtrack._context import current_frame
from pgtrack.integrations._requirement import requirement

with requirement("structlog", extra="structlog"):
    from structlog.typing import EventDict, WrappedLogger  # noqa: TC002  see above

__all__ = ["add_context"]


def add_context(
    logger: WrappedLogger, method_name: str, event_dict: EventDict
) -> EventDict:
    """
    Add `session_id`, `request_id` and `user_id` where they are known.

    What the dictionary has under one of these keys stays.

    Args:
        logger: Not looked at, nor is the next.

        method_name: What structlog calls it by.

        event_dict: What is logged; changed in place.
    """
    del logger, method_name
    frame = current_frame()
    if frame is not None:
        values = (
            ("session_id", frame.session_id),
            ("request_id", frame.request_id),
            ("user_id", frame.cell.user_id),
        )
        for key, value in values:
            if value is not None:
                event_dict.setdefault(key, value)
    return event_dict
