"""What a group is thought to take before it takes it, by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from methods import load_method
from runners.engine.fidelity.panel import Panel
from runners.memory import GroupSizes, Size, block_of, rows_of
from tasks.base import Choice, Example, Forced, Turn
from tests.methods.conftest import run, tiny_llama

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}
TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, width, bytes of a number
PLAIN = Example("a/0", "a cat", " sat", ["on a mat"], 10)
TURNS = replace(PLAIN, turns=(Turn("where?", ["on a mat"], 10),))
CHOICES = replace(
    PLAIN, max_new_tokens=1, choices=(Choice(" sat", " here"), Choice(" sat", " there"), Choice(" ran", " away"))
)


@pytest.fixture
def sizes() -> GroupSizes:
    run = SimpleNamespace(
        cfg=OmegaConf.create({"chunk": None, "group": {"max_cells": None, "max_bytes": None}}),
        checkpoint=SimpleNamespace(config=CONFIG),
        dtype=torch.float32,
        cache_dtype=None,
        sampling=SimpleNamespace(repeats=1),
        panel=Panel("off", []),
    )
    sizes = GroupSizes(run)  # type: ignore[arg-type]
    sizes._tokens = {"a/0": 100}
    return sizes


def bytes_of(sizes: GroupSizes, *examples: Example, **knobs: Any) -> int:
    return sizes.member_bytes(load_method("snapkv", **{"budget": 0.25, "window": 4} | knobs), examples)


def test_a_member_takes_its_share_of_the_prompt_and_what_is_generated(sizes):
    assert bytes_of(sizes, PLAIN) == (25 + 10) * TOKEN
    assert bytes_of(sizes, PLAIN, budget=40) == (40 + 10) * TOKEN
    assert bytes_of(sizes, PLAIN, budget=4000) == (100 + 10) * TOKEN
    assert bytes_of(sizes, PLAIN, PLAIN) == 2 * (25 + 10) * TOKEN
    sizes.run.cfg.chunk = 50
    assert bytes_of(sizes, PLAIN) == (100 + 10) * TOKEN


@pytest.mark.parametrize(("name", "knobs"), [("kivi", {"bits": 4}), ("kivi", {"bits": 2}), ("per_token", {"bits": 4})])
def test_a_codec_of_given_bits_plans_the_bytes_that_it_then_holds(name, knobs):
    model, method = tiny_llama(), load_method(name, **knobs)
    cache = method.cache_for(model)
    run(model, cache, torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(0)))
    shape = Size(model.config.to_dict(), torch.float32)
    positions = 300 * 4 * 2  # of every layer, which plans leave out
    planned = int(method.planned_share(300, shape.shape) * 300 * shape.token)
    assert planned + positions == cache.report().held_prompt


def test_questions_and_choices_go_on_from_a_copy(sizes):
    assert bytes_of(sizes, TURNS) == 2 * (25 + 10) * TOKEN
    # two prompts, and choices of at most as many tokens as letters
    assert bytes_of(sizes, CHOICES) == 2 * 2 * (25 + 6) * TOKEN


def test_what_is_read_again_for_the_fidelity_panel_goes_on_from_a_copy(sizes):
    once = bytes_of(sizes, PLAIN)
    sizes.run.panel = Panel("auto", [PLAIN])
    assert bytes_of(sizes, PLAIN) == 2 * once


def test_later_answers_of_a_prompt_go_on_from_a_copy_too(sizes):
    sizes.run.sampling.repeats = 2
    assert bytes_of(sizes, PLAIN) == 2 * (25 + 10) * TOKEN


def test_rows_are_prompts_and_blocks_what_has_logits_at_once():
    assert [rows_of(example) for example in (PLAIN, TURNS, CHOICES)] == [1, 1, 2]
    assert [block_of(example) for example in (PLAIN, TURNS, CHOICES)] == [1, 1, 6]
    assert block_of(replace(CHOICES, stride=2)) == 2
    fed = Forced("", "prefix", 0, 97, 80, 8, range(80, 97))
    assert block_of(replace(PLAIN, forced=fed)) == 8 and block_of(replace(PLAIN, forced=replace(fed, stride=500))) == 97
    held = Size(CONFIG, torch.float32, torch.float16)
    assert 2 * held.token == Size(CONFIG, torch.float32).token and held.shape.itemsize == 2
    assert held.logits(8, 3) == Size(CONFIG, torch.float32).logits(8, 3)  # of the model, not of its caches
    assert Size(CONFIG, torch.float32).logits(8, 3) == 8 * 3 * 100 * (4 + 4)


def test_a_group_ends_where_its_bytes_or_its_cells_would_be_too_many(sizes):
    cells = [SimpleNamespace(cell=SimpleNamespace(method=load_method("snapkv", budget=40))) for _ in range(5)]
    prompt, member = 100 * TOKEN, 50 * TOKEN + 1 * 100 * (4 + 4)

    def lengths() -> list[int]:
        return list(map(len, sizes.split(cells, [PLAIN])))

    sizes.run.cfg.group.max_bytes = prompt + 2 * member
    assert lengths() == [2, 2, 1]
    sizes.run.cfg.group.max_bytes -= 1
    assert lengths() == [1] * 5
    sizes.run.cfg.group.max_bytes = 10 * prompt
    assert lengths() == [5]
    sizes.max_cells = 3
    assert lengths() == [3, 2]
