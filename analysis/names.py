"""Names that tell apart what must not be mixed: models under two settings, tasks with two sets of samples, curves."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

#: settings of a task that differ along one curve, because the budget decides them
BY_BUDGET = {"cap"}
#: knobs that are places on one curve, not different curves
ALONG = {"budget", "bits", "key_bits", "value_bits", "table"}
LONGEST = 24  # characters of a value in a name


def told_apart(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells, whose `model` and `task` name what differs among those that were called the same.

    `paired` is added: what a cell and the full cache's cell must have in common to have the same samples.
    """
    model = _renamed(cells, "model", _model)
    task = _renamed(cells, "task", lambda row: _without(flat(json.loads(row["fingerprint"])), BY_BUDGET))
    return cells.assign(model=model, task=task, paired=cells["fingerprint"])


def numbers_of(cells: pd.DataFrame) -> list[str]:
    """A line where caches of the cells hold numbers of several types, whose shares are no one scale."""
    held = {"auto" if (one := json.loads(passes).get("cache_dtype")) is None else one for passes in cells["passes"]}
    if len(held) < 2:
        return []
    return [f"caches of {' and '.join(sorted(held))} numbers (cache.dtype) are shown apart: a share is of a full cache "
            "of the same type"]  # fmt: skip


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested knobs under dotted names."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        settings |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return settings


def varied(knobs: list[dict[str, Any]]) -> list[str]:
    """The names whose values differ."""
    names = sorted({name for one in knobs for name in one})
    return [name for name in names if len({json.dumps(one.get(name)) for one in knobs}) > 1]


def _model(row: pd.Series) -> dict[str, Any]:
    made_of = {name: row[name] for name in ("dtype", "weights", "files")}
    # records made before caches could hold another type than the model's do not say so
    return {**made_of, "cache_dtype": "auto", **flat(json.loads(row["passes"]))}


def _renamed(cells: pd.DataFrame, column: str, settings: Callable[[pd.Series], dict[str, Any]]) -> pd.Series:
    renamed = cells[column].copy()
    for name, group in cells.groupby(column):
        by_cell = {cell: settings(row) for cell, row in group.iterrows()}
        differ = varied(list(by_cell.values()))
        for cell, knobs in by_cell.items() if differ else ():
            renamed[cell] = f"{name} ({', '.join(f'{knob}={_short(knobs.get(knob))}' for knob in differ)})"
    return renamed


def _without(knobs: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in knobs.items() if name not in names}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.removeprefix("sha256:")
    if len(text) == 64:
        return text[:8]  # a digest
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def labels(cells: pd.DataFrame) -> pd.Series:
    """Each cell's curve: the method's name, and the knobs in which its cells differ where they do.

    "(reads)" stands behind a method whose budget is for what it reads: beside others it is another budget.
    """
    by_cell = {}
    for (method, _), group in cells.groupby(["method", "model"]):
        configs = [flat(json.loads(c)) for c in group["config"]]
        differ = [name for name in varied(configs) if name.rpartition(".")[2] not in ALONG]
        for cell, config in zip(group.index, configs):
            # a knob that a configuration lacks is one that was not set
            name = f"{method} (reads)" if group.get("binds", {}).get(cell) == "read" else str(method)
            by_cell[cell] = " ".join([name, *(f"{knob}={config[knob]}" for knob in differ if knob in config)])
    return pd.Series(by_cell).reindex(cells.index)


def bits(config: str) -> str:
    """The bits that a method's configuration, as JSON, was given instead of a budget; "" where it names none."""
    knobs = flat(json.loads(config))
    if isinstance(table := knobs.get("table"), str):
        return Path(table).name.removesuffix(".yaml").removesuffix(".yml")  # C3.25 has no suffix
    key, value = knobs.get("key_bits"), knobs.get("value_bits")
    if key is None or value is None:
        return ""
    return f"{key} bits" if key == value else f"K{key}V{value}"


def at(point: Mapping[str, Any] | pd.Series) -> str:
    """Where a point lies on its curve, from its `budget` and `bits`."""
    return point["bits"] or f"budget {point['budget']:g}"
