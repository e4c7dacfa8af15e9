"""Commits of the hub's datasets, pinned when they are first read."""

import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from methods.core.errors import UserError
from tasks.data import pins
from tasks.data.files import hub_rows
from tasks.gsm8k import GSM8K
from tasks.lm_eval.task import LmEval
from tasks.longbench.task import LongBench

OLD, NEW = "0123456789abcdef0123456789abcdef01234567", "f" * 40
ROOT = Path(__file__).parents[3]
ROW = {"question": "1 + 1?", "answer": "#### 2"}


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch) -> Path:
    """A pins file of the test's own, which is not there yet."""
    monkeypatch.setenv("KVFRONTIER_PINS", str(tmp_path / "pins.yaml"))
    return tmp_path / "pins.yaml"


class Hub:
    """Datasets within reach, whose newest commit can move on; `asked` holds (repository, revision) in order."""

    def __init__(self) -> None:
        self.newest, self.asked = OLD, list[tuple[str, str | None]]()
        self.gone: set[str] = set()

    def commit(self, repo: str, revision: str | None) -> str:
        self.asked.append((repo, revision))
        commit = self.newest if revision in (None, "main", "v1") else str(revision)
        if commit in self.gone:
            raise FileNotFoundError(f"Revision '{revision}' doesn't exist")
        return commit

    def load(self, path: str, name: str | None = None, split: str | None = None, revision: str | None = None) -> Any:
        at = f"/cache/some___set/default/0.0.0/{self.commit(path, revision)}/set-test.arrow"
        rows = datasets.Dataset.from_list([ROW])
        rows.__class__ = type("Rows", (datasets.Dataset,), {"cache_files": [{"filename": at}]})
        return rows if split else datasets.DatasetDict(test=rows)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(datasets, "load_dataset", found.load)
    monkeypatch.setattr("tasks.data.sources.unreachable", lambda url: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return found


def read(revision: str = "pinned", repo: str = "a/set") -> str:
    """What the first line of the output says about the rows."""
    return hub_rows("some", repo, None, "test", revision)[1]


def test_the_newest_commit_is_pinned_when_it_is_first_read_and_asked_for_from_then_on(hub, file):
    assert read() == f"hub, a/set, test, revision pinned ({OLD[:12]})"
    assert pins.read() == {"a/set": OLD} and f"\na/set: {OLD}\n" in file.read_text()
    hub.newest = NEW
    assert read() == f"hub, a/set, test, revision pinned ({OLD[:12]})"
    assert hub.asked == [("a/set", "main"), ("a/set", OLD)]


@pytest.mark.parametrize("typed", ["main", "v1", NEW])
def test_a_typed_revision_neither_reads_nor_writes_pins(typed, hub, file):
    file.write_text("no: pins")
    read(typed)
    assert hub.asked == [("a/set", typed)] and file.read_text() == "no: pins"


def test_two_splits_share_one_pin(hub):
    task = GSM8K(shots=1)
    assert f"revision pinned ({OLD[:12]})" in task.source()
    assert hub.asked == [("openai/gsm8k", "main"), ("openai/gsm8k", OLD)]
    assert pins.read() == {"openai/gsm8k": OLD}


def test_a_pin_leaves_the_fingerprint_as_it_is(hub):
    assert GSM8K(shots=1).fingerprint == GSM8K(shots=1).fingerprint == GSM8K(shots=1, revision="main").fingerprint


def test_a_pin_is_never_overwritten(file):
    assert pins.add("a/set", OLD) == OLD and pins.add("a/set", NEW) == OLD
    assert pins.add("another/set", NEW) == NEW
    assert pins.read() == {"a/set": OLD, "another/set": NEW}
    assert {path.name for path in file.parent.iterdir()} == {"pins.yaml", ".pins.yaml.lock"}


def test_who_is_second_reads_what_the_first_has_pinned(hub, monkeypatch):
    def load(*args: Any, **more: Any) -> Any:
        pins.add("a/set", NEW)  # another process, while this one loads
        return hub.load(*args, **more)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert NEW[:12] in read() and hub.asked == [("a/set", "main"), ("a/set", NEW)]


def test_pins_of_processes_that_write_at_once_all_survive(file):
    code = "import sys; from tasks.data import pins\nfor i in range(25): pins.add(f'{sys.argv[1]}/{i}', sys.argv[2])"
    running = [subprocess.Popen([sys.executable, "-c", code, name, OLD], cwd=ROOT) for name in ("one", "two", "three")]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    assert set(pins.read()) == {f"{name}/{i}" for name in ("one", "two", "three") for i in range(25)}


def test_a_file_that_cannot_be_written_is_said_once_and_nothing_else(hub, file, monkeypatch, caplog):
    file.write_text("")
    monkeypatch.setenv("KVFRONTIER_PINS", str(file / "inside" / "pins.yaml"))
    with caplog.at_level(logging.WARNING):
        assert OLD[:12] in read() and OLD[:12] in read("pinned", "another/set")
    (said,) = [one.getMessage() for one in caplog.records if one.name == "tasks.data.pins"]
    assert f"{file}/inside/pins.yaml cannot be written" in said and "KVFRONTIER_PINS names another" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"a/set: {OLD}\nb/set: main\n", r", line 2: b/set needs a commit of 40"),
        (f"a/set: {OLD}\na/set: {NEW}\n", r", line 2: a/set has a second commit"),
        (f"a/set: {{x: {OLD}}}\n", r", line 1: a/set needs a commit"),
        (f"- {OLD}\n", r": needs lines of `owner/name: commit`"),
        (f"<<<<<<< ours\na/set: {OLD}\n=======\n", r": cannot be read \(.*line 2"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(text, said, hub, file):
    file.write_text(text)
    for reads in (read, LongBench("hub").source, LmEval("piqa", "hub").source):
        with pytest.raises(UserError, match=f"^{file}{said}"):
            reads()
    assert hub.asked == [] and file.read_text() == text


def test_a_folder_in_the_files_place_is_named(file):
    file.mkdir()
    with pytest.raises(UserError, match=r"pins\.yaml: not a file"):
        pins.read()


def test_a_commit_of_digits_only_is_no_number(hub, file):
    file.write_text(f"a/set: {'1' * 40}\n")
    read()
    assert hub.asked == [("a/set", "1" * 40)]
    pins.add("b/set", "2" * 40)
    assert pins.read() == {"a/set": "1" * 40, "b/set": "2" * 40}


def test_a_pin_that_the_hub_no_longer_has_names_its_file_and_how_to_get_the_newest(hub, file):
    read()
    hub.newest, hub.gone = NEW, {OLD}
    gone = rf"a/set at task\.revision=pinned cannot be fetched .*Revision '{OLD}' doesn't exist; "
    with pytest.raises(UserError, match=rf"{gone}{file} pins {OLD}; task\.revision=main takes the newest"):
        read()
    assert NEW[:12] in read("main") and pins.read() == {"a/set": OLD}


def test_a_library_that_falls_back_to_another_commit_is_not_believed(hub, monkeypatch):
    pins.add("a/set", OLD)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: hub.load(*args, **more | {"revision": "main"}))
    hub.newest = NEW
    with pytest.raises(UserError, match=f"in the cache is {NEW}, and not {OLD}.*pins {OLD}"):
        read()


def test_what_has_no_known_commit_is_read_and_not_pinned(hub, file, monkeypatch):
    rows = datasets.Dataset.from_list([ROW])  # which has no files
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: rows)
    assert read() == "hub, a/set, test, revision main" and not file.exists()
    assert read(OLD) == f"hub, a/set, test, revision {OLD}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        read(OLD)


def test_longbench_reads_its_pin_from_the_cache_and_the_newest_from_the_hub(hub, file, monkeypatch, tmp_path):
    def download(repo: str, name: str, *, repo_type: str, revision: str, local_files_only: bool) -> str:
        if local_files_only and revision == "main":
            pytest.fail("took the newest in the cache for the newest there is")
        at = tmp_path / "snapshots" / hub.commit(repo, revision)
        at.mkdir(parents=True, exist_ok=True)
        (at / "lcc.jsonl").write_text('{"context": "c", "input": "", "answers": ["a"], "length": 1}\n')
        with zipfile.ZipFile(at / name, "w") as archive:
            archive.write(at / "lcc.jsonl", "data/lcc.jsonl")
        return str(at / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    first = LongBench("hub")
    assert first.source().startswith(f"longbench (hub, revision {OLD[:12]})")
    typed = LongBench("hub", revision="main").fingerprint
    hub.newest = NEW
    again = LongBench("hub")
    with monkeypatch.context() as alone:
        alone.setattr("tasks.data.sources.unreachable", lambda url: pytest.fail("asked whether the hub answers"))
        assert again.fingerprint == first.fingerprint == typed
    assert pins.read() == {"THUDM/LongBench": OLD}
    assert LongBench("hub", revision="main").fingerprint["hub_commit"] == NEW
    hub.gone = {OLD}
    with pytest.raises(UserError, match=rf"task\.revision=pinned is not .*; {file} pins {OLD}; task\.revision=main"):
        LongBench("hub").source()


def own_task(folder: Path, name: str, more: str = "") -> None:
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: a/{name}\ntest_split: test\noutput_type: generate_until\n"
        f'doc_to_text: "{{{{question}}}}"\ndoc_to_target: answer\nmetric_list: [{{metric: exact_match}}]\n{more}'
    )


def test_lm_evals_datasets_are_pinned_unless_their_task_names_a_revision(hub, tmp_path):
    own_task(tmp_path, "free")
    own_task(tmp_path, "bound", "dataset_kwargs: {revision: v1}\n")
    load = datasets.load_dataset

    def made(**more: Any) -> LmEval:
        return LmEval(["free", "bound"], "hub", include=str(tmp_path), trust_include=True, **more)

    first = made()
    assert f"a/free at {OLD[:12]}" in first.source() and pins.read() == {"a/free": OLD}
    hub.newest = NEW
    again = made()
    assert f"a/free at {OLD[:12]}" in again.source() and f"a/bound at {NEW[:12]}" in again.source()
    assert again.fingerprint == first.fingerprint
    assert hub.asked == [("a/free", None), ("a/bound", "v1"), ("a/free", OLD), ("a/bound", "v1")]
    hub.asked.clear()
    made(revision="main").source()
    assert hub.asked == [("a/free", "main"), ("a/bound", "main")] and pins.read() == {"a/free": OLD}
    hub.gone = {OLD}
    with pytest.raises(UserError, match=rf"does not give its items .*pins {OLD}; task\.revision=main.*offline, give"):
        made().source()
    assert datasets.load_dataset == load  # as it was
