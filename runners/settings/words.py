"""The words of the command line: what Hydra's grammar can read, and how to quote what it cannot."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from methods.core.errors import UserError
from methods.core.typed import shown

KEY = re.compile(r"(~|\+{1,2})?[\w./@$-]+")
# of Hydra's flags, those that are followed by a word of their own
WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info",
    "-i", "--experimental-rerun",
)  # fmt: skip


#: settings by the names that they had before
RENAMED = {"plan": "dry_run"}


def current(words: Sequence[str]) -> list[str]:
    """The words with today's names of settings."""
    pairs = [(word, *word.partition("=")) for word in words]
    return [f"{RENAMED[key]}={value}" if equals and key in RENAMED else word for word, key, equals, value in pairs]


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for the first word that is neither a flag nor a setting that can be read."""
    behind = ""
    for word in words:
        if not word.startswith("-") and behind not in WITH_VALUE:
            read(word)
        behind = word


def folders_of(words: Sequence[str]) -> list[str]:
    """The folders that --config-dir names."""
    folders = []
    for word, behind in zip(words, [*words[1:], ""]):
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folders.append(value or behind)
    return [folder for folder in folders if folder]


def read(word: str) -> Override:
    """A setting as Hydra reads it. Raises UserError that says how to quote it."""
    if "=" in word and not KEY.fullmatch(word.partition("=")[0]):
        raise UserError(unread(word))
    try:
        override = OverridesParser.create().parse_override(word)
        value = override.value()
    except (HydraException, RecursionError) as error:
        raise UserError(unread(word)) from error
    # Hydra itself says nothing useful of a group whose choice is no name
    several = value if isinstance(value, list) else [value]
    group = "/" in override.key_or_group or override.key_or_group == "experiment"
    if group and any(isinstance(one, bool | int | float | dict) for one in several):
        raise UserError(f"{shown(word)}: unknown; give {override.key_or_group}=NAME")
    return override


def unread(word: str) -> str:
    """What is wrong with a word that Hydra's grammar cannot read, in one line."""
    key, equals, value = word.partition("=")
    if not equals:
        return f"{shown(word)}: settings are written key=value, such as budget=0.25"
    if not KEY.fullmatch(key):
        return f"{shown(word)}: {shown(key) or 'nothing'} is no setting's name; settings are written key=value"
    better = f"{key}={quoted(value)}"
    return f"{shown(word)}: the value has characters of Hydra's own grammar; quote it twice: {shlex.quote(better)}"


def quoted(text: str) -> str:
    """A string in Hydra's override grammar, whatever it holds."""
    if '"' not in text and not text.endswith("\\"):
        return f'"{text}"'
    # backslashes count only before a quote
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
