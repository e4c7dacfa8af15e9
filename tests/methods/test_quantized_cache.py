"""KIVI is not the QuantizedCache of transformers: what that one does otherwise, from its own code."""

import importlib.util

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import QuantizedLayer

from methods.core.contract import Stage
from methods.core.stores.codec import CodecCache
from methods.kivi import KIVI
from tests.methods.layer import step_of

GROUP, RESIDUAL, DIM = 32, 32, 64
PROMPT, NEW = 80, 40  # tokens; blocks of keys end at 64, and the residual fills once more while decoding


class Rounding(QuantizedLayer):
    """Their layer over plain rounding between minimum and maximum, in the groups that quanto makes of a whole tensor:
    axis 0 takes neighbours, axis -1 takes every so many-th element."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple:
        groups = tensor.reshape(self.q_group_size, -1) if axis == -1 else tensor.reshape(-1, self.q_group_size).T
        low, high = groups.aminmax(dim=0)
        scale = (high - low) / (2**self.nbits - 1)
        return ((groups - low) / scale).round(), scale, low, axis, tensor.shape

    def _dequantize(self, held: tuple) -> Tensor:
        codes, scale, low, axis, shape = held
        groups = codes * scale + low
        return (groups if axis == -1 else groups.T).reshape(shape)


def theirs(kind: str, axis_key: int) -> QuantizedLayer:
    given = dict(nbits=4, axis_key=axis_key, axis_value=0, q_group_size=GROUP, residual_length=RESIDUAL)
    if kind == "rounding":
        return Rounding(**given)
    if importlib.util.find_spec("optimum") is None:
        pytest.skip("optimum-quanto is not installed")
    from transformers.cache_utils import QuantoQuantizedLayer

    return QuantoQuantizedLayer(**given)


class Both:
    """The same keys and values through KIVI's store and through their layer."""

    def __init__(self, kind: str, axis_key: int = -1, outlier: float = 1.0):
        self.ours, self.theirs = CodecCache(KIVI(4, 4, GROUP, RESIDUAL)), theirs(kind, axis_key)
        self.outlier, self.n, self.k = outlier, 0, torch.empty(1, 2, 0, DIM)

    def feed(self, n: int, stage: Stage = Stage.DECODE) -> tuple[Tensor, Tensor]:
        """The keys [1, 2, S, D] that both would attend with one step later."""
        step = step_of(n, 2, 2, DIM, stage=stage, start=self.n)
        g = torch.Generator().manual_seed(self.n)
        step.k, step.v = (torch.randn(1, 2, n, DIM, generator=g) for _ in range(2))
        step.k[..., 3] *= self.outlier
        self.k, self.n = torch.cat((self.k, step.k), dim=2), self.n + n
        self.ours.append(step), self.ours.attend(step), self.ours.end_step(step)
        self.theirs.update(step.k, step.v)
        held = [self.theirs._dequantize(self.theirs._quantized_keys)]
        if self.theirs.keys.dim() == 4:  # what has come since it packed
            held.append(self.theirs.keys)
        return self.ours.store.read()[0], torch.cat(held, dim=2)


@pytest.mark.parametrize("kind", ["rounding", "quanto"])
def test_theirs_rounds_the_newest_tokens_of_a_prompt_and_kivi_does_not(kind):
    both = Both(kind)
    ours, others = both.feed(PROMPT, Stage.ENDS_PROMPT)
    newest = slice(PROMPT // RESIDUAL * RESIDUAL, None)
    assert torch.equal(ours[:, :, newest], both.k[:, :, newest])
    assert (others[:, :, newest] != both.k[:, :, newest]).float().mean() > 0.5


@pytest.mark.parametrize("kind", ["rounding", "quanto"])
def test_theirs_packs_old_tokens_again_and_kivi_never_does(kind):
    both = Both(kind)
    ours, others = both.feed(PROMPT, Stage.ENDS_PROMPT)
    packed = slice(0, PROMPT // RESIDUAL * RESIDUAL)
    for _ in range(NEW):
        ours_later, others_later = both.feed(1)
    assert torch.equal(ours_later[:, :, packed], ours[:, :, packed])
    assert (others_later[:, :, packed] != others[:, :, packed]).float().mean() > 0.5


@pytest.mark.parametrize("kind", ["rounding", "quanto"])
def test_theirs_lets_an_outlier_channel_spoil_its_neighbours_and_kivi_does_not(kind):
    def error(outlier: float) -> tuple[float, float]:
        """Of the other channels' packed keys."""
        both = Both(kind, axis_key=0, outlier=outlier)  # their default axis
        found = both.feed(64, Stage.ENDS_PROMPT)
        others = torch.arange(DIM) != 3
        return tuple((one - both.k)[..., others].abs().mean().item() for one in found)

    plain, spoilt = error(1.0), error(100.0)
    assert spoilt[0] == plain[0]
    assert spoilt[1] > 3 * plain[1]
