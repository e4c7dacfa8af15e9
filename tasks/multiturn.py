"""Several questions on one context, as when a cache is kept and used again.

Paper: Li et al. 2024, SCBench: a KV cache-centric analysis of long-context methods, arXiv:2412.10319.
Here:  two modes, as there: turns in one conversation, and requests that do not know of each other. The history holds
       the reference answers unless it is asked to hold the model's own. A prompt is a row's context and question, where
       SCBench has a template per set: four options stand below their question, a line each, and a line of our own asks
       for the letter; in chats SCBench begins later summaries with two words, and nothing is begun here. Every question
       and answer of a row has its room in the window, where SCBench reserves half of what two kinds of turns could
       take. A letter is looked for in SCBench's order, with lm_eval's cues; lm_eval itself first takes the last letter
       that stands alone. The two sets with RepoQA are left out: its similarity is in no package that is installed here.
       Bundled are two kinds of our own documents.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from methods.core.errors import UserError
from tasks.base import Example, Turn
from tasks.data.pins import PINNED
from tasks.data.rows import Text, Texts, Tokens, wrong
from tasks.rows import Hub, RowsTask
from tasks.scoring import matching, metrics, numerals, rouge

MODES, HISTORIES, COMPRESS = ("turns", "requests"), ("golden", "own"), ("first_prompt_only", "every_prompt")
HUB = "microsoft/SCBench"


ROW = {"max_new_tokens": Tokens | None, "head": Text | None}
TURN = {"input": Text, "answer": Text | Texts, "options": Texts | None, "task": Text | None, "name": Text | None}


@dataclass(frozen=True)
class Kind:
    """How the answers of a data set are limited and scored.

    score: of a prediction and its references.  chance: what guessing scores.
    """

    max_new_tokens: int
    score: Callable[[str, Sequence[str]], float]
    chance: float = 0


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if the reference is a part of the answer, character for character."""
    return float(any(reference.strip() in answer for reference in references))


def contains_any_case(answer: str, references: Sequence[str]) -> float:
    """1 if any reference is a part of the answer, upper and lower case alike."""
    return float(any(reference.upper() in answer.upper() for reference in references))


def share_named(answer: str, references: Sequence[str]) -> float:
    """The share of the references that the answer contains, upper and lower case alike; two decimal places."""
    named = [reference.lower() in answer.lower() for reference in references]
    return round(sum(named) / len(named), 2)


def characters(answer: str, references: Sequence[str]) -> float:
    """F1 of the two bags of characters, the best over the references."""
    return max((metrics.bag_f1(list(answer), list(reference)) for reference in references), default=0.0)


def first_number(answer: str, references: Sequence[str]) -> float:
    """1 if the first number equals the reference; of a whole-number reference its whole part is compared."""
    number = numerals.first_number(answer)
    return float(number is not None and any(numerals.same_number(number, reference) for reference in references))


def passkey(answer: str, references: Sequence[str]) -> float:
    """1 if the first run of digits is the reference."""
    return float(numerals.first_digits(answer) in references)


def choice(answer: str, references: Sequence[str]) -> float:
    """1 if the answer's letter is that of the right option, which is the last reference."""
    return float(matching.chosen_letter(answer) == references[-1])


KINDS: dict[str, Kind] = {
    "substring": Kind(24, contains),
    "scbench_kv": Kind(150, contains),
    "scbench_prefix_suffix": Kind(150, contains),
    "scbench_vt": Kind(30, share_named),
    "scbench_qa_eng": Kind(40, contains_any_case),
    "scbench_qa_chn": Kind(40, characters),
    "scbench_choice_eng": Kind(40, choice, chance=1 / 4),
    "scbench_many_shot": Kind(10, contains_any_case),
    "scbench_mf": Kind(5, first_number),
    "scbench_summary": Kind(200, rouge.lsum),
    "passkey": Kind(15, passkey),
}
# sets whose turns are of several kinds: by what a turn's `task` or `name` says, its kind and its limit there
MIXED = {"scbench_summary_with_needles": {"summary": ("scbench_summary", 800), "passkey": ("passkey", 15)}}
SETS = (*(name for name in KINDS if name.startswith("scbench")), *MIXED)
WITH_REPOQA = ("scbench_repoqa", "scbench_repoqa_and_kv")
NO_REPOQA = f"RepoQA's similarity of functions is in no installed package; there are {', '.join(SETS)}"


@dataclass
class MultiTurn(RowsTask):
    """Ask several questions about every context.

    data: "bundled", "hub" (SCBench), or a path: .jsonl rows with `context` and `multi_turns`, a list of `input` and
        `answer`; a row may bring its own `head`, the `kind` of its score, and `max_new_tokens`; a choice has `options`,
        and with a kind of several `task` or `name` says which one a turn is.
    subset: names of files, or of SCBench's sets with data=hub, all but the two with RepoQA; None takes all.
    mode: "turns": one conversation; "requests": every question is asked of the same stored context, apart.
    history: what later turns find: "golden" reference answers or the model's "own".
    compress: "first_prompt_only" leaves later turns as they are; "every_prompt" compresses again after every question.
    shuffle: draw the order of the questions anew for every sample.
    turns: questions per context at most.
    limit: contexts per subset; None takes all.
    """

    title = "multiturn"
    version = "2"
    wrong_row = "failed"
    of_samples = frozenset({"data_sha256", "rouge"})

    data: str = "bundled"
    subset: Sequence[str] | str | None = None
    mode: str = "turns"
    history: str = "golden"
    compress: str = "first_prompt_only"
    shuffle: int | None = None
    turns: int = 5
    limit: int | None = None
    revision: str = PINNED

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, allowed in (("mode", MODES), ("history", HISTORIES), ("compress", COMPRESS)):
            if getattr(self, key) not in allowed:
                raise UserError(f"multiturn: task.{key}={getattr(self, key)}; give one of {', '.join(allowed)}")
        if type(self.turns) is not int or self.turns < 1:
            raise UserError(f"multiturn: task.turns={self.turns}; give a whole number of questions, 1 or more")
        asked = [self.subset] if isinstance(self.subset, str) else self.subset or []
        if self.data == "hub" and (missing := [name for name in asked if name in WITH_REPOQA]):
            raise UserError(f"multiturn: task.subset={missing[0]} cannot be scored: {NO_REPOQA}")

    @property
    def name(self) -> str:
        base = "scbench" if self.data == "hub" else super().name
        return base if self.mode == "turns" else f"{base}-requests"

    @property
    def contents(self) -> str:
        questions = sum(1 + len(example.turns) for example in self._examples)
        how = f"history={self.history}, compress={self.compress}" if self.mode == "turns" else "apart from each other"
        return f"{len(self._examples)} contexts, {questions} questions, {how}"

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"turns": self.turns, "shuffle": self.shuffle}
        if self.mode == "turns":
            settings |= {"history": self.history, "compress": self.compress}
        if "scbench_summary" in rules(self._examples):
            settings["rouge"] = rouge.described("rouge-score", stemmed=False)
        return settings

    def score(self, example: Example, prediction: str) -> float:
        return KINDS[example.tags["score"]].score(prediction, example.answers)

    def remarks(self, rows: Sequence[tuple[Example, Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
        """What the last turn has lost against the first, beside the full cache's loss; and bytes after every turn."""
        lines = []
        if self.mode == "turns":
            for name in dict.fromkeys(example.tags["subset"] for example, _, _ in rows):
                if len(rules(example for example, _, _ in rows if example.tags["subset"] == name)) > 1:
                    continue  # the first and the last turn may be of two kinds
                pairs = [(ours, full) for example, ours, full in rows if example.tags["subset"] == name]
                ours, full = (100 * change([pair[i]["turns"] for pair in pairs]) for i in (0, 1))
                lines.append(
                    f"{name}, first turn to last: {ours:+.2f}, full {full:+.2f}, difference {ours - full:+.2f}"
                )
        shares = shares_held([row["turns"] for _, row, _ in rows])
        lines.append("KV bytes after every question, of a full cache's: " + ", ".join(f"{s:.1%}" for s in shares))
        return lines

    def sets(self) -> Mapping[str, Hub]:
        return {name: Hub(HUB, name, "test") for name in SETS}

    def tags(self, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
        category = "requests" if self.mode == "requests" else f"{name}, mean over turns"
        kind = row.get("kind") or (name if name in (*KINDS, *MIXED, *WITH_REPOQA) else "substring")
        return {"subset": name, "category": category, "score": str(kind)}

    def problem(self, name: str, row: Mapping[str, Any]) -> str | None:
        return problem(row, self.tags(name, row)["score"])

    def example(self, id: str, tags: dict[str, Any], row: dict[str, Any]) -> Example:
        kind = tags["score"]
        turns = []
        for turn in row["multi_turns"]:
            rule, limit = rule_of(turn, kind)
            turn_tags: dict[str, Any] = {"score": rule, "chance": KINDS[rule].chance}
            if rule == "scbench_summary":
                turn_tags["rouge"] = rouge.described("rouge-score", stemmed=False)
            turns.append(Turn(asked(turn, rule), references(turn, rule), row.get("max_new_tokens") or limit, turn_tags))
        if self.shuffle is not None:
            random.Random(f"{self.shuffle}/{id}").shuffle(turns)
        first, *later = turns[: self.turns]
        head = f"{row['head']}\n\n" if row.get("head") else ""
        gap = "\n\n"
        apart = self.mode == "requests"
        if apart:
            # every question, also the first, follows the stored context in the same way
            later = [replace(turn, question=gap + turn.question) for turn in later]
        return Example(
            id,
            context=head + row["context"],
            lead=head,
            question=gap + first.question,
            answers=first.answers,
            max_new_tokens=first.max_new_tokens,
            tags=tags | first.tags,
            turns=tuple(later),
            history="none" if apart else self.history,  # type: ignore[arg-type]
            recompress=self.compress == "every_prompt" and not apart,
        )


def rules(examples: Iterable[Example]) -> set[str]:
    """The kinds of all questions."""
    return {tags["score"] for example in examples for tags in (example.tags, *(turn.tags for turn in example.turns))}


def rule_of(turn: Mapping[str, Any], kind: str) -> tuple[str, int]:
    """The kind of a turn in a row of this kind, and its limit; KeyError if the kind has several and none is named."""
    if kind not in MIXED:
        return kind, KINDS[kind].max_new_tokens
    named = [str(turn.get(field)).removeprefix("scbench_") for field in ("task", "name")]
    return MIXED[kind][named[0] if named[0] in MIXED[kind] else named[1]]


def asked(turn: Mapping[str, Any], rule: str) -> str:
    """A turn's question; of a choice with its options, a line each, and with what to answer."""
    if rule != "scbench_choice_eng":
        return str(turn["input"])
    options = [f"{letter}. {text}" for letter, text in zip(matching.LETTERS, turn["options"])]
    return "\n".join([str(turn["input"]), *options, "Answer with one letter, A, B, C or D."])


def references(turn: Mapping[str, Any], rule: str) -> list[str]:
    """A turn's answer, one or several, as strings; of a choice the letter comes last."""
    answer = turn["answer"]
    answers = [str(one) for one in answer] if isinstance(answer, list) else [str(answer)]
    return [answers[0], letter_of(turn, answers[0])] if rule == "scbench_choice_eng" else answers


def letter_of(turn: Mapping[str, Any], answer: str) -> str:
    """The letter of the option that is the answer, or the answer if it is a letter. ValueError for anything else."""
    given = turn.get("options")
    options = [str(text).strip() for text in given] if isinstance(given, list) else []
    names = options if answer.strip() in options else matching.LETTERS
    if len(options) != len(matching.LETTERS):
        raise ValueError(f"{len(options)} options")
    return matching.LETTERS[names.index(answer.strip())]


def problem(row: Mapping[str, Any], kind: str) -> str | None:
    """Why a row cannot be run or scored, naming its field; None if it can."""
    turns = row.get("multi_turns")
    if kind in WITH_REPOQA:
        return f"`kind` is {kind}, which cannot be scored: {NO_REPOQA}"
    if kind not in (*KINDS, *MIXED):
        return f"`kind` is {kind}; there are {', '.join((*KINDS, *MIXED))}"
    if not isinstance(row.get("context"), str) or not row["context"].strip():
        return "`context` is empty or missing"
    if not isinstance(turns, list) or not turns:
        return "`multi_turns` is empty or missing; it is a list of `input` and `answer`"
    # a number may be the answer, 0 as well
    if not all(
        isinstance(turn, dict) and turn.get("input") and turn.get("answer") not in (None, "", []) for turn in turns
    ):
        return "`multi_turns` has a question without `input` or `answer`"
    if error := wrong(row, ROW) or next(filter(None, (wrong(turn, TURN) for turn in turns)), None):
        return error
    try:
        for turn in turns:
            references(turn, rule_of(turn, kind)[0])
    except KeyError:
        return f"`multi_turns` has a turn whose `task` and `name` say none of {', '.join(MIXED[kind])}"
    except ValueError:
        return "`multi_turns` has a choice without four `options`, or its `answer` is none of them and no letter"
    return None


def change(dialogues: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Mean score of the last turns less that of the first ones."""
    return sum(turns[-1]["score"] - turns[0]["score"] for turns in dialogues) / len(dialogues)


def shares_held(dialogues: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    """After each turn, what was held over what a full cache would hold; dialogues that have ended are left out."""
    shares = []
    for i in range(max(map(len, dialogues))):
        ledgers = [turns[i] for turns in dialogues if i < len(turns)]
        shares.append(sum(turn["held"] for turn in ledgers) / sum(turn["full"] for turn in ledgers))
    return shares
