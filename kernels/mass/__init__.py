"""Attention probabilities and their column sums, without an [n, n] matrix."""

from kernels.mass.reference import attention_probs, mass

__all__ = ["attention_probs", "mass"]
