"""The definition of `attend`, in PyTorch: blocks of queries, never a [T, S] matrix for a whole prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kernels.attend.pages import Pages
    from kernels.attend.rules import Rules

# elements of one block's [rows, S] scores; 2**22 float32 are 16 MiB
BLOCK_ELEMENTS = 1 << 22
# slots in 16 bits under float32 queries: elements that are float32 at once, 1 MiB of them
WIDENED = 1 << 18


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None = None) -> Tensor:
    """Which slots a query may see, [B, H or 1, T, S], from q_pos [B, T] and k_pos [B, H or 1, S]."""
    distance = q_pos[:, None, :, None] - k_pos[:, :, None, :]  # [B, H or 1, T, S]
    seen = (distance >= 0) & (k_pos >= 0)[:, :, None, :]
    return seen if window is None else seen & (distance < window)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q [..., R, D] times k [..., S, D], in q's type: [..., R, S]; slots of another type in blocks."""
    if q.dtype == k.dtype:
        return q @ k.transpose(-1, -2)
    x = q.new_empty(*q.shape[:-1], k.shape[-2])
    for at, block in _widened(k, q.dtype):
        x[..., at : at + block.shape[-2]] = q @ block.transpose(-1, -2)
    return x


def averages(p: Tensor, v: Tensor) -> Tensor:
    """p [..., R, S] over v [..., S, D], in p's type: [..., R, D]; v as the keys of `products`."""
    if p.dtype == v.dtype:
        return p @ v
    out = p.new_zeros(*p.shape[:-1], v.shape[-1])
    for at, block in _widened(v, p.dtype):
        out = out + p[..., at : at + block.shape[-2]] @ block
    return out


def _widened(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Blocks of slots of x [..., S, D] in another type, and where they begin."""
    size = max(1, WIDENED // max(1, x[..., :1, :].numel()))
    for at in range(0, x.shape[-2], size):
        yield at, x[..., at : at + size, :].to(dtype)


def logits(q: Tensor, k: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None = None) -> Tensor:
    """Masked scores before the softmax, [B, H, G, T, S], float32; unseen slots are -inf. bias: as in `weighed`."""
    B, Hq, T, D = q.shape
    H = k.shape[1]
    G = Hq // H
    x = products(q.reshape(B, H, G * T, D), k).view(B, H, G, T, -1).float() * rules.scale
    if rules.softcap is not None:
        x = torch.tanh(x / rules.softcap) * rules.softcap
    if rules.slopes is not None:
        distance = q_pos[:, None, None, :, None] - k_pos[:, :, None, None, :]  # [B, H or 1, 1, T, S]
        x = x - rules.slopes.view(1, H, G, 1, 1) * distance
    if bias is not None:
        x = x + bias[:, :, None, None]
    return x.masked_fill(~visible(q_pos, k_pos, rules.window)[:, :, None], -torch.inf)


def attend_all(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """Every query sees every slot."""
    B, Hq, T, D = q.shape
    H = k.shape[1]
    if T == 1 and Hq != H:  # the group's heads become rows, so K and V are read once
        out = F.scaled_dot_product_attention(q.view(B, H, Hq // H, D), k, v, scale=rules.scale)
        return out.reshape(B, Hq, 1, v.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, scale=rules.scale, enable_gqa=Hq != H)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """q and k are the same tokens, none of them padding."""
    T = q.shape[2]
    if rules.window is not None and rules.window < T:
        pos = torch.arange(T, device=q.device)[None]  # [1, T]
        return attend_positions(q, k, v, rules, pos, pos[:, None])
    return F.scaled_dot_product_attention(
        q, k, v, scale=rules.scale, is_causal=T > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend_positions(q: Tensor, k: Tensor, v: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Visibility from positions, in blocks of queries."""
    B, Hq, T, _ = q.shape
    H, S = k.shape[1], k.shape[2]
    masks_alone = rules.plain and q.dtype == k.dtype
    rows = max(1, BLOCK_ELEMENTS // max(1, S * B * (H if masks_alone else Hq)))
    out = q.new_empty(B, Hq, T, v.shape[-1])
    for i in range(0, T, rows):
        q_block, pos_block = q[:, :, i : i + rows], q_pos[:, i : i + rows]
        out[:, :, i : i + rows] = _block(q_block, k, v, rules, pos_block, k_pos)
    return out


def _block(q: Tensor, k: Tensor, v: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    B, Hq, T, _ = q.shape
    H = k.shape[1]
    if rules.plain and q.dtype == k.dtype:
        seen = visible(q_pos, k_pos, rules.window)
        if seen.shape[1] not in (1, Hq):  # one mask per KV head, repeated for its group
            seen = seen.repeat_interleave(Hq // H, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=rules.scale, enable_gqa=Hq != H)
        return out.nan_to_num(0.0)  # some back ends give NaN to a query without a slot, and NaN would spread
    p = logits(q, k, rules, q_pos, k_pos).softmax(-1).nan_to_num(0.0).to(q.dtype)  # [B, H, G, T, S]
    return averages(p.reshape(B, H, -1, p.shape[-1]), v).view(B, Hq, T, v.shape[-1])


def attend_pages(
    q: Tensor,
    pages: Pages,
    tail: tuple[Tensor, Tensor, Tensor],
    rules: Rules,
    q_pos: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `kernels.attend.attend_pages_with_mass` gives; slots are gathered in blocks, a head beside the others."""
    k_tail, v_tail, tail_pos = tail
    B, Hq, _, D = q.shape
    H, G = k_tail.shape[1], Hq // k_tail.shape[1]
    rows = q.reshape(B * H, G, D)
    row_pos, head = q_pos.expand(B, H).reshape(B * H, 1), torch.arange(B * H, device=q.device) % H
    x = q.new_empty(B * H, G, pages.most + tail_pos.shape[2], dtype=torch.float32)
    for now, places, real in pages.blocks(BLOCK_ELEMENTS):
        k_pos = pages.pos[places].masked_fill(~real, -1)
        more = None if pages.bias is None else pages.bias[places]
        x[..., now] = _page_logits(rows, pages.k[places], k_pos, rules, row_pos, head, more)
    more = None if bias is None else bias.flatten(0, 1)
    x[..., pages.most :] = _page_logits(rows, k_tail.flatten(0, 1), tail_pos.flatten(0, 1), rules, row_pos, head, more)
    p = x.softmax(-1).nan_to_num(0.0)  # [B * H, G, S]
    weights = p.to(q.dtype)
    if factor is not None:
        assert pages.factor is not None, "slots in pages and behind them weigh alike"
        weights = p.clone()
        for now, places, _ in pages.blocks(BLOCK_ELEMENTS):
            weights[..., now] *= pages.factor[places][:, None]
        weights[..., pages.most :] *= factor.flatten(0, 1)[:, None]
        weights = weights.to(q.dtype)
    out = averages(weights[..., pages.most :], v_tail.flatten(0, 1)).float()
    for now, places, _ in pages.blocks(BLOCK_ELEMENTS):
        out += averages(weights[..., now], pages.v[places]).float()
    return out.to(q.dtype).view(B, Hq, 1, -1), p.view(B, Hq, -1)


def _page_logits(
    q: Tensor, k: Tensor, k_pos: Tensor, rules: Rules, q_pos: Tensor, head: Tensor, bias: Tensor | None
) -> Tensor:
    """Masked scores [R, G, s] of q [R, G, D] over k [R, s, D].

    k_pos, bias [R, s], q_pos [R, 1], head [R] the KV head.
    """
    x = products(q, k).float() * rules.scale
    if rules.softcap is not None:
        x = torch.tanh(x / rules.softcap) * rules.softcap
    distance = q_pos - k_pos  # [R, s]
    if rules.slopes is not None:
        x = x - rules.slopes.view(-1, q.shape[1])[head][..., None] * distance[:, None]
    if bias is not None:
        x = x + bias[:, None]
    seen = (k_pos >= 0) & (distance >= 0)
    if rules.window is not None:
        seen &= distance < rules.window
    return x.masked_fill(~seen[:, None], -torch.inf)
