"""What a sweep prints: its plan before anything runs, and the table of all cells when it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from analysis import screen
from methods.core.errors import BudgetMiss
from runners.jobs import shard
from runners.report import fidelity, read_bytes, remarks
from runners.report import run_table as show
from runners.report.compare import Compared, compare_scores
from runners.report.heat_map import draw_all
from runners.report.latency_report import show_times

if TYPE_CHECKING:
    from runners.sweep import Sweep, SweepCell

# cells with failures whose command is printed
SHOWN_COMMANDS = 5


def report_sweep(sweep: Sweep, resamples: int) -> int:
    """Print one line per cell, or several where its task has no average; then what failed and how to run it again.

    Returns the exit code.
    """
    run = sweep.run
    number, shards = shard()
    if number > 1:  # the first one waits for the others' samples, and prints the table of all
        show.say(f"job {number} of {shards} for these samples is done; the table is the first one's")
        return max(_failures(sweep), sweep.code)
    if run.timed:
        _report_times(sweep)
        return max(_failures(sweep), sweep.code)
    full = _finished(sweep, sweep.members[0])
    in_order = sorted(sweep.members, key=lambda m: (m.cell is not run.full, m.cell.name, -m.cell.method.budget))
    cells = [(_name(member), member.cell, _finished(sweep, member)) for member in in_order]
    panels = fidelity.panels(run, cells, full, resamples)
    labels = {id(cell): fidelity.coloured(one.label) for _, cell, one in panels}
    lower = run.task.metric.better == "lower"
    lines, missed = [], []
    for member, (_, _, ours) in zip(in_order, cells, strict=True):
        paired = run.scored(ours, full)
        rows = compare_scores(run.task, paired, resamples, seed=0) if paired else []
        if line := remarks.misses(list(ours.values())):
            missed.append(f"{_name(member)} {member.cell.method.budget:g}: {line}")
        for name, texts in _lines(rows, list(ours.values()), lower):
            label = [labels.get(id(member.cell), "-")] if panels else []
            lines.append((name, [_name(member), f"{member.cell.method.budget:g}", *texts, *label]))
    several = len({name for name, _ in lines if name}) > 1
    columns = ["n", "score", "difference", "95 % interval", "KV bytes", "worst", *["fidelity"] * bool(panels)]
    table = screen.new_table("method", "budget", *["row"] * several, *columns, left=("row", "worst", "fidelity"))
    for name, texts in lines:
        table.add_row(*texts[:2], *[name] * several, *texts[2:])
    screen.print_table(table)
    for line in show.about(run.task.metric):
        show.say(line)
    show.say(
        "KV bytes: measured at the end of the prompt, as a share of the full cache's"
        f"{', or where it says so read by a step' if any(m.cell.method.binds == 'read' for m in in_order) else ''}"
        f"{', * where samples are above the budget' if missed else ''}; speeds are not measured in groups"
    )
    for line in missed:
        show.say(line)
    for member in sweep.members:
        if line := read_bytes.told(list(_finished(sweep, member).values())):
            show.say(f"{_name(member)} {member.cell.method.budget:g}: {line}")
    pairs = [(row, full[id]) for member in sweep.members for id, row in _finished(sweep, member).items() if id in full]
    if pairs:
        cut = sum(row["cut"] for row in full.values())
        show.say(f"{run.settings(pairs)}; {cut} of {len(full)} samples cut in the middle")
    _remark(sweep)
    fidelity.print_panels(run, cells, panels)
    draw_all(run.examples, [member.cell.record.folder for member in sweep.members])
    show.say(f"records: {run.full.record.folder.parent}")
    return max(_failures(sweep), sweep.code)


def _remark(sweep: Sweep) -> None:
    """Whose answers the exact prefill gave, cells of one number in one line; then what became of reasoning."""
    run = sweep.run
    exact: dict[str, list[str]] = {}
    everything: list[dict[str, Any]] = []
    for member in sweep.members:
        rows = list(_finished(sweep, member).values())
        everything += rows
        if member.cell is not run.full and (line := remarks.by_prefill(rows)):
            exact.setdefault(line, []).append(f"{_name(member)} {member.cell.method.budget:g}")
    for line, names in exact.items():
        show.say(f"{line}: {', '.join(names)}")
    if exact:
        show.say("no method changes such answers; last_token=held lets the compressed cache give them")
    for line in remarks.reasoning(everything, run.reasoning):
        show.say(line)


def _report_times(sweep: Sweep) -> None:
    """One line per cell, length and batch."""
    cells = []
    for member in sweep.members:
        label = _name(member) if member.cell is sweep.run.full else f"{_name(member)} {member.cell.method.budget:g}"
        cells.append((label, list(_finished(sweep, member).values()), member.cell.record.folder))
    show_times(cells, sweep.run.checkpoint.name)
    show.say(f"records: {sweep.run.full.record.folder.parent}")


def _name(member: SweepCell) -> str:
    """The method and the knobs that were typed."""
    knobs = [word.partition("method.")[2] for word in member.words if word.lstrip("+").startswith("method.")]
    seed = [word for word in member.words if word.startswith("seed=")]
    return " ".join([member.cell.name, *knobs, *seed])


def _finished(sweep: Sweep, member: SweepCell) -> dict[str, dict[str, Any]]:
    rows = sweep.run.own_rows(member.record.rows)
    return {id: row for id, row in rows.items() if "error" not in row}


def _lines(rows: Sequence[Compared], ours: Sequence[dict[str, Any]], lower: bool) -> list[tuple[str, list[str]]]:
    """The names and lines of the rows that stand for one cell; lower: a low score is good."""
    if not rows:
        return [("", ["0", *["-"] * 5])]
    return [(whole.row.name, _line(whole, rows, ours, lower)) for whole in widest(rows)]


def widest(rows: Sequence[Compared]) -> list[Compared]:
    """The first average of most samples; without one the means over several subsets, or else every subset."""
    averages = [one for one in rows if one.row.kind == "average"]
    subsets = [one for one in rows if one.row.kind == "subset"]
    most = max((one.row.n for one in subsets), default=0)
    means = [one for one in rows if one.row.kind == "category" and one.row.n > most]
    return [max(averages, key=lambda one: one.row.n)] if averages else means or subsets


def _line(whole: Compared, rows: Sequence[Compared], ours: Sequence[dict[str, Any]], lower: bool) -> list[str]:
    """n, score, difference, interval, bytes and the subset that lost most."""
    reads = read_bytes.binds_reads(ours)
    keys = ("read_step", "full_read") if reads else ("held_prompt", "full_prompt")
    held, of = (fmean(row["ledger"][key] for row in ours) for key in keys)
    subsets = [one for one in rows if one.row.kind == "subset" and one.difference is not None]
    gains = [((one.difference or 0.0) * (-1 if lower else 1), one) for one in subsets]
    gain, worst = min(gains, key=lambda pair: pair[0], default=(0.0, whole))
    digits = whole.digits
    return [
        str(whole.row.n),
        show.points(whole.row.score, digits),
        show.signed(whole.difference, digits),
        show.interval(whole.interval, digits),
        f"{show.share(held, of)}{' read' if reads else ''}{'*' if remarks.misses(ours) else ''}",
        f"{worst.row.name} {show.signed(worst.difference, digits)}" if gain < 0 else "-",
    ]


def _failures(sweep: Sweep) -> int:
    code, commands = 0, []
    for member in sweep.members:
        failed = sweep.failures(member)
        if member.stopped is not None:
            show.note(f"failed: {member.cell.label}: {member.stopped}")
            code = max(code, 1 if isinstance(member.stopped, BudgetMiss) else 2)
        elif failed:
            id, error = next(iter(failed.items()))
            show.note(
                f"failed: {member.cell.label}: {len(failed)} of {len(sweep.run.examples)} samples: {id} ({error})"
            )
            code = max(code, 1)
        else:
            continue
        commands.append(sweep.command(member))
    if commands:
        show.note("to run only these again:")
        for command in commands[:SHOWN_COMMANDS]:
            show.note(f"  {command}")
        if len(commands) > SHOWN_COMMANDS:
            show.note(f"  and {len(commands) - SHOWN_COMMANDS} more; the command of the sweep runs all of them")
    return code


def dry_run(sweep: Sweep) -> None:
    """Print cells, groups, what is on disk, and an estimate of bytes and time; loads a tokenizer, and no model."""
    run = sweep.run
    for member in sweep.members:
        member.record.refresh()
    lacking = {id(m): [e for e in sweep.lacking(m, run.examples) if not e.error] for m in sweep.members}
    sharing = {id(member) for member in sweep.sharing}
    table = screen.new_table("method", "budget", "done", "to run", "KV bytes of the longest", "runs", left=("runs",))
    for member in sweep.members:
        todo = lacking[id(member)]
        longest = max(todo, key=sweep.sizes.tokens, default=None)
        table.add_row(
            _name(member),
            f"{member.cell.method.budget:g}{' of reads' if member.cell.method.binds == 'read' else ''}",
            str(len(run.examples) - len(todo)),
            str(len(todo)),
            "-" if longest is None else show.size(sweep.sizes.member_bytes(member.cell.method, [longest])),
            "in the group" if id(member) in sharing else f"alone: {sweep.why_alone(member)}",
        )
    screen.print_table(table)
    together = {e.id: e for m in sweep.sharing for e in lacking[id(m)]}
    alone = [e for m in sweep.alone for e in lacking[id(m)]]
    if not together and not alone:
        show.say("everything is on disk")
        return
    if together:
        longest = max(together.values(), key=sweep.sizes.tokens)
        parts = list(sweep.sizes.split([m for m in sweep.sharing if longest in lacking[id(m)]], [longest]))
        most = max(sum(sweep.sizes.member_bytes(m.cell.method, [longest]) for m in part) for part in parts)
        show.say(
            f"group: {len(together)} prompts of {sum(map(sweep.sizes.tokens, together.values())):,} tokens are read "
            f"once for {len(sweep.sharing)} cells; caches of the longest ({sweep.sizes.tokens(longest):,} tokens) take "
            f"{show.size(most)}{f', in {len(parts)} parts' if len(parts) > 1 else ''}"
        )
    seconds, source = _estimate(sweep, lacking)
    show.say(f"time: about {show.duration(seconds)}, {source}")


def _estimate(sweep: Sweep, lacking: dict[int, list[Any]]) -> tuple[float, str]:
    """Seconds for all that is lacking, and what the guess rests on."""
    rows = [row for member in sweep.members for row in member.record.rows.values() if "timings" in row]
    alone = [row["timings"] for row in rows if "group" not in row and row["timings"]["steps"]]
    if alone:
        per_token = median(time["prompt"] / time["n_prompt"] for time in alone)
        per_step = median(time["decode"] / time["steps"] for time in alone)
        source = "by the speed of recorded samples"
    else:
        per_token = 2 * sweep.run.checkpoint.parameters / _speed(sweep.run.device)
        per_step, source = 2 * per_token, "guessed from the size of the model"
    together: dict[str, tuple[Any, int]] = {}
    seconds = 0.0
    sharing = {id(member) for member in sweep.sharing}
    for member in sweep.members:
        for example in lacking[id(member)]:
            if id(member) in sharing:
                together[example.id] = (example, together.get(example.id, (example, 0))[1] + 1)
            else:
                seconds += sweep.sizes.tokens(example) * per_token + example.max_new_tokens * per_step
    for example, members in together.values():
        # a member's compression and its row of a step cost a share of what they cost alone
        seconds += sweep.sizes.tokens(example) * per_token * (1 + 0.02 * members)
        seconds += example.max_new_tokens * per_step * (1 + 0.2 * members)
    return seconds, source


def _speed(device: torch.device) -> float:
    """Multiplications and additions per second of a matrix product, measured for an instant."""
    x = torch.ones(512, 512, device=device)
    x @ x
    began = time.perf_counter()
    for _ in range(4):
        y = x @ x
    float(y[0, 0])  # waits for the device
    return 4 * 2 * 512**3 / (time.perf_counter() - began)
