"""Tensor operations under the cache: each op is a folder with its signature, its definition and its fast forms."""

from kernels.attend import Plan, Rules, attend, visible
from kernels.mass import attend_with_mass, attention_probs, mass, noisy_mass
from kernels.noise import Stem, gumbel, uniform
from kernels.select import pages, top

__all__ = [
    "Plan", "Rules", "Stem", "attend", "attend_with_mass", "attention_probs", "gumbel", "mass", "noisy_mass", "pages",
    "top", "uniform", "visible",
]  # fmt: skip
