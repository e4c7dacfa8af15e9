"""Data from the hub, up to the network: revisions, what was downloaded before, and what is said where nothing is."""

import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from methods.core.errors import UserError
from tasks.base import Task
from tasks.data import pins
from tasks.data.files import hub_rows
from tasks.gsm8k import GSM8K
from tasks.lm_eval.task import LmEval
from tasks.longbench.task import LongBench
from tasks.longbench_v2 import LongBenchV2
from tasks.multiturn import MultiTurn
from tasks.needle import Needle
from tasks.perplexity import Perplexity
from tasks.ruler.task import Ruler
from tasks.summarization import Summarization
from tasks.tokens import Tokens

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TASKS: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "gsm8k": (GSM8K, {}),
    "lm_eval": (LmEval, {"tasks": "piqa"}),
    "longbench": (LongBench, {}),
    "longbench_v2": (LongBenchV2, {}),
    "multiturn": (MultiTurn, {"subset": "scbench_kv"}),
    "needle": (Needle, {}),
    "perplexity": (Perplexity, {}),
    "ruler": (Ruler, {}),
    "summarization": (Summarization, {}),
}
V2 = {f"choice_{letter}": "x" for letter in "ABCD"} | {
    "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": "q", "context": "c",
    "answer": "A",
}  # fmt: skip
# what the tasks that read whole sets find there
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gsm8k": ("openai/gsm8k", {"question": "1 + 1?", "answer": "#### 2"}),
    "longbench_v2": ("THUDM/LongBench-v2", V2),
    "multiturn": ("microsoft/SCBench", {"context": "c", "multi_turns": [{"input": "q", "answer": "a"}]}),
    "needle": ("baber/paul_graham_essays", {"text": "An essay. Another sentence."}),
    "perplexity": ("Salesforce/wikitext", {"text": "a text\n"}),
    "ruler": ("baber/paul_graham_essays", {"text": "An essay. Another sentence."}),
    "summarization": ("abisee/cnn_dailymail", {"article": "a", "highlights": "b"}),
}
LETTERS = Tokens(encode=lambda text: list(map(ord, text)), decode=lambda ids: "".join(map(chr, ids)), longest=4096)


def made(name: str, **more: Any) -> Task:
    kind, knobs = TASKS[name]
    if name == "gsm8k":
        knobs = {"shots": 1}
    task = kind(data="hub", **knobs, **more)  # type: ignore[call-arg]
    task.fit(lambda: LETTERS)
    return task


class Found(list):
    """Rows as the library gives them: a list that knows its files."""

    def __init__(self, rows: list[dict[str, Any]], commit: str):
        super().__init__(rows)
        self.cache_files = [{"filename": f"/cache/some___set/default/0.0.0/{commit}/set-test.arrow"}]


@pytest.fixture(autouse=True)
def own_pins(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KVFRONTIER_PINS", str(tmp_path_factory.mktemp("pins") / "pins.yaml"))


@pytest.fixture
def hub(monkeypatch):
    """A hub within reach that has one row of everything; gives the list of what was asked of it."""
    asked: list[tuple[str, str]] = []

    def load_dataset(repo: str, name: str | None, split: str, revision: str) -> Found:
        asked.append((repo, revision))
        return Found([row for _, (known, row) in ROWS.items() if known == repo][:1], COMMIT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("tasks.data.sources.unreachable", lambda url: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("name", ROWS)
def test_every_task_pins_what_it_reads_first(name, hub):
    line, repo = made(name).source(), ROWS[name][0]
    assert f"hub, {repo}, " in line and f"revision pinned ({COMMIT[:12]})" in line
    assert pins.read() == {repo: COMMIT} and hub[0] == (repo, "main")
    hub.clear()
    assert made(name).source() == line and set(hub) == {(repo, COMMIT)}


@pytest.mark.parametrize("name", ROWS)
def test_a_typed_revision_is_asked_for_and_the_first_line_says_what_came(name, hub):
    line = made(name, revision="v1").source()
    repo = ROWS[name][0]
    assert set(hub) == {(repo, "v1")}
    assert f"hub, {repo}, " in line and f"revision v1 ({COMMIT[:12]})" in line


@pytest.mark.parametrize("name", TASKS)
def test_the_offline_switch_is_obeyed_and_names_the_way_without_a_hub(name, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"task\.data=hub.*HF_HUB_OFFLINE is set.*offline, give task\.data=(PATH|DIR)"):
        made(name).source()


@pytest.mark.parametrize("name", ["gsm8k", "lm_eval"])
def test_a_hub_out_of_reach_is_asked_for_nothing(name, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tasks.data.sources.unreachable", lambda url: "no route")
    with pytest.raises(UserError, match="no route"):
        made(name).source()
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # as they were


def in_cache(folder: Path, rows: list[dict[str, Any]], commit: str) -> None:
    """What the library leaves behind when it has downloaded the test split of openai/gsm8k."""
    from datasets.arrow_writer import ArrowWriter

    at = folder / "openai___gsm8k" / "main" / "0.0.0" / commit
    at.mkdir(parents=True)
    with ArrowWriter(path=str(at / "gsm8k-test.arrow"), features=datasets.Dataset.from_list(rows).features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    split = {"name": "test", "num_examples": len(rows), "dataset_name": "gsm8k"}
    info = datasets.DatasetInfo(features=datasets.Dataset.from_list(rows).features, splits={"test": split})
    info.dataset_name, info.config_name, info.version = "gsm8k", "main", datasets.Version("0.0.0")
    info.write_to_directory(str(at))


def test_what_was_downloaded_before_is_found_without_a_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = [{"question": "1 + 1?", "answer": "#### 2"}]
    in_cache(tmp_path, rows, COMMIT)
    found, where = hub_rows("gsm8k", "openai/gsm8k", "main", "test", "main")
    assert found == rows and where == f"hub, openai/gsm8k, test, revision main ({COMMIT[:12]})"
    assert hub_rows("gsm8k", "openai/gsm8k", "main", "test", COMMIT)[0] == rows
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub_rows("gsm8k", "openai/gsm8k", "main", "test", COMMIT[::-1])


def test_of_two_downloads_the_pinned_one_is_found_without_a_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    older, newer = ([{"question": "1 + 1?", "answer": f"#### {n}"}] for n in (2, 3))
    in_cache(tmp_path, older, COMMIT)
    found, where = hub_rows("gsm8k", "openai/gsm8k", "main", "test", "pinned")
    in_cache(tmp_path, newer, COMMIT[::-1])
    os.utime(tmp_path / "openai___gsm8k" / "main" / "0.0.0" / COMMIT, (1, 1))
    assert hub_rows("gsm8k", "openai/gsm8k", "main", "test", "main")[0] == newer
    assert hub_rows("gsm8k", "openai/gsm8k", "main", "test", "pinned") == (found, where) and found == older
    assert where == f"hub, openai/gsm8k, test, revision pinned ({COMMIT[:12]})"
    shutil.rmtree(tmp_path / "openai___gsm8k" / "main" / "0.0.0" / COMMIT)
    with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE is set; .*pins {COMMIT}; task\.revision=main"):
        hub_rows("gsm8k", "openai/gsm8k", "main", "test", "pinned")


def test_a_revision_belongs_to_the_hub():
    with pytest.raises(UserError, match=r"task\.revision=v1 with task\.data=bundled"):
        LmEval(revision="v1")
