"""What a model's attention does beyond our rules is kept to, or refused by name with the model left as it was."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from methods import load_method
from methods.core.adapters import NAME
from methods.core.errors import UserError
from tests.bounds import MILD, near, run_off
from tests.tiny import feed, padded_prompt, tiny_model

_SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
    eos_token_id=None,
)  # fmt: skip
_MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
PIECES = [9, 1, 11, 1, 1, 1]


def made(kind: str, **knobs: Any) -> PreTrainedModel:
    """A random model of this type in evaluation mode, always the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SIZES, **knobs})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def full(model: PreTrainedModel):
    return load_method("full").cache_for(model, prompt_len=21)


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that a bind could leave behind."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {
        "configs": [vars(one).copy() for one in configs.values()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "own": [sorted(m.__dict__) for m in model.modules()],
    }


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("phimoe", dict(_MOE, sliding_window=7)),
        ("qwen2_moe", dict(_MOE, sliding_window=7, use_sliding_window=True, max_window_layers=1)),
        (
            "qwen2_moe",
            dict(_MOE, sliding_window=7, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]),
        ),
    ],
)
def test_a_window_that_lives_in_the_mask_alone_is_kept(kind, knobs):
    stock = made(kind, **knobs)
    ids, mask = padded_prompt([24, 17])
    expected = feed(stock, DynamicCache(config=stock.config), ids, mask, PIECES)
    model = copy.deepcopy(stock)
    near(feed(model, full(model), ids, mask, PIECES)[mask > 0], expected[mask > 0], run_off(expected, MILD))
    config = copy.deepcopy(stock.config)
    config.sliding_window = 1000
    blind = type(stock)._from_config(config, attn_implementation="eager").eval()
    blind.load_state_dict(stock.state_dict())
    assert (feed(blind, DynamicCache(), ids, mask, PIECES) - expected)[mask > 0].abs().max() > 0.1  # it matters


_TWO_KINDS = dict(
    head_dim=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_hidden_layers=4,
    vocab_size_per_layer_input=97,
    hidden_size_per_layer_input=8,
)
_GEMMA3N = dict(laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[48] * 4)
_BART = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32)

REFUSED = {
    "both ways": ("llama", dict(is_causal=False), "later ones too"),
    "cross-attention": ("bart", _BART, "cross-attention"),
    "shared keys": ("gemma3n_text", {**_TWO_KINDS, **_GEMMA3N, "num_kv_shared_layers": 1}, "keys and values"),
    "a recurrent state": ("mamba", dict(state_size=4), "holds more than keys and values"),
    "two widths": ("gemma4_text", {**_TWO_KINDS, "global_head_dim": 16}, "differ in head_dim"),
    "sinks": ("gpt_oss", dict(_MOE, head_dim=8), "learned sinks"),
    "chunks": ("llama4_text", dict(head_dim=8, attention_chunk_size=8, num_local_experts=2), "other rules"),
    "no interface": ("bloom", dict(n_layer=2, n_head=4), "computes its attention itself"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_is_named_and_left_as_it_was(name):
    kind, knobs, reason = REFUSED[name]
    model = made(kind, **knobs)
    ids, mask = padded_prompt([9])
    before, logits = state_of(model), model(ids, attention_mask=mask).logits
    knobs = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    tokens = model.generate(ids, attention_mask=mask, **knobs) if kind != "bart" else None
    for _ in range(2):
        with pytest.raises(UserError, match=f"^model: {kind} cannot be bound, .*{reason}"):
            full(model)
    gc.collect()
    assert state_of(model) == before
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    if tokens is not None:
        assert torch.equal(model.generate(ids, attention_mask=mask, **knobs), tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "falcon-gqa"])
def test_attention_left_out_at_random_in_training_mode_is_refused(name):
    rates = dict(attention_dropout=0.1) if name not in ("gpt2", "gptj") else dict(attn_pdrop=0.1)
    model = tiny_model(name, **rates)
    full(model)
    model.train()
    with pytest.raises(UserError, match="training mode it drops attention at random"):
        full(model)
    full(model.eval())
    full(tiny_model("llama").train())  # nothing is left out: training mode is no matter


@torch.no_grad()
def test_of_a_vision_language_model_the_text_decoder_alone_is_bound():
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model(
        "llava",
        text_config=dict(_SIZES, model_type="llama"),
        vision_config=dict(tower, model_type="clip_vision_model", image_size=8, patch_size=4),
        image_token_index=96,
        vision_feature_layer=-1,
    )
    stock = AutoModelForImageTextToText.from_config(config).eval()
    model = copy.deepcopy(stock)
    cache, during = load_method("full").cache_for(model), []
    parts = (model.config.text_config, model.config.vision_config)
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda *_: during.extend(part._attn_implementation for part in parts)
    )
    ids, mask = padded_prompt([24])
    ids = ids.clamp_max(95)
    ids[:, 2:6] = 96
    image = dict(pixel_values=torch.randn(1, 3, 8, 8))
    expected = stock(ids, attention_mask=mask, use_cache=True, **image).logits
    logits = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **image)
    assert during == [NAME, stock.config.vision_config._attn_implementation] and during[1] != NAME
    near(logits.logits, expected, run_off(expected, MILD))
