"""The report for Weights & Biases: built from records without a network, and sent where there is one."""

import json

import pytest

from analysis import report
from analysis.load import load_results
from analysis.pages import wandb_report
from analysis.report import main


def placed(folder, places):
    """Give the samples of a cell lengths and depths."""
    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, (length, depth) in zip(rows, places):
        row["tags"] |= {"length": length, "depth": depth}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def results(book, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    book.cell(scores=[1.0, 1.0])
    book.cell("nacl", [1.0, 0.0], 0.25)
    places = [(256, 0), (256, 50), (512, 0), (512, 50)]
    placed(book.cell(scores=[1.0] * 4, task="needle-mini"), places)
    placed(book.cell("nacl", [1.0, 0.0, 0.5, 1.0], 0.25, task="needle-mini"), places)
    return book.root


def read_back(path):
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.reports.v2 import internal

    return wr.Report._from_model(internal.ReportViewspec.model_validate_json(path.read_text()))


def test_without_a_network_the_reports_json_is_written_and_holds_panels_tables_and_heat_maps(results, capsys):
    import wandb_workspaces.reports.v2 as wr

    assert main([str(results), "--wandb", "--project", "caches", "--entity", "lab"]) == 0
    assert "not sent: WANDB_MODE=offline" in capsys.readouterr().out
    made = read_back(results / "report.wandb.json")
    assert (made.project, made.entity) == ("caches", "lab") and "needle-mini" in made.title

    headings = [block.text for block in made.blocks if isinstance(block, wr.H2)]
    assert headings == ["needle-mini, aware: tiny", "quiz-mini, aware: tiny"]
    needle, quiz = (block for block in made.blocks if isinstance(block, wr.PanelGrid))
    (scatter,) = [panel for panel in quiz.panels if isinstance(panel, wr.ScatterPlot)]
    assert (scatter.x.name, scatter.y.name) == ("ledger.share", "score")
    assert "quiz-mini" in quiz.runsets[0].filters and "needle-mini" not in quiz.runsets[0].filters
    pictures = [[p.media_keys for p in grid.panels if isinstance(p, wr.MediaBrowser)] for grid in (needle, quiz)]
    assert pictures == [[["frontier"], ["heat_map"]], [["frontier"]]]

    tables = [block.text for block in made.blocks if isinstance(block, wr.MarkdownBlock)]
    assert "| nacl | 0.25 | 25.0% | 2 | 50.00 | 100.00 |" in tables[-1]
    assert [block.text.partition(":")[0] for block in made.blocks if isinstance(block, wr.H3)] == [
        "full at budget 1", "nacl at budget 0.25",
    ]  # fmt: skip
    assert "| depth | 256 | 512 |" in tables[2] and "| 0 | 1.00 | 0.50 |\n| 50 | 0.00 | 1.00 |" in tables[2]


def test_with_a_network_it_is_saved_and_its_address_is_said(results, capsys, monkeypatch):
    import wandb
    import wandb_workspaces.reports.v2 as wr

    class Api:
        default_entity = "lab"

    saved = []

    def save(self):
        saved.append((self.entity, self.project, len(self.blocks)))
        self.id = "abc"
        return self

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setattr(wr.Report, "save", save)
    monkeypatch.setattr(wr.Report, "url", property(lambda self: f"https://example.org/{self.entity}/{self.id}"))
    assert main([str(results), "--wandb"]) == 0
    assert "https://example.org/lab/abc" in capsys.readouterr().out
    assert [(entity, project) for entity, project, _ in saved] == [("lab", "kvfrontier")] and saved[0][2] > 5


def test_a_client_that_fails_costs_no_report(results, capsys, monkeypatch):
    def broken(made):
        raise RuntimeError("the line is dead\nand more")

    monkeypatch.setattr(wandb_report, "send", broken)
    assert main([str(results), "--wandb"]) == 0
    assert "not sent: the line is dead\n" in capsys.readouterr().out
    assert read_back(results / "report.wandb.json").blocks


def test_no_report_is_made_unless_it_is_asked_for(results, monkeypatch):
    monkeypatch.setattr(report, "page", lambda results: "")
    assert main([str(results)]) == 0
    assert not (results / "report.wandb.json").exists() and load_results(results).problems == []
