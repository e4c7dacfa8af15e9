"""From an example to token ids: cut to fit, wrapped in the chat template, split where the question starts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runners.generate import Prompt
from tasks.base import Example
from tasks.tokens import Tokens
from tasks.truncate import truncate_middle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """A prompt and what was done to it.

    cut: its middle was taken out.  bos: beginning-of-sequence tokens in it.
    """

    prompt: Prompt
    cut: bool
    bos: int


@dataclass(frozen=True)
class Encoder:
    """Turns examples into prompts for one tokenizer and model.

    ends: token ids that end every answer.
    max_length: tokens of a prompt, before the chat template is put around it; None: only the window limits it.
    window: positions that the model has, for prompt and answer together; None: no limit.
    chat: use the chat template where the example wants one and the tokenizer has one; chat_options go to the template.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    max_length: int | None = None
    window: int | None = None
    chat: bool = True
    chat_options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, example: Example) -> Encoded:
        """Raises ValueError if the question alone leaves no room for context."""
        room = None if self.window is None else self.window - example.max_new_tokens
        limit = min((n for n in (self.max_length, room) if n is not None), default=None)
        context, cut = example.context, False
        rest = example.question + example.prefill
        while True:
            if limit is not None:
                context, cut = truncate_middle(example.context, rest, limit, self._encode, self._decode)
            ids, n_context = self._tokenize(context, example)
            if limit is None or room is None or len(ids) <= room:
                break
            limit -= len(ids) - room  # the template, or a few tokens that encoding again has added
        ends = set(self.ends)
        if example.stop_at_newline:
            ends.add(self.tokenizer.encode("\n", add_special_tokens=False)[-1])
        prompt = Prompt(
            ids,
            n_context,
            max_new_tokens=example.max_new_tokens,
            min_new_tokens=example.min_new_tokens,
            ends=tuple(sorted(ends)),
            sample=zlib.crc32(example.id.encode()),
        )
        return Encoded(prompt, cut, bos=ids.count(self.tokenizer.bos_token_id))

    def text(self, ids: Sequence[int]) -> str:
        """An answer as it is scored: special tokens skipped."""
        return self._decode(ids)

    def tokens(self) -> Tokens:
        """What a task may know: a prompt of `longest` tokens, special ones not counted, is not cut."""
        limit = min((n for n in (self.max_length, self.window) if n is not None), default=None)
        wrapper = 0
        if self.chat and self.tokenizer.chat_template:
            text, _ = self._wrap("a", 1)
            wrapper = len(self._plain(text)) - len(self._plain("a"))
        longest = None if limit is None else limit - len(self._encode(""))
        return Tokens(self._plain, self._decode, longest, wrapper)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, verbose=False)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _tokenize(self, context: str, example: Example) -> tuple[list[int], int]:
        """Token ids of the whole prompt, and how many of them end inside the context."""
        text, split = context + example.question, len(context)
        wrap = self.chat and example.chat and bool(self.tokenizer.chat_template)
        if wrap:
            text, split = self._wrap(text, split)
        text += example.prefill
        special = not wrap  # a template writes its own
        if not self.tokenizer.is_fast:
            ids = self.tokenizer.encode(text, add_special_tokens=special, verbose=False)
            start = self.tokenizer.encode(text[:split], add_special_tokens=special, verbose=False)
            return ids, next((i for i, (a, b) in enumerate(zip(ids, start)) if a != b), min(len(ids), len(start)))
        both = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids, ends = both["input_ids"], [end for _, end in both["offset_mapping"]]
        return ids, next((i for i, end in enumerate(ends) if end > split), len(ids))

    def _wrap(self, prompt: str, split: int) -> tuple[str, int]:
        """The prompt as one user turn, and where the context ends in it."""
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **self.chat_options)
        assert isinstance(text, str)
        bare = prompt.strip()  # some templates strip a turn
        at = text.find(bare)
        if at < 0:
            raise ValueError("the chat template rewrites its turn; model.chat=false leaves it out")
        return text, at + split - (len(prompt) - len(prompt.lstrip()))
