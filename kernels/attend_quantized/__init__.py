"""Attention over packed slots followed by recent ones in full precision, in one softmax.

q [B, Hq, T, D]. Keys and values are each a pair: packed codes of the oldest slots, or None, and the rest as tensors
[B, H, r, D]; both pairs hold the same S slots in the same order, but may be cut at different places. Keys may be
grouped along tokens or channels, values along channels. Positions as in `attend`: q_pos [B, T]; k_pos [B, H or 1, S].
"""

from torch import Tensor

from kernels import reads
from kernels.attend.rules import Layout, Rules
from kernels.attend_quantized import compiled, reference
from kernels.backend import on_triton
from kernels.quantize import Packed


@reads.counted(reads.codes)
def attend_quantized(
    q: Tensor,
    keys: tuple[Packed | None, Tensor],
    values: tuple[Packed | None, Tensor],
    rules: Rules,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: Layout = "positions",
) -> Tensor:
    """Attention output [B, Hq, T, Dv] in q's dtype; rows that see no slot give 0. layout: "all" or "positions"."""
    if on_triton(q, keys[1], values[1]):
        from kernels.attend_quantized import triton

        if triton.works_on(keys, values):
            return triton.attend_quantized(q, keys, values, rules, q_pos, k_pos, layout)
    form = compiled.products() if compiled.serves(q, keys, values) else None
    return reference.attend_quantized(q, keys, values, rules, q_pos, k_pos, layout, form)


__all__ = ["attend_quantized"]
