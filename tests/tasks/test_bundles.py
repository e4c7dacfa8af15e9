"""The bundled splits: every file of tasks/bundles enrols itself."""

import json
import re

import pytest
import yaml
from tokenizers import Tokenizer

from tasks.bundle import ASSETS, SPLITS, write
from tasks.bundles.longbench import SUBSETS
from tasks.documents import split_of
from tests.turns import taking_turns


@pytest.mark.parametrize("split", taking_turns(list(SPLITS), of=2))
def test_a_split_is_regenerated_byte_for_byte(split, tmp_path):
    made = {path.name: path.read_bytes() for path in write(split, tmp_path).iterdir()}
    assert made == {path.name: path.read_bytes() for path in (ASSETS / f"{split}-mini").iterdir()}


@pytest.mark.parametrize("split", SPLITS)
def test_no_row_of_a_split_comes_twice(split):
    rows = [json.dumps(row) for path in (ASSETS / f"{split}-mini").glob("*.jsonl") for row in read(path)]
    assert len(rows) == len(set(rows)) > 0
    ids = [json.loads(row)["_id"] for row in rows if "_id" in json.loads(row)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", SUBSETS)
def test_longbench_values_belong_to_the_held_out_pool(name):
    for record in read(ASSETS / "longbench-mini" / f"{name}.jsonl"):
        assert set(record) == {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
        if name in ("report_qa", "kinds"):  # where the whole answer is a value
            assert all(split_of(part) == "held_out" for part in record["answers"][0].split())
        if record["all_classes"]:
            assert record["answers"][0] in record["all_classes"]


@pytest.mark.parametrize("split", ["needle", "ruler"])
def test_whole_prompts_have_about_their_length_and_fit_the_reference_model_uncut(split):
    reference = ASSETS / "reference"
    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    window = json.loads((reference / "config.json").read_text())["max_position_embeddings"]
    for path in sorted((ASSETS / f"{split}-mini").glob("*.jsonl")):
        for row in read(path):
            n = len(tokenizer.encode(row["context"] + row["question"]).ids) + row["max_new_tokens"]
            assert 0.85 * row["length"] < n < 1.15 * row["length"], (row["_id"], n)
            assert n < window - 500, (row["_id"], n)  # what a run leaves free by default


def test_ruler_names_and_values_are_held_out():
    for path in (ASSETS / "ruler-mini").glob("*.jsonl"):
        for row in read(path):
            found = re.findall(r"\b\d+\b", row["answers"][0]) if path.stem == "niah_multivalue" else row["answers"]
            assert all(split_of(answer) == "held_out" for answer in found), row["_id"]


def test_longbench_mini_covers_the_six_categories():
    described = yaml.safe_load((ASSETS / "longbench-mini" / "subsets.yaml").read_text())
    assert len({entry["category"] for entry in described.values()}) == 6
    assert all("{context}" in e["prompt"] and "{input}" in e["prompt"] for e in described.values())


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
