"""How far two caches' predictions are apart, token by token, from their raw logits."""

from __future__ import annotations

import torch
from torch import Tensor

CLEAR = 0.1  # nats between the two likeliest tokens, from which on another likeliest token is no tie
ROOM = 2**21  # logits that are compared at once


def apart(full: Tensor, others: Tensor, said: Tensor) -> Tensor:
    """Five numbers for each of several caches' rows beside the full cache's, [5, M, B], float64.

    KL(full || other) in nats, not clipped; 1 where the likeliest token is another one (of a tie the lowest id counts);
    1 where, besides, the full cache's two likeliest are CLEAR apart; ln p(y) - ln q(y) of the token y that was said;
    1 where that is not the other one's likeliest. What is not finite stays so: it is a fault, not a score.

    full [B, V], others [M, B, V]: raw logits before the token.  said [B]: its id.
    """
    log_p = full.float().log_softmax(-1)  # [B, V]
    p, best, of_said = log_p.exp(), log_p.argmax(-1), log_p.gather(-1, said[:, None])[:, 0]
    first, second = log_p.topk(2, dim=-1).values.unbind(-1)
    found = []
    for block in others.split(max(1, ROOM // full.numel())):  # some caches at once, never a copy of all logits
        log_q = block.float().log_softmax(-1)  # [m, B, V]
        kl = (p * (log_p - log_q)).sum(-1, dtype=torch.float64)
        likeliest = log_q.argmax(-1)
        differs = likeliest != best
        clear = differs & (first - second >= CLEAR)
        gap = of_said - log_q.gather(-1, said.expand(len(block), -1)[..., None])[..., 0]
        found.append(torch.stack((kl, *(one.double() for one in (differs, clear, gap, likeliest != said)))))
    return torch.cat(found, dim=1)
