"""Finding a checkpoint in a folder or on the hub, and loading its model and tokenizer: safetensors, no foreign code."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.core.errors import UserError
from methods.core.reading import read_json
from methods.core.typed import Count, Whole, conform, shown
from runners.engine.model_files import DATE, asks_for_the_date, dated, deciding, hash_of, weight_files
from tasks.data.sources import unreachable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
# what a checkpoint needs; some repositories hold their weights twice
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TWICE = ["original/*", "consolidated*", "onnx/*"]
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# a line of a tokenizer in tiktoken's form: a token in base 64 and its rank; sentencepiece's form is binary
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*$")
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
    """

    path: str
    folder: Path
    commit: str | None = None
    revision: str | None = None
    random: bool = False
    resize: str = "{}"
    check: bool = field(default=True, compare=False)

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
        name = os.path.basename(os.path.normpath(self.path if self.commit or self.random else self.folder))
        if not self.random:
            return name
        return f"{name}-random" if self.resize == "{}" else f"{name}-random-{self.weights[-6:]}"

    @property
    def location(self) -> str:
        """A hash of where it was looked for: other weights there are the same model, changed."""
        where = f"{self.path}@{self.revision}" if self.commit else str(self.folder)
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
        names = [*weight_files(self.path, self.folder), "config.json", *(path.name for path in _tokenizer(self.folder))]
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


def find(path: str, revision: str = "main") -> Checkpoint:
    """The checkpoint in a folder, or the hub's repository of that name, downloaded if need be.

    A relative folder is looked for here, then beside run.py. Raises UserError if it is nowhere or incomplete; an
    unreachable hub is noticed within seconds.
    """
    for folder in (Path(path).expanduser(), ROOT / path):
        if folder.is_dir():
            _check(path, folder)
            return Checkpoint(path, folder.resolve())
    if Path(path).expanduser().exists():
        raise UserError(f"model.path={path}: is a file; give the folder that holds config.json and model.safetensors")
    # owner/name, unless that owner is a folder here: then the name was mistyped; or one of the first names, like gpt2
    owned = "/" in path and any((at / path).parent.is_dir() for at in (Path(), ROOT))
    if not re.fullmatch(r"([A-Za-z0-9_-][\w.-]*/)?[A-Za-z0-9_][\w.-]*", path, re.ASCII) or owned:
        raise UserError(
            f"model.path={path}: no such folder; give a folder that holds config.json and model.safetensors, "
            "or an id of the Hugging Face hub such as model.path=Qwen/Qwen2.5-0.5B-Instruct"
        )
    return _from_hub(path, revision)


def checkpoint_of(model: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that the settings of a model name: `path` and `revision`; or, with init=random, only its shape.

    Raises UserError as `find` does, and if `init`, `shape`, `resize` or `check` cannot work.
    """
    check = model.get("check", "auto")
    check = "off" if check is False else check  # YAML reads off as false
    if check not in CHECKS:
        raise UserError(f"model.check={check}: give one of {', '.join(CHECKS)}")
    return replace(_named(model), check=check == "auto")


def _named(model: Mapping[str, Any]) -> Checkpoint:
    path, init = str(model["path"]), model.get("init", "pretrained")
    resize = {str(key): value for key, value in (model.get("resize") or {}).items()}
    if init not in INITS:
        raise UserError(f"model.init={init}: give one of {', '.join(INITS)}")
    if init == "pretrained":
        if resize:
            raise UserError(f"model.resize={resize}: weights that are loaded have their sizes; give model.init=random")
        return find(path, str(model.get("revision", "main")))
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

    if checkpoint.random and not _tokenizer(checkpoint.folder):
        raise UserError(
            f"model.init=random: {checkpoint.folder} has no tokenizer ({TOKENIZERS[0]}), without which a model takes "
            "no text; task=latency needs none"
        )
    _check_readable(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(
            f"model.path={checkpoint.path}: the tokenizer cannot be loaded: {_first_line(error)}"
        ) from error


def _check_readable(checkpoint: Checkpoint) -> None:
    """Raises UserError, naming the package, if the tokenizer has a form that nothing here reads.

    transformers takes a file that it cannot read for one of the other form, and names that form's package.
    """
    folder = checkpoint.folder
    if (folder / "tokenizer.json").is_file():
        return
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if not (folder / name).is_file():
            continue
        with (folder / name).open("rb") as file:
            package = "tiktoken" if TIKTOKEN.match(file.readline(4096)) else "sentencepiece"
        if find_spec(package) is None:
            raise UserError(
                f"model.path={checkpoint.path}: its tokenizer is {name} alone, and the package that reads it, "
                f"{package}, is not installed; pip install {package}, or save tokenizer.json beside it"
            )


def load_model(checkpoint: Checkpoint, dtype: "torch.dtype", device: "torch.device") -> "PreTrainedModel":
    """The model in evaluation mode. Raises UserError if files are broken, weights are missing, or it needs own code."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if checkpoint.random:
        return _noted(_drawn(checkpoint, dtype, device), checkpoint)
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, JSON and transformers fail each in its own way
        raise UserError(f"model.path={checkpoint.path}: cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(
            f"model.path={checkpoint.path}: the weights lack {len(names)} tensors of the model, such as {names[0]}"
        )
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
        raise UserError(f"model.init=random: no model of this shape can be made: {_first_line(error)}") from error
    return model.to(device).eval()


def _check(path: str, folder: Path) -> None:
    """Raises UserError unless the folder holds what a checkpoint needs."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={path}: no config.json in {folder}; give the folder of a transformers checkpoint")
    read_json(folder / "config.json")
    for file in folder.glob("*.safetensors"):
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "a link to nothing"
            raise UserError(f"model.path={path}: {file.name} is {kind}; it holds weights, and is a file")
    if not weight_files(path, folder):
        other = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern)]
        hint = (
            f"{other[0]} is not read, because only safetensors are; save the model again with save_pretrained"
            if other
            else "save_pretrained writes model.safetensors there"
        )
        raise UserError(f"model.path={path}: no weights (*.safetensors) in {folder}; {hint}")
    if not _tokenizer(folder):
        raise UserError(
            f"model.path={path}: no tokenizer ({TOKENIZERS[0]}) in {folder}; "
            "tokenizer.save_pretrained of the model's own tokenizer writes it there"
        )


def _tokenizer(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZERS if (folder / name).is_file()]


def _from_hub(repo: str, revision: str) -> Checkpoint:
    """The repository's files in the hub's cache; its folder is named by the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    # the hub's own client would try for half a minute before it gives up
    trouble = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else unreachable(ENDPOINT)
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=FILES, ignore_patterns=TWICE, local_files_only=bool(trouble)
        )
    except GatedRepoError as error:
        raise UserError(
            f"model.path={repo}: its owners ask for registration; accept the terms at huggingface.co/{repo}, "
            "then set HF_TOKEN to an access token"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model.path={repo}: no folder here and no public model of that name on the hub") from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision={revision}: {repo} has no such branch, tag or commit") from error
    except OSError as error:
        raise UserError(
            f"model.path={repo}: not on this machine, and {ENDPOINT} cannot be used ({trouble or _first_line(error)}); "
            "offline, model.path=DIR takes a checkpoint's folder, and one that was downloaded before loads as it is, "
            "at once with HF_HUB_OFFLINE=1"
        ) from error
    _check(repo, Path(folder))
    return Checkpoint(repo, Path(folder), commit=Path(folder).name, revision=revision)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
