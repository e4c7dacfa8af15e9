"""The notebooks run from top to bottom."""

import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
# the first runs the command of `make run` and the third sweeps, half a minute each, as tests/test_run.py and
# tests/test_sweep.py do on smaller data
QUICK = [path for path in NOTEBOOKS if path.stem[:2] not in ("01", "03")]


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """IPython in this process, which has imported what notebooks import; what a notebook changes is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # IPython's own stands there for a while
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    with warnings.catch_warnings():
        shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
        yield shell
        InteractiveShell.clear_instance()


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(path, shell, monkeypatch):
    monkeypatch.chdir(path.parent)
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            with capture_output():
                result = shell.run_cell(cell.source)
            result.raise_error()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.timeout(900)
def test_a_notebook_runs_in_a_kernel_of_its_own(path):
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(output.output_type in ("execute_result", "display_data", "stream") for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
    if path.stem.startswith("01"):  # what its commands print is inside the output, errors included
        assert "KV bytes, end of prompt" in "".join(output.get("text", "") for output in shown)


def test_there_are_four_of_them_and_each_is_small():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    assert all(path.stat().st_size < 400_000 for path in NOTEBOOKS)
