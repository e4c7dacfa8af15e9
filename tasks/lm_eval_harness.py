"""Any task of lm_eval, and any YAML file of its kind, on a compressed cache.

Here:  prompts, solved examples, metrics and filters are lm_eval's own objects, not copies; what is scored are the
       requests that they make. Its own model reads a request in one pass, in which no compression can be felt; here
       the prompt is compressed before the first token of a choice is predicted; with the full cache that is the same.
       A prompt is cut after its solved examples, or after the document in an item's field `context`: that is what
       protocol=agnostic compresses.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from tasks.base import Choice, Example, Task, cut_at
from tasks.data import pins
from tasks.data.choice_rows import read_rows
from tasks.data.files import ASSETS, check_limit, commit_of, hub_set
from tasks.data.sources import cached_only, expand, hub_trouble
from tasks.prompts import lm_eval_folder, lm_eval_version
from tasks.scoring import remarks
from tasks.table import Mean, mean_by_category

VERSION = "1"  # goes into every record; raise it when a score could change
SPLITS = ("train", "validation", "test")
FEW_SHOT_SEED = 1234  # of lm_eval's own runs
MOST_NEW = 256  # what lm_eval's model of the Hugging Face library takes where a task names nothing
MOST_NEW_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts there
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
# items of the published splits, by lm_eval's names
ITEMS = {
    "piqa": 1838,
    "copa": 100,
    "openbookqa": 500,
    "winogrande": 1267,
    "sciq": 1000,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042,
}
BUNDLED = ASSETS / "lm_eval-mini"


@dataclass
class LmEval(Task):
    """Tasks of lm_eval: choices compared by likelihood, a continuation's likelihood, or generated answers.

    tasks: lm_eval's names; None: all that `include` or the bundled folder have.
    data: "bundled"; "hub": what lm_eval itself loads; or a folder with <task>.jsonl, with <task>/<split>.jsonl, or with
        the authors' own files of piqa, copa and openbookqa.
    shots: solved examples before every item; None: as many as the task says.
    include: a folder with task files of one's own, as lm_eval's include_path; "bundled" data are then what they name.
    trust_include: such files run code of their own (`!function`, Jinja); true says that they may.
    stride: tokens of a choice that are fed at once; None: all. 1 is exact for methods that drop while they decode.
    limit: items per task; None takes all.
    chat: whether the model's chat template is put around a prompt, solved examples and all, as one user turn; lm_eval's
        --apply_chat_template. Without it prompts are plain text, whatever the model has.
    revision: of the data on the hub, the same for all tasks; "pinned": what a task itself names, else the commit in
        hub-pins.yaml (tasks/data/pins.py).
    """

    tasks: Sequence[str] | str | None = None
    data: str = "bundled"
    shots: int | None = None
    include: str | None = None
    trust_include: bool = False
    stride: int | None = None
    limit: int | None = None
    chat: bool = False
    revision: str = pins.PINNED

    of_samples = frozenset({"tasks", "samples_sha256"})

    def __post_init__(self) -> None:
        check_limit("lm_eval", self.limit)
        if not isinstance(self.chat, bool):
            raise UserError(f"lm_eval: task.chat={self.chat}; give true or false")
        for key, least in (("shots", 0), ("stride", 1)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"lm_eval: task.{key}={value}; give a whole number, {least} or more")
        self.data = str(self.data)
        if self.tasks is None and self.data != "bundled" and self.include is None:
            raise UserError(f"lm_eval: task.data={self.data}: which tasks? Give task.tasks, such as [piqa,copa]")
        if self._foreign and not self.trust_include:
            raise UserError(
                f"lm_eval: task.include={self.include}: task files run code of their own (!function, Jinja); read "
                "them, and give task.trust_include=true if they may"
            )
        if self.revision != pins.PINNED and self.data != "hub":
            raise UserError(f"lm_eval: task.revision={self.revision} with task.data={self.data}; give task.data=hub")

    @property
    def name(self) -> str:
        shots = "" if self.shots is None else f"-{self.shots}shot"
        return f"lm_eval{'-mini' if self._bundled else ''}{shots}{'-chat' if self.chat else ''}"

    def source(self) -> str:
        """Which tasks, which of their splits and how many items, from where."""
        found = []
        for name, task in self._loaded.items():
            n, split = len(task.eval_docs), task.config.test_split or task.config.validation_split
            odd = f", not the published {ITEMS[name]}" if ITEMS.get(name, n) != n else ""
            drawn = dict(task.config.generation_kwargs or {}).get("do_sample")
            asks = ", which asks to be drawn: sampling.temperature says how" if drawn else ""
            found.append(f"{name} ({self._repository(task)}{split}, {n} items{odd}{asks})")
        where = self.include if self.data == "bundled" and self.include is not None else self.data
        where += f", with the code of {self.include}" if self._foreign else ""
        wrapped = "in the chat template" if self.chat else "without a chat template"
        return (
            f"{self.name} ({where}): {', '.join(found)}; {len(self._examples)} samples {wrapped}, "
            f"lm_eval {lm_eval_version()}"
        )

    def _repository(self, task: Any) -> str:
        """The repository and the commit of a task's data, where they are from the hub."""
        if self.data != "hub":
            return ""
        found = commit_of(task.dataset)
        return f"{task.config.dataset_path}{f' at {found[:12]}' if found else ''}, "

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "tasks": {name: str(task.VERSION) for name, task in self._loaded.items()},
            "shots": self.shots,
            **({"chat": True} if self.chat else {}),
            "stride": self.stride,
            "samples_sha256": self._digest,
            "lm_eval": lm_eval_version(),
            "scores": VERSION,
            **({"include": self._included} if self.include is not None else {}),
        }

    @property
    def _included(self) -> str:
        """A hash of the task files of one's own: they say how an answer is read."""
        files = (
            sorted(path for path in self._folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
            if self._folder
            else []
        )
        return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]

    def examples(self) -> list[Example]:
        return self._examples

    def rate(self, example: Example, likelihoods: Sequence[tuple[float, bool]]) -> dict[str, float]:
        return self._plain(example, self._results(example, list(likelihoods)))

    def score(self, example: Example, prediction: str) -> float:
        return next(iter(self.parts(example, prediction).values()))

    def parts(self, example: Example, prediction: str) -> dict[str, float]:
        """Of a generated answer, which lm_eval's stops end and its filters read; one score per metric and filter."""
        task, (request, *_) = self._loaded[example.tags["subset"]], self._requests[example.id]
        one = copy.copy(request)
        one.resps, one.filtered_resps = [cut_at(prediction, _stops(request))], {}
        found = {}
        for filter in task._filters:
            filter.apply([one])
            (response,) = [one.filtered_resps[filter.name]]
            suffix = "" if filter.name == "none" else f", {filter.name}"
            for name, value in self._plain(example, task.process_results(one.doc, [response])).items():
                found[f"{name}{suffix}"] = value
        return found

    def means(self, examples: Sequence[Example]) -> list[Mean]:
        """One line per task and metric, then the mean of each metric over the tasks that have it."""
        subsets = [({**tags, "category": _mean_of(tags)}, mean) for tags, mean in self._subsets(examples)]
        means = mean_by_category(subsets) if len(self._loaded) > 1 else []
        return [mean for _, mean in subsets] + means

    def remarks(self, rows: remarks.Rows) -> list[str]:
        """What is more sensitive than accuracy, and which tasks the full cache itself does not know."""
        choosing = [row for row in rows if row[0].choices]
        lines: list[str | None] = [_lengths(rows)]
        if choosing and remarks.compared(rows):
            lines += [remarks.flips(choosing, _right, "samples"), _moved(choosing)]
        lines += [_guessed(choosing)] if choosing else []
        return [line for line in lines if line]

    @property
    def _foreign(self) -> bool:
        """Whether task files are somebody else's."""
        folder = None if self.include is None else expand(self.include)
        return folder is not None and folder.is_dir() and folder.resolve() != BUNDLED.resolve()

    @property
    def _bundled(self) -> bool:
        return self.data == "bundled" and self.include is None

    @cached_property
    def _folder(self) -> Path | None:
        """Where the task files are that are not lm_eval's own. Raises UserError if there is nothing."""
        if self.include is None:
            return BUNDLED if self._bundled else None
        folder = expand(self.include)
        if not folder.is_dir():
            raise UserError(f"lm_eval: task.include={self.include}: no folder at {folder.absolute()}")
        return folder

    @cached_property
    def _names(self) -> list[str]:
        if self.tasks is None:
            from lm_eval.tasks import TaskManager

            names = sorted(TaskManager(include_path=str(self._folder), include_defaults=False).all_subtasks)
        else:
            names = [self.tasks] if isinstance(self.tasks, str) else [str(name) for name in self.tasks]
        if not names:
            raise UserError(f"lm_eval: task.tasks={self.tasks} with task.include={self.include} names no task")
        return list(dict.fromkeys(names))

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """lm_eval's own task objects."""
        lm_eval_folder()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        found: dict[str, Any] = {}
        for name in self._names:
            for one in self._load(name):
                if one.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "generate_until"):
                    raise UserError(
                        f"lm_eval: task.tasks={name}: it is of the kind {one.OUTPUT_TYPE}, whose texts are read "
                        "without a prompt; task=perplexity measures texts through the compressed cache"
                    )
                one.set_fewshot_seed(FEW_SHOT_SEED)
                found[one.config.task] = one
        return found

    def _load(self, name: str) -> list[Any]:
        """The tasks that a name stands for: itself, or the members of a group or tag."""
        from lm_eval.tasks import TaskManager

        near = self._folder or (lm_eval_folder(FOLDERS[name]) if name in FOLDERS else None)
        manager = TaskManager(include_path=str(near) if near else None, include_defaults=near is None)
        if name not in manager.task_index and self._folder is not None and not self._bundled:
            manager = TaskManager(include_path=str(near))
        if name not in manager.task_index:
            bundled = f"bundled are {', '.join(sorted(manager.all_tasks))}; others need task.data=hub or task.data=DIR"
            known = bundled if self._bundled else "`lm-eval ls tasks` lists lm-eval's own"
            raise UserError(f"lm_eval: task.tasks={name} is unknown here; {known}")
        own: dict[str, Any] = {}
        rows: dict[str, Any] = {}
        if self.shots is not None:
            own["num_fewshot"] = self.shots
        if self._bundled or self.data not in ("hub", "bundled"):
            # lm_eval looks into its training split even where it draws nothing from it
            rows = {"train": [], **read_rows(name, BUNDLED if self._bundled else expand(self.data))}
            own |= {"custom_dataset": lambda **_: _data_sets(rows), "dataset_kwargs": None}
        trouble = hub_trouble() if self.data == "hub" else None
        try:
            with cached_only(trouble is not None), self._revisions():
                # what `load` does with a name, but with settings of our own
                built = manager._factory.build(manager.task_index[name], overrides=own, registry=manager.task_index)
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

    @cached_property
    def _requests(self) -> dict[str, list[Any]]:
        """lm_eval's requests of every sample, made in its own order, on which the drawn examples depend."""
        found: dict[str, list[Any]] = {}
        for name, task in self._loaded.items():
            for i, doc in task.doc_iterator(limit=self.limit):
                shots = int(task.config.num_fewshot or 0)
                if self.chat and task.doc_to_prefix(doc):
                    raise UserError(
                        f"lm_eval: task.chat=true: {name} begins the answer itself, which is not done here inside a "
                        "template; give task.chat=false"
                    )
                try:
                    prompt = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
                except (ValueError, AssertionError) as error:  # too few rows; none
                    raise UserError(
                        f"lm_eval: task.shots={shots}: task.data={self.data} has too few rows that {name} could draw "
                        "its examples from; add its train.jsonl, or give task.shots=0"
                    ) from error
                except Exception as error:
                    raise _unasked(f"{name}/{i}", error) from error
                try:
                    made = task.construct_requests(
                        doc=doc, ctx=prompt, metadata=(name, i, 1), apply_chat_template=self.chat
                    )
                except Exception as error:
                    raise _unasked(f"{name}/{i}", error) from error
                found[f"{name}/{i}"] = made if isinstance(made, list) else [made]
        return found

    @cached_property
    def _examples(self) -> list[Example]:
        found = []
        for id, made in self._requests.items():
            try:
                found.append(self._example(id, made))
            except UserError:
                raise
            except Exception as error:
                raise _unasked(id, error) from error
        return found

    def _example(self, id: str, made: Sequence[Any]) -> Example:
        name = id.rpartition("/")[0]
        task, doc = self._loaded[name], made[0].doc
        item = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
        prompts = [one.args[0] for one in made]
        document = doc.get("context")
        if isinstance(document, str) and document.strip() and document in prompts[0]:
            examples = prompts[0][: prompts[0].rfind(document) + len(document)]
        else:
            examples = _before(prompts[0], item[0] if isinstance(item, list) else item)
        if not all(prompt.startswith(examples) for prompt in prompts):
            examples = ""  # a prompt that leaves the context out, as for the likelihood without it
        rest = [prompt[len(examples) :] for prompt in prompts]
        tags: dict[str, Any] = {"subset": name, "category": name, "version": str(task.VERSION)}
        if made[0].request_type == "generate_until":
            limits = [made[0].args[1].get(key) for key in MOST_NEW_KEYS]
            most = next((int(limit) for limit in limits if limit is not None), MOST_NEW)
            answers = [str(task.doc_to_target(doc))]
            stop = _stops(made[0])
            return Example(id, examples, rest[0], answers, most, tags, chat=self.chat, stop=stop)
        texts = [one.args[1] for one in made]
        gold = _gold(task, doc)
        if gold is not None:
            # a task that also asks how likely a choice is without its prompt has more requests than choices
            tags |= {"gold": gold, "n": len(task.doc_to_choice(doc))}
        choices = tuple(Choice(*one) for one in zip(rest, texts))
        shared = commonprefix(rest)  # noqa: RUF071 of characters
        answers = texts[:1] if gold is None else [texts[gold]]
        return Example(id, examples, shared, answers, 0, tags, chat=self.chat, choices=choices, stride=self.stride)

    def _results(self, example: Example, responses: list[Any]) -> dict[str, Any]:
        doc = self._requests[example.id][0].doc
        return self._loaded[example.tags["subset"]].process_results(doc, responses)

    def _plain(self, example: Example, results: Mapping[str, Any]) -> dict[str, float]:
        """The scores that are numbers of single samples; a metric of the whole set cannot be a mean of these."""
        plain = {str(key): float(value) for key, value in results.items() if _is_number(value)}
        if not plain:
            raise UserError(
                f"lm_eval: task.tasks={example.tags['subset']}: its metrics {', '.join(results)} belong to a whole set "
                "and not to single samples, which are what is recorded and compared here"
            )
        return plain

    @cached_property
    def _digest(self) -> str:
        """SHA-256 over all prompts, choices and references."""
        total = hashlib.sha256()
        for one in self._examples:
            parts = [one.id, one.context, one.question, one.answers, [(c.question, c.text) for c in one.choices]]
            total.update(json.dumps(parts).encode())
        return total.hexdigest()


def _unasked(id: str, error: Exception) -> UserError:
    """Of an item that lm_eval's own code cannot make a question of."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"lm_eval: {id}: its row is not one that the task can ask ({text})")


def _data_sets(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from datasets import Dataset

    return {split: Dataset.from_list(own) for split, own in rows.items()}


def _before(prompt: str, item: str) -> str:
    """What stands before the item in a prompt; a description that both begin with belongs to it."""
    if prompt == item:
        return ""
    at = 0
    while at < min(len(prompt), len(item)) and prompt[-1 - at] == item[-1 - at]:
        at += 1
    rest = prompt[len(prompt) - at :]
    return prompt[: len(prompt) - len(rest.lstrip("\n"))]


def _stops(request: Any) -> tuple[str, ...]:
    """The strings that end a generated answer."""
    until = request.args[1].get("until") or []
    return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)


def _gold(task: Any, doc: Mapping[str, Any]) -> int | None:
    """The place of the right choice, where there is exactly one."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices, gold = task.doc_to_choice(doc), task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def _is_number(value: Any) -> bool:
    return not isinstance(value, str | tuple | list | dict) and math.isfinite(float(value))


def _mean_of(tags: Mapping[str, Any]) -> str:
    """The row that a task's metric is averaged in."""
    own = tags["subset"].removeprefix(tags.get("stratum", "")).strip()
    return f"mean, {own}" if own else "mean"


def _right(row: Mapping[str, Any]) -> bool:
    return row["score"] == 1


def margin(likelihoods: Sequence[float], gold: int) -> float:
    """The right choice's log-likelihood less that of the best other one, in nats."""
    return likelihoods[gold] - max(value for i, value in enumerate(likelihoods) if i != gold)


def _lengths(rows: remarks.Rows) -> str:
    """Mean tokens of what was compressed; a small share of a short prompt is a handful of slots."""
    ours = remarks.sides(rows)[0]
    mean = sum(row["tokens_context"] for row in ours) / len(ours)
    held, full = (sum(row["ledger"][key] for row in ours) for key in ("held_prompt", "full_prompt"))
    return f"compressed: {mean:.1f} tokens per sample, to {mean * held / full:.1f} tokens' bytes on average"


def _moved(rows: remarks.Rows) -> str | None:
    """How far the right choices' log-likelihoods moved, and their margins."""
    known = []
    for example, *both in rows:
        if (n := example.tags.get("n", 0)) > 1:
            ours, full = (row["likelihoods"][:n] for row in both)
            known.append((example.tags["gold"], ours, full))
    if not known:
        return None
    moved = sum(abs(ours[gold] - full[gold]) for gold, ours, full in known) / len(known)
    a = sum(margin(ours, gold) for gold, ours, _ in known) / len(known)
    b = sum(margin(full, gold) for gold, _, full in known) / len(known)
    return (
        f"log-likelihood of the right choice: moved by {moved:.3f} nats on average; "
        f"before the best other one by {a:+.3f}, full {b:+.3f}"
    )


def _guessed(rows: remarks.Rows) -> str | None:
    """The tasks whose score with the full cache is within three standard errors of chance."""
    by_task: dict[str, list[tuple[float, float]]] = {}
    for example, _, full in rows:
        if example.tags.get("n", 0) > 1:
            by_task.setdefault(example.tags["subset"], []).append((1 / example.tags["n"], full["score"]))
    near = []
    for name, own in by_task.items():
        chance, score = (sum(one[i] for one in own) / len(own) for i in (0, 1))
        if score - chance <= 3 * math.sqrt(chance * (1 - chance) / len(own)):
            near.append(f"{name} {100 * score:.1f} (chance {100 * chance:.1f})")
    return f"full cache within three standard errors of chance, no evidence: {', '.join(near)}" if near else None
