"""LongBench v2: its prompt, the letter read out of an answer, and a table of plain means."""

import json
from pathlib import Path
from typing import Any

import pytest

from methods.core.errors import UserError
from tasks import longbench_v2
from tasks.lm_eval.task import LmEval
from tasks.longbench_v2 import LongBenchV2, letter


def item(**changes: Any) -> dict[str, Any]:
    row = {
        "_id": "a1",
        "domain": "Single-Document QA",
        "sub_domain": "Literary",
        "difficulty": "easy",
        "length": "short",
        "question": "\nWho sat on the mat? ",
        "choice_A": "the dog",
        "choice_B": " the cat ",
        "choice_C": "{{context}}",
        "choice_D": "nobody",
        "answer": "B",
        "context": "  A cat {{choices[0]}} sat on a mat.\n",
    }
    return row | changes


def task(tmp_path: Path, *rows: dict[str, Any], **knobs: Any) -> LongBenchV2:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(list(rows)))
    return LongBenchV2(str(path), **knobs)


def test_a_prompt_is_the_benchmarks_own_and_is_cut_after_the_context(tmp_path):
    (example,) = task(tmp_path, item()).examples()
    assert example.context == (
        "Please read the following text and answer the question below.\n\n<text>\nA cat {{choices[0]}} sat on a mat."
    )
    assert example.question == (
        "\n</text>\n\nWhat is the correct answer to this question: Who sat on the mat?\nChoices:\n(A) the dog\n"
        "(B) the cat\n(C) {{context}}\n(D) nobody\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert example.answers == ["B"] and example.max_new_tokens == 128 and example.chat


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is *D*", "D"),
        ("The correct answer is A, as The correct answer is (B)", "B"),
        ("the correct answer is (B)", None),
        ("The correct answer is (E)", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_letter_is_read_with_brackets_first_and_without_stars(answer, found):
    assert letter(answer) == found


def test_rows_are_plain_means_over_samples_whatever_their_domains(tmp_path):
    kinds = [("easy", "short", "X"), ("hard", "short", "X"), ("hard", "long", "Y")]
    rows = [item(_id=str(i), difficulty=a, length=b, domain=c) for i, (a, b, c) in enumerate(kinds)]
    own = task(tmp_path, *rows)
    table = own.summarize(list(zip(own.examples(), [1.0, 0.0, 0.0])))
    found = {row.name: row.score for row in table}
    assert found == {"overall": pytest.approx(100 / 3), "easy": 100, "hard": 0, "short": 50, "long": 0, "X": 50, "Y": 0}


def test_a_subset_is_a_domain_and_a_limit_counts_its_samples(tmp_path):
    rows = [item(_id=str(i), domain="XY"[i % 2]) for i in range(5)]
    assert [e.id for e in task(tmp_path, *rows, subset="Y", limit=1).examples()] == ["v2/1"]
    with pytest.raises(UserError, match=r"task\.subset=Z is unknown here; there are X, Y"):
        task(tmp_path, *rows, subset="Z").examples()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": None}, "`context` is missing"),
        ({"answer": "E"}, "`answer` is E"),
        ({"length": "huge"}, "`length` is huge"),
    ],
)
def test_a_broken_row_says_what_is_wrong_and_the_others_stay(tmp_path, change, said):
    broken, good = task(tmp_path, item(**change), item(_id="b")).examples()
    assert broken.error is not None and said in broken.error and good.error is None


def test_ids_that_come_twice_are_told_apart(tmp_path):
    ids = [example.id for example in task(tmp_path, item(), item(), item(_id="b")).examples()]
    assert len(set(ids)) == 3 and ids[2] == "v2/b"
    assert task(tmp_path, item(_id=["a", "b"])).examples()[0].error is None


def test_another_wording_of_the_template_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(longbench_v2, "DIGEST", "00000000")
    with pytest.raises(UserError, match="words the prompt in another way"):
        task(tmp_path, item()).examples()


def test_the_source_says_that_it_is_not_the_whole(tmp_path):
    assert "1 items, not the published 503" in task(tmp_path, item()).source()


def test_answers_without_a_letter_are_counted(tmp_path):
    own = task(tmp_path, item())
    row: dict[str, Any] = {"prediction": "The correct answer is (B)", "score": 1.0, "tokens_out": 3, "stop": "end"}
    row |= {"batch": 1, "ledger": {"mean_decode": 10}}
    lost = row | {"prediction": "B", "score": 0.0}
    said = "\n".join(own.remarks([(own.examples()[0], lost, row)]))
    assert "no letter found: 100.0%, full 0.0%" in said and "1 right to wrong" in said


def test_settings_that_the_bundled_questions_do_not_have_are_refused():
    with pytest.raises(UserError, match=r"longbench_v2: task\.subset=\['law'\] needs task\.data=hub or a path"):
        LongBenchV2.chosen(subset=["law"])


def test_bundled_are_the_four_choice_questions_that_are_bundled():
    stand_in = LongBenchV2.chosen(limit=1)
    assert isinstance(stand_in, LmEval) and stand_in.name == "lm_eval-mini"
