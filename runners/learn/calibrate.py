"""Make a method's artefact for a model: rows of text through the model, what the method learns from them, a card."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from methods import build_method
from methods.core import artefacts
from methods.core.contract import Method
from methods.core.errors import UserError
from methods.core.reading import read_bytes, read_text
from methods.core.typed import Count, Folder
from runners.base import Runner
from runners.model_setup import ModelSetup, plain
from runners.records.record import check_writable
from runners.report import run_table as show
from runners.settings import auto
from tasks.data.sources import parse_rows
from tasks.documents import KINDS, Pool, prose, prose_hash, sentences
from tasks.documents.pools import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_KEYS = ("text", "context")  # of a JSON line; the first that it has
PIECE = 1500  # characters of one generated document or run of prose inside a row


@dataclass
class Calibrate(Runner):
    """The runner behind `python run.py runner=calibrate method=NAME`.

    documents, tokens: rows, and tokens per row.  data: null for generated documents and prose, or a file of text.
    out: folder of the artefact, null for the one where the method looks.  options: what else the method's `calibrate`
    takes, by name.
    """

    documents: Count = 20
    tokens: int = 2048
    data: str | None = None
    out: Folder | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for key, least in (("documents", 1), ("tokens", 2)):
            if not isinstance(value := getattr(self, key), int) or value < least:
                raise UserError(f"runner.{key}={value}: give a whole number, {least} or more")

    def run(self, cfg: DictConfig) -> int:
        """Makes the artefact, says how it went, returns 0. Raises UserError for what the user gave and cannot work."""
        name = HydraConfig.get().runtime.choices["method"]
        method = build_method(name, plain(cfg.method))
        options = self._options(method)
        at = Path(self.out).expanduser() if self.out else None
        if at:
            check_writable(at, "runner.out")
        show.source(auto.told())
        setup = ModelSetup(cfg)
        checkpoint = setup.checkpoint
        length = min(self.tokens, checkpoint.window or self.tokens)
        rows, source = self.rows(setup.tokenizer, length, cfg.seed)
        model = setup.model
        show.say(f"{name}: {len(rows)} rows of {length} tokens, {source['text']}")
        calibration = method.calibrate(model, rows, seed=cfg.seed, **options)
        facts = {
            **calibration.facts,
            **source,
            "documents": len(rows),
            "tokens": length,
            "seed": cfg.seed,
            "dtype": setup.dtype_name,
            "checkpoint": checkpoint.weights,
            "made_with": {package: metadata.version(package) for package in ("torch", "transformers")},
        }
        try:
            path = artefacts.save(calibration.method, calibration.name, model, calibration.tensors, facts, at=at)
        except OSError as error:
            raise UserError(
                f"runner.out={self.out or 'null'}: {error.filename or at} cannot be written ({error.strerror}); "
                "give a folder that can"
            ) from error
        for line in calibration.report:
            show.say(line)
        show.say(f"artefact: {artefacts.shown(path)}")
        return 0

    def rows(self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Rows of token ids [1, length], and what the card says of the text. Raises UserError if it is too short."""
        if self.data is None:
            texts = ("".join(generated(seed, i, length)) for i in range(self.documents))
            rows = [torch.tensor([tokenizer(text, verbose=False).input_ids[:length]]) for text in texts]
            return rows, {"text": "generated documents and prose", "prose": prose_hash("train")}
        path = Path(self.data).expanduser()
        if not path.is_file():
            raise UserError(f"runner.data={self.data}: no such file; give a .txt or .jsonl file of text")
        rows = []
        for text in _texts(path):
            ids = tokenizer(text, verbose=False).input_ids
            # long texts give several rows, what is shorter than a row gives none
            rows += [torch.tensor([ids[at : at + length]]) for at in range(0, len(ids) - length + 1, length)]
            if len(rows) >= self.documents:
                break
        if not rows:
            raise UserError(f"runner.data={self.data}: no text has runner.tokens={length} tokens; ask for fewer")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return rows[: self.documents], {"text": path.name, "sha256_of_text": digest}

    def _options(self, method: Method) -> dict[str, Any]:
        """The options, checked by name against what the method's `calibrate` takes."""
        takes = set(inspect.signature(method.calibrate).parameters) - {"model", "rows", "seed", "options"}
        options = plain(self.options) or {}
        for key in options:
            if key not in takes:
                names = ", ".join(sorted(takes)) or "none"
                raise UserError(f"runner.options.{key}={options[key]}: {method.name} takes {names}")
        return options


def generated(seed: int, row: int, length: int, split: Split = "train") -> Iterator[str]:
    """Text of more than `length` tokens: documents of every kind with their questions, in turn with prose."""
    rng = np.random.default_rng([seed, row])
    kinds, paragraphs = sorted(KINDS), prose(split)
    written = 0
    # tokenizers make about four characters of this text into a token; twice as many are enough for all of them
    while written < 8 * length:
        document = KINDS[kinds[int(rng.integers(len(kinds)))]](Pool(rng, split, sentences(split)), PIECE, 8)
        asked = "\n\n".join(turn.question + turn.answer for turn in document.turns)
        at = int(rng.integers(len(paragraphs) - 8))
        for text in (f"{document.opening}\n\n{asked}\n\n", "\n\n".join(paragraphs[at : at + 8])[:PIECE] + "\n\n"):
            yield text
            written += len(text)


def _texts(path: Path) -> Iterator[str]:
    """The texts of a .jsonl file, one per line, or of a text file, which is one."""
    if path.suffix != ".jsonl":
        yield read_text(path)
        return
    for number, row in enumerate(parse_rows(read_bytes(path), f"runner.data={path}"), 1):
        text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
        if text is None:
            raise UserError(f"runner.data={path}: row {number} has no {' and no '.join(TEXT_KEYS)}")
        yield text
