"""What a generator gives: a context, and questions with the answers that the context holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question about a context. `question` ends where the answer begins; `answer` begins with a blank or a newline.

    value: the part of the answer that cannot be known without the context.
    """

    question: str
    answer: str
    value: str


@dataclass(frozen=True)
class Document:
    """head: the instruction before the context, or empty.  depth: where the first turn's evidence sits, 0 to 1."""

    kind: str
    head: str
    context: str
    turns: tuple[Turn, ...] = ()
    depth: float = 0.0
    classes: tuple[str, ...] = ()

    @property
    def opening(self) -> str:
        """Everything before the first question."""
        return f"{self.head}\n\n{self.context}" if self.head else self.context

    def prompt(self, turn: int = 0) -> str:
        """The text that a model continues with the answer of `turn`."""
        return f"{self.opening}\n\n{self.turns[turn].question}"
