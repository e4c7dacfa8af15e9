"""The files of a task's data: a bundled split, a file or a folder of one's own, or one file of the hub."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from methods.core.reading import parse_json, read_bytes
from tasks.data import pins
from tasks.data.sources import cached_only, expand, hub_trouble, parse_rows

ASSETS = Path(__file__).parents[2] / "assets"
REAL = {"perplexity": "ppl-real"}  # the bundled split of real text, of tasks that have one


@dataclass(frozen=True)
class Files:
    """What was read. where: as the first line of the output says it.  files: by file name without suffix."""

    where: str
    files: dict[str, tuple[Path, bytes]]

    @classmethod
    def of_text(cls, where: str, name: str, text: str, suffix: str = ".txt") -> "Files":
        """One text that is not a file here."""
        return cls(where, {name: (Path(f"{name}{suffix}"), text.encode())})

    @classmethod
    def of_rows(cls, where: str, name: str, rows: Sequence[dict[str, Any]]) -> "Files":
        """Rows that are not a file here."""
        return cls.of_text(where, name, "".join(json.dumps(row) + "\n" for row in rows), ".jsonl")

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents."""
        total = hashlib.sha256()
        for name, (_, raw) in self.files.items():
            total.update(f"{name}\0{len(raw)}\0".encode() + raw)
        return total.hexdigest()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file, or of a JSON file that is a list; a text file is one row with a `text`.

        Raises UserError that names the file and the line of what cannot be read, or that there is nothing in it.
        """
        path, raw = self.files[name]
        if path.suffix == ".jsonl":
            rows = parse_rows(raw, str(path))
        else:
            try:
                text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not {path.suffix.removeprefix('.')} in UTF-8 ({error})") from error
            rows = parse_json(text, str(path), list) if path.suffix == ".json" else [{"text": text}]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: holds no rows; a JSON object per line is needed")
        return rows

    def location(self, name: str, i: int) -> str:
        """Where row i of a file is, as an error says it: by its line in JSONL, where some are blank, else counted."""
        path, raw = self.files[name]
        if path.suffix != ".jsonl" or not path.is_file():
            return f"{path if path.is_file() else f'{self.where}, {name}'}, row {i + 1}"
        lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return f"{path}, line {[number for number, line in enumerate(lines, 1) if line.strip()][i]}"


def read_files(task: str, data: str, suffixes: Sequence[str] = (".jsonl", ".json")) -> Files:
    """The files of `data`: "bundled", "real" where the task has such a split, or a path to a file or a folder of them.

    Raises UserError that says where it was looked for and what would work.
    """
    path = ASSETS / bundled_name(task, data) if bundled_name(task, data) else expand(data)
    wanted = " or ".join(suffixes)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes and not file.is_dir())
    else:
        files = [path] if path.is_file() else []
    if not files:
        what = f"no {wanted} file in" if path.is_dir() else "nothing at"
        instead = "restore it, or give task.data=PATH" if bundled_name(task, data) else "or use task.data=bundled"
        raise UserError(
            f"{task}: task.data={data}: {what} {path.absolute()}; give a {wanted} file or a folder of them, {instead}"
        )
    return Files(data, {file.stem: (file, read_bytes(file)) for file in files})


def bundled_name(task: str, data: str) -> str:
    """The name of the bundled split that `data` means, which is its folder's in assets; "" for what is not bundled."""
    return f"{task}-mini" if data == "bundled" else REAL.get(task, "") if data == "real" else ""


def hub_rows(task: str, repo: str, name: str | None, split: str, revision: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a dataset of the hub, and where they are from: repository, split, revision and its commit.

    revision: a branch, tag or commit of the dataset, or "pinned".
    Without a way to the hub, what was downloaded before. Raises UserError within seconds if it is not there either.
    """
    from huggingface_hub.constants import ENDPOINT

    trouble = hub_trouble()
    with cached_only(trouble is not None):
        import datasets

        def read(at: str | None) -> Any:
            return hub_set(datasets.load_dataset, repo, name, at or "main", split=split)

        try:
            dataset = pins.follow(repo, read, commit_of) if revision == pins.PINNED else read(revision)
            commit = commit_of(dataset)
            said = revision if commit or revision != pins.PINNED else "main"
            where = f"hub, {repo}, {split}, revision {said}"
            return [dict(row) for row in dataset], f"{where} ({commit[:12]})" if commit not in ("", revision) else where
        except UserError:
            raise
        except (OSError, ValueError) as error:
            problem = pins.told(error, trouble)
    raise UserError(
        f"{task}: task.data=hub: {repo} at task.revision={revision} cannot be fetched from {ENDPOINT} ({problem}), and "
        "was not before; offline, give task.data=PATH of its rows as JSONL, or task.data=bundled"
    )


def hub_set(load: Callable[..., Any], repo: str, name: str | None, revision: str | None, **more: Any) -> Any:
    """What `load`, the library's load_dataset, gives of a revision. Raises FileNotFoundError for another commit.

    Where it cannot ask the hub, the library takes what it prepared last, whatever it was asked for.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    dataset = load(repo, name, revision=revision, **more)
    commit = commit_of(dataset)
    known = commit or datasets.config.HF_HUB_OFFLINE
    if not pins.COMMIT.fullmatch(str(revision)) or commit == revision or not known:
        return dataset
    beside = _folder_of(dataset).with_name(str(revision))
    if not beside.is_dir():
        raise FileNotFoundError(f"in the cache is {commit or 'another commit'}, and not {revision}")
    settings, version = beside.parts[-3:-1]
    cached = Cache(repo_id=repo, dataset_name=repo.split("/")[-1], config_name=settings, version=version, hash=revision)
    return cached.as_dataset(split=more.get("split"))


def commit_of(dataset: Any) -> str:
    """The commit that a dataset of the hub, whole or one split, belongs to: its folder; "" if that has another name."""
    name = _folder_of(dataset).name
    return name if pins.COMMIT.fullmatch(name) else ""


def _folder_of(dataset: Any) -> Path:
    """Where the library keeps a dataset: dataset, configuration, version, commit; an empty path if nowhere."""
    files = dataset.cache_files
    files = [one for split_files in files.values() for one in split_files] if isinstance(files, dict) else files
    return Path(files[0]["filename"]).parent if files else Path()


def check_stand_in(task: str, kind: type, knobs: Mapping[str, Any], stand_in: str) -> None:
    """Raises UserError for a setting of the dataclass `kind` that the bundled split in its place does not have."""
    for field in fields(kind):
        if field.name in knobs and knobs[field.name] != field.default:
            raise UserError(
                f"{task}: task.{field.name}={knobs[field.name]} needs task.data=hub or a path: with task.data=bundled "
                f"{stand_in} takes the task's place, which has no such setting"
            )


def check_limit(task: str, limit: int | None) -> None:
    """Raises UserError unless `limit` is nothing or a whole number of samples."""
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"{task}: task.limit={limit}; give a whole number of samples, 1 or more")


def chosen(task: str, key: str, typed: Any, names: Sequence[str]) -> list[str]:
    """The names that were asked for, None for all, in the order of `names`. Raises UserError for an unknown one."""
    if typed is None:
        return list(names)
    asked = [typed] if isinstance(typed, str) else [str(one) for one in typed]
    for one in asked:
        if one not in names:
            raise UserError(f"{task}: task.{key}={one} is unknown here; there are {', '.join(names)}")
    if not asked:
        raise UserError(f"{task}: task.{key}=[] chooses nothing; there are {', '.join(names)}")
    return [name for name in names if name in asked]
