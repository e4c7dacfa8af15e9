"""KIVI: keys quantized per channel, values per token, the newest tokens in full precision.

Paper: Liu et al. 2024, arXiv:2402.02750, sections 3 and 4.
Idea:  a few channels of the keys are outliers for all tokens, those of the values are not. So `group` consecutive
       tokens of one key channel share a scale, and `group` channels of one token's values. Keys leave full precision
       in whole blocks of `residual` tokens, values one by one when they are `residual` tokens old; what is packed
       stays as it is. The prompt attends to its own keys and values in full precision.
Here:  groups run along the tokens of one row: padding is never quantized. A constant group has scale 1 and codes 0 in
       place of a division by zero; scales and minima are float16 in every model. Heads narrower than `group`, or no
       multiple of it, have narrower groups of channels. values=blocks lets values leave with the keys, as KVTuner's
       mode does. Given a budget in place of bits: 8, 4 or 2 bits for keys and no more for values, and groups of one,
       two or four times `group`, the most bits and then the finest groups that fit; where none does, half the
       residual, and so on.
"""

from __future__ import annotations

from methods.core.errors import UserError
from methods.core.stores.quantized import QuantizedStore
from methods.core.stores.scheme import LADDER, Scheme, check_scheme


class KIVI(QuantizedStore):
    """Slots as low-bit codes, except the newest: keys scaled per channel, values per token.

    key_bits, value_bits: 2, 3, 4, 8, or 16 for full precision; None: the most that fit the budget.
    group: elements per scale.  residual: full-precision tokens, a multiple of group.
    values: "sliding" packs a value as soon as it is residual tokens old, "blocks" together with the keys.
    zero: "float" puts a group's minimum on its grid, "int" makes zero a grid point.
    """

    def __init__(
        self,
        key_bits: int | None = 2,
        value_bits: int | None = 2,
        group: int = 32,
        residual: int = 128,
        values: str = "sliding",
        zero: str = "float",
        budget: float | None = None,
        capacity: int | None = None,
    ):
        check_scheme("KIVI", key_bits, value_bits, group, zero)
        if residual < group or residual % group:
            raise UserError(
                f"KIVI: method.store.residual={residual}, method.store.group={group}; keys leave the residual in whole "
                f"groups, so it is a multiple of group, such as {group * max(1, residual // group)}"
            )
        if values not in ("sliding", "blocks"):
            raise UserError(f"KIVI: method.store.values={values}; it is sliding or blocks")

        def pair(k: int, v: int, g: int, r: int) -> tuple[Scheme, Scheme]:
            return Scheme(k, g, 2, r, zero=zero), Scheme(v, g, 3, r, sliding=values == "sliding", zero=zero)

        if key_bits is not None and value_bits is not None:
            super().__init__([pair(key_bits, value_bits, group, residual)], None, capacity)
            return
        schemes, r = [], residual
        while r >= group:
            schemes += [pair(k, v, g, r) for k, v in LADDER for g in (group, 2 * group, 4 * group) if r % g == 0]
            r = r // 2 // group * group
        super().__init__(schemes, budget, capacity)
