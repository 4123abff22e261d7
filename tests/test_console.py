# ruff: noqa: RUF001  the sign between a journey and its step

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pty
import re
import struct
import sys
import termios
import time
import unicodedata
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import run_script
from pgtrack._console import ConsoleTransport
from pgtrack._event import FIELDS
from pgtrack.typing import Answer, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SGR = re.compile(r"\x1b\[[0-9;]*m")
REQUEST_ID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
BUFFERED = {"PYTHONUNBUFFERED": ""}
UUID_SESSION = "srv-0190f3a2-7b1c-4def-8a2b-3c4d5e6f7a8b"


def encode(kind: str = "custom", **fields: Any) -> bytes:
    """
    Return an event as the worker hands it over; two underscores stand for a dot.
    """
    wire = {
        "event_id": "evt-1",
        "project_id": "shop",
        "product_id": "shop",
        "session.id": "sess_8f3a21bc9d",
        "event.type": kind,
        "event.timestamp": "2026-03-02T08:15:00.612345Z",
        "metadata": {"source": "backend"},
    }
    wire.update({key.replace("__", "."): value for key, value in fields.items()})
    return json.dumps(wire, ensure_ascii=False).encode("utf-8", "surrogatepass")


def api(status: int = 200, **fields: Any) -> bytes:
    """
    Return the event of a call to the API.
    """
    defaults = {"api__method": "POST", "api__path": "/pay", "api__duration_ms": 150}
    return encode("api.response", api__status_code=status, **{**defaults, **fields})


JOURNEY = encode(
    "journey.step",
    gen_ai__journey__id="checkout_flow",
    gen_ai__journey__step__id="payment_confirmed",
    gen_ai__journey__step__name="Payment Confirmed",
    duration_ms=38,
    user__id="u_1",
)
ERROR = encode("error", error__type="ValueError", error__message="no such card")
ORDINARY = [
    api(user__id="u_1", metadata={"source": "backend", "request_id": REQUEST_ID}),
    api(404, session__id=UUID_SESSION, api__method="OPTIONS", api__duration_ms=9),
    api(503, session__id="s1", api__method="DELETE", api__duration_ms=12_034),
    JOURNEY,
    ERROR,
    encode("page.view", page__path="/cart", user__id="u_1"),
    encode("custom", event__name="invoice.sent", metadata={"pages": 3}),
    encode("ui.click", ui__component__name="Buy", ui__element__text="Pay now"),
]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch) -> Iterator[None]:
    """
    Be in UTC, on a terminal that can do all, and without a user's wishes.
    """
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(name="path")
def _path(tmp_path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture(name="show")
def _show(capsys) -> Callable[..., list[str]]:
    """
    Print events where nobody asks for colour; return the lines.
    """

    def show(*events: bytes) -> list[str]:
        assert Verdict.TAKEN is ConsoleTransport().send(events, 1).verdict

        return capsys.readouterr().out.splitlines()

    return show


@pytest.fixture(name="show_on_terminal")
def _show_on_terminal(monkeypatch) -> Iterator[Callable[..., list[str]]]:
    """
    Print events on a real terminal, 120 columns wide; return the lines.
    """
    master, slave = pty.openpty()

    def show(*events: bytes, columns: int = 120) -> list[str]:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)

            assert Verdict.TAKEN is ConsoleTransport().send(events, 1).verdict

        seen = b""
        while seen.count(b"\n") < len(events):
            seen += os.read(master, 65_536)
        return seen.decode().splitlines()

    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        yield show
    os.close(master)


class Stream(io.TextIOWrapper):
    """
    A stream of one's own, which keeps bytes and may claim to be a terminal.
    """

    def __init__(self, encoding: str = "utf-8", *, is_terminal: bool = False):
        super().__init__(io.BytesIO(), encoding, newline="\n")
        self.is_terminal = is_terminal
        self.writes: list[str] = []

    def isatty(self) -> bool:
        """
        Return what was asked for.
        """
        return self.is_terminal

    def write(self, text: str) -> int:
        """
        Keep the text, apart from all others as well.
        """
        self.writes.append(text)
        return super().write(text)

    def read_bytes(self) -> bytes:
        """
        Return all that was written.
        """
        return self.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


class TestConsoleLayout:
    """
    What people see.
    """

    def test_line(self, show):
        """
        A line has time, session, type, what happened, user and the rest, in this order.
        """
        event = api(
            user__id="u_42",
            metadata={"request_id": REQUEST_ID, "source": "backend", "plan": "pro"},
        )

        [line] = show(event)

        assert (
            "08:15:00.612  3a21bc9d  api.response  POST   /pay"
            "                      200  150 ms  user=u_42 plan=pro request_id=c1f90ae7"
        ) == line

    @pytest.mark.parametrize(
        ("event", "essence"),
        [
            (
                encode("api.request", api__method="GET", api__path="/x"),
                "api.request   GET    /x",
            ),
            (JOURNEY, "checkout_flow › payment_confirmed (Payment Confirmed) 38 ms"),
            (
                encode(
                    "journey.step",
                    gen_ai__journey__id="j",
                    gen_ai__journey__step__id="cart",
                    gen_ai__journey__step__name="cart",
                ),
                "journey.step  j › cart",
            ),
            (ERROR, "error         ValueError: no such card"),
            (encode("error", error__type="KeyError"), "error         KeyError"),
            (encode("error", error__message="boom"), "error         boom"),
            (encode(event__name="invoice.sent"), "custom        invoice.sent"),
            (
                encode(
                    event__name="journey_conversion",
                    gen_ai__journey__id="checkout",
                    gen_ai__journey__conversion__status="abandoned",
                ),
                "journey_conversion  checkout › abandoned",
            ),
            (
                encode(gen_ai__journey__conversion__status="converted"),
                "custom         › converted",
            ),
            (
                encode("page.leave", page__path="/cart", duration_ms=61_000),
                "page.leave    /cart                                1.0 min",
            ),
            (
                encode("ui.click", ui__element="button", ui__element__text="Pay now"),
                'ui.click      button "Pay now"',
            ),
            (encode("ui.focus", ui__component__name="Card"), "ui.focus      Card"),
            (
                encode(
                    "performance", performance__lcp_ms=1180.5, performance__cls=0.02
                ),
                "performance   LCP 1.18 s  CLS 0.02",
            ),
            (encode("state.change", ui__state__key="cart"), "state.change  cart"),
            (encode("snapshot.captured"), "snapshot.captured"),
        ],
    )
    def test_essence(self, show, event, essence):
        """
        Each type of event shows what matters for it, and nothing is empty at the end.
        """
        [line] = show(event)

        assert essence in line
        assert line == line.rstrip()

    def test_alignment(self, show):
        """
        Columns start where they should, and wide characters count as two.
        """
        lines = show(
            api(user__id="u"),
            api(404, api__method="OPTIONS", session__id="s", user__id="u"),
            encode(event__name="x", user__id="u"),
            encode("error", error__type="E", error__message="日本", user__id="u"),
        )

        assert {24} == {re.search(r"api|custom|error", line).start() for line in lines}
        assert [84, 84, 84, 82] == [line.index("user=") for line in lines]

    def test_everything_else(self, show):
        """
        Other fields follow the metadata, and what the margin may hide comes last.
        """
        [line] = show(
            encode(
                org__id="o",
                gen_ai__journey__id="j",
                error__stack="a\nb",
                metadata={
                    "release": "1",
                    "request_id": "r",
                    "source": "web",
                    "n": None,
                },
            )
        )

        assert [
            "08:15:00.612",
            "3a21bc9d",
            "custom",
            "source=web",
            "n=null",
            "org.id=o",
            "journey.id=j",
            "request_id=r",
            "release=1",
        ] == line.split()

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            ("plain", "plain"),
            ("two words", '"two words"'),
            ('say "x"', '"say \\"x\\""'),
            ("", '""'),
            ("a=b", "a=b"),
            (["a", 1], '["a",1]'),
            ({"k": True}, '{"k":true}'),
            (1.5, "1.5"),
            ("x" * 48, "x" * 48),
            ("x" * 49, "x" * 47 + "…"),
            ("日" * 48, "日" * 23 + "…"),
            ("e\u0301" * 48, "e\u0301" * 24 + "e…"),
            ([0] * 1000, ("[" + "0," * 30)[:47] + "…"),
        ],
    )
    def test_value(self, show, value, shown):
        """
        A value is bare where it is one word, else quoted or JSON, and never long.
        """
        [line] = show(encode(metadata={"key": value}))

        assert line.endswith(f" key={shown}")

    @pytest.mark.parametrize(
        ("milliseconds", "shown"),
        [
            (0, "0 ms"),
            (999, "999 ms"),
            (1_000, "1.00 s"),
            (59_990, "59.99 s"),
            (90_000, "1.5 min"),
            (-5, "-5 ms"),
        ],
    )
    def test_duration(self, show, milliseconds, shown):
        """
        A duration has the unit that reads best.
        """
        [line] = show(api(api__duration_ms=milliseconds))

        assert line.endswith(f" {shown}")

    @pytest.mark.parametrize("odd", [True, "soon", 10**400, float("nan"), None])
    def test_odd_duration(self, show, odd):
        """
        What is no duration is not shown.
        """
        [line] = show(api(api__duration_ms=odd))

        assert line.endswith("200")

    @pytest.mark.parametrize(
        ("session_id", "tag"),
        [
            ("s1", "s1      "),
            ("sess_abc123", "abc123  "),
            ("sess_8f3a21bc9d", "3a21bc9d"),
            (UUID_SESSION, "5e6f7a8b"),
            ("session-", "session-"),
            ("", "-       "),
            (None, "-       "),
        ],
    )
    def test_session_tag(self, show, session_id, tag):
        """
        A session is told by its end, without what many sessions have in common.
        """
        [line] = show(encode(session__id=session_id))

        assert f"08:15:00.612  {tag}  custom" == line

    @pytest.mark.parametrize(
        ("timestamp", "shown"),
        [
            ("2026-03-02T08:15:00.999999Z", "03:15:00.999"),
            ("2026-03-02T08:15:00+00:00", "03:15:00.000"),
            ("0001-01-01T00:00:00Z", "--:--:--.---"),
            ("yesterday", "--:--:--.---"),
            (None, "--:--:--.---"),
        ],
    )
    def test_local_time(self, show, monkeypatch, timestamp, shown):
        """
        Times are local; one that cannot be told is a blank form.
        """
        monkeypatch.setenv("TZ", "EST5")
        time.tzset()

        [line] = show(encode(event__timestamp=timestamp))

        assert line.startswith(f"{shown}  ")

    @pytest.mark.parametrize(
        "event", [b"nonsense", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"\x1b[2J\n"']
    )
    def test_not_an_event(self, show, event):
        """
        What is no JSON object is shown as far as it can be, and fails nothing.
        """
        [broken, whole] = show(event, encode())

        assert broken.isprintable()
        assert len(broken) <= 200
        assert whole.endswith("custom")

    def test_metadata_that_is_no_object(self, show):
        """
        Metadata of a wrong type is shown as it is.
        """
        [line] = show(encode(metadata=[1]))

        assert line.endswith("metadata=[1]")

    def test_no_truncation_in_a_pipe(self, show):
        """
        Only single values are cut where there is no margin.
        """
        [line] = show(encode(metadata={f"k{i}": i for i in range(200)}))

        assert line.endswith(" k199=199")


class TestConsoleColour:
    """
    Terminals, and who else gets colour.
    """

    def test_same_as_plain(self, show, show_on_terminal):
        """
        On a terminal, ordinary events look the same as in a pipe, but for the colour.
        """
        lines = show_on_terminal(*ORDINARY)

        assert show(*ORDINARY) == [SGR.sub("", line) for line in lines]
        assert all(SGR.search(line) for line in lines)

    def test_plain_in_a_pipe(self, show):
        """
        In a pipe there is no escape code.
        """
        assert "\x1b" not in "".join(show(*ORDINARY))

    @pytest.mark.parametrize(
        ("event", "painted"),
        [
            (api(200), "\x1b[32m200\x1b[0m"),
            (api(302), " 302 "),
            (api(404), "\x1b[33m404\x1b[0m"),
            (api(503), "\x1b[31m503\x1b[0m"),
            (ERROR, "\x1b[1;31merror\x1b[0m"),
            (ERROR, "\x1b[31mno such card\x1b[0m"),
            (JOURNEY, "\x1b[1mcheckout_flow › payment_confirmed\x1b[0m"),
            (encode(metadata={"k": 1}), "\x1b[2m k=1\x1b[0m"),
        ],
    )
    def test_styles(self, show_on_terminal, event, painted):
        """
        Statuses and errors have their colours, steps are bold, metadata is dim.
        """
        [line] = show_on_terminal(event)

        assert painted in line

    def test_session_colour(self, show_on_terminal):
        """
        Sessions keep their colour, and differ in it also where their tags are equal.
        """
        ids = ["a-12345678", "a-12345678", "b-12345678"]
        lines = show_on_terminal(*(encode(session__id=i) for i in ids))
        first, again, other = (
            re.findall(r"\x1b\[(38;5;\d+)m12345678\x1b\[0m", line) for line in lines
        )

        assert 1 == len(first)
        assert first == again != other

    @pytest.mark.parametrize("columns", [40, 90, 120, 200])
    def test_margin(self, show_on_terminal, columns):
        """
        No line wraps: what does not fit is cut, and the cut is marked.
        """
        long = api(user__id="u_1", metadata={f"key{i}": "日本" for i in range(50)})

        [line] = show_on_terminal(long, columns=columns)

        text = SGR.sub("", line)
        width = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)

        assert text.endswith("…")
        assert width in (columns - 1, columns)
        assert line.count("\x1b[0m") * 2 == line.count("\x1b[")

    def test_ordinary_events_fit(self, show_on_terminal):
        """
        Ordinary events fit into 120 columns.
        """
        assert not [x for x in show_on_terminal(*ORDINARY) if x.endswith("…")]

    def test_terminal_of_unknown_width(self, show_on_terminal, monkeypatch):
        """
        A terminal that does not know its width has 120 columns, or what `COLUMNS` says.
        """
        monkeypatch.setattr(sys, "__stdout__", None)
        event = encode(metadata={f"key{i}": "x" for i in range(50)})
        [line] = show_on_terminal(event, columns=0)
        monkeypatch.setenv("COLUMNS", "100")
        [told] = show_on_terminal(event, columns=0)

        assert [120, 100] == [len(SGR.sub("", text)) for text in (line, told)]

    @pytest.mark.parametrize(
        ("variables", "is_terminal", "is_coloured"),
        [
            ({}, True, True),
            ({}, False, False),
            ({"NO_COLOR": "1"}, True, False),
            ({"NO_COLOR": ""}, True, True),
            ({"FORCE_COLOR": "1"}, False, True),
            ({"FORCE_COLOR": ""}, False, False),
            ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
            ({"TERM": "dumb"}, True, False),
            ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
        ],
    )
    def test_wishes(self, monkeypatch, variables, is_terminal, is_coloured):
        """
        `NO_COLOR` wins over `FORCE_COLOR`, and that over what the stream is.
        """
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        stream = Stream(is_terminal=is_terminal)
        monkeypatch.setattr(sys, "stdout", stream)
        ConsoleTransport().send([api()], 1)

        assert is_coloured == (b"\x1b[" in stream.read_bytes())

    def test_windows(self, monkeypatch):
        """
        Windows has colour only in a console that shows itself to be a newer one.
        """
        seen = []
        monkeypatch.setattr(os, "name", "nt")
        monkeypatch.delenv("TERM")
        for variables in ({}, {"WT_SESSION": "1"}):
            stream = Stream(is_terminal=True)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stream)
                for name, value in variables.items():
                    patch.setenv(name, value)
                ConsoleTransport().send([api()], 1)
            seen.append(b"\x1b[" in stream.read_bytes())

        assert [False, True] == seen


HOSTILE = {
    "newline": ("a\nb\r\n", "a\\nb\\r\\n"),
    "tab": ("a\tb", "a\\tb"),
    "clear screen": ("\x1b[2J\x1b[H", "\\x1b[2J\\x1b[H"),
    "title": ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
    "backspace": ("a\x08\x7f", "a\\x08\\x7f"),
    "nul": ("\0", "\\x00"),
    "C1": ("\x9b31m\x85", "\\x9b31m\\x85"),
    "override": ("\u202eevil\u202c", "\\u202eevil\\u202c"),
    "isolate": ("\u2066evil\u2069", "\\u2066evil\\u2069"),
    "separators": ("\u2028\u2029", "\\u2028\\u2029"),
    "byte order": ("\ufeff", "\\ufeff"),
    "tags": ("\U000e0041", "\\U000e0041"),
    "surrogate": ("\ud800", "\\ud800"),
}


class TestConsoleSafety:
    """
    Events made by an enemy.
    """

    @pytest.mark.parametrize("key", ["error__message", "user__id", "event__type"])
    @pytest.mark.parametrize("attack", HOSTILE)
    def test_escapes(self, show, attack, key):
        """
        What could act on a terminal or forge a line is shown as an escape.
        """
        text, shown = HOSTILE[attack]

        [line] = show(encode(**{"event__type": "error", key: text}))

        assert shown in line
        assert line.isprintable()

    def test_harmless_blanks(self, show):
        """
        Blanks of other widths stay as they are, as do accents and emoji.
        """
        [line] = show(encode(event__name="a\xa0b\u3000c é e\u0301 😀"))

        assert line.endswith("a\xa0b\u3000c é e\u0301 😀")

    def test_forged_pairs(self, show):
        """
        A value cannot pass for the user or for other metadata.
        """
        forged = 'x user=admin" y=1'
        [line] = show(api(api__path=forged, metadata={"k k": forged}))

        assert f'POST   "{forged}"'.replace('n"', 'n\\"', 1) in line
        assert line.endswith('"k k"="x user=admin\\" y=1"')

    @settings(database=None, deadline=None)
    @given(data=st.data())
    def test_any_event(self, data):
        """
        Any event is one line, with nothing that acts on a terminal but our own colours.
        """
        text = st.text(st.characters()) | st.sampled_from(
            [text for text, _ in HOSTILE.values()]
        )
        value = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | text,
            lambda inner: st.lists(inner) | st.dictionaries(text, inner),
            max_leaves=5,
        )
        keys = [field.key for field in FIELDS.values()]
        wire = data.draw(st.dictionaries(st.sampled_from(keys) | text, value))
        kind = st.sampled_from(["error", "api.response", "journey.step", "performance"])
        wire["event.type"] = data.draw(kind | value)
        wire["event.timestamp"] = data.draw(value)
        wire["metadata"] = data.draw(st.dictionaries(text, value) | value)
        encoding = data.draw(st.sampled_from(["utf-8", "ascii", "latin-1", "cp932"]))
        stream = Stream(encoding, is_terminal=data.draw(st.booleans()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            answer = ConsoleTransport().send([json.dumps(wire).encode()], 1)

        assert Verdict.TAKEN is answer.verdict

        line, end = stream.read_bytes().decode(encoding), "\n"
        text = SGR.sub("", line) if stream.is_terminal else line

        assert text.endswith(end)
        assert not [
            character
            for character in text.removesuffix(end)
            if not character.isprintable() and unicodedata.category(character) != "Zs"
        ]


class TestConsoleStream:
    """
    Streams of all kinds, and their failures.
    """

    def test_stderr(self, capsys):
        """
        The other stream is used where asked for.
        """
        ConsoleTransport("stderr").send([encode(event__name="x")], 1)
        captured = capsys.readouterr()

        assert "" == captured.out
        assert captured.err.endswith("x\n")

    @pytest.mark.parametrize(
        ("encoding", "shown"),
        [
            ("ascii", "j > caf\\xe9 (\\u65e5)"),
            ("latin-1", "j > café (\\u65e5)"),
            ("cp932", "j > caf\\xe9 (日)"),
            ("utf-8", "j › café (日)"),
            ("utf-16", "j › café (日)"),
        ],
    )
    def test_encoding(self, monkeypatch, encoding, shown):
        """
        Characters that the stream does not have are escaped, and columns still align.
        """
        stream = Stream(encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        journey = {"gen_ai__journey__id": "j", "gen_ai__journey__step__id": "café"}
        step = {"gen_ai__journey__step__name": "日", "user__id": "u"}
        answer = ConsoleTransport().send(
            [encode("journey.step", **journey, **step), api(user__id="u")], 1
        )
        first, second = stream.read_bytes().decode(encoding).splitlines()

        assert Verdict.TAKEN is answer.verdict
        assert shown in first
        assert second.index("user") == first.index("user") + ("日" in first)

    def test_encoding_with_a_byte_order_mark(self, monkeypatch, path):
        """
        What a stream writes at its beginning is not repeated with each batch.
        """
        with path.open("w", encoding="utf-16") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            for _ in range(2):
                ConsoleTransport().send([encode()], 1)

        first, second = path.read_text(encoding="utf-16").splitlines()

        assert first == second

    def test_mark_in_ascii(self, monkeypatch):
        """
        What is cut off is marked by a character that the stream has.
        """
        stream = Stream("ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        ConsoleTransport().send([encode(metadata={"k": "x" * 99})], 1)

        assert stream.read_bytes().endswith(b"xxx~\n")

    @pytest.mark.parametrize("encoding", [None, "no such"])
    def test_odd_streams(self, monkeypatch, encoding):
        """
        A stream needs no more than `write` and `flush`.
        """

        class Odd:
            def __init__(self) -> None:
                self.encoding = encoding
                self.text = ""

            def write(self, text: str) -> None:
                self.text += text

            def flush(self) -> None:
                self.text += "!"

        stream = Odd()
        monkeypatch.setattr(sys, "stdout", stream)
        ConsoleTransport().send([encode(event__name="x")], 1)

        assert stream.text.endswith("x\n!")

    def test_terminal_without_a_file(self, monkeypatch):
        """
        Something that claims to be a terminal and has no file is 120 columns wide.
        """
        stream = Stream(is_terminal=True)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", None)
        ConsoleTransport().send([encode(metadata={"k" * 40 + c: 1 for c in "abc"})], 1)

        assert 120 + 1 == len(SGR.sub("", stream.read_bytes().decode()))

    def test_one_write(self, monkeypatch):
        """
        A batch is one write.
        """
        stream = Stream()
        monkeypatch.setattr(sys, "stdout", stream)
        answer = ConsoleTransport().send([encode(), api(), JOURNEY], 1)

        assert [3] == [text.count("\n") for text in stream.writes]
        assert len(stream.read_bytes()) == answer.sent_bytes

    def test_no_stream(self, monkeypatch):
        """
        Without a stream, as under pythonw, the events are lost.
        """
        monkeypatch.setattr(sys, "stdout", None)

        assert Answer(
            verdict=Verdict.LOST, reason="sys.stdout is None"
        ) == ConsoleTransport().send([encode()], 1)

    def test_closed_stream(self, monkeypatch):
        """
        With a closed stream, the events are lost.
        """
        stream = Stream()
        stream.close()
        monkeypatch.setattr(sys, "stderr", stream)

        assert Answer(
            verdict=Verdict.LOST, reason="sys.stderr is closed"
        ) == ConsoleTransport("stderr").send([encode()], 1)

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (ValueError("closed"), (Verdict.LOST, "sys.stdout is closed")),
            (OSError(errno.EIO, "x", "/secret"), (Verdict.LOST, "OSError EIO")),
            (BrokenPipeError(errno.EPIPE, ""), (Verdict.LOST, "BrokenPipeError EPIPE")),
            (OSError(errno.ENOSPC, "full"), (Verdict.RETRY, "OSError ENOSPC")),
            (OSError("odd"), (Verdict.RETRY, "OSError")),
        ],
    )
    def test_failing_stream(self, monkeypatch, error, expected):
        """
        A stream that is gone loses the events; any other failure may pass.
        """

        class Failing(Stream):
            def flush(self) -> None:
                if not self.closed and self.writes:
                    self.writes.clear()
                    raise error

        monkeypatch.setattr(sys, "stdout", Failing())
        answer = ConsoleTransport().send([encode()], 1)

        assert expected == (answer.verdict, answer.reason)

    def test_broken_pipe(self):
        """
        A pipe without a reader loses the events, and the host still ends as it would.
        """
        result = run_script(
            """
            import os, sys
            from pgtrack._console import ConsoleTransport

            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
            answer = ConsoleTransport().send([b'{"event.type":"custom"}'], 1)
            print(answer.verdict.name, answer.reason, file=sys.stderr)
            """,
            env=BUFFERED,
        )

        assert (0, "LOST BrokenPipeError EPIPE\n") == (result.returncode, result.stderr)

    def test_pipe(self):
        """
        In a pipe there is no colour, and a line that the host has begun stays whole.
        """
        result = run_script(
            """
            from pgtrack._console import ConsoleTransport

            print("begun, ", end="")
            ConsoleTransport().send([b'{"event.type":"custom"}'] * 2, 1)
            print("ended")
            """,
            env=BUFFERED,
        )

        line = "--:--:--.---  -         custom"

        assert [line, line, "begun, ended"] == result.stdout.splitlines()
        assert "" == result.stderr

    def test_locale_without_unicode(self):
        """
        An ASCII stream of the interpreter's own does not fail.
        """
        result = run_script(
            r"""
            from pgtrack._console import ConsoleTransport

            event = b'{"event.type":"custom","event.name":"caf\\u00e9"}'
            print(ConsoleTransport().send([event], 1).verdict.name)
            """,
            env={"PYTHONIOENCODING": "ascii:strict"},
        )

        assert "" == result.stderr
        assert result.stdout.endswith("custom        caf\\xe9\nTAKEN\n")

    def test_processes_share_a_pipe(self):
        """
        Lines of several processes in one pipe do not tear each other.
        """
        result = run_script(
            """
            import fcntl, json, os
            from pgtrack._console import ConsoleTransport

            if hasattr(fcntl, "F_SETPIPE_SZ"):  # full in no time
                fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 4096)
            for name in "abcd":
                if os.fork() == 0:
                    event = {"event.type": "custom", "event.name": name * 40}
                    batch = [json.dumps(event).encode()] * 200
                    for _ in range(20):
                        ConsoleTransport().send(batch, 1)
                    os._exit(0)
            for _ in range(4):
                os.wait()
            """
        )
        lines = result.stdout.splitlines()

        assert 4 * 20 * 200 == len(lines)
        assert {
            f"--:--:--.---  -         custom        {name * 40}" for name in "abcd"
        } == set(lines)

    def test_protocol(self):
        """
        The transport delivers at once; it can be aborted and closed at any time.
        """
        transport = ConsoleTransport()
        transport.abort()
        transport.close()

        assert transport.is_immediate
