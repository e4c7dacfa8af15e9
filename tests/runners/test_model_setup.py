"""Where a model runs and how it is set up, the same for every runner."""

import json
import shutil

import pytest
import torch

from methods.core.errors import UserError
from runners.engine.loading import find
from runners.model_setup import ModelSetup, pick_backend, pick_device, pick_dtype, pick_threads
from tasks.sampling import Sampling
from tests.wrong.values import composed


@pytest.mark.parametrize(
    ("configured", "elsewhere"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_auto_is_float32_on_a_cpu_and_the_checkpoints_dtype_elsewhere(tmp_path, tiny_model_dir, configured, elsewhere):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    left = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (copy / "config.json").write_text(json.dumps(left | configured))
    checkpoint = find(str(copy))
    assert pick_dtype("auto", checkpoint, torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", checkpoint, torch.device("cuda")) == elsewhere
    assert pick_dtype("float16", checkpoint, torch.device("cpu")) == torch.float16


def test_threads_are_as_asked_else_as_the_environment_says_else_the_idle_cores(monkeypatch):
    def threads(asked, busy: list[float], most: int | None = None) -> int:
        pick_threads.cache_clear()
        monkeypatch.setattr("psutil.cpu_percent", lambda **kwargs: busy or pytest.fail("waited for nothing"))
        monkeypatch.setattr("psutil.cpu_count", lambda: len(busy))
        monkeypatch.setattr("torch.get_num_threads", lambda: len(busy) if most is None else most)
        return pick_threads(asked)

    assert threads(3, [99.0] * 4) == 3
    assert threads(None, [99.0] * 4) == 4  # OMP_NUM_THREADS is set for tests
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads(None, [99.0, 100.0, 5.0, 0.0]) == 2
    assert threads(None, [99.0] * 4) == 1
    assert threads(None, [3.0] * 4) == 4
    assert threads(None, [3.0] * 4, most=2) == 2  # torch has no more
    assert threads(None, [], most=1) == 1
    pick_threads.cache_clear()


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device=cuda:99: this machine has"):
        pick_device("cuda:99")


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_auto_is_a_gpu_where_there_is_one_and_none_is_given_that_is_not_there(gpus, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert pick_device("auto") == torch.device("cuda" if gpus else "cpu")
    assert [pick_device(f"cuda:{i}").index for i in range(gpus)] == list(range(gpus))
    with pytest.raises(UserError, match=f"device=cuda:{gpus}: this machine has {gpus} CUDA devices"):
        pick_device(f"cuda:{gpus}")


def test_what_can_be_refused_is_refused_before_anything_is_loaded_and_the_rest_is_loaded_once(tiny_model_dir):
    loads = []

    def load(*how):
        loads.append(how)
        return "the model"

    words = (f"model.path={tiny_model_dir}", "device=cpu", "model.reasoning=keep", "last_token=held")
    setup = ModelSetup(composed(*words, "model.max_length=99"), load)
    assert not loads and (setup.max_length, setup.dtype_name, setup.threads) == (99, "float32", 1)
    assert setup.model == setup.model == "the model"
    assert loads == [(setup.checkpoint, torch.float32, torch.device("cpu"))]
    encoder = setup.encoder
    assert encoder is setup.encoder and encoder.tokenizer is setup.tokenizer
    assert (encoder.max_length, encoder.window, encoder.reasoning, encoder.hold_last) == (99, 2048, "keep", True)
    assert list(encoder.ends) == [2] and not encoder.sampling.temperature
    with pytest.raises(UserError, match="device=cuda:99"):
        ModelSetup(composed(*words, "device=cuda:99"), load)
    assert len(loads) == 1


@pytest.mark.parametrize(("named", "own", "ends"), [([5, 2], 2, [2, 5]), (5, 2, [2, 5]), (5, None, [5])])
def test_an_answer_ends_where_the_checkpoint_or_its_tokenizer_says(tmp_path, tiny_model_dir, named, own, ends):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    setup = ModelSetup(composed(f"model.path={copy}", "device=cpu"))
    if own is None:
        setup.tokenizer.eos_token = None
    assert list(setup.encoder.ends) == ends


def test_prompts_are_written_and_answers_drawn_as_the_settings_say(tiny_model_dir):
    words = (f"model.path={tiny_model_dir}", "device=cpu", "+model.chat_options.thinking=3", "model.date=2025-02-03")
    for chat in (True, False):
        setup = ModelSetup(composed(*words, f"model.chat={chat}"))
        setup.checkpoint.__dict__["is_dated"] = True  # as where its template asks for the day
        setup.sampling = Sampling(temperature=0.5)
        encoder = setup.encoder
        assert (encoder.chat, encoder.date) == (chat, "2025-02-03" if chat else None)
        assert encoder.chat_options == {"thinking": 3}
        assert encoder.sampling is setup.sampling


def test_what_is_not_asked_for_is_left_as_the_checkpoint_has_it(tmp_path, tiny_model_dir, monkeypatch):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "int8", "eos_token_id": None}))
    (copy / "generation_config.json").unlink()
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    setup = ModelSetup(composed(f"model.path={copy}", "device=cpu", "threads=3"), lambda *how: "the model")
    encoder = setup.encoder
    assert (encoder.hold_last, encoder.reasoning, setup.date) == (False, "strip", None)
    assert list(encoder.ends) == [2]  # the tokenizer's, where the checkpoint names none
    assert threads == [] and setup.model == "the model" and threads == [3]
    with pytest.raises(UserError, match="its dtype is int8; give dtype=float32, float16, bfloat16"):
        pick_dtype("auto", setup.checkpoint, torch.device("cuda"))
    with pytest.raises(UserError, match="fastest"):
        pick_backend("fastest", torch.device("cpu"))
