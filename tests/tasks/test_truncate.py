import re
from collections.abc import Sequence

import pytest

from tasks.truncate import cut_middle, truncate_middle


class Words:
    """A tokenizer of words with the blank before them; <s> comes first and is skipped in decoding."""

    def __init__(self):
        self.vocabulary = ["<s>"]

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r"\s*\S+|\s+$", text)
        self.vocabulary += [piece for piece in dict.fromkeys(pieces) if piece not in self.vocabulary]
        return [0] + [self.vocabulary.index(piece) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.vocabulary[id] for id in ids if id)


class Tidy(Words):
    """Decodes without the blank before a question mark, as some tokenizers do."""

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids).replace(" ?", "?")


def cut(context: str, question: str, max_length: int, words: Words | None = None) -> tuple[str, bool]:
    words = words or Words()
    return truncate_middle(context, question, max_length, words.encode, words.decode)


LETTERS = "a b c d e f g h i j"


def test_a_prompt_that_fits_is_left_alone():
    # <s>, ten letters, two words
    assert cut(LETTERS, " who ?", 13) == (LETTERS, False)


def test_the_first_and_the_last_half_stay():
    # 4 of <s> a b c, and 4 of i j who ?
    assert cut(LETTERS, " who ?", 8) == ("a b c i j", True)


def test_half_of_an_odd_length_is_rounded_down():
    assert cut(LETTERS, " who ?", 9) == cut(LETTERS, " who ?", 8)


def test_the_cut_prompt_is_longbenchs_own():
    words = Words()
    ids = words.encode(LETTERS + " who ?")
    for max_length in range(4, 13):
        half = int(max_length / 2)
        theirs = words.decode(ids[:half]) + words.decode(ids[-half:])
        context, was_cut = cut(LETTERS, " who ?", max_length, words)
        assert (context + " who ?", was_cut) == (theirs, True)


def test_a_question_longer_than_half_stays_whole_and_the_context_gives_way():
    # room for 8: the question takes <s> and 5, so 2 of the context remain: <s> a
    assert cut(LETTERS, " v w x y z", 8) == ("a", True)


def test_a_question_that_does_not_decode_to_itself_stays_whole():
    # 5 for <s> a b c d; of the other 5 the question takes <s>, who, ?
    assert cut(LETTERS, " who ?", 10, Tidy()) == ("a b c d i j", True)


@pytest.mark.parametrize("kind", [Words, Tidy])
@pytest.mark.parametrize("question", [" who ?", " k l m n o p q r s t u ?"])
def test_a_question_that_may_be_cut_gives_longbenchs_own_prompt_at_every_length(kind, question):
    words = kind()
    ids = words.encode(LETTERS + question)
    for max_length in range(2, len(ids)):
        half = int(max_length / 2)
        theirs = words.decode(ids[:half]) + words.decode(ids[-half:])
        context, rest, was_cut = cut_middle(LETTERS, question, max_length, words.encode, words.decode)
        assert (context + rest, was_cut) == (theirs, True)
        # what is left of the context is letters of it, and what is left of the question its end
        assert set(context.split()) <= set(LETTERS.split()) and question.replace(" ?", "?").endswith(
            rest.replace(" ?", "?")
        )
    assert cut_middle(LETTERS, question, len(ids), words.encode, words.decode) == (LETTERS, question, False)
    with pytest.raises(ValueError, match="max_length=1"):
        cut_middle(LETTERS, question, 1, words.encode, words.decode)


def test_a_length_without_room_for_the_context_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="max_length=6 tokens; the question alone takes 6"):
        cut(LETTERS, " v w x y z", 6)
    with pytest.raises(ValueError, match="max_length=0"):
        cut(LETTERS, " who ?", 0)


def test_a_real_tokenizer_cuts_and_keeps_the_question(tiny_tokenizer):
    def decode(ids: Sequence[int]) -> str:
        return tiny_tokenizer.decode(ids, skip_special_tokens=True)

    context, question = "the cat sat on a mat. 北京 é " * 200, "\nQuestion: where was 北京?\nAnswer:"
    shorter, was_cut = truncate_middle(context, question, 200, tiny_tokenizer.encode, decode)
    assert was_cut
    assert shorter.startswith("the cat sat")
    assert abs(len(tiny_tokenizer.encode(shorter + question)) - 200) <= 8  # a character may be cut in two
