"""
Stand in for the other side of the wire, and run code side by side, forked or afresh.

- `ProductGraph`: what a ProductGraph server answers, as a value, without a socket.
- `Counting`: one that is quick, and remembers ids alone.
- `Server`: the same over HTTP/1.1 on loopback, with a script of faults.
- The faults of an answer: `status`, `hang`, `drop`, `reset`, `leave`, `cut`, `drip`,
  `garbage`, `endless`, `endless_header`, `interim`, `redirect`, `poison` and `reject`.
- Those of a connection: `ignore`, `sip` and `hang_up`. A port that refuses, or is
  jammed, is the `Server`'s own doing.
- `start_together`, `in_fork` and `run_script`: threads, a forked child, a fresh
  interpreter; `heed_signals`, so that signals end them.
- `BrokenDisk` and `open_descriptors`: system calls that fail, and what they leave open.
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
from .counting import Counting
from .disk import BrokenDisk, open_descriptors
from .faults import (
    cut,
    drip,
    drop,
    endless,
    endless_header,
    garbage,
    hang,
    hang_up,
    ignore,
    interim,
    leave,
    poison,
    redirect,
    reject,
    reset,
    sip,
    status,
)
from .hostile import assert_harmless, fits, hostile_values
from .interrupts import Interrupt, interrupts
from .productgraph import VERSIONS, ProductGraph, Reply, Request
from .runners import ChildError, heed_signals, in_fork, run_script, start_together
from .server import Arrival, Exchange, Server, Step, Welcome, Wire
from .vectors import body_of, load_vectors

__all__ = [
    "VERSIONS",
    "Arrival",
    "Background",
    "BrokenDisk",
    "Call",
    "ChildError",
    "Counting",
    "Exchange",
    "Interrupt",
    "ProductGraph",
    "Reply",
    "Request",
    "Server",
    "Step",
    "Welcome",
    "Wire",
    "assert_harmless",
    "body_of",
    "cut",
    "drip",
    "drop",
    "endless",
    "endless_header",
    "fits",
    "garbage",
    "hang",
    "hang_up",
    "heed_signals",
    "hostile_values",
    "http_scope",
    "ignore",
    "in_fork",
    "interim",
    "interrupts",
    "leave",
    "load_vectors",
    "open_descriptors",
    "poison",
    "redirect",
    "reject",
    "reset",
    "run_script",
    "sip",
    "start_together",
    "status",
    "uvicorn_server",
]
