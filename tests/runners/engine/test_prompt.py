"""Prompts as token ids: where the question starts, what is cut, what the chat template adds."""

import copy
import signal
import time

import pytest
import torch

from methods.core.errors import UserError
from runners.engine import time_limit
from runners.engine.prompt import Encoder
from tasks.base import Example

CHAT = (
    "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] | trim }}</user>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def example(context: str = "the cat sat on a mat. ", question: str = "Question: where?", **knobs) -> Example:
    return Example("mat/0", context, question, ["a mat"], max_new_tokens=8, **knobs)


@pytest.fixture
def chatty(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


def test_context_and_question_are_one_string_and_split_where_the_question_starts(tiny_tokenizer):
    encoded = Encoder(tiny_tokenizer, ends=[2])(example())
    prompt = encoded.prompt
    assert list(prompt.ids) == tiny_tokenizer.encode(example().prompt)
    assert tiny_tokenizer.decode(prompt.ids[: prompt.n_context]) == "the cat sat on a mat. "
    assert not encoded.cut and encoded.bos == 0 and prompt.ends == (2,)


def test_the_parts_of_a_prompt_have_names(tiny_tokenizer, chatty):
    said = {"context": "the cat sat on a mat. ", "question": "Question: where?"}
    for tokenizer, template in ((tiny_tokenizer, ""), (chatty, "<s><user>")):
        prompt = Encoder(tokenizer, ends=[])(example(chat=True)).prompt
        found = {name: tokenizer.decode(prompt.ids[a:b]) for name, (a, b) in prompt.spans.items()}
        assert found == {"template": template, **said}
        assert prompt.spans["context"][1] == prompt.n_context
    cut = Encoder(tiny_tokenizer, ends=[], max_length=100)(example(context="the river in the north. " * 100)).prompt
    assert tiny_tokenizer.decode(cut.ids[slice(*cut.spans["question"])]) == "Question: where?"


def test_a_token_across_the_split_belongs_to_the_question(tiny_tokenizer):
    whole = tiny_tokenizer.encode("the")
    assert len(whole) == 1
    prompt = Encoder(tiny_tokenizer, ends=[])(example(context="mat th", question="e cat")).prompt
    assert tiny_tokenizer.decode(prompt.ids[: prompt.n_context]).strip() == "mat"
    assert tiny_tokenizer.decode(prompt.ids[prompt.n_context :]).strip() == "the cat"


def test_a_long_context_loses_its_middle_and_keeps_its_question(tiny_tokenizer):
    long = "".join(f"word {i} of the river. " for i in range(200))
    encoded = Encoder(tiny_tokenizer, ends=[], max_length=100)(example(context=long))
    text = tiny_tokenizer.decode(encoded.prompt.ids)
    assert encoded.cut and len(encoded.prompt.ids) <= 104
    assert text.startswith("word 0 of") and text.endswith("Question: where?")
    assert tiny_tokenizer.decode(encoded.prompt.ids[encoded.prompt.n_context :]) == "Question: where?"


def test_prompt_template_and_answer_fit_the_window(tiny_tokenizer, chatty):
    long = "the river in the north. " * 200
    for tokenizer in (tiny_tokenizer, chatty):
        for window in (64, 100, 333):
            encoded = Encoder(tokenizer, ends=[], max_length=10_000, window=window)(example(context=long))
            assert encoded.cut and window - 20 < len(encoded.prompt.ids) + 8 <= window


def test_a_question_without_room_for_context_is_an_error(tiny_tokenizer):
    with pytest.raises(ValueError, match="the question alone takes"):
        Encoder(tiny_tokenizer, ends=[], max_length=16)(example(question="where? " * 30))


def test_the_chat_template_is_put_around_the_prompt_where_the_task_wants_it(chatty):
    encoder = Encoder(chatty, ends=[])
    encoded = encoder(example(context="  the cat sat on a mat. "))
    assert chatty.decode(encoded.prompt.ids) == "<s><user>the cat sat on a mat. Question: where?</user><model>"
    assert chatty.decode(encoded.prompt.ids[: encoded.prompt.n_context]) == "<s><user>the cat sat on a mat. "
    assert encoded.bos == 1
    plain = encoder(example(chat=False))
    assert chatty.decode(plain.prompt.ids) == "the cat sat on a mat. Question: where?" and plain.bos == 0
    off = Encoder(chatty, ends=[], chat=False)(example())
    assert off.prompt.ids == plain.prompt.ids


def test_solved_examples_are_turns_of_the_conversation_and_part_of_what_is_compressed(chatty):
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = example(context="", question="Question: where?", shots=(("Question: who?", "the cat"),))
    prompt = Encoder(chatty, ends=[])(asked).prompt
    before = "<s><user>Question: who?<assistant>the cat<user>"
    assert chatty.decode(prompt.ids) == f"{before}Question: where?<assistant>"
    assert chatty.decode(prompt.ids[: prompt.n_context]) == before
    with pytest.raises(UserError, match="give the examples as text"):
        Encoder(chatty, ends=[], chat=False)(asked)


def test_options_reach_the_chat_template(chatty):
    chatty.chat_template = "{{ messages[0]['content'] }}{% if think %} think{% endif %}"
    encoded = Encoder(chatty, ends=[], chat_options={"think": True})(example())
    assert chatty.decode(encoded.prompt.ids).endswith("where? think")


def test_a_template_that_rewrites_its_turn_is_refused(chatty):
    chatty.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match=r"model\.chat=false"):
        Encoder(chatty, ends=[])(example())


@pytest.mark.parametrize("question", ["assistant", "user", "s", "m", "  model "])
def test_a_turn_whose_words_are_the_templates_own_is_found_all_the_same(chatty, question):
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] | trim }}</user>{% endfor %}<assistant>model m s"
    )
    encoder = Encoder(chatty, ends=[])
    text, _, split, _ = encoder.wrap(question, len(question) // 2)
    assert text == f"<s><user>{question.strip()}</user><assistant>model m s"
    before = len("<s><user>") - (len(question) - len(question.lstrip()))
    assert split == before + len(question) // 2


@pytest.mark.parametrize("special", ["<s> $A", "$A </s>", "<s> $A </s>", "<s> </s> $A <pad>", "$A"])
def test_what_a_tokenizer_puts_before_a_text_stays_and_what_it_puts_behind_it_goes(tiny_tokenizer, special):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    names = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=special, special_tokens=[(name, names[name]) for name in special.split() if name in names]
    )
    encoder = Encoder(tokenizer, ends=[2])
    before = [names[name] for name in special.split("$A")[0].split()]
    prompt = encoder(example()).prompt
    assert list(prompt.ids) == [*before, *tiny_tokenizer.encode(example().prompt)]
    plain = Encoder(tiny_tokenizer, ends=[2])(example()).prompt
    assert prompt.n_context == plain.n_context + len(before)
    assert encoder.opening == before and encoder.tokens().special == len(before)


def test_a_newline_ends_where_the_task_says_so(tiny_tokenizer):
    newline = tiny_tokenizer.encode("\n")[-1]
    assert Encoder(tiny_tokenizer, ends=[2])(example(stop_at_newline=True)).prompt.ends == tuple(sorted({2, newline}))


def test_a_sample_has_the_same_number_in_every_run_and_its_own(tiny_tokenizer):
    encoder = Encoder(tiny_tokenizer, ends=[])
    one, other = example(), Example("mat/1", "a", "b", [], 1)
    assert encoder(one).prompt.sample == encoder(one).prompt.sample != encoder(other).prompt.sample


def test_the_start_of_an_answer_follows_the_chat_template(chatty):
    asked = example(prefill=" A: the")
    encoder = Encoder(chatty, ends=[])
    text = chatty.decode(encoder(asked).prompt.ids)
    assert text.endswith("where?</user><model> A: the") and "A: the</user>" not in text
    assert Encoder(chatty, ends=[], chat=False)(asked).prompt.ids == chatty.encode(asked.prompt)


def test_a_prompt_of_the_longest_length_that_tasks_are_told_is_not_cut(tiny_tokenizer, chatty):
    for tokenizer in (tiny_tokenizer, chatty):
        encoder = Encoder(tokenizer, ends=[], max_length=80, window=90)
        tokens = encoder.tokens()
        room = tokens.longest - tokens.wrapper - 8
        words = "the cat sat " * 100
        context = tokens.decode(tokens.encode(words)[: room - tokens.count("Question: where?")])
        assert not encoder(example(context=context)).cut
        assert encoder(example(context=context + "the cat sat " * 12)).cut


LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}" + CHAT


def test_a_chat_template_that_never_ends_is_broken_off(chatty, monkeypatch):
    chatty.chat_template = LOOPS
    monkeypatch.setattr(time_limit, "TEMPLATE_S", 0.2)
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"chat template takes longer than 0\.2 seconds; model\.chat=false"):
        Encoder(chatty, ends=[])(example())
    with (
        pytest.raises(time_limit.TimeLimit, match=r"time_limit=0\.1 seconds"),
        time_limit.within(torch.nn.Identity(), 0.1),
    ):
        Encoder(chatty, ends=[])(example())
    assert time.perf_counter() - began < 30


def test_somebody_elses_timer_goes_on_after_a_template(chatty):
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    left = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        Encoder(chatty, ends=[])(example())
        limit = time.monotonic() + 20
        while not rang and time.monotonic() < limit:
            time.sleep(0.01)
        assert rang
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before)


def test_an_end_that_is_not_flagged_special_is_no_part_of_the_answer(tiny_tokenizer):
    end = tiny_tokenizer.encode(".")[-1]  # decodes to text of its own
    ids = [*tiny_tokenizer.encode("the north"), end]
    plain, ending = (Encoder(tiny_tokenizer, ends=ends) for ends in ([2], [2, end]))
    assert plain.text(ids) == plain.text([*ids, 2]) == "the north."
    assert ending.text(ids) == ending.text(ids[:-1]) == "the north"
