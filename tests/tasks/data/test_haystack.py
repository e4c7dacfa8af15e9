"""Placing a sentence at a depth counted in tokens."""

import pytest

from methods.core.errors import UserError
from tasks.data.haystack import Haystack, even_depths, hide, read_haystack, sigmoid_depths
from tasks.tokens import Tokens


class Letters:
    """One token per character; characters beyond 999 are special and decode to nothing."""

    @staticmethod
    def tokens(longest: int | None = None) -> Tokens:
        return Tokens(lambda text: [ord(c) for c in text], lambda ids: "".join(chr(i) for i in ids if i < 999), longest)


TEXT = "aa. bbb. cccc. dddddd. e"  # full stops are tokens 2, 7, 13, 21


def hidden(depth: float, length: int = 33, buffer: int = 4, text: str = TEXT) -> str:
    tokens = Letters.tokens()
    return hide(tokens, tokens.encode(text), length, [("XX.", depth)], buffer).text


@pytest.mark.parametrize(
    ("depth", "text"),
    [
        (0, "\nXX.\naa. bbb. cccc. dddddd. e"),
        # int(24 x 0.40) = 9; back to behind the stop at 7
        (40, "aa. bbb.\nXX.\n cccc. dddddd. e"),
        # int(24 x 0.58) = 13: token 12 is no stop, back to behind the one at 7; 0.6 gives 14, right behind a stop
        (58, "aa. bbb.\nXX.\n cccc. dddddd. e"),
        (60, "aa. bbb. cccc.\nXX.\n dddddd. e"),
        (10, "\nXX.\naa. bbb. cccc. dddddd. e"),
        (100, "aa. bbb. cccc. dddddd. e\nXX.\n"),
    ],
)
def test_a_needle_stands_behind_the_last_full_stop_before_its_depth(depth, text):
    assert hidden(depth) == text


def test_the_text_is_shortened_so_that_needle_and_buffer_fit():
    made = hidden(100, length=20, buffer=4)
    assert made == "aa. bbb. cc\nXX.\n" and len(made) == 16
    assert hidden(100, length=200) == TEXT + "\nXX.\n"


def test_moves_back_are_reported():
    tokens = Letters.tokens()
    assert hide(tokens, tokens.encode(TEXT), 33, [("XX.", 87)], 4).moved == 6  # from 20 to 14
    assert hide(tokens, tokens.encode(TEXT), 33, [("XX.", 100)], 4).moved == 0


def test_several_needles_keep_their_own_depths():
    tokens = Letters.tokens()
    made = hide(tokens, tokens.encode(TEXT), 60, [("Y.", 60), ("X.", 40), ("Z.", 100), ("W.", 40)], 4).text
    assert made == "aa. bbb.\nX.\n\nW.\n cccc.\nY.\n dddddd. e\nZ.\n"


def test_a_text_without_full_stops_is_refused():
    with pytest.raises(UserError, match="no full stop"):
        hidden(50, text="abc def ghi")
    assert hidden(0, text="abc def").startswith("\nXX.")


def test_a_length_without_room_is_refused():
    with pytest.raises(UserError, match=r"task\.lengths=9 tokens have no room"):
        hidden(50, length=9)


def test_any_token_that_ends_with_a_full_stop_ends_a_sentence_and_a_special_one_does_not():
    pieces = ["one", " two", ".\n", " three", " ...", "<s>", " four"]
    tokens = Tokens(lambda text: [0, 1, 2, 3, 4, 5, 6] if text.startswith("one") else [7],
                    lambda ids: "".join({5: "", 7: "|"}.get(i) if i in (5, 7) else pieces[i] for i in ids))  # fmt: skip
    # position int(7 x 0.9) = 6: token 5 is special, token 4 is dots
    assert hide(tokens, list(range(7)), 20, [("N", 90)], 0).text == "one two.\n three ...| four"


def test_the_original_depths_are_whole_and_the_sigmoid_ones_lie_near_the_ends():
    assert even_depths(11) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert len(even_depths(35)) == 35 and even_depths(35)[:3] == [0, 3, 6]
    assert sigmoid_depths(11) == sorted([0, 98.201, 95.257, 88.08, 73.106, 50, 26.894, 11.92, 4.743, 1.799, 100])


def test_a_short_text_is_repeated_and_a_long_one_is_not_read_whole():
    tokens = Letters.tokens()
    assert "".join(map(chr, Haystack("ab.", "x").ids(tokens, 9))) == "ab.\nab.\na"
    assert list(Haystack(TEXT, "x").ids(tokens, 5)) == tokens.encode("aa. b")


def test_a_folder_of_texts_is_read_in_sorted_order(tmp_path):
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("c.md", "three"), ("d.json", "no")):
        (tmp_path / name).write_text(text)
    assert read_haystack(str(tmp_path)).text == "one\ntwo\nthree"
    assert read_haystack(str(tmp_path / "b.txt")).text == "two"


def test_a_path_without_text_says_what_would_work(tmp_path):
    with pytest.raises(UserError, match=r"task\.data=.*: no text; give"):
        read_haystack(str(tmp_path))
    with pytest.raises(UserError, match=r"task\.data=no/where: cannot be read as text"):
        read_haystack("no/where")


def test_the_hub_offline_says_what_works_instead(monkeypatch):
    with pytest.raises(UserError, match=r"task\.data=hub: .* cannot be fetched .*\(HF_HUB_OFFLINE is set\).*; offline"):
        read_haystack("hub")
