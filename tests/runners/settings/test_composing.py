"""Configurations of commands and cells: what Hydra itself would compose, and each choice of files composed once."""

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from runners.settings.check import plain
from runners.settings.composing import CONF, Composer, composer, once

SHARED = ("task=needle", "task.limit=3", "model.max_length=500")


@pytest.fixture
def begun():
    """Hydra as a command line has begun it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture
def composed(monkeypatch) -> list[list[str]]:
    """The overrides of every configuration that Hydra composes."""
    calls, real = [], ConfigLoaderImpl.load_configuration

    def load(self, config_name, overrides, *args, **kwargs):
        calls.append(list(overrides))
        return real(self, config_name, overrides, *args, **kwargs)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", load)
    return calls


@pytest.mark.parametrize(
    "cell",
    [
        ("method=snapkv", "method.window=8", "budget=0.2"),
        ("method=snapkv", "+method.extra={a: [1, 2]}", "++method.extra.b=x y", "seed=3"),
        ("method=snapkv", "~method.kernel", "++method.budget=7"),
        ("method=adakv", "method.allocator.alpha=0.5"),
    ],
)
def test_a_cell_is_what_hydra_composes_of_its_overrides(begun, cell):
    cfg, numbers = Composer(begun, [])([*SHARED, *cell])
    for key, value in numbers.items():
        cfg[key] = value
    assert plain(cfg) == plain(compose("config", overrides=[*SHARED, *cell]))
    assert cfg.hydra.runtime.choices["method"] == cell[0].partition("=")[2]


@pytest.mark.parametrize(
    "knob", ["method.windw=8", "~method.windw", "+method.window=3", "method.window=1,2", "method.=1"]
)
def test_a_knob_that_cannot_be_set_is_refused_in_hydras_words(begun, knob):
    said = []
    for make in (lambda words: Composer(begun, [])(words), lambda words: compose("config", overrides=words)):
        with pytest.raises(HydraException) as error:
            make(["method=snapkv", knob])
        said.append(str(error.value))
    assert said[0] == said[1]


def test_files_are_composed_once_and_a_cells_knobs_are_its_own(begun, composed):
    first, second = Composer(begun, ["hydra.verbose=true"]), Composer(begun, ["hydra.verbose=true"])
    windows = [first(["method=snapkv", f"method.window={n}", "budget=0.5"])[0].method.window for n in (8, 16)]
    assert windows == [8, 16] and first(["method=snapkv"])[0].method.window not in windows
    cfg, numbers = second(["method=snapkv", "seed=2", "method.window=8"])
    assert cfg is first(["method=snapkv", "method.window=8"])[0] and numbers == {"seed": 2}
    assert composed == [["hydra.verbose=true", "method=snapkv"]]


def test_another_command_composes_anew(composed):
    for _ in range(2):
        with initialize_config_dir(str(CONF), version_base="1.3"), composer([]) as make:
            make(["method=snapkv"])
    assert len(composed) == 2


def test_a_process_without_a_command_composes_the_files_that_ship():
    assert not GlobalHydra.instance().is_initialized()
    with composer([]) as make:
        assert make(["method=nacl"])[0].hydra.runtime.choices["method"] == "nacl"
    assert not GlobalHydra.instance().is_initialized()


LOAD = ConfigLoaderImpl.load_configuration


def command(load, loader, words, mode):
    """What Hydra does with a command: its mode without a check of sweeps, then the configuration that is run."""
    words = list(words)
    load(loader, "config", words, RunMode.MULTIRUN, validate_sweep_overrides=False)
    words.append(f"hydra.mode={mode.name}")
    cfg = load(loader, "config", words, mode)
    return OmegaConf.to_container(cfg, resolve=False)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (RunMode.RUN, ("method=snapkv", "+method.extra=1", "budget=0.2")),
        (RunMode.MULTIRUN, ("experiment=core", "hydra.verbose=true")),
        (RunMode.MULTIRUN, ("method=snapkv,full", "budget=0.2,0.3", "task=needle")),
    ],
)
def test_a_command_is_composed_once_into_what_hydra_composes_in_two_passes(mode, words, begun, monkeypatch):
    expected, passes = command(LOAD, begun, words, mode), []
    compose = ConfigLoaderImpl._load_configuration_impl
    monkeypatch.setattr(
        ConfigLoaderImpl, "_load_configuration_impl", lambda *a, **k: passes.append(1) or compose(*a, **k)
    )
    load = once(LOAD)
    assert command(load, begun, words, mode) == expected and passes == [1]
    assert command(load, begun, words, mode) == expected and passes == [1, 1]  # another command is another


def test_what_only_a_run_refuses_is_refused_after_its_mode_was_learnt(begun, tmp_path):
    load = once(LOAD)
    for asked in (LOAD, load):
        with pytest.raises(ConfigCompositionException, match="Ambiguous value for argument 'budget="):
            command(asked, begun, ["budget=0.1,0.2"], RunMode.RUN)
    (tmp_path / "db").mkdir()
    (tmp_path / "config.yaml").write_text('defaults: [{db: "???"}, _self_]')
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        command(load, loader, [], RunMode.MULTIRUN)
        with pytest.raises(ConfigCompositionException, match="You must specify 'db'"):
            command(load, loader, [], RunMode.RUN)
