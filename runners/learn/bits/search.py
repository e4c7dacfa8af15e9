"""The search for tables of bits: few bits, a high score, and a limit on the average bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from methods.kvtuner import Table, nominal_bits
from runners.learn.bits.bit_pairs import Group

SAMPLERS = ("nsga2", "tpe", "random")
POPULATION = 50  # of NSGA-II, where trials suffice for many of them
GENERATIONS = 8  # at least; the first one is drawn at random
SMALLEST = 4  # population: with fewer there is nothing to cross


@dataclass(frozen=True)
class Trial:
    """A table that was tried.

    bits: average bits per element, scales left out, as the paper counts.  score: higher is better.
    """

    table: Table
    bits: float
    score: float


#: scores of several tables; they are asked for together because one pass over a prompt serves them all
Score = Callable[[Sequence[Table]], Sequence[float]]


def tables(groups: Sequence[Group], choices: Sequence[int]) -> Table:
    """The table in which every group takes the pair of its choice."""
    by_layer = {layer: group.pairs[i] for group, i in zip(groups, choices, strict=True) for layer in group.layers}
    return tuple(by_layer[layer] for layer in sorted(by_layer))


def search_tables(
    groups: Sequence[Group],
    score: Score,
    limit: float,
    trials: int,
    sampler: str = "nsga2",
    seed: int = 0,
    at_once: int = 1,
) -> list[Trial]:
    """The tables tried, in order, repetitions included: score up, bits down, above `limit` bits only on the way.

    One integer per group says which of its pairs is taken. Where there are no more tables than trials, each is tried
    once and there is nothing to search. at_once: tables that `score` is asked for together; it may change the search.
    """
    population = population_of(trials)
    if sampler == "nsga2":
        at_once = min(at_once, population)  # a generation is bred from the one before, once that is known
    if math.prod(len(group.pairs) for group in groups) <= trials:
        every = [tables(groups, choices) for choices in product(*(range(len(group.pairs)) for group in groups))]
        return [trial for i in range(0, len(every), at_once) for trial in _tried(every[i : i + at_once], score)]
    import optuna

    makers: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
        "nsga2": partial(optuna.samplers.NSGAIISampler, population_size=population),
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
    }
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results: list[Trial] = []
    try:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=makers[sampler](seed=seed))
        while len(results) < trials:
            asked = [study.ask() for _ in range(min(at_once, trials - len(results)))]
            chosen = [_choose(trial, groups) for trial in asked]
            for trial, result in zip(asked, _tried(chosen, score), strict=True):
                trial.set_constraint("limit", result.bits - limit)  # above zero: the limit is broken
                study.tell(trial, (result.score, result.bits))
                results.append(result)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return results


def population_of(trials: int) -> int:
    """Tables of one generation of NSGA-II: so few that the search has several generations."""
    return max(SMALLEST, min(POPULATION, trials // GENERATIONS))


def _choose(trial, groups: Sequence[Group]) -> Table:
    return tables(groups, [trial.suggest_int(f"group {i}", 0, len(g.pairs) - 1) for i, g in enumerate(groups)])


def _tried(chosen: Sequence[Table], score: Score) -> list[Trial]:
    return [Trial(table, nominal_bits(table), value) for table, value in zip(chosen, score(chosen), strict=True)]


def front(tried: Iterable[Trial]) -> list[Trial]:
    """The trials that no other one beats in score and bits, fewest bits first; one per number of bits."""
    best: list[Trial] = []
    for trial in sorted(tried, key=lambda trial: (trial.bits, -trial.score)):
        if not best or trial.score > best[-1].score:
            best.append(trial)
    return best


def best_under(tried: Iterable[Trial], limit: float) -> Trial | None:
    """The trial with the best score of those within `limit` bits, with fewest bits where scores tie; None: no trial."""
    within = [trial for trial in tried if trial.bits <= limit]
    return max(within, key=lambda trial: (trial.score, -trial.bits), default=None)
