"""Our sweeper and launchers, for Hydra to find.

Beside run.py Hydra finds them by itself: it imports all that lies in folders `hydra_plugins` on Python's path. An
installed package has them inside, where no other package meets them, and tells Hydra of them.
"""

from __future__ import annotations

import importlib

from hydra.core.plugins import Plugins

from methods.core.home import PREFIX

OURS = (
    "hydra_plugins.grouped_sweeper.GroupedSweeper",
    "hydra_plugins.local_launcher.LocalLauncher",
    "hydra_plugins.slurm_launcher.SlurmLauncher",
)


def register() -> None:
    """Let Hydra make an installed package's plugins, under the names that conf has; those whose packages are here."""
    if not PREFIX:
        return
    known = Plugins.instance()
    for target in OURS:
        module, _, name = target.rpartition(".")
        try:
            kind = getattr(importlib.import_module(f"{PREFIX}{module}"), name)
        except ModuleNotFoundError as error:
            if str(error.name).startswith(PREFIX):
                raise
            continue  # an extra that is not installed; naming the launcher says so
        known.register(kind)
        known.class_name_to_class[target] = kind
