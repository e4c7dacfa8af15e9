"""CONTRIBUTING.md: its method and its task in two files each, followed to the letter in a copy of the tree."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns("__pycache__", "*.pyc")

LIBRARY = """
import json, torch
from transformers import AutoModelForCausalLM
import methods
from methods import load_method, method_names
from methods.core.errors import UserError

try:
    load_method("keepnorm", recent=-1)
    refused = "nothing"
except UserError as error:
    refused = str(error)
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32).eval()
ids = torch.randint(3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
stock = model.generate(ids, **ask)
whole = model.generate(ids, past_key_values=load_method("keepnorm", budget=1.0).cache_for(model), **ask)
cache = load_method("keepnorm", budget=0.25, recent=4).cache_for(model)
model.generate(ids, past_key_values=cache, **ask)
print(json.dumps({{
    "file": methods.__file__,
    "refused": refused,
    "listed": "keepnorm" in method_names(),
    "same_at_budget_1": stock.tolist() == whole.tolist(),
    "report": cache.report().to_dict(),
}}))
"""


TASK = """
import json
from methods.core.errors import UserError
from tasks.facts import Facts

task = Facts({right!r})
first, *_ = examples = task.examples()
try:
    refused = [example.id for example in Facts({wrong!r}).examples()]
except UserError as error:
    refused = str(error)
answers = ("Paris", " It is paris, I think.\\nLyon", "Lyon\\nParis", "")
print(json.dumps({{
    "prompt": first.prompt,
    "scores": [task.score(first, answer) for answer in answers],
    "ids": {{example.id: example.key for example in examples}},
    "rivers": {{example.id: example.key for example in Facts({right!r}, subset="rivers", limit=1).examples()}},
    "keys": sorted({{example.key for example in examples}}),
    "refused": refused,
    "rows": [[row.name, row.score] for row in task.summarize([(one, float(one is first)) for one in examples])],
}}))
"""
# as `python run.py WORDS`, which ends with its exit code
COMMAND = """
import runpy, sys
sys.argv = ["run.py", *{words!r}]
try:
    runpy.run_path("run.py", run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
"""
PART = "the next part begins"
FACTS = {
    "capitals": [
        {
            "document": "France is a country whose capital is Paris. " * 12,
            "question": "Which is its capital?",
            "answer": "Paris",
        },
        {
            "document": "Peru is a country whose capital is Lima. " * 12,
            "question": "Which is its capital?",
            "answer": "Lima",
        },
    ],
    "rivers": [
        {"document": "The Rhine is 1233 km long. " * 16, "question": "How long?", "answer": 1233, "max_new_tokens": 4}
    ],
}


def blocks() -> dict[str, str]:
    """The files as the page gives them: path to text."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    file = r"`([\w/]+\.(?:py|yaml))`"  # the last one named before a block
    found = re.findall(rf"{file}(?:(?!```|{file}).)*```(?:python|yaml)\n(.*?)```", page, flags=re.DOTALL)
    return {path: text for path, _, text in found}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what runs, with the files of the page added and nothing else."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("methods", "conf", "kernels", "runners", "tasks", "analysis", "hydra_plugins"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=SKIP)
    shutil.copy(ROOT / "run.py", copy)
    (copy / "assets").symlink_to(ROOT / "assets")
    for path, text in blocks().items():
        assert not (copy / path).exists(), f"{path} of CONTRIBUTING.md exists already; the example must be new"
        (copy / path).write_text(text)
    return copy


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one's own: two files of those that are right, and one whose third line has a wrong field."""
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in FACTS.items():
        write(folder / "right" / f"{name}.jsonl", *rows)
    row = FACTS["capitals"][0]
    write(folder / "wrong.jsonl", row, row | {"answer": ["Paris"]})
    return folder


@pytest.fixture(scope="module")
def told(tree: Path, facts: Path, tiny_model_dir: Path) -> list[str]:
    """What the added files do, all in one process of that tree: the library's part, the task's, and two commands."""
    model = str(tiny_model_dir)
    right, wrong = str(facts / "right"), str(facts / "wrong.jsonl")
    method = ["method=keepnorm", "method.recent=4", "budget=0.5", "task=longbench", "task.limit=1", "results=out"]
    task = ["method=random", "budget=0.5", "task=facts", f"task.data={right}", "results=told"]
    parts = [
        LIBRARY.format(model=model),
        TASK.format(right=right, wrong=wrong),
        *(COMMAND.format(words=[*words, f"model.path={model}"]) for words in (method, task)),
    ]
    code = f"\nprint({PART!r}, flush=True)\n".join(parts)
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout.split(f"{PART}\n")


def write(path: Path, *rows: dict) -> None:
    """Rows as JSONL, with a blank line before the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:-1], "", lines[-1]]) + "\n")


def test_the_page_holds_exactly_two_files_of_a_method_and_two_of_a_task():
    assert sorted(blocks()) == [
        "conf/method/keepnorm.yaml",
        "conf/task/facts.yaml",
        "methods/keepnorm.py",
        "tasks/facts.py",
    ]
    assert (
        len(blocks()["tasks/facts.py"].splitlines()) <= 45 and len(blocks()["conf/task/facts.yaml"].splitlines()) == 4
    )


def test_the_added_method_loads_by_name_and_frees_what_it_drops(tree, told):
    answer = json.loads(told[0].splitlines()[-1])
    assert Path(answer["file"]).is_relative_to(tree.resolve())
    assert answer["listed"]
    assert "method.recent=-1" in answer["refused"]
    assert answer["same_at_budget_1"]
    # 64 tokens, a quarter is kept: 16 slots of 2 layers x 2 heads x 8 channels, keys and values, 4 bytes each
    kept = 16 * 2 * 2 * 8 * 2 * 4
    held = answer["report"]["held_prompt"]
    assert kept <= held <= kept + answer["report"]["overhead"]
    assert held < 0.5 * answer["report"]["full_prompt"]


def test_the_added_method_runs_from_the_command_line(tree, told):
    out = told[2]
    assert "keepnorm" in out
    records = list((tree / "out").rglob("*.jsonl"))
    assert any("keepnorm" in str(path) for path in records), records


def test_the_added_task_makes_prompts_scores_answers_and_refuses_a_wrong_row_in_one_line(told, facts):
    answer = json.loads(told[1].splitlines()[-1])
    assert answer["prompt"].endswith("Paris. \n\nQuestion: Which is its capital?\nAnswer:")
    assert answer["scores"] == [1, 1, 0, 0]
    assert list(answer["ids"]) == ["capitals/0", "capitals/1", "rivers/0"] and len(answer["keys"]) == 3
    assert answer["rivers"].items() <= answer["ids"].items() and len(answer["rivers"]) == 1
    assert answer["rows"] == [["capitals", 50], ["rivers", 0], ["mean", 25]]
    assert answer["refused"] == f"{facts / 'wrong.jsonl'}, line 3: `answer` is [Paris]; it is a text or a number"


def test_the_added_task_runs_from_the_command_line(tree, told):
    out = told[3]
    assert "capitals" in out and "rivers" in out and "mean" in out
    records = {path.parent.name.partition("-")[0]: path for path in (tree / "told").rglob("samples.jsonl")}
    assert sorted(records) == ["full", "random"]
    for path in records.values():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["id"] for row in rows] == ["capitals/0", "capitals/1", "rivers/0"]
        assert all(row["score"] in (0, 1) and "error" not in row for row in rows)


def test_a_task_that_lives_elsewhere_stops_at_a_wrong_row_before_anything_runs(
    facts, tiny_model_dir, tmp_path, monkeypatch, capfd
):
    (tmp_path / "task").mkdir()
    (tmp_path / "facts.py").write_text(blocks()["tasks/facts.py"])
    (tmp_path / "task" / "facts.yaml").write_text(blocks()["conf/task/facts.yaml"].replace("tasks.facts", "facts"))
    monkeypatch.syspath_prepend(tmp_path)
    given = [f"task.data={facts / 'wrong.jsonl'}", f"model.path={tiny_model_dir}", f"results={tmp_path / 'results'}"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--config-dir", str(tmp_path), "method=random", "task=facts", *given])
    assert run.main() == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert f"{facts / 'wrong.jsonl'}, line 3: `answer` is [Paris]; it is a text or a number" in line
    assert not list(tmp_path.rglob("samples.jsonl"))
