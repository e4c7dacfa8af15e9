"""The grid of points that task=latency times."""

import pytest

from methods.core.errors import UserError
from tasks.latency import Latency


def test_every_length_meets_every_batch_short_ones_first():
    examples = Latency(lengths=[64, 32], batches=[1, 2], new_tokens=4, rounds=3).examples()
    assert [example.id for example in examples] == ["32x1", "64x1", "32x2", "64x2"]
    assert all(example.kind == "timed" and example.prompt == "" for example in examples)
    timed = examples[-1].timed
    assert (timed.length, timed.batch, timed.steps, timed.rounds) == (64, 2, 4, 3)


def test_more_lengths_are_the_same_task_and_more_rounds_are_not():
    task = Latency(lengths=64)
    assert task.fingerprint == Latency(lengths=[64, 128], batches=[1, 8]).fingerprint
    assert task.fingerprint != Latency(lengths=64, rounds=7).fingerprint


def test_the_first_line_says_that_tokens_are_random():
    assert (
        Latency(lengths=64, batches=[2, 4])
        .source()
        .startswith("latency (random tokens, seed 42), prompts of 64 tokens x batches of 2, 4")
    )


@pytest.mark.parametrize("wrong", [{"lengths": [0.5]}, {"lengths": []}, {"batches": 0}, {"rounds": None}])
def test_what_cannot_be_timed_is_named_as_typed(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(UserError, match=f"task.{key}={str(value).replace('[', '.')[:2]}"):
        Latency(**wrong)
