"""
The pytest plugin: the fixture `pgtrack_events`.

pgtrack is imported by the fixture rather than with the plugin, so that a project that
measures coverage, or does not use the fixture, is not disturbed.  `-p no:pgtrack`
leaves the plugin out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pgtrack.testing import Events


@pytest.fixture
def pgtrack_events() -> Iterator[Events]:
    """Events that the test emits: a list, without a thread or a network."""
    from pgtrack.testing import capture  # noqa: PLC0415  see above

    with capture() as events:
        yield events
