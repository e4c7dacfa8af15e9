"""Segments of every kind under one softmax, against plain lists of each row's own tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import Rules, attend_with_lse, reads
from methods.core.codes.form import Form
from methods.core.codes.levels import TokenLevels, even
from methods.core.codes.widths import Widths
from methods.core.contract import LayerCache, Method, ModelSpec, Stage, Step
from methods.core.meter import nbytes
from methods.core.stores.codec import CodecCache
from methods.core.stores.segment import CodedSegment, PlainSegment, Segment
from methods.core.stores.segments import SegmentedStore
from tests.bounds import bound, near, run_off
from tests.kernels.formula import allowed, formula
from tests.methods.conftest import run
from tests.tiny import padded_prompt, tiny_model

H, D, SINKS, BLOCK = 2, 16, 3, 8


class Sixteenths(Form):
    """Whole sixteenths, each in a byte."""

    bits = 8.0

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        return {"codes": (x * 16).round().clamp(-128, 127).to(torch.int8)}

    def decode(self, arrays: Mapping[str, Tensor], D: int) -> Tensor:
        return arrays["codes"].float() / 16


class OfBlocks(Sixteenths):
    """The same of channels whose largest number in the block is 7, so that a code is of its whole block."""

    drops = joins = False

    def grows(self, name: str) -> bool:
        return name == "codes"

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        scale = x.abs().amax(2, keepdim=True)
        return {**super().encode(x / scale * 7), "scale": scale}

    def decode(self, arrays: Mapping[str, Tensor], D: int) -> Tensor:
        return super().decode(arrays, D) / 7 * arrays["scale"]


def ahead(before: int) -> int:
    """Tokens up to the next block."""
    return SINKS - before if before < SINKS else (SINKS - before) % BLOCK


class Blocks(SegmentedStore):
    """Sinks and the tokens behind whole blocks as they came; blocks as codes."""

    def __init__(self, form: Form, capacity: int | None = None):
        super().__init__(capacity)
        self.form = form

    def due(self, n: int, before: int) -> int:
        lead = ahead(before)
        return 0 if n < lead + BLOCK else n - (n - lead) % BLOCK

    def segments(self, rows: slice, k: Tensor, v: Tensor, pos: Tensor, before: int, step: Step) -> Iterable[Segment]:
        lead, made = ahead(before), []
        if lead:
            made.append(PlainSegment(k[:, :, :lead], v[:, :, :lead], pos[..., :lead]))
        for i in range(lead, pos.shape[-1], BLOCK):
            at = slice(i, i + BLOCK)
            made.append(CodedSegment.of((self.form, self.form), k[:, :, at], v[:, :, at], pos[..., at]))
        return made


def read_back(x: Tensor, form: Form, gone: int) -> Tensor:
    """One row's tokens x [H, n, D] as they are read once all that is due is packed, without so many oldest ones."""
    x, n = x.clone(), x.shape[1]
    first = gone + ahead(gone)
    for i in range(first, n - (n - first) % BLOCK if n >= first + BLOCK else first, BLOCK):
        x[:, i : i + BLOCK] = form.decode(form.encode(x[None, :, i : i + BLOCK].float()), D)[0].to(x.dtype)
    return x


class Rows:
    """A layer beside lists of each row's tokens."""

    def __init__(self, form: Form, heads: int, dtype: torch.dtype = torch.float32, window: int | None = None):
        self.form, self.heads, self.dtype, self.rules = form, heads, dtype, Rules(D**-0.5, window=window)
        self.layer = CodecCache(Blocks(form))
        self.tokens: list[list[tuple[Tensor, Tensor]]] = [[], []]
        self.gone = 0  # tokens that a sliding layer had let go of when the prompt ended
        self.packed = [0, 0]  # tokens that had been packed once for all when the row was last packed
        self.g = torch.Generator().manual_seed(0)

    def step(self, n: int, stage: Stage, padding: tuple[int, int] = (0, 0)) -> None:
        q = torch.randn(2, self.heads, n, D, generator=self.g) * 2
        k, v = (torch.randn(2, H, n, D, generator=self.g).to(self.dtype) for _ in range(2))
        seen, skip = torch.tensor([len(row) for row in self.tokens]), torch.tensor(padding)[:, None]
        pos = torch.where(torch.arange(n) >= skip, seen[:, None] + torch.arange(n) - skip, -1).int()
        step = Step(0, 1, stage, q, k, v, pos, seen, any(padding), torch.arange(2), self.rules)
        old = [self.held(row) for row in range(2)]
        self.layer.append(step)
        out = self.layer.attend(step)
        for row in range(2):
            new = slice(padding[row], n)
            keys, values = (torch.cat((x, y[row, :, new]), 1) for x, y in zip(old[row], (k, v)))
            at = torch.arange(keys.shape[1])[None, None].expand(1, H, -1)
            given = q[row : row + 1, :, new], keys[None], values[None], self.rules, pos[row : row + 1, new], at
            near(
                out[row : row + 1, :, new],
                formula(*given),
                allowed(given[0], given[1], self.rules, *given[4:], size=keys.new_tensor(5.0)),
            )
            self.tokens[row] += [(k[row, :, t], v[row, :, t]) for t in range(padding[row], n)]
        self.layer.end_step(step)
        if stage is not Stage.MID_PROMPT:
            self.packed = [len(row) for row in self.tokens]

    def held(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row as they are read now."""
        if not self.tokens[row]:
            return torch.zeros(H, 0, D, dtype=self.dtype), torch.zeros(H, 0, D, dtype=self.dtype)
        k, v = (torch.stack(x, 1) for x in zip(*self.tokens[row]))
        return (read_back(k, self.form, self.gone), read_back(v, self.form, self.gone)) if self.packed[row] else (k, v)

    def reorder(self, rows: list[int]) -> None:
        self.layer.reorder(torch.tensor(rows))
        self.tokens = [list(self.tokens[row]) for row in rows]

    def check_bytes(self) -> None:
        """The meter's bytes are the rows', padding and free places; each row has what it would have alone."""
        holding = self.layer.holding()
        assert sum(holding.held) + sum(holding.padding) == nbytes(self.layer.tensors())
        for row, held in enumerate(holding.held):
            n, size = len(self.tokens[row]), torch.finfo(self.dtype).bits // 8
            blocks = (n - SINKS) // BLOCK if n >= SINKS + BLOCK else 0
            scales = blocks * 2 * H * D * 4 if not self.form.joins else 0
            plain = (n - blocks * BLOCK) * 2 * H * D * size
            assert held == plain + blocks * BLOCK * 2 * H * D + scales + n * 4
            assert holding.beside[row] == n * 4
            free = holding.padding[row]
            assert free <= max(held // 8, 2 * H * D * size + 4 + (2 * H * D * BLOCK + 4 * BLOCK)), "spare places"


@pytest.mark.parametrize("padding", [(0, 0), (5, 0)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    ("form", "dtype"), [(Sixteenths(), torch.float32), (OfBlocks(), torch.float32), (Sixteenths(), torch.bfloat16)]
)
def test_sinks_blocks_and_tail_are_one_softmax_and_count_a_rows_own_tokens(form, dtype, heads, padding):
    both = Rows(form, heads, dtype)
    both.step(20, Stage.MID_PROMPT, padding)
    both.step(13, Stage.ENDS_PROMPT)
    both.check_bytes()
    for _ in range(10):
        both.step(1, Stage.DECODE)
        both.check_bytes()
    both.reorder([1, 0])
    both.step(1, Stage.DECODE)
    twin = copy.deepcopy(both)
    both.step(9, Stage.TURN, (0, 4))  # a turn sets the rows apart
    both.check_bytes()
    both.reorder([1, 1])
    both.step(12, Stage.ENDS_PROMPT)
    both.step(1, Stage.DECODE)
    both.check_bytes()
    twin.step(3, Stage.TURN)
    twin.check_bytes()
    joined = 1 if form.joins else len(twin.layer.store.parts[0].segments) - 1
    assert len(twin.layer.store.parts[0].segments) == 1 + joined  # blocks of codes by token are one segment


class BitsByToken(SegmentedStore):
    """Everything is packed once: tokens of large keys in 8 bits, others in 4."""

    rows_apart = True
    widths = Widths([TokenLevels(even(4)), TokenLevels(even(8))])

    def due(self, n: int, before: int) -> int:
        return 0 if before else n

    def segments(self, rows: slice, k: Tensor, v: Tensor, pos: Tensor, before: int, step: Step) -> list[Segment]:
        classes = (k.norm(dim=-1) > D**0.5).long()
        return [CodedSegment(self.widths.pack(k, classes), self.widths.pack(v, classes), pos)]


def test_rows_whose_tokens_have_bits_of_their_own_lie_apart():
    store, g = BitsByToken(), torch.Generator().manual_seed(0)
    k, v = torch.randn(2, H, 30, D, generator=g), torch.randn(2, H, 30, D, generator=g)
    store.append(k, v, torch.arange(30).expand(2, -1))
    store.pack(step=None)
    eight = k.norm(dim=-1) > D**0.5
    expected = [
        torch.where(eight[..., None], *(f.decode(f.encode(x), D) for f in reversed(store.widths.forms))) for x in (k, v)
    ]
    for ours, theirs in zip(store.read(), expected, strict=True):
        assert torch.equal(ours, theirs)
    bits = 4 + 4 * eight.flatten(1).double().mean(1)
    near(store.nominal_bits(), bits.tolist(), bound(torch.float64, eight[0].numel(), size=8.0))
    holding = store.holding()
    assert sum(holding.held) + sum(holding.padding) == nbytes(store.tensors())
    for row, held in enumerate(holding.held):
        n = int(eight[row].sum())
        assert held == 2 * (n * (D + 4) + (H * 30 - n) * (D // 2 + 4) + H * 4) + 30 * 4
    store.reorder(torch.tensor([1, 0]))
    assert torch.equal(store.read()[0], expected[0][[1, 0]])
    alone = store.select(torch.tensor([1]))
    assert torch.equal(alone.read()[0], expected[0][:1]) and alone.holding().held == holding.held[:1]
    q, new = torch.randn(2, 4, 1, D, generator=g), torch.randn(2, H, 1, D, generator=g)
    at = torch.full((2, 1), 30)
    store.append(new, new, at)
    step = Step(0, 1, Stage.DECODE, q, new, new, at, at[:, 0], False, torch.arange(2), Rules(D**-0.5))
    keys, values = (torch.cat((x[[1, 0]], new), 2) for x in expected)
    held_at = torch.arange(31).expand(2, H, -1)
    given = q, keys, values, step.rules, at, held_at
    near(store.attend(step), formula(*given), allowed(q, keys, step.rules, at, held_at, size=values))


def test_a_sliding_layer_lets_whole_segments_go():
    both = Rows(OfBlocks(), 2, window=20)
    both.gone = 60 - 19
    both.step(60, Stage.ENDS_PROMPT)
    for _ in range(40):
        both.step(1, Stage.DECODE)
    part = both.layer.store.parts[0]
    assert len(part.segments) <= 4 and part.count == 100
    assert int(part.positions.min()) > 100 - 20 - BLOCK - 4


def filled(form: Form) -> Blocks:
    store, g = Blocks(form), torch.Generator().manual_seed(0)
    k = torch.randn(2, H, 30, D, generator=g)
    store.append(k, k, torch.arange(30).expand(2, -1))
    store.pack(step=None)
    return store


def test_slots_of_codes_by_token_are_dropped_and_others_refuse_by_name_before_anything_goes():
    store = filled(Sixteenths())
    k, _ = store.read()
    keep = (store.pos % 3 == 0) | (store.pos > 27)
    store.keep(keep, int(keep.sum(-1).max()))
    real = store.pos >= 0
    assert torch.equal(store.read()[0][real], k[keep]) and torch.equal(store.pos[real] % 3 == 0, store.pos[real] < 28)
    whole = filled(OfBlocks())
    with pytest.raises(NotImplementedError, match="OfBlocks: cannot drop single slots once they are packed"):
        whole.keep(keep, 12)
    assert len(whole) == 30
    only_plain = torch.ones_like(keep)
    only_plain[:, :, 1], only_plain[:, :, 28] = False, False  # a sink, and one of the newest
    whole.keep(only_plain, 28)
    assert whole.pos[0, 0].tolist() == [0, *range(2, 28), 29]


@dataclass
class Packs(Method):
    """All slots in Blocks."""

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [CodecCache(Blocks(Sixteenths(), prompt_len)) for _ in range(spec.n_layers)]


@torch.no_grad()
def test_in_a_model_chunks_and_padding_change_nothing_and_a_fork_goes_its_own_way():
    model = tiny_model("llama")
    ids, mask = padded_prompt([40, 29])
    new = torch.randint(90, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = Packs().cache_for(model)
    whole = run(model, cache, ids, new=new, mask=mask)
    near(run(model, Packs().cache_for(model, prompt_len=40), ids, [11, 29], new, mask), whole, run_off())
    for row, n in enumerate((40, 29)):
        one = slice(row, row + 1)
        near(run(model, Packs().cache_for(model), ids[one, 40 - n :], new=new[one]), whole[one], run_off())
    assert cache.layers[0].inner.nominal_bits() == [8.0, 8.0]
    before = [store.read()[0].clone() for store in (layer.inner.store for layer in cache.layers)]
    twin = cache.fork()
    model(new[:, :1], past_key_values=twin)
    assert all(torch.equal(x, layer.inner.store.read()[0]) for x, layer in zip(before, cache.layers))
    exact = model(torch.cat((ids, new), 1)[:1]).logits[:, -10:]
    assert (exact - whole[:1]).abs().max() > bound(torch.float32, 50, 40.0)  # and codes are what is read


class Narrow(Segment):
    """Keys without the channels that their row and head does not need, and values as they came."""

    def __init__(self, k: Tensor, v: Tensor, pos: Tensor, channels: Tensor):
        """k [b, H, s, D]; channels [b, H, d]: those that stay."""
        super().__init__(pos)
        self.channels, self.v = channels, v.clone()
        self.k = k.gather(3, channels[:, :, None].expand(-1, -1, k.shape[2], -1))

    def attend(self, step: Step) -> tuple[Tensor, Tensor]:
        at = self.channels.repeat_interleave(step.q.shape[1] // self.k.shape[1], 1)[:, :, None]
        q = step.q.gather(3, at.expand(-1, -1, step.q.shape[2], -1))
        return attend_with_lse(q, self.k, self.v, step.rules, q_pos=step.pos, k_pos=self.pos)


class Thin(SegmentedStore):
    """The prompt's keys lose channels, those of later tokens do not."""

    def due(self, n: int, before: int) -> int:
        return 0 if before else n

    def segments(self, rows: slice, k: Tensor, v: Tensor, pos: Tensor, before: int, step: Step) -> list[Segment]:
        return [Narrow(k, v, pos, k.square().mean(2).topk(5).indices)]


def test_a_segment_may_have_keys_of_a_width_of_its_own():
    store, g = Thin(), torch.Generator().manual_seed(0)
    k, v = torch.randn(2, H, 30, D, generator=g), torch.randn(2, H, 30, D, generator=g)
    store.append(k, v, torch.arange(30).expand(2, -1))
    store.pack(step=None)
    kept = torch.zeros(2, H, 1, D).scatter(3, k.square().mean(2).topk(5).indices[:, :, None], 1.0)
    q, new = torch.randn(2, 4, 2, D, generator=g), torch.randn(2, H, 2, D, generator=g)
    at, held_at = torch.arange(30, 32).expand(2, -1), torch.arange(32).expand(2, H, -1)
    store.append(new, new, at)
    step = Step(0, 1, Stage.TURN, q, new, new, at, at[:, 0], False, torch.arange(2), Rules(D**-0.5))
    keys, values = torch.cat((k * kept, new), 2), torch.cat((v, new), 2)
    given = q, keys, values, step.rules, at, held_at
    near(store.attend(step), formula(*given), allowed(q, keys, step.rules, at, held_at, size=values))


@pytest.mark.parametrize("form", [Sixteenths(), OfBlocks()])
def test_codes_are_read_as_codes_and_not_as_the_numbers_that_they_become(form):
    store, at = filled(form), torch.full((2, 1), 30, dtype=torch.int32)
    q, new = torch.randn(2, 4, 1, D), torch.randn(2, H, 1, D)
    store.append(new, new, at)
    step = Step(0, 1, Stage.DECODE, q, new, new, at, at[:, 0], False, torch.arange(2), Rules(D**-0.5))
    turn, holding = reads.Turn(2), store.holding()
    with turn:
        store.attend(step)
    apart = sum(size * n for size, counts in turn.read.apart.items() for n in counts)
    assert (turn.read.same + apart).tolist() == [n - m for n, m in zip(holding.held, holding.beside)]
