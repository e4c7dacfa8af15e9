"""When an answer ends at a string, and how its tokens are drawn: alone, in a batch, and in a group."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.noise import uniform
from methods import load_method
from runners.engine.generation import Prompt, generate, together
from runners.engine.new_tokens import Draw, Limits, NewTokens, Stops, draw_tokens
from runners.engine.prompt import Encoder
from runners.engine.rows import row_of
from runners.engine.session import LOOK_EVERY, behind
from tasks.base import Example
from tasks.sampling import Sampling
from tests.bounds import half_digit, near

NEW = 14
TAGS = {"subset": "a", "category": "x"}
WARM = Sampling(temperature=0.6, top_p=0.95)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """Logits so far apart that drawn tokens are few, and never the same in two rows by accident."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    return model


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer):
    return Encoder(tiny_tokenizer, (2,), window=2048)


def prompts() -> list[Prompt]:
    g = torch.Generator().manual_seed(4)
    return [Prompt(torch.randint(3, 300, (40 + 9 * i,), generator=g).tolist(), 30, NEW, sample=i) for i in range(3)]


def example(i: int = 0, **knobs) -> Example:
    return Example(f"a/{i}", "the cat sat on a mat " * (5 + 3 * i), "who sat?", ["x"], NEW, TAGS, **knobs)


def read(encoder: Encoder, tokens: list[int], least: int = 0, look: int = 1, ends=(2,), **knobs):
    """What becomes of these tokens, looked at after every so many, by an example's stops."""
    stops = encoder.stops_of(example(**knobs))
    rows = NewTokens([Limits(len(tokens), least, ends, stops)], torch.device("cpu"))
    for i, token in enumerate(tokens):
        rows.take(torch.nn.functional.one_hot(torch.tensor([token]), 400).float())
        if i % look == look - 1 and all(rows.ended()):
            break
    return rows.answers()[0]


@pytest.mark.parametrize("look", [1, 8])
@pytest.mark.parametrize(
    ("said", "stop", "left"),
    [
        ("a mat.\n\nQuestion: who", "Question:", "a mat.\n\n"),
        ("the cat sat on", "t sa", "the ca"),  # begins and ends inside a token
        ("naïve café \U0001f600 and more", "é \U0001f600", "naïve caf"),  # letters of several tokens
        ("a b", " ", "a"),
        ("\n\nnothing", "\n", ""),
    ],
)
def test_a_row_ends_with_the_token_that_completes_a_stop_string(encoder, said, stop, left, look):
    tokens = encoder.plain(said)
    answer = read(encoder, tokens, look=look, stop=("never", stop))
    assert answer.stop == "string" and answer.ids == tokens[: len(answer.ids)]
    assert stop in encoder.text(answer.ids) and stop not in encoder.text(answer.ids[:-1])
    assert encoder.said(example(stop=(stop,)), answer.ids)[0] == left


@pytest.mark.parametrize("look", [1, 3, 100])
def test_what_ends_an_answer_first_counts_however_seldom_it_is_looked_at(encoder, look):
    tokens = [*encoder.plain("the cat"), 2, *encoder.plain(" sat. Q: who")]
    early = read(encoder, tokens, look=look, stop=("Q:",))
    assert (early.stop, early.ids) == ("end", tokens[: tokens.index(2) + 1])
    late = read(encoder, tokens, look=look, stop=("cat", "Q:"))
    assert late.stop == "string" and 2 not in late.ids
    none = read(encoder, tokens, look=look, ends=(), stop=("nowhere",))
    assert (none.stop, none.ids) == ("length", tokens)


def test_a_stop_does_not_count_before_the_fewest_tokens_and_then_at_once(encoder):
    tokens = encoder.plain("Q: the cat sat on a mat and read")
    assert len(read(encoder, tokens, stop=("Q:",)).ids) < 4
    late = read(encoder, tokens, least=5, stop=("Q:",))
    assert (late.stop, len(late.ids)) == ("string", 5)


def test_a_stop_inside_a_think_block_ends_nothing(encoder):
    tokens = encoder.plain("<think>is it Q: no</think> the cat. Q: who")
    answer = read(encoder, tokens, stop=("Q:",))
    assert answer.stop == "string" and encoder.said(example(stop=("Q:",)), answer.ids)[0] == "the cat. "
    kept = replace(encoder, reasoning="keep")
    assert kept.said(example(stop=("Q:",)), read(kept, tokens, stop=("Q:",)).ids)[0] == "<think>is it "


def test_a_nan_counts_before_a_stop_string_and_not_behind_it_however_late_that_is_noticed(encoder):
    stops, nan = encoder.stops_of(example(stop=(" sat",))), torch.full((1, 400), torch.nan)
    tokens = encoder.plain("the cat sat")
    for at, error in ((1, "the logits hold a NaN"), (len(tokens), None)):
        rows = NewTokens([Limits(20, 0, (), stops)], torch.device("cpu"))
        steps = [torch.nn.functional.one_hot(torch.tensor([token]), 400).float() for token in tokens]
        for logits in [*steps[:at], nan, *steps[at:]]:
            rows.take(logits)
        (answer,) = rows.answers()
        assert answer.error == error
    assert (answer.stop, answer.ids) == ("string", tokens)


def stopped(encoder: Encoder, model, rows: list[Prompt]) -> tuple[list[Prompt], int]:
    """The prompts with a stop string that the first one's answer holds and no other's, and after how many tokens."""
    free = [generate(model, load_method("full"), [row])[0][0].ids for row in rows]
    texts = [encoder.text(ids[:n]) for ids in free[1:] for n in range(1, NEW + 1)]
    for n in range(3, NEW - 2):
        before, own = encoder.text(free[0][: n - 1]), encoder.text(free[0][:n])
        for length in range(1, 8):
            stop = own[-length:]
            if stop not in before and not any(stop in text for text in texts):
                stops = Stops((stop,), encoder.text, encoder.text)
                return [replace(row, stops=stops) for row in rows], n
    raise AssertionError("no string of the first answer is its own")


@pytest.mark.parametrize("seldom", [False, True])
def test_a_row_that_ends_at_a_string_has_the_ledger_of_that_moment_alone_batched_and_shared(
    model, encoder, monkeypatch, seldom
):
    monkeypatch.setitem(LOOK_EVERY, "cpu", 8 if seldom else 1)
    rows, n = stopped(encoder, model, prompts())
    methods = [load_method("full"), load_method("snapkv", budget=0.4, window=4)]
    (alone,), cache, timings = generate(model, methods[0], rows[:1])
    assert alone.stop == "string" and len(alone.ids) == n
    assert seldom or timings.steps == n - 1
    (ledger,) = cache.reports(behind([alone], timings.steps))
    short, cache, _ = generate(model, methods[0], [replace(rows[0], stops=None, max_new_tokens=n)])
    (expected,) = cache.reports()
    same = ("held_prompt", "held_end", "full", "mean_decode")
    assert short[0].ids == alone.ids
    assert [getattr(ledger, name) for name in same] == [getattr(expected, name) for name in same]
    batch, cache, timings = generate(model, methods[0], rows)
    assert [answer.stop for answer in batch] == ["string", "length", "length"] and batch[0] == alone
    assert cache.reports(behind(batch, timings.steps))[0].held_end == expected.held_end
    for B in (1, 3):
        full, _ = together(model, methods, rows[:B])
        assert full.answers[0] == alone and full.ledgers[0].held_end == expected.held_end
    assert full.answers == batch


def test_probabilities_are_cut_and_drawn_as_worked_by_hand():
    # .5, .3, .15, .05 at temperature .6 are .631786, .269664, .084939, .013611; before them lie 0, .6318, .9015, .9864
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    order = [1, 3, 0, 2]  # the likeliest first

    def drawn(u: float, top_p: float = 1.0, top_k: int = 0, temperature: float = 0.6) -> int:
        knobs = (torch.tensor([x]) for x in (temperature, top_k, top_p, u))
        return int(draw_tokens(logits, *knobs))

    edges = {1.0: [0.631786, 0.90145, 0.986389], 0.95: [0.640504, 0.913889], 0.9: [0.70086], 0.6: []}
    for top_p, at in edges.items():
        for i, edge in enumerate(at):
            assert drawn(edge - 1e-4, top_p) == order[i] and drawn(edge + 1e-4, top_p) == order[i + 1]
        assert drawn(0.99999, top_p) == order[len(at)]
    assert drawn(0.65, 0.95) == 3
    assert [drawn(0.9999, top_k=k) for k in (1, 2, 3, 4, 9)] == [1, 3, 0, 2, 2]
    assert drawn(0.0) == 1 and drawn(0.49999, temperature=1.0) == 1 and drawn(0.50001, temperature=1.0) == 3


def test_frequencies_over_many_samples_are_the_probabilities():
    n, p = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    limits = [Limits(1, draw=Draw(Sampling(temperature=1.0), sample)) for sample in range(n)]
    rows = NewTokens(limits, torch.device("cpu"))
    tokens = rows.take(p.log().expand(n, 4))
    counts = Counter(tokens.tolist())
    for token, share in enumerate(p.tolist()):
        # five standard errors
        assert abs(counts[token] / n - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_draws_are_apart_from_what_methods_draw_and_from_each_other():
    def numbers(**knobs) -> list[int]:
        key = {"sample": 3, "repeat": 0, "turn": 0} | knobs
        how = Sampling(temperature=1.0, seed=key.pop("seed", 0))
        rows = NewTokens([Limits(40, draw=Draw(how, **key))], torch.device("cpu"))
        return [int(rows.take(torch.zeros(1, 1000))) for _ in range(40)]

    ways = [{}, {"seed": 1}, {"sample": 4}, {"repeat": 1}, {"turn": 1}]
    found = [numbers(**way) for way in ways]
    assert found == [numbers(**way) for way in ways]
    for i, one in enumerate(found):
        assert len(set(one)) > 30  # no step repeats another
        assert all(sum(a == b for a, b in zip(one, other)) < 5 for other in found[:i])
    # the first number of a method's own stream for the same seed and sample would choose another token
    assert found[0][0] != int(uniform(0, torch.tensor(3), torch.tensor(0)) * 1000)


def test_a_drawn_answer_depends_on_no_batch_order_or_company(model, encoder):
    warm = replace(encoder, sampling=WARM)
    rows = [warm(example(i)).prompt for i in range(3)]
    methods = [load_method("full"), load_method("snapkv", budget=0.4, window=4)]
    for method in methods:
        alone = [generate(model, method, [row])[0][0].ids for row in rows]
        assert [answer.ids for answer in generate(model, method, rows)[0]] == alone
        assert [answer.ids for answer in generate(model, method, rows[::-1])[0]] == alone[::-1]
        (shared,) = (one for one, own in zip(together(model, methods, rows), methods) if own is method)
        assert [answer.ids for answer in shared.answers] == alone
    greedy = generate(model, methods[0], [replace(row, sampling=Sampling()) for row in rows])[0]
    other = generate(model, methods[0], [replace(row, sampling=replace(WARM, seed=1)) for row in rows])[0]
    full = generate(model, methods[0], rows)[0]
    assert all(a.ids != b.ids and a.ids != c.ids for a, b, c in zip(full, other, greedy))


def test_the_likeliest_token_alone_is_greedy_and_rows_may_differ_in_how_they_are_drawn(model, encoder):
    rows = [encoder(example(i)).prompt for i in range(3)]
    greedy = generate(model, load_method("full"), rows)[0]
    only = [replace(row, sampling=Sampling(temperature=2.0, top_k=1)) for row in rows]
    assert generate(model, load_method("full"), only)[0] == greedy
    mixed = [rows[0], replace(rows[1], sampling=WARM), only[2]]
    found = generate(model, load_method("full"), mixed)[0]
    assert found[0] == greedy[0] and found[1] != greedy[1] and found[2] == greedy[2]


def test_the_fewest_tokens_hold_for_draws_too(model, encoder):
    warm = replace(encoder, sampling=WARM)
    prompt = warm(example()).prompt
    first = generate(model, load_method("full"), [prompt])[0][0].ids[0]
    held = replace(prompt, ends=(first,), min_new_tokens=3)
    answer = generate(model, load_method("full"), [held])[0][0]
    assert first not in answer.ids[:3]


def test_two_words_of_a_float16_vocabulary_are_drawn_by_float32_numbers():
    logits = torch.tensor([[10.0, 9.0]])
    knobs = (torch.tensor([0.7]), torch.tensor([0]), torch.tensor([1.0]))
    edge = float((logits / 0.7).double().softmax(-1)[0, 0])
    near(edge, 0.806679, half_digit(6))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert int(draw_tokens(logits.to(dtype), *knobs, torch.tensor([edge - 1e-4]))) == 0
        assert int(draw_tokens(logits.to(dtype), *knobs, torch.tensor([edge + 1e-4]))) == 1


def test_a_sample_is_found_under_the_key_that_it_had_before_strings_ended_answers():
    asked = example(stop=("Q:",))
    before = {"key": example().key, "id": asked.id}
    assert asked.key != before["key"]
    assert row_of({before["key"]: before}, asked) is before
    assert row_of({before["key"]: before, asked.key: {"key": asked.key}}, asked) == {"key": asked.key}
    assert row_of({asked.key: {}}, example()) is None
