"""Reasoning before an answer: what is scored of it, and that nobody is scored on thoughts without a word."""

import copy
from dataclasses import replace

import pytest
from tokenizers import AddedToken

from runners.engine.new_tokens import Answer
from runners.engine.prompt import Encoder
from runners.engine.rows import answered
from runners.engine.setting import Setting
from runners.engine.thoughts import apart
from runners.report import remarks
from tasks.base import Example
from tasks.ruler.task import Ruler
from tests.runners.engine.test_prompt import CHAT

GUESS = "<think>maybe 84151? no</think> I do not know"
EXAMPLE = Example("niah/0", "many words. ", "Which number?", ["84151"], 40, {"metric": "all"})


def row(tokenizer, text: str, reasoning: str = "strip", example: Example = EXAMPLE) -> dict:
    """The recorded row of an answer."""
    encoder = Encoder(tokenizer, ends=[2], reasoning=reasoning)
    setting = Setting(None, Ruler(), lambda: encoder, "aware", None, 1)  # type: ignore[arg-type]
    return answered(setting, example, encoder(example), Answer([*encoder.plain(text), 2], "end"), {})


@pytest.mark.parametrize(
    ("text", "opened", "answer", "thoughts"),
    [
        (" 84151\n", False, " 84151\n", ""),
        (GUESS, False, "I do not know", "<think>maybe 84151? no</think>"),
        ("maybe 84151? no</think>\n\n7", False, "7", "maybe 84151? no</think>"),
        ("maybe 84151? no</think>\n\n7", True, "7", "<think>maybe 84151? no</think>"),
        ("maybe 84151? no", True, "", "<think>maybe 84151? no"),
        ("<think>\nmaybe 84151? no", False, "", "<think>\nmaybe 84151? no"),
        ("7 <think>84151</think>", False, "7", "<think>84151</think>"),
        ("<think>a</think>7<think>b</think> 8", False, "7 8", "<think>a</think><think>b</think>"),
        ("<think>a <think>84151</think> 84151</think> 7", False, "7", None),
    ],
)
def test_a_block_is_taken_out_of_what_is_scored(text, opened, answer, thoughts):
    found = apart(text, opened)
    assert found[0] == answer and (thoughts is None or found[1] == thoughts)


def test_a_guess_inside_a_block_is_scored_only_where_it_is_kept(tiny_tokenizer):
    strip, keep, off = (row(tiny_tokenizer, GUESS, how) for how in ("strip", "keep", "off"))
    assert (strip["score"], keep["score"]) == (0.0, 1.0)
    assert strip["prediction"] == "I do not know" and keep["prediction"] == GUESS
    assert strip["thoughts"] == keep["thoughts"] == "<think>maybe 84151? no</think>"
    assert "model.reasoning=off" in off["error"] and "score" not in off
    plain = [row(tiny_tokenizer, " it is 84151.", how) for how in ("strip", "keep", "off")]
    assert plain[0] == plain[1] == plain[2] and plain[0]["score"] == 1.0 and "thoughts" not in plain[0]


def test_tags_that_are_flagged_as_special_bound_a_block_too(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    assert len(tokenizer.encode("<think>", add_special_tokens=False)) == 1
    assert row(tokenizer, GUESS)["prediction"] == "I do not know"
    assert row(tokenizer, GUESS, "keep")["score"] == 1.0


def test_an_answer_that_a_prompt_begins_inside_a_block_has_to_leave_it(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT + "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert row(tokenizer, "it may be 84151, or")["prediction"] == ""
    assert row(tokenizer, "it may be 84151, or</think> 7")["prediction"] == "7"
    closed = replace(EXAMPLE, prefill="none</think>")
    assert row(tokenizer, " 84151", example=closed)["score"] == 1.0
    tokenizer.chat_template = None
    assert row(tokenizer, "it may be 84151", example=replace(EXAMPLE, question="Which? <think>\n"))["score"] == 0.0
    # a document that speaks of the tag opens nothing
    assert row(tokenizer, " 84151", example=replace(EXAMPLE, context="write <think> first. "))["score"] == 1.0


def test_the_table_says_what_became_of_reasoning(tiny_tokenizer):
    texts = (GUESS, "<think>on and on", " 84151")
    strip, keep = ([row(tiny_tokenizer, text, how) for text in texts] for how in ("strip", "keep"))
    assert remarks.reasoning(strip, "strip") == [
        "model.reasoning=strip: 2 of 3 samples hold a <think> block, which is not scored; in 1 of them it never ends"
    ]
    assert remarks.reasoning(strip[2:], "strip") == []
    (kept,) = remarks.reasoning(keep, "keep")
    assert kept == "model.reasoning=keep: 2 of 3 samples hold a <think> block, which is scored too"
