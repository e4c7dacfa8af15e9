"""Random two-layer models, one per architecture and attention shape; a forward pass takes milliseconds."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from methods import load_method, method_names
from methods.core import artefacts
from methods.core.contract import Method
from tests.methods.knobs import SETS
from tests.tables import some_tables

VOCAB = 97
WINDOW = 12  # of sliding layers, shorter than the tests' prompts

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_GQA = dict(num_key_value_heads=2)
_SLIDING_FIRST = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
_GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_FALCON = dict(alibi=False, bias=False, ffn_hidden_size=64)

#: name: model type of the configuration and what it has beyond the common sizes
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "llama-mha": ("llama", dict(num_key_value_heads=4)),
    "llama-mqa": ("llama", dict(num_key_value_heads=1)),
    "mistral": ("mistral", {**_GQA, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", _GQA),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 16}),
    "gemma2": ("gemma2", {**_GQA, **_SLIDING_FIRST, "head_dim": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**_GQA, **_SLIDING_FIRST, "head_dim": 16}),
    "phi3": ("phi3", {**_GQA, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2, dropout=0.0)),
    "gpt2": ("gpt2", _GPT2),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "mpt": ("mpt", dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128)),
    "falcon-mqa": ("falcon", {**_FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon-mha": ("falcon", {**_FALCON, "multi_query": False, "new_decoder_architecture": False}),
    "falcon-gqa": ("falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
}

ARCHITECTURES = tuple(_ARCHITECTURES)


#: every method that is a cache by itself: a run leaves texts out for one of the others, and looks ahead for the second
METHODS = [
    name for name in method_names() if not (load_method(name).without_text or "answers" in load_method(name).needs)
]


def tiny_model(name: str, attn_implementation: str | None = None, **changes: Any) -> PreTrainedModel:
    """A random model in eval mode, the same weights at every call; changes: of its configuration."""
    kind, own = _ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, **{**_COMMON, **own, **changes})
    if kind == "gemma2" and attn_implementation is None:
        attn_implementation = "eager"  # transformers 5.17 would take SDPA, which leaves the softcap out
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def padded_prompt(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens [B, T] and their mask [B, T]: one row per length, filled up on the left with token 0."""
    T = max(lengths)
    ids = torch.randint(1, VOCAB, (len(lengths), T), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, pieces: list[int], start: int = 0) -> Tensor:
    """Logits [B, T - start, V] of the tokens ids [B, T] from `start` on, fed in pieces of these lengths.

    mask [B, T]: 1 for real tokens; start: tokens that the cache has already seen.
    """
    assert start + sum(pieces) == ids.shape[1]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    out, at = [], start
    for size in pieces:
        now = slice(at, at + size)
        extra = {"position_ids": positions[:, now]} if takes_positions else {}
        given = mask[:, : at + size]
        out.append(model(ids[:, now], attention_mask=given, past_key_values=cache, use_cache=True, **extra).logits)
        at += size
    return torch.cat(out, dim=1)


#: knobs that fit sizes which belong to trained weights to prompts of the contract's length
SIZES: dict[str, dict[str, Any]] = {"lococo": {"length": 90, "block_size": 32}}


def calibrated(model: PreTrainedModel, name: str, at: Path) -> PreTrainedModel:
    """The model, once this method has learned about it from random tokens; at: as of `equip`."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, VOCAB, (1, 64), generator=g) for _ in range(2)]
    made = load_method(name).calibrate(model, rows, seed=0)
    folder = at / made.method / artefacts.model_id(model)
    artefacts.save(made.method, made.name, model, made.tensors, made.facts, at=folder)
    return model


def equip(model: PreTrainedModel, at: Path) -> PreTrainedModel:
    """The model, once every method that needs to learn something about it has done so from random tokens.

    at: a folder for artefacts; the caller lets `methods.core.artefacts.PLACES` hold it.
    """
    for name in method_names():
        if type(load_method(name)).calibrate is not Method.calibrate:
            calibrated(model, name, at)
    some_tables(model, at)
    torch.manual_seed(0)
    # what is trained and not calibrated: as training begins with it
    for knobs in ({}, *SETS["lococo"]):
        for budget in (0.5, 60) if knobs else (0.5, 60, 40):
            method = load_method("lococo", budget=budget, **{**SIZES["lococo"], **knobs})
            untrained = method.new_compressors(model).state_dict()
            folder = at / "lococo" / artefacts.model_id(model)
            facts = {"hidden_act": method.hidden_act}
            artefacts.save("lococo", method.artefact_name, model, untrained, facts, at=folder)
    return model
