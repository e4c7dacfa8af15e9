"""Configurations with one setting made wrong, and what became of each: one line, or a run that the value allows."""

from __future__ import annotations

import copy
import math
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from run import CONF
from runners.settings.composing import with_shared
from runners.settings.explain import EXPECTED, explain

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "1e20": 1e20,
    "10 ** 20": 10**20,
    "nan": math.nan,
    "-inf": -math.inf,
    "text": "abc",
    "empty": "",
    "no text": "a\nb\0\udcff",
    "[]": [],
    "[1, 2]": [1, 2],
    "list of lists": [[], [{}]],
    "mapping": {"a": 1},
    "callable": {"_target_": "os.getcwd"},
    "library": {"_target_": "pandas.read_pickle", "_partial_": True, "filepath_or_buffer": "x"},
}


def composed(*overrides: str) -> DictConfig:
    """A configuration as run.py has it, and Hydra told so."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=with_shared(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def keys(node: Any, above: str = "") -> Iterator[str]:
    """Every key of a configuration, groups as well."""
    if not isinstance(node, DictConfig):
        return
    for name in node:
        key = f"{above}.{name}" if above else str(name)
        yield key
        yield from keys(node._get_node(name), key)


def changed(cfg: DictConfig, key: str, value: Any) -> DictConfig:
    """A copy in which one setting has another value."""
    made = copy.deepcopy(cfg)
    with open_dict(made):
        OmegaConf.update(made, key, value, merge=False, force_add=True)
    return made


def sample(names: Sequence[str], key: str, n: int) -> list[str]:
    """n of the names, the same ones for a key at every call."""
    first = zlib.crc32(key.encode())
    return [names[(first + i * 7) % len(names)] for i in range(min(n, len(names)))]


def outcome(attempt: Callable[[], Any], key: str) -> str | None:
    """What is wrong with how an attempt ended; None if it ran, or was refused in one line that names the key."""
    try:
        attempt()
    except EXPECTED as error:
        text = explain(error)
        if len(text.splitlines()) != 1 or not text.isprintable():
            return f"not one line: {text!r}"
        names = key.split(".")
        named = names[-1] in text or names[0] in text
        return None if named else f"does not name {key}: {text}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return None
