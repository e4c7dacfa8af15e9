"""A limit ends what takes too long at its next pass, and leaves no trace in the model."""

import time

import pytest
from torch import nn, ones

from runners.engine.time_limit import TimeLimit, within


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


def test_a_pass_after_the_limit_does_not_begin():
    model, done = Slow(), 0
    with pytest.raises(TimeLimit, match=r"time_limit=0\.03 seconds"), within(model, 0.03):
        for _ in range(100):
            model(ones(1))
            done += 1
    assert 1 <= done < 100


def test_the_model_has_no_limit_behind_the_block():
    model = Slow()
    with pytest.raises(TimeLimit), within(model, 1e-9):
        model(ones(1))
    with within(model, None):
        model(ones(1))
    assert not model._forward_pre_hooks
