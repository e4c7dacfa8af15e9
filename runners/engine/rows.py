"""The rows of a record: what is kept of a sample that has been run, and of one that could not be."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from methods.core.meter import Report
from runners.engine.choices import EncodedChoice
from runners.engine.conversation import EncodedConversation
from runners.engine.latency import Times
from runners.engine.new_tokens import Answer
from runners.engine.problem import Problem
from runners.engine.prompt import Encoded
from runners.engine.session import Generation
from runners.engine.setting import Setting
from tasks.base import Example, Turn, cut_at

# places per point of a loss curve
BIN = 256
PROMPT_END = 300  # characters of a prompt that a record repeats
REASONS = "the answer holds a <think> block, and model.reasoning=off expects none; give strip or keep"


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
    # older code, whose answers no string ended, did not tell a sample's strings in its key
    if example.stop and (row := rows.get(replace(example, stop=()).key)) is not None:
        return row
    row = rows.get(example.id)
    if row is None or "key" in row:
        return None
    wanted = about(example)
    same = "error" in row or all(row.get(name) == wanted[name] for name in ("prompt_end", "answers"))
    return row if same else None


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
    fed = encoded.prompt.parts(setting.protocol)[1] or encoded.prompt.begins
    exact = not fed and example.beams == 1
    return {
        **about(example),
        "prediction": prediction,
        **({"thoughts": thoughts} if thoughts else {}),
        "by_prefill": exact and _first_alone(setting, example, one, prediction, thoughts),
        "score": score,
        **_parts(parts := setting.task.parts(example, prediction)),
        **({"measure": setting.task.measure(parts)} if parts else {}),
        **_said(setting, one),
        "tokens_in": len(encoded.prompt.ids),
        "tokens_context": encoded.prompt.n_context,
        "tokens_out": len(one.ids),
        "cut": encoded.cut,
        "bos": encoded.bos,
        **costs,
    }


def repeated(
    setting: Setting,
    example: Example,
    encoded: Encoded,
    answers: Sequence[Answer],
    ledgers: Sequence[Report],
    costs: dict[str, Any],
) -> dict[str, Any]:
    """The row of a prompt's answers, of which the score is the mean; ledgers: when each had ended.

    What there is of a single answer, such as `prediction`, is of the first one.
    """
    rows = [answered(setting, example, encoded, one, costs) for one in answers]
    if len(rows) == 1:
        return rows[0]
    broken = next((row for row in rows if "error" in row), None)
    if broken is not None:
        return broken
    kept = ("prediction", "thoughts", "by_prefill", "score", "parts", "stop", "ids", "blank", "tokens_out")
    repeats = [
        {**{key: row[key] for key in kept if key in row}, "held": ledger.held_end, "full": ledger.full}
        for row, ledger in zip(rows, ledgers, strict=True)
    ]
    return {
        **{key: value for key, value in rows[0].items() if key != "thoughts"},
        "by_prefill": all(row["by_prefill"] for row in rows),
        "score": fmean(row["score"] for row in rows),
        **_parts({name: fmean(row["parts"][name] for row in rows) for name in rows[0].get("parts", {})}),
        "tokens_out": round(fmean(row["tokens_out"] for row in rows)),
        "repeats": repeats,
    }


def with_forced(rows: list[dict[str, Any]], forced: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """The rows with what was found of each where it read the full cache's answer; none for a row that failed."""
    for row, found in zip(rows, forced):
        if found is not None and "error" not in row:
            row["forced"] = found
    return rows


def mean_ledger(ledgers: Sequence[Report]) -> Report:
    """The ledger of a sample that was answered several times from one compressed cache: means over the answers."""
    if len(ledgers) == 1:
        return ledgers[0]
    means: dict[str, Any] = {}
    for name, first in vars(ledgers[0]).items():
        if isinstance(first, int):
            means[name] = round(fmean(getattr(one, name) for one in ledgers))
    # what was held layer by layer, and its bits, are of the prompt's end
    return dataclasses.replace(ledgers[0], **means)


def _said(setting: Setting, one: Answer) -> dict[str, Any]:
    """An answer's tokens and what ended it, and whether its text is blank."""
    blank = not setting.encoder.text(one.ids).strip()
    return {"stop": one.stop, "ids": one.ids, **({"blank": True} if blank else {})}


def _first_alone(setting: Setting, example: Example, one: Answer, prediction: str, thoughts: str) -> bool:
    """Whether an answer says no more than its first token does."""
    return not thoughts and prediction.strip() == cut_at(setting.encoder.text(one.ids[:1]), example.stop).strip()


def talked(
    setting: Setting,
    example: Example,
    said: EncodedConversation,
    costs: dict[str, Any],
    i: int,
    heard: Sequence[Generation],
) -> dict[str, Any]:
    """The row of example i of its batch; heard: what one cache has answered, per question."""
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
        turn_example = replace(example, question=turn.question, answers=turn.answers, tags=tags, turns=())
        turns.append(
            {
                "prediction": prediction,
                "by_prefill": exact and not turns and _first_alone(setting, example, answer, prediction, thoughts),
                "score": setting.task.score(turn_example, prediction),
                **_said(setting, answer),
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
    for example, piece, row_losses, spent_ in zip(batch, pieces, losses.tolist(), costs, strict=True):
        assert example.forced is not None
        curve = _curve(row_losses, example.forced.counted)
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


def compared(
    setting: Setting,
    example: Example,
    asked: Sequence[EncodedChoice],
    likelihoods: Sequence[tuple[float, bool]],
    costs: dict[str, Any],
) -> dict[str, Any]:
    """The row of one example's choices; costs: its ledger, the batch's size and times."""
    sums = [total for total, _ in likelihoods]
    if not all(map(math.isfinite, sums)):
        return failed(example, "the log-likelihoods are not finite")
    rated = setting.task.rate(example, likelihoods)
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


def timed(example: Example, ours: Times, full: Times | None, costs: dict[str, Any]) -> dict[str, Any]:
    """The row of random tokens that were timed; full: the times of the full cache, where it is another method."""
    what = example.timed
    assert what is not None
    return {
        **about(example),
        "prediction": "",
        "score": 1000 * ours.step,
        "times": ours.to_dict(),
        **({"full_times": full.to_dict()} if full is not None else {}),
        "load": round(os.getloadavg()[0], 2),
        "tokens_in": what.length,
        "tokens_context": what.length,
        "tokens_out": what.steps,
        "cut": False,
        "bos": 0,
        **costs,
        "batch": what.batch,
    }


def _curve(losses: Sequence[float], counted: Sequence[int]) -> list[tuple[int, int, float]]:
    """Per bin of positions with any that count: its first one, how many count, and the sum of their losses."""
    bins: dict[int, list[float]] = {}
    for position in counted:
        if position < len(losses):
            bins.setdefault(position // BIN * BIN, []).append(losses[position])
    return [(a, len(bin_losses), math.fsum(bin_losses)) for a, bin_losses in sorted(bins.items())]


def _parts(parts: dict[str, float]) -> dict[str, Any]:
    return {"parts": parts} if parts else {}
