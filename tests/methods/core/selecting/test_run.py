"""A method that reads less than it holds, from the command line: its record, and the sweep's table."""

import json
import shutil
import sys
from pathlib import Path

YAML = """_target_: paged_of_ones_own.Paged
budget: ${budget}
per_group: true
pages: 4
"""


def test_a_sweep_records_and_shows_what_is_read_beside_a_method_that_drops(
    run_command, tiny_model_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "160")
    conf = tmp_path / "conf"
    (conf / "method").mkdir(parents=True)
    (conf / "method" / "paged.yaml").write_text(YAML)
    shutil.copy(Path(__file__).with_name("paged.py"), conf / "paged_of_ones_own.py")
    words = ["task=longbench", "task.limit=1", "task.subset=kinds", "protocol=agnostic", "model.max_length=200"]
    code, out, err = run_command(
        f"--config-dir={conf}", "-m", "method=paged,snapkv", "budget=0.25", "fidelity=off", "cache.dtype=float16",
        f"model.path={tiny_model_dir}", f"results={tmp_path / 'results'}", *words,
    )  # fmt: skip
    sys.modules.pop("paged_of_ones_own", None)
    assert code == 0, err
    (folder,) = (tmp_path / "results").glob("*/*/paged-*")
    assert json.loads((folder / "cell.json").read_text())["runs"][-1]["binds"] == "read"
    (line,) = (folder / "samples.jsonl").read_text().splitlines()
    book = json.loads(line)["ledger"]
    assert book["binds"] == "read" and book["read_step"] < book["full_read"] < book["held_prompt"]
    assert book["read_turn"] > 0
    share = f"{book['read_step'] / book['full_read']:.1%}"
    assert f"{share} read" in out and "KV bytes read per step" in out and "or where it says so read by a step" in out
