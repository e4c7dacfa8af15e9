"""The settings of a call: their names, types and bounds. Each is a key of conf/config.yaml or of a group's files.

`method`, `task` and `runner` name classes, whose arguments are their settings (methods/core/build.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from methods.core.typed import Count, Folder, Range, Whole
from runners.engine.model_files import DATE

Threads = Annotated[int, Range(least=1, most=4096)]
Seconds = Annotated[float, Range(above=0), "seconds per sample, above 0, or null for no limit"]

Temperature = Annotated[float, Range(least=0), "a number, 0 or more; at 0 the likeliest token is taken"]
TopP = Annotated[float, Range(above=0, most=1)]


@dataclass
class Model:
    """One file of conf/model; see conf/base/model.yaml."""

    path: str
    file: str | None = None
    revision: str = "main"
    max_length: Count | None = None
    chat: bool = True
    chat_options: dict[str, Any] = field(default_factory=dict)
    init: Literal["pretrained", "random"] = "pretrained"
    shape: str | None = None
    resize: dict[str, Any] | None = None
    date: Annotated[str, "a day such as 2024-07-26"] = DATE
    convert: Annotated[Literal["ask", "always"], "ask or always"] = "ask"
    check: Annotated[Literal["auto", "off", False], "auto or off"] = "auto"  # YAML reads off as false
    texts: Literal["bundled", "real"] = "bundled"
    reasoning: Annotated[Literal["strip", "keep", "off", False], "one of strip, keep, off"] = "strip"


@dataclass
class Tracking:
    """One file of conf/wandb."""

    mode: Annotated[Literal["disabled", "offline", "online"], "one of disabled, offline, online, or wandb=NAME"]
    project: str = "kvfrontier"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class CacheNumbers:
    """What caches hold; see methods/core/binding/rounding.py."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"


@dataclass
class Kernels:
    """Which form of the ops is taken; see kernels.backend."""

    backend: Literal["auto", "reference", "triton"]


@dataclass
class Group:
    """The most that a group of a sweep may hold: bytes of its caches, and cells."""

    max_bytes: Count | None = None
    max_cells: Count | None = None


@dataclass
class Sampled:
    """How answers are drawn; None: as the task says. See tasks.base.Sampling."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Whole | None = None
    repeats: Count | None = None
    seed: Whole | None = None


@dataclass
class Config:
    """Everything but Hydra's own settings."""

    model: Model
    method: Any
    task: Any
    runner: Any
    wandb: Tracking
    budget: Any  # checked by methods.core.budget
    budget_miss: Literal["keep", "fail"]
    protocol: Annotated[Literal["query_aware", "query_agnostic", "aware", "agnostic"], "query_aware or query_agnostic"]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    device: str
    kernels: Kernels
    threads: Threads | None
    batch_size: Count
    chunk: Count | None
    seed: Whole
    results: Folder
    resume: Literal["auto", "old", "force"]
    dry_run: bool
    references: bool
    time_limit: Seconds | None
    cells: list[str] | None
    group: Group
    last_token: Literal["held"] | None = None
    sampling: Sampled = field(default_factory=Sampled)
    fidelity: Annotated[Literal["auto", "full", "off", False], "one of auto, full, off"] = (
        "auto"  # YAML reads off as false
    )
    cache: CacheNumbers = field(default_factory=CacheNumbers)
