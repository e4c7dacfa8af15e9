"""Slots in 16 bits under float32 queries: every op against the formula, and nothing of their size made in float32."""

import pytest
import torch
from torch import Tensor

from kernels import (
    Pages,
    Rules,
    Stem,
    Sums,
    attend,
    attend_pages,
    attend_pages_with_mass,
    attend_with_lse,
    attend_with_mass,
    attend_with_sums,
    attention_probs,
    backend,
    compiled,
    mass,
    noisy_mass,
    weighted_mass,
)
from kernels.attend import compiled as pages_compiled
from kernels.attend import mixed, reference
from kernels.attend_quantized import attend_quantized
from kernels.mass import compiled as mass_compiled
from kernels.mass import rows
from kernels.quantize import dequantize, quantize
from tests.bounds import near
from tests.kernels.allocations import Largest
from tests.kernels.both_forms import paged
from tests.kernels.formula import allowed, formula

TYPES = [torch.float16, torch.bfloat16]
needs_compiler = pytest.mark.skipif(compiled._compiler() is None, reason="needs a C++ compiler")
FORMS = ["reference", pytest.param("auto", marks=needs_compiler)]
RULES = {
    "plain": Rules(0.2),
    "window": Rules(0.2, window=9),
    "all rules": Rules(0.2, softcap=3.0, window=30, slopes=torch.linspace(0, 0.5, 4)),
}


@pytest.fixture(autouse=True)
def as_before():
    chosen = backend.chosen()
    yield
    backend.use(chosen)


def given(T: int, S: int, dtype: torch.dtype, padded: bool = False) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Float32 queries of the newest T tokens of two rows, keys and values in 16 bits, and positions."""
    g = torch.Generator().manual_seed(T + S)
    q = torch.randn(2, 4, T, 32, generator=g) * 2
    k, v = (torch.randn(2, 2, S, width, generator=g).to(dtype) for width in (32, 48))
    q_pos, k_pos = torch.arange(S - T, S, dtype=torch.int32).repeat(2, 1), torch.arange(S).int().repeat(2, 1, 1)
    if padded:
        q_pos[0, : T // 3], k_pos[0, :, : S // 4] = -1, -1
    return q, k, v, {"q_pos": q_pos, "k_pos": k_pos}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_is_the_formula_over_the_numbers_that_are_stored(dtype, form, monkeypatch):
    backend.use(form)
    monkeypatch.setattr(reference, "WIDENED", 64 * 50)  # several blocks
    for name, rules in RULES.items():
        for T, S, padded in ((1, 63, False), (1, 63, True), (20, 150, True), (63, 63, False)):
            q, k, v, at = given(T, S, dtype, padded)
            layouts = ["positions", *(["all"] if T == 1 and not padded and name == "plain" else [])]
            layouts += ["causal"] if T == S else []
            expected = formula(q, k, v, rules, **at)
            for layout in layouts:
                out = attend(q, k, v, rules, **at, layout=layout)
                assert out.dtype == torch.float32
                near(out, expected, allowed(q, k.float(), rules, **at, size=v))
            _, lse = attend_with_lse(q, k, v, rules, **at)
            exact = attend_with_lse(q.double(), k.double(), v.double(), rules, **at)[1]
            near(lse, exact, allowed(q, k.float(), rules, **at, size=max(1.0, exact[exact.isfinite()].abs().max())))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["tail", "positions"])
def test_sums_of_attention_are_those_over_the_same_numbers_in_float64(layout, dtype, form):
    backend.use(form)
    rules = Rules(0.2)
    for T, S in ((1, 63), (63, 63), (20, 150)):
        q, k, v, at = given(T, S, dtype, padded=layout == "positions")
        exact = [x.double() for x in (q, k, v)]
        stem = Stem.of(3, torch.arange(2)[:, None, None], torch.arange(4)[:, None], at["q_pos"][:, None])
        weights = torch.linspace(0.5, 1, T).expand(2, -1)
        off = 2 * allowed(q, k.float(), rules, **at, size=float(T), noisy=True)
        backend.use("reference")
        probs = attention_probs(*exact[:2], rules, **at)  # [B, H, G, T, S], float32 logits of float64 products
        squares = (probs.square() * weights[:, None, None, :, None]).sum(3).view(2, 4, S)
        sums, newest = (probs[..., -n:, :].sum(3).view(2, 4, S) for n in (T, 1))
        noisy = noisy_mass(*exact[:2], rules, stem, **at)
        expected_out = attend(*exact, rules, **at)
        backend.use(form)
        near(mass(q, k, rules, **at, layout=layout), sums, off)
        near(weighted_mass(q, k, rules, **at, weights=weights, squared=True, layout=layout), squares, off)
        near(noisy_mass(q, k, rules, stem, **at, layout=layout), noisy, off)
        near(attention_probs(q, k, rules, **at), probs, off)
        out, one = attend_with_mass(q, k, v, rules, 1, **at, layout=layout)
        near(out, expected_out, off * v.abs().max().item())
        near(one, newest, off)
        out, (all_, noise) = attend_with_sums(q, k, v, rules, [Sums(), Sums(stem=stem)], **at, layout=layout)
        near(out, expected_out, off * v.abs().max().item())
        near(all_, sums, off)
        near(noise, noisy, off)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_pages_and_tail_are_one_softmax(dtype, form):
    backend.use(form)
    g, S, t = torch.Generator().manual_seed(5), 40, 5
    k, v = (torch.randn(1, 2, S + t, width, generator=g).to(dtype) for width in (32, 48))
    k_pos = torch.arange(S + t).repeat(1, 2, 1).int()
    k_pos[0, 1, 3:S] = -1
    pages, tail = paged(k, v, k_pos, [S, 3], S)
    q, q_pos = torch.randn(1, 4, 1, 32) * 2, torch.tensor([[905]], dtype=torch.int32)
    if form == "auto":
        assert pages_compiled.serves(q, pages, tail, Rules(0.2))
    out, its_mass = attend_pages_with_mass(q, pages, tail, Rules(0.2), q_pos=q_pos)
    at = {"q_pos": q_pos, "k_pos": k_pos}
    near(out, formula(q, k, v, Rules(0.2), **at), allowed(q, k.float(), Rules(0.2), **at, size=v))
    probs = attention_probs(q, k.float(), Rules(0.2), **at).view(1, 4, S + t)
    near(its_mass, probs, 2 * allowed(q, k.float(), Rules(0.2), **at))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_codes_and_a_residual_window_in_16_bits_are_one_softmax(dtype, form):
    backend.use(form)
    q, k, v, at = given(1, 80, dtype)
    keys, values = (quantize(k[:, :, :64], 4, 32, 2), k[:, :, 64:]), (quantize(v[:, :, :70], 4, 16, 3), v[:, :, 70:])
    whole = [torch.cat((dequantize(code, torch.float32), rest), 2) for code, rest in (keys, values)]
    out = attend_quantized(q, keys, values, Rules(0.2), **at, layout="all")
    near(out, formula(q, *whole, Rules(0.2), **at), allowed(q, whole[0], Rules(0.2), **at, size=whole[1]))


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_of_16_bits_is_read_as_it_is(dtype):
    backend.use("auto")
    v = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(1, -1, 1, 16)
    q = torch.zeros(1, v.shape[1], 1, 16)
    one = {"q_pos": torch.zeros(1, 1), "k_pos": torch.zeros(1, 1, 1)}
    assert mass_compiled.serves(q, torch.zeros_like(v), v, Rules(1.0), 1, "tail")
    out = attend(q, torch.zeros_like(v), v, Rules(1.0), **one, layout="all")  # one slot has all of the attention
    assert torch.equal(out.nan_to_num(7.0, 8.0, 9.0), v.float().nan_to_num(7.0, 8.0, 9.0))


@needs_compiler
def test_the_loops_take_slots_of_one_type_only():
    q, k, v, _ = given(5, 9, torch.float16)
    assert rows.serves(q, k, v, Rules(1.0)) and mass_compiled.serves(q[:, :, :1], k, v, Rules(1.0), 1, "tail")
    assert not rows.serves(q, k, v.bfloat16(), Rules(1.0)) and not rows.serves(q.half(), k, v, Rules(1.0))
    assert not mass_compiled.serves(q[:, :, :1].half(), k, v, Rules(1.0), 1, "tail")


@pytest.mark.parametrize("form", FORMS)
def test_a_decoded_token_makes_nothing_of_the_slots_size_in_float32(form):
    backend.use(form)
    S = 1 << 13
    q, k, v, at = given(1, S, torch.float16)
    q_pos, where = at["q_pos"], {**at, "k_pos": at["k_pos"].expand(-1, 2, -1)}
    held = torch.full((4,), S)
    flat = [x.flatten(0, 2) for x in (k, v, where["k_pos"].int())]
    pages = Pages(*flat, torch.arange(4 * S, dtype=torch.int32), held.cumsum(0) - held, held, S)
    tail = (*(x[:, :, :3] for x in (k, v)), where["k_pos"][:, :, :3])
    steps = {
        "all": lambda: attend(q, k, v, Rules(1.0), **at, layout="all"),
        "positions": lambda: attend(q, k, v, Rules(1.0, window=99), **at),
        "mass": lambda: attend_with_mass(q, k, v, Rules(1.0), 1, **at, layout="tail"),
        "pages": lambda: attend_pages(q, pages, tail, Rules(1.0), q_pos=q_pos),
        "codes": lambda: attend_quantized(q, (None, k), (None, v), Rules(1.0), **at, layout="all"),
    }
    for name, step in steps.items():
        with Largest() as largest:
            step()
        assert 0 < largest.elements < k.numel() // 2, name


def test_a_prompt_over_16_bit_slots_takes_the_compiled_rows(monkeypatch):
    if compiled.library() is None:
        pytest.skip("no C++")
    backend.use("auto")
    q, k, v, at = given(20, 20, torch.bfloat16)
    monkeypatch.setattr(mixed.reference, "attend_positions", None)  # it would be called in vain
    expected = formula(q, k, v, Rules(0.2), **at)
    near(attend(q, k, v, Rules(0.2), **at, layout="causal"), expected, allowed(q, k.float(), Rules(0.2), **at, size=v))
