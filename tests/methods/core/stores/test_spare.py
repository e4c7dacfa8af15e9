"""Free places of every kind of store: few beside what is held, and no more than tokens will still come."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methods.core.codes.levels import TokenLevels, even
from methods.core.meter import nbytes
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from methods.core.stores.segment import CodedSegment, Segment
from methods.core.stores.segments import SegmentedStore
from methods.kivi import KIVI
from methods.per_token import PerToken
from tests.methods.layer import step_of

B, H, D, PROMPT = 2, 2, 32, 160
PLACE = H * (2 * D * 4 + 4)  # a token in full, with its position


class Fours(SegmentedStore):
    """All but the newest tokens in 4 bits, 16 at a time."""

    form = TokenLevels(even(4))

    def due(self, n: int, before: int) -> int:
        return max(0, n - 16) // 16 * 16

    def segments(self, rows: slice, k: Tensor, v: Tensor, pos: Tensor, before: int, step: object) -> list[Segment]:
        return [CodedSegment.of((self.form, self.form), k, v, pos)]


class Cut(RaggedStore):
    """Heads that hold different numbers, from the prompt's end on; every 16 tokens as many go as have come."""

    def pack(self, step: object) -> None:
        if self.n in (PROMPT, 16):
            old = 2 if self.counts else 3
            pos = self.pos
            self.keep((pos >= 0) & ((pos % old != 0) | (torch.arange(H)[:, None] == 0)), len(self))


STORES: dict[str, Callable[[], Store]] = {
    "plain": Store, "ragged": Cut, "kivi": lambda: KIVI(residual=32, group=16), "per token": PerToken, "segments": Fours
}  # fmt: skip
#: the largest step in which a store takes free places: tokens in full, and those of a group
STEP = {"plain": PLACE, "ragged": PLACE + 8 * H, "kivi": 17 * PLACE, "per token": 2 * PLACE, "segments": 17 * PLACE}


@pytest.mark.parametrize("new", [None, 1, 5, 40])
@pytest.mark.parametrize("name", STORES)
def test_free_places_are_an_eighth_at_most_and_of_tokens_that_still_come(name, new):
    store = STORES[name]()
    prompt = step_of(PROMPT, H, H, D, rows=B)
    store.append(prompt.k, prompt.v, prompt.pos)
    store.pack(prompt)
    store.expect(new or 0)
    for i in range(40 if new is None else new):
        token = step_of(1, H, H, D, rows=B, start=PROMPT + i)
        store.append(token.k, token.v, token.pos)
        store.pack(token)
        holding = store.holding()
        assert sum(holding.held) + sum(holding.padding) == nbytes(store.tensors())
        for held, free in zip(holding.held, holding.padding):
            free -= PLACE * (name == "ragged")  # which has one behind its pages, too
            assert free <= max(held // 8, STEP[name])
            # places in pages are made at a cut, and wait for the next one
            still = 0 if new is None else new - (i // 16 * 16 if name == "ragged" else i + 1)
            assert new is None or free <= max(still, 1) * STEP[name]
