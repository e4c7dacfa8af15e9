"""dfs: where a depth-first walk over a graph stands after so many steps.

One step moves to the smallest neighbour of the stack's top that has not been visited, or else takes the top off. A walk
over n nodes has 2n - 1 steps; the last empties the stack.
"""

from __future__ import annotations

import heapq
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.base import Example

PROMPT = """\
A connected graph without directions has the nodes 0 to {last}. Its edges are {edges}.

A depth-first walk begins at node 0: it is the current node, it has been visited, and it is alone on the stack. Every \
step looks at the node on top of the stack. If it has a neighbour that has not been visited, the step moves to the \
smallest one, marks it as visited and puts it on top of the stack. If it has none, the step takes it off the stack. \
The current node is the one on top of the stack, or null once the stack is empty.

Which node is the current one after {steps} steps, what is on the stack, from the bottom up, and which nodes have been \
visited? Write one line per step below "Analysis:", then "Answer:" and one JSON object with the keys current_node, \
stack and visited_nodes.

Analysis:
"""
REWIRED = 0.1  # of the edges of a sparse graph
KEYS = ("current_node", "stack", "visited_nodes")


@dataclass(frozen=True)
class State:
    """Where a walk stands: the current node (None: the stack is empty), the stack from the bottom, visited in order."""

    node: int | None
    stack: tuple[int, ...]
    visited: tuple[int, ...]

    def __str__(self) -> str:
        return json.dumps(dict(zip(KEYS, (self.node, list(self.stack), sorted(self.visited)))))


def walk(edges: Sequence[tuple[int, int]], n: int, start: int = 0) -> Iterator[State]:
    """The states of a walk over n nodes, the one before the first step included."""
    near: list[list[int]] = [[] for _ in range(n)]
    for a, b in edges:
        near[a].append(b)
        near[b].append(a)
    stack, visited = [start], [start]
    yield State(start, (start,), (start,))
    while stack:
        fresh = [node for node in near[stack[-1]] if node not in visited]
        if fresh:
            stack.append(min(fresh))
            visited.append(stack[-1])
        else:
            stack.pop()
        yield State(stack[-1] if stack else None, tuple(stack), tuple(visited))


def tree(n: int, rng: random.Random) -> list[tuple[int, int]]:
    """A tree, all labelled trees of n nodes equally likely: a Pruefer sequence is drawn and decoded."""
    if n < 3:
        return [(0, 1)][: n - 1]
    sequence = [rng.randrange(n) for _ in range(n - 2)]
    degree = [1 + sequence.count(node) for node in range(n)]
    leaves = [node for node in range(n) if degree[node] == 1]
    edges = []
    for node in sequence:
        leaf = heapq.heappop(leaves)
        edges.append((leaf, node))
        degree[node] -= 1
        if degree[node] == 1:
            heapq.heappush(leaves, node)
    return [*edges, (heapq.heappop(leaves), heapq.heappop(leaves))]


def sparse(n: int, rng: random.Random) -> list[tuple[int, int]]:
    """A connected graph of Watts and Strogatz: a ring with four neighbours each, a tenth of the edges led elsewhere."""
    while True:
        edges = {frozenset((i, (i + d) % n)) for d in (1, 2) for i in range(n) if i != (i + d) % n}
        for d in (1, 2):
            for i in range(n):
                old = frozenset((i, (i + d) % n))
                free = [j for j in range(n) if j != i and frozenset((i, j)) not in edges]
                if old in edges and free and rng.random() < REWIRED:
                    edges.remove(old)
                    edges.add(frozenset((i, rng.choice(free))))
        found = [(min(edge), max(edge)) for edge in edges]
        if len(list(walk(found, n))) == 2 * n:  # all nodes are reached
            return found


def numbers_of_steps(count: int, steps: Sequence[int], seed: int) -> list[int]:
    """The steps of so many items, every number from `steps[0]` to `steps[1]` as often as any other.

    The numbers are shuffled, and the first of them have one more where they do not come out even.
    """
    values = list(range(steps[0], steps[1] + 1))
    random.Random(f"{seed}/dfs/steps").shuffle(values)
    each, more = divmod(count, len(values))
    return [value for i, value in enumerate(values) for _ in range(each + (i < more))]


def examples(
    count: int, steps: Sequence[int], nodes: Sequence[int], seed: int, most: int | None = None
) -> Iterator[Example]:
    """Items of dfs."""
    for i, s in enumerate(numbers_of_steps(count, steps, seed)):
        edges, kind = graph(s, nodes, random.Random(f"{seed}/dfs/{i}"))
        n = 1 + max(max(edge) for edge in edges)
        state = list(walk(edges, n))[s]
        tags = {"subset": "dfs", "category": "dfs", "steps": s, "nodes": n, "graph": kind}
        yield Example(f"dfs/{i}", "", prompt(edges, s), [str(state)], most or 64 * s + 1024, tags)


def graph(steps: int, nodes: Sequence[int], rng: random.Random) -> tuple[list[tuple[int, int]], str]:
    """The edges of a graph whose walk has so many steps or more, in order, and its kind."""
    n = rng.randint(max(nodes[0], (steps + 2) // 2), nodes[1])
    kind = rng.choice(("tree", "sparse"))
    return sorted((min(edge), max(edge)) for edge in (tree if kind == "tree" else sparse)(n, rng)), kind


def prompt(edges: Sequence[tuple[int, int]], steps: int) -> str:
    """What is asked of a graph."""
    listed = ", ".join(f"{a}-{b}" for a, b in edges)
    return PROMPT.format(last=max(max(edge) for edge in edges), edges=listed, steps=steps)


def solution(edges: Sequence[tuple[int, int]], steps: int) -> str:
    """The whole answer, as a model is taught it: a line per step, then the object."""
    states = list(walk(edges, 1 + max(max(edge) for edge in edges)))[: steps + 1]
    lines = [f"{j}: {_said(state)}" for j, state in enumerate(states[1:], start=1)]
    return "\n".join([*lines, f"Answer: {states[-1]}"])


def _said(state: State) -> str:
    """A step's line: where it has led, and the stack."""
    return f"{'null' if state.node is None else state.node}, stack {' '.join(map(str, state.stack)) or 'empty'}"


def same(found: dict[str, Any] | None, answer: str) -> float:
    """1 if node, stack in its order and visited nodes as a set are those of the answer, all of them whole numbers."""
    if found is None:
        return 0.0
    node, stack, visited = (found.get(key) for key in KEYS)
    right = json.loads(answer)
    if not (node is None or _whole(node)) or not (isinstance(stack, list) and isinstance(visited, list)):
        return 0.0
    if not all(map(_whole, [*stack, *visited])):
        return 0.0
    told = (node, stack, set(visited))
    return float(told == (right["current_node"], right["stack"], set(right["visited_nodes"])))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object behind the last "Answer:" that can be read; None where there is none."""
    _, found, answer = text.rpartition("Answer:")
    objects = list(_objects(answer)) if found else []
    return objects[-1] if objects else None


def first_object(text: str) -> dict[str, Any] | None:
    """As the released grader: the whole text, else the first object with a current node, else from { to the last }."""
    whole = _read(text)
    if whole is not None:
        return whole
    for one in _objects(text):
        if "current_node" in one:
            return one
    begin, end = text.find("{"), text.rfind("}")
    return _read(text[begin : end + 1]) if 0 <= begin < end else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Flat objects, from left to right."""
    for match in re.finditer(r"\{[^{}]*\}", text):
        if (one := _read(match[0])) is not None:
            yield one


def _read(text: str) -> dict[str, Any] | None:
    try:
        one = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return one if isinstance(one, dict) else None
