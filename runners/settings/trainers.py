"""`runner=train`: a method's YAML may say how what it needs is trained, in a block of its own, `train:`.

The block names a Runner of runners/learn and its settings. On the command line these are typed as `runner.KEY=VALUE`,
as those of every other runner; here they find the block. Without `method=` the reference model is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from methods import method_names, method_yaml
from methods.core.build import Part, check_part
from methods.core.errors import UserError
from runners.base import Runner

TRAIN, BLOCK = "train", "train"
#: what runner=train names: the trainer of the reference model
TRAINS = "runners.learn.reference.train.Train"
#: how it was spelled when one method had a trainer
OLD = "train_compressor"


def for_trainer(words: Sequence[str]) -> list[str]:
    """A command line whose `runner.KEY=VALUE` is `method.train.KEY=VALUE` where the block has the key.

    Raises UserError for a method that has no such block.
    """
    given = dict(word.partition("=")[::2] for word in words if "=" in word and not word.startswith("-"))
    runner, method = given.get("runner"), given.get("method")
    if runner not in (TRAIN, OLD) or (method is None and runner == TRAIN):
        return list(words)
    if method is not None and method not in method_names():
        return list(words)  # one of the user's own, or a name that Hydra refuses with the right ones
    block = None if method is None else method_yaml(method).get(BLOCK)
    if block is None:
        have = ", ".join(name for name in method_names() if method_yaml(name).get(BLOCK))
        raise UserError(
            f"method={method or 'nothing'}: has nothing to train; runner=train makes what these need: {have}; without "
            "method= it trains the reference model"
        )
    written = []
    for word in words:
        key, _, value = word.partition("=")
        name = key.removeprefix("runner.")
        if word == f"runner={OLD}":
            written.append(f"runner={TRAIN}")
        else:
            written.append(f"method.{BLOCK}.{name}={value}" if key != name and name in block else word)
    return written


def check_block(cfg: DictConfig) -> None:
    """Raises UserError where the method's block, if it has one, holds a setting that cannot work."""
    method, runner = cfg.method, cfg.runner
    if OmegaConf.is_dict(method) and method.get(BLOCK) is not None:
        training = OmegaConf.is_dict(runner) and runner.get("_target_") == TRAINS
        check_part(_plain(method[BLOCK]), Runner, "runner" if training else f"method.{BLOCK}")


def trainer_of(method: DictConfig, runner: DictConfig, default: Any) -> Part | None:
    """The trainer that a method's configuration names, with what `runner` says otherwise than its file `default`.

    None where the method has no block. Raises UserError for settings that cannot work.
    """
    if method.get(BLOCK) is None:
        return None
    block = _plain(method[BLOCK])
    typed = {key: value for key, value in _plain(runner).items() if value != default.get(key)}
    if unknown := sorted(set(typed) - set(block)):
        raise UserError(f"runner.{unknown[0]}={typed[unknown[0]]}: the trainer has no such setting; it has "
                        f"{', '.join(key for key in block if key != '_target_')}")  # fmt: skip
    return check_part({**block, **typed}, Runner, "runner")


def _plain(node: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {"_target_": values}
