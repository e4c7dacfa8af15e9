"""The state of a batch: fed in parts, forked, and compressed again."""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core.contract import Method
from runners.engine.generation import start
from runners.engine.new_tokens import Limits

NEW = 8


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def snapkv(budget: float | int = 0.25) -> Method:
    return load_method("snapkv", budget=budget, window=4, kernel=3)


def state(cache) -> str:
    """A hash of all that the cache's layers hold."""
    total = hashlib.sha256()
    for layer in cache.layers:
        for tensor in layer.inner.tensors():
            total.update(tensor.numpy().tobytes())
    return total.hexdigest()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["full", "snapkv", "nacl", "streaming_llm"])
def test_a_fork_answers_as_the_original_would_and_leaves_it_alone(model, name):
    method = snapkv() if name == "snapkv" else load_method(name, **({} if name == "full" else {"budget": 0.5}))
    session, logits = start(model, method, [tokens(60)], [1])
    before, columns = state(session.cache), session.mask.shape
    first = session.fork().decode(logits, [Limits(NEW)])
    assert state(session.cache) == before and session.mask.shape == columns and session.steps == 0
    assert session.fork().decode(logits, [Limits(NEW)]) == first
    assert session.decode(logits, [Limits(NEW)]) == first
    assert state(session.cache) != before


@torch.inference_mode()
def test_a_fork_shares_its_method_and_counts_its_own_bytes(model):
    session, logits = start(model, snapkv(), [tokens(60)], [1])
    fork = session.fork()
    assert fork.cache.method is session.cache.method
    assert all(a.inner is not b.inner for a, b in zip(fork.cache.layers, session.cache.layers))
    held = session.cache.report().held_end
    fork.decode(logits, [Limits(NEW)])
    assert session.cache.report().held_end == held < fork.cache.report().held_end


@torch.inference_mode()
def test_parts_of_a_batch_are_padded_and_give_what_each_row_gives_alone(model):
    rows = [(tokens(40, 1), tokens(9, 2)), (tokens(25, 3), tokens(14, 4))]
    session, _ = start(model, load_method("full"), [first for first, _ in rows], [0, 1])
    together = session.decode(session.feed([rest for _, rest in rows]), [Limits(NEW)] * 2)
    for row, answer in zip(rows, together):
        alone, _ = start(model, load_method("full"), [row[0]], [0])
        assert alone.decode(alone.feed([row[1]]), [Limits(NEW)])[0].ids == answer.ids


@torch.inference_mode()
def test_a_later_part_that_ends_a_prompt_is_compressed_to_a_share_of_all_tokens(model):
    session, _ = start(model, snapkv(0.25), [tokens(80)], [0])
    slots = [len(layer.inner.store) for layer in session.cache.layers]
    assert slots == [20, 20]
    session.feed([tokens(40, 1)], ends_prompt=True)
    assert [len(layer.inner.store) for layer in session.cache.layers] == [30, 30]
    session.cache.check_budget()
    session.feed([tokens(16, 2)])
    assert [len(layer.inner.store) for layer in session.cache.layers] == [46, 46]


@torch.inference_mode()
def test_mean_bytes_lie_between_those_after_the_prompt_and_the_peak(model):
    session, logits = start(model, snapkv(0.25), [tokens(80)], [0])
    assert session.cache.report().mean_decode == 0
    session.decode(logits, [Limits(100)])
    report = session.cache.report()
    assert report.held_prompt < report.mean_decode < report.peak_decode


@torch.inference_mode()
def test_an_exact_answer_feeds_nothing_behind_its_end(model, monkeypatch):
    from runners.engine.session import LOOK_EVERY

    monkeypatch.setitem(LOOK_EVERY, "cpu", 8)
    session, logits = start(model, load_method("full"), [tokens(40)], [0])
    free = session.fork().decode(logits, [Limits(NEW)])[0].ids
    end = (free[2],)
    answer = session.decode(logits, [Limits(NEW, ends=end)], exact=True)[0]
    n = len(answer.ids)
    assert answer.stop == "end" and session.mask.shape[1] == 40 + n - 1
