"""Natural English that every CPython carries: the language reference's topics and the library's docstrings.

Modules and topics are split like the invented words: the held-out ones are never trained on and measure perplexity.
The text depends on the Python version; `prose_hash` names what was used.
"""

import ast
import hashlib
import re
import sysconfig
import textwrap
from functools import cache
from pathlib import Path

from tasks.documents.pools import Split, split_of


@cache
def prose(split: Split) -> tuple[str, ...]:
    """Paragraphs of the split in a fixed order, each of 80 characters or more, white space collapsed to blanks."""
    from pydoc_data.topics import topics

    texts = {f"topic:{name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*library.glob("*.py"), *(p for d in _PACKAGES for p in (library / d).glob("*.py"))]):
        texts[f"module:{path.relative_to(library).as_posix()}"] = "\n\n".join(_docstrings(path))
    paragraphs = []
    for name in sorted(texts):
        if split_of(name) == split:
            paragraphs += [_clean(p) for p in re.split(r"\n\s*\n", textwrap.dedent(texts[name]))]
    seen = set(prose("train")) if split == "held_out" else set()  # modules repeat some of each other's docstrings
    return tuple(p for p in paragraphs if len(p) >= 80 and p not in seen)


@cache
def sentences(split: Split) -> tuple[str, ...]:
    """Sentences of the prose that are neither very short nor very long, for use as filler."""
    candidates = [s for p in prose(split) for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", p)]
    return tuple(
        s for s in candidates if 40 <= len(s) <= 200 and s[0].isupper() and s[-1] == "." and not re.search(r"\d", s)
    )


def prose_hash(split: Split) -> str:
    """SHA-256 of the split's paragraphs, first 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(prose(split)).encode()).hexdigest()[:16]


_PACKAGES = ("asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging",
             "multiprocessing", "unittest", "urllib", "xml/dom", "xml/sax", "wsgiref")  # fmt: skip


def _docstrings(path: Path) -> list[str]:
    tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]


def _clean(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("`", "").replace("*", "")).strip()
    return text.encode("ascii", "ignore").decode()
