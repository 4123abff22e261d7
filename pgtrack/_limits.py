"""
Sampling and rates, by session.

Both decide on the caller's thread, before any other work is done for the event.
"""

from __future__ import annotations

import collections
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
    return zlib.crc32(session_id.encode("utf-8", "replace")) < rate * _HASH_RANGE


class RateLimit:
    """
    At most so many events a second from any one session.

    Counts within each whole second of the monotonic clock.  Sessions are hashed onto
    a fixed number of counters, so that an attacker who invents sessions fills
    no memory; two sessions that share a counter, which is rare, share its limit.
    """

    _COUNTERS = 4_096

    __slots__ = ("_rate", "_second", "_tallies")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._second = -1
        self._tallies: dict[int, Tally] = {}

    def allows(self, session_id: str, now: float) -> bool:
        """Return whether one more event of the session, at the time *now*, may pass."""
        second = int(now)
        if second != self._second:
            self._second = second
            self._tallies = collections.defaultdict(Tally)
        bucket = zlib.crc32(session_id.encode("utf-8", "replace")) % self._COUNTERS
        return self._tallies[bucket].add(1) <= self._rate
