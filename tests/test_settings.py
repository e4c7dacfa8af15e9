"""Every setting of every YAML with wrong values: one line that names it, or a run that the value allows."""

import copy
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import run
from methods import build_method, load_method
from methods.core.errors import UserError
from runners.cells import Run
from runners.engine.loading import checkpoint_of
from runners.settings.check import check_config, plain
from runners.settings.config import Config
from runners.settings.parts import runner_of, task_of
from runners.settings.words import quoted, read
from tests.test_every_task import CASES
from tests.wrong.values import WRONG, changed, composed, keys, outcome, sample

GROUPS = ("model", "method", "task", "runner", "wandb")
MODELS = sorted(path.stem for path in (run.CONF / "model").glob("*.yaml"))
#: of the models, which all have the same settings, a folder, a model that is fetched, a shape, options of a template
SOME = ("reference", "smollm2-135m", "llama3.1-8b", "qwen3-8b")
FILES = [
    f"{group}/{path.stem}"
    for group in GROUPS
    for path in sorted((run.CONF / group).glob("*.yaml"))
    if group != "model" or path.stem in SOME
]
A_FEW = 1  # wrong value of each setting in a short test, another one for every setting: all are met


def configuration(file: str, tmp_path: Path, model: Path) -> tuple[DictConfig, list[str]]:
    """A configuration with the file chosen, and the settings of it; "" stands for conf/config.yaml."""
    group, _, name = file.partition("/")
    own = {
        "task": lambda: [f"task={name}", *CASES[name](tmp_path / "data")],
        "": lambda: ["task.limit=1"],
    }.get(group, lambda: ["task.limit=1", f"{group}={name}"])()
    place = [] if group == "model" else [f"model.path={model}"]
    cfg = composed(f"results={tmp_path / 'results'}", *place, *own)
    ours = (lambda key: key.split(".")[0] == group) if group else (lambda key: key.split(".")[0] not in GROUPS)
    return cfg, list(filter(ours, keys(cfg)))


def prepared(cfg: DictConfig, file: str, results: Path) -> None:
    """All that comes before a model is loaded, of what the file's settings can spoil."""
    check_config(cfg)
    group, _, name = file.partition("/")
    if group == "runner":
        runner_of(cfg)
    elif group == "method":
        build_method(name, plain(cfg)["method"])
    elif group == "model":
        checkpoint_of(cfg.model)
    else:
        task = task_of(cfg)
        if not name.startswith("lm_eval"):  # which looks through 14,000 files for a name that it does not know
            Run(cfg, task, results, "nacl")
            task.source()


def finished(cfg: DictConfig, file: str, results: Path) -> None:
    """The whole run, where it takes no training."""
    if file.startswith("runner") and file != "runner/evaluate":
        return prepared(cfg, file, results)
    check_config(cfg)
    run.execute(cfg)


def complaints(
    file: str, tmp_path: Path, model: Path, attempt: Callable[[DictConfig, str, Path], None], n: int
) -> list[str]:
    cfg, names = configuration(file, tmp_path, model)
    assert names
    check_config(changed(cfg, names[0], OmegaConf.select(cfg, names[0])))  # as it stands it is right
    found = []
    for key in names:
        for label in sample(list(WRONG), key, n):
            made = changed(cfg, key, WRONG[label])
            problem = outcome(lambda made=made: attempt(made, file, tmp_path / "results"), key)  # type: ignore[misc]
            found += [f"{key} = {label}: {problem}"] if problem else []
    return found


@pytest.mark.parametrize("file", ["", *FILES])
def test_a_wrong_value_of_any_setting_ends_in_one_line_or_in_a_run_that_it_allows(file, tmp_path, tiny_model_dir):
    assert not complaints(file, tmp_path, tiny_model_dir, prepared, A_FEW)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", *FILES])
def test_all_wrong_values_of_all_settings_end_in_one_line_or_in_a_run(file, tmp_path, tiny_model_dir):
    assert not complaints(file, tmp_path, tiny_model_dir, finished, len(WRONG))


def test_the_files_of_all_models_have_the_same_settings():
    found = {name: composed(f"model={name}") for name in MODELS}
    settings = found["reference"].model.keys()
    assert len(found) > len(SOME) and {name for name in found if found[name].model.keys() != settings} == set()
    for cfg in found.values():
        check_config(cfg)


def test_every_setting_of_the_configuration_has_a_type_and_the_other_way_round():
    assert sorted(composed()) == sorted(Config.__dataclass_fields__)


once = cache(composed)


def refused(*overrides: str, **values: Any) -> str:
    cfg = copy.deepcopy(once(*overrides))
    for key, value in values.items():
        cfg = changed(cfg, key.replace("__", "."), value)
    with pytest.raises(UserError) as found:
        check_config(cfg)
    return str(found.value)


def test_a_target_is_a_subclass_of_what_its_place_takes_and_is_not_called_otherwise(tmp_path):
    victim = tmp_path / "kept.txt"
    victim.write_text("kept")
    for target in ("os.remove", "shutil.copy", "torch.load", "torch.nn.Linear", "methods.core.store.Store"):
        node = {"_target_": target, "path": str(victim), "src": str(victim), "dst": str(tmp_path / "copy")}
        for group in ("method", "task", "runner"):
            said = refused(**{group: node})
            assert f"{group}._target_={target}: is no " in said and "takes a subclass of" in said
        said = refused("method=snapkv", method__store={**node, "_partial_": True})
        assert ("method.store" in said) and ("is no Store" in said or "path: no such setting" in said)
        assert "method.allocator._target_" in refused("method=snapkv", method__allocator=node)
        assert "method.window._target_" in refused("method=snapkv", method__window=node)
        assert "task.subset[0]._target_" in refused(task__subset=[node])
    assert victim.read_text() == "kept" and not (tmp_path / "copy").exists()


def test_a_module_of_pythons_own_library_is_not_even_imported():
    assert "antigravity" not in sys.modules
    assert "method._target_=antigravity.fly: is no Method" in refused(method={"_target_": "antigravity.fly"})
    assert "antigravity" not in sys.modules


def test_a_class_that_only_says_what_its_kind_is_cannot_be_chosen():
    assert "give a subclass of it" in refused(task={"_target_": "tasks.base.Task"})
    assert "give a subclass of it" in refused(
        "method=snapkv", method__allocator={"_target_": "methods.core.allocate.Allocator"}
    )


def test_a_target_that_nothing_uses_is_an_unknown_setting():
    assert refused(x={"_target_": "os.getcwd"}).startswith("x: no such setting")
    assert "model.chat_options.a._target_=os.getcwd: no such setting" in refused(
        model__chat_options={"a": {"_target_": "os.getcwd"}}
    )


def test_a_store_that_is_no_partial_says_what_to_give():
    store = {"_target_": "methods.kivi.KIVI", "_partial_": False}
    assert "method.store._partial_=false: give true" in refused("method=snapkv", method__store=store)
    assert "method.store._partial_=abc: give true or false" in refused(
        "method=snapkv", method__store={**store, "_partial_": "abc"}
    )


def test_a_method_of_ones_own_may_raise_what_it_likes(tmp_path, monkeypatch):
    (tmp_path / "of_my_own.py").write_text(
        "from dataclasses import dataclass\nfrom methods.core.eviction import Eviction\n\n"
        "@dataclass\nclass Mine(Eviction):\n    size: int = 1\n\n"
        "    def __post_init__(self):\n        super().__post_init__()\n"
        "        if self.size == 2:\n            raise ValueError('two is too much')\n        1 / self.size\n"
    )
    (tmp_path / "broken_of_my_own.py").write_text("x = 1\nundefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"_target_": "of_my_own.Mine", "budget": 0.5}
    assert build_method("mine", mine).budget == 0.5
    with pytest.raises(UserError, match="method: Mine: ValueError: two is too much"):
        build_method("mine", {**mine, "size": 2})
    with pytest.raises(UserError, match=r"ZeroDivisionError: .*of_my_own\.py, line 12"):
        build_method("mine", {**mine, "size": 0})
    with pytest.raises(UserError, match=r"method\.size=abc: give a whole number"):
        build_method("mine", {**mine, "size": "abc"})
    with pytest.raises(UserError, match=r"cannot be imported \(NameError: .*broken_of_my_own\.py, line 2"):
        build_method("mine", {"_target_": "broken_of_my_own.Mine"})


@pytest.mark.parametrize("value", ["/a/k=v", "模型", "é", "a(b", "[a", "a#b", "it's", 'a"b', "{a", "a b'", "it's \"\\"])
def test_what_hydras_grammar_cannot_read_is_refused_with_the_way_to_quote_it(value):
    assert read(f"model.path={quoted(value)}").value() == value
    try:
        read(f"model.path={value}")
    except UserError as error:
        assert "quote it twice: " in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.path=/a/k=v", "quote it twice: 'model.path=\"/a/k=v\"'"),
        ("model.path=模型", "quote it twice: 'model.path=\"模型\"'"),
        ("budget", "budget: settings are written key=value"),
        ("=x", "nothing is no setting's name"),
        ("a b=c", "a b is no setting's name"),
        ("experiment=-1", "experiment=-1: unknown; give experiment=NAME"),
        ("hydra/launcher=[1]", "hydra/launcher=[1]: unknown; give hydra/launcher=NAME"),
        ("model.resize=" + "[" * 5000, "quote it twice"),
        ("hydra.launcher._target_=os.system", "hydra.launcher._target_=os.system: is no launcher"),
        ("+hydra.launcher.x._target_=os.getcwd", "hydra.launcher.x._target_=os.getcwd: no such setting"),
        ("+hydra.callbacks.x._target_=os.getcwd", "hydra.callbacks.x._target_=os.getcwd: is no Callback"),
        ("+hydra.callbacks=abc", "hydra.callbacks"),
        ("+hydra.job_logging.handlers.x={(): os.getcwd}", ""),
        ("--config-dir=/nowhere", "/nowhere"),
    ],
)
def test_a_word_that_cannot_be_used_is_refused_in_one_line(word, says, monkeypatch, capfd):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("KVFRONTIER_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["run.py", word, "plan=true"])
    assert run.main() == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and says in err, err


def test_the_version_is_said_with_the_commit(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run.py", "--version"])
    assert run.main() == 0
    assert re.fullmatch(r"kvfrontier \d+\.\d+\.\d+, commit (\w+\+?|unknown)\n", capfd.readouterr().out)


def test_windows_is_told_of_wsl_before_anything_is_imported_that_it_lacks(monkeypatch, capfd):
    monkeypatch.setattr(sys, "platform", "win32")
    assert run.main() == 2
    err = capfd.readouterr().err
    assert "WSL" in err and "fcntl" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("results", ["", "null", "[a]", "/proc/kvfrontier", "/dev/null/below"])
@pytest.mark.parametrize("sweep", [[], ["-m", "method=full,nacl"]])
def test_a_results_folder_that_cannot_be_is_named_and_nothing_is_made(results, sweep, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("KVFRONTIER_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", f"results={results}", *sweep])
    assert run.main() == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and f"results={results}" in err, err
    assert not list(tmp_path.iterdir())


def test_a_name_with_letters_of_any_language_is_a_folder_when_it_is_quoted():
    assert composed('model.path="模型 é"').model.path == "模型 é"
    assert load_method("snapkv", window=16).window == 16
