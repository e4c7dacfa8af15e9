"""What kvpress keeps of a prompt and what its models then answer. Runs in kvpress' own environment: `make peers`.

    python tests/peers/ask_kvpress.py

Reads data/<architecture>/ as inputs.py wrote it, imports nothing of this repository, and writes kvpress.safetensors
there: for every press and budget, `<press>.<budget>.kept`, bool [L, H, S], and `<press>.<budget>.logits`,
float32 [16, V], of the forced tokens fed one by one after the prompt. The file's metadata says which versions answered
and for which inputs.
"""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    DecodingPress,
    KnormPress,
    ObservedAttentionPress,
    PrefillDecodingPress,
    QFilterPress,
    SnapKVPress,
    StreamingLLMPress,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

DATA = Path(__file__).resolve().parent / "data"
INPUTS = ("config.json", "model.safetensors", "tokens.json", "filters.safetensors")
BUDGETS = (0.5, 0.25, 0.125)
WINDOW = 8
ALPHA = 0.2


class GivenFilters(QFilterPress):
    """Q-Filters from a file instead of a public collection."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """The filters are there already."""


def qfilters(ratio: float, folder: Path, n: int = 0) -> QFilterPress:
    press = GivenFilters(ratio)
    press.q_filters = -load_file(folder / "filters.safetensors")["filters"]  # its own files hold the negative
    return press


def qfilters_capped(ratio: float, folder: Path, n: int) -> BasePress:
    """The same while decoding, one slot for every token."""
    on = DecodingPress(qfilters(0.0, folder), compression_interval=1, target_size=int(n * (1 - ratio)))
    return PrefillDecodingPress(qfilters(ratio, folder), on)


def adakv(ratio: float, folder: Path, n: int) -> BasePress:
    """A floor of ALPHA of the slots that the window leaves.

    The press counts the window, which every head keeps, into the share that it guards: a larger share, then.
    """
    slots = int(n * (1 - ratio))
    floor = int(ALPHA * (slots - WINDOW)) + WINDOW
    return AdaKVPress(SnapKVPress(ratio, window_size=WINDOW), alpha_safeguard=(floor + 0.5) / slots)


PRESSES: dict[str, Callable[[float, Path, int], BasePress]] = {
    "snapkv": lambda ratio, folder, n: SnapKVPress(ratio, window_size=WINDOW, kernel_size=5),
    "streaming_llm": lambda ratio, folder, n: StreamingLLMPress(ratio, n_sink=4),
    "observed_attention": lambda ratio, folder, n: ObservedAttentionPress(ratio),
    "knorm": lambda ratio, folder, n: KnormPress(ratio),
    "qfilters": qfilters,
    "qfilters_capped": qfilters_capped,
    "adakv": adakv,
}


@torch.no_grad()
def ask(model: PreTrainedModel, press: BasePress, prompt: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Slots kept of a prompt [S] of token ids, [L, H, S], bool, and logits [N, V] of the forced tokens [N] after it."""
    whole, cache, logits = DynamicCache(), DynamicCache(), []
    model(prompt[None], past_key_values=whole)
    with press(model):
        model(prompt[None], past_key_values=cache)
        kept = [kept_of(layer, held, of) for layer, held, of in zip(layers(model), cache.layers, whole.layers)]
        for i, token in enumerate(forced):
            at = torch.tensor([len(prompt) + i])  # true positions: the cache's own count is of what is left
            out = model(token[None, None], past_key_values=cache, cache_position=at, position_ids=at[None])
            logits.append(out.logits[0, 0])
    return torch.stack(kept), torch.stack(logits)


def layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def kept_of(attention: torch.nn.Module, held: Any, whole: Any) -> Tensor:
    """Slots [H, S] of one layer, as cached whole, whose keys are still held and not marked as dropped."""
    kept = (whole.keys[0, :, :, None] == held.keys[0, :, None]).all(-1).any(-1)
    assert (kept.sum(-1) == held.keys.shape[2]).all(), "two slots have the same key"
    dropped = getattr(attention, "masked_key_indices", None)
    if dropped is not None:
        _, heads, slots = dropped
        kept[heads, slots] = False
    return kept


def main() -> None:
    logging.disable_progress_bar()
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    for folder in sorted(path.parent for path in DATA.glob("*/config.json")):
        tokens = json.loads((folder / "tokens.json").read_text())
        prompt, forced = torch.tensor(tokens["prompt"]), torch.tensor(tokens["forced"])
        answers = {}
        for name, press in PRESSES.items():
            how = "eager" if name == "observed_attention" else "sdpa"
            for budget in BUDGETS:
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=how)
                kept, logits = ask(model.eval(), press(1 - budget, folder, len(prompt)), prompt, forced)
                answers |= {f"{name}.{budget}.kept": kept, f"{name}.{budget}.logits": logits}
                print(f"{folder.name} {name} {budget}: {kept.sum(-1).tolist()} of {len(prompt)} slots")
        read = hashlib.sha256(b"".join((folder / name).read_bytes() for name in INPUTS)).hexdigest()
        facts = json.dumps({**versions, "inputs": read})  # in one piece: the order of several changes from run to run
        save_file(answers, folder / "kvpress.safetensors", metadata={"facts": facts})


if __name__ == "__main__":
    main()
