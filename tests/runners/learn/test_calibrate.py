"""`runner=calibrate` from the command line to the artefact, and the text that it reads."""

import hashlib
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core.errors import UserError
from runners.learn.calibrate import Calibrate

TEXT = "the cat sat on a mat and read about a long river in the north where nobody answers questions. "


@pytest.fixture
def command(tmp_path, tiny_model_dir, run_command):
    """The calibration of Q-Filters: command("seed=1", ...) -> (exit code, stdout, stderr)."""
    given = (f"model.path={tiny_model_dir}", f"results={tmp_path / 'results'}", f"runner.out={tmp_path / 'made'}")
    return partial(run_command, "runner=calibrate", "method=qfilters", *given)


SMALL = ("runner.documents=2", "runner.tokens=64")


def test_the_command_makes_filters_that_the_method_takes(command, tmp_path, tiny_model_dir):
    code, out, err = command(*SMALL)
    assert code == 0, err
    path = tmp_path / "made" / "filters.safetensors"
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["documents"] == 2 and card["tokens"] == 64 and card["rows"] == 128 and card["seed"] == 0
    assert card["sign_convention"] == "high is kept" and card["dtype"] == "float32"
    assert card["model"]["rope"]["rope_parameters"]["rope_theta"] == 10000.0
    assert card["model"]["id"] == tiny_model_dir.name and card["checkpoint"].startswith("sha256:")
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    lines = out.splitlines()
    assert lines[-1] == f"artefact: {path}"
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"] and lines[2].count("%") == 4
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    cache = load_method("qfilters", budget=0.5, filters=str(path)).cache_for(model)
    assert torch.equal(cache.spec.prepared, load_file(path)["filters"])


def test_one_seed_makes_one_artefact(command, tmp_path):
    sums = []
    for i, seed in enumerate((3, 3, 4)):
        assert command(*SMALL, f"seed={seed}", f"runner.out={tmp_path / str(i)}", "runner.options={n_rows: 40}")[0] == 0
        sums.append((tmp_path / str(i) / "filters.safetensors").read_bytes())
    assert sums[0] == sums[1] != sums[2]


def test_the_svd_gives_the_same_filters(command, tmp_path):
    assert command(*SMALL, f"runner.out={tmp_path / 'eigen'}")[0] == 0
    assert command(*SMALL, f"runner.out={tmp_path / 'svd'}", "runner.options={route: svd}")[0] == 0
    a, b = (load_file(tmp_path / route / "filters.safetensors")["filters"] for route in ("eigen", "svd"))
    assert (torch.nn.functional.cosine_similarity(a, b, dim=-1) > 0.999).all()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["runner.tokens=1"], "runner.tokens=1"),
        (["runner.out=/proc/nothing"], "runner.out=/proc/nothing: cannot be written"),
        (["runner.out="], "runner.out=: give a folder or null"),
        (["runner.data=nowhere.txt"], "runner.data=nowhere.txt: no such file"),
        (["runner.options={rows: 5}"], "runner.options.rows=5: qfilters takes n_rows, route"),
        (["runner.options={route: qr}", *SMALL], "runner.options.route=qr"),
        (["method=snapkv", *SMALL], "method=snapkv: needs no calibration"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(command, overrides, said):
    code, _, err = command(*overrides)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and said in lines[0]


def test_texts_of_a_users_own_are_cut_into_rows(tmp_path, tiny_tokenizer):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in (1, 20, 2)))
    rows, source = Calibrate(documents=3, tokens=50, data=str(lines)).rows(tiny_tokenizer, 50, seed=0)
    ids = tiny_tokenizer(TEXT * 20).input_ids
    assert [row.tolist() for row in rows] == [[ids[at : at + 50]] for at in (0, 50, 100)]
    assert source["text"] == "texts.jsonl"
    plain = tmp_path / "text.txt"
    plain.write_text(TEXT * 20)
    rows, _ = Calibrate(documents=9, data=str(plain)).rows(tiny_tokenizer, 50, seed=0)
    assert [row.tolist() for row in rows] == [[ids[at : at + 50]] for at in range(0, len(ids) - 49, 50)][:9]
    with pytest.raises(UserError, match=r"no text has runner\.tokens=5000 tokens"):
        Calibrate(data=str(plain)).rows(tiny_tokenizer, 5000, seed=0)
    lines.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        Calibrate(data=str(lines)).rows(tiny_tokenizer, 50, seed=0)
    lines.write_text('{"words": "a"}\n')
    with pytest.raises(UserError, match="row 1 has no text and no context"):
        Calibrate(data=str(lines)).rows(tiny_tokenizer, 50, seed=0)


def test_generated_rows_have_the_asked_length_and_differ(tiny_tokenizer):
    rows, source = Calibrate(documents=3).rows(tiny_tokenizer, 300, seed=0)
    assert [row.shape for row in rows] == [(1, 300)] * 3
    assert not torch.equal(rows[0], rows[1]) and len(source["prose"]) == 16
    again, _ = Calibrate(documents=3).rows(tiny_tokenizer, 300, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
