"""Random numbers that depend on what they are for, not on when they are drawn."""

from kernels.noise.reference import gumbel, uniform

__all__ = ["gumbel", "uniform"]
