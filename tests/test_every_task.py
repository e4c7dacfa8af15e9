"""Every task with the full cache, snapkv, h2o and kivi, on a tiny random model: each YAML of conf/task has a case."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import run
from runners import sweep

LONG = "the cat sat on a mat and read about a long river in the north where nobody answers questions. " * 8
QUESTION = "\n\nwho sat on the mat?"
METHODS = ("full", "h2o", "kivi", "snapkv")


def jsonl(path: Path, *rows: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task.data={path}"


def longbench(at: Path) -> list[str]:
    row = {"input": "who sat?", "context": LONG, "answers": ["the cat"], "length": 150, "dataset": "hotpotqa",
           "language": "en", "all_classes": None, "_id": "x"}  # fmt: skip
    return [jsonl(at / "hotpotqa.jsonl", row)]


def longbench_v2(at: Path) -> list[str]:
    row = {"domain": "Single-Document QA", "sub_domain": "x", "difficulty": "easy", "length": "short", "context": LONG,
           "question": "who sat?", "answer": "B"}  # fmt: skip
    return [jsonl(at / "data.jsonl", row | {f"choice_{letter}": "the cat" for letter in "ABCD"})]


def written(kind: str) -> Callable[[Path], list[str]]:
    """A prompt of a grid that is written out."""

    def case(at: Path) -> list[str]:
        row = {"kind": kind, "length": 200, "depth": 50, "context": LONG, "question": QUESTION, "answers": ["cat"],
               "metric": "all", "max_new_tokens": 4}  # fmt: skip
        return [jsonl(at / "prompts.jsonl", row)]

    return case


def summarization(at: Path) -> list[str]:
    return [jsonl(at / "news.jsonl", {"article": LONG, "highlights": "the cat sat."}), "task.max_new_tokens=6"]


def summarization_keyformer(at: Path) -> list[str]:
    return [*summarization(at), "task.max_new_tokens=31", "task.beams=2"]


def perplexity(at: Path) -> list[str]:
    return [jsonl(at / "texts.jsonl", {"text": LONG}), "task.length=160", "task.stride=20"]


def gsm8k(at: Path) -> list[str]:
    row = {"question": LONG, "answer": "one and one is two\n#### 2"}
    return [jsonl(at / "test.jsonl", row), "task.variant=gsm8k_cot_zeroshot", "task.max_new_tokens=4"]


def reasoning(at: Path) -> list[str]:
    row = {"context": LONG, "question": QUESTION, "steps": " the cat, in the north.", "max_new_tokens": 4}
    return [jsonl(at / "links.jsonl", row)]


def multiturn(at: Path) -> list[str]:
    turns = [{"input": f"where is the {what}?", "answer": " here."} for what in ("mat", "river")]
    return [jsonl(at / "kept.jsonl", {"context": LONG, "multi_turns": turns, "max_new_tokens": 4})]


def lm_eval(at: Path) -> list[str]:
    row = {"context": LONG, "question": QUESTION, "choices": ["in the north", "a mat", "a cat", "on"], "gold": 2}
    jsonl(at / "facts.jsonl", row)
    include = Path(run.__file__).parent / "assets" / "lm_eval-mini"
    return [f"task.data={at}", "task.tasks=[facts]", f"task.include={include}"]


def lm_eval_nacl(at: Path) -> list[str]:
    row = {"goal": LONG, "sol1": "the cat sat", "sol2": "a long river", "label": 0}
    jsonl(at / "piqa" / "validation.jsonl", row)
    jsonl(at / "piqa" / "train.jsonl", row | {"label": 1}, row)
    return [f"task.data={at}", "task.tasks=[piqa]", "task.shots=1"]


def latency(at: Path) -> list[str]:
    return ["task.lengths=[200]", "task.batches=[2]", "task.new_tokens=3", "task.rounds=1"]


def reasoning_decode(at: Path) -> list[str]:
    return ["task.samples=1", "task.steps=[3,3]", "task.nodes=[3,4]", "task.operations=[2]", "task.distances=[20]",
            "task.before=20", "task.max_new_tokens=4"]  # fmt: skip


CASES: dict[str, Callable[[Path], list[str]]] = {
    "gsm8k": gsm8k,
    "latency": latency,
    "lm_eval": lm_eval,
    "lm_eval_nacl": lm_eval_nacl,
    "longbench": longbench,
    "longbench_v2": longbench_v2,
    "multiturn": multiturn,
    "needle": written("single"),
    "perplexity": perplexity,
    "reasoning": reasoning,
    "reasoning_decode": reasoning_decode,
    "ruler": written("vt"),
    "summarization": summarization,
    "summarization_keyformer": summarization_keyformer,
}


def test_every_task_has_a_case():
    assert set(CASES) == {path.stem for path in (Path(run.__file__).parent / "conf" / "task").glob("*.yaml")}


@pytest.mark.parametrize("task", CASES)
def test_a_task_runs_with_eviction_and_quantization_beside_the_full_cache(
    task, tmp_path, tiny_model_dir, monkeypatch, capfd
):
    sweep.loaded.cache_clear()
    given = [f"model.path={tiny_model_dir}", f"results={tmp_path / 'results'}", f"task={task}"]
    grid = ["-m", "method=snapkv,h2o,kivi", "budget=0.5"]
    monkeypatch.setattr(sys, "argv", ["run.py", *grid, *given, *CASES[task](tmp_path / "data")])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("KVFRONTIER_TRACEBACK", raising=False)
    capfd.readouterr()
    code = run.main()
    assert code == 0, capfd.readouterr().err
    records = {}
    for path in (tmp_path / "results").glob("*/*/*/samples.jsonl"):
        records[path.parent.name.partition("-b")[0]] = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(records) == list(METHODS)
    for name, rows in records.items():
        assert [row["id"] for row in rows] == [row["id"] for row in records["full"]] and "error" not in rows[0]
        share = rows[0]["ledger"]["share"]
        if "parts" in rows[0] and not {"turns", "curve"} & rows[0].keys():
            assert rows[0]["parts"][rows[0]["measure"]] == rows[0]["score"]
        assert 1 <= share < 1.05 if name == "full" else 0.2 < share < 0.6, (name, share)
