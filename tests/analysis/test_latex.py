"""Tables for a paper: names are text, and a column is wide enough."""

import re
import shutil
import subprocess

import pytest

from analysis.load import load_results
from analysis.pages import latex
from analysis.points import points

LOSS = {"name": "perplexity", "unit": "per token", "better": "lower", "scale": 1, "digits": 3}
DOCUMENT = r"""
\documentclass[twocolumn]{article}
\usepackage{booktabs}
\begin{document}
\newsavebox{\made}
\sbox{\made}{%s}
\typeout{WIDTH \the\wd\made\space OF \the\columnwidth}
\usebox{\made}
\end{document}
"""


def test_names_are_escaped_and_ties_are_bold(book):
    book.cell(scores=[1.0] * 8, task="quiz_100%-mini")
    book.cell("h2o_x&y", [1.0] * 8, 0.5, task="quiz_100%-mini")
    text = latex.tables(points(load_results(book.root)))
    assert r"\shortstack[r]{quiz\_100\%-\\mini}" in text
    assert r"\raggedright h2o\_x\&y & 0.5 & 50.0\% & \textbf{100.0} \\" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert all(line.count(" & ") == 3 for line in body.strip().splitlines())


def test_a_line_break_in_a_name_breaks_no_line():
    assert latex.escaped("a\nb\\c~d^e") == r"a b\textbackslash c\textasciitilde d\textasciicircum e"


def test_losses_have_two_decimals_and_the_interval_stands_below(book):
    book.cell(scores=[10.0] * 8, task="text-mini", metric=LOSS)
    book.cell("nacl", [12.3456] * 8, 0.5, task="text-mini", metric=LOSS)
    text = latex.tables(points(load_results(book.root)))
    assert r" & 12.35 \\" in text and r"{\scriptsize (+2.3, +2.3)}" in text


def many(book):
    for task in ("longbench-mini", "needle-mini", "summarization-mini", "reasoning-mini", "quiz_100%-mini"):
        book.cell(scores=[1.0] * 8, task=task)
        book.cell("snapkv", [0.0] * 8, 0.5, task=task, config={"window": 16})
        book.cell("snapkv", [1.0] * 7 + [0.0], 0.5, task=task, config={"window": 64})
    book.cell(scores=[10.0] * 8, task="perplexity-mini", metric=LOSS)
    book.cell("nacl", [112.345] * 8, 0.5, task="perplexity-mini", metric=LOSS)


def test_many_tasks_are_several_tables(book):
    many(book)
    text = latex.tables(points(load_results(book.root)))
    assert text.count(r"\begin{tabular}") == 3 and text.count("mini}") == 6


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_a_table_fits_a_column_of_a_two_column_paper(book, tmp_path):
    many(book)
    for at, part in enumerate(latex.tables(points(load_results(book.root))).split("\n\n")):
        (tmp_path / f"{at}.tex").write_text(DOCUMENT % part.strip())
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", f"{at}.tex"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
        width, column = map(float, re.search(r"WIDTH ([\d.]+)pt OF ([\d.]+)pt", done.stdout).groups())
        assert width <= column
