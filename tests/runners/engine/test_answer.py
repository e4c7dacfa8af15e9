"""Batches of every kind of example, from strings to rows, on a tiny random model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core.contract import Method
from methods.core.errors import UserError
from runners.engine.answer import answer
from runners.engine.conversation import dialogue
from runners.engine.generation import Prompt, generate
from runners.engine.prompt import Encoder
from runners.engine.setting import Setting, check_protocol
from tasks.base import Choice, Example, Forced, Task, Timed, Turn
from tests.bounds import half_digit, near

TEXT = "the cat sat on a mat and read about a long river in the north where nobody answers questions. " * 3
NEW = 6


class Echo(Task):
    """Scores whether anything was said."""

    name = "echo"
    fingerprint: dict[str, Any] = {}  # noqa: RUF012

    def source(self) -> str:
        return "echo"

    def examples(self) -> list[Example]:
        return []

    def score(self, example: Example, prediction: str) -> float:
        return float(bool(prediction))

    def rate(self, example: Example, likelihoods: Any) -> dict[str, float]:
        return {"acc": float(likelihoods[0][0] > likelihoods[1][0])}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def setting(model, tiny_tokenizer):
    return Setting(model, Echo(), lambda: Encoder(tiny_tokenizer, ends=[2], window=2048), "aware", None, 1)


def talk(id: str = "a/0", **knobs: Any) -> Example:
    later = tuple(Turn(f"where is {name}?", [f" at the {name}."], NEW) for name in ("river", "mat"))
    knobs = {"turns": later} | knobs
    return Example(id, TEXT, "\n\nwho sat?", [" the cat."], NEW, {"subset": "a", "category": "x"}, **knobs)


def rows(setting: Setting, method: Method, *batch: Example) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    answer(setting, method, batch, found.append)
    return found


def snapkv(budget: float = 0.25) -> Method:
    return load_method("snapkv", budget=budget, window=4, kernel=3)


def alone(setting: Setting, ids: list[int]) -> str:
    """The full cache's answer to a prompt of its own."""
    prompt = Prompt(ids, len(ids), NEW, ends=(2,))
    answers, _, _ = generate(setting.model, load_method("full"), [prompt])
    return setting.encoder.text(answers[0].ids)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_an_answer_whose_score_is_not_finite_has_failed(setting, monkeypatch, score):
    monkeypatch.setattr(Echo, "score", lambda self, example, prediction: score)
    plain = Example("p/0", TEXT, "\n\nwho?", ["x"], NEW, {"subset": "p", "category": "p"})
    for example in (plain, talk()):
        (row,) = rows(setting, load_method("full"), example)
        assert "score is not finite" in row["error"] and "score" not in row


@pytest.mark.parametrize("budget", ["full", 1.0])
def test_a_golden_turn_equals_a_fresh_run_with_the_whole_history_as_one_prompt(setting, budget):
    example = talk()
    method = load_method("full") if budget == "full" else snapkv(1.0)
    (row,) = rows(setting, method, example)
    plan = dialogue(setting.encoder, example)
    ids = list(plan.first.prompt.ids)
    history = [ids]
    for question in plan.later:
        history.append([*history[-1], *question.golden])
    assert [turn["prediction"] for turn in row["turns"]] == [alone(setting, one) for one in history]
    text = setting.encoder.tokenizer.decode(history[-1])
    assert text.endswith("who sat? the cat.\n\nwhere is river? at the river.\n\nwhere is mat?")
    assert row["score"] == 1.0 and set(row["parts"]) == {"turn 1", "turn 2", "turn 3"}
    assert row["tokens_in"] == len(history[-1])


def test_an_own_history_holds_what_was_said_and_its_end(setting):
    (row,) = rows(setting, load_method("full"), talk(history="own"))
    plan = dialogue(setting.encoder, talk())
    prompt = plan.first.prompt
    answers, _, _ = generate(setting.model, load_method("full"), [replace(prompt, max_new_tokens=NEW)])
    said = answers[0].ids
    end = [2] if answers[0].stop == "length" else []
    ids = [*prompt.ids, *said, *end, *plan.later[0].own]
    assert row["turns"][1]["prediction"] == alone(setting, ids)


def test_requests_do_not_see_each_other_and_their_order_changes_nothing(setting):
    apart = replace(setting, protocol="agnostic")
    one = talk(history="none", turns=tuple(Turn(f"\n\n{t.question}", t.answers, NEW) for t in talk().turns))
    turned = replace(one, question=one.turns[1].question, turns=(one.turns[0], Turn(one.question, one.answers, NEW)))
    (a,), (b,) = rows(apart, snapkv(), one), rows(apart, snapkv(), turned)
    said = [turn["prediction"] for turn in a["turns"]]
    assert [turn["prediction"] for turn in b["turns"]] == [said[2], said[1], said[0]]
    assert "parts" not in a and a["tokens_context"] == a["timings"]["n_prompt"]
    twice = replace(one, turns=(one.turns[0], one.turns[0]))
    (c,) = rows(apart, snapkv(), twice)
    assert c["turns"][1]["prediction"] == c["turns"][2]["prediction"]


def test_compressing_again_keeps_a_share_of_everything_and_once_lets_the_cache_grow(setting):
    (once,) = rows(setting, snapkv(), talk())
    (again,) = rows(setting, snapkv(), talk(recompress=True))
    assert again["turns"][0]["held"] == once["turns"][0]["held"]
    assert again["turns"][2]["held"] < once["turns"][2]["held"]
    assert once["turns"][2]["full"] == again["turns"][2]["full"]


def test_rows_of_a_batch_answer_as_they_do_alone(setting):
    batch = [talk("a/0"), replace(talk("a/1"), context=TEXT[40:])]
    together = rows(setting, load_method("full"), *batch)
    for example, row in zip(batch, together):
        (single,) = rows(setting, load_method("full"), example)
        assert [t["prediction"] for t in row["turns"]] == [t["prediction"] for t in single["turns"]]
    assert {row["batch"] for row in together} == {2}


def test_a_fed_text_has_a_mean_loss_and_a_curve(setting):
    forced = Forced(TEXT * 2, "prefix", 0, 64, 40, 1, range(40, 64))
    example = Example("t/0", "", "", [], 0, {"subset": "t", "category": "t"}, forced=forced)
    (row,) = rows(setting, load_method("full"), example)
    assert row["counted"] == 24 and row["curve"][0][:2] == [0, 24]
    near(row["curve"][0][2], 24 * row["score"], 24 * half_digit(6))  # both are rounded to six digits
    assert row["tokens_in"] == 64 and row["bos"] == 0 and row["timings"]["n_prompt"] == 39
    (small,) = rows(setting, load_method("snapkv", budget=4, window=2, kernel=1), example)
    assert small["score"] != row["score"]


def test_kinds_of_examples_may_be_mixed_in_a_batch(setting):
    plain = Example("p/0", TEXT, "\n\nwho?", ["x"], NEW, {"subset": "p", "category": "p"})
    forced = Forced(TEXT * 2, "prefix", 0, 64, 40, 8, range(40, 64))
    fed = Example("t/0", "", "", [], 0, {"subset": "t", "category": "t"}, forced=forced)
    assert [row["id"] for row in rows(setting, load_method("full"), plain, fed, talk())] == ["p/0", "t/0", "a/0"]


def test_one_beam_is_greedy_and_four_have_rows_of_their_own(setting):
    plain = Example("p/0", TEXT, "\n\nwho?", ["x"], NEW, {"subset": "p", "category": "p"}, min_new_tokens=2)
    (greedy,) = rows(setting, load_method("full"), plain)
    (four,) = rows(setting, load_method("full"), replace(plain, beams=4))
    assert abs(four["ledger"]["held_prompt"] / greedy["ledger"]["held_prompt"] - 4) < 0.2
    assert 2 <= four["tokens_out"] <= NEW
    with pytest.raises(UserError, match="beam search"):
        check_protocol([replace(plain, beams=4)], "agnostic", [])


CHOICES = (Choice("\n\nwho?", " the cat"), Choice("\n\nwho?", " nobody"))
ABOUT = {"tags": {"subset": "a", "category": "a"}, "max_new_tokens": NEW}
# a sample of every kind, of a given id and text
KINDS: dict[str, Callable[[str, str], Example]] = {
    "answer": lambda id, text: Example(id, text, "\n\nwho?", ["x"], **ABOUT),
    "turns": lambda id, text: replace(talk(id), context=text),
    "requests": lambda id, text: replace(talk(id, history="none"), context=text),
    "forced": lambda id, text: Example(
        id, "", "", [], **ABOUT, forced=Forced(text, "prefix", 0, 64, 40, 8, range(40, 64))
    ),
    "choices": lambda id, text: Example(id, text, "", ["x"], **ABOUT, choices=CHOICES),
    "beams": lambda id, text: Example(id, text, "\n\nwho?", ["x"], **ABOUT, beams=2),
    "timed": lambda id, text: Example(id, text, "", [], **ABOUT, timed=Timed(3 if "#" in text else 40, 2, 3, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_sample_does_not_cost_the_others(setting, kind, monkeypatch, tiny_tokenizer):
    make, (poison,) = KINDS[kind], tiny_tokenizer.encode("#", add_special_tokens=False)
    forward = setting.model.forward

    def breaks(input_ids: Tensor, **kwargs: Any) -> Any:
        if (input_ids == poison).any() or input_ids.shape[1] == 3:
            raise RuntimeError("out of memory\nat some address")
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(setting.model, "forward", breaks)
    monkeypatch.setattr("runners.engine.latency.random_tokens", lambda model, timed: [[7] * timed.length] * timed.batch)
    protocol = "agnostic" if kind == "requests" else "aware"
    batch = [make(f"a/{i}", "#" * (i == 1) + TEXT) for i in range(3)]
    found = rows(replace(setting, protocol=protocol), snapkv(), *batch)
    assert [row["id"] for row in found] == ["a/0", "a/1", "a/2"]
    assert found[1]["id"] == "a/1" and found[1]["error"].startswith("RuntimeError: out of memory (")
    assert not any("error" in row for row in (found[0], found[2])), found


def test_one_pass_is_for_the_full_cache_and_says_why():
    forced = Forced("x", "one_pass", 0, 8, 2, 8, range(1, 8))
    example = Example("t/0", "", "", [], 0, forced=forced)
    check_protocol([example], "aware", [load_method("full")])
    with pytest.raises(UserError, match=r"before anything is dropped.*task\.through=prefix"):
        check_protocol([example], "aware", [load_method("full"), snapkv()])


def test_requests_need_the_agnostic_protocol():
    with pytest.raises(UserError, match="give protocol=query_agnostic"):
        check_protocol([talk(history="none")], "aware", [])
    check_protocol([talk(history="none")], "agnostic", [])
