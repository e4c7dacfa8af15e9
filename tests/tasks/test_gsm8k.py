import json
from pathlib import Path
from typing import Any

import pytest

from methods.core.errors import UserError
from tasks.base import cut_at
from tasks.gsm8k import GSM8K, INVALID, bare
from tasks.reasoning import Reasoning


def write(folder: Path, n: int = 3, train: int = 40) -> str:
    def rows(name: str, count: int) -> str:
        made = [{"question": f"{name} {i}?", "answer": f"so <<1+1=2>>2\n#### {i}"} for i in range(count)]
        return "".join(json.dumps(row) + "\n" for row in made)

    (folder / "test.jsonl").write_text(rows("test", n))
    if train:
        (folder / "train.jsonl").write_text(rows("train", train))
    return str(folder)


def scores(tmp_path: Path, answer: str, variant: str = "gsm8k", reference: str = "18") -> dict[str, float]:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "?", "answer": f"steps\n#### {reference}"}))
    task = GSM8K(str(tmp_path), variant=variant, shots=0)
    return task.parts(task.examples()[0], answer)


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("it is 9 * 2\n#### 18", 1, 1),
        ("#### 18.", 1, 1),
        ("#### $18", 0, 1),
        ("The answer is 18", 0, 1),
        ("#### 1,8", 1, 1),
        ("#### 18\n\nQuestion: how many are 3?", 1, 1),
        ("", 0, 0),
        ("#### 18.00", 0, 0),
        ("#### 18 in 2 days.", 1, 0),
        ("#### 18 ...", 1, 0),
    ],
)
def test_answers_are_read_strictly_and_flexibly(tmp_path, answer, strict, flexible):
    assert scores(tmp_path, answer) == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize(
    ("answer", "strict"), [("The answer is 18.", 1), ("The answer is 18", 0), ("The answer is 18\nand so on", 0)]
)
def test_the_chain_of_thought_pattern_eats_a_last_digit_without_a_full_stop(tmp_path, answer, strict):
    assert scores(tmp_path, answer, "gsm8k_cot")["strict"] == strict


def test_the_llama_variants_read_the_last_match(tmp_path):
    both = "The final answer is 3. No: The final answer is 18"
    assert scores(tmp_path, both, "gsm8k_cot_llama")["strict"] == 1
    assert scores(tmp_path, both, "gsm8k_llama")["strict"] == 1
    assert scores(tmp_path, "The answer is 18. The answer is 3.", "gsm8k_cot")["strict"] == 1


def test_numbers_are_compared_as_strings_without_their_trimmings():
    assert bare("1,234") == "1234" and bare("$5.") == "5" and bare("a\n#### b #### 7") == "7"
    assert bare("18.00") != bare("18") and bare("5..") == "5."


def test_the_first_stop_cuts_the_answer_and_is_not_kept():
    assert cut_at("a Q: b Question: c", ["Question:", "Q:"]) == "a "
    assert cut_at("abc", ["x"]) == "abc" and cut_at("abc", []) == "abc"


def test_a_prompt_is_its_examples_and_an_open_question(tmp_path):
    task = GSM8K(write(tmp_path), shots=2)
    example = task.examples()[0]
    assert example.context.count("Question: train") == 2 and example.context.endswith("\n\n")
    assert example.context.count("\nAnswer: so <<1+1=2>>2\n#### ") == 2
    assert example.question == "Question: test 0?\nAnswer:" and example.max_new_tokens == 256 and not example.chat


def test_examples_are_drawn_anew_for_every_problem_in_order(tmp_path):
    import random

    path = write(tmp_path)
    rng = random.Random(1234)
    train = [json.loads(line)["question"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    wanted = [rng.sample(train, 4) for _ in range(3)]
    for example, names in zip(GSM8K(path, shots=4).examples(), wanted, strict=True):
        found = [part.partition("\n")[0] for part in example.context.split("Question: ")[1:]]
        assert found == names
    # a limit takes the same prompts
    assert GSM8K(path, shots=4, limit=2).examples() == GSM8K(path, shots=4).examples()[:2]


def test_the_fixed_examples_come_in_order_and_have_the_known_answers(tmp_path):
    (example, *_) = GSM8K(write(tmp_path), variant="gsm8k_cot").examples()
    parts = example.context.split("\n\n")[:-1]
    answers = [part.rpartition("The answer is ")[2].rstrip(".") for part in parts]
    assert answers == ["6", "5", "39", "8", "9", "29", "33", "8"]
    (fewer, *_) = GSM8K(write(tmp_path), variant="gsm8k_cot", shots=3).examples()
    assert example.context.startswith(fewer.context)
    with pytest.raises(UserError, match="has 8 examples"):
        GSM8K(write(tmp_path), variant="gsm8k_cot", shots=9)


def test_turns_hold_the_examples_outside_the_text(tmp_path):
    (example, *_) = GSM8K(write(tmp_path), shots=2, multiturn=True).examples()
    assert example.context == "" and example.chat and len(example.shots) == 2
    asked, solved = example.shots[0]
    assert asked.endswith("\nAnswer:") and not solved.startswith(" ")


def test_without_training_problems_the_drawn_examples_are_missed_by_name(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl"):
        GSM8K(write(tmp_path, train=0)).examples()
    assert GSM8K(write(tmp_path, train=0), shots=0).examples()[0].context == ""


def test_nothing_found_is_invalid_and_counted(tmp_path):
    task = GSM8K(write(tmp_path), shots=0)
    assert {one.read("none at all") for one in task._readings} == {INVALID}
    row: dict[str, Any] = {"prediction": "none", "score": 0.0, "tokens_out": 3, "stop": "length", "batch": 1}
    row["ledger"] = {"mean_decode": 10}
    right = row | {"prediction": "#### 1", "score": 1.0, "stop": "end"}
    said = "\n".join(task.remarks([(task.examples()[0], row, right)]))
    assert "no number found, strict: 100.0%, full 0.0%" in said and "1 right to wrong, 0 wrong to right" in said
    assert "ended at their limit: 100.0%, full 0.0%" in said


def test_a_row_that_lacks_its_answer_costs_no_other_its_examples(tmp_path):
    path = write(tmp_path)
    whole = GSM8K(path, shots=2).examples()
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join([lines[0], '{"question": "?"}', lines[2]]))
    broken = GSM8K(path, shots=2).examples()
    assert broken[1].error and broken[2].context == whole[2].context


def test_settings_that_the_bundled_split_does_not_have_are_refused():
    assert GSM8K.chosen(shots=None, variant="gsm8k", flexible=True).name == "reasoning-mini"
    with pytest.raises(UserError, match=r"gsm8k: task\.shots=8 needs task\.data=hub or a path.*reasoning-mini"):
        GSM8K.chosen(shots=8)


def test_bundled_is_the_split_that_is_bundled():
    assert isinstance(GSM8K.chosen(limit=1), Reasoning) and GSM8K.chosen().name == "reasoning-mini"


@pytest.mark.shared
def test_the_published_problems_are_read(shared_data):
    examples = GSM8K(str(shared_data / "gsm8k"), variant="gsm8k_cot").examples()
    assert len(examples) == 1319 and examples[0].answers == ["18"]


def test_fewer_training_rows_than_examples_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"task.shots=5: the train.jsonl of .* has 2 rows .* give task.shots=2"):
        GSM8K(data=write(tmp_path, train=2), variant="gsm8k", shots=5).examples()


def test_the_strings_that_end_a_solution_can_be_set(tmp_path):
    data = write(tmp_path)
    plain, ended = GSM8K(data, shots=0), GSM8K(data, shots=0, stop=["END"])
    answer, (example, *_) = "#### 0 END, or 7", plain.examples()
    assert plain.parts(example, answer)["flexible"] == 0 and ended.parts(example, answer)["flexible"] == 1
    assert ended.fingerprint["stop"] == ["END"] and "stop" not in plain.fingerprint
    with pytest.raises(UserError, match=r"task\.stop=END; give a list"):
        GSM8K(data, stop="END")


def test_what_cuts_the_scored_text_ends_the_answer(tmp_path):
    (example, *_) = GSM8K(write(tmp_path), shots=1).examples()
    assert "Question:" in example.stop
    (own, *_) = GSM8K(write(tmp_path), shots=1, stop=["END"]).examples()
    (none, *_) = GSM8K(write(tmp_path), shots=1, stop=[]).examples()
    assert own.stop == ("END",) and none.stop == ()
    assert len({example.key, own.key, none.key}) == 3
