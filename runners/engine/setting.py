"""What all samples of a run share, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.records import PROTOCOLS
from methods.core.contract import Method
from methods.core.errors import NotHere, UserError
from runners.engine.fidelity.panel import Panel
from runners.engine.prompt import Encoder
from tasks.base import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Setting:
    """What all samples of a run share.

    tokenizes: the encoder, which only samples that have a text ask for.  limit: seconds that a batch may take.
    budget_miss: "keep" a sample that holds more than its budget and documented overhead, with its bytes, or "fail".
    panel: which samples have the forced half of a fidelity panel; None: none.
    """

    model: PreTrainedModel
    task: Task
    tokenizes: Callable[[], Encoder]
    protocol: str
    chunk: int | None
    threads: int
    limit: float | None = None
    budget_miss: str = "keep"
    panel: Panel | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder; the tokenizer is loaded when it is first asked for."""
        return self.tokenizes()

    @property
    def pad_id(self) -> int:
        """The token that rows are filled up with."""
        return self.encoder.tokenizer.pad_token_id or 0


def check_protocol(
    examples: Sequence[Example], protocol: str, methods: Sequence[Method], last_token: str | None = None
) -> None:
    """Raises UserError if a score would not say what it seems to: before anything is run."""
    check_last_token(examples, protocol, last_token)
    query = PROTOCOLS[protocol]
    if protocol == "aware" and any(example.history == "none" for example in examples):
        raise UserError(
            f"protocol={query}: questions that are asked apart share a context that was compressed before any of "
            "them was known; give protocol=query_agnostic"
        )
    if protocol != "aware" and any(example.beams > 1 for example in examples):
        raise UserError(f"protocol={query}: a beam search reads its whole prompt at once; give protocol=query_aware")
    if protocol != "aware" and any(example.choices and not example.context.strip() for example in examples):
        raise UserError(
            f"protocol={query}: a prompt without solved examples or a document holds nothing but the item itself, "
            "and nothing can be compressed before it is seen; give protocol=query_aware, or task.shots"
        )
    if protocol != "aware" and any(example.timed for example in examples):
        raise UserError(f"protocol={query}: random tokens hold no question; give protocol=query_aware")
    asks = any(example.kind != "forced" for example in examples)
    for method in methods:
        if method.needs_split and protocol == "aware" and asks:
            raise NotHere(
                f"method={method.name}: compresses a text before it knows the question, and protocol={query} has the "
                "question in it; give protocol=query_agnostic"
            )
    texts = [example for example in examples if not example.error]
    plain = all(example.kind == "answer" and example.beams == 1 for example in texts)
    for method in methods:
        if method.without_text and not (plain and any(example.context != example.lead for example in texts)):
            raise NotHere(
                f"{method.name} leaves the text out of a prompt, and no sample of this task asks one question about a "
                "text"
            )
    for method in methods:
        if "answers" in method.needs and not (plain and protocol == "aware"):
            raise NotHere(
                f"{method.name} looks ahead at the answer to a question inside the prompt: it needs a task with one "
                "question per prompt, and protocol=query_aware"
            )
    one_pass = any(example.forced and example.forced.through == "one_pass" for example in examples)
    for method in methods:
        if one_pass and method.name != "full":
            raise UserError(
                f"method={method.name}: one pass over the text computes every token's attention before anything is "
                "dropped or packed, so that any budget gives the full cache's value; give task.through=prefix, stream "
                "or chunk, or method=full"
            )


def check_last_token(examples: Sequence[Example], protocol: str, last_token: str | None) -> None:
    """Raises UserError if a prompt's last token cannot be held back, or would be anyway."""
    query = PROTOCOLS[protocol]
    if last_token and protocol != "aware":
        raise UserError(
            f"last_token={last_token}: with protocol={query} the question is fed after compression anyway; leave it "
            "out, or give protocol=query_aware"
        )
    if last_token and any(example.beams > 1 for example in examples):
        raise UserError(f"last_token={last_token}: a beam search reads its whole prompt at once; give task.beams=1")
    if last_token and not any(example.kind in ("answer", "turns") for example in examples):
        raise UserError(
            f"last_token={last_token}: no sample of this task has an answer that is generated; leave it out"
        )
