"""Which slots to keep: masks from scores, and ragged pages from masks."""

from kernels.select.reference import compact, pages, top

__all__ = ["compact", "pages", "top"]
