"""From a batch of examples to recorded rows: one function per kind of example."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from methods import load_method
from methods.core.contract import Method
from methods.core.errors import BudgetMiss, UserError
from methods.core.meter import Report
from runners.engine.beam_search import search
from runners.engine.choices import Asked, compare, encode
from runners.engine.conversation import Dialogue, dialogue
from runners.engine.generation import Timings, generate, start
from runners.engine.latency import measure
from runners.engine.new_tokens import Answer, behind
from runners.engine.problem import Problem, problem
from runners.engine.prompt import Encoded, Encoder
from runners.engine.session import Heard, now
from runners.engine.shared_conversation import Talk
from runners.engine.teacher_forcing import force
from runners.engine.time_limit import within
from tasks.base import Example, Forced, Task, Turn, cut_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# places per point of a loss curve
BIN = 256
PROMPT_END = 300  # characters of a prompt that a record repeats
REASONS = "the answer holds a <think> block, and model.reasoning=off expects none; give strip or keep"


@dataclass(frozen=True)
class Setting:
    """What all samples of a run share.

    tokenizes: the encoder, which only samples that have a text ask for.  limit: seconds that a batch may take.
    budget_miss: "keep" a sample that holds more than its budget and documented overhead, with its bytes, or "fail".
    """

    model: PreTrainedModel
    task: Task
    tokenizes: Callable[[], Encoder]
    protocol: str
    chunk: int | None
    threads: int
    limit: float | None = None
    budget_miss: str = "keep"

    @property
    def encoder(self) -> Encoder:
        return self.tokenizes()

    @property
    def pad_id(self) -> int:
        return self.encoder.tokenizer.pad_token_id or 0


def check(examples: Sequence[Example], protocol: str, methods: Sequence[Method], last_token: str | None = None) -> None:
    """Raises UserError if a score would not say what it seems to: before anything is run."""
    check_last_token(examples, protocol, last_token)
    if protocol == "aware" and any(example.history == "none" for example in examples):
        raise UserError(
            f"protocol={protocol}: questions that are asked apart share a context that was compressed before any of "
            "them was known; give protocol=agnostic"
        )
    if protocol != "aware" and any(example.beams > 1 for example in examples):
        raise UserError(f"protocol={protocol}: a beam search reads its whole prompt at once; give protocol=aware")
    if protocol != "aware" and any(example.choices and not example.context.strip() for example in examples):
        raise UserError(
            f"protocol={protocol}: a prompt without solved examples or a document holds nothing but the item itself, "
            "and nothing can be compressed before it is seen; give protocol=aware, or task.shots"
        )
    if protocol != "aware" and any(example.timed for example in examples):
        raise UserError(f"protocol={protocol}: random tokens hold no question; give protocol=aware")
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
    if last_token and protocol != "aware":
        raise UserError(
            f"last_token={last_token}: with protocol={protocol} the question is fed after compression anyway; leave it "
            "out, or give protocol=aware"
        )
    if last_token and any(example.beams > 1 for example in examples):
        raise UserError(f"last_token={last_token}: a beam search reads its whole prompt at once; give task.beams=1")
    if last_token and not any(example.kind in ("answer", "turns") for example in examples):
        raise UserError(
            f"last_token={last_token}: no sample of this task has an answer that is generated; leave it out"
        )


def answer(
    setting: Setting, method: Method, batch: Sequence[Example], record: Callable[[dict[str, Any]], None]
) -> None:
    """Run a batch and record a row per sample; where a pass fails, its samples are tried one by one.

    Raises UserError, and where `budget_miss` is "fail" BudgetMiss, once a batch that held too much has been recorded.
    """
    for run, members in groupby(batch, run_of):
        _answer(setting, method, list(members), run[0], record)


def run_of(example: Example) -> tuple[Any, ...]:
    """The function that runs an example, and what else the rows of one pass must have in common."""
    if example.kind == "timed":
        return (by_timing, example.id)
    if example.forced is not None:
        return (by_forcing, example.forced.through, example.forced.length, example.forced.prompt, example.forced.stride)
    if example.kind == "turns":
        # a row that goes on from its own answers must end exactly where they do
        return (by_turns, example.history, len(example.turns), example.history == "own" and example.id)
    if example.kind == "choices":
        return (by_choices, example.stride)
    return (by_beams, example.id) if example.beams > 1 else (by_generation,)


def _answer(
    setting: Setting,
    method: Method,
    batch: Sequence[Example],
    run: Callable[[Setting, Method, Sequence[Example]], list[dict[str, Any]]],
    record: Callable[[dict[str, Any]], None],
) -> None:
    try:
        with within(setting.model, setting.limit):
            rows = run(setting, method, batch)
    except UserError:
        raise
    except BudgetMiss as miss:
        for example in batch:
            record(failed(example, str(miss)))
        raise
    except Exception as error:  # one sample's failure must not cost the others
        found = problem(error)
        del error  # its traceback holds the tensors of the failed pass
        if setting.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            record(failed(batch[0], found))
            return
        for example in batch:
            _answer(setting, method, [example], run, record)
        return
    for row in rows:
        record(row)


def failed(example: Example, why: str | Problem) -> dict[str, Any]:
    """The row of a sample that could not be run."""
    if isinstance(why, Problem):
        return {"id": example.id, "key": example.key, "error": why.line, "traceback": why.traceback}
    return {"id": example.id, "key": example.key, "error": why}


def about(example: Example) -> dict[str, Any]:
    """What a reader of the record wants to know of the sample: where it belongs, how its prompt ends, what is right."""
    tags = {name: tag for name, tag in example.tags.items() if isinstance(tag, str | int | float)}
    return {
        "id": example.id,
        "key": example.key,
        "tags": tags,
        "prompt_end": example.prompt[-PROMPT_END:],
        "answers": example.answers[:3],
    }


def row_of(rows: Mapping[str, dict[str, Any]], example: Example) -> dict[str, Any] | None:
    """What a record's rows, by their keys, have of an example.

    A row of format 1 has no key: it is known by its id, the end of its prompt and its references.
    """
    if (row := rows.get(example.key)) is not None:
        return row
    row = rows.get(example.id)
    if row is None or "key" in row:
        return None
    wanted = about(example)
    same = "error" in row or all(row.get(name) == wanted[name] for name in ("prompt_end", "answers"))
    return row if same else None


def by_generation(setting: Setting, method: Method, batch: Sequence[Example]) -> list[dict[str, Any]]:
    """One question each: the prompt, then an answer."""
    encoded = [setting.encoder(example) for example in batch]
    answers, cache, timings = generate(
        setting.model,
        method,
        [one.prompt for one in encoded],
        protocol=setting.protocol,
        chunk=setting.chunk,
        pad_id=setting.pad_id,
    )
    costs = spent(setting, method, cache.reports(behind(answers, timings.steps)), timings)
    return [answered(setting, *one) for one in zip(batch, encoded, answers, costs, strict=True)]


def by_beams(setting: Setting, method: Method, batch: Sequence[Example]) -> list[dict[str, Any]]:
    """One question each, answered by beam search."""
    rows = []
    for example in batch:
        encoded = setting.encoder(example)
        found, cache, timings = search(setting.model, method, encoded.prompt, example.beams, setting.pad_id)
        (costs,) = spent(setting, method, [cache.report()], timings)  # of all beams together
        rows.append(answered(setting, example, encoded, found, costs))
    return rows


def answered(
    setting: Setting, example: Example, encoded: Encoded, one: Answer, costs: dict[str, Any]
) -> dict[str, Any]:
    """The row of one answer; costs: its ledger, the batch's size and times."""
    if one.error:
        return failed(example, one.error)
    prediction, thoughts = setting.encoder.said(example, one.ids)
    if thoughts and setting.encoder.reasoning == "off":
        return failed(example, REASONS)
    score = setting.task.score(example, prediction)
    if not math.isfinite(score):
        return failed(example, f"the score is not finite ({score})")
    # nothing is fed between compression and the first token, and that is all that was said; beams compete beyond it
    exact = not encoded.prompt.parts(setting.protocol)[1] and example.beams == 1
    return {
        **about(example),
        "prediction": prediction,
        **({"thoughts": thoughts} if thoughts else {}),
        "by_prefill": exact and _first_alone(setting, example, one, prediction, thoughts),
        "score": score,
        **_parts(parts := setting.task.parts(example, prediction)),
        **({"measure": setting.task.measure(parts)} if parts else {}),
        "stop": one.stop,
        "tokens_in": len(encoded.prompt.ids),
        "tokens_context": encoded.prompt.n_context,
        "tokens_out": len(one.ids),
        "cut": encoded.cut,
        "bos": encoded.bos,
        **costs,
    }


def _first_alone(setting: Setting, example: Example, one: Answer, prediction: str, thoughts: str) -> bool:
    """Whether an answer says no more than its first token does."""
    return not thoughts and prediction.strip() == cut_at(setting.encoder.text(one.ids[:1]), example.stop).strip()


@torch.inference_mode()
def by_turns(setting: Setting, method: Method, batch: Sequence[Example]) -> list[dict[str, Any]]:
    """Several questions on one compressed context."""
    talk = talk_of(setting, batch)
    began = now(setting.model.device)
    session, logits = start(setting.model, method, talk.firsts, talk.samples, setting.chunk, setting.pad_id)
    prompt_seconds = now(setting.model.device) - began
    talk.go_on(session, logits)
    heard = [one for (one,) in talk.heard if isinstance(one, Heard)]
    costs = spent(setting, method, heard[-1].reports, talk.timings(prompt_seconds))
    return talked(setting, batch, talk, heard, costs)


def talk_of(setting: Setting, batch: Sequence[Example]) -> Talk:
    """The questions of a batch as token ids."""
    talks = [dialogue(setting.encoder, example) for example in batch]
    end = setting.encoder.tokenizer.eos_token_id
    return Talk(talks, batch[0].history, batch[0].recompress, setting.protocol, end, setting.model.device)


def talked(
    setting: Setting, batch: Sequence[Example], talk: Talk, heard: Sequence[Heard], costs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of what one cache has answered; heard: per question."""
    return [_talked(setting, example, talk.talks[i], i, heard, costs[i]) for i, example in enumerate(batch)]


def _talked(
    setting: Setting, example: Example, said: Dialogue, i: int, heard: Sequence[Heard], costs: dict[str, Any]
) -> dict[str, Any]:
    """The row of example i of its batch."""
    first, answers = said.first, [question.answers[i] for question in heard]
    broken = next((answer.error for answer in answers if answer.error), None)
    if broken:
        return failed(example, broken)
    asked = (Turn(example.question, example.answers, example.max_new_tokens), *example.turns)
    turns: list[dict[str, Any]] = []
    blocks: list[str] = []
    # a question that is fed after compression finds the compressed cache
    exact = example.history != "none" and not first.prompt.parts(setting.protocol)[1]
    for turn, answer, question in zip(asked, answers, heard, strict=True):
        prediction, thoughts = setting.encoder.said(example, answer.ids)
        if thoughts and setting.encoder.reasoning == "off":
            return failed(example, REASONS)
        blocks += [thoughts] * bool(thoughts)
        tags = example.tags | turn.tags
        own = replace(example, question=turn.question, answers=turn.answers, tags=tags, turns=())
        turns.append(
            {
                "prediction": prediction,
                "by_prefill": exact and not turns and _first_alone(setting, example, answer, prediction, thoughts),
                "score": setting.task.score(own, prediction),
                "stop": answer.stop,
                "tokens_out": len(answer.ids),
                "held": question.reports[i].held_end,
                "full": question.reports[i].full,
            }
        )
    scores = [turn["score"] for turn in turns]
    if not all(map(math.isfinite, scores)):
        return failed(example, "a turn's score is not finite")
    later = sum(len(question.golden) for question in said.later)
    return {
        **about(example),
        "prediction": "\n".join(turn["prediction"] for turn in turns),
        **({"thoughts": "\n".join(blocks)} if blocks else {}),
        "score": sum(scores) / len(scores),
        # apart from each other questions have no order
        **({} if example.history == "none" else _parts({f"turn {n}": s for n, s in enumerate(scores, 1)})),
        "turns": turns,
        "tokens_in": len(first.prompt.ids) + later,
        "tokens_context": first.prompt.n_context,
        "tokens_out": sum(turn["tokens_out"] for turn in turns),
        "cut": first.cut,
        "bos": first.bos,
        **costs,
    }


def by_forcing(setting: Setting, method: Method, batch: Sequence[Example]) -> list[dict[str, Any]]:
    """Texts that are fed as they stand: the mean loss of the tokens that count, in nats."""
    pieces, plan, samples = texts(setting, batch)
    losses, cache, timings = force(setting.model, method, pieces, plan, samples)
    costs = spent(setting, method, cache.reports(), timings)
    return predicted(setting, batch, pieces, losses, timings.n_prompt, costs)


def texts(setting: Setting, batch: Sequence[Example]) -> tuple[list[list[int]], Forced, list[int]]:
    """What `force` takes of a batch: its pieces, how they are fed, and the numbers of its samples."""
    plans = [example.forced for example in batch if example.forced is not None]
    samples = [setting.encoder.encoded(example, [], 0, False).prompt.sample for example in batch]
    return [setting.encoder.piece(plan) for plan in plans], plans[0], samples


def predicted(
    setting: Setting,
    batch: Sequence[Example],
    pieces: Sequence[Sequence[int]],
    losses: torch.Tensor,
    n_prompt: int,
    costs: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of texts with these losses [B, L]; n_prompt: tokens of all prompts."""
    rows = []
    for example, piece, own, spent_ in zip(batch, pieces, losses.tolist(), costs, strict=True):
        assert example.forced is not None
        curve = _curve(own, example.forced.counted)
        n, total = sum(n for _, n, _ in curve), sum(s for _, _, s in curve)
        if not math.isfinite(total):
            rows.append(failed(example, "the losses are not finite"))
            continue
        bins = {f"{a}-{a + BIN - 1}": (s / m, m) for a, m, s in curve} if len(curve) > 1 else {}
        parts = {"": (total / n, n), **bins}
        rows.append(
            {
                **about(example),
                "score": total / n,
                "parts": {name: mean for name, (mean, _) in parts.items()},
                "weights": {name: m for name, (_, m) in parts.items()},
                "counted": n,
                "curve": [[a, m, round(s, 6)] for a, m, s in curve],
                "tokens_in": len(piece),
                "tokens_context": n_prompt // len(batch),
                "tokens_out": 0,
                "cut": False,
                "bos": list(piece).count(setting.encoder.tokenizer.bos_token_id),
                **spent_,
            }
        )
    return rows


def choices_of(setting: Setting, batch: Sequence[Example]) -> tuple[list[list[Asked]], list[int]]:
    """The choices of a batch as token ids, and the numbers of its samples."""
    asked = [[encode(setting.encoder, example, choice) for choice in example.choices] for example in batch]
    return asked, [setting.encoder.encoded(example, [], 0, False).prompt.sample for example in batch]


def by_choices(setting: Setting, method: Method, batch: Sequence[Example]) -> list[dict[str, Any]]:
    """Ways to go on, compared by their likelihood after the compressed prompt."""
    asked, samples = choices_of(setting, batch)
    found, ledgers, timings = compare(
        setting.model, method, asked, samples, setting.protocol, setting.chunk, batch[0].stride, setting.pad_id
    )
    costs = spent(setting, method, ledgers, timings)
    return [compared(setting, *one) for one in zip(batch, asked, found, costs, strict=True)]


def compared(
    setting: Setting,
    example: Example,
    asked: Sequence[Asked],
    found: Sequence[tuple[float, bool]],
    costs: dict[str, Any],
) -> dict[str, Any]:
    """The row of one example's choices; costs: its ledger, the batch's size and times."""
    sums = [total for total, _ in found]
    if not all(map(math.isfinite, sums)):
        return failed(example, "the log-likelihoods are not finite")
    rated = setting.task.rate(example, found)
    return {
        **about(example),
        "prediction": example.choices[sums.index(max(sums))].text,
        "score": next(iter(rated.values())),
        "parts": rated,
        "measure": next(iter(rated)),
        "likelihoods": [round(total, 6) for total in sums],
        "tokens_in": max(len(one.prompt) for one in asked),
        "tokens_context": max(len(one.parts(setting.protocol)[0]) for one in asked),
        "tokens_out": 0,
        "cut": any(one.cut for one in asked),
        "bos": asked[0].prompt.count(setting.encoder.tokenizer.bos_token_id),
        **costs,
    }


def by_timing(setting: Setting, method: Method, batch: Sequence[Example]) -> list[dict[str, Any]]:
    """Random tokens that are read and decoded with the method and, in turns, with the full cache."""
    rows = []
    for example in batch:
        timed = example.timed
        assert timed is not None
        full = load_method("full")
        methods = [method] if method.name == full.name else [method, full]
        ours, *others = measure(setting.model, methods, timed, setting.chunk)
        timings = Timings(ours.prompt, 0.0, ours.step * timed.steps, timed.length * timed.batch, timed.steps)
        assert ours.ledger is not None
        (costs,) = spent(setting, method, [ours.ledger.per(timed.batch)], timings)
        rows.append(
            {
                **about(example),
                "prediction": "",
                "score": 1000 * ours.step,
                "times": ours.to_dict(),
                **({"full_times": others[0].to_dict()} if others else {}),
                "load": round(os.getloadavg()[0], 2),
                "tokens_in": timed.length,
                "tokens_context": timed.length,
                "tokens_out": timed.steps,
                "cut": False,
                "bos": 0,
                **costs,
                "batch": timed.batch,
            }
        )
    return rows


def _curve(losses: Sequence[float], counted: Sequence[int]) -> list[tuple[int, int, float]]:
    """Per bin of places with any that count: its first place, how many count, and the sum of their losses."""
    bins: dict[int, list[float]] = {}
    for place in counted:
        if place < len(losses):
            bins.setdefault(place // BIN * BIN, []).append(losses[place])
    return [(a, len(own), math.fsum(own)) for a, own in sorted(bins.items())]


def _parts(parts: dict[str, float]) -> dict[str, Any]:
    return {"parts": parts} if parts else {}


def spent(
    setting: Setting, method: Method, ledgers: Sequence[Report], timings: Timings, **more: Any
) -> list[dict[str, Any]]:
    """What every sample of a batch took, as its row records it: its own ledger, the batch's seconds to the microsecond.

    more: what all rows record besides.  Raises BudgetMiss where a sample that holds too much is to fail.
    """
    if setting.budget_miss == "fail":
        for ledger in ledgers:
            ledger.check_budget(method.name)
    seconds = {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(timings).items()}
    shared = {"batch": len(ledgers), "threads": setting.threads, "timings": seconds, **more}
    return [{**shared, "ledger": ledger.to_dict()} for ledger in ledgers]
