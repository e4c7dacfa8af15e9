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
from methods.core.contract import Step
from methods.core.store import Store
from methods.core.watch import watch
from methods.kvtuner import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: makes the storage of one layer: packs(key_bits=..., value_bits=...)
Packs = Callable[..., Store]

# a relative error is divided by no less than this
SMALLEST = 1e-6
# queries whose attention is held at once
BLOCK_ROWS = 32


@dataclass(frozen=True)
class Shift:
    """What one pair of bits changes in one layer, means over all elements.

    keys, values, output: relative, |x - x'| / |x|.  attention: absolute, over the slots that a query sees.
    """

    keys: float
    values: float
    attention: float
    output: float


@torch.inference_mode()
def profile(
    model: PreTrainedModel, prompts: Iterable[Sequence[int]], packs: Packs, bits: Sequence[int]
) -> list[dict[Pair, Shift]]:
    """The shift of every layer under every pair of `bits`, mean over prompts (token ids).

    Each prompt is run once, whole, by the full model.
    """
    found: dict[int, list[Tensor]] = {}  # per layer, one [pairs, 4] per prompt
    for ids in prompts:
        for layer, step in enumerate(watch(model, torch.tensor([list(ids)]))):
            found.setdefault(layer, []).append(shifts(step, packs, bits))
    pairs = [Pair(key, value) for key, value in product(bits, bits)]
    means = [torch.stack(found[layer]).mean(0).tolist() for layer in sorted(found)]
    return [{pair: Shift(*row) for pair, row in zip(pairs, rows, strict=True)} for rows in means]


def shifts(step: Step, packs: Packs, bits: Sequence[int]) -> Tensor:
    """The four means of `Shift` for every pair of `bits`, [pairs, 4], float32; pairs in the order of their product.

    step: a whole prompt without padding.
    """
    stores = [packs(key_bits=b, value_bits=b) for b in bits]
    for store in stores:
        store.append(step.k, step.v, step.pos)
        store.settle(step)
    packed = [store.read() for store in stores]
    keys = [_relative(step.k, k) for k, _ in packed]
    values = [_relative(step.v, v) for _, v in packed]
    attention = torch.zeros(len(bits), device=step.q.device)
    output = torch.zeros(len(bits), len(bits), device=step.q.device)
    n = step.q.shape[2]
    seen = 0
    for i in range(0, n, BLOCK_ROWS):
        rows = slice(i, i + BLOCK_ROWS)
        q, q_pos, k_pos = step.q[:, :, rows], step.pos[:, rows], step.pos[:, None]
        p = attention_probs(q, step.k, step.rules, q_pos=q_pos, k_pos=k_pos)  # [B, H, G, T, S]
        out = _weigh(p, step.v)
        seen += int(visible(q_pos, k_pos, step.rules.window).sum()) * q.shape[1]
        for a, (k, _) in enumerate(packed):
            p_hat = attention_probs(q, k, step.rules, q_pos=q_pos, k_pos=k_pos)
            attention[a] += (p - p_hat).abs().sum()
            for b, (_, v) in enumerate(packed):
                output[a, b] += _relative(out, _weigh(p_hat, v)) * out.shape[3] / n
    table = [
        torch.stack((keys[a], values[b], attention[a] / seen, output[a, b]))
        for a, b in product(range(len(bits)), range(len(bits)))
    ]
    return torch.stack(table)


def _weigh(p: Tensor, v: Tensor) -> Tensor:
    """Outputs [B, H, G, T, Dv] of probabilities [B, H, G, T, S] over values [B, H, S, Dv]."""
    return p @ v.float()[:, :, None]


def _relative(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean of |x - x_hat| / |x|, a scalar."""
    x, x_hat = x.float(), x_hat.float()
    return ((x - x_hat).abs() / x.abs().clamp_min(SMALLEST)).mean()
