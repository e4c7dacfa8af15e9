"""Every method on a pretrained model: which cells and pieces there are, and what few samples say of a claim."""

from dataclasses import replace

import pandas as pd
import pytest

from benchmarks import real
from benchmarks.claims import Claim, Row, Scores
from methods import method_names

ROW = Row("task", 96.0, 95.5, 96.5, "%", 250, "held")


def test_every_method_has_cells_once_what_it_learns_of_the_model_is_there(monkeypatch):
    told = {cell[0].partition("=")[2] for cell in real.cells()}
    assert told == set(method_names()) - {"full", *real.SAME, *(name for name in real.LEARNED if not real.made(name))}
    monkeypatch.setattr(real, "ARTEFACTS", "none")
    told = {cell[0].partition("=")[2] for cell in real.cells()}
    assert told == set(method_names()) - {"full", *real.SAME, *real.LEARNED}
    assert set(real.LEARNED) <= set(method_names())


def test_every_method_has_a_cell_at_every_budget_and_a_codec_one_at_its_bits():
    nacl = [cell[1:] for cell in real.cells() if cell[0] == "method=nacl"]
    assert nacl == [[f"budget={budget}"] for budget in real.BUDGETS]
    assert [cell[1:] for cell in real.cells() if cell[0] == "method=kivi"] == [[f"method.bits={b}"] for b in (8, 4, 2)]


def test_a_piece_is_one_command_and_is_named_where_its_texts_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KVFRONTIER_DATA", raising=False)
    assert real.command("perplexity", tmp_path) is None
    assert "perplexity: not run, it needs wikitext-2/test.txt" in capsys.readouterr().err
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "test.txt").write_text("x")
    monkeypatch.setenv("KVFRONTIER_DATA", str(tmp_path))
    words = real.command("perplexity", tmp_path)
    assert f"task.data={tmp_path / 'wikitext-2' / 'test.txt'}" in words and words[0] == "model=smollm2-135m"
    assert [word for word in words if word.startswith("cells=")] == [words[-1]]
    assert real.command("longbench-real", tmp_path) is not None  # bundled


@pytest.mark.parametrize(("n", "said"), [(250, "held"), (249, "cannot be told here")])
def test_a_verdict_needs_enough_samples(n, said):
    claim = Claim("nacl", "", [replace(ROW, n=n)])
    assert [row.verdict for row in real.told(claim).rows] == [said]
    assert real.told(claim).rows[0].low == ROW.low


def test_what_fails_is_looked_into_in_a_folder_of_its_own(tmp_path):
    words = real.command("longbench-real", real.why(tmp_path / "real"), real.ABLATED)
    assert f"results={tmp_path / 'real-why'}" in words and "task.subset=profile_qa" in words
    assert words[-1].count("method=nacl") == 4 and "method.noise=none" in words[-1] and "tova" not in words[-1]


def test_samples_of_several_lengths_are_compared_length_by_length():
    def scores(lengths):
        table = pd.DataFrame({"length": lengths, "score": 1.0}, index=[f"{i}" for i in range(len(lengths))])
        return Scores([table], {}, "samples", "nacl")

    mixed = scores([1024.0, 2048.0, 1024.0])
    parts = dict(real.by_length("needle", mixed, mixed))
    assert {what: [*ours.seeds[0].index] for what, (ours, _) in parts.items()} == {
        "needle, 1,024 tokens": ["0", "2"], "needle, 2,048 tokens": ["1"],
    }  # fmt: skip
    for alike in (scores([1024.0] * 2), scores([float("nan")] * 2)):
        assert [what for what, _ in real.by_length("needle", alike, alike)] == ["needle"]
