"""A cap on what is held while decoding: its size, its pace, what it does with the prompt, and what it refuses."""

import pytest
import torch

from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from methods.core.eviction import Eviction
from methods.full import Full
from runners.engine.shared_prefill import Group
from tests.methods.conftest import kept, run
from tests.methods.layer import Spec, step_of
from tests.tiny import METHODS, SIZES, padded_prompt

PROMPT, K = 200, 512
REFUSE = ("streaming_llm", "qfilters")  # by name, see below
CAPPED = [
    name
    for name in METHODS
    if isinstance(one := load_method(name), Eviction)
    and not isinstance(one, Full)
    and one.family != "mixed"
    and name not in REFUSE
]


def capped(name: str, cap: int, **decode):
    return load_method(name, **{**SIZES.get(name, {}), "budget": 1, "decode": {"cap": cap, **decode}})


def held_by_step(method: Eviction, steps: int, prompt: int = PROMPT) -> list[int]:
    """Slots of a head after each step that follows a prompt."""
    (layer,) = method.caches(Spec(), None)
    sizes = []
    for i in range(steps + 1):
        step = step_of(prompt, dim=2) if i == 0 else step_of(1, dim=2, stage=Stage.DECODE, start=prompt + i - 1)
        layer.append(step)
        layer.end_step(step)
        sizes.append(int((layer.store.pos >= 0).sum(-1).max()))
    return sizes[1:]


@pytest.mark.parametrize(("name", "every"), [("random", {}), ("recency", {"every": 128})])
def test_the_worked_price_of_a_cap_in_slots(name, every):
    sizes = held_by_step(capped(name, K, **every), 1500)
    assert (sum(sizes[:1000]), sum(sizes)) == (505_300, 793_302)


def test_a_method_with_a_rule_per_token_keeps_it_until_an_interval_is_typed():
    assert max(held_by_step(capped("recency", 30), 40, prompt=20)) == 30
    sizes = held_by_step(capped("recency", 30, every=5), 40, prompt=20)
    assert (max(sizes), sizes[13:20]) == (34, [34, 30, 31, 32, 33, 34, 30])


def test_a_prompt_may_count_stay_beside_or_go():
    last = {prompt: held_by_step(capped("random", 30, every=5, prompt=prompt), 40, prompt=20)
            for prompt in ("protected", "protected_free", "open")}  # fmt: skip
    assert [max(sizes) for sizes in last.values()] == [34, 54, 34]
    assert max(held_by_step(capped("random", 10, every=5, prompt="open"), 9, prompt=20)) == 14


@pytest.mark.parametrize("name", CAPPED)
def test_every_eviction_method_holds_the_prompt_and_the_cap(name, gqa):
    ids, new = torch.arange(1, 21)[None], torch.randint(1, 97, (1, 30), generator=torch.Generator().manual_seed(2))
    least = 21 if name == "scissorhands" else 32  # it drops half of its slots at once
    cache = capped(name, 32, every=4).cache_for(gqa)
    run(gqa, cache, ids, new=new)
    for layer in (0, 1):
        for head in (0, 1):
            slots = kept(cache, layer, 0, head)
            assert set(range(20)) <= set(slots) and least <= len(slots) < 32 + 4


@pytest.mark.parametrize("steps", [40, pytest.param(2000, marks=pytest.mark.slow)])
@torch.no_grad()
def test_all_methods_hold_their_cap_in_one_shared_run(steps, gqa):
    prompt, g = list(range(1, 21)), torch.Generator().manual_seed(3)
    methods = [capped(name, 32, every=4) for name in CAPPED if not load_method(name).changes_prompt]
    methods = [one for one in methods if "answers" not in one.needs]
    group, _ = Group.begin(gqa, methods, [3], lambda s: s.run(torch.tensor([prompt]), ends_prompt=True))
    for token in torch.randint(1, 97, (steps,), generator=g).tolist():
        group.feed([[token]])
    assert len(group.active) == len(methods) > 6
    prompt_slots = range(len(prompt))
    for member in group.members:
        for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            slots = kept(member.cache, layer, 0, head)
            assert set(prompt_slots) <= set(slots) and len(slots) < 32 + 4


def test_rows_of_a_batch_are_cut_when_they_are_full_themselves(gqa):
    ids, mask = padded_prompt([40, 21])
    new = torch.randint(1, 97, (2, 25), generator=torch.Generator().manual_seed(2))
    method = capped("random", 44, every=6)
    batch = method.cache_for(gqa, samples=[7, 8])
    run(gqa, batch, ids, new=new, mask=mask)
    for row, n in enumerate([40, 21]):
        alone = method.cache_for(gqa, samples=[7 + row])
        run(gqa, alone, ids[row : row + 1, 40 - n :], new=new[row : row + 1])
        assert kept(batch, 0, row, 1) == kept(alone, 0, 0, 1)


def test_a_prompt_that_fills_the_cap_by_itself_is_refused_by_name():
    for name in ("random", "h2o"):
        with pytest.raises(
            UserError, match=r"method.decode.cap=20: the prompt's 20 tokens stay .*prompt=protected_free or open"
        ):
            held_by_step(capped(name, 20), 0, prompt=20)
        assert held_by_step(capped(name, 20, every=1, prompt="protected_free"), 30, prompt=20)[-1] == 40
        assert held_by_step(capped(name, 20, every=1, prompt="open"), 30, prompt=20)[-1] == 20


def test_what_is_not_set_is_no_part_of_a_record():
    assert "decode" not in load_method("random", budget=0.5).config()
    assert load_method("random", budget=0.5, decode={"every": 4}).config()["decode"] == {"every": 4}
    knobs = capped("random", 512).config()
    assert knobs["decode"] == {"cap": 512} and "pin" not in knobs


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("h2o", {"budget": 0.5}, r"method.decode.cap=64: budget=0.5 says how many slots .* give budget=1"),
        ("h2o", {"decode": {"cap": 0.5}}, r"method.decode.cap=0.5: give a whole number, 2 or more"),
        ("h2o", {"decode": {"cap": 64, "prompt": "kept"}}, r"method.decode.prompt=kept: it is one of protected"),
        ("h2o", {"decode": {"prompt": "open"}}, r"method.decode.prompt=open: .* method.decode.cap=512"),
        ("h2o", {"pin": "prompt", "decode": {"cap": 64, "prompt": "open"}}, r"method.pin=prompt: method.decode.prompt"),
        ("h2o", {"pin": "prompt", "decode": {"cap": 64, "prompt": "protected_free"}}, r"method.pin=prompt: .*free"),
        ("h2o", {"pin": "boundary"}, r"method.pin=boundary: method.decode.cap=64 pins the prompt"),
        ("snapkv", {"decode": {"cap": 8, "prompt": "open"}}, r"method.decode.cap=8 slots do not hold method.window"),
        ("full", {}, r"method.decode.cap=64: the full cache keeps everything"),
        ("streaming_llm", {}, r"method.decode.cap=64: StreamingLLM is recency"),
        ("qfilters", {}, r"method.decode.cap=64: QFilters forgets"),
        ("kivi", {}, r"method.decode=.*Codec ranks no slots"),
        ("snapkv+kivi", {}, r"method.store=KIVI packs .* drops single ones"),
    ],
)  # fmt: skip
def test_what_a_cap_cannot_do_is_refused_by_name(name, knobs, said):
    with pytest.raises(UserError, match=said):
        load_method(name, **{"budget": 1, "decode": {"cap": 64}, **knobs})
