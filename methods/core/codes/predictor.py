"""A token's numbers as a linear map of others of the same token, such as those of the layer below."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from methods.core.codes.form import joined, parted


class Predictor:
    """weight @ [all channels of all given tensors] + bias, for every token by itself."""

    def __init__(self, weight: Tensor, bias: Tensor):
        """weight [H * D, inputs], bias [H * D]: of all heads of what is predicted."""
        self.weight, self.bias = weight, bias

    def __call__(self, D: int, *seen: Tensor) -> Tensor:
        """The prediction [b, H, n, D], float32, from tensors [b, H', n, D'], whose channels follow each other."""
        x = torch.cat([joined(one.float()) for one in seen], -1)
        return parted(x @ self.weight.float().T.to(x.device) + self.bias.float().to(x.device), D)

    def tensors(self) -> Iterable[Tensor]:
        """What comes with the method."""
        return self.weight, self.bias
