"""`runner=train` and the blocks that say how a method is trained."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import run
from methods import load_method
from methods.core.errors import UserError
from runners.learn.compressor import TrainCompressor
from runners.settings.trainers import for_trainer, trainer_of

CONF = str(run.CONF)
DEFAULT = run.CONF / "runner" / "train.yaml"


@pytest.mark.parametrize("runner", ["train", "train_compressor"])
def test_settings_typed_for_the_runner_reach_the_trainer_of_the_method(runner, tmp_path):
    typed = [f"runner={runner}", "method=lococo", "budget=128", f"runner.out={tmp_path}", "runner.limit=1"]
    with initialize_config_dir(CONF, version_base=None):
        cfg = compose("config", overrides=for_trainer([*typed, "runner.lr=0.5"]))
    trainer = trainer_of(cfg.method, cfg.runner, OmegaConf.load(DEFAULT)).make()
    assert isinstance(trainer, TrainCompressor)
    assert (trainer.out, trainer.limit, trainer.lr) == (str(tmp_path), 1, 0.5)
    assert trainer.batches == 80  # the block's own


def test_what_was_set_in_another_way_reaches_it_too(tmp_path):
    with initialize_config_dir(CONF, version_base=None):
        cfg = compose("config", overrides=["runner=train", "method=lococo", f"runner.out={tmp_path}"])
    trainer = trainer_of(cfg.method, cfg.runner, OmegaConf.load(DEFAULT))
    assert trainer.knobs["out"] == str(tmp_path)
    cfg.runner.width = 128
    with pytest.raises(UserError, match=r"runner.width=128: the trainer has no such setting"):
        trainer_of(cfg.method, cfg.runner, OmegaConf.load(DEFAULT))


def test_a_setting_that_no_trainer_has_is_refused_under_the_name_it_was_typed():
    assert for_trainer(["runner=train", "method=lococo", "runner.widht=1"])[-1] == "runner.widht=1"


def test_other_runners_keep_their_words():
    for words in (["runner=train", "runner.limit=3"], ["method=lococo", "runner.resamples=5"], ["runner=calibrate"]):
        assert for_trainer(words) == words


@pytest.mark.parametrize("words", [["runner=train", "method=snapkv"], ["runner=train_compressor"]])
def test_a_method_without_a_block_has_nothing_to_train(words):
    with pytest.raises(UserError, match=r"has nothing to train; runner=train makes what these need: lococo"):
        for_trainer(words)


def test_the_block_is_no_knob_of_the_method():
    assert load_method("lococo", budget=1).budget == 1
    with pytest.raises(UserError, match="lococo has no such knob"):
        load_method("lococo", train={})
