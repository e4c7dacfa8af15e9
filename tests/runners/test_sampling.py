"""Answers that are drawn: what is refused, and what a record and the screen say of it."""

import json
import sys

import pytest

import run
from methods.core.errors import UserError
from runners.settings.sampling import check_sampling, sampling_of, told
from tasks.base import Choice, Example, Sampling
from tests.runners.engine.test_answer import Echo
from tests.test_run import write_split


class Warm(Echo):
    sampling = Sampling(temperature=0.6, top_p=0.95)


def test_what_is_given_lies_over_what_the_task_says():
    assert sampling_of(Echo(), {"temperature": None}) == Sampling()
    assert sampling_of(Warm(), {"top_p": None}) == Sampling(0.6, 0.95)
    assert sampling_of(Warm(), {"temperature": 1.0, "top_k": 20, "seed": 3}) == Sampling(1.0, 0.95, 20, 3)
    assert sampling_of(Warm(), {"temperature": 0}) == Sampling()
    assert told(Sampling()) == {} and told(Sampling(0.6, seed=2)) == {"temperature": 0.6, "seed": 2}


def test_what_would_change_nothing_or_cannot_be_is_refused_by_name():
    for given in ({"top_p": 0.9}, {"top_k": 20}, {"seed": 1}, {"temperature": 0, "top_k": 1}):
        with pytest.raises(
            UserError, match=r"^sampling\.(top_p=0\.9|top_k=20|seed=1|top_k=1): at sampling.temperature=0"
        ):
            sampling_of(Echo(), given)
    for batch, why in (
        ([Example("a/0", "text", "who?", ["x"], 3, beams=2)], "give task.beams=1"),
        ([Example("a/0", "text", "who?", ["x"], 3, choices=(Choice("", "a"),))], "has an answer that is generated"),
    ):
        with pytest.raises(UserError, match=rf"^sampling\.temperature=0\.6: .*{why}"):
            check_sampling(sampling_of(Warm(), {}), batch)


def test_draws_are_part_of_the_cell_and_said_on_the_screen(tmp_path, tiny_model_dir, monkeypatch, capfd):
    split = write_split(tmp_path / "split", samples=2, new_tokens=4)

    def command(*words: str) -> tuple[int, str]:
        fixed = [f"model.path={tiny_model_dir}", f"task.data={split}", f"results={tmp_path / 'results'}"]
        monkeypatch.setattr(sys, "argv", ["run.py", *fixed, *words])
        code, shown = run.main(), capfd.readouterr()
        return code, shown.out + shown.err

    drawn = ("method=snapkv", "sampling.temperature=0.8")
    code, said = command(*drawn)
    assert code == 0 and "sampling.temperature=0.8" in said
    assert command(*drawn, "sampling.temperature=0", "method=full")[0] == 0
    code, said = command(*drawn, "sampling.top_p=0")
    assert code == 2 and "sampling.top_p=0" in said and said.count("\n") == 1
    books = [json.loads(path.read_text())["identity"] for path in (tmp_path / "results").glob("*/*/*/cell.json")]
    drawn_by = sorted((book["method"]["name"], str(book["passes"].get("sampling"))) for book in books)
    assert drawn_by == [("full", "None"), ("full", "{'temperature': 0.8}"), ("snapkv", "{'temperature': 0.8}")]
