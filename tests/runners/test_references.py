"""What methods are measured against in a sweep: recency, random, and the question without its text."""

import json

import pytest

from methods import load_method
from methods.core.errors import NotHere
from runners.engine.setting import check_protocol
from runners.jobs import with_references
from tasks.base import Example

TEXT = "the cat sat on a mat and read about a long river in the north where nobody answers questions. " * 4


def test_references_stand_at_the_budgets_of_a_sweep_and_no_context_once():
    asked = [(method, budget) for method in ("snapkv", "random") for budget in (0.5, 0.2)]
    cells = [["task=longbench", f"method={method}", f"budget={b}", "method.window=8"] for method, b in asked]
    names = {"recency": True, "random": True, "no_context": False}
    found = with_references([*cells, ["task=longbench", "method=kivi", "method.bits=4"]], names)
    assert found[:4] == cells and len(found) == 5 + 2 * 2 + 1
    added = found[5:]
    assert ["task=longbench", "method=recency", "budget=0.2"] in added
    assert ["task=longbench", "method=random", "budget=0.5"] in added
    assert added.count(["task=longbench", "method=no_context"]) == 1


def test_what_is_left_of_a_prompt_is_read_and_billed_beside_the_whole_one(tmp_path, tiny_model_dir, run_command):
    row = {"input": "who sat?", "context": TEXT, "answers": ["the cat"], "length": 150, "dataset": "hotpotqa",
           "language": "en", "all_classes": None, "_id": "x"}  # fmt: skip
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = run_command(
        "-m", "method=snapkv", "budget=0.5", "references=true", f"model.path={tiny_model_dir}", "task=longbench",
        f"task.data={tmp_path / 'hotpotqa.jsonl'}", f"results={tmp_path / 'results'}",
    )  # fmt: skip
    assert code == 0, err
    rows = {
        path.parent.name.partition("-b")[0]: json.loads(path.read_text())
        for path in (tmp_path / "results").glob("*/*/*/samples.jsonl")
    }
    assert sorted(rows) == ["full", "hindsight", "no_context", "random", "recency", "snapkv"]
    short, full = rows["no_context"], rows["full"]
    assert (short["id"], short["key"], short["prompt_end"]) == (full["id"], full["key"], full["prompt_end"])
    assert short["tokens_in"] < full["tokens_in"]
    assert short["ledger"]["full_prompt"] == full["ledger"]["full_prompt"]
    slot = full["ledger"]["full_prompt"] // full["tokens_in"]
    assert short["ledger"]["held_prompt"] == (slot + 4 * 2) * short["tokens_in"]  # a position per layer on top
    code, _, err = run_command("references=true", f"model.path={tiny_model_dir}")
    assert code == 2 and "references=true: its rows stand beside those of a sweep; add -m" in err


@pytest.mark.parametrize(
    "example",
    [
        Example("a", "", "a question", ["x"], 4),
        Example("a", "read this: ", "a question", ["x"], 4, lead="read this: "),
        Example("a", TEXT, "a question", ["x"], 4, beams=2),
        Example("a", TEXT, "", [], 4, history="none"),
    ],
)
def test_a_task_without_a_text_to_leave_out_is_refused_by_name(example):
    with pytest.raises(NotHere, match="no_context leaves the text out of a prompt, and no sample"):
        check_protocol([example], "agnostic" if example.history == "none" else "aware", [load_method("no_context")])


def test_instructions_before_a_text_stay():
    example = Example("a", "read this: " + TEXT, "\n\nwho sat?", ["x"], 4, lead="read this: ")
    assert example.without_text.prompt == "read this: \n\nwho sat?"
    assert example.key == Example("a", "read this: " + TEXT, "\n\nwho sat?", ["x"], 4).key
