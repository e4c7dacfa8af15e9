"""From an example to token ids: cut to fit, wrapped in the chat template, split where the question starts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from methods.core.errors import UserError
from runners.engine import thoughts
from runners.engine.generation import Prompt
from runners.engine.model_files import dated
from runners.engine.new_tokens import Draw, Limits, Stops
from runners.engine.time_limit import within_template
from tasks.base import Example, Forced, cut_at
from tasks.sampling import GREEDY, Sampling
from tasks.tokens import Tokens
from tasks.truncate import cut_middle, truncate_middle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MARK = "\ue000turn\ue001"  # private characters, which no text has


class Tokenized(NamedTuple):
    """Token ids of a prompt, how many of them end inside the context, and its parts by name, as in `Prompt.spans`."""

    ids: list[int]
    n_context: int
    spans: dict[str, tuple[int, int]]


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
    date: what a template that writes today's date is told, such as 2024-07-26; None: it asks for none.
    reasoning: what becomes of a <think> block in an answer: "strip" does not score it, "keep" does, "off" fails.
    hold_last: prompts are `held`.
    sampling: how answers are drawn.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    max_length: int | None = None
    window: int | None = None
    chat: bool = True
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    reasoning: str = "strip"
    hold_last: bool = False
    sampling: Sampling = GREEDY
    _texts: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, example: Example) -> Encoded:
        """Raises ValueError if the question alone leaves no room for context."""
        new = example.max_new_tokens + len(self.plain(example.begins))
        _, cut, made = self._fit(example, new, example.whole_question)
        return self.encoded(example, made, cut)

    def fit(self, example: Example, new: int) -> tuple[str, bool]:
        """The example's context, its middle taken out if prompt and `new` tokens would not fit; and whether it was.

        Raises ValueError if the question alone leaves no room for context.
        """
        return self._fit(example, new)[:2]

    def _fit(self, example: Example, new: int, whole_question: bool = True) -> tuple[str, bool, Tokenized]:
        room = None if self.window is None else self.window - new
        limit = min((n for n in (self.max_length, room) if n is not None), default=None)
        context, cut, asked = example.context, False, example
        rest = example.question + example.prefill
        while True:
            if limit is not None and whole_question:
                context, cut = truncate_middle(example.context, rest, limit, self._encode, self._decode)
            elif limit is not None:
                context, rest, cut = cut_middle(example.context, example.question, limit, self._encode, self._decode)
                asked = replace(example, question=rest)
            made = self._tokenize(context, asked)
            if limit is None or room is None or len(made.ids) <= room:
                return context, cut, made
            limit -= len(made.ids) - room  # the template, or a few tokens that encoding again has added

    def encoded(self, example: Example, made: Tokenized, cut: bool) -> Encoded:
        """These tokens as the example's prompt."""
        prompt = Prompt(
            made.ids,
            made.n_context,
            max_new_tokens=example.max_new_tokens,
            min_new_tokens=example.min_new_tokens,
            ends=self.ends_of(example),
            sample=number_of(example),
            held=self.hold_last,
            stops=self.stops_of(example),
            sampling=self.sampling,
            spans=made.spans,
            begins=tuple(self.plain(example.begins)),
        )
        return Encoded(prompt, cut, bos=made.ids.count(self.tokenizer.bos_token_id))

    def ends_of(self, example: Example) -> tuple[int, ...]:
        """Token ids that end the example's answers."""
        newline = {self.plain("\n")[-1]} if example.stop_at_newline else set()
        return tuple(sorted({*self.ends, *newline}))

    def stops_of(self, example: Example) -> Stops | None:
        """Strings that end the example's answers: in what is scored, so that none inside a <think> block counts."""
        if not example.stop:
            return None
        return Stops(example.stop, self._decode, lambda ids: self._said(example, ids)[0])

    def limits(self, example: Example, most: int, least: int = 0, turn: int = 0) -> Limits:
        """When the answer to a later question of the example ends, the first one being turn 0."""
        draw = Draw(self.sampling, number_of(example), turn=turn) if self.sampling.temperature else None
        return Limits(most, least, self.ends_of(example), self.stops_of(example), draw)

    def piece(self, forced: Forced) -> list[int]:
        """The tokens of a piece of a text, the special one before it included."""
        if forced.text not in self._texts:
            self._texts[forced.text] = self.plain(forced.text)
        ids = self._texts[forced.text]
        if not forced.bos:
            ids = [*(self.prefix if forced.prefix else self.opening), *ids]
            return ids[forced.start : forced.start + forced.length]
        return [*self.opening, *ids[forced.start :]][: forced.length]

    @cached_property
    def opening(self) -> list[int]:
        """The special tokens that the tokenizer puts before every text, such as a beginning of sequence, or none.

        Those that it puts behind a text, such as an end of sequence, are left out: an answer is to follow.
        """
        bare, whole = self.plain("a"), self.tokenizer.encode("a", verbose=False)
        return next(whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare)

    @property
    def prefix(self) -> list[int]:
        """A token from which a text's first one can be predicted: the beginning of a sequence, else its end, if any."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [token for token in (bos, eos) if token is not None][:1]

    def text(self, ids: Sequence[int]) -> str:
        """An answer without the token that ended it, flagged as special or not, and special tokens."""
        return self._decode(self._spoken(ids))

    def said(self, example: Example, ids: Sequence[int]) -> tuple[str, str]:
        """An answer as it is scored, and the <think> blocks in it, which count unless `reasoning` is "strip"."""
        text, reasoning = self._said(example, ids)
        return cut_at(text, example.stop), reasoning

    def _said(self, example: Example, ids: Sequence[int]) -> tuple[str, str]:
        """The same with the stop string that ended it."""
        # tags that are flagged as special would be lost with the other special tokens
        runs = groupby(self._spoken(ids), self._tags.get)
        text = "".join(self._decode(list(run)) if tag is None else tag * len(list(run)) for tag, run in runs)
        answer, reasoning = thoughts.apart(text, self._opens_block(example))
        return (answer if self.reasoning == "strip" and reasoning else self.text(ids)), reasoning

    def _spoken(self, ids: Sequence[int]) -> Sequence[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]

    @cached_property
    def _tags(self) -> dict[int, str]:
        """The token ids of a block's tags that are flagged as special."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {id: str(one.content) for id, one in added if one.special and one.content in thoughts.TAGS}

    def _opens_block(self, example: Example) -> bool:
        """Whether the example's prompt ends inside a <think> block, so that its answer begins there."""
        if self.chats(example):
            return thoughts.opens(self._behind_turn + example.prefill)
        return (example.question + example.prefill).rstrip().endswith(thoughts.OPEN)

    @cached_property
    def _behind_turn(self) -> str:
        """What the chat template writes between a user's turn and the answer."""
        return self.templated((), MARK).rpartition(MARK)[2]

    def tokens(self) -> Tokens:
        """What a task may know: a prompt of `longest` tokens, special ones not counted, is not cut."""
        limit = min((n for n in (self.max_length, self.window) if n is not None), default=None)
        wrapper = 0
        if self.chat and self.tokenizer.chat_template:
            text = self.wrap("a", 1)[0]
            wrapper = len(self.plain(text)) - len(self.plain("a"))
        special = len(self.opening)
        longest = None if limit is None else limit - special
        return Tokens(self.plain, self._decode, longest, wrapper, special, special, len(self.prefix))

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _encode(self, text: str) -> list[int]:
        return [*self.opening, *self.plain(text)]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _tokenize(self, context: str, example: Example) -> Tokenized:
        """Token ids of the whole prompt, how many of them end inside the context, and its parts."""
        text, split, first = context + example.question, len(context), 0
        end = len(text)
        wrap = self.chats(example)
        if wrap:
            text, first, split, end = self.wrap(text, split, example.shots)
        text += example.prefill
        opening = [] if wrap else self.opening  # a template writes its own
        if not self.tokenizer.is_fast:
            ids, start = self.plain(text), self.plain(text[:split])
            n_context = next((i for i, (a, b) in enumerate(zip(ids, start)) if a != b), min(len(ids), len(start)))
            spans = {"context": (0, n_context), "question": (n_context, len(ids))}
        else:
            both = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, ends = both["input_ids"], [end for _, end in both["offset_mapping"]]
            begin, n_context, behind = (
                next((i for i, e in enumerate(ends) if e > at), len(ids)) for at in (first, split, end)
            )
            spans = {"template": (0, begin), "context": (begin, n_context), "question": (n_context, behind)}
        moved = {name: (len(opening) + a if a else a, len(opening) + b) for name, (a, b) in spans.items()}
        return Tokenized([*opening, *ids], len(opening) + n_context, moved)

    def chats(self, example: Example) -> bool:
        """Whether the example's prompt is wrapped. Raises UserError if it has turns that need a template."""
        wrap = self.chat and example.chat and bool(self.tokenizer.chat_template)
        if example.shots and not wrap:
            raise UserError(
                "model: examples given as turns need the tokenizer's chat template, and none is in use; "
                "take a chat model, or give the examples as text"
            )
        return wrap

    def templated(self, turns: Sequence[tuple[str, str]], last: str) -> str:
        """Earlier user and assistant turns and a last user turn in the chat template, ready for the answer."""
        messages = []
        for user, assistant in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        messages.append({"role": "user", "content": last})
        options = dict(self.chat_options)
        if self.date:
            options["chat_template"] = dated(self.tokenizer.get_chat_template(), self.date)
        with within_template():
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        assert isinstance(text, str)
        return text

    def wrap(self, prompt: str, split: int, shots: Sequence[tuple[str, str]] = ()) -> tuple[str, int, int, int]:
        """The prompt as the last user turn, and where in it the turn begins, the context ends, and the turn ends."""
        text = self.templated(shots, prompt)
        # where the turn stands is where a mark would stand: the words of a short one may be the template's own
        before, _, behind = self.templated(shots, MARK).rpartition(MARK)
        if not (text.startswith(before) and text.endswith(behind)):
            raise ValueError("the chat template changes with what its turn says; model.chat=false leaves it out")
        turn = text[len(before) : len(text) - len(behind)]
        at = prompt.find(turn)  # some templates strip a turn
        if at < 0 or turn.strip() != prompt.strip():
            raise ValueError("the chat template rewrites its turn; model.chat=false leaves it out")
        return text, len(before), len(before) + min(max(0, split - at), len(turn)), len(before) + len(turn)


def number_of(example: Example) -> int:
    """The number that the example's sample is known by where something is drawn."""
    return zlib.crc32(example.id.encode())
