"""`cache.dtype` on the command line: which cell it is, what the record and the tables say, what a plan counts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from analysis.load import load_results
from analysis.points import points
from methods.core.binding.rounding import Rounding
from tests.test_run import samples, split

__all__ = ["split"]
WORDS = ("method=snapkv", "budget=0.5", "method.window=8")


@pytest.fixture
def command(tmp_path, tiny_model_dir, split, run_command):
    def run_it(*words: str, results: Path | str = tmp_path / "results") -> tuple[int, str, str]:
        return run_command(*words, f"model.path={tiny_model_dir}", f"task.data={split}", f"results={results}")

    return run_it


def identities(results: Path) -> list[dict]:
    return [json.loads(path.read_text())["identity"] for path in sorted(results.rglob("cell.json"))]


def test_a_type_is_a_cell_of_its_own_with_half_the_bytes_and_auto_is_what_it_was(command, tmp_path):
    for name, words in (("auto", ()), ("wide", ("cache.dtype=float32",)), ("half", ("cache.dtype=float16",))):
        code, out, err = command(*WORDS, *words, results=tmp_path / name)
        assert code == 0, err
        assert ("cache.dtype=float16" in out) is (name == "half")
    auto, wide, half = (identities(tmp_path / name) for name in ("auto", "wide", "half"))
    assert auto == wide and "cache_dtype" not in auto[0]["passes"]
    assert [one["passes"]["cache_dtype"] for one in half] == ["float16", "float16"]
    for method in ("full", "snapkv"):
        ours, theirs = samples(tmp_path / "half", method), samples(tmp_path / "auto", method)
        for id, one in ours.items():
            small, large = one["ledger"], theirs[id]["ledger"]
            assert 2 * small["full_prompt"] == large["full_prompt"] and 2 * small["full"] == large["full"]
            assert 2 * (small["held_prompt"] - small["overhead"]) == large["held_prompt"] - large["overhead"]


def test_a_share_of_16_bits_never_stands_beside_one_of_float32(command, tmp_path):
    for dtype in ("auto", "float16"):
        command(*WORDS, f"cache.dtype={dtype}")
    found = load_results(tmp_path / "results")
    assert len(found.cells) == 4 and found.cells["model"].nunique() == 2
    assert {model.partition(" (")[2] for model in found.cells["model"]} == {"cache_dtype=auto)", "cache_dtype=float16)"}
    assert any("caches of auto and float16" in line for line in found.problems)
    table = points(found)
    for _, panel in table.groupby("model"):  # each with a full cache of its own type
        assert set(panel["method"]) == {"full", "snapkv"}


@pytest.mark.slow
def test_a_sweep_over_types_is_a_group_for_each(command, tmp_path):
    code, _, err = command("-m", "method=random,tova", "budget=0.5", "cache.dtype=float16,auto")
    assert code == 0, err
    made = [(one["method"]["name"], one["passes"].get("cache_dtype")) for one in identities(tmp_path / "results")]
    assert set(made) == {(m, d) for m in ("full", "random", "tova") for d in (None, "float16")} and len(made) == 6
    single = tmp_path / "single"
    command("method=tova", "budget=0.5", "cache.dtype=float16", results=single)
    (cell,) = single.rglob("tova-*/samples.jsonl")
    swept = tmp_path / "results" / cell.relative_to(single)
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (cell, swept)]
    told = [{row["id"]: (row["prediction"], row["ledger"]["held_prompt"]) for row in one} for one in rows]
    assert told[0] == told[1]


@pytest.mark.slow
def test_an_experiment_may_set_it_and_a_plan_counts_its_bytes(command, tmp_path):
    plans = {}
    for dtype in ("auto", "float16"):
        code, out, err = command("-m", "method=full,snapkv", "budget=0.5", f"cache.dtype={dtype}", "dry_run=true")
        assert code == 0, err
        plans[dtype] = out
    assert plans["auto"] != plans["float16"]
    grid = tmp_path / "conf" / "experiment" / "frontier-half.yaml"
    grid.parent.mkdir(parents=True)
    grid.write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      method: full,window\n"
        "      cache.dtype: float16\n"
    )
    code, out, err = command(f"--config-dir={tmp_path / 'conf'}", "experiment=frontier-half", "budget=0.5")
    assert code == 0, err
    assert {one["passes"].get("cache_dtype") for one in identities(tmp_path / "results")} == {"float16"}


def test_what_no_cache_holds_and_who_has_none_are_refused_by_name(command):
    code, _, err = command(*WORDS, "cache.dtype=int8")
    assert code == 2 and "cache.dtype=int8" in err and "float16" in err
    code, _, err = command("runner=calibrate", "method=qfilters", "cache.dtype=float16")
    assert code == 2 and "cache.dtype=float16: only runner=evaluate" in err


def test_a_model_whose_keys_float16_does_not_hold_is_said_with_its_layer_and_bfloat16_runs(
    tiny_model_dir, split, run_command, tmp_path
):
    folder = tmp_path / "large"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.model.layers[1].self_attn.v_proj.weight.data *= 1e6
    model.save_pretrained(folder)
    for file in Path(tiny_model_dir).iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    given = [f"model.path={folder}", f"task.data={split}", f"results={tmp_path / 'results'}", "budget=0.5"]
    code, _, err = run_command("method=snapkv", "method.window=8", "cache.dtype=float16", *given)
    assert code == 2 and "cache.dtype=float16: values of layer 1 reach" in err and "Traceback" not in err
    code, _, err = run_command("-m", "method=random,tova", "cache.dtype=float16", *given)
    assert code == 2 and "values of layer 1 reach" in err
    code, _, err = run_command("method=snapkv", "method.window=8", "cache.dtype=bfloat16", *given)
    assert code == 0, err


@pytest.mark.parametrize("company", [(), ("group.max_cells=1",)], ids=["together", "alone"])
def test_every_cache_of_a_run_holds_the_type_the_one_that_fidelity_is_measured_against_too(
    company, command, tmp_path, monkeypatch
):
    made, begin = [], Rounding.__init__

    def noted(self, dtype, n_layers):
        made.append(dtype)
        begin(self, dtype, n_layers)

    monkeypatch.setattr(Rounding, "__init__", noted)
    words = ("method=random", "budget=0.5", "cache.dtype=float16", "fidelity=full", "model.check=off", *company)
    code, _, err = command(*words)
    assert code == 0, err
    assert all("forced" in row for row in samples(tmp_path / "results", "random").values())
    assert set(made) == {torch.float16}
