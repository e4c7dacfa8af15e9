"""Which forward passes run on our caches: the attention is ours while one of them lasts, else the model's own."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from methods.core.binding.lengths import Lengths
from methods.core.binding.pieces import joined, pieces_of
from methods.core.contract import ModelSpec
from methods.core.errors import UserError


class Bound(Cache):
    """A cache that only our attention can answer from, in passes of the model that it was made for."""

    passes: weakref.ref[Passes]
    spec: ModelSpec

    def begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the model is called with."""
        raise NotImplementedError

    counts: Tensor | None  # tokens of each row so far, [B]

    def chunk(self, T: int) -> int | None:
        """Tokens per pass in which the method reads a prompt that T new columns belong to; None: as they come."""
        raise NotImplementedError

    def edit(self) -> AbstractContextManager[None]:
        """The model as the cache's method needs it, for a pass."""
        raise NotImplementedError

    def ended_pass(self, model: nn.Module) -> None:
        """The model, or the part of it that was called, has done a pass."""
        raise NotImplementedError


def other_model(cache: Bound) -> str:
    """The line for a cache that a model is given which it was not made for."""
    return (
        f"past_key_values: this cache was made for another model ({cache.spec.name}) than the one that is called; make "
        "one for it with method.cache_for(model)"
    )


class Passes:
    """Switches a model over for the passes that bring a Bound cache; every other call meets the untouched model.

    name: of our attention, as the configurations are to say it.  adapter: the method of the attention modules to
    replace instead of asking for the attention by name, and by what.
    """

    def __init__(
        self,
        name: str,
        configs: Sequence[Any],
        modules: Sequence[nn.Module],
        adapter: tuple[str, Callable[..., Any]] | None,
        lengths: Lengths,
    ):
        self.name, self.configs, self.modules, self.adapter, self.lengths = name, configs, modules, adapter, lengths
        self.barred = False  # within `unbound`
        self.outermost: nn.Module | None = None  # the module whose pass it is
        self._stock: list[str] = []
        self._cache: Bound | None = None  # of the pass that goes on
        self._edit = ExitStack()  # what the method of that cache has made of the model
        self._before: list[Any] = []  # what earlier pieces of the prompt gave, of one that its method cuts

    def watch(self, model: PreTrainedModel) -> None:
        """Look at every pass of the model, or of a part of it that can be called by itself."""
        modules = set(self.modules)
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and modules & set(part.modules()):
                part.register_forward_pre_hook(self.begin, with_kwargs=True)
                part.register_forward_hook(self.end, always_call=True)

    def begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a pass; of a prompt that is cut, the pieces but the last are read here, which this one becomes.

        Raises UserError if the cache is another model's or attention weights are asked for, CrossesSwitch as Lengths
        does.
        """
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Bound)), None)
        if cache is None:
            self._switch_off()  # which an interrupted pass may have left on
        elif self.outermost is None and not self.barred:
            passes = cache.passes()
            if passes is None or passes.modules != self.modules:
                raise UserError(other_model(cache))
            said = [
                kwargs.get("output_attentions"),
                *(getattr(config, "output_attentions", 0) for config in self.configs),
            ]
            if any(said):
                raise UserError(
                    "output_attentions=True: a compressed cache holds no attention over all tokens; leave it out, or "
                    "call the model without the cache of method.cache_for(model)"
                )
            pieces = pieces_of(cache, part, args, kwargs)
            before = [part(**piece) for piece in pieces[:-1]]
            if pieces:
                args, kwargs = (), pieces[-1]
            cache.begin_pass(args, kwargs)
            self.lengths.begin(cache, args, kwargs)
            self._switch_on(part)
            self._cache, self._before = cache, before
            self._edit.enter_context(cache.edit())
            return (args, kwargs) if pieces else None
        return None

    def end(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a pass, also one that failed."""
        if part is not self.outermost:
            return None
        cache, before = self._cache, self._before
        self._switch_off()
        if cache is None or output is None:  # None: it failed
            return None
        cache.ended_pass(part)
        return joined(before, output) if before else None

    def _switch_on(self, part: nn.Module) -> None:
        self.outermost = part
        self._stock = [config._attn_implementation_internal for config in self.configs]
        for config in self.configs:
            config._attn_implementation_internal = self.name
        if self.adapter is not None:
            name, function = self.adapter
            for module in self.modules:
                setattr(module, name, types.MethodType(function, module))

    def _switch_off(self) -> None:
        if self.outermost is None:
            return
        self.outermost, self._cache, self._before = None, None, []
        self._edit.close()
        for config, stock in zip(self.configs, self._stock, strict=True):
            config._attn_implementation_internal = stock
        if self.adapter is not None:
            for module in self.modules:
                del module.__dict__[self.adapter[0]]
        self.lengths.end()
