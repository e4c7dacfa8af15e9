"""StreamingLLM against the cases worked by hand, and its rolled positions against an independent computation."""

import pytest
import torch

from methods import load_method
from methods.core.errors import UserError
from tests.bounds import bound, near, run_off
from tests.methods.conftest import kept, run, tiny_llama
from tests.tiny import feed, padded_prompt


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (1, n), generator=torch.Generator().manual_seed(seed))


def test_hand_worked_window_moves_one_token_per_step(gqa):
    ids, new = tokens(10), tokens(2, seed=2)
    method = load_method("streaming_llm", budget=7)  # 4 sinks and 3 recent
    cache = method.cache_for(gqa)
    run(gqa, cache, ids)
    assert kept(cache, 1) == [0, 1, 2, 3, 7, 8, 9]
    cache = method.cache_for(gqa)
    run(gqa, cache, ids, new=new[:, :1])
    assert kept(cache, 1) == [0, 1, 2, 3, 8, 9, 10]


def test_the_cache_does_not_grow_while_decoding(gqa):
    cache = load_method("streaming_llm", budget=20).cache_for(gqa)
    run(gqa, cache, tokens(50), new=tokens(3, seed=2))
    before = cache.report().held_end
    with torch.no_grad():
        for i in range(40):
            gqa(tokens(1, seed=i), past_key_values=cache, use_cache=True)
    assert cache.report().held_end == before
    assert kept(cache, 1) == [0, 1, 2, 3, *range(77, 93)]


def test_dialogue_makes_room_before_the_turn_is_read(gqa):
    cache = load_method("streaming_llm", budget=10, dialogue=True).cache_for(gqa)
    run(gqa, cache, tokens(10))
    layer = cache.layers[1].inner
    seen = []
    append = layer.append
    layer.append = lambda step: (append(step), seen.extend(kept(cache, 1)))
    with torch.no_grad():
        gqa(tokens(3, seed=2), past_key_values=cache, use_cache=True)
    assert seen == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert kept(cache, 1) == seen


def test_a_long_turn_of_a_dialogue_leaves_the_sinks_and_the_newest_token(gqa):
    cache = load_method("streaming_llm", budget=10, dialogue=True).cache_for(gqa)
    run(gqa, cache, tokens(12))
    layer, seen = cache.layers[1].inner, []
    append = layer.append
    layer.append = lambda step: (append(step), seen.extend(kept(cache, 1)))
    with torch.no_grad():
        gqa(tokens(30, seed=2), past_key_values=cache, use_cache=True)
    assert seen == [0, 1, 2, 3, 11, *range(12, 42)]
    assert kept(cache, 1) == [0, 1, 2, 3, *range(36, 42)]


def test_a_short_prompt_grows_to_the_number_of_slots_and_no_further(gqa):
    ids, new = tokens(5), tokens(12, seed=2)
    method = load_method("streaming_llm", budget=9)
    cache = method.cache_for(gqa)
    actual = run(gqa, cache, ids, new=new)
    assert kept(cache, 1) == [0, 1, 2, 3, 12, 13, 14, 15, 16]
    expected = run(gqa, load_method("full").cache_for(gqa), ids, new=new)
    # tokens 0 to 9 attend to all before them; token 10 is the first that has lost one
    assert torch.equal(actual[:, :6], expected[:, :6])
    assert (actual[:, 6] - expected[:, 6]).abs().max() > run_off()


def test_rows_that_fill_up_at_different_times_keep_their_own(gqa):
    ids, new = torch.cat((tokens(12), tokens(12, seed=3))), torch.cat((tokens(8, seed=2),) * 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    method = load_method("streaming_llm", budget=9)
    batch = method.cache_for(gqa)
    actual = run(gqa, batch, ids, new=new, mask=mask)
    alone = method.cache_for(gqa)
    expected = run(gqa, alone, ids[1:, 7:], new=new[1:])
    assert kept(batch, 1, 1) == kept(alone, 1)
    near(actual[1], expected[0], run_off(expected[0]))


def test_rows_of_a_padded_turn_keep_their_own(gqa):
    ids, turn, new = torch.cat((tokens(9), tokens(9, seed=3))), torch.cat((tokens(4, seed=4),) * 2), tokens(8, seed=2)
    method = load_method("streaming_llm", budget=12)
    batch, alone = method.cache_for(gqa), method.cache_for(gqa)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:12] = 0  # the second row's turn is one token
    positions = torch.tensor([[9, 10, 11, 12], [0, 0, 0, 9]])
    with torch.no_grad():
        run(gqa, batch, ids)
        gqa(turn, attention_mask=mask, position_ids=positions, past_key_values=batch, use_cache=True)
        run(gqa, alone, ids[1:], new=turn[1:, 3:])
        for i in range(new.shape[1]):
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
            at = mask.sum(-1, keepdim=True) - 1
            one = {"attention_mask": mask, "position_ids": at, "past_key_values": batch, "use_cache": True}
            both = gqa(new[:, i : i + 1].expand(2, -1), **one).logits
            own = gqa(new[:, i : i + 1], position_ids=at[1:], past_key_values=alone, use_cache=True).logits
            assert kept(batch, 1, 1) == kept(alone, 1)
            near(both[1], own[0], run_off(own[0]))


def test_rolled_positions_equal_a_forward_over_the_kept_tokens_alone():
    # in a model of one layer keys and values depend on the token alone, so dropping equals never having read
    model = tiny_llama(4, 2, n_layers=1)
    ids, new = tokens(40), tokens(5, seed=2)
    cache = load_method("streaming_llm", budget=12).cache_for(model)
    actual = run(model, cache, ids, new=new)
    stream = torch.cat((ids, new), dim=1)
    for i in range(5):
        # 4 sinks, 8 recent, the new token itself, numbered from 0
        seen = torch.cat((stream[:, :4], stream[:, 40 + i - 8 : 40 + i + 1]), dim=1)
        expected = run(model, load_method("full").cache_for(model), seen)
        near(actual[:, 1 + i], expected[:, -1], run_off(expected[:, -1]))


def test_sinks_that_come_after_a_tiny_prompt_are_rolled_too():
    model = tiny_llama(4, 2, n_layers=1)
    ids, new = tokens(2), tokens(20, seed=2)
    actual = run(model, load_method("streaming_llm", budget=8).cache_for(model), ids, new=new)
    stream = torch.cat((ids, new), dim=1)
    seen = torch.cat((stream[:, :4], stream[:, -5:]), dim=1)
    expected = run(model, load_method("full").cache_for(model), seen)
    near(actual[:, -1], expected[:, -1], run_off(expected[:, -1]))


def test_original_positions_keep_the_distance_to_the_sinks():
    model = tiny_llama(4, 2, n_layers=1)
    ids, new = tokens(40), tokens(2, seed=2)
    rolled, original = (
        run(model, load_method("streaming_llm", budget=12, positions=p).cache_for(model), ids, new=new)
        for p in ("rolled", "original")
    )
    assert torch.equal(rolled[:, 0], original[:, 0])
    assert (rolled[:, 1:] - original[:, 1:]).abs().max() > run_off()


@pytest.mark.parametrize("positions", ["rolled", "original"])
def test_a_streaming_prompt_equals_feeding_it_token_by_token(positions, gqa):
    ids = tokens(40)
    whole = load_method("streaming_llm", budget=12, positions=positions, prefill="streaming")
    stepwise = load_method("streaming_llm", budget=12, positions=positions)
    # a first prompt of exactly 13 tokens: nothing has been missed when the first token goes
    expected = run(gqa, stepwise.cache_for(gqa), ids[:, :13], new=ids[:, 13:])
    cache = whole.cache_for(gqa)
    actual = run(gqa, cache, ids)
    near(actual[:, -1], expected[:, -1], run_off(expected[:, -1]))
    assert kept(cache, 1) == [0, 1, 2, 3, *range(32, 40)]
    parts = run(gqa, whole.cache_for(gqa, prompt_len=40), ids, chunks=[7, 20, 13])
    near(parts[:, -1], expected[:, -1], run_off(expected[:, -1]))


def test_without_sinks_it_is_a_plain_window(gqa):
    cache = load_method("streaming_llm", budget=6, sinks=0).cache_for(gqa)
    run(gqa, cache, tokens(20), new=tokens(2, seed=2))
    assert kept(cache, 1) == list(range(16, 22))


def test_rotating_there_and_back_gives_the_key_and_rotating_adds_up(gqa):
    from methods.core.bind import bind

    rope = bind(gqa).ropes[0]
    k = torch.randn(2, 3, 16)
    there = rope.rotate(k, torch.full((2, 3), 1000))
    # an angle of a thousand has a thousandth of a sine's digits
    off = 4 * bound(torch.float32, 2, size=2 * 1000 * k.abs().max().item())
    near(rope.rotate(there, torch.full((2, 3), -1000)), k, off)
    twice, once = (
        rope.rotate(rope.rotate(k, torch.full((2, 3), 7)), torch.full((2, 3), 5)),
        rope.rotate(k, torch.full((2, 3), 12)),
    )
    near(twice, once, off)


def test_rolled_positions_work_with_alibi_and_refuse_learned_positions():
    from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM

    torch.manual_seed(0)
    mpt = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=97, max_seq_len=64)).eval()
    ids, new = tokens(40), tokens(3, seed=2)
    actual = run(mpt, load_method("streaming_llm", budget=12).cache_for(mpt), ids, new=new)
    stream = torch.cat((ids, new), dim=1)
    for i in range(3):
        seen = torch.cat((stream[:, :4], stream[:, 40 + i - 8 : 40 + i + 1]), dim=1)
        expected = run(mpt, load_method("full").cache_for(mpt), seen)
        near(actual[:, 1 + i], expected[:, -1], run_off(expected[:, -1]))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=97)).eval()
    with pytest.raises(UserError, match="positions=original"):
        load_method("streaming_llm").cache_for(gpt2)


@pytest.mark.parametrize("knobs", [{"sinks": -1}, {"budget": 4}, {"positions": "mine"}, {"prefill": "half"}])
def test_settings_that_cannot_work_are_named(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        load_method("streaming_llm", **knobs)


@pytest.mark.parametrize("lengths", [[2, 60, 30], [1, 2, 40], [3, 3]])
def test_prompts_shorter_than_the_sinks_go_on_as_if_alone(lengths, gqa):
    # their later sinks come while other rows already drop
    ids, mask = padded_prompt(lengths)
    new = torch.randint(1, 97, (len(lengths), 8), generator=torch.Generator().manual_seed(0))
    method = load_method("streaming_llm", budget=0.05)
    together = run(gqa, method.cache_for(gqa), ids, mask=mask, new=new)
    for row, n in enumerate(lengths):
        alone = run(gqa, method.cache_for(gqa), ids[row : row + 1, -n:], new=new[row : row + 1])
        near(together[row], alone[0], run_off(alone[0]))


def test_a_row_whose_padding_comes_before_its_first_drop_keeps_its_sinks(gqa):
    ids, new = tokens(15), tokens(10, seed=2)
    method = load_method("streaming_llm", budget=20)
    padded, mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1), torch.ones(1, 18, dtype=torch.long)
    mask[:, :3] = 0
    behind, alone = method.cache_for(gqa), method.cache_for(gqa)
    actual = run(gqa, behind, padded, new=new, mask=mask)
    expected = run(gqa, alone, ids, new=new)
    assert kept(behind, 1) == kept(alone, 1)
    near(actual, expected, run_off(expected))


def test_at_a_later_prompts_end_the_sinks_are_turned_from_where_the_model_left_them():
    # one layer, as above: dropping equals never having read
    model, stream = tiny_llama(4, 2, n_layers=1), tokens(45)
    mask = torch.ones_like(stream)
    cache = load_method("streaming_llm", budget=12).cache_for(model)
    feed(model, cache, stream[:, :33], mask[:, :33], [30, 1, 1, 1])
    cache.compress_next()
    actual = feed(model, cache, stream, mask, [7, 1, 1, 1, 1, 1], start=33)[:, -1]
    seen = torch.cat((stream[:, :4], stream[:, -9:]), dim=1)
    expected = run(model, load_method("full").cache_for(model), seen)[:, -1]
    near(actual, expected, run_off(expected))


def test_after_a_later_prompts_end_the_cache_grows_from_what_it_holds(gqa):
    stream = tokens(90)
    mask = torch.ones_like(stream)
    sets = []
    for method in (load_method("streaming_llm", budget=0.5, sinks=0), load_method("window", budget=0.5)):
        cache = method.cache_for(gqa)
        feed(gqa, cache, stream[:, :70], mask[:, :70], [40, *[1] * 30])  # 20 of 70 are held
        cache.compress_next()
        feed(gqa, cache, stream[:, :84], mask[:, :84], [4, *[1] * 10], start=70)
        sets.append(kept(cache, 1))
    assert sets[0] == sets[1] == [*range(50, 84)]
