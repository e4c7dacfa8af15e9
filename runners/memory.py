"""How many bytes a group of caches will take, before it takes them, and how large a group may be."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from methods.core.contract import Method, Shape
from runners.engine.choices import encode
from runners.engine.conversation import dialogue
from tasks.base import Example

if TYPE_CHECKING:
    import torch

    from runners.cells import Run
    from runners.sweep import SweepCell


class Size:
    """Bytes of caches for a model with this configuration."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, held: torch.dtype | None = None):
        """dtype: of the model.  held: of the numbers in caches; None: the same."""
        number = (held or dtype).itemsize
        heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 1
        kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
        width = config.get("head_dim") or (
            (config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0) // heads
        )
        layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("n_layers") or 1
        self.shape = Shape(layers, kv_heads, width, number)
        #: keys and values of one token in all layers
        self.token = 2 * layers * kv_heads * width * number
        self.vocabulary, self.itemsize = config.get("vocab_size") or 0, dtype.itemsize

    def prompt(self, tokens: int, rows: int) -> int:
        """What the shared pass over a prompt holds beside the members: the layer it is in, at most a full cache."""
        return tokens * rows * self.token

    def logits(self, tokens: int, rows: int) -> int:
        """What the logits of a pass take, single precision beside the model's own."""
        return tokens * rows * self.vocabulary * (4 + self.itemsize)

    def member(self, method: Method, tokens: int, new: int, rows: int, chunked: bool) -> int:
        """What one member holds at most: the share that it plans; all of a prompt that comes in chunks."""
        share = method.planned_share(tokens, self.shape)
        return int((tokens * (1 if chunked else share) + new) * rows * self.token)


class GroupSizes:
    """What the cells of a sweep take on a batch, and the groups of them that memory has room for.

    max_cells: the largest group that is tried; lowered when memory runs out all the same.
    """

    def __init__(self, run: Run):
        self.run = run
        self.size = Size(run.checkpoint.config, run.dtype, run.cache_dtype)
        self.max_cells = run.cfg.group.max_cells or sys.maxsize
        self._tokens: dict[str, int] = {}  # of prompts, by example

    def split(self, members: Sequence[SweepCell], examples: Sequence[Example]) -> Iterator[list[SweepCell]]:
        """The members in groups that memory has room for."""
        bound = self.run.cfg.group.max_bytes or self._half_of_memory
        rows = sum(map(rows_of, examples))
        prompt = self.size.prompt(max(map(self.tokens, examples)), rows)
        logits = self.size.logits(max(map(block_of, examples)), rows)
        # cells without the full cache have one beside them all the same
        beside = self.member_bytes(self.run.full.method, examples) if any(self.run.panel.wants(examples)) else 0
        prompt += beside
        group: list[SweepCell] = []
        held = prompt
        for member in members:
            size = self.member_bytes(member.cell.method, examples) + logits
            if group and (held + size > bound or len(group) == self.max_cells):
                yield group
                group, held = [], prompt
            group.append(member)
            held += size
        yield group

    def member_bytes(self, method: Method, examples: Sequence[Example]) -> int:
        """What a method's cache takes for a batch, by its budget."""
        tokens = max(map(self.tokens, examples))
        new = max(max(example.max_new_tokens, block_of(example)) for example in examples)
        chunked = self.run.cfg.chunk is not None
        size = self.size.member(method, tokens, new, sum(map(rows_of, examples)), chunked)
        # later questions, choices and answers go on from a copy of what the earlier ones found
        copied = self.run.sampling.repeats > 1 or any(example.kind in ("turns", "choices") for example in examples)
        copied |= any(self.run.panel.wants(examples))  # what has parted from the full cache's answer is read again
        return 2 * size if copied else size

    @cached_property
    def _half_of_memory(self) -> int:
        return device_bytes(self.run.device) // 2

    def tokens(self, example: Example) -> int:
        """Tokens of the prompt and later questions; as many as fit where they cannot be encoded."""
        if example.timed is not None:
            return example.timed.length * example.timed.batch
        if example.forced is not None:
            return example.forced.length
        if example.id not in self._tokens:
            try:
                self._tokens[example.id] = self._count(example)
            except ValueError:
                self._tokens[example.id] = self.run.encoder.max_length or 0
        return self._tokens[example.id]

    def _count(self, example: Example) -> int:
        if example.kind == "choices":
            return max(len(encode(self.run.encoder, example, choice).prompt) for choice in example.choices)
        if example.kind == "turns":
            talk = dialogue(self.run.encoder, example)
            return len(talk.first.prompt.ids) + sum(len(question.golden) for question in talk.later)
        return len(self.run.encoder(example).prompt.ids)


def rows_of(example: Example) -> int:
    """Rows of a pass that an example takes: one for every prompt that is different."""
    return len({choice.question for choice in example.choices}) or 1


def block_of(example: Example) -> int:
    """The most tokens that are fed at once and of which each has logits."""
    if example.forced is not None:
        return min(example.forced.stride, example.forced.length)
    longest = max((len(choice.text) for choice in example.choices), default=1)  # a token has a character at least
    return min(longest, example.stride or longest)


def device_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
