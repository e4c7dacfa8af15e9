"""Source whose imports of a checkout's modules, such as `from methods.core.store import Store`, are of a package's.

The build of the wheel reads our own files so (package/wheel.py), and an installed package the user's. Imports alone
change: the hash of the code is the same.
"""

from __future__ import annotations

# the standard library only: the build runs this file where nothing else is installed
import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGE = "kvfrontier"
_FROM = re.compile(rb"from(?:\s|\\\n)+")


def mapped(source: str, is_ours: Callable[[str, str | None], bool]) -> str:
    """Python source whose imports of ours are of modules inside the package; all else, and every line, stays in place.

    is_ours: whether a module is ours, by its name and the name that is taken from it (None: the module itself).
    Raises SyntaxError.
    """
    text = source.encode()  # a column of a syntax tree counts bytes
    starts = [0]
    for line in text.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    changes: list[tuple[int, int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module and all(is_ours(node.module, alias.name) for alias in node.names):
                match = _FROM.match(text, starts[node.lineno - 1] + node.col_offset)
                assert match is not None
                changes.append((match.end(), match.end(), f"{PACKAGE}."))
        elif isinstance(node, ast.Import) and any(is_ours(alias.name, None) for alias in node.names):
            assert node.end_lineno is not None and node.end_col_offset is not None
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            said = "; ".join(_import(alias, is_ours(alias.name, None)) for alias in node.names)
            changes.append((begin, end, said + " \\\n" * text[begin:end].count(b"\n")))
    for begin, end, said in sorted(changes, reverse=True):
        text = text[:begin] + said.encode() + text[end:]
    return text.decode()


def _import(alias: ast.alias, ours: bool) -> str:
    """An `import` of one module that binds the name that it bound."""
    bound = f" as {alias.asname}" if alias.asname else ""
    if not ours:
        return f"import {alias.name}{bound}"
    top, _, inside = alias.name.partition(".")
    if bound:
        return f"import {PACKAGE}.{alias.name}{bound}"
    return (f"import {PACKAGE}.{alias.name}; " if inside else "") + f"from {PACKAGE} import {top}"


def held(root: Path, tops: Sequence[str]) -> Callable[[str, str | None], bool]:
    """Whether a module below one of these top folders or files of `root` is there, and a name that is taken of it."""

    def is_held(module: str, name: str | None) -> bool:
        path = root.joinpath(*module.split("."))
        if module.partition(".")[0] not in tops or not (path.is_dir() or path.with_suffix(".py").is_file()):
            return False
        if name in (None, "*") or "." in module or not path.is_dir():
            return True
        # a package of ours may share its name with another's, which has other names
        inside = path / str(name)
        first = path / "__init__.py"
        return inside.is_dir() or inside.with_suffix(".py").is_file() or (first.is_file() and name in bound_in(first))

    return is_held


def bound_in(path: Path) -> set[str]:
    """The names that a file of Python defines or imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
