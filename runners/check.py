"""Checks of a composed configuration that need nothing heavy."""

from __future__ import annotations

import re

from omegaconf import DictConfig

from methods.core.budget import check_budget
from methods.core.errors import UserError

PROTOCOLS = ("aware", "agnostic")
DTYPES = ("auto", "float32", "float16", "bfloat16")
RESUME = ("auto", "old", "force")
BACKENDS = ("auto", "reference", "triton")
TRACKING = ("disabled", "offline", "online")


def check(cfg: DictConfig) -> None:
    """Raises UserError for a value that cannot work, before anything heavy is imported."""
    for group in ("model", "method", "task", "runner"):
        if not cfg.get(group):
            raise UserError(f"{group}: nothing is chosen; give {group}=NAME")
    check_budget(cfg.budget)
    for key, value, allowed in (
        ("protocol", cfg.protocol, PROTOCOLS),
        ("dtype", cfg.dtype, DTYPES),
        ("resume", cfg.resume, RESUME),
        ("kernels.backend", cfg.kernels.backend, BACKENDS),
    ):
        if value not in allowed:
            raise UserError(f"{key}={value}: give one of {', '.join(allowed)}")
    if cfg.wandb.mode not in TRACKING:
        raise UserError(f"wandb.mode={cfg.wandb.mode}: give one of {', '.join(TRACKING)}, or wandb=NAME")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(cfg.device)):
        raise UserError(f"device={cfg.device}: give auto, cpu, cuda, or one of several such as cuda:1")
    for key, value, least, may_be_null in (
        ("batch_size", cfg.batch_size, 1, False),
        ("seed", cfg.seed, 0, False),
        ("chunk", cfg.chunk, 1, True),
        ("threads", cfg.threads, 1, True),
        ("group.max_bytes", cfg.group.max_bytes, 1, True),
        ("group.max_cells", cfg.group.max_cells, 1, True),
    ):
        if value is None and may_be_null:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{key}={value}: give a whole number, {least} or more")
    limit = cfg.time_limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit <= 0):
        raise UserError(f"time_limit={limit}: give seconds per sample, above 0, or null for no limit")
