"""Hindsight against the untouched model's own attention from its answer to its prompt."""

import json

import pytest
import torch

from methods import load_method
from methods.core.errors import NotHere, UserError
from runners.engine.generation import Prompt, Prompts, generate, through
from tests.bounds import near, run_off
from tests.methods.conftest import kept
from tests.tiny import feed, padded_prompt, tiny_model

N, NEW = 40, 5


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", attn_implementation="eager")


def answers(model, ids: torch.Tensor) -> list[int]:
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()


def expected(model, ids: torch.Tensor, answer: list[int], slots: int) -> list[list[list[int]]]:
    """By layer and head, the prompt's tokens that those of the answer attend to most."""
    with torch.no_grad():
        layers = model(torch.cat((ids, torch.tensor([answer])), dim=1), output_attentions=True).attentions
    n = ids.shape[1]
    scores = [p[0, :, n:, :n].unflatten(0, (2, -1)).sum((1, 2)) for p in layers]  # [H, n]
    return [[sorted(row.topk(slots).indices.tolist()) for row in score] for score in scores]


def sets(cache, row: int = 0) -> list[list[list[int]]]:
    return [[kept(cache, layer, row, head) for head in range(2)] for layer in range(2)]


@pytest.mark.parametrize("pieces", [(N,), (15, 25)])
def test_what_the_answer_attends_to_stays(llama, pieces):
    ids, mask = padded_prompt([N])
    answer = answers(llama, ids)
    cache = load_method("hindsight", budget=0.25).cache_for(
        llama, prompt_len=N if len(pieces) > 1 else None, answers=[answer]
    )
    logits = feed(llama, cache, ids, mask, pieces)
    assert sets(cache) == expected(llama, ids, answer, N // 4)
    near(logits, llama(ids).logits, run_off())  # the prompt's own output is the model's
    report = cache.report()
    assert report.held_prompt == sum(x.nbytes for layer in cache.layers for x in layer.inner.tensors())
    assert 0.25 <= report.share < 0.3 and report.peak_prompt >= report.full_prompt


def test_rows_of_unequal_lengths_have_each_its_own_answer(llama):
    ids, mask = padded_prompt([N, N - 9])
    rows = [ids[:1], ids[1:, 9:]]
    own = [answers(llama, rows[0]), answers(llama, rows[1])[:3]]
    cache = load_method("hindsight", budget=10).cache_for(llama, answers=own)
    feed(llama, cache, ids, mask, (N,))
    for row in range(2):
        assert sets(cache, row) == expected(llama, rows[row], own[row], 10)


def test_a_run_answers_by_the_full_cache_first_and_budget_1_is_the_full_cache(llama):
    ids, _ = padded_prompt([N])
    prompt = Prompt(ids[0].tolist(), N, NEW)
    whole, _, _ = generate(llama, load_method("full"), [prompt])
    for budget in (0.25, 1):
        plan = Prompts([prompt], "aware", answers=[whole[0].ids])
        state, _ = through(llama, [load_method("hindsight", budget=budget)], plan)
        slots = 10 if budget < 1 else N
        assert all(layer.inner.store.n == slots + NEW - 1 for layer in state.members[0].cache.layers)
    assert plan.of(0)[0].answers[0].ids == whole[0].ids


def test_what_it_cannot_do_is_refused_by_name(llama):
    with pytest.raises(UserError, match=r"hindsight: looks ahead at what the full cache answers; method.cache_for"):
        load_method("hindsight", budget=0.5).cache_for(llama)
    for budget, decode in ((0.5, {"every": 4}), (1, {"cap": 64})):
        with pytest.raises(NotHere, match=r"method\.decode: Hindsight knows what an answer attends to"):
            load_method("hindsight", budget=budget, decode=decode)
    ids, mask = padded_prompt([N])
    cache = load_method("hindsight", budget=0.5).cache_for(llama, answers=[[1, 2]])
    feed(llama, cache, ids, mask, (N,))
    cache.compress_next()
    with pytest.raises(UserError, match="hindsight: a later prompt has an answer of its own"), torch.no_grad():
        llama(ids, past_key_values=cache, use_cache=True)


@pytest.mark.slow
def test_on_needles_the_references_stand_in_their_order(tmp_path, run_command):
    code, _, err = run_command(
        "-m", "model=reference", "method=recency", "budget=0.25", "references=true", "task=needle", "fidelity=off",
        "task.kinds=[single,multi_key]", "task.limit=12", f"results={tmp_path}",
    )  # fmt: skip
    assert code == 0, err
    scores = {}
    for path in tmp_path.glob("*/*/*/samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        scores[path.parent.name.partition("-b")[0]] = sum(row["score"] for row in rows) / len(rows)
    assert sorted(scores) == ["full", "hindsight", "no_context", "random", "recency"]
    assert scores["no_context"] <= scores["random"] < scores["hindsight"] <= scores["full"]
