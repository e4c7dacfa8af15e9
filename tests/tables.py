"""Tables of bits for a random model, as a search writes them."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from methods.core import artefacts
from methods.kvtuner import MODES, Pair, Table, nominal_bits, table_yaml


def tables_for(model: PreTrainedModel, place: Path, mode: str, *tables: Table, **card: Any) -> Path:
    """Write the tables and their card where `place` is one of the artefacts' places; card: entries that differ."""
    folder = place / "kvtuner" / artefacts.model_id(model) / mode
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        (folder / f"C{nominal_bits(table):.2f}.yaml").write_text(table_yaml(table))
    told = {"objective": "score", "model": artefacts.identity(model), **card}
    (folder / "card.json").write_text(json.dumps(told))
    return folder


def some_tables(model: PreTrainedModel, place: Path) -> None:
    """Three tables for each mode, with layers that differ."""
    layers = range(model.config.num_hidden_layers)
    for mode in MODES:
        rich, middle, poor = (
            tuple(pairs[layer % 2] for layer in layers)
            for pairs in ((Pair(8, 8), Pair(8, 4)), (Pair(8, 4), Pair(4, 4)), (Pair(4, 2), Pair(2, 2)))
        )
        tables_for(model, place, mode, rich, middle, poor)
