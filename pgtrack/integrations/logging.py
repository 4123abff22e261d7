"""
Logging: session, request and user on each record.

`ContextFilter` goes on a handler, where it sees the records of every logger; nothing is
patched, and no record is held back.  It works without any configuration of pgtrack.
Opt out by not adding it.
"""

from __future__ import annotations

import logging

from pgtrack._context import current_frame

__all__ = ["ContextFilter"]


class ContextFilter(logging.Filter):
    """
    Add `session_id`, `request_id` and `user_id` to each record.

    A record that has one of them, by `extra` or from a filter before, keeps it.  Every
    record passes.  The filter must run in the thread or task that logs: on a
    `QueueHandler`, not on the handlers of its listener.

    Args:
        default: What stands where there is none; None for formatters that write JSON.
    """

    def __init__(self, default: str | None = "-") -> None:
        super().__init__()
        self.default = default

    def filter(self, record: logging.LogRecord) -> bool:
        """Add what is missing, and let the record pass."""
        frame = current_frame()
        values: dict[str, str | None] = {
            "session_id": None,
            "request_id": None,
            "user_id": None,
        }
        if frame is not None:
            values["session_id"] = frame.session_id
            values["request_id"] = frame.request_id
            values["user_id"] = frame.cell.user_id
        for name, value in values.items():
            record.__dict__.setdefault(name, self.default if value is None else value)
        return True
