"""The layers, read off the imports: who may know whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pgtrack

PACKAGE = Path(pgtrack.__file__).parent

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
)
"""Every module, by its dotted name in the package."""

LAYERS = {
    "leaves": {"exceptions", "typing", "_clock", "_diagnostics", "_ledger"},
    "model": {
        "_config",
        "_context",
        "_destinations",
        "_errors",
        "_event",
        "_limits",
        "_propagation",
        "_cards",
        "_keys",
        "_redaction",
        "_retry",
        "_snapshot",
        "_tracing",
    },
    "delivery": {
        "_console",
        "_file",
        "_folder",
        "_journal",
        "_layout",
        "_line",
        "_outbox",
        "_queue",
        "_record",
        "_source",
        "_spool",
        "_transport",
        "_worker",
    },
    "process": {"_process"},
    "client": {"_client"},
    "surface": {
        "__init__",
        "_api",
        "_blocks",
        "_decorators",
        "_observe",
        "_pytest_plugin",
        "testing",
    },
    "edges": {module for module in MODULES if module.startswith("integrations.")},
}
"""From the bottom up; a module may import its own layer and those below it."""

THIRD_PARTIES = {
    "attrs": None,
    "httpx": {"_transport"},
    "httpcore": {"_transport"},
    "pytest": {"_pytest_plugin"},
    "trio": {"_client"},
    "wrapt": {"_observe"},
}
"""What may be imported from outside of the standard library; None: anywhere."""

FRAMEWORKS = {
    "integrations.aiohttp": {"aiohttp"},
    "integrations.aws_lambda": {"wrapt"},
    "integrations.celery": {"billiard", "celery", "kombu"},
    "integrations.django": {"asgiref", "django"},
    "integrations.flask": {"flask", "werkzeug"},
    "integrations._patches": {"wrapt"},
    "integrations.grpc": {"grpc", "wrapt"},
    "integrations.httpx": {"httpx", "wrapt"},
    "integrations._otlp": {"opentelemetry"},
    "integrations.opentelemetry": {"opentelemetry"},
    "integrations.prometheus": {"prometheus_client"},
    "integrations.requests": {"requests", "urllib3"},
    "integrations.rq": {"rq"},
    "integrations.starlette": {"starlette"},
    "integrations.structlog": {"structlog"},
    "integrations.urllib3": {"urllib3"},
    "integrations.wsgi": {"wrapt"},
}
"""What an integration may import beside: what it is for."""

ORDER = list(LAYERS)


def source_of(module: str) -> str:
    """Return the text of *module*."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8")


def imports_of(module: str) -> list[tuple[str, bool]]:
    """Return what *module* imports at run time, and whether at its top."""
    tree = ast.parse(source_of(module))
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, *, is_top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    visit(other, is_top=is_top)
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, is_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: relative import"
                name = str(child.module)
                if name == "pgtrack":
                    found.extend((f"pgtrack.{a.name}", is_top) for a in child.names)
                else:
                    found.append((name, is_top))
            else:
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                visit(child, is_top=is_top and not is_function)

    visit(tree, is_top=True)
    return found


def layer_of(module: str) -> str:
    """Return the layer that lists *module*."""
    return next(layer for layer, modules in LAYERS.items() if module in modules)


def test_every_module_has_a_layer() -> None:
    """Each module of the package stands in exactly one layer."""
    listed = [module for modules in LAYERS.values() for module in modules]

    assert MODULES == sorted(listed)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_its_own_layer_and_those_below(module: str) -> None:
    """No module imports, at its top, one of a layer above its own."""
    own = ORDER.index(layer_of(module))
    above = [
        name
        for name, is_top in imports_of(module)
        if is_top and name.startswith("pgtrack.")
        if (other := name.removeprefix("pgtrack.")) in MODULES
        if ORDER.index(layer_of(other)) > own
    ]

    assert above == []


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_have_their_place(module: str) -> None:
    """httpx, wrapt and the like are each imported by the one module that needs them."""
    import sys

    misplaced = []
    for name, _ in imports_of(module):
        root = name.split(".")[0]
        if root == "pgtrack" or root in sys.stdlib_module_names:
            continue
        if root in FRAMEWORKS.get(module, ()):
            continue
        places = THIRD_PARTIES.get(root, set())
        if places is not None and module not in places:
            misplaced.append(name)

    assert misplaced == []


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_every_module_says_what_it_is_for(module: str) -> None:
    """Each module starts with a docstring."""
    tree = ast.parse(source_of(module))

    assert ast.get_docstring(tree)


@pytest.mark.parametrize("module", MODULES)
def test_examples_stand_in_the_docs(module: str) -> None:
    """No docstring holds an example: nobody would run it, as those in `docs/` are."""
    assert ">>>" not in source_of(module)


def test_all_is_sorted_and_complete() -> None:
    """`__all__` is sorted, and names each public name that the package imports."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    imported = [
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]

    assert sorted(imported) == pgtrack.__all__
