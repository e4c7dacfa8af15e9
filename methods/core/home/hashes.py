"""Hashes of files, kept in the user's cache by path, size and time of change: what is large is read once.

A file that was changed a moment ago is hashed again, since another change may leave its time as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from methods.core.home import cache_folder

#: bytes; a smaller file is hashed sooner than its note is read
LEAST = 8 << 20
#: seconds after which a further change of a file shows in its time, on file systems with coarse clocks too
SETTLED = 2.0


def sha256(path: Path) -> bytes:
    """The file's hash, from what is kept where that is of this path, size and time. Raises OSError as reading does."""
    found = path.stat()
    if found.st_size < LEAST:
        return _computed(path)
    kept = _read(path)
    if kept and kept["of"] == _state(path, found):
        return bytes.fromhex(kept["sha256"])
    began = time.time()
    digest = _computed(path)
    # what changed while it was read, or could have without a trace, is not kept
    if began - found.st_mtime > SETTLED and _state(path, path.stat()) == _state(path, found):
        _write(path, found, digest)
    return digest


def keep(path: Path, digest: bytes) -> None:
    """Keep the hash of a file that this process has just made, and that nobody else writes."""
    if (found := path.stat()).st_size >= LEAST:
        _write(path, found, digest)


def _computed(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _state(path: Path, found: os.stat_result) -> list[Any]:
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _note(path: Path) -> Path:
    return cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(_note(path).read_text(encoding="utf-8"))
        if len(bytes.fromhex(note["sha256"])) == 32 and note["of"]:
            return note
    return None


def _write(path: Path, found: os.stat_result, digest: bytes) -> None:
    note = _note(path)
    with contextlib.suppress(OSError):  # nowhere to keep it: it is computed again
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as draft:
            json.dump({"of": _state(path, found), "sha256": digest.hex()}, draft)
        os.replace(draft.name, note)
