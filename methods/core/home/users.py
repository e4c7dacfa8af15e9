"""The user's own files, written for a checkout: found, and where the package is installed read with imports to match.

`from methods.core.eviction import Eviction` in such a file is of the module that is kvfrontier.methods.core.eviction
there. The file stays as it is, and no module `methods` is made that other code would meet. A name that the package does
not have, such as one of an installed distribution that is called `kernels` too, is left alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from itertools import product
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from methods.core.home import FOLDERS, PREFIX, ROOT, here, installed
from methods.core.home.imports import held, mapped

#: folders of the user's own files, for this process and those that it starts
OWN = "KVFRONTIER_OWN"


def announce(folders: Sequence[str]) -> None:
    """Look for the user's own modules in these folders of YAML files, here and in processes that this one starts."""
    os.environ[OWN] = os.pathsep.join(str(Path(folder).expanduser().absolute()) for folder in folders)


def load(name: str) -> ModuleType:
    """The module of a name that a `_target_` has, ours or the user's own. Raises what importing it raises."""
    _reach()
    with files_read():
        return importlib.import_module(here(name))


@contextlib.contextmanager
def files_read() -> Iterator[None]:
    """Read imports of ours in the user's own files as what they are here."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _reach() -> None:
    """Find modules in the folders that were announced, and methods/X.py and tasks/X.py in these or beside them."""
    announced = [Path(folder) for folder in os.environ.get(OWN, "").split(os.pathsep) if folder]
    sys.path += [str(folder) for folder in announced if str(folder) not in sys.path]
    for top, parent in product(("methods", "tasks"), [around for one in announced for around in (one, one.parent)]):
        folders: Any = importlib.import_module(here(top)).__path__
        if (parent / top).is_dir() and str(parent / top) not in folders:
            folders.append(str(parent / top))  # behind our own


class _Finder(MetaPathFinder):
    """Python's own finder, whose files of the user's own are read with imports of ours as they are here."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if not PREFIX:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader or spec.origin is None:
            return None
        file = Path(spec.origin)
        if installed(file) or file.resolve().is_relative_to(ROOT):
            return None
        spec.loader = _Reader(name, spec.origin)
        spec.cached = None
        return spec


class _Reader(SourceFileLoader):
    """A file whose imports of ours are read as what they are here; its bytecode is not kept, for it is the file's."""

    def get_code(self, name: str) -> CodeType:
        path = self.get_filename(name)
        # beside our own modules the user's own methods/X.py, which import one another by the same names
        folders = [folder for top in ("methods", "tasks") for folder in importlib.import_module(here(top)).__path__]
        roots = dict.fromkeys(Path(folder).parent for folder in folders)
        ours = [held(root, FOLDERS) for root in roots]
        source = importlib.util.decode_source(self.get_data(path))
        return self.source_to_code(mapped(source, lambda *name: any(is_held(*name) for is_held in ours)), path)
