import random
import re
import string
from importlib.util import find_spec
from pathlib import Path

import pytest

from tasks.scoring import metrics
from tasks.scoring.metrics import (
    best_score,
    classification,
    count,
    edit_sim,
    f1,
    f1_zh,
    first_line,
    retrieval,
    rouge_l,
    rouge_l_zh,
)

near = pytest.approx


def test_f1_of_a_case_worked_by_hand():
    # cat sat on mat | cat on mat: 3 shared, precision 3/4, recall 3/3
    assert f1("The cat sat on a mat.", "cat on the mat") == near(6 / 7)


def test_f1_counts_a_repeated_word_as_often_as_both_have_it():
    # 1 shared, precision 1/3, recall 1/2
    assert f1("yes yes yes", "yes no") == near(0.4)


def test_f1_deletes_punctuation_before_articles():
    # the other order would turn a-b into b
    assert f1("a-b", "ab") == 1.0
    assert f1("a-b", "b") == 0.0


def test_f1_of_nothing_is_nothing():
    assert f1("", "cat") == f1("...", "cat") == f1("the", "a") == f1("", "") == 0.0


def test_f1_lowers_accents_and_keeps_full_width_punctuation():
    assert f1("CAFÉ", "café") == 1.0
    assert f1("北京。", "北京") == 0.0


def test_f1_zh_works_on_words_and_not_on_characters():
    # 在 北京大学 | 北京大学: precision 1/2, recall 1; on characters it would be 8/9
    assert f1_zh("在北京大学", "北京大学") == near(2 / 3)


def test_f1_zh_drops_punctuation_of_both_widths_white_space_and_case():
    assert f1_zh("《北京 大学》。 KV!", "北京大学kv") < 1.0  # 《 is not on the benchmark's list
    assert f1_zh("「北京大学」。 KV!", "北京大学kv") == 1.0
    assert f1_zh("。！", "北京") == f1_zh("", "北京") == 0.0


def test_full_width_marks_are_the_benchmarks():
    spec = find_spec("lm_eval")
    source = (Path(spec.origin).parent / "tasks" / "longbench" / "metrics.py").read_text(encoding="utf-8")
    theirs = re.search(r'cn_punctuation = "(.*?)"\n', source)[1]
    assert set(map(chr, metrics._ZH_PUNCTUATION)) == set(theirs) | set(string.punctuation)


def test_rouge_l_of_a_case_worked_by_hand():
    # the, cat of 3 and of 4 words: 2 (2/3)(1/2) / (7/6)
    assert rouge_l("the cat sat", "the cat ran fast") == near(4 / 7)


def test_rouge_l_is_exactly_the_packages_with_its_small_constant():
    assert rouge_l("a", "a") == 2 / (2 + 1e-8)


def test_rouge_l_finds_sentences_in_any_order():
    assert rouge_l("a b. c d", "c d. a b") == near(1)
    assert rouge_l("a b c d", "c d a b") == near(0.5)


def test_rouge_l_counts_distinct_words():
    # precision 1/1, recall 1/2
    assert rouge_l("a a a", "a b") == near(2 / 3)


def test_rouge_l_breaks_ties_towards_the_end_of_the_reference():
    # y x | x y: either word alone is longest; moving in the prediction finds y, which the second sentence finds too
    assert rouge_l("y x.y", "x y") == near(0.5)


def test_rouge_l_splits_at_every_dot():
    # 3, 14 | 14: precision 1/2, recall 1
    assert rouge_l("3.14", "14") == near(2 / 3)


def test_rouge_l_counts_a_piece_of_blanks_as_one_empty_word():
    # a, "" | a: precision 1/2, recall 1
    assert rouge_l("a. ", "a") == near(2 / 3)


def test_rouge_l_minds_case_and_punctuation():
    assert rouge_l("Cat", "cat") == rouge_l("cat,", "cat") == 0.0


def test_rouge_l_of_nothing_or_only_dots_is_nothing():
    assert rouge_l("", "a") == rouge_l("...", "a") == rouge_l("a", "") == rouge_l(". .", "a") == 0.0


def plain_common(words: list[str], other: list[str]) -> set[str]:
    """The textbook table, followed by the trace that the package makes."""
    table = [[0] * (len(words) + 1) for _ in range(len(other) + 1)]
    for i, a in enumerate(other, 1):
        for j, b in enumerate(words, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    found, i, j = set(), len(other), len(words)
    while i and j:
        if other[i - 1] == words[j - 1]:
            i, j = i - 1, j - 1
            found.add(other[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def test_bit_rows_give_the_words_of_the_textbook_table():
    rng = random.Random(0)
    for _ in range(300):
        letters = "abcdefgh"[: rng.randint(1, 8)]
        words, other = (rng.choices(letters, k=rng.randint(1, 80)) for _ in range(2))
        assert metrics._SubsequenceMatcher(words).common(other) == plain_common(words, other)


def test_rouge_l_of_two_long_texts_without_a_dot_needs_no_deep_recursion():
    words = [f"w{i % 700}" for i in range(5000)]
    assert rouge_l(" ".join(words), " ".join(words)) == near(1)


def test_rouge_l_zh_joins_words_with_blanks():
    # 我 爱 北京 | 我 爱 上海
    assert rouge_l_zh("我爱北京", "我爱上海") == near(2 / 3)
    assert rouge_l_zh("", "上海") == 0.0


def test_classification_shares_the_point_among_the_classes_named():
    classes = ["Animal", "Date", "State"]
    assert classification("Date", "Date", classes) == 1.0
    assert classification("Date or Animal", "Date", classes) == 0.5
    assert classification("State", "Date", classes) == classification("", "Date", classes) == 0.0


def test_classification_forgives_a_class_inside_the_reference():
    assert classification("Other entity", "Other entity", ["entity", "Other entity"]) == 1.0


def test_classification_passes_over_the_class_after_a_dropped_one():
    # Mov is dropped, so the walk misses Movie, which stays and halves the point
    assert classification("Movie star", "Movie star", ["Mov", "Movie", "Movie star"]) == 0.5


def test_count_is_the_share_of_numbers_that_are_right():
    assert count("12 or 13, no: 12", "12") == near(2 / 3)
    assert count("twelve", "12") == count("", "12") == count("012", "12") == 0.0


def test_retrieval_looks_for_the_number_after_the_word_paragraph():
    assert retrieval("Paragraph 12", "Paragraph 12") == 1.0
    assert retrieval("12, not 3", "Paragraph 12") == 0.5
    assert retrieval("Paragraph 1", "Paragraph 12") == retrieval("", "Paragraph 12") == 0.0
    assert retrieval("段落26", "段落26") == 1.0
    with pytest.raises(ValueError, match="no paragraph"):
        retrieval("12", "12")


def test_edit_sim_of_a_case_worked_by_hand():
    # 4 of 5 characters match: 2 * 4 / 10
    assert edit_sim("x = 1", "x = 2") == 0.8
    # 2 of 3: 0.667, in hundredths
    assert edit_sim("abc", "abd") == 0.67


def test_edit_sim_takes_the_first_line_without_a_fence_or_comment():
    assert edit_sim("\n\n```python\n# one\nx = 1 // 2\nx = 1\ny = 2", "x = 1") == 1.0
    assert edit_sim("`x`\n# y\nz // w", "x") == 0.0


def test_edit_sim_keeps_a_line_of_blanks_and_leading_blanks():
    # 2 blanks | 2 of the 5 characters: 2 * 2 / 7
    assert edit_sim("  \nx = 1", "x = 1") == 0.57
    assert edit_sim("    x", "x") == 0.33


def test_edit_sim_passes_the_prediction_first():
    # difflib's own documented example of a ratio that depends on the order
    assert (edit_sim("tide", "diet"), edit_sim("diet", "tide")) == (0.25, 0.5)


def test_edit_sim_of_empty_strings():
    assert edit_sim("", "x") == edit_sim("x", "") == 0.0
    assert edit_sim("", "") == 1.0


def test_first_line_strips_newlines_and_nothing_else():
    assert first_line("\n\n a\nb") == " a"
    assert first_line(" \na") == " "
    assert first_line("") == first_line("\n") == ""


def test_the_best_reference_counts():
    assert best_score("f1", "cat", ["dog", "cat", "bird"]) == 1.0
    assert best_score("f1", "cat", []) == 0.0
    assert best_score("class", "Date", ["Date"], ["Date", "State"]) == 1.0
