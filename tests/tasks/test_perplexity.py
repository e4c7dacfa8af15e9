"""What is cut, what counts, and how losses are averaged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from methods.core.errors import UserError
from runners.report.compare import compare_scores
from tasks.base import as_parts
from tasks.perplexity import Perplexity, mean_loss, one_pass
from tasks.tokens import Tokens


def words(longest: int | None = None, opening: int = 1) -> Tokens:
    """One token per word."""
    return Tokens(lambda text: [0] * len(text.split()), lambda ids: "", longest, opening=opening)


def made(tmp_path: Path, *lengths: int, **knobs: Any) -> Perplexity:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "w " * n}) + "\n" for n in lengths))
    task = Perplexity(str(tmp_path), **knobs)
    task.fit(words)
    return task


def counted(task: Perplexity) -> list[list[int]]:
    return [list(example.forced.counted) for example in task.examples() if example.forced]


def test_windows_drop_the_rest_and_never_predict_their_first_token():
    pieces = one_pass("windows", 23, 10, 0)
    assert [(piece.start, piece.length, list(piece.counted)) for piece in pieces] == [
        (0, 10, list(range(1, 10))),
        (10, 10, list(range(1, 10))),
    ]


def test_strided_windows_count_what_the_one_before_has_not_seen_and_stop_at_the_end():
    pieces = one_pass("strided", 10, 4, 2)
    assert [(p.start, p.length, list(p.counted)) for p in pieces] == [
        (0, 4, [1, 2, 3]), (2, 4, [2, 3]), (4, 4, [2, 3]), (6, 4, [2, 3]),
    ]  # fmt: skip
    # every token but the first one, once
    assert sorted(p.start + place for p in pieces for place in p.counted) == list(range(1, 10))
    assert [p.weight for p in pieces] == [3, 2, 2, 2]
    assert [p.weight for p in one_pass("strided", 10, 4, 2, hf_compat=True)] == [3, 1, 1, 1]


def test_strided_windows_that_do_not_overlap_leave_every_first_token_out():
    assert [list(p.counted) for p in one_pass("strided", 9, 4, 4)] == [[1, 2, 3], [1, 2, 3]]


def test_rolling_predicts_every_token_once_with_at_least_one_before_it():
    pieces = one_pass("rolling", 12, 4, 0)  # a beginning and eleven tokens
    assert sorted(p.start + place for p in pieces for place in p.counted) == list(range(1, 12))
    assert [(p.start, p.length) for p in pieces] == [(0, 5), (4, 5), (7, 5)]
    assert min(place for p in pieces for place in p.counted) == 1


def test_a_mean_is_over_tokens_and_not_over_windows():
    rows = [{"score": 1.0, "counted": 1}, {"score": 2.5, "counted": 2}]  # losses 1, and 2 and 3
    assert mean_loss(rows) == 2.0  # the mean of window means would be 1.75
    assert math.exp(mean_loss(rows)) == pytest.approx(math.e**2)


def test_the_table_weighs_pieces_by_their_tokens_too(tmp_path):
    task = made(tmp_path, 30, through="strided", length=20, stride=15)
    a, b = task.examples()
    assert (a.weight, b.weight) == (19, 11)
    (row,) = task.summarize([(a, 1.0), (b, 2.0)])
    assert row.score == pytest.approx((19 + 22) / 30, abs=1e-4)
    (one,) = compare_scores(task, [(a, 1.0, 0.5), (b, 2.0, 1.5)], 50, 0)
    assert one.difference == pytest.approx(0.5) and one.interval == pytest.approx((0.5, 0.5))


def test_pieces_of_a_text_share_no_token_and_begin_anew(tmp_path):
    examples = made(tmp_path, 25, 9, 12, length=11, prompt=8).examples()
    assert [(e.id, e.forced.start, e.forced.length) for e in examples if e.forced] == [
        ("texts/0/0", 0, 11), ("texts/0/1", 10, 11), ("texts/2/0", 0, 11),
    ]  # fmt: skip


def test_prefix_counts_from_the_prompts_end_and_takes_three_quarters_by_default(tmp_path):
    assert counted(made(tmp_path, 100, length=40)) == [list(range(30, 40))] * 2


def test_stream_counts_what_a_query_predicts_that_could_not_find_everything(tmp_path):
    assert counted(made(tmp_path, 30, length=20, through="stream", cap=8)) == [list(range(10, 20))]
    assert counted(made(tmp_path, 30, length=20, through="stream", cap=8, count="all")) == [list(range(1, 20))]
    # tokens 8 to 11 are fed at once and still find all; what they push out is missed by token 12
    assert counted(made(tmp_path, 30, length=20, through="stream", cap=8, stride=4)) == [list(range(13, 20))]


@pytest.mark.parametrize(("cap", "first"), [(3, 5), (4, 9), (7, 9), (8, 13)])
def test_chunk_counts_behind_the_first_block_that_overflows_and_never_a_blocks_first_token(tmp_path, cap, first):
    places = [place for place in range(first, 16) if place % 4]
    assert counted(made(tmp_path, 20, length=16, stride=4, through="chunk", cap=cap)) == [places]


def test_chunk_counts_every_block_if_all_is_asked_for(tmp_path):
    everything = counted(made(tmp_path, 30, length=16, stride=4, through="chunk", cap=8, count="all"))[0]
    assert everything == [place for place in range(16) if place % 4]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"through": "sideways"}, "task.through=sideways"),
        ({"through": "stream", "cap": 0.5}, "budget=0.5"),
        ({"through": "chunk"}, "give .*budget=256|such as budget=256"),
        ({"length": 0}, "task.length=0"),
        ({"limit": 0}, "task.limit=0"),
        ({"count": "some"}, "task.count=some"),
        ({"through": "chunk", "cap": 8, "stride": 1}, "task.stride=1; give .* 2 or more"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(tmp_path, knobs, says):
    with pytest.raises(UserError, match=says):
        made(tmp_path, 30, **knobs)


def test_a_text_that_is_too_short_is_named_with_its_length(tmp_path):
    with pytest.raises(UserError, match="the longest has 12"):
        made(tmp_path, 5, 12, length=100).examples()
    with pytest.raises(UserError, match="leaves nothing to predict"):
        made(tmp_path, 50, length=10, prompt=10).examples()
    with pytest.raises(UserError, match="before compression is felt"):
        made(tmp_path, 50, length=10, through="stream", cap=20).examples()
    with pytest.raises(UserError, match="before compression is felt"):
        made(tmp_path, 50, length=16, through="chunk", stride=4, cap=15).examples()
    with pytest.raises(UserError, match="before compression is felt"):  # only the first token of a block is left
        made(tmp_path, 50, length=9, through="chunk", stride=4, cap=4).examples()


def record(losses: list[list[float]], held: float = 0.5) -> dict[str, Any]:
    total, n = sum(s for _, _, s in losses), sum(m for _, m, _ in losses)
    ledger = {"held_end": int(1000 * held), "full": 1000, "mean_decode": int(1000 * held)}
    return {"score": total / n, "counted": n, "curve": losses, "ledger": ledger, "batch": 1,
            "parts": {"": total / n}, "weights": {"": n}}  # fmt: skip


def test_a_compressed_cache_that_changes_no_loss_is_refused_with_the_reason(tmp_path):
    task = made(tmp_path, 100, length=40)
    example = task.examples()[0]
    full = record([[0, 10, 20.0]], held=1.0)
    with pytest.raises(UserError, match="says nothing about the compression"):
        task.remarks([(example, record([[0, 10, 20.0]]), full)])
    assert task.remarks([(example, record([[0, 10, 20.0]], held=1.0), full)])  # a budget of everything is no mistake
    said = task.remarks([(example, record([[0, 10, 22.0]]), full)])
    assert said[0].startswith("perplexity of texts: 9.025, full 7.389, ratio 1.2214; 10 tokens")
    assert "50.0%" in said[1]


def test_places_beyond_the_models_window_have_a_line_of_their_own(tmp_path):
    task = made(tmp_path, 1000, length=800)
    curves = [[0, 10, 20.0], [512, 5, 5.0], [768, 5, 15.0]], [[0, 10, 10.0], [512, 5, 5.0], [768, 5, 25.0]]
    rows = [(task.examples()[0], record(curves[0], held=1.0), record(curves[1], held=1.0))]
    assert not any("window" in line for line in task.remarks(rows))  # a model without one
    task = made(tmp_path, 1000, length=800)
    task.fit(lambda: words(512))
    said = task.remarks([(task.examples()[0], *rows[0][1:])])
    assert said[1] == "  of these beyond the model's window, from place 512 on: 7.389, full 20.086; 10 tokens"


def test_a_stride_that_skips_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"task\.stride=50 skips tokens.*task\.length=40"):
        made(tmp_path, 100, length=40, stride=50, through="strided").examples()
    assert made(tmp_path, 100, length=40, stride=40, through="strided").examples()


def test_a_method_that_drops_nothing_while_a_text_is_fed_is_sent_to_prefix(tmp_path):
    task = made(tmp_path, 100, length=40, through="stream", cap=8)
    row = record([[0, 10, 20.0]], held=1.0)
    with pytest.raises(UserError, match=r"task\.through=prefix"):
        task.remarks([(task.examples()[0], row | {"timings": {"decode": 2.0}}, row)])
    assert task.remarks([(task.examples()[0], dict(row), row)])  # the full cache alone


def test_bins_are_rows_below_their_text(tmp_path):
    task = made(tmp_path, 100, length=40)
    example = task.examples()[0]
    row = {"score": 2.0, "parts": {"": 2.0, "0-255": 1.0}, "weights": {"": 3, "0-255": 1}}
    rows = task.summarize(as_parts(example, row))
    assert [(one.name, one.kind, one.score) for one in rows] == [
        ("texts", "subset", 2.0),
        ("texts 0-255", "bin", 1.0),
    ]


def test_the_bundled_texts_are_long_enough_for_a_piece_each_and_differ():
    task = Perplexity()
    assert task.source().startswith("perplexity-mini (bundled)") and task.metric.better == "lower"
    texts = [text for own in task._texts.values() for text in own]
    assert len(texts) == len(set(texts)) == 24 and min(map(len, texts)) >= 3000


def test_a_vocabulary_that_needs_few_tokens_gets_shorter_pieces_of_the_bundled_texts():
    task = Perplexity()
    task.fit(words)
    texts = [text for own in task._texts.values() for text in own]
    shortest = min(len(text.split()) for text in texts)
    assert {e.forced.length for e in task.examples() if e.forced} == {shortest + 1} and shortest < 1024


@pytest.mark.slow
@pytest.mark.shared
def test_wikitext_has_the_known_size_and_token_count(shared_data):
    from transformers import AutoTokenizer

    task = Perplexity(str(shared_data / "wikitext-2" / "test.txt"), length=512)
    (text,) = task._texts["test"]
    assert len(text) == 1_294_336 and "\r" not in text and len(text.split()) == 241_211
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    assert len(tokenizer(text).input_ids) == 815_070
