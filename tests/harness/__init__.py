"""
Stand in for the other side of the wire, and run code side by side, forked or afresh.

- `ProductGraph`: what a ProductGraph server answers, as a value, without a socket.
- `Server`: the same over HTTP/1.1 on loopback, with a script of faults.
- The faults: `status`, `hang`, `drop`, `cut`, `drip`, `garbage`, `endless`,
  `redirect` and `poison`.
- `start_together`, `in_fork` and `run_script`: threads, a forked child, a fresh
  interpreter.
- `Background`: a program that runs until it is told to end.
- `interrupts`: a function called in the middle of another, at each bytecode.
- `Call`, `http_scope` and `uvicorn_server`: an ASGI application, called by hand or
  served.
- `hostile_values` and `assert_harmless`: headers that must lead to nothing.
- `load_vectors` and `body_of`: the examples in `tests/vectors`.

It needs the standard library alone and nothing of pgtrack, so it cannot share its
mistakes.
"""

from __future__ import annotations

from .asgi import Call, http_scope, uvicorn_server
from .background import Background
from .faults import (
    cut,
    drip,
    drop,
    endless,
    garbage,
    hang,
    poison,
    redirect,
    status,
)
from .hostile import assert_harmless, fits, hostile_values
from .interrupts import Interrupt, interrupts
from .productgraph import VERSIONS, ProductGraph, Reply, Request
from .runners import ChildError, in_fork, run_script, start_together
from .server import Exchange, Server, Step, Wire
from .vectors import body_of, load_vectors

__all__ = [
    "VERSIONS",
    "Background",
    "Call",
    "ChildError",
    "Exchange",
    "Interrupt",
    "ProductGraph",
    "Reply",
    "Request",
    "Server",
    "Step",
    "Wire",
    "assert_harmless",
    "body_of",
    "cut",
    "drip",
    "drop",
    "endless",
    "fits",
    "garbage",
    "hang",
    "hostile_values",
    "http_scope",
    "in_fork",
    "interrupts",
    "load_vectors",
    "poison",
    "redirect",
    "run_script",
    "start_together",
    "status",
    "uvicorn_server",
]
