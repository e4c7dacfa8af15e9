"""Which slots to keep: masks from scores, and ragged pages from masks.

There is one form, for every device: sorting, running sums and scattering are kernels of PyTorch's own, and a cache asks
for them when its prompt ends, not at every token.
"""

from kernels.select.reference import compact, pages, top

__all__ = ["compact", "pages", "top"]
