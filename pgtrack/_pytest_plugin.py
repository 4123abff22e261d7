"""
The pytest plugin: the fixture `pgtrack_events`.

pytest loads it wherever pgtrack is installed, so it does nothing until the fixture is
asked for.  `-p no:pgtrack` leaves it out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgtrack.testing import Events


@pytest.fixture
def pgtrack_events() -> Iterator[Events]:
    """Events that the test emits: a list, without a thread or a network."""
    from pgtrack.testing import capture  # with the first test that needs it

    with capture() as events:
        yield events
