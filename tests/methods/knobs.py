"""Knobs that are not the defaults: the contract test runs every method with each of these sets too."""

from __future__ import annotations

from typing import Any

#: what belongs to the size of the contract's prompts
SNAPKV = {"window": 8, "kernel": 3, "pooling": "avg"}
#: sets of knobs by method; together they move every knob of its YAML
SETS: dict[str, list[dict[str, Any]]] = {
    "adakv": [
        {**SNAPKV, "allocator": {"alpha": 0.5, "safeguard": "release"}},
        {"allocator": {"alpha": 0.0, "safeguard": "reserve"}},
        {"pin": "boundary", "score_by": "random_in_counts"},
    ],
    "full": [],
    "h2o": [{"heavy": 0.25, "normalise": True}, {"evict": "per_chunk", "pin": "boundary"}],
    "keyformer": [
        {"recent": 0.5, "noise": "per_token", "tau_init": 1.5, "tau_end": 3.0, "new_tokens": 3},
        {"noise": "none", "compat": "official_mask"},
        {"shared": True},
        {"evict": "per_chunk"},
    ],
    "kivi": [
        {"bits": 4, "store": {"group": 16, "residual": 32, "values": "blocks", "zero": "int"}},
        {"key_bits": 8, "value_bits": 2, "store": {"residual": 32}},
    ],
    "kvtuner": [
        {"table": "C2.50", "store": {"group": 16, "residual": 16, "values": "sliding", "zero": "int"}},
        {"bits": 4},
        {"key_bits": 8, "value_bits": 4, "prefill_attends_dequantised": True},
    ],
    "kvtuner_per_token": [
        {"table": "C5.00", "store": {"group": 8, "residual": 16, "zero": "int"}},
        {"bits": 4},
        {"key_bits": 8, "value_bits": 4, "prefill_attends_dequantised": True},
    ],
    "lococo": [
        {"eta": 0, "length": 100, "block_size": 24, "local_len": 3, "buffer": 4, "accumulate_scores": True},
        {"kernel_size": 5, "n_convlayer": 2, "expand": 2, "hidden_act": "gelu", "hh_keep_rate": 0.25,
         "normalizer_init": 0.25, "lazy_end": True},
        {"paper_form": True},
    ],
    "nacl": [
        {"pin": "boundary", "preset": "code", "temperature": 0.5, "min_len": 70, "proxy_causal": False},
        {"protect": 0.2, "by_score": 0.3, "by_chance": 0.5, "proxy": 0.5, "decode_interval": 2},
    ],
    "per_token": [
        {"bits": 4, "store": {"group": 8, "residual": 16, "zero": "int"}},
        {"key_bits": 8, "value_bits": 4},
    ],
    "qfilters": [{"window": 5, "sinks": 3, "skip": [0]}],
    "qfilters_capped": [{"window": 5, "sinks": 3, "skip": [0]}, {"evict": "per_chunk"}],
    "random": [{"pin": "boundary", "decode": {"every": 2}, "draw": "fresh"}],
    "recency": [{"evict": "per_chunk"}],
    "scissorhands": [
        {"history": 7, "recent": 3, "drop": 5, "tie": "prob", "normalise": True},
        {"drop": 1, "evict": "per_chunk"},
    ],
    "snapkv": [{**SNAPKV, "pin": "none"}],
    "snapkv+kivi": [
        {**SNAPKV, "store": {"key_bits": 8, "value_bits": 2, "group": 16, "residual": 32}},
    ],
    "streaming_llm": [{"sinks": 2, "positions": "original", "dialogue": True}, {"prefill": "streaming"}],
    "tova": [{"granularity": "kv_head", "protect_last": True}, {"evict": "per_chunk"}],
    "window": [{"evict": "per_chunk"}],
}  # fmt: skip
#: knobs that no set can move, and why
FIXED: dict[str, dict[str, str]] = {
    "full": {"budget": "the full cache has only one"},
    "kvtuner": {"mode": "the other mode is kvtuner_per_token, whose store packs as its tables mean"},
    "kvtuner_per_token": {"mode": "the other mode is kvtuner, whose store packs as its tables mean"},
    "lococo": {"artefact": "names a file; test_lococo.py gives it one"},
    "qfilters": {"filters": "names a file; test_qfilters.py gives it one"},
    "qfilters_capped": {"filters": "names a file; test_qfilters.py gives it one"},
}
#: sets under which a prompt in pieces is read otherwise than in one, by what the knob says
BY_PIECE = [{"evict": "per_chunk"}, {"prefill_attends_dequantised": True}]


def others() -> list[str]:
    """The cases beside the defaults, as method@number."""
    return [f"{name}@{i}" for name, sets in SETS.items() for i in range(1, len(sets) + 1)]


def knobs_of(case: str) -> tuple[str, dict[str, Any]]:
    """A case's method and knobs; a name alone has its defaults."""
    name, _, number = case.partition("@")
    return name, SETS[name][int(number) - 1] if number else {}


def read_by_piece(case: str) -> bool:
    """Whether the pieces of a prompt matter to what the case keeps, by definition."""
    knobs = knobs_of(case)[1]
    return any(knobs.get(key) == value for one in BY_PIECE for key, value in one.items())
