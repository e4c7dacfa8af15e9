"""fewshot-real: choices behind solved examples, as rows and as task files that lm_eval itself reads."""

from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundles import write_rows
from tasks.real.longbench import histories, in_turn
from tasks.real.sources import Sources

NAME = "region_of_history"
COUNT = 66
TASK = """task: {name}
dataset_path: json
training_split: train
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {shots}
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nRegion:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def rows(sources: Sources, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Solved examples, one per region, and items of other countries; regions come equally often."""
    texts = histories(sources)
    labels = list(texts)
    drawn = in_turn(texts, np.random.default_rng([seed, 2]))
    found = [
        {"text": text, "choices": labels, "gold": labels.index(label)}
        for (label, text), _ in zip(drawn, range(len(labels) + COUNT))
    ]
    return found[: len(labels)], found[len(labels) :]


def write(folder: Path, sources: Sources, seed: int) -> None:
    """A folder of rows and a task file."""
    train, test = rows(sources, seed)
    (folder / NAME).mkdir(exist_ok=True)
    write_rows(folder / NAME, "train", train)
    write_rows(folder / NAME, "test", test)
    (folder / f"{NAME}.yaml").write_text(TASK.format(name=NAME, shots=len(train)), newline="\n", encoding="utf-8")
