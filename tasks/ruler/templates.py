"""RULER's wording, read from the source files of the installed lm_eval without running them, and set right.

Paper: Hsieh et al. 2024, RULER: what's the real context size of your long-context language models?, arXiv:2404.06654.
Here:  running lm_eval's modules would download data. Two answer prefixes differ from the benchmark's and are mended;
       the needle tasks' prefix is no constant there, and is written out here.
"""

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from methods.core.errors import UserError
from tasks.prompts import lm_eval_folder

# of every template and prefix after its correction
DIGESTS = {"niah": "a67f037b", "vt": "491e454f", "cwe": "0b33a12e", "fwe": "65092506", "qa": "1ba07307"}


@dataclass(frozen=True)
class Wording:
    """template: with {context} and {query}.  prefix: the start of the answer.  max_new_tokens: of the answer."""

    template: str
    prefix: str
    max_new_tokens: int


@cache
def wording(family: str) -> Wording:
    """The prompt of "niah", "vt", "cwe", "fwe" or "qa". Raises UserError if the installed lm_eval has another one."""
    if family == "niah":
        prefix = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
        words = Wording(_constant("niah_utils", "TEMPLATE"), prefix, 128)
    else:
        config = _constant(f"{family}_utils", "CONFIG")
        config = config.get("variable_tracking", config)
        prefix = config["answer_prefix"].replace("assgined", "assigned")
        if family == "qa":
            prefix = f" {prefix}"
        words = Wording(config["template"], prefix, config["tokens_to_generate"])
    digest = hashlib.sha256(f"{words.template}\0{words.prefix}\0{words.max_new_tokens}".encode()).hexdigest()[:8]
    if digest != DIGESTS[family]:
        raise UserError(f"ruler: lm_eval words the prompts of {family} in another way; install lm_eval 0.4.13")
    return words


@cache
def needle() -> str:
    """The sentence that holds a value: {type_needle_v}, {key}, {value}."""
    return _constant("prepare_niah", "NEEDLE")


@cache
def noise() -> str:
    """Five short sentences that are repeated as haystack."""
    function = next(
        node for node in _tree("prepare_niah").body if isinstance(node, ast.FunctionDef) and node.name == "get_haystack"
    )
    return next(
        node.value.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and _names(node) == ["haystack"] and isinstance(node.value, ast.Constant)
    )  # type: ignore[return-value]


def _constant(module: str, name: str) -> Any:
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and _names(node) == [name]:
            return ast.literal_eval(node.value)
    raise UserError(f"ruler: the installed lm_eval has no {name} in ruler/{module}.py; install lm_eval 0.4.13")


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


@cache
def _tree(module: str) -> ast.Module:
    path = lm_eval_folder("ruler") / f"{module}.py"
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise UserError(f"ruler: the installed lm_eval has no {path} ({error.strerror})") from error
