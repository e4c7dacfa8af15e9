"""Short prompts and long answers: walks, sums and codes against cases worked by hand, and answers that are begun."""

import random
import statistics

import pytest
import torch

from methods import load_method
from methods.core.errors import UserError
from runners.engine.generation import Prompt, generate
from runners.engine.generation import together as generate_together
from tasks.base import Example
from tasks.reasoning_decode import ReasoningDecode, chain, graphs, passcode
from tasks.tokens import Tokens
from tests.tiny import tiny_model

EDGES = [(0, 1), (0, 2), (1, 3), (2, 4)]
WORDS = Tokens(lambda text: [len(word) for word in text.split()], lambda ids: " ".join("w" * n for n in ids))


def task(**knobs) -> ReasoningDecode:
    made = ReasoningDecode(**knobs)
    made.fit(lambda: WORDS)
    return made


@pytest.mark.parametrize(
    ("steps", "node", "stack", "visited"),
    [
        (1, 1, [0, 1], [0, 1]),
        (2, 3, [0, 1, 3], [0, 1, 3]),
        (4, 0, [0], [0, 1, 3]),
        (5, 2, [0, 2], [0, 1, 2, 3]),
        (8, 0, [0], [0, 1, 2, 3, 4]),
        (9, None, [], [0, 1, 2, 3, 4]),
    ],
)
def test_a_walk_worked_by_hand(steps, node, stack, visited):
    state = list(graphs.walk(EDGES, 5))[steps]
    assert (state.node, list(state.stack), sorted(state.visited)) == (node, stack, visited)
    answer = graphs.solution(EDGES, steps)
    assert graphs.last_object(answer) == {"current_node": node, "stack": stack, "visited_nodes": visited}
    assert answer.count("\n") == steps and graphs.same(graphs.last_object(answer), str(state)) == 1


def test_graphs_are_connected_of_their_kind_and_trees_alike_by_label():
    degrees = []
    for i in range(40):
        rng = random.Random(i)
        n = rng.randint(3, 30)
        edges = graphs.tree(n, rng)
        assert len(edges) == n - 1 and len(list(graphs.walk(edges, n))) == 2 * n
        edges = graphs.sparse(n, rng)
        assert len(list(graphs.walk(edges, n))) == 2 * n and all(a < b for a, b in edges)
        if n > 4:
            assert len(edges) == len(set(edges)) == 2 * n
            degrees.append(statistics.fmean(n - 1 in edge for edge in edges))
    # of the 16 trees on four labels, each as often as any other: half a hundred times in 800, give or take four sigma
    rng, found = random.Random(0), {}
    for _ in range(800):
        one = tuple(sorted(tuple(sorted(edge)) for edge in graphs.tree(4, rng)))
        found[one] = found.get(one, 0) + 1
    assert len(found) == 16 and all(abs(n - 50) < 4 * (800 * 15 / 256) ** 0.5 for n in found.values())


def test_every_number_of_steps_comes_as_often_as_any_other():
    found = graphs.numbers_of_steps(70, (20, 50), 42)
    counts = [found.count(s) for s in range(20, 51)]
    assert sorted(set(counts)) == [2, 3] and counts.count(3) == 70 - 2 * 31
    samples = [*graphs.examples(31, (20, 50), (20, 30), 42)]
    assert {one.tags["steps"] for one in samples} == set(range(20, 51))
    for one in samples:
        assert 2 * one.tags["nodes"] - 1 >= one.tags["steps"] and one.max_new_tokens == 64 * one.tags["steps"] + 1024
    assert {one.tags["graph"] for one in samples} == {"tree", "sparse"}


RIGHT = '{"current_node": 2, "stack": [0, 2], "visited_nodes": [0, 1, 2, 3]}'


@pytest.mark.parametrize(
    ("text", "score", "official"),
    [
        (f"Analysis: ... Answer: {RIGHT}", 1, 1),
        (RIGHT, 0, 1),  # no Answer: the released grader takes the whole text
        (f"Answer: ```json\n{RIGHT}\n``` which is right", 1, 1),
        (f'Answer: {{"current_node": 9}} no, Answer: {RIGHT}', 1, 0),  # it takes the first
        (f"Answer: {RIGHT} or {RIGHT.replace('[0, 2]', '[2, 0]')}", 0, 1),  # a stack has an order
        ("Answer: " + RIGHT.replace("[0, 1, 2, 3]", "[3, 2, 1, 0]"), 1, 1),  # a set has none
        ("Answer: " + RIGHT.replace("2,", '"2",', 1), 0, 0),
        ("Answer: " + RIGHT.replace("[0, 1,", "[0, true,"), 0, 0),
        ("Answer: {current_node: 2}", 0, 0),
        ("", 0, 0),
    ],
)
def test_answers_are_read_from_the_end_and_by_the_released_grader(text, score, official):
    made = task(subset="dfs", samples=1)
    example = Example("dfs/0", "", "", [RIGHT], 9, {"subset": "dfs", "category": "dfs"})
    assert made.score(example, text) == score
    (line,) = made.remarks([(example, {"prediction": text}, {})])
    assert line.endswith(f"gives {100 * official:.2f}")


def test_a_chain_worked_by_hand_and_its_box():
    steps = [("+", 15), ("x", 3), ("-", 8), ("+", 41), ("x", 2)]
    assert chain.results(7, steps) == [22, 66, 58, 99, 198]
    assert chain.apply(5, "-", 8) == 997 and chain.apply(500, "x", 4) == 0
    assert chain.solution(7, steps).endswith("99\n198\n\\boxed{198}")
    assert chain.score("22\n\\boxed{7} no \\boxed{ 198 }", "198") == 1
    assert chain.score("198", "198") == chain.score("\\boxed{x}", "198") == 0
    assert "1. + 15\n2. x 3" in chain.prompt(7, steps)
    first, operations = chain.draw(64, random.Random(1))
    assert len(operations) == 64 and 0 <= first < 1000 and {sign for sign, _ in operations} == {"+", "-", "x"}


def test_a_code_stands_so_many_tokens_before_it_is_asked_for():
    made = task(subset="passcode", samples=3, distances=[40, 400])
    for example in made.examples():
        before, _, behind = example.begins.partition(f"the passcode is {example.answers[0]}.")
        if example.tags.get("control"):
            assert not behind and example.tags["category"] == "passcode without"
            continue
        gap = WORDS.count(behind.removesuffix(passcode.ASKED))
        assert example.tags["distance"] - 40 < gap <= example.tags["distance"] and WORDS.count(before) <= 64 + 3
        assert example.begins.endswith("The passcode was") and len(example.answers[0]) == 5
    assert len(made.examples()) == 2 * (3 + passcode.CONTROLS)
    rows = made.summarize([(one, 0.0 if one.tags.get("control") else 1.0) for one in made.examples()])
    assert {row.score for row in rows if "without" not in row.name} == {100}  # controls count in no average
    assert (
        passcode.score(" 01234. 5", "01234") == 1 and passcode.score(" 1234", "01234") == passcode.score("", "1") == 0
    )


def test_samples_are_the_same_every_time_and_others_for_another_seed():
    knobs = {"samples": 2, "operations": [8], "distances": [40]}
    keys = [[one.key for one in task(**knobs, data_seed=seed).examples()] for seed in (42, 42, 43)]
    assert keys[0] == keys[1] and not set(keys[0]) & set(keys[2])
    assert task(**knobs).name == "reasoning_decode-mini"


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"steps": [20, 60]}, "task.steps=[20, 60]: a walk over 30 nodes has 59 steps"),
        ({"steps": [5]}, "task.steps=[5]; give the least and the most"),
        ({"operations": []}, "task.operations=[]; give whole numbers of 1 or more"),
        ({"subset": "bfs"}, "task.subset=bfs is unknown here"),
        ({"samples": 0}, "task.samples=0; give a whole number, 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_named(knobs, said):
    with pytest.raises(UserError, match="reasoning_decode: ") as error:
        ReasoningDecode(**knobs)
    assert said in str(error.value)


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_what_an_answer_begins_with_is_fed_as_though_it_had_been_generated(protocol):
    """The model's own first tokens, given: the rest of the answer, and what is held, are as without them."""
    model = tiny_model("llama")
    ids = torch.randint(1, 97, (30,), generator=torch.Generator().manual_seed(3)).tolist()
    method = load_method("h2o", budget=0.5)
    (plain,), cache, _ = generate(model, method, [Prompt(ids, 20, 12)], protocol)
    (begun,), other, _ = generate(model, method, [Prompt(ids, 20, 7, begins=tuple(plain.ids[:5]))], protocol)
    assert begun.ids == plain.ids[5:] and len(begun.ids) == 7
    for one, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(one.inner.store.pos, theirs.inner.store.pos)
    assert other.report().held_end == cache.report().held_end
    # in a group, two rows at a time
    prompts = [Prompt(ids, 20, 7, begins=tuple(plain.ids[:5])), Prompt(ids[5:], 10, 7, begins=tuple(plain.ids[:5]))]
    (shared, alone) = generate_together(model, [method, load_method("full")], prompts, protocol)
    assert shared.answers[0].ids == plain.ids[5:] and len(alone.answers[1].ids) == 7


def test_an_example_without_a_beginning_has_the_key_that_it_had():
    example = Example("a", "context", "question", ["x"], 5, {"subset": "s", "category": "c"})
    assert example.key == "79bb962d3805f7f1"
    assert Example("a", "context", "question", ["x"], 5, example.tags, begins="b").key != example.key
