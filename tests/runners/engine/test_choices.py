"""Choices compared through a cache: against lm_eval's own model, and what compression must and must not change."""

import copy
import hashlib
from typing import Any

import pytest
import torch

from methods import load_method
from methods.core.bind import unbound
from methods.core.errors import UserError
from runners.engine.answer import answer
from runners.engine.choices import EncodedChoice, compare_choices, encode
from runners.engine.prompt import Encoder
from runners.engine.session import Session
from runners.engine.setting import Setting, check_protocol
from tasks.base import Choice, Example
from tasks.lm_eval.task import LmEval
from tests.bounds import losses_off, near
from tests.tasks.choice_items import ROWS, write

TASKS = list(ROWS)


@pytest.fixture(scope="module")
def model(sharp_model):
    return sharp_model


@pytest.fixture
def encoder(tiny_tokenizer) -> Encoder:
    return Encoder(tiny_tokenizer, ends=(2,), window=2048)


def asked_of(encoder: Encoder, task: LmEval) -> list[list[EncodedChoice]]:
    return [[encode(encoder, example, choice) for choice in example.choices] for example in task.examples()]


TOKENS = 32  # the longest choice


def scores(model, method, asked: list[list[EncodedChoice]], **how: Any) -> list[list[tuple[float, bool]]]:
    return compare_choices(model, method, asked, list(range(len(asked))), **how)[0]


def snapkv(budget: float | int):
    return load_method("snapkv", budget=budget, window=2, kernel=1)


def lm_evals_own(model, tokenizer, task: LmEval, max_length: int = 2048) -> list[tuple[float, bool]]:
    """What lm_eval's model of the library gives for the same requests, with the library's own attention."""
    from lm_eval.models.huggingface import HFLM

    with unbound(model):
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)
        requests = [request for made in task._requests.values() for request in made]
        return own.loglikelihood(requests, disable_tqdm=True)


def assert_equal(found: list[list[tuple[float, bool]]], wanted: list[tuple[float, bool]]) -> None:
    flat = [one for choices in found for one in choices]
    near([total for total, _ in flat], [total for total, _ in wanted], losses_off(TOKENS))
    assert [best for _, best in flat] == [best for _, best in wanted]


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("budget", ["full", 1.0])
def test_everything_kept_equals_lm_evals_own_model(model, tiny_tokenizer, encoder, tmp_path, shots, budget):
    task = LmEval(TASKS, write(tmp_path), shots=shots)
    method = load_method("full") if budget == "full" else snapkv(budget)
    found = scores(model, method, asked_of(encoder, task))
    wanted = lm_evals_own(model, tiny_tokenizer, task)
    assert_equal(found, wanted)
    rated = [task.rate(example, own) for example, own in zip(task.examples(), found)]
    at = 0
    for example, own in zip(task.examples(), rated):
        there = wanted[at : at + len(example.choices)]
        at += len(example.choices)
        assert own == {key: float(value) for key, value in task._results(example, there).items()}


def test_in_the_chat_template_choices_equal_lm_evals_own_model(model, tiny_tokenizer, tmp_path):
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<answer>\n{% endif %}"
    )
    task = LmEval(["piqa", "openbookqa"], write(tmp_path), shots=1, chat=True)
    assert "in the chat template" in task.source() and task.name == "lm_eval-1shot-chat"
    encoder = Encoder(tokenizer, ends=(2,), window=2048)
    found = scores(model, load_method("full"), asked_of(encoder, task))
    plain = scores(model, load_method("full"), asked_of(Encoder(tokenizer, (2,), window=2048, chat=False), task))
    assert found != plain
    with unbound(model):
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=2048)
        requests = [request for made in task._requests.values() for request in made]
        for request in requests:
            prompt, text = request.args
            assert not text.startswith(" ")  # the template ends the line
            turn = [{"role": "user", "content": prompt}]
            request.arguments = (own.apply_chat_template(turn, add_generation_prompt=True), text)
        assert_equal(found, own.loglikelihood(requests, disable_tqdm=True))


def test_a_prompt_that_is_too_long_loses_its_start_as_in_lm_evals_own_model(model, tiny_tokenizer, tmp_path):
    task = LmEval(TASKS, write(tmp_path), shots=2)
    asked = asked_of(Encoder(tiny_tokenizer, ends=(2,), window=40), task)
    assert any(one.cut for choices in asked for one in choices)
    assert_equal(scores(model, load_method("full"), asked), lm_evals_own(model, tiny_tokenizer, task, 40))


def test_a_small_budget_changes_the_first_token_too(model, encoder):
    example = Example("a/0", "the cat sat on a mat and read ", "about a long", [], 0)
    asked = encode(encoder, example, Choice("about a long", " river"))
    one_token = [[EncodedChoice(asked.prompt, asked.n_context, asked.text[:1])]]
    full, small = (scores(model, method, one_token)[0][0][0] for method in (load_method("full"), snapkv(4)))
    assert abs(full - small) > 1e-3


def test_choices_do_not_see_each_other_and_leave_their_start_as_it_is(model, encoder, tmp_path, monkeypatch):
    task = LmEval("openbookqa", write(tmp_path), shots=2)
    asked = asked_of(encoder, task)[:1]
    held = []
    fork = Session.fork

    def watched(session: Session) -> Session:
        digest = hashlib.sha256()
        for layer in session.cache.layers:
            for tensor in layer.inner.tensors():
                digest.update(tensor.numpy().tobytes())
        held.append(digest.hexdigest())
        return fork(session)

    monkeypatch.setattr(Session, "fork", watched)
    forwards = scores(model, snapkv(8), asked)[0]
    assert len(held) == 3 and len(set(held)) == 1  # the last one needs no copy
    backwards = scores(model, snapkv(8), [asked[0][::-1]])[0][::-1]
    near([a for a, _ in forwards], [a for a, _ in backwards], losses_off(TOKENS))


def test_rows_of_a_batch_have_their_own_scores(model, encoder, tmp_path):
    task = LmEval(TASKS, write(tmp_path), shots=1)
    asked = asked_of(encoder, task)
    alone = [compare_choices(model, snapkv(8), [own], [i]) for i, own in enumerate(asked)]
    together, ledgers, _ = compare_choices(model, snapkv(8), asked, list(range(len(asked))))
    for (a, *_), b in zip(alone, together):
        near([x for x, _ in a[0]], [x for x, _ in b], losses_off(TOKENS))
    for (_, (a,), _), b in zip(alone, ledgers, strict=True):
        for name in ("held_prompt", "held_end", "full_prompt", "full", "asked", "overhead"):
            assert getattr(a, name) == getattr(b, name), name


def test_token_by_token_and_at_once_agree_where_nothing_is_dropped_while_decoding(model, encoder, tmp_path):
    asked = asked_of(encoder, LmEval("piqa", write(tmp_path), shots=1))
    single, block = (scores(model, snapkv(8), asked, stride=n) for n in (1, None))
    for a, b in zip(single, block):
        near([x for x, _ in a], [x for x, _ in b], losses_off(TOKENS))


def test_agnostic_compresses_the_examples_and_reads_the_item_exactly(model, encoder, tmp_path):
    task = LmEval("piqa", write(tmp_path), shots=1)
    asked = asked_of(encoder, task)
    for own in asked:
        first, rest = own[0].parts("agnostic")
        assert len(first) == own[0].n_context < len(own[0].prompt) - 1 and first + rest == own[0].prompt
    aware, agnostic = (scores(model, snapkv(8), asked, protocol=name)[0][0][0] for name in ("aware", "agnostic"))
    assert abs(aware - agnostic) > 1e-3
    full = [scores(model, load_method("full"), asked, protocol=name) for name in ("aware", "agnostic")]
    near([x for x, _ in full[0][0]], [x for x, _ in full[1][0]], losses_off(TOKENS))


def test_nothing_before_the_item_is_refused_where_only_that_would_be_compressed(tmp_path):
    examples = LmEval("piqa", write(tmp_path), shots=0).examples()
    with pytest.raises(UserError, match=r"task\.shots"):
        check_protocol(examples, "agnostic", [])
    check_protocol(examples, "aware", [])


def test_blanks_before_the_text_belong_to_it(encoder, tiny_tokenizer):
    example = Example("a/0", "", "", [], 0)
    loose, tight = (encode(encoder, example, Choice(*both)) for both in (("the cat ", "sat"), ("the cat", " sat")))
    assert loose == tight and tiny_tokenizer.decode(tight.text) == " sat"


def test_an_empty_prompt_is_the_beginning_of_a_sequence(model, encoder, tiny_tokenizer):
    asked = encode(encoder, Example("a/0", "", "", [], 0), Choice("", "the cat"))
    assert asked.prompt == (1,) and tiny_tokenizer.decode(asked.text) == "the cat"
    (found,) = scores(model, load_method("full"), [[asked]])[0]
    with torch.no_grad(), unbound(model):
        logits = model(torch.tensor([[1, *asked.text[:-1]]])).logits[0].log_softmax(-1)
    near(found[0], sum(logits[i, t].item() for i, t in enumerate(asked.text)), losses_off(TOKENS))


def test_an_empty_prompt_beside_others_and_a_single_token_have_their_scores(model, encoder):
    example = Example("a/0", "", "", [], 0)
    choices = [Choice("", "t"), Choice("", "the cat sat"), Choice("the cat", " sat")]
    asked = [encode(encoder, example, one) for one in choices]
    together = scores(model, load_method("full"), [asked])[0]
    alone = [scores(model, load_method("full"), [[one]])[0][0] for one in asked]
    near([x for x, _ in together], [x for x, _ in alone], losses_off(TOKENS))


def test_a_nan_is_a_failed_sample_and_not_the_first_choice(model, encoder, tmp_path):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(torch.nan)
    task = LmEval("piqa", write(tmp_path), limit=1)
    setting = Setting(broken, task, lambda: encoder, "aware", None, 1)
    rows: list[dict[str, Any]] = []
    answer(setting, load_method("full"), task.examples(), rows.append)
    assert [row["error"] for row in rows] == ["the log-likelihoods are not finite"]


@pytest.mark.shared
def test_published_items_equal_lm_evals_own_model(model, tiny_tokenizer, encoder, shared_data):
    task = LmEval(["piqa", "copa", "openbookqa"], str(shared_data / "multiple-choice"), limit=50)
    assert len(task.examples()) == 150
    found = [scores(model, load_method("full"), [own])[0] for own in asked_of(encoder, task)]
    assert_equal(found, lm_evals_own(model, tiny_tokenizer, task))
