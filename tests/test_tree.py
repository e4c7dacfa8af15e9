"""The shape of the tree: which way imports point, and what may never be in a tracked file."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
OURS = {"methods", "tasks", "runners", "kernels", "analysis", "kvfrontier"}
# what a folder may import besides the standard library and the light packages everyone may use
MAY = {
    "kernels": {"kernels", "torch", "triton", "rich"},
    "methods": {"methods", "kernels", "torch", "safetensors", "omegaconf", "yaml", "rich"},
    "analysis": {
        "analysis",
        "pandas",
        "numpy",
        "scipy",
        "statsmodels",
        "sklearn",
        "matplotlib",
        "plotly",
        "jinja2",
        "markupsafe",
        "rich",
        "wandb",
        "wandb_workspaces",
        "yaml",
    },
}
NEVER = {
    "tasks": {"torch", "transformers", "methods", "runners", "analysis", "kernels", "kvfrontier"},
    "runners": {"analysis", "kvfrontier"},
    "methods": {"tasks", "runners", "analysis"},
    "analysis": {"torch", "methods", "runners", "tasks", "kernels"},
}
# what of analysis a run may import too: the bootstrap, the reader of records, tables on the screen, a method's colour,
# whole files and the fidelity panel; they import nothing of ours but each other
LEAVES = {
    "analysis.stats", "analysis.records", "analysis.screen", "analysis.style", "analysis.files", "analysis.fidelity"
}  # fmt: skip
LEAVES_MAY = {"numpy", "rich", "matplotlib"}
# methods that stand for no paper: reference points
BASELINES = {"full", "random"}


def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout that are, or are about to be, under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(dotted module, line, at module level) of every import in a file that is executed."""
    tree = ast.parse(path.read_text(), filename=str(path))
    top = {id(node) for node in tree.body}
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # from .x import y stays inside its own package
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            base = f"{package}.{node.module}" if package and node.module else package or (node.module or "")
            found += [(f"{base}.{alias.name}", node.lineno, id(node) in top) for alias in node.names]
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def broken_rules(path: Path) -> list[str]:
    folder = path.relative_to(ROOT).parts[0]
    wrong = []
    for module, line, _ in imports(path):
        head = module.split(".")[0]
        if head in sys.stdlib_module_names:
            continue
        allowed = head in MAY[folder] if folder in MAY else True
        if head in NEVER.get(folder, set()):
            allowed = False
        # the error that a user can cause is one class everywhere; settings, rows and files are checked and read one
        # way, and what is made has one place
        light = ("methods.core.errors", "methods.core.typed", "methods.core.reading", "methods.core.home")
        allowed |= module.rpartition(".")[0] in light and folder == "tasks"
        allowed |= leaf_of(module) in LEAVES and folder == "runners"
        # a task's own remarks have intervals too
        allowed |= leaf_of(module) == "analysis.stats" and folder == "tasks"
        # the library that our caches go under: binding and cache know it, a paper's file never does
        allowed |= head == "transformers" and path.is_relative_to(ROOT / "methods" / "core")
        # a paper's file sees the shared core and the kernels, never another paper
        if folder == "methods" and head == "methods" and path.parent == ROOT / "methods" and path.stem != "__init__":
            allowed = module.split(".")[1:2] == ["core"]
        if not allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return wrong


def leaf_of(module: str) -> str:
    """The module of analysis that an import names, itself or something in it."""
    return ".".join(module.split(".")[:2])


def modules_of(name: str) -> list[Path]:
    """The files of a module or, where it is a package, of all that is in it."""
    path = ROOT.joinpath(*name.split("."))
    return sorted(path.glob("*.py")) or [path.with_suffix(".py")]


def test_what_runs_share_with_analysis_imports_nothing_of_ours_but_itself():
    wrong = [
        f"{leaf}:{line} imports {module}"
        for leaf in sorted(LEAVES)
        for path in modules_of(leaf)
        for module, line, _ in imports(path)
        if module.split(".")[0] not in sys.stdlib_module_names | LEAVES_MAY and leaf_of(module) not in LEAVES
    ]
    assert wrong == []
    only_numbers = {
        module.split(".")[0]
        for leaf in ("stats", "records")
        for module, _, _ in imports(ROOT / "analysis" / f"{leaf}.py")
    }
    assert only_numbers <= sys.stdlib_module_names | {"numpy"}


def test_there_is_one_bootstrap_one_reader_and_one_correction():
    """Nobody else draws samples anew, parses a record's fields, or imports statsmodels."""
    files = [path for folder in sorted(OURS) for path in sources(folder)]
    found = {
        word: {str(path.relative_to(ROOT)) for path in files if re.search(pattern, path.read_text(encoding="utf-8"))}
        for word, pattern in {
            "draws": r"rng\.integers\(\w+, size=\(|\.quantile\(torch\.tensor\(\[0\.025|np\.bincount\(drawn",
            "correction": r"statsmodels|multipletests",
            "fields": r"\"timings\.prompt\"",
        }.items()
    }
    assert found == {
        "draws": {"analysis/stats.py"}, "correction": {"analysis/paired.py"}, "fields": {"analysis/records.py"}
    }  # fmt: skip


@pytest.mark.parametrize("folder", sorted(OURS))
def test_imports_point_one_way(folder):
    files = sources(folder)
    if not files:
        pytest.skip(f"no {folder}/ yet")
    assert [rule for path in files for rule in broken_rules(path)] == []


def test_a_method_that_imports_a_sibling_a_runner_or_transformers_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "methods" / "core").mkdir(parents=True)
    paper = tmp_path / "methods" / "b.py"
    paper.write_text(
        "import torch\nimport transformers\nfrom methods.core.store import Store\nfrom methods.a import A\n"
        "def f():\n    import runners.bind\n"
    )
    wrong = [rule.split(" imports ")[1] for rule in broken_rules(paper)]
    assert wrong == ["transformers", "methods.a.A", "runners.bind"]
    core = tmp_path / "methods" / "core" / "x.py"
    core.write_text("from transformers import Cache\ndef cache_for(model):\n    import runners.bind\n")
    assert [rule.split(" imports ")[1] for rule in broken_rules(core)] == ["runners.bind"]


#: which rooms of runners a room may see, besides itself; the root, which runs a call, sees them all
ROOMS = {
    "settings": {"engine", "base"},
    "engine": set(),
    "records": {"report"},
    "report": {"engine", "records", "cells", "jobs"},
    "learn": {"settings", "engine", "records", "report", "base", "model_setup"},
}


def test_the_rooms_of_runners_see_only_those_below_them():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for room, below in ROOMS.items()
        for path in sources(f"runners/{room}")
        for module, line, _ in imports(path)
        if module.startswith("runners.") and module.split(".")[1] not in below | {room}
    ]
    assert wrong == []
    assert {path.parent.name for path in (ROOT / "runners").glob("*/__init__.py")} == set(ROOMS)


def test_no_file_of_runners_outside_learn_names_a_method():
    names = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - BASELINES
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno} names {node.value}"
        for path in [ROOT / "run.py", *sources("runners"), *sources("hydra_plugins")]
        if not path.is_relative_to(ROOT / "runners" / "learn")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    papers = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources("runners")
        if not path.is_relative_to(ROOT / "runners" / "learn")
        for module, line, _ in imports(path)
        if module.split(".")[0] == "methods" and module.split(".")[1:2] != ["core"] and module.count(".") > 1
    ]
    assert named + papers == []


def fields_of(*classes: str) -> set[str]:
    """What the constructors of these classes assign to self."""
    nodes = [
        node
        for path in (ROOT / "methods" / "core" / "store.py", *sources("methods/core/stores"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name in classes
    ]
    made = [f for node in nodes for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    written = [one for f in made for node in ast.walk(f) for one in targets(node)]
    return {one.attr for one in written if ast.unparse(one.value) == "self"}


def targets(node: ast.AST) -> list[ast.Attribute]:
    """The attributes that a statement assigns to or deletes, or an element of which."""
    given = getattr(node, "targets", [getattr(node, "target", None)])
    whole = [part for one in given if one is not None for part in getattr(one, "elts", [one])]
    bare = []
    for part in whole:
        while isinstance(part, ast.Subscript):
            part = part.value
        bare.append(part)
    return [part for part in bare if isinstance(part, ast.Attribute)]


def writes_to_stores(path: Path, fields: set[str]) -> list[str]:
    """Statements that write a store's field, or into one, from outside."""
    return [
        f"{path.name}:{one.lineno} writes {ast.unparse(one)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for one in targets(node)
        if one.attr in fields and "store" in ast.unparse(one.value).split(".")[-1]
    ]


def test_nobody_writes_the_fields_of_a_store_from_outside():
    fields = {"k", "v", "pos"} | fields_of("Counted", "Store", "RaggedStore", "PartedStore", "QuantizedStore")
    assert {"buffers", "n", "max_slots", "whole", "pages", "parts", "fills"} <= fields
    paths = [path for folder in ("methods", "runners") for path in sources(folder)]
    assert [place for path in paths for place in writes_to_stores(path, fields)] == []


def test_a_write_to_a_store_is_found(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "self.store.max_slots = 3\nstore.k[:, :2] = k\ntwin.store.buffers['k'] *= 2\nstore.n, y = 1, 2\n"
        "self.store = store\nself.n = store.n\ndel store.fills['x']\nstore.track('x')[0] = 1\n"
    )
    found = [one.split(" ")[0] for one in writes_to_stores(file, {"k", "n", "max_slots", "buffers", "fills"})]
    assert sorted(found) == [f"x.py:{n}" for n in (1, 2, 3, 4, 7)]


def test_imports_inside_functions_are_the_ones_that_cannot_be_at_the_top():
    """Of our own modules, in the library: a cache's binding, which needs the contract; torch, which a mistyped key
    must not wait for; forms of sums of attention, which are built on attention; and Triton's, whose package is not
    everywhere."""
    late = {
        (str(path.relative_to(ROOT)), module)
        for folder in ("methods", "kernels")
        for path in sources(folder)
        for module, _, at_top in imports(path)
        if not at_top and module.split(".")[0] in OURS and module.rpartition(".")[2] != "triton"
    }
    assert late == {
        ("methods/core/binding/projections.py", "methods.core.capture.capture_blocks"),
        ("methods/core/contract/method.py", "methods.core.bind.cache_for"),
        ("methods/__init__.py", "methods.core.contract.Method"),
        ("kernels/attend/mixed.py", "kernels.mass.compiled"),
        ("kernels/attend/mixed.py", "kernels.mass.rows"),
    }


#: folders that may hold more than 20 files: a file per method, and what is there for each of them
MANY = {"methods", "tests/methods", "conf/method", "conf/task", "conf/experiment", "claims"}


#: lines of a file of code that a reader takes in; what is compiled for a GPU is written out
LINES = 350


def test_a_file_can_be_read_in_one_go():
    code = [path for path in tracked("*.py") if not str(path.relative_to(ROOT)).startswith("tests/")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in code}
    assert {path: n for path, n in lines.items() if n > LINES and "triton" not in path} == {}


def test_a_folder_can_be_read_at_a_glance():
    files = Counter(
        str(path.parent.relative_to(ROOT))
        for path in tracked("*.py", "*.yaml", "*.md", "*.ipynb", "*.cpp", "*.toml", "*.txt")
    )
    assert {folder: n for folder, n in files.items() if n > 20 and folder not in MANY} == {}
    root = {path.relative_to(ROOT / "runners").parts[0] for path in tracked("runners") if path.suffix == ".py"}
    assert len(root) <= 16


def undocumented(paths: list[Path]) -> list[str]:
    """Public classes and functions without a docstring; one that overrides a documented base needs none."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    classes: dict[str, list[ast.ClassDef]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)

    def inherited(name: str, owner: ast.ClassDef) -> bool:
        for base in (ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in owner.bases):
            if base in ("Protocol", "ABC", "NamedTuple", "Generic", "Exception"):
                continue
            if base not in classes:
                return True  # another package's
            for above in classes[base]:
                told = {n.name for n in above.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)}
                told |= {
                    n.target.id for n in above.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                if name in told or (above is not owner and inherited(name, above)):
                    return True
        return False

    def inside(body: list[ast.stmt], owner: ast.ClassDef | None) -> list[str]:
        found = []
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            is_class = isinstance(node, ast.ClassDef)
            if not ast.get_docstring(node) and (is_class or owner is None or not inherited(node.name, owner)):
                found.append(f"{owner.name + '.' if owner else ''}{node.name}")
            if is_class:
                found += inside(node.body, node)
        return found

    return [f"{path.relative_to(ROOT)}: {name}" for path, tree in trees.items() for name in inside(tree.body, None)]


def test_every_public_function_says_what_it_does():
    assert undocumented([path for path in tracked("*.py") if path.relative_to(ROOT).parts[0] != "tests"]) == []


def test_a_function_without_a_docstring_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "x.py"
    file.write_text(
        "class A:\n    'x'\n    def told(self):\n        'x'\n    def bare(self): ...\n"
        "class B(A):\n    'x'\n    def told(self): ...\n    def bare(self): ...\ndef f(): ...\ndef _g(): ...\n"
    )
    assert undocumented([file]) == ["x.py: A.bare", "x.py: B.bare", "x.py: f"]


def test_heavy_packages_are_imported_only_when_they_are_used():
    heavy = {"datasets", "lm_eval", "wandb", "wandb_workspaces", "submitit", "optuna", "plotly", "statsmodels"}
    eager = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for folder in sorted(OURS - {"analysis"})
        for path in sources(folder)
        for module, line, at_top in imports(path)
        if at_top and module.split(".")[0] in heavy
    ]
    assert eager == []


def test_no_file_names_a_machine_or_a_registry():
    # written so that these lines do not match themselves
    machine = re.compile(
        r"/(?:work|farm|root)/|/home/[a-z]|pypi[.]org|python[h]osted[.]|npmjs[.]org|deb[.]debian|[.][.]/shared"
    )
    text = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".sh", ".ipynb", ""}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path.suffix in text and path.parent.name != ".ci"
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []


def test_every_method_yaml_names_a_class_that_exists():
    for path in sorted((ROOT / "conf" / "method").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        if "_target_" not in config:
            assert config.get("defaults"), f"{path.name} has neither _target_ nor a defaults list that brings one"
            continue
        module, name = config["_target_"].rsplit(".", 1)
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert source.is_file(), f"{path.name}: {config['_target_']} has no file {source.relative_to(ROOT)}"
        classes = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}
        assert name in classes, f"{path.name}: {source.relative_to(ROOT)} has no class {name}"


def test_every_method_file_says_which_paper_and_how_it_departs_from_it():
    for path in sorted((ROOT / "methods").glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc, f"{path.name} has no docstring"
        if path.stem in BASELINES | {"__init__"}:
            continue
        for field in ("Paper:", "Idea:", "Here:"):
            assert field in doc, f"methods/{path.name}: the docstring has no line {field}"


def test_every_method_file_has_a_yaml_that_builds_it():
    yamls = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "method").glob("*.yaml")}
    parts = [part for config in yamls.values() for part in (config, config.get("store"), config.get("allocator"))]
    built = [part for part in parts if part and "_target_" in part]
    targets = {node["_target_"].split(".")[1] for node in built}
    files = {path.stem for path in (ROOT / "methods").glob("*.py")} - {"__init__"}
    assert files <= targets, f"no conf/method/*.yaml builds {sorted(files - targets)}"


def test_no_module_is_a_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [str(path.relative_to(ROOT)) for path in tracked("*.py") if path.stem in drawers] == []


def test_transformers_does_not_take_our_kernels_folder_for_the_hub_package_of_that_name():
    # it looks for a distribution that provides "kernels" and asks for a version range; ours must never fall into it
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def unsaid_encodings(path: Path) -> list[str]:
    """Calls that read or write text in whatever encoding the machine has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        texts = name in ("read_text", "write_text") and len(node.args) < (1 if name == "read_text" else 2)
        if name == "open" and owner not in ("os", "gzip"):
            modes = node.args[not isinstance(node.func, ast.Attribute) :]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "" if modes else "r"
            texts = isinstance(mode, str) and mode != "" and "b" not in mode
        if texts:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_text_files_are_utf_8_whatever_the_machine_says():
    paths = [
        ROOT / "run.py",
        *(path for folder in sorted(OURS | {"benchmarks", "package"}) for path in sources(folder)),
    ]
    assert [place for path in paths for place in unsaid_encodings(path)] == []
