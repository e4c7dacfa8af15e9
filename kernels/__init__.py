"""Tensor operations under the cache: each op is a folder with its signature, its definition and its fast forms."""

from kernels.attend import (
    Layout,
    Pages,
    Rules,
    attend,
    attend_pages,
    attend_pages_with_mass,
    attend_with_lse,
    merged,
    merged_all,
    visible,
)
from kernels.attend.chosen import attend_chosen
from kernels.mass import (
    Attended,
    Sums,
    attend_with_mass,
    attend_with_sums,
    attention_probs,
    ema_weights,
    mass,
    moments,
    noisy_mass,
    noisy_rows,
    seen_by,
    weighted_mass,
)
from kernels.noise import Stem, gumbel, uniform
from kernels.rotate import rotate
from kernels.select import lowest, top

__all__ = [
    "Attended", "Layout", "Pages", "Rules", "Stem", "Sums", "attend", "attend_chosen", "attend_pages",
    "attend_pages_with_mass", "attend_with_lse", "attend_with_mass", "attend_with_sums", "attention_probs",
    "ema_weights", "gumbel", "lowest", "mass", "merged", "merged_all", "moments", "noisy_mass", "noisy_rows", "rotate",
    "seen_by", "top", "uniform", "visible", "weighted_mass",
]  # fmt: skip
