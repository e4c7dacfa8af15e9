"""The sweeper behind `-m`: cells that can share one pass over their prompts become one job.

Hydra finds sweepers in the namespace package `hydra_plugins` beside run.py. A grid is taken apart as Hydra's own
sweeper does; jobs that differ only in what a method is (method, its knobs, budget, seed) are handed on as one job whose
`cells` holds the overrides of each. Every launcher takes such jobs: one after the other, over cores, over a cluster.
"""

# no `from __future__ import annotations`: Hydra runs this file before it is a module that dataclasses can look up
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from methods import method_names, method_part, method_yaml
from methods.core.typed import conform, hints_of
from runners.jobs import Failed, announce, apart, group, job_cells, tidy, with_references
from runners.records.record import check_writable
from runners.settings import auto
from runners.settings.composing import Composer
from runners.settings.config import Config

# runners that take a group; training, or a measurement of speed, does not
RUNNERS = ("evaluate",)
# ways of task=perplexity whose pieces and counted tokens depend on the cap
CAPPED = ("stream", "chunk")
# `budget=sweep` stands for the points that the method's YAML names
POINTS = "sweep"


@dataclass
class GroupedSweeperConf:
    """Its settings, as Hydra's own sweeper has them; shards: jobs that one group is cut into."""

    _target_: str = "hydra_plugins.grouped_sweeper.GroupedSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    shards: int = 1


ConfigStore.instance().store(
    group="hydra/sweeper", name="grouped", node=GroupedSweeperConf, package="hydra.sweeper", provider="kvfrontier"
)


class GroupedSweeper(BasicSweeper):
    """Hydra's grid, in groups.

    shards: jobs per group; they share the group's samples between them.
    """

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None, shards: int = 1):
        super().__init__(max_batch_size, params)
        if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
            raise ValueError(f"hydra.sweeper.shards={shards}: give a whole number, 1 or more")
        self.shards = shards
        self._composer: Composer | None = None

    def sweep(self, arguments: list[str]) -> Any:
        """Hydra's own; but of a job that has said what failed, Hydra would print every override once more."""
        assert self.launcher is not None and self.config is not None
        given = self.config.results
        given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
        results = conform(given, hints_of(Config)["results"], "results")  # Hydra writes there first
        if not Path(results).expanduser().is_dir():  # what is finished in one that is read-only is shown
            check_writable(Path(results).expanduser())
        launch = self.launcher.launch

        def launched(jobs: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            results = launch(jobs, initial_job_idx=initial_job_idx)
            for result in results:
                if result.status == JobStatus.FAILED and isinstance(result._return_value, Failed):
                    raise result._return_value
            return results

        self.launcher.launch = launched  # type: ignore[method-assign, assignment]
        return super().sweep(arguments)

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """The grid as jobs; called by Hydra's sweeper with what was typed."""
        (typed,) = BasicSweeper.split_arguments(overrides, None)
        # a named grid may leave the model open; a value that is named twice is one cell
        once = dict.fromkeys(tuple(map(auto.settled, cell)) for cell in typed)
        cells = [point for cell in once for point in self._points(tidy(cell))]
        first = self._compose(cells[0])
        if first.references:
            cells = with_references(cells, _references())
        jobs = group(cells, self._capped) if first.hydra.runtime.choices.get("runner") in RUNNERS else cells
        shards = 1 if first.dry_run else self.shards  # what is only said is said once
        jobs = [job for job in jobs for _ in range(shards if job_cells(job) else 1)]
        announce(len(jobs))
        n = max_batch_size or len(jobs)
        return [jobs[at : at + n] for at in range(0, len(jobs), n)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every job and every cell of one, so that a mistyped name is said before all else."""
        for job in batch:
            for cell in job_cells(job) or [list(job)]:
                self._compose(cell)

    def _compose(self, cell: Sequence[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        if self._composer is None:
            loader = self.hydra_context.config_loader
            self._composer = Composer(loader, self.config.hydra.overrides.hydra)
        shared, own = apart(cell)  # in the order in which a job has them
        return self._composer([*shared, *own])[0]

    def _capped(self, cell: Sequence[str]) -> bool:
        """Whether the task's texts depend on the budget: it is the cap that a text is fed through."""
        task = self._compose(cell).task
        return task.get("through") in CAPPED and OmegaConf.is_interpolation(task, "cap")

    def _points(self, cell: list[str]) -> list[list[str]]:
        """The cell itself; for budget=sweep one cell per point of the method's own frontier."""
        if f"budget={POINTS}" not in cell:
            return [cell]
        plain = [override for override in cell if override != f"budget={POINTS}"]
        method = self._compose(plain).method
        points = [plain]
        method_part(OmegaConf.to_container(method, resolve=True) if OmegaConf.is_config(method) else method)
        for key, values in (method.get("sweep") or OmegaConf.create({"budget": [1]})).items():
            name = "budget" if key == "budget" else f"method.{key!s}"
            points = [[*point, f"{name}={value}"] for point in points for value in values]
        return points


def _references() -> dict[str, bool]:
    """The methods whose YAML says that others are measured against them, and whether they take a budget."""
    found = {name: method_yaml(name) for name in method_names()}
    plain = {name: OmegaConf.to_container(yaml) for name, yaml in found.items() if "reference" in yaml}
    return {name: "${budget}" in str(yaml["budget"]) for name, yaml in plain.items()}  # type: ignore[index,call-overload]
