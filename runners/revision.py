"""Which code produced a number: a hash of the source files that the run depends on, and the commit they belong to."""

import ast
import hashlib
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ("runners", "methods", "tasks", "kernels")


def code_revision(modules: Iterable[str]) -> str:
    """A hash of the modules' sources and of every source of ours that they import, directly or not.

    Files that the run does not touch, such as another method's, do not change it.
    """
    todo = [path for name in modules if (path := _source(name))]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported(path)
    total = hashlib.sha256()
    for path in sorted(found):
        total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


@cache
def commit() -> str | None:
    """The checkout's commit, with a plus sign if files differ from it; None outside a git checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip()[:12] + ("+" if changes.stdout.strip() else "")


@cache
def _imported(path: Path) -> tuple[Path, ...]:
    """Our source files that one source file imports, wherever in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(source for name in names if (source := _source(name)))


def _source(name: str) -> Path | None:
    """The file of a module of ours, or of the module that holds the dotted name."""
    parts = name.split(".")
    while parts and parts[0] in OURS:
        base = ROOT.joinpath(*parts)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        parts.pop()
    return None
