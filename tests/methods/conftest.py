"""A tiny llama per attention shape, and the one loop that method tests run."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.tiny import equip, tiny_model


def tiny_llama(n_heads: int = 4, n_kv_heads: int = 2, n_layers: int = 2) -> LlamaForCausalLM:
    """A random llama with sharp attention, so that what a cache drops shows in the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def equipped(artefact_folder: Path) -> Callable[[str], PreTrainedModel]:
    """equipped(architecture): a tiny model that every method knows, made once."""
    return cache(lambda name: equip(tiny_model(name), artefact_folder))


@pytest.fixture(scope="session")
def gqa(artefact_folder: Path) -> LlamaForCausalLM:
    return equip(tiny_llama(4, 2), artefact_folder)


@pytest.fixture(scope="session", params=[(4, 2), (4, 4), (4, 1)], ids=["gqa", "mha", "mqa"])
def any_heads(request: pytest.FixtureRequest, artefact_folder: Path) -> LlamaForCausalLM:
    if request.param == (4, 2):
        return request.getfixturevalue("gqa")
    return equip(tiny_llama(*request.param), artefact_folder)


@torch.no_grad()
def run(model, cache, ids, chunks=None, new=None, mask=None):
    """Logits of the prompt's last token and of every token of `new` [B, N] fed one at a time: [B, 1 + N, V].

    chunks: lengths of the prompt's pieces; mask [B, T]: 1 for real tokens.
    """
    out, at = [], 0
    mask = torch.ones_like(ids) if mask is None else mask
    for size in chunks or [ids.shape[1]]:
        seen = mask[:, : at + size]
        pos = (seen.cumsum(-1) - 1).clamp_min(0)[:, at:]
        logits = model(
            ids[:, at : at + size], attention_mask=seen, position_ids=pos, past_key_values=cache, use_cache=True
        ).logits
        at += size
    out.append(logits[:, -1:])
    for i in range(0 if new is None else new.shape[1]):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        pos = mask.sum(-1, keepdim=True) - 1
        step = new[:, i : i + 1]
        out.append(model(step, attention_mask=mask, position_ids=pos, past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, dim=1)


def kept(cache, layer: int = 0, row: int = 0, head: int = 0) -> list[int]:
    """Positions that one head holds, ascending."""
    inner = cache.layers[layer].inner
    pos = getattr(inner, "store", inner).pos[row, head]
    return sorted(pos[pos >= 0].tolist())
