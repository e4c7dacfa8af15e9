"""What every method in conf/method must do; a new YAML enrols itself."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from transformers import DynamicCache

from analysis.fidelity.numbers import Answer, Forced
from analysis.fidelity.panel import Sample, panel
from methods import BLOCKS, SHARED, load_method, method_yaml
from methods.core.bind import unbound
from methods.core.budget import check_budget, slots
from methods.core.capped import Capped
from methods.core.errors import UserError
from methods.core.eviction import Eviction
from methods.core.stores.codec import Codec
from methods.lococo import LoCoCo
from runners.engine.fidelity.places import apart
from tests.bounds import near, near_codes, run_off
from tests.methods.conftest import kept, run
from tests.methods.knobs import FIXED, SETS, knobs_of, others, read_by_piece
from tests.tiny import METHODS, SIZES, padded_prompt

NAMES = METHODS
OTHERS = others()
CASES = [*NAMES, *OTHERS]
LENGTH = 90
BUDGETS = [0.5, 60]


def budgeted(case: str, budget: float = 0.5, **knobs):
    """The case's method at this budget; the full cache has only one."""
    name, own = knobs_of(case)
    knobs = {**SIZES.get(name, {}), **own, **knobs}
    return load_method(name, **knobs) if name == "full" else load_method(name, budget=budget, **knobs)


def same(
    actual: torch.Tensor, expected: torch.Tensor, ours, theirs, method, n: int, row: int = 0, their_row: int = 0, **kw
) -> None:
    """Logits as near as rounding allows, and where there are codes, as near as it allows those."""
    if isinstance(method, Codec):
        near_codes(actual, expected, ours, theirs, n, row, their_row, **kw)
    else:
        near(actual, expected, run_off(expected))


def in_turns(values: list) -> list:
    """Every method with every value. Other knobs than the defaults meet one each, in turns; the other ones are slow."""
    return [
        pytest.param(case, value, marks=() if case in NAMES or (i - j) % len(values) == 0 else pytest.mark.slow)
        for i, case in enumerate(CASES)
        for j, value in enumerate(values)
    ]


def tokens(n: int = LENGTH, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def plain_knobs(config: dict, at: str = "") -> set[str]:
    """The knobs of a YAML as typed, those of its parts included."""
    found = set()
    for key, value in config.items():
        if key in ("_target_", "_partial_", *BLOCKS):
            continue
        found |= plain_knobs(value, f"{at}{key}.") if isinstance(value, dict) else {at + key}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_knob_departs_from_its_default_in_some_set(name):
    assert name in SETS, f"tests/methods/knobs.py lists no knobs of {name} that are not its defaults"
    config = OmegaConf.to_container(method_yaml(name))
    moved = {
        knob
        for knobs in SETS[name]
        for knob in plain_knobs(knobs)
        if OmegaConf.select(OmegaConf.create(knobs), knob) != OmegaConf.select(OmegaConf.create(config), knob)
    }
    # the tests below give every method two budgets and two seeds; what all methods take stands in none of their YAMLs
    moved = {knob for knob in moved if knob.partition(".")[0] not in SHARED}
    assert moved | {"budget", "seed"} | set(FIXED.get(name, {})) == plain_knobs(config)
    assert not moved & set(FIXED.get(name, {}))


def packs_anyway(case):
    """Whether bits or a table are given, which are then the request, whatever the budget."""
    return any(word in str(knobs_of(case)[1]) for word in ("bits", "table"))


def at_budget_one(case, model):
    """Logits of the case's method and of the full cache."""
    ids, new = tokens(), tokens(6, seed=2)
    method = budgeted(case, 1.0)
    return run(model, method.cache_for(model), ids, new=new), run(
        model, load_method("full").cache_for(model), ids, new=new
    )


@pytest.mark.parametrize("name", NAMES)
def test_budget_one_leaves_the_logits_alone(name, any_heads):
    actual, expected = at_budget_one(name, any_heads)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", [case for case in OTHERS if not packs_anyway(case)])
def test_budget_one_leaves_the_logits_alone_whatever_the_knobs(case, gqa):
    actual, expected = at_budget_one(case, gqa)
    near(actual, expected, run_off(expected))


# a memory with weights of this size has to be trained; lococo@3 has no other
@pytest.mark.parametrize(
    "case", [case for case in CASES if isinstance(budgeted(case), (Eviction, LoCoCo)) and case != "lococo@3"]
)
def test_a_number_of_slots_that_holds_every_token_drops_none(case, gqa):
    method = budgeted(case, 1000, **({"eta": 0} if case.startswith("lococo") else {}))
    ids, mask = padded_prompt([90, 61])
    new = tokens(6, rows=2, seed=2)
    cache = method.cache_for(gqa)
    actual = run(gqa, cache, ids, new=new, mask=mask)
    expected = run(gqa, load_method("full").cache_for(gqa), ids, new=new, mask=mask)
    if method.family != "mixed":
        near(actual, expected, run_off(expected))
    assert [kept(cache, 1, row) for row in (0, 1)] == [list(range(96)), list(range(67))]


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(budgeted(case), Eviction)])
def test_a_row_that_fits_keeps_every_token_while_another_drops(case, gqa):
    ids, mask = padded_prompt([90, 61])
    cache = budgeted(case, 70).cache_for(gqa)
    run(gqa, cache, ids, mask=mask)
    assert [kept(cache, 1, 1, head) for head in range(2)] == [list(range(61))] * 2
    assert case == "full" or len(kept(cache, 1, 0, 0)) < 90


def any_chunking_is_the_same(case, chunks, model):
    ids, new = tokens(), tokens(4, seed=2)
    method = budgeted(case)
    whole, parts = method.cache_for(model), method.cache_for(model, prompt_len=LENGTH)
    expected = run(model, whole, ids, new=new)
    actual = run(model, parts, ids, chunks=chunks, new=new)
    assert [kept(whole, 1, 0, h) for h in range(2)] == [kept(parts, 1, 0, h) for h in range(2)]
    same(actual, expected, parts, whole, method, LENGTH, before=1)


@pytest.mark.parametrize("case", [case for case in OTHERS if not read_by_piece(case)])
def test_any_chunking_gives_the_same_cache_whatever_the_knobs(case, gqa):
    any_chunking_is_the_same(case, [40] + [5] * 10, gqa)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", [[30, 30, 30], [1, 50, 39], [89, 1], [40] + [5] * 10])
def test_any_chunking_of_the_prompt_gives_the_same_cache(name, chunks, gqa):
    any_chunking_is_the_same(name, chunks, gqa)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_measured_bytes_meet_the_request(name, budget, any_heads):
    method = budgeted(name, budget)
    cache = method.cache_for(any_heads)
    run(any_heads, cache, tokens(), new=tokens(3, seed=2))
    cache.check_budget()
    report = cache.report()
    allowed = 1 if name == "full" else slots(budget, LENGTH) / LENGTH
    assert report.held_prompt - report.overhead <= allowed * report.full_prompt
    # and the budget is used: a few slots may stay free where counts are cut; codecs have only a few sizes, and a cache
    # that drops many slots at once comes back to its budget while decoding
    least = method.slots(LENGTH) / LENGTH if isinstance(method, Capped) else allowed - 4 / LENGTH
    assert isinstance(method, Codec) or report.held_prompt >= least * report.full_prompt
    if name != "full":
        assert report.held_prompt < 0.75 * report.full_prompt


@pytest.mark.parametrize("case", OTHERS)
def test_measured_bytes_meet_the_request_whatever_the_knobs(case, gqa):
    cache = budgeted(case).cache_for(gqa)
    run(gqa, cache, tokens(), new=tokens(3, seed=2))
    cache.check_budget()
    report = cache.report()
    assert report.held_prompt - report.overhead <= max(0.5 * report.full_prompt, report.asked)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_padded_batch_do_not_affect_each_other(name, gqa):
    lengths, new = [90, 61, 75], tokens(5, rows=3, seed=2)
    ids = tokens(rows=3)
    mask = torch.tensor([[0] * (LENGTH - n) + [1] * n for n in lengths])
    method = budgeted(name)
    batch = method.cache_for(gqa, samples=[7, 8, 9])
    actual = run(gqa, batch, ids, new=new, mask=mask)
    for row, n in enumerate(lengths):
        alone = method.cache_for(gqa, samples=[7 + row])
        expected = run(gqa, alone, ids[row : row + 1, LENGTH - n :], new=new[row : row + 1])
        for layer, head in [(0, 0), (1, 1)]:
            assert kept(batch, layer, row, head) == kept(alone, layer, 0, head)
        same(actual[row], expected[0], batch, alone, method, n, row, before=1)


def left(n: int, width: int) -> list[int]:
    return [0] * (width - n) + [1] * n


def right(n: int, width: int) -> list[int]:
    return left(n, width)[::-1]


@pytest.mark.parametrize(("case", "side"), in_turns([left, right]))
def test_padding_decides_nothing_wherever_it_stands(case, side, gqa):
    # the prompt's, and that of a later turn whose rows have different lengths
    prompts, turns, width = [60, 90], [7, 3], 7
    ids, new = tokens(rows=2), tokens(width + 3, rows=2, seed=2)
    method = budgeted(case)
    mask = torch.tensor([side(n, LENGTH) for n in prompts])
    behind = torch.tensor([side(n, width) for n in turns])
    batch, alone = method.cache_for(gqa, samples=[7, 8]), [method.cache_for(gqa, samples=[7 + row]) for row in (0, 1)]

    def feed(cache, ids, mask):
        pos = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        own = {"attention_mask": mask, "position_ids": pos, "past_key_values": cache, "use_cache": True}
        return gqa(ids, **own).logits

    with torch.no_grad():
        passes = [(ids, mask), (new[:, :width], behind), *((new[:, i : i + 1], None) for i in range(width, width + 3))]
        seen = ids.new_zeros(2, 0)
        for piece, real in passes:
            real = torch.ones_like(piece) if real is None else real
            seen = torch.cat((seen, real), dim=1)
            together = feed(batch, piece, seen)
            for row, cache in enumerate(alone):
                at = real[row].nonzero().flatten()
                own = feed(cache, piece[row : row + 1, at], torch.ones(1, int(seen[row].sum()), dtype=torch.long))
                same(together[row, at], own[0], batch, cache, method, prompts[row], row)
                assert [kept(batch, i, row, i) for i in (0, 1)] == [kept(cache, i, 0, i) for i in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_later_turn_in_one_piece_equals_it_token_by_token_up_to_what_is_dropped_between(name, gqa):
    ids, turn = tokens(), tokens(6, seed=3)
    method = budgeted(name)
    one, many = method.cache_for(gqa), method.cache_for(gqa)
    run(gqa, one, ids)
    run(gqa, many, ids)
    with torch.no_grad():
        pos = torch.arange(LENGTH, LENGTH + 6)[None]
        together = gqa(turn, position_ids=pos, past_key_values=one, use_cache=True).logits[:, -1]
        for i in range(6):
            apart = gqa(turn[:, i : i + 1], position_ids=pos[:, i : i + 1], past_key_values=many, use_cache=True)
    assert one.get_seq_length() == many.get_seq_length() == LENGTH + 6
    if isinstance(method, Capped):  # what goes after one token is missed by the next
        assert len(kept(one, 1)) == len(kept(many, 1))
        return
    assert kept(one, 1) == kept(many, 1)
    # token by token, one token is dropped or packed before the next one attends
    if name != "streaming_llm" and not isinstance(method, Codec):
        near(together, apart.logits[:, -1], run_off(together))


@pytest.mark.parametrize("name", CASES)
def test_one_seed_one_output(name, gqa):
    method, ids = budgeted(name, seed=3), tokens()
    first, second = method.cache_for(gqa), method.cache_for(gqa)
    assert torch.equal(run(gqa, first, ids), run(gqa, second, ids))
    assert kept(first, 1) == kept(second, 1)


@pytest.mark.parametrize("name", NAMES)
def test_generate_beams_and_copies_work(name, gqa):
    ids = tokens()
    method = budgeted(name)
    greedy = gqa.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=method.cache_for(gqa))
    assert greedy.shape == (1, LENGTH + 5)
    beams = gqa.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, past_key_values=method.cache_for(gqa))
    assert beams.shape[1] <= LENGTH + 5
    cache = method.cache_for(gqa)
    run(gqa, cache, ids)
    twin = copy.deepcopy(cache)
    pos = torch.tensor([[LENGTH]])
    with torch.no_grad():
        a, b = (gqa(tokens(1), position_ids=pos, past_key_values=c, use_cache=True).logits for c in (cache, twin))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dropped_shows_in_the_next_logits(name, gqa):
    if name == "full":
        return
    ids, new = tokens(), tokens(3, seed=2)
    method = budgeted(name)
    small = run(gqa, method.cache_for(gqa), ids, new=new)
    full = run(gqa, load_method("full").cache_for(gqa), ids, new=new)
    if not method.changes_prompt:  # it attends in full, by the same call or by one that also sums the attention
        near(small[:, 0], full[:, 0], run_off(full))
    assert (small[:, 1] - full[:, 1]).abs().max() > 2 * run_off(full)
    assert not is_unread(small, full)


def is_unread(ours: torch.Tensor, full: torch.Tensor) -> bool:
    """Whether the fidelity panel says of logits [1, T, V] that the compressed cache was not what attention read."""
    places = apart(full[0], ours, full[0].argmax(-1))  # [5, 1, T]
    forced = Forced(tuple(places[0, 0].tolist()), (), (), counted=1, dnll=0.0)
    answer = Answer(tuple(full[0].argmax(-1).tolist()), "length")
    found = panel([Sample("a", "a", answer, answer, forced)], compressed=True, resamples=1)
    assert found is not None and found.faulty == 0
    return found.unread


def test_a_cache_that_drops_for_show_is_unread(gqa):
    ids, new = tokens(), tokens(3, seed=2)
    full = run(gqa, load_method("full").cache_for(gqa), ids, new=new)
    assert is_unread(run(gqa, load_method("full").cache_for(gqa), ids, new=new), full)


@pytest.mark.parametrize(("case", "order"), in_turns([[1, 0], [0, 0]]))
def test_rows_that_change_places_take_all_their_state_with_them(case, order, gqa):
    # rows of different lengths, so that every number that is kept per row differs
    ids, mask = padded_prompt([LENGTH, 41])
    new, rows = tokens(9, rows=2, seed=2), torch.tensor(order)
    method = budgeted(case)
    cache = method.cache_for(gqa, samples=[7, 8])
    run(gqa, cache, ids, new=new[:, :4], mask=mask)
    cache.reorder_cache(rows)
    straight = method.cache_for(gqa, samples=(rows + 7).tolist())
    run(gqa, straight, ids[rows], new=new[rows, :4], mask=mask[rows])
    with torch.no_grad():
        for i, width in ((4, 1), (5, 1), (6, 2), (8, 1)):  # a turn of two tokens among single ones
            pos = mask[rows].sum(-1, keepdim=True) + torch.arange(i, i + width)
            a, b = (
                gqa(new[:, i : i + width], position_ids=pos, past_key_values=one, use_cache=True).logits
                for one in (cache, straight)
            )
            for row in range(2):
                same(a[row], b[row], cache, straight, method, LENGTH, row, row)
    for row in range(2):
        assert [kept(cache, 1, row, h) for h in range(2)] == [kept(straight, 1, row, h) for h in range(2)]


def test_full_equals_the_stock_cache(gqa):
    ids, new = tokens(), tokens(4, seed=2)
    ours = run(gqa, load_method("full").cache_for(gqa), ids, new=new)
    with unbound(gqa) as stock:
        theirs = run(stock, DynamicCache(), ids, new=new)
    assert torch.equal(theirs[:, 0], ours[:, 0])  # the prompt is the same call
    # decoding reads every KV head once for its group, the stock call once per query head
    near(ours, theirs, run_off(theirs))


@pytest.mark.parametrize("budget", [0, -1, 1.5, 2.7, "half", float("nan"), True, None])
def test_a_budget_that_means_nothing_is_refused_by_name(budget):
    with pytest.raises(UserError, match="budget="):
        check_budget(budget)


def test_budgets_are_cut_to_whole_slots_without_float_noise():
    assert slots(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert slots(0.5, 9) == 4
    assert slots(512, 100) == 100
    assert check_budget(512) == 512 and check_budget(2.0) == 2


def test_unknown_names_list_the_right_ones():
    with pytest.raises(UserError, match="nacl"):
        load_method("nalc")
    with pytest.raises(UserError, match="window"):
        load_method("snapkv", windw=3)
