"""Attention over codes is attention over what the codes stand for, in float64, row by row."""

import pytest
import torch
from torch import Tensor

from kernels import Rules, backend
from kernels.attend_quantized import attend_quantized, reference
from kernels.quantize import Packed, dequantize, quantize
from tests.bounds import bound, near
from tests.kernels.formula import allowed, formula

SHAPES = {"gqa": (4, 2), "mha": (4, 4), "mqa": (4, 1)}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
RULES = {
    "plain": {},
    "window": {"window": 41},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes": SLOPES},
    "all rules": {"window": 41, "softcap": 1.5, "slopes": SLOPES},
}
D, DV = 32, 16


@pytest.fixture(autouse=True)
def definition():
    """The plain form; test_compiled.py holds the other one to it."""
    chosen = backend.chosen()
    backend.use("reference")
    yield
    backend.use(chosen)


class Case:
    """Random queries, keys and values, the oldest of them packed."""

    def __init__(
        self, heads: str = "gqa", T: int = 1, n: tuple[int, int, int] = (48, 51, 63), B: int = 2, bits: int = 4,
        key_dim: int = 2, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        """n: packed keys, packed values, all slots."""
        g = torch.Generator().manual_seed(0)
        (Hq, H), (nk, nv, S) = SHAPES[heads], n
        self.q, k, v = (torch.randn(B, h, t, d, generator=g) for h, t, d in ((Hq, T, D), (H, S, D), (H, S, DV)))
        self.q, k, v = self.q.to(dtype), (k * 2).to(dtype), v.to(dtype)
        self.keys = (quantize(k[:, :, :nk], bits, 16, key_dim) if nk else None, k[:, :, nk:])
        self.values = (quantize(v[:, :, :nv], bits, 8, 3) if nv else None, v[:, :, nv:])
        self.k_pos = torch.arange(S).expand(B, 1, -1)
        self.q_pos = torch.arange(S - T, S).expand(B, -1)

    def run(self, rules: Rules, layout: str = "positions") -> Tensor:
        at = {"q_pos": self.q_pos, "k_pos": self.k_pos}
        return attend_quantized(self.q, self.keys, self.values, rules, layout=layout, **at)

    def is_formula(self, out: Tensor, rules: Rules) -> None:
        k, v = whole(self.keys), whole(self.values)
        near(out, formula(self.q, k, v, rules, self.q_pos, self.k_pos), self.allowed(rules))

    def allowed(self, rules: Rules) -> float:
        """How far outputs may be off: codes, logits and weights are float32, and the output is rounded once."""
        at, v = (self.q_pos, self.k_pos), whole(self.values)
        off = allowed(self.q, whole(self.keys), rules, *at, v, dtype=torch.float32)
        return off + bound(self.q.dtype, 1, size=v.abs().max().item())


def whole(pair: tuple[Packed | None, Tensor]) -> Tensor:
    packed, recent = pair
    return recent if packed is None else torch.cat((dequantize(packed), recent.float()), dim=2)


def rules_of(name: str) -> Rules:
    return Rules(D**-0.5, **RULES[name])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("key_dim", [2, 3])
@pytest.mark.parametrize("T", [1, 7])
def test_codes_and_recent_slots_are_one_softmax(T, key_dim, heads, rules):
    case = Case(heads, T, key_dim=key_dim)
    case.is_formula(case.run(rules_of(rules)), rules_of(rules))


@pytest.mark.parametrize("key_dim", [2, 3])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [(16, 0, 17), (0, 1, 17), (64, 64, 64), (992, 872, 1000)])
def test_any_width_and_any_place_where_the_codes_end(n, bits, key_dim):
    case = Case(n=n, bits=bits, key_dim=key_dim)
    for layout in ("all", "positions"):
        case.is_formula(case.run(rules_of("plain"), layout), rules_of("plain"))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("key_dim", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_nothing(dtype, key_dim, bits, monkeypatch):
    case = Case(T=7, n=(144, 150, 211), key_dim=key_dim, bits=bits, dtype=dtype)
    once = case.run(rules_of("plain"))
    monkeypatch.setattr(reference, "UNPACKED", 2500)  # some tens of tokens
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 3 * 211 * 2 * 4)  # three queries
    near(case.run(rules_of("plain")), once, 2 * case.allowed(rules_of("plain")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_full(dtype):
    case = Case(T=3, n=(48, 51, 63), dtype=dtype)
    for name in RULES:
        out = case.run(rules_of(name))
        assert out.dtype == dtype
        case.is_formula(out, rules_of(name))


def test_a_query_that_sees_nothing_gives_zero_and_spoils_no_other():
    case = Case(T=3)
    case.q_pos = torch.tensor([[-1, 40, 62], [-1, -1, 62]])
    out = case.run(rules_of("plain"))
    assert (out[0, :, 0] == 0).all() and (out[1, :, :2] == 0).all()
    case.is_formula(out, rules_of("plain"))


def test_positions_may_differ_from_head_to_head():
    case = Case()
    g = torch.Generator().manual_seed(1)
    case.k_pos = torch.rand(2, 2, 200, generator=g).argsort(-1)[..., :63]
    case.q_pos = torch.full((2, 1), 120)
    case.is_formula(case.run(rules_of("all rules")), rules_of("all rules"))


@pytest.mark.parametrize("key_dim", [2, 3])
def test_one_huge_logit_takes_all_and_nothing_overflows(key_dim):
    case = Case(key_dim=key_dim)
    packed, recent = case.keys
    assert packed is not None
    case.q = case.q.abs()
    case.keys = (packed, recent.index_fill(2, torch.tensor(3), 1e4))
    case.is_formula(case.run(rules_of("plain")), rules_of("plain"))


def test_by_hand():
    # codes 0 … 3 stand for 0, 2, 4, 6: with q = ½ and two channels, the logits are the codes' sums
    keys = torch.tensor([[0.0, 0.0, 2.0, 6.0], [0.0, 6.0, 2.0, 0.0]]).T.view(1, 1, 4, 2)
    values = torch.tensor([8.0, 0.0, 8.0, 0.0]).view(1, 1, 4, 1).expand(-1, -1, -1, 4)
    q = torch.full((1, 1, 1, 2), 0.5)
    packed = quantize(keys, 2, 4, 2)
    assert packed.scale.flatten().tolist() == [2.0, 2.0] and len(packed) == 4
    out = attend_quantized(
        q, (packed, keys[:, :, 4:]), (None, values), Rules(1.0), q_pos=torch.tensor([[3]]),
        k_pos=torch.arange(4).view(1, 1, 4), layout="all",
    )  # fmt: skip
    weights = torch.tensor([0.0, 3.0, 2.0, 3.0]).softmax(-1)
    near(out, 8 * float(weights[0] + weights[2]), bound(torch.float32, 4, 3.0, size=8.0))
