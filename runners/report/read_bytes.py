"""What is said of cells beside the bytes that they hold: what they read and move, and what lies on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from runners.report import run_table as show

SIZES = ("held_prompt", "full_prompt", "host", "read_step", "full_read", "read_turn", "moved_step")


def binds_reads(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the budget of a cell with these samples is for what it reads."""
    return bool(rows) and rows[0]["ledger"].get("binds") == "read"


def read_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a step reads and moves, and what is on the host; nothing for cells that hold all they save on the device."""
    mean = {name: fmean(row["ledger"].get(name, 0) for row in rows) if rows else 0.0 for name in SIZES}
    if not (binds_reads(rows) or mean["host"] or mean["moved_step"]):
        return {}
    said = {
        "KV bytes read per step": f"{show.size(mean['read_step'])} ({show.share(mean['read_step'], mean['full_read'])})"
    }
    if mean["read_turn"]:
        said["KV bytes read by later turns"] = show.size(mean["read_turn"])
    if mean["host"]:
        said["KV bytes on the host"] = f"{show.size(mean['host'])} ({show.share(mean['host'], mean['full_prompt'])})"
    if mean["moved_step"]:
        said["KV bytes moved per step, host and device"] = show.size(mean["moved_step"])
    return said


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same in a line, with what is held; nothing for other cells."""
    said = read_rows(rows)
    if not said:
        return ""
    held, full = (fmean(row["ledger"][name] for row in rows) for name in ("held_prompt", "full_prompt"))
    return "; ".join([f"KV bytes held {show.size(held)} ({show.share(held, full)})", *map(" ".join, said.items())])
