"""The figure of a kernels.bench record."""

import json

import pytest

from benchmarks import plot_ops

ROW = {"setting": "decode, 8 slots", "op": "attend", "seconds": 2.0, "share_of_ceiling": 0.4}
RECORD = {
    "ceilings": {"bytes_per_second": 4e12, "flops": 5e14},
    "machine": {"device": "a GPU"},
    "dtype": "bfloat16",
    "rows": [{**ROW, "captured_seconds": 1.0}, {**ROW, "setting": "prompt, 9 tokens", "op": "mass"}],
}


def test_the_figure_lies_beside_the_record(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RECORD))
    assert plot_ops.main([str(path)]) == 0
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(tmp_path / "gpu.png")


def test_half_the_time_is_twice_the_share():
    assert plot_ops.captured_share(RECORD["rows"][0]) == pytest.approx(0.8)
