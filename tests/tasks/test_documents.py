"""The document generator."""

import re
from itertools import pairwise

import numpy as np
import pytest

from tasks.documents import KINDS, STYLES, Pool, prose, split_of


def make(kind: str, seed: int = 1, split: str = "train", size: int = 900, **knobs):
    return KINDS[kind](Pool(np.random.default_rng(seed), split), size, 3, **knobs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_document_and_another_seed_another(kind):
    assert make(kind, 1) == make(kind, 1)
    assert make(kind, 1).context != make(kind, 2).context


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_comes_close_to_the_size_it_was_asked_for(kind):
    for size in (300, 1500, 9000):
        assert 0.7 * size - 60 < len(make(kind, size=size).context) < 1.25 * size + 350


@pytest.mark.parametrize("kind", ["pairs", "table", "facts", "needle"])
@pytest.mark.parametrize("style", STYLES)
def test_every_answer_holds_a_value_that_the_context_states_once(kind, style):
    knobs = {"needles": 4} if kind == "needle" else {}
    document = make(kind, style=style, **knobs)
    for turn in document.turns:
        assert len(re.findall(rf"\b{turn.value}\b", document.context)) == 1
        assert turn.value in turn.answer and turn.value not in turn.question


def test_a_chain_can_be_followed_in_the_context():
    document = make("chains", links=5)
    for turn in document.turns:
        start = turn.question.split()[-1]
        steps = (start + turn.answer).rstrip(".").split(". ")
        assert len(steps) == 5
        assert all(f"{step}." in document.context for step in steps)


def test_a_chain_without_repetition_names_every_link_once():
    document = make("chains", links=4, restate=False)
    for turn in document.turns:
        names = re.split(" (?:follows|holds) ", turn.question.split()[-1] + turn.answer.rstrip("."))
        assert len(names) == 5
        assert all(f"{a} follows {b}." in document.context for a, b in pairwise(names[:4]))
        assert f"{names[3]} holds {names[4]}." in document.context


def test_a_two_passage_answer_joins_a_fact_of_each_passage():
    document = make("bridge", size=2500)
    for turn in document.turns:
        person, other = turn.question.split()[-2], turn.value.split(".")[0]
        assert f"The guide of {person} is {other}." in document.context
        assert turn.value.removeprefix(f"{other}. ") in document.context
    for turn in (short := make("bridge", size=2500, restate=False)).turns:
        person, other = turn.question.split()[-2], turn.value.split()[0]
        assert f"The guide of {person} is {other}." in short.context and turn.value in short.context


def test_a_summary_lists_the_findings_in_the_order_of_the_report():
    document = make("findings", points=4)
    lines = re.findall(r"\w+ finding: [^.]*\.", document.context)
    assert len(lines) == 4 and " ".join(lines) == document.turns[0].value


@pytest.mark.parametrize(("kind", "knobs"), [("passages", {}), ("passages", {"marked": False}), ("entries", {})])
def test_the_asked_sentence_stands_in_the_paragraph_of_the_answer(kind, knobs):
    document = make(kind, size=2500, **knobs)
    paragraphs = dict(re.findall(r"Paragraph (\d+): (.*)", document.context))
    for turn in document.turns:
        sentence = re.search('says "(.*)"', turn.question)[1]
        assert [number for number, text in paragraphs.items() if sentence in text] == [turn.value]


def test_the_two_pools_share_no_word_and_no_number():
    words = {s: set() for s in ("train", "held_out")}
    for split, found in words.items():
        for seed in range(20):
            pool = Pool(np.random.default_rng(seed), split)
            found |= {pool.word() for _ in range(50)} | {pool.number() for _ in range(50)}
        assert all(split_of(word) == split for word in found)
    assert not words["train"] & words["held_out"]


def test_numbers_grow_longer_when_the_short_ones_are_used_up():
    pool = Pool(np.random.default_rng(1), "held_out")
    numbers = [pool.number(2, 2) for _ in range(40)]
    assert len(set(numbers)) == 40 and {len(number) for number in numbers} == {2, 3}


def test_prose_is_large_enough_and_held_out_paragraphs_are_not_trained_on():
    train, held_out = prose("train"), prose("held_out")
    assert sum(map(len, train)) > 500_000 and sum(map(len, held_out)) > 50_000
    assert not set(train) & set(held_out)
