"""RULER's wording, generators, fitting and table."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from methods.core.errors import UserError
from tasks.data.haystack import Haystack
from tasks.ruler import counting, documents, niah, tracking
from tasks.ruler import task as ruler_task
from tasks.ruler.fitting import Sample, most_units, shrink
from tasks.ruler.task import TASKS, Ruler
from tasks.ruler.templates import needle, noise, wording
from tasks.ruler.vocabulary import all_words
from tasks.tokens import Tokens

ROOT = Path(__file__).parents[2]
WORD = re.compile(r"\w+|[^\w\s]")
TOKENS = Tokens(lambda text: WORD.findall(text), lambda ids: " ".join(map(str, ids)), longest=100_000)  # type: ignore[arg-type]
ESSAY = " ".join(f"Sentence {i} tells of a river, a road and a mill." for i in range(400))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Essays and both question sets, small."""
    (tmp_path / "essay.txt").write_text(ESSAY)
    paragraphs = [
        {
            "context": f"Paragraph {i} of an article about rivers that are {i} miles long.",
            "qas": [
                {
                    "question": f"How long {i}?",
                    "answers": [{"text": f"{i} miles"}, {"text": f"{i}"}],
                    "is_impossible": False,
                },
                {"question": f"Why {i}?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(30)
    ]
    articles = [{"paragraphs": paragraphs[:6]}, {"paragraphs": paragraphs[6:]}]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {"question": f"Which {i}?", "answer": f"answer {i}",
         "context": [[f"Title {i}-{j}", ["One. ", f"Two {j}."]] for j in range(10)]}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    return tmp_path


def made(folder: Path, subset: str, length: int = 1500, samples: int = 3, **knobs) -> Ruler:
    found = Ruler(str(folder), subset=[subset], lengths=[length], samples=samples, sentences="marks", **knobs)
    found.fit(lambda: TOKENS)
    return found


def test_wording_is_the_installed_one_with_two_prefixes_mended():
    assert "are assigned the value {query}, they are: " in wording("vt").prefix
    assert "assgined" not in "".join(wording(f).prefix for f in ("niah", "vt", "cwe", "fwe", "qa"))
    assert wording("qa").prefix == " Answer:"
    assert [wording(f).max_new_tokens for f in ("niah", "vt", "cwe", "fwe", "qa")] == [128, 30, 120, 50, 32]
    assert needle().count("{") == 3 and noise().count(".") == 5


def test_another_wording_of_lm_eval_is_refused(monkeypatch):
    wording.cache_clear()
    monkeypatch.setattr("tasks.ruler.templates.DIGESTS", {"vt": "00000000"})
    with pytest.raises(UserError, match="words the prompts of vt in another way"):
        wording("vt")
    wording.cache_clear()


def test_a_single_needle_asks_in_the_singular_and_several_in_the_plural():
    one = niah.fill("TEXT", "a-key", niah.Needles(1, 1, 1, "noise"))
    assert one[0].startswith("A special magic number is hidden within") and one[0].endswith("afterwards.\nTEXT\n")
    assert "quiz you about the number afterwards" in one[0]
    assert one[1] == "What is the special magic number for a-key mentioned in the provided text?"
    assert one[2] == " The special magic number for a-key mentioned in the provided text is"
    many = niah.fill("TEXT", "a, and b", niah.Needles(4, 1, 2, "essay", value="uuids"))
    assert many[0].startswith("Some special magic uuids are hidden")
    assert many[1] == "What are all the special magic uuids for a, and b mentioned in the provided text?"
    assert many[2].endswith("provided text are")


@pytest.mark.parametrize("task", niah.NIAH)
def test_needles_hold_the_answers_of_the_keys_that_are_asked(task):
    spec = niah.NIAH[task]
    essay = niah.Essay(Haystack(ESSAY, "x"), niah.by_marks)
    sample = niah.make(random.Random(task), spec, 200 if spec.haystack == "essay" else 20, essay)
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", sample.context)
    extra = 20 if spec.haystack == "needle" else 0
    assert len(found) == spec.keys * spec.values + extra
    asked = re.search(r" for (.*) mentioned", sample.question)[1].replace(", and ", ", ").split(", ")
    assert len(asked) == spec.queries
    # several values of one key stand in the shuffled order
    assert sorted(v for key in asked for k, v in found if k == key) == sorted(sample.outputs)
    assert len(sample.outputs) == spec.queries * spec.values
    # a reader who looks the value up answers everything
    assert ruler_task.matching.string_match_all(" ".join(v for k, v in found if k in asked), sample.outputs) == 1


def test_keys_and_values_have_their_shapes():
    rng = random.Random(1)
    numbers = [niah.item(rng, "numbers") for _ in range(200)]
    assert all(re.fullmatch(r"[1-9]\d{6}", number) for number in numbers)
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", niah.item(rng, "uuids"))
    assert "-" in niah.item(rng, "words")


def test_noise_has_one_needle_line_among_its_groups():
    lines = niah.make(random.Random(3), niah.NIAH["niah_single_1"], 30, None).context.split("\n")[1:-1]
    assert Counter(lines).most_common(1)[0] == (noise(), 30) and len(lines) == 31


def test_essay_depths_are_forty_whole_percentages():
    assert len(niah.DEPTHS) == 40 and niah.DEPTHS[:4] == [0, 3, 5, 8] and niah.DEPTHS[-1] == 100


def test_an_essay_that_is_too_short_is_repeated():
    essay = niah.Essay(Haystack("One is. Two are.", "x"), niah.by_marks)
    assert essay.sentences(10) == ["One is.", "Two are.", "One is.", "Two are.", "One is."]


def test_sentences_end_at_marks_before_a_capital():
    assert niah.by_marks('He said "no." Then 3.5 miles? Yes. (Maybe.) e.g. this') == [
        'He said "no." Then 3.5 miles?', "Yes.", "(Maybe.) e.g. this",
    ]  # fmt: skip


def test_a_chain_is_hidden_in_order_and_ends_without_a_blank_before_a_newline():
    sample = tracking.track(["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"], "12345", 6, [0, 1, 3, 4, 5])
    lines = sample.context.split("\n\n", 1)[1].split("\n")
    assert lines[0] == "VAR AAAAA = 12345" and lines[2] == "VAR BBBBB = VAR AAAAA "
    assert [line for line in lines if line.startswith("VAR")][-1] == "VAR EEEEE = VAR DDDDD "
    assert lines.count(noise()) == 6 and ". \n" not in sample.context
    assert sample.question == "Question: Find all variables that are assigned the value 12345 in the text above."
    assert "5 variables are assigned the value 12345, they are: " in sample.prefix


def test_the_worked_example_keeps_its_noise_and_draws_names_and_value_anew():
    example = tracking.Example("seed", TOKENS.count)
    assert TOKENS.count(example.text(random.Random(0))) + 30 <= 500
    first, second = (example.text(random.Random(i)) for i in (1, 2))
    names = [re.findall(r"VAR (\w{3}) =", text) for text in (first, second)]
    assert len(set(names[0])) == 5 and not set(names[0]) & set(names[1])
    assert first.endswith(f"they are: {' '.join(names[0])}\n\n")
    assert re.sub(r"VAR .*|they are: .*|value \d+", "", first) == re.sub(r"VAR .*|they are: .*|value \d+", "", second)


def test_a_tracking_sample_can_be_solved_by_following_its_chain():
    sample = tracking.make(random.Random(5), 40, tracking.Example("seed", TOKENS.count))
    value = re.search(r"assigned the value (\d{5}) in", sample.question)[1]
    task = sample.context.rpartition("Memorize and track")[2]
    found = re.findall(rf"VAR (\w+) = {value}", task)
    while follow := re.findall(rf"VAR (\w+) = VAR {found[-1]}\b", task):
        found += follow
    assert found == sample.outputs and all(re.fullmatch("[A-Z]{5}", name) for name in found)


@pytest.mark.parametrize(("length", "counts", "example"), [(4096, (30, 3), (10, 3)), (2048, (6, 1), (3, 1))])
def test_common_words_come_often_and_the_example_is_solved(length, counts, example):
    sample = counting.make_cwe(random.Random(2), 40, length)
    before, real = sample.context.split("\nBelow is")
    words = Counter(re.findall(r"\d+\. (\S+)", real))
    assert {words[word] for word in sample.outputs} == {counts[0]} and len(sample.outputs) == 10
    assert {n for word, n in words.items() if word not in sample.outputs} == {counts[1]}
    listed, answer = before.split(" Answer: The top 10 words that appear most often in the list are:")
    numbered = re.findall(r"\d+\. (\S+)", answer)
    solved = Counter(re.findall(r"\d+\. (\S+)", listed))
    assert len(numbered) == 10 and answer.startswith(" 1. ") and {solved[word] for word in numbered} == {example[0]}


def test_a_list_longer_than_the_vocabulary_is_refused():
    assert 8000 < len(all_words()) == len(set(all_words())) < 8300
    with pytest.raises(UserError, match="needs 9000 distinct words"):
        counting.make_cwe(random.Random(2), 9000, 131072)


def test_coded_words_fall_with_the_square_of_their_rank():
    sample = counting.make_fwe(random.Random(4), 1000, 2048)
    words = Counter(sample.context.split("appeared coded words. ", 1)[1].split())
    # 1000 r^-2 / 1.644934: 607, 151, 67, 37
    assert words["..."] == 607
    assert [words[word] for word in sample.outputs] == [151, 67, 37]
    assert all(re.fullmatch("[a-z]{6}", word) for word in sample.outputs)


def test_tied_coded_words_are_refused():
    with pytest.raises(UserError, match="tied"):
        counting.make_fwe(random.Random(4), 20, 2048)


def test_a_question_brings_its_gold_then_its_article_then_others(folder):
    squad = documents.read_squad(folder / "dev-v2.0.json")
    assert len(squad.documents) == 30 and len(squad.questions) == 30  # the impossible ones are left out
    question = squad.questions[0]
    gold = squad.documents[question.gold[0]]
    few = documents.make(random.Random(1), question, squad.documents, 4)
    shown = re.findall(r"Document \d+:\n(.*)", few.context)
    article = {squad.documents[i] for i in (*question.gold, *question.near)}
    assert len(shown) == 4 and gold in shown and set(shown) <= article
    more = re.findall(r"Document \d+:\n(.*)", documents.make(random.Random(1), question, squad.documents, 9).context)
    assert len(set(more)) == 9 and article <= set(more)
    assert few.question.startswith("Answer the question based on") and few.question.endswith("Question: How long 0?")
    assert few.outputs == ["0 miles", "0"]
    assert len(re.findall("Document", documents.make(random.Random(1), question, squad.documents, 99).context)) == 30


def test_question_sets_need_no_essays(folder):
    (folder / "essay.txt").unlink()
    ruler = made(folder, "qa")
    assert f"(made with {folder}), 2 tasks" in ruler.source() and len(ruler.examples()) == 6
    with pytest.raises(UserError, match="no text; give a text file"):
        made(folder, "niah_single_2").source()
    with pytest.raises(UserError, match="nothing at"):
        made(folder / "nowhere", "vt").source()


@pytest.mark.parametrize(
    ("file", "empty"),
    [
        ("dev-v2.0.json", {"data": []}),
        ("dev-v2.0.json", {"data": [{"paragraphs": [{"context": "a", "qas": [{"question": "?", "answers": []}]}]}]}),
        ("hotpot_dev_distractor_v1.json", []),
    ],
)
def test_a_question_set_without_an_answer_is_named(folder, file, empty):
    (folder / file).write_text(json.dumps(empty))
    with pytest.raises(UserError, match=f"{file}: holds no question with an answer"):
        made(folder, "qa").examples()


def test_hotpot_questions_keep_their_ten_documents(folder):
    hotpot = documents.read_hotpot(folder / "hotpot_dev_distractor_v1.json")
    sample = documents.make(random.Random(1), hotpot.questions[2], hotpot.documents, 3)
    assert sample.context.count("\nTitle 2-") == 10 and "Title 2-3\nOne. Two 3." in sample.context


def test_bisection_finds_the_most_units_and_falls_back_to_a_step():
    assert most_units(lambda n: 7 * n + 3, 1000, 25, 25) == 142
    assert most_units(lambda n: 7 * n + 900, 1000, 25, 25) == 25


def test_a_sample_shrinks_by_steps_and_a_hopeless_one_is_refused():
    def make(n: int) -> Sample:
        return Sample("", "", "", [], tokens=10 * n)

    assert shrink(make, 100, 777, 10, "x").tokens == 700
    with pytest.raises(UserError, match="x takes 100 tokens at least"):
        shrink(make, 100, 99, 10, "x")


@pytest.mark.parametrize("task", [*TASKS])
def test_every_task_fits_its_length_and_nearly_fills_it(folder, task):
    length = 1500 if task not in ("qa_1", "qa_2") else 600
    ruler = made(folder, task, length)
    examples = ruler.examples()
    assert len(examples) == 3 and len({e.prompt for e in examples}) == 3
    for example in examples:
        assert TOKENS.count(example.prompt) + example.max_new_tokens == example.tags["tokens"] <= length
        assert ruler.score(example, " and ".join(example.answers)) == 1.0
        assert ruler.score(example, "no idea") == 0.0
    # essays grow by 500 words and questions by ten documents; everything else comes close
    if task in ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe"):
        assert ruler.fill(task)[0] > 0.8


def test_a_question_set_wants_any_of_its_references(folder):
    example = made(folder, "qa_1", 600).examples()[0]
    assert Ruler().score(example, "0 miles") == Ruler().score(example, "0") == 1.0


def test_prompts_are_the_same_for_one_seed_and_others_for_another(folder):
    first, again = made(folder, "niah_single_1"), made(folder, "niah_single_1")
    assert first.examples() == again.examples() and first.fingerprint == again.fingerprint
    assert first.fingerprint != made(folder, "niah_single_1", data_seed=1).fingerprint


def test_the_wrapper_of_a_chat_template_counts(folder):
    ruler = Ruler(str(folder), subset=["niah_single_1"], lengths=[1500], samples=2)
    ruler.fit(lambda: Tokens(TOKENS.encode, TOKENS.decode, 100_000, wrapper=300))
    assert all(TOKENS.count(e.prompt) + 128 + 300 <= 1500 for e in ruler.examples())


@pytest.mark.parametrize("lengths", ["long", [], [0], [-5]])
def test_lengths_that_are_none_are_named(folder, lengths):
    ruler = Ruler(str(folder), subset=["vt"], lengths=lengths)
    ruler.fit(lambda: TOKENS)
    with pytest.raises(UserError, match=r"ruler: task\.lengths=.*; give tokens, or shares"):
        ruler.examples()


def test_a_length_that_is_given_twice_is_taken_once(folder):
    ruler = Ruler(str(folder), subset=["vt"], lengths=[0.02, 2000, 2000], samples=1)
    ruler.fit(lambda: TOKENS)
    assert [example.id for example in ruler.examples()] == ["vt/2000/0"]


def test_without_lengths_the_published_ones_that_fit_are_taken(folder):
    ruler = Ruler(str(folder), subset=["niah_single_1"], samples=1)
    ruler.fit(lambda: Tokens(TOKENS.encode, TOKENS.decode, 9000))
    assert [e.tags["length"] for e in ruler.examples()] == [4096, 8192]
    ruler = Ruler(str(folder), subset=["niah_single_1"], samples=1)
    ruler.fit(lambda: Tokens(TOKENS.encode, TOKENS.decode, 3000))
    with pytest.raises(UserError, match=r"takes 3000 tokens uncut, .*; give task\.lengths"):
        ruler.examples()


def test_names_of_groups_and_missing_files(folder, tmp_path):
    assert Ruler(str(folder), subset="multikey")._chosen == ["niah_multikey_1", "niah_multikey_2", "niah_multikey_3"]
    assert Ruler(str(folder))._chosen == list(TASKS)
    (folder / "dev-v2.0.json").unlink()
    assert "without qa_1 (no files)" in Ruler(str(folder)).source()
    with pytest.raises(UserError, match=r"qa_1 needs .*dev-v2\.0\.json"):
        Ruler(str(folder), subset=["qa"]).source()
    with pytest.raises(UserError, match=r"task\.subset=niah is not there; there are niah_single_1, "):
        Ruler(str(folder), subset=["niah"]).source()


def test_a_made_up_haystack_is_not_called_ruler(folder):
    assert Ruler("prose", subset=["vt"]).name == "ruler-custom"
    assert Ruler(str(folder), subset=["vt", "niah_single_1"], sentences="marks").name == "ruler"
    assert Ruler(str(folder), subset=["niah_single_2"], sentences="marks").name == "ruler-custom"


def test_the_bundled_split_is_ruler_mini_and_needs_no_tokenizer():
    ruler = Ruler()
    ruler.fit(lambda: pytest.fail("nobody has to count"))
    assert ruler.name == "ruler-mini" and ruler.source().startswith(
        "ruler-mini (bundled), 9 tasks, 108 samples, sha256 "
    )
    assert all(ruler.score(e, " ".join(e.answers)) == 1.0 for e in ruler.examples())
    assert {e.tags["length"] for e in Ruler(lengths=[512]).examples()} == {512}
    assert len(Ruler(limit=4).examples()) == 36
    with pytest.raises(UserError, match=r"task\.lengths=777 is not there; there are 512, 1024, 2048, 3400"):
        Ruler(lengths=[777]).examples()


def test_the_average_is_that_of_the_tasks_and_says_whether_a_length_is_passed(folder):
    ruler = Ruler(str(folder), lengths=[1000, 2000], samples=1, sentences="marks", subset=["vt", "cwe", "multikey"])
    ruler.fit(lambda: TOKENS)
    rows = [(e, float(e.tags["subset"] != "cwe")) for e in ruler.examples()]
    got = {row.name: row.score for row in ruler.summarize(rows)}
    assert got["average"] == got["length 1000"] == pytest.approx(80.0)  # four of five tasks
    assert got["multikey"] == 100.0 and got["cwe"] == 0.0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"samples": 0}, r"task\.samples=0"),
        ({"limit": 1.5}, r"task\.limit=1\.5"),
        ({"sentences": "spacy"}, r"task\.sentences=spacy; give one of auto, punkt, marks"),
    ],
)
def test_wrong_values_are_named_as_typed(knobs, message):
    with pytest.raises(UserError, match=message):
        Ruler(**knobs)


def test_the_yaml_builds_the_task_with_its_defaults():
    assert instantiate(OmegaConf.load(ROOT / "conf/task/ruler.yaml")) == Ruler()
