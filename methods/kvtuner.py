"""KVTuner: every layer has its own bits for keys and its own for values, found offline.

Paper: Li et al. 2025, arXiv:2502.04420 (ICML 2025), sections 4 and 5.
Idea:  layers differ in how much coarse keys and coarse values change their output. A search over pairs of bits, one
       pair per layer, weighs the score of a task against the average number of bits; it is made once per model, and
       then running it is a table. How slots are packed is taken from others, in two modes: "kivi" (keys per channel,
       values per token, groups of 32, the newest up to 32 tokens unpacked) and "per_token" (one scale per head).
Here:  a block is packed once; the release unpacks and packs the whole cache again whenever 32 tokens have come, and
       stores every width in whole bytes. Where no table is named, the budget picks one of those searched for the
       model: the most bits whose codes, scales and unpacked tokens fit. At budget 1 nothing is packed. Tables by head
       are not read, unless all heads of a layer agree. Minima are stored as they are, in float16 (zero=int makes zero a
       grid point, as the release does). The prompt attends in full precision, as in the release
       (prefill_attends_dequantised=true: packed, as in the paper's search). A search is NSGA-II, as in the release (the
       paper: MOEA/D); the tables that ship for the reference model come from few samples of task=reasoning, with errors
       summed before they are divided (runner.relative=sums; the paper: each element); their cards name all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from methods.core import artefacts
from methods.core.contract import LayerCache, ModelSpec, Stage, Step
from methods.core.errors import UserError
from methods.core.reading import read_json, read_text
from methods.core.stores.codec import Codec, CodecCache
from methods.core.stores.quantized import QuantizedStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: bits that a table may name; 16 leaves keys or values as they are
BITS = (2, 4, 8, 16)
MODES = ("kivi", "per_token")
#: by mode, along which dimension the keys of a scale lie: tokens or channels
KEYS_ALONG = {"kivi": 2, "per_token": 3}
MAKE = "runner=tune"
CARD = "card.json"


class Pair(NamedTuple):
    """Bits of one layer's keys and values."""

    key: int
    value: int

    @property
    def bits(self) -> float:
        """Per element, keys and values being as many."""
        return (self.key + self.value) / 2

    def __str__(self) -> str:
        return f"KV{self.key}" if self.key == self.value else f"K{self.key}V{self.value}"


#: one pair per layer
Table = tuple[Pair, ...]


def nominal_bits(table: Table) -> float:
    """Average bits per element, scales left out, as the paper counts."""
    return sum(pair.bits for pair in table) / len(table)


@dataclass
class KVTuner(Codec):
    """Packs every layer with its own pair of bits; nothing is dropped.

    budget, bits, key_bits, value_bits: as in `Codec`; bits make all layers alike.
    mode: which of the model's tables to take, those of "kivi" or of "per_token"; `store` packs accordingly.
    table: the name of one of them, such as C3.25; or a YAML file; or {layer: {nbits_key: 4, nbits_value: 2}}; None: the
        budget picks. What is named is the request itself: budget is then 1.
    prefill_attends_dequantised: the prompt, too, attends to what is packed, as in the paper's search.
    """

    mode: str = "kivi"
    table: str | Mapping[Any, Any] | None = None
    prefill_attends_dequantised: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"KVTuner: method.mode={self.mode}; it is {' or '.join(MODES)}")
        if self.table is not None and (self.bits or self.key_bits):
            raise UserError(f"KVTuner: method.table={self.table} and method.bits: give one of them")
        super().__post_init__()
        self._check_store()
        if self.table is not None:
            self.budget = 1.0
        if isinstance(self.table, Mapping):
            parse_table(self.table, "method.table")

    def _check_store(self) -> None:
        """Raises UserError for a store of the other mode: the searched tables would be those of other errors."""
        along = self._store(Pair(4, 4)).schemes[0][0].dim
        if along != KEYS_ALONG[self.mode]:
            fits = next(mode for mode, dim in KEYS_ALONG.items() if dim == along)
            packs = {2: "keys per channel", 3: "keys per token"}[along]
            name = {"kivi": "kvtuner", "per_token": "kvtuner_per_token"}[self.mode]
            store = self.config()["store"]["_target_"]
            raise UserError(
                f"KVTuner: method.mode={self.mode}, and method.store={store} packs {packs}, which is "
                f"method.mode={fits}; give method={name}, which has the store of its mode"
            )

    @property
    def changes_prompt(self) -> bool:  # type: ignore[override]
        """A prompt that attends to packed keys and values has other hidden states."""
        return self.prefill_attends_dequantised

    def prepare(self, model: PreTrainedModel) -> list[Table]:
        """The tables to choose from, most bits first; none where nothing is to be packed by table."""
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if isinstance(self.table, Mapping):
            return [_fits(parse_table(self.table, "method.table"), layers, "method.table")]
        if isinstance(self.table, str) and self.table.endswith((".yaml", ".yml")):
            return [_fits(read_table(Path(self.table).expanduser()), layers, f"method.table={self.table}")]
        if self.table is None and (self.key_bits is not None or self.request.is_off):
            return []
        tables = searched_tables(model, self.mode, self.name)
        if self.table is None:
            return sorted(tables.values(), key=nominal_bits, reverse=True)
        if self.table not in tables:
            raise UserError(
                f"KVTuner: method.table={self.table}: no such table in mode {self.mode} for the model "
                f"{artefacts.model_id(model)}; there are {', '.join(tables)}, and a file's name ends in .yaml"
            )
        return [tables[self.table]]

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        """One per layer."""
        cache = _DequantisedPrompt if self.prefill_attends_dequantised else CodecCache
        return [cache(store) for store in self.stores(spec, prompt_len)]

    def stores(self, spec: ModelSpec, prompt_len: int | None) -> list[QuantizedStore]:
        """One per layer."""
        if not spec.prepared:
            pair = Pair(self.key_bits or 16, self.value_bits or 16)
            tables = [(pair,) * spec.n_layers]
        elif self.table is not None:
            tables = spec.prepared
        else:
            tables = [(Pair(16, 16),) * spec.n_layers, *spec.prepared]
        # of all layers, the schemes of every table: layers choose the same table
        choices = [[self._store(pair).schemes[0] for pair in layer] for layer in zip(*tables, strict=True)]
        budget = self.budget if len(tables) > 1 else None
        stores = []
        for layer, pairs in enumerate(zip(*tables, strict=True)):
            store = self._store(pairs[0], prompt_len)
            store.choose_with(choices, layer, budget)
            store.check(spec.head_dim)
            stores.append(store)
        return stores

    def effective_bits(self, table: Table, head_dim: int) -> float:
        """Average bits per element of long prompts: codes, scales and offsets, in a model of 16 bits."""
        n = 4096  # whole blocks, whatever the residual
        schemes = [scheme for pair in table for scheme in self._store(pair).schemes[0]]
        return sum(scheme.nbytes(n, head_dim, 2) for scheme in schemes) * 8 / (n * head_dim * len(schemes))

    def _store(self, pair: Pair, capacity: int | None = None) -> QuantizedStore:
        return self.store(key_bits=pair.key, value_bits=pair.value, capacity=capacity)


class _DequantisedPrompt(CodecCache):
    """Packs what a prompt brings before the prompt attends to it."""

    def append(self, step: Step) -> None:
        super().append(step)
        if step.stage in (Stage.MID_PROMPT, Stage.ENDS_PROMPT):
            self.store.pack(step)


def searched_tables(model: PreTrainedModel, mode: str, name: str = "kvtuner") -> dict[str, Table]:
    """The tables for a model in assets/kvtuner/MODEL/MODE, by name.

    name: of the method in conf/method that has this mode. Raises UserError, with the command that makes them, where
    there are none or they are another model's.
    """
    command = artefacts.command_for(name, model, MAKE)
    places = [folder / mode for folder in artefacts.folders("kvtuner", model)]
    folder = next((one for one in places if (one / CARD).is_file()), None)
    if folder is None:
        raise UserError(
            f"{name}: no tables for the model {artefacts.model_id(model)} at {artefacts.shown(places[0])}; "
            f"method.bits=4 and method.table=FILE.yaml need none; make them with {command}"
        )
    try:
        card = read_json(folder / CARD)
        made_for = dict(card["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{artefacts.shown(folder / CARD)}: is broken ({error}); make it again with {command}"
        ) from error
    # the authors' tables name no weights
    if not card.get("published"):
        wrong = artefacts.differences(made_for, artefacts.identity(model))
        if card.get("objective") != "score":
            wrong.append(f"they were chosen by {card.get('objective')}, which is no search for a score")
        if wrong:
            raise UserError(
                f"{name}: {artefacts.shown(folder)} does not fit the model {artefacts.model_id(model)}: "
                f"{'; '.join(wrong)}; make it for this model with {command}"
            )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return {
        path.stem: _fits(read_table(path), layers, str(artefacts.shown(path))) for path in sorted(folder.glob("*.yaml"))
    }


def read_table(path: Path) -> Table:
    """A table in the authors' format. Raises UserError where it cannot be read."""
    try:
        entries = yaml.safe_load(read_text(path))
    except (UserError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"KVTuner: {artefacts.shown(path)}: cannot be read: {reason}") from error
    return parse_table(entries, str(artefacts.shown(path)))


def parse_table(entries: Any, source: str) -> Table:
    """The table of {layer: {nbits_key: bits, nbits_value: bits}}; a level of heads between may be there.

    Raises UserError, naming `source`, for anything else.
    """
    if not isinstance(entries, Mapping) or not entries:
        raise UserError(f"KVTuner: {source}: give layers, each with nbits_key and nbits_value")
    by_layer = {_whole(layer): _pair(entry, f"{source}, layer {layer}") for layer, entry in entries.items()}
    if sorted(by_layer, key=str) != sorted(range(len(by_layer)), key=str):
        raise UserError(
            f"KVTuner: {source}: names the layers {', '.join(map(str, entries))}; give each from 0 on, once"
        )
    return tuple(by_layer[layer] for layer in range(len(by_layer)))


def table_yaml(table: Sequence[Pair]) -> str:
    """The table in the authors' format."""
    return "".join(f"{i}: {{nbits_key: {pair.key}, nbits_value: {pair.value}}}\n" for i, pair in enumerate(table))


def _pair(entry: Any, source: str) -> Pair:
    if isinstance(entry, Mapping) and entry and all(isinstance(of_head, Mapping) for of_head in entry.values()):
        pairs = {_pair(of_head, f"{source}, head {head}") for head, of_head in entry.items()}
        if len(pairs) > 1:
            raise UserError(f"KVTuner: {source}: heads have different bits; tables by layer are read only")
        return pairs.pop()
    if not isinstance(entry, Mapping) or set(entry) != {"nbits_key", "nbits_value"}:
        raise UserError(f"KVTuner: {source}: is {entry}; give nbits_key and nbits_value")
    if not {entry["nbits_key"], entry["nbits_value"]} <= set(BITS):
        raise UserError(f"KVTuner: {source}: is {dict(entry)}; bits are {', '.join(map(str, BITS))}")
    return Pair(entry["nbits_key"], entry["nbits_value"])


def _whole(layer: Any) -> Any:
    return int(layer) if isinstance(layer, str) and layer.isdigit() else layer


def _fits(table: Table, layers: int, source: str) -> Table:
    if len(table) != layers:
        raise UserError(f"KVTuner: {source}: has {len(table)} layers, the model has {layers}")
    return table
