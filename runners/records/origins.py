"""What a record says of where it comes from: the command that computes it again, the user's data, classes by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from methods.core import home
from methods.core.contract import Method
from tasks.base import Task
from tasks.data.sources import expand


def own_data(task: Task) -> str:
    """The name of the file or folder that a task's samples come from, where that is one of the user's own."""
    data = str(getattr(task, "data", ""))  # random tokens come from nowhere
    if data in ("", "bundled", "real", "hub"):
        return ""
    path = expand(data)
    return path.resolve().name if path.exists() else ""


def kind_of(method: Method) -> dict[str, Any]:
    """What kind of method it is, for figures and tables; "binds" where its budget is for other bytes than held ones."""
    binds = {"binds": method.binds} if method.binds != "held" else {}
    return {"family": method.family, "simulated": method.simulated, **binds}


def command_of(name: str, words: Sequence[str]) -> str:
    """What computes the samples of one cell again, whether it was asked for alone, in a sweep, or as a reference."""
    left_out = ["method", "results", "resume", "hydra", "plan", "dry_run", "experiment", "cells", "wandb"]
    left_out += ["budget"] * (name == "full")
    kept = [word for word in words if word.lstrip("+~").split("=")[0].split(".")[0].split("/")[0] not in left_out]
    knobs = [word for word in words if name != "full" and word.lstrip("+").startswith("method.")]
    # in one order, however they were given
    return " ".join([home.COMMAND, f"method={name}", *sorted(knobs), *sorted(kept)])


def targets(node: Any) -> list[str]:
    """Every `_target_` in a configuration, at any depth."""
    if not isinstance(node, dict):
        return []
    named = [node["_target_"]] if "_target_" in node else []
    return named + [target for value in node.values() for target in targets(value)]
