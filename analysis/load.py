"""Result folders as two tables: one row per cell, one row per sample of a cell.

A record is read once: what was read is kept in `RESULTS/.analysis.parquet` and read again only where a file has
changed. What cannot be read is named in `problems`, and the rest is given. `Results.pack` writes both tables as one
file that `load_results` reads like a folder: records for committing, without their texts.
"""

import base64
import contextlib
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.generations import chosen
from analysis.names import numbers_of
from analysis.rows import SAMPLE, SHARES, cell_of, samples_of, table_of, why

CACHE = ".analysis.parquet"
RUN = "python run.py" if __package__ == "analysis" else "kvfrontier run"  # where it is installed
READER = 4  # what another one has kept of a record is read again


class NothingToRead(ValueError):
    """The folder holds no record; the message says where was looked and how to get one."""


@dataclass
class Results:
    """cells: one row per record, by `cell`, its folder below the results folder.

    samples: one row per finished or failed sample, those of a cell side by side; `held`, `held_end`, `read` and `peak`
    are shares of the full cache's bytes, `bytes` and `bytes_full` those at the end of the prompt; `length` and `depth`
    are set where a sample is tagged with numbers; `weight` counts in the mean over its subset, `chance` is what a guess
    scores, `control` samples count in no average, `measure` names the score where a task has several; `alone` is false
    where the prompt's pass was shared, which has no speed; `above` where more was held than the budget allows and the
    method documents.  problems: what was left out, one line each.
    """

    root: Path
    cells: pd.DataFrame
    samples: pd.DataFrame
    problems: list[str]

    @cached_property
    def finished(self) -> pd.DataFrame:
        """Samples with a score."""
        return self.samples[self.samples["error"] == ""]

    @cached_property
    def by_cell(self) -> dict[str, pd.DataFrame]:
        """The finished samples of every cell that has one, by id in order."""
        return {cell: rows.set_index("id").sort_index() for cell, rows in _slices(self.finished)}

    @cached_property
    def failed(self) -> dict[str, int]:
        """How many samples failed, by cell."""
        return self.samples[self.samples["error"] != ""].groupby("cell").size().to_dict()

    @cached_property
    def errors(self) -> dict[str, list[str]]:
        """The first few different errors of failed samples, by cell."""
        wrong = self.samples[self.samples["error"] != ""]
        return {str(cell): list(rows.unique()[:3]) for cell, rows in wrong.groupby("cell")["error"]}

    def pack(self, path: Path) -> None:
        """Both tables as one parquet file; shares to five places, and no times of passes that were shared."""
        table = self.samples.drop(columns=["at", "size"]).round(dict.fromkeys(SHARES, 5))
        table[["prompt_s", "decode_s"]] = table[["prompt_s", "decode_s"]].where(table["alone"])
        told = json.dumps({"cells": json.loads(self.cells.to_json(orient="records")), "problems": self.problems})
        table.attrs = {"told": base64.b64encode(gzip.compress(told.encode(), mtime=0)).decode()}
        table.to_parquet(path, compression="zstd", index=False)


def load_results(results: str | Path, all_generations: bool = False) -> Results:
    """Everything below `results`, or in a packed file. Raises NothingToRead when there is no record at all.

    all_generations: also records whose code or model files have changed since, beside the newest of each.
    """
    root = Path(results)
    if root.is_file():
        return _unpack(root)
    if not root.is_dir():
        raise NothingToRead(f"{root}: no such folder; give the folder that results=... named (default: results)")
    folders = sorted({path.parent for name in ("cell.json", "samples.jsonl") for path in root.rglob(name)})
    if not folders:
        raise NothingToRead(f"{root}: holds no cell.json; run {RUN} results={root} first")
    kept, books = _cache(root)
    cells, tables, problems, new_books = [], [], [], {}
    for folder in folders:
        name = folder.relative_to(root).as_posix()
        try:
            cell = cell_of(name, folder)
            stamp = _stamp(folder / "samples.jsonl")
            if books.get(name, {}).get("stamp") == stamp:
                table, book = kept.get(name, table_of([])), books[name]
            else:
                table, book = samples_of(name, folder / "samples.jsonl")
                book["stamp"] = stamp
        except (OSError, ValueError, RecursionError) as error:  # what is nested deeply is read, and cannot be written
            problems.append(f"{name}: left out, {why(error)}")
            continue
        problems += book["problems"]
        if book["runs"] > 1:
            problems.append(f"{name}: mixed, computed under {book['runs']} different conditions")
        new_books[name] = book
        answered = bool((table["error"] == "").any())
        age = f"{cell['began']} {book['stamp'][1]:020}"
        cells.append({**cell, "age": age, "answered": answered, "ledger": book["ledger"], "layers": book["layers"]})
        tables.append(table)
    if not cells:
        raise NothingToRead(f"{root}: no record can be read; {problems[0]}")
    samples = pd.concat([t for t in tables if len(t)] or tables[:1], ignore_index=True)
    if new_books != books:
        _keep(root, samples, new_books)
    drawn, said = chosen(pd.DataFrame(cells).set_index("cell", drop=False), all_generations)
    remaining = samples[samples["cell"].isin(drawn.index)].reset_index(drop=True)
    return Results(root, drawn, remaining, problems + [said] * bool(said) + numbers_of(drawn))


def sample_texts(results: Results, cell: str, ids: set[str]) -> dict[str, dict[str, Any]]:
    """What the table leaves out of some samples of one cell: prompt end, references, prediction.

    A packed file has none.
    """
    rows = results.by_cell.get(cell)
    if rows is None or results.root.is_file() or not ids:
        return {}
    texts = {}
    with (results.root / cell / "samples.jsonl").open("rb") as file:
        for name, at, size in zip(rows.index, rows["at"], rows["size"]):
            if name in ids:
                file.seek(at)
                texts[name] = json.loads(file.read(size))
    return texts


def _slices(samples: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of every cell; they stand side by side."""
    cells = samples["cell"].to_numpy()
    edges = [0, *((cells[1:] != cells[:-1]).nonzero()[0] + 1), len(cells)] if len(cells) else []
    for start, end in pairwise(edges):
        yield str(cells[start]), samples.iloc[start:end]


def _unpack(path: Path) -> Results:
    try:
        samples = pd.read_parquet(path)
        told = json.loads(gzip.decompress(base64.b64decode(samples.attrs["told"])))
    except (OSError, ValueError, KeyError) as error:
        raise NothingToRead(f"{path}: not a file that python -m analysis.tables wrote, {why(error)}") from error
    samples.attrs = {}
    for name in ("key", "end"):  # a file of format 1 lacks them
        if name not in samples:
            samples[name] = ""
    cells = pd.DataFrame(told["cells"]).set_index("cell", drop=False)
    lacking = {name: value for name, value in SAMPLE.items() if name not in samples}  # and what older versions lacked
    return Results(path, cells, samples.assign(**lacking), told["problems"])


def _stamp(path: Path) -> list[int]:
    if not path.exists():
        return [0, 0, READER]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, READER]


def _cache(root: Path) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, Any]]]:
    """The kept samples of each cell, and what else was kept of it; nothing where it cannot be used."""
    try:
        table = pd.read_parquet(root / CACHE)
        books = table.attrs["books"]
    except (OSError, ValueError, KeyError):
        return {}, {}
    if list(table.columns) != ["cell", *SAMPLE]:  # kept by another version
        return {}, {}
    table.attrs = {}
    return dict(_slices(table)), books


def _keep(root: Path, table: pd.DataFrame, books: dict[str, dict[str, Any]]) -> None:
    table = table.copy(deep=False)
    table.attrs = {"books": books}
    draft = root / f"{CACHE}.{os.getpid()}"
    try:
        table.to_parquet(draft)
        draft.replace(root / CACHE)
    except OSError:  # a read-only folder is read without a cache
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
