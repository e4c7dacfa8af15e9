"""Result folders as two tables: one row per cell, one row per sample of a cell.

A record is read once: what was read is kept in `RESULTS/.analysis.parquet` and read again only where a file has
changed. What cannot be read is named in `problems`, and the rest is given.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

FORMAT = 1  # of the records
CACHE = ".analysis.parquet"
METRIC = {"name": "score", "unit": "points of 100", "better": "higher", "scale": 100.0, "digits": 2}
#: columns of `Results.samples` that hold no text; the texts are read by `texts`
SAMPLE = {
    "id": "", "subset": "", "category": "", "score": float("nan"), "error": "", "tokens_in": 0, "tokens_out": 0,
    "held": float("nan"), "held_end": float("nan"), "read": float("nan"), "peak": float("nan"), "bytes": float("nan"),
    "bytes_full": float("nan"), "length": float("nan"), "depth": float("nan"), "prompt_s": float("nan"),
    "n_prompt": 0, "decode_s": float("nan"), "steps": 0,
}  # fmt: skip


class NothingToRead(ValueError):
    """The folder holds no record; the message says where was looked and how to get one."""


@dataclass
class Results:
    """cells: one row per record, by `cell`, its folder below the results folder.

    samples: one row per finished or failed sample; `held`, `held_end`, `read` and `peak` are shares of the full cache's
    bytes, `bytes` and `bytes_full` those at the end of the prompt; `length` and `depth` are set where a
    sample is tagged with numbers.  problems: what was left out, one line each.
    """

    root: Path
    cells: pd.DataFrame
    samples: pd.DataFrame
    problems: list[str]

    @property
    def finished(self) -> pd.DataFrame:
        """Samples with a score."""
        return self.samples[self.samples["error"] == ""]


def load(results: str | Path) -> Results:
    """Everything below `results`. Raises NothingToRead when there is no record at all."""
    root = Path(results)
    if not root.is_dir():
        raise NothingToRead(f"{root}: no such folder; give the folder that results=... named (default: results)")
    found = sorted(path.parent for path in root.rglob("cell.json"))
    if not found:
        raise NothingToRead(f"{root}: holds no cell.json; run python run.py results={root} first")
    cached, stamps = _cache(root)
    cells, tables, problems, new_stamps = [], [], [], {}
    for folder in found:
        name = folder.relative_to(root).as_posix()
        try:
            cell = _cell(name, folder)
            stamp = _stamp(folder / "samples.jsonl")
            if stamps.get(name) == stamp:
                table = cached[cached["cell"] == name]
            else:
                table, torn = _samples(name, folder / "samples.jsonl")
                problems += torn
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{name}: left out, {_why(error)}")
            continue
        if len(cell["conditions"]) > 1:
            problems.append(f"{name}: mixed, computed under {len(cell['conditions'])} different conditions")
        new_stamps[name] = stamp
        cells.append(cell)
        tables.append(table)
    if not cells:
        raise NothingToRead(f"{root}: no record can be read; {problems[0]}")
    samples = pd.concat([t for t in tables if len(t)] or tables[:1], ignore_index=True)
    if new_stamps != stamps:
        _keep(root, samples, new_stamps)
    return Results(root, pd.DataFrame(cells).set_index("cell", drop=False), samples, problems)


def texts(results: Results, cell: str, ids: set[str]) -> dict[str, dict[str, Any]]:
    """What the table leaves out of some samples of one cell: prompt end, references, prediction."""
    lines, _ = _lines(results.root / cell / "samples.jsonl", cell)
    return {row["id"]: row for row in lines if row["id"] in ids}


def _cell(name: str, folder: Path) -> dict[str, Any]:
    book = json.loads((folder / "cell.json").read_text())
    if book["format"] != FORMAT:
        raise ValueError(f"format {book['format']} is not {FORMAT}")
    identity, runs = book["identity"], book["runs"]
    method, notes = identity["method"], runs[-1]
    return {
        "cell": name,
        "model": identity["model"]["name"],
        "task": identity["task"]["name"],
        "method": method["name"],
        "family": notes.get("family", "other"),
        "simulated": bool(notes.get("simulated", False)),
        "budget": float(identity["budget"]),
        "protocol": identity["protocol"],
        "seed": identity["seed"],
        "dtype": identity["dtype"],
        "weights": identity["model"].get("weights", ""),
        "config": json.dumps({k: v for k, v in method["config"].items() if k != "seed"}, sort_keys=True),
        "metric": {**METRIC, **identity["task"].get("metric", {})},
        "conditions": [run["conditions"] for run in runs],
        "mean_over": notes.get("mean_over", "categories"),
        "commit": notes.get("commit") or "",
        "command": notes.get("command", ""),
    }


def _lines(path: Path, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The latest line of each sample, and what could not be read."""
    rows: dict[str, dict[str, Any]] = {}
    problems = []
    text = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(text, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError):
            problems.append(f"{name}: line {number} of samples.jsonl is no sample, left out")
    return list(rows.values()), problems


def _samples(name: str, path: Path) -> tuple[pd.DataFrame, list[str]]:
    lines, problems = _lines(path, name)
    rows = [_row(line) for line in lines]
    table = pd.DataFrame(rows, columns=list(SAMPLE)).astype({k: type(v) for k, v in SAMPLE.items()})
    table.insert(0, "cell", name)
    return table, problems


def _row(line: dict[str, Any]) -> dict[str, Any]:
    tags = line.get("tags", {})
    subset = tags.get("subset", line["id"].rpartition("/")[0])
    row = {**SAMPLE, "id": line["id"], "subset": subset, "category": tags.get("category", subset)}
    row |= {name: float(tags[name]) for name in ("length", "depth") if isinstance(tags.get(name), int | float)}
    if "error" in line:
        return {**row, "error": str(line["error"])}
    ledger, times = line["ledger"], line["timings"]
    return row | {
        "score": float(line["score"]),
        "tokens_in": line["tokens_in"],
        "tokens_out": line["tokens_out"],
        "held": ledger["held_prompt"] / ledger["full_prompt"],
        "held_end": ledger["held_end"] / ledger["full"],
        "read": ledger["read_step"] / ledger["full"],
        "peak": max(ledger["peak_prompt"], ledger["peak_decode"]) / ledger["full"],
        "bytes": ledger["held_prompt"] / line["batch"],
        "bytes_full": ledger["full_prompt"] / line["batch"],
        "prompt_s": times["prompt"],
        "n_prompt": times["n_prompt"],
        "decode_s": times["decode"],
        "steps": times["steps"],
    }


def _stamp(path: Path) -> list[int]:
    if not path.exists():
        return [0, 0]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _cache(root: Path) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """The kept table and the stamp of every file behind it; nothing where it cannot be used."""
    try:
        table = pd.read_parquet(root / CACHE)
    except (OSError, ValueError):
        return pd.DataFrame(), {}
    if list(table.columns) != ["cell", *SAMPLE]:  # kept by another version
        return pd.DataFrame(), {}
    return table, table.attrs["stamps"]


def _keep(root: Path, table: pd.DataFrame, stamps: dict[str, list[int]]) -> None:
    table = table.copy(deep=False)
    table.attrs = {"stamps": stamps}
    draft = root / (CACHE + ".new")
    try:
        table.to_parquet(draft)
        draft.replace(root / CACHE)
    except OSError:  # a read-only folder is read without a cache
        draft.unlink(missing_ok=True)


def _why(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}" if not isinstance(error, KeyError) else f"cell.json lacks {text}"
