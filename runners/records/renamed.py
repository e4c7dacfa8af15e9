"""Code by other names: trees of the project that compute the same numbers, for all that their code's hashes differ.

`renamed.json` lists such trees, oldest first, each by the hashes of its modules. `benchmarks/renamed.py COMMIT` writes
it: it measures the committed experiments again and compares every sample's score with the one that is committed. A
record of the code of one of these trees is then a record of the last tree's, and nothing of it is computed again.
"""

import json
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("renamed.json")


def same_but_for_names(old: dict[str, str], new: dict[str, str]) -> bool:
    """Whether the modules of two `Code`s are the same, or stand in two of the listed trees, the newer in the last.

    A module of the user's own, or one edited since, stands in none of them, and has to be the same in both.
    """
    *earlier, last = [frozenset[str](), *_trees()]
    before, after = set(old.values()), set(new.values())
    return any(before - tree == after - last and before & tree for tree in earlier)


@cache
def _trees() -> list[frozenset[str]]:
    """The hashes of every module, by tree."""
    return [frozenset(tree["modules"]) for tree in json.loads(TABLE.read_text(encoding="utf-8"))["trees"]]
