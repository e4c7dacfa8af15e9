"""What a budget asks for is told in one place."""

import re
from pathlib import Path

import pytest

from methods import load_method
from methods.core.budget import Budget
from methods.core.errors import NotHere

ROOT = Path(__file__).parents[3]
BY_HAND = re.compile(
    r"budget\b\s*(==|!=|<=?|>=?)\s*[\d.]|[\d.]\s*(==|!=|<=?|>=?)\s*[a-z_.]*\bbudget\b|isinstance\([a-z_.]*budget"
)


@pytest.mark.parametrize(
    ("typed", "off", "part", "number", "share", "slots"),
    [(1.0, True, False, None, 1.0, 100), (0.29, False, True, None, 0.29, 29), (64, False, False, 64, 0.64, 64),
     (512, False, False, 512, 1.0, 100)],
)  # fmt: skip
def test_a_budget_is_off_a_share_or_slots_of_a_prompt_of_100_tokens(typed, off, part, number, share, slots):
    budget = Budget(typed)
    assert (budget.is_off, budget.is_share, budget.number) == (off, part, number)
    assert (budget.share(100), budget.slots(100)) == (share, slots)


def test_only_a_number_of_slots_can_be_too_small_for_every_prompt():
    assert Budget(64).within(64) and not Budget(64).within(63)
    assert not Budget(0.01).within(64) and not Budget(1).within(64)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("snapkv", {"budget": 32}),
        ("qfilters", {"budget": 4, "sinks": 4}),
        ("scissorhands", {"budget": 4, "recent": 4}),
        ("streaming_llm", {"budget": 4, "sinks": 4}),
        ("lococo", {"budget": 0.001, "length": 1000}),
    ],
)
def test_what_no_prompt_can_meet_leaves_the_other_cells_of_a_sweep_alone(name, knobs):
    with pytest.raises(NotHere):
        load_method(name, **knobs)


def test_a_method_asks_its_request():
    assert load_method("h2o", budget=64).request == Budget(64) and load_method("full").request.is_off


def test_no_other_file_compares_budgets_with_numbers():
    files = [f for folder in ("methods", "runners", "analysis") for f in (ROOT / folder).rglob("*.py")]
    lines = {
        f"{f.relative_to(ROOT)}: {line.strip()}"
        for f in files
        if f != ROOT / "methods/core/budget.py"
        for line in f.read_text().splitlines()
        if BY_HAND.search(line.partition("#")[0])
    }
    assert not lines
