"""Per-token quantization: every token with its own scale, packed after the step that brought it."""

import pytest
import torch
from torch import Tensor

from kernels import Rules
from kernels.quantize import dequantize, quantize
from methods import load_method
from methods.core.contract import Stage, Step
from methods.core.errors import UserError
from methods.core.stores.codec import CodecCache
from methods.kivi import KIVI
from methods.per_token import PerToken
from tests.bounds import bound, near, near_codes
from tests.kernels.formula import formula, largest_logit
from tests.methods.conftest import run


def tokens(n: int, rows: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def steps(pieces: list[int], D: int = 16) -> list[Step]:
    """Steps of these lengths: the first is the prompt."""
    g, out, n = torch.Generator().manual_seed(0), [], 0
    for T in pieces:
        q, k, v = (torch.randn(2, h, T, D, generator=g) for h in (4, 2, 2))
        stage = Stage.ENDS_PROMPT if n == 0 else Stage.DECODE if T == 1 else Stage.TURN
        pos, seen = torch.arange(n, n + T, dtype=torch.int32).expand(2, -1), torch.full((2,), n, dtype=torch.int32)
        out.append(Step(0, 1, stage, q, k, v, pos, seen, False, torch.arange(2), Rules(D**-0.5)))
        n += T
    return out


@pytest.mark.parametrize(("group", "width"), [(None, 16), (8, 8)])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 8), (4, 4), (3, 2), (16, 4)])
def test_a_step_sees_itself_in_full_and_all_before_it_rounded(key_bits, value_bits, group, width):
    store = PerToken(key_bits, value_bits, group)
    cache = CodecCache(store)
    k = v = torch.empty(2, 2, 0, 16)
    for step in steps([21, *[1] * 70, 5, 1, 1]):
        cache.append(step)
        held_k, held_v = torch.cat((k, step.k), dim=2), torch.cat((v, step.v), dim=2)
        n = held_k.shape[2]
        expected = formula(step.q, held_k, held_v, step.rules, step.pos, torch.arange(n).expand(2, 1, -1))
        logit = largest_logit(step.q, held_k, step.rules, step.pos, torch.arange(n).expand(2, 1, -1))
        near(cache.attend(step), expected, bound(torch.float32, n, logit, size=held_v.abs().max().item(), width=16))
        cache.end_step(step)
        k, v = held_k, held_v
        for x, bits, name in ((step.k, key_bits, "k"), (step.v, value_bits, "v")):
            if bits == 16:
                continue
            back = dequantize(quantize(x, bits, width, 3))
            if name == "k":
                k = torch.cat((k[:, :, : n - x.shape[2]], back), dim=2)
            else:
                v = torch.cat((v[:, :, : n - x.shape[2]], back), dim=2)
        ours = store.read()
        assert torch.equal(ours[0], k) and torch.equal(ours[1], v)


@pytest.mark.parametrize(("bits", "per_token"), [((8, 8), 67_584), ((4, 4), 34_816), ((16, 16), 131_072)])
def test_bytes_per_token_of_llama_8b_by_hand(bits, per_token):
    keys, values = PerToken(*bits).schemes[0]
    assert 32 * 8 * (keys.nbytes(1, 128, 2) + values.nbytes(1, 128, 2)) == per_token


def test_bytes_per_token_of_blocks_of_32_by_hand():
    keys, values = KIVI(2, 2, 32, 32, values="blocks").schemes[0]
    assert 32 * 8 * (keys.nbytes(32, 128, 2) + values.nbytes(32, 128, 2)) == 32 * 24_576


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("pieces", [None, [30, 60], [1, 89]])
def test_measured_bytes_are_the_formula_for_every_row_of_a_padded_batch(bits, pieces, any_heads):
    lengths = [90, 7, 61]
    mask = torch.tensor([[0] * (90 - n) + [1] * n for n in lengths])
    cache = load_method("per_token", bits=bits).cache_for(any_heads, prompt_len=90)
    run(any_heads, cache, tokens(90, rows=3), chunks=pieces, mask=mask)
    report = cache.report()
    H = any_heads.config.num_key_value_heads
    assert report.held_prompt - report.overhead == 2 * H * sum(lengths) * 2 * (16 * bits // 8 + 4) == report.asked
    cache.check_budget()


def test_rows_of_a_padded_batch_are_packed_as_if_alone(any_heads):
    lengths, new = [90, 13, 61], tokens(20, rows=3, seed=2)
    ids, mask = tokens(90, rows=3), torch.tensor([[0] * (90 - n) + [1] * n for n in lengths])
    method = load_method("per_token", bits=4)
    batch = method.cache_for(any_heads)
    actual = run(any_heads, batch, ids, new=new, mask=mask)
    for row, n in enumerate(lengths):
        alone = method.cache_for(any_heads)
        expected = run(any_heads, alone, ids[row : row + 1, 90 - n :], new=new[row : row + 1])
        near_codes(actual[row], expected[0], batch, alone, n, row, before=1)


def test_sixteen_bits_are_the_full_cache_bit_for_bit(any_heads):
    ids, new = tokens(90), tokens(20, seed=2)
    full = run(any_heads, load_method("full").cache_for(any_heads), ids, new=new)
    assert torch.equal(run(any_heads, load_method("per_token", bits=16).cache_for(any_heads), ids, new=new), full)
    assert not torch.equal(run(any_heads, load_method("per_token", bits=8).cache_for(any_heads), ids, new=new), full)


def test_a_residual_stays_in_full_precision():
    store = PerToken(4, 4, residual=6)
    cache = CodecCache(store)
    for step in steps([21, 1, 1]):
        cache.append(step)
        cache.end_step(step)
    part = store.parts[0]
    assert len(part.keys.packed) == len(part.values.packed) == 17 and part.keys.newest.shape[2] == 6


def test_under_a_budget_the_most_bits_that_fit_are_taken():
    def chosen(budget: float) -> tuple[int, int]:
        keys, values = PerToken(None, None, budget=budget).choose(1000, 128, 128, 2)
        return keys.bits, values.bits

    # a quarter bit per number for scale and offset: 8.25, 6.25, 4.25, 3.25 and 2.25 bits of 16
    shares = [1.0, 0.516, 0.515, 0.39, 0.27, 0.265, 0.2, 0.15, 0.1]
    assert [chosen(share) for share in shares] == [
        (16, 16), (8, 8), (8, 4), (4, 4), (4, 4), (4, 2), (2, 2), (2, 2), (2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "knobs", [{"bits": 7}, {"bits": 4, "store": {"residual": -1}}, {"bits": 2, "store": {"group": 6}}]
)
def test_settings_that_cannot_work_are_named(knobs):
    with pytest.raises(UserError, match=r"key_bits=7|residual=-1|group=6"):
        load_method("per_token", **knobs)
