"""The needle grid as a picture."""

import json
from pathlib import Path

import matplotlib
import pytest

from methods.core.errors import UserError
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


def record(folder: Path, method: str, scores: dict[str, float], protocol: str = "aware") -> Path:
    folder = folder / f"{method}-b1-{protocol}"
    folder.mkdir()
    identity = {"model": {"name": "m"}, "task": {"name": "needle-mini"}, "method": {"name": method}, "budget": 1}
    (folder / "cell.json").write_text(json.dumps({"identity": identity | {"protocol": protocol, "dtype": "float32"}}))
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


def test_another_tasks_record_and_no_record_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"sample hotpotqa/1 is no cell of a grid; give a record of task=needle"):
        read_record(record(tmp_path, "nacl", {"hotpotqa/1": 1.0}))
    with pytest.raises(UserError, match="not a record that can be read"):
        read_record(tmp_path)
