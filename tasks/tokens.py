"""What a task may know of a tokenizer: how texts are counted, and how long a prompt may be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from methods.core.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """Given to tasks whose prompts have a length in tokens.

    encode: text to token ids, without special tokens.  decode: token ids to text.
    longest: tokens that a prompt and its answer may take together without the prompt being cut; None: no limit.
    wrapper: tokens that the chat template puts around a prompt.  opening: tokens that come before every text.
    special: tokens that are put around every text, which `longest` leaves room for.
    prefix: tokens that can stand before a text so that its first one is predicted too: 1, or 0 without any such.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    longest: int | None = None
    wrapper: int = 0
    opening: int = 0
    special: int = 0
    prefix: int = 1

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def resolve(self, who: str, length: float) -> int:
        """A length as typed, in tokens: a share of `longest` up to 1, or a number of tokens above 1.

        Raises UserError if prompts of that length would be cut, or a share has nothing to be a share of.
        """
        if length <= 1:
            if self.longest is None:
                raise UserError(f"{who}: task.lengths={length:g} is a share of a window that this model does not name")
            return int(length * self.longest)
        if self.longest is not None and length > self.longest:
            raise UserError(
                f"{who}: task.lengths={length:g} tokens; this model takes {self.longest} of prompt and answer uncut; "
                "give less, or raise model.max_length if its window is larger"
            )
        return int(length)
