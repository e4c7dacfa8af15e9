"""The definition of `mass`: rows of the softmax in blocks of queries, summed over the queries."""

import torch
from torch import Tensor

from kernels import reads
from kernels.attend import attend
from kernels.attend.reference import logits
from kernels.attend.rules import Rules

# elements of one block's scores, and query rows that it has at least: measured fastest where a block stays in the cache
BLOCK_ELEMENTS, LEAST_ROWS = 1 << 20, 8


@reads.counted(reads.keys)
def attention_probs(
    q: Tensor, k: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Attention probabilities [B, H, G, T, S], float32; for few queries. A query at -1 or that sees nothing gives 0."""
    p = logits(q, k, rules, q_pos, k_pos, bias).softmax(-1)
    return p.nan_to_num(0.0)


def mass(q: Tensor, k: Tensor, rules: Rules, *, q_pos: Tensor, k_pos: Tensor, layout: str = "positions") -> Tensor:
    """Attention that each slot receives from the queries, summed over them: [B, Hq, S], float32.

    q [B, Hq, T, D], k [B, H, S, D], q_pos [B, T], k_pos [B, H or 1, S]. A query with position -1 gives nothing.
    layout="tail": no slot is padding and the queries are the newest slots in order, so only the corner needs a mask.
    """
    q, k = q.detach(), k.detach()
    if layout == "tail" and rules.plain and rules.window is None and q.dtype == k.dtype:
        return _tail(q, k, None, rules.scale)[0]
    B, Hq, T, _ = q.shape
    H, S = k.shape[1], k.shape[2]
    out = torch.zeros(B, H, Hq // H, S, device=q.device)
    step = _block_rows(B * Hq * S)
    for i in range(0, T, step):
        rows = slice(i, i + step)
        out += attention_probs(q[:, :, rows], k, rules, q_pos=q_pos[:, rows], k_pos=k_pos).sum(dim=3)
    return out.view(B, Hq, S)


def attend_with_mass(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, n: int, *, q_pos: Tensor, k_pos: Tensor, layout: str = "positions"
) -> tuple[Tensor, Tensor]:
    """What `attend` gives, and `mass` of the newest n of the queries, together where layout="tail" allows it."""
    T, S = q.shape[2], k.shape[2]
    at, rest = {"q_pos": q_pos[:, T - n :], "k_pos": k_pos}, T - n
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if layout != "tail" or not rules.plain or rules.window is not None or training or q.dtype != k.dtype:
        out = attend(q, k, v, rules, q_pos=q_pos, k_pos=k_pos)
        return out, mass(q[:, :, rest:], k, rules, **at, layout=layout)
    if rest == 0:
        sums, out = _tail(q, k, v, rules.scale)
        return out, sums
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    q_old, k_old, v_old = q[:, :, :rest], k[:, :, : S - n], v[:, :, : S - n]
    old = {"q_pos": q_pos[:, :rest], "k_pos": k_pos[..., : S - n]}
    out[:, :, :rest] = attend(q_old, k_old, v_old, rules, **old, layout="causal" if T == S else "positions")
    sums, out[:, :, rest:] = _tail(q[:, :, rest:], k, v, rules.scale)
    return out, sums


def _tail(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Column sums [B, Hq, S] of queries that are the newest T of the S slots, and, given v, their output (else empty).

    One buffer serves all blocks.
    """
    B, Hq, T, D = q.shape
    H, S = k.shape[1], k.shape[2]
    G = Hq // H
    sums = torch.zeros(B * Hq, S, device=q.device)
    out = q.new_empty(B, Hq, T, v.shape[-1] if v is not None else 0)
    k_t = k.transpose(-1, -2).reshape(B * H, D, S)
    q = (q * scale).reshape(B, H, G, T, D)
    rows = min(T, _block_rows(B * Hq * S))
    scores = torch.empty(B * Hq * rows * S, dtype=q.dtype, device=q.device)
    probs = scores if q.dtype == sums.dtype else torch.empty_like(scores, dtype=sums.dtype)
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    for i in range(0, T, rows):
        t = min(rows, T - i)
        n = S - T + i + t  # slots that the block's last query sees
        x = scores[: B * Hq * t * n].view(B * H, G * t, n)
        torch.bmm(q[:, :, :, i : i + t].reshape(B * H, G * t, D), k_t[:, :, :n], out=x)
        x = x.view(B * Hq, t, n)
        x[..., n - t :].masked_fill_(future[:t, :t], -torch.inf)
        p = probs[: x.numel()].view(x.shape)
        torch.softmax(x, -1, dtype=p.dtype, out=p)
        sums[:, :n] += p.sum(dim=1)
        if v is not None:
            y = p.view(B * H, G * t, n).to(v.dtype) @ v[:, :, :n].reshape(B * H, n, -1)
            out[:, :, i : i + t] = y.view(B, Hq, t, -1)
    return sums.view(B, Hq, S), out


def _block_rows(elements: int) -> int:
    """Query rows per block, given the elements of one row's scores."""
    return max(LEAST_ROWS, BLOCK_ELEMENTS // max(1, elements))
