"""Result folders as two tables: one row per cell, one row per sample of a cell.

A record is read once: what was read is kept in `RESULTS/.analysis.parquet` and read again only where a file has
changed. What cannot be read is named in `problems`, and the rest is given. `Results.pack` writes both tables as one
file that `load` reads like a folder: records for committing, without their texts.
"""

import base64
import contextlib
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import form
from analysis.generations import asked, chosen

FORMATS = (1, 2)  # of records that can be read
CACHE = ".analysis.parquet"
READER = 3  # what another one has kept of a record is read again
METRIC = {"name": "score", "unit": "points of 100", "better": "higher", "scale": 100.0, "digits": 2}
#: columns of `Results.samples` that hold no text; the texts are read by `texts`, from byte `at` on, `size` bytes
SAMPLE = {
    "id": "", "key": "", "end": "", "subset": "", "category": "", "measure": "", "weight": 1.0, "chance": 0.0,
    "control": False,
    "score": float("nan"), "error": "", "tokens_in": 0, "tokens_out": 0, "held": float("nan"), "held_end": float("nan"),
    "read": float("nan"), "peak": float("nan"), "bytes": float("nan"), "bytes_full": float("nan"),
    "length": float("nan"), "depth": float("nan"), "prompt_s": float("nan"), "n_prompt": 0, "decode_s": float("nan"),
    "steps": 0, "alone": True, "above": False, "at": 0, "size": 0,
}  # fmt: skip
#: parts that are the sample's own score without being the first, where its line names none, as lines did before
NOT_FIRST = ("ROUGE-L", "flexible")
SHARES = ("held", "held_end", "read", "peak")
#: of a record's ledger, bytes
LEDGER = (
    "full_prompt", "full", "held_prompt", "held_end", "padding", "padding_end", "peak_prompt", "peak_decode",
    "read_step", "workspace", "adapter", "host",
)  # fmt: skip


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
        return {cell: own.set_index("id").sort_index() for cell, own in _slices(self.finished)}

    @cached_property
    def failed(self) -> dict[str, int]:
        """How many samples failed, by cell."""
        return self.samples[self.samples["error"] != ""].groupby("cell").size().to_dict()

    @cached_property
    def errors(self) -> dict[str, list[str]]:
        """The first few different errors of failed samples, by cell."""
        wrong = self.samples[self.samples["error"] != ""]
        return {str(cell): list(own.unique()[:3]) for cell, own in wrong.groupby("cell")["error"]}

    def pack(self, path: Path) -> None:
        """Both tables as one parquet file; shares to five places, and no times of passes that were shared."""
        table = self.samples.drop(columns=["at", "size"]).round(dict.fromkeys(SHARES, 5))
        table[["prompt_s", "decode_s"]] = table[["prompt_s", "decode_s"]].where(table["alone"])
        told = json.dumps({"cells": json.loads(self.cells.to_json(orient="records")), "problems": self.problems})
        table.attrs = {"told": base64.b64encode(gzip.compress(told.encode(), mtime=0)).decode()}
        table.to_parquet(path, compression="zstd", index=False)


def load(results: str | Path, all_generations: bool = False) -> Results:
    """Everything below `results`, or in a packed file. Raises NothingToRead when there is no record at all.

    all_generations: also records whose code or model files have changed since, beside the newest of each.
    """
    root = Path(results)
    if root.is_file():
        return _unpack(root)
    if not root.is_dir():
        raise NothingToRead(f"{root}: no such folder; give the folder that results=... named (default: results)")
    found = sorted({path.parent for name in ("cell.json", "samples.jsonl") for path in root.rglob(name)})
    if not found:
        raise NothingToRead(f"{root}: holds no cell.json; run python run.py results={root} first")
    kept, books = _cache(root)
    cells, tables, problems, new_books = [], [], [], {}
    for folder in found:
        name = folder.relative_to(root).as_posix()
        try:
            cell = _cell(name, folder)
            stamp = _stamp(folder / "samples.jsonl")
            if books.get(name, {}).get("stamp") == stamp:
                table, book = kept.get(name, _table([])), books[name]
            else:
                table, book = _samples(name, folder / "samples.jsonl")
                book["stamp"] = stamp
        except (OSError, ValueError, RecursionError) as error:  # what is nested deeply is read, and cannot be written
            problems.append(f"{name}: left out, {_why(error)}")
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
    own = samples[samples["cell"].isin(drawn.index)].reset_index(drop=True)
    return Results(root, drawn, own, problems + [said] * bool(said))


def texts(results: Results, cell: str, ids: set[str]) -> dict[str, dict[str, Any]]:
    """What the table leaves out of some samples of one cell: prompt end, references, prediction.

    A packed file has none.
    """
    own = results.by_cell.get(cell)
    if own is None or results.root.is_file() or not ids:
        return {}
    found = {}
    with (results.root / cell / "samples.jsonl").open("rb") as file:
        for name, at, size in zip(own.index, own["at"], own["size"]):
            if name in ids:
                file.seek(at)
                found[name] = json.loads(file.read(size))
    return found


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
        raise NothingToRead(f"{path}: not a file that python -m analysis.tables wrote, {_why(error)}") from error
    samples.attrs = {}
    for name in ("key", "end"):  # a file of format 1 lacks them
        if name not in samples:
            samples[name] = ""
    cells = pd.DataFrame(told["cells"]).set_index("cell", drop=False)
    lacking = {name: value for name, value in SAMPLE.items() if name not in samples}  # and what older versions lacked
    return Results(path, cells, samples.assign(**lacking), told["problems"])


def _cell(name: str, folder: Path) -> dict[str, Any]:
    try:
        book = form.parse((folder / "cell.json").read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            "its cell.json is missing or broken; the command that made the record writes it again"
        ) from error
    try:
        form.check(book, form.CELL)
        form.check(book["runs"][-1], form.RUN)
    except ValueError as error:
        raise ValueError(
            f"its cell.json is broken ({error}); mend it, or delete it and the command that made the record writes it "
            "again"
        ) from error
    if book["format"] not in FORMATS:
        raise ValueError(f"format {book['format']} is none of {', '.join(map(str, FORMATS))}")
    identity, runs = book["identity"], book["runs"]
    method, model, task, notes = identity["method"], identity["model"], identity["task"], runs[-1]
    latest = notes["conditions"]
    passes = {name: value for name, value in model.items() if name not in ("name", "weights")}
    found = {
        "cell": name,
        "model": model["name"],
        "task": task["name"],
        "method": method["name"],
        "family": notes.get("family", "other"),
        "simulated": bool(notes.get("simulated", False)),
        "budget": float(identity["budget"]),
        "protocol": identity["protocol"],
        "seed": identity["seed"],
        "dtype": identity["dtype"],
        "weights": model.get("weights") or latest.get("weights", ""),
        "files": latest.get("files", ""),
        "code": f"{latest.get('code', '')}{latest.get('artefacts', '')}",
        "place": notes.get("place", ""),
        "began": notes.get("began", ""),
        "ask": asked(identity),
        "passes": json.dumps({**passes, **identity.get("passes", {})}, sort_keys=True),
        "fingerprint": json.dumps(task.get("fingerprint", {}), sort_keys=True),
        "data": task.get("data", ""),
        "format": book["format"],
        "config": json.dumps({k: v for k, v in method["config"].items() if k != "seed"}, sort_keys=True),
        "metric": {**METRIC, **task.get("metric", {})},
        "conditions": [run["conditions"] for run in runs],
        "mean_over": notes.get("mean_over", "categories"),
        "commit": notes.get("commit") or "",
        "command": notes.get("command", ""),
    }
    return _whole(found)


def _samples(name: str, path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The latest line of each sample of one cell, and the cell's means and problems."""
    rows: dict[str, dict[str, Any]] = {}
    ledgers: dict[str, dict[str, Any]] = {}
    runs: dict[str, Any] = {}
    again: set[str] = set()  # samples that were computed again after their data had changed
    problems, at = [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
        if line:
            try:
                read = form.parse(line)
                form.check_sample(read, form.FINISHED)
                row = _whole(_row(read)) | {"at": at, "size": len(line)}
                if rows.get(read["id"], row)["key"] != row["key"]:
                    again.add(read["id"])
                rows[read["id"]] = row
                ledgers[read["id"]] = _per_sample(read)
                runs[read["id"]] = read.get("run", 0)
            except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:  # tags are a task's own
                problems.append(f"{name}: line {number} of samples.jsonl is no sample, left out ({_why(error)})")
        at += len(line) + 1
    if again:
        problems.append(f"{name}: {len(again)} samples, such as {min(again)}, hold two contents; the later one counts")
    table = _table(list(rows.values()))
    table.insert(0, "cell", name)
    own = [ledger for ledger in ledgers.values() if ledger]
    layers = [ledger["layers"] for ledger in own]
    alike = len({len(one) for one in layers}) == 1
    return table, {
        "problems": problems,
        "runs": len({runs[id] for id, ledger in ledgers.items() if ledger}),
        "ledger": {key: round(sum(one[key] for one in own) / len(own)) for key in LEDGER} if own else {},
        "layers": [round(sum(layer) / len(layers)) for layer in zip(*layers)] if alike else [],
    }


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(SAMPLE)).astype({k: type(v) for k, v in SAMPLE.items()})


def _row(line: dict[str, Any]) -> dict[str, Any]:
    tags = line.get("tags", {})
    subset = tags.get("subset", line["id"].rpartition("/")[0])
    row = {
        **SAMPLE,
        "id": line["id"],
        "key": line.get("key", ""),
        "end": _end(line),
        "subset": subset,
        "category": tags.get("category", subset),
    }
    row |= {name: float(tags[name]) for name in ("length", "depth") if form.is_number(tags.get(name))}
    row["control"] = bool(tags.get("control", False))
    row["chance"] = float(tags["chance"]) if "chance" in tags else 1 / tags["n"] if tags.get("gold", -1) >= 0 else 0.0
    if "error" in line:
        return {**row, "error": str(line["error"]) or "failed"}
    ledger, times = _ledger(line), line["timings"]
    full, full_prompt = ledger["full"] or float("nan"), ledger["full_prompt"] or float("nan")
    return row | {
        "score": float(line["score"]),
        "measure": _measure(line),
        "weight": float(line.get("weights", {}).get("", 1.0)),
        "tokens_in": line["tokens_in"],
        "tokens_out": line["tokens_out"],
        "held": ledger["held_prompt"] / full_prompt,
        "held_end": ledger["held_end"] / full,
        "read": ledger["read_step"] / full,
        "peak": max(ledger["peak_prompt"], ledger["peak_decode"]) / full,
        "bytes": ledger["held_prompt"],
        "bytes_full": ledger["full_prompt"],
        "above": ledger["held_prompt"] > ledger.get("asked", ledger["held_prompt"]) + ledger.get("overhead", 0),
        "prompt_s": times["prompt"],
        "n_prompt": times["n_prompt"],
        "decode_s": times["decode"],
        "steps": times["steps"],
        "alone": "group" not in line,
    }


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """A row without halves of characters, which a table cannot hold."""
    return {
        key: value.encode(errors="replace").decode() if isinstance(value, str) else value for key, value in row.items()
    }


def _end(line: dict[str, Any]) -> str:
    """A hash of what every form of a record holds of a sample's content: the end of its prompt, and its references."""
    if "prompt_end" not in line:
        return ""
    told = json.dumps([line["prompt_end"], line.get("answers")])
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _measure(line: dict[str, Any]) -> str:
    """Which of several scores is the sample's own. Turns and places in a text are no measures."""
    parts = line.get("parts") or {}
    if "turns" in line or "curve" in line:
        return ""
    if "measure" in line:
        return str(line["measure"])
    return next((name for name in NOT_FIRST if name in parts), next(iter(parts), ""))


def _per_sample(line: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one sample, layer by layer and in all; empty for a failed one."""
    if "error" in line:
        return {}
    ledger = _ledger(line)
    return {**{name: ledger.get(name, 0) for name in LEDGER}, "layers": ledger.get("per_layer", [])}


def _ledger(line: dict[str, Any]) -> dict[str, Any]:
    """The sample's own: records used to hold the whole batch's, of which each row has an equal part."""
    book, batch = line["ledger"], line["batch"]
    if "padding" in book:
        return book
    own = {name: book[name] / batch for name in (*LEDGER, "asked", "overhead") if name in book}
    return {**own, "per_layer": [layer / batch for layer in book.get("per_layer", [])]}


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


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read ({error.strerror})"
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}" if not isinstance(error, KeyError) else f"it lacks {text}"
