"""lm_eval-mini: questions on documents with four choices each, as rows and as task files that lm_eval itself reads."""

from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundles import write_rows
from tasks.documents import KINDS, Pool

SEED = 70423
CHOICES = 4
# task: kind of document, settings, questions, characters from and to
SPLITS: dict[str, tuple[str, dict[str, Any], int, tuple[int, int]]] = {
    "facts": ("facts", {"most": 2}, 24, (900, 3600)),
    "list": ("table", {}, 24, (500, 2000)),
}
TASK = """task: {name}
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def rows(name: str) -> list[dict[str, Any]]:
    """The questions of one task, from short to long documents; the wrong choices are other values of the document."""
    kind, knobs, count, (low, high) = SPLITS[name]
    rows: list[dict[str, Any]] = []
    for i in range(count):
        rng = np.random.default_rng([SEED, list(SPLITS).index(name), i])
        size = low + (high - low) * i // (count - 1)
        document = KINDS[kind](Pool(rng, "held_out"), size, CHOICES, **knobs)
        values = [turn.value for turn in document.turns]
        assert len(set(values)) == CHOICES, "a document of this size has enough values of its own"
        order = rng.permutation(CHOICES)
        rows.append(
            {
                "context": document.opening,
                "question": f"\n\n{document.turns[0].question}",
                "choices": [values[at] for at in order],
                "gold": int(np.flatnonzero(order == 0)[0]),
            }
        )
    return rows


def write(folder: Path) -> None:
    """A file of rows and a task file per kind of document."""
    for name in SPLITS:
        write_rows(folder, name, rows(name))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name), newline="\n", encoding="utf-8")
