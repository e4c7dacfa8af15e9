"""Cells beside the full cache on the same samples: gathered task by task, and the means of their subsets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis import stats
from analysis.load import Results
from analysis.names import at, bits, labels

WHOLE = "all"  # the category of a point over the whole task
KEYS = ["model", "task", "protocol"]
NEAR_CHANCE = 5.0  # points of 100 above chance: below that a full cache's score says nothing about a method
ENOUGH = 0.9  # of the full cache's samples; with fewer a point is on no front and under no area
#: what may differ between a method's cell and the full cache's: its own code; and what tells models apart by name
OWN = {"code", "artefacts", "weights", "files"}
COLUMNS = ["score", "bytes", "above"]
PLACE = ["subset", "category", "measure", "weight", "chance", "control"]
OF_SEED = " of seed "  # in the name of a column, behind what it is of
CONTENT = ["key", "end"]  # what tells two samples of one id apart; empty where a record does not say


@dataclass
class Cells:
    """The cells of one curve at one point, one per seed, beside the full cache's.

    first: a row of `Results.cells`, with `label` and `bits`.  names, full: of the cells.
    samples: by id, those that all have: score, by seed too, share, read, bytes, full (its score), and where they
    belong.
    wanted: samples that the full cache has.
    """

    first: pd.Series
    names: list[str]
    seeds: int
    full: list[str]
    samples: pd.DataFrame
    wanted: int

    @property
    def partial(self) -> bool:
        """Whether so many samples are missing that the rest says little, such as after a missed budget."""
        return len(self.samples) < ENOUGH * self.wanted


@dataclass
class Compared:
    """What is compared with one full cache: a task of a model under a protocol, and all cells of it.

    key: the values of KEYS; a task whose samples have several measures is one of these for each measure.
    """

    key: dict[str, str]
    cells: list[Cells] = field(default_factory=list)


def gathered(results: Results, x: str = "held") -> Iterator[Compared]:
    """Everything that has a full cache beside it, task by task; the rest is named in `results.problems`."""
    cells = results.cells.assign(label=labels(results.cells), bits=results.cells["config"].map(bits))
    for values, group in cells.groupby(KEYS, sort=True):
        key = dict(zip(KEYS, values))
        compared = _beside_full(results, key, group, x)
        measures = list(dict.fromkeys(m for one in compared for m in one.samples["measure"].unique()))
        for measure in measures:
            key_of_measure = {**key, "task": f"{key['task']}, {measure}"} if len(measures) > 1 else key
            yield Compared(key_of_measure, list(_of_measure(compared, measure)))


def _of_measure(compared: Sequence[Cells], measure: str) -> Iterator[Cells]:
    for one in compared:
        samples = one.samples[one.samples["measure"] == measure]
        if len(samples):
            wanted = one.wanted * len(samples) // len(one.samples)
            yield Cells(one.first, one.names, one.seeds, one.full, samples, wanted)


def _beside_full(results: Results, key: dict[str, str], cells: pd.DataFrame, x: str) -> list[Cells]:
    where, problems = f"{key['model']}, {key['task']}, {key['protocol']}", list[str]()
    fulls = {paired: _full(results, rows) for paired, rows in cells[cells["method"] == "full"].groupby("paired")}
    compared, others = [], {}
    for _, group in cells.groupby(["label", "budget", "bits", "config", "paired"], sort=True):
        first = group.iloc[0]
        name = f"{first['label']} at {at(first)}"
        if first["paired"] not in fulls:
            problems.append(f"{where}: no full cache to compare with; {name} left out")
            continue
        full, full_cells = fulls[first["paired"]]
        columns = dict.fromkeys([*COLUMNS, "read", x])
        samples = by_sample(results, list(group["cell"]), list(columns))
        samples = samples.assign(share=samples[x])
        samples, others_content = beside(samples, full)
        if others_content:
            problems.append(f"{where}: {name}: {others_content} samples left out, the full cache's have other contents")
        if samples.empty:
            failed = next((e for cell in group["cell"] for e in results.errors.get(cell, [])), "")
            problems.append(
                f"{where}: {name} shares no finished sample with the full cache; {failed or 'none finished'}"
            )
            continue
        if said := _differs(first, results.cells.loc[full_cells[0]]):
            others[name] = said
        compared.append(Cells(first, list(group["cell"]), group["seed"].nunique(), full_cells, samples, len(full)))
    if not fulls:
        problems = [f"{where}: no full cache to compare with; {len(cells)} cells left out"]
    for said in dict.fromkeys(others.values()):
        rows = [name for name, why in others.items() if why == said]
        problems.append(f"{where}: {', '.join(rows)}: other conditions than the full cache's, {said}")
    results.problems += [problem for problem in problems if problem not in results.problems]
    return compared


def _full(results: Results, cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The full cache's scores by id, whichever of its cells has them, and the names of its cells."""
    tables = [results.by_cell[cell][["score", *CONTENT]] for cell in cells["cell"] if cell in results.by_cell]
    grouped = pd.concat(tables or [results.finished.iloc[:0][["score", *CONTENT]]]).groupby(level=0)
    return grouped["score"].mean().rename("full").to_frame().join(grouped[CONTENT].first()), list(cells["cell"])


def beside(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Two tables by sample as one, of the samples that both have; and how many of these have two contents.

    Columns of CONTENT are of `ours`.
    """
    both = ours.join(theirs, how="inner", rsuffix=" theirs")
    same = pd.Series(True, index=both.index)
    for name in CONTENT:
        mine, other = both[name], both[f"{name} theirs"]
        same &= (mine == other) | (mine == "") | (other == "")
    return both[same].drop(columns=[f"{name} theirs" for name in CONTENT]), int((~same).sum())


def _differs(cell: pd.Series, full: pd.Series) -> str:
    """What of the latest conditions of two cells differs, their own code and files left aside."""
    ours, theirs = ({k: v for k, v in c["conditions"][-1].items() if k not in OWN} for c in (cell, full))
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return "; ".join(f"{name} is {ours.get(name)}, was {theirs.get(name)}" for name in names)


def by_sample(results: Results, cells: Sequence[str], columns: Sequence[str] = ("score",)) -> pd.DataFrame:
    """Columns of the finished samples of cells that differ in their seed only, averaged over the seeds; by id.

    Only samples that all of the cells have; with what tells where they belong, and the score by seed (`seed_scores`).
    """
    told = [*PLACE, *CONTENT]
    by_seed = sorted(cells, key=lambda cell: results.cells.at[cell, "seed"])
    tables = [results.by_cell[cell][[*columns, *told]] for cell in by_seed if cell in results.by_cell]
    if len(tables) < len(cells):
        return results.finished.set_index("id")[[*columns, *told]].iloc[:0]
    if len(tables) == 1:
        return tables[0]
    grouped = pd.concat(tables).groupby(level=0, sort=True)
    table = grouped[list(columns)].mean().join(grouped[told].first())
    table = table.assign(**{f"score{OF_SEED}{i}": one["score"] for i, one in enumerate(tables)})
    return table[(grouped.size() == len(cells)) & (grouped["key"].nunique() == 1)]


def seed_scores(samples: pd.DataFrame, name: str = "score") -> np.ndarray:
    """The scores of samples by seed, [n, seeds], seeds in order; one column where there is one seed."""
    columns = [column for column in samples.columns if str(column).startswith(name + OF_SEED)]
    return samples[columns or [name]].to_numpy()


@dataclass
class Means:
    """Means of the subsets of some samples, [1 + resamples, subsets, k]: the mean itself first, then resampled.

    subsets, categories: of every subset.  counts: which of them count in the average.  over: what that is a mean of.
    place, inside: of every sample, [n], its subset and its share in that subset's mean.
    """

    values: np.ndarray
    subsets: np.ndarray
    categories: np.ndarray
    counts: np.ndarray
    over: str
    place: np.ndarray
    inside: np.ndarray

    def chosen(self, category: str = WHOLE) -> np.ndarray:
        """Which subsets make the average of a category, or of the whole task; [subsets], True counts."""
        return self.counts if category == WHOLE else self.categories == category

    def weights(self, category: str = WHOLE) -> np.ndarray:
        """What each subset counts in that average, [subsets]; they add up to 1."""
        chosen, weights = self.chosen(category), np.zeros(len(self.subsets))
        if chosen.any():
            over = self.over if category == WHOLE else "subsets"
            weights[chosen] = stats.subset_weights(self.categories[chosen], over)
        return weights

    def sample_weights(self, category: str = WHOLE) -> np.ndarray:
        """What each sample counts in that average, [n]; they add up to 1."""
        return self.weights(category)[self.place] * self.inside

    def rests_on_one(self, category: str = WHOLE) -> bool:
        """Whether a subset of that average has a single sample, so that the average has no interval."""
        return stats.rests_on_one(self.sample_weights(category), [str(subset) for subset in self.place])

    def over_seeds(self, sides: Sequence[tuple[str, int]]) -> "Means":
        """The same of means over seeds, [1 + resamples, subsets, sides]: seeds are drawn again as samples are.

        sides: of each its method's name, by which seeds are drawn, and how many of the columns are its seeds.
        """
        merged, at = [], 0
        for method, seeds in sides:
            weights = stats.seed_weights(seeds, method, len(self.values) - 1)
            merged.append(np.einsum("rsk,rk->rs", self.values[..., at : at + seeds], weights))
            at += seeds
        return replace(self, values=np.stack(merged, axis=-1))

    def average(self, category: str = WHOLE) -> np.ndarray:
        """[1 + resamples, k]."""
        return np.tensordot(self.values, self.weights(category), axes=([1], [0]))


def subset_means(
    samples: pd.DataFrame, values: np.ndarray, over: str, draw: Callable[..., np.ndarray] = stats.bootstrap,
    resamples: int = stats.RESAMPLES,
) -> Means:  # fmt: skip
    """Means of values [n, k] of samples (a table with PLACE, by id), drawn inside each subset by `draw`."""
    weights, ids, draws = samples["weight"].to_numpy(), samples.index.to_numpy(), []
    grouped = samples.groupby(["category", "subset"], sort=False)
    subset_of = grouped.ngroup().to_numpy()  # [n]
    first = grouped[["control"]].first().reset_index()
    for i, (category, subset) in enumerate(zip(first["category"], first["subset"])):
        rows = subset_of == i
        draws.append(draw(values[rows], weights[rows], ids[rows], stats.stratum(category, subset), resamples))
    return Means(
        np.stack(draws, axis=1), first["subset"].to_numpy(), first["category"].to_numpy(),
        ~first["control"].to_numpy(dtype=bool), over, subset_of, weights / np.bincount(subset_of, weights)[subset_of],
    )  # fmt: skip


def alike(cells: Sequence[Cells]) -> Iterator[list[Cells]]:
    """Cells that have the same samples of the same full cache, together."""
    groups: dict[tuple, list[Cells]] = {}
    for one in cells:
        groups.setdefault((one.first["paired"], one.first["mean_over"], *one.samples.index), []).append(one)
    yield from groups.values()


def near_chance(full: stats.Estimate, chance: float, metric: dict[str, Any]) -> bool:
    """Whether a full cache's score, in points of 100, is no more than guessing: then no method can lose anything."""
    if metric["better"] != "higher" or metric["scale"] != 100:
        return False
    return bool(full.value < chance + NEAR_CHANCE or (chance > 0 and full.low <= chance))


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for as many comparisons, in the given order; none at all gives none."""
    if not len(p):
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(one) for one in multipletests(p, method="holm")[1]]
