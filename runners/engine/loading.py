"""Finding a checkpoint in a folder, in a GGUF file or on the hub, and loading its model and tokenizer.

Weights are safetensors, or made into such from a GGUF file; no foreign code runs.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.core.errors import UserError
from methods.core.home.hashes import sha256
from methods.core.reading import read_json
from methods.core.typed import Count, Whole, conform, shown
from runners.engine.model_files import DATE, asks_for_the_date, dated, deciding, hash_of, weight_files
from runners.engine.sources import fetched, first_line, folders, gguf, hub

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
# LongBench leaves about this many tokens of a model's window to the template and the answer
MARGIN = 500
INITS = ("pretrained", "random")
CHECKS = ("auto", "off")
Ends = Whole | list[Whole] | None  # token ids
RANDOM_SEED = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    path: as typed. folder: where it lies. commit, revision: of the hub's repository, and what stood for it as typed;
    None for a folder.
    random: of the folder only the configuration is used, and the weights are drawn; resize: settings of the
    configuration that are changed then, as JSON.  check: whether binding first tries out a small copy; it is no part of
    what the checkpoint is.
    gguf: the file that `folder` was made of.  convert: whether weights of any size may be written for it.
    """

    path: str
    folder: Path
    commit: str | None = None
    revision: str | None = None
    random: bool = False
    resize: str = "{}"
    check: bool = field(default=True, compare=False)
    gguf: Path | None = None
    convert: bool = field(default=False, compare=False)

    @property
    def source(self) -> Path:
        """What the user has of it: the folder, or the GGUF file."""
        return self.gguf or self.folder

    @cached_property
    def types(self) -> dict[str, float]:
        """The share of its weights that was stored in each type of GGUF; none of them for safetensors."""
        return gguf.card_of(self.folder)["types"] if self.gguf else {}

    @property
    def parameters(self) -> float:
        """How many weights it has, about: by the size of its files, at two bytes each."""
        if self.gguf:
            return float(gguf.card_of(self.folder)["elements"])
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) / 2

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; of a model of several parts, its text part laid over the rest."""
        config = read_json(self.folder / "config.json")
        text = config.get("text_config") or {}
        if not isinstance(text, dict):
            raise UserError(f"{self.folder / 'config.json'}: text_config={shown(text)}: a JSON object is needed")
        return {**config, **text, **json.loads(self.resize)}

    @property
    def name(self) -> str:
        """The folder or repository, without what stands above it; random weights say so."""
        if self.gguf:
            return self.gguf.stem
        name = os.path.basename(os.path.normpath(self.path if self.commit or self.random else self.folder))
        if not self.random:
            return name
        return f"{name}-random" if self.resize == "{}" else f"{name}-random-{self.weights[-6:]}"

    @property
    def location(self) -> str:
        """A hash of where it was looked for: other weights there are the same model, changed."""
        where = f"{self.path}@{self.revision}" if self.commit else str(self.source)
        return hashlib.sha256(where.encode()).hexdigest()[:8]

    @property
    def window(self) -> int | None:
        """Positions that the model has; None if its configuration names none."""
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if self.config.get(key):
                return self._checked(key, self.config[key], Count, "config.json")
        return None

    def max_length(self, asked: int | None) -> int | None:
        """Tokens of prompt: as asked, or by LongBench's rule; a small window gives up no more than half."""
        if asked is not None or self.window is None:
            return asked
        return self.window - min(MARGIN, self.window // 2)

    @cached_property
    def weights(self) -> str:
        """The hub's commit, or a hash of the weights and of the tokenizer; of the shape where they are drawn."""
        if self.random:
            drawn = (self.folder / "config.json").read_bytes() + f"{self.resize} {RANDOM_SEED}".encode()
            return f"random:{hashlib.sha256(drawn).hexdigest()[:16]}"
        if self.commit:
            return self.commit
        if self.gguf:
            return f"sha256:{sha256(self.gguf).hex()[:16]}"
        names = [
            *weight_files(self.path, self.folder),
            "config.json",
            *(path.name for path in folders.tokenizers(self.folder)),
        ]
        return f"sha256:{hash_of(self.folder, names)}"

    @cached_property
    def files(self) -> dict[str, str]:
        """Hashes of the files that decide prompts and stops, by name; none where the hub's commit stands for them."""
        return {} if self.commit else deciding(self.folder)

    @cached_property
    def is_dated(self) -> bool:
        """Whether its chat template writes today's date."""
        return asks_for_the_date(self.folder)

    @property
    def ends(self) -> set[int]:
        """Token ids that end an answer, by the checkpoint's generation defaults and its configuration."""
        ends: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            end = read_json(path).get("eos_token_id") if path.exists() else None
            end = self._checked("eos_token_id", end, Ends, name)
            ends.update([end] if isinstance(end, int) else end or [])
        return ends

    def _checked(self, key: str, value: Any, kind: Any, name: str) -> Any:
        return conform(value, kind, f"model.path={self.path}: {name}: {key}")


def find(path: str, revision: str = "main", file: str | None = None) -> Checkpoint:
    """The checkpoint in a folder or a GGUF file, or the hub's repository of that name, downloaded if need be.

    file: a GGUF file's name in the folder. A relative path is looked for here, then beside run.py, then among the
    models that were fetched. Raises UserError if it is nowhere or incomplete; an unreachable hub is noticed within
    seconds.
    """
    for place in (Path(path).expanduser(), ROOT / path, fetched.folder() / path):
        if place.is_file():
            return _of_gguf(path, place, file)
        if place.is_dir():
            if file or (file := _only_gguf(path, place)):
                return _of_gguf(path, place / file, None)
            folders.check(path, place)
            return Checkpoint(path, place.resolve())
    fetched.offer(path)
    if file:
        raise UserError(f"model.path={path}: no such folder, for model.file={file}")
    if path.endswith(gguf.SUFFIX):
        raise UserError(f"model.path={path}: no such file")
    # owner/name, unless that owner is a folder here: then the name was mistyped; or one of the first names, like gpt2
    owned = "/" in path and any((at / path).parent.is_dir() for at in (Path(), ROOT))
    if not re.fullmatch(r"([A-Za-z0-9_-][\w.-]*/)?[A-Za-z0-9_][\w.-]*", path, re.ASCII) or owned:
        raise UserError(
            f"model.path={path}: no such folder; give a folder that holds config.json and model.safetensors, a GGUF "
            "file, or an id of the Hugging Face hub such as model.path=Qwen/Qwen2.5-0.5B-Instruct"
        )
    return _from_hub(path, revision)


def _of_gguf(path: str, place: Path, file: str | None) -> Checkpoint:
    """The checkpoint in a GGUF file. Raises UserError if it is none, or cannot be read as what it is."""
    if file:
        raise UserError(f"model.file={file}: model.path={path} is a file; give the folder that both are in")
    if not place.is_file():
        found = ", ".join(sorted(one.name for one in place.parent.glob(f"*{gguf.SUFFIX}"))) or "none"
        raise UserError(f"model.file={place.name}: no such file in model.path={path}; GGUF files there: {found}")
    if not gguf.is_one(place):
        raise UserError(
            f"model.path={path}: is a file, and no GGUF file; give one, or the folder that holds config.json and "
            "model.safetensors"
        )
    place = place.resolve()
    return Checkpoint(path, gguf.checkpoint(path, place), gguf=place)


def _only_gguf(path: str, folder: Path) -> str | None:
    """The name of the GGUF file that is all the weights a folder has. Raises UserError if there are several."""
    files = sorted(one.name for one in folder.glob(f"*{gguf.SUFFIX}") if one.is_file())
    if not files or [*folder.glob("*.safetensors")]:
        return None
    if len(files) > 1:
        raise UserError(f"model.path={path}: holds {len(files)} GGUF files; name one, such as model.file={files[0]}")
    return files[0]


def checkpoint_of(model: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that the settings of a model name: `path` and `revision`; or, with init=random, only its shape.

    Raises UserError as `find` does, and if `init`, `shape`, `resize` or `check` cannot work.
    """
    check = model.get("check", "auto")
    check = "off" if check is False else check  # YAML reads off as false
    if check not in CHECKS:
        raise UserError(f"model.check={check}: give one of {', '.join(CHECKS)}")
    return replace(_named(model), check=check == "auto", convert=model.get("convert") == "always")


def _named(model: Mapping[str, Any]) -> Checkpoint:
    path, init = str(model["path"]), model.get("init", "pretrained")
    resize = {str(key): value for key, value in (model.get("resize") or {}).items()}
    if init not in INITS:
        raise UserError(f"model.init={init}: give one of {', '.join(INITS)}")
    if init == "pretrained":
        if resize:
            raise UserError(f"model.resize={resize}: weights that are loaded have their sizes; give model.init=random")
        return find(path, str(model.get("revision", "main")), model.get("file"))
    if model.get("file"):
        raise UserError(f"model.file={model['file']}: random weights are read from no file; leave it out")
    shape = str(model.get("shape") or path)
    for folder in (Path(shape).expanduser(), ROOT / shape):
        if (folder / "config.json").is_file():
            return Checkpoint(path, folder.resolve(), random=True, resize=json.dumps(resize, sort_keys=True))
    raise UserError(
        f"model.init=random: no config.json in {shape}; give model.shape=DIR, a folder with the config.json of the "
        "shape that is wanted"
    )


def date_of(checkpoint: Checkpoint, model: Mapping[str, Any]) -> str | None:
    """The day that the checkpoint's chat template takes for today, by the setting `date`; None: it asks for none.

    Raises UserError unless the setting is a day.
    """
    date = str(model.get("date") or DATE)
    dated("", date)
    return date if model["chat"] and checkpoint.is_dated else None


def load_tokenizer(checkpoint: Checkpoint) -> "PreTrainedTokenizerBase":
    """Raises UserError if the files are broken, or a shape has none."""
    from transformers import AutoTokenizer

    if checkpoint.random and not folders.tokenizers(checkpoint.folder):
        raise UserError(
            f"model.init=random: {checkpoint.folder} has no tokenizer ({folders.TOKENIZERS[0]}), without which a model "
            "takes no text; task=latency needs none"
        )
    folders.check_tokenizer(checkpoint.path, checkpoint.folder)
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(f"model.path={checkpoint.path}: the tokenizer cannot be loaded: {first_line(error)}") from error


def load_model(checkpoint: Checkpoint, dtype: "torch.dtype", device: "torch.device") -> "PreTrainedModel":
    """The model in evaluation mode. Raises UserError if files are broken, weights are missing, or it needs own code."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if checkpoint.random:
        return _noted(_drawn(checkpoint, dtype, device), checkpoint)
    logging.disable_progress_bar()
    folder = checkpoint.folder
    if checkpoint.gguf:
        folder = gguf.weights(checkpoint.path, checkpoint.gguf, folder, dtype, checkpoint.convert)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, JSON and transformers fail each in its own way
        raise UserError(f"model.path={checkpoint.path}: cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"model.path={checkpoint.path}: the weights lack {len(names)} tensors of the model, such as {names[0]}"
        )
    model.config._name_or_path = str(checkpoint.source)
    return _noted(model.to(device).eval(), checkpoint)


def _noted(model: "PreTrainedModel", checkpoint: Checkpoint) -> "PreTrainedModel":
    """The model, which knows from here on whether binding tries it out first."""
    model.__dict__["_kvfrontier_check"] = checkpoint.check
    return model


def _drawn(checkpoint: Checkpoint, dtype: "torch.dtype", device: "torch.device") -> "PreTrainedModel":
    """A model with weights drawn on the device, the same at every call. Raises UserError for a shape that cannot be."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        for key, value in json.loads(checkpoint.resize).items():
            if not hasattr(config, key):
                raise UserError(f"model.resize: {type(config).__name__} has no {key}")
            setattr(config, key, value)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(RANDOM_SEED)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # each configuration class checks its sizes in its own way
        raise UserError(f"model.init=random: no model of this shape can be made: {first_line(error)}") from error
    return model.to(device).eval()


def _from_hub(repo: str, revision: str) -> Checkpoint:
    folder = hub.snapshot(repo, revision)
    folders.check(repo, folder)
    return Checkpoint(repo, folder, commit=folder.name, revision=revision)
