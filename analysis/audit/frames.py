"""The cells that one comparison is made of: a method at one budget, under every pin, with its score and with nulls.

A null is the method itself with `score_by` set, so that pins, slots and cuts are its own; where that has not been run,
`method=random` or `method=recency` under the same pins takes its place, but for the method's own pins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.load import Results
from analysis.names import flat, labels
from analysis.paired import KEYS, beside, by_sample, seed_scores

KNOBS = ("pin", "score_by", "draw")
NULLS = ("random", "recency", "random_in_counts")
ORDER = ("own", "none", "boundary", "prompt")


@dataclass
class Frame:
    """One method at one budget on one task of a model, under a protocol.

    key: the values of KEYS.  method: its name, with the knobs that tell it from others of the name.
    samples: those that all cells have, with what tells where they belong.
    scores: by (what ranks, pin), [n, seeds].  held: the same, mean bytes at the prompt's end.  full [n]: scores of the
    full cache.
    draw: how the nulls were drawn.  above: samples above their budget in any of the cells.
    """

    key: dict[str, str]
    method: str
    budget: float
    metric: dict[str, Any]
    over: str
    samples: pd.DataFrame
    scores: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    held: dict[tuple[str, str], float] = field(default_factory=dict)
    full: np.ndarray | None = None
    draw: str = "fixed"
    above: int = 0

    @property
    def pins(self) -> list[str]:
        """Pins under which the method's own score was run, its own first."""
        return sorted({pin for by, pin in self.scores if by == "own"}, key=_order)

    def mean(self, by: str, pin: str) -> np.ndarray | None:
        """Scores [n], averaged over seeds; None where there is no such cell."""
        found = self.scores.get((by, pin))
        return None if found is None else found.mean(1)


def frames(results: Results) -> Iterator[Frame]:
    """Every method with its cells, task by task; what has no null beside it is passed over."""
    cells = _with_knobs(results.cells)
    for values, group in cells.groupby([*KEYS, "paired"], sort=True):
        key = dict(zip(KEYS, values))
        full = list(group.loc[group["method"] == "full", "cell"])
        rest = group[group["method"] != "full"]
        plain = rest[rest["method"].isin(NULLS) & (rest["score_by"] == "own")]
        for (method, budget, _), own in rest.drop(plain.index).groupby(["label", "budget", "frame"], sort=True):
            if (own["score_by"] != "own").any() or len(plain):
                frame = _frame(results, key, str(method), float(budget), own, plain[plain["budget"] == budget], full)
                if frame is not None:
                    yield frame


def _with_knobs(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with what ranks and what is pinned in each, and the rest of its configuration and name apart."""
    configs = [json.loads(config) for config in cells["config"]]
    rest = [json.dumps({k: v for k, v in one.items() if k not in KNOBS}, sort_keys=True) for one in configs]
    named = cells.assign(
        pin=[_pin(one.get("pin", "own")) for one in configs],
        score_by=[one.get("score_by", "own") for one in configs],
        draw=[one.get("draw", "fixed") for one in configs],
        frame=rest,
    )
    return named.assign(label=labels(named.assign(config=rest)))


def _pin(pin: str | dict[str, Any]) -> str:
    """A pin in a few words."""
    if isinstance(pin, str):
        return pin
    told = flat(pin)
    shares = f"{told.get('first', 0.1):g}+{told.get('newest', 0.1):g}"
    return f"{told.get('at')} {shares}{' prompt end' if told.get('end') == 'prompt' else ''}"


def _order(pin: str) -> tuple[int, str]:
    return (ORDER.index(pin.split()[0]) if pin.split()[0] in ORDER else len(ORDER), pin)


def _frame(
    results: Results, key: dict[str, str], method: str, budget: float, own: pd.DataFrame, plain: pd.DataFrame,
    full: Sequence[str],
) -> Frame | None:  # fmt: skip
    groups = {group: list(rows["cell"]) for group, rows in own.groupby(["score_by", "pin"], sort=True)}
    pins = {pin for by, pin in groups if by == "own"}
    for (null, pin), rows in plain.groupby(["method", "pin"], sort=True):
        if pin in pins and pin != "own":
            groups.setdefault((str(null), str(pin)), list(rows["cell"]))
    groups = {(by, pin): cells for (by, pin), cells in groups.items() if by == "own" or pin in pins}
    if not any(by != "own" for by, _ in groups):
        return None
    tables = {group: by_sample(results, cells, ("score", "bytes", "above")) for group, cells in groups.items()}
    if any(table.empty for table in tables.values()):
        names = ", ".join(f"{by} {pin}" for (by, pin), table in tables.items() if table.empty)
        results.problems.append(f"{key['task']}: {method} at budget {budget:g}: {names} finished no sample, left out")
        tables = {group: table for group, table in tables.items() if not table.empty}
    whole = by_sample(results, full[:1]) if full else None
    everyone = [*tables.values(), *([whole] if whole is not None and len(whole) else [])]
    if not tables or not any(by == "own" for by, _ in tables):
        return None
    common = everyone[0]
    for table in everyone[1:]:
        common = common.loc[beside(common, table[["key", "end"]])[0].index]
    if common.empty:
        results.problems.append(f"{key['task']}: {method} at budget {budget:g}: its cells share no sample, left out")
        return None
    first = own.iloc[0]
    at = common.index
    return Frame(
        key, method, budget, first["metric"], first["mean_over"], common,
        {group: seed_scores(table.loc[at]) for group, table in tables.items()},
        {group: float(table.loc[at, "bytes"].mean()) for group, table in tables.items()},
        whole.loc[at, "score"].to_numpy() if whole is not None and len(whole) else None,
        " and ".join(sorted(set(own["draw"]))),
        int(max((table.loc[at, "above"] > 0).sum() for table in tables.values())),
    )  # fmt: skip
