"""longbench-mini: six subsets, one per LongBench category, in LongBench's record format.

The shapes follow LongBench, the texts and prompts are our own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tasks.bundles import write_rows
from tasks.documents import KINDS, Document, Pool

SEED = 52610
COUNT = 22  # samples per subset
SHORTEST, LONGEST = 560, 3300  # tokens of a context, about


@dataclass(frozen=True)
class Subset:
    """chars: characters per token of the reference tokenizer in contexts of this kind."""

    kind: str
    category: str
    metric: str
    max_new_tokens: int
    chars: float
    first_line: bool = False
    knobs: dict[str, Any] = field(default_factory=dict)


SUBSETS = {
    "report_qa": Subset("facts", "single-doc QA", "f1", 16, 3.4, knobs={"filler": 0.5, "most": 1}),
    "passages_qa": Subset("bridge", "multi-doc QA", "f1", 32, 4.2, knobs={"restate": False}),
    "findings": Subset("findings", "summarization", "rouge_l", 64, 4.6),
    "kinds": Subset("labels", "few-shot", "class", 16, 2.75, first_line=True),
    "paragraph_search": Subset("entries", "synthetic", "retrieval", 16, 3.2),
    "module": Subset("code", "code", "edit_sim", 32, 2.6),
}


def records(name: str, count: int = COUNT) -> list[dict[str, Any]]:
    """The samples of one subset; fewer samples are the first ones of more."""
    subset, index = SUBSETS[name], list(SUBSETS).index(name)
    records = []
    for i in range(count):
        rng = np.random.default_rng([SEED, index, i])
        tokens = SHORTEST + (LONGEST - SHORTEST) * rng.random() ** 1.5  # shorter ones more often
        document = KINDS[subset.kind](Pool(rng, "held_out"), int(tokens * subset.chars), 1, **subset.knobs)
        records.append(
            {
                "input": document.turns[0].question,
                "context": document.context,
                "answers": [_reference(document, subset.metric)],
                "length": len(document.context.split()),
                "dataset": name,
                "language": "code" if subset.category == "code" else "en",
                "all_classes": list(document.classes) or None,
                "_id": f"{name}-{i:03d}",
            }
        )
    return records


def write(folder: Path, count: int = COUNT) -> None:
    """All subsets as JSON lines, and subsets.yaml with the prompt, metric and limits of each."""
    described = {}
    for name, subset in SUBSETS.items():
        write_rows(folder, name, records(name, count))
        head = KINDS[subset.kind](Pool(np.random.default_rng(0)), 100, 1).head
        described[name] = {
            "category": subset.category,
            "metric": subset.metric,
            "prompt": f"{head}\n\n{{context}}\n\n{{input}}",
            "max_new_tokens": subset.max_new_tokens,
            "first_line": subset.first_line,
        }
    (folder / "subsets.yaml").write_text(yaml.safe_dump(described, sort_keys=False), newline="\n", encoding="utf-8")


def _reference(document: Document, metric: str) -> str:
    turn = document.turns[0]
    if metric == "retrieval":
        return f"Paragraph {turn.value}"
    return turn.answer if metric == "edit_sim" else turn.value
