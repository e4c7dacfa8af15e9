"""A GGUF file as a checkpoint's folder, made once: configuration, tokenizer and, per dtype, dequantized weights.

    <cache>/gguf/<name>-<hash>/checkpoint/   config.json, generation_config.json, the tokenizer, gguf.json: the card
                               float32/      model.safetensors as transformers reads them from the file, in this dtype

The hash is of the file's content, the reading packages' versions and this module's `FORMAT`. A folder is drafted beside
its place and renamed, holds a seal with the hashes of its files, and is made again where they do not match it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.core.errors import UserError
from methods.core.home import CACHE, cache_folder
from methods.core.home.hashes import keep, sha256
from methods.core.reading import read_json
from runners.engine.sources import first_line, splits
from runners.engine.sources import gguf_header as headers
from runners.engine.sources.gguf_header import Header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: raised whenever the same file becomes another checkpoint
FORMAT = 1
SUFFIX = ".gguf"
CARD, SEAL = "gguf.json", "seal"
#: bytes of weights from which on it is asked before they are written
LARGE = 4_000_000_000
#: how a tokenizer is tried out after it was written: blanks, digits, line ends, another script
PROBE = "It's  the\n\n\n12th of May 2024, ' naïve' 日本語.\n- 5\n\t\tend "


def is_one(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def checkpoint(path: str, file: Path) -> Path:
    """The folder with the configuration and the tokenizer of a GGUF file, and its card; made at first use.

    path: as typed. Raises UserError if the file, its architecture or its tokenizer cannot be read as what they are.
    """
    name = f"{file.stem}-{hashlib.sha256(repr(_made_of(sha256(file))).encode()).hexdigest()[:12]}"
    place = cache_folder() / "gguf" / name / "checkpoint"

    def make(draft: Path) -> None:
        _describe(path, file, draft)

    return _made(path, place, make)


def weights(path: str, file: Path, folder: Path, dtype: torch.dtype, may_be_large: bool) -> Path:
    """The folder of a GGUF file's weights in a dtype; made at first use.

    folder: its `checkpoint`. Raises UserError if they cannot be read, or are large and nobody allows it.
    """
    name = str(dtype).removeprefix("torch.")
    place = folder.with_name(name)
    card = card_of(folder)
    size = card["elements"] * dtype.itemsize

    def make(draft: Path) -> None:
        if (free := shutil.disk_usage(draft).free) < size:
            raise UserError(
                f"model.path={path}: {size / 1e9:.1f} GB of weights in {name} do not fit into {place.parent}, where "
                f"{free / 1e9:.1f} GB are free; {CACHE}=DIR names another folder"
            )
        if size > LARGE and not may_be_large:
            _ask(path, place, size, name)
        _dequantize(path, file, folder, dtype, draft)
        told = f"{file.name} ({headers.told_shares(card['types'])}) dequantized to {name}: {_size(draft)} in {place}"
        held = _size(place.parents[1])
        print(f"model: {told}; {place.parents[1]} holds {held} of such files", file=sys.stderr)

    return _made(path, place, make)


def card_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint's folder was made of: `types` (the share of weights stored in each), `elements`."""
    return read_json(folder / CARD)


def _made_of(digest: bytes) -> list[str]:
    versions = [metadata.version(name) for name in ("transformers", "tokenizers")]
    return [digest.hex(), *versions, str(FORMAT)]


def _describe(path: str, file: Path, draft: Path) -> None:
    """Write what a checkpoint has besides its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    header = _header(path, file)
    print(f"model: {file.name} is read for the first time", file=sys.stderr)
    with _alone(file) as at, _quiet():
        try:
            config = AutoConfig.from_pretrained(at, gguf_file=file.name, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # each architecture's reader fails in its own way
            raise _unread(path, header, first_line(error)) from error
        if lost := headers.dropped_tensors(header, model):
            raise _unread(path, header, f"it leaves out {', '.join(lost[:3])}")
        if lost := headers.dropped_settings(header, config):
            raise _unread(path, header, f"it leaves out {', '.join(lost[:3])}")
        if name := splits.unknown(header.tokenizer):
            raise UserError(f"model.path={path}: its text is cut as {name!r}, which nothing here does; {_INSTEAD}")
        tokenizer = _tokenizer(path, at, file.name)
    splits.settle(tokenizer, header.tokenizer)
    _save_tokenizer(path, tokenizer, draft)
    for name in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(name, None)
    config.dtype = header.dtype
    config.save_pretrained(draft)
    ends = [header.tokenizer.get(f"{name}_token_id") for name in ("eos", "eot")]
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None)) or None
    generation.save_pretrained(draft)
    card = {"file": file.name, "architecture": header.architecture, "types": header.shares, "elements": header.elements}
    (draft / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")


_INSTEAD = "give the folder of the model's own safetensors"


def _header(path: str, file: Path) -> Header:
    """Raises UserError for a file that cannot be read, or is a part of one."""
    if find_spec("gguf") is None:
        raise UserError(
            f"model.path={path}: a GGUF file is read by the package gguf; pip install 'kvfrontier[gguf]' brings it"
        )
    try:
        header = headers.read(file)
    except Exception as error:  # the package reads what is there, whatever it is
        raise UserError(f"model.path={path}: {file.name} is no whole GGUF file ({first_line(error)})") from error
    if header.parts > 1:
        raise UserError(
            f"model.path={path}: {file.name} is one of {header.parts} parts; llama-gguf-split --merge makes them one"
        )
    return header


def _unread(path: str, header: Header, why: str) -> UserError:
    version = metadata.version("transformers")
    return UserError(
        f"model.path={path}: transformers {version} cannot read a GGUF of architecture {header.architecture} as what "
        f"it is ({why}); {_INSTEAD}"
    )


def _tokenizer(path: str, folder: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"model.path={path}: its tokenizer cannot be read ({first_line(error)}); {_INSTEAD}") from error


def _save_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, draft: Path) -> None:
    """Raises UserError unless what was written reads text as what was read from the file does."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(draft)
    again = AutoTokenizer.from_pretrained(draft, local_files_only=True, trust_remote_code=False)
    same = tokenizer(PROBE).input_ids == again(PROBE).input_ids and len(tokenizer) == len(again)
    if not (same and tokenizer.chat_template == again.chat_template):
        raise UserError(f"model.path={path}: its tokenizer cannot be kept, it reads text otherwise then; {_INSTEAD}")


def _dequantize(path: str, file: Path, folder: Path, dtype: torch.dtype, draft: Path) -> None:
    """Write the weights as transformers reads them from the file, with the configuration that they belong to."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    _header(path, file)  # for what it refuses
    # newer versions keep weights in blocks where they have kernels for them
    blocks = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": blocks(dequantize=True)} if blocks else {}
    with _alone(file) as at, _quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                at,
                gguf_file=file.name,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except Exception as error:
            raise UserError(f"model.path={path}: cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise UserError(f"model.path={path}: it lacks {len(names)} tensors of the model, such as {names[0]}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.dtype = dtype
    with torch.device("meta"):  # a model that nothing was told of the file is saved like any other
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(draft)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder that holds nothing but the file, since a tokenizer would take what lies beside it for its own."""
    with tempfile.TemporaryDirectory(prefix="kvfrontier-") as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the reader's own bars and warnings."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # a bar of tqdm's own, which nothing switches off
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(level)


def _ask(path: str, place: Path, size: int, dtype: str) -> None:
    """Return if somebody at a terminal says yes. Raises UserError otherwise."""
    large = f"{size / 1e9:.1f} GB of weights in {dtype}"
    if sys.stdin.isatty() and sys.stderr.isatty():
        print(f"model.path={path}: {large} will be kept in {place}; write them? [y/N] ", end="", file=sys.stderr)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    half = ", dtype=bfloat16 takes half of it" if dtype == "float32" else ""
    raise UserError(
        f"model.path={path}: {large} would be written to {place}; model.convert=always allows it{half}, {CACHE}=DIR "
        "puts it elsewhere"
    )


def _made(path: str, place: Path, make: Callable[[Path], None]) -> Path:
    """The folder at a place, whole: as it is, or made anew by filling a draft of it."""
    if _is_whole(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place):
            if not _is_whole(place):  # what another process has made meanwhile is
                _replace(place, make)
    except OSError as error:
        where = error.filename or place
        raise UserError(
            f"model.path={path}: {where} cannot be written ({error.strerror or error}); {CACHE}=DIR names a folder for "
            "what is made of GGUF files"
        ) from error
    return place


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"model: another process is making {place}; waiting for it", file=sys.stderr)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _replace(place: Path, make: Callable[[Path], None]) -> None:
    """Fill a draft and rename it to its place; the lock must be held."""
    _clear(place)  # drafts of a process that was killed
    try:
        draft = _draft(place)
        make(draft)
        names = sorted(file.relative_to(draft).as_posix() for file in draft.rglob("*") if file.is_file())
        hashes = {name: sha256(draft / name) for name in names}
        (draft / SEAL).write_text(json.dumps({name: found.hex() for name, found in hashes.items()}), encoding="utf-8")
        if place.exists():
            os.replace(place, _draft(place))
        os.replace(draft, place)
        for name, found in hashes.items():
            keep(place / name, found)
    finally:
        _clear(place)


def _draft(place: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".draft"))


def _clear(place: Path) -> None:
    for left in place.parent.glob(f".{place.name}.*.draft"):
        shutil.rmtree(left, ignore_errors=True)


def _is_whole(place: Path) -> bool:
    """Whether a folder has the files of its seal as they were."""
    try:
        hashes = json.loads((place / SEAL).read_text(encoding="utf-8"))
        return bool(hashes) and all(sha256(place / name).hex() == hash for name, hash in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 1e6:,.0f} MB"
