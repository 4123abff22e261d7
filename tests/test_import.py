"""What `import pgtrack` loads, prints and starts."""

from __future__ import annotations

import importlib.resources
import json

from harness import run_script

LIST = """
    import json, sys, threading
    {imports}
    print(json.dumps([sorted(sys.modules), threading.active_count()]))
"""

FOREIGN = {
    "aiohttp",
    "celery",
    "django",
    "fastapi",
    "flask",
    "gevent",
    "grpc",
    "h11",
    "httpcore",
    "httpx",
    "opentelemetry",
    "prometheus_client",
    "pytest",
    "requests",
    "rq",
    "starlette",
    "structlog",
    "trio",
    "urllib3",
    "werkzeug",
}
SLOW = {
    "asyncio",
    "concurrent.futures",
    "decimal",
    "difflib",
    "ftplib",
    "http",
    "http.client",
    "multiprocessing",
    "platform",
    "ssl",
    "subprocess",
    "tempfile",
    "unittest",
    "urllib.request",
    "uuid",
    "xml",
}
"""Modules that take long to load, and that nobody needs before the first event."""


def loaded(imports: str) -> tuple[set[str], int]:
    """Return the modules and the number of threads after *imports*."""
    done = run_script(LIST.format(imports=imports))
    assert done.stderr == ""
    assert done.returncode == 0
    modules, threads = json.loads(done.stdout)
    return set(modules), threads


def test_it_loads_no_http_library_and_no_framework() -> None:
    """Beyond what attrs and wrapt load, there is little but pgtrack itself."""
    base, _ = loaded("import attrs, wrapt")
    modules, threads = loaded("import pgtrack")
    more = modules - base

    assert not more & FOREIGN
    assert not more & SLOW
    assert threads == 1
    assert not [name for name in more if name.startswith("pgtrack.integrations")]


def test_it_prints_nothing() -> None:
    """Neither the import nor warnings that come of it say anything."""
    done = run_script("import pgtrack", env={"PYTHONWARNINGS": "error"})

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_reads_no_variable() -> None:
    """A wrong environment is no matter of the import."""
    done = run_script("import pgtrack", env={"PRODUCTGRAPH_ENABLED": "garbage"})

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_types_are_ours() -> None:
    """The package says that it is typed, so that type checkers look into it."""
    assert importlib.resources.files("pgtrack").joinpath("py.typed").is_file()
