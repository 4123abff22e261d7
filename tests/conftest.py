"""What every test starts from, and what none may leave behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from harness import heed_signals
from pgtrack import Stats, _api, _context, _diagnostics, _folder

if TYPE_CHECKING:
    from collections.abc import Iterator


# For Pythons beside the one that has the full tests: they may differ in how they take a
# kind of value, hardly in how they take one more of a kind.
settings.register_profile("brief", max_examples=30)


def pytest_configure() -> None:
    """Have signals end the processes that tests start."""
    heed_signals()


def pytest_collection_finish() -> None:
    """
    Leave what is loaded by now out of every collection of garbage.

    It stays to the end. A collection that looks through all of it takes a tenth of a
    second, and many tests ask for one.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let plugins that come late look at everything again."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine configures pgtrack."""
    for name in list(os.environ):
        if name.startswith("PRODUCTGRAPH_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _fresh_kit(
    monkeypatch: pytest.MonkeyPatch,
    _no_leaked_thread: None,  # looks when this one has closed the clients
) -> Iterator[None]:
    """No default client, correlation, log line or lock; our errors are raised."""
    monkeypatch.setattr(_diagnostics, "reraise", True)
    _diagnostics._notes.clear()
    _diagnostics._quiet_until.clear()
    _context.switch(None)
    _api.swap_default(None)
    yield
    client = _api.swap_default(None)
    for used in (*_api._retired, *([] if client is None else [client])):
        used.close(0.0)
    _api._retired.clear()
    _api._past = Stats()
    _folder.disown_all()
    _context.switch(None)


@pytest.fixture(autouse=True)
def _no_leaked_thread() -> Iterator[None]:
    """Every thread that a test started has ended with it."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("Trio thread"):
            continue  # trio keeps idle threads for some seconds
        thread.join(max(deadline - time.monotonic(), 0))
        assert not thread.is_alive(), f"{thread.name} was left running"
