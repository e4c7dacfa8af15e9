"""Numeric tests take what they allow from `tests.bounds`, never from what one machine happened to give.

A numeric test is a test file that imports torch, or tests.bounds, which imports it for them: what it compares may have
been computed in floating point by a kernel, a method or a model. Files that see only strings, records and statistics in
Python's own numbers are none.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.numbers import allowing, allowing_in, chosen
from tests.numeric import FILES

TESTS = Path(__file__).resolve().parent
NUMERIC = sorted(
    path
    for path in TESTS.rglob("*.py")
    if re.search(r"^\s*(import torch|from (torch|tests\.bounds)\b)", path.read_text(), re.M)
)
# a number this small and not 0 stands beside a comparison for one reason
SMALL = 0.02
BANNED = {"allclose", "assert_close", "approx", "isclose"}


def small(node: ast.AST) -> bool:
    """Whether a small number is written out anywhere inside."""
    return any(
        isinstance(x, ast.Constant) and isinstance(x.value, float) and 0 < abs(x.value) <= SMALL for x in ast.walk(node)
    )


def literals(source: str) -> list[str]:
    """What a test allows on its own: 'line: code' of each place."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
        if (
            (isinstance(node, ast.Call) and name in BANNED)
            or (isinstance(node, ast.Call) and name == "near" and any(small(x) for x in node.args[2:] + node.keywords))
            or (isinstance(node, ast.keyword) and node.arg in ("atol", "rtol", "tolerance") and small(node.value))
            or (
                isinstance(node, ast.Compare)
                and any(isinstance(op, ast.Lt | ast.LtE) and small(x) for op, x in zip(node.ops, node.comparators))
            )
            or (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and small(node.value)
                and isinstance(node.value, ast.Constant)
            )
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", NUMERIC, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_numeric_test_has_a_tolerance_of_its_own(path):
    assert literals(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "assert (a - b).abs().max() < 1e-4",
        "assert a == pytest.approx(b)",
        "torch.testing.assert_close(a, b)",
        "assert torch.allclose(a, b, atol=1e-6)",
        "TOLERANCE = 1e-5",
        "near(a, b, 2e-3)",
        "check(a, tolerance=1e-3)",
    ],
)
def test_a_tolerance_of_its_own_is_found(line):
    assert literals(line)
    assert not literals("near(a, b, bound(torch.float32, 63, 5.0))\nassert a < 0.5 * b\nassert n == 3")


def test_every_test_with_a_tolerance_in_kernels_methods_and_binding_is_in_the_matrix():
    assert {"kernels", "methods"} <= set(FILES)  # binding is in methods/core
    seen = 0
    for path in [path for file in FILES for path in (TESTS / file).rglob("test_*.py")]:
        source = path.read_text()
        names = set(re.findall(r"\w+", " ".join(re.findall(r"^from \w+\.bounds import (.+)", source, re.M))))
        asks = re.compile(rf"\b({'|'.join(name for name in names if name.islower())})\(" if names else "$^")
        tests = [node for node in ast.parse(source).body if getattr(node, "name", "").startswith("test_")]
        asking = {node.name for node in tests if asks.search(ast.unparse(node))}
        assert asking <= allowing(path), path
        seen += len(asking)
    assert seen > 100


def test_a_tolerance_behind_functions_constants_fixtures_and_imports_of_the_tests_is_found():
    found = allowing_in(
        "from tests.bounds import near as close\n"
        "from tests.methods.dense import check, Row\n"
        "def helper(): close(1, 1, 0)\n"
        "LIMIT = [helper]\n"
        "def test_a(): return LIMIT\n"
        "def test_b(helper): pass\n"
        "def test_c(): check()\n"
        "def test_d(): assert Row == 3\n"
    )
    assert {"test_a", "test_b", "test_c", "helper", "LIMIT"} <= found and not found & {"test_d", "Row"}


def test_of_a_family_every_value_is_taken_and_not_every_combination():
    cases = {f"{a}-{b}": {("a", a), ("b", b)} for a in range(19) for b in range(4)}
    taken = chosen(cases.items())
    assert set().union(*(cases[name] for name in taken)) == set().union(*cases.values())
    assert len(taken) <= 19 + 4
    assert taken == chosen(reversed(cases.items()))
    assert chosen([("alone", set())]) == ["alone"]
