"""What a training run logs: a line of JSON per step, and none of what came after the checkpoint it goes on from."""

import json
from pathlib import Path
from typing import Any


def log_entry(path: Path, entry: dict[str, Any]) -> None:
    """Append a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def cut_log(path: Path, key: str, last: int) -> None:
    """Drop what a killed run logged after its last checkpoint: lines whose `key` is above `last`, or that are cut."""
    if path.exists():
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.endswith("}") and json.loads(line)[key] <= last
        ]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
