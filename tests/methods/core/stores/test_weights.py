"""What slots weigh follows them: attention of every store is the definition's, whatever was done to the slots."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import Rules, mass
from methods.core.contract import Stage, Step
from methods.core.eviction import Eviction
from methods.core.probe import attend_beside
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from methods.per_token import PerToken
from tests.bounds import bound, near
from tests.kernels.formula import formula, largest_logit
from tests.methods.layer import Spec

B, H, HQ, D = 2, 2, 4, 16


def append(store: Store, n: int, start: int, padding: int = 0) -> Step:
    """n columns, the first of the second row padding; they are stored."""
    step = unstored(n, start, padding)
    store.append(step.k, step.v, step.pos, step.padded)
    return step


def unstored(n: int, start: int, padding: int = 0) -> Step:
    g = torch.Generator().manual_seed(start)
    q, k, v = (torch.randn(B, heads, n, D, generator=g) for heads in (HQ, H, H))
    skip = torch.tensor([[0], [padding]])
    pos = torch.where(torch.arange(n) >= skip, start + torch.arange(n) - skip, -1).int()
    stage = Stage.DECODE if n == 1 else Stage.TURN
    return Step(0, 1, stage, q * 2, k, v, pos, torch.full((B,), start), padding > 0, torch.arange(B), Rules(D**-0.5))


def weight(pos: Tensor, name: str) -> Tensor:
    """What a slot of a position below 40 weighs; new ones weigh nothing."""
    x = (pos % 5) - 2.0 + torch.arange(H)[:, None] if name == "logit_bias" else (pos % 7) / 4.0 - 0.25
    return x.where(pos < 40, torch.tensor(0.0 if name == "logit_bias" else 1.0))


def weighs(store: Store, step: Step, names: tuple[str, ...]) -> None:
    """Output and attention are those of what the store holds, every slot with the weight of its own position."""
    k, v = store.read()
    given = [weight(store.pos, name) if name in names else None for name in ("logit_bias", "value_factor")]
    expected = formula(step.q, k, v, step.rules, step.pos, store.pos, *given)
    logit = largest_logit(step.q, k, step.rules, step.pos, store.pos) + 4
    off = bound(torch.float32, k.shape[2], logit, size=2 * v.abs().max().item(), width=D)
    near(store.attend(step), expected, off)
    out, received = store.attend_with_mass(step, 1)
    near(out, expected, off)
    ones = formula(step.q, k, torch.ones_like(v), step.rules, step.pos, store.pos, *given[:1])
    near(received.sum(-1), ones[:, :, -1, 0], off)
    near(store.mass(step, 1), received, off)


@pytest.mark.parametrize("names", [("logit_bias",), ("value_factor",), ("logit_bias", "value_factor")])
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("kind", [Store, RaggedStore])
def test_weights_follow_slots_through_drops_reorders_and_freed_places(kind, padding, names):
    store = kind()
    append(store, 40, 0, padding)
    for name in names:
        store.add(name, weight(store.pos, name) - store.track(name))
    weighs(store, append(store, 1, 40), names)
    weighs(store, append(store, 3, 41), names)
    keep = (store.pos % 3 != 0) & (store.pos >= 0)
    if kind is RaggedStore:
        keep[:, 1] &= store.pos[:, 1] > 20
    store.keep(keep, int(keep.sum(-1).max()))
    weighs(store, append(store, 1, 44), names)
    store.reorder(torch.tensor([1, 0]))
    weighs(store, append(store, 2, 45), names)
    store.drop((store.pos >= 0).int().argmax(-1))
    weighs(store, append(store, 1, 47), names)
    k, v = store.read()
    store.replace(k, v, store.pos, **{name: store.track(name) for name in names})
    step = append(store, 1, 48)
    weighs(store, step, names)
    # tokens that are not stored, beside slots that are
    probe = unstored(3, 49)
    out = attend_beside(store, probe)
    append(store, 3, 49)
    near(out, store.attend(probe), bound(torch.float32, 60, 40.0, size=8.0, width=D))


@pytest.mark.parametrize("name", ["logit_bias", "value_factor"])
def test_a_store_that_packs_in_groups_refuses_weights_by_name(name):
    store = PerToken()
    append(store, 20, 0)
    with pytest.raises(NotImplementedError, match=f"PerToken: packed slots weigh alike; {name} needs"):
        store.track(name)


def test_what_caches_share_is_not_the_attention_of_slots_that_weigh():
    seen: dict[str, Tensor] = {}

    @dataclass
    class Watches(Eviction):
        """Looks at the newest queries' attention."""

        weighs: bool = False

        def n_window_queries(self, store: Store, step: Step) -> int:
            if self.weighs:
                store.track("logit_bias")[:, :, 3] = 4.0
            return 2

        def observe(self, store: Store, step: Step, mass: Tensor) -> None:
            seen[str(self.weighs)] = mass

    step = replace(unstored(20, 0), stage=Stage.ENDS_PROMPT)
    for weighs in (False, True):
        (layer,) = Watches(weighs=weighs).caches(Spec(), None)
        layer.append(step)
        layer.end_step(step)  # the output was another cache's
    k_pos, given = step.pos[:, None].expand(-1, H, -1), (step.q[:, :, -2:], step.k, step.rules)
    bias = torch.zeros(B, H, 20)
    bias[:, :, 3] = 4.0
    for name, weights in (("False", None), ("True", bias)):
        expected = mass(*given, q_pos=step.pos[:, -2:], k_pos=k_pos, bias=weights)
        near(seen[name], expected, bound(torch.float32, 20, 30.0, size=2.0, width=D))
    assert (seen["True"] - seen["False"]).abs().max() > 0.1
