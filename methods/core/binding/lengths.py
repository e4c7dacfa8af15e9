"""RoPE whose frequencies follow the length of a sequence: longrope (Phi-3) and dynamic NTK.

The model turns the keys of each pass by the largest position in it. A cache holds keys of earlier passes, so a sequence
is the model's own only while all its keys are turned as they would be in one pass, or one token after the other:

longrope has two sets of frequencies, for sequences of at most `switch` tokens and for longer ones. A prompt takes the
    set of its whole length, in chunks too. A sequence that grows beyond the switch later would mix the two; the stock
    model reads it all again, which a compressed cache cannot.
dynamic NTK beyond the switch has frequencies of its own for every length. The prompt takes those of its whole length,
    each decoded token those of its own, as in the stock model; a later turn there has no such counterpart.

The stock rotary module goes by the longest row of a batch, and dynamic NTK by the longest sequence that it has met so
far. Here rows that it would turn otherwise by themselves are refused, and every pass starts from a fresh module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel


class CrossesSwitch(RuntimeError):
    """A sequence whose keys the model would turn in more than one way; says for which lengths it holds."""


@dataclass
class Reach:
    """Tokens of a batch's shortest and longest row, those of the prompt that are still to come included."""

    shortest: int
    longest: int


@dataclass(frozen=True)
class Switch:
    """A rotary module, or one kind of its layers, that turns otherwise beyond `at` tokens; dynamic: by each length."""

    rotary: nn.Module
    prefix: str
    at: int
    dynamic: bool


class Lengths:
    """Keeps a model's passes to lengths at which its keys are turned in one way; most models have no such limit."""

    def __init__(self, model: PreTrainedModel):
        self.kind = model.config.get_text_config(decoder=True).model_type
        self.switches = [switch for module in model.modules() for switch in switches_of(module)]
        self.whole: int | None = None  # tokens of the prompt that this pass is a part of
        self.on = False
        self._before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        if self.switches:
            for rotary in {switch.rotary for switch in self.switches}:
                rotary.register_forward_pre_hook(self._turn, with_kwargs=True)
                rotary.register_forward_hook(self._turned)
            _keep_caches(model)

    def begin(self, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass on `cache`. Raises CrossesSwitch when its keys would not fit those that are stored."""
        if not self.switches:
            return
        ids = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if isinstance(x, Tensor))
        T, before = ids.shape[1], cache.get_seq_length()
        prompt = cache.prompt_len or T
        reading, had = before < prompt, cache.reach
        mask = kwargs.get("attention_mask")
        if had is None or (T > 1 and mask is not None):
            rows = [before + T] if mask is None else (mask[:, : before + T] > 0).sum(-1).tolist()
            rest = max(0, prompt - before - T)
            reach = Reach(min(rows) + rest, max(rows) + rest)
        else:
            reach = had if reading else Reach(had.shortest + T, had.longest + T)
        for switch in self.switches:
            self._check(switch, reach, None if reading else had, T)
        cache.reach = reach
        self.whole = reach.longest if reading else None
        self._before = [_state(switch.rotary) for switch in self.switches if switch.dynamic]
        self.on = True

    def end(self) -> None:
        """After a pass: the module as plain calls left it."""
        self.on, self.whole = False, None
        for state in self._before:
            _restore(*state)
        self._before = []

    def _check(self, switch: Switch, reach: Reach, had: Reach | None, T: int) -> None:
        at, how = switch.at, "dynamic NTK" if switch.dynamic else "longrope"
        if reach.longest <= at:
            return
        if had is not None and (T > 1 if switch.dynamic else had.longest <= at):
            raise CrossesSwitch(
                f"{self.kind}: its RoPE ({how}) turns keys otherwise in sequences of more than {at:,} tokens, and keys "
                f"of {had.longest:,} are stored; a prompt with all that follows it stays within {at:,} tokens, or "
                f"{'its question stands in the prompt' if switch.dynamic else 'the prompt alone is longer'}"
            )
        if reach.shortest != reach.longest if switch.dynamic else reach.shortest <= at:
            raise CrossesSwitch(
                f"{self.kind}: its RoPE ({how}) turns keys otherwise in sequences of more than {at:,} tokens, and rows "
                f"of {reach.shortest:,} and {reach.longest:,} tokens are read together; batch_size=1 keeps them apart"
            )

    def _turn(self, rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the rotary module: it starts afresh, and sees the last position of the whole prompt."""
        if not self.on:
            return None
        for switch in self.switches:
            if switch.rotary is rotary and switch.dynamic:
                _refresh(switch)
        if self.whole is None:
            return None
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        last = positions.new_full((*positions.shape[:-1], 1), self.whole - 1)
        positions = torch.cat((positions, last), dim=-1)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def _turned(self, rotary: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.on or self.whole is None:
            return None
        return tuple(x[..., :-1, :] for x in output)


def switches_of(module: nn.Module) -> list[Switch]:
    """Where a module's frequencies change with the length, by kind of layer; none for most modules."""
    types = getattr(module, "rope_type", None)
    switches = []
    for kind, rope_type in (types if isinstance(types, dict) else {"": types}).items():
        if not changes(rope_type):
            continue
        prefix = f"{kind}_" if kind else ""
        parameters = module.config.rope_parameters
        settings = parameters[kind] if kind else parameters
        dynamic = rope_type != "longrope"
        at = module.original_max_seq_len if dynamic else settings["original_max_position_embeddings"]
        switches.append(Switch(module, prefix, int(at), dynamic))
    return switches


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever is read inside the block, the frequencies are afterwards what they were before it."""
    before = [_state(module) for module in model.modules() if any(switch.dynamic for switch in switches_of(module))]
    try:
        yield
    finally:
        for rotary, buffers, numbers in before:
            _restore(rotary, buffers, numbers)


def changes(rope_type: Any) -> bool:
    """Whether frequencies of this type of RoPE follow the length of the sequence."""
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def _state(rotary: nn.Module) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """What dynamic NTK remembers of lengths; longrope chooses its frequencies anew in every pass."""
    numbers = {k: v for k, v in vars(rotary).items() if k.endswith(("max_seq_len_cached", "attention_scaling"))}
    return rotary, dict(rotary._buffers), numbers


def _restore(rotary: nn.Module, buffers: dict[str, Any], numbers: dict[str, Any]) -> None:
    rotary._buffers.update(buffers)
    vars(rotary).update(numbers)


def _refresh(switch: Switch) -> None:
    """Let dynamic NTK forget the sequences that it has met."""
    rotary, prefix = switch.rotary, switch.prefix
    original = getattr(rotary, f"{prefix}original_inv_freq").to(getattr(rotary, f"{prefix}inv_freq").device)
    rotary._buffers[f"{prefix}inv_freq"] = original
    setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)


def _keep_caches(model: PreTrainedModel) -> None:
    """Let `generate` keep a cache of ours where the model would drop it at the switch to read everything again."""
    if not isinstance(model, GenerationMixin):
        return
    stock = type(model).prepare_inputs_for_generation

    @wraps(stock)
    def prepare(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = stock(self, input_ids, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if hasattr(cache, "reach") and given.get("past_key_values") is not cache:
            return GenerationMixin.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        return given

    model.prepare_inputs_for_generation = MethodType(prepare, model)
