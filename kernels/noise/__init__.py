"""Random numbers that depend on what they are for, not on when they are drawn."""

from kernels.noise.reference import Stem, gumbel, uniform

__all__ = ["Stem", "gumbel", "uniform"]
