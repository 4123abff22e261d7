"""
Run the test suites of web frameworks with pgtrack around every application in them.

The host is to notice nothing: the tests that pass without pgtrack pass with it, too.
The suites come from the package index, as the source distributions of the versions that
are installed.  None of their code is kept.

    python tests/host_suites/run.py [NAME ...]

Exits by 1 if a test fails only with pgtrack and is not among the reasons below, or if
one of those no longer fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Suite(NamedTuple):
    """
    The tests of one framework.

    Attributes:
        ways: How pgtrack is put around its applications; see `wrapping.py`.

        reasons: Why a test cannot pass with it, by the start of its name.

        options: What else its pytest is told.
    """

    ways: tuple[str, ...]
    reasons: dict[str, str]
    options: tuple[str, ...] = ()


_ALL_HEADERS = "compares all headers of an answer, and X-Request-ID is one more"

SUITES = {
    "starlette": Suite(
        ("middleware", "installed", "twice"),
        {
            "tests.middleware.test_base"
            "::test_multiple_middlewares_stacked_client_disconnected": _ALL_HEADERS,
            "tests.test_routing::test_websocket_route_middleware": _ALL_HEADERS,
            "tests.test_websockets::test_additional_headers": _ALL_HEADERS,
            "tests.test_websockets::test_no_additional_headers": _ALL_HEADERS,
            "tests.test_exceptions::test_force_500_response": (
                "wants the empty answer that its client makes up for an application "
                "that raises; the middleware answers as servers do, with the id"
            ),
        },
    ),
    "flask": Suite(
        ("middleware", "installed", "twice"),
        {
            "tests.test_basic::test_app_freed_on_zero_refcount": (
                "wants no reference cycle, and any `app.wsgi_app = X(app.wsgi_app)` "
                "makes one"
            ),
        },
    ),
    "werkzeug": Suite(
        ("middleware", "twice"),
        {"tests.test_test::test_no_content_type_header_addition": _ALL_HEADERS},
        ("--ignore=tests/test_serving.py",),  # starts servers, and none of them is ours
    ),
}


def unpack(name: str, folder: Path) -> Path:
    """Fetch the source distribution of the version installed, and return its folder."""
    version = importlib.metadata.version(name)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    wanted = ["--no-binary", ":all:", f"{name}=={version}"]
    subprocess.run([*pip, *wanted, "-d", folder], check=True)
    (archive,) = folder.glob(f"{name}-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


def outcomes(
    suite: Suite, sources: Path, way: str | None, *, is_configured: bool = True
) -> tuple[dict[str, str], dict[str, object]]:
    """Run a suite; return each test's outcome, and what pgtrack saw of it."""
    results, report = sources / "results.xml", sources / "report.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PRODUCTGRAPH_")}
    env["PYTHONPATH"] = str(HERE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:pgtrack", f"--junitxml={results}", *suite.options]
    if way is not None:
        command += ["-p", "wrapping"]
        env["WRAPPING"] = way
        env["WRAPPING_REPORT"] = str(report)
        if is_configured:
            env["WRAPPING_EVENTS"] = str(sources / "events.jsonl")
    with (sources / f"{way}-{is_configured}.log").open("wb") as log:
        subprocess.run(
            command, cwd=sources, env=env, stdout=log, stderr=log, check=False
        )
    found = {}
    for case in ET.parse(results).iter("testcase"):
        bad = [child.tag for child in case if child.tag in {"failure", "error"}]
        skipped = case.find("skipped") is not None
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = "failed" if bad else "skipped" if skipped else "passed"
        found[name] = outcome
    seen = json.loads(report.read_text("utf-8")) if way is not None else {}
    return found, seen


def check(name: str, suite: Suite, folder: Path) -> bool:
    """Compare a suite's results with and without pgtrack; say what there is to say."""
    sources = unpack(name, folder)
    bare, _ = outcomes(suite, sources, None)
    passing = {test for test, outcome in bare.items() if outcome == "passed"}
    print(f"{sources.name}: {len(passing)} of {len(bare)} tests pass without pgtrack")
    is_good = bool(passing)
    stale = set(suite.reasons)
    for way, is_configured in (*((way, True) for way in suite.ways), ("twice", False)):
        wrapped, seen = outcomes(
            suite, sources, f"{name}-{way}", is_configured=is_configured
        )
        failing = {test for test in passing if wrapped.get(test) != "passed"}
        known = {test: _reason(suite, test) for test in failing}
        stale -= set(known.values())
        unknown = sorted(test for test, reason in known.items() if reason is None)
        print(
            f"  {way if is_configured else f'{way}, unconfigured'}: "
            f"{len(passing - failing)} pass, {len(failing) - len(unknown)} fail for "
            f"known reasons, {len(unknown)} for others "
            f"({seen['requests']} requests, {seen['events']} events)",
            *unknown,
            sep="\n    ",
            flush=True,
        )
        is_good &= not unknown and bool(seen["requests"])
        is_good &= bool(seen["events"]) == is_configured
    for reason in sorted(stale):
        print(f"  no longer fails: {reason}")
    return is_good and not stale


def _reason(suite: Suite, test: str) -> str | None:
    """Return the entry of the suite's reasons that is for *test*."""
    return next((start for start in suite.reasons if test.startswith(start)), None)


def main() -> int:
    """Run the suites that are named, else all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SUITES))
    names = parser.parse_args().names or list(SUITES)
    with tempfile.TemporaryDirectory(prefix="pgtrack-hosts-") as folder:
        verdicts = [check(name, SUITES[name], Path(folder)) for name in names]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
