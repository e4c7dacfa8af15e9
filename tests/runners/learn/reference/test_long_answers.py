"""Documents with long answers: what a model is taught is what the task asks and grades."""

import re

from runners.learn.reference.recall import held_out_document
from tasks.reasoning_decode import chain, graphs, passcode


def document(ability: str) -> tuple[str, str]:
    made = held_out_document(ability, 300, 1, [1, 2, 3])
    (turn,) = made.turns
    return made.prompt(), turn.answer


def test_a_walk_is_the_tasks_own():
    prompt, answer = document("walks of 10")
    assert prompt.endswith("\n\nAnalysis:") and answer.count("\n") == 11
    edges = [(int(a), int(b)) for a, b in re.findall(r"(\d+)-(\d+)", prompt)]
    states = list(graphs.walk(edges, 1 + max(map(max, edges))))
    assert graphs.prompt(edges, 10) == f"{prompt}\n"
    assert graphs.same(graphs.last_object(answer), str(states[10])) == 1


def test_sums_are_the_tasks_own():
    prompt, answer = document("sums of 8")
    first = int(re.search(r"Begin with (\d+)", prompt)[1])
    operations = [(sign, int(number)) for sign, number in re.findall(r"^\d+\. ([-+x]) (\d+)$", prompt, re.M)]
    assert chain.prompt(first, operations) == prompt
    assert len(operations) == 8 and chain.score(answer, str(chain.results(first, operations)[-1])) == 1


def test_a_code_stands_before_what_asks_for_it():
    prompt, answer = document("codes")
    code = re.search(r"passcode is (\d{5})", prompt)[1]
    assert prompt.startswith(passcode.PROMPT) and prompt.endswith(passcode.ASKED) and passcode.score(answer, code) == 1
