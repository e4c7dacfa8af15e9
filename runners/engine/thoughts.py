"""What a reasoning model writes before its answer: a block between <think> and </think>."""

from __future__ import annotations

import re

OPEN, CLOSE = TAGS = "<think>", "</think>"
_BLOCK = re.compile(rf"{OPEN}.*?(?:{CLOSE}|\Z)", re.DOTALL)


def apart(text: str, opened: bool = False) -> tuple[str, str]:
    """An answer without its blocks, and these; without any the answer as it stands, and "".

    A block that never ends takes all that follows. opened: the prompt's end opens a block; where one ends that nothing
    has opened, the prompt did.
    """
    whole = OPEN + text if opened else text
    rest = _BLOCK.sub("", whole)
    before, end, rest = rest.rpartition(CLOSE)
    if not opened and rest == text:
        return text, ""
    return rest.strip(), "".join([before, end, *_BLOCK.findall(whole)])


def opens(text: str) -> bool:
    """Whether a block is open where a text ends."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def named(reasoning: str | bool) -> str:
    """The setting by its name: YAML reads off as false."""
    return reasoning if isinstance(reasoning, str) else "off"
