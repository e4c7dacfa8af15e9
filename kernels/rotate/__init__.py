"""Rotary positions: pairs of channels turned by angles."""

from torch import Tensor

from kernels.backend import on_triton
from kernels.rotate import reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Pairs of channels of x [..., D] turned by angles given as cos and sin; channels beyond R are copied.

    cos, sin: [..., R / 2], float32, with R <= D; they broadcast to x.  interleaved: pairs are neighbours instead of
    halves of the R channels.
    """
    if x.dim() == cos.dim() == sin.dim() == 4 and on_triton(x, cos, sin):
        from kernels.rotate import triton

        return triton.rotate(x, cos, sin, interleaved)
    return reference.rotate(x, cos, sin, interleaved)


__all__ = ["rotate"]
