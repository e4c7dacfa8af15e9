import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from methods.core.errors import UserError
from runners.engine.prompt import Encoder
from tasks.base import Row
from tasks.longbench import task as longbench
from tasks.longbench.subsets import LONGBENCH, LONGBENCH_E
from tasks.longbench.task import LongBench, length_bin
from tests.turns import taking_turns

ROOT = Path(__file__).parents[3]
CLASSES = ["Date", "State"]


def row(name: str, i: int = 0, **change: Any) -> dict[str, Any]:
    """A whole row for any subset; the i-th answer is a number that retrieval finds too."""
    return {
        "input": f"question {i}",
        "context": f"{name} text {i}",
        "answers": [f"Paragraph {i}"],
        "length": 5000,
        "dataset": name,
        "language": "en",
        "all_classes": CLASSES,
        "_id": f"id{i}",
    } | change


def write(folder: Path, **files: list[Any]) -> Path:
    """One JSONL file per subset; a str stands for itself."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        lines = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Two rows of every subset and of every LongBench-E subset."""
    return write(tmp_path / "lb", **{name: [row(name, 0), row(name, 1)] for name in [*LONGBENCH, *LONGBENCH_E]})


@pytest.fixture
def mini(tmp_path) -> Path:
    """A split with its own prompts, two subsets of two rows."""
    folder = write(tmp_path / "own", facts=[row("facts", 0), row("facts", 1)], lines=[row("lines", 0), row("lines", 1)])
    catalog = {
        "facts": {
            "category": "single-doc QA",
            "metric": "f1",
            "prompt": "Read.\n{context}\nAsk: {input}\nSay:",
            "max_new_tokens": 8,
            "first_line": True,
        },
        "lines": {"category": "code", "metric": "edit_sim", "prompt": "{context}", "max_new_tokens": 16},
    }
    (folder / "subsets.yaml").write_text(yaml.safe_dump(catalog), encoding="utf-8")
    return folder


def test_all_21_subsets_are_read_in_the_benchmarks_order(data):
    task = LongBench(str(data))
    assert list(dict.fromkeys(example.tags["subset"] for example in task.examples())) == list(LONGBENCH)
    assert task.name == "longbench"
    assert task.source().startswith(f"longbench ({data}), 21 subsets, 42 samples, sha256 ")


def test_longbench_e_reads_its_own_13_files(data):
    task = LongBench(str(data), e=True)
    assert list(dict.fromkeys(example.tags["subset"] for example in task.examples())) == list(LONGBENCH_E)
    assert task.name == "longbench-e"


def test_a_subset_may_be_named_with_or_without_its_e(data):
    for subset in (["hotpotqa"], ["hotpotqa_e"], "hotpotqa"):
        ids = [example.id for example in LongBench(str(data), subset=subset, e=True).examples()]
        assert ids == ["hotpotqa_e/0", "hotpotqa_e/1"]


@pytest.mark.parametrize("typed", ["multi-doc QA", "multi-doc-qa", "multi_doc_qa"])
def test_a_category_stands_for_its_subsets(data, typed):
    chosen = {example.tags["subset"] for example in LongBench(str(data), subset=[typed]).examples()}
    assert chosen == {"hotpotqa", "2wikimqa", "musique", "dureader"}


def test_names_and_categories_mix_and_repeat_without_repeating_samples(data):
    ids = [example.id for example in LongBench(str(data), subset=["lcc", "code", "trec", "lcc"], limit=1).examples()]
    assert ids == ["trec/0", "lcc/0", "repobench-p/0"]


def test_a_category_takes_what_the_folder_has(tmp_path):
    folder = write(tmp_path / "lb", musique=[row("musique")])
    assert [example.id for example in LongBench(str(folder), subset=["multi-doc QA"]).examples()] == ["musique/0"]


def test_an_unknown_subset_lists_the_right_ones():
    with pytest.raises(
        UserError, match=r"task\.subset=hotpot is unknown here; subsets: narrativeqa, .*; categories: s"
    ):
        LongBench("anywhere", subset=["hotpot"])


def test_a_subset_of_the_other_half_says_where_it_belongs(mini):
    with pytest.raises(UserError, match=r"qasper_e is unknown here \(it belongs to LongBench-E: task\.e=true\)"):
        LongBench("anywhere", subset=["qasper_e"])
    with pytest.raises(UserError, match=r"musique is unknown here \(LongBench-E leaves it out\)"):
        LongBench("anywhere", subset=["musique"], e=True)
    with pytest.raises(UserError, match=r"\(it is a subset of the full LongBench: .*\); subsets: facts, lines"):
        LongBench(str(mini), subset=["musique"])


def test_an_empty_choice_is_refused():
    with pytest.raises(UserError, match=r"task\.subset=\[\] chooses nothing"):
        LongBench("anywhere", subset=[])


@pytest.mark.parametrize("limit", [0, -1, 0.5, "three", True])
def test_a_limit_is_a_whole_number_above_0(limit):
    with pytest.raises(UserError, match=rf"task\.limit={limit}; give a whole number"):
        LongBench("anywhere", limit=limit)


def test_the_limit_counts_per_subset(data):
    assert len(LongBench(str(data), limit=1).examples()) == 21
    assert len(LongBench(str(data), limit=9).examples()) == 42


def test_a_chosen_subset_without_a_file_says_what_is_there(tmp_path):
    folder = write(tmp_path / "lb", musique=[row("musique")])
    with pytest.raises(UserError, match=r"task\.subset=lcc needs lcc\.jsonl in .*, which holds musique\.jsonl"):
        LongBench(str(folder), subset=["musique", "lcc"]).source()


def test_a_folder_of_other_files_says_what_is_needed(tmp_path):
    folder = write(tmp_path / "lb", other=[row("other")])
    with pytest.raises(UserError, match=r"holds other\.jsonl, but no file of longbench: narrativeqa\.jsonl, qasper"):
        LongBench(str(folder)).source()
    folder = write(tmp_path / "lb", qasper=[row("qasper")])
    with pytest.raises(UserError, match=r"no file of longbench-e: qasper_e\.jsonl"):
        LongBench(str(folder), e=True).source()


def test_a_missing_or_empty_folder_names_the_key_as_typed(tmp_path):
    with pytest.raises(UserError, match=r"^task\.data=no/where: nothing at /.*no/where; put"):
        LongBench("no/where").source()
    with pytest.raises(UserError, match=r"no \.jsonl file in"):
        LongBench(str(tmp_path)).source()


def test_a_single_file_is_known_by_its_name_or_by_its_rows(tmp_path):
    folder = write(tmp_path / "lb", musique=[row("musique")], mine=[row("musique")])
    for name in ("musique.jsonl", "mine.jsonl"):
        assert [example.id for example in LongBench(str(folder / name)).examples()] == ["musique/0"]


def test_a_zip_of_the_hubs_shape_gives_the_same_samples(data, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in data.glob("*.jsonl"):
            archive.write(file, f"data/{file.name}")
    zipped, plain = LongBench(str(tmp_path / "data.zip")), LongBench(str(data))
    assert zipped.examples() == plain.examples()
    assert zipped.fingerprint == plain.fingerprint


def test_the_hub_gives_its_commit_to_the_record(data, tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "0123456789abcdef"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.write(data / "lcc.jsonl", "data/lcc.jsonl")
    monkeypatch.setattr(longbench, "from_hub", lambda revision: folder / "data.zip")
    task = LongBench("hub")
    assert task.fingerprint["hub_commit"] == "0123456789abcdef"
    assert task.source().startswith("longbench (hub, revision 0123456789ab), 1 subset, 2 samples")


def test_the_bundled_split_is_never_called_longbench(mini, monkeypatch):
    monkeypatch.setattr(longbench, "BUNDLED", mini)
    task = LongBench()
    assert task.name == "longbench-mini"
    assert task.source().startswith("longbench-mini (bundled), 2 subsets, 4 samples")
    assert LongBench(str(mini)).name == "longbench-custom"


def test_a_missing_bundled_split_and_its_e_variant_are_refused(tmp_path, mini, monkeypatch):
    monkeypatch.setattr(longbench, "BUNDLED", mini)
    with pytest.raises(UserError, match=r"task\.e=true with task\.data=bundled"):
        LongBench(e=True)
    monkeypatch.setattr(longbench, "BUNDLED", tmp_path / "gone")
    with pytest.raises(UserError, match=r"bundled split is missing at .*gone"):
        LongBench()


def test_the_hash_follows_the_data_and_the_choice(data):
    one = LongBench(str(data), subset=["lcc"])
    assert one.fingerprint == LongBench(str(data), subset=["lcc"]).fingerprint
    assert one.fingerprint["data_sha256"] != LongBench(str(data), subset=["trec"]).fingerprint["data_sha256"]
    (data / "lcc.jsonl").write_text(json.dumps(row("lcc", 7)))
    assert one.fingerprint["data_sha256"] != LongBench(str(data), subset=["lcc"]).fingerprint["data_sha256"]


def test_the_hash_follows_the_settings_of_a_split_of_ones_own(mini):
    before = LongBench(str(mini)).fingerprint
    text = (mini / "subsets.yaml").read_text().replace("max_new_tokens: 8", "max_new_tokens: 9")
    (mini / "subsets.yaml").write_text(text)
    assert LongBench(str(mini)).fingerprint != before


def test_the_fingerprint_is_json_and_names_what_made_prompts_and_scores(data):
    found = json.loads(json.dumps(LongBench(str(data), subset=["vcsum", "lcc"]).fingerprint))
    assert found.keys() == {"task", "data_sha256", "metrics", "templates", "lm_eval", "jieba"}
    assert "jieba" not in LongBench(str(data), subset=["lcc"]).fingerprint


def test_the_yaml_of_the_task_makes_it(mini):
    config = OmegaConf.load(ROOT / "conf" / "task" / "longbench.yaml")
    task = instantiate(OmegaConf.merge(config, {"data": str(mini), "subset": ["facts"], "limit": 1}))
    assert [example.id for example in task.examples()] == ["facts/0"]
    assert config.data == "bundled"


def test_an_example_holds_the_filled_prompt_cut_after_the_context(data):
    example = LongBench(str(data), subset=["triviaqa"]).examples()[1]
    assert example.context.endswith("The following are some examples.\n\ntriviaqa text 1")
    assert example.question == "\n\nquestion 1"
    assert (example.id, example.answers, example.max_new_tokens) == ("triviaqa/1", ["Paragraph 1"], 32)
    assert example.tags == {
        "subset": "triviaqa",
        "category": "few-shot",
        "metric": "f1",
        "language": "en",
        "first_line": True,
        "length": 5000,
        "row_id": "id1",
    }


def test_generation_rules_reach_the_example(data):
    by_id = {example.id: example for example in LongBench(str(data)).examples()}
    samsum, qasper = by_id["samsum/0"], by_id["qasper/0"]
    assert (samsum.min_new_tokens, samsum.stop_at_newline, samsum.chat) == (1, True, False)
    assert (qasper.min_new_tokens, qasper.stop_at_newline, qasper.chat) == (0, False, True)
    assert by_id["trec/0"].tags["all_classes"] == CLASSES


def test_marks_inside_the_data_are_left_alone(tmp_path):
    folder = write(tmp_path / "lb", musique=[row("musique", context="{{question}} {x}", input="{{context}}")])
    example = LongBench(str(folder)).examples()[0]
    assert example.context.endswith("{{question}} {x}")
    assert "Question: {{context}}\nAnswer:" in example.question


def test_an_own_prompt_is_split_like_the_others(mini):
    facts, _, lines, _ = LongBench(str(mini)).examples()
    assert (facts.context, facts.question) == ("Read.\nfacts text 0", "\nAsk: question 0\nSay:")
    assert (lines.context, lines.question, lines.chat) == ("lines text 0", "", False)


def test_a_bad_row_becomes_a_failed_sample_and_the_others_stay(tmp_path):
    no_answers = row("musique", 1)
    del no_answers["answers"]
    rows = [row("musique", 0), no_answers, row("musique", 2, context=""), row("musique", 3)]
    examples = LongBench(str(write(tmp_path / "lb", musique=rows))).examples()
    assert [example.id for example in examples] == [f"musique/{i}" for i in range(4)]
    assert [example.error and example.error.split()[0] for example in examples] == [
        None,
        "`answers`",
        "`context`",
        None,
    ]


def test_a_label_task_without_its_labels_is_a_failed_sample(tmp_path):
    folder = write(tmp_path / "lb", trec=[row("trec", all_classes=None)])
    assert "`all_classes`" in LongBench(str(folder)).examples()[0].error


def test_a_line_that_is_not_json_stops_with_file_and_line(tmp_path):
    folder = write(tmp_path / "lb", musique=[row("musique"), "{oops"])
    with pytest.raises(UserError, match=r"musique\.jsonl, line 2: not JSON"):
        LongBench(str(folder), limit=1).examples()


def test_a_file_without_rows_is_named(tmp_path):
    folder = write(tmp_path / "lb", musique=[""])
    with pytest.raises(UserError, match=r"musique\.jsonl: holds no rows"):
        LongBench(str(folder)).examples()


def test_without_jieba_the_subsets_that_need_it_are_refused_by_name(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="multifieldqa_zh, dureader, vcsum need jieba"):
        LongBench(str(data)).source()
    assert LongBench(str(data), subset=["passage_retrieval_zh", "lsht", "lcc"]).examples()


def test_few_shot_answers_are_scored_by_their_first_line_only(data):
    trivia, hotpot = LongBench(str(data), subset=["triviaqa", "hotpotqa"], limit=1).examples()[::-1]
    task = LongBench(str(data))
    prediction = "\n\nParagraph 0\nQuestion: and so on"
    assert task.score(trivia, prediction) == 1.0
    assert task.score(hotpot, prediction) == pytest.approx(0.5)  # 2 of 6 words, 2 of 2


def test_each_metric_is_reached_through_its_subset(data):
    task = LongBench(str(data), limit=1)
    right = {"trec/0": "Date", "lsht/0": "Date"}
    for example in task.examples():
        if example.id in right:
            example.answers[:] = ["Date"]
        elif example.id == "passage_count/0":
            example.answers[:] = ["0"]
        assert task.score(example, right.get(example.id, "Paragraph 0")) == pytest.approx(1), example.id
        assert task.score(example, "") == 0.0


def table(task: LongBench, scores: dict[str, list[float]]) -> dict[str, Row]:
    """The result table when the samples of each subset get these scores."""
    pools = {name: iter(values) for name, values in scores.items()}
    rows = [(example, next(pools[example.tags["subset"]])) for example in task.examples()]
    found = task.summarize(rows)
    assert all(sum(mean.weights) == pytest.approx(float(mean.n > 0)) for mean in task.means([one for one, _ in rows]))
    return {row.name: row for row in found}


def test_english_and_chinese_averages_both_count_code_and_say_what_they_are(data):
    task = LongBench(str(data), subset=["qasper", "hotpotqa", "musique", "dureader", "lcc"])
    got = table(task, {"qasper": [1, 0], "hotpotqa": [1, 1], "musique": [0, 0], "dureader": [0, 0.2], "lcc": [0.4, 0]})
    # English: QA 50, multi-doc (100 + 0) / 2 = 50, code 20; by subset (50 + 100 + 0 + 20) / 4
    assert got["average English"] == Row("average English", "average", 8, 40.0, "mean of 3 category means")
    assert got["average English by subset"].score == 42.5
    assert got["average English by subset"].note == "mean of 4 subsets"
    # Chinese: multi-doc 10, code 20; one subset each, so the other average would be the same
    assert got["average Chinese"].score == pytest.approx(15.0)
    # of both: QA 50, multi-doc (100 + 0 + 10) / 3, code 20
    assert got["average"].score == pytest.approx((50 + 110 / 3 + 20) / 3)
    assert "average Chinese by subset" not in got
    assert got["multi-doc QA"] == Row("multi-doc QA", "category", 6, pytest.approx(110 / 3), "mean of 3 subsets")


@pytest.mark.parametrize("max_length", [40, 200, 301])
def test_a_prompt_that_is_too_long_is_cut_as_longbenchs_own_code_does_whatever_its_input(
    max_length, tiny_tokenizer, tmp_path
):
    rows = [
        row("hotpotqa", i, context="the cat sat. " * 60, input="where is the river? " * n) for i, n in ((0, 1), (1, 90))
    ]
    task = LongBench(str(write(tmp_path / "lb", hotpotqa=rows)))
    encoder = Encoder(tiny_tokenizer, ends=[], max_length=max_length)
    for example in task.examples():
        ids, half = tiny_tokenizer(example.prompt, truncation=False).input_ids, int(max_length / 2)
        first, last = (tiny_tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        encoded = encoder(example)
        assert encoded.cut and list(encoded.prompt.ids) == tiny_tokenizer(first + last).input_ids
        assert 0 < encoded.prompt.n_context < len(encoded.prompt.ids)


def test_one_category_needs_no_average(data):
    got = table(LongBench(str(data), subset=["code"]), {"lcc": [1, 0], "repobench-p": [1, 1]})
    assert list(got) == ["lcc", "repobench-p", "code"]


def test_a_split_of_ones_own_has_one_plain_average(mini):
    got = table(LongBench(str(mini)), {"facts": [1, 0], "lines": [1, 1]})
    assert [row.kind for row in got.values()] == ["subset", "subset", "category", "category", "average"]
    assert got["average"].score == 75.0


@pytest.mark.parametrize(
    ("length", "name"), [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (90000, "8k+")]
)
def test_bins_start_at_4000_and_8000_words(length, name):
    assert length_bin(length) == name


def test_longbench_e_scores_each_bin_and_gives_null_for_an_empty_one(tmp_path):
    lengths = {"qasper_e": [100, 5000, 5000], "lcc_e": [200, 300, 6000]}
    files = {name: [row(name, i, length=n) for i, n in enumerate(values)] for name, values in lengths.items()}
    task = LongBench(str(write(tmp_path / "lb", **files)), e=True)
    got = table(task, {"qasper_e": [1, 0, 0.5], "lcc_e": [0, 1, 0.4]})
    scores = {name: (row.n, row.score) for name, row in got.items() if row.kind == "bin"}
    assert scores == {
        "qasper_e 0-4k": (1, 100.0),
        "qasper_e 4-8k": (2, 25.0),
        "qasper_e 8k+": (0, None),
        "lcc_e 0-4k": (2, 50.0),
        "lcc_e 4-8k": (1, 40.0),
        "lcc_e 8k+": (0, None),
    }
    assert (got["average 0-4k"].score, got["average 4-8k"].score) == (75.0, 32.5)
    assert "average 8k+" not in got
    assert list(got)[:4] == ["qasper_e", "qasper_e 0-4k", "qasper_e 4-8k", "qasper_e 8k+"]


def test_a_longbench_e_row_without_a_length_is_a_failed_sample(tmp_path):
    folder = write(tmp_path / "lb", lcc_e=[row("lcc_e", length=None), row("lcc_e")])
    bad, good = LongBench(str(folder), e=True).examples()
    assert "`length`" in bad.error
    assert good.tags["bin"] == "4-8k"


RUNS = ("llama2-7b-chat-4k", "llama3-8b-instruct")


def rescore(folder: Path, name: str, tmp_path: Path, e: bool = False) -> dict[str, float | None]:
    """The table of a published file of predictions, made by the whole task; the contexts are not published."""
    saved = [json.loads(line) for line in (folder / f"{name}.jsonl").read_bytes().split(b"\n") if line.strip()]
    file = f"{name}_e" if e else name
    rows = [{"input": "", "context": "x"} | {k: v for k, v in item.items() if k != "pred"} for item in saved]
    task = LongBench(str(write(tmp_path / "lb", **{file: rows})), e=e)
    examples = task.examples()
    assert not any(example.error for example in examples)
    scored = [(example, task.score(example, item["pred"])) for example, item in zip(examples, saved, strict=True)]
    return {row.name: round(row.score, 2) for row in task.summarize(scored) if row.score is not None}


@pytest.mark.shared
@pytest.mark.parametrize(("run", "name"), taking_turns(list(RUNS), list(LONGBENCH), of=3))
def test_every_published_score_is_reproduced_to_the_printed_digit(run, name, shared_data, tmp_path):
    folder = shared_data / "longbench-predictions" / run
    published = json.loads((folder / "result.json").read_text())
    assert published.keys() == LONGBENCH.keys()
    assert rescore(folder, name, tmp_path)[name] == published[name]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qasper", "multifieldqa_en", "hotpotqa"])
def test_every_published_bin_of_longbench_e_is_reproduced_to_the_printed_digit(name, shared_data, tmp_path):
    folder = shared_data / "longbench-e-predictions" / "llama2-7b-chat-4k"
    published = json.loads((folder / "result.json").read_text())[name]
    got = rescore(folder, name, tmp_path, e=True)
    assert {length: got[f"{name}_e {length}"] for length in published} == published


@pytest.mark.shared
def test_real_files_give_whole_prompts(shared_data):
    task = LongBench(str(shared_data / "longbench"))
    examples = task.examples()
    assert {example.tags["subset"] for example in examples} == {
        "multifieldqa_zh",
        "multi_news",
        "passage_retrieval_zh",
    }
    assert len(examples) == 600
    assert not any(example.error for example in examples)
    first = next(example for example in examples if example.id == "multi_news/0")
    raw = json.loads((shared_data / "longbench" / "multi_news.jsonl").open(encoding="utf-8").readline())
    assert raw["context"] in first.prompt
    assert first.context.endswith(raw["context"])
    assert all(task.score(example, example.answers[0]) > 0.999 for example in examples[::20])
