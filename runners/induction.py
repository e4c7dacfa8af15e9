"""A hand-written start for training: layers 0 and 1 find the token that followed the last two tokens before.

Layer 0 holds a previous-token head and a head for the token before that one; they write both identities beside the
token's own. Layer 1 compares (this token, the one before) with (the one before, the one before that) of every earlier
position and copies what it finds: an induction head over two tokens, and a second one over a single token. It is an
initialisation and nothing else: every weight trains freely afterwards.

The residual stream, by dimension: 0 a constant; 1..I the token's identity, a random code; then I dimensions each for
the identity of the previous token and of the one before; the rest noise.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

STD = 0.02  # of everything that the circuit does not use
SHARPNESS = 30.0  # logit of a previous-token head at its distance
FALLOFF = 4.0  # rotary pairs over which that logit's weight falls by e; slower pairs cannot tell neighbours apart
MATCH = 25.0  # logit of one matching identity
GAIN = 3.0  # of what the induction heads add to the token's own identity


@torch.no_grad()
def write_circuit(model: LlamaForCausalLM, seed: int) -> None:
    """Initialise every weight of `model` from `seed`, the circuit included; the model needs two layers or more."""
    config = model.config
    width, d = config.hidden_size, config.head_dim
    size = (width - 1) // 3 if width < 3 * d + 1 else d  # I, dimensions of an identity
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.copy_(STD * normal(*weight.shape))
    own, previous, before = (slice(1 + i * size, 1 + (i + 1) * size) for i in range(3))
    embedding = model.model.embed_tokens.weight  # [V, M]
    embedding[:, 0] = 1.0
    embedding[:, own] = normal(embedding.shape[0], size) / math.sqrt(size)
    embedding[:, previous] = embedding[:, before] = 0.0

    first, second = (layer.self_attn for layer in model.model.layers[:2])
    # what RMSNorm divides by: constant and own identity have norm 1, then two more identities join
    rms = [math.sqrt((1 + parts) / width) for parts in (1, 3)]
    pairs = torch.arange(d // 2, dtype=torch.float32)
    turns = config.rope_parameters["rope_theta"] ** (-2 * pairs / d)  # [D/2], radians per token

    weights = torch.exp(-pairs / FALLOFF)
    weights *= SHARPNESS * math.sqrt(d) / weights.sum()
    for head, distance in enumerate((1, 2)):
        rows = slice(head * d, (head + 1) * d)
        angle = -distance * turns
        first.q_proj.weight[rows] = 0.0
        first.q_proj.weight[rows, 0] = rms[0] * torch.cat([weights.sqrt() * angle.cos(), weights.sqrt() * angle.sin()])
        first.o_proj.weight[:, rows] = 0.0
        target = (previous, before)[head]
        first.o_proj.weight[target, rows] = rms[0] * torch.eye(d)[:size]
    first.k_proj.weight[:d] = 0.0
    first.k_proj.weight[:d, 0] = rms[0] * torch.cat([weights.sqrt(), torch.zeros(d // 2)])
    first.v_proj.weight[:d] = 0.0
    first.v_proj.weight[:size, own] = torch.eye(size)

    # the pairs that turn by less than a radian over half the window
    slow = (turns * config.max_position_embeddings / 2 < 1).nonzero().flatten()
    slow = torch.cat([slow, slow + d // 2])
    projections = [normal(len(slow), size) / math.sqrt(len(slow)) for _ in range(2)]
    scale = math.sqrt(MATCH * math.sqrt(d)) * rms[1]
    rows = slice(0, d)
    second.k_proj.weight[rows] = 0.0
    second.k_proj.weight[slow, previous] = scale * projections[0]
    second.k_proj.weight[slow, before] = scale * projections[1]
    second.v_proj.weight[rows] = 0.0
    second.v_proj.weight[:size, own] = torch.eye(size)
    for head in range(2):
        start = head * d
        second.q_proj.weight[start : start + d] = 0.0
        second.q_proj.weight[start + slow, own] = scale * projections[0]
        if head == 0:
            second.q_proj.weight[start + slow, previous] = scale * projections[1]
        second.o_proj.weight[:, start : start + d] = 0.0
        share = 0.8 if head == 0 else 0.2
        second.o_proj.weight[own, start : start + d] = GAIN * share * rms[1] * torch.eye(d)[:size]
