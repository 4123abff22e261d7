"""
The one door to every check; `.ci/run` goes through it as well.

Tests run on the built wheel: in a flat layout the working tree would shadow it, so
they run in a copy of the project that lacks `pgtrack/`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import nox

if TYPE_CHECKING:
    from collections.abc import Iterator

nox.needs_version = ">=2025.2.9"
nox.options.error_on_external_run = True

ROOT = Path(__file__).resolve().parent
PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))

# Folders of tests that need servers or frameworks. A new folder is part of the kit
# until it is named here.
BEYOND_THE_KIT = ("collector", "end_to_end", "integrations")

# Those of `tests/end_to_end` that can go on for longer.
LONG_TESTS = ("kills", "siblings", "gigabyte", "exit_matrix")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the package's types, and the public ones as a user's checkers see them."""
    session.install("-e", ".[tests,typing]")
    session.run("mypy")
    session.run("pyright", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run all tests, and keep the coverage data for `coverage`."""
    session.install(".[tests]")
    with _without_sources(session):
        session.run(
            *("coverage", "run", "-m", "pytest"),
            *session.posargs,
            env={"COVERAGE_FILE": str(ROOT / ".coverage")},
        )


@nox.session(python=PYTHONS)
def kit(session: nox.Session) -> None:
    """
    Run the kit's own tests, with no framework installed.

    All of them; where values are made up, fewer than the full tests make.
    """
    session.install(".[kit]")
    others = (f"--ignore=tests/{folder}" for folder in BEYOND_THE_KIT)
    with _without_sources(session):
        brief = "--hypothesis-profile=brief"
        session.run("pytest", brief, *others, *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Combine what `tests` measured, and demand all lines and branches."""
    session.install("coverage[toml]")
    session.run("coverage", "combine")
    session.run("coverage", "report", "--fail-under=100")


@nox.session
def examples(session: nox.Session) -> None:
    """Run each example."""
    session.install(".[tests]")
    with _without_sources(session):
        session.run("pytest", "tests/test_examples.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Run the code in the README and in `docs/`."""
    session.install(".[tests]")
    with _without_sources(session):
        session.run("pytest", "tests/test_docs.py", *session.posargs)


@nox.session
def hosts(session: nox.Session) -> None:
    """Run the test suites of web frameworks with pgtrack in them; takes minutes."""
    session.install(".[hosts]")
    session.run("python", "tests/host_suites/run.py", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Run the fault table at its full size, and write it into docs/delivery.md."""
    session.install("-e", ".[tests]")
    session.run("python", "tests/end_to_end/faults/table.py", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Kill, starve and fail everything at random, for many minutes."""
    session.install(".[tests]")
    long_ones = [f"tests/end_to_end/test_{n}.py" for n in LONG_TESTS]
    with _without_sources(session):
        session.run("pytest", *long_ones, env={"PGTRACK_SOAK": "10"})
        session.run("python", "tests/end_to_end/soak.py", *session.posargs)


@contextlib.contextmanager
def _without_sources(session: nox.Session) -> Iterator[None]:
    """Work in a copy of the project in which only the wheel can be imported."""

    def unwanted(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != ROOT:
            return {"__pycache__"}
        return {n for n in names if n == "pgtrack" or n.startswith(".")} - {".ci"}

    with tempfile.TemporaryDirectory(prefix="pgtrack-") as copy:
        shutil.copytree(ROOT, copy, ignore=unwanted, dirs_exist_ok=True)
        with session.chdir(copy):
            yield
