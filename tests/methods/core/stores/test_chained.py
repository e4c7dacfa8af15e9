"""Codes that stand on the layer below, against the chain written out for every row by itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import Rules
from methods.core.codes.form import Form
from methods.core.codes.predictor import Predictor
from methods.core.contract import LayerCache, Method, ModelSpec, Stage, Step
from methods.core.meter import nbytes
from methods.core.stores.chained import ChainedCache, ChainedStore
from methods.core.stores.segment import PlainSegment, Segment
from tests.bounds import near, run_off
from tests.kernels.formula import allowed, formula
from tests.methods.conftest import run
from tests.tiny import padded_prompt, tiny_model

LAYERS, H, D, SINKS, FLUSH = 3, 2, 8, 2, 8


class Quarters(Form):
    """Whole quarters in a byte; with numbers and weights of few binary digits all arithmetic is exact."""

    bits = 8.0

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        return {"codes": (x * 4).round().clamp(-128, 127).to(torch.int8)}

    def decode(self, arrays: Mapping[str, Tensor], D: int) -> Tensor:
        return arrays["codes"].float() / 4


class Flushes(ChainedStore):
    """Sinks as they came; the newest tokens all become codes as soon as there are so many of them."""

    def due(self, n: int, before: int) -> int:
        return n if n - max(0, SINKS - before) >= FLUSH else 0

    def segments(self, rows: slice, k: Tensor, v: Tensor, pos: Tensor, before: int, step: Step) -> list[Segment]:
        lead = max(0, SINKS - before)
        first = [PlainSegment(k[:, :, :lead], v[:, :, :lead], pos[..., :lead])] if lead else []
        return [*first, self.chained(rows, k[:, :, lead:], v[:, :, lead:], pos[..., lead:])]


def links(layer: int, heads: int, width: int) -> tuple[Predictor, Predictor] | None:
    if layer == 0:
        return None
    g, C = torch.Generator().manual_seed(layer), heads * width
    weights = [
        torch.randint(-2, 3, (C, n * C), generator=g) / 4 * (torch.rand(C, n * C, generator=g) < 0.2) for n in (1, 2)
    ]
    return tuple(Predictor(w, torch.randint(-2, 3, (C,), generator=g) / 4) for w in weights)


FORMS = Quarters(), Quarters()
LINKS = [links(layer, H, D) for layer in range(LAYERS)]


def chain(tokens: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer keys and values [1, H, n, D] as they are read once they are codes."""
    read: list[tuple[Tensor, Tensor]] = []
    for (k, v), link in zip(tokens, LINKS):
        C = H * D
        flat = [x.transpose(1, 2).reshape(1, -1, C) for x in (k, v)]
        below = [] if link is None else [x.transpose(1, 2).reshape(1, -1, C) for x in read[-1]]
        p = 0.0 if link is None else below[0] @ link[0].weight.T + link[0].bias
        key = p + ((flat[0] - p) * 4).round() / 4
        u = 0.0 if link is None else torch.cat((key, below[1]), -1) @ link[1].weight.T + link[1].bias
        value = u + ((flat[1] - u) * 4).round() / 4
        read.append(tuple(x.view(1, -1, H, D).transpose(1, 2) for x in (key, value)))
    return read


class Stack:
    """All layers beside lists of each row's tokens."""

    def __init__(self) -> None:
        self.layers = [ChainedCache(Flushes(FORMS, link)) for link in LINKS]
        for layer in self.layers:
            layer.stack = self.layers
        self.tokens: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in range(LAYERS)] for _ in range(2)]
        self.coded = [0, 0]  # tokens of each row that are codes or sinks
        self.g = torch.Generator().manual_seed(0)

    def held(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Of every layer what a row reads, [1, H, n, D]."""
        n = self.coded[row]
        if not self.tokens[row][0]:
            return [(torch.zeros(1, H, 0, D),) * 2] * LAYERS
        raw = [tuple(torch.stack(x, 1)[None] for x in zip(*of_layer)) for of_layer in self.tokens[row]]
        codes = chain([(k[:, :, SINKS:n], v[:, :, SINKS:n]) for k, v in raw]) if n else raw
        return [
            tuple(torch.cat((x[:, :, :SINKS], y, x[:, :, n:]), 2) for x, y in zip(a, b)) if n else a
            for a, b in zip(raw, codes)
        ]

    def step(self, n: int, stage: Stage, padding: tuple[int, int] = (0, 0)) -> None:
        seen, skip = torch.tensor([len(row[0]) for row in self.tokens]), torch.tensor(padding)[:, None]
        pos = torch.where(torch.arange(n) >= skip, seen[:, None] + torch.arange(n) - skip, -1).int()
        old = [self.held(row) for row in range(2)]
        for i, layer in enumerate(self.layers):
            k, v = (torch.randint(-40, 41, (2, H, n, D), generator=self.g) / 16 for _ in range(2))
            q = torch.randn(2, 4, n, D, generator=self.g)
            step = Step(i, LAYERS, stage, q, k, v, pos, seen, any(padding), torch.arange(2), Rules(D**-0.5))
            layer.append(step)
            out = layer.attend(step)
            for row in range(2):
                new, one = slice(padding[row], n), slice(row, row + 1)
                keys, values = (torch.cat((x, y[one, :, new]), 2) for x, y in zip(old[row][i], (k, v)))
                at = torch.arange(keys.shape[2]).expand(1, H, -1)
                given = q[one, :, new], keys, values, step.rules, pos[one, new], at
                near(out[one, :, new], formula(*given), allowed(given[0], keys, step.rules, *given[4:], size=values))
                self.tokens[row][i] += [(k[row, :, t], v[row, :, t]) for t in range(padding[row], n)]
            layer.end_step(step)
        for layer in self.layers:  # the pass is over
            layer.scratch.clear()
            assert all(one.now is None for part in layer.store.parts for one in part.segments if hasattr(one, "now"))
            assert not layer.store.below and not layer.store.fresh
            holding = layer.holding()
            assert sum(holding.held) + sum(holding.padding) == nbytes(layer.tensors())
        for row in range(2) if stage is not Stage.MID_PROMPT else ():
            n, before = len(self.tokens[row][0]), self.coded[row]
            self.coded[row] = n if n - before - max(0, SINKS - before) >= FLUSH else before

    def reorder(self, rows: list[int]) -> None:
        for layer in self.layers:
            layer.reorder(torch.tensor(rows))
        self.tokens = [[list(of_layer) for of_layer in self.tokens[row]] for row in rows]
        self.coded = [self.coded[row] for row in rows]


@pytest.mark.parametrize("padding", [(0, 0), (6, 0)], ids=["unpadded", "padded"])
def test_every_layer_reads_its_codes_on_top_of_the_layer_below(padding):
    both = Stack()
    both.step(14, Stage.MID_PROMPT, padding)
    both.step(9, Stage.ENDS_PROMPT)
    for _ in range(10):  # the newest ones are flushed while decoding
        both.step(1, Stage.DECODE)
    both.reorder([1, 0])
    twin = copy.deepcopy(both)
    both.step(5, Stage.TURN, (0, 2))
    both.step(9, Stage.ENDS_PROMPT)
    both.reorder([1, 1])
    both.step(1, Stage.DECODE)
    for _ in range(3):
        twin.step(1, Stage.DECODE)
    n, bytes_of = len(twin.tokens[0][0]), twin.layers[1].holding().held[0]
    coded = twin.coded[0] - SINKS
    assert bytes_of == (n - coded) * 2 * H * D * 4 + coded * 2 * H * D + n * 4


@dataclass
class Chained(Method):
    """All layers in a chain."""

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        of = [links(layer, spec.n_kv_heads, spec.head_dim) for layer in range(spec.n_layers)]
        return [ChainedCache(Flushes(FORMS, link, prompt_len)) for link in of]


@torch.no_grad()
def test_in_a_model_rows_pieces_and_forks_are_a_chain_of_their_own():
    model = tiny_model("llama")
    ids, mask = padded_prompt([40, 29])
    new = torch.randint(90, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = Chained().cache_for(model)
    whole = run(model, cache, ids, new=new, mask=mask)
    near(run(model, Chained().cache_for(model, prompt_len=40), ids, [11, 29], new, mask), whole, run_off())
    for row, n in enumerate((40, 29)):
        one = slice(row, row + 1)
        near(run(model, Chained().cache_for(model), ids[one, 40 - n :], new=new[one]), whole[one], run_off())
    inner = cache.layers[1].inner
    assert (
        sum(x.numel() for x in inner.adapters())
        == 3 * inner.store.links[0].weight.numel() + 2 * inner.store.links[0].bias.numel()
    )
    twin = cache.fork()
    a, b = (model(new[:, :1], past_key_values=c).logits for c in (cache, twin))
    assert torch.equal(a, b)
