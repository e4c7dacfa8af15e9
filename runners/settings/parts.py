"""The classes that the groups `method`, `task` and `runner` name, and what is made of them."""

from __future__ import annotations

from typing import cast

from omegaconf import DictConfig, OmegaConf

from methods import method_part
from methods.core.build import Part, check_part
from runners.base import Runner
from runners.settings.trainers import check_block
from tasks.base import Task

# in the order in which they are checked
GROUPS = ("task", "method", "runner")


def part_of(cfg: DictConfig, group: str) -> Part:
    """The class and the checked settings of a group. Raises UserError for what cannot work; calls nothing."""
    node = cfg[group]
    given = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    if group == "method":
        check_block(cfg)
        return method_part(given)
    return check_part(given, Task if group == "task" else Runner, group)


def task_of(cfg: DictConfig) -> Task:
    """The task of a configuration, or what takes its place. Raises UserError for settings that cannot work."""
    return cast("Task", part_of(cfg, "task").make("chosen"))


def runner_of(cfg: DictConfig) -> Runner:
    """The runner of a configuration. Raises UserError for settings that cannot work."""
    return cast("Runner", part_of(cfg, "runner").make())
