"""Layers with a sliding window: what a row lets go of there is its own affair."""

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from methods import load_method
from tests.bounds import near, run_off
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def short_window() -> PreTrainedModel:
    """Slots go out of sight while it decodes."""
    return tiny_model("mistral", sliding_window=40)


LATER = {
    "streaming_llm": ("streaming_llm", {"budget": 0.5}),
    "streaming_llm, nothing to drop": ("streaming_llm", {"budget": 60}),
    "nacl": ("nacl", {"budget": 0.5, "decode_interval": 5}),
    "snapkv": ("snapkv", {"budget": 0.5, "window": 4}),
    "adakv": ("adakv", {"budget": 0.8, "window": 4}),
    "random": ("random", {"budget": 30}),
    "window": ("window", {"budget": 60}),
    "h2o": ("h2o", {"budget": 0.5}),
    "kivi": ("kivi", {"bits": 4}),
    "snapkv+kivi": ("snapkv+kivi", {"budget": 0.8, "window": 4}),
}


@cache
def later_turns(case: str, model: PreTrainedModel, rows: tuple[int, ...], padding: int):
    """What rows of a sliding layer say and hold: a prompt, two turns with so much padding, and tokens after each."""
    name, knobs = LATER[case]
    lengths = {20: (20, 4, 2), 36: (36, 2, 7), 39: (39, 7, 4), 70: (70, 4, 4)}
    cache = load_method(name, **knobs).cache_for(model, samples=list(rows))
    seen, logits, held = torch.zeros(len(rows), 0, dtype=torch.long), [], []
    for piece, more in (0, 0), *[(None, 0)] * 3, (1, padding), *[(None, 0)] * 13, (2, padding), (None, 0):
        n = [1 if piece is None else lengths[row][piece] for row in rows]
        T = max(n) + more
        ids = torch.zeros(len(rows), T, dtype=torch.long)
        for i, row in enumerate(rows):
            at = int(seen[i].sum())
            ids[i, T - n[i] :] = torch.randint(1, 97, (200,), generator=torch.Generator().manual_seed(row))[at:][: n[i]]
        seen = torch.cat((seen, (torch.arange(T) >= T - torch.tensor(n)[:, None]).long()), dim=1)
        pos = (seen.cumsum(-1) - 1).clamp_min(0)[:, -T:]
        with torch.no_grad():
            out = model(ids, attention_mask=seen, position_ids=pos, past_key_values=cache, use_cache=True).logits
        logits.append(out[:, -1])
        held.append([one.held_end for one in cache.reports()])
    return torch.stack(logits, dim=1), torch.tensor(held)


@pytest.mark.parametrize("case", LATER)
def test_in_sliding_layers_neither_other_rows_nor_the_padding_of_later_turns_decide(case, short_window):
    rows = (20, 36, 39, 70)
    alone = [later_turns(case, short_window, (row,), 0) for row in rows]
    for rows_of, padding in ((rows, 0), (rows, 45), ((36,), 40)):  # wider than the window
        logits, held = later_turns(case, short_window, rows_of, padding)
        for i, row in enumerate(rows_of):
            own_logits, own_held = alone[rows.index(row)]
            assert held[:, i].tolist() == own_held[:, 0].tolist()
            if "kivi" not in case:  # a code may be rounded the other way
                near(logits[i], own_logits[0], run_off(own_logits))


def test_streaming_llm_gives_the_places_of_sinks_that_are_out_of_sight_to_recent_tokens(short_window):
    cache = load_method("streaming_llm", budget=0.5).cache_for(short_window)
    with torch.no_grad():
        for at in (range(36), *[[i] for i in range(36, 60)]):
            pos = torch.tensor([list(at)])
            short_window(pos % 97, position_ids=pos, past_key_values=cache, use_cache=True)
    pos = cache.layers[0].inner.store.pos
    assert [sorted(head[head >= 0].tolist()) for head in pos[0]] == [list(range(42, 60))] * pos.shape[1]
