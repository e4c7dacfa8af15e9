"""How far a computed number may lie from the exact one, from its type and its sums: the same on every machine."""

import math

import torch

#: sums are made in this type, or in a wider one where the numbers themselves are wider
SUMS = torch.float32


def bound(
    dtype: torch.dtype,
    length: int,
    logit: float = 0.0,
    *,
    size: float = 1.0,
    width: int = 1,
    scores: torch.dtype | None = None,
) -> float:
    """Largest difference from the exact result that rounding explains; any order of summation stays within it.

    dtype: of inputs, weights and result.  length: terms of the longest sum behind the softmax, slots or queries.
    logit: largest |logit| of a slot that gets attention; 0: no softmax.  size: largest |value| that is summed, or the
    largest sum where all terms have one sign.  width: terms of a logit.  scores: the logits' type; None: dtype.

    One sum of n terms, u = eps / 2 the largest rounding error of one addition. Such errors are even in [-u, u], of
    variance u² / 3, and the i-th multiplies what has been summed until then, at most i / n of the whole when all terms
    have one sign: the standard deviation of the sum's error is at most u √(n / 9) times the sum of |terms|, and
    √n eps is six of them. Terms of random signs, partial sums in lanes, blocks, wider registers or other orders only
    lessen it. Sums are made in SUMS or wider; what goes into the last one and what comes out of it is rounded to
    dtype, or cut off, which costs up to eps(dtype) each.

    A softmax of logits x + d, |d| <= e, has weights p exp(d) / Σ p exp(d): each is off by about 2 e of itself at most.
    e is |logit| (eps(scores) + √width eps(SUMS)): a logit has no more digits than its type. Where it is below 1, its
    terms cancel, and they, not their sum, are what is rounded; hence 1 at least. exp, log and tanh err by a unit or two
    of the last place and lie within the two eps. So a sum of weights times values, or of the weights of a column, is
    off by at most

        size (2 eps(dtype) + √length eps(SUMS) + 2 max(|logit|, 1) (eps(scores) + √width eps(SUMS)))
    """
    eps, eps_scores = torch.finfo(dtype).eps, torch.finfo(scores or dtype).eps
    eps_sums = min(eps, torch.finfo(SUMS).eps)
    off = 2 * eps + math.sqrt(length) * eps_sums
    if logit:
        off += 2 * max(logit, 1.0) * (eps_scores + math.sqrt(width) * eps_sums)
    return size * off
