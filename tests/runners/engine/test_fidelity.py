"""The forced half of the panel: worked numbers, and runs in groups and alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from analysis.fidelity.numbers import first_divergence
from analysis.records import SHOWN, check_sample
from methods import load_method
from methods.core.contract import Stage
from methods.core.eviction import Eviction
from runners.engine.answer import answer, answer_together
from runners.engine.fidelity.forcing import Forcing
from runners.engine.fidelity.panel import Panel
from runners.engine.fidelity.places import apart
from runners.engine.prompt import Encoder
from runners.engine.setting import Setting
from tasks.base import Choice, Example, Task, Turn
from tasks.sampling import GREEDY, Sampling
from tests.bounds import bound, half_digit, near, run_off
from tests.tiny import equip

#: of numbers worked to six digits, and of the divergence of two runs whose log-probabilities are this near
WORKED = half_digit(6) + bound(torch.float32, 3, size=2.0)
APART = 4 * run_off()


def logs(*rows) -> torch.Tensor:
    return torch.tensor(rows).log()


P = logs((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.4, 0.35, 0.25))
Q = logs((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), (0.3, 0.45, 0.25))


def test_kl_is_of_the_full_cache_and_in_nats():
    p, q = logs((0.7, 0.2, 0.1)), logs((0.5, 0.3, 0.2))
    said = torch.tensor([0])
    (forward,), *_ = apart(p, q[None], said)[:, 0]
    (reversed_,), *_ = apart(q, p[None], said)[:, 0]
    near(float(forward), 0.085123, WORKED)
    near(float(forward) / math.log(2), 0.122806, WORKED)
    near(float(reversed_), 0.092033, WORKED)


def test_every_place_has_its_numbers():
    kl, differs, clear, gap, other = apart(P, Q[None], torch.tensor([0, 0, 0]))[:, 0]
    near(kl, [0, 0.040078, 0.027113], WORKED)
    assert differs.tolist() == [0, 0, 1] and clear.tolist() == [0, 0, 1]  # ln(.4 / .35) is 0.134
    assert other.tolist() == [0, 0, 1]
    near(gap, [0, math.log(0.6 / 0.5), math.log(0.4 / 0.3)], WORKED)


def test_a_margin_below_a_tenth_of_a_nat_is_no_clear_flip():
    _, differs, clear, *_ = apart(logs((0.38, 0.36, 0.26)), logs((0.36, 0.38, 0.26))[None], torch.tensor([0]))[:, 0, 0]
    assert (float(differs), float(clear)) == (1, 0)


def test_the_lowest_id_of_a_tie_is_the_likeliest():
    tie, second = torch.zeros(1, 3), torch.tensor([[0.0, 1e-3, 0.0]])
    assert float(apart(tie, tie[None], torch.tensor([0]))[1]) == 0
    assert float(apart(tie, second[None], torch.tensor([0]))[1]) == 1


@pytest.mark.parametrize(("n", "ceiling"), [(4, 1.386294), (32_000, 10.3735), (151_936, 11.9312)])
def test_a_cache_that_knows_nothing_is_at_the_ceiling(n, ceiling):
    sure = torch.full((1, n), -100.0)
    sure[0, 1] = 100
    near(
        float(apart(sure, torch.zeros(1, 1, n), torch.tensor([1]))[0]),
        ceiling,
        half_digit(4) + bound(torch.float32, n, size=ceiling),
    )


def test_numbers_do_not_depend_on_what_else_is_compared_at_once(monkeypatch):
    g = torch.Generator().manual_seed(0)
    full, others = 3 * torch.randn(2, 50, generator=g), 3 * torch.randn(5, 2, 50, generator=g)
    said = torch.tensor([3, 4])
    expected = apart(full, others, said)
    monkeypatch.setattr("runners.engine.fidelity.places.ROOM", 250)
    assert torch.equal(apart(full, others, said), expected)
    assert torch.equal(apart(full[1:], others[3:4, 1:], said[1:]), expected[:, 3:4, 1:])
    assert (apart(full, full.expand(3, -1, -1), said)[:4] == 0).all()  # the same logits are no rounding apart


def test_another_likeliest_token_needs_a_kl_above_the_flip_bound():
    g = torch.Generator().manual_seed(1)
    full = 2 * torch.randn(500, 20, generator=g)
    near = full + 0.3 * torch.randn(4, 500, 20, generator=g)
    kl, differs, *_ = apart(full, near, full.argmax(-1))
    first, second = full.softmax(-1).topk(2).values.unbind(-1)
    bound = (first - second).double() ** 2 / 2  # [B]
    assert 100 < differs.sum() < 1900
    assert (kl >= bound - 1e-6)[differs.bool()].all()


def test_logits_that_are_not_finite_stay_a_fault():
    broken = P.clone()
    broken[1, 0] = math.nan
    kl = apart(P, broken[None], torch.tensor([0, 0, 0]))[0, 0]
    assert kl.isfinite().tolist() == [True, False, True]


TEXT = "the cat sat on a mat and read about a long river in the north where nobody answers questions. " * 2
LATER = tuple(Turn(f"where is {name}?", [f" at the {name}."], 5) for name in ("river", "mat"))
NEW = 12


class Said(Task):
    """Scores whether anything was said."""

    name, fingerprint = "said", {}

    def source(self):
        return self.name

    def examples(self):
        return []

    def score(self, example, prediction):
        return float(bool(prediction))


class Unread(Eviction):
    """Says that it has dropped half of the prompt, and attends to all of it."""

    _name = "unread"
    changes_prompt = False

    def caches(self, spec, prompt_len):
        return load_method("full").caches(spec, prompt_len)


class Stale(Eviction):
    """Keeps the newest slots; a copy of its cache fails."""

    _name = "stale"

    def score(self, store, step, cut):
        return store.pos.float()

    def observe(self, store, step, *more):
        if step.stage is Stage.DECODE and getattr(self, "copied", False):
            raise RuntimeError("a copy that cannot go on")


@pytest.fixture(scope="module")
def model(sharp_model, artefact_folder):
    return equip(sharp_model, artefact_folder)


def questions(n: int, **knobs) -> list[Example]:
    tags = {"subset": "a", "category": "x"}
    return [
        Example(f"a/{i}", f"{i}. " * (1 + 3 * i) + TEXT, " who sat?", [" the cat."], NEW, tags, **knobs)
        for i in range(n)
    ]


def setting(
    model, tokenizer, examples, how="full", protocol="aware", held=False, sampling=GREEDY, ends=(2,)
) -> Setting:
    encoder = Encoder(tokenizer, ends, window=2048, hold_last=held, sampling=sampling)
    return Setting(model, Said(), lambda: encoder, protocol, None, 1, panel=Panel(how, examples))


def alone(setting: Setting, method, examples) -> list[dict]:
    rows: list[dict] = []
    answer(setting, method, examples, rows.append)
    return rows


def forced_by_hand(setting: Setting, method, example: Example, said: list[int]) -> list[float]:
    """KL at every place, from two caches that read the answer a token at a time, and no code of the panel's."""
    prompt = setting.encoder(example).prompt
    first, rest = prompt.parts(setting.protocol)
    found = []
    for one in (load_method("full"), method):
        cache = one.cache_for(setting.model, samples=[prompt.sample])
        with torch.no_grad():
            logs = []
            for ids in [first, *([rest] if rest else []), *([token] for token in said[:-1])]:
                out = setting.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
                logs.append(out.double().log_softmax(-1))
        found.append(torch.stack(logs[bool(rest) :]))
    p, q = found
    return (p.exp() * (p - q)).sum(-1).tolist()


def drawn(temperature: float) -> Sampling:
    return Sampling(temperature=temperature, seed=3)


METHODS = [
    load_method("full"), load_method("snapkv", budget=0.2, window=4), load_method("h2o", budget=0.3),
    load_method("tova", budget=0.1), load_method("random", budget=0.2),
    load_method("kivi", bits=2, store={"group": 8, "residual": 8}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "knobs"),
    [
        (1, {}),
        (3, {}),
        (1, {"held": True}),
        (2, {"protocol": "agnostic"}),
        (1, {"sampling": drawn(1.0)}),
        (2, {"ends": tuple(range(0, 320, 9))}),
    ],
)
def test_a_group_finds_what_two_caches_that_read_the_answer_find(model, tiny_tokenizer, rows, knobs):
    examples = questions(rows)
    given = setting(model, tiny_tokenizer, examples, **knobs)
    found = answer_together(given, METHODS, examples)
    parted = 0
    for method, ours in zip(METHODS[1:], found[1:], strict=True):
        for example, row, full in zip(examples, ours, found[0], strict=True):
            forced = row["forced"]
            expected = forced_by_hand(given, method, example, full["ids"])
            assert len(forced["kl"]) == len(full["ids"]), method.name
            if method.family != "quantization":  # where a number may fall into the next code
                near(forced["kl"], expected, APART)
            assert forced["counted"] == (0 if knobs.keys() & {"held", "protocol"} else 1)
            if forced["counted"]:  # the first place is the prefill's own
                near(forced["kl"][0], 0.0, APART)
            at = first_divergence(full["ids"], row["ids"])
            assert forced["flip"] == at or "sampling" in knobs, method.name
            parted += at is not None and at + 1 < len(full["ids"])
            if at is None and "sampling" not in knobs:
                assert not forced["differ"]
            assert forced.get("drawn", False) == ("sampling" in knobs)
        assert all("forced" not in row for row in found[0])
    assert parted > 1  # so that rows were read again


def test_answers_are_the_same_to_the_last_bit_without_a_panel(model, tiny_tokenizer):
    examples = questions(2)
    with_panel = answer_together(setting(model, tiny_tokenizer, examples), METHODS, examples)
    without = answer_together(setting(model, tiny_tokenizer, examples, "off"), METHODS, examples)
    for ours, theirs in zip(with_panel, without, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            a, b = ({k: v for k, v in row.items() if k not in ("forced", "timings")} for row in (a, b))
            assert a == b
    assert not any("forced" in row for rows in without for row in rows)


def test_a_budget_of_one_is_the_full_cache(model, tiny_tokenizer):
    examples = questions(2)
    methods = [load_method("full"), *(load_method(name, budget=1) for name in ("snapkv", "h2o", "tova", "nacl"))]
    full, *others = answer_together(setting(model, tiny_tokenizer, examples), methods, examples)
    for ours in others:
        for row, theirs in zip(ours, full, strict=True):
            assert row["ids"] == theirs["ids"]
            near(row["forced"]["kl"], [0.0] * len(row["forced"]["kl"]), APART)
            assert row["forced"]["differ"] == [] and row["forced"]["flip"] is None


def test_in_bfloat16_the_noise_floor_is_known(model, tiny_tokenizer):
    examples = questions(2)
    given = setting(copy.deepcopy(model).to(torch.bfloat16), tiny_tokenizer, examples)
    _, ours, _ = answer_together(given, METHODS[:3], examples[:1])
    assert given.panel.noise is not None and 0 <= given.panel.noise < max(ours[0]["forced"]["kl"])
    once = given.panel.noise
    answer_together(given, METHODS[:3], examples[1:])
    assert given.panel.noise == once  # it is looked for once
    exact = setting(model, tiny_tokenizer, examples)
    answer_together(exact, METHODS[:3], examples[:1])
    assert exact.panel.noise is None


def test_a_cache_that_attention_did_not_read_is_at_zero_exactly(model, tiny_tokenizer):
    examples = questions(2)
    methods = [load_method("full"), load_method("snapkv", budget=0.3), Unread(budget=0.5)]
    _, _, ours = answer_together(setting(model, tiny_tokenizer, examples), methods, examples)
    assert all(kl == 0 for row in ours for kl in row["forced"]["kl"])
    (row,) = alone(setting(model, tiny_tokenizer, examples), Unread(budget=0.5), examples[:1])
    assert all(kl == 0 for kl in row["forced"]["kl"])


@pytest.mark.parametrize("knobs", [{}, {"protocol": "agnostic"}, {"sampling": drawn(0.7)}])
def test_a_method_alone_and_a_resumed_group_find_what_a_group_finds(model, tiny_tokenizer, knobs):
    examples, method = questions(2), load_method("snapkv", budget=0.2, window=4)
    given = setting(model, tiny_tokenizer, examples, **knobs)
    _, expected, _ = answer_together(given, [load_method("full"), method, METHODS[2]], examples)
    (resumed,) = answer_together(given, [method], examples)  # the full cache's answer is on disk
    for found in (alone(given, method, examples), alone(given, method, examples[:1]), resumed):
        for row, other in zip(found, expected):
            assert row["ids"] == other["ids"]
            near(row["forced"]["kl"], other["forced"]["kl"], APART)
            rest = [{k: v for k, v in one["forced"].items() if k not in ("kl", "dnll")} for one in (row, other)]
            assert rest[0] == rest[1]


def test_a_method_that_changes_the_prompt_is_compared_alone(model, tiny_tokenizer):
    examples = questions(1)
    given = setting(model, tiny_tokenizer, examples)
    (row,) = alone(given, load_method("streaming_llm", budget=0.3, prefill="streaming"), examples)
    (full,) = alone(given, load_method("full"), examples)
    assert len(row["forced"]["kl"]) == len(full["ids"]) and max(row["forced"]["kl"]) > 1e-4
    assert "forced" not in full and full["tokens_out"] == len(full["ids"])


@pytest.mark.parametrize(
    "knobs", [{"turns": LATER}, {"turns": LATER, "recompress": True}, {"turns": LATER, "history": "none"}]
)
def test_of_several_questions_the_first_answer_is_forced(model, tiny_tokenizer, knobs):
    examples = questions(2, **knobs)
    given = setting(model, tiny_tokenizer, examples, protocol="agnostic")
    full, ours = answer_together(given, METHODS[:2], examples)
    for row, theirs in zip(ours, full, strict=True):
        assert len(row["forced"]["kl"]) == len(theirs["turns"][0]["ids"]) and row["forced"]["counted"] == 0
        assert all(turn["tokens_out"] == len(turn["ids"]) for turn in row["turns"])
    for row, other in zip(alone(given, METHODS[1], examples), ours, strict=True):
        near(row["forced"]["kl"], other["forced"]["kl"], APART)


def test_several_answers_to_a_prompt_have_ids_and_the_first_is_forced(model, tiny_tokenizer):
    examples = questions(1)
    given = setting(model, tiny_tokenizer, examples, sampling=Sampling(temperature=1.0, repeats=3))
    full, ours = answer_together(given, METHODS[:2], examples)
    assert [len(one["ids"]) for one in ours[0]["repeats"]] == [one["tokens_out"] for one in ours[0]["repeats"]]
    assert ours[0]["ids"] == ours[0]["repeats"][0]["ids"]
    assert len(ours[0]["forced"]["kl"]) == len(full[0]["repeats"][0]["ids"])


def test_no_more_than_32_tokens_are_forced(model, tiny_tokenizer):
    examples = [replace(one, max_new_tokens=40) for one in questions(2)]
    given = setting(model, tiny_tokenizer, examples, "auto")
    found = answer_together(given, METHODS[:3], examples)
    assert all(len(row["ids"]) > 32 and len(row["forced"]["kl"]) == 32 for rows in found[1:] for row in rows)


def test_which_samples_are_forced_depends_on_their_content_and_number_alone():
    many = [replace(questions(1)[0], id=f"x/{i}", question=f" who sat {i}?") for i in range(300)]
    assert Panel("auto", many).chosen == Panel("auto", many[::-1]).chosen
    counts = {n: (len((one := Panel("auto", many[:n])).chosen), len(one.chosen_alone)) for n in (1, 19, 24, 120, 300)}
    assert counts == {1: (1, 1), 19: (19, 5), 24: (20, 6), 120: (30, 30), 300: (50, 50)}
    assert len(Panel("full", many).chosen) == len(Panel("full", many).chosen_alone) == 300
    assert not Panel("off", many).chosen
    others = [replace(many[0], beams=3), replace(many[0], choices=(Choice("who?", "me"),))]
    assert Panel("full", others).chosen == frozenset()


def test_a_row_that_is_not_chosen_has_none_whatever_batch_it_is_in(model, tiny_tokenizer):
    examples = questions(3)
    given = setting(model, tiny_tokenizer, examples)
    given.panel.chosen = given.panel.chosen_alone = frozenset([examples[1].key])
    _, ours = answer_together(given, METHODS[:2], examples)
    assert [("forced" in row) for row in ours] == [False, True, False]
    (row,) = answer_together(given, METHODS[1:2], examples[:1])
    assert "forced" not in row[0] and row[0]["group"] == 1  # nor is there a witness
    assert [("forced" in row) for row in alone(given, METHODS[1], examples)] == [False, True, False]


def test_the_time_that_goes_into_it_is_known(model, tiny_tokenizer):
    examples = questions(2)
    given = setting(model, tiny_tokenizer, examples, "auto")
    assert given.panel.share == 0
    answer_together(given, METHODS[:3], examples)
    assert 0 < given.panel.share < 1


def test_a_pass_that_fails_is_named_and_costs_no_answer(model, tiny_tokenizer, monkeypatch):
    examples, stale = questions(1), Stale(budget=0.3)
    given = setting(model, tiny_tokenizer, examples)
    read_again = Forcing._read_again

    def spoilt(self, members):
        stale.copied = True
        return read_again(self, members)

    monkeypatch.setattr(Forcing, "_read_again", spoilt)
    _, ours, others = answer_together(given, [load_method("full"), stale, METHODS[1]], examples)
    assert "a copy that cannot go on" in ours[0]["forced"]["error"] and "prediction" in ours[0]
    assert "kl" in others[0]["forced"]
    check_sample(ours[0] | {"threads": 1}, SHOWN)
    check_sample(others[0] | {"threads": 1}, SHOWN)

    def out_of_memory(self, members):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Forcing, "_read_again", out_of_memory)
    _, ours = answer_together(given, METHODS[:2], examples)
    assert "forced" not in ours[0] and "prediction" in ours[0]
