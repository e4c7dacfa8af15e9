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
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto

from methods.core import bind, home
from methods.core.adapters import ADAPTERS
from methods.core.binding import self_check
from methods.core.binding.decoder import CannotBind, Decoder, decoder_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
PICTURES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_PICTURE_ROPE = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}
_TWO_ROPES = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
_INDEXED = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_CONV = {"layer_types": ["conv", "full_attention"] * 16}
_SIGLIP = {"vision_config": {"model_type": "siglip_vision_model"}}

#: settings for configurations whose defaults make no model, or one that does not run or that nobody has
OWN: dict[str, dict[str, Any]] = {
    "aya_vision": _SIGLIP,
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"text_config": _TWO_ROPES},
    "cohere_compass_text": _TWO_ROPES,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * 32}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {"text_config": {"moe_intermediate_size": 64, "num_experts": 4, "top_k_experts": 2}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "fast_vlm": _SIGLIP,
    "glm46v": {"text_config": _PICTURE_ROPE},
    "glm4v": {"text_config": _PICTURE_ROPE},
    "glm4v_moe": {"text_config": {"head_dim": 128, **_PICTURE_ROPE}},
    "glmga": {"text_config": _PICTURE_ROPE},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": {**_ROPE, "mrope_section": [16] * 4}}},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "lfm2_vl": {"text_config": _CONV},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "perception_lm": {"vision_config": {"model_type": "siglip_vision_model", "model_args": {"embed_dim": 64}}},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"is_decoder": True},
    "step3p7": {"text_config": {"sliding_window": 512}},
}


#: entries whose class is not found by their configuration -> the type of configuration that it takes
TAKES = {"evolla": "evolla", "musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    verdict: one of SECTIONS.  row: of the page: what the attention is where it is equal, a reason elsewhere.
    """

    name: str
    verdict: str
    row: str


#: verdict -> title on the page, head of the first column
SECTIONS = {
    "equal": ("Equal to the untouched model", "attention"),
    "refused": ("Refused by name", "reason"),
    "no copy": ("Refused by name, since no small copy of the defaults answers texts", "what stands in the way"),
    "none": ("Not tried here, decided by the self-check when such a model is first bound", "why"),
}


def entries() -> list[str]:
    """The model types of both mappings."""
    return sorted({*CAUSAL, *PICTURES})


def outcome(name: str) -> Outcome:
    """Try one architecture. Only what a model does when it is made may fail; anything else is a mistake of ours."""
    try:
        model = _made(name)
    except Exception as error:  # each configuration and each missing package fails in its own way
        said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        return Outcome(name, "none", textwrap.shorten(re.sub(r"<class .*", "…", said), 120, placeholder=" …"))
    try:
        decoder = decoder_of(model, ADAPTERS)
        self_check.self_check(model, decoder, bind.full, ADAPTERS)
    except CannotBind as refused:
        return _refused(name, refused.reason)
    return Outcome(name, "equal", _kind(decoder))


def _refused(name: str, reason: str) -> Outcome:
    if match := re.match(r"no small copy of it could be tried out \((.*)\);", reason):
        return Outcome(name, "no copy", re.sub(r"\w+\.forward", "forward", match[1]))
    # classes, shapes, numbers of layers and sizes of a difference are this model's own
    reason = re.sub(r" \(.*| by [\d.e+-]+ of the logits' spread.*", "", reason)
    return Outcome(name, "refused", re.sub(r"^\d+ of its \d+ layers", "not all of its layers", reason))


def _made(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model(TAKES.get(name, name), **OWN.get(name, {}))
    auto = AutoModelForCausalLM if name in CAUSAL else AutoModelForImageTextToText
    with torch.device("meta"):
        if name in TAKES:
            return getattr(transformers, {**PICTURES, **CAUSAL}[name])._from_config(config).eval()
        return auto.from_config(config).eval()


def _kind(decoder: Decoder) -> str:
    """What an attention that is equal does, in the words of the page."""
    config = decoder.config
    heads, kv_heads = config.num_attention_heads, bind.n_kv_heads(config)
    shared = (
        "one key head" if kv_heads == 1 else "grouped heads" if kv_heads < heads else "as many key heads as query heads"
    )
    kinds = set(getattr(config, "layer_types", None) or ())
    window = "sliding" in str(kinds) or (not kinds and getattr(config, "sliding_window", None))
    sees = "windows" if window and "full_attention" not in kinds else "windows and all" if window else "all"
    reached = "an adapter" if config.model_type in ADAPTERS else "the attention interface"
    return f"{reached}; {shared}; sees {sees}"


def page(outcomes: Iterable[Outcome]) -> str:
    """docs/architectures.md."""
    listed = list(outcomes)
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in listed:
        groups[one.verdict][one.row].append(one.name)
    lines = [
        "# Architectures",
        "",
        f"The {len(listed)} entries of the causal-LM and image-text-to-text mappings of transformers "
        f"{transformers.__version__}, each tried on a small random copy of its default configuration, texts only. What "
        "decides is what the attention does, not what the architecture is called, so that another configuration of "
        "the same name may fare otherwise. Your own is tried the same way when it is first used (`model.check=auto`), "
        "and what passes is remembered below `~/.cache/kvfrontier` "
        "(`KVFRONTIER_CACHE`). `python -m benchmarks.architectures` writes this page.",
    ]
    for verdict, (title, head) in SECTIONS.items():
        rows = groups[verdict]
        if rows:
            names = sum(map(len, rows.values()))
            lines += ["", f"## {title}", f"{names} of {len(listed)}.", "", f"| {head} | architectures |", "|---|---|"]
            lines += [f"| {row.replace('|', '/')} | {', '.join(sorted(rows[row]))} |" for row in sorted(rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try every architecture and write the page; prints each outcome."""
    names = sys.argv[1:] or entries()
    transformers.logging.set_verbosity_error()
    outcomes = []
    with tempfile.TemporaryDirectory() as fresh:
        os.environ[home.CACHE] = fresh
        for name in names:
            outcomes.append(outcome(name))
            print(outcomes[-1], flush=True)
    if not sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
