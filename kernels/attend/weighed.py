"""`attend` over slots that weigh: a bias is added to a slot's logits, and a factor multiplies its value.

Both are float32, [B, H or 1, S], or None where nothing is added or multiplied. A slot that stands for n equal ones has
the bias log(n); a bias of -inf hides it. The output is sum(p * factor * v), where p is the softmax of all logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attend import compiled
from kernels.attend.pages import Pages
from kernels.attend.reference import BLOCK_ELEMENTS, averages, logits, visible
from kernels.compiled import on_compiled

if TYPE_CHECKING:
    from kernels.attend.rules import Rules


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    """Output [B, Hq, T, Dv]; one query in C++, float32 without a factor in PyTorch's own kernel, else by its rows."""
    if (one := of_one_query(q, k, v, rules, q_pos, k_pos, bias, factor)) is not None:
        return one[0]
    B, Hq, T, _ = q.shape
    form = _masked if rules.plain and factor is None and q.dtype == k.dtype == torch.float32 else _rows
    size = max(1, BLOCK_ELEMENTS // max(1, B * Hq * k.shape[2]))
    out = q.new_empty(B, Hq, T, v.shape[-1])
    for i in range(0, T, size):
        now = slice(i, i + size)
        out[:, :, now] = form(q[:, :, now], k, v, rules, q_pos[:, now], k_pos, bias, factor)
    return out


def of_one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Output and attention [B, Hq, S] of one query per row, where the loops in C++ take it."""
    H = k.shape[1]
    tail = k, v, k_pos.expand(-1, H, -1).to(torch.int32)
    pages = Pages.none(k, v)
    weights = [x for x in (bias, factor) if x is not None]
    if q.shape[2] != 1 or not compiled.serves(q, pages, tail, rules) or not on_compiled(*weights):
        return None
    return compiled.attend_pages(q, pages, tail, rules, q_pos, bias, factor)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None, _: None
) -> Tensor:
    Hq, H = q.shape[1], k.shape[1]
    seen = visible(q_pos, k_pos, rules.window)  # [B, H or 1, T, S]
    mask = torch.where(seen, 0.0 if bias is None else bias[:, :, None], -torch.inf)
    if mask.shape[1] not in (1, Hq):
        mask = mask.repeat_interleave(Hq // H, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rules.scale, enable_gqa=Hq != H)
    return out.nan_to_num(0.0)  # a query that sees nothing


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    p = logits(q, k, rules, q_pos, k_pos, bias).softmax(-1).nan_to_num(0.0)  # [B, H, G, T, S]
    if factor is not None:
        p = p * factor[:, :, None, None]
    p = p.to(q.dtype)
    return averages(p.reshape(*p.shape[:2], -1, p.shape[-1]), v).view(*q.shape[:3], v.shape[-1])
