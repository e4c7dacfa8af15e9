"""Every field of every row type with wrong values: one line that names file and row, a failed sample, or a sample."""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from methods.core.errors import UserError
from tasks.base import Example, Task
from tasks.gsm8k import GSM8K
from tasks.lm_eval.task import LmEval
from tasks.longbench.task import LongBench
from tasks.longbench_v2 import LongBenchV2
from tasks.multiturn import MultiTurn
from tasks.needle import Needle
from tasks.perplexity import Perplexity
from tasks.reasoning import Reasoning
from tasks.ruler.task import Ruler
from tasks.summarization import Summarization
from tasks.tokens import Tokens

LONG = "the cat sat on a mat and read about a long river in the north. " * 4
PROMPT = {
    "_id": "a", "kind": "single", "group": "g", "length": 60, "depth": 50, "context": LONG, "question": "who sat?",
    "answers": ["the cat"], "metric": "all", "max_new_tokens": 4, "prefill": "It was",
}  # fmt: skip
CHOICES = {f"choice_{letter}": "the cat" for letter in "ABCD"}
TURN = {"input": "who sat?", "answer": "the cat", "options": None, "task": "x", "name": "y"}
# a row type: the task that reads it, its file, a row that is right
ROWS: dict[str, tuple[Callable[[str], Task], str, dict[str, Any]]] = {
    "longbench": (
        LongBench,
        "trec.jsonl",
        {"input": "who sat?", "context": LONG, "answers": ["the cat"], "length": 60, "dataset": "trec",
         "language": "en", "all_classes": ["the cat", "a mat"], "_id": "x"},
    ),
    "longbench-e": (
        lambda data: LongBench(data, e=True),
        "hotpotqa_e.jsonl",
        {"input": "who sat?", "context": LONG, "answers": ["the cat"], "length": 60, "all_classes": None, "_id": "x"},
    ),
    "longbench_v2": (
        LongBenchV2,
        "data.jsonl",
        {"domain": "d", "sub_domain": "x", "difficulty": "easy", "length": "short", "context": LONG, "question": "who?",
         "answer": "B", "_id": "x", **CHOICES},
    ),
    "needle": (Needle, "prompts.jsonl", PROMPT),
    "ruler": (Ruler, "prompts.jsonl", PROMPT | {"kind": "vt"}),
    "passkey": (Needle, "passkey.jsonl", {"id": 1, "context": LONG, "input": "which?", "answer": ["cat"]}),
    "multiturn": (
        MultiTurn,
        "kept.jsonl",
        {"context": LONG, "multi_turns": [TURN], "kind": "substring", "head": "Read.", "max_new_tokens": 4},
    ),
    "turn": (MultiTurn, "kept.jsonl", TURN),
    "choice": (MultiTurn, "scbench_choice_eng.jsonl", TURN | {"options": ["a", "b", "the cat", "d"]}),
    "reasoning": (
        Reasoning, "links.jsonl", {"context": LONG, "question": "who?", "steps": "a, b.", "max_new_tokens": 4},
    ),
    "summarization": (
        lambda data: Summarization(data=data),
        "news.jsonl",
        {"article": LONG, "highlights": "a cat.", "head": "Sum up.", "max_new_tokens": 4},
    ),
    "soda": (
        lambda data: Summarization(data=data),
        "soda.jsonl",
        {"dialogue": ["hi", "you"], "speakers": ["a", "b"], "narrative": "they talk."},
    ),
    "perplexity": (lambda data: Perplexity(data, length=16), "texts.jsonl", {"text": LONG}),
    "gsm8k": (
        lambda data: GSM8K(data, variant="gsm8k_cot_zeroshot"), "test.jsonl", {"question": LONG, "answer": "1\n#### 1"},
    ),
    "solved": (lambda data: GSM8K(data, shots=1), "train.jsonl", {"question": LONG, "answer": "1\n#### 1"}),
    "piqa": (
        lambda data: LmEval("piqa", data), "piqa.jsonl", {"goal": LONG, "sol1": "a", "sol2": "b", "label": 0},
    ),
}  # fmt: skip
MISSING = object()
# as they stand in a file
WRONG: dict[str, Any] = {
    "missing": MISSING, "null": "null", "true": "true", "-1": "-1", "0": "0", "0.5": "0.5", "1e400": "1e400",
    "NaN": "NaN", "10 ** 30": "1" + 30 * "0", "text": '"abc"', "empty": '""', "[]": "[]", "[1]": "[1]",
    "[null]": "[null]", "mapping": '{"a": 1}', "half of a pair": '"\\ud83d"', "deep": "[" * 100_000 + "]" * 100_000,
    "digits": "9" * 5000,
}  # fmt: skip


class Words:
    """A tokenizer of words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def written(name: str, row: dict[str, Any], folder: Path, field: str, value: Any) -> Path:
    """The row's file with one field made wrong; what its task needs besides lies beside it."""
    mark = "\0wrong\0"
    row = {key: one for key, one in row.items() if key != field or value is not MISSING}
    row |= {} if value is MISSING else {field: mark}
    whole = {"context": LONG, "multi_turns": [row]} if name in ("turn", "choice") else row
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ROWS[name][1]
    path.write_text(json.dumps(whole).replace(json.dumps(mark), "" if value is MISSING else value) + "\n")
    if name == "solved":
        (folder / "test.jsonl").write_text(json.dumps(ROWS["gsm8k"][2]) + "\n")
    return folder


def used(make: Callable[[str], Task], folder: Path) -> list[Example]:
    """All that is done with rows before and after a model has answered, for those that are samples."""
    task, words = make(str(folder)), Words()
    task.fit(lambda: Tokens(words.encode, words.decode, 4096, 0, 0))
    assert task.source() and json.dumps(task.fingerprint)
    examples = task.examples()
    for example in examples:
        assert example.id and example.id.encode()
        json.dumps(example.tags)
        if example.error:
            assert example.error.isprintable()
            continue
        assert type(example.max_new_tokens) is int and all(isinstance(one, str) for one in example.answers)
        example.prompt.encode()
        if example.kind == "answer":
            task.score(example, "the cat")
    task.summarize([(example, 1.0) for example in examples if not example.error])
    return examples


def complaints(name: str, tmp_path: Path, labels: Callable[[str], list[str]]) -> Iterator[str]:
    make, _, row = ROWS[name]
    for field in row:
        for label in labels(f"{name}/{field}"):
            folder = written(name, row, tmp_path / f"{field}-{label}".replace("/", ""), field, WRONG[label])
            try:
                used(make, folder)
            except UserError as error:
                if len(str(error).splitlines()) != 1:
                    yield f"{field} = {label}: {error}"
            except Exception as error:
                yield f"{field} = {label}: {type(error).__name__}: {error}"


def some(key: str) -> list[str]:
    """Three of the wrong values, others for every field."""
    return [list(WRONG)[(zlib.crc32(key.encode()) + 7 * i) % len(WRONG)] for i in range(3)]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_right_is_a_sample(name, tmp_path):
    make, _, row = ROWS[name]
    field = next(iter(row))
    examples = used(make, written(name, row, tmp_path, field, json.dumps(row[field])))
    assert examples and not any(example.error for example in examples)


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_field_of_a_row_is_one_line_or_a_failed_sample(name, tmp_path):
    assert not list(complaints(name, tmp_path, some))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_all_wrong_values_of_all_fields_are_one_line_or_failed_samples(name, tmp_path):
    assert not list(complaints(name, tmp_path, lambda _: list(WRONG)))
