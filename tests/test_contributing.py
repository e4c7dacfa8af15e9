"""CONTRIBUTING.md's "Add a method in two files", followed to the letter in a copy of the tree."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns("__pycache__", "*.pyc")

LIBRARY = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import methods
from methods import load_method, method_names
from methods.core.errors import UserError

try:
    load_method("keepnorm", recent=-1)
    refused = "nothing"
except UserError as error:
    refused = str(error)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.randint(3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
stock = model.generate(ids, **ask)
whole = model.generate(ids, past_key_values=load_method("keepnorm", budget=1.0).cache_for(model), **ask)
cache = load_method("keepnorm", budget=0.25, recent=4).cache_for(model)
model.generate(ids, past_key_values=cache, **ask)
print(json.dumps({
    "file": methods.__file__,
    "refused": refused,
    "listed": "keepnorm" in method_names(),
    "same_at_budget_1": stock.tolist() == whole.tolist(),
    "report": cache.report().to_dict(),
}))
"""


def blocks() -> dict[str, str]:
    """The two files as the page gives them: path to text."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"`([\w/]+\.(?:py|yaml))`(?:(?!```).)*```(?:python|yaml)\n(.*?)```", page, flags=re.DOTALL)
    return {path: text for path, text in found if "keepnorm" in path}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what runs, with the two files of the page added and nothing else."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("methods", "conf", "kernels", "runners", "tasks", "analysis", "hydra_plugins"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=SKIP)
    shutil.copy(ROOT / "run.py", copy)
    (copy / "assets").symlink_to(ROOT / "assets")
    for path, text in blocks().items():
        assert not (copy / path).exists(), f"{path} of CONTRIBUTING.md exists already; the example must be new"
        (copy / path).write_text(text)
    return copy


def python(tree: Path, *args: str) -> str:
    done = subprocess.run([sys.executable, *args], cwd=tree, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{args[0][:40]} ended with {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_page_holds_exactly_the_two_files():
    assert sorted(blocks()) == ["conf/method/keepnorm.yaml", "methods/keepnorm.py"]


def test_the_added_method_loads_by_name_and_frees_what_it_drops(tree, tiny_model_dir):
    answer = json.loads(python(tree, "-c", LIBRARY, str(tiny_model_dir)).splitlines()[-1])
    assert Path(answer["file"]).is_relative_to(tree.resolve())
    assert answer["listed"]
    assert "method.recent=-1" in answer["refused"]
    assert answer["same_at_budget_1"]
    # 64 tokens, a quarter is kept: 16 slots of 2 layers x 2 heads x 8 channels, keys and values, 4 bytes each
    kept = 16 * 2 * 2 * 8 * 2 * 4
    held = answer["report"]["held_prompt"]
    assert kept <= held <= kept + answer["report"]["overhead"]
    assert held < 0.5 * answer["report"]["full_prompt"]


def test_the_added_method_runs_from_the_command_line(tree, tiny_model_dir):
    out = python(
        tree,
        "run.py",
        "method=keepnorm",
        "method.recent=4",
        "budget=0.5",
        "task=longbench",
        "task.limit=1",
        f"model.path={tiny_model_dir}",
        "results=out",
    )
    assert "keepnorm" in out
    records = list((tree / "out").rglob("*.jsonl"))
    assert any("keepnorm" in str(path) for path in records), records
