"""Checks of a composed configuration, before anything is loaded or called."""

from __future__ import annotations

import dataclasses
import re
from importlib import metadata
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from methods.core.budget import check_budget
from methods.core.errors import UserError
from methods.core.typed import conform, hints_of, no_target, settings
from runners.settings.config import CacheNumbers, Config, Group, Kernels, Model, Sampled, Tracking
from runners.settings.explain import pip_install

PARTS = ("method", "task", "runner")
SEVERAL = (Model, Tracking, Kernels, Group, Sampled, CacheNumbers)  # settings of settings


def check_config(cfg: DictConfig) -> None:
    """Raises UserError for a value that cannot work: first what needs no import, then the parts that are named.

    What a setting's type makes of a value, and defaults of settings that are missing, are written back.
    """
    settle(cfg)
    from runners.settings.parts import GROUPS, part_of  # imports torch

    for group in GROUPS:
        part_of(cfg, group)


def settle(cfg: DictConfig) -> None:
    """The same without the parts, for which their modules would have to be imported."""
    model = cfg.get("model")
    if OmegaConf.is_list(model):  # what tasks take from the model's settings cannot be looked for in a list
        conform(OmegaConf.to_container(model), hints_of(Config)["model"], "model")
    given = plain(cfg)
    for group in ("model", *PARTS):
        if group not in given or given[group] is None:
            raise UserError(f"{group}: nothing is chosen; give {group}=NAME")
    if "budget" in given:
        check_budget(given["budget"])
    checked = settings(given, Config, "")
    checked["protocol"] = checked["protocol"].removeprefix("query_")  # as records have it
    for key, value in given.items():
        if key not in PARTS:
            no_target(value, key)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", checked["device"]):
        raise UserError(f"device={checked['device']}: give auto, cpu, cuda, or one of several such as cuda:1")
    if checked["wandb"].mode != "disabled" and not _has("wandb"):
        raise UserError(f"wandb={checked['wandb'].mode}: needs the package wandb; {pip_install('wandb')}")
    with open_dict(cfg):
        for key, value in checked.items():
            settled = dataclasses.asdict(value) if isinstance(value, SEVERAL) else value
            if key not in PARTS and settled != given.get(key):
                cfg[key] = settled


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, without Hydra's own."""
    values = {}
    for key in cfg:
        if key != "hydra":
            node = cfg[key]
            config = OmegaConf.is_config(node)
            values[str(key)] = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if config else node
    return values
