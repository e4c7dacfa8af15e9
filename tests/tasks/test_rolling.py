"""`through=rolling` against lm_eval's own rolling log-likelihood, whatever the tokenizer puts before a text."""

import copy
from typing import Any

import pytest
import torch

from methods import load_method
from methods.core.bind import unbound
from methods.core.errors import UserError
from runners.engine.prompt import Encoder
from runners.engine.teacher_forcing import force
from tasks.perplexity import Perplexity
from tests.bounds import losses_off, near
from tests.conftest import WORDS

WINDOW = 24


def without_bos(tokenizer: Any) -> Any:
    return tokenizer


def with_bos(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert made("a").input_ids[0] == 1
    return made


def with_an_end_only(tokenizer: Any) -> Any:
    made = copy.deepcopy(tokenizer)
    made.bos_token = None
    return made


def with_an_end_appended(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert made("a").input_ids[-1] == 2
    return made


@torch.no_grad()
def theirs(model: Any, tokenizer: Any, text: str) -> float:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # what a tokenizer adds by itself would be counted as text
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW, add_bos_token=False)
    with unbound(model):
        (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    return found


def ours(model: Any, tokenizer: Any, folder: Any, text: str) -> tuple[float, int]:
    """The sum of all losses, and how many tokens counted."""
    (folder / "text.txt").write_text(text)
    encoder = Encoder(tokenizer, (), window=WINDOW)
    task = Perplexity(str(folder), through="rolling")
    task.fit(encoder.tokens)
    total, n = 0.0, 0
    for example in task.examples():
        assert example.forced is not None
        losses, _, _ = force(model, load_method("full"), [encoder.piece(example.forced)], example.forced, [0])
        total += losses[0, list(example.forced.counted)].sum().item()
        n += len(example.forced.counted)
    return total, n


@pytest.mark.parametrize("words", [5, 60], ids=["one window", "several windows"])
@pytest.mark.parametrize("kind", [without_bos, with_bos, with_an_end_only, with_an_end_appended])
def test_rolling_is_lm_evals_sum_over_all_tokens(kind, words, sharp_model, tiny_tokenizer, tmp_path):
    tokenizer = kind(tiny_tokenizer)
    text = " ".join((WORDS.split() * 20)[:words])
    found, counted = ours(sharp_model, tokenizer, tmp_path, text)
    assert counted == len(tokenizer.encode(text, add_special_tokens=False))
    assert (counted > WINDOW) == (words > 5)
    near(found, -theirs(sharp_model, tokenizer, text), losses_off(counted))


def test_a_tokenizer_without_beginning_and_end_is_refused(tiny_tokenizer, tmp_path):
    tokenizer = with_an_end_only(tiny_tokenizer)
    tokenizer.eos_token = None
    (tmp_path / "text.txt").write_text("the cat")
    task = Perplexity(str(tmp_path), through="rolling")
    task.fit(Encoder(tokenizer, ()).tokens)
    with pytest.raises(UserError, match=r"task\.through=rolling.*no token"):
        task.examples()


def test_a_piece_of_one_pass_fills_the_window_whatever_the_tokenizer_adds(tiny_tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("the cat " * 50)
    for tokenizer in (without_bos(tiny_tokenizer), with_bos(tiny_tokenizer)):
        task = Perplexity(str(tmp_path), through="windows")
        task.fit(Encoder(tokenizer, (), window=WINDOW).tokens)
        assert {e.forced.length for e in task.examples() if e.forced} == {WINDOW}
