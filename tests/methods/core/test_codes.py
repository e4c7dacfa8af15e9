"""Forms of codes: worked cases of the papers' rules, exact bytes, and what is read of what was packed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from methods.core.codes.balance import Balanced, balanced
from methods.core.codes.bits import pack, size, unpack
from methods.core.codes.codebook import Codebook
from methods.core.codes.form import Coded, Form
from methods.core.codes.levels import ChannelLevels, Levels, Means, TileLevels, TokenLevels, even
from methods.core.codes.outliers import Outliers
from methods.core.codes.rotation import HeadsTogether, Normed, Rotated, hadamard, random_rotation
from methods.core.codes.sums import CodeSums, Sketch, Sum
from methods.core.codes.widths import Widths
from methods.core.errors import UserError
from methods.core.meter import nbytes
from tests.bounds import bound, half_digit, near

B, H, N, D = 2, 2, 24, 32
HALF = 2.0**-11  # relative rounding of a float16


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(*x: list[float]) -> Tensor:
    """One row and head of the given tokens."""
    return torch.tensor(x, dtype=torch.float32)[None, None]


def coded(form: Form, x: Tensor) -> Tensor:
    """The first array of codes of one head, as numbers."""
    return unpack(form.encode(x)["codes"], int(form.bits), x.shape[-1])[0, 0]


@pytest.mark.parametrize("bits", [*range(1, 13), 16])
@pytest.mark.parametrize("n", [1, 7, 8, 32, 33])
def test_whole_numbers_of_any_width_lie_in_whole_bytes_lowest_bits_first(bits, n):
    codes = torch.randint(2**bits, (3, n), generator=torch.Generator().manual_seed(n))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, math.ceil(n * bits / 8)) and packed.is_contiguous()
    for row, of_row in zip(packed.tolist(), codes.tolist()):
        assert int.from_bytes(bytes(row), "little") == sum(c << bits * i for i, c in enumerate(of_row))
    assert torch.equal(unpack(packed, bits, n), codes.int())


def uneven(bits: int) -> Tensor:
    return numbers(2**bits, seed=bits).sort().values


FORMS: dict[str, Callable[[], Form]] = {
    "levels": lambda: Levels(uneven(3)),
    "channel levels": lambda: ChannelLevels(uneven(2), -torch.ones(H, D), torch.rand(H, D) + 0.5),
    "token levels": lambda: TokenLevels(uneven(3)),
    "means": Means,
    "outliers of means": lambda: Outliers(Means(), 1),
    "tile levels": lambda: TileLevels(2, 8),
    "outliers": lambda: Outliers(TokenLevels(even(4)), 2),
    "outliers of all heads": lambda: HeadsTogether(Outliers(TokenLevels(even(3)), 3), H),
    "codebook": lambda: Codebook(numbers(H, D // 4, 32, 4)),
    "one codebook": lambda: Codebook(numbers(1, 1, 64, 2)),
    "rotated": lambda: Rotated(TokenLevels(even(4)), hadamard(16)),
    "normed": lambda: Rotated(Normed(Levels(uneven(2)), D), random_rotation(D, 0)),
    "sum": lambda: Normed(Sum(Rotated(Levels(uneven(2)), random_rotation(D, 1)), Sketch(numbers(D, D))), D),
    "code sums": lambda: CodeSums(TokenLevels(even(2)), 16),
    "code sums of tiles": lambda: CodeSums(TileLevels(8, 8), 8, over_tokens=True),
    "balanced keys": lambda: Rotated(Balanced(TileLevels(4, 8), 8, "tokens"), hadamard(D)),
    "balanced values": lambda: Balanced(TokenLevels(even(2)), 8, "channels"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_bytes_are_exact_and_what_is_joined_selected_or_dropped_reads_as_before(name, dtype):
    form, x = FORMS[name](), numbers(B, H, N, D).to(dtype)
    whole = Coded(form, x)
    read = whole.read()
    assert read.shape == x.shape and read.dtype == dtype and read.isfinite().all()
    assert whole.used == nbytes(whole.tensors()) == B * form.nbytes(N, H, D) and whole.free == 0
    assert form.effective_bits(N, H, D) >= form.bits >= 0
    again = form.decode(form.encode(read.float()), D) if isinstance(form, (Levels, Codebook)) else None
    if again is not None and not isinstance(form, TokenLevels):
        assert torch.equal(again.to(dtype), read)  # what is read is read again
    # blocks that come one after the other are what they are at once
    first = Coded(form, x[:, :, :8])
    for at in (8, 16):
        assert first.join(Coded(form, x[:, :, at : at + 8]), None)
    assert torch.equal(first.read(), read) and first.used == whole.used
    assert nbytes(first.tensors()) == first.used + first.free
    swapped = whole.select(torch.tensor([1, 1]))
    assert torch.equal(swapped.read(), read[[1, 1]])
    slots = torch.tensor([0, 3, 17]).expand(B, H, 3)
    if form.drops:
        whole.keep(slots)
        assert torch.equal(whole.read(), read[:, :, [0, 3, 17]]) and whole.used == B * form.nbytes(3, H, D)
    else:
        with pytest.raises(NotImplementedError, match="cannot drop single slots"):
            whole.keep(slots)
    assert torch.equal(swapped.read(), read[[1, 1]])


def test_levels_lie_between_the_ends_of_a_channel_and_outliers_hold_what_lies_beyond():
    """The worked case of KVQuant's levels."""
    levels = torch.tensor([-1, -0.2, 0.3, 1])
    form = ChannelLevels(levels, torch.full((1, 4), -2.0), torch.full((1, 4), 6.0))
    x = rows([3, -1.5, 5, 9])
    assert coded(form, x).tolist() == [[2, 0, 3, 3]]
    near(form.decode(form.encode(x), 4), rows([3.2, -2, 6, 6]), half_digit(6))
    sparse = Outliers(form, 1)
    arrays = sparse.encode(x)
    assert arrays["places"].tolist() == [[[[1, 3]]]] and arrays["lacks"].tolist() == [[[[0, 3]]]]
    near(sparse.decode(arrays, 4), rows([3.2, -2, 6, 9]), half_digit(6))
    constant = ChannelLevels(levels, torch.full((1, 4), 2.0), torch.full((1, 4), 2.0))
    assert constant.decode(constant.encode(x), 4).tolist() == [[[[2, 2, 2, 2]]]]
    midway = Levels(torch.tensor([0.0, 1.0]))
    assert coded(midway, rows([0.5, 0.51])).tolist() == [[0, 1]]  # the lower of two that are as near
    assert coded(Levels(levels, read=levels * 2), x / 4).tolist() == coded(Levels(levels), x / 4).tolist()


def test_even_levels_between_a_tokens_ends_are_uniform_codes_and_outliers_widen_no_range():
    x = numbers(1, 1, 50, 16)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 7
    form = TokenLevels(even(3))
    exact = ((x - low) / step).round() * step + low
    off = 4 * HALF * x.abs().max().item()
    read = form.decode(form.encode(x), 16)
    assert ((read - x).abs() <= step / 2 + off).all()
    near((read - exact).abs().median(), 0.0, off)  # but at ties
    far = x.clone()
    far[..., 3], far[..., 9] = 100.0, -50.0
    sparse = Outliers(form, 1)
    assert set(sparse.encode(far)["places"].flatten().tolist()) == {3, 9}
    read = sparse.decode(sparse.encode(far), 16)
    near(read[..., [3, 9]], far[..., [3, 9]], 100 * HALF)
    others = [i for i in range(16) if i not in (3, 9)]
    assert ((read - far).abs()[..., others] <= step / 2 + off).all()
    everything = Outliers(form, 8)
    near(everything.decode(everything.encode(x), 16), x, off)


def test_a_token_of_no_bits_is_its_mean_and_outliers_stay_apart_from_it():
    x = rows([1, 2, 3, 6, 100, -50], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    near(Means().decode(Means().encode(x), 6)[0, 0, :, 0], x.mean(-1)[0, 0], 100 * HALF)
    form = Outliers(Means(), 1)
    near(form.decode(form.encode(x), 6), rows([3, 3, 3, 3, 100, -50], [0.5] * 6), 100 * HALF)
    assert form.nbytes(1, 1, 6) == 2 + 2 * 3


def test_tiles_round_between_the_ends_that_are_held():
    """Codes 0, 3, 1, 2 of HACK's worked partitions; a constant channel reads as it is."""
    form = TileLevels(2, 4)
    x = torch.tensor([[0, 3, 1, 2], [1, 4, 2, 2.5], [5, 5, 5, 5]]).T[None, None]
    assert coded(form, x).T.tolist() == [[0, 3, 1, 2], [0, 3, 1, 2], [0, 0, 0, 0]]
    assert form.decode(form.encode(x), 3)[0, 0].T.tolist() == [[0, 3, 1, 2], [1, 4, 2, 3], [5, 5, 5, 5]]
    sums = CodeSums(form, 4, over_tokens=True).encode(x)["sums"]
    assert sums.tolist() == [[[[6, 6, 0]]]] and sums.dtype == torch.uint8
    assert CodeSums(TokenLevels(even(8)), 16).encode(numbers(1, 1, 3, 32))["sums"].dtype == torch.int16
    flat = torch.full((1, 1, 4, 2), 7.0)
    assert torch.equal(form.decode(form.encode(flat), 2), flat)


def test_a_code_is_the_nearest_of_its_codebooks_vectors():
    book, x = numbers(H, 4, 16, 2, seed=1), numbers(B, H, 9, 8)
    form = Codebook(book)
    apart = (x.view(B, H, 9, 4, 1, 2) - book[None, :, None]).double().norm(dim=-1)  # [B, H, n, groups, codes]
    expected = apart.argmin(-1)
    assert torch.equal(unpack(form.encode(x)["codes"], 4, 4).long(), expected)
    read = form.decode(form.encode(x), 8).view(B, H, 9, 4, 2)
    for h in range(H):
        for g in range(4):
            assert torch.equal(read[:, h, :, g], book[h, g][expected[:, h, :, g]])
    assert form.bits == 2.0 and form.nbytes(9, H, 8) == 9 * H * 2
    tied = Codebook(torch.tensor([[[[1.0], [-1.0]]]]))
    assert coded(tied, rows([0.0])).tolist() == [[0]]


def test_a_vector_grid_under_a_hadamard_rotation():
    """The worked case of AQUA-KV's quantiser: (3, 4) has length 5, turned (7, -1) / sqrt(2)."""
    grid = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])[None, None]
    form = Rotated(Normed(Codebook(grid), 2), hadamard(2))
    near(form.decode(form.encode(rows([3, 4])), 2), rows([2.5, 2.5]), 5 * HALF)
    assert torch.equal(form.decode(form.encode(rows([0, 0])), 2), rows([0.0, 0.0]))


def test_rotations_are_orthogonal_and_undone():
    for matrix in (hadamard(64), random_rotation(48, 3)):
        near(matrix @ matrix.T, torch.eye(len(matrix)), 4 * len(matrix) * torch.finfo(torch.float32).eps)
    assert not torch.equal(random_rotation(8, 0), random_rotation(8, 1))
    with pytest.raises(UserError, match="power of two, and this one is 48"):
        hadamard(48)
    fine = Rotated(TokenLevels(even(12)), hadamard(32))
    x = numbers(1, 1, 20, 64)
    # half a step of 12 bits between the ends of a turned vector, in each of the 32 numbers that one is turned back from
    near(fine.decode(fine.encode(x), 64), x, 32**0.5 * x.norm(dim=-1).max().item() / (2**12 - 1))


MEASURED = {1: 0.3609, 2: 0.1160, 3: 0.0340, 4: 0.0093}
#: Lloyd-Max levels of a normal distribution, positive ones
GAUSSIAN = {
    1: [0.7979], 2: [0.4528, 1.5104], 3: [0.2451, 0.7560, 1.3439, 2.1519],
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
}  # fmt: skip


@pytest.mark.parametrize("bits", MEASURED)
def test_turned_directions_have_the_error_of_the_normal_distributions_levels(bits):
    """The figures that TurboQuant is held to, of 128 channels."""
    positive = torch.tensor(GAUSSIAN[bits])
    form = Normed(Rotated(Levels(torch.cat((-positive.flip(0), positive))), random_rotation(128, 0)), 128)
    x = numbers(1, 1, 4000, 128)
    lost = (form.decode(form.encode(x), 128) - x).square().sum(-1) / x.square().sum(-1)
    assert abs(lost.mean().item() / MEASURED[bits] - 1) < 0.03
    assert form.nbytes(1, 1, 128) == 128 * bits // 8 + 2


def test_a_sketch_of_what_levels_leave_is_right_on_average():
    positive = torch.tensor(GAUSSIAN[1])
    levels = Rotated(Levels(torch.cat((-positive, positive))), random_rotation(32, 0))
    k, q = numbers(1, 1, 1, 32, seed=5), numbers(32, seed=6)
    estimates = torch.stack(
        [
            (form.decode(form.encode(k), 32)[0, 0, 0] @ q)
            for seed in range(300)
            for form in [Normed(Sum(levels, Sketch(numbers(32, 32, seed=100 + seed))), 32)]
        ]
    )
    off = 3 * estimates.std().item() / math.sqrt(300)
    assert abs(estimates.mean().item() - (k[0, 0, 0] @ q).item()) < off
    assert form_bytes_of_sketch() == 32 // 8 + 32 // 8 + 4


def form_bytes_of_sketch() -> int:
    """Of 1 bit of levels, 1 of a sketch, and two lengths."""
    return Normed(Sum(Levels(torch.tensor([-1.0, 1.0])), Sketch(numbers(32, 32))), 32).nbytes(1, 1, 32)


X = torch.tensor([[4.0, -4, 40, 2], [1, -1, 8, 1], [-2, 2, 30, -2], [3, 1, -20, -1]])
#: of KVarN's worked tile, by rounds: the columns' scales, codes, steps and least numbers of the rows, squared error
TILES = {
    0: ([1, 1, 1, 1], [[1, 0, 3, 0], [1, 0, 3, 1], [0, 0, 3, 0], [3, 3, 0, 2]],
        [14.666667, 3, 10.666667, 7.666667], [-4, -1, -2, -20], 7.243056),
    1: ([2.645751, 2.645751, 26.602005, 1.825742], [[3, 0, 3, 3], [2, 0, 2, 3], [0, 2, 3, 0], [3, 2, 0, 0]],
        [1.007905, 0.308562, 0.741060, 0.628572], [-1.511858, -0.377964, -1.095445, -0.751823], 0.341056),
    8: ([1.272493, 1.264546, 12.782101, 1.091702], [[3, 0, 3, 2], [3, 0, 2, 3], [0, 2, 3, 0], [3, 2, 0, 0]],
        [2.102209, 0.568933, 1.393011, 1.307422], [-3.163190, -0.790798, -1.832002, -1.564688], 0.928363),
}  # fmt: skip


@pytest.mark.parametrize("rounds", TILES)
def test_a_tile_is_brought_to_an_even_spread_before_it_is_packed(rounds):
    scales, codes, step, low, error = TILES[rounds]
    near(
        balanced(X, rounds)[0],
        torch.tensor(scales),
        half_digit(6) + bound(torch.float32, 16 * rounds, size=max(scales)),
    )
    keys = Balanced(TileLevels(2, 4), 4, "tokens", rounds)  # rows of X are channels
    arrays = keys.encode(X.T[None, None])
    assert unpack(arrays["codes"], 2, 4)[0, 0].T.tolist() == codes
    for name, expected in (("step", step), ("low", low)):
        near(arrays[name][0, 0, 0], torch.tensor(expected), 2 * HALF * max(map(abs, expected)))
    near((keys.decode(arrays, 4)[0, 0].T - X).square().mean(), error, 0.1 * error)  # scales are float16
    values = Balanced(TokenLevels(even(2)), 4, "channels", rounds)  # rows of X are tokens
    arrays = values.encode(X[None, None])
    near(arrays["spread"][0, 0, 0], torch.tensor(scales), 40 * HALF)


#: of the papers' rules for 8 heads of 128 channels: bytes of so many tokens, worked by hand
BYTES = {
    "kvquant keys": (HeadsTogether(Outliers(ChannelLevels(even(3), *torch.ones(2, 1, 1024)), 6), 8), 1, 384 + 12 * 4),
    "kvquant values": (HeadsTogether(Outliers(TokenLevels(even(3)), 6), 8), 1, 384 + 12 * 4 + 4),
    "coupled 8c10b": (Codebook(torch.zeros(8, 16, 1024, 8)), 1, 8 * 16 * 10 // 8),
    "aqua_kv": (HeadsTogether(Rotated(Normed(Codebook(torch.zeros(1, 1, 16, 2)), 1024), hadamard(1024)), 8), 1, 258),
    "turboquant keys": (Normed(Sum(Levels(even(2)), Sketch(torch.zeros(128, 128))), 128), 1, 8 * (32 + 16 + 4)),
    "kvarn keys": (Balanced(TileLevels(4, 128), 128, "tokens"), 128, 8 * 8960),
    "kvarn values": (Balanced(TokenLevels(even(2)), 128, "channels"), 128, 8 * 4864),
    "hack keys": (CodeSums(TileLevels(2, 64), 64), 64, 8 * (64 * 32 + 128 * 4 + 64 * 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_the_papers_rules(name):
    form, n, expected = BYTES[name]
    assert form.nbytes(n, 8, 128) == expected
    x = numbers(1, 8, n, 128)
    assert Coded(form, x).used == expected


def test_tokens_of_a_class_take_its_bits():
    widths = Widths([TokenLevels(even(bits)) for bits in (1, 2, 4)])
    x = numbers(1, H, 40, D)
    classes = torch.randint(3, (1, H, 40), generator=torch.Generator().manual_seed(2))
    packed = widths.pack(x, classes)
    read = packed.read()
    for i, form in enumerate(widths.forms):
        of_class = x[classes == i][None, None]
        assert torch.equal(read[classes == i], form.decode(form.encode(of_class), D)[0, 0])
    counts = [int((classes == i).sum()) for i in range(3)]
    held = sum(n * (D * bits // 8 + 4) for n, bits in zip(counts, (1, 2, 4))) + H * size(40, 2)
    assert packed.used == nbytes(packed.tensors()) == packed.form.nbytes(40, H, D) == held
    assert packed.form.bits == sum(n * bits for n, bits in zip(counts, (1, 2, 4))) / sum(counts)
    only = widths.pack(x, torch.full((1, H, 40), 2))
    assert torch.equal(only.read(), widths.forms[2].decode(widths.forms[2].encode(x), D))
    assert not packed.join(only, None)
    with pytest.raises(NotImplementedError, match="cannot drop single slots"):
        packed.keep(torch.zeros(1, H, 3, dtype=torch.long))
