"""lm_eval's requests of a task's items, and the samples that they are here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from os.path import commonprefix
from typing import Any

from methods.core.errors import UserError
from tasks.base import Choice, Example

MOST_NEW = 256  # what lm_eval's model of the Hugging Face library takes where a task names nothing
MOST_NEW_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts there


@contextmanager
def compiled_once() -> Iterator[None]:
    """While it lasts, lm_eval compiles each of its templates once, where it would for every item and choice."""
    from lm_eval.utils import env

    compile_one = env.from_string
    env.from_string = cache(compile_one)
    try:
        yield
    finally:
        env.from_string = compile_one


def requests_of(name: str, task: Any, data: str, limit: int | None, chat: bool) -> Iterator[tuple[str, list[Any]]]:
    """Each item's id and requests, made in lm_eval's own order, on which the drawn examples depend.

    data, limit, chat: of tasks.lm_eval.task.LmEval. Raises UserError for an item that cannot be asked.
    """
    shots = int(task.config.num_fewshot or 0)
    for i, doc in task.doc_iterator(limit=limit):
        if chat and task.doc_to_prefix(doc):
            raise UserError(
                f"lm_eval: task.chat=true: {name} begins the answer itself, which is not done here inside a "
                "template; give task.chat=false"
            )
        try:
            prompt = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        except (ValueError, AssertionError) as error:  # too few rows; none
            raise UserError(
                f"lm_eval: task.shots={shots}: task.data={data} has too few rows that {name} could draw "
                "its examples from; add its train.jsonl, or give task.shots=0"
            ) from error
        except Exception as error:
            raise unasked(f"{name}/{i}", error) from error
        try:
            requests = task.construct_requests(doc=doc, ctx=prompt, metadata=(name, i, 1), apply_chat_template=chat)
        except Exception as error:
            raise unasked(f"{name}/{i}", error) from error
        yield f"{name}/{i}", requests if isinstance(requests, list) else [requests]


def example_of(id: str, name: str, task: Any, requests: Sequence[Any], chat: bool, stride: int | None) -> Example:
    """An item's sample, cut after its solved examples, or after the document in its field `context`.

    requests: its own.  chat, stride: of tasks.lm_eval.task.LmEval. Raises UserError for an item that has no such form.
    """
    try:
        return _example(id, name, task, requests, chat, stride)
    except UserError:
        raise
    except Exception as error:
        raise unasked(id, error) from error


def _example(id: str, name: str, task: Any, requests: Sequence[Any], chat: bool, stride: int | None) -> Example:
    doc = requests[0].doc
    item = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
    prompts = [one.args[0] for one in requests]
    document = doc.get("context")
    if isinstance(document, str) and document.strip() and document in prompts[0]:
        examples = prompts[0][: prompts[0].rfind(document) + len(document)]
    else:
        examples = _before(prompts[0], item[0] if isinstance(item, list) else item)
    if not all(prompt.startswith(examples) for prompt in prompts):
        examples = ""  # a prompt that leaves the context out, as for the likelihood without it
    rest = [prompt[len(examples) :] for prompt in prompts]
    tags: dict[str, Any] = {"subset": name, "category": name, "version": str(task.VERSION)}
    if requests[0].request_type == "generate_until":
        limits = [requests[0].args[1].get(key) for key in MOST_NEW_KEYS]
        most = next((int(limit) for limit in limits if limit is not None), MOST_NEW)
        answers = [str(task.doc_to_target(doc))]
        return Example(id, examples, rest[0], answers, most, tags, chat=chat, stop=stops_of(requests[0]))
    texts = [one.args[1] for one in requests]
    gold = _gold(task, doc)
    if gold is not None:
        # a task that also asks how likely a choice is without its prompt has more requests than choices
        tags |= {"gold": gold, "n": len(task.doc_to_choice(doc))}
    choices = tuple(Choice(*one) for one in zip(rest, texts))
    shared = commonprefix(rest)  # noqa: RUF071 of characters
    answers = texts[:1] if gold is None else [texts[gold]]
    return Example(id, examples, shared, answers, 0, tags, chat=chat, choices=choices, stride=stride)


def stops_of(request: Any) -> tuple[str, ...]:
    """The strings that end a generated answer."""
    until = request.args[1].get("until") or []
    return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)


def unasked(id: str, error: Exception) -> UserError:
    """Of an item that lm_eval's own code cannot make a question of."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"lm_eval: {id}: its row is not one that the task can ask ({text})")


def _before(prompt: str, item: str) -> str:
    """What stands before the item in a prompt; a description that both begin with belongs to it."""
    if prompt == item:
        return ""
    at = 0
    while at < min(len(prompt), len(item)) and prompt[-1 - at] == item[-1 - at]:
        at += 1
    rest = prompt[len(prompt) - at :]
    return prompt[: len(prompt) - len(rest.lstrip("\n"))]


def _gold(task: Any, doc: Mapping[str, Any]) -> int | None:
    """The place of the right choice, where there is exactly one."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices, gold = task.doc_to_choice(doc), task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None
