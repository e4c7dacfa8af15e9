"""Before a model is bound a small copy of it is tried out: what nobody listed is not silently wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama

from methods import load_method
from methods.core.adapters import ADAPTERS, NAME
from methods.core.binding import self_check
from methods.core.binding.decoder import decoder_of
from methods.core.binding.small_copy import SPAN, small_config
from methods.core.errors import UserError
from runners.engine.loading import checkpoint_of, load_model


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of its own for what has passed, and a process that remembers nothing."""
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path))
    self_check._passed.cache_clear()
    return tmp_path / "checks"


def llama(**knobs) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 97, **knobs})).eval()


class StrangeAttention(modeling_llama.LlamaAttention):
    """An attention that nobody listed, and that answers otherwise when it is bound."""

    def forward(self, hidden_states, *args, **kwargs):
        out, weights = super().forward(hidden_states, *args, **kwargs)
        if self.config._attn_implementation == NAME:
            out = out * self.config.factor
        return out, weights


def strange(model: PreTrainedModel) -> PreTrainedModel:
    """The model with that attention, as a class of its own would have it."""

    class StrangeModel(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.self_attn.__class__ = StrangeAttention

    made = StrangeModel(model.config).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("factor", [1.5, 1.001, float("nan")])
def test_an_attention_nobody_listed_that_answers_otherwise_is_refused_with_by_how_much(factor):
    model = strange(llama(factor=factor))
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(
        UserError, match=r"^model: llama cannot be bound, its output differs from the untouched model's by"
    ):
        load_method("full").cache_for(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    model.__dict__[self_check.CHECK] = False
    load_method("full").cache_for(model)


def test_what_has_passed_is_remembered_for_the_configuration_and_forgotten_with_another(nothing_passed, monkeypatch):
    tried = []
    whole = self_check._differences
    monkeypatch.setattr(self_check, "_differences", lambda *given: tried.append(1) or whole(*given))
    load_method("full").cache_for(llama())
    (note,) = nothing_passed.iterdir()
    found = json.loads(note.read_text())
    assert found["off"] < found["allowed"] / 10
    self_check._passed.cache_clear()
    load_method("full").cache_for(llama())
    assert len(tried) == 1
    load_method("full").cache_for(llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    assert len(tried) == 2
    monkeypatch.setattr(self_check, "_code", lambda: "other code")
    load_method("full").cache_for(llama())
    assert len(tried) == 3


def test_a_folder_that_cannot_be_written_is_no_matter(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "file"))
    load_method("full").cache_for(llama())
    assert capsys.readouterr() == ("", "")


def test_neither_random_state_nor_the_model_moves():
    model = llama().to(torch.bfloat16)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    random.seed(3)
    state, own = torch.get_rng_state(), random.getstate()
    load_method("full").cache_for(model)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == own
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.get_default_dtype() == torch.float32


def test_a_copy_meets_every_kind_of_layer_and_every_length_early():
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    with torch.device("meta"):
        sizes = dict(num_hidden_layers=8, layer_types=layers * 2, sliding_window=4096)
        config = AutoConfig.for_model("cohere2", **sizes)
        model = Cohere2ForCausalLM(config)
    decoder = decoder_of(model, ADAPTERS)
    kinds = self_check.signatures(model, decoder)
    assert [kinds.index(kind) for kind in kinds] == [0, 0, 0, 3] * 2
    small = small_config(config, [0, 3])
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.sliding_window == SPAN and small.num_hidden_layers == 2
    assert small.hidden_size // small.num_attention_heads == config.hidden_size // config.num_attention_heads
    assert config.sliding_window == 4096 and config.num_hidden_layers == 8
    early = small_config(LlamaConfig(rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }), [0])  # fmt: skip
    assert early.rope_parameters["original_max_position_embeddings"] == SPAN


def test_a_list_as_long_as_the_copy_is_deep_is_no_setting_per_layer():
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    seen = dict(num_hidden_layers=3, layer_types=kinds, use_sliding_window=True, sliding_window=9)
    config = AutoConfig.for_model("qwen2", **sizes, **seen)
    config.widths_of_experts = [48, 16]
    load_method("full").cache_for(AutoModelForCausalLM.from_config(config).eval())


def test_the_setting_reaches_the_model_and_a_wrong_one_is_named(tiny_model_dir):
    settings = {"path": str(tiny_model_dir)}
    for check, expected in (("auto", True), ("off", False), (False, False)):
        checkpoint = checkpoint_of({**settings, "check": check})
        assert checkpoint == checkpoint_of(settings)  # no part of what the checkpoint is
        model = load_model(checkpoint, torch.float32, torch.device("cpu"))
        assert model.__dict__[self_check.CHECK] is expected
    with pytest.raises(UserError, match=r"^model.check=maybe: give one of auto, off"):
        checkpoint_of({**settings, "check": "maybe"})
    assert isinstance(model, nn.Module)
