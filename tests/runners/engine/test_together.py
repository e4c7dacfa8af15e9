"""Members of a group give what they give alone: tokens, ledger, and where they end."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from methods import load_method
from methods.core.contract import Stage
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionCache
from methods.core.stores.codec import Codec
from runners.engine.answer import answer, answer_together
from runners.engine.generation import Prompt, generate, through, together
from runners.engine.new_tokens import Answer, behind
from runners.engine.prompt import Encoder
from runners.engine.setting import Setting
from runners.engine.teacher_forcing import Text, force
from runners.engine.time_limit import TimeLimit
from tasks.base import Choice, Example, Forced, Task, Turn
from tests.bounds import LOUDEST, SHARP, losses_off, near, run_off
from tests.methods.conftest import tiny_llama
from tests.tiny import METHODS, SIZES, equip
from tests.turns import taking_turns

TIE = run_off()  # logits closer than this may change places: a row of a batch is added up in another order
BUDGETS = (0.5, 60)
LENGTH = 97  # tokens of a text that is fed


@pytest.fixture(scope="module")
def model(artefact_folder):
    return equip(tiny_llama(4, 2), artefact_folder)


def prompts(n: int, new: int = 12) -> list[Prompt]:
    """Prompts of different lengths; a quarter of the vocabulary ends an answer, so that rows end at different steps."""
    g = torch.Generator().manual_seed(3)
    return [
        Prompt(torch.randint(1, 97, (90 + 7 * i,), generator=g).tolist(), 80, new, 2, tuple(range(24)), sample=41 + i)
        for i in range(n)
    ]


def members() -> list:
    """Every method that can share a prompt, at two budgets."""
    methods = [load_method("full")]
    for name in METHODS:
        if name != "full":
            methods += [load_method(name, budget=budget, **SIZES.get(name, {})) for budget in BUDGETS]
    return [method for method in methods if not method.changes_prompt]


def in_turns(case: int) -> list:
    """Every method at one of the two budgets, at the other in the next case."""
    return [method for i, method in enumerate(members()) if i % 2 == case % 2 or method.name == "full"]


def first_difference(a: Answer, b: Answer) -> int | None:
    n = max(len(a.ids), len(b.ids))
    pad_a, pad_b = (x.ids + [-1] * (n - len(x.ids)) for x in (a, b))
    return next((i for i in range(n) if pad_a[i] != pad_b[i]), None)


def margin(model, method, prompt: Prompt, protocol: str, answer: Answer, at: int) -> float:
    """How far the two best logits are apart where token `at` of the answer was chosen, with the method alone."""
    cache = method.cache_for(model, samples=[prompt.sample])
    cut = len(prompt.ids) if protocol == "aware" else prompt.n_context
    fed = [list(prompt.ids[:cut]), list(prompt.ids[cut:]), *[[token] for token in answer.ids[:at]]]
    with torch.no_grad():
        for ids in filter(None, fed):
            logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
    best = logits.topk(2).values
    return float(best[0] - best[1])


@pytest.mark.parametrize(
    ("case", "protocol", "rows", "chunk"),
    [
        (0, "aware", 1, None),
        (1, "agnostic", 1, None),
        (1, "aware", 3, None),
        (0, "agnostic", 3, None),
        (0, "aware", 1, 32),
        (1, "agnostic", 1, 32),
    ],
)
def test_every_method_answers_in_a_group_as_it_does_alone(model, case, protocol, rows, chunk, record_property):
    methods, given = in_turns(case), prompts(rows)
    outcomes = together(model, methods, given, protocol, chunk)
    ties = 0
    for method, outcome in zip(methods, outcomes, strict=True):
        assert outcome.error is None, (method.name, outcome.error)
        answers, cache, timings = generate(model, method, given, protocol, chunk)
        same = True
        for prompt, mine, alone in zip(given, outcome.answers, answers, strict=True):
            at = first_difference(mine, alone)
            if at is not None:
                same = False
                ties += 1
                if not isinstance(method, Codec):  # there it may become one step of a code, which moves any logit
                    assert margin(model, method, prompt, protocol, alone, at) < TIE, (method.name, method.budget, at)
        if same:
            assert outcome.answers == answers, method.name
            assert outcome.ledgers == cache.reports(behind(answers, timings.steps)), method.name
            assert outcome.timings.steps == timings.steps and outcome.timings.n_prompt == timings.n_prompt
    print(f"{ties} of {len(methods) * rows} answers differ where two logits tie")
    record_property("ties", ties)
    assert ties <= len(methods) * rows // 10


def force_together(model, methods, pieces, plan, samples, limit=None):
    """For each method its losses, the ledgers and timings, and its error."""
    text = Text(pieces, plan, samples, model.device)
    state, took = through(model, methods, text, limit=limit, shared=True)
    found = []
    for member in state.members:
        ledgers = None if member.error else member.cache.reports()
        found.append(SimpleNamespace(
            losses=text.losses.get(member), ledgers=ledgers, timings=text.timings(*took), error=member.error
        ))  # fmt: skip
    return found


def fed(through: str, prompt: int, stride: int, first: int) -> Forced:
    return Forced("", through, 0, LENGTH, prompt, stride, range(first, LENGTH))  # type: ignore[arg-type]


FED = {
    "prefix": fed("prefix", 80, 1, 80),
    "blocks": fed("prefix", 80, 6, 80),
    "stream": fed("stream", 70, 4, 1),
    "chunk": fed("chunk", 0, 33, 1),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("plan", FED.values(), ids=FED)
def test_every_method_predicts_a_text_in_a_group_as_it_does_alone(model, plan, rows):
    g = torch.Generator().manual_seed(5)
    pieces, samples = torch.randint(1, 97, (rows, LENGTH), generator=g).tolist(), [41 + i for i in range(rows)]
    methods = in_turns(rows)
    flipped = 0
    for method, one in zip(methods, force_together(model, methods, pieces, plan, samples), strict=True):
        try:
            losses, cache, timings = force(model, method, pieces, plan, samples)
        except (UserError, NotImplementedError) as error:  # what cannot go on says so in both
            assert str(one.error) == str(error), method.name
            continue
        assert one.error is None, (method.name, one.error)
        assert torch.equal(one.losses.isnan(), losses.isnan()), method.name
        found, expected = one.losses.nan_to_num(0.0), losses.nan_to_num(0.0)
        off = losses_off(1, SHARP, LOUDEST)
        if isinstance(method, Codec) and (found - expected).abs().max() > off:
            flipped += 1
        else:
            near(found, expected, off)
        assert one.ledgers == cache.reports(), method.name
        assert (one.timings.steps, one.timings.n_prompt) == (timings.steps, timings.n_prompt)
    assert flipped <= max(1, len(methods) // 10)  # codes on a rounding edge are rare


@pytest.mark.parametrize(("seed", "says"), [(1, "no score for you"), (91, "lost on the way")])
def test_a_member_that_fails_in_a_text_leaves_the_others_alone(model, seed, says):
    methods = [load_method("full"), Broken(budget=0.5, seed=seed), load_method("snapkv", budget=0.4)]
    pieces = torch.randint(1, 97, (1, LENGTH), generator=torch.Generator().manual_seed(5)).tolist()
    found = force_together(model, methods, pieces, FED["prefix"], [0])
    assert says in str(found[1].error)
    for i in (0, 2):
        losses = force(model, methods[i], pieces, FED["prefix"], [0])[0]
        near(found[i].losses.nan_to_num(0.0), losses.nan_to_num(0.0), losses_off(1, SHARP, LOUDEST))


def test_the_time_limit_ends_a_text(model):
    pieces = [list(range(1, LENGTH - 10)) + [1] * 11]
    methods = [load_method("full"), load_method("snapkv", budget=0.4)]
    found = force_together(model, methods, pieces, FED["prefix"], [0], limit=1e-9)
    assert all(isinstance(one.error, TimeLimit) for one in found)


def test_members_really_end_at_different_steps(model):
    outcomes = together(model, members(), prompts(1, new=40))
    assert len({outcome.timings.steps for outcome in outcomes}) > 2


def test_a_member_that_has_ended_holds_no_memory_while_the_others_decode(model, monkeypatch):
    short, long = load_method("snapkv", budget=0.3), load_method("random", budget=0.3)
    alive = []
    append = EvictionCache.append

    def watch(self, step):
        alive.append(step.q.shape[0])
        append(self, step)

    monkeypatch.setattr(EvictionCache, "append", watch)
    (one,) = prompts(1, new=30)
    outcomes = together(model, [short, long], [one])
    steps = sorted(outcome.timings.steps for outcome in outcomes)
    assert steps[0] < steps[1]
    # two layers; the leader takes in the prompt with the two members
    assert len(alive) == 2 * (3 + sum(steps))


class Broken(Eviction):
    """Fails at the prompt's end with seed 1, otherwise behind the prompt once so many tokens have been seen."""

    _name = "broken"

    def score(self, store, step, cut):
        if self.seed == 1:
            raise ValueError("no score for you\nsecond line")
        return store.pos.float()

    def observe(self, store, step, *more):
        if self.seed > 1 and step.stage in (Stage.DECODE, Stage.TURN) and int(step.seen[0]) > self.seed:
            raise RuntimeError("lost on the way")


@pytest.mark.parametrize(("seed", "says"), [(1, "no score for you"), (91, "lost on the way")])
def test_a_member_that_fails_leaves_the_others_alone(model, seed, says):
    (one,) = prompts(1, new=20)
    methods = [load_method("full"), Broken(budget=0.5, seed=seed), load_method("snapkv", budget=0.4)]
    outcomes = together(model, methods, [one])
    assert says in str(outcomes[1].error) and outcomes[1].answers == []
    for i in (0, 2):
        assert outcomes[i].error is None
        assert outcomes[i].answers == generate(model, methods[i], [one])[0]


def test_a_member_that_cannot_be_made_leaves_the_others_alone(model):
    class Unready(Broken):
        def prepare(self, model):
            raise UserError("broken: no filters for this model")

    full, unready = together(model, [load_method("full"), Unready(budget=0.5)], prompts(1))
    assert full.error is None and isinstance(unready.error, UserError)


def test_a_group_of_which_every_member_fails_ends_at_once(model):
    outcomes = together(model, [Broken(budget=0.5, seed=1)], prompts(1))
    assert isinstance(outcomes[0].error, ValueError)


def test_running_out_of_memory_is_the_whole_groups(model, monkeypatch):
    def full(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EvictionCache, "end_step", full)
    with pytest.raises(torch.OutOfMemoryError):
        together(model, [load_method("full"), load_method("snapkv", budget=0.4)], prompts(1))


def test_the_time_limit_ends_those_that_are_not_done(model):
    outcomes = together(model, [load_method("full"), load_method("snapkv", budget=0.4)], prompts(1), limit=1e-9)
    assert all(isinstance(outcome.error, TimeLimit) for outcome in outcomes)
    assert {str(outcome.error) for outcome in outcomes} == {"was not done within time_limit=1e-09 seconds"}


def test_a_method_that_changes_the_prompt_is_not_taken_in(model):
    with pytest.raises(AssertionError, match="runs alone"):
        together(model, [load_method("streaming_llm", budget=0.5, prefill="streaming")], prompts(1))


def test_what_members_need_of_a_step_is_there(model):
    seen = []

    class Curious(Broken):
        needs = frozenset({"hidden", "rope"})

        def observe(self, store, step, *more):
            seen.append((step.hidden is not None, step.cos is not None))

    together(model, [load_method("full"), Curious(budget=0.5)], prompts(1))
    assert seen and all(pair == (True, True) for pair in seen)


def test_the_model_remembers_no_group_that_has_ended(model):
    together(model, [load_method("full")], prompts(1))
    gc.collect()
    before = len(model.__dict__["_kvfrontier_prepared"].prepared)
    method = load_method("snapkv", budget=0.5)
    for _ in range(3):
        together(model, [method], prompts(1))
    gc.collect()
    assert len(model.__dict__["_kvfrontier_prepared"].prepared) == before + 1


TEXT = "the cat sat on a mat and read about a long river in the north where nobody answers questions. " * 2
LATER = tuple(Turn(f"where is {name}?", [f" at the {name}."], 5) for name in ("river", "mat"))
CHOICES = (Choice(" who sat?", " the cat."), Choice(" who sat?", " a"), Choice(" and who did not?", " the river."))
QUESTIONS = {
    "golden": {"turns": LATER},
    "again": {"turns": LATER, "recompress": True},
    "requests": {"turns": LATER, "history": "none"},
    "choices": {"choices": CHOICES},
    "choices, token by token": {"choices": CHOICES, "stride": 1},
}


class Said(Task):
    """Scores whether anything was said."""

    name, fingerprint = "said", {}

    def source(self):
        return self.name

    def examples(self):
        return []

    def score(self, example, prediction):
        return float(bool(prediction))

    def rate(self, example, likelihoods):
        return {"acc": float(likelihoods[0][0] > likelihoods[1][0])}


@pytest.fixture(scope="module")
def reader(sharp_model, tiny_tokenizer, artefact_folder):
    model = equip(sharp_model, artefact_folder)
    return Setting(model, Said(), lambda: Encoder(tiny_tokenizer, (2,), window=2048), "aware", 64, 1)


def asked(kind: str, rows: int) -> list[Example]:
    tags = {"subset": "a", "category": "x"}
    return [
        Example(f"a/{i}", f"{i}. " * (1 + 3 * i) + TEXT, " who sat?", [" the cat."], 5, tags, **QUESTIONS[kind])
        for i in range(rows)
    ]


@pytest.mark.parametrize(("kind", "rows"), taking_turns(list(QUESTIONS), [1, 2], of=2))
def test_every_method_is_asked_in_a_group_as_it_is_alone(reader, kind, rows):
    setting = replace(reader, protocol="agnostic" if kind == "requests" else "aware")
    methods, batch = in_turns(list(QUESTIONS).index(kind) + rows), asked(kind, rows)
    found = answer_together(setting, methods, batch)
    ties = 0
    for method, ours in zip(methods, found, strict=True):
        alone: list[dict] = []
        try:
            answer(setting, method, batch, alone.append)
        except UserError as error:  # what cannot go on says so in both
            assert str(ours) == str(error), method.name
            continue
        assert not isinstance(ours, Exception), (method.name, ours)
        for mine, own in zip(ours, alone, strict=True):
            assert "error" not in own, own
            assert mine.pop("group") == len(methods)
            found, expected = (torch.tensor(x.pop("likelihoods", ())) for x in (mine, own))
            off = losses_off(32)
            if isinstance(method, Codec) and found.numel() and (found - expected).abs().max() > off:
                ties += 1
            else:
                near(found, expected, off)
            if mine["prediction"] == own["prediction"]:
                assert {**mine, "timings": 0} == {**own, "timings": 0}, (method.name, method.budget)
            else:
                ties += 1
    print(f"{ties} of {len(methods) * rows} samples are answered differently")
    assert ties <= len(methods) * rows // 10


@pytest.mark.parametrize("kind", ["golden", "requests", "choices"])
@pytest.mark.parametrize(("seed", "says"), [(1, "no score for you"), (46, "lost on the way")])
def test_a_member_that_fails_at_a_question_leaves_the_others_alone(reader, kind, seed, says):
    methods = [load_method("full"), Broken(budget=0.5, seed=seed), load_method("snapkv", budget=0.4)]
    batch = asked(kind, 1)
    found = answer_together(reader, methods, batch)
    assert says in str(found[1])
    for i in (0, 2):
        own: list[dict] = []
        answer(reader, methods[i], batch, own.append)
        assert [row["prediction"] for row in found[i]] == [row["prediction"] for row in own]


class Once(Broken):
    """Fails a single time, in whichever fork that is."""

    lost = False

    def observe(self, store, step, *more):
        if not self.lost:
            try:
                super().observe(store, step, *more)
            except RuntimeError:
                self.lost = True
                raise


@pytest.mark.parametrize("kind", ["golden", "requests", "choices"])
def test_what_is_lost_in_a_fork_is_lost_for_good(reader, kind):
    found = answer_together(reader, [load_method("full"), Once(budget=0.5, seed=46)], asked(kind, 1))
    assert not isinstance(found[0], Exception) and "lost on the way" in str(found[1])


@pytest.mark.parametrize("kind", ["golden", "choices"])
def test_the_time_limit_ends_questions(reader, kind):
    found = answer_together(reader, [load_method("full"), load_method("snapkv", budget=0.4)], asked(kind, 1), 1e-9)
    assert {str(one) for one in found} == {"was not done within time_limit=1e-09 seconds"}
