"""A method that holds every slot and reads some: the ledger has what a row's steps were handed, however it is run."""

from __future__ import annotations

import pytest
import torch

from methods import load_method
from methods.core.errors import BudgetMiss, UserError
from runners.engine.shared_prefill import Group
from tests.bounds import near, run_off
from tests.methods.core.selecting.paged import Paged
from tests.tiny import feed, padded_prompt, tiny_model

N, NEW, PAGE, PAGES = 40, 3, 4, 2
LAYERS, HQ, D = 2, 4, 8
BYTES = ("read_step", "full_read", "read_turn", "moved_step", "moved_turn", "host", "held_prompt", "held_end", "asked")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def paged(**knobs) -> Paged:
    return Paged(**{"budget": 0.5, "page": PAGE, "pages": PAGES, **knobs})


def run(model, method, lengths=(N,), pieces=(N,), new: int = NEW, turn: int = 0, alone: int | None = None):
    """The cache, its logits, and its ledger by row after a prompt in pieces, a turn and so many decoded tokens.

    alone: only this row of the batch, without its padding.
    """
    more = turn + new
    ids, mask = padded_prompt([n + more for n in lengths])
    if alone is not None:
        ids = ids[alone : alone + 1, -lengths[alone] - more :]
        mask, pieces = torch.ones_like(ids), [lengths[alone]]
    T = ids.shape[1]
    cache = method.cache_for(model, prompt_len=T - more if len(pieces) > 1 else None)
    pieces = [*pieces, *([turn] if turn else []), *[1] * new]
    pieces[0] += T - sum(pieces)
    return cache, feed(model, cache, ids, mask, pieces), cache.reports()


def ledger(report) -> dict:
    return {name: getattr(report, name) for name in BYTES}


def slot(heads: int = 2, itemsize: int = 4) -> int:
    """Keys and values of a token in one layer."""
    return 2 * heads * D * itemsize


@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("llama-mha", 4), ("llama-mqa", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_bounds_and_the_chosen_pages_of_each_key_value_head(name, heads, dtype):
    model, size = tiny_model(name).to(dtype), dtype.itemsize
    _, _, (report,) = run(model, paged(per_group=True))
    # tokens 41 to 43 are the first three of page 10: eleven bounds, one whole page, and what there is of the current
    assert report.read_step == LAYERS * slot(heads, size) * (11 + PAGE + 2)
    assert report.full_read == LAYERS * slot(heads, size) * (N + 2)
    _, _, (each,) = run(model, paged())
    whole, most = report.read_step, LAYERS * slot(heads, size) * (11 + HQ // heads * PAGE + 2)
    assert whole <= each.read_step <= most and (each.read_step < most or heads == HQ)
    _, _, (full,) = run(model, load_method("full", budget=1))
    assert full.read_step == full.full_read == report.full_read and full.read_share == 1


@pytest.mark.parametrize("turn", [0, 5])
@pytest.mark.parametrize("per_group", [True, False])
def test_a_row_reads_the_same_in_every_batch_and_however_its_prompt_is_cut(llama, per_group, turn):
    method, lengths = paged(per_group=per_group, on_host=True), (40, 23, 31, 40)
    alone = [ledger(run(llama, method, lengths, turn=turn, alone=row)[2][0]) for row in range(4)]
    for pieces in ((N,), (15, 1, 24)):
        cache, _, rows = run(llama, method, lengths, pieces, turn=turn)
        assert [ledger(one) for one in rows] == alone
        whole = cache.report()
        assert whole.read_step == sum(one.read_step for one in rows)
        assert whole.read_turn == sum(one.read_turn for one in rows)
        assert whole.host == sum(one.host for one in rows) and whole.moved_step == sum(one.moved_step for one in rows)


def test_single_and_shared_runs_generate_forks_and_reordered_rows_read_the_same(llama):
    ids, _ = padded_prompt([N, N, N])
    methods = [paged(), load_method("snapkv", budget=0.5, window=4), paged(per_group=True), paged(pages=4)]
    token = ids[:, :1]
    with torch.inference_mode():
        group, _ = Group.begin(llama, methods, [0, 1, 2], lambda s: s.run(ids, ends_prompt=True))
        together = [group.run(token) for _ in range(2)][-1]
    for i, method in enumerate(methods):
        cache = method.cache_for(llama)
        with torch.inference_mode():
            llama(ids, past_key_values=cache, use_cache=True)
            fork = cache.fork()
            for one in (cache, fork):
                for _ in range(2):
                    logits = llama(token, past_key_values=one, use_cache=True).logits[:, -1]
        near(together[3 * i : 3 * i + 3], logits, run_off())
        expected = [ledger(one) for one in cache.reports()]
        assert [ledger(one) for one in group.members[i].cache.reports()] == expected
        assert [ledger(one) for one in fork.reports()] == expected
        fork.reorder_cache(torch.tensor([2, 0, 0]))
        assert [ledger(one) for one in fork.reports()] == [expected[row] for row in (2, 0, 0)]
        assert [one.read_step for one in cache.reports([1, 0, 0])][1:] == [one["read_step"] for one in expected[1:]]
    cache = methods[0].cache_for(llama)
    new = llama.generate(ids[:1], past_key_values=cache, max_new_tokens=3, do_sample=False)[:, N:]
    by_hand = methods[0].cache_for(llama)
    feed(llama, by_hand, torch.cat((ids[:1], new[:, :2]), dim=1), torch.ones(1, N + 2), [N, 1, 1])
    assert ledger(cache.report()) == ledger(by_hand.report())


def test_steps_behind_a_rows_own_end_are_not_its_reads(llama):
    method = paged(per_group=True)
    cache, _, _ = run(llama, method, (N, N), new=5)
    _, _, (short,) = run(llama, method, new=2)
    assert cache.reports([0, 3])[1].read_step == short.read_step


@pytest.mark.parametrize("knobs", [{"per_group": True}, {}, {"dense_layers": 1}])
def test_a_turn_by_token_reads_and_answers_as_its_tokens_one_at_a_time(llama, knobs):
    T = 6
    for lengths in ((N,), (N, 29)):
        ids, mask = padded_prompt([n + T for n in lengths])
        one, each = (paged(**knobs).cache_for(llama) for _ in range(2))
        turn = feed(llama, one, ids, mask, [ids.shape[1] - T, T])
        token = feed(llama, each, ids, mask, [ids.shape[1] - T, *[1] * T])
        near(turn[:, -T:], token[:, -T:], run_off())
        for a, b in zip(one.reports(), each.reports()):
            assert abs(a.read_turn - T * b.read_step) <= T and a.full == b.full and b.read_turn == 0
            # nothing was decoded, and the turn's tokens were as good as that
            assert (a.read_step, a.full_read, a.asked) == (b.read_step, b.full_read, b.asked)


def test_a_turn_that_shares_its_pick_reads_it_once_and_a_dense_one_everything(llama):
    T = 5
    reports = {turn: run(llama, paged(turn=turn, per_group=True), new=0, turn=T)[2][0] for turn in ("shared", "dense")}
    assert reports["dense"].read_turn == LAYERS * slot() * (N + T)
    # twelve bounds, pages 11 (the turn's last token alone) and another, and what of the turn is in neither
    assert LAYERS * slot() * (12 + PAGE + T - 3) <= reports["shared"].read_turn <= LAYERS * slot() * (12 + PAGE + T)
    _, dense, _ = run(llama, paged(turn="dense"), new=0, turn=T)
    _, full, _ = run(llama, load_method("full", budget=1), new=0, turn=T)
    near(dense, full, run_off())
    _, exact, (all_pages,) = run(llama, paged(turn="shared", pages=99), new=0, turn=T)
    near(exact, full, run_off())
    assert all_pages.read_turn == LAYERS * slot() * (N + T + 12)


def test_a_read_budget_is_checked_by_what_is_read_and_not_by_what_is_held(llama):
    cache, _, (report,) = run(llama, paged(budget=0.5, per_group=True))
    assert report.binds == "read" and report.asked == report.full_read // 2 and report.held_prompt > report.full_prompt
    cache.check_budget()
    cache, _, (report,) = run(llama, paged(budget=0.25, per_group=True))
    assert report.read_step > report.asked
    with pytest.raises(BudgetMiss, match="are read by a step"):
        cache.check_budget()
    cache, _, _ = run(llama, paged(budget=0.25), new=0)  # nothing has been read yet
    cache.check_budget()
    assert paged(budget=0.25).planned_share(1000, None) == 1.0


def test_dense_layers_read_everything_and_a_sliding_layer_its_window(llama):
    _, _, (report,) = run(llama, paged(per_group=True, dense_layers=1))
    assert report.read_step == slot() * (N + 2) + slot() * (11 + PAGE + 2)
    _, _, (report,) = run(tiny_model("gemma3"), paged(per_group=True), new=9)
    head = 2 * 2 * 16 * 4
    _, _, (full,) = run(tiny_model("gemma3"), load_method("full", budget=1), new=9)
    assert full.read_step == full.full_read == head * (12 + N + 5)
    assert head * (12 + 10 + PAGE + 1) < report.read_step < head * (12 + 13 + 2 * PAGE)


def test_what_lies_on_the_host_and_what_crosses_over_is_metered_without_a_device(llama):
    _, _, (report,) = run(llama, paged(on_host=True, per_group=True))
    assert report.host == LAYERS * slot() // 2 * (N + NEW) and report.moved_step == LAYERS * slot() // 2 * (PAGE + 2)
    assert "on the host" in str(report) and "moved by a step" in str(report)
    _, _, (report,) = run(llama, paged(per_group=True))
    assert report.host == report.moved_step == 0


@pytest.mark.parametrize("knobs", [{"turn": "never"}, {"dense_layers": -1}, {"dense_layers": True}])
def test_a_knob_that_cannot_be_is_refused_by_name(knobs):
    with pytest.raises(UserError, match=f"method.{next(iter(knobs))}="):
        paged(**knobs)


def test_bounds_are_those_of_the_pages_and_before_a_step_all_that_is_held_would_be_read(llama):
    cache, _, (report,) = run(llama, paged(), new=0)
    layer = cache.layers[0].inner
    k = layer.store.k[0].view(2, N // PAGE, PAGE, D)
    assert torch.equal(layer.low[0], k.amin(2)) and torch.equal(layer.high[0], k.amax(2))
    assert report.read_turn == 0 and report.full_read == 0 and report.read_step == report.held_end


@pytest.mark.parametrize("name", ["llama", "mpt", "gpt2", "gemma2", "llama-mqa"])
def test_all_pages_are_the_full_cache_whatever_turns_keys_and_caps_logits(name):
    model = tiny_model(name)
    _, full, rows = run(model, load_method("full", budget=1), (N, 29), turn=5)
    for turn, per_group in (("per_token", False), ("shared", False), ("shared", True)):
        _, logits, ours = run(model, paged(pages=99, turn=turn, per_group=per_group), (N, 29), turn=5)
        near(logits[:, -8:], full[:, -8:], run_off(full))
        for one, whole in zip(ours, rows):  # everything and its bounds; one layer of gemma2 slides and has none
            assert one.full_read == whole.full_read == whole.read_step < one.read_step < 1.4 * whole.read_step


def test_beams_read_what_their_own_row_picks_and_a_second_compressed_prompt_begins_anew(llama):
    ids, _ = padded_prompt([N])
    cache = paged().cache_for(llama)
    out = llama.generate(
        ids, past_key_values=cache, max_new_tokens=4, num_beams=3, do_sample=False, early_stopping=True
    )
    rows = cache.reports()
    assert len(rows) == 3 and out.shape[1] == N + 4
    bounds, least, most = 11, PAGE + 2, HQ // 2 * PAGE + 2
    for one in rows:
        assert LAYERS * slot() * (bounds + least) <= one.read_step <= LAYERS * slot() * (bounds + most)
    ids, mask = padded_prompt([N + 20 + 2, N + 13 + 2])
    method = paged(per_group=True, turn="dense")  # so that the turn leaves what a prompt would
    cache = method.cache_for(llama)
    feed(llama, cache, ids[:, :N], mask[:, :N], [N - 6, 6])
    assert all(one.read_turn for one in cache.reports())
    cache.compress_next()
    logits = feed(llama, cache, ids, mask, [20, 1, 1], start=N)
    again = cache.reports()
    assert [one.read_turn for one in again] == [0, 0] and again[0].asked == again[0].full_read // 2
    one = method.cache_for(llama)
    whole = feed(llama, one, ids, mask, [N + 20, 1, 1])
    near(logits[:, -2:], whole[:, -2:], run_off())
    assert [ledger(x) for x in again] == [ledger(x) for x in one.reports()]


def test_hundreds_of_steps_are_one_mean_and_no_step_waits(llama):
    model = tiny_model("llama", max_position_embeddings=512)
    _, _, (report,) = run(model, paged(per_group=True), new=300)
    n = range(N + 1, N + 301)
    expected = [-(-t // PAGE) + PAGE + (t - 1) % PAGE + 1 for t in n]
    assert report.read_step == round(LAYERS * slot() * sum(expected) / 300)
    assert report.full_read == round(LAYERS * slot() * sum(n) / 300)
