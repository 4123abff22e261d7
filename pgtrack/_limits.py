"""
Sampling and rates, by session.

Both decide on the caller's thread, before any other work is done for the event.
"""

from __future__ import annotations

import zlib

from pgtrack._ledger import Tally

__all__ = ["RateLimit", "is_sampled"]

_HASH_RANGE = 2**32


def is_sampled(session_id: str, rate: float) -> bool:
    """
    Return whether the events of a session are kept at a *rate* of 0 to 1.

    The answer depends on the id alone, so that every process and service that uses the
    same rate keeps the same sessions, whole.
    """
    return _hash(session_id) < rate * _HASH_RANGE


class RateLimit:
    """
    At most so many events a second from any one session.

    Counts within each whole second of the monotonic clock.  Sessions are hashed onto
    a fixed number of counters, so that an attacker who invents sessions fills
    no memory; two sessions that share a counter, which is rare, share its limit.
    """

    _COUNTERS = 4_096

    __slots__ = ("_rate", "_seconds")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._seconds: dict[int, dict[int, Tally]] = {}

    def allows(self, session_id: str, now: float) -> bool:
        """Return whether one more event of the session, at the time *now*, may pass."""
        second = int(now)
        tallies = self._seconds.get(second)
        if tallies is None:
            tallies = self._seconds.setdefault(second, {})
            for past in [key for key in self._seconds.copy() if key < second]:
                self._seconds.pop(past, None)
        bucket = _hash(session_id) % self._COUNTERS
        tally = tallies.get(bucket) or tallies.setdefault(bucket, Tally())
        return tally.add(1) <= self._rate


def _hash(session_id: str) -> int:
    """Return a number below `_HASH_RANGE`, the same in every process."""
    return zlib.crc32(session_id.encode())
