"""The notebooks run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


# the third sweeps for half a minute, by the same command line that tests/test_sweep.py runs
CASES = [pytest.param(x, id=x.stem, marks=[pytest.mark.slow] * x.stem.startswith("03")) for x in NOTEBOOKS]


@pytest.mark.parametrize("path", CASES)
@pytest.mark.timeout(900)
def test_a_notebook_runs(path):
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(output.output_type in ("execute_result", "display_data", "stream") for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
    if path.stem.startswith("01"):  # what its commands print is inside the output, errors included
        assert "KV bytes, end of prompt" in "".join(o.get("text", "") for o in shown)


def test_there_are_four_of_them_and_each_is_small():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    assert all(path.stat().st_size < 400_000 for path in NOTEBOOKS)
