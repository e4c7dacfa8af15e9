"""Every method's bytes by row: a row holds what it holds alone, and nothing that is held is nobody's."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from methods import load_method
from methods.adakv import AdaKV
from methods.core.contract import Method
from methods.core.meter import nbytes
from tests.methods.conftest import run, tiny_llama
from tests.tiny import METHODS, SIZES, equip
from tests.turns import taking_turns

LENGTHS = (90, 35, 75, 61)
NEW = 5
RAGGED = "h2o, heads apart"
KNOBS = {
    "scissorhands, ties": ("scissorhands", {"tie": "prob"}),
    "nacl, again and again": ("nacl", {"decode_interval": 4}),
    "kivi, 4 bits": ("kivi", {"bits": 4}),
    "per_token, 4 bits": ("per_token", {"bits": 4}),
    RAGGED: ("h2o", {}),
}
CASES = {name: (name, {}) for name in METHODS} | KNOBS


def method_of(case: str, budget: float) -> Method:
    name, knobs = CASES[case]
    knobs = {**SIZES.get(name, {}), **knobs}
    if name != "full" and "bits" not in knobs:
        knobs["budget"] = budget
    method = load_method(name, **knobs)
    return replace(method, allocator=AdaKV()) if case == RAGGED else method


@cache
def prompt(lengths: tuple[int, ...], new: int = NEW) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [B, T] filled up on the left, their mask, and new tokens [B, N]; a row's are the same in every batch."""
    T = max(lengths)
    ids = torch.zeros(len(lengths), T, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, T - n :] = torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(n))
    mask = (torch.arange(T) >= T - torch.tensor(lengths)[:, None]).long()
    later = torch.randint(1, 97, (1, new), generator=torch.Generator().manual_seed(0))
    return ids, mask, later.expand(len(lengths), -1)


def read(model, method, lengths, chunks=None, new=NEW):
    """A cache behind prompts of these lengths and so many decoded tokens."""
    ids, mask, later = prompt(tuple(lengths), new)
    cache = method.cache_for(model, prompt_len=max(lengths) if chunks else None, samples=list(lengths))
    run(model, cache, ids, chunks=chunks, new=later if new else None, mask=mask)
    return cache


@pytest.fixture(scope="module")
def sliding(equipped: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return equipped("mistral")


@pytest.fixture(scope="module")
def one_layer(artefact_folder: Path) -> PreTrainedModel:
    return equip(tiny_llama(n_layers=1), artefact_folder)


OWN = ("held_prompt", "held_end", "full_prompt", "full", "mean_decode", "asked", "overhead", "per_layer", "share")


def own(report) -> dict:
    found = report.to_dict()
    return {name: found[name] for name in (*OWN, "nominal_bits", "effective_bits", "read_step")}


@cache
def rows_of(case: str, model: PreTrainedModel, lengths: tuple[int, ...]) -> list[dict]:
    """What the ledger has of each row behind whole prompts; computed once for all tests."""
    return [own(one) for one in read(model, method_of(case, 0.5), lengths).reports()]


@pytest.mark.parametrize("case", taking_turns(list(CASES), of=2))
def test_a_row_holds_the_same_in_every_batch(case, gqa):
    method = method_of(case, 0.5)
    alone = {n: own(read(gqa, method, [n]).report()) for n in LENGTHS}
    for lengths in (LENGTHS, (35, 90, 90, 61, 35, 75, 61, 75)):
        assert rows_of(case, gqa, lengths) == [alone[n] for n in lengths]


@pytest.mark.parametrize("case", CASES)
def test_a_row_holds_the_same_however_its_prompt_is_cut(case, gqa):
    method = method_of(case, 0.5)
    if method.changes_prompt and not case.startswith("lococo"):
        pytest.skip("what it reads depends on the pieces")
    parts = read(gqa, method, LENGTHS, [30, 1, 40, 19])
    assert [own(one) for one in parts.reports()] == rows_of(case, gqa, LENGTHS)


@pytest.mark.parametrize("case", CASES)
def test_sliding_layers_hold_the_same_in_every_batch_when_the_prompt_ends(case, sliding):
    method = method_of(case, 0.5)
    alone = [own(read(sliding, method, [n], new=0).report()) for n in LENGTHS]
    assert [own(one) for one in read(sliding, method, LENGTHS, new=0).reports()] == alone


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_what_rows_hold_and_padding_are_all_that_is_held(case, rows, gqa, sliding):
    for model in (gqa, sliding):
        ids, mask, later = prompt(LENGTHS[:rows])
        cache = method_of(case, 0.5).cache_for(model)
        for new in range(NEW + 1):
            if new == 0:
                run(model, cache, ids, mask=mask)
            else:
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
                with torch.no_grad():
                    at = mask.sum(-1, keepdim=True) - 1
                    model(later[:, new - 1 : new], attention_mask=mask, position_ids=at, past_key_values=cache)
            held = nbytes(tensor for layer in cache.layers for tensor in layer.inner.tensors())
            reports, whole = cache.reports(), cache.report()
            assert sum(one.held_end for one in reports) + whole.padding_end == held
            assert whole.held_end == sum(one.held_end for one in reports)
            assert all(one.held_end > 0 for one in reports) and whole.padding_end >= 0
            if new == 0:
                assert sum(one.held_prompt for one in reports) + whole.padding == held
                assert rows > 1 or whole.padding == 0
            # no slot is counted that is not there
            for layer in cache.layers:
                store = getattr(layer.inner, "store", None)
                if store is not None and store.real is not None:
                    assert store.real == (store.pos >= 0).sum((1, 2)).tolist()


@pytest.mark.parametrize("n", [60, 300, 3000])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("full", "kvtuner", "kvtuner_per_token")])
def test_decoding_holds_no_more_than_its_tokens_and_an_eighth_for_more(case, n, one_layer):
    """Also where the budget leaves a handful of slots: a free place for each layer, or an eighth of what is held."""
    cache = read(one_layer, method_of(case, 60 if case.startswith("lococo") else 0.2), [n], new=0)
    before = nbytes(tensor for layer in cache.layers for tensor in layer.inner.tensors())
    later = prompt((n,), 3)[2]
    with torch.no_grad():
        for i in range(3):
            at = torch.tensor([[n + i]])
            one_layer(later[:, i : i + 1], position_ids=at, past_key_values=cache, use_cache=True)
    report = cache.report()
    store = getattr(cache.layers[0].inner, "store", None)
    buffers = store.buffers.values() if store is not None else ()
    place = sum(x[:, :, :1].nbytes for x in buffers) or 2 * 2 * 16 * 4 + 2 * 8
    held = before + 3 * place
    assert report.held_end + report.padding_end <= held + max(place, held // 8)


@pytest.mark.parametrize("case", ["nacl", "kivi, 4 bits", "adakv", "full"])
def test_rows_take_their_ledgers_along(case, gqa):
    cache = read(gqa, method_of(case, 0.5), LENGTHS)
    before = [own(one) for one in cache.reports()]
    rows = [3, 1, 1, 0, 2]
    cache.reorder_cache(torch.tensor(rows))
    assert [own(one) for one in cache.reports()] == [before[row] for row in rows]


@pytest.mark.parametrize("case", [case for case in CASES if case != RAGGED])  # there a number of slots is refused
def test_a_row_that_fits_holds_beside_one_that_drops_what_it_holds_alone(case, gqa):
    method = method_of(case, 60)  # slots: the rows of 35 tokens stay whole
    alone = {n: own(read(gqa, method, [n]).report()) for n in (90, 35)}
    assert [own(one) for one in read(gqa, method, (35, 90, 35)).reports()] == [alone[n] for n in (35, 90, 35)]
