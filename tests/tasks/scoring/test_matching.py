"""Scores by matching strings, worked by hand."""

import pytest

from tasks.scoring.matching import (
    chosen_letter,
    contains,
    first_number,
    is_a_word,
    printable,
    rouge_1,
    rouge_1_of_sets,
    string_match_all,
    string_match_part,
)


def test_control_characters_become_newlines_and_the_ends_are_stripped():
    assert printable(" \x00a\tb\x1fc\n ") == "a\nb\nc"
    assert printable("\x07") == ""


def test_all_is_a_share_and_part_is_any_without_case():
    references = ["1234567", "ABCDE", "7654321", "zzz"]
    assert string_match_all("it is 1234567 and abcde.", references) == 0.5
    assert string_match_part("it is 1234567 and abcde.", references) == 1.0
    assert string_match_all("", references) == string_match_part("none of them", references) == 0.0


def test_a_reference_inside_a_longer_string_counts_as_the_benchmark_has_it():
    assert string_match_all("0123456789", ["1234567"]) == 1.0


def test_a_match_does_not_span_a_control_character():
    assert string_match_all("12\x0034", ["1234"]) == 0.0


def test_phrases_are_found_across_white_space_and_case():
    phrases = ["eat a sandwich", "dolores park", "sunny day"]
    assert contains("Eat a\n  SANDWICH in Dolores Park", phrases) == pytest.approx(2 / 3)
    assert contains("", phrases) == 0.0


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("71432", 1), ("The key is 71432.", 1), ("71,432", 0), ("071432", 0), ("714320", 0), ("none", 0), ("", 0)],
)
def test_the_first_run_of_digits_must_be_the_answer(prediction, score):
    assert first_number(prediction, ["71432"]) == score


def test_leading_zeros_belong_to_a_passkey():
    assert first_number("00123", ["00123"]) == 1 and first_number("123", ["00123"]) == 0


@pytest.mark.parametrize(
    ("prediction", "score"),
    [('"a-b-c".', 1), ("{key:a-b-c}", 1), ("a-b-c!", 1), ("a-b", 0), ("xa-b-c", 0), ("(a-b-c)", 0), ("", 0)],
)
def test_a_value_is_a_word_between_certain_marks(prediction, score):
    assert is_a_word(prediction, ["a-b-c"]) == score


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        (" \nC", "C"),
        ("B. because A is wrong", "B"),
        ("Answer: B", "A"),
        ("Is it a mat? The answer is: d.", "D"),
        ("it is a mat, so the best option is\n'C', not B", "C"),
        ("Is it a mat? My answer is no, the option is B", "B"),
        ("I think B or C", "B"),
        ("I would take a guess, B", "A"),
        ("(B)", None),
        ("nobody knows", None),
        ("", None),
    ],
)
def test_a_letter_is_the_first_of_the_answer_or_behind_a_cue_or_a_word(prediction, letter):
    assert chosen_letter(prediction) == letter


def test_rouge_falls_with_every_extra_word():
    # stems: 3 of 3 words found; of 6 predicted: F = 2 * 0.5 * 1 / 1.5
    assert rouge_1("sunny days park", ["a sunny day parks"[2:]]) == 1.0
    assert rouge_1("sunny day park one two three", ["sunny day park"]) == pytest.approx(2 / 3)
    assert rouge_1("", ["sunny day"]) == 0.0


def test_rouge_of_sets_counts_distinct_words_and_drops_full_stops():
    # {the, cat} of {the, cat, sat}: precision 1, recall 2/3
    assert rouge_1_of_sets("the the cat.", ["the cat. sat"]) == pytest.approx(0.8)
    assert rouge_1_of_sets("day,", ["day"]) == 0.0
