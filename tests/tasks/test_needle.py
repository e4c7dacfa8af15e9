"""The needle task: its grid, its kinds, its table; InfiniteBench's variants."""

import json
import random
import re
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from methods.core.errors import UserError
from tasks import infinite
from tasks.base import Example
from tasks.documents import split_of
from tasks.needle import KINDS, NEEDLE, PHRASES, Needle
from tasks.ruler.templates import noise
from tasks.tokens import Tokens

ROOT = Path(__file__).parents[2]
# one token per character
TOKENS = Tokens(lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)), longest=20_000)
ESSAY = " ".join(f"Sentence {i} tells of a river, a road and a mill." for i in range(100))


@pytest.fixture
def essay(tmp_path) -> Path:
    (tmp_path / "essay.txt").write_text(ESSAY)
    return tmp_path


def made(folder: Path, **knobs) -> Needle:
    task = Needle(str(folder), **{"lengths": [3000], "depths": [0, 50, 100]} | knobs)
    task.fit(lambda: TOKENS)
    return task


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_its_length_and_its_answer_stands_at_its_depth(essay, kind):
    examples = made(essay, kinds=[kind]).examples()
    assert [e.tags["depth"] for e in examples] == [0, 50, 100]
    for example in examples:
        assert TOKENS.count(example.prompt) + example.max_new_tokens <= 3000
        assert made(essay).score(example, " ".join(example.answers)) == 1.0
        place = example.context.lower().find(example.answers[0]) / len(example.context)
        if kind == "no_needle":
            assert place < 0
        elif kind in ("multi_value", "multi_query"):  # the first needle is at the depth, the others behind it
            places = [example.context.find(answer) for answer in example.answers]
            assert places == sorted(places) and abs(place - example.tags["depth"] / 100) < 0.17
        else:
            assert abs(place - example.tags["depth"] / 100) < 0.17, (place, example.tags["depth"])


def test_several_keys_ask_for_one_and_several_queries_for_all(essay):
    one, several = (made(essay, kinds=[kind], needles=3).examples()[1] for kind in ("multi_key", "multi_query"))
    sentences = re.findall(r"magic numbers for (\S+) is: (\d{7})\.", one.context)
    assert len(dict(sentences)) == 3 and len(one.answers) == 1
    key = re.search(r"number for (\S+) mentioned", one.question)[1]
    assert dict(sentences)[key] == one.answers[0] and one.prefill.endswith("provided text is")
    assert len(several.answers) == 3 and several.prefill.endswith("provided text are")
    value = made(essay, kinds=["multi_value"]).examples()[0]
    assert len(set(re.findall(r"magic numbers for (\S+) is", value.context))) == 1 and len(value.answers) == 4


def test_lengths_are_shares_of_the_window_by_default(essay):
    task = made(essay, lengths=None)
    assert sorted({e.tags["length"] for e in task.examples()}) == [2500, 5000, 10_000, 15_000, 20_000]
    assert len(made(essay, lengths=[0.5], depths=None).examples()) == 11


def test_a_place_that_is_given_twice_is_taken_once(essay):
    task = made(essay, lengths=[0.5, 10_000, 3000, 3000], depths=[0, 0.0, 50])
    ids = [example.id for example in task.examples()]
    assert ids == [f"single/{length}/{depth}/0" for length in (10_000, 3000) for depth in (0, 50)]


def test_the_original_grid_and_the_sigmoid_depths(essay):
    task = Needle(str(essay), lengths="original", depths="original")
    assert task._asked_lengths[:3] == [1000, 1441, 1882] and task._asked_lengths[-1] == 16000
    assert "35 lengths x 35 depths, 1225 samples" in task.source()
    assert Needle(str(essay), depths="sigmoid")._depths[1] == 1.799


def test_a_length_that_would_be_cut_is_refused(essay):
    with pytest.raises(UserError, match=r"task\.lengths=30000 tokens; this model takes 20000 .* uncut"):
        made(essay, lengths=[30_000]).examples()
    task = Needle(str(essay), lengths=[0.5])
    task.fit(lambda: Tokens(TOKENS.encode, TOKENS.decode))
    with pytest.raises(UserError, match=r"task\.lengths=0\.5 is a share of a window"):
        task.examples()
    with pytest.raises(UserError, match=r"task\.lengths=60 tokens are too few"):
        made(essay, lengths=[60], kinds=["kv"]).examples()


def test_repeats_differ_in_their_text_and_everything_repeats_with_its_seed(essay):
    first, second = made(essay, depths=[50], repeats=2).examples()
    assert first.context != second.context and NEEDLE in first.context and NEEDLE in second.context
    task = made(essay, kinds=["multi_key", "kv"])
    assert task.examples() == made(essay, kinds=["multi_key", "kv"]).examples()
    assert task.fingerprint != made(essay, kinds=["multi_key", "kv"], data_seed=7).fingerprint


def test_an_answer_is_scored_by_its_first_line(essay):
    task = made(essay)
    example = task.examples()[0]
    assert example.answers == PHRASES
    assert task.score(example, "\nEat a sandwich\nin Dolores Park on a sunny day") == pytest.approx(1 / 3)
    rouge = made(essay, metric_name="rouge1")
    assert rouge.score(rouge.examples()[0], NEEDLE) == pytest.approx(1.0)


def test_a_passkey_line_stands_between_lines_of_noise():
    item = infinite.passkey(random.Random(1), 5, 2)
    line = f"The pass key is {item.answer}. Remember it. {item.answer} is the pass key.\n"
    assert item.context == f"{noise()}\n" * 2 + line + f"{noise()}\n" * 3
    assert re.fullmatch(r"\d{5}", item.answer)
    assert any(infinite.passkey(random.Random(i), 1, 0).answer[0] == "0" for i in range(60))


def test_a_number_string_has_ten_digits_in_runs():
    for seed in range(30):
        answer = infinite.number_string(random.Random(seed), 2, 1).answer
        assert len(answer) == 10 and len(re.findall(r"(.)\1*", answer)) <= 5


def test_the_asked_pair_of_a_json_object_is_the_one_at_its_place():
    item = infinite.kv(random.Random(1), 40, 7)
    head, text = item.context.split("\n")
    pairs = json.loads(text)
    assert head == "JSON data:" and len(pairs) == 40
    key = re.search(r'^\nKey: "(.*)"\n', item.question)[1]
    assert pairs[key] == item.answer and list(pairs).index(key) == 7
    assert item.question.endswith(": ")


def test_prompts_for_open_models_end_with_their_cues():
    fills = {kind: "".join(infinite.template(kind).fill("CONTEXT", "INPUT")) for kind in infinite.VARIANTS}
    assert fills["passkey"].endswith("\n\nCONTEXT\n\nINPUT\n\nThe pass key is")
    assert "memorize it. I will quiz you about the important information.\n" in fills["passkey"]
    assert fills["number_string"].endswith("\n\nINPUT\n\nThe sequence of digits is")
    assert fills["kv"].endswith("\n\nINPUT")
    assert [v.max_new_tokens for v in infinite.VARIANTS.values()] == [6, 12, 50]


def test_published_files_are_read_by_name(tmp_path):
    rows = [
        {"id": i, "context": "a 12345 b" * 9, "input": "What?", "answer": ["12345"], "options": []} for i in range(3)
    ]
    (tmp_path / "passkey.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Needle(str(tmp_path))
    assert task.name == "needle" and len(task.examples()) == 3
    example = task.examples()[1]
    assert example.prompt.endswith("a 12345 b\n\nWhat?\n\nThe pass key is") and example.max_new_tokens == 6
    assert task.score(example, " 12345.") == 1.0 and task.score(example, "12,345") == 0.0


def test_rows_of_ones_own_need_every_field(tmp_path):
    row = {"kind": "k", "length": 9, "depth": 0, "context": "c", "question": "q", "answers": ["a"], "metric": "all"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"own\.jsonl, row 1: `max_new_tokens` is empty or missing; needle needs k"):
        Needle(str(tmp_path)).source()
    (tmp_path / "own.jsonl").write_text(json.dumps(row | {"max_new_tokens": 4, "metric": "best"}) + "\n")
    with pytest.raises(UserError, match="metric best; there are all, part"):
        Needle(str(tmp_path)).source()
    (tmp_path / "own.jsonl").write_text(json.dumps(row | {"max_new_tokens": 4}) + "\n")
    assert Needle(str(tmp_path)).name == "needle-custom"


def test_the_bundled_split_is_needle_mini_and_needs_no_tokenizer():
    task = Needle()
    task.fit(lambda: pytest.fail("nobody has to count"))
    assert task.source().startswith("needle-mini (bundled), 5 kinds, 120 samples, sha256 ")
    assert all(task.score(e, " ".join(e.answers)) == 1.0 for e in task.examples())
    assert {(e.tags["length"], e.tags["depth"]) for e in task.examples() if e.tags["subset"] == "single"} == {
        (length, depth) for length in (512, 1024, 2048, 3400) for depth in (0, 25, 50, 75, 100)
    }
    assert {e.tags["depth"] for e in Needle(depths=[25]).examples()} == {25}
    # few samples still differ in their depth
    assert len({e.tags["depth"] for e in Needle(kinds="single", limit=4).examples()}) > 1


def test_bundled_names_and_values_are_held_out_and_stand_at_their_depth():
    for example in Needle().examples():
        kind, depth = example.tags["subset"], example.tags["depth"] / 100
        stated = {"kv": f": {example.answers[0]}.", "multi_value": example.answers[0]}.get(
            kind, f"is {example.answers[0]}."
        )
        place = example.context.find(stated) / len(example.context)
        assert place > 0 and abs(place - depth) < 0.13, (example.id, place)
        if kind == "multi_value":
            continue
        assert all(split_of(answer) == "held_out" for answer in example.answers)
        name = re.search(r"code for (\w+) is$|under (\w+)\?", example.question)
        assert split_of(name[1] or name[2]) == "held_out"


def example(kind: str, length: int, depth: int, i: int = 0) -> Example:
    tags = {"subset": kind, "category": kind, "length": length, "depth": depth, "control": kind == "no_needle"}
    return Example(f"{kind}/{length}/{depth}/{i}", "c", "q", ["a"], 1, tags)


def test_rows_of_lengths_and_depths_are_means_over_kinds_and_leave_the_control_out():
    scored = [
        (example("single", 100, 0), 1.0),
        (example("single", 100, 0, 1), 1.0),
        (example("single", 100, 50), 0.0),
        (example("kv", 100, 0), 0.0),
        (example("kv", 200, 50), 1.0),
        (example("no_needle", 100, 0), 1.0),
    ]
    got = {row.name: (row.n, row.score) for row in Needle().summarize(scored)}
    assert got == {
        "single": (3, pytest.approx(200 / 3)),
        "kv": (2, 50.0),
        "no_needle": (1, 100.0),
        "length 100": (4, pytest.approx(100 / 3)),  # single 66.67, kv 0
        "length 200": (1, 100.0),
        "depth 0 %": (3, 50.0),
        "depth 50 %": (2, 50.0),
        "average": (5, pytest.approx(175 / 3)),  # of 66.67 and 50, and 58.34 had they been rounded first
    }


def test_the_remark_names_the_worst_cell_and_where_the_full_cache_fails():
    def record(score: float) -> dict[str, float]:
        return {"score": score}

    rows = [
        (example("single", 100, 0), record(1.0), record(1.0)),
        (example("single", 100, 50), record(0.25), record(1.0)),
        (example("single", 200, 0), record(0.5), record(0.3)),
        (example("no_needle", 100, 0), record(0.0), record(0.0)),
    ]
    assert Needle().remarks(rows) == [
        "3 cells: 2 keep 99% of the full cache's score; worst 25.0 (single, 100 tokens, depth 50 %); "
        "the full cache itself fails in 1"
    ]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"kinds": ["double"]}, r"task\.kinds=double is not there; there are single, no_needle"),
        ({"depths": [101]}, r"task\.depths=\[101\]; give per cent"),
        ({"lengths": "long"}, r"task\.lengths=long; give tokens"),
        ({"repeats": 0}, r"task\.repeats=0; give a whole number"),
        ({"needles": 1}, r"task\.needles=1; several"),
        ({"metric_name": "f1"}, r"task\.metric_name=f1; give one of contains, rouge1, rouge_pkg"),
        ({"kinds": []}, r"task\.kinds=\[\] chooses nothing"),
    ],
)
def test_wrong_values_are_named_as_typed(essay, knobs, message):
    with pytest.raises(UserError, match=message):
        made(essay, **knobs).examples()


def test_the_yaml_builds_the_task_with_its_defaults():
    assert instantiate(OmegaConf.load(ROOT / "conf/task/needle.yaml")) == Needle()
