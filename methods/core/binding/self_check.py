"""Whether a bound model answers as the untouched one does, found out on a small copy of it before it is bound.

The copy has every kind of layer that the model has, and windows, chunks and switches of RoPE so short that two rows of
24 tokens meet them. One row is left-padded; both are read whole and in chunks and go on token by token, by the stock
model on its own cache and by the bound one on the full cache. What passes is remembered on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kernels.bounds import bound
from methods.core.binding.decoder import CannotBind, Decoder, decoder_of
from methods.core.binding.small_copy import FIRST_WORD, VOCAB, small_model
from methods.core.contract import ModelSpec
from methods.core.home import cache_folder

ROOT = Path(__file__).resolve().parents[3]
#: attribute of a model: whether it is tried out, as model.check says; without it, it is
CHECK = "_kvfrontier_check"
#: what the answer hangs on
CODE = (
    "methods/core",
    "methods/full.py",
    "kernels/attend",
    "kernels/bounds.py",
)

TOKENS, PADDING, DECODED = 24, 5, 3
PIECES = ([TOKENS], [8, 1, 15])
#: largest |logit| inside a copy's attention: its queries and keys are about normal, and so is their product over the
#: square root of their width; of the ten thousand pairs of a check none lies beyond 5, and gains of norms add to that
LOUDEST = 8.0
#: a change in a token before the last one that moves the logits less than this says that nothing could be seen
SEEN = 3e-2
SLOW = 3.0  # seconds without a word

#: a way to answer: a small model, and a cache for it
Full = Callable[[PreTrainedModel], Any]


def self_check(model: PreTrainedModel, decoder: Decoder, full: Full, adapted: Any) -> None:
    """Raises CannotBind when a small copy of `model`, bound, does not answer as the untouched copy does.

    full: binds a model unchecked and gives a full cache for it.  adapted: model types that have an adapter.
    """
    name = _key(model, decoder)
    if name in _passed() or _on_disk(name):
        return
    kind, begun = decoder.config.model_type, time.monotonic()
    with _quiet():
        off, allowed = _differences(model, decoder, full, adapted, begun)
    if not off <= allowed:
        raise CannotBind(kind, f"its output differs from the untouched model's by {off:.2g} of the logits' spread "
                         "(model.check=off binds it all the same)")  # fmt: skip
    _passed().add(name)
    _write(name, {"model": kind, "transformers": transformers.__version__, "off": off, "allowed": allowed})


@torch.no_grad()
def _differences(
    model: PreTrainedModel, decoder: Decoder, full: Full, adapted: Any, begun: float
) -> tuple[float, float]:
    """The largest difference of logits, over their spread, of any of the passes; and what rounding explains."""
    kind = decoder.config.model_type
    small, stock = _copy(model, decoder, adapted)
    if time.monotonic() - begun > SLOW:
        print(f"model: trying out a small copy of {kind} once, since nothing like it was bound before", file=sys.stderr)
    worst = allowed = 0.0
    for pieces, expected in zip(PIECES, stock, strict=True):
        try:
            cache = full(small)
            logits = _read(small, cache, pieces)
        except CannotBind as refused:
            raise CannotBind(kind, refused.reason) from refused
        except Exception as error:  # whatever a model does that was not made for our caches
            raise CannotBind(
                kind, f"its attention does more with what it stores than attend to it ({_line(error)})"
            ) from error
        spread = float(expected.std())
        apart = float((logits - expected).abs().max() / spread)
        allowed = _rounding(cache.spec, float(expected.abs().max()) / spread)
        worst = max(worst, apart if math.isfinite(apart) else math.inf)
    return worst, allowed


def _rounding(spec: ModelSpec, size: float) -> float:
    """How far two runs of a copy in float32 may be apart that compute the same; size: their largest logit.

    Every layer adds what its attention's sums are off by, which goes through the residual stream as it is; the longest
    of them is over a layer's width. Both runs are off, and independently: √2 times one, at as many standard deviations.
    """
    off = bound(torch.float32, spec.n_heads * spec.head_dim, LOUDEST, size=size, width=spec.head_dim)
    return math.sqrt(2) * spec.n_layers * off


def _copy(model: PreTrainedModel, decoder: Decoder, adapted: Any) -> tuple[PreTrainedModel, list[Tensor]]:
    """A small copy that runs, untouched, and its logits of every pass. Raises CannotBind when there is none."""
    kind, reason = decoder.config.model_type, ""
    for layers, narrow in _ways(model, decoder):
        try:
            small = small_model(model, layers, narrow=narrow)
            its = decoder_of(small, adapted)
            lists = _per_layer(decoder)
            if set(signatures(small, its, lists)) != set(signatures(model, decoder, lists)):
                reason = reason or "not all kinds of its layers can be brought together"
                continue
            stock = [_read(small, DynamicCache(config=small.config), pieces) for pieces in PIECES]
            other = _read(small, DynamicCache(config=small.config), PIECES[0], changed=TOKENS - 3)
            apart = float((other - stock[0])[:, TOKENS:].abs().max() / stock[0].std())
            if not apart > SEEN:
                reason = reason or "it does not depend on its tokens"
                continue
            return small, stock
        except Exception as error:  # a configuration that cannot be made small, a model that wants more than text
            reason = reason or _line(error)
    raise CannotBind(kind, f"no small copy of it could be tried out ({reason}); model.check=off binds it unseen")


def _ways(model: PreTrainedModel, decoder: Decoder) -> Iterator[tuple[list[int], bool]]:
    """Layers that a copy could have, the fewest first, and whether it is made narrow too."""
    kinds = signatures(model, decoder)
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    least = first if len(first) > 1 else [0, len(kinds) - 1] if len(kinds) > 1 else [0]
    up_to = list(range(max(first) + 1))
    for narrow in (True, False):
        yield least, narrow
        if up_to != least:
            yield up_to, narrow


def signatures(model: PreTrainedModel, decoder: Decoder, lists: Sequence[str] | None = None) -> list[Any]:
    """What tells the layers of a model apart, sizes left out: one hashable value per layer.

    lists: names of the settings with an entry per layer; in a copy of two layers another list may be as long.
    """
    values = [getattr(decoder.config, name) for name in (_per_layer(decoder) if lists is None else lists)]
    return [
        (_parts(layer), tuple(_kind(value[i]) for value in values))
        for i, layer in enumerate(_layers(model, decoder.modules))
    ]


def _per_layer(decoder: Decoder) -> list[str]:
    """Names of the settings that have an entry per layer."""
    n = len(decoder.modules)
    return [
        name for name, value in vars(decoder.config).items() if isinstance(value, (list, tuple)) and len(value) == n
    ]


def _layers(model: PreTrainedModel, attention: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The blocks that hold these attention modules; the modules themselves where there is no list of blocks."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(attention):
            inside = zip(module, attention, strict=True)
            if all(any(part is module for part in block.modules()) for block, module in inside):
                return list(module)
    return attention


def _parts(layer: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (type(part).__name__, tuple(sorted((k, _kind(v)) for k, v in vars(part).items() if _tells(k, v))))
        for part in layer.modules()
        if type(part).__module__.startswith("transformers.models") and "expert" not in type(part).__name__.lower()
    )


def _tells(name: str, value: Any) -> bool:
    return not name.startswith("_") and name != "training" and (value is None or isinstance(value, (bool, str, int)))


def _kind(value: Any) -> Any:
    """A setting without its size."""
    if value is None or isinstance(value, (bool, str)) or value in (0, 1):
        return str(value) if not isinstance(value, int) or isinstance(value, bool) else "number"
    return "number"


def _read(model: PreTrainedModel, cache: Any, pieces: Sequence[int], changed: int | None = None) -> Tensor:
    """Logits [real tokens, V] of two rows in these pieces and of what is decoded after them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(
        FIRST_WORD,
        min(VOCAB, model.config.get_text_config(decoder=True).vocab_size),
        (2, TOKENS + DECODED),
        generator=g,
    )
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    if changed is not None:
        ids[:, changed] = ids[:, changed - 1]
    out, at = [], 0
    for size in (*pieces, *[1] * DECODED):
        end = at + size
        output = model(input_ids=ids[:, at:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        out.append(output.logits)
        at = end
    return (torch.cat(out, dim=1) * mask[..., None]).float()


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _key(model: PreTrainedModel, decoder: Decoder) -> str:
    """A name for what decides the outcome: configuration, classes, transformers, our code."""
    total = hashlib.sha256()
    kinds: list[Any] = [type(model), type(decoder.modules[0])]
    for part in (
        json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        f"{type(model).__module__}.{type(model).__qualname__}",
        *map(_source, kinds),
        transformers.__version__,
        torch.__version__,
        _code(),
    ):
        total.update(part.encode() + b"\0")
    return total.hexdigest()[:32]


@cache
def _code() -> str:
    total = hashlib.sha256()
    files = [
        p for name in CODE for p in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))
    ]
    for path in files:
        total.update(path.read_bytes())
    return total.hexdigest()


@cache
def _source(kind: type) -> str:
    """A class's text; Python reads the whole file for it each time."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return kind.__qualname__


@cache
def _passed() -> set[str]:
    """Names of what has passed in this process."""
    return set()


def folder() -> Path:
    """Where what has passed is remembered."""
    return cache_folder() / "checks"


def _on_disk(name: str) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        note = json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))
        return float(note["off"]) <= float(note["allowed"])
    return False


def _write(name: str, note: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nowhere to remember it: it is tried out again
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), delete=False) as draft:
            json.dump(note, draft)
        os.replace(draft.name, folder() / f"{name}.json")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and torch say about a model that nobody asked for; no random state moves."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
