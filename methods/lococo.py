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

from kernels import attend_with_mass, top
from kernels.select import compact
from methods.core import artefacts
from methods.core.budget import slots
from methods.core.contract import Holding, LayerCache, Method, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.core.per_row import PerRow
from methods.core.store import Store

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
        if self.budget == 1:
            return
        if self.budget > 1 and self.budget % 2:
            raise UserError(f"LoCoCo: budget={self.budget}; slots are even, such as budget={self.budget - 1}")
        if self.slots < 2 or self.fused < 1:
            raise UserError(f"LoCoCo: budget={self.budget} of method.length={self.length} with method.hh_keep_rate="
                            f"{self.hh_keep_rate} leaves no fused slot; raise the budget")  # fmt: skip
        if self.local_len and self.local_len >= self.raw:
            raise UserError(f"LoCoCo: method.local_len={self.local_len}; it is below the {self.raw} raw slots")

    @property
    def slots(self) -> int:
        """Slots per head; a budget of 1 drops nothing."""
        if self.budget == 1:
            return sys.maxsize
        return int(self.budget) if self.budget > 1 else slots(self.budget, self.length) // 2 * 2

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
        if self.budget == 1 or self.eta == 0:
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
        return {**super().config(), "slots": None if self.budget == 1 else self.slots}


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
        for conv in self.convs:
            x = self.activation(conv(x))
        return x.float().softmax(-1).view(*k.shape[:2], -1, k.shape[2])


@dataclass
class Slots:
    """Keys [B, H, S, D], values [B, H, S, Dv], positions and attention received [B, H, S] of some slots."""

    k: Tensor
    v: Tensor
    pos: Tensor
    mass: Tensor

    def gather(self, at: Tensor) -> Slots:
        """The slots at [B, H, n]."""
        k, v = (x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (self.k, self.v))
        return Slots(k, v, self.pos.gather(2, at), self.mass.gather(2, at))


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


class Memory:
    """Rows of one layer that are compressed at the same moments."""

    def __init__(self, method: LoCoCo, compressor: Compressor | None, capacity: int | None):
        self.method, self.compressor = method, compressor
        self.store = Store(capacity)
        self.left = 0  # tokens that the current chunk still lacks; 0: the next one begins a chunk
        self.prompt = 0  # tokens of the prompt
        self.step: Step | None = None
        self.at = self.here = self.last = 0  # tokens of the step done, in this piece, and of them in the last chunk
        self.fresh = False  # whether the piece begins the last chunk

    def append(self, step: Step) -> None:
        """Bring in the first piece of the step; its rows hold no padding."""
        self.step, self.at = step, 0
        if step.q.shape[2] == 0:
            return
        if step.stage in (Stage.MID_PROMPT, Stage.ENDS_PROMPT):
            self.prompt += step.q.shape[2]
        self._next_piece(step)

    def attend(self) -> Tensor:
        """The step's output [B, Hq, T, Dv]; later pieces are brought in when those before have attended."""
        assert self.step is not None, "a step is taken in before it attends"
        step, T = self.step, self.step.q.shape[2]
        if T == 0:
            return step.q.new_zeros(*step.q.shape[:3], step.v.shape[-1])
        out = [self._attend_piece(step)]
        while self.at < T:
            self._next_piece(step)
            out.append(self._attend_piece(step))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def end_step(self, step: Step) -> None:
        """Only within a prompt does a chunk stay open for the next step's tokens."""
        self.step = None
        if step.stage is Stage.MID_PROMPT:
            return
        self.left = 0
        if step.stage is Stage.ENDS_PROMPT:
            if not self.method.lazy_end and len(self.store) > self.method.max_slots:
                self._compress()
            self.store.tighten()

    def detach(self) -> None:
        """Let no later gradient reach what is held."""
        self.store.buffers = {name: buffer.detach() for name, buffer in self.store.buffers.items()}

    def _next_piece(self, step: Step) -> None:
        """Compress if it is due, then append the rest of a chunk, and further chunks as long as nothing is due."""
        method, rest = self.method, step.q.shape[2] - self.at
        if self.left == 0:  # a chunk begins: the only moment at which the memory is compressed
            if len(self.store) > method.max_slots:
                self._compress()
            self.left, self.fresh = method.chunk, True
        # the rest of the chunk, as far as the step has tokens for it
        n = self.last = min(self.left, rest)
        self.left -= n
        # what follows would be compressed at its begin only if the memory were too full: until then it is one piece
        while n < rest and len(self.store) + n <= method.max_slots:
            self.last = min(method.chunk, rest - n)
            n, self.left, self.fresh = n + self.last, method.chunk - self.last, True
        self.here = n
        new = slice(self.at, self.at + n)
        self.store.append(step.k[:, :, new], step.v[:, :, new], step.pos[:, new])

    def _attend_piece(self, step: Step) -> Tensor:
        # the step itself where it is one piece, which is what most steps are
        piece, n = step, self.here
        if n < step.q.shape[2]:
            new = slice(self.at, self.at + n)
            piece = replace(step, q=step.q[:, :, new], k=step.k[:, :, new], v=step.v[:, :, new], pos=step.pos[:, new])
        self.at += n
        if not self._watched(step):
            return self.store.attend(piece)
        # slots are judged by the current chunk's queries, or by all of them where scores add up over chunks
        n = n if self.method.accumulate_scores else self.last
        k, v = self.store.read()
        out, each = attend_with_mass(
            piece.q, k, v, piece.rules, n, q_pos=piece.pos, k_pos=self.store.pos, layout="tail"
        )  # each [B, Hq, S]
        # a new chunk starts the sums anew; the query heads of a KV head add theirs
        received = self.store.track("mass")
        if self.fresh and not self.method.accumulate_scores:
            received.zero_()
        received += each.unflatten(1, (received.shape[1], -1)).sum(2)
        self.fresh = False
        return out

    def _watched(self, step: Step) -> bool:
        """Whether the next compression could look at the attention of this piece's queries."""
        if self.method.budget == 1:
            return False
        to_come = self.left if step.stage is Stage.MID_PROMPT else 0
        return self.method.accumulate_scores or len(self.store) + to_come > self.method.max_slots

    def _compress(self) -> None:
        """Fill the store anew, without free places."""
        old = self.store
        compressed = compress(Slots(old.k, old.v, old.pos, old.track("mass")), self.method, self.compressor)
        self.store = store = Store()
        store.n, store.buffers, store.fills = self.method.slots, vars(compressed), dict(old.fills)
        store.max_slots, store.to_come = self.method.max_slots + 1, old.to_come

    def copy(self, rows: slice) -> Memory:
        """The same for some of the rows."""
        copy = Memory(self.method, self.compressor, self.store.capacity)
        copy.left, copy.prompt = self.left, self.prompt
        copy.store.n, copy.store.fills = self.store.n, dict(self.store.fills)
        copy.store.max_slots, copy.store.to_come = self.store.max_slots, self.store.to_come
        copy.store.buffers = {name: buffer[rows].clone() for name, buffer in self.store.buffers.items()}
        return copy


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
