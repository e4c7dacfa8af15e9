"""What of a model's folder decides its prompts, its stops and its weights, so that a change of it is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from methods.core.errors import UserError
from methods.core.home.hashes import sha256
from methods.core.reading import read_json

DATE = "2024-07-26"  # that of Llama 3.1's own template
INDEX = "model.safetensors.index.json"
# tokenizers and their merges, added tokens, vocabularies, chat templates, generation defaults, the configuration
_DECIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe")
# written by trainers and by runners.learn.reference.card; nothing reads them to make a prompt
_SAID_ONLY = ("*.index.json", "measured.json", "trainer_state.json", "*_results.json", "README*", "gguf.json")
_CLOCK = b"strftime_now"  # what a chat template calls for today's date


def deciding(folder: Path) -> dict[str, str]:
    """Hashes of the files that decide what prompts look like and where answers end, by their names in the folder."""
    return {name: sha256(folder / name).hex()[:16] for name in _names(folder)}


def weight_files(path: str, folder: Path) -> list[str]:
    """The names of the weights' files: those in the folder, and those that an index names below it.

    Raises UserError for an index that leads out of the folder or cannot be read; path: the folder as typed.
    """
    names = {file.name for file in folder.glob("*.safetensors")}
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(read_json(index)["weight_map"].values())
            outside = sorted(name for name in named if _leads_out(name))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"model.path={path}: {INDEX} cannot be read: no `weight_map` from tensors to files"
            ) from error
        if outside:
            raise UserError(
                f"model.path={path}: {INDEX} names {outside[0]}, which is outside the folder; put the weights inside it"
            )
        names |= {name for name in named if (folder / name).is_file()}
    return sorted(names)


def hash_of(folder: Path, names: list[str]) -> str:
    """One hash of files, whatever their order."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(name.encode() + sha256(folder / name))
    return total.hexdigest()[:16]


def asks_for_the_date(folder: Path) -> bool:
    """Whether a chat template there writes today's date into prompts."""
    return any(_CLOCK in (folder / name).read_bytes() for name in _names(folder) if _may_hold_a_template(name))


def dated(template: str, date: str) -> str:
    """A chat template in which today is always the given day. Raises UserError unless it is one.

    The library hands no functions to templates, so that the one for the date becomes a macro of the template's own.
    """
    try:
        day = datetime.strptime(date, "%Y-%m-%d")
    except ValueError as error:
        raise UserError(f"model.date={date}: give a day such as 2024-07-26") from error
    signs = [f"%{sign}" for sign in (*"aAwdbBmyYHIpMSfjUWcxXGuV", "-d", "-m", "e")]
    replaced = " | ".join(f"replace({sign!r}, {day.strftime(sign)!r})" for sign in signs)
    return f"{{%- macro {_CLOCK.decode()}(format) -%}}{{{{- format | {replaced} -}}}}{{%- endmacro %}}\n{template}"


def _names(folder: Path) -> Iterator[str]:
    """Tokenizers look into folders too, such as additional_chat_templates."""
    for file in sorted([*folder.iterdir(), *folder.glob("*/*.jinja")]):
        decides = any(fnmatch(file.name, pattern) for pattern in _DECIDE)
        if decides and not any(fnmatch(file.name, pattern) for pattern in _SAID_ONLY) and file.is_file():
            yield file.relative_to(folder).as_posix()


def _may_hold_a_template(name: str) -> bool:
    return name.endswith(".jinja") or name in ("tokenizer_config.json", "chat_template.json", "processor_config.json")


def _leads_out(name: str) -> bool:
    # Windows' own signs too, since a folder may have been made there
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or ":" in name
