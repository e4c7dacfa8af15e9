"""Artefacts: what a method learns about one model and needs again whenever it runs under it.

An artefact is two files in assets/<method>/<model>/: NAME.safetensors, and NAME.json, the card that says how it was
made and for which model. A method saves one in its `calibrate`, or a trainer does, and loads it in `prepare`:

    save("qfilters", "filters", model, {"filters": filters}, {"rows": 3000, "sign_convention": "keep high"})
    load("qfilters", "filters", model, shapes={"filters": (n_layers, n_kv_heads, head_dim)}).tensors["filters"]
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from methods.core.errors import UserError
from methods.core.home import COMMAND, MADE, ROOT
from methods.core.reading import read_bytes, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: where artefacts are looked for, and made in the first of them
PLACES = list(dict.fromkeys([MADE / "assets", ROOT / "assets"]))

#: configuration keys that fix the shapes a method meets, and those that fix the rotation of its keys
_SHAPE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size")
_ROPE = ("rope_parameters", "partial_rotary_factor", "rotary_pct", "rotary_dim")
# weights that stand for all: so many matrices, so many entries of each
_MATRICES, _ENTRIES = 16, 4
# the same weights in two precisions differ by twice bfloat16's rounding at most, 2 ** -8 of the value
_SAME = 2**-7


@dataclass(frozen=True)
class Artefact:
    """Tensors on the CPU, and the card with the facts that were saved beside them."""

    tensors: dict[str, Tensor]
    card: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class Calibration:
    """What a calibration gives: an artefact that is yet to be saved, and lines that tell a user how it went.

    method, name, tensors, facts: as `save` takes them.
    """

    method: str
    name: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    report: Sequence[str] = ()


def model_id(model: PreTrainedModel) -> str:
    """The name of the model's folder in assets/<method>: of a hub model owner--name, of a folder its last part.

    A model that was never saved is named by its architecture and a hash of its configuration and weights.
    """
    name, _ = _source(model)
    if name:
        return name
    made_of = repr([_named(model, _SHAPE), _named(model, _ROPE), _some_weights(model)])
    return f"{_config(model).model_type}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What an artefact is checked against, as plain values: id, revision, architecture, shape, RoPE, some weights.

    revision: the hub's commit, None for a folder. weights: entries of matrices spread over the model; they tell two
    checkpoints apart whatever they are called, and are the same up to rounding in every dtype.
    """
    plain = {
        "id": model_id(model),
        "revision": _source(model)[1],
        "architecture": _config(model).model_type,
        "shape": _named(model, _SHAPE),
        "rope": _named(model, _ROPE),
        "weights": _some_weights(model),
    }
    return json.loads(json.dumps(plain))


def save(
    method: str,
    name: str,
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    at: Path | None = None,
) -> Path:
    """Write NAME.safetensors and its card into the folder `at`, or where `load` looks first; returns the file's path.

    facts: how the artefact was made (data, counts, seeds, conventions), as plain values.
    """
    from safetensors.torch import save as serialized

    path = (at or folders(method, model)[0]) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = serialized({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    card = {"method": method, **facts, "sha256": hashlib.sha256(data).hexdigest(), "model": identity(model)}
    _write(path, data)
    # rows of numbers on one line each
    text = re.sub(r"\[[-+\d.e,\s]+\]", lambda match: " ".join(match[0].split()), json.dumps(card, indent=1))
    _write(path.with_suffix(".json"), f"{text}\n".encode())
    return path


def load(
    method: str,
    name: str,
    model: PreTrainedModel,
    path: str | Path | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    make: str = "runner=calibrate",
) -> Artefact:
    """The artefact for this model, checked: assets/METHOD/MODEL/NAME.safetensors, or the file `path`.

    shapes: of tensors that it must hold.  make: the part of run.py's command line, besides method and model, that
    makes it.  Raises UserError with that command when there is none, and with what differs when it was made for
    another model or holds something else.
    """
    command = command_for(method, model, make)
    files = [Path(path)] if path else [folder / f"{name}.safetensors" for folder in folders(method, model)]
    file = next(filter(None, map(find, files)), None)
    if file is None:
        raise UserError(
            f"{method}: no {name} for the model {model_id(model)} at {shown(files[0])}; make it with {command}"
        )
    tensors, card = _read(file, f"make it again with {command}")
    wrong = differences(card.get("model", {}), identity(model), by_path=path is not None)
    for key, shape in (shapes or {}).items():
        if key not in tensors:
            wrong.append(f"it holds no tensor {key}")
        elif tuple(tensors[key].shape) != tuple(shape):
            wrong.append(f"{key} has the shape {list(tensors[key].shape)}, the model needs {list(shape)}")
    if wrong:
        raise UserError(
            f"{method}: {shown(file)} does not fit the model {model_id(model)}: {'; '.join(wrong)}; "
            f"make it for this model with {command}"
        )
    return Artefact(tensors, card, file)


def folders(method: str, model: PreTrainedModel) -> list[Path]:
    """Where the method's artefacts for this model are looked for, and made in the first of them."""
    return [root / method / model_id(model) for root in PLACES]


def state(methods: Iterable[str], model_path: str, given: Iterable[object] = ()) -> str | None:
    """A hash, for records, of what lies in the methods' folders for the model at `model_path`; None if nothing does.

    given: knobs; those that name a file count with what it holds.
    """
    model = _named_by(model_path)[0]
    folders_ = [root / method / model for method in methods for root in PLACES if model]
    named = [path for one in given if isinstance(one, str) and one and (path := find(one))]
    files = [file for folder in folders_ for file in sorted(folder.rglob("*")) if file.is_file()] + named
    if not files:
        return None
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def find(path: str | Path) -> Path | None:
    """The file of this name, looked for here, then where artefacts are made, then beside run.py."""
    return next((file for file in (Path(path).expanduser(), MADE / path, ROOT / path) if file.is_file()), None)


def command_for(method: str, model: PreTrainedModel, make: str) -> str:
    """What a user types to make the method's artefacts for this model."""
    return f"{COMMAND} {make} method={method} {_model_argument(model)}"


def shown(path: Path) -> Path:
    """The path as a user of this checkout, or of what is installed, would type it."""
    return next((path.relative_to(root) for root in (MADE, ROOT) if path.is_relative_to(root)), path)


def _read(file: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialized

    beside = file.with_suffix(".json")
    if not beside.is_file():
        raise UserError(f"{shown(file)}: its card {beside.name} is missing; {remedy}")
    data = read_bytes(file)
    try:
        card = read_json(beside)
        tensors = deserialized(data)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{shown(file)}: it or its card {beside.name} is broken ({error}); {remedy}") from error
    if card.get("sha256") != hashlib.sha256(data).hexdigest():
        raise UserError(f"{shown(file)}: its card {beside.name} belongs to another file; {remedy}")
    return tensors, card


def differences(there: dict[str, Any], here: dict[str, Any], by_path: bool = False) -> list[str]:
    """What tells the model of a card from the one at hand, in words; a file given by path may have another id."""
    wrong = []
    for key in ("architecture",) if by_path else ("id", "architecture"):
        if there.get(key) != here[key]:
            wrong.append(f"{key} is {there.get(key)} there, {here[key]} here")
    if there.get("revision") and here["revision"] and there["revision"] != here["revision"]:
        wrong.append(f"revision is {there['revision'][:12]} there, {here['revision'][:12]} here")
    for part in ("shape", "rope"):
        ours, theirs = _flat(here[part]), _flat(there.get(part, {}))
        wrong += [
            f"{key} is {theirs.get(key)} there, {ours.get(key)} here"
            for key in sorted(ours | theirs)
            if ours.get(key) != theirs.get(key)
        ]
    if not wrong and not _same(there.get("weights", []), here["weights"]):
        wrong.append("the weights are others: it was made for another checkpoint")
    return wrong


def _flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; a setting that is None is one that is not given."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        elif value is not None:
            flat[above + key] = value
    return flat


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    # float16 loses the last bits of what is smaller than its normal numbers
    return len(a) == len(b) and torch.allclose(torch.tensor(a), torch.tensor(b), rtol=_SAME, atol=1e-7)


def _some_weights(model: PreTrainedModel) -> list[float]:
    """Entries of the model's matrices, evenly spread over it and over each, with four digits."""
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.is_floating_point()]
    chosen = [matrices[i * len(matrices) // _MATRICES] for i in range(min(_MATRICES, len(matrices)))]
    entries = []
    for matrix in chosen:
        at = torch.arange(1, 2 * _ENTRIES, 2, device=matrix.device) * matrix.numel() // (2 * _ENTRIES)
        entries.append(matrix.detach()[at // matrix.shape[1], at % matrix.shape[1]].float().cpu())
    return [float(f"{x:.4g}") for x in torch.cat(entries).tolist()] if entries else []


def _config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _named(model: PreTrainedModel, keys: Sequence[str]) -> dict[str, Any]:
    """The settings among these that the model's configuration has."""
    config = _config(model)
    return {key: value for key in keys if (value := getattr(config, key, None)) is not None}


def _source(model: PreTrainedModel) -> tuple[str, str | None]:
    """Name and commit of where the model was loaded from; an empty name when it was not."""
    name, commit = _named_by(str(model.config.name_or_path or ""))
    return name, commit or getattr(model.config, "_commit_hash", None)


def _named_by(path: str) -> tuple[str, str | None]:
    """Name and commit of the checkpoint at a path, or of the hub's repository of that name."""
    if snapshot := re.search(r"models--(.+?)[/\\]snapshots[/\\](\w+)", path):
        return snapshot[1], snapshot[2]
    if path and (Path(path).exists() or (ROOT / path).exists()):
        return Path(path).resolve().name.removesuffix(".gguf"), None
    return path.strip("/").replace("/", "--"), None


def _model_argument(model: PreTrainedModel) -> str:
    path = str(model.config.name_or_path or "")
    if snapshot := re.search(r"models--(.+?)[/\\]snapshots[/\\]", path):
        path = snapshot[1].replace("--", "/", 1)
    return f"model.path={shown(Path(path)) if path else 'DIR, the folder that model.save_pretrained wrote'}"


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whoever else reads or is killed meanwhile."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_bytes(data)
    os.replace(part, path)
