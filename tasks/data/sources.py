"""Where a task's rows come from: a folder, a zip, a single file or the Hugging Face hub."""

import os
import ssl
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from methods.core.reading import parse_json, read_bytes
from tasks.data import pins

HUB_REPO = "THUDM/LongBench"  # a script and data.zip; datasets no longer runs scripts, so the zip is read directly
HUB_PROBE_S = 5.0
MOST_UNPACKED = 512 << 20  # bytes of one member of an archive; a few kilobytes can unpack to any size


@dataclass(frozen=True)
class DataFile:
    """A JSONL file that was found but not yet read. where: its path, as errors print it."""

    where: str
    read: Callable[[], bytes]


def locate(path: Path) -> dict[str, DataFile]:
    """The JSONL files that a path offers, by file name without `.jsonl`.

    A folder offers its own `.jsonl` files, else those in its `data/`, else those in its `data.zip`.
    Raises UserError if there is nothing at the path, or nothing of use.
    """
    shown = path.absolute()
    if path.is_dir():
        for folder in (path, path / "data"):
            if files := sorted(folder.glob("*.jsonl")):
                return {file.stem: DataFile(str(file), _reader(file)) for file in files}
        if (path / "data.zip").is_file():
            return _members(path / "data.zip")
        raise UserError(f"task.data={path}: no .jsonl file in {shown} or {shown / 'data'}, and no data.zip; {_HOW}")
    if path.is_file():
        return _members(path) if path.suffix == ".zip" else {path.stem: DataFile(str(path), _reader(path))}
    raise UserError(f"task.data={path}: nothing at {shown}; {_HOW}")


_HOW = (
    f"put LongBench's <subset>.jsonl files or the data.zip of the hub's dataset {HUB_REPO} there, "
    "or use task.data=bundled or task.data=hub"
)


def _reader(file: Path) -> Callable[[], bytes]:
    return lambda: read_bytes(file)


def _members(path: Path) -> dict[str, DataFile]:
    def reader(member: str) -> Callable[[], bytes]:
        def read() -> bytes:
            try:
                with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                    raw = file.read(MOST_UNPACKED + 1)  # whatever size the archive claims
            except (OSError, RuntimeError, EOFError, zlib.error, NotImplementedError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: {member} cannot be read ({error})") from error
            if len(raw) > MOST_UNPACKED:
                raise UserError(
                    f"{path}: {member} is larger than {MOST_UNPACKED >> 20} MiB; unpack it, and give the folder"
                )
            return raw

        return read

    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in sorted(archive.namelist()) if name.endswith(".jsonl")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a zip file that can be read ({error})") from error
    if not names:
        raise UserError(f"{path}: holds no .jsonl file; {_HOW}")
    return {Path(name).stem: DataFile(f"{path}:{name}", reader(name)) for name in names}


def parse_rows(raw: bytes, where: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, one per line; blank lines are skipped.

    Raises UserError that names the file and the line of the first thing that is not a JSON object.
    """
    rows = []
    # not splitlines: JSON strings may hold U+2028 and the like unescaped
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where_line = f"{where}, line {number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where_line}: not JSON in UTF-8 ({error})") from error
        rows.append(parse_json(text, where_line))
    return rows


def from_hub(revision: str) -> Path:
    """LongBench's data.zip in the hub's cache, downloaded if it is not there yet.

    revision: a branch, tag or commit of the dataset, or "pinned".
    Raises UserError within seconds if the hub cannot be reached.
    """
    from huggingface_hub import constants, hf_hub_download

    trouble: str | None = None

    def get(at: str | None, cached: bool) -> Path:
        asked = at or "main"
        got = hf_hub_download(HUB_REPO, "data.zip", repo_type="dataset", revision=asked, local_files_only=cached)
        return Path(got)

    def read(at: str | None) -> Path:
        nonlocal trouble
        if at and pins.COMMIT.fullmatch(at):  # which never changes: what is in the cache need not be asked for
            try:
                return get(at, cached=True)
            except OSError:
                pass
        trouble = hub_trouble()
        return get(at, cached=trouble is not None)

    try:
        return pins.follow(HUB_REPO, read, hub_commit) if revision == pins.PINNED else read(revision)
    except OSError as error:
        problem = pins.told(error, trouble)
    raise UserError(
        f"task.data=hub: {HUB_REPO} at task.revision={revision} is not in the cache and cannot be fetched from "
        f"{constants.ENDPOINT} ({problem}); offline, give task.data=DIR with that dataset's data.zip or its .jsonl "
        "files, or use task.data=bundled"
    )


def hub_commit(path: Path) -> str:
    """The commit that a file of the hub's cache belongs to: the folder it lies in."""
    return path.parent.name


def hub_trouble() -> str | None:
    """Why nothing can be fetched from the hub, or None; within seconds, of which its client's own retries take 23."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)


@contextmanager
def cached_only(on: bool) -> Iterator[None]:
    """While it lasts and `on`, the libraries of the hub look into their caches and ask nobody."""
    if not on:
        yield
        return
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def unreachable(url: str, timeout_s: float = HUB_PROBE_S) -> str | None:
    """Why a server does not answer within the time, or None if it does."""
    outcome = [f"no answer within {timeout_s:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
            outcome[0] = ""
        except urllib.error.HTTPError:
            outcome[0] = ""  # it answered
        except urllib.error.URLError as error:
            # certificates are the real client's business: it may know others
            outcome[0] = "" if isinstance(error.reason, ssl.SSLError) else str(error.reason)
        except OSError as error:
            outcome[0] = str(error) or type(error).__name__

    # a thread, because looking up a name has no time limit of its own
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return outcome[0] or None


def expand(path: str) -> Path:
    """A path as typed, with `~` and environment variables filled in. Raises UserError if it is empty."""
    if not path.strip():
        raise UserError("task.data is empty; give a path, or leave it out")
    return Path(os.path.expandvars(path)).expanduser()
