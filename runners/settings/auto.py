"""The model of a command that names none: a real one where its file is on this machine, else the one that ships.

    python -m runners.settings.auto        brings the real one if it can be had now; part of make run

conf/config.yaml takes the choice out of the environment, so that whatever composes a command's cells, here or in a
process that it starts, takes the same one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from runners.engine.sources import fetched

#: names the choice, whatever lies on this machine
NAME = "KVFRONTIER_MODEL"
REAL, SMALL = "smollm2-135m", "reference"
AUTO = "auto"
# settings that name another checkpoint: all else about it is then as the small one's file says, which says nothing
OTHERS = ("model.path", "model.shape")


@contextlib.contextmanager
def decided(words: Sequence[str]) -> Iterator[list[str]]:
    """Inside the block the choice is made; gives the words of a command line without `auto`."""
    keys = {_key(word) for word in words}
    before = os.environ.get(NAME)
    choice = SMALL if keys & set(OTHERS) else _named() or (REAL if _is_here() else SMALL)
    os.environ[NAME] = choice
    try:
        kept = "experiment" in keys  # which may name another model, that auto is typed to overrule
        yield [word for word in (_without(word, choice, kept) for word in words) if word]
    finally:
        if before is None:
            del os.environ[NAME]
        else:
            os.environ[NAME] = before


def settled(word: str) -> str:
    """An override with the choice in the place of `auto`, inside `decided`."""
    return f"model={os.environ[NAME]}" if word == f"model={AUTO}" else word


def named_by(hydra: HydraConf | DictConfig) -> list[str]:
    """The override that names the model which a command took without naming one; none where it says it."""
    if any(_key(word) in ("model", *OTHERS) for word in hydra.overrides.task):
        return []
    return [f"model={hydra.runtime.choices['model']}"]


def told(split: str = "") -> str | None:
    """What the present command took and why, in one line; None where it names a model itself.

    split: the name of its task.
    """
    for word in named_by(HydraConfig.get()):
        what = f"{word} on {split}" if split else word
        if word == f"model={REAL}":
            return f"{what}: its file is here, else model={SMALL}"
        if word == f"model={SMALL}":
            return f"{what}: small; {fetched.COMMAND} brings a real one"
        return f"{what}: {NAME} names it"
    return None


def bring() -> None:
    """Have the real model if it is not here and nothing else is named; one line says how it went, whatever happens."""
    if _named() or fetched.place() is not None:
        return
    print(f"{fetched.COMMAND}: bringing {fetched.SMOLLM2.name} (98 MB) ...", end=" ", flush=True)
    # without a network it has to be known soon
    soon = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "10", **os.environ}
    done = subprocess.run([sys.executable, "-m", fetched.__name__], env=soon, capture_output=True)
    print("done" if done.returncode == 0 else f"not now; {fetched.COMMAND} says why", flush=True)


def _named() -> str | None:
    name = os.environ.get(NAME, "").strip()
    return None if name in ("", AUTO) else name


def _is_here() -> bool:
    """Whether the real model can be read: it is here, and so is what reads a GGUF file."""
    place = fetched.place()
    return place is not None and (place.is_dir() or find_spec("gguf") is not None)


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _without(word: str, choice: str, kept: bool) -> str:
    """A word with the choice in the place of `auto`; nothing for model=auto itself unless that is kept."""
    key, _, value = word.partition("=")
    if key != "model":
        return word
    if value.strip() == AUTO and not kept:
        return ""
    return f"{key}={','.join(choice if one.strip() == AUTO else one for one in value.split(','))}"


if __name__ == "__main__":
    try:
        bring()
    except KeyboardInterrupt:
        print("stopped", flush=True)
        sys.exit(130)
