"""model=auto, the default: the real model where its file is, else the one that ships; and the task's texts with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from methods.core.home import CACHE
from runners.engine.sources import fetched
from runners.settings import auto
from tests.wrong.values import composed

REAL, SMALL = "model=smollm2-135m", "model=reference"


@pytest.fixture
def nothing_named(monkeypatch, tmp_path):
    """A machine on which nothing was fetched, and an environment that names no model."""
    monkeypatch.delenv(auto.NAME, raising=False)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


@pytest.fixture
def fetched_model(nothing_named) -> Path:
    """A file where the real model's would lie; nothing reads it."""
    place = fetched.folder() / fetched.SMOLLM2.name / fetched.SMOLLM2.file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"GGUF")
    return place


def taken(*words: str) -> tuple[str, str, int | None, str]:
    """The choice, its path and prompt length, and the data of the task, of a command line."""
    with auto.decided(words) as left:
        cfg = composed(*left)
        return HydraConfig.get().runtime.choices["model"], cfg.model.path, cfg.model.max_length, cfg.task.data


def test_without_the_file_the_small_model_reads_generated_text(nothing_named):
    assert taken() == taken("model=auto") == taken(SMALL) == ("reference", "assets/reference", None, "bundled")
    assert auto.told("longbench-mini") is None  # the last one named it


def test_with_the_file_the_real_model_reads_real_text(fetched_model):
    real = ("smollm2-135m", "SmolLM2-135M-Instruct", 7500, "real")
    assert taken() == taken("model=auto") == taken(REAL) == real
    assert taken(SMALL) == ("reference", "assets/reference", None, "bundled")
    assert taken("task.data=bundled")[3] == taken(REAL, "task.data=bundled")[3] == "bundled"
    assert taken("model.max_length=900")[:3] == ("smollm2-135m", "SmolLM2-135M-Instruct", 900)
    assert taken("task=needle")[3] == "bundled"
    assert auto.NAME not in os.environ


def test_another_checkpoint_gets_nothing_that_is_the_real_models(fetched_model):
    assert taken("model.path=here") == ("reference", "here", None, "bundled")
    assert taken("model.init=random", "model.shape=here")[2] is None


def test_a_model_that_nothing_can_read_is_not_taken(fetched_model, monkeypatch):
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    assert taken()[0] == "reference"


def test_the_environment_may_name_the_model(fetched_model, monkeypatch):
    monkeypatch.setenv(auto.NAME, "qwen3-8b")
    assert taken()[0] == taken("model=auto")[0] == "qwen3-8b" and taken(REAL)[0] == "smollm2-135m"
    taken()
    assert auto.told("longbench-mini") == f"model=qwen3-8b on longbench-mini: {auto.NAME} names it"
    monkeypatch.setenv(auto.NAME, "auto")
    assert taken()[0] == "smollm2-135m"


def test_a_named_grid_may_leave_the_model_open(run_command, tmp_path):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {model: auto, method: snapkv, budget: 0.5}}}\n"
    )
    words = (f"--config-dir={tmp_path / 'conf'}", "experiment=mine", "dry_run=true", f"results={tmp_path / 'results'}")
    code, out, err = run_command(*words)
    assert code == 0, err
    assert "longbench-mini" in out and "snapkv" in out  # the tests name the reference model


def test_the_choice_stands_in_the_place_of_auto_where_several_models_are_swept(fetched_model):
    with auto.decided(["-m", "model=auto,reference", "budget=0.5"]) as words:
        assert words == ["-m", f"{REAL},reference", "budget=0.5"]
    with auto.decided(["experiment=core", "model=auto"]) as words:  # which names another one
        assert words == ["experiment=core", REAL]
    with auto.decided(["model=auto", "budget=0.5"]) as words:
        assert words == ["budget=0.5"]


@pytest.mark.parametrize("split", ["longbench-real", "summarization-mini", "wikitext-2"])
def test_what_was_taken_is_told_in_one_line_of_80_columns(fetched_model, monkeypatch, split):
    taken()
    assert auto.told(split) == f"{REAL} on {split}: its file is here, else {SMALL}"
    assert len(auto.told(split)) <= 80
    assert auto.named_by(HydraConfig.get()) == [REAL]
    fetched_model.unlink()
    taken()
    assert auto.told(split) == f"{SMALL} on {split}: small; make model brings a real one"
    assert len(auto.told(split)) <= 80
    taken(SMALL)
    assert auto.told(split) is None and auto.named_by(HydraConfig.get()) == []


def test_a_command_says_first_what_it_took_and_its_record_names_it(run_command, tmp_path):
    words = (f"results={tmp_path}", "method=full", "task=needle", "task.limit=1", "task.kinds=[passkey]")
    code, out, err = run_command(*words)
    assert code == 0 and out.startswith(f"{SMALL} on needle-mini: small; make model brings a real one\nneedle-mini"), (
        err
    )
    (cell,) = tmp_path.glob("reference/needle-mini/full-*/cell.json")
    assert " model=reference " in cell.read_text()
    assert run_command(*words, SMALL)[1].startswith("needle-mini")
    assert run_command("-m", *words, "budget=0.5")[1].splitlines()[2].startswith(f"{SMALL} on needle-mini")


def bringing(name: str) -> subprocess.CompletedProcess:
    """What `make run` does first, in a process of its own that finds no network."""
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "runners.settings.auto"]
    return subprocess.run(command, env={**os.environ, **nowhere, auto.NAME: name}, capture_output=True, text=True)


def test_what_cannot_be_brought_costs_a_run_one_line(nothing_named):
    done = bringing("auto")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "make model: bringing SmolLM2-135M-Instruct (98 MB) ... not now; make model says why\n"
    assert fetched.place() is None
    done = bringing("reference")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_here_is_not_brought_again(fetched_model):
    done = bringing("")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
