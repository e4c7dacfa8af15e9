"""Cells as runs of Weights & Biases: `wandb=offline` writes them below the results folder, `wandb=online` sends them.

One run per record. Its id is a hash of the record's identity and folder, so a cell that goes on later goes on in the
same run. All is read from records after their samples are done: nothing is sent while something is timed, and nothing
here fails a run.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from analysis import records
from methods.core import home
from methods.core.errors import UserError
from runners.cells import Cell, Run, plain
from runners.records.record import digest
from runners.report import run_table as show
from runners.report.compare import Compared, compare_scores, whole
from runners.report.heat_map import heat_map, read_record

STATE = ".wandb.json"  # beside a record: what was sent where
COLUMNS = [
    "id", "subset", "category", "score", "prediction", "answers", "prompt_end", "tokens_in", "tokens_out", "cut",
    "held_prompt", "held_end", "full_prompt", "full", "prompt_s", "decode_s", "steps", "error",
]  # fmt: skip


@dataclass
class Upload:
    """One run's contents.

    folder: where its state is kept.  series: by sample, what is drawn over the samples.  tables: columns and rows.
    """

    folder: Path
    id: str
    name: str
    kind: str
    group: str
    config: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    series: dict[str, dict[str, float]] = field(default_factory=dict)
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of all but its pictures: what is sent anew when it changes."""
        return digest([self.config, self.summary, self.series, self.tables], 16)


class Tracker:
    """Sends runs; without a key or a network it goes on offline, and if that fails too, not at all. It says so once."""

    def __init__(self, settings: dict[str, Any], results: Path):
        self.settings, self.results, self.mode = settings, results, settings["mode"]
        self.logged_in = False

    def lacks(self, upload: Upload) -> bool:
        """Whether this was not sent yet: it is new, or has changed, and is not a part of what was sent."""
        sent = self._state(upload.folder).get(self._place(upload), {"digest": "", "samples": []})
        return sent["digest"] != upload.digest and not set(sent["samples"]) > set(upload.series)

    def send(self, upload: Upload) -> None:
        """Send what is new of it and remember that; where that fails, go on as the class says."""
        from filelock import FileLock

        with FileLock(upload.folder / ".wandb.lock"):
            while self.mode != "disabled" and self.lacks(upload):
                state, where = self._state(upload.folder), self._place(upload)
                known = set(state.get(where, {"samples": []})["samples"])
                try:
                    self._send(upload, known)
                except Exception as error:  # whatever it is, the run's own result is safe on disk
                    self._fall_back(error)
                    continue
                state[where] = {"digest": upload.digest, "samples": sorted(known | set(upload.series))}
                (upload.folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _send(self, upload: Upload, known: set[str]) -> None:
        import wandb

        options = self.settings
        if self.mode == "online" and not self.logged_in and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("no API key; wandb login saves one")
        self.logged_in = True
        run = wandb.init(
            mode=self.mode, project=options["project"], entity=options["entity"],
            tags=[str(tag) for tag in options["tags"]],
            group=upload.group, name=upload.name, job_type=upload.kind, id=upload.id, resume="allow",
            config=upload.config, dir=str(self.results), reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True,
                x_disable_stats=True, init_timeout=30, finish_timeout=120, finish_timeout_raises=True,
                x_graphql_retry_max=3, x_file_stream_retry_max=3, x_file_transfer_retry_max=3,
            ),
        )  # fmt: skip
        try:
            run.config.update(upload.config, allow_val_change=True)
            run.define_metric("sample")
            for name in sorted(set().union(*upload.series.values())):
                run.define_metric(name, step_metric="sample")
            new = [values for id, values in upload.series.items() if id not in known]
            for number, values in enumerate(new, len(known)):
                run.log({"sample": number, **values})
            media: dict[str, Any] = {
                name: wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
                for name, (columns, rows) in upload.tables.items()
            }
            media |= {name: wandb.Image(str(path)) for name, path in upload.pictures.items()}
            if media:
                run.log(media)
            run.summary.update(upload.summary)
        finally:
            run.finish()

    def _fall_back(self, error: Exception) -> None:
        text = str(error).strip()
        problem = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
        if self.mode == "online":
            self.mode = "offline"
            folder = self.results / "wandb"
            show.note(f"wandb=online: {problem}; going on offline, wandb sync {folder}/offline-run-* sends it later")
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown()  # it holds the id of the run that broke off
        else:
            self.mode = "disabled"
            show.note(f"wandb=offline: {problem}; nothing more is written for it, the records are complete")

    def _place(self, upload: Upload) -> str:
        return f"{self.mode} {self.settings['entity'] or ''}/{self.settings['project']}/{upload.id}"

    @staticmethod
    def _state(folder: Path) -> dict[str, Any]:
        try:
            return json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}


def track(run: Run, cells: Sequence[Cell], resamples: int) -> None:
    """Send what the records hold of this call's samples, and the frontier figure where a cell was new."""
    settings = plain(run.cfg.wandb)
    if settings["mode"] == "disabled":
        return
    if os.environ.get("WANDB_MODE") == "disabled":
        show.note(f"wandb={settings['mode']}: WANDB_MODE=disabled is set in the environment; nothing is written")
        return
    os.environ.setdefault("WANDB_SILENT", "true")  # else it says of every process where its key is from
    try:
        _track(run, cells, resamples, Tracker(settings, run.results))
    except Exception as error:  # a full disk, a record that somebody deletes meanwhile
        show.note(f"wandb={settings['mode']}: {type(error).__name__}: {error}; the records are not affected")


def _track(run: Run, cells: Sequence[Cell], resamples: int, tracker: Tracker) -> None:
    full, group = run.finished(run.full), tracker.settings["group"]
    changed = False
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for number, cell in enumerate(cells):
            rows = run.rows(cell)
            if not rows:
                continue
            upload = of_cell(cell, rows, *_compared(run, rows, full, resamples), group)
            if tracker.lacks(upload):
                if picture := _map(cell, rows, scratch / f"{number}.png"):
                    upload.pictures["heat_map"] = picture
                tracker.send(upload)
                changed = True
        if changed and tracker.mode != "disabled" and any(cell is not run.full for cell in cells):
            frontier = of_frontier(run, group, scratch)
            if frontier:
                tracker.send(frontier)


def _compared(
    run: Run, rows: dict[str, dict[str, Any]], full: dict[str, dict[str, Any]], resamples: int
) -> tuple[list[Compared], Compared | None]:
    """The rows of the table, and the one that stands for the whole task; none where samples have several measures."""
    ours = {id: row for id, row in rows.items() if "error" not in row}
    paired = run.scored(ours, full)
    if not paired:
        return [], None
    scores = compare_scores(run.task, paired, resamples, seed=0)
    if len({records.measure(row) for row in ours.values()}) > 1:
        return scores, None
    return scores, whole(run.task, run.scored(ours, full, whole=True), resamples, seed=0)


def of_cell(
    cell: Cell,
    rows: dict[str, dict[str, Any]],
    scores: Sequence[Compared],
    all_of_it: Compared | None,
    group: str | None,
) -> Upload:
    """A cell's run: its identity and conditions, means of its ledger, its scores, one table row per sample."""
    identity, runs = cell.record.identity, cell.record.runs()
    names = {
        "model": identity["model"]["name"], "task": identity["task"]["name"], "method": identity["method"]["name"],
        "budget": identity["budget"], "protocol": identity["protocol"], "seed": identity["seed"],
    }  # fmt: skip
    finished = [row for row in rows.values() if "error" not in row]
    return Upload(
        folder=cell.record.folder,
        id=digest([identity, cell.record.folder.name], 16),
        name=cell.record.folder.name,
        kind="cell",
        group=group or _group(names),
        config={**names, "identity": identity, "runs": runs},
        summary={
            "n": len(finished),
            "failed": len(rows) - len(finished),
            **_scores(scores, all_of_it),
            **({"ledger": ledger(finished), "timings": speeds(finished)} if finished else {}),
        },
        series={row["id"]: _series(row) for row in finished},
        tables={"samples": (COLUMNS, [_line(row) for row in rows.values()])},
    )


def of_frontier(run: Run, group: str | None, scratch: Path) -> Upload | None:
    """A run of the figure that `python -m analysis.frontier` draws of all records of this model and task.

    None where there is nothing to draw, which is said.
    """
    # as a command: what analyses records is not part of what makes them
    identity = run.full.record.identity
    names = {key: identity[key]["name"] for key in ("model", "task")}
    command = [sys.executable, "-m", home.here("analysis.frontier"), str(run.results.resolve()), "--out", str(scratch)]
    command += [word for key, name in names.items() for word in (f"--{key}", name)]
    no_screen = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=home.ABOVE, env=no_screen, capture_output=True, text=True)
    if done.returncode:
        show.note(f"wandb={run.cfg.wandb.mode}: no frontier figure; {(done.stderr.strip().splitlines() or [''])[-1]}")
        return None
    with (scratch / "frontier.csv").open(newline="", encoding="utf-8") as file:
        columns, *points = csv.reader(file)
    names["protocol"] = identity["protocol"]
    return Upload(
        folder=run.full.record.folder.parent,
        id=digest({"frontier": names, "weights": run.checkpoint.weights}, 16),
        name=f"frontier of {names['task']}",
        kind="frontier",
        group=group or _group(names),
        config=names,
        tables={"points": (columns, [[_number(value) for value in row] for row in points])},
        pictures={"frontier": scratch / "frontier.png"},
    )


def ledger(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means per sample: bytes of each moment, bytes by layer, `share` of the full cache's, bits where there are any."""
    means: dict[str, Any] = {}
    for name, first in rows[0]["ledger"].items():
        values = [row["ledger"].get(name) for row in rows]
        if isinstance(first, list):
            means[name] = [fmean(column) for column in zip(*values)]
        elif all(isinstance(value, int | float) for value in values):
            means[name] = fmean(values)
    return means


def speeds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the samples that were timed alone."""
    series = [_series(row) for row in rows]
    names = ("prompt_tokens_per_s", "decode_ms_per_token")
    known = {name: [one[name] for one in series if name in one] for name in names}
    return {name: median(values) for name, values in known.items() if values}


def _scores(scores: Sequence[Compared], all_of_it: Compared | None) -> dict[str, Any]:
    """The mean over the whole task, or else the last row, under plain names; every row of the table under `rows`."""
    if not scores:
        return {}

    def values(one: Compared) -> dict[str, Any]:
        low, high = one.interval or (None, None)
        return {
            "score": one.row.score, "full": one.full.score, "difference": one.difference, "difference_low": low,
            "difference_high": high,
        }  # fmt: skip

    every = {one.row.name: {"n": one.row.n, **values(one)} for one in scores}
    return {**values(all_of_it or scores[-1]), "rows": every}


def _series(row: dict[str, Any]) -> dict[str, float]:
    """What is drawn over the samples; a group's times are not those of any of its members."""
    book, times = row["ledger"], row["timings"]
    series = {
        "sample_score": row["score"],
        "held_prompt": book["held_prompt"],
        "held_end": book["held_end"],
    }
    if "group" not in row:
        if times["prompt"]:
            series["prompt_tokens_per_s"] = times["n_prompt"] / times["prompt"]
        if times["steps"]:
            series["decode_ms_per_token"] = 1000 * times["decode"] / times["steps"]
    return series


def _line(row: dict[str, Any]) -> list[Any]:
    """A sample's row of the table, in the order of COLUMNS; times are those of its batch."""
    book, times = row.get("ledger", {}), row.get("timings", {})
    alone = {} if "group" in row else {"prompt_s": times.get("prompt"), "decode_s": times.get("decode")}
    answers = "; ".join(map(str, row["answers"])) if "answers" in row else None
    fields = {**row.get("tags", {}), **row, **book, **alone, "steps": times.get("steps"), "answers": answers}
    return [fields.get(name) for name in COLUMNS]


def _map(cell: Cell, rows: dict[str, dict[str, Any]], path: Path) -> Path | None:
    """The heat map of samples that have a length and a depth."""
    if not all({"length", "depth"} <= set(row.get("tags", {})) for row in rows.values() if "error" not in row):
        return None
    try:
        samples, title = read_record(cell.record.folder)
    except UserError:  # placed by other names than a needle's
        return None
    if samples:
        heat_map(samples, path, title)
    return path if samples else None


def _group(names: dict[str, Any]) -> str:
    return f"{names['model']}/{names['task']}/{names['protocol']}"


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
