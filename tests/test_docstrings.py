"""Every public function and class says what it is for, where it does not override one that does."""

import ast
from collections.abc import Iterator

import pytest

from tests.test_tree import ROOT, tracked

ROOMS = ("analysis", "kernels", "kvfrontier", "methods")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def trees(*folders: str) -> dict[str, ast.Module]:
    """path -> syntax tree of every module of the folders."""
    paths = tracked(*(f"{folder}/*.py" for folder in folders))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def classes(modules: dict[str, ast.Module]) -> dict[str, ast.ClassDef]:
    """name -> class; names are unique enough for a base to be found by its own."""
    return {node.name: node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def bases(kind: ast.ClassDef) -> list[str]:
    """Names of the classes that it stands on, without the module and what is in brackets."""
    plain = (base.value if isinstance(base, ast.Subscript) else base for base in kind.bases)
    return [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in plain]


#: classes of the standard library whose functions are none of ours: what stands on one of them has to say all itself
PLAIN = {"ABC", "Enum", "Generic", "NamedTuple", "Protocol", "dict", "list", "str"}


def said_above(kind: ast.ClassDef, name: str, known: dict[str, ast.ClassDef]) -> bool:
    """Whether a class that it stands on documents the function, or is a library's that may."""
    for base in bases(kind):
        if base not in known:
            if base not in PLAIN and not base.endswith(("Error", "Exception")):
                return True
            continue
        own = [node for node in known[base].body if isinstance(node, FUNCTION) and node.name == name]
        if any(ast.get_docstring(node) for node in own) or said_above(known[base], name, known):
            return True
    return False


def silent(body: list[ast.stmt], known: dict[str, ast.ClassDef], inside: ast.ClassDef | None = None) -> Iterator[str]:
    """Public functions and classes of a body that say nothing."""
    for node in body:
        if not isinstance(node, (*FUNCTION, ast.ClassDef)) or node.name.startswith("_"):
            continue
        name = node.name if inside is None else f"{inside.name}.{node.name}"
        told = ast.get_docstring(node) is not None
        if isinstance(node, ast.ClassDef):
            yield from silent(node.body, known, node)
        elif inside is not None and said_above(inside, node.name, known):
            told = True
        if not told:
            yield name


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_function_says_what_it_is_for(room):
    modules = trees(room)
    assert len(modules) > 1
    known = classes(trees("kernels", "methods", "runners", "tasks", "analysis"))
    assert {path: names for path, tree in modules.items() if (names := [*silent(tree.body, known)])} == {}


def test_a_function_that_says_nothing_is_found():
    tree = ast.parse(
        "def f(): ...\n"
        "def _f(): ...\n"
        "class A:\n"
        '    """A."""\n'
        "    def g(self): ...\n"
        "    def h(self):\n"
        '        """H."""\n'
        "class B(A):\n"
        "    def h(self): ...\n"
        "    def i(self): ...\n"
    )
    assert [*silent(tree.body, classes({"": tree}))] == ["f", "A.g", "B.i", "B"]
