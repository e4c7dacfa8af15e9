"""A record as rows of two tables: one row of its cell, and one of each sample."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import records
from analysis.fidelity.numbers import told
from analysis.generations import asked

FORMATS = (1, 2)  # of records that can be read
METRIC = {"name": "score", "unit": "points of 100", "better": "higher", "scale": 100.0, "digits": 2}
#: columns of `Results.samples` that hold no text; `load.sample_texts` reads the texts, `size` bytes from byte `at` on.
#: `said`: an answer's token ids and what was forced, as JSON of `fidelity.numbers.told`
SAMPLE = {
    "id": "", "key": "", "end": "", "subset": "", "category": "", "measure": "", "weight": 1.0, "chance": 0.0,
    "control": False,
    "score": float("nan"), "error": "", "tokens_in": 0, "tokens_out": 0, "held": float("nan"), "held_end": float("nan"),
    "read": float("nan"), "peak": float("nan"), "bytes": float("nan"), "bytes_full": float("nan"),
    "length": float("nan"), "depth": float("nan"), "prompt_s": float("nan"), "n_prompt": 0, "decode_s": float("nan"),
    "steps": 0, "alone": True, "above": False, "said": "", "at": 0, "size": 0,
}  # fmt: skip
SHARES = ("held", "held_end", "read", "peak")
#: of a record's ledger, bytes
LEDGER = (
    "full_prompt", "full", "held_prompt", "held_end", "padding", "padding_end", "peak_prompt", "peak_decode",
    "read_step", "full_read", "read_turn", "moved_step", "moved_turn", "workspace", "adapter", "host",
)  # fmt: skip


def cell_of(name: str, folder: Path) -> dict[str, Any]:
    """A row of `Results.cells`. Raises ValueError that says what is wrong with the record's cell.json."""
    try:
        book = records.read_cell(folder, {})
    except records.Unreadable as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise ValueError(
            "its cell.json is missing or broken; the command that made the record writes it again"
        ) from error
    try:
        records.check_fields(book, records.CELL)
        records.check_fields(book["runs"][-1], records.RUN)
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
    fields = {
        "cell": name,
        "model": model["name"],
        "task": task["name"],
        "method": method["name"],
        "family": notes.get("family", "other"),
        "binds": notes.get("binds", "held"),
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
    return _whole(fields)


def samples_of(name: str, path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The latest line of each sample of one cell, and the cell's means and problems."""
    rows: dict[str, dict[str, Any]] = {}
    ledgers: dict[str, dict[str, Any]] = {}
    runs: dict[str, Any] = {}
    again: set[str] = set()  # samples that were computed again after their data had changed
    problems = []
    for line in records.lines(path, records.FINISHED) if path.exists() else ():
        try:
            if line.wrong:
                raise ValueError(line.wrong)
            read = line.row
            row = _whole(_row(read)) | {"at": line.at, "size": line.size}
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:  # tags are a task's own
            problems.append(f"{name}: line {line.number} of samples.jsonl is no sample, left out ({why(error)})")
            continue
        if rows.get(read["id"], row)["key"] != row["key"]:
            again.add(read["id"])
        rows[read["id"]] = row
        ledgers[read["id"]] = _per_sample(read)
        runs[read["id"]] = read.get("run", 0)
    if again:
        problems.append(f"{name}: {len(again)} samples, such as {min(again)}, hold two contents; the later one counts")
    table = table_of(list(rows.values()))
    table.insert(0, "cell", name)
    kept = [ledger for ledger in ledgers.values() if ledger]
    layers = [ledger["layers"] for ledger in kept]
    alike = len({len(one) for one in layers}) == 1
    return table, {
        "problems": problems,
        "runs": len({runs[id] for id, ledger in ledgers.items() if ledger}),
        "ledger": {key: round(sum(one[key] for one in kept) / len(kept)) for key in LEDGER} if kept else {},
        "layers": [round(sum(layer) / len(layers)) for layer in zip(*layers)] if alike else [],
    }


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Samples as a table with the columns of SAMPLE."""
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
    row |= {name: float(tags[name]) for name in ("length", "depth") if records.is_number(tags.get(name))}
    row["control"] = bool(tags.get("control", False))
    row["chance"] = float(tags["chance"]) if "chance" in tags else 1 / tags["n"] if tags.get("gold", -1) >= 0 else 0.0
    if "error" in line:
        return {**row, "error": str(line["error"]) or "failed"}
    ledger, times = line["ledger"], line["timings"]
    full, full_prompt = ledger["full"] or float("nan"), ledger["full_prompt"] or float("nan")
    return row | {
        "score": float(line["score"]),
        "measure": records.measure(line),
        "weight": float(line.get("weights", {}).get("", 1.0)),
        "tokens_in": line["tokens_in"],
        "tokens_out": line["tokens_out"],
        "held": ledger["held_prompt"] / full_prompt,
        "held_end": ledger["held_end"] / full,
        # records used to have what the last step read, of a full cache's bytes at the end
        "read": ledger["read_step"] / (ledger.get("full_read") or full),
        "peak": max(ledger["peak_prompt"], ledger["peak_decode"]) / full,
        "bytes": ledger["held_prompt"],
        "bytes_full": ledger["full_prompt"],
        "above": records.above(line),
        "prompt_s": times["prompt"],
        "n_prompt": times["n_prompt"],
        "decode_s": times["decode"],
        "steps": times["steps"],
        "alone": "group" not in line,
        "said": json.dumps(said, separators=(",", ":")) if (said := told(line)) else "",
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


def _per_sample(line: dict[str, Any]) -> dict[str, Any]:
    """Bytes of one sample, layer by layer and in all; empty for a failed one."""
    if "error" in line:
        return {}
    ledger = line["ledger"]
    return {**{name: ledger.get(name, 0) for name in LEDGER}, "layers": ledger.get("per_layer", [])}


def why(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read ({error.strerror})"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"it lacks {text}" if isinstance(error, KeyError) else text
