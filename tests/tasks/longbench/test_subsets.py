import pytest

from methods.core.errors import UserError
from tasks.longbench.subsets import CATEGORIES, LONGBENCH, LONGBENCH_E, problem, read_catalog
from tasks.scoring.metrics import METRICS

ROW = {"input": "q", "context": "c", "answers": ["Paragraph 3"], "length": 1, "all_classes": ["x"]}


def test_the_six_categories_hold_the_benchmarks_numbers_of_subsets():
    held = [sum(subset.category == category for subset in LONGBENCH.values()) for category in CATEGORIES]
    assert held == [4, 4, 4, 4, 3, 2]
    assert all(subset.metric in METRICS for subset in LONGBENCH.values())


def test_languages_are_14_english_5_chinese_and_2_of_code():
    held = [subset.language for subset in LONGBENCH.values()]
    assert (held.count("en"), held.count("zh"), held.count("code")) == (14, 5, 2)


def test_only_few_shot_and_code_prompts_stay_plain():
    plain = [name for name, subset in LONGBENCH.items() if not subset.chat]
    assert plain == ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]


def test_only_few_shot_answers_are_cut_at_their_first_line():
    assert [name for name, subset in LONGBENCH.items() if subset.first_line] == ["trec", "triviaqa", "samsum", "lsht"]


def test_only_samsum_ends_at_a_newline_after_at_least_one_token():
    assert [name for name, subset in LONGBENCH.items() if subset.stop_at_newline] == ["samsum"]
    assert [name for name, subset in LONGBENCH.items() if subset.min_new_tokens == 1] == ["samsum"]


def test_longbench_e_shares_its_parents_rules():
    assert all(LONGBENCH_E[name] is LONGBENCH[name.removesuffix("_e")] for name in LONGBENCH_E)
    assert not {"narrativeqa_e", "musique_e", "qmsum_e", "dureader_e", "lsht_e"} & LONGBENCH_E.keys()


@pytest.mark.parametrize("name", LONGBENCH)
def test_a_whole_row_has_no_problem(name):
    assert problem(ROW, LONGBENCH[name], needs_length=True) is None


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qasper", {"context": ""}, "`context` is empty"),
        ("qasper", {"context": " \n"}, "`context` is empty"),
        ("qasper", {"context": None}, "`context` is empty"),
        ("qasper", {"answers": None}, "`answers` is empty or missing"),
        ("qasper", {"answers": []}, "`answers` is empty or missing"),
        ("qasper", {"answers": "yes"}, "`answers` is empty or missing; it is a list"),
        ("qasper", {"answers": [3]}, "`answers` is empty or missing; it is a list of strings"),
        ("qasper", {"input": None}, "`input` is missing"),
        ("trec", {"all_classes": None}, "`all_classes` is empty"),
        ("lsht", {"all_classes": []}, "`all_classes` is empty"),
        ("passage_retrieval_en", {"answers": ["3"]}, "`answers` names no paragraph"),
        ("qasper", {"length": "long"}, "`length` is missing"),
    ],
)
def test_a_broken_row_names_its_field(name, change, said):
    assert said in problem(ROW | change, LONGBENCH[name], needs_length=True)


def test_a_row_need_not_hold_what_its_subset_does_not_use():
    assert problem({"context": "c", "answers": ["a"]}, LONGBENCH["gov_report"]) is None


GOOD = {
    "qa": {"category": "single-doc QA", "metric": "f1", "prompt": "{context} Q: {input}", "max_new_tokens": 8},
    "code": {"category": "code", "metric": "edit_sim", "prompt": "{context}", "max_new_tokens": 9, "first_line": True},
}


def write(path, entries):
    import yaml

    path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return path


def test_a_split_of_ones_own_brings_its_prompts(tmp_path):
    found = read_catalog(write(tmp_path / "subsets.yaml", GOOD))
    subset, template = found["qa"]
    assert (subset.metric, subset.max_new_tokens, subset.chat, subset.uses_input) == ("f1", 8, True, True)
    assert template.fill("C", "I") == ("C", " Q: I")
    subset, _ = found["code"]
    assert (subset.first_line, subset.chat, subset.uses_input) == (True, False, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "bleu"}, "qa: metric bleu; there are f1, "),
        ({"prompt": "{input}"}, "qa: a prompt holds {context} once"),
        ({"max_new_tokens": "many"}, "qa.max_new_tokens=many: give a whole number"),
        ({"plain": "false"}, "qa.plain=false: give true or false"),
        ({"firstline": True}, "qa.firstline: no such setting; did you mean qa.first_line?"),
    ],
)
def test_a_wrong_setting_names_file_subset_and_value(tmp_path, change, said):
    path = write(tmp_path / "subsets.yaml", {"qa": GOOD["qa"] | change})
    with pytest.raises(UserError) as caught:
        read_catalog(path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_missing_setting_is_named(tmp_path):
    entry = {key: value for key, value in GOOD["qa"].items() if key != "category"}
    with pytest.raises(UserError, match=r"qa\.category: is missing"):
        read_catalog(write(tmp_path / "subsets.yaml", {"qa": entry}))


@pytest.mark.parametrize("text", ["[1]", "", "a: [", "qa: 3"])
def test_a_file_of_another_shape_is_refused_by_name(tmp_path, text):
    (tmp_path / "subsets.yaml").write_text(text)
    with pytest.raises(UserError, match=r"subsets\.yaml: "):
        read_catalog(tmp_path / "subsets.yaml")
