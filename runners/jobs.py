"""Cells of a sweep as jobs for Hydra's launchers: which belong together, and how their overrides travel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

# what cells of one group may differ in: the prompt's own pass depends on none of them
OWN = ("method", "method.", "+method.", "++method.", "~method.", "budget", "seed")

# set by the sweeper: how many groups there are, and when it began
GROUPS = "KVFRONTIER_GROUPS"


def announce(groups: int) -> None:
    """Let this process and those that it starts know of how many groups each is one."""
    os.environ[GROUPS] = f"{groups} {time.time()}"


def announced() -> tuple[int, float]:
    """How many groups the sweep of this process has, and when it began; one, outside a sweep."""
    groups, began = os.environ.get(GROUPS, "1 0").split()
    return int(groups), float(began)


def shard() -> tuple[int, int]:
    """Which of a group's jobs this one is, from 1, and of how many: they share its samples between them."""
    hydra = HydraConfig.get()
    shards = int(hydra.sweeper.get("shards", 1)) if hydra.mode == RunMode.MULTIRUN else 1
    return (int(hydra.job.num) % shards + 1, shards) if shards > 1 else (1, 1)


class Failed(Exception):
    """A job of a sweep did not end well, and has said so. Hydra goes on with the others before it passes this on."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def spread(words: Sequence[str]) -> list[str]:
    """A command line whose `method.KEY=VALUE` is a sweep of one value where the method is swept, or a named grid's.

    Hydra sets what is not swept before there is a method, in the default one, which may have no such knob. A sweep of
    one value is the value twice, of which the sweeper makes one cell: choice() takes no null, and loses quotes.
    """
    parse = OverridesParser.create().parse_override
    typed = {word: parse(word) for word in words if "=" in word and not word.startswith("-")}
    several = any(
        one.key_or_group == "experiment" or (one.key_or_group == "method" and one.is_sweep_override())
        for one in typed.values()
    )
    written = []
    for word in words:
        key, _, value = word.partition("=")
        alone = word in typed and not typed[word].is_sweep_override()
        value = value or "''"
        written.append(f"{key}={value},{value}" if several and alone and key.startswith("method.") else word)
    return written


def tidy(cell: Sequence[str]) -> list[str]:
    """Numbers as typed: range(0.1,0.5,0.1) gives 0.30000000000000004."""
    overrides = []
    for override in cell:
        key, _, value = override.partition("=")
        try:
            number = float(value) if "." in value else None
        except ValueError:
            number = None
        short = f"{number:.12g}" if number is not None else value
        overrides.append(f"{key}={short}" if len(short) < len(value) else override)
    return overrides


def with_references(cells: Sequence[Sequence[str]], names: Mapping[str, bool]) -> list[list[str]]:
    """The cells, and beside those at a budget what they are measured against.

    names: of these methods, and whether they have a budget, which is the cell's then. A reference takes a cell's place
    word by word, without the knobs of the cell's own method.
    """
    found = {tuple(cell): None for cell in cells}
    for cell in cells:
        if not any(word.startswith("budget=") for word in cell):
            continue
        bare = [word for word in cell if not word.lstrip("+~").startswith("method.")]
        for name, has_budget in names.items():
            words = [f"method={name}" if word.startswith("method=") else word for word in bare]
            found[tuple(word for word in words if has_budget or not word.startswith("budget="))] = None
    return [list(cell) for cell in found]


def group(
    cells: Sequence[Sequence[str]], capped: Callable[[Sequence[str]], bool] = lambda cell: False
) -> list[list[str]]:
    """Jobs in order of first appearance: what all cells of a job share, and `cells=[...]` with the rest of each.

    capped: whether the task of this cell takes the budget too, so that every budget is a job of its own.
    """
    jobs: dict[tuple[str, ...], list[list[str]]] = {}
    by_prompt: dict[tuple[str, ...], bool] = {}
    for cell in cells:
        shared, overrides = apart(cell)
        if shared not in by_prompt:
            by_prompt[shared] = capped(cell)
        if by_prompt[shared]:
            shared += tuple(override for override in overrides if override.startswith("budget="))
            overrides = [override for override in overrides if override not in shared]
        members = jobs.setdefault(shared, [])
        if overrides not in members:
            members.append(overrides)
    return [[*shared, f"cells=[{','.join(quote(' '.join(map(escape, overrides))) for overrides in members)}]"]
            for shared, members in jobs.items()]  # fmt: skip


def apart(cell: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """A cell's overrides: those that its prompts' own pass depends on, and those of the cell alone."""
    shared = tuple(override for override in cell if not _own(override))
    return shared, [override for override in cell if override not in shared]


def job_cells(job: Sequence[str]) -> list[list[str]]:
    """The cells of a job that `group` made, each with all its overrides; empty for another job."""
    if not job or not job[-1].startswith("cells="):
        return []
    words = OverridesParser.create().parse_override(job[-1]).value()
    assert isinstance(words, list)
    return [[*job[:-1], *unpack(str(getattr(word, "text", word)))] for word in words]


def escape(override: str) -> str:
    """An override as one word of a cell."""
    return override.replace("%", "%25").replace(" ", "%20")


def unpack(cell: str) -> list[str]:
    """The overrides of one cell."""
    return [word.replace("%20", " ").replace("%25", "%") for word in cell.split()]


def quote(text: str) -> str:
    """A string in Hydra's override grammar."""
    text = text.replace("'", "\\'")
    return f"'{text}'"


def _own(override: str) -> bool:
    key = override.partition("=")[0]
    return any(key == setting or (setting.endswith(".") and key.startswith(setting)) for setting in OWN)
