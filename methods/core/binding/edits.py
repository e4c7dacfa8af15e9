"""A model edited for the passes of one method: parts replaced, projections that nobody needs not computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.core.binding.projections import Projection, by_head
from methods.core.contract import ModelSpec

Part = tuple[nn.Module, str, nn.Module]  # owner, the child's name, what stands there instead


@contextmanager
def replaced(parts: Iterable[Part]) -> Iterator[None]:
    """Children replaced inside the block; the very same objects stand there after it, whatever happens."""
    before = []
    try:
        for owner, name, instead in parts:
            before.append((owner, name, owner._modules[name]))
            owner._modules[name] = instead
        yield
    finally:
        for owner, name, was in reversed(before):
            owner._modules[name] = was


class Uncomputed(nn.Module):
    """Stands where a projection is not computed: zeros that take neither time nor memory."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


class SomeHeads(nn.Module):
    """A fused projection of which some heads alone are computed; zeros stand for the others."""

    def __init__(self, weight: Tensor, bias: Tensor | None, heads: Sequence[int]):
        """weight [all heads, D, width], bias [all heads, D] or None; heads: those that are computed."""
        super().__init__()
        self.all, self.heads = weight.shape[0], torch.tensor(heads, device=weight.device)
        self.weight = weight[self.heads].flatten(0, 1)
        self.bias = None if bias is None else bias[self.heads].flatten()

    def forward(self, x: Tensor) -> Tensor:
        made = F.linear(x, self.weight, self.bias).unflatten(-1, (len(self.heads), -1))
        out = made.new_zeros(*made.shape[:-2], self.all, made.shape[-1])
        out[..., self.heads, :] = made
        return out.flatten(-2)


def uncomputed(module: nn.Module, spec: ModelSpec, layer: int, which: str) -> list[Part]:
    """Parts to replace so that an attention block leaves some of its projections out: "k", "v" or "kv".

    Raises UserError where the block's weights are not known.
    """
    own = spec.projections(layer)
    parts: list[Part] = []
    left_out: dict[str, set[int]] = {}  # by the child of which other heads are computed
    for name in which:
        one: Projection = getattr(own, name)
        child, heads = one.source
        if heads is None:
            parts.append((module, child, Uncomputed(one.weight.shape[0] * one.weight.shape[1])))
        else:
            left_out.setdefault(child, set()).update(heads.tolist())
    for child, heads_out in left_out.items():
        whole = by_head(module, child, spec.n_heads + 2 * spec.n_kv_heads)
        computed = [head for head in range(len(whole.weight)) if head not in heads_out]
        parts.append((module, child, SomeHeads(whole.weight, whole.bias, computed)))
    return parts
