"""Codes of several channels together: the nearest of a codebook's vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from methods.core.codes.bits import pack, size, unpack
from methods.core.codes.form import Arrays, Form

# distances that exist at once
BLOCK = 1 << 22


class Codebook(Form):
    """Groups of c channels that follow each other, each as the nearest of its codebook's 2 ** bits vectors."""

    def __init__(self, book: Tensor):
        """book [H or 1, groups or 1, 2 ** bits, c]: of every head and group, or one for all."""
        self.book = book.float()
        self.width, self.channels = book.shape[2].bit_length() - 1, book.shape[3]
        assert book.shape[2] == 2**self.width, "a code has whole bits"
        self.norms = self.book.square().sum(-1) / 2  # [H or 1, groups or 1, 2 ** bits]

    @property
    def bits(self) -> float:
        return self.width / self.channels

    def encode(self, x: Tensor, apart: Tensor | None = None) -> dict[str, Tensor]:
        assert x.shape[-1] % self.channels == 0, "groups are whole"
        x = x.unflatten(-1, (-1, self.channels)).permute(2, 0, 1, 3, 4)  # [n, b, H, groups, c]
        book, norms = self.book.to(x.device), self.norms.to(x.device)
        tokens = max(1, BLOCK // (x[:1].numel() // self.channels * book.shape[2]))
        codes = [
            (norms - torch.einsum("nbhgc,hgkc->nbhgk", part, book.expand(*x.shape[2:4], -1, -1))).argmin(-1)
            for part in x.split(tokens)
        ]
        return {"codes": pack(torch.cat(codes).permute(1, 2, 0, 3), self.width)}

    def decode(self, arrays: Arrays, D: int) -> Tensor:
        groups, codes = D // self.channels, arrays["codes"]
        index = unpack(codes, self.width, groups).long()  # [b, H, n, groups]
        book = self.book.to(codes.device).expand(codes.shape[1], groups, -1, -1)
        head, group = torch.arange(len(book), device=codes.device), torch.arange(groups, device=codes.device)
        return book[head[:, None, None], group, index].flatten(-2)

    def nbytes(self, n: int, H: int, D: int) -> int:
        return n * H * size(D // self.channels, self.width)

    def parameters(self) -> Iterable[Tensor]:
        return [self.book]
