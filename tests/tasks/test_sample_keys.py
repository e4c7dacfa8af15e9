"""A sample's key: the same whatever is chosen beside it, another one where anything of it is another."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.base import Choice, Example, Forced, Turn
from tasks.longbench.task import LongBench
from tasks.longbench_v2 import LongBenchV2
from tasks.multiturn import MultiTurn
from tasks.needle import Needle
from tasks.reasoning import Reasoning
from tasks.ruler.task import Ruler
from tasks.summarization import Summarization

ONE = Example("a/0", "text", " who?", ["me"], 8, {"subset": "a", "category": "b"})


def settings(task) -> dict:
    return {key: value for key, value in task.fingerprint.items() if key not in task.of_samples}


@pytest.mark.parametrize(
    "change",
    [
        {"id": "a/1"}, {"context": "text "}, {"question": ""}, {"answers": ["you"]}, {"max_new_tokens": 9},
        {"tags": {"subset": "a", "category": "b", "metric": "f1"}}, {"stop_at_newline": True}, {"chat": False},
        {"prefill": "I"}, {"turns": (Turn("and?", ["her"], 8),)}, {"shots": (("q", "a"),)}, {"beams": 4},
        {"choices": (Choice("", " yes"),)}, {"forced": Forced("text", "prefix", 0, 4, 2, 1, range(2, 4))},
    ],
)  # fmt: skip
def test_whatever_the_model_or_the_score_is_given_makes_another_sample(change):
    assert replace(ONE, **change).key != ONE.key == replace(ONE).key


def test_a_piece_of_another_text_or_with_other_places_that_count_is_another_sample():
    forced = Forced("text", "prefix", 0, 4, 2, 1, range(2, 4))
    keys = {
        replace(ONE, forced=replace(forced, **change)).key for change in ({}, {"text": "tex"}, {"counted": range(3, 4)})
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("task", "some"),
    [
        (Needle, {"kinds": ["passkey"], "limit": 3}), (Ruler, {"limit": 2}), (LongBench, {"limit": 2}),
        (LongBench, {"subset": "few-shot"}), (MultiTurn, {"limit": 1}), (Reasoning, {"limit": 1}),
        (Summarization, {"limit": 2}), (Summarization, {"shuffle": 7, "limit": 5}),
    ],
)  # fmt: skip
def test_a_selection_holds_samples_of_the_whole_and_is_no_other_cell(task, some):
    whole, part = task(), task(**some)
    keys = {example.id: example.key for example in whole.examples()}
    chosen = {example.id: example.key for example in part.examples()}
    assert 0 < len(chosen) < len(keys) and chosen.items() <= keys.items()
    assert settings(part) == settings(whole)


def test_rows_without_ids_are_numbered_alike_whichever_domain_is_chosen(tmp_path):
    rows = [
        {"domain": domain, "difficulty": "easy", "length": "short", "question": f"q{i}", "context": "c", "answer": "A"}
        | {f"choice_{letter}": "x" for letter in "ABCD"}
        for i, domain in enumerate(["one", "two", "one", "two"])
    ]
    path = Path(tmp_path, "data.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {example.id: example.key for example in LongBenchV2(str(path)).examples()}
    part = {example.id: example.key for example in LongBenchV2(str(path), subset="two").examples()}
    assert len(part) == 2 and part.items() <= whole.items()


def test_what_draws_other_samples_under_the_same_ids_is_another_cell():
    assert settings(MultiTurn(shuffle=1)) != settings(MultiTurn()) != settings(MultiTurn(turns=2))
    assert settings(Summarization(beams=4)) != settings(Summarization())
