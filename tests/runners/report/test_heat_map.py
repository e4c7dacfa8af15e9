"""The needle grid as a picture."""

import json
from pathlib import Path

import matplotlib
import pytest

from analysis.files import CannotWrite
from methods.core.errors import UserError
from runners.report.figure import panels
from runners.report.heat_map import COLOURS, MISSING, Sample, cells, heat_map, read_record


def test_a_cell_is_the_mean_of_its_samples_and_of_the_full_caches():
    rows = [Sample("s", 10, 0, 1.0, 1.0), Sample("s", 10, 0, 0.0, 0.5), Sample("s", 20, 0, 0.25)]
    assert cells(rows) == {(10, 0): (0.5, 0.75), (20, 0): (0.25, None)}


def shown(path: Path, colour: str) -> bool:
    """Whether an area of the picture has the colour: the edges of letters have a few pixels of every grey."""
    from matplotlib.image import imread

    image = (imread(path)[..., :3] * 255).round().astype(int)
    return int((image == rgb(colour)).all(axis=-1).sum()) > 2000


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_colours_cover_the_whole_range_whatever_the_data_and_missing_cells_are_grey(tmp_path):
    # an all-perfect map is all green, and the cell (20, 0) is missing
    heat_map([Sample("s", 10, 0, 1.0), Sample("s", 10, 50, 1.0), Sample("s", 20, 50, 1.0)], tmp_path / "a.png")
    assert shown(tmp_path / "a.png", COLOURS[2]) and shown(tmp_path / "a.png", MISSING)
    heat_map([Sample("s", 10, 0, 0.0), Sample("s", 10, 50, 0.0)], tmp_path / "b.png")
    assert shown(tmp_path / "b.png", COLOURS[0]) and not shown(tmp_path / "b.png", MISSING)
    assert matplotlib.get_backend().lower() == "agg"


def record(
    folder: Path, method: str, scores: dict[str, float], protocol: str = "aware", name: str = "b1", **more: str
) -> Path:
    """more: `began` of its run, and what else was asked."""
    folder = folder / f"{method}-{name}-{protocol}"
    folder.mkdir()
    run = {"conditions": {}, "began": more.pop("began", "")}
    identity = {"model": {"name": "m"}, "task": {"name": "needle-mini"}, "method": {"name": method}, "budget": 1}
    identity |= {"protocol": protocol, "dtype": "float32", **more}
    (folder / "cell.json").write_text(json.dumps({"identity": identity, "runs": [run]}))
    lines = [json.dumps({"id": id, "score": score}) for id, score in scores.items()]
    (folder / "samples.jsonl").write_text(
        "\n".join([*lines, json.dumps({"id": "x/1/0/9", "error": "no"}), '{"id": "cu'])
    )
    return folder


def test_a_record_is_paired_with_the_full_caches_of_the_same_protocol(tmp_path):
    record(tmp_path, "full", {"single/512/0/0": 0.75}, protocol="agnostic")
    record(tmp_path, "full", {"single/512/0/0": 1.0, "single/512/50/0": 0.0})
    ours = record(tmp_path, "snapkv", {"single/512/0/0": 0.5, "single/512/50/0": 1.0})
    rows, title = read_record(ours)
    assert rows == [Sample("single", 512, 0, 0.5, 1.0), Sample("single", 512, 50, 1.0, 0.0)]
    assert title == "m, snapkv at 1, query_aware"
    heat_map(rows, tmp_path / "map.png", title)
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_of_several_full_caches_the_newest_one_counts_that_was_run_in_the_same_way(tmp_path):
    cell, passes = "single/512/0/0", {"batch_size": 1}
    record(tmp_path, "full", {cell: 0.1}, name="d", passes=passes, began="2026-11-01T00:00:00Z")
    record(tmp_path, "full", {cell: 0.2}, name="a", passes=passes, began="2026-11-03T00:00:00Z")
    record(tmp_path, "full", {cell: 0.3}, name="c", passes=passes, began="2026-11-02T00:00:00Z")
    record(tmp_path, "full", {}, name="e", passes=passes, began="2026-11-04T00:00:00Z")
    record(tmp_path, "full", {cell: 0.4}, name="f", passes={"batch_size": 8}, began="2026-11-05T00:00:00Z")
    ours = record(tmp_path, "snapkv", {cell: 0.5}, passes=passes, began="2026-11-02T00:00:00Z")
    assert read_record(ours)[0] == [Sample("single", 512, 0, 0.5, 0.2)]


def test_a_picture_that_cannot_be_drawn_leaves_nothing_behind(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    with pytest.raises(RuntimeError), panels(tmp_path / "a.png", 1, 2, (4, 2)) as (_, axes):
        assert axes.shape == (1, 2)
        raise RuntimeError
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite), panels(tmp_path / "file" / "a.png", 1, 1, (4, 2)):
        pass
    assert plt.get_fignums() == before and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_tasks_record_and_no_record_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"sample hotpotqa/1 is no cell of a grid; give a record of task=needle"):
        read_record(record(tmp_path, "nacl", {"hotpotqa/1": 1.0}))
    with pytest.raises(UserError, match="not a record that can be read"):
        read_record(tmp_path)
