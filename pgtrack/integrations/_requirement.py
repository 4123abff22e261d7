"""
What an integration says where its package is missing.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from pgtrack.exceptions import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["requirement"]


@contextmanager
def requirement(package: str, *, extra: str) -> Iterator[None]:
    """
    Explain, where *package* cannot be imported inside, which extra brings it.

    A package that is there, but fails by itself, goes on to fail in its own words.

    Args:
        package: The name by which it is imported.

        extra: The extra of pgtrack's.

    Raises:
        MissingDependencyError: If it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        msg = (
            f"pgtrack.integrations.{extra} needs the package {package!r}, which is not "
            f"installed. Install it by: pip install 'pgtrack[{extra}]'"
        )
        raise MissingDependencyError(msg, name=error.name) from error
