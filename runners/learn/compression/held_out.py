"""What a trained compressor saves on held-out text, against dropping at equal slots."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis import stats
from methods import load_method
from methods.core.contract import Method
from methods.lococo import LoCoCo

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def baselines(method: LoCoCo) -> dict[str, Method]:
    """What a trained compressor is compared with at equal slots, and the full cache.

    eta=0 drops what the last chunk attends to least; where the newest slots are kept on top, it does so without and,
    as "eta=0, recent", with them. h2o keeps the newest half and, by attention summed over the whole
    text, the heaviest half: raw slots with local_len of them the newest, and next-heaviest ones instead of fused.
    """
    dropping = replace(method, eta=0.0, artefact=None, local_len=method.local_len or 0)
    h2o = replace(dropping, hh_keep_rate=0.75, local_len=method.slots // 2, accumulate_scores=True)
    them = {"full": load_method("full"), "lococo": method, "eta=0": replace(dropping, local_len=0), "h2o": h2o}
    return {**them, "eta=0, recent": dropping} if dropping.local_len else them


def compare_with_dropping(model: PreTrainedModel, method: LoCoCo, rows: Tensor, batch: int) -> dict[str, Any]:
    """Mean losses in nats per token on rows [N, L]: {"nll": {name: mean}, "gain": {name: [mean, low, high]}, …}.

    gain: a baseline's loss less the method's on the same rows, above 0 where the method is better, with the 95 %
    interval of a bootstrap over rows.
    """
    each = {name: losses(model, one, rows, batch).mean(1) for name, one in baselines(method).items()}  # [N]
    ids = [f"{i:08}" for i in range(len(rows))]
    gain: dict[str, list[float]] = {}
    for name in set(each) - {"full", "lococo"}:
        gap = (each[name] - each["lococo"]).double().cpu().numpy()[:, None]
        estimate = stats.estimate(stats.bootstrap(gap, np.ones(len(ids)), ids, "held-out rows")[:, 0])
        gain[name] = [round(x, 5) for x in (estimate.value, estimate.low, estimate.high)]
    nll = {name: round(means.mean().item(), 5) for name, means in each.items()}
    return {"rows": len(rows), "tokens": rows[:, 1:].numel(), "nll": nll, "gain": dict(sorted(gain.items()))}


@torch.no_grad()
def predicted(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logarithms of the full cache's probabilities of the next token, float32, [B, L, vocabulary]."""
    cache = load_method("full").cache_for(model)
    return model(ids, past_key_values=cache, use_cache=True).logits.float().log_softmax(-1)


@torch.no_grad()
def losses(model: PreTrainedModel, method: Method, rows: Tensor, batch: int) -> Tensor:
    """Next-token losses [N, L - 1] in nats of rows [N, L], each read through the method's cache."""
    parts = []
    for ids in rows.split(batch):
        logits = model(ids, past_key_values=method.cache_for(model), use_cache=True).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        parts.append(loss.view(len(ids), -1))
    return torch.cat(parts)
