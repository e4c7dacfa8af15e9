"""Which code produced a number: a hash of the definitions that a run depends on, and the commit they belong to.

The hash is over syntax trees. Comments, docstrings, blank lines and imports do not count, and neither does where a
definition stands: moving a function to another file, or renaming a module, leaves it alone. The modules are found by
their imports, from those that a run names; the user's own count like the project's, installed packages do not.
"""

import ast
import hashlib
import importlib.util
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from methods.core import home
from methods.core.home import ROOT
from methods.core.home.imports import bound_in

#: packages that count wherever they are installed
OURS = (*home.FOLDERS, "kvfrontier")
# nothing that a definition computes: documentation, and what only a type checker or a person at a terminal meets
_NOT_RUN = {"TYPE_CHECKING", "__name__"}
# where a file lies, and which of its names are public
_ABOUT_FILES = {"__file__", "__all__"}
_NOTHING = (ast.expr_context, ast.Import, ast.ImportFrom, ast.Pass)
# where statements hold statements
_INSIDE = ("body", "orelse", "finalbody", "handlers", "cases")


@dataclass(frozen=True)
class Code:
    """What a run depends on. digest: of all definitions.  modules: by name, a hash of the definitions in each."""

    digest: str
    modules: dict[str, str]


def code_of(names: Iterable[str]) -> Code:
    """The code of some modules, or of the modules that hold dotted names, and of every module that they import.

    Raises ModuleNotFoundError for a name that no module holds; an installed package's adds nothing.
    """
    return _code(tuple(sorted(set(names))))


@cache
def _code(names: tuple[str, ...]) -> Code:
    todo = [module for name in names for module in _holding(name)]
    by_module: dict[str, frozenset[str]] = {}
    while todo:
        name = todo.pop()
        if name not in by_module:
            by_module[name], imported = _read(name)
            todo += imported
    every = frozenset[str]().union(*by_module.values())
    return Code(_digest(every, 12), {name: _digest(hashes, 8) for name, hashes in sorted(by_module.items()) if hashes})


def changed(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The modules of two `Code`s that are not the same; one that was only moved or renamed is."""
    before, after = set(old.values()), set(new.values())
    gone = [name for name, digest in old.items() if digest not in after and name not in new]
    return sorted([name for name, digest in new.items() if digest not in before] + gone)


@cache
def commit() -> str | None:
    """The checkout's commit, with a plus sign if files differ from it; None outside a git checkout.

    Of an installed package the one that it was built from.
    """
    if home.PREFIX:
        built = ROOT / "commit.txt"
        return built.read_text(encoding="utf-8").strip() if built.is_file() else None
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
def _read(name: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Hashes of a module's definitions, and the modules that it imports."""
    path = _source(name)
    assert path is not None
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    hashes = {hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest() for text in _definitions(tree)}
    compiled = path.with_suffix(".cpp")  # the C++ form that a module calls lies beside it
    if compiled.is_file():
        hashes.add(hashlib.sha256(_without_comments(compiled.read_text(encoding="utf-8")).encode()).hexdigest())
    return frozenset(hashes), tuple(dict.fromkeys(_imported(tree.body, package)))


def _definitions(tree: ast.Module) -> Iterator[str]:
    """Every statement of a module that computes something, as text."""
    for node in tree.body:
        if isinstance(node, ast.If) and _NOT_RUN & _names_in(node.test):
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign) and _ABOUT_FILES & _names_in(node):
            continue
        if said := _said(node):
            yield said


def _said(node: object) -> str:
    """A node as text that is the same in every version of Python; "" for what computes nothing.

    Fields that are empty are left out, since later versions add some.
    """
    if isinstance(node, _NOTHING):
        return ""
    if isinstance(node, list):
        return ",".join(filter(None, map(_said, node)))
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return ""
    kept = []
    for field in node._fields:
        value = getattr(node, field, None)
        if value is not None and field != "type_comment" and (said := _said(value)):
            kept.append(f"{field}={said}")
    return f"{type(node).__name__}({' '.join(kept)})"


def _names_in(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _without_comments(text: str) -> str:
    """C++ without comments, its blanks made one."""
    return re.sub(r"\s+", " ", re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S)).strip()


def _imported(body: Iterable[ast.AST], package: str) -> Iterator[str]:
    """The modules that are imported when statements run, wherever inside them, with the packages they are in."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in _names_in(node.test):
            yield from _imported(node.orelse, package)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from _chain(alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            for alias in node.names:
                yield from _chain(f"{base}.{alias.name}")
        else:
            for field in _INSIDE:
                yield from _imported(getattr(node, field, ()), package)


def _chain(name: str) -> list[str]:
    """The modules that importing a dotted name reads: the packages around it, and itself where it is one.

    Named as a checkout names them: an installed package's code is the same.
    """
    parts = home.plain(name).split(".")
    whole = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [module for module in whole if _source(module) is not None]


def _holding(name: str) -> list[str]:
    """The modules that are read for a dotted name. Raises ModuleNotFoundError where none of them holds it."""
    name = home.plain(name)
    modules = _chain(name)
    if not modules and _lies(name.partition(".")[0]) is None:
        raise ModuleNotFoundError(f"{name}: no module of that name can be found", name=name)
    left = name.removeprefix(modules[-1]).strip(".").partition(".")[0] if modules else ""
    if left and left not in _bound(cast("Path", _source(modules[-1]))):
        raise ModuleNotFoundError(f"{name}: {modules[-1]} holds no {left}", name=name)
    return modules


_bound = cache(bound_in)


@cache
def _source(name: str) -> Path | None:
    """The file of a module; None where it is none, or an installed package's, or not written in Python."""
    lies = _lies(name)
    path = lies[0] if lies else None
    return path if path and (name.partition(".")[0] in OURS or not home.installed(path)) else None


@cache
def _lies(name: str) -> tuple[Path | None, tuple[str, ...]] | None:
    """A module's file in Python, if it has one, and the folders of the modules inside it; found without running any."""
    above, _, last = name.rpartition(".")
    if not above:
        try:
            spec = importlib.util.find_spec(home.here(name))
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        path = Path(spec.origin) if spec.has_location and spec.origin and spec.origin.endswith(".py") else None
        return path, tuple(spec.submodule_search_locations or ())
    package = _lies(above)
    for folder in package[1] if package else ():
        inside = Path(folder, last)
        if (path := inside / "__init__.py").is_file():
            return path, (str(inside),)
        if (path := inside.with_name(f"{last}.py")).is_file():
            return path, ()
        if inside.is_dir():
            return None, (str(inside),)
    return None


def _digest(parts: Iterable[str], length: int) -> str:
    return hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()[:length]
