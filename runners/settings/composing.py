"""The configurations of a sweep's cells, each composed once.

Hydra takes a tenth of a second for every configuration. It is asked once for each choice of files; what a cell sets in
its method is set in a copy, by the function by which Hydra does it. The sweeper composes all cells to refuse a mistyped
name before anything runs, and the jobs that run in its process take what it has composed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

#: settings of a cell that choose no file and are set in no method
NUMBERS = ("budget", "seed")
CONF = Path(__file__).resolve().parents[2] / "conf"

# by the loader of a command, so that they end with it
_COMPOSED: WeakKeyDictionary[ConfigLoader, dict[tuple[str, ...], DictConfig]] = WeakKeyDictionary()


class Composer:
    """Composes the cells of one command.

    hydra: the command's overrides of Hydra's own settings, such as its search path.
    """

    def __init__(self, loader: ConfigLoader, hydra: Sequence[str]):
        self.loader, self.hydra = loader, list(hydra)
        self._composed = _COMPOSED.setdefault(loader, {})

    def __call__(self, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """The configuration of a cell but for budget and seed, and the values that the cell gives to these two.

        The same object for cells that differ in the two numbers only. Raises what Hydra raises.
        """
        setting, numbers = numbers_apart(overrides)
        if setting not in self._composed:
            self._composed[setting] = self._set_up(setting)
        return self._composed[setting], numbers

    def _set_up(self, setting: tuple[str, ...]) -> DictConfig:
        knobs = [word for word in setting if word.lstrip("+~").startswith("method.")]
        files = tuple(word for word in setting if word not in knobs)
        if files not in self._composed:
            self._composed[files] = self.loader.load_configuration(
                "config", [*self.hydra, *files], RunMode.RUN, from_shell=False
            )
        if not knobs:
            return self._composed[files]
        cfg = copy.deepcopy(self._composed[files])
        parsed = OverridesParser.create().parse_overrides(knobs)
        ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=False)
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
        return cfg


@contextlib.contextmanager
def composer(hydra: Sequence[str]) -> Iterator[Composer]:
    """The composer of this process's command; of the files that ship, in a worker that has no command of its own."""
    begun = GlobalHydra.instance().is_initialized()
    with contextlib.nullcontext() if begun else initialize_config_dir(str(CONF), version_base="1.3"):
        yield Composer(GlobalHydra.instance().config_loader(), hydra)


def numbers_apart(cell: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The overrides that choose files and set up a method, and the values of `budget` and `seed`."""
    plain = tuple(override for override in cell if override.partition("=")[0] not in NUMBERS)
    rest = [OverridesParser.create().parse_override(override) for override in cell if override not in plain]
    return plain, {override.key_or_group: override.value() for override in rest}
