"""One interval for one question, whoever prints it: the screen, a sweep's table, W&B and the frontier's csv."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from analysis import compare, leaderboard
from analysis.area import areas
from analysis.files import write_csv
from analysis.load import load_results
from analysis.paired import gathered
from analysis.points import points
from runners.cells import Run
from runners.engine.rows import about
from runners.report import run_table, sweep_table, wandb_runs
from runners.report.compare import compare_scores
from tasks.base import Example, Task
from tasks.gsm8k import GSM8K
from tasks.lm_eval_harness import LmEval
from tasks.longbench.task import LongBench
from tasks.longbench_v2 import LongBenchV2
from tasks.multiturn import MultiTurn
from tasks.needle import Needle
from tasks.perplexity import Perplexity
from tasks.reasoning import Reasoning
from tasks.reasoning_decode import ReasoningDecode
from tasks.ruler.task import Ruler
from tasks.summarization import Summarization
from tasks.tokens import Tokens
from tests.rows import done

HOME = Path(__file__).resolve().parents[2]
RESAMPLES = 2000  # the run's default


def jsonl(at: Path, name: str, *rows: dict) -> str:
    (at / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(at / name)


def v2(at: Path) -> Task:
    letters = {f"choice_{letter}": letter for letter in "ABCD"}
    rows = [
        {"domain": "XY"[i % 2], "sub_domain": "x", "difficulty": "easy", "length": "short", "context": "c",
         "question": "q", "answer": "B", **letters} for i in range(5)
    ]  # fmt: skip
    return LongBenchV2(jsonl(at, "data.jsonl", *rows))


def choices(at: Path) -> Task:
    for name in ("one", "two"):
        rows = [{"context": f"{i}", "question": "q", "choices": ["a", "b"], "gold": i % 2} for i in range(4)]
        jsonl(at, f"{name}.jsonl", *rows)
    return LmEval("facts", limit=6)


def problems(at: Path) -> Task:
    rows = [{"question": f"{i}?", "answer": f"so\n#### {i}"} for i in range(6)]
    return GSM8K(jsonl(at, "test.jsonl", *rows), variant="gsm8k_cot_zeroshot")


def texts(at: Path) -> Task:
    rows = [{"text": " ".join(f"w{i}" for i in range(n))} for n in (40, 30, 20, 40)]
    return Perplexity(jsonl(at, "texts.jsonl", *rows), length=32, prompt=8)


#: by the YAML in conf/task; latency has no scores
TASKS: dict[str, Callable[[Path], Task]] = {
    "gsm8k": problems,
    "lm_eval": choices,
    "longbench": lambda at: LongBench(limit=3),
    "longbench_v2": v2,
    "multiturn": lambda at: MultiTurn(limit=3),
    "needle": lambda at: Needle(limit=12),
    "perplexity": texts,
    "reasoning": lambda at: Reasoning(limit=3),
    "reasoning_decode": lambda at: ReasoningDecode(samples=3, operations=[8, 16], distances=[40]),
    "ruler": lambda at: Ruler(limit=12),
    "summarization": lambda at: Summarization(limit=3),
}


def scores(task: Task, example: Example, draw: np.random.Generator) -> dict[str, Any]:
    """A score that no model has made, in the parts that the task has of one, as a record holds them."""

    def one() -> float:
        return float(draw.choice([0, 1 / 3, 0.5, 0.7, 1]))

    if example.forced is not None:
        whole, early = len(example.forced.counted), 5
        loss = one()
        return {
            "score": loss, "parts": {"": loss, "0-255": one()}, "weights": {"": whole, "0-255": early},
            "curve": [[0, early, loss]],
        }  # fmt: skip
    if example.turns:
        turns = [one() for _ in range(1 + len(example.turns))]
        return {
            "score": sum(turns) / len(turns), "parts": {f"turn {n}": score for n, score in enumerate(turns, 1)},
            "turns": [{"score": score, "held": 1, "full": 2} for score in turns],
        }  # fmt: skip
    names = task.rate(example, [(-1.0, True)] * len(example.choices)) if example.choices else task.parts(example, "x")
    parts = {name: one() for name in names}
    if not parts:
        return {"score": one()}
    return {"score": parts[task.measure(parts)], "parts": parts, "measure": task.measure(parts)}


def record(book, task: Task, method: str, rows: dict[str, dict[str, Any]]) -> None:
    """A record on disk of these samples, in another order than the task's."""
    lines = list(rows.values())[::-1]
    book.cell(
        method, [row["score"] for row in lines], 0.5 if method == "h2o" else 1.0, task=task.name,
        metric=asdict(task.metric), notes={"mean_over": task.mean_over}, rows=lines,
        subsets=[(row["tags"]["subset"], row["tags"]["category"]) for row in lines],
    )  # fmt: skip


def numbers(at: Path) -> dict[str, dict[str, str]]:
    """frontier.csv of the method, by category."""
    with (at / "frontier.csv").open(newline="", encoding="utf-8") as file:
        return {row["category"]: row for row in csv.DictReader(file) if row["method"] == "h2o"}


def test_every_task_with_scores_has_a_case():
    named = {path.stem.partition("_nacl")[0] for path in (HOME / "conf" / "task").glob("*.yaml")}
    assert named - {"latency", "summarization_keyformer"} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_screen_sweep_wandb_and_frontier_print_one_interval(name, book, tmp_path):
    (tmp_path / "data").mkdir()
    task = TASKS[name](tmp_path / "data")
    words = [f"w{i}" for i in range(40)]
    task.fit(lambda: Tokens(lambda text: [int(w[1:]) if w in words else 0 for w in text.split()],
                            lambda ids: " ".join(words[i] for i in ids), 4096, 0, 0))  # fmt: skip
    examples = [example for example in task.examples() if not example.error]
    draw = np.random.default_rng(7)
    ours, full = ({e.id: {**done(e.id), **about(e), **scores(task, e, draw)} for e in examples} for _ in range(2))
    for method, rows in (("full", full), ("h2o", ours)):
        record(book, task, method, rows)
    write_csv(tmp_path / "frontier.csv", points(load_results(book.root)))
    drawn = numbers(tmp_path)

    def of_frontier(category: str) -> tuple[float, float]:
        low, high = (float(drawn[category][f"difference_{end}"]) for end in ("low", "high"))
        return low, high

    run: Any = SimpleNamespace(task=task, examples=examples)
    run.scored = lambda *given, **more: Run.scored(run, *given, **more)
    rows = compare_scores(task, run.scored(ours, full), RESAMPLES, seed=0)
    shown = {one.interval for one in rows}

    # W&B: the mean over the whole task
    summary = wandb_runs._scores(*wandb_runs._compared(run, ours, full, RESAMPLES))
    assert (summary["difference_low"], summary["difference_high"]) == of_frontier("all")
    assert summary["difference"] == pytest.approx(float(drawn["all"]["difference"]), abs=1e-9)

    # the screen: the same rows, and what stands for the whole task where its table has a row of it
    places = {category: of_frontier(category) for category in drawn}
    if name == "summarization":
        del places["all"]  # whose table has no average
    assert set(places.values()) <= shown

    # a sweep's table: to the digits that it prints
    lines = {cells[3] for _, cells in sweep_table._lines(rows, list(ours.values()), task.metric.better == "lower")}
    wanted = [places["all"]] if "all" in places else list(places.values())
    printed = {run_table.interval(one, task.metric.digits) for one in wanted}
    assert printed <= lines
    assert printed <= set(map(str, run_table.scores(rows, "h2o").columns[-1].cells))


def test_the_order_of_samples_and_rows_beside_it_leave_an_interval_alone():
    task = Needle(limit=12)
    draw = np.random.default_rng(3)
    samples = [(e, float(draw.random()), float(draw.random())) for e in task.examples()]
    found = {(one.row.kind, one.row.name): one.interval for one in compare_scores(task, samples, 500, 0)}
    turned = [samples[i] for i in draw.permutation(len(samples))]
    assert {(one.row.kind, one.row.name): one.interval for one in compare_scores(task, turned, 500, 0)} == found


def test_seeds_are_drawn_again_as_samples_are_in_every_table(book, capsys):
    """Every sample scores the same by one seed, so that all there is to know of a mean is how seeds differ."""
    book.cell(scores=[1.0] * 8)
    book.cell("snapkv", [1.0] * 8, 0.5)
    for seed, score in ((2, 1.0), (0, 0.0), (1, 0.5)):
        book.cell("nacl", [score] * 8, 0.5, seed=seed)
    results = load_results(book.root)
    table = points(results)
    p = table.set_index("label").loc["nacl"]
    assert (p["score"], p["score_low"], p["score_high"], p["seeds"]) == (50.0, 0.0, 100.0, 3)
    assert (p["difference"], p["difference_low"], p["difference_high"]) == (-50.0, -100.0, 0.0) and p["tie"]
    assert (p["retained_low"], p["retained_high"]) == (0.0, 1.0)
    area = areas(results, table).set_index("method").loc["nacl"]
    assert area["area_low"] < 0.1 * area["area"] and area["area_high"] > 1.9 * area["area"]
    ranks = leaderboard.ranking(list(gathered(results)), "tiny", "aware", 0.5).rows.set_index("method")
    assert ranks.loc["nacl", "95 % interval"] == "0.0% to 100.0%" and ranks.loc["nacl", "rank"] == 1
    assert ranks.loc["snapkv", "95 % interval"] == "100.0% to 100.0%"
    assert compare.main(["snapkv", "nacl", "--results", str(book.root), "--markdown"]) == 0
    assert "| 100.00 | 50.00 | -50.00 [-100.00, +0.00] |" in capsys.readouterr().out


def test_the_seeds_of_one_method_are_drawn_alike_at_every_budget_and_in_both_folders(book, tmp_path, capsys):
    for seed, score in ((0, 0.0), (1, 1.0), (2, 0.5)):
        book.cell("nacl", [score] * 8, 0.5, seed=seed)
    assert compare.main([str(book.root), str(book.root), "--markdown"]) == 0
    assert "+0.00 [+0.00, +0.00]" in capsys.readouterr().out
