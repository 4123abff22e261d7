"""What README and docs say: their code runs, their tables are complete and true."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import attrs
import pytest

import pgtrack
import pgtrack.testing
import pgtrack.typing
from harness import ProductGraph, run_script
from pgtrack import _client, _config, _event, _keys, _ledger, _retry, exceptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pgtrack.typing import Answer, Transport

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}


# --- the pages, taken apart ------------------------------------------------------


class Block(NamedTuple):
    """
    A fenced block.

    *note* is the HTML comment right above it, which says what to do with it: `output`
    (what the code before prints), `event` (one that the code before emits), `pytest`
    (a test to run as one) or `not run: REASON`.
    """

    line: int
    language: str
    note: str
    text: str


_FENCED = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = PAGES[page].read_text("utf-8")
    return [
        Block(
            text.count("\n", 0, match.start("text")),
            match["language"],
            match["note"] or "",
            match["text"],
        )
        for match in _FENCED.finditer(text)
    ]


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """Return the rows of the first table below *heading*, by their first cells."""
    text = PAGES[page].read_text("utf-8").partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert table is not None, f"{page} has no table below {heading!r}"
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table[0].splitlines()[2:]
    ]
    found = {row[0].strip("`"): row[1:] for row in rows}
    assert len(rows) == len(found), f"{page} has a row twice below {heading!r}"
    return found


# --- the code runs ---------------------------------------------------------------


class Strict:
    """A strict ProductGraph server in the place of every endpoint."""

    def __init__(self) -> None:
        self.core = ProductGraph("v0.3.0")
        self.replies: list[tuple[int | None, bytes]] = []

    def transport_of(
        self, make: Callable[[_config.Config], Transport], config: _config.Config
    ) -> Transport:
        """Return a transport that asks the server, and prints what is to be printed."""
        local = None if str(config.endpoint).startswith("http") else make(config)

        def send(events: Sequence[bytes], timeout: float) -> Answer:
            body = b'{"events":[' + b",".join(events) + b"]}"
            reply = self.core.respond("POST", "/v1/events", {}, body)
            self.replies.append(reply and (reply.status, reply.body))
            if local is not None:
                return local.send(events, timeout)
            return pgtrack.typing.Answer(verdict=pgtrack.typing.Verdict.TAKEN)

        def nothing() -> None:
            pass

        transport: Any = types.SimpleNamespace(
            send=send, abort=nothing, close=nothing, is_immediate=local is not None
        )
        return transport


@pytest.fixture(name="strict")
def _strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Strict]:
    strict, make = Strict(), _client.transport_of
    monkeypatch.setattr(
        _client, "transport_of", lambda config: strict.transport_of(make, config)
    )
    yield strict
    for status, body in strict.replies:
        assert (202, []) == (status, json.loads(body).get("errors", []))


def plain(text: str) -> str:
    """Return *text* without what differs in each run: times, ids made up, figures."""
    text = re.sub(r"\d\d:\d\d:\d\d\.\d{3}", "hh:mm:ss.fff", text)
    text = re.sub(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", "UUID", text)
    text = re.sub(r"(?<= )[0-9a-f]{8}(?= )", "last8hex", text)
    text = re.sub(r" +\d+(\.\d+)? m?s\b", " N ms", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def timeless(event: dict[str, Any]) -> dict[str, Any]:
    """Return a wire event without what differs in each run."""
    unlike = ["event_id", "event.timestamp", "api.duration_ms", "duration_ms"]
    if event["session.id"].startswith("proc-"):
        unlike.append("session.id")
    return {k: type(v).__name__ if k in unlike else v for k, v in event.items()}


def what_is_missing(page: str) -> str:
    """Return why the code of an integration's page cannot run here, if it cannot."""
    integration = re.fullmatch(r"docs/integrations/([a-z]\w+)\.md", page)
    if integration is None:
        return ""
    code = "\n".join(b.text for b in blocks_of(page) if b.language == "python")
    found = re.findall(r"^ *(?:from|import) (\w+)", code, re.MULTILINE)
    try:
        for name in (f"pgtrack.integrations.{integration[1]}", *found):
            importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return ""


def uninstall_all(page: str) -> None:
    """Undo what the code of a page installed for the whole process."""
    run = (b.text for b in blocks_of(page) if b.language == "python" and not b.note)
    code = "\n".join(run)
    for name in set(re.findall(r"pgtrack\.integrations(?:\.| import )(\w+)", code)):
        module = importlib.import_module(f"pgtrack.integrations.{name}")
        getattr(module, "uninstall", lambda: None)()


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_and_does_what_is_shown(
    page: str,
    strict: Strict,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every block of Python on a page runs, in order, and prints what is shown."""
    if missing := what_is_missing(page):
        pytest.skip(missing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, seen = "", 0

    try:
        for block in blocks_of(page):
            if block.language == "python" and not block.note:
                seen = len(strict.core.events)
                code = compile("\n" * block.line + block.text, page, "exec")
                exec(code, namespace)
                pgtrack.flush()
                printed = capsys.readouterr().out
            elif block.note == "output":
                assert plain(block.text) == plain(printed), f"{page}:{block.line}"
            elif block.note == "event":
                emitted = [timeless(event) for event in strict.core.events[seen:]]
                assert timeless(json.loads(block.text)) in emitted
    finally:
        uninstall_all(page)


@pytest.mark.parametrize("page", PAGES)
def test_notes_on_blocks_are_known(page: str) -> None:
    """A comment above a block is one that these tests, or `.ci/run`, understand."""
    known = r"|output|event|pytest|command: \w+|not run: .{10,}"
    unknown = [b.note for b in blocks_of(page) if not re.fullmatch(known, b.note)]

    assert [] == unknown


def test_tests_in_the_docs_pass(tmp_path: Path) -> None:
    """The tests that the docs show are tests, and pass."""
    pages = [page for page in PAGES if not what_is_missing(page)]
    code = [b.text for page in pages for b in blocks_of(page) if b.note == "pytest"]
    path = tmp_path / "test_shown.py"
    path.write_text("\n\n".join(code), "utf-8")
    source = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-q", "-p", "no:cacheprovider", "-W", "error", f"--rootdir={tmp_path}")
    done = run_script(source, *options, str(path), timeout=50)

    assert 0 == done.returncode, done.stdout + done.stderr
    shown = re.findall(r"^(?:async )?def test_", path.read_text("utf-8"), re.MULTILINE)
    assert [str(len(shown))] == re.findall(r"(\d+) passed", done.stdout)


# --- the links lead somewhere ----------------------------------------------------


def prose_of(path: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCED.sub("", path.read_text("utf-8"))


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that a forge makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_resolve(page: str) -> None:
    """Each relative link leads to a file, and its fragment to a heading there."""
    here = ROOT / page
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(here)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (here.parent / path).resolve() if path else here
        if not file.exists() or (fragment and fragment not in anchors_of(file)):
            broken.append(target)

    assert [] == broken


def test_every_page_is_linked() -> None:
    """A reader who starts at the README finds every page; integrations by theirs."""
    index = "docs/integrations/README.md"
    texts = PAGES["README.md"].read_text("utf-8"), PAGES[index].read_text("utf-8")

    assert [] == [
        page
        for page in PAGES
        if page != "README.md"
        and f"({page})" not in texts[0]
        and f"({page.removeprefix('docs/integrations/')})" not in texts[1]
    ]


INTEGRATIONS = [page for page in PAGES if re.match(r"docs/integrations/[a-z]", page)]


@pytest.mark.parametrize("page", INTEGRATIONS)
def test_pages_of_integrations_are_alike(page: str) -> None:
    """Each integration's page has the same headings, in the same order."""
    headings = re.findall(r"^## (.*)$", prose_of(PAGES[page]), re.MULTILINE)

    assert ["Install", "Use", "What it does", "Options", "Limits"] == headings


INDEX = "docs/integrations/README.md"
MODULES = sorted(
    path.stem
    for path in (Path(pgtrack.__file__).parent / "integrations").glob("[a-z]*.py")
)


def test_the_index_lists_every_integration() -> None:
    """The index of integrations has each module once, with a link to its page."""
    shown = sorted(rows_of(INDEX, "Modules"))

    assert [f"[`{module}`]({module}.md)" for module in MODULES] == shown


@pytest.mark.parametrize("module", MODULES)
def test_an_integration_is_complete(module: str) -> None:
    """Each integration has a page, an extra, and tests that import it."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    tests = "\n".join(
        path.read_text("utf-8")
        for path in (ROOT / "tests" / "integrations").glob("test_*.py")
    )
    name = rf"pgtrack\.integrations(?:\.| import [^\n]*\b){module}\b|\"{module}\""

    assert f"docs/integrations/{module}.md" in PAGES
    assert module in project["optional-dependencies"]
    assert re.search(name, tests)


def test_the_matrix_has_no_gaps() -> None:
    """Each cell of the matrix is a tick, a footnote that says why not, or both."""
    text = PAGES[INDEX].read_text("utf-8")
    cells = {
        (row, i): cell
        for row, found in rows_of(INDEX, "The matrix").items()
        for i, cell in enumerate(found)
    }
    gaps = [
        where
        for where, cell in cells.items()
        if not re.fullmatch(r"✓(?:\[\^[a-z-]+\])*|(?:\[\^[a-z-]+\])+", cell)
    ]
    used = {note for cell in cells.values() for note in re.findall(r"\[\^.+?\]", cell)}
    defined = re.findall(r"^(\[\^.+?\]): .{20,}$", text, re.MULTILINE)

    assert [] == gaps
    assert sorted(used) == defined


# --- the tables are complete and true --------------------------------------------


SETTINGS = {
    field.name: field.metadata[_config._Setting]
    for field in attrs.fields(pgtrack.Config)
}


def test_every_setting_has_its_row() -> None:
    """The tables of settings have each setting of Config once, and no other."""
    assert sorted(SETTINGS) == sorted(_rows_of_settings())


@pytest.mark.parametrize("name", SETTINGS)
def test_shown_defaults_are_the_defaults(name: str) -> None:
    """The default in a setting's row, read as the setting reads it, is its default."""
    setting = SETTINGS[name]
    shown = _rows_of_settings()[name][0].strip("`")

    if shown in ("none", "required"):
        assert setting.default in (None, ())
    else:
        assert setting.default == setting.parse(
            int(shown.replace(",", "")) if re.fullmatch(r"[\d,]+", shown) else shown
        )


def _rows_of_settings() -> dict[str, list[str]]:
    page = "docs/configuration.md"
    rows: dict[str, list[str]] = {}
    text = PAGES[page].read_text("utf-8")
    for heading in re.findall(r"^## (.*)$", text, re.MULTILINE):
        rows.update(rows_of(page, heading))
    return rows


def test_every_drop_reason_has_its_row() -> None:
    """The table of drop reasons has each reason of the ledger, and no other."""
    shown = rows_of("docs/delivery.md", "Why an event is dropped")

    assert sorted(get_args(_ledger.DropReason)) == sorted(shown)


def test_every_adjusted_kind_has_its_row() -> None:
    """The table of adjustments has each kind of the ledger, and no other."""
    shown = rows_of("docs/events.md", "What is counted as adjusted")

    assert sorted(get_args(_ledger.AdjustedReason)) == sorted(shown)


def test_statuses_are_treated_as_shown() -> None:
    """Each status in the table of answers means what its row says."""
    meaning = {
        "taken": "TAKEN",
        "sent again": "RETRY",
        "halved": "TOO_LARGE",
        "bisected": "REFUSED",
        "held": "HOLD",
    }
    shown = [
        (int(status), meaning[verdict])
        for statuses, (verdict, _) in rows_of("docs/delivery.md", "Answers").items()
        for status in re.findall(r"\b\d{3}\b", statuses)
    ]

    assert shown == [
        (status, _retry.classify(status, {}, b"", 1, 0.0).verdict.name)
        for status, _ in shown
    ]
    assert {202, 301, 400, 401, 403, 404, 408, 413, 429, 500, 503} <= {*dict(shown)}


def test_every_field_has_its_row() -> None:
    """The table of fields has each field's key, kind and width."""
    kinds = {
        _event._to_text: "text",
        _event._to_integer: "integer",
        _event._to_number: "number",
    }
    real = {
        name: [f"`{f.key}`", kinds[f.convert], f"{f.width:,}" if f.width else "—"]
        for name, f in _event.FIELDS.items()
    }
    real["timestamp"] = ["`event.timestamp`", "time", "—"]
    real["metadata"] = ["`metadata`", "object", "—"]
    shown = rows_of("docs/events.md", "Fields")

    assert real == {name: cells[:3] for name, cells in shown.items()}


def test_every_event_type_is_named() -> None:
    """The page on events names each documented type."""
    text = PAGES["docs/events.md"].read_text("utf-8")
    types_of_events = get_args(pgtrack.typing.EventType)

    assert [] == [name for name in types_of_events if f"`{name}`" not in text]


def test_the_list_of_redacted_keys_is_shown() -> None:
    """The page on events shows the built-in list of keys, all of it."""
    text = PAGES["docs/events.md"].read_text("utf-8")
    section = text.partition("\n### The built-in keys\n")[2]
    shown = section.split("```")[1].partition("\n")[2]

    assert list(_keys.DEFAULT_KEYS) == " ".join(shown.split()).split(", ")


@pytest.mark.parametrize(
    "module", [pgtrack, pgtrack.testing, pgtrack.typing, exceptions]
)
def test_every_public_name_has_its_row(module: types.ModuleType) -> None:
    """The page on the API has a row for each public name."""
    text = PAGES["docs/api.md"].read_text("utf-8")
    rows = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))

    assert [] == sorted(set(module.__all__) - rows)


@pytest.mark.parametrize("name", pgtrack.__all__)
def test_signatures_are_as_shown(name: str) -> None:
    """What the API's page shows of a signature has the names, kinds and defaults."""
    text = PAGES["docs/api.md"].read_text("utf-8")
    row = re.search(rf"^\| `{name}(\(.*?\))?` \|", text, re.MULTILINE)
    assert row is not None
    if not row[1]:
        return
    namespace: dict[str, Any] = {}
    exec(f"def shown{row[1]}: ...", namespace)
    shown = inspect.signature(namespace["shown"]).parameters.values()
    real = inspect.signature(getattr(pgtrack, name)).parameters

    assert [] == [
        parameter
        for parameter in shown
        if parameter.kind is not parameter.VAR_KEYWORD
        if parameter != real[parameter.name].replace(annotation=parameter.empty)
    ]
    required = {p.name for p in real.values() if p.default is p.empty}
    assert required <= {parameter.name for parameter in shown}


def test_every_file_is_on_the_map() -> None:
    """The page on the architecture has a row for each module of the package."""
    package = Path(pgtrack.__file__).parent
    page = "docs/architecture.md"
    shown = rows_of(page, "File by file")

    assert sorted(path.name for path in package.glob("*.py")) == sorted(shown)
    _, edges = PAGES[page].read_text("utf-8").split("| file of `integrations/` |")
    named = re.findall(r"`(\w+\.py)`", edges.partition("\n\n")[0])
    inner = [path.name for path in (package / "integrations").glob("*.py")]
    assert sorted(inner) == sorted([*named, "__init__.py"])
