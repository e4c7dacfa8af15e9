"""What methods cost: a row is measured once, what cannot run is named, and the picture has them."""

import json

import pytest

from benchmarks import method_costs


@pytest.mark.slow
def test_a_row_is_measured_once_and_a_missing_artefact_is_named(tmp_path, capsys, monkeypatch):
    out = tmp_path / "costs.json"
    words = ["--model", "reference", "--methods", "window", "--lengths", "64", "--rounds", "1", "--steps", "2"]
    assert method_costs.main([*words, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["method"] == "window" and row["tokens"] == 64 and row["settings"] == "budget=0.25"
    middle, low, high = row["prefill"]
    assert 0 < low <= middle <= high and row["full_ms"][0] > row["full_ms"][1] > 0
    assert 0.25 <= row["bytes_16"] < 0.3  # positions on top
    assert out.with_suffix(".png").is_file()
    capsys.readouterr()
    assert method_costs.main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""  # it is in the file
    monkeypatch.setitem(method_costs.INSTEAD, "qfilters", ["method.filters=nowhere"])
    words[3] = "qfilters"
    assert method_costs.main([*words, "--out", str(out)]) == 0
    assert "qfilters              64 tokens  not run: " in capsys.readouterr().out
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == ["qfilters", "window"]


def test_a_ratio_is_formed_inside_its_round():
    assert method_costs.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == [2.0, 1.0, 3.0]
