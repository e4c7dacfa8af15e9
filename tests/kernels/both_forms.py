"""Running an op in Triton beside its reference: natively on a GPU, in Triton's interpreter elsewhere."""

import itertools
import os
import random
from collections.abc import Collection
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Pages, Rules, backend

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the same test runs natively")
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.cuda)]
)


#: what a layer may do to its logits; a window is as long as a case needs it
RULES = ("plain", "window", "softcap", "slopes", "all rules")


class Inputs:
    """Random queries of the newest T tokens over S slots, and rules by name."""

    window = 9

    def __init__(self, g, heads=(4, 2), T=1, S=63, D=32, B=1, dtype=torch.float32, DV=None):
        Hq, H = heads
        shapes = ((B, Hq, T, D), (B, H, S, D), (B, H, S, DV or D))
        self.q, self.k, self.v = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
        self.q_pos = torch.arange(S - T, S, dtype=torch.int32).expand(B, -1)
        self.k_pos = torch.arange(S, dtype=torch.int32).expand(B, 1, -1)
        self.slopes = torch.rand(Hq, generator=g)

    def rules(self, name: str, device: str = "cpu") -> Rules:
        assert name in RULES, name
        given = {"window": self.window, "softcap": 1.5, "slopes": self.slopes.to(device)}
        given = {rule: value for rule, value in given.items() if name in (rule, "all rules")}
        return Rules(self.q.shape[-1] ** -0.5, **given)


def pairs(*axes: Collection[Any]) -> list[Any]:
    """All combinations for `parametrize`; those beyond a cover of every two values of two axes are slow tests."""

    def within(case: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    every = list(itertools.product(*axes))
    left, fast = set().union(*map(within, every)), set()
    while left:
        best = max(every, key=lambda case: len(within(case) & left))  # the first of the best: alike in every process
        fast.add(best)
        left -= within(best)
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in every]


def interpret_quickly() -> None:
    """Triton's interpreter with its language patched once per launch, not again for every function called in one.

    A third of the time of a launch. What is run, and with which checks, stays as it is.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    seen = SimpleNamespace(__globals__={"tl": language, "core": language.core})  # whichever of the two a function sees

    def whole(fn: Any) -> Any:
        return patch(seen)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = whole
    interpreter.InterpretedFunction.__call__ = call


if find_spec("triton") and not torch.cuda.is_available():
    interpret_quickly()


def paged(
    k: Tensor, v: Tensor, k_pos: Tensor, counts: list[int], S: int
) -> tuple[Pages, tuple[Tensor, Tensor, Tensor]]:
    """Of slots [B, H, S + t, ...] the first counts[b * H + h] of S in pages, in no order, and the last t as a tail."""
    R, held = len(counts), torch.tensor(counts)
    rows = torch.arange(R).repeat_interleave(held)
    first = held.cumsum(0) - held
    slots = torch.arange(len(rows)) - first[rows]
    at = torch.randperm(len(rows) + 5)[: len(rows)]  # five places are spare
    flat = [x.flatten(0, 1).new_zeros(len(rows) + 5, *x.shape[3:]) for x in (k, v, k_pos)]
    flat[2] -= 1
    for to, x in zip(flat, (k, v, k_pos), strict=True):
        to[at] = x.flatten(0, 1)[rows, slots]
    pages = Pages(flat[0], flat[1], flat[2].int(), at.int(), first, held, max(counts))
    return pages, tuple(x[:, :, S:] for x in (k, v, k_pos))


@contextmanager
def using(name: str):
    """Inside, ops run in this form."""
    before = backend.chosen()
    backend.use(name)
    try:
        yield
    finally:
        backend.use(before)


@pytest.fixture
def poison(monkeypatch):
    """Memory that an op asks for holds NaN, or a number that no result is, until the op writes it."""

    def filled(make):
        def made(*args, **kwargs) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(77)

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh numbers in every run; a failing test shows the seed, KVFRONTIER_TEST_SEED brings it back."""
    seed = int(os.environ.get("KVFRONTIER_TEST_SEED", random.SystemRandom().getrandbits(31)))
    print(f"KVFRONTIER_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def moved(device: str, *things):
    """Tensors, and those in tuples, on the device; anything else as it is."""
    out = []
    for one in things:
        if isinstance(one, Tensor):
            one = one.to(device)
        elif isinstance(one, tuple):
            one = moved(device, *one)
        out.append(one)
    return tuple(out)
