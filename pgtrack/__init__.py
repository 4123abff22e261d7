"""
pgtrack: backend events that share a session with the browser's.

Decorators, blocks and verbs fill in the correlation (session, request, user, journey)
and hand events to one batching client, which sends them to a ProductGraph server.
"""

from pgtrack._api import (
    aflush,
    ashutdown,
    configure,
    current,
    emit,
    flush,
    identify,
    propagation_headers,
    shutdown,
    stats,
    track_api_call,
    track_error,
    track_journey_step,
)
from pgtrack._blocks import api_call, continued_from, journey, session
from pgtrack._client import Client
from pgtrack._config import Config
from pgtrack._context import Context
from pgtrack._decorators import bind, journey_step, track_api
from pgtrack._event import Event
from pgtrack._ledger import Stats
from pgtrack.exceptions import ConfigError, PgtrackError

__all__ = [
    "Client",
    "Config",
    "ConfigError",
    "Context",
    "Event",
    "PgtrackError",
    "Stats",
    "aflush",
    "api_call",
    "ashutdown",
    "bind",
    "configure",
    "continued_from",
    "current",
    "emit",
    "flush",
    "identify",
    "journey",
    "journey_step",
    "propagation_headers",
    "session",
    "shutdown",
    "stats",
    "track_api",
    "track_api_call",
    "track_error",
    "track_journey_step",
]

__version__ = "0.1.0"
