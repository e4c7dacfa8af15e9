"""The hash of the code that a number comes from: what changes it, what does not, and that it covers what runs."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from methods import method_names
from runners.records import provenance as revision
from runners.records.provenance import changed, code_of

METHOD = '''"""A method."""
import os
from mine_helper import twice


class Mine:
    """Says its score."""

    def score(self, x):
        return twice(x) + 1
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes modules of the user's own and gives their code: mine(mine_method="...") -> Code."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(root: str = "mine_method.Mine", **files: str | None):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if text is None else path.write_text(text)
        importlib.invalidate_caches()
        forget()
        return code_of([root])

    yield write
    forget()


def forget() -> None:
    for kept in (revision._code, revision._read, revision._source, revision._lies):
        kept.cache_clear()


def test_a_users_own_module_outside_the_tree_is_hashed_with_what_it_imports(mine):
    first = mine(mine_method=METHOD, mine_helper="def twice(x):\n    return 2 * x\n")
    assert set(first.modules) == {"mine_method", "mine_helper"}
    edited = mine(mine_method=METHOD.replace("+ 1", "- 1"))
    assert edited.digest != first.digest and changed(first.modules, edited.modules) == ["mine_method"]
    again = mine(mine_method=METHOD, mine_helper="def twice(x):\n    return 3 * x\n")
    assert again.digest != first.digest and changed(first.modules, again.modules) == ["mine_helper"]


def test_docstrings_comments_imports_and_blanks_do_not_count(mine):
    first = mine(mine_method=METHOD, mine_helper="def twice(x):\n    return 2 * x\n")
    text = (
        METHOD.replace("A method.", "Another text.").replace("Says its score.", "").replace("import os\n", "# note\n")
    )
    text = text.replace("return", "# why\n        return").replace("\n\n\n", "\n\n\n\n\n")
    assert mine(mine_method=text).digest == first.digest


def test_moving_a_definition_or_renaming_a_module_changes_nothing(mine):
    helper = "def twice(x):\n    return 2 * x\n"
    first = mine(mine_method=METHOD, mine_helper=helper)
    moved = mine(
        mine_method=METHOD.replace("mine_helper", "mine_other.deep"), mine_helper=None, mine_other__deep=helper,
        mine_other____init__="",
    )  # fmt: skip
    assert set(moved.modules) == {"mine_method", "mine_other.deep"}
    assert moved.digest == first.digest and changed(first.modules, moved.modules) == []
    whole = METHOD.replace("from mine_helper import twice\n", helper)
    assert mine(mine_method=whole).digest == first.digest


def test_relative_and_late_imports_are_followed_and_those_for_types_are_not(mine):
    text = (
        "from typing import TYPE_CHECKING\nfrom . import near\nif TYPE_CHECKING:\n    from mine_pack import types\n"
        "class Mine:\n    def score(self):\n        from .deep import far\n        return far.x + near.x\n"
    )
    first = mine(
        "mine_pack.method.Mine", mine_pack__method=text, mine_pack____init__="", mine_pack__near="x = 1\n",
        mine_pack__types="y = 1\n", mine_pack__deep____init__="", mine_pack__deep__far="x = 2\n",
    )  # fmt: skip
    assert set(first.modules) == {"mine_pack.method", "mine_pack.near", "mine_pack.deep.far"}
    assert mine("mine_pack.method.Mine", mine_pack__types="y = 2\n").digest == first.digest
    assert mine("mine_pack.method.Mine", mine_pack__deep__far="x = 3\n").digest != first.digest


def test_where_a_file_lies_and_what_it_does_on_the_command_line_do_not_count(mine):
    first = mine(mine_method="class Mine:\n    x = 1\n")
    more = "from pathlib import Path\nHOME = Path(__file__).parent\n__all__ = ['Mine']\n"
    assert (
        mine(mine_method=f"{more}class Mine:\n    x = 1\nif __name__ == '__main__':\n    print(1)\n").digest
        == first.digest
    )


def test_cpp_beside_a_module_counts_without_its_comments(mine, tmp_path):
    (tmp_path / "mine_method.cpp").write_text("// twice\nint f(int x) { return 2 * x; }\n")
    first = mine(mine_method="class Mine:\n    x = 1\n")
    (tmp_path / "mine_method.cpp").write_text("int f(int x) {\n  /* twice */ return 2 * x;\n}\n")
    assert mine().digest == first.digest
    (tmp_path / "mine_method.cpp").write_text("int f(int x) { return 3 * x; }\n")
    assert mine().digest != first.digest


@pytest.mark.parametrize("name", ["runners.latncy", "runners.engine.answer.by_luck", "no_such_package.thing"])
def test_a_name_that_no_module_holds_is_no_part_of_a_hash_unnoticed(name):
    with pytest.raises(ModuleNotFoundError, match=name.split(".")[-1] if "luck" in name else name.split(".")[0]):
        code_of([name])


def test_an_installed_packages_code_is_told_by_its_version_and_not_hashed():
    assert code_of(["yaml.safe_load", "json.loads"]).modules == {}


def test_every_import_of_ours_that_a_hash_follows_can_be_found():
    """An import that led nowhere would leave its code out without a word."""
    sought = set()
    for folder in revision.OURS:
        for path in (revision.ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                for name in names:
                    if name.partition(".")[0] in revision.OURS and name not in sought:
                        sought.add(name)
                        assert revision._holding(name), f"{path}: {name}"


def test_the_code_of_a_run_is_the_shared_core_its_own_method_and_nothing_that_only_shows():
    from runners.engine import answer
    from runners.engine.loading import Checkpoint
    from runners.engine.prompt import Encoder

    parts = [answer.Pass, Checkpoint, Encoder]
    found = code_of(["methods.nacl.NACL", "tasks.longbench.task", *(f"{p.__module__}.{p.__qualname__}" for p in parts)])
    wanted = {
        "methods.nacl", "methods.core.eviction", "methods.core.store", "runners.engine.generation",
        "runners.engine.shared_prefill", "kernels.mass.reference", "kernels.mass.compiled", "tasks.scoring.metrics",
        "runners.engine.loading", "runners.engine.prompt",
    }  # fmt: skip
    assert wanted <= set(found.modules)
    only_shown = {"methods.snapkv", "runners.evaluate", "runners.report.run_table", "runners.records.record"}
    assert not only_shown & set(found.modules)


def test_methods_have_codes_of_their_own():
    names = [name for name in method_names() if (revision.ROOT / "methods" / f"{name}.py").exists()]
    digests = {name: code_of([f"methods.{name}"]).digest for name in names}
    assert len(set(digests.values())) == len(digests) > 5


def test_the_hash_is_of_syntax_trees_that_every_version_of_python_writes_alike():
    def said(text: str) -> str:
        return ",".join(revision._definitions(ast.parse(text)))

    assert said("def f(a, b=None):\n    return a\n") == said("def f(a, b=None):  # note\n    'text'\n    return a\n")
    assert said("x = None") != said("x = 0") != said("x = ''") and said("x = 1") != said("x = True") != said("x = 1.0")
    assert "type_params" not in said("def f(): ...") and "ctx" not in said("x = y")
    assert sys.version_info >= (3, 11) and Path(revision.__file__).is_file()
