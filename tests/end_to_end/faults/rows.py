"""
The table of faults: what the world does, and where the events end.

One row, one fault; `world.py` runs it, `table.py` writes it down. Rows that heal do so
when all events are emitted; what does not heal is well again for the next process.
"""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import ssl
import threading
from typing import TYPE_CHECKING, Any

import trustme

from end_to_end.faults.world import ALL, ANY, SOME, Ends, Row, World
from harness import (
    Server,
    cut,
    drip,
    drop,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness import Step

_DELIVERED = Ends()
_DUPLICATED = Ends(duplicates=SOME)
_FOR_THE_NEXT = Ends(by_next=ALL)
_ALSO_FOR_THE_NEXT = Ends(by_next=ALL, duplicates=SOME)


def _dropped(reason: str) -> Ends:
    return Ends(delivered=0, dropped={reason: ALL})


# --- worlds ---


def _default(make: Callable[[World], Step]) -> Callable[[World], None]:
    def world(world: World) -> None:
        world.server.default = make(world)

    return world


def _script(make: Callable[[], Sequence[Step | None]]) -> Callable[[World], None]:
    def world(world: World) -> None:
        world.server.script = list(make())

    return world


def _welcome(make: Callable[[World], Any]) -> Callable[[World], None]:
    def world(world: World) -> None:
        world.server.welcome = make(world)

    return world


def _shut(world: World) -> None:
    world.keep_shut()


def _jam(world: World) -> None:
    world.keep_shut()
    world.server.jam()


def _be_well(world: World) -> None:
    world.be_well()


def _be_well_once_stored(world: World) -> None:
    world.server.wait_for(1)
    world.be_well()


def _limit_body(world: World) -> None:
    world.server.core.max_body = 4_000


def _to_another_host(world: World) -> None:
    elsewhere = Server()
    world.elsewhere.append(elsewhere)
    world.server.default = redirect(elsewhere.url)


def _nowhere(world: World) -> None:
    """Let the endpoint's name lead nowhere: no such name can be registered."""
    _, port = world.server.address
    world.options["endpoint"] = f"http://collector.invalid:{port}/v1/events"
    world.options["allow_insecure"] = True


def _proxy_that_refuses(world: World) -> None:
    proxy = Server(is_open=False)
    world.elsewhere.append(proxy)
    world.options["proxy"] = proxy.url


def _proxy_that_hangs(world: World) -> None:
    proxy = Server(is_open=False)
    proxy.welcome = ignore(threading.Event())
    proxy.open()
    world.elsewhere.append(proxy)
    world.options["proxy"] = proxy.url


def _without_proxy(world: World) -> None:
    del world.options["proxy"]


def _tls(identity: str, **options: Any) -> Callable[[World], None]:
    def world(world: World) -> None:
        authority = trustme.CA()
        bundle = world.folder / "ca.pem"
        authority.cert_pem.write_to_path(str(bundle))
        world.options["ca_bundle"] = str(bundle)
        world.server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(identity, **options).configure_cert(world.server.tls)
        renewed = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(renewed)
        world.renewed = renewed  # type: ignore[attr-defined]

    return world


def _renew(world: World) -> None:
    world.server.tls = world.renewed  # type: ignore[attr-defined]


def _hang_in_handshake(world: World) -> None:
    _tls("127.0.0.1")(world)
    world.options["endpoint"] = world.server.url
    world.server.tls = None
    world.server.welcome = ignore(threading.Event())


def _after_handshake(world: World) -> None:
    _renew(world)
    world.be_well()


_YESTERDAY = dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=1)

# --- a broken spool ---


def _files(world: World) -> list[Any]:
    assert world.spool is not None
    return sorted(world.spool.rglob("*.batch"))


def _flip_a_bit(world: World) -> None:
    path = _files(world)[0]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def _truncate(world: World) -> None:
    path = _files(world)[0]
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:50])


def _empty(world: World) -> None:
    _files(world)[0].write_bytes(b"")


def _garbage_file(world: World) -> None:
    path = _files(world)[0]
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def _tear_journal(world: World) -> None:
    """Cut the last line of what was written last."""
    assert world.spool is not None
    files = [*world.spool.rglob("*.batch"), *world.spool.rglob("*.journal")]
    last = max((f for f in files if f.stat().st_size), key=lambda file: file.name)
    last.write_bytes(last.read_bytes()[:-20])


def _strangers(world: World) -> None:
    """Put into the spool what no spool has, and what looks alike."""
    folder = _files(world)[0].parent
    (folder / "notes.txt").write_text("somebody's")
    (folder / "1-1.batch").write_text("not a name of ours")
    (folder / f"{1:020}-1.batch").mkdir()
    (folder / f"{3:020}-1.batch").symlink_to("/dev/zero")
    os.mkfifo(folder / f"{2:020}-1.batch")
    (folder.parent / "stranger").mkdir()
    (folder.parent.parent / "stranger").write_text("somebody's")


# --- the table ---

_HEALS = {"program": {"flush": 30.0}, "heal": _be_well, "has_failed": True}
_SHORT = {"options": {"timeout": 1.0, "exit_timeout": 0.5}}
_IMPATIENT = {"options": {"timeout": 1.0}}
_HEALS_IMPATIENT = {"program": {"flush": 30.0, **_IMPATIENT}}
_STORED = {"heal": _be_well_once_stored}


def _answers() -> Iterator[Row]:
    """Yield faults of a server that is there; each heals once all is emitted."""

    def heals(
        name: str,
        fault: str,
        world: Callable[[World], None],
        ends: Ends = _DELIVERED,
        **more: Any,
    ) -> Row:
        return Row(
            **{
                "name": name,
                "fault": fault,
                "world": world,
                "plain": ends,
                "spooled": ends,
                **_HEALS,
                **more,
            }
        )

    yield heals(
        "refuses-then-listens", "nothing listens, then the server comes up", _shut
    )
    yield heals(
        "backlog",
        "the backlog is full: no answer to connecting, then room",
        _jam,
        Ends(duplicates=ANY),
        **_HEALS_IMPATIENT,
    )
    yield heals(
        "restart",
        "the server goes away in the middle, and comes back",
        lambda world: None,
        Ends(duplicates=ANY),
        heal=lambda world: (world.server.shut(), world.server.open()),
        has_failed=False,
    )
    yield heals(
        "reset-at-once",
        "connections are reset as soon as they are there",
        _welcome(lambda _: hang_up(is_reset=True)),
    )
    yield heals(
        "closed-at-once",
        "connections are closed as soon as they are there",
        _welcome(lambda _: hang_up()),
    )
    yield heals(
        "never-reads",
        "connections are accepted and never read",
        _welcome(lambda world: ignore(world.release)),
        Ends(duplicates=ANY),
        **_HEALS_IMPATIENT,
    )
    yield heals(
        "reads-slowly",
        "the server reads byte by byte",
        _welcome(lambda _: sip(0.001)),
        Ends(duplicates=ANY),
        **_HEALS_IMPATIENT,
    )
    yield heals("drop", "connections are closed without an answer", _default(_drop))
    yield heals("reset", "connections are reset instead of an answer", _default(_reset))
    yield heals(
        "cut-header",
        "the answer is cut in the middle of its headers; the events were stored",
        _default(lambda _: cut(20)),
        _DUPLICATED,
        **_STORED,
    )
    yield heals(
        "cut-body",
        "the answer is cut in the middle of its body; the events were stored",
        _default(lambda _: cut(85)),
        _DUPLICATED,
        **_STORED,
    )
    yield heals(
        "hangs",
        "requests are read and never answered, then they are",
        _default(lambda world: hang(world.release)),
        Ends(duplicates=ANY),
        **_HEALS_IMPATIENT,
    )
    yield heals(
        "answers-slowly",
        "the answer comes byte by byte, for longer than `timeout`; stored",
        _default(lambda _: drip(0.05)),
        _DUPLICATED,
        **_HEALS_IMPATIENT,
        **_STORED,
    )
    yield heals(
        "garbage",
        "the answer is no HTTP",
        _default(lambda _: garbage(b"\x16\x03\x01 canary? no\0\xff" * 9)),
    )
    yield heals(
        "huge-header",
        "the answer has a header of 1 MB",
        _default(lambda _: status(202, {"X-Huge": "x" * 1_000_000})),
    )
    yield heals(
        "endless-header",
        "the answer has a header without an end",
        _default(lambda _: endless_header()),
    )
    yield heals(
        "endless-body",
        "the answer has a body without an end",
        _default(lambda _: status(500, body=b" " * 8_000_000)),
    )
    yield heals(
        "interim",
        "interim answers (1xx) without an end",
        _default(lambda _: interim()),
        Ends(duplicates=ANY),  # as wherever an answer may come too late
        **_HEALS_IMPATIENT,
    )
    yield heals(
        "503",
        "503 for a while",
        _default(lambda _: status(503)),
    )
    yield heals(
        "503-some",
        "503 to every other request",
        _script(lambda: [status(503), None] * 4),
        heal=None,
    )
    yield heals(
        "500-stored",
        "500 although the events were stored",
        _default(lambda _: status(500, then_store=True)),
        _DUPLICATED,
        **_STORED,
    )
    yield heals(
        "429",
        "429 with `Retry-After: 1`",
        _script(lambda: [status(429, {"Retry-After": "1"})]),
        heal=None,
    )
    yield heals(
        "413",
        "413 above 4 KB",
        _limit_body,
        heal=None,
        has_failed=True,
    )
    yield heals(
        "poison",
        "400 to batches with one bad event",
        _default(lambda _: poison(_is_tenth)),
        Ends(delivered=199, rejected={"400 invalid request body": 1}),
        heal=None,
    )
    yield heals(
        "400",
        "400 to everything",
        _default(lambda _: status(400, body=b"no")),
    )
    yield heals("401", "401: a wrong key", _default(lambda _: status(401)))
    yield heals("404", "404: a wrong address", _default(lambda _: status(404)))
    yield heals(
        "redirect-loop",
        "redirects to itself",
        _default(lambda _: redirect("/v1/events")),
    )
    yield heals(
        "redirect-elsewhere",
        "redirects to another host, which must get nothing",
        _to_another_host,
    )
    yield heals(
        "rejected-entries",
        "202 that rejects one of the events",
        _default(lambda _: reject(_is_tenth, "no such journey")),
        Ends(delivered=199, rejected={"no such journey": 1}),
        heal=None,
        has_failed=False,
    )
    yield heals(
        "web-page",
        "202 with a web page: somebody else's server",
        _default(
            lambda _: status(202, {"Content-Type": "text/html"}, b"<html>Welcome")
        ),
    )
    yield heals(
        "204",
        "204 without a body",
        _default(lambda _: status(204, then_store=True)),
        heal=None,
        has_failed=False,
    )
    yield heals(
        "kept-alive",
        "kept connections are closed between requests",
        _default(lambda _: leave()),
        heal=None,
        has_failed=False,
    )
    yield heals(
        "expired-renewed",
        "an expired certificate, then a new one",
        _tls("127.0.0.1", not_after=_YESTERDAY),
        heal=_renew,
    )


def _drop(_: World) -> Step:
    return drop()


def _reset(_: World) -> Step:
    return reset()


def _is_tenth(event: Mapping[str, Any]) -> bool:
    return bool(event["event.name"] == "a-10")


def _lasting() -> Iterator[Row]:
    """Yield faults that do not heal before the process ends."""

    def lasts(
        name: str, fault: str, world: Callable[[World], None], **more: Any
    ) -> Row:
        return Row(
            **{
                "name": name,
                "fault": fault,
                "world": world,
                "plain": _dropped("shutdown"),
                "spooled": _FOR_THE_NEXT,
                "has_failed": True,
                "program": _SHORT,
                **more,
            }
        )

    yield lasts("refused", "nothing listens; the process ends", _shut)
    yield lasts(
        "refused-at-once",
        "nothing listens; the process ends before an attempt has failed",
        _shut,
        has_failed=False,
    )
    yield lasts(
        "refused-flush",
        "nothing listens; the process flushes, closes and ends",
        _shut,
        program={**_SHORT, "ending": "flush_and_close"},
    )
    yield lasts(
        "refused-retry-for",
        "nothing listens for longer than `retry_for`",
        _shut,
        program={
            "options": {**_SHORT["options"], "retry_for": 0.3},
            "at_last": ["outlast_retries"],
        },
        plain=_dropped("retry_expired"),
    )
    yield lasts(
        "hung",
        "requests are never answered; the process ends",
        _default(lambda world: hang(world.release)),
        has_failed=False,
        spooled=Ends(by_next=ALL, duplicates=ANY),
    )
    yield lasts("503-exit", "503; the process ends", _default(lambda _: status(503)))
    yield lasts("401-exit", "401; the process ends", _default(lambda _: status(401)))
    yield lasts(
        "dns",
        "the endpoint's name does not resolve",
        _nowhere,
        next_program={"before": ["a_resolver"]},
    )
    yield lasts(
        "proxy-refuses", "the proxy refuses", _proxy_that_refuses, damage=_without_proxy
    )
    yield lasts(
        "proxy-hangs",
        "the proxy accepts and says nothing",
        _proxy_that_hangs,
        damage=_without_proxy,
    )
    yield lasts(
        "expired",
        "an expired certificate",
        _tls("127.0.0.1", not_after=_YESTERDAY),
        damage=_renew,
    )
    yield lasts(
        "wrong-host",
        "a certificate of another host",
        _tls("collector.example"),
        damage=_renew,
    )
    yield lasts(
        "hangs-in-handshake",
        "no answer to the TLS handshake",
        _hang_in_handshake,
        damage=_after_handshake,
    )


def _processes() -> Iterator[Row]:
    """Yield ways in which a process ends, and places to emit from."""

    def works(name: str, fault: str, ends: Ends = _DELIVERED, **more: Any) -> Row:
        return Row(
            **{"name": name, "fault": fault, "plain": ends, "spooled": ends, **more}
        )

    each = {"options": {"spool_each_event": True}}
    # As many and as long as by default, or more: what is killed has sent nothing yet.
    patient = {"spool_each_event": True, "batch_size": 1_000, "batch_interval": 30.0}
    unsent = {"options": patient}
    yield works(
        "healthy", "none: a script of 1,000 events ends", program={"count": 1000}
    )
    yield works(
        "healthy-few", "none: a script of 30 events ends", program={"count": 30}
    )
    yield works(
        "healthy-each-event",
        "none: with `spool_each_event`, 1,000 events",
        program={**each, "count": 1000},
    )
    yield works(
        "sys-exit", "`sys.exit(3)`", program={"ending": "exit_with_status"}, status=3
    )
    yield works(
        "exception",
        "an exception that nobody catches",
        program={"ending": "fail"},
        status=1,
        stderr=r"Traceback .*\nLookupError: the host's own\n",
    )
    yield works(
        "sigterm",
        "SIGTERM, without a handler",
        program={"ending": "terminate"},
        status=-signal.SIGTERM,
    )
    yield works(
        "sigterm-handler",
        "SIGTERM, with a handler of the host's",
        program={"before": ["a_sigterm_handler"], "ending": "terminate"},
        status=7,
    )
    yield works(
        "sigint",
        "SIGINT",
        program={"ending": "interrupt"},
        status=-signal.SIGINT,
        stderr=r"Traceback .*\nKeyboardInterrupt\n",
    )
    yield works(
        "sigterm-refused",
        "SIGTERM, while nothing listens",
        Ends(delivered=0, lost=ALL),
        world=_shut,
        program={**_SHORT, "ending": "terminate"},
        status=-signal.SIGTERM,
        spooled=_FOR_THE_NEXT,
    )
    yield works(
        "sigkill",
        "SIGKILL (with `spool_each_event`)",
        Ends(delivered=0, lost=ALL),
        program={**unsent, "ending": "kill"},
        status=-signal.SIGKILL,
        spooled=_FOR_THE_NEXT,
    )
    yield works(
        "sigkill-refused",
        "SIGKILL while nothing listens (with `spool_each_event`)",
        Ends(delivered=0, lost=ALL),
        world=_shut,
        program={**each, "ending": "kill"},
        status=-signal.SIGKILL,
        spooled=Ends(by_next=ALL, duplicates=ANY),
    )
    yield works(
        "os-exit",
        "`os._exit()` (with `spool_each_event`)",
        Ends(delivered=0, lost=ALL),
        program={**unsent, "ending": "leave"},
        status=4,
        spooled=_FOR_THE_NEXT,
    )
    yield works(
        "fork",
        "a forked child emits, and ends as a script",
        program={"emits": "half_in_a_child"},
    )
    yield works(
        "fork-os-exit",
        "a forked child emits and leaves by `os._exit` (with `spool_each_event`)",
        Ends(lost=100, delivered=100),
        program={**each, "emits": "half_in_a_child_cut_short"},
        spooled=Ends(by_next=ANY, duplicates=ANY),
    )
    yield works(
        "multiprocessing",
        "a child of `multiprocessing` emits and does not flush",
        program={"emits": "half_in_a_process"},
    )
    yield works(
        "pool",
        "events from the threads of a pool, from the session around it",
        program={"emits": "in_a_pool"},
    )
    yield works(
        "odd-values",
        "values that JSON cannot carry: any object, datetime, bytes, NaN, a lone "
        "surrogate, 5 MB, a cycle, a `__repr__` that raises, 10**400, NUL",
        program={"emits": "odd_values", "count": 50},
    )
    yield works(
        "hook",
        "`before_send` raises for every tenth event",
        Ends(delivered=180, dropped={"before_send_error": 20}),
        program={"options": {"before_send": "hook"}},
    )
    yield works(
        "after-close",
        "ten events after `shutdown()`",
        Ends(dropped={"closed": 10}),
        program={"emits": "with_late_ones"},
    )
    yield works(
        "atexit-late",
        "events from an exit handler that is called before pgtrack's",
        program={"emits": "with_exit_handler"},
    )
    yield works(
        "atexit-early",
        "events from an exit handler that is called after pgtrack's",
        program={
            "before": ["an_early_exit_handler"],
            "emits": "with_early_exit_handler",
        },
        reports_early=True,
    )
    yield works(
        "finalizer",
        "an event from a `__del__` at the end of the interpreter",
        program={"emits": "with_a_finalizer"},
    )
    yield works(
        "signal-handler",
        "events from a signal handler that interrupts emit",
        program={"emits": "in_signal_handlers", "count": 1000},
        may_call=0.02,  # it counts those that interrupt it
    )
    yield works(
        "gevent",
        "ten greenlets under gevent",
        program={"before": ["greenlets"], "emits": "in_greenlets"},
        may_call=0.05,  # the first one starts a greenlet, and waits for it
        is_alone=True,  # gevent wants to be there before all others
    )
    yield works(
        "hang-burst",
        "100,000 events while requests hang; a queue of 10,000",
        Ends(delivered=0, dropped={"queue_full": SOME, "shutdown": ALL}),
        world=_default(lambda world: hang(world.release)),
        program={"count": 100_000, **_SHORT},
        small={
            "count": 3_000,
            "options": {**_SHORT["options"], "max_queue_size": 1_000},
        },
        spooled=Ends(by_next=ALL, dropped={"queue_full": ANY}, duplicates=ANY),
        next_program={"options": {"replay_rate": 20_000}},
        seconds=120.0,
    )
    yield works(
        "threads-burst",
        "20,000 events from eight threads at once; a queue of 1,000",
        Ends(dropped={"queue_full": SOME}),
        program={
            "count": 20_000,
            "threads": 8,
            "options": {"max_queue_size": 1_000},
        },
        small={"count": 5_000},
        seconds=120.0,
    )


_BROKEN = ("full-disk", "read-only-disk", "failing-disk", "small-files")


def _disks() -> Iterator[Row]:
    """Yield faults of the disk: of what is in the spool, or of all writing."""

    def breaks(name: str, fault: str, ends: Ends, **more: Any) -> Row:
        return Row(
            **{
                "name": name,
                "fault": fault,
                "world": _shut,
                "plain": None,
                "spooled": ends,
                "has_failed": True,
                "has_spool_errors": name.partition("-exit")[0] in _BROKEN,
                **more,
            }
        )

    for kind, what in (
        ("full_disk", "full (ENOSPC)"),
        ("read_only_disk", "read-only (EROFS)"),
        ("failing_disk", "failing (EIO)"),
        ("small_files", "over its quota (EFBIG)"),
    ):
        name = kind.replace("_", "-")
        yield breaks(
            name,
            f"the disk is {what}, and nothing listens, then the server comes up",
            _DELIVERED,
            program={"then": [kind], "flush": 30.0},
            heal=_be_well,
        )
        yield breaks(
            f"{name}-exit",
            f"the disk is {what}, and nothing listens; the process ends",
            _dropped("shutdown")
            if kind != "small_files"
            else Ends(by_next=ANY, delivered=ANY, dropped={"shutdown": SOME}),
            program={"then": [kind], **_SHORT},
        )
    yield breaks(
        "full-disk-each-event",
        "the disk is full, with `spool_each_event`, and the server is well",
        _DELIVERED,
        world=None,
        program={"then": ["full_disk"], "options": {"spool_each_event": True}},
        has_failed=False,
    )
    yield breaks(
        "torn-journal",
        "SIGKILL, then the last line that was written is torn, as by a power cut",
        Ends(delivered=199, by_next=ALL, lost=1, duplicates=ANY),
        program={
            "options": {"spool_each_event": True},
            "ending": "kill",
            "rate": 2_000,
        },
        status=-signal.SIGKILL,
        has_failed=False,
        damage=_tear_journal,
    )
    yield breaks(
        "disappearing-disk",
        "the spool's folder is removed in the middle, while nothing listens",
        Ends(delivered=SOME, dropped={"spool_damaged": ANY}, by_next=SOME, lost=ANY),
        program={"then": ["disappearing_disk"], "rate": 1000, **_SHORT},
    )
    damaged = {"count": 200, **_SHORT}
    yield breaks(
        "bit-flip",
        "a bit of a file in the spool flips",
        Ends(delivered=199, by_next=ALL, dropped={"spool_damaged": 1}),
        damage=_flip_a_bit,
        program=damaged,
    )
    yield breaks(
        "truncated",
        "a file in the spool loses its end",
        Ends(delivered=197, by_next=ALL, dropped={"spool_damaged": 3}),
        damage=_truncate,
        program=damaged,
    )
    yield breaks(
        "emptied",
        "a file in the spool is emptied",
        Ends(delivered=ANY, by_next=ALL, dropped={"spool_damaged": SOME}),
        damage=_empty,
        program=damaged,
    )
    yield breaks(
        "garbage-file",
        "a file in the spool is overwritten by garbage",
        Ends(delivered=ANY, by_next=ALL, dropped={"spool_damaged": SOME}),
        damage=_garbage_file,
        program=damaged,
    )
    yield breaks(
        "strangers",
        "foreign files, a folder, a FIFO and a link named like those of the spool",
        _FOR_THE_NEXT,
        damage=_strangers,
        program=damaged,
    )
    yield breaks(
        "spool-full",
        "more than `max_spool_bytes` while nothing listens",
        Ends(delivered=SOME, by_next=SOME, dropped={"spool_full": SOME}),
        program={
            "count": 1_000,
            "rate": 2_000,
            "options": {
                "max_batch_bytes": 10_000,
                "max_event_bytes": 10_000,
                "max_spool_bytes": 100_000,
                **_SHORT["options"],
            },
        },
    )
    yield breaks(
        "spool-expired",
        "what is in the spool is older than `max_spool_age`",
        Ends(delivered=0, by_next=ALL, dropped={"spool_expired": ALL}),
        program=_SHORT,
        next_program={"options": {"max_spool_age": 0.05}},
    )


def _clocks() -> Iterator[Row]:
    """Yield clocks that jump."""

    def jumps(name: str, fault: str, **more: Any) -> Row:
        return Row(
            **{
                "name": name,
                "fault": fault,
                "world": _shut,
                "plain": _DELIVERED,
                "spooled": _DELIVERED,
                **_HEALS,
                **more,
            }
        )

    yield jumps(
        "clock-jumps",
        "the wall clock jumps by a year, to and fro, during an outage that heals",
        program={"then": ["a_jumping_clock"], "flush": 30.0},
    )
    yield jumps(
        "clock-behind",
        "the wall clock is a year behind when the next process starts",
        plain=None,
        program=_SHORT,
        heal=None,
        spooled=_FOR_THE_NEXT,
        next_program={"before": ["a_year_behind"]},
    )
    yield jumps(
        "clock-ahead",
        "the wall clock is a year ahead when the next process starts",
        plain=None,
        program=_SHORT,
        heal=None,
        spooled=Ends(delivered=0, by_next=ALL, dropped={"spool_expired": ALL}),
        next_program={"before": ["a_year_ahead"]},
    )


def _memory() -> Iterator[Row]:
    yield Row(
        name="memory",
        fault="memory ends in the middle of emitting huge values",
        plain=Ends(dropped={"internal_error": ANY, "queue_full": ANY}, delivered=SOME),
        spooled=Ends(
            dropped={"internal_error": ANY, "queue_full": ANY}, delivered=SOME
        ),
        program={
            "before": ["little_memory"],
            "emits": "huge_values",
            "count": 100,
            "flush": 20.0,
        },
        may_call=1.0,
        may_raise=("SystemError",),  # the interpreter had none to make an error of
        stderr=".*",  # nor to say what failed
    )


def _crowds() -> Iterator[Row]:
    yield Row(
        name="crowd",
        fault="2,000 short-lived processes of three events while nothing listens",
        world=_shut,
        program={
            "emits": "in_a_crowd",
            "count": 6_000,
            "options": {"exit_timeout": 0.1},
        },
        small={"count": 120},
        plain=_dropped("shutdown"),
        spooled=_FOR_THE_NEXT,
        seconds=900.0,
    )


GROUPS: dict[str, list[Row]] = {
    "How a process ends, and where it emits": list(_processes()),
    "A server that comes to its senses": list(_answers()),
    "A server that does not, before the process ends": list(_lasting()),
    "The disk": list(_disks()),
    "Clock, memory, crowds": [*_clocks(), *_memory(), *_crowds()],
}

ROWS: dict[str, Row] = {row.name: row for rows in GROUPS.values() for row in rows}
