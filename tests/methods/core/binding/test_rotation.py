"""How layers turn their keys: whatever the form, as the model does, or methods that turn keys refuse it by name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from methods import load_method
from methods.core.bind import bind
from methods.core.contract import Rope
from methods.core.errors import UserError
from methods.full import Full
from tests.bounds import MILD, bound, near, run_off
from tests.tiny import VOCAB

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_MOE = dict(moe_intermediate_size=16, num_experts_per_tok=2)
#: a second layer that does not turn its keys, behind one that does and is silenced
_SECOND = dict(num_hidden_layers=2, sliding_window=1024, layer_types=["sliding_attention", "full_attention"])

#: name: model type, and the configuration of its one layer that says something
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "phi3, partial": ("phi3", dict(partial_rotary_factor=0.5)),
    "stablelm, a quarter": ("stablelm", dict(head_dim=8)),
    "olmo2": ("olmo2", {}),
    "gptj": ("gptj", dict(rotary_dim=4, num_key_value_heads=4)),
    "gpt_neox": ("gpt_neox", dict(num_key_value_heads=4)),
    "nemotron": ("nemotron", {}),
    "cohere": ("cohere", {}),
    "cohere2, without RoPE": ("cohere2", _SECOND),
    "glm": ("glm", dict(head_dim=8)),
    "glm4": ("glm4", dict(head_dim=8)),
    "glm4_moe": ("glm4_moe", dict(head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, **_MOE)),
    "ernie4_5": ("ernie4_5", dict(head_dim=8)),
    "ernie4_5_moe": ("ernie4_5_moe", dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16)),
    "helium": ("helium", dict(head_dim=8)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1])),
    "smollm3, without RoPE": ("smollm3", dict(num_hidden_layers=2, no_rope_layers=[1, 0])),
    "exaone4": ("exaone4", dict(sliding_window=None, layer_types=["full_attention"])),
    "exaone4, without RoPE": ("exaone4", _SECOND),
    "exaone_moe, without RoPE": (
        "exaone_moe",
        dict(head_dim=8, num_experts=4, n_group=1, topk_group=1, **_SECOND, **_MOE),
    ),
    "afmoe, without RoPE": ("afmoe", dict(head_dim=8, num_experts=4, num_dense_layers=1, **_SECOND, **_MOE)),
    "nanochat": ("nanochat", {}),
    "llama, yarn": (
        "llama",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                attention_factor=1.3,
                original_max_position_embeddings=512,
            )
        ),
    ),
}
#: keys are normed channel by channel after RoPE
REFUSED = {"hunyuan_v1_dense": dict(head_dim=8), "hunyuan_v1_moe": dict(head_dim=8, num_experts=2, moe_topk=1, **_MOE)}


def one_layer(kind: str, **knobs: Any) -> PreTrainedModel:
    """A random model of one layer whose norms are no identities; of two, the first adds nothing."""
    config = AutoConfig.for_model(kind, **{**_COMMON, "num_hidden_layers": 1, **knobs})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn(weight.shape)
        if config.num_hidden_layers == 2:
            model.model.layers[0].self_attn.o_proj.weight.zero_()
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The untouched model and a copy of it to bind."""
    kind, knobs = MODELS[request.param]
    stock = one_layer(kind, **knobs)
    return stock, copy.deepcopy(stock)


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(seed))


def own_keys(model: PreTrainedModel, ids: Tensor, at: int) -> list[Tensor]:
    """Every layer's keys [H, T, D] that the untouched model makes of tokens whose first is at position `at`."""
    cache = DynamicCache()
    positions = torch.arange(at, at + ids.shape[1])[None]
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


# angles of up to 907 are rounded, and not to the same numbers
TURNED = 2 * bound(torch.float32, 2, size=2 * 907)


def wrongly_turned(stock: PreTrainedModel, ropes: Sequence[Rope | None]) -> float:
    """How far keys that were turned by our rope are from the model's own, of the largest; where positions are RoPE's.

    What a layer is given then does not depend on where the text starts, in all layers.
    """
    ids, off = tokens(9), [0.0]
    for at, by in ((0, 7), (5, 7), (3, 900)):
        for rope, k, expected in zip(ropes, own_keys(stock, ids, at), own_keys(stock, ids, at + by), strict=True):
            if rope is not None:
                turned = rope.rotate(k, torch.full(k.shape[:2], by))
                off.append(float((turned - expected).abs().max() / expected.abs().max()))
    return max(off)


@torch.no_grad()
def test_a_key_turned_by_our_rope_is_the_models_own_at_the_later_position(pair):
    stock, model = pair
    ropes = bind(model).ropes
    assert None not in ropes and wrongly_turned(stock, ropes) <= TURNED


_VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_heads=2, depth=1,
    embed_dim=32, out_hidden_size=32, mlp_ratio=2, patch_size=4, image_size=8, spatial_merge_size=1,
    fullatt_block_indexes=[0], deepstack_visual_indexes=[0], num_position_embeddings=16,
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_of_a_vision_language_model_the_text_decoders_own_rope_is_taken(kind):
    default = AutoConfig.for_model(kind)
    text, vision = default.get_text_config(decoder=True).model_type, default.vision_config
    rope = {} if kind == "mistral3" else dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    config = AutoConfig.for_model(
        kind,
        text_config=dict(
            _COMMON, num_hidden_layers=2, head_dim=8, model_type=text, **({"rope_parameters": rope} if rope else {})
        ),
        vision_config={k: v for k, v in _VISION.items() if k in vision.to_dict()} | {"model_type": vision.model_type},
        **{k: 96 for k in ("image_token_id", "image_token_index") if k in default.to_dict()},
    )
    torch.manual_seed(0)
    stock = AutoModelForImageTextToText.from_config(config).eval()
    ropes = bind(copy.deepcopy(stock)).ropes
    assert None not in ropes and wrongly_turned(stock, ropes) <= TURNED


@torch.no_grad()
def test_a_key_turned_back_is_the_one_that_the_model_turned_at_the_first_position(pair):
    model = pair[1]
    cache = _Watching().cache_for(model)
    ids = tokens(1).expand(1, 9)
    model(ids, past_key_values=cache, use_cache=True)
    step = cache.layers[-1].inner.step
    # one token's keys before RoPE are the same wherever it stands; a multiplier is undone too
    raw = step.k_raw
    off = run_off(raw, MILD)
    near(raw, raw[:, :, :1].expand_as(raw), off)
    expected = own_keys(pair[0], ids[:, :1], 0)[-1]
    if step.cos is not None:
        expected = expected / step.cos[0, 0, 0]
    near(raw[0, :, :1], expected, off)


@torch.no_grad()
def test_a_key_embedded_by_our_rope_is_the_models_own_and_queries_are_turned_back_as_keys_are(pair):
    stock, model = pair
    cache, ids = _Watching().cache_for(model), tokens(1).expand(1, 9)
    model(ids, past_key_values=cache, use_cache=True)
    step, rope = cache.layers[-1].inner.step, bind(model).ropes[-1]
    raw = step.k_raw
    for at in (0, 3, 900):
        expected = own_keys(stock, ids, at)[-1]
        near(rope.embed(raw[0], torch.arange(at, at + 9)), expected, TURNED * float(expected.abs().max()))
    # of one token they are the same wherever it stands, and embedded they are the model's own again
    near(step.q_raw, step.q_raw[:, :, :1].expand_as(step.q), run_off(step.q_raw, MILD))
    near(rope.embed(step.q_raw, step.pos[:, None]), step.q, run_off(step.q, MILD))
    cos, sin = rope.cos_sin(step.pos)
    assert cos.shape == (1, 9, len(rope.inv_freq))
    if step.cos is not None:
        assert rope.interleaved == step.interleaved
        near(cos, step.cos, bound(torch.float32, 2, size=2.0))
        near(sin, step.sin, bound(torch.float32, 2, size=2.0))


@torch.no_grad()
def test_rolled_positions_are_those_of_the_kept_tokens_read_alone(pair):
    # in a model of one layer keys and values depend on the token alone, so dropping equals never having read
    stock, model = pair
    ids, new = tokens(40), tokens(4, seed=2)
    cache = load_method("streaming_llm", budget=12).cache_for(model)
    model(ids, past_key_values=cache, use_cache=True)
    stream = torch.cat((ids, new), dim=1)
    for i in range(4):
        at = torch.tensor([[40 + i]])
        actual = model(new[:, i : i + 1], position_ids=at, past_key_values=cache, use_cache=True).logits[0, -1]
        seen = torch.cat((stream[:, :4], stream[:, 40 + i - 8 : 40 + i + 1]), dim=1)
        expected = stock(seen).logits[0, -1]
        near(actual, expected, run_off(expected, MILD))


@torch.no_grad()
@pytest.mark.parametrize("kind", REFUSED)
def test_a_rotation_that_no_form_gives_is_refused_by_name_by_what_turns_keys_and_by_nothing_else(kind):
    model = one_layer(kind, **REFUSED[kind])
    ids = tokens(30)
    before = model(ids).logits
    with pytest.raises(UserError, match=f"positions=rolled .* layer 0 of {kind} .*positions=original works"):
        load_method("streaming_llm", budget=12).cache_for(model)
    with pytest.raises(UserError, match=f"keys as they are before RoPE, and how layer 0 of {kind}"):
        _Watching().cache_for(model)
    for name in ("full", "snapkv"):
        cache = load_method(name, budget=1).cache_for(model)
        near(model(ids, past_key_values=cache, use_cache=True).logits, before, run_off(before, MILD))


def test_positions_that_are_added_to_the_input_are_no_rope():
    for kind in ("gpt2", "opt"):
        knobs = dict(ffn_dim=48, word_embed_proj_dim=32) if kind == "opt" else {}
        model = one_layer(kind, num_key_value_heads=4, **knobs)  # every head has keys of its own
        assert bind(model).ropes == [None]
        with pytest.raises(UserError, match="positions=rolled"):
            load_method("streaming_llm", budget=12).cache_for(model)


def shrunk(kind: str) -> PreTrainedModel:
    """A small random model of one of transformers' types, from its default configuration. Raises if it stays large."""
    sizes = {**_COMMON, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 4}
    sizes |= dict(
        n_embd=64, n_layer=4, n_head=4, n_positions=2048, d_model=64, n_heads=4, n_layers=4, ffn_dim=48,
        word_embed_proj_dim=64, num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, rotary_dim=8,
    )  # fmt: skip
    default = AutoConfig.for_model(kind)
    known = {**default.to_dict(), **getattr(default, "attribute_map", {})}
    knobs = {name: value for name, value in sizes.items() if name in known}
    if kinds := known.get("layer_types"):
        knobs["layer_types"] = kinds[:4]
    if known.get("sliding_window"):
        knobs["sliding_window"] = 1024
    config = AutoConfig.for_model(kind, **knobs)
    with torch.device("meta"):
        if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > 3e6:
            raise ValueError("its default configuration stays large")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_no_language_model_of_transformers_turns_keys_otherwise_than_we_say(kind):
    try:
        stock = shrunk(kind)
        own_keys(stock, tokens(5), 0)
        model = copy.deepcopy(stock)
    except Exception as error:
        pytest.skip(f"no small model of it: {type(error).__name__}: {error}")
    try:
        spec = bind(model)
    except UserError as refused:
        pytest.skip(str(refused))
    assert wrongly_turned(stock, spec.ropes) <= 2 * TURNED


class _Watching(Full):
    """The full cache, which asks for RoPE and remembers its step."""

    needs = frozenset({"rope"})

    def caches(self, spec, prompt_len):
        layers = super().caches(spec, prompt_len)
        for layer in layers:
            append = layer.append
            layer.append = lambda step, layer=layer, append=append: (layer.__dict__.update(step=step), append(step))
        return layers
