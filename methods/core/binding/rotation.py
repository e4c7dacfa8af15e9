"""How each layer of a model turns its keys by position, found by asking the layer itself.

One short pass runs through the model's own attention on a cache of its own. Every attention block is handed one random
input at all positions, so that its keys differ by what it does with positions and by nothing else. A form of rotation
is taken only where it gives these keys; where none does, methods that turn keys refuse the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kernels import rotate
from methods.core.binding.lengths import changes, undisturbed
from methods.core.contract import Rope

#: positions whose keys are compared: near ones say which channels are pairs, a far one which frequencies they have
NEAR, FAR = (0, 3, 10), 1000

#: how a model writes the factors of its pairs into `position_embeddings`: once per channel or once per pair
_WRITTEN = {
    "halves": lambda x: x[..., : x.shape[-1] // 2],
    "neighbours": lambda x: x[..., ::2],
    "pairs": lambda x: x,
}


@dataclass(frozen=True)
class Turning:
    """How one layer turns its keys.

    rope: turns a key from one position to another; None where no form was found, where frequencies change with the
    length, and where the model has its positions elsewhere.
    turns: whether RoPE turns the layer's keys at all.  known: whether they can be turned back to what they were before
    it, by factors that stand in `position_embeddings` as `written` says, or, where that is None, come of position and
    rope.  interleaved, sign: which channels are pairs, and the direction.
    """

    rope: Rope | None = None
    turns: bool = True
    known: bool = False
    written: str | None = None
    interleaved: bool = False
    sign: int = 1

    def factors(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """cos and sin of the pairs of a pass, [B or 1, T, R / 2], from what its attention block was given."""
        if self.written is not None:
            cos, sin = _read(given["position_embeddings"], self.written)
            return cos, self.sign * sin
        assert self.rope is not None
        angle = given["position_ids"][..., None].float() * self.rope.inv_freq.to(given["position_ids"].device)
        return angle.cos(), angle.sin()


@dataclass
class _Probe:
    """What one layer showed: keys [P, H, D] at the positions `at` [P], and what it was given there."""

    keys: Tensor
    at: Tensor
    given: dict[str, Any]
    unit: float  # rounding of the model's numbers


@torch.inference_mode(False)  # what is found is kept, and may be used where gradients are taken
def turnings(model: PreTrainedModel, modules: Sequence[nn.Module]) -> list[Turning]:
    """One Turning per attention module, in their order; the model is left as it was."""
    layers, absolute = _ask(model, modules)
    frequencies = list(_frequencies(model))
    turnings: list[Turning] = []
    for layer in layers:
        # layers are mostly alike: what the last one did is tried first
        last = turnings[-1] if turnings else Turning()
        turnings.append(Turning() if layer is None else _turning(layer, frequencies, last))
    # a model none of whose layers turns keys has its positions elsewhere, as one that adds them to its input
    if absolute or not any(turning.turns for turning in turnings):
        turnings = [replace(turning, rope=None) for turning in turnings]
    return turnings


@torch.no_grad()
def _ask(model: PreTrainedModel, modules: Sequence[nn.Module]) -> tuple[list[_Probe | None], bool]:
    """What each layer shows, None where it showed nothing; and whether the model's input holds positions."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", 0) or 0
    named = "position_ids" in inspect.signature(model.forward).parameters
    far = [FAR] if named and longest > FAR and not any(_changing(m, "") for m in model.modules()) else []
    at = torch.tensor([*range(NEAR[-1] + 1), *far])
    ids = torch.full((1, len(at)), _plain_token(model.config), device=model.device)
    given: dict[nn.Module, dict[str, Any]] = {}
    absolute = False

    def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal absolute
        hidden = args[0] if args else kwargs["hidden_states"]
        if not given:
            absolute = bool((hidden - hidden[:, :1]).abs().max() > 1e-3 * hidden.abs().max())
        given[module] = kwargs
        g = torch.Generator().manual_seed(0)
        same = torch.randn(hidden.shape[-1], generator=g).to(hidden).expand_as(hidden)
        return ((same, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": same})

    positions = {"position_ids": at[None].to(ids.device)} if named else {}
    with _evaluating(model), undisturbed(model), _hooked(modules, hand_over):
        try:
            cache = DynamicCache()  # whose layers keep every position, sliding ones too
            model(input_ids=ids, past_key_values=cache, use_cache=True, **positions)
        except Exception:  # whatever a model that cannot be asked does, it is not known how its keys turn
            return [None] * len(modules), True
    chosen = [*NEAR, *([len(at) - 1] if far else [])]
    probes: list[_Probe | None] = []
    for module in modules:
        index = int(module.layer_idx)
        keys = getattr(cache.layers[index], "keys", None) if index < len(cache.layers) else None
        if keys is None or keys.is_meta or module not in given or keys.shape[-2] != len(at):
            probes.append(None)
            continue
        unit = torch.finfo(keys.dtype).eps
        chosen_keys = keys[0].transpose(0, 1)[chosen].float().cpu()
        probes.append(_Probe(chosen_keys, at[chosen], _cut(given[module], chosen), unit))
    return probes, absolute


def _turning(probe: _Probe, frequencies: Sequence[Tensor], last: Turning) -> Turning:
    if _same(probe, probe.keys, 0, False):
        return Turning(Rope(torch.empty(0)), turns=False, known=True)
    rope = _rope(probe, frequencies, last.rope)
    if (back := _back(probe, last)) is not None:
        return Turning(_scaled(rope, probe, back[0]), True, True, *back)
    if rope is not None and "position_ids" in probe.given:
        return Turning(rope, known=True, interleaved=rope.interleaved)
    return Turning(rope)


def _rope(probe: _Probe, frequencies: Sequence[Tensor], last: Rope | None) -> Rope | None:
    """The frequencies and the form that turn the keys of all positions to position 0 and make them one key there."""
    forms = (Rope(sign * freq, pairs) for freq, pairs, sign in product(frequencies, (False, True), (1, -1)))
    for rope in (*([last] if last is not None else []), *forms):
        if 0 < (R := 2 * len(rope.inv_freq)) <= probe.keys.shape[-1]:
            angle = -probe.at[:, None, None].float() * rope.inv_freq.cpu()  # [P, 1, R / 2]
            if _same(probe, rotate(probe.keys, angle.cos(), angle.sin(), rope.interleaved), R, rope.interleaved):
                return rope
    return None


def _scaled(rope: Rope | None, probe: _Probe, written: str) -> Rope | None:
    """With the multiplier of the factors that the layer was given; None where pairs have one each."""
    sizes = torch.hypot(*(x.float() for x in _read(probe.given["position_embeddings"], written)))
    if rope is None or bool((sizes - sizes.mean()).abs().max() > 1e-2 * sizes.mean()):
        return None
    scale = float(sizes.mean())  # factors are rounded to the model's numbers, which half of them have fewer digits of
    return replace(rope, scale=1.0 if abs(scale - 1) < probe.unit + 1e-6 else scale)


def _back(probe: _Probe, last: Turning) -> tuple[str, bool, int] | None:
    """How the factors that were given undo the rotation: as what they are written, which pairs, which direction."""
    if (given := probe.given.get("position_embeddings")) is None:
        return None
    for written, pairs, sign in (
        (last.written, last.interleaved, last.sign),
        *product(_WRITTEN, (False, True), (1, -1)),
    ):
        if written is None:
            continue
        cos, sin = (x.float().cpu().transpose(0, 1) for x in _read(given, written))  # [P, 1, R / 2]
        if not 0 < (R := 2 * cos.shape[-1]) <= probe.keys.shape[-1]:
            continue
        scale = cos.square() + sin.square()
        if _same(probe, rotate(probe.keys, cos / scale, -sign * sin / scale, pairs), R, pairs):
            return written, pairs, sign
    return None


def _read(given: Any, written: str) -> tuple[Tensor, Tensor]:
    """cos and sin of the pairs, [B or 1, T, R / 2], from `position_embeddings` as a model hands them out."""
    cos, sin = (given.real, given.imag) if isinstance(given, Tensor) else given
    return _WRITTEN[written](cos), _WRITTEN[written](sin)


def _same(probe: _Probe, keys: Tensor, R: int, interleaved: bool) -> bool:
    """Whether keys [P, H, D], of which R channels were turned in pairs, are one key at all positions."""
    head, rest = keys[..., :R], keys[..., R:].abs()
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    size = torch.hypot(a, b)
    size = size.repeat_interleave(2, dim=-1) if interleaved else torch.cat((size, size), dim=-1)
    # a turned number is off by rounding of its pair, and by that of the angle at the far position
    allowed = (4 * probe.unit + 2e-4) * torch.cat((size, rest), dim=-1)
    return bool(((keys - keys[:1]).abs() <= allowed + 1e-30).all())


def _frequencies(model: PreTrainedModel) -> Iterator[Tensor]:
    """Radians per position of the pairs, [R / 2], of every RoPE in the model whose frequencies stay."""
    for module in model.modules():
        for name, value in {**vars(module), **module._buffers}.items():
            kind = name.removesuffix("inv_freq")
            if name.endswith("inv_freq") and "original" not in name and not _changing(module, kind.rstrip("_")):
                yield value.detach()
    config = model.config
    if config.model_type == "gptj":  # its tables hold sines instead of frequencies
        width = config.rotary_dim or config.hidden_size // config.num_attention_heads
        yield 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)


def _changing(module: nn.Module, kind: str) -> bool:
    """Whether the module's frequencies follow the length of the sequence; kind: of its layers, if it has several."""
    rope_type = getattr(module, "rope_type", "default")
    rope_type = rope_type.get(kind, "default") if isinstance(rope_type, dict) else rope_type
    return changes(rope_type)


def _plain_token(config: Any) -> int:
    """A token id that stands for nothing but itself: no padding, no picture."""

    def special(part: dict[Any, Any]) -> Iterator[Any]:
        for name, value in part.items():
            if isinstance(value, dict):
                yield from special(value)
            elif str(name).endswith(("token_id", "token_index")):
                yield from value if isinstance(value, list) else [value]

    taken = set(special(config.to_dict()))
    return next(token for token in range(len(taken) + 1) if token not in taken)


def _cut(given: dict[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """What was given of positions, at the chosen ones only."""
    out: dict[str, Any] = {}
    if isinstance(ids := given.get("position_ids"), Tensor):
        out["position_ids"] = ids[..., chosen]
    embeddings = given.get("position_embeddings")
    if isinstance(embeddings, Tensor) and embeddings.is_complex() and embeddings.dim() == 3:
        out["position_embeddings"] = embeddings[:, chosen]
    elif isinstance(embeddings, tuple) and all(isinstance(x, Tensor) and x.dim() == 3 for x in embeddings):
        out["position_embeddings"] = tuple(x[:, chosen] for x in embeddings)
    return out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module as it was after it."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
