"""lm_eval's own task objects: found by name, with its items, a user's rows or the hub's in place of their data."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from tasks.data import pins
from tasks.data.choice_rows import read_rows
from tasks.data.files import ASSETS, commit_of, hub_set
from tasks.data.sources import cached_only, expand, hub_trouble
from tasks.prompts import lm_eval_folder

SPLITS = ("train", "validation", "test")
FEW_SHOT_SEED = 1234  # of lm_eval's own runs
# where lm_eval keeps them: looking through all its 14,000 names takes fifteen seconds
FOLDERS = {
    "piqa": "piqa",
    "copa": "super_glue/copa",
    "openbookqa": "openbookqa",
    "winogrande": "winogrande",
    "sciq": "sciq",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "hellaswag": "hellaswag",
}
BUNDLED = ASSETS / "lm_eval-mini"
OURS = {"bundled": BUNDLED, "real": ASSETS / "fewshot-real"}  # by the name that `data` gives


@dataclass(frozen=True)
class Loader:
    """Where tasks and their items come from; the settings of tasks.lm_eval.task.LmEval."""

    data: str
    include: str | None
    shots: int | None
    revision: str

    @property
    def bundled(self) -> bool:
        """Whether tasks and items are those of this repository."""
        return self.data in OURS and self.include is None

    @property
    def foreign(self) -> bool:
        """Whether task files are somebody else's."""
        folder = None if self.include is None else expand(self.include)
        return folder is not None and folder.is_dir() and folder.resolve() not in map(Path.resolve, OURS.values())

    @property
    def folder(self) -> Path | None:
        """Where the task files are that are not lm_eval's own. Raises UserError if there is nothing."""
        if self.include is None:
            return OURS[self.data] if self.bundled else None
        folder = expand(self.include)
        if not folder.is_dir():
            raise UserError(f"lm_eval: task.include={self.include}: no folder at {folder.absolute()}")
        return folder

    def names(self, typed: Sequence[str] | str | None) -> list[str]:
        """The names as typed, None for all of the folder's. Raises UserError if there are none."""
        if typed is None:
            from lm_eval.tasks import TaskManager

            names = sorted(TaskManager(include_path=str(self.folder), include_defaults=False).all_subtasks)
        else:
            names = [typed] if isinstance(typed, str) else [str(name) for name in typed]
        if not names:
            raise UserError(f"lm_eval: task.tasks={typed} with task.include={self.include} names no task")
        return list(dict.fromkeys(names))

    def load(self, names: Sequence[str]) -> dict[str, Any]:
        """lm_eval's task objects by their own names, which for a group are its members'.

        Raises UserError for a name that is unknown, of a kind that is not run here, or whose items are not to be had.
        """
        lm_eval_folder()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        tasks: dict[str, Any] = {}
        for name in names:
            for one in self._load(name):
                if one.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "generate_until"):
                    raise UserError(
                        f"lm_eval: task.tasks={name}: it is of the kind {one.OUTPUT_TYPE}, whose texts are read "
                        "without a prompt; task=perplexity measures texts through the compressed cache"
                    )
                one.set_fewshot_seed(FEW_SHOT_SEED)
                tasks[one.config.task] = one
        return tasks

    def repository(self, task: Any) -> str:
        """The repository and the commit of a task's data, where they are from the hub."""
        if self.data != "hub":
            return ""
        commit = commit_of(task.dataset)
        return f"{task.config.dataset_path}{f' at {commit[:12]}' if commit else ''}, "

    def _load(self, name: str) -> list[Any]:
        """The tasks that a name stands for: itself, or the members of a group or tag."""
        from lm_eval.tasks import TaskManager

        near = self.folder or (lm_eval_folder(FOLDERS[name]) if name in FOLDERS else None)
        manager = TaskManager(include_path=str(near) if near else None, include_defaults=near is None)
        if name not in manager.task_index and self.folder is not None and not self.bundled:
            manager = TaskManager(include_path=str(near))
        if name not in manager.task_index:
            bundled = f"bundled are {', '.join(sorted(manager.all_tasks))}; others need task.data=hub or task.data=DIR"
            known = bundled if self.bundled else "`lm-eval ls tasks` lists lm-eval's own"
            raise UserError(f"lm_eval: task.tasks={name} is unknown here; {known}")
        overrides: dict[str, Any] = {}
        rows: dict[str, Any] = {}
        if self.shots is not None:
            overrides["num_fewshot"] = self.shots
        if self.bundled or self.data not in ("hub", "bundled"):
            # lm_eval looks into its training split even where it draws nothing from it
            rows = {"train": [], **read_rows(name, OURS[self.data] if self.bundled else expand(self.data))}
            overrides |= {"custom_dataset": lambda **_: _data_sets(rows), "dataset_kwargs": None}
        trouble = hub_trouble() if self.data == "hub" else None
        try:
            with cached_only(trouble is not None), self._revisions():
                # what its `load` does with a name, but with settings of our own
                built = manager._factory.build(
                    manager.task_index[name], overrides=overrides, registry=manager.task_index
                )
                return list(manager.load(built)["tasks"].values())
        except UserError:
            raise
        except Exception as error:  # of its own code and the library's, on rows of any form
            if isinstance(error, KeyError) and rows and (split := error.args[0]) in SPLITS and split not in rows:
                there = ", ".join(f"{one}.jsonl" for one in rows if rows[one] or one != "train") or "no rows"
                raise UserError(
                    f"lm_eval: task.data={self.data}: {name} reads {split}.jsonl, and there is {there}; rename the "
                    f"file that is meant, or give it as {name}.jsonl, which stands for the split that is evaluated"
                ) from error
            raise UserError(
                f"lm_eval: task.tasks={name}: task.data={self.data} does not give its items "
                f"({pins.told(error, trouble)}); "
                "offline, give task.data=DIR with <task>/<split>.jsonl, or task.data=bundled"
            ) from error

    @contextmanager
    def _revisions(self) -> Iterator[None]:
        """While it lasts, lm_eval's datasets of the hub are of `revision`."""
        if self.data != "hub":
            yield
            return
        import datasets

        load = datasets.load_dataset

        def load_at(path: str, name: str | None = None, revision: str | None = None, **more: Any) -> Any:
            if self.revision != pins.PINNED or revision is not None:
                typed = revision if self.revision == pins.PINNED else self.revision
                return hub_set(load, path, name, typed, **more)
            return pins.follow(path, lambda commit: hub_set(load, path, name, commit, **more), commit_of)

        datasets.load_dataset = load_at
        try:
            yield
        finally:
            datasets.load_dataset = load


def _data_sets(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from datasets import Dataset

    return {split: Dataset.from_list(split_rows) for split, split_rows in rows.items()}
