"""The base of tasks whose samples are rows: which rows, in which file a wrong one is, what is told of the settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from methods.core.errors import UserError
from tasks import rows
from tasks.base import Example
from tasks.data.rows import Text, Texts, Tokens
from tasks.rows import Hub, RowsTask

RIGHT = {"text": "a cat", "answers": ["cat"], "name": 7}


@dataclass
class Names(RowsTask):
    """A task with a setting of its own and sets on the hub."""

    title = "names"
    version = "3"
    fields: ClassVar = {"text": str, "answers": Texts, "name": Text, "most": Tokens | None}

    data: str = "bundled"
    subset: Any = None
    limit: int | None = None
    loud: bool = False

    def sets(self) -> Mapping[str, Hub]:
        return {"cats": Hub("owner/cats", "en", "test"), "dogs": Hub("owner/dogs", None, "train")}

    def example(self, id: str, tags: dict[str, Any], row: dict[str, Any]) -> Example:
        return Example(id, row["text"], "?", row["answers"], row.get("most") or 8, tags)

    def score(self, example: Example, prediction: str) -> float:
        return float(prediction in example.answers)


@dataclass
class Forgiving(Names):
    wrong_row = "failed"


def write(folder: Path, name: str, *found: Any) -> str:
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" if row else "\n" for row in found))
    return str(folder)


def test_files_are_subsets_of_which_a_limit_takes_the_first_rows(tmp_path):
    write(tmp_path, "a.jsonl", RIGHT, RIGHT, RIGHT)
    folder = write(tmp_path, "b.jsonl", RIGHT)
    whole = {example.id: example.key for example in Names(folder).examples()}
    assert list(whole) == ["a/0", "a/1", "a/2", "b/0"]
    assert [example.id for example in Names(folder, limit=2).examples()] == ["a/0", "a/1", "b/0"]
    part = {example.id: example.key for example in Names(folder, subset="b").examples()}
    assert part.items() <= whole.items() and list(part) == ["b/0"]
    task = Names(folder)
    assert task.source().startswith(f"names ({folder}), 4 samples, sha256 ")
    table = task.summarize([(example, float(example.id == "b/0")) for example in task.examples()])
    assert [(row.name, row.kind, row.score) for row in table] == [
        ("a", "subset", 0), ("b", "subset", 100), ("mean", "category", 50),
    ]  # fmt: skip


def test_every_setting_of_its_own_makes_another_cell_and_those_that_choose_samples_do_not(tmp_path):
    folder = write(tmp_path, "a.jsonl", RIGHT, RIGHT)
    told = Names(folder).fingerprint
    assert told["scores"] == "3" and told["loud"] is False and Names(folder, loud=True).fingerprint != told
    assert Names(folder, subset="a", limit=1).fingerprint == told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"text": 5}, "`text` is 5; it is a text"), ({"text": " "}, "`text` is empty; it is a text"),
        ({"answers": []}, "`answers` is empty; it is a list"), ({"answers": ["a", ""]}, "`answers` is empty; it is"),
        ({"name": None}, "`name` is null; it is a text or a number"), ({"name": ""}, "`name` is empty"),
        ({"most": 0}, "`most` is 0; it is a whole number of tokens, 1 or more"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_with_file_and_line_or_fails_its_row(wrong, said, tmp_path):
    folder = write(tmp_path, "a.jsonl", RIGHT, None, RIGHT | wrong, RIGHT)
    with pytest.raises(UserError) as refused:
        Names(folder).examples()
    assert str(refused.value).startswith(f"{tmp_path / 'a.jsonl'}, line 3: {said}")
    assert [example.error is None for example in Forgiving(folder).examples()] == [True, False, True]
    assert len(Names(folder, limit=1).examples()) == 1  # the rows that are not taken are not looked at


def test_a_missing_field_of_a_list_in_a_json_file_is_counted(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([RIGHT, {"text": "a"}]))
    with pytest.raises(UserError, match=r"a\.json, row 2: `answers` is missing; it is a list"):
        Names(str(tmp_path)).examples()


def test_of_sets_on_the_hub_only_those_that_are_chosen_are_read_and_all_are_told(monkeypatch):
    asked = []

    def hub_rows(*wanted: Any) -> tuple[list[dict[str, Any]], str]:
        asked.append(wanted)
        return [RIGHT, RIGHT | {"text": ""}], f"hub, {wanted[1]}"

    monkeypatch.setattr(rows, "hub_rows", hub_rows)
    assert [example.id for example in Names("hub", subset="dogs", limit=1).examples()] == ["dogs/0"]
    assert asked == [("names", "owner/dogs", None, "train", "pinned")]
    assert "(hub, owner/cats; hub, owner/dogs)" in Names("hub", limit=1).source()
    with pytest.raises(UserError, match=r"^hub, owner/cats; hub, owner/dogs, cats, row 2: `text` is empty"):
        Names("hub").examples()
    with pytest.raises(UserError, match=r"names: task\.subset=cows is unknown here; there are cats, dogs"):
        Names("hub", subset="cows").examples()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [({"limit": 0}, "names: task.limit=0"), ({"data": "nowhere"}, "names: task.data=nowhere: nothing at"),
     ({}, "names: task.data=bundled: nothing at"), ({"subset": []}, "names: task.subset=[] chooses nothing")],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(knobs, said, tmp_path):
    knobs = knobs if "data" in knobs or not knobs else {"data": write(tmp_path, "a.jsonl", RIGHT), **knobs}
    with pytest.raises(UserError) as refused:
        Names(**knobs).examples()
    assert str(refused.value).startswith(said)
