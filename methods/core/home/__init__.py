"""Where things lie, and what they are called: in a checkout, which runs in place, and in an installed package.

The wheel holds the checkout's folders inside the package `kvfrontier`, so that no other `kernels` or `tasks` is in the
way of ours nor ours of theirs. What is read (conf, assets, sources) lies beside the code in both. What is made lies in
a checkout, but never in an installed package: its place is the user's data folder. Names in YAML files, in records and
in a user's own files are a checkout's, such as methods.snapkv.SnapKV.
"""

import os
import sysconfig
from pathlib import Path

#: folders of modules
FOLDERS = ("methods", "tasks", "runners", "kernels", "analysis")
#: what stands before a module's name here: nothing in a checkout, "kvfrontier." in an installed package
PREFIX = __name__.removesuffix("methods.core.home")
#: the folder of conf and assets: the checkout, or the installed package
ROOT = Path(__file__).resolve().parents[3]
#: the folder that modules are imported from
ABOVE = ROOT.parent if PREFIX else ROOT


def _made() -> Path:
    if not PREFIX:
        return ROOT
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share").expanduser() / "kvfrontier"


#: the folder of what is made and kept: artefacts, pins
MADE = _made()
#: names the folder of what can be made again; else it is below XDG_CACHE_HOME or ~/.cache
CACHE = "KVFRONTIER_CACHE"
#: what a user types before settings
COMMAND = "kvfrontier run" if PREFIX else "python run.py"


def cache_folder() -> Path:
    """The user's folder of what can be made or fetched again: notes, converted and fetched models."""
    below = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get(CACHE) or os.path.join(below, "kvfrontier")).expanduser()


def here(name: str) -> str:
    """A dotted name of a checkout as it is imported here."""
    return f"{PREFIX}{name}" if name.partition(".")[0] in FOLDERS else name


def plain(name: str) -> str:
    """A dotted name as a checkout has it."""
    bare = name.removeprefix(PREFIX)
    return bare if bare.partition(".")[0] in FOLDERS else name


def installed(path: Path) -> bool:
    """Whether a file belongs to Python or to a package that was installed."""
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    library = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    return any(path.resolve().is_relative_to(one) for one in library)
