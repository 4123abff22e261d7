"""
Every error that pgtrack raises.

    PgtrackError
    ├── ConfigError            (also a ValueError)   a setting or variable is wrong
    ├── InvalidEventError      (also a ValueError)   a wire object is not an event
    ├── MissingDependencyError (also an ImportError) an extra is not installed
    └── TransportError         an endpoint could not be used

Errors are raised at import, decoration and configuration, and by the explicit
parsers.  A running host never sees one: there, what cannot be used is
converted, cut or dropped, and counted in `pgtrack.stats()`.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "InvalidEventError",
    "MissingDependencyError",
    "PgtrackError",
    "TransportError",
]


class PgtrackError(Exception):
    """The base of every error that pgtrack raises."""


class ConfigError(PgtrackError, ValueError):
    """A setting is wrong: the message names it, the rule and the fix."""


class InvalidEventError(PgtrackError, ValueError):
    """An object that came over the wire is not a ProductGraph event."""


class MissingDependencyError(PgtrackError, ImportError):
    """A feature needs a package that an extra of pgtrack would have installed."""


class TransportError(PgtrackError):
    """A transport could not reach, or make sense of, its endpoint."""
