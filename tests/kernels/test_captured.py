"""A decode step's ops wait for no number on the device, so that a CUDA graph can hold them."""

import pytest
import torch

from kernels import Pages, Rules, attend, attend_pages, attend_pages_with_mass, attend_with_mass, backend, mass
from kernels.attend_quantized import attend_quantized
from kernels.launch import noting
from kernels.quantize import quantize
from tests.kernels.both_forms import using

pytest.importorskip("triton")

B, HQ, H, S, D = 2, 4, 2, 3000, 64
RULES = {"plain": {}, "every rule": {"window": 40, "softcap": 2.0, "slopes": True}}


class Step:
    """Tensors of one decoded token on a device."""

    def __init__(self, device: str, rules: str = "plain"):
        def random(*shape):
            return torch.randn(shape, dtype=torch.float16, device=device)

        given = dict(RULES[rules])
        if given.get("slopes"):
            given["slopes"] = torch.ones(HQ, device=device)
        self.rules = Rules(D**-0.5, **given)
        self.q, self.k, self.v = random(B, HQ, 1, D), random(B, H, S, D), random(B, H, S, D)
        self.at = {
            "q_pos": torch.full((B, 1), S - 1, dtype=torch.int32, device=device),
            "k_pos": torch.arange(S, dtype=torch.int32, device=device).expand(B, H, S).contiguous(),
        }
        held = torch.full((B * H,), S, device=device)
        at = torch.arange(B * H * S, dtype=torch.int32, device=device)
        flat = [x.flatten(0, 2) for x in (self.k, self.v, self.at["k_pos"])]
        self.pages = Pages(*flat, at, held.cumsum(0) - held, held, S)
        self.tail = tuple(x[:, :, :5] for x in (self.k, self.v, self.at["k_pos"]))

        n = S - 56  # the rest is not packed
        self.keys = quantize(self.k[:, :, :n], 4, 32, 2), self.k[:, :, n:]
        self.values = quantize(self.v[:, :, :n], 2, 32, 3), self.v[:, :, n:]

    def calls(self):
        """Name and outputs of every op of a decode step."""
        q, k, v, rules, at = self.q, self.k, self.v, self.rules, self.at
        yield "attend, all", lambda: attend(q, k, v, rules, **at, layout="all")
        yield "attend, positions", lambda: attend(q, k, v, rules, **at)
        yield "attend_pages", lambda: attend_pages(q, self.pages, self.tail, rules, q_pos=at["q_pos"])
        yield (
            "attend_pages_with_mass",
            lambda: attend_pages_with_mass(q, self.pages, self.tail, rules, q_pos=at["q_pos"]),
        )
        yield "attend_quantized", lambda: attend_quantized(q, self.keys, self.values, rules, **at)
        yield "attend_with_mass", lambda: attend_with_mass(q, k, v, rules, 1, **at, layout="tail")
        yield "mass", lambda: mass(q, k, rules, **at, layout="tail")


@pytest.mark.parametrize("rules", RULES)
def test_what_a_decode_step_launches_depends_on_shapes_alone(rules, monkeypatch):
    monkeypatch.setattr(backend, "_trouble", lambda device, interpreted: None)
    # tensors without contents: whatever asked for a number would raise
    with using("triton"), noting() as launched:
        for name, call in Step("meta", rules).calls():
            before = len(launched)
            call()
            assert len(launched) > before, name


def test_asking_for_a_number_would_be_noticed():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").item()


@pytest.mark.cuda
@pytest.mark.parametrize("rules", RULES)
def test_a_captured_decode_step_gives_what_the_step_itself_gives(rules):
    step = Step("cuda", rules)
    for name, call in step.calls():
        call()  # compiled outside
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        step.q.copy_(torch.randn_like(step.q))  # other numbers in the same place
        graph.replay()
        fresh = call()
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (captured, fresh)), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.cuda
def test_nothing_in_a_decode_step_waits_for_the_device():
    step = Step("cuda")
    for _, call in step.calls():
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, call in step.calls():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
