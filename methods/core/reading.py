"""Files that a user gave: every way in which one cannot be read is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from methods.core.errors import UserError

NAMES: dict[type, str] = {dict: "a JSON object", list: "a JSON list"}


def read_bytes(path: Path) -> bytes:
    """The whole file. Raises UserError for a folder, a link to nothing, or one that may not be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_text(path: Path) -> str:
    """The whole file as text. Raises UserError as `read_bytes` does, and for another encoding than UTF-8."""
    try:
        return read_bytes(path).removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error})") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """The object, or list, in a JSON file. Raises UserError as `read_text` does, and for what is no such thing."""
    return parse_json(read_text(path), str(path), kind)


def parse_json(text: str, where: str, kind: type = dict) -> Any:
    """The object, or list, that a text holds. Raises UserError; where: what the text is, as the message names it."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where}: not JSON in UTF-8 that can be read (nested too deeply)") from error
    if not isinstance(value, kind):
        raise UserError(f"{where}: {NAMES[kind]} is needed, found {type(value).__name__}")
    # json reads half of a surrogate pair, which no file can hold and no tokenizer takes
    if "\\u" in text and _is_half(value):
        raise UserError(f"{where}: not JSON in UTF-8 (it has half of a surrogate pair, such as \\ud83d)")
    return value


def _is_half(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
