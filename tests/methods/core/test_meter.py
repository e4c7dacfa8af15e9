"""The ledger counts what is really alive, and a method that holds more than it was asked for is caught."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from methods import load_method
from methods.core.errors import BudgetMiss
from methods.core.meter import nbytes
from methods.core.store import Store, spare
from tests.tiny import WINDOW, feed, padded_prompt, tiny_model

N = 40
SLOTS = 20  # at budget 0.5
LAYERS, H, D = 2, 2, 8  # of the tiny llama
KV = 2 * D * 4  # keys and values of a slot in float32


def after_prompt(model, method, rows: int = 1, pieces: tuple[int, ...] = (N,), new: int = 0):
    """The cache after a prompt of N tokens in these pieces and so many decoded tokens."""
    ids, mask = padded_prompt([N + new] * rows)
    cache = method.cache_for(model, prompt_len=N if len(pieces) > 1 else None)
    feed(model, cache, ids, mask, [*pieces, *[1] * new])
    return cache


def snapkv(**knobs):
    return load_method("snapkv", **{"budget": 0.5, "window": 4, "kernel": 3, **knobs})


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def test_a_small_view_counts_the_whole_buffer_that_it_keeps_alive():
    buffer = torch.zeros(1000)
    assert nbytes([buffer[:3]]) == 4000
    assert nbytes([buffer[3:7].view(2, 2).T]) == 4000


def test_a_storage_is_counted_once_however_many_tensors_share_it():
    buffer, other = torch.zeros(1000), torch.zeros(10, dtype=torch.int8)
    assert nbytes([buffer[:3], buffer[500:], buffer, other]) == 4010
    assert nbytes([]) == 0
    assert nbytes([torch.empty(0), torch.empty(0), other]) == 10


@pytest.mark.parametrize("pieces", [(N,), (15, 1, 24)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_at_the_end_of_the_prompt_are_the_formula(dtype, rows, pieces):
    model = tiny_model("llama").to(dtype)
    report = after_prompt(model, snapkv(), rows, pieces).report()
    itemsize = dtype.itemsize
    assert report.held_prompt == LAYERS * rows * H * SLOTS * (2 * D * itemsize + 4)
    assert report.per_layer == [report.held_prompt // LAYERS] * LAYERS
    assert report.full_prompt == LAYERS * rows * H * N * 2 * D * itemsize
    assert report.asked == report.full_prompt // 2
    assert report.overhead == LAYERS * rows * H * SLOTS * 4
    assert report.share == report.held_prompt / report.full_prompt
    assert report.to_dict()["share"] == report.share


@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("llama-mha", 4), ("llama-mqa", 1), ("falcon-gqa", 2)])
def test_the_denominator_counts_key_value_heads_and_not_query_heads(name, heads):
    report = after_prompt(tiny_model(name), load_method("full", budget=1)).report()
    assert report.full_prompt == LAYERS * heads * N * KV


def test_the_full_cache_holds_its_denominator_and_one_position_per_token(llama):
    report = after_prompt(llama, load_method("full", budget=1), rows=3).report()
    assert report.full_prompt == LAYERS * 3 * H * N * KV
    assert report.held_prompt - report.full_prompt == LAYERS * 3 * N * 4


@pytest.mark.parametrize("new", [0, 9])
def test_a_sliding_layer_counts_as_what_its_window_leaves(new):
    model = tiny_model("gemma3")  # one sliding and one full layer, heads 16 wide
    report = after_prompt(model, load_method("full", budget=1), new=new).report()
    assert report.full_prompt == H * 2 * 16 * 4 * (WINDOW - 1 + N)
    assert report.full == H * 2 * 16 * 4 * (WINDOW - 1 + N + new)
    assert report.per_layer[0] == (H * 2 * 16 * 4 + 4) * (WINDOW - 1)


def test_a_sliding_layer_stays_small_while_decoding_and_reads_no_more_than_it_holds():
    model = tiny_model("mistral", max_position_embeddings=512)
    cache = after_prompt(model, load_method("full", budget=1), new=50)
    report = cache.report()
    assert max(len(layer.inner.store) for layer in cache.layers) < WINDOW + spare(WINDOW)
    assert report.held_end == LAYERS * (H * KV + 4) * (WINDOW - 1)
    assert report.padding_end <= LAYERS * (H * KV + 4) * 2 * spare(WINDOW)
    assert report.full == LAYERS * H * KV * (WINDOW - 1)


def test_later_tokens_count_in_the_end_and_not_at_the_prompt(llama):
    new = 5
    report = after_prompt(llama, snapkv(), new=new).report()
    assert report.held_prompt == LAYERS * H * SLOTS * (KV + 4)
    assert report.held_end == LAYERS * H * (SLOTS + new) * (KV + 4)
    assert report.padding_end == LAYERS * H * (KV + 4)  # 20 slots, then two more and a free place twice, then three
    assert report.full == LAYERS * H * (N + new) * KV
    assert report.full_prompt == LAYERS * H * N * KV
    assert report.read_step == LAYERS * H * (SLOTS + 3) * KV  # of 21 to 25 slots the mean, keys and values alone
    assert report.full_read == LAYERS * H * (N + 3) * KV


def test_the_prompts_peak_is_the_last_layer_in_full_beside_the_others_cut(llama):
    report = after_prompt(llama, snapkv()).report()
    full, cut = H * N * KV + N * 4, H * SLOTS * (KV + 4)
    assert report.peak_prompt == (LAYERS - 1) * cut + full
    assert report.peak_decode == 0


def test_a_prompt_in_pieces_peaks_with_all_layers_in_full(llama):
    report = after_prompt(llama, snapkv(), pieces=(30, 10)).report()
    full = H * N * KV + N * 4
    assert report.peak_prompt == LAYERS * full + report.workspace


def test_a_later_turn_counts_in_the_peak_of_decoding(llama):
    ids, mask = padded_prompt([N + 200])
    cache = snapkv().cache_for(llama)
    feed(llama, cache, ids[:, : N + 70], mask[:, : N + 70], [N, 70])
    report = cache.report()
    assert report.peak_decode == report.held_end == LAYERS * H * (SLOTS + 70) * (KV + 4)
    assert report.peak_prompt < report.peak_decode


def test_queries_kept_for_scoring_are_workspace_and_not_cache(llama):
    report = after_prompt(llama, snapkv(), pieces=(30, 10)).report()
    # in every layer four heads, four queries, their positions: held between the pieces
    assert report.workspace == LAYERS * (4 * 4 * D * 4 + 4 * 4)
    assert report.held_prompt == LAYERS * H * SLOTS * (KV + 4)


def test_queries_held_between_decisions_are_workspace_of_all_layers_and_in_the_peak(llama):
    method = load_method("nacl", budget=0.5, decode_interval=8)
    report = after_prompt(llama, method, new=6).report()
    held = LAYERS * 6 * 4 * D * 4 + 6 * 4  # six queries of four heads, and positions that the layers share
    assert report.workspace == held
    assert report.peak_decode >= report.held_end + report.padding_end + held * 5 // 6
    most = after_prompt(llama, method, new=20).report().workspace
    assert 8 * LAYERS * 4 * D * 4 < most <= 8 * LAYERS * (4 * D * 4 + 4)


def test_side_arrays_are_held_and_documented(llama):
    class Marked(Store):
        def append(self, *args, **kwargs):
            super().append(*args, **kwargs)
            self.track("mark")

    cache = after_prompt(llama, replace(snapkv(), store=Marked))
    report = cache.report()
    assert report.held_prompt == LAYERS * H * SLOTS * (KV + 4 + 4)
    assert report.overhead == LAYERS * H * SLOTS * 8
    cache.check_budget()


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.8, 1.0, 7, 30])
@pytest.mark.parametrize("pieces", [(N,), (15, 25)])
def test_an_honest_method_meets_its_budget_at_every_moment(budget, pieces, llama):
    for rows in (1, 3):
        for new in (0, 3):
            after_prompt(llama, snapkv(budget=budget), rows, pieces, new).check_budget()


class Views(Store):
    """Pretends to drop: what is left are views of the whole buffers."""

    def keep(self, mask, n, exact=False):
        self.buffers = {name: buffer[:, :, :n] for name, buffer in self.buffers.items()}
        self.buffers["pos"] = self.buffers["pos"].expand(-1, mask.shape[1], -1)
        self.n = n


class Masked(Store):
    """Pretends to drop: slots stay where they are, only hidden."""

    def keep(self, mask, n, exact=False):
        self.buffers["pos"] = self.pos.masked_fill(~mask, -1)
        self.padded = True


class Twice(Store):
    """Keeps a copy of everything on the side, and says so."""

    def keep(self, mask, n, exact=False):
        self.copy = self.k.clone()
        super().keep(mask, n, exact)

    def tensors(self):
        yield from super().tensors()
        if hasattr(self, "copy"):
            yield self.copy


@pytest.mark.parametrize(
    ("store", "held"),
    [
        (Views, LAYERS * (H * N * KV + N * 4)),
        (Masked, LAYERS * H * N * (KV + 4)),
        (Twice, LAYERS * H * (SLOTS * (KV + 4) + N * KV // 2)),
    ],
)
def test_a_method_that_does_not_free_what_it_drops_misses_its_budget(store, held, llama):
    cache = after_prompt(llama, replace(snapkv(), store=partial(store)))
    with pytest.raises(BudgetMiss) as miss:
        cache.check_budget()
    report = cache.report()
    assert miss.value.measured == report.held_prompt == held
    assert miss.value.asked == report.asked + report.overhead < held
    assert f"{held:,}" in str(miss.value) and f"{miss.value.asked:,}" in str(miss.value)
    assert "snapkv" in str(miss.value) and f"{held / report.full_prompt:.1%} of the full" in str(miss.value)


def test_nothing_is_on_the_host_when_the_model_is_there_itself(llama):
    assert after_prompt(llama, snapkv(), new=1).report().host == 0


def test_a_printed_report_is_a_table_that_80_columns_hold(llama):
    report = after_prompt(llama, snapkv()).report()
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80 and len(set(map(len, lines))) == 1
    held = next(line for line in lines if line.startswith("held, end of the prompt"))
    assert held.split()[-2:] == [f"{report.held_prompt:,}", f"{report.share:.1%}"]
    assert not any(line.startswith("bits") for line in lines)
    coded = str(after_prompt(llama, load_method("per_token")).report())
    assert "bits per number, as codes" in coded
