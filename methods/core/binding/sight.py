"""What the tokens of a bound model may see: the padding mask, and the rule that the model's own mask stands for.

A model hands the function that makes its masks a rule as code: which query sees which key. Causal, alone or with a
sliding window, is what our caches can keep to; the rule travels with the mask to the attention, so that a window that
lives in the mask alone is kept, and a rule that we do not know is refused instead of taken for a causal one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

#: rules seen before, by their code and the numbers in it; a rule is made anew in every forward pass
_known: dict[Any, Sight] = {}


@dataclass(frozen=True)
class Sight:
    """window: tokens that a query sees, itself included; None: all before it.  lawful: whether that is all there is."""

    window: int | None = None
    lawful: bool = True


CAUSAL = Sight()


def mask(
    batch_size: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    mask_function: Callable[..., Any] = causal_mask_function,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The 2-D padding mask [B, columns] over all tokens seen, with the rule on it as `sight`."""
    seen = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if attention_mask is None else (
        attention_mask.view_as(attention_mask)
    )  # fmt: skip
    seen.sight = sight_of(mask_function, local_size)
    return seen


def sight_of(rule: Callable[..., Any], size: int | None) -> Sight:
    """What a mask function lets a query see; size: the window that it is said to have."""
    if rule is causal_mask_function:
        return CAUSAL
    key = (_code(rule), size)
    try:
        if key not in _known:
            _known[key] = _tried(rule, size)
        return _known[key]
    except TypeError:  # it holds tensors: which tokens are of one image, where a chunk begins
        return Sight(lawful=False)


def _tried(rule: Callable[..., Any], size: int | None) -> Sight:
    """The rule of the two that agrees with a mask function wherever the answer could change."""
    w = size or 1
    at = torch.tensor(sorted({0, 1, 2, 5, w - 1, w, w + 1, 2 * w - 1, 2 * w, 2 * w + 1, 3 * w + 2, 7 * w + 3}))
    q, k = at[:, None], at[None, :]
    zero = torch.zeros((), dtype=torch.long)
    try:
        seen = torch.as_tensor(rule(zero, zero, q, k)).expand(len(at), len(at))
    except Exception:  # it asks for more than positions
        return Sight(lawful=False)
    if torch.equal(seen, k <= q):
        return CAUSAL
    if size is not None and torch.equal(seen, (k <= q) & (k > q - size)):
        return Sight(size)
    return Sight(lawful=False)


def _code(part: Any) -> Any:
    """A hashable form of a function and of what is closed over in it; tensors have none that could be found again."""
    if isinstance(part, Tensor):
        return [part]  # unhashable
    if isinstance(part, (list, tuple)):
        return tuple(map(_code, part))
    if hasattr(part, "__code__"):
        return part.__code__, tuple(_code(cell.cell_contents) for cell in part.__closure__ or ())
    return part
