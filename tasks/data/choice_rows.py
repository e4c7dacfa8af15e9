"""Multiple-choice items as their authors publish them, turned into the rows that lm_eval's tasks read."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from methods.core.reading import read_bytes
from tasks.data.sources import parse_rows

Rows = list[dict[str, Any]]


def read_rows(task: str, folder: Path) -> dict[str, Rows]:
    """Rows by split: from `folder`/`task`, or `folder` itself, <split>.jsonl in the form of the hub's data set, or the
    files of the authors of piqa, copa or openbookqa; or from `folder`/`task`.jsonl, whichever split is evaluated.

    Raises UserError that says where it was looked for and what would work.
    """
    if (folder / f"{task}.jsonl").is_file():
        rows = _read(folder / f"{task}.jsonl", plain)
        return {"validation": rows, "test": rows}
    task_folder = folder / task if (folder / task).is_dir() else folder
    splits: dict[str, Rows] = {}
    authors = AUTHORS.get(task, {})
    for path in sorted(task_folder.iterdir()) if task_folder.is_dir() else ():
        if path.name in authors:
            split, read = authors[path.name]
            splits[split] = _read(path, read)
        elif path.suffix == ".jsonl":
            splits[path.stem] = _read(path, plain)
    if not splits:
        files = "".join(f", or {name}" for name in authors)
        raise UserError(
            f"lm_eval: task.data={folder}: no rows of {task} in {task_folder.absolute()}; "
            f"put {task}.jsonl or {task}/<split>.jsonl with rows of its hub data set there{files}, "
            "or give task.data=hub"
        )
    return splits


def _read(path: Path, read: Callable[[Path], Rows]) -> Rows:
    try:
        return read(path)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, IndexError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def plain(path: Path) -> Rows:
    """Rows that have their form already."""
    return parse_rows(read_bytes(path), str(path))


def piqa(path: Path) -> Rows:
    """Goals with two solutions; the authors name the right one in a file of its own."""
    answers, rows = path.with_name(f"{path.stem}-labels.lst"), plain(path)
    if not answers.is_file():
        return rows
    labels = answers.read_text(encoding="utf-8").split()
    return [{**row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]


def copa(path: Path) -> Rows:
    """A premise and two alternatives, one of which is its cause or its effect."""
    return [
        {
            "premise": item.find("p").text,  # type: ignore[union-attr]
            "choice1": item.find("a1").text,  # type: ignore[union-attr]
            "choice2": item.find("a2").text,  # type: ignore[union-attr]
            "question": item.attrib["asks-for"],
            "label": int(item.attrib["most-plausible-alternative"]) - 1,
        }
        for item in ElementTree.parse(path).getroot().iter("item")
    ]


def openbookqa(path: Path) -> Rows:
    """A question stem, its choices in one string, such as `(A) deep sea (B) fish`, and the letter of the right one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        _, stem, choices, _, answer = line.split("\t")
        parts = re.split(r"\s*\(([A-D])\)\s+", choices)[1:]
        rows.append(
            {"question_stem": stem, "choices": {"label": parts[::2], "text": parts[1::2]}, "answerKey": answer.strip()}
        )
    return rows


# task: file: the split that it is, and how it is read
AUTHORS: dict[str, dict[str, tuple[str, Callable[[Path], Rows]]]] = {
    "piqa": {"train.jsonl": ("train", piqa), "valid.jsonl": ("validation", piqa)},
    "copa": {"copa-dev.xml": ("train", copa), "copa-test.xml": ("validation", copa)},
    "openbookqa": {
        "train.tsv": ("train", openbookqa), "dev.tsv": ("validation", openbookqa), "test.tsv": ("test", openbookqa),
    },
}  # fmt: skip
