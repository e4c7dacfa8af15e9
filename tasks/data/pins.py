"""Which commit of a hub's dataset `task.revision=pinned` reads: the one that a file names, else the newest at hand.

The file is `hub-pins.yaml` beside run.py, where the package is installed in the user's data folder; or what the
environment variable KVFRONTIER_PINS names. It has a line `owner/name: commit` per dataset, added when the dataset is
first read. Committed with the work, it lets every machine and every day read the same; a repository has one history, so
that all its configurations and splits share the line.
"""

import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from methods.core.errors import UserError
from methods.core.home import MADE

PINNED = "pinned"
COMMIT = re.compile(r"[0-9a-f]{40}")
HEAD = "# What task.revision=pinned reads of the hub's datasets. A line is added when a dataset is first read.\n"
Found = TypeVar("Found")


def pins_file() -> Path:
    """The file; it need not be there."""
    typed = os.environ.get("KVFRONTIER_PINS")
    # a link stays one
    return (Path(typed).expanduser() if typed else MADE / "hub-pins.yaml").resolve()


def read() -> dict[str, str]:
    """Commits by dataset. Raises UserError that names the file, and the line of what is not one."""
    path = pins_file()
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file; it holds the commits of task.revision=pinned, or is not there")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: needs lines of `owner/name: commit`, and has something else")
    commits: dict[str, str] = {}
    for key, value in node.value if node else []:
        where = f"{path}, line {key.start_mark.line + 1}"
        # the text of the node: a commit of digits only is no number
        if not isinstance(value, yaml.ScalarNode) or not COMMIT.fullmatch(value.value):
            raise UserError(f"{where}: {key.value} needs a commit of 40 hexadecimal digits, in lower case")
        if key.value in commits:
            raise UserError(f"{where}: {key.value} has a second commit; leave one of them")
        commits[key.value] = value.value
    return commits


def add(repo: str, commit: str) -> str:
    """Name the commit of a dataset that has none yet; the one that holds, another process's if that came first.

    A file that cannot be written is said once, and is no error. Raises UserError as `read` does.
    """
    from filelock import FileLock

    path = pins_file()
    written = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            known = read()
            if repo not in known:
                lines = yaml.safe_dump(known | {repo: commit}, allow_unicode=True)
                written.write_text(HEAD + lines, encoding="utf-8")
                os.replace(written, path)
            return known.get(repo, commit)
    except OSError as error:
        _say_unwritten(path, str(error))
        return commit


@functools.cache
def _say_unwritten(path: Path, problem: str) -> None:
    logging.getLogger(__name__).warning(
        "%s cannot be written (%s): the commits that were read are not pinned; KVFRONTIER_PINS names another file",
        path, problem,
    )  # fmt: skip


def follow(repo: str, read_at: Callable[[str | None], Found], commit_of: Callable[[Found], str]) -> Found:
    """The pinned state of a dataset; the newest one if there is no pin yet, which is then added.

    read_at: reads a commit, or with None the newest.  commit_of: the commit of what was read, "" if it is not known.
    An error about a pin has a note that names it. Raises UserError as `read` does.
    """
    pin = read().get(repo)
    if pin is None:
        newest = read_at(None)
        commit = commit_of(newest)
        pin = add(repo, commit) if COMMIT.fullmatch(commit) else commit
        if pin == commit:
            return newest
    try:
        return read_at(pin)
    except (OSError, ValueError) as error:
        error.add_note(f"{pins_file()} pins {pin}; task.revision=main takes the newest")
        raise


def told(error: BaseException, trouble: str | None) -> str:
    """What an error says in its first line, or why the hub was not asked, and the notes about a pin."""
    first = trouble or str(error).strip().split("\n")[0]
    return "; ".join([first, *getattr(error, "__notes__", [])])
