"""Per-token quantization: every token's keys and values with a scale of their own, per head.

Paper: Li et al. 2025, KVTuner, arXiv:2502.04420, section 3: the mode per-token-asym, and the plain baseline.
Idea:  all channels of one token in one head share a scale and an offset. Nothing waits for later tokens, so nothing
       stays in full precision: a token is packed after the step that brought it.
Here:  keys are packed after RoPE, and a token's own step attends to it in full precision, as in the authors' code.
       Codes are really packed, where the code holds a byte for every width. group < head's width splits it further.
       Given a budget in place of bits: 8, 4 or 2 bits for keys and no more for values, the most bits that fit.
"""

from __future__ import annotations

import sys

from methods.core.errors import UserError
from methods.core.stores.quantized import QuantizedStore
from methods.core.stores.scheme import LADDER, Scheme, check_scheme


class PerToken(QuantizedStore):
    """Slots as low-bit codes, one scale per token and head.

    key_bits, value_bits: 2, 3, 4, 8, or 16 for full precision; None: the most that fit the budget.
    group: channels per scale; None: the whole head.  residual: newest tokens in full precision.
    zero: "float" puts a group's minimum on its grid, "int" makes zero a grid point.
    """

    def __init__(
        self,
        key_bits: int | None = 4,
        value_bits: int | None = 4,
        group: int | None = None,
        residual: int = 0,
        zero: str = "float",
        budget: float | None = None,
        capacity: int | None = None,
    ):
        check_scheme("PerToken", key_bits, value_bits, group, zero)
        if residual < 0:
            raise UserError(f"PerToken: method.store.residual={residual}; it is a number of tokens, 0 or more")

        def pair(k: int, v: int) -> tuple[Scheme, Scheme]:
            width = sys.maxsize if group is None else group
            return Scheme(k, width, 3, residual, True, zero), Scheme(v, width, 3, residual, True, zero)

        if key_bits is not None and value_bits is not None:
            super().__init__([pair(key_bits, value_bits)], None, capacity)
        else:
            super().__init__([pair(k, v) for k, v in LADDER], budget, capacity)
