"""Numeric tests take what they allow from `tests.bounds`, never from what one machine happened to give.

A numeric test is a test file that imports torch, or tests.bounds, which imports it for them: what it compares may have
been computed in floating point by a kernel, a method or a model. Files that see only strings, records and statistics in
Python's own numbers are none.
"""

import ast
import re
from pathlib import Path

import pytest

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
