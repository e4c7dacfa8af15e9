"""The search from the command line, on a tiny random model: what it writes, and what a method makes of it."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from methods import load_method
from methods.core import artefacts
from methods.core.errors import UserError
from methods.kvtuner import Pair, read_table
from runners.learn.bits import tune
from runners.learn.bits.search import Trial, search_tables
from runners.learn.bits.tune import Tune, table_name
from tasks.longbench.task import LongBench
from tests.bounds import bound, near

PROMPT = "Read. {context}\nQuestion: {input}\nAnswer:"
TEXT = "the cat sat on a mat and read about a long river in the north. "
QUICK = (
    "runner.stride=2",
    "runner.profile_prompts=2",
    "runner.samples=2",
    "runner.trials=30",
    "runner.bits=[8,2]",
    "runner.limits=[5]",
)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where tables are written and looked for."""
    folder = tmp_path / "assets"
    monkeypatch.setattr(artefacts, "PLACES", [folder])
    return folder


@pytest.fixture
def command(tmp_path, tiny_model_dir, run_command, place):
    """Runs the command line in this process: command("runner=tune", ...) -> (exit code, stdout, stderr)."""
    split = tmp_path / "split"
    split.mkdir()
    subset = {"category": "single-doc QA", "metric": "f1", "prompt": PROMPT, "max_new_tokens": 4}
    (split / "subsets.yaml").write_text(yaml.safe_dump({"river": subset}))
    rows = [
        {
            "input": f"where is river {i}?", "context": TEXT * 5, "answers": ["the north"], "length": 40,
            "dataset": "river", "language": "en", "all_classes": None, "_id": f"river-{i}",
        }
        for i in range(3)
    ]  # fmt: skip
    (split / "river.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    given = (f"model.path={tiny_model_dir}", f"task.data={split}", f"results={tmp_path / 'results'}")
    return partial(run_command, *given)


def folder_of(place: Path, model: Path, mode: str) -> Path:
    return place / "kvtuner" / model.name / mode


@pytest.mark.parametrize(("method", "mode"), [("kvtuner", "kivi"), ("kvtuner_per_token", "per_token")])
def test_a_search_writes_tables_that_the_method_then_takes(method, mode, command, place, tiny_model_dir, tmp_path):
    code, _, err = command("runner=tune", f"method={method}", *QUICK)
    assert code == 0, err
    folder = folder_of(place, tiny_model_dir, mode)
    card = json.loads((folder / "card.json").read_text())
    assert card["command"].startswith("python run.py task.data=") and "runner.stride=2" in card["command"]
    assert "results=" not in card["command"]
    assert card["objective"] == "score" and card["samples"] == ["river/0", "river/2"] and card["mode"] == mode
    assert [row["name"] for row in card["tables"]] == sorted(path.stem for path in folder.glob("*.yaml"))
    for row in card["tables"]:
        assert " ".join(map(str, read_table(folder / f"{row['name']}.yaml"))) == row["table"]
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(layer for group in card["groups"] for layer in group["layers"]) == [0, 1]
    # beside codes: scale and offset for 32 tokens of a key channel and 8 channels of a value; or for 8 channels
    extra = 32 / 32 / 2 + 32 / 8 / 2 if mode == "kivi" else 32 / 8
    assert {row["name"]: row["effective_bits"] for row in card["uniform"]} == {"KV8": 8 + extra, "KV2": 2 + extra}
    # the smallest table holds far less than half of the float32 cache, kivi's unpacked rest included
    code, _, err = command(f"method={method}", "budget=0.5", "task.limit=1")
    assert code == 0, err
    (record,) = (tmp_path / "results").glob(f"*/*/{method}-b0.5-*/samples.jsonl")
    ledger = json.loads(record.read_text())["ledger"]
    assert ledger["share"] < 0.5


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_and_one_that_is_done_runs_nothing(command, monkeypatch, place):
    sizes = []
    measure = tune.Scores._measure

    def counted(self, tables):
        sizes.append(len(tables))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return measure(self, tables)

    monkeypatch.setattr(tune.Scores, "_measure", counted)
    few = ("runner=tune", "method=kvtuner", *QUICK, "runner.at_once=2")
    assert command(*few)[0] == 130
    code, _, err = command(*few)
    assert code == 0, err
    tried = sum(sizes) - sizes[1]
    # the two that were measured before the stop were not measured again, and every table only once
    (known,) = (place.parent / "results" / "tune").glob("*.jsonl")
    names = [json.loads(line)["table"] for line in known.read_text().splitlines()]
    assert len(names) == len(set(names)) == tried
    again = len(sizes)
    assert command(*few)[0] == 0 and len(sizes) == again


@pytest.mark.slow
def test_tables_of_the_stand_in_objective_are_ordered_by_error_and_refused_by_the_method(
    command, place, tiny_model_dir
):
    options = ("runner.profile_prompts=2", "runner.objective=output_error", "runner.limits=[6]", "runner.trials=100")
    code, _, err = command("runner=tune", "method=kvtuner_per_token", *options)
    assert code == 0, err
    card = json.loads((folder_of(place, tiny_model_dir, "per_token") / "card.json").read_text())
    scores = [row["score"] for row in card["tables"]]
    assert len(scores) > 3 and scores == sorted(scores)
    errors = [
        sum(layer[pair]["output"] for layer, pair in zip(card["profile"], row["table"].split()))
        for row in card["tables"]
    ]
    near(scores, [-error for error in errors], bound(torch.float64, len(errors), size=max(errors)))
    code, _, err = command("method=kvtuner_per_token", "budget=0.3")
    assert code == 2 and "output_error" in err and "runner=tune method=kvtuner_per_token" in err


def test_tables_of_one_pair_are_on_the_front_and_none_above_the_limit_is_written(command, place, tiny_model_dir):
    # one table is drawn, and with this seed it is above the limit
    options = ("runner.profile_prompts=2", "runner.objective=output_error", "runner.limits=[2.5]", "runner.trials=1")
    code, _, err = command("runner=tune", "method=kvtuner_per_token", *options)
    assert code == 0 and "at most 2.5 bits: none of the 1 tables searched is within" in err
    folder = folder_of(place, tiny_model_dir, "per_token")
    card = json.loads((folder / "card.json").read_text())
    assert [path.stem for path in folder.glob("*.yaml")] == ["C2.00"] == [row["name"] for row in card["tables"]]
    assert card["tables"][0]["table"] == "KV2 KV2" and card["best"] == {"2.5 bits": "C2.00"}
    assert card["tables_tried"] == 4  # three pairs for all layers, and one that was drawn


def test_every_limit_is_searched_with_a_seed_of_its_own(command, monkeypatch):
    asked = []

    def noted(groups, rate, limit, trials, sampler, seed, at_once):
        asked.append((limit, seed))
        return search_tables(groups, rate, limit, trials, sampler, seed, at_once)

    monkeypatch.setattr(tune, "search_tables", noted)
    options = ("runner.profile_prompts=1", "runner.objective=output_error", "runner.trials=2", "runner.limits=[4,6]")
    for seed in (0, 1):
        assert command("runner=tune", "method=kvtuner_per_token", *options, f"seed={seed}")[0] == 0
    assert [limit for limit, _ in asked] == [4, 6] * 2
    assert len({seed for _, seed in asked}) == 4


def test_scores_of_other_prompts_are_not_taken_again(command, place):
    few = ("runner=tune", "method=kvtuner_per_token", *QUICK, "runner.trials=1", "runner.profile_prompts=1")
    for more in ([], ["batch_size=2"], ["model.max_length=60"]):
        assert command(*few, *more)[0] == 0
    # prompts of 60 tokens are cut, so they are others; rows of a batch are not
    assert len(list((place.parent / "results" / "tune").glob("*.jsonl"))) == 2


def test_a_search_whose_prompts_attend_to_packed_slots_runs_too(command, place, tiny_model_dir):
    code, _, err = command("runner=tune", "method=kvtuner", *QUICK, "method.prefill_attends_dequantised=true")
    assert code == 0, err
    card = json.loads((folder_of(place, tiny_model_dir, "kivi") / "card.json").read_text())
    assert card["prefill_attends_dequantised"] is True


def sharp_model(tiny_model_dir: Path, folder: Path) -> Path:
    """The tiny model with larger weights: bits change its answers."""
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model_dir, initializer_range=0.4)
    shutil.copytree(tiny_model_dir, folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_tables_that_share_a_pass_have_the_scores_that_each_has_alone(command, place, tiny_model_dir, monkeypatch):
    # a score that tells answers apart
    monkeypatch.setattr(LongBench, "score", lambda self, example, prediction: sum(prediction.encode()) % 997 / 997)
    sharp = sharp_model(tiny_model_dir, place.parent / "sharp")
    monkeypatch.setattr(LongBench, "score", lambda self, example, prediction: sum(prediction.encode()) % 997 / 997)
    found = []
    for at_once in (1, 7):
        code, _, err = command(
            "runner=tune", "method=kvtuner_per_token", *QUICK, f"runner.at_once={at_once}", f"model.path={sharp}"
        )
        assert code == 0, err
        (known,) = (place.parent / "results" / "tune").glob("*.jsonl")
        found.append({row["table"]: row["score"] for row in map(json.loads, known.read_text().splitlines())})
        known.unlink()
    assert found[0].keys() == found[1].keys() and len(set(found[0].values())) > 2
    near(list(found[0].values()), [found[1][table] for table in found[0]], bound(torch.float64, 8))  # means


def test_a_method_without_tables_and_settings_that_cannot_work_are_named(command):
    code, _, err = command("runner=tune", "method=snapkv")
    assert code == 2 and "method=snapkv has no tables of bits" in err
    for key, value in (
        ("bits", [3]), ("limits", [1]), ("trials", 0), ("eps", 0), ("sampler", "moead"), ("objective", "speed")
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"runner\.{key}="):
            Tune(**{key: value})


def test_tables_are_named_by_their_bits():
    assert table_name(Trial((Pair(8, 4), Pair(4, 2)), 4.5, 1.0)) == "C4.50"
    assert load_method("kvtuner", table="C4.50").budget == 1
