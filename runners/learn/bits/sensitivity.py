"""How much the bits of keys and values change a layer: its keys, its values, its attention and its output.

Every layer reads the unchanged hidden states of the full model, so errors do not pile up over layers; inside the layer
all queries of a prompt attend to the packed keys and values as a later step would read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import attention_probs, visible
from methods.core.capture import capture_steps
from methods.core.contract import Step
from methods.core.store import Store
from methods.kvtuner import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: makes the storage of one layer: packs(key_bits=..., value_bits=...)
Packs = Callable[..., Store]

# a relative error is divided by no less than this
SMALLEST = 1e-6
RELATIVE = ("elements", "sums")
# queries whose attention is held at once
BLOCK_ROWS = 64


@dataclass(frozen=True)
class Shift:
    """What one pair of bits changes in one layer, means over all elements.

    keys, values, output: relative, |x - x'| / |x|, each element by itself or sum by sum.
    attention: absolute, over the slots that a query sees.
    """

    keys: float
    values: float
    attention: float
    output: float


@torch.inference_mode()
def profile(
    model: PreTrainedModel, prompts: Iterable[Sequence[int]], packs: Packs, bits: Sequence[int], relative: str
) -> list[dict[Pair, Shift]]:
    """The shift of every layer under every pair of `bits`, mean over prompts (token ids).

    Each prompt is run once, whole, by the full model. relative: see `shifts`.
    """
    by_layer: dict[int, list[Tensor]] = {}  # per layer, one [pairs, 4] per prompt
    for ids in prompts:
        for layer, step in enumerate(capture_steps(model, torch.tensor([list(ids)]))):
            by_layer.setdefault(layer, []).append(shifts(step, packs, bits, relative))
    pairs = [Pair(key, value) for key, value in product(bits, bits)]
    means = [torch.stack(by_layer[layer]).mean(0).tolist() for layer in sorted(by_layer)]
    return [{pair: Shift(*row) for pair, row in zip(pairs, rows, strict=True)} for rows in means]


def shifts(step: Step, packs: Packs, bits: Sequence[int], relative: str = "elements") -> Tensor:
    """The four means of `Shift` for every pair of `bits`, [pairs, 4], float32; pairs in the order of their product.

    step: a whole prompt without padding.  relative: "elements" divides each error by its own element, as in the paper;
    "sums" divides the sum of errors by the sum of elements, which channels that are nearly zero do not drown.
    """
    stores = [packs(key_bits=b, value_bits=b) for b in bits]
    for store in stores:
        store.append(step.k, step.v, step.pos)
        store.pack(step)
    packed = [store.read() for store in stores]
    keys = [torch.stack(_relative(step.k, k, relative)) for k, _ in packed]  # error and what it is divided by
    values = [torch.stack(_relative(step.v, v, relative)) for _, v in packed]
    every = torch.cat([v for _, v in packed], dim=3)  # [B, H, S, bits * Dv]
    attention = torch.zeros(len(bits), device=step.q.device)
    output = torch.zeros(len(bits), len(bits), 2, device=step.q.device)
    n = step.q.shape[2]
    seen = 0
    for i in range(0, n, BLOCK_ROWS):
        rows, slots = slice(i, i + BLOCK_ROWS), slice(i + BLOCK_ROWS)  # what comes later is seen by none of these
        q, q_pos, k_pos = step.q[:, :, rows], step.pos[:, rows], step.pos[:, None, slots]
        p = attention_probs(q, step.k[:, :, slots], step.rules, q_pos=q_pos, k_pos=k_pos)  # [B, H, G, T, S]
        out = _weigh(p, step.v[:, :, slots])
        seen += int(visible(q_pos, k_pos, step.rules.window).sum()) * q.shape[1]
        for a, (k, _) in enumerate(packed):
            p_hat = attention_probs(q, k[:, :, slots], step.rules, q_pos=q_pos, k_pos=k_pos)
            attention[a] += (p - p_hat).abs().sum()
            for b, out_hat in enumerate(_weigh(p_hat, every[:, :, slots]).split(step.v.shape[3], dim=-1)):
                output[a, b] += torch.stack(_relative(out, out_hat, relative))
    table = [
        torch.stack((_ratio(keys[a]), _ratio(values[b]), attention[a] / seen, _ratio(output[a, b])))
        for a, b in product(range(len(bits)), range(len(bits)))
    ]
    return torch.stack(table)


def _weigh(p: Tensor, v: Tensor) -> Tensor:
    """Outputs [B, H, G, T, Dv] of probabilities [B, H, G, T, S] over values [B, H, S, Dv]."""
    return p @ v.float()[:, :, None]


def _relative(x: Tensor, x_hat: Tensor, relative: str) -> tuple[Tensor, Tensor]:
    """A sum of errors, and what it is to be divided by; both scalars."""
    size, error = x.float().abs(), (x.float() - x_hat.float()).abs()
    if relative == "sums":
        return error.sum(), size.sum()
    return (error / size.clamp_min(SMALLEST)).sum(), torch.tensor(float(x.numel()), device=x.device)


def _ratio(pair: Tensor) -> Tensor:
    return pair[0] / pair[1].clamp_min(SMALLEST)
