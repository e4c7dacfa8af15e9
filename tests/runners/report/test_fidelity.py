"""The fidelity panels on the screen: 80 columns, coloured labels, and what is said below them."""

import io
from types import SimpleNamespace

from rich.console import Console

from analysis import screen
from methods.core.budget import Budget
from runners.report import fidelity
from tasks.base import Example
from tests.rows import done

IDS = [1, 2, 3, 4, 5, 6, 7, 8, 0]


def cell(budget: float = 0.5, changes_prompt: bool = False):
    method = SimpleNamespace(budget=budget, request=Budget(budget), changes_prompt=changes_prompt)
    return SimpleNamespace(method=method)


def forced(kl: float, first: float = 0.0, flip=None) -> dict:
    return {"kl": [first, kl, kl], "differ": [], "clear": [], "counted": 1, "dnll": 0.0, "flip": flip}


def rows(n: int, **more) -> dict:
    return {f"qa/{i}": done(f"qa/{i}", ids=IDS, stop="end", **more) for i in range(n)}


def run(n: int, seconds: float = 1.0):
    examples = [Example(f"qa/{i}", "text", "who?", ["me"], 8, {"subset": "qa", "category": "QA"}) for i in range(n)]
    panel = SimpleNamespace(began=0.0, seconds=seconds, share=0.125, noise=2e-5)
    task = SimpleNamespace(metric=SimpleNamespace(better="higher"))
    return SimpleNamespace(full=cell(1), examples=examples, task=task, panel=panel)


def found(n: int, **more):
    one = run(n)
    return one, fidelity.panels(one, [("full", one.full, rows(n)), ("snapkv", cell(), rows(n, **more))], rows(n), 100)


def shown(panels) -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard", highlight=False)
    console.print(screen.fitted(fidelity.table(panels), console))
    return file.getvalue()


def test_red_and_yellow_labels_and_every_number_fit_in_80_columns():
    expected = {0.0: ("unread", "\x1b[31m"), 1.5: ("far", "\x1b[33m"), 0.2: ("suspect", "\x1b[33m"), 0.01: ("near", "")}
    for kl, (label, colour) in expected.items():
        _, panels = found(20, forced=forced(kl))
        (name, _, panel), text = panels[0], shown(panels)
        assert len(panels) == 1 and name == "snapkv" and panel.label == label
        assert f"{colour}{label}" in text
        assert all(word in text for word in ("KL max", "same token", "clear flips", "prefix", "runaway", "full cut"))
    _, panels = found(19, forced=forced(0.0))
    assert panels[0][2].label == "" and "unread" not in shown(panels)


def test_what_is_odd_is_said_below_the_table(capsys):
    one, panels = found(20, forced=forced(0.01, first=1e-3, flip=1))
    said = fidelity.remarks(panels, [])
    took, noise = fidelity.about_this_run(one)
    assert "took 12% of the time" in took and "2e-05 nats from itself" in noise
    parted = "20 of 20 forced answers part elsewhere than the free ones"
    assert any(line.startswith(f"fidelity of snapkv 0.5: {parted}") for line in said)
    assert any("up to 0.001 nats off" in line for line in said)
    fidelity.print_panels(one, [("snapkv", panels[0][1], rows(1, forced={"error": "ValueError: no"}))], panels)
    assert "the forced half of 1 answers failed: ValueError: no" in capsys.readouterr().out


def test_records_without_ids_have_no_panel_and_nothing_is_said(capsys):
    one = run(20, seconds=0.0)
    one.panel.noise = None
    old = {f"qa/{i}": done(f"qa/{i}") for i in range(20)}
    assert fidelity.panels(one, [("snapkv", cell(), rows(20))], old, 100) == []
    assert fidelity.panels(one, [("snapkv", cell(), old)], rows(20), 100) == []
    fidelity.print_panels(one, [("snapkv", cell(), old)], [])
    assert capsys.readouterr().out == ""
