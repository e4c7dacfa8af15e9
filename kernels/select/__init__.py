"""Which slots to keep: masks from scores, and slots from masks; and which one goes first.

What a cache asks for when its prompt ends has one form, for every device: sorting, running sums and scattering are
kernels of PyTorch's own. What it asks for at every token has a form in C++ too.
"""

from torch import Tensor

from kernels.select import compiled, reference
from kernels.select.reference import compact, top


def lowest(scores: Tensor, pos: Tensor) -> tuple[Tensor, bool]:
    """The slot of each head with the lowest score, at equal ones the newest: [B, H], long; and whether to look closer.

    scores [B, H, S], float32; pos [B, H, S], int32, -1 for padding, which is never taken while a slot is not. A closer
    look is due on a CPU where a slot's score is NaN or -inf.
    """
    if compiled.serves(scores, pos):
        return compiled.lowest(scores, pos)
    return reference.lowest(scores, pos)


def put(buffer: Tensor, slot: Tensor, value: Tensor) -> None:
    """Write value [B, H, ...] into one place of every head of buffer [B, H, places, ...]; slot [B, H], long."""
    if compiled.puts(buffer, slot):
        compiled.put(buffer, slot, value)
    else:
        reference.put(buffer, slot, value)


__all__ = ["compact", "lowest", "put", "top"]
