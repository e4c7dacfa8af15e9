import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core.errors import UserError
from runners.engine.answer import answer
from runners.engine.prompt import Encoder
from runners.engine.setting import Setting
from tasks.base import Task, as_parts
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
        ("scbench_choice_eng", "B", ["a river", "B"], 1.0),
        ("scbench_choice_eng", "a river", ["a river", "B"], 0.0),
        ("scbench_summary", "The cat.\nIt sat", ["it sat\nthe cat"], 1.0),
        ("scbench_summary", "the cats", ["the cat"], 0.5),
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


def asking(answer: Any, **more: Any) -> dict[str, Any]:
    options = ["a cat", "a mat ", "a river", "nobody"]
    return {"input": "who sat?", "options": options, "answer": answer} | more


@pytest.mark.parametrize("answer", ["a mat", ["a mat"], "B", ["B"]])
def test_options_stand_below_their_question_and_the_right_one_is_known_by_its_letter(tmp_path, answer):
    (example,) = MultiTurn(write(tmp_path, kind="scbench_choice_eng", multi_turns=[asking(answer)])).examples()
    assert example.question == (
        "\n\nwho sat?\nA. a cat\nB. a mat \nC. a river\nD. nobody\nAnswer with one letter, A, B, C or D."
    )
    assert example.answers == [answer if isinstance(answer, str) else answer[0], "B"]
    assert example.max_new_tokens == 40 and example.tags["chance"] == 0.25


MIXED = {
    "kind": "scbench_summary_with_needles",
    "multi_turns": [
        {"input": "what is the key?", "answer": 12345, "task": "scbench_passkey"},
        {"input": "sum up", "answer": ["the cat\nsat"], "task": None, "name": "summary"},
    ],
}


@pytest.mark.parametrize("mode", ["turns", "requests"])
def test_a_turn_of_a_mixed_row_has_a_rule_and_a_limit_of_its_own(tmp_path, mode):
    task = MultiTurn(write(tmp_path, **MIXED), mode=mode)
    (example,) = task.examples()
    (later,) = example.turns
    assert (example.tags["score"], example.max_new_tokens) == ("passkey", 15)
    assert (later.tags["score"], later.max_new_tokens) == ("scbench_summary", 800)
    assert "not stemmed" in task.fingerprint["rouge"] and "rouge" not in MultiTurn().fingerprint


class Said(Encoder):
    """Every answer reads as what was said last, whatever its tokens."""

    spoken: list[str] = []  # noqa: RUF012

    def said(self, example: Any, ids: Any) -> tuple[str, str]:
        return self.spoken.pop(0), ""


def run(task: Task, tokenizer: Any, model_dir: Path, protocol: str, said: list[str]) -> dict[str, Any]:
    """The row of the task's only example, its answers scored as if they were these."""
    encoder = Said(tokenizer, ends=[], window=1200)
    Said.spoken = list(said)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    found: list[dict[str, Any]] = []
    answer(Setting(model, task, lambda: encoder, protocol, None, 1), load_method("full"), task.examples(), found.append)
    return found[0]


@pytest.mark.parametrize(
    ("mode", "protocol"), [("turns", "aware"), pytest.param("requests", "agnostic", marks=pytest.mark.slow)]
)
def test_turns_of_two_kinds_are_answered_on_one_context(tmp_path, tiny_tokenizer, tiny_model_dir, mode, protocol):
    task = MultiTurn(write(tmp_path, context="the cat sat on a mat. " * 200, **MIXED), mode=mode)
    row = run(task, tiny_tokenizer, tiny_model_dir, protocol, ["12345, the cat sat", "SAT\nthe 12345 cat"])
    assert [turn["tokens_out"] for turn in row["turns"]] == [15, 800]
    # the first digits are the key; of four words three are those of the summary, in lines: 2 * 3/4 / (3/4 + 1)
    assert [turn["score"] for turn in row["turns"]] == [1.0, pytest.approx(6 / 7)]
    # what is read leaves room for all answers of a conversation, or for the longest of those that stand apart
    read, new = (row["tokens_in"], 815) if mode == "turns" else (row["tokens_context"], 800)
    assert row["cut"] and 1200 - new - 20 < read <= 1200 - new


def test_a_change_between_two_kinds_of_turns_is_not_shown(tmp_path):
    turns = [{"score": 1.0, "held": 1, "full": 2}, {"score": 0.5, "held": 1, "full": 2}]
    for kinds, lines in ((MIXED, 1), ({}, 2)):
        task = MultiTurn(write(tmp_path, **kinds))
        (example,) = task.examples()
        assert len(task.remarks([(example, {"turns": turns}, {"turns": turns})])) == lines


@pytest.mark.parametrize("name", ["scbench_repoqa", "scbench_repoqa_and_kv"])
def test_the_sets_that_cannot_be_scored_are_refused_with_those_that_can(tmp_path, name):
    for subset in (name, ["scbench_kv", name]):
        with pytest.raises(UserError, match=f"task.subset={name} cannot be scored.*RepoQA.*there are scbench_kv, "):
            MultiTurn(data="hub", subset=subset)
    folder = tmp_path / name
    folder.mkdir()
    Path(write(folder), "kept.jsonl").rename(folder / f"{name}.jsonl")
    (example,) = MultiTurn(str(folder)).examples()
    assert example.error is not None and "RepoQA" in example.error


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"context": ""}, "`context`"),
        ({"multi_turns": []}, "`multi_turns` is empty"),
        ({"multi_turns": [{"input": "x"}]}, "`answer`"),
        ({"multi_turns": [asking([])]}, "`answer`"),
        ({"max_new_tokens": "many"}, "`max_new_tokens` is many"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"kind": "?"}, "`kind` is ?"),
        ({"kind": "scbench_choice_eng"}, "`options`"),
        ({"kind": "scbench_choice_eng", "multi_turns": [asking("a dog")]}, "`options`"),
        ({"kind": "scbench_choice_eng", "multi_turns": [asking("B", options=4)]}, "`options`"),
        ({"kind": "scbench_choice_eng", "multi_turns": [asking("B", options=["a", "b", "c"])]}, "`options`"),
        ({"kind": MIXED["kind"]}, "`task` and `name` say none of summary, passkey"),
        ({"kind": MIXED["kind"], "multi_turns": [asking("B", task="scbench_kv")]}, "`task` and `name`"),
    ],
)
def test_a_row_that_cannot_be_run_says_why(tmp_path, row, why):
    (example,) = MultiTurn(write(tmp_path, **row)).examples()
    assert example.error is not None and why in example.error


def test_zero_is_an_answer(tmp_path):
    row = {"kind": "scbench_mf", "multi_turns": [asking(0), asking(12)]}
    (example,) = MultiTurn(write(tmp_path, **row)).examples()
    assert example.error is None and example.answers == ["0"] and example.turns[0].answers == ["12"]


@pytest.mark.parametrize("knobs", [{"mode": "x"}, {"history": "x"}, {"compress": "x"}, {"turns": 0}, {"limit": 0}])
def test_a_setting_that_cannot_work_is_refused(knobs):
    with pytest.raises(UserError, match=f"task.{next(iter(knobs))}="):
        MultiTurn(**knobs)


def test_the_bundled_contexts_hold_every_answer_once():
    for example in MultiTurn().examples():
        for answers in (example.answers, *(turn.answers for turn in example.turns)):
            assert example.context.count(answers[0]) == 1
