"""Check that the ops agree with their formulas, then time them and hold them against the machine's ceilings.

    python -m kernels.bench                          # the GPU if there is one, else the CPU
    python -m kernels.bench --device cpu --threads 2 --contexts 2048,8192
    python -m kernels.bench --brief --out /dev/null  # seconds: whether it runs, not what it costs

Ceilings are measured: bytes per second of a large copy, operations per second of a matrix product in the same type. A
share of 80 % means that the call takes 1.25 times what its bytes and operations take at the ceilings. Exit code 1: an
op does not agree, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kernels import backend, compiled
from kernels.bench import agreement, cases
from kernels.bench.timing import Ceilings, captured_seconds, measure_ceilings, seconds

#: the checkout; None in an installed package, in which nothing is written and whose commit is not known here
CHECKOUT = Path(__file__).resolve().parents[2] if __package__ == "kernels.bench" else None


def main(words: Sequence[str]) -> int:
    """Returns the exit code."""
    options = _options(words)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        backend.use(options.backend)
        form = compiled.name_on(device)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    seed = time.time_ns() % 2**31
    checks = list(agreement.checks(device, dtype, seed))
    _show_agreement(console, checks, seed)
    if not all(check.holds for check in checks):
        return 1
    torch.manual_seed(seed)
    ceilings = measure_ceilings(device, dtype, options.seconds, options.brief)
    rows = []
    for title, calls in _settings(options, dtype, device):
        rows += _time(console, title, calls, ceilings, device, options.seconds)
    out = Path(options.out or (CHECKOUT or Path()) / "benchmarks" / "results" / f"{machine_slug(device)}.json")
    record = {
        "machine": _machine(device),
        "form": form,
        "dtype": options.dtype,
        "ceilings": {"bytes_per_second": ceilings.bytes, "flops": ceilings.flops},
        "agreement": [{"op": c.op, "form": c.form, "error": c.error, "tolerance": c.tolerance} for c in checks],
        "rows": rows,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {out}", highlight=False, soft_wrap=True)
    return 0


def _options(words: Sequence[str]) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--backend", choices=backend.BACKENDS, default="auto")
    parser.add_argument("--shape", choices=cases.SHAPES, help="default: llama3.1-8b on a GPU, small on a CPU")
    parser.add_argument("--batches", type=_numbers, help="default: 1,16 on a GPU, 1 on a CPU")
    parser.add_argument("--contexts", type=_numbers, help="slots; default: 8192,32768,131072, or 2048,8192 on a CPU")
    parser.add_argument("--prompts", type=_numbers, help="tokens; default: 8192,32768, or 2048 on a CPU")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=0.3, help="of calls per median")
    parser.add_argument("--brief", action="store_true", help="tiny sizes")
    parser.add_argument("--out", help="default: benchmarks/results/<machine>.json")
    options = parser.parse_args(words)
    large = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if large else "float32")
    options.shape = options.shape or ("llama3.1-8b" if large else "small")
    options.batches = options.batches or ([1, 16] if large else [1])
    options.contexts = options.contexts or ([8192, 32_768, 131_072] if large else [2048, 8192])
    options.prompts = options.prompts or ([8192, 32_768] if large else [2048])
    if options.brief:
        options.batches, options.contexts, options.prompts, options.seconds = [1], [256], [64], 0.001
    return options


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _settings(options: argparse.Namespace, dtype: torch.dtype, device: torch.device):
    """(what is common to the calls, the calls)."""
    shape = cases.SHAPES[options.shape]
    for batch in options.batches:
        for S in options.contexts:
            title = f"decode, {S:,} slots, batch {batch}"
            yield title, cases.decoding(shape, batch, S, dtype, device)
    for T in options.prompts:
        yield f"prompt, {T:,} tokens, batch 1", cases.reading(shape, 1, T, dtype, device)


@torch.no_grad()
def _time(
    console: Console, title: str, calls, ceilings: Ceilings, device: torch.device, budget: float
) -> list[dict[str, Any]]:
    """Time the calls of one setting, print them and return them as plain data."""
    table = Table(title=title, title_justify="left")
    for heading in ("op", "time", "share of ceiling", "GB/s", "TFLOP/s", "time beside"):
        table.add_column(heading, justify="left" if heading == "op" else "right")
    captured = device.type == "cuda" and title.startswith("decode")
    if captured:
        table.add_column("in a graph", justify="right")
    rows: list[dict[str, Any]] = []
    for case in calls:
        taken = seconds(case.call, device, budget)
        share = ceilings.seconds(case.moved, case.flops) / taken
        other = next((row for row in rows if row["op"] == case.beside), None)
        row = {
            "setting": title, "op": case.name, "seconds": taken, "share_of_ceiling": share, "bytes": case.moved,
            "flops": case.flops, "beside": case.beside,
            "times_beside": taken / other["seconds"] if other else None,
        }  # fmt: skip
        beside = f"{row['times_beside']:.2f}x {case.beside}" if other else ""
        cells = [case.name, _time_text(taken), f"{share:.0%}", f"{case.moved / taken / 1e9:.1f}"]
        cells += [f"{case.flops / taken / 1e12:.3f}" if case.flops else "", beside]
        if captured and case.decodes:
            row["captured_seconds"] = captured_seconds(case.call)
            graph_share = ceilings.seconds(case.moved, case.flops) / row["captured_seconds"]
            cells.append(f"{_time_text(row['captured_seconds'])}, {graph_share:.0%}")
        table.add_row(*cells)
        rows.append(row)
    console.print(table)
    return rows


def _time_text(taken: float) -> str:
    return f"{taken * 1e6:.0f} us" if taken < 1e-3 else f"{taken * 1e3:.2f} ms"


def _show_agreement(console: Console, checks: Sequence[agreement.Check], seed: int) -> None:
    wrong = [check for check in checks if not check.holds]
    names = ", ".join(dict.fromkeys(check.form for check in checks))
    console.print(
        f"{len(checks)} checks against formulas in float64 (forms: {names}; seed {seed}), {len(wrong)} failed"
    )
    for check in wrong:
        console.print(f"  {check.op}, {check.form}: off by {check.error:.2g}, allowed is {check.tolerance:.2g}")


def _machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    facts: dict[str, Any] = {
        "device": _device_name(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        facts["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        facts["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
        }
    return facts


def machine_slug(device: torch.device) -> str:
    """The device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", _device_name(device).lower()).strip("-")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with a plus sign if files differ from it; None outside a git checkout."""
    if CHECKOUT is None:
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=CHECKOUT, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
