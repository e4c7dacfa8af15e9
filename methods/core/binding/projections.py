"""The weights of an attention block, found by name and taken only where they give what the block computes.

A short pass of random tokens shows each layer's input, its queries and keys before RoPE, its values and its output. A
projection is what turns the one into the other: of the ways in which a model may write it down, separate or fused, with
biases, norms and a factor, the first that does is taken, and a model of which none does is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.bounds import bound
from methods.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from methods.core.contract import ModelSpec

SEPARATE = {"q": ("q_proj", "query", "wq", "q_lin"), "k": ("k_proj", "key", "wk", "k_lin"),
            "v": ("v_proj", "value", "wv", "v_lin")}  # fmt: skip
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "att_proj")
OUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin")
NORMS = ("{}_norm", "{}_layernorm", "{}_ln", "norm_{}")
TOKENS = 12  # of the pass that shows what a block computes
WIDE = 64  # terms whose rounding adds up to what sums of the model's width are off by


@dataclass(frozen=True)
class Projection:
    """From a block's input to the vectors of its heads, or, for the output, from these to what the block gives.

    weight [heads, D, width]: of a head's channel over the model's; in the model's dtype, and dequantized.
    bias: [heads, D], of the output [width], or None.  norm: what is applied to [..., heads, D] afterwards, or None.
    source: the block's child that holds it, and which of its heads they are, [heads], where it holds others too.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    source: tuple[str, Tensor | None] = ("", None)

    def __call__(self, x: Tensor) -> Tensor:
        """Heads' vectors [..., heads, D] of inputs [..., width]."""
        out = torch.einsum("...m,hdm->...hd", x, self.weight.to(x.dtype))
        out = out if self.bias is None else out + self.bias.to(x.dtype)
        return out if self.norm is None else self.norm(out)

    def back(self, heads: Tensor) -> Tensor:
        """What the block gives, [..., width], of heads' vectors [..., heads, D]: for the output's projection."""
        out = torch.einsum("...hd,hdm->...m", heads, self.weight.to(heads.dtype))
        return out if self.bias is None else out + self.bias.to(heads.dtype)


@dataclass(frozen=True)
class Projections:
    """Those of one layer: queries [Hq, D, M], keys and values [H, D, M], output [Hq, Dv, M]."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection


#: of every model that was asked: its layers' projections, for as long as it lives
Found = list[Projections]
_found: weakref.WeakKeyDictionary[nn.Module, Found] = weakref.WeakKeyDictionary()


def projections_of(
    model: PreTrainedModel, spec: ModelSpec, kind: str, modules: Sequence[nn.Module]
) -> list[Projections]:
    """Those of every layer of a bound model; kind: its type, modules: its attention blocks.

    Raises UserError by name where they are not known.
    """
    if model not in _found:
        seen = _watch(model, modules)
        _found[model] = [_of(spec, kind, *layer, i) for i, layer in enumerate(zip(modules, seen, strict=True))]
    return _found[model]


def _of(spec: ModelSpec, kind: str, module: nn.Module, seen: _Seen, layer: int) -> Projections:
    for forms in _inputs(module, spec):
        q, k, v = (_fit(one, seen.hidden, made) for one, made in zip(forms, (seen.q, seen.k, seen.v), strict=True))
        if q is not None and k is not None and v is not None:
            break
    else:
        raise _unknown(kind, layer, "queries, keys and values")
    for o in _outputs(module, spec.n_heads, seen.heads.shape[-1]):
        if _near(o.back(seen.heads.float()), seen.out):
            return Projections(q, k, v, o)
    raise _unknown(kind, layer, "output")


def _unknown(kind: str, layer: int, what: str) -> UserError:
    return UserError(
        f"model: {kind}: by which weights layer {layer} makes its {what} is not known, which this "
        "method needs; methods that ask for no weights work"
    )


@dataclass
class _Seen:
    """One layer's pass: input and output [T, M], queries, keys, values and attention's output [T, heads, D]."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    heads: Tensor
    out: Tensor


@torch.no_grad()
def _watch(model: PreTrainedModel, modules: Sequence[nn.Module]) -> list[_Seen]:
    from methods.core.capture import capture_blocks  # at call time: it makes caches, which know of models

    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    outs: dict[int, Tensor] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            outs[index] = (out[0] if isinstance(out, tuple) else out).detach()

        return hook

    hooks = [one.register_forward_hook(note(i)) for i, one in enumerate(modules)]
    try:
        steps = capture_blocks(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    seen = []
    for i, (step, heads) in enumerate(steps):
        q, k, v, out = (x[0].transpose(0, 1) for x in (step.q_raw, step.k_raw, step.v, heads))
        assert step.hidden is not None
        seen.append(_Seen(step.hidden[0], q, k, v, out, outs[i][0]))
    return seen


def _inputs(module: nn.Module, spec: ModelSpec) -> Iterator[tuple[list[Projection], ...]]:
    """Ways in which queries, keys and values may be written down, each with the norms that may follow."""
    children = dict(module.named_children())
    Hq, H = spec.n_heads, spec.n_kv_heads
    G = Hq // H
    named = {one: next((name for name in names if name in children), "") for one, names in SEPARATE.items()}
    if all(named.values()):
        parts = [by_head(module, name, heads) for name, heads in zip(named.values(), (Hq, H, H))]
        yield tuple(_normed(one, name, children) for one, name in zip(parts, named))
    for fused in (name for name in FUSED if name in children):
        whole = by_head(module, fused, Hq + 2 * H)  # [Hq + 2 H, D, M]
        rows = torch.arange(Hq + 2 * H)
        groups = rows.view(H, G + 2)
        for q, k, v in (
            (rows[:Hq], rows[Hq : Hq + H], rows[Hq + H :]),
            (groups[:, :G].flatten(), groups[:, G], groups[:, G + 1]),
        ):
            parts = [_rows(whole, part) for part in (q, k, v)]
            yield tuple(_normed(one, name, children) for one, name in zip(parts, SEPARATE))


def _outputs(module: nn.Module, heads: int, width: int) -> Iterator[Projection]:
    for name in OUT:
        part = getattr(module, name, None)
        if part is None:
            continue
        matrix, bias = _matrix(part, heads * width)  # [M, heads * D]
        yield Projection(matrix.T.reshape(heads, width, -1), bias, source=(name, None))


def by_head(module: nn.Module, child: str, heads: int) -> Projection:
    """A child of the block as the projection of so many heads."""
    matrix, bias = _matrix(getattr(module, child), None)
    bias = None if bias is None else bias.view(heads, -1)
    return Projection(matrix.view(heads, -1, matrix.shape[1]), bias, source=(child, None))


def _rows(whole: Projection, rows: Tensor) -> Projection:
    rows = rows.to(whole.weight.device)
    bias = None if whole.bias is None else whole.bias[rows]
    return Projection(whole.weight[rows], bias, source=(whole.source[0], rows))


def _matrix(part: nn.Module, inputs: int | None) -> tuple[Tensor, Tensor | None]:
    """[outputs, inputs] and bias of a linear map; where it is packed, by what it makes of the unit vectors."""
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
        return (
            weight.T if type(part).__name__ == "Conv1D" else weight
        ).detach(), None if bias is None else bias.detach()
    width = inputs or int(part.in_features)
    dtype = bias.dtype if isinstance(bias, Tensor) else torch.float32
    device = next(part.parameters()).device
    nothing = part(torch.zeros(1, width, dtype=dtype, device=device))
    return (
        part(torch.eye(width, dtype=dtype, device=device)) - nothing
    ).T.detach(), None if bias is None else bias.detach()


def _normed(one: Projection, name: str, children: dict[str, nn.Module]) -> list[Projection]:
    """The projection with the norms that may follow: of each head, of all heads together, none."""
    norm = next((children[form.format(name)] for form in NORMS if form.format(name) in children), None)
    if norm is None:
        return [one]

    def together(x: Tensor) -> Tensor:
        return norm(x.flatten(-2)).view(x.shape)

    return [replace(one, norm=norm), replace(one, norm=together), one]


def _fit(forms: list[Projection], hidden: Tensor, actual: Tensor) -> Projection | None:
    """The form that makes these vectors of the input, with a factor that the block multiplies them by."""
    for form in forms:
        try:
            made = form(hidden.float() if form.norm is None else hidden).float().detach()
        except (RuntimeError, ValueError):  # a norm of another width
            continue
        if made.shape != actual.shape:
            continue
        factor = float((made * actual.float()).sum() / made.square().sum().clamp_min(1e-30))
        if not _near(made * factor, actual):
            continue
        if abs(factor - 1) < 1e-2:
            return form
        if form.norm is None:
            return replace(form, weight=form.weight * factor, bias=None if form.bias is None else form.bias * factor)
    return None


def _near(made: Tensor, actual: Tensor) -> bool:
    """Whether these are the block's, but for the rounding of its numbers and of sums as long as the model is wide."""
    off = 8 * bound(actual.dtype, WIDE, size=float(actual.abs().max()))
    return bool((made - actual.float()).abs().max() <= off)
