"""Pytest plugin of `make test-numeric`: of what is collected, the tests that compare computed numbers.

    python -m pytest -p tests.numbers tests/kernels

A test compares numbers when it asks tests.bounds or kernels.bounds for anything, itself or through a function of the
tests. Of a parametrised one as many cases are taken as show every value of every parameter once: all their
combinations add time and no other arithmetic.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from zlib import crc32

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: what knows how far apart numbers may be
BOUNDS = ("tests.bounds", "kernels.bounds")


@cache
def allowing(path: Path) -> frozenset[str]:
    """Names of a module's own functions, classes and constants that ask for a bound, and of those it imports."""
    return allowing_in(path.read_text())


def allowing_in(source: str) -> frozenset[str]:
    """`allowing` of a module's text."""
    tree, found = ast.parse(source), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            file = ROOT / (node.module.replace(".", "/") + ".py")
            for name in node.names:
                if node.module in BOUNDS or (node.module.startswith("tests.") and name.name in allowing(file)):
                    found.add(name.asname or name.name)
    parts = {name: used(node) for node in tree.body for name in defined(node)}
    while more := {name for name, words in parts.items() if words & found} - found:
        found |= more
    return frozenset(found)


def defined(node: ast.stmt) -> list[str]:
    """What a statement of a module gives a name to."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]


def used(node: ast.AST) -> set[str]:
    """Names inside, those of fixtures included."""
    names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
    return names | {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}


def chosen(cases: Iterable[tuple[str, set]]) -> list[str]:
    """Of one test's cases (name, values), those that show every value; in an order by chance, always the same."""
    taken, seen = [], set()
    for name, values in sorted(cases, key=lambda case: crc32(case[0].encode())):
        if not taken or values - seen:
            taken.append(name)
            seen |= values
    return taken


@pytest.hookimpl(trylast=True)  # once -m and -k have had their say
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests: dict[str, list[tuple[str, set]]] = {}
    for item in items:
        function = re.sub(r"\[.*", "", item.nodeid)
        if function.rpartition("::")[2] in allowing(item.path):
            spec = getattr(item, "callspec", None)
            tests.setdefault(function, []).append(
                (item.nodeid, {(k, repr(v)) for k, v in spec.params.items()} if spec else set())
            )
    kept = {name for cases in tests.values() for name in chosen(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]
