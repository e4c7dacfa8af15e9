"""How keys, or values, are packed: bits, groups and what stays in full precision; and the sizes that come of it."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.quantize import codes_per_pack
from methods.core.errors import UserError

METADATA = 4  # bytes per group: scale and offset, float16 each


@dataclass(frozen=True)
class Scheme:
    """How keys, or values, are packed.

    bits: per code; 16 packs nothing.  group: elements per scale, along tokens (dim 2) or channels (dim 3, at most the
    head's width).  residual: newest tokens in full precision: exactly so many when sliding, else what is left of whole
    blocks of so many tokens, 0 being blocks of one.  zero: see `quantize`.
    """

    bits: int
    group: int
    dim: int
    residual: int = 0
    sliding: bool = False
    zero: str = "float"

    def due(self, recent: int) -> int:
        """How many of so many tokens in full precision are to be packed now."""
        if self.bits == 16:
            return 0
        if self.sliding:
            return max(0, recent - self.residual)
        return recent - recent % max(1, self.residual)

    def width(self, D: int) -> int:
        """Elements per scale in heads of width D: along channels the largest whole share of D within `group`."""
        if self.dim == 2:
            return self.group
        m = codes_per_pack(self.bits)
        fits = [g for g in range(m, min(self.group, D) + 1, m) if D % g == 0]
        if not fits:
            raise UserError(
                f"method: heads of width {D} cannot be packed at {self.bits} bits in groups of at most {self.group} "
                f"channels; a group is a multiple of {m} that divides the width"
            )
        return fits[-1]

    def nbytes(self, n: int, D: int, itemsize: int) -> int:
        """Bytes of n tokens of one head of width D in a model of so many bytes per number."""
        packed = self.due(n)
        if packed == 0:
            return n * D * itemsize
        return packed * D * self.bits // 8 + packed * D // self.width(D) * METADATA + (n - packed) * D * itemsize


#: bits of keys and values to choose from under a budget, best first; 16 is full precision
LADDER = ((16, 16), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2))


def check_scheme(who: str, key_bits: int | None, value_bits: int | None, group: int | None, zero: str) -> None:
    """Raises UserError naming the knob that cannot work; both bits None: those of the LADDER."""
    if (key_bits is None) != (value_bits is None) or {key_bits, value_bits} - {None, 2, 3, 4, 8, 16}:
        raise UserError(
            f"{who}: method.key_bits={key_bits}, method.value_bits={value_bits}; each is 2, 3, 4, 8, or 16 for full "
            "precision, or both are null where a budget is given"
        )
    m = max((codes_per_pack(bits) for bits in (key_bits or 2, value_bits or 2) if bits != 16), default=1)
    if group is not None and (group < 1 or group % m):
        raise UserError(
            f"{who}: method.store.group={group}; codes fill whole bytes in groups of {m}, {2 * m}, {3 * m}, …"
        )
    if zero not in ("float", "int"):
        raise UserError(f"{who}: method.store.zero={zero}; it is float or int")
