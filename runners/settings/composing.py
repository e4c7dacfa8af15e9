"""The configurations of a command and of a sweep's cells, each composed once.

Hydra takes a tenth of a second for every configuration. It is asked once for each choice of files; what a cell sets in
its method is set in a copy, by the function by which Hydra does it. The sweeper composes all cells to refuse a mistyped
name before anything runs, and the jobs that run in its process take what it has composed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from methods import SHARED

#: settings of a cell that choose no file and are set in no method
NUMBERS = ("budget", "seed")
CONF = Path(__file__).resolve().parents[2] / "conf"
# what Hydra adds to a command's words once it knows its mode
MODES = ([], ["hydra.mode=RUN"], ["hydra.mode=MULTIRUN"])

_SHARED = tuple(f"method.{key}{end}" for key in SHARED for end in "=.")

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
        parsed = OverridesParser.create().parse_overrides(with_shared(knobs))
        ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=False)
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
        return cfg


def with_shared(words: Sequence[str]) -> list[str]:
    """The overrides; those of knobs that methods take whether their YAML names them or not may add them."""
    return [f"++{word}" if word.startswith(_SHARED) else word for word in words]


def once(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """`ConfigLoaderImpl.load_configuration`, which Hydra calls for a command's mode and then again to run it.

    The second call takes what the first has composed, with the mode that Hydra adds.
    """
    first: WeakKeyDictionary[ConfigLoader, tuple[str | None, list[str], DictConfig]] = WeakKeyDictionary()

    @functools.wraps(load)
    def loaded(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        if self in first and validate_sweep_overrides:
            name, words, cfg = first.pop(self)
            added = overrides[len(words) :]
            same = (name, words) == (config_name, overrides[: len(words)]) and added in MODES
            if same and not OmegaConf.missing_keys(cfg.hydra.runtime.choices):  # what is missing, Hydra refuses
                parse = OverridesParser.create().parse_overrides
                self.validate_sweep_overrides_legal(parse(overrides), run_mode=run_mode, from_shell=from_shell)
                self._apply_overrides_to_config(parse(added), cfg)
                cfg.hydra.overrides.hydra.extend(added)
                return cfg
        given = with_shared(overrides)
        cfg = load(self, config_name, given, run_mode, from_shell, validate_sweep_overrides)
        typed = dict(zip(given, overrides, strict=True))
        for words in (cfg.hydra.overrides.task, cfg.hydra.overrides.hydra):
            words[:] = [typed.get(word, word) for word in words]
        if not validate_sweep_overrides:
            first[self] = config_name, list(overrides), cfg
        return cfg

    return loaded


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
