"""Compile every Triton kernel for GPUs that need not be here: `python -m kernels.aot [--brief] [OP ...]`.

Each op's `triton.py` has `compile_cases(brief)`, which calls the op for the layouts, widths and types that it serves,
or for one of each; what these calls would start is compiled to PTX and machine code, and each block's shared memory is
held against SHARED_LIMIT.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels.backend import interpreted
from kernels.launch import Variant, noting

CAPABILITIES = (80, 90)

# bytes of shared memory that a block may have on every GPU since compute capability 8.0; 8.6 and 8.9 have the least
SHARED_LIMIT = 99 * 1024


def ops() -> list[str]:
    """The ops with a Triton form that is started by itself."""
    here = Path(__file__).parent
    ops = sorted(path.parent.name for path in here.glob("*/triton.py"))
    return [op for op in ops if hasattr(_form(op), "compile_cases")]


def _form(op: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{op}.triton")


def variants(op: str, brief: bool = False) -> list[Variant]:
    """What the calls of the op's `compile_cases` would start, each once."""
    with noting() as variants:
        _form(op).compile_cases(brief)
    return list(dict.fromkeys(variants))


def compiled(variant: Variant, capability: int) -> Any:
    """The compiled kernel, with `asm["ptx"]`, `asm["cubin"]` and `metadata.shared`. Raises what the compiler raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    assert not interpreted(), "kernels that were defined for the interpreter cannot be compiled"
    kernel, known = variant.kernel, dict(variant.constants)
    # pointers and strides of real tensors are multiples of 16, which lets loads be wide and asynchronous
    even = [i for i, (_, kind) in enumerate(variant.signature) if kind.startswith("*")]
    even += [i for i, (name, kind) in enumerate(variant.signature) if kind == "i32" and "_s" in name]
    source = ASTSource(
        fn=kernel,
        signature=dict(variant.signature),
        constexprs=known,
        attrs={(i,): [["tt.divisibility", 16]] for i in even},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(words: Sequence[str]) -> int:
    """Compile, a line per kernel and what is wrong with it if anything; returns 1 if anything is."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(ops())}; none: all")
    parser.add_argument("--brief", action="store_true", help="a few variants of each kernel instead of all")
    given = parser.parse_args(words)
    brief, wrong = given.brief, 0
    if unknown := sorted(set(given.ops) - set(ops())):
        parser.error(f"{', '.join(unknown)}: unknown; there are {', '.join(ops())}")
    for op in given.ops or ops():
        for variant in variants(op, brief):
            began, trouble, shared = time.perf_counter(), [], []
            for capability in CAPABILITIES:
                try:
                    binary = compiled(variant, capability)
                except Exception as error:  # a compiler pass fails in its own way
                    trouble.append(f"sm_{capability}: {type(error).__name__}: {error}")
                    continue
                shared.append(binary.metadata.shared)
                if not (binary.asm["ptx"] and binary.asm["cubin"]):
                    trouble.append(f"sm_{capability}: no code came out")
                if binary.metadata.shared > SHARED_LIMIT:
                    trouble.append(f"sm_{capability}: {binary.metadata.shared} bytes of shared memory")
            wrong += bool(trouble)
            seconds = time.perf_counter() - began
            print(f"{op} {variant.name}: shared {shared}, {seconds:.1f} s", *trouble, sep="\n  ", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
