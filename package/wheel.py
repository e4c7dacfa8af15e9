"""Build the wheel: the folders of the checkout inside the package `kvfrontier`, their imports to match.

A checkout runs in place, with `methods`, `kernels` and `tasks` at the top. Installed under these names they would stand
in the way of other packages of the same names. So the wheel installs `kvfrontier` only, and `from methods.x import y`
becomes `from kvfrontier.methods.x import y` when it is built; nothing else of a file changes.
"""

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile, rmtree
from types import ModuleType

from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kvfrontier"
#: folders of modules, and modules; with what else lies in them
CODE = ("methods", "tasks", "runners", "kernels", "analysis", "hydra_plugins", "run.py")
FILES = ("conf", "assets")
#: what writes files of the repository
TOOLS = (
    "tasks/bundle.py",
    "tasks/bundles",
    "tasks/real",
    "analysis/tables.py",
    "runners/learn/reference/card.py",
    "runners/learn/reference/card.md",
)
#: the commit that a wheel was built from, for records
COMMIT = "commit.txt"


class BuildPy(build_py):
    """The step of setuptools that lays out the modules of a wheel; a checkout that is installed to be edited stays."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
        else:
            rmtree(self.build_lib, ignore_errors=True)  # an earlier build's files would be packed too
            lay_out(Path(self.build_lib))


def lay_out(folder: Path) -> None:
    """Write the package into a folder."""
    imports = _imports()
    tops = [top.removesuffix(".py") for top in CODE]
    is_ours = imports.held(ROOT, tops)
    for path in sources():
        inside = path.relative_to(ROOT)
        target = folder / (inside if inside.parts[0] == PACKAGE else PACKAGE / inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py":
            target.write_text(imports.mapped(path.read_text(encoding="utf-8"), is_ours), encoding="utf-8")
        else:
            copyfile(path, target)
    if said := commit():
        (folder / PACKAGE / COMMIT).write_text(f"{said}\n", encoding="utf-8")


def sources() -> Iterator[Path]:
    """The files that are installed."""
    for top in (PACKAGE, *CODE, *FILES):
        folder = ROOT / top
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
            inside = path.relative_to(ROOT)
            generated = any(part == "__pycache__" or part.startswith(".") for part in inside.parts)
            tool = any(inside.is_relative_to(one) for one in TOOLS)
            if path.is_file() and not generated and not tool and path.suffix not in (".pyc", ".tmp", ".log"):
                yield path


def commit() -> str | None:
    """The checkout's commit, with a plus sign if files differ from it; of an unpacked sdist, the one it was made of."""
    kept = ROOT / COMMIT
    if kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    if not head or not top or Path(top).resolve() != ROOT:
        return None
    return head[:12] + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()


def _imports() -> ModuleType:
    """The module that maps imports, by its file: the packages that its own package needs need not be there."""
    spec = importlib.util.spec_from_file_location(
        "kvfrontier_imports", ROOT / "methods" / "core" / "home" / "imports.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
