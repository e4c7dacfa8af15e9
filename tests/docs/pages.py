"""The pages that people read, and what tests of them share."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))

_spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
assert _spec and _spec.loader
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)

PAGES = [*(ROOT / name for name in hooks.PAGES), *DOCS]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of one language; "" for those that name none: commands and what they print."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if name == language]


def without_blocks(text: str, instead: str = "") -> str:
    return re.sub(r"^```.*?^```", instead, text, flags=re.M | re.S)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables of a text, heads and rulers left out."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rulers = [i for i, line in enumerate(text.splitlines()) if line.startswith("|---")]
    heads = {text.splitlines()[i - 1].strip("| ") for i in rulers}
    return [cells for cells in lines if " | ".join(cells) not in heads]
