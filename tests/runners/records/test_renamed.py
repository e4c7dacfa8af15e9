"""Records made before names and places changed are of the same code; after any other change they are not."""

import json

import pytest

from runners.records import renamed
from runners.records.generations import Shelf
from runners.records.record import Record
from tests.runners.records.test_stored import IDENTITY

#: three trees of one project, by the hashes of their modules: the second and the third are the first by other names
FIRST, SECOND, THIRD = ["1a", "1b", "both"], ["2a", "2b", "both"], ["3a", "both"]
THEN, NOW = {"methods.a": "1a", "methods.c": "both"}, {"methods.core.a": "3a", "methods.c": "both"}


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """Lists trees for a while: trees(FIRST, SECOND)."""

    def listed(*modules):
        monkeypatch.setattr(renamed, "TABLE", tmp_path / "renamed.json")
        renamed.TABLE.write_text(json.dumps({"trees": [{"modules": tree} for tree in modules]}))
        renamed._trees.cache_clear()

    yield listed
    renamed._trees.cache_clear()


@pytest.mark.parametrize(
    "old, new, same",
    [
        (THEN, NOW, True),
        ({"m": "2a", "n": "2b"}, NOW, True),  # a tree between
        ({**THEN, "mine": "own"}, {**NOW, "mine": "own"}, True),
        ({**THEN, "mine": "own"}, {**NOW, "mine": "edited"}, False),
        ({**THEN, "mine": "own"}, NOW, False),
        (THEN, {**NOW, "methods.new": "edited"}, False),
        ({"methods.a": "edited"}, NOW, False),
        ({"methods.a": "1a", "methods.b": "2b"}, NOW, False),  # of two trees at once
        (NOW, THEN, False),  # an earlier checkout knows nothing of later names
        ({}, NOW, False),
    ],
)
def test_modules_of_listed_trees_are_the_same_and_those_of_no_tree_have_to_be_equal(trees, old, new, same):
    trees(FIRST, SECOND, THIRD)
    assert renamed.same_but_for_names(old, new) is same
    trees()
    assert not renamed.same_but_for_names(old, new)


def written(results, code, modules):
    """A record by some code."""
    conditions = {"weights": "w", "code": code}
    record = Record(results, IDENTITY, conditions)
    record.folder.mkdir(parents=True)
    record.begin(conditions, {"modules": modules, "place": "here"}).close()
    return record


def test_a_record_of_the_same_code_by_other_names_is_gone_on_with_under_its_own_conditions(trees, tmp_path):
    trees(FIRST, THIRD)
    old = written(tmp_path, "before", THEN)
    shelf, now = Shelf(tmp_path, "tiny", "needle-mini"), {"weights": "w", "code": "after", "torch": "2"}
    record, older, conditions = shelf.record_for(IDENTITY, now, NOW, "here", "auto")
    assert record.folder == old.folder and older is None
    assert conditions == {**now, "code": "before"}
    edited = {**NOW, "methods.core.a": "edited"}
    record, older, conditions = shelf.record_for(IDENTITY, now, edited, "here", "auto")
    assert record.folder != old.folder and older.folder == old.folder and conditions == now


def test_modules_of_a_wrong_type_in_a_record_are_those_of_no_tree(trees, tmp_path):
    trees(FIRST, THIRD)
    for i, wrong in enumerate(([], None, 3, {"methods.a": ["1a"]}, {"methods.a": None})):
        written(tmp_path / str(i), "before", wrong)
        shelf = Shelf(tmp_path / str(i), "tiny", "needle-mini")
        _, older, _ = shelf.record_for(IDENTITY, {"weights": "w", "code": "after"}, NOW, "here", "auto")
        assert older is not None


def test_every_listed_tree_is_whole():
    """A module's hash is eight digits, and the table is the one that benchmarks/renamed.py writes."""
    for tree in json.loads(renamed.TABLE.read_text(encoding="utf-8"))["trees"]:
        assert tree["commit"] and len(tree["modules"]) > 100
        assert all(len(one) == 8 and int(one, 16) >= 0 for one in tree["modules"])
