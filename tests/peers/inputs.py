"""What both sides of the comparison with kvpress read: tiny random checkpoints, tokens, and filters for Q-Filters.

    python -m tests.peers.inputs

Writes data/<architecture>/ beside this file. The checkpoints are kept as files because the two environments have
different versions of torch and transformers, which need not draw the same weights from one seed.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core import artefacts
from tests.tiny import VOCAB, tiny_model

DATA = Path(__file__).resolve().parent / "data"
ARCHITECTURES = ("llama", "qwen3")
PROMPT, FORCED = 93, 16  # no budget of a prompt of 93 tokens is a whole number of slots


def write(architecture: str) -> None:
    folder = DATA / architecture
    untrained = tiny_model(architecture)
    torch.manual_seed(1)
    for name, weight in untrained.named_parameters():
        if "norm" in name:  # all ones, the norms of Qwen3's keys would tie
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    untrained.save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # nothing is sampled
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    # no token twice: in the first layer its keys would have the same norm
    prompt = (torch.randperm(VOCAB - 1, generator=generator)[:PROMPT] + 1).tolist()
    forced = torch.randint(1, VOCAB, (FORCED,), generator=generator).tolist()
    (folder / "tokens.json").write_text(json.dumps({"prompt": prompt, "forced": forced}) + "\n")
    rows = [torch.randint(1, VOCAB, (1, 96), generator=generator)]
    made = load_method("qfilters").calibrate(model, rows, seed=0)
    artefacts.save(made.method, made.name, model, made.tensors, made.facts, at=folder)


if __name__ == "__main__":
    for architecture in ARCHITECTURES:
        write(architecture)
