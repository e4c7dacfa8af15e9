"""What the meter says is read is no less than what torch's own ops read, whatever way a method goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from torch import Tensor

from kernels import attend, reads
from methods import load_method
from methods.core.contract import LayerCache, Method, ModelSpec, Step
from methods.core.store import Store
from tests.methods.core.selecting.paged import Paged
from tests.methods.core.selecting.touched import Touched
from tests.tiny import METHODS, SIZES, feed, padded_prompt, tiny_model

N = 40
SLOT = 2 * 2 * 2 * 8 * 4  # a token's keys and values in both layers
BITS = ("kivi", "per_token")


@dataclass
class Sly(Method):
    """way: how it attends to all that it holds, and what it says."""

    way: str = "op"

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [SlyCache(self.way) for _ in range(spec.n_layers)]


class SlyCache(LayerCache):
    def __init__(self, way: str):
        self.way, self.store = way, Store()

    def append(self, step: Step) -> None:
        self.store.append(step.k, step.v, step.pos, step.padded)

    def attend(self, step: Step) -> Tensor:
        k, v, pos = self.store.k, self.store.v, self.store.pos
        if self.way == "op" or step.q.shape[2] > 1:
            return attend(step.q, k, v, step.rules, q_pos=step.pos, k_pos=pos)
        if self.way == "view":
            k, v, pos = k[:, :, -16:], v[:, :, -16:], pos[:, :, -16:]
            return attend(step.q, k, v, step.rules, q_pos=step.pos, k_pos=pos)
        if self.way == "note":
            reads.note(k[:, :, :16], v[:, :, :16])
        p = (step.q.unflatten(1, (2, -1)) @ k[:, :, None].mT * step.rules.scale).softmax(-1)
        return (p @ v[:, :, None]).flatten(1, 2)

    def tensors(self) -> Iterable[Tensor]:
        return self.store.tensors()


def test_a_list_of_what_is_read_is_told_to_be_asked_for_no_more():
    with pytest.warns(FutureWarning, match=r"Listing: `read_tensors` is not asked any more: .* kernels.reads") as told:
        type("Listing", (LayerCache,), {"read_tensors": lambda self: ()})
    assert len(told) == 1 and told[0].filename == __file__


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def step_of(model, method, n: int = N) -> tuple[int, int]:
    """Bytes that a decode step is counted with, and those of keys, values and bounds that ops have read."""
    ids, mask = padded_prompt([n + 2])
    cache = method.cache_for(model)
    feed(model, cache, ids[:, : n + 1], mask[:, : n + 1], [n, 1])  # then there is a free place for the next token
    layers = [layer.inner for layer in cache.layers]
    modes = []

    def watched(inner):
        own = inner.attend

        def run(step):
            with Touched([x for x in inner.tensors() if x.dim() == 4 and x.is_floating_point()]) as mode:
                modes.append(mode)
                return own(step)

        return run

    for inner in layers:
        inner.attend = watched(inner)
    before = cache.report().read_step
    feed(model, cache, ids, mask, [1], start=n + 1)
    return 2 * cache.report().read_step - before, sum(mode.nbytes() for mode in modes)


@pytest.mark.parametrize(("way", "counted"), [("op", N + 2), ("view", 16)])
def test_what_is_read_is_what_the_op_is_handed(llama, way, counted):
    assert step_of(llama, Sly(way=way)) == (counted * SLOT, counted * SLOT)


def test_an_attention_of_ones_own_that_says_nothing_has_read_all_that_is_held(llama):
    counted, touched = step_of(llama, Sly(way="own"))
    assert touched == (N + 2) * SLOT <= counted


def test_a_method_that_says_it_reads_less_than_it_does_is_caught(llama):
    counted, touched = step_of(llama, Sly(way="note"))
    assert counted == 16 * SLOT < touched == (N + 2) * SLOT


@pytest.mark.parametrize("name", METHODS)
def test_no_method_reads_more_than_is_counted(equipped, name):
    knobs = {} if name == "full" else {"bits": 4} if name in BITS else {"budget": 0.5}
    counted, touched = step_of(equipped("llama"), load_method(name, **SIZES.get(name, {}), **knobs), 90)
    assert touched <= counted and counted > 0


@pytest.mark.parametrize("per_group", [True, False])
def test_a_selection_is_counted_with_every_element_that_it_reads(llama, per_group):
    counted, touched = step_of(llama, Paged(budget=0.5, per_group=per_group), N - 2)  # the current page is full
    assert 0 < touched == counted < N * SLOT
