"""Attention probabilities and their column sums, without an [n, n] matrix."""

from kernels.mass.noisy import noisy_mass
from kernels.mass.reference import attend_with_mass, attention_probs, mass

__all__ = ["attend_with_mass", "attention_probs", "mass", "noisy_mass"]
