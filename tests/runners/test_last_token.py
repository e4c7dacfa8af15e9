"""Answers of one token: the exact prefill gives them, unless the prompt's last token is held back."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import run
from methods import load_method
from methods.core.errors import UserError
from runners.engine.answer import answer, answer_together
from runners.engine.prompt import Encoder
from runners.engine.setting import Setting, check_protocol
from tasks.base import Choice, Example, Turn
from tests.conftest import WORDS
from tests.runners.engine.test_answer import Echo
from tests.test_run import write_split

N = 8
TAGS = {"subset": "a", "category": "x"}


@pytest.fixture(scope="module")
def settings(sharp_model, tiny_tokenizer) -> tuple[Setting, Setting]:
    """With the last token in the prompt, and with it held back."""
    encoders = [Encoder(tiny_tokenizer, (2,), window=2048, hold_last=held) for held in (False, True)]
    free, held = (Setting(sharp_model, Echo(), lambda e=e: e, "aware", None, 1) for e in encoders)
    return free, held


def asked(new: int = 1, **knobs: Any) -> list[Example]:
    g = torch.Generator().manual_seed(1)
    words = WORDS.split()
    texts = [" ".join(words[i] for i in torch.randint(len(words), (90,), generator=g)) for _ in range(N)]
    return [Example(f"a/{i}", text, " who sat?", ["x"], new, TAGS, **knobs) for i, text in enumerate(texts)]


def rows(setting: Setting, method: str, batch: list[Example], budget: float = 1.0, size: int = 1) -> list[dict]:
    found: list[dict] = []
    for at in range(0, len(batch), size):
        answer(setting, load_method(method, budget=budget), batch[at : at + size], found.append)
    assert not any("error" in row for row in found), found
    return found


def said(found: list[dict]) -> list[str]:
    return [row["prediction"] for row in found]


def test_one_token_cannot_be_hurt_by_any_method_unless_the_last_token_is_held(settings):
    free, held = settings
    full = rows(free, "full", asked())
    hurt = [rows(setting, "random", asked(), budget=0.02) for setting in settings]
    assert said(hurt[0]) == said(full) and said(rows(held, "full", asked())) == said(full)
    lost = sum(a != b for a, b in zip(said(hurt[1]), said(full), strict=True))
    assert lost >= N // 2
    assert {row["by_prefill"] for row in hurt[0]} == {True} and {row["by_prefill"] for row in hurt[1]} == {False}
    assert all(row["ledger"]["held_prompt"] < 0.05 * row["ledger"]["full_prompt"] for row in hurt[1])


@pytest.mark.parametrize("size", [1, 3])
def test_the_full_cache_answers_at_length_as_it_does_without(settings, size):
    free, held = (rows(setting, "full", asked(new=5), size=size) for setting in settings)
    assert said(free) == said(held)
    assert [row["tokens_in"] for row in free] == [row["tokens_in"] for row in held]
    # what comes after the first token is the compressed cache's
    assert not any(row["by_prefill"] for row in held) and sum(row["by_prefill"] for row in free) < N


def test_nothing_said_at_all_is_the_prefills_too_and_later_turns_are_not(settings, tiny_tokenizer):
    free, held = settings
    prompt = torch.tensor([free.encoder(asked()[0]).prompt.ids])
    with torch.no_grad():
        first = int(free.model(prompt).logits[0, -1].argmax())
    ended = replace(free, tokenizes=lambda: Encoder(tiny_tokenizer, (2, first), window=2048))
    (silent,) = rows(ended, "full", asked(new=5)[:1])
    assert silent["prediction"] == "" and silent["by_prefill"] is True
    turns = tuple(Turn(" where is it?", [" here"], 1) for _ in range(2))
    batch = asked(turns=turns)[:2]
    marks = [[turn["by_prefill"] for turn in row["turns"]] for row in rows(free, "full", batch)]
    assert marks == [[True, False, False]] * 2
    assert not any(turn["by_prefill"] for row in rows(held, "full", batch) for turn in row["turns"])
    assert said(rows(held, "full", batch)) == said(rows(free, "full", batch))


@pytest.mark.parametrize("kind", [{}, {"turns": (Turn(" where?", [" here"], 2),)}])
def test_members_of_a_group_find_what_they_find_alone(settings, kind):
    _, held = settings
    batch = asked(new=2, **kind)[:3]
    methods = [load_method("full"), load_method("random", budget=0.05), load_method("snapkv", budget=0.3)]
    for method, found in zip(methods, answer_together(held, methods, batch), strict=True):
        assert not isinstance(found, Exception), found
        alone: list[dict] = []
        answer(held, method, batch, alone.append)
        assert [{**row, "timings": 0, "group": 3} for row in alone] == [{**row, "timings": 0} for row in found]


def test_what_cannot_hold_its_last_token_says_so():
    check_protocol(asked(), "aware", [], "held")
    for batch, protocol, why in (
        (asked(), "agnostic", "last_token=held: with protocol=query_agnostic"),
        (asked(beams=2), "aware", "task.beams=1"),
        (asked(choices=(Choice("", "a"),)), "aware", "no sample of this task has an answer that is generated"),
    ):
        with pytest.raises(UserError, match=why):
            check_protocol(batch, protocol, [], "held")


def test_the_screen_counts_such_answers_and_the_setting_is_part_of_the_cell(
    tmp_path, tiny_model_dir, monkeypatch, capfd
):
    split = write_split(tmp_path / "split", samples=2, new_tokens=1)

    def command(*words: str) -> str:
        fixed = [f"model.path={tiny_model_dir}", f"task.data={split}", f"results={tmp_path / 'results'}"]
        monkeypatch.setattr(sys, "argv", ["run.py", *fixed, *words])
        assert run.main() == 0
        return capfd.readouterr().out

    grid = ("-m", "method=random", "budget=0.1,0.2")
    exact = "4 of 4 answered by the exact prefill"
    assert f"{exact}, which no method changes; last_token=held" in command("method=random", "budget=0.1")
    assert f"{exact}: random 0.1, random 0.2" in command(*grid)
    held = command("method=random", "budget=0.1", "last_token=held", "model.reasoning=keep")
    assert "exact prefill" not in held and "last_token=held" in held
    assert "model.reasoning=keep: 0 of 4 samples hold a <think> block, which is scored too" in held
    books = [json.loads(path.read_text())["identity"] for path in (tmp_path / "results").glob("*/*/*/cell.json")]
    told = sorted(
        (book["passes"].get("last_token", "-"), book["model"].get("reasoning", "-"), book["budget"]) for book in books
    )
    assert told == [*(("-", "-", budget) for budget in (0.1, 0.2, 1.0)), *(("held", "keep", b) for b in (0.1, 1.0))]
