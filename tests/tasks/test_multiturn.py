import json
from pathlib import Path
from typing import Any

import pytest

from methods.core.errors import UserError
from tasks.base import as_parts
from tasks.multiturn import KINDS, MultiTurn, change, shares_held


def write(folder: Path, **row: Any) -> str:
    turns = [{"input": f"where is {i}?", "answer": f" at {i}."} for i in range(3)]
    (folder / "kept.jsonl").write_text(json.dumps({"context": "a long text", "multi_turns": turns} | row) + "\n")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "answer", "references", "score"),
    [
        ("scbench_kv", "it is abc-1 there", ["abc-1"], 1.0),
        ("scbench_kv", "it is ABC-1", ["abc-1"], 0.0),
        ("scbench_vt", "A, b and nothing", ["a", "B", "zz"], 0.67),
        ("scbench_qa_eng", "In PARIS, surely", ["Rome", "paris"], 1.0),
        ("scbench_qa_chn", "北京", ["北京市"], 0.8),
        ("scbench_mf", "the answer is 12.7, not 3", ["12"], 1.0),
        ("scbench_mf", "12.7", ["12.5"], 0.0),
        ("scbench_mf", "nothing", ["12"], 0.0),
        ("passkey", "key 12345 6", ["12345"], 1.0),
        ("passkey", "123456", ["12345"], 0.0),
    ],
)
def test_each_set_is_scored_by_its_own_rule(kind, answer, references, score):
    assert KINDS[kind].score(answer, references) == pytest.approx(score)


def test_turns_follow_the_first_question_of_one_context(tmp_path):
    (example,) = MultiTurn(write(tmp_path)).examples()
    assert example.context == "a long text" and example.question == "\n\nwhere is 0?"
    assert [turn.question for turn in example.turns] == ["where is 1?", "where is 2?"]
    assert example.kind == "turns" and example.history == "golden" and not example.recompress


def test_requests_are_apart_and_all_separated_alike_from_the_context(tmp_path):
    (example,) = MultiTurn(write(tmp_path), mode="requests", compress="every_prompt").examples()
    assert example.history == "none" and not example.recompress
    assert {question[:2] for question in (example.question, *(t.question for t in example.turns))} == {"\n\n"}


def test_a_shuffled_order_is_the_same_for_the_same_seed_and_loses_no_question(tmp_path):
    path = write(tmp_path)
    orders = {seed: [t.question for t in MultiTurn(path, shuffle=seed).examples()[0].turns] for seed in range(6)}
    assert orders[3] == [t.question for t in MultiTurn(path, shuffle=3).examples()[0].turns]
    assert len(set(map(tuple, orders.values()))) > 1


def test_the_modes_have_names_and_fingerprints_of_their_own(tmp_path):
    path = write(tmp_path)
    tasks = [MultiTurn(path), MultiTurn(path, mode="requests"), MultiTurn(path, history="own"),
             MultiTurn(path, compress="every_prompt"), MultiTurn(path, shuffle=1)]  # fmt: skip
    assert len({json.dumps([task.name, task.fingerprint], sort_keys=True) for task in tasks}) == 5


def test_every_turn_has_a_row_and_their_mean_one(tmp_path):
    task = MultiTurn(write(tmp_path))
    (example,) = task.examples()
    rows = task.summarize(as_parts(example, {"parts": {"turn 1": 1.0, "turn 2": 0.0, "turn 3": 0.5}}))
    assert [(row.name, row.score) for row in rows] == [
        ("kept turn 1", 100), ("kept turn 2", 0), ("kept turn 3", 50), ("kept, mean over turns", 50),
    ]  # fmt: skip


def test_the_change_is_from_the_first_turn_to_the_last():
    dialogues = [[{"score": 1.0}, {"score": 0.2}, {"score": 0.0}], [{"score": 1.0}, {"score": 0.5}]]
    assert change(dialogues) == -0.75


def test_shares_are_of_bytes_after_each_turn():
    dialogues = [[{"held": 10, "full": 100}, {"held": 30, "full": 110}], [{"held": 30, "full": 100}]]
    assert shares_held(dialogues) == [0.2, 30 / 110]


@pytest.mark.parametrize(
    "row", [{"context": ""}, {"multi_turns": []}, {"multi_turns": [{"input": "x"}]}, {"kind": "?"}]
)
def test_a_row_that_cannot_be_run_says_why(tmp_path, row):
    (example,) = MultiTurn(write(tmp_path, **row)).examples()
    assert example.error and "`" in example.error


@pytest.mark.parametrize("knobs", [{"mode": "x"}, {"history": "x"}, {"compress": "x"}, {"turns": 0}, {"limit": 0}])
def test_a_setting_that_cannot_work_is_refused(knobs):
    with pytest.raises(UserError, match=f"task.{next(iter(knobs))}="):
        MultiTurn(**knobs)


def test_the_bundled_contexts_hold_every_answer_once():
    for example in MultiTurn().examples():
        for answers in (example.answers, *(turn.answers for turn in example.turns)):
            assert example.context.count(answers[0]) == 1
