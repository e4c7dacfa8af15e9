"""Answers that are drawn: what is refused, and what a record and the screen say of it."""

import json
import sys

import pytest

import run
from methods import load_method
from methods.core.errors import UserError
from runners.engine.answer import answer, answer_together
from runners.engine.prompt import Encoder
from runners.engine.setting import Setting
from runners.report import remarks
from runners.settings.sampling import check_sampling, sampling_of, told
from tasks.base import Choice, Example, Turn
from tasks.sampling import Sampling
from tests.runners.engine.test_answer import Echo
from tests.test_run import write_split


class Warm(Echo):
    sampling = Sampling(temperature=0.6, top_p=0.95)


def test_what_is_given_lies_over_what_the_task_says():
    assert sampling_of(Echo(), {"temperature": None}) == Sampling()
    assert sampling_of(Warm(), {"top_p": None}) == Sampling(0.6, 0.95)
    assert sampling_of(Warm(), {"temperature": 1.0, "top_k": 20, "seed": 3}) == Sampling(1.0, 0.95, 20, seed=3)
    assert sampling_of(Warm(), {"temperature": 0}) == Sampling()
    assert told(Sampling()) == {} and told(Sampling(0.6, seed=2)) == {"temperature": 0.6, "seed": 2}


def test_what_would_change_nothing_or_cannot_be_is_refused_by_name():
    for given in ({"top_p": 0.9}, {"top_k": 20}, {"repeats": 4}, {"temperature": 0, "top_k": 1}):
        with pytest.raises(
            UserError, match=r"^sampling\.(top_p=0\.9|top_k=20|repeats=4|top_k=1): at sampling.temperature=0"
        ):
            sampling_of(Echo(), given)
    turns = [Example("a/0", "text", "who?", ["x"], 3, turns=(Turn("and?", ["x"], 3),))]
    with pytest.raises(UserError, match=r"^sampling\.repeats=2: several questions .* give 1"):
        check_sampling(sampling_of(Warm(), {"repeats": 2}), turns)
    for batch, why in (
        ([Example("a/0", "text", "who?", ["x"], 3, beams=2)], "give task.beams=1"),
        ([Example("a/0", "text", "who?", ["x"], 3, choices=(Choice("", "a"),))], "has an answer that is generated"),
    ):
        with pytest.raises(UserError, match=rf"^sampling\.temperature=0\.6: .*{why}"):
            check_sampling(sampling_of(Warm(), {}), batch)


class Length(Echo):
    def score(self, example, prediction):
        return float(len(prediction))

    def parts(self, example, prediction):
        return {"letters": float(len(prediction)), "words": float(len(prediction.split()))}


def test_several_answers_begin_at_one_compressed_cache_and_are_one_sample(sharp_model, tiny_tokenizer):
    """The mean of what each gives alone, in a batch and in a group, with the bytes of each."""

    def setting(repeats: int) -> Setting:
        how = Sampling(temperature=0.9, repeats=repeats)
        encoder = Encoder(tiny_tokenizer, (2,), window=2048, sampling=how)
        return Setting(sharp_model, Length(), lambda: encoder, "agnostic", None, 1)

    tags = {"subset": "a", "category": "x"}
    batch = [Example(f"a/{i}", "the cat sat on a mat " * (6 + i), "who sat?", ["x"], 12, tags) for i in range(2)]
    methods = [load_method("full"), load_method("snapkv", budget=0.4, window=4)]
    found: list[dict] = []
    for example in batch:
        answer(setting(3), methods[1], [example], found.append)
    once: list[dict] = []
    answer(setting(1), methods[1], batch, once.append)
    for row, first in zip(found, once, strict=True):
        own = remarks.each_answer(row)
        assert len(own) == 3 and len({one["prediction"] for one in own}) > 1
        for key in ("prediction", "score", "parts", "stop", "tokens_out"):
            assert own[0][key] == first[key]
        assert (
            own[0]["held"] == first["ledger"]["held_end"]
            and row["ledger"]["held_prompt"] == first["ledger"]["held_prompt"]
        )
        for key in ("score", "tokens_out", "held"):
            values = [one[key] for one in own]
            assert abs(sum(values) / 3 - (row["ledger"]["held_end"] if key == "held" else row[key])) <= 0.5
        assert row["score"] == row["parts"]["letters"] == sum(one["score"] for one in own) / 3
        assert row["timings"]["steps"] == sum(one["tokens_out"] - 1 for one in own)
    together: list[dict] = []
    answer(setting(3), methods[1], batch, together.append)
    _, grouped = answer_together(setting(3), methods, batch)
    for row, others in zip(found, zip(together, grouped, strict=True), strict=True):
        assert all(other["repeats"] == row["repeats"] and other["score"] == row["score"] for other in others)
    assert grouped[0]["group"] == 2


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
