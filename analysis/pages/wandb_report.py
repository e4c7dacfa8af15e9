"""A W&B Report of everything in a result folder: `python -m analysis.report RESULTS --wandb`.

For every task: panels over the runs that `wandb=online` or `wandb sync` sent, and beside them the table and the heat
maps of the records. The report's JSON is always written; it is sent too where there is a key and a network.
"""

import os
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.files import write
from analysis.frontier import markdown, summary
from analysis.load import NothingToRead, Results
from analysis.points import WHOLE, points

PLACE = ["model", "task", "protocol"]
WIDTH, HEIGHT = 12, 8  # of a panel, two to a line


def build(results: Results, project: str, entity: str = "") -> Any:
    """The Report, not saved. Raises NothingToRead if there is no finished cell with a full cache beside it."""
    import wandb_workspaces.reports.v2 as wr

    table = points(results)
    if table.empty:
        raise NothingToRead("no finished cell with a full cache beside it")
    blocks: list[Any] = [wr.TableOfContents()]
    for values, group in table.groupby(PLACE, sort=True):
        settings = dict(zip(PLACE, values))
        maps = heat_maps(results, group)
        blocks += [
            wr.H2(f"{settings['task']}, {settings['protocol']}: {settings['model']}"),
            _panels(settings, group.iloc[0], bool(maps)),
            wr.MarkdownBlock(markdown(summary(group).drop(columns=["task", "protocol"]))),
        ]
        for name, grid in maps.items():
            blocks += [wr.H3(f"{name}: mean score by depth and length"), wr.MarkdownBlock(grid)]
    title = f"KV caches: {', '.join(sorted(set(table['task'])))}"
    return wr.Report(project=project, entity=entity, title=title[:128], blocks=blocks)


def _panels(settings: dict[str, str], first: pd.Series, mapped: bool) -> Any:
    """Panels over the runs of one task; they name no project of their own, so that no server is asked about it."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    runs = wr.Runset(name=settings["task"], filters=[expr.Config(name) == value for name, value in settings.items()])
    score, share = wr.SummaryMetric("score"), wr.SummaryMetric("ledger.share")
    panels: list[Any] = [
        wr.ScatterPlot(title=f"{first['metric']} against share of the bytes", x=share, y=score, log_x=True),
        wr.MediaBrowser(title="frontier", media_keys=["frontier"], num_columns=1),
        wr.BarPlot(title="difference to the full cache", metrics=[wr.SummaryMetric("difference")]),
        wr.LinePlot(title="decoding, ms per token", x="sample", y=["decode_ms_per_token"]),
    ]
    if mapped:
        panels.append(wr.MediaBrowser(title="length by depth", media_keys=["heat_map"], num_columns=1))
    for number, panel in enumerate(panels):
        panel.layout = wr.Layout(x=number % 2 * WIDTH, y=number // 2 * HEIGHT, w=WIDTH, h=HEIGHT)
    return wr.PanelGrid(runsets=[runs], panels=panels)


def heat_maps(results: Results, group: pd.DataFrame) -> dict[str, str]:
    """By method and budget, a table with a line per depth and a column per length, where samples have both."""
    maps = {}
    for _, point in group[group["category"] == WHOLE].sort_values(["label", "budget"]).iterrows():
        rows = results.finished[results.finished["cell"].isin(point["cells"])].dropna(subset=["length", "depth"])
        if rows.empty:
            continue
        grid = rows.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
        text = grid.map(lambda score: "" if pd.isna(score) else f"{score:.2f}")
        text.columns = pd.Index([f"{length:g}" for length in text.columns])
        text.insert(0, "depth", [f"{depth:g}" for depth in text.index])
        maps[f"{point['label']} at budget {point['budget']:g}"] = markdown(text)
    return maps


def send(report: Any) -> str:
    """Save the report and return its address. Raises what the client raises without a key or a network."""
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        raise ConnectionError(f"WANDB_MODE={os.environ['WANDB_MODE']}")
    if not wandb.login(prompt=False, verify=False):
        raise ConnectionError("no API key; wandb login saves one")
    report.entity = report.entity or wandb.Api().default_entity
    return report.save().url


def make(results: Results, path: Path, project: str, entity: str = "") -> str:
    """Write the report's JSON and try to send it; returns one line that says where it is."""
    report = build(results, project, entity)
    write(path, report._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1))
    try:
        return f"{path}, and {send(report)}"
    except Exception as error:  # the client has many kinds; none may fail a run whose report is already written
        text = str(error).strip()
        return f"{path}; not sent: {text.splitlines()[0] if text else type(error).__name__}"
