"""Which architectures of the installed transformers our caches can go under: `python -m benchmarks.architectures`.

Every entry of the mappings to causal language models and to models of images and text is made from its default
configuration, without weights, and tried as `bind` tries it: by structure, then on a small random copy whose output
under the full cache is held against the untouched copy's. The outcome is written to docs/architectures.md.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto

from runners import bind, self_check
from runners.decoder import CannotBind, Decoder, decoder_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
PICTURES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

#: settings for configurations whose defaults make no model
OWN: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    verdict: "equal", "refused", or "none" where no model could be made of it.  reason: of a refusal, or why there is
    no model.  kind: of attention, where it is equal.
    """

    name: str
    verdict: str
    reason: str = ""
    kind: str = ""


def entries() -> list[str]:
    """The model types of both mappings."""
    return sorted({*CAUSAL, *PICTURES})


def outcome(name: str) -> Outcome:
    """Try one architecture. Only what a model does when it is made may fail; anything else is a mistake of ours."""
    try:
        model = _made(name)
    except Exception as error:  # each configuration and each missing package fails in its own way
        return Outcome(name, "none", f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:120])
    try:
        decoder = decoder_of(model, bind.ADAPTERS)
        self_check.self_check(model, decoder, bind.full, bind.ADAPTERS)
    except CannotBind as refused:
        return Outcome(name, "refused", refused.reason)
    return Outcome(name, "equal", kind=_kind(decoder))


def _made(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **OWN.get(name, {}))
    auto = AutoModelForCausalLM if name in CAUSAL else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config).eval()


def _kind(decoder: Decoder) -> str:
    """What an attention that is equal does, in the words of the page."""
    config = decoder.config
    heads, own = config.num_attention_heads, bind.n_kv_heads(config)
    shared = "one key head" if own == 1 else "grouped heads" if own < heads else "as many key heads as query heads"
    kinds = set(getattr(config, "layer_types", None) or ())
    window = "sliding" in str(kinds) or (not kinds and getattr(config, "sliding_window", None))
    sees = "windows" if window and "full_attention" not in kinds else "windows and all" if window else "all"
    reached = "an adapter" if config.model_type in bind.ADAPTERS else "the attention interface"
    return f"{reached}; {shared}; sees {sees}"


def page(outcomes: Iterable[Outcome]) -> str:
    """docs/architectures.md."""
    found = list(outcomes)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in found:
        groups[one.verdict, one.kind or re.sub(r" \(.*", "", one.reason)].append(one.name)
    count = {verdict: sum(one.verdict == verdict for one in found) for verdict in ("equal", "refused", "none")}
    lines = [
        "# Architectures",
        "",
        f"The {len(found)} entries of the causal-LM and image-text-to-text mappings of transformers "
        f"{transformers.__version__}, each tried on a small random copy of its default configuration: "
        f"{count['equal']} answer under the full cache as the untouched model does, {count['refused']} are refused by "
        f"name when they are bound, of {count['none']} the defaults make no model here. What decides is what the "
        "attention does, not what "
        "the architecture is called: your own configuration is tried the same way when it is first used "
        "(`model.check=auto`), and remembered below `~/.cache/kvfrontier` (`KVFRONTIER_CACHE`). "
        "`python -m benchmarks.architectures` writes this page.",
    ]
    for verdict, title, head in (
        ("equal", "Equal to the untouched model", "attention"),
        ("refused", "Refused by name", "reason"),
        ("none", "No model of the defaults", "reason"),
    ):
        rows = sorted((kind, names) for (its, kind), names in groups.items() if its == verdict)
        if rows:
            lines += ["", f"## {title}", "", f"| {head} | architectures |", "|---|---|"]
            lines += [f"| {kind.replace('|', '/')} | {', '.join(sorted(names))} |" for kind, names in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    names = sys.argv[1:] or entries()
    transformers.logging.set_verbosity_error()
    found = []
    with tempfile.TemporaryDirectory() as fresh:
        os.environ[self_check.FOLDER] = fresh
        for name in names:
            found.append(outcome(name))
            print(found[-1], flush=True)
    if not sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
