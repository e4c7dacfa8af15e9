"""`runner=heads` and `analysis.heads`: what a method holds by layer and head, from the prompt to the picture."""

import json

import numpy as np
import pytest

from analysis.heads import main, table
from analysis.heads.figure import draw
from analysis.heads.layouts import layout, read_layouts
from runners.learn.heads import _runs, together


@pytest.fixture
def looked_at(tmp_path, tiny_model_dir, run_command):
    """looked_at("method=window", ...): the file that the command writes, and its folder."""

    def look(*words):
        code, out, err = run_command(
            "runner=heads", *words, f"model.path={tiny_model_dir}", "task=needle", "runner.samples=2",
            f"runner.out={tmp_path / 'heads'}",
        )  # fmt: skip
        assert code == 0, err
        return json.loads(open(out.splitlines()[-1].partition(": drawn")[0]).read()), tmp_path / "heads"

    return look


def test_a_window_holds_the_newest_positions_in_every_head(looked_at):
    file, _ = looked_at("method=window", "budget=10")
    tokens = file["tokens"][0]
    assert len(file["samples"]) == 2 and tokens > 10
    assert all(heads == [[tokens - 10, 10]] * len(heads) for heads in file["positions"])
    assert np.allclose(file["kept"], np.mean([10 / n for n in file["tokens"]]), atol=1e-5)


def test_heads_of_adakv_share_a_budget_and_bits_are_said_of_codecs(looked_at):
    file, folder = looked_at("method=adakv", "budget=0.5")
    held = layout(file).held
    L, H, tokens = held.shape
    assert (held.sum((1, 2)) == H * (tokens // 2)).all() and len(set(held.sum(2).ravel())) > 1
    bits, _ = looked_at("method=kivi", "method.bits=4")
    assert bits["traits"] == [{"key bits": 4, "value bits": 4}] * L and np.allclose(bits["kept"], 1)
    mixed, _ = looked_at("method=snapkv+kivi", "budget=0.5")
    assert set(mixed["traits"][0]) == {"key bits", "value bits"}
    found, problems = read_layouts(folder)
    assert [one.about["method"] for one in found] == ["adakv", "kivi", "snapkv+kivi"] and not problems
    assert len({one.place for one in found}) == 1


def test_a_task_that_asks_nothing_is_refused(run_command, tiny_model_dir):
    code, _, err = run_command("runner=heads", "method=window", f"model.path={tiny_model_dir}", "task=perplexity")
    assert code == 2 and "task=perplexity-mini asks no questions that are answered" in err


def test_runs_of_neighbours_give_the_places_back():
    places = [0, 1, 2, 5, 7, 8]
    runs = [*_runs(places)]
    assert runs == [0, 3, 5, 1, 7, 2] and [*_runs([])] == []


FILE = {
    "model": "m", "task": "t", "protocol": "query_aware", "method": "duo", "budget": 0.5, "samples": ["a"],
    **together([{
        "id": "a", "tokens": 4, "positions": [[[0, 3], [1]], None],
        "traits": [{"policy": ["full", "window"], "rank": 3}, {}],
    }]),
}  # fmt: skip


def test_policies_are_words_ranks_numbers_and_a_layer_without_slots_is_empty(tmp_path):
    one = layout(FILE)
    assert np.array_equal(one.kept, [[0.5, 0.25], [np.nan, np.nan]], equal_nan=True)
    assert one.traits["policy"].tolist() == [["full", "window"], [None, None]]
    assert one.held[0].tolist() == [[True, False, False, True], [False, True, False, False]] and not one.held[1].any()
    shown = table([one]).iloc[0]
    assert shown["policy"] == "full in 1, window in 1" and shown["rank"] == "3" and shown["tokens held"] == "37.5%"
    figure = draw([one, layout({**FILE, "method": "other", "traits": [{}, {}]})])
    axes = [axis for axis in figure.axes if axis.get_visible() and axis.get_title()]
    assert [axis.get_title() for axis in axes] == [
        "duo 0.5: tokens held, 1 samples", "other 0.5: tokens held, 1 samples", "policy", "rank",
        "positions held of a", "positions held of a",
    ]  # fmt: skip
    rows = axes[-1].images[0].get_array()
    assert rows.tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0] * 4, [0] * 4]


def test_the_command_draws_what_is_asked_for_and_says_what_there_is(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(FILE))
    (tmp_path / "b.json").write_text("{}")
    assert main([str(tmp_path), "--method", "duo"]) == 0
    said = capsys.readouterr()
    assert "b.json: not what runner=heads writes (KeyError: 'kept')" in said.err
    assert (tmp_path / "heads-m-t-query_aware.png").is_file()
    assert main([str(tmp_path), "--method", "nacl"]) == 2
    assert capsys.readouterr().err.endswith("nothing of what was asked for; there is duo 0.5\n")
    assert main([str(tmp_path / "none")]) == 2 and "python run.py runner=heads" in capsys.readouterr().err
