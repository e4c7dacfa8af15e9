"""Teacher forcing: losses against the library's own forward, and the gates that a perplexity run must pass."""

import math

import pytest
import torch

from methods import load_method
from methods.core.bind import unbound
from methods.core.contract import Method
from runners.engine.teacher_forcing import force
from tasks.base import Forced
from tests.bounds import losses_off, near

LENGTH = 48


@pytest.fixture(scope="module")
def model(sharp_model):
    return sharp_model


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(3, 300, (LENGTH,), generator=torch.Generator().manual_seed(7)).tolist()


def plan(through: str, prompt: int = 32, stride: int = 1, first: int | None = None, length: int = LENGTH) -> Forced:
    start = first if first is not None else prompt
    return Forced("", through, 0, length, prompt, stride, range(start, length))  # type: ignore[arg-type]


@torch.no_grad()
def standard(model, ids: list[int]) -> torch.Tensor:
    """The usual full-attention losses of tokens 1.., with the library's own attention."""
    with unbound(model):
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def losses(model, method: Method, ids: list[int], forced: Forced) -> torch.Tensor:
    return force(model, method, [ids], forced, [0])[0][0]


def snapkv(budget: float | int) -> Method:
    return load_method("snapkv", budget=budget, window=2, kernel=1)


@pytest.mark.parametrize(
    "forced",
    [
        plan("prefix"),
        plan("prefix", stride=5),
        plan("prefix", stride=1000),
        plan("stream", prompt=9, first=1),
        plan("chunk", stride=16, first=1),
        plan("chunk", stride=LENGTH, first=1),
        plan("one_pass", stride=LENGTH, first=1),
    ],
    ids=lambda forced: f"{forced.through}-{forced.stride}",
)
def test_the_full_cache_gives_the_standard_value_whatever_the_protocol(model, ids, forced):
    found, wanted = losses(model, load_method("full"), ids, forced), standard(model, ids)
    counted = list(forced.counted)
    near(found[counted], wanted[[i - 1 for i in counted]], losses_off())


def test_a_budget_of_everything_equals_the_one_pass_value(model, ids):
    wanted = standard(model, ids)
    for method, forced in (
        (snapkv(1.0), plan("prefix")),
        (snapkv(LENGTH), plan("chunk", stride=16, first=1)),
        (load_method("streaming_llm", budget=LENGTH), plan("stream", prompt=LENGTH // 2, first=LENGTH // 2)),
    ):
        counted = list(forced.counted)
        mean = losses(model, method, ids, forced)[counted].mean().item()
        near(mean, wanted[[i - 1 for i in counted]].mean(), losses_off())


def test_a_tiny_budget_changes_the_value(model, ids):
    full = losses(model, load_method("full"), ids, plan("prefix"))
    small = losses(model, snapkv(4), ids, plan("prefix"))
    assert (full - small)[32:].abs().max() > 1e-3
    chunked = losses(model, snapkv(4), ids, plan("chunk", stride=16, first=1))
    # the second block still finds the whole first one in the query that has just been fed, the third does not
    near(chunked[1:16], full_chunk(model, ids)[1:16], losses_off())
    assert (chunked - full_chunk(model, ids))[33:].abs().max() > 1e-3


def full_chunk(model, ids: list[int]) -> torch.Tensor:
    return losses(model, load_method("full"), ids, plan("chunk", stride=16, first=1))


def test_a_cap_is_felt_while_the_text_is_fed(model, ids):
    cap = 16
    forced = plan("stream", prompt=cap + 1, first=1)
    small = losses(model, load_method("streaming_llm", budget=cap), ids, forced)
    full = losses(model, load_method("full"), ids, forced)
    # token cap + 1 is predicted by the query that still found everything
    near(small[1 : cap + 2], full[1 : cap + 2], losses_off())
    assert (small - full)[cap + 2 :].abs().max() > 1e-3


@pytest.mark.parametrize("forced", [plan("prefix"), plan("prefix", stride=4), plan("chunk", stride=16, first=1)])
def test_a_loss_does_not_depend_on_what_comes_after_its_token(model, ids, forced):
    other = [*ids[:40], *reversed(ids[40:])]
    a, b = (losses(model, snapkv(8), row, forced) for row in (ids, other))
    counted = [place for place in forced.counted if place < 40 and (forced.through != "chunk" or place < 32)]
    assert torch.equal(a[counted], b[counted])


def test_one_step_at_a_time_and_a_block_give_the_same_losses_after_one_compression(model, ids):
    single, block = (losses(model, snapkv(8), ids, plan("prefix", stride=n)) for n in (1, 16))
    near(single[32:], block[32:], losses_off())


def test_rows_of_a_batch_have_their_own_losses(model, ids):
    other = list(reversed(ids))
    both = force(model, snapkv(8), [ids, other], plan("prefix"), [0, 1])[0]
    for row, alone in zip(both, (ids, other)):
        near(row[32:], losses(model, snapkv(8), alone, plan("prefix"))[32:], losses_off())


def test_nothing_before_the_prompts_end_has_a_loss_in_prefix(model, ids):
    found = losses(model, load_method("full"), ids, plan("prefix"))
    assert found[:32].isnan().all() and not found[32:].isnan().any()


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model, ids):
    blank = type(model)(model.config).eval()
    for parameter in blank.parameters():
        parameter.data.zero_()
    found = losses(blank, load_method("full"), ids, plan("prefix"))
    near(found[32:].mean(), math.log(model.config.vocab_size), losses_off())


def test_times_and_tokens_fed_are_counted(model, ids):
    _, _, timings = force(model, load_method("full"), [ids], plan("prefix", stride=4), [0])
    assert timings.n_prompt == 31 and timings.steps == LENGTH - 32 and timings.prompt > 0 < timings.decode
