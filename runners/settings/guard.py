"""What Hydra would import and call by itself, checked in every configuration as it is composed.

Hydra builds callbacks, sweepers, launchers and loggers from its own part of the configuration before any code of ours
sees it, with whatever class a file names. A configuration that cannot be composed at all is said in one line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from methods.core.build import resolve
from methods.core.errors import UserError
from methods.core.typed import TARGET, no_target, shown
from runners.settings.composing import once

PLUGINS = ("sweeper", "launcher")
LOGGING = ("hydra_logging", "job_logging")


def install() -> None:
    """From now on, whatever Hydra composes in this process is checked, and a command composed once; once is enough."""
    if not hasattr(ConfigLoaderImpl.load_configuration, "__wrapped__"):
        load = once(ConfigLoaderImpl.load_configuration)
        ConfigLoaderImpl.load_configuration = _guarded(load)  # type: ignore[method-assign]


def _guarded(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    @functools.wraps(load)
    def loaded(*args: Any, **kwargs: Any) -> DictConfig:
        try:
            cfg = load(*args, **kwargs)
        except (UserError, HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # of a file: encoding, YAML, permission
            raise UserError(f"a file of the configuration cannot be read: {' '.join(str(error).split())}") from error
        check_hydra(cfg.hydra)
        return cfg

    return loaded


def check_hydra(hydra: DictConfig) -> None:
    """Raises UserError for what Hydra would call, by its part of a configuration, and is no part of Hydra."""
    from hydra.experimental.callback import Callback

    for name, node in _plain(hydra.get("callbacks"), "hydra.callbacks").items():
        key = f"hydra.callbacks.{name}"
        given = _plain(node, key)
        resolve(given.pop(TARGET, None), Callback, key)
        no_target(given, key)
    for plugin in PLUGINS:
        key = f"hydra.{plugin}"
        given = _plain(hydra.get(plugin), key)
        target = given.pop(TARGET, None)
        if not str(target).startswith(("hydra_plugins.", "hydra._internal.core_plugins.")):
            raise UserError(f"{key}.{TARGET}={shown(target)}: is no {plugin}; give hydra/{plugin}=NAME")
        no_target(given, key)
    for name in LOGGING:
        _no_call(_plain(hydra.get(name), f"hydra.{name}"), f"hydra.{name}")


def _plain(node: Any, key: str) -> dict[str, Any]:
    """A mapping as plain containers; interpolations stay as they are."""
    mapping = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise UserError(f"{key}={shown(mapping)}: give a mapping")
    return {str(name): value for name, value in mapping.items()}


def _no_call(node: Any, key: str) -> None:
    """Of a description of loggers: `()` names something to call, `class` a handler of Python's own library."""
    if isinstance(node, list):
        for i, part in enumerate(node):
            _no_call(part, f"{key}[{i}]")
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        if name == "()":
            raise UserError(f"{key}.()={shown(value)}: loggers are not made by calling something")
        if name == "class" and not (isinstance(value, str) and value.startswith(("logging.", "hydra."))):
            raise UserError(f"{key}.class={shown(value)}: give a handler of Python's logging")
        _no_call(value, f"{key}.{name}")
