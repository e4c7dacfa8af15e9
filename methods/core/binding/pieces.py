"""A prompt cut as its method reads it: no pass crosses a multiple of its chunk, counted by each row's own tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from methods.core.errors import UserError

if TYPE_CHECKING:
    from methods.core.binding.passes import Bound

#: what a model is called with that has a column per new token, and on which dimension
COLUMNS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "token_type_ids": 1}
#: what it gives that has a column per new token
OUTPUTS = ("logits", "last_hidden_state")
#: what it gives only of a whole prompt
REFUSED = ("labels", "output_hidden_states")


def pieces_of(cache: Bound, part: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of the part of the model that a pass becomes; none: the pass as it is.

    Raises UserError for what a prompt in pieces cannot be asked for.
    """
    new = next(
        (x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if isinstance(x, Tensor)), None
    )
    chunk = None if new is None else cache.chunk(new.shape[1])
    if new is None or chunk is None:
        return []
    (B, T), seen, mask = new.shape[:2], cache.get_seq_length(), kwargs.get("attention_mask")
    real = torch.ones(B, T, dtype=torch.bool, device=new.device)
    if isinstance(mask, Tensor):
        if mask.dim() != 2:
            raise UserError("attention_mask: a prompt is read in chunks of the method's own; give a mask [B, tokens]")
        real = mask[:, seen : seen + T].bool()
    ends = ends_of(real, cache.counts, chunk)
    if len(ends) == 1:
        return []
    given = inspect.signature(part.forward).bind_partial(*args, **kwargs).arguments
    named = {**{k: v for k, v in given.items() if k != "kwargs"}, **given.get("kwargs", {})}
    if asked := [name for name in REFUSED if named.get(name) is not None and named[name] is not False]:
        raise UserError(f"{asked[0]}: a prompt is read in chunks of the method's own, and there is none of the whole")
    pieces = []
    for first, end in zip([0, *ends], ends, strict=False):
        piece = dict(named)
        for name, dim in COLUMNS.items():
            if isinstance(x := named.get(name), Tensor):
                piece[name] = x.narrow(dim, first, end - first)
        if isinstance(mask, Tensor):
            piece["attention_mask"] = mask[:, : seen + end]
        pieces.append(piece)
    return pieces


def ends_of(real: Tensor, before: Tensor | None, chunk: int) -> list[int]:
    """Columns behind which some row has a multiple of `chunk` tokens, ascending, and the last column's end.

    real [B, T]: which columns are tokens.  before [B]: tokens of each row that came earlier. Waits for the device.
    """
    counts = real.cumsum(-1) + (0 if before is None else before[:, None])
    full = (real & (counts % chunk == 0)).any(0)
    ends = (full.nonzero().flatten() + 1).tolist()
    return ends if ends and ends[-1] == real.shape[1] else [*ends, real.shape[1]]


def joined(outputs: Sequence[Any], last: Any) -> Any:
    """The last pass's output with what the earlier ones gave of their columns before it."""
    for name in OUTPUTS:
        columns = [getattr(one, name, None) for one in (*outputs, last)]
        if all(isinstance(x, Tensor) for x in columns):
            last[name] = torch.cat(columns, dim=1)
    return last
