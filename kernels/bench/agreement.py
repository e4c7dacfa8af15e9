"""Whether the ops give what their formulas say, in every form that runs here: before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend, compiled
from kernels.attend import Pages, Rules, attend, attend_pages, attend_pages_with_mass, attend_with_lse
from kernels.attend_quantized import attend_quantized
from kernels.bounds import bound
from kernels.mass import attend_with_mass, mass, noisy_mass, weighted_mass
from kernels.noise import Stem
from kernels.quantize import dequantize, quantize
from kernels.rotate import rotate


@dataclass(frozen=True)
class Check:
    """error: largest difference from the formula.  tolerance: what rounding explains of it."""

    op: str
    form: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference; not where there is a NaN."""
        return self.error <= self.tolerance


def forms(device: torch.device) -> list[str]:
    """What `backend.use` takes so that every form that runs on the device has its turn."""
    if backend.interpreted():
        return ["reference", "triton"]
    return ["reference"] if compiled.name_on(device) == "reference" else ["reference", "auto"]


def checks(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Check]:
    """Every op on random inputs of odd sizes, against dense formulas in float64."""
    chosen = backend.chosen()
    for form in forms(device):
        backend.use(form)
        try:
            name = compiled.name_on(device)
            # the definition rounds logits to the inputs' type, Triton does not
            scores = torch.float32 if name.startswith("triton") else dtype
            for op, out, expected, tolerance in results(device, dtype, scores, torch.Generator().manual_seed(seed)):
                yield Check(op, name, (out.double() - expected.double()).abs().max().item(), tolerance)
        finally:
            backend.use(chosen)


def probabilities(
    q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Rows of the softmax, [B, Hq, T, S], float64; 0 where nothing is seen. noise: added to the logits."""
    G = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(G, dim=1)
    k_pos = k_pos.expand(len(k_pos), k.shape[1] // G, -1).repeat_interleave(G, dim=1)
    x = q.double() @ k.transpose(-1, -2) * rules.scale
    if rules.softcap is not None:
        x = torch.tanh(x / rules.softcap) * rules.softcap
    distance = q_pos[:, None, :, None] - k_pos[:, :, None]
    if rules.slopes is not None:
        x = x - rules.slopes.double()[:, None, None] * distance
    if noise is not None:
        x = x + noise
    seen = (distance >= 0) & (k_pos >= 0)[:, :, None]
    if rules.window is not None:
        seen &= distance < rules.window
    return x.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


def results(
    device: torch.device, dtype: torch.dtype, scores: torch.dtype, g: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(op, what it gives, what the formula gives, how far rounding may take it from there); scores: type of logits."""
    B, Hq, H, S, T, D = 2, 4, 2, 97, 7, 64

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    q, k, v = random(B, Hq, T, D), random(B, H, S, D), random(B, H, S, D)
    q_pos = torch.arange(S - T, S, dtype=torch.int32, device=device).repeat(B, 1)
    k_pos = torch.arange(S, dtype=torch.int32, device=device).repeat(B, H, 1)
    at = {"q_pos": q_pos, "k_pos": k_pos}
    plain = Rules(D**-0.5)
    every = Rules(D**-0.5, softcap=2.0, window=40, slopes=torch.rand(Hq, generator=g).to(device))
    values = v.double().repeat_interleave(Hq // H, dim=1)

    logits = q.double() @ k.double().repeat_interleave(Hq // H, dim=1).transpose(-1, -2) * plain.scale
    # of slots that count: the other rules make logits smaller, other keys and codes are about as large
    largest = logits.abs().max().item()

    def off(size: Tensor, logit: float = largest) -> float:
        return bound(dtype, S + 3, logit, size=size.abs().max().item(), width=D, scores=scores)

    p = probabilities(q, k, plain, **at)
    out, lse = attend_with_lse(q, k, v, plain, **at)
    yield "attend", out, p @ values, off(v)
    hidden = q_pos[:, None, :, None] < k_pos.repeat_interleave(Hq // H, dim=1)[:, :, None]
    yield "log-sum-exp", lse, logits.masked_fill(hidden, -torch.inf).logsumexp(-1), off(torch.ones(()))
    holes = k_pos.clone()
    holes[:, :, ::5], holes[1] = -1, -1
    under = {"q_pos": q_pos, "k_pos": holes}
    yield "attend, every rule", attend(q, k, v, every, **under), probabilities(q, k, every, **under) @ values, off(v)
    last = {"q_pos": q_pos[:, -1:], "k_pos": k_pos}
    yield "attend, one token", attend(q[:, :, -1:], k, v, plain, **last, layout="all"), p[:, :, -1:] @ values, off(v)

    sums = p.sum(2)
    yield "mass", mass(q, k, plain, **at, layout="tail"), sums, off(sums)
    sums = probabilities(q, k, every, **under).sum(2)
    yield "mass, every rule", mass(q, k, every, **under), sums, off(sums)
    weights = torch.rand(B, T, generator=g).to(device)
    sums = (p.square() * weights.double()[:, None, :, None]).sum(2)
    out = weighted_mass(q, k, plain, **at, weights=weights, squared=True)
    yield "weighted_mass, squares", out, sums, 2 * off(sums)  # a square is off by twice as much
    out, mass_out = attend_with_mass(q, k, v, plain, 3, **at, layout="tail")
    sums = p[:, :, -3:].sum(2)
    yield "attend_with_mass, output", out, p @ values, off(v)
    yield "attend_with_mass, sums", mass_out, sums, off(sums)
    rows, heads = torch.arange(B, device=device), torch.arange(Hq, device=device)
    stem = Stem.of(1, rows[:, None, None], heads[:, None], q_pos[:, None])
    u = stem.state[..., None], k_pos.repeat_interleave(Hq // H, dim=1)[:, :, None]
    noise = -(-Stem(u[0]).log_uniform(u[1]).double()).log()
    sums = probabilities(q, k, plain, **at, noise=noise).sum(2)
    yield "noisy_mass", noisy_mass(q, k, plain, stem, **at), sums, off(sums, largest + noise.abs().max().item())

    keep = torch.rand(B * H, S, generator=g).to(device) < torch.linspace(0.1, 0.9, B * H, device=device)[:, None]
    kept, n_held = keep.flatten().nonzero()[:, 0], keep.sum(-1)
    order = torch.randperm(len(kept), generator=g).to(device)
    places = torch.empty_like(order).index_copy(0, order, torch.arange(len(kept), device=device))
    flat = [x.reshape(B * H * S, -1)[kept[order]] for x in (k, v)]
    most = int(n_held.max())
    paged = Pages(flat[0], flat[1], (kept[order] % S).int(), places.int(), n_held.cumsum(0) - n_held, n_held, most)
    k_tail, v_tail = random(B, H, 3, D), random(B, H, 3, D)
    tail_pos = torch.arange(S, S + 3, dtype=torch.int32, device=device).repeat(B, H, 1)
    held = {"q_pos": q_pos[:, -1:] + 3, "k_pos": torch.cat((torch.where(keep.view(B, H, S), k_pos, -1), tail_pos), 2)}
    p_held = probabilities(q[:, :, -1:], torch.cat((k, k_tail), 2), plain, **held)
    expected = p_held @ torch.cat((v, v_tail), 2).double().repeat_interleave(Hq // H, dim=1)
    tail = (k_tail, v_tail, tail_pos)
    out = attend_pages(q[:, :, -1:], paged, tail, plain, q_pos=held["q_pos"])
    yield "attend_pages", out, expected, off(torch.cat((v, v_tail), 2))
    out, its_mass = attend_pages_with_mass(q[:, :, -1:], paged, tail, plain, q_pos=held["q_pos"])
    yield "attend_pages_with_mass, output", out, expected, off(torch.cat((v, v_tail), 2))
    order = keep.view(B, H, S).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    order = torch.cat((order, torch.arange(S, S + 3, device=device).expand(B, H, 3)), -1)
    in_order = p_held[:, :, 0].gather(2, order.repeat_interleave(Hq // H, dim=1))
    yield "attend_pages_with_mass, mass", its_mass, in_order, off(in_order)

    turn = 6.28 * torch.rand(B, 1, S, D // 4, generator=g).to(device)  # half of the channels
    pairs = torch.complex(*k[..., : D // 2].double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(turn), turn)
    expected = torch.cat((pairs.real, pairs.imag, k[..., D // 2 :].double()), dim=-1)
    yield "rotate", rotate(k, turn.cos(), turn.sin()), expected, 2 * off(k, 0.0)  # a pair is two terms

    for bits in (2, 3, 4, 8):
        n = 64
        keys = quantize(k[:, :, :n], bits, 32, 2), k[:, :, n:]
        vals = quantize(v[:, :, :n], bits, 32, 3), v[:, :, n:]
        low, high = k[:, :, :n].double().unflatten(2, (2, 32)).aminmax(dim=3)
        half = (high - low) / (2**bits - 1) / 2
        miss = (dequantize(keys[0]).double() - k[:, :, :n].double()).unflatten(2, (2, 32)).abs().amax(3)
        # at most half a step, and a twentieth of that for scales and offsets in float16
        yield (
            f"quantize, {bits} bits",
            (miss / half).clamp_min(1.05),
            torch.full_like(miss, 1.05),
            off(miss / half, 0.0),
        )
        p_codes = probabilities(q, torch.cat((dequantize(keys[0]), keys[1].float()), 2), plain, **at)
        whole = torch.cat((dequantize(vals[0]), vals[1].float()), 2).double().repeat_interleave(Hq // H, dim=1)
        out = attend_quantized(q, keys, vals, plain, **at)
        yield f"attend_quantized, {bits} bits", out, p_codes @ whole, off(whole)
