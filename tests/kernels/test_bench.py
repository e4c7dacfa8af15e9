"""`python -m kernels.bench`: it checks before it times, and its numbers are of what it says."""

import json

import pytest
import torch

from kernels import attend, backend
from kernels.bench import __main__ as bench
from kernels.bench import agreement, cases, timing
from kernels.bench.timing import Ceilings

CPU = torch.device("cpu")
TINY = cases.Shape(4, 2, 32)


@pytest.fixture(autouse=True)
def as_a_user_runs_it(monkeypatch):
    """Not interpreted; backends as before afterwards."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = backend.chosen()
    yield
    backend.use(chosen)


def test_a_brief_run_checks_times_and_writes_what_it_ran_on(tmp_path, capsys):
    out = tmp_path / "machine.json"
    assert bench.main(["--brief", "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert " 0 failed" in printed and "share of ceiling" in printed and str(out) in printed
    ops = {row["op"].split(",")[0].split(" ")[0] for row in record["rows"]}
    assert ops >= {
        "attend",
        "attend_pages",
        "attend_pages_with_mass",
        "attend_quantized",
        "attend_with_mass",
        "attend_with_sums",
        "mass",
        "noisy_mass",
        "quantize",
        "rotate",
    }
    for row in record["rows"]:
        least = max(row["bytes"] / record["ceilings"]["bytes_per_second"], row["flops"] / record["ceilings"]["flops"])
        assert row["share_of_ceiling"] == least / row["seconds"]
        beside = {r["op"]: r["seconds"] for r in record["rows"] if r["setting"] == row["setting"]}.get(row["beside"])
        assert row["times_beside"] == (row["seconds"] / beside if beside else None)
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["threads"] == 1
    assert record["form"] in ("reference", "compiled")
    assert {check["form"] for check in record["agreement"]} >= {"reference"}


def test_an_op_that_is_wrong_is_named_and_nothing_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(agreement, "attend", lambda *args, **kwargs: attend(*args, **kwargs) * 1.01)
    out = tmp_path / "machine.json"
    assert bench.main(["--brief", "--device", "cpu", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "attend, every rule, reference: off by" in printed and "share of ceiling" not in printed
    assert not out.exists()


def test_a_result_that_is_not_a_number_does_not_agree():
    assert not agreement.Check("mass", "reference", float("nan"), 1.0).holds


def test_triton_without_a_gpu_is_told_in_one_line(capsys, monkeypatch):
    backend._trouble.cache_clear()
    assert bench.main(["--brief", "--device", "cpu", "--backend", "triton"]) == 2
    err = capsys.readouterr().err
    backend._trouble.cache_clear()
    assert err.startswith("error: kernels.backend=triton") and len(err.splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_type_agrees_within_its_rounding(dtype):
    for seed in (0, torch.seed() % 2**31):
        assert [check for check in agreement.checks(CPU, dtype, seed) if not check.holds] == [], seed


def test_bytes_are_those_of_keys_values_and_ends():
    found = {case.name: case for case in cases.decoding(TINY, 2, 512, torch.float16, CPU)}
    kv = 2 * 2 * 2 * 512 * 32 * 2
    assert found["attend"].moved == kv + 2 * (2 * 4 * 32 * 2)
    assert found["attend to a quarter"].moved == kv / 4 + 2 * (2 * 4 * 32 * 2)
    # four codes per byte, two float16 per 32 elements, 128 of 512 slots in 16 bits
    packed = 3 / 4 * kv / 2 * (1 / 4 + 4 / 32) + kv / 4
    assert found["attend_quantized, 2 bits"].moved == packed + 2 * (2 * 4 * 32 * 2)
    assert found["attend"].flops == 4 * 2 * 4 * 32 * 512


def test_heads_of_the_ragged_case_hold_a_quarter_on_average():
    found = {case.name: case for case in cases.decoding(TINY, 2, 512, torch.float32, CPU)}
    pages, even = found["attend_pages, a quarter on average"], found["attend to a quarter"]
    assert pages.beside == even.name
    assert even.moved <= pages.moved < 1.06 * even.moved  # positions, and a page's rest


def test_the_ceiling_that_binds_is_the_one_that_counts():
    ceilings = Ceilings(bytes=100.0, flops=1000.0)
    assert ceilings.seconds(50, 10) == 0.5
    assert ceilings.seconds(50, 2000) == 2.0


def test_seconds_is_the_median_of_several_calls(monkeypatch):
    clock = iter([0, 1, 0, 9, 0, 2, 0, 3, 0, 2])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    assert timing.seconds(lambda: calls.append(1), CPU, 1.0) == 2
    assert len(calls) == 1 + timing.LEAST_CALLS  # the first one is not counted


def test_the_file_is_named_by_the_hardware(monkeypatch):
    monkeypatch.setattr(bench, "_cpu_name", lambda: "AMD EPYC 7B13 (64-Core)")
    assert bench.machine_slug(CPU) == "amd-epyc-7b13-64-core"
