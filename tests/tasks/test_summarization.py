import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods.core.errors import UserError
from tasks.base import Example, as_parts
from tasks.scoring import rouge
from tasks.summarization import FRAME, SETUPS, Summarization, criterion, distinct, lead, ratio_interval
from tasks.tokens import Tokens


def write(folder: Path, **row: Any) -> str:
    (folder / "news.jsonl").write_text(json.dumps({"article": "One. Two! Three? Four.", "highlights": "One."} | row))
    return str(folder)


@pytest.mark.parametrize("package", rouge.PACKAGES)
def test_a_copy_has_everything_and_nothing_has_nothing(package):
    text = "the cats were running over the mat"
    found = rouge.scores(package, text, text)
    assert found == pytest.approx(dict.fromkeys(found, 1.0))
    assert list(found) == ["ROUGE-1", "ROUGE-2", "ROUGE-L", *(["ROUGE-Lsum"] if package == "rouge-score" else [])]
    assert set(rouge.scores(package, "", text).values()) == {0.0}
    assert set(rouge.scores(package, "dogs", text).values()) == {0.0}


def test_rouge_score_stems_counts_and_takes_the_plain_subsequence():
    # stems: the cat run | the cat were run; 1: 3 of 3 and 3 of 4; 2: "the cat" of 2 and of 3; L: 3
    found = rouge.scores("rouge-score", "The cat running", "the cats were running")
    assert found == pytest.approx({"ROUGE-1": 6 / 7, "ROUGE-2": 0.4, "ROUGE-L": 6 / 7, "ROUGE-Lsum": 6 / 7})
    # a word counts as often as both have it
    assert rouge.scores("rouge-score", "a a a", "a a")["ROUGE-1"] == pytest.approx(0.8)


def test_the_whole_text_and_its_sentences_are_scored_apart_and_named(tmp_path):
    # the same two sentences the other way round: half of the whole, all of the sentences; lines and marks part alike
    for summary, reference in (
        ("Cats ran. Dogs sat.", "Dogs sat.\nCats ran."),
        ("Cats ran\nDogs sat", "Dogs sat. Cats ran."),
    ):
        found = rouge.scores("rouge-score", summary, reference)
        assert (found["ROUGE-L"], found["ROUGE-Lsum"]) == pytest.approx((0.5, 1.0))
    task = Summarization(data=write(tmp_path, highlights="Dogs sat.\nCats ran."))
    (example,) = task.examples()
    parts = task.parts(example, "Cats ran. Dogs sat.")
    assert task.score(example, "Cats ran. Dogs sat.") == parts["ROUGE-L"] == pytest.approx(0.5)
    record = {"parts": parts, "prediction": "Cats ran. Dogs sat.", "tokens_out": 5, "stop": "eos", "ledger": {}}
    names = [row.name for row in task.summarize(as_parts(example, {"score": 0.5} | record))]
    assert names == ["news ROUGE-1", "news ROUGE-2", "news ROUGE-L", "news ROUGE-Lsum"]


def test_the_papers_code_gives_the_same_sum_over_sentences():
    from rouge_score.rouge_scorer import RougeScorer

    summary, reference = "A cat ran home. It sat there, 3.5 m away. The end.", "The end came. A cat sat.\nIt ran 3.5 m."
    own = RougeScorer(["rougeLsum"], use_stemmer=True)
    lines = "A cat ran home.\nIt sat there, 3.5 m away.\nThe end.", "The end came.\nA cat sat.\nIt ran 3.5 m."
    expected = own.score(lines[1], lines[0])["rougeLsum"].fmeasure
    assert rouge.scores("rouge-score", summary, reference)["ROUGE-Lsum"] == pytest.approx(expected)


def test_the_sum_over_lines_takes_every_line_for_a_sentence_and_no_stems():
    # the two lines of the reference are found whole, whatever their order; as one line only two of four words are
    assert rouge.lsum("c d\na b", ["a b\nc d"]) == 1.0
    assert rouge.lsum("c d a b", ["a b c d"]) == pytest.approx(0.5)
    assert rouge.lsum("a b. c d", ["c d. a b"]) == pytest.approx(0.5)
    assert rouge.lsum("cat", ["cats"]) == rouge.lsum("", ["cats"]) == 0.0
    assert rouge.lsum("a b", ["z", "a b c"]) == pytest.approx(0.8)


def test_the_package_rouge_takes_sets_and_no_stems():
    assert rouge.overlap("a a a", "a a", 1) == pytest.approx(1.0)
    assert rouge.overlap("The cat running", "the cats were running", 1) == pytest.approx(2 / 7, abs=1e-6)
    # full stops part nothing here: "c d" is a pair also across one
    assert rouge.overlap("b c. d e", "c d", 2) == pytest.approx(0.5, abs=1e-6)


def test_the_frame_of_keyformer_ends_in_its_header_with_nothing_behind(tmp_path):
    (example,) = Summarization("keyformer", write(tmp_path), beams=4).examples()
    assert example.prompt.endswith("### Input:\nOne. Two! Three? Four.\n\n### Response:")
    assert "### Instruction:\nSummarize the following news article:\n\n" in example.context
    assert (example.min_new_tokens, example.max_new_tokens, example.beams, example.chat) == (30, 128, 4, False)


def test_an_article_beyond_the_limit_loses_its_end_and_keeps_its_frame(tmp_path):
    task = Summarization("keyformer", write(tmp_path, article="w " * 5000))
    task.fit(lambda: Tokens(lambda text: text.split(), " ".join, opening=1))
    (example,) = task.examples()
    assert 1 + len(example.context.split()) + len(example.question.split()) == 1920
    assert example.question == FRAME[1]


def test_h2o_takes_a_prepared_prompt_and_stops_at_its_mark(tmp_path):
    prompt = "###\nArticle: text.\n\nSummarize the above article in 1 sentence.\n"
    task = Summarization("h2o", write(tmp_path, article=prompt, summary_gt="a b", highlights=None))
    (example,) = task.examples()
    assert example.prompt == prompt and example.question.startswith("\n\nSummarize") and example.max_new_tokens == 64
    assert task.parts(example, "a b\n###\nmore") == pytest.approx({"ROUGE-1": 1, "ROUGE-2": 1, "ROUGE-L": 1})
    # without a mark nothing is cut off
    assert task.parts(example, "a b")["ROUGE-1"] == pytest.approx(1)


def test_lm_evals_prompt_is_its_own(tmp_path):
    (example,) = Summarization("lm_eval", write(tmp_path)).examples()
    assert example.prompt == "Summarize the following article:\n\nOne. Two! Three? Four.\n\nSummary:"


def test_the_first_sentences_are_three():
    assert lead("One. Two! Three? Four.") == "One. Two! Three?"


def test_a_text_that_repeats_itself_has_few_distinct_pairs():
    assert distinct(["a b c d"]) == 1 and distinct(["a b a b a"]) == 0.5 and distinct([]) == 0


def rows(ours: list[float], full: list[float], tokens: int = 10) -> Any:
    def row(score: float, n: int) -> dict[str, Any]:
        # the sum over sentences is none of the rule's three
        return {"parts": {"ROUGE-1": score, "ROUGE-L": score, "ROUGE-Lsum": 0.1 * n}, "tokens_out": n}

    tags = {"subset": "news", "category": "news"}
    return [
        (Example(f"news/{i}", "", "", [], 1, tags), row(a, tokens), row(b, 10))
        for i, (a, b) in enumerate(zip(ours, full))
    ]


def test_99_per_cent_is_asked_of_the_lower_end_and_of_the_length():
    full = [0.4, 0.5, 0.6, 0.5]
    assert "passes;" in criterion(rows(full, full))
    assert "fails" in criterion(rows([0.9 * x for x in full], full))
    assert "fails" in criterion(rows(full, full, tokens=8))
    # right on the whole, far off on single samples
    assert "passes as a point estimate" in criterion(rows([0.6, 0.4, 0.5, 0.5], full))
    assert "passes as a point estimate" in criterion(rows([0.5], [0.5]))


def test_a_ratio_of_means_is_not_a_mean_of_ratios():
    ratio, low, high = ratio_interval(np.array([[0.5, 1.0], [1.0, 1.0], [0.0, 1.0]]))
    assert ratio == 0.5 and 0 <= low < high <= 1
    assert ratio_interval(np.zeros((3, 2))) == (1, 1, 1)
    assert ratio_interval(np.array([[1.0, 0.0]] * 3)) == (np.inf, np.inf, np.inf)


def test_a_row_without_a_summary_is_an_error_of_that_row(tmp_path):
    (example,) = Summarization(data=write(tmp_path, highlights="")).examples()
    assert example.error and "highlights" in example.error


def test_a_rows_own_limit_leaves_the_papers_set_ups_as_they_are(tmp_path):
    data = write(tmp_path, max_new_tokens=7)
    limits = {setup: Summarization(setup, data).examples()[0].max_new_tokens for setup in SETUPS}
    assert limits == {"plain": 7, "keyformer": 128, "h2o": 64, "lm_eval": 128}
    assert Summarization("keyformer", data, max_new_tokens=9).examples()[0].max_new_tokens == 9


@pytest.mark.parametrize("most", ["many", 0, 1.5])
def test_a_row_whose_limit_is_no_number_of_tokens_is_an_error_of_that_row(tmp_path, most):
    (example,) = Summarization(data=write(tmp_path, max_new_tokens=most)).examples()
    assert example.error == f"`max_new_tokens` is {most}; it is a whole number of tokens, 1 or more"


def test_a_conversation_in_turns_is_one_text_with_its_speakers(tmp_path):
    said = {"article": None, "highlights": None, "head": "someone is glad", "dialogue": ["Hi.", "Hello?"]}
    row = said | {"speakers": ["Ann", "Bo"], "narrative": "Two people meet."}
    (example,) = Summarization(data=write(tmp_path, **row)).examples()
    assert example.context.endswith("\n\nAnn: Hi.\nBo: Hello?") and example.answers == ["Two people meet."]
    assert "glad" not in example.prompt
    (example,) = Summarization(data=write(tmp_path, **said, summary="They meet.", speakers=2)).examples()
    assert example.context.endswith("\n\nHi.\nHello?") and example.answers == ["They meet."]


@pytest.mark.parametrize(
    "knobs", [{"setup": "x"}, {"beams": 0}, {"limit": 0}, {"max_new_tokens": -5}, {"shuffle": "x"}]
)
def test_a_setting_that_cannot_work_is_refused(knobs):
    with pytest.raises(UserError, match=f"task.{next(iter(knobs))}="):
        Summarization(**knobs)


def test_every_finding_of_a_bundled_summary_stands_in_its_report():
    for example in Summarization().examples():
        findings = [part.strip() for part in example.answers[0].split(".") if part.strip()]
        assert len(findings) == 3 and all(finding in example.context for finding in findings)


@pytest.mark.shared
def test_the_published_articles_are_read(shared_data):
    folder = shared_data / "summarization"
    assert len(Summarization("keyformer", str(folder / "cnn_dailymail.jsonl")).examples()) == 80
    assert len(Summarization("h2o", str(folder / "xsum_0shot.jsonl")).examples()) == 200
