"""Output and sums over the rows of attention, from one product: both forms against the dense softmax in float64."""

import pytest
import torch
from torch import Tensor

from kernels import Rules, Stem, Sums, attend_with_sums, backend, compiled, noisy_rows, uniform
from kernels.mass import rows, sums
from tests.bounds import near
from tests.kernels.formula import allowed, logits
from tests.turns import taking_turns

FORMS = ["reference", pytest.param("auto", marks=pytest.mark.skipif(compiled._compiler() is None, reason="no C++"))]
SHAPES = [(1, 1), (1, 63), (63, 63), (20, 300), (200, 1100)]
D = 32


@pytest.fixture(autouse=True)
def as_before():
    chosen = backend.chosen()
    yield
    backend.use(chosen)


def given(heads: int, T: int, S: int, padded: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, k and v of two rows, whose heads lie between each other as a model's do, and their positions."""
    g = torch.Generator().manual_seed(T + S)
    q = torch.randn(2, T, 4, D, generator=g).transpose(1, 2) * 2
    k, v = (torch.randn(2, S, heads, width, generator=g).transpose(1, 2) * 2 for width in (D, 48))
    q_pos, k_pos = torch.arange(S - T, S).repeat(2, 1), torch.arange(S).repeat(2, 1, 1)
    if padded:
        q_pos[0, : T // 3], k_pos[0, :, : S // 4] = -1, -1
    return q, k, v, {"q_pos": q_pos, "k_pos": k_pos}


def stem_of(q_pos: Tensor, fresh: bool = True) -> Stem:
    return Stem.of(5, torch.arange(2)[:, None, None], torch.arange(4)[:, None], *([q_pos[:, None]] if fresh else []))


def dense(q: Tensor, k: Tensor, rules: Rules, one: Sums, fresh: bool, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """One sum in float64, [B, Hq, S], as its definition reads; fresh: noise is drawn for every query."""
    x, seen = logits(q, k, rules, q_pos, k_pos)  # [B, Hq, T, S]
    k_pos = k_pos.repeat_interleave(q.shape[1] // k_pos.shape[1], dim=1)
    if one.stem is not None:
        keys = [torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]]
        keys += [q_pos[:, None, :, None]] if fresh else []
        x = x - (-uniform(5, *keys, k_pos[:, :, None]).double().log()).log()
    tau = one.tau.double()[:, None, :, None] if isinstance(one.tau, Tensor) else one.tau
    p = (x / tau).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    back = q_pos[:, None, :, None] - k_pos[:, :, None]
    p = p ** (2 if one.squared else 1) * (back >= one.least) * (back < (one.most or 1 << 30))
    p = p if one.weights is None else p * one.weights.double()[:, None, :, None]
    return p[:, :, len(q_pos[0]) - one.newest if one.newest else 0 :].sum(2)


@pytest.mark.parametrize(
    ("kind", "heads", "form"), taking_turns(["tail", "positions", "padded", "window"], [1, 2, 4], FORMS, of=3)
)
def test_output_and_every_kind_of_sum_are_those_of_the_softmax(kind, heads, form):
    backend.use(form)
    for T, S in SHAPES:
        q, k, v, at = given(heads, T, S, kind == "padded")
        rules = Rules(D**-0.5, window=9 if kind == "window" else None)
        g = torch.Generator().manual_seed(1)
        weights, tau = torch.rand(2, T, generator=g), 1 + torch.rand(2, T, generator=g)
        noise, of_slots = stem_of(at["q_pos"]), stem_of(at["q_pos"], fresh=False)
        asked = [
            Sums(), Sums(newest=max(1, T // 3)), Sums(weights=weights[:1]), Sums(weights=weights, squared=True),
            Sums(squared=True, newest=1), Sums(least=3, most=40), Sums(least=1), Sums(tau=2.0), Sums(stem=noise),
            Sums(stem=of_slots, weights=weights), Sums(stem=noise, tau=1.7, newest=max(1, T // 2)),
            Sums(stem=noise, tau=tau), Sums(stem=noise, squared=True), Sums(stem=of_slots, tau=tau, squared=True),
        ]  # fmt: skip
        layout = "tail" if kind == "tail" else "positions"
        out, got = attend_with_sums(q, k, v, rules, asked, **at, layout=layout)
        x, seen = logits(q, k, rules, **at)
        probs = x.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        near(out, probs @ v.double().repeat_interleave(4 // heads, dim=1), allowed(q, k, rules, **at, size=v))
        for one, sum_ in zip(asked, got, strict=True):
            expected = dense(q, k, rules, one, one.stem is noise, **at)
            off = allowed(q, k, rules, **at, size=expected, noisy=one.stem is not None)
            near(sum_, expected, 2 * off if one.squared else off)
        alone, (again,) = attend_with_sums(q, k, None, rules, [asked[8]], **at, layout=layout)
        assert alone is None
        near(again, got[8], 2 * allowed(q, k, rules, **at, size=got[8], noisy=True))


def test_queries_that_see_nothing_give_nothing_and_get_nothing():
    q, k, v, at = given(2, 7, 40, False)
    at["q_pos"][1] = -1
    for form in ("reference", "auto"):
        backend.use(form)
        asked = [Sums(), Sums(stem=stem_of(at["q_pos"])), Sums(tau=3.0), Sums(squared=True)]
        out, got = attend_with_sums(q, k, v, Rules(0.2), asked, **at)
        assert (out[1] == 0).all() and all((one[1] == 0).all() for one in got)
        near(got[0][0].sum(-1), 7.0, allowed(q, k, Rules(0.2), **at, size=7.0))


@pytest.mark.skipif(compiled._compiler() is None, reason="needs a C++ compiler")
def test_sums_are_the_same_bits_whatever_the_threads(monkeypatch):
    backend.use("auto")
    q, k, v, at = given(2, 700, 700, False)
    asked = [Sums(), Sums(stem=stem_of(at["q_pos"]))]
    seen = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        out, got = attend_with_sums(q, k, v, Rules(D**-0.5), asked, **at, layout="tail")
        seen.append([out, *got])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.skipif(compiled._compiler() is None, reason="needs a C++ compiler")
def test_the_loops_take_what_they_are_written_for_and_nothing_else():
    backend.use("auto")
    q, k, v, _ = given(2, 5, 9, False)
    assert rows.serves(q, k, v, Rules(1.0)) and rows.serves(q, k, None, Rules(1.0, window=4))
    assert not rows.serves(q, k, v, Rules(1.0, softcap=3.0))
    assert not rows.serves(q.half(), k.half(), v.half(), Rules(1.0))
    assert not rows.serves(q[..., :8], k[..., :8], v, Rules(1.0))
    assert not rows.serves(q.mT.contiguous().mT, k, v, Rules(1.0))
    assert not rows.serves(q.requires_grad_(), k, v, Rules(1.0))


def test_blocks_of_queries_change_no_sum(monkeypatch):
    backend.use("reference")
    q, k, _, at = given(2, 50, 90, True)
    asked = [Sums(newest=31), Sums(stem=stem_of(at["q_pos"]), tau=1 + at["q_pos"].clamp(0) / 90.0)]
    whole = attend_with_sums(q, k, None, Rules(0.2), asked, **at)[1]
    monkeypatch.setattr(sums, "BLOCK_ELEMENTS", 1)
    for a, b in zip(whole, attend_with_sums(q, k, None, Rules(0.2), asked, **at)[1], strict=True):
        near(b, a, 2 * allowed(q, k, Rules(0.2), **at, size=a, noisy=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_noisy_row_of_one_query_comes_from_its_plain_attention(heads, form):
    backend.use(form)
    for S in (1, 16, 63, 500):
        q, k, _, at = given(heads, 1, S, False)
        k_pos = at["k_pos"].expand(2, heads, S).clone()
        k_pos[1, :, : S // 3] = -1  # places that are free
        rules, tau = Rules(D**-0.5), torch.tensor([1.0, 1.6])
        x, seen = logits(q, k, rules, at["q_pos"], k_pos)
        probs = x.masked_fill(~seen, -torch.inf).softmax(-1)[:, :, 0]
        off = allowed(q, k, rules, at["q_pos"], k_pos, noisy=True)
        for fresh in (True, False):
            one = Sums(stem=stem_of(at["q_pos"], fresh), tau=tau[:, None])
            expected = dense(q, k, rules, one, fresh, at["q_pos"], k_pos).view(2, heads, -1, S).sum(2)
            keys = stem_of(at["q_pos"], fresh=False)
            row = noisy_rows(probs.float(), keys, k_pos.int(), tau, at["q_pos"][:, 0] if fresh else None)
            near(row, expected, 2 * off * (4 // heads))
            assert (row[1, :, : S // 3] == 0).all()
