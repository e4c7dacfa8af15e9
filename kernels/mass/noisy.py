"""Column sums of a softmax whose logits carry Gumbel noise, without an [n, n] matrix of anything."""

import torch
from torch import Tensor

from kernels.attend.reference import logits
from kernels.attend.rules import Rules
from kernels.noise import Stem

# elements of one block's scores, and query rows that it has at least: of 2**18 to 2**21, the largest measured fastest
BLOCK_ELEMENTS, LEAST_ROWS = 1 << 21, 8


def noisy_mass(
    q: Tensor,
    k: Tensor,
    rules: Rules,
    stem: Stem | None,
    q_pos: Tensor,
    k_pos: Tensor,
    tau: float | Tensor,
    layout: str,
) -> Tensor:
    """What `kernels.mass.noisy_mass` gives.

    With u uniform, -log(-log u) is Gumbel noise. At tau = 1 a noisy row is the plain one divided by -log u and brought
    back to sum 1, so that a block costs one logarithm per element beside its attention. Rows are whole within a block:
    their noise is drawn once, and again wherever the same keys come up.
    """
    q, k = q.detach(), k.detach()
    B, Hq, T, D = q.shape
    H, S = k.shape[1], k.shape[2]
    G = Hq // H
    tail = layout == "tail" and rules.plain and rules.window is None and q.dtype == k.dtype
    rows = min(T, max(LEAST_ROWS, BLOCK_ELEMENTS // max(1, B * Hq * S)))
    sums = torch.zeros(B * Hq, 1, S, device=q.device)
    work = [torch.empty(B * Hq * rows * S, dtype=torch.int32, device=q.device) for _ in range(2 if stem else 0)]
    scores = q.new_empty(B * Hq * rows * S if tail else 0)
    k_t = k.transpose(-1, -2).reshape(B * H, D, S) if tail else k
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    for i in range(0, T, rows):
        t = min(rows, T - i)
        n = S - T + i + t if tail else S  # slots that the block's last query may see
        now = slice(i, i + t)
        if tail:
            x = scores[: B * Hq * t * n].view(B * H, G * t, n)
            torch.bmm((q[:, :, now] * rules.scale).reshape(B * H, G * t, D), k_t[:, :, :n], out=x)
            x.view(B * Hq, t, n)[..., n - t :].masked_fill_(future[:t, :t], -torch.inf)
            x = x.view(B, H, G, t, n).float()  # a query of the tail sees itself at least
        else:
            x = logits(q[:, :, now], k, rules, q_pos[:, now], k_pos)  # [B, H, G, t, S]
        noise = None
        if stem is not None:
            state = stem.state.view(B, H, G, -1, 1)
            part = Stem(state if state.shape[3] == 1 else state[:, :, :, now])
            shape = (B, H, G, part.state.shape[3], n)
            places = [w[: B * Hq * shape[3] * n].view(shape) for w in work]
            noise = part.log_uniform(k_pos[:, :, None, None, :n], *places)
        block = _rows(x, noise, tau[:, None, None, now, None] if isinstance(tau, Tensor) else tau)
        if not tail:
            block.nan_to_num_(0.0)  # of queries that see nothing
        total = block.sum(-1)
        share = torch.where(total == 0, 1, total).reciprocal().view(B * Hq, 1, t)
        sums[..., :n] += share @ block.view(B * Hq, t, n)
    return sums.view(B, Hq, S)


def _rows(x: Tensor, log_u: Tensor | None, tau: float | Tensor) -> Tensor:
    """Numbers in proportion to exp((x + noise) / tau), each row with its own factor, which may be negative; in x."""
    if isinstance(tau, Tensor) or tau != 1:
        if log_u is not None:
            x.sub_(log_u.neg_().log_())
        return torch.softmax(x.div_(tau), -1, out=x)
    torch.softmax(x, -1, out=x)
    return x if log_u is None else x.div_(log_u)


def noisy_rows(probs: Tensor, stem: Stem, k_pos: Tensor, tau: Tensor, q_pos: Tensor | None) -> Tensor:
    """What `kernels.mass.noisy_rows` gives: exp((x + noise) / tau) is in proportion to (p / -log u) ** (1 / tau)."""
    B, Hq, S = probs.shape
    H = k_pos.shape[1]
    if q_pos is not None:
        stem = stem.then(q_pos[:, None, None])
    log_u = stem.log_uniform(k_pos.repeat_interleave(Hq // H, dim=1))
    weight = (probs / -log_u).pow(1 / tau[:, None, None])
    total = weight.sum(-1, keepdim=True)
    return (weight / torch.where(total == 0, 1, total)).view(B, H, -1, S).sum(dim=2)
