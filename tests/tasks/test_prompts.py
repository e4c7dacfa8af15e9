import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from methods.core.errors import UserError
from tasks import prompts
from tasks.longbench.subsets import LONGBENCH, LONGBENCH_E
from tasks.prompts import Template, lm_eval_task, longbench_template

ALL = [*LONGBENCH, *LONGBENCH_E]
ROOT = Path(__file__).parents[2]


def test_there_are_21_subsets_and_13_of_longbench_e():
    assert (len(LONGBENCH), len(LONGBENCH_E)) == (21, 13)


@pytest.mark.parametrize("name", ALL)
def test_two_parts_join_to_the_template_with_its_marks_filled_in(name):
    text = prompts._corrected(name.removesuffix("_e"), lm_eval_task(name)["doc_to_text"])
    context, question = longbench_template(name).fill("CONTEXT", "INPUT")
    assert context + question == text.replace("{{context}}", "CONTEXT").replace("{{question}}", "INPUT")
    assert context.endswith("CONTEXT")
    assert "{{" not in context + question


@pytest.mark.parametrize("name", ALL)
def test_lm_eval_agrees_with_the_table_of_subsets(name):
    theirs, ours = lm_eval_task(name), (LONGBENCH | LONGBENCH_E)[name]
    assert theirs["generation_kwargs"]["max_gen_toks"] == ours.max_new_tokens
    assert ("{{question}}" in theirs["doc_to_text"]) == ours.uses_input


@pytest.mark.parametrize("name", ALL)
def test_only_white_space_is_corrected_and_only_where_the_benchmark_differs(name):
    theirs = lm_eval_task(name)["doc_to_text"]
    context, question = longbench_template(name).fill("{{context}}", "{{question}}")
    parent, changed = name.removesuffix("_e"), context + question
    if parent in ("triviaqa", "samsum"):
        assert changed == theirs.replace("{{context}}\n{{question}}", "{{context}}\n\n{{question}}") != theirs
    elif parent in ("lcc", "repobench-p"):
        assert changed == theirs + "\n"
    elif parent in ("passage_count", "passage_retrieval_en"):
        assert changed == theirs + " "
    else:
        assert changed == theirs


def test_the_ends_of_the_prompts_are_the_benchmarks():
    ends = {name: longbench_template(name).fill("C", "Q")[1] for name in ALL}
    assert ends["triviaqa"] == ends["samsum_e"] == "\n\nQ"
    assert ends["trec"] == ends["lsht"] == "\nQ"
    assert ends["lcc_e"] == "Next line of code:\n"
    assert ends["repobench-p"] == "QNext line of code:\n"
    assert ends["passage_count"].endswith("The final answer is: ")
    assert ends["passage_retrieval_en_e"].endswith("The answer is: ")
    assert ends["passage_retrieval_zh"].endswith("答案是：")


def test_the_benchmarks_oddities_stay():
    assert "question asconcisely as" in longbench_template("narrativeqa").fill("", "")[0]
    assert longbench_template("qasper").fill("", "")[1].startswith("\n\n Answer the question")
    assert " \n" in longbench_template("multi_news").fill("", "")[0]


def test_corrections_do_nothing_to_what_is_already_right():
    for name in LONGBENCH:
        once = prompts._corrected(name, lm_eval_task(name)["doc_to_text"])
        assert prompts._corrected(name, once) == once


def test_marks_inside_a_text_are_not_filled_in():
    template = Template.parse("<{context}|{input}|{input}>", "{context}", "{input}")
    assert template.fill("a {input} {context}", "{context}") == ("<a {input} {context}", "|{context}|{context}>")


@pytest.mark.parametrize("text", ["no mark", "{context}{context}", "{input} {context}"])
def test_a_template_needs_one_context_before_the_input(text):
    with pytest.raises(ValueError, match=r"holds \{context\} once"):
        Template.parse(text, "{context}", "{input}")


def test_other_words_in_lm_eval_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(prompts.DIGESTS, "hotpotqa", "00000000")
    with pytest.raises(UserError, match=r"words the prompt of hotpotqa_e in another way; install lm_eval 0\.4\.13"):
        longbench_template("hotpotqa_e")


def test_a_missing_lm_eval_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert find_spec("lm_eval") is None
    with pytest.raises(UserError, match="lm_eval, which is not installed; install lm_eval"):
        longbench_template("qasper")


def test_reading_templates_does_not_import_lm_eval():
    code = "import sys; from tasks.prompts import *; longbench_template('qasper'); sys.exit('lm_eval' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
