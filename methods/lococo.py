"""LoCoCo: fuse what does not fit into a fixed number of slots, with weights from a small trained convolution.

Paper: Cai et al. 2024, arXiv:2406.05317; the algorithm is that of the authors' release, VITA-Group/LoCoCo.
Idea:  a sequence is read in chunks. Before a chunk, a layer that holds more than its slots keeps a share of them, the
       heaviest hitters of the last chunk, as they are. All other slots are fused into the rest: a 1-D convolution over
       keys and values gives each fused slot its weights over them, and a gate mixes those with the slot that plain
       dropping would have kept. What is held never grows with the sequence. One trained compressor fits one model, one
       number of slots and one length of chunk.
Here:  chunks begin at multiples of `block_size` in each row's own tokens, whatever pieces a prompt arrives in; a later
       turn begins a chunk. The release sums attention per query head and so runs on multi-head models only; here the
       heads that share a KV head sum theirs, and the convolution runs once per KV head. Padding never enters it: a
       padded batch keeps its rows apart. The last chunk of a prompt is compressed when the prompt ends instead of just
       before the next token: the outputs are the same and the memory is free; lazy_end=true waits, as the release does.
       A fused slot carries the position of the slot that dropping would have kept; keys are not rotated again. eta=0
       drops instead of fusing and needs no training; paper_form is the paper's description, without raw half and gate.
       The base model stays frozen: no LoRA, no training of norms and embeddings, no RoPE scaling for longer windows.
       The weights that ship for the reference model were trained as a CPU allows and not as the release's: towards the
       full cache's predictions (runner.loss=text is the paper's next token), with the newest 32 slots always raw
       (local_len, the release: 0), gates that begin at 0.3 (0.5) and weights at 0.01 (1), rates of 1e-3 and 3e-3 that
       rise for 20 steps (5e-2, no rise), one chunk per step (1,024). Their cards say how little they gain.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import top
from kernels.select import compact
from methods.core import artefacts
from methods.core.budget import slots
from methods.core.contract import Holding, LayerCache, Method, ModelSpec
from methods.core.errors import NotHere, UserError
from methods.core.per_row import PerRow
from methods.core.stores.chunk_memory import ChunkMemory, Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
TRAINER = "runner=train"


@dataclass
class LoCoCo(Method):
    """A memory of fixed size, refilled by a convolution.

    budget: slots per head, even; a share is of `length` tokens, because the slots are part of the trained weights.
    block_size: tokens per chunk; None: as many as slots.
    kernel_size, n_convlayer, expand, hidden_act: width, depth, factor of inner channels, and activation.
    hh_keep_rate: share of the slots that are kept as they are.
    local_len: newest slots that are always among them; None: as many as in training, 0 without trained weights.
    buffer: slots that a layer may hold on top before it compresses.
    normalizer_init: the gate before training.  eta: a gate for all layers instead of the trained ones.
    accumulate_scores: sum attention over all chunks instead of looking at the last one.
    artefact: file of trained weights; None: the one that was trained for the model and these sizes.
    """

    length: int = 1024
    block_size: int | None = None
    kernel_size: int = 21
    n_convlayer: int = 1
    expand: int = 1
    hidden_act: str = "relu"
    hh_keep_rate: float = 0.5
    local_len: int | None = None
    buffer: int = 16
    normalizer_init: float = 0.5
    eta: float | None = None
    accumulate_scores: bool = False
    lazy_end: bool = False
    paper_form: bool = False
    artefact: str | None = None

    changes_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paper_form:
            self.hh_keep_rate, self.eta = 0.0, 1.0
        for key, least in (("length", 1), ("n_convlayer", 1), ("expand", 1), ("local_len", 0), ("buffer", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"LoCoCo: method.{key}={getattr(self, key)}; give a whole number, {least} or more")
        if self.block_size is not None and self.block_size < 1:
            raise UserError(f"LoCoCo: method.block_size={self.block_size}; give tokens per chunk, or null for as many "
                            "as slots")  # fmt: skip
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"LoCoCo: method.kernel_size={self.kernel_size}; an odd width has a centre")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"LoCoCo: method.hidden_act={self.hidden_act}; it is one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.hh_keep_rate < 1:
            raise UserError(f"LoCoCo: method.hh_keep_rate={self.hh_keep_rate}; a share from 0 to below 1 stays raw")
        if not 0 <= self.normalizer_init <= 1:
            raise UserError(f"LoCoCo: method.normalizer_init={self.normalizer_init}; the gate starts between 0 and 1")
        if self.request.is_off:
            return
        if (self.request.number or 0) % 2:
            raise UserError(f"LoCoCo: budget={self.budget}; slots are even, such as budget={self.budget - 1}")
        if self.slots < 2 or self.fused < 1:
            raise NotHere(f"LoCoCo: budget={self.budget} of method.length={self.length} with method.hh_keep_rate="
                            f"{self.hh_keep_rate} leaves no fused slot; raise the budget")  # fmt: skip
        if self.local_len and self.local_len >= self.raw:
            raise UserError(f"LoCoCo: method.local_len={self.local_len}; it is below the {self.raw} raw slots")

    @property
    def slots(self) -> int:
        """Slots per head; a budget of 1 drops nothing."""
        if self.request.is_off:
            return sys.maxsize
        return self.request.number or slots(self.budget, self.length) // 2 * 2

    @property
    def fused(self) -> int:
        """Slots that the convolution fills."""
        return int(self.slots * (1 - self.hh_keep_rate))

    @property
    def raw(self) -> int:
        """Slots that stay as they are."""
        return self.slots - self.fused

    @property
    def max_slots(self) -> int:
        """A layer that holds more slots than this compresses before the next chunk."""
        return self.slots + self.buffer

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return self.block_size or self.slots

    @property
    def artefact_name(self) -> str:
        """What the weights of these sizes are called."""
        depth = f"-d{self.n_convlayer}x{self.expand}" if self.n_convlayer > 1 else ""
        return f"m{self.slots}-c{self.chunk}-k{self.kernel_size}-r{self.hh_keep_rate:g}{depth}"

    def new_compressors(self, model: PreTrainedModel) -> Compressors:
        """One untrained compressor per layer, on the model's device, float32."""
        config = model.config.get_text_config(decoder=True)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        compressors = Compressors(Compressor(self, 2 * width) for _ in range(config.num_hidden_layers))
        compressors.local_len = self.local_len or 0
        return compressors.to(next(model.parameters()).device)

    def prepare(self, model: PreTrainedModel) -> Compressors | None:
        """The trained compressors of this model in its dtype; None where nothing is fused."""
        if self.request.is_off or self.eta == 0:
            return None
        compressors = self.new_compressors(model)
        shapes = {key: tensor.shape for key, tensor in compressors.state_dict().items()}
        make = f"{TRAINER} budget={self.slots}"
        artefact = artefacts.load("lococo", self.artefact_name, model, self.artefact, shapes, make)
        if (act := artefact.card["hidden_act"]) != self.hidden_act:
            raise UserError(f"LoCoCo: {artefacts.shown(artefact.path)} was trained with method.hidden_act={act}, "
                            f"not {self.hidden_act}")  # fmt: skip
        compressors.load_state_dict(artefact.tensors)
        compressors.local_len = artefact.card.get("local_len", 0)
        return compressors.to(next(model.parameters()).dtype).requires_grad_(False)

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        compressors = spec.prepared
        method = replace(self, local_len=compressors.local_len) if compressors and self.local_len is None else self
        return [LoCoCoCache(method, compressors[i] if compressors else None, prompt_len) for i in range(spec.n_layers)]

    def config(self) -> dict[str, Any]:
        return {**super().config(), "slots": None if self.request.is_off else self.slots}


class Compressors(nn.ModuleList):
    """The compressors of all layers.  local_len: newest slots that were kept raw in their training."""

    local_len: int = 0


class Compressor(nn.Module):
    """The weights of one layer, shared by its heads: convolutions over the slots, and the gate."""

    def __init__(self, method: LoCoCo, width: int):
        """width: channels of a key and a value together."""
        super().__init__()
        inner = [method.fused * method.expand] * (method.n_convlayer - 1)
        sizes = [width, *inner, method.fused]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, method.kernel_size, padding=method.kernel_size // 2) for a, b in pairwise(sizes)
        )
        for conv in self.convs:
            nn.init.normal_(conv.weight)
        self.eta = nn.Parameter(torch.tensor(float(method.normalizer_init)))
        self.activation = ACTIVATIONS[method.hidden_act]

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        """Weights of each fused slot over slots k [B, H, N, D], v [B, H, N, Dv]: [B, H, fused, N], float32, sum 1."""
        x = torch.cat((k, v), dim=-1).flatten(0, 1).transpose(1, 2)  # [B * H, D + Dv, N]
        x = x.to(self.eta.dtype)  # slots may be held in fewer bits
        for conv in self.convs:
            x = self.activation(conv(x))
        return x.float().softmax(-1).view(*k.shape[:2], -1, k.shape[2])


def compress(held: Slots, method: LoCoCo, compressor: Compressor | None) -> Slots:
    """`method.slots` slots of the S that are held: the raw ones in their order, then the fused ones in theirs."""
    # raw: the heaviest hitters of the last chunk, and the newest slots where `local_len` asks for them
    S = held.k.shape[2]
    score = held.mass
    if method.local_len:
        score = score.clone()
        score[:, :, -method.local_len :] = torch.inf
    keep = top(score, score.new_full((1, 1), method.raw))  # [B, H, S]
    raw = held.gather(compact(keep, method.raw)[0])
    others = held.gather(compact(~keep, S - method.raw)[0])  # [B, H, N]
    # a fused slot begins as the one that plain dropping would have kept in its place: the next heaviest, in order
    next_best, _ = compact(top(others.mass, score.new_full((1, 1), method.fused)), method.fused)  # [B, H, fused]
    fused = others.gather(next_best)
    if compressor is not None:
        # the gate mixes that slot with a weighted sum over all others; eta = 0 is dropping
        eta = compressor.eta.float() if method.eta is None else method.eta
        weights = compressor(others.k, others.v) * eta  # [B, H, fused, N]
        fused.k, fused.v = (
            ((1 - eta) * one.float() + weights @ all_.float()).to(one.dtype)
            for one, all_ in ((fused.k, others.k), (fused.v, others.v))
        )
        if method.accumulate_scores:  # a sum over chunks goes on in the fused slot; it takes no part in training
            fused.mass = (1 - eta) * fused.mass + (weights.detach() @ others.mass[..., None]).squeeze(-1)
    both = ((raw.k, fused.k), (raw.v, fused.v), (raw.pos, fused.pos), (raw.mass, fused.mass))
    return Slots(*(torch.cat(pair, dim=2) for pair in both))


class Memory(ChunkMemory):
    """Rows of one layer that are compressed at the same moments, by the layer's weights."""

    def __init__(self, method: LoCoCo, compressor: Compressor | None, capacity: int | None):
        super().__init__(method, capacity)
        self.lococo, self.compressor = method, compressor

    def compressed(self, held: Slots) -> Slots:
        return compress(held, self.lococo, self.compressor)


class LoCoCoCache(PerRow[Memory]):
    """One layer: a memory for all rows, or one for each once a row has padding."""

    def __init__(self, method: LoCoCo, compressor: Compressor | None, prompt_len: int | None):
        capacity = None if prompt_len is None else min(prompt_len, method.max_slots + method.chunk)
        super().__init__(Memory(method, compressor, capacity))
        self.method = method

    def adapters(self) -> Iterable[Tensor]:
        compressor = self.memories[0].compressor
        return () if compressor is None else compressor.parameters()

    def holding(self) -> Holding:
        """On top of the budget positions and scores, and the slots that wait for the next compression."""
        method, whole = self.method, Holding([], [], [])
        for memory in self.memories:
            held = memory.store.holding()
            lag = method.buffer + method.chunk * method.lazy_end
            waiting = max(0, min(len(memory.store) - method.slots, lag))
            slots = [n - beside for n, beside in zip(held.held, held.beside)]  # keys and values
            whole.held += held.held
            whole.beside += [n + waiting * kv // len(memory.store) for n, kv in zip(held.beside, slots)]
            whole.padding += held.padding
        return whole

    def budget_bytes(self, full: Sequence[int]) -> list[int]:
        """The slots, which are a number and no share of the prompt."""
        slots, prompts = self.method.slots, [memory.prompt for memory in self.memories]
        prompts *= len(full) // len(self.memories)
        return [min(size, math.ceil(size * slots / max(1, n))) for size, n in zip(full, prompts, strict=True)]

    @property
    def due(self) -> bool:
        """Whether the next chunk begins with a compression."""
        return any(memory.left == 0 and len(memory.store) > self.method.max_slots for memory in self.memories)

    def detach(self) -> None:
        """Let no later gradient reach what is held: training looks back over one compression."""
        for memory in self.memories:
            memory.detach()
