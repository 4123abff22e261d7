"""
Wall time, monotonic time, waiting and ids: the only file that touches them.

The wall clock is looked up at each call, so that freezegun can stop it for
stamps.  The monotonic clock is held from import on, out of freezegun's reach:
a deadline measured on a stopped clock never comes.
"""

from __future__ import annotations

import collections
import math
import os
import threading
import time

__all__ = [
    "SYSTEM_CLOCK",
    "Signal",
    "SystemClock",
    "format_time",
    "new_id",
    "new_ids",
    "seconds",
]


class Signal:
    """
    A wake-up that may be given from anywhere, any number of times.

    `threading.Event` takes a lock that a signal handler or a finaliser could
    find already taken by the very code it interrupts.  Here giving is one
    atomic call that never waits; signals not yet waited for are one.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def give(self) -> None:
        """Wake the waiter, now or when it next waits."""
        try:  # noqa: SIM105  a context manager may be interrupted half-way
            self._lock.release()
        except RuntimeError:  # given already
            pass

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until given, at most *timeout* seconds; True if it was given."""
        if timeout is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=seconds(timeout))


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)

    def time_ns(self) -> int:
        """Return nanoseconds since 1970-01-01 UTC."""
        return time.time_ns()

    def wait(self, signal: Signal, timeout: float | None) -> None:
        """Wait for *signal*, at most *timeout* seconds."""
        signal.wait(timeout)


SYSTEM_CLOCK = SystemClock()


def seconds(timeout: object) -> float:
    """
    Return *timeout* as seconds that can be waited for; what is negative is 0.

    Raises:
        TypeError: If it is no number.
    """
    try:
        number = float(timeout)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(timeout, str) or math.isnan(number):
        msg = (
            f"timeout must be a number of seconds (got {type(timeout).__name__}). "
            "Use 5.0, or math.inf to wait for as long as it takes."
        )
        raise TypeError(msg)
    return min(max(number, 0.0), threading.TIMEOUT_MAX)


def new_ids(count: int) -> list[str]:
    """
    Return *count* random UUIDs (RFC 9562, version 4) as text.

    One read of the system's generator serves them all.
    """
    digits = os.urandom(16 * count).hex()
    ids = []
    for start in range(0, 32 * count, 32):
        d = digits[start : start + 32]
        variant = "89ab"[int(d[16], 16) & 3]
        ids.append(f"{d[:8]}-{d[8:12]}-4{d[13:16]}-{variant}{d[17:20]}-{d[20:]}")
    return ids


_ids: collections.deque[str] = collections.deque()
"""Ids made ahead; taking one is one call into C, whoever else does so at once."""

_AHEAD = 64


def new_id() -> str:
    """
    Return one random UUID as text.

    The system's generator is read for many at once: each read lets go of the
    interpreter, and to get it back may take longer than all else a request costs.
    """
    try:
        return _ids.popleft()
    except IndexError:
        made = new_ids(_AHEAD)
        _ids.extend(made[1:])
        return made[0]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ids.clear)  # they are the parent's


_FIRST = -62_135_596_800 * 10**9  # 0001-01-01T00:00:00Z
_LAST = 253_402_300_800 * 10**9 - 1  # 9999-12-31T23:59:59.999999Z


def format_time(time_ns: int) -> str:
    """
    Return a time as RFC 3339 text in UTC with six digits and `Z`.

    Times outside of the years 1 to 9999, which the format cannot write, are
    moved to the nearest that it can.
    """
    second, rest = divmod(min(max(time_ns, _FIRST), _LAST), 10**9)
    year, month, day, hour, minute, sec, *_ = time.gmtime(second)
    return (
        f"{year:04d}-{month:02d}-{day:02d}"
        f"T{hour:02d}:{minute:02d}:{sec:02d}.{rest // 1000:06d}Z"
    )
