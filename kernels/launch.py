"""Starting a Triton kernel, or noting what would be started: the same call serves both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip

_noted: list[Variant] | None = None


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled for a call: argument types, constants, warps and stages.

    signature: type per argument.  constants: value per argument that is known when compiling.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel, its element types and its constants, for a report."""
        types = "-".join(sorted({kind for _, kind in self.signature if kind.startswith("*")}))
        constants = ", ".join(f"{key}={value}" for key, value in self.constants if value is not None)
        return f"{self.kernel.__name__} {types} {constants}"


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor. An argument that is None is a constant.

    constants: what the kernel declares as `tl.constexpr`.
    """
    if _noted is not None:
        _noted.append(_variant(kernel, args, constants, num_warps, num_stages))
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


@contextlib.contextmanager
def noting() -> Iterator[list[Variant]]:
    """Inside, `launch` starts nothing: the list gets what would be compiled, in the order of the calls."""
    global _noted
    _noted = noted = []
    try:
        yield noted
    finally:
        _noted = None


def _variant(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int) -> Variant:
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(args), f"{kernel.__name__} takes {names}"
    given = dict(zip(names, args))
    known = {**{name: value for name, value in given.items() if value is None}, **constants}
    types = [(name, "constexpr" if name in known else _type(given[name])) for name in kernel.arg_names]
    return Variant(kernel, tuple(types), tuple(known.items()), warps, stages)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
