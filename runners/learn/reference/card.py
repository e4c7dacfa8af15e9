"""Measure a trained reference model and write its card: `python -m runners.learn.reference.card --model FOLDER`.

Everything in the card's tables comes from this script: recall by ability and length, needles by depth, the bundled
split with real generation, perplexity on held-out prose beside a 5-gram model's.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from runners.learn.reference.attention_figure import draw_attention
from runners.learn.reference.curves import draw_curves
from runners.learn.reference.recall import ABILITIES, fitted_document, recall
from tasks.documents import prose, prose_hash
from tasks.longbench.task import BUNDLED
from tasks.scoring.metrics import best_score, first_line

TEMPLATE = Path(__file__).with_suffix(".md")
LENGTHS = (512, 1024, 2048, 4096)
SEED = 777  # of the measured documents; training's own curve uses another
ASSETS = Path(__file__).resolve().parents[3] / "assets" / "reference"


def measure_recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: int) -> dict[str, Any]:
    """By length and ability, [right, asked]; four questions per document, one where a document holds one only."""
    by_length = {}
    for length in LENGTHS:
        by_length[str(length)] = {k: list(v) for k, v in recall(model, tokenizer, length, documents, 4, SEED).items()}
        print(length, {k: f"{a}/{b}" for k, (a, b) in by_length[str(length)].items()}, flush=True)
    return by_length


def measure_needles(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: int) -> dict[str, Any]:
    """By length and fifth of the depth, [found, hidden]."""
    grid: dict[str, Any] = {}
    for length in LENGTHS:
        cells = [[0, 0] for _ in range(5)]
        for i in range(documents):
            # recall() with one document of this seed measures exactly the document whose depth is read here
            seed = SEED + 1000 + i
            depth = fitted_document(tokenizer, "needle", length, 1, [seed, 1, 0]).depth
            right, asked = recall(model, tokenizer, length, 1, 1, seed, ("needle",))["needle"]
            cell = cells[min(4, int(depth * 5))]
            cell[0], cell[1] = cell[0] + right, cell[1] + asked
        grid[str(length)] = cells
        print("needle", length, cells, flush=True)
    return grid


@torch.no_grad()
def measure_bundle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """By subset of longbench-mini: score, share of answers that ended by EOS, score of the context's first words."""
    by_subset = {}
    for name, subset in yaml.safe_load((BUNDLED / "subsets.yaml").read_text(encoding="utf-8")).items():
        scores, leads, ended = [], [], 0
        samples = [json.loads(line) for line in (BUNDLED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for sample in samples:
            prompt = subset["prompt"].replace("{input}", sample["input"]).replace("{context}", sample["context"])
            ids = torch.tensor([tokenizer(prompt).input_ids])
            out = model.generate(input_ids=ids, max_new_tokens=subset["max_new_tokens"])[0, ids.shape[1] :]
            ended += int(out[-1] == tokenizer.eos_token_id)
            lead = tokenizer.decode(tokenizer(sample["context"], add_special_tokens=False).input_ids[: len(out)])
            for text, kept in ((tokenizer.decode(out, skip_special_tokens=True), scores), (lead, leads)):
                text = first_line(text) if subset["first_line"] else text
                kept.append(best_score(subset["metric"], text, sample["answers"], sample["all_classes"]))
        n = len(samples)
        by_subset[name] = {"n": n, "score": 100 * sum(scores) / n, "lead": 100 * sum(leads) / n, "ended": ended / n}
        by_subset[name] |= {"category": subset["category"], "metric": subset["metric"]}
        print(name, by_subset[name], flush=True)
    return by_subset


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int = 1024
) -> dict[str, Any]:
    """Perplexity per token of held-out prose, of the model and of an interpolated 5-gram of the training prose."""
    train, held_out = ([t for p in prose(s) for t in _ids(tokenizer, p)] for s in ("train", "held_out"))
    held_out = held_out[: 40 * length]
    nll = 0.0
    for start in range(0, len(held_out), length):
        ids = torch.tensor([[tokenizer.bos_token_id, *held_out[start : start + length]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return {
        "tokens": len(held_out),
        "model": math.exp(nll / len(held_out)),
        "five_gram": five_gram_perplexity(train, held_out, len(tokenizer)),
    }


def five_gram_perplexity(train: list[int], test: list[int], vocabulary: int, order: int = 5) -> float:
    """Perplexity of `test` under a Witten-Bell interpolated n-gram model of `train`."""
    counts: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
    for i, token in enumerate(train):
        for n in range(min(order, i + 1)):
            counts[n][tuple(train[i - n : i])][token] += 1
    nll = 0.0
    for i, token in enumerate(test):
        p = 1.0 / vocabulary
        for n in range(min(order, i + 1)):
            seen = counts[n].get(tuple(test[i - n : i]))
            if seen:
                total, kinds = seen.total(), len(seen)
                p = (seen[token] + kinds * p) / (total + kinds)
        nll -= math.log(p)
    return math.exp(nll / len(test))


@torch.no_grad()
def measure_attention(
    tokenizer: PreTrainedTokenizerFast, folder: Path, length: int = 1024
) -> list[dict[str, list[float]]]:
    """By layer and query head, where the queries of fact documents look: shares of attention.

    "copied token": of a query that predicts a token of the answer, the share on that token where the document says it;
    all others: means over the queries from the 64th on.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    kinds: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("first token", "last 16 tokens", "copied token", "top 5 % of slots")
    }
    for i in range(6):
        document = fitted_document(tokenizer, "facts", length, 1, [SEED, 2, i])
        prompt = tokenizer(document.prompt()).input_ids
        answer = tokenizer(document.turns[0].answer, add_special_tokens=False).input_ids[:-1]  # without the full stop
        ids = torch.tensor([prompt + answer])
        layers = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        probs = torch.stack([layer[0] for layer in layers])  # [L, Hq, S, S]
        position = torch.arange(ids.shape[1])
        near = probs * (position[:, None] - position < 16)
        heavy = probs.sort(dim=-1, descending=True).values * (position < (0.05 * (position[:, None] + 1)).round())
        asked = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        source = torch.arange(len(answer)) + _said_at(prompt, answer)
        kinds["first token"].append(probs[:, :, 64:, 0].mean(2))  # [L, Hq], as all of them
        kinds["last 16 tokens"].append(near[:, :, 64:].sum(-1).mean(2))
        kinds["copied token"].append(probs[:, :, asked, source].mean(2))
        kinds["top 5 % of slots"].append(heavy[:, :, 64:].sum(-1).mean(2))
    means = {name: torch.stack(runs).mean(0).tolist() for name, runs in kinds.items()}
    return [{name: heads[i] for name, heads in means.items()} for i in range(len(means["first token"]))]


def _said_at(ids: list[int], answer: list[int]) -> int:
    """Where `answer` stands in `ids` for the last time."""
    return max(i for i in range(len(ids) - len(answer) + 1) if ids[i : i + len(answer)] == answer)


@torch.no_grad()
def measure_keys(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int = 1024
) -> list[list[list[float]]]:
    """By layer, KV head and channel, the mean absolute value of the keys of one fact document, after RoPE."""
    document = fitted_document(tokenizer, "facts", length, 1, [SEED, 2, 0])
    cache = model(input_ids=torch.tensor([tokenizer(document.prompt()).input_ids]), use_cache=True).past_key_values
    return [[[round(x, 4) for x in head] for head in layer.keys[0].abs().mean(1).tolist()] for layer in cache.layers]


def _ids(tokenizer: PreTrainedTokenizerFast, paragraph: str) -> list[int]:
    return tokenizer(f"{paragraph}\n\n", add_special_tokens=False).input_ids


def training_facts(log: Path) -> dict[str, Any]:
    """Tokens, steps and seconds of the run that wrote `log`."""
    last = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if '"loss"' in line][-1]
    return {"tokens": last["tokens"], "steps": last["step"], "seconds": last["seconds"]}


def card(measured: dict[str, Any]) -> str:
    """The text of the card."""
    config = measured["config"]
    rows = [
        f"| {ability} | " + " | ".join(_share(measured["recall"][str(n)][ability]) for n in LENGTHS) + " |"
        for ability in ABILITIES
    ]
    needles = [f"| {n} | " + " | ".join(_share(cell) for cell in measured["needles"][str(n)]) + " |" for n in LENGTHS]
    bundle = [
        f"| {name} | {m['category']} | {m['metric']} | {m['score']:.1f} | {m['lead']:.1f} | {100 * m['ended']:.0f} % |"
        for name, m in measured["bundle"].items()
    ]
    attention = [
        f"| {i} | "
        + " | ".join(f"{100 * fmean(heads):.0f} ({100 * max(heads):.0f})" for heads in layer.values())
        + f" | {outlier:.1f} |"
        for i, (layer, outlier) in enumerate(zip(measured["attention"], map(_outlier, measured["keys"])))
    ]
    training, perplexity = measured["training"], measured["perplexity"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        parameters=measured["parameters"] / 1e6,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config["head_dim"],
        mlp=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        window=config["max_position_embeddings"],
        base=config["rope_parameters"]["rope_theta"],
        tokens=training["tokens"] / 1e6,
        steps=training["steps"],
        minutes=training["seconds"] / 60,
        documents=measured["documents"],
        recall="\n".join(rows),
        needles="\n".join(needles),
        bundle="\n".join(bundle),
        attention="\n".join(attention),
        model_perplexity=perplexity["model"],
        five_gram=perplexity["five_gram"],
        prose_tokens=perplexity["tokens"],
        train_hash=measured["prose"]["train"],
        held_out_hash=measured["prose"]["held_out"],
    )


def _outlier(heads: list[list[float]]) -> float:
    """The largest channel over the mean of all, of the head where it is largest."""
    return max(max(channels) / fmean(channels) for channels in heads)


def _share(cell: list[int]) -> str:
    right, asked = cell
    return f"{100 * right / asked:.0f} ({right}/{asked})" if asked else "–"


def main() -> None:
    """Measure, write measured.json, README.md and the pictures beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--log", type=Path, default=Path("outputs/train/reference/log.jsonl"))
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--text-only", action="store_true", help="rewrite the card from measured.json")
    given = parser.parse_args()
    path = given.model / "measured.json"
    if not given.text_only:
        if given.threads:
            torch.set_num_threads(given.threads)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        measured = {
            "config": {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"},
            "parameters": model.num_parameters(),
            "documents": given.documents,
            "training": training_facts(given.log),
            "prose": {split: prose_hash(split) for split in ("train", "held_out")},
            "recall": measure_recall(model, tokenizer, given.documents),
            "needles": measure_needles(model, tokenizer, 4 * given.documents),
            "bundle": measure_bundle(model, tokenizer),
            "attention": measure_attention(tokenizer, given.model),
            "keys": measure_keys(model, tokenizer),
            "perplexity": measure_perplexity(model, tokenizer),
        }
        path.write_text(json.dumps(measured, indent=1, default=str) + "\n", encoding="utf-8")
        draw_curves(given.log, given.model / "curves.png")
    known = json.loads(path.read_text(encoding="utf-8"))
    draw_attention(known["attention"], known["keys"], given.model / "attention.png")
    (given.model / "README.md").write_text(card(known), encoding="utf-8")


if __name__ == "__main__":
    main()
