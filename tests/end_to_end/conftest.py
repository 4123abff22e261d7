"""A server for each test that wants one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import Server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(name="server")
def _server() -> Iterator[Server]:
    """Return a strict ProductGraph server on loopback."""
    with Server() as server:
        yield server
