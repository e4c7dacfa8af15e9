"""What a checkpoint's folder has to hold."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from methods.core.errors import UserError
from methods.core.reading import read_json
from runners.engine.model_files import weight_files

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# a line of a tokenizer in tiktoken's form: a token in base 64 and its rank; sentencepiece's form is binary
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*$")


def check(path: str, folder: Path) -> None:
    """Raises UserError unless the folder holds what a checkpoint needs."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={path}: no config.json in {folder}; give the folder of a transformers checkpoint")
    read_json(folder / "config.json")
    for file in folder.glob("*.safetensors"):
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "a link to nothing"
            raise UserError(f"model.path={path}: {file.name} is {kind}; it holds weights, and is a file")
    if not weight_files(path, folder):
        other = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
        hint = (
            f"{other[0]} is not read, because only safetensors are; save the model again with save_pretrained"
            if other
            else "save_pretrained writes model.safetensors there"
        )
        raise UserError(f"model.path={path}: no weights (*.safetensors) in {folder}; {hint}")
    if not tokenizers(folder):
        raise UserError(
            f"model.path={path}: no tokenizer ({TOKENIZERS[0]}) in {folder}; "
            "tokenizer.save_pretrained of the model's own tokenizer writes it there"
        )


def tokenizers(folder: Path) -> list[Path]:
    """The tokenizer files of a folder."""
    return [folder / name for name in TOKENIZERS if (folder / name).is_file()]


def check_tokenizer(path: str, folder: Path) -> None:
    """Raises UserError, naming the package, if the tokenizer has a form that nothing here reads.

    transformers takes a file that it cannot read for one of the other form, and names that form's package.
    """
    if (folder / "tokenizer.json").is_file():
        return
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if not (folder / name).is_file():
            continue
        with (folder / name).open("rb") as file:
            package = "tiktoken" if TIKTOKEN.match(file.readline(4096)) else "sentencepiece"
        if find_spec(package) is None:
            raise UserError(
                f"model.path={path}: its tokenizer is {name} alone, and the package that reads it, "
                f"{package}, is not installed; pip install {package}, or save tokenizer.json beside it"
            )
