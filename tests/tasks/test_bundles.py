"""The bundled splits: every file of tasks/bundles enrols itself."""

import json

import pytest
import yaml

from tasks.bundle import ASSETS, SPLITS, write
from tasks.bundles.longbench import SUBSETS
from tasks.documents import split_of


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_regenerated_byte_for_byte(split, tmp_path):
    made = {path.name: path.read_bytes() for path in write(split, tmp_path).iterdir()}
    assert made == {path.name: path.read_bytes() for path in (ASSETS / f"{split}-mini").iterdir()}


@pytest.mark.parametrize("split", SPLITS)
def test_the_ids_of_a_split_are_unique(split):
    ids = [row["_id"] for path in (ASSETS / f"{split}-mini").glob("*.jsonl") for row in read(path)]
    assert len(ids) == len(set(ids)) >= 80


@pytest.mark.parametrize("name", SUBSETS)
def test_longbench_values_belong_to_the_held_out_pool(name):
    for record in read(ASSETS / "longbench-mini" / f"{name}.jsonl"):
        assert set(record) == {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
        if name in ("report_qa", "kinds"):  # where the whole answer is a value
            assert all(split_of(part) == "held_out" for part in record["answers"][0].split())
        if record["all_classes"]:
            assert record["answers"][0] in record["all_classes"]


def test_longbench_mini_covers_the_six_categories():
    described = yaml.safe_load((ASSETS / "longbench-mini" / "subsets.yaml").read_text())
    assert len({entry["category"] for entry in described.values()}) == 6
    assert all("{context}" in e["prompt"] and "{input}" in e["prompt"] for e in described.values())


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
