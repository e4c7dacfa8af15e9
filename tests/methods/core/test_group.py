"""Many caches filled by one prompt pass, then decoded as the rows of one batch, equal each cache run alone."""

import torch

from methods import load_method, method_names
from methods.core.cache import KVCache
from methods.core.contract import Stage
from methods.core.group import Rows, Shared
from tests.bounds import near, run_off
from tests.methods.conftest import kept, run
from tests.methods.layer import Spec, kept_after, step_of

NEW = 5


def test_one_prompt_pass_and_one_batch_equal_running_each_method_alone(gqa):
    g = torch.Generator().manual_seed(5)
    ids, new = (torch.randint(1, 97, (1, n), generator=g) for n in (80, NEW))
    methods = [load_method(name) for name in method_names()]
    methods = [method for method in methods if not method.changes_prompt]
    assert len(methods) >= 5

    leader = load_method("full").cache_for(gqa, prompt_len=80)
    followers = [method.cache_for(gqa, prompt_len=80) for method in methods]
    shared = load_method("full").cache_for(gqa, prompt_len=80)
    for i, layer in enumerate(shared.layers):
        layer.inner = Shared(leader.layers[i].inner, [cache.layers[i].inner for cache in followers])
    prompt = run(gqa, shared, ids, chunks=[30, 50])

    batch = load_method("full").cache_for(gqa, prompt_len=80, samples=[0] * len(methods))
    _continue_from(batch, 80, len(methods))
    for i, layer in enumerate(batch.layers):
        layer.inner = Rows([(row, row + 1, cache.layers[i].inner) for row, cache in enumerate(followers)])
    out = []
    for i in range(NEW):
        pos = torch.full((len(methods), 1), 80 + i)
        step = new[:, i : i + 1].expand(len(methods), -1)
        with torch.no_grad():
            out.append(gqa(step, position_ids=pos, past_key_values=batch, use_cache=True).logits)
    together = torch.cat(out, dim=1)  # [methods, NEW, V]

    for row, method in enumerate(methods):
        alone = method.cache_for(gqa)
        expected = run(gqa, alone, ids, new=new)
        assert [kept(followers[row], 1, 0, h) for h in range(2)] == [kept(alone, 1, 0, h) for h in range(2)]
        near(prompt[0, -1], expected[0, 0], run_off(expected[0, 0]))
        near(together[row], expected[0, 1:], run_off(expected[0, 1:]))


def test_every_part_of_a_batch_is_told_how_many_tokens_come_and_keeps_no_step():
    steps = [step_of(6), step_of(1, rows=2, stage=Stage.DECODE, start=6)]
    parts = [load_method("full").caches(Spec, None)[0] for _ in range(2)]
    for part in parts:
        kept_after(part, steps[0])
    rows = Rows([(0, 1, parts[0]), (1, 2, parts[1])])
    rows.expect(4)
    assert [part.store.to_come for part in parts] == [4, 4]
    rows.append(steps[1])
    rows.attend(steps[1])
    rows.end_step(steps[1])
    assert not rows.steps  # they would hold the pass's queries until the next one


def test_a_rows_statistics_are_its_own():
    step = step_of(6, rows=2)
    step.memo["mass"] = torch.zeros(2, 1, 6)
    assert not step.rows(slice(0, 1)).memo


def _continue_from(cache: KVCache, seen: int, rows: int) -> None:
    """Let a new cache stand where a prompt of `seen` tokens per row has ended."""
    cache._counts = torch.full((rows,), seen, dtype=torch.int32)
    for layer in cache.layers:
        layer.seen = seen
