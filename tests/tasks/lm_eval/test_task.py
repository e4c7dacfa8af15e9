"""lm_eval's tasks as examples: prompts and metrics are its own, data come from where they are said to."""

import json
from pathlib import Path
from typing import Any

import pytest

from methods.core.errors import UserError
from tasks.base import as_parts
from tasks.data.choice_rows import read_rows
from tasks.lm_eval import likelihoods
from tasks.lm_eval.task import LmEval
from tests.tasks.choice_items import PIQA, put, write

COPA_XML = """<?xml version="1.0" encoding="UTF-8"?>
<copa-corpus version="1.0">
  <item id="1" asks-for="effect" most-plausible-alternative="2">
    <p>It rained all day.</p><a1>The mat was dry.</a1><a2>The river rose.</a2>
  </item>
</copa-corpus>
"""
OPENBOOKQA_TSV = (
    "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
    "1-1\tA river is\t(A) a cat (B) wet (or damp) (C) dry (D) a mat\tA river is (A) ...\tB\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("items"))


def test_prompts_and_choices_are_lm_evals_own(folder):
    first = {name: LmEval(name, folder, limit=1).examples()[0] for name in ("piqa", "copa", "openbookqa", "winogrande")}
    assert first["piqa"].prompt == "Question: dry a wet mat\nAnswer:"
    assert [choice.text for choice in first["piqa"].choices] == [" lay it on a cat", " hang it over a rail in the sun"]
    # the last character of the premise is dropped, and the choices bring a blank of their own
    assert first["copa"].prompt == "The cat sat down because"
    assert [choice.text for choice in first["copa"].choices] == ["  it slept.", "  it rained."]
    assert first["openbookqa"].prompt == "A river flows to the" and first["openbookqa"].tags["gold"] == 1
    # the choices are in the context, and one text follows both
    a, b = first["winogrande"].choices
    assert (a.question, b.question) == ("The cat left the mat because the cat", "The cat left the mat because the mat")
    assert a.text == b.text == " was wet." and first["winogrande"].tags["gold"] == 1
    assert not any(example.chat or example.context for example in first.values())


def test_the_sum_decides_acc_and_the_length_in_characters_acc_norm(tmp_path):
    put(tmp_path / "piqa.jsonl", [{"goal": "?", "sol1": "ab", "sol2": "abcd", "label": 0}])
    task = LmEval("piqa", str(tmp_path))
    (example,) = task.examples()
    assert task.rate(example, [(-4.0, False), (-6.0, True)]) == {"acc": 1, "acc_norm": 0}
    assert task.rate(example, [(-6.0, False), (-4.0, True)]) == {"acc": 0, "acc_norm": 0}
    # the first of equals is taken
    assert task.rate(example, [(-4.0, False), (-4.0, True)]) == {"acc": 1, "acc_norm": 0}


def test_solved_examples_stand_in_the_context_and_the_item_in_the_question(folder):
    for name in ("piqa", "copa", "openbookqa", "winogrande"):
        bare = LmEval(name, folder).examples()
        for one, plain in zip(LmEval(name, folder, shots=2).examples(), bare, strict=True):
            assert one.context.count("\n\n") == 2 and one.context.endswith("\n\n")
            assert one.question == plain.question and one.choices == plain.choices


def test_a_limit_takes_the_same_prompts(folder):
    assert LmEval("piqa", folder, shots=1, limit=2).examples() == LmEval("piqa", folder, shots=1).examples()[:2]


def test_rows_of_a_table_are_metrics_and_their_means_over_tasks(folder):
    task = LmEval(["piqa", "copa"], folder, limit=1)
    scored = []
    for example, parts in zip(task.examples(), ({"acc": 1.0, "acc_norm": 0.0}, {"acc": 0.0})):
        scored += as_parts(example, {"score": parts["acc"], "parts": parts})
    rows = {row.name: row.score for row in task.summarize(scored)}
    assert rows == {"piqa acc": 100, "piqa acc_norm": 0, "copa acc": 0, "mean, acc": 50, "mean, acc_norm": 0}


def test_the_margin_is_the_right_choice_less_the_best_other():
    assert likelihoods.margin([-4.0, -6.0, -5.0], 0) == 1 and likelihoods.margin([-4.0, -6.0, -5.0], 1) == -2


def row(likelihoods: list[float], score: float) -> dict[str, Any]:
    return {"likelihoods": likelihoods, "score": score}


def test_remarks_tell_moves_margins_and_guesses(folder):
    example, *_ = LmEval("piqa", folder).examples()  # the second choice is right
    rows = [(example, row([-4.0, -6.0], 0.0), row([-7.0, -5.0], 1.0))]
    said = likelihoods.moved(rows)
    assert said is not None and "moved by 1.000 nats" in said and "-2.000, full +2.000" in said
    known = [(example, row([0.0, 0.0], 0), row([0.0, 0.0], 1.0))] * 40
    guessed = [(example, row([0.0, 0.0], 0), row([0.0, 0.0], i % 2)) for i in range(40)]
    assert likelihoods.guessed(known) is None and "piqa 50.0 (chance 50.0)" in str(likelihoods.guessed(guessed))


def test_the_authors_files_are_read(tmp_path):
    for name in ("piqa", "copa", "openbookqa"):
        (tmp_path / name).mkdir()
    put(tmp_path / "piqa" / "valid.jsonl", [{"goal": "?", "sol1": "a", "sol2": "b"}])
    (tmp_path / "piqa" / "valid-labels.lst").write_text("1\n")
    (tmp_path / "copa" / "copa-test.xml").write_text(COPA_XML)
    (tmp_path / "openbookqa" / "test.tsv").write_text(OPENBOOKQA_TSV)
    piqa, copa, openbookqa = LmEval(["piqa", "copa", "openbookqa"], str(tmp_path)).examples()
    assert piqa.tags["gold"] == 1 and copa.prompt == "It rained all day therefore" and copa.tags["gold"] == 1
    assert [choice.text for choice in openbookqa.choices] == [" a cat", " wet (or damp)", " dry", " a mat"]
    assert openbookqa.answers == [" wet (or damp)"]


def test_the_source_says_which_split_and_that_it_is_not_the_published_one(folder):
    said = LmEval(["copa", "openbookqa"], folder).source()
    assert "copa (validation, 2 items, not the published 100)" in said and "lm_eval 0." in said


def test_the_seven_tasks_of_the_preset_are_known():
    import yaml

    preset = yaml.safe_load((Path(__file__).parents[3] / "conf/task/lm_eval_nacl.yaml").read_text())
    wanted = ["piqa", "copa", "openbookqa", "winogrande", "sciq", "arc_easy", "arc_challenge"]
    assert preset["tasks"] == wanted and preset["shots"] == 5
    assert LmEval(wanted, "hub", shots=5)._names == wanted


@pytest.mark.parametrize("key", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_task_file_of_ones_own_generates_and_is_read_by_its_filters(tmp_path, key):
    put(tmp_path / "rows.jsonl", [{"context": "the mat is red", "question": "\nwhich colour?", "answer": "red"}])
    (tmp_path / "own.yaml").write_text(
        "task: own\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        'doc_to_text: "{{context}}{{question}}"\n'
        "doc_to_target: answer\n"
        f'generation_kwargs: {{{key}: 5, until: ["."]}}\n'
        "filter_list:\n"
        "  - {name: colour, filter: [{function: regex, regex_pattern: '(red|blue)'}, {function: take_first}]}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    task = LmEval(include=str(tmp_path), trust_include=True)
    assert task.source().startswith(f"lm_eval ({tmp_path}, with the code of {tmp_path}): own (test, 1 items)")
    (example,) = task.examples()
    assert example.kind == "answer" and example.max_new_tokens == 5 and example.answers == ["red"]
    assert (example.context, example.question) == ("the mat is red", "\nwhich colour?")
    assert task.score(example, " it is red.") == 1 and task.score(example, " it is. red") == 0
    assert list(task.parts(example, "blue")) == ["exact_match, colour"]
    own = tmp_path / "own.yaml"
    own.write_text(own.read_text().replace("generation_kwargs: {", "generation_kwargs: {do_sample: true, "))
    said = LmEval(include=str(tmp_path), trust_include=True).source()
    assert "own (test, 1 items, which asks to be drawn: sampling.temperature says how)" in said


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"tasks": "piqa"}, "bundled are"),
        ({"data": "hub"}, r"which tasks\?"),
        ({"tasks": "piqa", "data": "nowhere"}, "no rows of piqa in"),
        ({"tasks": "piqa", "data": "hub"}, "does not give its items"),
        ({"include": "nowhere"}, "no folder at"),
        ({"shots": -1}, r"task\.shots=-1"),
        ({"stride": 0}, r"task\.stride=0"),
        ({"limit": 0}, r"task\.limit=0"),
    ],
)
def test_mistakes_are_named(knobs, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        LmEval(**knobs).examples()


def test_a_line_that_is_no_item_and_too_few_examples_are_named(tmp_path, folder):
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa" / "copa-test.xml").write_text("<corpus><item/></corpus>")
    with pytest.raises(UserError, match=r"copa-test\.xml: cannot be read"):
        read_rows("copa", tmp_path)
    with pytest.raises(UserError, match=r"task\.shots=9|does not give"):
        LmEval("piqa", folder, shots=9).examples()
    (tmp_path / "piqa").mkdir()
    put(tmp_path / "piqa" / "validation.jsonl", PIQA)
    with pytest.raises(UserError, match=r"task\.shots=1: .* add its train\.jsonl, or give task\.shots=0"):
        LmEval("piqa", str(tmp_path), shots=1).examples()


def test_the_bundled_questions_are_documents_with_four_choices():
    task = LmEval(limit=2)
    for example in task.examples():
        assert len(example.choices) == 4 and example.context and example.question.startswith("\n\nQuestion:")
        gold = example.choices[example.tags["gold"]].text
        assert gold.strip() in example.context and len({choice.text for choice in example.choices}) == 4
    assert task.name == "lm_eval-mini" and task.source().startswith("lm_eval-mini (bundled)")
    json.dumps(task.fingerprint)


def test_a_split_under_another_name_is_told_the_files_name(tmp_path):
    (tmp_path / "winogrande").mkdir()
    put(tmp_path / "winogrande" / "dev.jsonl", [{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}])
    task = LmEval("winogrande", str(tmp_path), shots=0)
    with pytest.raises(
        UserError, match=r"winogrande reads validation\.jsonl, and there is dev\.jsonl; rename.*winogrande\.jsonl"
    ):
        task.examples()
    (tmp_path / "winogrande" / "dev.jsonl").rename(tmp_path / "winogrande.jsonl")
    assert len(LmEval("winogrande", str(tmp_path), shots=0).examples()) == 1


def test_a_template_is_compiled_once_and_not_for_every_item(monkeypatch):
    from lm_eval.utils import env

    compiled, compile_one = [], env.from_string
    monkeypatch.setattr(env, "from_string", lambda text: (compiled.append(text), compile_one(text))[1])
    examples = LmEval(limit=6).examples()
    assert len(examples) > 6 and len(compiled) == len(set(compiled))


@pytest.mark.slow
@pytest.mark.shared
def test_the_published_items_are_read(shared_data):
    task = LmEval(["piqa", "copa", "openbookqa"], str(shared_data / "multiple-choice"))
    names = [example.tags["subset"] for example in task.examples()]
    assert [names.count(name) for name in ("piqa", "copa", "openbookqa")] == [1838, 500, 500]
    gold = (shared_data / "multiple-choice" / "copa" / "results-gold.test").read_text().split("\n")
    first = [int(line.split()[2]) for line in gold if line]
    assert [example.tags["gold"] for example in task.examples() if example.tags["subset"] == "copa"] == first


def test_a_yaml_of_ones_own_may_name_the_module_by_its_first_name():
    from tasks import lm_eval_harness

    assert lm_eval_harness.LmEval is LmEval
