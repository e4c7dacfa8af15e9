"""The wheel: what is in it, that its code is the checkout's, and that it runs beside packages of our folders' names."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from kvfrontier import command as command_line
from methods.core.errors import UserError
from methods.core.home.imports import bound_in, held, mapped
from runners.records.provenance import code_of
from runners.settings.check import settle
from runners.settings.explain import explain
from runners.settings.words import folders_of
from tests.test_contributing import blocks
from tests.test_run import write_split
from tests.test_tree import imports

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("methods", "tasks", "runners", "kernels", "analysis", "hydra_plugins")
#: names that a run's code hash starts from
NAMES = ("methods.snapkv.SnapKV", "tasks.needle.Needle")


def python(script: str, *words: str, at: Path, **environment: str) -> str:
    """What a script prints, in a process of its own that sees the folders of PYTHONPATH only."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "", **environment}
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=at, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built in a copy of it."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__")
    for name in (*FOLDERS, "kvfrontier", "package", "conf", "assets"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("run.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    (copy / "build" / "lib" / "methods").mkdir(parents=True)
    (copy / "build" / "lib" / "methods" / "gone.py").touch()  # what an earlier build may have left
    name = python("from setuptools import build_meta as b; print(b.build_wheel('.'))", at=copy).splitlines()[-1]
    return copy / name


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked, and beside it packages of others that are called `kernels` and `tasks`."""
    folder = tmp_path_factory.mktemp("prefix") / "site-packages"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    strangers(folder)
    return folder


def strangers(folder: Path) -> None:
    for name in ("kernels", "tasks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(f"WHOSE = 'the other {name}'\n")


def test_the_wheel_installs_kvfrontier_alone_with_all_that_it_reads(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (meta,) = {name.partition("/")[0] for name in names} - {"kvfrontier"}
        told = {
            name: file.read(f"{meta}/{name}").decode() for name in ("top_level.txt", "entry_points.txt", "METADATA")
        }
    assert meta.endswith(".dist-info") and told["top_level.txt"].split() == ["kvfrontier"]
    assert "kvfrontier = kvfrontier.command:main" in told["entry_points.txt"]
    for extra in ("analysis", "triton", "gguf", "slurm", "wandb", "dev"):
        assert f"Provides-Extra: {extra}\n" in told["METADATA"]
    wanted = [
        path.relative_to(ROOT)
        for top, pattern in [("conf", "*"), ("assets", "*"), *((top, "*.[cjh]*") for top in FOLDERS)]
        for path in (ROOT / top).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts and path.parent != ROOT / "tasks" / "real"
    ]  # tasks/real makes splits of the repository
    assert any(path.suffix == ".cpp" for path in wanted) and any(path.suffix == ".j2" for path in wanted)
    assert [str(path) for path in wanted if f"kvfrontier/{path.as_posix()}" not in names] == []
    for name in ("py.typed", "run.py", "command.py", "kernels/lanes.h"):
        assert f"kvfrontier/{name}" in names


def test_every_import_of_ours_in_the_wheel_is_of_a_module_inside_the_package(site):
    wrong = []
    is_held = held(site, ["kvfrontier"])
    for path in (site / "kvfrontier").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            taken: list[tuple[str, str | None]] = []
            if isinstance(node, ast.Import):
                taken = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                taken = [(node.module or "", alias.name) for alias in node.names]
            for module, name in taken:
                top = module.partition(".")[0]
                if top in (*FOLDERS, "run") and not module.startswith("hydra_plugins.hydra_"):
                    wrong.append(f"{path}:{node.lineno} imports {module}")
                if top == "kvfrontier" and not is_held(module, name):
                    wrong.append(f"{path}:{node.lineno} imports {module}.{name}, which is not there")
    assert wrong == []


def test_a_record_of_the_installed_package_names_the_same_code_as_the_checkouts(site):
    here = code_of(NAMES)
    script = (
        "import json, sys; from kvfrontier.runners.records.provenance import code_of; found = code_of(sys.argv[1:]); "
        "print(json.dumps([found.digest, found.modules]))"
    )
    assert json.loads(python(script, *NAMES, at=site.parent, PYTHONPATH=str(site))) == [here.digest, here.modules]
    assert len(here.modules) > 20 and {"methods.snapkv", "kernels.attend.compiled", "tasks.needle"} <= set(here.modules)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from kernels.one import x, y as z", "from kvfrontier.kernels.one import x, y as z"),
        ("from  \\\n kernels.one import (\n x)", "from  \\\n kvfrontier.kernels.one import (\n x)"),
        ("from kernels import one", "from kvfrontier.kernels import one"),
        ("from kernels import get_kernel", "from kernels import get_kernel"),
        ("from kernels.two import x", "from kernels.two import x"),
        ("from .kernels import x", "from .kernels import x"),
        ("from kernelsmith import x", "from kernelsmith import x"),
        ("import kernels", "from kvfrontier import kernels"),
        ("import kernels.one", "import kvfrontier.kernels.one; from kvfrontier import kernels"),
        ("import os, kernels.one as k, sys", "import os; import kvfrontier.kernels.one as k; import sys"),
        ("if 1: import os, \\\n kernels\nx = 1", "if 1: import os; from kvfrontier import kernels \\\n\nx = 1"),
        ("é = 1; from kernels.one import é", "é = 1; from kvfrontier.kernels.one import é"),
        ('"""from kernels.one import x"""  # import kernels', '"""from kernels.one import x"""  # import kernels'),
    ],
)
def test_imports_of_ours_are_mapped_and_nothing_else(tmp_path, before, after):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "kernels" / "one.py").touch()
    assert mapped(before, held(tmp_path, ["kernels"])) == after
    assert after.count("\n") == before.count("\n")
    ast.parse(after)


def test_a_package_of_ours_gives_the_names_that_it_binds(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "import os.path\nfrom a import b as c\nx: int = 1\ndef f(): ...\n"
    )
    assert bound_in(tmp_path / "kernels" / "__init__.py") == {"os", "c", "x", "f"}
    for name, ours in (("f", True), ("b", False), ("*", True), (None, True)):
        assert held(tmp_path, ["kernels"])("kernels", name) is ours


USERS = {
    # written for a checkout, with imports of ours at the top, in a function, and of another file of the user's own
    "mine/mine.py": "import sys\n"
    "import methods.core.errors\n"
    "from kernels import WHOSE\n"
    "from beside import later\n"
    "from tasks.helper import HELP\n"
    "class Mine(methods.core.errors.UserError):\n"
    "    pass\n",
    "mine/beside.py": "def later():\n    from methods.core.errors import UserError\n    return UserError\n",
    "mine/tasks/helper.py": "from methods.core.errors import BudgetMiss\nHELP = 'help'\n",
    "mine/methods/own.py": "from methods.core.errors import UserError\nclass Own(UserError):\n    pass\n",
}
LOADS = """
import json, sys
from kvfrontier.methods.core import home
from kvfrontier.methods.core.home import users
from kvfrontier.methods.core.errors import UserError
users.announce(["mine"])
mine = users.load("mine").Mine
own = users.load("methods.own").Own
import kernels, tasks
print(json.dumps({
    "same class": issubclass(mine, UserError) and issubclass(own, UserError),
    "later": sys.modules["beside"].later() is UserError,
    "theirs": [kernels.WHOSE, tasks.WHOSE, sys.modules["mine"].WHOSE],
    "modules": sorted(name for name in sys.modules if name.partition(".")[0] in ("methods", "kernels", "tasks")),
    "made": str(home.MADE),
    "written": [name for name in ("mine/__pycache__",) if __import__("os").path.exists(name)],
}))
"""


def test_a_users_files_for_a_checkout_load_unchanged_and_leave_others_packages_alone(site, tmp_path):
    for name, text in USERS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = json.loads(
        python(
            LOADS, at=tmp_path, PYTHONPATH=str(site), XDG_DATA_HOME=str(tmp_path / "data"), PYTHONDONTWRITEBYTECODE=""
        )
    )
    assert found == {
        "same class": True,
        "later": True,
        "theirs": ["the other kernels", "the other tasks", "the other kernels"],
        "modules": ["kernels", "tasks"],
        "made": str(tmp_path / "data" / "kvfrontier"),
        "written": [],
    }
    assert {name: (tmp_path / name).read_text() for name in USERS} == USERS


def test_what_reading_records_needs_is_part_of_what_a_run_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = set(project["optional-dependencies"]["analysis"])
    assert asked < set(project["dependencies"])
    named = {re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in asked}
    named |= {"sklearn", "yaml", "markupsafe"}  # scikit-learn, pyyaml, of jinja2
    taken = {module.partition(".")[0] for path in (ROOT / "analysis").rglob("*.py") for module, _, _ in imports(path)}
    assert taken - sys.stdlib_module_names - named == {"analysis", "wandb", "wandb_workspaces"}


def test_a_package_that_is_missing_is_asked_for_with_its_whole_extra(monkeypatch):
    needs = ["torch>=2", "hydra-core>=1", 'pandas>=2.2; extra == "analysis"', 'numpy>=2; extra == "analysis"',
             "hydra-submitit-launcher>=1.2; extra == 'slurm'", 'wandb-workspaces>=0.4; extra == "wandb"']  # fmt: skip
    monkeypatch.setattr(command_line.metadata, "requires", lambda name: needs)
    asked = {
        ("pandas", "frontier"): "pip install 'pandas>=2.2' 'numpy>=2'",
        ("sklearn", "report"): "pip install 'pandas>=2.2' 'numpy>=2'",
        ("wandb_workspaces", "report"): "pip install 'wandb-workspaces>=0.4'",
        ("hydra", "run"): "pip install kvfrontier brings it",
    }
    for given, said in asked.items():
        assert command_line._install(*given).startswith(said)


def test_a_setting_whose_extra_is_missing_is_refused_by_name(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["wandb=offline"])
        monkeypatch.setattr(metadata, "version", version)
        with pytest.raises(
            UserError, match=r"^wandb=offline: needs the package wandb; pip install 'kvfrontier\[wandb\]'"
        ):
            settle(cfg)
        settle(compose("config"))
        with pytest.raises(HydraException) as missing:
            compose("config", overrides=["hydra/launcher=submitit_nothing"])
    text = str(missing.value).replace("submitit_nothing", "submitit_slurm")
    assert explain(HydraException(text)).startswith("hydra/launcher=slurm: needs hydra-submitit-launcher; pip install")


def test_the_folders_of_config_dir_are_read_however_they_are_typed():
    words = ["-m", "--config-dir", "a", "method=x", "-cd", "b", "--config-dir=c", "--config-name", "d", "-cd"]
    assert folders_of(words) == ["a", "b", "c"]


def test_without_torch_records_are_read_and_a_run_says_what_it_needs(site, tmp_path):
    script = """
import sys
for name in ("torch", "transformers", "hydra"):
    sys.modules[name] = None
from kvfrontier.command import main
print(main(["frontier", "nowhere"]), main(["run"]), main(["--version"]), main(["nonsense"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "2 2 0 2", done.stderr
    assert "frontier: nowhere: no such folder" in done.stderr
    assert "kvfrontier run: needs hydra; pip install kvfrontier" in done.stderr and "Traceback" not in done.stderr
    assert "kvfrontier 0.1.0, commit " in done.stdout


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel and the other packages; torch and the like it has from this one."""
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    new, (library,) = place / "bin" / "python", place.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", new, "install", "-q", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    strangers(library)
    # behind its own, and only now: pip must not take what is there for its own
    paths = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (library / "beside.pth").write_text("\n".join(paths))
    return new.parent


@pytest.fixture
def command(bin_folder, tmp_path):
    """Runs a program of the environment in a folder of its own: command("kvfrontier", ...) -> (code, output)."""

    def run_it(*words: str) -> tuple[int, str]:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env["XDG_DATA_HOME"] = str(tmp_path / "data")
        done = subprocess.run(
            [bin_folder / words[0], *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run_it


def files_of(bin_folder: Path) -> set[Path]:
    (package,) = bin_folder.parent.glob("lib/python*/site-packages/kvfrontier")
    return {path for path in package.rglob("*") if "__pycache__" not in path.parts}


LIBRARY = """
import sys, torch
from transformers import AutoModelForCausalLM
from kvfrontier import load_method
import kernels, tasks
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.arange(3, 67)[None]
cache = load_method("snapkv", budget=0.25, window=4).cache_for(model)
out = model.generate(
    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False
)
print(out.shape[1] - 64, kernels.WHOSE, tasks.WHOSE, sorted({"methods", "runners", "analysis"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_the_installed_library_generates_beside_other_packages_of_our_names(command, tiny_model_dir):
    code, out = command("python", "-c", LIBRARY, str(tiny_model_dir))
    assert code == 0 and "4 the other kernels the other tasks []" in out.splitlines(), out


@pytest.mark.slow
def test_the_installed_command_runs_a_users_method_and_reads_records(command, bin_folder, tmp_path, tiny_model_dir):
    for path, text in blocks().items():  # CONTRIBUTING's two files, where they are in a checkout
        (tmp_path / "lab" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lab" / path).write_text(text)
    before = files_of(bin_folder)
    code, out = command("kvfrontier", "--version")
    assert code == 0 and out.startswith("kvfrontier 0.1.0, commit "), out
    given = [f"model.path={tiny_model_dir}", "task=longbench", f"task.data={write_split(tmp_path / 'split')}"]
    code, out = command(
        "kvfrontier", "run", "--config-dir", "lab/conf", "-m", "method=keepnorm,snapkv", "budget=0.25,0.5", *given,
        "hydra/launcher=local", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    assert code == 0, out
    cells = {path.parent.name.rpartition("-")[0]: json.loads(path.read_text()) for path in tmp_path.rglob("cell.json")}
    assert {"keepnorm-b0.25", "snapkv-b0.5", "full-b1"} <= set(cells), out  # below the folder it was called in
    (run,) = cells["snapkv-b0.5"]["runs"]
    assert {"methods.snapkv", "methods.core.eviction"} <= set(run["modules"]) and run["command"].startswith(
        "kvfrontier"
    )
    assert "methods.keepnorm" in cells["keepnorm-b0.25"]["runs"][0]["modules"]
    shutil.copytree(ROOT / "tests" / "analysis" / "format_1", tmp_path / "known")  # scores that are above chance
    for words in (["frontier", "known"], ["report", "known"]):
        code, out = command("kvfrontier", *words)
        assert code == 0, out
    assert (tmp_path / "known" / "frontier.md").is_file() and (tmp_path / "known" / "report.html").is_file()
    small = ("runner.documents=2", "runner.tokens=64")
    code, out = command("kvfrontier", "run", "runner=calibrate", "method=qfilters", given[0], *small)
    made = tmp_path / "data" / "kvfrontier" / "assets" / "qfilters" / tiny_model_dir.name / "filters.safetensors"
    assert code == 0 and made.is_file(), out
    assert files_of(bin_folder) == before, "something was written into the installed package"
