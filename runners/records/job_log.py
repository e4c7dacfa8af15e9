"""The log of the job that writes a record, beside the record."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# set by a launcher whose jobs write logs: the path of this job's
LOG = "KVFRONTIER_LOG"


def link_log(folder: Path) -> None:
    """Lay a link to this job's log into a record's folder; nothing for a process without one.

    The link is relative, so that it holds when the folder of all results is moved.
    """
    log = os.environ.get(LOG)
    if log is None:
        return
    # best effort: a link that is there already, or cannot be made here, must not fail the run
    with contextlib.suppress(OSError):
        (folder / Path(log).name).symlink_to(os.path.relpath(log, folder.resolve()))
