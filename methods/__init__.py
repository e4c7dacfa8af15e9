"""KV-cache methods: one paper per file, one YAML per method in conf/method."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from methods.core.build import Part, arguments_of, check_part, resolve
from methods.core.errors import NotHere, UserError
from methods.core.typed import TARGET, conform, shown

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from methods.core.contract import Method

#: knobs that every method which drops slots takes, whether its YAML names them or not
SHARED = ("pin", "score_by", "draw", "decode")
#: what a method's YAML holds beside the arguments of its class: the points of its frontier, how it is trained, and
#: whether other methods are measured against it
BLOCKS = ("sweep", "train", "reference")
_YAMLS = Path(__file__).resolve().parent.parent / "conf" / "method"


def method_names() -> list[str]:
    """All methods that can be named: the files of conf/method."""
    return sorted(path.stem for path in _YAMLS.glob("*.yaml"))


def load_method(name: str, *, cache_dtype: str = "auto", **knobs: Any) -> Method:
    """The method `name` with its YAML's defaults, some knobs changed: load_method("snapkv", budget=0.25, window=16).

    cache_dtype: of the numbers that its caches hold: auto (as the model makes them), float32, float16 or bfloat16.
    Raises UserError for a name without a YAML, listing the names, and for a knob that the YAML does not have, but for
    those that all methods of its kind take.
    """
    from omegaconf import OmegaConf

    if name not in method_names():
        raise UserError(f"method={name}: no such method; there are {', '.join(method_names())}")
    config = {key: value for key, value in _plain(name).items() if key not in BLOCKS}
    for key in knobs:
        if key not in config and key not in SHARED:
            raise UserError(f"method.{key}={knobs[key]}: {name} has no such knob; it has {', '.join(map(str, config))}")
    # what conf/config.yaml holds on the top level for the YAMLs to refer to
    top = {"budget": knobs.get("budget", 0.5), "seed": knobs.get("seed", 0)}
    whole = OmegaConf.create({**top, "method": config})
    whole.method.merge_with(knobs)
    method = build_method(name, cast("dict[str, Any]", OmegaConf.to_container(whole.method, resolve=True)))
    return method if cache_dtype == "auto" else method.holding_in(cache_dtype)


def build_method(name: str, config: dict[str, Any]) -> Method:
    """The method that a resolved YAML describes. Raises UserError for a knob that cannot work."""
    method: Method = method_part(config).make()
    method._name = name  # type: ignore[attr-defined]
    return method


def method_part(config: Any) -> Part:
    """The class and the checked knobs of a resolved YAML; its blocks `sweep` and `train` are for runners.

    Raises UserError for a knob that is unknown or of another type, and for a class that is no method.
    """
    from methods.core.contract import Method  # which imports torch: a mistyped key must not wait for it

    if isinstance(config, dict):
        conform(config.get("sweep"), dict[str, list[Any]] | None, "method.sweep")
        config = {key: value for key, value in config.items() if key not in BLOCKS}
        _check_shared(config)
    return check_part(config, Method, "method")


def _check_shared(config: dict[str, Any]) -> None:
    """Raises NotHere for a knob of methods that drop slots at one that does not."""
    from methods.core.contract import Method

    given = [key for key in SHARED if key in config]
    if not given or not isinstance(config.get(TARGET), str):
        return
    kind = resolve(config[TARGET], Method, "method")
    lacking = next((key for key in given if key not in arguments_of(kind)[0]), None)
    if lacking is not None:
        raise NotHere(
            f"method.{lacking}={shown(config[lacking])}: {kind.__name__} ranks no slots that could be pinned or drawn "
            f"instead; leave method.{lacking} out"
        )


def method_yaml(name: str) -> DictConfig:
    """A method's YAML over the YAMLs it starts from, unresolved."""
    from omegaconf import OmegaConf

    return OmegaConf.create(_plain(name))


def _plain(name: str) -> dict[str, Any]:
    """`method_yaml` as plain containers, which are not to be changed."""
    from omegaconf import OmegaConf

    path = _YAMLS / f"{name}.yaml"
    config = dict(_read(path, path.stat().st_mtime_ns))
    bases = [base for base in config.pop("defaults", []) if base != "_self_"]
    if not bases:
        return config
    merged = OmegaConf.merge(*map(_plain, bases), config)
    return cast("dict[str, Any]", OmegaConf.to_container(merged))


@cache
def _read(path: Path, changed: int) -> dict[str, Any]:
    """A file as it was when it was last changed: reading it takes longer than making the method."""
    from omegaconf import OmegaConf

    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(path)))
